"""Prompts, translations and edit instructions written by a model: strict, paid for once, and never an empty prompt."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai")

from tests.judging import ONCE, QUIET, Desk, calls, ready, service

from dataflow.cli import main
from dataflow.errors import ConfigError, DataflowError
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.operators.core_text import EditInstructionWriter, PromptRewriter, PromptTranslator
from dataflow.operators.core_text.edit_types import EDIT_TYPES, drawn, edit_types
from dataflow.operators.core_text.prompt_rewriter import STYLES
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.judge import JudgeServing, alignment_rubric
from dataflow.serving.local_vlm_serving import LocalVLMServing
from dataflow.serving.writer import WriterServing
from dataflow.types import GenerationRequest, GenerationResult, Serving

TOKENIZER = Path(__file__).parents[2] / "src" / "dataflow" / "builtin" / "tiny-clip" / "tokenizer.json"


@pytest.fixture(scope="module")
def server():
    with FakeApi() as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    return ready(server, monkeypatch)


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def say(*texts, field="prompt", **more):
    return "say:" + json.dumps({"entries": [{field: text, **more} for text in texts]}, ensure_ascii=False)


def rewrite(api, desk, *prompts, keys=None, tokenizer=None, options=ONCE, params=None, **more):
    rows = [{"id": at, "conversations": prompt} for at, prompt in enumerate(prompts)]
    writer = WriterServing(service(api, request_params=params), tokenizer=tokenizer)
    summary = PromptRewriter(writer, options=options, **more).run(desk.storage(*rows), **(keys or {}))
    assert summary.balanced
    return summary, desk.table()


def asked(api):
    return [request["body"]["messages"][0]["content"] for request in api.requests("chat/completions")]


class TestRewriter:
    def test_every_variant_is_a_row_with_its_source(self, api, desk):
        api.script({"a fox": say("a red fox", "a fox in snow", "狐狸在雪中"), "a cat": say("one", "two", "three")})
        summary, table = rewrite(api, desk, "a fox", "a cat", variants=3)
        assert (summary.rows, summary.done, summary.written, calls(api)) == (2, 2, 6, 2)
        assert [row["prompt"] for row in table] == ["a red fox", "a fox in snow", "狐狸在雪中", "one", "two", "three"]
        assert [row["conversations"] for row in table] == ["a fox"] * 3 + ["a cat"] * 3
        assert [row["prompt_number"] for row in table] == [1, 2, 3] * 2
        assert all(row["prompt_by"].startswith("some-judge#") for row in table)
        assert not any("prompt_error" in row for row in table)

    def test_what_is_asked(self, api, desk):
        api.script({"": say("一只狐狸，招牌写着「营业」")})
        rewrite(api, desk, "狐狸和招牌「营业」", style="short", language="Chinese", max_words=20)
        [text] = asked(api)
        assert STYLES["short"] in text
        assert "Write in Chinese. It has at most 20 words." in text
        assert "letter for letter" in text
        assert "-----\n狐狸和招牌「营业」\n-----" in text
        schema = api.requests("chat/completions")[0]["body"]["response_format"]["json_schema"]
        assert schema["strict"] is True
        assert schema["schema"]["properties"]["entries"]["items"]["required"] == ["prompt"]

    def test_a_list_in_one_row(self, api, desk):
        api.script({"a fox": say("one", "two"), "a cat": "refuse"})
        summary, table = rewrite(api, desk, "a fox", "a cat", variants=2, keys={"as_rows": False})
        assert (summary.done, summary.refused, summary.written) == (1, 1, 2)
        assert [row["prompt"] for row in table] == [["one", "two"], []]
        assert table[1]["prompt_error"]["status"] == "refused"

    def test_one_variant_keeps_the_row(self, api, desk):
        api.script({"": say("a red fox")})
        summary, [row] = rewrite(api, desk, [{"role": "user", "content": "a fox"}], instruction="Make it red.")
        assert (row["prompt"], summary.written) == ("a red fox", 1)
        assert "prompt_number" not in row
        assert asked(api)[0].startswith("Make it red.")

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            ("say:Here are two prompts: a fox and a wolf", "is no JSON"),
            ('say:{"entries": [{"prompt": "one"}, {"prom', "is no JSON"),
            ("say:[]", "is no JSON object"),
            ('say:{"prompts": ["one", "two"]}', 'no list under "entries"'),
            ('say:{"entries": "one, two"}', "no list"),
            ('say:{"entries": ["one", "two"]}', "in entry 1 no text for 'prompt'"),
            (say("one"), "has 1 different entries of 2"),
            (say(), "has 0 different entries of 2"),
            (say("A fox.", "a fox"), "has 1 different entries of 2"),
            (say("one", ""), "in entry 2 no text"),
            (say("one", "  "), "in entry 2 no text"),
            (say("one", None), "in entry 2 no text"),
            (say("one", 2), "in entry 2 no text"),
            (say("one", "…"), "in entry 2 no words"),
            (say("one", "Here is the rewritten prompt: two"), "words about the answer"),
            (say("Sure! A fox", "two"), "words about the answer"),
            (say("以下是改写后的提示词", "two"), "words about the answer"),
            (say("I'm sorry, but I can't help with that.", "two"), "an apology"),
            (say("抱歉，我无法满足这个请求", "two"), "an apology"),
            ("say:I'm sorry, I can't help with that.", "is no JSON"),
        ],
    )
    def test_what_is_no_answer_is_no_prompt(self, api, desk, answer, told):
        api.script({"": answer})
        summary, [row] = rewrite(api, desk, "a fox", variants=2)
        assert (summary.failed, summary.reasons) == (1, {"parse_error": 1})
        assert row["prompt"] is row["prompt_number"] is None
        assert row["prompt_error"]["reason"] == "parse_error"
        assert told in row["prompt_error"]["message"]

    @pytest.mark.parametrize(
        "text", ["Here is a fox under a tree", "a sure-footed goat", "A sign: here is the prompt", "Sorry bears hug"]
    )
    def test_what_only_looks_like_talk_is_a_prompt(self, api, desk, text):
        api.script({"": say(text)})
        assert rewrite(api, desk, "a fox")[1][0]["prompt"] == text

    def test_more_than_was_asked_for_is_cut_and_repeats_do_not_count(self, api, desk):
        api.script({"": say("one", "One!", "two", "three")})
        assert [row["prompt"] for row in rewrite(api, desk, "a fox", variants=2)[1]] == ["one", "two"]

    def test_quoted_text_survives_or_it_is_no_answer(self, api, desk):
        api.script({"OPEN": say('a red sign that says "OPEN"'), "Bar": say("a sign that says BAR"), "“Café”": say("x")})
        prompts = ['a sign "OPEN"', "a sign 'Bar' and \"Bar\"", "a sign “Café”"]
        _, table = rewrite(api, desk, *prompts)
        assert [row["prompt"] for row in table] == ['a red sign that says "OPEN"', None, None]
        assert "lost 'Bar'" in table[1]["prompt_error"]["message"]
        assert rewrite(api, desk, *prompts, keep_quoted=False)[0].done == 3

    def test_limits(self, api, desk):
        api.script({"long": say("one two three four"), "short": say("one two"), "中": say("一二三四")})
        _, table = rewrite(api, desk, "long", "short", "中", max_words=3)
        assert [row["prompt"] for row in table] == [None, "one two", None]
        assert "4 words, more than 3" in table[2]["prompt_error"]["message"]

    def test_limits_in_tokens_of_the_model_that_draws(self, api, desk):
        pytest.importorskip("tokenizers")
        api.script({"": say("a red circle " * 40)})
        _, [row] = rewrite(api, desk, "long", max_tokens=77, tokenizer=TOKENIZER)
        assert "tokens, more than 77" in row["prompt_error"]["message"]
        assert rewrite(api, desk, "long", max_tokens=500, tokenizer=TOKENIZER)[0].done == 1
        before = calls(api)
        _, [row] = rewrite(api, desk, "long", max_tokens=78)
        assert "needs a tokenizer" in row["prompt_error"]["message"]
        assert calls(api) == before
        with pytest.raises(ConfigError, match="no tokenizer"):
            WriterServing(service(api), tokenizer=desk.folder / "gone.json")

    def test_rate_limits_repeats_and_refusals(self, api, desk):
        api.script(
            {
                "a fox": ["rate_limit:0", say("a red fox")],
                "a cat": ["say:no JSON", say("a black cat")],
                "a dog": "refuse",
                "an owl": "content_filter",
                "a bee": ["500", "disconnect", say("a busy bee")],
            }
        )
        prompts = ["a fox", "a cat", "a dog", "an owl", "a bee"]
        summary, table = rewrite(api, desk, *prompts, options=QUIET)
        assert [row["prompt"] for row in table] == ["a red fox", "a black cat", None, None, "a busy bee"]
        assert [row.get("prompt_error", {}).get("status") for row in table] == [None, None, "refused", "refused", None]
        assert (summary.done, summary.refused, summary.failed) == (3, 2, 0)
        before = calls(api)
        again, same = rewrite(api, desk, *prompts, options=QUIET)
        assert (again.done, again.written, calls(api), same) == (3, 5, before, table)

    def test_what_was_written_is_kept_when_rows_come_and_move(self, api, desk):
        api.script({"a fox": say("fox 1", "fox 2"), "a cat": say("cat 1", "cat 2"), "a bee": say("bee 1", "bee 2")})
        rewrite(api, desk, "a fox", "a cat", variants=2)
        _, table = rewrite(api, desk, "a cat", "a bee", "a fox", variants=2)
        assert calls(api) == 3
        assert [row["prompt"] for row in table] == ["cat 1", "cat 2", "bee 1", "bee 2", "fox 1", "fox 2"]
        rewrite(api, desk, "a cat", variants=2, seed=1)
        assert calls(api) == 4

    def test_rows_that_cannot_be_asked_about(self, api, desk):
        api.script({"": say("x")})
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        summary, table = rewrite(api, desk, "", None, turns, "good")
        assert (summary.failed, summary.done, calls(api)) == (3, 1, 1)
        assert [row["prompt"] for row in table] == [None, None, None, "x"]
        assert "2 user turns" in table[2]["prompt_error"]["message"]

    def test_a_prompt_that_failed_is_not_drawn(self, api, desk):
        api.script({"a fox": say("a red fox", "a fox"), "a cat": "say:what?"})
        rewrite(api, desk, "a fox", "a cat", variants=2)
        drawer = FakeServing(image_io=ImageIO(desk.folder / "images"), size=(8, 8))
        summary = Text2ImageGenerator(drawer, options=QUIET).run(desk.store.step(), "prompt", "images")
        assert (summary.rows, summary.done, summary.failed, summary.images) == (3, 2, 1, 2)
        assert [row["images"] == [] for row in desk.table()] == [False, False, True]

    def test_services_that_know_no_schema_or_another_one(self, api, desk):
        api.script({"": say("x")})
        for own in (None, {"type": "json_object"}):
            rewrite(api, desk, "a fox", params={"response_format": own})
        formats = [request["body"].get("response_format") for request in api.requests("chat/completions")]
        assert formats == [None, {"type": "json_object"}]

    @pytest.mark.parametrize("kind", [PromptRewriter, PromptTranslator, EditInstructionWriter])
    def test_a_serving_that_writes_no_prompts(self, api, kind):
        for serving in (service(api), JudgeServing(service(api), alignment_rubric())):
            with pytest.raises(ConfigError, match="put a WriterServing around it"):
                kind(serving).plan()

    @pytest.mark.parametrize("text", ["", "prose", "[]", '{"entries": []}', '{"entries": ["x"]}', '{"entries": 1}'])
    def test_a_writer_of_the_users_own_that_keeps_to_no_form(self, desk, text):
        class Own(Serving):
            def fingerprint(self):
                return {"model": "own", "writer": 1}

            async def generate(self, requests):
                return [GenerationResult(text=text) for _ in requests]

        PromptRewriter(Own(), options=ONCE).run(desk.storage({"conversations": "a fox"}))
        [row] = desk.table()
        assert row["prompt"] is None
        assert row["prompt_error"]["message"] == "the answer has no entries with prompt"

    def test_counting_tokens_needs_a_library(self, api, desk, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        api.script({"": say("x")})
        with pytest.raises(DataflowError, match="tokenizers"):
            rewrite(api, desk, "long", max_tokens=5, tokenizer=TOKENIZER)
        assert calls(api) == 0

    def test_a_file_that_is_no_tokenizer(self, api, desk):
        pytest.importorskip("tokenizers")
        (desk.folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ConfigError, match="no tokenizer can be read"):
            rewrite(api, desk, "long", max_tokens=5, tokenizer=desk.folder / "tokenizer.json")
        assert calls(api) == 0

    def test_a_generator_that_asks_a_writer(self, api, desk):
        summary = Text2ImageGenerator(WriterServing(service(api)), options=ONCE).run(
            desk.storage({"conversations": "x"})
        )
        assert (summary.failed, calls(api)) == (1, 0)

    @pytest.mark.parametrize(
        "options",
        [
            {"style": "loud"},
            {"instruction": " "},
            {"variants": 0},
            {"variants": 101},
            {"max_words": 0},
            {"max_tokens": 0},
        ],
    )
    def test_what_makes_no_sense(self, api, options):
        with pytest.raises(ConfigError):
            PromptRewriter(WriterServing(service(api)), **options)

    @pytest.mark.parametrize("kind", [PromptRewriter, PromptTranslator])
    def test_the_source_is_not_overwritten(self, api, kind):
        with pytest.raises(ConfigError, match="another column"):
            kind(WriterServing(service(api))).plan(input_conversation_key="prompt", output_prompt_key="prompt")


class TestTranslator:
    def translate(self, api, desk, *prompts, **options):
        rows = [{"conversations": prompt} for prompt in prompts]
        translator = PromptTranslator(WriterServing(service(api)), options=ONCE, **options)
        summary = translator.run(desk.storage(*rows))
        assert summary.balanced
        return summary, desk.table()

    def test_the_translation_stands_beside_the_prompt(self, api, desk):
        api.script(
            {
                "狐狸": say('a fox with a sign "营业"', field="translation"),
                "猫": say("译文：a cat", field="translation"),
            }
        )
        summary, table = self.translate(api, desk, "一只狐狸，招牌「营业」", "一只猫")
        assert table[0]["translated_prompt"] == 'a fox with a sign "营业"'
        assert table[0]["conversations"] == "一只狐狸，招牌「营业」"
        assert table[1]["translated_prompt"] is None
        assert "words about the answer" in table[1]["translated_prompt_error"]["message"]
        assert (summary.done, summary.failed, summary.written) == (1, 1, 2)
        assert "into English" in asked(api)[0]

    def test_quoted_text_may_be_translated(self, api, desk):
        api.script({"": say("一只狐狸，招牌「营业」", field="translation")})
        row = 'a fox with a sign "OPEN"'
        assert self.translate(api, desk, row, language="Chinese")[0].failed == 1
        assert self.translate(api, desk, row, language="Chinese", keep_quoted=False)[0].done == 1

    def test_a_language_is_needed(self, api):
        with pytest.raises(ConfigError, match="language"):
            PromptTranslator(WriterServing(service(api)), language=" ")


KINDS = {"colour": {"recolour": "another colour"}, "object": {"add": "something new", "remove": "something gone"}}


class TestEditInstructions:
    def write(self, api, desk, *rows, keys=None, options=ONCE, **more):
        writer = EditInstructionWriter(WriterServing(service(api)), options=options, **more)
        summary = writer.run(desk.storage(*rows), **(keys or {}))
        assert summary.balanced
        return summary, desk.table()

    def test_each_instruction_is_a_row_with_its_kind(self, api, desk):
        edits = [{"instruction": "Paint it red.", "type": "recolour"}, {"instruction": "Add a hat.", "type": "add"}]
        api.script({"": "say:" + json.dumps({"entries": edits})})
        summary, table = self.write(api, desk, {"images": [desk.picture(0)], "id": 7}, types=KINDS, number=2)
        assert (summary.done, summary.written) == (1, 2)
        assert [(row["instruction"], row["edit_type"], row["edit_category"], row["id"]) for row in table] == [
            ("Paint it red.", "recolour", "colour", 7),
            ("Add a hat.", "add", "object", 7),
        ]
        [request] = api.requests("chat/completions")
        text, picture = request["body"]["messages"][0]["content"]
        assert picture["type"] == "image_url"
        assert "- remove: something gone" in text["text"]
        items = request["body"]["response_format"]["json_schema"]["schema"]["properties"]["entries"]["items"]
        assert sorted(items["properties"]["type"]["enum"]) == ["add", "recolour", "remove"]

    @pytest.mark.parametrize(
        ("edits", "told"),
        [
            ([{"instruction": "Do it.", "type": "explode"}] * 2, "'explode' for 'type', which was not to choose from"),
            ([{"instruction": "Do it.", "type": "add"}, {"instruction": "And it.", "type": "add"}], "1 different"),
            ([{"instruction": "Do it.", "type": "add"}, {"instruction": "do it", "type": "remove"}], "1 different"),
            ([{"instruction": "Do it."}], "no text for 'type'"),
        ],
    )
    def test_kinds_are_those_that_were_offered_and_different(self, api, desk, edits, told):
        api.script({"": "say:" + json.dumps({"entries": edits})})
        _, [row] = self.write(api, desk, {"images": desk.picture(0)}, types=KINDS, number=2)
        assert row["instruction"] is row["edit_type"] is None
        assert told in row["instruction_error"]["message"]

    def test_captions(self, api, desk):
        edit = {"instruction": "把它涂成红色。", "type": "recolour", "source_caption": "蓝车", "target_caption": "红车"}
        api.script({"": "say:" + json.dumps({"entries": [edit]}, ensure_ascii=False)})
        options = {"types": KINDS, "captions": True, "language": "Chinese"}
        _, [row] = self.write(api, desk, {"images": desk.picture(0)}, **options)
        assert (row["source_caption"], row["target_caption"]) == ("蓝车", "红车")
        del edit["target_caption"]
        api.script({"": "say:" + json.dumps({"entries": [edit]})})
        _, [row] = self.write(api, desk, {"images": desk.picture(1)}, **options)
        assert row["source_caption"] is None

    def test_pictures_that_are_not_there_or_not_one(self, api, desk):
        api.script({"": say("Paint it.", field="instruction", type="add")})
        (desk.folder / "half.png").write_bytes(Path(desk.picture(0)).read_bytes()[:60])
        rows = [{"images": value} for value in (["gone.png"], [], [desk.picture(0)] * 2, str(desk.folder / "half.png"))]
        summary, table = self.write(api, desk, *rows, {"images": desk.picture(0)}, types=KINDS)
        assert [row["instruction"] for row in table] == [None] * 4 + ["Paint it."]
        assert (summary.failed, summary.done, calls(api)) == (4, 1, 1)

    def test_kinds_follow_from_the_pictures_name_wherever_it_lies(self, api, desk):
        writer = EditInstructionWriter(WriterServing(service(api)))

        def offered(row, **keys):
            [draft] = writer.plan(**keys).requests(row)
            return draft.params["choices"]["type"]

        assert offered({"images": "/a/b/cat.png"}) == offered({"images": ["c/cat.png"]})
        assert offered({"images": "cat.png"}) != offered({"images": "dog.png"})
        named = {"input_name_key": "name"}
        assert offered({"images": "a.png", "name": 3}, **named) == offered({"images": "b.png", "name": 3}, **named)
        summary, _ = self.write(api, desk, {"images": desk.picture(0), "name": ""}, keys=named)
        assert summary.reasons == {"bad_input": 1}

    def test_kinds_come_as_often_as_their_shares_say(self):
        types = edit_types(EDIT_TYPES, {"object": 3, "relight": 1})
        counts = Counter(drawn(types, 1, str(key))[0].category for key in range(3000))
        assert counts["object"] == pytest.approx(2250, abs=110)
        assert set(counts) == {"object", "light_and_colour"}
        assert len({kind.name for kind in drawn(types, 4, "x")}) == 4

    def test_the_table_of_kinds(self):
        names = [name for kinds in EDIT_TYPES.values() for name in kinds]
        assert (len(EDIT_TYPES), len(names), len(set(names))) == (8, 35, 35)
        assert sum(kind.share for kind in edit_types(EDIT_TYPES)) == pytest.approx(1)

    @pytest.mark.parametrize(
        "options",
        [
            {"number": 0},
            {"number": 4, "types": KINDS},
            {"spare": -1},
            {"types": {}},
            {"types": {"a": {"x": "1"}, "b": {"x": "2"}}},
            {"shares": {}},
            {"shares": {"nothing": 1}},
            {"shares": {"object": 0}},
            {"shares": {"object": True}},
            {"shares": {"object": 1, "add_object": 1}},
            {"max_words": 0},
        ],
    )
    def test_what_makes_no_sense(self, api, options):
        with pytest.raises(ConfigError):
            EditInstructionWriter(WriterServing(service(api)), **options)


PROGRAM = """
import sys
from dataflow.operators.core_text import PromptRewriter
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.local_vlm_serving import LocalVLMServing
from dataflow.serving.writer import WriterServing
from dataflow.utils.storage import FileStorage
url, table, cache = sys.argv[1:]
serving = WriterServing(APIVLMServing_openai(url, model_name="some-writer", max_workers=2))
PromptRewriter(serving, variants=2).run(FileStorage(table, cache_path=cache).step())
"""


def test_a_run_that_is_killed_goes_on_and_pays_only_for_what_was_in_flight(api, tmp_path):
    prompts = [f"thing {number}." for number in range(30)]
    api.script({prompt: "slow:0.05+" + say(f"{prompt} one", f"{prompt} two") for prompt in prompts})
    table, kills = tmp_path / "in.jsonl", 3
    table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in prompts))

    def start(cache):
        words = [sys.executable, "-c", PROGRAM, f"{api.url}/v1", str(table), str(tmp_path / cache)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"DF_API_KEY": "any-word"})

    for life in range(1, kills + 1):
        process = start("killed")
        deadline = time.monotonic() + 60
        while calls(api) < 7 * life:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not list((tmp_path / "killed").glob("*_step1.jsonl"))
    process = start("killed")
    _, errors = process.communicate(timeout=60)
    assert "30 rows = 30 done" in errors
    assert calls(api) <= 30 + 2 * kills
    process = start("smooth")
    process.communicate(timeout=60)
    [killed, smooth] = [next((tmp_path / name).glob("*_step1.jsonl")).read_bytes() for name in ("killed", "smooth")]
    assert killed == smooth
    assert killed.count(b"\n") == 60


def test_each_replica_of_a_service_writes(api, desk):
    api.script({"": "slow:0.05+" + say("a red fox")})
    other = api.url.replace("127.0.0.1", "localhost")
    both = WriterServing(APIVLMServing_openai([f"{api.url}/v1", f"{other}/v1"], model_name="m", max_workers=1))
    rows = [{"conversations": f"thing {number}"} for number in range(8)]
    assert PromptRewriter(both, options=QUIET).run(desk.storage(*rows)).done == 8
    hosts = {
        {name.lower(): value for name, value in request["headers"].items()}["host"] for request in api.requests("chat")
    }
    assert len(hosts) == 2


PIPELINE = """
[storage]
first_entry_file_name = "in.jsonl"
cache_path = "cache"

