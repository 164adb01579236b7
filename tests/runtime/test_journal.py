"""Records that survive torn writes, damage and a full disk, and the index made of them."""

from __future__ import annotations

import errno
import logging
import os

import orjson
import pytest

from dataflow.runtime import journal as journals
from dataflow.runtime.journal import Ending, Index, Journal, done_record, ending_record, pack_line, unpack_line
from dataflow.types import SavedImage

A, B, C = ("a" * 32, "b" * 32, "c" * 32)
KEY_A, KEY_B, KEY_C = map(bytes.fromhex, (A, B, C))


def saved(key: str, suffix: str = ".png", size: int = 100, number: int = 0) -> SavedImage:
    stem = key if number == 0 else f"{key}_{number}"
    return SavedImage(name=f"{key[:2]}/{stem}{suffix}", sha256="0" * 64, bytes=size, width=8, height=8)


def done(key: str, **facts) -> dict:
    return done_record(key, [saved(key)], **facts)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


def write(journal: Journal, *records) -> None:
    journal.open()
    journal.append(*records)
    journal.close()


class TestLines:
    @pytest.mark.parametrize(
        "record",
        [
            {"s": "seal"},
            done(A, ms=1.5),
            ending_record(A, "failed", "crash", "日本 \n \0 é"),
            {"s": "x", "crc": "mine"},
        ],
    )
    def test_a_record_comes_back(self, record):
        line = pack_line(record)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        found = unpack_line(line)
        assert {name: found[name] for name in record if name != "crc"} == {
            name: value for name, value in record.items() if name != "crc"
        }

    def test_any_changed_or_missing_byte_is_noticed(self):
        line = pack_line(done(A))
        for at in range(len(line) - 1):
            changed = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
            assert unpack_line(changed) is None, at
            assert unpack_line(line[:at]) is None, at
        assert unpack_line(b"") is None
        assert unpack_line(b"\n") is None

    def test_values_that_are_no_json_do_not_lose_the_record(self):
        record = {"s": "done", "k": A, "img": [], "text": "cut \ud83d", "usage": {"cost": complex(1, 2), "big": 2**70}}
        found = unpack_line(pack_line(record))
        assert (found["k"], found["text"], found["usage"]["cost"]) == (A, "cut ?", "(1+2j)")


class TestFile:
    def test_what_was_appended_is_read_in_its_order_over_several_runs(self, journal):
        write(journal, {"s": "start", "ks": [A]}, done(A))
        write(journal, done(B))
        assert [(record["s"], record.get("k")) for record in journal.records()] == [
            ("start", None),
            ("done", A),
            ("done", B),
        ]

    def test_every_writers_file_is_read(self, journal):
        write(Journal(journal.folder, "one"), done(A))
        write(Journal(journal.folder, "two"), done(B))
        assert set(journal.load().packed) == {KEY_A, KEY_B}

    def test_without_a_folder_there_are_no_records(self, journal):
        assert list(journal.records()) == []

    @pytest.mark.parametrize("cut", [2, 5, 20, 100])
    def test_a_torn_tail_is_sealed_counted_and_hides_nothing(self, journal, caplog, cut):
        write(journal, done(A), done(B))
        whole = journal.path.read_bytes()
        journal.path.write_bytes(whole[:-cut])
        write(journal, done(C))
        index = journal.load()
        assert set(index.packed) == {KEY_A, KEY_C}
        assert index.torn == 1
        assert not caplog.records, "a torn tail is what a kill leaves: no reason to alarm anybody"

    def test_a_record_that_lost_but_its_newline_is_kept_and_so_is_the_next(self, journal):
        write(journal, done(A), done(B))
        journal.path.write_bytes(journal.path.read_bytes()[:-1])
        write(journal, done(C))
        index = journal.load()
        assert (set(index.packed), index.torn) == ({KEY_A, KEY_B, KEY_C}, 0)

    def test_a_tail_of_zeros_is_torn_too(self, journal):
        write(journal, done(A))
        journal.path.write_bytes(journal.path.read_bytes() + b"\0\0\0\n")
        write(journal, done(B))
        assert set(journal.load().packed) == {KEY_A, KEY_B}

    def test_a_whole_journal_is_not_sealed(self, journal):
        write(journal, done(A))
        before = journal.path.read_bytes()
        journal.open()
        journal.close()
        assert journal.path.read_bytes() == before

    def test_a_record_longer_than_the_look_back_is_whole(self, journal):
        write(journal, {"s": "start", "ks": [A] * 3000})
        write(journal, done(B))
        index = journal.load()
        assert (index.torn, index.starts[KEY_A], set(index.packed)) == (0, 3000, {KEY_B})

    def test_damage_in_the_middle_is_reported_with_file_and_offset_and_the_rest_is_read(self, journal, caplog):
        write(journal, done(A), done(B), done(C))
        lines = journal.path.read_bytes().splitlines(keepends=True)
        journal.path.write_bytes(lines[0] + lines[1].replace(b"done", b"dome") + lines[2])
        index = journal.load()
        assert (set(index.packed), index.torn) == ({KEY_A, KEY_C}, 1)
        assert f"{journal.path}: damaged record at byte {len(lines[0])} skipped" in caplog.text

    def test_two_damaged_records_in_a_row_are_both_reported(self, journal, caplog):
        write(journal, done(A), done(B), done(C))
        lines = journal.path.read_bytes().splitlines(keepends=True)
        journal.path.write_bytes(b"garbage\n" + b"more\n" + lines[2])
        assert journal.load().torn == 2
        assert [("byte 0" in record.message, "byte 8" in record.message) for record in caplog.records] == [
            (True, False),
            (False, True),
        ]

    def test_a_line_that_a_full_disk_takes_in_part_is_taken_back(self, journal, monkeypatch):
        write(journal, done(A))
        before = journal.path.read_bytes()
        journal.open()
        write_all = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write_all(fd, data[:50]))
        with pytest.raises(OSError, match="No space left") as caught:
            journal.append(done(B))
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert journal.path.read_bytes() == before
        journal.append(done(C))
        assert (set(journal.load().packed), journal.load().torn) == ({KEY_A, KEY_C}, 0)

    def test_records_are_made_durable_in_groups_and_at_the_end(self, journal, monkeypatch):
        synced = []
        monkeypatch.setattr(journals, "_datasync", lambda fd: synced.append(journal.path.stat().st_size))
        monkeypatch.setattr(journals, "SYNC_SECONDS", 1e9)
        journal.open()
        for _ in range(journals.SYNC_RECORDS - 1):
            journal.append(done(A))
        assert synced == []
        journal.append(done(B))
        assert len(synced) == 1
        journal.append(done(B))
        journal.close()
        assert len(synced) == 2
        journal.close()
        assert len(synced) == 2

    def test_after_a_while_a_single_record_is_made_durable(self, journal, monkeypatch):
        synced = []
        monkeypatch.setattr(journals, "_datasync", synced.append)
        monkeypatch.setattr(journals, "SYNC_SECONDS", 0.0)
        journal.open()
        journal.append(done(A))
        assert len(synced) == 1


