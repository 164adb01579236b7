"""What does an image API cost with a thousand requests in flight: through this project, and through the bare SDK?"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import pkgutil
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, run_python, spread

KEY_NAME, KEY = "BENCHMARK_API_KEY", "benchmark"
MODEL = "gemini-2.5-flash-image"
REQUEST_SECONDS = 300.0
"""How long one request may take: far longer than any answer here, so that nobody asks twice."""

CLIENT = "import sys; from benchmarks import api; api.client(*sys.argv[1:])"
NAMES = {
    "discard": "bare SDK, answer dropped",
    "bare": "bare SDK, image decoded from base64 and written",
    "ours": "this project",
}

LOOP, SAVING, PLANNING = "event loop", "saving", "planning"
THREADS = {"dataflow": LOOP, "MainThread": LOOP, "save": SAVING, "plan": PLANNING}
REST = {
    LOOP: "sockets, HTTP, the loop itself, hand-over between threads",
    SAVING: "checksum, metadata, hand-over",
    PLANNING: "hand-over",
    "other": "hand-over of the request's body to a thread and back",
}
STAGES = (
    ("SDK: request sent, answer read", "dataflow.serving.api_vlm_serving_openai.APIVLMServing_openai._call"),
    ("JSON of the answer", "dataflow.serving.openai_client.parse_json"),
    ("image out of the JSON, base64", "dataflow.serving.api_vlm_serving_openai.chat_reply"),
    ("engine: limits, attempts, sums", "dataflow.runtime.making.Maker.make"),
    ("journal", "dataflow.runtime.journal.Journal.append"),
    ("planner", "dataflow.runtime.planner.Planner.next_batch"),
    ("image decoded and checked", "dataflow.decoding.load_image"),
    ("image made plain RGB", "dataflow.decoding.normalise"),
    ("image encoded again", "dataflow.io.ImageIO._encode"),
    ("image written and synced", "dataflow.io.ImageIO._publish"),
)
"""Where CPU time is taken apart: a name for people, and a function or coroutine. The time of one that calls another is
without the other's."""


# -- the clients, each in a process of its own -------------------------------------------------------------------------


def client(kind: str, settings: str) -> None:
    """Send the requests and print what they cost, as JSON.

    Args:
        kind: one of NAMES.
        settings: JSON of ``url``, ``folder``, ``requests``, ``in_flight``, ``samples`` (after how many images memory is
            looked at) and ``limit`` (seconds after which the process is killed).
    """
    given = json.loads(settings)
    signal.alarm(int(given.pop("limit")))
    clock = Clock(given["requests"], given["in_flight"], given.pop("samples"))
    found = _ours(clock, **given) if kind == "ours" else asyncio.run(_bare(clock, **given, keep=kind == "bare"))
    print(json.dumps(found))


