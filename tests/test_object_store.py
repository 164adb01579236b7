"""Images in an object store: an S3-speaking server on this machine, and fsspec's own store in memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from PIL import Image

from dataflow import remote_files, remote_store
from dataflow.cli import main
from dataflow.errors import ConfigError, ImageError, MissingExtraError, RunStoppedError, StoreError
from dataflow.export import ExportOptions, export
from dataflow.io import ImageIO
from dataflow.operators import ImageEvaluator, PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.picture_files import read_bytes, status
from dataflow.report import write_report
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.utils.storage import FileStorage

NAME = "ab" + "0" * 30


@pytest.fixture(scope="module")
def server():
    """The address of a server that speaks S3."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def access(monkeypatch, address):
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _nothing_allowed(monkeypatch):
    monkeypatch.setenv(remote_files.ALLOWED, "")


@pytest.fixture
def bucket(server, monkeypatch, request):
    """The URL of an empty bucket."""
    access(monkeypatch, server)
    name = f"bucket-{random.getrandbits(60):x}"
    made = urllib.request.Request(f"{server}/{name}", method="PUT", headers=SIGNED)
    urllib.request.urlopen(made, timeout=10).close()
    return f"s3://{name}"


SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=someone/20260101/us-east-1/s3/aws4_request, Signature=none"}


def delete(server, url):
    place = f"{server}/{url.removeprefix('s3://')}"
    urllib.request.urlopen(urllib.request.Request(place, method="DELETE", headers=SIGNED), timeout=10).close()


