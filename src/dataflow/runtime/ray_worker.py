"""Workers on a Ray cluster: each is an actor that runs a copy of a serving and writes its own pictures.

Ray finds a place for actors, starts them and tells when they are gone; what a batch is, what is tried again, how fast a
service is asked and what may be spent stays with the engine, which sees a worker like any other. Pixels never travel: a
picture is written by the actor that made it, on the disk that all machines share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dataflow import __version__
from dataflow.errors import (
    ConfigError,
    FatalServingError,
    RetryError,
    ServingError,
    WorkerDiedError,
)
from dataflow.runtime.limits import HeldBackError
from dataflow.runtime.ray_cluster import Cluster
from dataflow.runtime.worker import InlineWorker, Item, Worker, sendable
from dataflow.types import GenerationRequest, Serving

logger = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long a serving may take to be cleaned up."""
NOTICE_SECONDS = 20.0
"""After so long without room for it, a worker that is waited for is mentioned."""
MOST_LOST = 3
"""So many machines in a row may be lost under a worker that is about to begin."""

_SHARED = "It must lie on a disk that all machines of the cluster share, under the same path"

Report: TypeAlias = tuple[BaseException | None, Any, list[tuple[str, int, str]]]
"""What an actor answers: an error, an answer, and what was logged meanwhile as (logger, level, message)."""


def workers_on(cluster: Cluster, serving: Serving, fingerprint: Mapping[str, Any]) -> list[tuple[Worker, Serving]]:
    """The workers of a step, each with the serving whose limits it keeps: one for each copy, or for each endpoint.

    Args:
        cluster: connected.
        serving: what they run.
        fingerprint: what the images' metadata says of the model.

    Raises:
        ConfigError: the serving cannot be sent, or the cluster has no place for it.
        OSError: a folder cannot be written.
    """
    resources = cluster.resources(serving)
    count = cluster.count(serving, resources)
    if not serving.remote:
        cargo = _Cargo.of(cluster, serving, fingerprint)
        return [(RayWorker(cluster, serving, cargo, resources), serving) for _ in range(count)]
    found: list[tuple[Worker, Serving]] = []
    for each in serving.replicas():
        cargo = _Cargo.of(cluster, each, fingerprint)
        found.append((RayPool([RayWorker(cluster, each, cargo, resources) for _ in range(count)]), each))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cargo:
    """What an actor gets to begin with.

    Attributes:
        payload: the serving and the fingerprint, packed; classes of the user's script go along.
        folder: the working directory, which relative paths are relative to.
        marks: files it must see, with what stands in them.
        environment: variables that the serving reads, as they are here.
        version: of this package.
    """

    payload: bytes
    folder: str
    marks: Mapping[str, str]
    environment: Mapping[str, str]
    version: str = __version__

    @classmethod
    def of(cls, cluster: Cluster, serving: Serving, fingerprint: Mapping[str, Any]) -> _Cargo:
        try:
            payload: bytes = cluster.ray.cloudpickle.dumps((serving, dict(fingerprint)))
        except Exception as error:  # whatever a class does when it is packed
            raise ConfigError(f"{type(serving).__name__} cannot be sent to a worker process: {error}") from error
        given = {name: os.environ[name] for name in serving.environment if name in os.environ}
        return cls(payload=payload, folder=str(Path.cwd()), marks=cluster.marks(serving), environment=given)


