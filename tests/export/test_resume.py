"""A killed export goes on where it was, to the same bytes; another export is never mistaken for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
import orjson
import pytest
from tests.export.making import files_of

from dataflow.errors import ConfigError
from dataflow.export import ExportOptions, export
from dataflow.export.files import STAGE
from dataflow.export.ledger import Ledger

# A slow disk: every picture takes a moment, so that the kill comes in the middle of a shard.
SLOW = """
import sys, time, orjson
from dataflow.export import ExportOptions, export
from dataflow.export.pictures import PictureReader
read = PictureReader.read
def slowly(self, paths):
    time.sleep(0.02)
    return read(self, paths)
PictureReader.read = slowly
export(sys.argv[1], sys.argv[2], ExportOptions(**orjson.loads(sys.argv[3])))
"""


def kill_after(shards: int, table: Path, output: Path, options: dict) -> None:
    """Run an export in a process of its own and kill it once that many shards are recorded."""
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(table), str(output), orjson.dumps(options).decode()])
    journal = output / STAGE / "journal"
    try:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b'"s":"shard"') < shards:
            assert child.poll() is None, "the export ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (output / "index.json").exists()


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl"])
def test_a_killed_export_ends_in_the_same_bytes(shop, tmp_path, kind):
    table = shop.scored(20, 2)
    for row in (3, 9, 15):
        Path(shop.row(row)["images"][0]).unlink()
    options = {"format": kind, "shard_samples": 3, "validation": 0.3, "test": 0.2}
    if kind == "jsonl":
        options["encode"] = "webp"
    kill_after(3, table, shop.out, options)
    summary = shop.export(table, **options)
    assert summary.resumed >= 3
    assert summary.problems == {"missing": 3}
    whole = export(table, tmp_path / "whole", ExportOptions(**options))
    assert whole.resumed == 0
    assert files_of(shop.out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["hpdv3", "imgedit", "diffusiondb"])
def test_presets_resume_likewise(shop, tmp_path, preset):
    table = shop.edits(16) if preset == "imgedit" else shop.scored(16, 2)
    options = {"preset": preset, "shard_samples": 3}
    if preset == "hpdv3":
        options["score_key"] = "judge.value"
    kill_after(2, table, shop.out, options)
    assert shop.export(table, **options).resumed >= 2
    export(table, tmp_path / "whole", ExportOptions(**options))
    assert files_of(shop.out) == files_of(tmp_path / "whole")


def test_a_killed_lance_export_has_the_same_rows_and_no_leftovers(shop):
    table = shop.scored(10, 2)
    options = {"format": "lance", "shard_samples": 3, "row_group_bytes": 1}
    kill_after(2, table, shop.out, options)
    assert shop.export(table, **options).resumed >= 2
    found = lance.dataset(str(shop.out / "train.lance"))
    rows = found.to_table(columns=["id", "sha256"]).to_pylist()
    assert [row["id"] for row in rows] == [f"{row + 1:09d}-{k:03d}" for row in range(10) for k in range(2)]
    referenced = {file.path for fragment in found.get_fragments() for file in fragment.data_files()}
    assert {path.name for path in (shop.out / "train.lance" / "data").glob("*.lance")} == {
        Path(path).name for path in referenced
    }


def test_finished_shards_are_not_written_again(shop):
    table = shop.scored(12, 2)
    options = {"shard_samples": 4}
    kill_after(2, table, shop.out, options)
    before = {path.name: path.stat().st_mtime_ns for path in shop.out.glob("*.tar")}
    assert len(before) >= 2
    shop.export(table, **options)
    after = {path.name: path.stat().st_mtime_ns for path in shop.out.glob("*.tar")}
    recorded = sorted(before)[:2]
    assert {name: after[name] for name in recorded} == {name: before[name] for name in recorded}


@pytest.mark.parametrize("step", ["finish", "card"])
@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "lance"])
def test_a_kill_at_the_very_end_costs_nothing(shop, monkeypatch, kind, step):
    """Between the last shard and the index: files may have their last names already."""
    table = shop.scored(4, 2)
    name = {"finish": "dataflow.export.exporter.CardFacts", "card": "dataflow.export.exporter._shard_facts"}[step]

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(name, dies)
        with pytest.raises(KeyboardInterrupt):
            shop.export(table, format=kind, shard_samples=3)
    assert not (shop.out / "index.json").exists()
    summary = shop.export(table, format=kind, shard_samples=3)
    assert (summary.resumed, summary.shards, summary.written) == (3, 3, 8)


def test_a_finished_export_is_left_as_it_is(shop):
    table = shop.scored(4, 2)
    first = shop.export(table, shard_samples=3)
    before = {path: path.stat().st_mtime_ns for path in shop.out.rglob("*")}
    again = shop.export(table, shard_samples=3)
    assert (again.resumed, again.written, again.splits) == (3, first.written, first.splits)
    assert {path: path.stat().st_mtime_ns for path in shop.out.rglob("*")} == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("change", ["options", "table"])
def test_another_export_is_refused_until_it_may_begin_anew(shop, state, change):
    table = shop.scored(8, 2)
    if state == "finished":
        shop.export(table, shard_samples=3)
    else:
        kill_after(1, table, shop.out, {"shard_samples": 3})
    options = {"shard_samples": 3}
    if change == "options":
        options["quality"] = 80
    else:
        table = shop.scored(7, 2)
    told = "quality was 95, now 80" if change == "options" else "the table has changed"
    with pytest.raises(ConfigError, match=rf"holds an? {state} export of something else \({told}\).*--overwrite"):
        shop.export(table, **options)
    (shop.out / "mine.txt").write_text("mine")
    summary = shop.export(table, overwrite=True, **options)
    assert summary.resumed == 0
    assert len(list(shop.out.glob("*.tar"))) == summary.shards
    assert (shop.out / "mine.txt").exists()


def test_beginning_anew_in_another_format_leaves_nothing_of_the_first(shop):
    table = shop.scored(4, 2)
    shop.export(table, format="folder", captions=True)
    shop.export(table, format="parquet", overwrite=True)
    assert not (shop.out / "train").exists()
    assert {path.name for path in shop.out.iterdir()} == {
        "data",
        "index.json",
        "README.md",
        "SHA256SUMS",
        "left_out.jsonl",
    }


def test_a_finished_export_with_a_lost_file_says_so(shop):
    table = shop.scored(4, 2)
    shop.export(table, shard_samples=3)
    (shop.out / "train-000001.tar").unlink()
    with pytest.raises(ConfigError, match=r"train-000001\.tar is missing.*--overwrite"):
        shop.export(table, shard_samples=3)
    assert shop.export(table, shard_samples=3, overwrite=True).shards == 3


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_a_shard_that_is_lost_while_unfinished_is_written_again(shop, tmp_path, kind):
    table = shop.scored(12, 2)
    options = {"format": kind, "shard_samples": 3}
    kill_after(4, table, shop.out, options)
    lost = shop.out / ("train-000001.tar" if kind == "webdataset" else "train/000001/000000002-001.png")
    lost.unlink()
    assert shop.export(table, **options).resumed == 1
    export(table, tmp_path / "whole", ExportOptions(**options))
    assert files_of(shop.out) == files_of(tmp_path / "whole")


def test_a_torn_line_ends_what_is_known(tmp_path):
    ledger = Ledger(tmp_path / "journal", {"version": 1})
    ledger.open(lambda record: True)
    shard = {"split": "train", "number": 0, "last": (3, 0), "tally": {}, "files": []}
    ledger.add_shard(shard)
    ledger.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"s":"shard","split":"tr')
    again = Ledger(tmp_path / "journal", {"version": 1})
    again.open(lambda record: True)
    assert len(again.shards["train"]) == 1
    assert again.covers("train", (3, 0))
    assert not again.covers("train", (3, 1))
    again.add_shard(shard | {"number": 1, "last": (9, 0)})
    again.close()
    assert (tmp_path / "journal").read_bytes().count(b"\n") == 3
