"""The arguments of ``watch``."""

from __future__ import annotations

from typing import Any

from dataflow.commands.options import DEFAULT_FOLDER, positive_number


def add_watch(add: Any) -> None:
    """Add the command with ``add``, as the command line makes all of them."""
    command = add(
        "watch",
        "a job as it runs: rates, what is left, failures, money",
        "Shows a running job from another terminal, and ends when the job ends. Reads only: it\n"
        "never gets in the job's way. Piped, it prints a line at each interval.",
        "dataflow watch my_images\ndataflow watch my_images --once\ndataflow watch my_images --json --interval 10",
    )
    command.add_argument("folder", metavar="OUT", nargs="?", default=DEFAULT_FOLDER, help="default ./%(default)s")
    command.add_argument(
        "--interval",
        type=positive_number,
        default=1.0,
        metavar="S",
        help="seconds between frames (default %(default)s)",
    )
    command.add_argument("--once", action="store_true", help="one frame, and no more")
    command.add_argument("--json", action="store_true", help="an object per frame, for scripts")
