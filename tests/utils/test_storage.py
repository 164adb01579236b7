import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest

from dataflow.errors import ConfigError, InputError, StepError
from dataflow.types import BadRow
from dataflow.utils import storage as storage_module
from dataflow.utils.storage import FileStorage, TableWriter

ROWS = [
    {"conversations": [{"content": "a fox", "role": "user"}], "images": [""]},
    {"conversations": [{"content": "a kite", "role": "user"}], "images": [""]},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    return path


@pytest.fixture
def storage(source, tmp_path):
    return FileStorage(str(source), str(tmp_path / "cache"))


def leftovers(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".tmp"))


# Steps --------------------------------------------------------------------------------------------------------------


def test_the_specification_constructs_a_storage():
    storage = FileStorage(
        first_entry_file_name="your path",
        cache_path="./cache_local",
        file_name_prefix="dataflow_cache_step",
        cache_type="jsonl",
    )
    assert storage.cache_path == "./cache_local"
    assert storage.operator_step == -1
    assert not Path("./cache_local").exists()


def test_steps_read_what_the_step_before_wrote(storage, source, tmp_path):
    assert storage.step() is storage
    assert storage.input_path == source
    assert storage.output_path == tmp_path / "cache/dataflow_cache_step_step1.jsonl"
    assert storage.step_name == "dataflow_cache_step_step1"
    assert storage.dropped_path == tmp_path / "cache/dataflow_cache_step_step1.dropped.jsonl"
    assert storage.write([{"a": 1}]) == str(storage.output_path)
    storage.step()
    assert storage.input_path == tmp_path / "cache/dataflow_cache_step_step1.jsonl"
    assert storage.output_path == tmp_path / "cache/dataflow_cache_step_step2.jsonl"
    assert storage.read("dict") == [{"a": 1}]
    assert storage.reset().operator_step == -1
    assert storage.step().read("dict") == ROWS


def test_nothing_can_be_read_or_written_before_the_first_step(storage):
    for call in (
        storage.iter_rows,
        storage.count_rows,
        storage.read,
        storage.open_writer,
        storage.input_signature,
        lambda: storage.write([]),
        lambda: storage.input_path,
        lambda: storage.output_path,
        lambda: storage.step_name,
        lambda: storage.dropped_path,
    ):
        with pytest.raises(StepError, match=r"storage\.step\(\)"):
            call()


def test_a_storage_pickles_and_shows_itself(storage):
    copy = pickle.loads(pickle.dumps(storage.step()))
    assert copy.read("dict") == ROWS
    assert repr(copy) == repr(storage)
    assert "step=0" in repr(copy)


def test_an_unknown_cache_type_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="'xlsx'; choose one of jsonl, json, csv, parquet, pickle"):
        FileStorage("a.jsonl", cache_type="xlsx")  # pyright: ignore


def test_pickles_are_read_and_written_only_when_allowed_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"runs whatever code.*allow_pickle=True"):
        FileStorage("a.jsonl", cache_type="pickle")
    source = tmp_path / "t.pkl"
    source.write_bytes(pickle.dumps(ROWS))
    with pytest.raises(ConfigError, match=r"t\.pkl is a pickle; .*allow_pickle=True"):
        FileStorage(str(source)).step().iter_rows()
    allowed = FileStorage(str(source), str(tmp_path / "cache"), cache_type="pickle", allow_pickle=True)
    assert allowed.step().read("dict") == ROWS
    assert allowed.write(ROWS).endswith("_step1.pickle")
    assert allowed.step().read("dict") == ROWS


@pytest.mark.parametrize("cache_type", ["jsonl", "json", "csv", "parquet"])
def test_a_step_of_any_format_gives_back_lists_and_dicts(source, tmp_path, cache_type):
    storage = FileStorage(str(source), str(tmp_path / "cache"), "run", cache_type)
    for _ in range(3):
        storage.step().write(storage.iter_rows())
    assert storage.step().read("dict") == ROWS
    assert storage.count_rows() in (2, None)
    assert sorted(os.listdir(tmp_path / "cache")) == [f"run_step{number}.{cache_type}" for number in (1, 2, 3)]


@pytest.mark.parametrize("cache_type", ["jsonl", "json", "csv", "parquet", "pickle"])
def test_an_empty_table_can_be_written_and_read(source, tmp_path, cache_type):
    storage = FileStorage(str(source), str(tmp_path), cache_type=cache_type, allow_pickle=True).step()
    storage.write([])
    assert storage.step().read("dict") == []
    assert storage.read().empty
    assert storage.count_rows() in (0, None)


def test_relative_paths_follow_the_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = FileStorage("prompts.jsonl", "cache").step()
    assert storage.write(storage.iter_rows()) == "cache/dataflow_cache_step_step1.jsonl"
    assert (tmp_path / "cache/dataflow_cache_step_step1.jsonl").exists()


