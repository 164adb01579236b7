"""The command line: arguments, exit codes, Ctrl-C. What commands do is in :mod:`dataflow.commands`.

Nothing heavy is imported here, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dataflow import __version__
from dataflow.commands.export_options import add_export
from dataflow.commands.options import DEFAULT_FOLDER, add_job_options, add_run_options
from dataflow.commands.pack_options import add_pack
from dataflow.commands.report_options import add_report
from dataflow.commands.scoring_options import add_scoring
from dataflow.commands.tune_options import add_tune
from dataflow.commands.watch_options import add_watch
from dataflow.errors import CacheBusyError, DataflowError, RunStoppedError, ServingError, StepError

NOT_ALL_DONE, USAGE, STOPPED, BUSY, INTERRUPTED = 1, 2, 3, 4, 130

_EPILOG = """\
start here:
  dataflow demo
  dataflow generate "a blue star on a pink background"
  dataflow generate prompts.jsonl -o my_images --model black-forest-labs/FLUX.1-dev
  dataflow status my_images

exit codes:
  0    every row is done (or was dropped by a filter)
  1    finished, but some rows were refused or failed; for replay: the image differs
  2    wrong usage, configuration or input
  3    stopped early: too many failures, a full disk, a model or service that is gone
  4    another process writes to the folder
  130  interrupted; the same command goes on where it stopped

Results go to standard output, progress and messages to standard error.
"""

_COMMANDS = {
    "demo": ("job", "demo"),
    "generate": ("job", "generate"),
    "edit": ("job", "edit"),
    "plan": ("plan", "plan"),
    "run": ("job", "run"),
    "status": ("status", "status"),
    "watch": ("watch", "watch"),
    "report": ("report", "report"),
    "export": ("export", "export"),
    "pack": ("pack", "pack"),
    "unpack": ("pack", "unpack"),
    "retry": ("job", "retry"),
    "replay": ("replay", "replay"),
    "compare": ("compare", "compare"),
    "calibrate": ("calibrate", "calibrate"),
    "benchmark": ("benchmark", "benchmark"),
    "distance": ("distance", "distance"),
    "tune": ("tune", "tune"),
    "models": ("machine", "models"),
    "doctor": ("machine", "doctor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _signals() as interrupts:
        try:
            code = _run(arguments)
        except KeyboardInterrupt:
            _say(f"interrupted: nothing finished is lost. Go on with:\n  {shlex.join(['dataflow', *arguments])}")
            code = INTERRUPTED
        if len(interrupts) > 1:
            _exit_now(code)
    return code


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    # Not set_defaults(): the options are shared with the commands, whose default would undo what stood before them.
    args = parser.parse_args(arguments, argparse.Namespace(verbose=False, quiet=False))
    _set_up_logging(verbose=args.verbose, quiet=args.quiet)
    module, function = _COMMANDS[args.command]
    try:
        code = getattr(importlib.import_module(f"dataflow.commands.{module}"), function)(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        raise
    except (DataflowError, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):
            # Whoever read standard output has gone; Python would complain again while it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NOT_ALL_DONE
        _say(f"error: {error}")
        code = _exit_code(error)
        if code == STOPPED:
            _say(f"everything finished is kept. Go on with:\n  {shlex.join(['dataflow', *arguments])}")
        return code


def _exit_code(error: DataflowError | OSError) -> int:
    match error:
        case RunStoppedError():
            return error.exit_code
        case CacheBusyError():
            return BUSY
        case StepError():
            return STOPPED
        case ServingError():
            return NOT_ALL_DONE
        case OSError():
            return STOPPED if error.errno in (errno.ENOSPC, errno.EDQUOT) else USAGE
        case _:
            return USAGE


# Signals and logging -----------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM counts as Ctrl-C. Gives the list of the signals that came."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 2:
            _exit_now(INTERRUPTED)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _exit_now(code: int) -> NoReturn:
    """Leave although a thread may sit in a model's call for minutes: Python would wait for it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _set_up_logging(*, verbose: bool, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, handlers=[handler], force=True)
    if verbose:
        logging.getLogger("dataflow").setLevel(logging.INFO)
    else:
        # It tells every time which image processor it falls back to. Worker processes inherit this.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# Arguments ---------------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(110, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=30, width=width)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options and help."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="say more; tracebacks")
    common.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="errors only, no progress"
    )
    parser = argparse.ArgumentParser(
        prog="dataflow",
        description="Make image datasets with generative models: a table of prompts goes in, images come out.",
        epilog=_EPILOG,
        formatter_class=_Help,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"dataflow {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, summary: str, description: str, examples: str, usage: str | None = None
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            usage=usage,
            help=summary,
            description=description,
            epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines()),
            formatter_class=_Help,
            parents=[common],
            allow_abbrev=False,
        )

    _add_making(add)
    _add_looking(add)
    add_scoring(add, common, _Help)
    return parser


