"""Image files: read any a user may have, check bytes nobody vouches for, write results whole or not at all.

Pixels leave this module as plain 8-bit sRGB pictures without side data (profile, EXIF, colour key); files leave it with
the request in their metadata, once in the "parameters" form that image tools show and once exactly, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo

from dataflow import listing, png
from dataflow.decoding import (
    EXIF_ERRORS,
    FORMATS,
    FROM_SERVICES,
    MAX_PIXELS,
    load_image,
    normalise,
    open_file,
    open_image,
    orientation_of,
    pillow_errors,
    refuse,
    short_path,
)
from dataflow.errors import ConfigError, ImageError
from dataflow.types import SavedImage

_SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_NAME = re.compile(r"[0-9a-f]{32}(_[0-9]+)?")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}(?:_[0-9]+)?\.([0-9]{1,9})\.([0-9a-f]{8})[0-9a-f]{8}\.tmp")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_OLD_SECONDS = 24 * 3600
"""What a process on another machine has not finished for so long it will not finish."""

_NOTE = b"dataflow\0"
_EXIF_IFD, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_MAX_RECORD = 2**24
_MAX_WEBP_SIDE = 16_383
_MAX_JPEG_EXIF = 65_533


class ImageIO:
    """A folder of generated images, and the reader for every image that goes into a model.

    Constructing it touches no file; it pickles, and every method may be called from several threads.

    Args:
        save_path: the folder; created with the first image. A relative one stays relative in the rows.
        format: ``png`` (lossless), ``webp`` (lossless, 4 times faster to write) or ``jpeg``.
        quality: of JPEG files, 1 to 100; colour is never subsampled.
        durable: make every image survive a power cut before :meth:`save` returns (fsync, about 0.5 ms).
        max_pixels: pictures with more are refused, before they are decoded.
        max_bytes: largest reply of a service that is looked at. Files on disk may have 1 GiB.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        save_path: str | os.PathLike[str],
        format: str = "png",  # noqa: A002 - the name Pillow uses, too
        *,
        quality: int = 95,
        durable: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = 64 * 2**20,
    ) -> None:
        if format not in _SUFFIXES:
            raise ConfigError(f"ImageIO(format={format!r}): choose one of {', '.join(_SUFFIXES)}")
        if not 1 <= quality <= 100:
            raise ConfigError(f"ImageIO(quality={quality!r}): choose 1 to 100")
        if not 1 <= max_pixels <= 2 * MAX_PIXELS:
            raise ConfigError(f"ImageIO(max_pixels={max_pixels!r}): choose 1 to {2 * MAX_PIXELS:,}, Pillow's own limit")
        if max_bytes < 1:
            raise ConfigError(f"ImageIO(max_bytes={max_bytes!r}): must be positive")
        if not os.fspath(save_path):
            raise ConfigError("ImageIO(save_path=''): name the folder for the images")
        self._given = os.path.expanduser(os.fspath(save_path))  # noqa: PTH111 - pathlib would drop a leading "./"
        self.save_path = Path(self._given)
        self.format = format
        self.quality = quality
        self.durable = durable
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes

    def path(self, name: str) -> str:
        """What stands in a row for the file ``name`` (as in :attr:`SavedImage.name`): ``save_path`` as given + name."""
        return os.path.join(self._given, name)  # noqa: PTH118 - keeps "./" as the user wrote it

    # Reading

    def read(self, source: str | os.PathLike[str] | bytes) -> Image.Image:
        """The picture in a file or in bytes, upright, 8-bit RGB, in sRGB, transparency laid over white.

        Files may be PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF. Bytes are taken for a service's reply: PNG, JPEG or WebP,
        at most ``max_bytes``. 16-bit values are scaled to 8 bits, floating point is taken as 0 to 1.

        Raises:
            ImageError: not one whole, harmless, still picture; ``reason`` says what is wrong.
        """
        if isinstance(source, bytes):
            return normalise(self._decode(source), None)
        with open_file(source) as file:
            label = short_path(source)
            return normalise(load_image(file, label, FORMATS, self.max_pixels), label)

    def probe(self, path: str | os.PathLike[str]) -> tuple[int, int]:
        """(width, height) of the upright picture, from the file's header alone.

        Raises:
            ImageError: as :meth:`read`, for everything that the header can show.
        """
        with open_file(path) as file:
            image = open_image(file, short_path(path), FORMATS, self.max_pixels)
            return (image.height, image.width) if orientation_of(image) >= 5 else (image.width, image.height)

    def digest(self, path: str | os.PathLike[str]) -> str:
        """SHA-256 of the file's bytes, 64 hex digits. Raises ImageError if it is missing or unreadable."""
        with open_file(path) as file:
            try:
                return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:  # pragma: no cover - a failing disk
                raise ImageError(
                    f"cannot be read: {error.strerror}", reason="unreadable", path=short_path(path)
                ) from error

    def read_metadata(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What :meth:`save` was given as ``metadata``.

        For files of other tools with a "parameters" text: its ``prompt``, ``negative_prompt``, ``seed``, ``model`` and
        ``params`` as far as they are there. ``{}`` if the file says nothing.

        Raises:
            ImageError: as :meth:`probe`.
        """
        with open_file(path) as file:
            label = short_path(path)
            image = open_image(file, label, FORMATS, self.max_pixels)
            if isinstance(image, PngImageFile) and not image.info.keys() & {"parameters", "dataflow"}:
                with pillow_errors("PNG", label):
                    image.load()  # text may stand behind the pixels
            parameters, record = _texts(image)
        try:
            metadata = json.loads(record)
        except ValueError:
            metadata = None
        return metadata if isinstance(metadata, dict) else _parse_parameters(parameters)

    # Writing

    def save(self, image: Image.Image | bytes | memoryview, name: str, metadata: Mapping[str, Any]) -> SavedImage:
        """Write one image, whole and once, as ``{save_path}/{name[:2]}/{name}.{suffix}``.

        The file appears under its name complete or not at all. Bytes are decoded and checked first and then encoded
        anew, without loss for PNG and WebP. Where their format is the wanted one and their pixels need no change, the
        image data of a PNG is taken over and a plain JPEG stays what it is. Real transparency is kept (JPEG: laid over
        white); every other mode becomes RGB.

        Args:
            image: a picture of any mode, or the bytes a service sent.
            name: 32 hex digits, optionally ``_`` and a number.
            metadata: JSON values; ``prompt``, ``negative_prompt``, ``seed``, ``model``, ``revision`` and ``params`` are
                shown to other tools, too. What is not JSON is stored as its ``str``. A JPEG holds 64 KiB: prompts that
                do not fit are cut there, and the record says ``"metadata_truncated": true``.

        Raises:
            ValueError: ``name`` is none.
            ImageError: the bytes are not one whole, harmless, still picture, or the format cannot hold it.
            OSError: the file cannot be written (disk full, no permission); nothing is left behind.
        """
        relative = self._stem(name) + _SUFFIXES[self.format]
        image = bytes(image) if isinstance(image, memoryview) else image
        source = self._decode(image) if isinstance(image, bytes) else image
        picture = normalise(source, None, keep_alpha=self.format != "jpeg")
        if self.format == "webp" and max(picture.size) > _MAX_WEBP_SIDE:
            size = f"{picture.width} × {picture.height}"
            refuse("too_large", f"{size} is more than WebP holds; use format='png'", None)
        given = None
        if isinstance(image, bytes) and isinstance(source, JpegImageFile if self.format == "jpeg" else PngImageFile):
            plain = source.mode == picture.mode and not source.info.keys() & {"exif", "icc_profile"}
            given = image if plain and self.format in ("jpeg", "png") else None
        data = self._encode(picture, metadata, given)
        self._publish(data, relative)
        return _saved(data, relative, picture)

    def find(self, name: str) -> SavedImage | None:
        """The image of that name if it is there, whole and decodable, in this store's format or else in another."""
        stem = self._stem(name)
        for suffix in dict.fromkeys((_SUFFIXES[self.format], *_SUFFIXES.values())):
            relative = stem + suffix
            file = self.save_path / relative
            try:
                data = file.read_bytes()
                picture = load_image(BytesIO(data), None, FROM_SERVICES, self.max_pixels)
                if self.durable:
                    _sync(file)
                    _sync(file.parent)
            except (OSError, ImageError):
                continue
            return _saved(data, relative, picture)
        return None

    def existing(self) -> Iterator[tuple[str, int]]:
        """File name relative to ``save_path`` and bytes of every image, unopened, in no particular order."""
        return listing.images(str(self.save_path))

    def sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the files that exist, as :meth:`existing` gives them."""
        for name in names:
            try:
                size = os.stat(os.path.join(self.save_path, name)).st_size  # noqa: PTH116, PTH118 - called for millions
            except OSError:
                continue
            yield name, size

    def sweep(self) -> int:
        """Remove what killed runs left half-written; returns how many files.

        What a living process is writing stays, on this machine or another: caches may share a folder of images.
        """
        removed = 0
        for folder in listing.folders(str(self.save_path)):
            for name in os.listdir(self.save_path / folder):
                if name.endswith(".tmp") and (match := _TEMPORARY.fullmatch(name)):
                    path = self.save_path / folder / name
                    if not _is_alive(int(match[1])) if match[2] == _HOST else _is_old(path):
                        path.unlink(missing_ok=True)
                        removed += 1
        return removed

    def _stem(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no image name: 32 hex digits, optionally followed by _ and a number")
        return f"{name[:2]}/{name}"

    def _decode(self, data: bytes) -> ImageFile:
        if len(data) > self.max_bytes:
            refuse("too_large", f"{len(data):,} bytes are more than max_bytes={self.max_bytes:,}", None)
        return load_image(BytesIO(data), None, FROM_SERVICES, self.max_pixels)

    def _encode(self, image: Image.Image, metadata: Mapping[str, Any], given: bytes | None) -> bytes:
        """The picture as a file; ``given`` is one of the same format that holds just these pixels."""
        buffer = BytesIO()
        if self.format == "png":
            chunks = PngInfo()
            chunks.add_text("parameters", _parameters(metadata, image.size))
            chunks.add_text("dataflow", _json(metadata))
            if given is not None and (spliced := png.with_text(given, image.mode, chunks)) is not None:
                return spliced
            # Level 6 takes nearly twice the time of level 1 for a tenth of the size.
            image.save(buffer, "PNG", pnginfo=chunks, compress_level=1)
            return buffer.getvalue()
        exif = _exif(metadata, image.size, _MAX_JPEG_EXIF if self.format == "jpeg" else None)
        if given is not None:
            # Segments may stand in any order behind the two-byte start, so the pixels need not be touched.
            return given[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + given[2:]
        if self.format == "webp":
            # exact: the colour under full transparency is part of the picture. Method 0: PNG's size, 4 times as fast.
            image.save(buffer, "WEBP", lossless=True, exact=True, method=0, quality=0, exif=exif)
        else:
            image.save(buffer, "JPEG", quality=self.quality, subsampling=0, exif=exif)
        return buffer.getvalue()

    def _publish(self, data: bytes, relative: str) -> None:
        target = self.save_path / relative
        folder = target.parent
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if self.durable:
                _sync(self.save_path)
        temporary = folder / f".{target.stem}.{os.getpid()}.{_HOST}{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                if self.durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if self.durable:
            _sync(folder)


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


def _saved(data: bytes, relative: str, image: Image.Image) -> SavedImage:
    digest = hashlib.sha256(data).hexdigest()
    return SavedImage(name=relative, sha256=digest, bytes=len(data), width=image.width, height=image.height)


def _sync(path: Path) -> None:
    if os.name == "nt":  # pragma: no cover - Windows opens no folders and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Metadata


def _json(metadata: Mapping[str, Any], *, ascii_only: bool = True) -> str:
    """As ASCII any text survives any container, lone surrogates and NUL included."""
    return json.dumps(dict(metadata), default=str, skipkeys=True, ensure_ascii=ascii_only, separators=(",", ":"))


def _parameters(metadata: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The text that Stable Diffusion web UIs write and image tools show."""
    params = metadata.get("params") or {}
    facts = {
        "Steps": params.get("num_inference_steps"),
        "CFG scale": params.get("guidance_scale"),
        "Seed": metadata.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": metadata.get("model"),
        "Model revision": metadata.get("revision"),
    }
    lines = [str(metadata.get("prompt") or "")]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in facts.items() if value is not None))
    return "\n".join(lines).replace("\0", " ").encode(errors="replace").decode()


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


