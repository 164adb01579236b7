import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import orjson
import pytest

from dataflow.cli import main
from dataflow.commands import tune
from dataflow.errors import ConfigError
from dataflow.serving import accelerators, speed
from dataflow.serving.speed import Speed, measure, measure_apart
from dataflow.tuning import Tuner

pytest.importorskip("torch")

CPU = {
    "kind": "cpu", "capability": None, "fp8": False, "bf16": False, "threads": 2, "cpus": 2, "repeated_blocks": True,
    "convolutions": False, "caches": True, "attention": True, "batches": True,
}  # fmt: skip
GPU = {**CPU, "kind": "cuda", "capability": [9, 0], "fp8": True, "bf16": True}
FLUX = {"pipeline": "FluxPipeline", "dtype": "bfloat16", "width": 1024, "height": 1024}


def fast(images_per_second, batch=1, *, facts=CPU, flops=None, **more):
    given = {"load_seconds": 1.0, "warm_up_seconds": 2.0, "peak_bytes": 10**9, "device": "cpu", "provenance": FLUX}
    return Speed(images=100, seconds=100 / images_per_second, batch=batch, flops=flops, facts=facts, **given | more)


class Machine:
    """Answers with the speed that a formula gives, and remembers what was asked."""

    def __init__(self, formula, *, facts=CPU, seconds=10.0):
        self.formula, self.facts, self.seconds, self.now = formula, facts, seconds, 0.0
        self.asked, self.counted = [], []

    def __call__(self, settings, *, limit, count):
        self.asked.append(dict(settings))
        self.counted.append(count)
        self.now += min(self.seconds, limit)
        found = self.formula(settings)
        if isinstance(found, str):
            return found
        return fast(found, settings.get("batch_size", 1), facts=self.facts, flops=5e12 if count else None)

    def tuner(self, base=None, seconds=10_000.0, **more):
        return Tuner(base or {"batch_size": 1}, self, seconds=seconds, clock=lambda: self.now, **more)


def h100(settings):
    """Compiling gains half, cuDNN a little, batches until 4; 16 do not fit."""
    batch = settings.get("batch_size", 1)
    if batch >= 16:
        return "out of memory"
    rate = 0.15 * (1.5 if settings.get("compile") else 1.0) * {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.11}[batch]
    rate *= 1.2 if settings.get("attention_backend") else 1.0
    if settings.get("quantization"):
        rate *= 1.3 if settings.get("compile") else 0.8
    return rate * (1.8 if settings.get("step_cache") else 1.0)


def test_what_gains_is_kept_and_the_rest_is_not():
    machine = Machine(h100, facts=GPU)
    tuner = machine.tuner()
    tuner.search()
    assert tuner.best.settings == {"compile": "regional", "attention_backend": "auto", "batch_size": 4}
    assert tuner.best.speed.images_per_second == pytest.approx(0.15 * 1.5 * 1.2 * 1.1)
    assert not any(trial.pixels for trial in tuner.trials)
    assert machine.asked[0] == {"batch_size": 1}
    assert machine.counted == [True] + [False] * (len(machine.asked) - 1)
    assert all(trial.speed.flops == 5e12 for trial in tuner.trials), "counted once, true of all"
    assert {"batch_size": 8, "compile": "regional", "attention_backend": "auto"} in machine.asked
    assert 16 not in [asked["batch_size"] for asked in machine.asked], "more is not tried once it gains nothing"


def test_lossy_settings_are_asked_for():
    machine = Machine(h100, facts=GPU)
    tuner = machine.tuner(lossy=True)
    tuner.search()
    assert tuner.best.settings["quantization"] == "torchao:fp8dq"
    assert tuner.best.settings["step_cache"] == "first_block:0.08"
    assert tuner.best.pixels
    assert tuner.best.speed.flops is None, "a cache skips operations, nobody counts how many"


