"""One writer per cache folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataflow.errors import CacheBusyError

LIFE = str(Path(__file__).with_name("life.py"))


@pytest.fixture
def busy(site, nursery):
    """A site on which another process works; its pid."""
    site.serving = {"seconds": 0.2}
    site.fill(["a fox", "a kite"]).cache.mkdir()
    pid = nursery.start({**site.job(), "serving": {**site.serving, "seconds": 60, "log": str(site.log)}})
    end = time.monotonic() + 10
    while not (site.cache / ".lock.owner").exists() or not (site.cache / ".lock.owner").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.01)
    site.other = pid
    yield site
    os.kill(pid, signal.SIGKILL)
    nursery.end()


def test_the_second_process_is_refused_at_once_and_told_who_holds_the_folder(busy):
    started = time.monotonic()
    with pytest.raises(CacheBusyError) as refused:
        busy.run()
    assert time.monotonic() - started < 1
    message = str(refused.value)
    assert str(busy.cache) in message
    assert f"process {busy.other}" in message
    assert "another cache_path" in message
    assert not busy.generated()


def test_a_second_script_ends_with_an_error_and_touches_nothing(busy):
    journal = busy.journal.read_bytes() if busy.journal.exists() else b""
    second = subprocess.run([sys.executable, LIFE, json.dumps(busy.job())], capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert f"CacheBusyError: {busy.cache} is being written by process {busy.other}" in second.stderr
    assert busy.journal.read_bytes().startswith(journal)
    assert b'"done"' not in busy.journal.read_bytes()


def test_the_refusal_leaves_the_lock_with_its_holder(busy):
    for _ in range(3):
        with pytest.raises(CacheBusyError):
            busy.run()
    assert (busy.cache / ".lock.owner").exists()


def test_another_cache_folder_is_free(busy):
    busy.cache = busy.root / "other_cache"
    assert busy.run().done == 2
    busy.check()


def test_the_lock_falls_with_its_holder(busy):
    os.kill(busy.other, signal.SIGKILL)
    end = time.monotonic() + 5
    while True:
        try:
            summary = busy.run()
            break
        except CacheBusyError:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert (summary.done, summary.made) == (2, 2)
    busy.check()


def test_a_stale_owner_note_blames_nobody(site):
    site.fill(["a fox"]).cache.mkdir()
    (site.cache / ".lock.owner").write_text('{"pid": 1, "host": "elsewhere", "since": "yesterday"}')
    (site.cache / ".lock").write_text("")
    assert site.run().done == 1
