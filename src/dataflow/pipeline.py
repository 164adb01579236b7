"""Operators in order over one storage: what each one writes is what the next one reads."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from dataflow.errors import ConfigError, InputError
from dataflow.places import Place
from dataflow.runtime.engine import RunOptions, execute
from dataflow.runtime.ray_cluster import kept_connection
from dataflow.types import BadRow, Plan, Summary
from dataflow.utils.storage import FileStorage
from dataflow.utils.tables import require

_ANSWERS = {"images": "images", "words": "words or scores"}
PEEK_ROWS = 100
"""Rows that are looked at to learn a table's columns."""


class Operator(Protocol):
    """Whatever can describe a step as a :class:`~dataflow.types.Plan`.

    One with an attribute ``answer``, ``"images"`` or ``"words"``, says what its serving has to answer with.
    """

    def plan(self, *args: Any, **kwargs: Any) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One operator and the columns it works on.

    Attributes:
        operator: makes the plan.
        keys: keyword arguments of the operator's ``plan``, such as ``input_conversation_key``.
        place: where a pipeline file describes the step, for messages; None for one that a program made.
    """

    operator: Operator
    keys: Mapping[str, Any] = field(default_factory=dict)
    place: Place | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """A step as it will be run.

    Attributes:
        number: from 1.
        plan: what it does.
        columns: of the table it writes; none where the user's table has no rows to learn them from.
    """

    number: int
    plan: Plan
    columns: tuple[str, ...]


class Pipeline:
    """Runs steps one after the other, each to its end.

    Args:
        steps: in order.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        if not steps:
            raise ConfigError("a pipeline needs at least one step")
        self.steps = tuple(steps)

    def plans(self) -> list[Plan]:
        """The steps as descriptions; no work is done.

        Raises:
            ConfigError: an operator does not take its keys.
        """
        return [_plan(step) for step in self.steps]

    def compile(self, columns: Sequence[str], table: str = "the table") -> tuple[CompiledStep, ...]:
        """Follow the columns through the steps; no work is done.

        Args:
            columns: of the table the first step reads; none if it has no rows, and then nothing is missing.
            table: what to call it in messages.

        Raises:
            ConfigError: a step needs a column that is not there yet, or would overwrite another step's.
        """
        plans = self.plans()
        compiled: list[CompiledStep] = []
        written: dict[str, int] = {}
        for number, plan in enumerate(plans, 1):
            for column in plan.inputs:
                if columns and column not in columns:
                    self._missing(column, number, plans, columns, table)
            for column in plan.outputs:
                scored = f"{column}_status" in plan.outputs
                if column in plan.inputs if scored else column in written and column not in plan.inputs:
                    self._overwritten(column, number, plan, written.get(column, number))
                written[column] = number
            columns = list(dict.fromkeys([*columns, *plan.outputs])) if columns else []
            compiled.append(CompiledStep(number=number, plan=plan, columns=tuple(columns)))
        return tuple(compiled)

    def as_read(self, storage: FileStorage) -> FileStorage:
        """The storage as the first step will read it."""
        return storage

    def check(self, storage: FileStorage) -> None:
        """Find out, before anything runs, what would stop a later step.

        Raises:
            DataflowError: as :meth:`check_servings` and :meth:`check_tables`.
        """
        self.check_servings()
        self.check_tables(storage)

    def check_servings(self) -> None:
        """Every serving must find its model and take its parameters. Nothing is loaded.

        Raises:
            ConfigError: one cannot be used like this.
        """
        for number, (step, plan) in enumerate(zip(self.steps, self.plans(), strict=True), 1):
            if plan.serving is not None:
                given = "words" if plan.serving.image_io is None else "images"
                wanted = getattr(step.operator, "answer", given)
                if wanted != given:
                    place = f"step {number}" if step.place is None else step.place.label("serving")
                    raise ConfigError(
                        f"{place}: {plan.name} needs a serving that answers with {_ANSWERS[wanted]},"
                        f" {type(plan.serving).__name__} answers with {_ANSWERS[given]}"
                    )
                plan.serving.fingerprint()
                plan.serving.default_params()
                plan.serving.preflight()

    def check_tables(self, storage: FileStorage) -> tuple[CompiledStep, ...]:
        """Every column a step needs must be in the user's table or be written by a step before it.

        A table without rows has no columns to check. Nothing is written.

        Raises:
            InputError: the table cannot be read.
            ConfigError: as :meth:`compile`; a step would overwrite the user's table; or its format needs a library that
                is not there.
        """
        require(storage.cache_type)
        columns = table_columns(storage)
        table = storage.reset().step().input_path
        compiled = self.compile(columns, str(table))
        for number, plan in enumerate(self.plans(), 1):
            if storage.output_path.absolute() == table.absolute():
                raise ConfigError(
                    f"step {number} ({plan.name}) would overwrite {table}, which it starts from: use another folder"
                )
            storage.step()
        storage.reset()
        return compiled

    @kept_connection()
    def run(
        self, storage: FileStorage, options: RunOptions | None = None, *, first: int = 1, last: int | None = None
    ) -> list[Summary]:
        """Run the steps; what is finished already is not made again.

        Args:
            storage: walks from the user's table through the steps'.
            options: how each step is run.
            first: number, from 1, of the step to begin with. The tables of the steps before it are taken as they are,
                whatever has become of what they were made from.
            last: number of the step to end with; None for all.

        Returns:
            One sum per step that was run; a pilot ends with the first step that has rows left to make.

        Raises:
            ConfigError: there is no such step.
            InputError: the table that step ``first`` reads is not there.
            DataflowError: see :meth:`check` and :func:`dataflow.runtime.engine.execute`. The steps before are kept.
        """
        last = len(self.steps) if last is None else last
        if not 1 <= first <= last <= len(self.steps):
            raise ConfigError(f"there are the steps 1 to {len(self.steps)}: cannot run {first} to {last}")
        self.check_servings()
        if first == 1:
            self.check_tables(storage)
        else:
            self._check_written(storage, first)
        summaries = []
        for number, plan in enumerate(self.plans()[:last], 1):
            storage.step()
            if number < first:
                continue
            summaries.append(execute(plan, storage, options))
            if summaries[-1].output is None:
                break  # a pilot: what comes after it has no table to read
        return summaries

    def mermaid(self, table: str = "table") -> str:
        """The pipeline as the text of a Mermaid flow chart: its steps, and the columns that go from one to another.

        Args:
            table: what to call the user's table.
        """
        plans = self.plans()
        writer: dict[str, int] = {}
        lines = ["flowchart TD", f"    step0[({_quoted(table)})]"]
        for number, plan in enumerate(plans, 1):
            shape = "[{}]" if plan.serving else "{{{{{}}}}}"
            lines.append(f"    step{number}{shape.format(_quoted(f'{number}. {plan.name}'))}")
            sources: dict[int, list[str]] = {}
            for column in plan.inputs:
                sources.setdefault(writer.get(column, 0), []).append(column)
            for source, columns in sources.items():
                lines.append(f"    step{source} -->|{_quoted(', '.join(columns))}| step{number}")
            writer |= dict.fromkeys(plan.outputs, number)
        lines += [f"    step{len(plans)} --> result[({_quoted('dataset')})]"]
        return "\n".join(lines) + "\n"

    def _check_written(self, storage: FileStorage, first: int) -> None:
        """The table that step ``first`` reads must be there, with the columns it and the later steps need."""
        for _ in range(first):
            storage.step()
        before = storage.input_path
        storage.reset()
        if not before.is_file():
            raise InputError(
                f"step {first} would read this table of step {first - 1}, and it is not there: run the steps before",
                path=before,
            )
        rest = Pipeline(self.steps[first - 1 :])
        rest.compile(table_columns(FileStorage(str(before))), str(before))

    def _missing(self, column: str, number: int, plans: Sequence[Plan], columns: Sequence[str], table: str) -> NoReturn:
        plan = plans[number - 1]
        text = f"{plan.name} needs the column {column!r}, and "
        later = next((n for n, other in enumerate(plans, 1) if n > number and column in other.outputs), None)
        if later is None:
            source = f"{table} has none" if number == 1 else f"neither {table} has it nor does a step before write it"
            text += f"{source}{did_you_mean(column, columns)}; there are {listed(columns)}"
        elif back := [name for name in plans[later - 1].inputs if name in plan.outputs and name not in columns]:
            text += (
                f"step {later} ({plans[later - 1].name}) writes it, which itself needs {listed(back)} of this step:"
                " a cycle; one of the two must read another column"
            )
        else:
            text += f"step {later} ({plans[later - 1].name}) writes it only after this one: put that step first"
        raise ConfigError(self._at(number, column, text))

    def _overwritten(self, column: str, number: int, plan: Plan, before: int) -> NoReturn:
        whose = "which it reads" if column in plan.inputs else f"which step {before} writes"
        text = f"{plan.name} would overwrite the column {column!r}, {whose}: give its output another name"
        raise ConfigError(self._at(number, column, text, output=True))

    def _at(self, number: int, column: str, text: str, *, output: bool = False) -> str:
        """The text with the step before it, and with the key that names the column, where a file does."""
        step = self.steps[number - 1]
        if step.place is None:
            return f"step {number}: {text}"
        names = (
            name
            for name, value in step.keys.items()
            if name.startswith("output") is output and column in (value, str(value).partition(".")[0])
        )
        return f"{step.place.label(next(names, None))}: {text}"


def _plan(step: Step) -> Plan:
    try:
        return step.operator.plan(**step.keys)
    except ConfigError as error:
        if step.place is None:
            raise
        raise ConfigError(f"{step.place.label()}: {error}") from error


def table_columns(storage: FileStorage) -> list[str]:
    """The columns of the first rows of the user's table, in the order in which they appear.

    Raises:
        InputError: the table cannot be read.
    """
    rows = itertools.islice(storage.reset().step().iter_rows(), PEEK_ROWS)
    columns = dict.fromkeys(itertools.chain.from_iterable(row for row in rows if not isinstance(row, BadRow)))
    storage.reset()
    return list(columns)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``", did you mean 'a' or 'b'?"`` for an error's text, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def listed(names: Iterable[str]) -> str:
    """``'a', 'b'`` for an error's text."""
    return ", ".join(map(repr, names))


def _quoted(text: str) -> str:
    """Text between the quotes of a Mermaid label."""
    return '"' + text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace("\n", " ") + '"'
