"""The step's table: written whole, in order, and only when something changed."""

from __future__ import annotations

import orjson
import pytest

from dataflow.errors import InputError, StepError
from dataflow.io import ImageIO
from dataflow.runtime.table import load_summary

pytestmark = pytest.mark.usefixtures("no_waiting")


def folder(job):
    return job.journal.folder


class TestRewriting:
    @pytest.fixture
    def rewritten(self, job):
        def rewritten(*arguments, **options) -> bool:
            before = job.output.stat().st_ino
            job.run(*arguments, **options)
            return job.output.stat().st_ino != before

        job.prompts("a", "b broken").run(job.serving(script={"broken": "crash"}))
        return rewritten

    def test_a_failure_that_worked_at_last_is_written(self, job, rewritten):
        assert rewritten()
        assert not rewritten()

    def test_another_words_for_the_same_failure_are_written(self, job, rewritten):
        assert rewritten(job.serving(script={"broken": "error"}))

    def test_a_table_of_the_same_rows_with_another_column_is_written(self, job, rewritten):
        rewritten()
        job.rows({"prompt": "a", "id": 1}, {"prompt": "b broken", "id": 2})
        assert rewritten()
        assert [row["id"] for row in job.table()] == [1, 2]

    def test_a_table_that_somebody_edited_is_written_again(self, job, rewritten):
        rewritten()
        job.output.write_text("{}\n")
        assert rewritten()
        assert job.check_images() == 2

    def test_other_paths_to_the_same_images_are_written(self, job, rewritten, monkeypatch):
        rewritten()
        monkeypatch.chdir(job.folder)
        job.io = ImageIO("images")
        assert rewritten()
        assert job.made().total() == 2
        assert job.table()[0]["images"][0].startswith("images/")


class TestSummaryFile:
    def test_the_sum_is_kept_beside_the_journal(self, job):
        summary = job.prompts("a", "b bad").run(job.serving(script={"bad": "refuse"}))
        kept = load_summary(folder(job))
        assert (kept["rows"], kept["done"], kept["refused"], kept["reasons"]) == (2, 1, 1, {"refused": 1})
        assert (kept["operator"], kept["input"]) == ("Text2ImageGenerator", str(job.input))
        assert kept["output"] == summary.output

    def test_time_is_added_up_over_the_runs_of_a_job(self, job):
        first = job.prompts("a").run()
        second = job.prompts("a", "b").run()
        assert load_summary(folder(job))["seconds_in_all"] == pytest.approx(first.seconds + second.seconds)
        job.input = job.folder / "other.jsonl"
        other = job.prompts("c").run()
        assert load_summary(folder(job))["seconds_in_all"] == other.seconds

    def test_a_broken_or_missing_one_means_that_nothing_is_known(self, job):
        assert load_summary(folder(job)) is None
        job.prompts("a").run()
        (folder(job) / "summary.json").write_text("{torn")
        assert load_summary(folder(job)) is None
        assert job.run().done == 1
        assert job.check_images() == 1

    def test_a_stopped_run_keeps_its_sum_too(self, job):
        with pytest.raises(Exception, match="stopped"):
            job.prompts("a").run(job.serving(script={"a": "fatal"}))
        kept = load_summary(folder(job))
        assert (kept["pending"], kept["output"]) == (1, None)


class TestFormats:
    @pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
    def test_tables_of_every_format_are_run(self, job, suffix):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        from dataflow.utils.storage import FileStorage

        job.prompts("a", "b")
        first = FileStorage(str(job.input), cache_path=str(job.folder / "made"), cache_type=suffix).step()
        first.write([{"prompt": "a"}, {"prompt": "b"}])
        job.input = first.output_path
        summary = job.run()
        assert (summary.rows, summary.done) == (2, 2)
        assert job.check_images() == 2

    def test_what_has_no_place_in_json_stops_the_step_and_leaves_the_old_table(self, job):
        job.prompts("a").run()
        old = job.output.read_bytes()
        from dataflow.runtime.engine import RunOptions, execute
        from dataflow.types import Plan

        plan = Plan(
            name="Text2ImageGenerator",
            inputs=(),
            outputs=(),
            requests=lambda row: [],
            fold=lambda row, outcomes: {"odd": object()},
            serving=job.serving(),
        )
        with pytest.raises((InputError, StepError)):
            execute(plan, job.storage(), RunOptions(quiet=True))
        assert job.output.read_bytes() == old
        assert not list(job.cache.glob(".*.tmp"))


def test_the_rows_of_the_table_are_json_lines_of_the_users_own_values(job):
    row = {"prompt": "狐 🦊", "id": "0001", "big": 2**63, "float": 0.1234567890123456, "null": None, "list": [[]]}
    job.rows(row).run()
    (found,) = job.table()
    found.pop("images")
    assert found == row
    assert orjson.loads(job.input.read_bytes()) == row
