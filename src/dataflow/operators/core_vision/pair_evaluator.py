"""Which of two pictures is better, asked in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dataflow.errors import ConfigError, InputError
from dataflow.operators.combining import answered, combined, lacking
from dataflow.operators.core_vision.image_evaluator import signed
from dataflow.operators.evaluation import pictures, with_scores
from dataflow.operators.rows import user_turns
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage

_SWAPPED: Mapping[str, str] = {"first": "second", "second": "first", "tie": "tie"}


class PairEvaluator:
    """Has a judge compare two pictures of each row, once in each order.

    Judges prefer a place: a verdict counts only where both orders agree, else the pair is a tie. What stands in the row
    is ``{"winner", "consistent", "reasons"}``: ``first``, ``second`` or ``tie``; whether both orders said so; and what
    they gave as reasons. It is null with a status where one order has no verdict.

    Args:
        pipe: a serving that answers ``{"better", "reason"}`` to two pictures, ``better`` being ``first``, ``second`` or
            ``tie``: :class:`dataflow.serving.pair_judge.PairJudge`.
        with_prompt: whether the judge is told the prompt.
        options: how the step is run.
    """

    answer: ClassVar = "words"

    def __init__(self, pipe: Serving, *, with_prompt: bool = True, options: RunOptions | None = None) -> None:
        self.pipe = pipe
        self.with_prompt = with_prompt
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_first_key: str | None = None,
        input_second_key: str | None = None,
        input_conversation_key: str = "conversations",
        output_key: str = "preference",
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column whose first two pictures are compared; not read with the next two.
            input_first_key: column with the first picture, the first of a list.
            input_second_key: column with the second one, likewise.
            input_conversation_key: column with the prompt; read only with ``with_prompt``.
            output_key: column that gets the verdict.

        Raises:
            ConfigError: only one of the two columns is named.
        """
        if (input_first_key is None) != (input_second_key is None):
            raise ConfigError("input_first_key and input_second_key go together")
        columns = (input_image_key,)
        if input_first_key is not None and input_second_key is not None:
            columns = (input_first_key, input_second_key)
        by = signed(self.pipe.fingerprint())

        def requests(row: Row) -> list[Draft]:
            pair, _ = _pair(row, columns)
            if len(pair) < 2:
                return []
            prompt = user_turns(row, input_conversation_key)[-1] if self.with_prompt else ""
            return [Draft(prompt=prompt, images=order, seed=0) for order in (pair, pair[::-1])]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            try:
                _, lacks = _pair(row, columns)
            except InputError:
                lacks = columns[0]
            verdict = [_verdict(outcomes)] if len(outcomes) == 2 else outcomes
            return with_scores(row, lacks, output_key, verdict, by, per_picture=False)

        return Plan(
            name=type(self).__name__,
            inputs=(*columns, *([input_conversation_key] if self.with_prompt else [])),
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            folding=by,
        )

    def run(
        self,
        storage: FileStorage,
        input_image_key: str = "images",
        input_first_key: str | None = None,
        input_second_key: str | None = None,
        input_conversation_key: str = "conversations",
        output_key: str = "preference",
    ) -> Summary:
        """Compare the two pictures of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_image_key=input_image_key,
            input_first_key=input_first_key,
            input_second_key=input_second_key,
            input_conversation_key=input_conversation_key,
            output_key=output_key,
        )
        return execute(plan, storage, self.options)


def _pair(row: Row, columns: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The two pictures, or fewer, and the column in which one is lacking."""
    if len(columns) == 1:
        return tuple(pictures(row, columns[0])[:2]), columns[0]
    each = [pictures(row, column)[:1] for column in columns]
    lacks = next((column for column, found in zip(columns, each, strict=True) if not found), columns[0])
    return tuple(path for found in each for path in found), lacks


def _verdict(outcomes: Sequence[Outcome]) -> Outcome:
    """What both orders come to."""
    winners, reasons = [], []
    for outcome, name, seen in zip(outcomes, ("in order", "swapped"), ({}, _SWAPPED), strict=True):
        answer, failure = answered(outcome, name)
        if failure is not None:
            return failure
        better = _better(answer)
        if better is None:
            return lacking("parse_error", f"{name}: the serving compares no pictures: {answer!r}")
        winners.append(seen.get(better, better))
        reasons.append(answer.get("reason", ""))
    consistent = winners[0] == winners[1]
    return combined({"winner": winners[0] if consistent else "tie", "consistent": consistent, "reasons": reasons})


def _better(answer: Any) -> str | None:
    found = answer.get("better") if isinstance(answer, Mapping) else None
    return found if found in _SWAPPED else None
