"""The page of prompts and results that a demo ends with."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from dataflow import contact_sheet as module
from dataflow.contact_sheet import Item, contact_sheet


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def wide(tmp_path):
    Image.new("RGB", (400, 100), "blue").save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def area(page, colour):
    return int((np.asarray(page) == colour).all(axis=2).sum())


def test_pictures_fill_their_cells_undistorted(red, wide):
    page = contact_sheet([([red], "one"), ([str(wide)], "two"), ([red], "three")], columns=2, cell=64, title="A title")
    assert page.mode == "RGB"
    assert page.width == 2 * 64 + 3 * 16
    assert area(page, (255, 0, 0)) == 2 * 64 * 64
    assert area(page, (0, 0, 255)) == 64 * 16


def test_before_and_after(red, wide):
    single = contact_sheet([([red], "x")], cell=64)
    double = contact_sheet([([red, wide], "x")], cell=64)
    assert double.width == single.width + 64 + 16
    assert area(double, (0x8B, 0x94, 0x9E)) > 20  # the arrow


def test_failures_are_grey_cells_with_a_reason(tmp_path, red):
    (tmp_path / "bad.png").write_bytes(b"oops")
    gray = (0xE6, 0xE8, 0xEB)
    pages = [
        contact_sheet([Item([red, None], "x", "out_of_memory")]),
        contact_sheet([Item([red, None], "x", "refused")]),
        contact_sheet([([red, tmp_path / "bad.png"], "x")]),
        contact_sheet([([red, tmp_path / "none.png"], "x")]),
    ]
    assert all(0.9 * 128 * 128 < area(page, gray) < 128 * 128 for page in pages)
    assert len({page.tobytes() for page in pages}) == 4


@pytest.mark.parametrize(
    "caption", ["", "word " * 300, "x" * 3000, "雪中的狐狸" * 50, "🦊\0\ud800\n\nnext", "one\ntwo\nthree\nfour\nfive"]
)
def test_any_caption_fits(red, caption):
    page = contact_sheet([([red], caption)], cell=64)
    assert page.width == 64 + 2 * 16
    assert page.height < 64 + 6 + 4 * 22 + 2 * 16 + 1
    assert (np.asarray(page)[:, -8:] == 255).all()


def test_words_stay_whole_and_long_text_ends_in_dots():
    font = ImageFont.load_default(13)
    lines = module._wrap("a red circle above a purple triangle " * 5, font, 128)
    assert len(lines) == 4
    assert lines[0] == "a red circle above a"
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)


def test_chinese_uses_a_font_that_has_it(red, monkeypatch):
    used = []
    font = ImageFont.load_default(13)
    monkeypatch.setattr(module, "_CJK_FONTS", ("/nowhere.ttc", __file__))
    monkeypatch.setattr(ImageFont, "load_default", lambda size: font)
    monkeypatch.setattr(ImageFont, "truetype", lambda file, size: used.append(file) or font)
    contact_sheet([([red], "a fox")])
    assert used == []
    contact_sheet([([red], "雪")])
    assert set(used) == {__file__}


def test_nothing_to_show():
    assert contact_sheet([]).mode == "RGB"
