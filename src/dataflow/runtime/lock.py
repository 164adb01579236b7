"""One writer per cache folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from dataflow.errors import CacheBusyError

POLL_SECONDS = 0.5


@contextmanager
def cache_lock(folder: Path, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock falls with the process, however it ends.

    Args:
        folder: the cache folder.
        wait: until it is free, however long that takes.
        shared: likewise, as long as those that hold it share the folder.

    Raises:
        CacheBusyError: another process (or another thread of this one) holds it; says which.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".lock.owner"
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    while True:
        try:
            lock.acquire(timeout=POLL_SECONDS if wait or shared else 0)
            break
        except Timeout:
            if wait or (shared and _owner(owner).get("shared")):
                continue
            raise CacheBusyError(
                f"{folder} is being written by {_describe(owner)}. Wait for it to end, or use another cache_path."
            ) from None
    try:
        facts = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "shared": wait or shared,
        }
        owner.write_bytes(orjson.dumps(facts))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is there and not merely waiting for its parent to notice its death."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # not on Linux
        return True
    return state != "Z"


def _describe(owner: Path) -> str:
    facts = _owner(owner)
    try:
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except KeyError:
        return "another process"


def _owner(path: Path) -> Mapping[str, Any]:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
