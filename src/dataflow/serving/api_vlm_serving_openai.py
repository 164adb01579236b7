"""Any service that speaks OpenAI's chat completions: images from words and images, or words from images."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dataflow.errors import BadRequestError
from dataflow.serving.api_serving import ApiServing
from dataflow.serving.chat_replies import ChatStream, chat_reply
from dataflow.serving.openai_batches import OpenAIBatches
from dataflow.serving.openai_client import answer, connect, translated_errors
from dataflow.serving.pictures import input_bytes
from dataflow.serving.replies import Reply, counted
from dataflow.serving.reply_images import data_url
from dataflow.types import GenerationRequest, ImageStore

if TYPE_CHECKING:
    import openai

DEFAULT_URL = "https://api.openai.com/v1"


class APIVLMServing_openai(ApiServing):  # noqa: N801 - the name is fixed by the specification
    """A chat-completions service that answers with images; without ``image_io``, with text.

    Several input images of a request are sent as they lie on disk, whole and in order. A further turn of an edit is
    sent as the conversation so far, with what the model answered before.

    Args:
        api_url: base URL of the service, with or without ``/chat/completions``; several for failover.
        key_name_of_api_key: environment variable with the key; several for several keys. It is read when work begins
            and kept nowhere else.
        model_name: as the service calls it.
        image_io: where the images go; None makes it answer with text.
        max_workers: requests in flight at once, at each endpoint.
        timeout: seconds one request may take.
        send_request_stream: have the answer streamed.
        request_params: further fields of the request's body, as JSON: ``temperature``, ``image_config``,
            ``response_format``, ``logprobs``, … They are part of what makes an image what it is. Without ``modalities``
            among them, images are asked for as ``["image", "text"]`` where the serving makes images; None leaves a
            field out.
        images_per_prompt: how many images each prompt asks for, one request each.
        send_seed: send each request's seed; for services that know one.
        requests_per_minute: most requests that may start in a minute, at each endpoint.
        images_per_minute: most images, likewise.
        price_table: a file with prices, laid over the package's own table (:mod:`dataflow.serving.prices`).
        batch_jobs: send the requests as jobs of OpenAI's Batch API, at half price and with an answer within a day;
            ``max_workers`` is then how many jobs wait at once.
        batch_size: requests in one batch job.

    Raises:
        ConfigError: an argument cannot be used.
    """

    service = "chat.completions"
    own_fields = frozenset({"model", "messages", "stream", "n"})
    own_path = "/chat/completions"

    def __init__(
        self,
        api_url: str | Sequence[str] = DEFAULT_URL,
        key_name_of_api_key: str | Sequence[str] = "DF_API_KEY",
        model_name: str = "gemini-2.5-flash-image",
        image_io: ImageStore | None = None,
        max_workers: int = 10,
        timeout: float = 300.0,
        send_request_stream: bool = False,
        *,
        request_params: Mapping[str, Any] | None = None,
        images_per_prompt: int = 1,
        send_seed: bool = False,
        requests_per_minute: float | None = None,
        images_per_minute: float | None = None,
        price_table: str | os.PathLike[str] | None = None,
        batch_jobs: bool = False,
        batch_size: int = 500,
    ) -> None:
        super().__init__(
            api_url=api_url,
            key_name_of_api_key=key_name_of_api_key,
            model_name=model_name,
            image_io=image_io,
            max_workers=max_workers,
            timeout=timeout,
            request_params=request_params,
            images_per_prompt=images_per_prompt,
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
            price_table=price_table,
            batch_jobs=batch_jobs,
            batch_size=batch_size,
        )
        self.stream = send_request_stream and not batch_jobs
        self.send_seed = send_seed
        if image_io is not None:
            self.params = {"modalities": ["image", "text"], **self.params}

    def fingerprint(self) -> Mapping[str, Any]:
        """The protocol and the model's name; the same model behind another address makes the same images."""
        found = super().fingerprint()
        return {**found, "answer": "text"} if self.image_io is None else found

    def check(self, request: GenerationRequest) -> None:
        """Refuse what a chat request cannot say, before it is paid for.

        Raises:
            BadRequestError: a negative prompt, a size, or a parameter of the row that ``request_params`` does not name.
        """
        own_size = (self.params.get("width"), self.params.get("height"))
        if request.negative_prompt and request.negative_prompt != self.params.get("negative_prompt"):
            raise BadRequestError("a chat service takes no negative prompt: say it in the prompt")
        if request.size is not None and request.size != own_size:
            raise BadRequestError(
                "a chat service takes no height and width: give its own field in request_params, such as image_config"
            )
        self.check_parameters(request)

    def _connect(self) -> openai.AsyncOpenAI:
        return connect(self.url, self._key, self.request_timeout, self.concurrency)

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        """The request's body, but for ``stream``."""
        fields = {name: value for name, value in {**self.params, **request.params}.items() if value is not None}
        if self.send_seed:
            fields["seed"] = request.seed % 2**31
        return {"model": self.model, "messages": conversation(request), **fields}

    async def _call(self, request: GenerationRequest) -> Reply:
        body = await asyncio.to_thread(self._body, request)
        named = {name: body.pop(name) for name in ("model", "messages")}
        if self.stream:
            body["stream_options"] = {"include_usage": True, **body.get("stream_options", {})}
        # Plain JSON, as the service gets it, which the client's own types do not describe.
        create: Any = self._client.chat.completions.with_streaming_response.create
        stream = ChatStream(**self._asked_for)
        add = (lambda _, chunk: stream.add(chunk)) if self.stream else None
        with counted(stream), translated_errors(self._classified, self._clean, self.request_timeout):
            async with create(**named, stream=self.stream, extra_body=body) as response:
                found = await answer(response, add, self._classified, self._clean)
        if found is None:
            return stream.reply()
        if "error" in found and not found.get("choices"):
            raise self._classified(response.status_code, response.headers, found)
        return chat_reply(found, **self._asked_for)

    @property
    def _asked_for(self) -> dict[str, Any]:
        return {"words": self.image_io is None, **self._names}

    def _batches(self, requests: Sequence[GenerationRequest]) -> OpenAIBatches:  # noqa: ARG002 - one endpoint for all
        return OpenAIBatches(
            self._client,
            endpoint="/v1/chat/completions",
            body=self._body,
            reply=lambda found: chat_reply(found, **self._asked_for),
            classified=self._classified,
            clean=self._clean,
            timeout=self.request_timeout,
        )

    def _facts(self, reply: Reply) -> dict[str, Any]:
        return {} if reply.logprobs is None else {"logprobs": reply.logprobs}


def conversation(request: GenerationRequest) -> list[dict[str, Any]]:
    """The messages of a request: earlier turns as they were said, then this one.

    Raises:
        BadRequestError: an input image cannot be read (``reason`` is ``bad_image``).
    """
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(request.turns):
        # From the second turn on, the first image is the answer before, which is in the conversation already.
        messages.append(_said(turn.prompt, turn.images[1:] if number else turn.images))
        messages.append({"role": "assistant", "content": [_shown(turn.answer)]})
    messages.append(_said(request.prompt, request.images[1:] if request.turns else request.images))
    return messages


def _said(prompt: str, images: Sequence[str]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": prompt}
    return {"role": "user", "content": [{"type": "text", "text": prompt}, *(_shown(image) for image in images)]}


def _shown(path: str) -> dict[str, Any]:
    try:
        return {"type": "image_url", "image_url": {"url": data_url(input_bytes(path))}}
    except ValueError as error:
        raise BadRequestError(f"input image {path}: {error}", reason="bad_image") from error
