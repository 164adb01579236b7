"""The pipeline files in ``examples/``: each is planned, run to its end, and run again without making anything."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import orjson
import pytest

from dataflow.cli import main
from dataflow.serving.fake_api.client import FakeApi
from dataflow.serving.model_files import BUILTIN_FOLDER, INDEX

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 3
needs_model = pytest.mark.skipif(not (BUILTIN_FOLDER / INDEX).is_file(), reason="the built-in model is not there")


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A copy of the folder whose tables have their first rows only."""
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    for table in folder.glob("*.jsonl"):
        table.write_bytes(b"".join(table.read_bytes().splitlines(keepends=True)[:ROWS]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return folder


def made(folder: Path) -> int:
    return len(list((folder / "images").rglob("*.png")))


def run(name: str, capsys) -> list[dict]:
    """Plan and run an example twice; gives its rows."""
    assert main(["plan", f"examples/{name}.toml"]) == 0
    capsys.readouterr()
    assert main(["run", f"examples/{name}.toml", "--quiet"]) == 0
    table = capsys.readouterr().out.split()[0]
    before = made(Path("cache_local", name))
    assert main(["run", f"examples/{name}.toml", "--quiet"]) == 0
    assert made(Path("cache_local", name)) == before
    capsys.readouterr()
    return [orjson.loads(line) for line in Path(table).read_bytes().splitlines()]


def test_every_file_is_tried_here():
    tried = Path(__file__).read_text()
    assert all(file.stem in tried for file in EXAMPLES.glob("*.toml") if "[[step]]" in file.read_text())


@needs_model
def test_text_to_image(examples, capsys):
    rows = run("text_to_image", capsys)
    assert [len(row["images"]) for row in rows] == [1] * ROWS
    assert all(row["clip"][0]["alignment"] > 0 for row in rows)


@needs_model
def test_best_of_4(examples, capsys):
    rows = run("best_of_4", capsys)
    assert made(Path("cache_local/best_of_4")) == 4 * ROWS
    assert all(len(row["images"]) == 1 and row["clip"][0]["alignment"] >= 0.1 for row in rows)
    assert any(row["rejected"] for row in rows)


@needs_model
def test_draw_and_edit(examples, capsys):
    rows = run("pipeline", capsys)
    assert [len(row["images"]) + len(row["edited_images"]) for row in rows] == [2] * ROWS


@needs_model
def test_multi_turn_edits(examples, capsys):
    rows = run("multi_turn_edits", capsys)
    assert [len(row["edited_images_turns"][0]) for row in rows] == [2, 3, 2]
    assert [row["kept_status"] for row in rows] == [["ok"]] * ROWS


@needs_model
def test_a_comparison(examples, capsys):
    for name in ("compare_4_steps", "compare_12_steps"):
        run(name, capsys)
    folders = ["cache_local/compare_4_steps", "cache_local/compare_12_steps"]
    assert main(["compare", *folders, "--metric", "clip.alignment", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ROWS


@needs_model
def test_prompts_from_a_template(examples, capsys):
    rows = run("template_prompts", capsys)
    assert len(rows) == made(Path("cache_local/template_prompts"))
    shapes = Counter(row["attributes"]["shape"] for row in rows)
    assert max(shapes.values()) == 2
    assert all(row["attributes"]["colour"] in row["prompt"] for row in rows)


def test_edit_pairs_through_an_api(examples, capsys, monkeypatch):
    verdict = {"reason": "done", "instruction": 9, "preservation": 8, "quality": 9}
    bad = {"reason": "not done", "instruction": 2, "preservation": 8, "quality": 9}
    first = json.loads((examples / "edits.jsonl").read_text().splitlines()[0])["conversations"][0]["content"]
    script = {"whole number from": f"say:{json.dumps(verdict)}", f"{first}\n-----": f"say:{json.dumps(bad)}"}
    monkeypatch.setenv("DF_API_KEY", "any-word")
    with FakeApi(script) as api:
        file = examples / "edit_pairs_api.toml"
        text = file.read_text().replace('type = "gemini"', f'type = "gemini"\napi_url = "{api.url}"')
        assert "https://openrouter.ai/api/v1" in text
        file.write_text(text.replace("https://openrouter.ai/api/v1", f"{api.url}/v1"))
        rows = run("edit_pairs_api", capsys)
        asked = len(api.ledger()["attempts"])
    assert len(rows) == ROWS - 1
    assert all(row["judge"][0]["value"] == pytest.approx(0.875) for row in rows)
    dropped = Path("cache_local/edit_pairs_api/dataflow_cache_step_step3.dropped.jsonl").read_text()
    assert first in dropped
    assert "score:judge.value" in dropped
    assert asked == 2 * ROWS
