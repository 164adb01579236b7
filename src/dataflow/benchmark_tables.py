"""What the tables of published benchmarks are made of: how scores are read, how they add up, which lines there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dataflow.metrics import objects, questions, rubrics, text_rendering
from dataflow.metrics.questions import Answer, DpgReport, Question
from dataflow.metrics.rubrics import VieScore
from dataflow.metrics.text_rendering import Matches
from dataflow.prompt_sets import COMPBENCH_CATEGORIES
from dataflow.scores import as_number
from dataflow.types import Row

Compat = Literal["ella"]
Values = Mapping[str, float | None]
Found = Mapping[str, Sequence[Any]]
"""By the name of a score what stands under each of its keys."""

_TITLES = {
    "single_object": "Single object",
    "two_object": "Two object",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attribution",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture's score in the form that its benchmark adds up; None where there is none, and why."""

    value: Any
    status: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row: what the report needs of it, its pictures, and the status of those that it asked for in vain."""

    prompt_id: str
    category: str
    row: Row
    pictures: tuple[Picture, ...]
    failure: str | None = None


# Readers: what stands under the keys, as one value to add up -------------------------------------------------------


def _field(value: Any, *names: str) -> Any:
    """The first of the fields that an object has; a value that is no object itself."""
    if isinstance(value, Mapping):
        return next((value[name] for name in names if name in value), None)
    return value


class Atoms(NamedTuple):
    """The atoms of a picture by number, 0 to 1 or None; ``raw`` if they are answers, whose dependencies count."""

    scores: Mapping[int, float | None]
    raw: bool


def _read_correct(_: Row, found: Found, __: bool) -> bool | None:
    value = as_number(_field(found["score"][0], "correct", "value"))
    if value not in (None, 0, 1):
        raise ValueError("expected right or wrong")
    return None if value is None else bool(value)


def _read_number(_: Row, found: Found, __: bool) -> float | None:
    return as_number(_field(found["score"][0], "value", "score"))


def _read_atoms(row: Row, found: Found, force: bool) -> Atoms | float | None:
    """The atoms of a picture where there are any, else its score, 0 to 1."""
    value = found["score"][0]
    if isinstance(value, Mapping) and value and all(str(name).isdigit() for name in value):
        value = {"atoms": value}
    given = _field(value, "answers", "atoms") if isinstance(value, Mapping) else None
    if given is None:
        number = as_number(_field(value, "value", "score"))
        if number is not None and not 0 <= number <= 1:
            raise ValueError("expected a score of 0 to 1")
        return number
    ids = [int(each["id"]) for each in row["questions"]]
    pairs = given.items() if isinstance(given, Mapping) else zip(ids, given, strict=True)
    scores = {int(atom): _atom(each) for atom, each in pairs}
    # What the question evaluator's aggregate "tifa" leaves is the answers; "dsg" has the dependencies in it already.
    raw = "answers" in value or str(found["by"][0]).endswith("/tifa")
    atoms = Atoms({atom: scores.get(atom) for atom in ids}, raw)
    known = list(_final(row, atoms).values())
    if force:
        return atoms if any(each is not None for each in known) else None
    return atoms if known and None not in known else None


def _atom(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("answer")
    if isinstance(value, str):
        value = questions.is_yes(value)
    number = as_number(value)
    if number is not None and not 0 <= number <= 1:
        raise ValueError("expected yes, no or a probability")
    return number


def _answers(scores: Mapping[int, float | None]) -> dict[int, Answer]:
    if any(each not in (None, 0, 1) for each in scores.values()):
        raise ValueError("the answers are probabilities: this takes yes and no")
    return {atom: None if each is None else bool(each) for atom, each in scores.items()}


def _final(row: Row, atoms: Atoms) -> Mapping[int, float | None]:
    """The score of each atom, its dependencies looked at."""
    return questions.dsg_atoms(_answers(atoms.scores), _parents(row)) if atoms.raw else atoms.scores


def _parents(row: Row) -> dict[int, Sequence[int]]:
    return {int(each["id"]): [int(parent) for parent in each.get("parents") or ()] for each in row["questions"]}


def _read_matches(row: Row, found: Found, _: bool) -> Matches | None:
    """Counts, or the text that was read."""
    value = found["score"][0]
    if isinstance(value, Mapping) and {"found", "wanted"} <= value.keys():
        return Matches(int(value["found"]), int(value["wanted"]))
    reading = _field(value, "reading", "text")
    if reading is None:
        return None
    if not isinstance(reading, str):
        raise ValueError("expected the text that was read, or found and wanted")
    return _recall(row, reading)


def _recall(row: Row, reading: str) -> Matches:
    unit = "character" if row["language"] == "zh" else "word"
    return text_rendering.multiset_recall(row["text"], reading, unit=unit)


def _read_viescore(_: Row, found: Found, __: bool) -> VieScore | None:
    parts = []
    for name in ("semantic", "quality"):
        values = [each for value in found[name] for each in (value if isinstance(value, list) else [value])]
        parts.append([as_number(each) for each in values])
    value = rubrics.viescore(*parts)
    return None if value.overall is None else value


def _read_imgedit(_: Row, found: Found, __: bool) -> float | None:
    # Not "value", which judges' rubrics have on a scale of 0 to 1.
    values = [as_number(_field(value, "score")) for value in found["score"]]
    if len(values) == 3:
        return rubrics.imgedit(*values)
    [value] = values
    return rubrics.imgedit(value, value, value)


# Tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TableLine:
    """A line of a table: what it is one of, its name, a value for each column, the prompts it rests on."""

    section: str
    name: str
    values: Values
    prompts: Sequence[Prompt]


def _geneval_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    found = [(prompt.category, one.value) for prompt in prompts for one in prompt.pictures if one.status == "ok"]
    summary = objects.geneval_summary(found)
    lines = [
        TableLine("", _TITLES[task], {"accuracy": summary.by_task.get(task)}, group)
        for task in objects.GENEVAL_TASKS
        if (group := [prompt for prompt in prompts if prompt.category == task])
    ]
    return [*lines, TableLine("", "Overall", {"accuracy": summary.overall}, prompts)]


def _dsg_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    lines = [TableLine("", name, {"DSG": _percent(_mean(group))}, group) for name, group in _groups(prompts).items()]
    broad: dict[str, list[float]] = {}
    for prompt in prompts:
        categories = {int(each["id"]): str(each["category"]) for each in prompt.row.get("questions", ())}
        for one in prompt.pictures:
            if one.status == "ok" and isinstance(one.value, Atoms):
                for atom, score in _final(prompt.row, one.value).items():
                    if score is not None:
                        broad.setdefault(categories[atom].partition("-")[0].strip(), []).append(score)
    atoms = [
        TableLine("questions", name, {"DSG": 100 * math.fsum(found) / len(found)}, _asking(prompts, name))
        for name, found in sorted(broad.items())
    ]
    return [*lines, TableLine("", "Overall", {"DSG": _percent(_mean(prompts))}, prompts), *atoms]


def _dpg(prompts: Sequence[Prompt], compat: Compat | None) -> DpgReport:
    answers: dict[str, list[Mapping[int, Answer]]] = {}
    asked: list[tuple[int, Question]] = []
    for prompt in prompts:
        for one in prompt.pictures:
            if one.status == "ok":
                answers.setdefault(prompt.prompt_id, []).append(_dpg_answers(prompt, one.value, compat))
        for each in prompt.row.get("questions", ()):
            parents = each["parents"] if compat else ()  # else they have been looked at
            question = Question(prompt.prompt_id, int(each["id"]), str(each["category"]), parents)
            asked.append((int(each["row"]), question))
    asked.sort(key=lambda one: one[0])
    every = [question for _, question in asked]
    if compat and asked and asked[0][0] != 1:
        every.insert(0, Question("", 1, ""))  # the file's first row is not of these prompts: nothing else is left out
    return questions.dpg_bench(every, answers, compat=compat, allow_unanswered=True)


def _dpg_answers(prompt: Prompt, value: Any, compat: Compat | None) -> dict[int, Answer]:
    if not isinstance(value, Atoms):
        raise ValueError("DPG-Bench needs the answers to its questions, not their mean")
    if not compat:
        return _answers(_final(prompt.row, value))
    if not value.raw:
        raise ValueError("compat looks at the answers alone: score the questions with the aggregate tifa")
    return _answers(value.scores)


def _dpg_table(prompts: Sequence[Prompt], compat: Compat | None) -> list[TableLine]:
    found = _dpg(prompts, compat)
    lines = [TableLine("", "Overall", {"DPG": found.score.value}, prompts)]
    for section, table in (("", found.broad), ("questions", found.detailed)):
        lines += [TableLine(section, name, {"DPG": each.value}, _asking(prompts, name)) for name, each in table.items()]
    return lines


def _dpg_notes(prompts: Sequence[Prompt], compat: Compat | None) -> list[str]:
    left_out = _dpg(prompts, compat).left_out
    return [f"left out, as the benchmark's own program does: {', '.join(left_out)}"] if left_out else []


def _asking(prompts: Sequence[Prompt], category: str) -> list[Prompt]:
    """The prompts with a question of a category, broad or detailed."""
    return [
        prompt
        for prompt in prompts
        if any(
            category in (str(each["category"]), str(each["category"]).partition("-")[0].strip())
            for each in prompt.row.get("questions", ())
        )
    ]


def _compbench_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    groups = _groups(prompts)
    order = [name for name in COMPBENCH_CATEGORIES if name in groups]
    return [
        TableLine("", name, {"score": _mean(groups[name])}, groups[name])
        for name in [*order, *sorted({*groups} - {*order})]
    ]


def _parti_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    lines = [TableLine("", "Overall", {"score": _mean(prompts)}, prompts)]
    for section, column in (("category", None), ("challenge", "challenge")):
        for name, group in sorted(_groups(prompts, column).items()):
            lines.append(TableLine(section, name, {"score": _mean(group)}, group))
    return lines


def _longtext_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    lines = []
    for language, group in sorted(_groups(prompts, "language").items()):
        lines.append(TableLine("", f"LongText-Bench {language.upper()}", {"recall": _micro(group)}, group))
        for category, part in sorted(_groups(group).items()):
            lines.append(TableLine(f"category, {language.upper()}", category, {"recall": _micro(part)}, part))
    return lines


def _micro(prompts: Sequence[Prompt]) -> float | None:
    found = [one.value for prompt in prompts for one in prompt.pictures if one.status == "ok"]
    return text_rendering.micro_recall(found) if found else None


def _gedit_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    lines: list[TableLine] = []
    for language, of_language in sorted(_groups(prompts, "language").items(), key=lambda one: (one[0] != "en", one[0])):
        intersection = [prompt for prompt in of_language if prompt.row.get("intersection") is True]
        for part, group in (("full set", of_language), ("intersection", intersection)):
            if not group:
                continue
            rows = [
                (one.category, picture.value) for one in group for picture in one.pictures if picture.status == "ok"
            ]
            found = rubrics.gedit(rows, allow_missing=True)
            section = "" if (part, language) == ("full set", "en") else f"{part}, {language.upper()}"
            for kind, of_kind in _groups(group).items():
                means = {
                    column: each.groups[kind].value if kind in each.groups else None
                    for column, each in (("SC", found.semantic), ("PQ", found.quality), ("O", found.overall))
                }
                lines.append(TableLine(section, kind, means, of_kind))
            whole = {"SC": found.semantic.value, "PQ": found.quality.value, "O": found.overall.value}
            lines.append(TableLine(section, "Average", whole, group))
    return lines


def _imgedit_table(prompts: Sequence[Prompt], _: Compat | None) -> list[TableLine]:
    rows = [(one.category, picture.value) for one in prompts for picture in one.pictures if picture.status == "ok"]
    groups = _groups(prompts)
    found = rubrics.mean_of_groups(rows, expected=groups, allow_missing=True)
    lines = [TableLine("", kind, {"score": found.groups[kind].value}, groups[kind]) for kind in sorted(groups)]
    return [*lines, TableLine("", "Overall", {"score": found.value}, prompts)]


def _groups(prompts: Sequence[Prompt], column: str | None = None) -> dict[str, list[Prompt]]:
    """Prompts by category, or by a column, in the order in which they first appear; broken rows belong nowhere."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        name = prompt.category if column is None else str(prompt.row.get(column, ""))
        if name:
            found.setdefault(name, []).append(prompt)
    return found


