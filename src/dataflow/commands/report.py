"""``report``: a static page about one run or several."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataflow.commands.folder import shown
from dataflow.report import ReportOptions, write_report
from dataflow.runtime.progress import human_bytes


def report(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    folders = [Path(folder) for folder in args.folders]
    output = Path(args.output) if args.output else folders[0] / "report"
    options = ReportOptions(
        title=args.title,
        thumbnail_size=args.thumbnail_size,
        thumbnail_quality=args.thumbnail_quality,
        workers=args.workers,
        prompt_column=args.prompt_column,
        copy_originals=args.copy_originals,
    )
    made = write_report(folders, output, options)
    if not args.quiet:
        unreadable = f", {made.unreadable:,} of them without a file that can be read" if made.unreadable else ""
        print(f"{made.pictures:,} pictures{unreadable}; {_without(made.problems)}")
        print(
            f"{human_bytes(made.total_bytes)} in {made.seconds:.1f} s, {made.reused:,} small pictures taken over;"
            f" the page itself {human_bytes(made.page_bytes)}"
        )
    print(f"open: {shown(made.page)}")
    return 0


def _without(rows: int) -> str:
    return f"{rows:,} rows without one, each with its reason" if rows else "no row is without one"
