"""Scores against people: every figure against scipy or pen and paper, and what cannot be matched is counted."""

from __future__ import annotations

import csv
import json
from collections import defaultdict

import numpy as np
import pytest
from scipy import optimize, stats

from dataflow.calibration import Options, calibrate, calibrate_choices, rater_agreement, score_map
from dataflow.errors import InputError
from dataflow.metrics import agreement
from dataflow.metrics.questions import dsg
from dataflow.ratings import FIRST, TIE, Ratings, read_choices, read_ratings, read_scores
from dataflow.scores import Score

QUICK = Options(resamples=100)


def ratings_of(values, raters=1):
    ratings = Ratings()
    for item, value in values.items():
        for rater in range(raters):
            ratings.add(item, str(rater), value)
    return ratings


def scores_of(values, metric="m"):
    return {item: {metric: value if isinstance(value, Score) else Score(value, "ok")} for item, value in values.items()}


@pytest.fixture
def sample():
    """60 items with coarse ratings and a noisy score."""
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, 60).astype(float)
    score = np.round(truth / 5 + rng.normal(scale=0.3, size=60), 1)
    names = [f"{n}.png" for n in range(60)]
    return dict(zip(names, truth.tolist(), strict=True)), dict(zip(names, score.tolist(), strict=True))


class TestRatings:
    def test_correlations_are_scipys(self, sample):
        truth, score = sample
        [found] = calibrate(ratings_of(truth), scores_of(score), ["m"], QUICK).metrics
        x, y = list(truth.values()), list(score.values())
        assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
        assert found.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic)
        assert found.spearman.low < found.spearman.value < found.spearman.high
        assert found.spearman == agreement.bootstrap(agreement.spearman, x, y, resamples=100)
        assert (found.items, found.missing, found.reason) == (60, {}, "")

    @pytest.mark.parametrize("ties", ["wrong", "half", "skip"])
    def test_pairs_by_enumeration(self, sample, ties):
        truth, score = sample
        names = list(truth)
        right = tied = people = 0
        for one, name in enumerate(names):
            for other in names[one + 1 :]:
                wanted, given = truth[name] - truth[other], score[name] - score[other]
                people += wanted == 0
                tied += wanted != 0 and given == 0
                right += wanted * given > 0
        pairs = 60 * 59 // 2 - people
        options = Options(resamples=100, ties=ties)
        [found] = calibrate(ratings_of(truth), scores_of(score), ["m"], options).metrics
        expected = {"wrong": right / pairs, "half": (right + tied / 2) / pairs, "skip": right / (pairs - tied)}
        assert found.pairs.accuracy == found.accuracy.value == pytest.approx(expected[ties])
        assert (found.pairs.tied_scores, found.pairs.tied_truth) == (tied, people)
        # The bootstrap over a matrix of pairs is that over resampled items.
        slowly = agreement.bootstrap(
            lambda a, b: agreement.pair_accuracy(a, b, ties=ties).accuracy,
            list(truth.values()),
            list(score.values()),
            resamples=100,
        )
        assert (found.accuracy.low, found.accuracy.high) == pytest.approx((slowly.low, slowly.high))

    def test_pairs_within_a_prompt(self):
        truth = {"a1": 1, "a2": 2, "b1": 5, "b2": 4, "c1": 9}
        score = {"a1": 0.1, "a2": 0.2, "b1": 0.0, "b2": -1.0, "c1": 5.0}
        groups = {item: item[0] for item in truth}
        [found] = calibrate(ratings_of(truth), scores_of(score), ["m"], QUICK, groups).metrics
        assert (found.pairs.pairs, found.pairs.correct, found.accuracy.value) == (2, 2, 1.0)

    def test_more_items_than_pairs_fit_into_memory(self, sample, monkeypatch):
        monkeypatch.setattr("dataflow.calibration._MOST_PAIRED_ITEMS", 20)
        truth, score = sample
        [few] = calibrate(ratings_of(truth), scores_of(score), ["m"], QUICK).metrics
        monkeypatch.undo()
        [all_of_them] = calibrate(ratings_of(truth), scores_of(score), ["m"], QUICK).metrics
        assert few.accuracy.value == all_of_them.accuracy.value
        assert few.accuracy.high - few.accuracy.low > all_of_them.accuracy.high - all_of_them.accuracy.low

    def test_less_is_better(self, sample):
        truth, score = sample
        turned = {item: -value for item, value in score.items()}
        [found] = calibrate(
            ratings_of(truth), scores_of(turned), ["m"], Options(resamples=50, lower_better=frozenset({"m"}))
        ).metrics
        [plain] = calibrate(ratings_of(truth), scores_of(score), ["m"], Options(resamples=50)).metrics
        assert found.lower_better
        assert (found.spearman, found.pairs) == (plain.spearman, plain.pairs)

    def test_what_is_missing_is_counted(self):
        truth = {"a": 1, "b": 2, "c": 3, "gone": 4}
        score = {"a": 1.0, "b": Score(None, "timeout"), "c": Score(None, "timeout")}
        found = calibrate(ratings_of(truth), scores_of(score), ["m"], QUICK)
        assert (found.rated, found.unmatched) == (4, 1)
        [metric] = found.metrics
        assert (metric.items, metric.missing) == (1, {"timeout": 2})
        assert metric.spearman is metric.accuracy is None
        assert "a correlation takes at least 2 pairs" in metric.reason
        assert len(found.maps) == 1
        assert calibrate(ratings_of({"b": 1}), scores_of(score), ["m"], QUICK).maps == []

    def test_none_in_the_table(self):
        with pytest.raises(InputError, match=r"none of the 1 rated items is in the table \(the first is 'a'\)"):
            calibrate(ratings_of({"a": 1}), {}, ["m"], QUICK)

    def test_several_raters_are_averaged(self):
        ratings = Ratings()
        for item, given in {"a": (1, 3), "b": (2, 4), "c": (5, 5)}.items():
            for rater, value in enumerate(given):
                ratings.add(item, str(rater), value)
        [found] = calibrate(ratings, scores_of({"a": 1.0, "b": 2.0, "c": 3.0}), ["m"], QUICK).metrics
        assert found.spearman == (pytest.approx(1.0), None, None)
        assert "too few data" in found.reason


