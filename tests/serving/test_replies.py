"""What the servings make of every reply that an image API may give."""

from __future__ import annotations

import base64
import copy
import logging
from contextlib import suppress
from enum import Enum
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflow.errors import (
    BadOutputError,
    BadRequestError,
    FatalServingError,
    RateLimitError,
    RefusedError,
    RetryError,
    ServingError,
)
from dataflow.serving.chat_replies import ChatStream, chat_reply
from dataflow.serving.gemini_replies import gemini_reply
from dataflow.serving.images_replies import ImagesStream, images_reply
from dataflow.serving.replies import Reply, require_images
from dataflow.serving.reply_images import data_url, decode_base64, media_type

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(251, 0, -1))
WEBP = b"RIFF\x10\x01\x00\x00WEBPVP8L" + bytes(100)
URL = "https://cdn.example/a/b.png?sig=1"
USAGE = {"prompt_tokens": 7, "completion_tokens": 1290, "cost": 0.04}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def link(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def entry(url: str, key: str = "image_url") -> dict:
    return {"type": "image_url", key: {"url": url}}


def chat(content=None, *, finish="stop", choice=(), **message) -> dict:
    first = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "choices": [first | dict(choice)], "usage": USAGE}


def wrapped(text: str, ending: str) -> str:
    return ending.join(text[at : at + 76] for at in range(0, len(text), 76))


