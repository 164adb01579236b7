"""Several endpoints and keys of a service: each with its own limits, standing in for each other."""

import json
import logging
import threading

import pytest
from PIL import Image

from dataflow.errors import RunStoppedError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime import limits, station
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_api import FakeApi, expected_mark, read_mark
from dataflow.utils.storage import FileStorage

pytest.importorskip("openai")
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai

PROMPTS = [f"thing {number}" for number in range(24)]


@pytest.fixture(scope="module")
def servers():
    with (
        FakeApi(key="key-of-the-first", latency=0.05) as first,
        FakeApi(key="key-of-the-second", latency=0.05) as other,
    ):
        yield first, other


@pytest.fixture
def pair(servers, monkeypatch):
    monkeypatch.setattr(limits, "backoff", lambda attempt: 0.05 * attempt)
    monkeypatch.setenv("FIRST_KEY", "key-of-the-first")
    monkeypatch.setenv("OTHER_KEY", "key-of-the-second")
    for server in servers:
        server.script({})
        server.reset()
    return servers


@pytest.fixture
def draw(tmp_path):
    def run(urls, keys=("FIRST_KEY", "OTHER_KEY"), max_workers=2, **options):
        table = tmp_path / "in.jsonl"
        table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in PROMPTS))
        storage = FileStorage(str(table), cache_path=str(tmp_path / "cache")).step()
        serving = APIVLMServing_openai(
            list(urls), list(keys), image_io=ImageIO(str(tmp_path / "images")), max_workers=max_workers, timeout=20
        )
        summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True, **options)).run(storage)
        for prompt, line in zip(PROMPTS, storage.output_path.read_text().splitlines(), strict=True):
            [image] = json.loads(line)["images"]
            assert read_mark(Image.open(image)) == expected_mark(prompt)
        return summary

    return run


def urls_of(pair):
    return [f"{server.url}/v1" for server in pair]


def calls(server):
    return server.ledger()["totals"]["attempts"]


def test_the_work_is_shared_and_every_call_made_once(pair, draw):
    summary = draw(urls_of(pair))
    first, other = map(calls, pair)
    assert (summary.done, first + other) == (24, 24)
    assert min(first, other) >= 6
    assert summary.usd == pytest.approx(sum(server.ledger()["totals"]["usd_reported"] for server in pair))


@pytest.mark.parametrize("fault", ["401", "quota", "402"])
def test_an_endpoint_that_stops_for_good_leaves_its_work_to_the_other(pair, draw, fault, caplog):
    pair[0].script({"thing": fault})
    with caplog.at_level(logging.WARNING):
        summary = draw(urls_of(pair))
    assert (summary.done, calls(pair[1])) == (24, 24)
    assert calls(pair[0]) <= 3  # those in flight
    assert "one worker is given up, the others go on" in caplog.text


def test_the_run_stops_with_the_last_endpoint(pair, draw):
    for server in pair:
        server.script({"thing": "quota"})
    with pytest.raises(RunStoppedError, match="quota"):
        draw(urls_of(pair))


def test_an_endpoint_without_a_key_is_not_used(pair, draw, monkeypatch, caplog):
    monkeypatch.delenv("FIRST_KEY")
    with caplog.at_level(logging.WARNING):
        assert draw(urls_of(pair)).done == 24
    assert "FIRST_KEY" in caplog.text
    assert (calls(pair[0]), calls(pair[1])) == (0, 24)


def test_without_any_key_nothing_begins(pair, draw, monkeypatch):
    monkeypatch.delenv("FIRST_KEY")
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(Exception, match="FIRST_KEY"):
        draw(urls_of(pair))


def test_a_dead_endpoint_costs_no_row(pair, draw):
    with FakeApi() as gone:
        dead = f"{gone.url}/v1"
    summary = draw([dead, urls_of(pair)[1]])
    assert (summary.done, summary.failed, calls(pair[1])) == (24, 0, 24)


def test_an_endpoint_that_stays_down_is_given_up(pair, draw, monkeypatch, caplog):
    monkeypatch.setattr(station, "PATIENCE", 0.0)
    pair[0].script({"thing": "503"})
    with caplog.at_level(logging.WARNING):
        assert draw(urls_of(pair)).done == 24
    assert "given up" in caplog.text


def test_limits_of_one_endpoint_do_not_slow_the_other(pair, draw):
    pair[0].script({"thing": ["rate_limit:30"] * 10})
    summary = draw(urls_of(pair))
    assert (summary.done, calls(pair[1])) == (24, 24)
    assert calls(pair[0]) <= 4


def test_several_keys_of_one_service(pair, draw, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "key-of-the-first")
    assert draw(urls_of(pair)[:1]).done == 24
    assert calls(pair[0]) == 24


def test_a_single_service_that_is_down_for_a_while_costs_no_request_its_attempts(pair, draw):
    pair[0].script({"thing": "503"})
    threading.Timer(1.0, pair[0].script, [{}]).start()
    summary = draw(urls_of(pair)[:1], keys=["FIRST_KEY"], max_workers=8)
    assert (summary.done, summary.failed) == (24, 0)


def test_a_single_service_that_only_limits_stops_the_run_in_the_end(pair, draw, monkeypatch):
    monkeypatch.setattr(station, "PATIENCE", 0.3)
    pair[0].script({"thing": "rate_limit:0.1"})
    with pytest.raises(RunStoppedError, match="nothing for"):
        draw(urls_of(pair)[:1], keys=["FIRST_KEY"])
