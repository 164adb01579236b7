"""A pilot: some rows are made, and the rest is foretold."""

import json

import pytest

from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.pipeline import Pipeline, Step
from dataflow.runtime.engine import RunOptions
from dataflow.runtime.forecast import describe_forecast, forecast, sample_rows
from dataflow.runtime.table import journal_folder, load_summary
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import Summary

pytestmark = pytest.mark.usefixtures("no_waiting")


class Priced(FakeServing):
    """Every image costs 4 cents."""

    async def generate(self, requests):
        results = await super().generate(requests)
        for result in results:
            object.__setattr__(result, "usage", {"usd": 0.04})
        return results


class TestSample:
    def test_a_larger_sample_holds_every_smaller_one(self):
        smaller, larger = sample_rows(1000, 20, 7), sample_rows(1000, 60, 7)
        assert (len(smaller), len(larger)) == (20, 60)
        assert smaller < larger <= set(range(1000))

    def test_it_is_spread_over_the_table(self):
        chosen = sample_rows(10_000, 400, 0)
        assert all(60 <= sum(low <= row < low + 2500 for row in chosen) <= 140 for low in range(0, 10_000, 2500))

    def test_a_small_table_is_taken_whole(self):
        assert sample_rows(3, 20, 0) == {0, 1, 2}


class TestPilot:
    def test_only_the_sample_is_made_and_the_run_after_it_makes_the_rest(self, job):
        job.prompts(*(f"thing {number}" for number in range(50)))
        serving = Priced(job.io, size=(8, 8))
        summary = job.run(serving, pilot=10)
        assert (summary.rows, summary.done, summary.pending, summary.made) == (50, 10, 40, 10)
        assert summary.output is None
        assert not job.output.exists()
        assert summary.forecast.usd == pytest.approx((1.6, 1.6, 1.6))
        assert summary.forecast.bytes == pytest.approx(40 * summary.bytes / 10)
        again = job.run(serving, pilot=10)
        assert (again.made, again.forecast.rows) == (0, 40)
        whole = job.run(serving)
        assert (whole.done, whole.made, whole.forecast) == (50, 40, None)
        assert whole.usd == pytest.approx(50 * 0.04)
        assert job.check_images() == 50

    def test_refusals_and_failures_are_foretold_with_their_uncertainty(self, job):
        job.prompts(*(f"thing {number} {'refuse' if number % 2 else ''}" for number in range(200)))
        found = job.run(job.serving(script={"refuse": "refuse"}), pilot=40).forecast
        low, likely, high = found.refused
        assert low < 0.5 < high
        assert 0.25 < likely < 0.75
        assert 0.2 < high - low < 0.4
        assert found.failed[1] == 0.0
        assert found.failed[2] == pytest.approx(0.0876, abs=0.001)  # Wilson's interval of 0 in 40

    def test_rows_that_were_done_before_count(self, job):
        job.prompts(*(f"thing {number}" for number in range(10)))
        job.run()
        job.prompts(*(f"thing {number}" for number in range(40)))
        summary = job.run(pilot=8)
        assert summary.done >= 10
        assert summary.done + summary.pending == 40
        assert summary.forecast.settled == summary.done

    def test_a_pilot_of_everything_is_the_run(self, job):
        summary = job.prompts("a", "b").run(pilot=20)
        assert (summary.done, summary.pending, summary.forecast) == (2, 0, None)
        assert job.output.exists()

    def test_the_old_table_stays(self, job):
        job.prompts("a", "b").run()
        before = job.output.read_bytes()
        job.prompts("a", "b", *(f"thing {number}" for number in range(30))).run(pilot=3)
        assert job.output.read_bytes() == before

    def test_the_forecast_is_told_and_kept(self, job, capsys):
        job.prompts(*(f"thing {number}" for number in range(30)))
        operator = Text2ImageGenerator(Priced(job.io, size=(8, 8)), options=RunOptions(pilot=5))
        operator.run(job.storage(), "prompt")
        said = capsys.readouterr().err
        assert "forecast for the 25 pending rows, from 5 settled ones:" in said
        assert "cost     $1.00 (95 %: $1.00 to $1.00)" in said
        kept = load_summary(journal_folder(job.storage()))
        assert kept["forecast"]["rows"] == 25


def test_a_pipeline_pilots_its_first_unfinished_step(job):
    job.prompts(*(f"thing {number}" for number in range(20)))
    pipeline = Pipeline(
        [
            Step(Text2ImageGenerator(job.serving()), {"input_conversation_key": "prompt"}),
            Step(PromptedImageEditGenerator(job.serving()), {"input_conversation_key": "prompt"}),
        ]
    )
    options = RunOptions(pilot=4, quiet=True)
    storage = job.storage().reset()
    assert [summary.done for summary in pipeline.run(storage, options)] == [4]
    storage.reset()
    pipeline.run(storage, RunOptions(quiet=True))
    storage.reset()
    assert [summary.pending for summary in pipeline.run(storage, options)] == [0, 0]


def test_nothing_is_foretold_from_nothing(job):
    assert forecast([], Summary(rows=5, pending=5), job.serving()) is None


def test_an_unknown_price_is_said_to_be_unknown(job):
    records = [{"s": "done", "k": "a", "img": [{"bytes": 10}], "ms": 500, "usage": {"usd": None}}]
    found = forecast(records, Summary(rows=5, done=1, pending=4), job.serving(concurrency=2))
    assert found.usd is None
    assert found.seconds == pytest.approx(4 * 0.5 / 2)
    assert "unknown price" in describe_forecast(found)
    assert json.dumps(found.bytes) == "40.0"
