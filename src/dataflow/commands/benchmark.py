"""``benchmark``: the prompts of a published set as a table, and the set's own report of a scored table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson

from dataflow import config as configuration
from dataflow.benchmark_reports import BenchmarkReport, Line, report
from dataflow.commands.finished import finished_table
from dataflow.commands.folder import launch, shown
from dataflow.commands.layout import give, markdown_table, number, percent, text_table
from dataflow.errors import ConfigError
from dataflow.prompt_sets import load
from dataflow.scores import by_status, read_rows
from dataflow.utils.storage import TableWriter
from dataflow.utils.tables import TableFormat

_KINDS: dict[str, TableFormat] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def benchmark(args: argparse.Namespace) -> int:
    """Run ``prompts``, ``report`` or ``run``."""
    return {"prompts": _prompts, "report": _report, "run": _run}[args.action](args)


def _prompts(args: argparse.Namespace) -> int:
    output = Path(args.output)
    kind = _KINDS.get(output.suffix.lower())
    if kind is None:
        raise ConfigError(f"{output}: expected a table, {', '.join(_KINDS)}")
    images = args.images or (output.with_name(f"{output.stem}_images") if args.format == "gedit" else None)
    with TableWriter(output, kind) as writer:
        for row in load(args.format, args.path, images):
            writer.write(row)
    if not args.quiet:
        print(f"{writer.rows:,} prompts: {shown(output)}", file=sys.stderr)
    return 0


def _report(args: argparse.Namespace) -> int:
    return _reported(finished_table(args.table), args)


def _run(args: argparse.Namespace) -> int:
    out = Path(args.output).absolute()
    table = out / "input" / f"{args.format}.jsonl"
    config = configuration.load(args.pipeline, {"first_entry_file_name": str(table), "cache_path": str(out)})
    images = args.images or (out / "input" / "images" if args.format == "gedit" else None)
    rows = b"".join(orjson.dumps(row) + b"\n" for row in load(args.format, args.path, images))
    summaries = launch(config, args, {table: rows})
    if summaries[-1].output is None:
        print("a pilot: the same command without --pilot makes the rest", file=sys.stderr)
        return 0
    return _reported(Path(summaries[-1].output), args)


def _reported(table: Path, args: argparse.Namespace) -> int:
    found = report(
        args.format, read_rows(table), scores=_scores(args.score or []), compat=args.compat, force=args.force
    )
    give(found, "\n".join(_markdown(found) if args.markdown else _lines(found)), args.json)
    return 0


def _scores(given: list[str]) -> dict[str, str]:
    """``KEY`` or ``NAME=KEY``."""
    found = {}
    for each in given:
        name, equals, key = each.partition("=")
        found.update({name: key} if equals else {"score": each})
    return found


def _lines(found: BenchmarkReport) -> Iterator[str]:
    yield f"{found.name}: {found.prompts:,} prompts, {found.scored:,} of {found.expected:,} pictures scored" + (
        f" ({percent(found.coverage)}; {by_status(found.missing)})" if found.missing else ""
    )
    for note in found.notes:
        yield f"note: {note}"
    for section in dict.fromkeys(line.section for line in found.lines):
        yield ""
        header = (section, *found.columns, *(f"strict {name}" for name in found.columns), "pictures", "coverage")
        yield text_table(header, [_cells(found, line) for line in found.lines if line.section == section])


def _cells(found: BenchmarkReport, line: Line) -> list[str]:
    values = [number(table[name], found.digits) for table in (line.values, line.strict) for name in found.columns]
    return [line.name, *values, f"{line.expected:,}", percent(line.scored / line.expected if line.expected else None)]


def _markdown(found: BenchmarkReport) -> Iterator[str]:
    """One row for the model, a column for each line, as papers print it."""
    for section in dict.fromkeys(line.section for line in found.lines):
        lines = [line for line in found.lines if line.section == section]
        if section:
            yield f"\n{section}\n"
        yield markdown_table(
            ["", *(line.name for line in lines)],
            [[name, *(number(line.values[name], found.digits) for line in lines)] for name in found.columns],
        )
