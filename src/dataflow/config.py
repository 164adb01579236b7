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

Relative paths are relative to the folder of the file, wherever it is run from. Everything is checked before anything
runs, against the signatures of the classes themselves: unknown keys, wrong types, missing keys.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from dataflow.acceptance import AcceptanceLoop
from dataflow.annotations import choices, converted, described, fits, hints_of
from dataflow.errors import ConfigError
from dataflow.io import ImageIO
from dataflow.pipeline import Operator, Pipeline, Step, did_you_mean, listed
from dataflow.runtime.engine import RunOptions
from dataflow.serving.judge import RUBRICS, Rubric, read_rubric
from dataflow.types import Serving
from dataflow.utils.storage import FileStorage

SERVINGS = {
    "local": "dataflow.serving.local_image_gen_serving:LocalImageGenServing",
    "chat": "dataflow.serving.api_vlm_serving_openai:APIVLMServing_openai",
    "openai_images": "dataflow.serving.openai_image_serving:OpenAIImageServing",
    "gemini": "dataflow.serving.gemini_image_serving:GeminiImageServing",
    "image_probe": "dataflow.serving.image_probe:ImageProbeServing",
    "embedding": "dataflow.serving.embedding:EmbeddingServing",
    "clip": "dataflow.serving.clip:ClipServing",
    "clip_edit": "dataflow.serving.clip:ClipEditServing",
    "aesthetic": "dataflow.serving.clip:AestheticServing",
    "pick_score": "dataflow.serving.clip:PickScoreServing",
    "hps_v2": "dataflow.serving.clip:HPSv2Serving",
    "local_vlm": "dataflow.serving.local_vlm_serving:LocalVLMServing",
    "preservation": "dataflow.serving.preservation:PreservationServing",
    "zero_shot_detection": "dataflow.serving.detection:ZeroShotDetectionServing",
    "ocr": "dataflow.serving.ocr:OcrServing",
    "nsfw": "dataflow.serving.nsfw:NsfwServing",
    "pyiqa": "dataflow.serving.pyiqa_metric:PyiqaServing",
    "judge": "dataflow.serving.judge:JudgeServing",
    "answers": "dataflow.serving.answers:AnswerServing",
    "pair_judge": "dataflow.serving.pair_judge:PairJudge",
    "fake": "dataflow.serving.fake_serving:FakeServing",
}
OPERATORS = {
    "Text2ImageGenerator": "dataflow.operators.core_vision.text2image_generator:Text2ImageGenerator",
    "PromptedImageEditGenerator": (
        "dataflow.operators.core_vision.prompted_image_edit_generator:PromptedImageEditGenerator"
    ),
    "ImageEvaluator": "dataflow.operators.core_vision.image_evaluator:ImageEvaluator",
    "QuestionEvaluator": "dataflow.operators.core_vision.question_evaluator:QuestionEvaluator",
    "EditEvaluator": "dataflow.operators.core_vision.edit_evaluator:EditEvaluator",
    "ObjectEvaluator": "dataflow.operators.core_vision.object_evaluator:ObjectEvaluator",
    "PairEvaluator": "dataflow.operators.core_vision.pair_evaluator:PairEvaluator",
    "ScoreFilter": "dataflow.operators.core_vision.score_filter:ScoreFilter",
    "DuplicateFilter": "dataflow.operators.core_vision.duplicate_filter:DuplicateFilter",
}

_TASKS = {"Text2ImageGenerator": "text2image", "PromptedImageEditGenerator": "imageedit"}
"""What a local model must have been told to do, for the operators that need one or the other."""

_PATHS = frozenset({"first_entry_file_name", "cache_path", "save_path", "hf_cache_dir", "hf_local_dir", "log"}) | {
    "price_table",
    "model_table",
    "vectors",
    "head",
    "checkpoint",
    "lpips_weights",
    "lpips_heads",
    "dists_weights",
    "dists_mixing",
}
_NAMES_OR_PATHS = frozenset({"hf_model_name_or_path", "lora", "rubric"})
_SERVICE = "service"
"""The argument of a serving that names another one."""
_TABLES = ("storage", "images", "serving", "step", "accept", "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """One ``[serving.NAME]``.

    Attributes:
        type: a key of :data:`SERVINGS` or ``module:Class``.
        arguments: of the class's constructor, ``image_io`` apart.
    """

    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


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
class PipelineConfig:
    """A whole pipeline file, checked, with absolute paths.

    Attributes:
        source: what to call it in messages.
        storage: arguments of :class:`~dataflow.utils.storage.FileStorage`.
        images: arguments of :class:`~dataflow.io.ImageIO`.
        servings: by name.
        steps: in order.
        run: how steps are run.
        accept: arguments of :class:`~dataflow.acceptance.AcceptanceLoop`; None runs the steps once.
    """

    source: str
    storage: Mapping[str, Any]
    images: Mapping[str, Any]
    servings: Mapping[str, ServingConfig]
    steps: tuple[StepConfig, ...]
    run: Mapping[str, Any]
    accept: Mapping[str, Any] | None = None

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
        ConfigError: it cannot be read or used; says file, table, key and what is allowed there.
    """
    file = Path(path)
    try:
        document = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}") from error
    if storage is not None:
        images = {key: value for key, value in document.get("images", {}).items() if key != "save_path"}
        document |= {"storage": dict(storage), "images": images}
    return parse(document, folder=file.absolute().parent, source=str(file))


