"""A vision-language model on this machine that answers questions about pictures with words."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from PIL import Image

from dataflow.errors import BadOutputError, BadRequestError, ConfigError, FatalServingError
from dataflow.serving import transformers_model
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.pictures import read_picture
from dataflow.serving.transformers_model import Dtype, TransformersServing
from dataflow.serving.vlm_runner import Manner, Question, Said, VisionLanguageModel
from dataflow.types import GenerationRequest, GenerationResult

VERSION = 1
"""To be raised when the same question comes to have another answer."""


_KNOWN = frozenset({"max_tokens", "temperature", "logprobs", "top_logprobs", "response_format"})
"""Parameters that requests may have, whatever the serving's own are."""


class LocalVLMServing(TransformersServing):
    """Asks any vision-language model of transformers that has a chat template: Qwen-VL, InternVL, Idefics, LLaVA, ….

    It answers with text and is a service for :class:`~dataflow.serving.judge.JudgeServing`,
    :class:`~dataflow.serving.answers.AnswerServing` and :class:`~dataflow.serving.pair_judge.PairJudge`, as a
    chat-completions service is. Its parameters have the names that they have there: ``max_tokens``, ``temperature``,
    ``logprobs`` and ``top_logprobs``. ``response_format`` is taken and not enforced: what the model writes is read
    strictly. A server such as vLLM is faster where there is much to ask.

    Answers are the most probable ones, or at a temperature above 0 drawn with the request's seed, whatever shares its
    batch. The settings for sampling that come with a model are not used.

    Args:
        hf_model_name_or_path: a folder or a hub id (``Qwen/Qwen3-VL-8B-Instruct``).
        batch_size: requests per call.
        max_new_tokens: of an answer.
        temperature: 0 for the most probable answer.
        max_pixels: pictures with more are scaled down to that many before the model's own processor sees them.
        revision: branch, tag or commit of a hub model.
        hf_cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        device: ``auto`` (every CUDA device, else MPS, else CPU), a device, or a list of devices, one copy on each.
        dtype: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: a value that can never work; from the other methods, a model that cannot be used.
    """

    image_io = None
    concurrency = 2
    """One batch is decoded while another is in the model."""

    def __init__(
        self,
        hf_model_name_or_path: str | os.PathLike[str],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        max_pixels: int | None = 2**20,
        revision: str | None = None,
        hf_cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | Sequence[str] = "auto",
        dtype: Dtype = "bf16",
    ) -> None:
        counts = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "max_pixels": max_pixels}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature must be a number from 0, got {temperature!r}")
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self.params: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature}
        self._name(
            hf_model_name_or_path,
            revision=revision,
            hf_cache_dir=hf_cache_dir,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
        )

    def _forget(self) -> None:
        super()._forget()
        self._model: VisionLanguageModel | None = None

    # What the model is -------------------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """Model, commit or digest of its files, number format, how pictures are scaled, and version.

        Raises:
            ConfigError: the model cannot be found.
        """
        facts = {"kind": "vlm", "dtype": self.dtype, "max_pixels": self.max_pixels, "version": VERSION}
        return {**transformers_model.identity(self._located()), **facts}

    def default_params(self) -> Mapping[str, Any]:
        """The parameters of every request."""
        return dict(self.params)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what a question cannot say. It may be about pictures, or words alone.

        Raises:
            BadRequestError: earlier turns, a negative prompt, a size, or a parameter not known here.
        """
        if request.turns or request.after or request.negative_prompt or request.size:
            raise BadRequestError("a question to this model has no earlier turns, negative prompt or size")
        if unknown := sorted(request.params.keys() - self.params.keys() - _KNOWN):
            raise BadRequestError(f"the row sets {', '.join(unknown)}, of which this model knows nothing")
        _manner(request)

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """Requests answered in the same manner share a batch; those with pictures and those without are apart."""
        return bool(request.images), json.dumps(request.params, sort_keys=True, default=str)

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Fetch what is missing and load the model.

        Raises:
            ConfigError: the model cannot be found, fetched or used (``MissingExtraError``: without torch).
            FatalServingError: it does not load.
        """
        if self._model is not None:
            return
        for name in ("torch", "transformers"):
            import_library(name)
        folder = transformers_model.fetched(self._located())
        device = transformers_model.devices(self.device)[0]
        self._model = VisionLanguageModel(folder, device=device, dtype=self.dtype)

    def cleanup(self) -> None:
        """Free the weights."""
        if self._model is not None:
            self._model.close()
        self._model = None

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One answer per request; a picture that cannot be read fails by itself.

        Raises:
            FatalServingError: not set up, or the device is broken.
            ServingError: the batch failed whole.
        """
        if self._model is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        started = time.perf_counter()
        found = await asyncio.to_thread(self._answered, self._model, requests)
        seconds = (time.perf_counter() - started) / max(1, len(requests))
        return [_result(said, seconds) for said in found]

    def _answered(
        self, model: VisionLanguageModel, requests: Sequence[GenerationRequest]
    ) -> list[Said | BadRequestError]:
        found: list[Said | BadRequestError | None] = []
        questions: list[Question] = []
        for request in requests:
            try:
                pictures = tuple(self._shown(path) for path in request.images)
                questions.append(Question(text=request.prompt, pictures=pictures, seed=request.seed))
                found.append(None)
            except BadRequestError as error:
                found.append(error)
        answers = iter(model.answer(questions, _manner(requests[0])) if questions else ())
        return [next(answers) if each is None else each for each in found]

    def _shown(self, path: str) -> Image.Image:
        picture = read_picture(path).convert("RGB")
        if self.max_pixels is None or picture.width * picture.height <= self.max_pixels:
            return picture
        scale = math.sqrt(self.max_pixels / (picture.width * picture.height))
        width, height = (max(1, math.floor(side * scale)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)


def _manner(request: GenerationRequest) -> Manner:
    """How a request is to be answered.

    Raises:
        BadRequestError: its parameters cannot be used.
    """
    params = request.params
    tokens, warmth = params.get("max_tokens"), params.get("temperature") or 0.0
    top = (params.get("top_logprobs") or 0) if params.get("logprobs") else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise BadRequestError(f"max_tokens must be a whole number from 1, got {tokens!r}")
    if not isinstance(warmth, int | float) or not 0 <= warmth < math.inf:
        raise BadRequestError(f"temperature must be a number from 0, got {warmth!r}")
    if top is not None and (not isinstance(top, int) or not 0 <= top <= 20):
        raise BadRequestError(f"top_logprobs must be a whole number from 0 to 20, got {top!r}")
    return Manner(max_tokens=tokens, temperature=float(warmth), top_logprobs=top)


def _result(said: Said | BadRequestError, seconds: float) -> GenerationResult:
    if isinstance(said, BadRequestError):
        return GenerationResult(error=said, seconds=seconds)
    if not said.text.strip():
        error = BadOutputError("the model answers with nothing", reason="no_text")
        return GenerationResult(error=error, seconds=seconds)
    facts: dict[str, Any] = {"finish_reason": said.finish}
    if said.logprobs is not None:
        facts["logprobs"] = said.logprobs
    return GenerationResult(text=said.text, provenance=facts, seconds=seconds)
