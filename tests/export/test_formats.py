"""What was written is read back by the libraries that it is written for, and is exactly what went in."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import datasets
import lance
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from tests.export.making import Workshop, files_of, made, members, pixels

from dataflow.errors import ConfigError
from dataflow.export import ExportOptions, export
from dataflow.utils.storage import FileStorage


def read_webdataset(shop: Workshop, pattern: str = "*.tar") -> list[dict[str, Any]]:
    urls = sorted(str(path) for path in shop.out.glob(pattern))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its files open
        found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        gc.collect()
    return found


def load(shop: Workshop, *builder: str, **options: Any) -> Any:
    builder = builder or (str(shop.out),)
    return datasets.load_dataset(*builder, cache_dir=str(shop.folder / "hf"), **options)


@pytest.mark.parametrize("samples", [1, 3])
def test_webdataset_reads_every_picture_with_its_own_text_and_score(shop, samples):
    summary = shop.export(shop.scored(4, samples), shard_samples=5)
    assert (summary.format, summary.layout) == ("webdataset", "text_image")
    found = read_webdataset(shop)
    assert len(found) == summary.written == 4 * samples
    for place, each in enumerate(found):
        row, k = divmod(place, samples)
        assert each["__key__"] == f"{row + 1:09d}-{k:03d}"
        assert each["txt"] == f"a red circle number {row}" == each["json"]["prompt"]
        assert np.array_equal(each["png"], made(100 * row + k))
        assert each["json"]["judge"] == {"value": row + k / 10, "reason": f"row {row}, picture {k}"}
        assert each["json"]["judge_status"] == "ok"
        assert each["json"]["seed"] == 100 * row + k
        assert each["json"]["model"] == "some/model"
        assert json.loads(each["json"]["parameters"]) == {"num_inference_steps": 12, "guidance_scale": 3.5}


def test_shards_have_no_gaps_and_checksums_that_hold(shop):
    summary = shop.export(shop.scored(5, 2), shard_samples=3, validation=0.3)
    for split, count in summary.splits.items():
        names = sorted(path.name for path in shop.out.glob(f"{split}-*.tar"))
        assert names == [f"{split}-{number:06d}.tar" for number in range(len(names))]
        assert sum(each["samples"] for each in shop.index()["shards"] if each["split"] == split) == count
    for shard in shop.index()["shards"]:
        (file,) = shard["files"]
        assert hashlib.sha256((shop.out / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shop.out, capture_output=True, text=True, check=True)
    assert done.stdout.count("OK") == summary.shards


def test_the_same_export_has_the_same_bytes_whenever_it_is_made(shop, tmp_path):
    table = shop.scored(6, 2)
    options = ExportOptions(shard_samples=4, test=0.3, encode="webp", quality=80)
    export(table, tmp_path / "a", options)
    export(table, tmp_path / "b", ExportOptions(shard_samples=4, test=0.3, encode="webp", quality=80, workers=1))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_files_are_copied_untouched_where_nothing_is_asked_for(shop):
    table = shop.scored(2, 2)
    shop.export(table)
    stored = [(shop.io.save_path / name).read_bytes() for name, _ in shop.io.existing()]
    pictures = [data for name, data in members(shop.out / "train-000000.tar").items() if name.endswith(".png")]
    assert sorted(pictures) == sorted(stored)


def test_shards_are_cut_by_bytes(shop):
    table = shop.scored(6, 1)
    size = Path(shop.row(0, 1)["images"][0]).stat().st_size
    summary = shop.export(table, shard_bytes=int(2.5 * size) + 1024)
    assert summary.shards == 3
    assert {each["samples"] for each in shop.index()["shards"]} == {2}


def test_a_sample_larger_than_a_shard_has_one_for_itself(shop):
    assert shop.export(shop.scored(3, 1), shard_bytes=1).shards == 3


def test_datasets_reads_parquet_with_image_columns(shop):
    summary = shop.export(shop.scored(5, 2), format="parquet", validation=0.4, shard_samples=3, row_group_bytes=1)
    found = load(shop)
    assert {name: len(split) for name, split in found.items()} == summary.splits
    features = next(iter(found.values())).features
    assert isinstance(features["image"], datasets.Image)
    seen = 0
    for split in found.values():
        for each in split:
            row, k = int(each["id"][:9]) - 1, int(each["id"][10:])
            assert np.array_equal(np.asarray(each["image"]), made(100 * row + k))
            assert each["judge"] == {"value": row + k / 10, "reason": f"row {row}, picture {k}"}
            assert each["prompt"] == f"a red circle number {row}"
            assert each["sha256"] == hashlib.sha256(Path(shop.row(row)["images"][k]).read_bytes()).hexdigest()
            seen += 1
    assert seen == 10


def test_parquet_files_are_numbered_by_their_count_and_name_their_features(shop):
    shop.export(shop.scored(5, 1), format="parquet", shard_samples=2)
    names = sorted(path.name for path in (shop.out / "data").iterdir())
    assert names == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    schema = pq.read_schema(shop.out / "data" / names[0])
    told = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert told["image"] == {"_type": "Image"}
    assert datasets.Features.from_dict(told).arrow_schema.field("image").type == schema.field("image").type


def test_parquet_without_its_card_is_read_the_same(shop):
    shop.export(shop.scored(3, 1), format="parquet")
    (shop.out / "README.md").unlink()
    found = load(shop, "parquet", data_files=str(shop.out / "data" / "*.parquet"), split="train")
    assert np.array_equal(np.asarray(found[1]["image"]), made(100))


def test_row_groups_are_as_large_as_asked_for(shop):
    shop.export(shop.scored(6, 1), format="parquet", row_group_bytes=3 * 1200)
    file = pq.ParquetFile(shop.out / "data" / "train-00000-of-00001.parquet")
    assert 1 < file.num_row_groups < 6


def test_an_image_folder_is_read_by_datasets(shop):
    shop.export(shop.scored(3, 2), format="folder", shard_samples=4, captions=True)
    found = load(shop, "imagefolder", data_dir=str(shop.out / "train"), split="train")
    by_id = {each["id"]: each for each in found}
    assert len(by_id) == 6
    for row in range(3):
        for k in range(2):
            each = by_id[f"{row + 1:09d}-{k:03d}"]
            assert np.array_equal(np.asarray(each["image"]), made(100 * row + k))
            assert each["text"] == f"a red circle number {row}"
            caption = shop.out / "train" / f"{(2 * row + k) // 4:06d}" / f"{row + 1:09d}-{k:03d}.txt"
            assert caption.read_text() == each["text"]


def test_an_image_folder_of_edits_has_the_columns_of_diffusers(shop):
    shop.export(shop.edits(3), format="folder")
    lines = (shop.out / "train" / "metadata.jsonl").read_text().splitlines()
    assert list(json.loads(lines[0]))[:3] == ["input_image_file_name", "edit_prompt", "edited_image_file_name"]
    found = load(shop, "imagefolder", data_dir=str(shop.out / "train"), split="train")
    for each in found:
        row = int(each["id"][:9]) - 1
        assert np.array_equal(np.asarray(each["input_image"]), made(5000 + row))
        assert np.array_equal(np.asarray(each["edited_image"]), made(6000 + 100 * row))
        assert each["edit_prompt"] == f"make circle {row} green"


def test_checksums_of_folders_cover_every_picture(shop):
    summary = shop.export(shop.edits(3), format="folder")
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shop.out, capture_output=True, text=True, check=True)
    assert done.stdout.count("OK") == summary.images + 1


def test_json_lines_name_the_pictures_where_they_are(shop):
    shop.export(shop.scored(2, 2), format="jsonl")
    for line in (shop.out / "train.jsonl").read_text().splitlines():
        each = json.loads(line)
        row, k = int(each["id"][:9]) - 1, int(each["id"][10:])
        assert not Path(each["image"]).is_absolute()
        assert np.array_equal(pixels(shop.out / each["image"]), made(100 * row + k))
    assert len(load(shop, "json", data_files=str(shop.out / "train.jsonl"), split="train")) == 4


def test_json_lines_by_address_are_quoted(shop):
    table = shop.table([{"prompt": "x", "image": shop.file("a b#ü.png", 1)}])
    shop.export(table, format="jsonl", base_url="https://host/data/", image_root=str(shop.folder / "own"))
    assert json.loads((shop.out / "train.jsonl").read_text())["image"] == "https://host/data/a%20b%23%C3%BC.png"


def test_json_lines_with_copies_stand_alone(shop):
    shop.export(shop.scored(2, 1), format="jsonl", encode="png")
    for line in (shop.out / "train.jsonl").read_text().splitlines():
        each = json.loads(line)
        assert each["image"].startswith("images/train/000000/")
        assert hashlib.sha256((shop.out / each["image"]).read_bytes()).hexdigest() == each["sha256"]


def test_lance_reads_blobs_lazily(shop):
    shop.export(shop.scored(4, 2), format="lance", shard_samples=3, row_group_bytes=1500)
    found = lance.dataset(str(shop.out / "train.lance"))
    assert found.count_rows() == 8
    rows = found.to_table(columns=["id", "prompt", "judge", "seed"]).to_pylist()
    blobs = found.take_blobs("image", indices=list(range(8)))
    for place, (row, blob) in enumerate(zip(rows, blobs, strict=True)):
        number, k = divmod(place, 2)
        assert row["id"] == f"{number + 1:09d}-{k:03d}"
        assert row["judge"]["value"] == number + k / 10
        assert np.array_equal(pixels(blob.read()), made(100 * number + k))


def test_lance_keeps_lists_of_pictures(shop):
    row = {
        "prompt": "x",
        "images": [shop.file("s.png", 1), shop.file("r.png", 2)],
        "edited_images": [shop.picture(3, "x")],
    }
    shop.export(shop.table([row]), format="lance")
    found = lance.dataset(str(shop.out / "train.lance")).to_table(columns=["reference_images"]).to_pylist()
    assert np.array_equal(pixels(found[0]["reference_images"][0]), made(2))


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl", "lance"])
def test_a_table_without_rows_is_an_export_without_samples(shop, kind):
    summary = shop.export(shop.table([]), format=kind)
    assert (summary.rows, summary.written, summary.shards) == (0, 0, 0)
    assert shop.index()["summary"]["rows"] == 0


def test_an_empty_parquet_export_still_loads(shop):
    table = shop.table([{"prompt": "x", "images": []}])
    assert shop.export(table, format="parquet").left_out == {"no_image": 1}
    assert pq.read_table(shop.out / "data" / "train-00000-of-00001.parquet").num_rows == 0


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl", "lance"])
def test_one_row_is_a_dataset(shop, kind):
    summary = shop.export(shop.scored(1, 1), format=kind)
    assert (summary.written, summary.shards) == (1, 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_every_format_of_picture_goes_in_as_it_is(shop, suffix):
    path = shop.file(f"x.{suffix}", 1)
    shop.export(shop.table([{"prompt": "x", "image": path}]))
    assert members(shop.out / "train-000000.tar")[f"000000001-000.{suffix}"] == Path(path).read_bytes()


def test_the_card_alone_is_enough_to_load_every_format(shop, tmp_path):
    table = shop.scored(8, 2)
    for kind in ("webdataset", "parquet", "folder", "jsonl"):
        options = ExportOptions(format=kind, test=0.4, license="cc-by-4.0", name=kind)
        summary = export(table, tmp_path / kind, options)
        found = datasets.load_dataset(str(tmp_path / kind), cache_dir=str(tmp_path / "hf"))
        assert {name: len(split) for name, split in found.items()} == summary.splits
        assert len(summary.splits) == 2
        if kind != "jsonl":
            each = found["test"][0]
            picture = each["png"] if kind == "webdataset" else each["image"]
            facts = each["json"] if kind == "webdataset" else each
            row, k = int(facts["id"][:9]) - 1, int(facts["id"][10:])
            assert np.array_equal(np.asarray(picture), made(100 * row + k))


def test_an_address_outside_its_root_is_refused(shop):
    with pytest.raises(ConfigError, match="give image_root"):
        shop.export(shop.scored(1, 1), format="jsonl", base_url="https://host", image_root=str(shop.folder / "own"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": True}, "captions is for the format folder"),
        ({"format": "parquet", "copy_images": True}, "copy_images is for the format jsonl"),
        ({"base_url": "https://host"}, "base_url is for the format jsonl"),
        ({"format": "jsonl", "base_url": "https://host", "max_side": 5}, "as they are elsewhere"),
        ({"published_only": True}, "needs a preset"),
    ],
)
def test_options_without_effect_are_refused(shop, options, message):
    with pytest.raises(ConfigError, match=message):
        shop.export(shop.scored(1, 1), **options)


def test_a_shard_of_a_plain_tar_program(shop):
    shop.export(shop.scored(2, 2))
    listed = subprocess.run(
        ["tar", "-tvf", str(shop.out / "train-000000.tar")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) == 12
    assert all(line.startswith("-rw-r--r-- 0/0") and "1970-01-01" in line for line in listed)


def test_large_pictures_in_lance_lie_beside_the_table(shop):
    rows = [{"prompt": f"p{n}", "image": shop.file(f"{n}.png", n, (200, 200))} for n in range(6)]
    shop.export(shop.table(rows), format="lance", row_group_bytes=1)
    found = lance.dataset(str(shop.out / "train.lance"))
    blobs = found.take_blobs("image", indices=list(range(6)))
    assert all(np.array_equal(pixels(blob.read()), made(n, (200, 200))) for n, blob in enumerate(blobs))
    assert any(file["name"].endswith(".blob") for file in shop.index()["files"])
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shop.out, capture_output=True, text=True, check=True)
    assert done.stdout.count("OK") == len(shop.index()["files"])


def test_saying_what_would_be_found_out_is_no_other_export(shop):
    table = shop.scored(2, 1)
    shop.export(table)
    assert shop.export(table, format="webdataset", layout="text_image").resumed == 1


def test_a_table_of_another_kind_is_read_as_well(shop):
    source = FileStorage(str(shop.scored(3, 2)), cache_path=str(shop.folder / "c"), cache_type="parquet").step()
    source.write(source.read("dict"))
    shop.export(source.output_path)
    found = read_webdataset(shop)
    assert [each["json"]["judge"]["value"] for each in found] == [0.0, 0.1, 1.0, 1.1, 2.0, 2.1]