def test_bf16_on_a_cpu_is_measured_but_taken_only_if_pixels_may_change():
    def formula(settings):
        return 1.0 if settings.get("dtype") != "bf16" else 3.0

    for lossy in (False, True):
        tuner = Machine(formula, facts={**CPU, "bf16": True, "caches": False}).tuner(lossy=lossy)
        tuner.search()
        assert any(trial.settings == {"dtype": "bf16"} and trial.pixels for trial in tuner.trials)
        assert tuner.best.settings == ({"dtype": "bf16"} if lossy else {})


def test_noise_is_no_gain():
    machine = Machine(lambda settings: 1.0 + 0.015 * (settings.get("compile") is not None))
    tuner = machine.tuner()
    tuner.search()
    assert tuner.best.settings == {}


def test_threads_of_the_cpu():
    machine = Machine(lambda settings: 1.0 + 0.5 * (settings.get("threads") == 4), facts={**CPU, "cpus": 8})
    tuner = machine.tuner()
    tuner.search()
    assert tuner.best.settings == {"threads": 4}


def test_out_of_memory_is_a_row_and_smaller_things_are_tried():
    def formula(settings):
        return 0.5 if settings.get("text_encoders") == "offload" and settings["batch_size"] == 1 else "out of memory"

    machine = Machine(formula, facts=GPU)
    tuner = machine.tuner({"batch_size": 4})
    tuner.search()
    assert [trial.problem for trial in tuner.trials[:3]] == ["out of memory", "out of memory", ""]
    assert tuner.best.settings == {"batch_size": 1, "text_encoders": "offload"}
    assert {"batch_size": 1, "offload": "model"} not in machine.asked


def test_where_nothing_works():
    tuner = Machine(lambda settings: "no model '/nowhere'").tuner()
    tuner.search()
    assert [trial.problem for trial in tuner.trials] == ["no model '/nowhere'"]
    assert tuner.best is None


def test_the_time_is_kept():
    machine = Machine(h100, facts=GPU, seconds=10.0)
    tuner = machine.tuner(seconds=24.0)
    tuner.search()
    assert len(tuner.trials) == 2, "the third could not have ended"
    assert tuner.best.settings == {"compile": "regional"}, "what gains most comes first"
    assert {"compile": "regional", "attention_backend": "auto"} in tuner.skipped


def test_one_picture_per_call_is_not_batched():
    machine = Machine(h100, facts={**GPU, "batches": False})
    machine.tuner().search()
    strict = Machine(h100, facts=GPU)
    strict.tuner({"batch_size": 1, "determinism": "strict"}).search()
    assert {asked["batch_size"] for asked in [*machine.asked, *strict.asked]} == {1}


def test_only_the_present_settings():
    machine = Machine(h100, facts=GPU)
    tuner = machine.tuner({"batch_size": 2, "compile": "full"})
    tuner.current()
    assert machine.asked == [{"batch_size": 2, "compile": "full"}]


# What a measurement says


