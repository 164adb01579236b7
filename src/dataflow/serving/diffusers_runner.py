"""The one place that loads and calls a diffusers pipeline; torch and diffusers are imported when it is used only."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import logging
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflow.errors import (
    ConfigError,
    FatalServingError,
    OutOfMemoryError,
    RetryError,
    ServingError,
)
from dataflow.serving import accelerators, diffusers_options
from dataflow.serving.capabilities import NICKNAMES, Capabilities, Size, near
from dataflow.serving.diffusers_call import warm_up_arguments
from dataflow.serving.diffusers_options import Options, import_library
from dataflow.serving.diffusers_pictures import Pending, collect
from dataflow.serving.model_files import ModelFiles
from dataflow.serving.prompt_embeddings import ParkedEncoders, PromptCache

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
        capabilities: of the pipeline's class.
        components: class names of the folder's parts, by part.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: ``auto``, ``bf16``, ``fp16``, ``fp32``.
        variant: of the weight files.
        lora: adapters with their scales.
        cache_dir: the Hub's cache, for adapters from there.
        options: see there.
        strict: deterministic kernels only.
    """

    folder: Path
    capabilities: Capabilities
    components: Mapping[str, str]
    device: str
    dtype: str
    variant: str | None
    lora: Sequence[tuple[ModelFiles, float]]
    cache_dir: str | None
    options: Options
    strict: bool

    @property
    def pipeline(self) -> str:
        """Class name in diffusers."""
        return self.capabilities.name


