"""Cosines by hand, their edge cases, and torchmetrics' CLIPScore over a tiny CLIP of random weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dataflow.metrics import alignment

FINITE = st.floats(-1e6, 1e6, width=32)


def test_cosine_of_known_angles():
    assert alignment.cosine([1, 0], [[1, 0], [0, 1], [-2, 0], [1, 1]]) == pytest.approx([1, 0, -1, math.sqrt(0.5)])


def test_cosine_answers_float64_rows():
    answer = alignment.cosine(np.ones(3, dtype=np.float16), np.ones((2, 3), dtype=np.float32))
    assert answer.dtype == np.float64
    assert answer.shape == (2,)


def test_cosine_of_tiny_and_huge_rows():
    assert alignment.cosine([1e-200, 1e-200], [1e200, 1e200]) == pytest.approx([1.0])


@given(hnp.arrays(np.float32, (3, 4), elements=FINITE), hnp.arrays(np.float32, (3, 4), elements=FINITE))
def test_cosine_is_symmetric_bounded_and_blind_to_length(first, second):
    if not (np.abs(first).max(axis=1).all() and np.abs(second).max(axis=1).all()):
        return
    answer = alignment.cosine(first, second)
    assert np.all(np.abs(answer) <= 1)
    assert answer == pytest.approx(alignment.cosine(second, first), abs=1e-12)
    assert answer == pytest.approx(alignment.cosine(first * np.float64(7.5), second), abs=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_without_direction_is_named(bad):
    rows = np.ones((4, 2))
    rows[2] = bad
    with pytest.raises(ValueError, match=r"images.*row 2|first.*row 2"):
        alignment.cosine(rows, [1, 1])


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1, 2, 3]), (np.ones((2, 2)), np.ones((3, 2))), ([], [])])
def test_shapes_that_do_not_fit(first, second):
    with pytest.raises(ValueError):
        alignment.cosine(first, second)


def test_clip_scores_scale_and_clamp():
    images, texts = [[3, 4], [1, 0]], [[3, 4], [-1, 0]]
    assert alignment.clip_score(images, texts) == pytest.approx([100, 0])
    assert alignment.clip_score(images, texts, clamp=False) == pytest.approx([100, -100])
    assert alignment.clip_score_hessel(images, texts) == pytest.approx([2.5, 0])


def test_image_similarity_is_the_cosine():
    assert alignment.image_similarity([1, 0], [1, 1]) == pytest.approx([math.sqrt(0.5)])


def test_directional_similarity_by_hand():
    # From east to north in the picture; the captions turn the same way, the opposite way, and not at all.
    answer = alignment.directional_similarity([1, 0], [0, 5], [[1, 0], [0, 1], [1, 0]], [[0, 1], [1, 0], [2, 0]])
    assert answer[0] == pytest.approx(1)
    assert answer[1] == pytest.approx(-1)
    assert answer[2] is None


def test_an_unchanged_image_has_no_direction():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(1, 512)).astype(np.float32)
    rounded = (before * np.float32(3)).astype(np.float32)
    assert alignment.directional_similarity(before, rounded, [1.0] + [0.0] * 511, [0.0, 1.0] + [0.0] * 510) == [None]


def test_directional_similarity_against_the_formula():
    rng = np.random.default_rng(1)
    i0, i1, t0, t1 = rng.normal(size=(4, 6, 16))
    expected = []
    for rows in zip(i0, i1, t0, t1, strict=True):
        a, b, c, d = (row / math.sqrt(sum(x * x for x in row)) for row in rows)
        image, text = b - a, d - c
        expected.append(image @ text / math.sqrt((image @ image) * (text @ text)))
    assert alignment.directional_similarity(i0, i1, t0, t1) == pytest.approx(expected, abs=1e-12)


def test_torchmetrics_clip_score_of_a_tiny_random_clip():
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal", reason="torchmetrics is the oracle here")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    clip = transformers.CLIPModel(config).eval()

    class PooledClip:
        """What torchmetrics expects of a model; transformers 5 wraps the embeddings in an object."""

        config = SimpleNamespace()

        def to(self, device):
            return self

        @torch.inference_mode()
        def get_image_features(self, pixels):
            return clip.get_image_features(pixels).pooler_output

        @torch.inference_mode()
        def get_text_features(self, ids, mask):
            return clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def process(text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        ids = torch.tensor([[ord(letter) - 32 for letter in line[:15].ljust(15)] + [99] for line in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model = PooledClip()
    pictures = torch.rand(5, 3, 32, 32)
    lines = ["a red cube", "two cats", "nothing", "a dog left of a cat", "HELLO"]
    oracle = multimodal.clip_score(pictures, lines, model_name_or_path=lambda: (model, process))
    images = model.get_image_features(process(images=list(pictures))["pixel_values"]).numpy()
    ids = process(text=lines)
    texts = model.get_text_features(ids["input_ids"], ids["attention_mask"]).numpy()
    ours = max(alignment.clip_score(images, texts, clamp=False).mean(), 0.0)
    assert ours == pytest.approx(float(oracle), abs=2e-5)
    single = [
        float(multimodal.clip_score(pictures[i], lines[i], model_name_or_path=lambda: (model, process)))
        for i in range(len(lines))
    ]
    assert alignment.clip_score(images, texts) == pytest.approx(single, abs=2e-5)
