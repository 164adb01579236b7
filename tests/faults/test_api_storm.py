"""An API in a storm: every row ends as its faults say, every dollar is accounted for, and nothing is bought twice.

The fake service's script foretells what each attempt of a request gets. From that alone :meth:`Storm.foretold` works
out how a request must end, for which reason and after how many calls, and the tests compare request by request.

``python test_api_storm.py JOB`` is one life of a run, in a process made to be killed.
"""

import base64
import gzip
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("openai")

from dataflow.cli import main
from dataflow.errors import RunStoppedError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.runtime.journal import Journal
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.fake_api import FAULTS, FakeApi, Script, expected_mark, kind_of_fault, read_mark
from dataflow.serving.fake_api.chat import SHAPES
from dataflow.serving.fake_api.pictures import draw
from dataflow.types import Summary
from dataflow.utils.storage import FileStorage

KEY = "df-secret-0123456789"
MODEL = "gemini-2.5-flash-image"
WORKERS = 8
ATTEMPTS = 3

# What each directive of the storm comes to for the client: how the call ends and the reason. `again` costs one of a
# request's attempts, `wait` none.
WAIT, DONE, REFUSED, BAD_REQUEST = ("wait", ""), ("done", ""), ("refused", "refused"), ("failed", "bad_request")
STORM = {
    **dict.fromkeys(("rate_limit", "rate_limit:0.02", "rate_limit_ms:20", "rate_limit_date:0"), WAIT),
    "rate_limit_info:0.02": WAIT,
    **dict.fromkeys(("408", "409", "425", "500", "502", "503", "504", "529"), ("again", "transient")),
    **dict.fromkeys(("error_list", "error_200", "choice_error", "html:502"), ("again", "transient")),
    **dict.fromkeys(("html", "empty"), ("again", "not_json")),
    **dict.fromkeys(("disconnect", "paid_disconnect"), ("again", "cut_answer")),
    **dict.fromkeys(("cut", "half_stream", "no_end"), ("again", "cut_answer")),
    **dict.fromkeys(("truncated_base64", "garbage_base64"), ("again", "bad_base64")),
    "bomb": ("again", "too_large"),
    **dict.fromkeys(("half_jpeg", "half_png"), ("again", "truncated")),
    **dict.fromkeys(("svg", "gif"), ("again", "unsupported")),
    "not_image": ("again", "not_an_image"),
    "redirect": DONE,  # to the picture, within the service's own origin
    **dict.fromkeys(("redirect_loopback", "url_html", "url_endless"), ("again", "not_an_image")),
    **dict.fromkeys(("redirect_metadata", "url:https://127.0.0.1/x.png"), ("again", "unsafe_url")),
    "url_missing": ("again", "image_gone"),
    "count:2": ("again", "wrong_image_count"),
    # A model that only talks may draw the next time: it is asked again.
    **dict.fromkeys(("count:0", "text_only", "finish:MAX_TOKENS"), ("again", "no_image")),
    **dict.fromkeys(("refuse", "content_policy", "moderation", "451"), REFUSED),
    **dict.fromkeys(("refusal_field", "content_filter", "block", "finish", "finish:IMAGE_SAFETY"), REFUSED),
    **dict.fromkeys(("400", "413", "422"), BAD_REQUEST),
    **dict.fromkeys(("urlsafe_base64", "spaced_base64", "slow:0.03", "drip:0.05", "wrong_type:text/html"), DONE),
}
ELSEWHERE = {"hang", "quota", "expired", "lost"}
"""Faults with tests of their own (below), and those of batch jobs."""
UNREPORTED = {"paid_disconnect", "cut", "half_stream", "no_end"}
"""Faults that lose the usage on its way: the service bills these calls, and no client can know how much."""
ADDRESSES = {"redirect", "redirect_loopback", "redirect_metadata", "url_missing", "url_html", "url_endless"}


