"""What does a report of a hundred thousand pictures cost: to write, on disk, and in the browser?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import Result, run_python, spread
from dataflow.io import ImageIO
from dataflow.runtime.journal import done_record, pack_line
from dataflow.types import SavedImage

SAMPLES = 4
DIFFERENT = 500
SIDE = 256
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WRITE = """
import json, sys
from dataflow.report import write_report
made = write_report([sys.argv[1]], sys.argv[2])
print(json.dumps({"seconds": made.seconds, "page": made.page_bytes, "total": made.total_bytes,
                  "pictures": made.pictures, "problems": made.problems, "reused": made.reused}))
"""


def _pictures(folder: Path) -> list[Path]:
    """Pictures with smooth shapes in them, as large as models for drafts make them."""
    random = np.random.default_rng(0)
    store = ImageIO(folder, durable=False)
    made = []
    for number in range(DIFFERENT):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        facts = {"prompt": f"a picture number {number}", "seed": number, "model": "synthetic", "params": {"steps": 20}}
        name = hashlib.md5(b"%d" % number).hexdigest()
        made.append(folder / store.save(picture, name, {"request_id": name, **facts}).name)
    return made


def synthetic_run(folder: Path, pictures: int) -> Path:
    """The folder of a run that drew, scored and filtered so many pictures, as the steps would have left it.

    Each file is one of 500 pictures under a name of its own (a hard link), so that the disk holds little and each is
    read, decoded and reduced as if it were another.
    """
    cache, images = folder / "cache", folder / "images"
    sources = _pictures(folder / "sources")
    random = np.random.default_rng(1)
    tables = [f"run_step{number}" for number in (1, 2, 3)]
    for name in tables:
        (cache / "journal" / name).mkdir(parents=True)
    counts = {"rows": pictures // SAMPLES, "refused": 0, "dropped": 0}
    words = ["fox", "castle", "lighthouse", "market", "violin", "orchid", "狐狸", "城堡", "灯塔"]
    with (
        (folder / "in.jsonl").open("w") as given,
        (cache / "run_step1.jsonl").open("w") as drawn,
        (cache / "run_step2.jsonl").open("w") as scored,
        (cache / "run_step3.jsonl").open("w") as kept,
        (cache / "run_step3.dropped.jsonl").open("w") as dropped,
        (cache / "journal" / "run_step1" / "main.jsonl").open("wb") as journal,
        (cache / "journal" / "run_step2" / "main.jsonl").open("wb"),
    ):
        for number in range(counts["rows"]):
            chosen = random.choice(words, 3)
            row: dict[str, Any] = {
                "prompt": f"number {number}: {' beside '.join(chosen)}, morning light, highly detailed, wide angle",
                "topic": str(chosen[0]),
                "level": int(random.integers(1, 6)),
            }
            given.write(json.dumps(row) + "\n")
            if number % 100 == 99:
                counts["refused"] += 1
                row |= {"images": [], "images_error": {"status": "refused", "reason": "refused", "message": "declined"}}
                drawn.write(json.dumps(row) + "\n")
                row |= {"clip": None, "clip_status": "refused", "clip_by": "clip"}
                scored.write(json.dumps(row) + "\n")
                dropped.write(json.dumps({"reason": "no_image", "row": row}) + "\n")
                counts["dropped"] += 1
                continue
            paths = []
            for sample in range(SAMPLES):
                name = hashlib.md5(b"%d %d" % (number, sample)).hexdigest()
                path = images / name[:2] / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(sources[(number * SAMPLES + sample) % DIFFERENT], path)
                paths.append(str(path))
                saved = SavedImage(name=f"{name[:2]}/{name}.png", sha256="0" * 64, bytes=1, width=SIDE, height=SIDE)
                journal.write(pack_line(done_record(name, [saved], ms=1500.0, usage={"usd": 0.003})))
            row["images"] = paths
            drawn.write(json.dumps(row) + "\n")
            values = np.round(random.normal(0.27, 0.04, SAMPLES), 5).tolist()
            beauty = np.round(random.normal(5.5, 0.9, SAMPLES), 4).tolist()
            row["clip"] = [{"alignment": one, "tokens": 14} for one in values]
            row |= {"clip_status": ["ok"] * SAMPLES, "clip_by": "clip", "beauty": beauty}
            row |= {"beauty_status": ["ok"] * SAMPLES, "beauty_by": "beauty"}
            scored.write(json.dumps(row) + "\n")
            best = int(np.argmax(values))
            if values[best] < 0.28:
                dropped.write(json.dumps({"reason": "score:clip.alignment", "row": row}) + "\n")
                counts["dropped"] += 1
                continue
            for key in ("images", "clip", "clip_status", "beauty", "beauty_status"):
                row[key] = [row[key][best]]
            kept.write(json.dumps(row) + "\n")
    rows, refused = counts["rows"], counts["refused"]
    made = (rows - refused) * SAMPLES
    _summary(cache, tables[0], "Text2ImageGenerator", rows=rows, done=rows - refused, refused=refused, images=made)
    _summary(cache, tables[1], "ImageEvaluator", rows=rows, done=rows - refused, refused=refused)
    done = rows - counts["dropped"]
    _summary(cache, tables[2], "ScoreFilter", rows=rows, done=done, dropped=counts["dropped"])
    return cache


def _summary(cache: Path, name: str, operator: str, **counts: int) -> None:
    facts = {"operator": operator, "output": str(cache / f"{name}.jsonl"), "seconds": 3600.0, "reasons": {}, "usd": 0.0}
    if operator == "Text2ImageGenerator":
        facts |= {"input": str(cache.parent / "in.jsonl"), "usd": 0.003 * counts["images"]}
    (cache / "journal" / name / "summary.json").write_text(json.dumps({**facts, **counts}))


def _memory(process: int) -> float:
    """Megabytes of a process with all it started, shared pages by share."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting, total = [process], 0
    while waiting:
        current = waiting.pop()
        waiting += children.get(current, [])
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def _in_browser(report: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds until things are to be seen, and megabytes, in Chromium without a window."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    address = (report / "index.html").as_uri()
    found: dict[str, list[float]] = {}
    small = ".tile img"

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        for _ in range(repeats):
            context = playwright.chromium.launch_persistent_context(
                profile, executable_path=chromium, args=SWITCHES.split(), viewport={"width": 1440, "height": 900}
            )
            page = context.new_page()
            session = context.new_cdp_session(page)
            session.send("Performance.enable")

            def heap(session: Any = session) -> float:
                session.send("HeapProfiler.collectGarbage")
                metrics = session.send("Performance.getMetrics")["metrics"]
                return next(each["value"] for each in metrics if each["name"] == "JSHeapUsedSize") / 1e6

            def timed(name: str, act: Any, sight: str, page: Any = page) -> None:
                started = time.perf_counter()
                act()
                page.wait_for_selector(sight)
                note(name, time.perf_counter() - started)

            timed("opened, numbers in sight", lambda page=page: page.goto(address), ".figures dd")
            timed("opened, first pictures in sight", lambda page=page: page.goto(address), small)
            note("heap after opening", heap())
            timed("gallery", lambda page=page: page.click("nav a[href='#gallery']"), f".grid {small}")
            started = time.perf_counter()
            page.select_option(".bar select", "score:clip.alignment")
            page.wait_for_selector(".grid .line:first-child > :first-child .tile:not([data-at='0'])")
            page.wait_for_selector(f".grid .line:first-child > :first-child {small}")
            note("sorted by a score, other pictures in sight", time.perf_counter() - started)
            count = page.text_content(".chips b")
            started = time.perf_counter()
            page.fill(".search", "lighthouse beside 狐狸")
            page.wait_for_selector(f".chips b:not(:text-is({json.dumps(count)}))")
            note("searched all prompts", time.perf_counter() - started)
            page.fill(".search", "")
            page.wait_for_timeout(600)
            for _ in range(40):
                page.mouse.wheel(0, 20_000)
                page.wait_for_timeout(60)
            page.wait_for_selector(f".grid {small}")
            timed("everything about a picture", lambda page=page: page.click(".grid .tile"), "dialog .facts")
            note("heap after all that", heap())
            note("all processes after all that", _memory(_browser_process(profile)))
            context.close()
    return found


def _browser_process(profile: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = entry.joinpath("cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"--user-data-dir={profile}".encode() in words and not any(w.startswith(b"--type=") for w in words):
                return int(entry.name)
    raise RuntimeError("the browser is not there")


def run(pictures: int = 100_000, repeats: int = 3) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = synthetic_run(folder, pictures)
        target = folder / "report"
        first = run_python(WRITE, str(cache), str(target))
        again = run_python(WRITE, str(cache), str(target))
        files = sum(1 for each in target.rglob("*") if each.is_file())
        browser = _in_browser(target, repeats)
    rows = [
        ["writing it", f"{first['seconds']:.0f} s, {1000 * first['seconds'] / first['pictures']:.2f} ms a picture"],
        ["memory of the writing process, most", f"{first['peak_mb']:.0f} MB"],
        ["writing it again, nothing changed", f"{again['seconds']:.0f} s ({again['reused']:,} small pictures reused)"],
        ["what opening it loads before the first picture", f"{first['page'] / 1e6:.2f} MB"],
        ["the folder", f"{first['total'] / 1e6:.0f} MB in {files:,} files"],
    ]
    for name, values in browser.items():
        memory = "heap" in name or "processes" in name
        rows.append([name, spread(values, " MB" if memory else " s", 0 if memory else 2)])
    amount = f"{first['pictures']:,.0f} pictures of {SIDE} × {SIDE} (PNG) in {pictures // SAMPLES:,} rows of {SAMPLES}"
    return Result(
        question=f"What does a report of {pictures:,} pictures cost?",
        aim="the page itself under 3 MB, its first view within two seconds, some hundred MB of memory to write it",
        columns=["", ""],
        rows=rows,
        notes=[
            f"{amount}, three steps, {first['problems']:,.0f} rows without a picture; thumbnails of 192 pixels.",
            f"{DIFFERENT} different pictures, hard-linked under as many names: each is read and reduced by itself.",
            "Chromium without a window or a GPU, an empty profile, from file://.",
        ],
    )


if __name__ == "__main__":
    import sys

    print(run(*map(int, sys.argv[1:])).markdown())
