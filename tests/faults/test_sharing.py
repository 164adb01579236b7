"""Several processes that make one step together: each row gets its own image, once, whoever dies."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dataflow.commands import status
from dataflow.errors import CacheBusyError, ConfigError, RunStoppedError
from dataflow.runtime import engine, sharing
from dataflow.runtime.sharing import Driver

LIFE = str(Path(__file__).with_name("life.py"))
KILLED = -signal.SIGKILL
SHARED = {"part_rows": 10, "share": True}


def start(site) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, LIFE, json.dumps(site.job())], stderr=subprocess.PIPE)


def ended(processes) -> list[str]:
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return errors


def prompts(count):
    """Some were there before, word for word, in another part."""
    return [f"a picture of thing {number if number % 7 else number // 14}" for number in range(count)]


@pytest.fixture
def shared(site):
    site.options = SHARED
    site.cache.mkdir()
    return site


def test_three_make_what_one_would(shared, make_site, tmp_path):
    rows = prompts(95)
    alone = make_site(tmp_path / "alone").fill(rows)
    alone.run()
    shared.serving = {"seconds": 0.02}
    shared.fill(rows)
    ended([start(shared) for _ in range(3)])
    shared.check()
    assert set(shared.generated().values()) == {1}
    assert {path.name for path in shared.images.rglob("*.png")} == {path.name for path in alone.images.rglob("*.png")}
    writers = {path.name for path in shared.journal.parent.glob("part-*/*.jsonl")}
    assert len(writers) == 3, "each of them made some of it, into a journal of its own"
    assert not list((shared.cache / ".drivers").iterdir())
    assert shared.run().made == 0
    assert shared.run(options={"share": False}).made == 0


@pytest.mark.slow
def test_some_are_killed(shared):
    rng = random.Random(5)
    shared.serving = {"seconds": 0.2, "batch_size": 2}
    shared.fill(prompts(160))
    processes = [start(shared) for _ in range(3)]
    kills = 0
    while kills < 5 and any(process.poll() is None for process in processes):
        time.sleep(rng.uniform(0.4, 0.9))
        victim = rng.choice(processes)
        if victim.poll() is None:
            victim.kill()
            victim.communicate()
            kills += 1
            processes.remove(victim)
            processes.append(start(shared))
    ended(processes)
    assert kills > 2
    shared.check()
    again = shared.generated().total() - 160
    print(f"\n{again} generations beyond 160 in {kills} kills")
    assert again <= kills * 2 * 2


def test_one_that_has_it_for_itself_and_others_keep_out_of_each_others_way(shared):
    shared.fill(prompts(30))
    driver = Driver(shared.cache)
    driver.begin()
    try:
        with pytest.raises(CacheBusyError, match=f"shared by 1 processes, one of them {os.getpid()}"):
            shared.run(options={"share": False})
    finally:
        driver.end()
    with sharing.alone(shared.cache), pytest.raises(CacheBusyError, match="is being written by"):
        shared.run()
    assert shared.run().done == 30


def of_another_machine(site, age: float) -> str:
    """A driver elsewhere, last heard of so many seconds ago."""
    name = f"1-{age:.0f}"
    path = site.cache / ".drivers" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "today"}))
    os.utime(path, (time.time() - age,) * 2)
    return name


def test_what_a_dead_one_has_claimed_is_taken_over(shared):
    shared.fill(prompts(30))
    part = shared.journal.parent / "part-00001"
    part.mkdir(parents=True)
    (part / "claim").write_text(of_another_machine(shared, sharing.DEAD_SECONDS + 10))
    assert shared.run().done == 30
    assert not (part / "claim").exists()
    shared.check()


def test_what_a_living_one_has_claimed_is_waited_for(shared, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 0.05)
    shared.fill(prompts(30))
    part = shared.journal.parent / "part-00001"
    part.mkdir(parents=True)
    (part / "claim").write_text(of_another_machine(shared, 0))
    found = []
    thread = threading.Thread(target=lambda: found.append(shared.run()))
    thread.start()
    deadline = time.monotonic() + 30
    while len(shared.generated()) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert len(shared.generated()) == 20
    assert thread.is_alive()
    (part / "claim").unlink()
    thread.join(30)
    assert found[0].done == 30
    shared.check()


def test_one_that_was_taken_for_dead_leaves_the_table_to_the_other(shared):
    """It wakes up, and its part is somebody else's."""
    shared.fill(prompts(30))
    part = shared.journal.parent / "part-00001"

    class Sleepy(engine.Crew):
        def run(self, main, stop):
            super().run(main, stop)
            if (part / "claim").exists():
                (part / "claim").write_text(of_another_machine(shared, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Crew", Sleepy)
        with pytest.raises(RunStoppedError, match="another process has taken over part-00001"):
            shared.run()
    assert (part / "claim").exists()
    (part / "claim").unlink()
    assert shared.run().done == 30
    assert set(shared.generated().values()) == {1}


def test_a_table_of_one_part_is_made_by_one(shared):
    shared.serving = {"seconds": 0.05}
    shared.fill(prompts(8))
    ended([start(shared) for _ in range(2)])
    shared.check()
    assert set(shared.generated().values()) == {1}


def test_what_fails_is_tried_once_by_all_of_them_together(shared):
    shared.serving = {"script": {"a picture of thing 5": "garbage"}}
    shared.fill(prompts(30))
    ended([start(shared) for _ in range(2)])
    failed = [row for row in shared.rows() if "images_error" in row]
    assert len(failed) == 1
    shared.serving = {}
    assert shared.run().made == 1


@pytest.mark.parametrize("options", [{"budget_usd": 1.0}, {"pilot": 3}])
def test_what_one_alone_can_count(shared, options):
    shared.fill(prompts(3))
    with pytest.raises(ConfigError, match="share=True goes with neither"):
        shared.run(options=options)


def test_a_pipeline_with_a_filter(tmp_path):
    """A step without a model is done by one of them, and the others go on with its table."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in prompts(60)))
    (tmp_path / "job.toml").write_text(
        """
[storage]
first_entry_file_name = "prompts.jsonl"
cache_path = "cache"
[run]
part_rows = 10
[serving.draw]
type = "fake"
size = [16, 16]
seconds = 0.02
[serving.probe]
type = "image_probe"
[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"
[[step]]
operator = "ImageEvaluator"
serving = "probe"
output_key = "probe"
[[step]]
operator = "ScoreFilter"
input_score_key = "probe.width"
minimum = 1
"""
    )
    command = [sys.executable, "-m", "dataflow", "run", "job.toml", "--share"]
    processes = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(3)]
    for text in ended(processes):
        assert "60 rows = 60 done" in text
    tables = sorted((tmp_path / "cache").glob("*_step3.jsonl"))
    assert len(tables) == 1
    rows = [json.loads(line) for line in tables[0].read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts(60)
    assert len({path for row in rows for path in row["images"]}) == 60


def test_who_is_at_it(shared):
    mine = Driver(shared.cache)
    mine.begin()
    of_another_machine(shared, 0)
    of_another_machine(shared, 1000)
    found = {(each["pid"], each["host"]) for each in sharing.drivers(shared.cache)}
    assert found == {(os.getpid(), socket.gethostname()), (1, "elsewhere")}
    writer = status.writer_of(shared.cache)
    assert writer is not None
    assert writer["others"] == 1
    assert status._running(writer).endswith(" and 1 more")
    mine.end()
