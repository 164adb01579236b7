"""How far the scores of a table agree with people: ratings of pictures, or choices between two, against every metric.

Ratings of one item are averaged over its raters before they are compared with its score, and items are what the
bootstrap draws. What cannot be matched, read or compared is counted, never filled in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError, MissingExtraError
from dataflow.metrics import agreement
from dataflow.metrics.agreement import Level, PairAccuracy, TieRule
from dataflow.ratings import Ratings
from dataflow.scores import Score

FloatArray = npt.NDArray[np.float64]

_MOST_PAIRED_ITEMS = 2000
"""Items whose pairs fit into memory all at once; of more, the interval rests on a draw and is wider than it need be."""


class Estimate(NamedTuple):
    """A figure and the ends of its confidence interval; the ends are None where there are too few data for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class RaterAgreement:
    """Krippendorff's alpha among the raters; None with the reason where it is not defined."""

    level: Level
    items: int
    ratings: int
    alpha: Estimate | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MetricAgreement:
    """One metric against people; what is not defined is None, and ``reason`` says why.

    Attributes:
        metric: its key.
        lower_better: it was negated.
        items: items (or choices) with a rating and a score.
        missing: rated items of the table without a score, by status.
        spearman: with the interval by item; None for choices, like ``kendall``.
        kendall: tau-b.
        pairs: which pairs the metric puts into the order of the people, ties counted.
        accuracy: the share, with its interval.
        reason: why something is None.
    """

    metric: str
    lower_better: bool
    items: int
    missing: Mapping[str, int]
    spearman: Estimate | None
    kendall: Estimate | None
    pairs: PairAccuracy
    accuracy: Estimate | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScoreMap:
    """The expected rating as a monotonous function of a score, by isotonic regression.

    Attributes:
        metric: of the scores.
        points: (score, rating), scores rising; straight lines between them, constant outside.
        rising: more score never means a lower rating.
        items: it rests on.
        rating: the rating to be reached.
        threshold: the score from which on (``rising``; else up to which) it is expected to be; None where it never is.
    """

    metric: str
    points: tuple[tuple[float, float], ...]
    rising: bool
    items: int
    rating: float | None = None
    threshold: float | None = None

    def __call__(self, score: float) -> float:
        """The rating expected of a score."""
        scores, ratings = zip(*self.points, strict=True)
        return float(np.interp(score, scores, ratings))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        pairwise: people chose between two.
        rated: items, or pairs of items, that people rated.
        unmatched: those of them that the table has not.
        unreadable: rows of the ratings that cannot be used.
        replaced: ratings that their rater gave again.
        raters: their agreement among each other.
        metrics: each metric's agreement with them.
        maps: by metric; none for choices.
    """

    pairwise: bool
    rated: int
    unmatched: int
    unreadable: int
    replaced: int
    raters: RaterAgreement
    metrics: Sequence[MetricAgreement]
    maps: Sequence[ScoreMap]


@dataclass(frozen=True, slots=True)
class Options:
    """How figures are computed.

    Attributes:
        lower_better: metrics of which less is better; they are negated.
        ties: what a pair counts as that the metric ties and people do not.
        alpha_level: distance of two ratings.
        level: of confidence.
        resamples: of every bootstrap.
        seed: of every draw.
        rating: that maps give the threshold for.
    """

    lower_better: frozenset[str] = frozenset()
    ties: TieRule = "half"
    alpha_level: Level = "ordinal"
    level: float = 0.95
    resamples: int = 1000
    seed: int = 0
    rating: float | None = None


def calibrate(
    ratings: Ratings,
    scores: Mapping[str, Mapping[str, Score]],
    metrics: Sequence[str],
    options: Options,
    groups: Mapping[str, str] | None = None,
) -> Calibration:
    """Set ratings of single items against the scores of a table.

    Args:
        ratings: from :func:`dataflow.ratings.read_ratings`.
        scores: from :func:`dataflow.ratings.read_scores`.
        metrics: which of them.
        options: how.
        groups: by item; pairs are made and the bootstrap draws within and by group. None or empty: all with all.

    Raises:
        InputError: no rated item is in the table.
        MissingExtraError: scipy is not installed.
    """
    found = [item for item in ratings.items if item in scores]
    _check_found(found, ratings)
    truth = {item: math.fsum(given.values()) / len(given) for item, given in ratings.items.items()}
    metric_agreements, maps = [], []
    for metric in metrics:
        known = [item for item in found if scores[item][metric].value is not None]
        values = np.array([scores[item][metric].value for item in known], dtype=np.float64)
        rated = np.array([truth[item] for item in known], dtype=np.float64)
        missing = Counter(scores[item][metric].status for item in found if scores[item][metric].value is None)
        of_item = [groups[item] for item in known] if groups else None
        metric_agreements.append(_of_ratings(metric, rated, values, missing, of_item, options))
        if len(known):
            maps.append(score_map(metric, values, rated, metric not in options.lower_better, options.rating))
    return Calibration(
        pairwise=False,
        rated=len(ratings.items),
        unmatched=len(ratings.items) - len(found),
        unreadable=ratings.unreadable,
        replaced=ratings.replaced,
        raters=rater_agreement(ratings, options),
        metrics=metric_agreements,
        maps=maps,
    )


def calibrate_choices(
    choices: Ratings, scores: Mapping[str, Mapping[str, Score]], metrics: Sequence[str], options: Options
) -> Calibration:
    """Set choices between two items against the scores of a table. Every rater's choice counts; pairs are drawn.

    Args:
        choices: from :func:`dataflow.ratings.read_choices`.
        scores: from :func:`dataflow.ratings.read_scores`.
        metrics: which of them.
        options: how; ``alpha_level`` and ``rating`` are not read.

    Raises:
        InputError: no pair has both its items in the table.
        MissingExtraError: scipy is not installed.
    """
    found = [pair for pair in choices.items if all(item in scores for item in pair)]
    _check_found(found, choices)
    agreements = []
    for metric in metrics:
        missing: Counter[str] = Counter()
        answered = 0
        earned, pairs, known = [], [], []
        for one, other in found:
            both = scores[one][metric], scores[other][metric]
            if both[0].value is None or both[1].value is None:
                missing[next(score.status for score in both if score.value is None)] += 1
                continue
            values = np.array([score.value for score in both], dtype=np.float64)
            if metric in options.lower_better:
                values = -values
            of_pair = _added(
                [
                    agreement.pair_accuracy([said, 0.0], values, ties=options.ties)
                    for said in choices.items[one, other].values()
                ]
            )
            answered += len(choices.items[one, other])
            known.append(of_pair)
            earned.append((of_pair.accuracy or 0.0) * of_pair.pairs)
            pairs.append(of_pair.pairs)
        interval, reason = _interval(_ratio, np.array(earned), np.array(pairs), options=options)
        agreements.append(
            MetricAgreement(
                metric=metric,
                lower_better=metric in options.lower_better,
                items=answered,
                missing=missing,
                spearman=None,
                kendall=None,
                pairs=_added(known),
                accuracy=interval,
                reason=reason,
            )
        )
    return Calibration(
        pairwise=True,
        rated=len(choices.items),
        unmatched=len(choices.items) - len(found),
        unreadable=choices.unreadable,
        replaced=choices.replaced,
        raters=rater_agreement(choices, options, "nominal"),
        metrics=agreements,
        maps=[],
    )


def rater_agreement(ratings: Ratings, options: Options, level: Level | None = None) -> RaterAgreement:
    """Krippendorff's alpha over the items with two ratings or more, with its interval by item."""
    level = level or options.alpha_level
    several = [list(given.values()) for given in ratings.items.values() if len(given) > 1]
    if not several:
        return RaterAgreement(level, 0, 0, None, "no item has two ratings")
    # Who gave a rating does not matter to alpha: the table is as wide as the most ratings that an item has.
    table = np.full((len(several), max(map(len, several))), np.nan)
    for row, given in zip(table, several, strict=True):
        row[: len(given)] = given

    def alpha(rows: FloatArray) -> float:
        return agreement.krippendorff_alpha(rows.T, level)

    interval, reason = _interval(alpha, table, options=options)
    return RaterAgreement(level, len(several), sum(map(len, several)), interval, reason)


