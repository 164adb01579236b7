"""The Images API behind the engine, on real sockets."""

import asyncio
import hashlib
import json
import logging
import pickle
from pathlib import Path

import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, RunStoppedError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime import limits
from dataflow.runtime.engine import RunOptions
from dataflow.serving import batch_jobs
from dataflow.serving.fake_api import PRICES, FakeApi, expected_mark, read_mark
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

pytest.importorskip("openai")
from dataflow.serving.openai_image_serving import DIALECTS, OpenAIImageServing

KEY = "df-secret-0123456789"
QWEN = "Qwen/Qwen-Image-Edit"
LOCAL = ["vllm-omni", "sglang"]
STEPS = {"num_inference_steps", "guidance_scale", "true_cfg_scale"}


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr(limits, "backoff", lambda attempt: 0.01)
    server.script({})
    server.reset()
    return server


class Site:
    """A folder with a table, and steps run on it against the service."""

    def __init__(self, folder, api):
        self.folder, self.api = folder, api
        self.prices = folder / "prices.toml"
        rates = "".join(f"{name} = {price}\n" for name, price in PRICES.items())
        self.prices.write_text(f'["gpt-image-2"]\n{rates}')

    def serving(self, dialect="openai", **options):
        options = {"model_name": "gpt-image-2" if dialect == "openai" else QWEN, **options}
        store = ImageIO(str(self.folder / "cache" / "images"))
        return OpenAIImageServing(
            f"{self.api.url}/v1", image_io=store, timeout=20.0, dialect=dialect, price_table=self.prices, **options
        )

    def storage(self, rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FileStorage(str(table), cache_path=str(self.folder / "cache")).step()

    def draw(self, *prompts, serving=None, **columns):
        self.store = self.storage([{"conversations": prompt, **columns} for prompt in prompts])
        return Text2ImageGenerator(serving or self.serving(), options=RunOptions(quiet=True)).run(self.store)

    def edit(self, *rows, serving=None, **operator):
        self.store = self.storage(rows)
        editor = PromptedImageEditGenerator(serving or self.serving(), options=RunOptions(quiet=True), **operator)
        return editor.run(self.store, "images", "conversations", "edited")

    def table(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]

    def picture(self, name, colour="red", mode="RGB", size=(40, 30), **save):
        Image.new(mode, size, colour).save(self.folder / name, **save)
        return str(self.folder / name)

    def bodies(self, endpoint):
        return [request["body"] for request in self.api.requests(f"images/{endpoint}")]


@pytest.fixture
def site(tmp_path, api):
    return Site(tmp_path, api)


def mark(path):
    return read_mark(Image.open(path))


def content(path):
    return Path(path).read_bytes()


def request_of(prompt="x", **more):
    return GenerationRequest(request_id="0" * 32, prompt=prompt, seed=2**40 + 7, **more)


def ask(serving, *requests):
    """Results of the serving itself, without the engine."""

    async def work():
        results = await serving.generate(requests)
        await asyncio.to_thread(serving.cleanup)
        return results

    serving.setup()
    return asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_words_become_the_rows_own_image(site, kind, stream):
    prompts = [f"thing {number}" for number in range(4)]
    params = {"quality": "low", "output_format": kind, **({"partial_images": 2} if stream else {})}
    serving = site.serving(send_request_stream=stream, request_params=params, size=(1024, 640))
    summary = site.draw(*prompts, serving=serving)
    assert (summary.done, summary.made) == (4, 4)
    for prompt, row in zip(prompts, site.table(), strict=True):
        [image] = row["images"]
        assert mark(image) == expected_mark(prompt)
    assert site.draw(*prompts, serving=serving).made == 0
    totals = site.api.ledger()["totals"]
    assert totals["attempts"] == 4
    assert summary.usd == pytest.approx(totals["usd_reported"])


@pytest.mark.parametrize("stream", [False, True])
def test_edits_send_every_reference_whole_and_in_order(site, stream):
    paths = [
        site.picture("a.png"),
        site.picture("b.jpg", "blue", quality=80),
        site.picture("c.webp", "green", lossless=True),
    ]
    serving = site.serving(send_request_stream=stream)
    assert site.edit({"images": paths, "conversations": "join them"}, serving=serving).done == 1
    [row] = site.table()
    assert mark(row["edited"][0]) == expected_mark("join them", [content(path) for path in paths])
    [body] = site.bodies("edits")
    assert [(file["name"], file["filename"], file["content_type"]) for file in body["files"]] == [
        ("image[]", "0.png", "image/png"),
        ("image[]", "1.jpeg", "image/jpeg"),
        ("image[]", "2.webp", "image/webp"),
    ]
    assert [file["sha256"] for file in body["files"]] == [hashlib.sha256(content(p)).hexdigest() for p in paths]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dialect", ["openai", "vllm-omni"])
def test_a_mask_goes_with_the_first_image(site, dialect, count):
    paths = [site.picture(f"{number}.png") for number in range(count)]
    mask = site.picture("mask.png", (0, 0, 0, 0), "RGBA")
    [result] = ask(site.serving(dialect), request_of(images=tuple(paths), mask=mask))
    assert result.error is None
    assert read_mark(result.images[0]) == expected_mark("x", [content(path) for path in (*paths, mask)])
    [body] = site.bodies("edits")
    name = "image" if count == 1 else "image[]"
    assert [file["name"] for file in body["files"]] == [name] * count + [DIALECTS[dialect].mask]
    assert body["files"][-1]["content_type"] == "image/png"


@pytest.mark.parametrize(
    ("dialect", "options", "fields"),
    [
        ("openai", {}, {"model", "prompt"}),
        ("openai", {"size": (1024, 1024)}, {"model", "prompt", "size"}),
        ("openai", {"send_request_stream": True}, {"model", "prompt", "stream"}),
        (
            "openai",
            {"request_params": {"quality": "low", "background": "opaque", "output_compression": 80, "user": None}},
            {"model", "prompt", "quality", "background", "output_compression"},
        ),
        *((name, {}, {"model", "prompt", "seed", "generator_device", "response_format"}) for name in LOCAL),
        *(
            (
                name,
                {"size": (768, 512), "request_params": dict.fromkeys(STEPS, 4) | {"negative_prompt": "blur"}},
                {"model", "prompt", "seed", "generator_device", "response_format", "size", "negative_prompt", *STEPS},
            )
            for name in LOCAL
        ),
    ],
)
@pytest.mark.parametrize("endpoint", ["generations", "edits"])
def test_exactly_these_fields_are_sent(site, endpoint, dialect, options, fields):
    serving = site.serving(dialect, **options)
    if endpoint == "edits":
        assert site.edit({"images": site.picture("in.png"), "conversations": "thing"}, serving=serving).done == 1
    else:
        assert site.draw("thing", serving=serving).done == 1
    [request] = site.api.requests("images/")
    assert request["path"] == f"/v1/images/{endpoint}"
    body = request["body"]
    if endpoint == "edits":
        assert request["headers"]["content-type"].startswith("multipart/form-data")
        assert [file["name"] for file in body["files"]] == ["image"]
        body = body["fields"]
    else:
        assert request["headers"]["content-type"] == "application/json"
    assert set(body) == fields
    expected = {"model": serving.model, "prompt": "thing", "response_format": "b64_json", "generator_device": "cpu"}
    expected |= {"negative_prompt": "blur"}
    assert {name: body[name] for name in expected.keys() & fields} == {n: expected[n] for n in expected.keys() & fields}
    if "size" in fields:
        assert body["size"] == "{}x{}".format(*options["size"])
    if "output_compression" in fields:
        assert int(body["output_compression"]) == 80
    if "stream" in fields:
        assert body["stream"] in (True, "true")


@pytest.mark.parametrize("dialect", LOCAL)
def test_an_engine_of_ones_own_gets_each_requests_seed(site, dialect):
    serving = site.serving(dialect, images_per_prompt=2)
    assert site.draw("thing", "other", serving=serving, seed=2**31 + 5).done == 2
    seeds = [body["seed"] for body in site.bodies("generations")]
    assert sorted(seeds) == [5, 5, 6, 6]
    first, second = ask(serving, request_of(), request_of())
    assert first.images == second.images


@pytest.mark.parametrize("dialect", LOCAL)
def test_a_row_overrides_what_the_engine_takes(site, dialect):
    serving = site.serving(dialect, request_params={"guidance_scale": 3.5, "lora": {"name": "ink"}})
    columns = {"num_inference_steps": 8, "guidance_scale": 2.0, "negative_prompt": "fog", "height": 512, "width": 768}
    if dialect == "sglang":
        columns["max_sequence_length"] = 128
    assert site.draw("thing", serving=serving, **columns).done == 1
    [body] = site.bodies("generations")
    expected = {name: value for name, value in columns.items() if name not in ("height", "width")}
    assert {name: body[name] for name in expected} == expected
    assert (body["size"], body["lora"]) == ("768x512", {"name": "ink"})


def test_batch_jobs_behind_the_engine(site, monkeypatch):
    monkeypatch.setattr(batch_jobs, "FIRST_POLL", 0.05)
    source = site.picture("in.png")
    rows = [{"images": source, "conversations": f"thing {number}"} for number in range(5)]
    summary = site.edit(*rows, serving=site.serving(batch_jobs=True, batch_size=3, max_workers=2))
    assert (summary.done, summary.made) == (5, 5)
    for row, made in zip(rows, site.table(), strict=True):
        assert mark(made["edited"][0]) == expected_mark(row["conversations"], [content(source)])
    assert {entry["batch"] for entry in site.api.ledger()["attempts"]} == {True}
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])


