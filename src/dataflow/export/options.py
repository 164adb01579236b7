"""What an export is told: format, layout, columns, splits, pictures, shards."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dataflow.errors import ConfigError

Format = Literal["webdataset", "parquet", "folder", "jsonl", "lance"]
Layout = Literal["text_image", "edit", "multi_turn", "preference"]
Encoding = Literal["jpeg", "webp", "png"]
Fit = Literal["crop", "pad"]

FORMATS: tuple[str, ...] = get_args(Format)
LAYOUTS: tuple[str, ...] = get_args(Layout)
ENCODINGS: tuple[str, ...] = get_args(Encoding)

_NOT_OF_THE_RESULT = frozenset({"workers", "overwrite"})
_SPLIT_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How a finished table becomes a dataset. Fields that are None are told by the preset or by the table's columns.

    Attributes:
        format: ``webdataset``, ``parquet``, ``folder``, ``jsonl`` or ``lance``.
        preset: a published dataset whose columns and files are followed; :mod:`dataflow.export.presets` lists them.
        layout: what one sample is: ``text_image``, ``edit``, ``multi_turn`` or ``preference``.
        image_key: column with the pictures that were made.
        source_key: column with the pictures that were edited.
        prompt_key: column with the prompt or the instructions.
        rejected_key: ``preference``: column with the losers, as ``ScoreFilter(output_rejected_key=…)`` writes it.
        score_key: ``preference``: the score by which the best picture of a row beats the worst (``judge.value``).
        preference_key: ``preference``: column with the verdict of a ``PairEvaluator`` on the first two pictures.
        lower_better: less of ``score_key`` is better.
        min_margin: least difference of ``score_key`` between the two pictures of a pair.
        columns: only these columns beside the pictures and the id; empty for all.
        exclude: all columns but these.
        rename: new names of columns by their old ones.
        fill: columns made from others, as ``{"sc_score_1": "judge.compliance"}``.
        scores_of: the picture column that a score column belongs to, where both a source and a result could be meant.
        published_only: with a preset, only the columns that the published dataset has.
        validation: share of the prompts in the split ``validation``, 0 to 1.
        test: share of the prompts in the split ``test``.
        split_by: ``prompt``, ``source`` (the content of the picture that was edited) or a column: what shares a value
            shares a split.
        split_seed: another seed draws other splits.
        shard_samples: most samples of a shard.
        shard_bytes: most bytes of a shard (one sample may have more); None for the format's own default.
        row_group_bytes: ``parquet``, ``lance``: bytes collected before they are written.
        encode: write pictures as ``jpeg``, ``webp`` or ``png``; None copies the files untouched.
        quality: of JPEG and WebP, 1 to 100; WebP is lossless at 100.
        max_side: pictures with a longer side are made smaller.
        bucket_resolution: side of the square whose area the buckets of aspect ratios have (1024 for SDXL).
        bucket_step: sides are multiples of it.
        bucket_max_aspect: widest bucket, as width by height or the other way round.
        bucket_fit: ``crop`` cuts the middle out, ``pad`` adds white bars.
        check: ``checksum`` trusts a PNG's own checksums and decodes all other files; ``decode`` decodes all.
        captions: ``folder``: a text file with the caption beside each picture.
        copy_images: ``jsonl``: write the pictures, too, instead of naming those that are there.
        base_url: ``jsonl``: pictures are named by this address and their path below ``image_root``.
        image_root: folder that ``base_url`` stands for; None for the table's folder.
        name: title of the dataset card.
        license: licence of the dataset, as the hub names it (``cc-by-4.0``) or in words.
        workers: threads that read and encode; None for one per core, eight at most.
        overwrite: begin anew where the folder holds an export of something else.

    Raises:
        ConfigError: a value is out of its range, or two of them do not go together.
    """

    format: Format | None = None
    preset: str | None = None
    layout: Layout | None = None
    image_key: str | None = None
    source_key: str | None = None
    prompt_key: str | None = None
    rejected_key: str | None = None
    score_key: str | None = None
    preference_key: str | None = None
    lower_better: bool = False
    min_margin: float = 0.0
    columns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    fill: Mapping[str, str] = field(default_factory=dict)
    scores_of: Mapping[str, str] = field(default_factory=dict)
    published_only: bool = False
    validation: float = 0.0
    test: float = 0.0
    split_by: str = "prompt"
    split_seed: int = 0
    shard_samples: int | None = None
    shard_bytes: int | None = None
    row_group_bytes: int = 32 << 20
    encode: Encoding | None = None
    quality: int = 95
    max_side: int | None = None
    bucket_resolution: int | None = None
    bucket_step: int = 64
    bucket_max_aspect: float = 2.0
    bucket_fit: Fit = "crop"
    check: Literal["checksum", "decode"] = "checksum"
    captions: bool = False
    copy_images: bool = False
    base_url: str | None = None
    image_root: str | None = None
    name: str | None = None
    license: str | None = None
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", (None, *FORMATS)),
            ("layout", (None, *LAYOUTS)),
            ("encode", (None, *ENCODINGS)),
            ("bucket_fit", get_args(Fit)),
            ("check", ("checksum", "decode")),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(each) for each in allowed if each is not None)
                raise ConfigError(f"export: {name} is {getattr(self, name)!r}; choose one of {known}")
        for name, low, high in (
            ("quality", 1, 100),
            ("shard_samples", 1, 10**9),
            ("shard_bytes", 1, 2**50),
            ("row_group_bytes", 1, 2**31),
            ("max_side", 1, 65_535),
            ("bucket_resolution", 16, 16_384),
            ("bucket_step", 1, 1024),
            ("workers", 1, 256),
            ("split_seed", -_SPLIT_SEEDS, _SPLIT_SEEDS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"export: {name} is {value!r}; expected a whole number from {low} to {high}")
        self._check_shares()
        if self.bucket_resolution is not None and self.bucket_resolution < self.bucket_step:
            raise ConfigError("export: bucket_resolution must not be smaller than bucket_step")
        if not (math.isfinite(self.bucket_max_aspect) and self.bucket_max_aspect >= 1):
            raise ConfigError(f"export: bucket_max_aspect is {self.bucket_max_aspect!r}; expected a number from 1")
        if self.bucket_resolution is not None and self.max_side is not None:
            raise ConfigError("export: give bucket_resolution or max_side, not both: a bucket has its size")
        self._check_names()

    def _check_shares(self) -> None:
        for name in ("validation", "test"):
            share = getattr(self, name)
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise ConfigError(f"export: {name} is {share!r}; expected a share from 0 to 1")
        if self.validation + self.test > 1:
            raise ConfigError("export: validation and test are more than 1 together")
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ConfigError(f"export: min_margin is {self.min_margin!r}; expected a number from 0")

    def _check_names(self) -> None:
        if self.columns and self.exclude:
            raise ConfigError("export: give columns or exclude, not both")
        names = list(self.rename.values())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"export: rename gives the name {twice[0]!r} to two columns")
        if "" in names:
            raise ConfigError("export: rename gives an empty name")
        if self.base_url is not None and not re.match(r"[a-z][a-z0-9+.-]*://", self.base_url):
            raise ConfigError(f"export: base_url is {self.base_url!r}; expected an address such as https://host/folder")
        if self.base_url is not None and self.copy_images:
            raise ConfigError("export: base_url names pictures that are elsewhere; copy_images writes them here")

    @property
    def touches_pixels(self) -> bool:
        """Whether pictures may be written otherwise than they are."""
        return not (self.encode is None and self.max_side is None and self.bucket_resolution is None)

    def facts(self) -> dict[str, Any]:
        """Everything that decides what is written, as JSON."""
        return {
            each.name: _plain(getattr(self, each.name))
            for each in dataclasses.fields(self)
            if each.name not in _NOT_OF_THE_RESULT
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    return list(value) if isinstance(value, tuple) else value
