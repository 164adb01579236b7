"""Objects: a detector asked once in words, and benchmarks' rules applied to what it found as often as one likes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import BadRequestError, ConfigError, InputError
from dataflow.metrics.objects import GENEVAL_COLOURS, Detection, geneval_verdict, parse_geneval
from dataflow.operators import ScoreFilter
from dataflow.operators.core_vision.object_evaluator import ObjectEvaluator, read_geneval
from dataflow.runtime.engine import RunOptions
from dataflow.serving.scoring import ScoringServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)
LEFT, RIGHT, LOW = [0, 10, 20, 30], [40, 10, 60, 30], [20, 40, 40, 60]


class Detector(ScoringServing):
    """Finds in each picture, by its colour, what a test says is there, of the labels that were asked for."""

    batch_size = 2

    def __init__(self, scenes, fingerprint="v1"):
        self.scenes = scenes
        self.name = fingerprint
        self.asked = []

    def fingerprint(self):
        return {"model": "detector", "version": self.name}

    def check(self, request):
        if not request.params.get("labels"):
            raise BadRequestError("labels")

    def score(self, requests):
        self.asked += requests
        return [self.answer(request) for request in requests]

    def answer(self, request):
        with Image.open(request.images[0]) as picture:
            scene = self.scenes[picture.getpixel((0, 0))[0]]
        if not isinstance(scene, list):
            return scene
        found = [each for each in scene if each["label"] in request.params["labels"]]
        return {"detections": found, "width": 64, "height": 64}


def at(label, score, box, **more):
    return {"label": label, "score": score, "box": box, **more}


def asked_for(tag="two_object", exclude=(), **clauses):
    include = [{"class": name.replace("_", " "), "count": 1, **more} for name, more in clauses.items()]
    return {"tag": tag, "prompt": "…", "include": include, **({"exclude": list(exclude)} if exclude else {})}


class Desk:
    scenes = 0

    def __init__(self, folder):
        self.folder = folder

    def picture(self, number):
        path = self.folder / f"{number}.png"
        Image.new("RGB", (64, 64), (number, 0, 0)).save(path)
        return str(path)

    def evaluate(self, serving, *rows, run=None, **options):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        storage = FileStorage(str(table), cache_path=str(self.folder / "cache")).step()
        self.summary = ObjectEvaluator(serving, options=QUIET, **options).run(storage, **(run or {}))
        assert self.summary.balanced
        self.output = storage.output_path
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def judge(self, scene, geneval, **options):
        """The score of one picture with this scene, detected afresh."""
        self.scenes += 1
        serving = Detector([scene], f"scene {self.scenes}")
        [row] = self.evaluate(serving, {"images": self.picture(0), "geneval": geneval}, **options)
        self.labels = list(serving.asked[0].params["labels"])
        assert row["objects_status"] == "ok", row
        return row["objects"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


class TestGenEval:
    def test_every_picture_of_a_row_has_a_verdict(self, desk):
        both = [at("a dog", 0.9, LEFT), at("an orange", 0.5, RIGHT)]
        serving = Detector([both, both[:1], []])
        row = {"images": [desk.picture(n) for n in range(3)], "geneval": asked_for(dog={}, orange={})}
        [found] = desk.evaluate(serving, row)
        assert [each["value"] for each in found["objects"]] == [1.0, 0.0, 0.0]
        assert found["objects"][1]["reasons"] == ["expected 1 orange, found 0"]
        assert found["objects_status"] == ["ok"] * 3
        assert serving.asked[0].params["labels"] == ["a dog", "an orange"]
        assert found["objects"][0]["detections"] == [
            {"label": "dog", "score": 0.9, "box": LEFT},
            {"label": "orange", "score": 0.5, "box": RIGHT},
        ]

    def test_counting_and_exclusion(self, desk):
        geneval = asked_for("counting", exclude=[{"class": "dog", "count": 3}], dog={"count": 2})
        dogs = [at("a dog", 0.95, LEFT), at("a dog", 0.93, RIGHT), at("a dog", 0.8, LOW)]
        assert desk.judge(dogs, geneval)["value"] == 1.0
        found = desk.judge(dogs, geneval, counting_threshold=0.5)
        assert found["reasons"] == ["expected fewer than 3 dog, found 3"]
        assert [each["score"] for each in found["detections"]] == [0.95, 0.93, 0.8]

    def test_positions(self, desk):
        geneval = asked_for("position", dog={}, cat={"position": ["right of", 0]})
        right = [at("a dog", 0.9, LEFT), at("a cat", 0.9, RIGHT)]
        assert desk.judge(right, geneval)["value"] == 1.0
        wrong = desk.judge([at("a dog", 0.9, RIGHT), at("a cat", 0.9, LEFT)], geneval)
        assert wrong["reasons"] == ["expected cat right of dog, found left of it"]

    def test_thresholds(self, desk):
        weak = [at("a dog", 0.2, LEFT), at("a dog", 0.1, RIGHT)]
        dog = asked_for("single_object", dog={})
        assert desk.judge(weak, dog)["value"] == 0.0
        found = desk.judge(weak, dog, threshold=0.15)
        assert found["value"] == 1.0
        assert found["detections"] == [{"label": "dog", "score": 0.2, "box": LEFT}]
        strong = [at("a dog", 0.5, LEFT)]
        assert desk.judge(strong, dog)["value"] == 1.0
        assert desk.judge(strong, dog, threshold=0.6)["value"] == 0.0

    def test_the_surest_objects_are_the_ones_that_are_looked_at(self, desk):
        """Raising scores over GenEval's thresholds must keep their order."""
        geneval = asked_for("position", cat={}, dog={"position": ["right of", 0]})
        near = [at("a dog", 0.11, LEFT), at("a dog", 0.12, [50, 40, 60, 60]), at("a cat", 0.2, [20, 40, 30, 60])]
        assert desk.judge(near, geneval, threshold=0.1)["value"] == 1.0
        near[0]["score"], near[1]["score"] = 0.12, 0.11
        assert desk.judge(near, geneval, threshold=0.1)["value"] == 0.0

    def test_overlaps(self, desk):
        geneval = asked_for("counting", exclude=[{"class": "dog", "count": 2}], dog={})
        twice = [at("a dog", 0.95, LEFT), at("a dog", 0.94, [1, 10, 21, 30])]
        assert desk.judge(twice, geneval)["value"] == 0.0
        assert desk.judge(twice, geneval, max_overlap=0.5)["value"] == 1.0
        apart = [at("a dog", 0.95, LEFT), at("a dog", 0.94, RIGHT)]
        assert desk.judge(apart, geneval, max_overlap=0.5)["value"] == 0.0

    def test_other_rules_detect_nothing_again(self, desk):
        serving = Detector([[at("a dog", 0.4, LEFT)]])
        row = {"images": [desk.picture(0)], "geneval": asked_for("single_object", dog={})}
        [first] = desk.evaluate(serving, row)
        [second] = desk.evaluate(serving, row, threshold=0.5, run={"output_key": "strict"})
        [third] = desk.evaluate(serving, {**row, "note": 1}, threshold=0.6)
        assert len(serving.asked) == 1
        assert first["objects"][0]["value"] == 1.0
        assert second["strict"][0]["value"] == 0.0
        assert third["objects"][0]["value"] == 0.0
        assert len({first["objects_by"], second["strict_by"], third["objects_by"]}) == 3

    def test_verdicts_are_those_of_the_metric(self, desk):
        """Random scenes: the operator adds nothing to the rules and loses nothing."""
        rng = np.random.default_rng(4)
        geneval = asked_for("position", exclude=[{"class": "cow", "count": 2}], dog={"count": 2}, cat={})
        geneval["include"][1]["position"] = ["below", 0]
        prompt = parse_geneval(json.dumps(geneval))
        scenes, wanted = [], []
        for _ in range(40):
            scene = []
            for name in rng.choice(["dog", "cat", "cow"], 5, p=[0.4, 0.4, 0.2]):
                x, y = rng.uniform(0, 40, 2)
                y += 30 * (name == "cat")
                scene.append(at(f"a {name}", float(rng.uniform(0.1, 1)), [x, y, x + 10, y + 10]))
            scenes.append(scene)
            found = [Detection(each["label"][2:], each["score"], tuple(each["box"])) for each in scene]
            wanted.append(geneval_verdict(prompt, found))
        row = {"images": [desk.picture(n) for n in range(40)], "geneval": geneval}
        [judged] = desk.evaluate(Detector(scenes), row)
        assert [each["value"] for each in judged["objects"]] == [float(each.correct) for each in wanted]
        assert [tuple(each["reasons"]) for each in judged["objects"]] == [each.reasons for each in wanted]
        assert 2 < sum(each.correct for each in wanted) < 38


