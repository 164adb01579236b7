"""Workers: one in this process, and one in a process of its own that may die at any moment."""

from __future__ import annotations

import asyncio
import importlib
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    ConfigError,
    FatalServingError,
    InputError,
    OutOfMemoryError,
    RetryError,
    RunStoppedError,
    ServingError,
    WorkerDiedError,
)
from dataflow.runtime import worker as workers
from dataflow.runtime.worker import InlineWorker, Made, ProcessWorker
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import GenerationRequest, GenerationResult

pytestmark = pytest.mark.usefixtures("no_waiting")

ODD_SERVINGS = """
from pathlib import Path
import os
from dataflow.errors import ConfigError, ServingError
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import GenerationResult

class Touchy(ServingError):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")

class RaisesTouchy(FakeServing):
    async def generate(self, requests):
        raise Touchy(7, "half packed")

class CountsLambdas(FakeServing):
    async def generate(self, requests):
        return [GenerationResult(text="a", usage={"cost": lambda: 1}) for _ in requests]

class Misconfigured(FakeServing):
    def setup(self):
        raise ConfigError("no such model")

class DiesLoading(FakeServing):
    def setup(self):
        os._exit(3)

class LoadsOnce(FakeServing):
    def setup(self):
        if Path(self.model).exists():
            os._exit(3)
        Path(self.model).write_text("loaded")

class DiesUnpacking(FakeServing):
    def __setstate__(self, state):
        os._exit(3)

class WritesWhenFreed(FakeServing):
    def cleanup(self):
        Path(self.model).write_text("freed")

class NeverEnds(FakeServing):
    def cleanup(self):
        import time
        time.sleep(60)

class BreaksWhileSaving(FakeServing):
    async def generate(self, requests):
        results = await super().generate(requests)
        self.image_io.save = None
        return results
"""


def request(number: int = 1, prompt: str = "a", **facts: Any) -> GenerationRequest:
    return GenerationRequest(request_id=f"{number:032x}", prompt=prompt, seed=number, **facts)


