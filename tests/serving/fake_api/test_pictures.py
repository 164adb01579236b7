"""Pictures and the marks in them."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from dataflow.serving.fake_api import expected_mark, expected_text, read_mark
from dataflow.serving.fake_api.pictures import convert, draw


def test_a_mark_depends_on_prompt_and_inputs_only():
    plain = expected_mark("x")
    assert len(plain) == 16
    assert {level for colour in plain for level in colour} <= {0, 85, 170, 255}
    for facts in ({"seed": 5}, {"sample": 3}, {"pad": 20_000}):
        assert read_mark(draw("x", **facts)) == plain
        assert draw("x", **facts) != draw("x")
    assert len({expected_mark(*arguments) for arguments in (("x",), ("y",), ("x", [b"1"]), ("x", [b"1", b""]))}) == 4


def test_any_text_is_a_prompt():
    prompts = ("狐", "🦊", "\0", "\ud800", "x" * 20_000, "")
    assert len({read_mark(draw(prompt)) for prompt in prompts}) == len(prompts)
    assert expected_text("狐").endswith(": 狐")


@pytest.mark.parametrize(
    ("kind", "pad"), [*((kind, pad) for kind in ("png", "jpeg", "webp") for pad in (0, 30_000)), ("gif", 0)]
)
def test_a_mark_survives_other_formats(kind, pad):
    assert read_mark(convert(draw("fox", pad=pad), kind)) == expected_mark("fox")


def test_padding():
    assert len(draw("x")) < 1000
    assert 100_000 <= len(draw("x", pad=100_000)) < 102_000
    with Image.open(io.BytesIO(draw("x", pad=100_000))) as image:
        image.load()
        assert image.mode == "RGB"
        assert image.width == image.height


def test_a_picture_too_small_for_a_mark():
    with pytest.raises(ValueError, match="no mark in a picture of 16 × 8"):
        read_mark(Image.new("RGB", (16, 8)))
