import asyncio
import gc
import json
import logging
import pickle
import shutil
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    DataflowError,
    FatalServingError,
    MissingExtraError,
    OutOfMemoryError,
    RefusedError,
    RetryError,
)
from dataflow.io import ImageIO
from dataflow.serving import diffusers_options, diffusers_runner, model_files
from dataflow.serving.capabilities import TABLE
from dataflow.serving.diffusers_call import Job, call_arguments
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest, Serving

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def request(number=0, prompt="a red circle", **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=more.pop("seed", number), **more)


def run(serving, requests):
    return asyncio.run(serving.generate(requests))


def pixels(result):
    assert result.error is None, result.error
    (image,) = result.images
    return np.asarray(image).astype(int)


@pytest.fixture
def loaded():
    """Sets servings up, and cleans them up at the end."""
    servings = []

    def load(folder, **arguments):
        servings.append(LocalImageGenServing(hf_model_name_or_path=folder, **arguments))
        servings[-1].setup()
        return servings[-1]

    yield load
    for serving in servings:
        serving.cleanup()


@pytest.fixture
def picture(tmp_path):
    def make(name="in.png", size=(32, 32), colour="red", mode="RGB", **save):
        Image.new(mode, size, colour).save(tmp_path / name, **save)
        return str(tmp_path / name)

    return make


# The constructor only stores


def test_it_is_a_serving():
    serving = LocalImageGenServing(batch_size=4, diffuser_num_images_per_prompt=3)
    assert isinstance(serving, Serving)
    assert (serving.batch_size, serving.concurrency, serving.images_per_prompt) == (4, 1, 3)
    assert serving.image_io is None


def test_it_pickles_small():
    serving = LocalImageGenServing(
        hf_model_name_or_path="black-forest-labs/FLUX.1-dev", batch_size=4, lora="a/b@0.8", device=["cuda:0", "cuda:1"]
    )
    data = pickle.dumps(serving)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again._settings == serving._settings
    assert again.batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"batch_size": "4"}, "batch_size must be a whole number from 1, got '4'"),
        ({"diffuser_num_images_per_prompt": -1}, "diffuser_num_images_per_prompt must be a whole number"),
        ({"Image_gen_task": "image_edit"}, "got 'image_edit', did you mean 'imageedit'?"),
        ({"dtype": "float8"}, "dtype must be 'auto' or 'bf16' or 'fp16' or 'fp32', got 'float8'"),
        ({"device": "gpu"}, "device must be 'auto', 'cpu'"),
        ({"device": ["auto", "cpu"]}, "device must be"),
        ({"device": []}, "at least one device"),
        ({"determinism": "bitwise"}, "determinism must be 'batch' or 'strict'"),
        ({"determinism": "strict", "step_cache": "taylorseer:5"}, "exclude each other"),
        ({"diffuser_num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"diffuser_guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"diffuser_image_height": 64.5}, "height must be a whole number"),
        ({"pipeline_kwargs": {"sigmas": object()}}, "not JSON serializable"),
        ({"lora": [("x", "strong")]}, "lora must be names or"),
        ({"lora": ""}, "lora must be names or"),
        ({"compile": "fast"}, "compile must be one of"),
        ({"offload": "disk"}, "offload must be one of"),
        ({"step_cache": "first_block"}, "step_cache must be like"),
        ({"step_cache": "first_block:2"}, "step_cache must be like"),
        ({"step_cache": "taylorseer:1.5"}, "step_cache must be like"),
        ({"quantization": "int8"}, "quantization must be"),
        ({"quantization": "bnb:3bit"}, "quantization must be"),
    ],
)
def test_wrong_constructor_arguments(arguments, message):
    with pytest.raises(ConfigError) as caught:
        LocalImageGenServing(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (None, ()),
        ("org/lora", (("org/lora", 1.0),)),
        ("org/lora@0.8", (("org/lora", 0.8),)),
        ("me@home/lora", (("me@home/lora", 1.0),)),
        (["a.safetensors", ("b", 2)], (("a.safetensors", 1.0), ("b", 2.0))),
    ],
)
def test_lora_names(lora, expected):
    assert diffusers_options.parse_lora(lora) == expected


def test_without_a_model_the_builtin_one_is_used_and_said(flux_folder, monkeypatch, caplog):
    monkeypatch.setattr(model_files, "_BUILTIN_ROOT", flux_folder.parent)
    caplog.set_level(logging.INFO)
    assert LocalImageGenServing().fingerprint()["model"] == "builtin:tiny-flux"
    assert "hf_model_name_or_path names a real one" in caplog.text


# Defaults and identity


