"""A vision-language model of transformers on one device: questions about pictures in, text and its probability out."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, OutOfMemoryError, RetryError, ServingError
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.diffusers_runner import choose_device
from dataflow.serving.encoder import DTYPES, quiet

_STOPS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked.

    Attributes:
        text: the user's words.
        pictures: shown before them, in order.
        seed: of the answer, where it is sampled; 0 ≤ seed < 2**63.
    """

    text: str
    pictures: tuple[Image.Image, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a batch of questions is answered.

    Attributes:
        max_tokens: of an answer.
        temperature: 0 takes the most probable token each time.
        top_logprobs: alternatives listed for each token; None for no log probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a model answered.

    Attributes:
        text: without special tokens.
        finish: ``stop``, or ``length`` where ``max_tokens`` cut it off.
        logprobs: as chat completions give them, of the raw logits; None where none were asked for.
    """

    text: str
    finish: str
    logprobs: dict[str, Any] | None = None


class VisionLanguageModel:
    """One model on one device; one batch at a time is in it, others may be prepared meanwhile.

    Args:
        folder: of any model that ``AutoModelForImageTextToText`` knows and that has a chat template.
        device: ``auto``, ``cpu``, ``cuda:0``, ….
        dtype: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        MissingExtraError: torch or transformers are not installed.
        ConfigError: the device is not there, or the model takes no chat with pictures.
        FatalServingError: the model does not load.
    """

    def __init__(self, folder: Path, *, device: str, dtype: str) -> None:
        torch, transformers = import_library("torch"), import_library("transformers")
        self._torch, self._transformers = torch, transformers
        self._lock = threading.Lock()
        # A fast tokenizer cannot be told how to pad while it is in use.
        self._reading = threading.Lock()
        self.device = choose_device(torch, device)
        try:
            with quiet(transformers):
                self._processor = _processor(transformers, folder)
                self._model = transformers.AutoModelForImageTextToText.from_pretrained(
                    folder, dtype=getattr(torch, DTYPES[dtype]), local_files_only=True
                )
        except _LOAD_ERRORS as error:
            raise FatalServingError(f"{folder} cannot be loaded as a vision-language model: {error}") from error
        if not self._processor.chat_template:
            raise ConfigError(f"{folder} has no chat template: it is no model to ask questions")
        if "sanitize_control_tokens" not in inspect.signature(self._processor.apply_chat_template).parameters:
            raise ConfigError(f"transformers {transformers.__version__} is too old to ask models: upgrade it")
        # Answers are written behind the questions of a batch, which therefore end at the same place.
        self._processor.tokenizer.padding_side = "left"
        self._only_stops()
        self._model.eval().requires_grad_(False).to(self.device)

    def _only_stops(self) -> None:
        """Forget what the model's authors wish of sampling (Qwen2-VL: a repetition penalty); ends of text stay."""
        given, tokenizer = self._model.generation_config, self._processor.tokenizer
        stops = {name: getattr(given, name, None) for name in _STOPS}
        if stops["eos_token_id"] is None:
            stops["eos_token_id"] = tokenizer.eos_token_id
        if stops["pad_token_id"] is None:
            stops["pad_token_id"] = tokenizer.pad_token_id
        self._model.generation_config = self._transformers.GenerationConfig(**stops)
        ends = stops["eos_token_id"]
        self._ends = frozenset(ends if isinstance(ends, list | tuple) else [ends])

    def answer(self, questions: Sequence[Question], manner: Manner) -> list[Said]:
        """One answer per question, all of them in the same manner.

        Raises:
            BadRequestError: the model cannot be shown these pictures or told these words.
            OutOfMemoryError: the batch did not fit.
            FatalServingError: the device is broken.
            RetryError: the model failed.
        """
        torch = self._torch
        with self._reading:
            given = self._given(questions)
        watch = _Watch(torch, [question.seed for question in questions], manner)
        with self._lock:
            try:
                with torch.inference_mode():
                    found = self._model.generate(
                        **given.to(self.device, self._model.dtype),
                        max_new_tokens=manner.max_tokens,
                        do_sample=False,
                        logits_processor=[watch],
                    )
                tokens = found[:, given["input_ids"].shape[1] :].tolist()
            except (RuntimeError, MemoryError, ValueError, IndexError) as error:
                raise self._translated(error) from error
        with self._reading:
            return [self._said(row, watch.listed, number) for number, row in enumerate(tokens)]

    def close(self) -> None:
        """Free the weights."""
        del self._model
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()

    def _given(self, questions: Sequence[Question]) -> Any:
        chats = [[{"role": "user", "content": _content(question)}] for question in questions]
        try:
            return self._processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                # Otherwise a prompt may end its own turn and write the answer.
                sanitize_control_tokens=True,
                processor_kwargs={"padding": True},
            )
        except (ValueError, TypeError, IndexError) as error:
            raise BadRequestError(f"the model cannot be asked this: {error}", reason="not_applicable") from error

    def _said(self, tokens: Sequence[int], listed: Sequence[Any], number: int) -> Said:
        end = next((at for at, token in enumerate(tokens) if token in self._ends), None)
        words = tokens[:end]
        tokenizer = self._processor.tokenizer
        text = tokenizer.decode(words, skip_special_tokens=True)
        logprobs = None
        if listed:
            steps = [(step[0][number], step[1][number]) for step in listed[: len(words)]]
            pairs = zip(words, steps, strict=False)
            logprobs = {"content": [self._entry(token, *step) for token, step in pairs], "refusal": None}
        return Said(text=text, finish="length" if end is None else "stop", logprobs=logprobs)

    def _entry(self, token: int, scores: Any, ids: Any) -> dict[str, Any]:
        """A token of an answer, as chat completions tell of it; ``scores`` begin with its own."""
        tokenizer = self._processor.tokenizer
        own, *others = scores.tolist()
        listed = [
            {"token": tokenizer.decode([each]), "logprob": score}
            for each, score in zip(ids.tolist(), others, strict=True)
        ]
        return {"token": tokenizer.decode([token]), "logprob": own, "top_logprobs": listed}

    def _translated(self, error: Exception) -> ServingError:
        text = f"{type(error).__name__}: {str(error)[:2000]}"
        if isinstance(error, (self._torch.OutOfMemoryError, MemoryError)):
            return OutOfMemoryError(text)
        if "CUDA error: " in text:
            return FatalServingError(f"the device is broken until the process ends: {text}", reason="device_error")
        return RetryError(f"the model failed: {text}", reason="model_error")


