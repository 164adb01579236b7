"""Aggregation of answers by hand, against the reference programs' steps, and against DSG's published tables."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.metrics import questions
from dataflow.metrics.agreement import kendall, spearman
from dataflow.metrics.questions import Aggregate, Question, dpg_bench, dsg, tifa

T2I_MODELS = ("mini-dalle", "sd1dot1", "sd1dot5", "sd2dot1", "vq-diffusion")


# TIFA and DSG


def test_tifa_is_a_mean_and_never_counts_a_gap_as_wrong() -> None:
    assert tifa([True, True, False, True]) == Aggregate(0.75, "ok", 4, 4)
    assert tifa([True, None]) == Aggregate(None, "unanswered", 2, 1)
    assert tifa([True, None], allow_unanswered=True) == Aggregate(1.0, "partial", 2, 1)
    assert tifa([None], allow_unanswered=True) == Aggregate(None, "unanswered", 1, 0)
    assert tifa([]) == Aggregate(None, "not_applicable", 0, 0)


def test_dsg_looks_at_raw_answers_of_parents() -> None:
    answers, parents = {1: False, 2: True, 3: True, 4: True}, {1: [0], 2: [1], 3: [2], 4: []}
    # 2 falls with 1; 3 stands, for the raw answer of 2 is yes.
    assert questions.dsg_atoms(answers, parents) == {1: 0, 2: 0, 3: 1, 4: 1}
    assert dsg(answers, parents) == Aggregate(0.5, "ok", 4, 4)


@pytest.mark.parametrize(
    ("child", "parent", "score"),
    [
        (True, True, 1.0),
        (True, False, 0.0),
        (False, None, 0.0),
        (None, False, 0.0),
        (True, None, None),
        (None, True, None),
        (None, None, None),
    ],
)
def test_dsg_of_unanswered_atoms_is_unknown_only_where_it_matters(child, parent, score) -> None:
    assert questions.dsg_atoms({1: parent, 2: child}, {2: [1]})[2] == score


def test_dsg_states_what_it_rests_on() -> None:
    answers, parents = {1: True, 2: None, 3: False}, {2: [1]}
    assert dsg(answers, parents) == Aggregate(None, "unanswered", 3, 2)
    assert dsg(answers, parents, allow_unanswered=True) == Aggregate(0.5, "partial", 3, 2)
    assert dsg({1: False, 2: None}, {2: [1]}) == Aggregate(0.0, "ok", 2, 2)


@pytest.mark.parametrize("parents", [{1: [7]}, {7: [1]}])
def test_dsg_refuses_strangers(parents) -> None:
    with pytest.raises(ValueError, match="7 is no atom"):
        dsg({1: True}, parents)


@given(st.dictionaries(st.integers(1, 8), st.sampled_from([True, False, None]), min_size=1), st.data())
@settings(max_examples=60)
def test_no_answer_that_was_missing_can_leave_the_bounds(answers, data) -> None:
    parents = {atom: data.draw(st.lists(st.sampled_from([0, *answers]), max_size=2)) for atom in answers}
    with_dependencies = dsg(answers, parents)
    filled = [
        dsg({atom: given_ if given_ is not None else guess for atom, given_ in answers.items()}, parents).value
        for guess in (False, True)
    ]
    assert filled[0] <= filled[1] <= (tifa(a is not False for a in answers.values()).value or 0)
    if with_dependencies.value is not None:
        assert filled == [with_dependencies.value] * 2


@pytest.fixture
def published(published_data: Path) -> Path:
    """DSG's own files: answers of three models, and what people said."""
    return published_data / "dsg"