def test_priority_of_defaults(flux_folder):
    plain = LocalImageGenServing(hf_model_name_or_path=flux_folder).default_params()
    assert plain["guidance_scale"] == 3.5  # the table
    assert plain["num_inference_steps"] == 2  # the model's dataflow.json
    assert (plain["width"], plain["height"]) == (32, 32)
    told = LocalImageGenServing(
        hf_model_name_or_path=flux_folder,
        diffuser_num_inference_steps=3,
        diffuser_guidance_scale=1.0,
        diffuser_image_height=64,
        pipeline_kwargs={"max_sequence_length": 8, "true_cfg_scale": 2.0},
        negative_prompt="blurry",
    ).default_params()
    assert told == {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "height": 64,
        "width": 32,
        "max_sequence_length": 8,
        "true_cfg_scale": 2.0,
        "negative_prompt": "blurry",
    }
    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, Image_gen_task="imageedit")
    assert edit.default_params()["guidance_scale"] == 2.5
    assert edit.fingerprint()["pipeline"] == "FluxKontextPipeline"


def test_fingerprint(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    (tmp_path / "lora.safetensors").write_bytes(b"lora")

    def of(**arguments):
        return LocalImageGenServing(hf_model_name_or_path=folder, **arguments).fingerprint()

    plain = of()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {"model", "revision", "pipeline", "dtype"}
    speed = {"batch_size": 8, "device": "cpu", "compile": True, "vae_slicing": True, "diffuser_num_inference_steps": 9}
    for same in ({name: value} for name, value in speed.items()):
        assert of(**same) == plain
    others = [
        {"dtype": "bf16"},
        {"variant": "fp16"},
        {"lora": str(tmp_path / "lora.safetensors")},
        {"lora": f"{tmp_path / 'lora.safetensors'}@0.5"},
        {"determinism": "strict"},
        {"scheduler": "EulerDiscreteScheduler"},
        {"quantization": "torchao:int8wo"},
        {"step_cache": "first_block:0.08"},
        {"attention_backend": "sage"},
        {"vae_tiling": True},
    ]
    found = [json.dumps(of(**other), sort_keys=True) for other in others]
    assert len({json.dumps(plain, sort_keys=True), *found}) == len(others) + 1

    serving = LocalImageGenServing(hf_model_name_or_path=folder)
    before = serving.fingerprint()
    weights = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert serving.fingerprint() == before, "cached: a run is about one model"
    assert of()["revision"] != plain["revision"]


def test_a_hub_model_is_known_by_its_commit_and_sent_with_it(flux_folder, monkeypatch):
    commit = "c" * 40
    files = model_files.ModelFiles(name="org/name", folder=flux_folder, revision=commit, branch="main", hub=True)
    monkeypatch.setattr(model_files, "locate", lambda name, **more: files)
    serving = LocalImageGenServing(hf_model_name_or_path="org/name")
    assert serving.fingerprint()["revision"] == commit
    assert pickle.loads(pickle.dumps(serving))._settings.revision == commit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"diffuser_image_height": 40}, "multiples of 16 pixels, not 32×40"),
        ({"negative_prompt": "blurry"}, "would have no effect on FluxPipeline: it needs true_cfg_scale > 1"),
        ({"diffuser_model_name": "FluxPipelin"}, "has no pipeline 'FluxPipelin', did you mean 'FluxPipeline'"),
        ({"diffuser_model_name": "AutoencoderKL"}, "has no pipeline 'AutoencoderKL'"),
        ({"diffuser_model_name": "FluxFillPipeline"}, "takes a 'mask_image'"),
        ({"diffuser_model_name": "FLUX", "Image_gen_task": "imageedit"}, "makes images from text only"),
    ],
)
def test_arguments_the_model_does_not_take(flux_folder, arguments, message):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, **arguments)
    with pytest.raises(ConfigError) as caught:
        serving.check(request())
    assert message in str(caught.value)


def test_a_height_without_a_width(sd_folder):
    with pytest.raises(ConfigError, match="height and width must be given together"):
        LocalImageGenServing(hf_model_name_or_path=sd_folder, diffuser_image_height=64).default_params()


def test_wrong_pipeline_kwargs_are_found_at_setup(flux_folder):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, pipeline_kwargs={"guidence_scale": 2})
    with pytest.raises(ConfigError, match="takes no parameter 'guidence_scale', did you mean 'guidance_scale'"):
        serving.setup()


# Requests that cannot work


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ("a.png",)}, "makes images from text, the row has 1 input image"),
        ({"size": (33, 32)}, "nearest: 32×32 or 48×32"),
        ({"params": {"height": 40, "width": 32}}, "multiples of 16"),
        ({"params": {"num_inference_steps": 0}}, "num_inference_steps must be a whole number from 1"),
        ({"params": {"guidance_scale": float("inf")}}, "guidance_scale must be a finite number"),
        ({"params": {"guidance": 3}}, "takes no parameter 'guidance', did you mean"),
        ({"params": {"image_guidance_scale": 3}}, "takes no parameter 'image_guidance_scale'"),
        ({"params": {"latents": []}}, "set by the serving itself"),
        ({"negative_prompt": "blurry"}, "would have no effect"),
    ],
)
def test_wrong_requests(flux_folder, more, message):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder)
    with pytest.raises(BadRequestError) as caught:
        serving.check(request(**more))
    assert message in str(caught.value)