def test_a_further_turn_edits_the_image_before(site):
    turns = [{"role": "user", "content": text} for text in ("first", "second")]
    assert site.edit({"images": site.picture("in.png"), "conversations": turns}).done == 1
    first, second = site.bodies("edits")
    assert (first["fields"]["prompt"], second["fields"]["prompt"]) == ("first", "second")
    [sent] = second["files"]
    assert sent["sha256"] != first["files"][0]["sha256"]
    images = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (site.folder / "cache").rglob("*.png")}
    assert sent["sha256"] in images


@pytest.mark.parametrize("shape", ["url", "relative_url"])
def test_an_address_is_fetched(site, shape):
    site.api.script({"thing": f"shape:{shape}"})
    assert site.draw("thing").done == 1
    assert mark(site.table()[0]["images"][0]) == expected_mark("thing")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"size": (1000, 1024)}, "gpt-image-2: 1000×1024 cannot be made: both sides must be multiples of 16"),
        ({"images": ("a.png",) * 17}, "takes 16 input images; the row has 17"),
        ({"images": ("a.png",) * 16, "after": "1" * 32}, "takes 16 input images; the row has 17"),
        ({"mask": "m.png"}, "a mask and no input image"),
        ({"negative_prompt": "blur"}, "takes no negative prompt: say it in the prompt"),
        (
            {"params": {"num_inference_steps": 3}},
            "the row sets num_inference_steps: OpenAI's Images API",
        ),
        ({"prompt": "x" * 32_001}, "takes prompts of 32,000 characters; this one has 32,001"),
    ],
)
def test_what_openai_does_not_take_is_refused_before_it_is_paid_for(site, request_, message):
    serving = site.serving(request_params={"quality": "low"})
    with pytest.raises(BadRequestError, match=message):
        serving.check(request_of(**request_))
    serving.check(request_of(params=serving.default_params()))
    serving.check(request_of(images=("a.png",) * 16, mask="m.png", size=(1024, 1024), prompt="x" * 32_000))


