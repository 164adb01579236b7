"""Pictures that are alike by their vectors, found through an index and never each with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError
from dataflow.metrics.grouping import DuplicateGroups, Indices, groups_of

FloatArray = npt.NDArray[np.float32]

EXACT_UP_TO = 20_000
NEIGHBOURS = 32
_BLOCK = 8192
_CELLS_SEARCHED = 16
_TRAINED_ON_EACH = 40


def similar_groups(
    read: Callable[[int, int], npt.ArrayLike],
    count: int,
    similarity: float,
    priority: npt.ArrayLike | None = None,
) -> DuplicateGroups:
    """Groups of pictures whose vectors have a cosine of at least ``similarity``: whoever is near a member belongs.

    Each picture meets its 32 nearest ones. Up to 20,000 pictures the search is exact; beyond, the nearest are looked
    for in 16 cells of an inverted file, which at a cosine of 0.9 and more misses about one pair in a thousand. Memory:
    two bytes for each number of each vector. Every vector is read twice, in blocks.

    Args:
        read: the vectors from the first place to before the second, shape (stop - start, d), any real type; rows
            without a direction (zeros, NaN, infinity) are like no other.
        count: how many there are.
        similarity: above 0, at most 1. 0.95 is usual for near duplicates with CLIP and DINOv2.
        priority: shape (count,), the highest stands for its group; without it the first does.

    Raises:
        ValueError: another similarity, or a priority of another length or with NaN.
        MissingExtraError: faiss or scipy are not installed.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be above 0 and at most 1, got {similarity!r}")
    everyone = np.arange(count)
    if not count:
        return groups_of((), everyone, priority)
    return groups_of(_pairs(read, count, similarity), everyone, priority)


def _pairs(
    read: Callable[[int, int], npt.ArrayLike], count: int, similarity: float
) -> Iterator[tuple[Indices, Indices]]:
    index = _index(read, count)
    for start in range(0, count, _BLOCK):
        stop = min(count, start + _BLOCK)
        cosines, places = index.search(_unit(read(start, stop)), min(NEIGHBOURS, count))
        # Two bytes for a number round a cosine by up to 0.0005.
        left, which = np.nonzero((cosines >= similarity - 5e-4) & (places >= 0))
        yield left.astype(np.int64) + start, places[left, which].astype(np.int64)


def _index(read: Callable[[int, int], npt.ArrayLike], count: int) -> Any:
    faiss = _faiss()
    size = _unit(read(0, 1)).shape[1]
    if count <= EXACT_UP_TO:
        index = faiss.index_factory(size, "SQfp16", faiss.METRIC_INNER_PRODUCT)
        sample = _unit(read(0, min(count, _BLOCK)))
    else:
        cells = int(4 * count**0.5)
        index = faiss.index_factory(size, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _CELLS_SEARCHED
        sample = _sample(read, count, cells * _TRAINED_ON_EACH)
    index.train(sample)
    for start in range(0, count, _BLOCK):
        index.add(_unit(read(start, min(count, start + _BLOCK))))
    return index


def _sample(read: Callable[[int, int], npt.ArrayLike], count: int, wanted: int) -> FloatArray:
    """Blocks from all over: a table's neighbours are alike."""
    random = np.random.default_rng(0)
    length = 64
    starts = np.unique(random.integers(0, max(1, count - length), max(1, wanted // length)))
    return np.concatenate([_unit(read(int(start), int(start) + length)) for start in starts])


def _unit(rows: npt.ArrayLike) -> FloatArray:
    vectors = np.asarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    good = np.isfinite(lengths) & (lengths > 0)
    return np.ascontiguousarray(np.where(good, vectors, 0) / np.where(good, lengths, 1), dtype=np.float32)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "metrics", "finding similar pictures by their vectors") from error
    return faiss
