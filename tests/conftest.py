"""One job in one folder: a table, a cache, an image store and a fake serving that logs what it makes."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from PIL import Image

from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.picture_files import open_file
from dataflow.runtime.engine import RunOptions
from dataflow.runtime.journal import Index, Journal
from dataflow.serving.fake_serving import FakeServing, paint
from dataflow.types import GenerationRequest, Summary
from dataflow.utils.storage import FileStorage

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test file imports huggingface_hub: none may reach for the network


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command that runs in the tests' process sets up logging for all of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    logging.getLogger("dataflow").setLevel(logging.NOTSET)


class Job:
    """A folder to run steps in; ``run`` may be called again and again, as a person would after a stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input = folder / "in.jsonl"
        self.cache = folder / "cache"
        self.log = folder / "made.log"
        self.io = ImageIO(folder / "images", durable=False)

    def rows(self, *rows: dict[str, Any] | str) -> Job:
        """Write the table: dicts are rows, a string under no column is a raw line."""
        lines = [row.encode() if isinstance(row, str) else orjson.dumps(row) for row in rows]
        self.input.write_bytes(b"".join(line + b"\n" for line in lines))
        return self

    def prompts(self, *prompts: str) -> Job:
        return self.rows(*({"prompt": prompt} for prompt in prompts))

    def storage(self) -> FileStorage:
        return FileStorage(str(self.input), cache_path=str(self.cache)).step()

    def serving(self, **options: Any) -> FakeServing:
        return FakeServing(**{"image_io": self.io, "size": (8, 8), "log": self.log, **options})

    def run(self, serving: FakeServing | None = None, *, seed: int = 0, edit: bool = False, **options: Any) -> Summary:
        """Run one step over the prompt column (with ``edit`` over the image column, too)."""
        run_options = RunOptions(quiet=True, **options)
        if edit:
            editor = PromptedImageEditGenerator(serving or self.serving(), seed=seed, options=run_options)
            summary = editor.run(self.storage(), "image", "prompt", "edited")
        else:
            drawer = Text2ImageGenerator(serving or self.serving(), seed=seed, options=run_options)
            summary = drawer.run(self.storage(), "prompt", "images")
        assert summary.balanced
        return summary

    @property
    def output(self) -> Path:
        return self.storage().output_path

    def table(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.output.read_bytes().splitlines()]

    def dropped(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.storage().dropped_path.read_bytes().splitlines()]

    @property
    def journal(self) -> Journal:
        return Journal(self.cache / "journal" / self.storage().step_name)

    def index(self) -> Index:
        """What a next run would know."""
        index = self.journal.load()
        index.verify(self.io.existing())
        return index

    def records(self, status: str) -> list[dict[str, Any]]:
        return [record for record in self.journal.records() if record and record["s"] == status]

    def made(self) -> Counter[str]:
        """How often each request's picture was painted, over all runs."""
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def image_files(self) -> dict[str, bytes]:
        return {name: (self.io.save_path / name).read_bytes() for name, _ in self.io.existing()}

    def picture(self, name: str, folder: str = "sources", colour: str = "red") -> Path:
        """A picture of the user's own."""
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(path)
        return path

    def check_images(self, column: str = "images") -> int:
        """Every image that stands in a row is the one its own prompt and images ask for; how many there are."""
        count = 0
        for row in self.table():
            for path in row[column]:
                self.check_image(path, row["prompt"], [row["image"]] if "image" in row else [])
                count += 1
        return count

    def check_image(self, path: str, prompt: str, sources: list[str] | None = None) -> None:
        facts = self.io.read_metadata(path)
        assert facts["prompt"] == prompt
        assert facts["request_id"] == Path(path).stem
        request = GenerationRequest(request_id="", prompt=prompt, seed=facts["seed"], images=tuple(sources or ()))
        with open_file(path) as file, Image.open(file) as image:
            assert image.tobytes() == paint(request, image.size).tobytes()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again takes no time."""
    monkeypatch.setattr("dataflow.runtime.limits.backoff", lambda attempt: 0.0)


@pytest.fixture
def published_data() -> Path:
    """Files that others published with their benchmarks, which are not part of this repository."""
    folder = Path(os.environ.get("DATAFLOW_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the published files are not in {folder}: DATAFLOW_TEST_DATA may name their folder")
    return folder


def pytest_configure() -> None:
    # A shell that runs the tests in the background has them ignore SIGINT, and every program they start, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
