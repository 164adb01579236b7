"""Pictures that are to be scored: whole ones, and the right word for every other file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import BadRequestError
from dataflow.serving.pictures import read_picture


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def test_a_picture_is_upright_rgb_over_white(tmp_path, photo):
    turned = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    turned.putpixel((0, 0), (0, 0, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    picture = read_picture(str(tmp_path / "turned.png"))
    assert (picture.mode, picture.size) == ("RGB", (4, 6))
    assert picture.getpixel((3, 0)) == (0, 0, 255)
    assert picture.getpixel((0, 5)) == (255, 255, 255)
    with Image.open(photo) as file:
        assert read_picture(str(photo)).tobytes() == file.convert("RGB").tobytes()


class TestWhatIsNoPicture:
    def reason(self, path):
        with pytest.raises(BadRequestError) as caught:
            read_picture(str(path))
        assert str(caught.value)
        return caught.value.reason

    def test_each_has_its_reason(self, tmp_path, photo):
        whole = photo.read_bytes()
        (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "words.png").write_text("this is a text")
        (tmp_path / "empty.png").write_bytes(b"")
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        found = {name: self.reason(tmp_path / name) for name in ("gone.png", "half.jpg", "words.png", "empty.png")}
        assert found == {
            "gone.png": "image_missing",
            "half.jpg": "image_truncated",
            "words.png": "image_not_an_image",
            "empty.png": "image_empty",
        }
        assert self.reason(tmp_path / "moving.gif") == "image_animated"
        assert self.reason(tmp_path) == "image_unreadable"

    def test_a_disk_that_fails_is_an_error_of_that_picture(self, photo, monkeypatch):
        def fail(*arguments):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("dataflow.io.open_file", fail)
        assert self.reason(photo) == "image_unreadable"
