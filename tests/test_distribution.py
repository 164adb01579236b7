"""Whole tables against each other, over vectors in a store."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflow import cli, distribution
from dataflow.errors import InputError
from dataflow.metrics import distribution as formulas
from dataflow.utils.vectors import VectorStore

SIZE = 6


@pytest.fixture
def make(tmp_path):
    """Writes a table whose pictures have these vectors; None for a picture without one."""

    def write(name, rows, *, store="model", by="some-model#1", status="missing_image"):
        entries = []
        vectors = VectorStore(tmp_path / "vectors" / store, SIZE)
        for number, row in enumerate(rows):
            key = f"{hash((name, number)) % 2**64:064x}"
            if row is not None:
                vectors.add([key], [row])
            entries.append((None, status) if row is None else ({"sha256": key, "store": store}, "ok"))
        vectors.close()
        table = tmp_path / f"{name}.jsonl"
        lines = [
            {"images": ["x.png"], "vector": [entry], "vector_status": [state], "vector_by": by}
            for entry, state in entries
        ]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return table

    write.read = lambda table: distribution.read(table, tmp_path / "vectors")
    return write


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_every_metric_is_the_formulas_number(make, random):
    real, made = random.normal(size=(60, SIZE)), random.normal(size=(40, SIZE)) + 0.5
    real, made = real.astype(np.float32), made.astype(np.float32)
    reference, table = make.read(make("real", real)), make.read(make("made", made))
    (report,) = distribution.compare([table], reference)
    prdc = formulas.prdc(real, made)
    kid = formulas.kid(real, made, subset_size=40)
    assert report.values == pytest.approx(
        {
            "frechet": formulas.fid(formulas.Moments.of(real), formulas.Moments.of(made)),
            "kid": kid.mean,
            "kid_std": kid.std,
            **prdc._asdict(),
            "cmmd": formulas.cmmd(real, made),
            "vendi": formulas.vendi_score(made),
        }
    )
    assert (report.count, report.reference_count, report.model) == (40, 60, "some-model#1")
    assert report.reference_digest == distribution.compare([table], reference, metrics=["kid"])[0].reference_digest
    assert set(distribution.compare([table], reference, metrics=["kid"])[0].values) == {"kid", "kid_std"}
    assert set(distribution.compare([table], metrics=["vendi"])[0].values) == {"vendi"}


def test_tables_of_unequal_numbers_are_not_compared_but_samples_are(make, random):
    reference = make.read(make("real", random.normal(size=(50, SIZE))))
    one = make.read(make("one", random.normal(size=(40, SIZE))))
    two = make.read(make("two", random.normal(size=(30, SIZE))))
    with pytest.raises(InputError, match=r"have 30 to 40 pictures.*compare samples of 30"):
        distribution.compare([one, two], reference)
    found = distribution.compare([one, two], reference, sample=30)
    assert [each.count for each in found] == [30, 30]
    assert found == distribution.compare([one, two], reference, sample=30)
    assert found[0] != distribution.compare([one, two], reference, sample=30, seed=1)[0]
    with pytest.raises(InputError, match="a sample of 31 cannot be drawn from 30"):
        distribution.compare([two], reference, sample=31)


def test_gaps_are_counted_and_refused(make, random, tmp_path):
    rows = list(random.normal(size=(50, SIZE)))
    whole = make.read(make("whole", rows))
    gaps = make.read(make("gaps", [*rows[:48], None, None], status="refused"))
    assert (gaps.expected, len(gaps.rows), dict(gaps.missing)) == (50, 48, {"refused": 2})
    with pytest.raises(InputError, match="2 of 50 pictures have no vector \\(2 refused\\)"):
        distribution.compare([gaps], whole)
    assert distribution.compare([gaps], whole, force=True)[0].missing == {"refused": 2}
    # vectors that were deleted are gaps too
    for file in (tmp_path / "vectors" / "model").glob("*.vectors"):
        file.write_bytes(file.read_bytes()[: -SIZE * 4 - 36])
    lost = make.read(tmp_path / "whole.jsonl")
    assert (lost.expected, lost.missing) == (50, {"not_in_store": 1})


def test_vectors_of_two_models_are_not_compared(make, random):
    one = make.read(make("one", random.normal(size=(9, SIZE))))
    two = make.read(make("two", random.normal(size=(9, SIZE)), store="other", by="other#2"))
    with pytest.raises(InputError, match="two models cannot be compared: some-model#1 and other#2"):
        distribution.compare([one], two)


def test_tables_without_vectors(make, tmp_path):
    with pytest.raises(InputError, match="no picture has a vector"):
        make.read(make("none", [None, None]))
    table = tmp_path / "plain.jsonl"
    table.write_text('{"images": ["x.png"]}\n')
    with pytest.raises(InputError, match="no such column: has the embedder run"):
        make.read(table)
    mixed = tmp_path / "mixed.jsonl"
    rows = [{"vector": {"sha256": "0" * 64, "store": store}, "vector_by": store} for store in "ab"]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="of several models: a, b"):
        make.read(mixed)


def test_broken_rows_count_as_expected(make, random, tmp_path):
    table = make("table", random.normal(size=(3, SIZE)))
    table.write_text(
        table.read_text() + "{broken\n" + '{"images": [""], "vector": null, "vector_status": "generation_failed"}\n'
    )
    found = make.read(table)
    assert (found.expected, found.missing) == (5, {"bad_row": 1, "generation_failed": 1})


@pytest.mark.parametrize(("metrics", "told"), [(["fid"], "there is no metric 'fid'"), (["kid"], "needs no reference")])
def test_what_cannot_be_asked(make, random, metrics, told):
    table = make.read(make("table", random.normal(size=(9, SIZE))))
    with pytest.raises(InputError, match=told):
        distribution.compare([table], metrics=metrics)


def test_too_few_pictures_for_a_metric(make, random):
    table = make.read(make("table", random.normal(size=(3, SIZE))))
    with pytest.raises(InputError, match="too few"):
        distribution.compare([table], table, metrics=["precision"])


def test_the_command_prints_what_it_found(make, random, tmp_path, capsys):
    real, made = make("real", random.normal(size=(40, SIZE))), make("made", [*random.normal(size=(40, SIZE)), None])
    command = ["distance", str(made), "--vectors", str(tmp_path / "vectors")]
    assert cli.main([*command, "--metric", "vendi", "--json", "--force"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["count"], report["expected"], set(report["values"])) == (40, 41, {"vendi"})
    assert cli.main([*command, "--reference", str(real), "--metric", "kid", "--force"]) == 0
    out = capsys.readouterr().out
    assert "vectors of some-model#1" in out
    assert "40 pictures (1 missing_image of 41)" in out
    assert "  kid " in out
    assert cli.main(command) == 2
    assert "1 of 41 pictures have no vector" in capsys.readouterr().err
