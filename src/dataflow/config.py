"""``pipeline.toml`` as frozen dataclasses, and those as objects; the only table from a name to a class.

::

    [storage]                              # arguments of FileStorage
    first_entry_file_name = "prompts.jsonl"
    cache_path = "out"

    [images]                               # arguments of ImageIO; optional
    format = "png"                         # save_path is cache_path/images where nothing is said

    [serving.flux]                         # as many as there are models, each under a name of its own
    type = "local"                         # or "chat", "openai_images", "gemini", "fake", "package.module:Class"
    hf_model_name_or_path = "black-forest-labs/FLUX.1-dev"
    batch_size = 4                         # all other keys are arguments of the class

    [serving.judge]
    type = "judge"
    service = "qwen"                       # another [serving.NAME], which then answers with words
    rubric = "rubric.toml"                 # or "alignment", "edit"

    [[step]]                               # in order
    operator = "Text2ImageGenerator"       # or "package.module:Class"
    serving = "flux"                       # may be left out where there is only one
    seed = 0
    input_conversation_key = "conversations"
    output_image_key = "images"

    [accept]                               # arguments of AcceptanceLoop; optional: the steps are repeated until
    wanted = 4                             # every prompt has so many images that the last step kept
    maximum = 20

    [run]                                  # RunOptions; optional
    max_failed_fraction = 0.5
    budget_usd = 25.0                      # for each step, over all its runs

    [report]                               # ReportOptions; optional: a page is written when the last step has ended
    output = "report"                      # cache_path/report where nothing is said

    [[export]]                             # ExportOptions; optional: as many datasets as there are tables
    output = "dataset"
    format = "webdataset"

Relative paths are relative to the folder of the file, wherever it is run from. Everything is checked before anything
runs, against the signatures of the classes themselves: unknown keys, wrong types, missing keys.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from dataflow.acceptance import AcceptanceLoop
from dataflow.config_checks import SERVICE, arguments, class_of, construct, known, parameters, shown
from dataflow.config_names import OPERATORS, SERVINGS
from dataflow.errors import ConfigError
from dataflow.export.options import ExportOptions
from dataflow.io import ImageIO
from dataflow.pipeline import Operator, Pipeline, Step, did_you_mean, listed
from dataflow.places import Place, not_toml
from dataflow.report.options import ReportOptions
from dataflow.runtime.engine import RunOptions
from dataflow.serving.judge import RUBRICS, Rubric, read_rubric
from dataflow.types import Serving
from dataflow.utils.storage import FileStorage

_TASKS = {"Text2ImageGenerator": "text2image", "PromptedImageEditGenerator": "imageedit"}
"""What a local model must have been told to do, for the operators that need one or the other."""

RESOURCES = ("num_cpus", "num_gpus", "memory_gb")
"""Keys that every serving has: what one copy takes on a cluster."""

_TABLES = ("storage", "images", "serving", "step", "accept", "run", "report", "export")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """One ``[serving.NAME]``.

    Attributes:
        type: a key of :data:`SERVINGS` or ``module:Class``.
        arguments: of the class's constructor, ``image_io`` apart.
        resources: what one copy takes on a cluster, :data:`RESOURCES` by name.
    """

    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """One ``[[step]]``.

    Attributes:
        operator: a key of :data:`OPERATORS` or ``module:Class``.
        serving: name of the serving; None for an operator without one.
        arguments: of the operator's constructor, ``pipe`` and ``options`` apart.
        keys: of its ``plan``.
    """

    operator: str
    serving: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """One ``[report]`` or ``[[export]]``.

    Attributes:
        output: folder.
        arguments: of :class:`~dataflow.report.options.ReportOptions` or
            :class:`~dataflow.export.options.ExportOptions`.
    """

    output: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """A whole pipeline file, checked, with absolute paths.

    Attributes:
        here: what to call it in messages, with its text for the lines.
        storage: arguments of :class:`~dataflow.utils.storage.FileStorage`.
        images: arguments of :class:`~dataflow.io.ImageIO`.
        servings: by name.
        steps: in order.
        run: how steps are run.
        accept: arguments of :class:`~dataflow.acceptance.AcceptanceLoop`; None runs the steps once.
        report: the page that is written in the end.
        exports: the datasets that are.
    """

    here: Place = field(compare=False)
    storage: Mapping[str, Any]
    images: Mapping[str, Any]
    servings: Mapping[str, ServingConfig]
    steps: tuple[StepConfig, ...]
    run: Mapping[str, Any]
    accept: Mapping[str, Any] | None = None
    report: OutputConfig | None = None
    exports: tuple[OutputConfig, ...] = ()

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return Path(self.storage["cache_path"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The objects a configuration describes; nothing is loaded yet."""

    storage: FileStorage
    images: ImageIO
    servings: Mapping[str, Serving]
    pipeline: Pipeline
    options: RunOptions


