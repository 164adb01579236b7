"""Prompts that repeat others: found through an index as an exhaustive search would, and told of what they repeat."""

import gc
import json
import random

import pytest
from tests.judging import QUIET, Desk

from dataflow.errors import ConfigError
from dataflow.metrics.near_text import NearDuplicates, shingles, similarity
from dataflow.metrics.prompts import missing_quotes, normalised, quoted, words
from dataflow.operators.core_text import PromptDeduplicator


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def run(desk, *rows, keys=None, **options):
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    summary = PromptDeduplicator(options=QUIET, **options).run(desk.storage(*rows), "prompt", **(keys or {}))
    assert summary.balanced
    path = desk.store.dropped_path
    dropped = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return summary, [row["prompt"] for row in desk.table()], dropped


class TestSame:
    def test_case_spaces_punctuation_and_unicode_forms(self, desk):
        same = ["A red fox.", "a  RED fox", "a red fox!", "ａ ｒｅｄ ｆｏｘ", "a red\tfox"]
        summary, kept, dropped = run(desk, *same, "a red box", similarity=None)
        assert kept == ["A red fox.", "a red box"]
        assert summary.reasons == {"duplicate": 4}
        assert [each["repeats"] for each in dropped] == [{"row": 1, "prompt": "A red fox.", "similarity": 1.0}] * 4
        assert dropped[1]["row"]["prompt"] == "a red fox!"

    def test_chinese(self, desk):
        _, kept, _ = run(
            desk, "一只红色的狐狸。", "一只红色的狐狸", "一只红色的狐狸！", "一只蓝色的狐狸", similarity=None
        )
        assert kept == ["一只红色的狐狸。", "一只蓝色的狐狸"]

    def test_what_may_count(self, desk):
        prompts = ["a Fox", "a fox", "a fox?"]
        assert run(desk, *prompts, similarity=None, ignore_case=False)[1] == ["a Fox", "a fox"]
        assert run(desk, *prompts, similarity=None, ignore_punctuation=False)[1] == ["a Fox", "a fox?"]

    def test_a_group_is_compared_in_itself(self, desk):
        rows = [{"prompt": "make it red", "image": name} for name in ("a", "b", "a")]
        for least in (None, 0.8):
            summary, _, dropped = run(desk, *rows, keys={"input_group_key": "image"}, similarity=least)
            assert (summary.done, summary.dropped) == (2, 1)
            assert dropped[0]["repeats"]["row"] == 1
        rows = [{"prompt": f"make the large vase on the table red{end}", "image": name} for name, end in
                [("a", ""), ("b", " now"), ("a", " now")]]  # fmt: skip
        summary, _, dropped = run(desk, *rows, keys={"input_group_key": "image"}, similarity=0.8)
        assert [(each["reason"], each["repeats"]["row"]) for each in dropped] == [("near_duplicate", 1)]

    @pytest.mark.parametrize(("policy", "kept"), [("keep", 4), ("drop", 1)])
    def test_rows_without_a_prompt_and_broken_ones(self, desk, policy, kept):
        storage = desk.storage({})
        lines = ["{broken", '{"prompt": "a"}', '{"prompt": ""}', '{"prompt": 3}', '{"other": 1}', '{"prompt": "a"}']
        (desk.folder / "in.jsonl").write_text("\n".join(lines))
        summary = PromptDeduplicator(on_unknown=policy, options=QUIET).run(storage, "prompt")
        assert summary.balanced
        assert (summary.rows, summary.failed, summary.done) == (6, 1, kept)
        dropped = [json.loads(line) for line in desk.store.dropped_path.read_text().splitlines()]
        assert dropped[-1]["repeats"] == {"row": 2, "prompt": "a", "similarity": 1.0}
        assert summary.written == kept

    def test_nothing_to_compare(self, desk):
        assert run(desk, {"prompt": None}, on_unknown="keep")[1] == [None]


