"""The export itself: two passes over the table, pictures read side by side, shards written in order."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import PIL

from dataflow import __version__
from dataflow.errors import CacheBusyError, ConfigError, StepError
from dataflow.export.card import CardFacts, card
from dataflow.export.files import STAGE, Layout, Writer, chunks, sync, unwritable, write_whole
from dataflow.export.history import History, history_of
from dataflow.export.kinds import Kind, json_columns
from dataflow.export.layouts import Columns, Sampler, find_columns
from dataflow.export.ledger import Ledger, changes, planned
from dataflow.export.options import ExportOptions
from dataflow.export.pictures import PictureReader
from dataflow.export.presets import Packing, Preset, find_preset, packing_of, plain_preset
from dataflow.export.records import Assembler
from dataflow.export.shards import ShardPass, Work
from dataflow.export.splits import Splitter
from dataflow.export.survey import Survey, column_names, survey
from dataflow.export.writers import writer_for
from dataflow.runtime.lock import cache_lock
from dataflow.utils.exact_json import dumps_row

INDEX, CARD, LEFT_OUT, SUMS = "index.json", "README.md", "left_out.jsonl", "SHA256SUMS"
_OWN = (INDEX, CARD, LEFT_OUT, SUMS)
_SAMPLES = 10_000
_VERSION = 1
"""Of the files' arrangement: another one cannot go on with an export of this one."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What became of a table. ``rows == used + sum(left_out)`` and ``samples == written + sum(problems)``, always.

    Attributes:
        output: the dataset's folder.
        format: how the files are laid out.
        layout: what a sample is.
        preset: whose columns they have, or None.
        rows: of the table.
        used: rows that samples were made of.
        left_out: the others by reason.
        samples: that were to be written.
        written: that were.
        problems: the others, by what is wrong with a picture of theirs.
        splits: written samples by split.
        images: pictures in the written samples.
        bytes: of the pictures.
        shards: finished parts.
        resumed: of them, those that an earlier run had finished.
        prompts: different prompts.
        incomplete: used rows with fewer pictures than they asked for.
        misaligned: samples with a score that could not be given to its picture and is null.
        other_prompts: samples whose picture says that it was made from another prompt.
        json_columns: columns with values of several types.
        seconds: wall time of this run.
    """

    output: str
    format: str
    layout: str
    preset: str | None
    rows: int
    used: int
    left_out: Mapping[str, int]
    samples: int
    written: int
    problems: Mapping[str, int]
    splits: Mapping[str, int]
    images: int
    bytes: int
    shards: int
    resumed: int
    prompts: int
    incomplete: int
    misaligned: int
    other_prompts: int
    json_columns: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def balanced(self) -> bool:
        """Whether the counts add up."""
        return (
            self.rows == self.used + sum(self.left_out.values())
            and self.samples == self.written + sum(self.problems.values())
            and self.written == sum(self.splits.values())
        )


def export(
    table: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a finished table as a dataset.

    A killed export goes on behind its last finished shard, to the same bytes. A finished one is left as it is.

    Args:
        table: of any format that steps are written in.
        output: the dataset's folder: a new or empty one, or one that holds an export of the same table.
        options: how; None for a WebDataset of text and images, or of edits where the table holds some.
        progress: told how many samples are settled, and of how many.

    Returns:
        What was written and what was not.

    Raises:
        ConfigError: the options do not go together or with the table; the folder holds something else.
        InputError: the table, or one of its columns, cannot be used.
        MissingExtraError: a library that the format needs is not installed.
        CacheBusyError: another process exports to the folder.
        StepError: the disk is full, or the table changed while it was read.
    """
    options = options or ExportOptions()
    source, target = Path(table).absolute(), Path(output).absolute()
    started = time.monotonic()
    try:
        job = _Export(source, target, options)
        summary = job.run(progress or _silent)
    except OSError as error:
        raise unwritable(target, error) from error
    return replace(summary, seconds=time.monotonic() - started)


