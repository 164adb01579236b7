"""Prompts as words: their plain form, their length, and what stands in quotation marks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WRITTEN_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WRITTEN_WITHOUT_SPACES}\U00020000-\U0003ffff]|[^\W_{_WRITTEN_WITHOUT_SPACES}]+(?:['’-]\w+)*")
_PAIRS = ("“”", "„“", "«»", "「」", "『』", "＂＂")
# A plain mark behind a digit is an inch.
_QUOTED = re.compile("|".join([r'(?<!\d)"([^"]+)"', *(f"{start}([^{start}{end}]+){end}" for start, end in _PAIRS)]))


def normalised(text: str, *, ignore_case: bool = True, ignore_punctuation: bool = True) -> str:
    """The form in which two prompts are the same: NFKC, one space between words, without case and punctuation.

    A text of nothing but punctuation keeps it.

    Args:
        text: any.
        ignore_case: fold case (``ß`` is ``ss``).
        ignore_punctuation: leave out what Unicode calls punctuation; symbols (``+``, an emoji) stay.
    """
    plain = unicodedata.normalize("NFKC", text)
    if ignore_case:
        # Folding can undo what NFKC did, which then has to be done again.
        plain = unicodedata.normalize("NFKC", plain.casefold())
    bare = plain
    if ignore_punctuation:
        bare = "".join(" " if unicodedata.category(sign).startswith("P") else sign for sign in plain)
    return " ".join(bare.split()) or " ".join(plain.split())


def words(text: str) -> list[str]:
    """The words of a text, in order; in scripts without spaces between words (Chinese, Japanese, Thai) each sign."""
    return _WORD.findall(text)


def quoted(text: str) -> list[str]:
    """What stands in double quotation marks of any script, each text once, in order.

    Single marks are no quotation: they are apostrophes too often.
    """
    found = (next(filter(None, match.groups())) for match in _QUOTED.finditer(text))
    return list(dict.fromkeys(found))


def missing_quotes(text: str, kept: Sequence[str]) -> list[str]:
    """Those of ``kept`` that the text does not hold letter for letter, whatever marks it puts around them."""
    return [quote for quote in kept if quote not in text]
