"""Picture files read, checked and, where asked for, written anew in another size or format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile

from dataflow.decoding import (
    FORMATS,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    load_image,
    normalise,
    open_image,
    orientation_of,
    pillow_errors,
)
from dataflow.errors import ImageError
from dataflow.export.buckets import bucket_for, bucket_sizes
from dataflow.export.options import ExportOptions
from dataflow.export.samples import Picture
from dataflow.io import ImageIO
from dataflow.picture_files import open_file, refuse, short_path, status
from dataflow.remote_files import is_url

_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "AVIF": "avif"}
_OF_ENCODING = {"jpeg": "jpg", "webp": "webp", "png": "png"}
_WRITABLE = ("png", "jpg", "webp")
_MAX_WEBP_SIDE = 16_383
_FULL_COLOUR = 90


class PictureReader:
    """Reads the pictures of samples. Its methods may be called from several threads.

    Args:
        options: what becomes of the pixels.
        folders: where relative paths may begin, in the order in which they are tried.
    """

    def __init__(self, options: ExportOptions, folders: Sequence[Path]) -> None:
        self._options = options
        self._folders = tuple(folders)
        self._io = ImageIO("-")
        self._sizes = (
            None
            if options.bucket_resolution is None
            else bucket_sizes(options.bucket_resolution, options.bucket_step, options.bucket_max_aspect)
        )

    def resolve(self, path: str) -> str:
        """The absolute path of a file that a row names, the first folder's where it is in none; a URL as it is."""
        if is_url(path):
            return path
        tried = [str(folder / path) for folder in self._folders]
        return next((each for each in tried if status(each) is not None), tried[0])

    def digest(self, path: str) -> str:
        """SHA-256 of a file's bytes. Raises ImageError if it cannot be read."""
        return self._io.digest(self.resolve(path))

    def read(self, paths: Sequence[str]) -> list[Picture]:
        """The pictures of one sample; the first decides about the bucket of all.

        Raises:
            ImageError: one of them is no whole picture; its ``path`` says which.
        """
        found: list[Picture] = []
        bucket: tuple[int, int] | None = None
        for path in paths:
            whole = self.resolve(path)
            try:
                data, image = self._opened(whole)
                if self._sizes is not None and bucket is None:
                    bucket = bucket_for(_upright(image), self._sizes)
                found.append(self._picture(data, image, whole, bucket))
            except ImageError as error:
                raise ImageError(error.message, reason=error.reason, path=error.path or short_path(whole)) from error
        return found

    def _opened(self, path: str) -> tuple[bytes, ImageFile]:
        """The file's bytes and its picture, decoded as far as it has to be to know that it is whole."""
        label = short_path(path)
        with open_file(path) as file:
            try:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                data = file.read() if size <= MAX_FILE_BYTES else b""
            except OSError as error:  # pragma: no cover - a failing disk
                raise ImageError(f"cannot be read: {error.strerror}", reason="unreadable", path=label) from error
        if size > MAX_FILE_BYTES:
            refuse("too_large", f"{size:,} bytes are more than {MAX_FILE_BYTES:,}; make the picture smaller", label)
        image = open_image(BytesIO(data), label, FORMATS, MAX_PIXELS)
        if self._options.check == "checksum" and isinstance(image, PngImageFile) and not self._options.touches_pixels:
            with pillow_errors("PNG", label):
                image.verify()  # the checksum of every block, up to the end mark
            return data, image
        return data, load_image(BytesIO(data), label, FORMATS, MAX_PIXELS)

    def _picture(self, data: bytes, image: ImageFile, path: str, bucket: tuple[int, int] | None) -> Picture:
        facts = self._facts(image, path)
        size = _upright(image)
        suffix = _SUFFIXES[image.format or ""]
        wanted = self._wanted(size, bucket)
        encoding = None if self._options.encode is None else _OF_ENCODING[self._options.encode]
        if encoding is not None or wanted != size or (bucket is not None and _orientation(image) != 1):
            suffix = encoding or (suffix if suffix in _WRITABLE else "png")
            data = self._encoded(self._fitted(normalise(image, path, keep_alpha=suffix != "jpg"), wanted), suffix)
            size = wanted
        return Picture(
            data=data,
            suffix=suffix,
            sha256=hashlib.sha256(data).hexdigest(),
            width=size[0],
            height=size[1],
            facts=facts,
            bucket=None if bucket is None else f"{bucket[0]}x{bucket[1]}",
            path=path,
        )

    def _facts(self, image: ImageFile, path: str) -> Mapping[str, Any]:
        if isinstance(record := image.info.get("dataflow"), str):
            try:
                facts = json.loads(record)
            except ValueError:
                facts = None
            if isinstance(facts, dict):
                return facts
        if isinstance(image, PngImageFile) and "parameters" not in image.info and image.fp is None:
            return {}
        try:
            return self._io.read_metadata(path)
        except ImageError:  # pragma: no cover - the file changed since it was read
            return {}

    def _wanted(self, size: tuple[int, int], bucket: tuple[int, int] | None) -> tuple[int, int]:
        if bucket is not None:
            return bucket
        longest = max(size)
        if self._options.max_side is None or longest <= self._options.max_side:
            return size
        scale = self._options.max_side / longest
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def _fitted(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        if picture.size == size:
            return picture
        if self._sizes is None:
            return picture.resize(size, Image.Resampling.LANCZOS)
        if self._options.bucket_fit == "crop":
            return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        return ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="white")

    def _encoded(self, picture: Image.Image, suffix: str) -> bytes:
        buffer = BytesIO()
        quality = self._options.quality
        if suffix == "png":
            picture.save(buffer, "PNG")
        elif suffix == "jpg":
            full = quality >= _FULL_COLOUR
            picture.save(buffer, "JPEG", quality=quality, subsampling=0 if full else 2)
        elif max(picture.size) > _MAX_WEBP_SIDE:
            refuse("too_large", f"{picture.width} × {picture.height} is more than WebP holds; use png", None)
        elif quality == 100:
            picture.save(buffer, "WEBP", lossless=True, exact=True)
        else:
            picture.save(buffer, "WEBP", quality=quality)
        return buffer.getvalue()


def _orientation(image: ImageFile) -> int:
    # Pillow decodes a PNG to look for EXIF behind the pixels.
    return 1 if isinstance(image, PngImageFile) and "exif" not in image.info else orientation_of(image)


def _upright(image: ImageFile) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) >= 5 else (image.width, image.height)
