"""One call: what was asked, what was decided about it, and what is answered. The same for every endpoint."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from dataflow.serving.fake_api.ledger import Tokens, count
from dataflow.serving.fake_api.pictures import convert, draw, expected_text, kind_of, spoiled
from dataflow.serving.fake_api.script import Plan

SPOILS = ("bomb", "half_jpeg", "half_png", "svg", "gif", "not_image")
ADDRESSES = ("url", "redirect", "redirect_loopback", "redirect_metadata", "url_missing", "url_html", "url_endless")
METADATA = "http://169.254.169.254/latest/meta-data/"


class RejectedError(Exception):
    """The request is not one the real service would take; ``param`` names the field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class Site(Protocol):
    """The running server, as answers see it."""

    origin: str

    @property
    def pad(self) -> int:
        """Least bytes of a picture, 0 for the smallest."""
        ...

    def publish(self, data: bytes, mime: str) -> str:
        """Serve these bytes from now on; the path under which."""
        ...

    def stored(self, file_id: str) -> bytes:
        """An uploaded file; KeyError if there is none."""
        ...


@dataclass(slots=True, kw_only=True)
class Asked:
    """A request, understood.

    Attributes:
        family: ``chat``, ``images`` or ``gemini``: whose words the answer is in.
        model: as asked for.
        prompt: the text; of a conversation, the last thing the user said.
        inputs: bytes of all input images in order, a mask last.
        number: pictures wanted.
        seed: as given, whatever its type.
        kind: ``png``, ``jpeg`` or ``webp``.
        stream: the answer is wanted as server-sent events.
        partials: pictures to send before the real one in a stream.
        wants_image: a picture is wanted, not just text.
        schema: JSON schema of a text answer, ``{}`` for any JSON, None for prose.
        edit: an edit by the Images API.
        body: the request itself; form fields as a mapping.
    """

    family: str
    model: str
    prompt: str
    inputs: tuple[bytes, ...] = ()
    number: int = 1
    seed: Any = None
    kind: str = "png"
    stream: bool = False
    partials: int = 0
    wants_image: bool = True
    schema: Mapping[str, Any] | None = None
    edit: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Picture:
    """A picture as it goes out: its bytes, the type it claims, the text of its base64, and an odd address for it."""

    data: bytes
    mime: str
    base64: str
    url: str | None = None

    @property
    def data_url(self) -> str:
        return f"data:{self.mime};base64,{self.base64}"