def test_right_requests(flux_folder):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder)
    serving.check(request())
    serving.check(request(params=dict(serving.default_params()) | {"num_inference_steps": None}))
    serving.check(request(negative_prompt="blurry", params={"true_cfg_scale": 2.0}, size=(48, 16)))
    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, Image_gen_task="imageedit")
    edit.check(request(images=("a.png",)))
    edit.check(request(after="0" * 32))
    with pytest.raises(BadRequestError, match="this serving edits images, the row has no input image"):
        edit.check(request())
    with pytest.raises(BadRequestError, match="takes 1 input image, the row has 2"):
        edit.check(request(images=("a.png", "b.png")))


def test_only_what_may_share_a_call_has_equal_keys(flux_folder, picture):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, batch_size=4)
    key = serving.batch_key(request())
    assert hash(key) == hash(serving.batch_key(request(1, prompt="another")))
    assert serving.batch_key(request(2, params=dict(serving.default_params()))) == key
    for more in (
        {"size": (48, 32)},
        {"params": {"num_inference_steps": 3}},
        {"params": {"guidance_scale": 1.0}},
        {"negative_prompt": "x"},
        {"alone": True},
    ):
        assert serving.batch_key(request(1, **more)) != key
    strict = LocalImageGenServing(hf_model_name_or_path=flux_folder, determinism="strict")
    assert strict.batch_key(request(1)) != strict.batch_key(request(2))

    edit = LocalImageGenServing(hf_model_name_or_path=flux_folder, diffuser_model_name="FLUX-Kontext",
                                Image_gen_task="imageedit", pipeline_kwargs={"_auto_resize": True})  # fmt: skip
    square = edit.batch_key(request(1, images=(picture("a.png", (64, 64)),)))
    assert edit.batch_key(request(2, images=(picture("b.png", (128, 128)),))) == square
    assert edit.batch_key(request(3, images=(picture("c.png", (128, 64)),))) != square
    exif = Image.Exif()
    exif[274] = 6
    turned = edit.batch_key(request(4, images=(picture("d.jpg", (64, 128), exif=exif),)))
    assert turned == edit.batch_key(request(5, images=(picture("e.png", (128, 64)),)))
    assert edit.batch_key(request(6, images=("nowhere.png",))) == request(6).request_id


def test_replicas(flux_folder, monkeypatch):
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, device=["cpu", "cpu"], batch_size=3)
    copies = serving.replicas()
    assert [copy._settings.devices for copy in copies] == [("cpu",), ("cpu",)]
    assert all(copy.replicas() == [copy] and copy.batch_size == 3 for copy in copies)
    one = LocalImageGenServing(device="cpu")
    assert one.replicas() == [one]
    auto = LocalImageGenServing()
    assert auto.replicas() == [auto]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [copy._settings.devices for copy in auto.replicas()] == [("cuda:0",), ("cuda:1",)]


# Text to image


def test_text_to_image(flux_folder, loaded):
    serving = loaded(flux_folder, batch_size=4)
    results = run(
        serving, [request(n, prompt) for n, prompt in enumerate(["a red circle", "a blue square", "a red circle"])]
    )
    assert [result.images[0].size for result in results] == [(32, 32)] * 3
    assert [result.images[0].mode for result in results] == ["RGB"] * 3
    assert (pixels(results[0]) != pixels(results[2])).any(), "the same prompt with another seed is another image"
    assert results[0].provenance == {
        "device": "cpu", "dtype": "float32", "pipeline": "FluxPipeline", "scheduler": "FlowMatchEulerDiscreteScheduler",
        "torch": torch.__version__, "diffusers": diffusers.__version__, "batch_size": 3, "width": 32, "height": 32,
    }  # fmt: skip
    assert results[0].seconds > 0


def test_rows_override_the_defaults(flux_folder, loaded):
    serving = loaded(flux_folder, batch_size=4)
    wide, plain, more = run(
        serving, [request(1, size=(48, 16)), request(1), request(1, params={"num_inference_steps": 5.0})]
    )
    assert wide.images[0].size == (48, 16)
    assert (wide.provenance["width"], wide.provenance["height"], wide.provenance["batch_size"]) == (48, 16, 1)
    assert (pixels(plain) != pixels(more)).any()
    guided = request(1, negative_prompt="a blue square", params={"true_cfg_scale": 4.0})
    assert (pixels(run(serving, [guided])[0]) != pixels(plain)).any()
    several = [request(n, negative_prompt="x", params={"true_cfg_scale": 4.0}) for n in range(2)]
    assert all(result.error is None for result in run(serving, several))


def test_wrong_requests_do_not_stop_the_others(flux_folder, loaded):
    good, bad = run(loaded(flux_folder), [request(0), request(1, size=(5, 5))])
    assert good.error is None
    assert isinstance(bad.error, BadRequestError)


@pytest.mark.parametrize("prompt", ["", "日本の赤い丸", "🦊🌲❄️", "a/../b\nc\0d", "red circle " * 1800])
def test_any_prompt(flux_folder, loaded, prompt):
    assert pixels(run(loaded(flux_folder), [request(prompt=prompt)])[0]).shape == (32, 32, 3)


