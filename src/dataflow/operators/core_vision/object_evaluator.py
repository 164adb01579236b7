"""Whether pictures show the objects that were asked for, by what a detector finds: GenEval and T2I-CompBench."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import orjson

from dataflow.errors import ConfigError, InputError
from dataflow.metrics.objects import (
    GENEVAL_COLOURS,
    GENEVAL_TASKS,
    Detection,
    GenEvalPrompt,
    Requirement,
    compbench_spatial,
    geneval_kept,
    geneval_verdict,
    iou,
    parse_geneval,
    spatial_relation,
)
from dataflow.operators.combining import answered, combined, lacking
from dataflow.operators.core_vision.image_evaluator import signed
from dataflow.operators.evaluation import pictures, with_scores
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage

Rules = Literal["geneval", "compbench_spatial"]
Colours = Literal["compare", "query", "detector"]

UNCLEAR = "unclear"
"""The colour of an object that no query with a colour finds."""

_SAME_PLACE = 0.5
_CLAUSES = ("include", "exclude")


class ObjectEvaluator:
    """Has a detector look for the objects that a row asks for and applies a benchmark's rules to what it finds.

    Each picture is one request, with the texts to look for: other rules or thresholds cost one pass over the table and
    detect nothing again. A score is ``{"value", "reasons", "detections"}``: with the rules ``geneval`` 1.0 or 0.0 and,
    for 0.0, why; with ``compbench_spatial`` 0 to 1 and no reasons; and the detections that counted.

    GenEval's own detector knows a fixed set of classes, and CLIP tells the colours. An open-vocabulary detector is
    asked in words, and there are three ways to a colour:

    - ``compare``: it is asked for the class ("a bench") and for the class in each of the ten colours ("a red bench");
      an object has the colour whose query is the surest at its place (IoU of .5 or more), or ``unclear``. GenEval's
      rules as they are.
    - ``query``: it is asked for "a red bench" where one is wanted, and believed. One query instead of eleven; a
      detector that takes little notice of the adjective finds red benches that are blue.
    - ``detector``: a detection brings its ``colour`` itself, one of the ten.

    Args:
        pipe: a serving that answers ``{"detections": [{"label", "score", "box", "colour"}, …]}`` and reads the
            request's parameter ``labels``: :class:`dataflow.serving.detection.ZeroShotDetectionServing`. ``colour`` is
            optional.
        rules: see above.
        colours: see above.
        query: what is asked for an object; ``{label}`` stands for its name, ``{a}`` for "a" or "an".
        threshold: a detection counts if it is surer; None for GenEval's .3, and for all with ``compbench_spatial``.
        counting_threshold: the same for GenEval's task ``counting``; None for its .9. Scores of open-vocabulary
            detectors are seldom that high.
        max_overlap: of two detections of one class with a greater IoU only the surer counts; None for no suppression,
            as GenEval has it. Detectors without a suppression of their own need one to count.
        options: how the step is run.

    Raises:
        ConfigError: a value that makes no sense.
    """

    answer: ClassVar = "words"

    def __init__(
        self,
        pipe: Serving,
        *,
        rules: Rules = "geneval",
        colours: Colours = "compare",
        query: str = "{a} {label}",
        threshold: float | None = None,
        counting_threshold: float | None = None,
        max_overlap: float | None = None,
        options: RunOptions | None = None,
    ) -> None:
        for name, value, known in (("rules", rules, Rules), ("colours", colours, Colours)):
            if value not in get_args(known):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if "{label}" not in query:
            raise ConfigError(f"query must have {{label}} in it, got {query!r}")
        limits = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
        for name, value in limits.items():
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {value!r}")
        self.pipe = pipe
        self.rules: Rules = rules
        self.colours: Colours = colours
        self.query = query
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_overlap = max_overlap
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_object_key: str | None = "geneval",
        output_key: str = "objects",
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the path of a picture, or a list of them.
            input_object_key: column with what is asked for; with an empty cell the score is ``not_applicable``. For
                ``geneval`` an object ``{"tag": "counting", "include": [{"class": "bench", "count": 2, "color": "red",
                "position": ["left of", 0]}], "exclude": […]}``, a line of the benchmark's own file; None where ``tag``,
                ``include`` and ``exclude`` are columns. For ``compbench_spatial`` ``{"first": "dog", "relation": "on
                the left of", "second": "cat"}``.
            output_key: column that gets the scores, in the shape of the image column.

        Raises:
            ConfigError: no column for ``compbench_spatial``.
        """
        if input_object_key is None and self.rules != "geneval":
            raise ConfigError("input_object_key: name the column with first, relation and second")
        limits = {"threshold": self.threshold, "counting": self.counting_threshold, "max_overlap": self.max_overlap}
        rules = {"rules": self.rules, "colours": self.colours, "query": self.query, **limits}
        by = signed({**self.pipe.fingerprint(), "objects": rules})

        def requests(row: Row) -> list[Draft]:
            task = self._task(row, input_object_key)
            if task is None:
                return []
            params = {"labels": [self._asked(name) for name in task.names()]}
            return [Draft(prompt="", images=(path,), seed=0, params=params) for path in pictures(row, input_image_key)]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            try:
                number = len(pictures(row, input_image_key))
            except InputError:
                return with_scores(row, input_image_key, output_key, outcomes, by)
            scores = self._scored(row, outcomes, input_object_key, number)
            return with_scores(row, input_image_key, output_key, scores, by)

        columns = ("tag", "include") if input_object_key is None else (input_object_key,)
        return Plan(
            name=type(self).__name__,
            inputs=(input_image_key, *columns),
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            folding=by,
        )

    def run(
        self,
        storage: FileStorage,
        input_image_key: str = "images",
        input_object_key: str | None = "geneval",
        output_key: str = "objects",
    ) -> Summary:
        """Look for the objects of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_image_key=input_image_key, input_object_key=input_object_key, output_key=output_key)
        return execute(plan, storage, self.options)

    def _task(self, row: Row, column: str | None) -> _Task | None:
        if self.rules == "compbench_spatial" and column is not None:
            return _spatial(row, column)
        prompt = read_geneval(row, column)
        if prompt is None:
            return None
        limit = self.counting_threshold if prompt.tag == "counting" else self.threshold
        return _GenEval(prompt, self.colours, limit)

    def _asked(self, name: str) -> str:
        return self.query.replace("{label}", name).replace("{a}", "an" if name[0].lower() in "aeiou" else "a")

    def _scored(self, row: Row, outcomes: Sequence[Outcome], column: str | None, number: int) -> list[Outcome]:
        """One outcome for each picture."""
        try:
            task = self._task(row, column)
        except InputError:
            return list(outcomes)
        if task is None:
            return [lacking("not_applicable", "the row asks for no objects")] * number
        if len(outcomes) < number:
            return list(outcomes)  # the row could not be used as a whole
        return [self._of_picture(task, outcome) for outcome in outcomes]

    def _of_picture(self, task: _Task, outcome: Outcome) -> Outcome:
        answer, failure = answered(outcome, "detection")
        if failure is not None:
            return failure
        names = {self._asked(name): name for name in task.names()}
        try:
            found = [_detection(each, names) for each in answer["detections"]]
        except (TypeError, KeyError, ValueError) as error:
            return lacking("parse_error", f"the serving detects no objects: {error!r}")
        if self.rules == "compbench_spatial" and self.threshold is not None:
            found = [each for each in found if each.score > self.threshold]
        try:
            value, reasons, counted = task.verdict(self._apart(found))
        except ValueError as error:
            return lacking("bad_detections", str(error))
        detections = [{name: each for name, each in asdict(one).items() if each is not None} for one in counted]
        return combined({"value": value, "reasons": list(reasons), "detections": detections})

    def _apart(self, found: Sequence[Detection]) -> list[Detection]:
        """Without those that overlap a surer one of the same name."""
        if self.max_overlap is None:
            return list(found)
        kept: list[Detection] = []
        for one in sorted(found, key=lambda each: -each.score):
            if not any(one.label == other.label and iou(one.box, other.box) > self.max_overlap for other in kept):
                kept.append(one)
        return kept


class _Task(Protocol):
    """What a row asks for, and the rules that go with it."""

    def names(self) -> list[str]:
        """What the detector looks for, each once."""
        ...

    def verdict(self, found: Sequence[Detection]) -> tuple[float, Iterable[str], list[Detection]]:
        """The value, the reasons against the picture, and the detections that counted."""
        ...


@dataclass(frozen=True, slots=True)
class _Spatial:
    """A prompt of T2I-CompBench's category ``spatial``."""

    first: str
    relation: str
    second: str

    def names(self) -> list[str]:
        return list(dict.fromkeys((self.first, self.second)))

    def verdict(self, found: Sequence[Detection]) -> tuple[float, Iterable[str], list[Detection]]:
        surest = [max(of_name, key=lambda each: each.score) for of_name in _by_name(found).values()]
        return compbench_spatial(found, self.first, self.second, self.relation), (), surest


