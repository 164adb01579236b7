"""What stands in a report's files: every row and picture once, sums that add up, nothing half-written."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image
from tests.report.made_runs import HOSTILE, QUIET, PaidPainter, make_run, rows_of, summary_of

from dataflow.commands.report import report as report_command
from dataflow.commands.report_options import add_report
from dataflow.errors import CacheBusyError, ConfigError, InputError, StepError
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, ScoreFilter, Text2ImageGenerator
from dataflow.report import ReportOptions, write_report
from dataflow.report.columns import Column
from dataflow.report.scripts import call, payload
from dataflow.report.thumbnails import Look, Makers, thumbnail
from dataflow.runtime.lock import cache_lock
from dataflow.utils.storage import FileStorage

# What was written


def scripts(report: Path, kind: str) -> list:
    """All values of one kind of script, in order."""
    folder = report / kind
    paths = sorted(folder.glob("*.js"), key=lambda path: int(path.stem))
    return [value for path in paths for value in payload(path.read_text(encoding="ascii"))]


def columns(report: Path) -> dict:
    found = {}
    for column in summary_of(report)["columns"]:
        data = payload((report / "data" / "columns" / f"{column['id']}.js").read_text(encoding="ascii"))
        if isinstance(data, dict):
            data = [None if code < 0 else data["values"][code] for code in data["codes"]]
        found[column["kind"], column["name"]] = data
    return found


def test_every_row_and_picture_is_counted_once(finished, tmp_path):
    made = write_report([finished], tmp_path / "report")
    run = summary_of(made.page.parent)["runs"][0]
    steps = [json.loads((path / "summary.json").read_text()) for path in sorted((finished / "journal").iterdir())]
    losses = {(step, state, reason): count for step, state, reason, count in run["losses"]}
    assert run["rows"] == steps[0]["rows"] == 26
    assert run["kept"] + sum(losses.values()) == run["rows"]
    assert run["unaccounted"] == run["pending"] == 0
    for status in ("refused", "failed"):
        assert sum(count for key, count in losses.items() if key[:2] == (1, status)) == steps[0][status]
    # The filter dropped rows that had never got a picture, too: those are lost where they were lost first.
    dropped = sum(count for key, count in losses.items() if key[:2] == (3, "dropped"))
    assert dropped == steps[2]["dropped"] - steps[2]["reasons"]["no_image"]
    pictures = run["pictures"]
    assert dict(pictures["made"]) == {1: steps[0]["images"], 4: steps[3]["images"]}
    lost = sum(each[-1] for each in pictures["losses"])
    assert pictures["kept"] + lost == made.pictures == steps[0]["images"] + steps[3]["images"]
    assert made.unreadable == 0
    assert made.problems == sum(1 for each in scripts(made.page.parent / "data", "details") if each["path"] is None)


def test_what_became_of_each_picture_is_what_the_tables_say(finished, tmp_path):
    target = write_report([finished], tmp_path / "report").page.parent
    details = scripts(target / "data", "details")
    last = rows_of(finished / "dataflow_cache_step_step4.jsonl")
    kept = {path for row in last for path in row["images"]}
    turns = {path for row in last for sample in row.get("edited_images_turns", []) for path in sample}
    found = {each["path"]: each for each in details if each["path"]}
    assert len(found) == sum(each["path"] is not None for each in details)
    lacking = {row["images"][0] for row in last if "edited_images_error" in row}
    assert {path for path, each in found.items() if each["state"] == "kept"} == (kept | turns) - lacking
    assert {path for path, each in found.items() if each["state"] == "incomplete"} == lacking
    for each in found.values():
        if each["state"] == "not_chosen":
            assert each["step"] == "3 ScoreFilter"
            score = each["scores"][0][1]["value"]
            assert ("less than 0.3" in each["message"]) == (score < 0.3)
    store = ImageIO(finished.parent / "images")
    for path in [*kept, *turns]:
        facts = store.read_metadata(path)
        assert found[path]["file"]["seed"] == str(facts["seed"])
        assert found[path]["file"]["model"] == "painter-2"
        assert found[path]["command"] == f"dataflow replay {facts['request_id']} --cache {finished}"
        assert found[path]["usd"] == 0.04
        assert (target / found[path]["link"]).resolve() == Path(path)
        origins = found[path]["from"]
        assert [origin[2] for origin in origins] == facts.get("images", [])
        for at, link, origin in origins:
            assert details[at]["path"] == origin
            assert (target / link).resolve() == Path(origin)


def test_failures_are_entries_with_their_reason(finished, tmp_path):
    target = write_report([finished], tmp_path / "report").page.parent
    without = [each for each in scripts(target / "data", "details") if each["path"] is None]
    told = {(each["state"], each["step"], each["reason"]) for each in without}
    assert told == {
        ("refused", "1 Text2ImageGenerator", "refused"),
        ("failed", "1 Text2ImageGenerator", "not_an_image"),
        ("failed", "1 Text2ImageGenerator", "bad_input"),
        ("failed", "1 Text2ImageGenerator", "bad_row"),
        ("failed", "4 PromptedImageEditGenerator", "previous_turn"),
    }
    broken = next(each for each in without if each["reason"] == "bad_row")
    assert broken["cells"]["raw"] == '{"prompt": "broken'
    problems = {(each["kind"], each["reason"]): each for each in summary_of(target)["problems"]}
    assert problems["unscored", "judge: parse_error"]["count"] == 3
    assert problems["unscored", "judge: parse_error"]["messages"] == [
        "parse_error: the judge said nothing that can be read"
    ]


def test_columns_hold_what_the_tables_hold(finished, tmp_path):
    target = write_report([finished], tmp_path / "report").page.parent
    details, found = scripts(target / "data", "details"), columns(target)
    assert all(len(column) == len(details) for column in found.values())
    for at, each in enumerate(details):
        scored = each["scores"][0][1] if each["scores"] and each["scores"][0][2] == "ok" else None
        assert found["score", "judge.value"][at] == (scored and pytest.approx(scored["value"], rel=1e-5))
        assert found["picture", "state"][at] == each["state"]
        assert found["system", "prompt"][at] == (each["prompt"] or None)
    chart = next(each for each in summary_of(target)["charts"] if each["name"] == "judge.value")
    assert sum(map(sum, chart["counts"].values())) == sum(v is not None for v in found["score", "judge.value"])
    below = [count for edge, count in zip(chart["edges"][1:], chart["counts"]["0:kept"], strict=True) if edge <= 0.3]
    assert not any(below)
    assert summary_of(target)["runs"][0]["steps"][2]["thresholds"] == {
        "score": "judge.value",
        "minimum": 0.3,
        "top_k": 1,
    }


def test_scripts_are_ascii_in_which_no_text_is_markup(finished, tmp_path):
    target = write_report(
        [finished], tmp_path / "report", ReportOptions(title='"><script>alert(1)</script>')
    ).page.parent
    prompts = {each["prompt"] for each in scripts(target / "data", "details")}
    assert set(HOSTILE) <= prompts  # half a pair of letters failed, and is told as it was written
    for path in target.rglob("*.js"):
        if "assets" not in path.parts:
            text = path.read_bytes()
            assert text.isascii()
            assert b"<" not in text
    page = (target / "index.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page


def test_values_come_back_from_scripts():
    value = {"a": ["</script>", "\u2028", "\ud83d", "狐", None, 1.5, "'\"\\"]}
    assert payload(call("x", value)) == value
    with pytest.raises(ValueError, match="no script"):
        payload("alert(1)")


def test_the_page_is_small_and_loads_nothing_from_elsewhere(finished, tmp_path):
    made = write_report([finished], tmp_path / "report")
    page = made.page.read_text()
    assert made.page_bytes < 500_000
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "module" not in page


def test_libraries_are_as_they_were_distributed():
    vendor = resources.files("dataflow.report") / "static" / "vendor"
    manifest = json.loads((vendor / "manifest.json").read_text())
    named = {"manifest.json"}
    for library in manifest["libraries"]:
        assert library["licence"] in ("MIT", "Apache-2.0", "BSD-3-Clause", "ISC")
        assert library["version"]
        assert (vendor / library["licence_file"]).read_text().strip()
        named.add(library["licence_file"])
        for file in library["files"]:
            assert hashlib.sha256((vendor / file["path"]).read_bytes()).hexdigest() == file["sha256"]
            named.add(file["path"])
    with resources.as_file(vendor) as folder:
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == named


# Other folders


def test_a_folder_that_a_script_wrote(finished, run_copy, tmp_path):
    (run_copy / "job.toml").unlink()
    target = write_report([run_copy], tmp_path / "plain").page.parent
    run = summary_of(target)["runs"][0]
    with_file = summary_of(write_report([finished], tmp_path / "full").page.parent)["runs"][0]
    # Why a filter did not choose a picture stands in the pipeline file alone.
    reasons = [each for each in run["pictures"]["losses"] if each[1] == "not_chosen"]
    assert [each[:3] for each in reasons] == [[3, "not_chosen", "not_chosen"]]
    assert run["losses"] == with_file["losses"]
    assert (run["rows"], run["kept"]) == (with_file["rows"], with_file["kept"])
    assert run["steps"][2]["thresholds"] == {}
    assert not any(each["command"] for each in scripts(target / "data", "details"))


def test_rows_that_have_not_gone_through_later_steps_are_told(run_copy, tmp_path):
    summary = run_copy / "journal" / "dataflow_cache_step_step1" / "summary.json"
    facts = json.loads(summary.read_text())
    summary.write_text(json.dumps({**facts, "rows": facts["rows"] + 7}))
    run = summary_of(write_report([run_copy], tmp_path / "report").page.parent)["runs"][0]
    assert run["unaccounted"] == 7


def test_a_folder_that_was_moved_finds_its_pictures(run_copy, finished, tmp_path):
    hidden = finished.parent.with_name("hidden")
    finished.parent.rename(hidden)  # the rows name the old place, where nothing is any more
    try:
        made = write_report([run_copy], tmp_path / "report")
    finally:
        hidden.rename(finished.parent)
    assert made.unreadable == 0
    details = scripts(made.page.parent / "data", "details")
    assert all(
        run_copy.parent in (made.page.parent / each["link"]).resolve().parents for each in details if each["link"]
    )
    assert all(origin[0] is not None for each in details for origin in each["from"])


def test_pictures_that_cannot_be_read_say_why(run_copy, tmp_path):
    table = run_copy / "dataflow_cache_step_step4.jsonl"
    kept = [Path(row["images"][0]).name for row in rows_of(table)]
    images = run_copy.parent / "images"
    half, gone, text = (next(images.rglob(name)) for name in kept[:3])
    sources = {path: path.read_bytes() for path in (half, gone, text)}
    # A copied folder's rows name the original's pictures, which stand in for its own.
    originals = [Path(row["images"][0]) for row in rows_of(table)[:3]]
    half_original, gone_original, text_original = originals
    for path in (half, half_original):
        path.write_bytes(sources[half][:200])
    for path in (gone, gone_original):
        path.unlink()
    for path in (text, text_original):
        path.write_bytes(b"<html>")
    try:
        made = write_report([run_copy], tmp_path / "report")
        found = {
            Path(each["path"]).name: each for each in scripts(made.page.parent / "data", "details") if each["path"]
        }
        told = [found[name]["problem"][0] for name in kept[:3]]
        assert told == ["truncated", "missing", "not_an_image"]
        assert made.unreadable == 3
        assert found[kept[1]]["link"] is None
        assert {
            each["reason"] for each in summary_of(made.page.parent)["problems"] if each["kind"] == "unreadable"
        } == {*told}
    finally:
        for path, original in zip((half, gone, text), originals, strict=True):
            original.write_bytes(sources[path])


def test_a_run_that_was_stopped_tells_what_is_pending(tmp_path):
    cache = make_run(tmp_path / "run", count=4, edits=False)
    journal = cache / "journal" / "dataflow_cache_step_step4"
    io = ImageIO(tmp_path / "run" / "images", durable=False)
    storage = FileStorage(str(tmp_path / "run" / "in.jsonl"), cache_path=str(cache))
    for _ in range(4):
        storage.step()
    painter = PaidPainter(io, size=(32, 32), script={"make it blue 1": "fatal", "uneditable": "refuse"})
    with pytest.raises(Exception, match="key is not valid"):
        PromptedImageEditGenerator(painter, options=QUIET).run(storage, "images", "edits")
    (journal / "summary.json").unlink(missing_ok=True)
    target = write_report([cache], tmp_path / "report").page.parent
    run = summary_of(target)["runs"][0]
    assert not run["finished"]
    assert run["kept"] == 0
    assert run["pending"] + sum(each[-1] for each in run["losses"]) == run["rows"]
    assert run["unaccounted"] == 0
    waiting = [each for each in scripts(target / "data", "details") if each["state"] == "waiting"]
    assert waiting
    assert all(each["made"] == "4 PromptedImageEditGenerator" and each["link"] for each in waiting)


def test_steps_that_no_run_has_reached_are_shown(run_copy, tmp_path):
    shutil.rmtree(run_copy / "journal" / "dataflow_cache_step_step4")
    (run_copy / "dataflow_cache_step_step4.jsonl").unlink()
    run = summary_of(write_report([run_copy], tmp_path / "report").page.parent)["runs"][0]
    assert [step["begun"] for step in run["steps"]] == [True, True, True, False]
    assert not run["finished"]
    assert run["pending"] == run["so_far"] > 0


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_tables_of_every_format(kind, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"star {n}"}) + "\n" for n in range(3)))
    storage = FileStorage(str(tmp_path / "in.jsonl"), cache_path=str(tmp_path / "cache"), cache_type=kind)
    painter = PaidPainter(ImageIO(tmp_path / "images", durable=False), size=(16, 16))
    Text2ImageGenerator(painter, options=QUIET).run(storage.step(), "prompt", "images")
    made = write_report([tmp_path / "cache"], tmp_path / "report")
    assert (made.pictures, made.problems) == (3, 0)


def test_pictures_of_the_users_own_that_were_only_filtered(tmp_path):
    rows = []
    for number in range(6):
        path = tmp_path / f"photo {number}.png"
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(path)
        rows.append({"caption": f"photo {number}", "images": str(path), "mark": number, "mark_status": "ok"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage = FileStorage(str(tmp_path / "in.jsonl"), cache_path=str(tmp_path / "cache"))
    ScoreFilter(options=QUIET).run(storage.step(), input_score_key="mark", minimum=4)
    target = write_report([tmp_path / "cache"], tmp_path / "report").page.parent
    details = scripts(target / "data", "details")
    assert sorted((each["prompt"], each["state"]) for each in details) == [
        (f"photo {number}", "kept" if number >= 4 else "dropped") for number in range(6)
    ]
    assert all((target / each["link"].replace("%20", " ")).is_file() for each in details)
    assert all(each["command"] is None for each in details)


def test_edits_of_the_users_own_pictures_show_them_as_sources(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "source.png")
    row = {"conversations": "make it blue", "images": [str(tmp_path / "source.png")], "edited_images": [""]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    storage = FileStorage(str(tmp_path / "in.jsonl"), cache_path=str(tmp_path / "cache"))
    painter = PaidPainter(ImageIO(tmp_path / "images", durable=False), size=(16, 16))
    PromptedImageEditGenerator(painter, options=QUIET).run(storage.step())
    target = write_report([tmp_path / "cache"], tmp_path / "report").page.parent
    (entry,) = scripts(target / "data", "details")
    ((at, link, path),) = entry["from"]
    assert (at, path) == (None, str(tmp_path / "source.png"))
    assert (target / link).resolve() == tmp_path / "source.png"


def test_several_runs_share_their_prompts(finished, tmp_path):
    other = make_run(tmp_path / "other", model="painter-3", count=5)
    target = write_report([finished, other], tmp_path / "report").page.parent
    found = columns(target)
    groups: dict[str, set] = {}
    for prompt, group in zip(found["system", "prompt"], found["system", "group"], strict=True):
        groups.setdefault(prompt, set()).add(group)
    assert all(len(numbers) == 1 for prompt, numbers in groups.items() if prompt)
    assert [run["name"] for run in summary_of(target)["runs"]] == [finished.parent.name, "other"]


# The folder of the report


def test_thumbnails_are_taken_over_until_their_file_changes(run_copy, tmp_path):
    first = write_report([run_copy], tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report" / "thumbs").iterdir()}
    again = write_report([run_copy], tmp_path / "report")
    assert (first.reused, again.reused) == (0, first.pictures)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report" / "thumbs").iterdir()} == before
    changed = next((run_copy.parent / "images").rglob("*.png"))
    os.utime(changed, (1, 1))
    os.utime(rows_path(run_copy, changed.name), (1, 1))
    assert write_report([run_copy], tmp_path / "report").reused == first.pictures - 1
    assert write_report([run_copy], tmp_path / "report", ReportOptions(thumbnail_size=64)).reused == 0


def rows_path(cache: Path, name: str) -> Path:
    """Where the rows say that a picture is: a copied folder has the old place written down."""
    text = (cache / "dataflow_cache_step_step1.jsonl").read_text() + (
        cache / "dataflow_cache_step_step4.jsonl"
    ).read_text()
    end = text.index(name) + len(name)
    return Path(text[text.rindex('"', 0, end) + 1 : end])


KILLED = """
import sys
from dataflow.report import workshop, write_report
real, count = workshop.Workshop._finish, [0]
def slow(self, *arguments):
    found = real(self, *arguments)
    count[0] += 1
    if count[0] == 3:
        print("three", flush=True)
        import time; time.sleep(60)
    return found