class TestChatShapes:
    @pytest.mark.parametrize(
        ("body", "images", "text"),
        [
            (chat("Here.", images=[{**entry(link(PNG)), "index": 0}]), (PNG,), "Here."),
            (chat(None, images=[entry(link(PNG), "imageUrl")]), (PNG,), ""),
            (chat("", images=[entry(URL)]), (URL,), ""),
            (chat("", images=[entry("/v1/images/7/content?variant=1")]), ("/v1/images/7/content?variant=1",), ""),
            (chat("", images=[link(PNG), b64(JPEG), {"b64_json": b64(WEBP)}]), (PNG, JPEG, WEBP), ""),
            (chat("", images=[entry(link(PNG)), entry(link(JPEG)), entry(link(PNG))]), (PNG, JPEG), ""),
            (chat(f"![image]({link(PNG)})"), (PNG,), ""),
            (chat(f"A fox:\n\n![image]({link(PNG)})\n\nEnjoy!"), (PNG,), "A fox:\n\n\n\nEnjoy!"),
            (chat(f"![image]({link(PNG)}"), (PNG,), ""),
            (chat(f"![image]({link(PNG)}\n\nThere it is"), (PNG,), "There it is"),
            (chat(f"![image]({link(PNG)}\n\n![image]({link(JPEG)}"), (PNG, JPEG), ""),
            (chat(f'![image](<{link(PNG)}> "a title") and'), (PNG,), "and"),
            (chat(f"![one]({link(PNG)})![two]({link(JPEG)}) two"), (PNG, JPEG), "two"),
            (chat(f"![i](data:image/png;base64,{wrapped(b64(PNG), chr(10))})"), (PNG,), ""),
            (chat(f"![i](data:image/png;base64,{wrapped(b64(PNG), chr(13) + chr(10) + ' ')}"), (PNG,), ""),
            (chat(f'<img src="{link(PNG)}">'), (PNG,), '<img src="">'),
            (chat(link(PNG)), (PNG,), ""),
            (chat(f"![image]({URL}) done"), (URL,), "done"),
            (chat(f"![image]({URL}"), (URL,), ""),
            (chat(f"![a](/files/7)\n![b]({URL})"), ("/files/7", URL), ""),
            (chat("![a](out/7.png)"), ("out/7.png",), ""),
            (chat("![a](https://h/x_(1).png)"), ("https://h/x_(1).png",), ""),
            (chat(f"[![small]({URL})](https://h/full)"), (URL,), "[](https://h/full)"),
            (chat(f"![image]({URL})\n[download](https://h/other.png)"), (URL,), "[download](https://h/other.png)"),
            (chat("See https://h/x.PNG?token=1."), ("https://h/x.PNG?token=1",), "See https://h/x.PNG?token=1."),
            (chat("Here:\nhttp://h/v1/images/7/content"), ("http://h/v1/images/7/content",), None),
            (chat("[here](https://h/x.webp) https://h/x.webp"), ("https://h/x.webp",), None),
            (chat([{"type": "text", "text": "Hi"}, entry(link(PNG)), entry(URL)]), (PNG, URL), "Hi"),
            (chat([{"type": "image", "source": {"type": "base64", "data": b64(PNG)}}]), (PNG,), ""),
            (chat([{"inline_data": {"mime_type": "image/png", "data": b64(PNG)}}]), (PNG,), ""),
            (chat([{"type": "image_url", "image_url": link(PNG)}, "text"]), (PNG,), "text"),
            (chat([f"![a]({link(PNG)})", entry(link(JPEG)), f"![a]({link(WEBP)})"]), (PNG, JPEG, WEBP), ""),
        ],
    )
    def test_images_and_text(self, body, images, text):
        reply = chat_reply(body)
        assert reply.images == images
        assert text is None or reply.text == text
        assert (reply.finish, reply.usage) == ("stop", USAGE)

    @pytest.mark.parametrize(
        "body",
        [
            chat(f"![image]({link(PNG)})", images=[entry(link(PNG))]),
            chat(f"{URL} ![image]({URL})", images=[entry(link(PNG))]),
            chat([entry(link(PNG)), {"type": "text", "text": f"![image]({link(PNG)})"}]),
            chat(f"![image]({link(PNG)}) or https://h/x.png"),
            chat("![image](data:image/png;base64,AAAAA)", images=[entry(link(PNG))]),
            chat(f"![image]({link(PNG)[:-3]})", images=[entry(link(PNG))]),
        ],
    )
    def test_the_same_image_twice_is_one_and_urls_beside_it_are_none(self, body):
        assert chat_reply(body).images == (PNG,)

    @pytest.mark.parametrize(
        "text",
        [
            "I cannot draw.",
            "Read https://example.com/policy?about=/images/x.png or https://images.example.com/help.",
            "![a](sandbox:/mnt/data/a.png) ![b](file:///etc/passwd) ![c](javascript:x.png)",
            "A data URL begins with data:image/png;base64, and goes on.",
            "data:image/ data:image/png;base64",
            "![no",
            "![a]()",
        ],
    )
    def test_what_is_no_image(self, text):
        assert (chat_reply(chat(text)).images, chat_reply(chat(text)).text) == ((), text)

    def test_thoughts_are_skipped(self):
        draft = {"type": "image_url", "thought": True, "image_url": {"url": link(JPEG)}}
        thoughts = [{"type": "thinking", "thinking": "hm"}, {"type": "reasoning", "text": "hm"}, draft]
        assert chat_reply(chat([*thoughts, entry(link(PNG))])).images == (PNG,)
        assert chat_reply(chat("", images=[draft, entry(link(PNG))])).images == (PNG,)
        body = chat(f"<think>\n![draft]({link(JPEG)})\n</think>\n\nHere ![i]({link(PNG)})", reasoning_content="hm")
        assert chat_reply(body) == chat_reply(chat(f"Here ![i]({link(PNG)})"))

    def test_what_goes_back_and_logprobs_are_kept(self):
        details = [{"type": "reasoning.encrypted", "data": "c2ln"}]
        logprobs = {"content": [{"token": "4", "logprob": -0.1}]}
        reply = chat_reply(chat("4", reasoning_details=details, choice={"logprobs": logprobs}))
        assert (reply.parts, reply.logprobs, reply.text) == (tuple(details), logprobs, "4")

    def test_all_choices_count(self):
        body = chat("a", images=[entry(link(PNG))])
        body["choices"] += chat("b", images=[entry(link(JPEG))])["choices"]
        assert chat_reply(body).images == (PNG, JPEG)
        assert chat_reply(body).text == "a\nb"


