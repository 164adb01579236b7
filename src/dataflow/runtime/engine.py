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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dataflow.errors import (
    FatalServingError,
    InputError,
    RunInterruptedError,
    RunStoppedError,
    TooManyFailuresError,
)
from dataflow.io import ImageIO
from dataflow.runtime import table
from dataflow.runtime.budget import Budget
from dataflow.runtime.forecast import describe_forecast, forecast, sample_rows
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import Journal
from dataflow.runtime.lock import cache_lock
from dataflow.runtime.making import Maker, Try
from dataflow.runtime.planner import Planner
from dataflow.runtime.progress import Progress, describe
from dataflow.runtime.station import Station, Stations
from dataflow.runtime.tally import Tally
from dataflow.runtime.worker import InlineWorker, ProcessWorker
from dataflow.types import Plan, Serving, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

LEAST_FAILURES = 100
"""Fewer failed rows than this never stop a run."""
TICK_SECONDS = 1.0
GIVE_UP_SECONDS = 2.0
"""How long a second Ctrl-C waits for the serving to be cleaned up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a step is run.

    Attributes:
        max_failed_fraction: the run stops when more than this share of the settled rows failed (and at least 100).
        max_attempts: how often one request is tried in one run before it counts as failed.
        retry: reasons of failures of earlier runs to try again; None for every reason but refusals.
        budget_usd: US dollars the step may cost over all its runs, refused and repeated calls included. The run stops
            before a call could pass it; None for no limit.
        pilot: settle only so many rows, drawn at random, and forecast what the others will take. No table is written,
            unless that was all. What is made counts for the run that follows.
        progress: show a progress bar; None shows it in terminals and notebooks only.
        quiet: do not print the sum at the end.
    """

    max_failed_fraction: float = 0.5
    max_attempts: int = 3
    retry: frozenset[str] | None = None
    budget_usd: float | None = None
    pilot: int | None = None
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
        if summary.forecast is not None:
            print(describe_forecast(summary.forecast), file=sys.stderr)
    return summary


