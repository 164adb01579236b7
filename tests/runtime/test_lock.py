"""One writer per cache folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dataflow.errors import CacheBusyError
from dataflow.runtime.lock import cache_lock


def test_the_folder_is_made_and_free_again_afterwards(tmp_path):
    folder = tmp_path / "a" / "cache"
    for _ in range(2):
        with cache_lock(folder):
            assert (folder / ".lock.owner").exists()
        assert not (folder / ".lock.owner").exists()


def test_the_second_is_told_who_holds_it(tmp_path):
    with cache_lock(tmp_path), pytest.raises(CacheBusyError) as busy, cache_lock(tmp_path):
        pytest.fail("held twice")
    assert f"being written by process {os.getpid()} on " in str(busy.value)
    assert "use another cache_path" in str(busy.value)


def test_another_thread_is_refused_too(tmp_path):
    refused = []

    def other() -> None:
        try:
            with cache_lock(tmp_path):
                pass
        except CacheBusyError as error:
            refused.append(error)

    with cache_lock(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert len(refused) == 1


@pytest.mark.parametrize("note", [None, b"", b"{}", b"not json"])
def test_without_a_readable_note_it_is_another_process(tmp_path, note):
    with cache_lock(tmp_path):
        owner = tmp_path / ".lock.owner"
        owner.unlink()
        if note is not None:
            owner.write_bytes(note)
        with pytest.raises(CacheBusyError, match="written by another process"), cache_lock(tmp_path):
            pytest.fail("held twice")


def test_it_is_free_after_an_error_and_after_a_note_that_could_not_be_written(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), cache_lock(tmp_path):
        1 / 0  # noqa: B018

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):  # noqa: PT012
        patch.setattr(Path, "write_bytes", full)
        with cache_lock(tmp_path):
            pytest.fail("without a note")
    with cache_lock(tmp_path):
        pass
