"""Image APIs from the command line: against the fake service, on real sockets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dataflow import cli
from dataflow.serving.fake_api import PRICES, FakeApi, expected_mark, read_mark

pytest.importorskip("openai")

TABLE = "dataflow_cache_step_step1.jsonl"
URLS = {"chat": "/v1", "openai_images": "/v1", "gemini": ""}
MODELS = {"chat": "gemini-2.5-flash-image", "openai_images": "gpt-image-2", "gemini": "gemini-2.5-flash-image"}


@pytest.fixture(scope="module")
def server():
    with FakeApi(key="key-of-the-user", batch_seconds=0.2) as api:
        yield api


@pytest.fixture(autouse=True)
def api(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DF_API_KEY", "key-of-the-user")
    monkeypatch.setattr("dataflow.serving.batch_jobs.FIRST_POLL", 0.1)
    server.script({})
    server.reset()
    return server


@pytest.fixture
def dataflow(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / TABLE).read_text().splitlines()]


def named(api, kind):
    rates = "".join(f"{name} = {rate}\n" for name, rate in PRICES.items())
    Path("prices.toml").write_text(f'["{MODELS[kind]}"]\nimage = 0.039\n{rates}')
    return ["--api", kind, "--api-url", api.url + URLS[kind], "--model", MODELS[kind], "--prices", "prices.toml"]


def prompts(folder, number):
    table = folder / "prompts.jsonl"
    table.write_text("".join(json.dumps({"prompt": f"thing {n}"}) + "\n" for n in range(number)))
    return table


@pytest.mark.parametrize("kind", URLS)
@pytest.mark.parametrize("extra", [[], ["--stream"], ["--batch-jobs", "--batch-size", 2]])
def test_a_table_through_every_service(api, dataflow, tmp_path, kind, extra):
    code, out, err = dataflow("generate", prompts(tmp_path, 3), "-o", "out", *named(api, kind), *extra)
    assert (code, out.strip()) == (0, str(tmp_path / "out" / TABLE)), err
    for number, row in enumerate(rows(tmp_path / "out")):
        assert read_mark(Image.open(row["images"][0])) == expected_mark(f"thing {number}")
    usd = api.ledger()["totals"]["usd_reported"]
    assert f"${usd:,.4f} spent, ${usd / 3:.4f} per image" in err
    assert dataflow("run", "out/job.toml")[0] == 0
    assert api.ledger()["totals"]["attempts"] == 3
    code, out, _ = dataflow("status", "out", "--json")
    [step] = json.loads(out)["steps"]
    assert step["usd"] == pytest.approx(usd)


@pytest.mark.parametrize("kind", URLS)
def test_an_edit_through_every_service(api, dataflow, tmp_path, kind):
    Image.new("RGB", (64, 64), "red").save("in.png")
    code, _, err = dataflow("edit", "make it blue", "--image", "in.png", "-o", "out", *named(api, kind))
    assert code == 0, err
    [row] = rows(tmp_path / "out")
    contents = [(tmp_path / "in.png").read_bytes()]
    assert read_mark(Image.open(row["edited_images"][0])) == expected_mark("make it blue", contents)


def test_a_mask_goes_to_a_model_that_takes_one(api, dataflow, tmp_path):
    Image.new("RGB", (64, 64), "red").save("in.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save("mask.png")
    words = ["edit", "make it blue", "--image", "in.png", "--mask", "mask.png"]
    assert dataflow(*words, "-o", "out", *named(api, "openai_images"))[0] == 0
    assert "mask" in str(api.requests("images/edits")[-1]["body"])
    code, _, err = dataflow(*words, "-o", "other", *named(api, "gemini"))
    assert code == 1
    assert "this model takes none" in err
    assert len(api.requests("generateContent")) == 0


def test_a_pilot_then_the_rest(api, dataflow, tmp_path):
    table = prompts(tmp_path, 12)
    code, out, err = dataflow("generate", table, "-o", "out", *named(api, "chat"), "--pilot", 4)
    assert (code, out) == (0, "")
    assert "forecast for the 8 pending rows, from 4 settled ones:" in err
    assert "cost     $0.3" in err
    assert api.ledger()["totals"]["attempts"] == 4
    assert dataflow("generate", table, "-o", "out", *named(api, "chat"))[0] == 0
    assert api.ledger()["totals"]["attempts"] == 12


def test_a_budget_stops_before_it_is_passed(api, dataflow, tmp_path):
    words = ["generate", prompts(tmp_path, 12), "-o", "out", *named(api, "chat"), "--budget", "0.2"]
    code, _, err = dataflow(*words)
    assert code == 3
    assert "the budget of $0.20 does not hold another call" in err
    assert 0 < api.ledger()["totals"]["usd"] <= 0.2


def test_two_keys(api, dataflow, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER", "key-that-is-wrong")
    words = ["--api-key-name", "OTHER", "--api-key-name", "DF_API_KEY"]
    code, _, err = dataflow("generate", prompts(tmp_path, 8), "-o", "out", *named(api, "chat"), *words)
    assert code == 0
    assert "one worker is given up" in err
    assert "key-that-is-wrong" not in err + (tmp_path / "out" / "job.toml").read_text()


def test_a_missing_key_is_told_before_anything_runs(api, dataflow, tmp_path, monkeypatch):
    monkeypatch.delenv("DF_API_KEY")
    code, _, err = dataflow("generate", prompts(tmp_path, 2), "-o", "out", *named(api, "chat"))
    assert code == 2
    assert "the environment variable DF_API_KEY holds no key" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api", "chat", "--steps", "8"], "--steps belongs to local models"),
        (["--api", "gemini", "--offload", "model"], "--offload belongs to local models"),
        (["--api-url", "http://127.0.0.1:9"], "--api-url belongs to image APIs: add --api"),
        (["--api", "chat", "--size", "64x64"], "--size goes with --api openai_images"),
        (["--api", "chat", "--aspect-ratio", "1:1"], "aspect_ratio: there is no such key"),
        (["--api", "chat", "--fake"], "--fake does not go with --api"),
        (["--api", "chat", "--api-url", "ftp://x"], "api_url must begin with https://"),
        (["--api", "chat", "--prices", "none.toml"], "none.toml: the price table cannot be read"),
        (["--api", "gemini", "--aspect-ratio", "7:5"], "7:5"),
        (["--api", "openai_images", "--model", "gpt-image-2", "--size", "100x100"], "100×100"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_paid(dataflow, tmp_path, words, message):
    code, _, err = dataflow("generate", prompts(tmp_path, 1), "-o", "out", *words)
    assert code in (1, 2)
    assert message in err


def test_the_price_of_a_row_that_is_kept_counts_every_step(api, dataflow, tmp_path):
    prompts(tmp_path, 4)
    (tmp_path / "keep.py").write_text(
        "from dataflow.types import Drop, Plan\n"
        "class Keep:\n"
        "    def plan(self):\n"
        "        fold = lambda row, _: Drop('odd') if row['prompt'][-1] in '13' else row\n"
        "        return Plan(name='Keep', inputs=('prompt',), outputs=(), requests=lambda row: (), fold=fold)\n"
    )
    (tmp_path / "pipeline.toml").write_text(
        '[storage]\nfirst_entry_file_name = "prompts.jsonl"\ncache_path = "out"\n'
        f'[serving.nano]\ntype = "chat"\napi_url = "{api.url}/v1"\nmodel_name = "gemini-2.5-flash-image"\n'
        '[[step]]\noperator = "Text2ImageGenerator"\ninput_conversation_key = "prompt"\n'
        '[[step]]\noperator = "keep:Keep"\n'
    )
    assert dataflow("run", "pipeline.toml")[0] == 0
    usd = api.ledger()["totals"]["usd_reported"]
    _, out, _ = dataflow("status", "out")
    assert f"all steps: ${usd:,.4f} spent, ${usd / 2:.4f} for each of the 2 rows kept in the end" in out
    assert json.loads(dataflow("status", "out", "--json")[1])["usd_per_kept_row"] == pytest.approx(usd / 2)