def score_map(
    metric: str, scores: npt.ArrayLike, ratings: npt.ArrayLike, rising: bool = True, rating: float | None = None
) -> ScoreMap:
    """The isotonic regression of ratings on scores: of all monotonous functions the one of least squared error.

    Args:
        metric: its name.
        scores: n finite numbers, at least one; equal ones share the mean of their ratings.
        ratings: n finite numbers.
        rising: whether a higher score must not have a lower rating, or must not have a higher one.
        rating: to find the threshold of.

    Raises:
        MissingExtraError: scipy is not installed.

    Source: Barlow et al. 1972; scipy.optimize.isotonic_regression (BSD-3).
    """
    places, inverse, counts = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=np.asarray(ratings, dtype=np.float64)) / counts
    fitted = _optimize().isotonic_regression(means, weights=counts.astype(np.float64), increasing=rising)
    points: list[tuple[float, float]] = []
    for begin, end in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True):
        ends = dict.fromkeys((int(begin), int(end) - 1))
        points.extend((float(places[place]), float(fitted.x[place])) for place in ends)
    threshold = None if rating is None else _threshold(points if rising else points[::-1], rating)
    return ScoreMap(metric, tuple(points), rising, int(counts.sum()), rating, threshold)


def _threshold(points: Sequence[tuple[float, float]], rating: float) -> float | None:
    """Where the line through points of rising ratings first reaches a rating."""
    before: tuple[float, float] | None = None
    for score, value in points:
        if value >= rating:
            if before is None or value == rating:
                return score
            return before[0] + (score - before[0]) * (rating - before[1]) / (value - before[1])
        before = score, value
    return None


