"""Images and text out of whatever a service puts them in: parts, data URLs, Markdown, base64; pure.

What a model wrote is text that anybody may have influenced: nothing here is slower than linear in it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

from dataflow.errors import BadOutputError, BadRequestError, RetryError

MAX_IMAGE_BYTES = 64 * 2**20

_HEAD = re.compile(r"data:image/[\w.+-]{1,40}(?:;[\w=.-]{1,40}){0,4}?;base64,", re.ASCII)
_RUN = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_LINE = re.compile(r"[ \t]{0,8}\r?\n[ \t]{0,8}([A-Za-z0-9+/_-]++={0,2})(?=[ \t]{0,8}(?:[\r\n)\"'>]|\Z))")
_WRAPPED = range(60, 1025)
_TITLE = r"(?:[ \t]{1,8}(?:\"[^\"\n]{0,200}\"|'[^'\n]{0,200}'))?"
_DATA_END = re.compile(rf">?{_TITLE}\s{{0,8}}\)")
_TARGET = re.compile(rf"\s{{0,8}}<?((?:[^\s<>()]|\([^\s<>()]{{0,200}}\)){{1,4096}})>?{_TITLE}\s{{0,8}}\)?")
_BARE = re.compile(r"https?://[^\s<>()\"'`\]]{1,4096}", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_LONGEST_URL = 4096
_MAGIC = ("iVBORw0KGgo", "/9j/", "UklGR")  # how PNG, JPEG and WebP begin in base64
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class Answer:
    """Collects what an answer shows and says, in order.

    Args:
        words: text stays as it is; only what stands apart from it is an image.

    Attributes:
        broken: why the first image that stood in the text cannot be read.
    """

    def __init__(self, *, words: bool = False) -> None:
        self._words = words
        self.broken: BadOutputError | None = None
        self._images: dict[bytes | str, None] = {}  # in order, each once
        self._pending: list[str] = []
        self._rest: list[str] = []
        self._linked: dict[str, None] = {}
        self._apart = False

    def add_image(self, entry: Any) -> None:
        """An image that stands apart from the text; thoughts are skipped."""
        if isinstance(entry, Mapping) and entry.get("thought"):
            return
        found = picture(entry)
        if found is not None:
            self._images.setdefault(found)
            self._apart = True

    def add_content(self, content: Any) -> None:
        """A message's content: a string, or parts; text goes on over parts until something else comes."""
        for part in [content] if isinstance(content, str) else items(content, "content"):
            if isinstance(part, str):
                self._pending.append(part)
                continue
            part = mapping(part, "a part of the content")
            kind = string(part.get("type")).lower()
            if part.get("thought") or "reason" in kind or "think" in kind:
                continue
            if isinstance(part.get("text"), str):
                self._pending.append(part["text"])
            elif not kind or "image" in kind:
                self._flush()
                self.add_image(part)
        self._flush()

    def images(self) -> tuple[bytes | str, ...]:
        """Those found; none if one is :attr:`broken`, unless the service shows images apart from the text too."""
        if self.broken is not None and not self._apart:
            return ()
        if self._images:
            return tuple(self._images)
        if self._linked:
            return tuple(self._linked)
        if self._words:
            return ()
        urls = (found[0].rstrip(".,;:!?*_") for rest in self._rest for found in _BARE.finditer(rest))
        return tuple(dict.fromkeys(url for url in urls if _looks_like_image(url)))

    def text(self) -> str:
        """What was said, without image data and without Markdown's image links."""
        return "\n".join(rest for rest in self._rest if rest)

    def _flush(self) -> None:
        text = _without_thoughts("".join(self._pending))
        self._pending.clear()
        if self._words:
            self._rest.append(text)
            return
        data, rest = _cut_data(text)
        for encoded in data:
            try:
                self._images.setdefault(decode_base64(encoded))
            except BadOutputError as error:
                self.broken = self.broken or error
        links, rest = _cut_links(rest)
        self._linked |= dict.fromkeys(links)
        self._rest.append(rest.strip())


# -- images in text ---------------------------------------------------------------------------------------------------


def _without_thoughts(text: str) -> str:
    start = text[:200].lstrip()
    for tag in ("think", "thinking"):
        if start.startswith(f"<{tag}>") and (end := text.find(f"</{tag}>")) >= 0:
            return text[end + len(tag) + 3 :]
    return text


def _cut_data(text: str) -> tuple[list[str], str]:
    """The base64 of all data URLs of images in a text, and the text without them and the Markdown around them."""
    found, kept, done = [], [], 0
    at = text.find("data:image/")
    while at >= 0:
        head = _HEAD.match(text, at)
        start, end = at, _run_end(text, head.end()) if head else at
        if head is None or end == head.end():
            # Only talk about data URLs.
            at = text.find("data:image/", at + 1)
            continue
        found.append(text[head.end() : end])
        if text[max(at - 3, done) : at].rstrip("<").endswith("]("):
            opening = text.rfind("![", done, at)
            if opening >= 0:
                start = opening
                closing = _DATA_END.match(text, end)
                end = closing.end() if closing else end
        kept.append(text[done:start])
        done = end
        at = text.find("data:image/", done)
    kept.append(text[done:])
    return found, "".join(kept)


