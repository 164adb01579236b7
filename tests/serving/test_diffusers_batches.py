import asyncio
import itertools
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dataflow.errors import ConfigError, OutOfMemoryError, RetryError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving import accelerators, diffusers_options, diffusers_runner
from dataflow.serving.capabilities import TABLE
from dataflow.serving.diffusers_call import warm_up_arguments
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


def watched(serving, monkeypatch, fail=None):
    """What the pipeline is called with: (seeds, steps) per call. ``fail(seeds)`` may give an error to raise."""
    calls, pipe = [], serving.runner.pipe
    original = type(pipe).__call__

    def call(self, *args, **arguments):
        generators = arguments["generator"]
        generators = generators if isinstance(generators, list) else [generators]
        calls.append(([each.initial_seed() for each in generators], arguments["num_inference_steps"]))
        if fail is not None and (error := fail(calls[-1][0])):
            raise error
        return original(self, *args, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", call)
    return calls


# Compiled: one shape, filled up, warmed up


@pytest.fixture
def no_compiler(monkeypatch):
    """All that compiling brings with it, but for the compiler."""
    monkeypatch.setattr(diffusers_options, "_compile", lambda *args, **more: None)


def test_the_last_batch_is_filled_up_and_the_surplus_dropped(flux_folder, loaded, no_compiler, monkeypatch):
    serving = loaded(flux_folder, compile="regional", batch_size=4, diffuser_num_inference_steps=5)
    full = [request(n, prompt) for n, prompt in enumerate(["a red circle", "blue", "", "green"])]
    whole = [pixels(result) for result in run(serving, full)]
    calls = watched(serving, monkeypatch)
    results = run(serving, full[:3])
    assert calls == [([0, 1, 2, 2], 5)]
    assert len(results) == 3
    assert all((pixels(a) == b).all() for a, b in zip(results, whole, strict=False))
    assert [result.provenance["batch_size"] for result in results] == [4] * 3
    assert results[0].provenance["compile"] == "regional"
    calls.clear()
    run(serving, [request(7, alone=True)])
    assert calls == [([7], 2), ([7], 5)], "a suspect is never made several times"


def test_what_is_not_compiled_is_not_filled_up(flux_folder, loaded, monkeypatch):
    serving = loaded(flux_folder, batch_size=4)
    calls = watched(serving, monkeypatch)
    run(serving, [request(0), request(1)])
    assert calls == [([0, 1], 2)]


def test_every_shape_is_warmed_up_once_and_apart(flux_folder, loaded, no_compiler, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    serving = loaded(flux_folder, compile=True, batch_size=2, diffuser_num_inference_steps=6)
    calls = watched(serving, monkeypatch, fail=lambda seeds: time.sleep(0.3) if len(calls) == 1 else None)
    (first,) = run(serving, [request(0)])
    assert [steps for _, steps in calls] == [2, 6]
    assert serving.runner.warm_up_seconds > 0.3
    assert first.seconds < serving.runner.warm_up_seconds, "the first picture does not pay for it"
    assert "compiled and warmed up for 32×32 × 2 in" in caplog.text
    run(serving, [request(1), request(2)])
    run(serving, [request(1, params={"num_inference_steps": 4, "guidance_scale": 2.0})])
    assert [steps for _, steps in calls[2:]] == [6, 4], "the shape is known"
    run(serving, [request(1, size=(48, 32))])
    run(serving, [request(1, negative_prompt="x", params={"true_cfg_scale": 2.0})])
    assert [steps for _, steps in calls[4:]] == [2, 6, 2, 6]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_inference_steps": 28}, 2),
        ({"num_inference_steps": 1}, 1),
        ({"num_inference_steps": 50, "strength": 0.3}, 7),
        ({"num_inference_steps": 4, "strength": 0.0}, 2),
        ({"num_inference_steps": 28, "sigmas": [1.0, 0.5]}, 28),
        ({}, None),
    ],
)
def test_steps_of_a_warm_up(arguments, steps):
    assert warm_up_arguments(arguments).get("num_inference_steps") == steps