def _of_ratings(
    metric: str,
    rated: FloatArray,
    scores: FloatArray,
    missing: Mapping[str, int],
    groups: Sequence[str] | None,
    options: Options,
) -> MetricAgreement:
    lower = metric in options.lower_better
    values = -scores if lower else scores
    reasons = []
    estimates: list[Estimate | None] = []
    for statistic in (agreement.spearman, agreement.kendall):
        estimate, reason = _interval(statistic, rated, values, options=options, groups=groups)
        estimates.append(estimate)
        reasons.append(reason)
    pairs = agreement.pair_accuracy(rated, values, groups, ties=options.ties)
    accuracy, reason = _accuracy(rated, values, groups, options)
    if accuracy is not None and pairs.accuracy is not None:
        accuracy = accuracy._replace(value=pairs.accuracy)
    reasons.append(reason)
    return MetricAgreement(
        metric=metric,
        lower_better=lower,
        items=len(rated),
        missing=missing,
        spearman=estimates[0],
        kendall=estimates[1],
        pairs=pairs,
        accuracy=accuracy,
        reason="; ".join(dict.fromkeys(filter(None, reasons))),
    )


def _accuracy(
    rated: FloatArray, values: FloatArray, groups: Sequence[str] | None, options: Options
) -> tuple[Estimate | None, str]:
    """The interval of the pair accuracy; its value is of the items that were drawn."""
    if groups is not None:
        members: dict[str, list[int]] = {}
        for place, group in enumerate(groups):
            members.setdefault(group, []).append(place)
        found = [agreement.pair_accuracy(rated[rows], values[rows], ties=options.ties) for rows in members.values()]
        earned = np.array([(each.accuracy or 0.0) * each.pairs for each in found])
        return _interval(_ratio, earned, np.array([each.pairs for each in found]), options=options)
    if len(rated) > _MOST_PAIRED_ITEMS:
        rows = np.random.default_rng(options.seed).choice(len(rated), _MOST_PAIRED_ITEMS, replace=False)
        rated, values = rated[rows], values[rows]
    wanted, given = (np.sign(column[:, None] - column) for column in (rated, values))
    tie = {"wrong": 0.0, "half": 0.5, "skip": 0.0}[options.ties]
    counted = (wanted != 0) & ((given != 0) | (options.ties != "skip"))
    credit = np.where(given == wanted, 1.0, np.where(given == 0, tie, 0.0)) * counted
    decided = counted.astype(np.float64)

    def accuracy(rows: npt.NDArray[np.intp]) -> float | None:
        # An item drawn twice makes no pair with itself, and twice as many with the others.
        drawn = np.bincount(rows, minlength=len(rated)).astype(np.float64)
        pairs = drawn @ decided @ drawn
        return float(drawn @ credit @ drawn / pairs) if pairs else None

    return _interval(accuracy, np.arange(len(rated)), options=options)


def _interval(
    statistic: Callable[..., float | None],
    *columns: npt.NDArray[Any],
    options: Options,
    groups: Sequence[str] | None = None,
) -> tuple[Estimate | None, str]:
    """The figure with its interval, or what there is of them and why not more."""
    value = None
    try:
        value = statistic(*columns)
        found = agreement.bootstrap(
            statistic,
            *columns,
            groups=groups,
            level=options.level,
            resamples=options.resamples,
            seed=options.seed,
        )
    except ValueError as error:
        return (None if value is None else Estimate(value, None, None)), str(error)
    return Estimate(*found), ""


def _ratio(earned: FloatArray, pairs: FloatArray) -> float | None:
    return float(earned.sum() / pairs.sum()) if pairs.sum() else None


def _added(found: Sequence[PairAccuracy]) -> PairAccuracy:
    pairs = sum(each.pairs for each in found)
    credit = sum((each.accuracy or 0.0) * each.pairs for each in found)
    return PairAccuracy(
        credit / pairs if pairs else None,
        pairs,
        sum(each.correct for each in found),
        sum(each.tied_scores for each in found),
        sum(each.tied_truth for each in found),
    )


def _check_found(found: Sequence[Any], ratings: Ratings) -> None:
    if not found:
        shown = next(iter(ratings.items), "")
        raise InputError(
            f"none of the {len(ratings.items):,} rated items is in the table (the first is {shown!r}):"
            " do the key columns hold the same?"
        )


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "a map from scores to ratings") from error
    return optimize
