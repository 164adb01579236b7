"""A language model that writes prompts, translations or instructions: asked in words, read as strict JSON."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dataflow.errors import BadOutputError, BadRequestError, ConfigError, MissingExtraError
from dataflow.metrics.prompts import missing_quotes, normalised, words
from dataflow.serving.words import AskingServing, WordService, json_object, object_format
from dataflow.types import GenerationRequest, GenerationResult

ENTRIES = "entries"
"""Key of the list in an answer."""

_META = re.compile(
    r"^[\s*#>]*(?:(?:sure|certainly|of course|okay)\b[,.!:]|(?:here|below)(?:['’]s| is| are)\b[^.\n]{0,60}?"
    r"\b(?:translat|rewrit|rewrote|expan|prompt|version|variant|instruction|result)\w*[^.\n]{0,30}:"
    r"|(?:translation|rewritten prompt|translated prompt|译文|翻译|翻译结果|改写后的提示词)\s*[:：]"
    r"|(?:好的|当然)[,，!！。]|(?:以下|下面)是)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^[\s*#>]*(?:(?:i['’]?m|i am) (?:very |really )?sorry\b|sorry[,.]? (?:but )?i\b|i (?:cannot|can['’]?t|am unable to"
    r"|am not able to) (?:help|assist|comply|fulfil|provide|create|write|translate|rewrite|do)|as an ai\b"
    r"|(?:很?抱歉|对不起)[,，]|我(?:无法|不能)(?:提供|帮助|协助|完成|翻译|改写|满足))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an answer has to look like: so many different entries, each with these texts.

    It goes with a request as its parameters, see :meth:`of`.

    Attributes:
        number: of entries; an answer may have more, of which the first are taken.
        fields: name → what the text is, for the model; the first one is what is asked for and counted below.
        choices: field → the only texts it may have; no two entries have the same one.
        keep: texts that the first field of every entry must hold letter for letter.
        max_words: of the first field; None for any number.
        max_tokens: likewise, as the tokenizer counts them.
    """

    number: int = 1
    fields: Mapping[str, str]
    choices: Mapping[str, Sequence[str]]
    keep: Sequence[str] = ()
    max_words: int | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Form:
        """The form that a request's parameters describe.

        Raises:
            BadRequestError: they describe none.
        """
        fields, choices = params.get("fields"), params.get("choices") or {}
        number = params.get("number", 1)
        if not isinstance(fields, Mapping) or not fields or not isinstance(number, int) or number < 1:
            raise BadRequestError("a writer is asked by PromptRewriter, PromptTranslator or EditInstructionWriter")
        return cls(
            number=number,
            fields=fields,
            choices=choices,
            keep=params.get("keep") or (),
            max_words=params.get("max_words"),
            max_tokens=params.get("max_tokens_each"),
        )

    @property
    def response_format(self) -> dict[str, Any]:
        """The answer's schema, as OpenAI's ``response_format``."""
        properties = {
            name: {"type": "string", **({"enum": [*self.choices[name]]} if name in self.choices else {})}
            for name in self.fields
        }
        entry = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return object_format({ENTRIES: {"type": "array", "items": entry}})

    @property
    def described(self) -> str:
        """The form of the answer, in words."""
        texts = "; ".join(f'"{name}": {what}' for name, what in self.fields.items())
        several = f"a list of exactly {self.number} different objects" if self.number > 1 else "a list of one object"
        return (
            f'Answer with one JSON object and nothing else: under "{ENTRIES}" {several}, each with these texts: '
            f"{texts}. Write no introduction, no numbering and no comment into them."
        )


