"""Files that appear under their name whole or not at all, and what killed processes left of such files."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+)\.([0-9]{1,9})\.([0-9a-f]{8})[0-9a-f]{8}\.tmp")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_OLD_SECONDS = 24 * 3600
"""What a process on another machine has not finished for so long it will not finish."""


def temporary_for(target: Path) -> Path:
    """A name beside a file's own, for its content until it is whole; it says which process writes it."""
    return target.with_name(f".{target.stem}.{os.getpid()}.{_HOST}{secrets.token_hex(4)}.tmp")


def write_whole(target: Path, data: bytes, *, durable: bool) -> None:
    """Write a file that appears under its name complete or not at all, in the place of an older one.

    Args:
        target: its name; the folder is there.
        data: its content.
        durable: wait until it would survive a power cut.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = temporary_for(target)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(target.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    if os.name == "nt":  # pragma: no cover - Windows opens no folders and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, ours: Callable[[str], object]) -> int:
    """Remove temporary files of processes that are gone; returns how many.

    What a living process is writing stays, on this machine or another.

    Args:
        folder: is looked through, its own folders are not.
        ours: whether the stem of a file's own name is one that this sweep is about.
    """
    removed = 0
    for name in os.listdir(folder):
        if name.endswith(".tmp") and (found := _TEMPORARY.fullmatch(name)) and ours(found[1]):
            path = folder / name
            if not _is_alive(int(found[2])) if found[3] == _HOST else _is_old(path):
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _OLD_SECONDS
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