def go(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run with a limit: what must not happen here is waiting for ever."""
    return asyncio.run(asyncio.wait_for(work(), 30))


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Servings that misbehave, in a module that a worker process can import too."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "odd_servings.py").write_text(ODD_SERVINGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "odd_servings", raising=False)
    return importlib.import_module("odd_servings")


class TestInline:
    def test_a_batch_is_made_then_saved_with_its_facts_in_the_file(self, job):
        async def work() -> list:
            worker = InlineWorker(job.serving(), {"model": "fake", "revision": "1"})
            await worker.start()
            made = request(
                prompt="a fox",
                negative_prompt="dogs",
                size=(8, 8),
                params={"num_inference_steps": 4},
                images=(str(job.picture("a.png")),),
                image_hashes=("00",),
                after="f" * 32,
            )
            items = await worker.save(await worker.generate([made]))
            worker.give_up()
            await worker.stop()
            return items

        (item,) = go(work)
        assert isinstance(item, Made)
        facts = job.io.read_metadata(job.io.path(item.images[0].name))
        assert facts.pop("software").startswith("open-dataflow ")
        assert facts == {
            "request_id": f"{1:032x}",
            "prompt": "a fox",
            "negative_prompt": "dogs",
            "seed": 1,
            "size": [8, 8],
            "params": {"num_inference_steps": 4},
            "images": [str(job.folder / "sources/a.png")],
            "image_hashes": ["00"],
            "after": "f" * 32,
            "model": "fake",
            "revision": "1",
            "provenance": {"batch_size": 1},
        }

    def test_several_images_of_one_answer_are_numbered(self, job):
        class Pair(FakeServing):
            async def generate(self, requests):
                (answer,) = await super().generate(requests)
                return [GenerationResult(images=(*answer.images, *answer.images))]

        worker = InlineWorker(Pair(job.io, size=(8, 8)), {})

        async def work() -> list:
            return await worker.save(await worker.generate([request()]))

        (item,) = go(work)
        assert [image.name for image in item.images] == [f"00/{1:032x}.png", f"00/{1:032x}_1.png"]

    @pytest.mark.parametrize(
        ("raised", "seen", "reason"),
        [
            (ValueError("odd"), ServingError, "crash"),
            (OutOfMemoryError("full"), OutOfMemoryError, "out_of_memory"),
            (TimeoutError("socket"), RetryError, "timeout"),
            (workers.InputError("gone", path="x.png"), BadRequestError, "bad_input"),
        ],
    )
    def test_whatever_a_serving_raises_becomes_an_error_with_a_reason(self, job, raised, seen, reason):
        class Raising(FakeServing):
            async def generate(self, requests):
                raise raised

        with pytest.raises(seen) as caught:
            go(lambda: InlineWorker(Raising(job.io), {}).generate([request()]))
        assert type(caught.value) is seen
        assert caught.value.reason == reason

    def test_a_wrong_number_of_answers_is_no_answer(self, job):
        class Short(FakeServing):
            async def generate(self, requests):
                return []

        with pytest.raises(BadOutputError, match="answered 1 requests with 0 results"):
            go(lambda: InlineWorker(Short(job.io), {}).generate([request()]))

    @pytest.mark.parametrize(
        ("error", "ends"), [(OSError(28, "No space left"), True), (OSError("cannot write mode F as PNG"), False)]
    )
    def test_a_full_disk_is_not_the_pictures_fault_and_an_odd_picture_not_the_disks(
        self, job, monkeypatch, error, ends
    ):
        def fail(*_):
            raise error

        monkeypatch.setattr(type(job.io), "save", fail)
        worker = InlineWorker(job.serving(), {})

        async def work() -> list:
            return await worker.save(await worker.generate([request()]))

        if ends:
            with pytest.raises(OSError, match="No space left"):
                go(work)
        else:
            assert go(work)[0].reason == "crash"


class TestProcess:
    def test_a_batch_is_made_and_saved_over_there(self, job):
        async def work() -> None:
            worker = ProcessWorker(job.serving(), {"model": "fake"})
            await worker.start()
            await worker.start()  # a second time changes nothing
            child = worker._child
            (item,) = await worker.save(await worker.generate([request()]))
            assert isinstance(item, Made)
            assert (job.io.save_path / item.images[0].name).exists()
            assert worker._child is child
            await worker.stop()
            await worker.stop()
            assert child.process.returncode == 0
            assert not child.listener.is_alive()

        go(work)

    def test_the_serving_is_freed_when_it_is_stopped(self, job, odd):
        async def work() -> None:
            worker = ProcessWorker(odd.WritesWhenFreed(job.io, model=str(job.folder / "freed")), {})
            await worker.start()
            await worker.stop()

        go(work)
        assert (job.folder / "freed").exists()

    def test_one_that_does_not_end_is_killed(self, job, odd, monkeypatch):
        monkeypatch.setattr(workers, "STOP_SECONDS", 0.2)

        async def work() -> None:
            worker = ProcessWorker(odd.NeverEnds(job.io), {})
            await worker.start()
            child = worker._child
            await worker.stop()
            assert child.process.returncode == -signal.SIGKILL

        go(work)

    def test_a_process_that_died_unnoticed_is_stopped_quietly(self, job):
        async def work() -> None:
            worker = ProcessWorker(job.serving(), {})
            await worker.stop()  # never started
            await worker.start()
            worker._child.kill()
            await worker.stop()

        go(work)

    def test_a_dead_process_takes_its_batch_along_and_the_next_batch_starts_another(self, job):
        async def work() -> None:
            worker = ProcessWorker(job.serving(script={"poison": "kill"}), {})
            with pytest.raises(WorkerDiedError, match="exit status -9"):
                await worker.generate([request(1, "poison")])
            ticket = await worker.generate([request(2)])
            worker.give_up()
            await asyncio.to_thread(worker._child.listener.join)
            with pytest.raises(WorkerDiedError):
                await worker.save(ticket)
            ticket = await worker.generate([request(3)])
            lost = await worker.generate([request(4)])
            first = worker._child
            first.kill()
            await asyncio.to_thread(first.listener.join)
            again = await worker.generate([request(5)])
            for gone in (ticket, lost):
                with pytest.raises(WorkerDiedError):
                    await worker.save(gone)
            assert isinstance((await worker.save(again))[0], Made)
            await worker.stop()

        go(work)

    def test_one_that_does_not_answer_in_time_is_killed(self, job):
        async def work() -> None:
            worker = ProcessWorker(job.serving(timeout=0.2), {})
            await worker.start()
            first = worker._child.process
            os.kill(first.pid, signal.SIGSTOP)
            with pytest.raises(RetryError, match=r"no answer within 0\.2 s; worker restarted") as caught:
                await worker.generate([request()])
            assert caught.value.reason == "timeout"
            assert first.returncode == -signal.SIGKILL
            await worker.stop()

        go(work)

    @pytest.mark.parametrize(
        ("kind", "error", "message"),
        [
            ("Misconfigured", ConfigError, "no such model"),
            ("DiesLoading", FatalServingError, "ended while it was loading: .*exit status 3"),
            ("DiesUnpacking", FatalServingError, "ended while it was loading: .*exit status 3"),
        ],
    )
    def test_one_that_does_not_load_says_so(self, job, odd, kind, error, message):
        async def work() -> None:
            worker = ProcessWorker(getattr(odd, kind)(job.io), {})
            try:
                await worker.start()
            finally:
                await worker.stop()

        with pytest.raises(error, match=message):
            go(work)

    def test_one_that_dies_while_it_starts_again_is_a_death_like_others(self, job, odd):
        async def work() -> None:
            worker = ProcessWorker(odd.LoadsOnce(job.io, model=str(job.folder / "loaded")), {})
            await worker.start()
            worker.give_up()
            with pytest.raises(WorkerDiedError, match="ended while it was loading"):
                await worker.generate([request()])
            await worker.stop()

        go(work)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("RaisesTouchy", "half packed"),
            ("CountsLambdas", "the answer cannot be sent"),
            ("BreaksWhileSaving", "NoneType"),
        ],
    )
    def test_no_answer_is_waited_for_in_vain(self, job, odd, kind, message):
        async def work() -> None:
            worker = ProcessWorker(getattr(odd, kind)(job.io), {})
            try:
                items = await worker.save(await worker.generate([request()]))
            except ServingError as error:
                items = [error]
            assert message in str(items[0])
            await worker.stop()

        go(work)

    def test_a_serving_that_cannot_be_packed_is_named(self, job):
        serving = job.serving()
        serving.model = lambda: None
        with pytest.raises(ConfigError, match="FakeServing cannot be sent to a worker process"):
            ProcessWorker(serving, {})


class TestOverThere:
    """The worker's side of the pipe, run in this process."""

    @pytest.fixture
    def talk(self, monkeypatch):
        ended = []

        def leave(code: int) -> None:
            ended.append(code)
            raise BrokenPipeError

        monkeypatch.setattr(os, "_exit", leave)
        ours, theirs = socket.socketpair()
        line = Connection(ours.detach())
        thread = threading.Thread(target=workers.main, args=(theirs.detach(),))

        def say(*words: object) -> None:
            line.send_bytes(pickle.dumps(words))

        def hear() -> tuple:
            assert line.poll(30), "no answer"
            return pickle.loads(line.recv_bytes())

        line.say, line.hear, line.thread, line.ended = say, hear, thread, ended
        yield line
        if not line.closed:
            line.close()
        thread.join(30)
        assert not thread.is_alive()

    def test_it_answers_until_it_is_told_to_stop(self, talk, job, monkeypatch):
        talk.thread.start()
        talk.say(job.serving(script={"crash": "crash", "refuse": "refuse"}), {"model": "fake"})
        assert talk.hear() == ("ready", 0, None, None)
        talk.say("generate", 1, [request(1), request(2, "refuse")])
        assert talk.hear() == ("generate", 1, None, None)
        talk.say("save", 1, None)
        what, ticket, error, (made, refused) = talk.hear()
        assert (what, ticket, error) == ("save", 1, None)
        assert (made.images[0].width, refused.reason) == (8, "refused")
        talk.say("generate", 2, [request(3, "crash")])
        *_, error, _ = talk.hear()
        assert (type(error), error.reason) == (ServingError, "crash")
        talk.say("save", 99, None)
        *_, error, _ = talk.hear()
        assert error.reason == "crash"
        talk.say("stop", 0, None)
        talk.thread.join(30)
        assert not talk.thread.is_alive()

    def test_a_serving_that_does_not_load_is_told_to_the_parent(self, talk, job, monkeypatch):
        monkeypatch.setattr(FakeServing, "setup", lambda self: 1 / 0)
        talk.thread.start()
        talk.say(job.serving(), {})
        *_, error, _ = talk.hear()
        assert isinstance(error, FatalServingError)

    def test_an_answer_that_cannot_be_packed_is_an_error(self, talk, job, monkeypatch):
        async def generate(self, requests):
            return [GenerationResult(text="a", usage={"cost": lambda: 1})]

        monkeypatch.setattr(FakeServing, "generate", generate)
        talk.thread.start()
        talk.say(job.serving(), {})
        talk.hear()
        talk.say("generate", 1, [request(1)])
        talk.hear()
        talk.say("save", 1, None)
        *_, error, _ = talk.hear()
        assert "cannot be sent" in str(error)

    def test_without_a_parent_it_ends_at_once(self, talk, job):
        talk.thread.start()
        talk.say(job.serving(), {})
        talk.hear()
        talk.close()
        talk.thread.join(30)
        assert talk.ended == [1]


class TestStepsWithProcesses:
    def test_rows_are_shared_among_the_processes(self, job):
        summary = job.prompts(*(f"p{i}" for i in range(24))).run(job.serving(processes=2, batch_size=3))
        assert (summary.done, summary.made) == (24, 24)
        assert job.check_images() == 24

    def test_a_row_that_kills_its_process_ends_alone_and_the_others_are_made(self, job):
        job.prompts(*(f"p{i}" for i in range(5)), "poison", "q0", "q1")
        serving = job.serving(processes=2, batch_size=4, script={"poison": "kill"})
        summary = job.run(serving, max_attempts=2)
        assert (summary.done, summary.reasons) == (7, {"killed_worker": 1})
        assert job.check_images() == 7
        assert job.table()[5]["images_error"]["message"].endswith("(exit status -9)")

    def test_a_row_that_hangs_is_given_up_and_the_others_are_made(self, job):
        job.prompts("a", "stuck", "b", "c")
        serving = job.serving(processes=2, batch_size=2, script={"stuck": "hang"}, timeout=0.3)
        summary = job.run(serving, max_attempts=1)
        assert (summary.done, summary.reasons) == (3, {"timeout": 1})

    def test_a_full_disk_over_there_stops_the_run(self, job, monkeypatch):
        folder = job.io.save_path
        folder.write_text("a file where the folder should be")
        with pytest.raises(InputError):
            job.prompts("a", "b").run(job.serving(processes=2))
        folder.unlink()
        assert job.run().done == 2

    def test_processes_that_do_not_load_stop_the_run(self, job, odd):
        with pytest.raises(RunStoppedError, match="ended while it was loading") as stopped:
            job.prompts("a", "b").run(odd.DiesLoading(job.io, processes=2))
        assert stopped.value.summary.pending == 2