def effect(directive, shape, stream):
    """What an attempt comes to, as in ``STORM``; some faults depend on the form of the answer they are in."""
    kind, reason = STORM[directive]
    address = shape.endswith("url")
    if stream and directive in ("half_stream", "no_end"):
        reason = "cut_stream"
    elif directive in ("truncated_base64", "garbage_base64"):
        if address:
            return DONE  # there is no base64 in this answer
        if directive == "garbage_base64" and "markdown" in shape:
            reason = "truncated"  # in running text the base64 just ends there
    elif address and directive in ("svg", "gif"):
        reason = "not_an_image"
    elif shape == "url" and directive in ADDRESSES:
        return "again", "no_image"  # a bare address in running text is an image's only if it looks like one
    return kind, reason


def fault_of(plan):
    """The fault among the directives of an attempt, as the storm names it; None for a good one."""
    found = [f"{name}:{argument}" if argument else name for name, argument in plan.items() if kind_of_fault(name)]
    return found[0] if found else None


@dataclass
class Storm:
    """Rows in a folder and a service with faults; ``run`` may be called again and again.

    Attributes:
        folder: of the table, the cache and the images.
        url: of the service.
        task: ``draw`` or ``edit``.
        stream: answers are streamed.
        count: rows.
        seed: of the storm.
        without: directives left out.
    """

    folder: str
    url: str = ""
    task: str = "draw"
    stream: bool = False
    count: int = 300
    seed: int = 1
    without: tuple = ()
    timeout: float = 30.0

    def __post_init__(self):
        root = Path(self.folder)
        self.table, self.cache, self.log = root / "table.jsonl", root / "cache", root / "asked.log"
        self.store = ImageIO(root / "images", durable=False)
        self.column = "images" if self.task == "draw" else "edited_images"
        # A stream whose type says that it is none is lost at the moment, see the test of that below.
        left_out = {*self.without, *(["wrong_type:text/html"] if self.stream else [])}
        self.faults = [name for name in STORM if name not in left_out]

    # -- the service -------------------------------------------------------------------------------------------------

    @property
    def words(self):
        """The script: a shape for every answer, a row for every fault, and the storm over all others."""
        shapes = {f"<{shape}>": f"shape:{shape}" for shape in SHAPES}
        first = {f"{{{fault}}}": [fault] for fault in self.faults}
        return {**shapes, **first, "storm": {"share": 0.3, "seed": self.seed, "faults": self.faults}}

    def attempts(self, prompt, images):
        """What becomes of each attempt of a request, without end."""
        script, number = Script(self.words), 0
        while True:
            plan = script.plan(prompt, images, None, number)
            fault = fault_of(plan)
            yield effect(fault, plan["shape"], self.stream) if fault else DONE
            number += 1

    def foretold(self, prompt, images):
        """How a request must end if nobody interrupts it: status, reason, and the calls that this takes."""
        tries, calls, attempts = 0, 0, self.attempts(prompt, images)
        while True:
            kind, reason = next(attempts)
            calls += 1
            tries += kind != "wait"
            if kind != "wait" and (kind != "again" or tries == ATTEMPTS):
                return ("failed" if kind == "again" else kind), reason, calls

    # -- the table ---------------------------------------------------------------------------------------------------

    def write(self):
        rows = []
        for number in range(self.count):
            prompt = f"thing {number} <{SHAPES[number % len(SHAPES)]}>"
            if number < 2 * len(self.faults) and number % 2:
                prompt += f" {{{self.faults[number // 2]}}}"
            row: dict[str, object] = {"conversations": prompt}
            if self.task == "edit":
                if number % 5 == 0:
                    row["conversations"] = [{"role": "user", "content": text} for text in (prompt, f"then {prompt}")]
                row["images"] = [self.source(number + other) for other in range(1 + number % 3)]
            rows.append(row)
        self.table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def source(self, number):
        """A picture to edit; a dozen of them."""
        path = Path(self.folder, f"source{number % 12}.png")
        if not path.exists():
            Image.new("RGB", (40 + number % 12, 30), (20 * (number % 12), 90, 200)).save(path)
        return str(path)

    def run(self, **options):
        serving = Noting(
            f"{self.url}/v1", model_name=MODEL, image_io=self.store, max_workers=WORKERS, timeout=self.timeout,
            send_request_stream=self.stream,
        )  # fmt: skip
        serving.log = self.log
        operator = Text2ImageGenerator if self.task == "draw" else PromptedImageEditGenerator
        options = RunOptions(quiet=True, max_attempts=ATTEMPTS, **options)
        summary = operator(serving, options=options).run(self.storage())
        assert summary.balanced
        return summary

    def storage(self):
        return FileStorage(str(self.table), cache_path=str(self.cache)).step()

    def rows(self):
        return [json.loads(line) for line in self.storage().output_path.read_text().splitlines()]

    def errors(self):
        return [error for row in self.rows() if (error := row.get(f"{self.column}_error"))]

    def journal(self):
        return [record for record in Journal(self.cache / "journal" / self.storage().step_name).records() if record]

    def requests(self):
        """Every request that was made, as far as its row tells: prompt, input images, its picture or its end."""
        for row in self.rows():
            turns = row["conversations"]
            prompts = [turns] if isinstance(turns, str) else [turn["content"] for turn in turns]
            images = [Path(path).read_bytes() for path in row["images"]] if self.task == "edit" else []
            paths = row[self.column] if len(prompts) == 1 else row[f"{self.column}_turns"][0]
            error = row.get(f"{self.column}_error")
            for number, prompt in enumerate(prompts):
                if number < len(paths):
                    yield prompt, tuple(images), Path(paths[number]), ("done", "")
                    images = [*images, Path(paths[number]).read_bytes()]  # the next turn is shown the answer
                else:
                    # After it nothing was asked. A row whose first turn was refused says so about its second one.
                    end = error["status"], error["reason"]
                    if end == ("failed", "previous_turn"):
                        assert "the turn before it was refused" in error["message"]
                        end = REFUSED
                    yield prompt, tuple(images), None, end
                    break

    def check_pictures(self):
        """Every picture in the table is its own row's, and there is no other."""
        paths = [path for _, _, path, _ in self.requests() if path]
        assert len(set(paths)) == len(paths), "two rows share a picture"
        for prompt, images, path, _ in self.requests():
            if path:
                assert read_mark(Image.open(path)) == expected_mark(prompt, images), f"{path} is another row's"
        assert {self.store.save_path / name for name, _ in self.store.existing()} == set(paths)

    def check_sums(self, summary):
        """The rows are what the summary counts, and so is what ``dataflow status`` shows."""
        errors = self.errors()
        counts = Counter(error["status"] for error in errors)
        assert (summary.rows, summary.pending, summary.dropped) == (self.count, 0, 0)
        assert (summary.refused, summary.failed) == (counts["refused"], counts["failed"])
        assert summary.reasons == Counter(error["reason"] for error in errors)
        lost = [record for record in self.journal() if record.get("usage", {}).get("lost")]
        assert summary.unpriced == len(lost), "the only calls whose price nobody knows are those that broke off"


