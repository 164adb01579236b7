"""Finished tables of several models side by side: the same prompts, every metric, how sure the differences are.

Rows are matched by their prompt, or by columns that tell them apart, and only what all runs have is compared. Scores of
several pictures of a row are averaged first, so that a prompt counts once and runs are paired by prompt. A score that
could not be had is never a number: it lowers the coverage, and below a floor there is no comparison.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError, MissingExtraError
from dataflow.metrics.agreement import Interval, bootstrap_mean, wilson
from dataflow.metrics.bradley_terry import UnconnectedError, bootstrap_bradley_terry
from dataflow.scored_runs import Column, Indices, LeftOut, Run, first_row, match_columns, matched, read_run
from dataflow.scores import FLOOR, NEVER_MADE, by_status, metrics_in

FloatArray = npt.NDArray[np.float64]

_MOST_RESAMPLES, _LEAST_RESAMPLES, _DRAWS = 10_000, 1000, 10**8
_PERMUTED_AT_ONCE = 10**6
_MOST_PERMUTED_PROMPTS = 2000
"""Above it the sign-flip test's distribution is as good as normal."""
_MOST_STRENGTH_PROMPTS, _STRENGTH_RESAMPLES = 5000, 500


@dataclass(frozen=True, slots=True)
class RunScore:
    """One metric of one run over the compared prompts.

    Attributes:
        run: its name.
        metric: its key.
        expected: pictures there should be a score of; those the metric does not apply to are none.
        scored: pictures with a score.
        missing: pictures without one, by status.
        prompts: prompts with a score.
        mean: over prompts, with its interval; None where nothing is scored.
        strict: the mean in which pictures that were never made count as ``worst``; a judge's failures count in neither.
        worst: the metric's worst value; None where it is not needed and not known.
        worst_was_seen: it was not given: the worst of all scores stands for it.
    """

    run: str
    metric: str
    expected: int
    scored: int
    missing: Mapping[str, int]
    prompts: int
    mean: Interval | None
    strict: float | None
    worst: float | None
    worst_was_seen: bool

    @property
    def coverage(self) -> float:
        """Of the expected scores, those there are."""
        return self.scored / self.expected if self.expected else 0.0

    @property
    def never_made(self) -> int:
        """Pictures that their model failed or declined to make."""
        return sum(count for status, count in self.missing.items() if status in NEVER_MADE)


@dataclass(frozen=True, slots=True)
class PairScore:
    """Two runs on one metric, over the prompts that both have a score of.

    Attributes:
        first: name of a run.
        second: name of another.
        metric: its key.
        prompts: how many.
        difference: mean of first less second, by prompt, with its interval.
        wins: prompts on which the first is better.
        losses: prompts on which the second is.
        ties: prompts with equal scores.
        win_share: wins among those decided, with Wilson's interval; None where all are ties.
        p: of the sign-flip test, two-sided: how often a difference this large comes by chance alone.
    """

    first: str
    second: str
    metric: str
    prompts: int
    difference: Interval | None
    wins: int
    losses: int
    ties: int
    win_share: Interval | None
    p: float | None


