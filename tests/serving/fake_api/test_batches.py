"""The batch APIs with the official clients: half the price, later, each answer with its request."""

from __future__ import annotations

import base64
import json
import time

import pytest
from google.genai import types
from openai import NotFoundError

from dataflow.serving.fake_api import expected_mark, read_mark
from dataflow.serving.fake_api.pictures import draw

PNG = draw("an input of the user's own")
MODEL = "gemini-2.5-flash-image"


@pytest.fixture(autouse=True)
def _clean(api):
    api.script({"batch": {"seconds": 0.05}})
    api.reset()


def submit(openai, bodies, endpoint="/v1/images/generations"):
    """Upload requests named by their keys and start a job."""
    lines = [{"custom_id": name, "method": "POST", "url": endpoint, "body": body} for name, body in bodies.items()]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = openai.files.create(file=("in.jsonl", data), purpose="batch")
    return openai.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"run": "1"}
    )


def ended(get, running):
    for _ in range(200):
        job = get()
        if running not in str(job.status if hasattr(job, "status") else job.state):
            return job
        time.sleep(0.02)
    raise TimeoutError


def lines(openai, file_id):
    return [json.loads(line) for line in openai.files.content(file_id).content.splitlines()]


def body(prompt, **facts):
    return {"model": "gpt-image-2", "prompt": prompt, **facts}


