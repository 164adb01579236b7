"""Runs every benchmark and writes RESULTS.md beside this file: ``make bench``."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks import agreement, api, engine, export, growth, imports, overhead, ray_executor, report, resume, scoring

PACKAGES = ("torch", "diffusers", "pillow", "orjson", "openai", "aiohttp", "transformers", "faiss-cpu", "pyarrow")


def main() -> None:
    parts = [
        "# Results",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        + ". Read ratios, not absolute times: the machine is shared.",
        "",
    ]
    for benchmark in (overhead, engine, resume, growth, ray_executor, imports, api, scoring, agreement, export, report):
        print(f"{benchmark.__name__} ...", file=sys.stderr)
        found = benchmark.run()
        for result in found if isinstance(found, list) else [found]:
            print(result.markdown())
            parts.append(result.markdown())
    Path(__file__).with_name("RESULTS.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