class TestRaters:
    def test_alpha(self):
        rows = {"a": (1, 1), "b": (2, 3), "c": (4, 4), "d": (5, 4), "e": (3,)}
        ratings = Ratings()
        for item, given in rows.items():
            for rater, value in enumerate(given):
                ratings.add(item, str(rater), value)
        table = [[1, 2, 4, 5, 3], [1, 3, 4, 4, None]]
        for level in ("nominal", "ordinal", "interval"):
            found = rater_agreement(ratings, Options(resamples=100, alpha_level=level))
            assert found.alpha.value == pytest.approx(agreement.krippendorff_alpha(table, level))
            assert (found.level, found.items, found.ratings) == (level, 4, 8)

    def test_alone(self):
        found = rater_agreement(ratings_of({"a": 1}), QUICK)
        assert (found.alpha, found.reason) == (None, "no item has two ratings")

    def test_the_same_rater_again(self):
        ratings = Ratings()
        ratings.add("a", "x", 1)
        ratings.add("a", "x", 3)
        ratings.add("a", None, 5)
        ratings.add("a", None, 5)
        assert (ratings.replaced, sorted(ratings.items["a"].values())) == (1, [3, 5, 5])


class TestMaps:
    def test_against_scipy(self, sample):
        truth, score = sample
        x, y = np.array(list(score.values())), np.array(list(truth.values()))
        found = score_map("m", x, y)
        places = np.unique(x)
        means = [y[x == place].mean() for place in places]
        expected = optimize.isotonic_regression(means, weights=[(x == place).sum() for place in places])
        assert [found(place) for place in places] == pytest.approx(list(expected.x))
        assert found.items == 60
        assert [score for score, _ in found.points] == sorted({score for score, _ in found.points})

    def test_by_hand(self):
        # 3 and 2 stand the wrong way round and share 2.5.
        found = score_map("m", [1, 2, 3, 4], [1, 3, 2, 5], rating=2.5)
        assert found.points == ((1.0, 1.0), (2.0, 2.5), (3.0, 2.5), (4.0, 5.0))
        assert found.threshold == 2.0
        assert (found(0), found(1.5), found(2.7), found(9)) == (1.0, 1.75, 2.5, 5.0)

    @pytest.mark.parametrize(
        ("rating", "threshold"), [(0, 1.0), (1, 1.0), (1.75, 1.5), (3.75, 3.5), (5, 4.0), (6, None)]
    )
    def test_thresholds(self, rating, threshold):
        found = score_map("m", [1, 2, 3, 4], [1, 3, 2, 5], rating=rating)
        assert found.threshold == threshold
        if threshold is not None and rating >= 1:
            assert found(threshold) == pytest.approx(rating)

    def test_falling(self):
        found = score_map("m", [4, 3, 2, 1], [1, 3, 2, 5], rising=False, rating=3.75)
        assert found.points == ((1.0, 5.0), (2.0, 2.5), (3.0, 2.5), (4.0, 1.0))
        assert found.threshold == 1.5


