"""Gemini's own API behind the engine, on real sockets and Google's own client."""

import asyncio
import base64
import contextlib
import json
import logging
import pickle
import random
import subprocess
import sys

import pytest
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    FatalServingError,
    RateLimitError,
    RefusedError,
    RetryError,
    RunStoppedError,
)
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.serving.replies import Reply
from dataflow.types import GenerationRequest, Turn
from dataflow.utils.storage import FileStorage

pytest.importorskip("google.genai")
from dataflow.serving.gemini_image_serving import GeminiImageServing
from dataflow.serving.gemini_replies import GeminiStream

KEY = "df-secret-0123456789"
MODEL = "gemini-2.5-flash-image"
THIRD = "gemini-3-pro-image"


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
        self.folder, self.api, self.format = folder, api, "png"

    def serving(self, **options):
        options = {"api_url": self.api.url, "timeout": 20.0, **options}
        images = ImageIO(str(self.folder / "cache" / "images"), format=self.format)
        return GeminiImageServing(image_io=images, **options)

    def storage(self, rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FileStorage(str(table), cache_path=str(self.folder / "cache")).step()

    def draw(self, *prompts, serving=None, rows=None, **options):
        self.store = self.storage(rows or [{"conversations": prompt} for prompt in prompts])
        run_options = RunOptions(quiet=True, **options)
        return Text2ImageGenerator(serving or self.serving(), options=run_options).run(self.store)

    def edit(self, images, prompts, serving=None, **options):
        """One row, edited over as many turns as there are prompts."""
        turns = [{"role": "user", "content": prompt} for prompt in prompts]
        row = {"images": images, "conversations": turns if len(turns) > 1 else prompts[0]}
        self.store = self.storage([row])
        run_options = RunOptions(quiet=True, **options)
        operator = PromptedImageEditGenerator(serving or self.serving(), options=run_options)
        return operator.run(self.store, "images", "conversations", "edited")

    def picture(self, name, colour="red"):
        path = self.folder / name
        Image.new("RGB", (40, 30), colour).save(path)
        return str(path)

    def table(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]

    def bodies(self, method="enerateContent"):
        return [request["body"] for request in self.api.requests(method)]


@pytest.fixture
def site(tmp_path, api):
    return Site(tmp_path, api)


def mark(path):
    return read_mark(Image.open(path))


def request(prompt="x", number=0, **facts):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=1, **facts)


def answers(serving, *requests):
    """Results of single calls, all at once, without the engine."""

    async def work():
        found = await asyncio.gather(*(serving.generate([one]) for one in requests))
        await asyncio.to_thread(serving.cleanup)
        return [result for [result] in found]

    serving.setup()
    return asyncio.run(work())


def inline(path, mime="image/png"):
    with open(path, "rb") as file:  # noqa: PTH123 - as short as it gets
        return {"inlineData": {"mimeType": mime, "data": base64.b64encode(file.read()).decode()}}


def provenance(path):
    return ImageIO(".").read_metadata(path)["provenance"]


# What goes over the wire


@pytest.mark.parametrize("stream", [False, True])
def test_every_row_gets_its_own_image_once(site, stream):
    prompts = [f"thing {number}" for number in range(6)]
    assert site.draw(*prompts, serving=site.serving(send_request_stream=stream)).made == 6
    for prompt, row in zip(prompts, site.table(), strict=True):
        assert mark(*row["images"]) == expected_mark(prompt)
    assert site.draw(*prompts).made == 0
    assert site.api.ledger()["totals"]["attempts"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_the_body_has_the_documented_fields(site, stream):
    safety = [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}]
    params = {"responseModalities": ["TEXT", "IMAGE"], "temperature": 0.5, "safetySettings": safety, "topP": None}
    serving = site.serving(
        model_name=f"models/{THIRD}",
        aspect_ratio="16:9",
        image_size="2K",
        request_params={**params, "imageConfig": {"personGeneration": "ALLOW_ALL"}},
        send_request_stream=stream,
    )
    site.draw("a fox", serving=serving)
    [sent] = site.api.requests("enerateContent")
    method, query = ("streamGenerateContent", {"alt": "sse"}) if stream else ("generateContent", {})
    assert (sent["path"], sent["query"]) == (f"/v1beta/models/{THIRD}:{method}", query)
    assert sent["body"] == {
        "contents": [{"role": "user", "parts": [{"text": "a fox"}]}],
        "generationConfig": {
            "responseModalities": ["TEXT", "IMAGE"],
            "temperature": 0.5,
            "imageConfig": {"personGeneration": "ALLOW_ALL", "aspectRatio": "16:9", "imageSize": "2K"},
        },
        "safetySettings": safety,
    }


