"""Named ways to make a diffusers pipeline faster or smaller, each handed to diffusers' own interface."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dataflow.errors import ConfigError, MissingExtraError
from dataflow.serving.accelerators import EXACT_ATTENTION
from dataflow.types import Task

log = logging.getLogger(__name__)

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

TORCHAO = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "fp8wo": "Float8WeightOnlyConfig",
    "fp8dq": "Float8DynamicActivationFloat8WeightConfig",
}
"""Short names of torchao's configurations; its class names work too."""

FASTEST_FP8 = "torchao:fp8dq"
"""What ``quantization="auto"`` comes to where it pays."""

SLICING_PIXELS = 4 * 1024 * 1024
"""Pixels of a batch above which ``vae_slicing="auto"`` decodes one picture at a time."""

TILING_PIXELS = 2 * 1024 * 1024
"""Pixels of a picture above which ``vae_tiling="auto"`` decodes it in tiles. A number and not what memory is left:
tiles change pixels, so that they must follow from the request alone."""

RECOMPILE_LIMIT = 64
"""Shapes that one compiled block may have; torch's own limit of 8 is less than the sizes of one model."""


def import_library(name: str) -> Any:
    """Import torch or diffusers, without a type: their lazy exports mean nothing to a type checker.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, "local", "running a model on this machine") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See :class:`~dataflow.serving.local_image_gen_serving.LocalImageGenServing` for what each one means.

    Raises:
        ConfigError: a value is not one of those that exist.
    """

    scheduler: str | None = None
    compile: bool | Literal["regional", "full"] = False
    attention_backend: str | None = None
    quantization: str | Mapping[str, Any] | None = None
    step_cache: str | None = None
    offload: Literal["model", "sequential", "group"] | None = None
    vae_slicing: bool | Literal["auto"] = "auto"
    vae_tiling: bool | Literal["auto"] = False
    channels_last: bool = False
    text_encoders: Literal["keep", "offload"] = "keep"
    prompt_cache_mb: int = 512
    threads: int | None = None

    def __post_init__(self) -> None:
        _one_of("compile", self.compile, (False, True, "regional", "full"))
        _one_of("offload", self.offload, (None, "model", "sequential", "group"))
        _one_of("vae_slicing", self.vae_slicing, (False, True, "auto"))
        _one_of("vae_tiling", self.vae_tiling, (False, True, "auto"))
        _one_of("text_encoders", self.text_encoders, ("keep", "offload"))
        _whole("prompt_cache_mb", self.prompt_cache_mb, 0)
        if self.threads is not None:
            _whole("threads", self.threads, 1)
        if self.offload is not None and self.text_encoders == "offload":
            raise ConfigError(f"offload={self.offload!r} moves the text encoders already: leave text_encoders out")
        if self.step_cache is not None:
            parse_step_cache(self.step_cache)
        if isinstance(self.quantization, str) and self.quantization != "auto":
            _split_quantization(self.quantization)

    def identity(self) -> dict[str, Any]:
        """The options that change pixels beyond rounding, as JSON; those that are off left out.

        ``quantization="auto"`` stands as such: what it came to is in each image's provenance.
        """
        exact = self.attention_backend == "auto" or self.attention_backend in EXACT_ATTENTION
        facts = {
            "scheduler": self.scheduler,
            "attention_backend": None if exact else self.attention_backend,
            "quantization": self.quantization,
            "step_cache": self.step_cache,
            "vae_tiling": self.vae_tiling,
        }
        return {name: value for name, value in facts.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the constructor of a local serving was told, checked; all that a copy of it needs.

    :class:`~dataflow.serving.local_image_gen_serving.LocalImageGenServing` says what each one means.
    """

    model: str | None
    cache_dir: str | None
    local_dir: str | None
    revision: str | None
    variant: str | None
    local_files_only: bool
    task: Task
    pipeline: str | None
    params: Mapping[str, Any]
    dtype: str
    devices: tuple[str, ...]
    lora: tuple[tuple[str, float], ...]
    strict: bool
    options: Options


def parse_step_cache(text: str) -> tuple[str, float]:
    """``first_block:0.08`` (threshold, 0 to 1) or ``taylorseer:5`` (steps between full ones, from 2).

    Raises:
        ConfigError: it is neither.
    """
    kind, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if (kind == "first_block" and 0 < value < 1) or (kind == "taylorseer" and value >= 2 and value.is_integer()):
        return kind, value
    raise ConfigError(f"step_cache must be like 'first_block:0.08' or 'taylorseer:5', got {text!r}")


def parse_devices(device: str | Sequence[str]) -> tuple[str, ...]:
    """``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:1``, or a list of those, as a tuple.

    Raises:
        ConfigError: it is something else.
    """
    names = (device,) if isinstance(device, str) else tuple(device)
    for name in names:
        if not isinstance(name, str) or not _DEVICE.fullmatch(name) or (name == "auto" and len(names) > 1):
            raise ConfigError(
                f"device must be 'auto', 'cpu', 'mps', 'cuda', 'cuda:1' or a list of those, got {device!r}"
            )
    if not names:
        raise ConfigError("device must name at least one device, got an empty list")
    return names


def parse_lora(lora: str | Sequence[str | tuple[str, float]] | None) -> tuple[tuple[str, float], ...]:
    """Adapters as (name, scale): a name alone has scale 1, ``"name@0.8"`` says it.

    Raises:
        ConfigError: an entry is none of those.
    """
    entries = [] if lora is None else [lora] if isinstance(lora, str) else list(lora)
    found = []
    for entry in entries:
        if isinstance(entry, str):
            name, at, tail = entry.rpartition("@")
            try:
                name, scale = (name, float(tail)) if at else (entry, 1.0)
            except ValueError:
                name, scale = entry, 1.0
        else:
            name, scale = entry
        if not name or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ConfigError(f"lora must be names or (name, scale) pairs, got {entry!r}")
        found.append((name, float(scale)))
    return tuple(found)


def quantization_config(quantization: str | Mapping[str, Any], denoiser: str, dtype: Any) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``; the denoiser is quantized unless a mapping says else.

    Raises:
        ConfigError: the library is missing, or does not take it.
    """
    diffusers = import_library("diffusers")
    if not isinstance(quantization, str):
        return diffusers.PipelineQuantizationConfig(**quantization)
    backend, kind = _split_quantization(quantization)
    try:
        if backend == "torchao":
            ao = importlib.import_module("torchao.quantization")
            config = diffusers.TorchAoConfig(getattr(ao, TORCHAO.get(kind, kind))())
        elif kind == "4bit":
            config = diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        else:
            config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
        return diffusers.PipelineQuantizationConfig(quant_mapping={denoiser: config})
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        library = "torchao" if backend == "torchao" else "bitsandbytes"
        raise ConfigError(f"quantization {quantization!r} needs {library}: {type(error).__name__}: {error}") from error


def place(pipe: Any, options: Options, device: str) -> None:
    """Put the pipeline on its device, whole or piece by piece as it is needed.

    Raises:
        ConfigError: offloading without an accelerator.
    """
    if options.offload is None:
        pipe.to(device)
        return
    if device == "cpu":
        raise ConfigError(
            f"offload={options.offload!r} moves weights between an accelerator and the CPU; there is none"
        )
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        torch = import_library("torch")
        pipe.enable_group_offload(
            onload_device=torch.device(device), offload_type="leaf_level", use_stream=device.startswith("cuda")
        )


def apply(pipe: Any, options: Options, *, fixed_shapes: bool = False) -> None:
    """Switch on what the options name, on a loaded pipeline. Attention is :func:`set_attention`'s.

    Args:
        pipe: it.
        options: see there.
        fixed_shapes: every shape is seen again and again, so that each is worth code of its own when compiled.

    Raises:
        ConfigError: the pipeline has no such thing.
    """
    denoiser = getattr(pipe, denoiser_name(pipe.components))
    if options.scheduler is not None:
        pipe.scheduler = _scheduler(options.scheduler).from_config(pipe.scheduler.config)
    if options.step_cache is not None:
        require(denoiser, "enable_cache", "step_cache")(_cache_config(options.step_cache))
    if options.vae_slicing is True:
        require(pipe.vae, "enable_slicing", "vae_slicing")()
    if options.vae_tiling is True:
        require(pipe.vae, "enable_tiling", "vae_tiling")()
    if options.channels_last:
        torch = import_library("torch")
        for module in (denoiser, pipe.vae):
            if all(parameter.dim() != 5 for parameter in module.parameters()):
                module.to(memory_format=torch.channels_last)
    if options.compile:
        _compile(denoiser, whole=options.compile == "full", fixed_shapes=fixed_shapes)


def _compile(denoiser: Any, *, whole: bool, fixed_shapes: bool) -> None:
    dynamo = importlib.import_module("torch._dynamo")
    limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo.config, limit, max(getattr(dynamo.config, limit), RECOMPILE_LIMIT))
    dynamic = False if fixed_shapes else None
    if whole:
        denoiser.compile(dynamic=dynamic)
        return
    try:
        require(denoiser, "compile_repeated_blocks", "compile")(dynamic=dynamic)
    except ValueError as error:
        raise ConfigError(f"compile='regional': {type(denoiser).__name__}: {error} compile='full' works") from error


