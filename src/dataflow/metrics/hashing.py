"""Pictures that look the same: 64-bit perceptual hashes, and all near ones among a million of them.

Two hashes are near where at most ``distance`` of their 64 bits differ. The search is exact and never compares all with
all: the bits are dealt into three bands, and two hashes that differ in d bits differ in some band by little enough
that trying all small changes of that band's bits finds them (multi-index hashing, Norouzi et al. 2012). Every
candidate is verified. Memory grows with the number of hashes, not of pairs; time grows with the number of hashes and
steeply with the distance, and where very many hashes lie close together, with the number of their pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError
from dataflow.metrics.grouping import DuplicateGroups, Indices, groups_of

if TYPE_CHECKING:
    from PIL.Image import Image

Hashes = npt.NDArray[np.uint64]

MAX_DISTANCE = 10
"""Beyond this, pictures with the same hash distance seldom look the same, and the search grows slow."""

_BANDS = 3
_CANDIDATES_AT_ONCE = 2**21


def phash(image: Image) -> int:
    """Perceptual hash: which of the 8 x 8 lowest DCT coefficients of the 32 x 32 gray picture exceed their median.

    Args:
        image: any Pillow picture.

    Returns:
        0..2**64 - 1. Equal looks are 0 to about 10 bits apart; mirrored and cropped pictures are not.

    Raises:
        MissingExtraError: imagehash is not installed.

    Source: ``imagehash.phash`` (BSD-2), after Zauner 2010.
    """
    return int(str(_imagehash().phash(image)), 16)


def dhash(image: Image) -> int:
    """Difference hash: whether each pixel of the 9 x 8 gray picture is darker than the one to its right.

    Args:
        image: any Pillow picture.

    Returns:
        0..2**64 - 1. Faster than :func:`phash` and a little less tolerant.

    Raises:
        MissingExtraError: imagehash is not installed.

    Source: ``imagehash.dhash`` (BSD-2).
    """
    return int(str(_imagehash().dhash(image)), 16)


def hamming(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """How many bits differ, element by element, as numpy broadcasts.

    Args:
        first: hashes, as :func:`as_hashes` takes them, of any shape.
        second: the same.

    Returns:
        uint8, 0..64; lower is more alike.

    Raises:
        ValueError: not 64-bit hashes, or shapes that do not fit.
    """
    return _bits_set(np.bitwise_xor(_as_words(first), _as_words(second)))


def as_hashes(hashes: npt.ArrayLike) -> Hashes:
    """Hashes as a uint64 array: whole numbers of 0..2**64 - 1, or int64 arrays, whose bits are read as they are.

    Raises:
        ValueError: other types or numbers, or not one dimension.
    """
    words = _as_words(hashes)
    if words.ndim != 1:
        raise ValueError(f"hashes: expected one dimension, not shape {words.shape}")
    return words


def near_pairs(hashes: npt.ArrayLike, distance: int) -> Iterator[tuple[Indices, Indices, npt.NDArray[np.uint8]]]:
    """Every pair of hashes at most ``distance`` bits apart, each once, in pieces, in no particular order.

    Args:
        hashes: shape (n,), n up to 2**31.
        distance: 0..10.

    Yields:
        Two int64 arrays of indices, the smaller one first, and a uint8 array of distances; all of one length.

    Raises:
        ValueError: not 64-bit hashes, or another distance.
    """
    words = as_hashes(hashes)
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance: expected 0 to {MAX_DISTANCE}, not {distance}")
    return _near_pairs(words, distance)


def duplicate_groups(hashes: npt.ArrayLike, distance: int, priority: npt.ArrayLike | None = None) -> DuplicateGroups:
    """Groups of pictures that look the same: whoever is near a member belongs, so two members can be further apart.

    The answer depends on the hashes alone, not on chance or the order of the search. A million random hashes take
    seconds.

    Args:
        hashes: shape (n,).
        distance: 0..10. 4 is careful, 8 is usual for phash, 10 begins to join different pictures.
        priority: shape (n,), real numbers, say a quality: the highest stands for its group, and of equal ones the
            first. Without it the first does.

    Raises:
        ValueError: not 64-bit hashes, another distance, or a priority of another length or with NaN.
        MissingExtraError: scipy is not installed.
    """
    words = as_hashes(hashes)
    # Equal hashes first: a data set with a hundred thousand white pictures has five thousand million pairs of them.
    unique, of_unique = np.unique(words, return_inverse=True)
    pairs = ((left, right) for left, right, _ in near_pairs(unique, distance))
    return groups_of(pairs, of_unique.ravel(), priority)


@dataclass(frozen=True, slots=True)
class _Band:
    """Every third bit of the hashes, and how many of them are changed in the search."""

    bits: int
    first_bit: int
    radius: int

    @property
    def mask(self) -> np.uint64:
        return np.uint64(sum(1 << bit for bit in range(self.first_bit, 64, _BANDS)))

    def keys(self, words: Hashes) -> npt.NDArray[np.uint32]:
        keys = np.zeros(len(words), dtype=np.uint32)
        for position, bit in enumerate(range(self.first_bit, 64, _BANDS)):
            keys |= ((words >> np.uint64(bit)) & np.uint64(1)).astype(np.uint32) << np.uint32(position)
        return keys

    def changes(self, highest: int) -> Iterator[np.uint32]:
        """Every set of at most ``radius`` bits of which ``highest`` is the highest."""
        for others in range(self.radius):
            for chosen in combinations(range(highest), others):
                yield np.uint32((1 << highest) + sum(1 << bit for bit in chosen))


def _bands(distance: int) -> list[_Band]:
    """Bands and radii that miss no pair: more than each radius in each band would be more than ``distance`` in all.

    Neighbouring bits of an image hash depend on each other, so bands take every third bit: their keys spread better.
    """
    spare, extra = divmod(distance - _BANDS + 1, _BANDS)
    radii = [spare + (number >= _BANDS - extra) for number in range(_BANDS)]
    return [_Band(len(range(number, 64, _BANDS)), number, radius) for number, radius in enumerate(radii) if radius >= 0]


def _near_pairs(words: Hashes, distance: int) -> Iterator[tuple[Indices, Indices, npt.NDArray[np.uint8]]]:
    done: list[_Band] = []
    for band in _bands(distance):
        keys = band.keys(words)
        order = np.argsort(keys, kind="stable")
        keys, sorted_words = keys[order], words[order]
        for left, right in _candidates(band, keys):
            differing = sorted_words[left] ^ sorted_words[right]
            apart = _bits_set(differing)
            near = apart <= distance
            if not near.any():
                continue
            differing, apart, left, right = differing[near], apart[near], left[near], right[near]
            # A pair that an earlier band found already is left to it.
            new = np.ones(len(differing), dtype=np.bool_)
            for earlier in done:
                new &= _bits_set(differing & earlier.mask) > earlier.radius
            if new.any():
                one, other = order[left[new]], order[right[new]]
                yield np.minimum(one, other), np.maximum(one, other), apart[new]
        done.append(band)


def _candidates(band: _Band, keys: npt.NDArray[np.uint32]) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of places in the sorted ``keys`` whose keys differ in at most the band's radius of bits, each once."""
    counts = np.bincount(keys, minlength=1 << band.bits)
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    occupied = counts > 0
    places = np.arange(len(keys), dtype=np.int64)
    # The same key: a place is paired with those after it in its bucket.
    yield from _expanded(places, places + 1, starts[keys.astype(np.int64) + 1])
    if band.radius == 0:
        return
    for highest in range(band.bits):
        # Of two keys that differ, the one without the highest differing bit looks for the other: each pair once.
        asking = np.flatnonzero((keys >> np.uint32(highest)) & np.uint32(1) == 0)
        asking_keys = keys[asking]
        for change in band.changes(highest):
            wanted = asking_keys ^ change
            hits = np.flatnonzero(occupied[wanted])
            if hits.size:
                found = wanted[hits].astype(np.int64)
                yield from _expanded(asking[hits], starts[found], starts[found + 1])


