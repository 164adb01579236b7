"""A benchmark's own table, from a table of scores over its prompt set.

The formulas are those of :mod:`dataflow.metrics`. A picture without a score is in no mean: it lowers the coverage, and
below a floor there is no report. Beside each figure stands the strict one, in which pictures that their model failed or
declined to make count as the worst there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataflow.benchmark_tables import BENCHMARKS, Benchmark, Compat, Picture, Prompt, Values
from dataflow.errors import InputError
from dataflow.prompt_sets import FORMATS
from dataflow.scores import FLOOR, NEVER_MADE, by_status, generation_failure, score_columns, values_at
from dataflow.types import BadRow, Row


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a benchmark's table.

    Attributes:
        section: what the line is one of, such as ``category``; the benchmark's main table has none.
        name: of the line.
        values: by column; None where it is not defined.
        strict: the same with pictures that were never made as the worst.
        expected: pictures.
        scored: those with a score.
    """

    section: str
    name: str
    values: Values
    strict: Values
    expected: int
    scored: int


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """What :func:`report` found.

    Attributes:
        name: of the format.
        columns: of every line.
        digits: after the point, as its authors print.
        lines: in the order of the authors' table.
        prompts: rows.
        expected: pictures.
        scored: those with a score.
        missing: the others, by status.
        notes: what else must be said.
    """

    name: str
    columns: tuple[str, ...]
    digits: int
    lines: Sequence[Line]
    prompts: int
    expected: int
    scored: int
    missing: Mapping[str, int]
    notes: Sequence[str]

    @property
    def coverage(self) -> float:
        """Of the expected pictures, those with a score."""
        return self.scored / self.expected if self.expected else 0.0


def report(
    name: str,
    rows: Iterable[Row | BadRow],
    *,
    scores: Mapping[str, str] | None = None,
    compat: Compat | None = None,
    force: bool = False,
) -> BenchmarkReport:
    """A benchmark's own table.

    Args:
        name: one of :data:`dataflow.prompt_sets.FORMATS`.
        rows: a scored table over the prompts that :func:`dataflow.prompt_sets.load` gave.
        scores: where the scores stand: ``{"score": "judge.value"}``; GEdit's are ``semantic`` and ``quality``, and
            several keys with commas between them are several scores, of which GEdit takes the least and ImgEdit the
            mean. None for the only score column there is.
        compat: "ella" for DPG-Bench as its program computes it.
        force: report although more than one in a hundred pictures has no score, and take parts of answers.

    Raises:
        InputError: no such format, no or several score columns, scores of another kind, or coverage below the floor.
    """
    if name not in BENCHMARKS:
        raise InputError(f"there is no benchmark {name!r}; there are {', '.join(FORMATS)}")
    benchmark = BENCHMARKS[name]
    strangers = set(scores or {}) - set(benchmark.inputs)
    if strangers:
        raise InputError(f"{name} has the scores {', '.join(benchmark.inputs)}, not {', '.join(sorted(strangers))}")
    if compat and name != "dpg":
        raise InputError(f"compat={compat} belongs to dpg")
    prompts = _with_lacking(list(_prompts(benchmark, rows, dict(scores or {}), force)))
    missing = Counter(one.status for prompt in prompts for one in prompt.pictures if one.status != "ok")
    expected = sum(len(prompt.pictures) for prompt in prompts)
    scored = expected - missing.total()
    if not scored:
        raise InputError(f"no picture has a score ({by_status(missing) or 'the table has no rows'})")
    if scored < FLOOR * expected and not force:
        raise InputError(
            f"{scored:,} of {expected:,} pictures have a score ({by_status(missing)}): below {FLOOR:.0%} a benchmark's"
            " figure says little. Score what is missing, or force it"
        )
    try:
        table = benchmark.table(prompts, compat)
        worst = benchmark.table([_with_failures(benchmark, prompt) for prompt in prompts], compat)
    except ValueError as error:
        raise InputError(f"the scores are not {name}'s: {error}") from error
    except KeyError as error:
        raise InputError(f"the questions have no {error}: is this the table of another format?") from error
    strict = {(one.section, one.name): one.values for one in worst}
    return BenchmarkReport(
        name=name,
        columns=benchmark.columns,
        digits=benchmark.digits,
        lines=[
            Line(one.section, one.name, one.values, strict[one.section, one.name], *_counts(one.prompts))
            for one in table
        ],
        prompts=len(prompts),
        expected=expected,
        scored=scored,
        missing=dict(missing),
        notes=[*_notes(benchmark, prompts), *benchmark.notes(prompts, compat)],
    )


