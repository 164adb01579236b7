"""From the replies of image APIs to images, text and errors; pure, no network and no client library.

Everything takes plain dictionaries, as parsed from JSON. What a model wrote is text that anybody may have influenced:
nothing here is slower than linear in it, and nothing but a :class:`~dataflow.errors.ServingError` is raised. What the
service counted is in the ``usage`` of every error that is raised for a reply.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from dataflow.errors import BadOutputError, RefusedError, RetryError, ServingError
from dataflow.serving.api_errors import classify, quoted
from dataflow.serving.reply_images import (
    Answer,
    data_url,
    decode_base64,
    items,
    mapping,
    media_type,
    picture,
    string,
)

__all__ = [
    "ChatStream",
    "ImagesStream",
    "Reply",
    "chat_reply",
    "data_url",
    "decode_base64",
    "gemini_reply",
    "images_reply",
    "media_type",
    "require_images",
]

log = logging.getLogger(__name__)

QUOTE = 300
"""Characters of a model's own words in an error message."""

_SERVICE = "the service"

# Gemini's words, also passed on by gateways.
_REFUSALS = frozenset(
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
_BLOCKS = _REFUSALS | {"OTHER", "JAILBREAK"}
_NO_IMAGE = frozenset({"STOP", "NO_IMAGE", "IMAGE_OTHER", "OTHER", "MALFORMED_RESPONSE", "MAX_TOKENS"})


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


def require_images(reply: Reply, wanted: int) -> Reply:
    """The reply, if it holds exactly as many images as were asked for.

    Nothing is dropped or chosen: of two images where one was asked for nobody knows which is the answer, and a draft
    must not pass for it.

    Args:
        reply: of any service.
        wanted: 1 or more.

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
    raise RetryError(_without_image("the answer", reply.finish, reply.text), reason="no_image", usage=reply.usage)


def _without_image(who: str, finish: str, text: str) -> str:
    said = quoted(text, limit=QUOTE)
    return f"{who} has no image{f' ({quoted(finish, limit=60)})' if finish else ''}: {said or 'and no text'}"


# -- chat completions -------------------------------------------------------------------------------------------------


def chat_reply(body: Mapping[str, Any], *, service: str = _SERVICE, secrets: Iterable[str] = ()) -> Reply:
    """What a chat completion says that was not streamed.

    Images are taken, in this order, from ``message.images`` and from the content: its parts, and data URLs anywhere in
    its text, each image once. URLs in text count only if the answer has no other image: those in Markdown's image form,
    and where there are none of these, bare ones whose path ends like an image's or has a folder ``images``. Reasoning
    is skipped.

    Args:
        body: the whole JSON.
        service: its name, for messages.
        secrets: what must not stand in messages.

    Raises:
        RefusedError: no image, and ``refusal``, ``content_filter`` or Gemini's word for a refusal.
        RetryError: ``not_json`` or ``bad_reply``; it is not such a reply.
        BadOutputError: ``bad_base64`` or ``too_large``; an image in it is broken.
        ServingError: of the class that :func:`~dataflow.serving.api_errors.classify` gives the error in it.
    """
    body = _whole(body, ("choices",), service, secrets)
    usage = _usage(body.get("usage"))
    with _billed(usage):
        choices = [mapping(choice, "a choice") for choice in items(body.get("choices"), "choices")]
        return _chat(choices, usage, service, secrets)


class ChatStream:
    """A streamed chat completion: :meth:`add` each chunk, then ask for the :meth:`reply`.

    Args:
        service: its name, for messages.
        secrets: what must not stand in messages.
    """

    def __init__(self, *, service: str = _SERVICE, secrets: Iterable[str] = ()) -> None:
        self._service, self._secrets = service, tuple(secrets)
        self._choices: dict[int, _Streamed] = {}
        self._usage: Mapping[str, Any] = {}
        self._chunks = 0

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take one chunk, parsed, in the order they came.

        Raises:
            RetryError: ``not_json`` or ``bad_reply``; it is no such chunk.
            ServingError: of the class of the error in it.
        """
        self._chunks += 1
        if not isinstance(chunk, Mapping):
            _not_json(chunk, self._service, self._usage)
        self._usage = _usage(chunk.get("usage")) or self._usage
        with _billed(self._usage):
            if chunk.get("error") or (
                "choices" not in chunk and (chunk.get("detail") or chunk.get("object") == "error")
            ):
                raise classify(200, {}, chunk, service=self._service, secrets=self._secrets)
            for entry in items(chunk.get("choices"), "choices"):
                choice = mapping(entry, "a choice")
                index = choice.get("index")
                self._choices.setdefault(index if isinstance(index, int) else 0, _Streamed()).add(choice)

    def reply(self) -> Reply:
        """What was said, as :func:`chat_reply` would see it in one piece.

        Raises:
            RetryError: ``cut_stream``; it ended without a ``finish_reason``.
            ServingError: as :func:`chat_reply` raises.
        """
        with _billed(self._usage):
            choices = [choice.whole() for _, choice in sorted(self._choices.items())]
            if not choices or not all(choice["finishReason"] or choice["error"] for choice in choices):
                message = f"the stream of {self._service} ended without a finish_reason, after {self._chunks} chunks"
                raise RetryError(message, reason="cut_stream")
            return _chat(choices, self._usage, self._service, self._secrets)


class _Streamed:
    """One choice of a stream, put together again."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.images: list[Any] = []
        self.reasoning: list[Any] = []
        self.refusal: list[str] = []
        self.logprobs: dict[str, list[Any]] = {}
        self.last: dict[str, Any] = {"finishReason": None, "nativeFinishReason": None, "error": None}

    def add(self, choice: Mapping[str, Any]) -> None:
        delta = mapping(choice.get("delta") or choice.get("message"), "a delta")
        content = delta.get("content")
        self.pieces += [content] if isinstance(content, str) else items(content, "content")
        self.images += items(delta.get("images"), "images")
        self.reasoning += items(_pick(delta, "reasoningDetails"), "reasoning_details")
        self.refusal.append(string(delta.get("refusal")))
        logprobs = choice.get("logprobs")
        for name, entries in logprobs.items() if isinstance(logprobs, Mapping) else ():
            if isinstance(entries, list):
                self.logprobs.setdefault(name, []).extend(entries)
        for name in self.last:
            self.last[name] = _pick(choice, name) or self.last[name]

    def whole(self) -> dict[str, Any]:
        message = {
            "content": self.pieces,
            "images": self.images,
            "reasoning_details": self.reasoning,
            "refusal": "".join(self.refusal),
        }
        return {"message": message, "logprobs": self.logprobs or None, **self.last}


def _chat(
    choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any], service: str, secrets: Iterable[str]
) -> Reply:
    if not choices:
        raise RetryError(f"{service} answers without any choice", reason="bad_reply")
    answer = Answer()
    refusals: list[str] = []
    parts: list[Mapping[str, Any]] = []
    for choice in choices:
        if choice.get("error"):
            raise classify(200, {}, {"error": choice["error"]}, service=service, secrets=secrets)
        message = mapping(choice.get("message"), "a message")
        for entry in items(message.get("images"), "images"):
            answer.add_image(entry)
        answer.add_content(message.get("content"))
        details = items(_pick(message, "reasoningDetails"), "reasoning_details")
        parts += (part for part in details if isinstance(part, Mapping))
        words = [string(_pick(choice, name)) for name in ("nativeFinishReason", "finishReason")]
        if said := string(message.get("refusal")):
            refusals.append(said)
        elif words[1] == "content_filter" or any(word.upper() in _REFUSALS for word in words):
            refusals.append(words[0] or words[1])
    first = choices[0]
    finish = string(_pick(first, "finishReason"))
    images, text = answer.images(), answer.text()
    if not images:
        if refusals:
            said = quoted(" ".join([*refusals, text]), secrets, QUOTE)
            raise RefusedError(f"{service} declines: {said}")
        if answer.broken is not None:
            raise answer.broken
        if finish == "error":
            raise RetryError(f"{service} gave up: {quoted(text, secrets, QUOTE)}")
    logprobs = first.get("logprobs")
    return Reply(
        images=images,
        text=text,
        finish=finish,
        usage=usage,
        parts=tuple(parts),
        logprobs=logprobs if isinstance(logprobs, Mapping) else None,
    )


# -- the Images API ---------------------------------------------------------------------------------------------------


def images_reply(body: Mapping[str, Any], *, service: str = _SERVICE, secrets: Iterable[str] = ()) -> Reply:
    """What an Images API answered: OpenAI's, vLLM-Omni's or SGLang's, with base64 or with URLs.

    Equal images stay as many as they are.

    Args:
        body: the whole JSON.
        service: its name, for messages.
        secrets: what must not stand in messages.

    Raises:
        RetryError: ``no_image``; ``not_json`` or ``bad_reply`` if it is not such a reply.
        BadOutputError: ``bad_base64`` or ``too_large``; an image in it is broken.
        ServingError: of the class of the error in it.
    """
    body = _whole(body, ("data", "images"), service, secrets)
    usage = _usage(body.get("usage"))
    with _billed(usage):
        entries = items(body.get("data") or body.get("images"), "data")
        texts: list[str] = []
        images: list[bytes | str] = []
        for entry in entries:
            found = picture(entry)
            if found is not None:
                images.append(found)
            elif isinstance(entry, Mapping) and entry.get("error"):
                raise classify(200, {}, entry, service=service, secrets=secrets)
            if isinstance(entry, Mapping):
                texts.append(string(entry.get("revised_prompt")))
        text = "\n".join(text for text in texts if text)
        if not images:
            raise RetryError(_without_image(f"the answer of {service}", "", text), reason="no_image")
        return Reply(images=tuple(images), text=text, usage=usage)


class ImagesStream:
    """Events of a streamed Images API: :meth:`add` each, then ask for the :meth:`reply`. Partial images are not kept.

    Args:
        service: its name, for messages.
        secrets: what must not stand in messages.
    """

    def __init__(self, *, service: str = _SERVICE, secrets: Iterable[str] = ()) -> None:
        self._service, self._secrets = service, tuple(secrets)
        self._entries: list[Any] = []
        self._usage: Mapping[str, Any] = {}

    def add(self, event: Mapping[str, Any], *, name: str = "") -> None:
        """Take one event.

        Args:
            event: its data, parsed.
            name: what its ``event:`` line says; the data's own ``type`` goes first.

        Raises:
            RetryError: ``not_json``.
            ServingError: of the class of the error in it.
        """
        if not isinstance(event, Mapping):
            _not_json(event, self._service, self._usage)
        kind = string(event.get("type")) or name
        self._usage = _usage(event.get("usage")) or self._usage
        with _billed(self._usage):
            if event.get("error") or kind.endswith(("error", "failed")):
                body = event if event.get("error") else {"error": event}
                raise classify(200, {}, body, service=self._service, secrets=self._secrets)
        if isinstance(event.get("data"), list):
            self._entries += event["data"]  # a service that does not stream, though asked to
        elif kind.endswith(".completed"):
            self._entries.append(event)

    def reply(self) -> Reply:
        """The images that were completed, with the counts that came last: those of the whole request.

        Raises:
            RetryError: ``cut_stream``; none was.
            ServingError: as :func:`images_reply` raises.
        """
        if not self._entries:
            message = f"the stream of {self._service} ended before an image was complete"
            raise RetryError(message, reason="cut_stream", usage=self._usage)
        body = {"data": self._entries, "usage": self._usage}
        return images_reply(body, service=self._service, secrets=self._secrets)


# -- Gemini -----------------------------------------------------------------------------------------------------------


def gemini_reply(body: Mapping[str, Any], *, service: str = "Gemini", secrets: Iterable[str] = ()) -> Reply:
    """What Gemini's ``generateContent`` answered: JSON of the service or of its client library, in either spelling.

    Args:
        body: the whole JSON; data may be base64 or bytes.
        service: its name, for messages.
        secrets: what must not stand in messages.

    Raises:
        RefusedError: the prompt is blocked or the image withheld; the service's reason is in the message.
        RetryError: ``no_image``; it ended without an image for another reason, or with text only. ``not_json`` or
            ``bad_reply``; it is not such a reply.
        BadOutputError: ``bad_base64`` or ``too_large``; an image in it is broken.
        ServingError: of the class of the error in it.
    """
    keys = ("candidates", "promptFeedback", "prompt_feedback", "usageMetadata", "usage_metadata")
    body = _whole(body, keys, service, secrets)
    usage = _usage(_camel(_pick(body, "usageMetadata")))
    with _billed(usage):
        candidates = [mapping(entry, "a candidate") for entry in items(body.get("candidates"), "candidates")]
        images: list[bytes | str] = []
        texts: list[str] = []
        parts: list[Mapping[str, Any]] = []
        for candidate in candidates:
            for entry in items(mapping(candidate.get("content"), "content").get("parts"), "parts"):
                part = mapping(entry, "a part")
                if not part.get("thought") or _pick(part, "thoughtSignature"):
                    parts.append(part)
                if part.get("thought"):
                    continue
                texts.append(string(part.get("text")))
                data = mapping(_pick(part, "inlineData"), "inlineData")
                found = picture(data) or string(_pick(mapping(_pick(part, "fileData"), "fileData"), "fileUri"))
                if found:
                    images.append(found)
        finish = _word(_pick(candidates[0], "finishReason")) if candidates else ""
        text = "".join(texts).strip()
        if not images:
            _raise_gemini(body, candidates, text, service, secrets)
        return Reply(images=tuple(images), text=text, finish=finish, usage=usage, parts=tuple(parts))


def _raise_gemini(
    body: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    text: str,
    service: str,
    secrets: Iterable[str],
) -> NoReturn:
    feedback = mapping(_pick(body, "promptFeedback"), "promptFeedback")
    block = _word(_pick(feedback, "blockReason"))
    words = [_word(_pick(candidate, "finishReason")) for candidate in candidates]
    finish = next((word for word in words if word in _REFUSALS), words[0] if words else "")
    said = [string(_pick(feedback, "blockReasonMessage"))]
    said += [string(_pick(candidate, "finishMessage")) for candidate in candidates]
    message = quoted(" ".join(filter(None, [*said, text])), secrets, QUOTE)
    if block in _BLOCKS:
        raise RefusedError(f"{service} blocks the prompt ({block}): {message}".rstrip(": "))
    if finish in _REFUSALS:
        raise RefusedError(f"{service} withholds the image ({finish}): {message}".rstrip(": "))
    unknown = quoted(block or finish, secrets, 60)
    if unknown and (block or finish not in _NO_IMAGE):
        log.warning("%s gives a reason that is not known here, %s: it is asked again", service, unknown)
    raise RetryError(_without_image(f"the answer of {service}", unknown, message), reason="no_image")


@functools.cache
def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)


def _pick(found: Mapping[str, Any], name: str) -> Any:
    value = found.get(name)
    return found.get(_snake(name)) if value is None else value


def _word(value: Any) -> str:
    return string(value.value if isinstance(value, Enum) else value).upper()


def _camel(value: Any, depth: int = 0) -> Any:
    """Counts under the names of the service, whatever its client library made of them."""
    if isinstance(value, Mapping) and depth < 5:
        names = {key: re.sub(r"_([a-z])", lambda found: found[1].upper(), str(key)) for key in value}
        return {names[key]: _camel(entry, depth + 1) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and depth < 5:
        return [_camel(entry, depth + 1) for entry in value]
    return value.value if isinstance(value, Enum) else value


# -- shapes -----------------------------------------------------------------------------------------------------------


def _whole(body: Any, keys: tuple[str, ...], service: str, secrets: Iterable[str]) -> Mapping[str, Any]:
    """The body, if it has one of the keys and no error."""
    if isinstance(body, list | tuple) and len(body) == 1:
        body = body[0]
    if not isinstance(body, Mapping):
        _not_json(body, service)
    if body.get("error") or not any(key in body for key in keys):
        with _billed(_usage(body.get("usage"))):
            raise classify(200, {}, body, service=service, secrets=secrets)
    return body


@contextmanager
def _billed(usage: Mapping[str, Any]) -> Iterator[None]:
    """What the service counted goes with every error: it is paid for all the same."""
    try:
        yield
    except ServingError as error:
        if usage and not error.usage:
            error.usage = usage
        raise


def _usage(value: Any) -> Mapping[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _not_json(value: object, service: str, usage: Mapping[str, Any] | None = None) -> NoReturn:
    message = f"{service} answers with {type(value).__name__}, not with a JSON object"
    raise RetryError(message, reason="not_json", usage=usage)
