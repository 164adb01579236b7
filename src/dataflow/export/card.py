"""The dataset card: a README.md that the Hub reads, and people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflow import __version__
from dataflow.export.history import History, StepFacts
from dataflow.export.kinds import Kind, json_columns
from dataflow.export.layouts import Columns
from dataflow.export.options import ExportOptions
from dataflow.export.presets import Preset
from dataflow.export.tally import Tally

_LICENCES = frozenset(
    {
        "apache-2.0",
        "mit",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-4.0",
        "openrail",
        "creativeml-openrail-m",
        "odc-by",
        "odbl",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "gpl-3.0",
        "bsd-3-clause",
        "other",
        "unknown",
    }
)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_TASKS = {"text_image": "text-to-image", "edit": "image-to-image", "multi_turn": "image-to-image"}
_SHOWN = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything that a card tells.

    Attributes:
        options: what was asked for.
        preset: how the files are laid out.
        columns: where things stood in the table.
        kinds: the columns.
        files: what the writer says of its files.
        splits: counts by split.
        rows: of the table.
        left_out: rows without a sample, by reason.
        problems: samples whose pictures could not be used, by reason.
        prompts: different prompts.
        history: the steps.
    """

    options: ExportOptions
    preset: Preset
    columns: Columns
    kinds: Mapping[str, Kind]
    files: Mapping[str, Any]
    splits: Mapping[str, Tally]
    rows: int
    left_out: Mapping[str, int]
    problems: Mapping[str, int]
    prompts: int
    history: History


def card(facts: CardFacts) -> str:
    """The whole text."""
    total = Tally()
    for each in facts.splits.values():
        total.merge(each)
    front = "".join(f"{name}: {_yaml(value)}\n" for name, value in _front(facts, total))
    return f"---\n{front}---\n\n" + "\n".join(_body(facts, total)) + "\n"


def _front(facts: CardFacts, total: Tally) -> Iterator[tuple[str, Any]]:
    options = facts.options
    if options.license is not None:
        known = options.license.lower() in _LICENCES
        yield "license", options.license.lower() if known else "other"
        if not known:
            yield "license_name", options.license
    yield "pretty_name", _title(facts)
    task = _TASKS.get(facts.columns.layout)
    if task is not None:
        yield "task_categories", [task]
    yield "tags", ["synthetic", facts.columns.layout.replace("_", "-"), "open-dataflow"]
    yield "size_categories", [next((name for most, name in _SIZES if total.samples < most), "n>1M")]
    pattern = facts.files.get("pattern")
    if pattern is not None:
        data = [{"split": split, "path": pattern.replace("{split}", split)} for split in facts.splits]
        yield "configs", [{"config_name": "default", "data_files": data}]
    if "features" in facts.files:
        # datasets ignores splits without a number of bytes, with a warning; it checks only the number of examples.
        sizes = [
            {"name": split, "num_bytes": each.bytes, "num_examples": each.samples}
            for split, each in facts.splits.items()
        ]
        yield "dataset_info", {"features": facts.files["features"], "splits": sizes}


def _title(facts: CardFacts) -> str:
    return facts.options.name or "Images made by models"


