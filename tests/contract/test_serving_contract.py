"""What every serving keeps to. A new one joins by a line in SERVINGS."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import dataflow
from dataflow.config import SERVINGS as SERVING_CLASSES
from dataflow.errors import BadRequestError, ServingError
from dataflow.io import ImageIO
from dataflow.serving.fake_api import FakeApi
from dataflow.serving.fake_serving import FakeServing
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest, GenerationResult, Serving

BUILTIN = Path(dataflow.__file__).parent / "builtin"
has_builtin = pytest.mark.skipif(not list(BUILTIN.glob("*/model_index.json")), reason="the built-in model is not there")


def local(store: ImageIO, **options) -> Serving:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    return LocalImageGenServing(store, batch_size=3, diffuser_num_inference_steps=1, device="cpu", **options)


def api(name: str, store: ImageIO | None, **options) -> Serving:
    pytest.importorskip("openai")
    module, _, kind = SERVING_CLASSES[name].partition(":")
    path = "" if name == "gemini" else "/v1"
    return getattr(importlib.import_module(module), kind)(
        image_io=store, api_url=os.environ["FAKE_API"] + path, timeout=20.0, **options
    )


SERVINGS = [
    pytest.param(lambda store: FakeServing(store, batch_size=3, size=(16, 16)), id="fake"),
    pytest.param(lambda store: FakeServing(batch_size=3), id="fake-text"),
    pytest.param(local, id="local", marks=has_builtin),
    pytest.param(lambda store: local(store, Image_gen_task="imageedit"), id="local-edit", marks=has_builtin),
    pytest.param(lambda store: api("chat", store), id="chat"),
    pytest.param(lambda store: api("chat", store, send_request_stream=True), id="chat-stream"),
    pytest.param(lambda store: api("chat", None, model_name="judge"), id="chat-text"),
    pytest.param(lambda store: api("openai_images", store), id="openai_images"),
    pytest.param(lambda store: api("gemini", store), id="gemini"),
]


@pytest.fixture(scope="module", autouse=True)
def fake_api():
    with FakeApi() as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_API", service.url)
        patch.setenv("DF_API_KEY", "any-word")
        yield


@pytest.fixture(params=SERVINGS)
def make(request, tmp_path) -> Callable[[], Serving]:
    store = ImageIO(tmp_path / "images")
    return lambda: request.param(store)


@pytest.fixture
def serving(make) -> Serving:
    return make()


@pytest.fixture
def requests(serving, tmp_path) -> list[GenerationRequest]:
    """Five requests that this serving can do, with its own default parameters."""
    source = tmp_path / "source.png"
    Image.new("RGB", (64, 64), "red").save(source)
    params = dict(serving.default_params())
    width, height = params.pop("width", None), params.pop("height", None)
    plain = [
        GenerationRequest(
            request_id=f"{number:032x}",
            prompt=f"a red circle {number}",
            seed=number,
            negative_prompt=params.get("negative_prompt"),
            size=(width, height) if width and height else None,
            params={name: value for name, value in params.items() if name != "negative_prompt"},
        )
        for number in range(5)
    ]
    try:
        serving.check(plain[0])
    except BadRequestError:
        return [replace(request, images=(str(source),)) for request in plain]
    return plain


def work(serving: Serving, *batches: Sequence[GenerationRequest]) -> list[list[GenerationResult]]:
    async def all_of_them() -> list[list[GenerationResult]]:
        await asyncio.to_thread(serving.setup)
        try:
            return [await serving.generate(batch) for batch in batches]
        finally:
            await asyncio.to_thread(serving.cleanup)

    return asyncio.run(all_of_them())


def answers(results: Sequence[GenerationResult]) -> list[bytes | str | None]:
    for result in results:
        assert result.error is None
    return [
        image if isinstance(image := next(iter(result.images), result.text), bytes | str) else image.tobytes()
        for result in results
    ]


def test_it_is_a_serving_with_whole_numbers_from_one(serving):
    assert isinstance(serving, Serving)
    assert all(
        isinstance(number, int) and number >= 1
        for number in (serving.batch_size, serving.concurrency, serving.images_per_prompt)
    )


def test_it_packs_into_a_few_kilobytes_before_and_after_it_was_asked(serving):
    assert len(pickle.dumps(serving)) < 4000
    fingerprint = serving.fingerprint()
    again = pickle.loads(pickle.dumps(serving))
    assert len(pickle.dumps(serving)) < 4000
    assert again.fingerprint() == fingerprint
    assert again.default_params() == serving.default_params()


def test_its_fingerprint_and_defaults_are_json_and_stay_the_same(make, requests):
    first, second = make(), make()
    before = told(first)
    assert first.fingerprint()["model"]
    work(first, requests[:1])
    assert told(first) == told(second) == before


def told(serving: Serving) -> list[str]:
    return [json.dumps(dict(facts), sort_keys=True) for facts in (serving.fingerprint(), serving.default_params())]


def test_what_it_tells_cannot_be_changed_from_outside(serving):
    for tell in (serving.fingerprint, serving.default_params):
        dict(tell())["x"] = 1
        if isinstance(found := tell(), dict):
            found["x"] = 1
        assert "x" not in tell()


def test_requests_are_checked_and_keyed_before_any_work(serving, requests):
    for request in requests:
        serving.check(request)
        assert hash(serving.batch_key(request)) == hash(serving.batch_key(request))
    assert serving.batch_key(requests[0]) == serving.batch_key(requests[1])


def test_answers_come_in_the_order_of_the_requests_and_as_many(serving, requests):
    batch = requests[:3]
    forward, backward, single = work(serving, batch, batch[::-1], batch[1:2])
    assert [len(results) for results in (forward, backward, single)] == [3, 3, 1]
    assert len(set(answers(forward))) == 3
    for one, other in zip(answers(forward), reversed(answers(backward)), strict=True):
        assert near(one, other)
    assert near(answers(forward)[1], answers(single)[0])


def near(one: bytes | str | None, other: bytes | str | None) -> bool:
    """Equal up to the rounding that a batch of another size or order brings."""
    if not isinstance(one, bytes) or not isinstance(other, bytes):
        return one == other
    return len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 8


def test_it_can_be_set_up_again_after_it_was_cleaned_up(serving, requests):
    (first,), (second,) = work(serving, requests[:2]), work(serving, requests[:2])
    assert answers(first) == answers(second)


def test_it_can_be_cleaned_up_without_and_more_than_once(serving):
    serving.cleanup()
    serving.setup()
    serving.cleanup()
    serving.cleanup()


def test_a_copy_for_another_process_works_alike(serving, requests):
    for copy in serving.replicas():
        again = pickle.loads(pickle.dumps(copy))
        assert again.fingerprint() == serving.fingerprint()
        assert answers(work(again, requests[:1])[0]) == answers(work(serving, requests[:1])[0])


def test_a_parameter_that_does_not_exist_is_named_by_the_check_or_harms_nobody(serving, requests):
    odd = replace(requests[0], params={**requests[0].params, "no_such_parameter": 1})
    complaint = ""
    try:
        serving.check(odd)
    except BadRequestError as error:
        complaint = str(error)
    if complaint:
        assert "no_such_parameter" in complaint
    else:
        assert len(work(serving, [odd])[0]) == 1


def test_an_input_image_that_is_gone_harms_nobody_else(serving, requests, tmp_path):
    if not requests[0].images:
        pytest.skip("takes no images here")
    gone = replace(requests[0], images=(str(tmp_path / "gone.png"),))
    try:
        (results,) = work(serving, [requests[1], gone, requests[2]])
    except ServingError:
        return  # the engine finds the guilty one
    assert [result.error is None for result in results] == [True, False, True]
