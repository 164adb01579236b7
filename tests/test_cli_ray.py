"""The command line on a Ray cluster."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")

JOB = """
[storage]
first_entry_file_name = "prompts.jsonl"
cache_path = "cache"
[run]
executor = "ray"
workers = 2
[serving.draw]
type = "fake"
size = [16, 16]
num_cpus = 0.5
[serving.probe]
type = "image_probe"
[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"
[[step]]
operator = "ImageEvaluator"
serving = "probe"
output_key = "probe"
"""


def dataflow(folder, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "dataflow", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.slow
def test_a_pipeline_of_two_steps_on_one_cluster(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "p{number}"}}\n' for number in range(12)))
    (tmp_path / "job.toml").write_text(JOB)
    done = dataflow(tmp_path, "run", "job.toml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("12 rows = 12 done") == 2
    for noise in ("ray", "INFO", "raylet", "Warning"):
        assert noise not in done.stderr
    (table,) = (tmp_path / "cache").glob("*_step2.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert all(row["probe_status"] == ["ok"] for row in rows)
    kept = (tmp_path / "cache" / "job.toml").read_text()
    assert "num_cpus = 0.5" in kept
    assert 'executor = "ray"' in kept
    again = dataflow(tmp_path, "run", "job.toml", "--executor", "local")
    assert "this run made 0" in again.stderr


def test_what_a_copy_takes_must_be_a_number(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "job.toml").write_text(JOB.replace("num_cpus = 0.5", 'num_gpus = "half"'))
    done = dataflow(tmp_path, "run", "job.toml")
    assert done.returncode == 2
    assert "job.toml:11: [serving.draw]: num_gpus: must be a number from 0, found 'half'" in done.stderr
