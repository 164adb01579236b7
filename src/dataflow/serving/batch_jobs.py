"""Batch APIs: requests go in as a job under a name, and come out within a day at a lower price.

The provider's own list of jobs is what survives a restart: every job carries the name that the engine wrote into its
journal before the job was sent, so that a process that died at any moment finds what it had sent, and sends nothing
twice.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from dataflow.errors import BadRequestError, FatalServingError, RateLimitError, RetryError, ServingError
from dataflow.serving.replies import Reply
from dataflow.types import GenerationRequest, job_named_at, new_job_name

log = logging.getLogger(__name__)

FIRST_POLL = 2.0
LONGEST_POLL = 60.0
OVERLAP = 24 * 3600
"""Seconds by which the clocks of this machine and the provider may differ."""
PATIENCE = 1800.0
"""Seconds for which a job's state may not be had before the job is given up for this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A job at the provider.

    Attributes:
        id: the provider's.
        state: ``working``; ``ended``, with results for all or some of its requests (also cancelled and expired ones);
            ``failed``, without any.
        error: why it failed.
        raw: whatever the service needs to fetch the results.
    """

    id: str
    state: Literal["working", "ended", "failed"]
    error: ServingError | None = None
    raw: Any = None


new_name = new_job_name


class BatchService(Protocol):
    """A provider's batch API.

    Attributes:
        max_bytes: most bytes of lines in one job.
    """

    max_bytes: int

    def line(self, request: GenerationRequest) -> bytes:
        """The request as one line of a job, named by its ``request_id``; runs in a thread.

        Raises:
            BadRequestError: it cannot be said.
        """
        ...

    async def submit(self, name: str, lines: Sequence[bytes]) -> BatchJob:
        """Send a job that is found again under ``name``."""
        ...

    async def find(self, name: str) -> list[BatchJob]:
        """Every job of that name."""
        ...

    async def poll(self, job: BatchJob) -> BatchJob:
        """The job as it is now."""
        ...

    def results(self, job: BatchJob) -> AsyncIterator[tuple[str, Reply | ServingError]]:
        """What came of each request of an ended job, by ``request_id``, in any order."""
        ...


def not_before(name: str) -> float:
    """Seconds since 1970 before which no job of that name can have been sent."""
    return job_named_at(name) - OVERLAP


class Spool:
    """Images of a job's results, laid into a file without a name until they are saved: a job may have gigabytes."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._replies: dict[str, tuple[Reply, list[slice | str]]] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # what is mapped stays until nobody holds it any more

    def put(self, request_id: str, reply: Reply) -> None:
        """Take a reply in."""
        images: list[slice | str] = []
        for image in reply.images:
            if isinstance(image, str):
                images.append(image)
            else:
                start = self._file.tell()
                self._file.write(image)
                images.append(slice(start, self._file.tell()))
        self._replies[request_id] = replace(reply, images=()), images

    def out(self) -> dict[str, Reply]:
        """Every reply, its images as memoryviews of the file."""
        self._file.flush()
        size = self._file.tell()
        view = memoryview(mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
        return {
            request_id: replace(reply, images=tuple(at if isinstance(at, str) else view[at] for at in images))
            for request_id, (reply, images) in self._replies.items()
        }


async def through_batch(
    service: BatchService, requests: Sequence[GenerationRequest], *, transfer: asyncio.Lock
) -> Mapping[str, Reply | ServingError]:
    """Answers to the requests, from the jobs of their name; sent first if there are none.

    Args:
        service: the provider.
        requests: all with the same ``job``.
        transfer: held while lines are sent or results fetched, so that no two jobs are in memory together.

    Raises:
        ServingError: the job could not be sent, or nothing was heard of it for ``PATIENCE`` seconds.
    """
    names = {request.job for request in requests}
    [name] = names
    assert name is not None, "the engine names the jobs"
    answers: dict[str, Reply | ServingError] = {}
    jobs = await service.find(name)
    if jobs:
        log.info("batch job %s: going on with what was sent before (%s)", name, ", ".join(job.id for job in jobs))
    else:
        async with transfer:
            jobs = await _send(service, name, requests, answers)
    wanted = {request.request_id for request in requests}
    ended = await asyncio.gather(*(_ended(service, job) for job in jobs))
    for job in ended:
        if job.state == "failed":
            log.warning("batch job %s failed: %s", job.id, job.error)
            continue
        async with transfer:
            with Spool() as spool:
                async for request_id, answer in service.results(job):
                    if request_id not in wanted:
                        continue
                    if isinstance(answer, ServingError):
                        answers[request_id] = answer
                    else:
                        await asyncio.to_thread(spool.put, request_id, answer)
                answers.update(spool.out())
    failed = next((job.error for job in ended if job.error is not None), None)
    if failed is not None and isinstance(failed, FatalServingError | RateLimitError):
        raise failed
    for request_id in wanted - answers.keys():
        answers[request_id] = _without(request_id, failed)
    return answers


async def _send(
    service: BatchService,
    name: str,
    requests: Sequence[GenerationRequest],
    answers: dict[str, Reply | ServingError],
) -> list[BatchJob]:
    """Send the requests in as few jobs as their size allows; those that cannot be said are answered at once."""
    jobs: list[BatchJob] = []
    lines: list[bytes] = []
    size = 0
    for request in requests:
        try:
            line = await asyncio.to_thread(service.line, request)
            if len(line) > service.max_bytes:
                raise BadRequestError(f"the request has {len(line):,} bytes; a batch job holds {service.max_bytes:,}")
        except BadRequestError as error:
            answers[request.request_id] = error
            continue
        if lines and size + len(line) > service.max_bytes:
            jobs.append(await service.submit(name, lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        jobs.append(await service.submit(name, lines))
    return jobs


async def _ended(service: BatchService, job: BatchJob) -> BatchJob:
    wait, heard = FIRST_POLL, time.monotonic()
    while job.state == "working":
        await asyncio.sleep(wait)
        wait = min(LONGEST_POLL, wait * 1.5)
        try:
            job = await service.poll(job)
            heard = time.monotonic()
        except (RetryError, RateLimitError) as error:
            if time.monotonic() - heard > PATIENCE:
                raise
            log.info("batch job %s: no news: %s", job.id, error)
    return job


def _without(request_id: str, failed: ServingError | None) -> ServingError:
    """Why a request has no result although its job is over."""
    if failed is not None:
        # An error of its own: what a call cost is noted on it.
        return type(failed)(str(failed), reason=failed.reason)
    return RetryError(f"the batch job ended without a result for {request_id}", reason="no_result")
