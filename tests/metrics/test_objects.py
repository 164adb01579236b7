"""GenEval's rules against a second, slower writing of them, its own prompts, and T2I-CompBench's spatial score."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.metrics import objects
from dataflow.metrics.objects import Detection, GenEvalPrompt, Requirement


def brute_relations(a, b) -> set[str]:
    """The published rule, said in vectors: offset, dead zone, direction."""
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    dead = 0.1 * (np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2]))
    moved = np.where(offset > dead, offset - dead, np.where(offset < -dead, offset + dead, 0))
    if (np.abs(moved) < 1e-3).all():
        return set()
    x, y = moved / np.sqrt((offset**2).sum())
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


def random_box(rng: random.Random, size: float = 512):
    x, y = sorted(rng.uniform(0, size) for _ in range(2)), sorted(rng.uniform(0, size) for _ in range(2))
    return (x[0], y[0], x[1], y[1])


def test_relative_position_of_20000_random_pairs():
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(20_000):
        size = rng.choice([4, 64, 512])
        a, b = random_box(rng, size), random_box(rng, size)
        answer = objects.relative_position(a, b)
        assert answer == brute_relations(a, b)
        seen.update(answer or {"none"})
    assert min(seen[name] for name in (*objects.GENEVAL_RELATIONS, "none")) > 500


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((100, 0, 110, 10), {"right of"}),
        ((-100, 0, -90, 10), {"left of"}),
        ((0, 100, 10, 110), {"below"}),
        ((0, -100, 10, -90), {"above"}),
        ((100, 100, 110, 110), {"right of", "below"}),
        ((0, 0, 10, 10), set()),
        ((2, 0, 12, 10), set()),
        ((3, 0, 13, 10), set()),
        ((4.1, 0, 14.1, 10), {"right of"}),
    ],
)
def test_relative_position_by_hand(box, expected):
    assert objects.relative_position(box, (0, 0, 10, 10)) == expected


def brute_verdict(row: dict, found: list[Detection]) -> bool:
    """GenEval's rules over a raw line, by enumeration."""
    limit = 0.9 if row["tag"] == "counting" else 0.3

    def of(label):
        ranked = sorted((d for d in found if d.label == label and d.score > limit), key=lambda d: -d.score)
        return ranked[:16]

    held = []
    for clause in row["include"]:
        chosen = of(clause["class"])[: clause["count"]]
        good = len(chosen) == clause["count"]
        if good and "color" in clause:
            good = all(d.colour == clause["color"] for d in chosen)
        if good and "position" in clause:
            relation, target = clause["position"]
            others = held[target]
            good = others is not None and all(
                relation in brute_relations(d.box, other.box) for d in chosen for other in others
            )
        held.append(chosen if good else None)
    too_many = any(len(of(clause["class"])) >= clause["count"] for clause in row.get("exclude", []))
    return None not in held and not too_many


@pytest.fixture
def geneval(published_data):
    return published_data / "geneval" / "evaluation_metadata.jsonl"


def test_verdicts_on_all_prompts_with_random_detections(geneval):
    rng = random.Random(1)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for line in geneval.read_bytes().splitlines():
        row, prompt = json.loads(line), objects.parse_geneval(line)
        labels = [clause["class"] for clause in row["include"]]
        colours = [clause.get("color", "red") for clause in row["include"]] + ["red"]
        for _ in range(12):
            found = [
                Detection(
                    rng.choice(labels),
                    rng.choice([0.2, 0.3, 0.5, 0.9, 0.95, 0.99]) + rng.uniform(0, 0.005),
                    random_box(rng),
                    rng.choice(colours),
                )
                for _ in range(rng.choice([1, 2, 2, 3, 4, 20]))
            ]
            verdict = objects.geneval_verdict(prompt, found)
            assert verdict.correct == brute_verdict(row, found), (row, found)
            assert verdict.correct == (not verdict.reasons)
            verdicts[row["tag"], verdict.correct] += 1
    assert len(verdicts) == 12, "each task has right and wrong pictures among them"
    assert min(verdicts.values()) >= 10


