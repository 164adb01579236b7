"""What a row says: prompts, images, overrides, and what is written back."""

from __future__ import annotations

import pytest

from dataflow.errors import InputError
from dataflow.operators.rows import image_paths, overrides, user_turns, with_images
from dataflow.types import Outcome


def user(content, **names) -> dict:
    return names or {"role": "user", "content": content}


class TestPrompts:
    @pytest.mark.parametrize(
        "value",
        [
            "a fox",
            {"role": "user", "content": "a fox"},
            [{"role": "user", "content": "a fox"}],
            [{"role": "USER", "content": "a fox"}],
            [{"from": "human", "value": "a fox"}],
            [{"content": "a fox"}],
            [{"role": "user", "content": [{"type": "text", "text": "a fox"}]}],
            [{"role": "system", "content": "draw well"}, {"role": "user", "content": "a fox"}],
            [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "here it is"}],
            [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "a fox"}],
            [{"role": "assistant", "content": None}, {"role": "user", "content": "a fox"}],
        ],
    )
    def test_the_prompt_is_what_the_user_says(self, value):
        assert user_turns({"c": value}, "c") == ["a fox"]

    def test_several_user_turns_keep_their_order(self):
        turns = [{"role": role, "content": text} for role, text in zip("uau", "abc", strict=True)]
        for turn in turns:
            turn["role"] = {"u": "user", "a": "assistant"}[turn["role"]]
        assert user_turns({"c": turns}, "c") == ["a", "c"]

    def test_parts_of_one_content_are_lines(self):
        parts = [{"type": "text", "text": "a fox"}, {"type": "text", "text": "in snow"}]
        assert user_turns({"c": [{"role": "user", "content": parts}]}, "c") == ["a fox\nin snow"]

    @pytest.mark.parametrize("text", ["狐", "🦊" * 100, "x" * 20_000, "a/../b\n\0c", "  spaces kept  "])
    def test_no_prompt_is_changed(self, text):
        assert user_turns({"c": text}, "c") == [text]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "expected a string or a list of messages, found NoneType None"),
            (7, "found int 7"),
            ([], "no user turn"),
            ([{"role": "system", "content": "x"}], "no user turn"),
            ("", "the prompt is empty"),
            (" \n ", "the prompt is empty"),
            ([{"role": "user", "content": "a"}, {"role": "user", "content": ""}], "the prompt is empty"),
            (["a fox"], "expected a message with role and content, found str 'a fox'"),
            ([{"role": 7, "content": "a"}], "a message's role must be text, found int 7"),
            ([{"role": "user"}], "a message's content must be text, found NoneType None"),
            ([{"role": "user", "content": {"text": "a"}}], "content must be text"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "text parts only"),
            ([{"role": "user", "content": ["a"]}], "text parts only"),
            ([{"role": "user", "content": 10**100}], r"found int 1000+\.\.\.$"),
        ],
    )
    def test_anything_else_is_told_with_its_column(self, value, message):
        with pytest.raises(InputError, match=message) as caught:
            user_turns({"c": value}, "c")
        assert caught.value.field == "c"

    def test_a_missing_column_is_told(self):
        with pytest.raises(InputError, match="the row has no such column") as caught:
            user_turns({}, "c")
        assert caught.value.field == "c"


class TestImages:
    @pytest.mark.parametrize(
        ("value", "paths"),
        [("a.png", ("a.png",)), (["a.png"], ("a.png",)), (["b.png", "", None, "a.png"], ("b.png", "a.png"))],
    )
    def test_one_path_or_a_list(self, value, paths):
        assert image_paths({"i": value}, "i") == paths

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({}, "no such column"),
            ({"i": None}, "names no input image"),
            ({"i": ""}, "names no input image"),
            ({"i": []}, "names no input image"),
            ({"i": [""]}, "names no input image"),
            ({"i": 7}, "expected an image path or a list of them, found int 7"),
            ({"i": [7]}, "expected an image path, found int 7"),
            ({"i": [{"path": "a.png"}]}, "expected an image path, found dict"),
            ({"i": "a\0.png"}, "NUL"),
        ],
    )
    def test_anything_else_is_told_with_its_column(self, row, message):
        with pytest.raises(InputError, match=message) as caught:
            image_paths(row, "i")
        assert caught.value.field == "i"