@dataclass(slots=True, kw_only=True)
class Reply:
    """What goes back.

    Attributes:
        status: HTTP status.
        body: JSON.
        headers: besides the usual ones.
        frames: server-sent events, whole; None for an answer that is not streamed.
        end: events that close the stream properly.
        tokens: what is billed; None for nothing.
        usage: the same in the service's words.
        images: pictures in the answer.
        tells: the usage stands in what is sent.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    frames: list[bytes] | None = None
    end: list[bytes] = field(default_factory=list)
    tokens: Tokens | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    tells: bool = True


@dataclass(slots=True, kw_only=True)
class Call:
    """A request with the directives it got; ``attempt`` counts from 0, ``discount`` is multiplied into the price."""

    asked: Asked
    plan: Plan
    site: Site
    attempt: int = 0
    discount: float = 1.0

    def pictures(self) -> list[Picture]:
        """The pictures of the answer, spoiled as the plan says."""
        if self.silent():
            return []
        number = int(self.plan.get("count") or self.plan.get("images") or self.asked.number)
        return [self.picture(sample) for sample in range(0 if self.plan.get("count") == "0" else number)]

    def picture(self, sample: int = 0, *, partial: str = "") -> Picture:
        """Picture number ``sample``; ``partial`` is put before the prompt of one that must not be kept."""
        asked = self.asked
        data = draw(
            partial + asked.prompt, asked.inputs, seed=asked.seed, sample=sample, pad=0 if partial else self.site.pad
        )
        data, mime = convert(data, asked.kind), f"image/{asked.kind}"
        for how in SPOILS:
            if how in self.plan and not partial:
                data, mime = spoiled(draw(asked.prompt, asked.inputs, seed=asked.seed, sample=sample), how)
        return Picture(data=data, mime=mime, base64=self._encoded(data), url=self._odd_address(data, mime))

    def silent(self) -> bool:
        """The model answers, and declines to draw."""
        return any(name in self.plan for name in ("refusal_field", "content_filter", "text_only", "finish", "block"))

    def text(self) -> str:
        """The text of an answer that has no pictures."""
        if "say" in self.plan:
            return self.plan["say"]
        if self.asked.wants_image and "text" not in self.plan:
            return "I am sorry, I cannot draw that."
        if self.asked.schema is None:
            return expected_text(self.asked.prompt, self.asked.inputs)
        return orjson.dumps(instance(self.asked.schema, expected_text(self.asked.prompt, self.asked.inputs))).decode()

    def wants_image(self) -> bool:
        """The answer should hold pictures, as far as the script has no say, and if it has, as it says."""
        if "text" in self.plan or ("say" in self.plan and "image" not in self.plan):
            return False
        return self.asked.wants_image or "image" in self.plan

    def tokens(self, images: int, text: str) -> Tokens:
        return count(self.asked.prompt, len(self.asked.inputs), text, images)

    def _encoded(self, data: bytes) -> str:
        text = base64.b64encode(data).decode()
        if "urlsafe_base64" in self.plan:
            text = text.translate(str.maketrans("+/", "-_")).rstrip("=")
        if "spaced_base64" in self.plan:
            text = "\r\n ".join(text[at : at + 76] for at in range(0, len(text), 76))
        if "truncated_base64" in self.plan:
            text = text[: len(text) // 2 // 4 * 4 + 1]
        if "garbage_base64" in self.plan:
            text = text[:100] + "!$%&" + text[100:]
        return text

    def link(self, picture: Picture, shape: str) -> str:
        """Where the picture is, as the shape says it: its data URL, an address, or a path of this server."""
        if picture.url is not None:
            return picture.url
        if not shape.endswith("url"):
            return picture.data_url
        path = self.site.publish(picture.data, picture.mime)
        return path if "relative" in shape else self.site.origin + path

    def _odd_address(self, data: bytes, mime: str) -> str | None:
        """The URL that a fault gives in place of the picture; None where none does."""
        name = next((name for name in ADDRESSES if name in self.plan), None)
        match name:
            case None:
                return None
            case "url":
                return self.plan["url"]
            case "redirect":
                target = self.plan["redirect"] or self.site.origin + self.site.publish(data, mime)
            case "redirect_loopback":
                target = f"{self.site.origin}/_trap"
            case "redirect_metadata":
                target = METADATA
            case _:
                return f"{self.site.origin}/_odd/{name}"
        return f"{self.site.origin}/_redirect/{base64.urlsafe_b64encode(target.encode()).decode()}"


def wants_url(plan: Plan) -> bool:
    """The picture must come as an address, because the plan is about that address."""
    return any(name in plan for name in ADDRESSES)


def event(data: Any, name: str | None = None, *, newline: str = "\n") -> bytes:
    """A server-sent event; ``data`` is JSON, or a string that is sent as it is."""
    text = data if isinstance(data, str) else orjson.dumps(data).decode()
    head = f"event: {name}{newline}" if name else ""
    return f"{head}data: {text}{newline}{newline}".encode()


def decode(text: str, param: str) -> bytes:
    """Base64 of either alphabet, of an image, as the real services check it.

    Raises:
        RejectedError: it is not that.
    """
    plain = text.strip().translate(str.maketrans("-_", "+/"))
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError(f"the image is not valid base64: {error}", param=param, code="invalid_base64") from error
    return checked(data, param)


def checked(data: bytes, param: str) -> bytes:
    """The bytes themselves, if they begin like an image."""
    if kind_of(data) is None:
        raise RejectedError("the image data is not a valid image", param=param, code="invalid_image")
    return data


def from_url(url: str, param: str) -> bytes:
    """An input image by its URL. Only data URLs are looked into: of any other the address stands for the bytes."""
    if not url.startswith("data:"):
        if not url.startswith(("https://", "http://")):
            raise RejectedError(f"not a valid URL: {url[:40]!r}", param=param, code="invalid_image_url")
        return url.encode()
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/(png|jpeg|jpg|webp|gif);base64", head):
        raise RejectedError(f"not an image type: {head!r}", param=param, code="invalid_image_format")
    return decode(data, param)


def instance(schema: Mapping[str, Any], text: str, root: Mapping[str, Any] | None = None) -> Any:
    """A value that fits a JSON schema, the simplest there is; ``text`` stands where a string may be anything."""
    root = schema if root is None else root
    if "$ref" in schema:
        found: Any = root
        for name in str(schema["$ref"]).lstrip("#/").split("/"):
            found = found[name]
        return instance(found, text, root)
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            return instance(schema[word][0], text, root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object")
    match str(kind[0] if isinstance(kind, list) else kind).lower():
        case "object":
            return {name: instance(value, text, root) for name, value in (schema.get("properties") or {}).items()}
        case "array":
            return [instance(schema.get("items") or {"type": "string"}, text, root)] * max(1, schema.get("minItems", 1))
        case "integer":
            return int(schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1))
        case "number":
            return float(schema.get("minimum", 0.5))
        case "boolean":
            return True
        case "null":
            return None
    return text[: schema.get("maxLength", len(text))]


def whole(value: Any, param: str, low: int, high: int, default: int) -> int:
    """A whole number of a request, from JSON or a form."""
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise RejectedError(f"{param} must be a whole number, got {value!r}", param=param) from error
    if not low <= number <= high:
        raise RejectedError(f"{param} must be from {low} to {high}, got {number}", param=param)
    return number


def json_object(data: bytes) -> dict[str, Any]:
    """The body of a request."""
    try:
        body = orjson.loads(data)
    except ValueError as error:
        raise RejectedError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RejectedError("the body must be a JSON object")
    return body


def pieces(text: str, most: int) -> Sequence[str]:
    """A text cut at arbitrary places into at most ``most`` pieces, the same for the same text."""
    if not text:
        return []
    step = max(1, len(text) // most)
    cuts, at = [], 0
    while at < len(text):
        size = 1 + (at * 7919 + len(text) * 31 + 17) % (2 * step)
        cuts.append(text[at : at + size])
        at += size
    return cuts
