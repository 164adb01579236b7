"""Writes docs/cli.md from the command line's own help: ``python docs/cli_page.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """The page as it should be."""
    os.environ["COLUMNS"] = "100"
    from dataflow.cli import build_parser

    parser = build_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parts = [
        "# Command line",
        "",
        "This page is made from the help texts.",
        "",
        "```text",
        parser.format_help().rstrip(),
        "```",
    ]
    for name, command in commands.choices.items():
        parts += ["", f"## dataflow {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
