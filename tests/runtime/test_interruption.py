"""Ctrl-C, threads and event loops around a run."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from dataflow.runtime import crew, engine

SCRIPT = """
import sys, time
from dataflow.errors import RunInterruptedError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.serving.fake_serving import FakeServing
from dataflow.utils.storage import FileStorage

class Blocking(FakeServing):
    async def generate(self, requests):
        answers = await super().generate(requests)
        if any("block" in request.prompt for request in requests):
            print("blocked", flush=True)
            time.sleep(60)
        return answers

kind = {kind}
serving = kind(ImageIO("images", durable=False), size=(8, 8), log="made.log", **{options})
print("ready", flush=True)
try:
    Text2ImageGenerator(serving).run(FileStorage("in.jsonl", cache_path="cache").step(), "prompt")
except RunInterruptedError as stop:
    assert isinstance(stop, KeyboardInterrupt)
    assert stop.summary.balanced
    print("stopped", stop.summary.done, stop.summary.pending, flush=True)
    sys.exit(stop.exit_code)
"""


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


@pytest.fixture
def start(job):
    """Start the script in a process of its own; it is gone at the end of the test."""
    processes = []

    def start(kind: str = "FakeServing", **options) -> subprocess.Popen:
        with (job.folder / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(kind=kind, options=repr(options))],
                cwd=job.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def stderr(job) -> str:
    return (job.folder / "stderr").read_text()


class TestCtrlC:
    def test_the_first_lets_the_batch_end_and_the_next_run_goes_on(self, job, start):
        job.prompts(*(f"p{i}" for i in range(12)))
        process = start(batch_size=2, seconds=0.3)
        wait_until(lambda: job.made().total() >= 2, "the first batch was made")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "finishing the batches in flight" in stderr(job)
        done = job.made().total()
        assert 4 <= done < 12, "the batch in flight was finished, no other begun"
        assert f"stopped {done} {12 - done}" in out
        assert f"12 rows = {done} done" in stderr(job)
        assert job.index().starts == {}
        assert not job.output.exists()
        assert job.run().made == 12 - done
        assert set(job.made().values()) == {1}
        assert job.check_images() == 12

    def test_the_second_gives_the_batch_up(self, job, start):
        job.prompts("a", "stuck", "b")
        process = start(script={"stuck": "hang"})
        wait_until(lambda: len(job.records("done")) == 1, "the first image was kept")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "press it again" in stderr(job), "the first Ctrl-C was heard")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, "stopped 1 2" in out) == (130, True)
        assert job.index().starts == {}, "given up by a person: killed nobody"
        assert job.run().made == 2

    def test_the_second_gets_through_to_a_serving_that_blocks_everything(self, job, start):
        job.prompts("a", "block")
        process = start(kind="Blocking")
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "blocked\n"]
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "press it again" in stderr(job), "the first Ctrl-C was heard")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, "stopped" in out) == (130, True)
        assert job.run().done == 2

    def test_a_wait_for_a_rate_limit_does_not_hold_it_up(self, job, start):
        job.prompts("a", "limited", "b")
        process = start(script={"limited": "rate_limit:600"})
        wait_until(lambda: len(job.records("start")) == 2, "the limit was met")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, "stopped 1 2" in out) == (130, True)

    def test_the_processes_of_the_workers_are_gone_afterwards(self, job, start):
        job.prompts("a", "stuck", "b", "c")
        process = start(script={"stuck": "hang"}, processes=2)
        # One may wait behind the one that is stuck.
        wait_until(lambda: job.made().total() >= 2 and len(job.records("start")) >= 3, "the others were made")
        children = children_of(process.pid)
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "press it again" in stderr(job), "the first Ctrl-C was heard")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130, stderr(job)
        wait_until(lambda: not any(map(alive, children)), "the workers ended")


def children_of(pid: int) -> list[int]:
    texts = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in texts for child in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestWhereItRuns:
    def test_inside_a_running_event_loop_as_in_a_notebook(self, job):
        async def cell() -> None:
            assert job.prompts("a", "b").run().done == 2

        asyncio.run(cell())

    def test_in_a_thread(self, job):
        done = []
        thread = threading.Thread(target=lambda: done.append(job.prompts("a", "b").run().done))
        thread.start()
        thread.join(30)
        assert done == [2]

    def test_no_thread_of_a_run_is_left_behind(self, job):
        before = set(threading.enumerate())
        job.prompts("a", "b").run(job.serving(concurrency=2))
        deadline = time.monotonic() + 10
        while set(threading.enumerate()) - before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(threading.enumerate()) <= before


class TestCtrlCFromInside:
    """The same in this process, where the moment of each Ctrl-C can be chosen."""

    @staticmethod
    def interrupt(monkeypatch, *when: Callable[[Future[None]], object]) -> None:
        """Let the main thread's wait be interrupted once per callable, after it returns; it is given what ends."""
        moments = list(when)
        wait = crew._wait

        def interrupted(ending: Future[None], seconds: float | None = None) -> None:
            if moments:
                moments.pop(0)(ending)
                raise KeyboardInterrupt
            wait(ending, seconds)

        monkeypatch.setattr(crew, "_wait", interrupted)

    def test_after_the_last_row_it_changes_nothing(self, job, monkeypatch):
        job.prompts("a", "b")
        self.interrupt(monkeypatch, lambda ending: wait_until(ending.done, "the run ended"))
        assert job.run().done == 2
        assert job.check_images() == 2

    def test_the_first_keeps_what_is_finished(self, job, monkeypatch):
        job.prompts(*(f"p{i}" for i in range(8)))
        self.interrupt(monkeypatch, lambda _: wait_until(lambda: job.made().total() >= 2, "two were made"))
        with pytest.raises(engine.RunInterruptedError) as stopped:
            job.run(job.serving(seconds=0.05))
        assert stopped.value.summary.balanced
        assert stopped.value.summary.done == job.made().total() < 8
        assert job.run().done == 8
        assert set(job.made().values()) == {1}

    def test_the_second_frees_the_serving_and_forgets_what_it_gave_up(self, job, monkeypatch):
        job.prompts("a", "stuck", "b")
        freed = threading.Event()

        class Freed(type(job.serving())):
            def cleanup(self) -> None:
                freed.set()

        self.interrupt(
            monkeypatch,
            lambda _: wait_until(lambda: len(job.records("start")) == 2, "the second began"),
            lambda _: None,
        )
        with pytest.raises(engine.RunInterruptedError) as stopped:
            job.run(Freed(job.io, size=(8, 8), log=job.log, script={"stuck": "hang"}))
        assert stopped.value.summary.balanced
        assert freed.wait(10)
        assert job.index().starts == {}
        monkeypatch.undo()
        assert job.run().done == 3
