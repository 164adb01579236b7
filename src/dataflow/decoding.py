"""From any file or any bytes to a plain 8-bit sRGB picture, or to an ImageError that says what is wrong.

Nothing here believes a file name, a suffix or a header's promise: formats are told from the first bytes, sizes are
checked before pixels are decoded, and everything is decoded to the last row.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dataflow.errors import ImageError
from dataflow.picture_files import refuse

# Pillow warns about odd EXIF and APNG blocks of files that read well. catch_warnings is not thread-safe, a filter is.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Png)ImagePlugin")

MAX_PIXELS = 89_478_485
"""Default for ``max_pixels``. Pillow's own bound, so that its DecompressionBombWarning never has a reason to appear."""

MAX_FILE_BYTES = 2**30
"""Largest file read from disk; nothing within any pixel bound is larger."""

_MAX_SIDE = 65_535

# Reader classes, called without Image.open: it would warn about large pictures before anyone saw their size, and turn a
# JPEG with a hidden preview (MPO, from phones) into an animation.
_READERS: dict[str, Callable[[IO[bytes], str], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "GIF": GifImageFile,
}
try:
    from PIL.AvifImagePlugin import SUPPORTED, AvifImageFile
except ImportError:  # pragma: no cover - Pillow before 11.3
    SUPPORTED = False
if SUPPORTED:
    _READERS["AVIF"] = AvifImageFile  # pyright: ignore[reportPossiblyUnboundVariable]
FORMATS = tuple(_READERS)
FROM_SERVICES = ("PNG", "JPEG", "WEBP")

EXIF_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error, UserWarning)
"""What broken EXIF blocks provoke in Pillow; the warning where the user has turned warnings into errors."""

_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _sniff(head: bytes) -> tuple[str, str]:
    """(format, what to call it) of a file from its first bytes; the format is a key of _READERS, or a reason."""
    signatures = {
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
    }
    for signature, name in signatures.items():
        if head.startswith(signature):
            return name, name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP", "WebP"
    if head[4:8] == b"ftyp":
        brands = head[8:40]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF", "AVIF"
        heic = re.search(rb"hei[cxms]|hev[cxms]|mif1|msf1", brands)
        return ("unsupported", "a HEIC photo") if heic else ("not_an_image", "a video or audio file")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return "unsupported", "an SVG drawing"
    for start, reason, name in (
        (b"%!ps", "unsupported", "a PostScript file"),
        (b"\xc5\xd0\xd3\xc6", "unsupported", "an EPS file"),
        (b"8bps", "unsupported", "a Photoshop file"),
        (b"%pdf", "unsupported", "a PDF document"),
        (b"\xff\x0a", "unsupported", "a JPEG XL image"),
        (b"version https://git-lfs", "not_an_image", "a Git LFS pointer (run 'git lfs pull')"),
        (b"<!doctype html", "not_an_image", "an HTML page"),
        (b"<html", "not_an_image", "an HTML page"),
        (b"{", "not_an_image", "JSON"),
        (b"[", "not_an_image", "JSON"),
        (b"data:", "not_an_image", "a data: URL (decode its base64 first)"),
        (b"ivborw0kggo", "not_an_image", "base64 text (decode it first)"),
        (b"/9j/", "not_an_image", "base64 text (decode it first)"),
        (b"uklgr", "not_an_image", "base64 text (decode it first)"),
    ):
        if text.startswith(start):
            return reason, name
    return "not_an_image", "plain text" if text.isascii() and b"\0" not in text else "something else"


