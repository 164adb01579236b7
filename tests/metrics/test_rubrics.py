"""Rubrics by hand; published weights; nothing missing ever becomes a number."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.metrics import rubrics
from dataflow.metrics.rubrics import GroupMean, VieScore

TENS = st.floats(0, 10)


# VIEScore and GEdit-Bench


def test_viescore_is_the_root_of_two_minima() -> None:
    assert rubrics.viescore([9, 4], [8, 9]) == VieScore(4, 8, pytest.approx(math.sqrt(32)))
    assert rubrics.viescore([0, 10], [10, 10]).overall == 0
    assert rubrics.viescore([10], [10]).overall == 10


def test_viescore_of_a_gap_is_none() -> None:
    assert rubrics.viescore([9, None], [8, 9]) == VieScore(None, 8, None)
    assert rubrics.viescore([9, 9], [None, None]) == VieScore(9, None, None)


@given(st.lists(TENS, min_size=1), st.lists(TENS, min_size=1))
def test_viescore_lies_between_its_parts(semantic: list[float], quality: list[float]) -> None:
    found = rubrics.viescore(semantic, quality)
    assert found.semantic is not None
    assert found.quality is not None
    assert found.overall is not None
    low, high = sorted((found.semantic, found.quality))
    assert low - 1e-9 <= found.overall <= high + 1e-9


@pytest.mark.parametrize("bad", [10.5, -1, 12.5, math.nan, math.inf])
def test_viescore_refuses_what_is_off_its_scale(bad: float) -> None:
    with pytest.raises(ValueError, match=r"semantic: expected a score in 0\.\.10"):
        rubrics.viescore([bad, 5], [5])


def test_viescore_refuses_nothing_and_negative_scales() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        rubrics.viescore([], [5])
    with pytest.raises(ValueError, match="scale"):
        rubrics.viescore([1], [1], scale=(-1, 1))


def test_gedit_is_a_mean_of_groups_of_roots() -> None:
    rows = [
        ("color_alter", rubrics.viescore([9, 9], [4, 4])),
        ("color_alter", rubrics.viescore([1, 5], [4, 9])),
        ("text_change", rubrics.viescore([8], [2])),
    ]
    found = rubrics.gedit(rows, expected=None)
    assert found.overall.groups == {"color_alter": GroupMean(4.0, 2, 2), "text_change": GroupMean(4.0, 1, 1)}
    assert (found.semantic.value, found.quality.value, found.overall.value) == (6.5, 3.0, 4.0)


def test_gedit_wants_its_eleven_groups_and_every_image() -> None:
    row = rubrics.viescore([9], [9])
    rows = [(group, row) for group in rubrics.GEDIT_GROUPS]
    assert len(rows) == 11
    assert rubrics.gedit(rows).overall.value == 9
    assert rubrics.gedit(rows[1:]).overall.value is None
    assert rubrics.gedit(rows[1:]).overall.groups["background_change"] == GroupMean(None, 0, 0)
    failed = [*rows, ("ps_human", VieScore(None, None, None))]
    assert rubrics.gedit(failed).overall.value is None
    assert rubrics.gedit(failed, allow_missing=True).overall.value == 9
    assert rubrics.gedit(failed, allow_missing=True).overall.groups["ps_human"] == GroupMean(9, 2, 1)
    with pytest.raises(ValueError, match="not among those expected"):
        rubrics.gedit([("colour", row)])
    with pytest.raises(ValueError, match=r"0\.\.10"):
        rubrics.gedit([("ps_human", VieScore(11, 1, 1))])


# ImgEdit


def test_imgedit_is_a_plain_mean_and_then_one_of_types() -> None:
    assert rubrics.imgedit(5, 4, 4) == pytest.approx(13 / 3)
    assert rubrics.imgedit(5, None, 4) is None
    with pytest.raises(ValueError, match=r"1\.\.5"):
        rubrics.imgedit(0, 1, 1)
    types = [("add", rubrics.imgedit(5, 5, 5)), ("add", rubrics.imgedit(1, 1, 1)), ("style", rubrics.imgedit(2, 2, 2))]
    assert rubrics.mean_of_groups(types).value == pytest.approx(2.5)


def test_mean_of_groups_of_nothing_is_none() -> None:
    assert rubrics.mean_of_groups([]).value is None
    assert rubrics.mean_of_groups([("a", None)], allow_missing=True).value is None
    with pytest.raises(ValueError, match="a: expected a score"):
        rubrics.mean_of_groups([("a", math.nan)])


# RISEBench


@pytest.mark.parametrize(
    ("category", "scores", "free", "expected"),
    [
        ("temporal_reasoning", (5, 5, 5), False, (5, 100, True)),
        ("causal", (4, 3, 5), False, (3.7, 67.5, False)),
        ("spatial", (5, 1, 5), False, (1.5, 12.5, False)),
        ("spatial", (1, 1, 1), False, (1, 0, False)),
        ("logical_reasoning", (5, 5, None), False, (5, 100, True)),
        ("logical", (5, 1, None), False, (1.1, 2.5, False)),
        ("temporal", (None, 5, 5), True, (5, 100, True)),
        ("temporal", (None, 4, 5), True, (4.2, 80, False)),
        ("temporal", (None, 5, 5), False, (None, None, None)),
        ("logical", (5, None, 5), False, (None, None, None)),
    ],
)
def test_risebench(category: str, scores, free: bool, expected) -> None:
    found = rubrics.risebench(category, *scores, consistency_free=free)
    assert found.complete is expected[2]
    for value, wanted in zip(found, expected[:2], strict=False):
        assert value == (None if wanted is None else pytest.approx(wanted))


def test_risebench_refuses() -> None:
    with pytest.raises(ValueError, match="category"):
        rubrics.risebench("magic", 5, 5, 5)
    with pytest.raises(ValueError, match="logical"):
        rubrics.risebench("logical", 5, 5, 5, consistency_free=True)
    with pytest.raises(ValueError, match=r"reasoning: expected a score in 1\.\.5"):
        rubrics.risebench("causal", 5, 0, 5)


# Pico-Banana, WISE, weighted rubrics


def test_pico_banana_weights() -> None:
    assert rubrics.pico_banana(1, 0, 0, 0) == pytest.approx(0.4)
    assert rubrics.pico_banana(0, 1, 0, 0) == pytest.approx(0.25)
    assert rubrics.pico_banana(0, 0, 1, 0) == pytest.approx(0.2)
    assert rubrics.pico_banana(0, 0, 0, 1) == pytest.approx(0.15)
    assert rubrics.pico_banana(1, 1, None, 1) is None
    assert math.fsum(rubrics.PICO_BANANA_WEIGHTS.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="realism"):
        rubrics.pico_banana(1, 2, 1, 1)


def test_wise() -> None:
    assert rubrics.wiscore(2, 2, 2) == pytest.approx(1)
    assert rubrics.wiscore(2, 1, 0) == pytest.approx(0.8)
    assert rubrics.wiscore(2, None, 0) is None
    with pytest.raises(ValueError, match="consistency"):
        rubrics.wiscore(999, 1, 1)
    for weights in (rubrics.WISE_WEIGHTS, rubrics.WISE_VERIFIED_WEIGHTS):
        assert math.fsum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "overall"),
    [
        ((0.48, 0.58, 0.62, 0.42, 0.51, 0.35), 0.50),
        ((0.81, 0.71, 0.89, 0.83, 0.79, 0.74), 0.80),
        ((0.62, 0.63, 0.77, 0.57, 0.75, 0.40), 0.62),
        ((0.34, 0.35, 0.32, 0.28, 0.29, 0.21), 0.32),
    ],
)
def test_wise_overall_reproduces_its_leaderboard(scores, overall: float) -> None:
    """FLUX.1-dev, GPT-4o, Qwen-Image and SD 1.5 in the README of WISE."""
    categories = dict(zip(rubrics.WISE_WEIGHTS, scores, strict=True))
    # Both sides are rounded to two digits.
    assert rubrics.wise(categories) == pytest.approx(overall, abs=0.01)


def test_wise_verified_weighs_culture_and_the_rest() -> None:
    categories = dict.fromkeys(rubrics.WISE_VERIFIED_WEIGHTS, 0.5) | {"cultural": 1.0}
    assert rubrics.wise(categories, rubrics.WISE_VERIFIED_WEIGHTS) == pytest.approx(0.7)
    assert rubrics.wise(categories | {"time": None}) is None


def test_weighted_rubrics() -> None:
    assert rubrics.weighted({"a": 10, "b": 0}, {"a": 3, "b": 1}, (0, 10)) == 7.5
    assert rubrics.weighted({"a": None, "b": 4}, {"a": 1, "b": 1}, (0, 10)) is None
    # What weighs nothing may be missing.
    assert rubrics.weighted({"a": None, "b": 4}, {"a": 0, "b": 1}, (0, 10)) == 4
    for scores, weights, says in (
        ({"a": 1}, {"b": 1}, "criteria"),
        ({"a": 1}, {"a": 0}, "not all 0"),
        ({"a": 1}, {"a": -1}, "not all 0"),
        ({"a": 1}, {"a": math.inf}, "not all 0"),
        ({}, {}, "not all 0"),
        ({"a": 2}, {"a": 1}, r"0\.\.1"),
    ):
        with pytest.raises(ValueError, match=says):
            rubrics.weighted(scores, weights)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 5)), min_size=1))
def test_weighted_rubrics_stay_within_their_scores(parts: list[tuple[float, float]]) -> None:
    scores = {str(number): score for number, (score, _) in enumerate(parts)}
    found = rubrics.weighted(scores, {str(number): weight for number, (_, weight) in enumerate(parts)})
    assert found is not None
    assert min(scores.values()) - 1e-9 <= found <= max(scores.values()) + 1e-9
