"""What the pixels of one picture say about it: light, contrast, sharpness, colour, emptiness.

Pictures are uint8, (height, width, 3), sRGB. Luma is Pillow's "L": ``(19595 R + 38470 G + 7471 B + 32768) >> 16``,
whole numbers of 0..255, so that light, contrast, exposure and entropy come from one histogram of 256 exact counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]

_PIXELS_AT_ONCE = 2**15
_LEVELS = np.arange(256, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Exposure:
    """Shares of 0..1 of the pixels that are clipped at the dark and at the bright end; lower is better."""

    dark: float
    bright: float


@dataclass(frozen=True, slots=True)
class AlphaUse:
    """Shares of 0..1 of the pixels that are wholly transparent, half transparent and opaque; they sum to 1."""

    transparent: float
    partial: float
    opaque: float


@dataclass(frozen=True, slots=True)
class PixelStatistics:
    """Everything in this module about one picture; each field is the function of the same name."""

    brightness: float
    contrast: float
    exposure: Exposure
    entropy: float
    sharpness: float
    saturation: float
    colourfulness: float
    uniform: bool
    near_black: bool


def measure(image: Picture) -> PixelStatistics:
    """All statistics of a picture, with the luma computed once.

    Args:
        image: uint8, (height, width, 3).

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    luma = _luma(image)
    counts = _counts(luma)
    return PixelStatistics(
        brightness=_brightness(counts),
        contrast=_contrast(counts),
        exposure=_exposure(counts, 2),
        entropy=_entropy(counts),
        sharpness=_laplacian_variance(np.asarray(luma)),
        saturation=saturation(image),
        colourfulness=colourfulness(image),
        uniform=is_uniform(image),
        near_black=_near_black(counts, 16, 0.999),
    )


def brightness(image: Picture) -> float:
    """Mean luma: ``mean(L) / 255``.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        0..1, black to white; neither end is better.

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    return _brightness(_counts(_luma(image)))


def contrast(image: Picture) -> float:
    """RMS contrast: the standard deviation of luma, ``std(L) / 255``.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        0..0.5; higher is more contrast, 0 is one flat gray.

    Raises:
        ValueError: another shape or type, or no pixels.

    Source: Peli 1990, Contrast in complex images.
    """
    return _contrast(_counts(_luma(image)))


def exposure(image: Picture, margin: int = 2) -> Exposure:
    """Shares of pixels whose luma is clipped: ``L <= margin`` and ``L >= 255 - margin``.

    Args:
        image: uint8, (height, width, 3).
        margin: 0..127, levels at each end that count as clipped; compression moves pure black and white by one or two.

    Returns:
        Two shares of 0..1; lower is better.

    Raises:
        ValueError: another shape or type, no pixels, or another margin.
    """
    return _exposure(_counts(_luma(image)), margin)


def entropy(image: Picture) -> float:
    """Shannon entropy of the luma histogram: ``-Σ p log2 p`` over 256 levels.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        Bits, 0..8; higher is more varied.

    Raises:
        ValueError: another shape or type, or no pixels.

    Source: equals ``skimage.measure.shannon_entropy`` (BSD-3) of the same luma.
    """
    return _entropy(_counts(_luma(image)))


def sharpness(image: Picture) -> float:
    """Variance of the Laplacian of luma; the kernel is 4-connected, the border mirrored without repeating its edge.

    It grows with noise and with the size of detail in pixels: compare pictures of one resolution only.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        0 upwards, in squared levels; higher is sharper, under about 100 is often blurred.

    Raises:
        ValueError: another shape or type, or no pixels.

    Source: Pech-Pacheco et al. 2000; equals ``cv2.Laplacian(L, cv2.CV_64F).var()`` (Apache-2.0).
    """
    return _laplacian_variance(np.asarray(_luma(image)))


def saturation(image: Picture) -> float:
    """Mean HSV saturation: ``mean((max - min) / max)`` over R, G, B, with 0 for black.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        0..1; higher is more colour, 0 is a gray picture.

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    _check(image)
    total = 0.0
    for rows in _row_blocks(image):
        red, green, blue = rows[..., 0], rows[..., 1], rows[..., 2]
        highest = np.maximum(np.maximum(red, green), blue)
        spread = (highest - np.minimum(np.minimum(red, green), blue)).astype(np.float32)
        # Where the highest is 0 the spread is, too: dividing by 1 gives black its 0 without a warning.
        total += float((spread / np.maximum(highest, 1)).sum(dtype=np.float64))
    return total / (image.shape[0] * image.shape[1])