def set_attention(pipe: Any, name: str) -> None:
    """Have the denoiser compute its attention with the back end of that name.

    Raises:
        ConfigError: there is none of that name, the denoiser takes none, or what it needs is not installed.
    """
    denoiser = getattr(pipe, denoiser_name(pipe.components))
    choose = require(denoiser, "set_attention_backend", "attention_backend")
    # diffusers makes the last choice the default of every model in the process, which is none of this one's business
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it calls every choice an experiment
        with dispatch.attention_backend("native"):  # puts back what was there
            choose(name)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"attention_backend {name!r}: {error}") from error
    finally:
        logger.setLevel(level)


def takes_attention(pipe: Any) -> bool:
    """Whether the denoiser can be told how to compute its attention; of older ones some say so and take no notice."""
    denoiser = getattr(pipe, denoiser_name(pipe.components))
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return hasattr(denoiser, "set_attention_backend") and any(hasattr(one, "_attention_backend") for one in processors)


def size_decoding(pipe: Any, options: Options, pixels: int, count: int) -> None:
    """Settle what ``auto`` means for decoding a batch.

    Args:
        pipe: it.
        options: see there.
        pixels: of each picture; 0 where nobody knows before.
        count: pictures in the batch.
    """
    for option, name, on in (
        (options.vae_slicing, "slicing", pixels * count > SLICING_PIXELS),
        (options.vae_tiling, "tiling", pixels > TILING_PIXELS),
    ):
        switch = getattr(getattr(pipe, "vae", None), f"{'enable' if on else 'disable'}_{name}", None)
        if option == "auto" and switch is not None:
            switch()


