import asyncio
import shutil
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    ConfigError,
    DataflowError,
    FatalServingError,
    MissingExtraError,
    OutOfMemoryError,
    RefusedError,
    RetryError,
)
from dataflow.serving import diffusers_runner
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def request(number=0, prompt="a red circle", **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=more.pop("seed", number), **more)


def run(serving, requests):
    return asyncio.run(serving.generate(requests))


OOM = "out_of_memory"
GREY = Image.new("RGB", (8, 8), "grey")


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
def test_what_a_pipeline_raises(error, expected, reason, fake_runner):
    def pipe(**arguments):
        raise error

    with pytest.raises(DataflowError) as caught:
        fake_runner(pipe).run([1, 2], {})
    found = caught.value
    assert type(found) is expected
    assert getattr(found, "reason", None) == reason
    assert type(error).__name__ in str(found)
    assert str(error) in str(found)


def test_errors_hold_no_tensors_alive(fake_runner):
    references = []

    def pipe(**arguments):
        tensor = torch.zeros(4)
        references.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError) as caught:
        fake_runner(pipe).run([1], {})
    assert references[0]() is None
    assert caught.value.__context__ is None


@pytest.fixture
def answers(fake_runner):
    """What becomes of a pipeline's answer to two seeds."""

    def ask(**output):
        if isinstance(images := output.get("images"), np.ndarray):
            output["images"] = torch.from_numpy(images).permute(0, 3, 1, 2)
        runner = fake_runner(lambda **arguments: SimpleNamespace(**output))
        return runner.finish(*runner.run([1, 2], {}))[0]

    return ask


def test_nan_and_black_pictures_are_failures_of_their_own(answers):
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
        serving.runner.pipe.transformer.proj_out.weight.fill_(float("nan"))
    (result,) = run(serving, [request()])
    assert isinstance(result.error, BadOutputError)
    assert result.error.reason == "nan"


def test_refusals(answers):
    images = np.full((2, 8, 8, 3), 0.5)
    first, second = answers(images=images, nsfw_content_detected=[True, False])
    assert isinstance(first, RefusedError)
    assert isinstance(second, Image.Image)
    assert all(isinstance(picture, Image.Image) for picture in answers(images=images, nsfw_content_detected=None))


@pytest.mark.parametrize(
    ("output", "found"), [({"images": [GREY]}, "1"), ({"images": []}, "0"), ({"frames": [GREY]}, "nothing")]
)
def test_wrong_numbers_of_pictures(output, found, answers):
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


def test_accelerator_caches_are_emptied(monkeypatch, fake_runner):
    emptied = []
    for device in ("cuda:0", "mps", "cpu"):
        runner = fake_runner(None)
        runner._torch, runner.device = fake_torch(cuda=1), device
        runner._torch.cuda.empty_cache = lambda device=device: emptied.append(device)
        runner._torch.mps.empty_cache = lambda device=device: emptied.append(device)
        runner._empty_cache()
    assert emptied == ["cuda:0", "mps"]
    assert diffusers_runner._device_name(fake_torch(cuda=1), "cuda:0") == "cuda:0 (GPU)"


def test_old_diffusers_know_another_name_for_the_dtype():
    assert diffusers_runner._dtype_name(diffusers) == "dtype"
    assert diffusers_runner._dtype_name(SimpleNamespace(__version__="1.2.0")) == "dtype"
