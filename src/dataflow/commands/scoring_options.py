"""The arguments of ``compare``, ``calibrate``, ``benchmark`` and ``distance``."""

from __future__ import annotations

import argparse
import math
from typing import Any

FORMATS = ("geneval", "dsg", "t2i_compbench", "parti", "dpg", "longtext", "gedit", "imgedit")


def add_scoring(add: Any, common: argparse.ArgumentParser, formatter: Any) -> None:
    """Add the four commands with ``add``, as the command line makes all of them."""
    _add_compare(add)
    _add_calibrate(add)
    _add_benchmark(add, common, formatter)
    _add_distance(add)


def _add_distance(add: Any) -> None:
    command = add(
        "distance",
        "how the pictures of whole tables stand to a reference",
        "Fréchet distance, KID, precision, recall, density, coverage, CMMD and Vendi over the\n"
        "vectors that an embedding serving made, at equal numbers of pictures.",
        "dataflow distance made.jsonl --reference real.jsonl --vectors out/vectors\n"
        "dataflow distance a.jsonl b.jsonl --reference real.jsonl --vectors vectors --sample 10000",
    )
    command.add_argument("tables", metavar="TABLE", nargs="+", help="finished table, or job folder, with vectors")
    command.add_argument("--reference", metavar="TABLE", help="the table they are compared with")
    command.add_argument("--vectors", metavar="DIR", required=True, help="folder of the vector stores")
    command.add_argument("--vector-column", metavar="NAME", default="vector", help="default: %(default)s")
    command.add_argument("--metric", action="append", metavar="NAME", help="repeatable; default: all")
    command.add_argument("--sample", type=_positive, metavar="N", help="draw so many pictures from each table")
    command.add_argument(
        "--seed", type=int, default=2020, metavar="N", help="of samples and subsets (default %(default)s)"
    )
    _add_force(command)
    _add_json(command)


def _add_compare(add: Any) -> None:
    command = add(
        "compare",
        "set the scores of several models side by side",
        "Compares finished tables, or the last tables of job folders, on the prompts that all\n"
        "of them have: means with intervals, coverage, the mean in which a failed generation is\n"
        "the worst score, wins and losses by prompt. Refuses below 99 % of the expected scores.",
        "dataflow compare flux_images sdxl_images\n"
        "dataflow compare a.jsonl b.parquet c.csv --metric alignment.value --worst alignment.value=0\n"
        "dataflow compare a b --metric lpips --lower-better lpips --json comparison.json",
    )
    command.add_argument("tables", metavar="TABLE", nargs="+", help="finished table or job folder, two or more")
    command.add_argument(
        "--metric",
        action="append",
        metavar="KEY",
        help="a score, as `judge.value`; repeatable (default: all in common)",
    )
    command.add_argument(
        "--match",
        action="append",
        metavar="COLUMN",
        help="what tells rows apart; repeatable (default: prompt_id, else the prompt)",
    )
    _add_lower_better(command)
    command.add_argument(
        "--worst",
        action="append",
        type=_key_and_number,
        metavar="KEY=X",
        help="the score of a picture that was never made, in the strict mean (default: the worst one seen)",
    )
    command.add_argument(
        "--resamples", type=_positive, metavar="N", help="of the bootstrap (default 10000, fewer for large tables)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default %(default)s)")
    _add_force(command)
    command.add_argument("--markdown", action="store_true", help="tables as Markdown")
    _add_json(command)


