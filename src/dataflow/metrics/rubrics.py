"""From a judge's scores to one: VIEScore, GEdit-Bench, ImgEdit, RISEBench, Pico-Banana, WISE, and any weighted rubric.

A score is a number within its scale, or None where the judge gave none. None in gives None out: no rubric fills a gap
with a number. A number outside its scale, NaN or infinity raises ValueError, for it is a parser's mistake and no score.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

Score = float | None
Scale = tuple[float, float]

GEDIT_GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
"""The groups of GEdit-Bench, named as in its files."""

PICO_BANANA_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"instruction": 0.40, "realism": 0.25, "preservation": 0.20, "technical": 0.15}
)
PICO_BANANA_KEEP = 0.7
"""About what an edit has to reach to be kept; the paper gives no more digits."""

WISE_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
)
"""Of the categories in WISE (2025): their shares of its 1,000 prompts."""

WISE_VERIFIED_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"cultural": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
)
"""Of the categories in WISE_Verified (2026), whose scores per prompt are 0 or 1."""

RISE_CATEGORIES = ("temporal", "causal", "spatial", "logical")


class VieScore(NamedTuple):
    """Semantic consistency, perceptual quality and overall, each on the judge's scale (0..10)."""

    semantic: Score
    quality: Score
    overall: Score


class GroupMean(NamedTuple):
    """A mean, how many rows belong to it and how many of them have a score."""

    value: Score
    rows: int
    scored: int


@dataclass(frozen=True)
class GroupedMean:
    """The mean of groups' means. ``value`` is None where a group has none, or one that was expected is not there."""

    value: Score
    groups: Mapping[Hashable, GroupMean]


@dataclass(frozen=True)
class GEditReport:
    """GEdit-Bench: the same three numbers per group and, as the mean of groups, in all."""

    semantic: GroupedMean
    quality: GroupedMean
    overall: GroupedMean


class RiseScore(NamedTuple):
    """Weighted score 1..5, the same as 0..100, and whether every score asked for is 5."""

    score: Score
    percent: Score
    complete: bool | None


def weighted(scores: Mapping[str, Score], weights: Mapping[str, float], scale: Scale = (0.0, 1.0)) -> Score:
    """Any weighted rubric: ``Σ w s / Σ w``.

    Args:
        scores: per criterion, within ``scale``; exactly the criteria of ``weights``.
        weights: 0 or more, not all 0; they need not sum to 1.
        scale: lowest and highest score.

    Returns:
        On the same scale, higher is better; None if any score with a weight is None.

    Raises:
        ValueError: other criteria than weights, a score out of range, or weights that cannot be used.
    """
    if set(scores) != set(weights):
        raise ValueError(f"criteria {sorted(scores)} are not those of the weights, {sorted(weights)}")
    if not all(0 <= weight < math.inf for weight in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"weights: expected numbers of 0 or more, not all 0, not {dict(weights)}")
    checked = {name: _score(value, scale, name) for name, value in scores.items()}
    parts = [(weights[name], value) for name, value in checked.items() if weights[name] > 0]
    total = 0.0
    for weight, value in parts:
        if value is None:
            return None
        total += weight * value
    return total / math.fsum(weight for weight, _ in parts)


def viescore(semantic: Sequence[Score], quality: Sequence[Score], scale: Scale = (0.0, 10.0)) -> VieScore:
    """VIEScore: ``SC = min(semantic)``, ``PQ = min(quality)``, ``O = √(SC · PQ)``.

    Args:
        semantic: the judge's scores of semantic consistency; of an edit: success, and not overdone.
        quality: of perceptual quality: naturalness, and no artifacts.
        scale: lowest (not below 0) and highest score.

    Returns:
        Three scores on the same scale, higher is better; each None if one that it needs is None.

    Raises:
        ValueError: no scores, a score out of range, or a scale below 0.

    Source: Ku et al., arXiv:2312.14867; TIGER-AI-Lab/VIEScore (MIT).
    """
    if not semantic or not quality:
        raise ValueError("expected scores of both kinds")
    if scale[0] < 0:
        raise ValueError(f"scale: a root wants scores of 0 or more, not {scale}")
    consistency = _least([_score(one, scale, "semantic") for one in semantic])
    appearance = _least([_score(one, scale, "quality") for one in quality])
    overall = None if consistency is None or appearance is None else math.sqrt(consistency * appearance)
    return VieScore(consistency, appearance, overall)


