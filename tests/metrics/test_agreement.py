"""Correlations, agreement of raters, Bradley-Terry and intervals against definitions, worked examples, other programs.

The krippendorff package is GPL-3.0, so it is no dependency of the tests: its numbers stand here as version 0.9.0
printed them, beside Krippendorff's own worked example and a second, pairwise form of his definition.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.errors import MissingExtraError
from dataflow.metrics import agreement
from dataflow.metrics.bradley_terry import UnconnectedError, bootstrap_bradley_terry, bradley_terry

SEED = 20261122
KRIPPENDORFF_EXAMPLE = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
"""Four observers, twelve units; "Computing Krippendorff's Alpha-Reliability", 2011, part E."""


def likert() -> np.ndarray:
    """Five raters, forty units, 1 to 5, a quarter missing."""
    draw = np.random.default_rng(SEED)
    truth = draw.integers(1, 6, size=40)
    given_ = np.clip(truth + draw.integers(-1, 2, size=(5, 40)), 1, 5).astype(float)
    given_[draw.random((5, 40)) < 0.25] = np.nan
    return given_


# Rank correlations

numbers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=25).filter(
    lambda pairs: all(len({pair[side] for pair in pairs}) > 1 for side in (0, 1))
)


@given(numbers)
@settings(deadline=None, max_examples=50)
def test_kendall_is_tau_b_and_spearman_is_pearson_of_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = map(list, zip(*pairs, strict=True))
    agree = tied_first = tied_second = both = 0
    for (a, b), (c, d) in itertools.combinations(pairs, 2):
        agree += int(np.sign(a - c) * np.sign(b - d))
        tied_first += a == c
        tied_second += b == d
        both += 1
    expected = agree / math.sqrt((both - tied_first) * (both - tied_second))
    assert agreement.kendall(first, second) == pytest.approx(expected, abs=1e-12)

    def ranks(values: list[int]) -> list[float]:
        return [sum(v < value for v in values) + (1 + values.count(value)) / 2 for value in values]

    pearson = np.corrcoef(ranks(first), ranks(second))[0, 1]
    assert agreement.spearman(first, second) == pytest.approx(pearson, abs=1e-12)
    assert agreement.spearman(first, [-one for one in second]) == pytest.approx(-pearson, abs=1e-12)


@pytest.mark.parametrize("metric", [agreement.spearman, agreement.kendall])
@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([1, 2, 3], [2, 2, 2], "second: all values are equal"),
        ([1], [1], "at least 2 pairs"),
        ([1, 2], [1, 2, 3], "2 values against 3"),
        ([1, None, 2], [1, 2, 3], "first: 1 values are missing, NaN or infinite, the first in row 1"),
        ([1, 2], [1, math.inf], "second: 1 values"),
        ([[1, 2]], [[1, 2]], "expected shape"),
    ],
)
def test_correlations_refuse(metric, first, second, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metric(first, second)


def test_correlations_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match="scipy"):
        agreement.spearman([1, 2], [1, 2])


def test_complete_pairs_drops_and_shows_how_many() -> None:
    first, second = agreement.complete_pairs([1, None, 3, math.nan, 5], [1, 2, None, 4, 6])
    assert first.tolist() == [1, 5]
    assert second.tolist() == [1, 6]
    with pytest.raises(ValueError, match="2 values against 1"):
        agreement.complete_pairs([1, 2], [1])


# Krippendorff's alpha


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example(level, expected: float) -> None:
    assert agreement.krippendorff_alpha(KRIPPENDORFF_EXAMPLE, level) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("nominal", 0.2697284683920239), ("ordinal", 0.7682593820079209), ("interval", 0.7729797595495358)],
)
def test_alpha_equals_krippendorff(level, expected: float) -> None:
    assert agreement.krippendorff_alpha(likert(), level) == pytest.approx(expected, rel=1e-12)


def test_alpha_of_intervals_is_a_ratio_of_pairs() -> None:
    units = [[value for value in unit if not math.isnan(value)] for unit in likert().T]
    units = [unit for unit in units if len(unit) > 1]
    everything = list(itertools.chain.from_iterable(units))
    within = sum(sum((a - b) ** 2 for a in unit for b in unit) / (len(unit) - 1) for unit in units) / len(everything)
    total = len(everything)
    overall = sum((a - b) ** 2 for a in everything for b in everything) / (total * (total - 1))
    assert agreement.krippendorff_alpha(likert(), "interval") == pytest.approx(1 - within / overall, rel=1e-12)


def test_alpha_takes_words_and_knows_its_ends() -> None:
    assert agreement.krippendorff_alpha([["cat", "dog", None], ["cat", "dog", "cow"]]) == 1
    assert agreement.krippendorff_alpha([["a", "b"], ["b", "a"]]) < 0
    # A gap is a gap, whether None or NaN, and a unit with one rating says nothing.
    assert agreement.krippendorff_alpha([[1, 2, None, 5], [1, 2, 4, math.nan]]) == 1


@pytest.mark.parametrize(
    ("ratings", "level", "says"),
    [
        ([[1, 1], [1, 1]], "nominal", "one value"),
        ([[1, None], [None, 1]], "nominal", "no unit has two"),
        ([[1, 2], [1]], "nominal", "as many units each"),
        ([], "nominal", "as many units each"),
        ([["a", "b"], ["a", "b"]], "ordinal", "expected numbers"),
        ([[1, math.inf], [1, 2]], "interval", "infinity"),
        ([[1, 2], [1, 2]], "ratio", "level"),
    ],
)
def test_alpha_refuses(ratings, level, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        agreement.krippendorff_alpha(ratings, level)


# Pair accuracy


def test_pair_accuracy_counts_ties_as_it_is_told() -> None:
    truth, scores = [3, 2, 1, 1], [9.0, 9.0, 5.0, 7.0]
    wrong = agreement.pair_accuracy(truth, scores)
    assert wrong == agreement.PairAccuracy(4 / 5, 5, 4, 1, 1)
    assert agreement.pair_accuracy(truth, scores, ties="half").accuracy == pytest.approx(4.5 / 5)
    assert agreement.pair_accuracy(truth, scores, ties="skip") == agreement.PairAccuracy(1.0, 4, 4, 1, 1)


def test_pair_accuracy_stays_within_groups() -> None:
    truth, scores, prompts = [1, 2, 5, 4], [1, 2, 3, 4], ["a", "a", "b", "b"]
    assert agreement.pair_accuracy(truth, scores, prompts) == agreement.PairAccuracy(0.5, 2, 1, 0, 0)
    assert agreement.pair_accuracy(truth, scores, list("abcd")) == agreement.PairAccuracy(None, 0, 0, 0, 0)


@given(numbers)
@settings(deadline=None, max_examples=50)
def test_pair_accuracy_of_both_orders_is_one(pairs: list[tuple[int, int]]) -> None:
    truth, scores = map(np.array, zip(*pairs, strict=True))
    there = agreement.pair_accuracy(truth, scores, ties="half").accuracy
    back = agreement.pair_accuracy(truth, -scores, ties="half").accuracy
    assert there is not None
    assert back is not None
    assert there + back == pytest.approx(1)


def test_pair_accuracy_refuses() -> None:
    with pytest.raises(ValueError, match="ties"):
        agreement.pair_accuracy([1, 2], [1, 2], ties="right")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 rows against 1 groups"):
        agreement.pair_accuracy([1, 2], [1, 2], ["a"])
    with pytest.raises(ValueError, match="missing"):
        agreement.pair_accuracy([1, None], [1, 2])


# Means


def test_means_of_failures_and_of_silent_judges() -> None:
    found = agreement.means([1.0, None, 0.5, math.nan], worst=0.0, failed=[False, True, False, False])
    assert found == agreement.Means(mean=0.75, strict_mean=0.5, coverage=0.5, expected=4, ok=2, failed=1)


def test_means_without_flags_counts_every_gap_as_a_failure() -> None:
    assert agreement.means([4.0, None], worst=1.0).strict_mean == 2.5
    nothing = agreement.means([None, None], worst=0.0, failed=[False, False])
    assert nothing == agreement.Means(None, None, 0.0, 2, 0, 0)
    assert agreement.means([None], worst=-3.0).strict_mean == -3


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1))
def test_strict_mean_is_never_the_better_one(values: list[float | None]) -> None:
    found = agreement.means(values, worst=0.0)
    if found.mean is not None:
        assert found.strict_mean is not None
        assert found.strict_mean == pytest.approx(found.mean * found.coverage)


def test_means_refuse() -> None:
    with pytest.raises(ValueError, match="no rows"):
        agreement.means([], worst=0)
    with pytest.raises(ValueError, match="row 1 has a value"):
        agreement.means([1.0, 2.0], worst=0, failed=[False, True])
    with pytest.raises(ValueError, match="2 values against 1 flags"):
        agreement.means([1.0, 2.0], worst=0, failed=[False])
    with pytest.raises(ValueError, match="worst"):
        agreement.means([1.0], worst=math.nan)


# Intervals


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 50), (50, 50), (7, 20), (333, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, trials: int, level: float) -> None:
    from scipy.stats import binomtest

    expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
    found = agreement.wilson(successes, trials, level=level)
    assert found == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("successes", "trials", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses(successes: int, trials: int, level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        agreement.wilson(successes, trials, level=level)


def test_bootstrap_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(SEED).normal(3, 2, size=400)
    found = agreement.bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert found == agreement.bootstrap_mean(values)
    assert found != agreement.bootstrap_mean(values, seed=1)


def test_bootstrap_by_prompt_is_wider_where_images_of_a_prompt_are_alike() -> None:
    draw = np.random.default_rng(SEED)
    values = np.repeat(draw.normal(size=50), 8) + draw.normal(0, 0.1, size=400)
    prompts = np.repeat(np.arange(50), 8).tolist()
    alone, together = agreement.bootstrap_mean(values), agreement.bootstrap_mean(values, prompts)
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_bootstrap_mean_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(SEED)
    hits = 0
    for _ in range(300):
        values = np.repeat(draw.normal(size=40), 3) + draw.normal(0, 0.5, size=120)
        found = agreement.bootstrap_mean(values, np.repeat(np.arange(40), 3).tolist(), level=0.9, resamples=500)
        hits += found.low <= 0 <= found.high
    assert 0.84 <= hits / 300 <= 0.95


def test_bootstrap_of_any_statistic() -> None:
    draw = np.random.default_rng(SEED)
    people = draw.normal(size=120)
    scores = people + draw.normal(size=120)
    found = agreement.bootstrap(agreement.spearman, people, scores, resamples=300)
    assert found.value == agreement.spearman(people, scores)
    assert found.low < found.value < found.high
    assert 0.1 < found.high - found.low < 0.4
    assert found == agreement.bootstrap(agreement.spearman, people, scores, resamples=300)


def test_bootstrap_of_a_mean_is_bootstrap_mean() -> None:
    values = np.random.default_rng(SEED).normal(size=30)
    groups = [number % 7 for number in range(30)]
    for keys in (None, groups):
        general = agreement.bootstrap(np.mean, values, groups=keys, resamples=200, seed=5)
        assert general == pytest.approx(agreement.bootstrap_mean(values, keys, resamples=200, seed=5))


def test_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match=r"not defined on \d+ of 1000 resamples"):
        agreement.bootstrap(agreement.spearman, [1, 1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="statistic of all rows is None"):
        agreement.bootstrap(lambda _: None, [1.0])
    with pytest.raises(ValueError, match="columns of one length"):
        agreement.bootstrap(np.mean, [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no rows"):
        agreement.bootstrap_mean([])
    with pytest.raises(ValueError, match="missing"):
        agreement.bootstrap_mean([1.0, None])
    with pytest.raises(ValueError, match="level"):
        agreement.bootstrap_mean([1.0], level=0)
    with pytest.raises(ValueError, match="resamples"):
        agreement.bootstrap_mean([1.0], resamples=0)


# Bradley-Terry


def games(strengths: list[float], count: int, seed: int = SEED) -> list[tuple[str, str, float]]:
    draw = np.random.default_rng(seed)
    played = []
    for _ in range(count):
        one, other = draw.choice(len(strengths), 2, replace=False)
        won = draw.random() < 1 / (1 + math.exp(strengths[other] - strengths[one]))
        played.append((f"m{one}", f"m{other}", float(won)))
    return played


def test_two_items_are_a_logarithm_and_a_tie_is_half_a_win() -> None:
    played = [("a", "b", 1.0)] * 6 + [("b", "a", 1.0)] * 2
    found = bradley_terry(played)
    assert list(found) == ["a", "b"]
    assert found["a"] - found["b"] == pytest.approx(math.log(6 / 2), rel=1e-9)
    assert sum(found.values()) == pytest.approx(0, abs=1e-12)
    tied = bradley_terry([*played, ("a", "b", 0.5), ("b", "a", 0.5)])
    assert tied["a"] - tied["b"] == pytest.approx(math.log(7 / 3), rel=1e-9)


def test_bradley_terry_equals_choix() -> None:
    choix = pytest.importorskip("choix")
    played = games([1.5, 0.5, 0.0, -0.3, -2.0], 2000)
    pairs = [(int(a[1]), int(b[1])) if won else (int(b[1]), int(a[1])) for a, b, won in played]
    theirs = choix.opt_pairwise(5, pairs, tol=1e-12)
    theirs -= theirs.mean()
    found = bradley_terry(played)
    assert [found[f"m{place}"] for place in range(5)] == pytest.approx(theirs.tolist(), abs=1e-6)
    assert [found[f"m{place}"] for place in range(5)] == pytest.approx(choix.ilsr_pairwise(5, pairs), abs=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_bradley_terry_expects_the_wins_there_were(seed: int) -> None:
    played = [*games([3.0, 0.0, -1.0, -4.0], 60, seed), ("m0", "m1", 0.5), ("m1", "m2", 0.5), ("m2", "m3", 0.5)]
    found = bradley_terry(played)
    for item, strength in found.items():
        won = expected = 0.0
        for one, other, score in played:
            if item in (one, other):
                rival = other if item == one else one
                won += score if item == one else 1 - score
                expected += 1 / (1 + math.exp(found[rival] - strength))
        assert expected == pytest.approx(won, abs=1e-6)


def test_lopsided_games_still_converge() -> None:
    played = [("a", "b", 1.0)] * 100_000 + [("b", "a", 1.0), ("b", "c", 1.0), ("c", "b", 1.0)]
    found = bradley_terry(played)
    assert found["a"] - found["b"] == pytest.approx(math.log(100_000), rel=1e-6)


@pytest.mark.parametrize(
    ("played", "says"),
    [
        ([("a", "b", 1.0), ("b", "c", 1.0)], "'a' never lost to any of the other 2|'b', 'c' never beat"),
        ([("a", "b", 0.5), ("c", "d", 0.5)], "'c', 'd'"),
        (
            [("a", "b", 1.0), ("b", "a", 1.0), ("b", "c", 1.0), ("c", "d", 0.5)],
            "'c', 'd' never beat any of the other 2",
        ),
    ],
)
def test_bradley_terry_refuses_what_has_no_finite_strengths(played, says: str) -> None:
    with pytest.raises(UnconnectedError, match=says):
        bradley_terry(played)
    assert all(map(math.isfinite, bradley_terry(played, prior=0.1).values()))


@pytest.mark.parametrize(
    ("played", "says"),
    [([], "no comparisons"), ([("a", "a", 1.0)], "against itself"), ([("a", "b", 0.7)], "a score of 1, .5 or 0")],
)
def test_bradley_terry_refuses(played, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bradley_terry(played)
    with pytest.raises(ValueError, match="prior"):
        bradley_terry([("a", "b", 0.5)], prior=-1)


def test_bootstrap_of_strengths() -> None:
    truth = [1.0, 0.0, -1.0]
    found = bootstrap_bradley_terry(games(truth, 900), resamples=200)
    assert (found.resamples, found.unconnected) == (200, 0)
    assert list(found.items) == ["m0", "m1", "m2"]
    for place, (value, low, high) in enumerate(found.items.values()):
        assert low < value < high
        assert low - 0.1 < truth[place] < high + 0.1
        assert high - low < 0.6
    assert found == bootstrap_bradley_terry(games(truth, 900), resamples=200)


def test_bootstrap_of_strengths_by_prompt_is_wider() -> None:
    # Each prompt's verdict was copied five times: the evidence is that of 100 games, not of 500.
    played = [game for game in games([0.5, -0.5], 100) for _ in range(5)]
    prompts = [number // 5 for number in range(500)]
    alone = bootstrap_bradley_terry(played, resamples=200).items["m0"]
    together = bootstrap_bradley_terry(played, prompts, resamples=200).items["m0"]
    assert together.high - together.low > 1.7 * (alone.high - alone.low)


def test_bootstrap_of_strengths_refuses_what_is_too_little() -> None:
    played = [("a", "b", 1.0), ("b", "a", 1.0), ("a", "b", 1.0)]
    with pytest.raises(UnconnectedError, match=r"\d+ of 100 resamples have no finite strengths"):
        bootstrap_bradley_terry(played, resamples=100)
    assert bootstrap_bradley_terry(played, prior=1.0, resamples=100).unconnected == 0
    with pytest.raises(ValueError, match="3 comparisons against 1 groups"):
        bootstrap_bradley_terry(played, ["a"])
    with pytest.raises(ValueError, match="level"):
        bootstrap_bradley_terry(played, level=2)
