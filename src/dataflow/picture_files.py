"""Where the bytes of a picture are: in a file of its own, in a pack, in an object store. Everything opens them here."""

from __future__ import annotations

import os
import re
import stat
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple, NoReturn

from dataflow import packs, remote_files
from dataflow.errors import ImageError

_URL = re.compile(r"(https?|s3|gs|hf|data|file):")


class FileStatus(NamedTuple):
    """What is known of a picture's bytes without reading them.

    Attributes:
        size: how many.
        version: differs if they were changed.
    """

    size: int
    version: str


def refuse(reason: str, message: str, path: str | None) -> NoReturn:
    raise ImageError(message, reason=reason, path=path)


def short_path(path: str | os.PathLike[str]) -> str:
    """The path for messages; a data: URL in the wrong place may be megabytes long."""
    text = os.fspath(path)
    return text if len(text) <= 300 else f"{text[:300]}…"


def open_file(path: str | os.PathLike[str]) -> BufferedReader | BytesIO:
    """The bytes of a picture for reading, wherever they are.

    Args:
        path: of a file; of what was one before it was packed; or the URL of an object in a store that may be read.

    Raises:
        ImageError: ``missing``, ``unreadable``, or ``unreachable`` for a store that does not answer now.
    """
    text, label = os.fspath(path), short_path(path)
    if remote_files.is_url(text):
        local = remote_files.local_path(text)
        return remote_files.open_object(text) if local is None else open_file(local)
    if _URL.match(label):
        refuse("missing", "is a URL, not a file: download it and give the path", label)
    try:
        return _open_loose(text, label)
    except (FileNotFoundError, NotADirectoryError):
        return _open_packed(text, label)
    except PermissionError:
        refuse("unreadable", "may not be read; check the file's permissions", label)
    except (OSError, ValueError) as error:
        refuse("missing", f"cannot be a file's path ({getattr(error, 'strerror', None) or error})", label)


def _open_loose(path: str, label: str) -> BufferedReader:
    mode = os.stat(path).st_mode  # noqa: PTH116 - pathlib raises nothing for an embedded NUL
    if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
        refuse("unreadable", "is a folder, not a file" if stat.S_ISDIR(mode) else "is not an ordinary file", label)
    return Path(path).open("rb")


def _open_packed(path: str, label: str) -> BufferedReader:
    try:
        if found := packs.find_packed(path):
            store, name, packed = found
            return store.open(name, packed)
        if (place := packs.split(path)) and packs.packs_of(place[0]):
            return _open_loose(path, label)  # perhaps unpacked since
    except (FileNotFoundError, NotADirectoryError):
        try:
            return _open_loose(path, label)  # unpacked between two looks
        except OSError:
            pass
    except OSError as error:
        refuse("unreadable", f"its pack cannot be read: {error.strerror or error}", label)
    refuse("missing", "no such file; is the path right, and relative to the right folder?", label)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a picture.

    Raises:
        ImageError: as :func:`open_file`.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:  # pragma: no cover - a failing disk
            refuse("unreadable", f"cannot be read: {error.strerror or error}", short_path(path))


def status(path: str | os.PathLike[str]) -> FileStatus | None:
    """Size and version of a picture's bytes; None if there is no file, no packed one, no object of that name.

    Raises:
        ImageError: the store or the pack cannot be read.
    """
    text = os.fspath(path)
    if remote_files.is_url(text):
        local = remote_files.local_path(text)
        if local is None:
            found = remote_files.find_object(text)
            return None if found is None else FileStatus(*found)
        text = local
    try:
        info = os.stat(text)  # noqa: PTH116 - called for millions
    except (FileNotFoundError, NotADirectoryError):
        packed = packs.find_packed(text)
        return None if packed is None else FileStatus(packed[2].size, str(packed[2].modified))
    except (OSError, ValueError):  # a name that no file system takes
        return None
    return FileStatus(info.st_size, str(info.st_mtime_ns)) if stat.S_ISREG(info.st_mode) else None


def is_loose(path: str | os.PathLike[str]) -> bool:
    """Whether the picture is a file of its own, which other programs find by its path."""
    text = os.fspath(path)
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as it is understood from any folder; URLs are so already."""
    text = os.fspath(path)
    return text if remote_files.is_url(text) else str(Path(text).absolute())
