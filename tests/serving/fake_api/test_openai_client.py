"""OpenAI's own client accepts the answers, and every picture is the one that was asked for."""

from __future__ import annotations

import base64
import json
import math

import pytest
from openai import AuthenticationError, BadRequestError

from dataflow.serving.fake_api import expected_mark, expected_text, read_mark
from dataflow.serving.fake_api.pictures import draw

PNG, OTHER_PNG = draw("an input of the user's own"), draw("another")
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def ask(openai, prompt, model="fake-image", images=(), **facts):
    parts = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(image)}"}} for image in images]
    messages = [{"role": "user", "content": parts}]
    return openai.chat.completions.create(model=model, messages=messages, modalities=["image", "text"], **facts)


def b64(data):
    return base64.b64encode(data).decode()


def run_of_base64(text):
    """The base64 behind the data URL in a text."""
    found = text.partition("data:image/png;base64,")[2]
    return base64.b64decode(found.rstrip(")\n"), validate=True)


class TestChat:
    @pytest.mark.parametrize(("shape", "key"), [("images", "image_url"), ("camel", "imageUrl")])
    def test_images_beside_the_content(self, openai, shape, key):
        prompt = f"a fox {shape}"
        message = ask(openai, prompt, f"fake-{shape}").choices[0].message
        (image,) = message.model_extra["images"]
        assert (image["type"], image["index"], message.content) == ("image_url", 0, "")
        assert read_mark(run_of_base64(image[key]["url"])) == expected_mark(prompt)

    @pytest.mark.parametrize(("shape", "end"), [("markdown", ")"), ("markdown_open", "=")])
    def test_markdown(self, openai, shape, end):
        content = ask(openai, "a fox!", f"fake-{shape}").choices[0].message.content
        assert content.startswith("![image](data:image/png;base64,")
        assert content.endswith(")") == (shape == "markdown")
        assert read_mark(run_of_base64(content)) == expected_mark("a fox!")

    @pytest.mark.parametrize("shape", ["url", "markdown_url", "relative_url", "images_url", "images_relative_url"])
    def test_addresses_that_the_server_serves_itself(self, api, openai, wire, shape):
        message = ask(openai, "a linked fox", f"fake-{shape}").choices[0].message
        images = (message.model_extra or {}).get("images")
        text = images[0]["image_url"]["url"] if images else message.content
        address = text.removeprefix("![image](").removesuffix(")")
        assert address.startswith("/v1/images/" if "relative" in shape else f"{api.url}/v1/images/")
        answer = wire.get(address)
        assert answer.headers["content-type"] == "image/png"
        assert read_mark(answer.data) == expected_mark("a linked fox")

    def test_a_list_of_parts(self, openai):
        (part,) = ask(openai, "a listed fox", "fake-parts").choices[0].message.content
        assert read_mark(run_of_base64(part["image_url"]["url"])) == expected_mark("a listed fox")

    def test_input_images_in_order_make_the_picture(self, openai):
        marks = set()
        for images in ([], [PNG], [PNG, OTHER_PNG], [OTHER_PNG, PNG]):
            message = ask(openai, "mix", images=images).choices[0].message
            mark = read_mark(run_of_base64(message.model_extra["images"][0]["image_url"]["url"]))
            assert mark == expected_mark("mix", images)
            marks.add(mark)
        assert len(marks) == 4

    def test_of_a_conversation_all_images_count_and_the_last_words(self, openai):
        first = ask(openai, "a house", images=[PNG]).choices[0].message
        made = run_of_base64(first.model_extra["images"][0]["image_url"]["url"])
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a house"}, image_part(PNG)]},
            {"role": "assistant", "content": "", "images": first.model_extra["images"]},
            {"role": "user", "content": "now at night"},
        ]
        message = openai.chat.completions.create(model="fake-image", messages=messages).choices[0].message
        picture = run_of_base64(message.model_extra["images"][0]["image_url"]["url"])
        assert read_mark(picture) == expected_mark("now at night", [PNG, made])

    def test_several_pictures_with_words_and_thoughts(self, api, openai):
        api.script({"rich": "images:3+talk+thoughts", "listed": "shape:parts"})
        message = ask(openai, "rich").choices[0].message
        assert message.content == "Here is your picture."
        assert message.model_extra["reasoning"]
        pictures = [run_of_base64(image["image_url"]["url"]) for image in message.model_extra["images"]]
        assert {read_mark(picture) for picture in pictures} == {expected_mark("rich")}
        assert len(set(pictures)) == 3
        parts = ask(openai, "rich listed").choices[0].message.content
        thought, *kept = [part for part in parts if part["type"] == "image_url"]
        assert thought["thought"] is True
        assert read_mark(run_of_base64(thought["image_url"]["url"])) != expected_mark("rich listed")
        assert len(kept) == 3

    def test_several_answers_hold_a_picture_each(self, openai):
        choices = ask(openai, "two", n=2).choices
        pictures = [run_of_base64(c.message.model_extra["images"][0]["image_url"]["url"]) for c in choices]
        assert len(set(pictures)) == 2
        assert {read_mark(picture) for picture in pictures} == {expected_mark("two")}

    def test_the_same_request_gives_the_same_bytes_and_another_seed_others(self, openai):
        pictures = [
            ask(openai, "same", seed=seed).choices[0].message.model_extra["images"][0]["image_url"]["url"]
            for seed in (1, 1, 2)
        ]
        assert pictures[0] == pictures[1] != pictures[2]


