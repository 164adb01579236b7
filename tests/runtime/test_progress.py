"""What a person sees."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from dataflow.runtime import progress
from dataflow.runtime.progress import Progress, describe, human_bytes
from dataflow.runtime.tally import Tally
from dataflow.types import Summary


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def settle(tally: Tally, rows: int, status="done", reason="") -> None:
    for _ in range(rows):
        tally.add_row([], status, reason)
        tally.add_images(1, 10, made=True)


def test_the_line_tells_rows_speed_time_left_and_failures(clock, capsys):
    tally = Tally()
    with Progress("Drawer", 100, True) as bar:
        bar.follow(tally, Summary())
        settle(tally, 10)
        bar.update()
        clock[0] += 10
        settle(tally, 20)
        settle(tally, 2, "refused", "refused")
        settle(tally, 3, "failed", "crash")
        bar.update()
    shown = capsys.readouterr().err
    assert "Drawer:  35%" in shown
    assert "35/100 rows, 2.50 images/s, ETA 0:00:26, 2 refused, 3 failed" in shown


def test_it_is_refreshed_now_and_then_and_at_the_end(clock, capsys):
    tally = Tally()
    with Progress("Drawer", None, True) as bar:
        bar.follow(tally, Summary())
        bar.update()
        for _ in range(50):
            settle(tally, 1)
            bar.update()
        assert "50 rows" not in capsys.readouterr().err
    assert "Drawer: 50 rows" in capsys.readouterr().err


def test_a_rate_needs_something_made_and_time(clock, capsys):
    tally = Tally()
    with Progress("Drawer", 5, True) as bar:
        bar.follow(tally, Summary())
        tally.add_done_row(1, 10)
        bar.update()
        clock[0] += 1
    assert "images/s" not in capsys.readouterr().err


def test_nothing_is_shown_where_nobody_looks(capsys, monkeypatch):
    with Progress("Drawer", 5, None) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminal", "notebook", "shown"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_it_shows_itself_in_terminals_and_notebooks(monkeypatch, terminal, notebook, shown):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    with Progress("Drawer", None, None):
        pass
    assert bool(screen.getvalue()) == shown


def test_the_sum_in_words():
    summary = Summary(
        step="step1",
        rows=10,
        done=4,
        refused=1,
        failed=2,
        dropped=1,
        pending=2,
        reasons={"crash": 2, "refused": 1, "small": 1},
        images=4,
        bytes=2_500_000,
        made=3,
        adopted=1,
        seconds=1.5,
        output="cache/step1.jsonl",
    )
    assert describe(summary).splitlines() == [
        "step1: 10 rows = 4 done + 1 refused + 2 failed + 1 dropped + 2 pending",
        "  not done, by reason: crash 2, refused 1, small 1",
        "  4 images (2.5 MB); this run made 3, 1 adopted in 1.5 s, 2.0 images/s",
        "  table: cache/step1.jsonl",
    ]


def test_what_is_nothing_is_left_out():
    assert describe(Summary(step="s", rows=1, done=1)).splitlines() == [
        "s: 1 rows = 1 done + 0 refused + 0 failed + 0 pending",
        "  in 0.0 s",
    ]
    assert describe(Summary(step="s", rows=1, failed=1)).splitlines()[1] == "  0 images (0 B); this run made 0 in 0.0 s"


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (10**6, "1.0 MB"), (2 * 10**9, "2.0 GB"), (3 * 10**13, "30.0 TB")],
)
def test_sizes_for_people(count, words):
    assert human_bytes(count) == words