def _cut_links(text: str) -> tuple[list[str], str]:
    """The URLs of all Markdown images in a text, and the text without these."""
    found, kept, done, low = [], [], 0, 0
    at = text.find("](")
    while at >= 0:
        # Only back to the previous "](": whoever searches further, or forwards from each "![", takes quadratic time.
        start = text.rfind("![", low, at)
        target = _TARGET.match(text, at + 2) if start >= 0 else None
        low = at + 2
        if target is not None and _may_be_fetched(target[1]):
            found.append(target[1])
            kept.append(text[done:start])
            done = low = target.end()
        at = text.find("](", low)
    kept.append(text[done:])
    return found, "".join(kept)


def _run_end(text: str, start: int) -> int:
    """Where base64 that begins at ``start`` ends: lines of one length are one run, whatever stands after it is not."""
    found = _RUN.match(text, start)
    end = found.end() if found else start
    length = end - start
    while length in _WRAPPED and (line := _LINE.match(text, end)) and len(line[1]) <= length:
        end = line.end()
        if len(line[1]) < length:
            break
    return end


def _may_be_fetched(url: str) -> bool:
    if url.startswith("/") or url[:8].lower().startswith(("http://", "https://")):
        return True
    return not _SCHEME.match(url) and _looks_like_image(url)


def _looks_like_image(url: str) -> bool:
    path = url.partition("#")[0].partition("?")[0].lower()
    return path.endswith(_SUFFIXES) or "/images/" in path


def picture(entry: Any, depth: int = 0) -> bytes | str | None:
    """The image in an entry of any service: decoded, or its URL, or None if there is none in it.

    Raises:
        RetryError: ``bad_reply``; it has a form that no image has.
        BadOutputError: ``bad_base64`` or ``too_large``.
    """
    if isinstance(entry, str):
        return _located(entry)
    entry = mapping(entry, "an image")
    for name in ("b64_json", "b64Json", "data", "inlineData", "inline_data", "image_url", "imageUrl", "image", "url"):
        value = entry.get(name)
        if isinstance(value, bytes) and value:
            return value
        if isinstance(value, str) and value.strip():
            encoded = name in ("b64_json", "b64Json", "data") and value.lstrip()[:5].lower() != "data:"
            return decode_base64(value) if encoded else _located(value)
        if isinstance(value, Mapping) and depth < 3:
            found = picture(value, depth + 1)
            if found is not None:
                return found
        elif value:
            bad(value, "an image")
    return picture(entry["source"], depth + 1) if isinstance(entry.get("source"), Mapping) and depth < 3 else None


def _located(text: str) -> bytes | str | None:
    text = text.strip()
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma or not head[:200].lower().endswith(";base64"):
            raise BadOutputError("a data URL without base64 came where an image should be", reason="bad_base64")
        return decode_base64(unquote(data) if "%" in data else data)
    longer = len(text) > _LONGEST_URL and not text[:8].lower().startswith(("http://", "https://"))
    if longer or text.startswith(_MAGIC):
        return decode_base64(text)
    return text or None


# -- bytes ------------------------------------------------------------------------------------------------------------


def decode_base64(text: str, *, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """Decode base64 in the standard or the URL-safe alphabet, with white space anywhere, with padding or without.

    Args:
        text: the base64; takes time linear in its length.
        limit: the most bytes it may decode to.

    Raises:
        BadOutputError: ``bad_base64``; it is empty, holds anything else, or is cut, as far as that can be seen.
            ``too_large``.
    """
    if not isinstance(text, str):
        raise BadOutputError(f"{type(text).__name__} came where base64 should be", reason="bad_base64")
    try:
        raw = text.encode("ascii").translate(_URL_SAFE, b" \t\r\n\f\v")
    except UnicodeEncodeError:
        raise BadOutputError("the image's base64 holds letters that base64 has not", reason="bad_base64") from None
    if len(raw) * 3 // 4 - 2 > limit:
        raise BadOutputError(f"the image has more than {limit:,} bytes", reason="too_large")
    bare = raw.rstrip(b"=")
    padding = -len(bare) % 4
    if not bare or padding == 3 or len(raw) - len(bare) not in (0, padding):
        raise BadOutputError(f"the image's base64 is cut after {len(raw):,} characters", reason="bad_base64")
    try:
        data = base64.b64decode(bare + b"=" * padding, validate=True)
    except ValueError:
        raise BadOutputError("the image's base64 holds letters that base64 has not", reason="bad_base64") from None
    # Where padding is missing, bits left over say that the end is missing with it.
    bare_end = padding and len(raw) == len(bare)
    if bare_end and base64.b64encode(data[padding - 3 :]).rstrip(b"=") != bare[padding - 4 :]:
        raise BadOutputError(f"the image's base64 is cut after {len(raw):,} characters", reason="bad_base64")
    if len(data) > limit:
        raise BadOutputError(f"the image has more than {limit:,} bytes", reason="too_large")
    return data


def media_type(data: bytes) -> str:
    """The media type of an input image, from its first bytes.

    Raises:
        BadRequestError: ``image_unsupported``; it is neither PNG nor JPEG nor WebP.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise BadRequestError(
        "services take PNG, JPEG and WebP; an input image is none of these", reason="image_unsupported"
    )


def data_url(data: bytes) -> str:
    """An input image as a data URL.

    Raises:
        BadRequestError: as :func:`media_type` raises.
    """
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


# -- shapes: what is missing is empty, what has another type is a RetryError, ``bad_reply`` ----------------------------


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else bad(value, what)


def items(value: Any, what: str) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else bad(value, what)


def string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def bad(value: object, what: str) -> NoReturn:
    raise RetryError(f"the answer has {type(value).__name__} where {what} should be", reason="bad_reply")
