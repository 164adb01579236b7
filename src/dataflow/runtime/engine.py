"""What happens to every step, once: resume, batches, retries, out-of-memory, refusals, interruption, the final sum."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dataflow.errors import (
    ConfigError,
    FatalServingError,
    InputError,
    RunInterruptedError,
    RunStoppedError,
    StepError,
    TooManyFailuresError,
)
from dataflow.runtime import sharing, table
from dataflow.runtime.budget import Budget
from dataflow.runtime.crew import Crew
from dataflow.runtime.forecast import describe_forecast, forecast, sample_rows
from dataflow.runtime.journal import Index, Journal
from dataflow.runtime.making import Maker, Try
from dataflow.runtime.parts import (
    PART_ROWS,
    Origins,
    Part,
    cut,
    existing_images,
    facts,
    find_origins,
    identifier_of,
    is_mixed,
    keep_layout,
    save_origins,
)
from dataflow.runtime.planner import Planner
from dataflow.runtime.progress import Progress, describe
from dataflow.runtime.ray_cluster import Cluster, kept_connection, require_ray
from dataflow.runtime.sharing import Driver
from dataflow.runtime.station import Station
from dataflow.runtime.tally import Tally, add_up
from dataflow.types import Plan, Serving, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

LEAST_FAILURES = 100
"""Fewer failed rows than this never stop a run."""
TICK_SECONDS = 1.0
PATIENCE = 1.0
"""Seconds between two looks at what other drivers have done."""


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
        part_rows: tables of JSON Lines with more lines are run in parts of so many, each with a journal of its own, so
            that going on reads what is left and not what is done.
        share: make the step together with other processes that are run with the same options, on this machine or on
            others that see the same folders. Tables of several parts are shared part by part.
        executor: ``local`` works on this machine, ``ray`` on a Ray cluster.
        ray_address: of the cluster (``auto``, ``host:6379``); None takes the one that this process is connected to or
            that ``RAY_ADDRESS`` names, or starts one on this machine for the run.
        workers: copies of the model on the cluster, or processes for each endpoint of a service; None for as many as
            there is room for, or one on each machine. Those for which there is no room join when there is.
    """

    max_failed_fraction: float = 0.5
    max_attempts: int = 3
    retry: frozenset[str] | None = None
    budget_usd: float | None = None
    pilot: int | None = None
    progress: bool | None = None
    quiet: bool = False
    part_rows: int = PART_ROWS
    share: bool = False
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    workers: int | None = None


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
        ConfigError: the serving cannot be used as it is set up, options do not go together, or the step would overwrite
            the user's table.
        CacheBusyError: another process writes to this cache folder.
        RunStoppedError: the run ended early (Ctrl-C, too many failures, a full disk, a service that is gone).
            Everything finished is kept, the old table of the step is untouched, and the next run goes on.
    """
    options = options or RunOptions()
    _check(options)
    storage.open_writer()  # writes nothing yet, but refuses a step that would overwrite the user's table
    folder = Path(storage.cache_path)
    entered = sharing.join(folder) if options.share else sharing.alone(folder)
    with kept_connection(), _readable_disk_errors(storage), entered as driver:
        try:
            summary = _execute(plan, storage, options, driver)
        except RunStoppedError as error:
            if not options.quiet and error.summary is not None:
                print(describe(error.summary), file=sys.stderr)
            raise
    if not options.quiet:
        print(describe(summary), file=sys.stderr)
        if summary.forecast is not None:
            print(describe_forecast(summary.forecast), file=sys.stderr)
    return summary


def _check(options: RunOptions) -> None:
    """Raise ConfigError for options that do not go together."""
    if options.share and (options.budget_usd is not None or options.pilot is not None):
        raise ConfigError("share=True goes with neither budget_usd nor pilot: one process alone can keep count")
    if options.executor == "ray":
        require_ray()
    elif options.executor != "local":
        raise ConfigError(f"executor must be 'local' or 'ray', got {options.executor!r}")
    elif options.ray_address is not None or options.workers is not None:
        raise ConfigError("ray_address and workers go with executor='ray' (--executor ray)")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"workers must be a whole number from 1, got {options.workers!r}")


def _execute(plan: Plan, storage: FileStorage, options: RunOptions, driver: Driver | None) -> Summary:
    if plan.serving is not None:
        return _Step(plan, plan.serving, storage, options, driver).execute()
    if driver is None:
        return table.fold_only(plan, storage)
    with driver.alone():
        return table.written_since(driver.started, plan, storage) or table.fold_only(plan, storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a run over a part of a table has to know of the rest.

    Attributes:
        before: the sum of the parts before it.
        usd: US dollars that the other parts have cost, and those that calls which broke off may have.
        index: what the journals of all parts say, where a row's record may lie in that of another part.
        earlier: how many identical drafts the parts before it have.
        only: numbers in the table, from 0, of the rows to make; None for all.
        writer: stem of the journal's file that this process writes.
    """

    before: Summary = field(default_factory=Summary)
    usd: float = 0.0
    index: Index | None = None
    earlier: Callable[[bytes], int] | None = None
    only: frozenset[int] | None = None
    writer: str = "main"