class Noting(APIVLMServing_openai):
    """Notes id and prompt of each request before it asks."""

    log = Path()

    async def generate(self, requests):
        if self.log.is_file():
            with self.log.open("a") as file:
                file.writelines(json.dumps([request.request_id, request.prompt]) + "\n" for request in requests)
        return await super().generate(requests)


def summary_of(stopped) -> Summary:
    """What a run that stopped had done."""
    summary = stopped.value.summary
    assert summary is not None
    assert summary.balanced
    return summary


def unreported(ledger):
    """Dollars of calls that were billed while the answer, with the usage in it, got lost on its way."""
    lost = [entry for entry in ledger["attempts"] if entry["usd"] and not entry["reported"]]
    assert all(UNREPORTED & set(entry["fault"].split("+")) for entry in lost), "lost for another reason"
    return math.fsum(entry["usd"] for entry in lost)


@pytest.fixture(autouse=True)
def _quiet_root():
    """The command line sets the root logger up for a process of its own."""
    root, ours = logging.getLogger(), logging.getLogger("dataflow")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


@pytest.fixture
def quick(monkeypatch):
    """Waits between attempts are as long as ever, in hundredths of seconds."""
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr("dataflow.runtime.limits.FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY, latency=0.005) as api:
        yield api


@pytest.fixture
def api(server, quick):
    server.reset()
    return server


@pytest.fixture
def storm(tmp_path, api):
    def make(**facts):
        made = Storm(str(tmp_path), api.url, **facts).write()
        api.script(made.words)
        return made

    return make


# A storm from its beginning to its end --------------------------------------------------------------------------------


def test_the_storm_has_every_fault_there_is():
    names = {name.partition(":")[0] for name in STORM if not name.isdigit()}
    assert names | ELSEWHERE == set(FAULTS)
    assert {kind_of_fault(name) for name in names} == {"retry", "bad", "refused", "valid"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", ["draw", "edit"])
def test_every_row_ends_as_its_faults_say(storm, api, capsys, task, stream):
    site = storm(task=task, stream=stream, count=400 if task == "draw" else 300)
    summary = site.run()
    ledger = api.ledger()
    called = Counter(entry["prompt"] for entry in ledger["attempts"])
    needed = 0
    for prompt, images, _, end in site.requests():
        status, reason, calls = site.foretold(prompt, images)
        assert end == (status, reason), prompt
        assert called.pop(prompt) == calls, prompt
        needed += calls
    assert not called, "something was asked that no row asks for"
    assert ledger["totals"]["attempts"] == needed
    site.check_pictures()
    site.check_sums(summary)
    assert summary.usd + unreported(ledger) == pytest.approx(ledger["totals"]["usd"])
    # The storm was one: every fault came, rows were refused and rows failed after all attempts.
    played = [fault for entry in ledger["attempts"] for fault in entry["fault"].split("+") if fault in STORM]
    assert set(played) == set(site.faults)
    assert len(played) > 0.3 * needed
    assert summary.refused > 5
    assert summary.failed > sum(error["reason"] == "bad_request" for error in site.errors()) > 0

    assert main(["status", str(site.cache), "--json"]) == 0
    [step] = json.loads(capsys.readouterr().out)["steps"]
    assert step["usd"] == pytest.approx(summary.usd)
    assert [step[name] for name in ("done", "refused", "failed")] == [summary.done, summary.refused, summary.failed]
    again = site.run(retry=frozenset())
    assert (again.made, again.usd) == (0, pytest.approx(summary.usd))
    assert api.ledger()["totals"]["attempts"] == needed


def test_a_service_that_hangs_or_drips_is_given_up_and_asked_again(storm, api):
    """These calls end by our own clock; what they cost nobody is told, and it is not made up."""
    site = storm(count=4, timeout=1.0)
    prompts = ["hung once", "dripped once", "hung for ever", "fine"]
    site.table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in prompts))
    api.script({"hung once": ["hang"], "dripped once": ["drip:30"], "hung for ever": "hang"})
    summary = site.run()
    assert (summary.done, summary.failed, summary.reasons) == (3, 1, {"timeout": 1})
    calls = Counter(entry["prompt"] for entry in api.ledger()["attempts"])
    assert calls == {"hung once": 2, "dripped once": 2, "hung for ever": 3, "fine": 1}
    site.check_pictures()
    lost = [entry for entry in api.ledger()["attempts"] if entry["usd"] and not entry["reported"]]
    assert [entry["fault"] for entry in lost] == ["drip:30"]
    assert summary.usd == pytest.approx(api.ledger()["totals"]["usd_reported"])