def test_what_did_not_fit_is_not_filled_up_again(flux_folder, loaded, no_compiler, monkeypatch):
    serving = loaded(flux_folder, compile=True, batch_size=8)
    memory = SimpleNamespace(room=3)
    error = torch.OutOfMemoryError("CUDA out of memory")
    calls = watched(serving, monkeypatch, lambda seeds: error if len(seeds) > memory.room else None)
    with pytest.raises(OutOfMemoryError):
        run(serving, [request(n) for n in range(8)])
    with pytest.raises(OutOfMemoryError):
        run(serving, [request(n) for n in range(4)])
    assert all(result.error is None for result in run(serving, [request(0), request(1)]))
    assert [len(seeds) for seeds, _ in calls] == [8, 4, 2, 2]
    run(serving, [request(5)])
    assert len(calls[-1][0]) == 2
    memory.room = 1
    with pytest.raises(OutOfMemoryError):
        run(serving, [request(5)])
    assert run(serving, [request(5)])[0].error is None, "one attempt later it is made by itself"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:.torch.jit:DeprecationWarning")
def test_compiled_for_real(flux_folder, loaded):
    """Neither the last batch nor a longer prompt is compiled anew, and the pictures are the same."""
    from torch._dynamo.utils import counters

    requests = [request(n, prompt) for n, prompt in enumerate(["a red circle", "blue square " * 3, "green"])]
    plain = [pixels(result) for result in run(loaded(flux_folder, batch_size=3), requests)]
    torch.compiler.reset()
    serving = loaded(flux_folder, batch_size=3, compile="regional")
    for result, expected in zip(run(serving, requests), plain, strict=True):
        assert np.abs(pixels(result) - expected).max() <= 2
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    (last,) = run(serving, [request(2, "green")])
    run(serving, [request(9, "a red circle on white")])
    assert counters["stats"]["unique_graphs"] == graphs
    assert np.abs(pixels(last) - plain[2]).max() <= 2


def test_a_denoiser_without_repeated_blocks():
    class Denoiser:
        def compile_repeated_blocks(self, dynamic):
            raise ValueError("`_repeated_blocks` attribute is empty.")

    pipe = SimpleNamespace(components={"transformer": 1}, transformer=Denoiser())
    with pytest.raises(ConfigError, match=r"compile='regional': Denoiser: .* is empty. compile='full' works"):
        diffusers_options.apply(pipe, diffusers_options.Options(compile=True))


def test_shapes_that_depend_on_words_are_compiled_for_any_length():
    assert TABLE["FluxPipeline"].fixed_text
    assert not TABLE["QwenImagePipeline"].fixed_text
    assert not TABLE["ZImagePipeline"].fixed_text
    seen = []
    denoiser = SimpleNamespace(compile=lambda **more: seen.append(more))
    pipe = SimpleNamespace(components={"transformer": 1}, transformer=denoiser)
    for fixed in (True, False):
        diffusers_options.apply(pipe, diffusers_options.Options(compile="full"), fixed_shapes=fixed)
    assert seen == [{"dynamic": False}, {"dynamic": None}]


# Attention by hardware


@pytest.mark.parametrize(
    ("capability", "flash_3", "expected"),
    [
        (None, False, ("native",)),
        ((8, 0), True, ("native",)),
        ((9, 0), False, ("_native_cudnn", "native")),
        ((9, 0), True, ("_flash_3", "_native_cudnn", "native")),
        ((10, 0), True, ("_native_cudnn", "native")),
    ],
)
def test_attention_candidates(capability, flash_3, expected, monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: object() if flash_3 else None)
    assert accelerators.attention_candidates(capability) == expected