def test_nothing_is_sent_that_nobody_set(site):
    site.draw("a fox")
    said = {"contents": [{"role": "user", "parts": [{"text": "a fox"}]}]}
    assert site.bodies() == [{**said, "generationConfig": {"responseModalities": ["IMAGE"]}}]


def test_a_size_becomes_its_words(site):
    rows = [{"conversations": "wide", "width": 2752, "height": 1536}]
    serving = site.serving(model_name=THIRD, aspect_ratio="1:1", image_size="1K")
    assert site.draw(rows=rows, serving=serving).done == 1
    [body] = site.bodies()
    assert body["generationConfig"]["imageConfig"] == {"aspectRatio": "16:9", "imageSize": "2K"}
    [result] = answers(site.serving(), request(size=(832, 1248)))
    assert result.error is None
    assert site.bodies()[-1]["generationConfig"]["imageConfig"] == {"aspectRatio": "2:3"}


@pytest.mark.parametrize("stream", [False, True])
def test_references_are_sent_whole_and_in_order(site, stream):
    paths = [site.picture("a.png"), site.picture("b.jpg", "blue"), site.picture("c.webp", "green")]
    assert site.edit(paths, ["join them"], site.serving(send_request_stream=stream)).done == 1
    [body] = site.bodies()
    kinds = ("image/png", "image/jpeg", "image/webp")
    parts = [{"text": "join them"}, *map(inline, paths, kinds)]
    assert body["contents"] == [{"role": "user", "parts": parts}]
    assert body.keys() == {"contents", "generationConfig"}
    contents = [base64.b64decode(part["inlineData"]["data"]) for part in parts[1:]]
    assert mark(*site.table()[0]["edited"]) == expected_mark("join them", contents)


# Conversations


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("style", ["", "talk+thoughts"])
def test_three_turns_are_a_conversation_with_its_signatures(site, stream, style):
    """The fake's third generation refuses an answer without the signature that came with it."""
    site.api.script({"": style} if style else {})
    prompts = ["first", "second", "third"]
    start = site.picture("in.png")
    serving = site.serving(model_name=THIRD, send_request_stream=stream)
    # The other turns are in the cache, made by another serving object.
    assert site.edit([start], prompts[:1], serving).done == 1
    assert site.edit([start], prompts, site.serving(model_name=THIRD)).done == 1
    [row] = site.table()
    [[first, second, _]] = row["edited_turns"]
    shown = [provenance(path)["parts"] for path in (first, second)]
    text = [{"text": "Here is your picture."}] if style else []
    assert [parts[:-1] for parts in shown] == [text, text]
    signatures = [parts[-1]["thoughtSignature"] for parts in shown]
    assert len(set(signatures)) == 2
    assert all(parts[-1] == {"inlineData": {}, "thoughtSignature": parts[-1]["thoughtSignature"]} for parts in shown)
    model = [
        {"role": "model", "parts": [*text, {**inline(path), "thoughtSignature": signature}]}
        for path, signature in zip((first, second), signatures, strict=True)
    ]
    assert site.bodies()[-1]["contents"] == [
        {"role": "user", "parts": [{"text": "first"}, inline(start)]},
        model[0],
        {"role": "user", "parts": [{"text": "second"}]},
        model[1],
        {"role": "user", "parts": [{"text": "third"}]},
    ]
    assert site.api.ledger()["totals"]["images"] == 3


