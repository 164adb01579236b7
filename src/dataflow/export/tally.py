"""What has been written, counted shard by shard, so that a resumed export comes to the same sums."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflow.export.samples import Ready
from dataflow.scores import as_number

_COUNTS = frozenset({"tokens", "passes", "answered"})
_MOST_SCORES = 64


@dataclass(slots=True)
class Tally:
    """Counts over some samples.

    Attributes:
        samples: how many.
        images: their pictures.
        bytes: of the pictures.
        other_prompts: samples whose picture says that it was made from another prompt.
        models: pictures by the model and revision that made them; ``""`` where their files do not say.
        licences: samples by what their column ``license`` or ``licence`` says.
        buckets: samples by bucket.
        scores: number, sum, least and greatest value of each score.
    """

    samples: int = 0
    images: int = 0
    bytes: int = 0
    other_prompts: int = 0
    models: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ready: Ready) -> None:
        """Count one sample."""
        self.samples += 1
        self.other_prompts += ready.other_prompt
        for _, _, picture in ready.pictures:
            self.images += 1
            self.bytes += len(picture.data)
            self.models[_model(picture.facts)] += 1
        values = ready.sample.values
        licence = values.get("license", values.get("licence"))
        if isinstance(licence, str):
            self.licences[licence] += 1
        bucket = ready.pictures[0][2].bucket if ready.pictures else None
        if bucket is not None:
            self.buckets[bucket] += 1
        for name, value in _scores(values):
            if name in self.scores:
                count, total, least, most = self.scores[name]
                self.scores[name] = [count + 1, total + value, min(least, value), max(most, value)]
            elif len(self.scores) < _MOST_SCORES:
                self.scores[name] = [1, value, value, value]

    def merge(self, other: Tally) -> None:
        """Add another's counts."""
        self.samples += other.samples
        self.images += other.images
        self.bytes += other.bytes
        self.other_prompts += other.other_prompts
        for mine, theirs in (
            (self.models, other.models),
            (self.licences, other.licences),
            (self.buckets, other.buckets),
        ):
            mine.update(theirs)
        for name, (count, total, least, most) in other.scores.items():
            old = self.scores.get(name, [0, 0.0, math.inf, -math.inf])
            self.scores[name] = [old[0] + count, old[1] + total, min(old[2], least), max(old[3], most)]

    def as_json(self) -> dict[str, Any]:
        """All fields; those that count nothing are left out."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: dict(sorted(value.items())) if isinstance(value, Mapping) else value
            for name, value in found.items()
            if value or isinstance(value, int)
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        """The inverse of :meth:`as_json`."""
        found = cls()
        for name in ("samples", "images", "bytes", "other_prompts"):
            setattr(found, name, value[name])
        for name in ("models", "licences", "buckets"):
            getattr(found, name).update(value.get(name, {}))
        found.scores.update({name: list(each) for name, each in value.get("scores", {}).items()})
        return found


def _model(facts: Mapping[str, Any]) -> str:
    model, revision = facts.get("model"), facts.get("revision")
    if not isinstance(model, str) or not model:
        return ""
    return f"{model}@{revision}" if isinstance(revision, str) and revision else model


def _scores(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in values:
        column = name.removesuffix("_status")
        if column == name or column not in values:
            continue
        value = values[column]
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, each in parts:
            number = as_number(each)
            if number is not None and not isinstance(each, bool) and part not in _COUNTS:
                yield f"{column}.{part}" if part else column, number
