"""What the servings on OpenAI's client share: connections, errors, answers in one piece or as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dataflow.errors import BadOutputError, RetryError, ServingError
from dataflow.serving.api_serving import MAX_ANSWER
from dataflow.serving.replies import parse_json

if TYPE_CHECKING:
    import openai

DRAIN_SECONDS = 0.5
MAX_ERROR = 2**20
"""Bytes that are read of an error's body."""
_EVENTS = (b"event:", b"data:", b":", b"id:", b"retry:")

Classify = Callable[[int, Mapping[str, str], Any], ServingError]


def connect(url: str, key: str, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """A client that asks once, on at most so many connections, and follows no redirect.

    Args:
        url: base URL.
        key: sent as a bearer token.
        timeout: seconds a request may take.
        connections: at once.
    """
    import httpx2
    import openai

    # The limit is named: the library's "no limit" quietly means a hundred connections.
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    transport = openai.DefaultAioHttpClient(
        timeout=timeout, limits=limits, follow_redirects=False, event_hooks={"response": [_shorten_error]}
    )
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=url,
        max_retries=0,
        timeout=timeout,
        http_client=transport,
        default_headers={"Accept-Encoding": "identity"},
    )


async def _shorten_error(response: Any) -> None:
    """The client reads the body of an error whole; a hostile one has no end, or unpacks to gigabytes."""
    if response.status_code >= 300:
        response.headers.pop("content-encoding", None)
        response.stream = _shortened(response.stream)


def _shortened(stream: Any) -> Any:
    import httpx2

    class Shortened(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = MAX_ERROR
            async for part in stream:
                yield part[:left]
                left -= len(part)
                if left <= 0:
                    return

        async def aclose(self) -> None:
            await stream.aclose()

    return Shortened()


@contextmanager
def translated_errors(classified: Classify, clean: Callable[[str], str], timeout: float) -> Iterator[None]:
    """Errors of the client and of its transport as ours.

    Args:
        classified: the error of a status, headers and body.
        clean: takes secrets out of a text.
        timeout: what the client was told, for the message.

    Raises:
        ServingError: of the right class.
    """
    import aiohttp
    import httpx2
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        raise classified(error.status_code, error.response.headers, error.response.content) from None
    except openai.APIConnectionError as error:  # a time-out is one, too
        cause = error.__cause__ or error
        if isinstance(cause.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            raise RetryError(clean(f"no connection: {cause}"), reason="connection") from None
        # The transport calls also this a time-out of the connection: one that was lost after it was asked.
        if isinstance(error, openai.APITimeoutError) and not isinstance(cause, httpx2.ConnectTimeout):
            raise RetryError(f"no answer within {timeout:g} s", reason="timeout") from None
        raise RetryError(clean(f"the connection was lost: {cause}"), reason="cut_answer") from None
    except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
        # What breaks in the middle of an answer comes as the transport's own error, which is not the SDK's.
        raise RetryError(clean(f"the answer broke off: {type(error).__name__}: {error}"), reason="cut_answer") from None


async def answer(
    response: Any, add: Callable[[str, Any], None] | None, classified: Classify, clean: Callable[[str], str]
) -> Mapping[str, Any] | None:
    """The body of an answer: a JSON object; None if it came as events.

    A service may answer in one piece although asked to stream, and may call a stream by any type.

    Args:
        response: of the client.
        add: takes name and data of each event; None if no stream was asked for.
        classified: the error of a status, headers and body.
        clean: takes secrets out of a text.

    Raises:
        ServingError: it is no JSON object; as ``classified`` says.
        RetryError: ``not_json``; an event is none.
        BadOutputError: ``too_large``.
    """
    parts = _limited(response.iter_bytes())
    head = b""
    async for part in parts:
        head += part
        if len(head.lstrip()) >= len(_EVENTS[0]):
            break
    if add is not None and head.lstrip().startswith(_EVENTS):
        async for name, data in events(_chained(head, parts), clean):
            add(name, data)
        await _drain(parts)
        return None
    data = b"".join([head, *[part async for part in parts]])
    try:
        found = parse_json(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise classified(response.status_code, response.headers, data)
    return found


async def _drain(parts: AsyncIterable[bytes]) -> None:
    """Read what is left, so that the connection can be used again; it has said its end and may not hold anybody up."""
    import aiohttp
    import httpx2

    with suppress(TimeoutError, OSError, aiohttp.ClientError, httpx2.HTTPError, BadOutputError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in parts:
                pass


async def events(parts: AsyncIterable[bytes], clean: Callable[[str], str]) -> AsyncIterator[tuple[str, Any]]:
    """Server-sent events: name and parsed data, up to the one that says that it is over.

    Raises:
        RetryError: ``not_json``.
    """
    name = ""
    async for line in lines(parts):
        field, _, value = line.partition(b":")
        value = value.strip()
        if value == b"[DONE]":
            return  # the connection may stay open
        if not line:
            name = ""
        elif field == b"event":
            name = value.decode(errors="replace")
        elif field == b"data" and value:
            try:
                yield name, parse_json(value)
            except ValueError:
                shown = clean(value[:200].decode(errors="replace"))[:80]
                raise RetryError(f"a piece of the stream is no JSON: {shown}", reason="not_json") from None


async def lines(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """A body line by line. Not the client's ``iter_lines``: it also breaks at marks that a JSON string may hold.

    Raises:
        BadOutputError: ``too_large``; one line is.
    """
    kept: list[bytes] = []
    size = 0
    async for part in parts:
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield b"".join([*kept, line]).rstrip(b"\r")
            kept, size = [], 0
        kept.append(rest)
        size += len(rest)
        _require_size(size)
    if size:
        yield b"".join(kept).rstrip(b"\r")


async def _limited(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    size = 0
    async for part in parts:
        size += len(part)
        _require_size(size)
        yield part


async def _chained(head: bytes, parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for part in parts:
        yield part


def _require_size(size: int) -> None:
    if size > MAX_ANSWER:
        raise BadOutputError(f"the answer is larger than {MAX_ANSWER:,} bytes", reason="too_large")