def test_auto_attention_falls_back_and_says_so(flux_folder, loaded, monkeypatch, caplog):
    """Flash attention is not installed here, cuDNN's runs on CUDA only: what is left is torch's own."""
    names = ("_flash_3", "_native_cudnn", "native")
    monkeypatch.setattr(accelerators, "attention_candidates", lambda capability: names)
    plain = [pixels(result) for result in run(loaded(flux_folder, batch_size=2), [request(0), request(1)])]
    serving = loaded(flux_folder, batch_size=2, attention_backend="auto")
    assert "attention_backend '_flash_3': Flash Attention 3 backend" in caplog.text
    assert serving.runner.provenance["attention"] == "_native_cudnn"
    results = run(serving, [request(0), request(1)])
    assert "attention _native_cudnn does not work with FluxPipeline" in caplog.text
    assert results[0].provenance["attention"] == "native"
    assert all((pixels(a) == b).all() for a, b in zip(results, plain, strict=True))
    assert serving.fingerprint() == loaded(flux_folder).fingerprint(), "rounding is no other picture"


def test_after_a_success_failures_have_other_reasons(flux_folder, loaded, monkeypatch):
    monkeypatch.setattr(accelerators, "attention_candidates", lambda capability: ("native", "_native_math"))
    serving = loaded(flux_folder, attention_backend="auto")
    run(serving, [request(0)])
    calls = watched(serving, monkeypatch, lambda seeds: ValueError("shape mismatch"))
    with pytest.raises(RetryError):
        run(serving, [request(0)])
    assert len(calls) == 1
    assert serving.runner.provenance["attention"] == "native"


def test_a_denoiser_whose_attention_nobody_can_choose(sd_folder, loaded):
    assert "attention" not in loaded(sd_folder, attention_backend="auto").runner.provenance


def test_a_choice_of_attention_stays_with_its_model(flux_folder, loaded):
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    before = dispatch._AttentionBackendRegistry._active_backend
    loaded(flux_folder, attention_backend="_native_math")
    assert dispatch._AttentionBackendRegistry._active_backend == before


def test_an_attention_that_is_not_there(flux_folder, loaded):
    with pytest.raises(ConfigError, match="attention_backend 'fast': "):
        loaded(flux_folder, attention_backend="fast")
    with pytest.raises(ConfigError, match=r"attention_backend 'sage': .*sageattention"):
        loaded(flux_folder, attention_backend="sage")


def test_which_options_are_another_picture(flux_folder):
    def of(**options):
        return LocalImageGenServing(hf_model_name_or_path=flux_folder, **options).fingerprint()

    same = {
        "attention_backend": "_native_cudnn", "text_encoders": "offload", "prompt_cache_mb": 0, "threads": 2,
        "vae_slicing": True, "compile": "full",
    }  # fmt: skip
    assert of(**same) == of(attention_backend="auto", vae_slicing="auto") == of()
    others = [{"quantization": "auto"}, {"vae_tiling": "auto"}, {"attention_backend": "sage_hub"}]
    assert len({str(of(**other)) for other in [*others, {}]}) == 4


# fp8 where it pays


@pytest.mark.parametrize(
    ("capability", "compiled", "torchao", "expected", "said"),
    [
        ((9, 0), True, True, "torchao:fp8dq", "differ in detail"),
        ((8, 9), True, True, "torchao:fp8dq", "differ in detail"),
        ((9, 0), False, True, None, "without compile"),
        ((9, 0), True, False, None, "need torchao and a GPU"),
        ((8, 0), True, True, None, "need torchao and a GPU"),
        (None, True, True, None, "need torchao and a GPU"),
    ],
)
def test_quantization_auto(capability, compiled, torchao, expected, said, fake_runner, monkeypatch, caplog):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: object() if torchao else None)
    runner = fake_runner(None)
    runner._capability = capability
    options = diffusers_options.Options(quantization="auto", compile=compiled)
    assert runner._settled(options).quantization == expected
    assert said in caplog.text


def test_quantization_auto_changes_nothing_here(flux_folder, loaded):
    serving = loaded(flux_folder, quantization="auto")
    assert "quantization" not in run(serving, [request()])[0].provenance
    assert serving.fingerprint()["quantization"] == "auto"


# Decoding by size


