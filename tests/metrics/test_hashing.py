"""Hashes against imagehash and their own tolerance; the search against comparing all with all."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import MissingExtraError
from dataflow.metrics import grouping, hashing

pytest.importorskip("scipy", reason="scipy joins the groups")


def all_with_all(words, distance):
    """{(i, j): distance} of every near pair, by comparing all of a small set."""
    found = {}
    values = [int(word) for word in words]
    for i, one in enumerate(values):
        for j in range(i + 1, len(values)):
            apart = (one ^ values[j]).bit_count()
            if apart <= distance:
                found[i, j] = apart
    return found


def clustered(rng, count):
    """Hashes around a few centres at all distances from 0 to beyond 10, equal ones included."""
    centres = rng.integers(0, 2**64, 12, dtype=np.uint64)
    words = []
    for _ in range(count):
        word = int(rng.choice(centres))
        for bit in rng.choice(64, int(rng.integers(0, 9)), replace=False):
            word ^= 1 << int(bit)
        words.append(word)
    return np.array(words, dtype=np.uint64)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return small.resize((256, 256), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["phash", "dhash"])
def test_hashes_are_imagehashs_bits(kind, picture):
    imagehash = pytest.importorskip("imagehash", reason="imagehash makes the hashes")
    answer = getattr(hashing, kind)(picture)
    bits = getattr(imagehash, kind)(picture).hash.ravel()
    assert 0 <= answer < 2**64
    assert answer == int("".join("1" if bit else "0" for bit in bits), 2)


@pytest.mark.parametrize("kind", ["phash", "dhash"])
def test_the_same_look_is_near_and_another_is_far(kind, picture):
    pytest.importorskip("imagehash", reason="imagehash makes the hashes")
    function = getattr(hashing, kind)
    whole = function(picture)
    assert hashing.hamming([whole], [function(picture.resize((128, 128)))])[0] <= 4
    assert hashing.hamming([whole], [function(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))])[0] > 10


def test_hamming(rng):
    first, second = rng.integers(0, 2**64, (2, 500), dtype=np.uint64)
    expected = [(int(a) ^ int(b)).bit_count() for a, b in zip(first, second, strict=True)]
    assert hashing.hamming(first, second).tolist() == expected
    assert hashing._bits_set_by_table(first ^ second).tolist() == expected
    assert hashing.hamming(first[:, None], second).shape == (500, 500)
    assert hashing.hamming(0, 2**64 - 1) == 64


def test_what_counts_as_hashes():
    assert hashing.as_hashes([0, 2**64 - 1]).tolist() == [0, 2**64 - 1]
    assert hashing.as_hashes(np.array([-1], dtype=np.int64)).tolist() == [2**64 - 1]
    assert hashing.as_hashes(np.array([7], dtype=np.uint8)).dtype == np.uint64
    assert hashing.as_hashes([]).shape == (0,)
    for bad in ([-1], [2**64], [1.5], ["ff"], np.array([1.0]), [[1, 2]], [None]):
        with pytest.raises(ValueError):
            hashing.as_hashes(bad)


@pytest.mark.parametrize("distance", range(11))
def test_every_near_pair_once(distance, rng):
    words = np.concatenate([clustered(rng, 120), rng.integers(0, 2**64, 30, dtype=np.uint64)])
    rng.shuffle(words)
    found = {}
    for left, right, apart in hashing.near_pairs(words, distance):
        for pair, bits in zip(zip(left.tolist(), right.tolist(), strict=True), apart.tolist(), strict=True):
            assert pair not in found
            found[pair] = bits
    assert found == all_with_all(words, distance)
    assert found


@pytest.mark.parametrize("distance", [4, 8, 10])
def test_no_pattern_of_differing_bits_is_missed(distance, rng):
    # All the differing bits in one third of the hash, in two, and evenly: what a banded index may get wrong.
    for third in range(3):
        for bits in (range(third, 64, 3), range(64), [b for b in range(64) if b % 3 != third]):
            word = int(rng.integers(0, 2**63))
            other = word
            for bit in rng.choice(list(bits), distance, replace=False):
                other ^= 1 << int(bit)
            pairs = [(*left, *right, *apart) for left, right, apart in hashing.near_pairs([other, word], distance)]
            assert pairs == [(0, 1, distance)]
            assert not list(hashing.near_pairs([other, word], distance - 1))


def brute_groups(words, distance):
    group = list(range(len(words)))
    for i, j in all_with_all(words, distance):
        old, new = group[j], group[i]
        group = [new if label == old else label for label in group]
    return group


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 10])
def test_groups_are_the_connected_pictures(distance, rng):
    words = clustered(rng, 150)
    groups = hashing.duplicate_groups(words, distance)
    expected = brute_groups(words, distance)
    numbers: dict[int, int] = {}
    assert groups.labels.tolist() == [numbers.setdefault(label, len(numbers)) for label in expected]
    assert groups.representatives.tolist() == [expected.index(label) for label in numbers]
    assert np.flatnonzero(groups.kept).tolist() == sorted(groups.representatives.tolist())


def test_groups_do_not_depend_on_the_order(rng):
    words = clustered(rng, 200)
    order = rng.permutation(200)
    one, other = hashing.duplicate_groups(words, 4).labels[order], hashing.duplicate_groups(words[order], 4).labels
    assert len(set(zip(one.tolist(), other.tolist(), strict=True))) == one.max() + 1 == other.max() + 1


def test_the_best_stands_for_its_group_and_the_first_of_equals():
    words = [0, 1, 3, 255 << 40, (255 << 40) + 1]
    groups = hashing.duplicate_groups(words, 1, priority=[0.5, 0.9, 0.9, -2, -1])
    assert groups.labels.tolist() == [0, 0, 0, 1, 1]
    assert groups.representatives.tolist() == [1, 4]
    for bad in ([1, 2], [1, 2, 3, 4, float("nan")]):
        with pytest.raises(ValueError, match="priority"):
            hashing.duplicate_groups(words, 1, priority=bad)


def test_a_chain_is_one_group():
    chain = [(1 << length) - 1 for length in range(0, 61, 4)]
    assert hashing.duplicate_groups(chain, 4).representatives.tolist() == [0]
    assert len(hashing.duplicate_groups(chain, 3).representatives) == len(chain)


def test_small_and_empty_sets():
    for distance in (0, 10):
        empty = hashing.duplicate_groups([], distance)
        assert len(empty.labels) == len(empty.representatives) == 0
        assert hashing.duplicate_groups([5], distance).labels.tolist() == [0]
    assert hashing.duplicate_groups([5, 5, 5], 0).labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("distance", [-1, 11])
def test_other_distances_are_refused(distance):
    with pytest.raises(ValueError, match="distance"):
        hashing.near_pairs([1, 2], distance)


def test_pieces_are_bounded_and_complete(monkeypatch, rng):
    words = clustered(rng, 300)
    whole = hashing.duplicate_groups(words, 6)
    monkeypatch.setattr(hashing, "_CANDIDATES_AT_ONCE", 7)
    monkeypatch.setattr(grouping, "_PAIRS_AT_ONCE", 3)
    again = hashing.duplicate_groups(words, 6)
    assert again.labels.tolist() == whole.labels.tolist()
    assert max(len(left) for left, _, _ in hashing.near_pairs(words, 6)) <= 7


def test_many_equal_hashes_cost_no_pairs(rng):
    words = np.zeros(200_000, dtype=np.uint64)
    words[-1] = 3
    tracemalloc.start()
    groups = hashing.duplicate_groups(words, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert groups.representatives.tolist() == [0]
    assert peak < 200e6


def test_a_hundred_thousand_with_planted_duplicates(rng):
    words = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    sources, copies = np.arange(500), np.arange(50_000, 50_500)
    for source, copy in zip(sources, copies, strict=True):
        word = int(words[source])
        for bit in rng.choice(64, source % 6, replace=False):
            word ^= 1 << int(bit)
        words[copy] = word
    groups = hashing.duplicate_groups(words, 5)
    assert (groups.labels[sources] == groups.labels[copies]).all()
    assert len(groups.representatives) >= 100_000 - 500 - 5


def test_numpy_before_2_counts_the_same_bits(monkeypatch, rng):
    words = rng.integers(0, 2**64, 50, dtype=np.uint64)
    expected = hashing.hamming(words, words[0])
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert (hashing.hamming(words, words[0]) == expected).all()


def test_missing_libraries_are_named(monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MissingExtraError, match=r"imagehash.*\[metrics\]"):
        hashing.phash(picture)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*\[metrics\]"):
        hashing.duplicate_groups([0, 1], 1)
