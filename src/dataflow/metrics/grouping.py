"""Pictures that are alike, as groups with one that stands for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError

Indices = npt.NDArray[np.int64]

_PAIRS_AT_ONCE = 2**20
_PURPOSE = "grouping duplicates"


@dataclass(frozen=True, slots=True)
class DuplicateGroups:
    """Which pictures look the same.

    Args:
        labels: shape (n,), the group of each picture; groups are numbered by their first member.
        representatives: shape (groups,), the index of the picture that stands for each group.
    """

    labels: Indices
    representatives: Indices

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Shape (n,), whether a picture stands for its group: what is left without duplicates."""
        kept = np.zeros(len(self.labels), dtype=np.bool_)
        kept[self.representatives] = True
        return kept


def groups_of(
    pairs: Iterable[tuple[Indices, Indices]], members: Indices, priority: npt.ArrayLike | None = None
) -> DuplicateGroups:
    """Groups of all that hang together by pairs.

    Args:
        pairs: of places among the things compared, in blocks of any length.
        members: shape (n,), which of the things compared each picture is.
        priority: shape (n,), real numbers, say a quality: the highest stands for its group, and of equal ones the
            first. Without it the first does.

    Raises:
        ValueError: a priority of another length or with NaN.
        MissingExtraError: scipy is not installed.
    """
    labels = np.arange(int(members.max(initial=-1)) + 1)
    waiting: list[tuple[Indices, Indices]] = []
    for left, right in pairs:
        waiting.append((left, right))
        if sum(len(one) for one, _ in waiting) >= _PAIRS_AT_ONCE:
            labels = _joined(labels, waiting)
            waiting = []
    labels = _joined(labels, waiting)[members]
    _, first_members, labels = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first_members, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    labels = rank[labels.ravel()].astype(np.int64)
    return DuplicateGroups(labels, _representatives(labels, first_members[order].astype(np.int64), priority))


def _representatives(labels: Indices, first_members: Indices, priority: npt.ArrayLike | None) -> Indices:
    if priority is None:
        return first_members
    worth = np.asarray(priority, dtype=np.float64)
    if worth.shape != labels.shape or np.isnan(worth).any():
        raise ValueError(f"priority: expected {len(labels)} numbers without NaN, not shape {worth.shape}")
    order = np.lexsort((np.arange(len(labels)), -worth, labels))
    return order[np.searchsorted(labels[order], np.arange(len(first_members)))].astype(np.int64)


def _joined(labels: Indices, pairs: list[tuple[Indices, Indices]]) -> Indices:
    if not pairs:
        return labels
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", _PURPOSE) from error
    left = labels[np.concatenate([one for one, _ in pairs])]
    right = labels[np.concatenate([other for _, other in pairs])]
    ones = np.ones(len(left), dtype=np.bool_)
    graph = coo_array((ones, (left, right)), shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[labels]


def require() -> None:
    """Find out, without importing it, whether the library that joins the groups is there.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtraError("scipy", "metrics", _PURPOSE)
