"""The code blocks of a page, run one after the other in one folder, as a reader would.

What a page says with HTML comments, which no reader sees:

- ``<!-- not run: REASON -->`` before a block: it is checked against the real parsers and signatures instead.
- ``<!-- exit code: N -->`` before commands that end with another code than 0.
- ``<!-- invisible-code-block: LANGUAGE`` … ``-->``: what must be there for the next block.

A block with a ``title`` is the file of that name. Models of the hub and services are replaced by the models in the
package and by the fake service.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from sybil import Document
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

from dataflow import config
from dataflow.cli import build_parser, main

ROOT = Path(__file__).parents[2]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
LANGUAGES = ("bash", "json", "jsonl", "mermaid", "python", "text", "toml")
_FENCES = RawFencedCodeBlockLexer(re.compile(r'(?P<language>\w*)(?: title="(?P<title>[^"]+)")?[^\n]*\n'))
_HIDDEN = DirectiveInHTMLCommentLexer("invisible-code-block", r"\w+")
_DIFFERS = re.compile(r"[0-9a-f]{12,}|(?<![$\d.])\d+\.\d+")
_TABLES = {"storage", "images", "serving", "step", "accept", "run", "report", "export"}
_STAND_INS = (
    (r"black-forest-labs/FLUX\.1(-Kontext)?-dev", "builtin:tiny-flux"),
    (r"openai/clip-vit-large-patch14", "builtin:tiny-clip"),
    (r"google/owlv2-base-patch16-ensemble", "builtin:tiny-owl"),
    (r"https://openrouter\.ai/api/v1|http://127\.0\.0\.1:8000/v1", "{api}/v1"),
    (r"http://127\.0\.0\.1:8099", "{api}"),
    (r"\b8123\b", "{port}"),
    (r"--api gemini(?! --api-url)", "--api gemini --api-url {api}"),
    (r"--api openai_images(?! --api-url)", "--api openai_images --api-url {api}/v1"),
    (r'type = "gemini"', 'type = "gemini"\napi_url = "{api}"'),
    (r'model_name="gpt-image-2"', 'model_name="gpt-image-2", api_url="{api}/v1"'),
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A code block: its language, text, line, the file it is to be, and what the comments before it say."""

    language: str
    text: str
    line: int
    title: str | None = None
    not_run: str | None = None
    exit_code: int = 0


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, hidden ones included, in order."""
    text = page.read_text()
    document = Document(text, os.fspath(page))
    found = []
    for region in sorted([*_FENCES(document), *_HIDDEN(document)], key=lambda each: each.start):
        comments = re.search(r"(?:<!-- (?:not run|exit code): [^>]*-->\s*)*$", text[: region.start])
        said = dict(re.findall(r"<!-- (not run|exit code): *(.*?) *-->", comments[0] if comments else "", re.DOTALL))
        found.append(
            Block(
                language=region.lexemes.get("language") or region.lexemes.get("arguments") or "",
                text=str(region.lexemes["source"]),
                line=text.count("\n", 0, region.start) + 1,
                title=region.lexemes.get("title"),
                not_run=said.get("not run"),
                exit_code=int(said.get("exit code", 0)),
            )
        )
    return found


class Reader:
    """Works through a page in the current folder.

    Args:
        patch: undoes at the end what the page exports and where it goes.
        api: base URL of the fake service.
    """

    def __init__(self, patch: pytest.MonkeyPatch, api: str) -> None:
        self.patch, self.api = patch, api
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.start = Path.cwd()
        self.output = ""

    def work(self, block: Block) -> None:
        """Run the block, or check it."""
        text = block.text
        for name, stand_in in _STAND_INS if block.not_run is None else ():
            text = re.sub(name, stand_in.format(api=self.api, port=self.port), text)
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(text)
        match block.language:
            case "bash":
                self._shell(text, block)
            case "python":
                self._python(text, block)
            case "toml":
                _check_toml(text, block.title)
            case "json" | "jsonl":
                for piece in text.splitlines() if block.language == "jsonl" else [text]:
                    orjson.loads(piece)
            case "text" if block.not_run is None:
                printed = _plain(self.output)
                missing = [line for line in _plain(text) if not any(map(_pattern(line).fullmatch, printed))]
                assert not missing, f"not in the output:\n{chr(10).join(missing)}\n\nthe output is:\n{self.output}"
                self.output = ""  # a later block quotes what was printed after this one

    def _shell(self, text: str, block: Block) -> None:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            words = shlex.split(line, comments=True)
            if block.not_run is not None:
                _check_command(words)
            elif words:
                code = self._command(line, words)
                assert code == block.exit_code, f"{line}\nended with {code}:\n{self.output[-3000:]}"

    def _command(self, line: str, words: list[str]) -> int:
        if words[0] == "cd":
            self.patch.chdir(words[1])
        elif words[0] == "export":
            self.patch.setenv(*words[1].split("=", 1))
        elif words[0] == "dataflow" and not re.search(r"[|<>;&$*]", line):
            # In this process, where the libraries are loaded once.
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                try:
                    code = main(words[1:])
                except SystemExit as stop:
                    code = int(stop.code or 0)
            self._keep(stream.getvalue())
            return code
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
            )
            self._keep(done.stdout + done.stderr)
            return done.returncode
        return 0

    def _python(self, text: str, block: Block) -> None:
        code = compile("\n" * block.line + text, "the page", "exec", dont_inherit=True)
        if block.not_run is not None:
            _check_calls(ast.parse(text))
        elif block.title is None:
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                exec(code, self.names)
            self._keep(stream.getvalue())

    def _keep(self, text: str) -> None:
        self.output += text.replace(f"{self.start}{os.sep}", "")


def _plain(text: str) -> list[str]:
    """Lines without what differs from run to run: spaces, digests, decimals. Money and counts stay."""
    lines = (_DIFFERS.sub("#", " ".join(line.split())) for line in text.splitlines())
    return [line for line in lines if line]


def _pattern(line: str) -> re.Pattern[str]:
    """The line, in which … stands for anything."""
    return re.compile(".*".join(map(re.escape, line.split("…"))))


def _check_toml(text: str, title: str | None) -> None:
    """A pipeline file, or a part of one, must be one that can be built."""
    document = tomllib.loads(text)
    # A file with a name of its own is read by what comes after it on the page.
    assert title is not None or document.keys() <= _TABLES, f"no tables of a pipeline file: {document.keys() - _TABLES}"
    if document and document.keys() <= _TABLES:
        if "storage" in document and title is not None:
            config.build(config.load(title))
            return
        serving = {"page": {"type": "fake"}, **document.get("serving", {})}
        step = [{"operator": "Text2ImageGenerator", "serving": "page"}]
        document = {"storage": {"first_entry_file_name": "t.jsonl"}, "step": step, **document, "serving": serving}
        config.build(config.parse(document, folder=Path.cwd(), source="the page"))


def _check_command(words: list[str]) -> None:
    if words[:1] == ["dataflow"]:
        build_parser().parse_args(words[1:])
    for extras in re.findall(r"open-dataflow\[(.+?)\]", " ".join(words)):
        assert set(extras.split(",")) <= EXTRAS, words


def _check_calls(tree: ast.Module) -> None:
    """Imports of this package exist, and calls of what they bring have arguments that it takes."""
    brought = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "dataflow":
            module = importlib.import_module(str(node.module))
            brought |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in brought:
            named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(brought[node.func.id]).bind_partial(*node.args, **named)
