"""What an Images API answers, in one piece or streamed; pure, like :mod:`dataflow.serving.replies`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dataflow.errors import RetryError
from dataflow.serving.api_errors import classify
from dataflow.serving.replies import (
    SERVICE,
    Reply,
    billed,
    not_json,
    usage_of,
    whole_body,
    without_image,
)
from dataflow.serving.reply_images import items, picture, string


def images_reply(body: Mapping[str, Any], *, service: str = SERVICE, secrets: Iterable[str] = ()) -> Reply:
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
    body = whole_body(body, ("data", "images"), service, secrets)
    usage = usage_of(body.get("usage"))
    with billed(usage):
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
            raise RetryError(without_image(f"the answer of {service}", "", text, secrets), reason="no_image")
        return Reply(images=tuple(images), text=text, usage=usage)


class ImagesStream:
    """Events of a streamed Images API: :meth:`add` each, then ask for the :meth:`reply`. Partial images are not kept.

    Args:
        service: its name, for messages.
        secrets: what must not stand in messages.
    """

    def __init__(self, *, service: str = SERVICE, secrets: Iterable[str] = ()) -> None:
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
            not_json(event, self._service, self._usage)
        kind = string(event.get("type")) or name
        self._usage = usage_of(event.get("usage")) or self._usage
        with billed(self._usage):
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

    @property
    def usage(self) -> Mapping[str, Any]:
        """What was counted so far."""
        return self._usage
