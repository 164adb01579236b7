"""Every kind of image file in, whole files with their request out."""

import hashlib
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dataflow.errors import ConfigError, ImageError
from dataflow.io import ImageIO

NAME = "ab" + "0123456789" * 3
HERE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
METADATA = {
    "prompt": "a fox, in snow",
    "negative_prompt": "blurry\nbad",
    "seed": 2**62 + 1,
    "model": "black-forest-labs/FLUX.1-dev",
    "revision": "0ef5fff",
    "params": {"num_inference_steps": 28, "guidance_scale": 3.5, "sigmas": [1.0, 0.5], "note": None},
    "request_id": NAME,
}
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
COLUMNS, ROWS = np.meshgrid(np.arange(0, 224, 4), np.arange(0, 160, 4))
SMOOTH = np.stack([COLUMNS, ROWS, np.full((40, 56), 90)], 2).astype(np.uint8)


def encode(array_or_image, kind, **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(file) -> Image.Image:
    with Image.open(file) as image:
        image.load()
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, raw, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + end


def white_is_zero() -> bytes:
    """A 16-bit gray TIFF of two pixels, in which 0 stands for white."""
    short, long = 3, 4
    tags = [(256, short, 2), (257, short, 1), (258, short, 16), (259, short, 1), (262, short, 0)]
    tags += [(273, long, 8), (277, short, 1), (278, short, 1), (279, long, 4)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IHHH", 12, 0, 65535, len(tags)) + entries + bytes(4)


def over_white(rgba: np.ndarray) -> np.ndarray:
    rgb, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return rgb * alpha + 255 * (1 - alpha)


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def linear_profile() -> bytes:
    """sRGB's primaries, with another tone curve: the built-in profile with its curves' gamma replaced."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index(b"para")
    profile[at + 8 : at + 10] = struct.pack(">H", 0)  # curve type 0: Y = X ** g
    profile[at + 12 : at + 16] = struct.pack(">i", 65536)
    text = profile.index("sRGB".encode("utf-16-be"))
    profile[text : text + 8] = "ownC".encode("utf-16-be")
    return bytes(profile)


RGBA = np.dstack([RGB, RNG.integers(0, 256, (40, 56), dtype=np.uint8)])
GRAY = RGB[..., 0]
GRAY16 = (GRAY.astype(np.uint16) << 8) | 17
GRAY3 = np.dstack([GRAY] * 3)
GRAY16_3 = np.dstack([np.rint(GRAY16 / 257)] * 3)
PALETTE = Image.fromarray(SMOOTH).quantize(64)
CLEAR_PALETTE = np.array(PALETTE.convert("RGBA"))
CLEAR_PALETTE[np.array(PALETTE) == 3, 3] = 0
BILEVEL = Image.fromarray(GRAY).convert("1", dither=Image.Dither.NONE)
CMYK = Image.fromarray(SMOOTH).convert("CMYK")
RED_GREEN = [[[255, 0, 0], [127, 255, 127]]]
PLTE, TRNS = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0])), chunk(b"tRNS", bytes([255, 128]))

# name: (file bytes, expected pixels, largest difference allowed)
GOOD = {
    "png": (encode(RGB, "PNG"), RGB, 0),
    "webp lossless": (encode(RGB, "WEBP", lossless=True), RGB, 0),
    "jpeg": (encode(SMOOTH, "JPEG", quality=98, subsampling=0), SMOOTH, 6),
    "bmp": (encode(RGB, "BMP"), RGB, 0),
    "tiff": (encode(RGB, "TIFF"), RGB, 0),
    "tiff lzw": (encode(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "gif": (encode(PALETTE, "GIF"), np.array(PALETTE.convert("RGB")), 0),
    "rgba png": (encode(RGBA, "PNG"), over_white(RGBA), 1),
    "rgba webp": (encode(RGBA, "WEBP", lossless=True, exact=True), over_white(RGBA), 1),
    "rgba tiff": (encode(RGBA, "TIFF"), over_white(RGBA), 1),
    "opaque rgba": (encode(np.dstack([RGB, np.full((40, 56), 255, np.uint8)]), "PNG"), RGB, 0),
    "gray + alpha": (encode(RGBA[..., [0, 3]], "PNG"), over_white(np.dstack([GRAY3, RGBA[..., 3]])), 1),
    "gray": (encode(GRAY, "PNG"), GRAY3, 0),
    "gray jpeg": (encode(SMOOTH[..., 0], "JPEG", quality=98), np.dstack([SMOOTH[..., 0]] * 3), 6),
    "palette": (encode(PALETTE, "PNG"), np.array(PALETTE.convert("RGB")), 0),
    "palette, one clear": (encode(PALETTE, "PNG", transparency=3), over_white(CLEAR_PALETTE), 1),
    "gif, one clear": (encode(PALETTE, "GIF", transparency=3), over_white(CLEAR_PALETTE), 1),
    "palette, half clear": (png(2, 1, 8, 3, b"\0\0\1", PLTE, TRNS), RED_GREEN, 1),
    "bilevel": (encode(BILEVEL, "PNG"), np.dstack([np.array(BILEVEL) * 255.0] * 3), 0),
    "bilevel, white clear": (png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", b"\0\1")), [[[0] * 3, [255] * 3]], 0),
    "bilevel, black clear": (png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", b"\0\0")), [[[255] * 3, [255] * 3]], 0),
    "gray, one clear": (png(2, 1, 8, 0, b"\0\5\x09", chunk(b"tRNS", b"\0\5")), [[[255] * 3, [9] * 3]], 0),
    "rgb, one clear": (
        png(2, 1, 8, 2, b"\0\1\2\3\1\2\4", chunk(b"tRNS", b"\0\1\0\2\0\3")),
        [[[255] * 3, [1, 2, 4]]],
        0,
    ),
    "16-bit gray": (encode(GRAY16, "PNG"), GRAY16_3, 0),
    "16-bit gray tiff": (encode(GRAY16, "TIFF"), GRAY16_3, 0),
    "16-bit gray tiff, big endian": (
        encode(Image.frombytes("I;16B", (56, 40), GRAY16.astype(">u2").tobytes()), "TIFF"),
        GRAY16_3,
        0,
    ),
    "16-bit gray, one clear": (
        png(2, 1, 16, 0, b"\0\x80\0\x40\0", chunk(b"tRNS", b"\x80\0")),
        [[[255] * 3, [64] * 3]],
        0,
    ),
    "48-bit rgb": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32768, 65535, 768, 65535, 0)),
        [[[0, 128, 255], [3, 255, 0]]],
        1,
    ),
    "48-bit rgb, one clear": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32768, 65535, 9, 9, 9), chunk(b"tRNS", b"\0\0\x80\0\xff\xff")),
        [[[255] * 3, [0] * 3]],
        0,
    ),
    "64-bit rgba": (png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0, 32768)), [[[127] * 3]], 1),
    "16-bit gray tiff, 0 is white": (white_is_zero(), [[[255] * 3, [0] * 3]], 0),
    "32-bit integers up to 65535": (encode(GRAY16.astype(np.int32), "TIFF"), GRAY16_3, 0),
    "float": (encode((GRAY / 255).astype(np.float32), "TIFF"), GRAY3, 0),
    "cmyk tiff": (encode(CMYK, "TIFF"), SMOOTH, 1),
    "cmyk jpeg (inverted, Adobe)": (encode(CMYK, "JPEG", quality=98, subsampling=0), SMOOTH, 12),
    "lab tiff": (encode(Image.fromarray(SMOOTH).convert("LAB"), "TIFF"), SMOOTH, 25),
    "srgb profile": (
        encode(RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RGB,
        0,
    ),
    "linear profile": (
        encode(np.full((2, 2, 3), 55, np.uint8), "PNG", icc_profile=linear_profile()),
        np.full((2, 2, 3), 128),
        2,
    ),
    "broken profile": (encode(RGB, "PNG", icc_profile=b"not a profile at all"), RGB, 0),
    "broken exif": (encode(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), RGB, 0),
    "not exif at all": (encode(RGB, "PNG", exif=b"Exif\0\0XXXXXXXX"), RGB, 0),
    "impossible orientation": (encode(RGB, "PNG", exif=oriented(9)), RGB, 0),
    "trailing bytes": (encode(RGB, "PNG") + b"more", RGB, 0),
}
for number in range(1, 9):
    turned = RGB if number < 5 else RGB.swapaxes(0, 1)
    turn = [np.asarray, np.fliplr, lambda pixels: pixels[::-1, ::-1], np.flipud][(number - 1) % 4]
    GOOD[f"orientation {number}"] = (encode(RGB, "PNG", exif=oriented(number)), turn(turned), 0)
    GOOD[f"tiff orientation {number}"] = (encode(RGB, "TIFF", exif=oriented(number)), turn(turned), 0)
    GOOD[f"webp orientation {number}"] = (encode(RGB, "WEBP", lossless=True, exif=oriented(number)), turn(turned), 0)

FRAMES = [Image.fromarray(np.roll(RGB, step, 0)) for step in range(3)]
JPEG = encode(RGB, "JPEG")
BOMB = png(30_000, 30_000, 8, 0, b"")
LONG = png(100_000, 2, 8, 0, b"")
TEXT_BOMB = png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000))))
WRONG_SUM = encode(RGB, "PNG").replace(b"IDAT", b"IDAT", 1)[:-14] + b"\0\0" + encode(RGB, "PNG")[-12:]

# name: (file bytes, reason, words of the message)
BAD = {
    "empty": (b"", "empty", "no bytes at all"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated", "cut short or damaged"),
    "two bytes short": (JPEG[:-2], "truncated", "JPEG file is cut short"),
    "jpeg start only": (JPEG[:20], "truncated", "cut short"),
    "half a png": (encode(RGB, "PNG")[:3000], "truncated", "PNG file is cut short"),
    "png without end": (encode(RGB, "PNG")[:-12], "truncated", "cut short"),
    "png with a wrong checksum": (WRONG_SUM, "truncated", "damaged"),
    "half a webp": (encode(RGB, "WEBP")[:500], "truncated", "WebP file"),
    "half a bmp": (encode(RGB, "BMP")[:3000], "truncated", "BMP file"),
    "half a gif": (encode(PALETTE, "GIF")[:1000], "truncated", "GIF file"),
    "half a tiff": (encode(RGB, "TIFF")[:3000], "truncated", "TIFF file"),
    "bomb": (BOMB, "too_large", "30000 × 30000 pixels are more than max_pixels=89,478,485"),
    "long side": (LONG, "too_large", "65,535 a side"),
    "text bomb": (TEXT_BOMB, "too_large", "grows too large"),
    "no width": (png(0, 5, 8, 0, b""), "truncated", "PNG file is"),
    "animated gif": (encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "animated", "several frames"),
    "animated png": (encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated", "PNG file holds"),
    "animated webp": (encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated", "WebP file"),
    "several pages": (encode(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "animated", "pages"),
    "html": (b"\n<!DOCTYPE html><html><body>404", "not_an_image", "is an HTML page, starts with"),
    "json": (b'{"error": "quota"}', "not_an_image", 'is JSON, starts with \'{"error"'),
    "svg": (b'<?xml version="1.0"?><svg xmlns="x"/>', "unsupported", "is an SVG drawing; needed is PNG"),
    "pdf": (b"%PDF-1.7", "unsupported", "a PDF document"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported", "a PostScript file"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "a HEIC photo"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", "not_an_image", "a video or audio file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "not_an_image", "git lfs pull"),
    "base64": (b"iVBORw0KGgoAAAANSUhEUg", "not_an_image", "base64 text (decode it first)"),
    "text": (b"just words", "not_an_image", "is plain text, starts with 'just words'"),
    "noise": (bytes(range(1, 200)), "not_an_image", "something else"),
    "float beyond 1": (encode(GRAY.astype(np.float32), "TIFF"), "unsupported", "only 0 to 1 has a known brightness"),
    "float nan": (encode(np.full((2, 2), np.nan, np.float32), "TIFF"), "unsupported", "values from nan"),
    "32-bit integers": (encode(np.full((2, 2), 70_000, np.int32), "TIFF"), "unsupported", "only 0 to 65535"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_reads(tmp_path, kind):
    data, expected, tolerance = GOOD[kind]
    expected = np.asarray(expected)
    file = tmp_path / "picture"
    file.write_bytes(data)
    store = ImageIO(tmp_path)
    image = store.read(file)
    assert (type(image), image.mode, image.info) == (Image.Image, "RGB", {})
    assert image.size == expected.shape[1::-1] == store.probe(str(file))
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= tolerance
    if data[:4] in (b"\x89PNG", b"RIFF", b"\xff\xd8\xff\xe0"):
        assert np.array_equal(np.asarray(store.read(data)), np.asarray(image))


@pytest.mark.parametrize("kind", BAD)
def test_refuses(tmp_path, kind):
    data, reason, words = BAD[kind]
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    store = ImageIO(tmp_path)
    with pytest.raises(ImageError) as caught:
        store.read(file)
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    with pytest.raises(ImageError) as caught:
        store.save(data, NAME, {})
    assert caught.value.reason in (reason, "unsupported")
    assert caught.value.path is None
    assert list(store.existing()) == []


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_a_service_may_send_fewer_formats(kind):
    with pytest.raises(ImageError, match=f"is {kind}; needed is PNG, JPEG or WEBP") as caught:
        ImageIO("x").read(encode(PALETTE.convert("RGB"), kind))
    assert caught.value.reason == "unsupported"


def test_avif(tmp_path):
    file = tmp_path / "a.avif"
    try:
        file.write_bytes(encode(SMOOTH, "AVIF", quality=95))
    except (KeyError, OSError):
        pytest.skip("this Pillow has no AVIF")
    image = ImageIO(tmp_path).read(file)
    assert np.abs(np.asarray(image).astype(int) - SMOOTH).max() < 20


def test_a_phone_picture_with_a_preview_is_not_animated(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(encode(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]))
    assert opened(file).format == "MPO"
    assert ImageIO(tmp_path).read(file).size == (56, 40)


def test_refuses_paths(tmp_path):
    store = ImageIO(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path, reason, words in (
        (tmp_path / "none.png", "missing", "no such file"),
        (tmp_path / "none" / "x.png", "missing", "no such file"),
        ("", "missing", "no such file"),
        (tmp_path, "unreadable", "is a folder"),
        (tmp_path / "pipe", "unreadable", "is not an ordinary file"),
        ("a\0b", "missing", "cannot be a file's path"),
        ("x" * 5000, "missing", "cannot be a file's path"),
        ("https://example.org/a.png", "missing", "is a URL"),
        ("data:image/png;base64," + "A" * 10**6, "missing", "is a URL"),
    ):
        for method in (store.read, store.probe, store.digest, store.read_metadata):
            with pytest.raises(ImageError) as caught:
                method(path)
            assert caught.value.reason == reason
            assert words in str(caught.value)
            assert len(str(caught.value)) < 500


def test_refuses_what_may_not_be_read(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ImageError, match="check the file's permissions"):
        ImageIO(tmp_path).digest(tmp_path / "a.png")


def test_limits_on_size(tmp_path):
    data = encode(RGB, "PNG")
    with pytest.raises(ImageError, match="more than max_bytes=100"):
        ImageIO(tmp_path, max_bytes=100).read(data)
    with pytest.raises(ImageError, match="more than max_pixels=2,000"):
        ImageIO(tmp_path, max_pixels=2000).read(data)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(ImageError, match="more than 1,073,741,824"):
        ImageIO(tmp_path).read(tmp_path / "huge.png")


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert ImageIO(tmp_path).digest(tmp_path / "a").startswith("ba7816bf")


def test_no_warning_reaches_the_user(tmp_path):
    """Pillow warns about pictures above 89 million pixels, odd EXIF and odd APNG; here also from threads."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x03\0\0\0"
    apng = chunk(b"acTL", struct.pack(">II", 0, 0))
    files = [
        png(9_000, 9_900, 1, 0, bytes(1126 * 9_900), apng),
        encode(RGB, "JPEG", exif=exif),
        encode(RGB, "TIFF")[:-6],
        encode(PALETTE, "PNG", transparency=bytes(range(64))),
    ]
    for number, data in enumerate(files):
        (tmp_path / str(number)).write_bytes(data)
    script = (
        "import sys, threading\nfrom dataflow.errors import ImageError\nfrom dataflow.io import ImageIO\n"
        "store = ImageIO('.', max_pixels=170_000_000)\n"
        "def work():\n  for n in range(4):\n"
        "    try: store.read(str(n))\n    except ImageError as error: sys.stdout.write(f'{n} {error.reason}\\n')\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    assert set(ended.stdout.split("\n")) <= {"2 truncated", ""}


@pytest.mark.parametrize(
    "arguments",
    [
        {"format": "gif"},
        {"quality": 0},
        {"max_pixels": 10**9},
        {"max_bytes": 0},
        {"save_path": ""},
    ],
)
def test_constructor_checks(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ImageIO(**{"save_path": "x", **arguments})


def test_paths_for_rows_and_pickling(tmp_path):
    assert ImageIO("./cache/images").path("ab/x.png") == "./cache/images/ab/x.png"
    assert ImageIO(tmp_path).path("ab/x.png") == f"{tmp_path}/ab/x.png"
    assert ImageIO("~/images").path("x") == str(Path("~/images/x").expanduser())
    store = pickle.loads(pickle.dumps(ImageIO(tmp_path, "webp", durable=False)))
    assert (store.save_path, store.format, store.durable) == (tmp_path, "webp", False)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_save_find_and_read_back(tmp_path, kind):
    store = ImageIO(tmp_path / "new" / "images", kind)
    saved = store.save(Image.fromarray(SMOOTH), NAME, METADATA)
    file = store.save_path / saved.name
    suffix = "jpg" if kind == "jpeg" else kind
    assert saved.name == f"ab/{NAME}.{suffix}"
    assert (saved.width, saved.height, saved.bytes) == (56, 40, file.stat().st_size)
    assert saved.sha256 == store.digest(file)
    assert store.find(NAME) == saved == ImageIO(store.save_path).find(NAME)
    assert store.read_metadata(file) == METADATA
    assert np.abs(np.asarray(store.read(file)).astype(int) - SMOOTH).max() <= (8 if kind == "jpeg" else 0)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert list(store.existing()) == [(saved.name, saved.bytes)]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("sent", ["PNG", "WEBP", "JPEG"])
def test_bytes_keep_their_pixels(tmp_path, kind, sent):
    data = encode(SMOOTH, sent, quality=80)
    store = ImageIO(tmp_path, kind)
    saved = store.save(data, NAME, METADATA)
    before, after = store.read(data), store.read(tmp_path / saved.name)
    limit = 8 if kind == "jpeg" and sent != "JPEG" else 0
    assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() <= limit
    assert store.read_metadata(tmp_path / saved.name) == METADATA


def test_a_turned_jpeg_is_saved_upright(tmp_path):
    store = ImageIO(tmp_path, "jpeg")
    saved = store.save(encode(SMOOTH, "JPEG", exif=oriented(6)), NAME, METADATA)
    assert (saved.width, saved.height) == store.probe(tmp_path / saved.name) == (40, 56)
    assert store.read(tmp_path / saved.name).size == (40, 56)


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_transparency_is_kept(tmp_path, kind, as_bytes):
    store = ImageIO(tmp_path, kind)
    saved = store.save(encode(RGBA, "PNG") if as_bytes else Image.fromarray(RGBA), NAME, {})
    assert np.array_equal(np.asarray(opened(tmp_path / saved.name)), RGBA)


def test_other_modes_become_rgb(tmp_path):
    store = ImageIO(tmp_path)
    clear = PALETTE.convert("RGB")
    clear.info["transparency"] = (1, 2, 3)
    for image in (PALETTE, BILEVEL, CMYK, Image.fromarray(GRAY16), Image.fromarray(GRAY), clear):
        store.save(image, NAME, {})
        assert opened(tmp_path / "ab" / f"{NAME}.png").mode == "RGB"
    assert clear.info == {"transparency": (1, 2, 3)}
    saved = ImageIO(tmp_path, "jpeg").save(Image.fromarray(RGBA), NAME, {})
    assert np.abs(np.asarray(store.read(tmp_path / saved.name)) - over_white(RGBA)).mean() < 15


def test_pictures_no_format_holds(tmp_path):
    with pytest.raises(ImageError, match="no picture"):
        ImageIO(tmp_path).save(Image.new("RGB", (0, 4)), NAME, {})
    with pytest.raises(ImageError, match="use format='png'"):
        ImageIO(tmp_path, "webp").save(Image.new("RGB", (20_000, 1)), NAME, {})


@pytest.mark.parametrize(
    "name", ["", "x", "../" + NAME, NAME[:-1], NAME + "_", NAME + "_1\n", NAME.upper(), NAME + ".png"]
)
def test_names(tmp_path, name):
    store = ImageIO(tmp_path)
    for call in (store.find, lambda name: store.save(PALETTE, name, {})):
        with pytest.raises(ValueError, match="is no image name"):
            call(name)


def test_find_adopts_only_whole_pictures(tmp_path):
    store = ImageIO(tmp_path)
    assert store.find(NAME) is None
    (tmp_path / "ab").mkdir()
    file = tmp_path / "ab" / f"{NAME}.png"
    for data, *_ in BAD.values():
        file.write_bytes(data)
        assert store.find(NAME) is None
    file.unlink()
    file.mkdir()
    assert store.find(NAME) is None
    (tmp_path / "ab" / f"{NAME}.jpg").write_bytes(JPEG)
    assert store.find(NAME).name == f"ab/{NAME}.jpg"


def test_existing_and_sweep(tmp_path):
    store = ImageIO(tmp_path, durable=False)
    assert (list(ImageIO(tmp_path / "none").existing()), store.sweep()) == ([], 0)
    names = [f"{number:032x}"[::-1] for number in range(300)] + [f"{7:032x}_2"]
    for name in names:
        store.save(PALETTE, name, {})
    (tmp_path / "00" / f".{NAME}.999999999.{HERE}abcdabcd.tmp").write_bytes(b"torn")
    elsewhere = [tmp_path / "00" / f".{NAME}.{number}.0123456789abcdef.tmp" for number in (1, 2)]
    for path in elsewhere:
        path.write_bytes(b"of a process on another machine")
    os.utime(elsewhere[1], (0, 0))
    (tmp_path / "00" / "notes.txt").write_bytes(b"")
    (tmp_path / "other").mkdir()
    assert sorted(Path(name).stem for name, _ in store.existing()) == sorted(names)
    assert all(store.save_path.joinpath(file).stat().st_size == size for file, size in store.existing())
    assert store.sweep() == 2
    assert store.sweep() == 0
    assert [path.exists() for path in elsewhere] == [True, False]


def test_the_parameters_text_is_what_other_tools_read(tmp_path):
    ImageIO(tmp_path).save(PALETTE, NAME, METADATA)
    text = opened(tmp_path / "ab" / f"{NAME}.png").info["parameters"]
    assert text == (
        "a fox, in snow\nNegative prompt: blurry\nbad\n"
        f"Steps: 28, CFG scale: 3.5, Seed: {2**62 + 1}, Size: 56x40, Model: black-forest-labs/FLUX.1-dev, "
        "Model revision: 0ef5fff"
    )
    ImageIO(tmp_path, "jpeg").save(PALETTE, NAME, METADATA)
    comment = opened(tmp_path / "ab" / f"{NAME}.jpg").getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + text.encode("utf-16-be")


FOREIGN = (
    "a castle, (detailed:1.2)\nsecond line\nNegative prompt: low quality\nworst\n"
    'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 4711, Model: "a, b"'
)
PARSED = {
    "prompt": "a castle, (detailed:1.2)\nsecond line",
    "negative_prompt": "low quality\nworst",
    "seed": 965400086,
    "model": "a, b",
    "params": {
        "num_inference_steps": 20,
        "Sampler": "DPM++ 2M",
        "guidance_scale": 7,
        "Model hash": 4711,
        "width": 512,
        "height": 768,
    },
}


def user_comment(raw: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = raw
    return exif.tobytes()


def test_metadata_of_other_tools(tmp_path):
    text = b"parameters\0" + FOREIGN.encode("latin-1")
    files = {
        "png": encode(RGB, "PNG", exif=b"").replace(b"\0\0\0\0IEND", chunk(b"tEXt", text) + b"\0\0\0\0IEND"),
        "big": encode(RGB, "JPEG", exif=user_comment(b"UNICODE\0" + FOREIGN.encode("utf-16-be"))),
        "little": encode(RGB, "WEBP", exif=user_comment(b"UNICODE\0" + FOREIGN.encode("utf-16-le"))),
    }
    store = ImageIO(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert store.read_metadata(tmp_path / name) == PARSED
    note = Image.Exif()
    note.get_ifd(0x8769)[0x927C] = b"dataflow\0not deflated"
    for name, data, expected in (
        ("none", encode(RGB, "PNG"), {}),
        ("gif", encode(PALETTE, "GIF"), {}),
        ("broken", encode(RGB, "PNG", exif=b"Exif\0\0XXXXXXXX"), {}),
        ("other comment", encode(RGB, "JPEG", exif=user_comment(b"ASCII\0\0\0hello")), {}),
        ("other note", encode(RGB, "JPEG", exif=note.tobytes()), {}),
        (
            "prompt only",
            png(1, 1, 8, 0, b"\0\0", chunk(b"tEXt", b"parameters\0just a prompt")),
            {"prompt": "just a prompt"},
        ),
        ("no object", png(1, 1, 8, 0, b"\0\0", chunk(b"tEXt", b"dataflow\0[1]")), {}),
    ):
        (tmp_path / name).write_bytes(data)
        assert store.read_metadata(tmp_path / name) == expected


def nasty_strings():
    yield from (
        "",
        "\0",
        "a\0b\r\n\tc",
        "雪中的狐狸",
        "🦊👩‍👩‍👧",
        "\ud800 alone \udfff",
        "../../etc",
        '"quotes\\"',
        "x" * 20_000,
    )
    yield from ("狐" * 20_000, "Negative prompt: no\nSteps: 1, Seed: 2, Size: 3x4", "\x7f\x85\u2028\ufeff\uffff")
    source = random.Random(0)
    for length in (1, 5, 50, 500, 5000):
        for top in (0x80, 0x800, 0xD7FF, 0x10FFFF):
            yield "".join(
                c for c in (chr(source.randrange(top)) for _ in range(length)) if not "\ud800" <= c <= "\udfff"
            )


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_metadata_comes_back_exactly(tmp_path, kind):
    store = ImageIO(tmp_path, kind, durable=False)
    for text in nasty_strings():
        metadata = {
            "prompt": text,
            "negative_prompt": text[:2000],
            "params": {text[:50]: [text[:100], 1.5, None, True]},
        }
        saved = store.save(PALETTE, NAME, metadata)
        assert store.read_metadata(tmp_path / saved.name) == metadata
        opened(tmp_path / saved.name)


def test_what_is_not_json_is_stored_as_text(tmp_path):
    saved = ImageIO(tmp_path).save(PALETTE, NAME, {"folder": Path("a"), "value": np.float32(0.5), "params": {(1,): 2}})
    assert ImageIO(tmp_path).read_metadata(tmp_path / saved.name) == {"folder": "a", "value": "0.5", "params": {}}


def test_a_jpeg_cuts_what_cannot_fit(tmp_path):
    source = random.Random(0)
    store = ImageIO(tmp_path, "jpeg")
    noise = "".join(chr(source.randrange(0x20000, 0x2A000)) for _ in range(40_000))
    saved = store.save(PALETTE, NAME, {**METADATA, "prompt": noise})
    assert store.read_metadata(tmp_path / saved.name) == {
        **METADATA,
        "prompt": noise[:2000],
        "metadata_truncated": True,
    }
    saved = store.save(JPEG, NAME, {**METADATA, "params": {"noise": noise}})
    assert store.read_metadata(tmp_path / saved.name) == {
        **{key: METADATA[key] for key in ("request_id", "seed", "model", "revision")},
        "metadata_truncated": True,
    }


def test_threads_share_a_store(tmp_path):
    store = ImageIO(tmp_path)
    names = [f"{number:032x}" for number in range(40)]

    def work(mine):
        for name in mine:
            store.save(Image.fromarray(RGB), name, {"prompt": name})
            store.save(encode(RGB, "PNG"), NAME, {"prompt": "the same"})

    threads = [threading.Thread(target=work, args=(names[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Path(name).stem for name, _ in store.existing()) == sorted([*names, NAME])
    for name in names:
        assert store.read_metadata(store.save_path / store.find(name).name) == {"prompt": name}
    assert store.sweep() == 0


def test_killed_while_saving(tmp_path):
    script = (
        "import itertools, numpy as np\nfrom PIL import Image\nfrom dataflow.io import ImageIO\n"
        "image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))\n"
        "store = ImageIO('images')\n"
        "for n in itertools.count():\n  store.save(image, f'{n % 7:032x}', {'n': n})\n  print(n, flush=True)\n"
    )
    store = ImageIO(tmp_path / "images")
    for round_ in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + 0.013 * round_)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files = list(store.existing())
        assert files
        assert all(store.find(Path(name).stem) for name, _ in files)
    (tmp_path / "images" / "00" / f".{NAME}.999999999.{HERE}abcdabcd.tmp").touch()
    assert store.sweep() >= 1
    assert all(not file.name.startswith(".") for file in store.save_path.rglob("*"))


def test_disk_full_leaves_nothing(tmp_path):
    script = (
        "import resource, signal, numpy as np\nfrom PIL import Image\nfrom dataflow.io import ImageIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfree = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, free[1]))\n"
        "image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))\n"
        f"try:\n  ImageIO('images').save(image, '{NAME}', {{}})\nexcept OSError as error:\n  print(error.strerror)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, free)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "File too large\n"
    assert list((tmp_path / "images" / "ab").iterdir()) == []


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(5, "Input/output error")

    store = ImageIO(tmp_path)
    before = store.save(PALETTE, NAME, {})
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.save(Image.fromarray(RGB), NAME, {})
    monkeypatch.undo()
    assert store.find(NAME) == before
    assert store.sweep() == 0
