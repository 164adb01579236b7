"""Images from a diffusers pipeline on this machine: :class:`LocalImageGenServing`.

Determinism. Every image has a generator of its own on the CPU, seeded with the request's seed: its initial noise does
not depend on neighbours, order, device or worker. The rest of the arithmetic does, within rounding: matrix products of
one row and of many are computed differently (one or two of 255 levels in a few pixels). ``determinism="strict"`` gives
every image a call of its own and deterministic kernels: bitwise the same on the same machine and versions. A step cache
by first block decides for a whole batch, so that neighbours change pixels visibly: use it with batch_size=1.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from dataflow.errors import (
    BadRequestError,
    ConfigError,
    FatalServingError,
    ImageError,
    MissingExtraError,
)
from dataflow.io import ImageIO
from dataflow.serving import capabilities as can
from dataflow.serving import diffusers_runner, model_files
from dataflow.serving.capabilities import Capabilities
from dataflow.serving.diffusers_batches import Batches
from dataflow.serving.diffusers_call import Facts, effective, shared_key
from dataflow.serving.diffusers_options import Options, Settings, parse_devices, parse_lora
from dataflow.serving.diffusers_runner import Recipe, Runner
from dataflow.serving.model_files import ModelFiles
from dataflow.serving.transformers_model import gpus_of_copy
from dataflow.types import GenerationRequest, GenerationResult, ImageStore, Serving, Task

log = logging.getLogger(__name__)


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
        compile: ``regional`` (True) compiles the repeated blocks of the denoiser, ``full`` all of it. Calls are then
            filled up to ``batch_size`` with repeats, which are thrown away: another number would be compiled anew.
        attention_backend: a name for diffusers' ``set_attention_backend``, such as ``_native_cudnn``, or ``auto``: the
            fastest that is installed for this device.
        quantization: ``torchao:int8wo`` (int8dq, int4wo, fp8wo, fp8dq), ``bnb:4bit``, ``bnb:8bit``, a mapping for
            diffusers' ``PipelineQuantizationConfig``, or ``auto``: fp8 where it pays, else none.
        step_cache: ``first_block:0.08`` or ``taylorseer:5``; lossy.
        offload: ``model``, ``sequential`` or ``group``: weights wait on the CPU; slow, for models that do not fit.
        vae_slicing: decode one image at a time; ``auto`` does so with large batches.
        vae_tiling: decode in tiles; ``auto`` does so with large images.
        channels_last: memory format of the convolutions.
        text_encoders: ``offload`` keeps them in main memory but while prompts are encoded.
        prompt_cache_mb: megabytes of main memory for embeddings of prompts that may come again; 0 for none.
        threads: of the CPU, for the whole process while the model is loaded; None for torch's own choice.
        local_files_only: never ask the Hub.

    Raises:
        ConfigError: a value that can never work, here or, once the model's files are known, from the other methods.
    """

    concurrency = 1
    ahead = 1
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
        vae_slicing: bool | Literal["auto"] = "auto",
        vae_tiling: bool | Literal["auto"] = False,
        channels_last: bool = False,
        text_encoders: Literal["keep", "offload"] = "keep",
        prompt_cache_mb: int = 512,
        threads: int | None = None,
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
        self._settings = Settings(
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
                text_encoders=text_encoders,
                prompt_cache_mb=prompt_cache_mb,
                threads=threads,
            ),
        )
        self.num_gpus = gpus_of_copy(self._settings.devices)
        self._forget()

    def _forget(self) -> None:
        self._known: Facts | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._names: Collection[str] | None = None
        self._batches: Batches | None = None

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
        if self._batches is not None:
            return
        facts, settings = self._facts(), self._settings
        try:
            can.require_parameters(facts.capabilities, facts.defaults, self._signature)
        except BadRequestError as error:  # what the model's own file says is not asked about before
            raise ConfigError(str(error)) from error
        if self.batch_size > 1 and (settings.options.step_cache or "").startswith("first_block"):
            log.warning("a first-block cache decides for whole batches: images depend on their neighbours")
        recipe = Recipe(
            folder=model_files.fetch(facts.files, facts.index, variant=settings.variant),
            capabilities=facts.capabilities,
            components=model_files.components(facts.index),
            device=settings.devices[0],
            dtype=settings.dtype,
            variant=settings.variant,
            lora=[(self._adapter(name), scale) for name, scale in settings.lora],
            cache_dir=settings.cache_dir,
            options=settings.options,
            strict=settings.strict,
        )
        self._batches = Batches(
            Runner(recipe), facts, settings, most=self.batch_size, reader=self._reader(), check=self.check
        )

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One picture, or an error, per request and in its order; the pipeline runs in a thread of its own.

        Input images are read in a second thread and pictures taken over in a third, so that the device goes on with the
        next batch meanwhile. A request that cannot work, an unreadable input image and an unusable picture are errors
        of their result alone.

        Raises:
            OutOfMemoryError: a call did not fit; fewer requests may.
            RetryError: the pipeline raised something; ``reason`` is ``pipeline_error``.
            FatalServingError: not set up, or the device is broken.
        """
        if self._batches is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        return await self._batches.generate(list(requests))

    def cleanup(self) -> None:
        """Free the weights and the threads. :meth:`setup` may be called again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    @property
    def task(self) -> Task:
        """What it was made for."""
        return self._settings.task

    def short_call(self, request: GenerationRequest) -> tuple[int, int]:
        """Make a request in as few steps as there may be, and drop the picture.

        Returns:
            How many steps the request has, and how many were made.

        Raises:
            FatalServingError: not set up.
            DataflowError: the request cannot be made.
        """
        if self._batches is None:
            raise FatalServingError("the serving is not set up: call setup() before short_call()")
        return self._batches.short_call(request)

    @property
    def runner(self) -> Runner | None:
        """The loaded pipeline, between :meth:`setup` and :meth:`cleanup`."""
        return self._batches.runner if self._batches else None

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
