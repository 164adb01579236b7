"""What a chat completion says, in one piece or streamed; pure, like :mod:`dataflow.serving.replies`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dataflow.errors import RefusedError, RetryError
from dataflow.serving.api_errors import classify, quoted
from dataflow.serving.replies import (
    QUOTE,
    REFUSALS,
    SERVICE,
    Reply,
    billed,
    not_json,
    pick,
    usage_of,
    whole_body,
)
from dataflow.serving.reply_images import Answer, items, mapping, string


def chat_reply(
    body: Mapping[str, Any], *, words: bool = False, service: str = SERVICE, secrets: Iterable[str] = ()
) -> Reply:
    """What a chat completion says that was not streamed.

    Images are taken, in this order, from ``message.images`` and from the content: its parts, and data URLs anywhere in
    its text, each image once. URLs in text count only if the answer has no other image: those in Markdown's image form,
    and where there are none of these, bare ones whose path ends like an image's or has a folder ``images``. Reasoning
    is skipped.

    Args:
        body: the whole JSON.
        words: text was asked for, and stays as it is, whatever in it looks like an image.
        service: its name, for messages.
        secrets: what must not stand in messages.

    Raises:
        RefusedError: no image, and ``refusal``, ``content_filter`` or Gemini's word for a refusal.
        RetryError: ``not_json`` or ``bad_reply``; it is not such a reply.
        BadOutputError: ``bad_base64`` or ``too_large``; an image in it is broken.
        ServingError: of the class that :func:`~dataflow.serving.api_errors.classify` gives the error in it.
    """
    body = whole_body(body, ("choices",), service, secrets)
    usage = usage_of(body.get("usage"))
    with billed(usage):
        choices = [mapping(choice, "a choice") for choice in items(body.get("choices"), "choices")]
        return _chat(choices, usage, words, service, secrets)


class ChatStream:
    """A streamed chat completion: :meth:`add` each chunk, then ask for the :meth:`reply`.

    Args:
        words: text was asked for, as for :func:`chat_reply`.
        service: its name, for messages.
        secrets: what must not stand in messages.
    """

    def __init__(self, *, words: bool = False, service: str = SERVICE, secrets: Iterable[str] = ()) -> None:
        self._words, self._service, self._secrets = words, service, tuple(secrets)
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
            not_json(chunk, self._service, self._usage)
        self._usage = usage_of(chunk.get("usage")) or self._usage
        with billed(self._usage):
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
        with billed(self._usage):
            choices = [choice.whole() for _, choice in sorted(self._choices.items())]
            if not choices or not all(choice["finishReason"] or choice["error"] for choice in choices):
                message = f"the stream of {self._service} ended without a finish_reason, after {self._chunks} chunks"
                raise RetryError(message, reason="cut_stream")
            return _chat(choices, self._usage, self._words, self._service, self._secrets)

    @property
    def usage(self) -> Mapping[str, Any]:
        """What was counted so far."""
        return self._usage


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
        self.reasoning += items(pick(delta, "reasoningDetails"), "reasoning_details")
        self.refusal.append(string(delta.get("refusal")))
        logprobs = choice.get("logprobs")
        for name, entries in logprobs.items() if isinstance(logprobs, Mapping) else ():
            if isinstance(entries, list):
                self.logprobs.setdefault(name, []).extend(entries)
        for name in self.last:
            self.last[name] = pick(choice, name) or self.last[name]

    def whole(self) -> dict[str, Any]:
        message = {
            "content": self.pieces,
            "images": self.images,
            "reasoning_details": self.reasoning,
            "refusal": "".join(self.refusal),
        }
        return {"message": message, "logprobs": self.logprobs or None, **self.last}


def _chat(
    choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any], words: bool, service: str, secrets: Iterable[str]
) -> Reply:
    if not choices:
        raise RetryError(f"{service} answers without any choice", reason="bad_reply")
    answer = Answer(words=words)
    refusals: list[str] = []
    parts: list[Mapping[str, Any]] = []
    for choice in choices:
        if choice.get("error"):
            raise classify(200, {}, {"error": choice["error"]}, service=service, secrets=secrets)
        message = mapping(choice.get("message"), "a message")
        for entry in items(message.get("images"), "images"):
            answer.add_image(entry)
        answer.add_content(message.get("content"))
        details = items(pick(message, "reasoningDetails"), "reasoning_details")
        parts += (part for part in details if isinstance(part, Mapping))
        ends = [string(pick(choice, name)) for name in ("nativeFinishReason", "finishReason")]
        if said := string(message.get("refusal")):
            refusals.append(said)
        elif ends[1] == "content_filter" or any(word.upper() in REFUSALS for word in ends):
            refusals.append(ends[0] or ends[1])
    first = choices[0]
    finish = string(pick(first, "finishReason"))
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
