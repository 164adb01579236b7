"""What `dataflow run` writes when the last step has ended: the page and the datasets that a pipeline file asks for."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from dataflow.cli import main

PIPELINE = """\
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[serving.draw]
type = "fake"
size = [8, 8]

[serving.probe]
type = "image_probe"

[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"

[[step]]
operator = "ImageEvaluator"
serving = "probe"
output_key = "probe"

[report]
title = "Foxes"

[[export]]
output = "shards"
format = "webdataset"

[[export]]
output = "flat"
format = "jsonl"
columns = ["prompt"]
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(b"".join(orjson.dumps({"prompt": f"fox {n}"}) + b"\n" for n in range(3)))
    Path("pipeline.toml").write_text(PIPELINE)


def test_all_of_it(capsys):
    assert main(["run", "pipeline.toml"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("out/dataflow_cache_step_step2.jsonl\n")
    assert "report: out/report/index.html\n" in said.err
    assert "shards: text_image, webdataset\n  3 rows = 3 used\n" in said.err
    assert "Foxes" in Path("out/report/index.html").read_text()
    assert len(list(Path("shards").glob("*.tar"))) == 1
    (table,) = Path("flat").glob("**/train*.jsonl")
    assert {json.loads(line)["prompt"] for line in table.read_text().splitlines()} == {"fox 0", "fox 1", "fox 2"}


def test_again_and_from_the_folder(capsys):
    main(["run", "pipeline.toml", "--quiet"])
    tar = next(Path("shards").glob("*.tar"))
    before = (tar.read_bytes(), tar.stat().st_mtime_ns)
    assert main(["run", "out/job.toml", "--quiet"]) == 0
    assert (tar.read_bytes(), tar.stat().st_mtime_ns) == before


def test_not_before_the_last_step(capsys):
    main(["run", "pipeline.toml", "--last", "1", "--quiet"])
    main(["run", "pipeline.toml", "--pilot", "1", "--quiet"])
    assert not Path("out/report").exists()
    assert not Path("shards").exists()


def test_a_picture_that_cannot_be_used(capsys):
    main(["run", "pipeline.toml", "--last", "2", "--quiet"])
    for folder in ("shards", "flat"):
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    picture = next(Path("out/images").glob("??/*"))
    data = picture.read_bytes()
    picture.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert main(["export", "out", "-o", "shards"]) == 1
    assert "2 written + 1 " in capsys.readouterr().out
    assert len(list(Path("shards").glob("*.tar"))) == 1


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            'columns = ["prompt"]',
            'columns = ["promt"]',
            "pipeline.toml:32: [[export]] 2: columns: there will be no column",
        ),
        ('"jsonl"\n', '"jsonl"\nprompt_key = "text"\n', "[[export]] 2: prompt_key: there will be no column 'text'"),
        ('"jsonl"\n', '"jsonl"\nscore_key = "prob.sharpness"\n', "(did you mean 'probe'"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_columns_there_will_not_be(capsys, command, before, after, told):
    Path("pipeline.toml").write_text(PIPELINE.replace(before, after))
    assert main([command, "pipeline.toml"]) == 2
    assert told in capsys.readouterr().err
    assert not Path("out").exists()
