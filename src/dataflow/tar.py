"""Tar files of the same bytes whoever writes them, whenever."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a header; data begins and ends at multiples of it."""
_RECORD = tarfile.RECORDSIZE


def _template() -> bytearray:
    info = tarfile.TarInfo("")
    info.mode = 0o644
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


_HEADER = _template()
_ZEROS = bytes(BLOCK)
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)
_MOST = 8**11


def header(name: str, size: int) -> bytes:
    """The header of a member: the library's own for an empty name, with name, size and sum filled in.

    Args:
        name: with ``/``; ASCII, at most 100 characters.
        size: of its data, in bytes.
    """
    letters = name.encode("ascii")
    if not 0 < len(letters) <= 100 or size >= _MOST:
        raise ValueError(f"{name!r} of {size:,} bytes does not fit into a tar file")
    filled = _HEADER.copy()
    filled[_NAME] = letters.ljust(100, b"\0")
    filled[_SIZE] = b"%011o\0" % size
    filled[_SUM] = b" " * 8
    filled[_SUM] = b"%06o\0 " % sum(filled)
    return bytes(filled)


def describes(block: bytes, name: str, size: int) -> bool:
    """Whether a block is the header of a member of this name and size."""
    try:
        return block[_NAME].rstrip(b"\0") == name.encode("ascii") and int(block[_SIZE].rstrip(b"\0 "), 8) == size
    except ValueError:
        return False


class TarFile:
    """A tar file that is written from front to back in constant memory: no owner, no time, one mode.

    Args:
        path: of the file.

    Attributes:
        size: bytes written so far, without the end mark.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=1 << 20)
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Write one member.

        Args:
            name: with ``/``; ASCII, at most 100 characters.
            data: its bytes.

        Returns:
            Where in the file they begin; its header stands in the block before.
        """
        padding = -len(data) % BLOCK
        self._file.write(header(name, len(data)))
        self._file.write(data)
        self._file.write(_ZEROS[:padding])
        offset = self.size + BLOCK
        self.size = offset + len(data) + padding
        return offset

    def close(self) -> None:
        """Write the end mark and make the file durable."""
        self._file.write(bytes(2 * BLOCK + -(self.size + 2 * BLOCK) % _RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close it as it is."""
        self._file.close()
