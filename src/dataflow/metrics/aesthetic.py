"""The LAION aesthetic score: a linear function of a CLIP embedding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dataflow.metrics.alignment import unit_rows

FloatArray = npt.NDArray[np.float64]


def collapsed_head(tensors: Mapping[str, npt.ArrayLike]) -> tuple[FloatArray, float]:
    """One vector and one number for a head of linear layers with nothing but dropout between them.

    The released predictors (v1 one layer, v2 five) have no activations, so that they are ``w · x + b`` in the end.

    Args:
        tensors: ``….weight`` of shape (outputs, inputs) and ``….bias``, of layers that follow one another in the order
            of the numbers in their names.

    Returns:
        Shape (d,) float64, and the bias.

    Raises:
        ValueError: layers that do not fit, or that end in more than one number.

    Source: ``christophschuhmann/improved-aesthetic-predictor`` and ``LAION-AI/aesthetic-predictor`` (Apache-2.0).
    """
    names = sorted(
        (name.removesuffix(".weight") for name in tensors if name.endswith("weight")),
        key=lambda name: [int(part) for part in name.split(".") if part.isdigit()],
    )
    if not names:
        raise ValueError("a head needs layers with a weight and a bias")
    weight: FloatArray | None = None
    bias = np.zeros(1)
    for name in names:
        prefix = "" if name == "weight" else f"{name}."
        layer = np.atleast_2d(np.asarray(tensors[f"{prefix}weight"], dtype=np.float64))
        if f"{prefix}bias" not in tensors:
            raise ValueError(f"the layer {name!r} has no bias")
        offset = np.atleast_1d(np.asarray(tensors[f"{prefix}bias"], dtype=np.float64))
        if weight is not None and layer.shape[1] != weight.shape[0]:
            raise ValueError(
                f"the layer {name!r} takes {layer.shape[1]} numbers, the one before gives {weight.shape[0]}"
            )
        weight, bias = (layer, offset) if weight is None else (layer @ weight, layer @ bias + offset)
    assert weight is not None
    if weight.shape[0] != 1:
        raise ValueError(f"the head ends in {weight.shape[0]} numbers, not in one score")
    return weight[0], float(bias[0])


def aesthetic_score(features: npt.ArrayLike, weight: npt.ArrayLike, bias: float) -> FloatArray:
    """``w · x / |x| + b``.

    Args:
        features: CLIP image embeddings (ViT-L/14 for the released heads), shape (d,) or (n, d).
        weight: shape (d,).
        bias: of the head.

    Returns:
        Shape (n,), about 1..10, higher is better; LAION-Aesthetics keeps 4.5, 5, 6 or 6.5 and more.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: as :func:`collapsed_head`.
    """
    rows, head = unit_rows(features), np.asarray(weight, dtype=np.float64)
    if head.shape != rows.shape[1:]:
        raise ValueError(f"the head is for {head.size} numbers, the features have {rows.shape[1]}")
    return rows @ head + bias
