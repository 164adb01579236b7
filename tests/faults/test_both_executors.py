"""The same faults in this process and on a Ray cluster of this machine: the promises do not depend on the executor."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("openai")


from tests.faults.test_api_storm import KEY, STORM, Storm, unreported  # noqa: E402

from dataflow.errors import CacheBusyError, RunStoppedError, StepError  # noqa: E402
from dataflow.io import ImageIO  # noqa: E402
from dataflow.operators import ImageEvaluator, ScoreFilter, Text2ImageGenerator  # noqa: E402
from dataflow.runtime.engine import RunOptions  # noqa: E402
from dataflow.runtime.lock import cache_lock  # noqa: E402
from dataflow.serving.fake_api import FakeApi  # noqa: E402
from dataflow.serving.image_probe import ImageProbeServing  # noqa: E402
from dataflow.utils.storage import FileStorage  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
EXECUTORS = {"local": {}, "ray": {"executor": "ray", "workers": 2}}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """The address of a cluster to which this process is connected."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(params=EXECUTORS)
def options(request):
    """Options of a run, for each executor."""
    return EXECUTORS[request.param]


def extra(job, wanted: int) -> int:
    """Generations beyond what was wanted; every request was made."""
    assert len(job.made()) == wanted
    return job.made().total() - wanted


def test_01_the_driver_is_killed_again_and_again(job, cluster):
    """On Ray; in this process it is tests/faults/test_sigkill.py."""
    job.rows(*({"conversations": f"p{number // 2}"} for number in range(60)))
    rng = random.Random(8)
    life = {
        "table": str(job.input),
        "cache": str(job.cache),
        "images": str(job.io.save_path),
        "serving": {"log": str(job.log), "seconds": 0.1, "size": [8, 8], "images_per_prompt": 2},
        "options": {**EXECUTORS["ray"], "ray_address": cluster},
    }
    code = "import json, sys; sys.path.insert(0, sys.argv[2]); import life; life.run(json.loads(sys.argv[1]))"
    words = [sys.executable, "-c", code, json.dumps(life), str(Path(__file__).parent)]
    kills = 0
    while kills < 5:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = job.made().total(), time.monotonic() + 60
        while job.made().total() <= before + rng.randint(1, 8) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 3
    summary = Text2ImageGenerator(
        job.serving(images_per_prompt=2), options=RunOptions(quiet=True, **EXECUTORS["ray"])
    ).run(job.storage())
    assert (summary.rows, summary.done, summary.pending) == (60, 60, 0)
    paths = [path for row in job.table() for path in row["images"]]
    assert len(paths) == len(set(paths)) == 120
    for row in job.table():
        for path in row["images"]:
            job.check_image(path, row["conversations"])
    assert extra(job, 120) <= kills * 2 * 2, "what two copies were making, and what waited for them"


def test_05_06_08_a_lost_record_a_torn_tail_and_an_image_cut_short(job, options):
    job.prompts(*(f"p{number}" for number in range(8)))
    job.run(**options)
    lines = job.journal.path.read_bytes().splitlines(keepends=True)
    done = [number for number, line in enumerate(lines) if b'"done"' in line]
    kept = [line for number, line in enumerate(lines) if number != done[2]]
    job.journal.path.write_bytes(b"".join(kept) + b'{"s": "done", "id": "00')
    cut = job.io.save_path / job.records("done")[0]["img"][0]["name"]
    cut.write_bytes(cut.read_bytes()[:100])
    job.output.unlink()
    summary = job.run(**options)
    assert (summary.done, summary.adopted, summary.made) == (8, 1, 1)
    assert job.check_images() == 8
    assert extra(job, 8) == 1
    assert job.run(**options).made == 0


@pytest.mark.parametrize("place", ["images", "journal"])
def test_07_a_full_disk(job, options, disk, place):
    job.rows(*({"prompt": f"p{number}", "text": "x" * 300} for number in range(40)))
    if place == "images":
        job.io = ImageIO(disk.folder / "images")
        disk.leave(20 * 4096)
    else:
        job.cache = disk.folder / "cache"
        disk.leave(5 * 4096)
    serving = {"seconds": 0.02, "size": (8, 8)}
    with pytest.raises((RunStoppedError, StepError), match="disk is full"):
        job.run(job.serving(**serving), **options)
    disk.folder.joinpath("ballast").unlink()
    summary = job.run(job.serving(**serving), **options)
    assert summary.done == job.check_images() == 40
    assert extra(job, 40) <= 8, "what was in flight when it was full"
    assert not list(disk.folder.rglob("*.tmp"))


