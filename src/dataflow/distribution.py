"""How the pictures of a whole table stand to those of another: distances and coverage over vectors made before.

The vectors are those an embedding serving left in its store and named in a column; nothing is computed from pictures
here. Every report says how many pictures it rests on, which model made the vectors and what they were compared with:
these figures depend on all three, and most of them on the number of pictures, so that tables are compared at equal
numbers only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError
from dataflow.metrics import distribution as formulas
from dataflow.types import BadRow, Row
from dataflow.utils.storage import FileStorage
from dataflow.utils.vectors import VectorStore

FloatArray = npt.NDArray[np.float64]

METRICS = ("frechet", "kid", "precision", "recall", "density", "coverage", "cmmd", "vendi")
"""``frechet`` is FID's formula on the vectors of any model; it is FID only on those of the original Inception
network."""
ALONE = ("vendi",)
FLOOR = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """The vectors of a table's pictures.

    Attributes:
        source: the table.
        rows: shape (n, d), one for each picture that has one, in the table's order.
        model: who made them.
        store: the folder they lie in.
        expected: pictures there should have been.
        missing: pictures without a vector, by status.
    """

    source: str
    rows: FloatArray
    model: str
    store: str
    expected: int
    missing: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of the expected pictures, those with a vector."""
        return len(self.rows) / self.expected if self.expected else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one table's pictures come to.

    Attributes:
        source: the table.
        reference: what it was compared with; None where nothing was.
        model: who made the vectors.
        count: pictures it rests on.
        reference_count: likewise; None where nothing was compared.
        reference_digest: of the reference's vectors.
        expected: pictures the table should have had.
        missing: those without a vector, by status.
        seed: of the sample and of KID's subsets.
        values: by metric; ``kid`` with its standard deviation over subsets as ``kid_std``.
    """

    source: str
    reference: str | None
    model: str
    count: int
    reference_count: int | None
    reference_digest: str | None
    expected: int
    missing: Mapping[str, int]
    seed: int
    values: Mapping[str, float]


def read(table: str | Path, vectors: str | Path, key: str = "vector") -> Vectors:
    """The vectors that a table's column names.

    Args:
        table: a step's table.
        vectors: folder of the vector stores.
        key: column that an :class:`~dataflow.operators.ImageEvaluator` with an embedding serving wrote.

    Raises:
        InputError: no such table or column, vectors of several models, or none at all.
    """
    keys: list[str] = []
    stores: Counter[str] = Counter()
    models: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for entry, status, model in _entries(Path(table), key):
        if entry is None:
            missing[status] += 1
            continue
        keys.append(str(entry["sha256"]))
        stores[str(entry["store"])] += 1
        models[model] += 1
    if not keys:
        raise InputError("no picture has a vector: run ImageEvaluator with an embedding serving", path=table, field=key)
    if len(stores) > 1:
        raise InputError(f"the vectors are of several models: {', '.join(sorted(models))}", path=table, field=key)
    store = next(iter(stores))
    found = [row for row in VectorStore(Path(vectors) / store).find(keys) if row is not None]
    if len(found) < len(keys):
        missing["not_in_store"] += len(keys) - len(found)
    return Vectors(
        source=str(table),
        rows=np.asarray(found, dtype=np.float64).reshape(len(found), -1),
        model=next(iter(models)),
        store=store,
        expected=len(keys) + missing.total() - missing["not_in_store"],
        missing=dict(missing),
    )


def compare(
    tables: Sequence[Vectors],
    reference: Vectors | None = None,
    *,
    metrics: Sequence[str] = METRICS,
    sample: int | None = None,
    seed: int = 2020,
    force: bool = False,
) -> list[Report]:
    """Each table against the reference, at equal numbers of pictures.

    Args:
        tables: at least one.
        reference: what they are compared with; None for the metrics that need none (``vendi``).
        metrics: of :data:`METRICS`.
        sample: pictures to draw from each table; None for all of them.
        seed: of the draw, and of KID's subsets.
        force: compare also where more than one in a hundred pictures of a table has no vector.

    Raises:
        InputError: tables of unequal numbers, of other models, with too many gaps, or too few pictures.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise InputError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if reference is None and any(name not in ALONE for name in metrics):
        raise InputError(f"only {', '.join(ALONE)} needs no reference to compare with")
    for each in [*tables, *([reference] if reference else [])]:
        if each.store != tables[0].store:
            raise InputError(
                f"vectors of two models cannot be compared: {tables[0].model} and {each.model}", path=each.source
            )
    for each in tables:
        if each.share < FLOOR and not force:
            lacking = ", ".join(f"{count} {status}" for status, count in sorted(each.missing.items()))
            raise InputError(
                f"{each.expected - len(each.rows)} of {each.expected} pictures have no vector ({lacking}):"
                " what is left is another distribution. force compares nevertheless",
                path=each.source,
            )
    drawn = [_drawn(each.rows, sample, seed, each.source) for each in tables]
    counts = sorted({len(rows) for rows in drawn})
    if len(counts) > 1:
        raise InputError(
            f"the tables have {counts[0]} to {counts[-1]} pictures, and these figures depend on the number:"
            f" compare samples of {counts[0]}"
        )
    against = None if reference is None else reference.rows
    return [
        Report(
            source=each.source,
            reference=None if reference is None else reference.source,
            model=each.model,
            count=len(rows),
            reference_count=None if against is None else len(against),
            reference_digest=None if against is None else hashlib.sha256(against.tobytes()).hexdigest()[:12],
            expected=each.expected,
            missing=each.missing,
            seed=seed,
            values=_values(rows, against, metrics, seed, each.source),
        )
        for each, rows in zip(tables, drawn, strict=True)
    ]


