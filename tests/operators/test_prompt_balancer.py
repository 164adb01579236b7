"""Rows by category: the numbers that were wanted, chosen by content, and what is missing is said."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.judging import QUIET, Desk

from dataflow.errors import ConfigError
from dataflow.operators.core_text import PromptBalancer
from dataflow.operators.core_text.prompt_balancer import apportioned

ROWS = [{"prompt": f"{name} {number}", "category": name} for name, count in (("cat", 30), ("dog", 10), ("owl", 5))
        for number in range(count)]  # fmt: skip


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def run(desk, rows=ROWS, key="category", **options):
    balancer = PromptBalancer(options=QUIET, **options)
    summary = balancer.run(desk.storage(*rows), key, "prompt")
    assert summary.balanced
    return balancer, summary, desk.table()


def counts(table):
    return dict(Counter(row["category"] for row in table))


def test_at_most_so_many_of_each(desk):
    balancer, summary, table = run(desk, maximum=8)
    assert counts(table) == {"cat": 8, "dog": 8, "owl": 5}
    assert summary.reasons == {"over_quota": 24}
    assert balancer.shortfalls == {}
    dropped = [json.loads(line) for line in desk.store.dropped_path.read_text().splitlines()]
    assert Counter(each["category"] for each in dropped) == {"cat": 22, "dog": 2}


def test_quotas_and_what_is_missing(desk, caplog):
    balancer, summary, table = run(desk, quotas={"cat": 4, "owl": 9, "fox": 2})
    assert counts(table) == {"cat": 4, "owl": 5}
    assert summary.reasons == {"over_quota": 26, "not_wanted": 10}
    assert balancer.shortfalls == {"owl": 4, "fox": 2}
    assert "'owl': 4 rows of 9 that are wanted are missing" in caplog.text


def test_shares_of_a_total_and_of_all_there_can_be(desk, caplog):
    _, _, table = run(desk, shares={"cat": 3, "dog": 1, "owl": 1}, total=20)
    assert counts(table) == {"cat": 12, "dog": 4, "owl": 4}
    _, _, table = run(desk, shares={"cat": 2, "dog": 2, "owl": 1})
    assert counts(table) == {"cat": 10, "dog": 10, "owl": 5}
    balancer, _, _ = run(desk, shares={"cat": 0.5, "owl": 0.5}, total=20)
    assert balancer.shortfalls == {"owl": 5}
    _, _, table = run(desk, shares={"cat": 1, "fox": 1})
    assert table == []
    assert "there is none of fox" in caplog.text


def test_content_decides_and_not_the_place(desk):
    kept = {row["prompt"] for row in run(desk, maximum=4)[2]}
    assert {row["prompt"] for row in run(desk, ROWS[::-1], maximum=4)[2]} == kept
    assert kept < {row["prompt"] for row in run(desk, maximum=6)[2]}
    assert {row["prompt"] for row in run(desk, maximum=4, seed=1)[2]} != kept
    rows = [row | {"note": 1} for row in ROWS]
    assert {row["prompt"] for row in run(desk, rows, maximum=4)[2]} == kept
    more = run(desk, [{"prompt": "cat new", "category": "cat"}, *ROWS], maximum=4)[2]
    assert len({row["prompt"] for row in more} - kept) <= 1


def test_every_row_is_chosen_as_often_as_any_other(desk):
    often = Counter(row["prompt"] for seed in range(60) for row in run(desk, ROWS[:30], maximum=10, seed=seed)[2])
    assert sum(often.values()) == 600
    assert sum((often[row["prompt"]] - 20) ** 2 / 20 for row in ROWS[:30]) < 60


def test_equal_prompts_are_different_rows(desk):
    assert len(run(desk, [ROWS[0]] * 5, maximum=3)[2]) == 3


def test_fields_numbers_and_rows_without_a_category(desk):
    rows = [
        {"prompt": "a", "attributes": {"style": "oil"}},
        {"prompt": "b", "attributes": {"style": 3}},
        {"prompt": "c", "attributes": {"style": True}},
        {"prompt": "d", "attributes": {"style": 0.5}},
        *({"prompt": "e", "attributes": value} for value in (None, {}, "oil", {"style": None}, {"style": ["oil"]})),
        {"prompt": "f", "attributes": {"style": math.nan}},
        {"prompt": "g", "attributes": {"style": " "}},
    ]
    storage = desk.storage({})
    lines = [json.dumps(row).replace("NaN", "null") for row in rows]
    (desk.folder / "in.jsonl").write_text("\n".join([*lines, "{broken"]))
    quotas = {"oil": 1, "3": 1, "true": 1, "0.5": 1}
    summary = PromptBalancer(quotas=quotas, options=QUIET).run(storage, "attributes.style", "prompt")
    assert [row["prompt"] for row in desk.table()] == ["a", "b", "c", "d"]
    assert summary.reasons == {"no_category": 7, "bad_row": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximum": 3, "quotas": {"a": 1}},
        {"maximum": 0},
        {"maximum": 3, "total": 4},
        {"shares": {"a": 1}, "total": 0},
        {"shares": {"a": 0}},
        {"shares": {"a": True}},
        {"shares": {}},
        {"quotas": {"a": -1}},
        {"quotas": {"a": 1.5}},
    ],
)
def test_what_makes_no_sense(options):
    with pytest.raises(ConfigError):
        PromptBalancer(**options)


@given(st.dictionaries(st.text(max_size=3), st.floats(1e-3, 1e3), min_size=1, max_size=9), st.integers(0, 10_000))
def test_shares_become_whole_numbers_with_the_right_sum(shares, total):
    numbers = apportioned(shares, total)
    whole = math.fsum(shares.values())
    assert sum(numbers.values()) == total
    assert all(abs(numbers[name] - total * share / whole) < 1.001 for name, share in shares.items())
