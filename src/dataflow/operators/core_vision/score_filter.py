"""Filters over scores: thresholds, shares, the best of several, and duplicates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dataflow.errors import ConfigError
from dataflow.operators.evaluation import pictures, pictures_left, score_at
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage

OnUnknown = Literal["quarantine", "keep", "drop"]


class ScoreFilter:
    """Keeps the pictures whose score is good enough, and drops rows that have none left.

    Scores are read from the table, so that another threshold costs one pass over it and nothing is computed again.
    A dropped row goes to the step's sidecar with its reason.

    Args:
        on_unknown: what becomes of a picture without a score: ``quarantine`` takes its row out under a reason of its
            own, ``drop`` treats it as a bad one, ``keep`` as a good one (the worst of the good ones for ``top_k``).
        options: how the step is run.

    Raises:
        ConfigError: there is no such policy.
    """

    def __init__(self, *, on_unknown: OnUnknown = "quarantine", options: RunOptions | None = None) -> None:
        if on_unknown not in ("quarantine", "keep", "drop"):
            raise ConfigError(f"on_unknown must be quarantine, keep or drop, got {on_unknown!r}")
        self.on_unknown: OnUnknown = on_unknown
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_score_key: str | None = None,
        weights: Mapping[str, float] | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        drop_lowest_share: float | None = None,
        top_k: int | None = None,
        output_rejected_key: str | None = None,
    ) -> Plan:
        """The step as a description. Conditions that are given must all hold.

        Args:
            input_image_key: column with the pictures.
            input_score_key: column with the scores; ``probe.sharpness`` is a field of an object.
            weights: instead of one score, the sum of several with these weights.
            minimum: least score that is kept.
            maximum: most.
            drop_lowest_share: of all pictures with a score, this share with the lowest is dropped, 0 to 1; pictures
                that are as good as the best dropped one are kept.
            top_k: most pictures a row keeps: its best ones, in the order in which they stood.
            output_rejected_key: column that gets the paths of the pictures a kept row lost, for preference pairs.

        Raises:
            ConfigError: the conditions make no sense.
        """
        keys = dict(weights or {}) if input_score_key is None else {input_score_key: 1.0}
        if not keys or (input_score_key is not None and weights):
            raise ConfigError("give input_score_key, or weights")
        if drop_lowest_share is not None and not 0 <= drop_lowest_share < 1:
            raise ConfigError(f"drop_lowest_share must be from 0 to below 1, got {drop_lowest_share!r}")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k must be a whole number from 1, got {top_k!r}")
        if minimum is None and maximum is None and drop_lowest_share is None and top_k is None:
            raise ConfigError("give minimum, maximum, drop_lowest_share or top_k: without one nothing is filtered")
        name = input_score_key or "weighted"
        least = [-math.inf if minimum is None else minimum]

        def scores(row: Row) -> list[float | None]:
            columns = [(score_at(row, key), weight) for key, weight in keys.items()]
            return [_sum(each, columns) for each in range(max(len(found) for found, _ in columns))]

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            known = [s for row in rows if not isinstance(row, BadRow) for s in scores(row) if s is not None]
            if known and drop_lowest_share:
                dropped = int(drop_lowest_share * len(known) + 1e-9)
                threshold = float(np.partition(known, dropped)[dropped])
                least[0] = threshold if minimum is None else max(minimum, threshold)

        def fold(row: Row, _: Sequence[Outcome]) -> Row | Drop:
            paths = pictures_left(row, input_image_key)
            if not paths:
                return Drop("no_image")
            found = scores(row)
            kept: list[int] = []
            for number in range(len(paths)):
                score = found[number] if number < len(found) else None
                if score is None and self.on_unknown == "quarantine":
                    return Drop(f"quarantined:{name}")
                good = self.on_unknown == "keep" if score is None else least[0] <= score <= _or(maximum, math.inf)
                if good:
                    kept.append(number)
            if top_k is not None and len(kept) > top_k:
                ranked = sorted(kept, key=lambda at: (-_or(found[at], -math.inf), at))
                kept = sorted(ranked[:top_k])
            if not kept:
                return Drop(f"unknown:{name}" if all(score is None for score in found) else f"score:{name}")
            return selected(row, input_image_key, kept, output_rejected_key)

        return Plan(
            name=type(self).__name__,
            inputs=(input_image_key, *dict.fromkeys(key.partition(".")[0] for key in keys)),
            outputs=() if output_rejected_key is None else (output_rejected_key,),
            requests=lambda _: (),
            fold=fold,
            prepare=prepare if drop_lowest_share else None,
        )

    def run(self, storage: FileStorage, **keys: Any) -> Summary:
        """Filter the rows of the storage's step; see :meth:`plan` for the arguments.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        return execute(self.plan(**keys), storage, self.options)


def selected(row: Row, image_key: str, kept: Sequence[int], rejected_key: str | None = None) -> Row:
    """The row with only some of its pictures, and of every evaluator's columns only what belongs to them.

    Args:
        row: as it was read.
        image_key: column with the pictures.
        kept: their places among the pictures, in order.
        rejected_key: column that gets the paths of the others.
    """
    paths = pictures(row, image_key)
    result = dict(row)
    if isinstance(row[image_key], list):
        result[image_key] = [paths[at] for at in kept]
        for status_key in [key for key in row if key.endswith("_status")]:
            base = status_key.removesuffix("_status")
            for key in (base, status_key, f"{base}_error"):
                value = row.get(key)
                if isinstance(value, list) and len(value) == len(paths):
                    result[key] = [value[at] for at in kept]
    if rejected_key is not None:
        result[rejected_key] = [path for at, path in enumerate(paths) if at not in set(kept)]
    return result


def _sum(number: int, columns: Sequence[tuple[list[float | None], float]]) -> float | None:
    total = 0.0
    for found, weight in columns:
        score = found[number] if number < len(found) else None
        if score is None:
            return None
        total += weight * score
    return total


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
