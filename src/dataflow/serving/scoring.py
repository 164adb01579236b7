"""What every model that scores pictures on this machine shares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dataflow.errors import ServingError
from dataflow.types import GenerationRequest, GenerationResult, Serving

Scored = Mapping[str, Any] | float | ServingError


class ScoringServing(Serving):
    """A serving whose answer is a score: a number, or an object of numbers, as JSON text.

    A subclass says its :meth:`fingerprint` and how to :meth:`score` a batch.
    """

    image_io = None

    def score(self, requests: Sequence[GenerationRequest]) -> Sequence[Scored]:
        """One score, or why there is none, for each request; runs in a thread.

        Raises:
            ServingError: the batch failed whole.
        """
        raise NotImplementedError

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """The scores as text."""
        started = time.perf_counter()
        scores = await asyncio.to_thread(self._scores, requests)
        seconds = (time.perf_counter() - started) / max(1, len(requests))
        return [_result(score, seconds) for score in scores]

    def _scores(self, requests: Sequence[GenerationRequest]) -> Sequence[Scored]:
        try:
            return self.score(requests)
        except StopIteration as error:  # a future cannot carry it: whoever waits would wait for ever
            raise RuntimeError("StopIteration left score()") from error


def _result(score: Scored, seconds: float) -> GenerationResult:
    if isinstance(score, ServingError):
        return GenerationResult(error=score, seconds=seconds)
    return GenerationResult(text=orjson.dumps(score, option=orjson.OPT_SERIALIZE_NUMPY).decode(), seconds=seconds)