class RayWorker:
    """A copy of a serving in an actor. When the actor dies, :meth:`start` asks for another one.

    Args:
        cluster: where it runs.
        serving: set up by the actor.
        cargo: what is sent there.
        resources: what the actor takes.
    """

    def __init__(self, cluster: Cluster, serving: Serving, cargo: _Cargo, resources: Mapping[str, float]) -> None:
        # One batch more than may be made at once waits over there, so that the way here and back costs no time.
        self.concurrency = serving.concurrency + max(serving.ahead, int(not serving.remote))
        self.in_hand = 0
        self._cluster, self._cargo, self._resources = cluster, cargo, resources
        self._remote = serving.remote
        self._timeout = None if serving.timeout is None else 2 * serving.timeout
        self._actor: Any = None
        self._beginning: Any = None
        self._where = ""
        self._loaded_once = False
        self._held: dict[int, tuple[Any, int]] = {}
        self._tickets = itertools.count()

    @property
    def up(self) -> bool:
        """Whether there is an actor and its serving is loaded."""
        return self._actor is not None

    async def start(self) -> None:
        """Ask for an actor and wait until its serving is loaded; that takes as long as there is no room for it.

        Raises:
            FatalServingError: the serving does not load, or the machine does not see the folders.
            ConfigError: likewise.
        """
        for lost in itertools.count(1):
            try:
                await self._begin()
            except WorkerDiedError as error:
                if lost == MOST_LOST:
                    raise FatalServingError(f"{lost} workers in a row ended before they began: {error}") from None
                logger.warning("a worker ended before it began, another one is asked for: %s", error)
            else:
                return

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make one batch and keep it over there; the ticket is for :meth:`save`.

        Raises:
            HeldBackError: there is no actor at the moment.
            ServingError: the batch failed whole; WorkerDiedError if the actor is gone.
        """
        actor = self._actor
        if actor is None:
            raise HeldBackError
        self.in_hand += 1
        try:
            there = await asyncio.wait_for(self._ask(actor, actor.generate.remote(list(requests))), self._timeout)
        except TimeoutError:
            self._lose(actor)
            message = f"no answer within {self._timeout:g} s, waiting for a batch before it included; worker restarted"
            raise RetryError(message, reason="timeout") from None
        except RetryError as error:
            if error.reason == "timeout" and not self._remote:
                self._lose(actor)  # what hangs in there holds up all that follows
            raise
        finally:
            self.in_hand -= 1
        ticket = next(self._tickets)
        self._held[ticket] = actor, there
        return ticket

    async def save(self, ticket: int) -> list[Item]:
        """Have the pictures of a batch written.

        Raises:
            OSError: the disk is full or not writable.
            WorkerDiedError: the actor is gone, the batch with it.
        """
        actor, there = self._held.pop(ticket)
        return await self._ask(actor, actor.save.remote(there))

    async def stop(self) -> None:
        """Have the serving cleaned up and end the actor."""
        actor, self._actor = self._actor, None
        if actor is None:
            return
        with contextlib.suppress(ServingError, TimeoutError):
            await asyncio.wait_for(self._ask(actor, actor.stop.remote()), STOP_SECONDS)
        self._lose(actor)

    def give_up(self) -> None:
        """Drop what is under way; :meth:`stop` follows."""
        for actor in (self._actor, self._beginning):
            if actor is not None:
                self._lose(actor)

    async def _begin(self) -> None:
        ray = self._cluster.ray
        spread = {"scheduling_strategy": "SPREAD"} if self._remote else {}
        actor = ray.remote(DataflowWorker).options(
            **self._resources, **spread, max_restarts=0, max_task_retries=0, max_concurrency=2 * self.concurrency + 8
        )
        actor = self._beginning = actor.remote()
        notice = asyncio.get_running_loop().call_later(NOTICE_SECONDS, self._tell_of_waiting)
        placed = False
        try:
            self._where = await self._ask(actor, actor.arrive.remote(self._cargo))
            notice.cancel()
            placed = True
            await self._ask(actor, actor.load.remote(self._cargo.payload))
        except WorkerDiedError as error:
            if placed and not self._loaded_once and not _is_machine_lost(error):
                message = f"the worker process on {self._where} ended while it was loading: {error}"
                raise FatalServingError(message) from None
            raise
        except BaseException:
            self._lose(actor)
            raise
        finally:
            notice.cancel()
            self._beginning = None
        self._loaded_once = True
        self._actor = actor

    def _tell_of_waiting(self) -> None:
        takes = ", ".join(f"{name}={amount:g}" for name, amount in self._resources.items() if amount)
        logger.warning("no room on the cluster yet for a worker that takes %s: it joins when there is", takes)

    async def _ask(self, actor: Any, answer: Awaitable[Report]) -> Any:
        exceptions = self._cluster.ray.exceptions
        try:
            error, body, logged = await answer
        except exceptions.RayTaskError as failure:
            raise ServingError(_last_line(failure), reason="crash") from None
        except exceptions.RayError as death:
            # It may be alive and out of reach: what it was given is tried elsewhere.
            self._lose(actor)
            if getattr(death, "actor_init_failed", False):
                raise FatalServingError(
                    f"a worker cannot begin: {_last_line(death)}. Every machine of the cluster needs open-dataflow "
                    f"{__version__}"
                ) from None
            raise WorkerDiedError(f"the worker process died ({_reason(death)})") from None
        for name, level, message in logged:
            logging.getLogger(name).log(level, "%s: %s", self._where, message)
        if error is not None:
            raise error
        return body

    def _lose(self, actor: Any) -> None:
        if self._actor is actor:
            self._actor = None
        with contextlib.suppress(Exception):  # it may be gone, or the cluster with it
            self._cluster.ray.kill(actor)


class RayPool:
    """Several actors behind one endpoint of a service: its limits hold for all of them together.

    Args:
        workers: at least one.
    """

    def __init__(self, workers: Sequence[RayWorker]) -> None:
        self.concurrency = workers[0].concurrency
        self._workers = tuple(workers)
        self._starting: dict[RayWorker, asyncio.Task[None]] = {}
        self._useless: dict[RayWorker, ServingError | ConfigError] = {}
        self._held: dict[int, tuple[RayWorker, int]] = {}
        self._tickets = itertools.count()

    @property
    def up(self) -> bool:
        """Whether there is one that can work."""
        return any(worker.up for worker in self._workers)

    async def start(self) -> None:
        """Wait until one is up; the others join when they are.

        Raises:
            FatalServingError: the serving loads in none of them.
            ConfigError: likewise.
        """
        self._complete()
        while not self.up:
            if len(self._useless) == len(self._workers):
                raise next(iter(self._useless.values()))
            await asyncio.wait(self._starting.values(), return_when=asyncio.FIRST_COMPLETED)
            self._complete()

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make a batch where least is in hand; the ticket is for :meth:`save`.

        Raises:
            HeldBackError: no actor is there at the moment.
            ServingError: the batch failed whole; WorkerDiedError if the actor is gone.
        """
        self._complete()
        worker = min((each for each in self._workers if each.up), key=lambda each: each.in_hand, default=None)
        if worker is None:
            raise HeldBackError
        there = await worker.generate(requests)
        ticket = next(self._tickets)
        self._held[ticket] = worker, there
        return ticket

    async def save(self, ticket: int) -> list[Item]:
        """Have the pictures of a batch written, where it was made."""
        worker, there = self._held.pop(ticket)
        return await worker.save(there)

    async def stop(self) -> None:
        """End all actors."""
        for task in self._starting.values():
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def give_up(self) -> None:
        """Drop what is under way; :meth:`stop` follows."""
        for worker in self._workers:
            worker.give_up()

    def _complete(self) -> None:
        """Ask for an actor for each worker that has none."""
        for worker in self._workers:
            if not worker.up and worker not in self._starting and worker not in self._useless:
                self._starting[worker] = asyncio.create_task(self._start(worker))

    async def _start(self, worker: RayWorker) -> None:
        try:
            await worker.start()
        except (FatalServingError, ConfigError) as error:
            self._useless[worker] = error
            if len(self._useless) < len(self._workers):
                logger.warning("one worker is not used: %s", error)
        finally:
            del self._starting[worker]


