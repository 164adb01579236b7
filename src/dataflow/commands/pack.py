"""``pack`` and ``unpack``: images of finished steps into tar shards, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dataflow.commands.folder import JOB_FILE, load_job
from dataflow.commands.layout import give
from dataflow.packing import PackSummary, UnpackSummary
from dataflow.packing import pack as packed
from dataflow.packing import unpack as unpacked
from dataflow.runtime.progress import human_bytes

NOT_ALL = 1


def pack(args: argparse.Namespace) -> int:
    """Pack what is loose and say what became of every image; 1 if a file is not what its journal says."""
    size = round(args.shard_size * 1e6)
    summary = packed(args.folder, images=_images(args), shard_bytes=size, tell=_teller(args))
    if args.json:
        give(summary, "", "-")
    elif not args.quiet:
        print(_described(summary))
    return NOT_ALL if summary.differing else 0


def unpack(args: argparse.Namespace) -> int:
    """Put everything back as files; 1 if an image is not what it was."""
    summary = unpacked(args.folder, images=_images(args), tell=_teller(args))
    if args.json:
        give(summary, "", "-")
    elif not args.quiet:
        print(_put_back(summary))
    return NOT_ALL if summary.damaged else 0


def _images(args: argparse.Namespace) -> str | None:
    folder = Path(args.folder)
    if args.images is None and (folder / JOB_FILE).is_file():
        return load_job(folder).images.get("save_path")
    return args.images


def _teller(args: argparse.Namespace) -> Callable[[str], None]:
    return (lambda _: None) if args.quiet else (lambda line: print(f"  {line}", file=sys.stderr))


def _described(summary: PackSummary) -> str:
    sums = (
        f"{summary.images:,} images of finished steps = {summary.packed:,} packed now + {summary.before:,} packed"
        f" before + {summary.differing:,} not as their journal says + {summary.missing:,} missing"
    )
    lines = [sums, f"{human_bytes(summary.bytes)} in {_number(summary.shards, 'shard')}"]
    if summary.removed:
        lines.append(f"{_number(summary.removed, 'file')} removed that a pack held already")
    if summary.unfinished:
        lines.append(f"not finished, so that only whole parts are packed: {', '.join(summary.unfinished)}")
    if summary.missing:
        lines.append("what is missing is made again when the job is run again; are the images elsewhere? --images DIR")
    return "\n".join([*lines, *_examples("left as they are, since they were changed", summary.examples)])


def _put_back(summary: UnpackSummary) -> str:
    sums = (
        f"{summary.images:,} packed images = {summary.unpacked:,} files now + {summary.loose:,} files before"
        f" + {summary.replaced:,} replaced by newer ones + {summary.damaged:,} damaged"
    )
    lines = [sums, f"{human_bytes(summary.bytes)}; {_number(summary.shards, 'shard')} removed"]
    return "\n".join([*lines, *_examples("damaged, and kept with their packs", summary.examples)])


def _number(count: int, of: str) -> str:
    return f"{count:,} {of}{'' if count == 1 else 's'}"


def _examples(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}, among others: {', '.join(names)}"] if names else []
