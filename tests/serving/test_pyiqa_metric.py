"""pyiqa's metrics, on a package that stands in for it: its licence keeps the real one out of here."""

from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from dataflow.errors import ConfigError, FatalServingError, OutOfMemoryError
from dataflow.operators import ImageEvaluator, ScoreFilter
from dataflow.runtime.engine import RunOptions
from dataflow.serving.pyiqa_metric import PyiqaServing
from dataflow.types import GenerationRequest
from dataflow.utils.storage import FileStorage

torch = pytest.importorskip("torch")

QUIET = RunOptions(quiet=True)

# The names, signatures and checks of pyiqa 0.1.16; what they compute is easy to check.
STAND_IN = """
import torch

MODES = {"darkness": "NR", "redness": "NR", "broken": "NR", "nothing": "NR", "large": "NR", "unfetched": "NR",
         "fid": "NR", "inception_score": "NR", "psnr": "FR"}
made = []

def list_models(metric_mode=None, filter="", exclude_filters=""):
    return sorted(name for name, mode in MODES.items() if metric_mode in (None, mode))

class InferenceModel(torch.nn.Module):
    def __init__(self, metric_name, as_loss=False, device=None):
        super().__init__()
        self.metric_name = metric_name
        self.lower_better = metric_name == "darkness"
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, target, ref=None, **kwargs):
        assert isinstance(target, torch.Tensor) and target.dim() == 4 and target.shape[1] in [1, 3]
        assert target.min() >= 0 and target.max() <= 1
        if self.metric_name == "broken":
            raise RuntimeError("Calculated padded input size is smaller than the kernel")
        if self.metric_name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.metric_name == "nothing":
            return torch.full((1, 1), float("nan"))
        left = target[..., : target.shape[-1] // 2]
        value = left[:, 0].mean() if self.metric_name == "redness" else 1 - target.mean()
        return (self.weight * value).reshape(1, 1)

def create_metric(metric_name, as_loss=False, device=None, **kwargs):
    if metric_name == "unfetched":
        raise OSError("We couldn't connect to 'https://huggingface.co'")
    made.append((metric_name, device))
    return InferenceModel(metric_name, as_loss=as_loss, device=device)
"""


@pytest.fixture
def pyiqa(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    (folder / "pyiqa").mkdir(parents=True)
    (folder / "pyiqa" / "__init__.py").write_text(STAND_IN)
    (folder / "pyiqa-0.1.16.dist-info").mkdir()
    (folder / "pyiqa-0.1.16.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: pyiqa\nVersion: 0.1.16\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    yield importlib.import_module("pyiqa")
    sys.modules.pop("pyiqa", None)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path), pixels / 255


def accepted(name, **options):
    return PyiqaServing(name, accept_noncommercial_licence=True, **options)


def answers(serving, *paths):
    requests = [GenerationRequest(request_id="0" * 32, prompt="", images=(path,), seed=0) for path in paths]
    serving.setup()
    results = asyncio.run(serving.generate(requests))
    serving.cleanup()
    return [result.error or json.loads(result.text) for result in results]


@pytest.mark.parametrize(
    "options", [{}, {"accept_noncommercial_licence": False}, {"accept_noncommercial_licence": "no"}]
)
def test_its_licence_must_be_accepted(options):
    with pytest.raises(ConfigError, match=r"PolyForm-Noncommercial-1\.0\.0.*accept_noncommercial_licence=True"):
        PyiqaServing("musiq", **options)


def test_a_metric_sees_the_picture_as_rgb_from_0_to_1(pyiqa, picture):
    path, pixels = picture
    [darkness] = answers(accepted("darkness", device="cpu"), path)
    assert darkness == {"value": pytest.approx(1 - pixels.mean(), abs=1e-6), "lower_better": True}
    [redness] = answers(accepted("redness"), path)
    assert redness == {"value": pytest.approx(pixels[:, :25, 0].mean(), abs=1e-6), "lower_better": False}
    assert pyiqa.made == [("darkness", "cpu"), ("redness", None)]


def test_a_bad_picture_is_its_own_failure_among_others(pyiqa, picture, tmp_path):
    half = tmp_path / "half.png"
    half.write_bytes((tmp_path / "picture.png").read_bytes()[:200])
    first, missing, broken, last = answers(
        accepted("redness"), picture[0], str(tmp_path / "gone"), str(half), picture[0]
    )
    assert first == last
    assert (missing.reason, broken.reason) == ("image_missing", "image_truncated")


def test_what_a_metric_cannot_measure_has_no_score(pyiqa, picture):
    [broken] = answers(accepted("broken"), picture[0])
    assert broken.reason == "no_score"
    assert "smaller than the kernel" in str(broken)
    [nothing] = answers(accepted("nothing"), picture[0])
    assert (nothing.reason, "nan" in str(nothing)) == ("no_score", True)
    [large] = answers(accepted("large"), picture[0])
    assert isinstance(large, OutOfMemoryError)


@pytest.mark.parametrize("name", ["psnr", "fid", "inception_score", "musik"])
def test_only_metrics_of_single_pictures(pyiqa, name):
    with pytest.raises(ConfigError, match=f"no metric '{name}'.*, darkness, "):
        accepted(name).setup()


def test_a_metric_that_does_not_load(pyiqa):
    with pytest.raises(FatalServingError, match=r"unfetched does not load.*couldn't connect"):
        accepted("unfetched").setup()


def test_without_pyiqa_or_with_a_torchvision_that_does_not_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for call in (accepted("musiq").setup, accepted("musiq").fingerprint):
        with pytest.raises(ConfigError, match=r"pip install pyiqa, and the torchvision that belongs to your torch"):
            call()

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ConfigError, match="nms does not exist"):
        accepted("musiq").setup()


def test_it_travels_as_its_settings(pyiqa, picture):
    serving = accepted("redness")
    assert serving.fingerprint() == {"model": "pyiqa/redness", "pyiqa": "0.1.16", "version": 1}
    assert accepted("redness", device="cpu").fingerprint() == serving.fingerprint() != accepted("broken").fingerprint()
    serving.setup()
    serving.setup()
    assert len(pyiqa.made) == 1  # not loaded twice
    copy = pickle.loads(pickle.dumps(serving))
    assert copy.fingerprint() == serving.fingerprint()
    with pytest.raises(FatalServingError, match="setup"):
        copy.score([])


def test_through_the_engine(pyiqa, tmp_path):
    rows = []
    for number, red in enumerate((10, 200)):
        Image.new("RGB", (16, 16), (red, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"images": [str(tmp_path / f"{number}.png")]})
    table = tmp_path / "in.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"images": [str(tmp_path / "gone.png")]}]))
    store = FileStorage(str(table), cache_path=str(tmp_path / "cache"))
    ImageEvaluator(accepted("redness"), options=QUIET).run(store.step(), output_key="quality")
    found = [json.loads(line) for line in store.output_path.read_text().splitlines()]
    assert [row["quality_status"] for row in found] == [["ok"], ["ok"], ["missing_image"]]
    assert found[0]["quality_by"].startswith("pyiqa/redness#")
    ScoreFilter(options=QUIET).run(store.step(), input_score_key="quality.value", minimum=0.5)
    assert [json.loads(line)["images"] for line in store.output_path.read_text().splitlines()] == [rows[1]["images"]]
