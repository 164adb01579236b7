"""Google's own client accepts the answers, and every picture is the one that was asked for."""

from __future__ import annotations

import pytest
from google.genai import errors, types

from dataflow.serving.fake_api import expected_mark, expected_text, read_mark
from dataflow.serving.fake_api.pictures import draw

PNG, OTHER_PNG = draw("an input of the user's own"), draw("another")
MODEL = "gemini-2.5-flash-image"
IMAGE = types.GenerateContentConfig(
    response_modalities=["IMAGE"], image_config=types.ImageConfig(aspect_ratio="16:9", image_size="2K")
)


def user(text, *images):
    parts = [types.Part(text=text), *(types.Part.from_bytes(data=data, mime_type="image/png") for data in images)]
    return types.Content(role="user", parts=parts)


def pictures(parts):
    return [part.inline_data.data for part in parts if part.inline_data and not part.thought]


class TestGenerateContent:
    def test_a_picture_and_its_usage(self, api, gemini):
        answer = gemini.models.generate_content(model=MODEL, contents="a fox", config=IMAGE)
        (picture,) = pictures(answer.candidates[0].content.parts)
        assert read_mark(picture) == expected_mark("a fox")
        assert answer.candidates[0].finish_reason == types.FinishReason.STOP
        assert answer.usage_metadata.candidates_token_count == 1290
        assert answer.usage_metadata.total_token_count == 1292
        config = api.requests("generateContent")[-1]["body"]["generationConfig"]
        assert config == {"responseModalities": ["IMAGE"], "imageConfig": {"aspectRatio": "16:9", "imageSize": "2K"}}

    def test_input_images_in_order(self, gemini):
        for images in ([PNG], [PNG, OTHER_PNG], [OTHER_PNG, PNG]):
            answer = gemini.models.generate_content(model=MODEL, contents=[user("mix", *images)], config=IMAGE)
            assert read_mark(pictures(answer.candidates[0].content.parts)[0]) == expected_mark("mix", images)

    def test_thoughts_hold_pictures_that_are_not_the_answer(self, api, gemini):
        api.script({"think": "thoughts+talk"})
        parts = gemini.models.generate_content(model=MODEL, contents="think", config=IMAGE).candidates[0].content.parts
        assert [bool(part.thought) for part in parts] == [True, True, False, False]
        assert read_mark(parts[1].inline_data.data) != expected_mark("think")
        assert [read_mark(picture) for picture in pictures(parts)] == [expected_mark("think")]

    def test_a_conversation_needs_its_signatures(self, gemini):
        model = "gemini-3-pro-image"
        first = gemini.models.generate_content(model=model, contents=[user("a house", PNG)], config=IMAGE)
        said = first.candidates[0].content
        (made,) = pictures(said.parts)
        turns = [user("a house", PNG), said, user("at night")]
        answer = gemini.models.generate_content(model=model, contents=turns, config=IMAGE)
        assert read_mark(pictures(answer.candidates[0].content.parts)[0]) == expected_mark("at night", [PNG, made])
        for signature, message in ((None, "missing a thought_signature"), (b"else", "Corrupted thought signature")):
            said.parts[0].thought_signature = signature
            with pytest.raises(errors.ClientError, match=message):
                gemini.models.generate_content(model=model, contents=turns, config=IMAGE)

    def test_text_and_json(self, gemini):
        model = "gemini-2.5-flash"
        assert gemini.models.generate_content(model=model, contents="say").text == expected_text("say")
        schema = {"type": "object", "properties": {"score": {"type": "integer", "minimum": 2}}}
        config = types.GenerateContentConfig(response_mime_type="application/json", response_json_schema=schema)
        answer = gemini.models.generate_content(model=model, contents="judge", config=config)
        assert answer.parsed == {"score": 2}

    @pytest.mark.parametrize("facts", [{"aspect_ratio": "7:5"}, {"image_size": "2k"}])
    def test_sizes_that_are_not_offered(self, gemini, facts):
        config = types.GenerateContentConfig(response_modalities=["IMAGE"], image_config=types.ImageConfig(**facts))
        with pytest.raises(errors.ClientError, match="is not one of"):
            gemini.models.generate_content(model=MODEL, contents="x", config=config)

    def test_unknown_fields_are_errors(self, wire):
        assert wire.gemini("x", quality="high").json["error"]["status"] == "INVALID_ARGUMENT"
        assert wire.gemini("x", seed=1, image_config={"aspect_ratio": "1:1"}).status == 200


class TestStream:
    def test_parts_come_one_by_one(self, api, gemini):
        api.script({"stream": "talk+thoughts"})
        chunks = list(gemini.models.generate_content_stream(model=MODEL, contents="stream", config=IMAGE))
        parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]
        assert [read_mark(picture) for picture in pictures(parts)] == [expected_mark("stream")]
        assert "".join(part.text or "" for part in parts if not part.thought) == "Here is your picture."
        assert [chunk.candidates[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].usage_metadata.candidates_token_count == 1296

    def test_without_an_end_there_is_no_reason(self, api, gemini):
        api.script({"endless": "no_end"})
        chunks = list(gemini.models.generate_content_stream(model=MODEL, contents="endless", config=IMAGE))
        assert chunks
        assert not any(chunk.candidates[0].finish_reason for chunk in chunks)


class TestRefusals:
    @pytest.mark.parametrize("reason", ["SAFETY", "PROHIBITED_CONTENT", "IMAGE_SAFETY", "BLOCKLIST", "OTHER"])
    def test_the_prompt_is_blocked(self, api, gemini, reason):
        api.script({"bad": f"block:{reason}"})
        answer = gemini.models.generate_content(model=MODEL, contents="bad", config=IMAGE)
        assert not answer.candidates
        assert answer.prompt_feedback.block_reason.value == reason
        assert answer.usage_metadata.prompt_token_count == 1

    @pytest.mark.parametrize(
        "reason", ["IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "RECITATION", "SPII", "NO_IMAGE", "MAX_TOKENS"]
    )
    def test_the_answer_ends_early(self, api, gemini, reason):
        api.script({"bad": f"finish:{reason}"})
        answer = gemini.models.generate_content(model=MODEL, contents="bad", config=IMAGE)
        assert answer.candidates[0].content is None
        assert answer.candidates[0].finish_reason.value == reason

    def test_only_words(self, api, gemini):
        api.script({"bad": "text_only"})
        answer = gemini.models.generate_content(model=MODEL, contents="bad", config=IMAGE)
        assert answer.candidates[0].finish_reason == types.FinishReason.STOP
        assert answer.text == "I am sorry, I cannot draw that."

    def test_errors_are_the_clients_errors(self, api, gemini):
        api.script({"busy": "rate_limit_info:34", "down": "503"})
        with pytest.raises(errors.ClientError) as busy:
            gemini.models.generate_content(model=MODEL, contents="busy", config=IMAGE)
        assert (busy.value.code, busy.value.status) == (429, "RESOURCE_EXHAUSTED")
        assert busy.value.details["error"]["details"][0]["retryDelay"] == "34s"
        with pytest.raises(errors.ServerError):
            gemini.models.generate_content(model=MODEL, contents="down", config=IMAGE)