def test_the_553_prompts_of_geneval(geneval):
    prompts = objects.load_geneval(geneval)
    assert Counter(prompt.tag for prompt in prompts) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert prompts[0] == GenEvalPrompt("single_object", "a photo of a bench", (Requirement("bench", 1),))
    assert prompts[353].include[1] == Requirement("dog", 1, position=("right of", 0))
    assert prompts[179].exclude == (Requirement("clock", 3),)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tag": "sizes"}, "tag"),
        ({"prompt": None}, "prompt"),
        ({"include": {}}, "include"),
        ({"include": []}, "nothing is asked"),
        ({"include": ["cat"]}, "class"),
        ({"include": [{"class": "cat", "count": 0}]}, "count"),
        ({"include": [{"class": "cat", "count": True}]}, "count"),
        ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, "teal"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "not one before"),
        ({"include": [{"class": "cat", "count": 1, "position": "above"}]}, "relation"),
    ],
)
def test_lines_that_cannot_be_used(change, told, tmp_path):
    row = {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"} | change
    with pytest.raises(ValueError, match=told):
        objects.parse_geneval(json.dumps(row))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"line 3: .*" + told):
        objects.load_geneval(path)
    with pytest.raises(ValueError):
        objects.parse_geneval(b"{")


CAT = Detection("cat", 0.95, (0, 0, 10, 10), "black")


def ask(tag="counting", count=1, exclude=(), **clause):
    return GenEvalPrompt(tag, "cats", (Requirement("cat", count, **clause),), exclude)


def test_thresholds_are_not_reached_by_being_equal():
    at = Detection("cat", 0.3, CAT.box)
    assert objects.geneval_kept([at], "two_object") == {}
    assert objects.geneval_kept([Detection("cat", 0.31, CAT.box)], "two_object") != {}
    assert objects.geneval_kept([Detection("cat", 0.9, CAT.box)], "counting") == {}


def test_at_most_sixteen_of_a_label_and_the_surest_first():
    found = [Detection("cat", 0.5 + i / 100, CAT.box) for i in range(20)]
    kept = objects.geneval_kept(found, "colors")["cat"]
    assert [round(d.score, 2) for d in kept] == [round(0.69 - i / 100, 2) for i in range(16)]


def test_counting_excludes_one_more():
    exclude = (Requirement("cat", 3),)
    assert objects.geneval_verdict(ask(count=2, exclude=exclude), [CAT] * 2).correct
    assert objects.geneval_verdict(ask(count=2, exclude=exclude), [CAT] * 3).reasons == (
        "expected fewer than 3 cat, found 3",
    )
    assert objects.geneval_verdict(ask(count=2), [CAT]).reasons == ("expected 2 cat, found 1",)


def test_only_the_surest_object_needs_the_colour():
    prompt = ask("colors", colour="black")
    white = Detection("cat", 0.5, CAT.box, "white")
    assert objects.geneval_verdict(prompt, [white, CAT]).correct
    assert objects.geneval_verdict(prompt, [Detection("cat", 0.99, CAT.box, "white"), CAT]).reasons == (
        "expected 1 black cat, found 1 white",
    )


def test_a_colour_that_nobody_told_is_no_wrong_colour():
    with pytest.raises(ValueError, match="without a colour"):
        objects.geneval_verdict(ask("colors", colour="black"), [Detection("cat", 0.5, CAT.box)])


def test_a_position_relative_to_something_that_is_missing():
    prompt = GenEvalPrompt("position", "", (Requirement("dog", 1), Requirement("cat", 1, position=("left of", 0))))
    assert objects.geneval_verdict(prompt, [CAT]).reasons == (
        "expected 1 dog, found 0",
        "nothing for cat to be left of",
    )
    assert objects.geneval_verdict(prompt, [CAT, Detection("dog", 0.5, (50, 0, 60, 10))]).correct
    assert (
        "found right of it"
        in objects.geneval_verdict(prompt, [CAT, Detection("dog", 0.5, (-50, 0, -40, 10))]).reasons[0]
    )


@pytest.mark.parametrize(
    "bad",
    [
        Detection("cat", math.nan, (0, 0, 1, 1)),
        Detection("cat", 1, (2, 0, 1, 1)),
        Detection("cat", 1, (0, 0, math.inf, 1)),
    ],
)
def test_detections_that_are_none(bad):
    with pytest.raises(ValueError, match="no detection"):
        objects.geneval_verdict(ask(), [bad])
    with pytest.raises(ValueError, match="no detection"):
        objects.compbench_spatial([bad], "cat", "dog", "near")


def test_overall_is_the_mean_of_six_tasks_not_of_pictures():
    results = [(tag, True) for tag in objects.GENEVAL_TASKS] + [("counting", False)] * 9
    summary = objects.geneval_summary(results)
    assert summary.by_task["counting"] == 0.1
    assert summary.overall == pytest.approx(5.1 / 6)
    assert summary.pictures == 15


def test_no_overall_without_all_six_tasks():
    assert objects.geneval_summary([("counting", True)]) == objects.GenEvalSummary({"counting": 1.0}, None, 1)
    with pytest.raises(ValueError, match="tag"):
        objects.geneval_summary([("sizes", True)])
    with pytest.raises(ValueError, match="no results"):
        objects.geneval_summary([])


