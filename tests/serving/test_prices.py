"""What a call cost."""

import pytest

from dataflow.errors import ConfigError
from dataflow.serving.prices import Rates, Tokens, dollars, rates_of, tokens

ALL = Rates(text_input=5.0, image_input=8.0, text_output=2.5, image_output=30.0, image=0.04)


def test_the_packages_own_table_gives_the_published_price_of_an_image():
    rates = rates_of("gemini-2.5-flash-image-preview")
    assert dollars(rates, {"candidatesTokenCount": 1290, "promptTokenCount": 0}, 1) == pytest.approx(0.0387)
    assert dollars(rates_of("gemini-3-pro-image"), {}, 2) == pytest.approx(0.268)
    assert rates_of("a-model-nobody-knows") is None


@pytest.mark.parametrize("name", ["gemini-3-pro-image", "google/gemini-3-pro-image", "google/gemini-3-pro-image:free"])
def test_resellers_names_are_found(name):
    assert rates_of(name) == rates_of("gemini-3-pro-image") is not None


def test_a_table_of_ones_own_is_laid_over_it(tmp_path):
    file = tmp_path / "prices.toml"
    file.write_text('["gemini-3-pro-image"]\nimage = 0.1\n["mine"]\ntext_input = 1\nalso = ["ours"]\n')
    assert rates_of("gemini-3-pro-image", file) == Rates(image=0.1)
    assert rates_of("ours", file) == Rates(text_input=1)
    assert rates_of("gemini-2.5-flash-image", file) == rates_of("gemini-2.5-flash-image")
    assert rates_of("x/y", {"x/y": {"image": 1}, "y": {"image": 2}}) == Rates(image=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("mine = 3", "expected a table of prices under"),
        ("[mine]\nimages = 3", "no price is called 'images'; there are"),
        ("[mine]\nimage = -1", "must be dollars, 0 or more, got -1"),
        ("[mine]\nimage = true", "must be dollars"),
        ("[mine]\nimage = inf", "must be dollars"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, message):
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        rates_of("mine", file)
    assert "prices.toml" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        rates_of("mine", tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({}, None),
        ({"total_tokens": 7}, None),
        (
            {
                "input_tokens": 30,
                "input_tokens_details": {"text_tokens": 10, "image_tokens": 20},
                "output_tokens": 100,
            },
            Tokens(text_input=10, image_input=20, image_output=100),
        ),
        ({"prompt_tokens": 12, "completion_tokens": 1290}, Tokens(text_input=12, image_output=1290)),
        (
            {"prompt_tokens": 12, "completion_tokens": 1300, "completion_tokens_details": {"image_tokens": 1290}},
            Tokens(text_input=12, text_output=10, image_output=1290),
        ),
        (
            {
                "promptTokenCount": 270,
                "promptTokensDetails": [
                    {"modality": "TEXT", "tokenCount": 12},
                    {"modality": "IMAGE", "tokenCount": 258},
                ],
                "candidatesTokenCount": 1295,
                "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 5}],
                "thoughtsTokenCount": 40,
            },
            Tokens(text_input=12, image_input=258, text_output=45, image_output=1290),
        ),
        (
            {"prompt_tokens": 12, "completion_tokens": 40, "completion_tokens_details": {"image_tokens": 0}},
            Tokens(text_input=12, text_output=40),
        ),
        ({"input_tokens": "many", "output_tokens": None, "input_tokens_details": 3}, Tokens()),
    ],
)
def test_tokens_of_every_service(usage, expected):
    assert tokens(usage) == expected


def test_the_services_own_figure_goes_first():
    assert dollars(None, {"cost": 0.5, "output_tokens": 1}, 1) == 0.5
    assert dollars(ALL, {"cost": "free"}, 3) == pytest.approx(0.12)


def test_tokens_need_a_rate_of_every_kind_that_was_counted():
    usage = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
    assert dollars(ALL, usage, 1) == pytest.approx(35.0)
    assert dollars(ALL, usage, 1, discount=0.5) == pytest.approx(17.5)
    assert dollars(Rates(image_output=30.0), usage, 1) is None
    assert dollars(Rates(image_output=30.0, image=0.04), usage, 2) == pytest.approx(0.08)
    words = {"output_tokens": 1_000_000}
    assert dollars(Rates(image_output=30.0, text_output=2.5), words, 0) == pytest.approx(2.5)
    assert dollars(Rates(image_output=30.0), words, 0) is None
    assert dollars(None, usage, 1) is None
