"""Questions about pictures: each asked once, aggregated as published, and never guessed."""

import math

import pytest

pytest.importorskip("openai")

from tests.judging import ONCE, QUIET, Desk, calls, ready, service

from dataflow.errors import ConfigError, InputError
from dataflow.metrics import questions
from dataflow.operators import ScoreFilter
from dataflow.operators.core_vision.question_evaluator import QuestionEvaluator, read_atoms
from dataflow.serving.answers import AnswerServing
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.judge import JudgeServing, alignment_rubric

NO_LOGPROBS = {"logprobs": None, "top_logprobs": None}


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


def evaluate(api, desk, *rows, **options):
    params = options.pop("request_params", None)
    evaluator = QuestionEvaluator(AnswerServing(service(api, request_params=params)), options=ONCE, **options)
    summary = evaluator.run(desk.storage(*rows), output_key="dsg")
    return summary, desk.table()


SCENE = [
    {"id": 1, "question": "Is there a dog?", "category": "entity - whole"},
    {"id": 2, "question": "Is the dog brown?", "parents": [1], "category": "attribute - color"},
    {"id": 3, "question": "Is there a ball?", "parents": [0], "category": "entity - whole"},
    {"id": 4, "question": "Is it raining?", "answer": "no"},
]


class TestAggregates:
    def test_dsg_counts_what_a_missing_thing_presumes_as_missing(self, api, desk):
        api.script({"a dog": "say:No", "": "say:yes"} | {"a ball": "say:Yes", "raining": "say:no", "brown": "say:Yes"})
        api.script({"a dog": "say:No", "brown": "say:Yes", "a ball": "say:Yes", "raining": "say:no"})
        _, [row] = evaluate(api, desk, {"images": [desk.picture(0)], "questions": SCENE})
        [score] = row["dsg"]
        assert score["atoms"] == {"1": 0.0, "2": 0.0, "3": 1.0, "4": 1.0}
        expected = questions.dsg({1: False, 2: True, 3: True, 4: True}, {2: [1]})
        assert (score["value"], score["answered"]) == (expected.value, 4) == (0.5, 4)
        assert score["categories"] == {"entity - whole": 0.5, "attribute - color": 0.0}
        assert row["dsg_status"] == ["ok"]
        assert row["dsg_by"].endswith("/dsg")
        assert "dsg_error" not in row

    def test_tifa_knows_no_dependencies(self, api, desk):
        api.script({"a dog": "say:No", "brown": "say:Yes", "a ball": "say:Yes", "raining": "say:yes"})
        _, [row] = evaluate(api, desk, {"images": desk.picture(0), "questions": SCENE}, aggregate="tifa")
        assert row["dsg"]["value"] == questions.tifa([False, True, True, False]).value == 0.5
        assert row["dsg"]["atoms"] == {"1": 0.0, "2": 1.0, "3": 1.0, "4": 0.0}
        assert row["dsg_status"] == "ok"

    @pytest.mark.parametrize("mean", ["soft_tifa_am", "soft_tifa_gm"])
    def test_soft_tifa(self, api, desk, mean):
        api.script({"a dog": "say:No", "brown": "say:Yes", "a ball": "say:Yes", "raining": "say:Yes"})
        _, [row] = evaluate(api, desk, {"images": [desk.picture(0)], "questions": SCENE}, aggregate=mean)
        [score] = row["dsg"]
        soft = [0.1, 0.9, 0.9, 0.1]  # the fake service gives its answer 0.9 in both spellings
        assert score["value"] == pytest.approx(getattr(questions, mean)(soft).value)
        assert score["value"] == pytest.approx(0.5 if mean == "soft_tifa_am" else math.sqrt(0.1 * 0.9))
        assert score["soft"] is True
        _, [row] = evaluate(
            api,
            desk,
            {"images": [desk.picture(0)], "questions": SCENE},
            aggregate=mean,
            request_params=NO_LOGPROBS,
        )
        assert row["dsg"][0]["soft"] is False

    def test_other_answers_and_plain_texts(self, api, desk):
        api.script({"How many": "say:2", "Is there": "say:Yes"})
        asked = ["Is there a dog?", {"question": "How many dogs?", "answer": ["two", "2"]}]
        _, [row] = evaluate(api, desk, {"images": [desk.picture(0)], "questions": asked})
        assert row["dsg"][0]["atoms"] == {"1": 1.0, "2": 1.0}

    def test_the_aggregate_is_one_that_exists(self, api):
        with pytest.raises(ConfigError, match="soft_tifa_gm"):
            QuestionEvaluator(AnswerServing(service(api)), aggregate="mean")  # type: ignore[arg-type]


