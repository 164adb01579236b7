"""The steps of a folder, as their sums, journals and pipeline file tell them; a script's folder has no such file."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError, InputError
from dataflow.remote_files import allow_stores, is_url
from dataflow.runtime.table import load_summary
from dataflow.types import BadRow, Row
from dataflow.utils.storage import FileStorage

_JOB_FILE = "job.toml"
_LOOK_AT = 200
_THRESHOLDS = ("minimum", "maximum", "top_k", "drop_lowest_share")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run.

    Attributes:
        number: from 1.
        name: of its table, without suffix.
        operator: who ran; empty where nothing says so.
        journal: its folder.
        table: what it wrote, None where it has not finished.
        source: the table it read, None where that is gone.
        summary: its sum; empty where it was stopped before it had one.
        settings: its ``[[step]]`` in the pipeline file; empty without one.
        serving: the ``[serving.…]`` it used; likewise.
    """

    number: int
    name: str
    operator: str
    journal: Path
    table: Path | None
    source: Path | None
    summary: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> Path:
        """Rows that it took out, if there are any."""
        folder = self.table.parent if self.table else self.journal.parent.parent
        return folder / f"{self.name}.dropped.jsonl"

    @property
    def folds_only(self) -> bool:
        """It made and scored nothing: a filter."""
        return not any(self.journal.glob("*.jsonl"))

    @property
    def thresholds(self) -> dict[str, Any]:
        """The conditions of a filter, with the score they are about under ``score``."""
        found = {name: self.settings[name] for name in _THRESHOLDS if self.settings.get(name) is not None}
        score = self.settings.get("input_score_key")
        return {"score": score, **found} if found and isinstance(score, str) else {}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Steps that follow one another.

    Attributes:
        name: for people.
        folder: the cache folder.
        steps: in order; at least one.
        images: folders in which pictures may be that are not where their rows say.
    """

    name: str
    folder: Path
    steps: Sequence[Step]
    images: Sequence[Path]

    @property
    def has_job(self) -> bool:
        """Whether the folder says how it was made, so that `dataflow replay` can make a picture of it again."""
        return (self.folder / _JOB_FILE).is_file()

    @property
    def finished(self) -> bool:
        return all(step.table is not None for step in self.steps)

    @property
    def last(self) -> Step | None:
        """The last step that has a table."""
        return next((step for step in reversed(self.steps) if step.table is not None), None)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of several folders, under names that tell them apart.

    Raises:
        InputError: a folder is missing, holds no step, or stands there twice.
    """
    places = [folder.expanduser().absolute() for folder in folders]
    if len({place.resolve() for place in places}) < len(places):
        raise InputError("a folder stands there twice: a report takes different ones")
    found = [(place, list(_chains(place))) for place in places]
    runs = []
    for (_, chains), place, name in zip(found, places, _short_names(places), strict=True):
        for prefix, steps, images in chains:
            label = name if len(chains) == 1 else f"{name} · {prefix}"
            runs.append(Run(name=label, folder=place, steps=steps, images=images))
    return runs


def _short_names(places: Sequence[Path]) -> list[str]:
    """The ends of paths that tell them apart, without what all of them end with."""
    ends = [list(place.parts) for place in places]
    while len(ends) > 1 and all(len(end) > 1 for end in ends) and len({end[-1] for end in ends}) == 1:
        ends = [end[:-1] for end in ends]
    for length in range(1, max(map(len, ends)) + 1):
        names = ["/".join(end[-length:]) for end in ends]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def look(table: Path | None) -> list[Row]:
    """The first rows of a table; none where it is gone or cannot be read."""
    if table is None or not table.is_file():
        return []
    found: list[Row] = []
    try:
        for row in rows_of(table):
            if not isinstance(row, BadRow):
                found.append(row)
            if len(found) >= _LOOK_AT:
                break
    except (InputError, ConfigError):
        pass  # the step that reads it has said so; what is asked here is only which columns there are
    return found


def rows_of(table: Path) -> Iterator[Row | BadRow]:
    """The rows of a table.

    Raises:
        InputError: it cannot be read.
        ConfigError: it is a pickle, which would run code.
    """
    return FileStorage(str(table)).step().iter_rows()