class TestChatErrors:
    @pytest.mark.parametrize(
        ("body", "kind", "reason", "word"),
        [
            (chat(None, refusal="I won't draw that."), RefusedError, "refused", "I won't draw that."),
            (chat("", finish="content_filter"), RefusedError, "refused", "content_filter"),
            (chat("", finish="image_safety"), RefusedError, "refused", "image_safety"),
            (chat("", choice={"native_finish_reason": "IMAGE_SAFETY"}), RefusedError, "refused", "IMAGE_SAFETY"),
            (chat(None, choice={"finish_reason": "error", "error": {"code": 502}}), RetryError, "transient", "502"),
            (chat(None, choice={"error": {"code": 429, "message": "slow"}}), RateLimitError, "rate_limit", "slow"),
            (chat("so sorry", finish="error"), RetryError, "transient", "so sorry"),
            ({"error": {"code": 402, "message": "no credit"}}, FatalServingError, "quota", "no credit"),
            ({"error": {"code": 403, "metadata": {"reasons": ["sexual"]}}}, RefusedError, "refused", ""),
            ([{"error": {"code": 503, "message": "busy"}}], RetryError, "transient", "busy"),
            ({"detail": "wrong"}, RetryError, "transient", "wrong"),
            ({"choices": []}, RetryError, "bad_reply", "choice"),
            ({}, RetryError, "bad_reply", ""),
            ([], RetryError, "not_json", "list"),
            ("<html>", RetryError, "not_json", "str"),
            (None, RetryError, "not_json", "NoneType"),
            (chat(f"![i]({link(PNG)[:-3]})"), BadOutputError, "bad_base64", "cut"),
            (chat(f"![i]({link(JPEG)}) ![i]({link(PNG)[:-3]})"), BadOutputError, "bad_base64", "cut"),
            (chat("", images=[entry("data:image/png;base64,AA!A")]), BadOutputError, "bad_base64", "letters"),
            (chat("", images=[entry("data:image/svg+xml;utf8,<svg/>")]), BadOutputError, "bad_base64", "base64"),
        ],
    )
    def test_they_are_told_apart(self, body, kind, reason, word):
        with pytest.raises(kind) as caught:
            chat_reply(body, service="Acme")
        assert type(caught.value) is kind
        assert caught.value.reason == reason
        assert word in str(caught.value)
        if isinstance(body, dict) and "usage" in body:
            assert caught.value.usage == USAGE

    def test_an_image_outlives_a_filter_behind_it(self):
        assert chat_reply(chat("", finish="content_filter", images=[entry(link(PNG))])).images == (PNG,)

    def test_secrets_do_not_show(self):
        body = {"error": {"message": "key tops3cret-value and sk-abcdefgh are wrong"}}
        with pytest.raises(ServingError) as caught:
            chat_reply(body, secrets=["tops3cret-value"])
        assert "tops3cret" not in str(caught.value)
        assert "sk-abc" not in str(caught.value)

    def test_a_text_takes_no_more_than_linear_time(self):
        for text in ("![", "](", "![](", "data:image/", "data:image/png;base64,", "![x](data:image/png;base64,A\n"):
            for last in ("", "](", f"![i]({URL})"):
                with pytest.raises(ServingError, match="image"):
                    require_images(chat_reply(chat(text * 200_000 + last)), -1)
        for text in ("A" * 5_000_000, "![i](" + "(" * 500_000, "https://" * 300_000, "<think>" * 300_000, "= " * 10**6):
            chat_reply(chat(text))
        for text in (f"data:image/png;base64,{'A' * 75}\n" * 20_000, "![i](" * 300_000 + ")" * 300_000):
            with pytest.raises(ServingError):
                require_images(chat_reply(chat(text)), -1)


