"""A first pass over the table, without a look at its pictures: what is exported, what is left out, and the types."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataflow.errors import InputError
from dataflow.export.kinds import NULL, Kind, kind_of, merged, settled
from dataflow.export.layouts import Sampler, is_incomplete, is_misaligned
from dataflow.export.options import ExportOptions
from dataflow.export.records import Assembler
from dataflow.export.samples import LeftOutError, Sample
from dataflow.scores import read_rows
from dataflow.types import BadRow, Row
from dataflow.utils.exact_json import dumps_row

_LOOKED_AT = 1000
_PLAIN = {str: "text", bool: "bool", float: "float", type(None): "null"}


@dataclass(slots=True)
class Survey:
    """What a table has to give.

    Attributes:
        rows: of the table.
        used: rows of which samples are made; ``rows == used + sum(left_out)``.
        left_out: the others by reason.
        incomplete: used rows that have fewer pictures than they asked for.
        samples: to be written.
        misaligned: samples with a score that cannot be given to its picture.
        prompts: different prompts among the samples.
        kinds: the columns with their types, in order.
    """

    rows: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    incomplete: int = 0
    samples: int = 0
    misaligned: int = 0
    prompts: int = 0
    kinds: dict[str, Kind] = field(default_factory=dict)


def column_names(table: Path) -> list[str]:
    """The columns of a table's first rows, in order of appearance."""
    found: dict[str, None] = {}
    for number, row in enumerate(read_rows(table)):
        if number >= _LOOKED_AT:
            break
        if not isinstance(row, BadRow):
            found |= dict.fromkeys(row)
    return list(found)


def samples_of(
    table: Path, sampler: Sampler, options: ExportOptions
) -> Iterator[tuple[int, Row | BadRow, list[Sample] | LeftOutError]]:
    """Every row with its number and its samples, or with why it has none.

    Raises:
        InputError: the scores of a row may be anybody's, or the file cannot be read.
    """
    column = None if options.split_by in ("prompt", "source") else options.split_by
    for number, row in enumerate(read_rows(table), 1):
        if isinstance(row, BadRow):
            yield number, row, LeftOutError("bad_row", row.error)
            continue
        try:
            if column is not None and row.get(column) is None:
                raise LeftOutError("no_group", f"column {column!r}, which decides about the split, is empty")
            found = sampler.samples(row, number)
        except LeftOutError as left:
            yield number, row, left
        except InputError as error:
            raise InputError(error.message, path=table, row=number, field=error.field) from error
        else:
            yield number, row, found


def survey(table: Path, sampler: Sampler, assembler: Assembler, options: ExportOptions, left_out: BinaryIO) -> Survey:
    """Look at every row.

    Args:
        table: the finished table.
        sampler: makes samples of rows.
        assembler: says which columns a sample has.
        options: what splits go by.
        left_out: gets a line of JSON for each row that gives no sample.

    Raises:
        InputError: as :func:`samples_of`.
    """
    found = Survey()
    kinds: dict[str, Kind] = {}
    prompts = array("Q")
    for number, row, samples in samples_of(table, sampler, options):
        found.rows += 1
        if isinstance(samples, LeftOutError):
            found.left_out[samples.reason] += 1
            left_out.write(dumps_row({"row": number, "reason": samples.reason, "message": samples.message}))
            continue
        found.used += 1
        found.incomplete += not isinstance(row, BadRow) and is_incomplete(row, sampler.columns)
        for sample in samples:
            found.samples += 1
            found.misaligned += is_misaligned(sample)
            prompts.append(_hash(sample.prompt))
            for name, value in assembler.outline(sample).items():
                kind = kinds.get(name)
                if kind is None:
                    kinds[name] = kind_of(value)
                elif _PLAIN.get(type(value)) != kind.name:
                    kinds[name] = merged(kind, kind_of(value))
    found.prompts = len(np.unique(np.frombuffer(prompts, dtype=np.uint64))) if prompts else 0
    found.kinds = _settled(kinds, assembler)
    return found


def _settled(kinds: Mapping[str, Kind], assembler: Assembler) -> dict[str, Kind]:
    return {name: settled(merged(kind, assembler.kind(name)) if kind == NULL else kind) for name, kind in kinds.items()}


def _hash(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest())