class _Export:
    """One call of :func:`export`."""

    def __init__(self, table: Path, output: Path, options: ExportOptions) -> None:
        self.table, self.output, self.options = table, output, options
        self.stage = output / STAGE
        self.history: History = history_of(table)
        preset = find_preset(options)
        names = column_names(table)
        if options.split_by not in ("prompt", "source", *names) and names:
            raise ConfigError(f"export: split_by is {options.split_by!r}, and the table has no such column")
        self.columns = _columns(names, options, preset, self.history)
        self.preset: Preset = preset or plain_preset(options.format, self.columns.layout)
        self.packing: Packing = packing_of(self.preset, options.format)
        self.sampler = Sampler(self.columns, options, self.history.scores_of)
        self.assembler = Assembler(options, self.preset)
        self.reader = PictureReader(options, (Path.cwd(), table.parent, *self.history.folders))
        self.splitter = Splitter(options, lru_cache(maxsize=4096)(self.reader.digest))
        if options.split_by == "source" and self.columns.source is None:
            raise ConfigError("export: split_by is 'source', and the samples have no source pictures")
        self._check_together()
        if self.packing == "parts" and len(self.splitter.names) > 1:
            raise ConfigError(f"export: the layout of {self.preset.name} has no splits: leave validation and test out")

    def _check_together(self) -> None:
        """Options that another format or preset would leave without effect."""
        options = self.options
        for name, given, only in (
            ("captions", options.captions, "folder"),
            ("copy_images", options.copy_images, "jsonl"),
            ("base_url", options.base_url is not None, "jsonl"),
        ):
            if given and self.packing != only:
                raise ConfigError(f"export: {name} is for the format {only}, and this is {self.packing}")
        if options.base_url is not None and options.touches_pixels:
            raise ConfigError("export: base_url names pictures as they are elsewhere: leave size and format out")
        if options.published_only and not self.preset.columns:
            raise ConfigError("export: published_only needs a preset that has columns of its own")

    def run(self, progress: Progress) -> ExportSummary:
        plan = self._plan()
        self._make_room(plan)
        finished = self._finished(plan)
        if finished is not None:
            return finished
        self.stage.mkdir(parents=True, exist_ok=True)
        try:
            with cache_lock(self.stage):
                summary = self._write(plan, progress)
        except CacheBusyError as error:
            raise CacheBusyError(str(error).replace("use another cache_path", "export to another folder")) from error
        shutil.rmtree(self.stage, ignore_errors=True)
        return summary

    def _plan(self) -> dict[str, Any]:
        """Everything that decides about the bytes that are written."""
        with self.table.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "version": _VERSION,
            "software": f"open-dataflow {__version__}, Pillow {PIL.__version__}" + _versions(self.packing),
            "table": digest,
            # What is said and what is found out for oneself may come to the same.
            "options": {**self.options.facts(), "format": self.packing, "layout": self.columns.layout},
        }

    # What is there already

    def _make_room(self, plan: Mapping[str, Any]) -> None:
        """Refuse, or clear, a folder that holds something else."""
        there = self._index()
        old = None if there is None else there["plan"]
        old = planned(self.stage / "journal") if old is None else old
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"{self.output} is a file: export to a folder")
        if old is None:
            if self.output.exists() and any(name != STAGE for name in os.listdir(self.output)):
                raise ConfigError(f"{self.output} holds other files: export to a new or an empty folder")
            return
        if old == plan and (there is None or not self.options.overwrite):
            return
        if not self.options.overwrite:
            what = "a finished" if there is not None else "an unfinished"
            told = "; ".join(changes(old, plan)[:5])
            raise ConfigError(
                f"{self.output} holds {what} export of something else ({told}): "
                "export to another folder, or begin anew with --overwrite"
            )
        self._clear()

    def _clear(self) -> None:
        """Remove what an earlier export wrote, and nothing else."""
        entries = [*((self._index() or {}).get("entries") or ()), *_entries(self.stage / "entries.json"), *_OWN]
        for pattern in entries:
            for path in list(self.output.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(self.stage, ignore_errors=True)

    def _index(self) -> dict[str, Any] | None:
        try:
            found = orjson.loads((self.output / INDEX).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("plan"), dict) else None

    def _finished(self, plan: Mapping[str, Any]) -> ExportSummary | None:
        index = self._index()
        if index is None or index["plan"] != plan:
            return None
        for file in index["files"]:
            path = self.output / file["name"]
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise ConfigError(f"{path} is missing or has another size: write the export anew with --overwrite")
        shutil.rmtree(self.stage, ignore_errors=True)
        facts = {**index["summary"], "json_columns": tuple(index["summary"]["json_columns"])}
        return ExportSummary(output=str(self.output), resumed=facts["shards"], **facts)

    # Writing

    def _write(self, plan: Mapping[str, Any], progress: Progress) -> ExportSummary:
        signature = _signature(self.table)
        with (self.stage / LEFT_OUT).open("wb") as file:
            found = survey(self.table, self.sampler, self.assembler, self.options, file)
            sync(file)
        if found.kinds:
            self.assembler.check(list(found.kinds))
        layout = Layout(self.output, self.splitter.names, found.kinds)
        writer = writer_for(self.packing, layout, self.preset, self.options, self.table.parent)
        write_whole(self.stage / "entries.json", [orjson.dumps(writer.entries)])
        ledger = Ledger(self.stage / "journal", plan)
        ledger.open(writer.has)
        try:
            self._sweep(ledger)
            resumed = sum(map(len, ledger.shards.values()))
            ShardPass(self._work(), writer, ledger, _counter(progress, found.samples)).write()
            if _signature(self.table) != signature:
                raise StepError(f"{self.table} changed while it was exported: export again")
            return self._end(plan, found, writer, ledger, resumed)
        finally:
            ledger.close()

    def _work(self) -> Work:
        return Work(
            table=self.table,
            options=self.options,
            sampler=self.sampler,
            assembler=self.assembler,
            reader=self.reader,
            splitter=self.splitter,
            shard_samples=self.options.shard_samples or self.preset.shard_samples or _SAMPLES,
        )

    def _sweep(self, ledger: Ledger) -> None:
        """Remove what a killed run left half-written."""
        known = {"journal", "entries.json", LEFT_OUT, ".lock", ".lock.owner"}
        known |= {
            Path(file["name"]).name
            for records in ledger.shards.values()
            for record in records
            for file in record["files"]
            if file["name"].startswith(f"{STAGE}/")
        }
        for path in list(self.stage.iterdir()):
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _end(
        self, plan: Mapping[str, Any], found: Survey, writer: Writer, ledger: Ledger, resumed: int
    ) -> ExportSummary:
        """Everything that is written when all shards are there; the index, last, makes it an export."""
        splits = [split for split in self.splitter.names if ledger.shards.get(split)] or [self.splitter.names[0]]
        tallies = {split: ledger.tally(split) for split in splits}
        problems = Counter(record["reason"] for split in self.splitter.names for record in ledger.problems(split))
        files = writer.finish(ledger.shards)
        write_whole(self.output / LEFT_OUT, self._left_out(ledger))
        facts = CardFacts(
            options=self.options,
            preset=self.preset,
            columns=self.columns,
            kinds=found.kinds,
            files=writer.card(),
            splits=tallies,
            rows=found.rows,
            left_out=found.left_out,
            problems=problems,
            prompts=found.prompts,
            history=self.history,
        )
        write_whole(self.output / CARD, [card(facts).encode("utf-8", "replace")])
        write_whole(self.output / SUMS, self._sums(files, writer, ledger))
        summary = ExportSummary(
            output=str(self.output),
            format=self.packing,
            layout=self.columns.layout,
            preset=self.options.preset,
            rows=found.rows,
            used=found.used,
            left_out=dict(sorted(found.left_out.items())),
            samples=found.samples,
            written=sum(each.samples for each in tallies.values()),
            problems=dict(sorted(problems.items())),
            splits={split: each.samples for split, each in tallies.items()},
            images=sum(each.images for each in tallies.values()),
            bytes=sum(each.bytes for each in tallies.values()),
            shards=sum(map(len, ledger.shards.values())),
            resumed=resumed,
            prompts=found.prompts,
            incomplete=found.incomplete,
            misaligned=found.misaligned,
            other_prompts=sum(each.other_prompts for each in tallies.values()),
            json_columns=tuple(json_columns(found.kinds)),
        )
        body = {name: value for name, value in asdict(summary).items() if name not in ("output", "resumed", "seconds")}
        index = {
            "summary": body,
            "columns": {name: _described(kind) for name, kind in found.kinds.items()},
            "shards": [_shard_facts(record) for records in ledger.shards.values() for record in records],
            "files": files,
            "entries": writer.entries,
            "plan": plan,
        }
        write_whole(self.output / INDEX, [orjson.dumps(index, option=orjson.OPT_INDENT_2), b"\n"])
        return summary

    def _left_out(self, ledger: Ledger) -> Iterator[bytes]:
        yield from chunks(self.stage / LEFT_OUT)
        for split in self.splitter.names:
            for record in ledger.problems(split):
                row, number = record["at"]
                facts = {name: record[name] for name in ("reason", "message", "path")}
                yield dumps_row({"row": row, "sample": number, "split": split, **facts})

    def _sums(self, files: Sequence[Mapping[str, Any]], writer: Writer, ledger: Ledger) -> Iterator[bytes]:
        for file in files:
            yield f"{file['sha256']}  {file['name']}\n".encode()
        yield from writer.sums(ledger.shards)


def _silent(done: int, total: int) -> None:
    """No progress."""


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    settled = count(1)
    return lambda: progress(next(settled), total)


def _columns(names: list[str], options: ExportOptions, preset: Preset | None, history: History) -> Columns:
    if not names:
        # An empty table: nothing will be looked up.
        layout = options.layout or (preset.layout if preset else "text_image")
        return Columns(layout=layout, image="images", source=None, prompt="prompt", rejected=None)
    return find_columns(names, options, preset.layout if preset else None, history.prompts)


def _shard_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    tally = record["tally"]
    return {
        "split": record["split"],
        "number": record["number"],
        **{name: tally[name] for name in ("samples", "images", "bytes")},
        "files": [file for file in record["files"] if not file["name"].startswith(f"{STAGE}/")],
        **({"folder": record["folder"]} if "folder" in record else {}),
    }


def _described(kind: Kind) -> Any:
    if kind.name == "list" and kind.item is not None:
        return [_described(kind.item)]
    return {name: _described(each) for name, each in kind.fields.items()} if kind.name == "object" else kind.name


def _signature(table: Path) -> tuple[int, int]:
    status = table.stat()
    return status.st_size, status.st_mtime_ns


def _entries(path: Path) -> list[str]:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return []


def _versions(packing: Packing) -> str:
    """The library that writes the files, where it decides about their bytes."""
    if packing not in ("parquet", "parquet_tar", "parts", "lance"):
        return ""
    from dataflow.utils.parquet import libraries

    return f", pyarrow {libraries()[0].__version__}"
