"""``dataflow export``: arguments, exit codes, what is printed; and the options that it makes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tests.export.making import members

from dataflow.annotations import fits, hints_of
from dataflow.commands.export import export as command
from dataflow.commands.export import options_of
from dataflow.commands.export_options import ENCODINGS, FORMATS, LAYOUTS, add_export
from dataflow.errors import ConfigError, InputError
from dataflow.export import PRESETS, ExportOptions, options


def parsed(*arguments: str) -> argparse.Namespace:
    """As the command line parses them."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")

    def add(name: str, summary: str, description: str, examples: str, usage: str | None = None):
        assert examples
        return commands.add_parser(name, usage=usage, help=summary, description=description, allow_abbrev=False)

    add_export(add)
    return parser.parse_args(["export", *arguments], argparse.Namespace(quiet=False, verbose=False))


def run(*arguments: str) -> int:
    return command(parsed(*arguments))


def test_it_exports_and_says_what_became_of_every_row(shop, capsys):
    refused = {"conversations": "x", "images": [], "images_error": {"status": "refused", "reason": "safety"}}
    table = shop.table([shop.row(0, 2), refused])
    assert run(str(table), "-o", str(shop.out)) == 0
    told = capsys.readouterr().out
    assert "2 rows = 1 used + 1 refused" in told
    assert "2 samples = 2 written" in told
    assert "train 2" in told
    assert "left_out.jsonl" in told
    assert run(str(table), "-o", str(shop.out)) == 0
    assert "1 of the shards were there already" in capsys.readouterr().out


def test_a_missing_picture_is_exit_code_1(shop, capsys):
    table = shop.scored(2, 1)
    Path(shop.row(0, 1)["images"][0]).unlink()
    assert run(str(table), "-o", str(shop.out)) == 1
    assert "2 samples = 1 written + 1 missing" in capsys.readouterr().out


def test_warnings_are_told(shop, capsys):
    rows = [shop.row(0, 2, judge_status=["ok"], images_error={"status": "failed"})]
    rows.append({"conversations": "another", "images": [shop.picture(9, "not this")]})
    run(str(shop.table(rows)), "-o", str(shop.out), "--preset", "blip3o")
    told = capsys.readouterr().out
    assert "text_image as blip3o, webdataset" in told
    assert "1 rows have fewer pictures than they asked for" in told
    assert "2 samples have a score that could not be given to its picture" in told
    assert "1 pictures say that they were made from another prompt" in told


def test_json_has_the_counts(shop, capsys):
    run(str(shop.scored(2, 1)), "-o", str(shop.out), "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["written"], found["balanced"]) == (2, True)


def test_quiet_says_nothing(shop, capsys):
    args = parsed(str(shop.scored(1, 1)), "-o", str(shop.out))
    args.quiet = True
    command(args)
    assert capsys.readouterr() == ("", "")


def test_presets_are_listed(capsys):
    assert run("-", "-o", "-", "--preset", "list") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in PRESETS)


def test_every_argument_becomes_an_option(shop):
    args = parsed(
        *("t", "-o", "out", "--format", "folder", "--preset", "kohya", "--layout", "text_image", "--overwrite"),
        *("--image-column", "i", "--source-column", "s", "--column", "p", "--rejected-column", "r", "--score", "j.v"),
        *("--preference-column", "c", "--lower-better", "--min-margin", "0.5", "--exclude", "b"),
        *("--rename", "a=b", "--rename", "c=d", "--fill", "x=y.z", "--scores-of", "clip=images", "--published-only"),
        *("--validation", "0.1", "--test", "0.2", "--split-by", "source", "--split-seed", "3"),
        *("--shard-samples", "5", "--shard-size", "1.5MB", "--encode", "jpeg", "--quality", "90"),
        *("--bucket", "512", "--bucket-step", "32", "--bucket-max-aspect", "3", "--bucket-fit", "pad"),
        *("--check", "decode", "--captions", "--copy-images", "--workers", "2", "--name", "n", "--license", "mit"),
    )
    assert options_of(args) == ExportOptions(
        format="folder",
        preset="kohya",
        layout="text_image",
        overwrite=True,
        image_key="i",
        source_key="s",
        prompt_key="p",
        rejected_key="r",
        score_key="j.v",
        preference_key="c",
        lower_better=True,
        min_margin=0.5,
        exclude=("b",),
        rename={"a": "b", "c": "d"},
        fill={"x": "y.z"},
        scores_of={"clip": "images"},
        published_only=True,
        validation=0.1,
        test=0.2,
        split_by="source",
        split_seed=3,
        shard_samples=5,
        shard_bytes=3 << 19,
        encode="jpeg",
        quality=90,
        bucket_resolution=512,
        bucket_step=32,
        bucket_max_aspect=3,
        bucket_fit="pad",
        check="decode",
        captions=True,
        copy_images=True,
        workers=2,
        name="n",
        license="mit",
    )
    assert options_of(parsed("t", "-o", "o")) == ExportOptions()
    assert options_of(
        parsed("t", "-o", "o", "--keep", "a", "--max-side", "9", "--base-url", "https://x", "--image-root", "r")
    )