def _add_making(add) -> None:
    command = add(
        "demo",
        "see it work, offline, in under two minutes",
        "Draws prompts with the built-in model, edits the pictures, and lays everything out\non one contact sheet.",
        "dataflow demo\ndataflow demo -o somewhere",
    )
    command.add_argument("-o", "--output", metavar="OUT", default="demo_output", help="folder (default ./%(default)s)")
    command.add_argument("--fake", action="store_true", help="without a model: the pictures are coloured tiles")
    command = add(
        "generate",
        "make images from prompts",
        "Makes an image for every prompt. The same command again goes on where it stopped:\n"
        "nothing finished is made twice. OUT gets images/, journal/, the result table and\n"
        "job.toml, the pipeline file of what was done.",
        'dataflow generate "a red circle to the left of a blue square"\n'
        "dataflow generate prompts.jsonl -o my_images --model black-forest-labs/FLUX.1-dev --size 1024x768\n"
        "dataflow generate prompts.txt -o drafts --steps 8 --images-per-prompt 4 --seed 7\n"
        "dataflow generate prompts.jsonl -o ads --api gemini --model gemini-2.5-flash-image --budget 25 --pilot 20\n"
        "dataflow generate captions.parquet --column caption --cache-type parquet --fake",
        usage="dataflow generate PROMPTS [-o OUT] [--model NAME] [options]",
    )
    command.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="table (.jsonl, .json, .csv, .parquet), .txt with a prompt per line, or the prompt itself",
    )
    command.add_argument("--output-column", metavar="NAME", help="column that gets the images (default images)")
    add_job_options(command)
    command = add(
        "edit",
        "change images by instructions",
        "Follows every row's instruction on its image. Several images in a row are references,\n"
        "for models that take several; several user turns are a multi-turn edit.",
        "dataflow edit edits.jsonl -o my_edits --model black-forest-labs/FLUX.1-Kontext-dev\n"
        'dataflow edit "make the circle green" --image circle.png\n'
        "dataflow edit my_images/dataflow_cache_step_step1.jsonl --column edit -o my_edits",
        usage="dataflow edit EDITS [--image FILE] [-o OUT] [--model NAME] [options]",
    )
    command.add_argument(
        "edits",
        metavar="EDITS",
        help="table (.jsonl, .json, .csv, .parquet) with instructions and images, or with --image the instruction",
    )
    command.add_argument("--image", action="append", metavar="FILE", help="image to edit; may be repeated")
    command.add_argument("--mask", metavar="FILE", help="with --image: where the first image may be changed")
    command.add_argument("--image-column", metavar="NAME", help="column with the input images (default images)")
    command.add_argument("--mask-column", metavar="NAME", help="column with masks, for models that take one")
    command.add_argument("--output-column", metavar="NAME", help="column that gets the images (default edited_images)")
    add_job_options(command)
    command = add(
        "plan",
        "what a pipeline file would do",
        "Checks a pipeline file and its table, and shows per step: columns, rows, requests, what\n"
        "is done already, models, list price, and a forecast where some of it was made before.\n"
        "Loads no model and writes nothing. Exit code 1 if rows or requests of it cannot work.",
        "dataflow plan pipeline.toml\ndataflow plan pipeline.toml --json\ndataflow plan pipeline.toml --mermaid",
    )
    command.add_argument("pipeline", metavar="pipeline.toml")
    given = command.add_mutually_exclusive_group()
    given.add_argument("--json", action="store_true", help="for scripts")
    given.add_argument("--mermaid", action="store_true", help="a picture of the steps, as the text of a flow chart")
    command = add(
        "run",
        "run a pipeline file",
        "Runs the steps of a pipeline file one after the other. Relative paths in it are\nrelative to its own folder.",
        "dataflow run pipeline.toml\ndataflow run pipeline.toml --first 3\ndataflow run my_images/job.toml",
    )
    command.add_argument("pipeline", metavar="pipeline.toml")
    command.add_argument(
        "--first",
        type=int,
        default=1,
        metavar="N",
        help="begin with this step; the tables of the steps before are taken as they are",
    )
    command.add_argument("--last", type=int, metavar="N", help="end with this step")
    add_run_options(command)