def mean_of_groups(
    rows: Iterable[tuple[Hashable, Score]],
    *,
    expected: Collection[Hashable] | None = None,
    allow_missing: bool = False,
) -> GroupedMean:
    """The mean within each group, then the plain mean of groups: every group weighs the same, however many rows it has.

    Args:
        rows: (group, score).
        expected: the groups that there must be; one without rows makes the whole None. Rows of others are refused.
        allow_missing: take groups' means over the rows that have a score.

    Returns:
        The means, None by the rules of this module, and how many rows each rests on.

    Raises:
        ValueError: a score that is not finite, or a group that is not expected.
    """
    found: dict[Hashable, list[Score]] = {group: [] for group in expected or ()}
    for group, score in rows:
        if expected is not None and group not in found:
            raise ValueError(f"group {group!r} is not among those expected")
        found.setdefault(group, []).append(_score(score, (-math.inf, math.inf), str(group)))
    groups = {group: _group_mean(scores, allow_missing) for group, scores in found.items()}
    values = [one.value for one in groups.values()]
    known = [value for value in values if value is not None]
    whole = len(known) == len(values) and known
    return GroupedMean(math.fsum(known) / len(known) if whole else None, groups)


def gedit(
    rows: Iterable[tuple[str, VieScore]],
    *,
    expected: Collection[str] | None = GEDIT_GROUPS,
    allow_missing: bool = False,
) -> GEditReport:
    """GEdit-Bench: VIEScore per image, the mean of images per group, the mean of groups. One language at a time.

    The overall number is the mean of the images' roots, not the root of the means.

    Args:
        rows: (group, scores of the image); an image that was not made is a row, too.
        expected: the groups that there must be; None takes those there are.
        allow_missing: take groups' means over the images that have a score. The reference does, and puts random numbers
            for answers it cannot read.

    Returns:
        Scores in 0..10, higher is better; None by the rules of this module.

    Raises:
        ValueError: a group that is not expected, or a score out of range.

    Source: Step1X-Edit, arXiv:2504.17761 (Apache-2.0).
    """
    table = list(rows)
    for group, one in table:
        for score in one:
            _score(score, (0.0, 10.0), group)

    def column(field: str) -> GroupedMean:
        return mean_of_groups(
            ((group, getattr(one, field)) for group, one in table), expected=expected, allow_missing=allow_missing
        )

    return GEditReport(column("semantic"), column("quality"), column("overall"))


def imgedit(first: Score, second: Score, third: Score) -> Score:
    """ImgEdit-Bench (basic) of one image: the mean of its three scores; :func:`mean_of_groups` by edit type follows.

    The judge is told that the second and third must not exceed the first; as in the reference nothing enforces it. The
    reference rounds each image and type to two decimals and averages whatever scores it can read.

    Args:
        first: 1..5, whether the instruction was followed.
        second: 1..5.
        third: 1..5.

    Returns:
        1..5, higher is better; None if any is None.

    Raises:
        ValueError: a score out of range.

    Source: Ye et al., arXiv:2505.20275; PKU-YuanGroup/ImgEdit (no licence file; the formula only).
    """
    return weighted({"1": first, "2": second, "3": third}, {"1": 1.0, "2": 1.0, "3": 1.0}, (1.0, 5.0))


