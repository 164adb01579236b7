"""Instruction edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dataflow.operators.rows import image_paths, mask_path, overrides, sample_count, user_turns, with_images
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage


class PromptedImageEditGenerator:
    """Edits the images of every row as its instruction says.

    Several images in a row are references in order, for models that take several. Several user turns are a multi-turn
    edit: each turn edits the image of the turn before it.

    Args:
        pipe: the serving that edits.
        seed: run seed; every image's own seed is derived from it, unless its row has a ``seed`` column.
        options: how the step is run.

    Columns that override the serving's defaults: see :class:`~dataflow.operators.Text2ImageGenerator`.
    """

    answer: ClassVar = "images"

    def __init__(self, pipe: Serving, *, seed: int = 0, options: RunOptions | None = None) -> None:
        self.pipe = pipe
        self.seed = seed
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_conversation_key: str = "conversations",
        output_image_key: str = "edited_images",
        input_mask_key: str | None = None,
        input_samples_key: str | None = None,
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the path of the image to edit, or a list of paths.
            input_conversation_key: column with the instruction: a string, or messages whose user turns are followed.
            output_image_key: column that gets the list of edited images, after the last turn. The images of all turns
                stand in ``{output_image_key}_turns`` where there are several.
            input_mask_key: column with the path of a mask for the first image, for models that take one; an empty cell
                means none. The mask goes with the first turn.
            input_samples_key: column with how many images a row gets, in place of the serving's ``images_per_prompt``.
        """

        def requests(row: Row) -> list[Draft]:
            turns = user_turns(row, input_conversation_key)
            images = image_paths(row, input_image_key)
            mask = None if input_mask_key is None else mask_path(row, input_mask_key)
            settings = overrides(row)
            drafts: list[Draft] = []
            for sample in range(sample_count(row, input_samples_key, self.pipe.images_per_prompt)):
                drafts.append(Draft(prompt=turns[0], images=images, mask=mask, sample=sample, **settings))
                for prompt in turns[1:]:
                    drafts.append(Draft(prompt=prompt, sample=sample, after=len(drafts) - 1, **settings))
            return drafts

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            wanted = sample_count(row, input_samples_key, self.pipe.images_per_prompt) if len(outcomes) > 1 else 1
            # A row that could not be used comes with one failure, whatever it asked for.
            turns = len(outcomes) // wanted or 1
            samples = [outcomes[first : first + turns] for first in range(0, len(outcomes), turns)]
            return with_images(row, output_image_key, samples)

        return Plan(
            name=type(self).__name__,
            inputs=(
                input_image_key,
                input_conversation_key,
                *(key for key in (input_mask_key, input_samples_key) if key is not None),
            ),
            outputs=(output_image_key,),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            seed=self.seed,
        )

    def run(
        self,
        storage: FileStorage,
        input_image_key: str = "images",
        input_conversation_key: str = "conversations",
        output_image_key: str = "edited_images",
        input_mask_key: str | None = None,
    ) -> Summary:
        """Edit the images of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_image_key=input_image_key,
            input_conversation_key=input_conversation_key,
            output_image_key=output_image_key,
            input_mask_key=input_mask_key,
        )
        return execute(plan, storage, self.options)