@pytest.fixture
def memory():
    """A store in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield "memory://here/images"
    system.store.clear()


def drawn(job, **options):
    job.prompts(*(f"a fox number {number}" for number in range(12)))
    return job.run(**options)


class TestS3:
    def test_a_run_there_and_again(self, job, bucket, server):
        job.io = ImageIO(f"{bucket}/run/images")
        summary = drawn(job)
        assert (summary.done, summary.made) == (12, 12)
        paths = [path for row in job.table() for path in row["images"]]
        assert all(path.startswith(f"{bucket}/run/images/") for path in paths)
        assert job.check_images() == len(set(paths)) == 12
        again = job.run()
        assert (again.made, again.adopted) == (0, 0)
        delete(server, paths[4])
        delete(server, paths[9])
        assert status(paths[4]) is None
        assert job.run().made == 2
        assert job.check_images() == 12
        assert not list(job.folder.glob("images"))

    def test_an_image_without_a_record_is_taken_over(self, job, bucket):
        job.io = ImageIO(f"{bucket}/images")
        drawn(job)
        records = job.journal.path.read_bytes().splitlines(keepends=True)
        last = max(number for number, line in enumerate(records) if b'"done"' in line)
        job.journal.path.write_bytes(b"".join(records[:last] + records[last + 1 :]))
        job.output.unlink()
        summary = job.run()
        assert (summary.made, summary.adopted, summary.done) == (0, 1, 12)
        assert job.check_images() == 12

    def test_many_are_listed(self, job, bucket):
        job.io = ImageIO(f"{bucket}/images")
        job.prompts(*(f"p{number}" for number in range(300)))
        job.run(job.serving(batch_size=20, concurrency=4))
        assert len(dict(job.io.existing())) == 300
        assert job.run().made == 0

    def test_no_bucket_is_known_before_anything_is_made(self, job, bucket):
        job.io = ImageIO(f"{bucket}-not/images")
        with pytest.raises((RunStoppedError, StoreError), match="bucket"):
            drawn(job)
        assert not job.made()

    def test_everything_reads_them(self, job, bucket, tmp_path):
        job.io = ImageIO(f"{bucket}/images")
        drawn(job)
        options = RunOptions(quiet=True)
        storage = FileStorage(str(job.input), str(job.cache))
        storage.step()
        editor = PromptedImageEditGenerator(job.serving(), options=options)
        assert editor.run(storage.step(), "images", "prompt", "edited").done == 12
        assert editor.run(storage, "images", "prompt", "edited").made == 0
        evaluator = ImageEvaluator(ImageProbeServing(), options=options)
        assert evaluator.run(storage.step(), "edited", output_key="probe").done == 12
        table = storage.output_path
        assert all(json.loads(line)["probe_status"] == ["ok"] for line in table.read_text().splitlines())
        for kind in ("webdataset", "parquet", "folder"):
            summary = export(table, tmp_path / kind, ExportOptions(format=kind))
            assert not summary.problems
        report = write_report([job.cache], tmp_path / "report")
        assert (report.pictures, report.unreadable) == (24, 0)

    @pytest.mark.slow
    def test_killed_while_it_writes(self, bucket, make_killed):
        run, made = make_killed(f"{bucket}/images")
        summary = run()
        assert (summary.rows, summary.done) == (150, 150)
        assert len(made()) == 150
        assert made().total() <= 150 + 6 * 4
        assert run().made == 0

    def test_the_command_line(self, tmp_path, bucket, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        tmp_path.joinpath("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
        tmp_path.joinpath("job.toml").write_text(
            f'[storage]\nfirst_entry_file_name = "prompts.jsonl"\ncache_path = "cache"\n'
            f'[images]\nsave_path = "{bucket}/cli"\n[serving.draw]\ntype = "fake"\nsize = [16, 16]\n'
            '[[step]]\noperator = "Text2ImageGenerator"\nserving = "draw"\ninput_conversation_key = "prompt"\n'
        )
        assert main(["run", "job.toml"]) == 0
        assert f"images: {bucket}/cli" in capfd.readouterr().err
        monkeypatch.setenv(remote_files.ALLOWED, "")  # another process
        assert main(["status", "cache"]) == 0
        assert "2 rows = 2 done" in capfd.readouterr().out
        assert main(["report", "cache"]) == 0
        assert "without a file" not in capfd.readouterr().out
        monkeypatch.setenv(remote_files.ALLOWED, "")
        assert main(["export", "cache", "-o", "out"]) == 0
        assert main(["pack", "cache"]) == 2
        assert "objects in a store stay as they are" in capfd.readouterr().err


@pytest.fixture
def make_killed(tmp_path):
    """Runs over a store whose first lives are killed at random moments."""

    def make(url):
        rng = random.Random(3)
        table, log = tmp_path / "table.jsonl", tmp_path / "made.log"
        table.write_text("".join(f'{{"prompt": "thing {number}"}}\n' for number in range(150)))
        code = (
            "import sys; from pathlib import Path\n"
            "from dataflow.io import ImageIO; from dataflow.operators import Text2ImageGenerator\n"
            "from dataflow.runtime.engine import RunOptions; from dataflow.serving.fake_serving import FakeServing\n"
            "from dataflow.utils.storage import FileStorage\n"
            "table, cache, url, log = sys.argv[1:]\n"
            "serving = FakeServing(ImageIO(url), size=(8, 8), log=Path(log), seconds=0.05, concurrency=2)\n"
            "print('begun', flush=True)\n"
            "Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(FileStorage(table, cache).step(), "
            "'prompt', 'images')\n"
        )
        words = [sys.executable, "-c", code, str(table), str(tmp_path / "cache"), url, str(log)]
        for _ in range(6):
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            process.stdout.readline()
            time.sleep(rng.uniform(0.1, 0.6))
            process.send_signal(signal.SIGKILL)
            process.stdout.close()
            assert process.wait() == -signal.SIGKILL

        def run():
            serving = FakeServing(ImageIO(url), size=(8, 8), log=log, concurrency=2)
            storage = FileStorage(str(table), str(tmp_path / "cache")).step()
            return Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage, "prompt", "images")

        return run, lambda: Counter(log.read_text().split())

    return make


class TestInMemory:
    def test_a_run(self, job, memory):
        job.io = ImageIO(memory)
        assert drawn(job).made == 12
        assert job.run().made == 0
        assert job.check_images() == 12

    def test_from_many_threads(self, memory):
        store = ImageIO(memory)
        names = [f"{number:02x}" + f"{number:030x}" for number in range(200)]
        with ThreadPoolExecutor(8) as threads:
            saved = list(threads.map(lambda name: store.save(Image.new("RGB", (4, 4)), name, {}), names))
        assert dict(store.existing()) == {each.name: each.bytes for each in saved}
        assert all(store.find(name).name == each.name for name, each in zip(names, saved, strict=True))

    def test_a_store_that_fails_for_the_moment(self, job, memory, monkeypatch):
        system = fsspec.filesystem("memory")
        job.io = ImageIO(memory)
        real, failures = type(system).pipe_file, Counter()

        def flaky(self, path, value, **kwargs):
            failures[path] += 1
            if failures[path] <= 2:
                raise ConnectionResetError("the line went dead")
            return real(self, path, value, **kwargs)

        monkeypatch.setattr(type(system), "pipe_file", flaky)
        monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
        summary = drawn(job)
        assert (summary.done, summary.made) == (12, 12)
        assert set(failures.values()) == {3}
        assert job.made().total() == 12

    def test_a_store_that_fails_for_good_stops_the_run(self, job, memory, monkeypatch):
        system = fsspec.filesystem("memory")
        job.io = ImageIO(memory)
        real, puts = type(system).pipe_file, Counter()

        def broken(self, path, value, **kwargs):
            puts[path] += 1
            if len(puts) > 5:
                raise PermissionError("you may not")
            return real(self, path, value, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(system), "pipe_file", broken)
            with pytest.raises(RunStoppedError, match=r"the store refuses .*you may not.*check credentials and rights"):
                drawn(job)
        # What was made and could not be kept is in no record, and what is in a record is there.
        kept = dict(job.io.existing())
        assert len(kept) == 5
        assert {image["name"] for record in job.records("done") for image in record["img"]} <= set(kept)
        assert job.run().done == 12
        assert job.check_images() == 12

    @pytest.mark.parametrize("patience", [0.0, 20.0])
    def test_a_reader_that_waits_is_no_bad_picture(self, job, memory, monkeypatch, patience):
        job.io = ImageIO(memory)
        drawn(job)
        storage = FileStorage(str(job.input), str(job.cache))
        storage.step()
        storage.step()
        evaluator = ImageEvaluator(ImageProbeServing(), options=RunOptions(quiet=True))
        system = fsspec.filesystem("memory")
        real, asked = type(system).cat_file, Counter()

        def flaky(self, path, *args, **kwargs):
            asked[path] += 1
            if asked[path] == 1:
                raise TimeoutError("too slow")
            return real(self, path, *args, **kwargs)

        monkeypatch.setattr(type(system), "cat_file", flaky)
        monkeypatch.setattr(remote_files, "READ_PATIENCE", patience)
        monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
        if not patience:
            with pytest.raises(RunStoppedError, match=r"does not answer .*too slow.*the same command goes on"):
                evaluator.run(storage, "images", output_key="probe")
            monkeypatch.setattr(type(system), "cat_file", real)
        summary = evaluator.run(storage, "images", output_key="probe")
        assert (summary.done, summary.failed) == (12, 0)


class TestWhatMayBeOpened:
    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:1/a.png",
            "https://example.org/a.png",
            "ftp://example.org/a.png",
            "simplecache::s3://bucket/a.png",
            "github://someone:repo@/a.png",
        ],
    )
    def test_web_addresses_never(self, url, monkeypatch):
        with pytest.raises(ConfigError):
            remote_files.allow(url)
        monkeypatch.setenv(remote_files.ALLOWED, f"{url} http:// https:// ftp://")
        with pytest.raises(ImageError):
            read_bytes(url)

    def test_stores_that_were_not_named(self, memory):
        fsspec.filesystem("memory").pipe_file("/elsewhere/a.png", b"secret")
        with pytest.raises(
            ImageError, match=r"was not named as one to read from: add it to read_from .*DATAFLOW_STORES"
        ):
            read_bytes("memory://elsewhere/a.png")
        ImageIO(memory)
        for url in ("memory://elsewhere/a.png", f"{memory}/../../elsewhere/a.png", f"{memory}s/a.png"):
            with pytest.raises(ImageError, match="was not named"):
                read_bytes(url)
        ImageIO(memory, read_from=["memory://elsewhere"])
        assert read_bytes("memory://elsewhere/a.png") == b"secret"

    def test_files_by_their_url(self, tmp_path, job):
        tmp_path.joinpath("secret.png").write_bytes(b"secret")
        with pytest.raises(ImageError, match="was not named"):
            read_bytes(f"file://{tmp_path}/secret.png")
        job.io = ImageIO(f"file://{tmp_path}/pictures")
        drawn(job)
        assert all(path.startswith(f"file://{tmp_path}/pictures/") for row in job.table() for path in row["images"])
        assert job.check_images() == 12
        assert len(list(tmp_path.glob("pictures/??/*.png"))) == 12
        with pytest.raises(ImageError, match="was not named"):
            read_bytes(f"file://{tmp_path}/pictures/../secret.png")

    def test_a_row_that_names_another_store_fails_alone(self, job, memory):
        ImageIO(memory)
        good = job.picture("mine.png")
        job.rows({"prompt": "p", "image": str(good)}, {"prompt": "p", "image": "s3://of-others/x.png"})
        summary = job.run(edit=True)
        assert (summary.done, summary.failed) == (1, 1)
        assert "was not named" in json.dumps(job.table()[1])

    @pytest.mark.parametrize(
        "url", ["s3://", "s3:///x", "gopher://a/b", "s3://a b/c", "https://bucket.s3.amazonaws.com"]
    )
    def test_places_that_cannot_be_written_to(self, url):
        with pytest.raises(ConfigError):
            ImageIO(url).save(b"", NAME, {})

    def test_it_goes_along_to_other_processes(self, memory):
        data = pickle.dumps(ImageIO(memory, read_from=["s3://more"]))
        os.environ[remote_files.ALLOWED] = ""
        store = pickle.loads(data)
        assert store.save_path == memory
        assert os.environ[remote_files.ALLOWED].split() == [memory, "s3://more"]


class TestTrouble:
    def test_a_server_that_is_not_there(self, job, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        access(monkeypatch, address)
        monkeypatch.setattr(remote_files, "READ_PATIENCE", 0.1)
        monkeypatch.setattr(remote_store, "READ_PATIENCE", 0.1)
        job.io = ImageIO("s3://bucket/images")
        with pytest.raises((RunStoppedError, StoreError), match="does not answer"):
            drawn(job)
        assert not job.made()

    def test_nothing_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(MissingExtraError, match="object-store"):
            list(ImageIO("s3://bucket/images").existing())

    def test_a_kind_whose_library_is_not_there(self, monkeypatch):
        with pytest.raises(ConfigError, match="needs a library that is not installed"):
            list(ImageIO("oss://bucket/images").existing())