def test_the_command_line_knows_the_same_words():
    assert (FORMATS, LAYOUTS, ENCODINGS) == (options.FORMATS, options.LAYOUTS, options.ENCODINGS)
    code = "import sys, dataflow.commands.export_options\nprint([n for n in ('numpy', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--rename names 'a' twice"):
        options_of(parsed("t", "-o", "o", "--rename", "a=b", "--rename", "a=c"))


@pytest.mark.parametrize(
    "arguments", [("--rename", "ab"), ("--rename", "=b"), ("--shard-size", "big"), ("--format", "zip"), ("--test", "x")]
)
def test_arguments_of_the_wrong_form_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("t", "-o", "o", *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"format": "zip"},
        {"layout": "x"},
        {"encode": "gif"},
        {"bucket_fit": "x"},
        {"check": "x"},
        {"quality": 0},
        {"shard_samples": 0},
        {"max_side": 0},
        {"workers": 0},
        {"validation": 1.5},
        {"test": math.nan},
        {"validation": 0.6, "test": 0.6},
        {"min_margin": -1},
        {"bucket_resolution": 64, "bucket_step": 128},
        {"bucket_max_aspect": 0.5},
        {"bucket_resolution": 64, "max_side": 64},
        {"columns": ("a",), "exclude": ("b",)},
        {"rename": {"a": "c", "b": "c"}},
        {"rename": {"a": ""}},
        {"base_url": "host/x"},
        {"base_url": "https://host", "copy_images": True},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=r"^export: "):
        ExportOptions(**options)


def test_options_fit_a_pipeline_file():
    hints = hints_of(ExportOptions)
    for field in dataclasses.fields(ExportOptions):
        value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        value = list(value) if isinstance(value, tuple) else value
        assert value is None or fits(value, hints[field.name]), field.name
    assert pickle.loads(pickle.dumps(ExportOptions(test=0.1))) == ExportOptions(test=0.1)
    json.dumps(ExportOptions().facts())


def test_a_folder_that_is_no_job_is_told(tmp_path):
    with pytest.raises(InputError, match=r"no step that has finished"):
        run(str(tmp_path), "-o", str(tmp_path / "out"))


def test_a_real_job_is_exported_with_its_history(tmp_path):
    """The demo without a model: pictures, then edits of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    demo = [sys.executable, "-m", "dataflow", "demo", "--fake", "-q", "-o", str(tmp_path / "job")]
    subprocess.run(demo, check=True, env=environment, capture_output=True)
    assert run(str(tmp_path / "job"), "-o", str(tmp_path / "out"), "--validation", "0.5", "--license", "cc-by-4.0") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["summary"]["layout"] == "edit"
    assert index["summary"]["other_prompts"] == 0
    assert index["summary"]["written"] == index["summary"]["rows"] > 0
    assert len(index["summary"]["splits"]) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 Text2ImageGenerator" in card
    assert 'input_conversation_key = "edit"' in card
    first = min((tmp_path / "out").glob("*.tar"))
    record = next(json.loads(data) for name, data in members(first).items() if name.endswith(".json"))
    assert record["request_id"]
    assert record["source_sha256"]


def test_nothing_heavy_is_imported_for_webdataset(shop):
    table = shop.scored(1, 1)
    code = (
        "import sys\nfrom dataflow.export import ExportOptions, export\n"
        "export(sys.argv[1], sys.argv[2], ExportOptions())\n"
        "heavy = ('pyarrow', 'lance', 'datasets', 'webdataset', 'torch', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(table), str(shop.out)], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "kind", "extra"), [("pyarrow", "parquet", "parquet"), ("lance", "lance", "lance")])
def test_a_missing_library_is_told(shop, monkeypatch, module, kind, extra):
    table = shop.scored(1, 1)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'open-dataflow\[{extra}\]'"):
        shop.export(table, format=kind)
    assert not (shop.out / "index.json").exists()


def test_progress_is_shown_to_whoever_watches(shop, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(str(shop.scored(3, 1)), "-o", str(shop.out)) == 0
    assert "3/3" in capsys.readouterr().err