def _mean(prompts: Sequence[Prompt]) -> float | None:
    """The mean over prompts of the mean over their pictures."""
    means = []
    for prompt in prompts:
        values = [_plain(prompt, one.value) for one in prompt.pictures if one.status == "ok"]
        if values:
            means.append(math.fsum(values) / len(values))
    return math.fsum(means) / len(means) if means else None


def _plain(prompt: Prompt, value: Any) -> float:
    if isinstance(value, Atoms):
        known = [each for each in _final(prompt.row, value).values() if each is not None]
        return math.fsum(known) / len(known)
    return float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


# Benchmarks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What a format's report is made of.

    Attributes:
        size: prompts of the whole set.
        columns: of its table.
        digits: as its authors print.
        read: the values under the keys as one value, or None; raises what says that it is none.
        table: the lines.
        worst: the value of a picture that was never made, for a row; None where nobody knows it.
        inputs: names of scores.
        keeps: columns of a row that the table needs.
        notes: what must be said of the table.
    """

    size: int
    columns: tuple[str, ...]
    digits: int
    read: Callable[[Row, Found, bool], Any]
    table: Callable[[Sequence[Prompt], Compat | None], list[TableLine]]
    worst: Callable[[Row], Any]
    inputs: tuple[str, ...] = ("score",)
    keeps: tuple[str, ...] = ()
    notes: Callable[[Sequence[Prompt], Compat | None], list[str]] = lambda _, __: []


def _all_no(row: Row) -> Any:
    return Atoms({int(each["id"]): 0.0 for each in row["questions"]}, raw=True) if row.get("questions") else 0.0


BENCHMARKS: Mapping[str, Benchmark] = {
    "geneval": Benchmark(
        size=553,
        columns=("accuracy",),
        digits=2,
        read=_read_correct,
        table=_geneval_table,
        worst=lambda _: False,
    ),
    "dsg": Benchmark(
        size=1060,
        columns=("DSG",),
        digits=1,
        read=_read_atoms,
        table=_dsg_table,
        worst=_all_no,
        keeps=("questions",),
    ),
    "t2i_compbench": Benchmark(
        size=2400,
        columns=("score",),
        digits=4,
        read=_read_number,
        table=_compbench_table,
        worst=lambda _: 0.0,
    ),
    "parti": Benchmark(
        size=1632,
        columns=("score",),
        digits=4,
        read=_read_number,
        table=_parti_table,
        worst=lambda _: None,
        keeps=("challenge",),
    ),
    "dpg": Benchmark(
        size=1065,
        columns=("DPG",),
        digits=2,
        read=_read_atoms,
        table=_dpg_table,
        worst=_all_no,
        keeps=("questions",),
        notes=_dpg_notes,
    ),
    "longtext": Benchmark(
        size=320,
        columns=("recall",),
        digits=3,
        read=_read_matches,
        table=_longtext_table,
        worst=lambda row: _recall(row, "") if row else Matches(0, 0),
        keeps=("text", "language"),
    ),
    "gedit": Benchmark(
        size=1212,
        columns=("SC", "PQ", "O"),
        digits=2,
        read=_read_viescore,
        table=_gedit_table,
        worst=lambda _: VieScore(0.0, 0.0, 0.0),
        inputs=("semantic", "quality"),
        keeps=("language", "intersection"),
    ),
    "imgedit": Benchmark(
        size=737,
        columns=("score",),
        digits=2,
        read=_read_imgedit,
        table=_imgedit_table,
        worst=lambda _: 1.0,
    ),
}
