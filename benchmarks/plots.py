"""Pictures of what RESULTS.md says: ``python -m benchmarks.plots``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import FILE, tables

FOLDER = FILE.with_name("plots")
_OURS, _OTHER, _AIM = "#2563a8", "#9aa5b1", "#c2410c"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One bar for each row of a table.

    Attributes:
        column: of the numbers.
        title: above it.
        unit: below it.
        aim: where a line is drawn.
        ours: rows of which the label holds this are drawn in colour.
        theirs: rows of which the label holds this are not.
        rows: how many rows, from the top; None for all.
        labels: columns that name a row.
    """

    column: int
    title: str
    unit: str
    aim: float | None = None
    ours: str = ""
    theirs: str = "\n"
    rows: int | None = None
    labels: tuple[int, ...] = (0,)

    def draw(self, figure: Any, cells: Sequence[Sequence[str]]) -> None:
        some = [row for row in cells[: self.rows] if number(row[self.column]) is not None]
        axes = figure.subplots()
        labels = [", ".join(row[label] for label in self.labels) for row in some]
        values = [number(row[self.column]) for row in some]
        colours = [_OURS if self.ours in label and self.theirs not in label else _OTHER for label in labels]
        bars = axes.barh(labels, values, color=colours, height=0.6)
        axes.bar_label(bars, labels=[f" {value:,.4g}" for value in values], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        if self.aim is not None:
            axes.axvline(self.aim, color=_AIM, linestyle="--", linewidth=1)
            axes.text(self.aim, -0.55, f"aim {self.aim:g}", color=_AIM, fontsize=9, ha="center", va="bottom")
        axes.set_xlabel(self.unit)
        axes.set_title(self.title, loc="left", pad=16)


_LINES = (
    (1, "orjson alone", _OTHER),
    (2, "null serving", _OURS),
    (4, "filter", "#6aa84f"),
    (5, "run again", "#b45f06"),
)
"""Of the table about growth: column, name, colour."""


class Growth:
    """Time and memory over the rows, both axes of time in powers of ten."""

    def draw(self, figure: Any, cells: Sequence[Sequence[str]]) -> None:
        rows = [number(row[0]) for row in cells]
        time, memory = figure.subplots(1, 2)
        for column, label, colour in (
            (1, "orjson alone", _OTHER),
            (2, "null serving", _OURS),
            (4, "filter", "#6aa84f"),
            (5, "run again", "#b45f06"),
        ):
            time.plot(rows, [number(row[column]) for row in cells], marker="o", label=label, color=colour)
        time.set_xscale("log")
        time.set_yscale("log")
        time.set_xlabel("rows")
        time.set_ylabel("seconds")
        time.legend(frameon=False, fontsize=9)
        time.set_title("Time", loc="left")
        memory.plot(rows, [number(row[6]) for row in cells], marker="o", color=_OURS)
        memory.axhline(500, color=_AIM, linestyle="--", linewidth=1)
        memory.text(rows[0], 508, "aim: under 500 MB", color=_AIM, fontsize=9)
        memory.set_xscale("log")
        memory.set_ylim(0, 560)
        memory.set_xlabel("rows")
        memory.set_ylabel("MB")
        memory.set_title("Peak memory", loc="left")


PLOTS: dict[str, tuple[str, Bars | Growth]] = {
    "How much slower is a run than a bare diffusers loop?": (
        "overhead",
        Bars(column=1, title="A run beside a bare diffusers loop", unit="seconds, median", ours="this", rows=2),
    ),
    "How soon does a run of 1,000,000 rows go on when 999,000 are done?": (
        "resume",
        Bars(column=2, title="Going on over a million finished rows", unit="seconds, whole run"),
    ),
    "How do time and memory grow with the rows?": ("growth", Growth()),
    "How close does a Ray cluster come to the time that its work takes?": (
        "ray",
        Bars(
            column=4,
            title="Ray: share of the ideal time, 20 ms a picture",
            unit="share of the ideal",
            aim=0.9,
            ours="Ray",
        ),
    ),
    "What does an API cost with 1,000 requests in flight?": (
        "api",
        Bars(
            column=2,
            title="Images per second with 1,000 requests in flight",
            unit="images/s",
            ours="this project",
            labels=(0, 1),
        ),
    ),
    "How fast is CLIP scoring beside a bare transformers loop?": (
        "scoring",
        Bars(column=1, title="CLIP scoring of 192 pictures", unit="seconds", ours="this project", rows=3),
    ),
    "How fast is an export beside a plain tar of the same files?": (
        "export",
        Bars(column=3, title="Writing a dataset of 100,000 pictures", unit="MB/s", theirs="plain tar"),
    ),
    "How fast are packs?": (
        "packs",
        Bars(column=1, title="Packing, unpacking, reading at random", unit="MB/s", ours="pack", theirs="plain tar"),
    ),
}
"""File and kind of the picture, by the question it answers."""


def number(text: str) -> float | None:
    """The first number in a cell, without its separators of thousands; None if it holds none."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[0].replace(",", "")) if found else None


def files() -> dict[str, str]:
    """The file of each question's picture, as RESULTS.md names it."""
    return {question: f"{FOLDER.name}/{name}.png" for question, (name, _) in PLOTS.items()}


def draw(text: str, folder: Path = FOLDER) -> list[Path]:
    """Draw what a file of results says.

    Args:
        text: of the file.
        folder: gets the pictures.

    Returns:
        Their files.
    """
    folder.mkdir(exist_ok=True)
    found = tables(text)
    drawn = []
    for question, (name, plot) in PLOTS.items():
        if question in found:
            path = folder / f"{name}.png"
            _save(path, plot.draw, found[question], wide=isinstance(plot, Growth))
            drawn.append(path)
    return drawn


def _save(path: Path, drawing: Callable[[Any, Any], None], cells: list[list[str]], *, wide: bool) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2 if wide else 1.1 + 0.45 * len(cells)), layout="constrained", dpi=110)
        drawing(figure, cells)
        # Without a date and a version the same figures give the same file.
        figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    for file in draw(FILE.read_text(encoding="utf-8")):
        print(file)