class _Run:
    """One execution of one plan over a table, or over a part of one.

    Args:
        plan: the step.
        serving: the plan's.
        storage: at the step, or a part of its table.
        options: how.
        crew: makes the batches.
        progress: shows how things stand.
        context: what is known of the step's other parts.
    """

    def __init__(
        self,
        plan: Plan,
        serving: Serving,
        storage: FileStorage,
        options: RunOptions,
        crew: Crew,
        progress: Progress,
        context: Context,
    ) -> None:
        self.plan, self.serving, self.storage, self.options = plan, serving, storage, options
        self.crew, self.progress = crew, progress
        self.started = time.monotonic()
        self.signature = storage.input_signature()
        self.journal = Journal(table.journal_folder(storage))
        self.index = self.journal.load() if context.index is None else context.index
        if serving.image_io and context.index is None:
            whole = context.whole_folder
            self.index.verify(serving.image_io.existing() if whole else serving.image_io.sizes(self.index.all_names()))
        self.tally = Tally(before=storage.rows_before, usd=self.index.usd, unpriced=self.index.unpriced)
        self.budget = Budget(options.budget_usd, lambda: context.usd + self.index.usd + self.index.risk)
        self.identifier = Identifier(
            serving, plan.seed, resolve=storage.resolve, digest=ImageIO(storage.cache_path).digest, earlier=context.earlier
        )
        self.planner = Planner(
            plan,
            storage,
            serving,
            self.identifier,
            self.index,
            self.journal,
            self.tally,
            options.retry,
            context.only,
        )
        self.halted = crew.halted
        self.maker = Maker(
            self, serving, self.planner, self.index, self.journal, self.tally, self.budget, options.max_attempts
        )
        self.stop_error: RunStoppedError | None = None
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._progressed = asyncio.Event()
        self._given_back: list[Try] = []
        self._in_hand = 0

    @property
    def stations(self) -> Stations:
        return self.crew.stations

    def execute(self) -> Summary:
        """Make what is pending and write the table.

        Raises:
            RunStoppedError: not everything was made; ``summary`` says what was.
            StepError: the table changed while the step ran.
        """
        self.journal.open()
        try:
            self.progress.follow(self.tally)
            self.crew.run(self._main, self.stop)
            if self.stop_error is not None:
                self.stop_error.summary = self._standing()
                raise self.stop_error
            if self.options.pilot is not None and self._count_rows() > self.tally.settled:
                return self._standing()
            summary = table.write(
                self.plan, self.storage, self.planner, self.signature, time.monotonic() - self.started
            )
        finally:
            self._planning.shutdown(wait=False)
            self.journal.close()
        return summary

    def _standing(self) -> Summary:
        """The sum of a run that did not end."""
        rows = max(self._count_rows(), self.tally.planned)
        summary = self.tally.summary(self.storage.step_name, rows, time.monotonic() - self.started)
        with contextlib.suppress(OSError):  # on a full disk the sum is shown, not kept
            table.save_summary(self.plan, self.storage, summary)
        return summary

    def _count_rows(self) -> int:
        rows = self.storage.count_rows()
        return sum(1 for _ in self.storage.iter_rows()) if rows is None else rows

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._pulling = asyncio.Lock()
        first = await self._pull()
        if first is None:
            return
        self._given_back = [first]
        try:
            await self.crew.start(self.identifier.fingerprint)
        except FatalServingError as error:
            stop = RunStoppedError(f"stopped: {error}")
            stop.__cause__ = error
            self.stop(stop)
            return
        try:
            ticker = asyncio.create_task(self._tick())
            # One lane more than may generate: its batch is planned, encoded and written while the others generate.
            lanes = [
                asyncio.create_task(self._lane(station))
                for station in self.stations.all
                for _ in range(station.worker.concurrency + 1)
            ]
            await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
            ticker.cancel()
            self.planner.stopping = self.planner.stopping or any(lane.done() and lane.exception() for lane in lanes)
            self._progressed.set()
            for result in await asyncio.gather(*lanes, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
        finally:
            if self.maker.unfinished:
                # A clean stop: these did not kill anybody.
                with contextlib.suppress(OSError):  # on a full disk they count as started once
                    self.journal.append({"s": "forget", "ks": sorted(self.maker.unfinished)})

    async def _tick(self) -> None:
        """Show how things stand also while nothing ends."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.progress.update()

    async def _lane(self, station: Station) -> None:
        while station.closed is None and (batch := await self._pull()) is not None:
            try:
                await self.maker.make(station, batch)
            except OSError as error:
                self.stop(RunStoppedError(_disk_message(error)))
            if self.stations.others(station):
                await station.limiter.ready()

    async def _pull(self) -> Try | None:
        """The next batch; None when there is none and none can come any more."""
        async with self._pulling:
            while not self.planner.stopping:
                if self._given_back:
                    return self._given_back.pop()
                # Cleared before looking: a parent that ends while the planner looks must wake this lane up.
                self._progressed.clear()
                batch = await asyncio.get_running_loop().run_in_executor(self._planning, self.planner.next_batch)
                self._check_failures()
                self.progress.update()
                if batch is not None:
                    self._in_hand += len(batch)
                    return Try(batch)
                if self._in_hand == 0:
                    return None
                await self._progressed.wait()
            return None

    # -- what the maker says -----------------------------------------------------------------------------------------

    def settled(self, count: int) -> None:
        """So many requests ended."""
        self._in_hand -= count
        self._check_failures()
        self._progressed.set()
        self.progress.update()

    def give_back(self, again: Try) -> None:
        """Another station should take this."""
        self._given_back.append(again)
        self._progressed.set()

    def stop(self, error: RunStoppedError) -> None:
        """No new work; what is under way ends."""
        self.stop_error = self.stop_error or error
        self.planner.stopping = True
        self.halted.set()
        self._progressed.set()

    def _check_failures(self) -> None:
        failed, settled = self.tally.counts["failed"], self.tally.settled
        if failed >= LEAST_FAILURES and failed > self.options.max_failed_fraction * settled:
            common = ", ".join(f"{reason} {count}" for reason, count in self.tally.reasons.most_common(3))
            self.stop(
                TooManyFailuresError(
                    f"stopped: {failed} of {settled} rows failed ({common}), more than max_failed_fraction="
                    f"{self.options.max_failed_fraction:g}. Mend the cause and run again, or raise the limit."
                )
            )


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
