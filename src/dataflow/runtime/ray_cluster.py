"""The Ray cluster of a run: reached when there is work for it, shared by the steps of a pipeline, let go at the end.

Nothing of Ray is imported before it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError, MissingExtraError
from dataflow.runtime.lock import is_alive
from dataflow.types import Serving

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started for one run: nothing but requests and records goes through it."""
CONNECT_SECONDS = 10.0
MARK = ".seen-"
"""Begins the names of files by which workers find out that they see what this process sees."""

_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""Of resources: as an actor asks for them, and as a machine has them."""


def require_ray() -> None:
    """Find out that Ray is there, without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "executor='ray'")


@contextlib.contextmanager
def kept_connection() -> Iterator[None]:
    """Within it, a connection that a step makes stays for the steps that follow. At the outermost end it is closed."""
    with _state.lock:
        _state.users += 1
    try:
        yield
    finally:
        with _state.lock:
            _state.users -= 1
            ended = None if _state.users else _state.connection
            if ended is not None:
                _state.connection = None
        if ended is not None:
            ended.close()


class Cluster:
    """What a step needs to know of its cluster.

    Args:
        address: of a cluster that is there (``auto``, ``host:6379``); None takes the one that the process is connected
            to, or that ``RAY_ADDRESS`` names, or starts one on this machine that ends with the run.
        workers: actors to run for each step, or for each endpoint of a service; None for as many as there is room for.
        folder: the cache folder, which all machines must see.

    Raises:
        MissingExtraError: ray is not installed.
    """

    def __init__(self, address: str | None, workers: int | None, folder: Path) -> None:
        require_ray()
        self.workers = workers
        self._address, self._folder = address, folder
        self._marks: dict[Path, str] = {}

    def connect(self) -> None:
        """Connect to the cluster, or start one, if this process is not connected yet.

        Raises:
            ConfigError: there is no cluster at the address.
        """
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        ray = _ray()
        with _state.lock:
            if _state.connection is not None and self._address not in (None, _state.connection.address):
                raise ConfigError(
                    f"this process is connected to the Ray cluster at {_state.connection.address} and cannot use "
                    f"{self._address} at the same time"
                )
            if ray.is_initialized():
                if ray.util.client.ray.is_connected():
                    raise ConfigError(_NO_CLIENT.format("ray.init('ray://…')"))
            else:
                _state.connection = _Connection(address, self.workers)

    @property
    def ray(self) -> Any:
        """The library, connected."""
        return _ray()

    @property
    def private(self) -> bool:
        """Whether the cluster was started for this run."""
        return _state.connection is not None and _state.connection.address == "local"

    def machines(self) -> list[Mapping[str, float]]:
        """What each machine has in all: ``CPU``, ``GPU``, ``memory``, …"""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def resources(self, serving: Serving) -> dict[str, float]:
        """What one copy asks for, as Ray takes it.

        Raises:
            ConfigError: the cluster was started for this run, and this machine has not got as much.
        """
        machines = self.machines()
        gpus = serving.num_gpus
        if gpus is None:
            gpus = 1.0 if any(each.get("GPU") for each in machines) else 0.0
        wanted = {"num_cpus": serving.num_cpus, "num_gpus": gpus}
        if serving.num_cpus is None:
            wanted["num_cpus"] = 1.0 if gpus else self._share(machines)
        if serving.memory_gb:
            wanted["memory"] = round(serving.memory_gb * 1e9)
        if not any(_room(each, wanted) for each in machines):
            asked = ", ".join(f"{name}={amount:g}" for name, amount in wanted.items() if amount)
            message = f"no machine of the cluster has what a copy of {type(serving).__name__} takes ({asked})"
            if self.private:
                raise ConfigError(f"{message}: the cluster is this machine alone. State less, or name a ray_address")
            logger.warning("%s: waiting for one", message)
        return wanted

    def count(self, serving: Serving, wanted: Mapping[str, float]) -> int:
        """How many copies to run.

        Args:
            serving: of which.
            wanted: what one takes.
        """
        if self.workers is not None:
            return self.workers
        rooms = [_room(each, wanted) for each in self.machines()]
        return max(1, sum(map(bool, rooms)) if serving.remote else sum(rooms))

    def _share(self, machines: Sequence[Mapping[str, float]]) -> float:
        """CPUs of a copy that uses all it is given: those of the smallest machine, shared by the copies on it."""
        cpus = [each["CPU"] for each in machines if each.get("CPU")]
        if not cpus:
            return 1.0
        copies = math.ceil((self.workers or 1) / len(cpus))
        return max(1.0, min(cpus) // copies)

    # Do the machines see the same files? -----------------------------------------------------------------------------

    def marks(self, serving: Serving) -> dict[str, str]:
        """Files that a worker must find, with what must stand in them.

        One lies in the cache folder, one where the pictures go, if that is elsewhere on a disk. They lie there until
        :meth:`close`.

        Args:
            serving: whose pictures.

        Raises:
            OSError: a folder cannot be written.
        """
        folders, store = [self._folder], serving.image_io
        if store is not None and "://" not in store.path("x"):
            folders.append(Path(store.path("x")).parent)
        for folder in folders:
            where = folder.absolute()
            if any(where.resolve().is_relative_to(known.resolve()) for known in self._marks):
                continue
            where.mkdir(parents=True, exist_ok=True)
            self._sweep(where)
            self._marks[where] = secrets.token_hex(16)
            self._name(where).write_text(self._marks[where])
        return {str(self._name(where)): word for where, word in self._marks.items()}

    def close(self) -> None:
        """Take away what :meth:`marks` left."""
        for where in self._marks:
            self._name(where).unlink(missing_ok=True)
        self._marks.clear()

    def _name(self, folder: Path) -> Path:
        return folder / f"{MARK}{socket.gethostname()}-{os.getpid()}-{id(self):x}"

    def _sweep(self, folder: Path) -> None:
        """Marks of processes of this machine that were killed."""
        for path in folder.glob(f"{MARK}{socket.gethostname()}-*"):
            if not is_alive(int(path.name.split("-")[-2])):
                path.unlink(missing_ok=True)


class _Connection:
    """Connects to Ray in a thread that lives as long as the connection.

    Processes that Ray starts end with the thread that started them, and from the main thread Ray would take away the
    program's own handling of SIGTERM.

    Args:
        address: ``auto``, ``host:port``, or ``local`` to start a cluster on this machine.
        workers: for which there must be room on a cluster that is started.

    Raises:
        ConfigError: there is no cluster.
    """

    def __init__(self, address: str, workers: int | None) -> None:
        self.address = address
        self._options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            cpus = max(len(os.sched_getaffinity(0)), workers) if workers else None
            self._options |= {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        else:
            _reach(address)
        self._up: futures.Future[None] = futures.Future()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ray", daemon=True)
        self._thread.start()
        try:
            self._up.result()
        except (Exception, SystemExit) as error:
            where = "on this machine" if address == "local" else f"at {address}"
            raise ConfigError(f"no Ray cluster {where}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let go of the cluster; one that was started ends."""
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        ray = _ray()
        # What becomes of machines and workers Ray prints to standard output, where a command's result is read.
        ray._private.worker.print_to_stdstream = _log_what_ray_says
        try:
            ray.init(address=self.address, **self._options)
        except BaseException as error:  # noqa: BLE001  the thread that waits is told, whatever it is
            self._up.set_exception(error)
            return
        self._up.set_result(None)
        self._ended.wait()
        ray.shutdown()


class _State:
    """The connection of this process that was made here, if there is one, and who uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.connection: _Connection | None = None


_state = _State()

_NO_CLIENT = "{} goes through a proxy: start this on a machine of the cluster and name it 'auto'"


def _room(machine: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many copies a machine has room for."""
    rooms = [math.floor(machine.get(_NAMES[name], 0) / amount + 1e-9) for name, amount in wanted.items() if amount]
    return min(rooms, default=1)


def _reach(address: str) -> None:
    """Try a cluster's address: Ray itself tries for minutes, and ends the process then.

    Raises:
        ConfigError: nobody is there.
    """
    if "://" in address:
        raise ConfigError(_NO_CLIENT.format(f"ray_address={address!r}"))
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ConfigError(f"ray_address is 'auto' or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


def _log_what_ray_says(data: Mapping[str, Any], *_: object, **__: object) -> None:
    logger.info("ray: %s", "\n".join(map(str, data.get("lines", ()))))


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
        import ray.util.client
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "executor='ray'") from error
    return ray
