"""Making images until enough of them are good: generate, score, filter, and ask for more where there are too few."""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from dataflow.errors import BudgetSpentError, ConfigError, InputError
from dataflow.operators.evaluation import pictures
from dataflow.pipeline import CompiledStep, Pipeline, Step
from dataflow.runtime.engine import RunOptions, execute
from dataflow.runtime.ray_cluster import kept_connection
from dataflow.types import BadRow, Row, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

SAMPLES = "samples"
"""Column with how many images a row was asked for."""
NUMBER = "input_row"
"""Column with the row's number in the user's table, from 1."""
SHORT = "short.jsonl"

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many accepted images are enough.

    Attributes:
        per_prompt: for every row; None where there are quotas.
        quotas: for every category; rows of other categories get none.
        category_key: column with a row's category.
        maximum: most images a row is asked for, accepted or not.

    Raises:
        ConfigError: both or neither of numbers and quotas, or numbers that make no sense.
    """

    per_prompt: int | None = None
    quotas: Mapping[str, int] | None = None
    category_key: str = "category"
    maximum: int = 16

    def __post_init__(self) -> None:
        if (self.per_prompt is None) == (self.quotas is None):
            raise ConfigError("give wanted (images for every prompt) or quotas (images for every category)")
        numbers = [self.per_prompt] if self.per_prompt is not None else list((self.quotas or {}).values())
        if min(numbers, default=0) < 1 or self.maximum < (self.per_prompt or 1):
            raise ConfigError(f"wanted and quotas must be whole numbers from 1, and maximum ({self.maximum}) no less")


class AcceptanceLoop(Pipeline):
    """Runs a pipeline again and again, each time with more images for the rows that have too few accepted ones.

    What a row has is what the last step left of it. As many further images are asked for as are missing, never more,
    and under the sample numbers that follow: what was made and scored before is found in the journals, so that a loop
    that was killed or stopped goes on where it was, and another threshold uses all there is. Rows that reach
    ``maximum`` without enough good images are written to ``short.jsonl`` beside the tables.

    Rows that ask for the very same thing share their pictures: one of them may come to more than is wanted.

    When a step's budget is spent, the tables are written with what the rounds before had; images of the unfinished
    round are kept and used when the loop goes on with more money.

    Args:
        steps: a step that makes images, then steps that score, then filters. Of a filter that meets images without a
            score, ``on_unknown="drop"`` keeps a row's other images, ``quarantine`` takes the whole row out.
        wanted: how many images of each prompt.
        quotas: instead, category → how many images in all, asked for from its rows in turn.
        category_key: column with the category.
        maximum: most images a row is asked for.
        image_key: column with the images.

    Raises:
        ConfigError: no step that makes images, one that makes several rows of one, or numbers that make no sense.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        wanted: int | None = None,
        quotas: Mapping[str, int] | None = None,
        category_key: str = "category",
        maximum: int = 16,
        image_key: str = "images",
    ) -> None:
        self.wanted = Wanted(per_prompt=wanted, quotas=quotas, category_key=category_key, maximum=maximum)
        self.image_key = image_key
        makers = [
            n for n, step in enumerate(steps) if "input_samples_key" in inspect.signature(step.operator.plan).parameters
        ]
        if not makers:
            raise ConfigError("no step makes images: the loop needs Text2ImageGenerator or PromptedImageEditGenerator")
        counted = [
            replace(step, keys={**step.keys, "input_samples_key": SAMPLES}) if n == makers[0] else step
            for n, step in enumerate(steps)
        ]
        super().__init__(counted)
        several = [plan.name for plan in self.plans() if plan.multiplies]
        if several:
            raise ConfigError(
                f"{several[0]} makes several rows of one, and the loop counts images by row: run it in a pipeline of"
                " its own, and this one over its table"
            )

    def as_read(self, storage: FileStorage) -> FileStorage:
        """The storage with the columns that the loop adds, as the first round reads it."""
        return _Asking(storage, _Rows(storage, self.wanted).first())

    def check_tables(self, storage: FileStorage) -> tuple[CompiledStep, ...]:
        """As a pipeline's, with the columns that the loop adds."""
        return super().check_tables(_Asking(storage, np.zeros(0, np.int32)))

    @kept_connection()
    def run(
        self, storage: FileStorage, options: RunOptions | None = None, *, first: int = 1, last: int | None = None
    ) -> list[Summary]:
        """Run rounds until every row, or category, has enough, or cannot get more.

        Args:
            storage: walks from the user's table through the steps'.
            options: how each step is run; a pilot looks at the first round only.
            first: a round has all steps: no other than 1 can be given.
            last: likewise, no other than the last.

        Returns:
            The sums of the last round's steps.

        Raises:
            ConfigError: a part of the steps is asked for.
            DataflowError: as :meth:`Pipeline.run`; a spent budget is raised after the tables are written.
        """
        if first != 1 or last not in (None, len(self.steps)):
            raise ConfigError("an acceptance loop runs all of its steps in every round, not a part of them")
        options = options or RunOptions()
        self.check(storage)
        rows = _Rows(storage, self.wanted)
        asked, accepted = rows.first(), np.zeros(rows.count, np.int32)
        before, summaries = asked, []
        for number in range(1, rows.count * self.wanted.maximum + 2):
            try:
                summaries = self._round(_Asking(storage, asked), options)
            except BudgetSpentError:
                if number > 1:
                    self._round(_Asking(storage, before), replace(options, quiet=True))
                raise
            if summaries[-1].output is None:
                return summaries
            accepted = self._accepted(summaries[-1].output, rows.count)
            before, asked = asked, rows.more(asked, accepted)
            more = int((asked - before).sum())
            if not options.quiet:
                print(f"round {number}: {rows.described(accepted)}; {more} more to make\n", file=sys.stderr)
            if not more:
                break
        self._write_short(storage, rows, asked, accepted)
        return summaries

    def _round(self, storage: FileStorage, options: RunOptions) -> list[Summary]:
        summaries: list[Summary] = []
        for plan in self.plans():
            summaries.append(execute(plan, storage.step(), options))
            if summaries[-1].output is None:
                break
        return summaries

    def _accepted(self, table: str, count: int) -> Counts:
        accepted = np.zeros(count, np.int32)
        for row in FileStorage(table).step().iter_rows():
            if not isinstance(row, BadRow):
                accepted[row[NUMBER] - 1] += len(pictures(row, self.image_key))
        return accepted

    def _write_short(self, storage: FileStorage, rows: _Rows, asked: Counts, accepted: Counts) -> None:
        lines = [
            orjson.dumps({NUMBER: int(at) + 1, "asked": int(asked[at]), "accepted": int(accepted[at])}) + b"\n"
            for at in rows.short(accepted)
        ]
        path = Path(storage.cache_path) / SHORT
        draft = path.with_suffix(".tmp")
        draft.write_bytes(b"".join(lines))
        draft.replace(path)
        if lines:
            logger.warning("%d rows have too few accepted images: see %s", len(lines), path)