@dataclass(frozen=True, slots=True)
class _GenEval:
    """A prompt of GenEval; ``threshold`` is None for its own."""

    prompt: GenEvalPrompt
    colours: Colours
    threshold: float | None

    def names(self) -> list[str]:
        found: dict[str, None] = {}
        for clause in (*self.prompt.include, *self.prompt.exclude):
            if clause.colour is None or self.colours == "detector":
                found[clause.label] = None
            elif self.colours == "query":
                found[_coloured(clause.colour, clause.label)] = None
            else:
                found |= dict.fromkeys([clause.label, *(_coloured(each, clause.label) for each in GENEVAL_COLOURS)])
        return list(found)

    def verdict(self, found: Sequence[Detection]) -> tuple[float, Iterable[str], list[Detection]]:
        prompt = self.prompt
        if self.colours == "query":
            prompt = replace(prompt, include=tuple(map(_by_query, prompt.include)))
        elif self.colours == "compare":
            found = self._with_colours(found)
        # GenEval's rules compare scores with each other and with a threshold of their own, which all of these pass.
        given, limit = {one: one for one in found}, self.threshold
        if limit is not None:
            given = {_raised(one): one for one in found if one.score > limit}
        counted = [given[one] for group in geneval_kept(given, prompt.tag).values() for one in group]
        verdict = geneval_verdict(prompt, given)
        return float(verdict.correct), verdict.reasons, counted

    def _with_colours(self, found: Sequence[Detection]) -> list[Detection]:
        """The objects of each class; where a colour is asked for, each with the likeliest one at its place."""
        by_name = _by_name(found)
        wanted = {clause.label for clause in self.prompt.include if clause.colour is not None}
        named = dict.fromkeys(clause.label for clause in (*self.prompt.include, *self.prompt.exclude))
        objects = []
        for label in named:
            queries = {colour: by_name.get(_coloured(colour, label), []) for colour in GENEVAL_COLOURS}
            for one in by_name.get(label, []):
                told = _likeliest(one, queries) if label in wanted else None
                objects.append(replace(one, colour=told))
        return objects


