"""The sum of rows, at any moment."""

from __future__ import annotations

import pytest

from dataflow.runtime.tally import Tally, worse, worst
from dataflow.types import Outcome

KEYS = [bytes([number]) * 16 for number in range(8)]


def outcome(status, reason="") -> Outcome:
    return Outcome(request_id="", status=status, reason=reason)


def test_a_row_is_pending_until_its_last_request_ends():
    tally = Tally()
    tally.add_row(KEYS[:3], "done", "")
    for key in KEYS[:2]:
        tally.settle(key, "done")
    assert tally.summary("s", 1, 0.0).pending == 1
    tally.settle(KEYS[2], "done")
    summary = tally.summary("s", 1, 0.0)
    assert (summary.done, summary.pending, summary.balanced) == (1, 0, True)


@pytest.mark.parametrize(
    ("ends", "status", "reason"),
    [
        ([("done", ""), ("refused", "refused")], "refused", "refused"),
        ([("failed", "crash"), ("refused", "refused")], "failed", "crash"),
        ([("refused", "refused"), ("failed", "crash"), ("failed", "later")], "failed", "crash"),
    ],
)
def test_the_worst_of_its_requests_decides(ends, status, reason):
    tally = Tally()
    tally.add_row(KEYS[: len(ends)], "done", "")
    for key, (end, why) in zip(KEYS, ends, strict=False):
        tally.settle(key, end, why)
    assert (tally.counts, tally.reasons) == ({status: 1}, {reason: 1})
    assert worst(outcome(end, why) for end, why in ends) == (status, reason)


def test_what_had_ended_before_counts_too():
    tally = Tally()
    tally.add_row(KEYS[:1], "refused", "refused")
    tally.settle(KEYS[0], "done")
    tally.add_row([], "failed", "bad_row")
    assert tally.counts == {"refused": 1, "failed": 1}
    assert tally.reasons == {"refused": 1, "bad_row": 1}


def test_a_row_of_no_requests_is_done():
    assert worst([]) == ("done", "")
    assert [worse("done", "refused"), worse("refused", "failed"), worse("failed", "failed")] == [True, True, False]


def test_rows_not_planned_yet_are_pending():
    tally = Tally()
    tally.add_done_row(2, 300)
    tally.add_row(KEYS[:1], "done", "")
    tally.add_images(1, 50, made=True)
    summary = tally.summary("s", 10, 1.5)
    assert (summary.done, summary.pending, summary.balanced) == (1, 9, True)
    assert (summary.images, summary.bytes, summary.made, summary.seconds) == (3, 350, 1, 1.5)


def test_counting_again_replaces_what_was_counted():
    tally = Tally()
    tally.add_row([], "failed", "crash")
    tally.add_row([], "done", "")
    tally.recount()
    tally.count("dropped", "too_small")
    tally.count("done", "")
    summary = tally.summary("s", tally.planned, 0.0)
    assert (summary.done, summary.failed, summary.dropped, summary.balanced) == (1, 0, 1, True)
    assert summary.reasons == {"too_small": 1}