def load(path: str | os.PathLike[str], storage: Mapping[str, Any] | None = None) -> PipelineConfig:
    """Read and check a pipeline file.

    Args:
        path: of the file.
        storage: in place of its ``[storage]`` table, with absolute paths; pictures then go beside the tables.

    Raises:
        ConfigError: it cannot be read or used; says file, line, table, key and what is allowed there.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(not_toml(str(file), text, error)) from error
    if storage is not None:
        images = {key: value for key, value in document.get("images", {}).items() if key != "save_path"}
        document |= {"storage": dict(storage), "images": images}
    return _parsed(document, Place(str(file), file.absolute().parent, text))


def parse(document: Mapping[str, Any], *, folder: Path, source: str) -> PipelineConfig:
    """Check a document as :mod:`tomllib` gives it.

    Args:
        document: the tables.
        folder: what relative paths are relative to.
        source: what to call the document in messages.

    Raises:
        ConfigError: it cannot be used.
    """
    return _parsed(document, Place(source, folder))


def _parsed(document: Mapping[str, Any], here: Place) -> PipelineConfig:
    known(here, document, _TABLES, "table")
    storage = arguments(here / "storage", _table(here, document, "storage"), FileStorage)
    storage.setdefault("cache_path", str(here.folder / "cache"))
    images = _table(here, document, "images", {})
    images = {"save_path": str(Path(storage["cache_path"], "images")), **images}
    tables = _table(here, document, "serving", {})
    servings = {name: _serving(here / "serving" / name, table) for name, table in tables.items()}
    for name in servings:
        _check_service(here / "serving" / name, name, servings)
    steps = document.get("step", [])
    if not isinstance(steps, list) or not steps:
        here.fail("at least one [[step]] is needed (two brackets each side)")
    run = arguments(here / "run", _table(here, document, "run", {}), RunOptions)
    _in_range(here / "run", run)
    return PipelineConfig(
        here=here,
        storage=storage,
        images=arguments(here / "images", images, ImageIO),
        servings=servings,
        steps=tuple(_step(here / "step" / n, table, servings) for n, table in enumerate(steps)),
        run=run,
        accept=_accept(here / "accept", document.get("accept")),
        report=_report(here / "report", document.get("report"), storage["cache_path"]),
        exports=tuple(_exports(here, document.get("export", []))),
    )


def build(config: PipelineConfig, options: RunOptions | None = None) -> Job:
    """Make the objects. Constructors only store, so no model is loaded and nothing is written.

    Args:
        config: from :func:`load` or :func:`parse`.
        options: in place of the configuration's own.

    Raises:
        ConfigError: a constructor refuses a value.
    """
    here = config.here
    storage = construct(here / "storage", FileStorage, config.storage)
    images = construct(here / "images", ImageIO, config.images)
    servings = {name: _built(name, config, images) for name in config.servings}
    steps = []
    for number, step in enumerate(config.steps):
        place = here / "step" / number
        pipe = {} if step.serving is None else {"pipe": servings[step.serving]}
        operator: Operator = construct(
            place, class_of(place, "operator", step.operator, OPERATORS), {**pipe, **step.arguments}
        )
        steps.append(Step(operator, step.keys, place))
    return Job(
        storage=storage,
        images=images,
        servings=servings,
        pipeline=Pipeline(steps) if config.accept is None else _loop(here / "accept", steps, config.accept),
        options=options or run_options(config),
    )


def _built(name: str, config: PipelineConfig, images: ImageIO | None) -> Serving:
    """One serving, with one of its own for each that it asks; those answer with words and get no ``images``."""
    serving, place = config.servings[name], config.here / "serving" / name
    kind = class_of(place, "type", serving.type, SERVINGS)
    takes, given = parameters(kind), dict(serving.arguments)
    if "image_io" in takes and images is not None:
        given["image_io"] = images
    if "vectors" in takes:
        given.setdefault("vectors", str(config.folder / "vectors"))
    if SERVICE in given:
        given[SERVICE] = _built(given[SERVICE], config, None)
    if "rubric" in given:
        given["rubric"] = _rubric(place, given["rubric"])
    made = construct(place, kind, given)
    for key, value in serving.resources.items():
        setattr(made, key, value)
    return made


def _rubric(place: Place, value: Any) -> Rubric:
    try:
        return RUBRICS[value]() if value in RUBRICS else read_rubric(value)
    except ConfigError as error:
        raise ConfigError(f"{place.label('rubric')}: {error}") from error


def run_options(config: PipelineConfig, **changes: Any) -> RunOptions:
    """How the configuration wants steps to be run, with ``changes`` on top."""
    return RunOptions(**{**config.run, **changes})


def dump(config: PipelineConfig, folder: Path) -> str:
    """The configuration as the text of a pipeline file that is to lie in ``folder``.

    Paths inside the folder are written relative to it, so that the folder may be moved as a whole; others are absolute.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - must not follow links
    document: dict[str, Any] = {"storage": config.storage, "images": config.images}
    if config.accept:
        document["accept"] = config.accept
    if config.run:
        document["run"] = config.run
    if config.report:
        document["report"] = {"output": config.report.output, **config.report.arguments}
    document["serving"] = {name: {"type": s.type, **s.arguments, **s.resources} for name, s in config.servings.items()}
    parts = [tomli_w.dumps(_plain(document, folder))]
    for step in config.steps:
        serving = {"serving": step.serving} if step.serving else {}
        table = {"operator": step.operator, **serving, **step.arguments, **step.keys}
        # Given the list of steps, tomli_w would write short ones as one long line.
        parts.append(tomli_w.dumps(_plain({"step": table}, folder)).replace("[step]", "[[step]]", 1))
    for each in config.exports:
        table = {"output": each.output, **each.arguments}
        parts.append(tomli_w.dumps(_plain({"export": table}, folder)).replace("[export]", "[[export]]", 1))
    return "\n".join(parts)


