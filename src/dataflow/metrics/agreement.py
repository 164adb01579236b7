"""How far scores agree with people or with each other, and how sure the numbers are.

Arrays are float64 inside. A value that is missing is None or NaN; only what says so takes one, for a pair or a row that
vanishes unseen makes every number look better: :func:`complete_pairs` drops them where the caller can count them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError

FloatArray = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Level = Literal["nominal", "ordinal", "interval"]
TieRule = Literal["wrong", "half", "skip"]


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class PairAccuracy(NamedTuple):
    """``accuracy`` is None where no pair counts; ``tied_truth`` pairs never do, ``tied_scores`` as the rule says."""

    accuracy: float | None
    pairs: int
    correct: int
    tied_scores: int
    tied_truth: int


class Means(NamedTuple):
    """Two means of values some of which are missing; see :func:`means`."""

    mean: float | None
    strict_mean: float | None
    coverage: float
    expected: int
    ok: int
    failed: int


def complete_pairs(
    first: Sequence[float | None] | npt.ArrayLike, second: Sequence[float | None] | npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """The pairs of which both values are there: not None, NaN or infinite.

    Args:
        first: n values, some may be missing.
        second: n values.

    Returns:
        Two arrays of one length, float64; what the length lacks of n was dropped and belongs into the report.

    Raises:
        ValueError: lengths that differ.
    """
    left, right = _vector(first, "first"), _vector(second, "second")
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values against {len(right)}")
    whole = np.isfinite(left) & np.isfinite(right)
    return left[whole], right[whole]


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks, ties sharing their mean rank.

    Args:
        first: n numbers, at least 2, not all equal.
        second: the same.

    Returns:
        -1..1; for a score against human ratings higher is better.

    Raises:
        ValueError: lengths that differ, fewer than 2, a missing value, or all values equal (no ρ is defined).
        MissingExtraError: scipy is not installed.

    Source: scipy.stats.spearmanr (BSD-3).
    """
    return float(_stats().spearmanr(*_correlated(first, second)).statistic)