class WriterServing(AskingServing):
    """Has a service that answers with words write texts, and takes nothing for one that is none.

    An answer is ``{"entries": [{field: text, …}, …]}`` with as many different entries as were asked for. An answer that
    is no JSON, has too few different entries or an empty text, begins like talk about the answer ("Here is the
    translation:"), apologises in place of a text, has lost a text that was to stay letter for letter, or is too long,
    is ``parse_error``: it is asked for again as the engine's ``max_attempts`` say, and never a prompt.

    What it is asked is the request's own prompt, as the operators of :mod:`dataflow.operators.core_text` write it.

    Args:
        service: a chat-completions service or a model on this machine, without ``image_io``. A temperature above 0
            among its ``request_params`` makes variants differ. A ``response_format`` of its own stays (None for a
            service that knows none); without one it gets the schema of the answer.
        tokenizer: a ``tokenizer.json`` of the model that will draw the prompts, by which ``max_tokens`` is counted.

    Raises:
        ConfigError: the service makes images, or there is no such tokenizer.
    """

    kind = "writer"
    own_params: ClassVar = frozenset({"number", "fields", "choices", "keep", "max_words", "max_tokens_each"})

    def __init__(self, service: WordService, *, tokenizer: str | os.PathLike[str] | None = None) -> None:
        super().__init__(service, {})
        # What is among the service's parameters a request may set; None leaves it out of the request's body.
        self._own_format = "response_format" in self._service.params
        self._service.params.setdefault("response_format", None)
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise ConfigError(f"there is no tokenizer {self.tokenizer}: give the path of a model's tokenizer.json")
        self._counter: Any = None

    def facts(self) -> Mapping[str, Any]:
        """What counts the tokens; what is asked is in the request."""
        if self.tokenizer is None:
            return {}
        return {"tokenizer": hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()}

    def setup(self) -> None:
        """As the service, with the tokenizer: before anything is paid for.

        Raises:
            MissingExtraError: tokenizers is not installed.
            ConfigError: the file is no tokenizer.
        """
        if self.tokenizer is not None:
            self._counter = _token_counter(self.tokenizer)
        super().setup()

    def check(self, request: GenerationRequest) -> None:
        """As the service.

        Raises:
            BadRequestError: the request says not what is to be written, or counts tokens without a tokenizer.
        """
        if Form.of(request.params).max_tokens is not None and self.tokenizer is None:
            raise BadRequestError("max_tokens needs a tokenizer: give the serving the model's tokenizer.json")
        super().check(request)

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """As the service, which may take requests of different forms together."""
        return self._service.batch_key(super()._put(request))

    def asked(self, request: GenerationRequest) -> str:
        """The request's prompt and the form of the answer."""
        return f"{request.prompt}\n\n{Form.of(request.params).described}"

    def read(self, request: GenerationRequest, result: GenerationResult) -> Mapping[str, Any]:
        """The entries."""
        form = Form.of(request.params)
        text = result.text or ""
        found = json_object(text).get(ENTRIES)
        if not isinstance(found, list):
            raise _unusable(f'has no list under "{ENTRIES}"', text)
        entries: list[dict[str, str]] = []
        seen: set[tuple[str, str]] = set()
        main = next(iter(form.fields))
        for number, each in enumerate(found, start=1):
            entry = self._entry(form, each, f"has in entry {number}", text)
            marks = {(name, normalised(entry[name])) for name in (main, *form.choices)}
            if marks.isdisjoint(seen):
                entries.append(entry)
            seen |= marks
        if len(entries) < form.number:
            raise _unusable(f"has {len(entries)} different entries of {form.number}", text)
        return {ENTRIES: entries[: form.number]}

    def _entry(self, form: Form, found: Any, where: str, text: str) -> dict[str, str]:
        """One entry, checked.

        Raises:
            BadOutputError: ``parse_error``; it cannot be used.
        """
        entry: dict[str, str] = {}
        for name in form.fields:
            value = found.get(name) if isinstance(found, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise _unusable(f"{where} no text for {name!r}", text)
            if name in form.choices and value not in form.choices[name]:
                raise _unusable(f"{where} {value!r} for {name!r}, which was not to choose from", text)
            entry[name] = value.strip()
        main = next(iter(entry.values()))
        if _META.match(main):
            raise _unusable(f"{where} words about the answer", text)
        if _REFUSAL.match(main):
            raise _unusable(f"{where} an apology", text)
        if not words(main):
            raise _unusable(f"{where} no words", text)
        if lost := missing_quotes(main, form.keep):
            raise _unusable(f"{where} lost {lost[0]!r}, which was to stay letter for letter", text)
        if form.max_words is not None and (length := len(words(main))) > form.max_words:
            raise _unusable(f"{where} {length} words, more than {form.max_words}", text)
        if form.max_tokens is not None and (length := self._tokens(main)) > form.max_tokens:
            raise _unusable(f"{where} {length} tokens, more than {form.max_tokens}", text)
        return entry

    def _put(self, request: GenerationRequest) -> GenerationRequest:
        asked = super()._put(request)
        if self._own_format:
            return asked
        return replace(asked, params={**asked.params, "response_format": Form.of(request.params).response_format})

    def _tokens(self, text: str) -> int:
        """Tokens of a text, without those that frame it."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)


def _token_counter(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "local", "counting tokens") from error
    try:
        counter = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for a file that it cannot read
        raise ConfigError(f"{path}: no tokenizer can be read: {error}") from error
    counter.no_truncation()
    counter.no_padding()
    return counter


def _unusable(what: str, text: str) -> BadOutputError:
    """The error for an answer that cannot be used; ``what`` goes on "the writer's answer …"."""
    shown = text if len(text) <= 200 else f"{text[:199]}…"
    return BadOutputError(f"the writer's answer {what}: {shown!r}", reason="parse_error")
