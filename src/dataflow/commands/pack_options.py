"""The arguments of ``pack`` and ``unpack``."""

from __future__ import annotations

from typing import Any

from dataflow.commands.options import DEFAULT_FOLDER


def add_pack(add: Any) -> None:
    """Add both commands with ``add``, as the command line makes all of them."""
    command = add(
        "pack",
        "images of finished steps into tar files, which all commands read",
        "Moves the images of finished steps, and of finished parts of long ones, from one file\n"
        "each into tar files of some hundred megabytes with an index. Tables keep their paths:\n"
        "running again, reports, scoring, editing and exports find every picture in its pack.\n"
        "Each file is checked against its journal first. Killed, the same command goes on.",
        "dataflow pack my_images\ndataflow pack my_images --shard-size 2000",
    )
    _add_common(command)
    command.add_argument(
        "--shard-size", type=float, default=500.0, metavar="MB", help="of one tar file (default %(default)g)"
    )
    command = add(
        "unpack",
        "packed images back into files",
        "Puts all packed images of a folder back as files of their own and removes the packs.\n"
        "Killed, the same command goes on.",
        "dataflow unpack my_images",
    )
    _add_common(command)


def _add_common(command: Any) -> None:
    command.add_argument("folder", metavar="OUT", nargs="?", default=DEFAULT_FOLDER, help="default ./%(default)s")
    command.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: what the job says, or OUT/images)"
    )
    command.add_argument("--json", action="store_true", help="for scripts")
