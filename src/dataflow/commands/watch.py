"""``watch``: a job as it runs, seen from another terminal. Reads only, without the lock."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataflow.commands.folder import JOB_FILE, load_job, shown
from dataflow.commands.status import StepStatus, standing, writer_of
from dataflow.errors import DataflowError, harmless
from dataflow.runtime.follow import Follower
from dataflow.runtime.forecast import duration
from dataflow.runtime.progress import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

WINDOW = 60.0
"""Seconds over which the present rate is taken."""
PATIENCE = 10
"""How many times longer than counting the rows takes, nobody counts them again."""

State = Literal["waiting", "running", "finished", "stopped", "killed"]

_WORDS: dict[State, str] = {
    "waiting": "nothing was run here yet: waiting",
    "running": "running",
    "finished": "finished",
    "stopped": "stopped before its end; the same command goes on where it stopped",
    "killed": "the process is gone without having said why; the same command goes on where it was",
}
_COLOURS: dict[State, str] = {
    "waiting": "yellow",
    "running": "green",
    "finished": "green",
    "stopped": "yellow",
    "killed": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is known of a job at one moment.

    Attributes:
        folder: of the job.
        state: what it does.
        writer: process, host and since when, while one runs.
        steps: how each stands, as ``dataflow status`` says it.
        counted: seconds since the rows were counted.
        rate: images (of a step that scores: answers) per second, over the last minute; None until it can be told.
        mean_rate: the same since the watch began.
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
    writer: dict[str, Any] | None
    steps: Sequence[StepStatus] = ()
    counted: float | None = None
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


def watch(args: argparse.Namespace) -> int:
    """Show frames until the job ends."""
    view = View(Path(args.folder))
    try:
        if args.once:
            view.count()
            _give(view.frame(), as_json=args.json)
        elif args.json or not sys.stdout.isatty():
            _lines(view, args)
        else:
            _live(view, args)
    except KeyboardInterrupt:
        return 0
    return 0


class View:
    """Follows a folder.

    Args:
        folder: of the job; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._followers: dict[Path, Follower] = {}
        self._started = time.monotonic()
        self._rates: deque[tuple[float, int]] = deque()
        self._settled: deque[tuple[float, str, int]] = deque()
        self._steps: list[StepStatus] = []
        self._counted_at: float | None = None
        self._usd_counted = 0.0
        self._usd_seen = 0.0
        self._trouble: str | None = None
        self._stop = threading.Event()

    def count(self) -> None:
        """Count the rows of every step, as ``dataflow status`` does; this may take a while for large tables."""
        try:
            seen = sum(each.usd for each in self._followers.values())
            steps = standing(self.folder) if self._begun() else []
        except (DataflowError, OSError) as error:
            self._trouble = str(error)
            return
        self._steps, self._counted_at, self._trouble = steps, time.monotonic(), None
        self._usd_counted, self._usd_seen = sum(step["usd"] or 0.0 for step in steps), seen
        current = self._current()
        if current is not None and current["pending"] is not None:
            settled = sum(current[name] or 0 for name in ("done", "refused", "failed", "dropped"))
            self._settled.append((time.monotonic(), current["step"], settled))
            while len(self._settled) > 2 and self._settled[-1][0] - self._settled[0][0] > 5 * WINDOW:
                self._settled.popleft()

    def keep_counting(self, interval: float) -> None:
        """Count again and again, in a thread of its own, without getting in the job's way."""

        def run() -> None:
            while not self._stop.is_set():
                began = time.monotonic()
                self.count()
                self._stop.wait(max(interval, PATIENCE * (time.monotonic() - began)))

        threading.Thread(target=run, name="count", daemon=True).start()

    def end(self) -> None:
        """Stop counting."""
        self._stop.set()

    def frame(self) -> Frame:
        """Look at the folder now."""
        for journal in sorted((self.folder / "journal").glob("*/")):
            self._followers.setdefault(journal, Follower(journal)).look()
        now = time.monotonic()
        writer = writer_of(self.folder)
        followers = list(self._followers.values())
        elapsed = now - self._started
        spent = sum(each.usd for each in followers)
        failures: Counter[str] = Counter()
        for each in followers:
            failures.update(each.failures)
        latest = max(followers, key=_written_at, default=None)
        made = latest and (latest.images or latest.ended)
        return Frame(
            folder=str(self.folder),
            state=self._state(writer),
            writer=writer,
            steps=tuple(self._steps),
            counted=None if self._counted_at is None else now - self._counted_at,
            rate=self._rate(now, sum(each.images or each.ended for each in followers)),
            mean_rate=made / elapsed if made and elapsed > 1 else None,
            left=self._left(),
            in_hand=sum(len(each.in_hand) for each in followers) if writer else 0,
            in_jobs=sum(len(each.in_jobs) for each in followers),
            failures=dict(failures.most_common()),
            last=self._last(latest) if latest else (),
            usd=self._usd_counted + spent - self._usd_seen,
            usd_per_hour=spent / elapsed * 3600 if spent and elapsed > 1 else None,
            budget_usd=self._budget(),
            free_bytes=shutil.disk_usage(self.folder).free if self.folder.is_dir() else None,
            trouble=self._trouble,
        )

    def _begun(self) -> bool:
        return (self.folder / JOB_FILE).is_file() or any((self.folder / "journal").glob("*/"))

    def _state(self, writer: dict[str, Any] | None) -> State:
        if writer is not None:
            return "running"
        if not self._begun():
            return "waiting"
        if (self.folder / ".lock.owner").exists():
            return "killed"
        ended = bool(self._steps) and all(step["pending"] == 0 for step in self._steps)
        return "finished" if ended else "stopped"

    def _current(self) -> StepStatus | None:
        """The step that is at work: the first with rows to come."""
        return next((step for step in self._steps if step["pending"]), None)

    def _rate(self, now: float, made: int) -> float | None:
        self._rates.append((now, made))
        while now - self._rates[0][0] > WINDOW:
            self._rates.popleft()
        (before, then), (after, since) = self._rates[0], self._rates[-1]
        return (since - then) / (after - before) if after - before > 0.5 else None

    def _left(self) -> float | None:
        current = self._current()
        if current is None or len(self._settled) < 2:
            return None
        of_step = [(when, settled) for when, step, settled in self._settled if step == current["step"]]
        if len(of_step) < 2 or of_step[-1][1] <= of_step[0][1]:
            return None
        pace = (of_step[-1][1] - of_step[0][1]) / (of_step[-1][0] - of_step[0][0])
        return (current["pending"] or 0) / pace

    def _last(self, follower: Follower) -> list[tuple[str, float]]:
        found = []
        for name in follower.last:
            path = self.folder / "images" / name
            if path.is_file():
                found.append((name, max(0.0, time.time() - path.stat().st_mtime)))
        return found

    def _budget(self) -> float | None:
        try:
            return load_job(self.folder).run.get("budget_usd")
        except DataflowError:
            return None


