"""From a batch to how each of its requests ended: attempts, waits, halves, other endpoints, money, records."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    BudgetSpentError,
    FatalServingError,
    OutOfMemoryError,
    RateLimitError,
    RefusedError,
    RetryError,
    RunStoppedError,
    ServingError,
    WorkerDiedError,
)
from dataflow.runtime import limits, station
from dataflow.runtime.budget import Budget, dollars_of
from dataflow.runtime.journal import Ending, Index, Journal, done_record, ending_record
from dataflow.runtime.limits import HeldBackError
from dataflow.runtime.planner import Planner
from dataflow.runtime.station import Station, Stations
from dataflow.runtime.tally import Tally
from dataflow.runtime.worker import Item, Made
from dataflow.types import GenerationRequest, Outcome, Serving, Status, new_job_name

logger = logging.getLogger(__name__)


_ANSWERS = (Made, RefusedError, BadRequestError, BadOutputError)
"""What only a service that is up and willing can say."""


@dataclass(frozen=True, slots=True)
class Try:
    """Requests to make together, and which attempt it is, from 1."""

    requests: list[GenerationRequest]
    attempt: int = 1


class Run(Protocol):
    """What the run tells and is told while its batches are made."""

    halted: asyncio.Event
    stations: Stations

    def stop(self, error: RunStoppedError) -> None:
        """No new work; what is under way ends."""
        ...

    def give_back(self, again: Try) -> None:
        """Another station should take this."""
        ...

    def settled(self, count: int) -> None:
        """So many requests ended."""
        ...


class Maker:
    """Makes batches, each in as many attempts and pieces as it takes.

    Args:
        run: whose batches they are.
        serving: of the plan.
        planner: knows how requests hang together.
        index: what the journal says.
        journal: open for writing.
        tally: counts images and money.
        budget: holds money back.
        max_attempts: how often one request is tried.
    """

    def __init__(
        self,
        run: Run,
        serving: Serving,
        planner: Planner,
        index: Index,
        journal: Journal,
        tally: Tally,
        budget: Budget,
        max_attempts: int,
    ) -> None:
        self.run, self.serving, self.planner = run, serving, planner
        self.index, self.journal, self.tally, self.budget = index, journal, tally, budget
        self.max_attempts = max_attempts
        self.unfinished: set[str] = set()
        self._deadly: set[str] = set()

    async def make(self, at: Station, first: Try) -> None:
        """Make a batch until each of its requests has ended, another station has it, or the run stops."""
        todo = [first]
        while todo:
            each = todo.pop()
            if at.closed is not None:
                self.run.give_back(each)
                continue
            if self.serving.detached:
                each = self._named(each)
            result = await self._attempt(at, each)
            if result is None:
                return
            if isinstance(result, HeldBackError):
                self.run.give_back(each)
            elif isinstance(result, ServingError):
                todo += await self._react(at, each, result)
            else:
                if any(isinstance(item, _ANSWERS) for item in result):
                    at.limiter.succeeded()
                todo += await self._take(at, each, result)

    def _named(self, each: Try) -> Try:
        """The same with the name of a batch job on every request, which the journal knows before it is used."""
        unnamed = [request for request in each.requests if request.job is None]
        if not unnamed:
            return each
        name = new_job_name()
        self.journal.append({"s": "job", "name": name, "ks": [request.request_id for request in unnamed]})
        return Try([replace(request, job=request.job or name) for request in each.requests], each.attempt)

    async def _attempt(self, at: Station, each: Try) -> Sequence[Item] | ServingError | HeldBackError | None:
        """Make a batch once: what came of each request, or why all failed; None if the run stops before."""
        requests = each.requests
        async with at.room.enter(alone=requests[0].request_id in self._deadly):
            held = await self.budget.hold([self.serving.estimate(request) for request in requests])
            if held is None:
                self.run.stop(BudgetSpentError(f"stopped: {self.budget.spent_up()}"))
                return None
            paid, result = 0.0, None
            try:
                async with at.limiter.slot(len(requests), impatient=self.run.stations.others(at)):
                    if self.planner.stopping:
                        return None
                    self._start(requests)
                    ticket = await self._generated(at, requests)
                if ticket is None:
                    return None
                result = await at.worker.save(ticket)
            except HeldBackError as error:
                return error
            except ServingError as error:
                result = error
            finally:
                try:
                    paid = self._bill(requests, result)
                finally:
                    await self.budget.settle(held, paid, len(requests))
        return result

    async def _generated(self, at: Station, requests: list[GenerationRequest]) -> int | None:
        """The ticket of the made batch; None if the run stops while a batch job, which needs nobody, is waited for."""
        if not self.serving.detached:
            return await at.worker.generate(requests)
        self.tally.in_jobs += len(requests)
        making = asyncio.create_task(at.worker.generate(requests))
        halted = asyncio.create_task(self.run.halted.wait())
        try:
            await asyncio.wait((making, halted), return_when=asyncio.FIRST_COMPLETED)
            return making.result() if making.done() else None
        finally:
            self.tally.in_jobs -= len(requests)
            making.cancel()
            halted.cancel()
            await asyncio.gather(making, halted, return_exceptions=True)

    def _bill(self, requests: list[GenerationRequest], result: Sequence[Item] | ServingError | None) -> float:
        """Count what an attempt cost, in dollars; calls without a result are kept in the journal here."""
        items = [result] if isinstance(result, ServingError) else result or []
        paid, unknown = 0.0, False
        for request, item in zip(requests, items, strict=False):
            if item.usage:
                if isinstance(item, ServingError) and item.usage.get("lost"):
                    # Nobody knows whether it was billed at all: the budget takes it for a whole call.
                    item.usage = {**item.usage, "up_to": self.budget.expected(self.serving.estimate(request))}
                else:
                    unknown = unknown or dollars_of(item.usage) is None
                paid += self.index.bill(item.usage)
                if isinstance(item, ServingError):
                    self.journal.append({"s": "paid", "k": request.request_id, "usage": dict(item.usage)})
        self.tally.usd, self.tally.unpriced = self.index.usd, self.index.unpriced
        if self.budget.limit is not None and unknown:
            self.run.stop(
                RunStoppedError(
                    "stopped: nobody knows what these calls cost, so that no budget can be kept: "
                    "state the model's price, or leave the budget out"
                )
            )
        return paid

    async def _take(self, at: Station, each: Try, items: Sequence[Item]) -> list[Try]:
        again: list[Try] = []
        for request, item in zip(each.requests, items, strict=True):
            if isinstance(item, Made):
                self._done(request, item, each.attempt)
            else:
                again += await self._react(at, Try([request], each.attempt), item)
        if not self.serving.detached or not again:
            return again
        # What failed in a batch job goes into one new job together.
        together: dict[int, list[GenerationRequest]] = {}
        for one in again:
            together.setdefault(one.attempt, []).extend(replace(request, job=None) for request in one.requests)
        return [Try(requests, attempt) for attempt, requests in together.items()]

    async def _react(self, at: Station, each: Try, error: ServingError) -> list[Try]:
        """What to do about a failure: the tries that follow from it; requests that are at their end are ended."""
        requests, attempt = each.requests, each.attempt
        if isinstance(error, FatalServingError):
            if self.run.stations.close(at, error):
                self.run.give_back(each)
            else:
                self.run.stop(RunStoppedError(f"stopped: {error}"))
            return []
        if isinstance(error, RateLimitError):
            return self._hold_back(at, each, at.limiter.rate_limited(error.retry_after), error)
        if isinstance(error, RetryError) and not self.serving.reproducible and not requests[0].job:
            others = self.run.stations.others(at)
            wait = at.limiter.failed(limits.ELSEWHERE_AFTER if others else limits.DOWN_AFTER)
            if wait is not None:
                # The service is down: no request's attempt, and no reason to give one up.
                return self._hold_back(at, each, wait, error)
        if len(requests) > 1 and not self.serving.detached:
            half = (len(requests) + 1) // 2
            logger.info("batch of %d failed (%s), trying it in halves: %s", len(requests), error.reason, error)
            if isinstance(error, OutOfMemoryError):
                self.planner.shrink(requests[0], half)
            return [Try(requests[half:], attempt), Try(requests[:half], attempt)]
        request = requests[0]
        if isinstance(error, WorkerDiedError) and request.request_id not in self._deadly:
            # Another batch in the same process may have killed it: tried again with nobody else in there.
            self._deadly.add(request.request_id)
            return [each]
        broken = isinstance(error, BadOutputError) and not self.serving.reproducible
        if (broken or isinstance(error, RetryError | OutOfMemoryError)) and attempt < self.max_attempts:
            logger.info("request %s: attempt %d failed: %s", request.request_id, attempt, error)
            if not (isinstance(error, OutOfMemoryError) or self.serving.detached):
                await limits.pause(limits.backoff(attempt), self.run.halted)
            return [Try(requests, attempt + 1)]
        for one in requests:
            if error.reason == "refused":
                self._end(one, "refused", error.reason, str(error))
            else:
                reason = "killed_worker" if isinstance(error, WorkerDiedError) else error.reason
                self._end(one, "failed", reason, str(error))
        return []

    def _hold_back(self, at: Station, each: Try, wait: float, error: ServingError) -> list[Try]:
        trouble = at.limiter.trouble
        logger.info("all lanes wait %.1f s: %s", wait, error)
        if trouble > station.PATIENCE and not self.run.stations.close(at, error):
            self.run.stop(RunStoppedError(f"stopped: nothing for {trouble:.0f} s but: {error}"))
        if self.run.stations.others(at):
            self.run.give_back(each)
            return []
        return [each]

    # -- how requests end --------------------------------------------------------------------------------------------

    def _start(self, requests: list[GenerationRequest]) -> None:
        if self.serving.detached:
            return  # nobody dies of waiting
        # Once per run: what counts is how many processes died with it in hand, not how often they tried.
        ids = [request.request_id for request in requests if request.request_id not in self.unfinished]
        if not ids:
            return
        record: dict[str, object] = {"s": "start", "ks": ids}
        if requests[0].alone:
            record["alone"] = True
        self.journal.append(record)
        self.unfinished.update(ids)

    def _done(self, request: GenerationRequest, made: Made, attempt: int) -> None:
        facts: dict[str, object] = {"ms": round(made.seconds * 1000, 1)}
        if attempt > 1:
            facts["att"] = attempt
        if made.usage:
            facts["usage"] = dict(made.usage)
        record = done_record(request.request_id, made.images, text=made.text, **facts)
        self.journal.append(record)
        key = bytes.fromhex(request.request_id)
        self.index.add_done(key, record)
        self.index.mark_seen(key)
        self.tally.add_images(*self.index.sums(key), made=True)
        self._settled(request, self.planner.outcome(key))

    def _end(self, request: GenerationRequest, status: Status, reason: str, message: str) -> None:
        key = bytes.fromhex(request.request_id)
        row = self.tally.row(key)
        logger.warning("row %d, request %s %s (%s): %s", row, request.request_id, status, reason, message)
        self.journal.append(ending_record(request.request_id, status, reason, message))
        self.index.endings[key] = Ending(status, reason, message)
        self._settled(request, Outcome(request_id=request.request_id, status=status, reason=reason, message=message))

    def _settled(self, request: GenerationRequest, outcome: Outcome) -> None:
        self.unfinished.discard(request.request_id)
        self.tally.settle(bytes.fromhex(request.request_id), outcome.status, outcome.reason)
        for key, ending in self.planner.parent_ended(request, outcome):
            self.index.endings[key] = ending
            self.tally.settle(key, "failed", ending.reason)
        self.run.settled(1)
