"""From a row to samples: text and image, an edit, several turns of edits, a pair of which one is better."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflow.errors import ConfigError, InputError
from dataflow.export.alignment import MISALIGNED, score_columns_of
from dataflow.export.options import ExportOptions, Layout
from dataflow.export.samples import LeftOutError, Sample, Slot
from dataflow.operators.evaluation import pictures
from dataflow.operators.rows import user_turns
from dataflow.scores import as_number
from dataflow.types import Row

PROMPT_COLUMNS = ("conversations", "prompt", "text", "caption", "instruction", "edit")
IMAGE_COLUMNS = ("images", "image")
EDITED_COLUMNS = ("edited_images", "edited_image")

PICTURE_FACTS = ("sha256", "width", "height", "bucket")
PROVENANCE = ("request_id", "seed", "model", "revision", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where things stand in the table.

    Attributes:
        layout: what a sample is.
        image: the pictures that were made.
        source: the pictures that were edited, or None.
        prompt: the texts.
        rejected: the losers of a pair, or None.
        others: picture columns that are not exported.
    """

    layout: Layout
    image: str
    source: str | None
    prompt: str
    rejected: str | None
    others: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(name for name in (self.image, self.source, self.rejected) if name is not None)


def find_columns(
    names: Collection[str], options: ExportOptions, layout: Layout | None, prompts: Mapping[str, str]
) -> Columns:
    """Which column is what: as the options say, else by the names that the operators write.

    Args:
        names: the table's columns.
        options: what was said.
        layout: of a preset, or None.
        prompts: column of prompts by picture column, as far as it is known.

    Raises:
        InputError: a column that is needed is not there.
        ConfigError: the layout needs to be told more.
    """
    for field in ("image_key", "source_key", "prompt_key", "rejected_key", "preference_key"):
        _need(names, getattr(options, field), field)
    edited = next((name for name in EDITED_COLUMNS if name in names), None)
    made = options.image_key or edited or next((name for name in IMAGE_COLUMNS if name in names), None)
    if made is None:
        raise InputError(
            f"no column of pictures was found among {', '.join(sorted(names))}: name it with --image-column"
        )
    source = options.source_key or next((name for name in IMAGE_COLUMNS if name in names and name != made), None)
    if options.source_key is None and made not in EDITED_COLUMNS:
        source = None
    pairs = options.rejected_key or options.score_key or options.preference_key
    guess = "edit" if source else "text_image"
    if f"{made}_turns" in names and source:
        guess = "multi_turn"
    chosen: Layout = options.layout or layout or ("preference" if pairs else guess)
    if chosen == "edit" and source is None:
        raise InputError("an edit needs the column of its source pictures: name it with --source-column")
    if chosen == "preference" and not pairs:
        raise ConfigError(
            "export: preference pairs need rejected_key (what a filter left over), score_key or preference_key"
        )
    if chosen == "text_image":
        source = None
    guesses = (prompts.get(made), *PROMPT_COLUMNS)
    prompt = options.prompt_key or next((name for name in guesses if name is not None and name in names), None)
    if prompt is None:
        raise InputError(f"no column of prompts was found among {', '.join(sorted(names))}: name it with --column")
    others = {*IMAGE_COLUMNS, *EDITED_COLUMNS, *prompts} & set(names)
    return Columns(
        layout=chosen,
        image=made,
        source=source,
        prompt=prompt,
        rejected=options.rejected_key,
        others=tuple(sorted(others - {made, source, options.rejected_key})),
    )


def _need(names: Collection[str], name: str | None, field: str) -> None:
    if name is not None and name not in names:
        raise InputError(f"the table has no such column ({field}); it has {', '.join(sorted(names))}", field=name)


