"""Several processes, on one machine or on many with a shared disk, that make one step together.

Each of them is a *driver*: it keeps a file of its own young under ``.drivers``, and claims one part of the table after
another. A claim is a file in the part's folder that names the driver; it holds as long as the driver lives. Claims are
made one at a time, under the lock of the cache folder. Should that lock not hold between machines, two drivers may make
the same part: images and records then are the same twice, never wrong, because both go by the request.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from dataflow.errors import CacheBusyError
from dataflow.runtime.lock import cache_lock, is_alive

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""A driver on another machine that has not said for so long that it lives does not."""

_FOLDER = ".drivers"
_CLAIM = "claim"


class Driver:
    """This process among the others.

    Args:
        folder: the cache folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"{os.getpid()}-{secrets.token_hex(6)}"
        self.started = 0.0
        self._file = folder / _FOLDER / f"{self.name}.json"
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="driver", daemon=True)

    def begin(self) -> None:
        """Show that this process is there.

        Raises:
            OSError: the folder cannot be written.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write_bytes(orjson.dumps(facts))
        self.started = self._file.stat().st_mtime
        self._beating.start()

    def end(self) -> None:
        """Leave."""
        self._ended.set()
        self._beating.join()
        self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Do something while no other driver does anything of this kind."""
        with cache_lock(self.folder, wait=True):
            yield

    def claim(self, folder: Path) -> bool:
        """Claim a part, unless a living driver has it.

        Args:
            folder: of the part.
        """
        with self.alone():
            path = folder / _CLAIM
            try:
                holder = path.read_text()
            except FileNotFoundError:
                holder = ""
            if holder not in ("", self.name) and self._lives(holder):
                return False
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(self.name)
            temporary.replace(path)
            return True

    def holds(self, folder: Path) -> bool:
        """Whether a part is still claimed by this driver: one that was asleep for long may have lost it."""
        try:
            return (folder / _CLAIM).read_text() == self.name
        except FileNotFoundError:
            return False

    def release(self, folder: Path) -> None:
        """Give a part back."""
        if self.holds(folder):
            (folder / _CLAIM).unlink(missing_ok=True)

    def _lives(self, name: str) -> bool:
        os.utime(self._file)
        now = self._file.stat().st_mtime  # the file server's clock
        return _facts(self.folder / _FOLDER / f"{name}.json", now) is not None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                os.utime(self._file)


@contextlib.contextmanager
def join(folder: Path) -> Iterator[Driver]:
    """Be a driver of the folder.

    Raises:
        CacheBusyError: another process has it for itself; says which.
        OSError: the folder cannot be made or written.
    """
    driver = Driver(folder)
    with cache_lock(folder, shared=True):
        driver.begin()
    try:
        yield driver
    finally:
        driver.end()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, against drivers too.

    Raises:
        CacheBusyError: another process, or several, write to it; says which.
        OSError: the folder cannot be made or written.
    """
    with cache_lock(folder):
        others = drivers(folder)
        if others:
            one = others[0]
            raise CacheBusyError(
                f"{folder} is shared by {len(others)} processes, one of them {one['pid']} on {one['host']} since "
                f"{one['since']}. Run with share as well to take part, or wait for them to end."
            )
        yield


def drivers(folder: Path) -> list[Mapping[str, Any]]:
    """Process, host and since when of every living driver of a cache folder."""
    found = (_facts(path, time.time()) for path in sorted((folder / _FOLDER).glob("*.json")))
    return [facts for facts in found if facts is not None]


def _facts(path: Path, now: float) -> Mapping[str, Any] | None:
    """What a driver wrote of itself; None if it is gone."""
    try:
        facts = orjson.loads(path.read_bytes())
        age = now - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    here = facts["host"] == socket.gethostname()
    return facts if (is_alive(facts["pid"]) if here else age < DEAD_SECONDS) else None
