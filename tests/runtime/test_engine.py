"""A step from table to table: retries, bisecting, limits, stops, resume."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from dataflow.errors import (
    BadRequestError,
    ConfigError,
    InputError,
    RetryError,
    RunStoppedError,
    StepError,
    TooManyFailuresError,
)
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime import engine, limits, station
from dataflow.runtime.engine import execute
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import GenerationResult

pytestmark = pytest.mark.usefixtures("no_waiting")

HERE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


class TestOneRun:
    def test_every_row_gets_its_own_picture_in_the_order_of_the_table(self, job):
        prompts = [f"a thing number {i}" for i in range(23)]
        job.prompts(*prompts)
        summary = job.run(job.serving(batch_size=4, concurrency=2))
        assert [row["prompt"] for row in job.table()] == prompts
        assert job.check_images() == 23
        assert (summary.rows, summary.done, summary.made, summary.images) == (23, 23, 23, 23)
        assert summary.bytes == sum(map(len, job.image_files().values()))
        assert summary.output == str(job.output)

    def test_the_row_keeps_its_other_columns(self, job):
        job.rows({"id": "0001", "prompt": "a fox", "nested": {"a": [1, None, 0.1]}}).run()
        row = job.table()[0]
        assert (row["id"], row["nested"]) == ("0001", {"a": [1, None, 0.1]})

    def test_an_empty_table_gives_an_empty_table_and_loads_no_model(self, job, monkeypatch):
        monkeypatch.setattr(FakeServing, "setup", lambda self: pytest.fail("there is no work"))
        summary = job.rows().run()
        assert (summary.rows, job.table(), summary.output) == (0, [], str(job.output))

    def test_a_table_of_nothing_but_bad_rows_is_told_row_by_row(self, job, monkeypatch):
        monkeypatch.setattr(FakeServing, "setup", lambda self: pytest.fail("there is no work"))
        summary = job.rows('{"prompt": "a', "{}", {"prompt": 7}, {"prompt": "  "}).run()
        assert (summary.rows, summary.failed, summary.pending) == (4, 4, 0)
        assert summary.reasons == {"bad_input": 3, "bad_row": 1}
        assert [row.get("prompt") for row in job.table()] == [None, 7, "  "]
        assert [record["reason"] for record in job.dropped()] == ["bad_row"]

    def test_bad_rows_keep_their_row_number_and_their_neighbours_come_out(self, job, caplog):
        job.rows({"prompt": "first"}, "not json", {"prompt": ["odd"]}, {"prompt": "last"})
        summary = job.run(job.serving(batch_size=8))
        assert (summary.done, summary.failed) == (2, 2)
        assert job.check_images() == 2
        assert f"{job.input}, row 2" in caplog.text
        message = job.table()[1]["images_error"]["message"]
        assert message.startswith(f"{job.input}, row 3, column 'prompt': ")

    def test_the_sum_is_printed_unless_told_not_to(self, job, capsys):
        job.prompts("a")
        Text2ImageGenerator(job.serving()).run(job.storage(), "prompt")
        assert "1 rows = 1 done + 0 refused + 0 failed + 0 pending" in capsys.readouterr().err
        job.run()
        assert capsys.readouterr().err == ""

    def test_a_progress_bar_is_shown_when_asked_for(self, job, capsys):
        job.prompts("a", "b refuse").run(job.serving(script={"refuse": "refuse"}), progress=True)
        assert "Text2ImageGenerator: 100%" in capsys.readouterr().err

    def test_a_missing_column_is_told_with_the_columns_there_are_before_any_work(self, job):
        job.rows({"id": 1, "text": "a fox"})
        with pytest.raises(InputError, match=r"column 'prompt': no such column; the table has 'id', 'text'"):
            job.run()
        assert not job.made()
        assert not job.io.save_path.exists()

    def test_several_images_per_prompt_are_several_requests(self, job):
        summary = job.prompts("a", "b").run(job.serving(images_per_prompt=3, batch_size=4))
        assert [len(row["images"]) for row in job.table()] == [3, 3]
        assert len({path for row in job.table() for path in row["images"]}) == 6
        assert job.check_images() == 6
        assert (summary.done, summary.images) == (2, 6)

    def test_the_cache_folder_that_cannot_be_written_is_named(self, job, tmp_path):
        job.prompts("a")
        (tmp_path / "locked").mkdir(mode=0o500)
        job.cache = tmp_path / "locked" / "cache"
        if os.access(tmp_path / "locked", os.W_OK):
            pytest.skip("the super-user may write everywhere")
        with pytest.raises(InputError, match="no permission to write the cache folder"):
            job.run()

    def test_a_permission_error_from_anywhere_in_the_run_is_readable(self, job, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied", "cache")

        monkeypatch.setattr(engine, "Journal", refuse)
        with pytest.raises(InputError, match="no permission to write the cache folder"):
            job.prompts("a").run()

    def test_other_system_errors_stay_what_they_are(self, job, monkeypatch):
        def fail(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(engine, "Journal", fail)
        with pytest.raises(OSError, match="Input/output error"):
            job.prompts("a").run()


class TestResume:
    def test_a_second_run_makes_nothing_and_leaves_the_table_untouched(self, job, monkeypatch):
        job.prompts("a", "b", "c refuse", "d").run(job.serving(script={"refuse": "refuse"}))
        before = (job.output.read_bytes(), job.output.stat().st_mtime_ns, job.output.stat().st_ino)
        monkeypatch.setattr(FakeServing, "setup", lambda self: pytest.fail("there is no work"))
        summary = job.run(job.serving(script={"refuse": "refuse"}))
        assert (job.output.read_bytes(), job.output.stat().st_mtime_ns, job.output.stat().st_ino) == before
        assert (summary.rows, summary.done, summary.refused, summary.made) == (4, 3, 1, 0)
        assert summary.reasons == {"refused": 1}
        assert set(job.made().values()) == {1}

    def test_a_table_that_was_deleted_is_written_again_without_generating(self, job):
        job.prompts("a", "b").run()
        job.output.unlink()
        assert job.run().made == 0
        assert job.check_images() == 2

    def test_rows_inserted_reordered_and_removed_cost_only_the_new_ones(self, job):
        job.prompts("a", "b", "c", "d").run()
        summary = job.prompts("new", "d", "b", "a").run()
        assert summary.made == 1
        assert [row["prompt"] for row in job.table()] == ["new", "d", "b", "a"]
        assert job.check_images() == 4

    def test_a_duplicated_prompt_is_a_picture_of_its_own(self, job):
        job.prompts("twin", "twin", "twin").run()
        paths = [row["images"][0] for row in job.table()]
        assert len(set(paths)) == 3
        assert len({Path(path).read_bytes() for path in paths}) == 3
        assert job.run().made == 0

    @pytest.mark.parametrize("change", [{"model": "other"}, {"params": {"num_inference_steps": 9}}, {"size": (16, 8)}])
    def test_a_changed_serving_makes_every_image_anew_and_touches_no_old_file(self, job, change):
        job.prompts("a", "b").run()
        old = job.image_files()
        assert job.run(job.serving(**change)).made == 2
        assert old.items() <= job.image_files().items()
        assert len(job.image_files()) == 4

    def test_a_changed_row_is_made_anew_alone(self, job):
        job.rows({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "seed": 1}).run()
        assert (
            job.rows({"prompt": "a"}, {"prompt": "b", "guidance_scale": 2}, {"prompt": "c", "seed": 2}).run().made == 2
        )

    def test_changed_bytes_of_an_input_image_change_its_row_alone(self, job):
        job.rows(*({"prompt": "warmer", "image": str(job.picture(name))} for name in ("a.png", "b.png", "c.png")))
        job.run(edit=True)
        job.picture("b.png", colour="blue")
        assert job.run(edit=True).made == 1
        assert job.check_images("edited") == 3

    def test_an_image_lost_or_cut_on_disk_is_made_again(self, job):
        job.prompts("a", "b", "c").run()
        before = job.image_files()
        first, second, _ = sorted(before)
        (job.io.save_path / first).unlink()
        (job.io.save_path / second).write_bytes(before[second][:-20])
        assert job.run().made == 2
        assert job.image_files() == before

    def test_whole_images_without_a_record_are_adopted_and_cut_ones_are_not(self, job):
        job.prompts("a", "b", "c").run()
        before = job.image_files()
        job.journal.path.unlink()
        first = min(before)
        (job.io.save_path / first).write_bytes(before[first][:-20])
        summary = job.run()
        assert (summary.adopted, summary.made, summary.images) == (2, 1, 3)
        assert job.image_files() == before
        assert job.run().adopted == 0

    def test_refusals_are_final_and_other_failures_are_tried_again(self, job, caplog):
        job.prompts("fine", "nude", "broken")
        assert job.run(job.serving(script={"nude": "refuse", "broken": "crash"})).reasons == {"refused": 1, "crash": 1}
        assert "row 2, request" in caplog.text
        assert "row 3, request" in caplog.text
        summary = job.run()
        assert (summary.done, summary.refused, summary.failed, summary.made) == (2, 1, 0, 1)
        assert job.table()[1]["images_error"]["reason"] == "refused"
        assert "images_error" not in job.table()[2]

    def test_only_the_reasons_asked_for_are_tried_again(self, job):
        job.prompts("nude", "broken")
        job.run(job.serving(script={"nude": "refuse", "broken": "crash"}))
        summary = job.run(retry=frozenset({"refused"}))
        assert (summary.done, summary.failed) == (1, 1)
        assert job.check_images() == 1

    def test_the_size_of_the_batch_does_not_change_an_image(self, job):
        job.prompts(*"abcdef").run(job.serving(batch_size=4))
        before = job.image_files()
        for name in before:
            (job.io.save_path / name).unlink()
        job.run(job.serving(batch_size=1))
        assert job.image_files().keys() == before.keys()
        assert job.check_images() == 6

    def test_half_written_images_of_a_killed_run_are_swept(self, job):
        job.prompts("a").run()
        torn = (
            job.io.save_path
            / next(iter(job.image_files())).partition("/")[0]
            / f".{'0' * 32}.999999999.{HERE}abcdabcd.tmp"
        )
        torn.write_bytes(b"torn")
        job.run()
        assert not torn.exists()


class TestTheTable:
    def test_a_table_that_changes_while_it_runs_is_not_folded(self, job):
        job.prompts("a", "b")

        class Meddling(FakeServing):
            async def generate(serving, requests):  # noqa: N805
                job.prompts("x", "y")
                return await super().generate(requests)

        meddling = Meddling(job.io, size=(8, 8), log=job.log)
        with pytest.raises(StepError, match="changed while"):
            job.run(meddling)
        assert not job.output.exists()
        assert job.run().rows == 2
        assert [row["prompt"] for row in job.table()] == ["x", "y"]

    def test_a_table_that_gets_shorter_while_it_runs_is_not_folded(self, job):
        job.prompts("a", "b", "c")

        class Meddling(FakeServing):
            async def generate(serving, requests):  # noqa: N805
                if requests[-1].prompt == "c":
                    job.prompts("a")
                return await super().generate(requests)

        with pytest.raises(StepError, match="changed while the step ran"):
            job.run(Meddling(job.io, size=(8, 8)))
        assert not job.output.exists()

    def test_the_table_of_another_job_is_kept_under_another_name(self, job, caplog):
        job.prompts("a").run()
        first = job.output.read_bytes()
        job.input = job.folder / "other.jsonl"
        job.prompts("b").run()
        (kept,) = job.cache.glob("*.before-*.jsonl")
        assert kept.read_bytes() == first
        assert [row["prompt"] for row in job.table()] == ["b"]
        assert str(kept) in caplog.text


class TestFailures:
    def test_a_lost_connection_is_tried_again(self, job):
        summary = job.prompts("a", "b flaky").run(job.serving(script={"flaky": ["error", "error"]}))
        assert (summary.done, summary.failed) == (2, 0)
        assert {record.get("att") for record in job.records("done")} == {None, 3}

    def test_after_max_attempts_it_has_failed_with_its_reason(self, job):
        serving = job.serving(script={"flaky": ["error", "error", ""]})
        summary = job.prompts("a flaky").run(serving, max_attempts=2)
        assert (summary.failed, summary.reasons) == (1, {"transient": 1})
        error = job.table()[0]["images_error"]
        assert error == {"status": "failed", "reason": "transient", "message": "connection lost"}

    def test_trying_again_waits_longer_each_time(self, job, monkeypatch):
        asked = []
        monkeypatch.setattr(limits, "backoff", lambda attempt: asked.append(attempt) or 0.0)
        job.prompts("flaky").run(job.serving(script={"flaky": "error"}), max_attempts=4)
        assert asked == [1, 2, 3]

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [("crash", "crash"), ("garbage", "not_an_image"), ("black", "black"), ("refuse", "refused")],
    )
    def test_one_poison_row_does_not_take_its_batch_along(self, job, fault, reason):
        job.prompts(*(f"fine {i}" for i in range(5)), "poison", *(f"good {i}" for i in range(5)))
        summary = job.run(job.serving(batch_size=11, script={"poison": fault}))
        assert (summary.done, summary.failed + summary.refused) == (10, 1)
        assert job.check_images() == 10
        assert job.table()[5]["images_error"]["reason"] == reason
        assert summary.reasons == {reason: 1}

    def test_a_batch_that_does_not_fit_is_halved_and_later_ones_stay_small(self, job):
        sizes = []

        class Small(FakeServing):
            async def generate(self, requests):
                sizes.append(len(requests))
                return await super().generate(requests)

        job.prompts(*(f"p{i}" for i in range(32)))
        summary = job.run(Small(job.io, size=(8, 8), batch_size=8, fits=3))
        assert summary.done == 32
        assert max(sizes[sizes.index(2) :]) <= 4
        assert sizes.count(8) <= 2  # the second was planned before the first failed
        assert set(sizes[-4:]) == {2}

    def test_a_request_that_never_fits_alone_fails(self, job):
        summary = job.prompts("a", "huge", "b").run(job.serving(batch_size=3, script={"huge": "out_of_memory"}))
        assert (summary.done, summary.reasons) == (2, {"out_of_memory": 1})

    def test_a_rate_limit_is_no_failure_however_often_it_comes(self, job):
        serving = job.serving(concurrency=4, script={"limited": ["rate_limit:0"] * 10})
        summary = job.prompts(*(f"limited {i}" for i in range(8))).run(serving)
        assert summary.done == 8
        assert {record.get("att") for record in job.records("done")} == {None}

    def test_nothing_but_rate_limits_stops_the_run_in_the_end(self, job, monkeypatch):
        monkeypatch.setattr(station, "PATIENCE", 0.01)
        with pytest.raises(RunStoppedError, match="nothing for 0 s but: too many requests") as stopped:
            job.prompts("a", "b").run(job.serving(script={"a": "rate_limit:0.02", "b": "rate_limit:0.02"}))
        assert stopped.value.summary.pending == 2
        assert job.run().done == 2

    def test_a_service_that_is_down_costs_no_request_its_attempts(self, job, monkeypatch):
        # So few that no request can have used up its attempts, whichever is tried again first.
        monkeypatch.setattr(limits, "DOWN_AFTER", 3)
        monkeypatch.setattr(limits, "backoff", lambda attempt: 0.001)

        class Down(FakeServing):
            reproducible = False
            calls = 0

            async def generate(self, requests):
                self.calls += 1
                if self.calls <= 60:
                    raise RetryError("connection refused")
                return await super().generate(requests)

        summary = job.prompts(*(f"prompt {i}" for i in range(6))).run(Down(job.io, size=(8, 8), concurrency=4))
        assert (summary.done, summary.failed) == (6, 0)

    def test_a_service_that_stays_down_stops_the_run(self, job, monkeypatch):
        monkeypatch.setattr(limits, "backoff", lambda attempt: 0.002)
        monkeypatch.setattr(station, "PATIENCE", 0.05)
        serving = job.serving(concurrency=4, script={"prompt": "error"})
        serving.reproducible = False
        with pytest.raises(RunStoppedError, match="stopped: nothing for 0 s but: connection lost") as stopped:
            job.prompts(*(f"prompt {i}" for i in range(40))).run(serving)
        assert stopped.value.summary.pending >= 34
        assert job.run().done == 40

    def test_a_call_that_hangs_is_given_up(self, job):
        serving = job.serving(script={"stuck": "hang"}, timeout=0.05, batch_size=3)
        summary = job.prompts("a", "stuck", "b").run(serving)
        assert (summary.done, summary.reasons) == (2, {"timeout": 1})
        assert job.table()[1]["images_error"]["message"] == "no answer within 0.05 s"

    def test_a_request_the_serving_cannot_do_is_refused_before_any_work(self, job, caplog):
        class Choosy(FakeServing):
            def check(self, request):
                if "odd" in request.prompt:
                    raise BadRequestError("this prompt is odd")

        summary = job.prompts("odd", "fine").run(Choosy(job.io, size=(8, 8), log=job.log))
        assert (summary.done, summary.reasons) == (1, {"bad_request": 1})
        assert "row 1, request" in caplog.text
        assert job.made().total() == 1

    def test_answers_that_are_no_answers_are_failures(self, job):
        class Mute(FakeServing):
            async def generate(self, requests):
                if len(requests) > 1:
                    return []
                return [GenerationResult()]

        summary = job.prompts("a", "b").run(Mute(job.io, batch_size=2))
        assert summary.reasons == {"empty_answer": 2}

    def test_a_picture_that_cannot_be_saved_is_the_failure_of_its_row_alone(self, job):
        class Odd(FakeServing):
            async def generate(self, requests):
                answers = await super().generate(requests)
                odd = GenerationResult(images=("not a picture",))
                return [odd if "odd" in r.prompt else a for r, a in zip(requests, answers, strict=True)]

        summary = job.prompts("a", "odd", "b").run(Odd(job.io, size=(8, 8), batch_size=3))
        assert (summary.done, summary.failed) == (2, 1)

    def test_a_serving_without_a_store_cannot_keep_pictures(self, job):
        class Homeless(FakeServing):
            async def generate(self, requests):
                return [GenerationResult(images=(b"x",)) for _ in requests]

        summary = job.prompts("a").run(Homeless(None))
        assert summary.reasons == {"no_image_io": 1}

    def test_a_serving_that_does_not_load_stops_the_run(self, job, monkeypatch):
        monkeypatch.setattr(FakeServing, "setup", lambda self: 1 / 0)
        with pytest.raises(RunStoppedError, match="the serving did not start: ZeroDivisionError") as stopped:
            job.prompts("a", "b").run()
        assert stopped.value.summary.pending == 2

    def test_a_serving_set_up_wrongly_says_so(self, job, monkeypatch):
        def fail(self):
            raise ConfigError("no such model")

        monkeypatch.setattr(FakeServing, "setup", fail)
        with pytest.raises(ConfigError, match="no such model"):
            job.prompts("a").run()

    def test_an_error_in_the_planning_is_not_swallowed(self, job, monkeypatch):
        def check(self, request):
            if request.prompt == "p9":
                raise ZeroDivisionError("a bug")

        monkeypatch.setattr(FakeServing, "check", check)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            job.prompts(*(f"p{i}" for i in range(12))).run(job.serving(batch_size=2))
        monkeypatch.undo()
        assert job.index().starts == {}
        assert job.run().done == 12

    def test_what_a_service_counted_is_in_the_journal_whatever_it_is(self, job):
        class Counting(FakeServing):
            async def generate(self, requests):
                return [GenerationResult(text="\ud83d cut", usage={"cost": complex(1, 2), "n": 3}) for _ in requests]

        assert job.prompts("a").run(Counting(None)).done == 1
        (record,) = job.records("done")
        assert record["usage"]["n"] == 3
        assert record["text"].endswith(" cut")
        assert job.run(Counting(None)).made == 0


class TestStops:
    def test_a_fatal_error_stops_at_once_and_the_next_run_goes_on(self, job):
        job.prompts(*(f"p{i}" for i in range(6)), "the key is bad", *(f"q{i}" for i in range(6)))
        with pytest.raises(RunStoppedError, match="the key is not valid") as stopped:
            job.run(job.serving(script={"bad": "fatal"}))
        summary = stopped.value.summary
        assert summary.balanced
        assert (summary.rows, summary.failed) == (13, 0)
        assert summary.done == len(job.image_files()) >= 5
        assert not job.output.exists()
        assert job.index().starts == {}, "a clean stop kills nobody"
        assert job.run().done == 13
        assert set(job.made().values()) == {1}

    def test_too_many_failures_stop_the_run(self, job):
        job.prompts(*(f"bad {i}" for i in range(150)))
        with pytest.raises(TooManyFailuresError, match=r"stopped: 100 of 100 rows failed \(crash 100\)") as stopped:
            job.run(job.serving(script={"bad": "crash"}))
        assert (stopped.value.summary.failed, stopped.value.summary.pending) == (100, 50)

    def test_failures_below_the_limit_do_not(self, job):
        job.prompts(*(f"{'bad' if i % 3 == 0 else 'fine'} {i}" for i in range(330)))
        summary = job.run(job.serving(script={"bad": "crash"}, batch_size=8, size=(8, 8)), max_failed_fraction=0.4)
        assert (summary.done, summary.failed) == (220, 110)

    def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(self, job, monkeypatch):
        save = type(job.io).save

        def full(store, image, name, metadata):
            if metadata["prompt"] == "p3":
                raise OSError(28, "No space left on device")
            return save(store, image, name, metadata)

        job.prompts(*(f"p{i}" for i in range(6)))
        monkeypatch.setattr(type(job.io), "save", full)
        with pytest.raises(RunStoppedError, match="stopped: the disk is full") as stopped:
            job.run(job.serving(batch_size=2))
        assert stopped.value.summary.balanced
        monkeypatch.undo()
        assert job.run().done == 6
        assert job.check_images() == 6

    def test_a_disk_too_full_for_the_last_record_still_frees_the_model(self, job, monkeypatch):
        """The image does not fit, and neither does the record that the requests in hand killed nobody."""
        freed = []
        monkeypatch.setattr(FakeServing, "cleanup", lambda self: freed.append(True))
        from dataflow.runtime.journal import Journal

        append = Journal.append

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def no_room(journal, *records):
            if records[0]["s"] == "forget":
                full()
            append(journal, *records)

        monkeypatch.setattr(type(job.io), "save", full)
        monkeypatch.setattr(Journal, "append", no_room)
        with pytest.raises(RunStoppedError, match="the disk is full") as stopped:
            job.prompts("a", "b").run()
        assert stopped.value.summary.pending == 2
        assert freed == [True]

    def test_a_disk_full_before_the_first_batch_is_a_stop_too(self, job, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("dataflow.runtime.journal.Journal.open", full)
        with pytest.raises(RunStoppedError, match="the disk is full"):
            job.prompts("a").run()

    def test_the_sum_of_a_stopped_run_is_right_for_a_table_that_cannot_be_counted(self, job):
        job.input = job.folder / "in.json"
        job.input.write_text('[{"prompt": "a"}, {"prompt": "bad"}, {"prompt": "c"}]')
        with pytest.raises(RunStoppedError) as stopped:
            job.run(job.serving(script={"bad": "fatal"}))
        assert stopped.value.summary.rows == 3
        assert stopped.value.summary.balanced

    def test_a_stopped_run_prints_its_sum(self, job, capsys):
        with pytest.raises(RunStoppedError):
            execute(
                Text2ImageGenerator(job.serving(script={"a": "fatal"})).plan(input_conversation_key="prompt"),
                job.prompts("a").storage(),
            )
        assert "1 rows = 0 done + 0 refused + 0 failed + 1 pending" in capsys.readouterr().err

    def test_another_jobs_table_survives_a_stopped_run_and_the_run_after_it(self, job):
        job.prompts("a").run()
        first = job.output.read_bytes()
        job.input = job.folder / "other.jsonl"
        with pytest.raises(RunStoppedError):
            job.prompts("b").run(job.serving(script={"b": "fatal"}))
        assert job.output.read_bytes() == first
        job.run()
        (kept,) = job.cache.glob("*.before-*.jsonl")
        assert kept.read_bytes() == first
