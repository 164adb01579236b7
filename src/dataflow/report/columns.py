"""What entries can be sorted and filtered by: a column of numbers or of texts each, in a script of its own."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_CATEGORIES = 60
MOST_COLUMNS = 150
_BINS = 40
_FEW_VALUES = 12


class Column:
    """One column, some bytes an entry: numbers as they are, every different text once.

    Args:
        kind: ``score``, ``row`` or ``picture``: whose it is.
        name: its name.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self._numbers = array("d")
        self._codes = array("i")
        self._texts: dict[str, int] = {}
        self._only_bools = True

    def put(self, at: int, value: float | str | bool | None) -> None:
        """The value of entry ``at``; entries come in order, and those that say nothing may be left out."""
        self.fill(at)
        if isinstance(value, str):
            self._numbers.append(math.nan)
            self._codes.append(self._texts.setdefault(value, len(self._texts)))
            return
        self._codes.append(-1)
        if value is None:
            self._numbers.append(math.nan)
            return
        self._only_bools = self._only_bools and isinstance(value, bool)
        try:
            self._numbers.append(float(value))
        except OverflowError:
            self._numbers.append(math.inf if value > 0 else -math.inf)

    def fill(self, count: int) -> None:
        """Nothing for all entries up to ``count``."""
        missing = count - len(self._numbers)
        if missing > 0:
            self._numbers.extend([math.nan] * missing)
            self._codes.extend([-1] * missing)

    @property
    def numeric(self) -> bool:
        return not self._texts and not self._only_bools

    def values(self) -> np.ndarray:
        """The numbers, NaN where there is none."""
        return np.frombuffer(self._numbers, dtype=np.float64) if self._numbers else np.empty(0)

    def finished(self) -> tuple[dict[str, Any], Any]:
        """What the page has to know of the column beforehand, and its data."""
        values = self.values()
        known = np.isfinite(values)
        facts: dict[str, Any] = {"kind": self.kind, "name": self.name}
        if self.numeric:
            if known.any():
                facts |= {"type": "number", "min": float(values[known].min()), "max": float(values[known].max())}
            return {"type": "number", **facts, "known": int(known.sum())}, [_short(each) for each in values.tolist()]
        codes = self._codes
        if not self._texts:
            names: list[str] = ["no", "yes"]
            codes = array("i", (-1 if math.isnan(each) else int(each) for each in self._numbers))
        else:
            for at in np.flatnonzero(known).tolist():
                codes[at] = self._texts.setdefault(f"{values[at]:g}", len(self._texts))
            names = list(self._texts)
        counts = np.bincount(np.asarray(codes, dtype=np.int64) + 1, minlength=len(names) + 1)[1:]
        facts |= {"type": "category" if len(names) <= MOST_CATEGORIES else "text", "known": int(counts.sum())}
        if facts["type"] == "category":
            facts["counts"] = dict(zip(names, counts.tolist(), strict=True))
        return facts, {"values": names, "codes": codes.tolist()}

    def histogram(self, groups: np.ndarray, names: Sequence[str]) -> dict[str, Any] | None:
        """How often which values are, for each group of entries.

        Args:
            groups: per entry the place of its group's name, or -1 for none.
            names: of the groups.

        Returns:
            ``edges`` (n + 1) or, of few different values, ``values`` (n); ``counts`` by group; the median by group.
            None where there is nothing to show.
        """
        values = self.values()
        use = np.isfinite(values) & (groups >= 0)
        if not use.any():
            return None
        found, of = values[use], groups[use]
        distinct = np.unique(found)
        shape: dict[str, Any]
        if len(distinct) <= _FEW_VALUES:
            places, count = np.searchsorted(distinct, found), len(distinct)
            shape = {"values": [_short(each) for each in distinct.tolist()]}
        else:
            edges = _round_edges(float(distinct[0]), float(distinct[-1]))
            count = len(edges) - 1
            places = np.clip(np.searchsorted(edges, found, side="right") - 1, 0, count - 1)
            shape = {"edges": [_short(each) for each in edges.tolist()]}
        counts = {
            name: np.bincount(places[of == number], minlength=count).tolist() for number, name in enumerate(names)
        }
        medians = {
            name: _short(float(np.median(found[of == number])))
            for number, name in enumerate(names)
            if (of == number).any()
        }
        return {**shape, "counts": counts, "medians": medians}


class Columns:
    """All columns.

    Attributes:
        left_out: names of those for which there was no room.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], Column] = {}
        self.left_out: set[str] = set()

    def put(self, at: int, values: Mapping[tuple[str, str], float | str | bool | None]) -> None:
        """The values of entry ``at`` by (kind, name)."""
        for key, value in values.items():
            column = self._columns.get(key)
            if column is None:
                if len(self._columns) >= MOST_COLUMNS:
                    self.left_out.add(key[1])
                    continue
                column = self._columns[key] = Column(*key)
            column.put(at, value)

    def finished(self, count: int) -> list[Column]:
        """The columns, each as long as there are entries."""
        for column in self._columns.values():
            column.fill(count)
        return list(self._columns.values())


def _round_edges(low: float, high: float) -> np.ndarray:
    """Edges of some twenty to fifty bins at round numbers, as thresholds are: then none lies within a bin."""
    rough = (high - low) / _BINS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    # A value on the last edge belongs to a bin of its own beyond it.
    return np.arange(first, max(last, math.floor(high / step) + 1) + 1) * step


def _short(value: float) -> float | int | None:
    """A number as short as six digits allow; whole ones as they are."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