def _add_looking(add) -> None:
    command = add(
        "status",
        "the sum of a folder: done, refused, failed, pending",
        "Counts what became of every row, per step; also while another process is at work,\nand after it was killed.",
        "dataflow status my_images\ndataflow status my_images --json",
    )
    command.add_argument("folder", metavar="OUT", nargs="?", default=DEFAULT_FOLDER, help="default ./%(default)s")
    command.add_argument("--json", action="store_true", help="for scripts")
    add_watch(add)
    add_report(add)
    add_export(add)
    add_pack(add)
    command = add(
        "retry",
        "try failed rows again",
        "Runs the folder's job again: what failed is tried once more, what is pending is made.\n"
        "With --reason, only failures for these reasons. Refusals are tried again only when\n"
        "they are named.",
        "dataflow retry my_images\ndataflow retry my_images --reason out_of_memory --reason timeout\n"
        "dataflow retry my_images --reason refused",
    )
    command.add_argument("folder", metavar="OUT", nargs="?", default=DEFAULT_FOLDER, help="default ./%(default)s")
    command.add_argument(
        "--reason", action="append", metavar="REASON", help="as `dataflow status` names it; repeatable"
    )
    command = add(
        "replay",
        "make one image again and compare",
        "Makes an image again from what its own file says, with the model of the folder's job,\n"
        "writes it to OUT/replay/ and compares. Exit code 0 if they agree within the\n"
        "tolerance, 1 if not.",
        "dataflow replay 4f1c2a --cache my_images\n"
        "dataflow replay my_images/images/4f/4f1c2a90b1d35e7788a0c9d2e3f40516.png",
    )
    command.add_argument("request_id", metavar="REQUEST_ID", help="id, the beginning of one, or the image file")
    command.add_argument(
        "--cache", metavar="OUT", help=f"folder of the job (default: the image's, or ./{DEFAULT_FOLDER})"
    )
    command.add_argument(
        "--tolerance", type=float, default=2, metavar="N", help="allowed difference in levels of 255 (default 2)"
    )
    add_tune(add)
    command = add(
        "models",
        "what can be loaded",
        "Lists the built-in model, folders under --hf-local-dir, and the pipeline classes that\nthis package knows.",
        "dataflow models\ndataflow models --hf-local-dir ./ckpt/models",
    )
    command.add_argument("--hf-local-dir", metavar="DIR", help="where hub models were downloaded to")
    command.add_argument("--json", action="store_true", help="for scripts")
    add(
        "doctor",
        "what this machine has: Python, torch, devices, disk",
        "Shows what is installed and what is missing, with the command that installs it. Exit\n"
        "code 1 if local models cannot run.",
        "dataflow doctor",
    )
