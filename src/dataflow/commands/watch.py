"""``watch``: a job as it runs, seen from another terminal. Reads only, without the lock."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataflow.commands.folder import shown
from dataflow.commands.status import StepStatus
from dataflow.commands.watch_view import Frame, State, View, settled
from dataflow.errors import harmless
from dataflow.runtime.forecast import duration
from dataflow.runtime.progress import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

SILENCE = 60.0
"""Seconds without a record after which that is said."""
ENDING = 0.3
"""Seconds between two looks at a job of which it is not known yet how it ended."""
BAR = 24
"""Columns of a step's bar."""

_WORDS: dict[State, str] = {
    "waiting": "nothing was made here yet: waiting",
    "running": "running",
    "ended": "no process is at work any more",
    "finished": "finished",
    "stopped": "stopped before its end; the same command goes on where it stopped",
    "killed": "the process is gone without having said why; the same command goes on where it was",
}
_COLOURS: dict[State, str] = {
    "waiting": "yellow",
    "running": "green",
    "ended": "yellow",
    "finished": "green",
    "stopped": "yellow",
    "killed": "red",
}
_PARTS = {"done": ("green", "━"), "refused": ("yellow", "╍"), "failed": ("red", "╳"), "dropped": ("blue", "┄")}
_PLAIN = {"━": "=", "╍": "r", "╳": "x", "┄": "-"}


