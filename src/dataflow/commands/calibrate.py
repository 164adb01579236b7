"""``calibrate``: how far the scores of a table agree with people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataflow.calibration import Calibration, MetricAgreement, Options, calibrate_choices
from dataflow.calibration import calibrate as calibrated
from dataflow.commands.finished import finished_table
from dataflow.commands.folder import write_if_changed
from dataflow.commands.layout import give, interval, plain, significant, text_table
from dataflow.errors import ConfigError, InputError
from dataflow.ratings import Ratings, read_choices, read_ratings, read_scores
from dataflow.scored_runs import first_row
from dataflow.scores import by_status, metrics_in

_CHOICE_COLUMNS = ("first", "second", "choice")


def calibrate(args: argparse.Namespace) -> int:
    """Print the agreement; write the maps where one is asked for."""
    table = finished_table(args.table)
    columns = first_row(args.ratings)
    rater = args.rater or ("rater" if "rater" in columns else None)
    pairwise = args.pairs or all(column in columns for column in _CHOICE_COLUMNS)
    metrics = args.metric or metrics_in(table)
    if not metrics:
        raise InputError("the table has no scores", path=table)
    for name in args.lower_better or ():
        if name not in metrics:
            raise ConfigError(f"--lower-better {name}: the metrics are {', '.join(metrics)}")
    if pairwise and (args.map or args.rating_at_least is not None or args.within):
        raise ConfigError("--map, --rating-at-least and --within belong to ratings, not to choices between two")
    if args.rating_at_least is not None and not args.map:
        raise ConfigError("--rating-at-least belongs to --map FILE")
    options = Options(
        lower_better=frozenset(args.lower_better or ()),
        ties=args.ties,
        alpha_level=args.level,
        resamples=args.resamples,
        seed=args.seed,
        rating=args.rating_at_least,
    )
    key = args.table_key or (args.key if not pairwise and args.key in first_row(table) else args.image_column)
    if pairwise:
        choices = read_choices(args.ratings, *_CHOICE_COLUMNS, rater)
        items = list(dict.fromkeys(item for pair in choices.items for item in pair))
        scores, _ = read_scores(table, items, metrics, key=key, image_column=args.image_column)
        found = calibrate_choices(choices, scores, metrics, options)
    else:
        ratings = _ratings(args, columns, rater)
        scores, groups = read_scores(
            table, list(ratings.items), metrics, key=key, image_column=args.image_column, within=args.within
        )
        found = calibrated(ratings, scores, metrics, options, groups)
    give(found, "\n".join(_lines(found, options)), args.json)
    if args.map:
        maps = {each.metric: plain(each) for each in found.maps}
        facts = {"ratings": str(args.ratings), "table": str(table), "maps": maps}
        write_if_changed(Path(args.map), (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


def _ratings(args: argparse.Namespace, columns: dict, rater: str | None) -> Ratings:
    for option, column in (("--key", args.key), ("--rating", args.rating)):
        if column not in columns:
            raise InputError(
                f"there is no such column; {option} names one of {', '.join(columns)}", path=args.ratings, field=column
            )
    return read_ratings(args.ratings, args.key, args.rating, rater)


def _lines(found: Calibration, options: Options) -> Iterator[str]:
    what = "pairs" if found.pairwise else "items"
    yield f"{found.rated:,} rated {what}, {found.rated - found.unmatched:,} of them in the table"
    if found.unmatched:
        yield f"  {found.unmatched:,} rated {what} are not in the table"
    if found.unreadable:
        yield f"  {found.unreadable:,} rows of the ratings cannot be used"
    if found.replaced:
        yield f"  {found.replaced:,} ratings were given again by the same rater: the last one counts"
    raters = found.raters
    if raters.alpha is None:
        yield f"  no agreement among raters: {raters.reason}"
    else:
        yield (
            f"  raters among each other: Krippendorff's alpha ({raters.level}) {significant(raters.alpha.value)}"
            f" ({interval(raters.alpha)}), {raters.ratings:,} ratings of {raters.items:,} {what}"
        )
    yield ""
    if found.pairwise:
        header = ("metric", "choices", *_PAIR_COLUMNS, "not scored")
        yield text_table(
            header, [[_name(each), f"{each.items:,}", *_pairs(each), _why(each)] for each in found.metrics]
        )
    else:
        header = (
            "metric",
            "items",
            "Spearman",
            "95 % interval",
            "Kendall",
            "95 % interval",
            *_PAIR_COLUMNS,
            "not scored",
        )
        yield text_table(header, [_row(each) for each in found.metrics])
    yield f"\npairs that people tie are left out; a pair that only the metric ties counts as {_TIES[options.ties]}"
    for each in found.metrics:
        if each.reason:
            yield f"{each.metric}: {each.reason}"
    for each in found.maps:
        if each.rating is not None and each.threshold is None:
            yield f"{each.metric}: no score is expected to reach a rating of {each.rating:g}"
        elif each.rating is not None:
            sign = "at least" if each.rising else "at most"
            yield (
                f"{each.metric}: a rating of {each.rating:g} is expected from a score of {sign}"
                f" {significant(each.threshold)}"
            )


_PAIR_COLUMNS = ("pair accuracy", "95 % interval", "pairs", "tied by metric", "tied by people")
_TIES = {"wrong": "wrong", "half": "half right", "skip": "no pair"}


def _row(each: MetricAgreement) -> Sequence[str]:
    correlations = []
    for one in (each.spearman, each.kendall):
        correlations += [significant(one and one.value), interval(one)]
    return [_name(each), f"{each.items:,}", *correlations, *_pairs(each), _why(each)]


def _pairs(each: MetricAgreement) -> Sequence[str]:
    pairs = each.pairs
    counts = [f"{count:,}" for count in (pairs.pairs, pairs.tied_scores, pairs.tied_truth)]
    return [significant(pairs.accuracy), interval(each.accuracy), *counts]


def _name(each: MetricAgreement) -> str:
    return f"{each.metric} (negated)" if each.lower_better else each.metric


def _why(each: MetricAgreement) -> str:
    return by_status(each.missing) or "-"