class TestColours:
    RED_CUBE = asked_for("colors", cube={"color": "red"})

    def test_compared_by_the_surest_query_at_the_same_place(self, desk):
        scene = [
            at("a cube", 0.6, LEFT),
            at("a red cube", 0.5, [1, 10, 20, 30]),
            at("a blue cube", 0.4, LEFT),
            at("a blue cube", 0.9, RIGHT),
        ]
        found = desk.judge(scene, self.RED_CUBE)
        assert desk.labels == ["a cube", *(f"{'an' if c[0] == 'o' else 'a'} {c} cube" for c in GENEVAL_COLOURS)]
        assert found["value"] == 1.0
        assert found["detections"] == [{"label": "cube", "score": 0.6, "box": LEFT, "colour": "red"}]
        scene[1]["score"] = 0.3
        assert desk.judge(scene, self.RED_CUBE)["reasons"] == ["expected 1 red cube, found 1 blue"]
        assert desk.judge(scene[:1], self.RED_CUBE)["reasons"] == ["expected 1 red cube, found 1 unclear"]
        assert desk.judge(scene[1:], self.RED_CUBE)["reasons"] == ["expected 1 cube, found 0"]

    def test_two_colours_and_a_position(self, desk):
        geneval = asked_for("color_attr", cube={"color": "red"}, ball={"color": "green", "position": ["right of", 0]})
        scene = [at("a cube", 0.6, LEFT), at("a red cube", 0.5, LEFT)]
        scene += [at("a ball", 0.7, RIGHT), at("a green ball", 0.5, RIGHT)]
        assert desk.judge(scene, geneval)["value"] == 1.0
        assert len(desk.labels) == 22

    def test_believed_where_the_colour_is_in_the_query(self, desk):
        scene = [at("a cube", 0.9, RIGHT), at("a red cube", 0.5, LEFT)]
        found = desk.judge(scene, self.RED_CUBE, colours="query")
        assert desk.labels == ["a red cube"]
        assert (found["value"], found["detections"][0]["label"]) == (1.0, "red cube")
        assert desk.judge(scene[:1], self.RED_CUBE, colours="query")["reasons"] == ["expected 1 red cube, found 0"]

    def test_told_by_the_detector(self, desk):
        scene = [at("cube", 0.9, LEFT, colour="red")]
        options = {"colours": "detector", "query": "{label}"}
        assert desk.judge(scene, self.RED_CUBE, **options)["value"] == 1.0
        assert desk.labels == ["cube"]
        scene[0]["colour"] = "blue"
        assert desk.judge(scene, self.RED_CUBE, **options)["value"] == 0.0

    def test_a_detector_that_tells_none_gives_no_score(self, desk):
        row = {"images": desk.picture(0), "geneval": self.RED_CUBE}
        [found] = desk.evaluate(Detector([[at("a cube", 0.9, LEFT)]]), row, colours="detector")
        assert (found["objects"], found["objects_status"]) == (None, "failed")
        assert "came without a colour" in found["objects_error"]


