import asyncio
import gc
import json
import logging
import shutil
import threading
import weakref

import numpy as np
import pytest

from dataflow.errors import BadRequestError, ConfigError, FatalServingError
from dataflow.io import ImageIO
from dataflow.serving import diffusers_runner
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest

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
    weights = weakref.ref(serving.runner.pipe.transformer)
    serving.cleanup()
    serving.cleanup()
    gc.collect()
    assert weights() is None
    with pytest.raises(FatalServingError, match="not set up"):
        run(serving, [request(5)])
    serving.setup()
    assert (pixels(run(serving, [request(5)])[0]) == before).all()
    assert not any(thread.name.startswith("pipeline") for thread in threading.enumerate()) or serving.runner


def test_one_thread_calls_the_pipeline(flux_folder, loaded, monkeypatch):
    serving = loaded(flux_folder)
    threads = []
    original = serving._batches._made
    monkeypatch.setattr(serving._batches, "_made", lambda jobs: threads.append(threading.get_ident()) or original(jobs))
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
