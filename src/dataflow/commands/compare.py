"""``compare``: the scores of several finished tables on the same prompts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dataflow.commands.finished import named_tables
from dataflow.commands.folder import shown
from dataflow.commands.layout import give, interval, markdown_table, percent, significant, text_table
from dataflow.comparison import Comparison, PairScore, RunScore
from dataflow.comparison import compare as compared
from dataflow.scores import by_status

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

_SCORES = ("run", "mean", "95 % interval", "strict", "prompts", "scored", "expected", "coverage", "not scored")
_PAIRS = ("pair", "difference", "95 % interval", "wins", "losses", "ties", "wins of decided", "95 % interval", "p")


def compare(args: argparse.Namespace) -> int:
    """Print the comparison."""
    found = compared(
        named_tables(args.tables),
        metrics=args.metric or (),
        match=args.match or (),
        lower_better=args.lower_better or (),
        worst=dict(args.worst or ()),
        resamples=args.resamples,
        seed=args.seed,
        force=args.force,
    )
    table: Table = markdown_table if args.markdown else text_table
    give(found, "\n".join(_lines(found, table)), args.json)
    return 0


def _lines(found: Comparison, table: Table) -> Iterator[str]:
    matched = " and ".join(found.matched_by)
    yield f"{found.prompts:,} prompts are in all {len(found.runs)} runs (matched by {matched})"
    for name, source in found.runs.items():
        left_out = str(found.left_out[name])
        yield f"  {name}: {shown(Path(source))}" + (f"; left out: {left_out}" if left_out else "")
    if found.repeated:
        how = "--match COLUMN tells them apart"
        yield f"  {found.repeated:,} of them share their {matched} and were paired in order: {how}"
    for metric, runs in found.only_in_some.items():
        yield f"  not compared: {metric}, which only {', '.join(runs)} has"
    for metric in found.metrics:
        yield from _metric(found, metric, table)


def _metric(found: Comparison, metric: str, table: Table) -> Iterator[str]:
    scores = [score for score in found.scores if score.metric == metric]
    yield f"\n{metric} ({'lower' if metric in found.lower_better else 'higher'} is better)\n"
    yield table(_SCORES, [_score(score) for score in scores])
    note = _strict_note(scores)
    if note:
        yield f"\n{note}"
    yield ""
    yield table(_PAIRS, [_pair(pair) for pair in found.pairs if pair.metric == metric])
    for each in found.strengths:
        if each.metric == metric and each.strengths:
            rows = [[name, significant(one.value), interval(one)] for name, one in each.strengths.items()]
            yield f"\nBradley-Terry log strengths over wins on {each.prompts:,} prompts\n"
            yield table(("run", "strength", "95 % interval"), rows)
        elif each.metric == metric:
            yield f"\nno Bradley-Terry strengths: {each.reason}"


def _score(score: RunScore) -> list[str]:
    mean = score.mean
    return [
        score.run,
        significant(mean and mean.value),
        interval(mean),
        significant(score.strict),
        f"{score.prompts:,}",
        f"{score.scored:,}",
        f"{score.expected:,}",
        percent(score.coverage),
        by_status(score.missing) or "-",
    ]


def _pair(pair: PairScore) -> list[str]:
    return [
        f"{pair.first} - {pair.second}",
        significant(pair.difference and pair.difference.value),
        interval(pair.difference),
        f"{pair.wins:,}",
        f"{pair.losses:,}",
        f"{pair.ties:,}",
        percent(pair.win_share and pair.win_share.value),
        "–" if pair.win_share is None else f"{percent(pair.win_share.low)} to {percent(pair.win_share.high)}",
        "–" if pair.p is None else f"{pair.p:.4f}" if pair.p >= 0.0001 else "< 0.0001",
    ]


def _strict_note(scores: Sequence[RunScore]) -> str:
    if not any(score.never_made for score in scores):
        return ""
    worst, seen = scores[0].worst, scores[0].worst_was_seen
    if worst is None:
        return "strict: no score shows how bad one can be: give --worst"
    how = "the worst score seen; --worst names the metric's own" if seen else "as given"
    return f"strict: a picture that was never made counts as {significant(worst)} ({how})"
