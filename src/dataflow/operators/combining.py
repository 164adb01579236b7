"""Several outcomes that make one score of a picture: atoms of a question, passes of a judge, both orders of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from dataflow.types import Outcome


def answered(outcome: Outcome, name: str) -> tuple[Any, Outcome | None]:
    """What an outcome's JSON says, or (None, the outcome that says why there is nothing).

    Args:
        outcome: of one of several requests.
        name: what it is called among them, for the message.
    """
    if outcome.status != "done":
        return None, replace(outcome, message=f"{name}: {outcome.message}")
    try:
        return orjson.loads(outcome.text or ""), None
    except ValueError:
        message = f"{name}: the answer is no JSON"
        return None, replace(outcome, status="failed", reason="parse_error", message=message)


def combined(value: Any) -> Outcome:
    """The outcome of all together, for :func:`dataflow.operators.evaluation.with_scores`."""
    return Outcome(request_id="", status="done", text=orjson.dumps(value).decode())


def lacking(reason: str, message: str) -> Outcome:
    """The outcome of all together where no single one says why there is nothing."""
    return Outcome(request_id="", status="failed", reason=reason, message=message)


def in_groups(outcomes: Sequence[Outcome], size: int) -> list[Sequence[Outcome]]:
    """The outcomes of each picture, ``size`` for each."""
    return [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
