"""Reports as text tables, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflow.calibration import Estimate
from dataflow.commands.folder import write_if_changed
from dataflow.metrics.agreement import Interval

NONE = "–"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Columns side by side: the first to the left, the others to the right, the last as it is."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    shown = []
    for line in lines:
        cells = [
            cell.ljust(width) if place in (0, len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(shown)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """With as many digits after the point; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """Four digits or more, whatever the scale of the metric."""
    return NONE if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def interval(found: Interval | Estimate | None) -> str:
    """Its two ends."""
    return NONE if found is None or found.low is None else f"{significant(found.low)} to {significant(found.high)}"


def percent(value: float | None) -> str:
    """A share; rounded down, so that 100 % is all of them."""
    return NONE if value is None else f"{int(1000 * value + 1e-9) / 10:.1f} %"


def plain(value: Any) -> Any:
    """A report as JSON has it: fields and properties of dataclasses by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, each in vars(type(value)).items() if isinstance(each, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def give(report: Any, text: str, json_to: str | None) -> None:
    """Print the text; or the JSON instead where ``json_to`` is ``-``, and write that where it names a file."""
    data = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_to == "-":
        print(data, end="")
        return
    if json_to:
        write_if_changed(Path(json_to), data.encode())
    print(text)
