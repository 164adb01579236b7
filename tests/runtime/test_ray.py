"""On a real Ray cluster of this machine: the same as in this process, and what dies is made up for."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from dataflow import __version__  # noqa: E402
from dataflow.errors import (  # noqa: E402
    ConfigError,
    FatalServingError,
    MissingExtraError,
    RunInterruptedError,
    RunStoppedError,
)
from dataflow.runtime import crew  # noqa: E402
from dataflow.runtime.ray_cluster import Cluster  # noqa: E402
from dataflow.runtime.ray_worker import DataflowWorker, _Cargo  # noqa: E402
from dataflow.serving.fake_serving import FakeServing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
ON_RAY = {"executor": "ray", "workers": 2}
LIFE = str(Path(__file__).parents[1] / "faults" / "life.py")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


class Placed(FakeServing):
    """Notes where each request was made."""

    async def generate(self, requests):
        with Path(f"{self.log}.pids").open("a") as file:
            file.write(f"{os.getpid()}\n" * len(requests))
        return await super().generate(requests)


def placed(job, **options) -> Placed:
    return Placed(job.io, **{"size": (8, 8), "log": job.log, **options})


def processes(job) -> list[int]:
    path = Path(f"{job.log}.pids")
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_until(met, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize("edit", [False, True])
def test_the_same_as_in_this_process(tmp_path, job, edit):
    other = type(job)(tmp_path / "other")
    other.folder.mkdir()
    found = {}
    for each, options in ((job, ON_RAY), (other, {})):
        rows = [{"prompt": prompt} for prompt in ("a", "b", "a", "no", "c", "d", "broken")]
        if edit:
            rows = [{**row, "image": str(job.picture("red.png"))} for row in rows]
        serving = each.serving(batch_size=2, images_per_prompt=1 + (not edit), script={"no": "refuse", "d": "garbage"})
        summary = each.rows(*rows, "{half a line").run(serving, edit=edit, **options)
        found[each] = replace(summary, seconds=0, output=None)
        assert each.check_images("edited" if edit else "images") > 4
    assert found[job] == found[other]
    assert job.image_files().keys() == other.image_files().keys()
    theirs = other.output.read_bytes().replace(str(other.folder).encode(), str(job.folder).encode())
    assert job.output.read_bytes() == theirs
    assert job.run(job.serving(images_per_prompt=1 + (not edit)), edit=edit, **ON_RAY).made <= 1 + (not edit)


def test_pictures_are_made_over_there_by_all_workers_in_parts_too(job):
    job.prompts(*(f"p{number}" for number in range(24)))
    assert job.run(placed(job, seconds=0.1), part_rows=8, **ON_RAY).done == 24
    assert len(set(processes(job))) == 2, "the same two for all parts"
    assert os.getpid() not in processes(job)
    assert set(job.made().values()) == {1}


def test_out_of_memory_a_crash_and_a_lost_connection(job, no_waiting):
    script = {"crash": "crash", "lost": ["error", "error"]}
    job.prompts(*(f"p{number}" for number in range(8)), "crash", "lost")
    summary = job.run(job.serving(batch_size=4, fits=2, script=script), **ON_RAY)
    assert (summary.done, summary.reasons) == (9, {"crash": 1})


def test_a_row_that_kills_its_worker_fails_alone(job):
    job.prompts(*(f"p{number}" for number in range(10)), "deadly")
    summary = job.run(job.serving(batch_size=2, script={"deadly": "kill"}), **ON_RAY)
    assert (summary.done, summary.reasons) == (10, {"killed_worker": 1})
    assert job.check_images() == 10


def test_one_that_hangs_is_replaced(job, no_waiting):
    job.prompts("a", "stuck", "b")
    summary = job.run(job.serving(script={"stuck": "hang"}, timeout=0.5), max_attempts=2, **ON_RAY)
    assert (summary.done, summary.reasons) == (2, {"timeout": 1})


def test_workers_killed_at_random_moments(job):
    rng = random.Random(3)
    job.prompts(*(f"p{number}" for number in range(150)))
    killed, ended = [], threading.Event()

    def kill() -> None:
        while len(killed) < 4 and not ended.is_set():
            enough = len(processes(job)) + 5
            wait_until(lambda enough=enough: len(processes(job)) > enough or ended.is_set(), "work goes on")
            time.sleep(rng.uniform(0, 0.2))
            if not ended.is_set():
                pid = rng.choice(processes(job)[-4:])
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = job.run(placed(job, batch_size=2, seconds=0.15), **ON_RAY)
    ended.set()
    killer.join()
    assert len(killed) >= 3
    assert summary.done == 150
    assert job.check_images() == 150
    again = job.made().total() - 150
    assert again <= 2 * 2 * len(killed), "no more than a batch being made and one being saved"


def test_more_workers_than_there_is_room_for(job):
    job.prompts(*(f"p{number}" for number in range(12)))
    assert job.run(placed(job, seconds=0.05), executor="ray", workers=9).done == 12
    assert 1 <= len(set(processes(job))) <= 3


def test_as_many_workers_as_there_is_room_for(job):
    job.prompts(*(f"p{number}" for number in range(40)))
    assert job.run(placed(job, seconds=0.1), executor="ray").done == 40
    assert len(set(processes(job))) == 3


class TestResources:
    @pytest.fixture
    def asked(self, tmp_path):
        """What a copy takes, and how many there are."""

        def find(workers=None, remote=False, **takes):
            cluster, serving = Cluster(None, workers, tmp_path), FakeServing()
            serving.remote = remote
            for name, value in takes.items():
                setattr(serving, name, value)
            wanted = cluster.resources(serving)
            return {name: amount for name, amount in wanted.items() if amount}, cluster.count(serving, wanted)

        return find

    def test_on_this_machine(self, asked):
        assert asked() == ({"num_cpus": 1.0}, 3)
        assert asked(num_cpus=1.5, memory_gb=0.5) == ({"num_cpus": 1.5, "memory": 500_000_000}, 2)
        assert asked(num_cpus=None, num_gpus=None) == ({"num_cpus": 3.0}, 1)
        assert asked(workers=2, num_cpus=None) == ({"num_cpus": 1.0}, 2)
        assert asked(num_cpus=0.0) == ({}, 1)

    def test_on_machines_of_several_kinds(self, asked, monkeypatch):
        machines = [{"memory": 1e11}, {"CPU": 6.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}]
        monkeypatch.setattr(Cluster, "machines", lambda self: machines)
        assert asked(num_gpus=None) == ({"num_cpus": 1.0, "num_gpus": 1.0}, 5)
        assert asked(num_gpus=None, num_cpus=None) == ({"num_cpus": 1.0, "num_gpus": 1.0}, 5)
        assert asked(num_gpus=0.4) == ({"num_cpus": 1.0, "num_gpus": 0.4}, 12), "no copy on halves of two GPUs"
        assert asked(num_cpus=7) == ({"num_cpus": 7}, 3)
        assert asked(num_cpus=None) == ({"num_cpus": 6.0}, 4), "each machine with CPUs can take one"
        assert asked(num_cpus=None, workers=6) == ({"num_cpus": 3.0}, 6)
        assert asked(remote=True) == ({"num_cpus": 1.0}, 3), "one on each machine that has room"

    def test_more_than_any_machine_has(self, asked, monkeypatch, caplog):
        with caplog.at_level(logging.WARNING):
            assert asked(num_gpus=2.0)[1] == 1
        assert "no machine of the cluster has what a copy of FakeServing takes (num_cpus=1, num_gpus=2)" in caplog.text
        monkeypatch.setattr(Cluster, "private", True)
        with pytest.raises(ConfigError, match="the cluster is this machine alone"):
            asked(num_gpus=2.0)


class Service(FakeServing):
    """A remote service whose clients leave a mark when they begin and end."""

    remote = True

    async def generate(self, requests):
        with Path(f"{self.log}.calls").open("a") as file:
            file.write(json.dumps([time.time(), 1, os.getpid()]) + "\n")
        try:
            await asyncio.sleep(0.1)
            return [replace(each, usage={"usd": 0.01}) for each in await super().generate(requests)]
        finally:
            with Path(f"{self.log}.calls").open("a") as file:
                file.write(json.dumps([time.time(), -1, os.getpid()]) + "\n")

    def estimate(self, request):
        return 0.01


class TestServices:
    def calls(self, job) -> list[list]:
        return sorted(json.loads(line) for line in Path(f"{job.log}.calls").read_text().splitlines())

    def test_one_limit_for_all_workers(self, job):
        job.prompts(*(f"p{number}" for number in range(30)))
        service = Service(job.io, size=(8, 8), log=job.log, concurrency=4)
        assert job.run(service, **ON_RAY).done == 30
        calls = self.calls(job)
        at_once = most = 0
        for _, change, _ in calls:
            at_once += change
            most = max(most, at_once)
        assert most == 4
        assert len({pid for *_, pid in calls}) == 2

    def test_requests_per_minute(self, job):
        job.prompts(*(f"p{number}" for number in range(8)))
        service = Service(job.io, size=(8, 8), log=job.log, concurrency=4)
        service.requests_per_minute = 240
        job.run(service, **ON_RAY)
        begun = [when for when, change, _ in self.calls(job) if change == 1]
        assert begun[-1] - begun[0] > 7 * 0.25 - 0.2

    def test_one_budget(self, job):
        job.prompts(*(f"p{number}" for number in range(20)))
        service = Service(job.io, size=(8, 8), log=job.log, concurrency=4)
        with pytest.raises(RunStoppedError, match="the budget") as stopped:
            job.run(service, budget_usd=0.075, **ON_RAY)
        assert stopped.value.summary.usd == pytest.approx(0.07)


class Unloadable(FakeServing):
    def setup(self):
        raise FatalServingError("no such weights")


class NotToBePacked(FakeServing):
    def __reduce__(self):
        raise TypeError("holds a lock")


class TestWhatIsWrong:
    def test_a_serving_that_does_not_load(self, job):
        with pytest.raises(RunStoppedError, match="no such weights"):
            job.prompts("a", "b").run(Unloadable(job.io), **ON_RAY)

    def test_a_serving_that_cannot_be_sent(self, job):
        with pytest.raises(ConfigError, match="NotToBePacked cannot be sent to a worker process: holds a lock"):
            job.prompts("a").run(NotToBePacked(job.io), **ON_RAY)

    def test_machines_that_do_not_see_the_folders_or_have_another_version(self, tmp_path):
        def told(folder=None, marks=None, version=__version__) -> str:
            cargo = _Cargo(
                payload=b"", folder=str(folder or Path.cwd()), marks=marks or {}, environment={}, version=version
            )
            error, _, _ = asyncio.run(DataflowWorker().arrive(cargo))
            assert isinstance(error, FatalServingError)
            return str(error)

        assert f"does not see the working directory {tmp_path}/nowhere: No such" in told(tmp_path / "nowhere")
        mark = tmp_path / ".seen-0"
        expected = f"does not see the folder {tmp_path}. It must lie on a disk that all machines"
        assert expected in told(marks={str(mark): "word"})
        mark.write_text("of another folder of the same name")
        assert expected in told(marks={str(mark): "word"})
        assert f"has open-dataflow {__version__}, not 0.0.0" in told(version="0.0.0")

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: "),
            ("ray://head:10001", "start this on a machine of the clus"),
        ],
    )
    def test_a_cluster_that_is_not_there(self, monkeypatch, job, address, message):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(ConfigError, match=message):
            job.prompts("a").run(executor="ray", ray_address=address)

    def test_without_the_library(self, job, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"executor='ray' needs ray: pip install 'open-dataflow\[ray\]'"):
            job.prompts("a").run(**ON_RAY)

    def test_ctrl_c(self, job, monkeypatch):
        job.prompts(*(f"p{number}" for number in range(30)))
        wait = crew._wait
        moments = [1]

        def interrupted(ending, seconds=None) -> None:
            if moments:
                moments.pop()
                wait_until(lambda: len(job.made()) > 3, "some are made")
                raise KeyboardInterrupt
            wait(ending, seconds)

        monkeypatch.setattr(crew, "_wait", interrupted)
        with pytest.raises(RunInterruptedError) as stopped:
            job.run(job.serving(seconds=0.1), **ON_RAY)
        assert stopped.value.summary.done == job.made().total() < 30
        assert job.run(**ON_RAY).done == 30
        assert set(job.made().values()) == {1}


@pytest.mark.slow
def test_the_driver_is_killed(job):
    """With the cluster that it began; the next run makes what was in flight."""
    job.prompts(*(f"p{number}" for number in range(60)))
    life = {
        "table": str(job.input),
        "cache": str(job.cache),
        "images": str(job.io.save_path),
        "serving": {"log": str(job.log), "seconds": 0.1, "size": [8, 8]},
        "options": ON_RAY,
    }
    code = (
        "import json, sys\nfrom dataflow.io import ImageIO\nfrom dataflow.operators import Text2ImageGenerator\n"
        "from dataflow.runtime.engine import RunOptions\nfrom dataflow.serving.fake_serving import FakeServing\n"
        "from dataflow.utils.storage import FileStorage\njob = json.loads(sys.argv[1])\n"
        "serving = FakeServing(ImageIO(job['images']), **job['serving'])\n"
        "storage = FileStorage(job['table'], job['cache']).step()\n"
        "Text2ImageGenerator(serving, options=RunOptions(**job['options'])).run(storage, 'prompt', 'images')\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    folder = tempfile.mkdtemp()  # short: sockets lie in it
    environment |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(life)], env=environment, start_new_session=True)
    wait_until(lambda: job.made().total() > 10, "some are made")
    process.kill()
    process.wait()
    wait_until(lambda: not left_over(folder), "the cluster is gone", 30)
    shutil.rmtree(folder)
    summary = job.run(job.serving(), **ON_RAY)
    assert summary.done == 60
    assert job.check_images() == 60
    assert job.made().total() - 60 <= 2 * 2, "what was being made, and what waited for it"


def left_over(folder: str) -> list[str]:
    """Processes that name a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text()
            except OSError:
                continue
            if folder in words:
                found.append(words)
    return found


def test_nothing_of_it_is_loaded_where_it_is_not_used(job):
    code = (
        "import sys\nimport dataflow.cli, dataflow.operators, dataflow.runtime.engine, dataflow.pipeline\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'ray'])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
