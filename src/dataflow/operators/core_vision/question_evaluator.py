"""Questions about what a picture should show, answered one by one and made one score: DSG, TIFA, Soft-TIFA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard, get_args

from dataflow.errors import ConfigError, InputError
from dataflow.metrics import questions
from dataflow.metrics.questions import Aggregate
from dataflow.operators.combining import answered, combined, in_groups, lacking
from dataflow.operators.core_vision.image_evaluator import signed
from dataflow.operators.evaluation import pictures, with_scores
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Outcome, Plan, Row, Serving, Summary
from dataflow.utils.storage import FileStorage

Aggregation = Literal["dsg", "tifa", "soft_tifa_am", "soft_tifa_gm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """One question of a row.

    Attributes:
        id: its number in the row, from 1.
        question: the text.
        parents: the atoms that it presumes.
        answer: the right answer, in all its spellings.
        category: such as ``attribute - color``, or None.
    """

    id: int
    question: str
    parents: tuple[int, ...] = ()
    answer: tuple[str, ...] = ("yes",)
    category: str | None = None


class QuestionEvaluator:
    """Asks every question of a row about every picture of it and makes one score of the answers.

    Each question about each picture is one request: it is paid for once, by the picture's content and the question's
    text, and a new question costs only itself. A score is ``{"value", "atoms", "answered"}``: 0 to 1, higher is better;
    the score of each atom by its number; and how many were answered. With the soft aggregates ``soft`` says whether all
    of it are probabilities; where questions have categories, ``categories`` has the mean of each. A question without an
    answer is never a no: unless ``allow_unanswered``, the score is null with the status of the first such question if
    its answer could have changed the value.

    Args:
        pipe: a serving that answers ``{"correct", "probability", "soft"}`` and reads the request's parameter
            ``expected``: :class:`dataflow.serving.answers.AnswerServing`.
        aggregate: ``dsg``: share of right answers, where a question also counts as wrong if one that it presumes was
            answered wrong; ``tifa``: without that; ``soft_tifa_am`` and ``soft_tifa_gm``: arithmetic and geometric mean
            of the right answers' probabilities (:mod:`dataflow.metrics.questions`).
        allow_unanswered: take the value over the questions that were answered, as long as there is one; ``unanswered``
            in the score says what became of the others.
        options: how the step is run.

    Raises:
        ConfigError: there is no such aggregate.
    """

    answer: ClassVar = "words"

    def __init__(
        self,
        pipe: Serving,
        *,
        aggregate: Aggregation = "dsg",
        allow_unanswered: bool = False,
        options: RunOptions | None = None,
    ) -> None:
        if aggregate not in get_args(Aggregation):
            raise ConfigError(f"aggregate must be one of {', '.join(get_args(Aggregation))}, got {aggregate!r}")
        self.pipe = pipe
        self.aggregate: Aggregation = aggregate
        self.allow_unanswered = allow_unanswered
        self.options = options

    def plan(
        self,
        *,
        input_image_key: str = "images",
        input_question_key: str = "questions",
        output_key: str = "questions_score",
    ) -> Plan:
        """The step as a description.

        Args:
            input_image_key: column with the path of a picture, or a list of them.
            input_question_key: column with the questions: a list of texts, or of objects ``{"id": 1, "question":
                "Is there a dog?", "parents": [], "answer": "yes", "category": "entity"}``. Only ``question`` has to be
                there; ids go from 1 in order where there are none; ``answer`` may be a list of spellings.
            output_key: column that gets the scores, in the shape of the image column.
        """
        by = f"{signed(self.pipe.fingerprint())}/{self.aggregate}"

        def requests(row: Row) -> list[Draft]:
            atoms = read_atoms(row, input_question_key)
            return [
                Draft(prompt=atom.question, images=(path,), seed=0, params={"expected": list(atom.answer)})
                for path in pictures(row, input_image_key)
                for atom in atoms
            ]

        def fold(row: Row, outcomes: Sequence[Outcome]) -> Row:
            return with_scores(row, input_image_key, output_key, self._scored(row, outcomes, keys), by)

        keys = (input_image_key, input_question_key)
        return Plan(
            name=type(self).__name__,
            inputs=keys,
            outputs=(output_key, f"{output_key}_status", f"{output_key}_by"),
            requests=requests,
            fold=fold,
            serving=self.pipe,
            folding=f"{by} {self.allow_unanswered}",
        )

    def run(
        self,
        storage: FileStorage,
        input_image_key: str = "images",
        input_question_key: str = "questions",
        output_key: str = "questions_score",
    ) -> Summary:
        """Ask the questions of every row of the storage's step; see :meth:`plan` for the columns.

        Raises:
            DataflowError: see :func:`dataflow.runtime.engine.execute`.
        """
        plan = self.plan(input_image_key=input_image_key, input_question_key=input_question_key, output_key=output_key)
        return execute(plan, storage, self.options)

    def _scored(self, row: Row, outcomes: Sequence[Outcome], keys: tuple[str, str]) -> list[Outcome]:
        """One outcome for each picture."""
        image_key, question_key = keys
        try:
            number = len(pictures(row, image_key))
            atoms = read_atoms(row, question_key)
        except InputError:
            return list(outcomes)
        if not atoms:
            return [lacking("not_applicable", "the row has no questions")] * number
        if len(outcomes) < number * len(atoms):
            return list(outcomes)  # the row could not be used as a whole
        return [self._of_picture(atoms, group) for group in in_groups(outcomes, len(atoms))]

    def _of_picture(self, atoms: Sequence[Atom], outcomes: Sequence[Outcome]) -> Outcome:
        found, failures = {}, {}
        for atom, outcome in zip(atoms, outcomes, strict=True):
            answer, failure = answered(outcome, f"question {atom.id}")
            if failure is None and not _is_answer(answer):
                failure = lacking("parse_error", f"question {atom.id}: the serving answers no questions: {answer!r}")
            found[atom.id] = None if failure else answer
            if failure is not None:
                failures[atom.id] = failure
        aggregate, scores = self._aggregated(atoms, found)
        if aggregate.value is None:
            return next(iter(failures.values()))
        entry: dict[str, Any] = {
            "value": aggregate.value,
            "atoms": {str(atom): score for atom, score in scores.items()},
            "answered": aggregate.answered,
        }
        if self.aggregate.startswith("soft"):
            entry["soft"] = all(answer["soft"] for answer in found.values() if answer)
        if by_category := self._by_category(atoms, scores):
            entry["categories"] = by_category
        if failures:
            entry["unanswered"] = {str(atom): f"{one.reason}: {one.message}" for atom, one in failures.items()}
        return combined(entry)

    def _aggregated(
        self, atoms: Sequence[Atom], found: Mapping[int, Mapping[str, Any] | None]
    ) -> tuple[Aggregate, Mapping[int, float | None]]:
        """The value, and each atom's score."""
        loose = self.allow_unanswered
        right = {atom: None if answer is None else bool(answer["correct"]) for atom, answer in found.items()}
        match self.aggregate:
            case "dsg":
                parents = {atom.id: atom.parents for atom in atoms}
                return questions.dsg(right, parents, allow_unanswered=loose), questions.dsg_atoms(right, parents)
            case "tifa":
                scores = {atom: None if answer is None else float(answer) for atom, answer in right.items()}
                return questions.tifa(right.values(), allow_unanswered=loose), scores
        soft = {atom: None if answer is None else float(answer["probability"]) for atom, answer in found.items()}
        mean = questions.soft_tifa_am if self.aggregate == "soft_tifa_am" else questions.soft_tifa_gm
        return mean(list(soft.values()), allow_unanswered=loose), soft

    def _by_category(self, atoms: Sequence[Atom], scores: Mapping[int, float | None]) -> dict[str, float | None]:
        groups: dict[str, list[float | None]] = {}
        for atom in atoms:
            if atom.category is not None:
                groups.setdefault(atom.category, []).append(scores[atom.id])
        mean = questions.soft_tifa_am
        return {name: mean(group, allow_unanswered=self.allow_unanswered).value for name, group in groups.items()}