@pytest.mark.parametrize(
    "stopped",
    ["second", "third"],
)
def test_a_conversation_goes_on_where_it_stopped(site, stopped):
    site.api.script({stopped: "503"})
    start, prompts = site.picture("in.png"), ["first", "second", "third"]
    assert site.edit([start], prompts, site.serving(model_name=THIRD), max_attempts=1).failed == 1
    site.api.script({})
    assert site.edit([start], prompts, site.serving(model_name=THIRD)).done == 1
    assert site.api.ledger()["totals"]["images"] == 3
    last = site.bodies()[-1]["contents"]
    assert [bool(part.get("thoughtSignature")) for said in last for part in said["parts"]] == [0, 0, 1, 0, 1, 0]


def test_another_process_goes_on_with_the_conversation(site):
    start = site.picture("in.png")
    serving = pickle.loads(pickle.dumps(site.serving(model_name=THIRD)))
    assert site.edit([start], ["first"], serving).done == 1
    [answer] = site.table()[0]["edited"]
    program = """if True:
        import asyncio, pickle, sys
        serving, request = pickle.load(sys.stdin.buffer)
        serving.setup()
        [result] = asyncio.run(serving.generate([request]))
        sys.exit(str(result.error) if result.error else 0)
    """
    turn = Turn(prompt="first", images=(start,), answer=answer)
    asked = pickle.dumps((serving, request("second", images=(answer,), turns=(turn,))))
    subprocess.run([sys.executable, "-c", program], input=asked, check=True, timeout=60)
    signature = provenance(answer)["parts"][0]["thoughtSignature"]
    assert site.bodies()[-1]["contents"][1]["parts"] == [{**inline(answer), "thoughtSignature": signature}]


def test_references_of_a_later_turn_follow_its_text(site, tmp_path):
    facts = {**site.serving().fingerprint(), "provenance": {"parts": [{"inlineData": {}}]}}
    answer = str(site.folder / ImageIO(site.folder).save(Image.new("RGB", (40, 30)), "a" * 32, facts).name)
    other, start = site.picture("other.png", "blue"), site.picture("in.png")
    turn = Turn(prompt="first", images=(start,), answer=answer)
    [result] = answers(site.serving(), request("second", images=(answer, other), turns=(turn,)))
    assert result.error is None
    assert site.bodies()[-1]["contents"] == [
        {"role": "user", "parts": [{"text": "first"}, inline(start)]},
        {"role": "model", "parts": [inline(answer)]},
        {"role": "user", "parts": [{"text": "second"}, inline(other)]},
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"service": "generateContent", "model": THIRD, "provenance": {"parts": [{"inlineData": {}, "text": "no"}]}},
        {"service": "generateContent", "model": MODEL, "provenance": "lost"},
        {"service": "generateContent", "model": MODEL, "provenance": {"parts": [{"text": "no"}]}},
        {"service": "generateContent", "model": MODEL, "provenance": {"parts": ["no", {"inlineData": {}}]}},
        {"service": "generateContent", "model": MODEL, "provenance": {"parts": [{"inlineData": {}}] * 2}},
    ],
)
def test_an_answer_that_says_nothing_is_shown_as_the_users_own(site, metadata):
    images = ImageIO(site.folder)
    path = str(site.folder / images.save(Image.new("RGB", (64, 64)), "a" * 32, metadata).name)
    turn = Turn(prompt="first", images=(), answer=path)
    [result] = answers(site.serving(), request("second", images=(path,), turns=(turn,)))
    assert result.error is None
    assert site.bodies()[-1]["contents"] == [{"role": "user", "parts": [{"text": "second"}, inline(path)]}]


def test_a_jpeg_keeps_the_signature_of_a_long_prompt(site):
    site.format = "jpeg"
    long = random.Random(1).randbytes(80_000).hex()
    assert site.edit([site.picture("in.png")], [long, "second"], site.serving(model_name=THIRD)).done == 1
    [[first, _]] = site.table()[0]["edited_turns"]
    assert ImageIO(".").read_metadata(first)["metadata_truncated"]
    [part] = site.bodies()[-1]["contents"][1]["parts"]
    assert part["inlineData"] == inline(first, "image/jpeg")["inlineData"]
    assert part["thoughtSignature"]


