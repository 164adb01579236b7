"""The pictures the fake service draws, and the mark in each that says which prompt and inputs it belongs to."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from PIL import Image

SIDE = 64
BLOCK = 8
BLOCKS = 4
LEVELS = (0, 85, 170, 255)

Colour = tuple[int, int, int]
Mark = tuple[Colour, ...]


def expected_mark(prompt: str, images: Sequence[bytes] = ()) -> Mark:
    """The mark of a picture: 16 RGB colours, row by row, each channel one of 0, 85, 170, 255.

    Args:
        prompt: the text as the service received it (of a conversation: the last thing the user said).
        images: bytes of the input images as the service received them, in order (of a conversation: all of them; of an
            edit with a mask: the mask last).
    """
    return _colours(_digest(prompt, images), BLOCKS * BLOCKS)


def expected_text(prompt: str, images: Sequence[bytes] = ()) -> str:
    """What the service writes where it is asked for text and nothing else is said about it."""
    return f"{_digest(prompt, images).hex()[:16]}: {prompt}"


def read_mark(image: Image.Image | bytes) -> Mark:
    """The mark found in a picture (PNG, WebP, or JPEG of good quality), at least 32 × 32 pixels."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image), formats=("PNG", "JPEG", "WEBP", "GIF")) as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=float)
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    side = BLOCK * BLOCKS
    if pixels.shape[0] < side or pixels.shape[1] < side:
        raise ValueError(f"no mark in a picture of {pixels.shape[1]} × {pixels.shape[0]} pixels")
    blocks = pixels[:side, :side].reshape(BLOCKS, BLOCK, BLOCKS, BLOCK, 3)[:, 2:-2, :, 2:-2]
    means = blocks.mean(axis=(1, 3)).reshape(-1, 3)
    levels = np.rint(means / 85).astype(int) * 85
    return tuple((int(red), int(green), int(blue)) for red, green, blue in levels)


def draw(prompt: str, images: Sequence[bytes] = (), *, seed: object = None, sample: int = 0, pad: int = 0) -> bytes:
    """A PNG that depends on its arguments only.

    Args:
        prompt: goes into the mark.
        images: go into the mark.
        seed: changes the picture below its mark.
        sample: number of the picture among several of one answer, changes the picture as ``seed`` does.
        pad: at least this many bytes, filled up with noise; 0 draws 64 × 64 pixels.
    """
    side = max(SIDE, math.isqrt(pad // 3) + 1)
    stride = 1 + 3 * side
    rows = bytearray(_canvas(side, pad > 0))
    stamp = _colours(hashlib.sha256(f"{seed}/{sample}".encode()).digest(), BLOCKS)
    mark = expected_mark(prompt, images)
    for line in range(BLOCKS + 1):
        colours = mark[line * BLOCKS : (line + 1) * BLOCKS] or stamp
        pixels = b"".join(bytes(colour) * BLOCK for colour in colours)
        for row in range(line * BLOCK, (line + 1) * BLOCK):
            start = row * stride + 1
            rows[start : start + len(pixels)] = pixels
    # Noise does not compress: storing it as it is costs a tenth of the time.
    return _png(side, side, zlib.compress(rows, 0 if pad else 1))


def convert(png: bytes, kind: str) -> bytes:
    """A PNG as ``jpeg``, ``webp`` or ``gif``, its mark still readable; ``png`` is left alone."""
    if kind == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        if kind == "gif":
            image.save(out, "GIF")
        elif kind == "webp":
            image.save(out, "WEBP", lossless=True)
        else:
            image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


@cache
def bomb() -> bytes:
    """A valid PNG of 400 megapixels in about 50 kB: 1.2 GB once decoded to RGB."""
    side = 20_000
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return _png(side, side, packed, depth=1, colour=0)


def spoiled(png: bytes, how: str) -> tuple[bytes, str]:
    """What a service sends in place of a picture, and the type it says it has.

    Args:
        png: the picture that should have been sent.
        how: ``bomb``, ``half_jpeg``, ``half_png``, ``svg``, ``gif`` or ``not_image``.
    """
    match how:
        case "bomb":
            return bomb(), "image/png"
        case "half_jpeg":
            # Half of what stands behind the header, so that it opens and does not load.
            header, start, scan = convert(png, "jpeg").partition(b"\xff\xda")
            return header + start + scan[: len(scan) // 2], "image/jpeg"
        case "half_png":
            return png[: len(png) // 2], "image/png"
        case "svg":
            text = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><script>alert(1)</script></svg>'
            return text, "image/svg+xml"
        case "gif":
            return convert(png, "gif"), "image/gif"
        case "not_image":
            return b"the picture is being prepared, come back later", "image/png"
    raise ValueError(how)


def kind_of(data: bytes) -> str | None:
    """``png``, ``jpeg``, ``webp`` or ``gif`` by the first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "gif" if data.startswith((b"GIF87a", b"GIF89a")) else None


def _digest(prompt: str, images: Sequence[bytes]) -> bytes:
    parts = [prompt.encode("utf-8", "surrogatepass"), *images]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _colours(digest: bytes, number: int) -> Mark:
    bits = int.from_bytes(digest)
    levels = [LEVELS[bits >> (2 * place) & 3] for place in range(3 * number)]
    return tuple((levels[at], levels[at + 1], levels[at + 2]) for at in range(0, len(levels), 3))


@lru_cache(maxsize=4)
def _canvas(side: int, noise: bool) -> bytes:
    """Rows of a square picture as PNG packs them: a filter byte and 3 × ``side`` bytes each."""
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, (side, 3 * side), dtype=np.uint8)
    else:
        pixels = np.full((side, 3 * side), 128, dtype=np.uint8)
    return np.pad(pixels, ((0, 0), (1, 0))).tobytes()


def _png(width: int, height: int, packed: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    pieces = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        pieces += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))]
    return b"".join(pieces)
