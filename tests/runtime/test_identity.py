"""Request ids and seeds: what they depend on, and above all what they do not."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from dataflow.errors import InputError
from dataflow.runtime.identity import SEED_LIMIT, Identifier
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import Draft, GenerationRequest

CONTENTS = {"a.png": "content of a", "copy of a.png": "content of a", "b.png": "content of b"}


def identifier(run_seed: int = 0, negative: str | None = None, **serving: Any) -> Identifier:
    if negative is not None:
        serving["params"] = {**serving.get("params", {}), "negative_prompt": negative}
    return Identifier(
        FakeServing(**serving),
        run_seed,
        resolve=lambda path: Path("/pictures") / path,
        digest=lambda path: hashlib.sha256(CONTENTS[path.name].encode()).hexdigest(),
    )


def requests(drafts: list[Draft], **options: Any) -> list[GenerationRequest]:
    """Drafts of one row each, as they are identified in this order."""
    maker = identifier(**options)
    return [maker.request(draft, maker.identify([draft])[0], None) for draft in drafts]


def one(draft: Draft, **options: Any) -> GenerationRequest:
    return requests([draft], **options)[0]


def chain(*drafts: Draft, **options: Any) -> list[GenerationRequest]:
    maker = identifier(**options)
    made: list[GenerationRequest] = []
    for draft, identity in zip(drafts, maker.identify(drafts), strict=True):
        made.append(maker.request(draft, identity, None if draft.after is None else made[draft.after]))
    return made


FOX = Draft(prompt="a fox")
PINNED_ID = "1ab3e28566b9e17e022f4c6404cb7a7d"
PINNED_SEED = 7411517453719491021


class TestIds:
    def test_an_id_is_32_hex_digits_and_the_same_in_every_process(self):
        assert one(FOX).request_id == one(FOX).request_id
        assert len(bytes.fromhex(one(FOX).request_id)) == 16
        # Pinned: a change here makes every image of every user again. Raise FORMAT if that is meant.
        assert one(FOX).request_id == PINNED_ID
        assert one(FOX).seed == PINNED_SEED

    def test_the_place_in_the_table_does_not_matter(self):
        drafts = [Draft(prompt=f"p{i}", seed=i if i % 2 else None) for i in range(50)]
        ids = {draft.prompt: request.request_id for draft, request in zip(drafts, requests(drafts), strict=True)}
        random.Random(0).shuffle(drafts)
        assert {d.prompt: r.request_id for d, r in zip(drafts, requests(drafts[:]), strict=True)} == ids

    @pytest.mark.parametrize(
        "other",
        [
            Draft(prompt="a fox "),
            Draft(prompt="a fox", negative_prompt="dogs"),
            Draft(prompt="a fox", negative_prompt=""),
            Draft(prompt="a fox", seed=0),
            Draft(prompt="a fox", seed=1),
            Draft(prompt="a fox", size=(32, 64)),
            Draft(prompt="a fox", size=(64, 32)),
            Draft(prompt="a fox", params={"num_inference_steps": 5}),
            Draft(prompt="a fox", params={"guidance_scale": 5}),
            Draft(prompt="a fox", sample=1),
            Draft(prompt="a fox", images=("a.png",)),
            Draft(prompt="a fox", images=("b.png",)),
            Draft(prompt="a fox", images=("a.png", "b.png")),
            Draft(prompt="a fox", images=("b.png", "a.png")),
        ],
    )
    def test_everything_that_changes_the_image_changes_the_id(self, other):
        found = {one(draft).request_id for draft in (FOX, other, Draft(prompt="another"))}
        assert len(found) == 3

    @pytest.mark.parametrize(
        "options",
        [
            {"model": "other"},
            {"params": {"num_inference_steps": 9}},
            {"params": {"guidance_scale": 3.5}},
            {"size": (8, 8)},
            {"negative": "blur"},
            {"run_seed": 1},
        ],
    )
    def test_everything_that_changes_the_run_changes_the_id(self, options):
        assert one(FOX, **options).request_id != one(FOX).request_id

    @pytest.mark.parametrize("options", [{"batch_size": 7}, {"concurrency": 3}, {"seconds": 1.0}, {"processes": 2}])
    def test_how_it_is_run_does_not(self, options):
        assert one(FOX, **options) == one(FOX)

    def test_the_run_seed_does_not_matter_to_a_row_with_its_own(self):
        own = Draft(prompt="a fox", seed=5)
        assert one(own, run_seed=1) == one(own, run_seed=2)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"guidance_scale": 4.0}, {"guidance_scale": 4}),
            ({"guidance_scale": 4, "strength": 0.5}, {"strength": 0.5, "guidance_scale": 4}),
        ],
    )
    def test_equal_parameters_in_another_form_are_equal(self, first, second):
        drafts = [Draft(prompt="a fox", params=params) for params in (first, second)]
        assert one(drafts[0]).request_id == one(drafts[1]).request_id
        assert one(FOX, params=first).request_id == one(FOX, params=second).request_id

    def test_saying_the_default_is_saying_nothing(self):
        said = Draft(prompt="a fox", negative_prompt="blur", size=(64, 64), params={"num_inference_steps": 4})
        options: dict[str, Any] = {"negative": "blur", "params": {"num_inference_steps": 4}}
        assert one(said, **options) == one(FOX, **options)

    def test_an_image_counts_by_its_content_not_its_name(self):
        first, second, third = (one(Draft(prompt="x", images=(name,))) for name in ("a.png", "copy of a.png", "b.png"))
        assert first.request_id == second.request_id != third.request_id
        assert (first.images, second.images) == (("/pictures/a.png",), ("/pictures/copy of a.png",))
        assert first.image_hashes == second.image_hashes

    def test_identical_rows_get_ids_and_seeds_of_their_own(self):
        made = requests([FOX] * 5)
        assert len({request.request_id for request in made}) == len({request.seed for request in made}) == 5
        assert made[0] == one(FOX)

    def test_twins_among_turns_are_told_apart_too(self):
        maker = identifier()
        turns = [Draft(prompt="a fox"), Draft(prompt="bigger", after=0)]
        first, second = maker.identify(turns), maker.identify(turns)
        assert len({identity.key for identity in first + second}) == 4

    def test_a_row_that_cannot_be_used_is_no_occurrence(self):
        maker = identifier()
        broken = [FOX, Draft(prompt="x\ud800")]
        with pytest.raises(InputError, match="not valid Unicode text"):
            maker.identify(broken)
        assert maker.identify([FOX])[0].occurrence == 0

    def test_a_turn_depends_on_the_turns_before_it(self):
        last = Draft(prompt="bigger", after=0)
        first, second = chain(FOX, last)[1], chain(Draft(prompt="a cat"), last)[1]
        assert first.request_id != second.request_id
        assert first.seed != second.seed
        assert (first.after, first.task) == (chain(FOX)[0].request_id, "imageedit")
        assert first.request_id != one(Draft(prompt="bigger")).request_id


class TestSeeds:
    @pytest.mark.parametrize(
        "options", [{"model": "other"}, {"params": {"num_inference_steps": 9, "guidance_scale": 2}}, {"size": (8, 8)}]
    )
    def test_a_prompt_starts_from_the_same_noise_in_every_model(self, options):
        assert one(FOX, **options).seed == one(FOX).seed

    @pytest.mark.parametrize(
        "other", [Draft(prompt="b"), Draft(prompt="a fox", sample=1), Draft(prompt="a fox", images=("a.png",))]
    )
    def test_another_prompt_sample_or_picture_starts_from_another(self, other):
        assert one(other).seed != one(FOX).seed

    def test_another_run_seed_starts_from_another(self):
        assert one(FOX, run_seed=1).seed != one(FOX).seed

    def test_a_rows_own_seed_is_taken_and_samples_count_on(self):
        made = requests([Draft(prompt="a fox", seed=41, sample=k) for k in range(3)])
        assert [request.seed for request in made] == [41, 42, 43]

    def test_seeds_stay_within_63_bits(self):
        assert one(Draft(prompt="x", seed=SEED_LIMIT - 1, sample=1)).seed == 0
        assert all(0 <= request.seed < SEED_LIMIT for request in requests([Draft(prompt=str(i)) for i in range(200)]))


def test_a_request_carries_the_defaults_with_the_rows_own_on_top():
    request = one(
        Draft(prompt="x", params={"guidance_scale": 2.0}), params={"guidance_scale": 3.5, "steps": 4}, negative="blur"
    )
    assert request.params == {"guidance_scale": 2.0, "steps": 4}
    assert (request.size, request.negative_prompt, request.task) == ((64, 64), "blur", "text2image")
    assert one(Draft(prompt="x", negative_prompt="dogs"), negative="blur").negative_prompt == "dogs"
    assert one(Draft(prompt="x", images=("a.png",))).task == "imageedit"
