"""Instruction edits, from the user's side."""

from __future__ import annotations

import pytest

from dataflow.operators import PromptedImageEditGenerator
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import Draft, Outcome


def test_the_names_of_the_specification_work_as_they_are(job):
    source = str(job.picture("a.png"))
    job.rows({"conversations": [{"role": "user", "content": "make it blue"}], "images": [source]})
    summary = PromptedImageEditGenerator(pipe=job.serving()).run(storage=job.storage())
    assert summary.done == 1
    (row,) = job.table()
    job.check_image(row["edited_images"][0], "make it blue", [source])
    assert row["images"] == [source]


def test_a_plan_is_a_description():
    plan = PromptedImageEditGenerator(FakeServing(images_per_prompt=2), seed=7).plan(
        input_image_key="i", input_conversation_key="c", output_image_key="o"
    )
    assert (plan.name, plan.inputs, plan.outputs) == ("PromptedImageEditGenerator", ("i", "c"), ("o",))
    assert plan.seed == 7
    talk = [{"role": "user", "content": text} for text in ("one", "two")]
    assert plan.requests({"c": talk, "i": ["a.png", "b.png"], "guidance_scale": 2}) == [
        Draft(prompt="one", images=("a.png", "b.png"), sample=0, params={"guidance_scale": 2.0}),
        Draft(prompt="two", sample=0, after=0, params={"guidance_scale": 2.0}),
        Draft(prompt="one", images=("a.png", "b.png"), sample=1, params={"guidance_scale": 2.0}),
        Draft(prompt="two", sample=1, after=2, params={"guidance_scale": 2.0}),
    ]
    outcomes = [Outcome(request_id="", status="done", images=(name,)) for name in "abcd"]
    assert plan.fold({}, outcomes) == {"o": ["b", "d"], "o_turns": [["a", "b"], ["c", "d"]]}


def test_several_images_are_references_in_order(job):
    first, second = str(job.picture("a.png")), str(job.picture("b.png", colour="blue"))
    job.rows({"prompt": "join", "image": [first, second]}, {"prompt": "join", "image": [second, first]}).run(edit=True)
    rows = job.table()
    job.check_image(rows[0]["edited"][0], "join", [first, second])
    job.check_image(rows[1]["edited"][0], "join", [second, first])


def test_paths_are_found_beside_the_table_too(job):
    job.picture("a.png", folder="pictures")
    job.rows({"prompt": "x", "image": "pictures/a.png"})
    assert job.run(edit=True).done == 1
    facts = job.io.read_metadata(job.table()[0]["edited"][0])
    assert facts["images"] == [str(job.folder / "pictures/a.png")]


@pytest.mark.parametrize(
    ("image", "reason"), [("missing.png", "image_missing"), ("", "bad_input"), ({"bytes": 1}, "bad_input")]
)
def test_an_image_that_is_not_there_is_its_rows_failure_alone(job, image, reason):
    job.rows({"prompt": "x", "image": image}, {"prompt": "x", "image": str(job.picture("a.png"))})
    summary = job.run(edit=True)
    assert (summary.done, summary.reasons) == (1, {reason: 1})
    assert f"{job.input}, row 1" in job.table()[0]["edited_error"]["message"]
