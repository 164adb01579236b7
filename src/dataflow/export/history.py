"""How a table came to be: the steps of its job, as they are kept beside it."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow import operators
from dataflow.remote_files import allow_stores
from dataflow.runtime.table import load_summary

_JOB = "job.toml"
_STEP = re.compile(r"(.*_step)(\d+)")


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One step.

    Attributes:
        operator: its class.
        settings: what it was told, as far as the job's file says; not its serving.
        rows: that it read.
        done: that it kept.
        reasons: the others by reason.
    """

    operator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    done: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """What is known of a table.

    Attributes:
        steps: up to the one that wrote it, in order.
        scores_of: picture column by score column.
        prompts: column of the prompts by the column of the pictures that were made from them.
        folders: where relative paths of its rows may begin, beside its own folder.
    """

    steps: tuple[StepFacts, ...] = ()
    scores_of: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()


def history_of(table: Path) -> History:
    """What lies beside a table of a job; nothing is known of any other."""
    found = _STEP.fullmatch(table.stem)
    if found is None:
        return History()
    prefix, last = found[1], int(found[2])
    job = _job(table.parent / _JOB)
    allow_stores(job.get("images"))
    told = job.get("step")
    steps = told if isinstance(told, list) else []
    storage = job.get("storage") if isinstance(job.get("storage"), dict) else {}
    first = storage.get("first_entry_file_name") if isinstance(storage, dict) else None
    facts, scores, prompts = [], {}, {}
    for number in range(1, last + 1):
        settings = steps[number - 1] if number <= len(steps) and isinstance(steps[number - 1], dict) else {}
        facts.append(_step(settings, table.parent / "journal" / f"{prefix}{number}"))
        keys = _keys(settings)
        if isinstance(keys.get("output_key"), str) and isinstance(keys.get("input_image_key"), str):
            scores[keys["output_key"]] = keys["input_image_key"]
        if isinstance(keys.get("output_image_key"), str) and isinstance(keys.get("input_conversation_key"), str):
            prompts[keys["output_image_key"]] = keys["input_conversation_key"]
    folders = (table.parent / Path(first).expanduser().parent,) if isinstance(first, str) else ()
    return History(steps=tuple(facts), scores_of=scores, prompts=prompts, folders=folders)


def _job(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _step(settings: Mapping[str, Any], journal: Path) -> StepFacts:
    summary = load_summary(journal) or {}
    reasons = summary.get("reasons")
    return StepFacts(
        operator=str(summary.get("operator") or settings.get("operator") or "unknown"),
        settings={name: value for name, value in settings.items() if name not in ("operator", "serving")},
        rows=_count(summary.get("rows")),
        done=_count(summary.get("done")),
        reasons=reasons if isinstance(reasons, dict) else {},
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The columns a step works on: as the job's file says, else as the operator has them by default."""
    operator = getattr(operators, str(settings.get("operator")), None)
    plan = getattr(operator, "plan", None)
    defaults = (
        {}
        if plan is None
        else {name: each.default for name, each in inspect.signature(plan).parameters.items() if name.endswith("_key")}
    )
    return {**defaults, **{name: value for name, value in settings.items() if name.endswith("_key")}}
