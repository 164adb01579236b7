"""Where batches are made: one worker with limits of its own, among others that can take its work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from dataflow.errors import ConfigError, FatalServingError, ServingError
from dataflow.runtime.limits import Limiter, Room
from dataflow.runtime.worker import Worker
from dataflow.types import Serving

logger = logging.getLogger(__name__)

PATIENCE = 900.0
"""Seconds of nothing but rate limits, or of a service that is down, after which a station is given up."""


class Station:
    """One worker: a process with a GPU, or a connection to one endpoint with one key.

    Args:
        worker: makes batches.
        serving: the worker's.
        halted: set when the run stops.
    """

    def __init__(self, worker: Worker, serving: Serving, halted: asyncio.Event) -> None:
        self.worker = worker
        self.room = Room()
        self.limiter = Limiter(worker.concurrency, halted, serving.requests_per_minute)
        self.closed: ServingError | ConfigError | None = None


class Stations:
    """All workers of a run. Those of a remote serving stand in for each other: the run ends with the last one.

    Args:
        stations: at least one.
        remote: whether they stand in for each other.
    """

    def __init__(self, stations: Sequence[Station], *, remote: bool) -> None:
        self.all = tuple(stations)
        self._remote = remote

    def others(self, station: Station) -> bool:
        """Whether another station can take this one's work."""
        return self._remote and any(other is not station and other.closed is None for other in self.all)

    async def start(self) -> None:
        """Start every worker.

        Raises:
            FatalServingError: the serving does not load; of several endpoints, none does.
            ConfigError: likewise.
        """
        tasks = [asyncio.create_task(self._start(station)) for station in self.all]
        await asyncio.gather(*tasks)
        errors = [station.closed for station in self.all if station.closed is not None]
        if len(errors) == len(self.all):
            raise errors[0]
        for error in errors:
            logger.warning("one endpoint is not used: %s", error)

    async def _start(self, station: Station) -> None:
        try:
            await station.worker.start()
        except (FatalServingError, ConfigError) as error:
            if not self._remote:
                raise
            station.closed = error

    def close(self, station: Station, error: ServingError) -> bool:
        """No more work for this station; False if there is no other that could take it."""
        if not self.others(station):
            return False
        if station.closed is None:
            station.closed = error
            logger.warning("one endpoint is given up, the others go on: %s", error)
        return True

    async def stop(self) -> None:
        """Stop every worker."""
        await asyncio.gather(*(station.worker.stop() for station in self.all))
