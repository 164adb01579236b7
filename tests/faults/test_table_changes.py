"""Tables that change between runs, prompts of every kind, and changed settings: right images, nothing made in vain."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ODD_PROMPTS = [
    "一只在月光下奔跑的狐狸",
    "🦊🌙✨",
    "👩‍👩‍👧‍👦 at the beach",
    "a fox\nand\r\n\ta kite",
    "a/b/../../../etc/passwd",
    "..",
    "/",
    "C:\\con\\nul.png",
    "a\0fox",
    "\0",
    "'; DROP TABLE images; --\"`$(rm -rf /)`",
    "--steps=3",
    "{prompt} %s {0} \\n",
    "שלום العالم \u202e reversed",
    "e\u0301 is not é",
    "é is not e\u0301",
    " leading and trailing ",
    "leading and trailing",
    "NaN",
    "null",
    "007",
    "1e5",
    "\ufeffa mark",
    "\U0010ffff\uffff",
    "x" * 20_000,
    "x" * 20_001,
    "狐" * 20_000,
]


def state(site):
    """Old files, for the comparison afterwards; the pause makes a rewritten file's time differ."""
    files = site.files()
    time.sleep(0.02)
    return files


def untouched(site, before):
    """Every file of before is there with the same bytes and the same time; the number of new ones."""
    after = site.files()
    assert before.items() <= after.items(), "an old file was touched"
    return len(after) - len(before)


# The table's rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [1, 2])
def test_rows_are_inserted_reordered_and_removed(site, per_row):
    site.serving = {"images_per_prompt": per_row, "batch_size": 3}
    site.fill(["a", "b", "c", "d"]).run()
    first = dict(zip("abcd", [row["images"] for row in site.rows()], strict=True))
    before = state(site)

    site.fill(["new", "d", "b", "newer", "a", "c"])
    assert site.run().made == 2 * per_row
    rows = {row["conversations"]: row["images"] for row in site.rows()}
    assert first.items() <= rows.items(), "a row that moved keeps its images"
    assert untouched(site, before) == 2 * per_row
    site.check(per_row=per_row)

    site.fill(["c", "newer"])
    before = state(site)
    assert site.run().made == 0
    assert untouched(site, before) == 0, "images of removed rows are kept"
    site.check(per_row=per_row, ended=False)

    site.fill(["d", "c", "b", "a"])
    assert site.run().made == 0, "rows that come back find their images"
    assert {row["conversations"]: row["images"] for row in site.rows()} == first


def test_duplicated_prompts_get_images_of_their_own(site):
    site.fill(["twin", "other", "twin", "twin"]).run()
    paths = site.check()
    assert len({Path(path).read_bytes() for path in paths}) == 4
    before = state(site)
    site.fill(["twin", "twin", "twin", "twin", "other"])
    assert site.run().made == 1, "one twin more is one image more"
    assert untouched(site, before) == 1
    site.check()
    site.fill(["twin", "other"])
    assert site.run().made == 0
    assert [row["images"] for row in site.rows()] == [[paths[0]], [paths[1]]], "twins are told apart by their order"


def test_a_changed_prompt_makes_its_row_alone_again(site):
    site.fill(["a", "b", "c"]).run()
    before = state(site)
    site.fill(["a", "b!", "c"])
    assert site.run().made == 1
    assert untouched(site, before) == 1
    site.check(ended=False)


def test_columns_that_make_no_image_may_change(site):
    site.fill([{"conversations": "a", "note": 1}]).run()
    before = state(site)
    site.fill([{"conversations": "a", "note": [2], "more": {"x": None}}])
    assert site.run().made == 0
    assert untouched(site, before) == 0
    assert site.rows()[0]["note"] == [2]
    site.check()


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind(site):
    site.serving = {"batch_size": 4}
    summary = site.fill(ODD_PROMPTS).run()
    assert (summary.done, summary.made) == (len(ODD_PROMPTS), len(ODD_PROMPTS))
    site.check()
    assert all(re.fullmatch(r"([0-9a-f]{2})/\1[0-9a-f]{30}\.png", name) for name in site.files())
    before = state(site)
    site.fill(ODD_PROMPTS[::-1])
    assert site.run().made == 0
    assert untouched(site, before) == 0
    site.check()


