"""The scenes the built-in model is trained on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from training.data import LABEL_SIZES, draw
from training.scenes import (
    BACKGROUNDS,
    OPERATIONS,
    SIZE,
    is_held_out,
    random_edit,
    random_prompt,
    relation_between,
    render,
)


def test_training_never_shows_a_held_out_combination() -> None:
    rng = random.Random(1)
    assert not any(is_held_out(random_prompt(rng).scene) for _ in range(300))
    for _ in range(300):
        edit = random_edit(rng)
        assert not is_held_out(edit.before)
        assert not is_held_out(edit.after)


def test_held_out_samples_are_held_out() -> None:
    rng = random.Random(2)
    assert all(is_held_out(random_prompt(rng, held_out=True).scene) for _ in range(50))
    assert all(is_held_out(random_edit(rng, held_out=True).after) for _ in range(50))


def test_a_caption_names_what_the_scene_holds() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt = random_prompt(rng)
        assert all(thing.name in prompt.text for thing in prompt.scene.things)
        assert prompt.scene.background in prompt.text or prompt.scene.background == "white"


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_an_edit_changes_only_what_it_names(operation: str) -> None:
    rng = random.Random(4)
    for _ in range(50):
        edit = random_edit(rng, operation=operation)
        before, after = edit.before, edit.after
        assert before != after
        if operation == "background":
            assert replace(before, background=after.background) == after
        else:
            assert before.background == after.background
            assert len(set(before.things) ^ set(after.things)) == (1 if operation in ("add", "remove") else 2)


def test_relation_is_read_from_rows_and_columns() -> None:
    rng = random.Random(5)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above", None: None}
    for _ in range(100):
        scene = random_prompt(rng, count=2).scene
        first, second = scene.things
        assert relation_between(second, first) == opposite[relation_between(first, second)]


def test_a_picture_has_its_background_in_the_corner_or_a_thing_there() -> None:
    rng = random.Random(6)
    scenes = [random_prompt(rng, count=1).scene for _ in range(20)]
    pictures, masks = render(scenes)
    assert pictures.shape == (20, 3, SIZE, SIZE)
    assert masks.shape == (20, 2, SIZE, SIZE)
    for scene, picture, mask in zip(scenes, pictures, masks, strict=True):
        empty = mask.sum(0) == 0
        colour = torch.tensor(BACKGROUNDS[scene.background]) / 255
        assert torch.allclose(picture[:, empty], colour[:, None].expand(-1, int(empty.sum())))


@pytest.mark.parametrize("kind", ["t2i", "edit"])
def test_samples_carry_labels_in_range(kind: str) -> None:
    sample = draw(random.Random(7), kind, 32)
    assert sample["labels"].shape == (32, len(LABEL_SIZES))
    assert (sample["labels"] <= torch.tensor(LABEL_SIZES)).all()
    assert sample["image"].shape == (32, 3, SIZE, SIZE)
    assert ("before" in sample) == (kind == "edit")
