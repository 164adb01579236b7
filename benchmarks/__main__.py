"""Runs benchmarks and keeps what they say in RESULTS.md beside this file: ``make bench``, or by their names."""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    agreement,
    api,
    engine,
    export,
    growth,
    imports,
    overhead,
    packs,
    plots,
    ray_executor,
    report,
    results,
    resume,
    scoring,
)

ALL = (overhead, engine, resume, growth, ray_executor, imports, api, scoring, agreement, export, packs, report)
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in ALL}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)} (default: all)")
    names = parser.parse_args(arguments).names or [*BENCHMARKS]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        measured = BENCHMARKS[name].run()
        keep(name, measured if isinstance(measured, list) else [measured])


def keep(name: str, measured: list) -> None:
    """Put what one benchmark found in the place of what it found before, at once: a later one may take hours."""
    before = results.FILE.read_text(encoding="utf-8") if results.FILE.exists() else ""
    found = {**results.sections(before), name: results.written(name, measured, plots.files())}
    print(found[name])
    text = results.whole(found, [*BENCHMARKS])
    plots.draw(text)
    results.FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