def _chains(folder: Path) -> Iterator[tuple[str, list[Step], list[Path]]]:
    """The runs of a folder: a script may have used several prefixes in one."""
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    journals = sorted(filter(Path.is_dir, (folder / "journal").glob("*")), key=_order)
    if not journals:
        raise InputError("holds no step that was run: name the folder that a job or a script wrote to", path=folder)
    job = _job(folder)
    images = _image_folders(folder, job)
    chains: dict[str, list[Path]] = {}
    for journal in journals:
        chains.setdefault(_order(journal)[0], []).append(journal)
    own = _prefix(job, journals)
    for prefix, members in chains.items():
        steps: list[Step] = []
        for journal in members:
            steps.append(_step(folder, journal, job if prefix == own else {}, steps[-1] if steps else None))
        if prefix == own:
            steps += _not_begun(folder, prefix, steps, job)
        yield prefix.strip("_").removesuffix("_step") or folder.name, steps, images


def _not_begun(folder: Path, prefix: str, steps: Sequence[Step], job: Mapping[str, Any]) -> list[Step]:
    """The steps of the pipeline file that no run has reached."""
    wanted = job.get("step")
    total = len(wanted) if isinstance(wanted, list) else 0
    numbers = range(steps[-1].number + 1, total + 1)
    return [_step(folder, folder / "journal" / f"{prefix}{number}", job, None) for number in numbers]


def _prefix(job: Mapping[str, Any], journals: Sequence[Path]) -> str:
    """Which prefix the pipeline file is about."""
    storage = job.get("storage")
    given = storage.get("file_name_prefix") if isinstance(storage, Mapping) else None
    return f"{given}_step" if given else _order(journals[0])[0]


def _order(journal: Path) -> tuple[str, int]:
    found = re.fullmatch(r"(.*?)(\d*)", journal.name)
    assert found is not None  # both parts may be empty
    return found[1], int(found[2] or 0)


def _job(folder: Path) -> Mapping[str, Any]:
    """The pipeline file, as far as it can be read: the report says more with it, and enough without."""
    try:
        return tomllib.loads((folder / _JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _image_folders(folder: Path, job: Mapping[str, Any]) -> list[Path]:
    images = job.get("images")
    allow_stores(images)
    given = images.get("save_path") if isinstance(images, Mapping) else None
    named = [folder / given] if isinstance(given, str) and not is_url(given) else []
    return [*named, folder / "images", folder.parent / "images", folder]


def _step(folder: Path, journal: Path, job: Mapping[str, Any], before: Step | None) -> Step:
    summary = load_summary(journal) or {}
    number = _order(journal)[1] or 1
    settings: Mapping[str, Any] = {}
    steps = job.get("step")
    if isinstance(steps, list) and number <= len(steps) and isinstance(steps[number - 1], dict):
        settings = steps[number - 1]
        if summary.get("operator") not in (None, settings.get("operator")):
            settings = {}  # the file was changed since
    servings = job.get("serving")
    serving = servings.get(settings.get("serving"), {}) if isinstance(servings, Mapping) else {}
    return Step(
        number=number,
        name=journal.name,
        operator=str(summary.get("operator") or settings.get("operator") or ""),
        journal=journal,
        table=_table(folder, summary.get("output")),
        source=before.table if before else _source(folder, summary.get("input"), job) if number == 1 else None,
        summary=summary,
        settings=settings,
        serving=serving if isinstance(serving, Mapping) else {},
    )


def _table(folder: Path, written: object) -> Path | None:
    """A step's table: beside its journal first, for a folder that was moved has the old place written down."""
    if not isinstance(written, str):
        return None  # a table that lies there is of an earlier run, with other rows
    return next((place for place in (folder / Path(written).name, Path(written)) if place.is_file()), None)


def _source(folder: Path, written: object, job: Mapping[str, Any]) -> Path | None:
    storage = job.get("storage")
    given = storage.get("first_entry_file_name") if isinstance(storage, Mapping) else None
    places = [folder / given] if isinstance(given, str) else []
    places += [Path(written), folder / "input" / Path(written).name] if isinstance(written, str) else []
    return next((place for place in places if place.is_file()), None)


def plain_json(value: object, limit: int) -> str:
    """A JSON value as text for people, cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit] + "…"
