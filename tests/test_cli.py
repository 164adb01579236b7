"""The command line as a person meets it: words, files, exit codes, Ctrl-C."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from PIL import Image

from dataflow import cli
from dataflow.commands import folder as job_folder
from dataflow.commands.options import serving_table
from dataflow.io import ImageIO
from dataflow.runtime.lock import cache_lock
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.serving.model_files import BUILTIN_FOLDER, INDEX
from dataflow.utils.storage import FileStorage

needs_model = pytest.mark.skipif(not (BUILTIN_FOLDER / INDEX).is_file(), reason="the built-in model is not there")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def dataflow(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def dataflow(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return dataflow


def start(*arguments: str) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "dataflow", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def rows_of(table: str) -> list[dict]:
    return FileStorage(table).step().read("dict")


def write_pipeline(rows: int, serving: str = "", prompts: str = "thing {}") -> Path:
    Path("in.jsonl").write_bytes(b"".join(orjson.dumps({"prompt": prompts.format(n)}) + b"\n" for n in range(rows)))
    Path("pipeline.toml").write_text(
        '[storage]\nfirst_entry_file_name = "in.jsonl"\ncache_path = "out"\n'
        f'[serving.f]\ntype = "fake"\nsize = [8, 8]\n{serving}\n'
        '[[step]]\noperator = "Text2ImageGenerator"\ninput_conversation_key = "prompt"\n'
    )
    return Path("out")


def wait_for_images(count: int, out: Path = Path("out")) -> None:
    until = time.monotonic() + 60
    while sum(1 for _ in ImageIO(out / "images").existing()) < count:
        assert time.monotonic() < until, "no images appeared"
        time.sleep(0.02)


def figures(dataflow, out: object = "out", step: int = 0) -> dict:
    code, text, _ = dataflow("status", out, "--json")
    assert code == 0
    return json.loads(text)["steps"][step]


# Words -------------------------------------------------------------------------------------------------------------


def test_help_and_mistakes_need_nothing_heavy():
    heavy = "('numpy', 'PIL', 'torch', 'asyncio')"
    code = f"import sys, dataflow.cli as c; c.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help(dataflow):
    code, text, _ = dataflow("--help")
    assert code == 0
    assert "exit codes:" in text
    for name in cli._COMMANDS:
        assert f"  {name} " in text
        code, own, _ = dataflow(name, "--help")
        assert code == 0
        assert f"examples:\n  dataflow {name}" in own


def test_version():
    assert start("--version").communicate()[0] == f"dataflow {cli.__version__}\n"


def test_every_option_of_the_local_serving_has_a_flag():
    arguments = ["generate", "x", "--size=32x16", "--pipeline-arg=true_cfg_scale=2", "--pipeline-arg=text=a b"]
    parser = cli.build_parser()
    flags = [name for name in vars(parser.parse_args(arguments)) if name.startswith("serving.")]
    given = parser.parse_args([*arguments, "--device=cuda:0,cuda:1", "--lora=a", "--lora=b@0.5", "--strict"])
    table = serving_table(given, "imageedit")
    names = {name.removeprefix("serving.") for name in flags} | set(table)
    assert names - {"type"} == set(inspect.signature(LocalImageGenServing).parameters) - {"image_io"}
    assert table["pipeline_kwargs"] == {"true_cfg_scale": 2, "text": "a b"}
    assert table["device"] == ["cuda:0", "cuda:1"]
    assert (table["diffuser_image_width"], table["diffuser_image_height"]) == (32, 16)
    assert table["determinism"] == "strict"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generate"], "required: PROMPTS"),
        (["generate", "x", "--size", "12"], "write width and height as 1024x768, got '12'"),
        (["generate", "x", "--steps", "0"], "must be a whole number from 1, got 0"),
        (["generate", "x", "--seed", "-1"], "must be from 0 to 2**63 - 1"),
        (["generate", "x", "--pipeline-arg", "a"], "write it as name=value, got 'a'"),
        (["generate", "x", "--pipeline-arg", "a=null"], "null is no value: leave a out"),
        (["generate", "missing.jsonl", "--fake"], "error: missing.jsonl: no such file"),
        (["generate", "missing.txt", "--fake"], "missing.txt: cannot be read: No such file"),
        (["generate", "latin.txt", "--fake"], "latin.txt: is not UTF-8 text (byte 1)"),
        (["generate", "empty.txt", "--fake"], "empty.txt: there is no prompt in it"),
        (["generate", "", "--fake"], "there is no prompt in it"),
        (["generate", "half \udc80", "--fake"], "not valid Unicode"),
        (["generate", "picture.png", "--fake"], "picture.png: is neither a table"),
        (["generate", "odd.jsonl", "--fake"], "none of the columns 'conversations', 'prompt', 'text', 'caption'; name"),
        (["generate", "odd.jsonl", "--fake", "--column", "wrds"], "(did you mean 'words'?)"),
        (["generate", "x", "--model", "./nowhere"], "no model"),
        (["generate", "x", "--fake", "-o", "picture.png"], "the folder"),
        (["edit", "make it blue", "--fake"], "--image picture.png"),
        (["edit", "make it blue", "--fake", "--image", "gone.png"], "gone.png: no such image file"),
        (["edit", "odd.jsonl", "--fake", "--image", "picture.png"], "odd.jsonl is a table and names its own images"),
        (["edit", "odd.jsonl", "--fake"], "name one with --image-column"),
        (["run", "gone.toml"], "gone.toml: cannot be read"),
        (["status", "gone"], "gone: no such folder"),
        (["status", "empty"], "empty: holds no job.toml"),
        (["retry", "empty"], "empty: holds no job.toml"),
        (["replay", "0", "--cache", "empty"], "empty: holds no job.toml"),
        (["models", "--hf-local-dir", "gone"], "gone: no such folder"),
    ],
)
def test_usage_errors_are_one_clear_line(dataflow, arguments, message):
    Path("latin.txt").write_bytes(b"a\xe9")
    Path("empty.txt").write_text("\n \n")
    Path("odd.jsonl").write_text('{"words": "a"}\n')
    Path("empty").mkdir()
    Image.new("RGB", (8, 8)).save("picture.png")
    code, out, err = dataflow(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not Path("dataflow_output", "job.toml").exists()


def test_verbose_shows_where_an_error_comes_from(dataflow):
    code, _, err = dataflow("-v", "run", "gone.toml")
    assert code == 2
    assert "Traceback" in err


# generate and edit -------------------------------------------------------------------------------------------------


def test_one_prompt(dataflow):
    code, out, err = dataflow("generate", "a red circle", "--fake", "--size", "16x8", "--steps", "3", "--guidance", "2")
    assert code == 0
    (row,) = rows_of(out.strip())
    assert row["conversations"][0]["content"] == "a red circle"
    facts = ImageIO(".").read_metadata(row["images"][0])
    assert facts["params"] == {"num_inference_steps": 3, "guidance_scale": 2.0}
    assert facts["size"] == [16, 8]
    assert "1 rows = 1 done" in err
    code, _, err = dataflow("generate", "a red circle", "--fake", "--size", "16x8", "--steps", "3", "--guidance", "2")
    assert code == 0
    assert "this run made 0" in err


def test_another_prompt_keeps_the_first_table(dataflow):
    dataflow("generate", "a red circle", "--fake")
    dataflow("generate", "a blue circle", "--fake")
    tables = sorted(Path("dataflow_output").glob("*.jsonl"))
    assert len(tables) == 2
    assert [rows_of(str(table))[0]["conversations"][0]["content"][2:5] for table in tables] == ["red", "blu"]


@pytest.mark.parametrize(
    "prompt", ["x" * 20_000, "a/b", "../up", "two\nlines.json", "日本 🎌", "nul \0 here", "see a.txt"]
)
def test_prompts_that_are_no_file_names(dataflow, prompt):
    code, out, _ = dataflow("generate", prompt, "--fake")
    assert code == 0
    assert rows_of(out.strip())[0]["conversations"][0]["content"] == prompt


def test_text_with_a_prompt_per_line(dataflow):
    Path("list.txt").write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\n".encode())
    code, out, _ = dataflow("generate", "list.txt", "--fake", "--images-per-prompt", "2", "--format", "webp")
    assert code == 0
    rows = rows_of(out.strip())
    assert [row["conversations"][0]["content"] for row in rows] == ["one", "two\u2028still two"]
    assert [len(row["images"]) for row in rows] == [2, 2]
    assert rows[0]["images"][0].endswith(".webp")


def test_a_table_of_another_kind(dataflow):
    Path("in.csv").write_text("id,caption\n1,a cat\n2,a dog\n")
    code, out, _ = dataflow(
        "generate", "in.csv", "--fake", "--cache-type", "csv", "--output-column", "pictures", "-o", "o"
    )
    assert code == 0
    assert out.strip() == str(Path("o/dataflow_cache_step_step1.csv").absolute())
    assert all(Path(row["pictures"][0]).is_file() for row in rows_of(out.strip()))


def test_one_edit(dataflow):
    Image.new("RGB", (8, 8), "red").save("a.png")
    code, out, _ = dataflow("edit", "make it blue", "--image", "a.png", "--fake", "--negative-prompt", "no", "-q")
    assert code == 0
    (row,) = rows_of(out.strip())
    assert row["images"] == [str(Path("a.png").absolute())]
    facts = ImageIO(".").read_metadata(row["edited_images"][0])
    assert (facts["prompt"], facts["negative_prompt"]) == ("make it blue", "no")


def test_edits_of_what_was_generated(dataflow):
    Path("in.jsonl").write_text('{"prompt": "a red circle", "edit": "make it blue", "image": 3}\n')
    _, table, _ = dataflow("generate", "in.jsonl", "--fake", "-o", "first", "--max-failed-fraction", "0.1")
    code, out, _ = dataflow("edit", table.strip(), "--fake", "-o", "second")
    assert code == 0
    (row,) = rows_of(out.strip())
    assert ImageIO(".").read_metadata(row["edited_images"][0])["prompt"] == "make it blue"
    code, _, err = dataflow("edit", table.strip(), "--fake", "-o", "first")
    assert (code, "would overwrite" in err) == (2, True)


def test_quiet_says_nothing_but_the_result(dataflow):
    code, out, err = dataflow("-q", "generate", "a red circle", "--fake")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


@needs_model
def test_the_built_in_model_draws_and_says_so(dataflow):
    code, out, err = dataflow("generate", "a red circle", "--batch-size", "1")
    assert code == 0
    assert "no model is named: the small built-in one draws" in err
    (row,) = rows_of(out.strip())
    code, text, _ = dataflow("replay", row["images"][0])
    assert (code, "identical" in text) == (0, True)


# run, retry, status ------------------------------------------------------------------------------------------------

SCRIPT = 'script = {no = "refuse", oops = "crash"}'


def test_some_rows_failed(dataflow):
    out = write_pipeline(0, SCRIPT)
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "no"}\n{"prompt": "oops"}\n{broken\n')
    code, table, err = dataflow("run", "pipeline.toml")
    assert code == 1
    assert "try what failed again: dataflow retry out" in err
    assert len(rows_of(table.strip())) == 3
    found = figures(dataflow)
    assert (found["rows"], found["done"], found["refused"], found["failed"], found["pending"]) == (4, 1, 1, 2, 0)
    assert found["reasons"] == {"refused": 1, "crash": 1, "bad_row": 1}
    assert found["bytes"] == sum(size for _, size in ImageIO(out / "images").existing())
    code, text, _ = dataflow("status", "out")
    assert code == 0
    assert "out: not running" in text
    assert "4 rows = 1 done + 1 refused + 2 failed + 0 pending" in text
    assert "not done, by reason:" in text


def test_retry(dataflow):
    out = write_pipeline(3, SCRIPT, "no {}")
    code, _, err = dataflow("run", "pipeline.toml")
    assert code == 1
    assert "dataflow retry out --reason refused" in err
    mended = (out / "job.toml").read_text().replace("refuse", "")
    (out / "job.toml").write_text(mended)
    assert dataflow("retry", "out")[0] == 1
    assert figures(dataflow)["refused"] == 3
    code, _, err = dataflow("retry", "out", "--reason", "refusd")
    assert code == 2
    assert "(did you mean 'refused'?); the reasons are 'refused'" in err
    assert dataflow("retry", "out", "--reason", "refused")[0] == 0
    assert figures(dataflow)["done"] == 3


def test_a_run_that_stops_early(dataflow):
    write_pipeline(2, 'script = {thing = "fatal"}')
    code, out, err = dataflow("run", "pipeline.toml")
    assert (code, out) == (3, "")
    assert "error: stopped: scripted: the key is not valid" in err
    assert "Go on with:\n  dataflow run pipeline.toml" in err
    code, text, _ = dataflow("status", "out")
    assert "2 rows = 0 done + 0 refused + 0 failed + 2 pending" in text
    assert "table: not written yet" in text


def test_busy(dataflow):
    out = write_pipeline(2)
    with cache_lock(out):
        code, _, err = dataflow("run", "pipeline.toml")
        assert code == 4
        assert f"process {os.getpid()}" in err
    assert not (out / "job.toml").exists()


def test_a_full_disk(dataflow, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    write_pipeline(2)
    monkeypatch.setattr(job_folder, "write_if_changed", full)
    code, _, err = dataflow("run", "pipeline.toml")
    assert code == 3
    assert "No space left on device" in err


def test_a_table_that_changed_under_the_run(dataflow, monkeypatch):
    write_pipeline(2)
    monkeypatch.setattr("dataflow.utils.storage.FileStorage.input_signature", lambda self: {"n": time.monotonic_ns()})
    code, _, err = dataflow("run", "pipeline.toml")
    assert code == 3
    assert "changed while it was being read" in err


def test_an_unchanged_job_file_keeps_its_date(dataflow):
    out = write_pipeline(2)
    dataflow("run", "pipeline.toml")
    before = (out / "job.toml").stat().st_mtime_ns
    dataflow("run", "out/job.toml")
    assert (out / "job.toml").stat().st_mtime_ns == before


def test_status_of_steps_to_come(dataflow):
    out = write_pipeline(3, SCRIPT)
    edit = '[[step]]\noperator = "PromptedImageEditGenerator"\ninput_conversation_key = "prompt"\n'
    Path("pipeline.toml").write_text(Path("pipeline.toml").read_text() + edit)
    assert dataflow("run", "pipeline.toml")[0] == 0
    assert figures(dataflow, step=1)["done"] == 3
    (out / "dataflow_cache_step_step1.jsonl").unlink()
    (out / "journal/dataflow_cache_step_step1/main.jsonl").unlink()
    first, second = figures(dataflow), figures(dataflow, step=1)
    assert (first["rows"], first["pending"]) == (3, 3)
    assert (second["rows"], second["pending"], second["done"]) == (3, 3, 0)


def test_status_after_the_table_grew(dataflow):
    write_pipeline(3)
    dataflow("run", "pipeline.toml")
    write_pipeline(5)
    found = figures(dataflow)
    assert (found["rows"], found["done"], found["pending"]) == (5, 3, 2)


def test_status_of_a_step_that_makes_nothing(dataflow, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_pipeline(4)
    Path("own_filter_of_cli_test.py").write_text(
        "from dataflow.types import Drop, Plan\n"
        "class Half:\n"
        "    def plan(self):\n"
        "        fold = lambda row, outcomes: row if row['prompt'] < 'thing 2' else Drop('too late')\n"
        "        return Plan(name='Half', inputs=(), outputs=(), requests=lambda row: [], fold=fold)\n"
    )
    step = '[[step]]\noperator = "own_filter_of_cli_test:Half"\n'
    Path("pipeline.toml").write_text(Path("pipeline.toml").read_text() + step)
    assert dataflow("run", "pipeline.toml")[0] == 0
    found = figures(dataflow, step=1)
    assert (found["rows"], found["done"], found["dropped"]) == (4, 2, 2)
    assert "4 rows = 2 done + 0 refused + 0 failed + 2 dropped + 0 pending" in dataflow("status", "out")[1]
    Path("out/journal/dataflow_cache_step_step2/summary.json").unlink()
    found = figures(dataflow, step=1)
    assert (found["rows"], found["pending"]) == (4, 4)


def test_status_of_a_folder_that_a_script_wrote(dataflow):
    out = write_pipeline(3)
    dataflow("run", "pipeline.toml")
    (out / "job.toml").unlink()
    found = figures(dataflow)
    assert (found["rows"], found["done"], "counted" in found) == (3, 3, False)
    journal = out / "journal/dataflow_cache_step_step1"
    later = (journal / "summary.json").stat().st_mtime + 1
    os.utime(journal / "main.jsonl", (later, later))
    found = figures(dataflow)
    assert (found["rows"], found["done"], found["pending"], found["counted"]) == (3, 3, 0, "requests")
    Path("in.jsonl").unlink()
    assert figures(dataflow)["rows"] is None
    (journal / "summary.json").unlink()
    assert "? rows; requests: 3 done + 0 refused + 0 failed + ? pending" in dataflow("status", "out")[1]


def test_status_when_the_model_is_gone(dataflow):
    write_pipeline(3, 'script = {"thing 2" = "refuse"}')
    dataflow("run", "pipeline.toml")
    job = Path("out/job.toml")
    text = job.read_text()
    gone = '[serving.f]\ntype = "local"\nhf_model_name_or_path = "./gone"\n\n'
    job.write_text(text[: text.index("[serving.f]")] + gone + text[text.index("[[step]]") :])
    found = figures(dataflow)
    assert (found["counted"], found["done"], found["refused"]) == ("requests", 2, 1)


@pytest.mark.parametrize(
    ("owner", "running"),
    [
        ({"pid": os.getpid(), "host": os.uname().nodename, "since": "now"}, True),
        ({"pid": 1, "host": os.uname().nodename, "since": "now"}, True),
        ({"pid": 2**22 + 1, "host": os.uname().nodename, "since": "now"}, False),
        ({"pid": 2**22 + 1, "host": "elsewhere", "since": "now"}, True),
        ({"pid": "?"}, False),
    ],
)
def test_who_is_running(dataflow, owner, running):
    write_pipeline(1)
    dataflow("run", "pipeline.toml")
    Path("out/.lock.owner").write_bytes(orjson.dumps(owner))
    text = dataflow("status", "out")[1]
    assert (f"out: running, process {owner['pid']} on" in text) is running


# Signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_on_again(dataflow, number):
    write_pipeline(60, "seconds = 0.05")
    process = start("run", "pipeline.toml")
    wait_for_images(3)
    running = figures(dataflow)
    assert running["rows"] == 60
    assert 0 < running["pending"] < 60
    assert "out: running, process" in dataflow("status", "out")[1]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Go on with:\n  dataflow run pipeline.toml" in err
    found = figures(dataflow)
    assert found["done"] + found["pending"] == 60
    assert found["done"] == found["images"] >= 3
    done = start("run", "pipeline.toml")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert f"this run made {60 - found['done']} " in err
    assert len(rows_of(out.strip())) == 60


def test_status_after_a_kill(dataflow):
    write_pipeline(60, "seconds = 0.05")
    process = start("run", "pipeline.toml")
    wait_for_images(3)
    process.kill()
    process.communicate()
    found = figures(dataflow)
    assert found["rows"] == 60
    assert 2 <= found["done"] <= found["images"] + 1
    assert "out: not running" in dataflow("status", "out")[1]
    assert dataflow("retry", "out")[0] == 0
    assert figures(dataflow)["done"] == 60


STUCK = """
import asyncio, pathlib, time
from dataflow.types import Serving

class Stuck(Serving):
    def __init__(self, image_io=None):
        self.image_io = image_io
    def fingerprint(self):
        return {"model": "stuck"}
    async def generate(self, requests):
        pathlib.Path("generating").touch()
        await asyncio.to_thread(time.sleep, 120)
"""


@pytest.mark.parametrize("interrupts", [2, 3])
def test_enough_ctrl_c_end_the_process_whatever_the_model_does(interrupts):
    write_pipeline(2)
    Path("stuck_serving.py").write_text(STUCK)
    text = Path("pipeline.toml").read_text().replace('"fake"\nsize = [8, 8]', '"stuck_serving:Stuck"')
    Path("pipeline.toml").write_text(text)
    process = start("run", "pipeline.toml")
    until = time.monotonic() + 60
    while not Path("generating").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    asked = time.monotonic()
    for _ in range(interrupts):
        process.send_signal(signal.SIGINT)
        time.sleep(0.8)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - asked < 30
    assert "press it again" in err


def test_an_interruption_outside_a_run(dataflow, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataflow.commands.machine.models", interrupted)
    code, _, err = dataflow("models")
    assert (code, "Go on with:\n  dataflow models" in err) == (130, True)


def test_nobody_reads_the_output():
    process = start("models")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()
