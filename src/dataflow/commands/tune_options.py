"""The arguments of ``tune``."""

from __future__ import annotations

from typing import Any

from dataflow.commands.options import add_model_options, positive_number

DEFAULT_SECONDS = 900.0


def add_tune(add: Any) -> None:
    """Add the command with ``add``, as the command line makes all of them."""
    command = add(
        "tune",
        "the fastest settings of a local model on this machine",
        "Tries settings with a model, each in a process of its own, prints what each gives, and\n"
        "the lines for the pipeline file. Settings that change pictures beyond rounding are taken\n"
        "with --lossy only. --current measures the settings as they are and nothing else. What\n"
        "does not fit or does not work is a line of the table. Ctrl-C prints what there is. Exit\n"
        "code 1 if nothing worked.",
        "dataflow tune pipeline.toml --write\ndataflow tune pipeline.toml --current\n"
        "dataflow tune --model black-forest-labs/FLUX.1-dev --size 1024x1024 --seconds 1800\n"
        "dataflow tune --model Qwen/Qwen-Image --lossy --json tuned.json",
        usage="dataflow tune [pipeline.toml | --model NAME] [options]",
    )
    command.add_argument("pipeline", metavar="pipeline.toml", nargs="?", help="a model in a pipeline file")
    command.add_argument("--serving", metavar="NAME", help="which [serving.NAME], where the file has several")
    command.add_argument("--edit", action="store_true", help="the model edits; input images are made up")
    command.add_argument("--current", action="store_true", help="measure the settings as they are, and only those")
    command.add_argument("--lossy", action="store_true", help="also settings that change pictures: fp8, step caches")
    command.add_argument(
        "--seconds",
        type=positive_number,
        default=DEFAULT_SECONDS,
        metavar="S",
        help="stop after this time (default %(default)g)",
    )
    command.add_argument("--write", action="store_true", help="put the best settings into the file; a copy is kept")
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead, or write it to FILE beside the text"
    )
    add_model_options(command)
