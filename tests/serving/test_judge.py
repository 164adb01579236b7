"""A judge: its verdicts are numbers within their scales, or openly none."""

from __future__ import annotations

import json
import pickle

import pytest
from PIL import Image

pytest.importorskip("openai")

from dataflow.errors import BadOutputError, ConfigError
from dataflow.io import ImageIO
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.judge import JudgeServing, Rubric, alignment_rubric
from dataflow.utils.storage import FileStorage

RUBRIC = Rubric(
    instruction="Does it show {prompt}?",
    scales={"success": (0, 10), "quality": (1, 5)},
    weights={"success": 3.0, "quality": 1.0},
)
GOOD = {"reason": "well", "success": 10, "quality": 3}


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "any-word")
    monkeypatch.setattr("dataflow.runtime.limits.backoff", lambda attempt: 0.0)
    server.script({})
    server.reset()
    return server


def judge(api, rubric=RUBRIC, **options):
    return JudgeServing(APIVLMServing_openai(f"{api.url}/v1", model_name="some-judge", **options), rubric)


class TestRubric:
    def test_the_value_is_the_weighted_mean_of_scores_on_their_scales(self):
        verdict = RUBRIC.read(json.dumps(GOOD))
        assert verdict == {"value": pytest.approx((3 * 1.0 + 0.5) / 4), "success": 10, "quality": 3, "reason": "well"}
        assert RUBRIC.read(f"```json\n{json.dumps(GOOD)}\n```") == verdict

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("I would give it a seven out of ten.", "is no JSON"),
            ("", "is no JSON"),
            ("[10, 3]", "is no JSON object"),
            ('{"success": 10}', "no whole number for 'quality'"),
            ('{"success": 11, "quality": 3}', "has 11 for 'success', which goes from 0 to 10"),
            ('{"success": -1, "quality": 3}', "has -1"),
            ('{"success": "ten", "quality": 3}', "no whole number"),
            ('{"success": "10", "quality": 3}', "no whole number"),
            ('{"success": 9.5, "quality": 3}', "no whole number"),
            ('{"success": true, "quality": 3}', "no whole number"),
            ('{"success": null, "quality": 3}', "no whole number"),
            ('{"success": 10, "quality": NaN}', "is no JSON"),
            ('{"成功": 10, "质量": 3}', "no whole number for 'success'"),
        ],
    )
    def test_what_is_no_verdict_is_no_number(self, text, told):
        with pytest.raises(BadOutputError, match=told) as caught:
            RUBRIC.read(text)
        assert caught.value.reason == "parse_error"

    def test_the_schema_asks_for_the_reason_before_the_scores(self):
        schema = RUBRIC.response_format["json_schema"]["schema"]
        assert list(schema["properties"]) == schema["required"] == ["reason", "success", "quality"]
        assert schema["properties"]["quality"] == {"type": "integer", "minimum": 1, "maximum": 5}

    def test_another_rubric_is_another_judge(self):
        assert RUBRIC.digest != alignment_rubric().digest
        assert (
            Rubric(instruction="x", scales={"a": (0, 1)}).digest != Rubric(instruction="x", scales={"a": (0, 2)}).digest
        )

    @pytest.mark.parametrize("facts", [{"scales": {}}, {"scales": {"a": (1, 1)}}, {"weights": {"b": 1.0}}])
    def test_what_makes_no_sense(self, facts):
        with pytest.raises(ConfigError):
            Rubric(instruction="x", **{"scales": {"a": (0, 1)}, **facts})


class TestThroughTheEngine:
    @pytest.fixture
    def rows(self, tmp_path):
        def write(*prompts):
            table = tmp_path / "in.jsonl"
            lines = []
            for number, prompt in enumerate(prompts):
                Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
                lines.append(json.dumps({"images": [str(tmp_path / f"{number}.png")], "conversations": prompt}))
            table.write_text("\n".join(lines) + "\n")
            self.store = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
            return self.store.step()

        return write

    def evaluate(self, serving, storage, **options):
        options = RunOptions(quiet=True, **options)
        summary = ImageEvaluator(serving, with_prompt=True, options=options).run(storage, output_key="verdict")
        return summary, [json.loads(line) for line in self.store.output_path.read_text().splitlines()]

    def test_verdicts_stand_in_the_table_and_can_be_filtered(self, api, rows):
        poor = {"reason": "poorly", "success": 1, "quality": 2}
        api.script({"fox": f"say:{json.dumps(GOOD)}", "dog": f"say:{json.dumps(poor)}"})
        summary, table = self.evaluate(judge(api), rows("a fox", "a dog"))
        assert (summary.done, [row["verdict"][0]["success"] for row in table]) == (2, [10, 1])
        body = api.requests("chat/completions")[0]["body"]
        assert body["response_format"] == RUBRIC.response_format
        assert body["messages"][0]["content"][0]["text"].startswith("Does it show a ")
        ScoreFilter(options=RunOptions(quiet=True)).run(self.store.step(), input_score_key="verdict.value", minimum=0.5)
        [kept] = [json.loads(line) for line in self.store.output_path.read_text().splitlines()]
        assert kept["conversations"] == "a fox"

    def test_an_answer_in_prose_is_asked_for_again_and_then_openly_missing(self, api, rows):
        good = f"say:{json.dumps(GOOD)}"
        api.script({"fox": ["say:seven of ten", good], "dog": "say:eight", "cat": "refuse"})
        summary, table = self.evaluate(judge(api), rows("a fox", "a dog", "a cat"), max_attempts=2)
        assert [row["verdict_status"] for row in table] == [["ok"], ["parse_error"], ["refused"]]
        assert [row["verdict"][0] and row["verdict"][0]["success"] for row in table] == [10, None, None]
        assert "eight" in table[1]["verdict_error"][0]
        assert len(api.ledger()["attempts"]) == 5
        assert summary.usd == 0  # nobody stated this judge's price …
        assert summary.unpriced == 4  # … and that is what the sum says; the refusal cost nothing

    def test_verdicts_are_kept(self, api, rows):
        api.script({"": f"say:{json.dumps(GOOD)}"})
        storage = rows("a fox", "a dog")
        self.evaluate(judge(api), storage)
        self.evaluate(
            judge(api), rows("a fox", "a cat", "a dog")
        )  # the third picture is new, the second has a new prompt
        assert len(api.ledger()["attempts"]) == 4
        self.evaluate(judge(api), rows("a fox", "a cat", "a dog"))
        assert len(api.ledger()["attempts"]) == 4


def test_it_needs_a_service_of_words_and_keeps_no_key(api, tmp_path):
    with pytest.raises(ConfigError, match="words"):
        judge(api, image_io=ImageIO(tmp_path))
    serving = judge(api)
    serving.setup()
    assert b"any-word" not in pickle.dumps(serving)
    serving.cleanup()
