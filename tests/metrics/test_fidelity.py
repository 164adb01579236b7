"""Distances by hand, scikit-image as the oracle, and the official figures for five calibration pairs."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import MissingExtraError
from dataflow.metrics import fidelity

CALIBRATION = os.environ.get("DATAFLOW_CALIBRATION_IMAGES")
needs_calibration = pytest.mark.skipif(
    CALIBRATION is None,
    reason="DATAFLOW_CALIBRATION_IMAGES does not name the folder ResultsCalibra of the source package pyiqa 0.1.16",
)
METRICS = [fidelity.l1, fidelity.l2, fidelity.psnr, fidelity.ssim, fidelity.ssim_rgb]


@pytest.fixture
def pair(rng):
    """A smooth picture with texture, and the same with noise."""
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    first = np.asarray(Image.fromarray(small).resize((61, 47), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 20, first.shape)
    return first, np.clip(first + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_l1_l2_and_psnr_by_hand():
    first = np.zeros((2, 2, 3), dtype=np.uint8)
    second = first.copy()
    second[0, 0] = 255
    assert fidelity.l1(first, second) == pytest.approx(0.25)
    assert fidelity.l2(first, second) == pytest.approx(0.25)
    assert fidelity.psnr(first, second) == pytest.approx(10 * math.log10(4))
    assert fidelity.l1(first, second) == fidelity.l1(second, first)


def test_equal_pictures(pair):
    first, _ = pair
    assert fidelity.l1(first, first) == fidelity.l2(first, first) == 0
    assert fidelity.psnr(first, first) == math.inf
    assert fidelity.psnr(first, first, ceiling=100) == 100
    assert fidelity.ssim(first, first) == pytest.approx(1)
    assert fidelity.ssim_rgb(first, first) == pytest.approx(1)


def test_a_ceiling_cuts_only_what_is_higher(pair):
    assert fidelity.psnr(*pair, ceiling=100) == fidelity.psnr(*pair)


def test_psnr_and_ssim_equal_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle here")
    first, second = pair
    assert fidelity.psnr(first, second) == pytest.approx(
        metrics.peak_signal_noise_ratio(first, second, data_range=255), abs=1e-12
    )
    assert fidelity.ssim_rgb(first, second) == pytest.approx(
        metrics.structural_similarity(first, second, channel_axis=2, data_range=255), abs=1e-12
    )
    assert fidelity.ssim_rgb(first[..., 0], second[..., 0]) == pytest.approx(
        metrics.structural_similarity(first[..., 0], second[..., 0], data_range=255), abs=1e-12
    )


def test_ssim_equals_scikit_image_on_the_rounded_gray(pair):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle here")
    first, second = (np.round(image @ np.array([0.2989, 0.5870, 0.1140])) for image in pair)
    # A truncation at 3.5 sigma makes scikit-image's Gaussian 11 pixels wide.
    oracle = metrics.structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert fidelity.ssim(*pair) == pytest.approx(oracle, abs=1e-12)


def test_ssim_of_one_window_by_hand(rng):
    first, second = rng.integers(0, 256, (2, 7, 7), dtype=np.uint8)
    a, b = first.astype(float).ravel(), second.astype(float).ravel()
    covariance = np.cov(a, b)
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
    assert fidelity.ssim_rgb(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_full_mask_changes_nothing(metric, pair):
    everything = np.ones(pair[0].shape[:2], dtype=bool)
    assert metric(*pair, everything) == pytest.approx(metric(*pair), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_outside_the_mask_has_no_influence(metric, pair):
    first, second = pair
    mask = np.zeros(first.shape[:2], dtype=bool)
    mask[:, :30] = True
    edited = second.copy()
    edited[~mask] = 255 - edited[~mask]
    assert metric(first, edited, mask) == pytest.approx(metric(first, second, mask), abs=1e-9)
    assert metric(first, edited) != pytest.approx(metric(first, second), abs=1e-9)


@pytest.mark.parametrize("metric", METRICS[:3])
def test_a_mask_equals_cutting_out(metric, pair):
    first, second = pair
    mask = np.zeros(first.shape[:2], dtype=bool)
    mask[5:20, 7:30] = True
    assert metric(first, second, mask) == pytest.approx(metric(first[5:20, 7:30], second[5:20, 7:30]))


@pytest.mark.parametrize("metric", METRICS[3:])
def test_a_masked_ssim_equals_cutting_out(metric, pair):
    first, second = pair
    mask = np.zeros(first.shape[:2], dtype=bool)
    mask[5:30, 7:40] = True
    assert metric(first, second, mask) == pytest.approx(metric(first[5:30, 7:40], second[5:30, 7:40]), abs=1e-9)


def test_a_masked_ssim_is_the_mean_of_scikit_images_map(pair, rng):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle here")
    from scipy import ndimage

    first, second = pair
    mask = ndimage.binary_opening(ndimage.gaussian_filter(rng.normal(size=first.shape[:2]), 6) > 0, np.ones((13, 13)))
    assert 0.1 < mask.mean() < 0.9
    grays = [np.round(image @ np.array([0.2989, 0.5870, 0.1140])) for image in pair]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, gray = metrics.structural_similarity(*grays, data_range=255, full=True, **settings)
    _, colour = metrics.structural_similarity(first, second, data_range=255, channel_axis=2, full=True)
    for found, values, window in ((fidelity.ssim, gray, 11), (fidelity.ssim_rgb, colour, 7)):
        whole = ndimage.binary_erosion(mask, np.ones((window, window)), border_value=0)
        assert found(first, second, mask) == pytest.approx(values[whole].mean(), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_unusable_arguments_are_told(metric, pair):
    first, second = pair
    with pytest.raises(ValueError, match="resized_like"):
        metric(first, second[:-1])
    with pytest.raises(ValueError, match="uint8"):
        metric(first.astype(np.float32), second)
    with pytest.raises(ValueError, match="uint8"):
        metric(np.zeros((20, 20, 4), dtype=np.uint8), second)
    with pytest.raises(ValueError, match="no pixels"):
        metric(np.zeros((0, 3), dtype=np.uint8), np.zeros((0, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="mask"):
        metric(first, second, np.ones((3, 3), dtype=bool))
    with pytest.raises(ValueError, match="mask"):
        metric(first, second, np.ones(first.shape[:2], dtype=np.uint8))
    with pytest.raises(ValueError, match="mask"):
        metric(first, second, np.zeros(first.shape[:2], dtype=bool))


def test_ssim_without_a_whole_window(pair):
    first, second = pair
    with pytest.raises(ValueError, match="11 x 11"):
        fidelity.ssim(first[:10], second[:10])
    thin = np.zeros(first.shape[:2], dtype=bool)
    thin[:, ::2] = True
    with pytest.raises(ValueError, match="window"):
        fidelity.ssim_rgb(first, second, thin)


def test_resized_like(pair):
    first, _ = pair
    assert fidelity.resized_like(first, first) is first
    smaller = fidelity.resized_like(first, first[:20, :30])
    assert smaller.shape == (20, 30, 3)
    assert smaller.dtype == np.uint8
    flat = np.full((40, 40), 93, dtype=np.uint8)
    assert (fidelity.resized_like(flat, first) == 93).all()


def test_a_missing_library_is_named(monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*\[metrics\]"):
        fidelity.ssim(*pair)


@needs_calibration
def test_official_figures_of_the_calibration_images():
    folder = Path(str(CALIBRATION))
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for name in ("I03", "I04", "I06", "I08", "I19"):
        first, second = (
            np.asarray(Image.open(folder / side / f"{name}.bmp").convert("RGB")) for side in ("ref_dir", "dist_dir")
        )
        found["psnr"].append(fidelity.psnr(first, second))
        found["ssim"].append(fidelity.ssim(first, second))
    assert found["psnr"] == pytest.approx([21.11, 20.99, 27.01, 23.30, 21.62], abs=0.005)
    assert found["ssim"] == pytest.approx([0.6993, 0.9978, 0.9989, 0.9669, 0.6519], abs=1.2e-4)
    assert found["ssim"] == pytest.approx([0.6994, 0.9977, 0.9990, 0.9669, 0.6519], abs=5e-5)
