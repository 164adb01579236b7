"""Several passes of a judge: a mean of what is there, and as many requests as it says."""

import json
import statistics

import pytest

pytest.importorskip("openai")

from tests.judging import ONCE, QUIET, Desk, calls, ready, service

from dataflow.errors import ConfigError
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.judge import JudgeServing, Rubric
from dataflow.serving.scoring import ScoringServing

RUBRIC = Rubric(instruction="Does it show {prompt}?", scales={"success": (0, 10), "quality": (1, 5)})


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    return ready(server, monkeypatch)


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def say(success, quality=3, reason="so"):
    return f"say:{json.dumps({'reason': reason, 'success': success, 'quality': quality})}"


def evaluate(serving, desk, *rows, **options):
    evaluator = ImageEvaluator(serving, with_prompt=True, options=ONCE, **options)
    summary = evaluator.run(desk.storage(*rows), output_key="verdict")
    return summary, desk.table()


def row(desk, number=0, prompt="a fox"):
    return {"images": [desk.picture(number)], "conversations": prompt}


class TestMean:
    def test_of_every_number_with_its_standard_deviation(self, api, desk):
        api.script({"fox": [say(10, 5), say(7, 5), say(1, 2)]})
        _, [found] = evaluate(JudgeServing(service(api), RUBRIC), desk, row(desk), passes=3)
        [verdict] = found["verdict"]
        values = [(10 / 10 + 4 / 4) / 2, (7 / 10 + 4 / 4) / 2, (1 / 10 + 1 / 4) / 2]
        assert verdict["value"] == pytest.approx(statistics.mean(values))
        assert (verdict["success"], verdict["quality"], verdict["passes"]) == (6.0, 4.0, 3)
        assert verdict["sd"] == {
            "value": pytest.approx(statistics.stdev(values)),
            "success": pytest.approx(statistics.stdev([10, 7, 1])),
            "quality": pytest.approx(statistics.stdev([5, 5, 2])),
        }
        assert verdict["reason"] == ["so", "so", "so"]
        assert found["verdict_status"] == ["ok"]
        ScoreFilter(options=QUIET).run(desk.store.step(), input_score_key="verdict.sd.success", maximum=1)
        assert desk.table() == []

    def test_of_numbers_alone_each_with_its_own_seed(self, desk):
        class Seeds(ScoringServing):
            batch_size = 4

            def fingerprint(self):
                return {"model": "seeds"}

            def score(self, requests):
                return [float(request.seed) for request in requests]

        _, [found] = evaluate(
            Seeds(), desk, {"images": [desk.picture(0), desk.picture(1)], "conversations": "x"}, passes=4
        )
        seeds = [0, 1, 2, 3]
        expected = {"value": 1.5, "sd": {"value": pytest.approx(statistics.stdev(seeds))}, "passes": 4}
        assert found["verdict"] == [expected, expected]

    def test_services_are_sent_different_seeds(self, api, desk):
        api.script({"": say(5)})
        evaluate(JudgeServing(service(api, send_seed=True), RUBRIC), desk, row(desk), passes=3)
        assert sorted(request["body"]["seed"] for request in api.requests("chat/completions")) == [0, 1, 2]


class TestMissing:
    def test_one_pass_without_a_verdict_is_none_unless_allowed(self, api, desk):
        api.script({"fox": [say(10), "say:ten", say(4)]})
        serving = JudgeServing(service(api), RUBRIC)
        summary, [found] = evaluate(serving, desk, row(desk), passes=3)
        assert (found["verdict"], found["verdict_status"]) == ([None], ["parse_error"])
        assert "of 3: " in found["verdict_error"][0]
        assert summary.failed == 1
        api.script({"fox": "say:still no number"})
        _, [found] = evaluate(serving, desk, row(desk), passes=3, min_passes=2)
        assert (found["verdict"][0]["success"], found["verdict"][0]["passes"]) == (7.0, 2)
        assert found["verdict_status"] == ["ok"]

    def test_one_pass_has_no_spread(self, api, desk):
        api.script({"fox": [say(10), "refuse", "refuse"]})
        _, [found] = evaluate(JudgeServing(service(api), RUBRIC), desk, row(desk), passes=3, min_passes=1)
        assert found["verdict"][0]["sd"] == {"value": None, "success": None, "quality": None}

    def test_a_number_that_one_pass_lacks_has_no_mean(self, desk):
        class Sometimes(ScoringServing):
            def fingerprint(self):
                return {"model": "sometimes"}

            def score(self, requests):
                return [
                    float("nan") if request.prompt == "nan" else {"a": 1.0, "b": None if request.seed else 2.0}
                    for request in requests
                ]

        _, table = evaluate(Sometimes(), desk, row(desk), row(desk, 1, "nan"), passes=2)
        assert table[0]["verdict"] == [{"a": 1.0, "b": None, "sd": {"a": 0.0, "b": None}, "passes": 2}]
        assert (table[1]["verdict"], table[1]["verdict_status"]) == ([None], ["failed"])

    def test_prose_for_a_score_is_none(self, api, desk):
        api.script({"fox": "say:about seven"})
        _, [found] = evaluate(service(api), desk, row(desk), passes=2)
        assert (found["verdict"], found["verdict_status"]) == ([None], ["parse_error"])
        assert found["verdict_error"] == ["parse_error: pass 1 of 2: the answer is no JSON"]

    def test_rows_that_cannot_be_used(self, api, desk):
        api.script({"": say(5)})
        rows = [{"images": ["gone.png", desk.picture(0)], "conversations": "x"}, {"images": [], "conversations": "x"}]
        _, table = evaluate(JudgeServing(service(api), RUBRIC), desk, *rows, passes=2)
        assert [found["verdict_status"] for found in table] == [["missing_image", "ok"], ["missing_image"]]

    @pytest.mark.parametrize("options", [{"passes": 0}, {"passes": 2, "min_passes": 3}, {"passes": 2, "min_passes": 0}])
    def test_what_makes_no_sense(self, api, options):
        with pytest.raises(ConfigError):
            ImageEvaluator(JudgeServing(service(api), RUBRIC), **options)


class TestPayingOnce:
    def test_one_pass_is_what_it_was(self, api, desk):
        """The same requests, ids and rows as without passes: nothing that was paid for is asked again."""
        api.script({"": say(5)})
        serving = JudgeServing(service(api), RUBRIC)
        drafts = ImageEvaluator(serving, with_prompt=True).plan().requests(row(desk))
        assert [(draft.seed, draft.sample, dict(draft.params)) for draft in drafts] == [(0, 0, {})]
        _, before = evaluate(serving, desk, row(desk))
        assert before[0]["verdict"] == [{"value": 0.5, "success": 5, "quality": 3, "reason": "so"}]
        _, after = evaluate(serving, desk, row(desk), passes=1)
        assert (after, calls(api)) == (before, 1)

    def test_more_passes_cost_only_the_new_ones(self, api, desk):
        api.script({"": say(5)})
        serving = JudgeServing(service(api), RUBRIC)
        for passes, paid in ((1, 1), (3, 3), (2, 3), (4, 4)):
            _, [found] = evaluate(serving, desk, row(desk), passes=passes)
            assert calls(api) == paid
        assert found["verdict"][0]["passes"] == 4
