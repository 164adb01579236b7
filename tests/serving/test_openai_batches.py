"""OpenAI's Batch API: the adaptor, and servings that send their requests through it."""

import asyncio
import dataclasses
import logging
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dataflow.errors import BadRequestError, FatalServingError, RefusedError, RetryError, ServingError
from dataflow.io import ImageIO
from dataflow.serving import batch_jobs, openai_batches
from dataflow.serving.batch_jobs import new_name
from dataflow.serving.fake_api import PRICES, FakeApi, expected_mark, read_mark
from dataflow.types import GenerationRequest

pytest.importorskip("openai")
from dataflow.serving.api_vlm_serving_openai import APIVLMServing_openai
from dataflow.serving.openai_batches import OpenAIBatches
from dataflow.serving.openai_image_serving import OpenAIImageServing

KEY = "df-secret-0123456789"


@pytest.fixture(scope="module")
def server():
    with FakeApi(key=KEY, batch_seconds=0.1) as api:
        yield api


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr(batch_jobs, "FIRST_POLL", 0.05)
    server.script({})
    server.reset()
    return server


class Office:
    """Sends requests as batch jobs, each time by a serving of its own, as after a restart."""

    def __init__(self, folder, api):
        self.folder, self.api = folder, api
        self.prices = folder / "prices.toml"
        rates = "".join(f"{name} = {price}\n" for name, price in PRICES.items())
        self.prices.write_text(f'["gpt-image-2"]\n{rates}["gemini-2.5-flash-image"]\n{rates}')

    def serving(self, kind=OpenAIImageServing, **options):
        store = ImageIO(str(self.folder / "images"))
        options = {"image_io": store, "price_table": self.prices, "batch_jobs": True, "timeout": 20.0, **options}
        return kind(f"{self.api.url}/v1", **options)

    def run(self, *batches, **options):
        """The results of each batch; all are under way at once."""
        serving = self.serving(**options)
        serving.setup()

        async def work():
            try:
                return await asyncio.gather(*(serving.generate(batch) for batch in batches))
            finally:
                await asyncio.to_thread(serving.cleanup)

        return asyncio.run(work())

    def submitted(self, name):
        """How many jobs of a name the service has."""
        serving = self.serving()
        serving.setup()

        async def work():
            await serving._open()
            found = await serving._batches([request_of(0)]).find(name)
            await asyncio.to_thread(serving.cleanup)
            return len(found)

        return asyncio.run(work())

    @property
    def totals(self):
        return self.api.ledger()["totals"]

    def picture(self, name, colour, mode="RGB"):
        Image.new(mode, (40, 30), colour).save(self.folder / name)
        return str(self.folder / name)


@pytest.fixture
def office(tmp_path, api):
    return Office(tmp_path, api)


def request_of(number, prompt="thing", job=None, **more):
    return GenerationRequest(request_id=f"{number:032x}", prompt=f"{prompt} {number}", seed=number, job=job, **more)


def some(count, job, **more):
    return [request_of(number, job=job, **more) for number in range(count)]


def reasons(results):
    return [result.error.reason if result.error else "" for result in results]


def usd(*batches):
    return sum(result.usage.get("usd", 0.0) for results in batches for result in results)


def contents(*paths):
    return [Path(path).read_bytes() for path in paths]


def assert_own_images(requests, results):
    for request, result in zip(requests, results, strict=True):
        sent = request.images if request.mask is None else (*request.images, request.mask)
        assert read_mark(bytes(result.images[0])) == expected_mark(request.prompt, contents(*sent))


def test_every_answer_goes_to_its_own_request_at_half_price(office):
    requests = some(7, new_name())
    [results] = office.run(requests)
    assert_own_images(requests, results)
    # They wait on disk: a job's answers are more than memory holds.
    assert all(isinstance(result.images[0], memoryview) for result in results)
    assert usd(results) == pytest.approx(office.totals["usd_reported"])
    assert results[0].usage["usd"] == pytest.approx(0.5 * (1290 * 30 + 2 * 0.3) / 1e6, rel=1e-3)


def test_edits_with_several_references_and_a_mask(office):
    red, blue = office.picture("a.png", "red"), office.picture("b.png", "blue")
    mask = office.picture("mask.png", (0, 0, 0, 0), "RGBA")
    name = new_name()
    requests = [
        request_of(0, job=name, images=(red, blue)),
        request_of(1, job=name, images=(blue, red), mask=mask),
        request_of(2, job=name, images=(blue,), size=(1024, 640)),
    ]
    [results] = office.run(requests)
    assert_own_images(requests, results)
    assert {entry["endpoint"] for entry in office.api.ledger()["attempts"]} == {"/v1/images/edits"}


