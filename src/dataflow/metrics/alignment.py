"""How well embeddings agree: image with text, edit with instruction, image with image.

Everything takes embeddings that were made elsewhere, one row each, in any float type, and computes in float64. One
vector is one row; where one side has a single row, it is compared with every row of the other. A row of zeros, NaN or
infinity has no direction and raises ValueError with its number: no score is ever NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

UNCHANGED = 1e-6
"""Two unit vectors nearer than this are one: it is the rounding of float32 features, not a direction."""


def unit_rows(features: npt.ArrayLike, name: str = "features") -> FloatArray:
    """``features`` as float64 rows of length one.

    Args:
        features: shape (d,) or (n, d), any real type.
        name: what an error calls them.

    Returns:
        Shape (n, d), float64; (d,) becomes (1, d).

    Raises:
        ValueError: another shape, no columns, or rows that are zero or not finite.
    """
    rows = np.atleast_2d(np.asarray(features, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (d,) or (n, d), not {np.shape(features)}")
    # Dividing by the largest entry first keeps tiny and huge rows from under- and overflowing when squared.
    largest = np.abs(rows).max(axis=1, initial=0.0)
    useless = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if useless.size:
        shown = ", ".join(map(str, useless[:5])) + (", ..." if useless.size > 5 else "")
        raise ValueError(f"{name}: no direction in row {shown} (zeros, NaN or infinity)")
    rows = rows / largest[:, None]
    return rows / np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]


def cosine(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Cosine of the angle between rows: ``a·b / (|a| |b|)``.

    Args:
        first: shape (d,) or (n, d).
        second: the same, or one row for all.

    Returns:
        Shape (n,), float64, -1..1; higher is more alike.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.
    """
    left, right = _paired(unit_rows(first, "first"), unit_rows(second, "second"))
    return np.clip(np.einsum("nd,nd->n", left, right), -1.0, 1.0)


def clip_score(images: npt.ArrayLike, texts: npt.ArrayLike, *, clamp: bool = True) -> FloatArray:
    """CLIPScore as torchmetrics scales it: ``100 · max(cos(image, text), 0)``.

    torchmetrics clamps only the mean of a data set. To reproduce its number where single cosines are negative, use
    ``max(clip_score(..., clamp=False).mean(), 0)``.

    Args:
        images: CLIP image embeddings, shape (d,) or (n, d).
        texts: CLIP text embeddings, the same, or one row for all.
        clamp: cut at zero for each pair.

    Returns:
        Shape (n,), float64, 0..100 (-100..100 without ``clamp``); higher is better, 15 to 40 is usual.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: Hessel et al. 2021, arXiv:2104.08718; scale of torchmetrics ``CLIPScore`` (Apache-2.0).
    """
    scores = 100.0 * cosine(images, texts)
    return np.maximum(scores, 0.0) if clamp else scores


def clip_score_hessel(images: npt.ArrayLike, texts: npt.ArrayLike) -> FloatArray:
    """CLIPScore as published: ``2.5 · max(cos(image, text), 0)``, for ViT-B/32 and texts after "A photo depicts".

    Args:
        images: CLIP image embeddings, shape (d,) or (n, d).
        texts: CLIP text embeddings, the same, or one row for all.

    Returns:
        Shape (n,), float64, 0..2.5; higher is better.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: Hessel et al. 2021, arXiv:2104.08718; ``jmhessel/clipscore`` (MIT).
    """
    return 2.5 * np.maximum(cosine(images, texts), 0.0)


def image_similarity(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """CLIP-I with CLIP image embeddings, DINO-I with DINO embeddings: the cosine of two images' embeddings.

    Args:
        first: image embeddings, shape (d,) or (n, d).
        second: the same, or one row for all.

    Returns:
        Shape (n,), float64, -1..1; higher is more alike, which for an edit means better kept, not better done.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: Ruiz et al. 2023 (DreamBooth), arXiv:2208.12242; MagicBrush, arXiv:2306.10012 (CC-BY-4.0).
    """
    return cosine(first, second)


def directional_similarity(
    image_before: npt.ArrayLike,
    image_after: npt.ArrayLike,
    text_before: npt.ArrayLike,
    text_after: npt.ArrayLike,
) -> list[float | None]:
    """CLIP directional similarity: ``cos(i1 - i0, t1 - t0)`` over embeddings of length one.

    An image that did not change, or two captions that say the same, have no direction: the answer is None, as there is
    nothing to compare, and not 0, which would say that the edit went sideways.

    Args:
        image_before: CLIP embeddings of the images before the edit, shape (d,) or (n, d).
        image_after: of the images after it.
        text_before: of the captions that fit the images before it.
        text_after: of the captions that fit the images after it.

    Returns:
        n values of -1..1 or None; higher is better. InstructPix2Pix keeps edits from 0.2 on.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: Gal et al. 2021 (StyleGAN-NADA), arXiv:2108.00946; ``timothybrooks/instruct-pix2pix`` (MIT).
    """
    images = _step(unit_rows(image_before, "image_before"), unit_rows(image_after, "image_after"))
    texts = _step(unit_rows(text_before, "text_before"), unit_rows(text_after, "text_after"))
    images, texts = _paired(images, texts)
    lengths = np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1)
    dots = np.einsum("nd,nd->n", images, texts)
    return [
        None if min(moved, said) < UNCHANGED else float(np.clip(dot / (moved * said), -1.0, 1.0))
        for dot, moved, said in zip(dots, *lengths, strict=True)
    ]


def _paired(left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"rows of {left.shape[1]} and of {right.shape[1]} numbers cannot be compared")
    if len(left) != len(right) and 1 not in (len(left), len(right)):
        raise ValueError(f"{len(left)} rows against {len(right)}: give as many, or one for all")
    rows = len(right) if len(left) == 1 else len(left)
    return np.broadcast_to(left, (rows, left.shape[1])), np.broadcast_to(right, (rows, right.shape[1]))


def _step(before: FloatArray, after: FloatArray) -> FloatArray:
    before, after = _paired(before, after)
    return after - before
