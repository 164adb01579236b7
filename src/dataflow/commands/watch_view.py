"""What ``watch`` knows of a job at one moment, found out without the lock and without writing.

Two sources are joined. The rows of every step are counted as ``dataflow status`` counts them, which takes longer the
larger the table is: in a thread of its own, and the seldomer the longer it takes. The journals are followed as they
grow, which takes equally long for every size: what came since the rows were counted, rates, what is under way.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataflow.commands.folder import JOB_FILE, load_job
from dataflow.commands.status import StepStatus, lives, owner_of, standing
from dataflow.runtime.follow import Follower
from dataflow.runtime.tally import SETTLED

WINDOW = 60.0
"""Seconds over which the present rate is taken."""
SPAN = 0.5
"""A rate over fewer seconds says nothing."""
PATIENCE = 10
"""How many times longer than counting the rows takes, nobody counts them again."""
STALE = 5.0
"""Seconds after which a count of the rows is carried on by what the journal says."""
ROWS = 10
"""A ratio over fewer rows says nothing."""
GRACE = 2.0
"""Seconds that a job is without a writer before it counts as stopped: from step to step nobody holds the lock."""
LAST_IMAGES = 5
DATED_IMAGES = 100
"""How many of the last images tell, by their dates, the rate before the watch began."""

State = Literal["waiting", "running", "ended", "finished", "stopped", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is known of a job at one moment.

    Attributes:
        folder: of the job.
        state: what it does; ``ended`` until it is known how.
        final: whether the job is over and nothing here will change.
        writer: process, host and since when, while one runs or where one was killed.
        silent: seconds since a record was last written.
        steps: how each stands, as ``dataflow status`` says it.
        counted: seconds since the rows were counted.
        at_work: name of the step that is.
        ahead: rows of it that have ended since they were counted, as far as its journal tells.
        unit: what the rates are of: ``images``, or ``answers`` of a step that scores.
        rate: of them per second, over the last minute; None until it can be told.
        mean_rate: the same since the watch began, in this step.
        left: seconds until the step's last row at this pace.
        in_hand: requests under way.
        in_jobs: requests in batch jobs.
        failures: what went wrong since the watch began, by reason.
        last: the last images' names, newest first, with their age in seconds.
        usd: US dollars spent in all.
        usd_per_hour: at the pace since the watch began.
        budget_usd: of each step.
        free_bytes: on the disk of the folder.
        trouble: why the rows could not be counted.
    """

    folder: str
    state: State
    final: bool = False
    writer: dict[str, Any] | None = None
    silent: float | None = None
    steps: Sequence[StepStatus] = ()
    counted: float | None = None
    at_work: str | None = None
    ahead: int = 0
    unit: Literal["images", "answers"] = "images"
    rate: float | None = None
    mean_rate: float | None = None
    left: float | None = None
    in_hand: int = 0
    in_jobs: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    last: Sequence[tuple[str, float]] = ()
    usd: float = 0.0
    usd_per_hour: float | None = None
    budget_usd: float | None = None
    free_bytes: int | None = None
    trouble: str | None = None


def settled(step: StepStatus) -> int:
    """Rows of a step that are no longer pending."""
    return sum(step[name] or 0 for name in SETTLED)


@dataclass(slots=True)
class Pace:
    """How fast a count grows, over the last :data:`WINDOW` seconds and over all."""

    _first: tuple[float, int] | None = None
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, when: float, count: int) -> None:
        """The count at a time in seconds, in ascending order of time."""
        self._first = self._first or (when, count)
        self._recent.append((when, count))
        while when - self._recent[0][0] > WINDOW:
            self._recent.popleft()

    def now(self) -> float | None:
        """Per second, over the last minute; None until it can be told."""
        return _slope(self._recent[0], self._recent[-1]) if self._recent else None

    def mean(self) -> float | None:
        """Per second, since the first count."""
        return _slope(self._first, self._recent[-1]) if self._first else None


def _slope(before: tuple[float, int], after: tuple[float, int]) -> float | None:
    seconds = after[0] - before[0]
    return (after[1] - before[1]) / seconds if seconds > SPAN else None


@dataclass(frozen=True, slots=True)
class Count:
    """The rows as they were counted.

    Attributes:
        steps: how each stands.
        at: when, as :func:`time.monotonic` says it.
        ended: requests that had ended then since the watch began, by step.
        usd: US dollars that had been spent then since the watch began.
        images: folder of the images.
        budget_usd: of each step.
    """

    steps: tuple[StepStatus, ...] = ()
    at: float | None = None
    ended: dict[str, int] = field(default_factory=dict)
    usd: float = 0.0
    images: Path | None = None
    budget_usd: float | None = None


