"""A disk that is full or cannot be written, at every file a run writes; mounts of its own, so it needs root."""

import os

import pytest

from dataflow.errors import DataflowError, InputError, RunStoppedError, StepError

PAGE = 4096  # what every file takes on a tmpfs at least


def no_stubs(site):
    """Under final names there are whole images only, and nothing else was left."""
    sizes = [path.stat().st_size for path in site.images.rglob("*.png")]
    assert all(sizes)
    assert not list(site.images.rglob("*.tmp"))
    return len(sizes)


def prompts(count):
    return [f"thing {number}" for number in range(count)]


def test_full_while_images_are_written(site, disk):
    site.images = disk.folder / "images"
    site.serving = {"batch_size": 4, "concurrency": 2, "size": (256, 256)}
    site.fill(prompts(40))
    disk.leave(30 * PAGE)
    message = r"disk is full .*/disk/images.*Nothing finished is lost.*run again"
    with pytest.raises(RunStoppedError, match=message) as stopped:
        site.run()
    kept = no_stubs(site)
    assert 0 < kept < 40
    stopped = stopped.value.summary
    assert (stopped.rows, stopped.failed) == (40, 0)
    assert kept - 2 * 4 <= stopped.done <= kept, "neighbours of the image that did not fit are adopted below"
    assert not site.output.exists()
    (disk.folder / "ballast").unlink()
    summary = site.run()
    assert (summary.done, summary.made, summary.adopted) == (40, 40 - kept, kept - stopped.done)
    site.check()


def test_full_again_and_again_blames_no_row(site, disk):
    """A run that stops by itself forgets what it had started: only a killed process leaves suspects."""
    site.images = disk.folder / "images"
    site.fill(prompts(3))
    disk.leave(0)
    for _ in range(8):
        with pytest.raises(RunStoppedError, match="disk is full"):
            site.run()
    (disk.folder / "ballast").unlink()
    summary = site.run()
    assert (summary.done, summary.failed) == (3, 0)
    site.check()


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_on_one_full_disk(site, disk, processes):
    """Images, journal and table share the disk, as they usually do."""
    site.cache, site.images = disk.folder / "cache", disk.folder / "images"
    site.serving = {"batch_size": 2, "processes": processes}
    site.fill(prompts(30))
    for free in (0, 1, 2, 3, 4, 5, 6):
        disk.leave(free * PAGE)
        with pytest.raises(DataflowError, match="disk is full"):
            site.run()
        no_stubs(site)
        (disk.folder / "ballast").unlink()
        if processes > 1 and free >= 2:  # every run starts two interpreters
            break
    summary = site.run()
    assert (summary.done, summary.failed) == (30, 0)
    site.check()
    assert site.generated().total() <= 30 + 7 * 4 * processes


def test_full_while_the_journal_is_written(site, disk):
    site.cache = disk.folder / "cache"
    site.fill(prompts(150))
    disk.leave(6 * PAGE)
    with pytest.raises(RunStoppedError, match=r"disk is full .*main\.jsonl"):
        site.run()
    kept = no_stubs(site)
    assert 0 < kept < 150
    assert site.journal.read_bytes().endswith(b"\n"), "no torn record is left"
    (disk.folder / "ballast").unlink()
    summary = site.run()
    assert (summary.done, summary.made) == (150, 150 - kept), "images without a record are adopted"
    assert summary.adopted <= 2
    site.check()


@pytest.mark.parametrize("cache_type", ["jsonl", "json", "csv", "parquet", "pickle"])
def test_full_while_the_table_is_written(site, disk, cache_type):
    from dataflow.io import ImageIO
    from dataflow.operators import Text2ImageGenerator
    from dataflow.runtime.engine import RunOptions
    from dataflow.serving.fake_serving import FakeServing
    from dataflow.utils.storage import FileStorage

    if cache_type == "parquet":
        pytest.importorskip("pyarrow")

    def run():
        storage = FileStorage(
            str(site.table), str(disk.folder), cache_type=cache_type, allow_pickle=cache_type == "pickle"
        ).step()
        serving = FakeServing(ImageIO(site.images))
        return storage, Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage)

    site.fill([{"conversations": "a fox", "note": os.urandom(50).hex()}])
    storage, _ = run()
    old = storage.output_path.read_bytes()
    site.fill([{"conversations": prompt, "note": os.urandom(20_000).hex()} for prompt in ("a fox", "a kite")])
    disk.leave(5 * PAGE)
    with pytest.raises(StepError, match=r"_step1\.\w+ cannot be written: the disk is full; free some space and run ag"):
        run()
    assert storage.output_path.read_bytes() == old, "the old table is intact"
    assert not list(disk.folder.glob(".*.tmp"))
    (disk.folder / "ballast").unlink()
    storage, summary = run()
    assert (summary.done, summary.made) == (2, 0)
    following = storage.step()
    assert [row["conversations"] for row in following.read("dict")] == ["a fox", "a kite"]


def test_a_read_only_cache_folder(site, disk):
    site.cache = disk.folder / "cache"
    site.fill(prompts(2))
    disk.read_only(True)
    with pytest.raises(DataflowError, match=r"(?i)no permission|read-only") as refused:
        site.run()
    assert str(site.cache) in str(refused.value)
    assert not site.generated()
    disk.read_only(False)
    assert site.run().done == 2
    site.check()


def test_a_read_only_cache_folder_that_was_used_before(site, disk):
    site.cache = disk.folder / "cache"
    site.fill(prompts(2)).run()
    old = site.output.read_bytes()
    disk.read_only(True)
    site.fill(prompts(3))
    with pytest.raises(DataflowError, match=r"(?i)no permission|read-only"):
        site.run()
    assert site.output.read_bytes() == old
    disk.read_only(False)
    assert site.run().made == 1
    site.check()


def test_a_read_only_image_folder(site, disk):
    site.images = disk.folder / "images"
    site.fill(prompts(2)).run()
    site.fill(prompts(4))
    disk.read_only(True)
    with pytest.raises(RunStoppedError, match=r"Read-only file system.*mend that and run again") as stopped:
        site.run()
    assert str(site.images) in str(stopped.value)
    disk.read_only(False)
    summary = site.run()
    assert (summary.done, summary.made) == (4, 2)
    site.check()


@pytest.mark.parametrize("place", ["cache", "images"])
def test_a_file_where_the_folder_should_be(site, place):
    site.fill(prompts(2))
    folder = getattr(site, place)
    folder.write_text("I was here first")
    with pytest.raises((InputError, RunStoppedError)) as refused:
        site.run()
    message = str(refused.value)
    assert str(folder) in message
    assert "there is a file: move it or choose another path" in message
    assert folder.read_text() == "I was here first"
    folder.unlink()
    assert site.run().done == 2
    site.check()
