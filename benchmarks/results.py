"""RESULTS.md: a section for each benchmark, which can be measured again by itself."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import Result

FILE = Path(__file__).with_name("RESULTS.md")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "pillow",
    "orjson",
    "pyarrow",
    "openai",
    "aiohttp",
    "faiss-cpu",
    "ray",
)
_HEAD = """# Results

Read ratios, not absolute times: they are taken side by side in one run. `python -m benchmarks NAME` measures one again.

A GPU is measured by `python -m benchmarks.gpu --preset full --results gpu.json`: FLUX.1-dev and FLUX.1-Kontext-dev with
random weights (34 GB, no download) against a plain diffusers loop. It was run with tiny models on a CPU only: there was
no GPU.
"""
_SECTION = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->\n", re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """What a file of results says, by the names of the benchmarks."""
    return {name: body.strip("\n") for name, body in _SECTION.findall(text)}


def written(name: str, results: Sequence[Result], plots: Mapping[str, str]) -> str:
    """What a benchmark found, with the machine, the versions and the day."""
    parts = [f"*{name}: {_today()}*", ""]
    for result in results:
        result.plot = plots.get(result.question, "")
        parts.append(result.markdown())
    return "\n".join(parts)


def whole(found: Mapping[str, str], order: Sequence[str]) -> str:
    """The file, its sections in order; such as are in no order come last."""
    names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
    return "\n".join([_HEAD, *(f"<!-- {name} -->\n{found[name].strip()}\n<!-- /{name} -->\n" for name in names)])


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of the first table under each heading, without its own."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        found[heading] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


def _today() -> str:
    installed = []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"{time.strftime('%Y-%m-%d')}, {cores}, Python {platform.python_version()}, {', '.join(installed)}"
