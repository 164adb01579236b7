"""Steps in order over one storage, and what is found out before anything runs."""

from __future__ import annotations

import sys

import orjson
import pytest

from dataflow.errors import ConfigError, InputError, MissingExtraError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.pipeline import Pipeline, Step, did_you_mean, listed, table_columns
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
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
    with pytest.raises(InputError) as caught:
        draw_and_edit(serving, input_image_key="image").run(storage, QUIET)
    message = str(caught.value)
    assert "in.jsonl, column 'image'" in message
    assert "step 2 (PromptedImageEditGenerator)" in message
    assert "did you mean 'images'?" in message
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
            Step(PromptedImageEditGenerator(Broken()), {"input_conversation_key": "edit"}),
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
    with pytest.raises(ConfigError, match="step 1 would overwrite"):
        pipeline.run(again, QUIET)
    assert first.read_bytes() == before


def test_a_format_without_its_library(tmp_path, storage, serving, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    storage.cache_type = "parquet"
    with pytest.raises(MissingExtraError, match="parquet"):
        draw_and_edit(serving).run(storage, QUIET)
    assert not (tmp_path / "made.log").exists()


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
