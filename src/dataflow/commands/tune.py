"""``tune``: the fastest settings of a local model on this machine, or how fast the present ones are."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from dataflow import config as configuration
from dataflow.commands.folder import shown
from dataflow.commands.layout import NONE, give, number, percent, text_table
from dataflow.commands.options import serving_table
from dataflow.config import PipelineConfig
from dataflow.errors import ConfigError, RunInterruptedError
from dataflow.pipeline import listed
from dataflow.runtime.progress import human_bytes
from dataflow.serving.speed import Speed, measure_apart
from dataflow.tuning import Settings, Trial, Tuner

DRAW_SECONDS = 10.0
"""How long each trial draws, after loading and warming up."""

_HEADER = ("settings", "images/s", "s/image", "memory", "TFLOP/s", "of peak", "loading", "warm-up", "")


def tune(args: argparse.Namespace) -> int:
    """Try settings, or measure the present ones; print a table and the lines to use."""
    config = configuration.load(args.pipeline) if args.pipeline else None
    if config is None:
        if args.write:
            raise ConfigError("--write needs a pipeline file: dataflow tune pipeline.toml --write")
        name, base = "model", _from_options(args)
    else:
        _no_options(args)
        name, base = _from_file(config, args.serving)
    table = Path(config.here.source) if config else None

    def measure(settings: Settings, *, limit: float, count: bool) -> Speed | str:
        seconds = min(DRAW_SECONDS, args.seconds / 10)
        return measure_apart(settings, seconds=seconds, count=count, limit=limit, verbose=args.verbose)

    tuner = Tuner(base, _announced(measure, base, quiet=args.quiet), seconds=args.seconds, lossy=args.lossy)
    interrupted = False
    try:
        if args.current:
            tuner.current()
        else:
            tuner.search()
    except KeyboardInterrupt:
        interrupted = True
    report = {"serving": name, "trials": tuner.trials, "best": tuner.best, "not_tried": tuner.skipped}
    give(report, "\n".join(_lines(tuner, name, args)), args.json)
    if interrupted:
        raise RunInterruptedError("interrupted: what was measured so far stands above")
    if args.write and table is not None and tuner.best is not None and tuner.best.settings:
        kept = write_settings(table, name, tuner.best.settings)
        print(f"written into {shown(table)}; as it was: {shown(kept)}", file=sys.stderr)
    return 0 if tuner.best is not None else 1


def write_settings(file: Path, serving: str, settings: Settings) -> Path:
    """Put settings into ``[serving.NAME]`` of a pipeline file; everything else in it stays, comments too.

    Returns:
        Where the file is kept as it was.

    Raises:
        ConfigError: the file has been changed meanwhile so that it has no such table.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    data = file.read_bytes()
    try:
        document = tomlkit.parse(data.decode())
        table = document["serving"][serving]  # type: ignore[index]
        for name, value in settings.items():
            table[name] = value  # type: ignore[index]
        text = tomlkit.dumps(document)
        configuration.parse(tomllib.loads(text), folder=file.absolute().parent, source=str(file))
    except (TOMLKitError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: [serving.{serving}] cannot be changed in it: {error}") from error
    kept = _free_name(file)
    _put(kept, data, file)
    _put(file, text.encode(), file)
    return kept


def _free_name(file: Path) -> Path:
    number = 1
    while (kept := file.with_name(f"{file.name}.{number}.bak")).exists():
        number += 1
    return kept


def _put(path: Path, data: bytes, like: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
        try:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
            os.chmod(part.name, like.stat().st_mode & 0o777)  # noqa: PTH101 - by its name only
            os.replace(part.name, path)  # noqa: PTH105 - the same
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


# What is tuned -----------------------------------------------------------------------------------------------------


def _from_options(args: argparse.Namespace) -> dict[str, Any]:
    table = serving_table(args, "imageedit" if args.edit else "text2image")
    return {key: value for key, value in table.items() if key != "type"}


def _no_options(args: argparse.Namespace) -> None:
    given = [name.removeprefix("serving.") for name, value in vars(args).items() if "." in name and value is not None]
    given += [name for name in ("size", "pipeline_arg") if getattr(args, name)] + ["edit"] * args.edit
    if given:
        raise ConfigError(f"{listed(given)}: a pipeline file says that itself; leave the options out, or the file")


def _from_file(config: PipelineConfig, wanted: str | None) -> tuple[str, dict[str, Any]]:
    local = {name: each for name, each in config.servings.items() if each.type == "local"}
    if not local:
        raise ConfigError(f"{config.here.source}: no [serving.NAME] of type 'local': there is nothing to tune")
    if wanted is None and len(local) > 1:
        raise ConfigError(f"{config.here.source}: it has {listed(local)}; say which with --serving")
    name = wanted or next(iter(local))
    if name not in local:
        raise ConfigError(f"{config.here.source}: no [serving.{name}] of type 'local'; there is {listed(local)}")
    return name, dict(local[name].arguments)


def _announced(measure: Any, base: Settings, *, quiet: bool) -> Any:
    def announced(settings: Settings, *, limit: float, count: bool) -> Speed | str:
        if not quiet:
            changed = {name: value for name, value in settings.items() if base.get(name) != value}
            print(f"trying {_named(changed)} …", file=sys.stderr)
        return measure(_one_device(settings), limit=limit, count=count)

    return announced


def _one_device(settings: Settings) -> dict[str, Any]:
    """One of several devices stands for all: each gets a process of its own."""
    device = settings.get("device")
    return {**settings, "device": device[0]} if isinstance(device, list) and device else dict(settings)


# What is said ------------------------------------------------------------------------------------------------------


def _lines(tuner: Tuner, name: str, args: argparse.Namespace) -> Iterator[str]:
    if not tuner.trials:
        yield "nothing was measured: no time was left"
        return
    best = tuner.best
    speed = next((trial.speed for trial in tuner.trials if trial.speed), None)
    if speed is not None:
        facts = speed.provenance
        yield f"{facts['pipeline']}, {facts['width']} × {facts['height']}, {facts['dtype']}, on {speed.device}"
        yield _about_peak(speed)
        yield ""
    yield text_table(_HEADER, [_row(trial, best) for trial in tuner.trials])
    yield ""
    if any(trial.pixels for trial in tuner.trials):
        yield "* other pictures, beyond rounding: with it everything made before is made again"
    if tuner.skipped:
        yield f"not tried, no time was left: {'; '.join(map(_named, tuner.skipped))} (--seconds gives more)"
    if best is None:
        yield "nothing worked"
        return
    if args.current:
        return
    yield from _advice(tuner, best, name)


def _advice(tuner: Tuner, best: Trial, name: str) -> Iterator[str]:
    assert best.speed is not None
    first = tuner.trials[0]
    if not best.settings:
        yield "best: as it is"
    else:
        faster = "" if first.speed is None else f", {_times(best, first)} as fast as it is now"
        yield f"best: {_named(best.settings)}{faster}"
        yield ""
        yield tomli_w.dumps({"serving": {name: dict(best.settings)}}).rstrip()
    rest = [trial for trial in tuner.trials if trial.speed is not None and trial.pixels and trial is not best]
    for trial in rest:
        assert trial.speed is not None
        if trial.speed.images_per_second > best.speed.images_per_second and not best.pixels:
            yield ""
            yield f"{_times(trial, best)} as fast, with other pictures: {_named(trial.settings)}; --lossy takes it"


def _about_peak(speed: Speed) -> str:
    operations = NONE if speed.flops is None else f"{speed.flops / 1e12:,.3g} TFLOP"
    peak = "its peak is not known here" if speed.peak_teraflops is None else f"its peak is {speed.peak_teraflops:,.0f}"
    return f"the denoiser takes {operations} per image; TFLOP/s are over all of the time; {peak}"


def _row(trial: Trial, best: Trial | None) -> list[str]:
    mark = "best" if trial is best else ""
    label = f"{_named(trial.settings)}{'*' if trial.pixels else ''}"
    speed = trial.speed
    if speed is None:
        return [label, *[NONE] * 7, trial.problem]
    return [
        label,
        number(speed.images_per_second, 3),
        number(speed.seconds_per_image, 3),
        human_bytes(speed.peak_bytes),
        number(speed.teraflops, 1 if (speed.teraflops or 0) >= 10 else 3),
        percent(speed.share),
        f"{speed.load_seconds:.1f} s",
        f"{speed.warm_up_seconds:.1f} s",
        mark,
    ]


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as it is"


def _times(trial: Trial, other: Trial) -> str:
    assert trial.speed is not None
    assert other.speed is not None
    return f"{trial.speed.images_per_second / other.speed.images_per_second:.2f} times"
