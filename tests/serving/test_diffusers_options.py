import asyncio
import logging
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dataflow.errors import ConfigError, FatalServingError
from dataflow.serving import diffusers_options, model_files
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


def test_loras_of_the_hub_are_loaded_at_their_commit(fake_runner):
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
        diffusers_options.set_attention(pipe, "native")
    with pytest.raises(ConfigError, match="no transformer or unet"):
        diffusers_options.denoiser_name({"vae": 1})


def test_closing_undoes_hooks_and_compilation(monkeypatch, fake_runner):
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
