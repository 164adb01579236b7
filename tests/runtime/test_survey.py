"""The sum that is read instead of made agrees with the one a run gives, and nothing is written."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.survey import survey
from dataflow.types import Summary

FIGURES = {field.name for field in fields(Summary)} - {"made", "adopted", "seconds", "output", "written"}


def look(job, *, edit=False, **options) -> Summary:
    serving = job.serving(**options)
    if edit:
        plan = PromptedImageEditGenerator(serving).plan(
            input_image_key="image", input_conversation_key="prompt", output_image_key="edited"
        )
    else:
        plan = Text2ImageGenerator(serving).plan(input_conversation_key="prompt", output_image_key="images")
    summary = survey(plan, serving, job.storage())
    assert summary.balanced
    return summary


def figures(summary: Summary) -> dict:
    return {name: getattr(summary, name) for name in FIGURES}


def test_nothing_was_run_yet(job):
    job.prompts("a", "b", "c")
    summary = look(job)
    assert (summary.rows, summary.pending, summary.images) == (3, 3, 0)
    assert not job.cache.exists()


@pytest.mark.parametrize("images", [1, 2])
def test_agrees_with_the_run(job, no_waiting, images):
    job.rows({"prompt": "a"}, "{broken", {"prompt": "no"}, {"prompt": "oops"}, {"prompt": " "}, {"prompt": "a"})
    options = {"script": {"no": "refuse", "oops": "crash"}, "images_per_prompt": images}
    ran = job.run(job.serving(**options))
    assert figures(look(job, **options)) == figures(ran)
    assert (ran.done, ran.refused, ran.failed) == (2, 1, 3)


def test_rows_added_since_are_pending(job):
    job.prompts("a", "b")
    job.run()
    job.prompts("new", "b", "a")
    summary = look(job)
    assert (summary.done, summary.pending, summary.images) == (2, 1, 2)


def test_other_settings_are_other_images(job):
    job.prompts("a", "b")
    job.run()
    assert look(job, params={"num_inference_steps": 9}).pending == 2


def test_a_missing_file_is_pending(job):
    job.prompts("a", "b")
    job.run()
    (job.io.save_path / next(iter(job.image_files()))).unlink()
    assert look(job).pending == 1


def test_later_turns_end_like_the_first(job, no_waiting):
    picture = str(job.picture("source.png"))
    turns = [{"role": "user", "content": "oops"}, {"role": "user", "content": "then blue"}]
    job.rows({"prompt": turns, "image": picture})
    assert look(job, edit=True).pending == 1
    ran = job.run(job.serving(script={"oops": "crash"}), edit=True)
    assert figures(look(job, edit=True)) == figures(ran)
