"""Scores of pictures by themselves, or with the prompt they were made from."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dataflow.errors import ConfigError
from dataflow.operators.combining import answered, combined, in_groups, lacking
from dataflow.operators.evaluation import pictures, with_scores
from dataflow.operators.rows import user_turns
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage


class ImageEvaluator:
    """Scores every picture of a row with a serving that scores.

    Scores are kept by the picture's content, the prompt and the model: a score is computed once, in whatever order the
    rows stand, and again only if one of the three changes. Rows whose picture was refused, failed or is not there get
    null and a status, never a number (:mod:`dataflow.operators.evaluation`).

    With several ``passes`` a score is ``{"value", …, "sd", "passes"}``: for a number, or for each number of an object,
    its mean over the passes; under ``sd``, by the same names, their standard deviation (n - 1; null for one pass); what
    is no number as a list; and over how many passes. More passes cost only those that are new.

    Args:
        pipe: the serving that scores.
        with_prompt: whether the score is one of the picture and its prompt.
        passes: how often each picture is scored, with seeds 0, 1, …; for a judge that answers at a temperature.
        min_passes: passes that must have a score for the picture to have one; None for all.
        options: how the step is run.

    Raises:
        ConfigError: the passes make no sense.
    """

    answer: ClassVar = "words"

    def __init__(
        self,
        pipe: Serving,
        *,
        with_prompt: bool = False,
        passes: int = 1,
        min_passes: int | None = None,
        options: RunOptions | None = None,
    ) -> None:
        if not 1 <= (passes if min_passes is None else min_passes) <= passes:
            raise ConfigError(f"passes must be from 1 and min_passes from 1 to passes: {passes}, {min_passes}")
        self.pipe = pipe
        self.with_prompt = with_prompt
        self.passes = passes
        self.min_passes = passes if min_passes is None else min_passes
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_conversation_key: str = "conversations",
        output_key: str = "score",
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the path of a picture, or a list of them.
            input_conversation_key: column with the prompt; read only with ``with_prompt``.
            output_key: column that gets the scores, in the shape of the image column.
        """
        by = signed(self.pipe.fingerprint())

        def requests(row: Row) -> list[Draft]:
            paths = pictures(row, input_image_key)
            # The last turn is what the picture shows; the turns before it are in the picture it began with.
            prompt = user_turns(row, input_conversation_key)[-1] if self.with_prompt and paths else ""
            return [
                Draft(prompt=prompt, images=(path,), seed=0, sample=sample)
                for path in paths
                for sample in range(self.passes)
            ]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            # Fewer outcomes than passes: the row could not be used as a whole.
            if self.passes > 1 and len(outcomes) >= self.passes:
                outcomes = [_mean(group, self.min_passes) for group in in_groups(outcomes, self.passes)]
            return with_scores(row, input_image_key, output_key, outcomes, by)

        return Plan(
            name=type(self).__name__,
            inputs=(input_image_key, *([input_conversation_key] if self.with_prompt else [])),
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            folding=f"{by} {self.passes} {self.min_passes}",
        )

    def run(
        self,
        storage: FileStorage,
        input_image_key: str = "images",
        input_conversation_key: str = "conversations",
        output_key: str = "score",
    ) -> Summary:
        """Score the pictures of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_image_key=input_image_key, input_conversation_key=input_conversation_key, output_key=output_key
        )
        return execute(plan, storage, self.options)


def signed(fingerprint: Mapping[str, Any]) -> str:
    """The model's name, and a digest of all that makes its scores what they are."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()
    return f"{fingerprint.get('model', 'unknown')}#{digest[:12]}"


def _mean(outcomes: Sequence[Outcome], least: int) -> Outcome:
    """The outcome of a picture's passes together."""
    found: list[Mapping[str, Any]] = []
    failures: list[Outcome] = []
    for number, outcome in enumerate(outcomes, start=1):
        answer, failure = answered(outcome, f"pass {number} of {len(outcomes)}")
        if failure is None and answer is None:
            failure = lacking("error", f"pass {number} of {len(outcomes)}: the score is no finite number")
        if failure is not None:
            failures.append(failure)
        else:
            found.append(answer if isinstance(answer, Mapping) else {"value": answer})
    if len(found) < least:
        return failures[0]
    means: dict[str, Any] = {}
    spread: dict[str, float | None] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        values: list[Any] = [each.get(name) for each in found]
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if not numbers:
            means[name] = values
        elif len(numbers) < len(values):
            means[name] = spread[name] = None  # a mean over some of the passes would be one of other passes
        else:
            means[name] = math.fsum(numbers) / len(numbers)
            spread[name] = statistics.stdev(numbers) if len(numbers) > 1 else None
    return combined({**means, "sd": spread, "passes": len(found)})