class TestMissing:
    def test_a_question_without_an_answer_is_not_a_no(self, api, desk):
        api.script({"a dog": "say:Yes", "brown": "say:I would say so", "a ball": "say:No", "raining": "say:no"})
        row = {"images": [desk.picture(0)], "questions": SCENE}
        summary, [strict] = evaluate(api, desk, row)
        assert (strict["dsg"], strict["dsg_status"]) == ([None], ["parse_error"])
        assert "question 2" in strict["dsg_error"][0]
        assert "I would say so" in strict["dsg_error"][0]
        assert summary.failed == 1
        _, [loose] = evaluate(api, desk, row, allow_unanswered=True)
        [score] = loose["dsg"]
        assert (score["value"], score["answered"]) == (pytest.approx(2 / 3), 3)
        assert score["atoms"]["2"] is None
        assert score["unanswered"]["2"].startswith("parse_error: question 2: ")
        assert score["categories"]["attribute - color"] is None
        assert calls(api) == 5  # the loose run asked the missing one again and no other

    def test_an_answer_that_could_change_nothing_is_not_missed(self, api, desk):
        api.script({"a dog": "say:No", "brown": "say:hm", "a ball": "say:No", "raining": "say:no"})
        _, [row] = evaluate(api, desk, {"images": [desk.picture(0)], "questions": SCENE})
        assert (row["dsg_status"], row["dsg"][0]["value"]) == (["ok"], 0.25)
        assert list(row["dsg"][0]["unanswered"]) == ["2"]

    @pytest.mark.parametrize("words", ["Ja", "-1", "ten", "", "I'm sorry, I cannot help with that.", "0.5"])
    def test_no_answer_at_all(self, api, desk, words):
        api.script({"": f"say:{words}"})
        row = {"images": [desk.picture(0)], "questions": ["Is there a dog?"]}
        for loose in (False, True):
            _, [found] = evaluate(api, desk, row, allow_unanswered=loose)
            assert (found["dsg"], found["dsg_status"]) == ([None], ["parse_error"])

    def test_one_picture_does_not_fail_its_neighbours(self, api, desk):
        gone = {"status": "failed", "reason": "timeout", "message": "late"}
        api.script({"raven": "refuse", "": "say:Yes"})
        rows = [
            {"images": [desk.picture(0), desk.picture(1)], "questions": ["Is there a dog?", "Is there a cat?"]},
            {"images": [desk.picture(2)], "questions": ["Is there a dog?", "Is there a raven?"]},
            {"images": [desk.picture(0), "gone.png"], "questions": ["Is there a dog?"]},
            {"images": [], "images_error": gone, "questions": ["Is there a dog?"]},
            {"images": [desk.picture(3)], "questions": []},
            {"images": desk.picture(3), "questions": None},
        ]
        summary, table = evaluate(api, desk, *rows)
        assert [row["dsg_status"] for row in table] == [
            ["ok", "ok"],
            ["refused"],
            ["ok", "missing_image"],
            ["generation_failed"],
            ["not_applicable"],
            "not_applicable",
        ]
        assert [score["value"] for score in table[0]["dsg"]] == [1.0, 1.0]
        assert [score and score["value"] for score in table[2]["dsg"]] == [1.0, None]
        assert all(row["dsg"] in (None, [None]) for row in [table[1], *table[3:]])
        assert summary.rows == 6

    def test_a_serving_that_answers_no_questions(self, api, desk):
        api.script({"": 'say:{"alignment": 3, "reason": ""}'})
        serving = JudgeServing(service(api, request_params={"expected": None}), alignment_rubric())
        rows = {"images": [desk.picture(0)], "questions": ["Is there a dog?"]}
        QuestionEvaluator(serving, options=ONCE).run(desk.storage(rows))
        [row] = desk.table()
        assert (row["questions_score"], row["questions_score_status"]) == ([None], ["parse_error"])