def colourfulness(image: Picture) -> float:
    """Colourfulness: ``sqrt(σrg² + σyb²) + .3 sqrt(μrg² + μyb²)``, ``rg = R - G``, ``yb = (R + G) / 2 - B``.

    Args:
        image: uint8, (height, width, 3).

    Returns:
        0 upwards: 0 none, 15 slight, 33 moderate, 45 average, 59 quite, 82 high, 109 extreme; higher is more colourful.

    Raises:
        ValueError: another shape or type, or no pixels.

    Source: Hasler and Süsstrunk 2003, Measuring colourfulness in natural images.
    """
    _check(image)
    sums_rg, sums_yb = _Sums(), _Sums()
    for rows in _row_blocks(image):
        red, green, blue = (rows[..., channel].astype(np.int16) for channel in range(3))
        sums_rg.add(red - green)
        sums_yb.add(red + green - 2 * blue)
    (mean_rg, variance_rg), (mean_yb, variance_yb) = sums_rg.moments, sums_yb.moments
    mean_yb, variance_yb = mean_yb / 2, variance_yb / 4
    return math.sqrt(variance_rg + variance_yb) + 0.3 * math.hypot(mean_rg, mean_yb)


def alpha_use(image: Picture) -> AlphaUse:
    """How much of a picture its alpha channel hides.

    Args:
        image: uint8, (height, width, 4), or the alpha plane alone, (height, width).

    Returns:
        Three shares of 0..1; an alpha channel of no use is all opaque.

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 4)) or not image.size:
        raise ValueError(f"expected uint8 (height, width, 4) or (height, width), not {image.dtype} {image.shape}")
    counts = _counts(Image.fromarray(np.ascontiguousarray(image if image.ndim == 2 else image[..., 3])))
    pixels = counts.sum()
    transparent, opaque = float(counts[0] / pixels), float(counts[255] / pixels)
    return AlphaUse(transparent, float(counts[1:255].sum() / pixels), opaque)


def is_uniform(image: Picture, tolerance: int = 0) -> bool:
    """Whether no channel varies by more than ``tolerance`` levels: one flat colour.

    Args:
        image: uint8, (height, width, 3).
        tolerance: 0..255.

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    _check(image)
    extremes: Any = Image.fromarray(image).getextrema()
    return all(high - low <= tolerance for low, high in extremes)


def is_near_black(image: Picture, level: int = 16, share: float = 0.999) -> bool:
    """Whether at least ``share`` of the pixels have a luma of at most ``level``: a black frame, noise included.

    Args:
        image: uint8, (height, width, 3).
        level: 0..255.
        share: 0..1.

    Raises:
        ValueError: another shape or type, or no pixels.
    """
    return _near_black(_counts(_luma(image)), level, share)


def _brightness(counts: npt.NDArray[np.int64]) -> float:
    return float(counts @ _LEVELS / counts.sum()) / 255


def _contrast(counts: npt.NDArray[np.int64]) -> float:
    pixels = counts.sum()
    mean = counts @ _LEVELS / pixels
    return math.sqrt(float(counts @ (_LEVELS - mean) ** 2 / pixels)) / 255


def _exposure(counts: npt.NDArray[np.int64], margin: int) -> Exposure:
    if not 0 <= margin <= 127:
        raise ValueError(f"margin: expected 0 to 127, not {margin}")
    pixels = counts.sum()
    return Exposure(float(counts[: margin + 1].sum() / pixels), float(counts[255 - margin :].sum() / pixels))


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(shares @ np.log2(shares))))


def _near_black(counts: npt.NDArray[np.int64], level: int, share: float) -> bool:
    return bool(counts[: level + 1].sum() >= share * counts.sum())


def _laplacian_variance(luma: Picture) -> float:
    # A side of one pixel has nothing to mirror: there its own pixel stands in, as in cv2.
    height, width = luma.shape
    padded = np.empty((height + 2, width + 2), dtype=np.int16)
    padded[1:-1, 1:-1] = luma
    padded[0], padded[-1] = padded[min(2, height)], padded[max(1, height - 1)]
    padded[:, 0], padded[:, -1] = padded[:, min(2, width)], padded[:, max(1, width - 1)]
    sums = _Sums()
    for rows in _row_blocks(padded, overlap=2):
        around = rows[:-2, 1:-1] + rows[2:, 1:-1]
        around += rows[1:-1, :-2]
        around += rows[1:-1, 2:]
        around -= 4 * rows[1:-1, 1:-1]
        sums.add(around)
    return sums.moments[1]


class _Sums:
    """Sums of whole numbers and of their squares, which stay below 2**53: float64 holds them exactly."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: npt.NDArray[np.int16]) -> None:
        flat = values.astype(np.float64).ravel()
        self.count += flat.size
        self.total += float(flat.sum())
        self.squares += float(flat @ flat)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        mean = self.total / self.count
        return mean, max(0.0, self.squares / self.count - mean * mean)


def _row_blocks(plane: npt.NDArray[Any], overlap: int = 0) -> Iterator[npt.NDArray[Any]]:
    """Rows in blocks that fit a core's cache, several times faster than one pass over the whole for each operation."""
    step = max(1, _PIXELS_AT_ONCE // plane.shape[1])
    for first in range(0, plane.shape[0] - overlap, step):
        yield plane[first : first + step + overlap]


def _luma(image: Picture) -> Image.Image:
    _check(image)
    return Image.fromarray(image).convert("L")


def _counts(plane: Image.Image) -> npt.NDArray[np.int64]:
    return np.array(plane.histogram(), dtype=np.int64)


def _check(image: Picture) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected uint8 (height, width, 3), not {image.dtype} {image.shape}")
