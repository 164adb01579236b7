"""What a report is asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataflow.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How a report is written.

    Attributes:
        title: heading of the page; empty for the names of the folders.
        thumbnail_size: longer side of the small pictures in pixels, 32 to 512.
        thumbnail_quality: of their WebP files, 1 to 100.
        workers: processes that make them; 0 for one per core, eight at most.
        prompt_column: column with the prompt; empty for the one that the run's own steps name or imply.
        text_limit: characters of a row's own texts that the page shows of one cell, from 100.
        copy_originals: copy pictures that are in packs or object stores into the report's folder, so that the page
            opens them; else it shows their small ones. Pictures that are files of their own are linked, never copied.

    Raises:
        ConfigError: a value is out of its range.
    """

    title: str = ""
    thumbnail_size: int = 192
    thumbnail_quality: int = 78
    workers: int = 0
    prompt_column: str = ""
    text_limit: int = 4000
    copy_originals: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("thumbnail_size", 32, 512),
            ("thumbnail_quality", 1, 100),
            ("workers", 0, 256),
            ("text_limit", 100, 1_000_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most:,}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """What was written.

    Attributes:
        page: ``index.html``.
        runs: how many are in it.
        pictures: that have an entry.
        unreadable: those of them of which there is no file that can be read.
        problems: entries of rows without a picture: refused, failed, dropped, broken.
        reused: pictures whose thumbnail an earlier report had made.
        page_bytes: what opening the page loads before the first picture: page, scripts, styles, summary.
        total_bytes: the whole folder.
        seconds: that it took.
    """

    page: Path
    runs: int
    pictures: int
    unreadable: int
    problems: int
    reused: int
    page_bytes: int
    total_bytes: int
    seconds: float
