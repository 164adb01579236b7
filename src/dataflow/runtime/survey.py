"""What became of a step's rows, found out without the lock and without writing: also while another process runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from dataflow.errors import BadRequestError, InputError
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import Index, Journal
from dataflow.runtime.parts import Origins, cut, existing_images, identifier_of, is_mixed, lines_of_parts
from dataflow.runtime.planner import checked_rows, failure_reason
from dataflow.runtime.table import journal_folder
from dataflow.runtime.tally import Tally, add_up, worse
from dataflow.types import BadRow, Draft, GenerationRequest, Plan, Serving, Status, Summary
from dataflow.utils.storage import FileStorage

State = tuple[Status | Literal["pending"], str]
"""How one request stands, and why."""


@dataclass(slots=True, kw_only=True)
class Prospect:
    """What a run of a step would ask for.

    Attributes:
        requests: of all rows.
        requests_pending: those that a run would make.
        impossible: those of them that the serving would refuse before any work.
        messages: why, by the words, with how many.
        usd: what the pending ones will cost by the list price, rather too many US dollars than too few.
        unpriced: those of them of which nobody knows what they cost.
    """

    requests: int = 0
    requests_pending: int = 0
    impossible: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    usd: float = 0.0
    unpriced: int = 0

    def add(self, request: GenerationRequest, serving: Serving) -> None:
        """Count a request that a run would make."""
        self.requests_pending += 1
        try:
            serving.check(request)
        except BadRequestError as error:
            self.impossible += 1
            self.messages[str(error)] += 1
            return
        usd = serving.estimate(request)
        if usd is None:
            self.unpriced += 1
        else:
            self.usd += usd


def survey(plan: Plan, serving: Serving, storage: FileStorage, prospect: Prospect | None = None) -> Summary:
    """Count the rows of a step by what the journal says of their requests; no model is loaded.

    Rows that a fold would drop count as done: folding is left to the run.

    Args:
        plan: the step.
        serving: the plan's.
        storage: at the step.
        prospect: is told every request.

    Raises:
        InputError: the table cannot be read.
        ConfigError: the model the requests' identity depends on cannot be found.
    """
    parts = cut(plan, serving, storage, lines_of_parts(storage))
    if not parts:
        return _survey(
            plan, serving, storage, prospect, _index(serving, storage), identifier_of(plan, serving, storage)
        )
    mixed = is_mixed(storage, parts)
    index = _index(serving, storage) if mixed else None
    sums, origins = [], Origins()
    for part in parts:
        if part.is_finished(serving.image_io) and part.is_settled(None):
            sums.append(part.summary())
            origins.add(part)
            if prospect is not None:
                prospect.requests += part.known["requests"]
            continue
        identifier = identifier_of(plan, serving, part.storage, origins.count)
        known = index or _index(serving, part.storage)
        sums.append(_survey(plan, serving, part.storage, prospect, known, identifier))
        origins.take(identifier.origins)
    total = add_up(storage.step_name, sums, 0.0)
    if index is not None:
        total.usd, total.unpriced = index.usd, index.unpriced
    return total


def _index(serving: Serving, storage: FileStorage) -> Index:
    index = Journal(journal_folder(storage)).load()
    index.verify(existing_images(serving, index, storage))
    return index


def _survey(
    plan: Plan,
    serving: Serving,
    storage: FileStorage,
    prospect: Prospect | None,
    index: Index,
    identifier: Identifier,
) -> Summary:
    """The sum of a table, or of a part of one."""
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
        if prospect is not None:
            requests: list[GenerationRequest] = []
            for draft, identity, (state, _) in zip(drafts, identities, states, strict=True):
                parent = None if draft.after is None else requests[draft.after]
                requests.append(identifier.request(draft, identity, parent))
                prospect.requests += 1
                if state == "pending":
                    prospect.add(requests[-1], serving)
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