class _Watch:
    """Sees the logits of each step: lists the most probable tokens, and draws where the answer is sampled.

    A token is drawn as the greatest of logits / temperature + Gumbel noise, which is a draw from their softmax. The
    noise is each question's own, so that its answer does not depend on what shares its batch.
    """

    def __init__(self, torch: Any, seeds: Sequence[int], manner: Manner) -> None:
        self._torch, self._manner = torch, manner
        self._noise = [torch.Generator().manual_seed(seed) for seed in seeds] if manner.temperature else []
        self.listed: list[tuple[Any, Any]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 - transformers' protocol
        torch, chosen = self._torch, scores
        if self._noise:
            draws = [torch.rand(scores.shape[-1], generator=each, dtype=torch.float64) for each in self._noise]
            uniform = torch.stack(draws).clamp_min(torch.finfo(torch.float64).tiny)
            gumbel = -torch.log(-torch.log(uniform))
            chosen = scores.float() / self._manner.temperature + gumbel.float().to(scores.device)
        if self._manner.top_logprobs is not None:
            shares = scores.float().log_softmax(-1)
            own = shares.gather(-1, chosen.argmax(-1, keepdim=True))
            best = shares.topk(self._manner.top_logprobs, dim=-1)
            self.listed.append((torch.cat([own, best.values], dim=-1).cpu(), best.indices.cpu()))
        return chosen


def _content(question: Question) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in question.pictures]
    return [*shown, {"type": "text", "text": question.text}]


def _processor(transformers: Any, folder: Path) -> Any:
    """The model's processor on Pillow, without what it would need for videos and sounds.

    ``AutoProcessor`` loads one that also takes videos (Qwen2-VL and later, InternVL, SmolVLM) with torchvision only.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = transformers.PROCESSOR_MAPPING[type(config)]
    with_pillow = {"backend": "pil", "local_files_only": True}
    parts = {
        "image_processor": transformers.AutoImageProcessor.from_pretrained(folder, **with_pillow),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
    }

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    for_pictures = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    given = [parts.get(name) for name in kind.get_attributes()]
    return for_pictures.from_args_and_dict(given, settings)  # type: ignore[attr-defined]