def chunk(finish=None, index=0, **delta) -> dict:
    return {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def streamed(*chunks) -> Reply:
    stream = ChatStream(service="Acme")
    for each in chunks:
        stream.add(each)
    return stream.reply()


CONTENT = f"A fox:\n![one]({link(PNG)})\nand ![two](data:image/jpeg;base64,{wrapped(b64(JPEG), chr(10))}) done"


class TestChatStream:
    @settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.integers(0, len(CONTENT)), max_size=30))
    def test_any_split_gives_the_same_reply(self, cuts):
        cuts = [0, *sorted(cuts), len(CONTENT)]
        pieces = [CONTENT[start:end] for start, end in pairwise(cuts)]
        end = [chunk("stop"), {"choices": [], "usage": USAGE}]
        assert streamed(*(chunk(content=piece) for piece in pieces), *end) == chat_reply(chat(CONTENT))
        parts = [chunk(content=[{"type": "text", "text": piece}]) for piece in pieces]
        assert streamed(*parts, *end).images == (PNG, JPEG)

    def test_character_by_character(self):
        reply = streamed(chunk(role="assistant"), *(chunk(content=letter) for letter in CONTENT), chunk("stop"))
        assert reply.images == (PNG, JPEG)
        assert reply.usage == {}

    def test_images_come_whole_and_once(self):
        image = [entry(link(PNG))]
        reply = streamed(chunk(content="Hi"), chunk(images=image), chunk("stop", images=image), {"choices": None})
        assert (reply.images, reply.text, reply.finish) == ((PNG,), "Hi", "stop")

    def test_everything_else_is_put_together(self):
        first = chunk(content="4", reasoning_details=[{"data": "a"}])
        first["choices"][0]["logprobs"] = {"content": [{"token": "4"}], "refusal": None}
        last = chunk("stop", content="2", reasoning_details=[{"data": "b"}])
        last["choices"][0]["logprobs"] = {"content": [{"token": "2"}]}
        reply = streamed(first, last)
        assert (reply.text, reply.parts) == ("42", ({"data": "a"}, {"data": "b"}))
        assert reply.logprobs == {"content": [{"token": "4"}, {"token": "2"}]}

    def test_choices_are_kept_apart(self):
        chunks = [chunk(index=at % 2, content=piece) for at, piece in enumerate("aAbBcC")]
        assert streamed(*chunks, chunk("stop", 1), chunk("stop", 0)).text == "abc\nABC"

    @pytest.mark.parametrize(
        "chunks",
        [
            [],
            [chunk(content="Hi")],
            [chunk(images=[entry(link(PNG))]), {"choices": [], "usage": USAGE}],
            [chunk("stop", content="a"), chunk(index=1, content="b")],
        ],
    )
    def test_an_end_without_a_reason_is_a_cut(self, chunks):
        with pytest.raises(RetryError) as caught:
            streamed(*chunks)
        assert caught.value.reason == "cut_stream"
        assert caught.value.usage == (USAGE if len(chunks) == 2 and "usage" in chunks[1] else {})

    @pytest.mark.parametrize(
        ("last", "kind", "reason"),
        [
            ({"error": {"code": 502, "message": "gone"}, "choices": [{"delta": {}}]}, RetryError, "transient"),
            ({"error": {"code": 429, "message": "slow"}}, RateLimitError, "rate_limit"),
            ({"choices": [{"finish_reason": "error", "error": {"code": 402}}]}, FatalServingError, "quota"),
            ({"object": "error", "message": "bad", "code": 400}, BadRequestError, "bad_request"),
            (chunk("content_filter"), RefusedError, "refused"),
            (chunk("stop", refusal="No."), RefusedError, "refused"),
            ("[DONE]", RetryError, "not_json"),
            ({"choices": 5}, RetryError, "bad_reply"),
            ({"choices": [{"delta": "x"}]}, RetryError, "bad_reply"),
            (chunk(content=7), RetryError, "bad_reply"),
        ],
    )
    def test_errors_in_the_middle(self, last, kind, reason):
        with pytest.raises(kind) as caught:
            streamed({**chunk(content="Hi"), "usage": USAGE}, last)
        assert caught.value.reason == reason
        assert caught.value.usage == USAGE