class TestOverrides:
    @pytest.mark.parametrize(
        ("row", "found"),
        [
            ({"prompt": "x", "steps": 4}, {}),
            ({"negative_prompt": "blur"}, {"negative_prompt": "blur"}),
            ({"seed": 0}, {"seed": 0}),
            ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
            ({"seed": "7"}, {"seed": 7}),
            ({"seed": " +7 "}, {"seed": 7}),
            ({"seed": 7.0}, {"seed": 7}),
            ({"seed": "7.0"}, {"seed": 7}),
            ({"width": 64, "height": 32.0}, {"size": (64, 32)}),
            ({"num_inference_steps": "20"}, {"params": {"num_inference_steps": 20}}),
            ({"guidance_scale": 3}, {"params": {"guidance_scale": 3.0}}),
            ({"guidance_scale": "3.5", "strength": 0}, {"params": {"guidance_scale": 3.5, "strength": 0.0}}),
            ({"guidance_scale": -1}, {"params": {"guidance_scale": -1.0}}),
        ],
    )
    def test_columns_override(self, row, found):
        assert overrides(row) == found

    @pytest.mark.parametrize("empty", [None, "", float("nan")])
    def test_an_empty_cell_overrides_nothing(self, empty):
        columns = ("negative_prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale")
        assert overrides(dict.fromkeys(columns, empty)) == {}

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("negative_prompt", 7, "expected text, found int 7"),
            ("seed", -1, "must be from 0 to 9223372036854775807, found int -1"),
            ("seed", 2**63, "must be from 0"),
            ("seed", "--5", "expected a number, found str '--5'"),
            ("seed", "9" * 5000, "expected a finite number|expected a number|must be from"),
            ("seed", "seven", "expected a number, found str 'seven'"),
            ("seed", 1.5, "expected a whole number, found float 1.5"),
            ("seed", "1.5", "expected a whole number, found str '1.5'"),
            ("seed", True, "expected a whole number, found bool True"),
            ("seed", [1], "expected a whole number, found list"),
            ("seed", "nan", "finite"),
            ("num_inference_steps", 0, "must be from 1 to 2147483647, found int 0"),
            ("num_inference_steps", 10**30, "must be from 1 to 2147483647"),
            ("num_inference_steps", 1e300, "must be from 1 to 2147483647"),
            ("guidance_scale", "much", "expected a number, found str 'much'"),
            ("guidance_scale", True, "expected a number, found bool True"),
            ("guidance_scale", {}, "expected a number, found dict"),
            ("guidance_scale", 10**400, "expected a number, found int"),
            ("guidance_scale", "inf", "expected a finite number, found 'inf'"),
        ],
    )
    def test_a_value_that_cannot_be_is_told_with_its_column(self, column, value, message):
        with pytest.raises(InputError, match=message) as caught:
            overrides({column: value})
        assert caught.value.field == column

    @pytest.mark.parametrize(("given", "missing"), [("width", "height"), ("height", "width")])
    def test_half_a_size_is_no_size(self, given, missing):
        with pytest.raises(InputError, match="must be given together") as caught:
            overrides({given: 64})
        assert caught.value.field == missing

    def test_a_size_of_no_picture_is_told(self):
        with pytest.raises(InputError, match="must be from 1"):
            overrides({"width": 0, "height": 64})


def made(*images: str) -> Outcome:
    return Outcome(request_id="", status="done", images=images)


def bad(status, reason) -> Outcome:
    return Outcome(request_id="", status=status, reason=reason, message="why")


class TestWritingBack:
    def test_images_of_all_samples_in_order(self):
        row = {"prompt": "x"}
        assert with_images(row, "out", [[made("a")], [made("b")]]) == {"prompt": "x", "out": ["a", "b"]}
        assert row == {"prompt": "x"}, "the row that was read stays as it is"

    def test_turns_have_a_column_of_their_own(self):
        assert with_images({}, "out", [[made("a"), made("b")], [made("c"), made("d")]]) == {
            "out": ["b", "d"],
            "out_turns": [["a", "b"], ["c", "d"]],
        }

    def test_a_failure_counts_before_a_refusal(self):
        row = with_images({}, "out", [[bad("refused", "refused")], [made("b")], [bad("failed", "crash")]])
        assert row == {"out": ["b"], "out_error": {"status": "failed", "reason": "crash", "message": "why"}}
        assert with_images({}, "out", [[bad("refused", "refused")]])["out_error"]["status"] == "refused"

    def test_words_of_an_earlier_step_in_the_same_columns_are_replaced(self):
        row = {"out": ["old"], "out_error": {"status": "failed"}, "out_turns": [["old"]]}
        assert with_images(row, "out", [[made("a")]]) == {"out": ["a"]}
