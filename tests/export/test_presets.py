"""Layouts of published datasets: exact columns, exact files, every value its own."""

from __future__ import annotations

import json
import tarfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.export.making import files_of, made, members, pixels

from dataflow.errors import ConfigError
from dataflow.export import FORMATS, PRESETS, ExportOptions, export
from dataflow.export.presets import packing_of

PICO = ["open_image_input_url", "text", "output_image", "edit_type", "summarized_text"]
OMNIEDIT = [
    "omni_edit_id",
    "task",
    "src_img",
    "edited_img",
    "edited_prompt_list",
    "width",
    "height",
    "sc_score_1",
    "sc_score_2",
    "sc_reasoning",
    "pq_score",
    "pq_reasoning",
    "o_score",
]
ULTRAEDIT = [
    "clip_sim_source",
    "clip_sim_target",
    "clip_sim_dir",
    "clip_sim_image",
    "dinov2_sim",
    "ssim",
    "source_caption",
    "target_caption",
    "idx",
    "edit_prompt",
    "source_image",
    "edited_image",
]
DIFFUSIONDB = [
    "image_name",
    "prompt",
    "part_id",
    "seed",
    "step",
    "cfg",
    "sampler",
    "width",
    "height",
    "user_name",
    "timestamp",
    "image_nsfw",
    "prompt_nsfw",
]


def lines(shop, name: str = "train.jsonl") -> list[dict]:
    return [json.loads(line) for line in (shop.out / name).read_text().splitlines()]


def multi_turn(shop):
    row = {
        "conversations": [{"role": "user", "content": text} for text in ("first", "second")],
        "images": [shop.file("s.png", 1)],
        "edited_images": [shop.picture(3, "second")],
        "edited_images_turns": [[shop.picture(2, "first"), shop.picture(3, "second")]],
    }
    return shop.table([row])


def test_pico_banana(shop):
    shop.export(shop.edits(2), preset="pico_banana", published_only=True)
    for row, each in enumerate(lines(shop)):
        assert list(each) == PICO
        assert np.array_equal(pixels(shop.out / each["open_image_input_url"]), made(5000 + row))
        assert np.array_equal(pixels(shop.out / each["output_image"]), made(6000 + 100 * row))
        assert (each["text"], each["edit_type"]) == (f"make circle {row} green", None)


def test_pico_banana_preference(shop):
    shop.export(shop.scored(2, 2), preset="pico_banana_preference", score_key="judge.value", published_only=True)
    for row, each in enumerate(lines(shop)):
        assert sorted(each) == sorted([*PICO, "rejected_images"])
        assert np.array_equal(pixels(shop.out / each["output_image"]), made(100 * row + 1))
        assert np.array_equal(pixels(shop.out / each["rejected_images"][0]), made(100 * row))


def test_pico_banana_multi_turn(shop):
    shop.export(multi_turn(shop), preset="pico_banana_multi_turn", published_only=True, base_url="https://cdn/x")
    (found,) = lines(shop)
    assert list(found) == ["files", "metadata_edit_turn_prompts"]
    assert [each["id"] for each in found["files"]] == ["edit_turn1", "final_image", "original_input_image"]
    assert all(each["url"].startswith("https://cdn/x/") for each in found["files"])
    assert found["metadata_edit_turn_prompts"] == ["first", "second"]