def _body(facts: CardFacts, total: Tally) -> Iterator[str]:
    yield f"# {_line(_title(facts))}\n"
    yield (
        f"{total.samples:,} samples with {total.images:,} pictures ({total.bytes:,} bytes) of {facts.prompts:,} "
        f"different prompts; layout `{facts.columns.layout}`"
        + (f", as `{facts.preset.name}` is published." if facts.preset.name else ".")
    )
    if facts.preset.note:
        yield f"\n{facts.preset.note}"
    licence = facts.options.license
    yield f"\nLicence: {_line(licence)}." if licence else "\nLicence: none was given. The models' own terms apply."
    if total.licences:
        yield f"The column of licences says: {_counts(total.licences)}."
    yield "\n## Splits\n"
    yield _table(
        ("split", "samples", "pictures", "bytes"),
        [(split, f"{each.samples:,}", f"{each.images:,}", f"{each.bytes:,}") for split, each in facts.splits.items()],
    )
    if len(facts.splits) > 1:
        by = facts.options.split_by
        what = {"prompt": "the prompt", "source": "the content of the source picture"}.get(by, f"the column `{by}`")
        yield f"\nA hash of {what} decides (seed {facts.options.split_seed}): no two splits share one."
    yield "\n## Columns\n"
    yield _table(("column", "type"), [(_code(name), _kind(kind)) for name, kind in facts.kinds.items()])
    if mixed := json_columns(facts.kinds):
        yield f"\nValues of several types, as JSON text in typed formats: {', '.join(map(_code, mixed))}."
    if total.buckets:
        yield "\n## Buckets\n"
        yield _table(("size", "samples"), [(each, f"{count:,}") for each, count in sorted(total.buckets.items())])
    yield "\n## How it was made\n"
    yield f"Made and exported with open-dataflow {__version__}."
    yield "\n" + _table(("model", "pictures"), _models(total.models))
    if facts.history.steps:
        yield "\n" + _table(("step", "rows", "kept", "lost", "settings"), list(_steps(facts.history.steps)))
    if total.scores:
        yield "\n## Scores\n"
        rows = [
            (_code(name), f"{count:,}", f"{mean / count:.4g}", f"{least:.4g}", f"{most:.4g}")
            for name, (count, mean, least, most) in sorted(total.scores.items())
        ]
        yield _table(("score", "samples", "mean", "least", "most"), rows)
    yield "\n## What was left out\n"
    used = facts.rows - sum(facts.left_out.values())
    yield f"{facts.rows:,} rows = {used:,} used" + "".join(
        f" + {count:,} {_line(reason)}" for reason, count in sorted(facts.left_out.items())
    )
    lost = sum(facts.problems.values())
    yield f"\n{total.samples + lost:,} samples = {total.samples:,} written" + "".join(
        f" + {count:,} {_line(reason)}" for reason, count in sorted(facts.problems.items())
    )


def _models(models: Mapping[str, int]) -> list[tuple[str, str]]:
    ordered = sorted(models.items(), key=lambda item: (-item[1], item[0]))
    rows = [(_code(name) if name else "not told by the file", f"{count:,}") for name, count in ordered[:_SHOWN]]
    return rows + ([("others", f"{sum(count for _, count in ordered[_SHOWN:]):,}")] if len(ordered) > _SHOWN else [])


def _steps(steps: Sequence[StepFacts]) -> Iterator[tuple[str, ...]]:
    for number, step in enumerate(steps, 1):
        settings = ", ".join(
            f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in step.settings.items()
        )
        lost = ", ".join(f"{reason} {count:,}" for reason, count in sorted(step.reasons.items()))
        yield (
            f"{number} {_line(step.operator)}",
            "–" if step.rows is None else f"{step.rows:,}",
            "–" if step.done is None else f"{step.done:,}",
            _line(lost) or "–",
            _code(settings) if settings else "–",
        )


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    return ", ".join(f"{_code(name)} {count:,}" for name, count in ordered)


def _kind(kind: Kind) -> str:
    if kind.name == "list" and kind.item is not None:
        return f"list of {_kind(kind.item)}"
    if kind.name == "object":
        return "object of " + ", ".join(_code(name) for name in list(kind.fields)[:_SHOWN])
    return {"json": "JSON", "text": "text", "picture": "image"}.get(kind.name, kind.name)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """Text as one line in which nothing is markup."""
    plain = _UNPRINTED.sub("\ufffd", " ".join(str(text).split()))
    return re.sub(r"([\\`*_\[\]<>#&])", r"\\\1", plain)


def _code(text: str) -> str:
    """Text as code, whatever marks it holds."""
    plain = _UNPRINTED.sub("\ufffd", " ".join(str(text).split())).replace("`", "'")
    return f"`{plain}`"


def _yaml(value: Any) -> str:
    """JSON is YAML, but for what YAML does not print."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTED.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if not "\ud800" <= found[0] <= "\udfff" else "\ufffd", text
    )
