"""Runs over real folders, lives that are killed, and the check behind every test: each row has its own image, once."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing, paint
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

LIFE = str(Path(__file__).with_name("life.py"))


@dataclass
class Site:
    """One folder with a table, a cache and images; every run over it is an ordinary run.

    Args:
        root: where it lies.
        serving: arguments of the fake serving of every run.
        task: ``draw`` or ``edit``.
        options: of every run.
    """

    root: Path
    serving: dict = field(default_factory=dict)
    task: str = "draw"
    cache: Path = None
    images: Path = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        self.table = self.root / "table.jsonl"
        self.log = self.root / "generated.log"
        self.cache = self.cache or self.root / "cache"
        self.images = self.images or self.root / "images"

    def fill(self, rows):
        """Write the table; a row is a dict or a prompt."""
        rows = [row if isinstance(row, dict) else {"conversations": row} for row in rows]
        self.table.write_text("".join(json.dumps(row) + "\n" for row in rows))  # ASCII: any text survives
        return self

    def job(self, **more):
        serving = {**self.serving, "log": str(self.log)}
        return {
            "table": str(self.table),
            "cache": str(self.cache),
            "images": str(self.images),
            "task": self.task,
            "serving": serving,
            "options": self.options,
            **more,
        }

    def run(self, *, options=None, seed=0, **serving):
        """Run in this process; the keyword arguments change the serving."""
        pipe = FakeServing(ImageIO(self.images), **{**self.serving, "log": self.log, **serving})
        operator = PromptedImageEditGenerator if self.task == "edit" else Text2ImageGenerator
        options = RunOptions(quiet=True, **{**self.options, **(options or {})})
        return operator(pipe, seed=seed, options=options).run(FileStorage(str(self.table), str(self.cache)).step())

    @property
    def output(self):
        return self.cache / "dataflow_cache_step_step1.jsonl"

    @property
    def journal(self):
        return self.cache / "journal/dataflow_cache_step_step1/main.jsonl"

    def rows(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def generated(self):
        """How often each request's picture was made, over all processes."""
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def files(self):
        """Every image file with its content and time: equal dicts mean that nothing was touched."""
        return {
            str(path.relative_to(self.images)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in self.images.glob("??/*")
        }

    def check(self, *, per_row=1, ended=True):
        """Every row of the table has its own images: right pixels, right names, nothing shared, nothing left over."""
        column = "edited_images" if self.task == "edit" else "images"
        source = [json.loads(line) for line in self.table.read_text().splitlines()]
        rows = self.rows()
        assert [row["conversations"] for row in rows] == [row["conversations"] for row in source], "rows or their order"
        paths = []
        for row in rows:
            assert f"{column}_error" not in row, row
            turns = row.get(f"{column}_turns") or [[path] for path in row[column]]
            assert len(row[column]) == len(turns) == per_row
            prompts = _prompts(row["conversations"])
            for sample in turns:
                assert len(sample) == len(prompts)
                for prompt, path in zip(prompts, sample, strict=True):
                    check_image(path, prompt)
                    paths.append(path)
        assert len(set(paths)) == len(paths), "two rows share a file"
        if ended:
            assert {str(self.images / name) for name in self.files()} == set(paths), "a file that belongs to no row"
        return paths


def _prompts(conversations):
    if isinstance(conversations, str):
        return [conversations]
    return [message["content"] for message in conversations if message["role"] == "user"]


def check_image(path, prompt):
    """The file holds exactly the picture that the fake serving paints for this prompt, under its own name."""
    store = ImageIO(Path(path).parent)
    facts = store.read_metadata(path)
    assert facts["prompt"] == prompt
    assert facts["request_id"] == Path(path).stem
    assert Path(path).parent.name == Path(path).stem[:2]
    request = GenerationRequest(
        request_id=facts["request_id"], prompt=prompt, seed=facts["seed"], images=tuple(facts.get("images", ()))
    )
    picture = store.read(path)
    assert np.array_equal(np.asarray(picture), np.asarray(paint(request, picture.size))), f"{path} is of another row"


class Nursery:
    """Gives birth to lives, one at a time; see :mod:`life`."""

    def __init__(self, errors, *modules, env=None):
        self.errors = errors
        self._stderr = errors.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, LIFE, "--nursery", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def start(self, job):
        self._say(json.dumps(job))
        self.pid = int(self._process.stdout.readline())
        return self.pid

    def end(self, kill_after=None):
        """Wait for the life; its exit code, negative for a signal. ``kill_after``: seconds until its SIGKILL."""
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(self.pid, signal.SIGKILL)  # it is not reaped yet: the pid is its own still
        self._say("")
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def live(self, job, kill_after=None):
        """One life; ``kill_after``: seconds until its SIGKILL, if it lives that long."""
        self.start(job)
        return self.end(kill_after)

    def _say(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self):
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()
        self._stderr.close()


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "site")


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path / "errors.txt")
    yield nursery
    nursery.close()


@pytest.fixture
def make_site():
    return Site


@pytest.fixture
def make_nursery(tmp_path):
    """``make_nursery(module, …, env={})`` for lives that need more than the fake serving."""
    made = []

    def make(*modules, env=None):
        made.append(Nursery(tmp_path / f"errors{len(made)}.txt", *modules, env=env))
        return made[-1]

    yield make
    for nursery in made:
        nursery.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The built-in model; until it is in the checkout, an untrained pipeline of the same make."""
    pytest.importorskip("diffusers")
    from dataflow.serving import model_files

    if model_files.BUILTIN in model_files.builtin_models():
        return model_files.BUILTIN
    spec = importlib.util.spec_from_file_location("pipelines", Path(__file__).parents[1] / "serving/conftest.py")
    pipelines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipelines)
    return str(pipelines.flux_folder.__wrapped__(tmp_path_factory))


class Disk:
    """A small file system in memory."""

    def __init__(self, folder):
        self.folder = folder

    def _mount(self, *arguments):
        return subprocess.run(["mount", *arguments, str(self.folder)], capture_output=True, text=True, check=False)

    def mount(self, size):
        self.folder.mkdir()
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("only root may mount a small tmpfs")
        result = self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        if result.returncode:
            pytest.skip(f"a small tmpfs cannot be mounted here: {result.stderr.strip()}")

    def resize(self, size):
        assert self._mount("-o", f"remount,size={size}").returncode == 0

    def read_only(self, yes):
        assert self._mount("-o", "remount,ro" if yes else "remount,rw").returncode == 0

    def free(self):
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def leave(self, size):
        """Fill it up to ``size`` free bytes."""
        (self.folder / "ballast").write_bytes(bytes(self.free() - size))

    def unmount(self):
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    disk.mount(4 << 20)
    yield disk
    disk.unmount()
