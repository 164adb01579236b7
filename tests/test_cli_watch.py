"""`dataflow watch` over jobs that run, end, are killed, or have not begun, in processes of their own."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from dataflow import cli
from dataflow.commands import watch, watch_view
from dataflow.commands.watch import picture
from dataflow.commands.watch_view import Frame, Pace, View
from dataflow.runtime.journal import Journal, done_record, ending_record
from dataflow.runtime.lock import cache_lock
from dataflow.types import SavedImage

PIPELINE = """\
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[serving.draw]
type = "fake"
size = [8, 8]
seconds = {seconds}
script = {{ bad = "garbage", no = "refuse" }}

[[step]]
operator = "Text2ImageGenerator"
input_conversation_key = "prompt"

[run]
max_attempts = 1
"""
SECOND_STEP = """
[[step]]
operator = "PromptedImageEditGenerator"
input_conversation_key = "prompt"
input_image_key = "images"
output_image_key = "edited"
"""
STEP = "dataflow_cache_step_step1"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write():
    def write(*prompts: str, seconds: float = 0.0) -> None:
        Path("in.jsonl").write_bytes(b"".join(orjson.dumps({"prompt": prompt}) + b"\n" for prompt in prompts))
        Path("pipeline.toml").write_text(PIPELINE.format(seconds=seconds))

    return write


@pytest.fixture
def start():
    """Processes that are ended with the test."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, **options}
        started.append(subprocess.Popen([sys.executable, "-m", "dataflow", *arguments], **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        if process.stdout:
            process.stdout.close()


def frames(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def once(capsys, *more: str) -> str:
    assert cli.main(["watch", "out", "--once", *more]) == 0
    return capsys.readouterr().out


def test_a_job_from_before_its_beginning_to_its_end(write, start):
    write(*(f"thing {n}" for n in range(30)), "bad", "no", seconds=0.1)
    watching = start("watch", "out", "--json", "--interval", "0.2")
    before = json.loads(watching.stdout.readline())
    assert (before["state"], before["steps"]) == ("waiting", [])
    start("run", "pipeline.toml", "--quiet")
    seen = frames(watching.communicate(timeout=60)[0])
    assert watching.returncode == 0
    running = [frame for frame in seen if frame["state"] == "running" and frame["steps"]]
    assert running
    settled = [frame["steps"][0]["done"] for frame in running]
    assert settled == sorted(settled)
    assert running[-1]["rate"] == pytest.approx(8, abs=5)
    assert max(frame["left"] or 0 for frame in running) > 0
    last = seen[-1]
    assert last["state"] == "finished"
    (step,) = last["steps"]
    assert (step["rows"], step["done"], step["failed"], step["refused"], step["pending"]) == (32, 30, 1, 1, 0)
    assert sum(last["failures"].values()) == 2
    assert len(last["last"]) == 5
    assert all(Path("out/images", name).is_file() for name, _ in last["last"])


def test_a_killed_one(write, start, capsys):
    write(*(f"thing {n}" for n in range(500)), seconds=0.05)
    running = start("run", "pipeline.toml", "--quiet")
    watching = start("watch", "out", "--json", "--interval", "0.1")
    for line in watching.stdout:
        frame = json.loads(line)
        if frame["steps"] and frame["steps"][0]["done"] > 3:
            break
    running.send_signal(signal.SIGKILL)
    running.wait(30)
    last = frames(watching.communicate(timeout=60)[0])[-1]
    assert last["state"] == "killed"
    assert 3 < last["steps"][0]["done"] < 500
    assert last["final"]
    text = once(capsys)
    assert f"process {running.pid} on {socket.gethostname()}" in text
    assert "the process is gone without having said why" in text


def test_one_that_was_interrupted(write, start, capsys):
    write(*(f"thing {n}" for n in range(500)), seconds=0.05)
    running = start("run", "pipeline.toml", "--quiet")
    deadline = time.monotonic() + 30
    while not list(Path("out").glob("images/??/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.wait(30)
    assert "stopped before its end" in once(capsys)


def test_a_finished_one_says_so_and_ends(write, capsys):
    write("a", "bad")
    cli.main(["run", "pipeline.toml", "--quiet"])
    capsys.readouterr()
    assert cli.main(["watch", "out"]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"\d\d:\d\d:\d\d, finished, dataflow_cache_step_step1: 2 of 2 rows \(1 failed\)\n", out)
    assert "out  finished\n" in once(capsys)


def test_a_folder_that_a_script_wrote(write, capsys):
    write("a", "b")
    cli.main(["run", "pipeline.toml", "--quiet"])
    Path("out/job.toml").unlink()
    capsys.readouterr()
    assert json.loads(once(capsys, "--json"))["state"] == "finished"


def test_the_time_between_two_steps_is_not_the_end(write, start):
    write(*(f"thing {n}" for n in range(4)))
    Path("pipeline.toml").write_text(Path("pipeline.toml").read_text() + SECOND_STEP)
    watching = start("watch", "out", "--json", "--interval", "0.01")
    watching.stdout.readline()
    start("run", "pipeline.toml", "--quiet")
    seen = frames(watching.communicate(timeout=60)[0])
    assert [frame["final"] for frame in seen[-2:]] == [False, True]
    assert seen[-1]["state"] == "finished"
    assert [step["done"] for step in seen[-1]["steps"]] == [4, 4]
    assert {"running", "ended"} <= {frame["state"] for frame in seen}


def test_a_terminal_that_knows_ascii_only(write, start):
    write("狐狸", "bad")
    cli.main(["run", "pipeline.toml", "--quiet"])
    folder = Path("out").rename("结果")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    shown = start("watch", str(folder), "--once", env=environment).communicate(timeout=60)[0]
    assert shown.startswith("??  finished\n")
    assert "=xxx" in shown


def test_a_folder_that_holds_something_else(capsys):
    Path("out").mkdir()
    Path("out/job.toml").write_text("[[")
    frame = json.loads(once(capsys, "--json"))
    assert "is not TOML" in frame["trouble"]
    Path("out/journal/some").mkdir(parents=True)
    assert cli.main(["watch", "out", "--interval", "0.1"]) == 0, "nothing runs, so nothing will change"
    capsys.readouterr()
    text = once(capsys)
    assert "the rows cannot be counted" in text
    assert "\x1b" not in text


def test_it_takes_no_lock_and_writes_nothing(write, capsys):
    write("a", "b")
    cli.main(["run", "pipeline.toml", "--quiet"])
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    once(capsys)
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_in_a_terminal(write, start):
    write(*(f"thing {n}" for n in range(20)), "bad", seconds=0.1)
    start("run", "pipeline.toml", "--quiet")
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    watching = start("watch", "out", "--interval", "0.2", stdout=follower, stdin=follower, env=environment, text=False)
    os.close(follower)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    os.close(leader)
    assert watching.wait(30) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert "running, process" in text
    assert "Text2ImageGenerator" in text
    assert "not done in all: not_an_image 1" in text
    assert "21 of 21 rows (1 failed)" in text
    assert text.count("finished") >= 1


def test_ctrl_c_just_ends_it(start):
    watching = start("watch", "out", "--interval", "0.1")
    assert "waiting" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0


@pytest.fixture
def made(write, capsys):
    """A view of a job that is over, and its journal, open for more."""
    write(*(f"thing {n}" for n in range(20)))
    cli.main(["run", "pipeline.toml", "--quiet"])
    capsys.readouterr()
    journal = Journal(Path("out/journal", STEP))
    journal.open()
    time.sleep(0.02)  # what a test changes is newer than the job's sum, also where clocks tick slowly
    yield View(Path("out")), journal
    journal.close()


def record(number: int) -> dict:
    key = f"{number:032x}"
    return done_record(key, [SavedImage(name=f"00/{key}.png", sha256="", bytes=9, width=8, height=8)])


class TestWhatItKnows:
    def test_no_writer_for_a_moment(self, made):
        view, _ = made
        with cache_lock(Path("out")):
            view.count()
            assert view.frame().state == "running"
        assert (view.frame().state, view.frame().final) == ("ended", False)
        view.count()
        assert (view.frame().state, view.frame().final) == ("ended", False), "the next step may take the lock"
        with cache_lock(Path("out")):
            assert view.frame().state == "running"

    def test_its_end_is_told_by_rows_counted_after_it(self, made, monkeypatch):
        monkeypatch.setattr(watch_view, "GRACE", 0.0)
        view, _ = made
        table = Path("out", STEP).with_suffix(".jsonl")
        hidden = table.rename("hidden")
        Path("in.jsonl").write_text(Path("in.jsonl").read_text() + '{"prompt": "late"}\n')
        with cache_lock(Path("out")):
            view.count()
            assert view.frame().steps[0]["pending"] == 1
        hidden.rename(table)
        assert view.frame().state == "ended", "not yet: stopped"
        Path("in.jsonl").write_text("".join(Path("in.jsonl").read_text().splitlines(keepends=True)[:20]))
        view.count()
        assert view.frame().state == "finished"

    def test_a_job_file_without_a_record_is_no_job_that_stopped(self, made):
        view, journal = made
        shutil.rmtree(journal.folder)
        view.count()
        assert view.frame().state == "waiting"
        assert view.frame().steps[0]["pending"] == 20

    def test_a_writer_on_another_machine_may_be_gone(self, made):
        view, journal = made
        owner = {"pid": 1, "host": "elsewhere", "since": "yesterday"}
        Path("out/.lock.owner").write_bytes(orjson.dumps(owner))
        before = time.time() - 7200
        os.utime(journal.path, (before, before))
        view.count()
        frame = view.frame()
        assert (frame.state, frame.writer) == ("running", owner)
        assert frame.silent == pytest.approx(7200, abs=60)
        assert "no record was written for 2.0 h" in drawn(frame)

    def test_a_lock_that_is_just_being_taken(self, made):
        Path("out/.lock.owner").write_bytes(b"")
        view, _ = made
        view.count()
        assert view.frame().state == "finished"

    def test_the_journal_carries_an_old_count_on(self, made, monkeypatch):
        monkeypatch.setattr(watch_view, "STALE", 0.0)
        with Path("in.jsonl").open("a") as table:
            table.writelines(f'{{"prompt": "more {n}"}}\n' for n in range(100))
        view, journal = made
        with cache_lock(Path("out")):
            view.count()
            assert view.frame().ahead == 0
            journal.append(*map(record, range(30)), ending_record(f"{30:032x}", "failed", "timeout", ""))
            time.sleep(0.6)
            frame = view.frame()
        assert (frame.at_work, frame.ahead, frame.unit) == (STEP, 31, "images")
        assert frame.failures == {"timeout": 1}
        assert "about 51 of 120 rows" in drawn(frame)
        assert frame.left == pytest.approx(69 / frame.rate, rel=0.2)

    def test_more_records_than_rows_do_not_go_past_the_end(self, made, monkeypatch):
        monkeypatch.setattr(watch_view, "STALE", 0.0)
        view, journal = made
        with Path("in.jsonl").open("a") as table:
            table.write('{"prompt": "one more"}\n')
        view.count()
        view.frame()
        journal.append(*map(record, range(30)))
        assert view.frame().ahead == 1

    def test_requests_of_a_row_are_learnt_from_two_counts(self, made, monkeypatch):
        counts = iter(({"done": 10, "pending": 90}, {"done": 30, "pending": 70}))
        monkeypatch.setattr(watch_view, "standing", lambda _: [step(rows=100, **next(counts)) | {"step": STEP}])
        monkeypatch.setattr(watch_view, "STALE", 0.0)
        view, journal = made
        view.count()
        journal.append(*map(record, range(60)))
        view.count()
        journal.append(*map(record, range(60, 90)))
        assert view.frame().ahead == 10

    def test_the_last_images_dates_tell_the_rate_at_once(self, made):
        view, _ = made
        images = sorted(Path("out/images").rglob("*.png"))
        view.count()
        order = list(reversed([name for name, _ in view.frame().last]))
        now = time.time()
        for path in images:
            os.utime(path, (now - 1000, now - 1000))
        for number, name in enumerate(order):
            os.utime(Path("out/images", name), (now - 8 + 2 * number,) * 2)
        frame = View(Path("out")).frame()
        assert frame.rate == pytest.approx(4 / 8, rel=0.1)
        assert [round(age) for _, age in frame.last] == [0, 2, 4, 6, 8]

    def test_images_of_a_job_that_keeps_them_elsewhere(self, write, capsys):
        write("a")
        Path("pipeline.toml").write_text('[images]\nsave_path = "elsewhere"\n' + Path("pipeline.toml").read_text())
        cli.main(["run", "pipeline.toml", "--quiet"])
        capsys.readouterr()
        assert len(json.loads(once(capsys, "--json"))["last"]) == 1

    def test_an_operator_that_raises_is_no_end_of_the_watch(self, made, monkeypatch):
        monkeypatch.setattr(watch_view, "standing", lambda _: 1 / 0)
        view, _ = made
        view.count()
        assert view.frame().trouble == "division by zero"
        assert (view.frame().state, view.frame().final) == ("stopped", True)

    def test_a_table_that_takes_long_to_count_does_not_hold_up_the_frames(self, made, monkeypatch, capsys):
        monkeypatch.setattr(watch_view, "standing", lambda _: time.sleep(1.0) or [step(rows=1, done=1)])
        began = time.monotonic()
        view, _ = made
        view.keep_counting(0.1, patience=0.1)
        frame = view.frame()
        assert time.monotonic() - began < 0.9
        assert (frame.state, frame.counted) == ("ended", None)
        assert "the rows are being counted" in drawn(frame)
        view.end()
        watch._follow(View(Path("out")), 0.1, watch._Lines())
        assert "finished, s1: 1 of 1 rows" in capsys.readouterr().out.splitlines()[-1]


def test_pace():
    pace = Pace()
    assert (pace.now(), pace.mean()) == (None, None)
    for second in range(0, 200, 10):
        pace.add(second, 0 if second < 120 else (second - 120) * 2)
    assert pace.now() == pytest.approx(2.0, rel=0.2)
    assert pace.mean() == pytest.approx(140 / 190)


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0.0, "0.0 images/s"), (1234.5, "1,234.5 images/s"), (0.5, "30.0 images/min"), (0.01, "36.0 images/h")],
)
def test_slow_models_have_a_rate_too(per_second, text):
    assert watch._rate(per_second, "images") == text


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (10**7, 1, 1), (5, 5, 5), (1, 10**7, 3)])
def test_shares_of_a_bar(counts):
    sizes = watch._shares(counts, 24)
    assert sum(sizes) == 24
    assert all(size > 0 for size, count in zip(sizes, counts, strict=True) if count)


