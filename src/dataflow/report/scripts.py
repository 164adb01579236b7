"""Data as plain scripts, which is all that a page from disk may load."""

from __future__ import annotations

import json
from typing import Any

_BEGIN, _END = "dataflowReport.put(", ");\n"


def call(name: str, value: Any) -> str:
    """A script of ASCII that hands a JSON value to the page.

    Every other character is escaped, so that neither half a surrogate pair, nor a line separator, nor the end of a
    script element can stand in it.
    """
    body = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"{_BEGIN}{json.dumps(name)},{body}{_END}"


def payload(script: str) -> Any:
    """The value of a script that :func:`call` wrote.

    Raises:
        ValueError: it is none.
    """
    if not script.startswith(_BEGIN) or not script.endswith(_END):
        raise ValueError("no script of a report")
    return json.loads(f"[{script[len(_BEGIN) : -len(_END)]}]")[1]