class TestChoices:
    SCORES = scores_of({"a": 1.0, "b": 2.0, "c": 2.0, "d": Score(None, "parse_error")})

    def choices(self, *rows):
        choices = Ratings()
        for one, other, value in rows:
            choices.add((one, other), None, value)
        return choices

    def test_by_hand(self):
        # b over a: right; a over c: wrong; b over c: tied by the metric; a and b: tied by people; d has no score.
        choices = self.choices(("a", "b", -FIRST), ("a", "c", FIRST), ("b", "c", FIRST), ("a", "b", TIE), ("a", "d", 1))
        found = calibrate_choices(choices, self.SCORES, ["m"], Options(resamples=50))
        [metric] = found.metrics
        assert metric.pairs == (0.5, 3, 1, 1, 1)
        assert (metric.items, metric.missing) == (4, {"parse_error": 1})
        assert (found.pairwise, found.rated, found.raters.level) == (True, 4, "nominal")
        [metric] = calibrate_choices(choices, self.SCORES, ["m"], Options(resamples=50, ties="skip")).metrics
        assert (metric.pairs.accuracy, metric.items) == (0.5, 4)

    def test_less_is_better(self):
        options = Options(resamples=50, lower_better=frozenset({"m"}))
        [metric] = calibrate_choices(self.choices(("a", "b", FIRST)), self.SCORES, ["m"], options).metrics
        assert (metric.accuracy.value, metric.lower_better) == (1.0, True)

    def test_unmatched_pairs(self):
        choices = self.choices(("a", "b", -FIRST), ("a", "nowhere", FIRST))
        assert calibrate_choices(choices, self.SCORES, ["m"], QUICK).unmatched == 1
        with pytest.raises(InputError, match="none of the 1 rated items"):
            calibrate_choices(self.choices(("x", "y", FIRST)), self.SCORES, ["m"], QUICK)

    def test_only_ties_have_no_accuracy(self):
        [metric] = calibrate_choices(self.choices(("a", "b", TIE)), self.SCORES, ["m"], QUICK).metrics
        assert (metric.pairs.accuracy, metric.accuracy) == (None, None)
        assert metric.reason