@dataclass(frozen=True, slots=True)
class MetricStrengths:
    """Bradley-Terry log strengths of three or more runs over wins by prompt; or why there are none."""

    metric: str
    prompts: int
    strengths: Mapping[str, Interval]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        matched_by: the columns.
        prompts: compared rows of each run.
        repeated: compared rows that share their key with another and were paired in order.
        runs: name and table of each.
        left_out: by run.
        only_in_some: metrics that not every run has, with the runs that do.
        lower_better: metrics of which less is better.
        scores: by metric, then run.
        pairs: by metric, then pair.
        strengths: by metric, for three runs or more.
    """

    matched_by: tuple[str, ...]
    prompts: int
    repeated: int
    runs: Mapping[str, str]
    left_out: Mapping[str, LeftOut]
    only_in_some: Mapping[str, Sequence[str]]
    lower_better: frozenset[str]
    scores: Sequence[RunScore]
    pairs: Sequence[PairScore]
    strengths: Sequence[MetricStrengths]

    @property
    def metrics(self) -> list[str]:
        """In the order of the report."""
        return list(dict.fromkeys(score.metric for score in self.scores))


def compare(
    tables: Mapping[str, str | Path],
    *,
    metrics: Sequence[str] = (),
    match: Sequence[str] = (),
    lower_better: Sequence[str] = (),
    worst: Mapping[str, float] | None = None,
    level: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Comparison:
    """Compare runs on the prompts that all of them have.

    Args:
        tables: finished tables by the name of their run, at least two.
        metrics: keys such as ``clip`` or ``judge.value``; none for all that every run has.
        match: columns that tell rows apart; none for ``prompt_id`` where all tables have it, else the prompt. Rows
            with the same key are paired in order, if every run has as many of them.
        lower_better: metrics of which less is better.
        worst: by metric, the value that a picture that was never made counts as in the strict mean; where it is not
            given, the worst that any run has.
        level: of confidence.
        resamples: of the bootstrap; none for 10,000, fewer above 10,000 prompts, 1,000 at least.
        seed: of all draws.
        force: compare although a run lacks more than one in a hundred scores.

    Raises:
        InputError: a table cannot be read, no prompts in common, no metric in common, or coverage below the floor.
        MissingExtraError: scipy is not installed.
    """
    if len(tables) < 2:
        raise InputError("a comparison takes two tables or more")
    _scipy_stats()
    columns = tuple(match) or match_columns(tables)
    chosen, only_in_some = _chosen_metrics(tables, metrics)
    for name in [*lower_better, *(worst or {})]:
        if name not in chosen:
            raise InputError(f"{name!r} is not among the compared metrics: {', '.join(chosen)}")
    runs = [read_run(name, table, chosen, columns) for name, table in tables.items()]
    places, left_out, repeated = matched(runs)
    bench = _Bench(runs, places, frozenset(lower_better), dict(worst or {}), level, resamples, seed)
    scores = [bench.score(metric, number) for metric in chosen for number in range(len(runs))]
    if not force:
        _check_coverage(scores)
    return Comparison(
        matched_by=columns,
        prompts=len(places[0]),
        repeated=repeated,
        runs={run.name: run.source for run in runs},
        left_out=left_out,
        only_in_some=only_in_some,
        lower_better=frozenset(lower_better),
        scores=scores,
        pairs=[bench.pair(metric, *two) for metric in chosen for two in itertools.combinations(range(len(runs)), 2)],
        strengths=[bench.strengths(metric) for metric in chosen] if len(runs) > 2 else [],
    )


class _Bench:
    """The compared rows of all runs, and what is computed over them."""

    def __init__(
        self,
        runs: Sequence[Run],
        places: Sequence[Indices],
        lower_better: frozenset[str],
        worst: Mapping[str, float],
        level: float,
        resamples: int | None,
        seed: int,
    ) -> None:
        self._runs, self._places = runs, places
        self._lower_better, self._worst = lower_better, worst
        self._level, self._resamples, self._seed = level, resamples, seed

    def score(self, metric: str, number: int) -> RunScore:
        run, rows = self._runs[number], self._places[number]
        column = run.columns[metric]
        missing = {
            status: int(counts[rows].sum()) for status, counts in zip(column.statuses, column.missing, strict=True)
        }
        missing = {status: count for status, count in missing.items() if count}
        scored = int(column.scored[rows].sum())
        values = self._values(metric, number)
        known = values[np.isfinite(values)]
        worst, seen = self._worst_of(metric)
        return RunScore(
            run=run.name,
            metric=metric,
            expected=scored + sum(count for status, count in missing.items() if status != "not_applicable"),
            scored=scored,
            missing=missing,
            prompts=len(known),
            mean=self._mean(known),
            strict=self._strict(column, rows, worst),
            worst=worst,
            worst_was_seen=seen,
        )

    def pair(self, metric: str, first: int, second: int) -> PairScore:
        names = self._runs[first].name, self._runs[second].name, metric
        differences = self._values(metric, first) - self._values(metric, second)
        differences = differences[np.isfinite(differences)]
        gains = -differences if metric in self._lower_better else differences
        wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
        return PairScore(
            *names,
            prompts=len(differences),
            difference=self._mean(differences),
            wins=wins,
            losses=losses,
            ties=len(differences) - wins - losses,
            win_share=wilson(wins, wins + losses, level=self._level) if wins + losses else None,
            p=sign_flip_p(differences, seed=self._seed) if len(differences) else None,
        )

    def strengths(self, metric: str) -> MetricStrengths:
        values = np.stack([self._values(metric, number) for number in range(len(self._runs))])
        if metric in self._lower_better:
            values = -values
        rows = np.arange(values.shape[1])
        if len(rows) > _MOST_STRENGTH_PROMPTS:
            rows = np.sort(np.random.default_rng(self._seed).choice(len(rows), _MOST_STRENGTH_PROMPTS, replace=False))
        games = list(_games([run.name for run in self._runs], values[:, rows]))
        if not games:
            return MetricStrengths(metric, 0, {}, "no prompt has two scores")
        prompts = [prompt for prompt, *_ in games]
        try:
            found = bootstrap_bradley_terry(
                [(one, other, score) for _, one, other, score in games],
                prompts,
                level=self._level,
                resamples=min(self._resamples or _STRENGTH_RESAMPLES, _STRENGTH_RESAMPLES),
                seed=self._seed,
            )
        except UnconnectedError as error:
            return MetricStrengths(metric, len(set(prompts)), {}, str(error))
        return MetricStrengths(metric, len(set(prompts)), {str(name): each for name, each in found.items.items()})

    def _values(self, metric: str, number: int) -> FloatArray:
        """By prompt the mean of its pictures' scores; NaN where there is none."""
        column, rows = self._runs[number].columns[metric], self._places[number]
        with np.errstate(invalid="ignore"):
            return column.total[rows] / column.scored[rows]

    def _mean(self, values: FloatArray) -> Interval | None:
        if not len(values):
            return None
        resamples = self._resamples or max(_LEAST_RESAMPLES, min(_MOST_RESAMPLES, _DRAWS // len(values)))
        return bootstrap_mean(values, level=self._level, resamples=resamples, seed=self._seed)

    def _worst_of(self, metric: str) -> tuple[float | None, bool]:
        if metric in self._worst:
            return self._worst[metric], False
        columns = [run.columns[metric] for run in self._runs]
        if metric in self._lower_better:
            found = max(column.highest for column in columns)
        else:
            found = min(column.lowest for column in columns)
        return (found, True) if math.isfinite(found) else (None, True)

    def _strict(self, column: Column, rows: Indices, worst: float | None) -> float | None:
        never_made = [status in NEVER_MADE for status in column.statuses]
        failed = column.missing[never_made][:, rows].sum(axis=0)
        if failed.any() and worst is None:
            return None
        pictures = column.scored[rows] + failed
        there = pictures > 0
        sums = column.total[rows] + (worst or 0.0) * failed
        return float((sums[there] / pictures[there]).mean()) if there.any() else None


def _chosen_metrics(
    tables: Mapping[str, str | Path], metrics: Sequence[str]
) -> tuple[list[str], Mapping[str, Sequence[str]]]:
    if metrics:
        for table in tables.values():
            for metric in metrics:
                if metric.split(".")[0] not in first_row(table):
                    raise InputError("the table has no such column: has the evaluator run?", path=table, field=metric)
        return list(dict.fromkeys(metrics)), {}
    found = {name: metrics_in(table) for name, table in tables.items()}
    everywhere = sorted(reduce(set.intersection, map(set, found.values())))
    some = sorted(set().union(*found.values()).difference(everywhere))
    only_in_some = {metric: [name for name, keys in found.items() if metric in keys] for metric in some}
    if not everywhere:
        raise InputError(
            "the tables have no score in common; "
            + "; ".join(f"{name} has {', '.join(keys) or 'none'}" for name, keys in found.items())
        )
    return everywhere, only_in_some


def sign_flip_p(differences: npt.ArrayLike, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the paired sign-flip test of a mean difference of 0.

    Under the hypothesis each prompt's difference could as well have the other sign. All signs are tried where there are
    few prompts, ``resamples`` random ones up to 2,000 prompts, and the limit above, ``erfc(|Σd| / √(2 Σd²))``.

    Args:
        differences: n numbers, at least one.
        resamples: how many random ones.
        seed: of the draw.

    Raises:
        MissingExtraError: scipy is not installed.

    Source: Good, "Permutation Tests", 2000; scipy.stats.permutation_test (BSD-3).
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.any() or len(values) == 1:
        return 1.0
    if len(values) > _MOST_PERMUTED_PROMPTS:
        return math.erfc(abs(values.sum()) / math.sqrt(2 * np.square(values).sum()))
    result = _scipy_stats().permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _PERMUTED_AT_ONCE // len(values)),
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(result.pvalue))


def _games(names: Sequence[str], values: FloatArray) -> Iterator[tuple[int, str, str, float]]:
    """Per prompt and pair of runs with a score each: 1 where the first is better, 0 where the second is, else .5."""
    for (one, first), (other, second) in itertools.combinations(zip(names, values, strict=True), 2):
        for prompt, difference in enumerate((first - second).tolist()):
            if math.isfinite(difference):
                yield prompt, one, other, 0.5 if difference == 0 else float(difference > 0)


def _check_coverage(scores: Sequence[RunScore]) -> None:
    thin = [score for score in scores if score.coverage < FLOOR]
    if thin:
        said = "; ".join(
            f"{score.run} has {score.scored:,} of {score.expected:,} scores of {score.metric}"
            f" ({by_status(score.missing) or 'none expected'})"
            for score in thin
        )
        raise InputError(
            f"below {FLOOR:.0%} of the expected scores a comparison says little: {said}."
            " Score what is missing, choose other metrics, or force it"
        )


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "a comparison") from error
    return stats
