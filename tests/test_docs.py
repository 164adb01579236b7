"""Pages that must not drift from the code: the command line, links, messages; and the site they make."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NO_MESSAGE = {"null"}
"""What a person sees, but no message says."""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in every version")
def test_the_command_line_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "docs" / "cli_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.page(), "run: python docs/cli_page.py"


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_leads_to_every_guide() -> None:
    linked = set(re.findall(r"\(docs/([^)]+)\)", (ROOT / "README.md").read_text()))
    own = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    # The site shows these; the README has the files themselves, or no need of them.
    assert own - linked == {"index.md", "changelog.md", "benchmarks.md", "python.md", "determinism.md"}


def test_no_page_or_module_names_a_folder_of_somebodys_machine() -> None:
    for page in [ROOT / "README.md", *PAGES, *(ROOT / "src").rglob("*.py")]:
        assert not re.search(r"/(home|Users|root)/", page.read_text()), page


def test_every_test_that_a_page_names_exists() -> None:
    for page in ("failures.md", "security.md"):
        file, text = Path(), (ROOT / "docs" / page).read_text()
        for given, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::)?(test_\w+)?(?:\[[^]]*\])?`", text):
            if not (given or name):
                continue
            file = ROOT / given if given else file
            assert file.is_file(), f"{page}: {given}"
            assert not name or re.search(rf"def {name}\(", file.read_text()), f"{page}: {file.name}::{name}"


def test_every_page_says_at_its_top_what_it_is_for() -> None:
    made_or_included = {"cli.md", "changelog.md", "benchmarks.md", "architecture.md", "index.md"}
    for page in PAGES:
        if page.name not in made_or_included:
            _, first = re.split(r"^# .+$", page.read_text(), maxsplit=1, flags=re.MULTILINE)
            assert first.lstrip().startswith(("After this page ", "读完本页")), page


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts of the package, with … for what is put into them."""
    found = []
    for file in (ROOT / "src" / "dataflow").rglob("*.py"):
        found += [text for node in ast.walk(ast.parse(file.read_text())) if (text := _text(node))]
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    return ""


def test_messages_that_are_explained_are_those_of_the_code(texts: list[str]) -> None:
    quoted = list(_first_cells("message", "you see"))
    assert len(quoted) > 20
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_reasons_that_are_explained_are_those_of_the_code(texts: list[str]) -> None:
    known = set(texts)
    # An input image's reasons are made of those that decoding gives.
    known |= {f"image_{text}" for text in texts if text.isidentifier()}
    reasons = list(_first_cells("reason"))
    assert len(reasons) > 15
    assert set(reasons) <= known


def _first_cells(*headings: str) -> Iterator[str]:
    """Code in the first cells of the tables with these headings."""
    inside = False
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        cell = line.split("|")[1].strip() if line.startswith("|") else ""
        inside = bool(cell) and (inside or cell in headings)
        if inside:
            yield from (text for text in re.findall(r"`([^`]+)`", cell) if text not in NO_MESSAGE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Links and anchors that lead nowhere are errors (``strict`` and ``validation`` in mkdocs.yml)."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", os.fspath(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"""<(?:script|img|iframe|source)[^>]*?\bsrc=["']?([^"' >]+)""", page.read_text())
        loaded += re.findall(r"""<link[^>]*?rel=["']?(?:style|pre|icon)[^>]*?href=["']?([^"' >]+)""", page.read_text())
        assert loaded
        assert not [each for each in loaded if "//" in each], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style


def test_pages_have_their_headings_and_chinese_can_be_found(site: Path) -> None:
    found = {
        entry["location"]: entry["text"]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    assert "quickstart.html" in found
    # Words of Chinese text stand apart, so that they are found.
    assert "\u200b提示" in "".join(found.values())
    assert ":class:" not in (site / "python.html").read_text()
    assert 'lang="zh-CN"' in (site / "zh" / "quickstart.html").read_text()
