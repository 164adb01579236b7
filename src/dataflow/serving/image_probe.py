"""What a picture is and what its pixels say, without any model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from dataflow.errors import ServingError
from dataflow.metrics import hashing, pixels
from dataflow.serving.pictures import input_bytes, read_picture
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.types import GenerationRequest

VERSION = 1
"""To be raised when a figure changes its meaning: then everything is measured again."""


class ImageProbeServing(ScoringServing):
    """Measures pictures: size, format, hashes and pixel statistics (:mod:`dataflow.metrics.pixels`).

    An answer is ``{"width", "height", "format", "mode", "bytes", "sha256", "phash", "dhash", "brightness", "contrast",
    "dark", "bright", "entropy", "sharpness", "saturation", "colourfulness", "uniform", "near_black"}``; the perceptual
    hashes are 16 hex digits.

    Args:
        batch_size: pictures per call.
        concurrency: calls at once, each in a thread; None for as many as there are cores.
    """

    num_cpus = None

    def __init__(self, batch_size: int = 16, concurrency: int | None = None) -> None:
        self.batch_size = batch_size
        self.concurrency = concurrency or os.cpu_count() or 1

    def fingerprint(self) -> Mapping[str, Any]:
        """The kind of measurement and its version."""
        return {"model": "image-probe", "version": VERSION}

    def preflight(self) -> None:
        """As :meth:`setup`: a picture should not be paid for that can then not be measured."""
        self.setup()

    def setup(self) -> None:
        """Find the library of perceptual hashes.

        Raises:
            MissingExtraError: it is not installed.
        """
        hashing.phash(Image.new("RGB", (32, 32)))

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        """The measurements of each request's first picture."""
        return [self._measure(request) for request in requests]

    def _measure(self, request: GenerationRequest) -> Scored:
        path = request.images[0]
        try:
            picture = read_picture(path)
            data = input_bytes(path)
        except ServingError as error:
            return error
        with Image.open(BytesIO(data)) as image:
            kind, mode = image.format, image.mode
        found = asdict(pixels.measure(np.asarray(picture)))
        exposure = found.pop("exposure")
        return {
            "width": picture.width,
            "height": picture.height,
            "format": kind,
            "mode": mode,
            "bytes": len(data),
            "sha256": request.image_hashes[0] if request.image_hashes else None,
            "phash": f"{hashing.phash(picture):016x}",
            "dhash": f"{hashing.dhash(picture):016x}",
            **exposure,
            **found,
        }
