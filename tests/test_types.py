"""The nouns, and what a serving gets for nothing by subclassing."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest

from dataflow.errors import RefusedError, RetryError
from dataflow.types import Drop, GenerationRequest, GenerationResult, Outcome, Serving, Summary


class Smallest(Serving):
    def fingerprint(self):
        return {"model": "none"}

    async def generate(self, requests):
        return [GenerationResult(text="") for _ in requests]


def test_a_serving_needs_but_a_fingerprint_and_generate():
    serving = Smallest()
    assert isinstance(serving, Serving)
    assert (serving.batch_size, serving.concurrency, serving.images_per_prompt) == (1, 1, 1)
    assert (serving.image_io, serving.timeout) == (None, None)
    request = GenerationRequest(request_id="0" * 32, prompt="x", seed=0)
    assert (serving.check(request), serving.batch_key(request), serving.default_params()) == (None, None, {})
    assert serving.replicas() == [serving]
    assert (serving.setup(), serving.cleanup()) == (None, None)


def test_a_smallest_serving_runs_a_step(job):
    assert job.prompts("a").run(Smallest()).done == 1


@pytest.mark.parametrize(("error", "finish"), [(None, "stop"), (RefusedError(), "refused"), (RetryError(), "error")])
def test_how_a_result_ended(error, finish):
    assert GenerationResult(error=error).finish_reason == finish


def test_requests_and_outcomes_cannot_be_changed_and_travel():
    request = GenerationRequest(request_id="0" * 32, prompt="x", seed=0, params={"a": 1})
    with pytest.raises(FrozenInstanceError):
        request.seed = 1
    for noun in (request, Outcome(request_id="", status="done"), Drop("small")):
        assert pickle.loads(pickle.dumps(noun)) == noun


def test_a_request_with_pictures_or_a_turn_before_it_is_an_edit():
    facts = {"request_id": "0" * 32, "prompt": "x", "seed": 0}
    assert GenerationRequest(**facts).task == "text2image"
    assert GenerationRequest(**facts, images=("a.png",)).task == "imageedit"
    assert GenerationRequest(**facts, after="1" * 32).task == "imageedit"


def test_a_sum_is_balanced_or_not():
    assert Summary(rows=5, done=1, refused=1, failed=1, dropped=1, pending=1).balanced
    assert not Summary(rows=5, done=1).balanced
