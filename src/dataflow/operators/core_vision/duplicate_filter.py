"""Duplicates: pictures that are the same file, or look the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.errors import ConfigError, InputError
from dataflow.metrics import grouping
from dataflow.metrics.grouping import DuplicateGroups
from dataflow.metrics.hashing import duplicate_groups
from dataflow.metrics.neighbours import similar_groups
from dataflow.operators.core_vision.score_filter import OnUnknown, selected
from dataflow.operators.evaluation import pictures_left
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import BadRow, Drop, Outcome, Plan, Row, Summary
from dataflow.utils.storage import FileStorage
from dataflow.utils.vectors import VectorStore


class DuplicateFilter:
    """Keeps one picture of each group of pictures that are alike: by the hashes that a probe wrote into the table, or
    by the vectors that an embedding serving made.

    All pictures of the table are compared, through an index and never each with each, so that a million of them take
    seconds. Which one of a group stays does not depend on chance: the one with the highest priority, or the first.

    Args:
        on_unknown: what becomes of a picture without a hash or vector: ``quarantine`` and ``drop`` take its row out,
            under different reasons; ``keep`` keeps it.
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
        similarity: float = 0.95,
        vectors: str | os.PathLike[str] | None = None,
        priority_name: str | None = None,
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the pictures.
            input_probe_key: column that an :class:`~dataflow.operators.ImageEvaluator` wrote, with an image probe, or
                with an embedding serving for ``hash_name="vector"``.
            hash_name: ``phash`` or ``dhash``; ``sha256`` finds equal files only, whatever the distance; ``vector``
                compares vectors.
            distance: most bits, of 64, in which two pictures that look the same differ: 0 to 10.
            similarity: least cosine of two vectors of pictures that are alike, above 0 to 1.
            vectors: folder of the vector stores, as the embedding serving had it.
            priority_name: figure of the probe (``sharpness``) whose highest value stays.

        Raises:
            ConfigError: no such hash, distance or similarity, or no folder for ``vector``; ``MissingExtraError`` where
                the library that joins the duplicates is not installed.
        """
        grouping.require()
        if hash_name not in ("phash", "dhash", "sha256", "vector"):
            raise ConfigError(f"hash_name must be phash, dhash, sha256 or vector, got {hash_name!r}")
        if not 0 <= distance <= 10:
            raise ConfigError(f"distance must be from 0 to 10, got {distance!r}")
        if not 0 < similarity <= 1:
            raise ConfigError(f"similarity must be above 0 and at most 1, got {similarity!r}")
        if (hash_name == "vector") != (vectors is not None):
            raise ConfigError(
                'hash_name="vector" and vectors, the folder that the embedding serving was given, go together'
            )
        kept: Iterator[bool] = iter(())
        alike: _Hashes | _Vectors

        def prepare(rows: Iterable[Row | BadRow]) -> None:
            nonlocal kept, alike
            alike = _Hashes(hash_name, distance) if vectors is None else _Vectors(Path(vectors), similarity)
            priorities: list[float] = []
            for row in rows:
                for probe in [] if isinstance(row, BadRow) else _probes(row, input_image_key, input_probe_key):
                    if probe is not None and alike.knows(probe):
                        alike.take(probe)
                        priorities.append(float(probe.get(priority_name or "", 0.0) or 0.0))
            kept = iter(alike.groups(np.array(priorities)).kept.tolist())

        def fold(row: Row, _: Sequence[Outcome]) -> Row | Drop:
            probes = _probes(row, input_image_key, input_probe_key)
            good: list[int] = []
            unknown = False
            for number, probe in enumerate(probes):
                if probe is None or not alike.knows(probe):
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


class _Hashes:
    """Pictures compared by a hash of the probe's."""

    def __init__(self, name: str, distance: int) -> None:
        self._name, self._distance = name, 0 if name == "sha256" else distance
        self._words: list[int] = []

    def knows(self, probe: Mapping[str, Any]) -> bool:
        return self._word(probe) is not None

    def take(self, probe: Mapping[str, Any]) -> None:
        self._words.append(self._word(probe) or 0)

    def groups(self, worth: npt.NDArray[np.float64]) -> DuplicateGroups:
        return duplicate_groups(np.array(self._words, dtype=np.uint64), self._distance, worth)

    def _word(self, probe: Mapping[str, Any]) -> int | None:
        value = probe.get(self._name)
        try:
            # Of a sha256 the first 64 bits will do: among ten million files two share them once in 400,000 data sets.
            return int(str(value)[:16], 16) if value else None
        except ValueError:
            return None


class _Vectors:
    """Pictures compared by the vectors of one model, read from their store by place."""

    def __init__(self, folder: Path, similarity: float) -> None:
        self._folder, self._similarity = folder, similarity
        self._store: VectorStore | None = None
        self._name = ""
        self._keys: list[bytes] = []

    def knows(self, probe: Mapping[str, Any]) -> bool:
        name, key = probe.get("store"), probe.get("sha256")
        if not isinstance(name, str) or not isinstance(key, str):
            return False
        if self._store is None:
            self._store, self._name = VectorStore(self._folder / name), name
        if name != self._name:
            raise InputError(f"vectors of two models cannot be compared: {self._name} and {name}", path=self._folder)
        return self._store.find([key])[0] is not None

    def take(self, probe: Mapping[str, Any]) -> None:
        self._keys.append(bytes.fromhex(probe["sha256"]))

    def groups(self, worth: npt.NDArray[np.float64]) -> DuplicateGroups:
        return similar_groups(self._read, len(self._keys), self._similarity, worth)

    def _read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        assert self._store is not None
        rows = self._store.find([key.hex() for key in self._keys[start:stop]])
        return np.stack([row for row in rows if row is not None])


def _probes(row: Row, image_key: str, probe_key: str) -> list[Mapping[str, Any] | None]:
    """What the probe says of each picture, None where it says nothing."""
    number = len(pictures_left(row, image_key))
    found = row.get(probe_key)
    entries = found if isinstance(found, list) else [found]
    probes = [entry if isinstance(entry, Mapping) else None for entry in entries[:number]]
    return probes + [None] * (number - len(probes))
