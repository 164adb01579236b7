"""``export``: a finished table as a dataset."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflow.commands.finished import finished_table
from dataflow.commands.folder import shown
from dataflow.commands.layout import give, text_table
from dataflow.errors import ConfigError
from dataflow.export import PRESETS, ExportOptions, ExportSummary
from dataflow.export import export as exported
from dataflow.runtime.progress import human_bytes

NOT_ALL = 1


def export(args: argparse.Namespace) -> int:
    """Write the dataset and say what became of every row; 1 if a picture could not be used."""
    if args.preset == "list":
        print(text_table(("preset", "layout", "note"), [(one.name, one.layout, one.note) for one in PRESETS.values()]))
        return 0
    if not args.table or not args.output:
        raise ConfigError("name the job's folder (or its table) and, with -o, the folder of the dataset")
    table = finished_table(args.table)
    with _Bar(quiet=args.quiet) as bar:
        summary = exported(table, args.output, options_of(args), progress=bar.show)
    if args.json:
        give(summary, "", "-")
    elif not args.quiet:
        print(described(summary))
    return NOT_ALL if summary.problems else 0


def options_of(args: argparse.Namespace) -> ExportOptions:
    """The options that the arguments stand for.

    Raises:
        ConfigError: they do not go together, or one is given twice.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(ExportOptions):
        value = getattr(args, field.name, None)
        if isinstance(value, list):
            value = _mapping(field.name, value) if field.name in ("rename", "fill", "scores_of") else tuple(value)
        if value is not None:
            found[field.name] = value
    return ExportOptions(**found)


def _mapping(option: str, pairs: list[tuple[str, str]]) -> Mapping[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name in found if [first for first, _ in pairs].count(name) > 1)
        raise ConfigError(f"--{option.replace('_', '-')} names {twice!r} twice")
    return found


def described(summary: ExportSummary) -> str:
    """What was written and what was not, for people."""
    return "\n".join(_lines(summary))


def _lines(summary: ExportSummary) -> Iterator[str]:
    like = f" as {summary.preset}" if summary.preset else ""
    yield f"{shown(Path(summary.output))}: {summary.layout}{like}, {summary.format}"
    yield f"  {summary.rows:,} rows = {summary.used:,} used" + _plus(summary.left_out)
    yield f"  {summary.samples:,} samples = {summary.written:,} written" + _plus(summary.problems)
    splits = ", ".join(f"{split} {count:,}" for split, count in summary.splits.items())
    yield f"  {summary.images:,} pictures, {human_bytes(summary.bytes)}, in {summary.shards:,} shards: {splits}"
    if summary.resumed:
        yield f"  {summary.resumed:,} of the shards were there already"
    if summary.incomplete:
        yield f"  {summary.incomplete:,} rows have fewer pictures than they asked for"
    if summary.misaligned:
        yield f"  {summary.misaligned:,} samples have a score that could not be given to its picture: it is null"
    if summary.other_prompts:
        told = "pictures say that they were made from another prompt: is it in another --column?"
        yield f"  {summary.other_prompts:,} {told}"
    if summary.left_out or summary.problems:
        yield f"  why, row by row: {shown(Path(summary.output) / 'left_out.jsonl')}"


def _plus(counts: Mapping[str, int]) -> str:
    return "".join(f" + {count:,} {reason}" for reason, count in counts.items())


class _Bar:
    """Progress on standard error, where somebody may be watching."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def show(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="sample", desc="export")
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
