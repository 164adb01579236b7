"""Where in a pipeline file something stands, so that every mistake is told with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dataflow.errors import ConfigError

_ARRAYS = ("step", "export")
"""Tables of which there may be several: ``[[step]]``."""
_HINTS = {
    "Invalid value": "; text stands in quotes",
    "Cannot overwrite": "; it stands there twice, or once as [table] and once as [[table]]",
    "Cannot declare": "; it stands there twice, or once as [table] and once as [[table]]",
}


class Place:
    """A table of a configuration, or the whole of it.

    Args:
        source: what the configuration is called in messages: its file, or "command line".
        folder: what relative paths in it are relative to.
        text: of the file, for line numbers; "" where there is none.
        path: names and indices, from 0, that lead to the table.
    """

    def __init__(
        self, source: str, folder: Path | None = None, text: str = "", path: tuple[str | int, ...] = ()
    ) -> None:
        self.source = source
        self.folder = folder or Path.cwd()
        self.text = text
        self.path = path

    def __truediv__(self, name: str | int) -> Place:
        return Place(self.source, self.folder, self.text, (*self.path, name))

    def label(self, key: str | None = None) -> str:
        """``pipeline.toml:14: [[step]] 2: seed``: the line is the key's where the file has it, else the table's."""
        path = self.path if key is None else (*self.path, key)
        line = line_of(self.text, path) or line_of(self.text, self.path)
        parts = [self.source if line is None else f"{self.source}:{line}"]
        if self.path or key is not None:
            parts.append(_header(self.path or path))
        return ": ".join([*parts, key] if self.path and key is not None else parts)

    def fail(self, message: str, key: str | None = None) -> NoReturn:
        """Refuse the table, or one key of it.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.label(key)}: {message}")


def line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The line, from 1, on which a value begins.

    tomllib keeps no positions, but it tells after how many lines a document has the value. Only mistakes ask.

    Args:
        text: of a TOML file.
        path: keys, and indices from 0 into arrays of tables; those of the whole document are none.

    Returns:
        None where the file has no such value, or ``path`` is empty.
    """
    if not path:
        return None
    lines = text.split("\n")
    begin = 0
    for end in range(1, len(lines) + 1):
        try:
            document = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # inside a value of several lines
        if _has(document, path):
            return begin + 1
        begin = end
    return None


def not_toml(source: str, text: str, error: tomllib.TOMLDecodeError) -> str:
    """What to say of a file that is no TOML: where it stops being that, the line, and what is usually the matter.

    Args:
        source: its name.
        text: what stands in it.
        error: of tomllib, which tells the place only in words.
    """
    message, _, where = str(error).partition(" (at ")
    found = re.match(r"line (\d+), column (\d+)", where)
    if found is None:
        return f"{source}: is not TOML: {error}"
    line = text.split("\n")[int(found[1]) - 1].strip()
    hint = next((hint for word, hint in _HINTS.items() if word in message), "")
    return f"{source}:{found[1]}: is not TOML: {message} (column {found[2]}): {line}{hint}"


def _has(value: Any, path: Sequence[str | int]) -> bool:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _header(path: tuple[str | int, ...]) -> str:
    if path[0] in _ARRAYS and len(path) > 1 and isinstance(path[1], int):
        return f"[[{path[0]}]] {path[1] + 1}"
    return f"[{'.'.join(map(str, path))}]"