def parse(document: Mapping[str, Any], *, folder: Path, source: str) -> PipelineConfig:
    """Check a document as :mod:`tomllib` gives it.

    Args:
        document: the tables.
        folder: what relative paths are relative to.
        source: what to call the document in messages.

    Raises:
        ConfigError: it cannot be used.
    """
    here = _Place(source, folder)
    _known(here, document, _TABLES, "table")
    storage = _arguments(here / "[storage]", _table(here, document, "storage"), FileStorage)
    storage.setdefault("cache_path", str(folder / "cache"))
    images = _table(here, document, "images", {})
    images = {"save_path": str(Path(storage["cache_path"], "images")), **images}
    tables = _table(here, document, "serving", {})
    servings = {name: _serving(here / f"[serving.{name}]", table) for name, table in tables.items()}
    for name in servings:
        _check_service(here / f"[serving.{name}]", servings[name], servings)
    steps = document.get("step", [])
    if not isinstance(steps, list) or not steps:
        here.fail("at least one [[step]] is needed (two brackets each side)")
    run = _arguments(here / "[run]", _table(here, document, "run", {}), RunOptions)
    _in_range(here / "[run]", run)
    return PipelineConfig(
        source=source,
        storage=storage,
        images=_arguments(here / "[images]", images, ImageIO),
        servings=servings,
        steps=tuple(_step(here / f"[[step]] {n}", table, servings) for n, table in enumerate(steps, 1)),
        run=run,
        accept=_accept(here / "[accept]", document.get("accept")),
    )


def build(config: PipelineConfig, options: RunOptions | None = None) -> Job:
    """Make the objects. Constructors only store, so no model is loaded and nothing is written.

    Args:
        config: from :func:`load` or :func:`parse`.
        options: in place of the configuration's own.

    Raises:
        ConfigError: a constructor refuses a value.
    """
    here = _Place(config.source)
    storage = _construct(here / "[storage]", FileStorage, config.storage)
    images = _construct(here / "[images]", ImageIO, config.images)
    servings = {name: _built(here, name, config, images) for name in config.servings}
    steps = []
    for number, step in enumerate(config.steps, 1):
        place = here / f"[[step]] {number}"
        pipe = {} if step.serving is None else {"pipe": servings[step.serving]}
        operator: Operator = _construct(
            place, _class(place, "operator", step.operator, OPERATORS), {**pipe, **step.arguments}
        )
        steps.append(Step(operator, step.keys))
    return Job(
        storage=storage,
        images=images,
        servings=servings,
        pipeline=Pipeline(steps) if config.accept is None else _loop(here / "[accept]", steps, config.accept),
        options=options or run_options(config),
    )


def _built(here: _Place, name: str, config: PipelineConfig, images: ImageIO | None) -> Serving:
    """One serving, with one of its own for each that it asks; those answer with words and get no ``images``."""
    serving, place = config.servings[name], here / f"[serving.{name}]"
    kind = _class(place, "type", serving.type, SERVINGS)
    parameters, arguments = _parameters(kind), dict(serving.arguments)
    if "image_io" in parameters and images is not None:
        arguments["image_io"] = images
    if "vectors" in parameters:
        arguments.setdefault("vectors", str(config.folder / "vectors"))
    if _SERVICE in arguments:
        arguments[_SERVICE] = _built(here, arguments[_SERVICE], config, None)
    if "rubric" in arguments:
        arguments["rubric"] = _rubric(place, arguments["rubric"])
    return _construct(place, kind, arguments)


def _rubric(place: _Place, value: Any) -> Rubric:
    try:
        return RUBRICS[value]() if value in RUBRICS else read_rubric(value)
    except ConfigError as error:
        raise ConfigError(f"{place.label}: rubric: {error}") from error


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
    document["serving"] = {name: {"type": s.type, **s.arguments} for name, s in config.servings.items()}
    parts = [tomli_w.dumps(_plain(document, folder))]
    for step in config.steps:
        serving = {"serving": step.serving} if step.serving else {}
        table = {"operator": step.operator, **serving, **step.arguments, **step.keys}
        # Given the list of steps, tomli_w would write short ones as one long line.
        parts.append(tomli_w.dumps(_plain({"step": table}, folder)).replace("[step]", "[[step]]", 1))
    return "\n".join(parts)