def read_atoms(row: Row, column: str) -> list[Atom]:
    """The questions of a row; none where the cell is empty.

    Raises:
        InputError: there is no such column, or it holds something else.
    """
    if column not in row:
        raise InputError("the row has no such column", field=column)
    entries = row[column]
    if entries in (None, ""):
        return []
    if not isinstance(entries, list):
        raise InputError(f"expected a list of questions, found {type(entries).__name__}", field=column)
    atoms = [_atom(entry, number, column) for number, entry in enumerate(entries, start=1)]
    known = {atom.id for atom in atoms}
    if len(known) < len(atoms):
        raise InputError("two questions have the same id", field=column)
    for atom in atoms:
        if strangers := [parent for parent in atom.parents if parent not in known]:
            raise InputError(f"question {atom.id} presumes {strangers[0]}, which is not there", field=column)
    return atoms


def _atom(entry: object, number: int, column: str) -> Atom:
    fields: object = {"question": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping):
        raise InputError(f"question {number}: expected text or an object, found {type(entry).__name__}", field=column)
    question, own_id = fields.get("question"), fields.get("id", number)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"question {number} has no text under 'question'", field=column)
    if not _is_number(own_id) or own_id < 1:
        raise InputError(f"question {number}: id must be a whole number from 1, found {own_id!r}", field=column)
    parents = fields.get("parents") or []
    if not isinstance(parents, list) or not all(_is_number(parent) for parent in parents):
        raise InputError(f"question {number}: parents must be a list of ids, found {parents!r}", field=column)
    answer = fields.get("answer", "yes")
    spellings = [answer] if isinstance(answer, str) else answer
    if not isinstance(spellings, list) or not spellings or not all(isinstance(s, str) and s.strip() for s in spellings):
        raise InputError(f"question {number}: answer must be text or a list of spellings", field=column)
    category = fields.get("category")
    if category is not None and not isinstance(category, str):
        raise InputError(f"question {number}: category must be text, found {category!r}", field=column)
    return Atom(
        id=own_id,
        question=question,
        parents=tuple(parent for parent in parents if parent),  # DSG writes 0 for none
        answer=tuple(spellings),
        category=category,
    )


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_answer(value: object) -> bool:
    return isinstance(value, Mapping) and {"correct", "probability", "soft"} <= value.keys()