class Sampler:
    """Makes samples of rows.

    Args:
        columns: where things stand.
        options: which pairs are made, whose scores are whose.
        scores_of: picture column by score column, as far as it is known.
    """

    def __init__(self, columns: Columns, options: ExportOptions, scores_of: Mapping[str, str]) -> None:
        self.columns = columns
        self._options = options
        self._scores_of = {**scores_of, **options.scores_of}
        self._make: Callable[[_Read], Iterator[Sample]] = {
            "text_image": _text_images,
            "edit": _edits,
            "multi_turn": _turns,
            "preference": self._pairs,
        }[columns.layout]

    def samples(self, row: Row, number: int) -> list[Sample]:
        """The samples of a row, one for each of its pictures or pairs.

        Args:
            row: of the table.
            number: of the row, from 1.

        Raises:
            LeftOutError: there is none, and why.
            InputError: the scores of the row may be anybody's.
        """
        read = _Read(row, number, self.columns, self._scores_of)
        return list(self._make(read))

    def _pairs(self, read: _Read) -> Iterator[Sample]:
        """Preference pairs: of winners and losers of a filter, of a judge's verdict, or of the best and the worst."""
        made = read.made
        if self._options.rejected_key is not None:
            losers = read.paths(self._options.rejected_key)
            if not losers:
                raise LeftOutError("no_loser", "the row lost no picture to a filter: there is nothing to prefer it to")
            best = self._ranked(read)[0] if self._options.score_key else 0
            pairs: list[tuple[int, int | None, str]] = [(best, None, path) for path in losers]
        elif self._options.preference_key is not None:
            first, second = self._verdict(read)
            pairs = [(first, second, made[second])]
        else:
            ranked = self._ranked(read)
            pairs = [(ranked[0], ranked[-1], made[ranked[-1]])]
        for number, (chosen, rejected, path) in enumerate(pairs):
            slots = [Slot(column="chosen", path=made[chosen], prefix="chosen_")]
            slots.append(Slot(column="rejected", path=path, prefix="rejected_"))
            scores = read.scores(read.columns.image, chosen, "chosen_")
            if rejected is not None:
                scores |= read.scores(read.columns.image, rejected, "rejected_")
            yield read.sample(number, read.prompt, "prompt", slots, scores, with_source=True)

    def _verdict(self, read: _Read) -> tuple[int, int]:
        key = self._options.preference_key or ""
        value = read.row.get(key)
        winner = value.get("winner") if isinstance(value, Mapping) else value
        if len(read.made) < 2:
            raise LeftOutError("no_pair", "the row has fewer than two pictures")
        if winner == "tie":
            raise LeftOutError("tie", f"column {key!r}: neither picture is better")
        if winner not in ("first", "second"):
            raise LeftOutError("no_verdict", f"column {key!r} has no verdict")
        return (0, 1) if winner == "first" else (1, 0)

    def _ranked(self, read: _Read) -> list[int]:
        """Places of the pictures that have a score, best first."""
        key = self._options.score_key or ""
        column, *fields = key.split(".")
        found: list[tuple[float, int]] = []
        for place in range(len(read.made)):
            value: Any = read.scores(read.columns.image, place).get(column)
            for field in fields:
                value = value.get(field) if isinstance(value, Mapping) else None
            score = as_number(value)
            if score is not None:
                found.append((score if self._options.lower_better else -score, place))
        if not found:
            raise LeftOutError("no_score", f"no picture has a score under {key!r}")
        found.sort()
        if self._options.rejected_key is None:
            if len(found) < 2:
                raise LeftOutError("no_pair", f"fewer than two pictures have a score under {key!r}")
            margin = found[-1][0] - found[0][0]
            if margin <= 0 or margin < self._options.min_margin:
                raise LeftOutError("tie", f"the scores under {key!r} differ by {margin:g}")
        return [place for _, place in found]


