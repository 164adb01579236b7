"""A static page about one run or several: what came of the rows, what was lost and why, what it cost, every picture.

The page opens from disk, with no server and no network. :mod:`~dataflow.report.runs` finds the steps of a folder,
:mod:`~dataflow.report.rows` reads their tables into entries (a picture, or a row that has none and why),
:mod:`~dataflow.report.thumbnails` makes small pictures, and :mod:`~dataflow.report.writer` puts all of it into a folder
that appears whole or not at all. What the page does with it is in ``static/``: plain scripts beside a few libraries.
"""

from dataflow.report.options import ReportOptions, ReportSummary
from dataflow.report.writer import write_report

__all__ = ["ReportOptions", "ReportSummary", "write_report"]
