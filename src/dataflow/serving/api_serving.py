"""What every serving on an image API shares: endpoints and keys, money, errors, downloads, and batch jobs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Awaitable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

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
from dataflow.serving.batch_jobs import BatchService, through_batch
from dataflow.serving.download import Downloader, warn_plain_http
from dataflow.serving.replies import Reply, require_images
from dataflow.types import GenerationRequest, GenerationResult, ImageStore, Serving

log = logging.getLogger(__name__)

MAX_ANSWER = 256 * 2**20
"""Bytes of one answer; more than any image takes, base64 and all."""

_LOST = ("timeout", "cut_answer", "cut_stream")
"""Reasons for which an answer did not arrive that may have been billed."""
_IMAGE_TOKENS = 2000
"""Of an input image, for an estimate: rather too many."""

Endpoint = tuple[str, str]
"""A base URL, and the name of the environment variable with its key."""


class ApiServing(Serving):
    """The common half of the API servings. Nothing is tried again here: the engine does that.

    A subclass says how to :meth:`_connect`, how to :meth:`_call` and, for batch jobs, what its :meth:`_batches` are.

    Args:
        api_url: base URL of the service; several for failover, each with its own limits.
        key_name_of_api_key: environment variable with the key; several for several keys. Where there are several of
            both, they belong together in order.
        model_name: as the service calls it.
        image_io: where the images go; None for text.
        max_workers: requests in flight at once at each endpoint.
        timeout: seconds one request may take.
        request_params: further fields of the request, as JSON; part of what makes an image what it is.
        images_per_prompt: how many images each prompt asks for, one request each.
        requests_per_minute: most requests that may start in a minute at each endpoint.
        images_per_minute: most images; one request is one image, so that the smaller of the two figures holds.
        price_table: a file with prices, laid over the package's own table (:mod:`dataflow.serving.prices`).
        batch_jobs: send the requests as batch jobs, at a lower price and with an answer within a day. ``max_workers``
            is then how many jobs wait at once.
        batch_size: requests in one batch job.

    Raises:
        ConfigError: an argument cannot be used.
    """

    reproducible = False
    remote = True

    service: ClassVar[str]
    """The protocol's name, part of the fingerprint."""
    package: ClassVar[str] = "openai"
    """The client library, of the extra ``api``."""
    own_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of the request that are the serving's to set."""
    own_path: ClassVar[str] = ""
    """The end of the URL that users paste along with the base."""

    def __init__(
        self,
        *,
        api_url: str | Sequence[str],
        key_name_of_api_key: str | Sequence[str],
        model_name: str,
        image_io: ImageStore | None,
        max_workers: int,
        timeout: float,
        request_params: Mapping[str, Any] | None,
        images_per_prompt: int,
        requests_per_minute: float | None,
        images_per_minute: float | None,
        price_table: str | os.PathLike[str] | None,
        batch_jobs: bool,
        batch_size: int,
    ) -> None:
        counts = {"max_workers": max_workers, "images_per_prompt": images_per_prompt, "batch_size": batch_size}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")
        rates = {"requests_per_minute": requests_per_minute, "images_per_minute": images_per_minute}
        for name, value in {"timeout": timeout, **rates}.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be more than 0, got {value!r}")
        self.endpoints = _endpoints(api_url, key_name_of_api_key, self.own_path)
        self.environment = tuple(dict.fromkeys(name for _, name in self.endpoints))
        if batch_jobs and len(self.endpoints) > 1:
            raise ConfigError("batch_jobs goes with one endpoint: a job is only found again where it was sent")
        self.model = model_name
        self.image_io = image_io
        self.concurrency = max_workers
        self.images_per_prompt = images_per_prompt
        self.requests_per_minute = min((rate for rate in rates.values() if rate is not None), default=None)
        self.price_table = None if price_table is None else os.fspath(price_table)
        self.params = self._json_fields(request_params)
        self.request_timeout = timeout
        self.detached = batch_jobs
        self.batch_size = batch_size if batch_jobs else 1
        self._rates: prices.Rates | None = None
        self._key = ""
        self._client: Any = None
        self._downloader: Downloader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transfer: asyncio.Lock | None = None

    def _json_fields(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        if taken := sorted(self.own_fields & set(params or {})):
            raise ConfigError(f"request_params: {', '.join(taken)} is set by the serving itself")
        try:
            return json.loads(json.dumps(dict(params or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"request_params: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """The settings without the key, which never leaves this process with them."""
        left_out = {"_client": None, "_downloader": None, "_loop": None, "_transfer": None}
        return {**self.__dict__, "_key": "", **left_out}

    # What it takes -------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL of the (first) endpoint."""
        return self.endpoints[0][0]

    @property
    def key_name(self) -> str:
        """Environment variable with the key of the (first) endpoint."""
        return self.endpoints[0][1]

    def replicas(self) -> Sequence[Serving]:
        """One for each endpoint."""
        found = []
        for endpoint in self.endpoints:
            replica = copy.copy(self)
            replica.endpoints = (endpoint,)
            found.append(replica)
        return found

    def fingerprint(self) -> Mapping[str, Any]:
        """The service's protocol and the model's name: the same model behind another address makes the same images."""
        return {"service": self.service, "model": self.model}

    def default_params(self) -> Mapping[str, Any]:
        """The parameters of every request."""
        self._find_rates()  # a price table that cannot be read is found before anything is paid for
        return dict(self.params)

    def check_parameters(self, request: GenerationRequest) -> None:
        """Refuse parameters of the row that nobody said the service takes.

        Raises:
            BadRequestError: the row sets one that ``request_params`` does not name.
        """
        unknown = sorted(
            name for name, value in request.params.items() if name not in self.params and value is not None
        )
        if unknown:
            raise BadRequestError(
                f"the row sets {', '.join(unknown)}: the service gets that only if request_params names it"
            )

    def estimate(self, request: GenerationRequest) -> float | None:
        """The list price of an image and of what is sent for it; None where the model has none."""
        rates = self._find_rates()
        if rates is None or rates.image is None or self.image_io is None:
            return None
        letters = len(request.prompt) + sum(len(turn.prompt) for turn in request.turns)
        images = len(request.images) + sum(len(turn.images) for turn in request.turns)
        sent = letters / 3 * (rates.text_input or 0.0) + images * _IMAGE_TOKENS * (rates.image_input or 0.0)
        return (rates.image + sent / prices.MILLION) * self._discount

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """A batch job is of one endpoint."""
        return request.task

    def _find_rates(self) -> prices.Rates | None:
        if self._rates is None:
            self._rates = prices.rates_of(self.model, self.price_table)
        return self._rates

    @property
    def _discount(self) -> float:
        rates = self._find_rates()
        return rates.batch if rates is not None and self.detached else 1.0

    # Work ----------------------------------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Warn of an environment without the key: the step before may take hours."""
        for url, name in self.endpoints:
            if not os.environ.get(name, "").strip():
                log.warning("the environment variable %s holds no key for %s: set it before work begins", name, url)

    def setup(self) -> None:
        """Find the key. The connections are opened by the first request.

        Raises:
            ConfigError: the environment holds no key (``MissingExtraError``: without the client library).
        """
        if importlib.util.find_spec(self.package.partition(".")[0]) is None:
            raise MissingExtraError(self.package, "api", f"the service {self.url}")
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
            ServingError: the batch job could not be submitted or followed; it is found again under its name.
        """
        await self._open()
        if not self.detached:
            return list(await asyncio.gather(*(self._settled(self._call(request)) for request in requests)))
        assert self._transfer is not None
        answers = await through_batch(self._batches(requests), requests, transfer=self._transfer)
        return list(await asyncio.gather(*(self._settled(_given(answers[r.request_id])) for r in requests)))

    def cleanup(self) -> None:
        """Close the connections. :meth:`setup` may be called again."""
        client, downloader, loop = self._client, self._downloader, self._loop
        self._client = self._downloader = self._loop = None
        if client is None or downloader is None or loop is None or not loop.is_running():
            return

        async def close() -> None:
            await downloader.close()
            await self._disconnect(client)

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(close(), loop).result(10)

    async def _open(self) -> None:
        if not self._key:
            raise FatalServingError("the serving is not set up: call setup() before generate()")
        if self._client is None:
            self._client = self._connect()
            self._downloader = Downloader(engine_url=self.url)
            self._loop = asyncio.get_running_loop()
            self._transfer = asyncio.Lock()
        assert self._downloader is not None
        await self._downloader.open()

    async def _settled(self, asked: Awaitable[Reply]) -> GenerationResult:
        """The result of a call, whatever comes of it, with what it cost."""
        started = time.perf_counter()
        reply: Reply | None = None
        usage: Mapping[str, Any] = {}
        try:
            try:
                # Of the call alone: fetching what its answer names has limits of its own.
                async with asyncio.timeout(None if self.detached else self.request_timeout):
                    reply = await asked
            except TimeoutError:
                raise RetryError(f"no answer within {self.request_timeout:g} s", reason="timeout") from None
            usage = self._priced(reply.usage, len(reply.images))
            images: tuple[bytes | memoryview, ...] = ()
            if self.image_io is not None:
                images = await self._fetched(require_images(reply, 1, [self._key]).images)
            elif not reply.text:
                what = f"{len(reply.images)} images" if reply.images else "nothing"
                raise BadOutputError(f"{self.url} answers with {what}, not with text", reason="no_text")
        except ServingError as error:
            counted = error.usage or (reply.usage if reply else {})
            if counted:
                error.usage = self._priced(counted, len(reply.images) if reply else 0)
            elif error.reason in _LOST:
                error.usage = {"usd": None, "lost": True}
            return GenerationResult(error=error, usage=error.usage, seconds=time.perf_counter() - started)
        facts: dict[str, Any] = {"service": self.url, "finish_reason": reply.finish, **self._facts(reply)}
        text = reply.text if self.image_io is None else None
        seconds = time.perf_counter() - started
        return GenerationResult(images=images, text=text, usage=usage, provenance=facts, seconds=seconds)

    def _priced(self, usage: Mapping[str, Any], images: int) -> Mapping[str, Any]:
        return {**usage, "usd": prices.dollars(self._find_rates(), usage, images, discount=self._discount)}

    async def _fetched(self, images: Sequence[bytes | memoryview | str]) -> tuple[bytes | memoryview, ...]:
        assert self._downloader is not None
        fetch, key = self._downloader.fetch, self._key
        return tuple([await fetch(image, key=key) if isinstance(image, str) else image for image in images])

    # What a subclass says ------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        """A client of the service, its own retries switched off, at most ``concurrency`` connections."""
        raise NotImplementedError

    async def _disconnect(self, client: Any) -> None:
        """Close the client's connections."""
        await client.close()

    async def _call(self, request: GenerationRequest) -> Reply:
        """Ask once.

        Raises:
            ServingError: of the class of what went wrong.
        """
        raise NotImplementedError

    def _batches(self, requests: Sequence[GenerationRequest]) -> BatchService:
        """The batch API for these requests, which all have one :meth:`batch_key`."""
        raise NotImplementedError

    def _facts(self, reply: Reply) -> dict[str, Any]:  # noqa: ARG002 - part of the protocol
        """What else of an answer belongs into the image file."""
        return {}

    # For messages --------------------------------------------------------------------------------------------------

    @property
    def _names(self) -> dict[str, Any]:
        """What errors are told: who answered, and what must not stand in them."""
        return {"service": self.url, "secrets": [self._key]}

    def _classified(
        self, status: int, headers: Mapping[str, str], body: bytes | str | Mapping[str, Any]
    ) -> ServingError:
        return api_errors.classify(status, headers, body, **self._names)

    def _clean(self, text: str) -> str:
        return api_errors.redact(text, [self._key])


def _endpoints(urls: str | Sequence[str], keys: str | Sequence[str], own_path: str) -> tuple[Endpoint, ...]:
    urls = [urls] if isinstance(urls, str) else list(urls)
    keys = [keys] if isinstance(keys, str) else list(keys)
    if not urls or not keys:
        raise ConfigError("api_url and key_name_of_api_key must not be empty")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"api_url must begin with https:// (or http:// for this machine), got {url!r}")
    if min(len(urls), len(keys)) > 1 and len(urls) != len(keys):
        raise ConfigError(f"{len(urls)} api_url and {len(keys)} key_name_of_api_key do not go together")
    number = max(len(urls), len(keys))
    bases = [url.rstrip("/").removesuffix(own_path).rstrip("/") for url in urls]
    found = list(zip(bases * (number // len(bases)), keys * (number // len(keys)), strict=True))
    if len(set(found)) < number:
        raise ConfigError("the same endpoint is named twice: each needs a URL or a key of its own")
    return tuple(found)


async def _given(answer: Reply | ServingError) -> Reply:
    if isinstance(answer, ServingError):
        raise answer
    return answer
