"""Texts that say nearly the same among millions of them: MinHash signatures, banded, and what they point to compared.

A text is the set of its n-grams; two texts are as similar as the Jaccard index of their sets. A signature of 64
permutations is dealt into 16 bands of 4, and texts that agree in a whole band are candidates (Broder 1997; Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). Of pairs with a similarity of 0.8, 99.98 % become
candidates, of 0.7 98.8 %. Candidates are compared by their sets, so that nothing counts as near that is not. A text is
only ever compared with the few hundred that came last before it in its bands and are most alike by signature: the work
grows with the number of texts, not of pairs, also where all of them come from one template.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dataflow.metrics.prompts import words

Unit = Literal["character", "word"]
Numbers = npt.NDArray[np.uint64]

PERMUTATIONS = 64
BANDS = 16
LEAST_SIMILARITY = 0.5
"""Below this too many pairs would be missed to speak of a search."""

_MOST_PER_BAND = 32
_MOST_COMPARED = 8
_SLACK = 0.15
"""By how much a signature's 64 samples may come out below the true similarity: about three standard deviations."""

_ROWS = PERMUTATIONS // BANDS
_random = np.random.Generator(np.random.PCG64(20_240_229))
_FACTORS = _random.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64)
_NOTHING = np.uint64(2**64 - 1)


def scrambled(values: Numbers) -> Numbers:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64, public domain)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shingles(text: str, unit: Unit, size: int) -> Numbers:
    """The n-grams of a text as numbers, each once, sorted; a text of fewer units is one n-gram.

    Args:
        text: as it is to be compared.
        unit: what an n-gram is of.
        size: units in one, from 1.

    Returns:
        shape (n-grams,).
    """
    if unit == "character":
        units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    else:
        units = np.array([_number(word) for word in words(text)], dtype=np.uint64)
    if not len(units):
        return np.zeros(0, np.uint64)
    count = max(1, len(units) - size + 1)
    found = np.full(count, np.uint64(size))
    for at in range(min(size, len(units))):
        found = scrambled(found ^ units[at : at + count])
    return np.unique(found)


def similarity(first: Numbers, second: Numbers) -> float:
    """Jaccard index of two sets of n-grams, 0 to 1; higher is more alike. Two empty ones are alike."""
    if not len(first) and not len(second):
        return 1.0
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def signature(grams: Numbers) -> Numbers:
    """MinHash: the least of the n-grams under each of 64 hash functions.

    Returns:
        shape (64,).
    """
    if not len(grams):
        return np.full(PERMUTATIONS, _NOTHING)
    return scrambled(grams[:, None] * _FACTORS + _OFFSETS).min(axis=0)


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which texts repeat an earlier one.

    Attributes:
        of: shape (n,), the number, from 0, of the text that each repeats, which repeats none itself; -1 for none.
        similarity: shape (n,), of the two, 0 to 1; 0 where there is none.
    """

    of: npt.NDArray[np.int32]
    similarity: npt.NDArray[np.float32]


class NearDuplicates:
    """Finds texts that repeat an earlier one. Keeps about 150 bytes for each text, and none of the texts.

    Args:
        least: Jaccard index from which on a text repeats another, 0.5 to 1.
        unit: what n-grams are of.
        size: units in one.

    Raises:
        ValueError: another similarity or size.
    """

    def __init__(self, *, least: float, unit: Unit, size: int) -> None:
        if not LEAST_SIMILARITY <= least <= 1:
            raise ValueError(f"similarity: expected {LEAST_SIMILARITY} to 1, not {least}")
        if size < 1:
            raise ValueError(f"ngram: expected a whole number from 1, not {size}")
        self._least, self._size = least, size
        self._unit: Unit = unit
        self._marks = bytearray()
        self._keys = bytearray()

    def add(self, text: str, group: int = 0) -> None:
        """The next text; only texts of one group are compared."""
        found = signature(shingles(text, self._unit, self._size))
        self._marks += found.astype(np.uint8).tobytes()
        self._keys += _band_keys(found, group).astype(np.uint32).tobytes()

    def repeats(self, text: Callable[[int], str]) -> Repeats:
        """Go through the texts in the order in which they were added; each is compared with those that are kept.

        Args:
            text: gives a text by its number, as it was added.
        """
        marks = np.frombuffer(self._marks, dtype=np.uint8).reshape(-1, PERMUTATIONS)
        before = _linked(np.frombuffer(self._keys, dtype=np.uint32).reshape(-1, BANDS))
        links = before.reshape(-1).data
        result = Repeats(np.full(len(marks), -1, np.int32), np.zeros(len(marks), np.float32))
        of = result.of.data
        for number in range(len(marks)):
            if places := _candidates(number, links, of):
                of[number], result.similarity[number] = self._nearest(number, places, marks, text)
        return result

    def _nearest(
        self, number: int, places: list[int], marks: npt.NDArray[np.uint8], text: Callable[[int], str]
    ) -> tuple[int, float]:
        alike = (marks[places] == marks[number]).mean(axis=1)
        close = [(-share, place) for share, place in zip(alike.tolist(), places, strict=True)]
        # The most alike first, and of those the earliest.
        close = heapq.nsmallest(_MOST_COMPARED, (each for each in close if -each[0] >= self._least - _SLACK))
        grams = shingles(text(number), self._unit, self._size) if close else None
        for _, place in close:
            assert grams is not None
            value = similarity(grams, shingles(text(place), self._unit, self._size))
            if value >= self._least:
                return place, value
        return -1, 0.0


def _linked(keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """For each text and band, the last text before it with the same key; -1 where there is none."""
    before = np.full(keys.shape, -1, np.int32)
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        same = np.flatnonzero(keys[order[1:], band] == keys[order[:-1], band])
        before[order[same + 1], band] = order[same]
    return before


def _candidates(number: int, links: memoryview, of: memoryview) -> list[int]:
    """Kept texts that share a band with this one, the last ones of each. Links over texts that repeat are shortened."""
    found: set[int] = set()
    for band in range(BANDS):
        at = number * BANDS + band
        for _ in range(_MOST_PER_BAND):
            place = links[at]
            if place >= 0 and of[place] >= 0:
                # Its own link has been shortened: it leads to a kept text.
                place = links[at] = links[place * BANDS + band]
            if place < 0:
                break
            found.add(place)
            at = place * BANDS + band
    return sorted(found)


def _band_keys(found: Numbers, group: int) -> Numbers:
    keys = np.full(BANDS, np.uint64(group & (2**64 - 1)))
    for row in range(_ROWS):
        keys = scrambled(keys ^ found[row::_ROWS])
    return keys


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest())
