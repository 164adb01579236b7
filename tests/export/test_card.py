"""The dataset card: what the Hub reads, and that nothing in it is taken for markup."""

from __future__ import annotations

import pytest
import yaml
from tests.export.test_kinds import HOSTILE

from dataflow.export.card import _code, _line


def front(shop) -> dict:
    text = (shop.out / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0][4:])


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("ours alone", {"license": "other", "license_name": "ours alone"}),
        (None, {}),
    ],
)
def test_licences(shop, licence, told):
    rows = [shop.row(number, 1, license=f"licence {number % 2}") for number in range(3)]
    shop.export(shop.table(rows), license=licence)
    found = front(shop)
    assert {name: found[name] for name in ("license", "license_name") if name in found} == told
    text = (shop.out / "README.md").read_text()
    assert "`licence 0` 2, `licence 1` 1" in text
    assert ("none was given" in text) == (licence is None)


def test_front_matter_of_parquet(shop):
    summary = shop.export(shop.scored(6, 2), format="parquet", test=0.4, name="我的数据: \u0085 x")
    found = front(shop)
    assert found["pretty_name"] == "我的数据: \u0085 x"
    assert found["task_categories"] == ["text-to-image"]
    assert found["size_categories"] == ["n<1K"]
    assert {each["name"]: each["num_examples"] for each in found["dataset_info"]["splits"]} == summary.splits
    assert all(set(each) == {"name", "num_bytes", "num_examples"} for each in found["dataset_info"]["splits"])
    assert [each["name"] for each in found["dataset_info"]["features"]] == list(shop.index()["columns"])
    assert [each["split"] for each in found["configs"][0]["data_files"]] == list(summary.splits)


def test_models_scores_and_losses_are_told_and_add_up(shop):
    rows = [shop.row(number, 2) for number in range(3)]
    rows.append({"conversations": "x", "images": [], "images_error": {"status": "refused"}})
    shop.export(shop.table(rows))
    text = (shop.out / "README.md").read_text()
    assert "| `some/model@abc123` | 6 |" in text
    assert "| `judge.value` | 6 | 1.05 | 0 | 2.1 |" in text
    assert "4 rows = 3 used + 1 refused" in text
    assert "6 samples = 6 written" in text
    assert "3 different prompts" in text


def test_pictures_that_tell_nothing_and_many_models(shop):
    rows = [{"prompt": "x", "image": shop.file("plain.png", 1)}]
    rows += [{"prompt": "x", "image": shop.picture(n, "x", model=f"model-{n:02d}", revision=None)} for n in range(45)]
    shop.export(shop.table(rows))
    text = (shop.out / "README.md").read_text()
    assert "| `model-00` | 1 |" in text
    assert "| others | 6 |" in text
    assert "| not told by the file | 1 |" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_is_markup(text):
    for shown in (_line(text), _code(text)):
        assert "\n" not in shown
        assert "\r" not in shown
    assert "<script" not in _line(text).replace("\\<", "")
    assert _code(text).count("`") == 2
