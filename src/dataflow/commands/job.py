"""``generate``, ``edit``, ``run``, ``retry`` and ``demo``: commands that make images."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from dataflow import config as configuration
from dataflow.commands.folder import exit_code, launch, load_job, shown
from dataflow.commands.options import serving_table
from dataflow.commands.results import write_results
from dataflow.config import PipelineConfig
from dataflow.contact_sheet import Item, contact_sheet
from dataflow.errors import ConfigError, InputError
from dataflow.pipeline import did_you_mean, listed, table_columns
from dataflow.runtime.journal import Journal
from dataflow.runtime.lock import cache_lock
from dataflow.runtime.table import load_summary
from dataflow.types import BadRow, Summary
from dataflow.utils.storage import FileStorage

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PROMPT_COLUMNS = ("conversations", "prompt", "text", "caption")
INSTRUCTION_COLUMNS = ("conversations", "instruction", "edit", "prompt")
IMAGE_COLUMNS = ("images", "image")
SHEET_CELL = 128
LEAST_ALIGNMENT = 0.1
"""Of the built-in CLIP: below it, hardly a picture of the built-in model is right."""

_DRAW = {"operator": "Text2ImageGenerator", "serving": "draw"}
_EDIT = {"operator": "PromptedImageEditGenerator", "serving": "edit", "input_conversation_key": "edit"}
_FAKE_DEMO = {
    "serving": {"draw": {"type": "fake", "batch_size": 4}, "edit": {"type": "fake", "batch_size": 4}},
    "step": [_DRAW, _EDIT],
}
_TINY_FLUX = {"type": "local", "hf_model_name_or_path": "builtin:tiny-flux", "batch_size": 4}
_DEMO = {
    "serving": {
        "draw": {**_TINY_FLUX, "diffuser_num_images_per_prompt": 3},
        "clip": {"type": "clip"},
        "owl": {"type": "zero_shot_detection", "hf_model_name_or_path": "builtin:tiny-owl"},
        "edit": {**_TINY_FLUX, "Image_gen_task": "imageedit"},
    },
    "step": [
        _DRAW,
        {"operator": "ImageEvaluator", "serving": "clip", "with_prompt": True, "output_key": "clip"},
        {
            "operator": "ObjectEvaluator",
            "serving": "owl",
            "colours": "query",
            "threshold": 0.3,
            "counting_threshold": 0.3,
            "max_overlap": 0.5,
        },
        {"operator": "ScoreFilter", "on_unknown": "drop", "input_score_key": "objects.value", "minimum": 1.0},
        {
            "operator": "ScoreFilter",
            "on_unknown": "drop",
            "input_score_key": "clip.alignment",
            "minimum": LEAST_ALIGNMENT,
            "top_k": 1,
        },
        _EDIT,
    ],
}
_SCORED = 2
"""The step of the demo whose table has all pictures with all scores."""


def generate(args: argparse.Namespace) -> int:
    """Text to image."""
    out = Path(args.output)
    table, inputs = _prompts(args.prompts, out)
    step: dict[str, Any] = {"operator": "Text2ImageGenerator", "seed": args.seed}
    step["input_conversation_key"] = _column(table, inputs, args.column, PROMPT_COLUMNS, "--column")
    step["output_image_key"] = args.output_column or "images"
    return _launch(args, table, inputs, step, "text2image")


def edit(args: argparse.Namespace) -> int:
    """Instruction edits."""
    out = Path(args.output)
    if args.image:
        table, inputs = _one_edit(args.edits, args.image, args.mask, out)
    elif _is_table(args.edits):
        table, inputs = Path(args.edits), {}
    else:
        raise InputError(
            f"{_quoted(args.edits)} is no table ({', '.join(TABLE_SUFFIXES)}); for an instruction name the image:"
            f" dataflow edit {_quoted(args.edits)} --image picture.png"
        )
    step: dict[str, Any] = {"operator": "PromptedImageEditGenerator", "seed": args.seed}
    step["input_image_key"] = _column(table, inputs, args.image_column, IMAGE_COLUMNS, "--image-column")
    step["input_conversation_key"] = _column(table, inputs, args.column, INSTRUCTION_COLUMNS, "--column")
    step["output_image_key"] = args.output_column or "edited_images"
    if args.mask or args.mask_column:
        if args.mask and not args.image:
            raise InputError("--mask goes with --image; a table names its masks in a column: --mask-column")
        step["input_mask_key"] = args.mask_column or "mask"
    return _launch(args, table, inputs, step, "imageedit")


def run(args: argparse.Namespace) -> int:
    """A pipeline file."""
    return _finish(configuration.load(args.pipeline), args)


def retry(args: argparse.Namespace) -> int:
    """Failed requests of a job once more."""
    folder = Path(args.folder)
    config = load_job(folder)
    known = _reasons(folder)
    for reason in args.reason or ():
        if reason not in known:
            raise InputError(
                f"nothing in it failed for the reason {reason!r}{did_you_mean(reason, known)};"
                f" the reasons are {listed(sorted(known)) or 'none: nothing failed'}",
                path=folder,
            )
    return _finish(config, args, retry=args.reason)


def demo(args: argparse.Namespace) -> int:
    """Pictures from prompts, scored, filtered and edited, with the models in the package."""
    out = Path(args.output)
    table = out / "input" / "demo.jsonl"
    data = resources.files("dataflow").joinpath("builtin", "demo.jsonl").read_bytes()
    document = {
        "storage": {"first_entry_file_name": str(table), "cache_path": str(out)},
        **(_FAKE_DEMO if args.fake else _DEMO),
    }
    if not args.quiet:
        prompts = data.count(b"\n")
        print(f"{prompts} prompts, drawn, scored, filtered and edited by the models in the package …", file=sys.stderr)
    config = configuration.parse(document, folder=Path.cwd(), source="the demo")
    summaries = launch(config, args, {table.absolute(): data})
    rejected = [] if args.fake else list(_rejected(Path(str(summaries[_SCORED].output))))
    sheet = _draw_sheet(summaries[-1], rejected, config.folder / "contact_sheet.png")
    if not args.fake:
        made = summaries[0].images
        print(f"{made} pictures, {len(rejected)} of them not what was asked for:")
        for item in rejected:
            print(f"  {item.caption}")
    print(f"table:         {shown(Path(str(summaries[-1].output)))}")
    print(f"folder:        {shown(config.folder)}\ncontact sheet: {shown(sheet)}")
    print('try next:      dataflow generate "a blue star on a pink background" -o my_first')
    return exit_code(summaries, config.folder, args)


def _launch(args: argparse.Namespace, table: Path, inputs: dict[Path, bytes], step: dict[str, Any], task: str) -> int:
    run_options = {name: getattr(args, name) for name in ("max_failed_fraction", "budget_usd")}
    document = {
        "storage": {
            "first_entry_file_name": str(table),
            "cache_path": args.output,
            "cache_type": args.cache_type,
        },
        "images": {"format": args.format},
        "serving": {"model": serving_table(args, task)},
        "step": [step],
        "run": {name: value for name, value in run_options.items() if value is not None},
    }
    config = configuration.parse(document, folder=Path.cwd(), source="command line")
    return _finish(config, args, inputs)


def _finish(
    config: PipelineConfig,
    args: argparse.Namespace,
    inputs: dict[Path, bytes] | None = None,
    retry: Sequence[str] | None = None,
) -> int:
    """Run and say on standard output where the result is."""
    summaries = launch(config, args, inputs, retry)
    code = exit_code(summaries, config.folder, args)
    if summaries[-1].output is None:
        print("a pilot: the same command without --pilot makes the rest", file=sys.stderr)
    elif getattr(args, "last", None) in (None, len(config.steps)):
        alone = cache_lock(config.folder, wait=True) if getattr(args, "share", False) else contextlib.nullcontext()
        with alone:
            complete = write_results(config, Path(summaries[-1].output), quiet=args.quiet)
        code = code if complete else max(code, 1)
    if summaries[-1].output is not None:
        print(summaries[-1].output)
    return code


# Input -------------------------------------------------------------------------------------------------------------


def _prompts(source: str, out: Path) -> tuple[Path, dict[Path, bytes]]:
    """The table of prompts, and its content where it has to be written first."""
    if _is_table(source):
        return Path(source), {}
    name = "prompt-" + hashlib.sha256(source.encode(errors="replace")).hexdigest()[:8]
    prompts = [source]
    if _exists(source) or (source.endswith(".txt") and " " not in source):
        path = Path(source)
        if path.suffix.lower() != ".txt":
            raise InputError(f"is neither a table ({', '.join(TABLE_SUFFIXES)}) nor a .txt with prompts", path=path)
        name, prompts = path.stem, _lines(path)
    rows = [
        {"conversations": [{"role": "user", "content": prompt}], "images": [""]} for prompt in prompts if prompt.strip()
    ]
    if not rows:
        raise InputError("there is no prompt in it", path=source or None)
    return _written(out, name, rows)


def _one_edit(instruction: str, images: Sequence[str], mask: str | None, out: Path) -> tuple[Path, dict[Path, bytes]]:
    if _is_table(instruction):
        raise InputError(f"--image goes with an instruction; {instruction} is a table and names its own images")
    for image in [*images, *([mask] if mask else [])]:
        if not Path(image).is_file():
            raise InputError("no such image file", path=image)
    row = {
        "conversations": [{"role": "user", "content": instruction}],
        "images": [str(Path(image).absolute()) for image in images],
        "edited_images": [""],
    }
    if mask:
        row["mask"] = str(Path(mask).absolute())
    return _written(out, "edit-" + hashlib.sha256(_line(row)).hexdigest()[:8], [row])


def _written(out: Path, name: str, rows: list[dict[str, Any]]) -> tuple[Path, dict[Path, bytes]]:
    table = (out / "input" / f"{name}.jsonl").absolute()
    return table, {table: b"".join(map(_line, rows))}


def _line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row) + b"\n"
    except TypeError as error:
        raise InputError(f"the prompt is not valid Unicode text: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): it also breaks at form feeds and other marks that a prompt may hold.
        return [line.rstrip("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", path=path) from error


def _is_table(source: str) -> bool:
    """Whether this means a table, there or not: a misspelt file name must not be drawn."""
    return "\n" not in source and source.lower().endswith(TABLE_SUFFIXES)


def _exists(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except (OSError, ValueError):  # too long for a file name, or with a NUL in it
        return False


def _column(table: Path, inputs: dict[Path, bytes], given: str | None, usual: Sequence[str], option: str) -> str:
    """The column to read: what the user named, else the first of the usual ones that the table has."""
    if given is not None:
        return given
    if inputs:
        return usual[0]
    columns = table_columns(FileStorage(str(table)))
    found = next((name for name in usual if name in columns), None)
    if found is None and columns:
        raise InputError(
            f"it has none of the columns {listed(usual)}; name one with {option}: {listed(columns)}", path=table
        )
    return found or usual[0]


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


# Results -----------------------------------------------------------------------------------------------------------


def _reasons(folder: Path) -> set[str]:
    """Every reason for which something in the folder was refused or failed."""
    found: set[str] = set()
    for journal in sorted((folder / "journal").glob("*/")):
        found |= {ending.reason for ending in Journal(journal).load().endings.values()}
        found |= set((load_summary(journal) or {}).get("reasons", ()))
    return found


def _rejected(table: Path) -> Iterator[Item]:
    """Pictures that the object rules or the alignment speak against, with the reasons."""
    for row in FileStorage(str(table)).step().iter_rows():
        if isinstance(row, BadRow):
            continue
        for image, found, clip in zip(row["images"], row["objects"], row["clip"], strict=True):
            reasons = ["not scored"] if found is None or clip is None else [*found["reasons"]]
            if clip is not None and clip["alignment"] < LEAST_ALIGNMENT:
                reasons.append(f"alignment {clip['alignment']:.2f}, less than {LEAST_ALIGNMENT}")
            if reasons:
                yield Item([image], f"{row['conversations'][0]['content']}: {'; '.join(reasons)}")


def _draw_sheet(summary: Summary, rejected: Sequence[Item], path: Path) -> Path:
    """Prompts, the images made of them and the edits of those, and what was rejected, on one picture."""
    if summary.output is None:
        raise ConfigError("the step wrote no table")
    items = []
    for row in FileStorage(summary.output).step().iter_rows():
        if isinstance(row, BadRow):
            continue
        made = [*row["images"], None][0], [*row["edited_images"], None][0]
        caption = f"{row['conversations'][0]['content']}\nthen: {row['edit']}"
        items.append(Item(made, caption))
    rejected = [item._replace(caption=f"rejected: {item.caption}") for item in rejected]
    title = "dataflow demo: from a prompt, then edited"
    contact_sheet([*items, *rejected], cell=SHEET_CELL, title=title).save(path)
    return path
