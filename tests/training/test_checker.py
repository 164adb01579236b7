"""The rules by which the built-in model is measured."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from training.checker import edited, look, shows
from training.data import to_bytes
from training.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Meaning,
    Scene,
    Thing,
    caption,
    random_edit,
    random_prompt,
    random_scene,
    render,
)


def picture(scene: Scene) -> np.ndarray:
    return to_bytes(render([scene])[0])[0].permute(1, 2, 0).numpy()


def other(values: tuple[str, ...], than: str) -> str:
    return next(value for value in values if value != than)


def test_every_true_picture_passes() -> None:
    rng = random.Random(1)
    for _ in range(25):
        prompt = random_prompt(rng)
        assert shows(picture(prompt.scene), prompt.meaning), prompt.text
        edit = random_edit(rng)
        assert edited(picture(edit.after), edit.before, edit.after), edit.text


def test_a_picture_that_was_not_edited_never_passes() -> None:
    rng = random.Random(2)
    for _ in range(25):
        edit = random_edit(rng)
        assert not edited(picture(edit.before), edit.before, edit.after), edit.text


@pytest.mark.parametrize("change", ["colour", "shape", "background", "missing", "place", "more"])
def test_one_wrong_thing_is_found(change: str) -> None:
    rng = random.Random(3)
    for _ in range(8):
        prompt = caption(rng, random_scene(rng, 1), place=True)
        scene = prompt.scene
        thing = scene.things[0]
        wrong = {
            "colour": lambda t=thing: (replace(t, colour=other(tuple(COLOURS), t.colour)),),
            "shape": lambda t=thing: (replace(t, shape=other(SHAPES, t.shape)),),
            "background": lambda t=thing: (t,),
            "missing": tuple,
            "place": lambda t=thing: (replace(t, x=64 - t.x, y=(t.y + 19) % 57),),
            "more": lambda t=thing: (t, replace(t, x=(t.x + 30) % 60, y=(t.y + 30) % 60)),
        }[change]()
        background = scene.background
        if change == "background":
            background = other(tuple(BACKGROUNDS), background)
        assert not shows(picture(replace(scene, things=wrong, background=background)), prompt.meaning)


def test_noise_is_not_clean() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    seen = look(noise)
    assert not seen.clean or not seen.things


def test_a_little_noise_changes_nothing() -> None:
    rng = random.Random(5)
    dither = np.random.default_rng(5)
    for _ in range(10):
        prompt = random_prompt(rng)
        noisy = picture(prompt.scene).astype(int) + dither.normal(0, 6, (64, 64, 3)).round().astype(int)
        assert shows(noisy.clip(0, 255).astype(np.uint8), prompt.meaning)


RED, BLUE = ("red", "circle", None), ("blue", "star", None)


def things(*places: tuple[float, float]) -> tuple[Thing, ...]:
    return tuple(
        Thing(colour, shape, "center", *at, 9.5) for (colour, shape, _), at in zip((RED, BLUE), places, strict=True)
    )


@pytest.mark.parametrize(
    ("relation", "places", "right"),
    [
        ("left", ((13, 12), (51, 14)), True),
        ("left", ((13, 51), (51, 49)), True),
        ("left", ((51, 13), (13, 13)), False),
        ("left", ((13, 13), (51, 32)), False),
        ("left", ((13, 13), (13, 51)), False),
        ("right", ((51, 13), (13, 13)), True),
        ("right", ((13, 13), (51, 13)), False),
        ("above", ((32, 13), (34, 51)), True),
        ("above", ((32, 51), (34, 13)), False),
        ("below", ((32, 51), (34, 13)), True),
        ("below", ((13, 51), (51, 51)), False),
        (None, ((13, 13), (51, 51)), True),
        (None, ((51, 32), (13, 13)), True),
    ],
)
def test_a_caption_leaves_open_what_it_does_not_say(relation: str | None, places: tuple, right: bool) -> None:
    meaning = Meaning("draw", RED, BLUE, relation, "white")
    assert shows(picture(Scene(things(*places), "white")), meaning) is right
