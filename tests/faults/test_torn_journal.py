"""Torn, damaged and missing journals, and images that are not what they should be.

Detected, and mended by making or adopting the image again: every torn or damaged record, a lost journal, an image file
that is missing or has another size, a file without a record that is not whole.

Not detected by a run, which opens no finished image: bytes changed without changing the size of a recorded file. The
record's sha256 tells; comparing a million of those takes minutes, so it is not done at every start.
"""

import hashlib
import os
import shutil
import socket
from pathlib import Path

import orjson
import pytest

PROMPTS = [f"thing {number}" for number in range(6)]

HERE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@pytest.fixture
def done(site):
    site.serving = {"batch_size": 2, "concurrency": 1}
    site.fill(PROMPTS).run()
    return site


def goes_on(site, *, made, adopted=None):
    """Run again: so many images are made, all others stay as they are, and every row has its own."""
    before = site.files()
    summary = site.run()
    assert (summary.done, summary.failed, summary.pending) == (len(PROMPTS), 0, 0)
    assert summary.made == made
    if adopted is not None:
        assert summary.adopted == adopted
    site.check()
    changed = {name for name, state in site.files().items() if before.get(name) != state}
    assert len(changed) == made
    again = site.run()
    assert (again.made, again.adopted) == (0, 0)


def test_a_tail_torn_at_every_length(done, caplog):
    """As a kill inside the last write leaves it; nothing is made again, for every image is there."""
    whole = done.journal.read_bytes()
    end = len(whole)
    start = whole.rindex(b"\n", 0, end - 1) + 1
    for length in range(start, end):
        done.journal.write_bytes(whole[:length])
        adopted = 1 if length < end - 1 else 0  # without its newline it is still a whole record
        summary = done.run()
        assert (summary.done, summary.made, summary.adopted) == (6, 0, adopted), f"torn after {length - start} bytes"
        assert done.run().adopted == 0, "the next record was glued to the torn one"
    done.check()
    assert not caplog.records, "a torn tail is the ordinary trace of a kill and no reason to alarm anybody"


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 4096,
        b"\0",
        b"\xff\xfe garbage",
        b'{"s":"done"',
        b"{}",
        b"\n\n\n",
        b'{"s":"done","k":"00"}\n',
        b"\0\n\0\n",
    ],
    ids=repr,
)
def test_a_tail_of_garbage(done, tail):
    """As lost power leaves it: zeros where data never arrived, or what another file held."""
    with done.journal.open("ab") as file:
        file.write(tail)
    goes_on(done, made=0, adopted=0)
    done.fill([*PROMPTS, "one more"])
    assert done.run().made == 1, "what follows the garbage is read"
    assert done.run().made == 0
    done.check()


def test_half_of_the_journal_overwritten_with_zeros(done):
    data = done.journal.read_bytes()
    done.journal.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    goes_on(done, made=0)


def test_a_damaged_record_in_the_middle_is_reported_with_its_place(done, caplog):
    lines = done.journal.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"done"' in line and n < len(lines) - 2)
    lines[number] = lines[number].replace(b'"bytes":', b'"bites":')
    done.journal.write_bytes(b"".join(lines))
    goes_on(done, made=0, adopted=1)
    message = caplog.records[0].getMessage()
    assert str(done.journal) in message
    assert f"byte {sum(map(len, lines[:number]))}" in message
    assert "adopted" in message


def test_a_deleted_journal_costs_no_image(done):
    shutil.rmtree(done.cache)
    goes_on(done, made=0, adopted=6)


def test_an_image_cut_short_under_its_name_is_made_again(done):
    path = Path(done.check()[2])
    path.write_bytes(path.read_bytes()[:-20])
    goes_on(done, made=1)


def test_without_a_journal_an_image_cut_short_is_not_adopted(done):
    path = Path(done.check()[2])
    path.write_bytes(path.read_bytes()[:-20])
    shutil.rmtree(done.cache)
    goes_on(done, made=1, adopted=5)


@pytest.mark.parametrize("content", [b"", b"<html>quota exceeded</html>"])
def test_a_file_that_is_no_image_is_made_again(done, content):
    Path(done.check()[2]).write_bytes(content)
    goes_on(done, made=1)


def test_a_deleted_image_is_made_again(done):
    Path(done.check()[0]).unlink()
    goes_on(done, made=1)


def test_all_images_deleted_are_made_again(done):
    shutil.rmtree(done.images)
    goes_on(done, made=6)


def test_an_image_of_another_row_and_size_is_made_again(done):
    paths = sorted(map(Path, done.check()), key=lambda path: path.stat().st_size)
    assert paths[0].stat().st_size != paths[-1].stat().st_size
    shutil.copyfile(paths[0], paths[-1])
    goes_on(done, made=1)


def padded(data, size):
    """Readers stop at a PNG's end; what follows makes it as long as one likes."""
    return data + bytes(size - len(data))


def test_an_image_of_another_row_with_the_very_same_size_is_not_noticed_by_a_run(done):
    """The limit of what a run looks at; the journal's sha256 still tells."""
    small, large = sorted(map(Path, done.check()), key=lambda path: path.stat().st_size)[:: len(PROMPTS) - 1]
    large.write_bytes(padded(small.read_bytes(), large.stat().st_size))
    assert done.run().made == 0
    records = [orjson.loads(line) for line in done.journal.read_bytes().splitlines()]
    recorded = {image["name"]: image["sha256"] for record in records for image in record.get("img", ())}
    name = str(large.relative_to(done.images))
    assert recorded[name] != hashlib.sha256(large.read_bytes()).hexdigest()


def test_without_a_journal_an_image_of_another_row_is_not_adopted(done):
    """The file says inside which request it is of."""
    small, large = sorted(map(Path, done.check()), key=lambda path: path.stat().st_size)[:: len(PROMPTS) - 1]
    shutil.copyfile(small, large)
    shutil.rmtree(done.cache)
    goes_on(done, made=1, adopted=5)


def test_stubs_of_killed_writers_are_swept(done):
    folder = Path(done.check()[0]).parent
    stub = folder / f".{'0' * 32}.4194305.{HERE}abcdef01.tmp"
    stub.write_bytes(b"half an image")
    assert done.run().made == 0
    assert not stub.exists()


def test_what_another_running_process_is_writing_is_not_swept(done):
    """Two caches may share one folder of images; the name of a stub says whose it is."""
    folder = Path(done.check()[0]).parent
    other = folder / f".{'0' * 32}.{os.getppid()}.abcdef01.tmp"
    other.write_bytes(b"half an image, the other half is under way")
    assert done.run().made == 0
    assert other.exists()


def test_foreign_files_among_the_images_stay_and_disturb_nobody(done):
    (done.images / "notes.txt").write_text("mine")
    (done.images / "00").mkdir(exist_ok=True)
    (done.images / "00/holiday.png").write_text("mine, too")
    assert done.run().made == 0
    assert (done.images / "notes.txt").read_text() == "mine"
    assert (done.images / "00/holiday.png").read_text() == "mine, too"


def test_a_deleted_table_is_written_again_without_making_anything(done):
    content = done.output.read_bytes()
    done.output.unlink()
    goes_on(done, made=0)
    assert done.output.read_bytes() == content


def test_a_table_somebody_cut_is_written_again(done):
    content = done.output.read_bytes()
    done.output.write_bytes(content[:-30])
    goes_on(done, made=0)
    assert done.output.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0\0\0"])
def test_a_damaged_summary_is_no_obstacle(done, content):
    (done.journal.parent / "summary.json").write_bytes(content)
    goes_on(done, made=0)
