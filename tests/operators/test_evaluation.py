"""Scores and filters: what stands in a row, what a missing score means, and what is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, InputError, RefusedError
from dataflow.operators import DuplicateFilter, ImageEvaluator, ScoreFilter
from dataflow.operators.evaluation import score_at, with_scores
from dataflow.runtime.engine import RunOptions
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.serving.scoring import ScoringServing
from dataflow.types import Outcome
from dataflow.utils.storage import FileStorage
from dataflow.utils.vectors import VectorStore

QUIET = RunOptions(quiet=True)


class Letters(ScoringServing):
    """Scores a picture with the number of letters in its prompt; counts what it was asked."""

    batch_size = 2

    def __init__(self):
        self.asked = 0

    def fingerprint(self):
        return {"model": "letters", "version": 1}

    def score(self, requests):
        self.asked += len(requests)
        scores = {
            "nan": float("nan"),
            "refuse": RefusedError("no"),
            "odd": BadRequestError("odd", reason="parse_error"),
        }
        return [scores.get(request.prompt, float(len(request.prompt))) for request in requests]


class Bench:
    def __init__(self, folder):
        self.folder = folder
        self.rng = np.random.default_rng(0)

    def picture(self, name, seed=None, size=(48, 32)):
        rng = self.rng if seed is None else np.random.default_rng(seed)
        path = self.folder / name
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
        return str(path)

    def storage(self, *rows):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = FileStorage(str(table), cache_path=str(self.folder / "cache"))
        return self.store.step()

    def table(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]

    def dropped(self):
        return [json.loads(line)["reason"] for line in self.store.dropped_path.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


class TestScores:
    def test_they_have_the_shape_of_the_image_column(self, bench):
        one, two = bench.picture("1.png"), bench.picture("2.png")
        rows = {"images": [one, two], "conversations": "four"}, {"images": one, "conversations": "sixsix"}
        ImageEvaluator(Letters(), with_prompt=True, options=QUIET).run(bench.storage(*rows))
        first, second = bench.table()
        assert (first["score"], first["score_status"]) == ([4.0, 4.0], ["ok", "ok"])
        assert (second["score"], second["score_status"]) == (6.0, "ok")
        assert first["score_by"] == second["score_by"]
        assert first["score_by"].startswith("letters#")
        assert "score_error" not in first

    def test_what_could_not_be_scored_is_null_with_its_status_and_never_a_number(self, bench):
        one, half = bench.picture("1.png"), bench.folder / "half.png"
        half.write_bytes((bench.folder / "1.png").read_bytes()[:60])
        refused = {"status": "refused", "reason": "refused", "message": "no"}
        failed = {"status": "failed", "reason": "timeout", "message": "late"}
        rows = [
            {"images": [one], "conversations": "fine"},
            {"images": [one], "conversations": "nan"},
            {"images": [one], "conversations": "refuse"},
            {"images": [one], "conversations": "odd"},
            {"images": ["gone.png"], "conversations": "fine"},
            {"images": [], "images_error": refused, "conversations": "fine"},
            {"images": [], "images_error": failed, "conversations": "fine"},
            {"images": "", "conversations": "fine"},
        ]
        summary = ImageEvaluator(Letters(), with_prompt=True, options=QUIET).run(bench.storage(*rows))
        table = bench.table()
        assert [row["score"] for row in table] == [[4.0], *[[None]] * 6, None]
        statuses = ["ok", "failed", "refused", "parse_error", "missing_image", "refused", "generation_failed"]
        assert [row["score_status"] for row in table] == [*([status] for status in statuses), "missing_image"]
        assert table[3]["score_error"] == ["parse_error: odd"]
        assert summary.rows == 8

    def test_a_cell_that_holds_something_else_harms_its_own_row_only(self, bench):
        rows = [{"images": 7, "conversations": "one"}, {"images": [bench.picture("a.png")], "conversations": "three"}]
        summary = ImageEvaluator(Letters(), with_prompt=True, options=QUIET).run(bench.storage(*rows))
        bad, good = bench.table()
        assert (summary.done, summary.failed) == (1, 1)
        assert (bad["score"], bad["score_status"], good["score"]) == (None, "failed", [5.0])
        assert "expected an image path, found int" in bad["score_error"]

    def test_a_picture_that_is_not_there_costs_the_others_of_its_row_nothing(self, bench):
        there = [bench.picture("a.png"), bench.picture("b.png")]
        rows = [{"images": [there[0], "gone.png", there[1]], "conversations": "three"}] * 2
        first = ImageEvaluator(Letters(), with_prompt=True, options=QUIET).run(bench.storage(*rows))
        for row in bench.table():
            assert row["score"] == [5.0, None, 5.0]
            assert row["score_status"] == ["ok", "missing_image", "ok"]
            assert "gone.png: no such file" in row["score_error"][1]
            assert not row["score_error"][0]
        assert (first.failed, first.reasons) == (2, {"image_missing": 2})
        # When it is there, it is scored, and nothing else is.
        bench.picture("gone.png")
        rows = [{"images": [there[0], str(bench.folder / "gone.png"), there[1]], "conversations": "three"}]
        again = Letters()
        ImageEvaluator(again, with_prompt=True, options=QUIET).run(bench.storage(*rows))
        assert bench.table()[0]["score"] == [5.0, 5.0, 5.0]
        assert again.asked == 1

    def test_they_are_computed_once(self, bench):
        rows = [{"images": [bench.picture(f"{n}.png")], "conversations": f"thing {n}"} for n in range(5)]
        serving = Letters()
        evaluator = ImageEvaluator(serving, with_prompt=True, options=QUIET)
        evaluator.run(bench.storage(*rows))
        evaluator.run(bench.storage(*rows[::-1], {"images": [rows[0]["images"][0]], "conversations": "new"}))
        assert serving.asked == 6
        assert [row["score"] for row in bench.table()] == [[7.0]] * 5 + [[3.0]]

    def test_other_rules_of_the_fold_write_the_table_anew(self, bench):
        """Nothing is made, the table is the same: only the fold knows that it goes by something else now."""

        class Fails(Letters):
            def score(self, requests):
                return [BadRequestError("odd") if request.seed else 1.0 for request in requests]

        rows = [{"images": [bench.picture("a.png")], "conversations": "three"}]
        for least, score in ((2, None), (1, 1.0)):
            ImageEvaluator(Fails(), with_prompt=True, passes=2, min_passes=least, options=QUIET).run(
                bench.storage(*rows) if least == 2 else bench.store.reset().step()
            )
            (row,) = bench.table()
            assert (row["score"][0] or {}).get("value") == score

    def test_columns_of_objects(self):
        row = {"probe": [{"a": 1, "b": {"c": 2.5}}, None, {"a": None}], "word": "x"}
        assert score_at(row, "probe.a") == [1.0, None, None]
        assert score_at(row, "probe.b.c") == [2.5, None, None]
        for key in ("none", "word"):
            with pytest.raises(InputError):
                score_at(row, key)

    def test_prose_for_a_score_is_a_parse_error(self):
        outcome = Outcome(request_id="", status="done", text="I would say seven.")
        row = with_scores({"images": ["a.png"]}, "images", "score", [outcome], "judge")
        assert (row["score"], row["score_status"]) == ([None], ["parse_error"])


def test_the_probe_measures_what_is_there(bench):
    pytest.importorskip("imagehash")
    path = bench.picture("a.png", size=(100, 50))
    Image.new("RGB", (64, 64), "white").save(bench.folder / "white.jpg")
    rows = {"images": [path]}, {"images": [str(bench.folder / "white.jpg")]}
    assert ImageEvaluator(ImageProbeServing(), options=QUIET).run(bench.storage(*rows), output_key="probe").done == 2
    [[first], [white]] = [row["probe"] for row in bench.table()]
    assert (first["width"], first["height"], first["format"], first["mode"]) == (100, 50, "PNG", "RGB")
    assert first["bytes"] == (bench.folder / "a.png").stat().st_size
    assert (white["uniform"], white["brightness"], white["bright"]) == (True, 1.0, 1.0)
    assert len(first["sha256"]) == 64
    assert first["phash"] != white["phash"]


class TestScoreFilter:
    def rows(self, *scores):
        return [{"images": [f"{n}.png"], "score": [score], "score_status": ["ok"]} for n, score in enumerate(scores)]

    def keep(self, bench, rows, on_unknown="quarantine", **conditions):
        conditions = {"input_score_key": "score", **conditions}
        summary = ScoreFilter(on_unknown=on_unknown, options=QUIET).run(bench.storage(*rows), **conditions)
        assert summary.balanced
        return [row["images"] for row in bench.table()]

    def test_thresholds(self, bench):
        rows = self.rows(0.1, 0.5, 0.9)
        assert self.keep(bench, rows, minimum=0.5) == [["1.png"], ["2.png"]]
        assert self.keep(bench, rows, maximum=0.5) == [["0.png"], ["1.png"]]
        assert bench.dropped() == ["score:score"]

    @pytest.mark.parametrize(
        ("policy", "kept", "reasons"),
        [
            ("quarantine", [["1.png"]], ["score:score", "quarantined:score"]),
            ("drop", [["1.png"]], ["score:score", "unknown:score"]),
            ("keep", [["1.png"], ["2.png"]], ["score:score"]),
        ],
    )
    def test_unknown_scores_go_by_policy(self, bench, policy, kept, reasons):
        assert self.keep(bench, self.rows(0.1, 0.9, None), policy, minimum=0.5) == kept
        assert bench.dropped() == reasons

    def test_the_lowest_share_goes(self, bench):
        rows = self.rows(*(n / 10 for n in range(10)))
        assert len(self.keep(bench, rows, drop_lowest_share=0.2)) == 8
        assert len(self.keep(bench, rows, drop_lowest_share=0.2, minimum=0.75)) == 2
        assert len(self.keep(bench, self.rows(*[0.5] * 10), drop_lowest_share=0.2)) == 10

    def test_the_best_of_several_and_the_others_beside_it(self, bench):
        row = {
            "images": ["a", "b", "c"],
            "score": [0.2, 0.9, 0.9],
            "score_status": ["ok"] * 3,
            "probe": [{"x": 1}, {"x": 2}, {"x": 3}],
            "probe_status": ["ok"] * 3,
            "tags": [1, 2, 3],
        }
        self.keep(bench, [row], top_k=1, output_rejected_key="losers")
        [found] = bench.table()
        assert (found["images"], found["score"], found["losers"]) == (["b"], [0.9], ["a", "c"])
        assert (found["probe"], found["tags"]) == ([{"x": 2}], [1, 2, 3])  # only what evaluators wrote goes along

    def test_a_weighted_sum_is_unknown_if_one_part_is(self, bench):
        rows = [
            {"images": ["a"], "x": [1.0], "y": [0.0]},
            {"images": ["b"], "x": [0.0], "y": [1.0]},
            {"images": ["c"], "x": [1.0], "y": [None]},
        ]
        kept = self.keep(bench, rows, "drop", input_score_key=None, weights={"x": 2.0, "y": 1.0}, minimum=1.5)
        assert kept == [["a"]]
        assert bench.dropped() == ["score:weighted", "unknown:weighted"]

    @pytest.mark.parametrize(
        "conditions",
        [
            {},
            {"input_score_key": None, "minimum": 1},
            {"weights": {"x": 1}, "minimum": 1},
            {"drop_lowest_share": 1.0},
            {"top_k": 0},
        ],
    )
    def test_conditions_that_make_no_sense(self, conditions):
        with pytest.raises(ConfigError):
            ScoreFilter().plan(**{"input_score_key": "score", **conditions})

    def test_an_unknown_policy(self):
        for kind in (ScoreFilter, DuplicateFilter):
            with pytest.raises(ConfigError, match="on_unknown"):
                kind(on_unknown="maybe")


class TestDuplicates:
    def probed(self, bench, *rows):
        pytest.importorskip("imagehash")
        ImageEvaluator(ImageProbeServing(), options=QUIET).run(bench.storage(*rows), output_key="probe")
        return bench.table()

    def test_one_of_each_group_stays(self, bench):
        one, other = bench.picture("1.png", seed=1), bench.picture("2.png", seed=2)
        Image.open(one).save(bench.folder / "1.jpg", quality=60)
        Image.open(one).resize((96, 64)).save(bench.folder / "large.png")
        again = [str(bench.folder / name) for name in ("1.jpg", "large.png")]
        rows = self.probed(bench, {"images": [one]}, {"images": [other, again[0]]}, {"images": [again[1]]})
        summary = DuplicateFilter(options=QUIET).run(bench.storage(*rows))
        assert [row["images"] for row in bench.table()] == [[one], [other]]
        assert (summary.dropped, bench.dropped()) == (1, ["duplicate"])
        assert [len(row["probe"]) for row in bench.table()] == [1, 1]

    def test_the_highest_priority_stays(self, bench):
        small, large = bench.picture("s.png", seed=1, size=(48, 32)), bench.picture("l.png", seed=1, size=(192, 128))
        rows = self.probed(bench, {"images": [small]}, {"images": [large]})
        DuplicateFilter(options=QUIET).run(bench.storage(*rows), priority_name="width")
        assert [row["images"] for row in bench.table()] == [[large]]

    def test_equal_files_only(self, bench):
        one = bench.picture("1.png", seed=1)
        Image.open(one).save(bench.folder / "1.jpg", quality=90)
        (bench.folder / "copy.png").write_bytes((bench.folder / "1.png").read_bytes())
        paths = [one, str(bench.folder / "1.jpg"), str(bench.folder / "copy.png")]
        rows = self.probed(bench, *({"images": [path]} for path in paths))
        DuplicateFilter(options=QUIET).run(bench.storage(*rows), hash_name="sha256")
        assert [row["images"] for row in bench.table()] == [[one], [paths[1]]]

    @pytest.mark.parametrize(("policy", "number"), [("quarantine", 1), ("drop", 1), ("keep", 2)])
    def test_without_a_hash(self, bench, policy, number):
        rows = [{"images": ["a"], "probe": [{"phash": "0" * 15 + "1"}]}, {"images": ["b"], "probe": [None]}]
        DuplicateFilter(on_unknown=policy, options=QUIET).run(bench.storage(*rows))
        assert len(bench.table()) == number

    def test_what_makes_no_sense(self):
        for keys in ({"hash_name": "md5"}, {"distance": 40}):
            with pytest.raises(ConfigError):
                DuplicateFilter().plan(**keys)


class TestDuplicatesByVector:
    @pytest.fixture
    def rows(self, bench):
        """Four pictures, two of them the same scene at another brightness, and one whose vector is missing."""
        random = np.random.default_rng(0)
        base = random.normal(size=(3, 8)).astype(np.float32)
        vectors = [base[0], base[1], base[0] * 3 + 0.4, base[2]]
        keys = [f"{number:064x}" for number in range(5)]
        store = VectorStore(bench.folder / "vectors" / "model", 8)
        store.add(keys[:4], np.stack(vectors))
        store.close()
        return [
            {"images": [f"{n}.png"], "vector": [{"sha256": key, "store": "model", "worth": n}]}
            for n, key in enumerate(keys)
        ]

    def kept(self, bench, rows, policy="drop", **keys):
        DuplicateFilter(on_unknown=policy, options=QUIET).run(
            bench.storage(*rows),
            input_probe_key="vector",
            hash_name="vector",
            vectors=bench.folder / "vectors",
            **keys,
        )
        return [row["images"][0] for row in bench.table()]

    def test_one_of_each_group_stays(self, bench, rows):
        assert self.kept(bench, rows[:4]) == ["0.png", "1.png", "3.png"]
        assert self.kept(bench, rows[:4], priority_name="worth") == ["1.png", "2.png", "3.png"]
        assert self.kept(bench, rows[:4], similarity=0.9995) == ["0.png", "1.png", "2.png", "3.png"]

    def test_a_picture_without_a_vector_goes_by_policy(self, bench, rows):
        assert "4.png" not in self.kept(bench, rows)
        assert "4.png" in self.kept(bench, rows, policy="keep")
        rows[0]["vector"] = [None]
        assert self.kept(bench, rows, policy="keep") == ["0.png", "1.png", "2.png", "3.png", "4.png"]

    def test_vectors_of_two_models_are_not_compared(self, bench, rows):
        rows[1]["vector"][0]["store"] = "other"
        with pytest.raises(InputError, match="two models"):
            self.kept(bench, rows)
        with pytest.raises(InputError, match="has the embedder run"):
            self.kept(bench, rows[1:2])

    @pytest.mark.parametrize(
        "keys", [{"hash_name": "vector"}, {"vectors": "v"}, {"hash_name": "vector", "vectors": "v", "similarity": 0.0}]
    )
    def test_what_makes_no_sense(self, keys):
        with pytest.raises(ConfigError):
            DuplicateFilter().plan(**keys)


def test_an_iteration_that_ends_inside_a_score_does_not_hang_the_run(bench):
    class Ends(Letters):
        def score(self, requests):
            return [next(iter(()))]

    rows = [{"images": [bench.picture("a.png")], "conversations": "three"}]
    summary = ImageEvaluator(Ends(), options=QUIET).run(bench.storage(*rows))
    assert summary.failed == 1
    assert "StopIteration" in bench.table()[0]["score_error"][0]