def drawn(frame: Frame, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(picture(frame, width=width))
    return console.export_text()


def step(**figures) -> dict:
    names = ("rows", "done", "refused", "failed", "dropped", "pending", "images", "bytes", "usd")
    return {"step": "s1", "operator": "Draw", "reasons": {}, **dict.fromkeys(names, 0), **figures}


class TestWhatIsDrawn:
    def test_money(self):
        frame = Frame(
            folder="out",
            state="running",
            writer={"pid": 1, "host": "h", "since": "now"},
            steps=(step(rows=100, done=40, pending=60, images=40),),
            usd=2.0,
            usd_per_hour=7.5,
            budget_usd=5.0,
            rate=2.0,
            mean_rate=1.0,
            left=30.0,
            in_hand=8,
            in_jobs=20,
        )
        text = drawn(frame)
        rates = "2.0 images/s (1.0 images/s since the watch began)"
        assert f"{rates} · 30 s left · 8 under way · 20 in batch jobs\n" in text
        assert "$2.00 spent, $0.0500 per image, $7.50 an hour, budget $5.00 a step\n" in text
        assert "40 of 100 rows" in text
        assert "━" * 10 + "─" * 14 in text

    def test_names_that_drive_a_terminal_or_its_markup(self):
        frame = Frame(
            folder="[red]out\x1b[31m\u202e",
            state="running",
            writer=None,
            steps=(step(operator="[bold]狐狸[/bold]\x07", rows=1),),
            failures={"[link=x]bad\x1b": 1},
        )
        text = drawn(frame)
        assert "[red]out\ufffd[31m\ufffd" in text
        assert "[bold]狐狸[/bold]\ufffd" in text
        assert "[link=x]bad\ufffd 1" in text

    def test_every_way_a_row_can_end(self):
        figures = step(rows=24, done=6, refused=3, failed=2, dropped=1, pending=12)
        text = drawn(Frame(folder="out", state="running", steps=(figures,)))
        assert "━━━━━━╍╍╍╳╳┄────────────  12 of 24 rows (3 refused, 2 failed, 1 dropped)" in text

    @pytest.mark.parametrize("width", [30, 40, 80])
    def test_narrow(self, width):
        figures = step(operator="x" * 60, rows=3000000, done=100, failed=20000, refused=3000)
        text = drawn(Frame(folder="out", state="running", steps=(figures,)), width)
        assert max(map(len, text.splitlines())) <= width
        assert "23,100 of 3,000,000 rows (3,000 refused, 20,000 failed)" in " ".join(text.split())

    def test_an_old_count_says_so(self):
        frame = Frame(folder="out", state="running", steps=(step(rows=9),), counted=600.0)
        assert "the rows were counted 10 min ago" in drawn(frame)
