"""What cannot be exported is counted, told with row and path, and takes nothing else with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.export.making import members

from dataflow.errors import CacheBusyError, ConfigError, StepError
from dataflow.export import ExportOptions, export
from dataflow.export.files import STAGE
from dataflow.runtime.lock import cache_lock


def test_every_row_is_accounted_for(shop):
    refused = {"prompt": "a", "images": [], "images_error": {"status": "refused", "reason": "safety", "message": "no"}}
    failed = {"prompt": "a", "images": [], "images_error": {"status": "failed", "reason": "timeout", "message": "slow"}}
    partly = shop.row(1, 1, images_error={"status": "failed", "reason": "timeout", "message": "slow"})
    rows = [
        shop.row(0, 2),
        refused,
        failed,
        {"prompt": "a", "images": [""]},
        "{not json",
        {"prompt": "", "images": [shop.picture(50, "x")]},
        {"prompt": "a", "images": 5},
        partly,
    ]
    summary = shop.export(shop.table(rows))
    assert (summary.rows, summary.used, summary.written, summary.incomplete) == (8, 2, 3, 1)
    assert summary.left_out == {"bad_column": 1, "bad_row": 1, "failed": 1, "no_image": 1, "no_prompt": 1, "refused": 1}
    assert [(each["row"], each["reason"]) for each in shop.left_out()] == [
        (2, "refused"),
        (3, "failed"),
        (4, "no_image"),
        (5, "bad_row"),
        (6, "no_prompt"),
        (7, "bad_column"),
    ]
    assert "timeout: slow" in shop.left_out()[1]["message"]


def damage(path: str, how: str) -> None:
    file = Path(path)
    data = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "half":
            file.write_bytes(data[: len(data) // 2])
        case "bit":
            file.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
        case "empty":
            file.write_bytes(b"")
        case "html":
            file.write_bytes(b"<html>not found</html>")
        case "no end":
            file.write_bytes(data[:-12])


@pytest.mark.parametrize("check", ["checksum", "decode"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "missing"),
        ("half", "truncated"),
        ("bit", "truncated"),
        ("empty", "empty"),
        ("html", "not_an_image"),
        ("no end", "truncated"),
    ],
)
def test_a_damaged_picture_is_told_and_takes_nothing_with_it(shop, how, reason, check):
    table = shop.scored(3, 2)
    path = shop.row(1)["images"][0]
    damage(path, how)
    summary = shop.export(table, check=check)
    assert (summary.samples, summary.written, summary.problems) == (6, 5, {reason: 1})
    (told,) = shop.left_out()
    assert (told["row"], told["sample"], told["reason"], told["path"]) == (2, 0, reason, path)
    names = [name for name in members(shop.out / "train-000000.tar") if name.endswith(".json")]
    assert "000000002-000.json" not in names
    assert len(names) == 5


@pytest.mark.parametrize("kind", ["jpg", "webp", "gif", "tif"])
def test_files_without_checksums_are_decoded(shop, kind):
    path = shop.file(f"x.{kind}", 1, (64, 64))
    table = shop.table([{"prompt": "x", "image": path}, {"prompt": "y", "image": shop.picture(2, "y")}])
    damage(path, "half")
    assert shop.export(table).problems == {"truncated": 1}


def test_an_edit_whose_source_is_gone_is_no_edit(shop):
    table = shop.edits(2)
    Path(shop.folder / "own" / "source0.png").unlink()
    summary = shop.export(table, split_by="source", test=0.5)
    assert (summary.written, summary.problems) == (1, {"missing": 1})


def test_more_than_one_problem_in_a_split_is_told_in_order(shop):
    table = shop.scored(6, 1)
    for row in (0, 2, 5):
        Path(shop.folder / "images").joinpath(shop.row(row, 1)["images"][0]).unlink()
    shop.export(table, shard_samples=1)
    assert [each["row"] for each in shop.left_out()] == [1, 3, 6]


def test_paths_are_looked_for_beside_the_table(shop, tmp_path, monkeypatch):
    shop.file("near.png", 1)
    table = shop.table([{"prompt": "x", "image": "own/near.png"}])
    monkeypatch.chdir("/")
    assert shop.export(table).written == 1


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0.png", "https://host/x.png", "/dev/null", "."])
def test_names_that_are_no_files_are_problems(shop, name):
    summary = shop.export(shop.table([{"prompt": "x", "image": name}, {"prompt": "y", "image": shop.picture(2, "y")}]))
    assert (summary.written, sum(summary.problems.values())) == (1, 1)


# Disk, folder, table


LIMITED = """
import json, resource, signal, sys
from dataflow.errors import StepError
from dataflow.export import ExportOptions, export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
try:
    export(sys.argv[1], sys.argv[2], ExportOptions(**json.loads(sys.argv[3])))
