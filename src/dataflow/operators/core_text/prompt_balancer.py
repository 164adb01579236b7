"""As many rows of each category as are wanted."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dataflow.errors import ConfigError
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)


class PromptBalancer:
    """Keeps so many rows of each category: at most a number, quotas, or shares of all.

    Which rows stay follows from the seed and their prompt, never from their place: rows may be reordered and added, and
    a row that stays with a smaller number stays with a larger one. A row too many is dropped as ``over_quota``, one of
    a category nobody wants as ``not_wanted``, one without a category as ``no_category``. Categories with too few rows
    are warned of, and stand in ``shortfalls`` after the run.

    Args:
        maximum: most rows of any category.
        quotas: instead, category → rows wanted of it; of others none.
        shares: instead, category → target share in any unit; of others none.
        total: rows wanted in all with ``shares``; None for as many as there can be without missing a share.
        seed: another seed keeps other rows.
        options: how the step is run.

    Raises:
        ConfigError: none or several of the three, or numbers that make no sense.

    Attributes:
        shortfalls: category → rows that are missing, after a run.
    """

    def __init__(
        self,
        *,
        maximum: int | None = None,
        quotas: Mapping[str, int] | None = None,
        shares: Mapping[str, float] | None = None,
        total: int | None = None,
        seed: int = 0,
        options: RunOptions | None = None,
    ) -> None:
        if sum(each is not None for each in (maximum, quotas, shares)) != 1:
            raise ConfigError("give maximum, quotas or shares")
        if total is not None and (shares is None or total < 1):
            raise ConfigError(f"total must be a whole number from 1, and goes with shares; got {total!r}")
        if maximum is not None and maximum < 1:
            raise ConfigError(f"maximum must be a whole number from 1, got {maximum!r}")
        for name, number in (quotas or {}).items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigError(f"quotas: {name!r} must have a whole number from 0, got {number!r}")
        for name, share in (shares or {}).items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
                raise ConfigError(f"shares: {name!r} must have a number above 0, got {share!r}")
        if maximum is None and not (quotas or shares):
            raise ConfigError("quotas and shares must name at least one category")
        self.maximum, self.quotas, self.shares, self.total = maximum, quotas, shares, total
        self.seed = seed
        self.options = options
        self.shortfalls: dict[str, int] = {}

    def plan(self, *, input_category_key: str = "category", input_conversation_key: str = "conversations") -> Plan:
        """The step as a description.

        Args:
            input_category_key: column with the category: text, a number or true or false; ``attributes.style`` is a
                field of an object, as the template sampler writes it.
            input_conversation_key: column with the prompt, by whose content it is drawn which rows stay.
        """
        kept = np.zeros(0, np.bool_)
        wanted: Mapping[str, int] = {}
        at = 0

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            nonlocal kept, wanted, at
            names: dict[str, int] = {}
            of, draws = array("I"), array("Q")
            for row in rows:
                name = None if isinstance(row, BadRow) else category(row, input_category_key)
                if name is None or isinstance(row, BadRow):
                    continue
                of.append(names.setdefault(name, len(names)))
                draws.append(self._draw(row.get(input_conversation_key)))
            categories = np.frombuffer(of, dtype=np.uint32) if of else np.zeros(0, np.uint32)
            counts = np.bincount(categories, minlength=len(names))
            have = Counter({name: int(counts[number]) for name, number in names.items()})
            wanted = self._wanted(have)
            limits = np.array([wanted.get(name, 0) for name in names], dtype=np.int64)
            kept, at = _chosen(categories, np.array(draws, dtype=np.uint64), limits), 0
            self._tell(wanted, have)

        def fold(row: Row, _: Sequence[Outcome]) -> Row | Drop:
            nonlocal at
            name = category(row, input_category_key)
            if name is None:
                return Drop("no_category")
            at += 1
            if kept[at - 1]:
                return row
            return Drop("over_quota" if wanted.get(name) else "not_wanted", {"category": name})

        return Plan(
            name=type(self).__name__,
            inputs=(input_category_key.partition(".")[0], input_conversation_key),
            outputs=(),
            requests=lambda _: (),
            fold=fold,
            prepare=prepare,
        )

    def run(
        self,
        storage: FileStorage,
        input_category_key: str = "category",
        input_conversation_key: str = "conversations",
    ) -> Summary:
        """Balance the rows of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_category_key=input_category_key, input_conversation_key=input_conversation_key)
        return execute(plan, storage, self.options)

    def _draw(self, content: object) -> int:
        text = json.dumps([self.seed, content], sort_keys=True, default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

    def _wanted(self, have: Mapping[str, int]) -> dict[str, int]:
        """Rows wanted of each category."""
        if self.maximum is not None:
            return dict.fromkeys(have, self.maximum)
        if self.quotas is not None:
            return dict(self.quotas)
        shares = dict(self.shares or {})
        whole = math.fsum(shares.values())
        if self.total is not None:
            return apportioned(shares, self.total)
        # The category that runs out first says how many there can be.
        most = min(have.get(name, 0) * whole / share for name, share in shares.items())
        return apportioned(shares, int(most + 1e-9))

    def _tell(self, wanted: Mapping[str, int], have: Mapping[str, int]) -> None:
        missing = {} if self.maximum is not None else wanted
        self.shortfalls = {
            name: number - have.get(name, 0) for name, number in missing.items() if number > have.get(name, 0)
        }
        for name, number in self.shortfalls.items():
            logger.warning("%r: %d rows of %d that are wanted are missing", name, number, wanted[name])
        if self.shares is not None and not any(wanted.values()):
            empty = [name for name in self.shares if not have.get(name)]
            logger.warning("no row can be kept without missing a share: there is none of %s", ", ".join(empty))


def category(row: Row, key: str) -> str | None:
    """The category of a row as text; None where it has none."""
    name, _, field = key.partition(".")
    value = row.get(name)
    if field:
        value = value.get(field) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value).strip() or None
    return None


def apportioned(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers with this sum that are nearest to the shares, by largest remainders; of equal ones the first."""
    whole = math.fsum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    # A hair is added so that a third of three is one.
    numbers = {name: int(value + 1e-9) for name, value in exact.items()}
    left = total - sum(numbers.values())
    for name in sorted(exact, key=lambda each: numbers[each] - exact[each])[:left]:
        numbers[name] += 1
    return numbers


def _chosen(
    categories: npt.NDArray[np.uint32], draws: npt.NDArray[np.uint64], limits: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Those with the lowest draws of each category; the same prompt draws the same, and then the first one stays."""
    order = np.lexsort((np.arange(len(draws)), draws, categories))
    counts = np.bincount(categories, minlength=len(limits))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.empty(len(draws), np.int64)
    rank[order] = np.arange(len(draws)) - np.repeat(starts, counts) if len(draws) else 0
    return rank < limits[categories] if len(limits) else np.zeros(0, np.bool_)