# Tables ------------------------------------------------------------------------------------------------------------


class _Place:
    """Where in a configuration something stands, for messages and relative paths."""

    def __init__(self, label: str, folder: Path | None = None) -> None:
        self.label = label
        self.folder = folder or Path.cwd()

    def __truediv__(self, table: str) -> _Place:
        return _Place(f"{self.label}: {table}", self.folder)

    def fail(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.label}: {message}")


def _table(place: _Place, document: Mapping[str, Any], name: str, default: Any = None) -> dict[str, Any]:
    value = document.get(name, default)
    if value is None:
        place.fail(f"the table [{name}] is missing")
    if not isinstance(value, dict):
        place.fail(f"[{name}] must be a table, found {_shown(value)}")
    return value


def _serving(place: _Place, table: Any) -> ServingConfig:
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {_shown(table)}; a serving has a name: [serving.NAME]")
    kind = table.get("type")
    if kind is None:
        place.fail(f"the key 'type' is missing; choose {listed(SERVINGS)} or \"package.module:Class\"")
    given = {key: value for key, value in table.items() if key != "type"}
    serving = _class(place, "type", kind, SERVINGS)
    if not hasattr(serving, "generate"):
        place.fail(f"type: {kind} is no serving: it has no method 'generate'")
    return ServingConfig(type=kind, arguments=_arguments(place, given, serving, skip=("image_io",)))


def _check_service(place: _Place, serving: ServingConfig, servings: Mapping[str, ServingConfig]) -> None:
    name = serving.arguments.get(_SERVICE)
    if name is None:
        return
    if name not in servings:
        place.fail(
            f"service: there is no [serving.{name}]{did_you_mean(str(name), servings)}; there are {listed(servings)}"
        )
    if _SERVICE in servings[name].arguments:
        place.fail(f"service: {name!r} asks another one itself; name that one")


def _step(place: _Place, table: Any, servings: Mapping[str, ServingConfig]) -> StepConfig:
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {_shown(table)}")
    name = table.get("operator")
    if name is None:
        place.fail(f"the key 'operator' is missing; choose {listed(OPERATORS)} or \"package.module:Class\"")
    operator = _class(place, "operator", name, OPERATORS)
    if not hasattr(operator, "plan"):
        place.fail(f"operator: {name} has no method 'plan'")
    constructor = set(_parameters(operator)) - {"pipe", "options"}
    rest = {key: value for key, value in table.items() if key not in ("operator", "serving")}
    keys = _parameters(operator.plan)
    _known(place, rest, [*sorted(constructor), *keys], "key", also=("operator", "serving"))
    arguments = {key: value for key, value in rest.items() if key in constructor}
    return StepConfig(
        operator=name,
        serving=_serving_of(place, name, operator, table.get("serving"), servings),
        arguments=_arguments(place, arguments, operator, skip=("pipe", "options")),
        keys=_arguments(place, {key: value for key, value in rest.items() if key in keys}, operator.plan),
    )


def _serving_of(
    place: _Place, operator: str, kind: Any, name: Any, servings: Mapping[str, ServingConfig]
) -> str | None:
    if "pipe" not in _parameters(kind):
        if name is not None:
            place.fail(f"serving: {operator} takes none")
        return None
    if name is None and len(servings) == 1:
        name = next(iter(servings))
    if name is None:
        place.fail(f"the key 'serving' is missing; there are {listed(servings) or 'none: add a [serving.NAME]'}")
    if not isinstance(name, str) or name not in servings:
        place.fail(
            f"serving: there is no [serving.{name}]{did_you_mean(str(name), servings)};"
            f" there are {listed(servings) or 'none'}"
        )
    task = servings[name].arguments.get("Image_gen_task", "text2image")
    if servings[name].type == "local" and _TASKS.get(operator, task) != task:
        place.fail(
            f'{operator} needs a serving with Image_gen_task = "{_TASKS[operator]}", {name!r} has "{task}":'
            " add a [serving.NAME] of its own (it may name the same model)"
        )
    return name


def _accept(place: _Place, table: Any) -> dict[str, Any] | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        place.fail(f"must be a table, found {_shown(table)}")
    return _arguments(place, table, AcceptanceLoop, skip=("steps",))


def _loop(place: _Place, steps: list[Step], arguments: Mapping[str, Any]) -> AcceptanceLoop:
    return _construct(place, AcceptanceLoop, {"steps": steps, **arguments})


