"""How many batches may be generated at once, how often, and when: one limiter for all lanes of a step."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
DOWN_AFTER = 8
"""So many failures in a row, with no success between, mean that the service is down and not that a request is bad."""


ELSEWHERE_AFTER = 3
"""The same where another endpoint can take the work: fewer than a request has attempts, so that a dead endpoint cannot
use up all of them."""


def backoff(attempt: int) -> float:
    """Seconds to wait before trying again, with full jitter; ``attempt`` counts from 1."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))  # noqa: S311  not a secret


async def pause(seconds: float, halted: asyncio.Event) -> None:
    """Sleep, but no longer than until ``halted``."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(halted.wait(), seconds)


class HeldBackError(Exception):
    """The service wants to be left alone for a while, and somebody else can do the work."""


class Room:
    """Who is at work in one worker: many at once, or one that wants to be alone with it."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncIterator[None]:
        """Be inside; with ``alone`` nobody else is."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._closed = alone
        try:
            async with self._changed:
                if alone:
                    await self._changed.wait_for(lambda: not self._inside)
                self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
        finally:
            async with self._changed:
                if alone:
                    self._closed = False
                self._changed.notify_all()


class Limiter:
    """Slots that shrink by half when the service says it is too much, and grow back one by one (AIMD).

    A stated wait holds back everybody, not only the batch that was told. A service that is down is asked again with
    one request at a time, after longer and longer waits.

    Args:
        concurrency: most slots there can be.
        halted: set when the run stops; nobody is held back any more.
        per_minute: most requests that start in a minute, evenly spaced; None for any number.
    """

    def __init__(self, concurrency: int, halted: asyncio.Event, per_minute: float | None = None) -> None:
        self._most = concurrency
        self._halted = halted
        self._space = 60.0 / per_minute if per_minute else 0.0
        self.allowed = float(concurrency)
        self._busy = 0
        self._not_before = 0.0
        self._next = 0.0
        self._limited_in_a_row = 0
        self._failed_in_a_row = 0
        self._trouble_since: float | None = None
        self._changed = asyncio.Condition()

    @property
    def trouble(self) -> float:
        """Seconds since the service began to do nothing but limit or fail."""
        return 0.0 if self._trouble_since is None else time.monotonic() - self._trouble_since

    @asynccontextmanager
    async def slot(self, requests: int = 1, *, impatient: bool = False) -> AsyncIterator[None]:
        """Wait for a slot, and for the turn of so many requests, and hold it.

        Raises:
            HeldBackError: all lanes hold back, and the caller is impatient.
        """
        async with self._changed:
            while self._busy >= int(self.allowed):
                await self._changed.wait()
            self._busy += 1
        try:
            if impatient and self._not_before > time.monotonic():
                raise HeldBackError
            turn = max(self._next, time.monotonic())
            self._next = turn + self._space * requests
            while (wait := max(self._not_before, turn) - time.monotonic()) > 0 and not self._halted.is_set():
                await pause(wait, self._halted)
            yield
        finally:
            async with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    async def ready(self) -> None:
        """Wait until nobody is held back any more."""
        while (wait := self._not_before - time.monotonic()) > 0 and not self._halted.is_set():
            await pause(wait, self._halted)

    def succeeded(self) -> None:
        """A batch went through: one slot more per round of successes."""
        self._limited_in_a_row = self._failed_in_a_row = 0
        self._trouble_since = None
        self.allowed = min(self._most, self.allowed + 1 / self.allowed)

    def rate_limited(self, retry_after: float | None) -> float:
        """The service asks to slow down; the seconds for which all lanes now hold back."""
        now = time.monotonic()
        if now >= self._not_before:
            # One burst of 429s is one signal, not one per lane.
            self.allowed = max(1.0, self.allowed / 2)
            self._limited_in_a_row += 1
        return self._hold_back(retry_after if retry_after is not None else backoff(self._limited_in_a_row))

    def failed(self, after: int = DOWN_AFTER) -> float | None:
        """A call failed that might have worked; if the service is down by now, the seconds all lanes hold back.

        Args:
            after: failures in a row that mean that it is down.
        """
        self._failed_in_a_row += 1
        if self._failed_in_a_row < after:
            return None
        self.allowed = 1.0
        if (left := self._not_before - time.monotonic()) > 0:
            return left  # calls that were under way when it was found out say nothing new
        return self._hold_back(backoff(self._failed_in_a_row - after + 1))

    def _hold_back(self, wait: float) -> float:
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        self._not_before = max(self._not_before, now + wait)
        return wait
