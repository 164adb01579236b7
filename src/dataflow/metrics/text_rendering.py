"""Whether a picture shows the words it was asked to show, given what an OCR read from it.

Every function compares two plain texts, the one asked for and the one read, and normalises both first with
:func:`normalise` unless another function is given: full-width and other compatibility forms become plain ones (NFKC),
case is folded, punctuation, symbols and invisible characters go, white space becomes single blanks. Letters of every
script stay, and simplified and traditional Chinese stay what they are: a 国 is not a 國.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dataflow.errors import MissingExtraError

Normaliser = Callable[[str], str]
Unit = Literal["auto", "word", "character"]

ONEIG_CEILING = {"en": 100, "zh": 50}
"""The edit distance from which on OneIG-Bench calls a text wholly wrong, by language."""

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_ONEIG_HAN = re.compile("[\u4e00-\u9fff]")
_ONEIG_DROPPED = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9\s]")


@dataclass(frozen=True, slots=True)
class Matches:
    """How many of the words or characters asked for were found; add them up for a micro-average."""

    found: int
    wanted: int

    @property
    def recall(self) -> float:
        """``found / wanted``, 0..1, higher is better."""
        return self.found / self.wanted

    def __add__(self, other: Matches) -> Matches:
        return Matches(self.found + other.found, self.wanted + other.wanted)


@dataclass(frozen=True, slots=True)
class OneIGSample:
    """What OneIG-Bench counts in one picture."""

    edit_distance: int
    matches: Matches

    @property
    def complete(self) -> bool:
        """Whether the text is there to the letter."""
        return self.edit_distance == 0


def normalise(text: str) -> str:
    """``text`` as the functions here compare it; see the head of this module.

    Punctuation is taken away and not replaced: "don't" is "dont", as in LongText-Bench and OneIG-Bench.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in folded if c.isspace() or unicodedata.category(c)[0] in "LMN").split())


def tokens(text: str, unit: Unit = "auto") -> list[str]:
    """The units in which a text counts: words between white space, or characters without it.

    Args:
        text: normalised already.
        unit: ``auto`` counts characters where the text has a Chinese one, and words elsewhere.

    Raises:
        ValueError: another unit.
    """
    if unit not in ("auto", "word", "character"):
        raise ValueError(f"unit: expected 'auto', 'word' or 'character', not {unit!r}")
    words = text.split()
    if unit == "word" or (unit == "auto" and not _HAN.search(text)):
        return words
    return list("".join(words))


def word_recall(target: str, reading: str, *, unit: Unit = "auto", normaliser: Normaliser = normalise) -> Matches:
    """Words of ``target`` that occur in ``reading`` at all: ``Σ [w in reading] / |target|``.

    A word that is asked for twice and shown once counts twice: :func:`multiset_recall` is the stricter one.

    Args:
        target: the text asked for.
        reading: the text read.
        unit: what counts as a word; ``auto`` is decided by ``target``.
        normaliser: what makes both comparable.

    Returns:
        Counts, whose ``recall`` is 0..1; higher is better.

    Raises:
        ValueError: nothing was asked for.
    """
    wanted, read = _tokens_of_both(target, reading, unit, normaliser)
    present = set(read)
    return Matches(sum(token in present for token in wanted), len(wanted))


def multiset_recall(target: str, reading: str, *, unit: Unit = "auto", normaliser: Normaliser = normalise) -> Matches:
    """Words of ``target`` found in ``reading``, each occurrence once: ``|target ∩ reading| / |target|`` of multisets.

    The score of LongText-Bench (``unit="word"`` for English, ``"character"`` for Chinese); over a data set add the
    counts before dividing.

    Args:
        target: the text asked for.
        reading: the text read.
        unit: what counts as a word; ``auto`` is decided by ``target``.
        normaliser: what makes both comparable.

    Returns:
        Counts, whose ``recall`` is 0..1; higher is better.

    Raises:
        ValueError: nothing was asked for.

    Source: Geng et al. 2025 (X-Omni), arXiv:2507.22058; ``X-Omni-Team/X-Omni`` (Apache-2.0).
    """
    wanted, read = _tokens_of_both(target, reading, unit, normaliser)
    return Matches((Counter(wanted) & Counter(read)).total(), len(wanted))


def micro_recall(matches: Iterable[Matches]) -> float:
    """All that was found over all that was wanted, 0..1; higher is better.

    Raises:
        ValueError: no matches.
    """
    total = sum(matches, start=Matches(0, 0))
    if not total.wanted:
        raise ValueError("no text was asked for")
    return total.recall


def ned(target: str, reading: str, *, normaliser: Normaliser = normalise) -> float:
    """Normalised edit distance: Levenshtein over characters, ``distance / max(|target|, |reading|)``.

    Benchmarks that report "NED, higher is better" (CVTG-2K, ICDAR) report 1 minus this.

    Args:
        target: the text asked for.
        reading: the text read.
        normaliser: what makes both comparable.

    Returns:
        0..1; lower is better, 0 for equal texts, two empty ones included.

    Source: Levenshtein 1966; rapidfuzz's ``Levenshtein.normalized_distance`` (MIT) does the work.
    """
    return float(_levenshtein().normalized_distance(normaliser(target), normaliser(reading)))


def matching_cost(targets: Sequence[str], readings: Sequence[str], *, normaliser: Normaliser = normalise) -> float:
    """The cost of the best one-to-one matching of words: the sum of their NEDs, plus 1 for each word left over.

    Args:
        targets: the words asked for.
        readings: the words read, in any order.
        normaliser: what makes both comparable; words that it leaves empty do not count.

    Returns:
        0..max(words asked for, words read); lower is better.

    Raises:
        ValueError: nothing was asked for.

    Source: the unscaled "PNED" of LeX-Bench and TIIF-Bench (no licence file).
    """
    wanted, read = _word_lists(targets, readings, normaliser)
    if not read:
        return float(len(wanted))
    costs = _neds(wanted, read)
    rows, columns = _optimize().linear_sum_assignment(costs)
    return math.fsum(costs[rows, columns]) + abs(len(wanted) - len(read))


