"""Images in packs: everything that reads pictures finds them there, and they come back as they were."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from dataflow import packs
from dataflow.cli import main
from dataflow.errors import CacheBusyError, ConfigError, ImageError, InputError
from dataflow.export import ExportOptions, export
from dataflow.operators import ImageEvaluator, PromptedImageEditGenerator
from dataflow.packing import pack, unpack
from dataflow.packs import packs_of
from dataflow.picture_files import open_file, read_bytes, status
from dataflow.report import write_report
from dataflow.runtime.engine import RunOptions
from dataflow.runtime.journal import pack_line, unpack_line
from dataflow.runtime.lock import cache_lock
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.utils.storage import FileStorage

SMALL = 4000
"""Bytes of a shard: a few of the fake serving's pictures."""


@pytest.fixture
def made(job):
    """A finished job of 12 pictures."""
    job.prompts(*(f"a fox number {number}" for number in range(12)))
    assert job.run().done == 12
    job.before = job.image_files()
    return job


def packed(job, **options):
    return pack(job.cache, images=job.io.save_path, shard_bytes=SMALL, **options)


def unpacked(job):
    return unpack(job.cache, images=job.io.save_path)


def loose(job) -> list[str]:
    return sorted(path.relative_to(job.io.save_path).as_posix() for path in job.io.save_path.glob("??/*"))


def shards(job) -> list[Path]:
    return sorted((job.io.save_path / "packs").glob("*.tar"))


def indexes(job) -> list[Path]:
    return sorted((job.io.save_path / "packs").glob("*.sqlite"))


def change_journal(job, old: str, new: str) -> None:
    """Other words in whole records."""
    text = job.journal.path.read_bytes()
    records = [unpack_line(line) for line in text.splitlines()]
    changed = [json.loads(json.dumps(record).replace(old, new)) for record in records]
    assert changed != records
    job.journal.path.write_bytes(b"".join(map(pack_line, changed)))


def contents(job) -> dict[str, bytes]:
    return {name: read_bytes(job.io.path(name)) for name, _ in job.io.existing()}