def test_the_users_table_may_lie_in_the_home_folder(source, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    assert FileStorage("~/prompts.jsonl").step().count_rows() == 2


# Reading ------------------------------------------------------------------------------------------------------------


def test_rows_and_bad_rows_stream_in_order(storage, source):
    source.write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    first, bad, last = storage.step().iter_rows()
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, BadRow)
    assert storage.count_rows() == 3


def test_reading_at_once_refuses_a_broken_row_by_file_and_number(storage, source):
    source.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(InputError, match=r"prompts\.jsonl, row 2: line 3, column 7"):
        storage.step().read("dict")


def test_a_missing_file_is_named_and_a_missing_step_explained(tmp_path):
    storage = FileStorage(str(tmp_path / "no.jsonl"), str(tmp_path)).step()
    for call in (storage.iter_rows, storage.count_rows, storage.input_signature, storage.read):
        with pytest.raises(InputError, match=r"no\.jsonl: no such file"):
            call()
    with pytest.raises(InputError, match=r"step1\.jsonl: the step before has not finished"):
        storage.step().iter_rows()


@pytest.mark.parametrize("name", ["t.txt", "t", "t.jsonl.gz", "your path"])
def test_an_unknown_suffix_is_refused_with_the_choices(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"unknown table format .*\.jsonl, \.json, \.csv"):
        FileStorage(str(tmp_path / name)).step().iter_rows()


def test_suffixes_may_be_in_capitals(tmp_path):
    (tmp_path / "T.JSONL").write_text("{}\n")
    assert FileStorage(str(tmp_path / "T.JSONL")).step().read("dict") == [{}]


def test_a_folder_or_an_impossible_name_is_refused(tmp_path):
    (tmp_path / "t.jsonl").mkdir()
    for name in (tmp_path / "t.jsonl", tmp_path / "t.jsonl/u.jsonl", tmp_path / ("x" * 300 + ".jsonl"), "nul\0.jsonl"):
        with pytest.raises(InputError):
            FileStorage(str(name)).step().iter_rows()
    (tmp_path / "u.jsonl").symlink_to("u.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        FileStorage(str(tmp_path / "u.jsonl")).step().iter_rows()


def test_a_file_that_vanishes_or_is_forbidden_meanwhile_is_an_input_error(storage, source, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    rows, storage = storage.step().iter_rows(), storage
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(InputError, match=r"prompts\.jsonl: cannot be read: Permission denied"):
        next(rows)
    with pytest.raises(InputError, match="Permission denied"):
        storage.count_rows()


def test_the_signature_of_the_input_changes_with_the_file(storage, source):
    before = storage.step().input_signature()
    assert before == storage.input_signature()
    assert before["size"] == source.stat().st_size
    os.utime(source, ns=(0, before["mtime_ns"] + 1))
    assert storage.input_signature()["mtime_ns"] == before["mtime_ns"] + 1


def test_a_dataframe_holds_the_values_as_they_are(storage, source):
    rows = [
        {"prompt": "0001", "n": 1, "score": 0.1234567890123456, "ok": True, "maybe": 1, "images": ["a"], "none": None},
        {
            "prompt": "1984",
            "n": 2**62,
            "score": 2.0,
            "ok": False,
            "maybe": None,
            "images": [],
            "none": None,
            "late": "x",
        },
    ]
    storage.step().write(rows)
    frame = storage.step().read()
    assert frame["prompt"].tolist() == ["0001", "1984"]
    assert frame["maybe"].tolist() == [1, None]
    assert type(frame["maybe"][0]) is int
    assert frame["images"].tolist() == [["a"], []]
    assert frame["none"].tolist() == [None, None]
    assert pd.isna(frame["late"][0])
    assert frame.dtypes[["n", "score", "ok"]].astype(str).tolist() == ["int64", "float64", "bool"]
    assert frame["n"].sum() == 2**62 + 1


def test_integers_beyond_64_bits_stay_whole_in_a_dataframe(storage):
    storage.step().write([{"n": 2**70}, {"n": 1}])
    assert storage.step().read("dataframe")["n"].tolist() == [2**70, 1]


def test_a_dataframe_of_many_rows_comes_with_a_warning(storage, monkeypatch):
    monkeypatch.setattr(storage_module, "_MANY_ROWS", 1)
    with pytest.warns(UserWarning, match=r"iter_rows"):
        storage.step().read()
    assert len(storage.read("dict")) == 2


def test_another_output_type_is_refused_with_the_choices(storage):
    with pytest.raises(ConfigError, match="'arrow'; choose 'dataframe' or 'dict'"):
        storage.step().read("arrow")


def test_a_relative_path_is_tried_from_the_working_directory_then_beside_the_table(storage, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "both.png").touch()
    (elsewhere / "both.png").touch()
    (tmp_path / "beside.png").touch()
    assert storage.resolve("./both.png") == elsewhere / "both.png"
    assert storage.resolve("./beside.png") == tmp_path / "beside.png"
    assert storage.resolve("missing.png") == elsewhere / "missing.png"
    assert storage.resolve(str(tmp_path / "both.png")) == tmp_path / "both.png"
    assert storage.resolve("nul\0.png") == elsewhere / "nul\0.png"
    assert storage.resolve("x" * 5000) == elsewhere / ("x" * 5000)


def test_paths_beside_a_table_named_relatively_are_absolute(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "beside.png").touch()
    storage = FileStorage(f"{tmp_path.name}/prompts.jsonl")
    assert storage.resolve("beside.png") == tmp_path / "beside.png"


# Writing ------------------------------------------------------------------------------------------------------------


def test_a_dataframe_is_written_as_plain_rows_with_null_for_what_is_missing(storage):
    frame = pd.DataFrame(
        {
            "text": ["0001", None],
            "int": [1, 2],
            "float": [0.1, np.nan],
            "when": [pd.Timestamp("2026-11-22"), pd.NaT],
            "nullable": pd.array([1, None], dtype="Int64"),
            "list": [["a"], np.array(["b"])],
            "nested": [{"a": np.float64(0.5)}, None],
        }
    )
    storage.step().write(frame)
    assert storage.step().read("dict") == [
        {
            "text": "0001",
            "int": 1,
            "float": 0.1,
            "when": "2026-11-22T00:00:00",
            "nullable": 1,
            "list": ["a"],
            "nested": {"a": 0.5},
        },
        {"text": None, "int": 2, "float": None, "when": None, "nullable": None, "list": ["b"], "nested": None},
    ]


def test_reading_a_dataframe_and_writing_it_keeps_the_rows(storage):
    storage.step().write(storage.read("dataframe"))
    assert storage.step().read("dict") == ROWS


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (None, "takes a list of dicts or a DataFrame, not NoneType"),
        ("text", "not str"),
        ({"a": 1}, "not dict"),
        ([{"a": 1}, ["b"]], "row 2: expected a dict, found list"),
        ([{"a": 1}, {"a": {1}}], "row 2, column 'a': a value of type set"),
        ([{1: 1}], "row 1: the key 1 is of type int"),
        ([{"__dataflow__": 1}], "row 1, column '__dataflow__': this column name is reserved"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "several columns named 'a'"),
        (pd.DataFrame([[1]]), "the key 0 is of type int"),
    ],
)
def test_data_that_is_no_table_is_refused_and_leaves_the_old_one(storage, data, error):
    storage.step().write(ROWS)
    with pytest.raises(InputError, match=error):
        storage.write(data)
    assert leftovers(storage.cache_path) == []
    assert storage.step().read("dict") == ROWS