def risebench(
    category: str, consistency: Score, reasoning: Score, plausibility: Score, *, consistency_free: bool = False
) -> RiseScore:
    """RISEBench of one image: ``.3 consistency + .5 reasoning + .2 plausibility``.

    Where reasoning is 1 the score is halved, to no less than 1. Logical cases are ``.3 consistency + .7 reasoning``;
    cases free of consistency ``.8 reasoning + .2 plausibility``.

    Args:
        category: one of :data:`RISE_CATEGORIES`, with or without ``_reasoning``.
        consistency: 1..5, appearance consistency; not read where the case is free of it.
        reasoning: 1..5, instruction reasoning.
        plausibility: 1..5, visual plausibility; not read in logical cases.
        consistency_free: the case asks for no consistency; not for logical ones.

    Returns:
        Score 1..5 and 0..100, higher is better; complete (the benchmark's accuracy is its mean) if all that were read
        are 5. None if one that is read is None. The reference counts no case free of consistency as complete.

    Raises:
        ValueError: another category, a score out of range, or a logical case free of consistency.

    Source: Zhao et al., arXiv:2504.02826; PhoenixZ810/RISEBench (no licence file; the formula only).
    """
    kind = category.removesuffix("_reasoning")
    if kind not in RISE_CATEGORIES or (consistency_free and kind == "logical"):
        raise ValueError(
            f"category: expected one of {RISE_CATEGORIES}, logical not free of consistency, not {category!r}"
        )
    weights = {"consistency": 0.3, "reasoning": 0.5, "plausibility": 0.2}
    if kind == "logical":
        weights = {"consistency": 0.3, "reasoning": 0.7}
    elif consistency_free:
        weights = {"reasoning": 0.8, "plausibility": 0.2}
    given = {"consistency": consistency, "reasoning": reasoning, "plausibility": plausibility}
    read = {name: given[name] for name in weights}
    score = weighted(read, weights, (1.0, 5.0))
    if score is None:
        return RiseScore(None, None, None)
    if reasoning == 1:
        score = max(1.0, score / 2)
    return RiseScore(score, 25 * (score - 1), all(value == 5 for value in read.values()))


def pico_banana(instruction: Score, realism: Score, preservation: Score, technical: Score) -> Score:
    """Pico-Banana-400K's rubric: ``.40 instruction + .25 realism + .20 preservation + .15 technical``.

    Args:
        instruction: 0..1, instruction compliance.
        realism: 0..1, editing realism.
        preservation: 0..1, preservation balance.
        technical: 0..1, technical quality.

    Returns:
        0..1, higher is better; edits of about :data:`PICO_BANANA_KEEP` and more were kept. None if any is None.

    Raises:
        ValueError: a score out of range.

    Source: Qian et al., arXiv:2510.19808 (its data are CC BY-NC-ND; the weights are stated in its description).
    """
    names = dict(zip(PICO_BANANA_WEIGHTS, (instruction, realism, preservation, technical), strict=True))
    return weighted(names, PICO_BANANA_WEIGHTS)


def wiscore(consistency: Score, realism: Score, aesthetic: Score) -> Score:
    """WiScore of one image: ``(.7 consistency + .2 realism + .1 aesthetic) / 2``.

    Args:
        consistency: 0..2.
        realism: 0..2.
        aesthetic: 0..2.

    Returns:
        0..1, higher is better; None if any is None. The reference's 999, for an answer it cannot read, is out of range.

    Raises:
        ValueError: a score out of range.

    Source: Niu et al., arXiv:2503.07265; PKU-YuanGroup/WISE (no licence file; the formula only).
    """
    scores = {"consistency": consistency, "realism": realism, "aesthetic": aesthetic}
    score = weighted(scores, {"consistency": 0.7, "realism": 0.2, "aesthetic": 0.1}, (0.0, 2.0))
    return None if score is None else score / 2


def wise(categories: Mapping[str, Score], weights: Mapping[str, float] = WISE_WEIGHTS) -> Score:
    """WISE's overall score: the weighted mean of its six categories' means.

    Args:
        categories: 0..1 per category of ``weights``.
        weights: :data:`WISE_WEIGHTS` or :data:`WISE_VERIFIED_WEIGHTS`.

    Returns:
        0..1, higher is better; None if any is None.

    Raises:
        ValueError: other categories, or a score out of range.

    Source: as :func:`wiscore`.
    """
    return weighted(categories, weights)


def _score(value: Score, scale: Scale, name: str) -> Score:
    if value is None:
        return None
    if not (math.isfinite(value) and scale[0] <= value <= scale[1]):
        raise ValueError(f"{name}: expected a score in {scale[0]:g}..{scale[1]:g}, not {value}")
    return float(value)


def _least(scores: Sequence[Score]) -> Score:
    known = [score for score in scores if score is not None]
    return min(known) if len(known) == len(scores) else None


def _group_mean(scores: Sequence[Score], allow_missing: bool) -> GroupMean:
    known = [score for score in scores if score is not None]
    usable = known and (allow_missing or len(known) == len(scores))
    return GroupMean(math.fsum(known) / len(known) if usable else None, len(scores), len(known))