def test_09_a_second_process(job, options):
    job.prompts("a")
    with cache_lock(job.cache), pytest.raises(CacheBusyError):
        job.run(**options)
    assert not job.made()


def test_10_17_duplicates_and_batches_formed_anew(job, options):
    job.prompts(*(f"p{number % 3}" for number in range(12)))
    assert job.run(job.serving(batch_size=4), **options).made == 12
    paths = [row["images"][0] for row in job.table()]
    before = {path: job.io.read(path).tobytes() for path in paths}
    assert len(before) == 12
    for path in paths[1::3]:
        Path(path).unlink()
    assert job.run(job.serving(batch_size=3), **options).made == 4
    assert [row["images"][0] for row in job.table()] == paths
    assert {path: job.io.read(path).tobytes() for path in paths} == before


def test_11_the_children_of_a_row(job, options):
    job.prompts("a", "b", "c")
    job.run(job.serving(images_per_prompt=4), **options)
    paths = [path for row in job.table() for path in row["images"]]
    lines = job.journal.path.read_bytes().splitlines(keepends=True)
    of_b = {Path(path).stem for path in job.table()[1]["images"][1:3]}
    job.journal.path.write_bytes(b"".join(line for line in lines if not any(each.encode() in line for each in of_b)))
    for path in paths:
        if Path(path).stem in of_b:
            Path(path).unlink()
    summary = job.run(job.serving(images_per_prompt=4), **options)
    assert (summary.done, summary.made) == (3, 2)
    assert [path for row in job.table() for path in row["images"]] == paths


def test_12_what_a_filter_dropped_is_not_made_again(job, options):
    job.prompts(*(f"p{number}" for number in range(20)))
    run_options = RunOptions(quiet=True, **options)

    def pipeline():
        storage = FileStorage(str(job.input), str(job.cache))
        made = Text2ImageGenerator(job.serving(), options=run_options).run(storage.step(), "prompt", "images").made
        scored = ImageEvaluator(ImageProbeServing(), options=run_options)
        scored.run(storage.step(), "images", output_key="probe")
        rules = ScoreFilter(options=run_options)
        kept = rules.run(storage.step(), input_score_key="probe.brightness", minimum=0.45)
        return made, kept.done, kept.dropped

    made, done, dropped = pipeline()
    assert made == 20
    assert done + dropped == 20
    assert min(done, dropped) > 0
    assert pipeline() == (0, done, dropped)
    assert job.made().total() == 20


def test_13_other_settings_have_other_pictures(job, options):
    job.prompts("a", "b")
    job.run(**options)
    before = job.image_files()
    assert job.run(job.serving(params={"num_inference_steps": 9}), **options).made == 2
    assert before.items() <= job.image_files().items()
    assert len(job.image_files()) == 4
    assert job.run(**options).made == 0


@pytest.fixture
def service(monkeypatch):
    """A fake service, whose waits are as long as ever, in hundredths of seconds."""
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr("dataflow.runtime.limits.FIRST_WAIT", 0.01)
    with FakeApi(key=KEY, latency=0.005) as api:
        yield api


def test_14_a_service_in_a_storm(tmp_path, options, service):
    """Every kind of fault in a third of all answers; in this process also tests/faults/test_api_storm.py."""
    site = Storm(str(tmp_path), service.url, count=240).write()
    service.script(site.words)
    summary = site.run(**options)
    ledger = service.ledger()
    called = Counter(entry["prompt"] for entry in ledger["attempts"])
    for prompt, images, _, end in site.requests():
        status, reason, calls = site.foretold(prompt, images)
        assert end == (status, reason), prompt
        assert called.pop(prompt) == calls, prompt
    assert not called, "something was asked that no row asks for"
    site.check_pictures()
    site.check_sums(summary)
    assert summary.usd + unreported(ledger) == pytest.approx(ledger["totals"]["usd"])
    again = site.run(retry=frozenset(), **options)
    assert (again.made, again.usd) == (0, pytest.approx(summary.usd))


def test_14_a_service_that_is_gone_for_a_while(tmp_path, options, service):
    site = Storm(str(tmp_path), service.url, count=40, without=tuple(STORM)).write()
    service.script({"thing": "503"})
    threading.Timer(1.5, service.script, [{}]).start()
    summary = site.run(**options)
    assert (summary.done, summary.failed) == (40, 0)
    site.check_pictures()
