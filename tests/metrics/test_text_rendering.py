"""Text scores by hand, against a dynamic programme and all permutations, and OneIG's and LongText's published rules."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.errors import MissingExtraError
from dataflow.metrics import text_rendering as text
from dataflow.metrics.text_rendering import Matches

pytest.importorskip("rapidfuzz", reason="rapidfuzz does the edit distances")

WORDS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=5)
TEXTS = st.text("ab c中国國,.Ａ", max_size=12)


def distance(first: str, second: str) -> int:
    """Levenshtein by its definition."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def by_definition(first: str, second: str) -> float:
    return distance(first, second) / max(len(first), len(second), 1)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  Hello,\n\tWORLD! ", "hello world"),
        ("don't - stop", "dont stop"),
        ("ＧＲＡＮＤ　ＯＰＥＮ １２３", "grand open 123"),
        ("“开业大吉”，全场５折！", "开业大吉全场5折"),
        ("国 國", "国 國"),
        ("Straße CAFÉ cafe\u0301", "strasse café café"),
        ("a\u200bb\ufeffc", "abc"),
        ("50% off — $9.99", "50 off 999"),
        ("!?…", ""),
    ],
)
def test_normalise(raw, plain):
    assert text.normalise(raw) == plain


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(raw):
    once = text.normalise(raw)
    assert text.normalise(once) == once


def test_tokens_are_words_or_chinese_characters():
    assert text.tokens("grand opening") == ["grand", "opening"]
    assert text.tokens("开业 sale") == list("开业sale")
    assert text.tokens("开业 sale", "word") == ["开业", "sale"]
    assert text.tokens("ab c", "character") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="unit"):
        text.tokens("a", "line")  # pyright: ignore[reportArgumentType]


def test_word_recall_and_multiset_recall_differ_in_repeats():
    target, reading = "Tea, tea and more TEA", "TEA and"
    assert text.word_recall(target, reading) == Matches(4, 5)
    assert text.multiset_recall(target, reading) == Matches(2, 5)
    assert text.multiset_recall(target, "tea tea tea tea and more").recall == 1


def test_chinese_counts_by_character():
    assert text.multiset_recall("欢迎光临", "欢迎 光") == Matches(3, 4)
    assert text.multiset_recall("國家", "国家") == Matches(1, 2)
    assert text.word_recall("好好学习", "好学").recall == 0.75


def test_the_target_decides_what_counts():
    assert text.multiset_recall("open", "开 open") == Matches(1, 1)


def test_nothing_asked_for_is_told():
    for function in (text.word_recall, text.multiset_recall, text.oneig_sample):
        with pytest.raises(ValueError, match="no text was asked for"):
            function("?!", "something")
    for function in (text.matching_cost, text.gned, text.recall_at_ned):
        with pytest.raises(ValueError, match="no text was asked for"):
            function(["?", ""], ["something"])
        with pytest.raises(ValueError, match="lists of words"):
            function("text", ["text"])
    with pytest.raises(ValueError, match="no text was asked for"):
        text.micro_recall([])


def test_micro_recall_adds_before_it_divides():
    assert text.micro_recall([Matches(1, 1), Matches(0, 9)]) == 0.1


@given(TEXTS, TEXTS)
def test_recalls_are_ordered_and_bounded(target, reading):
    if not text.normalise(target):
        return
    strict, lenient = text.multiset_recall(target, reading), text.word_recall(target, reading)
    assert 0 <= strict.recall <= lenient.recall <= 1
    assert text.multiset_recall(target, target).recall == 1


@given(st.text("abc中", max_size=9), st.text("abc中", max_size=9))
def test_ned_is_levenshtein_over_the_longer_text(first, second):
    assert text.ned(first, second, normaliser=str) == pytest.approx(by_definition(first, second), abs=1e-12)
    assert text.ned(first, second) == text.ned(second, first)


def test_ned_by_hand():
    assert text.ned("Kitten!", "sitting") == pytest.approx(3 / 7)
    assert text.ned("", "") == 0
    assert text.ned("abc", "") == 1