def test_the_body_of_a_line(office):
    red, mask = office.picture("a.png", "red"), office.picture("mask.png", (0, 0, 0, 0), "RGBA")
    serving = office.serving(request_params={"quality": "low", "background": None}, send_request_stream=True)
    params = serving.default_params()
    assert serving._body(request_of(0, params=params, size=(1024, 640))) == {
        "model": "gpt-image-2",
        "prompt": "thing 0",
        "quality": "low",
        "size": "1024x640",
    }
    body = serving._body(request_of(0, params=params, images=(red, red), mask=mask))
    assert set(body) == {"model", "prompt", "quality", "images", "mask"}
    assert [set(image) for image in [*body["images"], body["mask"]]] == [{"image_url"}] * 3
    assert body["mask"]["image_url"].startswith("data:image/png;base64,iVBORw0KGgo")


def test_a_job_is_found_again_by_its_name(office):
    requests = some(5, new_name())
    [first] = office.run(requests)
    charged = office.totals
    [again] = office.run(requests)
    assert_own_images(requests, again)
    assert office.totals == charged
    assert charged["attempts"] == 5
    assert usd(again) == usd(first) == pytest.approx(charged["usd_reported"])


def test_giving_up_waiting_costs_nothing(office):
    office.api.script({"batch": {"seconds": 0.6}})
    requests = some(3, new_name())

    async def give_up():
        serving = office.serving()
        serving.setup()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(serving.generate(requests), 0.3)
        await asyncio.to_thread(serving.cleanup)

    asyncio.run(give_up())
    assert office.submitted(requests[0].job) == 1
    [results] = office.run(requests)
    assert_own_images(requests, results)
    assert office.submitted(requests[0].job) == 1
    assert office.totals["attempts"] == 3


def test_jobs_side_by_side_keep_apart(office):
    # The same names of requests in both: only the name of the job says whose answers they are.
    batches = [some(4, new_name()), some(4, new_name(), prompt="other")]
    assert batches[0][0].request_id == batches[1][0].request_id
    for requests, results in zip(batches, office.run(*batches), strict=True):
        assert_own_images(requests, results)


def test_the_half_that_expired_is_worth_asking_again(office):
    office.api.script({"batch": {"status": "expired"}})
    requests = some(6, new_name())
    [results] = office.run(requests)
    assert_own_images(requests[:3], results[:3])
    assert reasons(results[3:]) == ["not_in_batch"] * 3
    assert all(isinstance(result.error, RetryError) for result in results[3:])
    assert usd(results) == pytest.approx(office.totals["usd_reported"])


def test_what_goes_wrong_with_a_line_is_its_own_matter(office):
    office.api.script({
        "thing 1": "lost", "thing 2": "500", "thing 3": "refuse", "thing 4": "truncated_base64",
        "thing 5": "count:2", "thing 6": "expired", "thing 7": "count:0", "thing 8": "rate_limit",
    })  # fmt: skip
    requests = some(10, new_name())
    [results] = office.run(requests)
    assert_own_images([requests[0], requests[9]], [results[0], results[9]])
    assert reasons(results[1:9]) == [
        *("no_result", "transient", "refused", "bad_base64"),
        *("wrong_image_count", "not_in_batch", "no_image", "rate_limit"),
    ]
    # What was counted for answers without a usable image is paid for, too.
    assert usd(results) == pytest.approx(office.totals["usd_reported"])
    assert results[4].usage["usd"] > 0


def test_an_address_in_an_answer_is_fetched(office):
    office.api.script({"thing": "shape:url"})
    requests = some(2, new_name())
    [results] = office.run(requests)
    assert_own_images(requests, results)


def test_lines_that_cannot_be_read_cost_their_own_request_only(office, monkeypatch):
    spoilt = {1: b'{"custom_id": "x', 2: b"7", 3: b'{"response": {}}', 4: b'{"custom_id": "x", "response": 3}'}

    async def lines(response, whole=openai_batches.lines):
        number = 0
        async for line in whole(response):
            yield spoilt.get(number, line)
            number += 1

    monkeypatch.setattr(openai_batches, "lines", lines)
    requests = some(7, new_name())
    [results] = office.run(requests)
    whole = [number for number, reason in enumerate(reasons(results)) if not reason]
    assert len(whole) == 3
    assert_own_images([requests[number] for number in whole], [results[number] for number in whole])
    assert set(reasons(results)) == {"", "no_result"}


def test_a_job_that_failed_is_worth_sending_again(office):
    office.api.script({"batch": {"status": "failed"}})
    [results] = office.run(some(3, new_name()))
    assert reasons(results) == ["batch_failed"] * 3
    assert len({id(result.error) for result in results}) == 3
    assert all(isinstance(result.error, RetryError) for result in results)
    assert "gave the batch job" in str(results[0].error)


def test_a_job_whose_lines_are_wrong_stops_the_run(office):
    with pytest.raises(FatalServingError, match="line 2: The custom_id") as caught:
        office.run([request_of(1, job="1-x"), request_of(1, job="1-x")])
    assert caught.value.reason == "batch_rejected"


def test_a_large_batch_is_sent_in_several_jobs_of_one_name(office, monkeypatch):
    monkeypatch.setattr(OpenAIBatches, "max_bytes", 450)
    requests = some(7, new_name())
    requests[3] = dataclasses.replace(requests[3], prompt="far too long " * 50)
    [results] = office.run(requests)
    assert isinstance(results.pop(3).error, BadRequestError)
    requests.pop(3)
    assert_own_images(requests, results)
    assert 2 <= office.submitted(requests[0].job) <= 3
    [again] = office.run(requests)
    assert_own_images(requests, again)
    assert office.totals["attempts"] == 6


