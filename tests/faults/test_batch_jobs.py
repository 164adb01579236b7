"""Batch jobs at a provider: sent once, found again after any death, every answer with its own row."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image

from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving import batch_jobs
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.utils.storage import FileStorage

pytest.importorskip("openai")
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai

PROMPTS = [f"thing {number}" for number in range(12)]
PROGRAM = """
import sys
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.serving import batch_jobs
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.utils.storage import FileStorage

batch_jobs.FIRST_POLL = 0.1
url, table, folder = sys.argv[1:]
serving = APIVLMServing_openai(url, image_io=ImageIO(folder + "/images"), batch_jobs=True, batch_size=5, max_workers=4)
Text2ImageGenerator(serving).run(FileStorage(table, cache_path=folder).step())
"""


DEADLY = """
import os, signal
from dataflow.serving.openai_batches import OpenAIBatches

submit = OpenAIBatches.submit

async def dies(self, name, lines):
    await submit(self, name, lines)
    os.kill(os.getpid(), signal.SIGKILL)

OpenAIBatches.submit = dies
"""


@pytest.fixture(scope="module")
def server():
    with FakeApi(batch_seconds=0.3) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "any-word")
    monkeypatch.setattr(batch_jobs, "FIRST_POLL", 0.1)
    server.script({})
    server.reset()
    server.before = set()
    server.before = {job["id"] for job in created(server)}
    return server


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in PROMPTS))
    return path


def draw(api, table, **options):
    folder = table.parent / "cache"
    serving = APIVLMServing_openai(
        f"{api.url}/v1", image_io=ImageIO(str(folder / "images")), batch_jobs=True, batch_size=5, max_workers=4
    )
    storage = FileStorage(str(table), cache_path=str(folder)).step()
    return Text2ImageGenerator(serving, options=RunOptions(quiet=True, **options)).run(storage)


def rows(table):
    path = table.parent / "cache" / "dataflow_cache_step_step1.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def require_right_images(table, but=()):
    for prompt, row in zip(PROMPTS, rows(table), strict=True):
        if prompt not in but:
            assert read_mark(Image.open(row["images"][0])) == expected_mark(prompt)


def start(api, table, before=""):
    words = [sys.executable, "-c", before + PROGRAM, f"{api.url}/v1", str(table), str(table.parent / "cache")]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"DF_API_KEY": "any-word"})


def wait_for_jobs(api, number):
    deadline = time.monotonic() + 60
    while len(created(api)) < number:
        assert time.monotonic() < deadline, "the jobs were not sent"
        time.sleep(0.05)


def created(api):
    """Jobs at the provider since the test began."""
    connection = http.client.HTTPConnection(urlsplit(api.url).netloc, timeout=60)
    connection.request("GET", "/v1/batches", headers={"Authorization": "Bearer any-word"})
    jobs = json.loads(connection.getresponse().read())["data"]
    connection.close()
    return [job for job in jobs if job["id"] not in api.before]


def test_all_rows_through_few_jobs_at_half_price(api, table):
    summary = draw(api, table)
    totals = api.ledger()["totals"]
    assert (summary.done, totals["attempts"], len(created(api))) == (12, 12, 3)
    require_right_images(table)
    assert summary.usd == pytest.approx(totals["usd_reported"])
    assert summary.usd == pytest.approx(12 * 0.039 / 2, rel=0.05)
    assert draw(api, table).made == 0
    assert len(created(api)) == 3


def test_what_fails_in_a_job_goes_into_one_job_more(api, table):
    faults = {"thing 1": "refuse", "thing 2": ["lost"], "thing 3": ["expired"], "thing 5": ["half_jpeg"]}
    api.script({**faults, "thing 6": ["500"], "thing 8": "400", "thing 9": ["text_only", "text_only"]})
    summary = draw(api, table)
    require_right_images(table, but=("thing 1", "thing 8", "thing 10", "thing 11"))
    assert (summary.refused, summary.failed) == (3, 1)  # thing 1 stands in thing 10 and 11 too
    assert summary.usd == pytest.approx(api.ledger()["totals"]["usd_reported"])
    assert len(created(api)) <= 3 + 2 + 3  # a second job for each of the first ones at most, and a third attempt


def test_what_an_expired_job_leaves_is_sent_again(api, table):
    api.script({"batch": {"status": "expired"}})
    summary = draw(api, table)
    assert summary.reasons == {"not_in_batch": summary.failed}
    assert summary.done >= 8
    api.script({})
    summary = draw(api, table)
    assert summary.done == 12
    require_right_images(table)
    totals = api.ledger()["totals"]
    assert totals["usd"] == pytest.approx(summary.usd)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ends_while_the_provider_works_pays_once(api, table, ends):
    api.script({"batch": {"seconds": 4.0}})
    process = start(api, table)
    wait_for_jobs(api, 3)
    process.send_signal(ends)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - began < 3.5  # it does not wait for the jobs
    api.script({})
    second = start(api, table)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    require_right_images(table)
    totals = api.ledger()["totals"]
    assert (totals["attempts"], len(created(api))) == (12, 3)
    assert f"${totals['usd_reported']:.4f} spent" in errors


def test_killed_between_saving_images_the_rest_is_collected(api, table):
    api.script({})
    process = start(api, table)
    images = table.parent / "cache" / "images"
    deadline = time.monotonic() + 60
    while sum(1 for _ in images.rglob("*.png")) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    second = start(api, table)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    require_right_images(table)
    totals = api.ledger()["totals"]
    assert totals["attempts"] == 12
    assert f"${totals['usd_reported']:.4f} spent" in errors


def test_a_job_sent_by_a_process_that_died_before_it_knew(api, table):
    """The journal knows the name before the job is sent; its answer never came."""
    process = start(api, table, DEADLY)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(created(api)) == 1
    assert draw(api, table).done == 12
    assert (api.ledger()["totals"]["attempts"], len(created(api))) == (12, 3)
    require_right_images(table)


def test_rows_that_are_gone_are_not_waited_for_and_new_ones_are_sent(api, table):
    api.script({"batch": {"seconds": 3.0}})
    process = start(api, table)
    wait_for_jobs(api, 3)
    process.kill()
    process.communicate()
    api.script({})
    kept = [*PROMPTS[:3], "one more", *PROMPTS[6:]]
    table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in kept))
    assert draw(api, table).done == len(kept)
    assert len(created(api)) == 4
    for prompt, row in zip(kept, rows(table), strict=True):
        assert read_mark(Image.open(row["images"][0])) == expected_mark(prompt)


def test_a_person_sees_that_jobs_are_waited_for(api, table, capsys):
    api.script({"batch": {"seconds": 1.5}})
    draw(api, table, progress=True)
    assert "12 in batch jobs" in capsys.readouterr().err
