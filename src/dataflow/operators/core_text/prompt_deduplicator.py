"""Prompts that say the same, or nearly."""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from dataflow.errors import ConfigError, InputError
from dataflow.metrics.near_text import LEAST_SIMILARITY, NearDuplicates, Repeats, Unit
from dataflow.metrics.prompts import normalised
from dataflow.operators.core_text.writing import one_prompt
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage

OnUnknown = Literal["drop", "keep"]


class PromptDeduplicator:
    """Keeps the first of all prompts that are the same but for case, spaces, punctuation and Unicode forms, and drops
    those that are nearly the same as an earlier one that was kept.

    How near two prompts are is the Jaccard index of their n-grams (:mod:`dataflow.metrics.near_text`): all are searched
    through an index, never each with each. A dropped row is a ``duplicate`` or ``near_duplicate``; the sidecar tells
    the row and the prompt that it repeats, and how similar they are.

    Args:
        similarity: Jaccard index from which on a prompt is dropped, 0.5 to 1; None for the same ones only, 1 for
            those with the same n-grams.
        unit: ``character`` or ``word``: what the n-grams are of. In scripts without spaces each sign is a word.
        ngram: how many of them in one; None for 4 characters or 1 word.
        ignore_case: upper and lower case are the same.
        ignore_punctuation: punctuation does not count.
        on_unknown: what becomes of a row without a prompt: ``drop`` or ``keep``.
        options: how the step is run.

    Raises:
        ConfigError: an argument makes no sense.
    """

    def __init__(
        self,
        *,
        similarity: float | None = 0.85,
        unit: Unit = "character",
        ngram: int | None = None,
        ignore_case: bool = True,
        ignore_punctuation: bool = True,
        on_unknown: OnUnknown = "drop",
        options: RunOptions | None = None,
    ) -> None:
        if similarity is not None and not LEAST_SIMILARITY <= similarity <= 1:
            raise ConfigError(f"similarity must be from {LEAST_SIMILARITY} to 1, got {similarity!r}")
        if unit not in ("character", "word"):
            raise ConfigError(f"unit must be character or word, got {unit!r}")
        if ngram is not None and ngram < 1:
            raise ConfigError(f"ngram must be a whole number from 1, got {ngram!r}")
        if on_unknown not in ("drop", "keep"):
            raise ConfigError(f"on_unknown must be drop or keep, got {on_unknown!r}")
        self.similarity = similarity
        self.unit: Unit = unit
        self.ngram = ngram or (4 if unit == "character" else 1)
        self.ignore_case, self.ignore_punctuation = ignore_case, ignore_punctuation
        self.on_unknown: OnUnknown = on_unknown
        self.options = options

    def plan(self, *, input_conversation_key: str = "conversations", input_group_key: str | None = None) -> Plan:
        """The step as a description.

        Args:
            input_conversation_key: column with the prompt: a string, or messages with one user turn.
            input_group_key: column whose equal values make a group: only prompts of one group repeat each other, such
                as the edit instructions of one picture.
        """
        found = _Found(self)
        at = 0

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            nonlocal found, at
            found, at = _Found(self), 0
            for number, row in enumerate(rows):
                if isinstance(row, BadRow):
                    continue
                prompt = _prompt(row, input_conversation_key)
                if prompt is not None:
                    found.add(number, prompt, _group(row, input_group_key))
            found.settle()

        def fold(row: Row, _: Sequence[Outcome]) -> Row | Drop:
            nonlocal at
            if _prompt(row, input_conversation_key) is None:
                return row if self.on_unknown == "keep" else Drop("no_prompt")
            at += 1
            return found.repeated(at - 1) or row

        return Plan(
            name=type(self).__name__,
            inputs=(input_conversation_key, *([] if input_group_key is None else [input_group_key])),
            outputs=(),
            requests=lambda _: (),
            fold=fold,
            prepare=prepare,
        )

    def run(
        self, storage: FileStorage, input_conversation_key: str = "conversations", input_group_key: str | None = None
    ) -> Summary:
        """Drop the repeated prompts of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_conversation_key=input_conversation_key, input_group_key=input_group_key)
        return execute(plan, storage, self.options)


class _Found:
    """Which prompts repeat which. The prompts themselves wait in a temporary file."""

    def __init__(self, operator: PromptDeduplicator) -> None:
        self._operator = operator
        self._rows, self._hashes, self._groups = array("Q"), array("Q"), array("Q")
        self._offsets = array("Q", [0])
        self._first: array[int] = array("Q")
        self._near: Repeats | None = None
        self._file: Any = None
        self._members: list[int] | np.ndarray[Any, Any] = []

    def add(self, row: int, prompt: str, group: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="dataflow-prompts-")  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self._file.close)
        text = prompt.encode("utf-8", "surrogatepass")
        self._file.write(text)
        self._offsets.append(self._offsets[-1] + len(text))
        self._rows.append(row)
        # Of ten million prompts two different ones share 64 bits once in 400,000 tables.
        digest = hashlib.sha256(self._plain(prompt).encode("utf-8", "surrogatepass"))
        self._hashes.append((int.from_bytes(digest.digest()[:8]) + group) % 2**64)
        self._groups.append(group)

    def settle(self) -> None:
        """All prompts are there: find the same ones, then the near ones among the others."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        _, first, of = np.unique(hashes, return_index=True, return_inverse=True)
        self._first = array("Q", first[of].astype(np.uint64).tobytes())
        operator = self._operator
        if operator.similarity is None or not len(hashes):
            return
        self._members = np.sort(first)
        search = NearDuplicates(least=operator.similarity, unit=operator.unit, size=operator.ngram)
        for place in self._members.tolist():
            search.add(self._plain(self._text(place)), self._groups[place])
        self._near = search.repeats(lambda number: self._plain(self._text(int(self._members[number]))))

    def repeated(self, place: int) -> Drop | None:
        """The drop of a prompt that repeats another, or None."""
        first = self._first[place]
        near = self._near
        if near is not None:
            member = int(np.searchsorted(self._members, first))
            of = int(near.of[member])
            if of >= 0:
                earlier = int(self._members[of])
                return self._drop("near_duplicate", earlier, round(float(near.similarity[member]), 4))
        return None if first == place else self._drop("duplicate", int(first), 1.0)

    def _drop(self, reason: str, of: int, similarity: float) -> Drop:
        repeats = {"row": self._rows[of] + 1, "prompt": self._text(of), "similarity": similarity}
        return Drop(reason, {"repeats": repeats})

    def _text(self, place: int) -> str:
        start, end = self._offsets[place], self._offsets[place + 1]
        self._file.seek(start)
        return self._file.read(end - start).decode("utf-8", "surrogatepass")

    def _plain(self, prompt: str) -> str:
        operator = self._operator
        return normalised(prompt, ignore_case=operator.ignore_case, ignore_punctuation=operator.ignore_punctuation)


def _prompt(row: Row, key: str) -> str | None:
    try:
        return one_prompt(row, key)
    except InputError:
        return None


def _group(row: Row, key: str | None) -> int:
    """A number for the row's group; 0 for all where there are no groups."""
    if key is None:
        return 0
    content = json.dumps(row.get(key), sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8])