def test_an_input_that_cannot_be_read_is_not_sent(office):
    red, name = office.picture("a.png", "red"), new_name()
    requests = [request_of(0, job=name, images=(red,)), request_of(1, job=name, images=("/nowhere.png",))]
    [results] = office.run(requests)
    assert reasons(results) == ["", "bad_image"]
    assert office.totals["attempts"] == 1
    [results] = office.run([request_of(2, job=new_name(), images=("/nowhere.png",))])
    assert reasons(results) == ["bad_image"]


def test_a_wrong_key_is_never_shown(office, monkeypatch, caplog):
    monkeypatch.setenv("DF_API_KEY", "df-wrong-9876543210")
    with caplog.at_level(logging.DEBUG), pytest.raises(FatalServingError, match="401") as caught:
        office.run(some(2, new_name()))
    assert "9876543210" not in caplog.text + str(caught.value)


def test_nobody_answers(office, monkeypatch):
    monkeypatch.setattr(office.api, "url", "http://127.0.0.1:9")
    with pytest.raises(RetryError):
        office.run(some(2, new_name()))


def test_chat_completions_go_through_jobs_as_well(office):
    requests = some(4, new_name())
    [results] = office.run(requests, kind=APIVLMServing_openai, model_name="gemini-2.5-flash-image")
    assert_own_images(requests, results)
    assert usd(results) == pytest.approx(office.totals["usd_reported"])


def test_the_answers_of_a_job_are_never_in_memory_together(tmp_path, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setattr(batch_jobs, "FIRST_POLL", 0.2)
    peaks = []
    with FakeApi(key=KEY, image_bytes=2_000_000, batch_seconds=0.1) as api:
        office = Office(tmp_path, api)
        for count in (1, 4, 24):  # the first one imports the client
            requests = some(count, new_name())
            tracemalloc.start()
            [results] = office.run(requests)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert sum(len(result.images[0]) for result in results) > 48_000_000
    assert peaks[2] < peaks[1] + 5_000_000
    assert_own_images(requests[::8], results[::8])


# -- the adaptor ------------------------------------------------------------------------------------------------------


def adaptor(client=None):
    def reply(body):
        if "error" in body:
            raise RefusedError("declined")
        return body

    return OpenAIBatches(
        client,
        endpoint="/v1/images/edits",
        body=lambda request: {"prompt": request.prompt},
        reply=reply,
        classified=lambda status, headers, body: ServingError(f"{status}: {body}"),
        clean=lambda text: text.replace(KEY, "…"),
        timeout=5.0,
    )


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        (b'{"custom_id":"a","response":{"status_code":200,"body":{"error":1}}}', RefusedError, "declined"),
        (b'{"custom_id":"a","response":{"status_code":200,"body":7}}', ServingError, "200: 7"),
        (b'{"custom_id":"a","response":{"status_code":400,"body":{"x":1}}}', ServingError, "400: {'x': 1}"),
        (b'{"custom_id":"a","response":{"status_code":503}}', ServingError, "503: {}"),
        (b'{"custom_id":"a","response":null,"error":{"message":"late"}}', RetryError, "not done in the batch: late"),
        (b'{"custom_id":"a","response":null,"error":null}', RetryError, "without a word"),
        (f'{{"custom_id":"a","error":{{"message":"{KEY}"}}}}'.encode(), RetryError, "not done in the batch: …"),
    ],
)
def test_what_a_line_says(line, kind, text):
    name, error = adaptor()._result(line)
    assert name == "a"
    assert isinstance(error, kind)
    assert text in str(error)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((status, "working") for status in ("validating", "in_progress", "finalizing", "cancelling")),
        *((status, "ended") for status in ("completed", "expired", "cancelled")),
        ("failed", "failed"),
    ],
)
def test_states_of_a_job(status, state):
    job = adaptor()._job(SimpleNamespace(id="batch_1", status=status, errors=None))
    assert (job.state, isinstance(job.error, RetryError)) == (state, state == "failed")


def test_the_search_for_a_job_ends_where_older_ones_begin():
    seen = []

    async def listed(limit):
        for number, (created, name) in enumerate([(2e9, "other"), (1.9e9, "1900000000-x"), (1.8e9, "old"), (1, "")]):
            seen.append(number)
            yield SimpleNamespace(
                id=f"b{number}", status="completed", created_at=created, metadata={openai_batches.NAME: name}
            )

    found = asyncio.run(adaptor(SimpleNamespace(batches=SimpleNamespace(list=listed))).find("1900000000-x"))
    assert [job.id for job in found] == ["b1"]
    assert seen == [0, 1, 2]


def test_a_line_is_named_by_its_request():
    line = adaptor().line(request_of(5))
    assert line.endswith(b"}\n")
    assert b'"custom_id":"00000000000000000000000000000005"' in line
    assert b'"url":"/v1/images/edits"' in line