# A storm that is interrupted ------------------------------------------------------------------------------------------


def check_interrupted(site, ledger, *, lost=0):
    """Every end follows from the calls that were made.

    Args:
        site: after a run to the end, with nothing tried again that had failed.
        ledger: of all runs.
        lost: calls whose answer may have been lost to a kill. Only such a call may have another one after it although
            it needed none.

    Returns:
        The least number of calls that would have done.
    """
    called = Counter(entry["prompt"] for entry in ledger["attempts"])
    least = wasted = 0
    for prompt, images, _, end in site.requests():
        calls = called.pop(prompt)
        attempts = [kind for kind, _ in zip(site.attempts(prompt, images), range(calls), strict=False)]
        status, reason = attempts[-1]
        if status == "again":
            status = "failed"
            assert sum(kind == "again" for kind, _ in attempts) >= ATTEMPTS, f"{prompt} was given up early"
        assert end == (status, reason), (prompt, attempts)
        wasted += sum(kind in ("done", "refused", "failed") for kind, _ in attempts[:-1])
        least += site.foretold(prompt, images)[2]
    assert not called, "something was asked that no row asks for"
    assert wasted <= lost, "answers that had come were asked for again"
    site.check_pictures()
    return least


@pytest.mark.parametrize("fault", ["quota", "401", "402", "403", "404"])
def test_what_is_finished_stays_when_the_service_stops_for_good(storm, api, fault):
    site = storm(count=120, without=("slow:0.03", "drip:0.05"))
    api.script({**site.words, "thing 70 ": [fault]})
    with pytest.raises(RunStoppedError, match=str(fault if fault != "quota" else "quota")) as stopped:
        site.run()
    left = summary_of(stopped)
    assert 20 < left.done < 120
    before = Counter(entry["prompt"] for entry in api.ledger()["attempts"])
    ended = {record["k"] for record in site.journal() if record["s"] in ("done", "refused", "failed")}
    assert len(ended) == left.rows - left.pending
    summary = site.run(retry=frozenset())
    site.check_sums(summary)
    # The row that met the stop has one call more: it is left out of the comparison with the script of the others.
    ledger = api.ledger()
    ledger["attempts"] = [entry for entry in ledger["attempts"] if entry["fault"].split("+")[-1] != fault]
    assert summary.usd + unreported(ledger) == pytest.approx(ledger["totals"]["usd"])
    once = {entry["prompt"] for entry in ledger["attempts"]} - set(before)
    assert len(once) > 20, "nothing was left for the second run"