def _table(place: Place, document: Mapping[str, Any], name: str, default: Any = None) -> dict[str, Any]:
    value = document.get(name, default)
    if value is None:
        place.fail(f"the table [{name}] is missing")
    if not isinstance(value, dict):
        place.fail(f"must be a table, found {shown(value)}", name)
    return value


def _serving(place: Place, table: Any) -> ServingConfig:
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {shown(table)}; a serving has a name: [serving.NAME]")
    kind = table.get("type")
    if kind is None:
        place.fail(f"the key 'type' is missing; choose {listed(SERVINGS)} or \"package.module:Class\"")
    resources = {key: _amount(place, key, table[key]) for key in RESOURCES if key in table}
    given = {key: value for key, value in table.items() if key != "type" and key not in resources}
    serving = class_of(place, "type", kind, SERVINGS)
    if not hasattr(serving, "generate"):
        place.fail(f"{kind} is no serving: it has no method 'generate'", "type")
    taken = arguments(place, given, serving, skip=("image_io",))
    return ServingConfig(type=kind, arguments=taken, resources=resources)


def _amount(place: Place, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        place.fail(f"must be a number from 0, found {shown(value)}", key)
    return float(value)


def _check_service(place: Place, asking: str, servings: Mapping[str, ServingConfig]) -> None:
    name = servings[asking].arguments.get(SERVICE)
    if name is None:
        return
    if name not in servings:
        place.fail(
            f"there is no [serving.{name}]{did_you_mean(str(name), servings)}; there are {listed(servings)}", SERVICE
        )
    if name == asking:
        place.fail("it would ask itself: name a serving of type 'chat', 'local_vlm' or the like", SERVICE)
    if SERVICE in servings[name].arguments:
        place.fail(f"{name!r} asks another one itself ({servings[name].arguments[SERVICE]!r}): name that one", SERVICE)


def _step(place: Place, table: Any, servings: Mapping[str, ServingConfig]) -> StepConfig:
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {shown(table)}")
    name = table.get("operator")
    if name is None:
        place.fail(f"the key 'operator' is missing; choose {listed(OPERATORS)} or \"package.module:Class\"")
    operator = class_of(place, "operator", name, OPERATORS)
    if not hasattr(operator, "plan"):
        place.fail(f"{name} is no operator: it has no method 'plan'", "operator")
    constructor = set(parameters(operator)) - {"pipe", "options"}
    rest = {key: value for key, value in table.items() if key not in ("operator", "serving")}
    keys = parameters(operator.plan)
    known(place, rest, [*sorted(constructor), *keys], "key", also=("operator", "serving"))
    return StepConfig(
        operator=name,
        serving=_serving_of(place, name, operator, table.get("serving"), servings),
        arguments=arguments(
            place,
            {key: value for key, value in rest.items() if key in constructor},
            operator,
            skip=("pipe", "options"),
        ),
        keys=arguments(place, {key: value for key, value in rest.items() if key in keys}, operator.plan),
    )


def _serving_of(place: Place, operator: str, kind: Any, name: Any, servings: Mapping[str, ServingConfig]) -> str | None:
    if "pipe" not in parameters(kind):
        if name is not None:
            place.fail(f"{operator} takes none: remove the line", "serving")
        return None
    if name is None and len(servings) == 1:
        name = next(iter(servings))
    if name is None:
        place.fail(f"the key 'serving' is missing; there are {listed(servings) or 'none: add a [serving.NAME]'}")
    if not isinstance(name, str) or name not in servings:
        place.fail(
            f"there is no [serving.{name}]{did_you_mean(str(name), servings)};"
            f" there are {listed(servings) or 'none: add a [serving.NAME]'}",
            "serving",
        )
    task = servings[name].arguments.get("Image_gen_task", "text2image")
    if servings[name].type == "local" and _TASKS.get(operator, task) != task:
        place.fail(
            f'{operator} needs a serving with Image_gen_task = "{_TASKS[operator]}", {name!r} has "{task}":'
            " add a [serving.NAME] of its own (it may name the same model)",
            "serving",
        )
    return name


def _accept(place: Place, table: Any) -> dict[str, Any] | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {shown(table)}")
    return arguments(place, table, AcceptanceLoop, skip=("steps",))


def _report(place: Place, table: Any, folder: str) -> OutputConfig | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {shown(table)}")
    return _output(place, {"output": os.path.join(folder, "report"), **table}, ReportOptions)  # noqa: PTH118 - text


def _exports(here: Place, tables: Any) -> Iterator[OutputConfig]:
    if not isinstance(tables, list):
        here.fail("must be written [[export]], with two brackets each side", "export")
    for number, table in enumerate(tables):
        place = here / "export" / number
        if not isinstance(table, dict):
            place.fail(f"must be a table, found {shown(table)}")
        yield _output(place, table, ExportOptions)
    outputs = [table.get("output") for table in tables]
    for number, output in enumerate(outputs):
        if output in outputs[:number]:
            (here / "export" / number).fail(f"another export writes to {output!r}, too", "output")


def _output(place: Place, table: Mapping[str, Any], options: type) -> OutputConfig:
    given = {key: value for key, value in table.items() if key != "output"}
    known(place, given, parameters(options), "key", also=("output",))
    checked = arguments(place, given, options)
    construct(place, options, checked)
    folder = {key: value for key, value in table.items() if key == "output"}
    return OutputConfig(output=arguments(place, folder, _written)["output"], arguments=checked)


def _written(output: str) -> None:
    """What every report and export is told beside its options: the folder."""


def _loop(place: Place, steps: list[Step], arguments: Mapping[str, Any]) -> AcceptanceLoop:
    return construct(place, AcceptanceLoop, {"steps": steps, **arguments})


def _in_range(place: Place, run: Mapping[str, Any]) -> None:
    if not 0 <= run.get("max_failed_fraction", 0.5) <= 1:
        place.fail(f"must be from 0 to 1, found {run['max_failed_fraction']}", "max_failed_fraction")
    if run.get("max_attempts", 1) < 1:
        place.fail(f"must be a whole number from 1, found {run['max_attempts']}", "max_attempts")
    if (run.get("pilot") or 1) < 1:
        place.fail(f"must be a whole number from 1, found {run['pilot']}", "pilot")
    budget = run.get("budget_usd")
    if budget is not None and not budget > 0:
        place.fail(f"must be more than 0 US dollars, found {budget}", "budget_usd")


def _plain(value: Any, folder: Path) -> Any:
    """The value as TOML can say it, with paths inside ``folder`` relative to it."""
    if isinstance(value, Mapping):
        return {key: _plain(item, folder) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, folder) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(folder):
        inside = Path(value).relative_to(folder).as_posix()
        return inside if inside == "." else f"./{inside}"
    return value
