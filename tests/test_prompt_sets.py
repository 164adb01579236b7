"""Published prompt sets read from their own files, and the benchmarks' tables of scores computed by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dataflow.benchmark_reports import report
from dataflow.commands.scoring_options import FORMATS as OFFERED
from dataflow.errors import InputError
from dataflow.metrics.objects import geneval_summary
from dataflow.operators.rows import user_turns
from dataflow.prompt_sets import FORMATS, load
from dataflow.types import BadRow

DSG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 20


def rows_of(name, path, **options):
    rows = list(load(name, path, **options))
    ids = [row["prompt_id"] for row in rows]
    assert len(set(ids)) == len(ids)
    for row in rows:
        assert user_turns(row, "conversations")
        assert len(row["images"]) == 1
    return rows


def line(item, number, parents, category, text="a text", keywords="x"):
    return f'{item},{text},{keywords},{number},"{parents}",,,{category} ({keywords}),Is there {number}?\n'


class TestPublishedFiles:
    def test_geneval(self, published_data):
        path = published_data / "geneval" / "evaluation_metadata.jsonl"
        rows = rows_of("geneval", path)
        assert Counter(row["category"] for row in rows) == {
            "single_object": 80,
            "two_object": 99,
            "counting": 80,
            "colors": 94,
            "position": 100,
            "color_attr": 100,
        }
        assert [row["geneval"] for row in rows] == [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[0]["prompt_id"] == "00000"
        assert user_turns(rows[-1], "conversations") == [rows[-1]["geneval"]["prompt"]]

    def test_dsg(self, published_data):
        rows = rows_of("dsg", published_data / "dsg" / "dsg-1k-anns.csv")
        assert len(rows) == 1060
        assert sum(len(row["questions"]) for row in rows) == 8182
        assert len({row["category"] for row in rows}) == 10
        by_id = {row["prompt_id"]: row for row in rows}
        assert by_id["whoops_5"]["questions"][2] == {
            "id": 3,
            "question": "Does the rubix cube have ten squares?",
            "parents": [1],
            "answer": "yes",
            "category": "attribute - shape",
        }
        assert by_id["localized_narratives_95"]["questions"][4]["parents"] == [1, 4]
        # "5, right" is no list of numbers: the prompt has no dependencies at all, as in the reference.
        assert not any(each["parents"] for each in by_id["posescript_69"]["questions"])
        # Atom 1 of this prompt is not in the file.
        assert [each["parents"] for each in by_id["tifa160_134"]["questions"]][:5] == [[], [], [], [2], [2]]
        for row in rows:
            atoms = {each["id"] for each in row["questions"]}
            assert all(atoms.issuperset(each["parents"]) for each in row["questions"])


class TestLoaders:
    def test_compbench(self, tmp_path):
        (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\n\na red book and a yellow vase \n")
        (tmp_path / "spatial_val.txt").write_text(
            "a bird on the left of a woman\nthree cups\nan owl near an airplane.\n"
        )
        (tmp_path / "3d_spatial_val.txt").write_text("a dog behind a cat\n")
        (tmp_path / "odd_val.txt").write_text("odd\n")
        (tmp_path / "color_val_seen.txt").write_text("not this\n")
        (tmp_path / "color_train.txt").write_text("nor this\n")
        rows = rows_of("t2i_compbench", tmp_path)
        assert [row["prompt_id"] for row in rows] == [
            "color_000",
            "color_001",
            "spatial_000",
            "spatial_001",
            "spatial_002",
            "3d_spatial_000",
            "odd_000",
        ]
        assert user_turns(rows[1], "conversations") == ["a red book and a yellow vase"]
        assert [row.get("spatial") for row in rows[2:5]] == [
            {"first": "bird", "relation": "on the left of", "second": "woman"},
            None,
            {"first": "owl", "relation": "near", "second": "airplane"},
        ]
        assert [row["category"] for row in load("t2i_compbench", tmp_path / "color_val_seen.txt")] == ["color"]

    def test_parti(self, tmp_path):
        path = tmp_path / "PartiPrompts.tsv"
        text = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tseveral\n"the" sign\tArts\tWriting\tof "x"\n'
        path.write_text(text)
        first, second = rows_of("parti", path)
        assert (first["category"], first["challenge"], first["note"]) == ("Abstract", "Basic", "several")
        assert (user_turns(second, "conversations"), second["note"]) == (['"the" sign'], 'of "x"')
        path.write_text("Prompt\tCategory\tChallenge\nbond\tAbstract\t\n")
        with pytest.raises(InputError, match=r"row 1, column 'Challenge'"):
            list(load("parti", path))

    def dpg(self, folder):
        (folder / "prompts").mkdir(parents=True)
        (folder / "prompts" / "7.txt").write_text("two cats, in full\n")
        table = DSG_HEADER + line("7", 1, "0", "entity - whole") + line("7", 2, "1", "attribute - color")
        (folder / "dpg_bench.csv").write_text(table + line("9", 1, "0", "global"))
        return folder

    def test_dpg(self, tmp_path):
        folder = self.dpg(tmp_path / "dpg")
        first, second = rows_of("dpg", folder)
        assert (first["prompt_id"], user_turns(first, "conversations")) == ("7", ["two cats, in full"])
        assert first["category"] == "attribute, entity"
        assert [each["row"] for each in [*first["questions"], *second["questions"]]] == [1, 2, 3]
        assert first["questions"][1]["parents"] == [1]
        assert user_turns(second, "conversations") == ["a text"]
        assert list(load("dpg", folder / "dpg_bench.csv")) == [first, second]
        (folder / "another.csv").write_text("")
        with pytest.raises(InputError, match="expected one"):
            list(load("dpg", folder))

    def test_longtext(self, tmp_path):
        english = {
            "prompt_id": 3,
            "prompt": 'a sign "Go now"',
            "text": ["Go", "now"],
            "category": "sign",
            "length": "s",
        }
        chinese = {"prompt_id": 3, "prompt": "招牌", "text": "你好", "category": "sign"}
        (tmp_path / "text_prompts.jsonl").write_text(json.dumps(english) + "\n")
        (tmp_path / "text_prompts_zh.jsonl").write_text(json.dumps(chinese) + "\n")
        first, second = rows_of("longtext", tmp_path)
        assert (first["prompt_id"], first["text"], first["language"], first["length"]) == (
            "en_0003",
            "Go now",
            "en",
            "s",
        )
        assert (second["prompt_id"], second["text"], second["language"]) == ("zh_0003", "你好", "zh")
        assert list(load("longtext", tmp_path / "text_prompts.jsonl")) == [first]
        (tmp_path / "text_prompts.jsonl").write_text('{"prompt": "x"}\n')
        with pytest.raises(InputError, match="expected a prompt and its text"):
            list(load("longtext", tmp_path))

    def test_gedit_from_json_lines(self, tmp_path):
        row = {"key": "k", "task_type": "ps_human", "instruction": "smile", "instruction_language": "en"}
        path = tmp_path / "gedit.jsonl"
        path.write_text(json.dumps(row | {"input_image": "k.png", "Intersection_exist": True}) + "\n")
        [found] = rows_of("gedit", path)
        assert found["images"] == [str(tmp_path / "k.png")]
        assert (found["prompt_id"], found["category"], found["edit_type"]) == ("k_en", "ps_human", "ps_human")
        assert (found["language"], found["intersection"]) == ("en", True)
        assert next(load("gedit", path, images="elsewhere"))["images"] == ["elsewhere/k.png"]
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match="names no picture"):
            list(load("gedit", path))
        path.write_text(json.dumps(row | {"input_image": {"path": "k.png", "bytes": None}}) + "\n")
        assert next(load("gedit", path, images="elsewhere"))["images"] == ["elsewhere/k.png"]

    def test_gedit_from_parquet_with_pictures_inside(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "key": f"a/{n}",
                "task_type": "text_change",
                "instruction": "write",
                "instruction_language": "cn",
                "input_image": {"bytes": b"small", "path": None},
                "input_image_raw": {"bytes": data, "path": None},
            }
            for n, data in enumerate([PNG, b"\xff\xd8\xff\xe0rest"])
        ]
        (tmp_path / "data").mkdir()
        for n, row in enumerate(rows):
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data" / f"train-{n}.parquet")
        with pytest.raises(InputError, match="name a folder to write them to"):
            list(load("gedit", tmp_path / "data"))
        found = rows_of("gedit", tmp_path / "data", images=tmp_path / "pictures")
        assert [row["images"][0] for row in found] == [
            str(tmp_path / "pictures" / name) for name in ("a_0_cn.png", "a_1_cn.jpg")
        ]
        assert (tmp_path / "pictures" / "a_0_cn.png").read_bytes() == PNG
        rows[0]["input_image_raw"]["bytes"] = b"text"
        pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data" / "train-0.parquet")
        with pytest.raises(InputError, match="no picture of a known format"):
            list(load("gedit", tmp_path / "data", images=tmp_path / "pictures"))
        (tmp_path / "data" / "train-0.parquet").write_bytes(b"broken")
        with pytest.raises(InputError, match="not a readable parquet"):
            list(load("gedit", tmp_path / "data"))

    def test_imgedit(self, tmp_path):
        cases = {"1082": {"id": "animal/1.jpg", "prompt": "smooth the shell", "edit_type": "alter"}}
        path = tmp_path / "basic_edit.json"
        path.write_text(json.dumps(cases))
        [found] = rows_of("imgedit", path, images="originals")
        assert (found["prompt_id"], found["category"], found["images"]) == ("1082", "alter", ["originals/animal/1.jpg"])
        for text, message in (("[]", "an object of cases"), ("{", "not valid JSON"), ('{"1": {}}', "case 1: expected")):
            path.write_text(text)
            with pytest.raises(InputError, match=message):
                list(load("imgedit", path))

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("geneval", '{"tag": "magic", "prompt": "x"}', "row 1: tag: expected"),
            ("dsg", "item_id,text\n1,x\n", "column 'proposition_id': the row has no such column"),
            ("dsg", DSG_HEADER + "1,t,k,one,0,,,x (k),q\n", "column 'proposition_id': expected a number"),
            ("gedit", '{"key": 1}', "column 'key': expected text"),
            ("gedit", "{broken", "row 1"),
            ("parti", b"Prompt\xff\tCategory\tChallenge\n", "cannot be read"),
        ],
    )
    def test_files_that_are_something_else(self, tmp_path, name, text, message):
        path = tmp_path / "file.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=message):
            list(load(name, path))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="there is no prompt set format 'drawbench'"):
            list(load("drawbench", tmp_path))
        with pytest.raises(InputError, match="no such file or folder"):
            list(load("dsg", tmp_path / "nowhere"))
        for name in ("t2i_compbench", "longtext", "gedit"):
            with pytest.raises(InputError, match="holds no"):
                list(load(name, tmp_path))

    def test_the_command_line_offers_all_of_them(self):
        assert OFFERED == FORMATS


def scored(row, *values, key="s", by="model#1"):
    """A row of a prompt set with its scores: a word is the status of one there is none of."""
    statuses = [value if value in ("timeout", "generation_failed", "refused") else "ok" for value in values]
    values = [value if status == "ok" else None for value, status in zip(values, statuses, strict=True)]
    return {**row, key: values, f"{key}_status": statuses, f"{key}_by": by}


def lines_of(found, section=""):
    return {line.name: line.values[found.columns[-1]] for line in found.lines if line.section == section}


def strict_of(found, section=""):
    return {line.name: line.strict[found.columns[-1]] for line in found.lines if line.section == section}


def plain_row(number, category, **columns):
    prompt = {"conversations": [{"role": "user", "content": "x"}], "images": [""]}
    return {"prompt_id": str(number), "category": category, **prompt, **columns}


class TestReports:
    def test_geneval_of_the_whole_set(self, published_data):
        rows = list(load("geneval", published_data / "geneval" / "evaluation_metadata.jsonl"))
        answers = [[bool((n * 7 + k) % 3) for k in range(4)] for n in range(len(rows))]
        table = [
            scored(row, *({"value": float(answer), "reasons": []} for answer in given))
            for row, given in zip(rows, answers, strict=True)
        ]
        found = report("geneval", table)
        expected = geneval_summary(
            (row["category"], answer) for row, given in zip(rows, answers, strict=True) for answer in given
        )
        assert list(lines_of(found).values()) == [*expected.by_task.values(), expected.overall]
        assert next(iter(lines_of(found))) == "Single object"
        assert (found.expected, found.coverage, found.notes) == (2212, 1.0, [])
        assert [line.expected for line in found.lines] == [320, 396, 320, 376, 400, 400, 2212]

    def test_failed_generations_are_wrong_in_the_strict_column_only(self):
        table = [scored(plain_row(n, "colors"), True, True) for n in range(3)]
        table.append(scored(plain_row(3, "colors"), "generation_failed", "refused"))
        with pytest.raises(InputError, match=r"6 of 8 pictures have a score \(generation_failed 1, refused 1\)"):
            report("geneval", table)
        found = report("geneval", table, force=True)
        assert lines_of(found) == {"Colors": 1.0, "Overall": None}
        assert strict_of(found) == {"Colors": 0.75, "Overall": None}
        assert found.notes == ["4 of the set's 553 prompts: not comparable with figures of the whole set"]
        assert found.missing == {"generation_failed": 1, "refused": 1}

    def test_pictures_that_a_row_asked_for_in_vain(self):
        error = {"status": "failed", "reason": "timeout", "message": ""}
        table = [scored(plain_row(1, "colors"), True, True), scored(plain_row(2, "colors", images_error=error), True)]
        found = report("geneval", table, force=True)
        assert (found.expected, strict_of(found)["Colors"]) == (4, 0.75)

    def test_a_judges_failure_is_in_no_mean(self):
        table = [scored(plain_row(n, "colors"), n > 0) for n in range(100)] + [
            scored(plain_row("x", "colors"), "timeout")
        ]
        found = report("geneval", table)
        assert lines_of(found)["Colors"] == strict_of(found)["Colors"] == 0.99
        assert found.scored == 100

    def dsg_rows(self):
        questions = [
            {"id": 1, "parents": [], "category": "entity - whole"},
            {"id": 2, "parents": [1], "category": "attribute - color"},
            {"id": 3, "parents": [2], "category": "attribute - size"},
        ]
        return [plain_row(f"{kind}_{n}", kind, questions=questions) for kind in ("tifa160", "whoops") for n in range(2)]

    def test_dsg(self):
        rows = self.dsg_rows()
        table = [
            scored(rows[0], {"answers": {"1": "no", "2": "yes", "3": "Yes."}}),  # 0, 0 and, by its raw parent, 1
            scored(rows[1], {"answers": [True, True, False]}),
            scored(rows[2], {"answers": [{"answer": True}, {"answer": True}, {"answer": True}]}),
            scored(rows[3], {"atoms": {"1": 1, "2": 0, "3": 1}, "value": 1 / 3}, by="m#1/tifa"),  # 1, 0, 0
        ]
        found = report("dsg", table)
        assert lines_of(found) == pytest.approx({"tifa160": 50.0, "whoops": 200 / 3, "Overall": 175 / 3})
        assert lines_of(found, "questions") == pytest.approx({"entity": 75.0, "attribute": 50.0})
        # The question evaluator's own aggregate has the dependencies in it already.
        final = scored(rows[3], {"atoms": {"1": 1, "2": 0, "3": 1}, "value": 2 / 3}, by="m#1/dsg")
        assert lines_of(report("dsg", [*table[:3], final]))["whoops"] == pytest.approx(100 * (1 + 2 / 3) / 2)
        soft = scored(rows[3], {"atoms": {"1": 0.5, "2": 0.25, "3": 0.75}, "value": 0.5}, by="m#1/soft_tifa_am")
        assert lines_of(report("dsg", [soft]))["whoops"] == pytest.approx(50.0)
        assert lines_of(report("dsg", [soft], scores={"score": "s.atoms"}))["whoops"] == pytest.approx(50.0)

    def test_dsg_without_some_answers(self):
        rows = self.dsg_rows()
        table = [scored(row, {"answers": [True, True, True]}) for row in rows[:3]]
        table.append(scored(rows[3], {"answers": [True, None, True]}))
        with pytest.raises(InputError, match="no_value 1"):
            report("dsg", table)
        assert lines_of(report("dsg", table, force=True))["whoops"] == 100.0
        table[3] = scored(rows[3], {"answers": [False, None, True]})  # the child of a no is a no
        assert report("dsg", table[3:], force=True).scored == 1
        table[3] = scored(rows[3], {"answers": [None, None, None]})
        assert report("dsg", table, force=True).missing == {"no_value": 1}

    def test_dsg_of_means_alone(self):
        rows = self.dsg_rows()
        found = report("dsg", [scored(row, 0.25 * n) for n, row in enumerate(rows)])
        assert lines_of(found) == pytest.approx({"tifa160": 12.5, "whoops": 62.5, "Overall": 37.5})
        with pytest.raises(InputError, match="unreadable 1"):
            report("dsg", [scored(rows[0], 7.0)])
        with pytest.raises(InputError, match="unreadable 1"):
            report("dsg", [scored(rows[0], {"atoms": {"1": 7}})])

    def test_dsg_strict(self):
        rows = self.dsg_rows()
        table = [scored(rows[0], {"answers": [True, True, True]}), scored(rows[2], "generation_failed")]
        found = report("dsg", table, force=True)
        assert lines_of(found)["Overall"] == 100.0
        assert strict_of(found) == {"tifa160": 100.0, "whoops": 0.0, "Overall": 50.0}
        assert strict_of(found, "questions") == {"attribute": 50.0, "entity": 50.0}
        assert lines_of(found)["whoops"] is None

    def test_dpg_and_its_own_programs_quirks(self, tmp_path):
        folder = TestLoaders().dpg(tmp_path / "dpg")
        first, second = load("dpg", folder)
        yes = [{"answers": {"1": "yes", "2": "no"}}, {"answers": {"1": "no", "2": "yes"}}]
        table = [scored(first, *yes), scored(second, {"answers": [True]}, {"answers": [True]})]
        found = report("dpg", table)
        assert lines_of(found) == {
            "Overall": pytest.approx((25 + 100) / 2),
            "entity": 50,
            "attribute": 0,
            "global": 100,
        }
        assert lines_of(found, "questions")["attribute - color"] == 0
        # The file's first row is not read there: the other question of its prompt presumes it, and the prompt goes.
        ella = report("dpg", table, compat="ella")
        assert lines_of(ella)["Overall"] == 100
        assert "left out, as the benchmark's own program does: 7" in ella.notes
        # Without that prompt no row is left out in its stead.
        assert lines_of(report("dpg", table[1:], compat="ella"))["Overall"] == 100
        assert report("dpg", table, compat="ella").lines[0].expected == 4
        zeroed = [scored(row, {"atoms": {"1": 1, "2": 1}}, by="m/dsg") for row in (first,)]
        assert lines_of(report("dpg", zeroed))["Overall"] == 100
        with pytest.raises(InputError, match="the aggregate tifa"):
            report("dpg", zeroed, compat="ella")
        with pytest.raises(InputError, match="not their mean"):
            report("dpg", [scored(first, 0.5)])
        with pytest.raises(InputError, match="probabilities"):
            report("dpg", [scored(first, {"atoms": {"1": 0.5, "2": 1}}, by="m/soft")])
        with pytest.raises(InputError, match="table of another format"):
            report("dpg", [scored(self.dsg_rows()[0], {"answers": [True, True, True]})])
        with pytest.raises(InputError, match="belongs to dpg"):
            report("dsg", table, compat="ella")

    def test_compbench(self):
        table = [
            scored(plain_row(1, "complex"), 0.5, 0.7),
            scored(plain_row(2, "color"), {"value": 0.25}),
            scored(plain_row(3, "color"), {"value": 0.75}),
            scored(plain_row(4, "new"), 1.0),
        ]
        found = report("t2i_compbench", table)
        assert list(lines_of(found).items()) == [("color", 0.5), ("complex", pytest.approx(0.6)), ("new", 1.0)]

    def test_parti(self):
        table = [
            scored(plain_row(1, "Arts", challenge="Basic"), 3.0),
            scored(plain_row(2, "Arts", challenge="Complex"), 5.0),
            scored(plain_row(3, "People", challenge="Basic"), "generation_failed"),
        ]
        found = report("parti", table, force=True)
        assert lines_of(found) == strict_of(found) == {"Overall": 4.0}
        assert lines_of(found, "category") == {"Arts": 4.0, "People": None}
        assert lines_of(found, "challenge") == {"Basic": 3.0, "Complex": 5.0}
        assert "no known worst value" in found.notes[-1]

    def test_longtext(self):
        english = [plain_row(n, "sign", text=text, language="en") for n, text in enumerate(["one two", "a b c d"])]
        chinese = plain_row("zh", "sign", text="你好吗", language="zh")
        table = [
            scored(english[0], {"found": 1, "wanted": 2}),
            scored(english[1], "A, b! x"),
            scored(chinese, {"reading": "好 你", "confidence": 0.5}),
        ]
        found = report("longtext", table)
        # Micro-averaged: (1 + 2) / (2 + 4), not the mean of 1/2 and 2/4 weighted alike.
        assert lines_of(found) == {"LongText-Bench EN": 0.5, "LongText-Bench ZH": pytest.approx(2 / 3)}
        assert lines_of(found, "category, EN") == {"sign": 0.5}
        table[1] = scored(english[1], "refused")
        strict = report("longtext", table, force=True)
        assert (lines_of(strict)["LongText-Bench EN"], strict_of(strict)["LongText-Bench EN"]) == (
            0.5,
            pytest.approx(1 / 6),
        )
        with pytest.raises(InputError, match="unreadable 1"):
            report("longtext", [scored(english[0], 0.5)])
        with pytest.raises(InputError, match="no_value 1"):
            report("longtext", [scored(english[0], {"reading": None})])

    def test_gedit(self):
        from dataflow.metrics.rubrics import GEDIT_GROUPS

        rows = [
            plain_row(f"{group}_{language}", group, language=language, intersection=group != "ps_human")
            for language in ("en", "cn")
            for group in GEDIT_GROUPS
        ]
        judged = {"success": 9, "overdone": 4, "natural": 9, "artifacts": 10, "value": 0.1}
        table = [scored(row, judged) for row in rows]
        table.append(scored({**rows[0], "prompt_id": "more"}, {**judged, "overdone": 9}))
        keys = {"semantic": "s.success,s.overdone", "quality": "s.natural, s.artifacts"}
        found = report("gedit", table, scores=keys)
        full = {line.name: line.values for line in found.lines if line.section == ""}
        assert full["ps_human"] == {"SC": 4, "PQ": 9, "O": 6}
        assert full["background_change"] == {"SC": 6.5, "PQ": 9, "O": 7.5}
        assert full["Average"]["O"] == pytest.approx((10 * 6 + 7.5) / 11)
        assert lines_of(found, "full set, CN")["Average"] == 6
        part = {line.name: line.values for line in found.lines if line.section == "intersection, EN"}
        assert "ps_human" not in part
        assert part["Average"]["O"] is None  # a group is missing: no average of the others
        own = [scored(row, {"semantic": [9, 4], "quality": 9}) for row in rows]
        assert lines_of(report("gedit", own))["Average"] == 6
        with pytest.raises(InputError, match="has the scores semantic, quality, not score"):
            report("gedit", own, scores={"score": "s"})
        with pytest.raises(InputError, match="unreadable 1"):
            report("gedit", [scored(rows[0], {"semantic": 11, "quality": 9})])
        with pytest.raises(InputError, match="not gedit's: group 'magic'"):
            report("gedit", [scored(plain_row(1, "magic", language="en"), {"semantic": 1, "quality": 9})])
        alone = [scored(row, {"semantic": 4, "quality": 9}) for row in rows if row["category"] == "ps_human"]
        assert [line.section for line in report("gedit", alone).lines] == [""] * 2 + ["full set, CN"] * 2

    def test_imgedit(self):
        judged = {"a": 5, "b": 4, "c": 3, "value": 0.75}
        table = [
            scored(plain_row(1, "add"), judged),
            scored(plain_row(2, "add"), {**judged, "c": 5, "b": 5}),
            scored(plain_row(3, "style"), {**judged, "a": 1, "b": 1, "c": 1}),
        ]
        found = report("imgedit", table, scores={"score": "s.a,s.b,s.c"})
        assert lines_of(found) == {"add": 4.5, "style": 1.0, "Overall": 2.75}
        # A rubric's value is on a scale of 0 to 1 and never taken for a score of 1 to 5.
        with pytest.raises(InputError, match="no_value 3"):
            report("imgedit", table)
        assert lines_of(report("imgedit", [scored(plain_row(1, "add"), 4.0)])) == {"add": 4.0, "Overall": 4.0}
        with pytest.raises(InputError, match="unreadable 3"):
            report("imgedit", table, scores={"score": "s.a,s.b"})
        failed = report(
            "imgedit",
            [*table[:2], scored(plain_row(4, "add"), "generation_failed")],
            force=True,
            scores={"score": "s.a,s.b,s.c"},
        )
        assert strict_of(failed)["add"] == pytest.approx((4 + 5 + 1) / 3)

    def test_which_column(self):
        table = [scored(scored(plain_row(1, "colors"), True), 0.5, key="t")]
        with pytest.raises(InputError, match="one of s, t"):
            report("geneval", table)
        assert report("geneval", table, scores={"score": "s"}).scored == 1
        with pytest.raises(InputError, match="has the evaluator run"):
            report("geneval", [plain_row(1, "colors")])
        two = [scored(scored(plain_row(1, "colors"), 5), 5, 5, key="t")]
        with pytest.raises(InputError, match="different numbers of pictures"):
            report("gedit", two, scores={"semantic": "s", "quality": "t"})

    def test_rows_that_are_none_and_repeated_ones(self):
        good = [scored(plain_row(n % 150, "colors"), True) for n in range(151)]
        found = report("geneval", [*good, BadRow(raw="{", error="broken")])
        assert found.missing == {"bad_row": 1}
        assert "1 rows repeat a prompt" in found.notes
        with pytest.raises(InputError, match="the table has no rows"):
            report("geneval", [])
        with pytest.raises(InputError, match="there is no benchmark"):
            report("drawbench", [])
        with pytest.raises(InputError, match="unreadable 1"):
            report("geneval", [scored(plain_row(1, "colors"), 0.5)])
        with pytest.raises(InputError, match="not geneval's: tag"):
            report("geneval", [scored(plain_row(1, "magic"), True)])
