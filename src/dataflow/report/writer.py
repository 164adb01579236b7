"""The folder of a report: written beside its place, put there when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import logging
import os
import shlex
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dataflow import __version__
from dataflow.errors import ImageError, InputError, StepError
from dataflow.picture_files import is_loose, read_bytes
from dataflow.remote_files import is_url
from dataflow.report.columns import Columns
from dataflow.report.entries import Entry, digest_of, find_picture, picture_key, unscored
from dataflow.report.options import ReportOptions, ReportSummary
from dataflow.report.page import write_page
from dataflow.report.rows import RunReader
from dataflow.report.runs import Run, find_runs
from dataflow.report.scripts import call
from dataflow.report.sums import Prices, problems_of, run_facts
from dataflow.report.thumbnails import Look, Thumbnail
from dataflow.report.workshop import INDEX, PER_SCRIPT, Workshop
from dataflow.runtime.lock import cache_lock

logger = logging.getLogger(__name__)

MARK = "dataflow-report.json"
SCORED = "scored.jsonl"
ORIGINALS = "originals"
PER_TILES, PER_DETAILS = 256, 64
_CAPTION = 220
_SAMPLES = 24
_SAFE_INTEGER = 2**53
STATES = ("kept", "not_chosen", "dropped", "incomplete", "refused", "failed", "waiting")


def write_report(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], options: ReportOptions | None = None
) -> ReportSummary:
    """Write a page about one run, or several side by side.

    Nothing stands under ``output`` until all of it is there; a report that was there before is then replaced, and the
    thumbnails it had of files that did not change are taken over. So are those of a report that was stopped.

    Args:
        folders: cache folders, each with its ``journal/``.
        output: folder of the report; must not exist, be empty, or hold a report.
        options: how.

    Raises:
        InputError: a folder holds no run, a table cannot be read, or ``output`` holds something else.
        CacheBusyError: another process is writing the same report.
        StepError: the disk is full, or the folder cannot be written.
    """
    options = options or ReportOptions()
    target = Path(output).expanduser().absolute()
    _check_target(target)
    runs = find_runs([Path(folder) for folder in folders])
    started = time.monotonic()
    unfinished = target.with_name(f".{target.name}.unfinished")
    stopped = target.with_name(f".{target.name}.stopped")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _put_aside(unfinished, stopped)
        with cache_lock(unfinished):
            found = _Writer(unfinished, target, runs, options).write([stopped, target])
            _sync(unfinished)
        _replace(unfinished, target)
        shutil.rmtree(stopped, ignore_errors=True)
    except OSError as error:
        raise StepError(
            f"{target} cannot be written: {error.strerror or error}. What stood there is unchanged"
        ) from error
    size = sum(entry.stat().st_size for entry in target.rglob("*") if entry.is_file())
    return ReportSummary(
        page=target / "index.html", runs=len(runs), total_bytes=size, seconds=time.monotonic() - started, **found
    )


class _Writer:
    """Writes one report into a folder that is not its place yet."""

    def __init__(self, folder: Path, target: Path, runs: Sequence[Run], options: ReportOptions) -> None:
        self.folder, self.target, self.runs, self.options = folder, target, runs, options
        self.columns = Columns()
        self.count = self.pictures = self.unreadable = self.reused = 0
        self._readers = [
            RunReader(run, prompt_column=options.prompt_column, text_limit=options.text_limit) for run in runs
        ]
        self._prices = [Prices(run) for run in runs]
        self._groups: dict[bytes, int] = {}
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._samples: list[list[tuple[int, int, int]]] = [[] for _ in runs]
        self._tiles: list[list[Any]] = []
        self._details: list[dict[str, Any]] = []
        self._prompts: list[str] = []
        self._problems: dict[tuple[Any, ...], dict[str, Any]] = {}

    def write(self, earlier: Sequence[Path]) -> dict[str, Any]:
        """Everything; returns fields of the summary."""
        (self.folder / "data").mkdir()
        expected = sum(int(step.summary.get("images") or 0) for run in self.runs for step in run.steps)
        look = Look(self.options.thumbnail_size, self.options.thumbnail_quality)
        scores = dict.fromkeys(name for reader in self._readers for name in reader.scores)
        ahead: deque[tuple[int, Entry, str | None]] = deque()

        def paths() -> Iterator[str | None]:
            for number, entry in self._all():
                place = None if entry.path is None else find_picture(self.runs[number], entry.path)
                ahead.append((number, entry, place))
                # A path that leads nowhere goes on as it is: why there is no picture is the thumbnail's to say.
                yield place or entry.path

        with (
            (self.folder / SCORED).open("w", encoding="ascii") as scored,
            Workshop(self.folder, earlier, look, self.options.workers, expected) as workshop,
        ):
            for made in workshop.made(paths()):
                number, entry, place = ahead.popleft()
                self._add(number, entry, place, made)
                if entry.path is not None:
                    scored.write(_scored_line(self.runs[number].name, entry, scores))
        self._flush(last=True)
        loaded = self._finish()
        return {
            "pictures": self.pictures,
            "unreadable": self.unreadable,
            "problems": self.count - self.pictures,
            "reused": self.reused,
            "page_bytes": loaded,
        }

    def _all(self) -> Iterator[tuple[int, Entry]]:
        for number, reader in enumerate(self._readers):
            for entries in reader.entries():
                for entry in entries:
                    yield number, entry

    # Entries

    def _add(self, number: int, entry: Entry, place: str | None, made: Thumbnail | None) -> None:
        at = self.count
        self.count += 1
        run = self.runs[number]
        facts = made.facts if made else {}
        prompt = entry.prompt or (facts["prompt"] if isinstance(facts.get("prompt"), str) else "")
        problem = made.problem if made else None
        if entry.path is not None:
            self.pictures += 1
            self.unreadable += problem is not None
            self.reused += bool(made and made.reused)
            self._numbers.setdefault((number, digest_of(entry.path)), at)
            if entry.state == "kept" and not problem:
                self._sample(number, entry, at)
        said = facts.get("prompt")
        asked = said if isinstance(said, str) and said != prompt else ""
        name = Path(entry.path).stem if entry.path else entry.facts.get("request_id", "")
        seconds, usd = self._prices[number].of(name)
        reason = problem[0] if problem and entry.state == "kept" else entry.reason
        group = self._groups.setdefault(_digest(entry.group or prompt or f"\0{at}"), len(self._groups))
        lacking = unscored(entry)
        values: dict[tuple[str, str], Any] = {
            ("picture", "state"): entry.state,
            ("picture", "reason"): reason or None,
            ("picture", "lost in step"): _step_name(run, entry.step) if entry.step else None,
            ("picture", "instruction"): asked or None,
            ("picture", "column"): entry.column or None,
            ("picture", "made in step"): _step_name(run, entry.made) if entry.made else None,
            ("picture", "file"): (problem[0] if problem else "ok") if entry.path else "none",
            ("picture", "id"): name or None,
            ("picture", "seconds"): seconds,
            ("picture", "US dollars"): usd,
            ("system", "run"): float(number),
            ("system", "row"): float(entry.row),
            ("system", "group"): float(group),
            ("system", "prompt"): prompt or None,
            ("system", "place"): float(entry.place),
        }
        if len(self.runs) > 1:
            values["picture", "run"] = run.name
        if made and not problem:
            values["picture", "width"], values["picture", "height"] = made.width, made.height
            values["picture", "file size"] = made.bytes
            values |= {("picture", key): str(facts[key]) for key in ("model", "seed") if facts.get(key) is not None}
        if entry.turn:
            values["picture", "turn"] = entry.turn
        if lacking:
            values["picture", "unscored"] = "; ".join(sorted({f"{score}: {status}" for score, status, _ in lacking}))
        self.columns.put(at, {**values, **entry.values})
        problems_of(self._problems, at, number, run, entry, problem, lacking)
        tile = [
            STATES.index(entry.state),
            (asked or prompt)[:_CAPTION],
            made.width if made and not problem else 0,
            made.height if made and not problem else 0,
            problem[0] if problem else reason,
            (problem[1] if problem else entry.message)[:_CAPTION],
            entry.column,
            entry.turn,
            number,
        ]
        self._tiles.append(tile)
        self._details.append(self._detail(number, entry, place, made, prompt, seconds, usd))
        self._flush()

    def _detail(
        self,
        number: int,
        entry: Entry,
        place: str | None,
        made: Thumbnail | None,
        prompt: str,
        seconds: float | None,
        usd: float | None,
    ) -> dict[str, Any]:
        """All that the page shows of an entry on a click."""
        run = self.runs[number]
        facts = dict(made.facts) if made else {}
        sources = facts.get("images")
        if not isinstance(sources, list):
            sources = [path for path in entry.sources if path != entry.path]
        request = facts.get("request_id")
        again = _is_id(request) and run.has_job
        command = f"dataflow replay {request} --cache {shlex.quote(str(run.folder))}" if again else None
        return {
            "run": number,
            "row": entry.row,
            "state": entry.state,
            "step": _step_name(run, entry.step) if entry.step else None,
            "reason": entry.reason,
            "message": entry.message,
            "column": entry.column,
            "place": entry.place,
            "turn": entry.turn,
            "made": _step_name(run, entry.made) if entry.made else None,
            "prompt": prompt,
            "path": entry.path,
            "link": self._link(place),
            "where": _where(place),
            "size": [made.width, made.height, made.bytes] if made and not made.problem else None,
            "problem": list(made.problem) if made and made.problem else None,
            "seconds": seconds,
            "usd": usd,
            "file": _for_script(facts),
            "scores": [
                [name, _for_script(value), status, error, entry.scored_by.get(name, "")]
                for name, (value, status, error) in entry.scores.items()
            ],
            "cells": entry.facts,
            "from": [self._origin(number, path) for path in sources if isinstance(path, str)],
            "command": command,
        }

    def _origin(self, number: int, path: str) -> list[Any]:
        """What a picture was made from: the entry it has here, or None; its link; its path."""
        place = find_picture(self.runs[number], path)
        return [self._numbers.get((number, digest_of(path))), self._link(place), path]

    def _link(self, place: str | None) -> str | None:
        """Where the page finds the picture itself; None for one that is no file, unless copies were asked for."""
        if place is None:
            return None
        if not is_loose(place):
            return self._copied(place) if self.options.copy_originals else None
        try:
            relative = os.path.relpath(place, self.target)
        except ValueError:  # pragma: no cover - another drive of Windows
            return Path(place).as_uri()
        return quote(relative.replace(os.sep, "/"), safe="/", errors="surrogateescape")

    def _copied(self, place: str) -> str | None:
        name = f"{ORIGINALS}/{_digest(place).hex()}{Path(place).suffix}"
        copy = self.folder / name
        if not copy.exists():
            try:
                data = read_bytes(place)
            except ImageError:
                return None  # why, the thumbnail says
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(data)
        return name

    def _sample(self, number: int, entry: Entry, at: int) -> None:
        """A few kept pictures for the first screen, drawn by their ids: the same ones every time."""
        rank = int.from_bytes(_digest(f"sample {picture_key(entry.path or '')}")[:6], "big")
        heap = self._samples[number]
        # Of a row that has several, the latest made says most of what came of it.
        heapq.heappush(heap, (entry.made, -rank, at))
        if len(heap) > _SAMPLES:
            heapq.heappop(heap)

    # Files

    def _flush(self, *, last: bool = False) -> None:
        for name, held, size in (("tiles", self._tiles, PER_TILES), ("details", self._details, PER_DETAILS)):
            if held and (last or len(held) == size):
                self._script(f"{name}/{(self.count - 1) // size}", held)
                held.clear()

    def _script(self, name: str, value: Any) -> int:
        path = self.folder / "data" / f"{name}.js"
        path.parent.mkdir(exist_ok=True)
        text = call(name, value)
        path.write_text(text, encoding="ascii")
        return len(text)

    def _finish(self) -> int:
        """Columns, charts, sums and the page; returns the bytes that the page loads at first."""
        columns = self.columns.finished(self.count)
        of = {(column.kind, column.name): column for column in columns}
        groups = self._chart_groups(of) if self.count else np.empty(0, dtype=np.int64)
        names = [f"{number}:{part}" for number in range(len(self.runs)) for part in ("kept", "lost")]
        described, charts = [], []
        for number, column in enumerate(columns):
            facts, data = column.finished()
            if not facts["known"]:
                continue
            self._script(f"columns/{number}", data)
            described.append({"id": number, **facts})
            if column.kind == "score" and column.numeric and (shape := column.histogram(groups, names)):
                charts.append({"column": number, "name": column.name, **shape})
        notes = [note for reader in self._readers for note in reader.notes]
        if self.columns.left_out:
            notes.append(f"no room for these columns: {', '.join(sorted(self.columns.left_out))}")
        facts = {
            "title": self.options.title or " · ".join(run.name for run in self.runs),
            "version": __version__,
            "count": self.count,
            "pictures": self.pictures,
            "unreadable": self.unreadable,
            "per": {"thumbs": PER_SCRIPT, "tiles": PER_TILES, "details": PER_DETAILS},
            "thumbnail": self.options.thumbnail_size,
            "states": STATES,
            "groups": len(self._groups),
            "columns": described,
            "charts": charts,
            "runs": [
                run_facts(run, reader, prices, self._chosen(number))
                for number, (run, reader, prices) in enumerate(zip(self.runs, self._readers, self._prices, strict=True))
            ],
            "problems": sorted(self._problems.values(), key=lambda each: (-each["count"], each["reason"])),
            "scored": SCORED,
            "notes": notes,
        }
        loaded = self._script("summary", facts)
        loaded += write_page(self.folder, facts["title"])
        mark = {"version": __version__, "options": asdict(self.options), "runs": [str(run.folder) for run in self.runs]}
        (self.folder / MARK).write_text(json.dumps(mark, indent=2), encoding="ascii")
        return loaded

    def _chart_groups(self, of: dict[tuple[str, str], Any]) -> np.ndarray:
        """For every entry which line of the charts it belongs to: its run, and whether it was kept."""
        run = of["system", "run"].values().astype(np.int64)
        state = of["picture", "state"]
        facts, data = state.finished()
        kept = data["values"].index("kept") if "kept" in facts.get("counts", {}) else -1
        return run * 2 + (np.asarray(data["codes"], dtype=np.int64) != kept)

    def _chosen(self, number: int) -> list[int]:
        """The samples in the order of their rows."""
        return sorted(at for _, _, at in self._samples[number])


def _scored_line(run: str, entry: Entry, scores: Iterable[str]) -> str:
    """A picture with its scores as a row of its own: what choices between pictures are calibrated against."""
    row: dict[str, Any] = {"images": [entry.path], "prompt": entry.prompt, "run": run, "state": entry.state}
    for name in dict.fromkeys((*scores, *entry.scores)):
        # Whoever reads the table wants every column in every row.
        value, status, error = entry.scores.get(name, (None, "not_scored", ""))
        row[name], row[f"{name}_status"], row[f"{name}_by"] = [value], [status], entry.scored_by.get(name, "")
        if error:
            row[f"{name}_error"] = [error]
    return json.dumps(row, ensure_ascii=True) + "\n"


def _step_name(run: Run, number: int) -> str:
    operator = next((step.operator for step in run.steps if step.number == number), "")
    return f"{number} {operator}".strip()


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) == 32 and value.isalnum()


def _where(place: str | None) -> str:
    """Why a picture that is there is no file to be opened."""
    if place is None or is_loose(place):
        return ""
    return "in an object store" if is_url(place) else "in a pack"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _for_script(value: Any) -> Any:
    """JSON whose numbers a browser reads as they are: a seed of 63 bits goes as text, as does what is not finite."""
    if isinstance(value, dict):
        return {str(name): _for_script(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_for_script(each) for each in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if abs(value) < _SAFE_INTEGER else str(value)
    return value if isinstance(value, float) and np.isfinite(value) else str(value)


# The folder -----------------------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.is_dir():
        if any(target.iterdir()) and not (target / MARK).is_file():
            raise InputError("holds something that is no report: name another folder with -o", path=target)
    elif target.exists():
        raise InputError("is a file: name a folder with -o", path=target)


def _put_aside(unfinished: Path, stopped: Path) -> None:
    """Keep the thumbnails of a report that was stopped, unless another process is at it."""
    if not unfinished.is_dir():
        return
    with cache_lock(unfinished):
        pass
    if (unfinished / INDEX).is_file() and not stopped.is_dir():
        unfinished.rename(stopped)
    else:
        shutil.rmtree(unfinished)


def _replace(unfinished: Path, target: Path) -> None:
    (unfinished / ".lock").unlink(missing_ok=True)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        unfinished.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
