"""What image models take, from a table."""

import pytest

from dataflow.errors import ConfigError
from dataflow.serving.model_limits import ModelLimits, limits_of


@pytest.mark.parametrize(
    ("model", "size", "problem"),
    [
        ("gpt-image-2", (1024, 1024), None),
        ("gpt-image-2", (3840, 2160), None),
        ("gpt-image-2", (2160, 3840), None),
        ("gpt-image-2", (2880, 2880), None),
        ("gpt-image-2", (480, 1440), None),
        ("gpt-image-2.5-flare-2026-09-08", (1536, 864), None),
        ("gpt-image-2", (1000, 1024), "multiples of 16"),
        ("gpt-image-2", (3856, 1600), "no side may have more than 3840"),
        ("gpt-image-2", (3200, 1040), "at most 3 times the shorter"),
        ("gpt-image-2", (1040, 3200), "at most 3 times the shorter"),
        ("gpt-image-2", (3072, 3072), "at most 8,294,400"),
        ("gpt-image-2", (512, 512), "at least 655,360"),
        ("gpt-image-1-mini", (1024, 1536), None),
        ("gpt-image-1-mini", (1024, 1040), "1024×1040 cannot be made: there are 1024×1024, 1536×1024 and 1024×1536"),
        ("gemini-2.5-flash-image", (1344, 768), None),
        ("gemini-2.5-flash-image", (1376, 768), "there are 1024×1024, 832×1248"),
        ("a-model-nobody-knows", (3, 100_000), None),
    ],
)
def test_sizes(model, size, problem):
    found = limits_of(model).size_problem(size)
    assert problem in found if problem else found is None


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        ("gemini-2.5-flash-image", (1536, 672), ("21:9", None)),
        ("gemini-3-pro-image", (3168, 1344), ("21:9", "2K")),
        ("gemini-3.1-flash-image", (512, 512), ("1:1", "512")),
        ("gemini-3.1-flash-image", (6144, 768), ("8:1", "2K")),
        ("gemini-3-pro-image", (1000, 1000), None),
        ("gpt-image-2", (1024, 1024), None),
    ],
)
def test_words_for_a_size(model, size, words):
    assert limits_of(model).words(size) == words


def test_no_two_words_make_the_same_size():
    for model in ("gemini-2.5-flash-image", "gemini-3-pro-image", "gemini-3.1-flash-image"):
        limits = limits_of(model)
        assert "16:9" in limits.aspect_ratios
        for ratio, sizes in limits.pixels.items():
            for name, size in zip(limits.image_sizes or (None,), sizes, strict=True):
                assert limits.words(size) == (ratio, name)


def test_what_else_is_known():
    gpt, gemini = limits_of("gpt-image-2"), limits_of("google/gemini-3-pro-image:free")
    assert (gpt.max_images, gpt.mask, gpt.max_prompt) == (16, True, 32_000)
    assert (gemini.max_images, gemini.mask, gemini.max_prompt) == (14, False, None)
    assert limits_of("a-model-nobody-knows") == ModelLimits()


def test_a_table_of_ones_own_is_laid_over_it(tmp_path):
    file = tmp_path / "models.toml"
    file.write_text('["gpt-image-2"]\nmax_images = 2\n["mine"]\nsizes = [[64, 32]]\nalso = ["ours"]\n')
    assert limits_of("gpt-image-2", file) == ModelLimits(max_images=2)
    assert limits_of("ours", file).sizes == ((64, 32),)
    assert limits_of("gpt-image-1.5", file) == limits_of("gpt-image-1.5")
    assert limits_of("x/y", {"x/y": {"max_ratio": 2}, "y": {"max_ratio": 3}}).max_ratio == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("mine = 3", "expected a table of limits under"),
        ("[mine]\nimages = 3", "no limit is called 'images'; there are"),
        ("[mine]\nmax_images = 0", "max_images must be a whole number from 1, got 0"),
        ("[mine]\nmax_images = true", "max_images must be a whole number"),
        ("[mine]\nmax_ratio = 0.5", "max_ratio must be a number from 1"),
        ("[mine]\nmax_ratio = nan", "max_ratio must be a number from 1"),
        ("[mine]\nmask = 1", "mask must be true or false"),
        ("[mine]\nsizes = []", "sizes must be a list of"),
        ("[mine]\nsizes = [[1]]", "sizes must be a list of"),
        ("[mine]\nsizes = [[1, 0]]", "sizes must be a whole number from 1"),
        ("[mine]\nimage_sizes = ['']", "image_sizes must be a list of words"),
        ("[mine]\npixels = 3", "pixels must be a table of aspect ratios"),
        ("[mine]\npixels = {'1:1' = [[1, 1], [2, 2]]}", "pixels must have 1 of each aspect ratio"),
        ("[mine]\nalso = 'x'", "also must be a list of names"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    file = tmp_path / "models.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        limits_of("mine", file)
    assert str(file) in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        limits_of("mine", tmp_path / "none.toml")