def read_geneval(row: Row, column: str | None) -> GenEvalPrompt | None:
    """What a row asks for in GenEval's form; None where it asks for nothing.

    Args:
        row: as it was read.
        column: that holds an object with ``tag``, ``include`` and ``exclude``; None where these are columns.

    Raises:
        InputError: it is something else; says in which column and field.
    """
    fields = row if column is None else row.get(column)
    if not fields or (column is None and not any(row.get(name) for name in ("tag", *_CLAUSES))):
        return None
    if not isinstance(fields, Mapping):
        raise InputError(f"expected an object with tag and include, found {type(fields).__name__}", field=column)
    tag = fields.get("tag")
    if tag not in GENEVAL_TASKS:
        raise _bad(column, "tag", f"expected one of {', '.join(GENEVAL_TASKS)}, not {tag!r}")
    line: dict[str, Any] = {"tag": tag, "prompt": ""}
    prompt = None
    for name in _CLAUSES:
        clauses = fields.get(name) or []
        try:
            line[name] = clauses
            prompt = parse_geneval(orjson.dumps(line)) if clauses else prompt
        except (ValueError, TypeError) as error:
            raise _bad(column, name, str(error)) from None
    if prompt is None:
        raise _bad(column, "include", "nothing is asked for")
    return prompt


def _bad(column: str | None, name: str, message: str) -> InputError:
    return InputError(message, field=name) if column is None else InputError(f"{name}: {message}", field=column)


def _spatial(row: Row, column: str) -> _Spatial | None:
    fields = row.get(column)
    if not fields:
        return None
    if not isinstance(fields, Mapping):
        raise InputError(f"expected an object with first, relation and second, not {fields!r}", field=column)
    for name in ("first", "relation", "second"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise InputError(f"{name}: expected text, not {fields.get(name)!r}", field=column)
    if spatial_relation(fields["relation"]) != fields["relation"]:
        raise InputError(f"relation: no such relation {fields['relation']!r}", field=column)
    return _Spatial(fields["first"], fields["relation"], fields["second"])


def _detection(entry: Mapping[str, Any], names: Mapping[str, str]) -> Detection:
    """What a serving found, under the name in the row's own words.

    Raises:
        TypeError: no such object.
        KeyError: something is missing, or the label is none that was asked for.
        ValueError: a number is none.
    """
    left, top, right, bottom = (float(edge) for edge in entry["box"])
    score, colour = float(entry["score"]), entry.get("colour")
    if not all(map(math.isfinite, (left, top, right, bottom, score))):
        raise ValueError(f"{entry['label']}: no finite numbers")
    return Detection(names[entry["label"]], score, (left, top, right, bottom), colour)


def _by_name(found: Iterable[Detection]) -> dict[str, list[Detection]]:
    groups: dict[str, list[Detection]] = {}
    for one in found:
        groups.setdefault(one.label, []).append(one)
    return groups


def _likeliest(one: Detection, queries: Mapping[str, Sequence[Detection]]) -> str:
    """The colour whose query is the surest where this object is."""
    at_place = [
        (other.score, colour)
        for colour, others in queries.items()
        for other in others
        if iou(one.box, other.box) >= _SAME_PLACE
    ]
    return max(at_place)[1] if at_place else UNCLEAR


def _coloured(colour: str, label: str) -> str:
    return f"{colour} {label}"


def _by_query(clause: Requirement) -> Requirement:
    """The clause for a detector that is asked for the object with its colour."""
    if clause.colour is None:
        return clause
    return replace(clause, label=_coloured(clause.colour, clause.label), colour=None)


def _raised(one: Detection) -> Detection:
    """The same with a score over every threshold of GenEval, in the same order."""
    return replace(one, score=0.95 + 0.05 * one.score)
