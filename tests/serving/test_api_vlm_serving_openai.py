"""A chat-completions service behind the engine, on real sockets."""

import asyncio
import base64
import json
import logging
import pickle

import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, RunStoppedError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

pytest.importorskip("openai")
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai

KEY = "df-secret-0123456789"
MODEL = "gemini-2.5-flash-image-preview"
SHAPES = ("images", "camel", "markdown", "markdown_open", "url", "parts")


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    server.script({})
    server.reset()
    return server


class Site:
    """A folder with a table, and steps run on it against the service."""

    def __init__(self, folder, api):
        self.folder, self.api = folder, api

    def serving(self, **options):
        options = {"api_url": f"{self.api.url}/v1", "model_name": MODEL, "timeout": 20.0, **options}
        return APIVLMServing_openai(image_io=ImageIO(str(self.folder / "cache" / "images")), **options)

    def storage(self, rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FileStorage(str(table), cache_path=str(self.folder / "cache")).step()

    def draw(self, *prompts, serving=None, **options):
        self.store = self.storage([{"conversations": prompt} for prompt in prompts])
        run_options = RunOptions(quiet=True, **options)
        return Text2ImageGenerator(serving or self.serving(), options=run_options).run(self.store)

    def table(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]


@pytest.fixture
def site(tmp_path, api):
    return Site(tmp_path, api)


def mark(path):
    return read_mark(Image.open(path))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_answer_becomes_the_rows_own_image(site, shape, stream):
    prompts = [f"thing {number}" for number in range(4)]
    summary = site.draw(*prompts, serving=site.serving(model_name=f"{MODEL}-{shape}", send_request_stream=stream))
    assert (summary.done, summary.made) == (4, 4)
    for prompt, row in zip(prompts, site.table(), strict=True):
        [image] = row["images"]
        assert mark(image) == expected_mark(prompt)
    assert site.api.ledger()["totals"]["attempts"] == 4
    assert site.draw(*prompts, serving=site.serving(model_name=f"{MODEL}-{shape}")).made == 0
    assert site.api.ledger()["totals"]["attempts"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_edits_send_every_reference_whole_and_in_order(site, stream):
    paths = []
    for number, colour in enumerate(("red", "blue", "green")):
        path = site.folder / f"in{number}.png"
        Image.new("RGB", (40 + number, 30), colour).save(path)
        paths.append(str(path))
    storage = site.storage([{"images": paths, "conversations": "join them"}])
    operator = PromptedImageEditGenerator(site.serving(send_request_stream=stream), options=RunOptions(quiet=True))
    assert operator.run(storage, "images", "conversations", "edited").done == 1
    [row] = [json.loads(line) for line in storage.output_path.read_text().splitlines()]
    contents = [(site.folder / f"in{number}.png").read_bytes() for number in range(3)]
    assert mark(row["edited"][0]) == expected_mark("join them", contents)


def test_a_further_turn_is_a_conversation_with_the_answers_before(site):
    Image.new("RGB", (40, 30), "red").save(site.folder / "in.png")
    turns = [{"role": "user", "content": text} for text in ("first", "second", "third")]
    storage = site.storage([{"images": [str(site.folder / "in.png")], "conversations": turns}])
    operator = PromptedImageEditGenerator(site.serving(), options=RunOptions(quiet=True))
    assert operator.run(storage, "images", "conversations", "edited").done == 1
    last = site.api.requests("chat/completions")[-1]["body"]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    parts = [[part["type"] for part in m["content"]] if isinstance(m["content"], list) else "text" for m in last]
    assert parts == [["text", "image_url"], ["image_url"], "text", ["image_url"], "text"]


def test_money_is_what_the_service_billed(site):
    site.api.script({"again": ["500", "truncated_base64"], "never": "refuse"})
    summary = site.draw("fine", "again", "never")
    assert (summary.done, summary.refused) == (2, 1)
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])
    assert site.api.ledger()["totals"]["attempts"] == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["cut", "half_stream", "no_end", "disconnect", "paid_disconnect", "empty", "html"])
def test_an_answer_that_breaks_off_is_asked_for_again(site, fault, stream):
    site.api.script({"thing": [fault]})
    summary = site.draw("thing", serving=site.serving(send_request_stream=stream))
    assert (summary.done, summary.failed) == (1, 0)
    assert mark(site.table()[0]["images"][0]) == expected_mark("thing")


def test_an_unknown_price_is_unknown(site):
    summary = site.draw("fine", serving=site.serving(model_name="an-unheard-of-image-model"))
    assert (summary.done, summary.usd, summary.unpriced) == (1, 0.0, 1)


def test_a_wrong_key_stops_the_run_and_is_never_shown(site, monkeypatch, caplog):
    monkeypatch.setenv("DF_API_KEY", "df-wrong-9876543210")
    with caplog.at_level(logging.DEBUG), pytest.raises(RunStoppedError, match="401") as caught:
        site.draw("one", "two")
    written = "".join(path.read_text(errors="replace") for path in site.folder.rglob("*") if path.is_file())
    assert "9876543210" not in caplog.text + str(caught.value) + written