# Refusals and errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        *((f"block:{reason}", RefusedError, "refused") for reason in ("SAFETY", "OTHER", "PROHIBITED_CONTENT")),
        *((f"finish:{reason}", RefusedError, "refused") for reason in ("IMAGE_SAFETY", "RECITATION", "SPII")),
        *((f"finish:{reason}", RetryError, "no_image") for reason in ("NO_IMAGE", "MAX_TOKENS", "NEVER_HEARD_OF")),
        ("text_only", RetryError, "no_image"),
        ("text_only+thoughts", RetryError, "no_image"),
        ("truncated_base64", BadOutputError, "bad_base64"),
        ("images:2", BadOutputError, "wrong_image_count"),
        ("rate_limit_info:34", RateLimitError, "rate_limit"),
        ("rate_limit:3", RateLimitError, "rate_limit"),
        ("quota", FatalServingError, "quota"),
        ("403", FatalServingError, "auth"),
        ("400", BadRequestError, "bad_request"),
        ("500", RetryError, "transient"),
        ("error_list", RetryError, "transient"),
        ("error_200", RetryError, "transient"),
        ("html:502", RetryError, "transient"),
        ("html", RetryError, "not_json"),
        ("disconnect", RetryError, "cut_answer"),
        ("paid_disconnect", RetryError, "cut_answer"),
        ("cut", RetryError, "cut_answer"),
    ],
)
def test_every_ending_has_its_class(site, stream, fault, error, reason):
    site.api.script({"bad": fault})
    [result] = answers(site.serving(send_request_stream=stream), request("bad"))
    assert type(result.error) is error
    assert result.error.reason == reason
    if error is RateLimitError:
        assert result.error.retry_after == (34 if "info" in fault else 3)
    ledger = site.api.ledger()
    assert ledger["totals"]["attempts"] == 1, "the client must not ask again by itself"
    assert (result.usage.get("usd") or 0) == pytest.approx(ledger["totals"]["usd_reported"])


@pytest.mark.parametrize(("fault", "stream"), [("empty", False), ("no_end", True), ("half_stream", True)])
def test_an_answer_without_an_end(site, fault, stream):
    site.api.script({"bad": fault})
    [result] = answers(site.serving(send_request_stream=stream), request("bad"))
    assert isinstance(result.error, RetryError)
    assert result.error.reason == ("cut_stream" if stream else "not_json")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["cut", "half_stream", "no_end", "disconnect", "paid_disconnect", "empty", "html"])
def test_an_answer_that_breaks_off_is_asked_for_again(site, fault, stream):
    site.api.script({"thing": [fault]})
    summary = site.draw("thing", serving=site.serving(send_request_stream=stream))
    assert (summary.done, summary.failed) == (1, 0)
    assert mark(*site.table()[0]["images"]) == expected_mark("thing")
    assert site.api.ledger()["totals"]["attempts"] == 2


def test_too_slow_and_not_there(site):
    site.api.script({"slow": "hang"})
    [slow] = answers(site.serving(timeout=0.4), request("slow"))
    with FakeApi() as gone:
        url = gone.url
    [none] = answers(site.serving(api_url=url), request("x"))
    assert [slow.error.reason, none.error.reason] == ["timeout", "connection"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_in_thoughts_is_never_the_result(site, stream):
    site.api.script({"think": "thoughts", "only": "thoughts+count:0"})
    summary = site.draw("think", "only", serving=site.serving(send_request_stream=stream), max_attempts=2)
    assert (summary.done, summary.failed) == (1, 1)
    assert mark(*site.table()[0]["images"]) == expected_mark("think")


def test_an_input_file_that_is_gone_or_no_image(site):
    page = site.folder / "page.png"
    page.write_text("<html>")
    gone = str(site.folder / "gone.png")
    turn = Turn(prompt="first", images=(), answer=str(site.folder / "gone.png"))
    half = site.folder / "half.png"
    half.write_bytes(b"\x89PNG\r\n\x1a\n")
    cut = Turn(prompt="first", images=(), answer=str(half))
    results = answers(
        site.serving(),
        request(images=(gone,)),
        request(images=(str(page),)),
        request(images=(gone,), turns=(turn,)),
        request(images=(str(half),), turns=(cut,)),
    )
    reasons = ["bad_image", "image_unsupported", "bad_image", "bad_image"]
    assert [result.error.reason for result in results] == reasons
    assert all(isinstance(result.error, BadRequestError) for result in results)
    assert site.api.ledger()["attempts"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_money_is_what_the_service_billed(site, stream):
    site.api.script({"again": ["500", "truncated_base64"], "never": "block", "talk": "talk"})
    summary = site.draw("fine", "again", "never", "talk", serving=site.serving(send_request_stream=stream))
    assert (summary.done, summary.refused) == (3, 1)
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])
    assert site.api.ledger()["totals"]["attempts"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_storm_of_faults(site, stream):
    """Every row ends, with its own image or a true reason, and no call is made that the faults did not force."""
    site.api.script({"storm": {"share": 0.3, "seed": 5, "attempts": 2}})
    prompts = [f"thing {number}" for number in range(40)]
    summary = site.draw(*prompts, serving=site.serving(max_workers=8, send_request_stream=stream))
    assert summary.balanced
    assert (summary.pending, summary.failed) == (0, 0)
    for prompt, row in zip(prompts, site.table(), strict=True):
        assert [mark(image) == expected_mark(prompt) for image in row["images"]] in ([True], [])
        assert bool(row["images"]) != ("images_error" in row)
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])