def image_part(data):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(data)}"}}


class TestChatStream:
    def chunks(self, openai, prompt, model, **facts):
        return list(ask(openai, prompt, model, stream=True, stream_options={"include_usage": True}, **facts))

    def test_base64_is_cut_at_arbitrary_characters(self, openai):
        chunks = self.chunks(openai, "a cut fox", "fake-markdown")
        pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert len(pieces) > 10
        assert any(len(piece) % 4 for piece in pieces)
        assert read_mark(run_of_base64("".join(pieces))) == expected_mark("a cut fox")
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens_details.model_extra["image_tokens"] == 1290

    def test_images_come_whole(self, api, openai):
        api.script({"thinking": "thoughts+talk"})
        chunks = self.chunks(openai, "thinking", "fake-images")
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        (images,) = [delta.model_extra["images"] for delta in deltas if "images" in (delta.model_extra or {})]
        assert read_mark(run_of_base64(images[0]["image_url"]["url"])) == expected_mark("thinking")
        assert "".join(delta.content or "" for delta in deltas) == "Here is your picture."
        assert "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas)

    def test_usage_comes_only_if_asked_for(self, openai):
        assert not any(chunk.usage for chunk in ask(openai, "no usage", stream=True))


class TestText:
    def test_text_of_the_prompt_and_its_images(self, openai):
        messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image_part(PNG)]}]
        answer = openai.chat.completions.create(model="judge", messages=messages)
        assert answer.choices[0].message.content == expected_text("what is it?", [PNG])
        assert answer.usage.completion_tokens_details.model_extra["image_tokens"] == 0

    def test_json_that_fits_the_schema(self, openai):
        schema = {
            "type": "object",
            "properties": {
                "score": {"type": "integer", "minimum": 1, "maximum": 5},
                "why": {"type": "string"},
                "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}},
            },
            "$defs": {"flag": {"enum": ["blurred", "sharp"]}},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
        messages = [{"role": "user", "content": "judge"}]
        answer = openai.chat.completions.create(model="judge", messages=messages, response_format=wanted)
        verdict = json.loads(answer.choices[0].message.content)
        assert verdict == {"score": 1, "why": expected_text("judge"), "flags": ["blurred"]}

    def test_scripted_words_and_logprobs(self, api, openai):
        api.script({"rate": 'say:{"score": 4, "sum": "1+1"}'})
        messages = [{"role": "user", "content": "rate"}]
        answer = openai.chat.completions.create(model="judge", messages=messages, logprobs=True, top_logprobs=5)
        assert answer.choices[0].message.content == '{"score": 4, "sum": "1+1"}'
        tokens = answer.choices[0].logprobs.content
        assert "".join(token.token for token in tokens) == answer.choices[0].message.content
        (four,) = [token for token in tokens if token.token == "4"]
        assert len(four.top_logprobs) == 5
        assert all(entry.token.isdigit() for entry in four.top_logprobs)
        assert math.exp(four.logprob) == pytest.approx(0.8)


class TestImages:
    def test_generation(self, openai):
        answer = openai.images.generate(model="gpt-image-2", prompt="foxes", n=2, size="1024x1024", quality="low")
        pictures = [base64.b64decode(image.b64_json) for image in answer.data]
        assert len(set(pictures)) == 2
        assert {read_mark(picture) for picture in pictures} == {expected_mark("foxes")}
        assert (answer.usage.output_tokens, answer.usage.output_tokens_details.image_tokens) == (2580, 2580)

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_other_formats_keep_the_mark(self, openai, kind):
        answer = openai.images.generate(model="gpt-image-2", prompt="foxes", output_format=kind)
        assert answer.output_format == kind
        assert read_mark(base64.b64decode(answer.data[0].b64_json)) == expected_mark("foxes")

    def test_stream_with_partial_images(self, openai):
        events = list(openai.images.generate(model="gpt-image-2", prompt="slowly", stream=True, partial_images=2))
        assert [event.type.partition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
        marks = [read_mark(base64.b64decode(event.b64_json)) for event in events]
        assert marks[-1] == expected_mark("slowly") not in marks[:-1]
        assert events[-1].usage.output_tokens == 1290

    @pytest.mark.parametrize("several", [False, True])
    def test_edit_by_form(self, api, openai, several):
        files = [(f"{at}.png", data, "image/png") for at, data in enumerate([PNG, OTHER_PNG])]
        answer = openai.images.edit(
            model="gpt-image-2", prompt="redder", image=files if several else files[0], input_fidelity="high"
        )
        expected = expected_mark("redder", [PNG, OTHER_PNG] if several else [PNG])
        assert read_mark(base64.b64decode(answer.data[0].b64_json)) == expected
        body = api.requests("/v1/images/edits")[-1]["body"]
        assert [file["name"] for file in body["files"]] == (["image[]"] * 2 if several else ["image"])
        assert body["fields"]["prompt"] == "redder"

    def test_mask(self, openai, mask):
        image = ("0.png", PNG, "image/png")
        answer = openai.images.edit(model="gpt-image-2", prompt="hat", image=image, mask=("m.png", mask, "image/png"))
        assert read_mark(base64.b64decode(answer.data[0].b64_json)) == expected_mark("hat", [PNG, mask])
        with pytest.raises(BadRequestError, match="alpha"):
            openai.images.edit(model="gpt-image-2", prompt="hat", image=image, mask=("m.png", PNG, "image/png"))

    def test_streamed_edit(self, openai):
        image = ("0.png", PNG, "image/png")
        events = list(openai.images.edit(model="gpt-image-2", prompt="x", image=image, stream=True, partial_images=1))
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert read_mark(base64.b64decode(events[-1].b64_json)) == expected_mark("x", [PNG])

    def test_edit_as_json(self, wire):
        body = {"model": "gpt-image-2", "prompt": "bluer", "images": [{"image_url": DATA_URL}]}
        answer = wire.post("/v1/images/edits", body).json
        assert read_mark(base64.b64decode(answer["data"][0]["b64_json"])) == expected_mark("bluer", [PNG])

    def test_a_local_server_takes_a_seed_and_answers_by_address(self, openai, wire):
        answers = [
            openai.images.generate(model="flux", prompt="seeded", extra_body={"seed": seed, "num_inference_steps": 4})
            .data[0]
            .b64_json
            for seed in (1, 1, 2)
        ]
        assert answers[0] == answers[1] != answers[2]
        url = openai.images.generate(model="flux", prompt="at", response_format="url").data[0].url
        assert read_mark(wire.get(url).data) == expected_mark("at")


class TestRequestsThatTheServiceWouldNotTake:
    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"size": "1000x1000"}, "multiples of 16"),
            ({"n": 11}, "n must be from 1 to 10"),
            ({"response_format": "b64_json"}, "Unknown parameter: 'response_format'"),
            ({"extra_body": {"seed": 1}}, "Unknown parameter: 'seed'"),
            ({"partial_images": 4}, "partial_images"),
        ],
    )
    def test_generation(self, openai, facts, message):
        with pytest.raises(BadRequestError, match=message):
            openai.images.generate(model="gpt-image-2", prompt="x", **facts)

    def test_bare_bytes_have_no_type(self, openai):
        with pytest.raises(BadRequestError, match="unsupported mimetype"):
            openai.images.edit(model="gpt-image-2", prompt="x", image=PNG)

    @pytest.mark.parametrize(
        "url", ["data:image/png;base64,AAAA", "data:image/png;base64,!!", "data:text/plain;base64,AAAA", "file:///x"]
    )
    def test_chat_images(self, wire, url):
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        answer = wire.post("/v1/chat/completions", {"model": "m", "messages": messages})
        assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")

    def test_models_and_health(self, openai, wire):
        assert "fake-image" in [model.id for model in openai.models.list()]
        assert wire.get("/health").json == {"status": "ok"}
        assert wire.get("/nowhere").status == 404


class TestErrors:
    def test_a_refusal_is_a_bad_request(self, api, openai):
        api.script({"bad": "content_policy", "key": "401"})
        with pytest.raises(BadRequestError) as refused:
            openai.images.generate(model="gpt-image-2", prompt="bad")
        assert refused.value.code == "content_policy_violation"
        with pytest.raises(AuthenticationError):
            ask(openai, "key")
