"""Pixels: other formats, smaller sizes, buckets of aspect ratios."""

from __future__ import annotations

import io
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.export.making import made, members, pixels

from dataflow.export import ExportOptions, export
from dataflow.export.buckets import bucket_for, bucket_sizes
from dataflow.export.pictures import PictureReader


def only(shop, end: str = "") -> bytes:
    (found,) = [
        data for name, data in members(shop.out / "train-000000.tar").items() if not name.endswith((".json", ".txt"))
    ]
    return found


def record(shop) -> dict:
    return json.loads(members(shop.out / "train-000000.tar")["000000001-000.json"])


@pytest.mark.parametrize(("encode", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_pictures_are_written_in_another_format(shop, encode, kind):
    source = shop.file("x.bmp", 1, (40, 30))
    shop.export(shop.table([{"prompt": "x", "image": source}]), encode=encode, quality=100)
    with Image.open(io.BytesIO(only(shop))) as image:
        assert (image.format, image.size) == (kind, (40, 30))
    difference = np.abs(pixels(only(shop)).astype(int) - made(1, (40, 30)))
    assert difference.max() == 0 if encode != "jpeg" else difference.mean() < 4


def test_provenance_outlives_another_format(shop):
    shop.export(shop.table([{"prompt": "x", "image": shop.picture(5, "x")}]), encode="jpeg")
    found = record(shop)
    assert (found["seed"], found["model"], found["revision"]) == (5, "some/model", "abc123")


def test_provenance_of_other_tools_is_read(shop):
    info = Image.Exif()
    path = shop.folder / "tool.jpg"
    info.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a fox\nSteps: 20, Seed: 42, Model: sdxl".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(path, exif=info)
    shop.export(shop.table([{"prompt": "a fox", "image": str(path)}]))
    assert (record(shop)["seed"], record(shop)["model"]) == (42, "sdxl")


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"seed": "seven", "model": 5, "params": [1]}'])
def test_provenance_of_the_wrong_shape_is_nothing(shop, text):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("dataflow", text)
    source = shop.file("x.png", 1, pnginfo=chunks)
    shop.export(shop.table([{"prompt": "x", "image": source}]))
    found = record(shop)
    assert [found[name] for name in ("seed", "model", "parameters")] == [None, None, None]


def test_transparency_is_kept_where_the_format_can(shop):
    path = shop.folder / "alpha.png"
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(path)
    table = shop.table([{"prompt": "x", "image": str(path)}])
    shop.export(table, encode="webp", quality=100)
    with Image.open(io.BytesIO(only(shop))) as image:
        assert image.mode == "RGBA"
    shop.export(table, encode="jpeg", overwrite=True)
    assert (pixels(only(shop)) == 255).all()


@pytest.mark.parametrize(
    ("size", "wanted"), [((100, 50), (40, 20)), ((50, 100), (20, 40)), ((40, 10), (40, 10)), ((4000, 2), (40, 1))]
)
def test_long_sides_are_shortened(shop, size, wanted):
    source = shop.file("x.png", 1, size)
    shop.export(shop.table([{"prompt": "x", "image": source}]), max_side=40)
    with Image.open(io.BytesIO(only(shop))) as image:
        assert image.size == wanted == (record(shop)["width"], record(shop)["height"])
    if size == wanted:
        assert only(shop) == (shop.folder / "own" / "x.png").read_bytes()


def test_a_photo_on_its_side_has_its_upright_size(shop):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = shop.file("x.jpg", 1, (40, 20), exif=exif)
    table = shop.table([{"prompt": "x", "image": source}])
    shop.export(table)
    assert (record(shop)["width"], record(shop)["height"]) == (20, 40)
    shop.export(table, bucket_resolution=32, bucket_step=8, overwrite=True)
    assert record(shop)["bucket"] == "16x32" if (16, 32) in bucket_sizes(32, 8, 2.0) else record(shop)["bucket"]
    with Image.open(io.BytesIO(only(shop))) as image:
        assert image.height > image.width


# Buckets


def test_buckets_of_sdxl():
    sizes = bucket_sizes(1024, 64, 2.0)
    assert (1024, 1024) in sizes
    assert (1152, 896) in sizes
    assert (832, 1216) in sizes
    assert all(w % 64 == h % 64 == 0 and w * h <= 1024**2 and max(w, h) <= 2 * min(w, h) for w, h in sizes)
    assert bucket_sizes(1024, 64, 1.0) == ((1024, 1024),)


@given(width=st.integers(1, 9000), height=st.integers(1, 9000), aspect=st.floats(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_other_bucket_is_nearer_and_a_turned_picture_has_the_turned_bucket(width, height, aspect):
    sizes = bucket_sizes(512, 64, aspect)
    found = bucket_for((width, height), sizes)
    ratio = width / height

    def far(size: tuple[int, int]) -> float:
        return abs(np.log(size[0] / size[1] / ratio))

    assert far(found) <= min(map(far, sizes)) + 1e-8
    turned = bucket_for((height, width), sizes)
    assert abs(far((turned[1], turned[0])) - far(found)) < 1e-8


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_fill_their_bucket(shop, fit):
    rows = [
        {"prompt": f"p{n}", "image": shop.file(f"{n}.png", n, size)}
        for n, size in enumerate([(200, 100), (90, 90), (70, 200)])
    ]
    shop.export(shop.table(rows), bucket_resolution=64, bucket_step=16, bucket_fit=fit)
    found = members(shop.out / "train-000000.tar")
    buckets = {}
    for number in range(1, 4):
        facts = json.loads(found[f"{number:09d}-000.json"])
        with Image.open(io.BytesIO(found[f"{number:09d}-000.png"])) as image:
            assert f"{image.width}x{image.height}" == facts["bucket"] == f"{facts['width']}x{facts['height']}"
        buckets[facts["bucket"]] = 1
    assert len(buckets) == 3
    assert shop.index()["shards"][0]["samples"] == 3
    assert f"| {next(iter(buckets))} |" in (shop.out / "README.md").read_text()


def test_a_crop_keeps_the_middle_and_padding_keeps_all(shop):
    path = shop.folder / "stripes.png"
    stripes = np.zeros((64, 256, 3), np.uint8)
    stripes[:, :64], stripes[:, 64:192], stripes[:, 192:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(stripes).save(path)
    table = shop.table([{"prompt": "x", "image": str(path)}])
    shop.export(table, bucket_resolution=64, bucket_step=64, bucket_max_aspect=1)
    assert (pixels(only(shop)) == (0, 255, 0)).all()
    shop.export(table, bucket_resolution=64, bucket_step=64, bucket_max_aspect=1, bucket_fit="pad", overwrite=True)
    padded = pixels(only(shop))
    assert (padded[0] == 255).all()
    assert padded[32, 2, 0] > 200 > padded[32, 2, 1]
    assert padded[32, -3, 2] > 200


def test_source_and_result_share_a_bucket(shop):
    row = {
        "prompt": "x",
        "images": [shop.file("s.png", 1, (100, 100))],
        "edited_images": [shop.picture(2, "x", (120, 60))],
    }
    shop.export(shop.table([row]), format="jsonl", bucket_resolution=64, bucket_step=16)
    found = json.loads((shop.out / "train.jsonl").read_text())
    sizes = [pixels(shop.out / found[name]).shape for name in ("source_image", "edited_image")]
    assert sizes[0] == sizes[1] == (found["height"], found["width"], 3)


def test_a_picture_that_has_its_buckets_size_is_not_touched(shop):
    source = shop.file("x.png", 1, (64, 64))
    shop.export(shop.table([{"prompt": "x", "image": source}]), bucket_resolution=64)
    assert only(shop) == (shop.folder / "own" / "x.png").read_bytes()


def test_webp_has_a_largest_side(shop):
    source = shop.file("x.png", 1, (16_400, 1))
    assert shop.export(shop.table([{"prompt": "x", "image": source}]), encode="webp").problems == {"too_large": 1}


# Side by side, in order, in bounded memory


def test_pictures_are_read_side_by_side_but_only_a_few_ahead(shop, tmp_path, monkeypatch):
    table = shop.scored(30, 1)
    lock, running, most, read_ahead = threading.Lock(), [0], [0], [0]
    settled = [0]
    read = PictureReader.read

    def watched(self, paths):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 if int(paths[0][-6], 16) % 2 else 0.01)
        found = read(self, paths)
        with lock:
            running[0] -= 1
            read_ahead[0] += 1
            assert read_ahead[0] - settled[0] <= 4 * 6
        return found

    def progress(done: int, total: int) -> None:
        settled[0] = done
        assert total == 30

    monkeypatch.setattr(PictureReader, "read", watched)
    export(table, tmp_path / "four", ExportOptions(workers=4), progress=progress)
    names = list(members(tmp_path / "four" / "train-000000.tar"))
    assert names == sorted(names, key=lambda name: name.split(".")[0])
    assert 1 < most[0] <= 4