class View:
    """Follows a folder.

    Args:
        folder: of the job; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._followers: dict[str, Follower] = {}
        self._looking = threading.RLock()
        self._counting = threading.Lock()
        self._wake = threading.Event()
        self._counted = threading.Event()
        self._closed = False
        self._count = Count()
        self._first: dict[str, tuple[int, int]] = {}
        self._per_row: dict[str, float] = {}
        self._quiet_at: float | None = None
        self._trouble: str | None = None
        self._started = time.monotonic()
        self._written_until: float | None = None
        self._step: str | None = None
        self._images, self._answers = Pace(), Pace()
        self._looked = False

    # Counting -------------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Count the rows of every step, as ``dataflow status`` does; this may take a while for large tables."""
        with self._counting:
            began, quiet = time.monotonic(), self._begun()
            owner = owner_of(self.folder)
            if owner is not None and lives(owner):
                self._written_until, quiet = began, False
            ended, usd = self._look()
            try:
                steps = tuple(standing(self.folder)) if self._begun() or (self.folder / JOB_FILE).is_file() else ()
                images, budget = self._job()
            except Exception as error:  # noqa: BLE001  a job's own operators may raise anything; the journals tell on
                self._trouble = str(error) or type(error).__name__
            else:
                count = Count(steps, time.monotonic(), ended, usd, images, budget)
                self._learn(count)
                self._count, self._trouble = count, None
            self._quiet_at = began if quiet else None
            self._counted.set()

    def keep_counting(self, interval: float, patience: float = 2.0) -> None:
        """Count again and again, in a thread of its own, without getting in the job's way.

        Args:
            interval: seconds between two counts, at least.
            patience: seconds to wait for the first count; a large table may take longer.
        """

        def run() -> None:
            while not self._closed:
                began = time.monotonic()
                self._wake.clear()
                self.count()
                self._wake.wait(max(interval, PATIENCE * (time.monotonic() - began)))

        threading.Thread(target=run, name="count", daemon=True).start()
        self._counted.wait(patience)

    def end(self) -> None:
        """Stop counting."""
        self._closed = True
        self._wake.set()

    def _job(self) -> tuple[Path, float | None]:
        """Where the images of the folder lie, and the budget of its steps."""
        if not (self.folder / JOB_FILE).is_file():
            return self.folder / "images", None
        config = load_job(self.folder)
        return Path(config.images["save_path"]), config.run.get("budget_usd")

    def _learn(self, count: Count) -> None:
        """How many requests a row takes, from the first count of a step and this one."""
        for step in count.steps:
            name, rows, requests = step["step"], settled(step), count.ended.get(step["step"], 0)
            first_rows, first_requests = self._first.setdefault(name, (rows, requests))
            if rows - first_rows >= ROWS and requests > first_requests:
                self._per_row[name] = (requests - first_requests) / (rows - first_rows)
            elif step["done"] and step["images"]:
                self._per_row[name] = step["images"] / step["done"]

    # Looking --------------------------------------------------------------------------------------------------------

    def frame(self) -> Frame:
        """Look at the folder now."""
        with self._looking:
            return self._frame()

    def _frame(self) -> Frame:
        _, spent = self._look()
        now, elapsed = time.monotonic(), time.monotonic() - self._started
        owner = owner_of(self.folder)
        state, final = self._state(owner)
        count = self._count
        followers = list(self._followers.values())
        latest = self._latest()
        failures: Counter[str] = Counter()
        for each in followers:
            failures.update(each.failures)
        step = self._at_work(latest)
        self._keep_pace(now, latest)
        pace = self._images if self._makes_images(latest, step) else self._answers
        ahead, left = self._progress(now, latest, step)
        written = latest and latest.written_at()
        return Frame(
            folder=str(self.folder),
            state=state,
            final=final,
            writer=owner,
            silent=max(0.0, time.time() - written) if written else None,
            steps=count.steps,
            counted=None if count.at is None else now - count.at,
            at_work=None if step is None else step["step"],
            ahead=ahead,
            unit="images" if pace is self._images else "answers",
            rate=pace.now(),
            mean_rate=pace.mean(),
            left=left if state == "running" else None,
            in_hand=sum(len(each.in_hand) for each in followers) if state == "running" else 0,
            in_jobs=sum(len(each.in_jobs) for each in followers),
            failures=dict(failures.most_common()),
            last=tuple(itertools.islice(self._dated(latest), LAST_IMAGES)),
            usd=sum(each["usd"] or 0.0 for each in count.steps) + spent - count.usd,
            usd_per_hour=spent / elapsed * 3600 if spent and elapsed > 1 else None,
            budget_usd=count.budget_usd,
            free_bytes=shutil.disk_usage(self.folder).free if self.folder.is_dir() else None,
            trouble=self._trouble,
        )

    def _look(self) -> tuple[dict[str, int], float]:
        """Follow every journal; how many requests of each have ended and what was spent since the watch began."""
        with self._looking:
            for folder in sorted((self.folder / "journal").glob("*/")):
                if folder.name not in self._followers:
                    self._followers[folder.name] = Follower(folder, DATED_IMAGES, whole=self._looked)
                self._followers[folder.name].look()
            self._looked = True
            followers = self._followers.items()
            return {name: each.ended for name, each in followers}, sum(each.usd for _, each in followers)

    def _begun(self) -> bool:
        return any((self.folder / "journal").glob("*/"))

    def _state(self, owner: dict[str, Any] | None) -> tuple[State, bool]:
        """What the job does, and whether that is the last word."""
        now = time.monotonic()
        if owner is not None and lives(owner):
            self._written_until = now
            return "running", False
        if not self._begun():
            return "waiting", False
        until, quiet_at = self._written_until, self._quiet_at
        counted = quiet_at is not None and (until is None or until < quiet_at)
        if not counted:
            self._wake.set()  # the rows were counted before the job's end
        if owner is not None:
            return "killed", counted
        if not counted or (until is not None and now - until < GRACE):
            return "ended", False
        steps = self._count.steps
        ended = self._trouble is None and bool(steps) and all(step["pending"] == 0 for step in steps)
        return ("finished" if ended else "stopped"), True

    def _latest(self) -> Follower | None:
        """The journal that was written to last."""
        return max(self._followers.values(), key=lambda each: each.written_at() or 0.0, default=None)

    def _at_work(self, latest: Follower | None) -> StepStatus | None:
        """The step whose journal grows; before there is one, the first with rows to come."""
        steps = self._count.steps
        if latest is not None and latest.ended:
            return next((step for step in steps if step["step"] == latest.folder.name), None)
        return next((step for step in steps if step["pending"]), None)

    def _makes_images(self, latest: Follower | None, step: StepStatus | None) -> bool:
        if latest is not None and latest.ended:
            return bool(latest.images) or bool(latest.last)
        return step is None or not step["done"] or bool(step["images"])

    def _keep_pace(self, now: float, latest: Follower | None) -> None:
        if latest is None:
            return
        if latest.folder.name != self._step:
            self._step = latest.folder.name
            self._images, self._answers = Pace(), Pace()
            self._wake.set()
            ages = sorted(age for _, age in self._dated(latest) if age < WINDOW)
            for number, age in reversed(list(enumerate(ages))):
                self._images.add(now - age, latest.images - number)
                self._answers.add(now - age, latest.ended - number)
        self._images.add(now, latest.images)
        self._answers.add(now, latest.ended)

    def _progress(self, now: float, latest: Follower | None, step: StepStatus | None) -> tuple[int, float | None]:
        """Rows of the step at work that ended since they were counted, and the seconds until its last one."""
        count = self._count
        if latest is None or step is None or step["pending"] is None or count.at is None:
            return 0, None
        name: str = step["step"]
        if latest.folder.name != name:
            return 0, None
        per_row = self._per_row.get(name, 1.0)
        since = latest.ended - count.ended.get(name, 0)
        ahead = min(step["pending"], round(since / per_row)) if now - count.at > STALE else 0
        pace = self._answers.now() or self._answers.mean()
        return ahead, (step["pending"] - ahead) * per_row / pace if pace else None

    def _dated(self, follower: Follower | None) -> Iterator[tuple[str, float]]:
        """Name and age in seconds of the last images that are there, newest first."""
        folder = self._count.images or self.folder / "images"
        for name in follower.last if follower else ():
            try:
                date = (folder / name).stat().st_mtime
            except OSError:
                continue
            yield name, max(0.0, time.time() - date)
