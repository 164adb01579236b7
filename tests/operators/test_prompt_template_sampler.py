"""Prompts from templates: what can be drawn, how often, and that nothing but content decides it."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.judging import QUIET, Desk

from dataflow.errors import ConfigError
from dataflow.operators.core_text import PromptTemplateSampler
from dataflow.operators.core_text.templates import Attributes, Template, TemplateError, pieces
from dataflow.runtime.engine import RunOptions

COLOURS = {"red": 1, "green": 2, "blue": 5}
ANIMALS = ["fox", "owl"]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def template(text, fixed=None, **attributes):
    return Template(text, Attributes.of(attributes), fixed or {})


def draws(found, number, key=b"x"):
    return list(itertools.islice(found.draws(key), number))


def sample(desk, rows, text="a {colour} {animal}", keys=None, **options):
    options = {"attributes": {"colour": COLOURS, "animal": ANIMALS}, **options}
    sampler = PromptTemplateSampler(text, options=QUIET, **options)
    summary = sampler.run(desk.storage(*rows), **(keys or {}))
    assert summary.balanced
    return summary, desk.table()


class TestDrawing:
    def test_the_first_draw_has_the_probabilities_of_the_weights(self):
        found = template("{colour}", colour=COLOURS)
        counts = Counter(draws(found, 1, b"%d" % seed)[0][0] for seed in range(4000))
        expected = [4000 * COLOURS[name] / 8 for name in COLOURS]
        assert chisquare([counts[name] for name in COLOURS], expected).pvalue > 0.001

    def test_the_second_draw_has_those_that_are_left(self):
        found = template("{colour}", colour=COLOURS)
        pairs = Counter(tuple(text for text, _ in draws(found, 2, b"%d" % seed)) for seed in range(4000))
        orders = list(itertools.permutations(COLOURS, 2))
        expected = [4000 * COLOURS[a] / 8 * COLOURS[b] / (8 - COLOURS[a]) for a, b in orders]
        assert chisquare([pairs[each] for each in orders], expected).pvalue > 0.001

    def test_combinations_of_nested_attributes_have_the_products(self):
        found = template("{thing}", thing={"a {size} cat": 3, "dog": 1}, size={"big": 1, "small": 2})
        counts = Counter(draws(found, 1, b"%d" % seed)[0][0] for seed in range(3000))
        expected = {"a big cat": 750, "a small cat": 1500, "dog": 750}
        assert chisquare([counts[name] for name in expected], list(expected.values())).pvalue > 0.001

    @given(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        weights=st.lists(st.floats(1e-6, 1e6), min_size=16, max_size=16),
        key=st.binary(max_size=8),
    )
    @settings(max_examples=60, deadline=None)
    def test_nothing_comes_twice_while_there_is_something_new(self, sizes, weights, key):
        weighted = iter(weights)
        attributes = {f"n{at}": {f"{at}.{v}": next(weighted) for v in range(size)} for at, size in enumerate(sizes)}
        found = template(" ".join(f"{{n{at}}}" for at in range(len(sizes))), **attributes)
        total = math.prod(sizes)
        texts = [text for text, _ in draws(found, 2 * total, key)]
        assert len(set(texts[:total])) == len(set(texts[total:])) == total
        assert sorted(texts[:total]) == sorted(text for text, _ in found.all())
        assert found.most() == total
        assert draws(found, 2 * total, key)[:1] == draws(found, 1, key)

    def test_a_value_more_changes_only_the_draws_it_wins(self):
        few, more = template("{a}", a=["x", "y", "z"]), template("{a}", a=["w", "z", "y", "x"])
        changed = 0
        for seed in range(300):
            [(before, _)], [(after, _)] = draws(few, 1, b"%d" % seed), draws(more, 1, b"%d" % seed)
            assert after in (before, "w")
            changed += after == "w"
        assert 45 < changed < 110

    def test_many_combinations_are_drawn_from_quickly(self):
        skewed = {str(value): 1e6 if value == 0 else 1 for value in range(50)}
        found = template(" ".join(f"{{n{at}}}" for at in range(8)), **{f"n{at}": skewed for at in range(8)})
        assert found.most() == 50**8
        assert len({text for text, _ in draws(found, 500)}) == 500

    def test_equal_texts_count_once(self):
        found = template("{a} {b}", a=["x", "x y"], b=["y z", "z"])
        assert [text for text, _ in found.all()] == ["x y z", "x z", "x y y z"]
        assert len({text for text, _ in draws(found, 3)}) == 3


class TestTemplates:
    def test_the_same_name_has_the_same_value_and_another_draw_its_own(self):
        same = template("{colour} on {colour}", colour=COLOURS)
        assert all(text.split(" on ")[0] == text.split(" on ")[1] for text, _ in draws(same, 3))
        other = template("{colour} on {colour#2}", colour=COLOURS)
        assert len(list(other.all())) == 9
        assert dict(draws(other, 1)[0][1]).keys() == {"colour", "colour#2"}

    def test_braces_of_the_text(self):
        assert draws(template("{{a}} {b}", b=["x"]), 1)[0][0] == "{a} x"

    @pytest.mark.parametrize("text", ["a {", "a }", "{a", "{}", "{ }", "{a{b}}", "{#2}", "{a#}"])
    def test_what_is_no_template(self, text):
        with pytest.raises(TemplateError):
            pieces(text)

    def test_the_users_own_text_is_no_template(self):
        found = template("{subject} in {colour}", {"subject": "a {colour} cat }{"}, colour=["red"])
        assert draws(found, 1)[0] == ("a {colour} cat }{ in red", (("colour", "red"),))

    @pytest.mark.parametrize(
        ("attributes", "told"),
        [
            ({"a": ["{b}"], "b": ["{c}"], "c": ["x", "{a}"]}, "in a circle: a → b → c → a"),
            ({"a": ["{a} {a}"]}, "in a circle: a → a"),
            ({"a": ["{wrong}"]}, "attribute 'a' names 'wrong', which is no attribute; there are 'a'"),
            ({"a": []}, "'a' has no values"),
            ({"a": {}}, "'a' has no values"),
            ({"a": "red"}, "must be a list of values"),
            ({"a": 3}, "must be a list of values"),
            ({"a": ["x", "x"]}, "'x' twice"),
            ({"a": {"x": 0}}, "the weight of 'x' must be a number above 0, got 0"),
            ({"a": {"x": -1}}, "must be a number above 0"),
            ({"a": {"x": math.nan}}, "must be a number above 0"),
            ({"a": {"x": math.inf}}, "must be a number above 0"),
            ({"a": {"x": True}}, "must be a number above 0"),
            ({"a": {"x": "2"}}, "must be a number above 0"),
            ({"a": {"x": 1e308, "y": 1e-308}}, "too small beside 1e+308"),
            ({"a": [None]}, "a value must be text or a number"),
            ({"a": [True]}, "a value must be text or a number"),
            ({"a{": ["x"]}, "no name of an attribute"),
            ({"a#2": ["x"]}, "no name of an attribute"),
            ({"a": ["{"]}, "a brace without its partner"),
        ],
    )
    def test_attributes_that_make_no_sense(self, attributes, told):
        with pytest.raises(ConfigError) as caught:
            PromptTemplateSampler("{a}", attributes=attributes)
        assert told in str(caught.value)


class TestStep:
    def test_each_row_becomes_its_samples(self, desk):
        summary, table = sample(desk, [{"id": 1}, {"id": 2}], samples=4)
        assert (summary.rows, summary.done, summary.written, len(table)) == (2, 2, 8, 8)
        assert [row["id"] for row in table] == [1] * 4 + [2] * 4
        for row in table:
            drawn = row["attributes"]
            assert row["prompt"] == f"a {drawn['colour']} {drawn['animal']}"
        assert len({row["prompt"] for row in table[:4]}) == 4

    def test_more_samples_than_combinations_begin_anew(self, desk):
        _, table = sample(desk, [{}], samples=15)
        counts = Counter(row["prompt"] for row in table)
        assert sorted(counts.values()) == [2, 2, 2, 3, 3, 3]

    @given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
    @settings(max_examples=15, deadline=None)
    def test_rows_may_come_go_and_move(self, tmp_path_factory, order, gone):
        def drawn(numbers):
            _, table = sample(Desk(tmp_path_factory.mktemp("d")), [{"id": number} for number in numbers], samples=3)
            return {number: [row["prompt"] for row in table if row["id"] == number] for number in numbers}

        everything = drawn(range(6))
        kept = [number for number in order if number not in gone]
        if kept:
            assert drawn(kept) == {number: everything[number] for number in kept}

    def test_more_samples_keep_those_there_were_and_another_seed_draws_others(self, desk):
        rows = [{"id": number} for number in range(20)]
        _, few = sample(desk, rows, samples=2)
        _, more = sample(desk, rows, samples=4)
        assert [row["prompt"] for row in more if row in few] == [row["prompt"] for row in few]
        _, other = sample(desk, rows, samples=2, seed=1)
        assert [row["prompt"] for row in other] != [row["prompt"] for row in few]

    def test_every_combination_in_order(self, desk):
        summary, table = sample(desk, [{}], exhaustive=True)
        assert [row["prompt"] for row in table] == [f"a {c} {a}" for c in COLOURS for a in ANIMALS]
        assert summary.written == 6

    def test_too_many_combinations_are_told_before(self, desk):
        attributes = {f"n{at}": [str(value) for value in range(100)] for at in range(4)}
        text = " ".join(f"{{{name}}}" for name in attributes)
        summary, table = sample(desk, [{}], text, attributes=attributes, exhaustive=True)
        assert (summary.reasons, table) == ({"too_many_combinations": 1}, [])
        [dropped] = [json.loads(line) for line in desk.store.dropped_path.read_text().splitlines()]
        assert "100,000,000" in dropped["error"]

    def test_templates_texts_and_numbers_of_the_rows_own(self, desk):
        rows = [
            {"t": "{subject}, {颜色}", "subject": "一只猫 {x}", "n": 2},
            {"t": "only {subject}", "subject": 7, "n": 1},
            {"t": "{nobody}", "subject": "x"},
            {"t": "{subject", "subject": "x"},
            {"t": None, "subject": "x"},
            {"t": "{subject}", "subject": ""},
            {"t": "{subject}", "subject": "x", "n": 0},
            {"t": "{subject}", "subject": "x", "n": "many"},
            "{broken",
        ]
        table = desk.folder / "in.jsonl"
        keys = {"input_template_key": "t", "input_value_keys": ["subject"], "input_samples_key": "n"}
        storage = desk.storage({})
        table.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        sampler = PromptTemplateSampler(attributes={"颜色": ["红", "蓝"]}, options=QUIET)
        summary = sampler.run(storage, **keys)
        found = desk.table()
        assert {row["prompt"] for row in found[:2]} == {"一只猫 {x}, 红", "一只猫 {x}, 蓝"}
        assert [row["prompt"] for row in found[2:]] == ["only 7"]
        assert found[2]["attributes"] == {}
        assert summary.balanced
        assert (summary.rows, summary.done, summary.failed, summary.dropped, summary.written) == (9, 2, 1, 6, 3)
        assert summary.reasons == {"bad_input": 3, "bad_template": 2, "no_samples": 1, "bad_row": 1}
        dropped = [json.loads(line) for line in desk.store.dropped_path.read_text().splitlines()]
        assert "names 'nobody', which is no attribute; there are 'subject', '颜色'" in dropped[0]["error"]
        assert "column 'subject'" in dropped[3]["error"]

    def test_attributes_from_a_file(self, desk):
        file = desk.folder / "attributes.toml"
        file.write_text('colour = ["red"]\nunused = ["x"]\n[animal]\n"snow leopard" = 3\n"{kind} fox" = 1\n')
        with pytest.raises(ConfigError, match=r"attributes.toml: attribute 'animal' names 'kind'"):
            PromptTemplateSampler("a {animal}", attribute_file=file)
        file.write_text(file.read_text().replace("unused", "kind"))
        _, table = sample(desk, [{}], "a {animal}", attributes=None, attribute_file=file, exhaustive=True)
        assert [row["prompt"] for row in table] == ["a snow leopard", "a x fox"]
        own = {"size": ["{colour} big"]}
        _, table = sample(desk, [{}], "a {size} {animal}", attributes=own, attribute_file=file, exhaustive=True)
        assert table[0]["prompt"] == "a red big snow leopard"
        file.write_text("colour = [")
        with pytest.raises(ConfigError, match="no attributes can be read"):
            PromptTemplateSampler("a {animal}", attribute_file=file)
        with pytest.raises(ConfigError, match="no attributes can be read"):
            PromptTemplateSampler("a {animal}", attribute_file=desk.folder / "gone.toml")

    @pytest.mark.parametrize(
        ("text", "options", "keys", "told"),
        [
            ("a {colour}", {}, {}, "does not use the attribute 'animal'"),
            ("a {colour} {animal} {wrong}", {}, {}, "names 'wrong'"),
            ("a {colour} {animal}", {}, {"input_template_key": "t"}, "give a template, or"),
            (None, {}, {}, "give a template, or"),
            ("a {colour} {animal}", {}, {"input_value_keys": ["colour"]}, "it can be only one"),
            ("a {colour} {animal}", {"samples": 0}, {}, "samples must be"),
        ],
    )
    def test_what_makes_no_sense(self, text, options, keys, told):
        attributes = {"colour": COLOURS, "animal": ANIMALS}
        with pytest.raises(ConfigError) as caught:
            PromptTemplateSampler(text, attributes=attributes, **options).plan(**keys)
        assert told in str(caught.value)

    def test_an_attribute_that_no_row_uses_is_warned_of(self, desk, caplog):
        sampler = PromptTemplateSampler(attributes={"colour": ["red"], "size": ["big"]}, options=QUIET)
        sampler.run(desk.storage({"t": "{colour}"}, {"t": 3}), "t")
        assert "no template uses 'size'" in caplog.text

    def test_the_sum_says_how_many_rows_were_written(self, desk, capsys):
        sampler = PromptTemplateSampler("{a}", attributes={"a": ["x", "y"]}, samples=2, options=RunOptions())
        sampler.run(desk.storage({}, {}))
        assert "2 rows = 2 done" in capsys.readouterr().err.replace("\n", " ")

    def test_balance_can_be_measured(self, desk):
        _, table = sample(desk, [{"id": number} for number in range(2000)], samples=1)
        counts = Counter(row["attributes"]["colour"] for row in table)
        assert np.allclose([counts[name] / 2000 for name in COLOURS], [1 / 8, 2 / 8, 5 / 8], atol=0.04)
