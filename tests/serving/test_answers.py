"""Short questions: an answer has a probability, and what is no answer has none."""

import asyncio
import math
import pickle

import pytest

pytest.importorskip("openai")

from tests.judging import ONCE, QUIET, Desk, calls, ready, service

from dataflow.errors import BadOutputError, BadRequestError, ConfigError
from dataflow.io import ImageIO
from dataflow.metrics.questions import is_yes
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving.answers import AnswerServing, vqa_score
from dataflow.serving.fake_api import FakeApi
from dataflow.types import GenerationRequest, GenerationResult

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


def evaluate(desk, serving, *prompts, options=ONCE):
    rows = [{"images": [desk.picture(n)], "conversations": prompt} for n, prompt in enumerate(prompts)]
    ImageEvaluator(serving, with_prompt=True, options=options).run(desk.storage(*rows), output_key="asked")
    return desk.table()


def listed(token, logprob, **others):
    """Log probabilities of an answer of one token, as services send them."""
    top = [{"token": name, "logprob": value} for name, value in {token: logprob, **others}.items()]
    return {"content": [{"token": token, "logprob": logprob, "top_logprobs": top}]}


def read(text, logprobs=None, *, serving=None, expected=None):
    """What the serving makes of an answer."""
    serving = serving or AnswerServing(Quiet())
    params = {} if expected is None else {"expected": expected}
    request = GenerationRequest(request_id="0" * 32, prompt="Is it?", images=("a.png",), seed=0, params=params)
    provenance = {} if logprobs is None else {"logprobs": logprobs}
    return serving.read(request, GenerationResult(text=text, provenance=provenance))


class Quiet:
    """As much of a service as a constructor looks at."""

    image_io = timeout = requests_per_minute = None
    batch_size = concurrency = 1
    num_cpus = num_gpus = memory_gb = None
    environment = ()
    detached = remote = False
    reproducible = True

    def __init__(self, **params):
        self.params = params


class TestProbability:
    def test_is_summed_over_the_spellings_of_the_first_token_each_once(self):
        logs = listed("Yes", math.log(0.5), **{" yes": math.log(0.2), "YES": math.log(0.1), "No": math.log(0.15)})
        logs["content"][0]["top_logprobs"].append({"token": "Yes", "logprob": math.log(0.5)})
        assert read("Yes", logs) == {
            "answer": "Yes",
            "correct": True,
            "probability": pytest.approx(0.8),
            "soft": True,
        }

    def test_of_vqa_score_is_that_of_its_one_token(self):
        logs = listed("Yes", math.log(0.5), yes=math.log(0.2), No=math.log(0.3))
        assert read("Yes", logs, serving=vqa_score(Quiet()))["probability"] == pytest.approx(0.5)

    def test_is_there_for_the_other_answer_too(self):
        logs = listed("No", math.log(0.7), Yes=math.log(0.3))
        assert read("No.", logs)["probability"] == pytest.approx(0.3)
        assert read("No.", logs, expected="no")["probability"] == pytest.approx(0.7)
        assert [read("No", logs)["correct"], read("No", logs, expected=["no"])["correct"]] == [False, True]

    def test_the_chosen_token_counts_though_it_is_not_among_the_alternatives(self):
        entry = {"token": "Yes", "logprob": math.log(0.4), "top_logprobs": [{"token": "No", "logprob": math.log(0.6)}]}
        assert read("Yes", {"content": [entry]})["probability"] == pytest.approx(0.4)

    def test_blanks_before_the_answer_are_passed_over(self):
        blank = listed("\n", -0.01)["content"]
        assert read("\nYes", {"content": blank + listed("Yes", math.log(0.6))["content"]})["probability"] == (
            pytest.approx(0.6)
        )

    def test_what_is_not_listed_is_nothing_only_where_nothing_is_left_for_it(self):
        sure = read("No", listed("No", math.log(0.996)))
        assert (sure["probability"], sure["soft"]) == (0.0, True)
        cut = read("No", listed("No", math.log(0.6)))
        assert (cut["probability"], cut["soft"]) == (0.0, False)

    @pytest.mark.parametrize("answer", ["yes", "Yes.", " YES!", '"yes"', "yes,", "no", "yess", "yes yes", ""])
    def test_without_log_probabilities_is_hard_and_says_so(self, answer):
        if answer in ("yess", "yes yes", ""):
            with pytest.raises(BadOutputError):
                read(answer)
        else:
            found = read(answer)
            assert (found["probability"], found["soft"]) == (float(is_yes(answer)), False)

    @pytest.mark.parametrize(
        "logs",
        [
            listed("Yes", 0.5),
            listed("Yes", float("nan")),
            listed("Yes", -0.1, **{" yes": -0.1}),
            {"content": [{"token": "Yes", "logprob": None}]},
            {"content": [{"token": "Yes"}]},
            {"content": [{"logprob": -1.0}]},
            {"content": [{"token": None, "logprob": -1.0}]},
            {"content": ["Yes"]},
            {"content": [{"token": "Yes", "logprob": -1.0, "top_logprobs": 3}]},
            listed("No", 1e9),
        ],
    )
    def test_log_probabilities_that_are_none_are_no_score(self, logs):
        with pytest.raises(BadOutputError, match="log probabilities") as caught:
            read("Yes", logs)
        assert caught.value.reason == "parse_error"

    @pytest.mark.parametrize("logs", [{}, {"content": None}, {"content": []}, "none"])
    def test_none_at_all_are_none(self, logs):
        assert read("yes", logs)["soft"] is False


