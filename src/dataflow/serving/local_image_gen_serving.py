"""Images from a diffusers pipeline on this machine: :class:`LocalImageGenServing`.

Determinism. Every image has a generator of its own on the CPU, seeded with the request's seed: its initial noise does
not depend on neighbours, order, device or worker. The rest of the arithmetic does, within rounding: matrix products of
one row and of many are computed differently (one or two of 255 levels in a few pixels). ``determinism="strict"`` gives
every image a call of its own and deterministic kernels: bitwise the same on the same machine and versions. A step cache
by first block decides for a whole batch, so that neighbours change pixels visibly: use it with batch_size=1.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from dataflow.errors import (
    BadRequestError,
    ConfigError,
    FatalServingError,
    ImageError,
    MissingExtraError,
    ServingError,
)
from dataflow.io import ImageIO
from dataflow.serving import capabilities as can
from dataflow.serving import diffusers_runner, model_files
from dataflow.serving.capabilities import Capabilities
from dataflow.serving.diffusers_call import Facts, Job, call_arguments, effective, shared_key
from dataflow.serving.diffusers_options import Options, parse_devices, parse_lora
from dataflow.serving.model_files import ModelFiles
from dataflow.serving.transformers_model import gpus_of_copy
from dataflow.types import GenerationRequest, GenerationResult, ImageStore, Serving, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the constructor was told, checked; all a copy of the serving needs."""

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


