"""What became of a step's rows, found out without the lock and without writing: also while another process runs."""

from __future__ import annotations

from typing import Literal

from dataflow.errors import InputError
from dataflow.io import ImageIO
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import Index, Journal
from dataflow.runtime.planner import checked_rows, failure_reason
from dataflow.runtime.table import journal_folder
from dataflow.runtime.tally import Tally, worse
from dataflow.types import BadRow, Draft, Plan, Serving, Status, Summary
from dataflow.utils.storage import FileStorage

State = tuple[Status | Literal["pending"], str]
"""How one request stands, and why."""


def survey(plan: Plan, serving: Serving, storage: FileStorage) -> Summary:
    """Count the rows of a step by what the journal says of their requests; no model is loaded.

    Rows that a fold would drop count as done: folding is left to the run.

    Args:
        plan: the step.
        serving: the plan's.
        storage: at the step.

    Raises:
        InputError: the table cannot be read.
        ConfigError: the model the requests' identity depends on cannot be found.
    """
    existing = serving.image_io.existing() if serving.image_io else ()
    index = Journal(journal_folder(storage)).load()
    index.verify(existing)
    identifier = Identifier(serving, plan.seed, resolve=storage.resolve, digest=ImageIO(storage.cache_path).digest)
    tally = Tally(usd=index.usd, unpriced=index.unpriced)
    for row in checked_rows(plan, storage):
        try:
            if isinstance(row, BadRow):
                raise InputError(row.error)
            drafts = plan.requests(row)
            identities = identifier.identify(drafts)
        except InputError as error:
            tally.count("failed", failure_reason(row, error))
            continue
        states: list[State] = []
        for draft, identity in zip(drafts, identities, strict=True):
            if identity.broken is not None:
                states.append(("failed", failure_reason(row, identity.broken)))
                continue
            states.append(_state(index, draft, identity.key, states))
            if states[-1][0] == "done":
                tally.add_images(*index.sums(identity.key))
        _count(tally, states)
    return tally.summary(storage.step_name, tally.planned, 0.0)


def _state(index: Index, draft: Draft, key: bytes, before: list[State]) -> State:
    if index.is_done(key):
        return "done", ""
    if ending := index.endings.get(key):
        return ("refused" if ending.status == "refused" else "failed"), ending.reason
    if draft.after is not None and before[draft.after][0] in ("refused", "failed"):
        return "failed", "previous_turn"
    return "pending", ""


def _count(tally: Tally, states: list[State]) -> None:
    status: Status = "done"
    reason = ""
    for each, why in states:
        if each == "pending":
            tally.planned += 1
            return
        if worse(status, each):
            status, reason = each, why
    tally.count(status, reason)
