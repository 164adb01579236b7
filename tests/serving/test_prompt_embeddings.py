import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from dataflow.errors import ConfigError
from dataflow.serving.capabilities import TABLE
from dataflow.serving.prompt_embeddings import ParkedEncoders, PromptCache
from dataflow.types import GenerationRequest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a red circle", "the blue square on white", "a red circle", ""]


def request(number=0, prompt="a red circle", **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=more.pop("seed", number), **more)


def run(serving, requests):
    return asyncio.run(serving.generate(requests))


def pixels(result):
    assert result.error is None, result.error
    (image,) = result.images
    return np.asarray(image)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, flux_folder, sd_folder):
    from tests.serving import tiny_pipelines

    made = {"flux": flux_folder, "kontext": flux_folder, "sd": sd_folder}

    def folder(family):
        if family not in made:
            made[family] = tiny_pipelines.save(family, tmp_path_factory.mktemp("models"))
        return made[family]

    return folder


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

FAMILIES = ("flux", "kontext", "sd", "sdxl", "sd3", "sana", "qwen")


@pytest.fixture
def family(family_folder, loaded, picture):
    """Sets up a serving of a family, and makes the requests for prompts."""

    def load(name, **options):
        arguments = {"diffuser_num_inference_steps": 2, "batch_size": 8, **options}
        if name == "kontext":
            arguments |= {"Image_gen_task": "imageedit"}
        elif name != "flux":
            arguments |= {"diffuser_image_height": 32, "diffuser_image_width": 32}
        if name in ("sd3", "sana", "qwen"):
            binning = {"use_resolution_binning": False} if name == "sana" else {}
            arguments["pipeline_kwargs"] = {"max_sequence_length": 16, **binning}
        return loaded(family_folder(name), **arguments)

    def requests(name, prompts=PROMPTS, **more):
        images = (picture(),) if name == "kontext" else ()
        return [request(number, prompt, images=images, **more) for number, prompt in enumerate(prompts)]

    return SimpleNamespace(load=load, requests=requests)


def forwards(serving):
    """Counts, by encoder, how often the text encoders are at work from now on."""
    counts = {}
    for name, module in serving.runner.pipe.components.items():
        if name.startswith("text_encoder") and module is not None:
            counts[name] = 0

            def count(*_, name=name):
                counts[name] += 1

            module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guided", [False, True])
def test_the_same_picture_as_without(name, guided, family):
    """Bitwise where the same prompts are encoded together; a product with fewer rows may round in another way."""
    params = {"true_cfg_scale" if name in ("flux", "kontext", "qwen") else "guidance_scale": 4.0 if guided else 1.0}
    more = {"negative_prompt": "blue", "params": params} if guided else {"params": params}
    requests = family.requests(name, ["a red circle", "the blue square on white", ""], **more)
    plain = [pixels(result) for result in run(family.load(name, prompt_cache_mb=0), requests)]
    serving = family.load(name)
    assert TABLE[serving.runner.provenance["pipeline"]].encoding
    counts = forwards(serving)
    for expected in (plain, plain):
        assert all((pixels(a) == b).all() for a, b in zip(run(serving, requests), expected, strict=True))
        first = dict(counts)
    assert counts == first, "known prompts are not encoded again"
    fresh = family.load(name)
    run(fresh, requests[:1])
    for result, expected in zip(run(fresh, [*requests, requests[0]]), [*plain, plain[0]], strict=True):
        assert np.abs(pixels(result).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_the_pipelines_own(name, family):
    serving = family.load(name)
    cache, pipe = serving.runner.prompts, serving.runner.pipe
    more = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    if name == "sd":
        more = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}

    def inline(prompts):
        return type(pipe).encode_prompt(pipe, prompt=prompts, **more)

    with torch.no_grad():
        for prompts, exact in ((PROMPTS[:2], True), ("red", True), (PROMPTS, False), (["red", PROMPTS[0]], False)):
            for ours, theirs in zip(cache(prompt=prompts, **more), inline(prompts), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert ours.dtype == theirs.dtype
                    torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if exact else {}))
    assert (cache.encoded, cache.found) == (4, 5)
    assert not torch.equal(cache(prompt="red", **more)[0], cache(prompt="blue", **more)[0])


def test_one_call_encodes_what_is_new(family):
    serving = family.load("flux")
    counts = forwards(serving)
    run(serving, family.requests("flux"))
    assert counts == {"text_encoder": 1, "text_encoder_2": 1}
    assert serving.runner.prompts.encoded == 3
    run(serving, family.requests("flux", ["a red circle"] * 3))
    assert counts == {"text_encoder": 1, "text_encoder_2": 1}
    run(serving, family.requests("flux", params={"max_sequence_length": 8}))
    assert counts == {"text_encoder": 2, "text_encoder_2": 2}, "another length is another embedding"