def _written_at(follower: Follower) -> int:
    return max((path.stat().st_mtime_ns for path in follower.folder.glob("*.jsonl")), default=0)


# What is shown -----------------------------------------------------------------------------------------------------


def _lines(view: View, args: argparse.Namespace) -> None:
    """A line, or an object, at each interval."""
    before = ""
    while True:
        view.count()
        frame = view.frame()
        line = _line(frame)
        if args.json or line != before:
            before = line
            _give(frame, as_json=args.json, short=True)
        if frame.state not in ("running", "waiting"):
            return
        time.sleep(args.interval)


def _live(view: View, args: argparse.Namespace) -> None:
    from rich.live import Live

    view.keep_counting(args.interval)
    try:
        with Live(auto_refresh=False) as screen:
            while True:
                frame = view.frame()
                screen.update(picture(frame), refresh=True)
                if frame.state not in ("running", "waiting") and frame.counted is not None:
                    view.count()
                    screen.update(picture(view.frame()), refresh=True)
                    return
                time.sleep(args.interval)
    finally:
        view.end()


def _give(frame: Frame, *, as_json: bool, short: bool = False) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(frame), ensure_ascii=False), flush=True)
    elif short:
        print(f"{time.strftime('%H:%M:%S')}, {_line(frame)}", flush=True)
    else:
        from rich.console import Console

        Console(highlight=False).print(picture(frame))


