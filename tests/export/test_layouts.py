"""What a sample is, and whose score is whose."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.export.making import made, members, pixels

from dataflow.errors import ConfigError, InputError
from dataflow.export import ExportOptions, export
from dataflow.operators import ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.utils.storage import FileStorage


def records(shop, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (shop.out / f"{split}.jsonl").read_text().splitlines()]


def seeds(shop, record: dict, column: str) -> np.ndarray:
    return pixels(shop.out / record[column])


# Edits


def test_an_edit_has_its_source_its_instruction_and_its_own_score(shop):
    shop.export(shop.edits(3, samples=2), format="jsonl")
    found = records(shop)
    assert len(found) == 6
    for place, each in enumerate(found):
        row, k = divmod(place, 2)
        assert np.array_equal(seeds(shop, each, "source_image"), made(5000 + row))
        assert np.array_equal(seeds(shop, each, "edited_image"), made(6000 + 100 * row + k))
        assert each["instruction"] == f"make circle {row} green"
        assert (each["preserved"], each["preserved_status"]) == (row + k / 10, "ok")
        assert each["license"] == "cc-by-4.0"
        assert each["seed"] == 6000 + 100 * row + k
        assert each["source_sha256"] != each["sha256"]


def test_references_are_kept_in_order(shop):
    sources = [shop.file(f"{k}.png", k) for k in range(3)]
    shop.export(
        shop.table([{"prompt": "x", "images": sources, "edited_images": [shop.picture(9, "x")]}]), format="jsonl"
    )
    (found,) = records(shop)
    assert np.array_equal(pixels(shop.out / found["source_image"]), made(0))
    assert [pixels(shop.out / path).tolist() for path in found["reference_images"]] == [
        made(1).tolist(),
        made(2).tolist(),
    ]


def test_an_edit_without_a_source_is_left_out(shop):
    row = {"prompt": "x", "images": [""], "edited_images": [shop.picture(9, "x")]}
    summary = shop.export(shop.table([row]), format="jsonl", layout="edit", source_key="images")
    assert summary.left_out == {"no_source": 1}


# Scores of several pictures


def test_scores_that_could_be_anybodys_are_refused_until_it_is_said_whose_they_are(shop):
    row = {
        "prompt": "x",
        "images": [shop.file("a.png", 1), shop.file("b.png", 2)],
        "edited_images": [shop.picture(3, "x"), shop.picture(4, "x")],
        "clip": [0.1, 0.2],
        "clip_status": ["ok", "ok"],
    }
    table = shop.table([row])
    with pytest.raises(InputError, match=r"row 1, column 'clip'.*--scores-of clip=edited_images"):
        shop.export(table, format="jsonl")
    shop.export(table, format="jsonl", scores_of={"clip": "edited_images"})
    assert [each["clip"] for each in records(shop)] == [0.1, 0.2]


def test_scores_of_the_source_stay_the_sources(shop):
    row = {
        "prompt": "x",
        "images": [shop.file("a.png", 1), shop.file("b.png", 2)],
        "edited_images": [shop.picture(3, "x"), shop.picture(4, "x")],
        "clip": [0.1, 0.2],
        "clip_status": ["ok", "ok"],
    }
    shop.export(shop.table([row]), format="jsonl", scores_of={"clip": "images"})
    assert [each["source_clip"] for each in records(shop)] == [0.1, 0.1]
    assert all("clip" not in each for each in records(shop))


@pytest.mark.parametrize("scores", [[0.5], [0.1, 0.2, 0.3], 0.5])
def test_a_score_that_cannot_be_given_to_a_picture_is_null_and_counted(shop, scores):
    statuses = ["ok"] * len(scores) if isinstance(scores, list) else ["ok", "ok"]
    row = {"prompt": "x", "images": [shop.picture(k, "x") for k in range(2)], "clip": scores, "clip_status": statuses}
    summary = shop.export(shop.table([row]), format="jsonl")
    assert summary.misaligned == 2
    assert [(each["clip"], each["clip_status"]) for each in records(shop)] == [(None, "misaligned")] * 2


def test_null_and_nan_scores_are_null(shop):
    line = (
        '{"prompt":"x","images":["%s","%s"],"clip":[NaN,null],"clip_status":["ok","timeout"],"clip_error":["","slow"]}'
    )
    table = shop.table([line % (shop.picture(1, "x"), shop.picture(2, "x"))])
    shop.export(table, format="jsonl")
    found = records(shop)
    assert [(each["clip"], each["clip_status"], each["clip_error"]) for each in found] == [
        (None, "ok", ""),
        (None, "timeout", "slow"),
    ]


def test_a_score_of_the_row_goes_to_all_its_samples(shop):
    row = shop.row(0, 2, preference={"winner": "first"}, preference_status="ok")
    shop.export(shop.table([row]), format="jsonl")
    assert [each["preference"] for each in records(shop)] == [{"winner": "first"}] * 2


def test_a_path_that_is_no_list_has_one_score(shop):
    row = {"prompt": "x", "image": shop.picture(1, "x"), "clip": 0.25, "clip_status": "ok"}
    shop.export(shop.table([row]), format="jsonl")
    assert records(shop)[0]["clip"] == 0.25


def test_empty_places_in_a_list_are_no_pictures(shop):
    row = {"prompt": "x", "images": ["", shop.picture(1, "x"), None], "clip": [0.25], "clip_status": ["ok"]}
    summary = shop.export(shop.table([row]), format="jsonl")
    assert (summary.written, records(shop)[0]["clip"]) == (1, 0.25)


# Several turns


def turn_row(shop, chains: list[list[int]], turns: int = 3) -> dict:
    prompts = [f"turn {number}" for number in range(turns)]
    made_by_chain = [[shop.picture(seed, prompts[k]) for k, seed in enumerate(chain)] for chain in chains]
    return {
        "conversations": [{"role": "user", "content": prompt} for prompt in prompts],
        "images": [shop.file("source.png", 1)],
        "edited_images": [chain[-1] for chain in made_by_chain if len(chain) == turns],
        "edited_images_turns": made_by_chain,
        "edited_images_error": {"status": "failed", "reason": "timeout", "message": "slow"},
        "judge": [chain[-1] for chain in chains if len(chain) == turns],
        "judge_status": ["ok" for chain in chains if len(chain) == turns],
    }


def test_turns_stay_in_order_and_unfinished_samples_are_left_out(shop):
    row = turn_row(shop, [[11, 12, 13], [21, 22], [31, 32, 33]])
    summary = shop.export(shop.table([row]), format="jsonl")
    assert (summary.layout, summary.written, summary.incomplete) == ("multi_turn", 2, 1)
    for each, chain in zip(records(shop), ([11, 12, 13], [31, 32, 33]), strict=True):
        assert each["instructions"] == ["turn 0", "turn 1", "turn 2"]
        for path, seed in zip(each["turn_images"], chain, strict=True):
            assert np.array_equal(pixels(shop.out / path), made(seed))
        assert each["judge"] == each["seed"] == chain[-1]
        assert np.array_equal(pixels(shop.out / each["source_image"]), made(1))


def test_a_row_without_a_finished_sample_is_left_out(shop):
    row = turn_row(shop, [[11, 12]]) | {"edited_images": [shop.picture(5, "x")]}
    assert shop.export(shop.table([row]), format="jsonl").left_out == {"unfinished_turns": 1}


def test_turns_in_webdataset_have_a_number_each(shop):
    shop.export(shop.table([turn_row(shop, [[11, 12, 13]])]))
    names = list(members(shop.out / "train-000000.tar"))
    assert names == [
        f"000000001-000.{end}"
        for end in ("source_image.png", "turn_images.0.png", "turn_images.1.png", "turn_images.2.png", "json", "txt")
    ]


def test_turns_that_are_no_lists_of_paths_are_told(shop):
    row = turn_row(shop, [[11, 12, 13]]) | {"edited_images_turns": "no"}
    shop.export(shop.table([row]), format="jsonl")
    assert shop.left_out()[0]["reason"] == "bad_column"


# Preference pairs


def test_losers_of_a_filter_are_the_rejected_ones(shop):
    table = shop.scored(3, 3)
    storage = FileStorage(str(table), cache_path=str(shop.folder / "cache")).step()
    ScoreFilter(options=RunOptions(quiet=True)).run(
        storage, input_score_key="judge.value", top_k=1, output_rejected_key="losers"
    )
    summary = shop.export(storage.output_path, format="jsonl", rejected_key="losers")
    assert (summary.layout, summary.written) == ("preference", 6)
    for place, each in enumerate(records(shop)):
        row, loser = divmod(place, 2)
        assert np.array_equal(seeds(shop, each, "chosen"), made(100 * row + 2))
        assert np.array_equal(seeds(shop, each, "rejected"), made(100 * row + loser))
        assert each["chosen_judge"]["value"] == row + 0.2
        assert "rejected_judge" not in each
        assert (each["chosen_seed"], each["rejected_seed"]) == (100 * row + 2, 100 * row + loser)


def test_with_a_score_the_best_of_the_kept_is_chosen(shop):
    row = shop.row(0, 2) | {"losers": [shop.picture(77, "x")]}
    shop.export(shop.table([row]), format="jsonl", rejected_key="losers", score_key="judge.value")
    assert records(shop)[0]["chosen_seed"] == 1


@pytest.mark.parametrize("lower_better", [False, True])
def test_the_best_picture_is_preferred_to_the_worst(shop, lower_better):
    shop.export(shop.scored(2, 3), format="jsonl", score_key="judge.value", lower_better=lower_better)
    for row, each in enumerate(records(shop)):
        best, worst = (0, 2) if lower_better else (2, 0)
        assert (each["chosen_seed"], each["rejected_seed"]) == (100 * row + best, 100 * row + worst)
        assert each["chosen_judge"]["value"] == row + best / 10
        assert each["rejected_judge"]["value"] == row + worst / 10


def test_pairs_that_are_none_are_left_out_with_their_reason(shop):
    same = shop.row(0, 2, judge=[{"value": 1.0}, {"value": 1.0}])
    alone = shop.row(1, 1)
    unknown = shop.row(2, 2, judge=[None, None], judge_status=["timeout", "timeout"])
    half = shop.row(3, 2, judge=[{"value": 1.0}, None], judge_status=["ok", "timeout"])
    summary = shop.export(shop.table([same, alone, unknown, half]), format="jsonl", score_key="judge.value")
    assert summary.left_out == {"no_pair": 2, "no_score": 1, "tie": 1}


def test_a_small_margin_is_a_tie(shop):
    assert shop.export(shop.scored(1, 2), format="jsonl", score_key="judge.value", min_margin=0.5).left_out == {
        "tie": 1
    }


@pytest.mark.parametrize(("verdict", "chosen"), [({"winner": "second"}, 1), ("first", 0)])
def test_a_judges_verdict_makes_a_pair(shop, verdict, chosen):
    table = shop.table([shop.row(0, 2, preference=verdict, preference_status="ok")])
    shop.export(table, format="jsonl", preference_key="preference")
    (found,) = records(shop)
    assert (found["chosen_seed"], found["rejected_seed"]) == (chosen, 1 - chosen)


def test_ties_and_missing_verdicts_are_left_out(shop):
    rows = [
        shop.row(0, 2, preference={"winner": "tie"}),
        shop.row(1, 2, preference=None),
        shop.row(2, 1, preference={"winner": "first"}),
    ]
    summary = shop.export(shop.table(rows), format="jsonl", preference_key="preference")
    assert summary.left_out == {"no_pair": 1, "no_verdict": 1, "tie": 1}


def test_a_row_without_losers_gives_no_pair(shop):
    table = shop.table([shop.row(0, 1, losers=[])])
    assert shop.export(table, format="jsonl", rejected_key="losers").left_out == {"no_loser": 1}


# Columns


def test_columns_are_chosen_filled_and_renamed(shop):
    shop.export(
        shop.scored(1, 1),
        format="jsonl",
        columns=("prompt", "o_score"),
        fill={"o_score": "judge.value"},
        rename={"prompt": "caption"},
    )
    assert list(records(shop)[0]) == ["id", "image", "caption", "o_score"]
    assert records(shop)[0]["o_score"] == 0.0


def test_excluded_columns_are_gone(shop):
    shop.export(shop.scored(1, 1), format="jsonl", exclude=("judge", "topic"))
    assert not {"judge", "topic"} & set(records(shop)[0])


def test_a_column_of_the_row_does_not_hide_what_the_picture_says(shop):
    row = shop.row(0, 1, seed=7, model="what the row says")
    shop.export(shop.table([row]), format="jsonl")
    (found,) = records(shop)
    assert (found["seed"], found["row_seed"]) == (0, 7)
    assert (found["model"], found["row_model"]) == ("some/model", "what the row says")


def test_no_column_is_lost_to_another_of_its_name(shop):
    row = shop.row(0, 1, seed=7, row_seed=8, id="mine", width=[0.5], width_status=["ok"], prompt="also a column")
    shop.export(shop.table([row]), format="jsonl")
    (found,) = records(shop)
    assert (found["seed"], found["row_seed"], found["row_row_seed"]) == (0, 7, 8)
    assert (found["id"], found["row_id"]) == ("000000001-000", "mine")
    assert (found["width"], found["row_width"], found["row_width_status"]) == (16, 0.5, "ok")
    assert (found["prompt"], found["row_prompt"]) == ("a red circle number 0", "also a column")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("nope",)}, "columns names 'nope'"),
        ({"rename": {"nope": "x"}}, "rename names 'nope'"),
        ({"rename": {"prompt": "id"}}, "the name 'id', which another column has"),
        ({"split_by": "nope", "test": 0.5}, "split_by is 'nope'"),
        ({"split_by": "source", "test": 0.5}, "no source pictures"),
        ({"layout": "preference"}, "preference pairs need"),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(shop, options, message):
    with pytest.raises(ConfigError, match=message):
        shop.export(shop.scored(1, 1), format="jsonl", **options)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "x", "image": "a.png"}, {"image_key": "nope"}, "no such column"),
        ({"prompt": "x", "picture": "a.png"}, {}, "--image-column"),
        ({"words": "x", "image": "a.png"}, {}, "--column"),
        ({"prompt": "x", "image": "a.png"}, {"layout": "edit"}, "--source-column"),
    ],
)
def test_columns_that_are_missing_are_told(shop, row, options, message):
    with pytest.raises(InputError, match=message):
        shop.export(shop.table([row]), **options)


def test_a_swap_of_two_names_is_a_rename(shop):
    shop.export(shop.scored(1, 1), format="jsonl", rename={"prompt": "topic", "topic": "prompt"})
    assert records(shop)[0]["prompt"] == "topic 0"


def test_pictures_of_another_prompt_are_counted(shop):
    rows = [
        {"prompt": "a fox", "image": shop.picture(1, "a fox")},
        {"prompt": "a cat", "image": shop.picture(2, "a dog")},
    ]
    assert shop.export(shop.table(rows)).other_prompts == 1


def test_a_jobs_file_says_which_prompt_and_whose_score(tmp_path, shop):
    # The pictures of the second step were made from the column `edit`, and `clip` is about the first step's.
    cache = shop.folder / "job"
    cache.mkdir()
    (cache / "job.toml").write_text(
        '[storage]\nfirst_entry_file_name = "in.jsonl"\ncache_path = "."\n'
        '[[step]]\noperator = "Text2ImageGenerator"\nserving = "a"\n'
        '[[step]]\noperator = "ImageEvaluator"\nserving = "b"\noutput_key = "clip"\n'
        '[[step]]\noperator = "PromptedImageEditGenerator"\nserving = "a"\ninput_conversation_key = "edit"\n'
    )
    row = {
        "conversations": "a circle",
        "edit": "make it blue",
        "images": [shop.picture(1, "a circle"), shop.picture(2, "a circle")],
        "edited_images": [shop.picture(3, "make it blue"), shop.picture(4, "make it blue")],
        "clip": [0.5, 0.75],
        "clip_status": ["ok", "ok"],
    }
    table = shop.table([row], "job/dataflow_cache_step_step3.jsonl")
    summary = export(table, shop.out, ExportOptions(format="jsonl"))
    found = records(shop)
    assert (summary.other_prompts, summary.layout) == (0, "edit")
    assert [(each["instruction"], each["source_clip"]) for each in found] == [("make it blue", 0.5)] * 2
    other = export(table, tmp_path / "first", ExportOptions(format="jsonl", image_key="images"))
    assert (other.other_prompts, other.layout) == (0, "text_image")
    lines = [json.loads(line) for line in (tmp_path / "first" / "train.jsonl").read_text().splitlines()]
    assert [(each["prompt"], each["clip"]) for each in lines] == [("a circle", 0.5), ("a circle", 0.75)]
    assert "edited_images" not in lines[0]