def _in_range(place: _Place, run: Mapping[str, Any]) -> None:
    if not 0 <= run.get("max_failed_fraction", 0.5) <= 1:
        place.fail(f"max_failed_fraction: must be from 0 to 1, found {run['max_failed_fraction']}")
    if run.get("max_attempts", 1) < 1:
        place.fail(f"max_attempts: must be a whole number from 1, found {run['max_attempts']}")
    if (run.get("pilot") or 1) < 1:
        place.fail(f"pilot: must be a whole number from 1, found {run['pilot']}")
    budget = run.get("budget_usd")
    if budget is not None and not budget > 0:
        place.fail(f"budget_usd: must be more than 0 US dollars, found {budget}")


# Classes and their arguments ---------------------------------------------------------------------------------------


def _class(place: _Place, key: str, name: Any, table: Mapping[str, str]) -> Any:
    """The class of that name: in the table, or ``module:Class``."""
    if not isinstance(name, str) or (name not in table and ":" not in name):
        place.fail(
            f"{key}: there is no {name!r}{did_you_mean(str(name), table)}; choose {listed(table)}"
            ' or "package.module:Class"'
        )
    module_name, _, class_name = table.get(name, name).partition(":")
    if name not in table and str(place.folder) not in sys.path:
        sys.path.append(str(place.folder))  # a user's own module lies beside the pipeline file
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        place.fail(f"{key}: {module_name!r} cannot be imported: {error}")
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [each for each, value in vars(module).items() if isinstance(value, type)]
        place.fail(f"{key}: {module_name} has no class {class_name!r}{did_you_mean(class_name, classes)}")
    return found


def _construct(place: _Place, kind: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{place.label}: {error}") from error
    except (TypeError, ValueError) as error:
        # A class of the user's own, or a type the annotation does not tell.
        raise ConfigError(f"{place.label}: {kind.__name__} does not take this: {error}") from error


def _callables(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A class's constructors, from its own to that of the base its ``**options`` go to; any other function alone."""
    if not isinstance(function, type):
        return [function]
    found = []
    for kind in function.__mro__[:-1]:
        if "__init__" in vars(kind):
            found.append(vars(kind)["__init__"])
            if not _takes_any(found[-1]):
                break
    return found or [function]


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What may be given by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found: dict[str, inspect.Parameter] = {}
    for each in _callables(function):
        for name, parameter in inspect.signature(each).parameters.items():
            if name != "self" and parameter.kind in named:
                found.setdefault(name, parameter)
    return found


def _arguments(
    place: _Place, given: Mapping[str, Any], function: Callable[..., Any], skip: Collection[str] = ()
) -> dict[str, Any]:
    """Keyword arguments for a function, checked against its signature, with absolute paths."""
    parameters = _parameters(function)
    if not _takes_any(_callables(function)[-1]):
        _known(place, given, [name for name in parameters if name not in skip], "key")
    # A serving that asks another one names it.
    hints = {
        name: str if name in (_SERVICE, "rubric") else hint
        for each in reversed(_callables(function))
        for name, hint in hints_of(each).items()
    }
    for name, value in given.items():
        hint = hints.get(name, Any)
        if not fits(value, hint):
            near = did_you_mean(value, choices(hint)) if isinstance(value, str) else ""
            place.fail(f"{name}: expected {described(hint)}, found {_shown(value)}{near}")
    for name, each in parameters.items():
        if each.default is each.empty and name not in skip and name not in given:
            place.fail(f"the key {name!r} is missing")
    return {name: _located(name, converted(value, hints.get(name, Any)), place) for name, value in given.items()}


def _known(
    place: _Place, given: Iterable[str], allowed: Collection[str], what: str, also: Collection[str] = ()
) -> None:
    names = [*also, *allowed]
    for name in given:
        if name not in names:
            place.fail(f"there is no {what} {name!r}{did_you_mean(name, names)}; the {what}s are {listed(names)}")


def _located(name: str, value: Any, place: _Place) -> Any:
    """The value with absolute paths."""
    if name in _NAMES_OR_PATHS and isinstance(value, list):
        return [_located(name, entry, place) for entry in value]
    if not isinstance(value, str) or not value:
        return value
    if name in _NAMES_OR_PATHS:
        beside = any((place.folder / text).exists() for text in (value, value.rpartition("@")[0]) if text)
        if not beside and not value.startswith(("./", "../", "~")):
            return value
    elif name not in _PATHS:
        return value
    # Not resolve(): a link in the path is the user's choice.
    return os.path.abspath(place.folder / Path(value).expanduser())  # noqa: PTH100


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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