class TestReading:
    def test_ratings(self, tmp_path):
        path = tmp_path / "ratings.csv"
        path.write_text("id,rating,who\n1,3,x\n1,4,y\n2,,x\n3,many,x\n,5,x\n1,5,x\n")
        found = read_ratings(path, "id", "rating", "who")
        assert found.items == {"1": {"x": 5.0, "y": 4.0}}
        assert (found.unreadable, found.replaced, found.raters) == (3, 1, 2)

    def test_ratings_from_json_lines_with_broken_ones(self, tmp_path):
        path = tmp_path / "ratings.jsonl"
        path.write_text('{"id": 1, "rating": 3}\n{broken\n{"id": 1.0, "rating": 5}\n')
        found = read_ratings(path, "id", "rating")
        assert (list(found.items), sorted(found.items["1"].values()), found.unreadable) == (["1"], [3.0, 5.0], 1)

    def test_a_column_that_is_not_there(self, tmp_path):
        path = tmp_path / "ratings.csv"
        path.write_text("id,stars\n1,3\n")
        with pytest.raises(InputError, match="it has id, stars"):
            read_ratings(path, "id", "rating")

    def test_choices_in_any_words_and_order(self, tmp_path):
        path = tmp_path / "choices.csv"
        rows = ["a,b,first", "b,a,2", "b,a,b", "a,b,TIE", "a,b,perhaps", "a,a,first", ",b,first"]
        path.write_text("first,second,choice\n" + "\n".join(rows) + "\n")
        found = read_choices(path, "first", "second", "choice")
        assert list(found.items) == [("a", "b")]
        assert list(found.items["a", "b"].values()) == [1.0, 1.0, -1.0, 0.0]
        assert found.unreadable == 3

    def test_scores_of_pictures_by_path_or_name(self, tmp_path):
        rows = [
            {"images": ["x/1.png", "x/2.png"], "m": [0.1, 0.2], "m_status": ["ok", "ok"], "prompt": "p"},
            {"images": ["x/3.png"], "m": [None], "m_status": ["timeout"], "prompt": "q"},
            {"images": "y/1.png", "m": 0.4, "m_status": "ok", "prompt": "q"},
            {"images": ["x/2.png"], "m": [0.9], "m_status": ["ok"], "prompt": "again"},
        ]
        path = tmp_path / "scored.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        items = ["x/1.png", "2.png", "elsewhere/3.png", "4.png"]
        scores, groups = read_scores(path, items, ["m"], key="images", within="prompt")
        assert {item: each["m"] for item, each in scores.items()} == {
            "x/1.png": (0.1, "ok"),
            "2.png": (0.2, "ok"),
            "elsewhere/3.png": (None, "timeout"),
        }
        assert groups == {"x/1.png": "p", "2.png": "p", "elsewhere/3.png": "q"}

    def test_scores_of_rows_by_id(self, tmp_path):
        rows = [
            {"id": 7, "m": [0.2, None, 0.4], "m_status": ["ok", "timeout", "ok"]},
            {"id": "8", "m": [None], "m_status": ["refused"]},
        ]
        path = tmp_path / "scored.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores, _ = read_scores(path, ["7", "8", "9"], ["m"], key="id")
        assert scores["7"]["m"].value == pytest.approx(0.3)
        assert scores["8"]["m"] == (None, "refused")


def test_dsg_agrees_with_people_as_published(published_data):
    """The README of DSG: PaLI's answers with dependencies against mean Likert ratings, .571 and .458."""
    folder = published_data / "dsg"
    answers, parents = defaultdict(dict), defaultdict(dict)
    with (folder / "pali17b_dsg.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = f"{row['t2i_model']}/{row['item_id']}"
            answers[key][int(row["question_id"])] = row["answer"] == "yes"
            parents[key][int(row["question_id"])] = row["dependency_id"].split(",")
    ratings = Ratings()
    with (folder / "tifa160-likert-anns.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            ratings.add(f"{row['t2i_model']}/{row['item_id']}", row["worker_id"], float(row["answer"]))
    scores = {}
    for key in ratings.items:
        given = answers.get(key)
        if given is None:
            scores[key] = 0.0  # never asked about: the reference gives it 0
            continue
        readable = all(one.strip().isdigit() for each in parents[key].values() for one in each)
        known = {atom: [int(one) for one in each] for atom, each in parents[key].items()} if readable else {}
        scores[key] = dsg(given, known).value
    found = calibrate(ratings, scores_of(scores), ["m"], Options(resamples=20))
    [metric] = found.metrics
    assert metric.items == 800
    assert (round(metric.spearman.value, 3), round(metric.kendall.value, 3)) == (0.571, 0.458)
    assert metric.spearman.low < 0.571 < metric.spearman.high
    assert 0.5 < found.raters.alpha.value < 0.9


def test_without_scipy_it_says_so(monkeypatch):
    import builtins

    real = builtins.__import__

    def no_scipy(name, *rest, **named):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(Exception, match="needs scipy"):
        score_map("m", [1, 2], [1, 2])
