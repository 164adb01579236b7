"""Comparing scored tables: what is matched, what is counted, and the figures against scipy, choix and pen and paper."""

from __future__ import annotations

import itertools
import json
import math
import random

import choix
import numpy as np
import pytest
from scipy import stats

from dataflow.commands.layout import plain
from dataflow.comparison import compare, sign_flip_p
from dataflow.errors import InputError
from dataflow.metrics.agreement import bootstrap_mean
from dataflow.operators.evaluation import with_scores
from dataflow.scores import metrics_in, scores_at, values_at
from dataflow.types import Outcome
from dataflow.utils.storage import TableWriter


def row(prompt, *scores, key="clip", **columns):
    """A row as an evaluator writes it: numbers and objects are scores, a word is the status of one there is none of."""
    found = [(None, score) if isinstance(score, str) else (score, "ok") for score in scores]
    return {
        "conversations": [{"role": "user", "content": prompt}],
        key: [value for value, _ in found],
        f"{key}_status": [status for _, status in found],
        f"{key}_by": "model#1",
        **columns,
    }


@pytest.fixture
def table(tmp_path):
    """Write rows as a table of some format."""
    numbers = itertools.count()

    def table(rows, kind="jsonl"):
        path = tmp_path / f"{next(numbers)}.{kind}"
        with TableWriter(path, kind) as writer:
            for each in rows:
                writer.write(each)
        return path

    return table


def two(table, first, second, **options):
    options.setdefault("resamples", 200)
    return compare({"A": table(first), "B": table(second)}, **options)


def random_rows(seed, count=60, shift=0.0, **columns):
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(size=count)
    return [row(f"p{n}", float(hard[n] + shift + rng.normal(scale=0.5)), **columns) for n in range(count)]