_FACT = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def _parse_parameters(text: str) -> dict[str, Any]:
    lines = text.strip().split("\n")
    facts: dict[str, Any] = {}
    if len(found := _FACT.findall(lines[-1])) >= 3:
        lines.pop()
        facts = {key: _value(value) for key, value in found}
    at = next((number for number, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    metadata: dict[str, Any] = {"prompt": "\n".join(lines[:at])}
    if at < len(lines):
        metadata["negative_prompt"] = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    for fact, key in (("Seed", "seed"), ("Model", "model"), ("Model revision", "revision")):
        if fact in facts:
            metadata[key] = facts.pop(fact)
    if size := re.fullmatch(r"(\d+)x(\d+)", str(facts.pop("Size", ""))):
        facts |= {"width": int(size[1]), "height": int(size[2])}
    names = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale"}
    if params := {names.get(key, key): value for key, value in facts.items()}:
        metadata["params"] = params
    return metadata if any(metadata.values()) else {}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _exif(metadata: Mapping[str, Any], size: tuple[int, int], limit: int | None) -> bytes:
    """Both texts as an EXIF block: ``parameters`` in UserComment, as web UIs do; the JSON, deflated, in MakerNote."""
    comment, note = _parameters(metadata, size), _pack(metadata)
    if limit is not None:
        room = limit - 1024  # the block's own frame
        essential = {key: metadata[key] for key in ("request_id", "seed", "model", "revision") if key in metadata}
        for record in (_cut(metadata, 2000), essential):
            if len(note) > room:
                note = _pack({**record, "metadata_truncated": True})
        if len(comment.encode("utf-16-be")) > room - len(note):
            # Two prompts of up to four bytes a character, and the line of facts.
            comment = _parameters(_cut(metadata, max(0, room - len(note) - 4096) // 8), size)
    exif = Image.Exif()
    block = exif.get_ifd(_EXIF_IFD)
    block[_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    block[_MAKER_NOTE] = note
    return exif.tobytes()


def _cut(metadata: Mapping[str, Any], length: int) -> dict[str, Any]:
    prompts = {key: str(metadata[key])[:length] for key in ("prompt", "negative_prompt") if metadata.get(key)}
    return {**metadata, **prompts}


def _pack(metadata: Mapping[str, Any]) -> bytes:
    return _NOTE + zlib.compress(_json(metadata, ascii_only=False).encode("utf-8", "surrogatepass"))


def _texts(image: ImageFile) -> tuple[str, str]:
    """The ``parameters`` text and the JSON text in an opened file, each ``""`` if there is none."""
    if image.info.keys() & {"parameters", "dataflow"}:
        return str(image.info.get("parameters", "")), str(image.info.get("dataflow", ""))
    try:
        block = image.getexif().get_ifd(_EXIF_IFD)
    except EXIF_ERRORS:
        return "", ""
    comment, note = block.get(_USER_COMMENT), block.get(_MAKER_NOTE)
    parameters = record = ""
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        raw = comment[8:]
        # Tools disagree on the byte order; in either, the high bytes of the facts' ASCII are the zeros.
        order = "utf-16-be" if raw[::2].count(0) >= raw[1::2].count(0) else "utf-16-le"
        parameters = raw.decode(order, "replace")
    if isinstance(note, bytes) and note.startswith(_NOTE):
        try:
            record = zlib.decompressobj().decompress(note[len(_NOTE) :], _MAX_RECORD).decode("utf-8", "surrogatepass")
        except (zlib.error, UnicodeDecodeError):
            record = ""
    return parameters, record