IMAGES_USAGE = {"input_tokens": 5, "output_tokens": 272, "input_tokens_details": {"text_tokens": 5}}


class TestImages:
    @pytest.mark.parametrize(
        ("data", "images"),
        [
            ([{"b64_json": b64(PNG)}], (PNG,)),
            ([{"b64_json": b64(PNG), "url": None, "revised_prompt": None}], (PNG,)),
            ([{"b64_json": None, "url": "/v1/images/7/content", "file_path": None}], ("/v1/images/7/content",)),
            ([{"url": URL}, {"url": link(JPEG)}], (URL, JPEG)),
            ([{"b64_json": link(PNG)}, {"b64_json": b64(JPEG)}, None], (PNG, JPEG)),
            ([{"b64_json": b64(PNG)}] * 2, (PNG, PNG)),
            ([{"b64_json": wrapped(b64(WEBP), "\r\n ")}], (WEBP,)),
        ],
    )
    def test_images(self, data, images):
        reply = images_reply({"created": 1, "data": data, "usage": IMAGES_USAGE, "size": "1024x1024"})
        assert (reply.images, reply.usage) == (images, IMAGES_USAGE)
        assert images_reply({"images": data}).images == images

    def test_the_revised_prompt_is_its_text(self):
        assert images_reply({"data": [{"url": URL, "revised_prompt": "a fox"}]}).text == "a fox"

    @pytest.mark.parametrize(
        ("body", "kind", "reason"),
        [
            ({"data": []}, RetryError, "no_image"),
            ({"data": [{"b64_json": None}]}, RetryError, "no_image"),
            ({"data": [{"error": {"code": "moderation_blocked"}}]}, RefusedError, "refused"),
            ({"data": [{"b64_json": b64(PNG)[:-3]}]}, BadOutputError, "bad_base64"),
            ({"data": [{"b64_json": 5}]}, RetryError, "bad_reply"),
            ({"data": "x"}, RetryError, "bad_reply"),
            ({"status": "Content Moderated"}, RefusedError, "refused"),
            ({"created": 1}, RetryError, "bad_reply"),
            (5, RetryError, "not_json"),
        ],
    )
    def test_errors(self, body, kind, reason):
        if isinstance(body, dict):
            body["usage"] = IMAGES_USAGE
        with pytest.raises(kind) as caught:
            images_reply(body)
        assert caught.value.reason == reason
        assert caught.value.usage == (IMAGES_USAGE if isinstance(body, dict) else {})

    @pytest.mark.parametrize("name", ["image_generation", "image_edit"])
    def test_partial_images_are_not_kept(self, name):
        stream = ImagesStream()
        for index in range(3):
            stream.add({"type": f"{name}.partial_image", "b64_json": b64(JPEG), "partial_image_index": index})
        with pytest.raises(RetryError) as caught:
            stream.reply()
        assert caught.value.reason == "cut_stream"
        stream.add({"b64_json": b64(PNG), "usage": IMAGES_USAGE}, name=f"{name}.completed")
        assert stream.reply() == Reply(images=(PNG,), usage=IMAGES_USAGE)

    def test_other_events(self):
        stream = ImagesStream(service="Acme")
        stream.add({"type": "ping"})
        stream.add({"data": [{"b64_json": b64(PNG)}]})
        assert stream.reply().images == (PNG,)
        with pytest.raises(RefusedError, match=r"Acme .*no such thing"):
            stream.add({"type": "error", "error": {"code": "moderation_blocked", "message": "no such thing"}})
        with pytest.raises(RetryError):
            stream.add({"type": "image_generation.failed", "message": "odd"})
        with pytest.raises(RetryError) as caught:
            stream.add([1])
        assert caught.value.reason == "not_json"


