"""Pipeline files: what they give, what is refused and in which words."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from dataflow import annotations, config
from dataflow.acceptance import AcceptanceLoop
from dataflow.errors import ConfigError
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.judge import alignment_rubric
from dataflow.serving.local_image_gen_serving import LocalImageGenServing

GOOD = """
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "out"

[serving.f]
type = "fake"
size = [32, 16]

[[step]]
operator = "Text2ImageGenerator"
seed = 7
input_conversation_key = "prompt"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "pipeline.toml"
        path.write_text(text)
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config.build(config.load(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:").strip()


def test_objects(write, tmp_path):
    job = config.build(config.load(write(GOOD)))
    assert job.storage.first_entry_file_name == str(tmp_path / "in.jsonl")
    assert job.storage.cache_path == str(tmp_path / "out")
    assert job.images.save_path == tmp_path / "out" / "images"
    serving = job.servings["f"]
    assert isinstance(serving, FakeServing)
    assert serving.size == (32, 16)
    assert serving.image_io is job.images
    (step,) = job.pipeline.steps
    assert isinstance(step.operator, Text2ImageGenerator)
    assert (step.operator.pipe, step.operator.seed) == (serving, 7)
    assert job.pipeline.plans()[0].inputs == ("prompt",)


def test_paths_follow_the_file_wherever_it_is_run(write, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir("/")
    text = GOOD + (
        '[serving.a]\ntype = "local"\nhf_model_name_or_path = "models/mine"\nhf_local_dir = "down"\n'
        'lora = ["./style.safetensors@0.8", "org/name@0.5"]\n'
        '[serving.b]\ntype = "local"\nhf_model_name_or_path = "org/name"\nhf_cache_dir = "~/cache"\n'
    )
    text = text.replace('operator = "Text', 'serving = "f"\noperator = "Text')
    found = config.load(write(text))
    assert found.servings["a"].arguments == {
        "hf_model_name_or_path": str(tmp_path / "models" / "mine"),
        "hf_local_dir": str(tmp_path / "down"),
        "lora": [str(tmp_path / "style.safetensors@0.8"), "org/name@0.5"],
    }
    assert found.servings["b"].arguments["hf_model_name_or_path"] == "org/name"
    assert found.servings["b"].arguments["hf_cache_dir"] == str(Path("~/cache").expanduser())


def test_the_cache_lies_beside_the_file_by_default(write, tmp_path):
    assert config.load(write(GOOD.replace('cache_path = "out"', ""))).folder == tmp_path / "cache"


def test_dump_is_read_back(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "out").mkdir()
    (tmp_path / "own_operator_with_table.py").write_text(OWN)
    step = '[[step]]\noperator = "own_operator_with_table:Keep"\nsome = {step = "a\\r\\nb"}\n'
    text = GOOD + step + '\n[run]\nmax_failed_fraction = 0.25\nretry = ["timeout"]\n[images]\nformat = "webp"\n'
    before = config.load(write(text))
    file = tmp_path / "out" / "job.toml"
    file.write_text(config.dump(before, tmp_path / "out"))
    after = config.load(file)
    assert (after.storage, after.images, after.servings, after.steps, after.run) == (
        before.storage,
        before.images,
        before.servings,
        before.steps,
        before.run,
    )
    assert config.run_options(after).retry == frozenset({"timeout"})


def test_a_dumped_folder_may_be_moved(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.toml").write_text(config.dump(config.load(write(GOOD)), tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = config.load(tmp_path / "elsewhere" / "job.toml")
    assert moved.folder == tmp_path / "elsewhere"
    assert moved.images["save_path"] == str(tmp_path / "elsewhere" / "images")
    assert moved.storage["first_entry_file_name"] == str(tmp_path / "in.jsonl")


def test_the_file_itself(tmp_path, write):
    assert "cannot be read: No such file" in refused(tmp_path / "none.toml")
    assert "is not TOML: " in refused(write("[storage"))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'a = "\xe9"')
    assert "is not UTF-8 text" in refused(path)


@pytest.mark.parametrize(
    ("replace", "by", "message"),
    [
        ("[storage]", "[storag]", "[storag]: there is no such table (did you mean 'storage'?)"),
        ("[storage]", "storage = 3\n[x]", "[x]: there is no such table"),
        (GOOD, "storage = 3", "[storage]: must be a table, found 3"),
        (GOOD, "", "the table [storage] is missing"),
        (
            "first_entry_file_name",
            "first_entry_filename",
            "first_entry_filename: there is no such key (did you mean 'first_entry_file_",
        ),
        ('first_entry_file_name = "in.jsonl"', "", "[storage]: the key 'first_entry_file_name' is missing"),
        ('"in.jsonl"', "3", "[storage]: first_entry_file_name: expected text, found 3"),
        ('cache_path = "out"', 'cache_type = "jsonlines"', "found 'jsonlines' (did you mean 'jsonl'"),
        ('cache_path = "out"', 'cache_type = "pickle"', "[storage]: cache_type is 'pickle'; unpickling runs"),
        ("[serving.f]", "[images]\nformat='gif'\n[serving.f]", "[images]: ImageIO(format='gif'): choose"),
        (
            'type = "fake"',
            "",
            "[serving.f]: the key 'type' is missing; choose 'local', 'chat', ",
        ),
        ('type = "fake"', 'type = "fak"', "[serving.f]: type: there is no 'fak' (did you mean 'fake'?)"),
        ('type = "fake"', 'type = "no.such.module:X"', "'no.such.module' cannot be imported"),
        ('type = "fake"', 'type = "dataflow.io:ImagIO"', "has no class 'ImagIO' (did you mean 'ImageIO'?)"),
        ('type = "fake"', 'type = "dataflow.io:ImageIO"', "is no serving: it has no method 'generate'"),
        ("[serving.f]", "[serving]", "[serving.type]: must be a table, found 'fake'"),
        ("size = [32, 16]", "size = [32]", "[serving.f]: size: expected a list of 2 whole numbers, found [32]"),
        ("size = [32, 16]", "siz = [32, 16]", "siz: there is no such key (did you mean 'size'?)"),
        ("size = [32, 16]", "batch_size = true", "batch_size: expected a whole number, found True"),
        ("size = [32, 16]", "seconds = nan", "seconds: expected a number, found nan"),
        ("size = [32, 16]", 'script = {a = "explode"}', "[serving.f]: unknown fault 'explode'"),
        ("[[step]]", "[step]", "at least one [[step]] is needed"),
        ('operator = "Text2ImageGenerator"', "", "[[step]] 1: the key 'operator' is missing"),
        ("Text2ImageGenerator", "Text2ImagGenerator", "(did you mean 'Text2ImageGenerator' or"),
        ('"Text2ImageGenerator"', '"dataflow.io:ImageIO"', "has no method 'plan'"),
        ("input_conversation_key", "input_conversion_key", "(did you mean 'input_conversation_key'?)"),
        ("seed = 7", 'seed = "7"', "[[step]] 1: seed: expected a whole number, found '7'"),
        ("seed = 7", 'serving = "g"', "[[step]] 1: serving: there is no [serving.g]; there are 'f'"),
        ("seed = 7", "options = {}", "options: there is no such key"),
        ("[[step]]", '[serving.g]\ntype = "fake"\n[[step]]', "the key 'serving' is missing; there are 'f', 'g'"),
        ('[serving.f]\ntype = "fake"\nsize = [32, 16]', "", "there are none: add a [serving.NAME]"),
        (
            "[[step]]",
            "[run]\nmax_failed_fraction = 2\n[[step]]",
            "[run]: max_failed_fraction: must be from 0 to 1, found 2",
        ),
        (
            "[[step]]",
            "[run]\nbudget_usd = 0\n[[step]]",
            "[run]: budget_usd: must be more than 0 US dollars, found 0",
        ),
        (
            "[[step]]",
            "[run]\nmax_attempts = 0\n[[step]]",
            "[run]: max_attempts: must be a whole number from 1, found 0",
        ),
        ("[[step]]", "[run]\nretry = 'x'\n[[step]]", "[run]: retry: expected a list of texts, found 'x'"),
    ],
)
def test_mistakes(write, replace, by, message):
    assert replace in GOOD
    assert message in refused(write(GOOD.replace(replace, by)))


def test_steps_must_be_tables():
    with pytest.raises(ConfigError, match=r"\[\[step\]\] 1: must be a table, found 3"):
        config.parse({"storage": {"first_entry_file_name": "a"}, "step": [3]}, folder=Path(), source="here")


def test_a_local_model_must_be_told_the_task(write):
    text = GOOD.replace('"fake"\nsize = [32, 16]', '"local"').replace("Text2Image", "PromptedImageEdit")
    assert 'PromptedImageEditGenerator needs a serving with Image_gen_task = "imageedit"' in refused(write(text))
    good = text.replace('"local"', '"local"\nImage_gen_task = "imageedit"')
    job = config.build(config.load(write(good)))
    assert isinstance(job.servings["f"], LocalImageGenServing)
    assert isinstance(job.pipeline.steps[0].operator, PromptedImageEditGenerator)


OWN = """
from __future__ import annotations
from typing import TYPE_CHECKING
from dataflow.types import Plan
if TYPE_CHECKING:
    from somewhere import Unknown

class Keep:
    def __init__(self, least: Unknown = None, some=None, **rest):
        if least == 0:
            raise ValueError("least must not be 0")
    def plan(self, *, key: str = "score"):
        return Plan(name="Keep", inputs=(key,), outputs=(), requests=lambda row: [], fold=lambda row, outcomes: row)
"""


def test_a_class_of_ones_own_lies_beside_the_file(write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_operator_of_test.py").write_text(OWN)
    step = '[[step]]\noperator = "own_operator_of_test:Keep"\nleast = 3\nkey = "prompt"\n'
    job = config.build(config.load(write(GOOD + step)))
    assert job.pipeline.plans()[1].inputs == ("prompt",)
    assert "[[step]] 2: serving: own_operator_of_test:Keep takes none" in refused(write(GOOD + step + 'serving = "f"'))
    assert "Keep does not take this: least must not be 0" in refused(write(GOOD + step.replace("3", "0")))


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, Any, True),
        (1, "unknown", True),
        ("a", str | os.PathLike[str] | None, True),
        ("a", Path, True),
        (1, Path, False),
        (1, float, True),
        (True, int, False),
        (True, float, False),
        (float("inf"), float, False),
        ("b", Literal["a", "b"], True),
        (1, Literal[True], False),
        (["a"], Sequence[str], True),
        (["a", 1], Sequence[str], False),
        (["a", 0.5], tuple[str, float], True),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        ({"a": "b"}, dict, True),
        ({"a"}, FakeServing, True),
    ],
)
def test_fits(value, hint, good):
    assert annotations.fits(value, hint) is good


def test_described():
    hint = str | Sequence[str] | Literal["x"] | Mapping[str, int] | Path | None
    assert annotations.described(hint) == "text or a list of texts or 'x' or a table"


class TestOptionsOfABase:
    """A constructor's ``**options`` are checked against the base they go to."""

    def test_are_known_and_typed(self, tmp_path):
        parsed = config.parse(
            document(tmp_path, clip={"type": "clip", "batch_size": 8, "long_prompts": "refuse"}),
            folder=tmp_path,
            source="x",
        )
        serving = config.build(parsed).servings["clip"]
        assert (serving.batch_size, serving.long_prompts) == (8, "refuse")
        assert serving.vectors == str(tmp_path / "out" / "vectors")

    @pytest.mark.parametrize(
        ("key", "value", "told"),
        [
            ("batchsize", 8, "batchsize: there is no such key.*did you mean 'batch_size'"),
            ("batch_size", "8", "batch_size: expected a whole number"),
            ("dtype", "fp64", "dtype: expected 'fp32' or 'bf16' or 'fp16'"),
        ],
    )
    def test_or_told(self, tmp_path, key, value, told):
        with pytest.raises(ConfigError, match=told):
            config.parse(document(tmp_path, clip={"type": "clip", key: value}), folder=tmp_path, source="x")

    def test_another_folder_for_the_vectors(self, tmp_path):
        parsed = config.parse(
            document(tmp_path, clip={"type": "clip", "vectors": "shared"}), folder=tmp_path, source="x"
        )
        assert config.build(parsed).servings["clip"].vectors == str(tmp_path / "shared")


def document(folder, **servings):
    (folder / "in.jsonl").write_text("{}\n")
    return {
        "storage": {"first_entry_file_name": str(folder / "in.jsonl"), "cache_path": str(folder / "out")},
        "serving": servings,
        "step": [{"operator": "ImageEvaluator", "serving": next(iter(servings))}],
    }


class TestAccept:
    def loop(self, tmp_path, **accept):
        given = document(tmp_path, fake={"type": "fake"})
        given["step"] = [
            {"operator": "Text2ImageGenerator"},
            {"operator": "ScoreFilter", "input_score_key": "luck", "minimum": 0.5},
        ]
        return config.parse({**given, "accept": accept}, folder=tmp_path, source="x")

    def test_repeats_the_steps(self, tmp_path):
        parsed = self.loop(tmp_path, wanted=2, maximum=9)
        loop = config.build(parsed).pipeline
        assert isinstance(loop, AcceptanceLoop)
        assert (loop.wanted.per_prompt, loop.wanted.maximum) == (2, 9)
        again = tmp_path / "job.toml"
        again.write_text(config.dump(parsed, tmp_path))
        assert config.load(again).accept == parsed.accept

    @pytest.mark.parametrize(
        ("accept", "told"),
        [
            ({"wanted": "2"}, r"\[accept\]: wanted: expected a whole number"),
            ({"quota": {"a": 1}}, r"\[accept\]: quota: there is no such key \(did you mean 'quotas'\?\)"),
            ({}, r"\[accept\]: give wanted"),
            ({"wanted": 3, "maximum": 2}, r"\[accept\]: .*no less"),
        ],
    )
    def test_or_told(self, tmp_path, accept, told):
        with pytest.raises(ConfigError, match=told):
            config.build(self.loop(tmp_path, **accept))


class TestServicesOfServings:
    def judge(self, tmp_path, **keys):
        given = document(
            tmp_path,
            judge={"type": "judge", "service": "qwen", "rubric": "alignment"} | keys,
            qwen={"type": "chat", "api_url": "http://127.0.0.1:1/v1", "model_name": "qwen"},
        )
        return config.parse(given, folder=tmp_path, source="x")

    def test_a_judge_asks_a_service_that_gets_no_image_store(self, tmp_path):
        parsed = self.judge(tmp_path)
        built = config.build(parsed).servings
        assert built["judge"].rubric == alignment_rubric()
        assert built["judge"]._service.image_io is None
        assert built["qwen"].image_io is not None  # it may draw as well
        assert config.parse(tomllib.loads(config.dump(parsed, tmp_path)), folder=tmp_path, source="x") == parsed

    def test_a_rubric_of_ones_own(self, tmp_path):
        (tmp_path / "mine.toml").write_text(
            'instruction = "Is {prompt} there?"\n[scales]\nthere = [0, 1]\nnice = [1, 5]\n'
            "[weights]\nthere = 3\nnice = 1\n"
        )
        rubric = config.build(self.judge(tmp_path, rubric="mine.toml")).servings["judge"].rubric
        assert rubric.scales == {"there": (0, 1), "nice": (1, 5)}
        assert rubric.weights == {"there": 3.0, "nice": 1.0}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("instruction = ", "no rubric can be read"),
            ('instruction = "x"', "a rubric has an instruction and a table scales"),
            ('instruction = "x"\n[scales]\na = 5', "a rubric has an instruction and a table scales"),
            ('instruction = "x"\n[scales]\na = [5, 5]', "needs scores with scales"),
            ('instruction = "x"\nscale = 1\n[scales]\na = [0, 5]', "there is no key 'scale'"),
        ],
    )
    def test_what_is_no_rubric(self, tmp_path, text, told):
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"\[serving.judge\]: rubric: .*mine.toml: .*{told}"):
            config.build(self.judge(tmp_path, rubric="mine.toml"))
        with pytest.raises(ConfigError, match="no rubric can be read"):
            config.build(self.judge(tmp_path, rubric="none.toml"))

    @pytest.mark.parametrize(
        ("keys", "told"),
        [
            ({"service": "qwin"}, r"there is no \[serving.qwin\] \(did you mean 'qwen'\?\)"),
            ({"service": "judge"}, "service: it would ask itself"),
            ({"service": 3}, "service: expected text"),
            ({"rubric": 3}, "rubric: expected text"),
        ],
    )
    def test_services_that_are_none(self, tmp_path, keys, told):
        with pytest.raises(ConfigError, match=told):
            self.judge(tmp_path, **keys)


