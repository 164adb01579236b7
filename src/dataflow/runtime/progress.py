"""What a person sees while a step runs: one line in a terminal or notebook, nothing elsewhere, the sum at the end."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from dataflow.runtime.tally import Tally, add_up
from dataflow.types import Summary

REFRESH_SECONDS = 0.2


class Progress:
    """A bar over rows, with images per second, time left and failures beside it.

    Args:
        name: the operator's.
        total: rows in the table, if known.
        show: True or False; None shows it in terminals and notebooks only.
    """

    def __init__(self, name: str, total: int | None, show: bool | None) -> None:
        self._tally, self._before = Tally(), Summary()
        self._name, self._total = name, total
        self._show = _interactive() if show is None else show
        self._bar = None
        self._shown = 0
        self._refreshed = 0.0
        self._started: tuple[float, int, int] | None = None

    def __enter__(self) -> Progress:
        if self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._name,
                unit="row",
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"
                if self._total
                else "{desc}: {n_fmt} rows{postfix}",
            )
        return self

    def follow(self, tally: Tally, before: Summary) -> None:
        """From now on show this one, with what was counted before."""
        self._tally, self._before = tally, before

    def update(self) -> None:
        """Show the tally as it is now; cheap enough to be called for every request."""
        now = time.monotonic()
        if self._bar is None or now - self._refreshed < REFRESH_SECONDS:
            return
        counted = add_up("", (self._before, self._tally.summary("", self._tally.planned, 0.0)), 0.0)
        settled = counted.rows - counted.pending
        self._refreshed = now
        if self._started is None:
            # The clock starts with the first image: what was done before says nothing about the rate.
            self._started = (now, settled, counted.made)
        start, first, made = self._started
        postfix = _postfix(counted, now - start, settled - first, counted.made - made, self._total)
        if self._tally.in_jobs:
            postfix += f", {self._tally.in_jobs} in batch jobs"
        self._bar.set_postfix_str(postfix.removeprefix(", "), refresh=False)
        self._bar.update(settled - self._shown)
        self._bar.refresh()
        self._shown = settled

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._refreshed = 0.0
            self.update()
            self._bar.close()


def describe(summary: Summary) -> str:
    """The sum in words, one or a few lines."""
    parts = [f"{summary.done} done", f"{summary.refused} refused", f"{summary.failed} failed"]
    if summary.dropped:
        parts.append(f"{summary.dropped} dropped")
    parts.append(f"{summary.pending} pending")
    lines = [f"{summary.step}: {summary.rows} rows = {' + '.join(parts)}"]
    if summary.reasons:
        lines.append("  not done, by reason: " + ", ".join(f"{name} {n}" for name, n in summary.reasons.items()))
    speed = f", {summary.made / summary.seconds:.1f} images/s" if summary.made and summary.seconds else ""
    adopted = f", {summary.adopted} adopted" if summary.adopted else ""
    if summary.images or not summary.done + summary.dropped:
        lines.append(
            f"  {summary.images} images ({human_bytes(summary.bytes)}); this run made {summary.made}{adopted}"
            f" in {summary.seconds:.1f} s{speed}"
        )
    else:  # a step that scores or filters
        lines.append(f"  in {summary.seconds:.1f} s")
    if summary.usd or summary.unpriced:
        lines.append(f"  {spending(summary.usd, summary.unpriced, summary.images)}")
    if summary.output:
        written = f" ({summary.written} rows)" if summary.written > summary.rows - summary.dropped else ""
        lines.append(f"  table: {summary.output}{written}")
    return "\n".join(lines)


def spending(usd: float, unpriced: int, images: int) -> str:
    """What was spent in all, and for each image there is."""
    parts = [f"${usd:,.4f} spent"]
    if images and usd:
        parts.append(f"${usd / images:.4f} per image")
    if unpriced:
        parts.append(f"{unpriced} calls at an unknown price")
    return ", ".join(parts)


def human_bytes(count: float) -> str:
    """``1536`` as ``1.5 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _postfix(counted: Summary, elapsed: float, settled: int, made: int, total: int | None) -> str:
    parts: list[str] = []
    if elapsed > 0 and made:
        parts.append(f"{made / elapsed:.2f} images/s")
        if total and settled:
            left = int((total - counted.rows + counted.pending) * elapsed / settled)
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
    if counted.usd:
        each = f" (${counted.usd / counted.images:.4f} per image)" if counted.images else ""
        parts.append(f"${counted.usd:,.2f}{each}")
    parts += [f"{count} {name}" for name, count in (("refused", counted.refused), ("failed", counted.failed)) if count]
    return ", ".join(parts)


def _interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