class TestAnswers:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "   ",
            "I think that it does.",
            "Yes, but it is small",
            "I'm sorry, I cannot help with that.",
            "Ja",
            "是",
            "1",
            "0.9",
            "yes/no",
            "maybe",
            '{"answer": "yes"}',
            "Yesterday",
        ],
    )
    def test_neither_yes_nor_no_is_no_answer(self, text):
        with pytest.raises(BadOutputError, match="neither yes nor no") as caught:
            read(text, listed("Yes", -0.1))
        assert caught.value.reason == "parse_error"

    def test_other_answers_and_their_spellings(self):
        logs = listed("2", math.log(0.5), two=math.log(0.2), three=math.log(0.3))
        assert read("2", logs, expected=["two", "2"])["probability"] == pytest.approx(0.7)
        three = read("three", logs, expected=["two", "2"])
        assert (three["correct"], three["probability"]) == (False, pytest.approx(0.7))
        assert read("Light blue.", expected="light blue")["correct"] is True
        for text in ("", "it is two, I think"):
            with pytest.raises(BadOutputError, match="no short answer"):
                read(text, expected=["two", "2"])

    def test_of_several_words_have_no_first_token(self):
        found = read("light blue", listed("light", math.log(0.6)), expected="light blue")
        assert (found["correct"], found["probability"], found["soft"]) == (True, 1.0, False)


