"""Images as objects in a store that fsspec knows: S3, Google Cloud Storage, Azure and others.

An image is written with one PUT, which a store does whole or not at all. What a table's rows name is opened only if it
lies under a store that the user named: as the place of his images, or as one that may be read (``read_from`` of
:class:`~dataflow.io.ImageIO`, or the environment variable :data:`ALLOWED`, which child processes inherit). Web
addresses are never opened: a table from elsewhere must not be able to send this machine anywhere.

The provider's own library does the work where it is installed (s3fs, gcsfs, adlfs), obstore where it is not.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import blake2b
from io import BytesIO
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from dataflow.errors import ConfigError, ImageError, MissingExtraError, StoreError
from dataflow.packs import NAME

ALLOWED = "DATAFLOW_STORES"
"""Environment variable: stores that may be read, with spaces between them (``s3://bucket/prefix gs://``)."""

WRITE_PATIENCE = 120.0
"""Seconds for which a store that fails for the moment is asked again to take an image: another would be paid for."""
READ_PATIENCE = 20.0

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = frozenset({"file", "local"})
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs", "tos", "oci", "memory"})
"""Stores whose PUT puts an object in its place whole, or leaves what was there."""
_OF_OBSTORE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
_LISTERS = 8
_FEW = 256
_CREDENTIALS = re.compile(r"Credential|ProfileNotFound|ClientAuthentication|SSOToken|TokenRetrieval|Unauth")
_MENDABLE = (IsADirectoryError, ValueError, TypeError)
_OBSTORE_MENDABLE = frozenset({"InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError"})

_allowing = threading.Lock()
T = TypeVar("T")


# Which URLs may be opened


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this is no path but an address, of whatever kind."""
    return isinstance(text, str) and _URL.match(text) is not None


def names_store(text: str) -> bool:
    """Whether this is the address of an object in a store, allowed or not, or of a file."""
    found = _URL.match(text)
    return found is not None and found[1].lower() in _ATOMIC | _LOCAL


def allow(*places: str) -> None:
    """Let rows name pictures under these stores (``s3://bucket/prefix``) or in any of a kind (``s3://``).

    The answer holds for this process and for those it starts.

    Raises:
        ConfigError: one is no store, or a web address.
    """
    found = [_checked(place) for place in places]
    with _allowing:
        known = os.environ.get(ALLOWED, "").split()
        added = [place for place in dict.fromkeys(found) if place not in known]
        if added:
            os.environ[ALLOWED] = " ".join([*known, *added])


def allow_stores(images: object) -> None:
    """Let what a job's ``[images]`` table names be read; what is no store in it is not looked at."""
    if isinstance(images, Mapping):
        given = images.get("read_from")
        more = given if isinstance(given, list) else [given]
        allow(*(each for each in (images.get("save_path"), *more) if isinstance(each, str) and names_store(each)))


def _checked(place: str) -> str:
    text = place.rstrip("/") if not place.endswith("://") else place
    match = _URL.match(text)
    if match is None or (match[1].lower() not in _ATOMIC | _LOCAL):
        raise ConfigError(
            f"{place!r} is no object store whose images can be used: write file:// or one of "
            f"{', '.join(sorted(f'{name}://' for name in _ATOMIC))}"
        )
    if _is_odd(text):
        raise ConfigError(f"{place!r}: an address without spaces, '..' and '::' is needed")
    return text


def _is_odd(url: str) -> bool:
    """Whether it may lead elsewhere than it seems: up, or through another of fsspec's file systems."""
    return "::" in url or ".." in url.split("/") or any(letter.isspace() or letter == "\0" for letter in url)


def is_allowed(url: str) -> bool:
    """Whether this lies under a store that the user named."""
    places = os.environ.get(ALLOWED, "").split()
    return not _is_odd(url) and any(
        url.startswith(place if place.endswith("/") else f"{place}/") for place in places if _URL.match(place)
    )


def _check_allowed(url: str) -> None:
    label = url if len(url) <= 300 else f"{url[:300]}…"
    if not names_store(url):
        raise ImageError("is a URL, not a file: download it and give the path", reason="missing", path=label)
    if not is_allowed(url):
        raise ImageError(
            "lies in a store that was not named as one to read from: add it to read_from under [images], or set "
            f"{ALLOWED} to it, if this table may be trusted",
            reason="unreadable",
            path=label,
        )


def local_path(url: str) -> str | None:
    """The path of a ``file://`` URL that may be opened; None for other stores.

    Raises:
        ImageError: it may not be.
    """
    if url.partition(":")[0].lower() not in _LOCAL:
        return None
    _check_allowed(url)
    return url.partition("://")[2]


# Reading


def open_object(url: str) -> BytesIO:
    """The bytes of an object, read at once, so that a store that fails is not taken for a damaged picture.

    Raises:
        ImageError: it may not be opened, is ``missing``, or the store is ``unreachable``.
    """
    _check_allowed(url)
    try:
        return BytesIO(_asked(url, READ_PATIENCE, lambda system, path: system.cat_file(path)))
    except StoreError as error:
        raise _of_picture(error) from error


def find_object(url: str) -> tuple[int, str] | None:
    """Size and version of an object; None if there is none.

    Raises:
        ImageError: as :func:`open_object`.
    """
    _check_allowed(url)
    try:
        info = _asked(url, READ_PATIENCE, lambda system, path: system.info(path))
    except StoreError as error:
        if error.errno == errno.ENOENT:
            return None
        raise _of_picture(error) from error
    version = next((info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(name)), "")
    return (int(info["size"]), str(version)) if info.get("type") == "file" else None


def _of_picture(error: StoreError) -> ImageError:
    reason = {errno.ENOENT: "missing", errno.EIO: "unreachable"}.get(error.errno or 0, "unreadable")
    return ImageError(error.strerror or "", reason=reason, path=error.filename)


# A store of images


class RemoteFiles:
    """The images under one URL.

    Pickles; methods may be called from several threads.

    Args:
        url: of the store, without a slash at its end.

    Raises:
        ConfigError: it is none that images can be written to.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        if self.url.endswith("://"):
            raise ConfigError(f"{url!r} names no bucket: write {url}BUCKET/PREFIX")
        allow(self.url)
        self._known: _Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])

    def path(self, name: str) -> str:
        """What stands in a row for an image."""
        return f"{self.url}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """Write an image. What fails for the moment is tried again for :data:`WRITE_PATIENCE` seconds.

        Raises:
            StoreError: it cannot be written.
        """
        _asked(self.path(name), WRITE_PATIENCE, lambda system, path: system.pipe_file(path, data))

    def get(self, name: str) -> bytes | None:
        """The bytes of an image that was there when the store was last listed; None if it was not, or is gone.

        Raises:
            StoreError: the store cannot be read.
        """
        if self._listed().size_of(name) is None:
            return None
        try:
            return _asked(self.path(name), READ_PATIENCE, lambda system, path: system.cat_file(path))
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def existing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image, in no particular order.

        Raises:
            StoreError: the store cannot be read.
        """
        known = _Known()
        for name, size in self._list():
            known.add(name, size)
            yield name, size
        self._known = known

    def sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the images that exist: each is asked for, or, where there are many, the store is listed once.

        Raises:
            StoreError: the store cannot be read.
        """
        names = iter(names)
        first = list(islice(names, _FEW + 1))
        if len(first) <= _FEW:
            with ThreadPoolExecutor(_LISTERS) as threads:
                found = threads.map(self._size, first)
                yield from ((name, size) for name, size in zip(first, found, strict=True) if size is not None)
            return
        known = self._listed()
        for some in (first, names):
            for name in some:
                if (size := known.size_of(name)) is not None:
                    yield name, size

    def sweep(self) -> int:
        """Forget what was listed: a step has ended. A PUT that broke off leaves nothing to remove."""
        self._known = None
        return 0

    def _listed(self) -> _Known:
        """What was there when the step began: asking for every name would take one request each."""
        if self._known is None:
            for _ in self.existing():
                pass
        assert self._known is not None
        return self._known

    def _size(self, name: str) -> int | None:
        try:
            return int(_asked(self.path(name), READ_PATIENCE, lambda system, path: system.info(path))["size"])
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _list(self) -> Iterator[tuple[str, int]]:
        folders = [name for name in self._names("") if re.fullmatch("[0-9a-f]{2}", name)]
        with ThreadPoolExecutor(_LISTERS) as threads:
            # A few at a time: a folder is a 256th of millions.
            for start in range(0, len(folders), _LISTERS):
                some = folders[start : start + _LISTERS]
                for folder, found in zip(some, threads.map(self._names, some), strict=True):
                    for name, size in found.items():
                        if NAME.fullmatch(whole := f"{folder}/{name}") and size is not None:
                            yield whole, size

    def _names(self, folder: str) -> dict[str, int | None]:
        """The names in a folder, with the sizes of objects."""
        url = f"{self.url}/{folder}" if folder else self.url
        try:
            entries = _asked(url, READ_PATIENCE, lambda system, path: system.ls(path, detail=True))
        except StoreError as error:
            if error.errno == errno.ENOENT and not _no_bucket(error):
                return {}  # nothing was written yet
            raise
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"]) if entry["type"] == "file" else None
            for entry in entries
        }


class _Known:
    """Names and sizes of objects, in sixteen bytes each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[tuple[int, int]] = []
        self._blocks: list[np.ndarray] = []
        self._sorted: np.ndarray | None = None

    def add(self, name: str, size: int) -> None:
        """Take one in."""
        self._new.append((_short(name), size))
        if len(self._new) >= 1 << 16:
            self._pack()

    def size_of(self, name: str) -> int | None:
        """Bytes of one; None if it is not among them."""
        with self._lock:
            if self._sorted is None:
                self._pack()
                table = np.concatenate(self._blocks) if self._blocks else np.empty((0, 2), np.uint64)
                self._sorted = table[np.argsort(table[:, 0])]
                self._blocks = []
        short = np.uint64(_short(name))
        at = int(np.searchsorted(self._sorted[:, 0], short))
        if at == len(self._sorted) or self._sorted[at, 0] != short:
            return None
        return int(self._sorted[at, 1])

    def _pack(self) -> None:
        if self._new:
            self._blocks.append(np.array(self._new, np.uint64))
            self._new = []


def _short(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


# fsspec


def _asked(url: str, patience: float, ask: Callable[[Any, str], T]) -> T:
    """What a store answers, asked again for some time if it fails for the moment.

    Raises:
        StoreError: it fails; with the number EIO if it may do better later.
        MissingExtraError: fsspec, or its part for this kind of store, is not installed.
    """
    system, path = _system(url)
    until, wait = time.monotonic() + patience, 0.5
    while True:
        try:
            return ask(system, path)
        except Exception as error:
            # Each provider's library has errors of its own.
            problem = _problem(error, url)
            if problem.errno != errno.EIO or time.monotonic() + wait > until:
                raise problem from error
        time.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all ask at once
        wait = min(2 * wait, 30.0)


def _system(url: str) -> tuple[Any, str]:
    scheme = url.partition(":")[0].lower()
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "object-store", f"{scheme}://") from error
    try:
        # What it remembers of folders would hide what others write.
        system, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        if scheme not in _OF_OBSTORE:
            raise ConfigError(f"{scheme}:// needs a library that is not installed: {error}") from error
        return _obstore(scheme), url.partition("://")[2]
    except Exception as error:
        raise _problem(error, url) from error
    return system, str(path)


def _obstore(scheme: str) -> Any:
    try:
        from obstore.fsspec import FsspecStore
    except ImportError as error:
        raise MissingExtraError("obstore", "object-store", f"{scheme}://") from error
    # Asked again it is here, for as long as it makes sense.
    patience = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
    return FsspecStore(scheme, retry_config=patience)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _no_bucket(error: StoreError) -> bool:
    return bool(re.search(r"NoSuchBucket|bucket does not exist|ContainerNotFound", f"{error.strerror}"))


def _problem(error: Exception, url: str) -> StoreError:
    """An error of a provider's library, sorted: something to set right, or something to wait for."""
    name = type(error).__name__
    told = " ".join(f"{name}: {error}".split()).strip(": ")[:500]
    if _CREDENTIALS.search(name):
        return StoreError(
            errno.EACCES,
            f"the store wants credentials ({told}): give them as for the provider's own tools, by environment "
            "variables or its configuration file",
            url,
        )
    if isinstance(error, PermissionError) or name == "PermissionDeniedError":
        return StoreError(errno.EACCES, f"the store refuses ({told}): check credentials and rights", url)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or name == "NotFoundError":
        return StoreError(errno.ENOENT, f"no such object, or no such bucket ({told})", url)
    if isinstance(error, _MENDABLE) or name in _OBSTORE_MENDABLE:
        return StoreError(errno.EINVAL, f"the store cannot be used so ({told})", url)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return StoreError(error.errno, told, url)
    return StoreError(errno.EIO, f"the store does not answer as it should ({told})", url)
