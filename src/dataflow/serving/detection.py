"""Objects found in pictures by their names, with open-vocabulary detectors: OWL-ViT, OWLv2, Grounding DINO."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    FatalServingError,
    MissingExtraError,
    OutOfMemoryError,
    ServingError,
)
from dataflow.serving import transformers_model
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.diffusers_runner import choose_device
from dataflow.serving.encoder import DTYPES, quiet
from dataflow.serving.pictures import read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.serving.transformers_model import Dtype, TransformersServing
from dataflow.types import GenerationRequest

VERSION = 1
"""To be raised when the same picture comes to have other detections."""

Pixels = npt.NDArray[np.float32]

_OWLS = ("owlvit", "owlv2")
_DINOS = ("grounding-dino", "mm-grounding-dino")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


class ZeroShotDetectionServing(TransformersServing, ScoringServing):
    """Finds objects in a request's first picture by the texts in its parameter ``labels``.

    An answer is ``{"detections": [{"label", "score", "box"}], "width", "height"}``: the surest first; ``label`` is one
    of the texts as given, ``score`` is over ``threshold`` and up to 1, ``box`` is ``[left, top, right, bottom]`` in
    pixels of the picture, y downwards, cut to it. Overlaps are not suppressed.

    Each text is looked for by itself: a box that fits two of them ("a circle", "a red circle") is there twice. With
    OWL-ViT and OWLv2 the answer for a text does not depend on what else is asked. Grounding DINO reads all texts as
    one; a text's score is the mean over its tokens, as its authors evaluate it (``PostProcessCocoGrounding``), so that
    every word counts; transformers' own post-processing takes the maximum.

    ``threshold`` is to be lower than any that rules will use later: rules are cheap, detection is not.

    Args:
        hf_model_name_or_path: a folder or a hub id (``google/owlv2-base-patch16-ensemble``,
            ``IDEA-Research/grounding-dino-tiny``).
        labels: what is looked for where a request names nothing itself.
        threshold: detections that are less sure are not kept.
        max_detections: most of one text in one picture, the surest.
        batch_size: pictures per call.
        revision: branch, tag or commit of a hub model.
        hf_cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        device: ``auto`` (every CUDA device, else MPS, else CPU), a device, or a list of devices, one copy on each.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        threads: of decoding and preparing pictures; None for as many as there are cores.

    Raises:
        ConfigError: a value that can never work; from the other methods, a model that cannot be used.
    """

    concurrency = 2
    """One batch is decoded while another is in the model."""

    def __init__(
        self,
        hf_model_name_or_path: str | os.PathLike[str],
        *,
        labels: Sequence[str] = (),
        threshold: float = 0.05,
        max_detections: int = 100,
        batch_size: int = 8,
        revision: str | None = None,
        hf_cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | Sequence[str] = "auto",
        dtype: Dtype = "fp32",
        threads: int | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {threshold!r}")
        for name, value in {"max_detections": max_detections, "batch_size": batch_size}.items():
            if value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")
        if isinstance(labels, str) or (labels and _texts(list(labels)) is None):
            raise ConfigError(f"labels must be a list of texts, got {labels!r}")
        self.labels = list(labels)
        self.threshold = threshold
        self.max_detections = max_detections
        self.batch_size = batch_size
        self.threads = threads or os.cpu_count() or 1
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
        self._detector: _Detector | None = None
        self._pool: ThreadPoolExecutor | None = None

    # What the model is -------------------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """Model, commit or digest of its files, number format, what is kept, and version.

        Raises:
            ConfigError: the model cannot be found.
        """
        facts = {"kind": "zero_shot_detection", "dtype": self.dtype, "version": VERSION}
        kept = {"threshold": self.threshold, "max_detections": self.max_detections}
        return {**transformers_model.identity(self._located()), **facts, **kept}

    def default_params(self) -> Mapping[str, Any]:
        """The texts, where the serving was given some."""
        return {"labels": self.labels} if self.labels else {}

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequestError for a request without a picture or without texts."""
        if not request.images:
            raise BadRequestError("there is no picture to look at", reason="not_applicable")
        if _texts(request.params.get("labels")) is None:
            raise BadRequestError("labels: expected a list of texts to look for")

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Fetch what is missing and load the model.

        Raises:
            ConfigError: the model cannot be found, fetched or used (``MissingExtraError``: without torch).
            FatalServingError: it does not load.
        """
        if self._detector is not None:
            return
        for name in ("torch", "transformers"):
            import_library(name)
        folder = transformers_model.fetched(self._located())
        device = transformers_model.devices(self.device)[0]
        self._detector = _Detector(folder, device=device, dtype=self.dtype)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def cleanup(self) -> None:
        """Free the weights and the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        if self._detector is not None:
            self._detector.close()
        self._detector = self._pool = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """What is found in each request's first picture; a picture that cannot be read fails by itself.

        Raises:
            FatalServingError: not set up.
            OutOfMemoryError: the batch did not fit.
        """
        detector, pool = self._detector, self._pool
        if detector is None or pool is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        looks = list(pool.map(lambda request: _look(detector, request), requests))
        found = iter(detector.answers([look for look in looks if isinstance(look, _Look)]))
        return [look if isinstance(look, ServingError) else self._kept(detector, look, next(found)) for look in looks]

    def _kept(self, detector: _Detector, look: _Look, answer: _Answer) -> Scored:
        if not (np.isfinite(answer.scores).all() and np.isfinite(answer.boxes).all()):
            return BadOutputError("the model found boxes that are no numbers")
        detections: list[dict[str, Any]] = []
        for number, label in enumerate(look.labels):
            found = detector.in_pixels(answer, number, self.threshold, look.size)
            most = found[: self.max_detections]
            detections += [{"label": label, "score": score, "box": box} for score, box in most]
        detections.sort(key=lambda each: -each["score"])
        height, width = look.size
        return {"detections": detections, "width": width, "height": height}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """A prepared picture, (3, height, width) as the model takes it; what to look for; its own (height, width)."""

    pixels: Pixels
    labels: tuple[str, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Of one picture: how sure each box is of each text, (boxes, texts), 0..1; the boxes as the model gives them."""

    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]


class _Detector:
    """One model on one device. Preparation may run in several threads, the model runs in one at a time."""

    def __init__(self, folder: Path, *, device: str, dtype: str) -> None:
        torch, transformers = import_library("torch"), import_library("transformers")
        self._torch = torch
        self._lock = threading.Lock()
        # A fast tokenizer cannot be told how to pad while it is in use.
        self._reading = threading.Lock()
        self.device = choose_device(torch, device)
        self._dtype = getattr(torch, DTYPES[dtype])
        try:
            with quiet(transformers):
                self.kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
                if self.kind not in (*_OWLS, *_DINOS):
                    raise ConfigError(f"{folder} is {self.kind}; detectors are {', '.join((*_OWLS, *_DINOS))}")
                if self.kind == "owlv2" and importlib.util.find_spec("scipy") is None:
                    raise MissingExtraError("scipy", "metrics", "preparing pictures for OWLv2")
                self._model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
                    folder, dtype=self._dtype, local_files_only=True
                )
                self._processor = transformers.AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, backend="pil"
                )
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (*_LOAD_ERRORS, import_library("safetensors").SafetensorError) as error:
            raise FatalServingError(f"{folder} cannot be loaded as a detector: {error}") from error
        self._model.eval().requires_grad_(False).to(self.device)

    @property
    def longest(self) -> int:
        """Most tokens that the model reads: of one text (OWL-ViT), or of all together (Grounding DINO)."""
        config = self._model.config
        return int(config.text_config.max_position_embeddings if self.kind in _OWLS else config.max_text_len)

    def prepared(self, picture: Any) -> Pixels:
        """A picture as the model takes it."""
        return self._processor(images=picture, return_tensors="np")["pixel_values"][0].astype(np.float32)

    def refusal(self, labels: Sequence[str]) -> str:
        """Why the model cannot be asked for these texts; nothing where it can."""
        if self.kind in _OWLS:
            for label in labels:
                if (number := len(self._read(label)["input_ids"])) > self.longest:
                    return f"{label!r} has {number} tokens, the model reads {self.longest}"
            return ""
        if any(mark in label for label in labels for mark in ".?"):
            return "a text holds a full stop or a question mark, with which Grounding DINO ends one"
        spans = self._spans(labels)
        if spans[-1][1] + 2 > self.longest:
            return f"the texts have {spans[-1][1] + 2} tokens together, the model reads {self.longest}"
        return next((f"{label!r} has no tokens" for label, (a, b) in zip(labels, spans, strict=True) if a == b), "")

    def answers(self, looks: Sequence[_Look]) -> list[_Answer]:
        """What the model says of each picture.

        Raises:
            OutOfMemoryError: they did not fit.
        """
        found: dict[int, _Answer] = {}
        run = self._owl if self.kind in _OWLS else self._dino
        try:
            for group in self._groups(looks):
                found |= zip(group, run([looks[number] for number in group]), strict=True)
        except (self._torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemoryError(str(error)[:2000]) from error
        return [found[number] for number in range(len(looks))]

    def in_pixels(
        self, answer: _Answer, number: int, threshold: float, size: tuple[int, int]
    ) -> list[tuple[float, list[float]]]:
        """Score and box of what is surer than ``threshold`` to be text ``number``, the surest first."""
        torch = self._torch
        output = SimpleNamespace(
            logits=torch.logit(torch.from_numpy(answer.scores[None, :, number : number + 1])),
            pred_boxes=torch.from_numpy(answer.boxes[None]),
        )
        [result] = self._processor.post_process_object_detection(output, threshold=threshold, target_sizes=[size])
        height, width = size
        found: list[tuple[float, list[float]]] = []
        for score, box in zip(result["scores"].tolist(), result["boxes"].tolist(), strict=True):
            edges = [min(max(edge, 0.0), limit) for edge, limit in zip(box, (width, height) * 2, strict=True)]
            if edges[0] < edges[2] and edges[1] < edges[3]:  # OWLv2 also finds things beside the picture
                found.append((score, [round(edge, 2) for edge in edges]))
        return sorted(found, key=lambda each: -each[0])

    def close(self) -> None:
        """Free the weights."""
        on_gpu = self.device.startswith("cuda")
        del self._model
        if on_gpu:
            self._torch.cuda.empty_cache()

    def _groups(self, looks: Sequence[_Look]) -> list[list[int]]:
        """Positions of pictures that go through the model together.

        Grounding DINO would fill up smaller pictures and shorter texts, and answer a little differently for it.
        """
        groups: dict[Any, list[int]] = {}
        for number, look in enumerate(looks):
            key = None if self.kind in _OWLS else (look.pixels.shape, look.labels)
            groups.setdefault(key, []).append(number)
        return list(groups.values())

    def _owl(self, looks: Sequence[_Look]) -> list[_Answer]:
        most = max(len(look.labels) for look in looks)
        texts = [text for look in looks for text in (*look.labels, *look.labels[:1] * (most - len(look.labels)))]
        given = self._read(texts, padding="max_length", max_length=self.longest, return_tensors="pt")
        scores, boxes = self._run(looks, input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        return [
            _Answer(scores=rows[:, : len(look.labels)], boxes=each)
            for look, rows, each in zip(looks, scores, boxes, strict=True)
        ]

    def _dino(self, looks: Sequence[_Look]) -> list[_Answer]:
        labels = looks[0].labels
        given = self._read([_sentence(labels)] * len(looks), return_tensors="pt", return_token_type_ids=True)
        scores, boxes = self._run(looks, **given)
        spans = self._spans(labels)
        means = np.stack([scores[..., begin:end].mean(axis=-1) for begin, end in spans], axis=-1)
        return [_Answer(scores=rows, boxes=each) for rows, each in zip(means, boxes, strict=True)]

    def _spans(self, labels: Sequence[str]) -> list[tuple[int, int]]:
        """Where each text's tokens stand in the sentence: after the mark of its beginning, a full stop between two."""
        spans, begin = [], 1
        for label in labels:
            end = begin + len(self._read(_plain(label), add_special_tokens=False)["input_ids"])
            spans.append((begin, end))
            begin = end + 1
        return spans

    def _read(self, texts: str | list[str], **how: Any) -> Any:
        with self._reading:
            return self._tokenizer(texts, verbose=False, **how)

    def _run(self, looks: Sequence[_Look], **texts: Any) -> tuple[Any, Any]:
        torch = self._torch
        pixels = torch.from_numpy(np.stack([look.pixels for look in looks]))
        with self._lock, torch.inference_mode():
            texts = {name: tensor.to(self.device) for name, tensor in texts.items()}
            output = self._model(pixel_values=pixels.to(self.device, self._dtype), **texts)
            return output.logits.float().sigmoid().cpu().numpy(), output.pred_boxes.float().cpu().numpy()


def _look(detector: _Detector, request: GenerationRequest) -> _Look | BadRequestError:
    """The request as the model takes it, or why it takes none."""
    labels = tuple(dict.fromkeys(request.params["labels"]))
    if refusal := detector.refusal(labels):
        return BadRequestError(refusal, reason="not_applicable")
    try:
        picture = read_picture(request.images[0]).convert("RGB")
        pixels = detector.prepared(picture)
    except BadRequestError as error:
        return error
    except ValueError as error:  # a picture so narrow that nothing is left of it
        return BadRequestError(f"the picture cannot be prepared for the model: {error}", reason="not_applicable")
    return _Look(pixels=pixels, labels=labels, size=(picture.height, picture.width))


def _texts(labels: Any) -> list[str] | None:
    """The texts, or None where it is something else."""
    if not isinstance(labels, list | tuple) or not labels:
        return None
    return list(labels) if all(isinstance(label, str) and label.strip() for label in labels) else None


def _plain(label: str) -> str:
    return label.strip().lower()


def _sentence(labels: Sequence[str]) -> str:
    """All texts as one, the way Grounding DINO was taught."""
    return ". ".join(map(_plain, labels)) + "."
