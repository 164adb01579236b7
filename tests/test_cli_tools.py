"""``demo``, ``replay``, ``models`` and ``doctor``."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dataflow import cli
from dataflow.errors import RefusedError
from dataflow.io import ImageIO
from dataflow.serving import fake_serving
from dataflow.serving.model_files import BUILTIN_FOLDER, INDEX
from dataflow.types import GenerationResult
from dataflow.utils.storage import FileStorage

needs_model = pytest.mark.skipif(not (BUILTIN_FOLDER / INDEX).is_file(), reason="the built-in model is not there")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture
def dataflow(capsys):
    def dataflow(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return dataflow


@pytest.fixture
def image(dataflow) -> Path:
    """An image made with the fake serving in ./out."""
    _, table, _ = dataflow("generate", "a red circle", "--fake", "-o", "out", "--size", "16x16")
    return Path(FileStorage(table.strip()).step().read("dict")[0]["images"][0])


# demo --------------------------------------------------------------------------------------------------------------


def test_demo(dataflow):
    code, out, _ = dataflow("demo", "--fake")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["table", "folder", "contact sheet", "try next"]
    assert "contact sheet: demo_output/contact_sheet.png\n" in out
    with Image.open("demo_output/contact_sheet.png") as sheet:
        assert min(sheet.size) > 300
    assert dataflow("demo", "--fake", "-q")[0] == 0
    rows = FileStorage("demo_output/dataflow_cache_step_step2.jsonl").step().read("dict")
    assert 12 <= len(rows) <= 16
    assert all(len(row["images"]) == len(row["edited_images"]) == 1 for row in rows)


def test_demo_when_something_cannot_be_drawn(dataflow, monkeypatch):
    async def answer(self, request):
        return GenerationResult(error=RefusedError("no")) if "star" in request.prompt else Image.new("RGB", (8, 8))

    monkeypatch.setattr(fake_serving.FakeServing, "_answer", answer)
    code, out, _ = dataflow("demo", "--fake")
    assert (code, "contact sheet" in out) == (1, True)


@needs_model
@pytest.mark.slow
def test_demo_with_its_model(dataflow):
    code, out, _ = dataflow("demo", "-o", "here")
    assert code == 0
    assert Path("here/contact_sheet.png").is_file()
    assert "dataflow generate" in out
    told = [line for line in out.splitlines() if line.startswith("  ")]
    assert out.startswith(f"48 pictures, {len(told)} of them not what was asked for:\n")
    assert 1 <= len(told) <= 8
    assert all("expected 1 " in line or "alignment" in line for line in told)
    rows = FileStorage("here/dataflow_cache_step_step6.jsonl").step().read("dict")
    assert all(len(row["images"]) == len(row["edited_images"]) == 1 for row in rows)
    assert all(row["objects"][0]["value"] == 1.0 and row["clip"][0]["alignment"] >= 0.1 for row in rows)
    assert dataflow("status", "here")[0] == 0
    assert dataflow("replay", rows[0]["images"][0])[0] == 0


# replay ------------------------------------------------------------------------------------------------------------


def test_replay_of_a_file(dataflow, image):
    code, out, err = dataflow("replay", image)
    assert (code, err) == (0, "")
    assert "identical" in out
    copy = Path("out/replay") / image.name
    assert ImageIO(".").read_metadata(copy)["replay_of"] == str(image)
    assert [path.name for path in Path("out/replay").iterdir()] == [image.name]


def test_replay_by_the_beginning_of_an_id(dataflow, image):
    assert dataflow("replay", image.stem[:6].upper(), "--cache", "out")[0] == 0
    code, _, err = dataflow("replay", "zz", "--cache", "out")
    assert (code, "no image whose id begins with 'zz'" in err) == (2, True)
    (image.parent / f"{image.stem}_1.png").write_bytes(image.read_bytes())
    code, _, err = dataflow("replay", image.stem[:6], "--cache", "out")
    assert (code, "2 images have an id that begins" in err) == (2, True)


@pytest.mark.parametrize(("shift", "code", "word"), [(2, 0, "within rounding"), (3, 1, "different: of 255 levels")])
def test_replay_compares(dataflow, image, monkeypatch, shift, code, word):
    picture = ImageIO(".").read(image)
    changed = picture.point(lambda level: level + shift if level < 128 else level - shift)
    monkeypatch.setattr(fake_serving, "paint", lambda request, size: changed)
    found, out, _ = dataflow("replay", image)
    assert (found, word in out) == (code, True)
    assert f"largest difference is {shift}" in out


def test_replay_of_another_size(dataflow, image, monkeypatch):
    monkeypatch.setattr(fake_serving, "paint", lambda request, size: Image.new("RGB", (4, 8)))
    code, out, _ = dataflow("replay", image)
    assert (code, "different: 16 × 16 before, 4 × 8 now" in out) == (1, True)


def test_replay_that_is_refused(dataflow, image, monkeypatch):
    async def answer(self, request):
        return GenerationResult(error=RefusedError("declined"))

    monkeypatch.setattr(fake_serving.FakeServing, "_answer", answer)
    code, _, err = dataflow("replay", image)
    assert (code, "error: declined" in err) == (1, True)


def test_replay_that_answers_with_text(dataflow, image, monkeypatch):
    async def answer(self, request):
        return GenerationResult(text="words")

    monkeypatch.setattr(fake_serving.FakeServing, "_answer", answer)
    assert dataflow("replay", image)[0] == 2


def test_replay_with_another_model_warns(dataflow, image):
    job = Path("out/job.toml")
    job.write_text(job.read_text().replace('type = "fake"', 'type = "fake"\nmodel = "other"'))
    code, _, err = dataflow("replay", image)
    assert code == 0
    assert "warning: the model is not the one that made this image: model: 'fake' → 'other'" in err


def test_replay_of_a_picture_of_unknown_origin(dataflow, image):
    Image.new("RGB", (8, 8)).save("out/mine.png")
    code, _, err = dataflow("replay", "out/mine.png")
    assert (code, "it was not made by dataflow" in err) == (2, True)


def test_replay_of_an_edit(dataflow):
    Image.new("RGB", (8, 8), "red").save("a.png")
    _, table, _ = dataflow("edit", "make it blue", "--image", "a.png", "--fake", "--format", "jpeg")
    edited = FileStorage(table.strip()).step().read("dict")[0]["edited_images"][0]
    assert dataflow("replay", edited)[0] == 0
    Image.new("RGB", (8, 8), "green").save("a.png")
    code, _, err = dataflow("replay", edited)
    assert (code, "is not what it was when this image was made" in err) == (2, True)


def test_replay_of_a_second_turn(dataflow):
    Image.new("RGB", (8, 8), "red").save("a.png")
    turns = [{"role": "user", "content": text} for text in ("blue", "larger")]
    Path("in.jsonl").write_text(json.dumps({"conversations": turns, "images": ["a.png"]}) + "\n")
    _, table, _ = dataflow("edit", "in.jsonl", "--fake")
    edited = FileStorage(table.strip()).step().read("dict")[0]["edited_images"][0]
    code, out, _ = dataflow("replay", edited)
    assert (code, "identical" in out) == (0, True)


def test_replay_in_a_job_of_several_steps(dataflow):
    dataflow("demo", "--fake")
    row = FileStorage("demo_output/dataflow_cache_step_step2.jsonl").step().read("dict")[0]
    assert dataflow("replay", row["edited_images"][0])[0] == 0
    assert dataflow("replay", row["images"][0])[0] == 0


def test_replay_where_no_step_makes_images(dataflow, image, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_step_of_tools_test.py").write_text(
        "from dataflow.types import Plan\n"
        "class Keep:\n"
        "    def plan(self):\n"
        "        return Plan(name='Keep', inputs=(), outputs=(), requests=lambda r: [], fold=lambda r, o: r)\n"
    )
    sys.path.append(".")
    job = Path("out/job.toml")
    text = job.read_text()
    job.write_text(text[: text.index("[[step]]")] + '[[step]]\noperator = "own_step_of_tools_test:Keep"\n')
    code, _, err = dataflow("replay", image)
    assert (code, "no step with a serving" in err) == (2, True)


# models and doctor -------------------------------------------------------------------------------------------------


def test_models(dataflow):
    folder = Path("ckpt/org--name/0123")
    folder.mkdir(parents=True)
    (folder / INDEX).write_text('{"_class_name": "FluxPipeline"}')
    (folder.parent / "4567").mkdir()
    (folder.parent / "4567" / INDEX).write_text("{")
    code, out, _ = dataflow("models", "--hf-local-dir", "ckpt")
    assert code == 0
    assert "ckpt/org--name/0123  FluxPipeline" in out
    assert "ckpt/org--name/4567  (its model_index.json cannot be read)" in out
    assert "FluxKontextPipeline" in out
    _, out, _ = dataflow("models", "--json", "--hf-local-dir", "ckpt")
    found = json.loads(out)
    assert found["local"]["ckpt/org--name/0123"] == "FluxPipeline"
    assert found["families"]["FluxKontextPipeline"]["imageedit"] is True


def test_models_where_there_are_none(dataflow, monkeypatch):
    monkeypatch.setattr("dataflow.commands.machine.builtin_models", list)
    Path("ckpt").mkdir()
    out = dataflow("models", "--hf-local-dir", "ckpt")[1]
    assert "(none: this installation lacks its model)" in out
    assert "(no folder with a model_index.json)" in out


def test_doctor(dataflow, monkeypatch):
    threads = SimpleNamespace(
        __version__="2.0",
        cuda=SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            mem_get_info=lambda n: (10**9, 2 * 10**9),
            get_device_name=lambda n: "Some GPU",
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)),
        get_num_threads=lambda: 3,
    )
    monkeypatch.setitem(sys.modules, "torch", threads)
    monkeypatch.setattr("dataflow.commands.machine._missing", lambda extra: [])
    code, out, _ = dataflow("doctor")
    assert code == 0
    for words in (
        "Python ",
        "[local]     installed",
        "torch       2.0",
        "Some GPU, 1.0 GB of 2.0 GB free",
        "3 threads",
    ):
        assert words in out


def test_doctor_finds_what_is_missing(dataflow, monkeypatch):
    known = metadata.version

    def version(name):
        if name in ("diffusers", "peft"):
            raise metadata.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = dataflow("doctor")
    assert code == 1
    assert "missing diffusers, peft: pip install 'open-dataflow[local]'" in out


def test_doctor_with_a_broken_torch(dataflow, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("dataflow.commands.machine._missing", lambda extra: [])
    code, out, _ = dataflow("doctor")
    assert (code, "is installed but does not load" in out) == (1, True)
