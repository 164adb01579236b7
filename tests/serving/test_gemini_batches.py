"""Batch jobs of Gemini's API: submitted once, found again, every answer with its own request."""

import asyncio
import json

import orjson
import pytest
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    FatalServingError,
    RateLimitError,
    RefusedError,
    RetryError,
)
from dataflow.io import ImageIO
from dataflow.serving import batch_jobs, gemini_batches
from dataflow.serving.api_errors import classify
from dataflow.serving.batch_jobs import BatchJob, new_name
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.serving.gemini_batches import INLINE_LINES, GeminiBatches
from dataflow.serving.gemini_replies import gemini_reply
from dataflow.types import GenerationRequest, Turn

pytest.importorskip("google.genai")
from dataflow.serving.gemini_image_serving import GeminiImageServing

KEY = "df-secret-0123456789"
MODEL = "gemini-2.5-flash-image"
MANY = INLINE_LINES + 4


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY, batch_seconds=0.1) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr(batch_jobs, "FIRST_POLL", 0.05)
    server.script({})
    server.reset()
    return server


@pytest.fixture
def serving(api, tmp_path):
    def make(**options):
        return GeminiImageServing(image_io=ImageIO(tmp_path), api_url=api.url, batch_jobs=True, **options)

    return make


def requests(number, name=None, **facts):
    job = name or new_name()
    return [
        GenerationRequest(request_id=f"{at:032x}", prompt=f"thing {at:02}", seed=1, job=job, **facts)
        for at in range(number)
    ]


def run(serving, asked):
    async def work():
        try:
            return await serving.generate(asked)
        finally:
            await asyncio.to_thread(serving.cleanup)

    serving.setup()
    return asyncio.run(work())


def kinds(results):
    return [type(result.error) for result in results]


def own_images(asked, results):
    return [
        None if result.error else read_mark(bytes(result.images[0])) == expected_mark(one.prompt)
        for one, result in zip(asked, results, strict=True)
    ]


def cost(results):
    return sum(result.usage.get("usd") or 0 for result in results)


@pytest.mark.parametrize("number", [3, MANY])
def test_every_request_gets_its_own_image_at_half_price(api, serving, number):
    asked = requests(number)
    results = run(serving(), asked)
    assert own_images(asked, results) == [True] * number
    totals = api.ledger()["totals"]
    assert totals["attempts"] == number
    assert cost(results) == pytest.approx(totals["usd"])
    assert cost(results) == pytest.approx(0.5 * number * (1290 * 30 + 2 * 0.3) / 1e6)
    assert serving().estimate(asked[0]) == pytest.approx(0.0195, abs=1e-5)


@pytest.mark.parametrize("number", [1, MANY])
def test_the_body_has_the_documented_fields(api, serving, number):
    asked = requests(number)
    run(serving(aspect_ratio="1:1"), asked)
    [sent] = api.requests("batchGenerateContent")
    assert sent["path"] == f"/v1beta/models/{MODEL}:batchGenerateContent"
    config = {"responseModalities": ["IMAGE"], "imageConfig": {"aspectRatio": "1:1"}}
    said = {"contents": [{"role": "user", "parts": [{"text": "thing 00"}]}], "generationConfig": config}
    source = sent["body"]["batch"].pop("inputConfig")
    assert sent["body"] == {"batch": {"displayName": asked[0].job}}
    if number == 1:
        assert source == {"requests": {"requests": [{"request": said, "metadata": {"key": "0" * 32}}]}}
    else:
        assert list(source) == ["fileName"]
        assert source["fileName"].startswith("files/")
    made = serving(aspect_ratio="1:1")._batches(asked)
    assert json.loads(made.line(asked[0])) == {"key": "0" * 32, "request": said}


@pytest.mark.parametrize("number", [3, MANY])
def test_a_job_is_found_again_under_its_name(api, serving, number):
    asked = requests(number)

    async def give_up(serving):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(serving.generate(asked), 0.6)
        await asyncio.to_thread(serving.cleanup)

    api.script({"batch": {"seconds": 1.5}})
    first = serving()
    first.setup()
    asyncio.run(give_up(first))
    # Another name is another job; a request that was not in the job has no result.
    results = run(serving(), [*asked, GenerationRequest(request_id="f" * 32, prompt="late", seed=1, job=asked[0].job)])
    assert own_images(asked, results[:-1]) == [True] * number
    assert results[-1].error.reason == "no_result"
    assert len(api.requests("batchGenerateContent")) == 1
    totals = api.ledger()["totals"]
    assert totals["attempts"] == number
    assert cost(results) == pytest.approx(totals["usd"])
    run(serving(), requests(number))
    assert len(api.requests("batchGenerateContent")) == 2