def _add_calibrate(add: Any) -> None:
    command = add(
        "calibrate",
        "how far scores agree with people",
        "Sets ratings by people against every score of a table: rank correlations, pair accuracy\n"
        "and agreement among the raters, with intervals. RATINGS is a table with one rating a row,\n"
        "or with the columns first, second and choice (first, second or tie).",
        "dataflow calibrate ratings.csv --table my_images --key image --rating score\n"
        "dataflow calibrate ratings.csv --table scored.jsonl --key prompt_id --map maps.json --rating-at-least 4\n"
        "dataflow calibrate choices.csv --table scored.jsonl --metric judge.value",
    )
    command.add_argument("ratings", metavar="RATINGS", help="table (.jsonl, .json, .csv, .parquet)")
    command.add_argument("--table", required=True, metavar="SCORED", help="scored table or job folder")
    command.add_argument(
        "--key", default="image", metavar="COLUMN", help="of the ratings: what was rated (default %(default)s)"
    )
    command.add_argument(
        "--table-key", metavar="COLUMN", help="of the table: the same things (default: --key, else the image column)"
    )
    command.add_argument(
        "--image-column",
        default="images",
        metavar="NAME",
        help="of the table: the pictures that were scored (default %(default)s)",
    )
    command.add_argument("--rating", default="rating", metavar="COLUMN", help="of the ratings (default %(default)s)")
    command.add_argument("--rater", metavar="COLUMN", help="of the ratings: who (default: rater, where there is one)")
    command.add_argument("--pairs", action="store_true", help="RATINGS are choices between two")
    command.add_argument(
        "--within", metavar="COLUMN", help="of the table: pairs are made, and draws taken, by this, such as the prompt"
    )
    command.add_argument("--metric", action="append", metavar="KEY", help="a score; repeatable (default: all)")
    _add_lower_better(command)
    command.add_argument(
        "--ties",
        choices=("half", "wrong", "skip"),
        default="half",
        help="what a pair counts as that only the metric ties (default %(default)s)",
    )
    command.add_argument(
        "--level",
        choices=("ordinal", "interval", "nominal"),
        default="ordinal",
        help="of Krippendorff's alpha (default %(default)s)",
    )
    command.add_argument("--map", metavar="FILE.json", help="write the expected rating as a function of each score")
    command.add_argument(
        "--rating-at-least", type=float, metavar="X", help="with --map: the score at which a rating of X is expected"
    )
    command.add_argument("--resamples", type=_positive, default=1000, metavar="N", help="(default %(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default %(default)s)")
    _add_json(command)


def _add_benchmark(add: Any, common: argparse.ArgumentParser, formatter: Any) -> None:
    names = ", ".join(FORMATS)
    command = add(
        "benchmark",
        "prompts of a published benchmark, and its own table of the scores",
        "`prompts` makes a table of a published prompt set that you have; generating and scoring it\n"
        "are ordinary steps; `report` makes the benchmark's own table of the result; `run` does all\n"
        "three with the steps of a pipeline file, whose [storage] is left out of account.\n"
        f"FORMAT: {names}.",
        "dataflow benchmark prompts geneval evaluation_metadata.jsonl -o prompts.jsonl\n"
        "dataflow benchmark report geneval my_images --score objects\n"
        "dataflow benchmark run geneval evaluation_metadata.jsonl pipeline.toml -o flux_geneval\n"
        "dataflow benchmark report gedit my_edits --score semantic=sc.success,sc.overdone"
        " --score quality=pq.natural,pq.artifacts",
    )
    actions = command.add_subparsers(dest="action", metavar="prompts|report|run", required=True)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        found = actions.add_parser(
            name, help=summary, description=summary, formatter_class=formatter, parents=[common], allow_abbrev=False
        )
        found.add_argument("format", metavar="FORMAT", choices=FORMATS, help=names)
        return found

    prompts = action("prompts", "a published prompt set as a table")
    prompts.add_argument("path", metavar="PATH", help="its file or folder, as published")
    prompts.add_argument("-o", "--output", required=True, metavar="TABLE", help=".jsonl, .json, .csv or .parquet")
    prompts.add_argument(
        "--images", metavar="DIR", help="source pictures of an edit set: where they are, or where to write them"
    )
    report = action("report", "the benchmark's own table of a scored table")
    report.add_argument("table", metavar="TABLE", help="scored table or job folder")
    _add_report(report)
    run = action("run", "generate, score and report with the steps of a pipeline file")
    run.add_argument("path", metavar="PATH", help="the prompt set's file or folder, as published")
    run.add_argument("pipeline", metavar="PIPELINE", help="the steps that generate and score")
    run.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the job")
    run.add_argument(
        "--images", metavar="DIR", help="source pictures of an edit set: where they are, or where to write them"
    )
    _add_report(run)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--score",
        action="append",
        metavar="[NAME=]KEY",
        help="where the scores stand (default: the only score column); gedit has semantic= and quality=",
    )
    command.add_argument("--compat", choices=("ella",), help="dpg: with the quirks of the benchmark's own program")
    _add_force(command)
    command.add_argument("--markdown", action="store_true", help="a row as papers print it")
    _add_json(command)


def _add_lower_better(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lower-better", action="append", metavar="KEY", help="less of it is better; repeatable")


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="also below 99 %% of the expected scores")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead, or write it to FILE beside the text"
    )


def _key_and_number(text: str) -> tuple[str, float]:
    key, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not key or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected KEY=NUMBER, found {text!r}")
    return key, number


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)
