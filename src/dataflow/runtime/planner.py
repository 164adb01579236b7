"""The pass over the table: skips what is done and hands out batches of what is not."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from array import array
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dataflow.errors import BadRequestError, ImageError, InputError, RunStoppedError
from dataflow.io import ImageIO
from dataflow.picture_files import absolute
from dataflow.runtime.identity import ID_BYTES, Identifier
from dataflow.runtime.journal import Ending, Index, Journal, done_record, ending_record
from dataflow.runtime.tally import Tally, worse
from dataflow.types import (
    BadRow,
    Draft,
    GenerationRequest,
    ImageStore,
    Outcome,
    Plan,
    Row,
    SavedImage,
    Serving,
    Status,
    Turn,
)
from dataflow.utils.storage import FileStorage

logger = logging.getLogger(__name__)

SUSPECT_STARTS = 3
"""A request that was in hand this often when a process died is tried by itself, after all others."""
DEADLY_STARTS = 3
"""A request that was by itself in hand this often when a process died has failed."""
PEEK_ROWS = 100


@dataclass(slots=True)
class RowBook:
    """What was planned for each row, 16 bytes a request, for the fold that follows."""

    keys: bytearray = field(default_factory=bytearray)
    counts: array[int] = field(default_factory=lambda: array("I"))
    errors: dict[int, Ending] = field(default_factory=dict)

    def add(self, keys: list[bytes]) -> None:
        self.counts.append(len(keys))
        for key in keys:
            self.keys += key

    def add_error(self, error: Ending) -> None:
        self.errors[len(self.counts)] = error
        self.counts.append(0)

    @property
    def requests(self) -> int:
        """How many there are."""
        return len(self.keys) // ID_BYTES

    def __iter__(self) -> Iterator[tuple[list[bytes], Ending | None]]:
        """Keys and error of every row, in order."""
        at = 0
        for row, count in enumerate(self.counts):
            end = at + count * ID_BYTES
            yield [bytes(self.keys[i : i + ID_BYTES]) for i in range(at, end, ID_BYTES)], self.errors.get(row)
            at = end


class Planner:
    """Hands out batches; :meth:`next_batch` runs in one thread, :meth:`parent_ended` may be called from another.

    Args:
        plan: the step.
        storage: its table.
        serving: who makes it.
        index: what the journal says.
        journal: open for writing; adopted images and refused-before-work requests are recorded here.
        tally: counts rows.
        retry: reasons of earlier failures to try again; None for all but refusals.
        only: numbers, from 0, of the rows to make; None for all.
    """

    def __init__(
        self,
        plan: Plan,
        storage: FileStorage,
        serving: Serving,
        identifier: Identifier,
        index: Index,
        journal: Journal,
        tally: Tally,
        retry: frozenset[str] | None,
        only: frozenset[int] | None = None,
    ) -> None:
        self.plan, self.storage, self.serving, self.identifier = plan, storage, serving, identifier
        self.index, self.journal, self.tally, self.retry = index, journal, tally, retry
        self.book = RowBook()
        self.stopping = False
        self.exhausted = False
        self._rows = checked_rows(plan, storage)
        self._only = only
        self._window = max(256, 16 * serving.batch_size)
        self._buckets: dict[Hashable, deque[GenerationRequest]] = {}
        self._waiting_in_buckets = 0
        self._caps: dict[Hashable, int] = {}
        self._suspects: deque[GenerationRequest] = deque()
        self._in_hand: set[str] = set()
        self._children: dict[str, list[GenerationRequest]] = {}
        self._released: deque[GenerationRequest] = deque()
        self._lock = threading.Lock()

    def next_batch(self) -> list[GenerationRequest] | None:
        """The next requests that may share a batch, or None when nothing is ready (any more, or before another ends).

        Reads on in the table only as far as needed to fill one batch.
        """
        batch = self._next_batch()
        if batch is not None:
            self._in_hand.update(request.request_id for request in batch)
        return batch

    def _next_batch(self) -> list[GenerationRequest] | None:
        while not self.stopping:
            while self._released:
                self._enqueue(self._released.popleft())
            if (batch := self._pop(full=self._waiting_in_buckets < self._window)) is not None:
                return batch
            if self.exhausted:
                return self._pop(full=False) or self._pop_suspect()
            self._read_on()
        return None

    def _read_on(self) -> None:
        """Plan rows until one of them leaves something to make, or there are none left."""
        waiting = self._waiting_in_buckets
        for row in self._rows:
            self._plan_row(row)
            if self._waiting_in_buckets > waiting or self._released or self.stopping:
                return
        self.exhausted = True
        # The least suspect first: where it is the machine that fails, no request takes all the blame.
        alone = self.index.alone
        self._suspects = deque(sorted(self._suspects, key=lambda r: alone.get(bytes.fromhex(r.request_id), 0)))

    def batch_key(self, request: GenerationRequest) -> Hashable:
        if request.alone:
            return request.request_id
        return self.serving.batch_key(request), request.job

    def shrink(self, request: GenerationRequest, size: int) -> None:
        """From now on no batch of this request's kind holds more than ``size``."""
        key = self.batch_key(request)
        self._caps[key] = min(size, self._caps.get(key, size))

    def parent_ended(self, parent: GenerationRequest, outcome: Outcome) -> list[tuple[bytes, Ending]]:
        """The next turns of ``parent``: released if it has its image, else ended like it; those are returned."""
        self._in_hand.discard(parent.request_id)
        with self._lock:
            children = self._children.pop(parent.request_id, [])
        ended: list[tuple[bytes, Ending]] = []
        for request in children:
            if outcome.status == "done" and outcome.images:
                self._released.append(_next_turn(request, parent, outcome.images[0]))
            else:
                ended.append(
                    (bytes.fromhex(request.request_id), _orphaned(outcome.status, outcome.message or outcome.reason))
                )
                orphan = Outcome(request_id=request.request_id, status="failed", reason="previous_turn")
                ended += self.parent_ended(request, orphan)
        return ended

    def outcome(self, key: bytes) -> Outcome:
        """How a request ended, from the index."""
        index = self.index
        if index.is_done(key):
            store = self.serving.image_io
            images = tuple(store.path(name) for name in index.names(key)) if store else ()
            return Outcome(request_id=key.hex(), status="done", images=images, text=index.text(key))
        ending = index.endings[key]
        status: Status = "refused" if ending.status == "refused" else "failed"
        return Outcome(request_id=key.hex(), status=status, reason=ending.reason, message=ending.message)

    # -- one row ---------------------------------------------------------------------------------------------------

    def _plan_row(self, row: Row | BadRow) -> None:
        try:
            if isinstance(row, BadRow):
                raise InputError(row.error)
            drafts = self.plan.requests(row)
            identities = self.identifier.identify(drafts)
        except InputError as error:
            if isinstance(error, ImageError) and error.reason == "unreachable":  # no fault of this row's
                raise RunStoppedError(f"stopped: {error}; the same command goes on when it does") from error
            reason = failure_reason(row, error)
            where = InputError(
                error.message if error.path is None else f"{error.path}: {error.message}",
                path=self.storage.input_path,
                row=self.tally.next_row,
                field=error.field,
            )
            logger.warning("%s", where)
            self.book.add_error(Ending("failed", reason, str(where)))
            self.tally.add_row([], "failed", reason)
            return
        index, tally = self.index, self.tally
        self.book.add([identity.key for identity in identities])
        images = size = 0
        for identity in identities:
            if not index.is_done(identity.key):
                break
            count, bytes_ = index.sums(identity.key)
            images += count
            size += bytes_
        else:
            tally.add_done_row(images, size)
            return
        status: Status = "done"
        reason = ""
        pending: list[GenerationRequest] = []
        drafts_of: list[tuple[Draft, GenerationRequest]] = []
        for draft, identity in zip(drafts, identities, strict=True):
            parent = drafts_of[draft.after][1] if draft.after is not None else None
            request = self.identifier.request(draft, identity, parent)
            drafts_of.append((draft, request))
            if identity.broken is None:
                ending = self._known_ending(identity.key, request, parent)
            else:
                ending = self._unreadable(identity.key, row, identity.broken)
            if ending is None and not index.is_done(identity.key):
                pending.append(request)
            elif ending is not None and worse(status, ending_status := _status(ending)):
                status, reason = ending_status, ending.reason
            elif ending is None:
                tally.add_images(*index.sums(identity.key))
        if pending and self._only is not None and tally.next_row - 1 not in self._only:
            tally.skip()
            return
        tally.add_row([bytes.fromhex(request.request_id) for request in pending], status, reason)
        waiting = {request.request_id for request in pending}
        for draft, request in drafts_of:
            if request.request_id in waiting:
                self._place(draft, request, drafts_of)

    def _known_ending(self, key: bytes, request: GenerationRequest, parent: GenerationRequest | None) -> Ending | None:
        """Why this request is not to be made now, or None if it is done or to be made."""
        index = self.index
        if index.is_done(key) or self._adopt(key, request):
            return None
        if parent is not None:
            parent_key = bytes.fromhex(parent.request_id)
            if of_parent := index.endings.get(parent_key):
                index.endings[key] = ending = _orphaned(of_parent.status, of_parent.message)
                return ending
            if index.is_done(parent_key) and not index.sums(parent_key)[0]:
                index.endings[key] = ending = _orphaned("done", "")
                return ending
        ending = index.endings.get(key)
        if ending is not None:
            again = ending.status == "failed" if self.retry is None else ending.reason in self.retry
            if not again:
                return ending
            del index.endings[key]
        if index.alone.get(key, 0) >= DEADLY_STARTS:
            message = f"the process died {DEADLY_STARTS} times while making this image alone"
            return self._end(key, Ending("failed", "killed_worker", message))
        try:
            if request.mask is not None and not self.serving.masks:
                raise BadRequestError("the row has a mask, and this model takes none")
            self.serving.check(request)
        except BadRequestError as error:
            return self._end(key, Ending("failed", error.reason, str(error)))
        return None

    def _unreadable(self, key: bytes, row: Row | BadRow, error: ImageError) -> Ending:
        """The end of a request whose input image cannot be read now; the journal is not told: it may be there next."""
        where = InputError(f"{error.path}: {error.message}", path=self.storage.input_path, row=self.tally.next_row)
        logger.warning("%s", where)
        self.index.endings[key] = ending = Ending("failed", failure_reason(row, error), str(where))
        return ending

    def _end(self, key: bytes, ending: Ending) -> Ending:
        logger.warning("row %d, request %s: %s", self.tally.next_row, key.hex(), ending.message)
        self.index.endings[key] = ending
        self.journal.append(ending_record(key.hex(), ending.status, ending.reason, ending.message))
        return ending

    def _adopt(self, key: bytes, request: GenerationRequest) -> bool:
        """Take over a whole image that a killed run left without a record."""
        store = self.serving.image_io
        found = store.find(request.request_id) if store else None
        if store is None or found is None:
            return False
        inside = _facts_in(store, found)
        if inside.get("request_id") != request.request_id:
            return False  # a name alone can come about by copying
        facts: dict[str, Any] = {"adopted": True}
        usage = inside.get("usage")
        if isinstance(usage, dict) and (key in self.index.starts or key in self.index.jobs):
            # Paid for by the run that was killed. A file that came from elsewhere costs this step nothing.
            facts["usage"] = usage
            self.index.bill(usage)
            self.tally.usd, self.tally.unpriced = self.index.usd, self.index.unpriced
        record = done_record(request.request_id, [found], **facts)
        self.journal.append(record)
        self.index.add_done(key, record)
        self.index.mark_seen(key)
        self.tally.adopted += 1
        return True

    def _place(self, draft: Draft, request: GenerationRequest, row: list[tuple[Draft, GenerationRequest]]) -> None:
        """Put a request where it waits: for its parent's image, among the suspects, or in its bucket."""
        key = bytes.fromhex(request.request_id)
        if draft.after is not None:
            parent = row[draft.after][1]
            if not self.index.is_done(bytes.fromhex(parent.request_id)):
                with self._lock:
                    self._children.setdefault(parent.request_id, []).append(request)
                return
            request = self._continued(draft, request, row)
        if job := self.index.jobs.get(key):
            request = replace(request, job=job)
        if self.index.starts.get(key, 0) >= SUSPECT_STARTS:
            self._suspects.append(replace(request, alone=True))
        else:
            self._enqueue(request)

    def _continued(
        self, draft: Draft, request: GenerationRequest, row: list[tuple[Draft, GenerationRequest]]
    ) -> GenerationRequest:
        """The request with all the turns before it, which are done."""
        if draft.after is None:
            return request
        parent = self._continued(*row[draft.after], row)
        return _next_turn(request, parent, self.outcome(bytes.fromhex(parent.request_id)).images[0])

    # -- batches ---------------------------------------------------------------------------------------------------

    def _enqueue(self, request: GenerationRequest) -> None:
        self._buckets.setdefault(self.batch_key(request), deque()).append(request)
        self._waiting_in_buckets += 1

    def _pop(self, *, full: bool) -> list[GenerationRequest] | None:
        """A batch of the fullest bucket; with ``full`` only if it fills a batch."""
        if not self._buckets:
            return None
        key = max(self._buckets, key=lambda k: len(self._buckets[k]))
        bucket = self._buckets[key]
        size = min(self.serving.batch_size, self._caps.get(key, self.serving.batch_size))
        if full and len(bucket) < size:
            return None
        batch = [bucket.popleft() for _ in range(min(size, len(bucket)))]
        self._waiting_in_buckets -= len(batch)
        if not bucket:
            del self._buckets[key]
        return batch

    def _pop_suspect(self) -> list[GenerationRequest] | None:
        """One suspect, and only while nothing else is in hand: what it kills beside it would share the blame."""
        return [self._suspects.popleft()] if self._suspects and not self._in_hand else None


