"""SIGKILL at any moment: every row still gets its own image, and at most what was in flight is made twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

LIFE = str(Path(__file__).with_name("life.py"))
KILLED = -signal.SIGKILL


def prompts(count):
    """Every tenth prompt was there before, word for word."""
    return [f"a picture of thing {number if number % 10 else number // 20}" for number in range(count)]


def extra(site, wanted):
    made = site.generated()
    assert len(made) == wanted, "requests that were never made"
    return made.total() - wanted


@pytest.mark.slow
def test_a_run_of_500_rows_killed_at_100_random_moments(site, nursery):
    rng = random.Random(20)
    batch_size, concurrency = 2, 2
    site.serving = {"batch_size": batch_size, "concurrency": concurrency, "seconds": 0.025}
    site.fill(prompts(500))
    site.cache.mkdir()
    # 20 lives begin with the interpreter: their kills fall into imports, locks, planning and the first batches.
    for _ in range(20):
        process = subprocess.Popen([sys.executable, LIFE, json.dumps(site.job())], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        assert process.wait() == KILLED
    # 70 lives die while they generate, encode, write images and records; they are made as long as it takes, on this
    # machine, to spread them over the whole table.
    longest = 0.1
    for number in range(70):
        made = len(site.generated())
        longest *= 1.1 if made < 6.5 * number else 0.9
        # At most 160 images a second: no life can make all that is left.
        moment = rng.uniform(0, min(longest, (500 - made) / 300))
        assert nursery.live(site.job(), moment) == KILLED, "this life ended before its kill"
    under_fire = len(site.generated())
    assert nursery.live(site.job()) == 0
    # 10 lives have nothing left to make: they die while they read the journal, fold and write the table.
    kills = 90
    while kills < 100:
        site.output.unlink(missing_ok=True)
        kills += nursery.live(site.job(), rng.uniform(0, 0.03)) == KILLED
    summary = site.run()
    assert (summary.rows, summary.done, summary.pending) == (500, 500, 0)
    site.check()
    again = extra(site, 500)
    bound = 90 * (concurrency + 1) * batch_size
    print(f"\n{under_fire} of 500 images made in 90 killed lives; {again} generations beyond 500, bound {bound}")
    assert again <= bound
    assert site.run().made == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["draw", "edit", "draw in parts"])
def test_killed_at_every_single_step_towards_the_disk(make_site, nursery, tmp_path, task):
    """Before and after every write, fsync, rename, unlink and mkdir, and in the middle of every journal write."""
    rng = random.Random(21)
    options = {}
    if task == "draw":
        serving = {"images_per_prompt": 2, "batch_size": 2, "concurrency": 2}
        rows, images, per_row = ["a fox", "a fox", "a kite"], 6, 2
    elif task == "draw in parts":
        serving, rows, images, per_row = {"concurrency": 2}, ["a fox", "a fox", "a kite"], 3, 1
        options = {"part_rows": 1}
    else:
        source = tmp_path / "source.png"
        Image.new("RGB", (32, 32), "teal").save(source)
        turns = [{"role": "user", "content": text} for text in ("make it red", "now blue")]
        rows = [{"conversations": turns[:count], "images": [str(source)]} for count in (2, 1, 2)]
        serving, images, per_row = {"batch_size": 2}, 5, 1

    def fresh(name):
        return make_site(tmp_path / name, serving, task.split()[0], options=options).fill(rows)

    whole = fresh("whole")
    assert nursery.live(whole.job(kill_at=0)) == 0
    steps = int((whole.root / "steps").read_text())
    assert steps > 100
    worst = 0
    for step in range(1, steps):
        site = fresh(f"at{step}")
        kills = nursery.live(site.job(kill_at=step)) == KILLED
        if rng.random() < 0.3:
            kills += nursery.live(site.job(kill_at=rng.randint(1, steps // 2))) == KILLED
        summary = site.run()
        assert (summary.done, summary.pending) == (3, 0), f"killed at step {step}"
        site.check(per_row=per_row)
        again = extra(site, images)
        assert again <= kills * (site.serving.get("concurrency", 1) + 1) * 2
        worst = max(worst, again)
        assert not list(site.root.rglob("*.tmp")), f"killed at step {step}"
    print(f"\n{task}: {steps - 1} places to die, at most {worst} generations beyond {images}")


def test_a_row_that_kills_its_process_fails_alone(site, nursery):
    """Its neighbours, in its batch and beside it, get their images; it is tried again when asked to."""
    site.serving = {"batch_size": 4, "concurrency": 3, "script": {"deadly": "kill"}, "seconds": 0.005}
    site.fill([f"{'deadly' if number == 5 else 'harmless'} {number}" for number in range(20)])
    site.cache.mkdir()
    lives = 1
    while nursery.live(site.job()) == KILLED:
        lives += 1
        assert lives < 20, "the run never gets past this row"
    failed = [row for row in site.rows() if "images_error" in row]
    assert [row["conversations"] for row in failed] == ["deadly 5"]
    assert failed[0]["images_error"]["reason"] == "killed_worker"
    assert "died" in failed[0]["images_error"]["message"]
    before = site.files()
    assert len(before) == 19
    summary = site.run(script={})
    assert (summary.done, summary.made) == (20, 1)
    site.check()
    assert before.items() <= site.files().items()


def test_killed_drivers_are_not_blamed_on_a_row_that_only_waited(site, nursery):
    """A slow service answers "too many requests" for a while: attempts within one life are not deaths."""
    site.serving = {"script": {"busy": ["rate_limit"] * 8}}
    site.fill(["busy", "free"])
    for _ in range(4):
        nursery.live(site.job(), kill_after=0.05)
    summary = site.run(script={})
    assert (summary.done, summary.failed) == (2, 0)
    site.check()


@pytest.mark.slow
def test_a_driver_with_worker_processes_killed_at_random_moments(site, nursery):
    rng = random.Random(22)
    batch_size, concurrency, processes, kills = 2, 1, 2, 10
    site.serving = {"batch_size": batch_size, "concurrency": concurrency, "processes": processes, "seconds": 0.16}
    site.fill(prompts(180))
    site.cache.mkdir()
    workers = set()
    for _ in range(kills):
        pid = nursery.start(site.job())
        time.sleep(rng.uniform(0.1, 1.0))
        workers |= children(pid)
        os.kill(pid, signal.SIGKILL)
        assert nursery.end() == KILLED
    assert nursery.live(site.job()) == 0
    site.check()
    again = extra(site, 180)
    lanes = processes * (concurrency + 1)
    print(f"\n{again} generations beyond 180 in {kills} kills")
    assert again <= kills * lanes * batch_size
    wait_until(lambda: not any(is_alive(pid) for pid in workers), "orphaned worker processes")
    assert not list(site.root.rglob("*.tmp"))


@pytest.mark.slow
def test_worker_processes_killed_at_random_moments(site, nursery):
    rng = random.Random(23)
    batch_size, processes, kills = 2, 2, 0
    site.serving = {"batch_size": batch_size, "processes": processes, "seconds": 0.08}
    site.fill(prompts(220))
    site.cache.mkdir()
    pid = nursery.start(site.job())
    # One that dies while it loads for the first time ends the run: it is taken for a serving that does not work.
    wait_until(lambda: len(site.generated()) > 8, "the first batches", seconds=60)
    for _ in range(8):
        time.sleep(rng.uniform(0.2, 0.6))
        if found := sorted(children(pid)):
            os.kill(rng.choice(found), signal.SIGKILL)
            kills += 1
    assert nursery.end() == 0
    assert kills >= 4, "the run was over too soon"
    summary = site.run(processes=1)  # a request whose worker was killed three times has failed and is tried again
    assert summary.done == 220
    site.check()
    again = extra(site, 220)
    print(f"\n{again} generations beyond 220 in {kills} kills of a worker, {summary.made} left to the second run")
    assert again <= kills * 2 * batch_size


def children(pid):
    """Pids of the processes that ``pid`` started and that still run."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= {int(child) for child in task.read_text().split()}
        except OSError:
            continue
    return {child for child in found if is_alive(child)}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, what, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_with_the_real_pipeline_killed_at_random_moments(site, make_nursery, model):
    """One image has to be what one undisturbed run makes of it, whatever was killed before."""
    rng = random.Random(24)
    texts = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "dot")]
    site.fill([texts[number % 8] for number in range(24)]).cache.mkdir()
    nursery = make_nursery("dataflow.serving.local_image_gen_serving", "diffusers", env={"OMP_NUM_THREADS": "1"})
    settings = {"hf_model_name_or_path": model, "batch_size": 2, "determinism": "strict"}

    def job(site):
        return {**site.job(), "kind": "local", "log": str(site.log), "serving": settings}

    for _ in range(6):
        nursery.start(job(site))
        before, end = len(site.generated()), time.monotonic() + 60
        if rng.random() < 0.8:  # else it dies while it loads
            while len(site.generated()) == before:
                assert time.monotonic() < end, nursery.errors.read_text()
                time.sleep(0.005)
        assert nursery.end(kill_after=rng.uniform(0, 0.1)) == KILLED, "this life ended before its kill"
    assert nursery.live(job(site)) == 0
    again = extra(site, 24)
    print(f"\n{again} generations beyond 24 in 6 kills")
    assert again <= 6 * 2 * 2
    reference = type(site)(site.root / "undisturbed").fill([row["conversations"] for row in site.rows()])
    reference.cache.mkdir()
    assert nursery.live(job(reference)) == 0
    names = [Path(row["images"][0]).name for row in site.rows()]
    assert names == [Path(row["images"][0]).name for row in reference.rows()]
    assert len(set(names)) == 24
    for row, undisturbed in zip(site.rows(), reference.rows(), strict=True):
        first, second = Image.open(row["images"][0]), Image.open(undisturbed["images"][0])
        assert first.tobytes() == second.tobytes()
        assert json.loads(first.text["dataflow"])["prompt"] == row["conversations"]
