"""Text read from pictures, and what it is worth beside the text that should be there."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dataflow.errors import BadRequestError, ConfigError, FatalServingError, MissingExtraError
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving import ocr
from dataflow.serving.ocr import OcrServing, compared, covered, reading_order
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

rapidocr = pytest.importorskip("rapidocr")

QUIET = RunOptions(quiet=True)
PERFECT = {"word_recall": 1, "multiset_recall": 1, "ned": 0, "gned": 0, "exact": 1}
NOTHING = {"word_recall": 0, "multiset_recall": 0, "ned": 1, "gned": 1, "exact": 0}


def drawn(path, text="", size=(320, 320), at=(10, 120), height=40):
    """A picture of a text; the corners of the ink."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).multiline_text(at, text, font=ImageFont.load_default(size=height), fill="black")
    picture.save(path)
    ink = Image.eval(picture.convert("L"), lambda value: 255 - value).getbbox()
    return str(path), ink


def request(path, prompt=""):
    return GenerationRequest(request_id="0" * 32, prompt=prompt, images=(path,), seed=0)


def answers(serving, *requests):
    results = asyncio.run(serving.generate(requests))
    return [result.error or json.loads(result.text) for result in results]


@pytest.fixture(scope="module")
def serving():
    serving = OcrServing()
    serving.setup()
    yield serving
    serving.cleanup()


class TestReading:
    def test_words_and_where_they_stand(self, serving, tmp_path):
        path, ink = drawn(tmp_path / "a.png", "Grand OPENING", at=(10, 200))
        [found] = answers(serving, request(path))
        assert found["text"].split() == ["Grand", "OPENING"]
        assert found["text"].splitlines() == [line["text"] for line in found["lines"]]
        assert found["line_count"] == len(found["lines"])
        boxes = np.array([line["box"] for line in found["lines"]])
        # The detector leaves a margin around the ink, and the box around its slanted one is upright.
        box = [*boxes.min(axis=0)[:2], *boxes.max(axis=0)[2:]]
        assert np.abs(np.subtract(box, ink)).max() < 40
        assert all(0.9 < line["score"] <= 1 for line in found["lines"])
        assert found["area"] == pytest.approx(covered(boxes.tolist(), (320, 320)))
        assert "ned" not in found
        theirs = rapidocr.RapidOCR(params={"Global.log_level": "error"})(path)
        assert sorted(theirs.txts) == sorted(line["text"] for line in found["lines"])
        corners = [[*box.min(axis=0), *box.max(axis=0)] for box in theirs.boxes]
        assert sorted(np.rint(corners).tolist()) == sorted(boxes.tolist())

    def test_an_empty_picture_is_a_reading_of_nothing(self, serving, tmp_path):
        path, _ = drawn(tmp_path / "white.png", size=(200, 200))
        reading, scored = answers(serving, request(path), request(path, "OPEN"))
        nothing = {"text": "", "lines": [], "line_count": 0, "area": 0.0}
        assert reading == nothing
        assert scored == {**nothing, **NOTHING, "wanted": 1}

    def test_rows_are_read_from_left_to_right_whatever_their_letters(self, serving, tmp_path):
        path, _ = drawn(tmp_path / "a.png", "og      TO      ag", size=(600, 600), at=(10, 200), height=80)
        [found] = answers(serving, request(path))
        boxes = [line["box"] for line in found["lines"]]
        assert len(boxes) == 3
        assert boxes == sorted(boxes)
        assert found["lines"][1]["text"] == "TO"

    def test_large_pictures_are_reduced_and_boxes_are_in_their_own_pixels(self, serving, tmp_path):
        path, ink = drawn(tmp_path / "a.png", "small print", size=(1600, 1600), at=(1300, 1300), height=40)
        small = OcrServing(longest_side=96)
        small._engine, small._signs = serving._engine, serving._signs
        [found], [unread] = answers(serving, request(path)), answers(small, request(path))
        [line] = found["lines"]
        assert line["text"] == "small print"
        assert np.abs(np.subtract(line["box"], ink)).max() < 40
        assert unread["text"] != "small print"

    @pytest.mark.parametrize("size", [(1, 1), (2000, 2), (3, 1500)])
    def test_tiny_and_slim_pictures_are_read_in_little_room(self, serving, tmp_path, size, monkeypatch):
        path, _ = drawn(tmp_path / "a.png", size=size)
        seen = []
        engine = serving._engine
        monkeypatch.setattr(serving, "_engine", lambda picture: (seen.append(picture.size), engine(picture))[1])
        [found] = answers(serving, request(path))
        assert found["text"] == ""
        [(width, height)] = seen
        assert min(width, height) >= 32
        assert max(width, height) <= 8 * min(width, height)

    def test_a_slim_picture_is_read_where_it_stands(self, serving, tmp_path):
        path, ink = drawn(tmp_path / "a.png", "WELCOME home", size=(500, 50), at=(180, 0))
        [found] = answers(serving, request(path))
        assert found["text"].split() == ["WELCOME", "home"]
        boxes = np.array([line["box"] for line in found["lines"]])
        assert np.abs(np.subtract([*boxes.min(axis=0)[:2], *boxes.max(axis=0)[2:]], ink)).max() < 20
        assert boxes.max() <= 500
        assert boxes[:, 3].max() <= 50

    def test_lines_below_the_least_confidence_are_left_out(self, tmp_path):
        path, _ = drawn(tmp_path / "a.png", "Grand OPENING")
        strict = OcrServing(least_confidence=1.0)
        strict.setup()
        [found] = answers(strict, request(path))
        assert found["text"] == ""