@given(WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_matching_cost_is_the_best_of_all_matchings(targets, readings):
    few, many = sorted((targets, readings), key=len)
    best = min(
        sum(by_definition(a, b) for a, b in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )
    expected = best + len(many) - len(few)
    assert text.matching_cost(targets, readings) == pytest.approx(expected, abs=1e-9)
    assert text.gned(targets, readings) == pytest.approx(expected / len(many), abs=1e-9)
    assert 0 <= text.gned(targets, readings) <= 1


def test_gned_is_blind_to_order_and_counts_what_is_left_over():
    assert text.gned(["Drink", "tea"], ["TEA", "drink"]) == 0
    assert text.gned(["drink", "tea"], []) == 1
    assert text.matching_cost(["drink", "tea"], []) == 2
    assert text.gned(["drink"], ["drink", "me", "now", "!"]) == pytest.approx(2 / 3)


@given(WORDS, WORDS)
def test_recall_at_ned_takes_turns(targets, readings):
    left, found = list(readings), 0
    for word in targets:
        for other in left:
            if by_definition(word, other) <= 0.3:
                left.remove(other)
                found += 1
                break
    assert text.recall_at_ned(targets, readings) == Matches(found, len(targets))


def test_recall_at_ned_by_hand():
    assert text.recall_at_ned(["welcome", "home"], ["welcame", "hxmx"]) == Matches(1, 2)
    assert text.recall_at_ned(["home", "home"], ["home"]) == Matches(1, 2)
    assert text.recall_at_ned(["home"], []) == Matches(0, 1)
    assert text.recall_at_ned(["welcome"], ["wxlcxmx"], threshold=0.5).recall == 1


def test_oneig_keeps_case_and_drops_blanks_in_chinese():
    assert text.oneig_normalise("Grand\n Opening!  50%") == "Grand Opening 50"
    assert text.oneig_normalise("开业 SALE, 5折") == "开业SALE5折"
    assert text.oneig_normalise("Café") == "Caf"
    sample = text.oneig_sample("Grand Opening", "grand Opening")
    assert sample == text.OneIGSample(1, Matches(1, 2))
    assert not sample.complete
    assert text.oneig_sample("开业大吉", "开 业").matches == Matches(2, 4)


def test_oneig_score_by_hand():
    samples = [text.oneig_sample("one two three four", "one two three four"), text.oneig_sample("abcd", "")]
    # ED = (0 + 4) / 2, CR = 1/2, WAC = 4/5.
    assert text.oneig_text_score(samples) == pytest.approx(1 - 2 * 0.5 * 0.2 / 100)
    assert text.oneig_text_score(samples, "zh") == pytest.approx(1 - 2 * 0.5 * 0.2 / 50)
    assert text.oneig_text_score([text.oneig_sample("a" * 300, "")]) == 0
    with pytest.raises(ValueError, match="language"):
        text.oneig_text_score(samples, "fr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError):
        text.oneig_text_score([])


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(deadline=None)
def test_oneig_score_by_its_published_rule(pairs):
    keep = re.compile(r"[\u4e00-\u9fa5a-zA-Z0-9\s]")
    distances, complete, found, wanted = [], [], 0, 0
    samples = []
    for target, reading in pairs:
        cleaned = []
        for line in (target, reading):
            line = "".join(keep.findall(line))
            chinese = any("\u4e00" <= letter <= "\u9fff" for letter in line)
            cleaned.append("".join(line.split()) if chinese else " ".join(line.split()))
        if not cleaned[0]:
            continue
        samples.append(text.oneig_sample(target, reading))
        distances.append(distance(*cleaned))
        complete.append(distances[-1] == 0)
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in cleaned[0])
        ours, theirs = (Counter(line if chinese else line.split()) for line in cleaned)
        found += sum(min(count, theirs[token]) for token, count in ours.items())
        wanted += sum(ours.values())
    if samples:
        mean = sum(distances) / len(distances)
        expected = 1 - min(100, mean) * (1 - sum(complete) / len(complete)) * (1 - found / wanted) / 100
        assert text.oneig_text_score(samples) == pytest.approx(expected, abs=1e-12)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*\[metrics\]"):
        text.gned(["tea"], ["tee"])
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtraError, match=r"rapidfuzz.*\[metrics\]"):
        text.ned("tea", "tee")
