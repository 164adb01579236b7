"""What a report is made of: pictures and rows without one, and what tables say of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow.errors import ImageError
from dataflow.picture_files import status
from dataflow.remote_files import is_url
from dataflow.report.runs import Run
from dataflow.scores import values_at
from dataflow.types import Row

_PICTURE = re.compile(r"[^\n]+\.(?:png|jpe?g|webp|bmp|tiff?|gif|avif)", re.IGNORECASE)
_OWN_NAME = re.compile(r"[0-9a-f]{32}(_[0-9]+)?")
_MOST_TEXT = 300

Value = float | str | None


@dataclass(slots=True, kw_only=True)
class Entry:
    """A picture, or a row that has none.

    Attributes:
        row: number of its row in the report's count of this run, from 0.
        state: ``kept``; ``not_chosen`` (a filter took others of its row); ``dropped`` (with its row); ``incomplete``
            (a later step could not make what the row asked for); ``refused``, ``failed`` (there is no picture);
            ``waiting`` (its step has not finished).
        step: number of the step that lost it; 0 for one that was kept.
        reason: why, in a word.
        message: the same for people.
        column: the image column.
        made: number of the step that made it; 0 for a picture of the user's own.
        place: among the pictures of its cell.
        turn: of a multi-turn edit, from 1; 0 where there are no turns.
        path: as it stands in the row; None where there is no picture.
        prompt: of its row.
        group: what belongs to one prompt has the same.
        scores: by column, the value, as it stands there, and its status.
        scored_by: who scored, by column.
        values: what can be sorted and filtered by, by (kind, name).
        facts: the other cells of its row, as text.
        sources: paths of what it was made from, as far as the row tells.
    """

    row: int
    state: str
    step: int = 0
    reason: str = ""
    message: str = ""
    column: str = ""
    made: int = 0
    place: int = 0
    turn: int = 0
    path: str | None = None
    prompt: str = ""
    group: str = ""
    scores: dict[str, tuple[Any, str, str]] = field(default_factory=dict)
    scored_by: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, str], Value | bool] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    sources: Sequence[str] = ()


@dataclass(slots=True)
class Tally:
    """What became of the rows and of the pictures of a run.

    Attributes:
        rows: rows lost, by (step, state, reason).
        kept: rows in the last table that lack nothing.
        made: pictures by the step that made them; 0 for the user's own.
        pictures: pictures lost, by (step, state, reason).
        kept_pictures: the others.
    """

    rows: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    kept: int = 0
    made: Counter[int] = field(default_factory=Counter)
    pictures: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    kept_pictures: int = 0


def picture_key(path: str) -> str:
    """What tells a picture from others: its id where it has one, wherever the folder was moved to, or else its path."""
    stem = Path(path).stem
    return stem if _OWN_NAME.fullmatch(stem) else path


def unscored(entry: Entry) -> list[tuple[str, str, str]]:
    """(score, status, error) of every score that should be there and is not."""
    return [(name, status, error) for name, (_, status, error) in entry.scores.items() if status != "ok"]


def paths_in(value: object) -> list[str]:
    """The paths of pictures in a cell."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str) and _PICTURE.fullmatch(each)]


def digest_of(path: str) -> bytes:
    return hashlib.blake2b(picture_key(path).encode(errors="surrogatepass"), digest_size=8).digest()


def score_of(row: Row, name: str, place: int) -> tuple[Any, str, str]:
    """Value, status and error of one picture's score; one score of the whole row is that of each picture."""
    found = values_at(row, name)
    value, status = found[place if place < len(found) and len(found) > 1 else 0]
    errors = row.get(f"{name}_error")
    error = errors[place] if isinstance(errors, list) and place < len(errors) else errors
    return value, status, error if isinstance(error, str) else ""


def scalars(kind: str, name: str, value: object) -> dict[tuple[str, str], Value | bool]:
    """What of a cell can be sorted by: itself, or the plain fields of an object."""
    if isinstance(value, Mapping):
        found: dict[tuple[str, str], Value | bool] = {}
        for field_name, each in value.items():
            if not isinstance(each, Mapping):
                found.update(scalars(kind, f"{name}.{field_name}", each))
        return found
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _MOST_TEXT):
        return {(kind, name): value}
    return {(kind, name): value[:_MOST_TEXT]} if isinstance(value, str) else {}


def find_picture(run: Run, path: str) -> str | None:
    """Where a row's picture is now: where the row says, or in the folder's own store if that was moved.

    Returns:
        An absolute path, loose or packed, or a URL; None if it is nowhere.
    """
    if is_url(path):
        return path  # reading it tells
    given = Path(path)
    tail = Path(*given.parts[-2:])
    places = [given, *(folder / part for folder in run.images for part in (tail, given))]
    return next((str(place.absolute()) for place in places if _is_there(place)), None)


def _is_there(path: Path) -> bool:
    try:
        return status(path) is not None
    except ImageError:
        return True  # in a pack that cannot be read: reading it says so
