"""Runs with everything that happens to rows, made by real steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from dataflow.errors import BadRequestError
from dataflow.io import ImageIO
from dataflow.operators import (
    ImageEvaluator,
    PromptedImageEditGenerator,
    ScoreFilter,
    Text2ImageGenerator,
)
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.scoring import Scored, ScoringServing
from dataflow.types import GenerationRequest, GenerationResult
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True, progress=False)
HOSTILE = (
    "</script><script>window.hacked=1;alert(1)</script> star",
    '<img src=x onerror="window.hacked=1"> star',
    "line\u2028separator \u2029 and \u202eturned round\u202c and nul \x01 star",
    "half a pair \ud83d of letters star",
    "{{constructor.constructor('window.hacked=1')()}} ${window.hacked=1} star",
)
CHINESE = "一只红色的狐狸坐在雪地里，背景是远山和晨雾，细节丰富，柔和的光线，电影感构图，超高清"

JOB = """
[storage]
first_entry_file_name = "../in.jsonl"
cache_path = "."

[images]
save_path = "../images"

[serving.paid]
type = "gemini"
model_name = "painter-2"

[serving.judge]
type = "judge"
model_name = "judge-1"

[[step]]
operator = "Text2ImageGenerator"
serving = "paid"
input_conversation_key = "prompt"

[[step]]
operator = "ImageEvaluator"
serving = "judge"
output_key = "judge"

[[step]]
operator = "ScoreFilter"
input_score_key = "judge.value"
minimum = 0.3
top_k = 1

[[step]]
operator = "PromptedImageEditGenerator"
serving = "paid"
input_conversation_key = "edits"
"""


class PaidPainter(FakeServing):
    """A fake service whose calls cost money, refusals included."""

    remote = True

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        answers = await super().generate(requests)
        for answer in answers:
            object.__setattr__(answer, "usage", {"usd": 0.04})
        return answers


class Judge(ScoringServing):
    """Scores by the colour of the upper left pixel; has no opinion of some prompts."""

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "judge-1"}

    def setup(self) -> None:
        pass

    def score(self, requests: Sequence[GenerationRequest]) -> list[Scored]:
        return [self._score(request) for request in requests]

    def _score(self, request: GenerationRequest) -> Scored:
        if "speechless" in request.prompt:
            return BadRequestError("the judge said nothing that can be read", reason="parse_error")
        with Image.open(request.images[0]) as image:
            red, green, _ = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
        return {"value": round(red / 255, 4), "beauty": green, "words": "fine <b>picture</b>"}


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Rows of a table; some are of every kind that goes wrong."""
    rows = [{"prompt": f"a red fox number {n} in the snow", "topic": ("animals", "snow")[n % 2]} for n in range(count)]
    rows += [{"prompt": CHINESE, "topic": "动物"}, {"prompt": "مرحبا بالعالم star", "topic": "rtl"}]
    rows += [{"prompt": prompt, "topic": "hostile"} for prompt in HOSTILE]
    rows += [{"prompt": f"something forbidden {n}", "topic": "bad"} for n in range(2)]
    rows += [{"prompt": "a page of html", "topic": "bad"}, {"prompt": "", "topic": "bad"}]
    rows += [
        {"prompt": "a speechless picture", "topic": "bad"},
        {"prompt": "a painted uneditable star", "topic": "bad"},
    ]
    for number, row in enumerate(rows):
        row["edits"] = [
            {
                "role": "user",
                "content": "make it uneditable" if "uneditable" in row["prompt"] else f"make it blue {number}",
            },
            {"role": "user", "content": "remove the background"},
        ]
    return rows


def make_run(folder: Path, *, model: str = "painter-2", count: int = 12, job: bool = True, edits: bool = True) -> Path:
    """A folder with a finished run: three pictures a prompt, judged, the best kept, edited twice; returns its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row).encode() for row in prompt_rows(count)]
    (folder / "in.jsonl").write_bytes(b"\n".join([*lines, b'{"prompt": "broken']) + b"\n")
    cache = folder / "cache"
    io = ImageIO(folder / "images", durable=False)
    script = {"forbidden": "refuse", "html": "garbage"}
    painter = PaidPainter(io, images_per_prompt=3, model=model, size=(48, 64), batch_size=4, script=script)
    editor = PaidPainter(io, model=model, size=(64, 64), script={"make it uneditable": "refuse"})
    storage = FileStorage(str(folder / "in.jsonl"), cache_path=str(cache))
    Text2ImageGenerator(painter, options=QUIET).run(storage.step(), "prompt", "images")
    judge = ImageEvaluator(Judge(), with_prompt=True, options=QUIET)
    judge.run(storage.step(), input_conversation_key="prompt", output_key="judge")
    ScoreFilter(options=QUIET).run(storage.step(), input_score_key="judge.value", minimum=0.3, top_k=1)
    if edits:
        PromptedImageEditGenerator(editor, options=QUIET).run(storage.step(), "images", "edits")
    if job:
        (cache / "job.toml").write_text(JOB, encoding="utf-8")
    return cache


def rows_of(table: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in table.read_bytes().splitlines()]


def summary_of(report: Path) -> dict[str, Any]:
    """What the page is told at first."""
    text = (report / "data" / "summary.js").read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : -3])