def test_the_key_stays_out_of_everything(site, caplog):
    site.api.script({"bad": "400", "broken": "half_jpeg"})
    serving = site.serving()
    with caplog.at_level(logging.DEBUG):
        site.draw("fine", "bad", "broken", serving=serving)
    written = b"".join(path.read_bytes() for path in site.folder.rglob("*") if path.is_file())
    assert KEY.encode() not in written + pickle.dumps(serving)
    assert KEY not in caplog.text


def test_no_key(site, monkeypatch):
    monkeypatch.delenv("DF_API_KEY")
    with pytest.raises(ConfigError, match="environment variable DF_API_KEY holds no key"):
        site.draw("one")


def test_without_image_io_it_answers_with_text(api):
    serving = APIVLMServing_openai(api_url=f"{api.url}/v1", model_name="some-judge", request_params={"temperature": 0})
    assert serving.fingerprint()["answer"] == "text"
    assert serving.default_params() == {"temperature": 0}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"negative_prompt": "blur"}, "no negative prompt"),
        ({"size": (64, 64)}, "no height and width"),
        ({"params": {"num_inference_steps": 3}}, "the row sets num_inference_steps"),
    ],
)
def test_what_a_chat_cannot_say_is_refused_before_it_is_paid_for(api, tmp_path, request_, message):
    serving = APIVLMServing_openai(api_url=api.url, image_io=ImageIO(tmp_path))
    with pytest.raises(BadRequestError, match=message):
        serving.check(GenerationRequest(request_id="0" * 32, prompt="x", seed=1, **request_))
    serving.check(GenerationRequest(request_id="0" * 32, prompt="x", seed=1, params=serving.default_params()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_url": "localhost:8000"}, "must begin with https://"),
        ({"max_workers": 0}, "max_workers must be a whole number"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"requests_per_minute": -1}, "requests_per_minute must be more than 0"),
        ({"request_params": {"messages": []}}, "messages is set by the serving itself"),
        ({"request_params": {"top_p": object()}}, "request_params:"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        APIVLMServing_openai(**options)


def test_a_storm_of_faults(site):
    """Every row ends, with its own image or a true reason, and no call is made that the faults did not force."""
    site.api.script({"storm": {"share": 0.3, "seed": 5, "attempts": 2}})
    prompts = [f"thing {number}" for number in range(60)]
    summary = site.draw(*prompts, serving=site.serving(max_workers=8))
    assert summary.balanced
    assert summary.pending == 0
    rows = site.table()
    for prompt, row in zip(prompts, rows, strict=True):
        assert [mark(image) == expected_mark(prompt) for image in row["images"]] in ([True], [])
        assert bool(row["images"]) != ("images_error" in row)
    assert summary.failed == 0
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])


def test_a_refused_connection_is_no_timeout(site, caplog):
    with FakeApi() as gone:
        url = gone.url
    site.draw("thing", serving=site.serving(api_url=url), max_attempts=1)
    assert site.table()[0]["images_error"]["reason"] == "connection"


def test_batch_jobs_go_with_one_endpoint(site):
    with pytest.raises(ConfigError, match="one endpoint"):
        site.serving(key_name_of_api_key=["ONE", "OTHER"], batch_jobs=True)


def test_a_judge_that_says_nothing_has_not_answered(site):
    serving = APIVLMServing_openai(f"{site.api.url}/v1", model_name=MODEL)  # a model that answers with pictures
    serving.setup()

    async def ask():
        found = await serving.generate([GenerationRequest(request_id="0" * 32, prompt="how good?", seed=0)])
        await asyncio.to_thread(serving.cleanup)
        return found

    [result] = asyncio.run(ask())
    assert result.error.reason == "no_text"
    assert result.usage["usd"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_body_has_the_documented_fields_and_no_other(site, stream):
    """Chat completions as OpenAI documents them, with the fields for images that gateways add."""
    params = {"image_config": {"aspect_ratio": "16:9"}, "temperature": 0.5, "modalities": ["image"]}
    serving = site.serving(send_request_stream=stream, request_params=params, send_seed=True)
    Image.new("RGB", (40, 30), "red").save(site.folder / "in.png")
    storage = site.storage([{"images": str(site.folder / "in.png"), "conversations": "make it blue", "seed": 7}])
    operator = PromptedImageEditGenerator(serving, options=RunOptions(quiet=True))
    assert operator.run(storage, "images", "conversations", "edited").done == 1
    [asked] = site.api.requests("chat/completions")
    assert (asked["method"], asked["path"]) == ("POST", "/v1/chat/completions")
    data = base64.b64encode((site.folder / "in.png").read_bytes()).decode()
    content = [
        {"type": "text", "text": "make it blue"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False}
    said = {"model": MODEL, "messages": [{"role": "user", "content": content}], "seed": 7}
    assert asked["body"] == {**said, **params, **streamed}


def test_a_line_of_a_batch_job_has_the_same_body(site):
    serving = site.serving(batch_jobs=True)
    request = GenerationRequest(request_id="0" * 32, prompt="a fox", seed=0)
    line = json.loads(serving._batches([request]).line(request))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a fox"}], "modalities": ["image", "text"]}
    assert line == {"custom_id": "0" * 32, "method": "POST", "url": "/v1/chat/completions", "body": body}
