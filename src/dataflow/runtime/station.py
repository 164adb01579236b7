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
        self.starting: asyncio.Task[None] | None = None


class Stations:
    """All workers of a run. They may stand in for each other: the run then ends with the last one.

    Args:
        stations: all of them.
        stand_in: whether they stand in for each other, as those of a remote serving do.
    """

    def __init__(self, stations: Sequence[Station], *, stand_in: bool) -> None:
        self.all = tuple(stations)
        self._stand_in = stand_in

    def others(self, station: Station) -> bool:
        """Whether another station can take this one's work."""
        return self._stand_in and any(other is not station and other.closed is None for other in self.all)

    async def ready(self, station: Station, over: asyncio.Event) -> bool:
        """Wait until a station's worker can work; one that is not up is started, also for the second time.

        Args:
            station: which.
            over: set when there is nothing left to do.

        Returns:
            False if there is nothing for it to do any more, or it does not start and others stand in for it.

        Raises:
            FatalServingError: the serving does not load; of several that stand in for each other, none does.
            ConfigError: likewise.
        """
        if station.closed is not None or over.is_set():
            return False
        if station.starting is None or (station.starting.done() and not station.worker.up):
            station.starting = asyncio.create_task(station.worker.start())
        starting = station.starting
        if not starting.done():
            waiting = asyncio.create_task(over.wait())
            try:
                await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if not starting.done():
                return False
        try:
            starting.result()
        except (FatalServingError, ConfigError) as error:
            if not self._stand_in:
                raise
            if station.closed is None:
                station.closed = error
                if self.others(station):
                    logger.warning("one worker is not used: %s", error)
            if not self.others(station):
                raise next(each.closed for each in self.all if each.closed is not None) from None
            return False
        return True

    def close(self, station: Station, error: ServingError) -> bool:
        """No more work for this station; False if there is no other that could take it."""
        if not self.others(station):
            return False
        if station.closed is None:
            station.closed = error
            logger.warning("one worker is given up, the others go on: %s", error)
        return True

    async def stop(self) -> None:
        """Stop every worker."""
        starting = [station.starting for station in self.all if station.starting is not None]
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(station.worker.stop() for station in self.all))
