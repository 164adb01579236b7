"""Text to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dataflow.errors import InputError
from dataflow.operators.rows import overrides, sample_count, user_turns, with_images
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage


class Text2ImageGenerator:
    """Draws the prompt of every row.

    Args:
        pipe: the serving that makes the images.
        seed: run seed; every image's own seed is derived from it, unless its row has a ``seed`` column.
        options: how the step is run.

    A row may override the serving's defaults in columns ``negative_prompt``, ``height`` and ``width`` (pixels),
    ``seed``, ``num_inference_steps``, ``guidance_scale``, ``true_cfg_scale``, ``strength`` and ``max_sequence_length``.
    """

    answer: ClassVar = "images"

    def __init__(self, pipe: Serving, *, seed: int = 0, options: RunOptions | None = None) -> None:
        self.pipe = pipe
        self.seed = seed
        self.options = options

    def plan(
        self,
        *,
        input_conversation_key: str = "conversations",
        output_image_key: str = "images",
        input_samples_key: str | None = None,
    ) -> Plan:
        """The step as a description.

        Args:
            input_conversation_key: column with the prompt: a string, or messages of which the user turn is drawn.
            output_image_key: column that gets the list of image paths.
            input_samples_key: column with how many images a row gets, in place of the serving's ``images_per_prompt``.
                A larger number makes the further ones only.
        """

        def requests(row: Row) -> list[Draft]:
            turns = user_turns(row, input_conversation_key)
            if len(turns) > 1:
                raise InputError(
                    f"the conversation has {len(turns)} user turns, text to image draws one: split it into rows",
                    field=input_conversation_key,
                )
            settings = overrides(row)
            samples = sample_count(row, input_samples_key, self.pipe.images_per_prompt)
            return [Draft(prompt=turns[0], sample=sample, **settings) for sample in range(samples)]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            return with_images(row, output_image_key, [(outcome,) for outcome in outcomes])

        return Plan(
            name=type(self).__name__,
            inputs=(input_conversation_key, *([input_samples_key] if input_samples_key else [])),
            outputs=(output_image_key,),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            seed=self.seed,
        )

    def run(
        self, storage: FileStorage, input_conversation_key: str = "conversations", output_image_key: str = "images"
    ) -> Summary:
        """Make the images of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_conversation_key=input_conversation_key, output_image_key=output_image_key)
        return execute(plan, storage, self.options)