@pytest.mark.parametrize(
    ("dialect", "request_", "message"),
    [
        ("sglang", {"images": ("a.png",), "mask": "m.png"}, "SGLang takes no mask"),
        (
            "sglang",
            {"images": ("a.png",), "params": {"max_sequence_length": 9}},
            "rows may set guidance_scale",
        ),
        ("vllm-omni", {"params": {"max_sequence_length": 9}}, "the row sets max_sequence_length: vLLM-Omni"),
        ("vllm-omni", {"params": {"strength": 0.5}}, "the row sets strength"),
    ],
)
def test_what_an_engine_of_ones_own_would_drop_without_a_word_is_refused(site, dialect, request_, message):
    with pytest.raises(BadRequestError, match=message):
        site.serving(dialect).check(request_of(**request_))


def test_a_model_in_no_table_is_sent_everything_and_ones_own_table_counts(site):
    table = site.folder / "models.toml"
    table.write_text('["mine"]\nmax_images = 1\nmask = false\nsizes = [[512, 512]]\n')
    wild = request_of(size=(17, 9999), images=("a.png",) * 40, mask="m.png", prompt="x" * 40_000)
    site.serving(model_name="an-unheard-of-model").check(wild)
    mine = site.serving(model_name="mine", model_table=table)
    for bad in ({"size": (17, 9)}, {"images": ("a.png",) * 2}, {"images": ("a.png",), "mask": "m.png"}):
        with pytest.raises(BadRequestError, match="mine"):
            mine.check(request_of(**bad))
    with pytest.raises(ConfigError, match="cannot be read"):
        site.serving(model_table=site.folder / "none.toml").default_params()


