"""From answers about an image's parts to one score: TIFA, DSG, DPG-Bench, Soft-TIFA and VQAScore.

An answer is True (yes, or right), False or None. None is an atom that nobody answered: the judge failed, refused or
could not be read. It is never taken for a no. Unless the caller allows it, an aggregate over such atoms is None and its
status says why: ``ok``; ``unanswered``, an atom without an answer could change the value; ``partial``, such atoms were
left out with the caller's leave; ``not_applicable``, there are no atoms at all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

Answer = bool | None
Token = TypeVar("Token", bound=Hashable)
Status = Literal["ok", "unanswered", "partial", "not_applicable"]

_ROUNDING = 1e-6
"""What float32 probabilities may be above 1."""


class Aggregate(NamedTuple):
    """A value in 0..1 (DPG-Bench: 0..100), or None, and what it rests on."""

    value: float | None
    status: Status
    atoms: int
    answered: int


class Question(NamedTuple):
    """One atom of DPG-Bench.

    Attributes:
        item_id: the prompt it belongs to.
        id: its number within the prompt, from 1.
        category: as in the file's tuple before the bracket, such as ``attribute - color``.
        parents: the atoms that it presumes; 0 stands for none.
    """

    item_id: str
    id: int
    category: str
    parents: Sequence[int] = ()


@dataclass(frozen=True)
class DpgReport:
    """DPG-Bench of one model, every value in 0..100.

    Attributes:
        score: mean over prompts; its atoms are prompts.
        prompts: per prompt, the mean over its pictures; its atoms are those of all pictures.
        broad: per category before the dash, such as ``attribute``.
        detailed: per category, such as ``attribute - color``.
        left_out: prompts that compat="ella" drops for the reason that its reference does.
    """

    score: Aggregate
    prompts: Mapping[str, Aggregate]
    broad: Mapping[str, Aggregate]
    detailed: Mapping[str, Aggregate]
    left_out: Sequence[str]


def is_yes(answer: str | None) -> Answer:
    """Whether a text is the answer yes: nothing but the word, whatever its case and the punctuation around it.

    Returns:
        True for yes, None for None, else False, also for "yes, but" and for no answer in the words asked for.

    Source: DSG, arXiv:2310.18235 (Apache-2.0), which compares with "yes" after the same cleaning.
    """
    return None if answer is None else answer.strip(" \t\r\n.,?!\"'").casefold() == "yes"


def tifa(correct: Iterable[Answer], *, allow_unanswered: bool = False) -> Aggregate:
    """TIFA: share of questions answered right. For yes/no atoms this is DSG without its dependencies.

    Args:
        correct: per question whether the answer is the one expected.
        allow_unanswered: take the mean over the answered ones.

    Returns:
        0..1, higher is better; None by the rules of this module.

    Source: Hu et al., arXiv:2303.11897 (Apache-2.0).
    """
    return _mean([None if one is None else float(one) for one in correct], allow_unanswered)


def dsg(
    answers: Mapping[int, Answer], parents: Mapping[int, Sequence[int]], *, allow_unanswered: bool = False
) -> Aggregate:
    """Davidsonian Scene Graph: mean of yes, where an atom counts as no if any parent's own answer is not yes.

    Parents are looked up by their raw answers: a parent that was zeroed for its own parent's sake does not zero
    further. An unanswered atom whose parent is a no is a no whatever the answer; a yes under an unanswered parent is
    unknown.

    Args:
        answers: per atom, numbered from 1.
        parents: per atom the atoms that it presumes; 0 or no entry stands for none.
        allow_unanswered: take the mean over the atoms that are known.

    Returns:
        0..1, higher is better; None by the rules of this module. ``answered`` counts the atoms that are known.

    Raises:
        ValueError: a parent or a child that is no atom.

    Source: Cho et al., arXiv:2310.18235; j-min/DSG (Apache-2.0).
    """
    return _mean(list(dsg_atoms(answers, parents).values()), allow_unanswered)


def dsg_atoms(answers: Mapping[int, Answer], parents: Mapping[int, Sequence[int]]) -> dict[int, float | None]:
    """Per atom 1, 0 or None (unknown) after :func:`dsg`'s rule, in the order of ``answers``.

    Raises:
        ValueError: a parent or a child that is no atom.
    """
    for child, its_parents in parents.items():
        strangers = [one for one in (child, *its_parents) if one and one not in answers]
        if strangers:
            raise ValueError(f"atom {child}: {strangers[0]} is no atom of this prompt")
    scores: dict[int, float | None] = {}
    for atom, answer in answers.items():
        needed = [answer, *(answers[parent] for parent in parents.get(atom, ()) if parent)]
        scores[atom] = 0.0 if False in needed else None if None in needed else 1.0
    return scores


def dpg_bench(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Mapping[int, Answer]]],
    *,
    compat: Literal["ella"] | None = None,
    allow_unanswered: bool = False,
) -> DpgReport:
    """DPG-Bench: per picture the mean of its atoms as in DSG, of the prompt's pictures, of the prompts; times 100.

    The clean form gives every atom :func:`dsg`'s score, in the categories too, and wants every prompt of ``questions``.
    With ``compat="ella"`` it is what the reference program prints, with its quirks:

    - the first row of the file is not read, so a prompt with an atom that presumes that row cannot be scored and is
      left out (``left_out``), unless an earlier parent already is a no;
    - atoms are zeroed in place in the order of the file, so a zeroed parent zeroes its later children too;
    - categories show the answers as given, not zeroed, of each prompt's last picture only;
    - prompts without pictures are left out of the mean without a word.

    What it does not copy: an unanswered atom is a no there.

    Args:
        questions: in the file's order.
        answers: per prompt, for each of its pictures (the benchmark makes 4), the answers per atom.
        compat: "ella" or None.
        allow_unanswered: leave out unanswered atoms, and prompts without a value.

    Returns:
        Scores in 0..100, higher is better; None by the rules of this module.

    Raises:
        ValueError: another ``compat``, an atom twice, a parent that is no atom, or answers to unknown prompts or atoms.

    Source: Hu et al., arXiv:2403.05135; TencentQQGYLab/ELLA, dpg_bench (Apache-2.0).
    """
    if compat not in (None, "ella"):
        raise ValueError(f"compat: expected ella or None, not {compat!r}")
    ella = compat == "ella"
    prompts = _by_prompt(questions)
    _check_answers(prompts, answers)
    if ella:
        prompts = {item: atoms for item, atoms in _by_prompt(questions[1:]).items() if answers.get(item)}
    values: dict[str, Aggregate] = {}
    shown: dict[str, list[float | None]] = {}
    left_out: list[str] = []
    for item, atoms in prompts.items():
        pictures = answers.get(item, ())
        try:
            scored = [_picture(atoms, picture, ella) for picture in pictures]
        except KeyError:
            left_out.append(item)
            continue
        values[item] = _prompt(scored, len(atoms), allow_unanswered)
        for atom in atoms.values():
            category = shown.setdefault(atom.category, [])
            if ella:
                category.append(_number(pictures[-1].get(atom.id)))
            else:
                category.extend([picture[atom.id] for picture in scored] or [None])
    broad: dict[str, list[float | None]] = {}
    for category, found in shown.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(found)
    score = _mean([one.value for one in values.values()], allow_unanswered)
    if score.status == "ok" and any(one.status == "partial" for one in values.values()):
        score = score._replace(status="partial")
    return DpgReport(
        score=score,
        prompts=values,
        broad={name: _percent(_mean(found, allow_unanswered)) for name, found in broad.items()},
        detailed={name: _percent(_mean(found, allow_unanswered)) for name, found in shown.items()},
        left_out=left_out,
    )


def soft_tifa_am(probabilities: Sequence[float | None], *, allow_unanswered: bool = False) -> Aggregate:
    """Soft-TIFA AM, the estimate per atom: arithmetic mean of the probabilities of the right answers.

    Args:
        probabilities: per atom, 0..1.
        allow_unanswered: take the mean over the answered ones.

    Returns:
        0..1 (GenEval 2 prints it x 100), higher is better; None by the rules of this module.

    Raises:
        ValueError: a number outside 0..1.

    Source: Kamath et al., arXiv:2512.16853; written from the paper (the reference is CC BY-NC).
    """
    return _mean([_probability(one) for one in probabilities], allow_unanswered)


def soft_tifa_gm(probabilities: Sequence[float | None], *, allow_unanswered: bool = False) -> Aggregate:
    """Soft-TIFA GM, the estimate per prompt: geometric mean of the probabilities of the right answers.

    Args:
        probabilities: per atom, 0..1; one 0 makes the whole 0.
        allow_unanswered: take the mean over the answered ones.

    Returns:
        0..1 (GenEval 2 prints it x 100), never above the arithmetic mean, higher is better; None by the rules of this
        module.

    Raises:
        ValueError: a number outside 0..1.

    Source: as :func:`soft_tifa_am`.
    """
    checked = [_probability(one) for one in probabilities]
    known = [one for one in checked if one is not None]
    arithmetic = _mean(checked, allow_unanswered)
    if arithmetic.value is None:
        return arithmetic
    if min(known) == 0:
        return arithmetic._replace(value=0.0)
    value = math.exp(math.fsum(map(math.log, known)) / len(known))
    return arithmetic._replace(value=min(value, arithmetic.value))


def answer_probability(logprobs: Sequence[float]) -> float:
    """Geometric mean of an answer's token probabilities: ``exp(mean of the log probabilities)``.

    This is VQAScore where the answer is "Yes" to 'Does this figure show "{prompt}"? Please answer yes or no.'

    Args:
        logprobs: of the answer's tokens, natural logarithm, at most 0; the end token's belongs in only if it was
            scored.

    Returns:
        0..1; higher is better.

    Raises:
        ValueError: no tokens, NaN, or a logarithm above 0.

    Source: Lin et al., arXiv:2404.01291; t2v_metrics, Qwen models (Apache-2.0).
    """
    if not len(logprobs):
        raise ValueError("logprobs: an answer has at least one token")
    return math.exp(sum(map(_logarithm, logprobs)) / len(logprobs))


def first_token_probability(
    logprobs: Mapping[Token, float], spellings: Collection[Token], *, absent: float | None = None
) -> float | None:
    """Probability that the answer starts with any of the spellings: the sum over the tokens that are one, each once.

    Two spellings may be one token (the same text, or the same id after the tokenizer): given as keys of ``logprobs``,
    they count once; GenEval 2's program counts such a token twice.

    Args:
        logprobs: log probability per token at the first place, keyed by text or id; often only the 5 to 20 best.
        spellings: the keys that mean the answer, such as "Yes", " Yes", "yes", " yes".
        absent: the answer where no spelling is among the tokens. Of a list that was cut off None is honest; where the
            list holds the whole vocabulary or nearly all probability, 0.0 is.

    Returns:
        0..1, or ``absent``; higher is better.

    Raises:
        ValueError: no tokens, no spellings, a text where several are wanted, NaN, a logarithm above 0, or a sum above
            1.

    Source: VQAScore, arXiv:2404.01291; Soft-TIFA, arXiv:2512.16853.
    """
    if not logprobs or not spellings or isinstance(spellings, str):
        raise ValueError("expected tokens with log probabilities and a collection of spellings")
    found = [_logarithm(logprobs[one]) for one in set(spellings) if one in logprobs]
    if not found:
        return absent
    total = math.fsum(map(math.exp, found))
    if total > 1 + _ROUNDING:
        raise ValueError(f"logprobs: the spellings' probabilities sum to {total}")
    return min(total, 1.0)


def _mean(values: Sequence[float | None], allow_unanswered: bool) -> Aggregate:
    known = [value for value in values if value is not None]
    if not values:
        return Aggregate(None, "not_applicable", 0, 0)
    if len(known) == len(values):
        return Aggregate(math.fsum(known) / len(known), "ok", len(values), len(known))
    if allow_unanswered and known:
        return Aggregate(math.fsum(known) / len(known), "partial", len(values), len(known))
    return Aggregate(None, "unanswered", len(values), len(known))


def _percent(aggregate: Aggregate) -> Aggregate:
    return aggregate if aggregate.value is None else aggregate._replace(value=100 * aggregate.value)


def _number(answer: Answer) -> float | None:
    return None if answer is None else float(answer)


def _by_prompt(questions: Sequence[Question]) -> dict[str, dict[int, Question]]:
    prompts: dict[str, dict[int, Question]] = {}
    for question in questions:
        atoms = prompts.setdefault(question.item_id, {})
        if question.id in atoms or question.id < 1:
            raise ValueError(f"{question.item_id}: atom {question.id} is there twice or not numbered from 1")
        atoms[question.id] = question
    return prompts


def _check_answers(
    prompts: Mapping[str, Mapping[int, Question]], answers: Mapping[str, Sequence[Mapping[int, Answer]]]
) -> None:
    for item, pictures in answers.items():
        if item not in prompts:
            raise ValueError(f"answers to {item!r}, of which there are no questions")
        for picture in pictures:
            strangers = [atom for atom in picture if atom not in prompts[item]]
            if strangers:
                raise ValueError(f"{item}: {strangers[0]} is no atom of this prompt")
    for item, atoms in prompts.items():
        for atom in atoms.values():
            if any(parent and parent not in atoms for parent in atom.parents):
                raise ValueError(f"{item}: atom {atom.id} presumes one that is no atom of this prompt")


def _picture(atoms: Mapping[int, Question], answers: Mapping[int, Answer], ella: bool) -> dict[int, float | None]:
    """Score per atom of one picture.

    Raises:
        KeyError: with ``ella``, a parent that was not read had to be looked up.
    """
    if not ella:
        return dsg_atoms({atom: answers.get(atom) for atom in atoms}, {a.id: a.parents for a in atoms.values()})
    scores = {atom: _number(answers.get(atom)) for atom in atoms}
    for atom in atoms.values():
        unknown = scores[atom.id] is None
        for parent in filter(None, atom.parents):
            found = scores[parent]
            if found == 0:
                scores[atom.id], unknown = 0.0, False
                break
            unknown = unknown or found is None
        if unknown and scores[atom.id] != 0:
            scores[atom.id] = None
    return scores


def _prompt(pictures: Sequence[Mapping[int, float | None]], atoms: int, allow_unanswered: bool) -> Aggregate:
    """The mean of the pictures' means, which is not that of all atoms where some are left out."""
    if not pictures:
        return Aggregate(None, "unanswered", atoms, 0)
    each = [_mean(list(picture.values()), allow_unanswered) for picture in pictures]
    whole = _mean([one.value for one in each], allow_unanswered)
    answered = sum(one.answered for one in each)
    partial = whole.value is not None and answered < atoms * len(pictures)
    status: Status = "partial" if partial else whole.status
    return _percent(Aggregate(whole.value, status, atoms * len(pictures), answered))


def _probability(value: float | None) -> float | None:
    if value is None:
        return None
    if not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise ValueError(f"expected a probability in 0..1, not {value}")
    return min(max(float(value), 0.0), 1.0)


def _logarithm(value: float) -> float:
    if not value <= _ROUNDING:
        raise ValueError(f"expected a log probability of at most 0, not {value}")
    return min(float(value), 0.0)
