"""`dataflow watch` over jobs that run, end, are killed, or have not begun, in processes of their own."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from dataflow import cli
from dataflow.commands.watch import Frame, picture

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
    assert "the process is gone without having said why" in once(capsys)


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


def test_a_folder_that_holds_something_else(capsys):
    Path("out").mkdir()
    Path("out/job.toml").write_text("[[")
    frame = json.loads(once(capsys, "--json"))
    assert "is not TOML" in frame["trouble"]
    assert "the rows cannot be counted" in once(capsys)


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
    assert "went wrong since the watch began: not_an_image 1" in text or "not done in all: " in text
    assert "21 of 21 rows (1 failed)" in text
    assert text.count("finished") >= 1


def test_ctrl_c_just_ends_it(start):
    watching = start("watch", "out", "--interval", "0.1")
    assert "waiting" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0


def drawn(frame: Frame, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(picture(frame))
    return console.export_text()


def step(**figures) -> dict:
    names = ("rows", "done", "refused", "failed", "dropped", "pending", "images", "usd")
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
            left=30.0,
            in_hand=8,
        )
        text = drawn(frame)
        assert "2.0/s · 30 s left · 8 under way · $2.00 spent, $0.0500 per image, $7.50 an hour, budget $5.00 a" in text
        assert "40 of 100 rows" in text

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

    def test_narrow(self):
        text = drawn(Frame(folder="out", state="running", writer=None, steps=(step(operator="x" * 60, rows=3),)), 40)
        assert max(map(len, text.splitlines())) <= 40