class Clock:
    """Takes the times of a client: from its first request on, and as each image is finished.

    Args:
        requests: how many there will be.
        in_flight: how many at once.
        samples: after how many images memory is looked at.

    Attributes:
        answered: seconds from sending a request to having its answer, all requests together.
        stages: where the CPU time goes, for a client that watches it.
    """

    def __init__(self, requests: int, in_flight: int, samples: list[int]) -> None:
        self.answered = 0.0
        self.stages = Stages()
        self._requests, self._in_flight, self._samples = requests, in_flight, frozenset(samples)
        self._made = time.perf_counter()
        self._began: tuple[float, float, dict[str, float]] | None = None
        self._finished: list[float] = []
        self._resident: dict[int, float] = {}
        self._threads: dict[str, float] = {}
        self._stages: list[tuple[str, str, float]] = []
        self._lock = threading.Lock()

    def sent(self) -> None:
        """A request goes out; the first one starts the clock, and the stages."""
        if self._began is None:
            self.stages.cpu.clear()
            self._began = time.perf_counter(), _cpu(), _thread_times()

    def finished(self) -> None:
        """An image is where it belongs."""
        with self._lock:
            self._finished.append(time.perf_counter())
            number = len(self._finished)
        if number in self._samples:
            self._resident[number] = _resident()
        if number == self._requests:
            # Now, as long as the threads are there.
            self._threads = _thread_times()
            self._stages = [(*where, spent) for where, spent in self.stages.cpu.items()]

    def found(self) -> dict[str, Any]:
        """What was measured. The CPU time is that until now: a table written after the last image counts."""
        assert self._began is not None
        began, cpu, threads = self._began
        times, house = self._finished, self._in_flight
        last = len(times) // house - 1
        first = max(1, (last + 1) // 2)
        middle = times[first * house - 1 : last * house] if last > first else []
        return {
            "start": began - self._made,
            "seconds": times[-1] - began,
            # In whole houses, because answers come in waves at first; what one sees of a run that goes on for hours.
            "steady": (len(middle) - 1) / (middle[-1] - middle[0]) if middle else 0.0,
            "cpu": _cpu() - cpu,
            "answered": self.answered,
            "threads": {name: spent - threads.get(name, 0.0) for name, spent in self._threads.items()},
            "stages": self._stages,
            "missing": self.stages.missing,
            "resident": self._resident,
        }


def _ours(clock: Clock, url: str, folder: str, requests: int, in_flight: int) -> dict[str, Any]:
    """A step as users run it: table, plan, requests, images checked and written durably, journal, table."""
    from dataflow.io import ImageIO
    from dataflow.operators import Text2ImageGenerator
    from dataflow.runtime.engine import RunOptions
    from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
    from dataflow.utils.storage import FileStorage

    class Store(ImageIO):
        def save(self, *arguments: Any, **options: Any) -> Any:
            saved = super().save(*arguments, **options)
            clock.finished()
            return saved

    class Service(APIVLMServing_openai):
        async def _call(self, request: Any) -> Any:
            clock.sent()
            started = time.perf_counter()
            reply = await super()._call(request)
            clock.answered += time.perf_counter() - started
            return reply

    for stage, name in STAGES:
        clock.stages.watch(stage, name)
    os.environ[KEY_NAME] = KEY
    table = Path(folder) / "prompts.jsonl"
    table.write_text("".join(json.dumps({"conversations": _prompt(number)}) + "\n" for number in range(requests)))
    images = Store(Path(folder) / "images")
    serving = Service(f"{url}/v1", KEY_NAME, MODEL, images, max_workers=in_flight, timeout=REQUEST_SECONDS)
    storage = FileStorage(str(table), cache_path=str(Path(folder) / "cache")).step()
    summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(
        storage=storage, input_conversation_key="conversations", output_image_key="images"
    )
    assert summary.done == summary.made == requests, summary
    return clock.found()


async def _bare(clock: Clock, url: str, folder: str, requests: int, in_flight: int, *, keep: bool) -> dict[str, Any]:
    """What one writes with the SDK: as many coroutines as may be in flight, each asking for one image after another."""
    import httpx2
    import openai

    # The limit is named: the library's default is a thousand connections of which a hundred are kept.
    limits = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    transport = openai.DefaultAioHttpClient(timeout=REQUEST_SECONDS, limits=limits)
    service = openai.AsyncOpenAI(
        api_key=KEY, base_url=f"{url}/v1", max_retries=0, timeout=REQUEST_SECONDS, http_client=transport
    )
    numbers = iter(range(requests))

    async def work() -> None:
        for number in numbers:
            clock.sent()
            started = time.perf_counter()
            answer: Any = await service.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": _prompt(number)}],
                extra_body={"modalities": ["image", "text"]},
            )
            clock.answered += time.perf_counter() - started
            url = answer.choices[0].message.images[0]["image_url"]["url"]
            if keep:
                data = base64.b64decode(url.partition(",")[2])
                (Path(folder) / f"{number}.png").write_bytes(data)
            clock.finished()

    async with service:
        await asyncio.gather(*(work() for _ in range(in_flight)))
    return clock.found()


def _prompt(number: int) -> str:
    return f"a picture of thing number {number} on a table beside a window, late afternoon light"


