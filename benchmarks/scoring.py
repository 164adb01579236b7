"""What does scoring cost: CLIP beside bare loops, duplicates and distances of large sets, another threshold?"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import Result, run_python, spread
from dataflow.operators import ImageEvaluator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.clip import ClipServing
from dataflow.utils.storage import FileStorage

QUIET = RunOptions(quiet=True)


class _Loaded(ClipServing):
    """Stays loaded between runs, so that only the work is compared."""

    def setup(self) -> None:
        if self._encoder is None:
            super().setup()

    def cleanup(self) -> None:
        pass


def _model(folder: Path) -> Path:
    """A CLIP of the size of ViT-B/32 with random weights: what it costs does not depend on their values."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ClipServing().source.located().folder)
    text = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def clip(count: int = 192, batch: int = 32, repeats: int = 3) -> Result:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    ours, batched, single = [], [], []
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        model_folder = _model(folder / "clip")
        random = np.random.default_rng(0)
        rows = []
        for number in range(count):
            path = folder / f"{number}.png"
            small = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            small.resize((512, 512), Image.Resampling.BICUBIC).save(path)
            rows.append((str(path), f"a red circle number {number} on a white background"))
        table = folder / "in.jsonl"
        table.write_text("".join(json.dumps({"images": [p], "conversations": t}) + "\n" for p, t in rows))
        model = CLIPModel.from_pretrained(model_folder).eval()
        tokenizer = CLIPTokenizer.from_pretrained(model_folder)
        processor = CLIPImageProcessorPil.from_pretrained(model_folder)

        def scored(part: list[tuple[str, str]]) -> list[float]:
            pixels = processor(images=[Image.open(path).convert("RGB") for path, _ in part], return_tensors="pt")
            ids = tokenizer([text for _, text in part], padding=True, truncation=True, return_tensors="pt")
            images = model.get_image_features(**pixels).pooler_output
            texts = model.get_text_features(**ids).pooler_output
            return torch.nn.functional.cosine_similarity(images, texts).tolist()

        def loop(size: int, part: list[tuple[str, str]]) -> tuple[float, list[float]]:
            started = time.perf_counter()
            values = [value for first in range(0, len(part), size) for value in scored(part[first : first + size])]
            return time.perf_counter() - started, values

        serving = _Loaded(model_folder, device="cpu", batch_size=batch)
        serving.setup()
        scored(rows[:batch])
        wanted: list[float] = []
        for number in range(repeats):
            seconds, wanted = loop(batch, rows)
            batched.append(seconds)
            seconds, _ = loop(1, rows[: count // 4])
            single.append(4 * seconds)
            storage = FileStorage(str(table), cache_path=str(folder / f"cache{number}"))
            started = time.perf_counter()
            ImageEvaluator(serving, with_prompt=True, options=QUIET).run(storage.step(), output_key="clip")
            ours.append(time.perf_counter() - started)
        lines = storage.output_path.read_text().splitlines()
        found = [json.loads(line)["clip"][0]["alignment"] for line in lines]
        difference = float(np.abs(np.array(found) - wanted).max())
    pairs = list(zip(ours, batched, single, strict=True))
    return Result(
        question="How fast is CLIP scoring beside a bare transformers loop?",
        aim="at least 0.95 times a batched loop's throughput",
        columns=["", "median (range)"],
        rows=[
            [f"bare loop, batches of {batch}, {count} pictures", spread(batched, " s", 2)],
            ["bare loop, one picture at a time", spread(single, " s", 2)],
            ["this project", spread(ours, " s", 2)],
            ["throughput against the batched loop", spread([theirs / mine for mine, theirs, _ in pairs], digits=2)],
            ["throughput against one at a time", spread([theirs / mine for mine, _, theirs in pairs], digits=2)],
            ["largest difference of a score", f"{difference:.1e}"],
        ],
        notes=[
            "CLIP of ViT-B/32's size with random weights, float32, pictures of 512 × 512 (PNG), a new prompt for each.",
            "Loaded beforehand, taking turns in one process; one at a time measured on a quarter.",
            "Ours also hashes every file, checks it whole, writes the journal and the table.",
        ],
    )


HASHES = """
import json, sys, time
import numpy as np
from dataflow.metrics.hashing import duplicate_groups
count = int(sys.argv[1])
random = np.random.default_rng(0)
words = random.integers(0, 2**64, count, dtype=np.uint64)
copies = random.choice(count, count // 100, replace=False)
for source, target in zip(copies[::2], copies[1::2]):
    words[target] = words[source] ^ (np.uint64(1) << np.uint64(random.integers(64)))
started = time.perf_counter()
groups = duplicate_groups(words, 6)
print(json.dumps({"seconds": time.perf_counter() - started, "found": int(count - groups.kept.sum())}))
"""
VECTORS = """
import json, sys, time
import faiss
import numpy as np
from dataflow.metrics.neighbours import similar_groups
count, size = int(sys.argv[1]), 192
faiss.omp_set_num_threads(2)
random = np.random.default_rng(0)
vectors = random.normal(size=(count, size)).astype(np.float32)
copies = random.choice(count, count // 100, replace=False)
vectors[copies[1::2]] = vectors[copies[::2]] + random.normal(size=(len(copies) // 2, size)).astype(np.float32) * 0.1
started = time.perf_counter()
groups = similar_groups(lambda start, stop: vectors[start:stop], count, 0.95)
print(json.dumps({"seconds": time.perf_counter() - started, "found": int(count - groups.kept.sum())}))
"""


def duplicates(count: int = 1_000_000, vectors: int = 200_000) -> Result:
    hashes, near = run_python(HASHES, str(count)), run_python(VECTORS, str(vectors))
    return Result(
        question="What does finding duplicates cost?",
        aim="a million hashes in bounded memory",
        columns=["", "seconds", "duplicates found", "of", "peak memory, MB"],
        rows=[
            _found(f"{count:,} hashes of 64 bits, distance 6", hashes, count // 200),
            _found(f"{vectors:,} vectors of 192 numbers, cosine 0.95", near, vectors // 200),
        ],
        notes=[
            "Random, with one in a hundred being one of a pair.",
            "Memory includes Python, numpy and, for the vectors, the vectors themselves, faiss and its index.",
        ],
    )


def _found(name: str, figures: dict[str, float], planted: int) -> list[str]:
    return [name, f"{figures['seconds']:.1f}", f"{figures['found']:,.0f}", f"{planted:,}", f"{figures['peak_mb']:.0f}"]


def distance(count: int = 10_000, size: int = 2048) -> Result:
    from scipy import linalg

    from dataflow.metrics.distribution import Moments, fid

    random = np.random.default_rng(0)
    first, second = (random.normal(size=(count, size)).astype(np.float32) + shift for shift in (0, 0.1))

    def reference() -> float:
        # torch-fidelity's arithmetic, line by line; the package itself needs a library that is kept out here.
        mean1, mean2 = first.mean(0, dtype=np.float64), second.mean(0, dtype=np.float64)
        spread1, spread2 = (np.cov(rows, rowvar=False, dtype=np.float64) for rows in (first, second))
        root = linalg.sqrtm(spread1 @ spread2)
        return float(((mean1 - mean2) ** 2).sum() + np.trace(spread1) + np.trace(spread2) - 2 * np.trace(np.real(root)))

    def timed(work: Any) -> tuple[float, float]:
        started = time.perf_counter()
        value = work()
        return time.perf_counter() - started, value

    theirs, wanted = timed(reference)
    mine, found = timed(lambda: fid(Moments.of(first), Moments.of(second)))
    return Result(
        question="What does a Fréchet distance cost?",
        aim="no longer than torch-fidelity's",
        columns=["", "seconds", "distance"],
        rows=[
            [f"{count:,} × {size:,} features, torch-fidelity's arithmetic", f"{theirs:.1f}", f"{wanted:.9f}"],
            ["this project", f"{mine:.1f}", f"{found:.9f}"],
            ["ratio", f"{mine / theirs:.2f}", f"{abs(found - wanted):.1e} apart"],
        ],
    )


FILTER = """
import json, sys, time
from dataflow.operators import ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.utils.storage import FileStorage
storage = FileStorage(sys.argv[1], cache_path=sys.argv[2])
started = time.perf_counter()
summary = ScoreFilter(options=RunOptions(quiet=True)).run(
    storage.step(), input_score_key="clip.alignment", minimum=float(sys.argv[3])
)
print(json.dumps({"seconds": time.perf_counter() - started, "kept": summary.done}))
"""
STREAM = """
import json, sys, time
import orjson
started = time.perf_counter()
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    for line in source:
        target.write(orjson.dumps(orjson.loads(line)) + b"\\n")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def filtering(count: int = 1_000_000) -> Result:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / "scored.jsonl"
        with table.open("w") as file:
            for number, score in enumerate(random.random(count)):
                row = {
                    "conversations": f"a picture of thing number {number} on a table beside a window",
                    "images": [f"images/{number % 256:02x}/{number:032x}.png"],
                    "clip": [{"alignment": round(float(score), 6), "tokens": 12, "truncated": False}],
                    "clip_status": ["ok"],
                    "clip_by": "some-model#0123456789ab",
                }
                file.write(json.dumps(row) + "\n")
        first = run_python(FILTER, str(table), str(Path(temporary) / "cache"), "0.5")
        again = run_python(FILTER, str(table), str(Path(temporary) / "cache"), "0.6")
        stream = run_python(STREAM, str(table), str(Path(temporary) / "copy.jsonl"))
    return Result(
        question="What does another threshold cost over a million scored rows?",
        aim="seconds, and no score computed again",
        columns=["", "seconds", "rows kept", "peak memory, MB"],
        rows=[
            [
                "copying the table with orjson alone",
                f"{stream['seconds']:.1f}",
                f"{count:,}",
                f"{stream['peak_mb']:.0f}",
            ],
            *(
                [f"filter at {least}", f"{each['seconds']:.1f}", f"{each['kept']:,.0f}", f"{each['peak_mb']:.0f}"]
                for least, each in ((0.5, first), (0.6, again))
            ),
        ],
    )


def run() -> list[Result]:
    return [clip(), duplicates(), distance(), filtering()]


if __name__ == "__main__":
    for result in run():
        print(result.markdown())