class TestComparing:
    def test_english_words_in_a_picture(self, serving, tmp_path):
        path, _ = drawn(tmp_path / "a.png", "fresh bread\nevery day")
        exact, case, more, other = answers(
            serving,
            request(path, "fresh bread every day"),
            request(path, "“Fresh Bread” — every day!"),
            request(path, "fresh bread every single day"),
            request(path, "closed"),
        )
        assert exact["text"].split() == ["fresh", "bread", "every", "day"]
        for found in (exact, case):
            assert {name: found[name] for name in PERFECT} == PERFECT
        assert (more["word_recall"], more["wanted"], more["exact"]) == (0.8, 5, 0)
        assert more["ned"] == pytest.approx(len("single ") / len("fresh bread every single day"))
        assert more["gned"] == pytest.approx(1 / 5)
        assert (other["word_recall"], other["exact"]) == (0, 0)
        assert other["ned"] > 0.6
        assert other["gned"] > 0.6

    @pytest.mark.parametrize(
        ("target", "reading", "found"),
        [
            ("欢迎光临", "欢迎\n光临", {**PERFECT, "wanted": 4}),
            (
                "欢迎光临",
                "欢迎光",
                {"word_recall": 0.75, "multiset_recall": 0.75, "ned": 0.25, "gned": 0.25, "wanted": 4},
            ),
            ("欢迎光临", "光临欢迎", {"word_recall": 1, "multiset_recall": 1, "ned": 1, "gned": 0, "exact": 0}),
            ("天天快乐", "天快乐", {"word_recall": 1, "multiset_recall": 0.75, "ned": 0.25, "gned": 0.25}),
            ("国", "国 king", {"word_recall": 1, "ned": 0.8, "gned": 0.8, "exact": 0, "wanted": 1}),
            ("open open", "open", {"word_recall": 1, "multiset_recall": 0.5, "ned": 5 / 9, "gned": 0.5}),
            ("open", "open 国", {"word_recall": 1, "ned": 2 / 6, "gned": 0.5, "wanted": 1}),
            ("open", "", {**NOTHING, "wanted": 1}),
            ("OPEN", "ＯＰＥＮ", PERFECT),
        ],
    )
    def test_by_the_formulas(self, target, reading, found):
        scores = compared(target, reading)
        assert {name: scores[name] for name in found} == pytest.approx(found)

    def test_what_cannot_be_compared_has_no_score(self, serving, tmp_path):
        path, _ = drawn(tmp_path / "a.png", "OPEN", size=(200, 200))
        with pytest.raises(BadRequestError) as caught:
            serving.check(request(path, "?! …"))
        assert caught.value.reason == "not_applicable"
        serving.check(request(path))
        serving.check(request(path, "7"))
        russian, english = answers(serving, request(path, "открыто"), request(path, "open"))
        assert russian.reason == "not_applicable"
        assert "к о" in str(russian)
        assert english["exact"] == 1


class TestOrder:
    def test_boxes_in_rows(self):
        boxes = [(200, 12, 300, 50), (10, 5, 90, 60), (100, 0, 190, 40), (10, 100, 50, 140), (5, 62, 80, 99)]
        assert reading_order(boxes) == [1, 2, 0, 4, 3]
        assert reading_order([]) == []

    def test_a_tall_heading_does_not_swallow_the_lines_beside_it(self):
        heading, lines = (0, 0, 100, 120), [(111, 2, 200, 22), (110, 40, 200, 60), (112, 80, 200, 100)]
        assert reading_order([lines[2], lines[1], heading, lines[0]]) == [2, 3, 1, 0]

    def test_what_two_boxes_cover_counts_once(self):
        assert covered([(0, 0, 5, 10), (0, 0, 10, 5)], (10, 10)) == 0.75
        assert covered([], (10, 20)) == 0.0
        assert covered([(0, 0, 20, 5)], (20, 10)) == 0.5


