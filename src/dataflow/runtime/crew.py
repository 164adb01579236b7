"""The workers of a step and the loop they live in, from its first batch to its last, over all parts of its table.

The asyncio loop lives in a thread of its own, so that a run works the same from a script, in a notebook whose main
thread already has a loop, and under Ctrl-C: the first one lets the batches in flight end and be saved, the second one
gives them up. Either way the next run goes on where this one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent import futures
from typing import Any

from dataflow.errors import RunInterruptedError, RunStoppedError
from dataflow.runtime.ray_cluster import Cluster
from dataflow.runtime.ray_worker import workers_on
from dataflow.runtime.station import Station, Stations
from dataflow.runtime.worker import InlineWorker, ProcessWorker, Worker
from dataflow.types import Serving

GIVE_UP_SECONDS = 2.0
"""How long a second Ctrl-C waits for the serving to be cleaned up."""


class Crew:
    """Has the workers from the first batch on, and keeps them until :meth:`close`.

    Args:
        serving: whose replicas they run.
        cluster: where they run; None for this machine.

    Attributes:
        stations: none before :meth:`gather`.
        halted: set when the step stops before its end.
        interrupted: by Ctrl-C; None if it was not.
    """

    def __init__(self, serving: Serving, cluster: Cluster | None = None) -> None:
        self._serving, self._cluster = serving, cluster
        # On a cluster machines come and go: what one cannot do another can.
        self._stand_in = serving.remote or cluster is not None
        self.stations = Stations([], stand_in=self._stand_in)
        self.halted = asyncio.Event()
        self.interrupted: RunInterruptedError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._given_up = False

    async def gather(self, fingerprint: Mapping[str, Any]) -> None:
        """Make the workers, if they are not there yet; each is started by the first of its lanes.

        Args:
            fingerprint: what the images' metadata says of the model.

        Raises:
            ConfigError: there is no cluster, or no place on it for the serving.
            OSError: a folder cannot be written.
        """
        if self.stations.all:
            return
        if self._cluster is None:
            workers = self._here(fingerprint)
        else:
            await asyncio.to_thread(self._cluster.connect)
            workers = workers_on(self._cluster, self._serving, fingerprint)
        stations = [Station(worker, each, self.halted) for worker, each in workers]
        self.stations = Stations(stations, stand_in=self._stand_in)

    def _here(self, fingerprint: Mapping[str, Any]) -> list[tuple[Worker, Serving]]:
        replicas = self._serving.replicas()
        kind = InlineWorker if len(replicas) == 1 or self._serving.remote else ProcessWorker
        return [(kind(each, fingerprint), each) for each in replicas]

    def run(self, main: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[RunStoppedError], None]) -> None:
        """Run a coroutine in the loop and wait for it, also through Ctrl-C.

        Args:
            main: what is to be done.
            stop: told in the loop's thread that no new work may begin; what is under way ends.

        Raises:
            RunInterruptedError: a second Ctrl-C gave up what was under way.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="dataflow", daemon=True)
            self._thread.start()
        ending = asyncio.run_coroutine_threadsafe(main(), self._loop)
        try:
            _wait(ending)
        except KeyboardInterrupt:
            error = self.interrupted = RunInterruptedError("interrupted: run the same command again to go on")
            try:
                self._loop.call_soon_threadsafe(stop, error)
                print("\nCtrl-C: finishing the batches in flight; press it again to give them up.", file=sys.stderr)
                _wait(ending)
            except KeyboardInterrupt:
                self._given_up = True
                self._loop.call_soon_threadsafe(self._give_up)
                with contextlib.suppress(KeyboardInterrupt, TimeoutError):
                    _wait(ending, GIVE_UP_SECONDS)
                # A serving may hold up the loop, which then has not even heard of the first one.
                raise error from None
        ending.result()

    def close(self) -> None:
        """Stop the workers and the loop."""
        if self._loop is None or self._thread is None:
            return
        stopping = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        with contextlib.suppress(KeyboardInterrupt, TimeoutError):
            _wait(stopping, GIVE_UP_SECONDS if self._given_up else None)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._cluster is not None:
            self._cluster.close()
        if stopping.done():
            self._thread.join()
            self._loop.close()
            stopping.result()

    async def _stop(self) -> None:
        await self.stations.stop()
        await asyncio.get_running_loop().shutdown_asyncgens()

    def _give_up(self) -> None:
        """Drop what is in flight; what was started is forgotten, and the workers are stopped."""
        for station in self.stations.all:
            station.worker.give_up()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()


def _wait(ending: futures.Future[None], seconds: float | None = None) -> None:
    # In small steps, so that Ctrl-C gets through on every platform.
    until = None if seconds is None else time.monotonic() + seconds
    while not ending.done():
        if until is not None and time.monotonic() > until:
            raise TimeoutError
        futures.wait((ending,), 0.5)
