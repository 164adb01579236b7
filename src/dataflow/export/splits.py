"""Which split a sample belongs to: decided by a hash of its prompt, so that no other sample has a say in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from dataflow.export.options import ExportOptions
from dataflow.export.samples import Sample
from dataflow.metrics.prompts import normalised

SPLITS = ("train", "validation", "test")


class Splitter:
    """Assigns samples to splits.

    What has the same group has the same split, whatever else the table holds, in whatever order: rows that are added
    move nothing.

    Args:
        options: shares, seed and what a group is.
        digest: SHA-256 of the file at a path, for groups by source picture.
    """

    def __init__(self, options: ExportOptions, digest: Callable[[str], str]) -> None:
        self._options = options
        self._digest = digest

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that may get samples."""
        shares = (1 - self._options.validation - self._options.test, self._options.validation, self._options.test)
        return tuple(name for name, share in zip(SPLITS, shares, strict=True) if share > 1e-12) or SPLITS[:1]

    def split(self, sample: Sample, group: str | None = None) -> str:
        """The split of a sample.

        Args:
            sample: any.
            group: what it shares with others, where a column says so.
        """
        if not (self._options.validation or self._options.test):
            return SPLITS[0]
        place = share_of(self._options.split_seed, self._group(sample) if group is None else group)
        if place < self._options.test:
            return "test"
        return "validation" if place < self._options.test + self._options.validation else "train"

    def _group(self, sample: Sample) -> str:
        if self._options.split_by == "source" and sample.source is not None:
            return self._digest(sample.source)
        return normalised(sample.prompt)


def share_of(seed: int, group: str) -> float:
    """A number from 0 to below 1 that belongs to a group."""
    text = f"{seed}\0{group}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / 2**48
