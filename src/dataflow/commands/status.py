"""``status``: what became of the rows of a job's folder, read without the lock and without a model."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from dataflow import config as configuration
from dataflow.commands.folder import JOB_FILE, load_job, offline, shown
from dataflow.config import Job
from dataflow.errors import ConfigError, InputError
from dataflow.runtime.journal import Journal, journal_files
from dataflow.runtime.lock import is_alive
from dataflow.runtime.progress import human_bytes, spending
from dataflow.runtime.sharing import drivers
from dataflow.runtime.survey import survey
from dataflow.runtime.table import journal_folder, load_summary
from dataflow.runtime.tally import SETTLED
from dataflow.types import Plan
from dataflow.utils.storage import FileStorage

StepStatus = dict[str, Any]
"""What is printed of one step; a figure is None where nothing tells it."""

FIGURES = ("rows", *SETTLED, "pending", "images", "bytes", "usd", "unpriced", "written")


def status(args: argparse.Namespace) -> int:
    """Print the sums."""
    folder = Path(args.folder)
    steps = standing(folder)
    writer = writer_of(folder)
    usd, kept = sum(step["usd"] or 0.0 for step in steps), steps[-1]["done"]
    if args.json:
        sums = {"usd": usd, "usd_per_kept_row": usd / kept if kept else None}
        facts = {"folder": str(folder), "running": writer, "steps": steps, **sums}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    print(f"{shown(folder)}: {_running(writer)}")
    for step in steps:
        print(_described(step))
    if usd and kept and len(steps) > 1:
        print(f"all steps: ${usd:,.4f} spent, ${usd / kept:.4f} for each of the {kept} rows kept in the end")
    return 0


def standing(folder: Path) -> list[StepStatus]:
    """How every step of a job stands.

    Raises:
        DataflowError: the folder holds no job, or its tables cannot be read.
    """
    return list(_steps_of_job(folder) if (folder / JOB_FILE).is_file() else _steps_of_journals(folder))


def _steps_of_job(folder: Path) -> Iterator[StepStatus]:
    """The steps that the folder's pipeline file describes, also those that have not begun."""
    config = load_job(folder)
    job = configuration.build(offline(config))
    job.storage.reset()
    before: StepStatus = {}
    multiplied = False
    for plan in job.pipeline.plans():
        job.storage.step()
        before = _step(folder, job, plan, before, multiplied)
        multiplied = plan.multiplies
        yield before


def _step(folder: Path, job: Job, plan: Plan, before: StepStatus, multiplied: bool) -> StepStatus:
    """How a step stands; ``multiplied`` if the step before it makes several rows of one."""
    storage = job.storage
    journal = journal_folder(storage)
    known = load_summary(journal)
    begun = journal.is_dir()
    facts = {"step": storage.step_name, "operator": plan.name, "table": None}
    if known and _is_current(known, journal, storage, folder):
        return facts | _figures(known) | {"table": known["output"]}
    unknown = bool(before) and before["pending"] is None and "counted" not in before
    if before and (before["pending"] or unknown or not storage.input_path.exists()):
        # The table this step reads is not written yet: all of its rows are still to come.
        rows = None if before["rows"] is None or multiplied else before["rows"] - before["dropped"]
        return facts | dict.fromkeys(FIGURES, 0) | {"rows": rows, "pending": rows, "reasons": {}}
    if plan.serving is None:
        rows = storage.count_rows()
        return facts | dict.fromkeys(FIGURES, 0) | {"rows": rows, "pending": rows, "reasons": {}}
    try:
        summary = survey(plan, plan.serving, storage)
    except ConfigError:
        if not begun:
            raise
        return facts | _of_journal(journal)  # the model is gone, so its requests cannot be told from others
    return facts | {name: getattr(summary, name) for name in (*FIGURES, "reasons")}


def _is_current(known: dict[str, Any], journal: Path, storage: FileStorage, folder: Path) -> bool:
    """Whether the sum that the last run left still says how things stand."""
    try:
        written = (journal / "summary.json").stat().st_mtime_ns
        inputs = [storage.input_path, folder / JOB_FILE, *journal_files(journal)]
        table = storage.output_path.stat()
        return (
            known.get("output") == str(storage.output_path)
            and known["output_signature"] == [table.st_size, table.st_mtime_ns]
            and all(path.stat().st_mtime_ns <= written for path in inputs)
        )
    except (OSError, KeyError):
        return False