def kendall(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kendall's τ-b: ``(C - D) / √((C + D + T1)(C + D + T2))``, T1 and T2 the pairs tied in one of the two only.

    Args:
        first: n numbers, at least 2, not all equal.
        second: the same.

    Returns:
        -1..1; for a score against human ratings higher is better.

    Raises:
        ValueError: lengths that differ, fewer than 2, a missing value, or all values equal (no τ is defined).
        MissingExtraError: scipy is not installed.

    Source: scipy.stats.kendalltau, variant "b" (BSD-3).
    """
    return float(_stats().kendalltau(*_correlated(first, second), variant="b").statistic)


def krippendorff_alpha(ratings: Sequence[Sequence[Any]] | npt.NDArray[Any], level: Level = "nominal") -> float:
    """Krippendorff's α: ``1 - observed disagreement / expected disagreement`` among any number of raters.

    Squared distances of two values: nominal 1 unless equal; ordinal the square of the number of ratings from one to the
    other, the two ends counted half; interval the square of their difference. Units with fewer than two ratings say
    nothing and are left out.

    Args:
        ratings: shape (raters, units); None or NaN where a rater gave none. Nominal values may be of any hashable kind,
            others are numbers.
        level: which distance.

    Returns:
        At most 1 (full agreement); 0 is what chance gives, below is worse than chance.

    Raises:
        ValueError: rows of unequal length, no unit with two ratings, one value only (no α is defined), or values that
            are no numbers where the level wants them.

    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011. Agrees with the krippendorff package
    (GPL-3.0), of which nothing is used here.
    """
    if level not in ("nominal", "ordinal", "interval"):
        raise ValueError(f"level: expected nominal, ordinal or interval, not {level!r}")
    counts, values = _value_counts(ratings, numeric=level != "nominal")
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        raise ValueError("no unit has two ratings")
    per_unit = counts.sum(axis=1)
    weighted = counts / (per_unit - 1)[:, None]
    observed = counts.T @ weighted - np.diag(weighted.sum(axis=0))
    totals = counts.sum(axis=0)
    expected = np.outer(totals, totals) - np.diag(totals)
    if level == "nominal":
        distances = 1.0 - np.eye(len(totals))
    else:
        place = np.cumsum(totals) - totals / 2 if level == "ordinal" else np.asarray(values, dtype=np.float64)
        distances = (place[:, None] - place) ** 2
    chance = (expected * distances).sum() / (totals.sum() - 1)
    if chance == 0:
        raise ValueError("all ratings are one value: no alpha is defined")
    return float(1.0 - (observed * distances).sum() / chance)


def pair_accuracy(
    truth: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    ties: TieRule = "wrong",
) -> PairAccuracy:
    """Share of pairs that ``scores`` puts into the order of ``truth``; pairs tied in ``truth`` have none and are out.

    Args:
        truth: n numbers, more is better (a person's ratings; ranks must be negated).
        scores: n numbers, more is better.
        groups: n keys, such as prompts: pairs are made within a group only. None: of all with all.
        ties: what a pair tied in ``scores`` counts as: "wrong" (ImageReward's rule), "half" or "skip" (not a pair).

    Returns:
        Accuracy in 0..1, higher is better, .5 is chance with "half"; ``pairs`` is what it was divided by, ``correct``
        are those in order without the ties.

    Raises:
        ValueError: lengths that differ, a missing value, or another rule.

    Source: ImageReward, arXiv:2304.05977 (Apache-2.0).
    """
    left, right = _paired(truth, scores)
    if ties not in ("wrong", "half", "skip"):
        raise ValueError(f"ties: expected wrong, half or skip, not {ties!r}")
    decided = correct = tied_scores = tied_truth = 0
    for rows in _group_rows(groups, len(left)):
        a, b = left[rows], right[rows]
        for place in range(len(rows) - 1):
            wanted, given = np.sign(a[place + 1 :] - a[place]), np.sign(b[place + 1 :] - b[place])
            ordered = wanted != 0
            tied_truth += int((~ordered).sum())
            decided += int(ordered.sum())
            tied_scores += int((ordered & (given == 0)).sum())
            correct += int((ordered & (given == wanted)).sum())
    pairs = decided - tied_scores if ties == "skip" else decided
    credit = correct + tied_scores / 2 if ties == "half" else correct
    return PairAccuracy(credit / pairs if pairs else None, pairs, correct, tied_scores, tied_truth)


def means(
    values: Sequence[float | None] | npt.ArrayLike, *, worst: float, failed: Sequence[bool] | None = None
) -> Means:
    """The mean over what has a value, and the strict mean in which a failed generation counts as the worst value.

    A model that makes nothing for hard prompts must not gain by it; a judge that could not answer says nothing about
    the model. So: ``strict_mean = (Σ values + worst · failed) / (ok + failed)``, and rows that neither have a value nor
    failed lower the coverage only.

    Args:
        values: n numbers; None, NaN or infinity where there is none.
        worst: the bottom of the scale.
        failed: n flags, True where the generation itself failed; such a row must have no value. None: every row without
            a value counts as failed.

    Returns:
        Both means (None where nothing goes into them), coverage = ok / n in 0..1, and the three counts.

    Raises:
        ValueError: no rows, lengths that differ, a ``worst`` that is not finite, or a failed row with a value.
    """
    rows = _vector(values, "values")
    if not len(rows):
        raise ValueError("values: no rows, so no coverage is defined")
    if not math.isfinite(worst):
        raise ValueError(f"worst: expected a number, not {worst}")
    known = np.isfinite(rows)
    lost = ~known if failed is None else np.asarray(failed, dtype=bool)
    if lost.shape != rows.shape:
        raise ValueError(f"{len(rows)} values against {lost.size} flags")
    if (lost & known).any():
        raise ValueError(f"failed: row {int(np.flatnonzero(lost & known)[0])} has a value")
    ok, misses, total = int(known.sum()), int(lost.sum()), float(rows[known].sum())
    return Means(
        mean=total / ok if ok else None,
        strict_mean=(total + worst * misses) / (ok + misses) if ok + misses else None,
        coverage=ok / len(rows),
        expected=len(rows),
        ok=ok,
        failed=misses,
    )


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share: ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)``.

    Args:
        successes: 0..trials.
        trials: at least 1.
        level: of confidence, between 0 and 1.

    Returns:
        The share and its interval, within 0..1.

    Raises:
        ValueError: a count or a level out of range.

    Source: Wilson 1927; equals scipy.stats.binomtest(...).proportion_ci(method="wilson") (BSD-3).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and a trial, not {successes} of {trials}")
    _check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, square = successes / trials, z * z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    # At either end the interval reaches the end itself; rounding must not leave the share outside.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return Interval(share, low, high)


def bootstrap_mean(
    values: npt.ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling whole groups where there are any.

    Images of one prompt are alike: treated as independent they make every interval too narrow.

    Args:
        values: n numbers.
        groups: n keys, such as prompts; as many groups as there are get drawn, with replacement. None: rows are drawn.
        level: of confidence.
        resamples: how many; memory does not grow with it.
        seed: of numpy's ``default_rng``.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: no values, a missing one, lengths that differ, or an argument out of range.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    rows = _known(values, "values")
    _check_bootstrap(len(rows), level, resamples)
    members = _group_rows(groups, len(rows)) if groups is not None else None
    sums = rows if members is None else np.array([rows[part].sum() for part in members])
    counts = np.ones(len(rows)) if members is None else np.array([float(len(part)) for part in members])
    draw = np.random.default_rng(seed)
    found = np.empty(resamples)
    for number in range(resamples):
        drawn = draw.integers(len(sums), size=len(sums))
        found[number] = sums[drawn].sum() / counts[drawn].sum()
    return Interval(float(rows.mean()), *_ends(found, level))


def bootstrap(
    statistic: Callable[..., float | None],
    *columns: npt.ArrayLike,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of any statistic of rows, such as :func:`spearman` of two columns.

    Args:
        statistic: takes the columns, resampled alike, and gives a number.
        columns: arrays of n rows each, of any type and further shape.
        groups: n keys; whole groups get drawn. None: rows are drawn.
        level: of confidence.
        resamples: how many.
        seed: of numpy's ``default_rng``.

    Returns:
        The statistic of all rows and its interval.

    Raises:
        ValueError: no rows, lengths that differ, an argument out of range, a statistic that is not defined on all rows,
            or one that is not (ValueError, None or NaN) on more resamples than one tail holds: what is left would look
            surer than it is.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    arrays = [np.asarray(column) for column in columns]
    if not arrays or len({len(array) for array in arrays}) > 1:
        raise ValueError(f"expected columns of one length, not {[len(array) for array in arrays]}")
    count = len(arrays[0])
    _check_bootstrap(count, level, resamples)
    value = statistic(*arrays)
    if value is None or not math.isfinite(value):
        raise ValueError(f"the statistic of all rows is {value}")
    members = _group_rows(groups, count) if groups is not None else None
    draw = np.random.default_rng(seed)
    found = np.full(resamples, np.nan)
    for number in range(resamples):
        rows = draw.integers(
            count if members is None else len(members), size=count if members is None else len(members)
        )
        if members is not None:
            rows = np.concatenate([members[place] for place in rows])
        try:
            result = statistic(*(array[rows] for array in arrays))
        except ValueError:
            continue
        found[number] = np.nan if result is None else result
    return Interval(float(value), *_ends(found, level))


def _ends(found: FloatArray, level: float) -> tuple[float, float]:
    """The two percentiles, if the resamples without a number cannot have moved them by more than a tail."""
    defined = found[np.isfinite(found)]
    tail = (1 - level) / 2
    if not len(defined) or len(found) - len(defined) > tail * len(found):
        raise ValueError(
            f"the statistic is not defined on {len(found) - len(defined)} of {len(found)} resamples: too few data"
        )
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _check_bootstrap(count: int, level: float, resamples: int) -> None:
    _check_level(level)
    if not count:
        raise ValueError("no rows to draw from")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, not {resamples}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, not {level}")


def _group_rows(groups: Sequence[Hashable] | None, count: int) -> list[Indices]:
    """The rows of each group, groups in the order in which they first appear."""
    if groups is None:
        return [np.arange(count)]
    if len(groups) != count:
        raise ValueError(f"{count} rows against {len(groups)} groups")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return [np.array(rows, dtype=np.intp) for rows in members.values()]


def _value_counts(
    ratings: Sequence[Sequence[Any]] | npt.NDArray[Any], *, numeric: bool
) -> tuple[FloatArray, list[Any]]:
    """How often each value was given to each unit, shape (units, values), and the values in order."""
    rows = [list(row) for row in ratings]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError("ratings: expected raters with as many units each")
    given = [[None if _is_missing(value) else value for value in unit] for unit in zip(*rows, strict=True)]
    found: dict[Any, None] = dict.fromkeys(value for unit in given for value in unit if value is not None)
    if numeric:
        try:
            values = sorted(found, key=float)
        except (TypeError, ValueError):
            raise ValueError("ratings: expected numbers on this level") from None
        if not all(math.isfinite(value) for value in values):
            raise ValueError("ratings: infinity is no rating")
    else:
        values = list(found)
    places = {value: place for place, value in enumerate(values)}
    counts = np.zeros((len(given), len(values)))
    for row, unit in enumerate(given):
        for value in unit:
            if value is not None:
                counts[row, places[value]] += 1
    return counts, values


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _correlated(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    left, right = _paired(first, second)
    if len(left) < 2:
        raise ValueError(f"a correlation takes at least 2 pairs, not {len(left)}")
    for values, name in ((left, "first"), (right, "second")):
        if (values == values[0]).all():
            raise ValueError(f"{name}: all values are equal, no correlation is defined")
    return left, right


def _paired(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    left, right = _known(first, "first"), _known(second, "second")
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values against {len(right)}")
    return left, right


def _known(values: npt.ArrayLike, name: str) -> FloatArray:
    array = _vector(values, name)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"{name}: {bad.size} values are missing, NaN or infinite, the first in row {bad[0]}")
    return array


def _vector(values: Any, name: str) -> FloatArray:
    """None becomes NaN."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (n,), not {array.shape}")
    return array


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "rank correlation") from error
    return stats
