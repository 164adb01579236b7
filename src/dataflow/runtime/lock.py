"""One writer per cache folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from dataflow.errors import CacheBusyError


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock falls with the process, however it ends.

    Raises:
        CacheBusyError: another process (or another thread of this one) holds it; says which.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".lock.owner"
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise CacheBusyError(
            f"{folder} is being written by {_describe(owner)}. Wait for it to end, or use another cache_path."
        ) from None
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        owner.write_bytes(orjson.dumps(facts))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _describe(owner: Path) -> str:
    try:
        facts = orjson.loads(owner.read_bytes())
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