class Runner:
    """A loaded pipeline. Not thread-safe: call it from one thread; only :meth:`finish` may run in another.

    Attributes:
        device: where it is.
        prompts: the prompts that were encoded; None where the pipeline sees to it itself.
        warm_up_seconds: time that went into compiling and warming up, so far.

    Raises:
        ConfigError: the pipeline, or a library it needs, cannot be used like this.
        FatalServingError: it does not load.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._torch, self._diffusers = import_library("torch"), import_library("diffusers")
        self.device = choose_device(self._torch, recipe.device)
        self._capability = accelerators.compute_capability(self._torch, self.device)
        self._recipe = recipe = replace(recipe, options=self._settled(recipe.options))
        dtype = choose_dtype(self._torch, recipe.dtype, self.device, recipe.pipeline)
        self._threads = self._torch.get_num_threads()
        if recipe.options.threads is not None:
            self._torch.set_num_threads(recipe.options.threads)
        self.prompts: PromptCache | None = None
        self.warm_up_seconds = 0.0
        self._warm: set[Hashable] = set()
        self._attention: list[str] = []
        self._free_at = 0.0
        log.info("loading %s from %s onto %s as %s", recipe.pipeline, recipe.folder, self.device, dtype)
        self.pipe: Any = self._guarded(lambda: self._load(dtype), loading=True)
        self._once = _OncePerMessage()
        logging.getLogger(type(self.pipe).__module__).addFilter(self._once)
        self._restore = accelerators.be_deterministic(self._torch) if recipe.strict else None
        self._facts = {
            "device": _device_name(self._torch, self.device),
            "dtype": str(dtype).removeprefix("torch."),
            "pipeline": recipe.pipeline,
            "scheduler": type(getattr(self.pipe, "scheduler", None)).__name__,
            "torch": self._torch.__version__,
            "diffusers": self._diffusers.__version__,
        }

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Device, dtype, classes and versions, and what ``auto`` came to, as JSON."""
        options = self._recipe.options
        chosen = {
            "attention": self._attention[0] if self._attention else None,
            "compile": "regional" if options.compile is True else options.compile or None,
            "quantization": str(options.quantization) if options.quantization else None,
        }
        return {**self._facts, **{name: value for name, value in chosen.items() if value}}

    def run(
        self, seeds: Sequence[int], arguments: Mapping[str, Any], *, shape: Hashable = None, size: Size | None = None
    ) -> tuple[Pending, float]:
        """Call the pipeline once.

        Args:
            seeds: one per image, each for a generator of its own.
            arguments: the pipeline's call arguments.
            shape: equal for calls whose tensors have equal shapes; a compiled pipeline is warmed up once for each.
            size: of the pictures, where it is known before.

        Returns:
            The pictures, for :meth:`finish`, and when the call began.

        Raises:
            OutOfMemoryError: the batch did not fit; the device's cache is emptied.
            FatalServingError: the device is broken.
            RetryError: the pipeline failed otherwise; its words are in the message.
            BadOutputError: the pipeline did not answer with one picture per seed.
        """
        diffusers_options.size_decoding(self.pipe, self._recipe.options, size[0] * size[1] if size else 0, len(seeds))
        if self._recipe.options.compile and shape not in self._warm:
            self._warm_up(seeds, arguments, size)
            self._warm.add(shape)
        started = time.perf_counter()
        output = self._guarded(lambda: self._call(seeds, arguments))
        return self._guarded(lambda: collect(output, len(seeds), self._recipe.pipeline)), started

    def finish(self, pending: Pending, started: float) -> tuple[list[Any], float]:
        """Wait for the pictures of a call, and how long the device was at work on them, in seconds.

        Calls must be finished in the order in which they were made.

        Raises:
            FatalServingError: the device is broken.
        """
        ended = self._guarded(pending.wait)
        seconds = ended - max(started, self._free_at)
        self._free_at = ended
        return pending.results(), seconds

    def _call(self, seeds: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        while True:
            # on the CPU, because its numbers are the same on every machine
            generators = [self._torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            try:
                output = self.pipe(
                    **arguments,
                    generator=generators if len(seeds) > 1 else generators[0],
                    output_type="pt" if self._recipe.capabilities.floats else "pil",
                )
                del self._attention[1:]  # it works: what fails later has another reason
                return output
            except Exception as error:
                if len(self._attention) < 2 or isinstance(
                    _translated(self._torch, error, self._recipe, loading=False), OutOfMemoryError | FatalServingError
                ):
                    raise
                failed = self._attention.pop(0)
                log.warning(
                    "attention %s does not work with %s (%s: %s): using %s",
                    *(failed, self._recipe.pipeline, type(error).__name__, str(error)[:300], self._attention[0]),
                )
            diffusers_options.set_attention(self.pipe, self._attention[0])

    def drop(self, seeds: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Call the pipeline, wait, and drop the pictures. Raises as :meth:`run` does."""
        self._guarded(lambda: collect(self._call(seeds, arguments), len(seeds), self._recipe.pipeline).wait())

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[None]:
        """With torch's own attention, whichever was chosen, for as long as this lasts."""
        if self._attention:
            diffusers_options.set_attention(self.pipe, "native")
        try:
            yield
        finally:
            if self._attention:
                diffusers_options.set_attention(self.pipe, self._attention[0])

    def _warm_up(self, seeds: Sequence[int], arguments: Mapping[str, Any], size: Size | None) -> None:
        """Have everything compiled that a call of this shape needs, in as few steps as there may be."""
        started = time.perf_counter()
        self.drop(seeds, warm_up_arguments(arguments))
        seconds = time.perf_counter() - started
        self.warm_up_seconds += seconds
        log.info(
            "compiled and warmed up for %s × %d in %.1f s, which no image's time holds",
            *("the model's own size" if size is None else f"{size[0]}×{size[1]}", len(seeds), seconds),
        )

    def close(self) -> None:
        """Free the weights."""
        logging.getLogger(type(self.pipe).__module__).removeFilter(self._once)
        if self._restore is not None:
            self._restore()
        if self._recipe.options.offload:
            self.pipe.remove_all_hooks()
        self.pipe = self.prompts = None
        if self._recipe.options.threads is not None:
            self._torch.set_num_threads(self._threads)
        if self._recipe.options.compile:
            self._torch.compiler.reset()
        self._empty_cache()

    def _settled(self, options: Options) -> Options:
        """The options with ``quantization="auto"`` settled, which is where it pays: eight-bit floats, compiled."""
        if options.quantization != "auto":
            return options
        if not accelerators.has_fp8(self._capability):
            log.warning(
                "quantization='auto': none, the weights stay as they are: eight-bit floats need torchao and a GPU that"
                " multiplies them (Ada, Hopper and later)"
            )
            return replace(options, quantization=None)
        if not options.compile:
            log.warning(
                "quantization='auto': none, the weights stay as they are: without compile eight-bit floats are slower"
            )
            return replace(options, quantization=None)
        log.warning(
            "quantization='auto': %s, about a third faster; the pictures differ in detail from those in full precision",
            diffusers_options.FASTEST_FP8,
        )
        return replace(options, quantization=diffusers_options.FASTEST_FP8)

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
        self._cache_prompts(pipe)
        diffusers_options.place(pipe, recipe.options, self.device)
        diffusers_options.apply(pipe, recipe.options, fixed_shapes=recipe.capabilities.fixed_text)
        self._choose_attention(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _cache_prompts(self, pipe: Any) -> None:
        options, layout = self._recipe.options, self._recipe.capabilities.encoding
        away = options.text_encoders == "offload"
        if away and self.device == "cpu":
            raise ConfigError("text_encoders='offload' moves them between an accelerator and the CPU; there is none")
        if away and not (layout and options.prompt_cache_mb):
            needs = "prompt_cache_mb above 0" if layout else "a family whose prompts can be encoded apart"
            raise ConfigError(f"text_encoders='offload' needs {needs}: {self._recipe.pipeline}; offload='model' works")
        if not layout or not options.prompt_cache_mb:
            return
        more = {"encoders": ParkedEncoders(pipe, self.device).on_device} if away else {}
        limit = options.prompt_cache_mb * 1024 * 1024
        self.prompts = PromptCache(pipe.encode_prompt, layout, limit=limit, device=self.device, **more)
        pipe.encode_prompt = self.prompts

    def _choose_attention(self, pipe: Any) -> None:
        wanted = self._recipe.options.attention_backend
        if wanted is None:
            return
        if wanted != "auto":
            diffusers_options.set_attention(pipe, wanted)
            self._attention = [wanted]
            return
        if not diffusers_options.takes_attention(pipe):
            log.info("attention_backend='auto': %s has its own", self._recipe.pipeline)
            return
        names = accelerators.attention_candidates(self._capability)
        for number, name in enumerate(names):
            try:
                diffusers_options.set_attention(pipe, name)
            except ConfigError as error:
                log.warning("%s", error)
                continue
            self._attention = list(names[number:])
            log.info("attention: %s", name)
            return

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
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()
        elif self.device == "mps":
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