class TestCompBench:
    def test_is_the_metrics_score(self, desk):
        spatial = {"first": "dog", "relation": "on the left of", "second": "cat"}
        scene = [at("a dog", 0.8, LEFT), at("a cat", 0.6, RIGHT), at("a cat", 0.2, LOW)]
        serving = Detector([scene, scene[::-1][:2]])
        rows = [{"images": [desk.picture(0), desk.picture(1)], "spatial": spatial}, {"images": [], "spatial": spatial}]
        run = {"input_object_key": "spatial", "output_key": "place"}
        found, empty = desk.evaluate(serving, *rows, rules="compbench_spatial", run=run)
        assert [each["value"] for each in found["place"]] == [pytest.approx(0.25 * 1.4 + 0.5), 0.0]
        assert [each["label"] for each in found["place"][0]["detections"]] == ["dog", "cat"]
        assert empty["place_status"] == ["missing_image"]
        [strict, _] = desk.evaluate(
            serving, *rows, rules="compbench_spatial", threshold=0.7, run={**run, "output_key": "strict"}
        )
        assert strict["strict"][0]["value"] == 0.0
        assert len(serving.asked) == 2

    @pytest.mark.parametrize(
        ("spatial", "message"),
        [
            ("left", "object"),
            ({"first": "dog", "second": "cat"}, "relation"),
            ({"first": 3}, "first"),
            ({"first": "dog", "relation": "behind", "second": "cat"}, "no such relation"),
        ],
    )
    def test_what_is_no_relation(self, desk, spatial, message):
        row = {"images": desk.picture(0), "spatial": spatial}
        [found] = desk.evaluate(Detector([]), row, rules="compbench_spatial", run={"input_object_key": "spatial"})
        assert found["objects_status"] == "failed"
        assert "column 'spatial'" in found["objects_error"]
        assert message in found["objects_error"]


