"""Each fault does on the wire what its name says."""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
from email.utils import parsedate_to_datetime

import pytest
from PIL import Image

from dataflow.serving.fake_api import expected_mark, read_mark


def encoded(answer):
    """The base64 of an answer of the Images API."""
    return answer.json["data"][0]["b64_json"]


def shown(answer):
    """The URL of the picture of a chat answer."""
    return answer.json["choices"][0]["message"]["images"][0]["image_url"]["url"]


class TestStatuses:
    @pytest.mark.parametrize("status", [400, 401, 402, 403, 408, 413, 429, 451, 500, 502, 503, 504])
    def test_any_status_in_the_words_of_each_api(self, api, wire, status):
        api.script({"bad": str(status)})
        for answer in (wire.chat("bad"), wire.generate("bad")):
            assert answer.status == status
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        answer = wire.gemini("bad")
        assert (answer.status, answer.json["error"]["code"]) == (status, status)
        assert answer.json["error"]["status"].isupper()

    def test_a_list_of_faults_has_one_for_each_attempt(self, api, wire):
        api.script({"flaky": ["500", "", "rate_limit"]})
        assert [wire.chat("flaky").status for _ in range(5)] == [500, 200, 429, 200, 200]
        assert [wire.chat("flaky too", seed=1).status for _ in range(2)] == [500, 200]

    def test_rate_limits(self, api, wire):
        api.script(
            {"plain": "rate_limit", "secs": "rate_limit:3", "ms": "rate_limit_ms:250", "date": "rate_limit_date:30"}
            | {"info": "rate_limit_info:34"}
        )
        answers = {word: wire.chat(word) for word in ("plain", "secs", "ms", "date", "info")}
        assert {answer.status for answer in answers.values()} == {429}
        assert not {"retry-after", "retry-after-ms"} & set(answers["plain"].headers)
        assert answers["secs"].headers["retry-after"] == "3"
        assert answers["ms"].headers["retry-after-ms"] == "250"
        date = parsedate_to_datetime(answers["date"].headers["retry-after"])
        assert 25 < date.timestamp() - time.time() < 35
        (info,) = wire.gemini("info").json["error"]["details"]
        assert info == {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}

    def test_spent_quota(self, api, wire):
        api.script({"bad": "quota"})
        error = wire.chat("bad").json["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        error = wire.gemini("bad").json["error"]
        assert "PerDay" in error["details"][0]["violations"][0]["quotaId"]

    def test_an_error_in_a_list(self, api, wire):
        api.script({"bad": "error_list"})
        answer = wire.gemini("bad")
        assert (answer.status, answer.json[0]["error"]["status"]) == (503, "UNAVAILABLE")


class TestErrorsInside200:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_body_is_an_error(self, api, wire, stream):
        api.script({"bad": "error_200"})
        for answer in (wire.chat("bad", stream=stream), wire.generate("bad", stream=stream)):
            assert answer.status == 200
            text = answer.data.decode().removeprefix("data: ")
            assert json.loads(text)["error"]["message"] == "Provider returned error"
            assert text.endswith("\n\n") == stream

    def test_the_choice_holds_one(self, api, wire):
        api.script({"bad": "choice_error"})
        (choice,) = wire.chat("bad").json["choices"]
        assert (choice["finish_reason"], choice["error"]["code"]) == ("error", 502)
        assert b'"finish_reason":"error"' in wire.chat("bad", stream=True).data

    def test_html_empty_and_wrong_type(self, api, wire):
        api.script({"web": "html", "gate": "html:502", "none": "empty", "typed": "wrong_type:image/png"})
        answer = wire.chat("web")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html")
        assert answer.data.startswith(b"<!DOCTYPE html>")
        assert wire.chat("gate").status == 502
        assert (wire.chat("none").status, wire.chat("none").data) == (200, b"")
        answer = wire.chat("typed")
        assert answer.headers["content-type"] == "image/png"
        assert answer.json["choices"]


class TestConnections:
    def test_hang(self, api, wire):
        api.script({"bad": "hang"})
        assert wire.raw("bad", seconds=0.3) == b"(no end)"
        assert api.ledger()["attempts"][-1]["usage"] is None

    @pytest.mark.parametrize("fault", ["disconnect", "paid_disconnect"])
    def test_no_answer_at_all(self, api, wire, fault):
        api.script({"bad": fault})
        assert wire.raw("bad") == b""
        last = api.ledger()["attempts"][-1]
        assert (last["status"], last["usd"] > 0, last["reported"]) == (0, fault == "paid_disconnect", False)

    def test_a_body_shorter_than_announced(self, api, wire):
        api.script({"bad": "cut"})
        for answer in (wire.chat("bad"), wire.generate("bad"), wire.gemini("bad")):
            assert (answer.status, answer.whole) == (200, False)
            assert len(answer.data) == int(answer.headers["content-length"]) // 2

    @pytest.mark.parametrize("method", ["chat", "generate", "gemini"])
    def test_streams_cut_halved_and_without_an_end(self, api, wire, method):
        api.script({"cut": "cut", "half": "half_stream", "open": "no_end"})

        def stream(prompt):
            if method == "gemini":
                return wire.gemini(prompt, "streamGenerateContent")
            return getattr(wire, method)(prompt, stream=True, **({} if method == "chat" else {"partial_images": 3}))

        whole, cut, half, opened = (stream(word) for word in ("fine", "cut", "half", "open"))
        assert [answer.whole for answer in (whole, cut, half, opened)] == [True, False, True, True]
        ends = {"chat": b"[DONE]", "generate": b".completed", "gemini": b"finishReason"}
        assert [ends[method] in answer.data for answer in (whole, cut, half, opened)] == [True, False, False, False]
        assert len(half.data) < len(opened.data) < len(whole.data)
        entries = {entry["prompt"]: entry for entry in api.ledger()["attempts"][-4:]}
        assert all(entry["usd"] > 0 for entry in entries.values())
        assert not any(entries[word]["reported"] for word in ("cut", "half", "open"))

    def test_slow_drip_and_slow_model(self, api, wire):
        api.script({"drip": "drip:0.4", "think": "slow:0.3"})
        for prompt, seconds in (("drip", 0.4), ("think", 0.3)):
            started = time.monotonic()
            answer = wire.generate(prompt)
            assert seconds <= time.monotonic() - started < seconds + 2
            assert read_mark(base64.b64decode(encoded(answer))) == expected_mark(prompt)
        assert wire.chat("drip", stream=True).data.endswith(b"data: [DONE]\n\n")


class TestPictures:
    def test_base64_that_is_unusual_and_right(self, api, wire):
        # A prompt is chosen by what its picture needs: letters that the two alphabets write differently.
        api.script({"url": "urlsafe_base64", "spaced": "spaced_base64"})
        safe = encoded(wire.generate("url of foxes"))
        assert not set("+/=") & set(safe)
        data = base64.urlsafe_b64decode(safe + "=" * (-len(safe) % 4))
        assert read_mark(data) == expected_mark("url of foxes")
        spaced = encoded(wire.generate("spaced"))
        assert "\r\n " in spaced
        assert read_mark(base64.b64decode("".join(spaced.split()), validate=True)) == expected_mark("spaced")

    @pytest.mark.parametrize("fault", ["truncated_base64", "garbage_base64"])
    def test_base64_that_is_wrong(self, api, wire, fault):
        api.script({"bad": fault})
        for text in (encoded(wire.generate("bad")), shown(wire.chat("bad")).partition(",")[2]):
            with pytest.raises(binascii.Error):
                base64.b64decode(text, validate=True)

    def sent(self, api, wire, fault):
        api.script({"bad": fault})
        part = wire.gemini("bad").json["candidates"][0]["content"]["parts"][0]["inlineData"]
        head, _, text = shown(wire.chat("bad")).partition(",")
        assert head == f"data:{part['mimeType']};base64"
        assert text == part["data"] == encoded(wire.generate("bad"))
        return part["mimeType"], base64.b64decode(text)

    def test_a_bomb_is_small_and_huge(self, api, wire):
        mime, data = self.sent(api, wire, "bomb")
        assert (mime, len(data) < 100_000) == ("image/png", True)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(data))

    @pytest.mark.parametrize(("fault", "kind"), [("half_jpeg", "JPEG"), ("half_png", "PNG")])
    def test_half_a_picture_opens_and_does_not_load(self, api, wire, fault, kind):
        _, data = self.sent(api, wire, fault)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == kind
            with pytest.raises(OSError, match=r"truncated|broken|incomplete"):
                image.load()

    @pytest.mark.parametrize(
        ("fault", "mime", "start"),
        [("svg", "image/svg+xml", b"<svg"), ("gif", "image/gif", b"GIF8"), ("not_image", "image/png", b"the picture")],
    )
    def test_other_things(self, api, wire, fault, mime, start):
        found, data = self.sent(api, wire, fault)
        assert found == mime
        assert data.startswith(start)

    @pytest.mark.parametrize("number", [0, 2])
    def test_a_wrong_number(self, api, wire, number):
        api.script({"bad": f"count:{number}"})
        assert len(wire.generate("bad").json["data"]) == number
        assert len(wire.chat("bad").json["choices"][0]["message"].get("images", [])) == number
        parts = wire.gemini("bad").json["candidates"][0]["content"]["parts"]
        assert sum("inlineData" in part for part in parts) == number
        assert [entry["images"] for entry in api.ledger()["attempts"][-3:]] == [number] * 3