class DataflowWorker:
    """The actor: an :class:`~dataflow.runtime.worker.InlineWorker` that answers with errors instead of raising them."""

    def __init__(self) -> None:
        self._worker: InlineWorker | None = None
        self._room = asyncio.Semaphore()
        self._saving: dict[int, asyncio.Task[list[Item]]] = {}
        self._log = _Collector()
        logging.getLogger("dataflow").addHandler(self._log)

    async def arrive(self, cargo: _Cargo) -> Report:
        """Find out whether this machine can work for the driver; its name."""
        host = socket.gethostname()
        if cargo.version != __version__:
            return self._report(FatalServingError(f"{host} has open-dataflow {__version__}, not {cargo.version}"))
        try:
            os.chdir(cargo.folder)
        except OSError as error:
            message = f"{host} does not see the working directory {cargo.folder}: {error.strerror}. {_SHARED}"
            return self._report(FatalServingError(message))
        for path, word in cargo.marks.items():
            try:
                seen = Path(path).read_text()
            except OSError:
                seen = ""
            if seen != word:
                return self._report(FatalServingError(f"{host} does not see the folder {Path(path).parent}. {_SHARED}"))
        os.environ.update(cargo.environment)
        return self._report(None, host)

    async def load(self, payload: bytes) -> Report:
        """Set up the serving."""
        from ray import cloudpickle

        try:
            serving, fingerprint = cloudpickle.loads(payload)
            self._worker = InlineWorker(serving, fingerprint)
            self._room = asyncio.Semaphore(serving.concurrency + serving.ahead)
            await self._worker.start()
        except (FatalServingError, ConfigError) as error:
            return self._report(error)
        except Exception as error:  # noqa: BLE001  a class that is not there on this machine may raise anything
            return self._report(FatalServingError(f"{socket.gethostname()}: {type(error).__name__}: {error}"))
        return self._report(None)

    async def generate(self, requests: Sequence[GenerationRequest]) -> Report:
        """The ticket of the made batch, whose pictures are written from now on: nobody has to be alive to ask."""
        assert self._worker is not None
        try:
            async with self._room:
                ticket = await self._worker.generate(requests)
        except Exception as error:  # noqa: BLE001  the engine decides what it means
            return self._report(error)
        self._saving[ticket] = asyncio.create_task(self._worker.save(ticket))
        return self._report(None, ticket)

    async def save(self, ticket: int) -> Report:
        """What became of each request of a batch."""
        try:
            return self._report(None, await self._saving.pop(ticket))
        except Exception as error:  # noqa: BLE001  the engine decides what it means
            return self._report(error)

    async def stop(self) -> Report:
        """Clean up the serving."""
        if self._worker is not None:
            await self._worker.stop()
        return self._report(None)

    def _report(self, error: BaseException | None, body: Any = None) -> Report:
        from ray import cloudpickle

        return *sendable(error, body, cloudpickle.dumps), self._log.taken()  # type: ignore[attr-defined]


class _Collector(logging.Handler):
    """Keeps what the package logs as a warning or worse until it is asked for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[str, int, str]]:
        """All that came since the last call."""
        kept, self._kept = self._kept, []
        return kept


def _is_machine_lost(error: WorkerDiedError) -> bool:
    """Whether Ray says that the whole machine is gone, or out of reach."""
    return any(words in str(error) for words in ("node has died", "node was", "unavailable", "preempted"))


def _reason(death: BaseException) -> str:
    """What Ray says of a death, without its advice and ids."""
    told = [line.strip() for line in str(death).splitlines() if line.strip()]
    told = [line for line in told if ": " not in line or "." in line] or [type(death).__name__]
    text = told[-1].partition("Some common causes")[0].strip()
    return text if len(text) <= 200 else f"{text[:199]}…"


def _last_line(error: BaseException) -> str:
    """The error at the end of a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
