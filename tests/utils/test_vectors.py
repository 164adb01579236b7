"""Vectors kept on disk: found again whole, by any process, or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dataflow.errors import InputError
from dataflow.utils import vectors
from dataflow.utils.vectors import VectorStore


def key(number) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture
def opened():
    stores = []

    def open_store(*arguments):
        stores.append(VectorStore(*arguments))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def test_what_was_added_is_found_at_once_and_by_another(opened, tmp_path, rows):
    store = opened(tmp_path / "v", 8)
    assert store.find([key(0)]) == [None]
    store.add([key(n) for n in range(50)], rows)
    for reader in (store, opened(tmp_path / "v")):
        found = reader.find([key(49), key("other"), key(0)])
        assert found[1] is None
        assert np.array_equal(found[0], rows[49])
        assert np.array_equal(found[2], rows[0])
        assert len(reader) == 50


def test_two_writers_and_a_key_of_both(opened, tmp_path, rows):
    one, two = opened(tmp_path, 8), opened(tmp_path, 8)
    one.add([key(0), key(1)], rows[:2])
    two.add([key(1), key(2)], rows[1:3])
    assert two.find([key(0)]) == [None]
    two.refresh()
    assert np.array_equal(two.find([key(0)])[0], rows[0])
    found = dict(opened(tmp_path).items())
    assert list(found) == sorted(key(n) for n in range(3))
    assert all(np.array_equal(found[key(n)], rows[n]) for n in range(3))


def test_more_than_are_held_in_memory(opened, tmp_path, rows, monkeypatch):
    monkeypatch.setattr(vectors, "_REST_AT", 7)
    store = opened(tmp_path, 8)
    for n in range(50):
        store.add([key(n)], rows[n : n + 1])
    assert np.array_equal(np.stack(store.find([key(n) for n in range(50)])), rows)
    assert len(store._added) < 7


def test_a_cut_record_counts_as_missing_and_what_is_before_it_does_not(opened, tmp_path, rows):
    store = opened(tmp_path, 8)
    store.add([key(n) for n in range(3)], rows[:3])
    store.close()
    (file,) = tmp_path.glob("*.vectors")
    os.truncate(file, file.stat().st_size - 1)
    found = opened(tmp_path).find([key(n) for n in range(3)])
    assert [vector is None for vector in found] == [False, False, True]


def test_a_spoiled_record_counts_as_missing(opened, tmp_path, rows):
    store = opened(tmp_path, 8)
    store.add([key(n) for n in range(3)], rows[:3])
    store.close()
    (file,) = tmp_path.glob("*.vectors")
    data = bytearray(file.read_bytes())
    data[(32 + 32 + 4) + 40] ^= 1  # in the second record's vector
    file.write_bytes(data)
    again = opened(tmp_path)
    assert [vector is None for vector in again.find([key(n) for n in range(3)])] == [False, True, False]
    assert len(dict(again.items())) == 2
    # a second, whole record of the same key is found behind the spoiled one
    again.add([key(1)], rows[1:2])
    assert np.array_equal(opened(tmp_path).find([key(1)])[0], rows[1])


@pytest.mark.parametrize("bad", [np.zeros((1, 7)), np.zeros((2, 8)), np.full((1, 8), np.nan), np.full((1, 8), np.inf)])
def test_what_is_no_vector_is_not_kept(opened, tmp_path, bad):
    store = opened(tmp_path, 8)
    with pytest.raises(ValueError, match=r"expected shape|not finite"):
        store.add([key(0)], bad)
    assert store.find([key(0)]) == [None]
    assert list(tmp_path.iterdir()) == []


def test_another_length_or_no_store_is_told(opened, tmp_path, rows):
    with pytest.raises(InputError, match="has the embedder run"):
        opened(tmp_path / "none")
    opened(tmp_path, 8).add([key(0)], rows[:1])
    with pytest.raises(InputError, match="holds vectors of 8 numbers, not 9"):
        opened(tmp_path, 9)
    (tmp_path / "store.json").write_text("[]")
    with pytest.raises(InputError, match="says nothing of the vectors"):
        opened(tmp_path)


def test_what_was_added_before_a_kill_is_there(opened, tmp_path):
    program = """
        import hashlib, sys
        import numpy as np
        from dataflow.utils.vectors import VectorStore
        store = VectorStore(sys.argv[1], 8)
        for n in range(100_000):
            store.add([hashlib.sha256(str(n).encode()).hexdigest()], np.full((1, 8), n + 1.0))
            print(n, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    last = -1
    for line in child.stdout:
        last = int(line)
        if last == 200:
            child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = opened(tmp_path).find([key(n) for n in range(last + 1)])
    assert [None if row is None else row[0] for row in found] == [n + 1.0 for n in range(last + 1)]
