"""Scores of edited pictures against the picture that was edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from dataflow.errors import ConfigError, InputError
from dataflow.operators.combining import lacking
from dataflow.operators.core_vision.image_evaluator import signed
from dataflow.operators.evaluation import pictures, with_scores
from dataflow.operators.rows import mask_path, user_turns
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage


class EditEvaluator:
    """Scores every edited picture of a row against the row's source with a serving that compares two pictures.

    Each edited picture is one request with the pictures (source, edited): preservation
    (:class:`dataflow.serving.preservation.PreservationServing`), CLIP's directions
    (:class:`dataflow.serving.clip.ClipEditServing`), a judge of edits. A score is computed once for the contents of
    both pictures and of the mask, the instruction, the captions and the model.

    A row without a source, or whose source is not there, has ``missing_image`` for each of its scores; likewise an
    edited picture that is not there. One that is not there keeps the others of its row from being scored in this run:
    they are ``failed`` and say so.

    Args:
        pipe: the serving that scores.
        with_prompt: whether the score depends on the instruction: the last user turn.
        options: how the step is run.
    """

    answer: ClassVar = "words"

    def __init__(self, pipe: Serving, *, with_prompt: bool = False, options: RunOptions | None = None) -> None:
        self.pipe = pipe
        self.with_prompt = with_prompt
        self.options = options

    def plan(
        self,
        *,
        input_source_key: str = "images",
        input_image_key: str = "edited_images",
        input_conversation_key: str = "conversations",
        input_mask_key: str | None = None,
        input_source_caption_key: str | None = None,
        input_target_caption_key: str | None = None,
        output_key: str = "edit_score",
    ) -> Plan:
        """The step as a description.

        Args:
            input_source_key: column with the path of the picture that was edited, or a list of paths whose first is
                compared: the others are references.
            input_image_key: column with the path of an edited picture, or a list of them.
            input_conversation_key: column with the instruction; read only with ``with_prompt``.
            input_mask_key: column with the path of a mask of the source, white or transparent where it may be changed;
                an empty cell means none.
            input_source_caption_key: column with what the source shows, the request's parameter ``source_caption``.
            input_target_caption_key: column with what the edited picture should show, its ``target_caption``.
            output_key: column that gets the scores, in the shape of the column of edited pictures.

        Raises:
            ConfigError: a mask column for a serving that takes no masks.
        """
        if input_mask_key is not None and not self.pipe.masks:
            raise ConfigError(f"{type(self.pipe).__name__} takes no masks: leave input_mask_key out")
        captions = {
            name: key
            for name, key in (
                ("source_caption", input_source_caption_key),
                ("target_caption", input_target_caption_key),
            )
            if key is not None
        }
        by = signed(self.pipe.fingerprint())

        def requests(row: Row) -> list[Draft]:
            source, edited = pictures(row, input_source_key)[:1], pictures(row, input_image_key)
            if not source or not edited:
                return []
            prompt = user_turns(row, input_conversation_key)[-1] if self.with_prompt else ""
            mask = None if input_mask_key is None else mask_path(row, input_mask_key)
            params = _captions(row, captions)
            return [Draft(prompt=prompt, images=(source[0], path), mask=mask, seed=0, params=params) for path in edited]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            try:
                source, edited = pictures(row, input_source_key)[:1], pictures(row, input_image_key)
            except InputError:
                return with_scores(row, input_image_key, output_key, outcomes, by)
            if edited and not source:
                outcomes = [lacking("image_missing", "the row names no source picture")] * len(edited)
            return with_scores(row, input_image_key, output_key, outcomes, by)

        return Plan(
            name=type(self).__name__,
            inputs=(
                input_source_key,
                input_image_key,
                *([input_conversation_key] if self.with_prompt else []),
                *([] if input_mask_key is None else [input_mask_key]),
                *captions.values(),
            ),
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            folding=by,
        )

    def run(
        self,
        storage: FileStorage,
        input_source_key: str = "images",
        input_image_key: str = "edited_images",
        input_conversation_key: str = "conversations",
        input_mask_key: str | None = None,
        input_source_caption_key: str | None = None,
        input_target_caption_key: str | None = None,
        output_key: str = "edit_score",
    ) -> Summary:
        """Score the edited pictures of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_source_key=input_source_key,
            input_image_key=input_image_key,
            input_conversation_key=input_conversation_key,
            input_mask_key=input_mask_key,
            input_source_caption_key=input_source_caption_key,
            input_target_caption_key=input_target_caption_key,
            output_key=output_key,
        )
        return execute(plan, storage, self.options)


def _captions(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """The captions that are there, by the name of the request's parameter.

    Raises:
        InputError: one is no text.
    """
    found = {}
    for name, column in columns.items():
        caption = row.get(column)
        if caption is not None and not isinstance(caption, str):
            raise InputError(f"expected a caption, found {type(caption).__name__}", field=column)
        if caption and not caption.isspace():
            found[name] = caption
    return found