def test_colours_from_scores():
    assert objects.colours_of(np.eye(10)) == list(objects.GENEVAL_COLOURS)
    assert objects.colours_of([[0.5, 0.5], [0.1, 0.2]], ("a", "b")) == ["a", "b"]
    for bad in (np.eye(9), np.ones(10), np.full((1, 10), np.nan)):
        with pytest.raises(ValueError, match="scores"):
            objects.colours_of(bad)


def test_colour_prompts():
    prompts = objects.geneval_colour_prompts("dining table")
    assert len(prompts) == 10
    assert prompts[1] == [
        "a photo of a orange dining table",
        "a photo of a orange-colored dining table",
        "a photo of a orange object",
    ]


def test_zero_shot_scores_by_definition():
    rng = np.random.default_rng(0)
    crops, texts = rng.normal(size=(4, 8)), rng.normal(size=(10, 3, 8))
    scores = objects.zero_shot_scores(crops, texts)
    for i, j in np.ndindex(4, 10):
        mean = sum(row / np.linalg.norm(row) for row in texts[j]) / 3
        expected = crops[i] @ mean / np.linalg.norm(crops[i]) / np.linalg.norm(mean)
        assert scores[i, j] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="texts"):
        objects.zero_shot_scores(crops, texts[0])
    with pytest.raises(ValueError, match="compared"):
        objects.zero_shot_scores(crops[:, :5], texts)


def brute_spatial(a: Detection | None, b: Detection | None, relation: str) -> float:
    """T2I-CompBench's rule by cases."""
    if a is None or b is None:
        score = 0.25 * (a.score if a else 0) + 0.25 * (b.score if b else 0)
        return score if score >= 0.5 else 0
    (ax, ay), (bx, by) = (((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in (a, b))
    dx, dy = bx - ax, by - ay
    if relation in ("near", "next to", "on side of"):
        rule = 1 if abs(dx) < 150 or abs(dy) < 150 else 150 / max(abs(dx), abs(dy))
    else:
        points = {
            "on the left of": dx > 0 and abs(dx) > abs(dy),
            "on the right of": dx < 0 and abs(dx) > abs(dy),
            "on the top of": dy > 0 and abs(dy) > abs(dx),
            "on top of": dy > 0 and abs(dy) > abs(dx),
            "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        }[relation]
        w = max(0, min(a.box[2], b.box[2]) - max(a.box[0], b.box[0]))
        h = max(0, min(a.box[3], b.box[3]) - max(a.box[1], b.box[1]))
        areas = [(d.box[2] - d.box[0]) * (d.box[3] - d.box[1]) for d in (a, b)]
        iou = w * h / (sum(areas) - w * h)
        rule = (1 if iou < 0.1 else 0.1 / iou) if points else 0
    score = 0.25 * a.score + 0.25 * b.score + 0.5 * rule
    return score if score >= 0.5 else 0


def test_compbench_spatial_by_its_rule():
    rng = random.Random(2)
    scores: Counter[bool] = Counter()
    for _ in range(3000):
        a = Detection("cat", rng.random(), random_box(rng))
        b = Detection("dog", rng.random(), random_box(rng))
        relation = rng.choice(objects._SPATIAL_WORDS)
        extra = Detection("cat", a.score / 2, random_box(rng))
        found = [d for d in (a, b) if rng.random() < 0.95]
        expected = brute_spatial(a if a in found else None, b if b in found else None, relation)
        answer = objects.compbench_spatial(found + [extra] * (a in found), "cat", "dog", relation)
        assert answer == pytest.approx(expected, abs=1e-12)
        scores[answer > 0] += 1
    assert min(scores.values()) > 300


def test_compbench_relations():
    assert objects.spatial_relation("a cat on the left of a dog") == "on the left of"
    assert objects.spatial_relation("a cat near a dog on the top of a car") == "near"
    assert objects.spatial_relation("a cat and a dog") is None
    with pytest.raises(ValueError, match="relation"):
        objects.compbench_spatial([], "cat", "dog", "above")


@given(st.tuples(*[st.floats(0, 100)] * 4), st.tuples(*[st.floats(0, 100)] * 4))
def test_relations_are_opposite_the_other_way_round(a, b):
    boxes = [(min(x[0], x[2]), min(x[1], x[3]), max(x[0], x[2]), max(x[1], x[3])) for x in (a, b)]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    forth, back = objects.relative_position(*boxes), objects.relative_position(*reversed(boxes))
    assert {opposite[name] for name in forth} == back
