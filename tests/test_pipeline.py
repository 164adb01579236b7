"""Steps in order over one storage, and what is found out before anything runs."""

from __future__ import annotations

import sys

import orjson
import pytest

from dataflow.errors import ConfigError, InputError, MissingExtraError
from dataflow.io import ImageIO
from dataflow.operators import (
    DuplicateFilter,
    ImageEvaluator,
    PromptedImageEditGenerator,
    ScoreFilter,
    Text2ImageGenerator,
)
from dataflow.pipeline import Pipeline, Step, did_you_mean, listed, table_columns
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)


@pytest.fixture
def serving(tmp_path):
    return FakeServing(ImageIO(tmp_path / "images", durable=False), size=(8, 8), log=tmp_path / "made.log")


@pytest.fixture
def storage(tmp_path):
    table = tmp_path / "in.jsonl"
    table.write_bytes(b"".join(orjson.dumps({"prompt": f"thing {n}", "edit": "blue"}) + b"\n" for n in range(3)))
    return FileStorage(str(table), cache_path=str(tmp_path / "cache"))


def draw_and_edit(serving, **keys):
    return Pipeline(
        [
            Step(Text2ImageGenerator(serving), {"input_conversation_key": "prompt"}),
            Step(PromptedImageEditGenerator(serving), {"input_conversation_key": "edit", **keys}),
        ]
    )


def test_each_step_reads_what_the_one_before_wrote(storage, serving):
    first, second = draw_and_edit(serving).run(storage, QUIET)
    assert (first.done, second.done) == (3, 3)
    rows = FileStorage(second.output).step().read("dict")
    assert [len(row["images"]) + len(row["edited_images"]) for row in rows] == [2, 2, 2]


def test_a_second_run_makes_nothing(storage, serving):
    pipeline = draw_and_edit(serving)
    pipeline.run(storage, QUIET)
    assert [summary.made for summary in pipeline.run(storage, QUIET)] == [0, 0]


def test_a_missing_column_is_named_before_anything_runs(storage, serving, tmp_path):
    with pytest.raises(ConfigError) as caught:
        draw_and_edit(serving, input_image_key="image").run(storage, QUIET)
    message = str(caught.value)
    assert "step 2: PromptedImageEditGenerator needs the column 'image'" in message
    assert "in.jsonl has it nor does a step before write it (did you mean 'images'?)" in message
    assert "there are 'prompt', 'edit', 'images'" in message
    assert not (tmp_path / "made.log").exists()


