"""The loop that makes images until enough are good."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dataflow.acceptance import AcceptanceLoop
from dataflow.errors import BudgetSpentError, ConfigError, InputError
from dataflow.io import ImageIO
from dataflow.operators import ImageEvaluator, PromptedImageEditGenerator, ScoreFilter, Text2ImageGenerator
from dataflow.pipeline import Step
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.scoring import ScoringServing
from dataflow.types import GenerationResult
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)


class Luck(ScoringServing):
    """A score that depends on the picture alone, evenly spread over 0 to 1."""

    def __init__(self, log=None):
        self.log = log

    def fingerprint(self):
        return {"model": "luck"}

    def score(self, requests):
        if self.log:
            with Path(self.log).open("a") as file:
                file.writelines(f"{request.image_hashes[0]}\n" for request in requests)
        return [_luck(request.images[0]) for request in requests]


def _luck(path):
    with Image.open(path) as picture:  # not the file's bytes: they tell which batch it was made in
        return int(hashlib.sha256(picture.tobytes()).hexdigest()[:8], 16) / 2**32


class Paid(FakeServing):
    async def generate(self, requests):
        results = await super().generate(requests)
        return [GenerationResult(images=each.images, error=each.error, usage={"usd": 1.0}) for each in results]

    def estimate(self, request):
        return 1.0


class Bench:
    def __init__(self, folder):
        self.folder = folder
        self.made, self.scored = folder / "made", folder / "scored"

    def storage(self, *rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        self.store = FileStorage(str(table), cache_path=str(self.folder / "cache"))
        return self.store

    def prompts(self, number, **columns):
        return self.storage(*({"conversations": f"prompt {n}", **columns} for n in range(number)))

    def loop(self, minimum=0.5, kind=FakeServing, serving=None, **wanted):
        images = ImageIO(save_path=str(self.folder / "cache" / "images"))
        return AcceptanceLoop(
            [
                Step(Text2ImageGenerator(kind(images, log=self.made, batch_size=4, **(serving or {})))),
                Step(ImageEvaluator(Luck(str(self.scored))), {"output_key": "luck"}),
                Step(ScoreFilter(on_unknown="drop"), {"input_score_key": "luck", "minimum": minimum}),
            ],
            **wanted,
        )

    def accepted(self):
        rows = [
            json.loads(line)
            for line in (self.folder / "cache" / "dataflow_cache_step_step3.jsonl").read_text().splitlines()
        ]
        return {row["input_row"]: row for row in rows}

    def short(self):
        return [json.loads(line) for line in (self.folder / "cache" / "short.jsonl").read_text().splitlines()]

    def counts(self):
        return tuple(len(file.read_text().splitlines()) if file.exists() else 0 for file in (self.made, self.scored))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_every_prompt_gets_what_is_wanted_and_nothing_is_made_for_nothing(bench):
    summaries = bench.loop(wanted=3, maximum=40).run(bench.prompts(20), QUIET)
    rows = bench.accepted()
    assert sorted(rows) == list(range(1, 21))
    assert {len(row["images"]) for row in rows.values()} == {3}
    assert all(score >= 0.5 for row in rows.values() for score in row["luck"])
    made, scored = bench.counts()
    asked = sum(row["samples"] for row in rows.values())
    assert made == scored == asked == len(set(bench.made.read_text().split()))
    # the last image of every row is an accepted one: no image was asked for after the third good one
    last = {}
    for line in (bench.folder / "cache" / "dataflow_cache_step_step2.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["input_row"]] = row["luck"][-1]
    assert min(last.values()) >= 0.5
    assert bench.short() == []
    assert summaries[-1].done == 20


def test_running_again_makes_and_scores_nothing(bench):
    loop, store = bench.loop(wanted=2, maximum=40), bench.prompts(10)
    loop.run(store, QUIET)
    before, rows = bench.counts(), bench.accepted()
    loop.run(store, QUIET)
    assert bench.counts() == before
    assert bench.accepted() == rows


def test_another_threshold_uses_all_there_is(bench):
    store = bench.prompts(10)
    bench.loop(minimum=0.8, wanted=1, maximum=60).run(store, QUIET)
    before = bench.counts()
    bench.loop(minimum=0.5, wanted=1, maximum=60).run(store, QUIET)
    assert bench.counts() == before


def test_every_round_says_how_far_it_is(bench, capsys):
    bench.loop(wanted=2, maximum=3).run(bench.prompts(10))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("round ")]
    assert told[0].startswith("round 1: ")
    assert "of 10 prompts have 2 accepted images; " in told[0]
    assert told[-1].endswith("; 0 more to make")
    rows = [{"conversations": "x", "category": "cat"}]
    bench.loop(quotas={"cat": 1}).run(bench.storage(*rows))
    assert "cat 1/1; 0 more to make" in capsys.readouterr().err


def test_rows_that_cannot_get_enough_are_told(bench):
    store = bench.storage({"conversations": "good"}, {"conversations": "refused"}, "{broken", {"conversations": "fine"})
    bench.loop(serving={"script": {"refused": "refuse"}}, wanted=1, maximum=5).run(store, QUIET)
    assert sorted(bench.accepted()) == [1, 4]
    assert bench.short() == [
        {"input_row": 2, "asked": 5, "accepted": 0},
        {"input_row": 3, "asked": 5, "accepted": 0},
    ]


def test_quotas_are_filled_from_the_rows_in_turn(bench):
    rows = [{"conversations": f"prompt {n}", "category": "cat" if n % 3 else "dog"} for n in range(12)]
    bench.loop(quotas={"cat": 5, "dog": 6}, maximum=10).run(bench.storage(*rows), QUIET)
    kept = Counter()
    for row in bench.accepted().values():
        kept[row["category"]] += len(row["images"])
    assert kept == {"cat": 5, "dog": 6}
    assert bench.short() == []
    asked = [
        json.loads(line)["samples"]
        for line in (bench.folder / "cache" / "dataflow_cache_step_step1.jsonl").read_text().splitlines()
    ]
    dogs = asked[0::3]
    assert max(dogs) - min(dogs) <= 1


def test_a_quota_that_cannot_be_filled(bench):
    rows = [{"conversations": f"prompt {n}", "category": 1} for n in range(3)]
    bench.loop(minimum=2.0, quotas={"1": 2}, maximum=2).run(bench.storage(*rows), QUIET)
    assert [each["input_row"] for each in bench.short()] == [1, 2, 3]
    assert bench.counts() == (6, 6)


def test_a_spent_budget_leaves_a_table_and_more_money_goes_on(bench):
    loop, store = bench.loop(kind=Paid, wanted=2, maximum=40), bench.prompts(10)
    whole = bench.loop(kind=Paid, wanted=2, maximum=40)
    with pytest.raises(BudgetSpentError):
        loop.run(store, RunOptions(quiet=True, budget_usd=26.0))
    assert bench.counts()[0] == 24  # a batch of four more would not have fitted
    rows = bench.accepted()
    assert 0 < sum(len(row["images"]) for row in rows.values()) < 20
    whole.run(store, RunOptions(quiet=True, budget_usd=200.0))
    assert {len(row["images"]) for row in bench.accepted().values()} == {2}
    made = bench.made.read_text().split()
    assert len(made) == len(set(made)) == sum(row["samples"] for row in bench.accepted().values())


def test_a_budget_for_less_than_the_first_round(bench):
    with pytest.raises(BudgetSpentError):
        bench.loop(kind=Paid, wanted=2, maximum=40).run(bench.prompts(10), RunOptions(quiet=True, budget_usd=5.0))
    assert bench.counts() == (4, 0)


def test_a_killed_loop_goes_on(bench, tmp_path):
    whole = Bench(tmp_path / "whole")
    whole.folder.mkdir()
    whole.loop(wanted=2, maximum=40).run(whole.prompts(30), QUIET)
    bench.prompts(30)
    program = f"""
        import sys
        sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
        from pathlib import Path
        from test_acceptance import Bench, QUIET
        bench = Bench(Path({str(tmp_path)!r}))
        bench.loop(wanted=2, maximum=40, serving={{"seconds": 0.01}}).run(bench.prompts(30), QUIET)
    """
    lives = 0
    for kill_at in (10, 40, 70, 100, None):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.DEVNULL)
        while child.poll() is None:
            if kill_at is not None and bench.counts()[0] >= kill_at:
                child.send_signal(signal.SIGKILL)
                lives += 1
                break
        child.wait()
    assert child.returncode == 0
    assert lives >= 2
    mine, theirs = bench.accepted(), whole.accepted()
    assert [len(mine[n]["images"]) for n in sorted(mine)] == [2] * 30
    assert [Path(p).name for n in sorted(mine) for p in mine[n]["images"]] == [
        Path(p).name for n in sorted(theirs) for p in theirs[n]["images"]
    ]
    # what was in flight at a kill may have been made twice, nothing else
    assert bench.counts()[0] <= whole.counts()[0] + 4 * 8


def test_edits_too(bench):
    Image.new("RGB", (64, 64), "red").save(bench.folder / "source.png")
    images = ImageIO(save_path=str(bench.folder / "cache" / "images"))

    def turns(number):
        return [{"role": "user", "content": f"first {number}"}, {"role": "user", "content": "then"}]

    loop = AcceptanceLoop(
        [
            Step(PromptedImageEditGenerator(FakeServing(images))),
            Step(ImageEvaluator(Luck()), {"input_image_key": "edited_images", "output_key": "luck"}),
            Step(
                ScoreFilter(on_unknown="drop"),
                {"input_image_key": "edited_images", "input_score_key": "luck", "minimum": 0.5},
            ),
        ],
        wanted=2,
        maximum=40,
        image_key="edited_images",
    )
    loop.run(bench.storage(*({"conversations": turns(n), "images": ["source.png"]} for n in range(4))), QUIET)
    rows = bench.accepted()
    assert [len(row["edited_images"]) for row in rows.values()] == [2] * 4
    assert all(len(row["edited_images_turns"]) == row["samples"] for row in rows.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give wanted"),
        ({"wanted": 1, "quotas": {"a": 1}}, "give wanted"),
        ({"wanted": 0}, "whole numbers from 1"),
        ({"wanted": 9, "maximum": 8}, "no less"),
        ({"quotas": {"a": 0}}, "whole numbers from 1"),
    ],
)
def test_numbers_that_make_no_sense(bench, options, told):
    with pytest.raises(ConfigError, match=told):
        bench.loop(**options)


def test_a_loop_without_a_step_that_makes(bench):
    with pytest.raises(ConfigError, match="no step makes images"):
        AcceptanceLoop([Step(ScoreFilter(), {"input_score_key": "x", "minimum": 1})], wanted=1)


def test_categories_that_are_not_there(bench):
    with pytest.raises(InputError, match="no row is of the category 'bird'; there are cat"):
        bench.loop(quotas={"bird": 1}).run(bench.prompts(2, category="cat"), QUIET)
    with pytest.raises(InputError, match=r"row 1.*category must be text"):
        bench.loop(quotas={"bird": 1}).run(bench.prompts(2, category=None), QUIET)


def test_a_pilot_looks_at_the_first_round(bench):
    summaries = bench.loop(wanted=1, maximum=5).run(bench.prompts(10), RunOptions(quiet=True, pilot=3))
    assert (len(summaries), summaries[0].output, bench.counts()[0]) == (1, None, 3)