class TestFigures:
    def test_by_hand(self, table):
        a = [row("p", 0.2, 0.4), row("q", 0.8, "parse_error"), row("r", "generation_failed", "generation_failed")]
        b = [row("p", 0.1, 0.1), row("q", 0.8, 0.8), row("r", 0.5, 0.7)]
        found = two(table, a, b, worst={"clip": 0.0}, force=True)
        first, second = found.scores
        assert (first.expected, first.scored, first.prompts) == (6, 3, 2)
        assert first.missing == {"parse_error": 1, "generation_failed": 2}
        assert first.coverage == 0.5
        assert first.mean.value == pytest.approx((0.3 + 0.8) / 2)
        assert first.strict == pytest.approx((0.3 + 0.8 + 0) / 3)  # the judge's failure is in neither
        assert second.mean.value == second.strict == pytest.approx((0.1 + 0.8 + 0.6) / 3)
        [pair] = found.pairs
        assert (pair.prompts, pair.wins, pair.losses, pair.ties) == (2, 1, 0, 1)
        assert pair.difference.value == pytest.approx(0.1)

    def test_intervals_are_those_of_prompts(self, table):
        a, b = random_rows(1, shift=0.3), random_rows(2)
        found = two(table, a, b, resamples=500, seed=3)
        values = [np.array([each["clip"][0] for each in rows]) for rows in (a, b)]
        for score, each in zip(found.scores, values, strict=True):
            assert score.mean == bootstrap_mean(each, resamples=500, seed=3)
        [pair] = found.pairs
        assert pair.difference == bootstrap_mean(values[0] - values[1], resamples=500, seed=3)
        # The prompts differ far more than the runs: paired, the interval is narrower than the means' own.
        width = pair.difference.high - pair.difference.low
        assert width < 0.7 * (found.scores[0].mean.high - found.scores[0].mean.low)

    def test_wins_and_p_against_scipy(self, table):
        a, b = random_rows(1, shift=0.2), random_rows(2)
        [pair] = two(table, a, b).pairs
        differences = np.array([one["clip"][0] - other["clip"][0] for one, other in zip(a, b, strict=True)])
        assert (pair.wins, pair.losses) == ((differences > 0).sum(), (differences < 0).sum())
        low, high = stats.binomtest(pair.wins, 60).proportion_ci(method="wilson")
        assert (pair.win_share.low, pair.win_share.high) == pytest.approx((low, high))
        assert pair.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)

    def test_sign_flips_of_few_are_all_tried(self):
        differences = [0.5, -0.25, 1.0, 0.125, 0.75, -0.5, 2.0]
        flips = itertools.product((1, -1), repeat=7)
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
        expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
        assert sign_flip_p(differences) == pytest.approx(expected)
        assert sign_flip_p([0.0, 0.0]) == 1.0

    def test_sign_flips_of_very_many_are_normal(self):
        differences = np.random.default_rng(0).normal(loc=0.04, size=2001)
        assert sign_flip_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=0.01)
        assert sign_flip_p(differences[:-1]) == pytest.approx(sign_flip_p(differences), abs=0.03)

    def test_three_runs_have_strengths(self, table):
        tables = {name: table(random_rows(n, count=80, shift=n / 5)) for n, name in enumerate("ABC")}
        found = compare(tables, resamples=100)
        assert [(pair.first, pair.second) for pair in found.pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
        games = []
        for pair in found.pairs:
            one, other = "ABC".index(pair.first), "ABC".index(pair.second)
            games += [(one, other)] * pair.wins + [(other, one)] * pair.losses
        expected = choix.opt_pairwise(3, games)
        [each] = found.strengths
        assert list(each.strengths) == ["C", "B", "A"]
        assert [each.strengths[name].value for name in "ABC"] == pytest.approx(expected, abs=1e-3)
        assert all(one.low < one.value < one.high for one in each.strengths.values())

    def test_no_strengths_where_one_always_wins(self, table):
        rows = [row(f"p{n}", float(n)) for n in range(5)]
        better = [row(f"p{n}", float(n) + 1) for n in range(5)]
        best = [row(f"p{n}", float(n) + 2) for n in range(5)]
        [each] = compare({"a": table(rows), "b": table(better), "c": table(best)}, resamples=50).strengths
        assert not each.strengths
        assert "no finite strengths" in each.reason

    def test_strengths_of_very_many_prompts_rest_on_a_draw(self, table, monkeypatch):
        monkeypatch.setattr("dataflow.comparison._MOST_STRENGTH_PROMPTS", 30)
        tables = {name: table(random_rows(n)) for n, name in enumerate("ABC")}
        assert [each.prompts for each in compare(tables, resamples=50).strengths] == [30]

    def test_lower_is_better_turns_wins_and_the_worst(self, table):
        a, b = [row("p", 1.0), row("q", "refused")], [row("p", 3.0), row("q", 5.0)]
        found = two(table, a, b, lower_better=["clip"], force=True)
        assert (found.pairs[0].wins, found.pairs[0].losses) == (1, 0)
        assert found.pairs[0].difference.value == -2.0
        assert (found.scores[0].worst, found.scores[0].worst_was_seen) == (5.0, True)
        assert found.scores[0].strict == 3.0
        tables = {name: table(random_rows(n, shift=n)) for n, name in enumerate("ABC")}
        [each] = compare(tables, lower_better=["clip"], resamples=50).strengths or [None]
        assert next(iter(each.strengths), "A") == "A"

    def test_nothing_scored_is_no_mean(self, table):
        a, b = [row("p", "generation_failed")], [row("p", "timeout")]
        found = two(table, a, b, metrics=["clip"], force=True)
        assert [(score.mean, score.strict, score.prompts) for score in found.scores] == [(None, None, 0)] * 2
        [pair] = found.pairs
        assert (pair.prompts, pair.difference, pair.win_share, pair.p) == (0, None, None, None)
        tables = {name: table([row("p", "timeout")]) for name in "ABC"}
        assert compare(tables, metrics=["clip"], force=True).strengths[0].reason == "no prompt has two scores"

    def test_the_same_twice_is_the_same(self, table):
        tables = {name: table(random_rows(n)) for n, name in enumerate("ABC")}
        first, second = (json.dumps(plain(compare(tables, resamples=100, seed=5))) for _ in range(2))
        assert first == second
        assert json.loads(first)["scores"][0]["mean"]["low"] < json.loads(first)["scores"][0]["mean"]["value"]


class TestMatching:
    def test_by_the_prompt_whatever_the_order(self, table):
        a, b = random_rows(1), random_rows(2)
        shuffled = random.Random(0).sample(b, len(b))
        assert two(table, a, b).pairs == two(table, a, shuffled).pairs

    def test_only_what_all_have(self, table):
        a = [row("p", 1.0), row("q", 2.0), row("only a", 9.0)]
        b = [row("q", 4.0), row("p", 3.0)]
        found = two(table, a, b)
        assert found.prompts == 2
        assert (found.left_out["A"].not_in_all, found.left_out["B"].not_in_all) == (1, 0)
        assert [score.mean.value for score in found.scores] == [1.5, 3.5]
        assert found.pairs[0].difference.value == -2.0

    def test_equal_prompts_are_paired_in_order_if_all_have_as_many(self, table):
        a = [row("p", 1.0), row("q", 2.0), row("p", 3.0), row("r", 0.0), row("r", 0.0)]
        b = [row("q", 0.0), row("p", 0.5), row("p", 1.5), row("r", 0.0)]
        found = two(table, a, b)
        assert (found.prompts, found.repeated) == (3, 2)
        assert [(left.not_in_all, left.ambiguous) for left in found.left_out.values()] == [(0, 2), (0, 1)]
        assert found.pairs[0].difference.value == pytest.approx((0.5 + 1.5 + 2.0) / 3)

    def test_by_prompt_id_where_all_have_it(self, table):
        a = [row("short", 1.0, prompt_id="1"), row("plain", 2.0, prompt_id="2")]
        b = [row("plain, but rewritten", 1.0, prompt_id="2"), row("short, too", 0.0, prompt_id="1")]
        found = two(table, a, b)
        assert (found.matched_by, found.pairs[0].difference.value) == (("prompt_id",), 1.0)

    def test_by_columns_of_ones_choice(self, table):
        a = [row("red", 1.0, images=["a.png"]), row("red", 2.0, images=["b.png"])]
        b = [row("red", 2.0, images=["b.png"]), row("red", 1.0, images=["a.png"])]
        assert two(table, a, b, match=["conversations", "images"]).pairs[0].ties == 2
        assert two(table, a, b).pairs[0].ties == 0

    def test_a_plain_prompt_is_a_conversation_of_one_turn(self, table):
        plainly = {"conversations": "p", "clip": 1.0, "clip_status": "ok"}
        assert two(table, [plainly], [row("p", 2.0)]).pairs[0].losses == 1

    def test_rows_that_are_none(self, table, tmp_path):
        broken = tmp_path / "broken.jsonl"
        rows = [json.dumps(row("p", 1.0)), "{not json", json.dumps({"conversations": [], "clip": [1.0]})]
        broken.write_text("\n".join(rows))
        found = compare({"A": broken, "B": table([row("p", 1.0)])}, resamples=10)
        assert found.left_out["A"].unmatchable == 2
        assert str(found.left_out["A"]) == "2 without what rows are matched by"

    def test_nothing_in_common(self, table):
        with pytest.raises(InputError, match="no prompt in common: of A 1 not in every run"):
            two(table, [row("p", 1.0)], [row("q", 1.0)])

    def test_no_column_in_common(self, table):
        with pytest.raises(InputError, match="name one that is"):
            two(table, [row("p", 1.0)], [{"text": "p", "clip": 1.0, "clip_status": "ok"}])

    def test_a_table_without_rows(self, table):
        with pytest.raises(InputError, match="no rows"):
            two(table, [row("p", 1.0)], [])
        with pytest.raises(InputError, match="two tables or more"):
            compare({"A": table([row("p", 1.0)])})

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
    def test_of_any_format(self, table, kind):
        a, b = random_rows(1, count=12), random_rows(2, count=12)
        found = compare({"A": table(a, kind), "B": table(b)}, resamples=50)
        assert found.pairs == two(table, a, b, resamples=50).pairs


class TestMetrics:
    def test_all_that_every_run_has(self, table):
        judge = {"judge": {"value": 0.5, "reason": "fine", "right": True}, "judge_status": "ok"}
        a, b = [row("p", 1.0, **judge)], [row("p", 1.0, **judge, lpips=0.1, lpips_status="ok")]
        found = two(table, a, b)
        assert found.metrics == ["clip", "judge.right", "judge.value"]
        assert found.only_in_some == {"lpips": ["B"]}
        assert two(table, a, b, metrics=["judge.value"]).metrics == ["judge.value"]

    def test_late_and_odd_columns_are_found(self, table):
        late = [{"clip": None, "clip_status": "timeout"}] * 1200
        path = table([*late, {"clip": {"deep": 1.0, "a.b": 2.0}, "clip_status": "ok"}, {"x": 1}])
        assert metrics_in(path) == ["clip.deep"]

    def test_none_in_common(self, table):
        with pytest.raises(InputError, match="no score in common; A has clip; B has none"):
            two(table, [row("p", 1.0)], [{"prompt": "p", "conversations": "p"}])
        with pytest.raises(InputError, match="has the evaluator run"):
            two(table, [row("p", 1.0)], [row("p", 1.0)], metrics=["lpips"])
        with pytest.raises(InputError, match="'lpips' is not among the compared metrics"):
            two(table, [row("p", 1.0)], [row("p", 1.0)], lower_better=["lpips"])

    def test_coverage_below_the_floor_is_refused(self, table):
        a = [*random_rows(1, count=97), *(row(f"x{n}", "parse_error") for n in range(2)), row("y", "timeout")]
        b = [*random_rows(2, count=97), *(row(name, 1.0) for name in ("x0", "x1", "y"))]
        with pytest.raises(InputError, match=r"A has 97 of 100 scores of clip \(parse_error 2, timeout 1\)") as error:
            two(table, a, b)
        assert "B has" not in str(error.value)
        assert two(table, a, b, force=True).scores[0].coverage == 0.97
        assert two(table, a[:-3], b).scores[0].scored == 97
        just = [*random_rows(1, count=99), row("x0", "parse_error")]
        assert two(table, just, [*random_rows(2, count=99), row("x0", 1.0)]).scores[0].coverage == 0.99

    def test_what_does_not_apply_is_not_expected(self, table):
        a, b = [row("p", 1.0), row("q", "not_applicable")], [row("p", 1.0), row("q", "not_applicable")]
        score = two(table, a, b).scores[0]
        assert (score.expected, score.coverage, score.missing) == (1, 1.0, {"not_applicable": 1})

    def test_a_judges_refusal_says_nothing_about_the_model(self, table):
        refused = row("q", "refused", clip_error=["refused: I would rather not"])
        found = two(table, [row("p", 1.0), refused], [row("p", 0.0), row("q", "refused")], force=True)
        assert [score.strict for score in found.scores] == [1.0, 0.0]
        assert [score.missing for score in found.scores] == [{"judge_refused": 1}, {"refused": 1}]
        assert [score.never_made for score in found.scores] == [0, 1]

    def test_what_evaluators_write_is_read_like_that(self):
        failed = {"images": [], "images_error": {"status": "failed", "reason": "timeout", "message": ""}}
        refused = {"images": [], "images_error": {"status": "refused", "reason": "refused", "message": ""}}
        judged = [
            Outcome(request_id="1", status="done", text="0.5"),
            Outcome(request_id="2", status="refused", reason="refused", message="no"),
        ]
        assert [each.status for each in scores_at(with_scores(failed, "images", "s", [], "m"), "s")] == [
            "generation_failed"
        ]
        assert [each.made for each in scores_at(with_scores(refused, "images", "s", [], "m"), "s")] == [False]
        both = scores_at(with_scores({"images": ["a", "b"]}, "images", "s", judged, "m"), "s")
        assert [(each.value, each.status, each.made) for each in both] == [
            (0.5, "ok", True),
            (None, "judge_refused", True),
        ]

    def test_pictures_that_were_asked_for_and_not_made_are_expected(self, table):
        error = {"status": "failed", "reason": "out_of_memory", "message": ""}
        a = [row("p", 1.0, 1.0, 1.0), row("q", 1.0, images_error=error), row("r", 1.0, 1.0)]
        b = [row("p", 1.0), row("q", 1.0), row("r", 1.0)]
        score = two(table, a, b, worst={"clip": 0}, force=True).scores[0]
        assert (score.expected, score.missing) == (8, {"generation_failed": 2})
        assert score.strict == pytest.approx((1 + 1 / 3 + 1) / 3)

    def test_what_is_no_number_is_no_score(self):
        odd = {"s": [None, "0.5", math.nan, True, 3], "s_status": ["ok"] * 4}
        assert scores_at(odd, "s") == [
            (None, "no_value"),
            (None, "not_a_number"),
            (None, "no_value"),
            (1.0, "ok"),
            (None, "no_value"),
        ]
        assert scores_at({"s": "0.5"}, "s", from_text=True) == [(0.5, "ok")]
        assert scores_at({"s": "many"}, "s", from_text=True) == [(None, "not_a_number")]
        assert scores_at({"s": ""}, "s", from_text=True) == [(None, "no_value")]
        assert scores_at({"s": 0.5, "s_status": "timeout"}, "s") == [(None, "timeout")]
        assert scores_at({}, "s") == [(None, "not_scored")]
        assert scores_at({"s": [], "s_status": []}, "s") == [(None, "missing_image")]
        assert values_at({"s": {"a": {"b": "x"}}, "s_status": "ok"}, "s.a.b") == [("x", "ok")]

    def test_a_csv_of_another_program_holds_numbers_as_text(self, tmp_path):
        (tmp_path / "a.csv").write_text("prompt,clip\np,0.5\nq,0.25\n")
        (tmp_path / "b.csv").write_text("prompt,clip\nq,0.75\np,0.5\n")
        found = compare({"A": tmp_path / "a.csv", "B": tmp_path / "b.csv"}, metrics=["clip"], resamples=20)
        assert [score.mean.value for score in found.scores] == [0.375, 0.625]


def test_without_scipy_it_says_so(table, monkeypatch):
    import builtins

    real = builtins.__import__

    def no_scipy(name, *rest, **named):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(Exception, match="a comparison needs scipy"):
        two(table, [row("p", 1.0)], [row("p", 1.0)])
