"""Random tables, random faults, random stops: the sum is always right and every image belongs to its row."""

from __future__ import annotations

import contextlib
import random

import pytest

from dataflow.errors import RunStoppedError

pytestmark = pytest.mark.usefixtures("no_waiting")

FAULTS = ("refuse", "rate_limit:0", "error", "crash", "out_of_memory", "garbage", "black")
ALL_REASONS = ("transient", "crash", "out_of_memory", "not_an_image", "black", "fatal")


class Story:
    """One random job: its rows (some of them bad, some twice), and what goes wrong with which prompt."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.rows: list[dict | str] = []
        self.script: dict[str, str | list[str]] = {}
        for number in range(dice.randint(1, 24)):
            self.rows.append(self.row(number))

    def row(self, number: int) -> dict | str:
        dice = self.dice
        if dice.random() < 0.1:
            return dice.choice(["broken {", "[]", {"prompt": None}, {"prompt": "x", "seed": "--5"}, {}])
        # The last letter ends the name, so that no prompt is the beginning of another.
        prompt = f"p{number if dice.random() < 0.8 else dice.randint(0, number)}."
        if dice.random() < 0.3:
            attempts = [dice.choice([*FAULTS, ""]) for _ in range(dice.randint(1, 3))]
            self.script[prompt] = attempts
        row: dict = {"prompt": prompt}
        if dice.random() < 0.2:
            row["seed"] = dice.randint(0, 3)
        if dice.random() < 0.2:
            row |= {"width": dice.choice([8, 16]), "height": 8}
        return row

    def serving(self, job, **more):
        dice = self.dice
        return job.serving(
            batch_size=dice.randint(1, 6),
            concurrency=dice.randint(1, 3),
            images_per_prompt=1,
            fits=dice.choice([None, None, 1, 2, 3]),
            **more,
        )


@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_lost_mixed_up_or_made_twice(seed, job):
    story = Story(random.Random(seed))
    dice = story.dice
    job.rows(*story.rows)
    bad = sum(isinstance(row, str) or not row.get("prompt") or row.get("seed") == "--5" for row in story.rows)
    for _ in range(dice.randint(0, 2)):  # runs that stop somewhere
        fatal = f"p{dice.randint(0, len(story.rows))}."
        try:
            job.run(story.serving(job, script={**story.script, fatal: "fatal"}))
        except RunStoppedError as stopped:
            summary = stopped.summary
            assert summary.balanced
            assert summary.rows == len(story.rows)
            assert summary.images == len(job.image_files())
    if dice.random() < 0.5:
        dice.shuffle(story.rows)
        job.rows(*story.rows)
    summary = job.run(story.serving(job, script=story.script), max_attempts=dice.randint(1, 4))
    assert (summary.rows, summary.pending, summary.dropped) == (len(story.rows), 0, 0)
    assert summary.failed >= bad
    assert summary.done == summary.images == len(job.image_files()) == job.check_images()
    assert sum(summary.reasons.values()) == summary.refused + summary.failed
    table = job.table()
    assert [row["prompt"] for row in table if row.get("prompt") and "images_error" not in row] == [
        row["prompt"]
        for row, outcome in zip([row for row in story.rows if isinstance(row, dict)], table, strict=True)
        if "images_error" not in outcome
    ]
    # With the faults mended, a last run makes exactly what is missing.
    before = set(job.image_files())
    last = job.run(story.serving(job))
    assert last.failed == bad
    assert last.made == len(set(job.image_files()) - before)
    assert last.done + last.refused + last.failed == len(story.rows)
    journalled = [record["k"] for record in job.records("done")]
    assert len(journalled) == len(set(journalled)), "nothing is made again after it was done"
    again = job.run(story.serving(job))
    assert (again.made, again.done, again.refused, again.failed) == (0, last.done, last.refused, last.failed)


@pytest.mark.parametrize("seed", range(5))
def test_stops_faults_and_batches_leave_no_trace_in_the_result(seed, job, tmp_path):
    story = Story(random.Random(1000 + seed))
    smooth = type(job)(tmp_path / "smooth")
    smooth.folder.mkdir()
    job.rows(*story.rows)
    smooth.rows(*story.rows).run(smooth.serving(batch_size=3))
    for fatal in ("p2.", "p5."):
        with contextlib.suppress(RunStoppedError):
            job.run(story.serving(job, script={**story.script, fatal: "fatal"}))
    job.run(job.serving(), retry=frozenset({"refused", *ALL_REASONS}))
    assert pixels(job) == pixels(smooth)


def pixels(job) -> dict[str, bytes]:
    return {name: job.io.read(job.io.save_path / name).tobytes() for name in job.image_files()}
