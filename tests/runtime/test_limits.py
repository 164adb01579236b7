"""Slots, waits and being alone, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dataflow.runtime import limits
from dataflow.runtime.limits import Limiter, Room, backoff


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def pause(self, seconds: float, halted: asyncio.Event) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(limits, "pause", clock.pause)
    monkeypatch.setattr(limits, "time", clock)
    return clock


def go(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class TestBackoff:
    def test_it_doubles_up_to_a_minute_with_jitter(self):
        for attempt, most in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (50, 60)]:
            waits = [backoff(attempt) for _ in range(200)]
            assert most / 2 <= min(waits) < max(waits) <= most
            assert max(waits) - min(waits) > most / 4


class TestLimiter:
    def test_no_more_than_allowed_are_busy(self):
        async def work() -> None:
            limiter = Limiter(3, asyncio.Event())
            busy = most = 0

            async def lane() -> None:
                nonlocal busy, most
                async with limiter.slot():
                    busy += 1
                    most = max(most, busy)
                    await asyncio.sleep(0)
                    busy -= 1

            await asyncio.gather(*(lane() for _ in range(10)))
            assert (most, busy) == (3, 0)

        go(work)

    def test_it_halves_down_to_one_and_grows_back_to_the_most(self, clock):
        limiter = Limiter(8, asyncio.Event())
        for expected in (4, 2, 1, 1):
            limiter.rate_limited(1.0)
            assert limiter.allowed == expected
            clock.now += 1.0
        for _ in range(60):
            limiter.succeeded()
        assert limiter.allowed == 8

    def test_one_burst_is_one_signal(self, clock):
        limiter = Limiter(8, asyncio.Event())
        for _ in range(8):
            limiter.rate_limited(5.0)
        assert limiter.allowed == 4

    def test_a_stated_wait_holds_everybody_back_and_the_longest_counts(self, clock):
        async def work() -> None:
            limiter = Limiter(4, asyncio.Event())
            limiter.rate_limited(30.0)
            limiter.rate_limited(10.0)
            entered = []

            async def lane() -> None:
                async with limiter.slot():
                    entered.append(clock.now)

            await asyncio.gather(*(lane() for _ in range(4)))
            assert len(entered) == 4
            assert min(entered) >= 1030.0

        go(work)

    def test_without_a_stated_wait_it_grows_until_something_succeeds(self, clock, monkeypatch):
        monkeypatch.setattr(limits, "backoff", float)
        limiter = Limiter(4, asyncio.Event())
        waits = []
        for _ in range(3):
            waits.append(limiter.rate_limited(None))
            clock.now += waits[-1]
        limiter.succeeded()
        waits.append(limiter.rate_limited(None))
        assert waits == [1, 2, 3, 1]

    def test_a_halt_wakes_whoever_waits(self):
        async def work() -> None:
            halted = asyncio.Event()
            limiter = Limiter(2, halted)
            limiter.rate_limited(3600.0)

            async def lane() -> None:
                async with limiter.slot():
                    pass

            waiting = [asyncio.create_task(lane()) for _ in range(3)]
            await turns()
            assert not any(task.done() for task in waiting)
            halted.set()
            await asyncio.gather(*waiting)

        go(work)


class TestRoom:
    def test_many_may_be_inside_and_one_may_be_alone(self):
        async def work() -> None:
            room, inside, seen = Room(), [], []

            async def visit(name: str, *, alone: bool = False) -> None:
                async with room.enter(alone=alone):
                    inside.append(name)
                    seen.append(set(inside))
                    await turns(5)
                    inside.remove(name)

            first = [asyncio.create_task(visit(name)) for name in "ab"]
            await turns(2)
            lone = asyncio.create_task(visit("lone", alone=True))
            await turns(2)
            later = [asyncio.create_task(visit(name)) for name in "cd"]
            await asyncio.gather(*first, lone, *later)
            assert {"a", "b"} in seen
            assert {"c", "d"} in seen
            assert [group for group in seen if "lone" in group] == [{"lone"}]
            assert seen.index({"lone"}) == 2, "who wants to be alone does not wait for those who come after"

        go(work)

    def test_two_that_want_to_be_alone_take_turns(self):
        async def work() -> None:
            room, inside = Room(), 0

            async def visit() -> None:
                nonlocal inside
                async with room.enter(alone=True):
                    inside += 1
                    assert inside == 1
                    await turns(3)
                    inside -= 1

            await asyncio.gather(visit(), visit(), visit())

        go(work)

    @pytest.mark.parametrize("alone", [True, False])
    def test_whoever_is_given_up_leaves_the_room_usable(self, alone):
        async def work() -> None:
            room = Room()

            async def visit(*, alone: bool) -> None:
                async with room.enter(alone=alone):
                    await asyncio.sleep(3600)

            stays = asyncio.create_task(visit(alone=False))
            await turns()
            gone = asyncio.create_task(visit(alone=alone))
            await turns()
            for task in (gone, stays):
                task.cancel()
                await asyncio.wait([task])
            async with room.enter(alone=True):
                pass

        go(work)


class TestPace:
    def test_requests_start_evenly_over_a_minute(self, clock):
        async def work() -> None:
            limiter = Limiter(4, asyncio.Event(), per_minute=30)
            started = []
            for count in (1, 3, 1):
                async with limiter.slot(count):
                    started.append(clock.now - 1000.0)
            assert started == [0.0, 2.0, 8.0]
            clock.now += 100.0  # time that was not used is no credit
            for _ in range(2):
                async with limiter.slot():
                    started.append(clock.now - 1000.0)
            assert started[3:] == [108.0, 110.0]

        go(work)


class TestDown:
    def test_a_few_failures_are_the_requests_own(self, clock):
        limiter = Limiter(8, asyncio.Event())
        for _ in range(3):
            assert [limiter.failed() for _ in range(limits.DOWN_AFTER - 1)] == [None] * (limits.DOWN_AFTER - 1)
            limiter.succeeded()
        assert (limiter.allowed, limiter.trouble) == (8, 0.0)

    def test_many_in_a_row_hold_everybody_back_longer_and_longer(self, clock):
        limiter = Limiter(8, asyncio.Event())
        for _ in range(limits.DOWN_AFTER - 1):
            limiter.failed()
        first = limiter.failed()
        assert 0.5 <= first <= 1.0
        assert limiter.failed() == pytest.approx(first)  # it was under way already
        clock.now += first
        assert limiter.failed() >= 1.0
        assert limiter.allowed == 1.0
        clock.now += 30.0
        assert limiter.trouble == pytest.approx(30.0 + first)
        limiter.succeeded()
        assert (limiter.trouble, limiter.allowed) == (0.0, 2.0)
