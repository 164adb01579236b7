"""The one place that loads and calls a diffusers pipeline; torch and diffusers are imported when it is used only."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    ConfigError,
    FatalServingError,
    OutOfMemoryError,
    RefusedError,
    RetryError,
    ServingError,
)
from dataflow.serving import diffusers_options
from dataflow.serving.capabilities import NICKNAMES, near
from dataflow.serving.diffusers_options import Options, import_library
from dataflow.serving.model_files import ModelFiles

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_BROKEN_DEVICE = re.compile(r"\b(CUDA|HIP) error: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that makes a loaded pipeline.

    Attributes:
        folder: of the pipeline, complete.
        pipeline: class name in diffusers.
        components: class names of the folder's parts, by part.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: ``auto``, ``bf16``, ``fp16``, ``fp32``.
        variant: of the weight files.
        lora: adapters with their scales.
        cache_dir: the Hub's cache, for adapters from there.
        options: see there.
        floats: the class can return pictures as floats.
        strict: deterministic kernels only.
    """

    folder: Path
    pipeline: str
    components: Mapping[str, str]
    device: str
    dtype: str
    variant: str | None
    lora: Sequence[tuple[ModelFiles, float]]
    cache_dir: str | None
    options: Options
    floats: bool
    strict: bool


class Runner:
    """A loaded pipeline. Not thread-safe: call it from one thread.

    Attributes:
        provenance: device, dtype, classes and versions, as JSON.

    Raises:
        ConfigError: the pipeline, or a library it needs, cannot be used like this.
        FatalServingError: it does not load.
    """

    provenance: Mapping[str, Any]

    def __init__(self, recipe: Recipe) -> None:
        self._torch, self._diffusers = import_library("torch"), import_library("diffusers")
        self._recipe = recipe
        self._device = choose_device(self._torch, recipe.device)
        dtype = choose_dtype(self._torch, recipe.dtype, self._device, recipe.pipeline)
        log.info("loading %s from %s onto %s as %s", recipe.pipeline, recipe.folder, self._device, dtype)
        self._pipe: Any = self._guarded(lambda: self._load(dtype), loading=True)
        self._once = _OncePerMessage()
        logging.getLogger(type(self._pipe).__module__).addFilter(self._once)
        self._restore = _be_deterministic(self._torch) if recipe.strict else None
        self.provenance = {
            "device": _device_name(self._torch, self._device),
            "dtype": str(dtype).removeprefix("torch."),
            "pipeline": recipe.pipeline,
            "scheduler": type(getattr(self._pipe, "scheduler", None)).__name__,
            "torch": self._torch.__version__,
            "diffusers": self._diffusers.__version__,
        }

    def run(self, seeds: Sequence[int], arguments: Mapping[str, Any]) -> list[Image.Image | ServingError]:
        """Call the pipeline once; one picture, or what is wrong with it, per seed.

        Args:
            seeds: one per image, each for a generator of its own.
            arguments: the pipeline's call arguments.

        Raises:
            OutOfMemoryError: the batch did not fit; the device's cache is emptied.
            FatalServingError: the device is broken.
            RetryError: the pipeline failed otherwise; its words are in the message.
            BadOutputError: the pipeline did not answer with one picture per seed.
        """
        # on the CPU, because its numbers are the same on every machine
        generators = [self._torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        output = self._guarded(
            lambda: self._pipe(
                **arguments,
                generator=generators if len(seeds) > 1 else generators[0],
                output_type="np" if self._recipe.floats else "pil",
            )
        )
        pictures = next(
            (found for name in ("images", "image") if (found := getattr(output, name, None)) is not None), None
        )
        if pictures is None or len(pictures) != len(seeds):
            found = "nothing" if pictures is None else str(len(pictures))
            raise BadOutputError(f"{self._recipe.pipeline} was asked for {len(seeds)} images and returned {found}")
        flags = getattr(output, "nsfw_content_detected", None)
        refused = flags if isinstance(flags, Sequence) and len(flags) == len(seeds) else [False] * len(seeds)
        return [
            RefusedError("the model's safety checker found the image unsafe") if flag else _checked(picture)
            for picture, flag in zip(pictures, refused, strict=True)
        ]

    def close(self) -> None:
        """Free the weights."""
        logging.getLogger(type(self._pipe).__module__).removeFilter(self._once)
        if self._restore is not None:
            self._restore()
        if self._recipe.options.offload:
            self._pipe.remove_all_hooks()
        self._pipe = None
        if self._recipe.options.compile:
            self._torch.compiler.reset()
        self._empty_cache()

    def _load(self, dtype: Any) -> Any:
        recipe = self._recipe
        arguments: dict[str, Any] = {_dtype_name(self._diffusers): dtype, "local_files_only": True}
        if recipe.variant:
            arguments["variant"] = recipe.variant
        if recipe.options.quantization:
            denoiser = diffusers_options.denoiser_name(recipe.components)
            arguments["quantization_config"] = diffusers_options.quantization_config(
                recipe.options.quantization, denoiser, dtype
            )
        with _no_bars():
            pipe = pipeline_type(recipe.pipeline).from_pretrained(str(recipe.folder), **arguments)
            self._load_adapters(pipe)
        diffusers_options.place(pipe, recipe.options, self._device)
        diffusers_options.apply(pipe, recipe.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _load_adapters(self, pipe: Any) -> None:
        if not self._recipe.lora:
            return
        load = diffusers_options.require(pipe, "load_lora_weights", "lora")
        names = []
        for number, (files, _) in enumerate(self._recipe.lora):
            names.append(f"lora{number}")
            if files.hub:
                where = {
                    "revision": files.revision,
                    "cache_dir": self._recipe.cache_dir,
                    "local_files_only": files.offline,
                }
                load(files.name, adapter_name=names[-1], **where)
            else:
                assert files.folder is not None
                file = files.folder if files.folder.is_file() else _only_safetensors(files.folder)
                load(str(file.parent), weight_name=file.name, adapter_name=names[-1], local_files_only=True)
        pipe.set_adapters(names, [scale for _, scale in self._recipe.lora])

    def _guarded(self, work: Callable[[], Any], *, loading: bool = False) -> Any:
        """Run ``work``; whatever it raises becomes an error of ours, which holds no tensors alive."""
        try:
            return work()
        except (ConfigError, ServingError):
            raise
        except Exception as error:  # a pipeline is foreign code and may raise anything
            log.debug("the pipeline failed", exc_info=True)
            failure = _translated(self._torch, error, self._recipe, loading=loading)
        # outside the handler: its frames, and with them the tensors of the failed call, are gone now
        self._empty_cache()
        raise failure

    def _empty_cache(self) -> None:
        gc.collect()
        if self._device.startswith("cuda"):
            self._torch.cuda.empty_cache()
        elif self._device == "mps":
            self._torch.mps.empty_cache()


def pipeline_type(name: str) -> Any:
    """A pipeline class of the installed diffusers.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    diffusers = import_library("diffusers")
    try:
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{name} cannot be imported from diffusers: {error}") from error
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        names = {*NICKNAMES, *(entry for entry in dir(diffusers) if entry.endswith("Pipeline"))}
        raise ConfigError(f"diffusers {diffusers.__version__} has no pipeline {name!r}{near(name, names)}")
    return found


def call_parameters(name: str) -> frozenset[str]:
    """Names of the call arguments of a pipeline class.

    Raises:
        ConfigError: there is no such class.
    """
    return frozenset(inspect.signature(pipeline_type(name).__call__).parameters) - {"self"}


def cuda_devices() -> list[str]:
    """``cuda:0`` and so on, for every CUDA device torch can use."""
    torch = import_library("torch")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def choose_device(torch: Any, wanted: str) -> str:
    """The device to use; ``auto`` prefers CUDA to MPS to the CPU.

    Raises:
        ConfigError: the wanted device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        count = torch.cuda.device_count() if cuda else 0
        if number >= count:
            raise ConfigError(f"device {wanted!r} is not there: torch {torch.__version__} sees {count} CUDA devices")
        return f"cuda:{number}"
    if wanted == "mps" and not mps:
        raise ConfigError(f"device 'mps' is not there: torch {torch.__version__} has no Metal device")
    return wanted


def choose_dtype(torch: Any, wanted: str, device: str, pipeline: str) -> Any:
    """The torch dtype to compute in; ``auto`` is bf16 on a GPU (fp16 on one without it) and fp32 on the CPU."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device == "cpu":
        return torch.float32
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("%s does not compute in bf16, using fp16", device)
        if pipeline.startswith("Flux"):
            log.warning(
                "%s may overflow in fp16 (black images are reported as failures); dtype='fp32' is safe", pipeline
            )
        return torch.float16
    return torch.bfloat16


def _translated(torch: Any, error: Exception, recipe: Recipe, *, loading: bool) -> ConfigError | ServingError:
    text = f"{type(error).__name__}: {str(error)[:2000]}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))
    ):
        if loading:
            return FatalServingError(
                f"{recipe.pipeline} does not fit on {recipe.device}: {text}. offload='model' or a quantization may help"
            )
        return OutOfMemoryError(text)
    if isinstance(error, ImportError):
        return ConfigError(f"{recipe.pipeline} needs a library that is not installed: {text}")
    if loading:
        return FatalServingError(f"{recipe.folder} does not load as {recipe.pipeline}: {text}")
    if isinstance(error, RuntimeError) and _BROKEN_DEVICE.search(str(error)):
        # after such an error every later call fails too; only a new process helps
        return FatalServingError(f"the device is broken until the process ends: {text}", reason="device_error")
    return RetryError(f"{recipe.pipeline} failed: {text}", reason="pipeline_error")


def _checked(picture: Any) -> Image.Image | BadOutputError:
    """A picture as Pillow's, or the reason why it is none."""
    if isinstance(picture, Image.Image):
        image = picture
    else:
        values = np.asarray(picture)
        if not np.isfinite(values).all():
            return BadOutputError("the model computed NaN; another dtype (bf16, fp32) may help", reason="nan")
        pixels = (values * 255).round().astype("uint8")
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if not any(high for _, high in _extrema(image)):
        return BadOutputError("the model made a wholly black image", reason="black")
    return image


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    found: Any = image.convert("RGB").getextrema()
    return list(found)


def _device_name(torch: Any, device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _dtype_name(diffusers: Any) -> str:
    """``dtype``, or ``torch_dtype`` before diffusers took over the new name (an unknown one is ignored silently)."""
    deprecations = importlib.import_module("diffusers.utils.deprecation_utils")
    renamed = int(diffusers.__version__.partition(".")[0]) >= 1 or hasattr(deprecations, "_resolve_dtype")
    return "dtype" if renamed else "torch_dtype"


def _only_safetensors(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ConfigError(f"{folder} holds {len(files)} .safetensors files; name the LoRA's file itself")
    return files[0]


def _be_deterministic(torch: Any) -> Callable[[], None]:
    """Choose deterministic kernels where there are any; returns what undoes it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False

    def restore() -> None:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark

    return restore


class _no_bars:  # noqa: N801 - reads as a statement
    """Loading draws two progress bars over ours."""

    def __enter__(self) -> None:
        loggers = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
        self._shown = [logger for logger in loggers if logger.is_progress_bar_enabled()]
        for logger in self._shown:
            logger.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        for logger in self._shown:
            logger.enable_progress_bar()


class _OncePerMessage(logging.Filter):
    """Lets every kind of a pipeline's messages through once, and short: else a truncated prompt is quoted each time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if len(text) > 300:
            record.msg = text[:300] + "…"
        kind = text[:80]
        new = kind not in self._seen
        self._seen.add(kind)
        return new
