"""Strengths of models (or images) from comparisons of two at a time.

Comparisons are (first, second, score) with score 1 where the first won, 0 where the second did and .5 for a tie. A
judge that was asked in both orders and changed its mind is a tie.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflow.metrics.agreement import Interval

FloatArray = npt.NDArray[np.float64]
Comparison = tuple[Hashable, Hashable, float]

_STEPS = 200
_PRECISE = 1e-10


class UnconnectedError(ValueError):
    """No finite strengths exist: some items never lost to, or never met, the others."""


@dataclass(frozen=True)
class Strengths:
    """What :func:`bootstrap_bradley_terry` found.

    Attributes:
        items: log strength and its interval, strongest first.
        resamples: how many the intervals come from.
        unconnected: how many more had no finite strengths and were left out.
    """

    items: Mapping[Hashable, Interval]
    resamples: int
    unconnected: int


def bradley_terry(comparisons: Iterable[Comparison], *, prior: float = 0.0) -> dict[Hashable, float]:
    """Bradley-Terry log strengths θ of greatest likelihood: ``P(i beats j) = 1 / (1 + exp(θj - θi))``.

    A tie is half a win for either.

    Args:
        comparisons: (first, second, score), score 1, .5 or 0.
        prior: virtual ties between every two items. Above 0 every set of comparisons has finite strengths, drawn
            together.

    Returns:
        θ per item, float64, mean 0, strongest first; higher is better. ``exp(θ)`` is the strength, ``400 θ / ln 10``
        the difference in Elo points.

    Raises:
        UnconnectedError: a ValueError; the items fall into parts of which one never lost to or never met the other, so
            no finite strengths exist. More comparisons or a ``prior`` help.
        ValueError: no comparisons, another score, an item against itself, or a negative prior.

    Source: Bradley and Terry 1952; when strengths exist: Ford 1957. Equals choix (MIT).
    """
    items, first, second, scores = _table(comparisons)
    found = _fit(_wins(len(items), first, second, scores), _checked(prior), items)
    return {items[place]: float(found[place]) for place in np.argsort(-found, kind="stable")}


def bootstrap_bradley_terry(
    comparisons: Iterable[Comparison],
    groups: Sequence[Hashable] | None = None,
    *,
    prior: float = 0.0,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Strengths:
    """Percentile bootstrap intervals of Bradley-Terry log strengths.

    Args:
        comparisons: as for :func:`bradley_terry`.
        groups: a key per comparison, such as its prompt; whole groups get drawn. None: comparisons are drawn.
        prior: as for :func:`bradley_terry`.
        level: of confidence.
        resamples: how many.
        seed: of numpy's ``default_rng``.

    Returns:
        Strengths with intervals. Two items whose intervals overlap may still differ: they are drawn together.

    Raises:
        UnconnectedError: as :func:`bradley_terry`, or more resamples have no finite strengths than one tail holds: the
            rest would look surer than it is.
        ValueError: as :func:`bradley_terry`, lengths that differ, or an argument out of range.

    Source: Efron and Tibshirani 1993; resampling by prompt as in Chatbot Arena, arXiv:2403.04132.
    """
    items, first, second, scores = _table(comparisons)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"expected a level between 0 and 1 and a resample, not {level} and {resamples}")
    whole = _fit(_wins(len(items), first, second, scores), _checked(prior), items)
    members = _members(groups, len(first))
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = np.concatenate([members[place] for place in draw.integers(len(members), size=len(members))])
        try:
            found.append(_fit(_wins(len(items), first[rows], second[rows], scores[rows]), prior, items))
        except UnconnectedError:
            continue
    tail, unconnected = (1 - level) / 2, resamples - len(found)
    if not found or unconnected > tail * resamples:
        raise UnconnectedError(
            f"{unconnected} of {resamples} resamples have no finite strengths: give more comparisons or a prior"
        )
    low, high = np.quantile(np.array(found), [tail, 1 - tail], axis=0)
    order = np.argsort(-whole, kind="stable")
    intervals = {items[i]: Interval(float(whole[i]), float(low[i]), float(high[i])) for i in order}
    return Strengths(intervals, len(found), unconnected)


def _table(
    comparisons: Iterable[Comparison],
) -> tuple[list[Hashable], npt.NDArray[np.intp], npt.NDArray[np.intp], FloatArray]:
    places: dict[Hashable, int] = {}
    rows: list[tuple[int, int, float]] = []
    for number, (one, other, score) in enumerate(comparisons):
        if one == other:
            raise ValueError(f"comparison {number}: {one!r} against itself")
        if score not in (0, 0.5, 1):
            raise ValueError(f"comparison {number}: expected a score of 1, .5 or 0, not {score!r}")
        rows.append((places.setdefault(one, len(places)), places.setdefault(other, len(places)), float(score)))
    if not rows:
        raise ValueError("no comparisons")
    table = np.array(rows)
    return list(places), table[:, 0].astype(np.intp), table[:, 1].astype(np.intp), table[:, 2]


def _wins(count: int, first: npt.NDArray[np.intp], second: npt.NDArray[np.intp], scores: FloatArray) -> FloatArray:
    """How often the row's item beat the column's."""
    wins = np.zeros((count, count))
    np.add.at(wins, (first, second), scores)
    np.add.at(wins, (second, first), 1 - scores)
    return wins


def _fit(wins: FloatArray, prior: float, items: Sequence[Hashable]) -> FloatArray:
    """Newton's method: the likelihood of log strengths is concave, a dozen steps do."""
    wins = wins + prior / 2
    np.fill_diagonal(wins, 0.0)
    _refuse_unconnected(wins, items)
    games, won = wins + wins.T, wins.sum(axis=1)
    count = len(wins)
    strengths = np.zeros(count)
    reached = _likelihood(strengths, wins)
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = won - (games * chances).sum(axis=1)
        if np.abs(gradient).max() <= _PRECISE * games.max():
            break
        weights = games * chances * chances.T
        # The mean of the strengths is free; the constant keeps it at 0.
        curvature = np.diag(weights.sum(axis=1)) - weights + 1 / count
        step = np.linalg.solve(curvature, gradient)
        # A full step can overshoot where an item nearly always wins.
        while (likelihood := _likelihood(strengths + step, wins)) < reached and np.abs(step).max() > _PRECISE:
            step = step / 2
        strengths, reached = strengths + step, likelihood
    return strengths - strengths.mean()