def test_input_files_that_cannot_be_sent(site):
    (site.folder / "in.gif").write_bytes(b"GIF89a")
    good, mask = site.picture("in.png"), site.picture("mask.webp", (0, 0, 0, 0), "RGBA")
    results = ask(
        site.serving(),
        request_of(images=(str(site.folder / "none.png"),)),
        request_of(images=(good, str(site.folder / "in.gif"))),
        request_of(images=(good,), mask=mask),
        request_of(images=(good,)),
    )
    reasons = [result.error.reason if result.error else "" for result in results]
    assert reasons == ["bad_image", "image_unsupported", "image_unsupported", ""]
    assert "a mask must be a PNG file" in str(results[2].error)
    assert site.api.ledger()["totals"]["attempts"] == 1


RETRIED = ["cut", "half_stream", "no_end", "disconnect", "paid_disconnect", "empty", "html", "500", "rate_limit:0.05"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [*RETRIED, "error_200", "error_list", "truncated_base64", "half_png"])
def test_a_broken_answer_is_asked_for_again(site, fault, stream):
    site.api.script({"thing": [fault]})
    summary = site.draw("thing", serving=site.serving(send_request_stream=stream))
    assert (summary.done, summary.failed) == (1, 0)
    assert mark(site.table()[0]["images"][0]) == expected_mark("thing")
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])


@pytest.mark.parametrize("fault", ["moderation", "content_policy", "refuse", "451"])
def test_a_refusal_is_final(site, fault):
    site.api.script({"thing": fault})
    summary = site.draw("thing", "fine")
    assert (summary.done, summary.refused) == (1, 1)
    assert site.api.ledger()["totals"]["attempts"] == 2


@pytest.mark.parametrize("fault", ["urlsafe_base64", "spaced_base64", "wrong_type:text/plain", "drip:0.2"])
def test_what_is_odd_and_right_is_taken(site, fault):
    site.api.script({"thing": fault})
    assert site.draw("thing").done == 1
    assert site.api.ledger()["totals"]["attempts"] == 1


@pytest.mark.parametrize("fault", ["svg", "gif", "not_image", "bomb", "count:2"])
def test_what_is_no_image_becomes_none(site, fault):
    site.api.script({"thing": fault})
    summary = site.draw("thing")
    assert (summary.done, summary.failed) == (0, 1)
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"]) != 0


def test_a_spent_quota_stops_the_run(site):
    site.api.script({"thing": "quota"})
    with pytest.raises(RunStoppedError, match="quota"):
        site.draw("thing")


def test_an_unanswered_request_times_out(site):
    site.api.script({"thing": ["hang"]})
    serving = site.serving()
    serving.request_timeout = 0.5
    assert site.draw("thing", serving=serving).done == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("edit", [False, True])
def test_a_storm_of_faults(site, edit, stream):
    site.api.script({"storm": {"share": 0.3, "seed": 11, "attempts": 2}})
    prompts = [f"thing {number}" for number in range(40)]
    serving = site.serving(send_request_stream=stream, max_workers=8)
    sources = []
    if edit:
        source = site.picture("in.png")
        sources = [content(source)]
        summary = site.edit(*({"images": source, "conversations": prompt} for prompt in prompts), serving=serving)
    else:
        summary = site.draw(*prompts, serving=serving)
    assert summary.balanced
    assert (summary.pending, summary.failed) == (0, 0)
    column = "edited" if edit else "images"
    for prompt, row in zip(prompts, site.table(), strict=True):
        assert [mark(image) == expected_mark(prompt, sources) for image in row[column]] in ([True], [])
        assert bool(row[column]) != (f"{column}_error" in row)
    assert summary.usd == pytest.approx(site.api.ledger()["totals"]["usd_reported"])


