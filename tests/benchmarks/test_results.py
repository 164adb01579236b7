"""One section of RESULTS.md is measured again, the others stay; its plots show what stands there."""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks import plots, results
from benchmarks.__main__ import BENCHMARKS, keep, main
from benchmarks.measure import Result

pytest.importorskip("matplotlib")

RAY = "How close does a Ray cluster come to the time that its work takes?"
GROWTH = "How do time and memory grow with the rows?"


def ray(share: float) -> Result:
    cells = [["in this process", "0 s", "1 s", "1 s", "0.97"], ["Ray, 2 workers", "2 s", "1 s", "1 s", f"{share}"]]
    return Result(question=RAY, columns=["", "a", "b", "c", "d"], rows=cells, notes=["a note"])


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(results, "FILE", path)
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "plots")
    monkeypatch.setattr(plots.draw, "__defaults__", (tmp_path / "plots",))
    return path


def test_a_section_measured_again_replaces_itself_alone(file):
    keep("engine", [Result(question="What does it cost?", columns=["x"], rows=[["1"]])])
    keep("ray_executor", [ray(0.5)])
    keep("overhead", [Result(question="How much slower?", columns=["x"], rows=[["2"]])])
    before = results.sections(file.read_text())
    keep("ray_executor", [ray(0.95)])
    after = results.sections(file.read_text())
    assert list(after) == ["overhead", "engine", "ray_executor"], "in the order in which they are run"
    assert {name: after[name] for name in ("overhead", "engine")} == {n: before[n] for n in ("overhead", "engine")}
    assert "0.95" in after["ray_executor"]
    assert "0.5 |" not in after["ray_executor"]
    assert f"![{RAY}](plots/ray.png)" in after["ray_executor"]
    with Image.open(file.parent / "plots" / "ray.png") as picture:
        assert picture.width > 500


def test_a_plot_changes_with_its_numbers(file):
    keep("ray_executor", [ray(0.5)])
    first = (file.parent / "plots" / "ray.png").read_bytes()
    keep("ray_executor", [ray(0.5)])
    assert (file.parent / "plots" / "ray.png").read_bytes() == first
    keep("ray_executor", [ray(0.95)])
    assert (file.parent / "plots" / "ray.png").read_bytes() != first


def test_growth_has_a_plot_of_its_own(file):
    row = ["1,000", "0.01 s", "0.5 s (50 ×)", "500 µs", "0.1 s (10.0 ×)", "0.2 s", "90 MB"]
    more = ["10,000", "0.1 s", "1.5 s (15 ×)", "150 µs", "0.2 s (2.0 ×)", "0.2 s", "95 MB"]
    keep("growth", [Result(question=GROWTH, columns=list("abcdefg"), rows=[row, more])])
    assert (file.parent / "plots" / "growth.png").stat().st_size < 60_000


def test_numbers_in_cells():
    assert plots.number("1,234.5 s (3 ×)") == 1234.5
    assert plots.number("ratio -0.5") == -0.5
    assert plots.number("–") is None


def test_a_benchmark_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "there is no benchmark 'nothing': choose from overhead, " in capsys.readouterr().err


def test_what_is_published_has_its_plots_and_its_benchmarks():
    text = results.FILE.read_text()
    assert set(results.sections(text)) <= set(BENCHMARKS)
    found = plots.tables(text)
    for question, file in plots.files().items():
        if question in found:
            assert f"({file})" in text, question
            assert (results.FILE.parent / file).stat().st_size < 60_000
