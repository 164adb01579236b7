"""Edited pictures against their source: what is asked, what is kept, and what a missing picture means."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import ConfigError, RefusedError
from dataflow.operators import ScoreFilter
from dataflow.operators.core_vision.edit_evaluator import EditEvaluator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.preservation import PreservationServing
from dataflow.serving.scoring import ScoringServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)


class Recorder(ScoringServing):
    """Keeps what it was asked and scores with the length of the prompt."""

    batch_size = 3
    masks = True

    def __init__(self):
        self.asked = []

    def fingerprint(self):
        return {"model": "recorder"}

    def score(self, requests):
        self.asked += requests
        return [RefusedError("no") if each.prompt == "refuse" else float(len(each.prompt)) for each in requests]


class Desk:
    def __init__(self, folder):
        self.folder = folder

    def picture(self, name, seed):
        small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(self.folder / name)
        return str(self.folder / name)

    def evaluate(self, serving, *rows, with_prompt=False, **keys):
        table = self.folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        storage = FileStorage(str(table), cache_path=str(self.folder / "cache")).step()
        evaluator = EditEvaluator(serving, with_prompt=with_prompt, options=QUIET)
        self.summary = evaluator.run(storage, **keys)
        assert self.summary.balanced
        self.output = storage.output_path
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def pair(desk):
    return desk.picture("source.png", 1), desk.picture("edited.png", 2)


class TestRequests:
    def test_each_edited_picture_goes_with_the_source_in_that_order(self, desk, pair):
        source, edited = pair
        other, reference = desk.picture("other.png", 3), desk.picture("reference.png", 4)
        turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "ok"}]
        row = {
            "images": [source, reference],
            "edited_images": [edited, other],
            "conversations": [*turns, {"role": "user", "content": "make it blue"}],
        }
        serving = Recorder()
        [found] = desk.evaluate(serving, row, with_prompt=True)
        assert [each.images for each in serving.asked] == [(source, edited), (source, other)]
        assert {each.prompt for each in serving.asked} == {"make it blue"}
        assert all(each.mask is None and not each.params for each in serving.asked)
        assert (found["edit_score"], found["edit_score_status"]) == ([12.0, 12.0], ["ok", "ok"])
        assert found["edit_score_by"].startswith("recorder#")

    def test_without_a_prompt_no_conversation_is_needed_and_one_path_has_one_score(self, desk, pair):
        serving = Recorder()
        [found] = desk.evaluate(
            serving, {"before": pair[0], "after": pair[1]}, input_source_key="before", input_image_key="after",
            output_key="kept",
        )  # fmt: skip
        assert (found["kept"], found["kept_status"]) == (0.0, "ok")
        assert serving.asked[0].prompt == ""

    def test_captions_and_mask_reach_the_serving_and_the_requests_id(self, desk, pair):
        mask = desk.picture("mask.png", 9)
        row = {"images": pair[0], "edited_images": pair[1], "mask": mask, "was": "a cat", "is": "a dog"}
        keys = {"input_mask_key": "mask", "input_source_caption_key": "was", "input_target_caption_key": "is"}
        serving = Recorder()
        changed = [{**row, "is": "a cow"}, {**row, "is": " "}, {**row, "mask": ""}, {**row, "was": None}]
        desk.evaluate(serving, row, *changed, **keys)
        first, *others = serving.asked
        assert first.params == {"source_caption": "a cat", "target_caption": "a dog"}
        assert first.mask == mask
        assert len(first.image_hashes) == 3
        assert others[1].params == {"source_caption": "a cat"}
        assert others[2].mask is None
        assert others[3].params == {"target_caption": "a dog"}
        assert len({each.request_id for each in serving.asked}) == 5

    def test_a_score_is_computed_once(self, desk, pair):
        row = {"images": pair[0], "edited_images": [pair[1]], "note": 1}
        serving = Recorder()
        desk.evaluate(serving, row)
        desk.evaluate(serving, {**row, "note": 2}, {"images": [pair[0]], "edited_images": pair[1]})
        assert len(serving.asked) == 2  # the second row asks the same again: it is another occurrence
        assert desk.summary.done == 2

    def test_a_mask_for_a_serving_that_takes_none_is_told_before_anything_runs(self):
        serving = Recorder()
        serving.masks = False
        with pytest.raises(ConfigError, match="takes no masks"):
            EditEvaluator(serving).plan(input_mask_key="mask")


class TestWhatIsMissing:
    def test_is_null_with_its_status_and_never_a_number(self, desk, pair):
        source, edited = pair
        gone = str(desk.folder / "gone.png")
        refused = {"status": "refused", "reason": "refused", "message": "no"}
        failed = {"status": "failed", "reason": "timeout", "message": "late"}
        rows = [
            {"images": source, "edited_images": [edited]},
            {"images": "", "edited_images": [edited, edited]},
            {"images": [], "edited_images": edited},
            {"images": gone, "edited_images": [edited, edited]},
            {"images": source, "edited_images": []},
            {"images": source, "edited_images": [], "edited_images_error": refused},
            {"images": source, "edited_images": [], "edited_images_error": failed},
            {"images": source, "edited_images": [gone]},
            {"images": source, "edited_images": None},
            {"images": "", "edited_images": ""},
        ]
        table = desk.evaluate(Recorder(), *rows)
        assert [row["edit_score"] for row in table] == [
            [0.0], [None, None], None, [None, None], [None], [None], [None], [None], None, None,
        ]  # fmt: skip
        missing = "missing_image"
        assert [row["edit_score_status"] for row in table] == [
            ["ok"], [missing] * 2, missing, [missing] * 2, [missing], ["refused"], ["generation_failed"], [missing],
            missing, missing,
        ]  # fmt: skip
        assert "no source" in table[1]["edit_score_error"][1]
        assert "gone.png" in table[3]["edit_score_error"][0]
        assert "edit_score_error" not in table[0]

    def test_one_of_several_edited_pictures_is_missing_alone(self, desk, pair):
        source, edited = pair
        gone = str(desk.folder / "gone.png")
        [row] = desk.evaluate(Recorder(), {"images": source, "edited_images": [edited, gone]})
        assert row["edit_score"][0] is not None
        assert row["edit_score"][1] is None
        assert row["edit_score_status"] == ["ok", "missing_image"]
        assert "gone.png" in row["edit_score_error"][1]
        assert desk.summary.reasons == {"image_missing": 1}
        # Once the picture is there, both have their scores.
        desk.picture("gone.png", 5)
        [row] = desk.evaluate(Recorder(), {"images": source, "edited_images": [edited, gone]})
        assert row["edit_score_status"] == ["ok", "ok"]

    def test_a_missing_mask_is_told(self, desk, pair):
        row = {"images": pair[0], "edited_images": list(pair), "mask": "no-mask.png"}
        [found] = desk.evaluate(Recorder(), row, input_mask_key="mask")
        assert found["edit_score_status"] == ["missing_image"] * 2
        assert "no-mask.png" in found["edit_score_error"][0]

    def test_cells_that_cannot_be_read_fail_their_row_alone(self, desk, pair):
        good = {"images": pair[0], "edited_images": [pair[1]], "conversations": "a", "is": "x"}
        bad = [{"images": 5}, {"edited_images": {}}, {"conversations": []}, {"is": 7}]
        rows = [good, *({**good, **each} for each in bad), {"conversations": "a"}, {**good, "conversations": "refuse"}]
        table = desk.evaluate(Recorder(), *rows, with_prompt=True, input_target_caption_key="is")
        statuses = [row["edit_score_status"] for row in table]
        assert statuses == [["ok"], ["failed"], "failed", ["failed"], ["failed"], "failed", ["refused"]]
        assert "column 'is': expected a caption" in table[4]["edit_score_error"][0]
        assert all(row["edit_score"] in (None, [None]) for row in table[1:])


def test_preservation_through_the_engine(desk, pair):
    """The real serving, a broken picture beside good ones, and a filter on what a mask left alone."""
    pytest.importorskip("scipy")
    source, edited = pair
    pixels = np.asarray(Image.open(source)).copy()
    pixels[:10, :10] = 0
    Image.fromarray(pixels).save(desk.folder / "local.png")
    mask = np.zeros((30, 40), np.uint8)
    mask[:10, :10] = 255
    Image.fromarray(mask).save(desk.folder / "mask.png")
    (desk.folder / "half.png").write_bytes((desk.folder / "edited.png").read_bytes()[:60])
    local, half, mask_path = (str(desk.folder / name) for name in ("local.png", "half.png", "mask.png"))
    row = {"images": [source], "edited_images": [local, edited, half], "mask": mask_path}
    [found] = desk.evaluate(PreservationServing(), row, input_mask_key="mask")
    assert found["edit_score_status"] == ["ok", "ok", "decode_error"]
    kept, changed, broken = found["edit_score"]
    assert broken is None
    assert (kept["unedited"]["l1"], kept["unedited"]["psnr"]) == (0.0, 100.0)
    assert kept["unedited"]["share"] == pytest.approx(1 - 100 / 1200)
    assert kept["psnr"] < 30
    assert changed["unedited"]["psnr"] < 20
    storage = FileStorage(str(desk.output), cache_path=str(desk.folder / "kept")).step()
    ScoreFilter(on_unknown="drop", options=QUIET).run(
        storage, input_image_key="edited_images", input_score_key="edit_score.unedited.psnr", minimum=40
    )
    [row] = [json.loads(line) for line in storage.output_path.read_text().splitlines()]
    assert row["edited_images"] == [local]


def test_clip_reads_the_captions(desk, pair):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from dataflow.serving.clip import ClipEditServing

    row = {"images": pair[0], "edited_images": pair[1], "was": "a red circle", "is": "a blue circle"}
    keys = {"input_source_caption_key": "was", "input_target_caption_key": "is"}
    with_captions, without = desk.evaluate(ClipEditServing(device="cpu"), row, {**row, "was": "", "is": ""}, **keys)
    assert -1 <= with_captions["edit_score"]["direction"] <= 1
    assert without["edit_score"]["direction"] is without["edit_score"]["alignment"] is None
    assert with_captions["edit_score"]["image_similarity"] == without["edit_score"]["image_similarity"]