class Stages:
    """CPU time of functions and coroutines, each without that of the others among them.

    Attributes:
        cpu: seconds by thread and stage.
        missing: names of functions that there are none of any more.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.cpu: dict[tuple[str, str], float] = defaultdict(float)
        self._open = threading.local()

    def watch(self, stage: str, name: str) -> None:
        """Put a stopwatch around a function or coroutine, wherever the package uses it.

        Args:
            stage: what to call it.
            name: its dotted name: module, class, function. Where there is none any more, its time is its caller's.
        """
        path, _, last = name.rpartition(".")
        try:
            owner: Any = pkgutil.resolve_name(path)
            function = getattr(owner, last)
        except (AttributeError, ImportError):
            self.missing.append(name)
            return

        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(stage)
            try:
                return function(*arguments, **options)
            finally:
                self.leave()

        async def stepped(*arguments: Any, **options: Any) -> Any:
            return await _Stepped(function(*arguments, **options), self, stage)

        watched = stepped if asyncio.iscoroutinefunction(function) else timed
        setattr(owner, last, watched)
        # Other modules may have it under their own name.
        for name, module in list(sys.modules.items()):
            if name.startswith("dataflow.") and getattr(module, last, None) is function:
                setattr(module, last, watched)

    def enter(self, stage: str) -> None:
        """The thread works on this from now on, until it leaves it."""
        names = self._names()
        self._pass(names)
        names.append(stage)

    def leave(self) -> None:
        """The thread works on what it did before."""
        names = self._names()
        self._pass(names)
        names.pop()

    def _names(self) -> list[str]:
        if not hasattr(self._open, "names"):
            self._open.names = []
        return self._open.names

    def _pass(self, names: list[str]) -> None:
        now = time.thread_time()
        if names:
            self.cpu[_thread_kind(threading.current_thread().name), names[-1]] += now - self._open.since
        self._open.since = now


class _Stepped:
    """Awaits a coroutine; what other tasks do between its steps is not counted."""

    def __init__(self, steps: Coroutine[Any, Any, Any], stages: Stages, stage: str) -> None:
        self._steps, self._stages, self._stage = steps, stages, stage

    def __await__(self) -> Generator[Any, Any, Any]:
        go_on: Any = self._steps.send
        value: Any = None
        while True:
            self._stages.enter(self._stage)
            try:
                waiting = go_on(value)
            except StopIteration as ended:
                return ended.value
            finally:
                self._stages.leave()
            try:
                go_on, value = self._steps.send, (yield waiting)
            except BaseException as error:  # noqa: BLE001 - the coroutine's to handle, whatever it is
                go_on, value = self._steps.throw, error


def _thread_kind(name: str) -> str:
    return THREADS.get(name, THREADS.get(name.rpartition("_")[0], "other"))


def _thread_times() -> dict[str, float]:
    """Seconds this process's threads have run, by kind of thread, and have been ``waiting`` for a core to run on."""
    found: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        ran, waited, _ = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()
        found[_thread_kind(thread.name)] += int(ran) / 1e9
        found["waiting"] += int(waited) / 1e9
    return found


def _cpu() -> float:
    """CPU seconds of this process and of those it has started and waited for, user and system."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def _resident() -> float:
    """MB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


# -- the runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a client.

    Attributes:
        requests: how many.
        in_flight: how many at once.
        latency: seconds the service takes for an answer.
        image_bytes: size of an image.
    """

    requests: int
    in_flight: int
    latency: float
    image_bytes: int

    @property
    def ideal(self) -> float:
        """Seconds from the first request to the last image if nothing took time but the service."""
        return self.requests / self.in_flight * self.latency

    def __str__(self) -> str:
        return f"{self.in_flight:,} in flight, {self.latency:g} s, {self.image_bytes / 1000:g} kB"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a client cost.

    Attributes:
        load: what was asked.
        found: what the client says, see :meth:`Clock.found`; ``peak_mb``.
        service_cpu: CPU seconds of the service.
        others: cores that everybody else on the machine kept busy meanwhile.
        peak: most requests the service had in hand at once.
    """

    load: Load
    found: dict[str, Any]
    service_cpu: float
    others: float
    peak: int

    @property
    def rate(self) -> float:
        """Images per second, from the first request to the last image."""
        return self.load.requests / self.found["seconds"]

    @property
    def share(self) -> float:
        """Percent of the ideal rate."""
        return 100 * self.load.ideal / self.found["seconds"]

    @property
    def steady_share(self) -> float:
        """Percent of the ideal rate while all slots can be full; 0 if the run is too short to say."""
        return 100 * self.found["steady"] * self.load.latency / self.load.in_flight

    @property
    def in_flight(self) -> float:
        """Requests in flight on average."""
        return self.found["answered"] / self.found["seconds"]

    def each(self, seconds: float) -> float:
        """Milliseconds per request."""
        return 1000 * seconds / self.load.requests


