"""Which writer makes which files."""

from __future__ import annotations

from pathlib import Path

from dataflow.export.files import Layout, Writer
from dataflow.export.manifest import ManifestWriter, addresses
from dataflow.export.manifest import Packing as Folders
from dataflow.export.options import ExportOptions
from dataflow.export.presets import Packing, Preset
from dataflow.export.webdataset import WebDatasetWriter


def writer_for(packing: Packing, layout: Layout, preset: Preset, options: ExportOptions, home: Path) -> Writer:
    """The writer of a packing.

    Args:
        packing: which.
        layout: folders and columns.
        preset: names of folders and tables.
        options: sizes, captions, addresses.
        home: the table's folder, which ``base_url`` stands for unless ``image_root`` is another.

    Raises:
        MissingExtraError: a library is not installed.
    """
    match packing:
        case "webdataset":
            return WebDatasetWriter(layout)
        case "parquet":
            from dataflow.export.parquet import ParquetWriter

            return ParquetWriter(layout, options.row_group_bytes)
        case "lance":
            from dataflow.export.lance import LanceWriter

            return LanceWriter(layout, options.row_group_bytes)
    return ManifestWriter(layout, _folders(packing, preset, options, layout.output, home))


def _folders(packing: Packing, preset: Preset, options: ExportOptions, output: Path, home: Path) -> Folders:
    below = preset.folder
    match packing:
        case "folder":
            return Folders(
                manifest="{split}/metadata.jsonl",
                pictures="folder",
                folder="{split}/{number}",
                entry="{split}",
                captions=options.captions or preset.name == "kohya",
                picture_columns=True,
            )
        case "json_tar" | "parquet_tar":
            return Folders(
                manifest=preset.manifest,
                pictures="tar",
                folder=f"{below}/{{split}}/{{number}}",
                entry=f"{below}/{{split}}-*.tar",
            )
        case "parts":
            return Folders(
                manifest="metadata.parquet",
                pictures="folder",
                folder=f"{below}/part-{{part}}",
                entry=f"{below}/part-*",
                part=True,
            )
        case "json_folder":
            return Folders(
                manifest=preset.manifest,
                pictures="folder",
                folder=f"{below}/{{split}}/{{number}}",
                entry=f"{below}/{{split}}",
            )
    if options.copy_images or options.touches_pixels:
        return Folders(
            manifest=preset.manifest or "{split}.jsonl",
            pictures="folder",
            folder=f"{below}/{{split}}/{{number}}",
            entry=f"{below}/{{split}}",
        )
    root = home if options.image_root is None else Path(options.image_root).absolute()
    return Folders(
        manifest=preset.manifest or "{split}.jsonl",
        pictures="stay",
        address=addresses(output, options.base_url, root),
    )
