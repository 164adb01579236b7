"""Google's client for Gemini, asked in plain JSON: connections, errors, answers in one piece or as events, files."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflow.errors import BadOutputError, FatalServingError, RetryError
from dataflow.serving.api_serving import MAX_ANSWER
from dataflow.serving.openai_client import Classify
from dataflow.serving.replies import parse_json

if TYPE_CHECKING:
    import aiohttp

API_VERSION = "v1beta"
TRANSFER_SECONDS = 3600
"""Most seconds for a file of a batch job."""

_REDIRECTS = (301, 302, 303, 307, 308)


class GeminiClient:
    """Google's client, asked in plain JSON, once, over our own connections.

    Its typed methods drop fields they do not know, and fail on answers that are only half right and paid for all the
    same.

    Args:
        url: base URL, without the version.
        key: sent in a header.
        timeout: seconds a request may take.
        connections: at once.
        classified: the error of a status, headers and body.
        clean: takes secrets out of a text.
    """

    def __init__(
        self, url: str, key: str, *, timeout: float, connections: int, classified: Classify, clean: Callable[[str], str]
    ) -> None:
        import aiohttp
        from google.genai import Client, types
        from google.genai.client import DebugConfig

        self._url, self._timeout, self._classified, self._clean = url, timeout, classified, clean
        # The client's own session has no limit. Uploads go without the key unless the session adds it.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            headers={"x-goog-api-key": key},
            middlewares=(_straight(url),),
            read_bufsize=2**20,
            trust_env=True,
        )
        # What is not said here the client takes from the environment. Without retry options it repeats a request whose
        # connection breaks, after some seconds and without a word.
        options = types.HttpOptions(
            base_url=url,
            api_version=API_VERSION,
            timeout=max(1, round(timeout * 1000)),
            retry_options=types.HttpRetryOptions(attempts=1),
            aiohttp_client=self._session,
        )
        debug = DebugConfig(client_mode="api", replays_directory="", replay_id="")
        try:
            with _quiet():
                self._sdk = Client(api_key=key, vertexai=False, http_options=options, debug_config=debug)
        except ImportError as error:
            # The environment may also name a library it should use, which is not there.
            self._session.detach()
            raise FatalServingError(f"Google's client does not start: {error}") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._sdk.aio.aclose()
        self._sdk.close()
        await self._session.close()

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer, parsed.

        Raises:
            ServingError: of the class of what went wrong.
        """
        with self._errors():
            answer = await self._sdk._api_client.async_request(method, path, dict(body or {}))
        text = answer.body or ""
        _require_size(len(text))
        try:
            return parse_json(text)
        except ValueError:
            raise self._classified(200, answer.headers or {}, text) from None

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Server-sent events of an answer, parsed.

        Raises:
            ServingError: of the class of what went wrong.
        """
        size = 0
        with self._errors():
            chunks = await self._sdk._api_client.async_request_streamed("post", path, dict(body))
            async with aclosing(chunks):
                async for chunk in chunks:
                    size += len(chunk.body or "")
                    _require_size(size)
                    yield parse_json(chunk.body or "null")

    async def upload(self, path: Path, name: str) -> str:
        """Upload a file of requests; the service's name for it."""
        options: Any = {"base_url": self._url, "timeout": TRANSFER_SECONDS * 1000}
        config: Any = {"display_name": name, "mime_type": "application/jsonl", "http_options": options}
        with self._errors():
            file = await self._sdk.aio.files.upload(file=path, config=config)
        if not file.name:
            raise RetryError("the service names no file for what was uploaded", reason="bad_reply")
        return file.name

    async def download(self, name: str, path: Path) -> None:
        """Download a file of the service's."""
        config: Any = {"http_options": {"timeout": TRANSFER_SECONDS * 1000}}
        with self._errors():
            await self._sdk.aio.files.download(file=name, destination=path, config=config)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client and of its transport as ours."""
        import aiohttp
        from google.genai import errors

        try:
            yield
        except errors.APIError as error:
            headers = getattr(error.response, "headers", None) or {}
            raise self._classified(int(error.code or 0), dict(headers), _error_body(error.details)) from None
        except aiohttp.ClientResponseError as error:
            raise self._classified(error.status, dict(error.headers or {}), error.message) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise RetryError(self._clean(f"no connection: {error}"), reason="connection") from None
        except TimeoutError:
            raise RetryError(f"no answer within {self._timeout:g} s", reason="timeout") from None
        except (aiohttp.ClientError, OSError) as error:
            message = f"the answer broke off: {type(error).__name__}: {error}"
            raise RetryError(self._clean(message), reason="cut_answer") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # How the client stumbles over what is no JSON, or not the JSON it expects; it quotes all of it.
            message = f"the answer cannot be read: {type(error).__name__}: {str(error)[:80]}"
            raise RetryError(self._clean(message), reason="not_json") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """The client warns which of the environment's keys it takes, also where it takes none of them."""
    logger = logging.getLogger("google_genai._api_client")

    def true(record: logging.LogRecord) -> bool:
        return "GOOGLE_API_KEY" not in record.getMessage()

    logger.addFilter(true)
    try:
        yield
    finally:
        logger.removeFilter(true)


def _error_body(details: Any) -> Any:
    """The body of an error, as far as the client leaves it as it was."""
    if not isinstance(details, Mapping):
        return str(details or "")
    # What is no JSON it puts into an object of its own.
    plain = details.keys() == {"message", "status"} and not str(details["message"]).lstrip().startswith("{")
    return str(details["message"]) if plain else details


def _straight(url: str) -> Any:
    """Keeps requests, with the key in them, at the service."""
    import aiohttp
    from yarl import URL

    home = URL(url).origin()

    async def send(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.url.origin() != home:
            raise aiohttp.ClientError(f"the service names an address that is not its own: {request.url.origin()}")
        response = await handler(request)
        if response.status in _REDIRECTS:
            response.close()
            raise aiohttp.ClientResponseError(
                response.request_info,
                response.history,
                status=response.status,
                message="a redirect, which is not followed",
                headers=response.headers,
            )
        return response

    return send


def _require_size(size: int) -> None:
    if size > MAX_ANSWER:
        raise BadOutputError(f"the answer is larger than {MAX_ANSWER:,} bytes", reason="too_large")