def test_a_table_without_rows_has_no_columns_to_check(storage, serving, tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    assert [summary.rows for summary in draw_and_edit(serving).run(storage, QUIET)] == [0, 0]


def test_every_serving_is_asked_before_anything_runs(storage, serving, tmp_path):
    class Broken(FakeServing):
        def default_params(self):
            raise ConfigError("takes no such parameter")

    pipeline = Pipeline(
        [
            Step(Text2ImageGenerator(serving), {"input_conversation_key": "prompt"}),
            Step(PromptedImageEditGenerator(Broken(serving.image_io)), {"input_conversation_key": "edit"}),
        ]
    )
    with pytest.raises(ConfigError, match="no such parameter"):
        pipeline.run(storage, QUIET)
    assert not (tmp_path / "made.log").exists()


def test_the_table_it_starts_from_is_never_overwritten(storage, serving):
    pipeline = draw_and_edit(serving)
    pipeline.run(storage, QUIET)
    first = storage.reset().step().output_path
    before = first.read_bytes()
    again = FileStorage(str(first), cache_path=storage.cache_path)
    with pytest.raises(ConfigError, match=r"step 1 \(Text2ImageGenerator\) would overwrite"):
        pipeline.run(again, QUIET)
    assert first.read_bytes() == before


def test_a_format_without_its_library(tmp_path, storage, serving, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    storage.cache_type = "parquet"
    with pytest.raises(MissingExtraError, match="parquet"):
        draw_and_edit(serving).run(storage, QUIET)
    assert not (tmp_path / "made.log").exists()


class TestColumns:
    """What a pipeline finds out from the columns alone."""

    def test_are_followed_through_the_steps(self, serving):
        first, second = draw_and_edit(serving).compile(["prompt", "edit"])
        assert (first.number, first.plan.name, first.columns) == (
            1,
            "Text2ImageGenerator",
            ("prompt", "edit", "images"),
        )
        assert (second.number, second.columns) == (2, ("prompt", "edit", "images", "edited_images"))

    def test_a_step_that_comes_too_early(self, serving):
        late = Pipeline(list(reversed(draw_and_edit(serving).steps)))
        with pytest.raises(ConfigError, match=r"step 1: .*'images', and step 2 \(Text2ImageGenerator\) writes it only"):
            late.compile(["prompt", "edit"])

    def test_two_steps_that_wait_for_each_other(self, serving):
        pipeline = Pipeline(
            [
                Step(Text2ImageGenerator(serving), {"input_conversation_key": "caption"}),
                Step(Text2ImageGenerator(serving), {"input_conversation_key": "images", "output_image_key": "caption"}),
            ]
        )
        with pytest.raises(ConfigError, match="itself needs 'images' of this step: a cycle"):
            pipeline.compile(["prompt"])

    def test_pictures_are_not_overwritten(self, serving):
        draw = Step(Text2ImageGenerator(serving), {"input_conversation_key": "prompt"})
        with pytest.raises(ConfigError, match=r"step 2: .*overwrite the column 'images', which step 1 writes"):
            Pipeline([draw, draw]).compile(["prompt"])

    def test_scores_do_not_replace_what_is_scored(self, serving):
        score = Step(ImageEvaluator(ImageProbeServing()), {"output_key": "images"})
        with pytest.raises(ConfigError, match="overwrite the column 'images', which it reads"):
            Pipeline([score]).compile(["images"])

    def test_a_picture_of_the_pipeline(self, serving):
        pipeline = draw_and_edit(serving)
        filtered = Pipeline([*pipeline.steps, Step(ScoreFilter(), {"input_score_key": "edit", "minimum": 1.0})])
        assert filtered.mermaid('a "b" <c>.jsonl').splitlines() == [
            "flowchart TD",
            '    step0[("a #quot;b#quot; #lt;c>.jsonl")]',
            '    step1["1. Text2ImageGenerator"]',
            '    step0 -->|"prompt"| step1',
            '    step2["2. PromptedImageEditGenerator"]',
            '    step1 -->|"images"| step2',
            '    step0 -->|"edit"| step2',
            '    step3{{"3. ScoreFilter"}}',
            '    step1 -->|"images"| step3',
            '    step0 -->|"edit"| step3',
            '    step3 --> result[("dataset")]',
        ]


class TestAPartOfTheSteps:
    """Beginning with a later step, ending with an earlier one."""

    def test_up_to_a_step_and_on_from_it(self, storage, serving, tmp_path):
        pipeline = draw_and_edit(serving)
        assert len(pipeline.run(storage, QUIET, last=1)) == 1
        storage.reset()
        (tmp_path / "in.jsonl").unlink()
        (second,) = pipeline.run(storage, QUIET, first=2)
        assert (second.step, second.done) == ("dataflow_cache_step_step2", 3)

    def test_nothing_to_go_on_from(self, storage, serving):
        with pytest.raises(InputError, match=r"step1.jsonl: step 2 would read this table of step 1, and it is not"):
            draw_and_edit(serving).run(storage, QUIET, first=2)

    def test_columns_of_the_table_it_goes_on_from(self, storage, serving):
        draw_and_edit(serving).run(storage, QUIET, last=1)
        storage.reset()
        with pytest.raises(ConfigError, match=r"needs the column 'picture', and .*step1.jsonl has none"):
            draw_and_edit(serving, input_image_key="picture").run(storage, QUIET, first=2)

    @pytest.mark.parametrize(("first", "last"), [(0, None), (3, None), (2, 1), (1, 3)])
    def test_steps_there_are_not(self, storage, serving, first, last):
        with pytest.raises(ConfigError, match="there are the steps 1 to 2"):
            draw_and_edit(serving).run(storage, QUIET, first=first, last=last)


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        (lambda pictures: ImageEvaluator(pictures), "step 1: ImageEvaluator needs a serving that answers with words"),
        (
            lambda _: Text2ImageGenerator(ImageProbeServing()),
            "Text2ImageGenerator needs a serving that answers with im",
        ),
    ],
)
def test_a_serving_of_the_other_kind(serving, operator, told):
    with pytest.raises(ConfigError, match=told):
        Pipeline([Step(operator(serving), {})]).check_servings()


@pytest.mark.parametrize(
    ("library", "step"),
    [
        ("imagehash", lambda: Step(ImageEvaluator(ImageProbeServing()), {"output_key": "probe"})),
        ("scipy", lambda: Step(DuplicateFilter(), {})),
    ],
)
def test_a_library_that_a_later_step_needs_is_missed_before_anything_is_paid_for(serving, monkeypatch, library, step):
    draw = Step(Text2ImageGenerator(serving), {"input_conversation_key": "prompt"})
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"open-dataflow\[metrics\]"):
        Pipeline([draw, step()]).check_servings()


def test_a_pipeline_needs_a_step():
    with pytest.raises(ConfigError, match="at least one step"):
        Pipeline([])


def test_columns_of_all_first_rows_count_and_broken_ones_do_not(tmp_path):
    table = tmp_path / "in.jsonl"
    table.write_text('{"a": 1}\n{broken\n{"b": 2, "a": 3}\n')
    storage = FileStorage(str(table))
    assert table_columns(storage) == ["a", "b"]
    assert storage.operator_step == -1


def test_words():
    assert did_you_mean("imges", ["images", "prompt"]) == " (did you mean 'images'?)"
    assert did_you_mean("xyz", ["images"]) == ""
    assert listed(["a", "b"]) == "'a', 'b'"
