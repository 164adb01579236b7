"""A PNG of a service is kept as it came, but for what stands beside its pixels."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataflow import png
from dataflow.io import ImageIO

NAME = "ab" * 16
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)


def encoded(mode="RGB", **options):
    buffer = BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def kinds(data):
    return [kind for kind, _ in png._chunks(data)]


def image_data(data):
    return b"".join(body for kind, body in png._chunks(data) if kind == b"IDAT")


def saved(folder, data):
    store = ImageIO(folder)
    found = store.save(data, NAME, {"prompt": "a fox 狐", "request_id": NAME})
    path = folder / found.name
    assert store.read_metadata(path)["prompt"] == "a fox 狐"
    assert found.bytes == path.stat().st_size
    return path


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_image_data_stays(tmp_path, mode):
    data = encoded(mode, compress_level=9)
    written = saved(tmp_path, data).read_bytes()
    assert image_data(written) == image_data(data)
    assert np.array_equal(np.asarray(Image.open(BytesIO(written))), np.asarray(Image.open(BytesIO(data))))


def test_what_a_decoder_does_not_need_is_left_behind(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "<script>alert(1)</script>")
    info.add_itxt("parameters", "a lie", zip=True)
    data = encoded(pnginfo=info, dpi=(300, 300)) + b"PK\x03\x04 and a whole archive"
    written = saved(tmp_path, data).read_bytes()
    assert set(kinds(written)) <= {b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"}
    for word in (b"script", b"a lie", b"archive", b"pHYs"):
        assert word not in written


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded("L"), id="gray"),
        pytest.param(encoded("P"), id="palette"),
        pytest.param(encoded("RGB", transparency=(1, 2, 3)), id="a transparent colour"),
        pytest.param(encoded("RGB", icc_profile=b"no profile"), id="a profile"),
        pytest.param(encoded("RGB", exif=Image.Exif()), id="EXIF"),
    ],
)
def test_a_picture_whose_pixels_are_not_simply_those_of_the_file_is_drawn_anew(tmp_path, data):
    written = saved(tmp_path, data).read_bytes()
    assert not {b"PLTE", b"tRNS", b"iCCP", b"eXIf"} & set(kinds(written))


def test_an_opaque_alpha_channel_goes(tmp_path):
    opaque = PIXELS.copy()
    opaque[..., 3] = 255
    buffer = BytesIO()
    Image.fromarray(opaque).save(buffer, "PNG")
    with Image.open(saved(tmp_path, buffer.getvalue())) as written:
        assert written.mode == "RGB"


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda data: data[:-12], id="no end"),
        pytest.param(lambda data: data[:60] + b"\x00" + data[61:], id="a wrong checksum"),
        pytest.param(lambda data: b"GIF89a" + data, id="no PNG"),
        pytest.param(lambda data: data[:33] + chunk(b"ABCD") + data[33:], id="an unknown chunk that matters"),
        pytest.param(lambda data: data[:8] + data[33:], id="no header"),
        pytest.param(lambda data: data[:33] + chunk(b"IEND"), id="no image"),
        pytest.param(lambda data: data[:33] + struct.pack(">I", 2**31) + b"IDAT" + data[41:], id="a length too long"),
        pytest.param(lambda _: b"", id="nothing"),
    ],
)
def test_what_is_not_as_it_should_be_is_not_taken_over(broken):
    assert png.with_text(broken(encoded()), "RGB", PngInfo()) is None
