"""The sums of a report: what became of the rows, what each step cost, what went wrong and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dataflow.errors import ConfigError, InputError
from dataflow.report.entries import Entry
from dataflow.report.rows import RunReader
from dataflow.report.runs import Run, Step
from dataflow.runtime.budget import dollars_of
from dataflow.runtime.journal import Journal
from dataflow.utils.storage import FileStorage

_EXAMPLES = 3
_MODEL_KEYS = ("hf_model_name_or_path", "model_name", "model", "rubric", "type")


class Prices:
    """What each request of a run took, from its journals.

    Args:
        run: whose.

    Attributes:
        seconds: by step, the time that its requests took together, over all runs.
        usd: by step, US dollars.
        requests: by step, how many were answered.
        torn: damaged records that were skipped.
    """

    def __init__(self, run: Run) -> None:
        self.seconds: Counter[int] = Counter()
        self.usd: dict[int, float] = {}
        self.requests: Counter[int] = Counter()
        self.torn = 0
        self._of: dict[bytes, tuple[float | None, float | None]] = {}
        for step in run.steps:
            self._read(step)

    def of(self, name: str) -> tuple[float | None, float | None]:
        """Seconds and US dollars of a picture by the stem of its file; None where nothing tells."""
        try:
            return self._of.get(bytes.fromhex(name.partition("_")[0]), (None, None))
        except ValueError:
            return None, None

    def _read(self, step: Step) -> None:
        if not step.journal.is_dir():
            return
        for record in Journal(step.journal).records():
            if record is None:
                self.torn += 1
                continue
            usage = record.get("usage")
            usd = dollars_of(usage) if isinstance(usage, Mapping) and usage else None
            if usd is not None:
                self.usd[step.number] = self.usd.get(step.number, 0.0) + usd
            if record.get("s") != "done":
                continue
            took = record.get("ms")
            seconds = took / 1000 if isinstance(took, int | float) else None
            self.seconds[step.number] += seconds or 0.0  # type: ignore[assignment] - a Counter adds floats as well
            self.requests[step.number] += 1
            if record.get("img") and (seconds is not None or usd is not None):
                self._of[bytes.fromhex(record["k"])] = seconds, usd


def run_facts(run: Run, reader: RunReader, prices: Prices, samples: Sequence[int]) -> dict[str, Any]:
    """What the page shows of a run as a whole."""
    tally = reader.tally
    steps = [_step_facts(step, prices) for step in run.steps]
    first = next((step["rows"] for step in steps if step["rows"] is not None), None)
    gained = sum(step["gained"] for step in steps)
    lost = sum(tally.rows.values())
    rows = tally.kept + lost - gained if first is None else first
    missing = rows + gained - tally.kept - lost
    return {
        "name": run.name,
        "folder": str(run.folder),
        "finished": run.finished,
        "steps": steps,
        "rows": rows,
        "gained": gained,
        "kept": tally.kept if run.finished else 0,
        "so_far": tally.kept,
        # What is neither kept nor lost waits for a step that has not finished; in a finished run there is none of it.
        "pending": 0 if run.finished else max(0, missing + tally.kept),
        "unaccounted": missing if run.finished else min(0, missing + tally.kept),
        "losses": _losses(tally.rows),
        "pictures": {
            "made": [[step, count] for step, count in sorted(tally.made.items())],
            "kept": tally.kept_pictures,
            "losses": _losses(tally.pictures),
        },
        "usd": sum(step["usd"] for step in steps),
        "unpriced": sum(step["unpriced"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "samples": list(samples),
        "torn": prices.torn,
    }


def _losses(counts: Mapping[tuple[int, str, str], int]) -> list[list[Any]]:
    """[step, state, reason, count], the first step first, the most frequent reason first."""
    return [[*key, count] for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))]


def _step_facts(step: Step, prices: Prices) -> dict[str, Any]:
    known = step.summary
    counts = {name: int(known.get(name) or 0) for name in ("done", "refused", "failed", "dropped", "pending", "images")}
    rows = int(known["rows"]) if isinstance(known.get("rows"), int) else _count(step)
    broken = sum(int((known.get("reasons") or {}).get(reason, 0)) for reason in ("bad_row", "reserved_column"))
    gained = max(0, int(known.get("written") or 0) - (rows or 0) + counts["dropped"] + broken)
    begun = bool(known) or prices.requests[step.number] > 0
    return {
        "number": step.number,
        "name": step.name,
        "operator": step.operator or step.name,
        "model": next((str(step.serving[key]) for key in _MODEL_KEYS if step.serving.get(key)), ""),
        "score": str(step.settings.get("output_key") or ""),
        "thresholds": step.thresholds,
        "rows": rows,
        **counts,
        "gained": gained if step.table is not None else 0,
        "reasons": known.get("reasons") or {},
        "finished": step.table is not None,
        "begun": begun,
        "folds_only": step.folds_only,
        "seconds": float(known.get("seconds_in_all") or known.get("seconds") or 0.0),
        "request_seconds": prices.seconds[step.number],
        "requests": prices.requests[step.number],
        "usd": float(known["usd"]) if "usd" in known else prices.usd.get(step.number, 0.0),
        "unpriced": int(known.get("unpriced") or 0),
    }


def _count(step: Step) -> int | None:
    if step.source is None:
        return None
    try:
        return FileStorage(str(step.source)).step().count_rows()
    except (InputError, ConfigError):
        return None


def problems_of(
    problems: dict[tuple[Any, ...], dict[str, Any]],
    at: int,
    number: int,
    run: Run,
    entry: Entry,
    unreadable: tuple[str, str] | None,
    lacking: Sequence[tuple[str, str, str]],
) -> None:
    """Count what is wrong with an entry, by kind and reason, with a few examples of each.

    Args:
        problems: the counts, added to.
        at: number of the entry.
        number: of its run.
        run: its run.
        entry: itself.
        unreadable: why its picture cannot be read, or None.
        lacking: scores that it should have: (score, status, error).
    """
    found: list[tuple[str, int, str, str]] = []
    if entry.state in ("refused", "failed", "dropped", "incomplete", "waiting"):
        found.append((entry.state, entry.step, entry.reason, entry.message))
    if unreadable is not None:
        found.append(("unreadable", entry.made, *unreadable))
    found += [("unscored", 0, f"{score}: {status}", error) for score, status, error in lacking]
    for kind, step, reason, message in found:
        key = (number, kind, step, reason)
        if key not in problems:
            operator = next((each.operator for each in run.steps if each.number == step), "")
            problems[key] = {
                "run": number,
                "kind": kind,
                "step": step,
                "operator": operator,
                "reason": reason or kind,
                "count": 0,
                "pictures": 0,
                "first": [],
                "messages": [],
            }
        group = problems[key]
        group["count"] += 1
        group["pictures"] += entry.path is not None
        if len(group["first"]) < 12:
            group["first"].append(at)
        if message and len(group["messages"]) < _EXAMPLES and message[:400] not in group["messages"]:
            group["messages"].append(message[:400])
