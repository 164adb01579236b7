"""The arguments of ``report``."""

from __future__ import annotations

from typing import Any

from dataflow.commands.options import DEFAULT_FOLDER


def add_report(add: Any) -> None:
    """Add the command with ``add``, as the command line makes all of them."""
    command = add(
        "report",
        "a page to look at: what was kept, what was lost and why, every picture",
        "Writes a folder with a page that opens from disk, without a server or a network: the\n"
        "funnel from rows to kept pictures with every loss and its reason, money and time, score\n"
        "distributions with their thresholds, a gallery that sorts and filters by any column,\n"
        "before and after of edits. Several folders are compared prompt by prompt, also blind.\n"
        "The same command again takes over the small pictures it has made.",
        "dataflow report my_images\n"
        "dataflow report my_images -o report --title 'Foxes, first try'\n"
        "dataflow report flux_images sdxl_images -o flux_against_sdxl",
        usage="dataflow report CACHE [CACHE ...] [-o OUT] [options]",
    )
    command.add_argument(
        "folders", metavar="CACHE", nargs="*", default=[DEFAULT_FOLDER], help="folder of a job (default ./%(default)s)"
    )
    command.add_argument("-o", "--output", metavar="OUT", help="folder of the report (default CACHE/report)")
    command.add_argument("--title", default="", metavar="TEXT", help="heading (default: the names of the folders)")
    command.add_argument(
        "--thumbnail-size", type=int, default=192, metavar="N", help="pixels of small pictures (default %(default)s)"
    )
    command.add_argument(
        "--thumbnail-quality", type=int, default=78, metavar="N", help="1 to 100 (default %(default)s)"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="that make them (default: one per core, 8 at most)",
    )
    command.add_argument(
        "--copy-originals",
        action="store_true",
        help="copy pictures that are in packs or object stores into the report, so that the page can open them",
    )
    command.add_argument(
        "--prompt-column", default="", metavar="NAME", help="column with the prompt (default: what the steps say)"
    )