class TestOpenAI:
    def finished(self, openai, bodies, **facts):
        job = submit(openai, bodies, **facts)
        return ended(lambda: openai.batches.retrieve(job.id), "in_progress")

    def test_answers_come_back_by_name_at_half_price(self, api, openai):
        api.script({"batch": {"seconds": 0.3}})
        started = submit(openai, {f"r{n}": body(f"batch {n}") for n in range(3)})
        assert (started.status, started.output_file_id, started.metadata) == ("in_progress", None, {"run": "1"})
        job = ended(lambda: openai.batches.retrieve(started.id), "in_progress")
        assert (job.status, job.error_file_id) == ("completed", None)
        assert (job.request_counts.total, job.request_counts.completed, job.request_counts.failed) == (3, 3, 0)
        answers = lines(openai, job.output_file_id)
        assert [answer["custom_id"] for answer in answers] == ["r2", "r1", "r0"]
        for answer in answers:
            assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
            picture = base64.b64decode(answer["response"]["body"]["data"][0]["b64_json"])
            assert read_mark(picture) == expected_mark(f"batch {answer['custom_id'][1:]}")
        entries = api.ledger()["attempts"]
        assert all(entry["batch"] and entry["reported"] for entry in entries)
        assert entries[0]["usd"] == pytest.approx(0.5 * (1290 * 30 + 2 * 0.3) / 1e6)
        assert started.id in [batch.id for batch in openai.batches.list()]

    def test_edits_and_chats(self, openai):
        file = openai.files.create(file=("a.png", PNG), purpose="vision")
        edit = body("bluer", images=[{"file_id": file.id}])
        (answer,) = lines(openai, self.finished(openai, {"e": edit}, endpoint="/v1/images/edits").output_file_id)
        picture = base64.b64decode(answer["response"]["body"]["data"][0]["b64_json"])
        assert read_mark(picture) == expected_mark("bluer", [PNG])
        chat = {"model": "judge", "messages": [{"role": "user", "content": "hm"}]}
        job = self.finished(openai, {"c": chat}, endpoint="/v1/chat/completions")
        assert lines(openai, job.output_file_id)[0]["response"]["body"]["choices"][0]["message"]["content"]

    def test_failed_lines_stand_in_a_file_of_their_own(self, api, openai):
        api.script({"batch": {"seconds": 0.05}, "bad": "refuse", "hung": "hang", "late": "expired", "gone": "lost"})
        prompts = {name: body(name) for name in ("fine", "bad", "hung", "late", "gone")}
        job = self.finished(openai, {**prompts, "wrong": body("x", size="1x1")})
        assert [line["custom_id"] for line in lines(openai, job.output_file_id)] == ["fine"]
        failed = {line["custom_id"]: line for line in lines(openai, job.error_file_id)}
        assert set(failed) == {"bad", "hung", "late", "wrong"}
        assert failed["bad"]["response"]["body"]["error"]["code"] == "moderation_blocked"
        assert failed["hung"]["response"]["status_code"] == 500
        assert (failed["late"]["response"], failed["late"]["error"]["code"]) == (None, "batch_expired")
        assert failed["wrong"]["response"]["status_code"] == 400

    @pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
    def test_jobs_that_do_not_finish(self, api, openai, status):
        api.script({"batch": {"seconds": 0.05, "status": status}})
        job = self.finished(openai, {"a": body("a"), "b": body("b")})
        assert job.status == status
        if status == "expired":
            assert [line["custom_id"] for line in lines(openai, job.output_file_id)] == ["a"]
            assert [line["custom_id"] for line in lines(openai, job.error_file_id)] == ["b"]
        else:
            assert (job.output_file_id, api.ledger()["totals"]["usd"]) == (None, 0)

    def test_cancel(self, api, openai):
        api.script({"batch": {"seconds": 30}})
        job = submit(openai, {"a": body("a")})
        assert openai.batches.cancel(job.id).status == "cancelled"
        assert api.ledger()["totals"]["usd"] == 0

    def test_files_are_checked_before_the_work(self, openai):
        file = openai.files.create(file=("in.jsonl", b"nonsense\n{}"), purpose="batch")
        job = openai.batches.create(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
        assert job.status == "failed"
        assert [error.code for error in job.errors.data] == ["invalid_json_line", "missing_required_parameter"]
        assert openai.files.retrieve(file.id).bytes == 11
        assert openai.files.delete(file.id).deleted
        with pytest.raises(NotFoundError):
            openai.files.content(file.id)
        with pytest.raises(NotFoundError):
            openai.batches.retrieve("batch_none")


def mark_of(response):
    return read_mark(response.candidates[0].content.parts[0].inline_data.data)


CONFIG = {"response_modalities": ["IMAGE"]}


class TestGemini:
    def finished(self, gemini, source, **facts):
        job = gemini.batches.create(model=MODEL, src=source, config={"display_name": "test", **facts})
        assert (job.state, job.display_name) == (types.JobState.JOB_STATE_RUNNING, "test")
        return ended(lambda: gemini.batches.get(name=job.name), "RUNNING")

    def test_requests_sent_inline_come_back_in_order(self, api, gemini):
        api.script({"batch": {"seconds": 0.1}, "bad": "500", "blocked": "block"})
        prompts = ["one", "bad", "blocked", "two"]
        source = [types.InlinedRequest(contents=prompt, config=CONFIG, metadata={"key": prompt}) for prompt in prompts]
        job = self.finished(gemini, source)
        assert job.state == types.JobState.JOB_STATE_SUCCEEDED
        answers = job.dest.inlined_responses
        assert [answer.metadata["key"] for answer in answers] == prompts
        assert [mark_of(answers[at].response) for at in (0, 3)] == [expected_mark("one"), expected_mark("two")]
        assert (answers[1].response, answers[1].error.code) == (None, 500)
        assert answers[2].response.prompt_feedback.block_reason
        usd = [entry["usd"] for entry in api.ledger()["attempts"]]
        assert usd[0] == pytest.approx(0.5 * (1290 * 30 + 0.3) / 1e6)
        assert usd[1] == 0

    def test_requests_in_a_file(self, gemini, tmp_path):
        requests = [
            {
                "key": name,
                "request": {
                    "contents": [{"parts": [{"text": name}]}],
                    "generationConfig": {"responseModalities": ["IMAGE"]},
                },
            }
            for name in ("one", "two")
        ]
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join(map(json.dumps, requests)))
        file = gemini.files.upload(file=path, config={"display_name": "input", "mime_type": "application/jsonl"})
        assert (file.display_name, file.size_bytes) == ("input", path.stat().st_size)
        job = self.finished(gemini, file.name)
        answers = [json.loads(line) for line in gemini.files.download(file=job.dest.file_name).splitlines()]
        assert [answer["key"] for answer in answers] == ["one", "two"]
        for answer in answers:
            data = answer["response"]["candidates"][0]["content"]["parts"][0]["inlineData"]["data"]
            assert read_mark(base64.b64decode(data)) == expected_mark(answer["key"])
        gemini.files.delete(name=file.name)

    def test_cancel(self, api, gemini):
        api.script({"batch": {"seconds": 30}})
        job = gemini.batches.create(model=MODEL, src=[types.InlinedRequest(contents="x", config=CONFIG)])
        gemini.batches.cancel(name=job.name)
        assert gemini.batches.get(name=job.name).state == types.JobState.JOB_STATE_CANCELLED
        assert job.name in [known.name for known in gemini.batches.list()]

    @pytest.mark.parametrize("status", ["failed", "expired"])
    def test_jobs_that_do_not_finish(self, api, gemini, status):
        api.script({"batch": {"seconds": 0.05, "status": status}})
        job = self.finished(gemini, [types.InlinedRequest(contents=name, config=CONFIG) for name in "ab"])
        assert job.state.value == f"JOB_STATE_{status.upper()}"
        if status == "expired":
            assert [answer.error is None for answer in job.dest.inlined_responses] == [True, False]
