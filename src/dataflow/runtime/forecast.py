"""What the rest of a table will cost, from the rows that were made: money, time, disk, refusals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dataflow.metrics.agreement import wilson
from dataflow.runtime.budget import dollars_of
from dataflow.runtime.progress import human_bytes
from dataflow.types import Forecast, Serving, Summary

RESAMPLES = 2000


def sample_rows(rows: int, number: int, seed: int) -> frozenset[int]:
    """Numbers, from 0, of ``number`` rows drawn without bias; a larger sample holds every smaller one.

    Args:
        rows: in the table.
        number: how many; all rows if there are no more.
        seed: of the run.
    """
    if number >= rows:
        return frozenset(range(rows))
    chosen: set[int] = set()
    draw = random.Random(seed)  # noqa: S311 - not a secret
    while len(chosen) < number:
        chosen.add(draw.randrange(rows))
    return frozenset(chosen)


def forecast(records: Iterable[Mapping[str, Any] | None], summary: Summary, serving: Serving) -> Forecast | None:
    """What the pending rows will take, if they are like the settled ones.

    Args:
        records: of the step's journal, see :mod:`dataflow.runtime.journal`.
        summary: of the rows so far.
        serving: tells how many requests run at once, and how many may start in a minute.

    Returns:
        None if nothing is settled yet.
    """
    settled = summary.done + summary.refused + summary.failed
    usd: dict[str, float] = {}
    unpriced = 0
    seconds: list[float] = []
    sizes: list[int] = []
    for record in records:
        status = record and record.get("s")
        if record is None or status not in ("done", "paid", "refused", "failed"):
            continue
        usd.setdefault(record["k"], 0.0)
        cost = dollars_of(record.get("usage") or {})
        unpriced += cost is None
        usd[record["k"]] += cost or 0.0
        if status == "done":
            sizes.append(sum(image["bytes"] for image in record["img"]))
            if "ms" in record:
                seconds.append(record["ms"] / 1000)
    if not settled or not usd:
        return None
    requests = summary.pending * len(usd) / settled
    known = not unpriced and any(usd.values())
    return Forecast(
        rows=summary.pending,
        settled=settled,
        usd=_total(list(usd.values()), requests) if known else None,
        seconds=_wall(seconds, requests, serving),
        bytes=float(np.mean(sizes)) * requests if sizes else None,
        refused=_share(summary.refused, settled),
        failed=_share(summary.failed, settled),
    )


def describe_forecast(found: Forecast) -> str:
    """The forecast in words."""
    lines = [f"forecast for the {found.rows:,} pending rows, from {found.settled:,} settled ones:"]
    if found.usd is not None:
        low, likely, high = found.usd
        lines.append(f"  cost     ${likely:,.2f} (95 %: ${low:,.2f} to ${high:,.2f})")
    else:
        lines.append("  cost     nothing was counted, or at an unknown price")
    if found.seconds is not None:
        lines.append(f"  time     {duration(found.seconds)}")
    if found.bytes is not None:
        lines.append(f"  disk     {human_bytes(found.bytes)}")
    for name, (low, likely, high) in (("refused", found.refused), ("failed", found.failed)):
        lines.append(f"  {name:<8} {likely:.1%} of the rows (95 %: {low:.1%} to {high:.1%})")
    return "\n".join(lines)


def _total(values: list[float], requests: float) -> tuple[float, float, float]:
    """Low, likely and high sum of so many more values: a bootstrap of the mean, 95 %."""
    found = np.asarray(values)
    draw = np.random.default_rng(0)
    means = [draw.choice(found, len(found)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low) * requests, float(found.mean()) * requests, float(high) * requests


def _wall(seconds: list[float], requests: float, serving: Serving) -> float | None:
    if serving.detached or not seconds:
        return None
    replicas = serving.replicas()
    at_once = sum(replica.concurrency for replica in replicas)
    rates = [replica.requests_per_minute for replica in replicas]
    limited = 0.0 if None in rates else requests * 60 / sum(itertools.chain(filter(None, rates)))
    return max(limited, requests * float(np.mean(seconds)) / at_once)


def _share(count: int, of: int) -> tuple[float, float, float]:
    found = wilson(count, of)
    return found.low, found.value, found.high


def duration(seconds: float) -> str:
    """``5400`` as ``90 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
