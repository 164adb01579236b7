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
from collections.abc import Callable, Mapping
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar

from dataflow.errors import ConfigError, ImageError, MissingExtraError, StoreError

ALLOWED = "DATAFLOW_STORES"
"""Environment variable: stores that may be read, with spaces between them (``s3://bucket/prefix gs://``)."""

READ_PATIENCE = 20.0
"""Seconds for which a store that fails for the moment is asked again."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = frozenset({"file", "local"})
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs", "tos", "oci", "memory"})
"""Stores whose PUT puts an object in its place whole, or leaves what was there."""
_OF_OBSTORE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
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
    found = [checked(place) for place in places]
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


def checked(place: str) -> str:
    """The address of a store without a slash at its end.

    Raises:
        ConfigError: it is none.
    """
    text = place.rstrip("/") if not place.endswith("://") else place
    match = _URL.match(text)
    if match is None or (match[1].lower() not in _ATOMIC | _LOCAL):
        raise ConfigError(
            f"{place!r} is no object store whose images can be used: write file:// or one of "
            f"{', '.join(sorted(f'{name}://' for name in _ATOMIC))}"
        )
    if text.startswith("/", match.end()) and match[1].lower() not in _LOCAL | {"memory"}:
        raise ConfigError(f"{place!r} names no bucket: write {match[0]}BUCKET/PREFIX")
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
        url == place or url.startswith(place if place.endswith("/") else f"{place}/")
        for place in places
        if _URL.match(place)
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
        return BytesIO(ask_store(url, READ_PATIENCE, lambda system, path: system.cat_file(path)))
    except StoreError as error:
        raise _of_picture(error) from error


def find_object(url: str) -> tuple[int, str] | None:
    """Size and version of an object; None if there is none.

    Raises:
        ImageError: as :func:`open_object`.
    """
    _check_allowed(url)
    try:
        info = ask_store(url, READ_PATIENCE, lambda system, path: system.info(path))
    except StoreError as error:
        if error.errno == errno.ENOENT:
            return None
        raise _of_picture(error) from error
    version = next((info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(name)), "")
    return (int(info["size"]), str(version)) if info.get("type") == "file" else None


def _of_picture(error: StoreError) -> ImageError:
    reason = {errno.ENOENT: "missing", errno.EIO: "unreachable"}.get(error.errno or 0, "unreadable")
    return ImageError(error.strerror or "", reason=reason, path=error.filename)


# fsspec


def ask_store(url: str, patience: float, ask: Callable[[Any, str], T]) -> T:
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


def lacks_bucket(error: StoreError) -> bool:
    """Whether not only an object is missing, as far as the store says."""
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
