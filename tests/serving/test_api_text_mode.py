"""A chat-completions service without ``image_io``: a judge that looks at images and answers with words."""

import asyncio
import base64
import json
import logging
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

pytest.importorskip("openai")

from dataflow.cli import main
from dataflow.errors import BadRequestError, RefusedError, RunStoppedError
from dataflow.runtime.engine import RunOptions, execute
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.fake_api import FakeApi, expected_text
from dataflow.types import Draft, GenerationRequest, Plan
from dataflow.utils.storage import FileStorage

KEY = "df-secret-0123456789"
MODEL = "some-judge"
SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "description": "Satz für Satz, “wörtlich” ‒ 理由"},
        "score": {"type": "integer", "minimum": 3, "maximum": 9007199254740993},
        "share": {"type": "number", "minimum": 0.1, "default": None},
        "verdict": {"enum": ["pass", "fail", None]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
    },
    "required": ["score", "reason"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}


@pytest.fixture(autouse=True)
def _quiet_root():
    """The command line sets the root logger up for a process of its own."""
    root, ours = logging.getLogger(), logging.getLogger("dataflow")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr("dataflow.runtime.limits.FIRST_WAIT", 0.01)
    server.script({})
    server.reset()
    return server


@pytest.fixture
def judge(api):
    def make(**options):
        return APIVLMServing_openai(f"{api.url}/v1", model_name=MODEL, timeout=20.0, **options)

    return make


