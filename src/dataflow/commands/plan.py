"""``plan``: what a pipeline file would do, found out without loading a model or writing anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataflow import config as configuration
from dataflow.commands.folder import check_tables, offline, shown
from dataflow.commands.layout import NONE, text_table
from dataflow.config import Job, PipelineConfig
from dataflow.errors import ConfigError
from dataflow.runtime.forecast import describe_forecast, forecast
from dataflow.runtime.journal import Journal
from dataflow.runtime.survey import Prospect, survey
from dataflow.runtime.table import journal_folder
from dataflow.types import Forecast, Plan, Serving
from dataflow.utils.storage import FileStorage

_HEADER = ("step", "rows", "requests", "done", "to make", "cost", "reads → writes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """One step as it would be run.

    Attributes:
        step: number, from 1.
        operator: its class.
        serving: its name in the file; None for a step without one.
        model: what identifies it, None where the model is not on this machine.
        reads: columns it needs.
        writes: columns it gives.
        columns: of the table it writes.
        rows: of the table it reads, at most so many where ``known`` is False; None where nothing tells.
        known: the table it reads is written, so that its requests can be counted.
        requests: of all rows.
        done: requests that have their result.
        failed: rows that cannot be used as they are, or failed or were refused before, by reason.
        pending: requests a run would make.
        impossible: those of them that the serving would refuse before any work, by the words.
        usd: list price of the pending ones in US dollars; None where it is not known.
        forecast: what the pending rows will take, from those that were made before.
        note: why the requests could not be counted.
    """

    step: int
    operator: str
    serving: str | None
    model: str | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int | None
    known: bool
    requests: int | None = None
    done: int | None = None
    failed: dict[str, int] = field(default_factory=dict)
    pending: int | None = None
    impossible: dict[str, int] = field(default_factory=dict)
    usd: float | None = None
    forecast: Forecast | None = None
    note: str | None = None


def plan(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 if rows or requests of it cannot work."""
    config = configuration.load(args.pipeline)
    job = configuration.build(offline(config))
    if args.mermaid:
        print(job.pipeline.mermaid(Path(job.storage.first_entry_file_name).name), end="")
        return 0
    job.pipeline.check_servings()
    outlines = list(outline(job, config))
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in outlines], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(outlines, config, args.pipeline)))
    return 1 if any(each.failed or each.impossible for each in outlines) else 0


def outline(job: Job, config: PipelineConfig) -> Iterator[Outline]:
    """The steps of a job, checked.

    Raises:
        DataflowError: what would stop the run before its first row.
    """
    compiled = check_tables(job, config)
    storage = job.pipeline.as_read(job.storage)
    storage.reset()
    rows: int | None = None
    settled = True
    for step, written in zip(config.steps, compiled, strict=True):
        plan = written.plan
        storage.step()
        known = settled and storage.input_path.is_file()
        rows = storage.count_rows() if known else rows
        found = Outline(
            step=written.number,
            operator=plan.name,
            serving=step.serving,
            model=None,
            reads=plan.inputs,
            writes=plan.outputs,
            columns=written.columns,
            rows=rows,
            known=known,
        )
        if plan.serving is not None:
            found = _counted(found, plan, plan.serving, storage)
        settled = known and found.pending in (None, 0) and storage.output_path.is_file()
        yield found
        if plan.multiplies:
            rows = None


def _counted(found: Outline, plan: Plan, serving: Serving, storage: FileStorage) -> Outline:
    """The outline with what can be said of its requests."""
    try:
        found = dataclasses.replace(found, model=_model(serving))
        if not found.known:
            return found
        prospect = Prospect()
        summary = survey(plan, serving, storage, prospect)
    except ConfigError as error:
        return dataclasses.replace(found, note=str(error))
    summary.step = storage.step_name
    reasons = {reason: count for reason, count in summary.reasons.items() if count}
    return dataclasses.replace(
        found,
        rows=summary.rows,
        requests=prospect.requests,
        done=prospect.requests - prospect.requests_pending,
        failed=reasons,
        pending=prospect.requests_pending,
        impossible=dict(prospect.messages),
        usd=None if prospect.unpriced else prospect.usd,
        forecast=forecast(Journal(journal_folder(storage)).records(), summary, serving) if summary.pending else None,
    )


def _model(serving: Serving) -> str:
    known = serving.fingerprint()
    name = next((str(known[key]) for key in ("model", "name", "serving") if known.get(key)), type(serving).__name__)
    revision = known.get("revision")
    return f"{name}#{str(revision)[:12]}" if revision else name


# Words -------------------------------------------------------------------------------------------------------------


def _lines(outlines: list[Outline], config: PipelineConfig, file: str) -> Iterator[str]:
    table = Path(config.storage["first_entry_file_name"])
    steps = f"{len(outlines)} step{'s' if len(outlines) > 1 else ''}"
    yield f"{file}: {steps} over {shown(table)} into {shown(config.folder)}"
    yield ""
    yield text_table(_HEADER, [_cells(each) for each in outlines])
    models = {each.serving: each.model or each.note for each in outlines if each.serving}
    if models:
        yield ""
        yield from (f"  {name}: {model or 'not found'}" for name, model in models.items())
    for each in outlines:
        yield from _troubles(each)
        if each.forecast is not None:
            yield f"\nstep {each.step}: {describe_forecast(each.forecast)}"
    yield ""
    yield f"columns in the end: {', '.join(outlines[-1].columns) or 'unknown, the table has no rows'}"
    if config.accept is not None:
        yield "the steps are repeated until enough images are accepted ([accept]): this is the first round"
    budget = config.run.get("budget_usd")
    yield f"budget: ${budget:,.2f} for each step" if budget else "budget: none"
    yield f"nothing was run; this runs it: dataflow run {file}"


def _cells(found: Outline) -> tuple[str, ...]:
    most = "" if found.known else "≤ "
    cost = NONE
    if found.pending:
        cost = "unknown" if found.usd is None else f"${found.usd:,.2f}" if found.usd else "free"
    return (
        f"{found.step} {found.operator}" + (f" ({found.serving})" if found.serving else ""),
        "?" if found.rows is None else f"{most}{found.rows:,}",
        *(NONE if value is None else f"{value:,}" for value in (found.requests, found.done, found.pending)),
        cost,
        f"{', '.join(found.reads) or NONE} → {', '.join(found.writes) or NONE}",
    )


def _troubles(found: Outline) -> Iterator[str]:
    if found.failed:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.failed.items())
        yield f"\nstep {found.step}: rows that cannot be used, or failed or were refused before: {reasons}"
    for message, count in found.impossible.items():
        yield f"\nstep {found.step}: {count:,} requests can never work: {message}"
