"""What every serving shares that asks a service of words about pictures and reads its answers: judges of all kinds."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import orjson

from dataflow.errors import BadOutputError, BadRequestError, ConfigError
from dataflow.serving.pictures import read_picture
from dataflow.types import GenerationRequest, GenerationResult, Serving


class WordService(Serving, Protocol):
    """A serving that looks at pictures and answers with text: a chat-completions service, or a model on this machine.

    ``image_io`` is None. Where ``logprobs`` is true among the parameters, a result's ``provenance["logprobs"]`` is what
    chat completions give under that name: ``{"content": [{"token", "logprob", "top_logprobs": [{"token", "logprob"},
    …]}, …]}``, one entry for each token of the answer, with as many alternatives as ``top_logprobs`` says.

    Attributes:
        params: parameters of every request under the names of OpenAI's chat completions (``max_tokens``,
            ``temperature``, ``logprobs``, ``response_format``, …); None leaves one out.
    """

    params: dict[str, Any]


class AskingServing(Serving):
    """Puts a request's prompt into words of its own, and reads what the service answers.

    A subclass says what is :meth:`asked` and what is :meth:`read`. An answer that cannot be read is asked for again as
    the engine's ``max_attempts`` say (unless the service would only say the same again), and counts as ``parse_error``
    then: never as a number. What could be read is kept, so that none is paid for twice.

    Args:
        service: without ``image_io``; it is not changed.
        params: of every request; those that the service was given itself stand.

    Raises:
        ConfigError: the service makes images.
    """

    kind: ClassVar[str]
    """What this is called in the fingerprint."""
    version: ClassVar[int] = 1
    """To be raised when the same answer comes to mean another score."""
    own_params: ClassVar[frozenset[str]] = frozenset()
    """Parameters of a request that are read here and do not go to the service."""

    def __init__(self, service: WordService, params: Mapping[str, Any]) -> None:
        if service.image_io is not None:
            raise ConfigError("a judge answers with words: leave image_io out of its service")
        self._service: WordService = copy.copy(service)
        self._service.params = {**params, **service.params}
        self.batch_size, self.concurrency = service.batch_size, service.concurrency
        self.timeout, self.detached = service.timeout, service.detached
        self.requests_per_minute = service.requests_per_minute
        self.remote, self.reproducible = service.remote, service.reproducible
        self.num_cpus, self.num_gpus, self.memory_gb = service.num_cpus, service.num_gpus, service.memory_gb
        self.environment = service.environment

    # What a subclass says ------------------------------------------------------------------------------------------

    def facts(self) -> Mapping[str, Any]:
        """What else makes its answers what they are, as JSON."""
        raise NotImplementedError

    def asked(self, request: GenerationRequest) -> str:
        """The text that goes to the service."""
        raise NotImplementedError

    def read(self, request: GenerationRequest, result: GenerationResult) -> Mapping[str, Any]:
        """The answer, as JSON.

        Raises:
            BadOutputError: ``parse_error``; it cannot be read.
        """
        raise NotImplementedError

    # A serving -----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> Mapping[str, Any]:
        """The service's, and what is asked and how it is read."""
        return {**self._service.fingerprint(), self.kind: self.version, **self.facts()}

    def default_params(self) -> Mapping[str, Any]:
        """The service's."""
        return self._service.default_params()

    def check(self, request: GenerationRequest) -> None:
        """As the service."""
        self._service.check(self._put(request))

    def estimate(self, request: GenerationRequest) -> float | None:
        """As the service."""
        return self._service.estimate(self._put(request))

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """As the service."""
        return self._service.batch_key(self._put(request))

    def replicas(self) -> Sequence[Serving]:
        """One for each of the service."""
        found = []
        for service in self._service.replicas():
            twin = copy.copy(self)
            twin._service = service  # type: ignore[assignment]
            found.append(twin)
        return found

    def preflight(self) -> None:
        """As the service."""
        self._service.preflight()

    def setup(self) -> None:
        """As the service."""
        self._service.setup()

    def cleanup(self) -> None:
        """As the service."""
        self._service.cleanup()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One answer per request, as JSON.

        Services take half a picture for a picture: a file that is no whole one is not sent, and nothing is paid for it.
        """
        unread = await asyncio.gather(*(asyncio.to_thread(_unreadable_picture, request) for request in requests))
        asked = [request for request, error in zip(requests, unread, strict=True) if error is None]
        results = iter(await self._service.generate([self._put(request) for request in asked]) if asked else ())
        return [
            self._read(request, next(results)) if error is None else GenerationResult(error=error)
            for request, error in zip(requests, unread, strict=True)
        ]

    def _put(self, request: GenerationRequest) -> GenerationRequest:
        params = {name: value for name, value in request.params.items() if name not in self.own_params}
        return replace(request, prompt=self.asked(request), params=params)

    def _read(self, request: GenerationRequest, result: GenerationResult) -> GenerationResult:
        if result.error is not None:
            return result
        try:
            found = self.read(request, result)
        except BadOutputError as error:
            error.usage = result.usage
            return replace(result, text=None, error=error)
        return replace(result, text=orjson.dumps(found).decode())


def _unreadable_picture(request: GenerationRequest) -> BadRequestError | None:
    """Why one of a request's pictures is no whole one."""
    try:
        for path in request.images:
            read_picture(path)
    except BadRequestError as error:
        return error
    return None


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that an answer is, also inside a Markdown fence.

    Raises:
        BadOutputError: ``parse_error``; it is none.
    """
    answer = text.strip()
    if answer.startswith("```"):
        answer = answer.strip("`").removeprefix("json").strip()
    try:
        found = orjson.loads(answer)
    except ValueError:
        raise unreadable("is no JSON", text) from None
    if not isinstance(found, dict):
        raise unreadable("is no JSON object", text)
    return found


def object_format(fields: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's ``response_format`` for an object with these fields, all of them there, in this order."""
    schema = {"type": "object", "properties": {**fields}, "required": [*fields], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def unreadable(what: str, text: str) -> BadOutputError:
    """The error for an answer that cannot be read; ``what`` goes on "the judge's answer …"."""
    shown = text if len(text) <= 200 else f"{text[:199]}…"
    return BadOutputError(f"the judge's answer {what}: {shown!r}", reason="parse_error")