class TestPayingOnce:
    def test_answers_are_kept_by_picture_and_question(self, api, desk):
        api.script({"": "say:Yes"})
        row = {"images": [desk.picture(0), desk.picture(1)], "questions": ["A?", "B?"]}
        evaluate(api, desk, row)
        assert calls(api) == 4
        evaluate(api, desk, row, aggregate="soft_tifa_gm")
        assert calls(api) == 4
        _, [found] = evaluate(api, desk, {**row, "questions": ["B?", "C?", "A?"]})
        assert calls(api) == 6
        assert [score["value"] for score in found["dsg"]] == [1.0, 1.0]

    def test_scores_can_be_filtered(self, api, desk):
        api.script({"A?": "say:Yes", "B?": "say:No"})
        evaluate(
            api,
            desk,
            {"images": [desk.picture(0)], "questions": ["A?"]},
            {"images": [desk.picture(1)], "questions": ["A?", "B?"]},
        )
        ScoreFilter(options=QUIET).run(desk.store.step(), input_score_key="dsg.value", minimum=0.9)
        assert len(desk.table()) == 1


class TestColumn:
    @pytest.mark.parametrize(
        ("cell", "told"),
        [
            ("Is there a dog?", "expected a list of questions, found str"),
            ({"1": "Is there a dog?"}, "found dict"),
            ([1], "expected text or an object, found int"),
            ([None], "found NoneType"),
            ([" "], "no text"),
            ([{"id": 1}], "no text"),
            ([{"question": ["Is it?"]}], "no text"),
            ([{"question": "A?", "id": "1"}], "id must be a whole number"),
            ([{"question": "A?", "id": 0}], "id must be a whole number"),
            ([{"question": "A?", "id": True}], "id must be a whole number"),
            ([{"question": "A?", "id": 2}, "B?"], "the same id"),
            ([{"question": "A?", "parents": [2]}], "question 1 presumes 2"),
            ([{"question": "A?", "parents": "1"}], "parents must be a list"),
            ([{"question": "A?", "parents": ["1"]}], "parents must be a list"),
            ([{"question": "A?", "answer": ""}], "answer must be"),
            ([{"question": "A?", "answer": []}], "answer must be"),
            ([{"question": "A?", "answer": True}], "answer must be"),
            ([{"question": "A?", "category": 3}], "category must be"),
        ],
    )
    def test_what_cannot_be_used(self, cell, told):
        with pytest.raises(InputError, match=told) as caught:
            read_atoms({"questions": cell}, "questions")
        assert caught.value.field == "questions"

    def test_there_is_none(self):
        with pytest.raises(InputError, match="no such column"):
            read_atoms({}, "questions")

    def test_fails_its_row_alone(self, api, desk):
        api.script({"": "say:Yes"})
        rows = [{"images": [desk.picture(n)], "questions": cell} for n, cell in enumerate((["A?"], "A?"))]
        summary, table = evaluate(api, desk, *rows)
        assert [row["dsg_status"] for row in table] == [["ok"], ["failed"]]
        assert "expected a list of questions" in table[1]["dsg_error"][0]
        assert (summary.done, summary.failed) == (1, 1)