def measure(kind: str, load: Load, samples: list[int] | None = None) -> Run:
    """Run a client of a kind against a service of its own.

    Raises:
        subprocess.CalledProcessError: it failed, or took far longer than it can.
    """
    from dataflow.serving.fake_api import FakeApi

    print(f"  {NAMES[kind]}: {load} ...", file=sys.stderr)
    _allow_files(2 * load.in_flight + 200)
    # Slow machines may take fifty times the CPU time that a request takes here.
    limit = 60 + 2 * load.ideal + 0.1 * load.requests
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeApi(latency=load.latency, image_bytes=load.image_bytes, key=KEY, lifetime=limit + 60) as service,
    ):
        before, began = _process_cpu(service.pid), time.perf_counter()
        ours, all_ = _cpu(), _machine_cpu()
        settings: dict[str, Any] = {
            "url": service.url,
            "folder": folder,
            "requests": load.requests,
            "in_flight": load.in_flight,
        }
        settings |= {"samples": samples or [], "limit": limit}
        try:
            found: dict[str, Any] = run_python(CLIENT, kind, json.dumps(settings))
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            raise
        used = _process_cpu(service.pid) - before
        others = _machine_cpu() - all_ - (_cpu() - ours) - used
        seconds = time.perf_counter() - began
        totals = service.ledger()["totals"]
        images = sum(1 for _ in Path(folder).rglob("*.png"))
    assert totals["attempts"] == load.requests, "something was asked for twice"
    assert images == (0 if kind == "discard" else load.requests), "an image is missing"
    return Run(
        load=load, found=found, service_cpu=used, others=max(0.0, others / seconds), peak=totals["peak_in_flight"]
    )


def _allow_files(wanted: int) -> None:
    """Let this process and those it starts open so many files; a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed and {hard} allowed: ulimit -Hn")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _process_cpu(process: int) -> float:
    """CPU seconds of another process."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _machine_cpu() -> float:
    """CPU seconds of everybody on this machine, and of its host's other machines as far as they took from it."""
    words = Path("/proc/stat").read_text().split(maxsplit=9)
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# -- the answers -------------------------------------------------------------------------------------------------------


def throughput(runs: dict[tuple[Load, str], list[Run]]) -> Result:
    """How near each client came to the ideal, and what it took."""
    rows = []
    for (load, kind), repeated in runs.items():
        steady = [run.steady_share for run in repeated]
        rows.append(
            [
                f"{load.latency:g} s",
                NAMES[kind],
                _spread([run.rate for run in repeated]),
                _spread([run.share for run in repeated], " %"),
                _spread(steady, " %") if all(steady) else "-",
                f"{statistics.median(run.in_flight for run in repeated):.0f}",
                _spread([run.each(run.found["cpu"]) for run in repeated], " ms", 2),
                f"{statistics.median(run.each(run.found['threads']['waiting']) for run in repeated):.1f} ms",
                f"{max(run.found['peak_mb'] for run in repeated):.0f} MB",
            ]
        )
    loads = list(dict.fromkeys(load for load, _ in runs))
    size = f"{loads[0].image_bytes / 1000:g} kB"
    ideals = ", ".join(
        f"{load.requests:,} requests in {load.ideal:g} s at {load.latency:g} s of latency" for load in loads
    )
    service = statistics.median(run.each(run.service_cpu) for repeated in runs.values() for run in repeated)
    starts = {
        kind: statistics.median(
            run.found["start"] for (_, each), repeated in runs.items() if each == kind for run in repeated
        )
        for kind in NAMES
    }
    ideal = (
        f"Ideal: every slot full at any time, and nothing but the service takes time: {ideals}. "
        "The clock runs from the first request to the last image written, connecting "
        "and the tail included; in the middle: from the first full house to the last."
    )
    start = f"Start-up before, with all imports: this project {starts['ours']:.1f} s, bare SDK {starts['bare']:.1f} s."
    costs = (
        "CPU: user and system time of the client's process from its first request to its end. Waited for a core: its "
        "threads were ready and others ran, so that the core was not theirs."
    )
    others = [run.others for repeated in runs.values() for run in repeated]
    machine = (
        f"The service runs on the same {os.cpu_count()} cores and takes {service:.1f} ms of CPU per request. "
        f"Others on the machine kept {min(others):.1f} to {max(others):.1f} cores busy meanwhile. Median (range) where "
        "there are several runs."
    )
    less = "The bare SDK checks no image, syncs no file, keeps no journal and tries nothing again."
    return Result(
        question=f"What does an API cost with {loads[0].in_flight:,} requests in flight?",
        aim=f"95 % of the ideal throughput with images of {size} after {loads[0].latency:g} s; CPU and memory told",
        columns=[
            "latency",
            "client",
            "images/s",
            "of the ideal",
            "in the middle",
            "in flight, mean",
            "CPU per request",
            "waited for a core",
            "peak memory",
        ],
        rows=rows,
        notes=[ideal, start, costs, machine, less],
    )


def _spread(values: list[float], unit: str = "", digits: int = 0) -> str:
    """As measure.spread, without a range where there is none."""
    return spread(values, unit, digits) if len(values) > 1 else f"{values[0]:.{digits}f}{unit}"