@pytest.mark.parametrize("task", ["draw", "edit"])
def test_a_budget_holds_through_the_storm(storm, api, task):
    """Three runs, each with more money. What the service billed and told never passes the budget.

    Left out: the answers that were cut, whose price nobody was told (``unreported``), and one with two pictures for the
    price of two, which nothing foretells.
    """
    site = storm(task=task, count=200, without=("count:2",))
    dearest = 0.0388  # a picture by its tokens; what is left over must not hold another call
    for budget in (1.5, 4.0):
        with pytest.raises(RunStoppedError, match="does not hold another call") as stopped:
            site.run(budget_usd=budget, retry=frozenset())
        ledger = api.ledger()
        spent = ledger["totals"]["usd"] - unreported(ledger)
        left = summary_of(stopped)
        assert left.usd == pytest.approx(spent)
        # What broke off counts as bought: the service may have billed it, and some of it it did.
        assert budget - (2 + left.unpriced) * dearest * 1.1 < spent <= ledger["totals"]["usd"] <= budget
        assert left.pending > 10
    summary = site.run(budget_usd=50.0, retry=frozenset())
    ledger = api.ledger()
    least = check_interrupted(site, ledger)
    site.check_sums(summary)
    assert summary.usd + unreported(ledger) == pytest.approx(ledger["totals"]["usd"])
    assert ledger["totals"]["attempts"] <= 1.05 * least
    assert site.run(budget_usd=0.01, retry=frozenset()).made == 0, "a table that is done needs no budget"


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "stream"), [("draw", False), ("edit", True)])
def test_killed_in_the_storm_and_going_on(storm, api, tmp_path, task, stream):
    """SIGKILL at random moments: what is recorded is never bought again, and only what was in flight is lost."""
    rng = random.Random(30)
    site = storm(task=task, stream=stream, count=300)
    site.log.touch()
    errors = tmp_path / "errors.txt"

    def start():
        with errors.open("ab") as file:
            return subprocess.Popen([sys.executable, __file__, json.dumps(asdict(site))], stderr=file)

    def asked():
        return site.log.read_bytes().count(b"\n")

    kills, ended_at = 0, []
    for moment in [rng.uniform(*span) for span in ((1, 50), (50, 150), (150, 250), (250, 360))]:
        process = start()
        wait_until(lambda at=moment, life=process: asked() >= at or life.poll() is not None, f"{moment} calls")
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"this life ended before its kill: {errors.read_text()}"
        kills += 1
        wait_until(lambda: not api.ledger()["totals"]["in_flight"], "the service to notice")
        ended = {record["k"] for record in site.journal() if record["s"] in ("done", "refused", "failed")}
        ended |= {Path(name).stem for name, _ in site.store.existing()}  # pictures that lie there whole
        ended_at.append((len(api.ledger()["attempts"]), ended))
    assert start().wait(120) == 0, errors.read_text()

    ledger = api.ledger()
    least = check_interrupted(site, ledger, lost=kills * (WORKERS + 1))
    prompts = dict(json.loads(line) for line in site.log.read_text().splitlines())
    assert len(prompts) == len(set(prompts.values()))
    for calls, ended in ended_at:
        again = {entry["prompt"] for entry in ledger["attempts"][calls:]} & {prompts[key] for key in ended}
        assert not again, "bought again although it was there"
    total = ledger["totals"]["attempts"]
    print(
        f"\n{task}: {total} calls, {least} without kills, {kills} kills, {len(ended_at[-1][1])} ended before the last"
    )
    assert total <= 1.05 * least + kills * WORKERS

    check_paid(site, ledger, prompts, kills)
    summary = site.run(retry=frozenset())
    assert (summary.made, api.ledger()["totals"]["attempts"]) == (0, total)
    site.check_sums(summary)