class _Asking(FileStorage):
    """The user's table with how many images each row is asked for, added while it is read."""

    def __init__(self, storage: FileStorage, asked: Counts) -> None:
        super().__init__(
            storage.first_entry_file_name,
            storage.cache_path,
            storage.file_name_prefix,
            storage.cache_type,
            storage.allow_pickle,
        )
        self._asked = asked

    def iter_rows(self) -> Iterator[Row | BadRow]:
        rows = super().iter_rows()
        return rows if self._current_step else self._with_numbers(rows)

    def input_signature(self) -> dict[str, int]:
        signature = super().input_signature()
        if not self._current_step:
            signature["asked"] = int.from_bytes(hashlib.sha256(self._asked.tobytes()).digest()[:7], "big")
        return signature

    def _with_numbers(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        for number, row in enumerate(rows):
            if not isinstance(row, BadRow):
                row[SAMPLES] = int(self._asked[number]) if number < len(self._asked) else 1
                row[NUMBER] = number + 1
            yield row


class _Rows:
    """What each row of the user's table is wanted for."""

    def __init__(self, storage: FileStorage, wanted: Wanted) -> None:
        self._wanted = wanted
        self._members: dict[str, list[int]] = defaultdict(list)
        self.count = 0
        for row in storage.reset().step().iter_rows():
            if wanted.quotas is not None and not isinstance(row, BadRow):
                self._members[_category(row, wanted.category_key, storage, self.count + 1)].append(self.count)
            self.count += 1
        storage.reset()
        missing = [name for name in wanted.quotas or {} if name not in self._members]
        if missing:
            raise InputError(
                f"no row is of the category {missing[0]!r}; there are {', '.join(sorted(self._members)[:10])}",
                path=storage.first_entry_file_name,
                field=wanted.category_key,
            )

    def first(self) -> Counts:
        """How many images each row is asked for at first."""
        return self.more(np.zeros(self.count, np.int32), np.zeros(self.count, np.int32))

    def more(self, asked: Counts, accepted: Counts) -> Counts:
        """How many each is asked for next; the same numbers where nothing is missing or nothing more may be asked."""
        wanted = self._wanted
        if wanted.per_prompt is not None:
            return np.minimum(asked + np.maximum(wanted.per_prompt - accepted, 0), wanted.maximum).astype(np.int32)
        result = asked.copy()
        for name, quota in (wanted.quotas or {}).items():
            members = np.array(self._members[name])
            missing = quota - int(accepted[members].sum())
            while missing > 0:
                able = members[result[members] < wanted.maximum]
                if not len(able):
                    break
                # Whoever was asked for least comes first, and of those the first rows of the table.
                lowest = able[result[able] == result[able].min()][:missing]
                result[lowest] += 1
                missing -= len(lowest)
        return result

    def short(self, accepted: Counts) -> Sequence[int]:
        """Rows with too few accepted images, or all rows of a category that has too few."""
        if self._wanted.per_prompt is not None:
            return np.flatnonzero(accepted < self._wanted.per_prompt).tolist()
        found = []
        for name, quota in (self._wanted.quotas or {}).items():
            if accepted[self._members[name]].sum() < quota:
                found += self._members[name]
        return sorted(found)

    def described(self, accepted: Counts) -> str:
        """How far the loop is, for people."""
        if self._wanted.per_prompt is not None:
            enough = int((accepted >= self._wanted.per_prompt).sum())
            return f"{enough} of {self.count} prompts have {self._wanted.per_prompt} accepted images"
        parts = [
            f"{name} {accepted[self._members[name]].sum()}/{quota}"
            for name, quota in (self._wanted.quotas or {}).items()
        ]
        return ", ".join(parts)


def _category(row: Row, key: str, storage: FileStorage, number: int) -> str:
    value: Any = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(
            "a category must be text or a whole number", path=storage.first_entry_file_name, row=number, field=key
        )
    return str(value)
