"""Prompts expanded or rewritten by a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from dataflow.errors import ConfigError
from dataflow.metrics.prompts import quoted
from dataflow.operators.core_text.writing import (
    QUOTES_STAY,
    Entry,
    about,
    check_limits,
    check_number,
    limited,
    one_prompt,
    with_texts,
    writer_of,
)
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage

STYLES: Mapping[str, str] = {
    "detailed": (
        "Expand this prompt for an image generator into a detailed description of one picture: name the subject, what"
        " it does, its surroundings, composition, light, colours and medium. Keep every object, count, colour and"
        " relation that the prompt names; add nothing that contradicts it."
    ),
    "short": (
        "Shorten this prompt for an image generator: keep every object, count, colour and relation that it names, and"
        " leave out whatever a picture does not show."
    ),
    "diverse": (
        "Write new prompts for an image generator in the manner of this one: the same kind of subject and about the"
        " same length, but each with another scene, place, time, point of view or mood than the prompt and the others."
    ),
    "natural": (
        "Rewrite this prompt for an image generator, which may be a list of key words, as plain sentences of natural"
        " language. Keep all that it says and add nothing."
    ),
    "tags": (
        "Rewrite this prompt for an image generator as a list of short key words separated by commas, the most"
        " important first. Keep all that it says and add nothing."
    ),
    "paraphrase": (
        "Say the same as this prompt for an image generator in other words: the same objects, counts, colours and"
        " relations, no more and no fewer."
    ),
}
"""Built-in instructions."""


class PromptRewriter:
    """Has a language model expand or rewrite the prompt of every row, in one or several variants.

    One request asks for all variants of a prompt. Each becomes a row of its own, with all columns of the row it came
    from, its prompt among them, and its number where there are several. ``{output_prompt_key}_by`` says who wrote it. A
    row for which nothing usable was written has null in the output column, and ``{output_prompt_key}_error`` says why:
    it is refused or failed here, and cannot be drawn by a later step.

    Args:
        pipe: :class:`dataflow.serving.writer.WriterServing`.
        style: ``detailed``, ``short``, ``diverse``, ``natural``, ``tags`` or ``paraphrase``.
        instruction: in place of a style, what to do with the prompt, in words.
        variants: different texts for each prompt, 1 to 100.
        language: that the variants are written in; None for the prompt's own.
        keep_quoted: what stands in double quotation marks must be in every variant, letter for letter.
        max_words: longest variant; signs count in scripts without spaces between words.
        max_tokens: longest variant by the serving's tokenizer.
        seed: another seed asks anew.
        options: how the step is run.

    Raises:
        ConfigError: there is no such style, or a number makes no sense.
    """

    answer: ClassVar = "words"

    def __init__(
        self,
        pipe: Serving,
        *,
        style: str = "detailed",
        instruction: str | None = None,
        variants: int = 1,
        language: str | None = None,
        keep_quoted: bool = True,
        max_words: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        options: RunOptions | None = None,
    ) -> None:
        if instruction is None and style not in STYLES:
            raise ConfigError(f"style must be one of {', '.join(STYLES)}, or give an instruction; got {style!r}")
        if instruction is not None and not instruction.strip():
            raise ConfigError("the instruction is empty")
        check_number("variants", variants)
        check_limits(max_words, max_tokens)
        self.pipe = pipe
        self.instruction = STYLES[style] if instruction is None else instruction
        self.variants = variants
        self.language = language
        self.keep_quoted = keep_quoted
        self.max_words, self.max_tokens = max_words, max_tokens
        self.seed = seed
        self.options = options

    def plan(
        self,
        *,
        input_conversation_key: str = "conversations",
        output_prompt_key: str = "prompt",
        as_rows: bool = True,
    ) -> Plan:
        """The step as a description.

        Args:
            input_conversation_key: column with the prompt: a string, or messages with one user turn. It stays.
            output_prompt_key: column that gets the new prompt; ``{output_prompt_key}_number`` its number, from 1, where
                there are several variants.
            as_rows: a row for each variant; False keeps one row with a list of them.

        Raises:
            ConfigError: the output would overwrite the prompt it was made from, or the serving writes no prompts.
        """
        if input_conversation_key == output_prompt_key:
            raise ConfigError("the prompt that was rewritten is kept: output_prompt_key must name another column")
        by = writer_of(self.pipe)
        several = as_rows and self.variants > 1
        number_key = f"{output_prompt_key}_number"

        def requests(row: Row) -> list[Draft]:
            return [self._draft(one_prompt(row, input_conversation_key))]

        def columns(entry: Entry, number: int) -> Row:
            return {output_prompt_key: entry["prompt"], **({number_key: number} if several else {})}

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row | list[Row]:
            rows = with_texts(row, output_prompt_key, outcomes[0], ("prompt",), by, columns)
            if several:
                return rows
            if not as_rows:
                texts = [each[output_prompt_key] for each in rows]
                return {**rows[0], output_prompt_key: [text for text in texts if text is not None]}
            return rows[0]

        return Plan(
            name=type(self).__name__,
            inputs=(input_conversation_key,),
            outputs=(output_prompt_key, f"{output_prompt_key}_by", *([number_key] if several else [])),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            seed=self.seed,
            folding=f"{by} {as_rows}",
            multiplies=several,
        )

    def run(
        self,
        storage: FileStorage,
        input_conversation_key: str = "conversations",
        output_prompt_key: str = "prompt",
        as_rows: bool = True,
    ) -> Summary:
        """Rewrite the prompt of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_conversation_key=input_conversation_key, output_prompt_key=output_prompt_key, as_rows=as_rows
        )
        return execute(plan, storage, self.options)

    def _draft(self, prompt: str) -> Draft:
        keep = quoted(prompt) if self.keep_quoted else []
        language = self.language or "the language of the text"
        words = [
            self.instruction,
            f"Write in {language}.{limited(self.max_words, self.max_tokens)}",
            *([QUOTES_STAY] if keep else []),
        ]
        form = {
            "number": self.variants,
            "fields": {"prompt": "the prompt"},
            "keep": keep,
            "max_words": self.max_words,
            "max_tokens_each": self.max_tokens,
        }
        return Draft(prompt=about("\n".join(words), prompt), params=form)
