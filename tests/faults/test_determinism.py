"""An image depends on its request: not on neighbours, order, batch size, worker process, or on what happened before.

With a real pipeline that holds within rounding, and with ``determinism="strict"`` to the bit.
"""

import itertools
import json
import random

import numpy as np
import pytest

from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.utils.storage import FileStorage

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
PROMPTS = [f"a {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
SHUFFLED = random.Random(3).sample(PROMPTS, len(PROMPTS))
MOST_LEVELS = 2
"""Of 255, by which rounding may move a value when a batch is put together in another way."""

WAYS = {
    "one by one": (PROMPTS, {"batch_size": 1}),
    "in one batch": (PROMPTS, {"batch_size": 12}),
    "in batches of five": (PROMPTS, {"batch_size": 5}),
    "in another order": (SHUFFLED, {"batch_size": 5}),
    "with others missing": (PROMPTS[::3], {"batch_size": 3}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_fake_serving_is_bitwise(make_site, tmp_path, way, processes):
    plain = make_site(tmp_path / "plain").fill(PROMPTS)
    plain.run()
    prompts, settings = WAYS[way]
    site = make_site(tmp_path / "other", settings).fill(prompts)
    site.run(processes=processes, concurrency=3)
    pixels = {row["conversations"]: ImageIO(plain.images).read(row["images"][0]).tobytes() for row in plain.rows()}
    for row in site.rows():
        assert ImageIO(site.images).read(row["images"][0]).tobytes() == pixels[row["conversations"]]
    assert set(site.files()) <= set(plain.files()), "names are the same everywhere"


@pytest.fixture(scope="module")
def draw(model, tmp_path_factory):
    """``draw(prompts, …)``: the pixels by prompt, through the engine, each time in folders of their own."""
    pytest.importorskip("diffusers")
    from dataflow.serving.local_image_gen_serving import LocalImageGenServing

    def run(prompts, **settings):
        root = tmp_path_factory.mktemp("draw")
        (root / "table.jsonl").write_text("".join(json.dumps({"conversations": text}) + "\n" for text in prompts))
        store = ImageIO(root / "images")
        serving = LocalImageGenServing(store, hf_model_name_or_path=model, **settings)
        storage = FileStorage(str(root / "table.jsonl"), str(root / "cache")).step()
        summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage)
        assert summary.done == len(prompts)
        rows = storage.step().read("dict")
        return {row["conversations"]: np.asarray(store.read(row["images"][0])).astype(int) for row in rows}

    return run


def furthest(first, second):
    """The largest difference of two pictures of the same prompt, in levels."""
    return max(int(np.abs(picture - first[prompt]).max()) for prompt, picture in second.items())


@pytest.mark.slow
def test_the_pipeline_is_the_same_within_rounding(draw):
    alone = draw(PROMPTS, batch_size=1)
    assert len({picture.tobytes() for picture in alone.values()}) == len(PROMPTS)
    found = {}
    for name, (prompts, settings) in WAYS.items():
        found[name] = furthest(alone, draw(prompts, **settings))
    found["in two processes"] = furthest(alone, draw(PROMPTS[:6], batch_size=2, device=["cpu", "cpu"]))
    print(f"\nlargest differences in levels of 255: {found}")
    assert found["one by one"] == 0
    assert max(found.values()) <= MOST_LEVELS


@pytest.mark.slow
def test_the_pipeline_is_bitwise_when_strict(draw):
    alone = draw(PROMPTS, batch_size=1, determinism="strict")
    for way in ("in batches of five", "in another order", "with others missing"):
        prompts, settings = WAYS[way]
        assert furthest(alone, draw(prompts, determinism="strict", **settings)) == 0
    twins = draw(PROMPTS[:4], batch_size=4, determinism="strict", device=["cpu", "cpu"])
    assert furthest(alone, twins) == 0, "in two processes"
