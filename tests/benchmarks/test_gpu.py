"""The benchmark of a whole model, with a tiny one on the CPU."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.models import PRESETS, parts


def test_the_full_models_have_as_many_weights_as_the_published_ones():
    torch = pytest.importorskip("torch")
    published = {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }
    full = PRESETS["full"]
    found = {}
    for name, make in parts(full, clip_words=full.clip_words, t5_words=full.t5_words).items():
        with torch.device("meta"):
            found[name] = sum(weights.numel() for weights in make().parameters())
    assert found == published


@pytest.mark.slow
def test_tiny_models_go_through_every_loop(tmp_path, capsys):
    results, models = tmp_path / "found.json", tmp_path / "models"
    common = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--results",
        str(results),
        "--folder",
        str(models),
        "--images",
        "4",
    ]
    main([*common, "--keep", "--stages"])
    assert "plain" not in json.loads(results.read_text()).get("text2image", {})
    main([*common, "--keep", "--stages", "plain", "reference"])
    before = json.loads(results.read_text())["text2image"]["plain"]
    main([*common, "--batch", "2", "--stages", "plain", "reference", "defaults"])
    found = json.loads(results.read_text())
    assert found["text2image"]["plain"] == before, "what is there is not measured again"
    for task in ("text2image", "imageedit"):
        assert [found[task][stage]["images"] for stage in ("plain", "reference", "defaults")] == [4, 4, 4]
        ours = found[task]["defaults"]
        assert ours["batch"] == 2
        assert ours["flops"] > 1e6
        assert ours["bare"] > 0
    assert not models.exists()
    shown = capsys.readouterr().out
    assert shown.count("this project, as it comes (float32, batch 2)") == 2
    assert "the ratios say nothing of a GPU" in shown


def test_results_of_other_sizes_are_not_mixed(tmp_path):
    results = tmp_path / "found.json"
    results.write_text(json.dumps({"facts": {"preset": "full", "steps": 28, "side": 1024}}))
    with pytest.raises(SystemExit, match=r"is about .*full"):
        main(["--preset", "tiny", "--results", str(results), "--stages"])