class TestRows:
    def test_metadata_in_columns_of_its_own(self, desk):
        row = {"images": desk.picture(0), **asked_for("single_object", dog={})}
        serving = Detector([[at("a dog", 0.9, LEFT)]])
        found = desk.evaluate(serving, row, {"images": row["images"]}, run={"input_object_key": None})
        assert [each["objects_status"] for each in found] == ["ok", "not_applicable"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tag": "poses"}, "tag: expected one of single_object"),
            ({"tag": None}, "tag: "),
            ({"include": 5}, "include: "),
            ({"include": []}, "include: nothing is asked for"),
            ({"include": [{"class": "dog", "count": 0}]}, "include: dog: expected a count"),
            ({"include": [{"class": "dog", "count": 1, "color": "beige"}]}, "include: dog: no such colour"),
            ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "include: dog: expected a relation"),
            ({"exclude": [{"count": 1}]}, "exclude: expected a clause"),
        ],
    )
    def test_bad_metadata_names_its_column_and_field(self, change, message):
        geneval = {**asked_for("single_object", dog={}), **change}
        with pytest.raises(InputError, match=message) as caught:
            read_geneval({"meta": geneval}, "meta")
        assert caught.value.field == "meta"
        with pytest.raises(InputError) as caught:
            read_geneval(geneval, None)
        assert caught.value.field == next(iter(change))

    def test_bad_rows_fail_alone_and_nothing_asked_for_is_not_applicable(self, desk):
        dog = asked_for("single_object", dog={})
        picture, gone = desk.picture(0), str(desk.folder / "gone.png")
        broken = desk.folder / "broken.png"
        rows = [
            {"images": [picture], "geneval": dog},
            {"images": [picture], "geneval": None},
            {"images": [picture, picture], "geneval": [dog]},
            {"images": [gone], "geneval": dog},
            {"images": 5, "geneval": dog},
            {"images": [], "geneval": dog},
            {"images": picture, "geneval": {**dog, "tag": "?"}},
        ]
        broken.write_bytes(b"none")
        table = desk.evaluate(Detector([[at("a dog", 0.9, LEFT)]]), *rows)
        assert [row["objects_status"] for row in table] == [
            ["ok"], ["not_applicable"], ["failed", "failed"], ["missing_image"], "failed", ["missing_image"], "failed",
        ]  # fmt: skip
        assert "column 'geneval': tag: expected" in table[6]["objects_error"]
        assert all(row["objects"] in (None, [None], [None, None]) for row in table[1:])

    @pytest.mark.parametrize(
        "answer",
        [
            3.0,
            {"found": []},
            {"detections": 3},
            {"detections": [{"label": "a dog", "score": 0.9}]},
            {"detections": [at("a cat", 0.9, LEFT)]},
            {"detections": [at("a dog", None, LEFT)]},
            {"detections": [at("a dog", "sure", LEFT)]},
            {"detections": [at("a dog", 0.9, [1, 2, 3])]},
            {"detections": [at("a dog", 0.9, [1, 2, 3, None])]},
        ],
    )
    def test_answers_that_are_no_detections_are_no_score(self, desk, answer):
        row = {"images": desk.picture(0), "geneval": asked_for("single_object", dog={})}
        [found] = desk.evaluate(Detector([answer]), row)
        assert (found["objects"], found["objects_status"]) == (None, "parse_error")

    def test_boxes_the_wrong_way_round_are_no_score(self, desk):
        row = {"images": desk.picture(0), "geneval": asked_for("single_object", dog={})}
        [found] = desk.evaluate(Detector([[at("a dog", 0.9, LEFT[::-1])]]), row)
        assert (found["objects"], found["objects_status"]) == (None, "failed")

    def test_a_detector_that_fails_says_so(self, desk):
        row = {"images": desk.picture(0), "geneval": asked_for("single_object", dog={})}
        [found] = desk.evaluate(Detector([BadRequestError("no", reason="image_truncated")]), row)
        assert found["objects_status"] == "decode_error"

    def test_a_filter_reads_the_value(self, desk):
        geneval = asked_for("single_object", dog={})
        row = {"images": [desk.picture(0), desk.picture(1)], "geneval": geneval}
        desk.evaluate(Detector([[], [at("a dog", 0.9, LEFT)]]), row)
        storage = FileStorage(str(desk.output), cache_path=str(desk.folder / "kept")).step()
        ScoreFilter(options=QUIET).run(storage, input_score_key="objects.value", minimum=1.0)
        assert json.loads(storage.output_path.read_text())["images"] == [desk.picture(1)]


@pytest.mark.parametrize(
    "options",
    [{"rules": "coco"}, {"colours": "clip"}, {"query": "a dog"}, {"threshold": 2.0}, {"max_overlap": -0.1}],
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(ConfigError):
        ObjectEvaluator(Detector([]), **options)


def test_compbench_needs_its_column():
    with pytest.raises(ConfigError, match="input_object_key"):
        ObjectEvaluator(Detector([]), rules="compbench_spatial").plan(input_object_key=None)


def test_the_benchmarks_own_metadata(published_data):
    lines = (published_data / "geneval" / "evaluation_metadata.jsonl").read_text().splitlines()
    for line in lines:
        wanted, row = parse_geneval(line), json.loads(line)
        for found in (read_geneval(row, None), read_geneval({"geneval": row}, "geneval")):
            assert found is not None
            assert (found.tag, found.include, found.exclude) == (wanted.tag, wanted.include, wanted.exclude)
    assert len(lines) == 553