def test_truncation_is_said_once(flux_folder, loaded):
    serving = loaded(flux_folder)
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("diffusers.pipelines.flux.pipeline_flux")
    logger.addHandler(handler)
    try:
        for number in range(3):
            run(serving, [request(number, prompt="red circle " * 1800)])
    finally:
        logger.removeHandler(handler)
    assert len(heard) == len({record.msg[:80] for record in heard}) == 2  # CLIP's limit and T5's
    assert max(len(record.msg) for record in heard) <= 301
    serving.cleanup()
    assert not any(isinstance(found, diffusers_runner._OncePerMessage) for found in logger.filters)


def test_neighbours_change_nothing_beyond_rounding(flux_folder, loaded):
    serving = loaded(flux_folder, batch_size=4)
    requests = [request(n, prompt) for n, prompt in enumerate(["a red circle", "", "blue square " * 9, "green"])]
    alone = [pixels(run(serving, [one])[0]) for one in requests]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        together = run(serving, [requests[n] for n in order])
        for n, result in zip(order, together, strict=True):
            assert np.abs(pixels(result) - alone[n]).max() <= 2


def test_strict_is_bitwise(flux_folder, loaded):
    one, many = loaded(flux_folder, determinism="strict"), loaded(flux_folder, determinism="strict", batch_size=4)
    assert torch.are_deterministic_algorithms_enabled()
    requests = [request(n, prompt) for n, prompt in enumerate(["a red circle", "", "blue square " * 9, "green"])]
    alone = [run(one, [each])[0].images[0].tobytes() for each in requests]
    together = [result.images[0].tobytes() for result in run(many, requests[::-1])][::-1]
    assert alone == together
    assert run(many, requests)[0].provenance["batch_size"] == 1
    many.cleanup()
    one.cleanup()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cleanup_frees_and_setup_loads_again(flux_folder, loaded):
    serving = loaded(flux_folder)
    serving.setup()  # a second time is nothing
    before = pixels(run(serving, [request(5)])[0])
    weights = weakref.ref(serving._runner._pipe.transformer)
    serving.cleanup()
    serving.cleanup()
    gc.collect()
    assert weights() is None
    with pytest.raises(FatalServingError, match="not set up"):
        run(serving, [request(5)])
    serving.setup()
    assert (pixels(run(serving, [request(5)])[0]) == before).all()
    assert not any(thread.name.startswith("pipeline") for thread in threading.enumerate()) or serving._thread


def test_one_thread_calls_the_pipeline(flux_folder, loaded, monkeypatch):
    serving = loaded(flux_folder)
    threads = []
    original = serving._generate
    monkeypatch.setattr(
        serving, "_generate", lambda requests: threads.append(threading.get_ident()) or original(requests)
    )
    for number in range(3):
        run(serving, [request(number)])
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


# Edits


@pytest.fixture
def editor(flux_folder, loaded, tmp_path):
    return loaded(flux_folder, Image_gen_task="imageedit", batch_size=4, image_io=ImageIO(save_path=tmp_path / "out"))


def test_edits_depend_on_their_own_image(editor, picture):
    red, blue = picture("red.png"), picture("blue.png", colour="blue", size=(50, 40))
    together = run(editor, [request(0, images=(red,), seed=7), request(1, images=(blue,), seed=7)])
    assert [result.provenance["batch_size"] for result in together] == [2, 2]
    assert (pixels(together[0]) != pixels(together[1])).any()
    for result, path in zip(together, (red, blue), strict=True):
        (alone,) = run(editor, [request(0, images=(path,), seed=7)])
        assert np.abs(pixels(alone) - pixels(result)).max() <= 2


