"""A judge of pairs: one of three words, or openly none."""

import json
import pickle

import pytest

pytest.importorskip("openai")

from tests.judging import ready, service

from dataflow.errors import BadOutputError, BadRequestError, ConfigError
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.pair_judge import PairJudge
from dataflow.types import GenerationRequest, GenerationResult


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    return ready(server, monkeypatch)


def request(number=2, prompt="a fox", **params):
    images = tuple(f"{n}.png" for n in range(number))
    return GenerationRequest(request_id="0" * 32, prompt=prompt, images=images, seed=0, params=params)


def read(judge, text):
    return judge.read(request(), GenerationResult(text=text))


@pytest.mark.parametrize("better", ["first", "second", "tie"])
def test_verdicts(api, better):
    text = json.dumps({"reason": "sharper", "better": better})
    for answer in (text, f"```json\n{text}\n```"):
        assert read(PairJudge(service(api)), answer) == {"better": better, "reason": "sharper"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The first one, clearly.",
        "first",
        '["first"]',
        '{"reason": "both are fine"}',
        '{"better": null}',
        '{"better": 1}',
        '{"better": true}',
        '{"better": ["first"]}',
        '{"better": "First"}',
        '{"better": "erste"}',
        '{"better": "third"}',
        '{"better": "first or second"}',
        "I'm sorry, I cannot compare these.",
    ],
)
def test_what_is_no_verdict(api, text):
    with pytest.raises(BadOutputError) as caught:
        read(PairJudge(service(api)), text)
    assert caught.value.reason == "parse_error"


def test_what_goes_out(api):
    judge = PairJudge(service(api))
    asked = judge.asked(request(prompt="a {brace} fox"))
    assert "a {brace} fox" in asked
    assert asked.endswith('"first", "second" or "tie".')
    schema = judge.default_params()["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["reason", "better"]
    assert schema["properties"]["better"]["enum"] == ["first", "second", "tie"]


def test_it_compares_two(api):
    judge = PairJudge(service(api))
    judge.check(request(2, **judge.default_params()))
    for number in (0, 1, 3):
        with pytest.raises(BadRequestError, match="two pictures"):
            judge.check(request(number))
    with pytest.raises(ConfigError):
        PairJudge(service(api), " ")
    other = PairJudge(service(api), "Which is funnier?")
    assert other.fingerprint() != judge.fingerprint()
    assert pickle.loads(pickle.dumps(other)).fingerprint() == other.fingerprint()
