"""Parts of a long table: each is run, and marked as finished, like a small table of its own.

A part has its own journal, sum and table under ``journal/{step}/part-{number}``. Its *mark* stands for everything that
the answers of its rows follow from. A later run takes a part whose mark is the same for finished without reading its
journal or planning its rows, so that going on costs what is left and not what is done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflow.errors import InputError
from dataflow.io import ImageIO
from dataflow.runtime.identity import ORIGIN_BYTES, Identifier
from dataflow.runtime.journal import Index, Journal
from dataflow.runtime.table import journal_folder, load_summary, signature_of
from dataflow.runtime.tally import SUMS
from dataflow.types import BadRow, ImageStore, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage, TableWriter
from dataflow.utils.tables import Piece, read_lines

PART_ROWS = 100_000
"""Lines of a part."""
MARK_ROWS = 32
"""Rows of a part that are planned to see whether the operator asks for the same as before."""
SAMPLE_IMAGES = 64
"""Images of a finished part that are looked for on disk."""

_LAYOUT = "parts.json"


class PartStorage(FileStorage):
    """A storage that shows one part of a step's table.

    Args:
        whole: at the step.
        number: of the part, from 0.
        piece: its lines.
    """

    def __init__(self, whole: FileStorage, number: int, piece: Piece) -> None:
        self.__dict__.update(whole.__dict__)
        self._whole_step = whole.step_name
        self.number, self.piece = number, piece

    @property
    def step_name(self) -> str:
        return f"{self._whole_step}/part-{self.number:05d}"

    @property
    def output_path(self) -> Path:
        return journal_folder(self) / "table"

    @property
    def dropped_path(self) -> Path:
        return journal_folder(self) / "dropped"

    @property
    def rows_before(self) -> int:
        return self.piece.first_row

    def iter_rows(self):
        return read_lines(self.input_path, self.piece)

    def count_rows(self) -> int:
        return self.piece.rows

    def content_signature(self) -> object:
        return self.piece.digest

    def open_writer(self) -> TableWriter:
        return TableWriter(self.output_path, "jsonl")


@dataclass(slots=True)
class Part:
    """One part of a step.

    Attributes:
        storage: at it.
        mark: stands for everything its answers follow from.
        known: what its last run left; {} where there was none.
    """

    storage: PartStorage
    mark: str
    known: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its journal lies."""
        return journal_folder(self.storage)

    @property
    def origins_path(self) -> Path:
        """What its drafts have in common with identical ones of other parts."""
        return self.folder / f"origins-{self.mark[:16]}.u64"

    def is_finished(self, store: ImageStore | None) -> bool:
        """Whether every row has its answer: the mark is the same, the table untouched, and its images seem to be there.

        Args:
            store: is asked for a sample of the images.
        """
        known = self.known
        return (
            known.get("mark") == self.mark
            and known.get("output") is not None
            and not known["pending"]
            and known["output_signature"] == signature_of(self.storage.output_path)
            and self.origins_path.is_file()
            and (store is None or _all_there(store, known["sample"]))
        )

    def is_settled(self, retry: frozenset[str] | None) -> bool:
        """Whether a run of the finished part would ask for nothing again."""
        reasons = self.known["reasons"]
        return not self.known["failed"] if retry is None else not retry.intersection(reasons)

    def written_at(self) -> float:
        """When its sum was written, in seconds since 1970 by the file system's clock."""
        return (self.folder / "summary.json").stat().st_mtime

    def spent(self) -> float:
        """US dollars that its calls have cost, and those that calls which broke off may have."""
        if self.known.get("mark") == self.mark and "risk" in self.known:
            return self.known["usd"] + self.known["risk"]
        index = Journal(self.folder).load()
        return index.usd + index.risk

    def summary(self) -> Summary:
        """The sum its last run left; before there was one, all rows are pending."""
        rows = self.storage.piece.rows
        if self.known.get("mark") != self.mark or self.known["rows"] != rows:
            return Summary(step=self.storage.step_name, rows=rows, pending=rows)
        kept = {name: self.known[name] for name in (*SUMS, "reasons", "output")}
        return Summary(step=self.storage.step_name, rows=rows, **kept)


def cut(plan: Plan, serving: Serving, storage: FileStorage, lines: int) -> list[Part]:
    """The parts of a step's table; none if it is not longer than ``lines``, or no JSON Lines.

    Raises:
        InputError: the table cannot be read.
        ConfigError: the model the requests' identity depends on cannot be found.
    """
    pieces = storage.pieces(lines)
    if len(pieces) < 2:
        return []
    found = []
    for number, piece in enumerate(pieces):
        part = PartStorage(storage, number, piece)
        found.append(Part(part, _mark(plan, serving, part), load_summary(journal_folder(part)) or {}))
    return found


def _mark(plan: Plan, serving: Serving, part: PartStorage) -> str:
    """A hash over the lines, the model and its settings, what the first rows ask for, and how they are folded."""
    identifier = identifier_of(plan, serving, part)
    place = serving.image_io.path("") if serving.image_io else ""
    basis = [plan.name, plan.inputs, plan.outputs, plan.folding, part.piece.digest, part.piece.rows, place]
    mark = hashlib.sha256(json.dumps(basis).encode())
    for row in itertools.islice(part.iter_rows(), MARK_ROWS):
        mark.update(_asks_for(plan, identifier, row))
    return mark.hexdigest()


