"""What Gemini answers, in one piece or streamed; pure, like :mod:`dataflow.serving.replies`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn

from dataflow.errors import RefusedError, RetryError, ServingError
from dataflow.serving.api_errors import quoted
from dataflow.serving.replies import (
    QUOTE,
    REFUSALS,
    Reply,
    billed,
    pick,
    usage_of,
    whole_body,
    without_image,
)
from dataflow.serving.reply_images import items, mapping, picture, string

log = logging.getLogger(__name__)

_BLOCKS = REFUSALS | {"OTHER", "JAILBREAK"}
_NO_IMAGE = frozenset({"STOP", "NO_IMAGE", "IMAGE_OTHER", "OTHER", "MALFORMED_RESPONSE", "MAX_TOKENS"})


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
    body = whole_body(body, keys, service, secrets)
    usage = usage_of(_camel(pick(body, "usageMetadata")))
    with billed(usage):
        candidates = [mapping(entry, "a candidate") for entry in items(body.get("candidates"), "candidates")]
        images: list[bytes | str] = []
        texts: list[str] = []
        parts: list[Mapping[str, Any]] = []
        for candidate in candidates:
            for entry in items(mapping(candidate.get("content"), "content").get("parts"), "parts"):
                part = mapping(entry, "a part")
                if not part.get("thought") or pick(part, "thoughtSignature"):
                    parts.append(part)
                if part.get("thought"):
                    continue
                texts.append(string(part.get("text")))
                data = mapping(pick(part, "inlineData"), "inlineData")
                found = picture(data) or string(pick(mapping(pick(part, "fileData"), "fileData"), "fileUri"))
                if found:
                    images.append(found)
        finish = _word(pick(candidates[0], "finishReason")) if candidates else ""
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
    feedback = mapping(pick(body, "promptFeedback"), "promptFeedback")
    block = _word(pick(feedback, "blockReason"))
    words = [_word(pick(candidate, "finishReason")) for candidate in candidates]
    finish = next((word for word in words if word in REFUSALS), words[0] if words else "")
    said = [string(pick(feedback, "blockReasonMessage"))]
    said += [string(pick(candidate, "finishMessage")) for candidate in candidates]
    message = quoted(" ".join(filter(None, [*said, text])), secrets, QUOTE)
    if block in _BLOCKS:
        raise RefusedError(f"{service} blocks the prompt ({block}): {message}".rstrip(": "))
    if finish in REFUSALS:
        raise RefusedError(f"{service} withholds the image ({finish}): {message}".rstrip(": "))
    unknown = quoted(block or finish, secrets, 60)
    if unknown and (block or finish not in _NO_IMAGE):
        log.warning("%s gives a reason that is not known here, %s: it is asked again", service, unknown)
    raise RetryError(without_image(f"the answer of {service}", unknown, message, secrets), reason="no_image")


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


class GeminiStream:
    """A streamed answer: :meth:`add` each chunk, then ask for the :meth:`reply`.

    Args:
        service: its name, for messages.
        secrets: what must not stand in messages.
    """

    def __init__(self, *, service: str, secrets: Sequence[str] = ()) -> None:
        self._names: dict[str, Any] = {"service": service, "secrets": secrets}
        self._candidates: dict[int, dict[str, Any]] = {}
        self._body: dict[str, Any] = {}
        self._chunks = 0

    def add(self, chunk: Any) -> None:
        """Take one chunk, parsed, in the order they came.

        Raises:
            RetryError: ``not_json`` or ``bad_reply``; it is no such chunk.
            ServingError: of the class of the error in it.
        """
        self._chunks += 1
        chunk = chunk[0] if isinstance(chunk, list) and len(chunk) == 1 else chunk
        keys = ("candidates", "promptFeedback", "prompt_feedback", "usageMetadata", "usage_metadata")
        if not isinstance(chunk, Mapping) or chunk.get("error") or not any(key in chunk for key in keys):
            try:
                gemini_reply(chunk, **self._names)
            except ServingError as error:
                error.usage = error.usage or self._body.get("usageMetadata", {})
                raise
        for name, other in (("promptFeedback", "prompt_feedback"), ("usageMetadata", "usage_metadata")):
            if found := chunk.get(name) or chunk.get(other):
                self._body[name] = found
        for entry in items(chunk.get("candidates"), "candidates"):
            self._add(mapping(entry, "a candidate"))

    def _add(self, given: Mapping[str, Any]) -> None:
        index = given.get("index")
        candidate = self._candidates.setdefault(index if isinstance(index, int) else 0, {"content": {"parts": []}})
        for name, other in (("finishReason", "finish_reason"), ("finishMessage", "finish_message")):
            if word := given.get(name) or given.get(other):
                candidate[name] = word
        parts = candidate["content"]["parts"]
        for entry in items(mapping(given.get("content"), "content").get("parts"), "parts"):
            part = mapping(entry, "a part")
            if parts and _goes_on(parts[-1], part):
                parts[-1] = {**parts[-1], "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)

    @property
    def usage(self) -> Mapping[str, Any]:
        """What was counted so far."""
        return self._body.get("usageMetadata", {})

    def reply(self) -> Reply:
        """What was said, as :func:`~dataflow.serving.replies.gemini_reply` would see it in one piece.

        Raises:
            RetryError: ``cut_stream``; it ended without a ``finishReason``.
            ServingError: as ``gemini_reply`` raises.
        """
        candidates = [candidate for _, candidate in sorted(self._candidates.items())]
        over = bool(candidates) and all("finishReason" in candidate for candidate in candidates)
        if not over and (candidates or "promptFeedback" not in self._body):
            message = (
                f"the stream of {self._names['service']} ended without a finishReason, after {self._chunks} chunks"
            )
            raise RetryError(message, reason="cut_stream", usage=self._body.get("usageMetadata"))
        return gemini_reply({"candidates": candidates, **self._body}, **self._names)


def _goes_on(before: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a part is more of the same text. A signature belongs to its own part."""
    plain = all(isinstance(one.get("text"), str) and not one.keys() - {"text", "thought"} for one in (before, part))
    return plain and bool(before.get("thought")) == bool(part.get("thought"))