def read_answers(folder: Path, vqa: str) -> dict[tuple[str, str], dict[int, bool]]:
    """As the reference reads them: whatever is not the word yes, an empty answer too, is a no."""
    found: dict[tuple[str, str], dict[int, bool]] = defaultdict(dict)
    with (folder / f"{vqa}_dsg.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["t2i_model"], row["item_id"]][int(row["question_id"])] = row["answer"] == "yes"
    return found


def read_parents(folder: Path) -> dict[str, dict[int, list[int]]]:
    """As the reference reads them: a prompt with one parent that is no number has no dependencies at all."""
    raw: dict[str, dict[int, str]] = defaultdict(dict)
    with (folder / "pali17b_dsg.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            raw[row["item_id"]][int(row["question_id"])] = row["dependency_id"]
    parents = {}
    for item, atoms in raw.items():
        try:
            parents[item] = {atom: [int(one) for one in text.split(",")] for atom, text in atoms.items()}
        except ValueError:
            parents[item] = {}
    return parents


@pytest.mark.parametrize(
    ("vqa", "dependencies", "expected", "p_values"),
    [
        ("mplug", True, (0.463, 0.380), (9.454980885221468e-44, 1.7383231097374204e-41)),
        ("mplug", False, (0.464, 0.378), (7.181821197264219e-44, 6.481086461681368e-41)),
        ("instructblip", True, (0.442, 0.364), (1.119379944290985e-39, 3.1980138119050176e-37)),
        ("instructblip", False, (0.436, 0.355), (1.757469672881809e-38, 2.0226556044720833e-35)),
        ("pali17b", True, (0.571, 0.458), (2.500599870516443e-70, 1.4702926454843743e-63)),
        ("pali17b", False, (0.570, 0.457), (3.4035331067710746e-70, 4.356245185978116e-63)),
    ],
)
def test_dsg_reproduces_its_correlation_with_people(
    published, vqa: str, dependencies: bool, expected, p_values
) -> None:
    """The README of DSG, "Human correlation on TIFA-160": three digits, and p values to twelve."""
    from scipy import stats

    answers, parents, scores, people = read_answers(published, vqa), read_parents(published), [], []
    ratings: dict[tuple[str, str], list[int]] = defaultdict(list)
    with (published / "tifa160-likert-anns.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            ratings[row["t2i_model"], row["item_id"]].append(int(row["answer"]))
    for model in T2I_MODELS:
        for number in range(160):
            key = (model, f"tifa160_{number}")
            people.append(fmean(ratings[key]))
            if key not in answers:
                scores.append(0.0)  # never asked about: the reference gives it 0
                continue
            found = dsg(answers[key], parents[key[1]]) if dependencies else tifa(answers[key].values())
            assert found.status == "ok"
            scores.append(found.value)
    assert len(scores) == 800
    assert (round(spearman(scores, people), 3), round(kendall(scores, people), 3)) == expected
    assert stats.spearmanr(scores, people).pvalue == pytest.approx(p_values[0], rel=1e-11, abs=0)
    assert stats.kendalltau(scores, people).pvalue == pytest.approx(p_values[1], rel=1e-11, abs=0)


def test_dsg_reproduces_its_table_of_stable_diffusion(published) -> None:
    """The README of DSG, "DSG-1k score calculation": Stable Diffusion 2.1 answered by PaLI."""
    groups = {
        "tifa": ("tifa160",),
        "paragraph": ("stanford", "localized"),
        "relation": ("vrd",),
        "count": ("countbench",),
        "real_user": ("diffusiondb", "midjourney"),
        "pose": ("posescript",),
        "defying": ("whoops",),
        "text": ("drawtext",),
    }
    parents, scores = read_parents(published), {"tifa160_134": 0.0}
    for (model, item), answers in read_answers(published, "pali17b").items():
        if model == "sd2dot1":
            scores[item] = dsg(answers, parents[item]).value or 0.0
    means = {
        name: f"{fmean(score for item, score in scores.items() if item.split('_')[0] in prefixes):.1%}"
        for name, prefixes in groups.items()
    }
    assert len(scores) == 1060
    assert means == {
        "tifa": "88.1%",
        "paragraph": "85.1%",
        "relation": "34.4%",
        "count": "70.4%",
        "real_user": "89.7%",
        "pose": "89.6%",
        "defying": "84.4%",
        "text": "83.7%",
    }
    assert f"{fmean(scores.values()):.1%}" == "80.5%"


# DPG-Bench

DPG = [
    Question("a", 1, "entity - whole", [0]),
    Question("a", 2, "attribute - color", [1]),
    Question("b", 1, "entity - whole"),
    Question("b", 2, "attribute - color", [1]),
    Question("b", 3, "relation - spatial", [2]),
    Question("c", 1, "global"),
]


def test_dpg_bench_in_its_clean_form() -> None:
    found = dpg_bench(
        DPG,
        {
            "a": [{1: True, 2: True}, {1: False, 2: True}],
            "b": [{1: False, 2: True, 3: True}],
            "c": [{1: True}],
        },
    )
    assert {item: one.value for item, one in found.prompts.items()} == pytest.approx({"a": 50, "b": 100 / 3, "c": 100})
    assert found.score == Aggregate(pytest.approx((50 + 100 / 3 + 100) / 3), "ok", 3, 3)
    # Scores after the dependencies: a's colour 1 and 0, b's colour 0, b's relation 1.
    assert {name: one.value for name, one in found.detailed.items()} == pytest.approx(
        {"entity - whole": 100 / 3, "attribute - color": 100 / 3, "relation - spatial": 100, "global": 100}
    )
    assert list(found.broad) == ["entity", "attribute", "relation", "global"]
    assert found.left_out == []


def test_dpg_bench_as_ella_computes_it() -> None:
    found = dpg_bench(
        DPG,
        {
            "a": [{1: True, 2: True}],
            "b": [{1: True, 2: True, 3: True}, {1: False, 2: True, 3: True}],
        },
        compat="ella",
    )
    # a presumes the row that is not read; b's second picture cascades to 0; c has no pictures.
    assert found.left_out == ["a"]
    assert found.prompts == {"b": Aggregate(50, "ok", 6, 6)}
    assert found.score == Aggregate(50, "ok", 1, 1)
    # The last picture's answers as given.
    assert {name: one.value for name, one in found.detailed.items()} == {
        "entity - whole": 0,
        "attribute - color": 100,
        "relation - spatial": 100,
    }


def ella(rows: list[Question], answers: dict[str, list[dict[int, bool]]]) -> float | None:
    """The reference's steps, told again from its description, quirk by quirk."""
    prompts: dict[str, list[Question]] = {}
    for row in rows[1:]:
        prompts.setdefault(row.item_id, []).append(row)
    scores = []
    for item, pictures in answers.items():
        try:
            each = []
            for picture in pictures:
                known = {row.id: float(picture[row.id]) for row in prompts[item]}
                for row in prompts[item]:
                    for parent in row.parents:
                        if parent and known[parent] == 0:
                            known[row.id] = 0.0
                            break
                each.append(sum(known.values()) / len(known))
            scores.append(sum(each) / len(each))
        except KeyError:
            continue
    return 100 * sum(scores) / len(scores) if scores else None


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_dpg_bench_compat_follows_the_reference(data) -> None:
    rows, answers = [], {}
    for item in "abc":
        count = data.draw(st.integers(1, 4))
        ids = list(range(1, count + 1))
        rows += [
            Question(item, one, "entity", data.draw(st.lists(st.sampled_from([0, *ids]), max_size=2))) for one in ids
        ]
        answers[item] = [{one: data.draw(st.booleans()) for one in ids} for _ in range(data.draw(st.integers(1, 2)))]
    expected, found = ella(rows, answers), dpg_bench(rows, answers, compat="ella").score.value
    assert found == (None if expected is None else pytest.approx(expected))


def test_dpg_bench_wants_every_prompt_and_every_answer() -> None:
    whole = {"a": [{1: True, 2: True}], "b": [{1: True, 2: None, 3: True}], "c": [{1: True}]}
    for compat in (None, "ella"):
        found = dpg_bench(DPG, whole, compat=compat)
        assert found.score.value is None
        assert found.score.status == "unanswered"
        assert found.prompts["b"] == Aggregate(None, "unanswered", 3, 1)
    partial = dpg_bench(DPG, whole, allow_unanswered=True)
    assert partial.prompts["b"] == Aggregate(100, "partial", 3, 1)
    assert partial.score == Aggregate(100, "partial", 3, 3)
    missing = dpg_bench(DPG, {"a": whole["a"], "c": whole["c"]})
    assert missing.prompts["b"] == Aggregate(None, "unanswered", 3, 0)
    assert missing.score == Aggregate(None, "unanswered", 3, 2)
    assert missing.detailed["relation - spatial"].value is None
    assert dpg_bench(DPG, {"a": whole["a"], "c": whole["c"]}, allow_unanswered=True).score.status == "partial"


@pytest.mark.parametrize(
    ("rows", "answers", "says"),
    [
        ([Question("a", 1, "x"), Question("a", 1, "x")], {}, "there twice"),
        ([Question("a", 0, "x")], {}, "numbered from 1"),
        ([Question("a", 1, "x", [5])], {}, "presumes one"),
        ([Question("a", 1, "x")], {"z": []}, "no questions"),
        ([Question("a", 1, "x")], {"a": [{9: True}]}, "9 is no atom"),
    ],
)
def test_dpg_bench_refuses(rows, answers, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dpg_bench(rows, answers)
    with pytest.raises(ValueError, match="compat"):
        dpg_bench([], {}, compat="ELLA")  # type: ignore[arg-type]


# Soft-TIFA and VQAScore


def test_soft_tifa_means() -> None:
    assert questions.soft_tifa_am([0.9, 0.4, 0.5]).value == pytest.approx(0.6)
    assert questions.soft_tifa_gm([0.9, 0.4, 0.5]).value == pytest.approx((0.9 * 0.4 * 0.5) ** (1 / 3))
    assert questions.soft_tifa_gm([1.0, 0.0]).value == 0
    for mean in (questions.soft_tifa_am, questions.soft_tifa_gm):
        assert mean([0.5, None]) == Aggregate(None, "unanswered", 2, 1)
        assert mean([0.5, None], allow_unanswered=True) == Aggregate(pytest.approx(0.5), "partial", 2, 1)
        assert mean([]).status == "not_applicable"
        assert mean([1 + 1e-7, 1.0]).value == 1
        with pytest.raises(ValueError, match="probability"):
            mean([1.2])
        with pytest.raises(ValueError, match="probability"):
            mean([math.nan])


@given(st.lists(st.floats(0, 1), min_size=1))
def test_geometric_mean_is_never_above_the_arithmetic(probabilities: list[float]) -> None:
    geometric = questions.soft_tifa_gm(probabilities).value
    arithmetic = questions.soft_tifa_am(probabilities).value
    assert geometric is not None
    assert arithmetic is not None
    assert 0 <= geometric <= arithmetic <= 1


def test_answer_probability_is_a_geometric_mean() -> None:
    assert questions.answer_probability([math.log(0.8)]) == pytest.approx(0.8)
    assert questions.answer_probability([math.log(0.8), math.log(0.2)]) == pytest.approx(0.4)
    assert questions.answer_probability([-math.inf, 0.0]) == 0
    for bad in ([], [0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"token|log probability"):
            questions.answer_probability(bad)


def test_first_token_probability_counts_a_token_once() -> None:
    found = {"Yes": math.log(0.6), " yes": math.log(0.1), "No": math.log(0.25)}
    spellings = ["Yes", " Yes", "yes", " yes", "Yes"]
    assert questions.first_token_probability(found, spellings) == pytest.approx(0.7)
    # Two spellings with one first token, as ids.
    assert questions.first_token_probability({9693: math.log(0.6), 7: math.log(0.1)}, [9693, 9693]) == pytest.approx(
        0.6
    )


def test_first_token_probability_of_a_list_that_was_cut_off_is_unknown() -> None:
    assert questions.first_token_probability({"No": -0.01}, ["Yes"]) is None
    assert questions.first_token_probability({"No": -0.01}, ["Yes"], absent=0.0) == 0
    assert questions.first_token_probability({"Yes": 0.0, "yes": -20.0}, ["Yes", "yes"]) == 1


@pytest.mark.parametrize(
    ("found", "spellings", "says"),
    [
        ({}, ["Yes"], "expected tokens"),
        ({"Yes": -1.0}, [], "expected tokens"),
        ({"Yes": -1.0}, "Yes", "expected tokens"),
        ({"Yes": 0.5}, ["Yes"], "at most 0"),
        ({"Yes": -0.1, "yes": -0.1}, ["Yes", "yes"], "sum to"),
    ],
)
def test_first_token_probability_refuses(found, spellings, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        questions.first_token_probability(found, spellings)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("yes", True), (" Yes.\n", True), ("YES!", True), ("no", False), ("yes 1000", False), ("", False), (None, None)],
)
def test_is_yes(text, answer) -> None:
    assert questions.is_yes(text) is answer
