"""From a sample and its pictures to the columns of the dataset."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from dataflow.errors import ConfigError
from dataflow.export.kinds import NULL, Kind
from dataflow.export.options import ExportOptions
from dataflow.export.presets import Preset
from dataflow.export.samples import Picture, Ready, Sample, rendered
from dataflow.utils.exact_json import dumps

_STUB = Picture(
    data=b"",
    suffix="png",
    sha256="",
    width=1,
    height=1,
    facts={"request_id": "", "seed": 0, "model": "", "revision": "", "params": {}},
    bucket="",
    path="",
)
_KINDS = {"text": Kind("text"), "int": Kind("int"), "float": Kind("float")}


class Assembler:
    """Makes records: columns in their order, chosen and named as the options say.

    Args:
        options: what is kept, filled and renamed.
        preset: the published columns.
    """

    def __init__(self, options: ExportOptions, preset: Preset) -> None:
        self._options = options
        self._preset = preset
        self._with_buckets = options.bucket_resolution is not None

    def ready(self, sample: Sample, pictures: Sequence[Picture]) -> Ready:
        """The sample with its record.

        Args:
            sample: any.
            pictures: one for each of its slots.
        """
        record = self._record(sample, pictures)
        named: list[tuple[str, int | None, Picture]] = []
        for column, value in record.items():
            if isinstance(value, Picture):
                named.append((column, None, value))
            elif isinstance(value, dict | list) and _holds_picture(value):
                rendered(value, functools.partial(_number, column, named))
        told = zip(sample.slots, pictures, strict=True)
        other = any(slot.prefix is not None and slot.full and _is_of_another(sample, each) for slot, each in told)
        return Ready(sample, record, tuple(named), other)

    def outline(self, sample: Sample) -> dict[str, Any]:
        """The record of a sample whose pictures have not been read; only the types of its values are right."""
        return self._record(sample, [_STUB] * len(sample.slots))

    def kind(self, column: str) -> Kind:
        """The type of a published column that nothing filled."""
        old = {new: name for name, new in self._options.rename.items()}.get(column, column)
        declared = next((each.kind for each in self._preset.columns if each.name == old), None)
        return NULL if declared is None else _KINDS[declared]

    def check(self, columns: Sequence[str]) -> None:
        """Whether the options name columns that there are.

        Args:
            columns: of the records, as they are written.

        Raises:
            ConfigError: one of them is none.
        """
        known = [*columns, *self._options.exclude]
        old = {new: name for name, new in self._options.rename.items()}
        before = [old.get(name, name) for name in known]
        for option, names in (("columns", self._options.columns), ("rename", tuple(self._options.rename))):
            for name in names:
                if name not in before:
                    there = ", ".join(before)
                    raise ConfigError(
                        f"export: {option} names {name!r}, and there is no such column; there are {there}"
                    )

    def _record(self, sample: Sample, pictures: Sequence[Picture]) -> dict[str, Any]:
        record = dict(sample.values)
        lists: dict[str, dict[int, Picture]] = {}
        facts: dict[str, Any] = {}
        for slot, picture in zip(sample.slots, pictures, strict=True):
            if slot.number is None:
                record[slot.column] = picture
            else:
                lists.setdefault(slot.column, {})[slot.number] = picture
            if slot.prefix is not None:
                facts |= self._facts(picture, slot.prefix, full=slot.full)
        for column, found in lists.items():
            record[column] = [found[number] for number in sorted(found)]
            facts[f"{column}_sha256"] = [picture.sha256 for picture in record[column]]
        record |= facts
        for name, key in self._options.fill.items():
            record[name] = _at(record, key)
        return self._named(self._preset.arranged(record, published_only=self._options.published_only))

    def _facts(self, picture: Picture, prefix: str, *, full: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"sha256": picture.sha256, "width": picture.width, "height": picture.height}
        if self._with_buckets and full:
            found["bucket"] = picture.bucket
        if full:
            params = picture.facts.get("params")
            found |= {
                "request_id": _text(picture.facts.get("request_id")),
                "seed": _whole(picture.facts.get("seed")),
                "model": _text(picture.facts.get("model")),
                "revision": _text(picture.facts.get("revision")),
                "parameters": dumps(params).decode() if isinstance(params, dict) else None,
            }
        return {prefix + name: value for name, value in found.items()}

    def _named(self, record: Mapping[str, Any]) -> dict[str, Any]:
        if not (self._options.exclude or self._options.columns or self._options.rename):
            return dict(record)
        found: dict[str, Any] = {}
        for name, value in record.items():
            picture = _holds_picture(value) or name == "id"
            if name in self._options.exclude and not picture:
                continue
            if self._options.columns and name not in self._options.columns and not picture:
                continue
            new = self._options.rename.get(name, name)
            if new in found or (new != name and new in record and new not in self._options.rename):
                raise ConfigError(f"export: rename gives {name!r} the name {new!r}, which another column has")
            found[new] = value
        return found


def _number(column: str, found: list[tuple[str, int | None, Picture]], picture: Picture) -> None:
    found.append((column, sum(name == column for name, _, _ in found), picture))


def _holds_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_picture, value.values()))
    return isinstance(value, Picture) or (isinstance(value, list) and any(map(_holds_picture, value)))


def _at(record: Mapping[str, Any], key: str) -> Any:
    """A column, or a field of an object in one."""
    if key in record:
        return record[key]
    column, *fields = key.split(".")
    value: Any = record.get(column)
    for each in fields:
        value = value.get(each) if isinstance(value, Mapping) else None
    return value


def _is_of_another(sample: Sample, picture: Picture) -> bool:
    prompt = picture.facts.get("prompt")
    if not isinstance(prompt, str) or not prompt or "metadata_truncated" in picture.facts:
        return False
    return sample.prompt != prompt and not sample.prompt.endswith(f"\n{prompt}")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None
