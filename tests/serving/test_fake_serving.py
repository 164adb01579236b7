"""The serving without a model: its pictures, and everything that goes wrong on request."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal

import numpy as np
import pytest

from dataflow.errors import (
    ConfigError,
    FatalServingError,
    OutOfMemoryError,
    RateLimitError,
    RetryError,
)
from dataflow.io import ImageIO
from dataflow.serving.fake_serving import FAULTS, FakeServing, paint
from dataflow.types import GenerationRequest, GenerationResult


def request(prompt: str = "a", seed: int = 1, **facts) -> GenerationRequest:
    return GenerationRequest(request_id=f"{abs(hash((prompt, seed))):032x}", prompt=prompt, seed=seed, **facts)


def generate(serving: FakeServing, *requests: GenerationRequest) -> list[GenerationResult]:
    return asyncio.run(asyncio.wait_for(serving.generate(requests or (request(),)), 10))


def pixels(*arguments, size=(16, 16), **facts) -> bytes:
    return paint(request(*arguments, **facts), size).tobytes()


class TestPictures:
    def test_they_depend_on_prompt_seed_and_content_of_the_input_and_nothing_else(self, tmp_path):
        for name, data in (("a", b"1"), ("copy", b"1"), ("b", b"2")):
            (tmp_path / name).write_bytes(data)
        a, copy, b = (str(tmp_path / name) for name in ("a", "copy", "b"))
        assert pixels("x") == pixels("x", params={"steps": 9}, negative_prompt="blur")
        assert pixels("x", images=(a,)) == pixels("x", images=(copy,))
        different = {pixels("x"), pixels("y"), pixels("x", 2), pixels("x", images=(a,)), pixels("x", images=(b,))}
        assert len(different | {pixels("x", images=(a, b)), pixels("x", images=(b, a))}) == 7

    def test_they_are_tiles_of_the_size_asked_for(self, tmp_path):
        (result,) = generate(FakeServing(ImageIO(tmp_path), size=(32, 16)))
        assert result.images[0].size == (32, 16)
        (result,) = generate(FakeServing(ImageIO(tmp_path)), request(size=(80, 40)))
        assert result.images[0].size == (80, 40)
        assert len(np.unique(np.asarray(result.images[0]).reshape(-1, 3), axis=0)) == 64

    def test_any_text_is_a_prompt(self):
        assert len({pixels(text) for text in ("狐", "🦊", "\0", "\ud800", "x" * 20_000, "")}) == 6

    def test_without_a_store_it_writes(self):
        (result,) = generate(FakeServing(), request("a", 5))
        assert (result.text, result.images) == ("a (5)", ())


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            ("error", RetryError),
            ("crash", RuntimeError),
            ("out_of_memory", OutOfMemoryError),
            ("fatal", FatalServingError),
            ("rate_limit", RateLimitError),
            ("hang", TimeoutError),
        ],
    )
    def test_faults_of_a_whole_batch_are_raised(self, fault, error):
        serving = FakeServing(script={"bad": fault})
        with pytest.raises(error):
            asyncio.run(asyncio.wait_for(serving.generate([request(), request("so bad")]), 0.05))
        assert generate(serving)[0].finish_reason == "stop"

    @pytest.mark.parametrize(("fault", "reason"), [("refuse", "refused"), ("black", "black")])
    def test_faults_of_one_request_are_results(self, fault, reason):
        fine, bad = generate(FakeServing(script={"bad": fault}), request(), request("bad"))
        assert (fine.error, bad.error.reason) == (None, reason)

    def test_garbage_is_bytes_that_are_no_picture(self):
        (result,) = generate(FakeServing(script={"a": "garbage"}))
        assert result.images == (b"<html>502 Bad Gateway</html>",)

    @pytest.mark.parametrize(("fault", "seconds"), [("rate_limit", 0.01), ("rate_limit:2.5", 2.5), ("rate_limit:0", 0)])
    def test_a_rate_limit_may_say_how_long(self, fault, seconds):
        with pytest.raises(RateLimitError) as limited:
            generate(FakeServing(script={"a": fault}))
        assert limited.value.retry_after == seconds

    def test_kill_is_sigkill_to_its_own_process(self, monkeypatch):
        sent = []
        monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        generate(FakeServing(script={"a": "kill"}))
        assert sent == [(os.getpid(), signal.SIGKILL)]

    def test_a_list_is_one_fault_per_attempt_of_each_request(self):
        serving = FakeServing(script={"a": ["error", "", "error"]})
        for prompt in ("a1", "a2"):
            ends = []
            for _ in range(5):
                try:
                    ends.append(generate(serving, request(prompt))[0].finish_reason)
                except RetryError:
                    ends.append("lost")
            assert ends == ["lost", "stop", "lost", "stop", "stop"]

    def test_larger_batches_than_fit_are_out_of_memory(self):
        serving = FakeServing(fits=2)
        assert len(generate(serving, request("a"), request("b"))) == 2
        with pytest.raises(OutOfMemoryError, match="a batch of 3 does not fit, 2 would"):
            generate(serving, *map(request, "abc"))

    @pytest.mark.parametrize("script", [{"a": "explode"}, {"a": ["error", "explode"]}])
    def test_an_unknown_fault_is_told_at_once(self, script):
        with pytest.raises(ConfigError, match="unknown fault 'explode'; there are refuse, ") as caught:
            FakeServing(script=script)
        assert all(fault in str(caught.value) for fault in FAULTS)


def test_the_log_says_what_was_painted(tmp_path):
    serving = FakeServing(log=tmp_path / "log", script={"b": "error"})
    generate(serving, request("a"))
    with pytest.raises(RetryError):
        generate(serving, request("b"))
    assert (tmp_path / "log").read_text().split() == [request("a").request_id]


def test_time_is_slept_and_shared_among_the_batch():
    first, second = generate(FakeServing(ImageIO("unused"), seconds=0.05), request("a"), request("b"))
    assert first.seconds == second.seconds >= 0.025
    assert first.provenance == {"batch_size": 2}


def test_copies_for_processes_are_packed_small_and_run_alone(tmp_path):
    class Special(FakeServing):
        pass

    serving = Special(ImageIO(tmp_path), processes=3, model="m")
    copies = serving.replicas()
    assert [(type(copy), copy.processes, copy.model) for copy in copies] == [(Special, 1, "m")] * 3
    assert serving.processes == 3
    assert FakeServing().replicas()[0].processes == 1
    assert len(pickle.dumps(FakeServing(ImageIO(tmp_path), processes=3).replicas()[0])) < 2000
