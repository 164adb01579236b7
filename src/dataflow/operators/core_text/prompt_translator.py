"""Prompts translated by a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dataflow.errors import ConfigError
from dataflow.metrics.prompts import quoted
from dataflow.operators.core_text.writing import (
    QUOTES_STAY,
    about,
    check_limits,
    limited,
    one_prompt,
    with_texts,
    writer_of,
)
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage

INSTRUCTION = (
    "Translate this prompt for an image generator into {language}. Translate all of it and nothing else: add no detail"
    " and leave none out. If it is in {language} already, give it as it is."
)


class PromptTranslator:
    """Has a language model translate the prompt of every row.

    The prompt stays in its column, the translation gets one of its own; ``{output_prompt_key}_by`` says who translated.
    A row without a usable translation has null there, and ``{output_prompt_key}_error`` says why.

    Args:
        pipe: :class:`dataflow.serving.writer.WriterServing`.
        language: to translate into, in any words the model understands: ``English``, ``Simplified Chinese``.
        keep_quoted: what stands in double quotation marks is text to be drawn: it stays, letter for letter.
        max_words: longest translation; signs count in scripts without spaces between words.
        max_tokens: longest translation by the serving's tokenizer.
        seed: another seed asks anew.
        options: how the step is run.

    Raises:
        ConfigError: there is no language, or a limit makes no sense.
    """

    answer: ClassVar = "words"

    def __init__(
        self,
        pipe: Serving,
        *,
        language: str = "English",
        keep_quoted: bool = True,
        max_words: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        options: RunOptions | None = None,
    ) -> None:
        if not language.strip():
            raise ConfigError("language must say what to translate into, such as English")
        check_limits(max_words, max_tokens)
        self.pipe = pipe
        self.language = language
        self.keep_quoted = keep_quoted
        self.max_words, self.max_tokens = max_words, max_tokens
        self.seed = seed
        self.options = options

    def plan(
        self, *, input_conversation_key: str = "conversations", output_prompt_key: str = "translated_prompt"
    ) -> Plan:
        """The step as a description.

        Args:
            input_conversation_key: column with the prompt: a string, or messages with one user turn. It stays.
            output_prompt_key: column that gets the translation.

        Raises:
            ConfigError: the output would overwrite the prompt, or the serving writes no prompts.
        """
        if input_conversation_key == output_prompt_key:
            raise ConfigError("the prompt that was translated is kept: output_prompt_key must name another column")
        by = writer_of(self.pipe)

        def requests(row: Row) -> list[Draft]:
            return [self._draft(one_prompt(row, input_conversation_key))]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            return with_texts(
                row,
                output_prompt_key,
                outcomes[0],
                ("translation",),
                by,
                lambda entry, _: {output_prompt_key: entry["translation"]},
            )[0]

        return Plan(
            name=type(self).__name__,
            inputs=(input_conversation_key,),
            outputs=(output_prompt_key, f"{output_prompt_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            seed=self.seed,
            folding=by,
        )

    def run(
        self,
        storage: FileStorage,
        input_conversation_key: str = "conversations",
        output_prompt_key: str = "translated_prompt",
    ) -> Summary:
        """Translate the prompt of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_conversation_key=input_conversation_key, output_prompt_key=output_prompt_key)
        return execute(plan, storage, self.options)

    def _draft(self, prompt: str) -> Draft:
        keep = quoted(prompt) if self.keep_quoted else []
        words = INSTRUCTION.format(language=self.language) + limited(self.max_words, self.max_tokens)
        form = {
            "fields": {"translation": f"the translation into {self.language}"},
            "keep": keep,
            "max_words": self.max_words,
            "max_tokens_each": self.max_tokens,
        }
        return Draft(prompt=about(f"{words}\n{QUOTES_STAY}" if keep else words, prompt), params=form)
