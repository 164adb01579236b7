"""The second pass over a table: pictures read side by side, samples written in order to the shards of their splits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dataflow.errors import ImageError
from dataflow.export.files import Shard, Writer
from dataflow.export.layouts import Sampler
from dataflow.export.ledger import Ledger, Place
from dataflow.export.options import ExportOptions
from dataflow.export.pictures import PictureReader
from dataflow.export.records import Assembler
from dataflow.export.samples import LeftOutError, Picture, Sample
from dataflow.export.splits import Splitter
from dataflow.export.survey import samples_of
from dataflow.export.tally import Tally
from dataflow.utils.exact_json import dumps_row

_MOST_WORKERS = 8
_TOGETHER = 4
"""Samples that a thread reads before another may have its turn: handing each over by itself costs more than reading."""

_Wanted = tuple[str, Sample]
_Found = list[Picture] | ImageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is exported, and how.

    Attributes:
        table: the finished table.
        options: threads, shards, splits.
        sampler: makes samples of rows.
        assembler: makes records of samples.
        reader: reads their pictures.
        splitter: knows their splits.
        shard_samples: most samples of a shard.
    """

    table: Path
    options: ExportOptions
    sampler: Sampler
    assembler: Assembler
    reader: PictureReader
    splitter: Splitter
    shard_samples: int


class ShardPass:
    """Writes what no finished shard has dealt with.

    Threads read a few samples at a time and are at most one turn ahead; one shard of each split is open.

    Args:
        work: what is exported.
        writer: of the format.
        ledger: what is finished already.
        progress: called for each sample that is settled.
    """

    def __init__(self, work: Work, writer: Writer, ledger: Ledger, progress: Callable[[], None]) -> None:
        self._work, self._writer, self._ledger, self._progress = work, writer, ledger, progress
        self._most_bytes = work.options.shard_bytes or writer.shard_bytes
        self._open: dict[str, _OpenShard] = {}

    def write(self) -> None:
        """Write all shards that are not finished yet."""
        workers = self._work.options.workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        waiting: deque[tuple[list[_Wanted], Future[list[_Found]]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="export")
        try:
            samples = self._samples()
            while batch := list(islice(samples, _TOGETHER)):
                waiting.append((batch, pool.submit(self._read, batch)))
                if len(waiting) > workers + 1:
                    self._settle_all(*waiting.popleft())
            while waiting:
                self._settle_all(*waiting.popleft())
            for split in list(self._open):
                self._finish(split)
        except BaseException:
            for each in self._open.values():
                with suppress(OSError):
                    each.shard.discard()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, batch: list[_Wanted]) -> list[_Found]:
        """The pictures of some samples, or what is wrong with one of them; in a thread."""
        found: list[_Found] = []
        for _, sample in batch:
            try:
                found.append(self._work.reader.read([slot.path for slot in sample.slots]))
            except ImageError as error:
                found.append(error)
        return found

    def _settle_all(self, batch: list[_Wanted], future: Future[list[_Found]]) -> None:
        for (split, sample), pictures in zip(batch, future.result(), strict=True):
            self._settle(split, sample, pictures)

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        """The samples that no finished shard has dealt with."""
        work = self._work
        column = None if work.options.split_by in ("prompt", "source") else work.options.split_by
        for _, row, samples in samples_of(work.table, work.sampler, work.options):
            if isinstance(samples, LeftOutError):
                continue
            assert isinstance(row, dict)
            group = None if column is None else dumps_row({"group": row[column]}).decode()
            for sample in samples:
                split = self._split(sample, group)
                if self._ledger.covers(split, (sample.row, sample.number)):
                    self._progress()
                else:
                    yield split, sample

    def _split(self, sample: Sample, group: str | None) -> str:
        try:
            return self._work.splitter.split(sample, group)
        except ImageError:  # its source is not there: it is told of where it is read
            return self._work.splitter.names[0]

    def _settle(self, split: str, sample: Sample, pictures: _Found) -> None:
        place: Place = (sample.row, sample.number)
        if isinstance(pictures, ImageError):
            facts = {"reason": pictures.reason, "message": str(pictures), "path": pictures.path}
            self._ledger.add_problem(split, place, facts)
            self._progress()
            return
        ready = self._work.assembler.ready(sample, pictures)
        shard = self._open.get(split)
        if shard is not None and shard.size + ready.size > self._most_bytes:
            self._finish(split)
            shard = None
        if shard is None:
            number = len(self._ledger.shards.get(split, ()))
            shard = self._open[split] = _OpenShard(self._writer.begin(split, number), number, place)
        shard.shard.add(ready)
        shard.tally.add(ready)
        shard.size += ready.size
        shard.last = place
        if shard.tally.samples >= self._work.shard_samples:
            self._finish(split)
        self._progress()

    def _finish(self, split: str) -> None:
        shard = self._open[split]
        told = shard.shard.close()
        del self._open[split]
        record = {"split": split, "number": shard.number, "first": shard.first, "last": shard.last}
        self._ledger.add_shard({**record, "tally": shard.tally.as_json(), **told})


class _OpenShard:
    def __init__(self, shard: Shard, number: int, first: Place) -> None:
        self.shard, self.number, self.first, self.last = shard, number, first, first
        self.tally = Tally()
        self.size = 0
