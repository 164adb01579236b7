"""How much may still be spent: money is set aside before a call and settled after it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def dollars_of(usage: Mapping[str, Any]) -> float | None:
    """What a call cost as its serving worked it out: 0.0 for one that counts nothing, None where nobody knows."""
    if not usage:
        return 0.0
    value = usage.get("usd")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return float(value)


class Budget:
    """Money for calls in flight, so that all of them together cannot pass the limit.

    A call is expected to cost what its serving says, and no less than the dearest one so far. As long as nobody knows,
    one goes alone.

    Args:
        limit: US dollars for the step over all its runs; None for no limit.
        spent: tells the dollars spent so far, in all runs, and those that calls which broke off may have cost.
    """

    def __init__(self, limit: float | None, spent: Callable[[], float]) -> None:
        self.limit, self._spent = limit, spent
        self._held = 0.0
        self._in_flight = 0
        self._dearest: float | None = None
        self._changed = asyncio.Condition()

    async def hold(self, estimates: Sequence[float | None]) -> float | None:
        """Set money aside for requests that go out together; None if there is not enough, and none can come back.

        Args:
            estimates: dollars each is expected to cost, None where unknown.
        """
        if self.limit is None:
            return 0.0
        async with self._changed:
            while True:
                amount = self._expected(estimates)
                left = self.limit - self._spent() - self._held
                if amount is None and not self._in_flight and left > 0:
                    amount = left
                if amount is not None and amount <= left + 1e-9:
                    self._held += amount
                    self._in_flight += 1
                    return amount
                if not self._in_flight:
                    return None
                await self._changed.wait()

    def expected(self, estimate: float | None) -> float:
        """What a call is taken to cost of which its serving expects this much."""
        return max(estimate or 0.0, self._dearest or 0.0)

    async def settle(self, held: float, paid: float, requests: int) -> None:
        """The calls for which ``held`` was set aside are over and cost ``paid``, which is spent by now."""
        if self.limit is None:
            return
        async with self._changed:
            self._held -= held
            self._in_flight -= 1
            self._dearest = max(self._dearest or 0.0, paid / requests)
            self._changed.notify_all()

    def spent_up(self) -> str:
        """Why no further call can be made, and what to do about it."""
        return (
            f"the budget of ${self.limit:,.2f} does not hold another call (${self._spent():,.4f} spent in all runs of "
            "this step). Everything finished is kept: raise the budget and run again to go on"
        )

    def _expected(self, estimates: Sequence[float | None]) -> float | None:
        total = 0.0
        for estimate in estimates:
            if estimate is None and self._dearest is None:
                return None
            total += self.expected(estimate)
        return total