def test_a_writer_goes_on_after_a_row_that_it_refused(storage):
    with storage.step().open_writer() as writer:
        writer.write({"a": 1})
        with pytest.raises(InputError, match="row 2"):
            writer.write({"a": object()})
        writer.write({"a": 2})
        assert writer.rows == 2
    assert storage.step().read("dict") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("cache_type", ["jsonl", "json", "csv", "parquet", "pickle"])
def test_a_table_appears_only_when_the_block_ends_and_never_when_it_raises(source, tmp_path, cache_type):
    storage = FileStorage(str(source), str(tmp_path / "c"), cache_type=cache_type, allow_pickle=True).step()
    with storage.open_writer() as writer:
        writer.write({"a": "old"})
        assert not storage.output_path.exists()
    old = storage.output_path.read_bytes()

    def interrupted():
        yield {"a": "new"}
        assert storage.output_path.read_bytes() == old
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write(interrupted())
    assert storage.output_path.read_bytes() == old
    assert os.listdir(tmp_path / "c") == [storage.output_path.name]


def test_a_new_table_has_the_permissions_of_any_new_file(storage, tmp_path):
    (tmp_path / "plain").touch()
    storage.step().write(ROWS)
    assert stat.S_IMODE(storage.output_path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_step_never_overwrites_the_users_table(tmp_path):
    source = tmp_path / "run_step1.jsonl"
    source.write_text("{}\n")
    with pytest.raises(ConfigError, match="would overwrite"):
        FileStorage(str(source), str(tmp_path), "run").step().write(ROWS)
    assert source.read_text() == "{}\n"


def test_leftovers_of_the_same_table_are_swept_and_other_files_kept(storage):
    cache = Path(storage.cache_path)
    cache.mkdir()
    name = storage.step().output_path.name
    kept = [f".{name}.notes", f".x{name}.1.tmp", f"{name}.tmp", f".{storage.dropped_path.name}.1.tmp"]
    for other in [f".{name}.1.rows.tmp", f".{name}.2.table.tmp", *kept]:
        (cache / other).touch()
    storage.write(ROWS)
    assert sorted(os.listdir(cache)) == sorted([name, *kept])


def test_a_sidecar_table_can_be_written_beside_the_step(storage):
    with TableWriter(storage.step().dropped_path, "jsonl") as writer:
        writer.write({"reason": "blurred"})
    assert storage.dropped_path.read_bytes() == b'{"reason":"blurred"}\n'


def test_a_folder_that_cannot_be_made_or_written_is_a_step_error(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StepError, match="cannot be written"):
        FileStorage(str(source), str(tmp_path / "file")).step().write(ROWS)
    with pytest.raises(StepError, match="cannot be written"):
        FileStorage(str(source), str(tmp_path / "file/deeper")).step().write(ROWS)


def test_a_folder_in_the_place_of_the_table_is_a_step_error(storage):
    storage.step().output_path.mkdir(parents=True)
    with pytest.raises(StepError, match="cannot be written"):
        storage.write(ROWS)
    assert leftovers(storage.cache_path) == []


def test_a_rename_is_made_durable_after_the_file(storage, monkeypatch):
    synced = []
    real_fsync = os.fsync

    def fsync(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.step().write(ROWS)
    assert synced == [False, True]


# Full disks and kills -----------------------------------------------------------------------------------------------

WRITE_UNTIL_FULL = """
import resource, signal, sys
from dataflow.errors import StepError
from dataflow.utils.storage import FileStorage
source, cache, kind, limit = sys.argv[1:]
storage = FileStorage(source, cache, cache_type=kind, allow_pickle=True).step()
storage.write([{"a": "old"}])
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    with storage.open_writer() as writer:
        for number in range(20_000):
            writer.write({"number": number, "a": f"{number} new " * 20})
except StepError as error:
    print(error)
    raise SystemExit(3) from None
"""


def write_until_full(source, cache, kind, limit=0):
    command = [sys.executable, "-W", "error", "-c", WRITE_UNTIL_FULL, str(source), str(cache), kind, str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "pickle"])
def test_a_file_that_may_not_grow_leaves_the_old_table_whole(source, tmp_path, kind):
    cache = tmp_path / "cache"
    done = write_until_full(source, cache, kind, limit=100_000)
    assert (done.returncode, done.stderr) == (3, "")
    assert f"step1.{kind} cannot be written: the disk is full; free some space" in done.stdout
    storage = FileStorage(str(source), str(cache), cache_type=kind, allow_pickle=True).step().step()
    assert storage.read("dict") == [{"a": "old"}]
    assert leftovers(cache) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "pickle"])