def asked(serving, prompt, images=()):
    """The serving's result for one request, without the engine."""
    params = serving.default_params()
    request = GenerationRequest(request_id="0" * 32, prompt=prompt, seed=1, images=tuple(images), params=params)
    serving.check(request)
    serving.setup()

    async def ask():
        try:
            return await serving.generate([request])
        finally:
            await asyncio.to_thread(serving.cleanup)

    [result] = asyncio.run(ask())
    return result


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of three formats; the text of an answer depends on every byte of them and on their order."""
    paths = []
    for colour, suffix in (("red", "png"), ("blue", "jpg"), ("green", "webp")):
        paths.append(tmp_path / f"{colour}.{suffix}")
        Image.effect_noise((64, 48), 90).convert("RGB").save(paths[-1])
    return [str(path) for path in paths]


def contents(paths):
    found = []
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123 - a row's path is text
            found.append(file.read())
    return found


# What goes out and what comes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_words_about_images_that_were_sent_whole_and_in_order(judge, api, pictures, count, stream):
    result = asked(judge(send_request_stream=stream), "which is best?", pictures[:count])
    assert result.error is None
    assert result.images == ()
    assert result.text == expected_text("which is best?", contents(pictures[:count]))
    if count == 3:
        assert result.text != expected_text("which is best?", contents(pictures[::-1]))
    [request] = api.requests("chat/completions")
    assert "modalities" not in request["body"], "pictures are not asked for"
    content = request["body"]["messages"][0]["content"]
    sent = [part["image_url"]["url"] for part in content[1:]] if count else []
    kinds = ["image/png", "image/jpeg", "image/webp"]
    assert sent == [
        f"data:{kind};base64,{base64.b64encode(data).decode()}"
        for kind, data in zip(kinds, contents(pictures[:count]), strict=False)
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_arrives_as_it_was_given(judge, api, stream):
    params = {
        "response_format": RESPONSE_FORMAT,
        "temperature": 0,
        "top_p": 1.0,
        "logit_bias": {"1734": -100},
        "metadata": {"empty": None, "list": [1, 2.5, True, None, {}]},
        "stop": ["\n\n", "</s>"],
        "seed": 2**53 + 1,
        "left_out": None,
    }
    given = json.loads(json.dumps(params))
    result = asked(judge(request_params=params, send_request_stream=stream), "judge this")
    assert params == given, "what the user holds is the user's"
    body = api.requests("chat/completions")[0]["body"]
    del given["left_out"]
    assert {name: body[name] for name in given} == given
    assert json.dumps(body["response_format"]) == json.dumps(RESPONSE_FORMAT), "names keep their order"
    assert set(body) == {*given, "model", "messages", "stream", *(["stream_options"] if stream else [])}
    answer = json.loads(result.text)
    assert set(answer) == set(SCHEMA["properties"])
    assert answer["reason"] == expected_text("judge this")
    assert (answer["score"], answer["share"], answer["flags"]) == (3, 0.1, [True, True])


def test_log_probabilities_come_back_with_the_answer(judge, api):
    api.script({"rate": "say:7"})
    result = asked(judge(request_params={"logprobs": True, "top_logprobs": 5}), "rate this")
    assert result.text == "7"
    assert api.requests("chat/completions")[0]["body"]["top_logprobs"] == 5
    [token] = result.provenance["logprobs"]["content"]
    assert [entry["token"] for entry in token["top_logprobs"]] == ["7", "0", "1", "2", "3"]
    assert math.exp(token["logprob"]) == pytest.approx(0.8)
    assert result.provenance["finish_reason"] == "stop"


def test_without_being_asked_for_there_are_none(judge):
    assert "logprobs" not in asked(judge(), "rate this").provenance


def test_a_call_costs_what_the_service_billed(judge, api, tmp_path, pictures):
    table = tmp_path / "prices.toml"
    table.write_text(f'["{MODEL}"]\ntext_input = 0.3\nimage_input = 0.3\ntext_output = 2.5\nimage_output = 30.0\n')
    result = asked(judge(price_table=table), "which?", pictures)
    assert result.usage["usd"] == pytest.approx(api.ledger()["totals"]["usd"])
    assert result.usage["usd"] > 0
    assert asked(judge(), "which?").usage["usd"] is None


def test_a_price_per_image_is_no_price_of_words(judge, tmp_path):
    table = tmp_path / "prices.toml"
    table.write_text(f'["{MODEL}"]\nimage = 0.04\n')
    serving = judge(price_table=table)
    assert serving.estimate(GenerationRequest(request_id="0" * 32, prompt="x", seed=1)) is None


REFUSALS = (
    "refuse",
    "moderation",
    "content_policy",
    "refusal_field",
    "content_filter",
    "finish:SAFETY",
    "block",
    "451",
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", REFUSALS)
def test_refusals_are_refused(judge, api, fault, stream):
    api.script({"this": fault})
    result = asked(judge(send_request_stream=stream), "judge this")
    assert isinstance(result.error, RefusedError)
    assert result.finish_reason == "refused"
    assert result.text is None


def test_an_image_that_is_none_is_not_sent(judge, api, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    result = asked(judge(), "judge this", [str(tmp_path / "page.png")])
    assert isinstance(result.error, BadRequestError)
    assert api.ledger()["totals"]["attempts"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_none(judge, api, stream):
    """A model that has used up its tokens with thinking says nothing: its row must not pass for judged."""
    api.script({"this": "finish:length"})
    result = asked(judge(send_request_stream=stream), "judge this")
    assert result.error is not None
    assert result.text is None


def test_thoughts_are_not_part_of_the_answer(judge, api):
    api.script({"this": "thoughts+say:<think>not sure</think>yes"})
    assert asked(judge(), "judge this").text == "yes"


WORDS = {
    "lines": "first\n\n  second <b>&amp;</b> `third`\tand \\n",
    "code": '```json\n{"score": 1}\n```',
    "a link": "The sign says ![logo](https://example.com/logo.png), twice.",
    "a data URL": "It shows data:image/png;base64,AAAA and then some.",
    "half a data URL": "Write data:image/png;base64,AAAAA to show it.",
}


@pytest.mark.parametrize("words", [pytest.param(text, id=name) for name, text in WORDS.items()])
def test_words_stay_as_they_are(judge, api, words):
    """What looks like a picture, or the way to one, is part of the text here."""
    api.script({"this": f"say:{words}"})
    result = asked(judge(), "describe this")
    assert result.error is None
    assert result.text == words


# Answers that the fake service does not give --------------------------------------------------------------------------


@contextmanager
def service(*chunks, status=200):
    """A service that answers with this JSON (or bytes), or with several as a stream."""
    data = [chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() for chunk in chunks]
    mime = "application/json" if len(data) == 1 else "text/event-stream"
    body = data[0] if len(data) == 1 else b"".join(b"data: %b\n\n" % chunk for chunk in [*data, b"[DONE]"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", mime)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):  # noqa: A002 - the name of the library
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text, **facts):
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": text}, **facts}]}


def test_log_probabilities_of_a_stream_are_put_together(api):
    entries = [{"token": token, "logprob": -0.1, "top_logprobs": []} for token in ("4", "2")]
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": e["token"]}, "logprobs": {"content": [e]}}]} for e in entries
    ]
    with service(*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) as url:
        result = asked(APIVLMServing_openai(url, model_name=MODEL, send_request_stream=True), "rate this")
    assert (result.text, result.provenance["logprobs"]) == ("42", {"content": entries})


def test_the_words_of_a_service_that_does_not_split_its_count_have_the_price_of_words(api, tmp_path):
    table = tmp_path / "prices.toml"
    table.write_text(f'["{MODEL}"]\ntext_input = 0.3\ntext_output = 2.5\n')
    with service({**said("yes"), "usage": {"prompt_tokens": 1000, "completion_tokens": 400}}) as url:
        result = asked(APIVLMServing_openai(url, model_name=MODEL, price_table=table), "judge this")
    assert result.usage["usd"] == pytest.approx(1000 * 0.3e-6 + 400 * 2.5e-6)


def test_half_an_emoji_does_not_cost_the_answer(api):
    """Services on Python write it so when an answer is cut at its most tokens."""
    with service(said("a fox \ud83e", finish_reason="length")) as url:
        result = asked(APIVLMServing_openai(url, model_name=MODEL), "describe this")
    assert result.error is None
    assert (result.text or "").startswith("a fox ")


# Through the engine ---------------------------------------------------------------------------------------------------


class Bench:
    """A table with questions about pictures, and a step that puts the answers into a column."""

    def __init__(self, folder, rows):
        self.table, self.cache = folder / "in.jsonl", folder / "cache"
        self.table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plan(self, serving):
        def fold(row, outcomes):
            answers = [outcome.text for outcome in outcomes]
            return {**row, "answers": answers, "ends": [[each.status, each.reason] for each in outcomes]}

        def requests(row):
            return [Draft(prompt=prompt, images=tuple(row["images"])) for prompt in row["questions"]]

        inputs = ("images", "questions")
        return Plan(name="Judge", inputs=inputs, outputs=("answers",), requests=requests, fold=fold, serving=serving)

    def run(self, serving, **options):
        self.storage = FileStorage(str(self.table), cache_path=str(self.cache)).step()
        summary = execute(self.plan(serving), self.storage, RunOptions(quiet=True, **options))
        assert summary.balanced
        return summary

    def rows(self):
        return [json.loads(line) for line in self.storage.output_path.read_bytes().splitlines()]


@pytest.fixture
def bench(tmp_path, pictures):
    rows = [
        {"images": pictures[:count], "questions": [f"how many? ({count})", f"which is best? ({count})"]}
        for count in range(4)
    ]
    return Bench(tmp_path, rows)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_stand_in_a_column_and_are_asked_for_once(bench, judge, api, pictures, stream):
    api.script({"how many? (1)": ["500"], "which is best? (2)": ["cut"]})
    summary = bench.run(judge(send_request_stream=stream))
    assert (summary.rows, summary.done, summary.images, summary.bytes) == (4, 4, 0, 0)
    calls = api.ledger()["totals"]["attempts"]
    assert calls == 2 * 4 + 2
    rows = bench.rows()
    for row in rows:
        assert row["answers"] == [expected_text(question, contents(row["images"])) for question in row["questions"]]
    # Also a table that is lost is written again without a question.
    bench.storage.output_path.unlink()
    again = bench.run(judge(send_request_stream=not stream))
    assert (again.done, bench.rows()) == (4, rows)
    assert api.ledger()["totals"]["attempts"] == calls


def test_a_step_that_was_stopped_asks_for_what_is_missing(bench, judge, api, pictures):
    api.script({"which is best? (2)": ["quota"]})
    with pytest.raises(RunStoppedError) as stopped:
        bench.run(judge(max_workers=1))
    assert stopped.value.summary is not None
    assert 0 < stopped.value.summary.done < 4
    done = {entry["prompt"] for entry in api.ledger()["attempts"] if entry["status"] == 200}
    summary = bench.run(judge())
    assert summary.done == 4
    calls = [entry["prompt"] for entry in api.ledger()["attempts"] if entry["status"] == 200]
    assert done
    assert sorted(calls) == sorted(question for row in bench.rows() for question in row["questions"]), "asked once each"


def test_refusals_and_failures_have_their_reasons(bench, judge, api, capsys):
    api.script({"how many? (1)": "refusal_field", "how many? (2)": "400", "which is best? (3)": "html"})
    summary = bench.run(judge())
    assert (summary.done, summary.refused, summary.failed) == (1, 1, 2)
    assert summary.reasons == {"refused": 1, "bad_request": 1, "not_json": 1}
    assert [row["ends"] for row in bench.rows()] == [
        [["done", ""], ["done", ""]],
        [["refused", "refused"], ["done", ""]],
        [["failed", "bad_request"], ["done", ""]],
        [["done", ""], ["failed", "not_json"]],
    ]
    assert bench.rows()[1]["answers"][0] is None
    assert main(["status", str(bench.cache)]) == 0
    assert "4 rows = 1 done + 1 refused + 2 failed + 0 pending" in capsys.readouterr().out
    api.reset()
    api.script({})
    assert bench.run(judge()).done == 3
    assert {entry["prompt"] for entry in api.ledger()["attempts"]} == {"how many? (2)", "which is best? (3)"}


def test_odd_words_survive_journal_and_table(bench, judge, api):
    words = 'a "b"\n\ttab \x00 \x1b[31m \u2028 \U0001f98a </script> {"crc":"00000000"}'
    api.script({"": f"say:{words}"})
    bench.run(judge())
    assert bench.rows()[0]["answers"] == [words, words]
    bench.storage.output_path.unlink()
    assert bench.run(judge()).done == 4
    assert bench.rows()[0]["answers"] == [words, words]


@pytest.mark.parametrize("params", [{"height": 64, "width": 64}, {"negative_prompt": "blur"}], ids=list)
def test_parameters_that_the_engine_has_names_for_too(bench, judge, params):
    assert bench.run(judge(request_params=params)).done == 4