def test_unreadable_inputs_do_not_stop_the_others(editor, picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    names = [picture(), str(tmp_path / "text.png"), str(tmp_path / "missing.png"), picture("rgba.png", mode="RGBA")]
    results = run(editor, [request(n, images=(name,)) for n, name in enumerate(names)] + [request(9, after="0" * 32)])
    assert [None if r.error is None else r.error.reason for r in results] == [
        None,
        "bad_image",
        "bad_image",
        None,
        "bad_image",
    ]
    assert all(isinstance(result.error, BadRequestError) for result in results if result.error)
    assert "text.png" in str(results[1].error)


def test_kontext_without_an_image_makes_one_from_text(flux_folder, loaded):
    serving = loaded(flux_folder, diffuser_model_name="FLUX-Kontext")
    assert pixels(run(serving, [request(size=(48, 32))])[0]).shape == (32, 48, 3)


def test_the_size_of_a_kontext_edit(editor, picture):
    (result,) = run(editor, [request(images=(picture(),), size=(64, 48))])
    assert result.images[0].size == (64, 48)


def test_pix2pix(pix2pix_folder, loaded, picture):
    with pytest.raises(ConfigError, match="only edits images"):
        LocalImageGenServing(hf_model_name_or_path=pix2pix_folder).check(request())
    serving = loaded(pix2pix_folder, Image_gen_task="imageedit", diffuser_num_inference_steps=2, batch_size=4)
    sizes = [(32, 32), (48, 32), (32, 32)]
    requests = [request(n, images=(picture(f"{n}.png", size),)) for n, size in enumerate(sizes)]
    results = run(serving, requests)
    assert [result.images[0].size for result in results] == sizes
    assert [result.provenance["batch_size"] for result in results] == [2, 1, 2]
    for one, result in zip(requests, results, strict=True):
        assert np.abs(pixels(run(serving, [one])[0]) - pixels(result)).max() <= 2
    with pytest.raises(BadRequestError, match="takes no size"):
        serving.check(request(images=("a.png",), size=(32, 32)))
    serving.check(request(images=("a.png",), negative_prompt="blurry", params={"image_guidance_scale": 2.0}))


def test_stable_diffusion(sd_folder, loaded):
    serving = loaded(
        sd_folder, diffuser_num_inference_steps=2, batch_size=4, diffuser_image_height=24, diffuser_image_width=40
    )
    requests = [request(n, prompt, negative_prompt="blue") for n, prompt in enumerate(["a red circle", "green"])]
    results = run(serving, requests)
    assert [result.images[0].size for result in results] == [(40, 24)] * 2
    for one, result in zip(requests, results, strict=True):
        assert np.abs(pixels(run(serving, [one])[0]) - pixels(result)).max() <= 2
    with pytest.raises(BadRequestError, match=r"needs guidance_scale > 1"):
        serving.check(request(negative_prompt="blue", params={"guidance_scale": 1.0}))


def test_a_class_nobody_knows(sd_folder, tmp_path, loaded, monkeypatch, caplog):
    class NovelPipeline(diffusers.StableDiffusionPipeline):
        pass

    monkeypatch.setattr(diffusers, "NovelPipeline", NovelPipeline, raising=False)
    folder = shutil.copytree(sd_folder, tmp_path / "novel")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NovelPipeline"}))
    serving = loaded(folder, diffuser_num_inference_steps=2, batch_size=4)
    results = run(serving, [request(0, size=(32, 32)), request(1, size=(32, 32))])
    assert [result.provenance["batch_size"] for result in results] == [1, 1]
    assert serving.batch_key(request(0)) != serving.batch_key(request(1))
    assert caplog.text.count("NovelPipeline is not known") == 1
    with pytest.raises(ConfigError, match="makes images from text only"):
        LocalImageGenServing(hf_model_name_or_path=folder, Image_gen_task="imageedit").check(request())


# From requests to call arguments, for classes too large to build here


def job(number=0, images=(), negative=None, size=None, params=None):
    return Job(place=number, request=request(number, f"prompt {number}"), params=params or {}, size=size,
               negative=negative, images=images, key=0)  # fmt: skip


A, B = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")


@pytest.mark.parametrize(
    ("name", "jobs", "expected"),
    [
        ("FluxPipeline", [job()], {"prompt": "prompt 0"}),
        ("FluxPipeline", [job(), job(1)], {"prompt": ["prompt 0", "prompt 1"]}),
        ("FluxPipeline", [job(params={"num_inference_steps": 4.0})], {"prompt": "prompt 0", "num_inference_steps": 4}),
        ("FluxPipeline", [job(size=(32, 16))], {"prompt": "prompt 0", "width": 32, "height": 16}),
        ("FluxPipeline", [job(negative="x")], {"prompt": "prompt 0"}),
        (
            "FluxPipeline",
            [job(negative="x", params={"true_cfg_scale": 2}), job(1, negative="y")],
            {"prompt": ["prompt 0", "prompt 1"], "true_cfg_scale": 2, "negative_prompt": ["x", "y"]},
        ),
        (
            "FluxKontextPipeline",
            [job(images=[A], size=(32, 16), params={"max_area": 9}), job(1, images=[B])],
            {"prompt": ["prompt 0", "prompt 1"], "image": [A, B], "width": 32, "height": 16, "max_area": 512},
        ),
        ("FluxKontextPipeline", [job(images=[A])], {"prompt": "prompt 0", "image": A}),
        ("QwenImageEditPlusPipeline", [job(images=[A, B])], {"prompt": "prompt 0", "image": [A, B]}),
        ("Flux2Pipeline", [job(images=[A])], {"prompt": "prompt 0", "image": [A]}),
        ("JoyImageEditPlusPipeline", [job(images=[A, B])], {"prompt": "prompt 0", "images": [A, B]}),
        (
            "OmniGenPipeline",
            [job(images=[A, B])],
            {"prompt": "<img><|image_1|></img> <img><|image_2|></img> prompt 0", "input_images": [A, B]},
        ),
        ("LongCatImageEditPipeline", [job(images=[A])], {"prompt": "prompt 0", "image": A}),
        (
            "QwenImagePipeline",
            [job(negative=" ", params={"true_cfg_scale": 4.0})],
            {"prompt": "prompt 0", "true_cfg_scale": 4.0, "negative_prompt": " "},
        ),
    ],
)
def test_call_arguments(name, jobs, expected):
    assert call_arguments(TABLE[name], jobs) == expected


def test_several_references_reach_the_pipeline_together(flux_folder, tmp_path, monkeypatch, picture):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    serving = LocalImageGenServing(
        hf_model_name_or_path=folder, diffuser_model_name="QwenImageEditPlusPipeline", Image_gen_task="imageedit",
        pipeline_kwargs={"height": 32, "width": 32, "max_sequence_length": 16},
    )  # fmt: skip
    calls = []
    output = SimpleNamespace(images=np.full((1, 8, 8, 3), 0.5))
    serving._runner = fake_runner(lambda **arguments: calls.append(arguments) or output)
    requests = [request(n, images=(picture("a.png"), picture("b.png", (20, 10)))) for n in range(2)]
    results = serving._generate(requests)
    assert all(result.error is None for result in results)
    assert [[image.size for image in call["image"]] for call in calls] == [[(32, 32), (20, 10)]] * 2
    assert [call["generator"].initial_seed() for call in calls] == [0, 1]
    assert "num_images_per_prompt" not in calls[0]
    assert calls[0]["negative_prompt"] == " "


# What may go wrong in a pipeline


def fake_runner(pipe, floats=True):
    runner = object.__new__(diffusers_runner.Runner)
    runner._torch, runner._device, runner._pipe, runner.provenance = torch, "cpu", pipe, {}
    runner._recipe = SimpleNamespace(pipeline="FakePipeline", floats=floats, device="cpu", folder="model")
    return runner


OOM = "out_of_memory"


def outcome(error):
    def pipe(**arguments):
        raise error

    with pytest.raises(DataflowError) as caught:
        fake_runner(pipe).run([1, 2], {})
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError, OOM),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError, OOM),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), OutOfMemoryError, OOM),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), OutOfMemoryError, OOM),
        (RuntimeError("CUDA error: out of memory"), OutOfMemoryError, OOM),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemoryError, OOM),
        (MemoryError(), OutOfMemoryError, OOM),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FatalServingError, "device_error"),
        (ValueError("shape mismatch"), RetryError, "pipeline_error"),
        (KeyError("x"), RetryError, "pipeline_error"),
        (ValueError("out of memory is in the prompt"), RetryError, "pipeline_error"),
        (ImportError("needs ftfy"), ConfigError, None),
    ],
)
def test_what_a_pipeline_raises(error, expected, reason):
    found = outcome(error)
    assert type(found) is expected
    assert getattr(found, "reason", None) == reason
    assert type(error).__name__ in str(found)
    assert str(error) in str(found)


