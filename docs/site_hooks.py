"""What the site needs beside its pages: links of files from the repository's root, and names in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page that is a file of the repository's root: its links begin in docs/."""
    found = re.fullmatch(r'\s*(?:---.*?---\s*)?--8<-- "([^"]+)"\s*', markdown, re.DOTALL)
    if not found:
        return markdown
    return Path(found[1]).read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Roles of reStructuredText in docstrings, as plain code."""
    return re.sub(r":(?:class|func|meth|mod|attr|data):<code>~?(?:[\w.]+\.)?([^<]+)</code>", r"<code>\1</code>", html)
