"""Any service that speaks OpenAI's chat completions: images from words and images, or words from images."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    FatalServingError,
    MissingExtraError,
    RetryError,
    ServingError,
)
from dataflow.serving import api_errors, prices
from dataflow.serving.download import Downloader, warn_plain_http
from dataflow.serving.replies import ChatStream, Reply, chat_reply, require_images
from dataflow.serving.reply_images import data_url
from dataflow.types import GenerationRequest, GenerationResult, ImageStore, Serving

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

DEFAULT_URL = "https://api.openai.com/v1"
MAX_ANSWER = 256 * 2**20
"""Bytes of one answer; more than any image takes, base64 and all."""
OWN = frozenset({"model", "messages", "stream", "n"})
"""Parameters of the call that are the serving's to set."""


class APIVLMServing_openai(Serving):  # noqa: N801 - the name is fixed by the specification
    """A chat-completions service that answers with images; without ``image_io``, with text.

    Several input images of a request are sent as they lie on disk, whole and in order. A further turn of an edit is
    sent as the conversation so far, with what the model answered before. Nothing is tried again here: the engine does
    that.

    Args:
        api_url: base URL of the service, with or without ``/chat/completions``.
        key_name_of_api_key: environment variable with the key. It is read when work begins and kept nowhere else.
        model_name: as the service calls it.
        image_io: where the images go; None makes it answer with text.
        max_workers: requests in flight at once.
        timeout: seconds one request may take.
        send_request_stream: have the answer streamed.
        request_params: further fields of the request's body, as JSON: ``temperature``, ``image_config``,
            ``response_format``, ``logprobs``, … They are part of what makes an image what it is. Without ``modalities``
            among them, images are asked for as ``["image", "text"]`` where the serving makes images; None leaves a
            field out.
        images_per_prompt: how many images each prompt asks for, one request each.
        send_seed: send each request's seed; for services that know one.
        requests_per_minute: most requests that may start in a minute.
        price_table: a file with prices, laid over the package's own table (:mod:`dataflow.serving.prices`).

    Raises:
        ConfigError: an argument cannot be used.
    """

    reproducible = False

    def __init__(
        self,
        api_url: str = DEFAULT_URL,
        key_name_of_api_key: str = "DF_API_KEY",
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
        price_table: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("max_workers", max_workers), ("images_per_prompt", images_per_prompt)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")
        for name, value in (("timeout", timeout), ("requests_per_minute", requests_per_minute)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be more than 0, got {value!r}")
        if not api_url.startswith(("http://", "https://")):
            raise ConfigError(f"api_url must begin with https:// (or http:// for this machine), got {api_url!r}")
        if taken := sorted(OWN & set(request_params or {})):
            raise ConfigError(f"request_params: {', '.join(taken)} is set by the serving itself")
        try:
            params = json.loads(json.dumps(dict(request_params or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"request_params: {error}") from error
        self.url = api_url.rstrip("/").removesuffix("/chat/completions")
        self.key_name = key_name_of_api_key
        self.model = model_name
        self.image_io = image_io
        self.concurrency = max_workers
        self.timeout = timeout
        self.stream = send_request_stream
        self.images_per_prompt = images_per_prompt
        self.send_seed = send_seed
        self.requests_per_minute = requests_per_minute
        self.price_table = None if price_table is None else os.fspath(price_table)
        self.params = {"modalities": ["image", "text"], **params} if image_io is not None else params
        self._rates: prices.Rates | None = None
        self._key = ""
        self._client: openai.AsyncOpenAI | None = None
        self._downloader: Downloader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings without the key, which never leaves this process with them."""
        return {**self.__dict__, "_key": "", "_client": None, "_downloader": None, "_loop": None}

    # What it takes -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """The service's protocol and the model's name: the same model behind another address makes the same images."""
        found: dict[str, Any] = {"service": "chat.completions", "model": self.model}
        return {**found, "answer": "text"} if self.image_io is None else found

    def default_params(self) -> Mapping[str, Any]:
        """``request_params``."""
        self._find_rates()  # a price table that cannot be read is found before anything is paid for
        return dict(self.params)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what a chat request cannot say, before it is paid for.

        Raises:
            BadRequestError: a negative prompt, a size, or a parameter of the row that ``request_params`` does not name.
        """
        if request.negative_prompt:
            raise BadRequestError("a chat service takes no negative prompt: say it in the prompt")
        if request.size is not None:
            raise BadRequestError(
                "a chat service takes no height and width: give its own field in request_params, such as image_config"
            )
        unknown = sorted(
            name for name, value in request.params.items() if name not in self.params and value is not None
        )
        if unknown:
            raise BadRequestError(
                f"the row sets {', '.join(unknown)}: a chat service takes that only if request_params names it"
            )

    def estimate(self, request: GenerationRequest) -> float | None:  # noqa: ARG002 - part of the protocol
        """The list price of an image; None where the model has none."""
        rates = self._find_rates()
        return None if rates is None or self.image_io is None else rates.image

    def _find_rates(self) -> prices.Rates | None:
        if self._rates is None:
            self._rates = prices.rates_of(self.model, self.price_table)
        return self._rates

    # Work ----------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Find the key. The connections are opened by the first request.

        Raises:
            ConfigError: the environment holds no key (``MissingExtraError``: without the openai package).
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("openai", "api", "a chat-completions service") from error
        self._key = os.environ.get(self.key_name, "").strip()
        if not self._key:
            raise ConfigError(
                f"the environment variable {self.key_name} holds no key for {self.url}: set it (to any word for a "
                "server that asks for none)"
            )
        warn_plain_http(self.url)

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One answer per request; each fails by itself.

        Raises:
            FatalServingError: not set up.
        """
        client = await self._open()
        return list(await asyncio.gather(*(self._answer(client, request) for request in requests)))

    def cleanup(self) -> None:
        """Close the connections. :meth:`setup` may be called again."""
        client, downloader, loop = self._client, self._downloader, self._loop
        self._client = self._downloader = self._loop = None
        if client is None or downloader is None or loop is None or not loop.is_running():
            return

        async def close() -> None:
            await downloader.close()
            await client.close()

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(close(), loop).result(10)

    async def _open(self) -> openai.AsyncOpenAI:
        if not self._key:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        if self._client is None:
            import openai

            # The limit is named: the library's "no limit" quietly means a hundred connections.
            limits = openai.DefaultAioHttpClient(timeout=self.timeout, limits=_limits(self.concurrency))
            self._client = openai.AsyncOpenAI(
                api_key=self._key, base_url=self.url, max_retries=0, timeout=self.timeout, http_client=limits
            )
            self._downloader = Downloader(engine_url=self.url)
            self._loop = asyncio.get_running_loop()
        assert self._downloader is not None
        await self._downloader.open()
        return self._client

    async def _answer(self, client: openai.AsyncOpenAI, request: GenerationRequest) -> GenerationResult:
        started = time.perf_counter()
        reply: Reply | None = None
        usage: Mapping[str, Any] = {}
        try:
            reply = await self._call(client, request)
            usage = self._priced(reply.usage, len(reply.images))
            images: tuple[bytes, ...] = ()
            if self.image_io is not None:
                images = await self._fetched(require_images(reply, 1).images)
        except ServingError as error:
            counted = error.usage or (reply.usage if reply else {})
            if counted:
                error.usage = self._priced(counted, len(reply.images) if reply else 0)
            return GenerationResult(error=error, usage=error.usage, seconds=time.perf_counter() - started)
        facts: dict[str, Any] = {"service": self.url, "finish_reason": reply.finish}
        if reply.logprobs is not None:
            facts["logprobs"] = reply.logprobs
        text = reply.text if self.image_io is None else None
        seconds = time.perf_counter() - started
        return GenerationResult(images=images, text=text, usage=usage, provenance=facts, seconds=seconds)

    async def _call(self, client: openai.AsyncOpenAI, request: GenerationRequest) -> Reply:
        import aiohttp
        import httpx2
        import openai

        body = {name: value for name, value in {**self.params, **request.params}.items() if value is not None}
        if self.send_seed:
            body["seed"] = request.seed % 2**31
        if self.stream:
            body["stream_options"] = {"include_usage": True, **body.get("stream_options", {})}
        messages = await asyncio.to_thread(conversation, request)
        # Plain JSON, as the service gets it, which the client's own types do not describe.
        create: Any = client.chat.completions.with_streaming_response.create
        try:
            async with create(model=self.model, messages=messages, stream=self.stream, extra_body=body) as response:
                if self.stream and "text/event-stream" in response.headers.get("content-type", ""):
                    return await _streamed(response, ChatStream(**self._names))
                data = await _whole(response)
                return chat_reply(self._json(data, response.status_code, response.headers), **self._names)
        except openai.APIStatusError as error:
            body_ = error.body if isinstance(error.body, Mapping | str) else str(error.body or "")
            raise self._classified(error.status_code, error.response.headers, body_) from None
        except openai.APITimeoutError:
            raise RetryError(f"no answer within {self.timeout:g} s", reason="timeout") from None
        except openai.APIConnectionError as error:
            raise RetryError(self._clean(f"no connection: {error.__cause__ or error}"), reason="connection") from None
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            # What breaks in the middle of an answer comes as the transport's own error, which is not the SDK's.
            raise RetryError(
                self._clean(f"the answer broke off: {type(error).__name__}: {error}"), reason="cut_answer"
            ) from None

    def _json(self, data: bytes, status: int, headers: Mapping[str, str]) -> Mapping[str, Any]:
        try:
            body = orjson.loads(data)
        except ValueError:
            raise self._classified(status, headers, data) from None
        if not isinstance(body, dict) or ("error" in body and not body.get("choices")):
            raise self._classified(status, headers, body if isinstance(body, dict) else data)
        return body

    def _classified(
        self, status: int, headers: Mapping[str, str], body: bytes | str | Mapping[str, Any]
    ) -> ServingError:
        return api_errors.classify(status, headers, body, **self._names)

    @property
    def _names(self) -> dict[str, Any]:
        """What errors are told: who answered, and what must not stand in them."""
        return {"service": self.url, "secrets": [self._key]}

    def _clean(self, text: str) -> str:
        return api_errors.redact(text, [self._key])

    def _priced(self, usage: Mapping[str, Any], images: int) -> Mapping[str, Any]:
        return {**usage, "usd": prices.dollars(self._find_rates(), usage, images)}

    async def _fetched(self, images: Sequence[bytes | str]) -> tuple[bytes, ...]:
        assert self._downloader is not None
        fetch, key = self._downloader.fetch, self._key
        return tuple([image if isinstance(image, bytes) else await fetch(image, key=key) for image in images])


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
        return {"type": "image_url", "image_url": {"url": data_url(Path(path).read_bytes())}}
    except (OSError, ValueError) as error:
        raise BadRequestError(f"input image {path}: {error}", reason="bad_image") from error


def _limits(connections: int) -> Any:
    import httpx2

    return httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)


async def _whole(response: Any) -> bytes:
    parts, size = [], 0
    async for part in response.iter_bytes():
        size += len(part)
        if size > MAX_ANSWER:
            raise BadOutputError(f"the answer is larger than {MAX_ANSWER:,} bytes", reason="too_large")
        parts.append(part)
    return b"".join(parts)


async def _streamed(response: Any, stream: ChatStream) -> Reply:
    """The answer of a stream of server-sent events, of which only the ``data`` lines matter."""
    size = 0
    async for line in response.iter_lines():
        size += len(line)
        if size > MAX_ANSWER:
            raise BadOutputError(f"the answer is larger than {MAX_ANSWER:,} bytes", reason="too_large")
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            continue
        try:
            stream.add(orjson.loads(data))
        except orjson.JSONDecodeError:
            raise RetryError(f"a piece of the stream is no JSON: {data[:80]}", reason="not_json") from None
    return stream.reply()
