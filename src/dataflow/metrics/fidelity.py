"""How far two pictures of one size are apart, pixel by pixel, over the whole picture or over a mask.

Pictures are uint8, (height, width, 3) or (height, width). Nothing is resized behind the caller's back: two sizes raise
ValueError, and :func:`resized_like` is the one rule for making them equal. A mask is bool, (height, width), and True
where a pixel counts: the region that an edit was to leave alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

_LUMA = (0.2989, 0.5870, 0.1140)
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_GAUSSIAN_WINDOW, _UNIFORM_WINDOW = 11, 7


def resized_like(image: Picture, reference: Picture) -> Picture:
    """``image`` in the size of ``reference``: Pillow's bicubic filter, antialiased, the aspect not kept.

    The rule of MagicBrush and of most editing benchmarks: the answer is brought to the size of the truth.

    Args:
        image: uint8, (height, width, 3) or (height, width).
        reference: uint8, of the size wanted.

    Returns:
        uint8, the size of ``reference``; ``image`` itself where it has that size already.

    Raises:
        ValueError: not such arrays.
    """
    from PIL import Image

    _check(image, "image")
    _check(reference, "reference")
    height, width = reference.shape[:2]
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def l1(first: Picture, second: Picture, mask: Mask | None = None) -> float:
    """Mean absolute difference on a scale of 0..1: ``mean(|a - b|) / 255`` over pixels and channels.

    Args:
        first: uint8, (height, width, 3) or (height, width).
        second: the same shape.
        mask: bool, (height, width), True where a pixel counts.

    Returns:
        0..1; lower is better.

    Raises:
        ValueError: shapes that differ, another type, or a mask that leaves nothing.

    Source: MagicBrush, arXiv:2306.10012.
    """
    return float(np.abs(_difference(first, second, mask)).mean(dtype=np.float64)) / 255


def l2(first: Picture, second: Picture, mask: Mask | None = None) -> float:
    """Mean squared difference on a scale of 0..1: ``mean((a - b)²) / 255²``. MagicBrush calls it L2; it has no root.

    Args:
        first: uint8, (height, width, 3) or (height, width).
        second: the same shape.
        mask: bool, (height, width), True where a pixel counts.

    Returns:
        0..1; lower is better.

    Raises:
        ValueError: shapes that differ, another type, or a mask that leaves nothing.

    Source: MagicBrush, arXiv:2306.10012.
    """
    return _mean_square(first, second, mask) / 255**2


def psnr(first: Picture, second: Picture, mask: Mask | None = None, *, ceiling: float = math.inf) -> float:
    """Peak signal-to-noise ratio: ``10 · log10(255² / mean((a - b)²))`` over pixels and channels.

    Args:
        first: uint8, (height, width, 3) or (height, width).
        second: the same shape.
        mask: bool, (height, width), True where a pixel counts.
        ceiling: the largest answer. Equal pictures have infinitely many decibels, which a table cannot hold.

    Returns:
        Decibels, from 0 up to ``ceiling``; higher is better.

    Raises:
        ValueError: shapes that differ, another type, or a mask that leaves nothing.

    Source: equals MATLAB ``psnr`` and ``skimage.metrics.peak_signal_noise_ratio`` (BSD-3) at a data range of 255.
    """
    error = _mean_square(first, second, mask)
    return ceiling if error == 0 else min(10 * math.log10(255**2 / error), ceiling)


def ssim(first: Picture, second: Picture, mask: Mask | None = None) -> float:
    """Structural similarity of the gray pictures, as its authors' MATLAB program computes it.

    Gray is ``round(.2989 R + .5870 G + .1140 B)``; local means, variances and the covariance are weighted with an 11 x
    11 Gaussian of sigma 1.5 and are not corrected for the sample's size; ``SSIM = (2 μa μb + C1)(2 σab + C2) / ((μa² +
    μb² + C1)(σa² + σb² + C2))`` with C1 = (.01·255)², C2 = (.03·255)²; the mean is over windows that lie wholly in the
    picture, and with a mask wholly in the mask. The picture is not scaled down first.

    Args:
        first: uint8, (height, width, 3) or (height, width), at least 11 pixels either way.
        second: the same shape.
        mask: bool, (height, width), True where a pixel counts.

    Returns:
        -1..1, 1 for equal pictures; higher is better.

    Raises:
        ValueError: shapes that differ, another type, or no whole window.

    Source: Wang et al. 2004; ``ssim_index.m``; the default of MATLAB-calibrated tool boxes.
    """
    _check_pair(first, second)
    ndimage = _ndimage()
    offsets = np.arange(_GAUSSIAN_WINDOW) - _GAUSSIAN_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    weights /= weights.sum()

    def local_mean(values: FloatArray) -> FloatArray:
        return ndimage.correlate1d(ndimage.correlate1d(values, weights, axis=0), weights, axis=1)

    whole = _whole_windows(first.shape[:2], mask, _GAUSSIAN_WINDOW)
    return float(_ssim_map(_gray(first), _gray(second), local_mean, correction=1.0)[whole].mean())


def ssim_rgb(first: Picture, second: Picture, mask: Mask | None = None) -> float:
    """Structural similarity channel by channel with a 7 x 7 box window and sample covariance: scikit-image's default.

    The formula and constants of :func:`ssim`, the mean of the channels' means.

    Args:
        first: uint8, (height, width, 3) or (height, width), at least 7 pixels either way.
        second: the same shape.
        mask: bool, (height, width), True where a pixel counts; only windows wholly inside count.

    Returns:
        -1..1, 1 for equal pictures; higher is better.

    Raises:
        ValueError: shapes that differ, another type, or no whole window.

    Source: equals ``skimage.metrics.structural_similarity(a, b, channel_axis=-1, data_range=255)`` (BSD-3).
    """
    _check_pair(first, second)
    ndimage = _ndimage()

    def local_mean(values: FloatArray) -> FloatArray:
        return ndimage.uniform_filter(values, size=_UNIFORM_WINDOW)

    whole = _whole_windows(first.shape[:2], mask, _UNIFORM_WINDOW)
    pixels = _UNIFORM_WINDOW**2
    planes = [np.atleast_3d(image).astype(np.float64) for image in (first, second)]
    means = [
        _ssim_map(planes[0][..., channel], planes[1][..., channel], local_mean, correction=pixels / (pixels - 1))
        for channel in range(planes[0].shape[2])
    ]
    return float(np.mean([values[whole].mean() for values in means]))


def _ssim_map(first: FloatArray, second: FloatArray, local_mean: Any, *, correction: float) -> FloatArray:
    mean_a, mean_b = local_mean(first), local_mean(second)
    variance_a = correction * (local_mean(first * first) - mean_a * mean_a)
    variance_b = correction * (local_mean(second * second) - mean_b * mean_b)
    covariance = correction * (local_mean(first * second) - mean_a * mean_b)
    above = (2 * mean_a * mean_b + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    return above / ((mean_a**2 + mean_b**2 + _SSIM_C1) * (variance_a + variance_b + _SSIM_C2))


def _whole_windows(size: tuple[int, ...], mask: Mask | None, window: int) -> Mask:
    """Where a window's centre may be: a window that reaches over an edge mixes in what must not count."""
    if min(size) < window:
        raise ValueError(f"a picture of {size[1]} x {size[0]} holds no window of {window} x {window}")
    inside = np.zeros(size, dtype=np.bool_)
    reach = window // 2
    inside[reach : size[0] - reach, reach : size[1] - reach] = True
    if mask is None:
        return inside
    _check_mask(mask, size)
    inside &= _ndimage().minimum_filter(mask, size=window, mode="constant", cval=0)
    if not inside.any():
        raise ValueError(f"no window of {window} x {window} lies wholly in the mask")
    return inside