def _likelihood(strengths: FloatArray, wins: FloatArray) -> float:
    return float(-(wins * np.logaddexp(0, strengths[None, :] - strengths[:, None])).sum())


def _refuse_unconnected(wins: FloatArray, items: Sequence[Hashable]) -> None:
    """Finite strengths exist only if every item leads to every other along wins."""
    for beaten, says in ((wins > 0, "never lost to"), (wins.T > 0, "never beat")):
        reached = np.zeros(len(wins), dtype=bool)
        reached[0] = True
        while (grown := reached | beaten[reached].any(axis=0)).sum() > reached.sum():
            reached = grown
        if not reached.all():
            outside = [item for item, inside in zip(items, reached, strict=True) if not inside]
            shown = ", ".join(map(repr, outside[:5])) + (", ..." if len(outside) > 5 else "")
            raise UnconnectedError(
                f"no finite strengths: {shown} {says} any of the other {len(items) - len(outside)} items"
                " (or met none of them); give more comparisons or a prior"
            )


def _members(groups: Sequence[Hashable] | None, count: int) -> list[npt.NDArray[np.intp]]:
    if groups is None:
        return list(np.arange(count)[:, None])
    if len(groups) != count:
        raise ValueError(f"{count} comparisons against {len(groups)} groups")
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(groups):
        rows.setdefault(key, []).append(row)
    return [np.array(members, dtype=np.intp) for members in rows.values()]


def _checked(prior: float) -> float:
    if not 0 <= prior < np.inf:
        raise ValueError(f"prior: expected 0 or more, not {prior}")
    return float(prior)
