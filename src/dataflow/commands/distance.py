"""``distance``: whole tables against a reference, over vectors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dataflow import distribution
from dataflow.commands.finished import finished_table
from dataflow.commands.layout import give
from dataflow.distribution import METRICS, Report, Vectors


def distance(args: argparse.Namespace) -> int:
    """Print what each table comes to."""
    tables = [_read(table, args) for table in args.tables]
    reference = None if args.reference is None else _read(args.reference, args)
    metrics = args.metric or (METRICS if reference is not None else distribution.ALONE)
    reports = distribution.compare(
        tables, reference, metrics=metrics, sample=args.sample, seed=args.seed, force=args.force
    )
    give(reports, _text(reports), args.json)
    return 0


def _read(table: str, args: argparse.Namespace) -> Vectors:
    return distribution.read(finished_table(table), args.vectors, args.vector_column)


def _text(reports: Sequence[Report]) -> str:
    first = reports[0]
    lines = [f"vectors of {first.model}"]
    if first.reference is not None:
        lines.append(
            f"reference {first.reference}: {first.reference_count:,} pictures, digest {first.reference_digest}"
        )
    for report in reports:
        missing = ", ".join(f"{count} {status}" for status, count in sorted(report.missing.items()))
        lines += [
            "",
            f"{report.source}: {report.count:,} pictures" + (f" ({missing} of {report.expected:,})" if missing else ""),
        ]
        lines += [f"  {name:10} {value:.6g}" for name, value in report.values.items()]
    return "\n".join(lines)