class TestPacking:
    def test_every_picture_is_in_a_pack_as_it_was(self, made):
        said = []
        summary = packed(made, tell=said.append)
        assert (summary.images, summary.packed, summary.differing, summary.missing) == (12, 12, 0, 0)
        assert summary.bytes == sum(map(len, made.before.values()))
        assert summary.shards == len(shards(made)) == len(said) > 2
        assert loose(made) == []
        assert contents(made) == made.before
        assert made.check_images() == 12

    def test_packs_are_plain_tar_files(self, made):
        packed(made)
        found = {}
        for shard in shards(made):
            with tarfile.open(shard) as file:
                for member in file:
                    found[member.name] = file.extractfile(member).read()
        assert found == made.before

    def test_nothing_is_made_again_and_nothing_new_is_packed_twice(self, made):
        packed(made)
        assert made.run().made == 0
        made.prompts(*(f"a fox number {number}" for number in range(15)))
        assert made.run().made == 3
        assert len(loose(made)) == 3
        summary = packed(made)
        assert (summary.images, summary.packed, summary.before) == (15, 3, 12)
        assert made.run().made == 0
        assert made.check_images() == 15
        assert made.made().total() == 15

    def test_again_with_nothing_to_do(self, made):
        packed(made)
        before = {path: path.stat().st_mtime_ns for path in (*shards(made), *indexes(made))}
        summary = packed(made)
        assert (summary.packed, summary.before, summary.shards) == (0, 12, 0)
        assert {path: path.stat().st_mtime_ns for path in (*shards(made), *indexes(made))} == before

    def test_a_changed_file_stays_and_wins(self, made):
        first, *_ = made.before
        made.io.save_path.joinpath(first).write_bytes(b"something else")
        summary = packed(made)
        assert (summary.packed, summary.differing, summary.examples) == (11, 1, [first])
        assert loose(made) == [first]
        assert read_bytes(made.io.path(first)) == b"something else"

    def test_a_loose_file_wins_over_a_packed_one(self, made):
        first, *_ = made.before
        packed(made)
        made.io.save_path.joinpath(first).write_bytes(b"mine")
        assert read_bytes(made.io.path(first)) == b"mine"
        assert dict(made.io.existing())[first] == 4
        assert dict(made.io.sizes([first])) == {first: 4}
        made.io.save_path.joinpath(first).unlink()
        assert read_bytes(made.io.path(first)) == made.before[first]

    def test_what_is_gone_is_counted_and_made_again(self, made):
        first, *_ = made.before
        made.io.save_path.joinpath(first).unlink()
        summary = packed(made)
        assert (summary.packed, summary.missing) == (11, 1)
        assert made.run().made == 1
        assert contents(made) == made.before

    def test_a_picture_made_anew_since_is_in_the_newer_pack(self, made):
        first, *_ = made.before
        packed(made)
        for shard in shards(made):  # a disk ate one
            with tarfile.open(shard) as file:
                if first in file.getnames():
                    shard.unlink()
        lost = 12 - len(list(made.io.existing()))
        assert lost >= 1
        assert made.run().made == lost
        assert packed(made).packed == lost
        assert contents(made) == made.before

    def test_only_finished_steps_and_parts(self, job):
        rows = [f"a fox number {number}" for number in range(10)]
        job.prompts(*rows)
        with pytest.raises(Exception, match="stopped"):
            job.run(job.serving(batch_size=1, script={rows[7]: "fatal"}), part_rows=3)
        summary = packed(job)
        assert summary.unfinished == ("dataflow_cache_step_step1",)
        assert summary.images == summary.packed == 6
        assert job.run(part_rows=3).done == 10
        assert job.made().total() == 10
        summary = packed(job)
        assert (summary.images, summary.packed, summary.before, summary.unfinished) == (10, 4, 6, ())
        assert job.check_images() == 10

    def test_the_pictures_of_several_steps(self, made):
        store, options = made.io, RunOptions(quiet=True)
        storage = FileStorage(str(made.input), str(made.cache))
        storage.step()
        packed(made)
        editor = PromptedImageEditGenerator(made.serving(), options=options)
        assert editor.run(storage.step(), "images", "prompt", "edited").done == 12
        rows = [json.loads(line) for line in storage.output_path.read_text().splitlines()]
        again = packed(made)
        assert (again.images, again.packed, again.before) == (24, 12, 12)
        for row in rows:
            facts = store.read_metadata(row["edited"][0])
            assert facts["images"] == row["images"]
        assert editor.run(storage, "images", "prompt", "edited").made == 0

    def test_many_shards_have_few_indexes(self, job):
        job.prompts(*(f"p{number}" for number in range(75)))
        job.run()
        before = job.image_files()
        summary = pack(job.cache, images=job.io.save_path, shard_bytes=1)
        assert summary.shards == 75
        assert len(indexes(job)) == 5  # 64 + 8 + 1 + 1 + 1
        assert contents(job) == before

    def test_of_two_caches_with_one_folder_of_pictures(self, made, tmp_path):
        other = type(made)(tmp_path / "other")
        other.folder.mkdir()
        other.io = made.io
        other.prompts("a kite", "a fox number 3", "a boat")
        summary = other.run()
        assert (summary.made, summary.adopted) == (2, 1)  # the same request has the same picture
        assert packed(made).packed == 12
        summary = packed(other)
        assert (summary.images, summary.packed, summary.before) == (3, 2, 1)
        assert loose(made) == []
        assert (made.run().made, other.run().made) == (0, 0)


class TestUnpacking:
    def test_everything_is_as_it_was(self, made):
        dates = {name: made.io.save_path.joinpath(name).stat().st_mtime_ns for name in made.before}
        packed(made)
        summary = unpacked(made)
        assert (summary.images, summary.unpacked, summary.damaged) == (12, 12, 0)
        assert made.image_files() == made.before
        assert {name: made.io.save_path.joinpath(name).stat().st_mtime_ns for name in made.before} == dates
        assert not made.io.save_path.joinpath("packs").exists()
        assert unpacked(made).images == 0
        assert made.run().made == 0

    def test_a_damaged_one_stays_with_its_pack(self, made):
        packed(made)
        store = packs_of(made.io.save_path)
        name, place = next(store.members(shards(made)[0].name))
        with shards(made)[0].open("r+b") as file:
            file.seek(place.offset + 60)
            file.write(b"\0\1\2\3")
        summary = unpacked(made)
        assert (summary.damaged, summary.unpacked, summary.examples) == (1, 11, [name])
        assert len(shards(made)) == 1
        assert len(loose(made)) == 11
        made.io.save_path.joinpath("packs", shards(made)[0].name).unlink()
        assert made.run().made == 1
        assert contents(made) == made.before

    def test_what_newer_packs_have_counts(self, made):
        first, *_ = made.before
        packed(made)
        made.io.save_path.joinpath(first).parent.mkdir(exist_ok=True)
        newer = made.before[first] + b"\0"
        made.io.save_path.joinpath(first).write_bytes(newer)
        change_journal(made, hashlib.sha256(made.before[first]).hexdigest(), hashlib.sha256(newer).hexdigest())
        assert packed(made).packed == 1
        summary = unpacked(made)
        assert (summary.images, summary.unpacked, summary.replaced) == (13, 12, 1)
        assert contents(made) == made.before | {first: newer}