def test_nothing_is_written_outside_of_the_given_folders(site):
    site.fill(ODD_PROMPTS).run()
    assert {path.name for path in site.root.iterdir()} == {"table.jsonl", "cache", "images", "generated.log"}
    assert not (site.root.parent / "passwd").exists()


@pytest.mark.parametrize("column", ["conversations", "negative_prompt"])
def test_a_lone_surrogate_fails_its_row_with_a_clear_error(site, column):
    """Half of an emoji, as tools leave it that cut text in the middle; UTF-8 cannot hold it."""
    rows = [
        {"conversations": "a fox"},
        {"conversations": "a fox, too", column: "cut \ud83e"},
        {"conversations": "kite"},
    ]
    summary = site.fill(rows).run()
    assert (summary.done, summary.failed) == (2, 1)
    good, bad, other = site.rows()
    assert good["images"]
    assert other["images"]
    assert bad["images"] == []
    assert bad[column] == "cut \ud83e", "the row itself is kept as it was"
    message = bad["images_error"]["message"]
    assert f"{site.table}, row 2" in message
    assert "not valid Unicode" in message
    site.fill([rows[0], {"conversations": "a fox, too"}, rows[2]])
    assert site.run().made == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode here")
def test_a_folder_whose_name_is_no_utf8(make_site, tmp_path):
    site = make_site(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    site.fill(["a fox", "a kite"])
    assert site.run().done == 2
    site.check()
    before = state(site)
    site.fill(["a fox", "a kite", "a cat"])
    assert site.run().made == 1
    assert untouched(site, before) == 1
    site.check()


# Settings -------------------------------------------------------------------------------------------------------------

CHANGES = {
    "model": {"model": "fake-2"},
    "step count": {"params": {"num_inference_steps": 9, "guidance_scale": 3.5}},
    "guidance": {"params": {"num_inference_steps": 8, "guidance_scale": 3.0}},
    "negative prompt": {"params": {"num_inference_steps": 8, "guidance_scale": 3.5, "negative_prompt": "blur"}},
    "size": {"size": (64, 32)},
    "run seed": {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_setting_makes_all_rows_again_and_touches_no_old_file(site, change):
    site.serving = {"params": {"num_inference_steps": 8, "guidance_scale": 3.5}}
    site.fill(["a", "b", "b"]).run()
    old = site.check()
    before = state(site)
    assert site.run(**change).made == 3
    assert untouched(site, before) == 3
    assert not set(old) & set(site.check(ended=False))
    assert site.run().made == 0, "going back costs nothing"
    assert site.check(ended=False) == old


def test_settings_that_do_not_change_the_picture_make_nothing_again(site):
    site.serving = {"params": {"num_inference_steps": 8, "guidance_scale": 4.0}}
    site.fill(["a", "b"]).run()
    before = state(site)
    same = {"batch_size": 2, "concurrency": 3, "params": {"guidance_scale": 4, "num_inference_steps": 8}}
    assert site.run(**same, options={"max_attempts": 1, "progress": False}).made == 0
    assert site.run(processes=2).made == 0
    assert untouched(site, before) == 0


OVERRIDES = {
    "seed": 7,
    "num_inference_steps": 9,
    "guidance_scale": 3.0,
    "negative_prompt": "blur",
    "true_cfg_scale": 2.0,
}


@pytest.mark.parametrize(("column", "value"), OVERRIDES.items())
def test_a_changed_column_makes_exactly_its_rows_again(site, column, value):
    site.fill([{"conversations": text} for text in "abcd"]).run()
    before = state(site)
    rows = [{"conversations": "a"}, {"conversations": "b", column: value}, *({"conversations": text} for text in "cd")]
    site.fill(rows)
    assert site.run().made == 1
    assert untouched(site, before) == 1
    site.check(ended=False)
    site.fill([{**row, column: row.get(column)} for row in rows])
    assert site.run().made == 0, "an empty cell says nothing"


def test_a_run_seed_leaves_rows_with_a_seed_of_their_own_alone(site):
    site.fill([{"conversations": "a", "seed": 5}, {"conversations": "b"}]).run()
    before = state(site)
    assert site.run(seed=99).made == 1
    assert untouched(site, before) == 1


# Input images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(make_site, tmp_path):
    site = make_site(tmp_path / "edits", task="edit")
    for colour in ("red", "teal", "gold"):
        Image.new("RGB", (32, 32), colour).save(site.root / f"{colour}.png")
    site.fill([{"conversations": "brighter", "images": f"{colour}.png"} for colour in ("red", "teal", "gold")])
    assert site.run().made == 3
    site.check()
    return site


def test_the_changed_content_of_an_input_image_makes_its_rows_again(edits):
    before = state(edits)
    Image.new("RGB", (32, 32), "black").save(edits.root / "teal.png")
    assert edits.run().made == 1
    assert untouched(edits, before) == 1
    edits.check(ended=False)


def test_an_input_image_that_is_only_moved_or_touched_makes_nothing_again(edits):
    before = state(edits)
    (edits.root / "teal.png").touch()
    (edits.root / "sub").mkdir()
    (edits.root / "gold.png").rename(edits.root / "sub/or.png")
    files = ["red.png", str(edits.root / "teal.png"), "sub/or.png"]
    edits.fill([{"conversations": "brighter", "images": [name]} for name in files])
    assert edits.run().made == 0
    assert untouched(edits, before) == 0


def test_input_images_swapped_under_their_names_swap_their_results(edits):
    first = [row["edited_images"] for row in edits.rows()]
    red, teal = (edits.root / "red.png").read_bytes(), (edits.root / "teal.png").read_bytes()
    (edits.root / "red.png").write_bytes(teal)
    (edits.root / "teal.png").write_bytes(red)
    before = state(edits)
    assert edits.run().made == 0, "both pictures were edited before"
    assert [row["edited_images"] for row in edits.rows()] == [first[1], first[0], first[2]]
    assert untouched(edits, before) == 0


def test_a_changed_first_turn_makes_the_turns_after_it_again_and_no_other(edits):
    def talk(*turns):
        return {"conversations": [{"role": "user", "content": turn} for turn in turns], "images": "red.png"}

    edits.fill([talk("brighter", "rounder", "smaller"), talk("darker", "rounder")])
    assert edits.run().made == 4, "the first turn of the first row is done"
    edits.check(ended=False)
    before = state(edits)
    edits.fill([talk("brighter", "sharper", "smaller"), talk("darker", "rounder")])
    assert edits.run().made == 2
    assert untouched(edits, before) == 2
    edits.check(ended=False)


@pytest.mark.parametrize(
    "name", ["图片 🦊.png", "with space & 'quote'.png", "-rf.png", "a\nb.png", "%2e%2e.png", "x" * 200]
)
def test_input_images_of_every_name(edits, name):
    (edits.root / "red.png").rename(edits.root / name)
    edits.fill([{"conversations": "brighter", "images": [name]}])
    assert edits.run().made == 0
    edits.fill([{"conversations": "darker", "images": [name]}])
    assert edits.run().made == 1
    edits.check(ended=False)


# While a step runs ----------------------------------------------------------------------------------------------------


def test_a_table_that_changes_while_the_step_runs_is_not_mixed_up(site, nursery):
    site.serving = {"seconds": 0.02}
    site.fill(["a", "b", "c", "d"]).run()
    table = site.output.read_bytes()
    site.fill(["e", "f", "g", "h"] * 3)
    nursery.start(site.job())
    end = time.monotonic() + 10
    while len(site.generated()) < 6:
        assert time.monotonic() < end
        time.sleep(0.005)
    site.fill(["x", "y"])
    assert nursery.end() != 0
    assert "changed while" in nursery.errors.read_text()
    assert site.output.read_bytes() == table, "the old table stays"
    summary = site.run()
    assert (summary.done, summary.made) == (2, 2)
    site.check(ended=False)