def test_a_full_disk_leaves_the_old_table_whole_and_room_again(source, small_disk, kind):
    (small_disk / "ballast").write_bytes(bytes(4 << 20))
    done = write_until_full(source, small_disk, kind)
    assert (done.returncode, done.stderr) == (3, "")
    assert "the disk is full; free some space" in done.stdout
    storage = FileStorage(str(source), str(small_disk), cache_type=kind, allow_pickle=True).step()
    assert storage.step().read("dict") == [{"a": "old"}]
    assert leftovers(small_disk) == []


def test_a_table_that_failed_once_is_not_published_even_if_the_error_was_caught(storage, monkeypatch):
    class FullFile:
        def write(self, line):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    storage.step().write(ROWS)
    writer = storage.open_writer().__enter__()
    writer._file.close()
    writer._file = FullFile()
    with pytest.raises(StepError, match="disk is full"):
        writer.write({"a": 1})
    with pytest.raises(StepError, match="disk is full"):
        writer.__exit__(None, None, None)
    assert storage.step().read("dict") == ROWS


WRITE_UNTIL_KILLED = """
import sys
from dataflow.utils.storage import FileStorage
source, cache, kind = sys.argv[1:]
storage = FileStorage(source, cache, cache_type=kind, allow_pickle=True).step()
storage.write([{"a": "old"}])
with storage.open_writer() as writer:
    for number in range(100_000):
        writer.write({"number": number, "a": f"{number} new " * 20})
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_table_whole(source, tmp_path, kind):
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(source), str(cache), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(leftovers(cache)) == 1
    assert (cache / leftovers(cache)[0]).stat().st_size > 1_000_000
    storage = FileStorage(str(source), str(cache), cache_type=kind).step()
    assert storage.step().read("dict") == [{"a": "old"}]
    storage.reset().step().write([{"a": "new"}])
    assert leftovers(cache) == []
    assert storage.step().read("dict") == [{"a": "new"}]


def test_importing_storage_imports_neither_pandas_nor_pyarrow_nor_numpy():
    program = (
        "import sys, dataflow.utils.storage; print([m for m in ('pandas', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
