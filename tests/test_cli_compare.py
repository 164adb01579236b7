"""``compare``, ``calibrate`` and ``benchmark`` as a person meets them, from a pipeline file to the report."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataflow import cli
from dataflow.commands.finished import finished_table, named_tables
from dataflow.commands.layout import markdown_table, percent, significant
from dataflow.errors import InputError
from dataflow.utils.storage import FileStorage

PIPELINE = """
[storage]
first_entry_file_name = "{table}"
cache_path = "{out}"

[serving.painter]
type = "fake"
size = [16, 16]
params = {{ style = "{out}" }}

[serving.probe]
type = "image_probe"

[[step]]
operator = "Text2ImageGenerator"
serving = "painter"
seed = {seed}

[[step]]
operator = "ImageEvaluator"
serving = "probe"
output_key = "probe"

[run]
quiet = true
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


@pytest.fixture
def jobs(dataflow):
    """Two folders in which the same prompts were painted from different seeds, and probed."""

    def jobs(rows: int = 12, names: str = "ab", table: str = "prompts.jsonl") -> None:
        if not Path(table).exists():
            prompts = [{"conversations": [{"role": "user", "content": f"thing {n}"}]} for n in range(rows)]
            write(table, prompts)
        for seed, name in enumerate(names):
            Path(f"{name}.toml").write_text(PIPELINE.format(table=table, out=name, seed=seed))
            assert dataflow("-q", "run", f"{name}.toml")[0] == 0

    return jobs


def write(path: str | Path, rows: list[dict]) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def scored(prompt: str, *values, **columns) -> dict:
    statuses = ["ok" if not isinstance(value, str) else value for value in values]
    numbers = [None if isinstance(value, str) else value for value in values]
    return {"conversations": prompt, "clip": numbers, "clip_status": statuses, "clip_by": "m#1", **columns}