class _Read:
    """A row as layouts look at it."""

    def __init__(self, row: Row, number: int, columns: Columns, scores_of: Mapping[str, str]) -> None:
        self.row, self.number, self.columns = row, number, columns
        self.made = self.paths(columns.image)
        if not self.made:
            raise _without_picture(row, columns.image)
        try:
            self.turns = user_turns(row, columns.prompt)
        except InputError as error:
            raise LeftOutError("no_prompt", str(error)) from error
        self.sources = self.paths(columns.source) if columns.source else []
        counts = {columns.image: len(self.made)}
        if columns.source:
            counts[columns.source] = len(self.sources)
        self._scores = score_columns_of(row, counts, scores_of)

    @property
    def prompt(self) -> str:
        return "\n".join(self.turns)

    def paths(self, column: str) -> list[str]:
        try:
            return pictures(self.row, column)
        except InputError as error:
            raise LeftOutError("bad_column", str(error)) from error

    def scores(self, owner: str, number: int, prefix: str = "") -> dict[str, Any]:
        """The scores of one picture of a column."""
        found: dict[str, Any] = {}
        for score in self._scores:
            if score.owner == owner:
                found |= score.of(number, prefix)
        return found

    def rest(self) -> dict[str, Any]:
        """The columns that are about the row: neither pictures nor their scores, errors or turns, nor the prompt."""
        own = {part for score in self._scores if score.owner is not None for part in score.parts}
        shown = (*self.columns.pictures, *self.columns.others)
        own |= {f"{name}{end}" for name in shown for end in ("", "_error", "_turns")}
        own.add(self.columns.prompt)
        return {name: value for name, value in self.row.items() if name not in own}

    def sample(
        self,
        number: int,
        text: str | list[str],
        text_column: str,
        slots: Sequence[Slot],
        scores: Mapping[str, Any],
        *,
        with_source: bool = False,
    ) -> Sample:
        """Put a sample together.

        Args:
            number: among those of the row.
            text: what goes to ``text_column``.
            text_column: ``prompt``, ``instruction`` or ``instructions``.
            slots: the pictures that were made; they decide about the bucket.
            scores: of these pictures.
            with_source: also the picture that was edited, its references and its scores.
        """
        all_slots = list(slots)
        if with_source and self.sources:
            all_slots.append(Slot(column="source_image", path=self.sources[0], prefix="source_", full=False))
            all_slots += [
                Slot(column="reference_images", path=path, number=place, prefix=None)
                for place, path in enumerate(self.sources[1:])
            ]
        values: dict[str, Any] = {"id": ""}
        order = ("source_image", "reference_images") if with_source else ()
        for column in (*order, *(slot.column for slot in slots)):
            if any(slot.column == column for slot in all_slots):
                values[column] = None
        values[text_column] = text
        sample = Sample(
            row=self.number,
            number=number,
            prompt=self.prompt,
            slots=tuple(all_slots),
            values=values,
            source=self.sources[0] if self.sources else None,
        )
        values["id"] = sample.key
        own = dict(scores)
        if with_source and self.sources and self.columns.source:
            own |= self.scores(self.columns.source, 0, "source_")
        fixed = {*values, *fact_columns(all_slots)}
        clashing = own.keys() & fixed
        clashing |= {f"{name}_{part}" for name in clashing for part in ("status", "error", "by")}
        own = {_free(f"row_{name}" if name in clashing else name, fixed): value for name, value in own.items()}
        fixed |= own.keys()
        for name, value in self.rest().items():
            new = _free(name, fixed)
            values[new] = value
            fixed.add(new)
        values.update(own)
        return sample


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or with ``row_`` before it where something else has it."""
    while name in taken:
        name = f"row_{name}"
    return name


def fact_columns(slots: Sequence[Slot]) -> list[str]:
    """The columns that say what the pictures are."""
    return [
        f"{slot.prefix}{name}"
        for slot in slots
        if slot.prefix is not None
        for name in (*PICTURE_FACTS, *(PROVENANCE if slot.full else ()))
    ]


def _text_images(read: _Read) -> Iterator[Sample]:
    for place, path in enumerate(read.made):
        slots = [Slot(column="image", path=path)]
        yield read.sample(place, read.prompt, "prompt", slots, read.scores(read.columns.image, place))


def _edits(read: _Read) -> Iterator[Sample]:
    _need_source(read)
    for place, path in enumerate(read.made):
        slots = [Slot(column="edited_image", path=path)]
        scores = read.scores(read.columns.image, place)
        yield read.sample(place, read.prompt, "instruction", slots, scores, with_source=True)


def _turns(read: _Read) -> Iterator[Sample]:
    if read.columns.source:
        _need_source(read)
    key = f"{read.columns.image}_turns"
    chains = read.row.get(key) or [[path] for path in read.made]
    if not isinstance(chains, list) or not all(_is_chain(chain) for chain in chains):
        raise LeftOutError("bad_column", f"column {key!r}: expected a list of picture paths for each sample")
    whole = [chain for chain in chains if len(chain) == len(read.turns) and chain[-1] in read.made]
    if not whole:
        raise LeftOutError("unfinished_turns", f"no sample of the row has a picture of all {len(read.turns)} turns")
    for number, chain in enumerate(whole):
        last = len(chain) - 1
        slots = [
            Slot(column="turn_images", path=path, number=place, prefix="" if place == last else None)
            for place, path in enumerate(chain)
        ]
        slots.insert(0, slots.pop())  # the last picture decides about the bucket
        scores = read.scores(read.columns.image, read.made.index(chain[-1]))
        yield read.sample(number, list(read.turns), "instructions", slots, scores, with_source=True)


def _is_chain(chain: Any) -> bool:
    return isinstance(chain, list) and all(isinstance(path, str) and path for path in chain)


def _need_source(read: _Read) -> None:
    if not read.sources:
        raise LeftOutError("no_source", f"column {read.columns.source!r} names no picture that was edited")


def _without_picture(row: Row, column: str) -> LeftOutError:
    error = row.get(f"{column}_error")
    if not isinstance(error, Mapping):
        return LeftOutError("no_image", f"column {column!r} names no picture")
    status = "refused" if error.get("status") == "refused" else "failed"
    return LeftOutError(status, f"{error.get('reason') or status}: {error.get('message') or 'no message'}")


def is_incomplete(row: Row, columns: Columns) -> bool:
    """Whether a row has fewer pictures than it asked for."""
    return isinstance(row.get(f"{columns.image}_error"), Mapping)


def is_misaligned(sample: Sample) -> bool:
    """Whether a score of the sample could not be given to its picture."""
    return any(name.endswith("_status") and value == MISALIGNED for name, value in sample.values.items())
