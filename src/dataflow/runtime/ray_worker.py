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
import math
import os
import secrets
import socket
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflow import __version__
from dataflow.errors import (
    ConfigError,
    FatalServingError,
    MissingExtraError,
    RetryError,
    ServingError,
    WorkerDiedError,
)
from dataflow.runtime.worker import InlineWorker, Item, sendable
from dataflow.types import GenerationRequest, Serving

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started for one run: nothing but requests and records goes through it."""
STOP_SECONDS = 30.0
CONNECT_SECONDS = 10.0


class Cluster:
    """A connection to Ray, made when it is first needed and kept for the steps that follow.

    Args:
        address: of a cluster that is there (``auto``, ``host:6379``); None takes the one that the process is connected
            to, or that ``RAY_ADDRESS`` names, or starts one on this machine that ends with the process.
        workers: actors to run; None for as many as there is room for, or one on each machine for a remote serving.

    Raises:
        MissingExtraError: ray is not installed.
        ConfigError: there is no cluster at the address.
    """

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._workers = workers
        self.ray = _ray()
        if self.ray.is_initialized():
            return
        address = address or os.environ.get("RAY_ADDRESS") or None
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            cpus = max(os.cpu_count() or 1, workers or 1)
            options |= {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        else:
            _reach(address)
        try:
            self.ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {error}") from error

    def resources(self, serving: Serving) -> dict[str, float]:
        """What one actor asks for, as Ray takes it.

        Raises:
            ConfigError: the cluster has nothing of the kind.
        """
        gpus = serving.num_gpus
        there = self.ray.cluster_resources()
        if gpus is None:
            gpus = 1.0 if there.get("GPU") else 0.0
        wanted = {"num_cpus": serving.num_cpus, "num_gpus": gpus}
        if serving.memory_gb:
            wanted["memory"] = serving.memory_gb * 1e9
        return wanted

    def count(self, serving: Serving) -> int:
        """How many actors to run."""
        if self._workers is not None:
            return self._workers
        if serving.remote:
            return sum(1 for node in self.ray.nodes() if node["Alive"])
        there, wanted = self.ray.cluster_resources(), self.resources(serving)
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        rooms = [math.floor(there.get(names[name], 0) / amount + 1e-9) for name, amount in wanted.items() if amount]
        return max(1, min(rooms, default=1))


class RayWorker:
    """A copy of a serving in an actor; when the actor dies, a new one is asked for.

    Args:
        cluster: where it runs.
        serving: sent to the actor, which sets it up.
        fingerprint: what the images' metadata says of the model.
        folder: the cache folder, which the actor must see.
    """

    def __init__(self, cluster: Cluster, serving: Serving, fingerprint: Mapping[str, Any], folder: Path) -> None:
        # One batch more than may be made at once waits over there, so that the way here and back costs no time.
        self.concurrency = serving.concurrency + max(serving.ahead, int(not serving.remote))
        self._cluster = cluster
        self._timeout = None if serving.timeout is None else 2 * serving.timeout
        self._resources = cluster.resources(serving)
        self._folder = folder
        try:
            self._payload: bytes = cluster.ray.cloudpickle.dumps((serving, dict(fingerprint)))
        except Exception as error:  # whatever a class does when it is packed
            raise ConfigError(f"{type(serving).__name__} cannot be sent to a worker process: {error}") from error
        self._actor: Any = None
        self._held: dict[int, tuple[Any, int]] = {}
        self._tickets = itertools.count()
        self._starting = asyncio.Lock()
        self._loaded_once = False
        self.in_hand = 0

    async def start(self) -> None:
        """Ask for an actor and wait until its serving is loaded; that takes as long as there is no room for it.

        Raises:
            FatalServingError: the serving does not load, or the machine does not see the folder.
        """
        await self._living()

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make one batch and keep it over there; the ticket is for :meth:`save`.

        Raises:
            ServingError: the batch failed whole; WorkerDiedError if the actor is gone.
        """
        self.in_hand += 1
        try:
            actor = await self._living()
            try:
                there = await asyncio.wait_for(self._ask(actor, actor.generate.remote(list(requests))), self._timeout)
            except TimeoutError:
                self._kill(actor)
                message = (
                    f"no answer within {self._timeout:g} s, waiting for a batch before it included; worker restarted"
                )
                raise RetryError(message, reason="timeout") from None
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
        actor, self._actor = self._actor, None
        if actor is None:
            return
        with contextlib.suppress(ServingError, TimeoutError):
            await asyncio.wait_for(self._ask(actor, actor.stop.remote()), STOP_SECONDS)
        self._kill(actor)

    def give_up(self) -> None:
        """Drop what is under way; :meth:`stop` follows."""
        if self._actor is not None:
            self._kill(self._actor)

    async def _living(self) -> Any:
        """The actor, asked for anew if there is none (any more)."""
        async with self._starting:
            if self._actor is not None:
                return self._actor
            ray = self._cluster.ray
            actor = ray.remote(_Hand).options(**self._resources, max_restarts=0, max_task_retries=0).remote()
            token = self._folder / f".seen-{secrets.token_hex(8)}"
            token.touch()
            self._actor = actor
            places = str(Path.cwd()), str(token.absolute())
            try:
                await self._ask(actor, actor.load.remote(self._payload, *places, __version__))
            except WorkerDiedError as error:
                message = f"the worker process ended while it was loading: {error}"
                if self._loaded_once:
                    raise WorkerDiedError(message) from None
                raise FatalServingError(message) from None
            except BaseException:
                self._kill(actor)
                raise
            finally:
                token.unlink(missing_ok=True)
            self._loaded_once = True
            return actor

    async def _ask(self, actor: Any, answer: Awaitable[Any]) -> Any:
        try:
            error, body = await answer
        except self._cluster.ray.exceptions.RayActorError as death:
            if self._actor is actor:
                self._actor = None
            reason = str(death).strip().splitlines()[0] if str(death).strip() else type(death).__name__
            raise WorkerDiedError(f"the worker process died ({reason})") from None
        if error is not None:
            raise error
        return body

    def _kill(self, actor: Any) -> None:
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
        self._ready: list[RayWorker] = []
        self._held: dict[int, tuple[RayWorker, int]] = {}
        self._tickets = itertools.count()
        self._rest: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Wait until one is up; the others join when they are.

        Raises:
            FatalServingError: the serving loads in none of them.
        """
        self._rest = [asyncio.create_task(self._start(worker)) for worker in self._workers]
        waiting = set(self._rest)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            errors = [task.exception() for task in done]
            if self._ready:
                return
            if not waiting:
                raise next(error for error in errors if error is not None)

    async def _start(self, worker: RayWorker) -> None:
        try:
            await worker.start()
        except ServingError as error:
            if self._ready:
                logger.warning("one worker is not used: %s", error)
            raise
        self._ready.append(worker)

    async def generate(self, requests: Sequence[GenerationRequest]) -> int:
        """Make a batch where least is in hand; the ticket is for :meth:`save`."""
        worker = min(self._ready, key=lambda each: each.in_hand)
        there = await worker.generate(requests)
        ticket = next(self._tickets)
        self._held[ticket] = worker, there
        return ticket

    async def save(self, ticket: int) -> list[Item]:
        worker, there = self._held.pop(ticket)
        return await worker.save(there)

    async def stop(self) -> None:
        for task in self._rest:
            task.cancel()
        await asyncio.gather(*self._rest, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def give_up(self) -> None:
        """Drop what is under way; :meth:`stop` follows."""
        for worker in self._workers:
            worker.give_up()


class _Hand:
    """The actor: an :class:`~dataflow.runtime.worker.InlineWorker` that answers with errors instead of raising them."""

    def __init__(self) -> None:
        self._worker: InlineWorker | None = None
        self._room = asyncio.Semaphore()

    async def load(self, payload: bytes, folder: str, token: str, version: str) -> tuple[BaseException | None, None]:
        """Set up the serving, where the driver's folders are seen."""
        from ray import cloudpickle

        host = socket.gethostname()
        if version != __version__:
            return FatalServingError(f"machine {host} has version {__version__} of open-dataflow, not {version}"), None
        try:
            os.chdir(folder)
        except OSError as error:
            return FatalServingError(f"machine {host} does not see {folder}: {error.strerror}. {_SHARED}"), None
        if not Path(token).exists():
            where = Path(token).parent
            return FatalServingError(f"machine {host} does not see the cache folder {where}. {_SHARED}"), None
        try:
            serving, fingerprint = cloudpickle.loads(payload)
            self._worker = InlineWorker(serving, fingerprint)
            self._room = asyncio.Semaphore(serving.concurrency + serving.ahead)
            await self._worker.start()
        except (FatalServingError, ConfigError) as error:
            return sendable(error, None)
        except Exception as error:  # noqa: BLE001  a class that is not there on this machine may raise anything
            return FatalServingError(f"machine {host}: {type(error).__name__}: {error}"), None
        return None, None

    async def generate(self, requests: Sequence[GenerationRequest]) -> tuple[BaseException | None, int | None]:
        assert self._worker is not None
        try:
            async with self._room:
                return None, await self._worker.generate(requests)
        except Exception as error:  # noqa: BLE001  the engine decides what it means
            return sendable(error, None)

    async def save(self, ticket: int) -> tuple[BaseException | None, list[Item] | None]:
        assert self._worker is not None
        try:
            return sendable(None, await self._worker.save(ticket))
        except Exception as error:  # noqa: BLE001  the engine decides what it means
            return sendable(error, None)

    async def stop(self) -> tuple[None, None]:
        if self._worker is not None:
            await self._worker.stop()
        return None, None


_SHARED = "The folder must lie on a disk that all machines of the cluster share, under the same path"


def _reach(address: str) -> None:
    """Try a cluster's address: Ray itself tries for minutes.

    Raises:
        ConfigError: nobody is there.
    """
    if "://" in address:
        raise ConfigError(f"ray_address is {address!r}: start this on a machine of the cluster and name it 'auto'")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "executor='ray'") from error
    return ray