def cpu(ours: Run, bare: Run) -> Result:
    """Where the CPU time of a request goes."""
    stages = [(thread, stage, spent) for thread, stage, spent in ours.found["stages"]]
    threads = {name: spent for name, spent in ours.found["threads"].items() if name != "waiting"}
    rows = []
    for thread in sorted(threads, key=lambda name: -threads[name]):
        parts = [(stage, spent) for where, stage, spent in stages if where == thread]
        rest = threads[thread] - sum(spent for _, spent in parts)
        rows.append([f"**{thread}**", "", f"**{ours.each(threads[thread]):.2f} ms**"])
        for stage, spent in sorted([*parts, (REST[thread], rest)], key=lambda part: -part[1]):
            if ours.each(spent) >= 0.005:
                rows.append(["", stage, f"{ours.each(spent):.2f} ms"])
    rest = ours.found["cpu"] - sum(threads.values())
    rows.append(["after the last image", "the step's table", f"{ours.each(rest):.2f} ms"])
    rows.append(["all", "", f"{ours.each(ours.found['cpu']):.2f} ms"])
    rows.append([NAMES["bare"], "", f"{bare.each(bare.found['cpu']):.2f} ms"])
    notes = ["One run of those above; functions timed by their thread's CPU clock, each without those it calls."]
    if missing := ours.found["missing"]:
        notes.append(f"Not found, and so not told apart: {', '.join(missing)}.")
    return Result(
        question=f"Where does the CPU time of a request go ({ours.load})?",
        columns=["thread", "work", "CPU per request"],
        rows=rows,
        notes=notes,
    )


def memory(run: Run) -> Result:
    """Whether memory grows with the number of requests."""
    resident = {int(number): size for number, size in run.found["resident"].items()}
    first, last = min(resident), max(resident)
    growth = (resident[last] - resident[first]) * 2**20 / (last - first)
    return Result(
        question=f"Does memory stay flat over {run.load.requests:,} requests?",
        aim="1 KiB more per request at most, once the first quarter is done: the engine remembers each request's id",
        columns=["images finished", "resident memory"],
        rows=[
            *([f"{number:,}", f"{size:.0f} MB"] for number, size in sorted(resident.items())),
            ["peak", f"{run.found['peak_mb']:.0f} MB"],
            [f"growth from {first:,} to {last:,}", f"{growth:.0f} bytes per request"],
        ],
        notes=[f"{run.load}; {run.rate:.0f} images/s, {run.in_flight:.0f} in flight on average, {run.peak} at most."],
    )


def run(
    requests: int = 3000,
    in_flight: int = 1000,
    latency: float = 2.0,
    slow_requests: int = 8000,
    slow_latency: float = 20.0,
    image_bytes: int = 100_000,
    flat_requests: int = 20_000,
    repeats: int = 3,
) -> list[Result]:
    """Every client under the load, then at a latency that leaves the cores time, then many requests in one run."""
    runs: dict[tuple[Load, str], list[Run]] = {}
    load = Load(requests=requests, in_flight=in_flight, latency=latency, image_bytes=image_bytes)
    for _ in range(repeats):
        for kind in NAMES:
            runs.setdefault((load, kind), []).append(measure(kind, load))
    slow = Load(requests=slow_requests, in_flight=in_flight, latency=slow_latency, image_bytes=image_bytes)
    for kind in ("bare", "ours"):
        runs[slow, kind] = [measure(kind, slow)]
    many = Load(requests=flat_requests, in_flight=in_flight, latency=latency, image_bytes=0)
    flat = measure("ours", many, [flat_requests * quarter // 4 for quarter in range(1, 5)])
    return [throughput(runs), cpu(runs[load, "ours"][-1], runs[load, "bare"][-1]), memory(flat)]


def main() -> None:
    """Run it by itself, smaller or larger."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds the service takes (default: 2)")
    parser.add_argument(
        "--slow-latency", type=float, default=20.0, help="the same, where cores stay free (default: 20)"
    )
    parser.add_argument("--image-bytes", type=int, default=100_000)
    parser.add_argument("--flat-requests", type=int, default=20_000, help="for the look at memory (default: 20000)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a run of half a minute that only shows that all works")
    options = vars(parser.parse_args())
    if options.pop("quick"):
        small = {"requests": 300, "slow_requests": 300, "flat_requests": 400}
        small |= {"in_flight": 100, "latency": 0.5, "slow_latency": 2.0}
        options |= {**small, "repeats": 1}
    for result in run(**options):
        print(result.markdown())


if __name__ == "__main__":
    main()
