"""Similar vectors, against all cosines."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("faiss")

from scipy.sparse.csgraph import connected_components

from dataflow.metrics import neighbours
from dataflow.metrics.neighbours import similar_groups


def reader(vectors):
    return lambda start, stop: vectors[start:stop]


def noisy_copies(count, copies, noise, size=48, seed=0):
    """``copies`` of each of ``count`` random directions, each a little off, in mixed order."""
    random = np.random.default_rng(seed)
    base = np.repeat(random.normal(size=(count, size)), copies, axis=0)
    vectors = base + random.normal(size=base.shape) * noise
    order = random.permutation(len(vectors))
    return (vectors * random.uniform(0.1, 10, (len(vectors), 1)))[order].astype(np.float32), (order // copies)


def brute_force(vectors, similarity):
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return connected_components(units @ units.T >= similarity, directed=False)[1]


def same_partition(one, other):
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("similarity", [0.8, 0.95, 0.999])
def test_groups_are_those_of_all_cosines(similarity):
    vectors, _ = noisy_copies(300, 4, 0.15)
    found = similar_groups(reader(vectors), len(vectors), similarity)
    assert same_partition(found.labels, brute_force(vectors, similarity))
    assert 300 <= found.kept.sum() <= 1200


def test_the_index_finds_what_is_there(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    vectors, truth = noisy_copies(4000, 3, 0.05)
    found = similar_groups(reader(vectors), len(vectors), 0.95)
    assert found.kept.sum() == pytest.approx(4000, abs=8)
    # whoever was put together belongs together
    assert len(set(zip(found.labels.tolist(), truth.tolist(), strict=True))) == found.kept.sum()


def test_more_of_one_kind_than_neighbours_are_looked_at():
    vectors = np.concatenate([np.ones((500, 8)), np.eye(8)]).astype(np.float32)
    vectors[:500] += np.random.default_rng(0).normal(size=(500, 8)) * 1e-6
    assert similar_groups(reader(vectors), len(vectors), 0.99).kept.sum() == 9


def test_the_highest_priority_stands_for_its_group():
    vectors, truth = noisy_copies(20, 5, 0.01)
    priority = np.random.default_rng(1).permutation(100)
    kept = np.flatnonzero(similar_groups(reader(vectors), 100, 0.95, priority).kept)
    assert sorted(kept) == sorted(max(np.flatnonzero(truth == n), key=lambda at: priority[at]) for n in range(20))
    first = np.flatnonzero(similar_groups(reader(vectors), 100, 0.95).kept)
    assert sorted(first) == sorted(np.flatnonzero(truth == n)[0] for n in range(20))


def test_what_has_no_direction_is_like_nothing():
    vectors = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [np.nan, 1], [np.inf, 1]], dtype=np.float32)
    assert similar_groups(reader(vectors), 6, 0.9).kept.tolist() == [True, True, True, False, True, True]


def test_nothing_and_one():
    assert similar_groups(reader(np.empty((0, 3))), 0, 0.9).kept.tolist() == []
    assert similar_groups(reader(np.ones((1, 3))), 1, 0.9).kept.tolist() == [True]


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.1, float("nan")])
def test_what_is_no_similarity(similarity):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        similar_groups(reader(np.ones((2, 3))), 2, similarity)
