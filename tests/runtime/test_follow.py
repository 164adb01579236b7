"""A journal read while another process writes it."""

from __future__ import annotations

import pytest

from dataflow.runtime import follow
from dataflow.runtime.follow import Follower
from dataflow.runtime.journal import Journal, done_record, ending_record, pack_line
from dataflow.types import SavedImage


def key(number: int) -> str:
    return f"{number:032x}"


def done(number: int, **facts) -> dict:
    name = f"{key(number)[:2]}/{key(number)}.png"
    return done_record(key(number), [SavedImage(name=name, sha256="", bytes=9, width=8, height=8)], **facts)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.open()
    yield journal
    journal.close()


@pytest.fixture
def follower(journal):
    return Follower(journal.folder, shown=2)


def test_a_journal_that_is_not_there_yet(tmp_path):
    follower = Follower(tmp_path / "none")
    assert follower.look() == 0
    journal = Journal(tmp_path / "none")
    journal.open()
    journal.append(done(1))
    assert follower.look() == 1
    assert follower.images == 1
    journal.close()


def test_what_came_before_is_not_counted_but_its_images_are_known(journal, follower):
    journal.append(done(1, usage={"usd": 1.0}), done(2), done(3))
    follower.look()
    assert (follower.images, follower.ended, follower.usd) == (0, 0, 0.0)
    assert [name[-5:] for name in follower.last] == ["3.png", "2.png"]


def test_what_comes_is_counted_once(journal, follower):
    follower.look()
    journal.append({"s": "start", "ks": [key(1), key(2), key(3), key(4)]}, {"s": "job", "name": "j", "ks": [key(4)]})
    follower.look()
    assert (len(follower.in_hand), len(follower.in_jobs)) == (4, 1)
    journal.append(done(1, usage={"usd": 0.25}), ending_record(key(2), "failed", "timeout", "", usage={"usd": 0.5}))
    journal.append(ending_record(key(4), "refused", "refused", "no"), {"s": "paid", "k": key(3), "usage": {"usd": 1.0}})
    for _ in range(2):
        follower.look()
    assert (follower.images, follower.ended, follower.usd) == (1, 3, 1.75)
    assert dict(follower.failures) == {"timeout": 1, "refused": 1}
    assert follower.in_hand == {key(3)}
    assert not follower.in_jobs


def test_what_was_given_back_is_no_longer_under_way(journal, follower):
    journal.append({"s": "start", "ks": [key(1), key(2)]}, {"s": "job", "name": "j", "ks": [key(2)]})
    follower.look()
    journal.append({"s": "forget", "ks": [key(1)]}, {"s": "paid", "k": key(2), "usage": {"usd": 0.5}})
    follower.look()
    assert follower.in_hand == {key(2)}
    assert not follower.in_jobs
    assert follower.usd == 0.5


def test_a_journal_that_began_after_the_watch_is_counted_from_its_beginning(journal):
    journal.append(done(1, usage={"usd": 1.0}), done(2))
    follower = Follower(journal.folder, whole=True)
    assert follower.look() == 2
    assert (follower.images, follower.ended, follower.usd) == (2, 2, 1.0)


def test_when_it_was_written(tmp_path, journal, follower):
    assert Follower(tmp_path / "none").written_at() is None
    assert follower.written_at() == pytest.approx(journal.path.stat().st_mtime)


def test_half_a_line_waits_for_its_other_half(journal, follower):
    follower.look()
    line = pack_line(done(7))
    with journal.path.open("ab", buffering=0) as file:
        file.write(line[:50])
        assert follower.look() == 0
        file.write(line[50:])
    assert follower.look() == 1
    assert follower.images == 1


def test_a_torn_line_is_passed_over(journal, follower):
    follower.look()
    with journal.path.open("ab") as file:
        file.write(pack_line(done(7))[:60] + b"\n" + pack_line({"s": "seal"}) + pack_line(done(8)))
    follower.look()
    assert follower.images == 1


def test_a_journal_that_was_replaced(journal, follower):
    journal.append(done(1), done(2))
    follower.look()
    new = journal.path.with_suffix(".new")
    new.write_bytes(pack_line(done(3)))
    new.replace(journal.path)
    follower.look()
    assert follower.images == 1
    journal.path.write_bytes(b"")
    journal.path.write_bytes(pack_line(done(4))[:-1])
    follower.look()
    assert follower.images == 1


def test_only_the_end_of_a_long_journal_is_read_at_first(journal, follower, monkeypatch):
    monkeypatch.setattr(follow, "TAIL_BYTES", 1000)
    journal.append(*(done(number) for number in range(100)))
    assert 0 < follower.look() < 8
    assert follower.last[0].endswith(f"{key(99)}.png")
    journal.append(done(100))
    assert follower.look() == 1


def test_several_files_of_one_step(journal, follower):
    follower.look()
    other = Journal(journal.folder, writer="other")
    other.open()
    other.append(done(1))
    journal.append(done(2))
    follower.look()
    assert follower.images == 2
    other.close()