@contextmanager
def pillow_errors(kind: str, path: str | None) -> Iterator[None]:
    """Turn whatever Pillow raises about a broken file into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        # Its parsers raise what the bytes provoke, from KeyError to zlib.error.
        large = isinstance(error, (Image.DecompressionBombError, MemoryError)) or "too large" in str(error)
        if large:
            raise ImageError(f"{kind} file grows too large: {error}", reason="too_large", path=path) from error
        detail = str(error) or type(error).__name__
        message = f"{kind} file is cut short or damaged ({detail}); fetch or make it again"
        raise ImageError(message, reason="truncated", path=path) from error


def open_image(file: IO[bytes], path: str | None, formats: tuple[str, ...], max_pixels: int) -> ImageFile:
    """Open, without decoding, a picture that may be decoded; every check that the header allows is done."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        refuse("empty", "has no bytes at all; fetch or make it again", path)
    if size > MAX_FILE_BYTES:
        refuse("too_large", f"{size:,} bytes are more than {MAX_FILE_BYTES:,}; make the picture smaller", path)
    head = file.read(512)
    file.seek(0)
    kind, name = _sniff(head)
    if kind not in formats:
        reason = "unsupported" if kind.isupper() else kind
        shown = f", starts with {head[:60].decode(errors='replace')!r}" if reason == "not_an_image" else ""
        refuse(reason, f"is {name}{shown}; needed is {', '.join(formats[:-1])} or {formats[-1]}", path)
    with pillow_errors(name, path):
        image = _READERS[kind](file, "")
        width, height = image.size
        if width * height > max_pixels or max(width, height) > _MAX_SIDE:
            limit = f"max_pixels={max_pixels:,} or {_MAX_SIDE:,} a side"
            refuse("too_large", f"{width} × {height} pixels are more than {limit}; make the picture smaller", path)
        if getattr(image, "is_animated", False):
            refuse("animated", f"{name} file holds several frames or pages; save the one you mean by itself", path)
    return image


def load_image(file: IO[bytes], path: str | None, formats: tuple[str, ...], max_pixels: int) -> ImageFile:
    """Decode fully. ``verify`` alone passes half a JPEG; ``load`` alone passes a PNG with wrong checksums."""
    image = open_image(file, path, formats, max_pixels)
    with pillow_errors(image.format or "", path):
        if isinstance(image, PngImageFile):
            image.verify()
            file.seek(0)
            image = PngImageFile(file)
        image.load()
    return image


# Pixels


def orientation_of(image: Image.Image) -> int:
    """1 to 8 as EXIF counts; 1 where nothing readable is said or Pillow turns the picture itself."""
    if isinstance(image, TiffImageFile):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except EXIF_ERRORS:
        return 1
    return value if value in _TURNS else 1


def normalise(image: Image.Image, path: str | None, *, keep_alpha: bool = False) -> Image.Image:
    """A new upright 8-bit sRGB picture, RGB over white; or, if asked for and really transparent, RGBA."""
    image.load()
    if not (image.width and image.height):
        refuse("empty", f"{image.width} × {image.height} pixels are no picture", path)
    orientation = orientation_of(image)
    colour, alpha = _split(image)
    if colour.mode.startswith(("I", "F")):
        colour = _to_8_bits(colour, path)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
            colour = ImageOps.invert(colour)  # Pillow sees to files where 0 is white with 8 bits only
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None and alpha.getextrema() != (255, 255):
        if keep_alpha:
            colour.putalpha(alpha)
        else:
            white = Image.new("RGB", colour.size, "white")
            white.paste(colour, mask=alpha)
            colour = white
    if orientation in _TURNS:
        colour = colour.transpose(_TURNS[orientation])
    colour.info = {}
    return colour


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture without transparency, and its transparency as an ``L`` picture."""
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode == "P" else image, None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode in ("P", "PA", "La", "RGBa", "RGBA"):
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        return rgba.convert("RGB"), alpha
    key = image.info["transparency"]
    if image.mode == "RGB":
        # Of 48-bit files Pillow keeps the upper 8 bits of pixels, but all 16 of the transparent colour.
        key = tuple(value >> 8 if max(key) > 255 else value for value in key)
    elif image.mode == "1":
        key = bool(key)
    same = np.asarray(image) == np.asarray(key)
    if same.ndim == 3:
        same = same.all(axis=2)
    opaque = image.copy()
    del opaque.info["transparency"]  # Pillow would carry it along, and warn where it cannot
    return opaque, Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _to_8_bits(image: Image.Image, path: str | None) -> Image.Image:
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65_535
    # Written so that NaN fails, too.
    if not (values.min() >= 0 and values.max() <= top):
        found = f"values from {values.min()} to {values.max()}"
        refuse("unsupported", f"{found}, only 0 to {top} has a known brightness; convert it to 8 or 16 bits", path)
    return Image.fromarray(np.rint(np.multiply(values, 255 / top, dtype=np.float32)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB, as a new picture. Without a profile, or with a broken or wrong one, values are taken as sRGB."""
    if profile:
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                assert converted is not None  # only in-place conversion returns nothing
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")