workshop.Workshop._finish = slow
write_report([sys.argv[1]], sys.argv[2])
"""


def test_a_report_that_is_killed_is_not_there_and_its_work_is_not_lost(finished, tmp_path):
    target = tmp_path / "report"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(finished), str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"three\n"
        with pytest.raises(CacheBusyError):
            write_report([finished], target)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    made = write_report([finished], target)
    assert made.reused >= 2 * 16
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_leftovers_without_thumbnails_are_swept(finished, tmp_path):
    (tmp_path / ".report.unfinished" / "data").mkdir(parents=True)
    write_report([finished], tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_stands_there_is_kept_when_the_new_one_fails(run_copy, tmp_path):
    target = tmp_path / "report"
    write_report([run_copy], target)
    page = (target / "index.html").stat().st_mtime_ns
    (run_copy / "dataflow_cache_step_step4.jsonl").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match="gzip"):
        write_report([run_copy], target)
    assert (target / "index.html").stat().st_mtime_ns == page


def test_other_things_are_never_replaced(finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="no report"):
        write_report([finished], tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        write_report([finished], tmp_path / "mine" / "diary.txt")
    (tmp_path / "empty").mkdir()
    assert write_report([finished], tmp_path / "empty").page.is_file()


def test_folders_that_are_no_runs(finished, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_report([tmp_path / "missing"], tmp_path / "report")
    with pytest.raises(InputError, match="holds no step"):
        write_report([tmp_path], tmp_path / "report")
    with pytest.raises(InputError, match="twice"):
        write_report([finished, finished / "." / "journal" / ".."], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_place_that_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StepError, match="cannot be written"):
        write_report([finished], tmp_path / "file" / "report")


def test_a_place_that_cannot_be_taken_leaves_the_old_report(finished, tmp_path, monkeypatch):
    write_report([finished], tmp_path / "report")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".unfinished"):
            raise OSError(13, "in use")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StepError, match="in use"):
        write_report([finished], tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()


def test_two_writers_of_one_report(finished, tmp_path):
    with cache_lock(tmp_path / ".report.unfinished"), pytest.raises(CacheBusyError):
        write_report([finished], tmp_path / "report")


@pytest.mark.parametrize(
    "wrong", [{"thumbnail_size": 8}, {"thumbnail_quality": 0}, {"workers": -1}, {"text_limit": True}]
)
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ReportOptions(**wrong)


# Parts


def test_processes_make_the_same_thumbnails_and_survive_a_killed_one(tmp_path):
    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((300, 200), 50 + number).convert("RGB").save(path)
        paths.append(path)
    look = Look(64, 80)
    makers = Makers(look, 2)
    try:
        assert makers.submit(paths[:3]).result() == [thumbnail(path, look) for path in paths[:3]]
        for process in list(makers._running):
            process.kill()
            process.wait()
        again = makers.submit(paths[3:]).result()
        assert [made.problem and made.problem[0] for made in again] in ([None] * 3, ["killed_reader"] * 3)
        assert [made.problem for made in makers.submit(paths[3:]).result()] == [None] * 3
    finally:
        makers.close()


def test_a_picture_that_kills_its_reader_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflow.report.thumbnails._CHILD", (sys.executable, "-c", "import os; os._exit(9)"))
    makers = Makers(Look(64, 80), 1)
    try:
        made = makers.submit([tmp_path / "a.png", tmp_path / "b.png"]).result()
    finally:
        makers.close()
    assert [each.problem and each.problem[0] for each in made] == ["killed_reader"] * 2


def test_a_column_of_numbers_and_texts_is_one_of_texts():
    column = Column("row", "mixed")
    for at, value in ((0, 1.5), (2, "one"), (3, None), (4, True), (5, 10**400)):
        column.put(at, value)
    column.fill(7)
    facts, data = column.finished()
    assert facts["type"] == "category"
    texts = [None if code < 0 else data["values"][code] for code in data["codes"]]
    assert texts == ["1.5", None, "one", None, "1", None, None]


def test_a_column_of_yes_and_no():
    column = Column("row", "sure")
    for at, value in enumerate((True, False, None, True)):
        column.put(at, value)
    facts, data = column.finished()
    assert facts["counts"] == {"no": 1, "yes": 2}
    assert data["codes"] == [1, 0, -1, 1]


# The command


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser()
    commands = top.add_subparsers(dest="command")
    add_report(
        lambda name, summary, description, examples, usage=None: commands.add_parser(
            name, usage=usage, help=summary, description=description, epilog=examples
        )
    )
    return top


def test_the_command_says_what_it_wrote(finished, tmp_path, capsys):
    args = parser().parse_args(
        ["report", str(finished), "-o", str(tmp_path / "out"), "--title", "Foxes", "--workers", "1"]
    )
    args.quiet = False
    assert report_command(args) == 0
    out = capsys.readouterr().out
    assert "pictures" in out
    assert str(tmp_path / "out" / "index.html") in out
    assert summary_of(tmp_path / "out")["title"] == "Foxes"


def test_the_command_writes_into_the_folder_of_the_run(run_copy, capsys):
    args = parser().parse_args(["report", str(run_copy)])
    args.quiet = True
    started = time.time()
    assert report_command(args) == 0
    assert (run_copy / "report" / "index.html").stat().st_mtime >= started - 1
    assert capsys.readouterr().out.startswith("open: ")
