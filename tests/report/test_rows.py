"""Tables of every odd kind, and what they become."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.report.made_runs import summary_of
from tests.report.test_write import columns, scripts

from dataflow.report import ReportOptions, write_report
from dataflow.report.columns import MOST_COLUMNS
from dataflow.report.thumbnails import Look, thumbnail
from dataflow.report.workshop import Shelf
from dataflow.runtime.journal import ending_record, pack_line

Rows = list[Any]


class Crafted:
    """A folder as steps leave it, written by hand: dicts are rows, strings are lines as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.cache.mkdir()

    def picture(self, name: str, **facts: Any) -> str:
        path = self.folder / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        text = PngInfo()
        if facts:
            text.add_text("dataflow", json.dumps(facts))
        Image.new("RGB", (20, 10), "navy").save(path, pnginfo=text)
        return str(path)

    def table(self, path: Path, rows: Rows) -> None:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def step(
        self, number: int, operator: str, table: Rows, /, *, prefix: str = "run", dropped: Rows = (), **sums: Any
    ) -> Path:
        """A finished step; one that makes pictures or scores has a journal."""
        name = f"{prefix}_step{number}"
        journal = self.cache / "journal" / name
        journal.mkdir(parents=True)
        self.table(self.cache / f"{name}.jsonl", table)
        if dropped:
            self.table(self.cache / f"{name}.dropped.jsonl", dropped)
        if "Filter" not in operator:
            (journal / "main.jsonl").touch()
        facts = {"operator": operator, "output": str(self.cache / f"{name}.jsonl"), "rows": len(table), **sums}
        if number == 1:
            facts.setdefault("input", str(self.folder / "in.jsonl"))
        (journal / "summary.json").write_text(json.dumps(facts))
        return journal

    def given(self, rows: Rows) -> None:
        self.table(self.folder / "in.jsonl", rows)

    def job(self, text: str) -> None:
        (self.cache / "job.toml").write_text(text)

    def report(self, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The summary, and everything about every entry."""
        target = write_report([self.cache], self.folder / "report", ReportOptions(**options)).page.parent
        return summary_of(target), scripts(target / "data", "details")

    def columns(self) -> dict:
        return columns(self.folder / "report")


@pytest.fixture
def crafted(tmp_path: Path) -> Crafted:
    return Crafted(tmp_path)


def test_rows_that_ask_for_no_picture_are_kept_once(crafted):
    rows = [{"prompt": f"p{n}", "images": [crafted.picture(f"a{n}")] if n else []} for n in range(3)]
    crafted.given([{"prompt": row["prompt"]} for row in rows])
    crafted.step(1, "Text2ImageGenerator", rows, images=2)
    crafted.step(2, "ScoreFilter", rows)
    summary, details = crafted.report()
    run = summary["runs"][0]
    assert (run["kept"], run["losses"], run["unaccounted"]) == (3, [], 0)
    assert len(details) == 2


def test_twins_without_pictures_are_counted_apart(crafted):
    error = {"status": "refused", "reason": "refused", "message": "no"}
    rows = [{"prompt": "twin", "images": [], "images_error": error}] * 2
    rows = [*rows, {"prompt": "good", "images": [crafted.picture("a")]}]
    crafted.given([{"prompt": row["prompt"]} for row in rows])
    crafted.step(1, "Text2ImageGenerator", rows, images=1)
    dropped = [{"reason": "no_image", "row": row} for row in rows[:2]]
    crafted.step(2, "ScoreFilter", rows[2:], dropped=dropped, rows=3)
    run = crafted.report()[0]["runs"][0]
    assert (run["kept"], run["losses"]) == (1, [[1, "refused", "refused", 2]])


def test_a_row_that_vanished_between_two_tables_is_lost_not_forgotten(crafted):
    rows = [{"prompt": f"p{n}", "images": [crafted.picture(f"a{n}")]} for n in range(2)]
    crafted.given([{"prompt": row["prompt"]} for row in rows])
    crafted.step(1, "Text2ImageGenerator", rows, images=2)
    crafted.step(2, "ScoreFilter", rows[:1], rows=2)
    summary, details = crafted.report()
    assert summary["runs"][0]["losses"] == [[2, "not_chosen", "not_in_next_table", 1]]
    assert [each["state"] for each in details] == ["kept", "not_chosen"]


def test_partly_made_rows_are_kept_and_tell_what_is_missing(crafted):
    error = {"status": "failed", "reason": "timeout", "message": "too slow"}
    row = {"prompt": "p", "images": [crafted.picture("a")], "images_error": error}
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [row], images=1, failed=1)
    summary, details = crafted.report()
    assert (summary["runs"][0]["kept"], summary["runs"][0]["losses"]) == (1, [])
    assert [(each["state"], each["reason"]) for each in details] == [("kept", ""), ("failed", "timeout")]


def test_lines_that_are_no_rows_are_noted(crafted):
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [{"prompt": "p", "images": [crafted.picture("a")]}, "{broken"], images=1)
    crafted.step(2, "ScoreFilter", [], dropped=["[]", {"reason": "score:x", "row": {"prompt": "q"}}], rows=2)
    summary, details = crafted.report()
    assert [note.split(": ")[0].rpartition("/")[2] for note in summary["notes"]] == [
        "run_step2.dropped.jsonl",
        "run_step1.jsonl",
    ]
    assert (details[0]["state"], details[0]["reason"], details[0]["path"]) == ("dropped", "score:x", None)


def test_what_a_filter_had_against_a_picture(crafted):
    pictures = [crafted.picture(f"a{n}") for n in range(4)]
    row = {"prompt": "p", "images": pictures, "noise": [0.1, 0.2, 0.9, 0.15], "noise_status": ["ok"] * 4}
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [row], images=4)
    kept = {**row, "images": pictures[:1], "noise": [0.1], "noise_status": ["ok"]}
    crafted.step(2, "ScoreFilter", [kept])
    crafted.job(
        '[[step]]\noperator = "Text2ImageGenerator"\n[[step]]\noperator = "ScoreFilter"\n'
        'input_score_key = "noise"\nmaximum = 0.5\ndrop_lowest_share = 0.1\n'
    )
    summary, details = crafted.report()
    assert [each["message"] for each in details] == [
        "",
        "ScoreFilter kept other pictures of its row",
        "noise is 0.9, more than 0.5",
        "ScoreFilter kept other pictures of its row",
    ]
    assert summary["runs"][0]["steps"][1]["thresholds"] == {"score": "noise", "maximum": 0.5, "drop_lowest_share": 0.1}


def test_scores_belong_to_the_pictures_that_the_step_names(crafted):
    row = {"prompt": "p", "images": [crafted.picture("a")], "edited_images": [crafted.picture("b")]}
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [{name: row[name] for name in ("prompt", "images")}], images=1)
    crafted.step(2, "PromptedImageEditGenerator", [row], images=1)
    scored = {**row, "look": [0.5], "look_status": ["ok"], "edit_score": 3, "edit_score_status": "ok"}
    crafted.step(3, "ImageEvaluator", [{**scored}])
    crafted.job(
        "".join(f'[[step]]\noperator = "{name}"\n' for name in ("Text2ImageGenerator", "PromptedImageEditGenerator"))
        + '[[step]]\noperator = "ImageEvaluator"\ninput_image_key = "edited_images"\n'
    )
    _, details = crafted.report()
    assert {Path(each["path"]).stem: [score[0] for score in each["scores"]] for each in details} == {
        "a": [],
        "b": ["look", "edit_score"],
    }


def test_a_pipeline_file_that_was_changed_since_is_not_believed(crafted):
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [{"prompt": "p", "images": [crafted.picture("a")]}], images=1)
    crafted.job('[[step]]\noperator = "ScoreFilter"\ninput_score_key = "x"\nminimum = 1\n')
    step = crafted.report()[0]["runs"][0]["steps"][0]
    assert (step["operator"], step["thresholds"]) == ("Text2ImageGenerator", {})


def test_rows_that_became_several_still_add_up(crafted):
    crafted.given([{"seed_word": "fox"}])
    prompts = [{"seed_word": "fox", "prompt": f"a fox {n}"} for n in range(3)]
    crafted.step(1, "PromptTemplateSampler", prompts, rows=1, done=1, written=3)
    rows = [{**prompt, "images": [crafted.picture(f"a{n}")]} for n, prompt in enumerate(prompts)]
    crafted.step(2, "Text2ImageGenerator", rows, images=3)
    run = crafted.report()[0]["runs"][0]
    assert (run["rows"], run["gained"], run["kept"], run["unaccounted"]) == (1, 2, 3, 0)


def test_two_chains_in_one_folder_are_two_runs(crafted):
    crafted.given([{"prompt": "p"}])
    for prefix in ("flux", "sdxl"):
        row = {"prompt": "p", "images": [crafted.picture(prefix)]}
        crafted.step(1, "Text2ImageGenerator", [row], prefix=prefix, images=1)
    summary, _ = crafted.report()
    assert [run["name"] for run in summary["runs"]] == ["cache · flux", "cache · sdxl"]


def test_only_prompts_and_no_pictures(crafted):
    crafted.given([{"prompt": f"p{n}"} for n in range(3)])
    dropped = [{"reason": "duplicate", "of": 1, "row": {"prompt": "p2"}}]
    crafted.step(1, "PromptDeduplicator", [{"prompt": "p0"}, {"prompt": "p1"}], dropped=dropped, rows=3)
    summary, details = crafted.report()
    assert summary["runs"][0]["kept"] == 2
    assert summary["runs"][0]["losses"] == [[1, "dropped", "duplicate", 1]]
    assert [(each["prompt"], each["message"]) for each in details] == [("p2", '{"of": 1}')]


def test_prompt_columns_can_be_named(crafted):
    crafted.given([{"prompt": "p", "long_prompt": "long"}])
    row = {"prompt": "p", "long_prompt": "long", "images": [crafted.picture("a")]}
    crafted.step(1, "Text2ImageGenerator", [row], images=1)
    assert [each["prompt"] for each in crafted.report()[1]] == ["p"]
    assert [each["prompt"] for each in crafted.report(prompt_column="long_prompt")[1]] == ["long"]


def test_cells_of_every_type_can_be_sorted_by(crafted):
    cells = {"flag": True, "big": 10**30, "tags": {"style": "oil", "deep": {"x": 1}}, "list": [1, 2], "none": None}
    rows = [
        {"prompt": "p0", "images": [crafted.picture("a")], **cells, "text": "x" * 9000},
        {"prompt": "p1", "images": [crafted.picture("b")], "flag": False},
    ]
    crafted.given([{"prompt": "p0"}, {"prompt": "p1"}])
    crafted.step(1, "Text2ImageGenerator", rows, images=2)
    _, details = crafted.report()
    found = crafted.columns()
    assert found["row", "flag"] == ["yes", "no"]
    assert found["row", "big"] == [1e30, None]
    assert found["row", "tags.style"] == ["oil", None]
    assert ("row", "list") not in found
    assert len(details[0]["cells"]["text"]) == 4001
    assert details[0]["cells"]["list"] == "[1, 2]"


def test_more_columns_than_there_is_room_for(crafted):
    row = {"prompt": "p", "images": [crafted.picture("a")], **{f"c{n}": n for n in range(MOST_COLUMNS + 5)}}
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [row], images=1)
    summary, _ = crafted.report()
    assert "no room for these columns: c" in summary["notes"][0]
    assert len(summary["columns"]) <= MOST_COLUMNS
    found = crafted.columns()
    assert found["picture", "state"] == ["kept"]


def test_an_error_of_the_whole_row_is_a_cell(crafted):
    row = {"prompt": "p", "images": [crafted.picture("a")], "s": None, "s_status": "failed", "s_error": "crash: oh"}
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [row], images=1)
    _, (entry,) = crafted.report()
    assert entry["scores"] == [["s", None, "failed", "crash: oh", ""]]
    assert entry["cells"]["s_error"] == "crash: oh"


def test_a_journal_with_damage_and_a_table_that_is_gone(crafted):
    crafted.given([{"prompt": "p"}, {"prompt": "q"}])
    journal = crafted.step(1, "Text2ImageGenerator", [], images=0)
    (journal / "summary.json").unlink()
    ending = pack_line(ending_record("ab" * 16, "refused", "refused", "no"))
    (journal / "main.jsonl").write_bytes(b"half a line\n" + ending)
    crafted.job('[storage]\nfirst_entry_file_name = "../in.jsonl"\n')
    summary, details = crafted.report()
    run = summary["runs"][0]
    assert (run["rows"], run["pending"], run["losses"], run["torn"]) == (2, 1, [[1, "refused", "refused", 1]], 1)
    assert details[0]["cells"] == {"request_id": "ab" * 16}


def test_an_input_that_cannot_be_read_leaves_the_counts_open(crafted):
    (crafted.folder / "in.jsonl").write_bytes(b"\x1f\x8b")
    journal = crafted.cache / "journal" / "run_step1"
    journal.mkdir(parents=True)
    crafted.job('[storage]\nfirst_entry_file_name = "../in.jsonl"\n')
    run = crafted.report()[0]["runs"][0]
    assert run["steps"][0]["rows"] is None
    assert not run["finished"]


def test_names_that_no_file_system_takes(crafted):
    rows = [{"prompt": "p", "images": [name]} for name in ("a\0b.png", "x" * 5000 + ".png", "nowhere/at/all.png")]
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", rows, images=3)
    _, details = crafted.report()
    assert all(each["problem"] and each["link"] is None for each in details)
    assert len(details) == 3


def test_a_picture_that_stands_twice_in_its_row_is_one(crafted):
    path = crafted.picture("a")
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [{"prompt": "p", "images": [path, path]}], images=1)
    summary, details = crafted.report()
    assert len(details) == 1
    assert summary["runs"][0]["pictures"] == {"made": [[1, 1]], "kept": 1, "losses": []}


def test_pictures_with_a_book_of_provenance(crafted):
    path = crafted.picture("a", request_id="a" * 32, seed=7, prompt="x" * 50_000, model="m")
    made = thumbnail(Path(path), Look(64, 80))
    assert made.facts == {"request_id": "a" * 32, "seed": 7, "model": "m"}


def test_an_index_that_is_none(tmp_path):
    (tmp_path / "thumbnails.sqlite").write_bytes(b"no database" * 100)
    assert Shelf.open(tmp_path) is None
    assert Shelf.open(tmp_path / "missing") is None


def test_an_index_whose_scripts_are_gone(crafted):
    crafted.given([{"prompt": "p"}])
    crafted.step(1, "Text2ImageGenerator", [{"prompt": "p", "images": [crafted.picture("a")]}], images=1)
    crafted.report()
    for path in (crafted.folder / "report" / "thumbs").iterdir():
        path.write_text("torn")
    with sqlite3.connect(crafted.folder / "report" / "thumbnails.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM made").fetchone() == (1,)
    connection.close()
    summary, _ = crafted.report()
    assert summary["unreadable"] == 0
    assert (crafted.folder / "report" / "thumbs" / "0.js").read_text().startswith("dataflowReport.put")