@pytest.mark.parametrize("number", [4, MANY])
def test_a_job_that_expires_keeps_what_was_done(api, serving, number):
    api.script({"batch": {"seconds": 0.1, "status": "expired"}})
    asked = requests(number)
    results = run(serving(), asked)
    half = number // 2
    assert own_images(asked, results) == [True] * half + [None] * half
    assert kinds(results[half:]) == [RetryError] * half
    assert cost(results) == pytest.approx(api.ledger()["totals"]["usd"])


@pytest.mark.parametrize("number", [INLINE_LINES, MANY])
def test_what_becomes_of_single_lines(api, serving, number):
    directives = {"00": "500", "01": "lost", "02": "expired", "03": "block", "04": "truncated_base64", "05": "400"}
    api.script({f"thing {word}": directive for word, directive in directives.items()})
    asked = requests(number)
    results = run(serving(), asked)
    wanted = [RetryError] * 3 + [RefusedError, BadOutputError, BadRequestError]
    assert kinds(results) == wanted + [type(None)] * (number - 6)
    assert own_images(asked, results)[6:] == [True] * (number - 6)
    assert results[1].error.reason == "no_result"
    assert cost(results) == pytest.approx(api.ledger()["totals"]["usd"])


@pytest.mark.parametrize(("status", "reason"), [("failed", "batch_failed"), ("cancelled", "no_result")])
def test_a_job_that_comes_to_nothing(api, serving, status, reason):
    api.script({"batch": {"seconds": 0.1, "status": status}})
    results = run(serving(), requests(2))
    assert kinds(results) == [RetryError] * 2
    assert [result.error.reason for result in results] == [reason] * 2


def test_a_request_that_cannot_be_said_stays_out_of_the_job(api, serving, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "in.png")
    [fine] = requests(1, images=(str(tmp_path / "in.png"),))
    gone = GenerationRequest(request_id="f" * 32, prompt="x", seed=1, images=("/nowhere.png",), job=fine.job)
    results = run(serving(), [gone, fine])
    assert results[0].error.reason == "bad_image"
    assert read_mark(bytes(results[1].images[0])) == expected_mark("thing 00", [(tmp_path / "in.png").read_bytes()])
    assert api.ledger()["totals"]["attempts"] == 1


def test_a_conversation_in_a_job_keeps_its_signatures(api, serving, tmp_path):
    model = "gemini-3-pro-image"
    [asked] = requests(1)
    [result] = run(serving(model_name=model), [asked])
    metadata = {"service": "generateContent", "model": model, "provenance": dict(result.provenance)}
    answer = str(tmp_path / ImageIO(tmp_path).save(bytes(result.images[0]), "a" * 32, metadata).name)
    turn = Turn(prompt=asked.prompt, images=(), answer=answer)
    [second] = run(serving(model_name=model), requests(1, images=(answer,), turns=(turn,)))
    assert second.error is None
    [said] = api.requests("batchGenerateContent")[-1]["body"]["batch"]["inputConfig"]["requests"]["requests"]
    assert said["request"]["contents"][1]["parts"][0]["thoughtSignature"]


def test_a_large_job_is_split_and_both_parts_are_found(api, serving, monkeypatch):
    monkeypatch.setattr(GeminiBatches, "max_bytes", 600)
    asked = requests(6)
    results = run(serving(), asked)
    assert own_images(asked, results) == [True] * 6
    number = len(api.requests("batchGenerateContent"))
    assert number > 1
    assert own_images(asked, run(serving(), asked)) == [True] * 6
    assert len(api.requests("batchGenerateContent")) == number


def test_a_wrong_key_is_fatal(api, serving, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "df-wrong-9876543210")
    with pytest.raises(FatalServingError, match="401") as caught:
        run(serving(), requests(2))
    assert "9876543210" not in str(caught.value)


# Without a server


class Client:
    """Answers what it is told, in turn; a file of results is whatever bytes it is given."""

    def __init__(self, *answers, file=b""):
        self.answers, self.file, self.asked = list(answers), file, []

    async def ask(self, method, path, body=None):
        self.asked.append(path)
        return self.answers.pop(0)

    async def download(self, name, path):
        path.write_bytes(self.file)


def batches(*answers, file=b""):
    return GeminiBatches(
        Client(*answers, file=file),
        path="models/x",
        body=lambda request: {},
        reply=gemini_reply,
        classified=lambda status, headers, body: classify(status, headers, body, service="it"),
    )


def collected(service, job):
    async def work():
        return [pair async for pair in service.results(job)]

    return asyncio.run(work())


def answered(key, data="aW1hZ2U="):
    part = {"inlineData": {"mimeType": "image/png", "data": data}}
    return {"key": key, "response": {"candidates": [{"content": {"parts": [part]}, "finishReason": "STOP"}]}}


