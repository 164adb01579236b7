"""From the replies of image APIs to images, text and errors: what the modules for each protocol share; pure.

Everything takes plain dictionaries, as parsed from JSON. What a model wrote is text that anybody may have influenced:
nothing here is slower than linear in it, and nothing but a :class:`~dataflow.errors.ServingError` is raised. What the
service counted is in the ``usage`` of every error that is raised for a reply.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import orjson

from dataflow.errors import BadOutputError, RetryError, ServingError
from dataflow.serving.api_errors import classify, quoted

QUOTE = 300
"""Characters of a model's own words in an error message."""

SERVICE = "the service"

# Gemini's words, also passed on by gateways.
REFUSALS = frozenset(
    {
        "SAFETY",
        "IMAGE_SAFETY",
        "PROHIBITED_CONTENT",
        "IMAGE_PROHIBITED_CONTENT",
        "BLOCKLIST",
        "SPII",
        "RECITATION",
        "IMAGE_RECITATION",
        "MODEL_ARMOR",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a service answered.

    Attributes:
        images: in order: encoded bytes (a memoryview where they lie in a file), neither checked nor decoded, or a URL
            still to be fetched, absolute or relative to the service; any URL a model can write may stand here.
        text: the answer's text without image data and without Markdown image links.
        finish: the service's word for why it ended (``stop``, ``STOP``, ``length``), ``""`` if it gave none.
        usage: what the service counted, under the names it uses itself; empty if it did not say.
        parts: what must be sent back, unchanged, when the conversation goes on: Gemini's content parts without its
            thoughts, or a chat message's ``reasoning_details``.
        logprobs: of a chat completion's first choice, as given.
    """

    images: tuple[bytes | memoryview | str, ...] = ()
    text: str = ""
    finish: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Mapping[str, Any], ...] = ()
    logprobs: Mapping[str, Any] | None = None


def parse_json(data: bytes | str) -> Any:
    """JSON as services write it: also with half a pair of surrogates, where text was cut in the middle of one.

    Raises:
        ValueError: it is none.
    """
    try:
        return orjson.loads(data)
    except ValueError:
        return json.loads(data)


def require_images(reply: Reply, wanted: int, secrets: Iterable[str] = ()) -> Reply:
    """The reply, if it holds exactly as many images as were asked for.

    Nothing is dropped or chosen: of two images where one was asked for nobody knows which is the answer, and a draft
    must not pass for it.

    Args:
        reply: of any service.
        wanted: 1 or more.
        secrets: what must not stand in messages.

    Raises:
        RetryError: ``no_image``; it has none, its text is in the message.
        BadOutputError: ``wrong_image_count``.
    """
    number = len(reply.images)
    if number == wanted:
        return reply
    if number:
        message = f"{number} images came where {wanted} {'was' if wanted == 1 else 'were'} asked for"
        raise BadOutputError(message, reason="wrong_image_count", usage=reply.usage)
    message = without_image("the answer", reply.finish, reply.text, secrets)
    raise RetryError(message, reason="no_image", usage=reply.usage)


def without_image(who: str, finish: str, text: str, secrets: Iterable[str]) -> str:
    said = quoted(text, secrets, QUOTE)
    return f"{who} has no image{f' ({quoted(finish, secrets, 60)})' if finish else ''}: {said or 'and no text'}"


class Counting(Protocol):
    """A stream that is being read."""

    @property
    def usage(self) -> Mapping[str, Any]: ...


@contextmanager
def counted(stream: Counting) -> Iterator[None]:
    """What a stream had told of its usage goes with the error that ends it."""
    try:
        yield
    except ServingError as error:
        error.usage = error.usage or stream.usage
        raise


def whole_body(body: Any, keys: tuple[str, ...], service: str, secrets: Iterable[str]) -> Mapping[str, Any]:
    """The body, if it has one of the keys and no error."""
    if isinstance(body, list | tuple) and len(body) == 1:
        body = body[0]
    if not isinstance(body, Mapping):
        not_json(body, service)
    if body.get("error") or not any(key in body for key in keys):
        with billed(usage_of(body.get("usage"))):
            raise classify(200, {}, body, service=service, secrets=secrets)
    return body


@contextmanager
def billed(usage: Mapping[str, Any]) -> Iterator[None]:
    """What the service counted goes with every error: it is paid for all the same."""
    try:
        yield
    except ServingError as error:
        if usage and not error.usage:
            error.usage = usage
        raise


def usage_of(value: Any) -> Mapping[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def not_json(value: object, service: str, usage: Mapping[str, Any] | None = None) -> NoReturn:
    message = f"{service} answers with {type(value).__name__}, not with a JSON object"
    raise RetryError(message, reason="not_json", usage=usage)


@functools.cache
def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)


def pick(found: Mapping[str, Any], name: str) -> Any:
    value = found.get(name)
    return found.get(_snake(name)) if value is None else value
