"""SIGKILL while images are packed and unpacked: each can be read at every moment, and is there once in the end."""

import random
import signal

import pytest

from dataflow.packing import pack, unpack
from dataflow.packs import packs_of

KILLED = -signal.SIGKILL
SHARD_BYTES = 2000


def packed(site):
    """Names of all packed images."""
    store = packs_of(site.images)
    return sorted(name for shard in store.shards() for name, _ in store.members(shard)) if store else []


def check(site, wanted):
    """Every row's image is the one its prompt asks for, wherever it is, and nothing is made again."""
    site.check(ended=False)
    assert site.run().made == 0
    assert site.generated().total() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_killed_at_every_single_step_towards_the_disk(site, nursery, task):
    site.fill([f"thing {number}" for number in range(6)])
    site.cache.mkdir()
    site.run()
    rows = site.rows()
    job = site.job(task=task, shard_bytes=SHARD_BYTES)

    def begin():
        unpack(site.cache, images=site.images)
        assert len(site.files()) == len(rows)
        if task == "unpack":
            pack(site.cache, images=site.images, shard_bytes=SHARD_BYTES)

    begin()
    assert nursery.live({**job, "kill_at": 0}) == 0
    steps = int((site.root / "steps").read_text())
    assert steps > 40
    for step in range(1, steps):
        begin()
        assert nursery.live({**job, "kill_at": step}) == KILLED, f"step {step} of {steps} was never reached"
        check(site, 6)
        assert nursery.live(job) == 0
        check(site, 6)
        loose, names = site.files(), packed(site)
        assert (len(loose), len(names), len(set(names))) == ((0, 6, 6) if task == "pack" else (6, 0, 0)), f"step {step}"
        assert not list(site.images.rglob("*.tmp"))
        assert task == "pack" or not (site.images / "packs").exists()


@pytest.mark.slow
def test_killed_at_random_moments_while_many_are_packed_and_unpacked(site, nursery):
    rng = random.Random(5)
    site.serving = {"batch_size": 16, "concurrency": 4}
    site.fill([f"thing {number}" for number in range(400)])
    site.cache.mkdir()
    site.run()
    job = site.job(shard_bytes=8000)
    kills, seconds = 0, 0.15
    for number in range(40):
        task = "pack" if number % 4 < 3 else "unpack"
        was = nursery.live({**job, "task": task}, rng.uniform(0, seconds))
        kills += was == KILLED
        seconds *= 1.1 if was == KILLED else 0.8
        if number % 5 == 0:
            site.check(ended=False)
    assert kills >= 15
    assert nursery.live({**job, "task": "pack"}) == 0
    check(site, 400)
    assert site.files() == {}
    names = packed(site)
    assert len(names) == len(set(names)) == 400
    assert nursery.live({**job, "task": "unpack"}) == 0
    assert len(site.files()) == 400
    assert not (site.images / "packs").exists()
    site.check()
    check(site, 400)