# Connections, keys, environment


def peak(entries):
    """The most requests that were under way at once."""
    events = [(entry["time"], 1) for entry in entries] + [(entry["time"] + entry["seconds"], -1) for entry in entries]
    now = most = 0
    for _, step in sorted(events):
        now += step
        most = max(most, now)
    return most


@pytest.mark.parametrize(("workers", "stream"), [(150, False), (150, True), (3, False)])
def test_the_limit_of_connections_is_ours(site, workers, stream):
    site.api.script({"": "slow:2" if workers > 100 else "slow:0.1"})
    requests = [request(f"thing {number}", number) for number in range(150 if workers > 100 else 12)]
    results = answers(site.serving(max_workers=workers, send_request_stream=stream), *requests)
    assert all(read_mark(*one.images) == expected_mark(of.prompt) for one, of in zip(results, requests, strict=True))
    assert 0.8 * workers < peak(site.api.ledger()["attempts"]) <= workers


def test_the_client_reads_nothing_from_the_environment(site, monkeypatch, caplog):
    environment = {
        "GOOGLE_API_KEY": "df-other-1111111111",
        "GEMINI_API_KEY": "df-other-2222222222",
        "GOOGLE_GENAI_USE_VERTEXAI": "true",
        "GOOGLE_GENAI_USE_ENTERPRISE": "true",
        "GOOGLE_CLOUD_PROJECT": "somebody",
        "GOOGLE_CLOUD_LOCATION": "elsewhere",
        "GOOGLE_GENAI_API_VERSION": "v9",
        "GOOGLE_GEMINI_BASE_URL": "http://127.0.0.1:9",
        "GOOGLE_GENAI_CLIENT_MODE": "replay",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        [result] = answers(site.serving(), request("a fox"))
    assert result.error is None
    assert site.api.requests("enerateContent")[0]["path"] == f"/v1beta/models/{MODEL}:generateContent"
    assert "API_KEY" not in caplog.text


def test_a_client_that_does_not_start(site, monkeypatch):
    monkeypatch.setenv("GOOGLE_GENAI_HTTP_CLIENT", "httpx2")
    monkeypatch.setattr("google.genai._api_client.httpx2", None)
    with pytest.raises(FatalServingError, match="GOOGLE_GENAI_HTTP_CLIENT=httpx2"):
        answers(site.serving(), request())


def test_a_wrong_key_stops_the_run_and_is_never_shown(site, monkeypatch, caplog):
    monkeypatch.setenv("DF_API_KEY", "df-wrong-9876543210")
    with caplog.at_level(logging.DEBUG), pytest.raises(RunStoppedError, match="401") as caught:
        site.draw("one", "two")
    written = "".join(path.read_text(errors="replace") for path in site.folder.rglob("*") if path.is_file())
    assert "9876543210" not in caplog.text + str(caught.value) + written


@pytest.mark.parametrize("stream", [False, True])
def test_the_key_stays_out_of_everything(site, caplog, stream):
    site.api.script({"bad": "400", "broken": "half_jpeg", "lost": "disconnect"})
    serving = site.serving(send_request_stream=stream)
    with caplog.at_level(logging.DEBUG):
        site.draw("fine", "bad", "broken", "lost", serving=serving, max_attempts=1)
    written = b"".join(path.read_bytes() for path in site.folder.rglob("*") if path.is_file())
    assert KEY.encode() not in written + pickle.dumps(serving)
    assert KEY not in caplog.text


def test_the_key_is_not_carried_elsewhere(site):
    """Neither after a redirect nor to an address that the service names for an upload."""
    from aiohttp import web

    trapped = []

    async def trap(asked):
        trapped.append(asked.headers)
        return web.json_response({})

    async def leave(asked):
        if asked.path.startswith("/upload"):
            return web.json_response(
                {}, headers={"X-Goog-Upload-URL": f"{site.elsewhere}/x", "X-Goog-Upload-Status": "active"}
            )
        raise web.HTTPTemporaryRedirect(f"{site.elsewhere}/x")

    async def serve(handler):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, "http://{}:{}".format(*runner.addresses[0])

    async def work():
        (other, site.elsewhere), (home, url) = [await serve(handler) for handler in (trap, leave)]
        serving = site.serving(api_url=url)
        await asyncio.to_thread(serving.setup)
        [result] = await serving.generate([request()])
        path = site.folder / "lines"
        path.write_bytes(b"{}\n")
        uploaded = None
        with contextlib.suppress(FatalServingError, RetryError):
            uploaded = await serving._client.upload(path, "x")
        await asyncio.to_thread(serving.cleanup)
        await asyncio.gather(other.cleanup(), home.cleanup())
        return result, uploaded

    result, uploaded = asyncio.run(work())
    assert "redirect" in str(result.error)
    assert uploaded is None
    assert trapped == []


def test_no_key(site, monkeypatch):
    monkeypatch.delenv("DF_API_KEY")
    with pytest.raises(ConfigError, match="environment variable DF_API_KEY holds no key"):
        site.draw("one")


# What it takes


def test_what_makes_an_image_what_it_is(site):
    serving = site.serving(api_url=f"{site.api.url}/v1beta/", aspect_ratio="4:5", request_params={"temperature": 1})
    assert serving.url == site.api.url
    assert serving.fingerprint() == {"service": "generateContent", "model": MODEL}
    assert serving.default_params() == {"responseModalities": ["IMAGE"], "temperature": 1, "aspect_ratio": "4:5"}
    assert pickle.loads(pickle.dumps(serving)).default_params() == serving.default_params()
    assert (serving.masks, serving.batch_size, serving.request_timeout) == (False, 1, 20)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"negative_prompt": "blur"}, "no negative prompt"),
        ({"size": (1000, 1000)}, r"1000×1000 cannot be made: there are 1024×1024, .* and 1536×672"),
        ({"params": {"guidance_scale": 3}}, "the row sets guidance_scale"),
        ({"params": {"aspect_ratio": "7:5"}}, r"makes no aspect_ratio '7:5': there are 1:1, 2:3"),
        ({"params": {"aspect_ratio": 1.5}}, "aspect_ratio must be a word"),
        ({"params": {"image_size": "2K"}}, "it makes one size only"),
        ({"images": ("a", "b", "c", "d")}, "takes 3 input images; the row has 4"),
        (
            {"images": ("x", "d"), "turns": (Turn(prompt="", images=("a", "b", "c"), answer="x"),)},
            "takes 3 input images; the row has 4",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_paid_for(site, facts, message):
    with pytest.raises(BadRequestError, match=message):
        site.serving().check(request(**facts))


@pytest.mark.parametrize(
    "facts",
    [
        {"size": (1344, 768), "params": {"aspect_ratio": "1:1", "responseModalities": ["IMAGE"]}},
        {"images": ("x", "b"), "turns": (Turn(prompt="", images=("a",), answer="x"),) * 2},
        {"params": {"num_inference_steps": None}},
    ],
)
def test_what_can_be_made(site, facts):
    site.serving().check(request(**facts))


def test_a_model_nobody_knows_takes_everything_but_a_size(site, tmp_path):
    serving = site.serving(model_name="gemini-9", aspect_ratio="7:5", image_size="9K")
    serving.check(request(images=("a",) * 20))
    with pytest.raises(BadRequestError, match=r"what sizes gemini-9 makes is not known.*model_table"):
        serving.check(request(size=(64, 64)))
    table = tmp_path / "models.toml"
    table.write_text('["gemini-9".pixels]\n"7:5" = [[64, 64]]\n')
    site.serving(model_name="gemini-9", model_table=table).check(request(size=(64, 64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_io": None}, "image_io must say"),
        ({"aspect_ratio": "1:4"}, r"gemini-2.5-flash-image makes no aspect_ratio '1:4'"),
        ({"model_name": THIRD, "image_size": "512"}, "there are 1K, 2K, 4K"),
        ({"image_size": "1K"}, "makes one size only"),
        ({"request_params": {"contents": []}}, "contents is set by the serving itself"),
        ({"request_params": {"aspect_ratio": "1:1"}}, "aspect_ratio is set by the serving itself"),
        ({"request_params": {"imageConfig": {"imageSize": "1K"}}}, "say aspect_ratio and image_size outside it"),
        ({"request_params": {"topP": float("nan")}}, "request_params:"),
        ({"model_table": "/nowhere.toml"}, "cannot be read"),
        ({"timeout": 0}, "timeout must be more than 0"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        GeminiImageServing(**{"image_io": ImageIO(tmp_path), **options})


# Streams


def streamed(*chunks):
    stream = GeminiStream(service="it")
    for chunk in chunks:
        stream.add(chunk)
    return stream.reply()


def chunk(*parts, **facts):
    return {"candidates": [{"index": 0, "content": {"parts": list(parts)}, **facts}]}


PICTURE = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}


def test_pieces_of_a_text_are_joined_and_signatures_stay_apart():
    signed = {"text": "", "thoughtSignature": "abcd"}
    reply = streamed(
        chunk({"text": "Hm", "thought": True}),
        chunk({"text": "He"}),
        [chunk({"text": "re."})],
        chunk(PICTURE),
        chunk(signed),
        chunk({"text": " Done."}, finishReason="STOP"),
        {"usageMetadata": {"promptTokenCount": 3}},
    )
    assert reply.parts == ({"text": "Here."}, PICTURE, signed, {"text": " Done."})
    assert (reply.text, reply.finish, reply.usage) == ("Here. Done.", "STOP", {"promptTokenCount": 3})
    assert len(reply.images) == 1


@pytest.mark.parametrize(
    ("chunks", "error", "reason"),
    [
        ([], RetryError, "cut_stream"),
        ([chunk(PICTURE)], RetryError, "cut_stream"),
        ([{"promptFeedback": {"blockReason": "SAFETY"}}], RefusedError, "refused"),
        ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], RetryError, "transient"),
        ([{"modelVersion": "x"}], RetryError, "bad_reply"),
        (["x"], RetryError, "not_json"),
        ([{"candidates": ["x"]}], RetryError, "bad_reply"),
        ([chunk("x")], RetryError, "bad_reply"),
    ],
)
def test_streams_that_end_badly(chunks, error, reason):
    usage = {"promptTokenCount": 3}
    with pytest.raises(error) as caught:
        streamed({"usageMetadata": usage}, *chunks)
    assert caught.value.reason == reason
    if reason != "bad_reply":
        assert caught.value.usage == usage


def test_what_of_an_answer_is_kept_for_the_next_turn(site):
    signed = {"thoughtSignature": "abcd"}
    parts = (
        {"text": "Hm", "thought": True, **signed},
        {**PICTURE, "thought": True, **signed},
        {"text": ""},
        {"inline_data": PICTURE["inlineData"], "thought_signature": "efgh"},
        signed,
    )
    kept = [{"text": "Hm", "thought": True, **signed}, {"inlineData": {}, "thoughtSignature": "efgh"}]
    assert site.serving()._facts(Reply(parts=parts)) == {"parts": [*kept, {"text": "", **signed}]}