# Rows --------------------------------------------------------------------------------------------------------------


def _prompts(
    benchmark: Benchmark, rows: Iterable[Row | BadRow], scores: dict[str, str], force: bool
) -> Iterator[Prompt]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, BadRow):
            yield Prompt(f"row {number}", "", {}, (Picture(None, "bad_row"),))
            continue
        scores = scores or _only_score(row, benchmark)
        found = {name: [values_at(row, key.strip()) for key in keys.split(",")] for name, keys in scores.items()}
        columns = [column for each in found.values() for column in each]
        by = [row.get(f"{keys.partition('.')[0]}_by") for keys in scores.values()]
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            raise InputError(f"{', '.join(scores.values())} have scores of different numbers of pictures", row=number)
        pictures = [
            _picture(
                benchmark, row, {name: [column[place] for column in each] for name, each in found.items()}, by, force
            )
            for place in range(lengths.pop())
        ]
        kept = {name: row[name] for name in benchmark.keeps if name in row}
        prompt_id, category = str(row.get("prompt_id", number)), str(row.get("category", ""))
        yield Prompt(prompt_id, category, kept, tuple(pictures), generation_failure(row))


def _only_score(row: Row, benchmark: Benchmark) -> dict[str, str]:
    columns = score_columns(row)
    if len(columns) != 1:
        raise InputError(
            f"name the score column, one of {', '.join(columns)}"
            if columns
            else "no column of the table has a status beside it: has the evaluator run?"
        )
    return {name: f"{columns[0]}.{name}" if len(benchmark.inputs) > 1 else columns[0] for name in benchmark.inputs}


def _picture(
    benchmark: Benchmark, row: Row, found: Mapping[str, Sequence[tuple[Any, str]]], by: Sequence[Any], force: bool
) -> Picture:
    for each in found.values():
        for _, status in each:
            if status != "ok":
                return Picture(None, status)
    values = {name: [value for value, _ in each] for name, each in found.items()}
    try:
        value = benchmark.read(row, {**values, "by": by}, force)
    except (ValueError, TypeError, KeyError):
        return Picture(None, "unreadable")
    return Picture(value, "no_value" if value is None else "ok")


def _with_failures(benchmark: Benchmark, prompt: Prompt) -> Prompt:
    """The prompt with pictures that were never made as the worst, where the benchmark has a worst."""
    pictures = []
    for one in prompt.pictures:
        worst = benchmark.worst(prompt.row) if one.status in NEVER_MADE else None
        pictures.append(one if worst is None else Picture(worst, "ok"))
    return replace(prompt, pictures=tuple(pictures))


def _with_lacking(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A row names only the pictures that were made; how many were asked for, the other rows tell."""
    most = max((len(prompt.pictures) for prompt in prompts), default=0)
    return [
        replace(
            prompt,
            pictures=prompt.pictures + (Picture(None, prompt.failure),) * (most - len(prompt.pictures)),
        )
        if prompt.failure
        else prompt
        for prompt in prompts
    ]


def _counts(prompts: Sequence[Prompt]) -> tuple[int, int]:
    pictures = [one for prompt in prompts for one in prompt.pictures]
    return len(pictures), sum(one.status == "ok" for one in pictures)


def _notes(benchmark: Benchmark, prompts: Sequence[Prompt]) -> Iterator[str]:
    count = len({prompt.prompt_id for prompt in prompts})
    if count < benchmark.size:
        yield f"{count:,} of the set's {benchmark.size:,} prompts: not comparable with figures of the whole set"
    if len(prompts) > count:
        yield f"{len(prompts) - count:,} rows repeat a prompt"
    never_made = any(one.status in NEVER_MADE for prompt in prompts for one in prompt.pictures)
    if never_made and benchmark.worst({}) is None:
        yield "the scores have no known worst value: the strict figures leave out what was never made"
