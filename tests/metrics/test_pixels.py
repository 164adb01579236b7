"""Statistics of pictures that can be worked out by hand, and of random ones against scikit-image and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from dataflow.metrics import pixels

BLACK = np.zeros((4, 6, 3), dtype=np.uint8)
WHITE = np.full((4, 6, 3), 255, dtype=np.uint8)
RED = np.zeros((4, 6, 3), dtype=np.uint8)
RED[..., 0] = 255
PICTURES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


@pytest.fixture
def half():
    """Black on the left, white on the right."""
    return np.concatenate([BLACK, WHITE], axis=1)


@pytest.fixture
def picture():
    return np.random.default_rng(3).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def luma(image):
    red, green, blue = (image[..., channel].astype(np.int64) for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def test_brightness_and_contrast_by_hand(half):
    assert pixels.brightness(BLACK) == 0
    assert pixels.brightness(WHITE) == 1
    assert pixels.brightness(half) == pytest.approx(0.5)
    assert pixels.contrast(WHITE) == 0
    assert pixels.contrast(half) == pytest.approx(0.5)


def test_brightness_contrast_and_entropy_of_a_random_picture(picture):
    gray = luma(picture)
    assert pixels.brightness(picture) == pytest.approx(gray.mean() / 255, abs=1e-12)
    assert pixels.contrast(picture) == pytest.approx(gray.std() / 255, abs=1e-12)
    measure = pytest.importorskip("skimage.measure", reason="scikit-image is the oracle here")
    assert pixels.entropy(picture) == pytest.approx(measure.shannon_entropy(gray), abs=1e-12)


def test_entropy_by_hand(half):
    assert pixels.entropy(WHITE) == 0
    assert pixels.entropy(half) == pytest.approx(1)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert pixels.entropy(ramp) == pytest.approx(8)


def test_exposure_counts_both_ends(half):
    assert pixels.exposure(half) == pixels.Exposure(0.5, 0.5)
    row = np.array([0, 2, 3, 128, 252, 253, 255, 255], dtype=np.uint8)
    ramp = np.repeat(row[None, :, None], 3, axis=2)
    assert pixels.exposure(ramp) == pixels.Exposure(2 / 8, 3 / 8)
    assert pixels.exposure(ramp, margin=0) == pixels.Exposure(1 / 8, 2 / 8)
    with pytest.raises(ValueError, match="margin"):
        pixels.exposure(ramp, margin=128)


def test_sharpness_by_hand():
    assert pixels.sharpness(WHITE) == 0
    checks = np.indices((8, 8)).sum(axis=0) % 2
    board = np.repeat((checks * 255).astype(np.uint8)[..., None], 3, axis=2)
    # Every neighbour, mirrored ones too, is the other colour: the Laplacian is 4 * 255 either way.
    assert pixels.sharpness(board) == pytest.approx((4 * 255) ** 2)


@given(PICTURES)
@settings(max_examples=60)
def test_sharpness_equals_scipys_laplacian(image):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is the oracle here")
    assert pixels.sharpness(image) == pytest.approx(
        ndimage.laplace(luma(image).astype(float), mode="mirror").var(), rel=1e-9, abs=1e-6
    )


def test_blur_lowers_sharpness(picture):
    blurred = np.asarray(Image.fromarray(picture).resize((20, 20)).resize((53, 37)))
    assert pixels.sharpness(blurred) < pixels.sharpness(picture) / 10


def test_saturation_by_hand_and_against_scikit_image(picture):
    assert pixels.saturation(RED) == 1
    assert pixels.saturation(WHITE) == pixels.saturation(BLACK) == 0
    color = pytest.importorskip("skimage.color", reason="scikit-image is the oracle here")
    assert pixels.saturation(picture) == pytest.approx(color.rgb2hsv(picture)[..., 1].mean(), abs=1e-6)


def test_colourfulness_by_hand(picture):
    assert pixels.colourfulness(WHITE) == 0
    assert pixels.colourfulness(RED) == pytest.approx(0.3 * math.hypot(255, 127.5))
    red, green, blue = (picture[..., channel].astype(float) for channel in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    expected = math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())
    assert pixels.colourfulness(picture) == pytest.approx(expected, abs=1e-9)


def test_alpha_use():
    alpha = np.array([[0, 0, 1, 254], [255, 255, 255, 255]], dtype=np.uint8)
    expected = pixels.AlphaUse(2 / 8, 2 / 8, 4 / 8)
    assert pixels.alpha_use(alpha) == expected
    assert pixels.alpha_use(np.dstack([BLACK[:2, :4], alpha])) == expected
    with pytest.raises(ValueError):
        pixels.alpha_use(BLACK)


def test_uniform_and_near_black(half):
    assert pixels.is_uniform(RED)
    assert not pixels.is_uniform(half)
    almost = WHITE.copy()
    almost[0, 0, 1] = 250
    assert not pixels.is_uniform(almost, tolerance=4)
    assert pixels.is_uniform(almost, tolerance=5)
    assert pixels.is_near_black(BLACK)
    assert not pixels.is_near_black(half)
    noisy = np.full((100, 100, 3), 16, dtype=np.uint8)
    noisy[0, :10] = 255
    assert pixels.is_near_black(noisy)
    noisy[0, :11] = 255
    assert not pixels.is_near_black(noisy)


@given(PICTURES)
@settings(max_examples=60)
def test_everything_at_once_is_each_by_itself_and_finite(image):
    found = pixels.measure(image)
    assert found == pixels.PixelStatistics(
        brightness=pixels.brightness(image),
        contrast=pixels.contrast(image),
        exposure=pixels.exposure(image),
        entropy=pixels.entropy(image),
        sharpness=pixels.sharpness(image),
        saturation=pixels.saturation(image),
        colourfulness=pixels.colourfulness(image),
        uniform=pixels.is_uniform(image),
        near_black=pixels.is_near_black(image),
    )
    for value, highest in [(found.brightness, 1), (found.contrast, 0.5), (found.entropy, 8), (found.saturation, 1)]:
        assert 0 <= value <= highest + 1e-12
    assert math.isfinite(found.sharpness)
    assert math.isfinite(found.colourfulness)


def test_a_view_counts_as_what_it_shows(picture):
    turned = picture[::-1, ::2]
    assert pixels.measure(turned) == pixels.measure(np.ascontiguousarray(turned))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
@pytest.mark.parametrize("function", [pixels.measure, pixels.saturation, pixels.colourfulness, pixels.is_uniform])
def test_other_arrays_are_refused(function, bad):
    with pytest.raises(ValueError, match="uint8"):
        function(bad)


def test_a_picture_of_several_blocks_is_one_picture(monkeypatch, picture):
    whole = pixels.measure(picture)
    monkeypatch.setattr(pixels, "_PIXELS_AT_ONCE", 1)
    assert pixels.measure(picture) == whole
