"""What a pipeline file asks for beside its tables: a page and datasets, written when the last step has ended."""

from __future__ import annotations

import sys
from pathlib import Path

from dataflow.commands.folder import shown
from dataflow.config import OutputConfig, PipelineConfig


def write_results(config: PipelineConfig, table: Path, *, quiet: bool) -> bool:
    """Write the exports and the report.

    Args:
        config: the pipeline file.
        table: that the last step wrote.
        quiet: say nothing of it.

    Returns:
        Whether every picture could be used.

    Raises:
        DataflowError: one cannot be written; the tables are not touched by it.
    """
    complete = [_export(each, table, quiet=quiet) for each in config.exports]
    if config.report is not None:
        from dataflow.report import ReportOptions, write_report

        page = write_report([config.folder], config.report.output, ReportOptions(**config.report.arguments)).page
        if not quiet:
            print(f"report: {shown(page)}", file=sys.stderr)
    return all(complete)


def _export(export: OutputConfig, table: Path, *, quiet: bool) -> bool:
    from dataflow.commands.export import described
    from dataflow.export import ExportOptions
    from dataflow.export import export as exported

    summary = exported(table, export.output, ExportOptions(**export.arguments))
    if not quiet:
        print(described(summary), file=sys.stderr)
    return not summary.problems