def _expanded(left: Indices, begin: Indices, end: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Each ``left`` with all of ``begin`` to ``end``, in pieces of bounded size."""
    sizes = end - begin
    total = np.cumsum(sizes)
    candidates = int(total[-1]) if len(total) else 0
    for first in range(0, candidates, _CANDIDATES_AT_ONCE):
        numbers = np.arange(first, min(first + _CANDIDATES_AT_ONCE, candidates), dtype=np.int64)
        if len(numbers) == candidates:
            of = np.repeat(np.arange(len(sizes)), sizes)
        else:
            of = np.searchsorted(total, numbers, side="right")
        yield left[of], (begin - total + sizes)[of] + numbers


def _bits_set(words: Hashes) -> npt.NDArray[np.uint8]:
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return _bits_set_by_table(words)


def _bits_set_by_table(words: Hashes) -> npt.NDArray[np.uint8]:
    """The same for numpy before 2.0: 16 bits at a time."""
    table = np.zeros(1 << 16, dtype=np.uint8)
    for bit in range(16):
        table[1 << bit : 2 << bit] = table[: 1 << bit] + 1
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return table[halves].sum(axis=-1, dtype=np.uint8)


def _as_words(hashes: npt.ArrayLike) -> Hashes:
    if isinstance(hashes, np.ndarray) and hashes.dtype == np.int64:
        return hashes.view(np.uint64)
    if isinstance(hashes, np.ndarray) and hashes.dtype.kind == "u":
        return hashes.astype(np.uint64, copy=False)
    try:
        exact = np.asarray(hashes, dtype=object)
        if exact.size and not all(isinstance(value, int | np.integer) for value in exact.flat):
            raise ValueError("hashes: expected whole numbers")
        return np.asarray(hashes, dtype=np.uint64)
    except OverflowError as error:
        raise ValueError("hashes: expected numbers of 0 to 2**64 - 1") from error


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError as error:
        raise MissingExtraError("imagehash", "metrics", "perceptual hashes") from error
    return imagehash