class TestIndex:
    @staticmethod
    def of(*records) -> Index:
        index = Index()
        for record in records:
            index.apply(orjson.loads(orjson.dumps(record)))
        return index

    @pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
    def test_one_image_under_its_own_name_is_one_number(self, suffix):
        index = self.of(done_record(A, [saved(A, suffix, 12345)]))
        assert (index.sums(KEY_A), index.names(KEY_A)) == ((1, 12345), [f"aa/{A}{suffix}"])
        assert (index.records, index.text(KEY_A)) == ({}, None)

    def test_several_images_and_texts_keep_their_record(self, tmp_path):
        index = self.of(
            done_record(A, [saved(A), saved(A, number=1, size=11)]),
            done_record(B, [], text="words"),
            done_record(C, [saved(A, ".gif")]),
        )
        assert index.names(KEY_A) == [f"aa/{A}.png", f"aa/{A}_1.png"]
        assert (index.sums(KEY_A), index.text(KEY_A)) == ((2, 111), None)
        assert (index.names(KEY_B), index.sums(KEY_B), index.text(KEY_B)) == ([], (0, 0), "words")
        assert index.names(KEY_C) == [f"aa/{A}.gif"]

    def test_done_means_that_the_file_is_there_with_its_size(self):
        index = self.of(done(A), done(B), done(C), done_record("d" * 32, [], text="words"))
        missing = index.verify([(f"aa/{A}.png", 100), (f"bb/{B}.png", 99), (f"ee/{'e' * 32}.png", 1)])
        assert [index.is_done(key) for key in (KEY_A, KEY_B, KEY_C, b"\xdd" * 16)] == [True, False, False, True]
        assert missing == 2
        index.mark_seen(KEY_C)
        assert index.is_done(KEY_C)

    def test_of_several_images_all_must_be_there(self):
        pair = done_record(A, [saved(A), saved(A, number=1)])
        whole = self.of(pair)
        whole.verify([(f"aa/{A}.png", 100), (f"aa/{A}_1.png", 100)])
        half = self.of(pair)
        half.verify([(f"aa/{A}.png", 100)])
        assert (whole.is_done(KEY_A), half.is_done(KEY_A)) == (True, False)

    def test_starts_count_deaths_until_the_request_ends(self):
        start, alone = {"s": "start", "ks": [A, B]}, {"s": "start", "ks": [A], "alone": True}
        index = self.of(start, start, alone)
        assert (index.starts, index.alone) == ({KEY_A: 3, KEY_B: 2}, {KEY_A: 1})
        index = self.of(start, start, alone, done(A), ending_record(B, "failed", "crash", ""))
        assert (index.starts, index.alone) == ({}, {})

    def test_the_last_word_counts(self):
        refused, failed = ending_record(A, "refused", "refused", "no"), ending_record(A, "failed", "crash", "oops")
        assert self.of(failed, refused).endings == {KEY_A: Ending("refused", "refused", "no")}
        assert self.of(failed, done(A)).endings == {}
        assert KEY_A not in self.of(done(A), failed).packed

    def test_a_result_of_several_images_that_failed_later_is_no_longer_done(self):
        index = self.of(done_record(A, [], text="words"), ending_record(A, "failed", "crash", "oops"))
        index.verify([])
        assert not index.is_done(KEY_A)

    def test_a_text_replaced_by_an_image_needs_its_file(self):
        index = self.of(done_record(A, [], text="words"), done(A))
        index.verify([])
        assert not index.is_done(KEY_A)
        assert index.text(KEY_A) is None

    def test_forgotten_requests_count_as_never_tried(self):
        alone = {"s": "start", "ks": [A], "alone": True}
        records = [done_record(A, [], text="words"), done(B), ending_record(C, "failed", "crash", ""), alone]
        index = self.of(*records, {"s": "forget", "ks": [A, B, C]})
        assert index == Index()

    def test_seals_and_words_of_later_versions_are_passed_over(self):
        assert self.of({"s": "seal"}, {"s": "news", "k": A}, {}) == Index()

    def test_a_very_long_message_is_cut(self):
        assert len(ending_record(A, "failed", "crash", "x" * 10_000)["msg"]) == 2000


def test_loading_says_nothing_about_a_whole_journal(journal, caplog):
    with caplog.at_level(logging.DEBUG):
        write(journal, done(A))
        journal.load()
    assert not caplog.records