class TestCompare:
    def test_two_jobs(self, dataflow, jobs):
        jobs()
        code, out, err = dataflow("compare", "a", "b", "--metric", "probe.brightness", "--metric", "probe.entropy")
        assert (code, err) == (0, "")
        assert "12 prompts are in all 2 runs (matched by conversations)" in out
        assert "a: a/dataflow_cache_step_step2.jsonl" in out
        assert "probe.brightness (higher is better)" in out
        assert "a - b" in out
        tables = [FileStorage(f"{name}/dataflow_cache_step_step2.jsonl").step().read("dict") for name in "ab"]
        means = [sum(row["probe"][0]["entropy"] for row in rows) / 12 for rows in tables]
        assert all(significant(mean) in out for mean in means)

    def test_three_jobs_all_metrics_as_json(self, dataflow, jobs):
        jobs(rows=4, names="abc")
        code, out, _ = dataflow("compare", "a", "b", "c", "--json", "--resamples", 50)
        found = json.loads(out)
        assert (code, found["prompts"], len(found["pairs"])) == (0, 4, 3 * len(found["strengths"]))
        assert {score["metric"] for score in found["scores"]} >= {"probe.brightness", "probe.sharpness", "probe.width"}
        width = next(score for score in found["scores"] if score["metric"] == "probe.width")
        assert width["mean"] == {"value": 16.0, "low": 16.0, "high": 16.0}
        code, again, _ = dataflow("compare", "a", "b", "c", "--json", "--resamples", 50)
        assert again == out
        code, text, _ = dataflow("compare", "a", "b", "c", "--json", "found.json", "--resamples", 50)
        assert json.loads(Path("found.json").read_text()) == found
        assert "Bradley-Terry log strengths over wins on 4 prompts" in text
        assert dataflow("compare", "a", "b", "c", "--markdown", "--resamples", 50)[1].count("| a - b |")

    def test_below_the_floor_it_refuses_and_says_why(self, dataflow):
        write("a.jsonl", [scored("p", 1.0), scored("q", "parse_error"), scored("r", "generation_failed")])
        write("b.jsonl", [scored("p", 2.0), scored("q", 1.0), scored("r", 3.0), scored("s", 3.0)])
        code, out, err = dataflow("compare", "a.jsonl", "b.jsonl")
        assert (code, out) == (2, "")
        assert "a has 1 of 3 scores of clip (generation_failed 1, parse_error 1)" in err
        code, out, _ = dataflow("compare", "a.jsonl", "b.jsonl", "--force")
        assert code == 0
        assert "left out: 1 not in every run" in out
        assert "33.3 %" in out
        assert "strict: a picture that was never made counts as 1.0000 (the worst score seen" in out
        code, out, _ = dataflow("compare", "a.jsonl", "b.jsonl", "--force", "--worst", "clip=-1")
        assert "counts as -1.0000 (as given)" in out
        assert " 0.0000 " in out  # (1 - 1) / 2

    def test_what_is_said_beside_the_figures(self, dataflow):
        write("a.jsonl", [scored("p", 1.0), scored("p", 2.0), scored("q", 1.0)])
        extra = {"lpips": 0.1, "lpips_status": "ok"}
        write("b.jsonl", [scored("p", 2.0, **extra), scored("p", 3.0, **extra), scored("q", 1.5, **extra)])
        _, out, _ = dataflow("compare", "a.jsonl", "b.jsonl", "--lower-better", "clip")
        assert "2 of them share their conversations and were paired in order: --match COLUMN" in out
        assert "not compared: lpips, which only b has" in out
        assert "clip (lower is better)" in out
        write("c.jsonl", [scored("p", 9.0), scored("p", 9.0), scored("q", 9.0)])
        _, out, _ = dataflow("compare", "a.jsonl", "b.jsonl", "c.jsonl")
        assert "no Bradley-Terry strengths: no finite strengths" in out
        write("d.jsonl", [scored("p", "generation_failed")])
        write("e.jsonl", [scored("p", "generation_failed")])
        _, out, _ = dataflow("compare", "d.jsonl", "e.jsonl", "--metric", "clip", "--force")
        assert "give --worst" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["a.jsonl", "nowhere.jsonl"], "no such table or folder"),
            (["a.jsonl", "./a.jsonl"], "a table stands there twice"),
            (["a.jsonl"], "takes two tables"),
            (["a.jsonl", "empty"], "holds no job.toml"),
            (["a.jsonl", "a.jsonl", "--worst", "clip"], "expected KEY=NUMBER"),
            (["a.jsonl", "a.jsonl", "--resamples", "0"], "expected a whole number from 1"),
        ],
    )
    def test_mistakes(self, dataflow, arguments, message):
        write("a.jsonl", [scored("p", 1.0)])
        Path("empty").mkdir()
        code, _, err = dataflow("compare", *arguments)
        assert code == 2
        assert message in err

    def test_in_a_process_of_its_own(self):
        write("a.jsonl", [scored(f"p{n}", n / 7) for n in range(7)])
        write("b.jsonl", [scored(f"p{n}", n / 8) for n in reversed(range(7))])
        command = [sys.executable, "-m", "dataflow", "compare", "a.jsonl", "b.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (done.returncode, done.stderr) == (0, "")
        assert "6       0     1" in done.stdout  # wins, losses, ties
        assert "0.0312" in done.stdout  # 2 of 64 signs
        assert done.stdout.count("a.jsonl") == 1


class TestFinishedTables:
    def test_a_job_that_is_not_done(self, dataflow, jobs):
        jobs(rows=2, names="a")
        table = finished_table("a")
        assert table == Path.cwd() / "a" / "dataflow_cache_step_step2.jsonl"
        table.unlink()
        with pytest.raises(InputError, match="the last step has not written its table dataflow_cache_step_step2"):
            finished_table("a")

    def test_a_folder_of_a_script(self, jobs):
        jobs(rows=2, names="a")
        Path("a/job.toml").unlink()
        assert finished_table("a").name == "dataflow_cache_step_step2.jsonl"
        for summary in Path("a/journal").glob("*/summary.json"):
            summary.write_text("{}")
        with pytest.raises(InputError, match="no step that has finished"):
            finished_table("a")

    def test_names(self):
        for folder in ("x", "y"):
            Path(folder).mkdir()
            write(f"{folder}/t.jsonl", [])
        assert list(named_tables(["x/t.jsonl", "y/t.jsonl"])) == ["x/t.jsonl", "y/t.jsonl"]
        write("x/u.jsonl", [])
        assert list(named_tables(["x/t.jsonl", "x/u.jsonl"])) == ["t", "u"]


class TestCalibrate:
    def ratings(self, rows, path="ratings.csv"):
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def test_ratings_of_pictures_of_a_job(self, dataflow, jobs):
        jobs(rows=20, names="a")
        rows = FileStorage("a/dataflow_cache_step_step2.jsonl").step().read("dict")
        # Raters who like what is bright, and one who slips once; pictures by name alone.
        rated = sorted(rows, key=lambda row: row["probe"][0]["brightness"])
        given = [
            {"image": Path(row["images"][0]).name, "rating": 1 + n // 5 + (rater == "y" and n == 3), "rater": rater}
            for rater in "xy"
            for n, row in enumerate(rated)
        ]
        self.ratings(
            [
                *given,
                {"image": "gone.png", "rating": 3, "rater": "x"},
                {"image": "", "rating": 3, "rater": "x"},
                given[0],
            ]
        )
        arguments = ["calibrate", "ratings.csv", "--table", "a", "--metric", "probe.brightness", "--resamples", 100]
        code, out, err = dataflow(*arguments)
        assert (code, err) == (0, "")
        assert "21 rated items, 20 of them in the table" in out
        assert "1 rated items are not in the table" in out
        assert "1 rows of the ratings cannot be used" in out
        assert "1 ratings were given again by the same rater: the last one counts" in out
        assert "Krippendorff's alpha (ordinal) 0.9" in out
        code, out, _ = dataflow(*arguments, "--json", "--map", "map.json", "--rating-at-least", 3)
        found = json.loads(out)
        [metric] = found["metrics"]
        assert metric["spearman"]["value"] > 0.95
        assert metric["items"] == 20
        maps = json.loads(Path("map.json").read_text())["maps"]["probe.brightness"]
        bright = [row["probe"][0]["brightness"] for row in rated]
        assert bright[9] < maps["threshold"] <= bright[10]
        assert maps["points"][0][1] == 1.0
        _, out, _ = dataflow(*arguments, "--map", "map.json", "--rating-at-least", 9)
        assert "a rating of 9 is expected from a score of no score reaches it" not in out
        assert "no score is expected to reach a rating of 9" in out

    def test_rows_by_id_within_a_group(self, dataflow):
        rows = [scored("x", n / 10, id=n, scene=n % 2, junk=None) for n in range(8)]
        write("scored.jsonl", [*rows, scored("x", "timeout", id=8, scene=0)])
        self.ratings([{"id": n, "stars": 5 - n} for n in range(9)])
        arguments = ["calibrate", "ratings.csv", "--table", "scored.jsonl", "--key", "id", "--rating", "stars"]
        code, out, _ = dataflow(*arguments, "--within", "scene", "--lower-better", "clip", "--resamples", 20)
        assert code == 0
        assert "clip (negated)" in out
        assert "timeout 1" in out
        assert "no agreement among raters: no item has two ratings" in out
        write("few.jsonl", rows[:2])
        _, out, _ = dataflow("calibrate", "ratings.csv", "--table", "few.jsonl", *arguments[4:], "--resamples", 20)
        assert "clip: the statistic is not defined on" in out
        code, out, _ = dataflow(*arguments, "--within", "scene", "--lower-better", "clip", "--resamples", 20, "--json")
        [metric] = json.loads(out)["metrics"]
        assert (metric["pairs"]["pairs"], metric["pairs"]["accuracy"], metric["spearman"]["value"]) == (12, 1.0, 1.0)
        code, out, _ = dataflow(*arguments, "--map", "m.json", "--rating-at-least", 3, "--lower-better", "clip")
        assert "clip: a rating of 3 is expected from a score of at most 0.2000" in out

    def test_choices(self, dataflow):
        write("scored.jsonl", [scored("p", 1.0, 2.0, images=["1.png", "2.png"]), scored("q", 3.0, images=["3.png"])])
        self.ratings(
            [
                {"first": "1.png", "second": "2.png", "choice": "second"},
                {"first": "3.png", "second": "1.png", "choice": "3.png"},
                {"first": "2.png", "second": "3.png", "choice": "first"},
                {"first": "2.png", "second": "1.png", "choice": "tie"},
                {"first": "2.png", "second": "9.png", "choice": "tie"},
            ]
        )
        code, out, _ = dataflow("calibrate", "ratings.csv", "--table", "scored.jsonl", "--resamples", 50)
        assert code == 0
        assert "4 rated pairs, 3 of them in the table" in out
        assert "0.6667" in out
        assert "a pair that only the metric ties counts as half right" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--key names one of id, stars"),
            (["--key", "id"], "--rating names one of id, stars"),
            (["--key", "id", "--rating", "stars", "--lower-better", "x"], "--lower-better x: the metrics are clip"),
            (["--key", "id", "--rating", "stars", "--rating-at-least", "3"], "belongs to --map"),
            (["--pairs", "--map", "x.json"], "belong to ratings"),
            (["--key", "id", "--rating", "stars", "--table-key", "images"], "none of the 1 rated items"),
        ],
    )
    def test_mistakes(self, dataflow, arguments, message):
        write("scored.jsonl", [scored("p", 1.0, id=1, images=["1.png"])])
        self.ratings([{"id": 7, "stars": 3}])
        code, _, err = dataflow("calibrate", "ratings.csv", "--table", "scored.jsonl", *arguments)
        assert code == 2
        assert message in err

    def test_a_table_without_scores(self, dataflow):
        write("plain.jsonl", [{"id": 1}])
        self.ratings([{"id": 1, "rating": 3}])
        assert "the table has no scores" in dataflow("calibrate", "ratings.csv", "--table", "plain.jsonl")[2]


