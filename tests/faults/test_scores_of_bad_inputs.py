"""What cannot be scored is null with its status, in every evaluator, and costs the rows beside it nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("openai")

from dataflow import comparison
from dataflow.errors import InputError
from dataflow.operators import EditEvaluator, ImageEvaluator, ObjectEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.clip import ClipServing
from dataflow.serving.detection import ZeroShotDetectionServing
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.serving.judge import JudgeServing, alignment_rubric
from dataflow.serving.preservation import PreservationServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True, max_attempts=2)
GOOD = "a red circle on the left"

PICTURES = {
    "missing": "missing_image",
    "half": "decode_error",
    "text": "decode_error",
    "empty": "decode_error",
    "folder": "decode_error",
    "cmyk": "ok",
    "alpha": "ok",
    "16 bit": "ok",
    "gif": "ok",
    "1x1": "ok",
    "wide": "ok",
    None: "missing_image",
    "": "missing_image",
}
"""Picture → status in every evaluator."""

PROMPTS = {
    "": "failed",
    "   ": "failed",
    7: "failed",
    None: "failed",
    "word " * 300: "ok",
    "一个红色的圆": "ok",
    "bell \x07 \u202e and \ud83d\ude00": "ok",
    "x" * 100_000: "ok",
}
"""Prompt → status of CLIP's alignment."""

ANSWERS = {
    "prose": ("say:I would give it seven out of ten.", "parse_error"),
    "off the scale": ('say:{"reason": "", "alignment": 11}', "parse_error"),
    "negative": ('say:{"reason": "", "alignment": -1}', "parse_error"),
    "nothing": ("say:", "parse_error"),
    "another language": ('say:{"理由": "好", "对齐": 9}', "parse_error"),
    "a number as text": ('say:{"reason": "", "alignment": "9"}', "parse_error"),
    "a fraction": ('say:{"reason": "", "alignment": 9.5}', "parse_error"),
    "a list": ("say:[9]", "parse_error"),
    "no number": ('say:{"reason": "", "alignment": NaN}', "parse_error"),
    "no score": ('say:{"reason": "fine"}', "parse_error"),
    "declined": ("refuse", "refused"),
}
"""What a judge answers, and the status."""


@pytest.fixture
def picture(tmp_path):
    whole = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def make(name):
        path = tmp_path / f"{str(name).replace(' ', '_')}.png"
        if name in (None, ""):
            return name
        if name == "half":
            path = path.with_suffix(".jpg")
            Image.fromarray(whole).save(path, quality=95)
            path.write_bytes(path.read_bytes()[:1500])
        elif name == "text":
            path.write_text("no picture at all")
        elif name == "empty":
            path.touch()
        elif name == "folder":
            path.mkdir()
        elif name == "cmyk":
            path = path.with_suffix(".jpg")
            Image.fromarray(whole).convert("CMYK").save(path)
        elif name == "alpha":
            Image.fromarray(whole).convert("RGBA").save(path)
        elif name == "16 bit":
            Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(path)
        elif name == "gif":
            path = path.with_suffix(".gif")
            frames = [Image.new("P", (64, 64), number) for number in range(3)]
            frames[0].save(path, save_all=True, append_images=frames[1:])
        elif name in ("1x1", "wide"):
            Image.new("RGB", (1, 1) if name == "1x1" else (2000, 10), "red").save(path)
        elif name != "missing":
            Image.fromarray(whole).save(path)
        return str(path)

    return make


class Table:
    def __init__(self, folder, rows):
        table = folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = FileStorage(str(table), cache_path=str(folder / "cache"))

    def rows(self):
        return [json.loads(line) for line in self.store.output_path.read_text().splitlines()]