def gned(targets: Sequence[str], readings: Sequence[str], *, normaliser: Normaliser = normalise) -> float:
    """Global normalised edit distance: :func:`matching_cost` over the larger number of words.

    Words read that nobody asked for cost as much as words that are missing.

    Args:
        targets: the words asked for.
        readings: the words read, in any order.
        normaliser: what makes both comparable; words that it leaves empty do not count.

    Returns:
        0..1; lower is better.

    Raises:
        ValueError: nothing was asked for.

    Source: Wei et al. 2025 (TIIF-Bench), arXiv:2506.02161 (no licence file).
    """
    wanted, read = _word_lists(targets, readings, normaliser)
    return matching_cost(wanted, read, normaliser=str) / max(len(wanted), len(read))


def recall_at_ned(
    targets: Sequence[str], readings: Sequence[str], threshold: float = 0.3, *, normaliser: Normaliser = normalise
) -> Matches:
    """Words asked for that find a word read within a NED of ``threshold``; each word read serves once.

    As published, words take turns in the order given and take the first that fits, which can leave a later word
    without.

    Args:
        targets: the words asked for.
        readings: the words read.
        threshold: 0..1, still a match.
        normaliser: what makes both comparable; words that it leaves empty do not count.

    Returns:
        Counts, whose ``recall`` is 0..1; higher is better.

    Raises:
        ValueError: nothing was asked for.

    Source: Wei et al. 2025 (TIIF-Bench), arXiv:2506.02161 (no licence file).
    """
    wanted, read = _word_lists(targets, readings, normaliser)
    if not read:
        return Matches(0, len(wanted))
    fits = _neds(wanted, read) <= threshold
    found = 0
    for row in fits:
        candidates = np.flatnonzero(row)
        if candidates.size:
            fits[:, candidates[0]] = False
            found += 1
    return Matches(found, len(wanted))


def oneig_normalise(text: str) -> str:
    """OneIG-Bench's own clean-up: only ASCII letters, digits and Chinese stay, and case stays.

    White space becomes single blanks, or goes where the text has a Chinese character.

    Source: ``OneIG-Bench/OneIG-Benchmark`` (no licence file).
    """
    kept = _ONEIG_DROPPED.sub("", text)
    return ("" if _ONEIG_HAN.search(kept) else " ").join(kept.split())


def oneig_sample(target: str, reading: str) -> OneIGSample:
    """What OneIG-Bench counts in one picture: the edit distance, and words (Chinese: characters) found as multisets.

    Args:
        target: the text asked for.
        reading: the text read.

    Raises:
        ValueError: nothing was asked for.
    """
    wanted, read = oneig_normalise(target), oneig_normalise(reading)
    unit: Unit = "character" if _ONEIG_HAN.search(wanted) else "word"
    matches = multiset_recall(wanted, read, unit=unit, normaliser=str)
    return OneIGSample(int(_levenshtein().distance(wanted, read)), matches)


def oneig_text_score(samples: Sequence[OneIGSample], language: Literal["en", "zh"] = "en") -> float:
    """OneIG-Bench's text score: ``1 - min(M, ED) (1 - CR) (1 - WAC) / M``.

    ED is the mean edit distance, CR the share of complete texts, WAC the words found over the words wanted, M 100 for
    English and 50 for Chinese.

    Args:
        samples: all pictures of a model.
        language: which M.

    Returns:
        0..1; higher is better.

    Raises:
        ValueError: no samples, or another language.

    Source: Chang et al. 2025 (OneIG-Bench), arXiv:2506.07977 (no licence file).
    """
    if language not in ONEIG_CEILING:
        raise ValueError(f"language: expected 'en' or 'zh', not {language!r}")
    ceiling = ONEIG_CEILING[language]
    accuracy = micro_recall(sample.matches for sample in samples)
    distance = sum(sample.edit_distance for sample in samples) / len(samples)
    complete = sum(sample.complete for sample in samples) / len(samples)
    return 1 - min(ceiling, distance) * (1 - complete) * (1 - accuracy) / ceiling


def _tokens_of_both(target: str, reading: str, unit: Unit, normaliser: Normaliser) -> tuple[list[str], list[str]]:
    target, reading = normaliser(target), normaliser(reading)
    if unit == "auto":
        unit = "character" if _HAN.search(target) else "word"
    wanted = tokens(target, unit)
    if not wanted:
        raise ValueError("no text was asked for")
    return wanted, tokens(reading, unit)


def _word_lists(targets: Sequence[str], readings: Sequence[str], normaliser: Normaliser) -> tuple[list[str], list[str]]:
    if isinstance(targets, str) or isinstance(readings, str):
        raise ValueError("expected lists of words, not one text")
    wanted, read = (list(filter(None, map(normaliser, words))) for words in (targets, readings))
    if not wanted:
        raise ValueError("no text was asked for")
    return wanted, read


def _neds(wanted: list[str], read: list[str]) -> npt.NDArray[np.float64]:
    normalised_distance = _levenshtein().normalized_distance
    return np.array([[normalised_distance(one, other) for other in read] for one in wanted], dtype=np.float64)


def _levenshtein() -> Any:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtraError("rapidfuzz", "metrics", "the edit distance of texts") from error
    return Levenshtein


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "matching words") from error
    return optimize
