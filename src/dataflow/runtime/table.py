"""The end of a step: rows and outcomes folded, in input order, into the step's table."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataflow.errors import InputError, StepError
from dataflow.runtime.planner import Planner, checked_rows
from dataflow.runtime.tally import SETTLED, Tally, worst
from dataflow.types import BadRow, Drop, Forecast, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage, TableWriter
from dataflow.utils.tables import MARK

logger = logging.getLogger(__name__)

Entry = tuple[Row | BadRow, Sequence[Outcome]]


def journal_folder(storage: FileStorage) -> Path:
    """Where the step's journal lies."""
    return Path(storage.cache_path) / "journal" / storage.step_name


def write(
    plan: Plan, storage: FileStorage, planner: Planner, signature: Mapping[str, Any], seconds: float, **facts: object
) -> Summary:
    """Write the step's table once all requests have ended; nothing is written if nothing changed.

    Args:
        plan: the step.
        storage: at the step, or a part of its table.
        planner: knows what every row asked for.
        signature: of the input table when the step began.
        seconds: the step took so far.
        facts: further JSON values to keep with the sum.

    Raises:
        StepError: the input table changed while the step ran.
    """
    tally = planner.tally
    store = planner.serving.image_io
    place = store.path("") if store else ""
    basis = [plan.name, plan.outputs, plan.folding, storage.content_signature(), place]
    state = hashlib.sha256(json.dumps(basis, sort_keys=True).encode())
    state.update(planner.book.keys)
    state.update(planner.book.counts.tobytes())
    state.update(repr(sorted(planner.index.endings.items())).encode(errors="replace"))
    state.update(repr(sorted(planner.book.errors.items())).encode(errors="replace"))
    digest = state.hexdigest()
    known = load_summary(journal_folder(storage)) or {}
    output = storage.output_path
    unchanged = (
        known.get("state") == digest and known.get("output_signature") == signature_of(output) and "written" in known
    )
    entries = _entries(storage, planner)
    if unchanged:
        tally.counts.update({name: known[name] - tally.counts[name] for name in SETTLED})
        tally.reasons.clear()
        tally.reasons.update(known["reasons"])
        tally.written = known["written"]
    else:
        keep_other_table(plan, storage, known)
        tally.recount()
        _write_entries(plan, storage, tally, entries, signature)
    summary = tally.summary(storage.step_name, tally.planned, seconds)
    summary.output = str(output)
    save_summary(plan, storage, summary, state=digest, **facts)
    return summary


def write_joined(plan: Plan, storage: FileStorage, parts: Sequence[FileStorage], summary: Summary, state: str) -> None:
    """Write the step's table from those of its parts, unless it is there already.

    Args:
        plan: the step.
        storage: at the step.
        parts: of its table, in order; each has its own table.
        summary: of all of them; its ``output`` is set.
        state: stands for all that the table was made from.

    Raises:
        StepError: a table cannot be read or written.
    """
    known = load_summary(journal_folder(storage)) or {}
    output = storage.output_path
    if known.get("state") != state or known.get("output_signature") != signature_of(output):
        keep_other_table(plan, storage, known)
        with storage.open_writer() as out, TableWriter(storage.dropped_path, "jsonl") as dropped:
            for part in parts:
                out.append(part.output_path)
                if part.dropped_path.exists():
                    dropped.append(part.dropped_path)
        if not storage.dropped_path.stat().st_size:
            storage.dropped_path.unlink()
    summary.output = str(output)
    save_summary(plan, storage, summary, state=state)


def written_since(when: float, plan: Plan, storage: FileStorage) -> Summary | None:
    """The sum of a step that another process ran since then over the table as it is; None if none did.

    Args:
        when: seconds since 1970, by the file system's clock.
        plan: the step.
        storage: at the step.
    """
    folder = journal_folder(storage)
    known = load_summary(folder)
    if not known or (folder / "summary.json").stat().st_mtime < when:
        return None
    same = (known["operator"], known["input"]) == (plan.name, str(storage.input_path))
    table = storage.output_path
    if not same or known["output"] != str(table) or known["output_signature"] != signature_of(table):
        return None
    if known.get("input_signature") != storage.input_signature():
        return None
    return Summary(**{name: known[name] for name in Summary.__slots__ if name != "forecast"})


def fold_only(plan: Plan, storage: FileStorage) -> Summary:
    """Run a step that makes nothing (a filter)."""
    started = time.monotonic()
    tally = Tally()
    signature = storage.input_signature()
    if plan.prepare is not None:
        plan.prepare(checked_rows(plan, storage))
    entries: Iterator[Entry] = ((row, ()) for row in checked_rows(plan, storage))
    keep_other_table(plan, storage, load_summary(journal_folder(storage)) or {})
    _write_entries(plan, storage, tally, entries, signature)
    summary = tally.summary(storage.step_name, tally.planned, time.monotonic() - started)
    summary.output = str(storage.output_path)
    save_summary(plan, storage, summary, input_signature=signature)
    return summary


