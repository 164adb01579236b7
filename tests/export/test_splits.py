"""Splits: never two of one prompt apart, and nothing moves when rows are added."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.export import ExportOptions
from dataflow.export.samples import Sample
from dataflow.export.splits import Splitter, share_of


def sample(prompt: str, row: int = 1, number: int = 0) -> Sample:
    return Sample(row=row, number=number, prompt=prompt, slots=(), values={})


def split_of(options: ExportOptions, prompt: str, **place: int) -> str:
    return Splitter(options, lambda path: path).split(sample(prompt, **place))


SHARES = st.tuples(st.floats(0, 0.5), st.floats(0, 0.5))


@given(prompts=st.lists(st.text(max_size=12), max_size=30), shares=SHARES, seed=st.integers(-(2**62), 2**62))
@settings(max_examples=200, deadline=None)
def test_one_prompt_is_in_one_split_wherever_it_stands(prompts, shares, seed):
    options = ExportOptions(validation=shares[0], test=shares[1], split_seed=seed)
    found = defaultdict(set)
    for row, prompt in enumerate(prompts):
        for number in range(3):
            found[prompt].add(split_of(options, prompt, row=row, number=number))
    assert all(len(splits) == 1 for splits in found.values())
    # Another table with some of the same prompts: they stay where they were.
    for row, prompt in enumerate(reversed(prompts[::2])):
        assert {split_of(options, prompt, row=row + 7)} == found[prompt]


@pytest.mark.parametrize(
    ("first", "second"),
    [("A  red fox.", "a red fox"), ("Ａ fox", "a fox"), ("ein Fuß", "EIN FUSS"), ("一只狐狸。", "一只狐狸")],
)
def test_prompts_that_differ_in_case_or_marks_are_one(first, second):
    for seed in range(40):
        options = ExportOptions(validation=0.3, test=0.3, split_seed=seed)
        assert split_of(options, first) == split_of(options, second)


def test_shares_are_kept_and_a_larger_test_set_only_grows():
    prompts = [f"prompt {number}" for number in range(4000)]
    small = {p for p in prompts if split_of(ExportOptions(test=0.1), p) == "test"}
    large = {p for p in prompts if split_of(ExportOptions(test=0.2), p) == "test"}
    assert small < large
    assert 320 < len(small) < 480
    assert 700 < len(large) < 900
    assert len({p for p in prompts if split_of(ExportOptions(test=0.1, split_seed=1), p) == "test"} & small) < 80


def test_everything_may_be_test():
    assert {split_of(ExportOptions(test=1), f"{number}") for number in range(50)} == {"test"}
    assert Splitter(ExportOptions(test=1), str).names == ("test",)
    assert 0 <= share_of(0, "") < 1


def lines(shop) -> dict[str, list[dict]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in shop.out.glob("*.jsonl")
        if path.stem != "left_out"
    }


def test_a_column_may_decide(shop):
    shop.export(shop.scored(12, 2), format="jsonl", validation=0.3, test=0.3, split_by="topic")
    topics = {split: {each["topic"] for each in found} for split, found in lines(shop).items()}
    everything = [topic for found in topics.values() for topic in found]
    assert len(everything) == len(set(everything)) == 2


def test_rows_without_a_group_are_left_out(shop):
    table = shop.table([shop.row(0, 1), shop.row(1, 1) | {"topic": None}])
    assert shop.export(table, format="jsonl", test=0.5, split_by="topic").left_out == {"no_group": 1}


def test_the_same_source_under_two_names_is_one_source(shop):
    rows = []
    for number in range(12):
        source = shop.file(f"copy{number}.png", number // 2)
        rows.append({"prompt": f"edit {number}", "images": [source], "edited_images": [shop.picture(50 + number, "x")]})
    shop.export(shop.table(rows), format="jsonl", validation=0.3, test=0.3, split_by="source")
    sources = [{each["source_sha256"] for each in found} for found in lines(shop).values()]
    assert len(sources) > 1
    assert sum(map(len, sources)) == len(set.union(*sources)) == 6


def test_adding_rows_moves_nothing(shop, tmp_path):
    shop.export(shop.scored(10, 2), format="jsonl", validation=0.3, test=0.3)
    before = {each["sha256"]: split for split, found in lines(shop).items() for each in found}
    rows = [shop.row(number, 2) for number in (30, 31, *range(10), 32)]
    shop.export(shop.table(rows), format="jsonl", validation=0.3, test=0.3, overwrite=True)
    after = {each["sha256"]: split for split, found in lines(shop).items() for each in found}
    assert len(after) == 26
    assert {sha: after[sha] for sha in before} == before