def test_errors_hold_no_tensors_alive():
    references = []

    def pipe(**arguments):
        tensor = torch.zeros(4)
        references.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError) as caught:
        fake_runner(pipe).run([1], {})
    assert references[0]() is None
    assert caught.value.__context__ is None


def answers(**output):
    return fake_runner(lambda **arguments: SimpleNamespace(**output)).run([1, 2], {})


def test_nan_and_black_pictures_are_failures_of_their_own():
    grey = np.full((8, 8, 3), 0.5, dtype="float32")
    nan = grey.copy()
    nan[3, 3, 1] = np.nan
    first, second = answers(images=np.stack([grey, nan]))
    assert isinstance(first, Image.Image)
    assert isinstance(second, BadOutputError)
    assert second.reason == "nan"
    black, almost = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    almost[0, 0, 2] = 1
    first, second = answers(images=np.stack([black, almost]))
    assert isinstance(first, BadOutputError)
    assert first.reason == "black"
    assert isinstance(second, Image.Image)
    first, second = answers(image=[Image.new("L", (8, 8)), Image.new("RGBA", (8, 8), "red")])
    assert isinstance(first, BadOutputError)
    assert isinstance(second, Image.Image)
    assert all(picture.mode == "L" for picture in answers(images=np.full((2, 8, 8, 1), 0.5)))


def test_a_model_that_computes_nan(flux_folder, loaded):
    serving = loaded(flux_folder)
    with torch.no_grad():
        serving._runner._pipe.transformer.proj_out.weight.fill_(float("nan"))
    (result,) = run(serving, [request()])
    assert isinstance(result.error, BadOutputError)
    assert result.error.reason == "nan"


def test_refusals():
    images = np.full((2, 8, 8, 3), 0.5)
    first, second = answers(images=images, nsfw_content_detected=[True, False])
    assert isinstance(first, RefusedError)
    assert isinstance(second, Image.Image)
    assert all(isinstance(picture, Image.Image) for picture in answers(images=images, nsfw_content_detected=None))


@pytest.mark.parametrize(
    ("output", "found"), [({"images": [A]}, "1"), ({"images": []}, "0"), ({"frames": [A, B]}, "nothing")]
)
def test_wrong_numbers_of_pictures(output, found):
    with pytest.raises(BadOutputError, match=f"asked for 2 images and returned {found}"):
        answers(**output)


# Loading


def test_weights_that_do_not_load(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"nothing of the kind")
    serving = LocalImageGenServing(hf_model_name_or_path=folder)
    with pytest.raises(FatalServingError, match="does not load as FluxPipeline: "):
        serving.setup()