class TestWhatIsWrittenInTheEnd:
    """``[report]`` and ``[[export]]``."""

    TEXT = (
        GOOD
        + '[report]\ntitle = "Foxes"\n'
        + '[[export]]\noutput = "shards"\nformat = "webdataset"\nrename = {images = "image"}\n'
        + '[[export]]\noutput = "tables/flat"\nformat = "parquet"\ncolumns = ["prompt"]\nvalidation = 0.1\n'
    )

    def test_is_read_and_dumped(self, write, tmp_path):
        found = config.load(write(self.TEXT))
        assert found.report == config.OutputConfig(output=str(tmp_path / "out/report"), arguments={"title": "Foxes"})
        first, second = found.exports
        assert (first.output, second.output) == (str(tmp_path / "shards"), str(tmp_path / "tables/flat"))
        assert first.arguments == {"format": "webdataset", "rename": {"images": "image"}}
        assert second.arguments == {"format": "parquet", "columns": ("prompt",), "validation": 0.1}
        (tmp_path / "out").mkdir()
        (tmp_path / "out/job.toml").write_text(config.dump(found, tmp_path / "out"))
        again = config.load(tmp_path / "out/job.toml")
        assert (again.report, again.exports) == (found.report, found.exports)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("[report]\ntitel = 'x'\n", "15: [report]: titel: there is no such key (did you mean 'title'?)"),
            ("[report]\nthumbnail_size = 9\n", "14: [report]: thumbnail_size must be a whole number from 32 to 512"),
            ("[[export]]\nformat = 'parquet'\n", "14: [[export]] 1: the key 'output' is missing: it takes text"),
            ("[[export]]\noutput = 'a'\nformat = 'tar'\n", "16: [[export]] 1: format: expected 'webdataset' or"),
            ("[export]\noutput = 'a'\n", "14: [export]: must be written [[export]], with two brackets each side"),
            (
                "[[export]]\noutput = 'a'\n[[export]]\noutput = 'a'\n",
                "17: [[export]] 2: output: another export writes to 'a', too",
            ),
            (
                "[[export]]\noutput = 'a'\nvalidation = 0.7\ntest = 0.7\n",
                "14: [[export]] 1: export: validation and test are more than 1 together",
            ),
        ],
    )
    def test_or_told(self, write, text, told):
        assert refused(write(GOOD + text)).startswith(told)