class TestNear:
    def test_a_word_more(self, desk):
        first = "a photo of a red fox darting between snow-covered pines at dusk, cinematic light"
        near = first.replace("cinematic", "warm cinematic")
        far = "a photo of a kite surfer riding emerald waves under a cloudy sky, cinematic light"
        summary, kept, dropped = run(desk, first, far, near, near.upper(), similarity=0.8)
        assert kept == [first, far]
        assert summary.reasons == {"near_duplicate": 2}
        assert all(each["repeats"]["row"] == 1 for each in dropped)
        expected = similarity(shingles(normalised(first), "character", 4), shingles(normalised(near), "character", 4))
        assert dropped[0]["repeats"]["similarity"] == pytest.approx(expected, abs=1e-4)

    def test_words_in_another_order(self, desk):
        prompts = ["red fox, snow, pines, dusk", "dusk, pines, snow, red fox"]
        assert len(run(desk, *prompts, unit="word")[1]) == 1
        assert len(run(desk, *prompts, unit="word", ngram=2)[1]) == 2
        assert len(run(desk, "红狐 雪 松树", "松树 雪 红狐", unit="word")[1]) == 1

    @pytest.mark.parametrize("unit", ["character", "word"])
    @pytest.mark.parametrize("least", [0.7, 0.9])
    def test_finds_what_comparing_all_with_all_finds(self, unit, least):
        dice = random.Random(5)
        names = ["".join(dice.choices("abcdefgh", k=dice.randint(3, 7))) for _ in range(60)]
        texts = []
        for _ in range(600):
            if texts and dice.random() < 0.5:
                changed = dice.choice(texts).split()
                changed[dice.randrange(len(changed))] = dice.choice(names)
                texts.append(" ".join(changed))
            else:
                texts.append(" ".join(dice.choices(names, k=16)))
        size = 3 if unit == "character" else 1
        search = NearDuplicates(least=least, unit=unit, size=size)
        for text in texts:
            search.add(text)
        found = search.repeats(texts.__getitem__)
        grams = [shingles(text, unit, size) for text in texts]
        kept, missed, repeats = [], 0, 0
        for number in range(len(texts)):
            of = int(found.of[number])
            if of >= 0:
                repeats += 1
                assert of in kept
                assert found.similarity[number] == pytest.approx(similarity(grams[number], grams[of]))
                assert found.similarity[number] >= least - 1e-6
                continue
            missed += any(similarity(grams[number], grams[other]) >= least for other in kept)
            kept.append(number)
        assert repeats > 50
        assert missed <= 0.02 * repeats

    def test_many_of_one_template_take_time_by_their_number(self):
        search = NearDuplicates(least=0.95, unit="character", size=4)
        texts = [
            f"a photo of a fox number {number} on a wooden table in the light of the evening" for number in range(3000)
        ]
        for text in texts:
            search.add(text)
        asked = []
        search.repeats(lambda number: asked.append(number) or texts[number])
        assert len(asked) <= 9 * len(texts)

    def test_short_and_empty_texts(self):
        assert len(shingles("ab", "character", 4)) == 1
        assert len(shingles("", "character", 4)) == 0
        assert similarity(shingles("", "word", 1), shingles("!", "word", 1)) == 1.0
        search = NearDuplicates(least=0.9, unit="word", size=2)
        for text in ("", "a", "", "a"):
            search.add(text)
        assert search.repeats(["", "a", "", "a"].__getitem__).of.tolist() == [-1, -1, 0, 1]
        assert len(NearDuplicates(least=0.9, unit="word", size=2).repeats("".__getitem__).of) == 0

    def test_the_temporary_file_is_closed(self, desk):
        run(desk, "a", "b")
        gc.collect()  # a file that is left open warns, and warnings are errors


@pytest.mark.parametrize(
    "options", [{"similarity": 0.4}, {"similarity": 1.1}, {"unit": "line"}, {"ngram": 0}, {"on_unknown": "maybe"}]
)
def test_what_makes_no_sense(options):
    with pytest.raises(ConfigError):
        PromptDeduplicator(**options)
    with pytest.raises(ValueError, match="expected"):
        NearDuplicates(least=2, unit="word", size=1)
    with pytest.raises(ValueError, match="expected"):
        NearDuplicates(least=0.9, unit="word", size=0)


class TestWords:
    @pytest.mark.parametrize(
        ("text", "plain"),
        [("  A  Fox ", "a fox"), ("ﬁne", "fine"), ("?!", "?!"), ("a-b", "a b"), ("C++", "c++"), ("ẞ", "ss"), ("", "")],
    )
    def test_plain_form(self, text, plain):
        assert normalised(text) == plain
        assert normalised(plain) == plain

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("a red-brown fox's tail", ["a", "red-brown", "fox's", "tail"]),
            ("一只fox 跑", ["一", "只", "fox", "跑"]),
            ("", []),
            ("3 cats", ["3", "cats"]),
        ],
    )
    def test_words(self, text, found):
        assert words(text) == found

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ('a sign "OPEN 24" and “Bar”', ["OPEN 24", "Bar"]),
            ("招牌写着「营业中」和『再见』", ["营业中", "再见"]),
            ("the fox's den isn't 'here'", []),
            ('a 5" by 7" print', []),
            ('"a" and "a"', ["a"]),
            ('an open " only', []),
        ],
    )
    def test_quoted(self, text, found):
        assert quoted(text) == found

    def test_missing_quotes(self):
        assert missing_quotes("a sign 'OPEN'", ["OPEN", "Bar"]) == ["Bar"]
