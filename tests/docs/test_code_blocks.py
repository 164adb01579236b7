"""Every code block of the README and the pages is run, or says why it is only checked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import LANGUAGES, ROOT, Block, Reader, blocks

from dataflow.serving.fake_api import FakeApi

OTHERS = {"cli.md": "made from the help texts", "architecture.md": "has no code, only trees of files"}
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in OTHERS)]
VERDICT = {"reason": "as asked", "alignment": 9, "instruction": 9, "preservation": 9, "quality": 9}


ENTRIES = [
    {name: f"{name} {kind}" for name in ("prompt", "translation", "instruction", "source_caption", "target_caption")}
    | {"type": kind}
    for kind in ("change_colour", "replace_background")
]
SAYS = {
    "whole number from": json.dumps(VERDICT),
    '"second" or "tie"': json.dumps({"reason": "sharper", "better": "first"}),
    "yes or no": "yes",
    'under "entries"': json.dumps({"entries": ENTRIES}),
}


@pytest.fixture(scope="module")
def api():
    """Draws; as a judge, it is content."""
    with FakeApi({words: f"say:{answer}" for words, answer in SAYS.items()}) as service:
        yield service


@pytest.fixture
def reader(tmp_path, monkeypatch, api):
    """In an empty folder beside a copy of the examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DF_API_KEY", "any-word")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Reader(monkeypatch, api.url)


# webdataset leaves its last shard open.
@pytest.mark.filterwarnings(r"ignore:Exception ignored in.*\.tar:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_works(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        try:
            reader.work(block)
        except BaseException as error:
            error.add_note(f"in the block at {page.relative_to(ROOT)}:{block.line}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_has_a_language_and_every_exemption_a_reason(page: Path) -> None:
    found = blocks(page)
    assert page.read_text().count("\n```") == 2 * sum("```" in line for line in _opened(page, found))
    for block in found:
        assert block.language in LANGUAGES, f"{page.name}:{block.line}"
        assert block.not_run is None or len(block.not_run.split()) >= 3, f"{page.name}:{block.line}: why is it not run?"


def _opened(page: Path, found: list[Block]) -> list[str]:
    lines = page.read_text().splitlines()
    return [lines[block.line - 1] for block in found]


PAGE = """
Text.

```jsonl title="two.jsonl"
{"prompt": "a red circle"}
```

```bash
export DOCS_WORD=blue
echo "$DOCS_WORD 17 pictures in 3.5 s"
dataflow generate two.jsonl -o out --fake
```

```text
blue 17 pictures in 0.2 s
```

<!-- invisible-code-block: python
hidden = 1
-->

```python
assert hidden == 1
```
"""


def run(text: str, reader: Reader) -> None:
    Path("page.md").write_text(text)
    for block in blocks(Path("page.md")):
        reader.work(block)


def test_a_page_is_worked_through_in_order(reader):
    run(PAGE, reader)
    assert Path("out/dataflow_cache_step_step1.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```bash\ndataflow generate missing.jsonl -o x --fake\n```\n", AssertionError),
        ("```bash\nfalse | true; false\n```\n", AssertionError),
        ("<!-- not run: needs a GPU -->\n```bash\ndataflow generate x --no-such-option\n```\n", SystemExit),
        ("<!-- not run: needs a GPU -->\n```bash\npip install 'open-dataflow[nothing]'\n```\n", AssertionError),
        ("<!-- not run: needs a GPU -->\n```python\nfrom dataflow.io import Nothing\n```\n", AttributeError),
        (
            "<!-- not run: needs a GPU -->\n```python\nfrom dataflow.io import ImageIO\nImageIO(path='x')\n```\n",
            TypeError,
        ),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```bash\necho one\n```\n```text\ntwo\n```\n", AssertionError),
        ("```bash\necho 3 rows = 3 done\n```\n```text\n3 rows = 2 done\n```\n", AssertionError),
        ("```bash\necho one\n```\n```text\none\n```\n```text\none\n```\n", AssertionError),
        ("```toml\n[acept]\nwanted = 1\n```\n", AssertionError),
        ("```jsonl\n{]\n```\n", ValueError),
        ('```toml\n[[step]]\noperator = "ScoreFilter"\nminimun = 1\n```\n', Exception),
    ],
)
def test_what_is_wrong_on_a_page_is_found(text, error, reader, capsys):
    with pytest.raises(error):
        run(text, reader)