def test_imgedit(shop):
    shop.export(shop.edits(3), preset="imgedit", published_only=True, shard_samples=2)
    found = pq.read_table(shop.out / "train.parquet").to_pylist()
    for tar in sorted((shop.out / "images").glob("*.tar")):
        with tarfile.open(tar) as file:
            file.extractall(shop.out, filter="data")
    assert sorted(path.name for path in (shop.out / "images").glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    for row, each in enumerate(found):
        assert list(each) == ["input_images", "output_images", "prompt"]
        assert np.array_equal(pixels(shop.out / each["input_images"][0]), made(5000 + row))
        assert np.array_equal(pixels(shop.out / each["output_images"][0]), made(6000 + 100 * row))


def test_omniedit(shop):
    shop.export(shop.edits(2), preset="omniedit", published_only=True, fill={"o_score": "preserved"})
    found = datasets.load_dataset(str(shop.out), cache_dir=str(shop.folder / "hf"), split="train")
    assert found.column_names == OMNIEDIT
    assert found.features["sc_score_1"].dtype == "float64"
    for row, each in enumerate(found):
        assert np.array_equal(np.asarray(each["src_img"]), made(5000 + row))
        assert np.array_equal(np.asarray(each["edited_img"]), made(6000 + 100 * row))
        assert (each["edited_prompt_list"], each["o_score"]) == ([f"make circle {row} green"], float(row))
        assert (each["width"], each["height"], each["sc_score_1"], each["task"]) == (16, 12, None, None)


def test_scores_and_provenance_follow_behind_the_published_columns(shop):
    shop.export(shop.edits(1), preset="omniedit")
    names = pq.read_schema(shop.out / "data" / "train-00000-of-00001.parquet").names
    assert names[: len(OMNIEDIT)] == OMNIEDIT
    assert {"preserved", "preserved_status", "license", "model", "revision", "seed", "sha256"} <= set(names)


def test_ultraedit(shop):
    shop.export(shop.edits(2), preset="ultraedit", published_only=True, fill={"ssim": "preserved"})
    found = pq.read_table(shop.out / "data")
    assert found.column_names == ULTRAEDIT
    assert found["ssim"].to_pylist() == [0.0, 1.0]


def test_sharegpt4o(shop):
    shop.export(shop.edits(2), preset="sharegpt4o_image_edit", published_only=True)
    found = json.loads((shop.out / "text_and_image_to_image.json").read_text())
    assert [list(each) for each in found] == [["input_prompt", "input_image", "output_image"]] * 2
    tar = members(shop.out / "images" / "train-000000.tar")
    assert np.array_equal(pixels(tar[found[1]["output_image"]]), made(6100))
    assert np.array_equal(pixels(tar[found[1]["input_image"][0]]), made(5001))


def test_a_table_of_one_name_has_one_for_each_split(shop):
    shop.export(shop.scored(12, 1), preset="sharegpt4o_image", test=0.4)
    counts = {
        name: len(json.loads((shop.out / f"text_to_image_{name}.json").read_text())) for name in ("train", "test")
    }
    assert sum(counts.values()) == 12
    assert min(counts.values()) > 0


def test_blip3o(shop):
    shop.export(shop.scored(2, 1), preset="blip3o", encode="jpeg")
    ends = [name.split(".", 1)[1] for name in members(shop.out / "train-000000.tar")]
    assert ends == ["jpg", "json", "txt"] * 2


def test_gpt_image_edit(shop):
    shop.export(shop.edits(2), preset="gpt_image_edit")
    found = json.loads((shop.out / "edit" / "train.json").read_text())
    assert np.array_equal(pixels(shop.out / "edit" / found[1]["edited_image"]), made(6100))


def test_hpdv3(shop):
    shop.export(shop.scored(2, 3), preset="hpdv3", score_key="judge.value", published_only=True)
    found = json.loads((shop.out / "train.json").read_text())
    tar = members(shop.out / "images" / "train-000000.tar")
    for row, each in enumerate(found):
        assert list(each) == ["prompt", "path1", "path2", "confidence", "model1", "model2"]
        assert np.array_equal(pixels(tar[each["path1"]]), made(100 * row + 2))
        assert np.array_equal(pixels(tar[each["path2"]]), made(100 * row))
        assert each["model1"] == each["model2"] == "some/model"


def test_diffusiondb(shop):
    row = {"prompt": "x", "image": shop.picture(900, "x", provenance={"scheduler": "DDIMScheduler"})}
    rows = [{"prompt": f"p{n}", "image": shop.picture(n, f"p{n}")} for n in range(3)]
    shop.export(shop.table([*rows, row]), preset="diffusiondb", published_only=True, shard_samples=3)
    found = pq.read_table(shop.out / "metadata.parquet").to_pylist()
    assert list(found[0]) == DIFFUSIONDB
    assert [each["part_id"] for each in found] == [1, 1, 1, 2]
    for each, seed in zip(found, (0, 1, 2, 900), strict=True):
        folder = shop.out / "images" / f"part-{each['part_id']:06d}"
        assert np.array_equal(pixels(folder / each["image_name"]), made(seed))
        part = json.loads((folder / f"{folder.name}.json").read_text())[each["image_name"]]
        assert part == {"p": each["prompt"], "se": seed, "c": 3.5, "st": 12, "sa": each["sampler"]}
    assert [each["sampler"] for each in found] == [None, None, None, "DDIMScheduler"]
    assert pq.read_schema(shop.out / "metadata.parquet").field("cfg").type == "double"


def test_diffusiondb_has_no_splits(shop):
    with pytest.raises(ConfigError, match="has no splits"):
        shop.export(shop.scored(2, 1), preset="diffusiondb", test=0.5)


def test_instruct_pix2pix_as_parquet(shop):
    shop.export(shop.edits(2), preset="instruct_pix2pix", format="parquet", published_only=True)
    found = datasets.load_dataset(str(shop.out), cache_dir=str(shop.folder / "hf"), split="train")
    assert found.column_names == ["input_image", "edit_prompt", "edited_image"]
    assert np.array_equal(np.asarray(found[1]["edited_image"]), made(6100))


def test_kohya_has_captions(shop):
    shop.export(shop.scored(2, 1), preset="kohya")
    captions = {name: data.decode() for name, data in files_of(shop.out / "train").items() if name.endswith(".txt")}
    assert captions == {f"000000/{row + 1:09d}-000.txt": f"a red circle number {row}" for row in range(2)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_every_preset_in_every_format_is_whole(shop, preset, kind):
    layout = PRESETS[preset].layout
    table = {"edit": shop.edits, "multi_turn": lambda: multi_turn(shop)}.get(layout, lambda: shop.scored(2, 2))()
    options = {"score_key": "judge.value"} if layout == "preference" else {}
    summary = shop.export(table, preset=preset, format=kind, **options)
    assert summary.written == summary.samples > 0
    assert summary.preset == preset
    assert packing_of(PRESETS[preset], kind) == summary.format
    again = export(table, shop.out, ExportOptions(preset=preset, format=kind, **options))
    assert again.written == summary.written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "nope"}, "there is no preset 'nope'; choose one of pico_banana"),
        ({"preset": "hpdv3", "layout": "edit"}, "has the layout preference"),
    ],
)
def test_presets_that_do_not_fit_are_refused(shop, options, message):
    with pytest.raises(ConfigError, match=message):
        shop.export(shop.scored(1, 1), **options)
