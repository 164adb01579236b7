"""What happens to every step, once: resume, batches, retries, out-of-memory, refusals, interruption, the final sum.

The asyncio loop of a run lives in a thread of its own, so that a run works the same from a script, in a notebook whose
main thread already has a loop, and under Ctrl-C: the first one lets the batches in flight end and be saved, the second
one gives them up. Either way the next run goes on where this one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dataflow.errors import (
    BadOutputError,
    FatalServingError,
    InputError,
    OutOfMemoryError,
    RateLimitError,
    RetryError,
    RunInterruptedError,
    RunStoppedError,
    ServingError,
    TooManyFailuresError,
    WorkerDiedError,
)
from dataflow.io import ImageIO
from dataflow.runtime import table
from dataflow.runtime.budget import Budget
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import Ending, Journal, done_record, ending_record
from dataflow.runtime.limits import Limiter, Room, backoff, pause
from dataflow.runtime.lock import cache_lock
from dataflow.runtime.planner import Planner
from dataflow.runtime.progress import Progress, describe
from dataflow.runtime.tally import Tally
from dataflow.runtime.worker import InlineWorker, Item, Made, ProcessWorker, Worker
from dataflow.types import GenerationRequest, Outcome, Plan, Serving, Status, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

LEAST_FAILURES = 100
"""Fewer failed rows than this never stop a run."""
PATIENCE = 900.0
"""Seconds of nothing but rate limits, or of a service that is down, after which a run stops."""
GIVE_UP_SECONDS = 2.0
"""How long a second Ctrl-C waits for the serving to be cleaned up."""

Try = tuple[list[GenerationRequest], int]
"""Requests to make together, and which attempt it is, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a step is run.

    Attributes:
        max_failed_fraction: the run stops when more than this share of the settled rows failed (and at least 100).
        max_attempts: how often one request is tried in one run before it counts as failed.
        retry: reasons of failures of earlier runs to try again; None for every reason but refusals.
        budget_usd: US dollars the step may cost over all its runs, refused and repeated calls included. The run stops
            before a call could pass it; None for no limit.
        progress: show a progress bar; None shows it in terminals and notebooks only.
        quiet: do not print the sum at the end.
    """

    max_failed_fraction: float = 0.5
    max_attempts: int = 3
    retry: frozenset[str] | None = None
    budget_usd: float | None = None
    progress: bool | None = None
    quiet: bool = False


def execute(plan: Plan, storage: FileStorage, options: RunOptions | None = None) -> Summary:
    """Run one step: every image its rows ask for exists once afterwards, and the step's table is written.

    Args:
        plan: what to do with each row.
        storage: at the step to run (after ``storage.step()``).
        options: how.

    Returns:
        The sum of what became of the rows; it is printed to standard error too.

    Raises:
        InputError: the table cannot be read, or lacks a column the plan needs.
        ConfigError: the serving cannot be used as it is set up, or the step would overwrite the user's table.
        CacheBusyError: another process writes to this cache folder.
        RunStoppedError: the run ended early (Ctrl-C, too many failures, a full disk, a service that is gone).
            Everything finished is kept, the old table of the step is untouched, and the next run goes on.
    """
    options = options or RunOptions()
    storage.open_writer()  # writes nothing yet, but refuses a step that would overwrite the user's table
    with _readable_disk_errors(storage), cache_lock(Path(storage.cache_path)):
        if plan.serving is None:
            summary = table.fold_only(plan, storage)
        else:
            summary = _Run(plan, plan.serving, storage, options).execute()
    if not options.quiet:
        print(describe(summary), file=sys.stderr)
    return summary


class _Run:
    """One execution of one plan."""

    def __init__(self, plan: Plan, serving: Serving, storage: FileStorage, options: RunOptions) -> None:
        self.plan, self.serving, self.storage, self.options = plan, serving, storage, options
        self.started = time.monotonic()
        self.signature = storage.input_signature()
        self.journal = Journal(table.journal_folder(storage))
        existing = serving.image_io.existing() if serving.image_io else ()
        self.index = self.journal.load()
        self.index.verify(existing)
        self.tally = Tally(usd=self.index.usd, unpriced=self.index.unpriced)
        self.budget = Budget(options.budget_usd, self.index.usd)
        self.identifier = Identifier(
            serving, plan.seed, resolve=storage.resolve, digest=ImageIO(storage.cache_path).digest
        )
        self.planner = Planner(
            plan, storage, serving, self.identifier, self.index, self.journal, self.tally, options.retry
        )
        self.stop_error: RunStoppedError | None = None
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._halted = asyncio.Event()
        self._progressed = asyncio.Event()
        self._pushed_back: list[list[GenerationRequest]] = []
        self._workers: list[Worker] = []
        self._in_hand = 0
        self._unfinished: set[str] = set()
        self._deadly: set[str] = set()

    def execute(self) -> Summary:
        self.journal.open()
        try:
            with Progress(
                self.plan.name, self.storage.count_rows(), self.tally, self.options.progress
            ) as self.progress:
                self._in_thread()
            if self.serving.image_io is not None:
                self.serving.image_io.sweep()
            if self.stop_error is not None:
                raise self._stopped()
            summary = table.write(
                self.plan, self.storage, self.planner, self.signature, time.monotonic() - self.started
            )
        finally:
            self._planning.shutdown(wait=False)
            self.journal.close()
        return summary

    def _in_thread(self) -> None:
        """Run the loop in its thread and wait for it, also through Ctrl-C."""
        self.loop = asyncio.new_event_loop()
        failure: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            try:
                self.loop.run_until_complete(self._main())
            except BaseException as error:  # noqa: BLE001  handed to the caller's thread, whatever it is
                failure.append(error)
            finally:
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
                self.loop.close()
                ended.set()

        threading.Thread(target=run, name="dataflow", daemon=True).start()
        try:
            _wait(ended)
        except KeyboardInterrupt:
            error = RunInterruptedError("interrupted: run the same command again to go on")
            self._tell(self._stop, error)
            print("\nCtrl-C: finishing the batches in flight; press it again to give them up.", file=sys.stderr)
            try:
                _wait(ended)
            except KeyboardInterrupt:
                # A serving may hold up the loop, which then has not even heard of the first one.
                self.stop_error = self.stop_error or error
                self._tell(self._give_up)
                with contextlib.suppress(KeyboardInterrupt):
                    ended.wait(GIVE_UP_SECONDS)
                return
        if failure:
            raise failure[0]

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the loop's thread."""
        with contextlib.suppress(RuntimeError):  # the loop may have ended just now
            self.loop.call_soon_threadsafe(function, *arguments)

    def _stopped(self) -> RunStoppedError:
        assert self.stop_error is not None
        rows = self.storage.count_rows()
        if rows is None:
            rows = sum(1 for _ in self.storage.iter_rows())
        rows = max(rows, self.tally.planned)
        summary = self.tally.summary(self.storage.step_name, rows, time.monotonic() - self.started)
        with contextlib.suppress(OSError):  # on a full disk the sum is shown, not kept
            table.save_summary(self.plan, self.storage, summary)
        if not self.options.quiet:
            print(describe(summary), file=sys.stderr)
        self.stop_error.summary = summary
        return self.stop_error

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._pulling = asyncio.Lock()
        first = await self._pull()
        if first is None:
            return
        replicas = self.serving.replicas()
        kind = InlineWorker if len(replicas) == 1 else ProcessWorker
        workers: list[Worker] = [kind(replica, self.identifier.fingerprint) for replica in replicas]
        self._workers = workers
        self.limiter = Limiter(
            sum(worker.concurrency for worker in workers), self._halted, self.serving.requests_per_minute
        )
        slots = [asyncio.Semaphore(worker.concurrency) for worker in workers]
        rooms = [Room() for _ in workers]
        self._pushed_back = [first]
        try:
            try:
                await asyncio.gather(*(worker.start() for worker in workers))
            except FatalServingError as error:
                stop = RunStoppedError(f"stopped: {error}")
                stop.__cause__ = error
                self._stop(stop)
                return
            # One lane more than may generate: its batch is planned, encoded and written while the others generate.
            lanes = [
                asyncio.create_task(self._lane(worker, slot, room))
                for worker, slot, room in zip(workers, slots, rooms, strict=True)
                for _ in range(worker.concurrency + 1)
            ]
            await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
            self.planner.stopping = self.planner.stopping or any(lane.done() and lane.exception() for lane in lanes)
            self._progressed.set()
            for result in await asyncio.gather(*lanes, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
        finally:
            if self._unfinished:
                # A clean stop: these did not kill anybody.
                with contextlib.suppress(OSError):  # on a full disk they count as started once
                    self.journal.append({"s": "forget", "ks": sorted(self._unfinished)})
            await asyncio.gather(*(worker.stop() for worker in workers))

    async def _lane(self, worker: Worker, slot: asyncio.Semaphore, room: Room) -> None:
        while (batch := await self._pull()) is not None:
            try:
                await self._settle(worker, slot, room, batch)
            except OSError as error:
                self._stop(RunStoppedError(_disk_message(error)))

    async def _pull(self) -> list[GenerationRequest] | None:
        """The next batch; None when there is none and none can come any more."""
        async with self._pulling:
            while not self.planner.stopping:
                if self._pushed_back:
                    return self._pushed_back.pop()
                # Cleared before looking: a parent that ends while the planner looks must wake this lane up.
                self._progressed.clear()
                batch = await asyncio.get_running_loop().run_in_executor(self._planning, self.planner.next_batch)
                self._check_failures()
                self.progress.update()
                if batch is not None:
                    self._in_hand += len(batch)
                    return batch
                if self._in_hand == 0:
                    return None
                await self._progressed.wait()
            return None

    async def _settle(
        self, worker: Worker, slot: asyncio.Semaphore, room: Room, batch: list[GenerationRequest]
    ) -> None:
        """Make a batch, in as many attempts and pieces as it takes, until each request has ended."""
        todo: list[Try] = [(batch, 1)]
        while todo:
            requests, attempt = todo.pop()
            result = await self._attempt(worker, slot, room, requests)
            if result is None:
                return
            if isinstance(result, ServingError):
                todo += await self._react(requests, attempt, result)
                continue
            self.limiter.succeeded()
            todo += await self._take(requests, result, attempt)

    async def _attempt(
        self, worker: Worker, slot: asyncio.Semaphore, room: Room, requests: list[GenerationRequest]
    ) -> Sequence[Item] | ServingError | None:
        """Make a batch once: what came of each request, or why all failed; None if the run stops before."""
        async with room.enter(alone=requests[0].request_id in self._deadly):
            held = await self.budget.hold([self.serving.estimate(request) for request in requests])
            if held is None:
                self._stop(RunStoppedError(f"stopped: {self.budget.spent_up()}"))
                return None
            paid, result = 0.0, None
            try:
                async with slot, self.limiter.slot(len(requests)):
                    if self.planner.stopping:
                        return None
                    self._start(requests)
                    ticket = await worker.generate(requests)
                result = await worker.save(ticket)
            except ServingError as error:
                result = error
            finally:
                try:
                    paid = self._bill(requests, result)
                finally:
                    await self.budget.settle(held, paid, len(requests))
        return result

    def _bill(self, requests: list[GenerationRequest], result: Sequence[Item] | ServingError | None) -> float:
        """Count what an attempt cost, in dollars; calls without a result are kept in the journal here."""
        items = [result] if isinstance(result, ServingError) else result or []
        paid, unpriced = 0.0, self.index.unpriced
        for request, item in zip(requests, items, strict=False):
            if item.usage:
                paid += self.index.bill(item.usage)
                if isinstance(item, ServingError):
                    self.journal.append({"s": "paid", "k": request.request_id, "usage": dict(item.usage)})
        self.tally.usd, self.tally.unpriced = self.index.usd, self.index.unpriced
        if self.budget.limit is not None and self.index.unpriced > unpriced:
            self._stop(
                RunStoppedError(
                    "stopped: nobody knows what these calls cost, so that no budget can be kept: "
                    "state the model's price, or leave the budget out"
                )
            )
        return paid

    async def _take(self, requests: list[GenerationRequest], items: Sequence[Item], attempt: int) -> list[Try]:
        again: list[Try] = []
        for request, item in zip(requests, items, strict=True):
            if isinstance(item, Made):
                self._done(request, item, attempt)
            else:
                again += await self._react([request], attempt, item)
        return again

    async def _react(self, requests: list[GenerationRequest], attempt: int, error: ServingError) -> list[Try]:
        """What to do about a failure: the tries that follow from it; requests that are at their end are ended."""
        if isinstance(error, FatalServingError):
            self._stop(RunStoppedError(f"stopped: {error}"))
            return []
        if isinstance(error, RateLimitError):
            self._hold_back(self.limiter.rate_limited(error.retry_after), error)
            return [(requests, attempt)]
        if isinstance(error, RetryError) and not self.serving.reproducible:
            wait = self.limiter.failed()
            if wait is not None:
                # The service is down: no request's attempt, and no reason to give one up.
                self._hold_back(wait, error)
                return [(requests, attempt)]
        if len(requests) > 1:
            half = (len(requests) + 1) // 2
            logger.info("batch of %d failed (%s), trying it in halves: %s", len(requests), error.reason, error)
            if isinstance(error, OutOfMemoryError):
                self.planner.shrink(requests[0], half)
            return [(requests[half:], attempt), (requests[:half], attempt)]
        request = requests[0]
        if isinstance(error, WorkerDiedError) and request.request_id not in self._deadly:
            # Another batch in the same process may have killed it: tried again with nobody else in there.
            self._deadly.add(request.request_id)
            return [(requests, attempt)]
        broken = isinstance(error, BadOutputError) and not self.serving.reproducible
        if (broken or isinstance(error, RetryError | OutOfMemoryError)) and attempt < self.options.max_attempts:
            logger.info("request %s: attempt %d failed: %s", request.request_id, attempt, error)
            await pause(0 if isinstance(error, OutOfMemoryError) else backoff(attempt), self._halted)
            return [(requests, attempt + 1)]
        if error.reason == "refused":
            self._end(request, "refused", error.reason, str(error))
        else:
            reason = "killed_worker" if isinstance(error, WorkerDiedError) else error.reason
            self._end(request, "failed", reason, str(error))
        return []

    def _hold_back(self, wait: float, error: ServingError) -> None:
        if self.limiter.trouble > PATIENCE:
            self._stop(RunStoppedError(f"stopped: nothing for {self.limiter.trouble:.0f} s but: {error}"))
        logger.info("all lanes wait %.1f s: %s", wait, error)

    # -- how requests end --------------------------------------------------------------------------------------------

    def _start(self, requests: list[GenerationRequest]) -> None:
        # Once per run: what counts is how many processes died with it in hand, not how often they tried.
        ids = [request.request_id for request in requests if request.request_id not in self._unfinished]
        if not ids:
            return
        record: dict[str, object] = {"s": "start", "ks": ids}
        if requests[0].alone:
            record["alone"] = True
        self.journal.append(record)
        self._unfinished.update(ids)

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
        self._unfinished.discard(request.request_id)
        self._in_hand -= 1
        self.tally.settle(bytes.fromhex(request.request_id), outcome.status, outcome.reason)
        for key, ending in self.planner.parent_ended(request, outcome):
            self.index.endings[key] = ending
            self.tally.settle(key, "failed", ending.reason)
        self._check_failures()
        self._progressed.set()
        self.progress.update()

    def _check_failures(self) -> None:
        failed, settled = self.tally.counts["failed"], self.tally.settled
        if failed >= LEAST_FAILURES and failed > self.options.max_failed_fraction * settled:
            common = ", ".join(f"{reason} {count}" for reason, count in self.tally.reasons.most_common(3))
            self._stop(
                TooManyFailuresError(
                    f"stopped: {failed} of {settled} rows failed ({common}), more than max_failed_fraction="
                    f"{self.options.max_failed_fraction:g}. Mend the cause and run again, or raise the limit."
                )
            )

    def _stop(self, error: RunStoppedError) -> None:
        self.stop_error = self.stop_error or error
        self.planner.stopping = True
        self._halted.set()
        self._progressed.set()

    def _give_up(self) -> None:
        """Drop what is in flight; what was started is forgotten, and the workers are stopped."""
        for worker in self._workers:
            worker.give_up()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()


def _wait(ended: threading.Event) -> None:
    # With a time-out, so that Ctrl-C gets through on every platform. Not Thread.join: before Python 3.13 one that was
    # interrupted takes the thread for ended.
    while not ended.wait(0.5):
        pass


def _disk_message(error: OSError) -> str:
    what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "a file could not be written"
    return f"stopped: {what} ({error}). Nothing finished is lost: mend that and run again."


@contextlib.contextmanager
def _readable_disk_errors(storage: FileStorage):
    try:
        yield
    except PermissionError as error:
        raise InputError(f"no permission to write the cache folder ({error})", path=storage.cache_path) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            "a folder is needed here and there is a file: move it or choose another path",
            path=error.filename or storage.cache_path,
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise RunStoppedError(_disk_message(error)) from error
