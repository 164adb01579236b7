"""Finished tables as datasets that others load: WebDataset, Hugging Face parquet, image folders, JSON Lines, Lance."""

from dataflow.export.exporter import ExportSummary, export
from dataflow.export.options import FORMATS, LAYOUTS, ExportOptions
from dataflow.export.presets import PRESETS

__all__ = ["FORMATS", "LAYOUTS", "PRESETS", "ExportOptions", "ExportSummary", "export"]
