"""A job's folder: its pipeline file, its input where the command line gave the text, its run."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dataflow import config as configuration
from dataflow.commands.options import run_changes
from dataflow.config import Job, PipelineConfig
from dataflow.errors import ConfigError, InputError
from dataflow.pipeline import CompiledStep, did_you_mean, listed
from dataflow.runtime.lock import cache_lock
from dataflow.types import Summary

JOB_FILE = "job.toml"
_HEADER = "# What this folder was made by. `dataflow run` takes this file; paths are relative to this folder.\n\n"
_EXPORT_COLUMNS = ("image_key", "source_key", "prompt_key", "rejected_key", "score_key", "preference_key")


def load_job(folder: Path) -> PipelineConfig:
    """The pipeline file of a job's folder.

    Raises:
        InputError: there is none.
        ConfigError: it cannot be used.
    """
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    if not (folder / JOB_FILE).is_file():
        raise InputError(
            f"holds no {JOB_FILE}: name the folder that `dataflow generate`, `edit`, `run` or `demo` wrote to",
            path=folder,
        )
    return configuration.load(folder / JOB_FILE)


def offline(config: PipelineConfig) -> PipelineConfig:
    """The configuration with models looked up on this machine only."""
    servings = {
        name: replace(serving, arguments={**serving.arguments, "local_files_only": True})
        if serving.type == "local"
        else serving
        for name, serving in config.servings.items()
    }
    return replace(config, servings=servings)


def check_tables(job: Job, config: PipelineConfig) -> tuple[CompiledStep, ...]:
    """As the pipeline's; a table that is not there is told with the place that names it."""
    table = Path(config.storage["first_entry_file_name"])
    if not table.exists():
        where = (config.here / "storage").label("first_entry_file_name")
        raise ConfigError(f"{where}: there is no file {shown(table)}")
    compiled = job.pipeline.check_tables(job.storage)
    _check_exports(config, compiled[-1].columns)
    return compiled


def _check_exports(config: PipelineConfig, columns: Collection[str]) -> None:
    """The columns that exports name must be in the last table.

    Args:
        config: the pipeline file.
        columns: of the last table; none where nobody knows them yet.

    Raises:
        ConfigError: one of them is not.
    """
    for number, export in enumerate(config.exports):
        for key in ("columns", "exclude", "rename", *_EXPORT_COLUMNS):
            given = export.arguments.get(key) or ()
            for name in (given,) if isinstance(given, str) else given:
                column = name.partition(".")[0]
                if columns and column not in columns:
                    where = (config.here / "export" / number).label(key)
                    raise ConfigError(
                        f"{where}: there will be no column {column!r}{did_you_mean(column, columns)};"
                        f" in the end there are {listed(columns)}"
                    )


def launch(
    config: PipelineConfig,
    args: argparse.Namespace,
    inputs: Mapping[Path, bytes] | None = None,
    retry: Sequence[str] | None = None,
) -> list[Summary]:
    """Check a configuration, keep it in its folder and run it.

    Args:
        config: what to run.
        args: ``quiet``.
        inputs: tables to write first, by path.
        retry: reasons of earlier failures to try again; None for the configuration's own choice.
    """
    changes: dict[str, object] = {"retry": frozenset(retry)} if retry else {}
    changes |= run_changes(args)
    job = configuration.build(config, configuration.run_options(config, **changes))
    job.pipeline.check_servings()
    first, last = getattr(args, "first", 1), getattr(args, "last", None)
    if not inputs and first == 1:
        check_tables(job, config)
    if not args.quiet:
        _say_which_model(config)
    with _writable(config.folder), cache_lock(config.folder, shared=bool(changes.get("share"))):
        for path, data in (inputs or {}).items():
            write_if_changed(path, data)
        text = configuration.dump(config, config.folder)
        write_if_changed(config.folder / JOB_FILE, (_HEADER + text).encode())
    summaries = job.pipeline.run(job.storage, job.options, first=first, last=last)
    if not args.quiet:
        print(f"  images: {shown(job.images.save_path)}", file=sys.stderr)
    return summaries


def exit_code(summaries: Sequence[Summary], folder: Path, args: argparse.Namespace) -> int:
    """0 if every row is done or was dropped on purpose, else 1, with the next command to try."""
    if not any(summary.refused or summary.failed for summary in summaries):
        return 0
    if not args.quiet:
        again = f"dataflow retry {shown(folder)}"
        refused = not any(summary.failed for summary in summaries)
        print(f"try what failed again: {again}{' --reason refused' if refused else ''}", file=sys.stderr)
    return 1


def shown(path: Path) -> str:
    """The path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def write_if_changed(path: Path, data: bytes) -> None:
    """Replace a file atomically, unless it holds this already: its date tells whether a job changed."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _say_which_model(config: PipelineConfig) -> None:
    for serving in config.servings.values():
        if serving.type == "local" and "hf_model_name_or_path" not in serving.arguments:
            print(
                "note: no model is named: the small built-in one draws a few shapes, colours and places at 64 × 64.\n"
                "      --model names a real one, such as black-forest-labs/FLUX.1-dev or a folder.",
                file=sys.stderr,
            )
            return


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"the folder {folder} cannot be written: {error.strerror}") from error