def save_summary(plan: Plan, storage: FileStorage, summary: Summary, **facts: object) -> None:
    """Keep the sum beside the journal, for ``dataflow status``."""
    folder = journal_folder(storage)
    folder.mkdir(parents=True, exist_ok=True)
    job = {"operator": plan.name, "input": str(storage.input_path)}
    known = load_summary(folder) or {}
    before = known.get("seconds_in_all", 0.0) if all(known.get(name) == value for name, value in job.items()) else 0.0
    body = {
        **job,
        "table_of": job if summary.output else known.get("table_of"),
        **{name: getattr(summary, name) for name in summary.__slots__},
        "seconds_in_all": before + summary.seconds,
        "output_signature": signature_of(storage.output_path),
        **facts,
    }
    temporary = folder / "summary.json.tmp"
    # Not orjson: a folder's name may be no UTF-8.
    temporary.write_text(json.dumps(body, indent=2, default=_plain))
    temporary.replace(folder / "summary.json")


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Forecast) else str(value)


def load_summary(folder: Path) -> dict[str, Any] | None:
    """What :func:`save_summary` kept, or None."""
    try:
        return json.loads((folder / "summary.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _entries(storage: FileStorage, planner: Planner) -> Iterator[Entry]:
    rows = storage.iter_rows()
    try:
        for row, (keys, error) in zip(rows, planner.book, strict=True):
            if error is not None:
                failed = Outcome(request_id="", status="failed", reason=error.reason, message=error.message)
                yield row, (failed,)
            else:
                yield row, [planner.outcome(key) for key in keys]
    except ValueError as error:
        raise StepError(f"{storage.input_path} changed while the step ran: run again") from error


def _write_entries(
    plan: Plan, storage: FileStorage, tally: Tally, entries: Iterable[Entry], signature: Mapping[str, Any]
) -> None:
    """Fold, count and write."""
    dropped_path = storage.dropped_path
    with storage.open_writer() as out, TableWriter(dropped_path, "jsonl") as dropped:
        for row, outcomes in entries:
            if isinstance(row, BadRow):
                tally.count("failed", "bad_row")
                dropped.write({"reason": "bad_row", "error": row.error, "raw": row.raw})
                continue
            try:
                folded = plan.fold(row, outcomes)
            except InputError as error:
                raise StepError(f"{storage.input_path}, row {tally.next_row}: {error}") from error
            if isinstance(folded, Drop):
                tally.count("dropped", folded.reason)
                dropped.write({"reason": folded.reason, **folded.details, "row": row})
            elif MARK in row:
                # No reason to keep all other rows from their table.
                error = InputError(
                    "this column name is reserved: rename the column",
                    path=storage.input_path,
                    row=tally.next_row,
                    field=MARK,
                )
                logger.warning("%s", error)
                tally.count("failed", "reserved_column")
                dropped.write({"reason": "reserved_column", "error": str(error), "row": row})
            else:
                tally.written += _write_rows(plan, out, folded)
                tally.count(*worst(outcomes))
        if storage.input_signature() != signature:
            # Raised before the writer ends: the old table stays.
            raise StepError(
                f"{storage.input_path} changed while it was being read. Every image made is kept: run again to write "
                "the table of the new rows."
            )
    if not dropped_path.stat().st_size:
        dropped_path.unlink()


def _write_rows(plan: Plan, out: TableWriter, folded: Any) -> int:
    """Write what became of one row; how many rows that are.

    Raises:
        StepError: none, or several where the plan said that a row stays one.
    """
    if isinstance(folded, dict):
        out.write(folded)
        return 1
    if not plan.multiplies:
        raise StepError(f"{plan.name} makes several rows of one: its plan must say multiplies=True")
    written = 0
    for written, row in enumerate(folded, start=1):  # noqa: B007 - counted
        out.write(row)
    if not written:
        raise StepError(f"{plan.name} made no row of one: its fold must give a Drop with a reason instead")
    return written


def keep_other_table(plan: Plan, storage: FileStorage, known: Mapping[str, Any]) -> None:
    """Move the table of another job out of the way instead of replacing it."""
    output = storage.output_path
    owner = known.get("table_of")
    same = owner == {"operator": plan.name, "input": str(storage.input_path)}
    if owner and not same and output.exists():
        kept = output.with_stem(f"{output.stem}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        output.rename(kept)
        logger.warning(
            "%s held the result of %s on %s; it is kept as %s", output, owner["operator"], owner["input"], kept
        )


def signature_of(path: Path) -> list[int] | None:
    """Size and time of a file, None if there is none; they differ if it was changed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]