def _gray(image: Picture) -> FloatArray:
    if image.ndim == 2:
        return image.astype(np.float64)
    return np.round(image.astype(np.float64) @ np.array(_LUMA))


def _mean_square(first: Picture, second: Picture, mask: Mask | None) -> float:
    difference = _difference(first, second, mask).astype(np.int32)
    return float(np.square(difference).mean(dtype=np.float64))


def _difference(first: Picture, second: Picture, mask: Mask | None) -> npt.NDArray[np.int16]:
    _check_pair(first, second)
    difference = first.astype(np.int16) - second
    if mask is None:
        return difference
    _check_mask(mask, first.shape[:2])
    return difference[mask]


def _check_pair(first: Picture, second: Picture) -> None:
    _check(first, "the first picture")
    _check(second, "the second picture")
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} differ: bring one to the other with resized_like")


def _check(image: Picture, name: str) -> None:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(
            f"{name}: expected uint8 (height, width, 3) or (height, width), not {image.dtype} {image.shape}"
        )
    if image.size == 0:
        raise ValueError(f"{name}: no pixels")


def _check_mask(mask: Mask, size: tuple[int, ...]) -> None:
    if mask.dtype != np.bool_ or mask.shape != tuple(size):
        raise ValueError(f"mask: expected bool {tuple(size)}, not {mask.dtype} {mask.shape}")
    if not mask.any():
        raise ValueError("mask: no pixel counts")


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "structural similarity") from error
    return ndimage
