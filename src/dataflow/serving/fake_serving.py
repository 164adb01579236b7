"""A serving without a model: deterministic pictures and scripted failures, for tests and dry runs."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow.errors import (
    BadOutputError,
    ConfigError,
    FatalServingError,
    OutOfMemoryError,
    RateLimitError,
    RefusedError,
    RetryError,
)
from dataflow.picture_files import read_bytes
from dataflow.types import GenerationRequest, GenerationResult, ImageStore, Serving

FAULTS = (
    "refuse",
    "rate_limit",
    "error",
    "crash",
    "kill",
    "hang",
    "out_of_memory",
    "garbage",
    "black",
    "fatal",
)


class FakeServing(Serving):
    """Paints a picture that depends on the prompt, the seed and the content of the input images, and on nothing else.

    Args:
        image_io: where the images go; None makes it answer with text.
        batch_size: largest batch.
        concurrency: batches at once.
        seconds: how long a batch takes, slept without using the processor.
        size: (width, height) of the pictures in pixels, where the request says nothing.
        images_per_prompt: how many images each prompt asks for.
        model: name that goes into the fingerprint.
        params: default generation parameters; they change request ids, not pictures.
        script: what goes wrong: a word in a prompt → a fault for every attempt, or a list with one fault per attempt
            (``""`` for none; after the last one it works). Faults: ``refuse``, ``rate_limit`` or
            ``rate_limit:SECONDS``, ``error`` (a lost connection), ``crash`` (an exception nobody foresaw), ``kill``
            (SIGKILL to its own process), ``hang``, ``out_of_memory``, ``garbage`` (bytes that are no image), ``black``,
            ``fatal``.
        fits: a larger batch is out of memory.
        timeout: seconds after which a call counts as hung.
        log: file that gets the id of every request at the moment its picture exists, one a line.
        processes: copies, each in a process of its own; 1 runs here.
    """

    def __init__(
        self,
        image_io: ImageStore | None = None,
        *,
        batch_size: int = 1,
        concurrency: int = 1,
        seconds: float = 0.0,
        size: tuple[int, int] = (64, 64),
        images_per_prompt: int = 1,
        model: str = "fake",
        params: Mapping[str, Any] | None = None,
        script: Mapping[str, str | Sequence[str]] | None = None,
        fits: int | None = None,
        timeout: float | None = None,
        log: str | os.PathLike[str] | None = None,
        processes: int = 1,
    ) -> None:
        for faults in (script or {}).values():
            for fault in [faults] if isinstance(faults, str) else faults:
                if fault and fault.partition(":")[0] not in FAULTS:
                    raise ConfigError(f"unknown fault {fault!r}; there are {', '.join(FAULTS)}")
        self.image_io = image_io
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.seconds = seconds
        self.size = size
        self.images_per_prompt = images_per_prompt
        self.model = model
        self.params = dict(params or {})
        self.script = dict(script or {})
        self.fits = fits
        self.timeout = timeout
        self.log = log
        self.processes = processes
        self._attempts: Counter[str] = Counter()

    def fingerprint(self) -> Mapping[str, Any]:
        return {"model": self.model, "revision": "1"}

    def default_params(self) -> Mapping[str, Any]:
        return {"width": self.size[0], "height": self.size[1], **self.params}

    def batch_key(self, request: GenerationRequest) -> Hashable:
        return request.size

    def replicas(self) -> Sequence[Serving]:
        if self.processes == 1:
            return [self]
        twin = copy.copy(self)
        twin.processes = 1
        return [twin] * self.processes

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        started = time.perf_counter()
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.fits is not None and len(requests) > self.fits:
            raise OutOfMemoryError(f"a batch of {len(requests)} does not fit, {self.fits} would")
        answers = [await self._answer(request) for request in requests]
        share = (time.perf_counter() - started) / len(requests)
        if self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.writelines(f"{request.request_id}\n" for request in requests)
        return [
            answer
            if isinstance(answer, GenerationResult)
            else GenerationResult(images=(answer,), seconds=share, provenance={"batch_size": len(requests)})
            for answer in answers
        ]

    async def _answer(self, request: GenerationRequest) -> GenerationResult | Image.Image:
        fault = self._fault(request)
        match fault.partition(":")[0]:
            case "refuse":
                return GenerationResult(error=RefusedError("the fake service declines this prompt"))
            case "rate_limit":
                seconds = fault.partition(":")[2]
                raise RateLimitError("too many requests", retry_after=float(seconds) if seconds else 0.01)
            case "error":
                raise RetryError("connection lost")
            case "crash":
                raise RuntimeError("scripted crash")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                await asyncio.sleep(3600)
            case "out_of_memory":
                raise OutOfMemoryError("scripted: out of memory")
            case "garbage":
                return GenerationResult(images=(b"<html>502 Bad Gateway</html>",))
            case "black":
                return GenerationResult(error=BadOutputError("all pixels are black", reason="black"))
            case "fatal":
                raise FatalServingError("scripted: the key is not valid")
        if self.image_io is None:
            return GenerationResult(text=f"{request.prompt} ({request.seed})")
        return paint(request, request.size or self.size)

    def _fault(self, request: GenerationRequest) -> str:
        for word, faults in self.script.items():
            if word in request.prompt:
                if isinstance(faults, str):
                    return faults
                attempt = self._attempts[request.request_id]
                self._attempts[request.request_id] += 1
                return faults[attempt] if attempt < len(faults) else ""
        return ""


def paint(request: GenerationRequest, size: tuple[int, int]) -> Image.Image:
    """The picture of a request: an 8 × 8 pattern of coloured tiles, RGB, ``size`` = (width, height)."""
    digest = hashlib.sha256(f"{request.seed}\n{request.prompt}".encode("utf-8", "surrogatepass"))
    for path in request.images:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    rng = np.random.default_rng(int.from_bytes(digest.digest()[:8]))
    tiles = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)