def checked_rows(plan: Plan, storage: FileStorage) -> Iterator[Row | BadRow]:
    """The table's rows, after a look at the first ones: a column that none of them has is a mistake in the call."""
    rows = storage.iter_rows()
    first = list(itertools.islice(rows, PEEK_ROWS))
    known = [row for row in first if not isinstance(row, BadRow)]
    for column in plan.inputs:
        if known and not any(column in row for row in known):
            have = ", ".join(repr(name) for name in dict.fromkeys(itertools.chain.from_iterable(known)))
            raise InputError(
                f"no such column; the table has {have}. Name the right one in {plan.name}.run(...).",
                path=storage.input_path,
                field=column,
            )
    return itertools.chain(first, rows)


def _facts_in(store: ImageStore, found: SavedImage) -> Mapping[str, Any]:
    """What the file says of itself."""
    try:
        return ImageIO(os.curdir).read_metadata(store.path(found.name))
    except ImageError:
        return {}


def failure_reason(row: Row | BadRow, error: InputError) -> str:
    """One word for a row that cannot be used, for counting."""
    if isinstance(row, BadRow):
        return "bad_row"
    return f"image_{error.reason}" if isinstance(error, ImageError) else "bad_input"


def _status(ending: Ending) -> Status:
    return "refused" if ending.status == "refused" else "failed"


def _next_turn(request: GenerationRequest, parent: GenerationRequest, answer: str) -> GenerationRequest:
    """The request of a further turn, with the image of the turn before it."""
    turn = Turn(prompt=parent.prompt, images=parent.images, answer=absolute(answer))
    return replace(request, images=(turn.answer, *request.images), turns=(*parent.turns, turn))


def _orphaned(status: str, why: str) -> Ending:
    return Ending("failed", "previous_turn", f"the turn before it was {status}: {why or 'without an image'}")