def test_shares_of_the_peak():
    found = fast(0.25, flops=2.083e15, device="cuda:0 (NVIDIA H100 80GB HBM3)")
    assert found.seconds_per_image == 4.0
    assert found.teraflops == pytest.approx(520.75)
    assert found.share == pytest.approx(520.75 / 989.4)
    eight = fast(0.25, flops=2.083e15, device=found.device, provenance={**FLUX, "quantization": "torchao:fp8dq"})
    assert eight.peak_teraflops == 1978.9
    assert fast(1.0, flops=1e12).share is None
    assert fast(1.0).teraflops is None
    assert fast(1.0, device=found.device, provenance={"dtype": "float32"}).peak_teraflops is None


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("cuda:1 (NVIDIA H200)", 989.4),
        ("Tesla T4", 65.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks(name, half):
    peak = accelerators.peak_of(name)
    assert (peak.half if peak else None) == half


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    from tests.serving.conftest import flux_folder

    return flux_folder.__wrapped__(tmp_path_factory)


def test_operations_are_those_of_the_denoiser(flux_folder, tmp_path):
    """Against a count by hand: every linear layer, and the products of attention."""
    import diffusers
    import torch

    found = measure(
        {"hf_model_name_or_path": str(flux_folder), "batch_size": 2, "diffuser_num_inference_steps": 6},
        seconds=0.2, count=True, folder=tmp_path,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline.from_pretrained(flux_folder)
    linears = []
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, _: linears.append(2 * inputs[0].numel() * module.out_features)
            )
    pipe(prompt="a", height=32, width=32, num_inference_steps=1, max_sequence_length=16, output_type="latent")
    tokens = (32 // 2 // 2) ** 2 + 16
    attention = 2 * 2 * 2 * tokens**2 * 32  # two blocks, two products
    assert found.flops == 6 * (sum(linears) + attention)
    assert found.batch == 2
    assert found.images >= 4
    assert found.seconds > 0
    assert found.peak_bytes > 10**8
    assert found.facts["repeated_blocks"]
    assert found.facts["batches"]


def test_edits_are_measured_with_an_image_of_their_own(flux_folder, tmp_path):
    arguments = {"hf_model_name_or_path": str(flux_folder), "Image_gen_task": "imageedit", "batch_size": 2}
    found = measure(arguments, seconds=0.1, count=False, folder=tmp_path)
    assert (tmp_path / "source.png").exists()
    assert found.provenance["pipeline"] == "FluxKontextPipeline"
    assert found.flops is None


# A process of its own


def apart(arguments, limit=100.0):
    return measure_apart(arguments, seconds=0.1, count=False, limit=limit)


def test_a_measurement_in_a_process_of_its_own(flux_folder):
    found = apart({"hf_model_name_or_path": str(flux_folder), "batch_size": 1})
    assert isinstance(found, Speed)
    assert found.provenance["pipeline"] == "FluxPipeline"


def test_what_goes_wrong_there_is_said_in_short():
    assert apart({"hf_model_name_or_path": "/nowhere"}).startswith("no model '/nowhere'")
    started = time.monotonic()
    assert apart({}, limit=0.3) == "out of time"
    assert time.monotonic() - started < 5


def test_a_process_that_is_killed_had_no_memory_left(monkeypatch):
    monkeypatch.setattr(speed, "_ENTRY", "import os; os.kill(os.getpid(), 9)")
    assert apart({}) == "out of memory (the process was killed)"
    monkeypatch.setattr(speed, "_ENTRY", "raise SystemExit(3)")
    assert apart({}) == "the process ended with 3"


# The command


PIPELINE = """\
# my pipeline
[storage]
first_entry_file_name = "prompts.jsonl"  # the prompts

[serving.flux]
type = "local"
hf_model_name_or_path = "builtin:tiny-flux"
batch_size = 2  # fits

[serving.fake]
type = "fake"

[[step]]
operator = "Text2ImageGenerator"
serving = "flux"
"""


@pytest.fixture
def pipeline(tmp_path):
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE)
    file.chmod(0o640)
    return file


@pytest.fixture
def machine(monkeypatch):
    def use(formula, facts=GPU):
        found = Machine(formula, facts=facts)

        def measured(settings, *, seconds, count, limit, verbose):
            return found(settings, limit=limit, count=count)

        monkeypatch.setattr(tune, "measure_apart", measured)
        return found

    return use


def test_the_best_settings_are_written_and_all_else_stays(pipeline, machine, capsys):
    machine(h100)
    assert main(["tune", str(pipeline), "--write"]) == 0
    printed = capsys.readouterr()
    assert "[serving.flux]" in printed.out
    assert 'compile = "regional"' in printed.out
    assert "trying as it is …" in printed.err
    text = pipeline.read_text()
    assert "# my pipeline" in text
    assert "# the prompts" in text
    flux = tomllib.loads(text)["serving"]["flux"]
    assert flux == {
        "type": "local", "hf_model_name_or_path": "builtin:tiny-flux", "batch_size": 4, "compile": "regional",
        "attention_backend": "auto",
    }  # fmt: skip
    assert (pipeline.parent / "pipeline.toml.1.bak").read_text() == PIPELINE
    assert pipeline.stat().st_mode & 0o777 == 0o640
    assert main(["tune", str(pipeline), "--write", "-q"]) == 0
    assert sorted(path.name for path in pipeline.parent.iterdir()) == ["pipeline.toml", "pipeline.toml.1.bak"]


def test_the_table_of_trials(pipeline, machine, capsys):
    machine(h100)
    assert main(["tune", str(pipeline), "--lossy", "--json"]) == 0
    found = orjson.loads(capsys.readouterr().out)
    assert found["best"]["settings"]["quantization"] == "torchao:fp8dq"
    assert found["trials"][0]["speed"]["images_per_second"] == pytest.approx(0.15 * 1.05)
    assert pipeline.read_text() == PIPELINE
    assert main(["tune", str(pipeline), "--lossy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.rstrip().endswith("best") and "*" in line for line in lines)
    assert any("everything made before is made again" in line for line in lines)


def test_out_of_memory_stands_in_the_table(pipeline, machine, capsys):
    machine(lambda settings: "out of memory" if settings.get("compile") else 1.0)
    assert main(["tune", str(pipeline)]) == 0
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.strip().startswith("compile=regional  ")]
    assert line.endswith("out of memory")
    assert "best: as it is" in printed


def test_where_nothing_works_the_exit_code_says_so(pipeline, machine, capsys):
    machine(lambda settings: "no such model")
    assert main(["tune", str(pipeline), "--current"]) == 1
    assert "nothing worked" in capsys.readouterr().out


def test_ctrl_c_prints_what_there_is(pipeline, machine, capsys):
    def formula(settings):
        if settings.get("attention_backend"):
            raise KeyboardInterrupt
        return h100(settings)

    machine(formula)
    assert main(["tune", str(pipeline), "--write"]) == 130
    printed = capsys.readouterr()
    assert "compile=regional" in printed.out
    assert "interrupted" in printed.err
    assert pipeline.read_text() == PIPELINE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write"], "--write needs a pipeline file"),
        (["FILE", "--batch-size", "8"], "'batch_size': a pipeline file says that itself"),
        (["FILE", "--size", "64x64", "--edit"], "'edit': a pipeline file says that itself"),
        (["FILE", "--serving", "fake"], "no [serving.fake] of type 'local'; there is 'flux'"),
    ],
)
def test_what_cannot_be_asked(pipeline, machine, capsys, words, message):
    machine(h100)
    assert main(["tune", *(str(pipeline) if word == "FILE" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_several_models_are_told_apart(pipeline, machine, capsys):
    machine(h100)
    pipeline.write_text(PIPELINE + '\n[serving.more]\ntype = "local"\n')
    assert main(["tune", str(pipeline)]) == 2
    assert "say which with --serving" in capsys.readouterr().err
    assert main(["tune", str(pipeline), "--serving", "more", "--current"]) == 0
    fake = '[serving.flux]\ntype = "fake"\n'
    pipeline.write_text(re.sub(r"\[serving.flux\][^\[]*", fake, PIPELINE))
    assert main(["tune", str(pipeline)]) == 2
    assert "there is nothing to tune" in capsys.readouterr().err


def test_a_file_that_was_changed_meanwhile(pipeline):
    pipeline.write_text(PIPELINE.replace("serving.flux", "serving.other"))
    with pytest.raises(ConfigError, match=r"\[serving.flux\] cannot be changed in it"):
        tune.write_settings(pipeline, "flux", {"batch_size": 8})
    assert os.listdir(pipeline.parent) == ["pipeline.toml"]


def test_one_of_several_devices_stands_for_all(machine):
    found = machine(h100)
    assert main(["tune", "--device", "cuda:1,cuda:2", "--current", "-q"]) == 0
    assert found.asked[0]["device"] == "cuda:1"


def test_ctrl_c_ends_the_process_at_work(pipeline):
    command = [sys.executable, "-m", "dataflow", "tune", str(pipeline), "--current"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert "trying" in process.stderr.readline()
    deadline = time.monotonic() + 30
    while not (children := _children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was measured" in out
    assert children
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, children)), "nothing is left that holds the device"


def _alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _children(parent):
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