def _line(frame: Frame) -> str:
    """The frame on one line."""
    step = next((each for each in frame.steps if each["pending"]), frame.steps[-1] if frame.steps else None)
    parts: list[str] = [frame.state]
    if step is not None:
        parts.append(f"{step['step']}: {_counts(step)}")
    parts += _pace(frame)
    return harmless(", ".join(parts))


def _counts(step: StepStatus) -> str:
    what = "requests" if "counted" in step else "rows"
    settled = sum(step[name] or 0 for name in ("done", "refused", "failed", "dropped"))
    total = "?" if step["rows"] is None else f"{step['rows']:,}"
    lost = [f"{step[name]:,} {name}" for name in ("refused", "failed", "dropped") if step[name]]
    return f"{settled:,} of {total} {what}" + (f" ({', '.join(lost)})" if lost else "")


def _pace(frame: Frame) -> list[str]:
    parts = []
    if frame.state == "running" and frame.rate is not None:
        parts.append(f"{frame.rate:.1f}/s")
    if frame.left is not None and frame.state == "running":
        parts.append(f"{duration(frame.left)} left")
    if frame.in_hand:
        parts.append(f"{frame.in_hand:,} under way")
    if frame.in_jobs:
        parts.append(f"{frame.in_jobs:,} in batch jobs")
    if frame.usd:
        parts.append(_money(frame))
    return parts


def _money(frame: Frame) -> str:
    images = sum(step["images"] or 0 for step in frame.steps)
    text = f"${frame.usd:,.2f} spent"
    if images:
        text += f", ${frame.usd / images:.4f} per image"
    if frame.usd_per_hour and frame.state == "running":
        text += f", ${frame.usd_per_hour:,.2f} an hour"
    return text + (f", budget ${frame.budget_usd:,.2f} a step" if frame.budget_usd else "")


def picture(frame: Frame) -> RenderableType:
    """The frame as rich draws it."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Text(harmless(shown(Path(frame.folder))), style="bold")
    head.append(f"  {_WORDS[frame.state]}", style=_COLOURS[frame.state])
    if frame.writer:
        head.append(
            harmless(f", process {frame.writer['pid']} on {frame.writer['host']} since {frame.writer['since']}")
        )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(width=24)
    table.add_column()
    for step in frame.steps:
        settled = sum(step[name] or 0 for name in ("done", "refused", "failed", "dropped"))
        name = Text(harmless(step["operator"] or step["step"]), style="bold" if step["pending"] else "")
        bar = ProgressBar(total=step["rows"] or 1, completed=settled if step["rows"] else 0, width=24)
        table.add_row(name, bar, Text(_counts(step)))
    lines = [
        " · ".join(_pace(frame)),
        _said("went wrong since the watch began", frame.failures),
        _said("not done in all", _reasons(frame.steps)),
        "" if frame.free_bytes is None else f"{human_bytes(frame.free_bytes)} free on the disk",
        f"the rows were counted {duration(frame.counted)} ago" if frame.counted and frame.counted > 30 else "",
        f"the rows cannot be counted: {frame.trouble}" if frame.trouble else "",
        *(f"{name}  {duration(age)} ago" for name, age in frame.last),
    ]
    return Group(head, table, *(Text(harmless(line)) for line in lines if line))


def _reasons(steps: Sequence[StepStatus]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for step in steps:
        found.update(step["reasons"] or {})
    return dict(found.most_common(8))


def _said(what: str, counts: dict[str, int]) -> str:
    return f"{what}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) if counts else ""