class TestReaders:
    """Everything that opens pictures."""

    def test_image_io(self, made):
        packed(made)
        for name, data in made.before.items():
            path = made.io.path(name)
            assert made.io.digest(path) == hashlib.sha256(data).hexdigest()
            assert made.io.probe(path) == (8, 8)
            assert made.io.read_metadata(path)["request_id"] == Path(name).stem
            assert status(path).size == len(data)
            found = made.io.find(Path(name).stem)
            assert (found.name, found.sha256, found.bytes) == (name, hashlib.sha256(data).hexdigest(), len(data))
        assert dict(made.io.sizes([*made.before, "ff/" + "f" * 32 + ".png"])) == {
            name: len(data) for name, data in made.before.items()
        }

    def test_relative_paths(self, made, monkeypatch):
        packed(made)
        name, data = next(iter(made.before.items()))
        monkeypatch.chdir(made.folder)
        for path in (f"images/{name}", f"./images/{name}", f"cache/../images/{name}"):
            assert read_bytes(path) == data
        monkeypatch.chdir(made.io.save_path)
        assert read_bytes(name) == data
        with pytest.raises(ImageError, match="no such file"):
            read_bytes(f"elsewhere/{name}")

    def test_files_can_be_searched(self, made):
        packed(made)
        name, data = next(iter(made.before.items()))
        with open_file(made.io.path(name)) as file:
            assert file.read(8) == data[:8]
            assert file.seek(-12, os.SEEK_END) == len(data) - 12
            assert file.read() == data[-12:]
            assert file.read() == b""
            file.seek(0)
            assert file.read() == data

    def test_evaluators(self, made):
        storage = FileStorage(str(made.input), str(made.cache))
        storage.step()
        evaluator = ImageEvaluator(ImageProbeServing(), options=RunOptions(quiet=True))
        evaluator.run(storage.step(), "images", output_key="probe")
        scores = storage.output_path.read_bytes()
        shutil.rmtree(made.cache / "journal" / storage.step_name)
        storage.output_path.unlink()
        packed(made)
        summary = evaluator.run(storage, "images", output_key="probe")
        assert (summary.done, summary.failed) == (12, 0)
        assert storage.output_path.read_bytes() == scores

    @pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "parquet"])
    def test_export(self, made, tmp_path, kind):
        options = ExportOptions(format=kind, copy_images=kind == "jsonl")
        export(made.output, tmp_path / "loose", options)
        packed(made)
        summary = export(made.output, tmp_path / "packed", options)
        assert not summary.problems

        def files(folder):
            return {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file() and path.suffix in (".png", ".tar", ".parquet", ".txt", ".jsonl", ".csv")
            }

        assert files(tmp_path / "packed") == files(tmp_path / "loose")
        assert files(tmp_path / "packed")

    def test_export_of_paths_alone(self, made, tmp_path):
        packed(made)
        with pytest.raises(ConfigError, match="is in a pack, so that no path leads to it: give copy_images"):
            export(made.output, tmp_path / "out", ExportOptions(format="jsonl"))

    def test_report(self, made, tmp_path):
        packed(made)
        report = write_report([made.cache], tmp_path / "report")
        assert (report.pictures, report.unreadable) == (12, 0)

    def test_a_reader_in_another_thread_never_misses_one(self, made):
        stop, wrong, looks = threading.Event(), [], 0

        def look():
            nonlocal looks
            while not stop.is_set():
                for name, data in made.before.items():
                    try:
                        if read_bytes(made.io.path(name)) != data:
                            wrong.append(name)
                    except ImageError as error:
                        wrong.append(str(error))
                looks += 1

        reader = threading.Thread(target=look)
        reader.start()
        try:
            for _ in range(5):
                packed(made)
                unpacked(made)
        finally:
            stop.set()
            reader.join()
        assert wrong == []
        assert looks > 2

    def test_pixels(self, made):
        name, *_ = made.before
        before = np.asarray(made.io.read(made.io.path(name)))
        packed(made)
        assert np.array_equal(np.asarray(made.io.read(made.io.path(name))), before)


