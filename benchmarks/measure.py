"""What the benchmarks share: a table of results, and a program run in a process of its own with its cost."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field


@dataclass
class Result:
    """One question's answer.

    Attributes:
        question: what was asked.
        columns: headings.
        rows: cells.
        aim: what we want the figure to be.
        notes: how it was measured, and what to keep in mind.
        plot: the file of a picture of it, beside RESULTS.md.
    """

    question: str
    columns: list[str]
    rows: list[list[str]]
    aim: str = ""
    notes: list[str] = field(default_factory=list)
    plot: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.question}", ""]
        if self.aim:
            lines += [f"Aim: {self.aim}.", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += ["", *([f"![{self.question}]({self.plot})", ""] if self.plot else [])]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"


def spread(values: list[float], unit: str = "", digits: int = 3) -> str:
    """Median and range of repeated measurements, as text."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


def run_python(code: str, *arguments: str) -> dict[str, float]:
    """Run code in a new interpreter; it prints one JSON object as its last line. Adds ``peak_mb`` of that process."""
    # Not getrusage: its maximum is handed down from the process that started this one.
    peak = "next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))"
    program = f"{code}\nprint(int({peak}) / 1024)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {**json.loads(done[-2]), "peak_mb": float(done[-1])}
