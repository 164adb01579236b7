"""Duplicates: pictures that are the same file, or look the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import ConfigError
from dataflow.metrics.hashing import duplicate_groups
from dataflow.operators.core_vision.score_filter import OnUnknown, selected
from dataflow.operators.evaluation import pictures
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage


class DuplicateFilter:
    """Keeps one picture of each group of pictures that are alike, by the hashes that a probe wrote into the table.

    All pictures of the table are compared, through an index and never each with each, so that a million of them take
    seconds. Which one of a group stays does not depend on chance: the one with the highest priority, or the first.

    Args:
        on_unknown: what becomes of a picture without a hash: ``quarantine`` and ``drop`` take its row out, under
            different reasons; ``keep`` keeps it.
        options: how the step is run.

    Raises:
        ConfigError: there is no such policy.
    """

    def __init__(self, *, on_unknown: OnUnknown = "quarantine", options: RunOptions | None = None) -> None:
        if on_unknown not in ("quarantine", "keep", "drop"):
            raise ConfigError(f"on_unknown must be quarantine, keep or drop, got {on_unknown!r}")
        self.on_unknown: OnUnknown = on_unknown
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_probe_key: str = "probe",
        hash_name: str = "phash",
        distance: int = 6,
        priority_name: str | None = None,
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the pictures.
            input_probe_key: column that an :class:`~dataflow.operators.ImageEvaluator` with an image probe wrote.
            hash_name: ``phash`` or ``dhash``; ``sha256`` finds equal files only, whatever the distance.
            distance: most bits, of 64, in which two pictures that look the same differ: 0 to 10.
            priority_name: figure of the probe (``sharpness``) whose highest value stays.

        Raises:
            ConfigError: no such hash or distance.
        """
        if hash_name not in ("phash", "dhash", "sha256"):
            raise ConfigError(f"hash_name must be phash, dhash or sha256, got {hash_name!r}")
        if not 0 <= distance <= 10:
            raise ConfigError(f"distance must be from 0 to 10, got {distance!r}")
        kept: Iterator[bool] = iter(())

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            nonlocal kept
            words: list[int] = []
            priorities: list[float] = []
            for row in rows:
                for probe in [] if isinstance(row, BadRow) else _probes(row, input_image_key, input_probe_key):
                    if (word := _word(probe, hash_name)) is not None:
                        words.append(word)
                        priorities.append(float((probe or {}).get(priority_name or "", 0.0) or 0.0))
            hashes: npt.NDArray[np.uint64] = np.array(words, dtype=np.uint64)
            within = 0 if hash_name == "sha256" else distance
            kept = iter(duplicate_groups(hashes, within, np.array(priorities)).kept.tolist() if words else ())

        def fold(row: Row, _: Sequence[Outcome]) -> Row | Drop:
            probes = _probes(row, input_image_key, input_probe_key)
            good: list[int] = []
            unknown = False
            for number, probe in enumerate(probes):
                if _word(probe, hash_name) is None:
                    unknown = True
                    if self.on_unknown == "keep":
                        good.append(number)
                elif next(kept):
                    good.append(number)
            if unknown and self.on_unknown == "quarantine":
                return Drop(f"quarantined:{hash_name}")
            if not good:
                return Drop(f"unknown:{hash_name}" if unknown else "duplicate") if probes else Drop("no_image")
            return selected(row, input_image_key, good)

        return Plan(
            name=type(self).__name__,
            inputs=(input_image_key, input_probe_key),
            outputs=(),
            requests=lambda _: (),
            fold=fold,
            prepare=prepare,
        )

    def run(self, storage: FileStorage, **keys: Any) -> Summary:
        """Filter the rows of the storage's step; see :meth:`plan` for the arguments.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        return execute(self.plan(**keys), storage, self.options)


def _probes(row: Row, image_key: str, probe_key: str) -> list[Mapping[str, Any] | None]:
    """What the probe says of each picture, None where it says nothing."""
    number = len(pictures(row, image_key))
    found = row.get(probe_key)
    entries = found if isinstance(found, list) else [found]
    probes = [entry if isinstance(entry, Mapping) else None for entry in entries[:number]]
    return probes + [None] * (number - len(probes))


def _word(probe: Mapping[str, Any] | None, name: str) -> int | None:
    value = (probe or {}).get(name)
    try:
        # Of a sha256 the first 64 bits will do: among ten million files two share them once in 400,000 data sets.
        return int(str(value)[:16], 16) if value else None
    except ValueError:
        return None