class TestDamage:
    def test_a_lost_index_is_made_anew(self, made):
        packed(made)
        for index in indexes(made):
            index.unlink()
        assert packed(made).before == 12
        assert contents(made) == made.before

    def test_an_index_that_cannot_be_read(self, made):
        packed(made)
        indexes(made)[0].write_bytes(b"SQLite format 3\0" + b"\xff" * 500)
        packs._known.clear()
        with pytest.raises(ImageError, match=r"index-.*sqlite: is no index that can be read .*dataflow pack"):
            list(made.io.existing())
        indexes(made)[0].unlink()
        packed(made)
        assert contents(made) == made.before

    def test_a_shard_cut_short_gives_no_other_picture(self, made):
        packed(made)
        shard = shards(made)[0]
        store = packs_of(made.io.save_path)
        names = [name for name, _ in store.members(shard.name)]
        os.truncate(shard, shard.stat().st_size // 3)
        packs._known.clear()
        left = dict(made.io.existing())
        assert set(names) - set(left)
        for name in names:
            if name not in left:
                with pytest.raises(ImageError, match="no such file"):
                    read_bytes(made.io.path(name))
        assert made.run().made == 12 - len(left)
        assert contents(made) == made.before

    def test_a_shard_of_others_under_the_same_name(self, made):
        packed(made)
        one, two, *_ = shards(made)
        one.write_bytes(two.read_bytes())
        wrong = 0
        for name, data in made.before.items():
            try:
                assert read_bytes(made.io.path(name)) == data
            except ImageError as error:
                wrong += "is damaged" in str(error) or "no such file" in str(error)
        assert wrong

    def test_a_shard_that_is_no_tar_file_and_has_no_index(self, made):
        packed(made)
        shards(made)[0].write_bytes(b"no tar file" * 100)
        for index in indexes(made):
            index.unlink()
        with pytest.raises(InputError, match=r"pack-.*tar: is no whole pack"):
            packed(made)


class TestRefusals:
    def test_while_another_writes(self, made):
        with cache_lock(made.cache), pytest.raises(CacheBusyError):
            packed(made)
        with cache_lock(made.io.save_path), pytest.raises(CacheBusyError):
            packed(made)
        assert len(loose(made)) == 12

    def test_folders_without_a_step(self, tmp_path):
        with pytest.raises(InputError, match="no such folder"):
            pack(tmp_path / "none")
        with pytest.raises(InputError, match="no such folder"):
            unpack(tmp_path / "none")
        with pytest.raises(InputError, match="no step that was run"):
            pack(tmp_path)

    def test_object_stores_and_odd_sizes(self, made):
        with pytest.raises(ConfigError, match="objects in a store stay as they are"):
            pack(made.cache, images="s3://bucket/images")
        with pytest.raises(ConfigError, match="must be positive"):
            pack(made.cache, shard_bytes=0)

    def test_a_journal_that_names_other_files(self, made):
        other = made.folder / "important.png"
        other.write_bytes(b"mine")
        first, *_ = made.before
        change_journal(made, first, "../important.png")
        assert packed(made).images == 11
        assert other.read_bytes() == b"mine"

    def test_no_pack_costs_one_look(self, made, monkeypatch):
        looks = []
        real = os.stat

        def counted(path, *args, **kwargs):
            looks.append(os.fspath(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", counted)
        name, *_ = made.before
        read_bytes(made.io.path(name))
        assert not any("packs" in path for path in looks)


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        tmp_path.joinpath("prompts.jsonl").write_text("".join(f'{{"prompt": "p{n}"}}\n' for n in range(5)))
        command = ["generate", "prompts.jsonl", "-o", "mine", "--fake", "--size", "16x16", "--quiet"]
        assert main(command) == 0
        capfd.readouterr()
        return tmp_path / "mine"

    def test_there_and_back(self, folder, capfd):
        assert main(["pack", "mine"]) == 0
        shown = capfd.readouterr()
        assert "5 images of finished steps = 5 packed now + 0 packed before + 0 not as" in shown.out
        assert "in 1 shard\n" in shown.out
        assert "pack-" in shown.err
        assert not list(folder.glob("images/??/*"))
        store = packs_of(folder / "images")
        name, _ = next(store.members(*store.shards()))
        assert main(["replay", name[3:11], "--cache", "mine"]) == 0
        assert main(["status", "mine"]) == 0
        capfd.readouterr()
        assert main(["unpack", "mine", "--json", "--quiet"]) == 0
        assert json.loads(capfd.readouterr().out)["unpacked"] == 5
        assert len(list(folder.glob("images/??/*"))) == 5

    def test_a_changed_file_is_said(self, folder, capfd):
        changed = next(folder.glob("images/??/*"))
        changed.write_bytes(b"x")
        assert main(["pack", "mine"]) == 1
        said = capfd.readouterr().out
        assert f"left as they are, since they were changed, among others: {changed.parent.name}/" in said
        assert main(["pack", "mine", "--json"]) == 1
        assert json.loads(capfd.readouterr().out)["before"] == 4

    def test_what_cannot_be_packed(self, tmp_path, folder, capfd):
        assert main(["pack", "elsewhere"]) == 2
        assert "elsewhere: no such folder" in capfd.readouterr().err
        tmp_path.joinpath("empty").mkdir()
        assert main(["pack", "empty"]) == 2
        assert "no step that was run" in capfd.readouterr().err