def check_paid(site, ledger, prompts, kills):
    """The journal holds the price of every call whose usage came, but for those that were in flight at a kill."""
    paid = defaultdict(list)
    for record in site.journal():
        if record.get("usage", {}).get("usd") is not None:
            paid[prompts[record["k"]]].append(record["usage"]["usd"])
    billed = defaultdict(list)
    for entry in ledger["attempts"]:
        if entry["usd"]:
            billed[entry["prompt"]].append((not entry["reported"], entry["usd"]))
    lost = 0
    for prompt, prices in billed.items():
        # An answer may have arrived whole just before a kill that the service took for a cut.
        left = sorted(prices)
        for price in paid.pop(prompt, []):
            left.remove(next(known for known in left if known[1] == pytest.approx(price)))
        lost += sum(not unreported for unreported, _ in left)
    assert not paid, "calls that the service has not billed"
    assert lost <= kills * (WORKERS + 1)


# Answers that no script has -------------------------------------------------------------------------------------------


class Service(ThreadingHTTPServer):
    """A chat service on real sockets whose every answer the test writes itself.

    Args:
        answer: is called with the handler and the body asked with, None for a GET.
    """

    daemon_threads = True

    def __init__(self, answer):
        self.asked, self.sent = [], 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                service.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                answer(self, json.loads(data))

            def do_GET(self):
                service.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                answer(self, None)

            def log_message(self, format, *args):  # noqa: A002 - the name of the library
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the client hangs up; that is what is tested

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def calls(self):
        return [path for path, _ in self.asked if path.endswith("/chat/completions")]


USAGE = {"prompt_tokens": 2, "completion_tokens": 1290, "completion_tokens_details": {"image_tokens": 1290}}
PRICE = 1290 * 30e-6 + 2 * 0.3e-6


def send(handler, status, data, **headers):
    if not isinstance(data, bytes):
        data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **headers}
    handler.send_response(status)
    for name, value in {"Content-Length": len(data), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(data)


def picture_at(url):
    message = {"role": "assistant", "content": "", "images": [{"type": "image_url", "image_url": {"url": url}}]}
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": USAGE}


def picture_of(prompt):
    return picture_at("data:image/png;base64," + base64.b64encode(draw(prompt)).decode())


@pytest.fixture
def ask(tmp_path, quick):
    """A row, or several, against a service: the summary and the first row."""

    def ask(service, prompts=("a fox",), **facts):
        site = Storm(str(tmp_path), service.url, count=len(prompts), **facts)
        site.table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in prompts))
        summary = site.run()
        return summary, site.rows()[0]

    return ask


