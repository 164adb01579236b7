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
from pathlib import Path
from typing import Any

from dataflow.errors import RunInterruptedError, RunStoppedError
from dataflow.runtime.ray_worker import Cluster, RayPool, RayWorker
from dataflow.runtime.station import Station, Stations
from dataflow.runtime.worker import InlineWorker, ProcessWorker, Worker
from dataflow.types import Serving

GIVE_UP_SECONDS = 2.0
"""How long a second Ctrl-C waits for the serving to be cleaned up."""


class Crew:
    """Has the workers from the first batch on, and keeps them until :meth:`close`.

    Args:
        serving: whose replicas they run.
        folder: the cache folder.
        cluster: where they run; None for this machine.

    Attributes:
        stations: none before :meth:`gather`.
        halted: set when the step stops before its end.
        interrupted: by Ctrl-C; None if it was not.
    """

    def __init__(self, serving: Serving, folder: Path, cluster: Cluster | None = None) -> None:
        self._serving, self._folder, self._cluster = serving, folder, cluster
        self.stations = Stations([], stand_in=serving.remote)
        self.halted = asyncio.Event()
        self.interrupted: RunInterruptedError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._given_up = False

    def gather(self, fingerprint: Mapping[str, Any]) -> None:
        """Make the workers, if they are not there yet; each is started by the first of its lanes.

        Args:
            fingerprint: what the images' metadata says of the model.
        """
        if self.stations.all:
            return
        serving = self._serving
        if self._cluster is not None and not serving.detached:
            workers = self._on_cluster(self._cluster, fingerprint)
        else:
            replicas = serving.replicas()
            kind = InlineWorker if len(replicas) == 1 or serving.remote else ProcessWorker
            workers = [(kind(each, fingerprint), each) for each in replicas]
        stations = [Station(worker, each, self.halted) for worker, each in workers]
        self.stations = Stations(stations, stand_in=serving.remote or self._cluster is not None)

    def _on_cluster(self, cluster: Cluster, fingerprint: Mapping[str, Any]) -> list[tuple[Worker, Serving]]:
        """An actor for each copy; of a remote serving several for each endpoint, whose limits they share."""
        serving, count = self._serving, cluster.count(self._serving)

        def actor(of: Serving) -> RayWorker:
            return RayWorker(cluster, of, fingerprint, self._folder)

        if not serving.remote:
            return [(actor(serving), serving) for _ in range(count)]
        return [(RayPool([actor(each) for _ in range(count)]), each) for each in serving.replicas()]

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