class TestAddresses:
    def address(self, api, wire, fault):
        api.script({"bad": fault})
        url = wire.generate("bad").json["data"][0]["url"]
        assert wire.chat("bad").json["choices"][0]["message"]["content"] == f"![image]({url})"
        parts = wire.gemini("bad").json["candidates"][0]["content"]["parts"]
        assert parts == [{"fileData": {"mimeType": "image/png", "fileUri": url}}]
        return url

    @pytest.mark.parametrize(
        ("fault", "target"),
        [
            ("redirect_metadata", "http://169.254.169.254/latest/meta-data/"),
            ("redirect:http://[::ffff:127.0.0.1]/?a=1+1", "http://[::ffff:127.0.0.1]/?a=1+1"),
        ],
    )
    def test_redirects(self, api, wire, fault, target):
        answer = wire.get(self.address(api, wire, fault))
        assert (answer.status, answer.headers["location"]) == (302, target)

    def test_a_redirect_to_loopback_leads_into_a_trap(self, api, wire):
        answer = wire.get(self.address(api, wire, "redirect_loopback"))
        before = api.ledger()["totals"]["traps"]
        assert answer.headers["location"] == f"{api.url}/_trap"
        assert wire.get(answer.headers["location"]).data == b"secret"
        assert api.ledger()["totals"]["traps"] == before + 1

    def test_a_redirect_to_the_picture(self, api, wire):
        answer = wire.get(wire.get(self.address(api, wire, "redirect")).headers["location"])
        assert read_mark(answer.data) == expected_mark("bad")

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "http://2130706433/x.png", "http://0x7f.1/a+b.png"])
    def test_any_address(self, api, wire, url):
        assert self.address(api, wire, f"url:{url}") == url

    def test_addresses_without_a_picture(self, api, wire):
        assert wire.get(self.address(api, wire, "url_missing")).status == 404
        assert wire.get(self.address(api, wire, "url_html")).headers["content-type"] == "text/html"
        assert self.address(api, wire, "url_endless").startswith(api.url)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fault", "code"),
        [
            ("refuse", "moderation_blocked"),
            ("moderation", "moderation_blocked"),
            ("content_policy", "content_policy_violation"),
        ],
    )
    def test_by_the_gate(self, api, wire, fault, code):
        api.script({"bad": fault})
        for answer in (wire.chat("bad"), wire.generate("bad")):
            assert (answer.status, answer.json["error"]["code"]) == (400, code)
        assert [entry["usage"] for entry in api.ledger()["attempts"][-2:]] == [None, None]

    @pytest.mark.parametrize(
        ("fault", "reason", "content"),
        [
            ("refusal_field", "stop", None),
            ("content_filter", "content_filter", ""),
            ("finish:length", "length", ""),
            ("text_only", "stop", "I am sorry, I cannot draw that."),
        ],
    )
    def test_by_the_model_in_a_chat(self, api, wire, fault, reason, content):
        api.script({"bad": fault})
        (choice,) = wire.chat("bad").json["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == (reason, content)
        assert bool(choice["message"]["refusal"]) == (fault == "refusal_field")
        assert "images" not in choice["message"]
        stream = wire.chat("bad", stream=True).data.decode()
        assert f'"finish_reason":"{reason}"' in stream
        assert ('"refusal":' in stream) == (fault == "refusal_field")
        assert [entry["usd"] > 0 for entry in api.ledger()["attempts"][-2:]] == [True, True]

    def test_the_images_api_has_errors_only(self, api, wire):
        api.script({"bad": "refusal_field", "words": "text_only"})
        assert wire.generate("bad").status == 400
        assert wire.generate("words").json["data"] == []
