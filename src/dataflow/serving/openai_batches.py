"""OpenAI's Batch API: a file of requests goes in, files of answers come out, at half price."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from dataflow.errors import FatalServingError, RetryError, ServingError
from dataflow.serving.batch_jobs import BatchJob, not_before
from dataflow.serving.openai_client import Classify, lines, translated_errors
from dataflow.serving.replies import Reply, parse_json
from dataflow.types import GenerationRequest

if TYPE_CHECKING:
    import openai

NAME = "dataflow_job"
"""Key of a job's metadata under which its name stands."""

_WORKING = ("validating", "in_progress", "finalizing", "cancelling")
_ENDED = ("completed", "expired", "cancelled")


class OpenAIBatches:
    """Batch jobs of one endpoint; see :class:`~dataflow.serving.batch_jobs.BatchService`.

    Args:
        client: of the service.
        endpoint: path of the endpoint that the lines are for, such as ``/v1/images/edits``.
        body: a request as the endpoint's JSON body.
        reply: what a body of the answers says; raises a ServingError.
        classified: the error of a status, headers and body.
        clean: takes secrets out of a text.
        timeout: seconds of a single call.
    """

    max_bytes = 190_000_000

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        *,
        endpoint: str,
        body: Callable[[GenerationRequest], Mapping[str, Any]],
        reply: Callable[[Mapping[str, Any]], Reply],
        classified: Classify,
        clean: Callable[[str], str],
        timeout: float,
    ) -> None:
        self._client, self._endpoint, self._body, self._reply = client, endpoint, body, reply
        self._classified, self._clean, self._timeout = classified, clean, timeout

    def _errors(self) -> Any:
        return translated_errors(self._classified, self._clean, self._timeout)

    def line(self, request: GenerationRequest) -> bytes:
        """The request as a line of the input file."""
        line = {"custom_id": request.request_id, "method": "POST", "url": self._endpoint, "body": self._body(request)}
        return orjson.dumps(line) + b"\n"

    async def submit(self, name: str, lines: Sequence[bytes]) -> BatchJob:
        """Upload the lines and start a job on them."""
        with self._errors():
            file = await self._client.files.create(file=(f"{name}.jsonl", b"".join(lines)), purpose="batch")
            endpoint: Any = self._endpoint
            found = await self._client.batches.create(
                input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={NAME: name}
            )
        return self._job(found)

    async def find(self, name: str) -> list[BatchJob]:
        """Jobs with the name in their metadata; the service lists the newest first."""
        found = []
        earliest = not_before(name)
        with self._errors():
            async for batch in self._client.batches.list(limit=100):
                if batch.created_at < earliest:
                    break
                if (batch.metadata or {}).get(NAME) == name:
                    found.append(self._job(batch))
        return found

    async def poll(self, job: BatchJob) -> BatchJob:
        """The job as it is now."""
        with self._errors():
            return self._job(await self._client.batches.retrieve(job.id))

    async def results(self, job: BatchJob) -> AsyncIterator[tuple[str, Reply | ServingError]]:
        """Answers of the output file and of the file of errors."""
        for file in (job.raw.output_file_id, job.raw.error_file_id):
            if not file:
                continue
            with self._errors():
                async with self._client.files.with_streaming_response.content(file) as response:
                    async for line in lines(response.iter_bytes()):
                        if line.strip():
                            yield self._result(line)

    def _result(self, line: bytes) -> tuple[str, Reply | ServingError]:
        try:
            found = parse_json(line)
            name, response = str(found["custom_id"]), found.get("response") or {}
            status, body = response.get("status_code"), response.get("body")
        except (ValueError, TypeError, KeyError, AttributeError):
            # Without its name the line belongs to nobody; its request counts as one without a result.
            return "", RetryError("a line of the results cannot be read", reason="not_json")
        try:
            if status == 200 and isinstance(body, dict):
                return name, self._reply(body)
            if status:
                return name, self._classified(int(status), {}, body or {})
        except ServingError as error:
            return name, error
        error = found.get("error") or {}
        message = self._clean(str(error.get("message") or "without a word"))
        return name, RetryError(f"not done in the batch: {message}", reason="not_in_batch")

    def _job(self, found: Any) -> BatchJob:
        if found.status in _ENDED:
            return BatchJob(id=found.id, state="ended", raw=found)
        if found.status in _WORKING:
            return BatchJob(id=found.id, state="working", raw=found)
        said = [f"line {entry.line}: {entry.message}" for entry in (found.errors and found.errors.data) or ()][:3]
        message = self._clean(f"the service gave the batch job {found.id} up ({found.status}): {'; '.join(said)}")
        # What is wrong with one line is wrong with the job: sent again it would fail again.
        error = (
            FatalServingError(message, reason="batch_rejected") if said else RetryError(message, reason="batch_failed")
        )
        return BatchJob(id=found.id, state="failed", error=error, raw=found)
