"""The page itself: plain scripts and styles, copied beside the data, and the one HTML file that names them."""

from __future__ import annotations

import html
import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

FIRST = "loader.js"
APP = ("data.js", "parts.js", "charts.js", "overview.js", "gallery.js", "detail.js", "compare.js", "app.js")
STYLE = "app.css"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' file:",
        "style-src 'self' file:",
        "img-src 'self' file: data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
"""What the page may load: files beside it and nothing else, no words of a prompt as a script or a style."""
_TEMPLATE = """<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
{styles}
</head>
<body>
<noscript><p>This report is a page of scripts: please allow them for this file. The numbers in it are also in
data/summary.js, and the pictures' scores in scored.jsonl.</p></noscript>
<div id="app"><p class="loading">Opening the report …</p></div>
{scripts}
</body>
</html>
"""


def write_page(folder: Path, title: str) -> int:
    """Write ``index.html`` and what it loads at first; returns their bytes together.

    Args:
        folder: of the report; ``data/summary.js`` is there already.
        title: of the window.
    """
    static = resources.files("dataflow.report") / "static"
    vendor = static / "vendor"
    manifest = json.loads((vendor / "manifest.json").read_text(encoding="utf-8"))
    assets = folder / "assets"
    scripts, styles, total = [f"assets/{FIRST}", "data/summary.js"], [], 0
    total += _copy(static / FIRST, assets / FIRST)
    for library in manifest["libraries"]:
        _copy(vendor / library["licence_file"], assets / "vendor" / library["licence_file"])
        for file in library["files"]:
            source, target = vendor / file["path"], assets / "vendor" / file["path"]
            if target.suffix == ".cjs":
                target = target.with_suffix(".js")
                total += _write(target, _as_script(source.name, source.read_text(encoding="utf-8")))
            else:
                total += _copy(source, target)
            (styles if target.suffix == ".css" else scripts).append(target.relative_to(folder).as_posix())
    for file in (*APP, STYLE):
        total += _copy(static / file, assets / file)
        (styles if file == STYLE else scripts).append(f"assets/{file}")
    page = _TEMPLATE.format(
        policy=POLICY,
        title=html.escape(title),
        styles="\n".join(f'<link rel="stylesheet" href="{path}">' for path in styles),
        scripts="\n".join(f'<script src="{path}"></script>' for path in scripts),
    )
    return total + _write(folder / "index.html", page)


def _as_script(name: str, text: str) -> str:
    """A library's file of CommonJS as a plain script; its text stays as it was distributed."""
    return f"dataflowReport.define({json.dumps(name)}, function (exports, require, module, process) {{\n{text}\n}});\n"


def _copy(source: Traversable, target: Path) -> int:
    return _write(target, source.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(data)
    return len(data)
