"""A fold that gives several rows of one: written in order, counted by input rows, and the same after every stop."""

from __future__ import annotations

import json

import pytest

from dataflow.acceptance import AcceptanceLoop
from dataflow.cli import main
from dataflow.errors import ConfigError, RunStoppedError, StepError
from dataflow.operators import Text2ImageGenerator
from dataflow.operators.core_text import PromptTemplateSampler
from dataflow.pipeline import Step
from dataflow.runtime.engine import RunOptions, execute
from dataflow.runtime.progress import describe
from dataflow.runtime.table import load_summary
from dataflow.types import Draft, Drop, Plan

pytestmark = pytest.mark.usefixtures("no_waiting")

QUIET = RunOptions(quiet=True)


def copies(row, outcomes):
    """As many rows as the prompt has letters, one by one; none is dropped."""
    if outcomes and outcomes[0].status != "done":
        return [{**row, "copy": None}]
    if row["prompt"] == "odd":
        return Drop("odd", {"hint": [1, "x"]})
    return ({**row, "copy": letter} for letter in row["prompt"])


def plan(serving=None, fold=copies, **facts):
    requests = (lambda row: [Draft(prompt=row["prompt"])]) if serving else (lambda _: ())
    facts = {"multiplies": True, **facts}
    return Plan(
        name="Copies", inputs=("prompt",), outputs=("copy",), requests=requests, fold=fold, serving=serving, **facts
    )


def letters(job):
    return [row["copy"] for row in job.table()]


def test_rows_are_written_in_order_and_the_sum_is_of_input_rows(job):
    summary = execute(plan(), job.prompts("abc", "odd", "de", "f").storage(), QUIET)
    assert letters(job) == list("abcdef")
    assert (summary.rows, summary.done, summary.dropped, summary.written) == (4, 3, 1, 6)
    assert summary.balanced
    assert job.dropped() == [{"reason": "odd", "hint": [1, "x"], "row": {"prompt": "odd"}}]
    assert describe(summary).endswith(f"table: {summary.output} (6 rows)")
    assert load_summary(job.journal.folder)["written"] == 6


def test_failures_are_rows_too_and_broken_ones_are_not(job):
    job.rows({"prompt": "ab"}, "{broken", {"prompt": "no"}, {"prompt": "cd"})
    summary = execute(plan(job.serving(script={"no": "refuse"})), job.storage(), QUIET)
    assert letters(job) == ["a", "b", None, "c", "d"]
    assert (summary.done, summary.refused, summary.failed, summary.written) == (2, 1, 1, 5)
    assert summary.balanced


def test_the_sum_of_a_table_that_is_left_as_it_is(job):
    serving = job.serving()
    first = execute(plan(serving), job.prompts("ab", "odd", "c").storage(), QUIET)
    before = job.output.stat().st_ino
    again = execute(plan(serving), job.storage(), QUIET)
    assert job.output.stat().st_ino == before
    assert (again.written, again.dropped, again.made) == (first.written, 1, 0) == (3, 1, 0)


def test_a_sum_of_an_older_version_is_made_anew(job):
    serving = job.serving()
    execute(plan(serving), job.prompts("ab").storage(), QUIET)
    path = job.journal.folder / "summary.json"
    known = json.loads(path.read_text())
    del known["written"]
    path.write_text(json.dumps(known))
    assert execute(plan(serving), job.storage(), QUIET).written == 2


def test_a_run_that_was_stopped_gives_the_same_table(job, tmp_path):
    prompts = ["ab", "cd", "odd", "efg"]
    with pytest.raises(RunStoppedError):
        execute(plan(job.serving(script={"cd": "fatal"})), job.prompts(*prompts).storage(), QUIET)
    assert not job.output.exists()
    summary = execute(plan(job.serving()), job.storage(), QUIET)
    assert letters(job) == list("abcdefg")
    assert (summary.written, max(job.made().values())) == (7, 1)


@pytest.mark.parametrize(
    ("fold", "facts", "told"),
    [
        (lambda row, _: [], {}, "made no row of one: its fold must give a Drop"),
        (lambda row, _: iter(()), {}, "made no row of one"),
        (copies, {"multiplies": False}, "its plan must say multiplies=True"),
    ],
)
def test_none_or_several_unannounced_stop_the_step_and_leave_the_old_table(job, fold, facts, told):
    execute(plan(), job.prompts("ab").storage(), QUIET)
    old = job.output.read_bytes()
    with pytest.raises(StepError, match=told):
        execute(plan(fold=fold, **facts), job.storage(), QUIET)
    assert job.output.read_bytes() == old


def test_one_row_of_a_plan_that_may_give_several(job):
    summary = execute(plan(fold=lambda row, _: {**row, "copy": "x"}), job.prompts("ab", "c").storage(), QUIET)
    assert (letters(job), summary.written) == (["x", "x"], 2)
    assert "rows)" not in describe(summary)


def test_an_acceptance_loop_counts_by_row_and_takes_no_such_step(job):
    sampler = PromptTemplateSampler("{a}", attributes={"a": ["x"]})
    with pytest.raises(ConfigError, match="PromptTemplateSampler makes several rows of one"):
        AcceptanceLoop([Step(sampler), Step(Text2ImageGenerator(job.serving()))], wanted=2)


PIPELINE = """
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "cache"

[serving.draw]
type = "fake"

[[step]]
operator = "dataflow.operators.core_text:PromptTemplateSampler"
template = "a {colour} {animal}"
samples = 3
seed = 1
[step.attributes]
colour = ["red", "green"]
animal = { fox = 3, "snow owl" = 1 }

[[step]]
operator = "dataflow.operators.core_text:PromptDeduplicator"
similarity = 0.9
input_conversation_key = "prompt"

[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"
"""


def test_status_knows_how_many_rows_come_only_when_they_are_written(job, capsys):
    (job.folder / "pipeline.toml").write_text(PIPELINE)
    job.rows({"id": 1}, {"id": 2})
    assert main(["run", str(job.folder / "pipeline.toml")]) == 0
    capsys.readouterr()
    assert main(["status", str(job.cache)]) == 0
    shown = capsys.readouterr().out
    assert "2 rows = 2 done" in shown
    assert "(6 rows)" in shown
    assert "6 rows = 4 done + 0 refused + 0 failed + 2 dropped" in shown
    assert main(["status", str(job.cache), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["rows"], step["written"]) for step in steps] == [(2, 6), (6, 4), (4, 4)]

    for table in job.cache.glob("*_step*.jsonl"):
        table.unlink()
    assert main(["status", str(job.cache), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["rows"], step["pending"]) for step in steps] == [(2, 2), (None, None), (None, None)]