class TestThroughTheEngine:
    def test_vqa_score(self, api, desk):
        api.script({"fox": "say:Yes", "dog": "say:No"})
        table = evaluate(desk, vqa_score(service(api)), 'a "red" fox', "a dog {prompt}")
        # The fake service gives its answer 0.8, the other spelling and the other answer 0.1 each.
        assert [row["asked"][0]["probability"] for row in table] == [pytest.approx(0.9), pytest.approx(0.1)]
        assert [row["asked"][0]["soft"] for row in table] == [True, True]
        bodies = [request["body"] for request in api.requests("chat/completions")]
        assert {body["messages"][0]["content"][0]["text"] for body in bodies} == {
            'Does this figure show "a "red" fox"? Please answer yes or no.',
            'Does this figure show "a dog {prompt}"? Please answer yes or no.',
        }
        body = bodies[0]
        asked = {name: body[name] for name in ("max_tokens", "temperature", "logprobs", "top_logprobs")}
        assert asked == {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        assert "expected" not in body
        ScoreFilter(options=QUIET).run(desk.store.step(), input_score_key="asked.probability", minimum=0.5)
        assert [row["conversations"] for row in desk.table()] == ['a "red" fox']

    def test_a_service_without_log_probabilities(self, api, desk):
        api.script({"fox": "say:yes", "dog": "say:No."})
        [fox], [dog] = (
            row["asked"]
            for row in evaluate(desk, AnswerServing(service(api, request_params=NO_LOGPROBS)), "fox", "dog")
        )
        assert (fox["probability"], fox["soft"], dog["probability"], dog["soft"]) == (1.0, False, 0.0, False)
        assert "logprobs" not in api.requests("chat/completions")[0]["body"]

    def test_a_service_that_counts_tokens_by_the_new_name(self, api, desk):
        api.script({"": "say:Yes"})
        evaluate(desk, AnswerServing(service(api, request_params={"max_completion_tokens": 16})), "fox")
        body = api.requests("chat/completions")[0]["body"]
        assert body["max_completion_tokens"] == 16
        assert "max_tokens" not in body

    def test_what_is_no_answer_is_asked_for_again_and_then_openly_missing(self, api, desk):
        api.script(
            {
                "fox": ["say:Well, let me see", "say:Yes"],
                "dog": "say:I am not sure",
                "cat": "refuse",
                "cow": "say:Ja",
                "hen": "say:",
                "owl": "say:7",
            }
        )
        options = RunOptions(quiet=True, max_attempts=2)
        table = evaluate(desk, AnswerServing(service(api)), "fox", "dog", "cat", "cow", "hen", "owl", options=options)
        missing = "parse_error"
        statuses = [row["asked_status"][0] for row in table]
        assert statuses == ["ok", missing, "refused", missing, missing, missing]
        assert [row["asked"][0] and row["asked"][0]["probability"] for row in table] == [
            pytest.approx(0.9),
            *[None] * 5,
        ]
        assert "not sure" in table[1]["asked_error"][0]
        assert calls(api) == 2 + 2 + 1 + 2 + 2 + 2

    def test_answers_are_kept(self, api, desk):
        api.script({"": "say:Yes"})
        for _ in range(2):
            evaluate(desk, AnswerServing(service(api)), "fox", "dog")
        assert calls(api) == 2
        evaluate(desk, AnswerServing(service(api), template="{prompt}?"), "fox", "dog")
        assert calls(api) == 4

    def test_there_must_be_something_to_ask(self, api, desk):
        ImageEvaluator(AnswerServing(service(api)), options=ONCE).run(desk.storage({"images": [desk.picture(0)]}))
        [row] = desk.table()
        assert (row["score"], row["score_status"]) == ([None], ["not_applicable"])
        assert calls(api) == 0


def test_what_makes_no_sense(api, tmp_path):
    for options in ({"template": "Is it?"}, {"expected": []}, {"expected": " . "}, {"max_tokens": 0}):
        with pytest.raises(ConfigError):
            AnswerServing(service(api), **options)
    with pytest.raises(ConfigError, match="from 0 to 20"):
        AnswerServing(service(api), top_logprobs=21)
    with pytest.raises(ConfigError, match="words"):
        AnswerServing(service(api, image_io=ImageIO(tmp_path)))
    serving = AnswerServing(service(api))
    request = GenerationRequest(
        request_id="0" * 32, prompt="x", images=("a.png",), seed=0, params={**serving.default_params(), "expected": 3}
    )
    with pytest.raises(BadRequestError, match="expected"):
        serving.check(request)


def test_another_question_is_another_serving_and_no_key_is_kept(api):
    serving = AnswerServing(service(api))
    same = AnswerServing(service(api))
    assert serving.fingerprint() == same.fingerprint()
    assert serving.fingerprint() != vqa_score(service(api)).fingerprint()
    assert serving.default_params() != AnswerServing(service(api), expected="no").default_params()
    serving.setup()
    copied = pickle.loads(pickle.dumps(serving))
    assert b"any-word" not in pickle.dumps(serving)
    assert copied.fingerprint() == serving.fingerprint()
    [replica] = serving.replicas()
    assert replica.fingerprint() == serving.fingerprint()
    serving.cleanup()


def test_a_missing_key_is_told_before_work_begins(api, monkeypatch, caplog):
    serving = AnswerServing(service(api))
    serving.preflight()
    assert not caplog.records
    monkeypatch.delenv("DF_API_KEY")
    serving.preflight()
    assert "DF_API_KEY" in caplog.text


def test_two_endpoints_are_two_replicas(api, desk, monkeypatch):
    monkeypatch.setenv("OTHER", "word")
    serving = AnswerServing(service(api, key_name_of_api_key=["DF_API_KEY", "OTHER"]))
    api.script({"": "say:No"})
    request = GenerationRequest(
        request_id="0" * 32, prompt="x", images=(desk.picture(0),), seed=0, params=serving.default_params()
    )

    async def asked(replica):
        replica.setup()
        [result] = await replica.generate([request])
        await asyncio.to_thread(replica.cleanup)
        return result.text

    for replica in serving.replicas():
        assert '"correct":false' in asyncio.run(asked(replica))
    assert calls(api) == 2
