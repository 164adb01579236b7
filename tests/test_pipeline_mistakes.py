"""Wrong pipeline files, as people write them: what `dataflow plan` says, word for word, and that nothing is written."""

from __future__ import annotations

import pytest

from dataflow.cli import main

GOOD = """\
# Text to image, scored and filtered.
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[images]
format = "png"

[serving.draw]
type = "fake"
size = [32, 16]

[serving.probe]
type = "image_probe"

[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"
output_image_key = "images"

[[step]]
operator = "ImageEvaluator"
serving = "probe"
input_image_key = "images"
output_key = "probe"

[[step]]
operator = "ScoreFilter"
input_image_key = "images"
input_score_key = "probe.sharpness"
minimum = 0.1

[run]
budget_usd = 5
"""
FIRST, SECOND, THIRD = (f"[[step]]\n{part}" for part in GOOD.partition("[run]")[0].split("[[step]]\n")[1:])
RUN = "\n[run]" + GOOD.partition("[run]")[2]
TABLES = "the tables are 'storage', 'images', 'serving', 'step', "
JUDGE = '[serving.{}]\ntype = "judge"\nrubric = "alignment"\nservice = "{}"\n'

MISTAKES = {
    # The file is no TOML.
    "text without quotes": ('"in.jsonl"', "in.jsonl", "3: is not TOML: Invalid value (column 25): first_entry_file_na"),
    "a word without quotes": (
        '"png"',
        "png",
        "7: is not TOML: Invalid value (column 10): format = png; text stands in",
    ),
    "an open bracket": ("[serving.draw]", "[serving.draw", "9: is not TOML: Expected ']' at the end of a table decl"),
    "a key twice": (
        'cache_path = "out"',
        'cache_path = "out"\ncache_path = "b"',
        '5: is not TOML: Cannot overwrite a value (column 17): cache_path = "b"; it stands there twice, or once as',
    ),
    "a table of both kinds": (
        "[[step]]",
        "[step]",
        "22: is not TOML: Cannot overwrite a value (column 7): [[step]]; it",
    ),
    # Tables and keys that are none.
    "a misspelt table": ("[storage]", "[storge]", "2: [storge]: there is no such table (did you mean 'storage' or 'st"),
    "steps for step": (
        "[[step]]",
        "[[steps]]",
        "16: [steps]: there is no such table (did you mean 'step'?); " + TABLES,
    ),
    "a misspelt argument": (
        "minimum",
        "minimun",
        "32: [[step]] 3: minimun: there is no such key (did you mean 'minimum'?); the keys are 'operator', 'serving',",
    ),
    "a misspelt column key": (
        "input_conversation_key",
        "input_converation_key",
        "19: [[step]] 1: input_converation_key: there is no such key (did you mean 'input_conversation_key'?); the",
    ),
    "a misspelt option": (
        "budget_usd",
        "budget",
        "35: [run]: budget: there is no such key (did you mean 'budget_usd'?)",
    ),
    "no table to start from": ('first_entry_file_name = "in.jsonl"\n', "", "2: [storage]: the key 'first_entry_file_"),
    "no storage at all": (GOOD.partition("[images]")[0], "", " the table [storage] is missing"),
    "no step": (FIRST + SECOND + THIRD, "", " at least one [[step]] is needed (two brackets each side)"),
    # Names of classes.
    "a misspelt operator": (
        '"Text2ImageGenerator"',
        '"Text2ImgGenerator"',
        "17: [[step]] 1: operator: there is no 'Text2ImgGenerator' (did you mean 'Text2ImageGenerator' or 'Prompted",
    ),
    "an operator in other letters": (
        '"ScoreFilter"',
        '"Scorefilter"',
        "29: [[step]] 3: operator: there is no 'Scorefilter' (did you mean 'ScoreFilter'?); choose 'Text2ImageGener",
    ),
    "a misspelt type": ('"fake"', '"fakee"', "10: [serving.draw]: type: there is no 'fakee' (did you mean 'fake'?);"),
    "no type": ('type = "fake"\n', "", "9: [serving.draw]: the key 'type' is missing; choose 'local', 'chat', "),
    "no operator": (
        'operator = "ImageEvaluator"\n',
        "",
        "22: [[step]] 2: the key 'operator' is missing; choose 'Text2",
    ),
    "a module there is not": (
        '"ImageEvaluator"',
        '"mymodule:Scorer"',
        "23: [[step]] 2: operator: 'mymodule' cannot be imported: No module named 'mymodule'; a module of your own",
    ),
    # Servings.
    "a misspelt serving": (
        'serving = "draw"',
        'serving = "drow"',
        "18: [[step]] 1: serving: there is no [serving.drow] (",
    ),
    "which serving": (
        'serving = "draw"\n',
        "",
        "16: [[step]] 1: the key 'serving' is missing; there are 'draw', 'probe'",
    ),
    "a serving for a filter": (
        '"ScoreFilter"',
        '"ScoreFilter"\nserving = "draw"',
        "30: [[step]] 3: serving: ScoreFilter takes none: remove the line",
    ),
    "a scorer that is to draw": (
        'serving = "draw"',
        'serving = "probe"',
        "18: [[step]] 1: serving: Text2ImageGenerator needs a serving that answers with images, ImageProbeServing",
    ),
    "a model that is to score": (
        'serving = "probe"',
        'serving = "draw"',
        "24: [[step]] 2: serving: ImageEvaluator needs a serving that answers with words or scores, FakeServing",
    ),
    "a judge that asks itself": (
        "[run]",
        JUDGE.format("judge", "judge") + "[run]",
        "37: [serving.judge]: service: it would ask itself: name a serving of type 'chat', 'local_vlm' or the like",
    ),
    "judges in a circle": (
        "[run]",
        JUDGE.format("judge", "other") + JUDGE.format("other", "judge") + "[run]",
        "37: [serving.judge]: service: 'other' asks another one itself ('judge'): name that one",
    ),
    # Values of another type.
    "a number as text": ("minimum = 0.1", 'minimum = "0.1"', "32: [[step]] 3: minimum: expected a number, found '0.1'"),
    "text for a size": (
        "[32, 16]",
        '"32x16"',
        "11: [serving.draw]: size: expected a list of 2 whole numbers, found '32x",
    ),
    "half a pixel": (
        "[32, 16]",
        "[32, 16.5]",
        "11: [serving.draw]: size: expected a list of 2 whole numbers, found [32,",
    ),
    "a format there is not": ('"png"', '"gif"', "6: [images]: ImageIO(format='gif'): choose one of png, webp, jpeg"),
    "a table format there is not": (
        'cache_path = "out"',
        'cache_type = "jsonlines"',
        "4: [storage]: cache_type: expected 'jsonl' or 'json' or 'csv' or 'parquet' or 'pickle', found 'jsonlines'",
    ),
    "a negative budget": ("= 5", "= -5", "35: [run]: budget_usd: must be more than 0 US dollars, found -5"),
    "a loop that wants nothing": (
        RUN,
        "\n[accept]\nwanted = 0\n",
        "34: [accept]: wanted and quotas must be whole numbers",
    ),
    "a loop with a misspelt key": (
        RUN,
        "\n[accept]\nwnted = 2\n",
        "35: [accept]: wnted: there is no such key (did you mea",
    ),
    "a filter without a condition": ("minimum = 0.1\n", "", "28: [[step]] 3: give minimum, maximum, drop_lowest"),
    "none of the best": ("minimum = 0.1", "top_k = 0", "28: [[step]] 3: top_k must be a whole number from 1, got 0"),
    # Columns and tables.
    "a table there is not": ('"in.jsonl"', '"inn.jsonl"', "3: [storage]: first_entry_file_name: there is no file "),
    "a column there is not": (
        '"prompt"',
        '"promt"',
        (
            "19: [[step]] 1: input_conversation_key: Text2ImageGenerator needs the column 'promt', and {table} has none"
            " (did you mean 'prompt'?); there are 'prompt'"
        ),
    ),
    "a column no step writes": (
        'input_image_key = "images"',
        'input_image_key = "image"',
        (
            "25: [[step]] 2: input_image_key: ImageEvaluator needs the column 'image', and neither {table} has it nor"
            " does a step before write it (did you mean 'images'?); there are 'prompt', 'images'"
        ),
    ),
    "a score no step writes": (
        "probe.sharpness",
        "prob.sharpness",
        (
            "31: [[step]] 3: input_score_key: ScoreFilter needs the column 'prob', and neither {table} has it nor"
            " does a step before write it (did you mean 'probe' or 'probe_by' or 'prompt'?)"
        ),
    ),
    "steps in the wrong order": (
        FIRST + SECOND,
        SECOND + FIRST,
        (
            "19: [[step]] 1: input_image_key: ImageEvaluator needs the column 'images', and step 2 (Text2ImageGenerat"
            "or) writes it only after this one: put that step first"
        ),
    ),
    "steps in a circle": (
        'input_conversation_key = "prompt"',
        'input_conversation_key = "probe"',
        (
            "19: [[step]] 1: input_conversation_key: Text2ImageGenerator needs the column 'probe', and step 2"
            " (ImageEvaluator) writes it, which itself needs 'images' of this step: a cycle; one of the two must read"
        ),
    ),
    "scores in place of pictures": (
        'output_key = "probe"',
        'output_key = "images"',
        "26: [[step]] 2: output_key: ImageEvaluator would overwrite the column 'images', which it reads: give",
    ),
    "pictures drawn over pictures": (
        SECOND,
        FIRST,
        "26: [[step]] 2: output_image_key: Text2ImageGenerator would overwrite the column 'images', which step 1 writ",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a fox"}\n')
    return tmp_path


def test_without_a_mistake(folder, capsys):
    (folder / "pipeline.toml").write_text(GOOD)
    assert main(["plan", "pipeline.toml"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_is_said(folder, capsys, command, mistake):
    right, wrong, told = MISTAKES[mistake]
    assert right in GOOD
    (folder / "pipeline.toml").write_text(GOOD.replace(right, wrong, 1))
    assert main([command, "pipeline.toml"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: pipeline.toml:{told}".format(table=folder / "in.jsonl"))
    assert said.err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "pipeline.toml"]