def test_a_service_that_is_down_costs_no_request_its_attempts(ask, monkeypatch):
    """It fails more often than all requests together may; from the eighth failure in a row on nobody is to blame."""
    monkeypatch.setattr("dataflow.runtime.limits.LONGEST_WAIT", 0.02)
    prompts = [f"fox {number}" for number in range(12)]

    def answer(handler, body):
        if len(service.asked) <= ATTEMPTS * len(prompts):
            send(handler, 503, {"error": {"message": "down for maintenance"}})
        else:
            send(handler, 200, picture_of(body["messages"][0]["content"]))

    with Service(answer).running() as service:
        summary, _ = ask(service, prompts)
        assert (summary.done, summary.failed) == (12, 0)
        assert len(service.calls()) == (ATTEMPTS + 1) * len(prompts)


@pytest.mark.parametrize("fault", ["disconnect", "paid_disconnect"])
def test_a_dropped_connection_is_not_called_a_timeout(storm, api, fault):
    site = storm(count=1)
    api.script({"": fault})
    site.run()
    [error] = site.errors()
    assert error["reason"] == "cut_answer"
    assert "no answer within" not in error["message"]


def test_a_stream_under_a_wrong_type_is_read(storm, api):
    site = storm(count=3, stream=True)
    api.script({"": ["wrong_type:text/plain"]})
    summary = site.run()
    assert (summary.done, api.ledger()["totals"]["attempts"]) == (3, 3)
    assert summary.usd == pytest.approx(api.ledger()["totals"]["usd"])


def test_a_paid_answer_whose_picture_comes_slowly_is_counted(ask):
    """The answer came, with its usage; the picture behind its URL takes longer than the call may."""

    def answer(handler, body):
        if body is None:
            time.sleep(1.2)
            send(handler, 200, draw("a fox"), Content_Type="image/png")
        else:
            send(handler, 200, picture_at("/v1/images/fox.png"))

    with Service(answer).running() as service:
        summary, _ = ask(service, timeout=0.8)
        assert summary.usd == pytest.approx(PRICE * len(service.calls()))