def test_without_a_cache_and_for_unknown_families_the_pipeline_sees_to_it(family, pix2pix_folder, loaded):
    assert family.load("flux", prompt_cache_mb=0).runner.prompts is None
    assert loaded(pix2pix_folder, Image_gen_task="imageedit").runner.prompts is None


def fake_encode(calls):
    """A row of eight floats (32 bytes) per prompt: its length."""

    def encode_prompt(prompt, prompt_2=None, num_images_per_prompt=1, prompt_embeds=None, max_sequence_length=16):
        calls.append(prompt)
        rows = [prompt] if isinstance(prompt, str) else prompt
        return torch.tensor([[float(len(row))] * 8 for row in rows]), None

    return encode_prompt


def test_what_was_not_used_longest_goes_first():
    calls = []
    cache = PromptCache(fake_encode(calls), ("rows", "rows"), limit=64, device="cpu")
    for prompt in ("a", "bb", "a", "ccc"):
        assert cache(prompt=prompt)[0][0, 0] == len(prompt)
    assert calls == [["a"], ["bb"], ["ccc"]]
    cache(prompt=["a", "ccc"])
    assert len(calls) == 3
    cache(prompt=["bb", "a", "bb"])
    assert calls[3:] == [["bb"]]
    assert cache._bytes == 64
    small = PromptCache(fake_encode(calls), ("rows", "rows"), limit=31, device="cpu")
    assert [small(prompt="a")[1] for _ in range(2)] == [None, None]
    assert small._bytes == 0
    assert small.encoded == 2


def test_calls_with_more_to_them_are_left_to_the_pipeline():
    calls = []
    cache = PromptCache(fake_encode(calls), ("rows", "rows"), limit=1000, device="cpu")
    for more in ({"prompt_2": "x"}, {"num_images_per_prompt": 2}, {"prompt_embeds": torch.zeros(1)}):
        for _ in range(2):
            cache(prompt="a", **more)
    assert calls == ["a"] * 6
    cache(prompt="a", max_sequence_length=8)
    cache(prompt="a")
    assert calls[6:] == [["a"], ["a"]]


def test_a_diffusers_that_returns_something_else_is_told():
    cache = PromptCache(fake_encode([]), ("rows",), limit=1000, device="cpu")
    with pytest.raises(ConfigError, match="returns 2 values, not 1: prompt_cache_mb=0"):
        cache(prompt="a")


# Encoders that leave the device


@pytest.mark.parametrize("name", FAMILIES)
def test_parked_encoders_come_back_for_new_prompts_only(name, family):
    requests = family.requests(name)
    plain = [pixels(result) for result in run(family.load(name), requests)]
    serving = family.load(name)
    pipe = serving.runner.pipe
    encoders = {key: part for key, part in pipe.components.items() if key.startswith("text_encoder")}
    parked = ParkedEncoders(pipe, "cpu")
    stays = {key: next(part.parameters()).data_ptr() for key, part in encoders.items()}
    seen = []

    def watch(*_):
        seen.append(all(next(part.parameters()).data_ptr() != stays[key] for key, part in encoders.items()))

    next(iter(encoders.values())).register_forward_pre_hook(watch)
    serving.runner.prompts._encoders = parked.on_device
    for _ in range(2):
        assert all((pixels(a) == b).all() for a, b in zip(run(serving, requests), plain, strict=True))
        assert all(getattr(pipe, key) is None for key in encoders)
        assert {key: next(part.parameters()).data_ptr() for key, part in encoders.items()} == stays
    assert seen
    assert all(seen), "a copy of the weights encodes, what lies in main memory stays there"
    count = len(seen)
    run(serving, family.requests(name, ["green"]))
    assert len(seen) > count


def test_encoders_are_parked_again_after_a_failure(family):
    serving = family.load("flux")
    pipe = serving.runner.pipe
    parked = ParkedEncoders(pipe, "cpu")
    with pytest.raises(RuntimeError, match="broken"), parked.on_device():
        raise RuntimeError("broken")
    assert pipe.text_encoder is None
    with parked.on_device():
        assert pipe.text_encoder_2 is not None


def test_where_encoders_cannot_leave(family, pix2pix_folder, loaded):
    with pytest.raises(ConfigError, match="there is none"):
        family.load("flux", text_encoders="offload", device="cpu")
    with pytest.raises(ConfigError, match="leave text_encoders out"):
        family.load("flux", text_encoders="offload", offload="model")
    pipe = family.load("flux").runner.pipe
    pipe.text_encoder.is_quantized = True
    with pytest.raises(ConfigError, match="text_encoder is quantized"):
        ParkedEncoders(pipe, "cpu")