class TestBenchmark:
    def test_from_the_prompts_to_the_report(self, dataflow, jobs):
        Path("meta.jsonl").write_text(
            "".join(
                json.dumps({"tag": tag, "include": [{"class": f"cat {n}", "count": 1}], "prompt": f"{tag} {n}"}) + "\n"
                for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
                for n in range(2)
            )
        )
        code, out, err = dataflow("benchmark", "prompts", "geneval", "meta.jsonl", "-o", "made/prompts.jsonl")
        assert (code, out, err) == (0, "", "12 prompts: made/prompts.jsonl\n")
        jobs(names="a", table="made/prompts.jsonl")
        rows = FileStorage("a/dataflow_cache_step_step2.jsonl").step().read("dict")
        for n, row in enumerate(rows):
            row["objects"], row["objects_status"] = [{"value": float(n > 0)}], ["ok"]
        write("a/dataflow_cache_step_step2.jsonl", rows)
        code, out, _ = dataflow("benchmark", "report", "geneval", "a", "--score", "objects")
        assert code == 0
        lines = [line.split() for line in out.splitlines() if line]
        assert ["Single", "object", "0.50", "0.50", "2", "100.0", "%"] in lines
        assert ["Overall", "0.92", "0.92", "12", "100.0", "%"] in lines
        assert "note: 12 of the set's 553 prompts" in out
        code, out, _ = dataflow("benchmark", "report", "geneval", "a", "--score", "score=objects.value", "--markdown")
        assert "| accuracy | 0.50 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 0.92 |" in out
        code, out, _ = dataflow("benchmark", "report", "geneval", "a", "--score", "objects", "--json")
        assert json.loads(out)["coverage"] == 1.0
        code, _, err = dataflow("benchmark", "report", "geneval", "a")
        assert code == 2
        assert "name the score column, one of probe, objects" in err

    def test_markdown_of_several_sections(self, dataflow):
        rows = [scored("p", 1.0, prompt_id=str(n), category="Arts", challenge="Basic") for n in range(2)]
        write("scored.jsonl", [*rows, scored("q", "timeout", prompt_id="2", category="Arts", challenge="Basic")])
        code, _, err = dataflow("benchmark", "report", "parti", "scored.jsonl")
        assert code == 2
        assert "2 of 3 pictures have a score (timeout 1)" in err
        _, out, _ = dataflow("benchmark", "report", "parti", "scored.jsonl", "--force", "--markdown")
        assert "\nchallenge\n" in out
        _, out, _ = dataflow("benchmark", "report", "parti", "scored.jsonl", "--force")
        assert "2 of 3 pictures scored (66.6 %; timeout 1)" in out

    def test_gedit_writes_its_pictures_beside_the_table(self, dataflow):
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = {"key": "k", "task_type": "ps_human", "instruction": "smile", "instruction_language": "en"}
        picture = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}
        pq.write_table(pa.Table.from_pylist([row | {"input_image": picture}]), "gedit.parquet")
        assert dataflow("-q", "benchmark", "prompts", "gedit", "gedit.parquet", "-o", "edits.parquet") == (0, "", "")
        [found] = FileStorage("edits.parquet").step().read("dict")
        assert found["images"] == ["edits_images/k_en.png"]
        assert Path("edits_images/k_en.png").is_file()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["prompts", "drawbench", "x", "-o", "y.jsonl"], "invalid choice: 'drawbench'"),
            (["prompts", "geneval", "nowhere", "-o", "y.jsonl"], "no such file or folder"),
            (["prompts", "geneval", "nowhere", "-o", "y.txt"], "expected a table, .jsonl"),
            (["report", "geneval", "nowhere"], "no such table"),
            ([], "the following arguments are required"),
        ],
    )
    def test_mistakes(self, dataflow, arguments, message):
        code, _, err = dataflow("benchmark", *arguments)
        assert code == 2
        assert message in err
        assert not Path("y.jsonl").exists()