def test_answers_go_by_their_key_and_never_by_their_order():
    lines = [orjson.dumps(answered(key)) for key in ("b", "a")]
    nameless = {"response": answered("x")["response"]}
    broken = [b"{broken", b"", b"[]", b'"x"', orjson.dumps(nameless), orjson.dumps({"key": 5}), lines[0][:50]]
    job = BatchJob(id="batches/1", state="ended", raw={"responsesFile": "files/x"})
    found = collected(batches(file=b"\n".join([*broken, *lines])), job)
    assert [name for name, _ in found] == [""] * 6 + ["b", "a"]
    assert all(isinstance(answer, RetryError) for name, answer in found if not name)
    assert all(answer.images == (b"image",) for name, answer in found if name)
    inline = [{**answered("x"), "metadata": {"key": "other"}}, {"metadata": "x"}, None, {"metadata": {"key": "a"}}]
    job = BatchJob(id="batches/1", state="ended", raw={"inlinedResponses": {"inlinedResponses": inline}})
    found = collected(batches(), job)
    assert [name for name, _ in found] == ["x", "", "", "a"]
    assert found[-1][1].reason == "not_in_batch"


def test_an_endless_line_is_not_read(monkeypatch):
    monkeypatch.setattr(gemini_batches, "MAX_ANSWER", 100)
    job = BatchJob(id="batches/1", state="ended", raw={"responsesFile": "files/x"})
    with pytest.raises(BadOutputError, match="larger than 100 bytes"):
        collected(batches(file=b"x" * 1000), job)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (3, BadRequestError),
        (4, RetryError),
        (7, FatalServingError),
        (8, RateLimitError),
        (13, RetryError),
        (14, RetryError),
        (16, FatalServingError),
        (400, BadRequestError),
        (429, RateLimitError),
        (503, RetryError),
        (99, RetryError),
        (True, RetryError),
        ("x", RetryError),
        (None, RetryError),
    ],
)
def test_the_error_of_a_line(code, error):
    line = orjson.dumps({"key": "a", "error": {"code": code, "message": "no"}})
    job = BatchJob(id="batches/1", state="ended", raw={"responsesFile": "files/x"})
    [(name, found)] = collected(batches(file=line), job)
    assert (name, type(found)) == ("a", error)


def operation(state, **facts):
    return {"name": "batches/1", "metadata": {"state": f"BATCH_STATE_{state}", "displayName": "x"}, **facts}


@pytest.mark.parametrize(
    ("found", "state", "error"),
    [
        (operation("PENDING"), "working", None),
        (operation("RUNNING"), "working", None),
        (operation("SUCCEEDED", done=True), "ended", None),
        (operation("PARTIALLY_SUCCEEDED", done=True), "ended", None),
        (operation("EXPIRED", done=True, error={"code": 4, "message": "late"}), "ended", None),
        (operation("CANCELLED", done=True, error={"code": 1}), "ended", None),
        ({"name": "batches/1", "metadata": {"state": "JOB_STATE_SUCCEEDED"}}, "ended", None),
        ({"name": "batches/1"}, "working", None),
        ({"name": "batches/1", "done": True, "response": {}}, "ended", None),
        ({"name": "batches/1", "done": True, "error": {"code": 13}}, "failed", (RetryError, "batch_failed")),
        (operation("FAILED"), "failed", (RetryError, "batch_failed")),
        (operation("FAILED", error={"code": 3, "message": "no"}), "failed", (FatalServingError, "batch_rejected")),
        (operation("FAILED", error={"code": 8, "message": "no"}), "failed", (RetryError, "batch_failed")),
        (operation("FAILED", error={"code": 16, "message": "no"}), "failed", (FatalServingError, "auth")),
    ],
)
def test_states_of_a_job(found, state, error):
    job = asyncio.run(batches(found).poll(BatchJob(id="batches/1", state="working")))
    assert (job.id, job.state) == ("batches/1", state)
    assert (None if job.error is None else (type(job.error), job.error.reason)) == error


@pytest.mark.parametrize("found", [{}, [], "x", {"name": "batches/1", "metadata": "x"}, {"name": 5}])
def test_what_is_no_job(found):
    with pytest.raises(RetryError):
        asyncio.run(batches(found).poll(BatchJob(id="batches/1", state="working")))


def test_all_pages_are_looked_through():
    pages = [{"operations": [operation("RUNNING")] * 2, "nextPageToken": "a b"}, {"operations": [operation("FAILED")]}]
    service = batches(*pages)
    assert [job.state for job in asyncio.run(service.find("x"))] == ["working", "working", "failed"]
    assert service._client.asked == ["batches?pageSize=50", "batches?pageSize=50&pageToken=a+b"]
    assert asyncio.run(batches({}).find("x")) == []
