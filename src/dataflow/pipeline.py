"""Operators in order over one storage: what each one writes is what the next one reads."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dataflow.errors import ConfigError, InputError
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Plan, Summary
from dataflow.utils.storage import FileStorage
from dataflow.utils.tables import require

PEEK_ROWS = 100
"""Rows that are looked at to learn a table's columns."""


class Operator(Protocol):
    """Whatever can describe a step as a :class:`~dataflow.types.Plan`."""

    def plan(self, *args: Any, **kwargs: Any) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One operator and the columns it works on.

    Attributes:
        operator: makes the plan.
        keys: keyword arguments of the operator's ``plan``, such as ``input_conversation_key``.
    """

    operator: Operator
    keys: Mapping[str, Any] = field(default_factory=dict)


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
        """The steps as descriptions; no work is done."""
        return [step.operator.plan(**step.keys) for step in self.steps]

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
        for plan in self.plans():
            if plan.serving is not None:
                plan.serving.fingerprint()
                plan.serving.default_params()
                plan.serving.preflight()

    def check_tables(self, storage: FileStorage) -> None:
        """Every column a step needs must be in the user's table or be written by a step before it.

        A table without rows has no columns to check. Nothing is written.

        Raises:
            InputError: a column is missing, or the table cannot be read.
            ConfigError: a step would overwrite the user's table, or its format needs a library that is not there.
        """
        require(storage.cache_type)
        columns = table_columns(storage)
        table = storage.reset().step().input_path
        for number, plan in enumerate(self.plans(), 1):
            for column in plan.inputs:
                if columns and column not in columns:
                    raise InputError(
                        f"step {number} ({plan.name}) needs this column, and there is none"
                        f"{did_you_mean(column, columns)}; there are {listed(columns)}",
                        path=table,
                        field=column,
                    )
            columns = columns and list(dict.fromkeys([*columns, *plan.outputs]))
            if storage.output_path.absolute() == table.absolute():
                raise ConfigError(f"step {number} would overwrite {table}, which it starts from: use another folder")
            storage.step()
        storage.reset()

    def run(self, storage: FileStorage, options: RunOptions | None = None) -> list[Summary]:
        """Run every step from the first; what is finished already is not made again.

        Args:
            storage: walks from the user's table through the steps'.
            options: how each step is run.

        Returns:
            One sum per step; a pilot ends with the first step that has rows left to make.

        Raises:
            DataflowError: see :meth:`check` and :func:`dataflow.runtime.engine.execute`. The steps before are kept.
        """
        self.check(storage)
        summaries = []
        for plan in self.plans():
            summaries.append(execute(plan, storage.step(), options))
            if summaries[-1].output is None:
                break  # a pilot: what comes after it has no table to read
        return summaries


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
