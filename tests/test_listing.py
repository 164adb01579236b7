"""A store's files: the same whether this process looks or a child of it."""

import subprocess
import sys

import pytest

from dataflow import listing
from dataflow.io import ImageIO


def fill(root, count):
    expected = {}
    for number in range(count):
        name = f"{number % 2:02x}/{number % 2:02x}{number:030x}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * (number % 50))
        expected[name] = number % 50
    (root / "00" / "notes.txt").write_bytes(b"mine")
    (root / "others").mkdir()
    return expected


@pytest.fixture
def children(monkeypatch):
    """The processes that were started."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(listing.subprocess, "Popen", Popen)
    return started


@pytest.mark.parametrize(("count", "processes"), [(10, 0), (2 * listing.MANY, 1)])
def test_every_image_is_listed(tmp_path, children, count, processes):
    root = tmp_path / "Bilder ü"
    expected = fill(root, count)
    found = list(ImageIO(root).existing())
    assert (dict(found), len(found)) == (expected, count)
    assert [child.returncode for child in children] == [0] * processes


def test_a_child_that_fails_is_replaced(tmp_path, children, monkeypatch):
    expected = fill(tmp_path, 2 * listing.MANY)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert dict(listing.images(str(tmp_path))) == expected
    assert len(children) == 1


def test_a_listing_that_nobody_reads_ends(tmp_path, children):
    fill(tmp_path, 20_000)
    files = listing.images(str(tmp_path))
    next(files)
    files.close()
    assert children[0].wait(30) is not None


def test_no_folder_is_no_image(tmp_path):
    assert list(listing.images(str(tmp_path / "none"))) == []
