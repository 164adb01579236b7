"""The arguments of ``export``."""

from __future__ import annotations

import argparse
import re
from typing import Any

# As in dataflow.export.options, which would bring Pillow and numpy along for a --help.
FORMATS = ("webdataset", "parquet", "folder", "jsonl", "lance")
LAYOUTS = ("text_image", "edit", "multi_turn", "preference")
ENCODINGS = ("jpeg", "webp", "png")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_export(add: Any) -> None:
    """Add the command with ``add``, as the command line makes all of them."""
    command = add(
        "export",
        "a finished table as a dataset that others load",
        "Writes the pictures, texts and scores of a finished table as WebDataset shards, Hugging\n"
        "Face parquet, an image folder, JSON Lines or Lance, with a dataset card and checksums.\n"
        "The same command again goes on where it stopped. Exit code 1 if a picture could not be\n"
        "used; rows without pictures are counted and left out.",
        "dataflow export my_images -o dataset\n"
        "dataflow export my_images -o hub --format parquet --validation 0.02 --license cc-by-4.0\n"
        "dataflow export my_images -o train --format folder --encode jpeg --bucket 1024 --captions\n"
        "dataflow export my_edits -o pairs --preset omniedit --fill o_score=judge.value\n"
        "dataflow export best_of_4 -o dpo --format parquet --layout preference --score judge.value",
        usage="dataflow export CACHE -o OUT [--format NAME] [--preset NAME] [options]",
    )
    command.add_argument("table", metavar="CACHE", nargs="?", help="job folder, or a finished table")
    command.add_argument("-o", "--output", metavar="OUT", help="folder of the dataset")
    command.add_argument("--format", choices=FORMATS, help="default: the preset's, else webdataset")
    command.add_argument("--preset", metavar="NAME", help="columns and files of a published dataset; `list` names them")
    command.add_argument("--layout", choices=LAYOUTS, help="what a sample is (default: told by the columns)")
    command.add_argument("--overwrite", action="store_true", help="begin anew where OUT holds another export")
    command.add_argument("--json", action="store_true", help="print the counts as JSON")
    _add_columns(command.add_argument_group("columns"))
    _add_splits(command.add_argument_group("splits and shards"))
    _add_pictures(command.add_argument_group("pictures"))
    _add_card(command.add_argument_group("dataset card and addresses"))


def _add_columns(group: Any) -> None:
    group.add_argument("--image-column", dest="image_key", metavar="NAME", help="pictures that were made")
    group.add_argument("--source-column", dest="source_key", metavar="NAME", help="pictures that were edited")
    group.add_argument("--column", dest="prompt_key", metavar="NAME", help="prompts or instructions")
    group.add_argument("--rejected-column", dest="rejected_key", metavar="NAME", help="preference: losers of a filter")
    group.add_argument("--score", dest="score_key", metavar="KEY", help="preference: best against worst by this score")
    group.add_argument(
        "--preference-column", dest="preference_key", metavar="NAME", help="preference: a pair's verdict"
    )
    group.add_argument("--lower-better", action="store_true", help="less of --score is better")
    group.add_argument("--min-margin", type=float, default=0.0, metavar="X", help="least difference of --score")
    group.add_argument("--keep", dest="columns", action="append", metavar="NAME", help="only these columns; repeatable")
    group.add_argument("--exclude", action="append", metavar="NAME", help="all columns but these; repeatable")
    group.add_argument(
        "--rename", action="append", type=_pair, metavar="OLD=NEW", help="another name for a column; repeatable"
    )
    group.add_argument(
        "--fill", action="append", type=_pair, metavar="NEW=KEY", help="a column from another, as o_score=judge.value"
    )
    group.add_argument(
        "--scores-of", action="append", type=_pair, metavar="SCORE=COLUMN", help="whose pictures a score is about"
    )
    group.add_argument("--published-only", action="store_true", help="with --preset: no columns beside its own")


def _add_splits(group: Any) -> None:
    group.add_argument("--validation", type=float, default=0.0, metavar="X", help="share of the prompts, 0 to 1")
    group.add_argument("--test", type=float, default=0.0, metavar="X", help="share of the prompts, 0 to 1")
    group.add_argument(
        "--split-by", default="prompt", metavar="NAME", help="prompt, source or a column (default %(default)s)"
    )
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="of the draw (default %(default)s)")
    group.add_argument("--shard-samples", type=int, metavar="N", help="most samples of a shard (default 10000)")
    group.add_argument("--shard-size", dest="shard_bytes", type=_size, metavar="SIZE", help="most bytes, as 500MB")


def _add_pictures(group: Any) -> None:
    group.add_argument("--encode", choices=ENCODINGS, help="write all pictures so (default: files as they are)")
    group.add_argument("--quality", type=int, default=95, metavar="N", help="1 to 100; webp 100 is lossless")
    group.add_argument("--max-side", type=int, metavar="N", help="make pictures with a longer side smaller")
    group.add_argument("--bucket", dest="bucket_resolution", type=int, metavar="N", help="buckets of about N × N")
    group.add_argument("--bucket-step", type=int, default=64, metavar="N", help="sides are multiples of it")
    group.add_argument("--bucket-max-aspect", type=float, default=2.0, metavar="X", help="widest bucket")
    group.add_argument("--bucket-fit", choices=("crop", "pad"), default="crop", help="default %(default)s")
    group.add_argument("--check", choices=("checksum", "decode"), default="checksum", help="how pictures are checked")
    group.add_argument("--captions", action="store_true", help="folder: a text file beside each picture")
    group.add_argument("--copy-images", action="store_true", help="jsonl: write the pictures, too")
    group.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core, eight at most)")


def _add_card(group: Any) -> None:
    group.add_argument("--name", metavar="TEXT", help="title of the dataset card")
    group.add_argument("--license", metavar="NAME", help="of the dataset, as cc-by-4.0")
    group.add_argument("--base-url", metavar="URL", help="jsonl: pictures by their address")
    group.add_argument("--image-root", metavar="DIR", help="folder that --base-url stands for (default: the table's)")


def _pair(text: str) -> tuple[str, str]:
    first, sign, second = text.partition("=")
    if not (first and sign and second):
        raise argparse.ArgumentTypeError(f"expected NAME=NAME, found {text!r}")
    return first, second


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])