class Word(str, Enum):  # noqa: UP042 - as the client library has it: formatted, it shows its class
    STOP = "STOP"
    SAFETY = "SAFETY"
    IMAGE = "IMAGE"


SIGNED = {"inlineData": {"mimeType": "image/png", "data": b64(PNG)}, "thoughtSignature": "c2ln"}
G_USAGE = {"promptTokenCount": 9, "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1290}]}


def gemini(*parts, finish="STOP", **more) -> dict:
    candidate = {"content": {"role": "model", "parts": list(parts)}, "finishReason": finish, "index": 0}
    return {"candidates": [candidate], "usageMetadata": G_USAGE, "modelVersion": "m", **more}


class TestGemini:
    def test_images_text_and_what_goes_back(self):
        thought = {"inlineData": {"mimeType": "image/png", "data": b64(JPEG)}, "thought": True}
        said, signed_thought = {"text": "Here."}, {"text": "hm", "thought": True, "thoughtSignature": "eA=="}
        reply = gemini_reply(gemini(thought, signed_thought, said, SIGNED))
        expected = Reply(
            images=(PNG,), text="Here.", finish="STOP", usage=G_USAGE, parts=(signed_thought, said, SIGNED)
        )
        assert reply == expected

    def test_what_the_client_library_makes_of_it(self):
        part = {"inline_data": {"mime_type": "image/png", "data": PNG}, "thought_signature": b"sig", "text": None}
        usage = {
            "prompt_token_count": 9,
            "candidates_tokens_details": [{"modality": Word.IMAGE, "token_count": 1290}],
            "thoughts_token_count": None,
        }
        candidate = {"content": {"parts": [part]}, "finish_reason": Word.STOP, "finish_message": None}
        reply = gemini_reply({"candidates": [candidate], "usage_metadata": usage, "prompt_feedback": None})
        assert reply == Reply(images=(PNG,), finish="STOP", usage=G_USAGE, parts=(part,))
        assert type(reply.usage["candidatesTokensDetails"][0]["modality"]) is str

    def test_url_safe_base64_and_files(self):
        data = base64.urlsafe_b64encode(b"\xfb\xff\xbf" * 20).decode().rstrip("=")
        file = {"fileData": {"mimeType": "image/png", "fileUri": URL}}
        assert "-" in data
        reply = gemini_reply(gemini({"inlineData": {"mimeType": "image/png", "data": data}}, file))
        assert reply.images == (b"\xfb\xff\xbf" * 20, URL)

    @pytest.mark.parametrize(
        "word", ["SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY", "JAILBREAK"]
    )
    def test_a_blocked_prompt(self, word):
        for body in (
            {"promptFeedback": {"blockReason": word, "blockReasonMessage": "bad words"}, "usageMetadata": G_USAGE},
            {"prompt_feedback": {"block_reason": word, "block_reason_message": "bad words"}, "candidates": None},
        ):
            with pytest.raises(RefusedError, match=rf"blocks the prompt \({word}\): bad words") as caught:
                gemini_reply(body)
            assert caught.value.usage == body.get("usageMetadata", {})

    @pytest.mark.parametrize(
        "word",
        [
            *("SAFETY", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII"),
            *("RECITATION", "IMAGE_RECITATION"),
        ],
    )
    def test_a_withheld_image(self, word):
        candidate = {"finishReason": word, "content": None, "finishMessage": "Not this one."}
        for body in (
            {"candidates": [candidate]},
            {"candidates": [{}, candidate]},
            gemini({"text": "Not this one."}, finish=word),
        ):
            with pytest.raises(RefusedError, match=rf"\({word}\): Not this one."):
                gemini_reply(body)

    @pytest.mark.parametrize("word", ["NO_IMAGE", "IMAGE_OTHER", "OTHER", "MALFORMED_RESPONSE", "MAX_TOKENS", "STOP"])
    def test_no_image(self, word, caplog):
        with pytest.raises(RetryError, match=word) as caught:
            gemini_reply(gemini({"text": "I made it for you! " * 100}, finish=word))
        assert caught.value.reason == "no_image"
        assert caught.value.usage == G_USAGE
        assert "I made it for you!" in str(caught.value)
        assert len(str(caught.value)) < 400
        assert not caplog.records

    @pytest.mark.parametrize(
        "body",
        [
            {"candidates": [{"finishReason": "MOON_PHASE"}]},
            {"promptFeedback": {"blockReason": "MOON_PHASE"}},
        ],
    )
    def test_an_unknown_reason_is_tried_again_with_a_warning(self, body, caplog):
        with caplog.at_level(logging.WARNING), pytest.raises(RetryError, match="MOON_PHASE") as caught:
            gemini_reply(body)
        assert caught.value.reason == "no_image"
        assert "MOON_PHASE" in caplog.text

    @pytest.mark.parametrize(
        ("body", "kind", "reason"),
        [
            ([{"error": {"code": 503, "status": "UNAVAILABLE"}}], RetryError, "transient"),
            ({"error": {"code": 403, "status": "PERMISSION_DENIED"}}, FatalServingError, "auth"),
            ({"usageMetadata": G_USAGE}, RetryError, "no_image"),
            ({"candidates": []}, RetryError, "no_image"),
            (gemini(SIGNED | {"thought": True}), RetryError, "no_image"),
            (gemini({"inlineData": {"data": b64(PNG)[:-3]}}), BadOutputError, "bad_base64"),
            ({"modelVersion": "m"}, RetryError, "bad_reply"),
            (None, RetryError, "not_json"),
        ],
    )
    def test_errors(self, body, kind, reason):
        with pytest.raises(kind) as caught:
            gemini_reply(body)
        assert caught.value.reason == reason


class TestRequireImages:
    def test_exactly_as_many(self):
        for number in (1, 2):
            reply = Reply(images=(PNG,) * number, usage=USAGE)
            assert require_images(reply, number) is reply
            with pytest.raises(BadOutputError, match=f"{number} images came where {3 - number}") as caught:
                require_images(reply, 3 - number)
            assert (caught.value.reason, caught.value.usage) == ("wrong_image_count", USAGE)

    @pytest.mark.parametrize(
        ("text", "said"), [("I cannot", "I cannot"), ("", "no text"), ("word " * 200, "word word")]
    )
    def test_none(self, text, said):
        with pytest.raises(RetryError, match=said) as caught:
            require_images(Reply(text=text, finish="length", usage=USAGE), 1)
        assert (caught.value.reason, caught.value.usage) == ("no_image", USAGE)
        assert "(length)" in str(caught.value)
        assert len(str(caught.value)) < 400


BODIES = [
    (chat_reply, chat("Hi", images=[entry(link(PNG))], reasoning_details=[{}], choice={"logprobs": {"content": []}})),
    (
        chat_reply,
        chat([{"type": "text", "text": "Hi"}, entry(link(PNG)), entry(URL, "imageUrl")], finish="content_filter"),
    ),
    (streamed, {**chunk("stop", content="Hi", images=[entry(link(PNG))], reasoning_details=[{}]), "usage": USAGE}),
    (images_reply, {"data": [{"b64_json": b64(PNG), "url": None}, {"url": URL}], "usage": IMAGES_USAGE}),
    (gemini_reply, gemini({"text": "Hi"}, SIGNED, {"fileData": {"fileUri": URL}})),
    (gemini_reply, {"candidates": [{"finishReason": "SAFETY", "content": {}}], "promptFeedback": {"blockReason": "X"}}),
    (chat_reply, {"error": {"code": 429, "message": "m", "details": [{"retryDelay": "3s"}], "metadata": {"raw": "x"}}}),
]
ODD = [None, 0, 7, -1.5, True, "", "x", "\ud800", b"x", [], [None], [[]], {}, {"x": None}, {"error": 5}, [{"text": 5}]]


def places(value, path=()):
    yield path
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(below, (*path, key))


@pytest.mark.parametrize(("read", "body"), BODIES)
def test_wrong_types_anywhere_are_serving_errors(read, body):
    for path in places(body):
        for odd in ODD:
            changed = {"root": copy.deepcopy(body)}
            inner = changed
            for key in ("root", *path)[:-1]:
                inner = inner[key]
            inner[("root", *path)[-1]] = odd
            try:
                assert isinstance(read(changed["root"]), Reply)
            except ServingError as error:
                assert isinstance(str(error), str)  # noqa: PT017 - any class of them will do


NAMES = sorted({key for _, body in BODIES for path in places(body) for key in path if isinstance(key, str)})
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from([link(PNG), "stop", "SAFETY", 429]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, database=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(JSON)
def test_any_json_is_a_reply_or_a_serving_error(body):
    for read in (chat_reply, streamed, images_reply, gemini_reply):
        with suppress(ServingError):
            assert isinstance(read(body), Reply)


def test_deep_nesting_is_no_trap():
    deep: list | dict = []
    for _ in range(5000):
        deep = {"usage": deep, "data": deep, "message": deep} if isinstance(deep, list) else [deep]
    for body in (
        {"choices": [{"message": {"content": [deep]}}]},
        {"error": deep},
        {"candidates": [], "usageMetadata": deep},
    ):
        for read in (chat_reply, streamed, images_reply, gemini_reply):
            with pytest.raises(ServingError):
                require_images(read(body), 1)


class TestBase64:
    @settings(deadline=None, database=None)
    @given(st.binary(min_size=1, max_size=200), st.booleans(), st.booleans(), st.lists(st.integers(0, 300), max_size=5))
    def test_every_way_to_write_it(self, data, url_safe, padded, gaps):
        text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
        text = text if padded else text.rstrip("=")
        for gap in gaps:
            text = text[:gap] + " \r\n\t"[gap % 4] + text[gap:]
        assert decode_base64(text) == data

    @settings(deadline=None, database=None)
    @given(st.binary(min_size=3, max_size=100), st.data())
    def test_a_cut_inside_a_padded_end_is_seen(self, data, draw):
        text = base64.b64encode(data).decode()
        cut = text[: draw.draw(st.integers(1, len(text) - 1))]
        if len(cut) % 4 == 1 or 0 < cut.count("=") < text.count("="):
            with pytest.raises(BadOutputError, match="cut"):
                decode_base64(cut)

    @pytest.mark.parametrize(
        "text",
        ["", " \n", "A", "AAAAA", "AA=", "AAA==", "====", "AA==AA==", "A=AA", "AA!A", "AAé=", "QR", "QUJ", None, 5],
    )
    def test_what_is_refused(self, text):
        with pytest.raises(BadOutputError) as caught:
            decode_base64(text)
        assert caught.value.reason == "bad_base64"

    def test_the_limit(self):
        assert decode_base64(b64(bytes(100)), limit=100) == bytes(100)
        for number in (101, 102, 103, 1000):
            with pytest.raises(BadOutputError) as caught:
                decode_base64(b64(bytes(number)), limit=100)
            assert caught.value.reason == "too_large"


class TestMediaType:
    @pytest.mark.parametrize(("data", "kind"), [(PNG, "png"), (JPEG, "jpeg"), (WEBP, "webp")])
    def test_known_ones(self, data, kind):
        assert media_type(data) == f"image/{kind}"
        assert data_url(data) == f"data:image/{kind};base64,{b64(data)}"
        assert chat_reply(chat(data_url(data))).images == (data,)

    @pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"RIFF....WAVE"])
    def test_others(self, data):
        with pytest.raises(BadRequestError) as caught:
            data_url(data)
        assert caught.value.reason == "image_unsupported"