class LocalImageGenServing(Serving):
    """Text to image and image editing with any diffusers pipeline. Constructing it loads nothing; :meth:`setup` does.

    Args:
        image_io: where images are kept, and how input images are read.
        batch_size: most images per call of the pipeline, from 1.
        hf_model_name_or_path: a folder, a hub id (``org/name``) or ``builtin:tiny-flux``, which None stands for.
        hf_cache_dir: the Hub's cache.
        hf_local_dir: hub models are downloaded here, into a folder per model and commit.
        Image_gen_task: ``text2image`` or ``imageedit``.
        diffuser_model_name: ``FLUX``, ``FLUX-Kontext``, an exact class of diffusers, or None for what the model says.
        diffuser_num_inference_steps: denoising steps, from 1.
        diffuser_guidance_scale: the model family's own where None (FLUX.1 3.5, Kontext 2.5).
        diffuser_image_height: in pixels; given together with the width, unless the model has a default width. None for
            the model's own choice, which for edits is the shape of the input image.
        diffuser_image_width: in pixels.
        diffuser_num_images_per_prompt: images asked for each prompt, each a request with a seed of its own.
        negative_prompt: for rows that have none.
        pipeline_kwargs: further arguments of the pipeline's call (``true_cfg_scale``, ``max_sequence_length``, …).
        revision: branch, tag or commit of a hub model.
        variant: weights variant of the files, such as ``fp16``.
        dtype: ``auto`` (bf16 on a GPU, fp32 on the CPU), ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto`` (every CUDA device, else MPS, else CPU), a device, or a list of devices, one copy on each.
        lora: a .safetensors file, folder or hub id, or a list of those, each alone, as ``"name@0.8"`` or (name, scale).
        determinism: ``batch`` or ``strict``, see the module's text.
        scheduler: class name of a scheduler to put in place of the model's own.
        compile: ``regional`` (True) compiles the repeated blocks of the denoiser, ``full`` all of it.
        attention_backend: a name for diffusers' ``set_attention_backend``, such as ``_native_cudnn``.
        quantization: ``torchao:int8wo`` (int8dq, int4wo, fp8wo, fp8dq), ``bnb:4bit``, ``bnb:8bit``, or a mapping for
            diffusers' ``PipelineQuantizationConfig``.
        step_cache: ``first_block:0.08`` or ``taylorseer:5``; lossy.
        offload: ``model``, ``sequential`` or ``group``: weights wait on the CPU; slow, for models that do not fit.
        vae_slicing: decode one image at a time.
        vae_tiling: decode in tiles, for very large images.
        channels_last: memory format of the convolutions.
        local_files_only: never ask the Hub.

    Raises:
        ConfigError: a value that can never work, here or, once the model's files are known, from the other methods.
    """

    concurrency = 1
    num_cpus = None

    def __init__(
        self,
        image_io: ImageStore | None = None,
        batch_size: int = 1,
        hf_model_name_or_path: str | os.PathLike[str] | None = None,
        hf_cache_dir: str | os.PathLike[str] | None = None,
        hf_local_dir: str | os.PathLike[str] | None = None,
        Image_gen_task: Task = "text2image",  # noqa: N803 - the name is fixed by the specification
        diffuser_model_name: str | None = None,
        diffuser_num_inference_steps: int | None = None,
        diffuser_guidance_scale: float | None = None,
        diffuser_image_height: int | None = None,
        diffuser_image_width: int | None = None,
        diffuser_num_images_per_prompt: int = 1,
        *,
        negative_prompt: str | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        device: str | Sequence[str] = "auto",
        lora: str | Sequence[str | tuple[str, float]] | None = None,
        determinism: Literal["batch", "strict"] = "batch",
        scheduler: str | None = None,
        compile: bool | Literal["regional", "full"] = False,  # noqa: A002 - torch's own word for it
        attention_backend: str | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        step_cache: str | None = None,
        offload: Literal["model", "sequential", "group"] | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        channels_last: bool = False,
        local_files_only: bool = False,
    ) -> None:
        self.image_io = image_io
        self.batch_size = _count("batch_size", batch_size)
        self.images_per_prompt = _count("diffuser_num_images_per_prompt", diffuser_num_images_per_prompt)
        _choice("Image_gen_task", Image_gen_task, ("text2image", "imageedit"))
        _choice("dtype", dtype, ("auto", "bf16", "fp16", "fp32"))
        _choice("determinism", determinism, ("batch", "strict"))
        if determinism == "strict" and step_cache is not None:
            raise ConfigError("determinism='strict' and step_cache exclude each other: a cache skips work by guessing")
        given = {
            "num_inference_steps": diffuser_num_inference_steps,
            "guidance_scale": diffuser_guidance_scale,
            "height": diffuser_image_height,
            "width": diffuser_image_width,
            "negative_prompt": negative_prompt,
        }
        params = {**(pipeline_kwargs or {}), **{name: value for name, value in given.items() if value is not None}}
        try:
            can.require_values(params)
            json.dumps(params)
        except (BadRequestError, TypeError) as error:
            raise ConfigError(f"pipeline arguments: {error}") from error
        self._settings = _Settings(
            model=_text(hf_model_name_or_path),
            cache_dir=_text(hf_cache_dir),
            local_dir=_text(hf_local_dir),
            revision=revision,
            variant=variant,
            local_files_only=local_files_only,
            task=Image_gen_task,
            pipeline=diffuser_model_name,
            params=params,
            dtype=dtype,
            devices=parse_devices(device),
            lora=parse_lora(lora),
            strict=determinism == "strict",
            options=Options(
                scheduler=scheduler,
                compile=compile,
                attention_backend=attention_backend,
                quantization=quantization,
                step_cache=step_cache,
                offload=offload,
                vae_slicing=vae_slicing,
                vae_tiling=vae_tiling,
                channels_last=channels_last,
            ),
        )
        self.num_gpus = gpus_of_copy(self._settings.devices)
        self._forget()

    def _forget(self) -> None:
        self._known: Facts | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._names: Collection[str] | None = None
        self._runner: diffusers_runner.Runner | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone; a hub model goes pinned to the commit that was found here."""
        settings = self._settings
        if self._known is not None and self._known.files.hub:
            files = self._known.files
            settings = replace(settings, revision=files.revision, local_files_only=files.offline)
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**kept, "_settings": settings}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # What the model is and takes ---------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """Model, commit or digest of the files, pipeline class, dtype, adapters, options that change pixels.

        ``dtype="auto"`` stands as such: what it came to is in each image's provenance.

        Raises:
            ConfigError: the model cannot be found or used.
        """
        if self._fingerprint is None:
            facts, settings = self._facts(), self._settings
            local = not facts.files.name.startswith("builtin:") and not facts.files.hub
            found: dict[str, Any] = {
                "model": "local" if local else facts.files.name,
                "revision": facts.files.revision or _digest(facts),
                "pipeline": facts.capabilities.name,
                "dtype": settings.dtype,
                **settings.options.identity(),
            }
            if settings.variant:
                found["variant"] = settings.variant
            if settings.lora:
                adapters = [(self._adapter(name), scale) for name, scale in settings.lora]
                found["lora"] = [[model_files.adapter_identity(files), scale] for files, scale in adapters]
            if settings.strict:
                found["determinism"] = "strict"
            self._fingerprint = found
        return dict(self._fingerprint)

    def default_params(self) -> Mapping[str, Any]:
        """Call arguments where a row says nothing: the family's, the model's own over them, the constructor's on top.

        ``height`` and ``width`` are the default size, ``negative_prompt`` the default negative prompt.

        Raises:
            ConfigError: the model cannot be found or used, or does not take what the constructor was given.
        """
        return dict(self._facts().defaults)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot work here, without opening its files.

        Raises:
            BadRequestError: wrong number of input images, a size, value or parameter the model does not take, a
                negative prompt without effect.
            ConfigError: the serving itself cannot work.
        """
        facts = self._facts()
        images = len(request.images) or int(request.after is not None)
        can.require_images(facts.capabilities, self._settings.task, images)
        own = {key: value for key, value in request.params.items() if value is not None}
        if own != facts.defaults:
            named = {key: value for key, value in own.items() if key not in facts.defaults}
            can.require_parameters(facts.capabilities, named, self._signature)
            can.require_values(own)
        params, size, negative = effective(facts.defaults, request)
        can.require_size(facts.capabilities, size)
        can.require_negative(facts.capabilities, negative, params)

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """Equal for requests that one call of the pipeline can make without one changing the other."""
        facts = self._facts()
        count = len(request.images)
        if request.alone or self._settings.strict or not can.can_share(facts.capabilities, count):
            return request.request_id
        params, size, negative = effective(facts.defaults, request)
        sizes = []
        try:
            for path in request.images:
                source = self._reader().probe(path)
                sizes.append(can.input_size(facts.capabilities, params, source, size))
        except ImageError:
            return request.request_id
        return shared_key(params, size, negative, sizes)

    def replicas(self) -> Sequence[Serving]:
        """One copy per device of the list; with ``auto``, one per CUDA device."""
        devices = self._settings.devices
        if devices == ("auto",):
            devices = tuple(diffusers_runner.cuda_devices())
        if len(devices) < 2:
            return [self]
        return [self._on(device) for device in devices]

    def _on(self, device: str) -> LocalImageGenServing:
        twin = copy.copy(self)
        twin._settings = replace(twin._settings, devices=(device,))
        return twin

    def _facts(self) -> Facts:
        if self._known is None:
            settings = self._settings
            if settings.model is None:
                log.info(
                    "no model named: using the small built-in one (%s); hf_model_name_or_path names a real one, such as"
                    " 'black-forest-labs/FLUX.1-dev' or a folder",
                    model_files.BUILTIN,
                )
            files = model_files.locate(
                settings.model or model_files.BUILTIN,
                revision=settings.revision,
                cache_dir=settings.cache_dir,
                local_dir=settings.local_dir,
                local_files_only=settings.local_files_only,
            )
            index, manifest = model_files.read_index(files), model_files.read_manifest(files)
            name = can.pipeline_class(
                index["_class_name"], named=settings.pipeline, task=settings.task, manifest=manifest
            )
            capabilities = can.TABLE.get(name) or self._guess(name)
            can.require_task(capabilities, settings.task)
            section = manifest.get(settings.task) or {}
            own = {key: value for key, value in section.items() if key not in can.MANIFEST_ONLY}
            merged = {**capabilities.defaults, **own, **settings.params}
            facts = Facts(
                files=files,
                index=index,
                capabilities=can.with_manifest(capabilities, section),
                defaults={key: value for key, value in merged.items() if value is not None},
            )
            _require_defaults(facts)
            unusual = {key: value for key, value in settings.params.items() if key not in own}
            try:
                can.require_parameters(capabilities, unusual, lambda: self._class_names(name))
            except BadRequestError as error:
                raise ConfigError(str(error)) from error
            except MissingExtraError:
                pass  # nothing can be asked here what it takes, nor made: setup() says so
            self._known = facts
        return self._known

    def _guess(self, name: str) -> Capabilities:
        guessed = can.from_signature(name, self._class_names(name))
        log.warning("%s is not known to this package: one image per call, at most one input image", name)
        return guessed

    def _signature(self) -> Collection[str]:
        return self._class_names(self._facts().capabilities.name)

    def _class_names(self, name: str) -> Collection[str]:
        if self._names is None:
            self._names = diffusers_runner.call_parameters(name)
        return self._names

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Fetch what is missing and load the pipeline onto its device.

        Raises:
            ConfigError: the model cannot be found, fetched or used like this (``MissingExtraError``: without torch).
            FatalServingError: it does not load.
        """
        if self._runner is not None:
            return
        facts, settings = self._facts(), self._settings
        try:
            can.require_parameters(facts.capabilities, facts.defaults, self._signature)
        except BadRequestError as error:  # what the model's own file says is not asked about before
            raise ConfigError(str(error)) from error
        if self.batch_size > 1 and (settings.options.step_cache or "").startswith("first_block"):
            log.warning("a first-block cache decides for whole batches: images depend on their neighbours")
        recipe = diffusers_runner.Recipe(
            folder=model_files.fetch(facts.files, facts.index, variant=settings.variant),
            pipeline=facts.capabilities.name,
            components=model_files.components(facts.index),
            device=settings.devices[0],
            dtype=settings.dtype,
            variant=settings.variant,
            lora=[(self._adapter(name), scale) for name, scale in settings.lora],
            cache_dir=settings.cache_dir,
            options=settings.options,
            floats=facts.capabilities.floats,
            strict=settings.strict,
        )
        self._runner = diffusers_runner.Runner(recipe)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One picture, or an error, per request and in its order; the pipeline runs in a thread of its own.

        A request that cannot work, an unreadable input image and an unusable picture are errors of their result alone.

        Raises:
            OutOfMemoryError: a call did not fit; fewer requests may.
            RetryError: the pipeline raised something; ``reason`` is ``pipeline_error``.
            FatalServingError: not set up, or the device is broken.
        """
        if self._thread is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, list(requests))

    def cleanup(self) -> None:
        """Free the weights and the thread. :meth:`setup` may be called again."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        results: dict[int, GenerationResult] = {}
        calls: dict[Hashable, list[Job]] = {}
        for place, request in enumerate(requests):
            try:
                job = self._job(place, request)
            except BadRequestError as error:
                results[place] = GenerationResult(error=error)
            else:
                calls.setdefault(job.key, []).append(job)
        for jobs in calls.values():
            results.update(zip((job.place for job in jobs), self._call(jobs), strict=True))
        return [results[place] for place in range(len(requests))]

    def _job(self, place: int, request: GenerationRequest) -> Job:
        """Read a request's pictures and settle its parameters."""
        self.check(request)
        facts = self._facts()
        capabilities = facts.capabilities
        params, size, negative = effective(facts.defaults, request)
        images = []
        for path in request.images:
            try:
                image = self._reader().read(path)
            except ImageError as error:
                raise BadRequestError(f"input image {error}", reason="bad_image") from error
            images.append(image)
        if not request.images and self._settings.task == "imageedit":
            raise BadRequestError("the previous turn's image is missing", reason="bad_image")
        if images and size is None:
            size = can.edit_size(capabilities, params, images[0].size)
        wanted = [can.input_size(capabilities, params, image.size, size) for image in images]
        images = [
            image if image.size == fit else image.resize(fit, Image.Resampling.LANCZOS)
            for image, fit in zip(images, wanted, strict=True)
        ]
        shared = not self._settings.strict and can.can_share(capabilities, len(images))
        key = shared_key(params, size, negative, wanted) if shared else place
        return Job(place=place, request=request, params=params, size=size, negative=negative, images=images, key=key)

    def _call(self, jobs: Sequence[Job]) -> list[GenerationResult]:
        assert self._runner is not None
        started = time.perf_counter()
        pictures = self._runner.run(
            [job.request.seed for job in jobs], call_arguments(self._facts().capabilities, jobs)
        )
        seconds = (time.perf_counter() - started) / len(jobs)
        results = []
        for picture in pictures:
            if isinstance(picture, ServingError):
                results.append(GenerationResult(error=picture, seconds=seconds))
                continue
            facts = {"batch_size": len(jobs), "width": picture.width, "height": picture.height}
            provenance = {**self._runner.provenance, **facts}
            results.append(GenerationResult(images=(picture,), provenance=provenance, seconds=seconds))
        return results

    def _adapter(self, name: str) -> ModelFiles:
        settings = self._settings
        return model_files.locate_adapter(
            name, cache_dir=settings.cache_dir, local_files_only=settings.local_files_only
        )

    def _reader(self) -> ImageIO:
        return self.image_io if isinstance(self.image_io, ImageIO) else ImageIO(save_path=".")


def _require_defaults(facts: Facts) -> None:
    """What the model and the constructor say must work together, before any row is looked at."""
    try:
        can.require_values(facts.defaults)
        params, size, negative = effective(facts.defaults, GenerationRequest(request_id="", prompt="", seed=0))
        can.require_size(facts.capabilities, size)
        can.require_negative(facts.capabilities, negative, params)
    except BadRequestError as error:
        raise ConfigError(f"{facts.files.name}: {error}") from error


def _digest(facts: Facts) -> str:
    assert facts.files.folder is not None
    return model_files.digest(facts.files.folder, facts.index)


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")
    return value


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}{can.near(str(value), allowed)}"
        )