def streamed(handler, *, done, then):
    """A whole answer as a stream, and something else than the end of it."""
    handler.send_response(200)
    for name, value in (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")):
        handler.send_header(name, value)
    handler.end_headers()
    answer = picture_of("a fox")
    delta = answer["choices"][0]["message"]
    chunks = [{"choices": [{"index": 0, "delta": delta}]}, {"choices": [{"index": 0, "finish_reason": "stop"}]}]
    events = [
        *(json.dumps(chunk) for chunk in (*chunks, {"choices": [], "usage": USAGE})),
        *(["[DONE]"] if done else []),
    ]
    for event in events:
        data = f"data: {event}\n\n".encode()
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
    handler.close_connection = True
    time.sleep(then)


@pytest.mark.parametrize("then", [0, 2.5], ids=["dropped", "left open"])
def test_a_stream_that_has_said_its_end_is_over(ask, then):
    with Service(lambda handler, _: streamed(handler, done=True, then=then)).running() as service:
        summary, row = ask(service, stream=True, timeout=0.8)
        assert (summary.done, len(service.calls())) == (1, 1), row
        assert summary.usd == pytest.approx(PRICE)


def test_the_usage_of_a_stream_that_breaks_off_is_counted(ask):
    with Service(lambda handler, _: streamed(handler, done=False, then=0)).running() as service:
        summary, _ = ask(service, stream=True)
        assert summary.usd == pytest.approx(PRICE * len(service.calls()))


LISTED = {
    "refused": (400, {"code": 400, "message": "no", "reason": "content_policy_violation"}),
    "auth": (400, {"code": 400, "message": "no", "details": [{"reason": "API_KEY_INVALID"}]}),
    "quota": (429, {"code": 429, "message": "no", "details": [{"violations": [{"quotaId": "RequestsPerDay"}]}]}),
}


@pytest.mark.parametrize("kind", LISTED)
def test_errors_in_a_list_are_read(ask, kind):
    """Gemini's OpenAI-compatible endpoint wraps its errors so."""
    status, error = LISTED[kind]

    def answer(handler, _):
        if len(service.asked) > 3:
            send(handler, 200, picture_of("a fox"))  # ends what would else be tried for ever
        else:
            send(handler, status, [{"error": error}])

    with Service(answer).running() as service:
        if kind == "refused":
            assert ask(service)[0].refused == 1
        else:
            with pytest.raises(RunStoppedError):
                ask(service)
        assert len(service.calls()) == 1


def test_a_budget_holds_for_requests_with_many_references(storm, api):
    site = storm(task="edit", count=40)
    images = [site.source(number) for number in range(12)]
    site.table.write_text(
        "".join(json.dumps({"images": images, "conversations": f"join {n}"}) + "\n" for n in range(40))
    )
    api.script({"": "slow:0.3"})  # so that all eight are under way before the first has told its price
    with pytest.raises(RunStoppedError, match="does not hold another call"):
        site.run(budget_usd=0.312)
    assert api.ledger()["totals"]["usd"] <= 0.312


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_service_that_redirects_elsewhere_is_not_followed(ask, status):
    """Whoever speaks for the service must not have the request sent to another machine, a cloud's metadata included."""
    with Service(lambda handler, _: send(handler, 200, picture_of("a fox"))).running() as other:
        target = f"http://localhost:{other.server_port}/v1/chat/completions"
        with Service(lambda handler, _: send(handler, status, b"", Location=target)).running() as service:
            assert service
            with pytest.raises(RunStoppedError, match="redirects to"):
                ask(service)
        assert not other.asked


def test_the_key_is_not_sent_along_when_a_service_redirects(ask):
    with Service(lambda handler, _: send(handler, 200, picture_of("a fox"))).running() as other:
        target = f"http://localhost:{other.server_port}/v1/chat/completions"
        with Service(lambda handler, _: send(handler, 307, b"", Location=target)).running() as service:
            with pytest.raises(RunStoppedError, match="redirects to"):
                ask(service)
            assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers in service.asked)
        assert KEY not in str(other.asked)


def endless(status):
    """An answer of 64 MiB that does not say how long it is; the server keeps how much of it was sent."""

    def answer(handler, _):
        handler.server.sent = 0
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.close_connection = True
        while handler.server.sent < 64 * 2**20:
            handler.wfile.write(bytes(2**16))
            handler.server.sent += 2**16

    return answer


@pytest.mark.parametrize(
    "status",
    [
        200,
        500,
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_end_is_cut_off(ask, monkeypatch, status, stream):
    monkeypatch.setattr("dataflow.serving.openai_client.MAX_ANSWER", 2**20)
    with Service(endless(status)).running() as service:
        summary, _ = ask(service, stream=stream)
        assert summary.failed == 1
        assert service.sent < 16 * 2**20


def test_an_answer_that_unpacks_to_gigabytes_is_cut_off(ask, monkeypatch):
    monkeypatch.setattr("dataflow.serving.openai_client.MAX_ANSWER", 2**20)
    packed = gzip.compress(bytes(64 * 2**20))
    answer = send
    with Service(lambda handler, _: answer(handler, 200, packed, Content_Encoding="gzip")).running() as service:
        summary, row = ask(service)
    assert summary.reasons == {"too_large": 1}, row


def live(job):
    """One life of a run, as the fixtures set it up, in a process of its own."""
    from dataflow.runtime import limits

    limits.FIRST_WAIT = 0.01
    Storm(**job).run(retry=frozenset())


if __name__ == "__main__":
    os.environ["DF_API_KEY"] = KEY
    live(json.loads(sys.argv[1]))