except StepError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl", "hpdv3"])
def test_a_full_disk_stops_the_export_and_nothing_looks_finished(shop, kind):
    table = shop.scored(40, 1)
    options = {"format": kind, "shard_samples": 30}
    if kind == "hpdv3":
        table = shop.scored(40, 2)
        options = {"preset": "hpdv3", "score_key": "judge.value", "shard_samples": 30}
    command = [sys.executable, "-c", LIMITED, str(table), str(shop.out), json.dumps(options), "8000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full; free some space" in done.stdout, done.stderr
    assert not (shop.out / "index.json").exists()
    assert shop.export(table, **options).written == 40


def test_lance_tells_of_a_full_disk_too(shop):
    table = shop.scored(40, 1)
    options = {"format": "lance", "row_group_bytes": 1}
    command = [sys.executable, "-c", LIMITED, str(table), str(shop.out), json.dumps(options), "8000"]
    assert "cannot be written" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not (shop.out / "index.json").exists()
    assert shop.export(table, **options).written == 40


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl", "lance", "hpdv3"])
def test_an_interrupted_export_lets_go_of_everything(shop, kind):
    table = shop.scored(9, 2)
    options = {"preset": "hpdv3", "score_key": "judge.value"} if kind == "hpdv3" else {"format": kind}

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(table, shop.out, ExportOptions(shard_samples=2, **options), progress=stop)
    assert not (shop.out / "index.json").exists()
    assert shop.export(table, shard_samples=2, **options).resumed == 2


def test_an_output_that_is_a_file_is_refused(shop):
    shop.out.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        shop.export(shop.scored(1, 1))


def test_a_disk_that_fills_up_keeps_finished_shards(shop):
    table = shop.table([shop.row(number, 1) if number < 20 else big(shop, number) for number in range(25)])
    command = [sys.executable, "-c", LIMITED, str(table), str(shop.out), json.dumps({"shard_samples": 2}), "30000"]
    assert "the disk is full" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shop.export(table, format="webdataset", shard_samples=2).resumed == 10


def big(shop, number: int) -> dict:
    return {"conversations": f"big {number}", "images": [shop.picture(number, f"big {number}", (128, 128))]}


def test_a_folder_of_something_else_is_left_alone(shop):
    shop.out.mkdir()
    (shop.out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        shop.export(shop.scored(1, 1), overwrite=True)
    assert (shop.out / "mine.txt").read_text() == "mine"


def test_two_exports_to_one_folder_are_refused(shop):
    table = shop.scored(1, 1)
    (shop.out / STAGE).mkdir(parents=True)
    with cache_lock(shop.out / STAGE), pytest.raises(CacheBusyError, match="export to another folder"):
        export(table, shop.out, ExportOptions())


def test_a_table_that_changes_is_noticed(shop, monkeypatch):
    table = shop.scored(3, 1)

    def meddle(done: int, total: int) -> None:
        with table.open("ab") as file:
            file.write(b"\n")

    with pytest.raises(StepError, match="changed while it was exported"):
        export(table, shop.out, ExportOptions(), progress=meddle)
    assert not (shop.out / "index.json").exists()
