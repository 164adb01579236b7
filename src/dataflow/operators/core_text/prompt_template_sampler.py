"""Prompts from templates with weighted attributes."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dataflow.errors import ConfigError, InputError
from dataflow.operators.core_text.templates import Attributes, Choices, Template, TemplateError, Values
from dataflow.operators.rows import sample_count
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

MOST_COMBINATIONS = 10_000_000
"""``exhaustive`` makes no more rows than this of one."""


class PromptTemplateSampler:
    """Makes prompts of a template: each row becomes as many rows as it asks for samples.

    A template has attributes in braces: ``"a {colour} {animal} in the style of {style}"``. A value may be a template
    itself. The same name in a template has the same value everywhere; ``{colour#2}`` draws another time from
    ``colour``. ``{{`` and ``}}`` are braces of the text.

    What is drawn follows from the seed and the content of the row, never from its place: rows may be added, removed and
    reordered. The samples of a row differ as long as there are combinations that do; then they begin anew. More samples
    keep those that there were.

    A row whose template cannot be used is dropped as ``bad_template`` or ``bad_input``; the sidecar says why.

    Args:
        template: for all rows, unless they have their own.
        attributes: name → a list of values, or value → weight (above 0, of any sum).
        attribute_file: a TOML file with attributes, to which ``attributes`` are added; it may hold more than are used.
        samples: prompts for each row.
        exhaustive: every combination once, in the order of the values, in place of samples.
        seed: another seed draws other prompts.
        options: how the step is run.

    Raises:
        ConfigError: attributes, weights or the template cannot be used, or an attribute is not used in it.
    """

    def __init__(
        self,
        template: str | None = None,
        *,
        attributes: Mapping[str, Values] | None = None,
        attribute_file: str | os.PathLike[str] | None = None,
        samples: int = 1,
        exhaustive: bool = False,
        seed: int = 0,
        options: RunOptions | None = None,
    ) -> None:
        if samples < 1:
            raise ConfigError(f"samples must be a whole number from 1, got {samples!r}")
        read = {} if attribute_file is None else Attributes.read(os.fspath(attribute_file)).table
        given = Attributes.of(_with_names(attributes or {}, read)).table
        self.attributes = Attributes({**read, **{name: given[name] for name in attributes or {}}})
        self.attributes.check()
        self.template = template
        self.samples = samples
        self.exhaustive = exhaustive
        self.seed = seed
        self.options = options
        self._own = frozenset(attributes or {})

    def plan(
        self,
        *,
        input_template_key: str | None = None,
        input_value_keys: Sequence[str] = (),
        input_samples_key: str | None = None,
        output_prompt_key: str = "prompt",
        output_attributes_key: str = "attributes",
    ) -> Plan:
        """The step as a description.

        Args:
            input_template_key: column with the row's template, in place of the constructor's.
            input_value_keys: columns whose text may stand in the template under their name, as it is.
            input_samples_key: column with how many samples a row gets.
            output_prompt_key: column that gets the prompt.
            output_attributes_key: column that gets what was drawn: ``{"colour": "red", …}``.

        Raises:
            ConfigError: there is no template or there are two; one cannot be used; or an attribute is never used.
        """
        if (self.template is None) == (input_template_key is None):
            raise ConfigError("give a template, or input_template_key, the column with the templates")
        values = tuple(input_value_keys)
        if taken := sorted(set(values) & set(self.attributes.table)):
            raise ConfigError(f"{taken[0]!r} is an attribute and a column of input_value_keys: it can be only one")
        if self.template is not None:
            self._check_template(self.template, values)
        inputs = tuple(key for key in (input_template_key, *values, input_samples_key) if key is not None)

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            used: set[str] = set()
            for row in rows:
                if not isinstance(row, BadRow):
                    try:
                        used |= self._template(row, input_template_key, values).used()
                    except (InputError, TemplateError):
                        continue  # said when the row is folded
            if unused := sorted(self._own - used):
                logger.warning("no template uses %s", ", ".join(map(repr, unused)))

        def fold(row: Row, _: Sequence[Outcome]) -> Drop | Iterator[Row]:
            try:
                template = self._template(row, input_template_key, values)
                number = sample_count(row, input_samples_key, self.samples)
            except TemplateError as error:
                return Drop("bad_template", {"error": str(error)})
            except InputError as error:
                return Drop("bad_input", {"error": str(error)})
            if not number:
                return Drop("no_samples")
            if self.exhaustive and (most := template.most()) > MOST_COMBINATIONS:
                return Drop("too_many_combinations", {"error": f"{most:,.0f} are more than {MOST_COMBINATIONS:,}"})
            return (
                {**row, output_prompt_key: text, output_attributes_key: dict(choices)}
                for text, choices in self._drawn(template, row, number)
            )

        return Plan(
            name=type(self).__name__,
            inputs=inputs,
            outputs=(output_prompt_key, output_attributes_key),
            requests=lambda _: (),
            fold=fold,
            prepare=None if input_template_key is None else prepare,
            multiplies=True,
        )

    def run(
        self,
        storage: FileStorage,
        input_template_key: str | None = None,
        output_prompt_key: str = "prompt",
        output_attributes_key: str = "attributes",
        input_value_keys: Sequence[str] = (),
        input_samples_key: str | None = None,
    ) -> Summary:
        """Make the prompts of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(
            input_template_key=input_template_key,
            input_value_keys=input_value_keys,
            input_samples_key=input_samples_key,
            output_prompt_key=output_prompt_key,
            output_attributes_key=output_attributes_key,
        )
        return execute(plan, storage, self.options)

    def _check_template(self, text: str, values: Sequence[str]) -> None:
        try:
            used = Template(text, self.attributes, dict.fromkeys(values, "")).used()
        except TemplateError as error:
            raise ConfigError(f"template: {error}") from None
        if unused := sorted(self._own - used):
            raise ConfigError(f"template: it does not use the attribute {unused[0]!r}: {text!r}")

    def _template(self, row: Row, key: str | None, values: Sequence[str]) -> Template:
        text = self.template if key is None else _text(row, key)
        return Template(str(text), self.attributes, {name: _text(row, name) for name in values})

    def _drawn(self, template: Template, row: Row, number: int) -> Iterator[tuple[str, Choices]]:
        if self.exhaustive:
            return template.all()
        content = json.dumps([self.seed, template.text, row], sort_keys=True, default=str)
        return itertools.islice(template.draws(hashlib.sha256(content.encode()).digest()), number)


def _with_names(attributes: Mapping[str, Values], read: Mapping[str, object]) -> dict[str, Values]:
    """The attributes with those of a file beside them, so that they may name each other."""
    return {**{name: [""] for name in read if name not in attributes}, **attributes}


def _text(row: Row, key: str) -> str:
    """A cell's text.

    Raises:
        InputError: there is none.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"expected text, found {value!r}", field=key)
    return str(value)
