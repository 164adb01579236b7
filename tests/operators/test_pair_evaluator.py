"""Pairs of pictures: a verdict counts only where both orders agree."""

import json
from pathlib import Path

import pytest

pytest.importorskip("openai")

from tests.judging import ONCE, Desk, calls, ready, service

from dataflow.errors import ConfigError
from dataflow.operators.core_vision.pair_evaluator import PairEvaluator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.answers import AnswerServing
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.pair_judge import PairJudge
from dataflow.serving.reply_images import data_url


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


def say(better, reason="it is"):
    return f"say:{json.dumps({'reason': reason, 'better': better})}"


def compare(serving, desk, *rows, options=ONCE, **keys):
    PairEvaluator(serving, options=options).run(desk.storage(*rows), output_key="best", **keys)
    return desk.table()


class Scripted(PairJudge):
    """A judge that says, after the names of the two pictures in their order, what is scripted for them."""

    def asked(self, request):
        names = "".join(path.rpartition("/")[2].removesuffix(".png") for path in request.images)
        return f"{super().asked(request)} ({names})"


def in_orders(api, forwards, backwards):
    api.script({"(01)": forwards, "(10)": backwards})
    return Scripted(service(api))


class TestVerdict:
    @pytest.mark.parametrize(
        ("forwards", "backwards", "winner", "consistent"),
        [
            ("first", "second", "first", True),
            ("second", "first", "second", True),
            ("tie", "tie", "tie", True),
            ("first", "first", "tie", False),
            ("second", "second", "tie", False),
            ("tie", "first", "tie", False),
            ("second", "tie", "tie", False),
        ],
    )
    def test_both_orders_have_to_agree(self, api, desk, forwards, backwards, winner, consistent):
        serving = in_orders(api, say(forwards, "a"), say(backwards, "b"))
        row = {"images": [desk.picture(0), desk.picture(1)], "conversations": "a fox"}
        [found] = compare(serving, desk, row)
        assert found["best"] == {"winner": winner, "consistent": consistent, "reasons": ["a", "b"]}
        assert found["best_status"] == "ok"
        assert found["best_by"].startswith("some-judge#")

    def test_the_pictures_go_out_in_both_orders(self, api, desk):
        serving = in_orders(api, say("first"), say("second"))
        paths = [desk.picture(0), desk.picture(1)]
        compare(serving, desk, {"images": paths, "conversations": "a fox"}, options=RunOptions(quiet=True))
        sent = []
        for request in api.requests("chat/completions"):
            parts = request["body"]["messages"][0]["content"]
            sent.append([part["image_url"]["url"] for part in parts if part["type"] == "image_url"])
        first, second = (data_url(Path(path).read_bytes()) for path in paths)
        assert sorted(sent) == sorted([[first, second], [second, first]])

    def test_two_columns(self, api, desk):
        serving = in_orders(api, say("second"), say("first"))
        row = {"before": desk.picture(0), "after": [desk.picture(1), desk.picture(2)], "conversations": "a fox"}
        [found] = compare(serving, desk, row, input_first_key="before", input_second_key="after")
        assert found["best"]["winner"] == "second"

    def test_without_a_prompt(self, api, desk):
        serving = in_orders(api, say("first"), say("second"))
        evaluator = PairEvaluator(serving, with_prompt=False, options=ONCE)
        evaluator.run(desk.storage({"images": [desk.picture(0), desk.picture(1)]}))
        assert desk.table()[0]["preference"]["winner"] == "first"

    def test_verdicts_are_kept(self, api, desk):
        serving = in_orders(api, say("first"), say("second"))
        row = {"images": [desk.picture(0), desk.picture(1)], "conversations": "a fox"}
        for _ in range(2):
            compare(serving, desk, row)
        assert calls(api) == 2


class TestMissing:
    @pytest.mark.parametrize(
        ("answer", "status"),
        [
            ("say:The first is better.", "parse_error"),
            ('say:{"better": "third"}', "parse_error"),
            ('say:{"better": 1}', "parse_error"),
            ('say:{"better": "erstes"}', "parse_error"),
            ("say:", "parse_error"),
            ("refuse", "refused"),
        ],
    )
    @pytest.mark.parametrize("order", [0, 1])
    def test_one_order_without_a_verdict_is_none(self, api, desk, answer, status, order):
        answers = [say("first"), answer] if order else [answer, say("second")]
        serving = in_orders(api, *answers)
        [row] = compare(serving, desk, {"images": [desk.picture(0), desk.picture(1)], "conversations": "a fox"})
        assert (row["best"], row["best_status"]) == (None, status)
        assert ("swapped" if order else "in order") in row["best_error"]

    def test_pictures_that_are_not_there(self, api, desk):
        serving = in_orders(api, say("first"), say("second"))
        refused = {"status": "refused", "reason": "refused", "message": "no"}
        failed = {"status": "failed", "reason": "timeout", "message": "late"}
        both = {"images": [desk.picture(0), desk.picture(1)]}
        rows = [
            {"images": [desk.picture(0)], "conversations": "a fox"},
            {"images": [desk.picture(0)], "images_error": failed, "conversations": "a fox"},
            {"images": [], "images_error": refused, "conversations": "a fox"},
            {"images": [desk.picture(0), "gone.png"], "conversations": "a fox"},
            {**both, "conversations": ""},
            {"images": 7, "conversations": "a fox"},
            {**both, "conversations": "a fox"},
        ]
        table = compare(serving, desk, *rows)
        assert [row["best_status"] for row in table] == [
            *("missing_image", "generation_failed", "refused", "missing_image", "failed", "failed", "ok")
        ]
        assert [row["best"] is None for row in table] == [True] * 6 + [False]

    def test_the_column_that_lacks_one_says_why(self, api, desk):
        serving = in_orders(api, say("first"), say("second"))
        refused = {"status": "refused", "reason": "refused", "message": "no"}
        row = {"before": desk.picture(0), "after": [], "after_error": refused, "conversations": "a fox"}
        [found] = compare(serving, desk, row, input_first_key="before", input_second_key="after")
        assert (found["best"], found["best_status"]) == (None, "refused")
        assert calls(api) == 0

    def test_a_serving_that_compares_nothing(self, api, desk):
        api.script({"": "say:Yes"})
        row = {"images": [desk.picture(0), desk.picture(1)], "conversations": "a fox"}
        [found] = compare(AnswerServing(service(api)), desk, row)
        assert (found["best"], found["best_status"]) == (None, "parse_error")


def test_one_column_of_two_makes_no_pair(api):
    with pytest.raises(ConfigError, match="go together"):
        PairEvaluator(PairJudge(service(api))).plan(input_first_key="before")
