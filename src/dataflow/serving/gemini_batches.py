"""Gemini's Batch API: requests go in with a job or as a file, answers come out likewise, at half price."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

import orjson

from dataflow.errors import BadOutputError, BadRequestError, FatalServingError, RetryError, ServingError
from dataflow.serving.api_serving import MAX_ANSWER
from dataflow.serving.batch_jobs import BatchJob
from dataflow.serving.gemini_client import GeminiClient
from dataflow.serving.openai_client import Classify
from dataflow.serving.replies import Reply
from dataflow.serving.reply_images import items, mapping, string
from dataflow.types import GenerationRequest

INLINE_BYTES = 18_000_000
"""Of requests that go in with the job; the service takes 20 MB."""

INLINE_LINES = 8
"""Most of them: their answers, megabytes each, come back in one piece and with every look at the job."""

PAGE = 50

_ENDED = ("SUCCEEDED", "PARTIALLY_SUCCEEDED", "EXPIRED", "CANCELLED")
_FAILED = ("FAILED",)
# A line's error has gRPC's number where one call's has HTTP's.
_HTTP = {1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501}
_HTTP |= {13: 500, 14: 503, 15: 500, 16: 401}


class GeminiBatches:
    """Batch jobs of one model; see :class:`~dataflow.serving.batch_jobs.BatchService`.

    Args:
        client: of the service.
        path: of the model, such as ``models/gemini-2.5-flash-image``.
        body: a request as the body of generateContent.
        reply: what a body of the answers says; raises a ServingError.
        classified: the error of a status, headers and body.
    """

    # The service takes files of 2 GB, but a job's lines wait in memory until they are sent.
    max_bytes = 500_000_000

    def __init__(
        self,
        client: GeminiClient,
        *,
        path: str,
        body: Callable[[GenerationRequest], Mapping[str, Any]],
        reply: Callable[[Mapping[str, Any]], Reply],
        classified: Classify,
    ) -> None:
        self._client, self._path, self._body, self._reply, self._classified = client, path, body, reply, classified

    def line(self, request: GenerationRequest) -> bytes:
        """The request as a line of the input file."""
        return orjson.dumps({"key": request.request_id, "request": self._body(request)}) + b"\n"

    async def submit(self, name: str, lines: Sequence[bytes]) -> BatchJob:
        """Start a job; the lines go with it if they are few and small, else as a file."""
        source: dict[str, Any]
        if len(lines) <= INLINE_LINES and sum(map(len, lines)) <= INLINE_BYTES:
            found = [orjson.loads(line) for line in lines]
            requests = [{"request": line["request"], "metadata": {"key": line["key"]}} for line in found]
            source = {"requests": {"requests": requests}}
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "requests.jsonl"
                await asyncio.to_thread(_write, file, lines)
                source = {"fileName": await self._client.upload(file, name)}
        batch = {"displayName": name, "inputConfig": source}
        return self._job(await self._client.ask("post", f"{self._path}:batchGenerateContent", {"batch": batch}))

    async def find(self, name: str) -> list[BatchJob]:
        """Jobs of that display name. All pages are read: the service promises no order."""
        found, token = [], ""
        while True:
            query = {"pageSize": PAGE, **({"pageToken": token} if token else {})}
            page = mapping(await self._client.ask("get", f"batches?{urlencode(query)}"), "a list of jobs")
            for entry in items(page.get("operations"), "operations"):
                operation = mapping(entry, "a job")
                if mapping(operation.get("metadata"), "metadata").get("displayName") == name:
                    found.append(self._job(operation))
            token = string(page.get("nextPageToken"))
            if not token:
                return found

    async def poll(self, job: BatchJob) -> BatchJob:
        """The job as it is now."""
        return self._job(await self._client.ask("get", job.id))

    async def results(self, job: BatchJob) -> AsyncIterator[tuple[str, Reply | ServingError]]:
        """Answers of the file of results, or those that came with the job."""
        output = mapping(job.raw, "output")
        if name := string(output.get("responsesFile")):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "results.jsonl"
                await self._client.download(name, path)
                with path.open("rb") as file:
                    while line := await asyncio.to_thread(_next_line, file):
                        if line.strip():
                            yield await asyncio.to_thread(self._line_result, line)
            return
        answers = output.get("inlinedResponses")
        # They stand in a message of the same name.
        answers = answers.get("inlinedResponses") if isinstance(answers, Mapping) else answers
        for entry in items(answers, "inlinedResponses"):
            yield self._result(entry)

    def _line_result(self, line: bytes) -> tuple[str, Reply | ServingError]:
        try:
            return self._result(orjson.loads(line))
        except ValueError:
            return self._result(None)

    def _result(self, found: Any) -> tuple[str, Reply | ServingError]:
        found = found if isinstance(found, Mapping) else {}
        metadata = found.get("metadata")
        name = string(found.get("key")) or string(metadata.get("key") if isinstance(metadata, Mapping) else None)
        response, error = found.get("response"), found.get("error")
        if not name:
            # It belongs to nobody, wherever it stands: its request counts as one without a result.
            return "", RetryError("an answer of the batch job cannot be read", reason="not_json")
        try:
            if isinstance(response, Mapping):
                return name, self._reply(response)
        except ServingError as failure:
            return name, failure
        if isinstance(error, Mapping):
            return name, self._failure(error)
        return name, RetryError("not done in the batch", reason="not_in_batch")

    def _failure(self, error: Mapping[str, Any]) -> ServingError:
        code = error.get("code")
        status = _HTTP.get(code, code) if isinstance(code, int) and 400 <= _HTTP.get(code, code) < 600 else 500
        return self._classified(status, {}, {"error": {**error, "code": status}})

    def _job(self, found: Any) -> BatchJob:
        operation = mapping(found, "a job")
        metadata = mapping(operation.get("metadata"), "metadata")
        name = string(operation.get("name")) or string(metadata.get("name"))
        if not name:
            raise RetryError("the service names no job", reason="bad_reply")
        output = metadata.get("output") or operation.get("response") or {}
        state = string(metadata.get("state")).rpartition("STATE_")[2]
        error = mapping(operation.get("error"), "an error")
        if state in _ENDED or (operation.get("done") and state not in _FAILED and not error):
            return BatchJob(id=name, state="ended", raw=output)
        if state not in _FAILED and not operation.get("done"):
            return BatchJob(id=name, state="working", raw=output)
        return BatchJob(id=name, state="failed", error=self._job_error(name, state, error), raw=output)

    def _job_error(self, name: str, state: str, error: Mapping[str, Any]) -> ServingError:
        failure = self._failure(error)
        message = f"the service gave the batch job {name} up ({state or 'no state'}): {failure}"
        if isinstance(failure, FatalServingError):
            return FatalServingError(message, reason=failure.reason)
        if isinstance(failure, BadRequestError):
            # What is wrong with the job as a whole would be wrong with the next one.
            return FatalServingError(message, reason="batch_rejected")
        return RetryError(message, reason="batch_failed")


def _write(path: Path, lines: Sequence[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _next_line(file: BinaryIO) -> bytes:
    line = file.readline(MAX_ANSWER + 1)
    if len(line) > MAX_ANSWER:
        raise BadOutputError(f"an answer of the batch job is larger than {MAX_ANSWER:,} bytes", reason="too_large")
    return line