class _Step:
    """One execution of one plan: over the whole table, or over one part of it after another."""

    def __init__(
        self, plan: Plan, serving: Serving, storage: FileStorage, options: RunOptions, driver: Driver | None
    ) -> None:
        self.plan, self.serving, self.storage, self.options, self.driver = plan, serving, storage, options, driver
        self.started = time.monotonic()
        self.parts = cut(plan, serving, storage, options.part_rows)
        ray = options.executor == "ray" and not serving.detached
        cluster = Cluster(options.ray_address, options.workers, Path(storage.cache_path)) if ray else None
        self.crew = Crew(serving, cluster)
        self.sums: dict[int, Summary] = {}
        self.mixed = False
        self.index: Index | None = None

    def execute(self) -> Summary:
        """Make what is pending and write the table.

        Raises:
            RunStoppedError: not everything was made; ``summary`` says what was.
            StepError: the table changed while the step ran.
        """
        pilot = self.options.pilot
        only = None if pilot is None else sample_rows(self._count_rows(), pilot, self.plan.seed)
        with (
            contextlib.closing(self.crew),
            Progress(self.plan.name, self.storage.count_rows(), self.options.progress) as self.progress,
        ):
            try:
                if self.parts:
                    summary = self._in_parts(only)
                else:
                    with self._alone():
                        summary = self._run(self.storage, Context(only=only)).execute()
            finally:
                if self.serving.image_io is not None:
                    self.serving.image_io.sweep()
        if pilot is not None and summary.pending:
            summary.forecast = forecast(Journal(table.journal_folder(self.storage)).records(), summary, self.serving)
            table.save_summary(self.plan, self.storage, summary)
        return summary

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other drivers away, if there may be any."""
        return contextlib.nullcontext() if self.driver is None else self.driver.alone()

    def _run(self, storage: FileStorage, context: Context) -> _Run:
        return _Run(self.plan, self.serving, storage, self.options, self.crew, self.progress, context)

    def _count_rows(self) -> int:
        rows = self.storage.count_rows()
        return sum(1 for _ in self.storage.iter_rows()) if rows is None else rows

    def _in_parts(self, only: frozenset[int] | None) -> Summary:
        signature = self.storage.input_signature()
        with self._alone():
            self.mixed = is_mixed(self.storage, self.parts)
            keep_layout(self.storage, self.parts, self.options.part_rows, mixed=self.mixed)
        while len(self.sums) < len(self.parts):
            before = len(self.sums)
            for number in range(len(self.parts)):
                if number not in self.sums:
                    self._try_part(number, only)
            if len(self.sums) == before:
                time.sleep(PATIENCE)  # the others are at it
        summary = self._total()
        if summary.pending:
            return summary
        if self.storage.input_signature() != signature:
            raise StepError(f"{self.storage.input_path} changed while the step ran: run again")
        state = hashlib.sha256("".join(part.mark + str(part.known.get("state")) for part in self.parts).encode())
        with self._alone():
            storages = [part.storage for part in self.parts]
            table.write_joined(self.plan, self.storage, storages, summary, state.hexdigest())
        return summary

    def _try_part(self, number: int, only: frozenset[int] | None) -> None:
        """Settle a part, unless another driver is at it."""
        part = self.parts[number]
        if self._is_settled(part):
            self.sums[number] = part.summary()
            return
        if self.driver is not None:
            if not self.driver.claim(part.folder):
                return
            part.known = table.load_summary(part.folder) or {}
            if self._is_settled(part):  # just now
                self.driver.release(part.folder)
                return
        try:
            if self.crew.interrupted:
                raise self.crew.interrupted
            self.sums[number] = self._one_part(part, self.parts[:number], only)
        except RunStoppedError as error:
            if error.summary is not None:
                self.sums[number] = error.summary
            error.summary = self._total()
            with contextlib.suppress(OSError), self._alone():  # on a full disk the sum is shown, not kept
                table.save_summary(self.plan, self.storage, error.summary)
            raise
        finally:
            if self.driver is not None:
                self.driver.release(part.folder)

    def _is_settled(self, part: Part) -> bool:
        """Whether a part is finished and nothing in it is to be tried again."""
        if self.driver is not None:
            part.known = table.load_summary(part.folder) or {}
        if not part.is_finished(self.serving.image_io):
            return False
        just_now = self.driver is not None and part.written_at() >= self.driver.started
        return just_now or part.is_settled(self.options.retry)

    def _one_part(self, part: Part, earlier: Sequence[Part], only: frozenset[int] | None) -> Summary:
        origins = Origins()
        for each in earlier:
            if not each.origins_path.is_file():
                found = find_origins(each, self.plan, self.serving)
                with self._alone():
                    save_origins(each, found)
            origins.add(each)
        context = Context(
            before=add_up("", self.sums.values(), 0.0),
            usd=self._usd_of_others(part),
            index=self._index_of_all() if self.mixed else None,
            earlier=origins.count,
            only=only,
            writer=self.driver.name if self.driver else "main",
        )
        run = self._run(part.storage, context)

        def kept() -> Mapping[str, object]:
            if self.driver is not None and not self.driver.holds(part.folder):
                raise RunStoppedError(
                    f"stopped: another process has taken over {part.folder.name}, because this one has not been heard "
                    f"of for {sharing.DEAD_SECONDS:.0f} s. Nothing finished is lost: run again to go on"
                )
            with self._alone():
                save_origins(part, run.identifier.origins)
            return facts(part, run.index, run.planner.book.requests)

        summary = run.execute(kept)
        part.known = table.load_summary(part.folder) or {}
        return summary

    def _index_of_all(self) -> Index:
        if self.index is None:
            logger.warning(
                "%s: rows were put in or taken out since the first run, so that the journals of all %d parts are read",
                self.storage.input_path,
                len(self.parts),
            )
            self.index = Journal(table.journal_folder(self.storage)).load()
            self.index.verify(existing_images(self.serving, self.index, self.storage))
        return self.index

    def _usd_of_others(self, part: Part) -> float:
        if self.options.budget_usd is None or self.mixed:
            return 0.0
        return sum(each.spent() for each in self.parts if each is not part)

    def _total(self) -> Summary:
        sums = [self.sums.get(number) or part.summary() for number, part in enumerate(self.parts)]
        found = add_up(self.storage.step_name, sums, time.monotonic() - self.started)
        if self.mixed:  # a journal tells nothing of what its own part cost
            known = table.load_summary(table.journal_folder(self.storage)) or {}
            found.usd = self.index.usd if self.index else known.get("usd", 0.0)
            found.unpriced = self.index.unpriced if self.index else known.get("unpriced", 0)
        return found


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
        self.crew, self.progress, self.context = crew, progress, context
        self.started = time.monotonic()
        self.signature = storage.input_signature()
        self.journal = Journal(table.journal_folder(storage), context.writer)
        self.index = self.journal.load() if context.index is None else context.index
        if context.index is None:
            self.index.verify(existing_images(serving, self.index, storage))
        self.tally = Tally(before=storage.rows_before, usd=self.index.usd, unpriced=self.index.unpriced)
        self.budget = Budget(options.budget_usd, lambda: context.usd + self.index.usd + self.index.risk)
        self.identifier = identifier_of(plan, serving, storage, context.earlier)
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
        self.halted, self.stations = crew.halted, crew.stations
        self.maker = Maker(
            self, serving, self.planner, self.index, self.journal, self.tally, self.budget, options.max_attempts
        )
        self.stop_error: RunStoppedError | None = None
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._progressed = asyncio.Event()
        self._given_back: list[Try] = []
        self._in_hand = 0

    def execute(self, facts: Callable[[], Mapping[str, object]] = dict) -> Summary:
        """Make what is pending and write the table.

        Args:
            facts: what to keep with the sum of a table that was written.

        Raises:
            RunStoppedError: not everything was made; ``summary`` says what was.
            StepError: the table changed while the step ran.
        """
        self.journal.open()
        try:
            self.progress.follow(self.tally, self.context.before)
            try:
                self.crew.run(self._main, self.stop)
            except RunInterruptedError as error:
                self.stop_error = self.stop_error or error
            nothing_left = self.planner.exhausted and not self._in_hand
            if self.stop_error is not None and not (self.stop_error is self.crew.interrupted and nothing_left):
                self.stop_error.summary = self._standing()
                raise self.stop_error
            if self.options.pilot is not None and self._count_rows() > self.tally.settled:
                return self._standing()
            seconds = time.monotonic() - self.started
            summary = table.write(self.plan, self.storage, self.planner, self.signature, seconds, **facts())
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
        self._pulling, self._over = asyncio.Lock(), asyncio.Event()
        first = await self._pull()
        if first is None:
            return
        self._given_back = [first]
        await self.crew.gather(self.identifier.fingerprint)
        self.stations = self.crew.stations
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
        while await self._ready(station) and (batch := await self._pull()) is not None:
            try:
                await self.maker.make(station, batch)
            except OSError as error:
                self.stop(RunStoppedError(_disk_message(error)))
            if self.stations.others(station):
                await station.limiter.ready()

    async def _ready(self, station: Station) -> bool:
        """Wait until the station can work; False if there is nothing for it to do."""
        try:
            return await self.stations.ready(station, self._over)
        except FatalServingError as error:
            stop = RunStoppedError(f"stopped: {error}")
            stop.__cause__ = error
            self.stop(stop)
            return False

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
                    break
                await self._progressed.wait()
            self._over.set()
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
        self._over.set()
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
