"""New text for a PNG whose pixels stay as they are: its image data is taken over, all else in it is left behind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL.PngImagePlugin import PngInfo

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH_AND_TYPE = {"RGB": (8, 2), "RGBA": (8, 6)}
_CHANGES_PIXELS = frozenset({b"iCCP", b"eXIf", b"tRNS", b"acTL", b"PLTE"})
"""Colour profile, orientation, transparency, animation, palette: a picture with one of these is drawn anew."""


def with_text(data: bytes, mode: str, text: PngInfo) -> bytes | None:
    """The same picture with this text in it and with none of the chunks that a decoder does not need.

    Args:
        data: a whole PNG that was decoded without complaint.
        mode: of the picture that the file is to hold.
        text: what is to stand in it.

    Returns:
        None if the picture's pixels are not simply those in the file, or a chunk is not as it should be.
    """
    head, image = b"", []
    for kind, chunk in _chunks(data):
        if kind in _CHANGES_PIXELS:
            return None
        if kind == b"IHDR":
            if tuple(chunk[16:18]) != _DEPTH_AND_TYPE.get(mode):
                return None
            head = chunk
        elif kind == b"IDAT":
            image.append(chunk)
        elif kind == b"IEND":
            words = b"".join(_chunk(name, body) for name, body, *_ in text.chunks)
            return b"".join([_SIGNATURE, head, words, *image, chunk]) if head and image else None
        elif kind[:1].isupper():
            return None
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and bytes of every chunk, as far as length and checksum are right."""
    at = len(_SIGNATURE)
    while data.startswith(_SIGNATURE) and at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        (checksum,) = struct.unpack_from(">I", data, end - 4) if end <= len(data) else (-1,)
        if zlib.crc32(data[at + 4 : end - 4]) != checksum:
            return
        yield data[at + 4 : at + 8], data[at:end]
        at = end


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
