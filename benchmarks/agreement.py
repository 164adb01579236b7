"""Do the offline scores know which of 2,000 pictures of the built-in model are right, and what is filtering worth?"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import Result
from dataflow.io import ImageIO
from dataflow.operators import ImageEvaluator, ObjectEvaluator, ScoreFilter, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.clip import ClipServing
from dataflow.serving.detection import ZeroShotDetectionServing
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.utils.storage import FileStorage
from training.checker import shows
from training.scenes import Meaning, random_prompt

COUNT = 2000
LEAST_ALIGNMENT = 0.1
INVERSE = {"left": "right of", "right": "left of", "above": "below", "below": "above"}
QUIET = RunOptions(quiet=True)

Row = dict[str, Any]


def rows() -> list[tuple[Row, Meaning]]:
    """Prompts, half of them for scenes that training never showed, with the objects that each names."""
    rng = random.Random("study 2026")
    found = []
    for number in range(COUNT):
        prompt = random_prompt(rng, held_out=number % 2 == 0)
        row = {"number": number, "conversations": prompt.text, "images": [""], "geneval": objects(prompt.meaning)}
        found.append((row, prompt.meaning))
    return found


def objects(meaning: Meaning) -> Mapping[str, Any]:
    """What a caption says of objects, as GenEval's metadata: each once, in its colour, and how they stand."""
    named = [(colour, shape) for colour, shape, _ in (meaning.a, meaning.b) if shape is not None]
    include: list[Row] = [{"class": shape, "color": colour, "count": 1} for colour, shape in named]
    exclude = [{**clause, "count": 2} for clause in include]
    if meaning.relation is not None:
        include[1]["position"] = [INVERSE[meaning.relation], 0]
    return {"tag": "position" if meaning.relation else "color_attr", "include": include, "exclude": exclude}


def run(folder: Path = Path("build/agreement")) -> Result:
    prompts = rows()
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "prompts.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row, _ in prompts))
    storage = FileStorage(str(table), cache_path=str(folder / "cache"))
    model = LocalImageGenServing(ImageIO(folder / "cache" / "images"), batch_size=16, device="cpu")
    Text2ImageGenerator(model, seed=2026, options=QUIET).run(storage.step())
    clip = ClipServing(vectors=folder / "cache" / "vectors", device="cpu")
    ImageEvaluator(clip, with_prompt=True, options=QUIET).run(storage.step(), output_key="clip")
    owl = ZeroShotDetectionServing("builtin:tiny-owl", device="cpu")
    evaluator = ObjectEvaluator(
        owl, colours="query", threshold=0.3, counting_threshold=0.3, max_overlap=0.5, options=QUIET
    )
    evaluator.run(storage.step())
    scored = _read(storage)
    only = ScoreFilter(options=QUIET)
    only.run(storage.step(), input_score_key="clip.alignment", minimum=LEAST_ALIGNMENT)
    aligned = _kept(storage)
    only.run(storage.step(), input_score_key="objects.value", minimum=1.0)
    both = _kept(storage)
    right = np.ones(COUNT, dtype=bool)
    right[json.loads(Path(__file__).with_name("eye.json").read_text())["wrong"]] = False
    values = np.array([row["objects"][0]["value"] for row in scored]) == 1.0
    checked = np.array([_checked(row, meaning) for row, (_, meaning) in zip(scored, prompts, strict=True)])
    everything = np.ones(COUNT, dtype=bool)
    alignment = np.array([row["clip"][0]["alignment"] for row in scored])
    return Result(
        question="Do the offline scores know which pictures are right, and what is filtering by them worth?",
        aim="at least 98 % right after filtering",
        columns=["kept by", "pictures", "right", "of the right ones kept", "of the wrong ones caught", "agrees"],
        rows=[
            _row("everything (base rate)", everything, right),
            _row(f"tiny CLIP's alignment from {LEAST_ALIGNMENT}", aligned, right),
            _row("object rules over the tiny OWL-ViT", values, right),
            _row("rule-based checker", checked, right),
            _row("alignment, then object rules", both, right),
        ],
        notes=[
            f"{COUNT:,} pictures of the built-in model, 12 steps, half of scenes that training never showed.",
            "Right is what a person called right; eye.json says how they were judged.",
            f"ROC-AUC of the alignment alone: {_auc(alignment[right], alignment[~right]):.3f}.",
            "Object rules know neither backgrounds nor absolute places; the checker is strict with soft edges.",
        ],
    )


def _row(name: str, kept: np.ndarray, right: np.ndarray) -> list[str]:
    caught = f"{(~kept)[~right].mean():.1%}" if not kept.all() else "-"
    agrees = f"{(kept == right).mean():.1%}"
    return [name, f"{kept.sum():,}", f"{right[kept].mean():.2%}", f"{kept[right].mean():.1%}", caught, agrees]


def _auc(right: np.ndarray, wrong: np.ndarray) -> float:
    return float(((right[:, None] > wrong) + 0.5 * (right[:, None] == wrong)).mean())


def _read(storage: FileStorage) -> list[Row]:
    return [json.loads(line) for line in storage.output_path.read_text().splitlines()]


def _kept(storage: FileStorage) -> np.ndarray:
    kept = np.zeros(COUNT, dtype=bool)
    kept[[row["number"] for row in _read(storage)]] = True
    return kept


def _checked(row: Row, meaning: Meaning) -> bool:
    with Image.open(row["images"][0]) as picture:
        return shows(np.array(picture.convert("RGB")), meaning)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/agreement"), help="where the pictures are made")
    print(run(parser.parse_args().folder).markdown())
