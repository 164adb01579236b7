"""Pages and examples that must not drift from the code."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from dataflow.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in every version")
def test_the_command_line_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "docs" / "cli_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.page(), "run: python docs/cli_page.py"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_or_module_names_a_folder_of_somebodys_machine() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]:
        assert not re.search(r"/(home|Users|root)/", page.read_text()), page


def test_the_example_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "examples" / "pipeline.toml").read_text()
    text = re.sub(r"(hf_model_name_or_path|Image_gen_task) = .*\n", "", text.replace('type = "local"', 'type = "fake"'))
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "prompts_with_edits.jsonl").write_bytes((ROOT / "examples" / "prompts_with_edits.jsonl").read_bytes())
    (folder / "pipeline.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["run", os.fspath(folder / "pipeline.toml")]) == 0
