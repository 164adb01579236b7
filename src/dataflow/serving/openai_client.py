"""What the servings on OpenAI's client share: connections, errors, answers in one piece or as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson

from dataflow.errors import BadOutputError, RetryError, ServingError
from dataflow.serving.api_serving import MAX_ANSWER

if TYPE_CHECKING:
    import openai

Classify = Callable[[int, Mapping[str, str], Any], ServingError]


def connect(url: str, key: str, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """A client that asks once, on at most so many connections.

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
    transport = openai.DefaultAioHttpClient(timeout=timeout, limits=limits)
    return openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout, http_client=transport)


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
        body = error.body if isinstance(error.body, Mapping | str) else str(error.body or "")
        raise classified(error.status_code, error.response.headers, body) from None
    except openai.APITimeoutError as error:
        # The transport's word for a refused connection, too.
        if isinstance(error.__cause__, httpx2.ConnectTimeout):
            raise RetryError(clean(f"no connection: {error.__cause__}"), reason="connection") from None
        raise RetryError(f"no answer within {timeout:g} s", reason="timeout") from None
    except openai.APIConnectionError as error:
        raise RetryError(clean(f"no connection: {error.__cause__ or error}"), reason="connection") from None
    except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
        # What breaks in the middle of an answer comes as the transport's own error, which is not the SDK's.
        raise RetryError(clean(f"the answer broke off: {type(error).__name__}: {error}"), reason="cut_answer") from None


def is_event_stream(response: Any) -> bool:
    """Whether the service streams; one may answer in one piece although asked to."""
    return "text/event-stream" in response.headers.get("content-type", "")


async def whole_json(response: Any, classified: Classify) -> Mapping[str, Any]:
    """The body as a JSON object.

    Raises:
        ServingError: it is none; as ``classified`` says.
        BadOutputError: ``too_large``.
    """
    parts, size = [], 0
    async for part in response.iter_bytes():
        size += len(part)
        _require_size(size)
        parts.append(part)
    data = b"".join(parts)
    try:
        found = orjson.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise classified(response.status_code, response.headers, data)
    return found


async def events(response: Any) -> AsyncIterator[tuple[str, Any]]:
    """Server-sent events of an answer: name and parsed data. The one that only says that it is over is left out.

    Raises:
        RetryError: ``not_json``.
        BadOutputError: ``too_large``.
    """
    size, name = 0, ""
    async for line in lines(response):
        size += len(line)
        _require_size(size)
        field, _, value = line.partition(b":")
        value = value.strip()
        if not line:
            name = ""
        elif field == b"event":
            name = value.decode(errors="replace")
        elif field == b"data" and value and value != b"[DONE]":
            try:
                yield name, orjson.loads(value)
            except orjson.JSONDecodeError:
                shown = value[:80].decode(errors="replace")
                raise RetryError(f"a piece of the stream is no JSON: {shown}", reason="not_json") from None


async def lines(response: Any) -> AsyncIterator[bytes]:
    """The body line by line. Not the client's ``iter_lines``: it also breaks at marks that a JSON string may hold.

    Raises:
        BadOutputError: ``too_large``; one line is.
    """
    kept: list[bytes] = []
    size = 0
    async for part in response.iter_bytes():
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield b"".join([*kept, line]).rstrip(b"\r")
            kept, size = [], 0
        kept.append(rest)
        size += len(rest)
        _require_size(size)
    if size:
        yield b"".join(kept).rstrip(b"\r")


def _require_size(size: int) -> None:
    if size > MAX_ANSWER:
        raise BadOutputError(f"the answer is larger than {MAX_ANSWER:,} bytes", reason="too_large")
