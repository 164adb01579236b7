"""The finished table that a path stands for: itself, or what a job's last step wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dataflow.commands.folder import JOB_FILE, load_job
from dataflow.errors import InputError
from dataflow.runtime.table import load_summary
from dataflow.utils.storage import FileStorage


def finished_table(path: str | Path) -> Path:
    """The table at a path; of a job's folder the one its last step wrote.

    Raises:
        InputError: there is none, or the last step has not finished.
    """
    place = Path(path)
    if not place.is_dir():
        if not place.exists():
            raise InputError("no such table or folder", path=place)
        return place
    table = _last_table(place)
    if not table.is_file():
        raise InputError(f"the last step has not written its table {table.name} yet: run it to its end", path=place)
    return table


def named_tables(paths: Sequence[str]) -> dict[str, Path]:
    """Finished tables under the shortest names that tell them apart.

    Raises:
        InputError: as :func:`finished_table`, or the same table twice.
    """
    tables = [finished_table(path) for path in paths]
    if len({table.resolve() for table in tables}) < len(tables):
        raise InputError("a table stands there twice: a comparison takes different ones")
    short = [Path(path).resolve().name if Path(path).is_dir() else Path(path).stem for path in paths]
    names = short if len(set(short)) == len(short) else [str(Path(path)) for path in paths]
    return dict(zip(names, tables, strict=True))


def _last_table(folder: Path) -> Path:
    if (folder / JOB_FILE).is_file():
        config = load_job(folder)
        storage = FileStorage(**config.storage)
        for _ in config.steps:
            storage.step()
        return storage.output_path
    journals = sorted(filter(Path.is_dir, (folder / "journal").glob("*")), key=_step_number)
    summary = load_summary(journals[-1]) if journals else None
    if not summary or not summary.get("output"):
        raise InputError(f"holds no {JOB_FILE} and no step that has finished", path=folder)
    return Path(summary["output"])


def _step_number(journal: Path) -> tuple[int, str]:
    found = re.search(r"(\d+)$", journal.name)
    return int(found[1]) if found else 0, journal.name