class TestThroughTheEngine:
    def test_text_columns_are_compared_and_filtered(self, tmp_path):
        (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        rows = [
            {"images": [drawn(tmp_path / "1.png", "Grand OPENING")[0]], "text": "Grand Opening"},
            {"images": [drawn(tmp_path / "2.png", "Grand OPENING")[0]], "text": "Grand Closing"},
            {"images": [drawn(tmp_path / "3.png")[0]], "text": "Grand Opening"},
            {"images": [str(tmp_path / "half.png")], "text": "Grand Opening"},
            {"images": [str(tmp_path / "gone.png")], "text": "Grand Opening"},
            {"images": [str(tmp_path / "1.png")], "text": "***"},
            {"images": [str(tmp_path / "1.png")], "text": "Привет"},
        ]
        table = tmp_path / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        store = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
        evaluator = ImageEvaluator(OcrServing(concurrency=2), with_prompt=True, options=QUIET)
        evaluator.run(store.step(), input_conversation_key="text", output_key="ocr")
        found = [json.loads(line) for line in store.output_path.read_text().splitlines()]
        statuses = [row["ocr_status"][0] for row in found]
        assert statuses == ["ok", "ok", "ok", "decode_error", "missing_image", "not_applicable", "not_applicable"]
        assert [row["ocr"][0] and row["ocr"][0]["word_recall"] for row in found] == [1, 0.5, 0, None, None, None, None]
        assert found[2]["ocr"][0]["text"] == ""
        assert found[0]["ocr_by"].startswith("rapidocr#")
        ScoreFilter(options=QUIET).run(store.step(), input_score_key="ocr.exact", minimum=1)
        assert [json.loads(line)["images"] for line in store.output_path.read_text().splitlines()] == [
            rows[0]["images"]
        ]

    def test_without_a_text_to_look_for_it_only_reads(self, tmp_path):
        table = tmp_path / "in.jsonl"
        table.write_text(json.dumps({"images": drawn(tmp_path / "1.png", "Grand OPENING")[0]}) + "\n")
        store = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
        ImageEvaluator(OcrServing(), options=QUIET).run(store.step(), output_key="ocr")
        [row] = [json.loads(line) for line in store.output_path.read_text().splitlines()]
        assert sorted(row["ocr"]) == ["area", "line_count", "lines", "text"]
        assert row["ocr"]["text"].split() == ["Grand", "OPENING"]


class TestItself:
    def test_it_travels_as_its_settings(self, serving):
        assert len(pickle.dumps(serving)) < 1000
        copy = pickle.loads(pickle.dumps(serving))
        assert copy.fingerprint() == serving.fingerprint()
        with pytest.raises(FatalServingError, match="setup"):
            copy.score([request("x.png")])
        engine = serving._engine
        serving.setup()
        assert serving._engine is engine  # not loaded twice

    def test_the_fingerprint_is_of_what_makes_the_reading(self, tmp_path):
        plain = OcrServing().fingerprint()
        assert sorted(plain["weights"]) == ["Cls", "Det", "Rec"]
        assert OcrServing(batch_size=4, concurrency=3, threads=2).fingerprint() == plain
        other = tmp_path / "other.onnx"
        other.write_bytes(b"other")
        for options in ({"longest_side": 2048}, {"least_confidence": 0.7}, {"recogniser": other}):
            assert OcrServing(**options).fingerprint() != plain

    @pytest.mark.parametrize(
        "options", [{"longest_side": 8}, {"least_confidence": 2}, {"batch_size": 0}, {"threads": 0}]
    )
    def test_what_makes_no_sense(self, options):
        with pytest.raises(ConfigError):
            OcrServing(**options)

    def test_recognisers_that_cannot_be_used(self, tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            OcrServing(recogniser=tmp_path / "gone.onnx").fingerprint()
        (tmp_path / "torn.onnx").write_bytes(b"no model")
        with pytest.raises(FatalServingError, match="does not load"):
            OcrServing(recogniser=tmp_path / "torn.onnx").setup()
        detector = OcrServing()._files()["Det"]  # a model, but no recogniser
        with pytest.raises(ConfigError, match="which signs it knows"):
            OcrServing(recogniser=detector).setup()

    def test_without_rapidocr(self, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "onnxruntime", None)
            with pytest.raises(MissingExtraError, match="rapidocr"):
                OcrServing().setup()
        monkeypatch.setattr(ocr, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match="rapidocr"):
            OcrServing().fingerprint()
