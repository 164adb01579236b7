"""What the service bills, records and limits, and how its process lives."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dataflow.errors import ConfigError
from dataflow.serving.fake_api import PRICES, FakeApi, Script
from dataflow.serving.prices import Rates, dollars


@pytest.fixture(autouse=True)
def _clean(api):
    api.script({})
    api.reset()


class TestBilling:
    def test_every_api_reports_what_it_bills(self, api, wire):
        api.script({"text": "say:four words of text+"})
        answers = [wire.chat("a"), wire.generate("b", n=3), wire.gemini("c")]
        reports = [answers[0].json["usage"], answers[1].json["usage"], answers[2].json["usageMetadata"]]
        entries = api.ledger()["attempts"]
        assert [entry["usage"] for entry in entries] == reports
        assert [entry["images"] for entry in entries] == [1, 3, 1]
        rates = Rates(**PRICES)
        for report, entry in zip(reports, entries, strict=True):
            assert dollars(rates, report, entry["images"]) == pytest.approx(entry["usd"])

    def test_sums(self, api, wire):
        api.script({"no": "500", "blocked": "refuse", "words": "text_only", "lost": "cut", "gone": "paid_disconnect"})
        for prompt in ("fine", "no", "blocked", "words", "lost"):
            wire.chat(prompt)
        wire.raw("gone")
        ledger = api.ledger()
        entries = {entry["prompt"]: entry for entry in ledger["attempts"]}
        assert [name for name, entry in entries.items() if entry["usage"]] == ["fine", "words", "lost", "gone"]
        assert [name for name, entry in entries.items() if entry["reported"]] == ["fine", "words"]
        totals = ledger["totals"]
        assert (totals["attempts"], totals["billed"], totals["images"]) == (6, 4, 3)
        assert totals["usd"] == pytest.approx(math.fsum(entry["usd"] for entry in entries.values()))
        assert totals["usd_reported"] == pytest.approx(entries["fine"]["usd"] + entries["words"]["usd"])
        assert entries["words"]["usd"] < entries["fine"]["usd"] / 100

    def test_usage_that_a_stream_was_not_asked_for_is_not_reported(self, api, wire):
        wire.chat("a", stream=True)
        wire.chat("b", stream=True, stream_options={"include_usage": True})
        assert [entry["reported"] for entry in api.ledger()["attempts"]] == [False, True]

    def test_the_service_can_state_dollars_itself(self, api, wire):
        api.script({"": "cost"})
        usage = wire.chat("a").json["usage"]
        assert usage["cost"] == pytest.approx(api.ledger()["totals"]["usd"])

    def test_a_client_that_hangs_up_pays(self, api, wire):
        api.script({"slow": "slow:5"})
        assert wire.raw("slow", seconds=0.2) == b"(no end)"
        entry = api.ledger()["attempts"][0]
        assert (entry["usd"] > 0, entry["reported"]) == (True, False)

    def test_attempts_are_counted_by_prompt_inputs_and_seed(self, api, wire):
        for seed in (1, 1, 2):
            wire.chat("again", seed=seed)
        assert [entry["attempt"] for entry in api.ledger()["attempts"]] == [0, 1, 0]


class TestRecords:
    def test_keys_are_nowhere(self, api, wire):
        wire.post("/v1/images/generations", {"model": "m", "prompt": "a"}, Authorization="Bearer sk-very-secret")
        wire.post("/v1/images/generations?key=sk-very-secret", {"model": "m", "prompt": "b"})
        wire.generate("c")
        recorded = api.requests("generations")
        assert [request["key"] for request in recorded] == [True, True, False]
        assert [entry["key"] for entry in api.ledger()["attempts"]] == [True, True, False]
        assert "very-secret" not in json.dumps([recorded, api.ledger()])
        assert recorded[0]["body"] == {"model": "m", "prompt": "a"}

    def test_downloads_are_recorded(self, api, wire):
        url = wire.generate("a", response_format="url").json["data"][0]["url"]
        wire.get(url)
        assert api.requests("/content")[0]["key"] is False

    def test_requests_at_once(self, api, wire):
        api.script({"": "slow:0.3"})
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(wire.generate, "abcde"))
        assert 2 <= api.ledger()["totals"]["peak_in_flight"] <= 5


STORM = {"share": 0.3, "seed": 7, "faults": ["500", "html", "bomb"]}


class TestStorm:
    def test_it_is_the_same_every_time_and_can_be_foretold(self, api, wire):
        prompts = [f"prompt {number}" for number in range(60)]
        script = Script({"storm": STORM})
        for _ in range(2):
            api.script({"storm": STORM})
            api.reset()
            for prompt in prompts:
                wire.generate(prompt)
            seen = [entry["fault"] for entry in api.ledger()["attempts"]]
            assert seen == ["".join(script.plan(prompt)) for prompt in prompts]
        assert 8 <= sum(map(bool, seen)) <= 30
        assert set(seen) == {"", "500", "html", "bomb"}

    def test_attempts_are_drawn_anew_and_it_can_end(self):
        script = Script({"storm": {**STORM, "attempts": 2}})
        drawn = [["".join(script.plan(f"{n}", attempt=attempt)) for n in range(300)] for attempt in range(3)]
        assert drawn[0] != drawn[1]
        assert not any(drawn[2])
        assert 60 < sum(map(bool, drawn[0])) < 120

    def test_a_word_spares_a_request(self):
        script = Script({"storm": {"share": 1.0, "faults": ["500"]}, "calm": "drip", "styled": "thoughts"})
        assert script.plan("calm") == {"drip": ""}
        assert script.plan("styled") == {"thoughts": "", "500": ""}

    @pytest.mark.parametrize(
        "mapping", [{"x": "nonsense"}, {"x": ["500", "nonsense"]}, {"x": 5}, {"storms": {}}, {"storm": {"shares": 1}}]
    )
    def test_scripts_that_cannot_be_used(self, api, mapping):
        with pytest.raises(ConfigError):
            api.script(mapping)


class TestProcess:
    def test_key_limit_latency_and_size_of_pictures(self):
        with FakeApi({"boo": "500"}, key="right", rpm=2, latency=0.2, image_bytes=50_000) as api:
            from http.client import HTTPConnection

            def ask(**headers):
                connection = HTTPConnection(api.url.removeprefix("http://"), timeout=10)
                connection.request("POST", "/v1/images/generations", '{"prompt": "a", "model": "m"}', headers)
                response = connection.getresponse()
                data = response.read()
                connection.close()
                return response.status, response.getheader("Retry-After"), data

            assert [ask()[0], ask(Authorization="Bearer wrong")[0]] == [401, 401]
            started = time.monotonic()
            status, _, data = ask(**{"x-goog-api-key": "right"})
            assert (status, time.monotonic() - started > 0.2) == (200, True)
            assert 50_000 <= len(data) * 3 / 4 <= 53_000
            assert ask(Authorization="Bearer right")[0] == 200
            status, wait, _ = ask(Authorization="Bearer right")
            assert (status, 50 < float(wait) <= 60) == (429, True)
            entries = api.ledger()["attempts"]
            assert [entry["status"] for entry in entries] == [401, 401, 200, 200, 429]
            assert [entry["key"] for entry in entries] == [False, True, True, True, True]

    def start(self, *options):
        return subprocess.Popen(
            [sys.executable, "-m", "dataflow.serving.fake_api", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @pytest.mark.parametrize("how", ["stdin", "sigterm", "lifetime"])
    def test_its_ends(self, how):
        with self.start("--lifetime", "0.2" if how == "lifetime" else "60") as process:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            if how == "sigterm":
                os.kill(process.pid, signal.SIGTERM)
            elif how == "stdin":
                process.stdin.close()
            assert process.wait(5) == 0

    def test_a_script_that_cannot_be_used_says_so(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown fault 'nonsense'"), FakeApi({"x": "nonsense"}):
            pass
