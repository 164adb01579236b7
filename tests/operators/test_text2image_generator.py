"""Text to image, from the user's side."""

from __future__ import annotations

import pytest

from dataflow.errors import InputError
from dataflow.operators import Text2ImageGenerator
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import Draft, Outcome


def conversation(*turns: str) -> dict:
    return {"conversations": [{"role": "user", "content": turn} for turn in turns]}


def test_the_names_of_the_specification_work_as_they_are(job):
    job.rows(conversation("a fox"), {"conversations": "a plain string"})
    summary = Text2ImageGenerator(pipe=job.serving()).run(storage=job.storage())
    assert summary.done == 2
    assert [len(row["images"]) for row in job.table()] == [1, 1]


def test_a_plan_is_a_description(job):
    plan = Text2ImageGenerator(FakeServing(images_per_prompt=2), seed=7).plan(
        input_conversation_key="c", output_image_key="pics"
    )
    assert (plan.name, plan.inputs, plan.outputs, plan.seed) == ("Text2ImageGenerator", ("c",), ("pics",), 7)
    assert plan.requests({"c": "a fox", "seed": 3}) == [
        Draft(prompt="a fox", seed=3, sample=0),
        Draft(prompt="a fox", seed=3, sample=1),
    ]
    outcomes = [Outcome(request_id="", status="done", images=(name,)) for name in "ab"]
    assert plan.fold({"c": "a fox"}, outcomes) == {"c": "a fox", "pics": ["a", "b"]}


def test_it_draws_one_prompt_a_row():
    plan = Text2ImageGenerator(FakeServing()).plan()
    with pytest.raises(InputError, match="2 user turns, text to image draws one") as caught:
        plan.requests(conversation("a fox", "and a cat"))
    assert caught.value.field == "conversations"


def test_system_and_assistant_turns_are_never_drawn(job):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": "sure"},
    ]
    job.rows({"conversations": messages})
    Text2ImageGenerator(job.serving()).run(job.storage())
    (row,) = job.table()
    job.check_image(row["images"][0], "a fox")
    assert row["conversations"] == messages


def test_rows_override_the_servings_defaults(job):
    job.rows(
        {"prompt": "a fox"},
        {"prompt": "a fox", "width": 24, "height": 16, "seed": 5, "negative_prompt": "blur", "guidance_scale": 2.5},
    ).run(job.serving(params={"guidance_scale": 1.0}))
    plain, own = (job.io.read_metadata(row["images"][0]) for row in job.table())
    assert (plain["size"], plain["params"]) == ([8, 8], {"guidance_scale": 1.0})
    assert (own["size"], own["seed"], own["negative_prompt"]) == ([24, 16], 5, "blur")
    assert own["params"] == {"guidance_scale": 2.5}
    assert job.io.read(job.table()[1]["images"][0]).size == (24, 16)


def test_the_run_seed_changes_every_image(job):
    job.prompts("a", "b").run(seed=1)
    assert job.run(seed=2).made == 2
    assert job.run(seed=1).made == 0