def watch(args: argparse.Namespace) -> int:
    """Show frames until the job ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that the terminal cannot show is no reason to stop
    view = View(Path(args.folder))
    try:
        if args.once:
            _give(_once(view), as_json=args.json)
        elif args.json:
            _follow(view, args.interval, lambda frame: _give(frame, as_json=True))
        elif not sys.stdout.isatty():
            _follow(view, args.interval, _Lines())
        else:
            _live(view, args.interval)
    except KeyboardInterrupt:
        return 0
    return 0


def _once(view: View) -> Frame:
    while True:
        view.count()
        frame = view.frame()
        if frame.final or frame.state in ("waiting", "running"):
            return frame
        time.sleep(ENDING)  # it has ended just now


def _follow(view: View, interval: float, show: Callable[[Frame], None]) -> None:
    """Show a frame at each interval, until the job is over."""
    view.keep_counting(interval)
    try:
        while True:
            frame = view.frame()
            show(frame)
            if frame.final:
                return
            known = frame.state in ("waiting", "running")
            time.sleep(interval if known else min(interval, ENDING))
    finally:
        view.end()


def _live(view: View, interval: float) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as screen:
        console = screen.console

        def show(frame: Frame) -> None:
            drawn = picture(frame, width=console.width, plain=console.options.ascii_only)
            screen.update(drawn, refresh=True)

        _follow(view, interval, show)


class _Lines:
    """Prints a frame on one line, with the time, unless it is the line before."""

    def __init__(self) -> None:
        self._before = ""

    def __call__(self, frame: Frame) -> None:
        line = _line(frame)
        if line != self._before:
            self._before = line
            print(f"{time.strftime('%H:%M:%S')}, {line}", flush=True)


def _give(frame: Frame, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(frame), ensure_ascii=False), flush=True)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(picture(frame, width=console.width, plain=console.options.ascii_only))


# Words -------------------------------------------------------------------------------------------------------------


def _line(frame: Frame) -> str:
    """The frame on one line."""
    named = [each for each in frame.steps if each["step"] == frame.at_work]
    steps = named or [each for each in frame.steps if each["pending"]] or frame.steps[-1:]
    parts: list[str] = [frame.state]
    if steps:
        parts.append(f"{steps[0]['step']}: {_counts(steps[0], _ahead(frame, steps[0]))}")
    return harmless(", ".join([*parts, *_pace(frame), *filter(None, [_money(frame)]), *_notes(frame)]))


def _ahead(frame: Frame, step: StepStatus) -> int:
    return frame.ahead if step["step"] == frame.at_work else 0


def _counts(step: StepStatus, ahead: int = 0) -> str:
    what = "requests" if "counted" in step else "rows"
    about = "about " if ahead else ""
    total = "?" if step["rows"] is None else f"{step['rows']:,}"
    lost = [f"{step[name]:,} {name}" for name in ("refused", "failed", "dropped") if step[name]]
    return f"{about}{settled(step) + ahead:,} of {total} {what}" + (f" ({', '.join(lost)})" if lost else "")


def _pace(frame: Frame) -> list[str]:
    parts = []
    running = frame.state == "running"
    if running and frame.rate is not None:
        parts.append(_rate(frame.rate, frame.unit))
        mean = None if frame.mean_rate is None else _rate(frame.mean_rate, frame.unit)
        if mean not in (None, parts[-1]):
            parts[-1] += f" ({mean} since the watch began)"
    if frame.left is not None and running:
        parts.append(f"{duration(frame.left)} left" + (" in this step" if len(frame.steps) > 1 else ""))
    if frame.in_hand:
        parts.append(f"{frame.in_hand:,} under way")
    if frame.in_jobs:
        parts.append(f"{frame.in_jobs:,} in batch jobs")
    return parts


def _rate(per_second: float, unit: str) -> str:
    """``0.02`` images per second as ``1.2 images/min``."""
    for each, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1 or not per_second:
            return f"{per_second * seconds:,.1f} {unit}/{each}"
    return f"{per_second * 3600:,.1f} {unit}/h"


def _money(frame: Frame) -> str:
    if not frame.usd:
        return ""
    images = sum(step["images"] or 0 for step in frame.steps)
    text = f"${frame.usd:,.2f} spent"
    if images:
        text += f", ${frame.usd / images:.4f} per image"
    if frame.usd_per_hour and frame.state == "running":
        text += f", ${frame.usd_per_hour:,.2f} an hour"
    return text + (f", budget ${frame.budget_usd:,.2f} a step" if frame.budget_usd else "")


def _notes(frame: Frame) -> list[str]:
    """What a person should know about the figures."""
    notes = []
    if frame.state == "running" and frame.silent is not None and frame.silent > SILENCE:
        notes.append(f"no record was written for {duration(frame.silent)}")
    if frame.trouble:
        notes.append(f"the rows cannot be counted: {frame.trouble}")
    elif frame.state != "waiting" and frame.counted is None:
        notes.append("the rows are being counted")
    elif frame.counted is not None and frame.counted > SILENCE and not frame.final:
        notes.append(f"the rows were counted {duration(frame.counted)} ago")
    return notes


def _reasons(steps: Sequence[StepStatus]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for step in steps:
        found.update(step["reasons"] or {})
    return dict(found.most_common(8))


def _said(what: str, counts: dict[str, int]) -> str:
    return f"{what}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) if counts else ""


def _disk(frame: Frame) -> str:
    images = sum(step["images"] or 0 for step in frame.steps)
    parts = [f"{images:,} images, {human_bytes(sum(step['bytes'] or 0 for step in frame.steps))}"] if images else []
    if frame.free_bytes is not None:
        parts.append(f"{human_bytes(frame.free_bytes)} free on the disk")
    return "; ".join(parts)


# What is drawn -----------------------------------------------------------------------------------------------------


def picture(frame: Frame, *, width: int = 100, plain: bool = False) -> RenderableType:
    """The frame as rich draws it.

    Args:
        frame: what is drawn.
        width: columns of the terminal.
        plain: draw with ASCII characters.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text(harmless(shown(Path(frame.folder))), style="bold")
    head.append(f"  {_WORDS[frame.state]}", style=_COLOURS[frame.state])
    if frame.writer:
        head.append(
            harmless(f", process {frame.writer['pid']} on {frame.writer['host']} since {frame.writer['since']}"),
            style="not bold",
        )
    steps = [
        (
            Text(harmless(step["operator"] or step["step"]), style="bold" if step["pending"] else ""),
            _bar(step, _ahead(frame, step), plain=plain),
            Text(_counts(step, _ahead(frame, step))),
        )
        for step in frame.steps
    ]
    taken = max((name.cell_len + counts.cell_len for name, _, counts in steps), default=0) + BAR + 4
    table = Table.grid(padding=(0, 2))
    for name, bar, counts in steps:
        if taken <= width:
            table.add_row(name, bar, counts)
        else:  # one below the other
            table.add_row(name)
            table.add_row(Text.assemble(bar, "  ", counts))
    lines = [
        (", " if plain else " · ").join(_pace(frame)),
        _money(frame),
        _said("not done in all", _reasons(frame.steps)),
        _said("since the watch began", frame.failures) if frame.state == "running" else "",
        _disk(frame),
        *_notes(frame),
        *(f"{name}  {duration(age)} ago" for name, age in frame.last),
    ]
    return Group(head, table, *(Text(harmless(line)) for line in lines if line))


def _bar(step: StepStatus, ahead: int, *, plain: bool) -> Text:
    """Done, refused, failed and dropped rows in their proportions, and space for the pending ones."""
    from rich.text import Text

    counts = {name: step[name] or 0 for name in _PARTS}
    counts["done"] += ahead
    sizes = _shares([*counts.values(), max(0, (step["rows"] or 1) - sum(counts.values()))], BAR)
    bar = Text(no_wrap=True)
    for (colour, sign), size in zip(_PARTS.values(), sizes, strict=False):
        bar.append((_PLAIN[sign] if plain else sign) * size, style=colour)
    return bar.append(("." if plain else "─") * sizes[-1], style="bright_black")


def _shares(counts: Sequence[int], width: int) -> list[int]:
    """The counts in proportion as whole numbers that add up to ``width``; what is there at all gets 1 at least."""
    total = sum(counts) or 1
    sizes = [max(1, round(width * count / total)) if count else 0 for count in counts]
    sizes[sizes.index(max(sizes))] += width - sum(sizes)
    return sizes
