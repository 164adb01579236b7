"""Tar files of the same bytes whoever writes them, whenever."""

from __future__ import annotations

import tarfile
from pathlib import Path

from dataflow.export.files import sync

_BLOCK = tarfile.BLOCKSIZE
_RECORD = tarfile.RECORDSIZE


def _template() -> bytearray:
    info = tarfile.TarInfo("")
    info.mode = 0o644
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


_HEADER = _template()
_ZEROS = bytes(_BLOCK)
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)
_MOST = 8**11


def _header(name: bytes, size: int) -> bytes:
    """The header of a member: the library's own for an empty name, with name, size and sum filled in."""
    if not 0 < len(name) <= 100 or size >= _MOST:
        raise ValueError(f"{name!r} of {size:,} bytes does not fit into a tar file")
    header = _HEADER.copy()
    header[_NAME] = name.ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % size
    header[_SUM] = b" " * 8
    header[_SUM] = b"%06o\0 " % sum(header)
    return bytes(header)


class TarFile:
    """A tar file that is written from front to back in constant memory: no owner, no time, one mode.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=1 << 20)
        self._written = 0

    def add(self, name: str, data: bytes) -> None:
        """Write one member.

        Args:
            name: with ``/``; ASCII, at most 100 characters.
            data: its bytes.
        """
        padding = -len(data) % _BLOCK
        self._file.write(_header(name.encode("ascii"), len(data)))
        self._file.write(data)
        self._file.write(_ZEROS[:padding])
        self._written += _BLOCK + len(data) + padding

    def close(self) -> None:
        """Write the end mark and make the file durable."""
        self._file.write(bytes(2 * _BLOCK + -(self._written + 2 * _BLOCK) % _RECORD))
        sync(self._file)
        self._file.close()

    def discard(self) -> None:
        """Close it as it is."""
        self._file.close()