EVALUATORS = {
    "probe": lambda: ImageEvaluator(ImageProbeServing(), options=QUIET),
    "clip": lambda: ImageEvaluator(ClipServing(device="cpu"), with_prompt=True, options=QUIET),
    "objects": lambda: ObjectEvaluator(ZeroShotDetectionServing("builtin:tiny-owl", device="cpu"), options=QUIET),
    "edit": lambda: EditEvaluator(PreservationServing(device="cpu"), options=QUIET),
}


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_pictures(evaluator, picture, tmp_path):
    rule = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    good = picture("good")
    names = [*PICTURES, "good"]
    column = "edited_images" if evaluator == "edit" else "images"
    rows = [
        {"images": [good], column: [picture(name)], "conversations": GOOD, "geneval": rule, "name": name}
        for name in names
    ]
    for status, wanted in (("refused", "refused"), ("failed", "generation_failed")):
        names.append(wanted)
        rows.append(
            {
                "images": [good],
                column: [],
                f"{column}_error": {"status": status, "reason": "x", "message": ""},
                "conversations": GOOD,
                "geneval": rule,
                "name": wanted,
            }
        )
    table = Table(tmp_path, rows)
    summary = EVALUATORS[evaluator]().run(table.store.step(), output_key="score")
    expected = {**PICTURES, "good": "ok", "refused": "refused", "generation_failed": "generation_failed"}
    found = {}
    for row in table.rows():
        status, value = row["score_status"], row["score"]
        status, value = (status[0], value[0]) if isinstance(status, list) else (status, value)
        found[row["name"]] = status
        assert (value is None) == (status != "ok"), row["name"]
        assert value != 0
        if status not in ("ok", "refused", "generation_failed") and row["name"]:
            assert row["score_error"], row["name"]
    assert found == expected
    assert summary.rows == len(names) == summary.done + summary.failed + summary.refused


def test_prompts(picture, tmp_path):
    rows = [{"images": [picture("good")], "conversations": prompt} for prompt in [*PROMPTS, GOOD]]
    table = Table(tmp_path, rows)
    EVALUATORS["clip"]().run(table.store.step(), output_key="score")
    found = table.rows()
    assert [row["score_status"][0] for row in found] == [*PROMPTS.values(), "ok"]
    for row, prompt in zip(found, [*PROMPTS, GOOD], strict=True):
        if row["score_status"] == ["ok"]:
            assert -1 <= row["score"][0]["alignment"] <= 1
            assert row["score"][0]["truncated"] == (len(str(prompt)) > 1000)
        else:
            assert row["score"] == [None]
            assert "bad_input" in row["score_error"][0]


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


class TestJudges:
    @pytest.fixture
    def table(self, server, monkeypatch, picture, tmp_path):
        monkeypatch.setenv("DF_API_KEY", "any-word")
        monkeypatch.setattr("dataflow.runtime.limits.backoff", lambda attempt: 0.0)
        script = {f"<{name}>": answer for name, (answer, _) in ANSWERS.items()}
        server.script({**script, "<good>": 'say:{"reason": "", "alignment": 9}'})
        rows = [{"images": [picture("good")], "conversations": f"a fox <{name}>"} for name in [*ANSWERS, "good"]]
        table = Table(tmp_path, rows)
        judge = JudgeServing(APIVLMServing_openai(f"{server.url}/v1", model_name="some-judge"), alignment_rubric())
        ImageEvaluator(judge, with_prompt=True, options=QUIET).run(table.store.step(), output_key="judge")
        return table

    def test_what_is_no_verdict_is_no_number(self, table):
        found = table.rows()
        assert [row["judge_status"][0] for row in found] == [*(status for _, status in ANSWERS.values()), "ok"]
        assert [row["judge"][0] for row in found[:-1]] == [None] * len(ANSWERS)
        assert all(row["judge_error"][0] for row in found[:-1])
        assert found[-1]["judge"][0]["value"] == 0.9

    @pytest.mark.parametrize(
        ("policy", "kept", "reasons"),
        [
            ("quarantine", 1, {"quarantined:judge.value": len(ANSWERS)}),
            ("drop", 1, {"unknown:judge.value": len(ANSWERS)}),
            ("keep", len(ANSWERS) + 1, {}),
        ],
    )
    def test_filters_go_by_policy(self, table, policy, kept, reasons):
        summary = ScoreFilter(on_unknown=policy, options=QUIET).run(
            table.store.step(), input_score_key="judge.value", minimum=0.5
        )
        assert (summary.done, summary.reasons) == (kept, reasons)

    def test_coverage_counts_them_as_expected(self, table):
        both = {"one": table.store.output_path, "other": table.store.output_path}
        with pytest.raises(InputError, match=r"judge\.value"):
            comparison.compare(both, metrics=["judge.value"])
        found = comparison.compare(both, metrics=["judge.value"], force=True)
        assert [(run.expected, run.scored) for run in found.scores] == [(len(ANSWERS) + 1, 1)] * 2
