"""Scores of pictures by themselves, or with the prompt they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

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

    Args:
        pipe: the serving that scores.
        with_prompt: whether the score is one of the picture and its prompt.
        options: how the step is run.
    """

    def __init__(self, pipe: Serving, *, with_prompt: bool = False, options: RunOptions | None = None) -> None:
        self.pipe = pipe
        self.with_prompt = with_prompt
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
        by = _signed(self.pipe.fingerprint())

        def requests(row: Row) -> list[Draft]:
            paths = pictures(row, input_image_key)
            # The last turn is what the picture shows; the turns before it are in the picture it began with.
            prompt = user_turns(row, input_conversation_key)[-1] if self.with_prompt and paths else ""
            return [Draft(prompt=prompt, images=(path,), seed=0) for path in paths]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            return with_scores(row, input_image_key, output_key, outcomes, by)

        return Plan(
            name=type(self).__name__,
            inputs=(input_image_key, *([input_conversation_key] if self.with_prompt else [])),
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
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


def _signed(fingerprint: Mapping[str, Any]) -> str:
    """The model's name, and a digest of all that makes its scores what they are."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()
    return f"{fingerprint.get('model', 'unknown')}#{digest[:12]}"
