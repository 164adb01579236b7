"""Long tables, run part by part: the same answers as in one piece, and what is finished is not looked at again."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.errors import BudgetSpentError, RunInterruptedError, RunStoppedError, StepError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime import crew
from dataflow.runtime.engine import RunOptions, execute
from dataflow.runtime.parts import Origins
from dataflow.runtime.survey import Prospect, survey
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import BadRow, Draft, Drop, Outcome, Plan
from dataflow.utils.storage import FileStorage
from dataflow.utils.tables import cut_lines, read_lines, read_table

PROMPTS = ["a", "b", "a", "c", "d", "a", "e", "b", "f", "g"]
PARTS = {"part_rows": 3}


def parts_of(job) -> list[Path]:
    return sorted(job.journal.folder.glob("part-*"))


def sums(summary) -> dict:
    kept = ("rows", "done", "refused", "failed", "dropped", "pending", "images", "bytes", "usd", "written", "reasons")
    return {name: getattr(summary, name) for name in kept}


class TestPieces:
    @given(
        lines=st.lists(st.sampled_from([b'{"a":1}', b"", b"  ", b"{broken", b'{"b":"\xc3\xa4"}', b"[1]"]), max_size=30),
        size=st.integers(1, 8),
        last=st.booleans(),
    )
    def test_together_they_are_the_table(self, tmp_path_factory, lines, size, last):
        path = tmp_path_factory.mktemp("table") / "in.jsonl"
        path.write_bytes(b"\n".join(lines) + (b"\n" if last and lines else b""))
        whole = list(read_table(path, "jsonl"))
        pieces = cut_lines(path, size)
        found = [list(read_lines(path, piece)) for piece in pieces]
        assert [row for rows in found for row in rows] == whole
        assert [len(rows) for rows in found] == [piece.rows for piece in pieces]
        assert [piece.first_row for piece in pieces] == [sum(map(len, found[:n])) for n in range(len(pieces))]
        assert all(piece.first_line == number * size for number, piece in enumerate(pieces))

    def test_lines_longer_than_what_is_read_at_once(self, tmp_path):
        path = tmp_path / "in.jsonl"
        rows = [{"text": str(number) * 300_000} for number in range(10)]
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        pieces = cut_lines(path, 3)
        assert [row for piece in pieces for row in read_lines(path, piece)] == rows
        assert len({piece.digest for piece in pieces}) == 4


class TestTheSame:
    """As in one piece."""

    def both(self, tmp_path, job, *rows, edit=False, **serving):
        other = type(job)(tmp_path / "other")
        other.folder.mkdir()
        for each, options in ((job, PARTS), (other, {})):
            each.rows(*rows)
            each.summary = each.run(each.serving(**serving), edit=edit, max_failed_fraction=1, **options)
        assert len(parts_of(job)) > 1
        assert not parts_of(other)
        assert sums(job.summary) == sums(other.summary)
        assert [Path(name).name for name in job.image_files()] == [Path(name).name for name in other.image_files()]
        assert job.image_files().keys() == other.image_files().keys()
        theirs = other.output.read_bytes().replace(str(other.folder).encode(), str(job.folder).encode())
        assert job.output.read_bytes() == theirs
        return other

    def test_repeated_prompts_in_different_parts_are_different_pictures(self, tmp_path, job):
        self.both(tmp_path, job, *({"prompt": prompt} for prompt in PROMPTS))
        assert job.check_images() == len(PROMPTS)
        paths = [path for row in job.table() for path in row["images"]]
        assert len(set(paths)) == len(PROMPTS)

    def test_samples_batches_failures_refusals_and_bad_rows(self, tmp_path, job, caplog):
        script = {"b": "refuse", "d": "garbage"}
        rows = [*({"prompt": prompt} for prompt in PROMPTS), "{broken", "", *({"prompt": p} for p in PROMPTS)]
        self.both(tmp_path, job, *rows, script=script, images_per_prompt=2, batch_size=4)
        assert "row 11" in caplog.text
        assert {record["reason"] for record in job.dropped()} == {"bad_row"}

    def test_edits(self, tmp_path, job):
        pictures = [str(job.picture(f"{name}.png", colour=name)) for name in ("red", "blue", "red")]
        self.both(tmp_path, job, *({"prompt": "x", "image": picture} for picture in pictures * 4), edit=True)

    def test_what_a_fold_drops_is_in_one_sidecar(self, job):
        def fold(row, outcomes: Sequence[Outcome]):
            return Drop("short") if len(row["prompt"]) < 2 else {**row, "text": outcomes[0].text}

        job.prompts("a", "bb", "c", "dd", "ee", "f", "gg")
        plan = Plan(
            name="Describer",
            inputs=("prompt",),
            outputs=("text",),
            requests=lambda row: [Draft(prompt=row["prompt"])],
            fold=fold,
            serving=FakeServing(None),
        )
        summary = execute(plan, job.storage(), RunOptions(quiet=True, part_rows=2))
        assert (summary.done, summary.dropped, summary.written) == (4, 3, 4)
        assert [record["row"]["prompt"] for record in job.dropped()] == ["a", "c", "f"]
        assert [row["prompt"] for row in job.table()] == ["bb", "dd", "ee", "gg"]

    @pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
    def test_other_formats_of_the_steps(self, job, kind):
        job.prompts(*PROMPTS)
        storage = FileStorage(str(job.input), cache_path=str(job.cache), cache_type=kind)
        drawer = Text2ImageGenerator(job.serving(), options=RunOptions(quiet=True, **PARTS))
        drawer.run(storage.step(), "prompt", "images")
        assert [row["prompt"] for row in storage.step().iter_rows()] == PROMPTS

    def test_a_table_of_another_format_is_run_in_one_piece(self, job):
        job.input = job.folder / "in.csv"
        job.input.write_text("prompt\n" + "\n".join(PROMPTS) + "\n")
        assert job.run(**PARTS).done == len(PROMPTS)
        assert not parts_of(job)


class TestGoingOn:
    def test_nothing_is_left_to_do(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        before = job.output.stat()
        summary = job.run(**PARTS)
        assert (summary.made, summary.done, summary.images) == (0, 10, 10)
        assert job.output.stat().st_mtime_ns == before.st_mtime_ns
        assert set(job.made().values()) == {1}

    def test_the_journals_of_finished_parts_are_not_read(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        for part in parts_of(job):
            shutil.move(part / "main.jsonl", part / "hidden")
        assert job.run(**PARTS).made == 0
        with job.input.open("a") as file:
            file.write('{"prompt": "h"}\n{"prompt": "a"}\n')
        last = parts_of(job)[-1]
        shutil.move(last / "hidden", last / "main.jsonl")
        assert job.run(**PARTS).made == 2
        assert job.check_images() == 12
        assert set(job.made().values()) == {1}

    def test_a_stop_in_the_middle(self, job):
        job.prompts(*PROMPTS)
        with pytest.raises(RunStoppedError) as stopped:
            job.run(job.serving(script={"d": "fatal"}), **PARTS)
        found = stopped.value.summary
        assert found.balanced
        assert (found.rows, found.done, found.pending) == (10, found.images, 10 - found.done)
        assert 3 <= found.done < 7
        assert not job.output.exists()
        assert job.run(**PARTS).done == 10
        assert set(job.made().values()) == {1}
        assert job.check_images() == 10

    def test_what_failed_is_tried_again(self, job):
        job.prompts(*PROMPTS).run(job.serving(script={"d": "garbage"}), **PARTS)
        again = job.run(**PARTS)
        assert (again.made, again.done) == (1, 10)
        assert job.run(**PARTS).made == 0

    def test_refusals_are_tried_again_when_it_is_said(self, job):
        first = job.prompts(*PROMPTS).run(job.serving(script={"d": "refuse"}), **PARTS)
        assert first.refused == 1
        assert job.run(**PARTS).made == 0
        assert job.run(retry=frozenset({"refused"}), **PARTS).made == 1

    def test_another_seed_makes_other_pictures(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        assert job.run(seed=1, **PARTS).made == 10
        assert job.check_images() == 10

    def test_other_settings_of_the_operator_are_noticed_by_what_the_rows_ask_for(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        assert job.run(job.serving(images_per_prompt=2), **PARTS).made == 10
        assert job.check_images() == 20

    def test_images_that_were_deleted_are_made_again(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        shutil.rmtree(job.io.save_path)
        assert job.run(**PARTS).made == 10
        assert job.check_images() == 10

    def test_a_part_whose_table_was_touched_is_folded_again(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        table = parts_of(job)[1] / "table"
        table.write_bytes(b"")
        expected = job.output.read_bytes()
        assert job.run(**PARTS).made == 0
        assert job.output.read_bytes() == expected

    def test_ctrl_c_ends_the_step_and_not_the_part_alone(self, job, monkeypatch):
        job.prompts(*PROMPTS)
        wait = crew._wait
        waits = []

        def interrupted(ending, seconds=None) -> None:
            waits.append(ending)
            wait(ending, seconds)
            if len(waits) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(crew, "_wait", interrupted)
        with pytest.raises(RunInterruptedError) as stopped:
            job.run(**PARTS)
        assert stopped.value.summary.balanced
        assert stopped.value.summary.done == 6
        monkeypatch.undo()
        assert job.run(**PARTS).made == 4


class TestChangedTables:
    """Rows move between parts; no image is made twice or shared."""

    def check(self, job, made: int, images: int) -> None:
        summary = job.run(**PARTS)
        assert summary.made == made
        assert set(job.made().values()) == {1}
        assert job.check_images() == images
        paths = [path for row in job.table() for path in row["images"]]
        assert len(set(paths)) == images
        assert job.run(**PARTS).made == 0

    def test_rows_at_the_end(self, job, caplog):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts(*PROMPTS, "a", "z")
        self.check(job, 2, 12)
        assert "put in or taken out" not in caplog.text

    def test_a_row_at_the_top(self, job, caplog):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts("new", *PROMPTS)
        self.check(job, 1, 11)
        assert "put in or taken out" in caplog.text
        caplog.clear()
        job.prompts("newer", "new", *PROMPTS)
        self.check(job, 1, 12)

    def test_rows_taken_out(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts(*PROMPTS[4:])
        self.check(job, 0, 6)

    def test_another_order(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts(*reversed(PROMPTS))
        self.check(job, 0, 10)

    def test_a_short_table_grows_long(self, job):
        job.prompts("a", "b").run(**PARTS)
        assert not parts_of(job)
        job.prompts("a", "b", *PROMPTS)
        self.check(job, 10, 12)

    def test_a_long_table_grows_short(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts("c", "a")
        self.check(job, 0, 2)

    @pytest.mark.parametrize("rows", [2, 4, 100])
    def test_parts_of_another_size(self, job, rows):
        job.prompts(*PROMPTS).run(**PARTS)
        summary = job.run(part_rows=rows)
        assert (summary.made, summary.done) == (0, 10)
        assert job.check_images() == 10

    def test_answers_in_words_are_not_paid_for_again(self, job):
        """Nothing lies on disk from which they could be adopted."""
        plan = Plan(
            name="Describer",
            inputs=("prompt",),
            outputs=("text",),
            requests=lambda row: [Draft(prompt=row["prompt"])],
            fold=lambda row, outcomes: {**row, "text": outcomes[0].text},
            serving=FakeServing(None, log=job.log),
        )
        options = RunOptions(quiet=True, **PARTS)
        execute(plan, job.prompts(*PROMPTS).storage(), options)
        for prompts in (PROMPTS[::-1], ["x", *PROMPTS], PROMPTS[5:] + PROMPTS[:5]):
            execute(plan, job.prompts(*prompts).storage(), options)
            assert [row["text"].partition(" (")[0] for row in job.table()] == prompts
        assert set(job.made().values()) == {1}

    def test_while_it_runs(self, job):
        job.prompts(*PROMPTS)

        class Meddling(FakeServing):
            async def generate(serving, requests):  # noqa: N805
                if requests[0].prompt == "f":
                    job.prompts("x", *PROMPTS)
                return await super().generate(requests)

        with pytest.raises(StepError, match="changed while"):
            job.run(Meddling(job.io, size=(8, 8), log=job.log), **PARTS)
        assert not job.output.exists()
        self.check(job, 2, 11)


class Paid(FakeServing):
    """A service that bills every call."""

    def estimate(self, request):
        return 0.01

    async def generate(self, requests):
        return [replace(result, usage={"usd": 0.01}) for result in await super().generate(requests)]


class TestMoney:
    def priced(self, job):
        return Paid(job.io, size=(8, 8), log=job.log)

    def test_a_budget_holds_for_all_parts_and_runs(self, job):
        job.prompts(*PROMPTS)
        with pytest.raises(BudgetSpentError) as stopped:
            job.run(self.priced(job), budget_usd=0.05, **PARTS)
        assert stopped.value.summary.usd == pytest.approx(0.05)
        assert stopped.value.summary.done == 5
        with pytest.raises(BudgetSpentError):
            job.run(self.priced(job), budget_usd=0.05, **PARTS)
        summary = job.run(self.priced(job), budget_usd=0.1, **PARTS)
        assert summary.usd == pytest.approx(0.1)
        assert summary.done == 10

    def test_moved_rows_are_not_counted_twice(self, job):
        job.prompts(*PROMPTS).run(self.priced(job), **PARTS)
        job.prompts("x", *PROMPTS)
        assert job.run(self.priced(job), **PARTS).usd == pytest.approx(0.11)
        assert job.run(self.priced(job), **PARTS).usd == pytest.approx(0.11)

    def test_a_pilot_draws_from_all_parts(self, job):
        job.prompts(*(f"p{number}" for number in range(30)))
        summary = job.run(self.priced(job), pilot=6, **PARTS)
        assert (summary.rows, summary.done, summary.pending) == (30, 6, 24)
        assert summary.forecast is not None
        assert summary.forecast.rows == 24
        assert not job.output.exists()
        assert job.run(self.priced(job), **PARTS).made == 24


class TestSurvey:
    def check(self, job, expected) -> Prospect:
        prospect = Prospect()
        plan = Text2ImageGenerator(job.serving()).plan(input_conversation_key="prompt", output_image_key="images")
        assert plan.serving is not None
        found = survey(plan, plan.serving, job.storage(), prospect)
        assert sums(found) | {"written": 0, "reasons": 0} == sums(expected) | {"written": 0, "reasons": 0}
        return prospect

    def test_after_a_run(self, job):
        prospect = self.check(job, job.prompts(*PROMPTS).run(**PARTS))
        assert (prospect.requests, prospect.requests_pending) == (10, 0)

    def test_after_a_stop(self, job):
        job.prompts(*PROMPTS)
        with pytest.raises(RunStoppedError) as stopped:
            job.run(job.serving(script={"d": "fatal"}), **PARTS)
        prospect = self.check(job, stopped.value.summary)
        assert prospect.requests == 10
        assert prospect.requests_pending == stopped.value.summary.pending

    def test_after_rows_have_moved(self, job):
        job.prompts(*PROMPTS).run(**PARTS)
        job.prompts("x", *PROMPTS)
        prospect = self.check(job, job.run(pilot=0, **PARTS))
        assert prospect.requests_pending == 1


def test_counts_of_what_drafts_have_in_common():
    origins = Origins()
    drawn = [os.urandom(1) + bytes(7) for _ in range(2000)]
    counted = Counter()
    for start in range(0, 2000, 500):
        origins.take(b"".join(drawn[start : start + 500]))
        counted.update(drawn[start : start + 500])
        for value in range(256):
            origin = bytes([value]) + bytes(7)
            assert origins.count(origin) == counted[origin]
    assert origins.count(b"\xff" * 8) == counted[b"\xff" * 8]


def test_a_bad_row_keeps_its_line_number(job):
    job.rows({"prompt": "a"}, "", "", "", {"prompt": "b"}, "{broken")
    job.run(max_failed_fraction=1, **PARTS)
    (record,) = job.dropped()
    assert "line 6" in record["error"]
    assert isinstance(next(row for row in job.storage().iter_rows() if isinstance(row, BadRow)), BadRow)


def test_the_images_may_lie_anywhere(tmp_path, job):
    """A relative folder, as in the quickstart."""
    job.io = ImageIO(os.path.relpath(job.io.save_path))
    job.prompts(*PROMPTS).run(**PARTS)
    assert job.run(**PARTS).made == 0