def test_missing_weights(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        LocalImageGenServing(hf_model_name_or_path=folder).setup()


def test_weights_that_do_not_fit(flux_folder, monkeypatch):
    def too_large(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", too_large)
    with pytest.raises(FatalServingError, match=r"does not fit on auto: .* offload='model' or a quantization may help"):
        LocalImageGenServing(hf_model_name_or_path=flux_folder).setup()


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_without_the_libraries(flux_folder, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"needs {library}: pip install 'open-dataflow\[local\]'"):
        LocalImageGenServing(hf_model_name_or_path=flux_folder).setup()


def test_a_pipeline_that_needs_another_library(monkeypatch):
    def missing(name):
        raise ImportError("needs the foo library")

    monkeypatch.setattr(diffusers, "__getattr__", missing)
    with pytest.raises(ConfigError, match="NewPipeline cannot be imported from diffusers: needs the foo library"):
        diffusers_runner.pipeline_type("NewPipeline")


def fake_torch(cuda=0, mps=False, bf16=True):
    return SimpleNamespace(
        __version__="9",
        float32="fp32",
        float16="fp16",
        bfloat16="bf16",
        cuda=SimpleNamespace(
            is_available=lambda: cuda > 0,
            device_count=lambda: cuda,
            is_bf16_supported=lambda including_emulation: bf16,
            get_device_name=lambda device: "GPU",
            empty_cache=lambda: None,
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        mps=SimpleNamespace(empty_cache=lambda: None),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "wanted", "expected"),
    [
        ({"cuda": 2, "mps": True}, "auto", "cuda:0"),
        ({"mps": True}, "auto", "mps"),
        ({}, "auto", "cpu"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cuda", "cuda:0"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_devices(machine, wanted, expected):
    assert diffusers_runner.choose_device(fake_torch(**machine), wanted) == expected


@pytest.mark.parametrize(("wanted", "message"), [("cuda:1", "sees 1 CUDA devices"), ("mps", "has no Metal device")])
def test_devices_that_are_not_there(wanted, message):
    with pytest.raises(ConfigError, match=message):
        diffusers_runner.choose_device(fake_torch(cuda=1), wanted)


def test_dtypes(caplog):
    def of(wanted, device, **machine):
        return diffusers_runner.choose_dtype(fake_torch(**machine), wanted, device, "FluxPipeline")

    assert of("auto", "cpu") == "fp32"
    assert of("auto", "cuda:0") == "bf16"
    assert of("auto", "mps") == "bf16"
    assert of("fp16", "cpu") == "fp16"
    assert caplog.text == ""
    assert of("auto", "cuda:0", bf16=False) == "fp16"
    assert "may overflow in fp16" in caplog.text


def test_bf16(flux_folder, loaded):
    serving = loaded(flux_folder, dtype="bf16", device="cpu")
    assert run(serving, [request()])[0].provenance["dtype"] == "bfloat16"


def test_accelerator_caches_are_emptied(monkeypatch):
    emptied = []
    for device in ("cuda:0", "mps", "cpu"):
        runner = fake_runner(None)
        runner._torch, runner._device = fake_torch(cuda=1), device
        runner._torch.cuda.empty_cache = lambda device=device: emptied.append(device)
        runner._torch.mps.empty_cache = lambda device=device: emptied.append(device)
        runner._empty_cache()
    assert emptied == ["cuda:0", "mps"]
    assert diffusers_runner._device_name(fake_torch(cuda=1), "cuda:0") == "cuda:0 (GPU)"


def test_old_diffusers_know_another_name_for_the_dtype():
    assert diffusers_runner._dtype_name(diffusers) == "dtype"
    assert diffusers_runner._dtype_name(SimpleNamespace(__version__="1.2.0")) == "dtype"


# LoRA and options


@pytest.fixture
def lora(flux_folder, tmp_path):
    name = "single_transformer_blocks.0.attn.to_q"
    torch.manual_seed(1)
    layers = {f"{name}.lora_A.weight": torch.randn(4, 32), f"{name}.lora_B.weight": torch.randn(32, 4)}
    diffusers.FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    return tmp_path / "lora"


def test_lora(flux_folder, loaded, lora):
    plain = pixels(run(loaded(flux_folder), [request(3)])[0])
    file = lora / "pytorch_lora_weights.safetensors"
    full = pixels(run(loaded(flux_folder, lora=str(file)), [request(3)])[0])
    assert (full != plain).any()
    assert (pixels(run(loaded(flux_folder, lora=[str(lora)]), [request(3)])[0]) == full).all()
    off = pixels(run(loaded(flux_folder, lora=[(str(lora), 0.0)]), [request(3)])[0])
    assert np.abs(off - plain).max() <= 1


def test_wrong_loras(flux_folder, sd_folder, loaded, lora, monkeypatch):
    (lora / "another.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 2 \.safetensors files"):
        loaded(flux_folder, lora=str(lora))
    with pytest.raises(FatalServingError, match="does not load"):
        loaded(flux_folder, lora=str(lora / "another.safetensors"))


def test_loras_of_the_hub_are_loaded_at_their_commit():
    calls = []
    pipe = SimpleNamespace(
        load_lora_weights=lambda *args, **more: calls.append((args, more)),
        set_adapters=lambda *args: calls.append(args),
    )
    runner = fake_runner(pipe)
    files = model_files.ModelFiles(name="org/lora", hub=True, revision="c" * 40)
    runner._recipe = SimpleNamespace(lora=[(files, 0.5)], cache_dir="cache")
    runner._load_adapters(pipe)
    place = {"revision": "c" * 40, "cache_dir": "cache", "local_files_only": False}
    assert calls == [(("org/lora",), {"adapter_name": "lora0", **place}), (["lora0"], [0.5])]


@pytest.mark.parametrize(
    "options",
    [
        {"vae_slicing": True, "vae_tiling": True},
        {"channels_last": True},
        {"attention_backend": "native"},
        {"step_cache": "first_block:0.5"},
        {"step_cache": "taylorseer:2"},
        {"scheduler": "FlowMatchLCMScheduler"},
    ],
    ids=str,
)
def test_options_work(flux_folder, loaded, options, caplog):
    serving = loaded(flux_folder, batch_size=2, diffuser_num_inference_steps=6, **options)
    results = run(serving, [request(0), request(1)])
    assert all(result.error is None for result in results)
    if "scheduler" in options:
        assert results[0].provenance["scheduler"] == options["scheduler"]
    assert ("images depend on their neighbours" in caplog.text) == ("first_block:0.5" in options.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "model", "device": "cpu"}, "there is none"),
        ({"scheduler": "FluxPipeline"}, "scheduler must be a class of diffusers"),
        ({"quantization": "torchao:int8wo"}, "needs torchao"),
        ({"quantization": "bnb:4bit"}, "needs bitsandbytes"),
    ],
)
def test_options_that_cannot_work_here(flux_folder, loaded, options, message):
    with pytest.raises(ConfigError, match=message):
        loaded(flux_folder, **options)


def test_a_quantization_that_wants_a_gpu(flux_folder, loaded):
    with pytest.raises(FatalServingError, match="does not load as FluxPipeline: RuntimeError: No GPU found"):
        loaded(flux_folder, quantization="bnb:8bit")


def test_variants(flux_folder, tmp_path, loaded):
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    plain = pixels(run(loaded(flux_folder), [request(3)])[0])
    assert (pixels(run(loaded(folder, variant="fp16"), [request(3)])[0]) == plain).all()


def recorder(calls, *names, **more):
    return SimpleNamespace(**{name: lambda *a, name=name, **k: calls.append((name, a, k)) for name in names}, **more)


def test_compile_and_offload_use_diffusers_own_interfaces():
    calls = []
    transformer = recorder(calls, "compile", "compile_repeated_blocks")
    pipe = recorder(
        calls, "to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload",
        components={"transformer": transformer}, transformer=transformer,
    )  # fmt: skip
    for mode in (True, "regional", "full", False):
        diffusers_options.apply(pipe, diffusers_options.Options(compile=mode))
    assert [call[0] for call in calls] == ["compile_repeated_blocks", "compile_repeated_blocks", "compile"]
    calls.clear()
    for mode in (None, "model", "sequential", "group"):
        diffusers_options.place(pipe, diffusers_options.Options(offload=mode), "cuda:0")
    assert [call[0] for call in calls] == [
        "to",
        *(f"enable_{how}_offload" for how in ("model_cpu", "sequential_cpu", "group")),
    ]
    assert calls[3][2]["use_stream"] is True
    with pytest.raises(ConfigError, match="attention_backend: SimpleNamespace has no set_attention_backend"):
        diffusers_options.apply(pipe, diffusers_options.Options(attention_backend="native"))
    with pytest.raises(ConfigError, match="no transformer or unet"):
        diffusers_options.denoiser_name({"vae": 1})


def test_closing_undoes_hooks_and_compilation(monkeypatch):
    calls = []
    runner = fake_runner(recorder(calls, "remove_all_hooks"))
    runner._once, runner._restore = logging.Filter(), None
    runner._recipe = SimpleNamespace(options=diffusers_options.Options(offload="model", compile=True))
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    runner.close()
    assert [call[0] if isinstance(call, tuple) else call for call in calls] == ["remove_all_hooks", "reset"]


def test_quantization_through_the_pipelines_own_configuration(flux_folder, monkeypatch):
    calls = []
    fakes = {name: lambda *a, name=name, **k: calls.append((name, a, k)) or name
             for name in ("PipelineQuantizationConfig", "TorchAoConfig", "BitsAndBytesConfig")}  # fmt: skip
    monkeypatch.setattr(diffusers_options, "import_library", lambda name: SimpleNamespace(**fakes))
    ao = SimpleNamespace(Int8WeightOnlyConfig=lambda: "int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", ao)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=ao))
    assert diffusers_options.quantization_config("torchao:int8wo", "transformer", None) == "PipelineQuantizationConfig"
    assert calls[0] == ("TorchAoConfig", ("int8",), {})
    assert calls[1][2] == {"quant_mapping": {"transformer": "TorchAoConfig"}}
    diffusers_options.quantization_config("bnb:8bit", "unet", None)
    diffusers_options.quantization_config({"quant_backend": "x"}, "unet", None)
    assert calls[-1] == ("PipelineQuantizationConfig", (), {"quant_backend": "x"})