def test_the_key_stays_out_of_everything(site, caplog):
    site.api.script({"bad": "400", "broken": "half_jpeg"})
    serving = site.serving()
    with caplog.at_level(logging.DEBUG):
        site.draw("fine", "bad", "broken", serving=serving)
        site.edit({"images": site.picture("in.png"), "conversations": "fine"}, serving=serving)
    pickled = pickle.dumps(serving)
    written = b"".join(path.read_bytes() for path in site.folder.rglob("*") if path.is_file())
    assert KEY.encode() not in written + pickled
    assert KEY not in caplog.text
    assert len(pickled) < 3000
    assert pickle.loads(pickled).default_params() == serving.default_params()


def test_a_wrong_key_stops_the_run_and_is_never_shown(site, monkeypatch, caplog):
    monkeypatch.setenv("DF_API_KEY", "df-wrong-9876543210")
    mask = site.picture("mask.png", (0, 0, 0, 0), "RGBA")
    [result] = ask(site.serving("vllm-omni"), request_of(images=(site.picture("in.png"),), mask=mask))
    with caplog.at_level(logging.DEBUG), pytest.raises(RunStoppedError, match="401") as caught:
        site.draw("one", "two")
    assert "401" in str(result.error)
    assert "9876543210" not in caplog.text + str(caught.value) + str(result.error)


def test_the_default_size_and_what_an_image_is_expected_to_cost(tmp_path):
    def serving(**options):
        return OpenAIImageServing(image_io=ImageIO(tmp_path), **options)

    assert serving(size=[1024, 640], request_params={"quality": "high"}).default_params() == {
        "quality": "high",
        "width": 1024,
        "height": 640,
    }
    assert serving(dialect="sglang").default_params() == {"generator_device": "cpu"}
    assert serving(dialect="sglang", request_params={"generator_device": "cuda"}).params["generator_device"] == "cuda"
    cents = pytest.approx(0.211, abs=1e-4)  # and a little for the prompt
    assert serving().estimate(request_of()) == cents
    assert serving(batch_jobs=True).estimate(request_of()) * 2 == cents
    assert serving(model_name="gpt-image-1.5").estimate(request_of()) == pytest.approx(0.2, abs=1e-4)
    assert serving(model_name="x").estimate(request_of()) is None
    assert serving().fingerprint() == {"service": "images", "model": "gpt-image-2"}
    assert serving(api_url="https://here.org/v1/images/generations").url == "https://here.org/v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_io": None}, "image_io must say"),
        ({"dialect": "comfy"}, "dialect must be one of openai, vllm-omni, sglang, got 'comfy'"),
        ({"size": (64,)}, "size must be"),
        ({"size": (64, 0)}, "size must be"),
        ({"size": (64, 64.0)}, "size must be"),
        ({"size": 64}, "size must be"),
        ({"request_params": {"n": 2}}, "n is set by the serving itself"),
        ({"request_params": {"size": "1024x1024"}}, "size is set by the serving itself"),
        ({"request_params": {"response_format": "url"}}, "response_format is set by the serving itself"),
        ({"request_params": {"negative_prompt": "blur"}}, "takes no negative_prompt"),
        ({"request_params": {"output_format": "svg"}}, "output_format must be one of png, jpeg, webp"),
        ({"request_params": {"partial_images": 2}}, "partial_images are only sent with send_request_stream"),
        ({"dialect": "sglang", "send_request_stream": True}, "SGLang has no send_request_stream"),
        ({"dialect": "vllm-omni", "batch_jobs": True}, "vLLM-Omni has no batch_jobs"),
        ({"max_workers": 0}, "max_workers must be a whole number"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        OpenAIImageServing(**{"image_io": ImageIO(tmp_path), **options})