[serving.llm]
type = "chat"
api_url = "{url}/v1"
model_name = "some-writer"

[serving.writer]
type = "dataflow.serving.writer:WriterServing"
service = "llm"

[serving.draw]
type = "fake"

[[step]]
operator = "dataflow.operators.core_text:PromptRewriter"
serving = "writer"
style = "diverse"
variants = 2
max_words = 30

[[step]]
operator = "dataflow.operators.core_text:PromptDeduplicator"
input_conversation_key = "prompt"

[[step]]
operator = "Text2ImageGenerator"
serving = "draw"
input_conversation_key = "prompt"

[[step]]
operator = "dataflow.operators.core_text:EditInstructionWriter"
serving = "writer"
captions = true
[step.types.colour]
recolour = "give one object another colour"
[step.shares]
colour = 1
"""


def test_from_a_pipeline_file(api, desk, capsys):
    captions = {"source_caption": "a fox", "target_caption": "a blue fox"}
    api.script(
        {
            "a fox": say("a red fox", "a fox in snow"),
            "a wolf": say("A red fox!", "a grey wolf"),
            "Look at the picture": say("Paint it blue.", field="instruction", type="recolour", **captions),
        }
    )
    desk.storage({"conversations": "a fox"}, {"conversations": "a wolf"})
    file = desk.folder / "pipeline.toml"
    file.write_text(PIPELINE.replace("{url}", api.url))
    assert main(["plan", str(file)]) == 0
    capsys.readouterr()
    assert main(["run", str(file)]) == 0
    told = capsys.readouterr().err
    assert "4 rows = 3 done + 0 refused + 0 failed + 1 dropped + 0 pending" in told
    assert calls(api) == 2 + 3
    written = desk.folder / "cache" / "dataflow_cache_step_step4.jsonl"
    table = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prompt"] for row in table] == ["a red fox", "a fox in snow", "a grey wolf"]
    assert {row["instruction"] for row in table} == {"Paint it blue."}
    assert {row["edit_category"] for row in table} == {"colour"}


def test_around_a_model_on_this_machine(tmp_path):
    writer = WriterServing(LocalVLMServing(tmp_path))
    operator = EditInstructionWriter(writer, number=2)
    requests = []
    for name in ("a.png", "b.png"):
        draft = operator._draft(name, name)
        params = {**writer.default_params(), **draft.params}
        requests.append(GenerationRequest(request_id=name, prompt=draft.prompt, images=(name,), seed=0, params=params))
    assert requests[0].params["choices"] != requests[1].params["choices"]
    assert [writer.check(request) for request in requests] == [None, None]
    assert writer.batch_key(requests[0]) == writer.batch_key(requests[1])


def test_it_needs_a_service_of_words(api, desk):
    with pytest.raises(ConfigError, match="words"):
        WriterServing(service(api, image_io=ImageIO(desk.folder)))