def _asks_for(plan: Plan, identifier: Identifier, row: Row | BadRow) -> bytes:
    if isinstance(row, BadRow):
        return b"bad"
    try:
        return b"".join(identity.key for identity in identifier.identify(plan.requests(row)))
    except InputError as error:
        return str(error).encode(errors="replace")


def _all_there(store: ImageStore, sample: Sequence[tuple[str, int]]) -> bool:
    expected = dict(sample)
    return dict(store.sizes(expected)) == expected


def facts(part: Part, index: Index, requests: int) -> dict[str, object]:
    """What is kept with the sum of a part that has its table, beside the sum itself.

    Args:
        part: which.
        index: what its journal says.
        requests: of its rows.
    """
    return {"mark": part.mark, "risk": index.risk, "requests": requests, "sample": index.sample(SAMPLE_IMAGES)}


def existing_images(serving: Serving, index: Index, storage: FileStorage) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of the image files there are: of a part of a table, those alone that its journal names."""
    if serving.image_io is None:
        return iter(())
    if isinstance(storage, PartStorage):
        return serving.image_io.sizes(index.files())
    return serving.image_io.existing()


class Origins:
    """Counts drafts of earlier parts that are identical to one, by eight bytes each."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []

    def add(self, part: Part) -> None:
        """Count those that were kept of a part."""
        self._new.append(np.fromfile(part.origins_path, np.uint64))

    def take(self, origins: bytes | bytearray) -> None:
        """Count those of a part, as its :class:`~dataflow.runtime.identity.Identifier` has them."""
        self._new.append(_in_order(origins))

    def count(self, origin: bytes) -> int:
        """How many there are."""
        if self._new:
            self._known = np.concatenate([self._known, *self._new])
            self._known.sort(kind="stable")  # of sorted runs: merges them
            self._new = []
        known, value = self._known, np.uint64(int.from_bytes(origin))
        first = int(known.searchsorted(value))
        if first == len(known) or known[first] != value:
            return 0
        return int(known.searchsorted(value, "right")) - first


def save_origins(part: Part, origins: bytes | bytearray) -> None:
    """Keep what the drafts of a part have in common with identical ones, in ascending order.

    Args:
        part: which.
        origins: as its :class:`~dataflow.runtime.identity.Identifier` has them.

    Raises:
        OSError: the file cannot be written.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    temporary = part.origins_path.with_suffix(".tmp")
    _in_order(origins).tofile(temporary)
    temporary.replace(part.origins_path)


def find_origins(part: Part, plan: Plan, serving: Serving) -> bytearray:
    """What the drafts of a part that another process makes have in common with identical ones: its rows are planned."""
    identifier = identifier_of(plan, serving, part.storage)
    for row in part.storage.iter_rows():
        _asks_for(plan, identifier, row)
    return identifier.origins


def _in_order(origins: bytes | bytearray) -> np.ndarray:
    return np.sort(np.frombuffer(origins, f">u{ORIGIN_BYTES}").astype(np.uint64))


def identifier_of(
    plan: Plan, serving: Serving, storage: FileStorage, earlier: Callable[[bytes], int] | None = None
) -> Identifier:
    """Gives the requests of a table, or of a part of one, their identity."""
    return Identifier(
        serving, plan.seed, resolve=storage.resolve, digest=ImageIO(storage.cache_path).digest, earlier=earlier
    )


def lines_of_parts(storage: FileStorage) -> int:
    """How many lines the parts of a step have had so far."""
    return _layout(storage)["lines"]


def keep_layout(storage: FileStorage, parts: Sequence[Part], lines: int, *, mixed: bool) -> None:
    """Write down how a step's table is cut, for later runs.

    Raises:
        OSError: the file cannot be written.
    """
    path = journal_folder(storage) / _LAYOUT
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"lines": lines, "pieces": [part.storage.piece for part in parts], "mixed": mixed}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(layout))
    temporary.replace(path)


def _layout(storage: FileStorage) -> Mapping[str, Any]:
    folder = journal_folder(storage)
    try:
        return json.loads((folder / _LAYOUT).read_bytes())
    except (FileNotFoundError, ValueError):
        return {"lines": PART_ROWS, "pieces": [], "mixed": any(folder.glob("part-*/*.jsonl"))}


def is_mixed(storage: FileStorage, parts: Sequence[Part]) -> bool:
    """Whether a row's record may lie in the journal of another part: rows were put in or taken out since the first run.

    Rows that are added at the end move no other.
    """
    folder, before = journal_folder(storage), _layout(storage)
    mixed = bool(before["mixed"]) or any(folder.glob("*.jsonl"))
    old = [Piece(*piece) for piece in before["pieces"]]
    for number, piece in enumerate(old):
        if not any((folder / f"part-{number:05d}").glob("*.jsonl")):
            continue
        last = number == len(old) - 1
        here = parts[number].storage if number < len(parts) else None
        mixed = mixed or here is None or not _begins_with(here, piece, grown=last)
    return mixed


def _begins_with(part: PartStorage, old: Piece, *, grown: bool) -> bool:
    """Whether a part's lines are those it had before, or, where it may have grown, begin with them."""
    if part.piece.digest == old.digest:
        return True
    length = old.end - old.start
    if not grown or part.piece.end - part.piece.start < length:
        return False
    digest = hashlib.sha256()
    with part.input_path.open("rb") as file:
        file.seek(part.piece.start)
        while length and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest() == old.digest
