"""Short questions about a picture, and how probable a vision-language model finds the right answer: VQAScore, atoms.

Sources: VQAScore, arXiv:2404.01291 (t2v_metrics, Apache-2.0); DSG, arXiv:2310.18235; Soft-TIFA, arXiv:2512.16853.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dataflow.errors import BadRequestError, ConfigError
from dataflow.metrics.questions import first_token_probability
from dataflow.serving.words import AskingServing, WordService, unreadable
from dataflow.types import GenerationRequest, GenerationResult

ATOM = "{prompt}\nAnswer with one word: yes or no."
VQA_SCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'

_UNLISTED = 0.01
"""Probability that may lie outside the listed tokens for one that is not among them to count as 0."""


class AnswerServing(AskingServing):
    """Asks a service one short question about a picture: does it answer as expected, and how probably.

    An answer is ``{"answer", "correct", "probability", "soft"}``: the text; whether it is the expected one; the
    probability of that, 0 to 1; and whether it was computed from the service's log probabilities (true) or is 1 or 0
    after the text, because the service sends none (false).

    The probability is that of the first token, summed over all tokens that are the expected answer but for case and the
    spaces and punctuation around it. Log probabilities are to be those of the raw logits, whatever the temperature, as
    OpenAI and vLLM (``logprobs_mode="raw_logprobs"``, its default) send them.

    With yes or no expected, every other answer is ``parse_error``: prose, nothing, another language, a number. With
    another answer expected, one with more words than the expected one is.

    Args:
        service: a chat-completions service or a model on this machine, without ``image_io``. It is asked with
            ``max_tokens``, ``temperature=0``, ``logprobs`` and ``top_logprobs``; what stands in its own
            ``request_params`` stays, so that ``{"logprobs": None, "top_logprobs": None}`` leaves both out for a service
            that refuses them, and a service that knows only ``max_completion_tokens`` gets only that.
        template: the question; ``{prompt}`` stands for the request's prompt.
        expected: the right answer, or all its spellings (``["two", "2"]``), where a request names none itself in its
            parameter ``expected``.
        tokens: the tokens that are the expected answer, letter for letter; None for the rule above.
        max_tokens: of the answer.
        top_logprobs: alternatives that the service lists, 0 to 20.

    Raises:
        ConfigError: the service makes images, or a value cannot be used.
    """

    kind = "answers"
    own_params = frozenset({"expected"})

    def __init__(
        self,
        service: WordService,
        *,
        template: str = ATOM,
        expected: str | Sequence[str] = "yes",
        tokens: Sequence[str] | None = None,
        max_tokens: int = 1,
        top_logprobs: int = 20,
    ) -> None:
        if "{prompt}" not in template:
            raise ConfigError(f"template must have {{prompt}} in it, got {template!r}")
        if max_tokens < 1 or not 0 <= top_logprobs <= 20:
            raise ConfigError(f"max_tokens must be from 1, top_logprobs from 0 to 20: {max_tokens}, {top_logprobs}")
        limit = {} if "max_completion_tokens" in service.params else {"max_tokens": max_tokens}
        super().__init__(service, {**limit, "temperature": 0, "logprobs": True, "top_logprobs": top_logprobs})
        self.template = template
        self.expected = [expected] if isinstance(expected, str) else list(expected)
        self.tokens = None if tokens is None else tuple(tokens)
        if not _spellings(self.expected):
            raise ConfigError(f"expected must be an answer or several spellings of one, got {expected!r}")

    def facts(self) -> Mapping[str, Any]:
        """The question's words and what counts as its answer."""
        return {"template": self.template, "tokens": self.tokens}

    def default_params(self) -> Mapping[str, Any]:
        """The service's, and the expected answer."""
        return {**super().default_params(), "expected": self.expected}

    def check(self, request: GenerationRequest) -> None:
        """As the service.

        Raises:
            BadRequestError: there is no question, no picture, or no answer that could be expected.
        """
        if not request.prompt or not request.images:
            raise BadRequestError("there is nothing to ask: with_prompt=True", reason="not_applicable")
        if not _spellings(request.params.get("expected", self.expected)):
            raise BadRequestError("expected must be an answer or a list of its spellings")
        super().check(request)

    def asked(self, request: GenerationRequest) -> str:
        """The template with the prompt in it."""
        return self.template.replace("{prompt}", request.prompt)

    def read(self, request: GenerationRequest, result: GenerationResult) -> Mapping[str, Any]:
        """The answer and its probability."""
        expected = request.params.get("expected", self.expected)
        spellings = _spellings(expected)
        text = result.text or ""
        correct = _correct(text, spellings)
        tokens = self.tokens if expected == self.expected else None
        probability = _probability(result, spellings, tokens)
        soft = probability is not None
        return {
            "answer": text.strip(),
            "correct": correct,
            "probability": probability if soft else float(correct),
            "soft": soft,
        }


def vqa_score(service: WordService, **options: Any) -> AnswerServing:
    """VQAScore: the probability of "Yes" to 'Does this figure show "{prompt}"? Please answer yes or no.'

    Its ``probability`` is the score, 0 to 1, higher is better. As published it is that of the token ``Yes`` alone and
    not of other spellings. Where that answer is one token, as with Qwen's models, it equals the geometric mean over the
    answer's tokens that t2v_metrics computes for them.

    Args:
        service: see :class:`AnswerServing`.
        options: likewise.
    """
    return AnswerServing(service, **{"template": VQA_SCORE, "tokens": ("Yes", " Yes"), **options})


def _plain(text: str) -> str:
    """What is compared, as :func:`dataflow.metrics.questions.is_yes` does."""
    return text.strip(" \t\r\n.,?!\"'").casefold()


def _spellings(expected: Any) -> frozenset[str]:
    """The expected answers as they are compared; none where it is something else."""
    found = [expected] if isinstance(expected, str) else expected
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        return frozenset()
    return frozenset(_plain(one) for one in found) - {""}


def _correct(text: str, spellings: frozenset[str]) -> bool:
    """Whether the text is the expected answer.

    Raises:
        BadOutputError: ``parse_error``; it answers something else than the question.
    """
    answer = _plain(text)
    if answer in spellings:
        return True
    if spellings & {"yes", "no"}:
        if answer not in ("yes", "no"):
            raise unreadable("is neither yes nor no", text)
    elif not answer or len(answer.split()) > max(len(one.split()) for one in spellings):
        raise unreadable("is no short answer", text)
    return False


def _probability(result: GenerationResult, spellings: frozenset[str], exact: Sequence[str] | None) -> float | None:
    """Of the expected answer at the first token that is not blank; None where the service does not tell.

    Raises:
        BadOutputError: ``parse_error``; the log probabilities are none.
    """
    logprobs = result.provenance.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not entries:
        return None
    try:
        first = next((entry for entry in entries if _plain(entry["token"])), entries[0])
        # The token that was chosen need not be among the most probable.
        listed = {entry["token"]: float(entry["logprob"]) for entry in (first, *(first.get("top_logprobs") or ()))}
        wanted = [token for token in listed if (_plain(token) in spellings if exact is None else token in exact)]
        if wanted:
            return first_token_probability(listed, wanted)
        rest = 1 - math.fsum(map(math.exp, listed.values()))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise unreadable(f"has log probabilities that are none ({error})", result.text or "") from None
    return 0.0 if rest <= _UNLISTED else None
