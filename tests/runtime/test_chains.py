"""Multi-turn edits, steps that answer with text, steps that only fold."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pytest

from dataflow.errors import ConfigError, InputError, RunStoppedError, StepError
from dataflow.runtime.engine import RunOptions, execute
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import Draft, Drop, Outcome, Plan

pytestmark = pytest.mark.usefixtures("no_waiting")
QUIET = RunOptions(quiet=True)


def talk(*turns: str) -> list[dict]:
    return [{"role": "user", "content": turn} for turn in turns]


class TestTurns:
    @pytest.fixture
    def source(self, job) -> str:
        return str(job.picture("source.png"))

    def test_each_turn_edits_the_image_of_the_turn_before(self, job, source):
        job.rows({"prompt": talk("one", "two", "three"), "image": source})
        summary = job.run(edit=True)
        assert (summary.rows, summary.done, summary.images) == (1, 1, 3)
        (row,) = job.table()
        ((first, second, third),) = row["edited_turns"]
        assert row["edited"] == [third]
        job.check_image(first, "one", [source])
        job.check_image(second, "two", [first])
        job.check_image(third, "three", [second])

    def test_turns_of_different_rows_share_batches(self, job, source):
        sizes = []

        class Watched(FakeServing):
            async def generate(self, requests):
                sizes.append((len(requests), len({len(request.turns) for request in requests})))
                return await super().generate(requests)

        job.rows(*({"prompt": talk(f"one {i}", f"two {i}"), "image": source} for i in range(4)))
        job.run(Watched(job.io, size=(8, 8), batch_size=4), edit=True)
        assert sizes == [(4, 1), (4, 1)]

    def test_samples_are_chains_of_their_own(self, job, source):
        job.rows({"prompt": talk("one", "two"), "image": source})
        job.run(job.serving(images_per_prompt=2), edit=True)
        (row,) = job.table()
        assert row["edited"] == [turns[-1] for turns in row["edited_turns"]]
        assert len({path for turns in row["edited_turns"] for path in turns}) == 4
        for first, second in row["edited_turns"]:
            job.check_image(second, "two", [first])

    @pytest.mark.parametrize(("fault", "status"), [("refuse", "refused"), ("crash", "failed")])
    def test_a_turn_that_fails_ends_the_turns_after_it(self, job, source, fault, status):
        job.rows(
            {"prompt": talk("one", "bad", "three", "four"), "image": source},
            {"prompt": talk("one", "two"), "image": source},
        )
        summary = job.run(job.serving(batch_size=2, script={"bad": fault}), edit=True)
        assert (summary.done, summary.failed, summary.images) == (1, 1, 3)
        bad, good = job.table()
        assert (len(bad["edited_turns"][0]), len(bad["edited"])) == (1, 0)
        assert len(good["edited"]) == 1
        again = job.run(job.serving(batch_size=2, script={"bad": fault}), edit=True)
        assert (again.done, again.failed, again.made) == (1, 1, 0)
        mended = job.run(edit=True)
        assert (mended.done, mended.made) == ((1, 0) if status == "refused" else (2, 3))

    def test_a_refused_turn_asked_again_brings_the_turns_after_it(self, job, source):
        job.rows({"prompt": talk("bad", "two"), "image": source})
        job.run(job.serving(script={"bad": "refuse"}), edit=True)
        assert job.run(edit=True, retry=frozenset({"refused"})).made == 2

    def test_a_conversation_goes_on_where_it_was_cut(self, job, source):
        job.rows(*({"prompt": talk(f"one {i}", f"two {i}", f"three {i}"), "image": source} for i in range(3)))
        with pytest.raises(RunStoppedError) as stopped:
            job.run(job.serving(script={"two 1": "fatal"}), edit=True)
        assert stopped.value.summary.balanced
        assert 0 < sum(job.made().values()) < 9
        assert job.run(edit=True).done == 3
        assert set(job.made().values()) == {1}
        assert len(job.made()) == 9
        for row in job.table():
            for turns in row["edited_turns"]:
                for number, (parent, path) in enumerate(zip([source, *turns], turns, strict=False)):
                    job.check_image(path, row["prompt"][number]["content"], [parent])

    def test_what_was_said_before_the_cut_is_said_again(self, job, source):
        said = []

        class Watched(FakeServing):
            async def generate(self, requests):
                said.extend(
                    ([turn.prompt for turn in each.turns], [turn.images for turn in each.turns]) for each in requests
                )
                return await super().generate(requests)

        job.rows({"prompt": talk("one", "two", "three"), "image": source})
        with pytest.raises(RunStoppedError):
            job.run(job.serving(script={"three": "fatal"}), edit=True)
        job.run(Watched(job.io, size=(8, 8)), edit=True)
        ((first, _, _),) = job.table()[0]["edited_turns"]
        assert said == [(["one", "two"], [(source,), (first,)])]

    def test_a_middle_image_lost_is_made_again_and_the_last_one_kept(self, job, source):
        job.rows({"prompt": talk("one", "two", "three"), "image": source}).run(edit=True)
        (row,) = job.table()
        middle = row["edited_turns"][0][1]
        before = job.image_files()
        (job.folder / middle).unlink()
        assert job.run(edit=True).made == 1
        assert job.image_files() == before

    def test_a_row_that_cannot_be_used_has_one_error_whatever_it_asked_for(self, job, source):
        job.rows(
            {"prompt": talk("one", "two"), "image": str(job.folder / "missing.png")},
            {"prompt": talk("one", "two"), "image": source},
        )
        summary = job.run(job.serving(images_per_prompt=3), edit=True)
        assert (summary.done, summary.reasons) == (1, {"image_missing": 1})
        bad, good = job.table()
        assert bad["edited"] == []
        assert bad["edited_error"]["status"] == "failed"
        assert len(good["edited"]) == 3

    def test_without_pictures_there_is_no_next_turn(self, job, source):
        """A serving that writes text gives nothing to edit further: an outcome, not a crash, in every run."""
        job.rows({"prompt": talk("one", "two"), "image": source})
        for _ in range(2):
            summary = job.run(FakeServing(None), edit=True)
            assert (summary.done, summary.reasons) == (0, {"previous_turn": 1})


class TestText:
    @staticmethod
    def plan(serving: FakeServing) -> Plan:
        def fold(row, outcomes: Sequence[Outcome]):
            return {**row, "answers": [outcome.text for outcome in outcomes]}

        return Plan(
            name="Describer",
            inputs=("prompt",),
            outputs=("answers",),
            requests=lambda row: [Draft(prompt=row["prompt"])],
            fold=fold,
            serving=serving,
        )

    def test_answers_of_a_serving_that_writes_come_back_after_a_stop(self, job):
        job.prompts("a", "b", "bad", "c")
        with pytest.raises(RunStoppedError):
            execute(self.plan(FakeServing(None, script={"bad": "fatal"})), job.storage(), QUIET)
        summary = execute(self.plan(FakeServing(None, log=job.log)), job.storage(), QUIET)
        assert summary.balanced
        assert (summary.done, summary.images) == (4, 0)
        assert 0 < job.made().total() < 4
        for row in job.table():
            assert row["answers"][0].startswith(f"{row['prompt']} (")


class TestFilters:
    @staticmethod
    def plan(fold, serving=None, name="ShortPrompts") -> Plan:
        requests = (lambda row: [Draft(prompt=row["prompt"])]) if serving else (lambda row: [])
        return Plan(name=name, inputs=("prompt",), outputs=(), requests=requests, fold=fold, serving=serving)

    @staticmethod
    def short(row, outcomes):
        return row if len(row["prompt"]) < 4 else Drop("too_long")

    def test_dropped_rows_go_to_a_file_beside_the_table_with_their_reason(self, job):
        job.rows({"prompt": "a"}, {"prompt": "long one"}, "broken", {"prompt": "b"})
        summary = execute(self.plan(self.short), job.storage(), QUIET)
        assert summary.balanced
        assert (summary.rows, summary.done, summary.dropped, summary.failed, summary.pending) == (4, 2, 1, 1, 0)
        assert summary.reasons == {"too_long": 1, "bad_row": 1}
        assert [row["prompt"] for row in job.table()] == ["a", "b"]
        assert [record["reason"] for record in job.dropped()] == ["too_long", "bad_row"]
        assert job.dropped()[0]["row"] == {"prompt": "long one"}
        assert job.dropped()[1]["raw"] == "broken"

    def test_without_dropped_rows_there_is_no_such_file(self, job):
        execute(self.plan(self.short), job.prompts("a").storage(), QUIET)
        assert not job.storage().dropped_path.exists()

    def test_a_missing_column_is_told_before_any_row(self, job):
        job.rows({"text": "a"})
        with pytest.raises(InputError, match="no such column; the table has 'text'"):
            execute(self.plan(self.short), job.storage(), QUIET)

    def test_a_filter_does_not_overwrite_another_jobs_table(self, job):
        job.prompts("a").run()
        execute(self.plan(self.short), job.storage(), QUIET)
        (kept,) = job.cache.glob("*.before-*.jsonl")
        assert "images" in orjson.loads(kept.read_bytes())

    def test_dropping_rows_that_were_made_refused_or_failed_keeps_the_sum_in_every_run(self, job):
        def fold(row, outcomes):
            return row if outcomes[0].status == "done" and "no" not in row["prompt"] else Drop("unwanted")

        job.prompts("a", "no b", "c refuse", "d crash")
        plan = self.plan(fold, job.serving(script={"refuse": "refuse", "crash": "crash"}))
        for _ in range(2):
            summary = execute(plan, job.storage(), RunOptions(quiet=True, retry=frozenset()))
            assert summary.balanced
            assert (summary.done, summary.refused, summary.failed, summary.dropped) == (1, 0, 0, 3)
            assert summary.pending == 0
            assert summary.reasons == {"unwanted": 3}

    def test_a_fold_that_cannot_use_a_row_names_it(self, job):
        def fold(row, outcomes):
            if row["prompt"] == "b":
                raise InputError("cannot be folded", field="prompt")
            return row

        for serving in (None, job.serving()):
            with pytest.raises(StepError, match=r"in\.jsonl, row 2: column 'prompt': cannot be folded"):
                execute(self.plan(fold, serving), job.prompts("a", "b", "c").storage(), QUIET)
            assert not job.output.exists()


def test_a_step_never_replaces_the_table_it_reads(job):
    job.prompts("a")
    job.run()
    job.input = job.output
    before = job.output.read_bytes()
    made = job.made()
    with pytest.raises(ConfigError, match="would overwrite"):
        job.run(seed=1)
    assert job.output.read_bytes() == before
    assert job.made() == made