def denoiser_name(components: Mapping[str, Any]) -> str:
    """``transformer`` or ``unet``, whichever the pipeline has.

    Raises:
        ConfigError: it has neither.
    """
    for name in ("transformer", "unet", "prior"):
        if components.get(name) is not None:
            return name
    raise ConfigError(f"no transformer or unet among the pipeline's components ({', '.join(components)})")


def _cache_config(text: str) -> Any:
    diffusers = import_library("diffusers")
    kind, value = parse_step_cache(text)
    if kind == "first_block":
        return diffusers.FirstBlockCacheConfig(threshold=value)
    return diffusers.TaylorSeerCacheConfig(cache_interval=int(value))


def _scheduler(name: str) -> Any:
    diffusers = import_library("diffusers")
    found = getattr(diffusers, name, None)
    if found is None or not name.endswith("Scheduler"):
        raise ConfigError(
            f"scheduler must be a class of diffusers such as 'FlowMatchEulerDiscreteScheduler', got {name!r}"
        )
    return found


def require(thing: Any, method: str, option: str) -> Any:
    """A method that not every class has.

    Raises:
        ConfigError: this one has it not.
    """
    found = getattr(thing, method, None)
    if found is None:
        raise ConfigError(f"{option}: {type(thing).__name__} has no {method}() in the installed diffusers")
    return found


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _split_quantization(text: str) -> tuple[str, str]:
    backend, _, kind = text.partition(":")
    if (backend == "torchao" and (kind in TORCHAO or kind.endswith("Config"))) or (
        backend == "bnb" and kind in ("4bit", "8bit")
    ):
        return backend, kind
    raise ConfigError(
        f"quantization must be 'auto', 'torchao:' with one of {', '.join(TORCHAO)}, 'bnb:4bit', 'bnb:8bit' or a mapping"
        f" for PipelineQuantizationConfig, got {text!r}"
    )


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}, got {value!r}")