def _steps_of_journals(folder: Path) -> Iterator[StepStatus]:
    """The steps of a folder that a script wrote: their last sums, or what their journals say of requests."""
    journals = sorted(path for path in (folder / "journal").glob("*") if path.is_dir())
    if not journals:
        load_job(folder)  # says what is wrong with it
        raise InputError("nothing was run in it yet", path=folder)
    for journal in journals:
        known = load_summary(journal)
        facts = {"step": journal.name, "operator": known and known["operator"], "table": known and known["output"]}
        newer = (
            any(
                path.stat().st_mtime_ns > (journal / "summary.json").stat().st_mtime_ns
                for path in journal_files(journal)
            )
            if known
            else True
        )
        yield facts | (_of_journal(journal, known) if newer or known is None else _figures(known))


def _of_journal(journal: Path, known: dict[str, Any] | None = None) -> StepStatus:
    """Figures of requests instead of rows, marked as such; pending follows from the input table where it is known."""
    index = Journal(journal).load()
    endings = list(index.endings.values())
    reasons: dict[str, int] = {}
    for ending in endings:
        reasons[ending.reason] = reasons.get(ending.reason, 0) + 1
    refused = sum(ending.status == "refused" for ending in endings)
    done = len(index.packed)
    sums = [index.sums(key) for key in index.packed]
    rows = None
    if known:
        try:
            rows = FileStorage(known["input"]).step().count_rows()
        except (InputError, ConfigError):
            rows = None
    return {
        "rows": rows,
        "done": done,
        "refused": refused,
        "failed": len(endings) - refused,
        "dropped": 0,
        "pending": None if rows is None else max(0, rows - done - len(endings)),
        "images": sum(count for count, _ in sums),
        "bytes": sum(size for _, size in sums),
        "usd": index.usd,
        "unpriced": index.unpriced,
        "reasons": reasons,
        "written": None,
        "counted": "requests",
    }


def _figures(known: dict[str, Any]) -> StepStatus:
    return {name: known.get(name) for name in (*FIGURES, "reasons")}


# Words -------------------------------------------------------------------------------------------------------------


def writer_of(folder: Path) -> dict[str, Any] | None:
    """Who writes to the folder now, as its lock says."""
    owner = owner_of(folder)
    return owner if owner and lives(owner) else None  # a process that was killed leaves its name behind


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Who took the folder's lock last and did not give it back: process, host and since when.

    Of several that share the folder, one, with the number of the others.
    """
    if together := drivers(folder):
        return {**together[0], "others": len(together) - 1}
    try:
        owner = orjson.loads((folder / ".lock.owner").read_bytes())
        return {"pid": int(owner["pid"]), "host": str(owner["host"]), "since": str(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lives(owner: dict[str, Any]) -> bool:
    """Whether the process is there; one on another host is taken to be."""
    return owner["host"] != socket.gethostname() or is_alive(owner["pid"])


def _rows_written(step: StepStatus) -> str:
    """How many rows the table has, where a row became several."""
    more = step["written"] and step["rows"] is not None and step["written"] > step["rows"] - step["dropped"]
    return f" ({step['written']} rows)" if more else ""


def _running(writer: dict[str, Any] | None) -> str:
    if writer is None:
        return "not running"
    others = f" and {writer['others']} more" if writer.get("others") else ""
    return f"running, process {writer['pid']} on {writer['host']} since {writer['since']}{others}"


def _described(step: StepStatus) -> str:
    title = step["step"] + (f" ({step['operator']})" if step["operator"] else "")
    names = ["done", "refused", "failed", *(["dropped"] if step["dropped"] else []), "pending"]
    parts = " + ".join(f"{'?' if step[name] is None else step[name]} {name}" for name in names)
    rows = "?" if step["rows"] is None else step["rows"]
    lines = [title]
    if "counted" in step:
        lines.append(f"  {rows} rows; requests: {parts}")
    else:
        lines.append(f"  {rows} rows = {parts}")
    if step["reasons"]:
        reasons = sorted(step["reasons"].items(), key=lambda item: -item[1])
        lines.append("  not done, by reason: " + ", ".join(f"{reason} {count}" for reason, count in reasons))
    lines.append(f"  {step['images']} images ({human_bytes(step['bytes'])})")
    if step["usd"] or step["unpriced"]:
        lines.append(f"  {spending(step['usd'], step['unpriced'], step['images'])}")
    lines.append(f"  table: {shown(Path(step['table'])) + _rows_written(step) if step['table'] else 'not written yet'}")
    return "\n".join(lines)
