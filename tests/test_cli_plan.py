"""`dataflow plan`: what a run would do, before, between and after runs."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from dataflow import config
from dataflow.cli import main

TWO_STEPS = """\
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[serving.draw]
type = "fake"
size = [8, 8]
{draw}

[serving.probe]
type = "image_probe"

[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"

[[step]]
operator = "ImageEvaluator"
serving = "probe"
output_key = "probe"
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def planned(capsys):
    """Write the pipeline file over a table and give what is planned, as JSON, and the exit code."""

    def planned(*prompts: str, draw: str = "", text: str = TWO_STEPS) -> tuple[list[dict], int]:
        Path("in.jsonl").write_bytes(b"".join(orjson.dumps({"prompt": prompt}) + b"\n" for prompt in prompts))
        Path("pipeline.toml").write_text(text.replace("{draw}", draw))
        capsys.readouterr()
        code = main(["plan", "pipeline.toml", "--json"])
        return json.loads(capsys.readouterr().out), code

    return planned


def run(*arguments: str) -> int:
    return main(["run", "pipeline.toml", "--quiet", *arguments])


def test_before_anything_was_run(planned):
    (draw, probe), code = planned("a", "b", draw="images_per_prompt = 3")
    assert code == 0
    assert (draw["rows"], draw["known"], draw["requests"], draw["done"], draw["pending"]) == (2, True, 6, 0, 6)
    assert (draw["operator"], draw["serving"], draw["model"]) == ("Text2ImageGenerator", "draw", "fake#1")
    assert draw["columns"] == ["prompt", "images"]
    assert (probe["rows"], probe["known"], probe["requests"]) == (2, False, None)
    assert probe["writes"] == ["probe", "probe_status", "probe_by"]
    assert not Path("out").exists()


def test_after_a_pilot_and_after_all(planned):
    planned("a", "b", "c", "d")
    run("--pilot", "2")
    (draw, probe), _ = planned("a", "b", "c", "d")
    assert (draw["requests"], draw["done"], draw["pending"]) == (4, 2, 2)
    assert (draw["forecast"]["rows"], draw["forecast"]["settled"]) == (2, 2)
    assert not probe["known"]
    run("--last", "1")
    (draw, probe), _ = planned("a", "b", "c", "d")
    assert (draw["pending"], draw["forecast"]) == (0, None)
    assert (probe["known"], probe["requests"], probe["pending"]) == (True, 4, 4)
    run()
    (_, probe), _ = planned("a", "b", "c", "d")
    assert probe["pending"] == 0


def test_rows_and_requests_that_cannot_work(planned, monkeypatch):
    Path("own_serving_of_plan.py").write_text(
        "from dataflow.errors import BadRequestError\n"
        "from dataflow.serving.fake_serving import FakeServing\n"
        "class Picky(FakeServing):\n"
        "    def check(self, request):\n"
        "        if 'cat' in request.prompt:\n"
        "            raise BadRequestError('it draws no cats')\n"
        "    def estimate(self, request):\n"
        "        return None if 'dog' in request.prompt else 0.04\n"
    )
    monkeypatch.syspath_prepend(".")
    text = TWO_STEPS.replace('"fake"', '"own_serving_of_plan:Picky"')
    (draw, _), code = planned("a cat", "", "a fox", "two foxes", text=text)
    assert code == 1
    assert draw["impossible"] == {"it draws no cats": 1}
    assert draw["failed"] == {"bad_input": 1}
    assert (draw["requests"], draw["usd"]) == (3, pytest.approx(0.08))
    (draw, _), _ = planned("a dog", "a fox", text=text)
    assert draw["usd"] is None


def test_the_list_price_of_an_api(planned, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "sk-nothing-is-sent")
    text = TWO_STEPS.replace('type = "fake"\nsize = [8, 8]', 'type = "gemini"\nmodel_name = "gemini-2.5-flash-image"')
    (draw, _), code = planned("a fox", "two foxes", text=text)
    assert code == 0
    assert draw["usd"] == pytest.approx(2 * 0.039, rel=0.05)


def test_an_acceptance_loop_shows_its_first_round(planned):
    text = TWO_STEPS + '\n[[step]]\noperator = "ScoreFilter"\ninput_score_key = "probe.sharpness"\nminimum = 0.0\n'
    (draw, _, kept), _ = planned("a", "b", text=text + "\n[accept]\nwanted = 4\n")
    assert (draw["requests"], draw["reads"]) == (8, ["prompt", "samples"])
    assert (kept["serving"], kept["model"], kept["requests"]) == (None, None, None)


def test_a_model_that_is_not_here(planned, capsys):
    text = TWO_STEPS.replace('type = "fake"\nsize = [8, 8]', 'type = "local"\nhf_model_name_or_path = "org/none"')
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    Path("pipeline.toml").write_text(text.replace("{draw}", ""))
    assert main(["plan", "pipeline.toml"]) == 2
    assert "org/none" in capsys.readouterr().err


def test_what_a_person_reads(planned, capsys):
    planned("a", "b")
    run("--pilot", "1")
    capsys.readouterr()
    assert main(["plan", "pipeline.toml"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("pipeline.toml: 2 steps over in.jsonl into out\n")
    assert "1 Text2ImageGenerator (draw)     2         2     1        1  free  prompt → images\n" in text
    assert "2 ImageEvaluator (probe)       ≤ 2         –     –        –     –  images → probe, probe_s" in text
    assert "  draw: fake#1\n  probe: image-probe\n" in text
    assert "step 1: forecast for the 1 pending rows, from 1 settled ones:" in text
    assert text.endswith("budget: none\nnothing was run; this runs it: dataflow run pipeline.toml\n")


def test_a_picture_of_it(planned, capsys):
    planned("a")
    assert main(["plan", "pipeline.toml", "--mermaid"]) == 0
    said = capsys.readouterr().out
    assert said == config.build(config.load("pipeline.toml")).pipeline.mermaid("in.jsonl")
    assert '    step1 -->|"images"| step2\n' in said


def test_from_a_step_to_a_step_on_the_command_line(planned, capsys):
    planned("a", "b")
    assert run("--first", "2") == 2
    assert (
        "step 2 would read this table of step 1, and it is not there: run the steps before" in capsys.readouterr().err
    )
    assert run("--last", "1") == 0
    assert run("--first", "2") == 0
    assert Path("out/dataflow_cache_step_step2.jsonl").is_file()
    assert run("--first", "3") == 2
    assert "there are the steps 1 to 2: cannot run 3 to 2" in capsys.readouterr().err


def test_a_loop_has_no_parts(planned, capsys):
    planned("a", text=TWO_STEPS + "\n[accept]\nwanted = 1\n")
    assert run("--first", "2") == 2
    assert "an acceptance loop runs all of its steps in every round" in capsys.readouterr().err