def test_decoding_by_size():
    calls = []
    vae = SimpleNamespace(
        **{name: lambda name=name: calls.append(name) for name in
           ("enable_slicing", "disable_slicing", "enable_tiling", "disable_tiling")}
    )  # fmt: skip
    pipe, auto = SimpleNamespace(vae=vae), diffusers_options.Options(vae_slicing="auto", vae_tiling="auto")
    for pixels, count in ((1024 * 1024, 4), (1024 * 1024, 5), (2048 * 2048, 1), (0, 8)):
        diffusers_options.size_decoding(pipe, auto, pixels, count)
    assert calls == [
        *("disable_slicing", "disable_tiling", "enable_slicing", "disable_tiling"),
        *("disable_slicing", "enable_tiling", "disable_slicing", "disable_tiling"),
    ]
    calls.clear()
    diffusers_options.size_decoding(pipe, diffusers_options.Options(vae_slicing=True), 2048 * 2048, 8)
    diffusers_options.size_decoding(SimpleNamespace(vae=object()), auto, 2048 * 2048, 8)
    assert calls == []


# Threads


def test_threads_are_set_while_the_model_is_loaded(flux_folder):
    before = torch.get_num_threads()
    serving = LocalImageGenServing(hf_model_name_or_path=flux_folder, threads=before + 1)
    serving.setup()
    seen = []
    serving.runner.pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    run(serving, [request()])
    assert set(seen) == {before + 1}
    serving.cleanup()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"prompt_cache_mb": -1}, {"text_encoders": "drop"},
                                   {"vae_slicing": "yes"}, {"vae_tiling": 3}])  # fmt: skip
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LocalImageGenServing(**wrong)


# The pipeline is not held up


def test_generation_is_not_held_up_by_saving_and_waits_where_memory_would_grow(flux_folder, loaded, job, monkeypatch):
    """Twelve batches; making one takes 0.1 s, saving one 0.08 s and once 0.5 s: the pipeline waits only then."""
    make, save, count = 0.1, 0.08, 12
    store = ImageIO(job.folder / "images", durable=False)
    serving = LocalImageGenServing(store, 1, flux_folder)
    spans, waiting, most = [], set(), []
    original = diffusers_runner.Runner._call

    def call(self, seeds, arguments):
        started = time.perf_counter()
        output = original(self, seeds, arguments)
        time.sleep(max(0.0, make - (time.perf_counter() - started)))
        spans.append((started, time.perf_counter()))
        waiting.add(seeds[0])
        most.append(len(waiting))
        return output

    def saved(image, name, metadata):
        time.sleep(0.5 if len(spans) == 4 else save)
        result = ImageIO.save(store, image, name, metadata)
        waiting.discard(metadata["seed"])
        return result

    monkeypatch.setattr(diffusers_runner.Runner, "_call", call)
    monkeypatch.setattr(store, "save", saved)
    job.prompts(*(f"prompt {number}" for number in range(count)))
    generator = Text2ImageGenerator(serving, options=RunOptions(quiet=True))
    assert generator.run(job.storage(), "prompt", "images").made == count
    pauses = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
    assert sorted(pauses)[-2] < save / 2, "saving goes on beside"
    assert max(most) <= serving.concurrency + serving.ahead + 1


def test_input_images_are_read_while_the_pipeline_is_at_work(flux_folder, loaded, picture, tmp_path, monkeypatch):
    serving = loaded(flux_folder, Image_gen_task="imageedit", image_io=ImageIO(tmp_path / "out"))
    reading, at_work = threading.Event(), threading.Event()
    original, read = diffusers_runner.Runner._call, ImageIO.read

    def call(self, seeds, arguments):
        if seeds == [1]:
            at_work.set()
            assert reading.wait(10), "the second request was not made ready beside the first"
        return original(self, seeds, arguments)

    def reads(self, path):
        if path.endswith("second.png"):
            assert at_work.wait(10)
            reading.set()
        return read(self, path)

    monkeypatch.setattr(diffusers_runner.Runner, "_call", call)
    monkeypatch.setattr(ImageIO, "read", reads)
    first, second = (request(n, images=(picture(name),)) for n, name in ((1, "first.png"), (2, "second.png")))

    async def both():
        return await asyncio.gather(serving.generate([first]), serving.generate([second]))

    assert all(result.error is None for results in asyncio.run(both()) for result in results)