def test_shares_are_rounded_down():
    assert [percent(share) for share in (0.99999, 1.0, 0.29, None)] == ["99.9 %", "100.0 %", "29.0 %", "–"]
    assert [significant(value) for value in (0.12345, 12345.678)] == ["0.1235", "12,345.7"]
    assert markdown_table(["a|b", "c"], [["1", "2"]]) == "| a\\|b | c |\n| --- | ---: |\n| 1 | 2 |"


def test_a_benchmark_from_prompts_to_its_table(tmp_path, capsys):
    pytest.importorskip("torch")
    lines = [
        {"tag": "colors", "include": [{"class": "star", "count": 1, "color": colour}], "prompt": f"a {colour} star"}
        for colour in ("red", "blue")
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "steps.toml").write_text(
        """
        [serving.draw]
        type = "fake"
        [serving.owl]
        type = "zero_shot_detection"
        hf_model_name_or_path = "builtin:tiny-owl"
        [[step]]
        operator = "Text2ImageGenerator"
        serving = "draw"
        [[step]]
        operator = "ObjectEvaluator"
        serving = "owl"
        colours = "query"
        """
    )
    command = ["benchmark", "run", "geneval", str(tmp_path / "metadata.jsonl"), str(tmp_path / "steps.toml")]
    assert cli.main([*command, "-o", str(tmp_path / "job"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("geneval: 2 prompts, 2 of 2 pictures scored\n")
    assert "Colors" in out
    assert (tmp_path / "job" / "job.toml").is_file()
    made = sorted((tmp_path / "job" / "images").rglob("*.png"))
    assert len(made) == 2
    assert cli.main([*command, "-o", str(tmp_path / "job"), "--quiet"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main(["benchmark", "report", "geneval", str(tmp_path / "job")]) == 0
    assert capsys.readouterr().out == out