def _values(
    rows: FloatArray, reference: FloatArray | None, metrics: Sequence[str], seed: int, source: str
) -> dict[str, float]:
    found: dict[str, float] = {}
    try:
        if reference is not None:
            if "frechet" in metrics:
                found["frechet"] = formulas.fid(formulas.Moments.of(reference), formulas.Moments.of(rows))
            if "kid" in metrics:
                size = min(1000, len(rows), len(reference))
                kid = formulas.kid(reference, rows, subset_size=size, seed=seed)
                found["kid"], found["kid_std"] = kid.mean, kid.std
            if {"precision", "recall", "density", "coverage"} & set(metrics):
                both = formulas.prdc(reference, rows)._asdict()
                found |= {name: value for name, value in both.items() if name in metrics}
            if "cmmd" in metrics:
                found["cmmd"] = formulas.cmmd(reference, rows)
        if "vendi" in metrics:
            found["vendi"] = formulas.vendi_score(rows)
    except ValueError as error:
        raise InputError(str(error), path=source) from error
    return found


def _drawn(rows: FloatArray, sample: int | None, seed: int, source: str) -> FloatArray:
    if sample is None:
        return rows
    if not 0 < sample <= len(rows):
        raise InputError(f"a sample of {sample} cannot be drawn from {len(rows)} pictures", path=source)
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))]


def _entries(table: Path, key: str) -> Iterator[tuple[Mapping[str, Any] | None, str, str]]:
    """Each picture's entry, its status and who made it; rows that are no rows count as one failed picture."""
    for row in FileStorage(str(table)).step().iter_rows():
        if isinstance(row, BadRow):
            yield None, "bad_row", ""
            continue
        if key not in row:
            raise InputError("the row has no such column: has the embedder run?", path=table, field=key)
        yield from _of_row(row, key)


def _of_row(row: Row, key: str) -> Iterator[tuple[Mapping[str, Any] | None, str, str]]:
    entries, statuses = row[key], row.get(f"{key}_status")
    entries = entries if isinstance(entries, list) else [entries]
    statuses = statuses if isinstance(statuses, list) else [statuses] * len(entries)
    model = str(row.get(f"{key}_by"))
    for entry, status in zip(entries, statuses, strict=False):
        good = isinstance(entry, Mapping) and {"sha256", "store"} <= entry.keys()
        yield (entry if good else None), str(status or "failed"), model
