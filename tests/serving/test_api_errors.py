"""Every error of an image API, and what is to be done about it."""

from __future__ import annotations

import json
import pickle
import time
from email.utils import formatdate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflow.errors import (
    BadRequestError,
    FatalServingError,
    RateLimitError,
    RefusedError,
    RetryError,
    ServingError,
)
from dataflow.serving.api_errors import MAX_WAIT, MESSAGE_LIMIT, classify, quoted, redact

NOW = 1_790_000_000
DATE = formatdate(NOW, usegmt=True)
GOOGLE = "type.googleapis.com/google.rpc."


def openai(message="m", kind="invalid_request_error", code=None, **more) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


def google(code, word, message="m", *details) -> dict:
    return {"error": {"code": code, "message": message, "status": word, "details": list(details)}}


def retry_info(delay) -> dict:
    return {"@type": f"{GOOGLE}RetryInfo", "retryDelay": delay}


def quota(name) -> dict:
    return {"@type": f"{GOOGLE}QuotaFailure", "violations": [{"quotaMetric": "x", "quotaId": name}]}


def error_of(status, body, headers=None) -> ServingError:
    return classify(status, headers or {}, body, service="Acme")


XAI = {
    "code": "The caller does not have permission to execute the specified operation",
    "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO",
}
AZURE = openai("filtered", None, "400", innererror={"code": "ResponsibleAIPolicyViolation"})
FLAGGED = {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["sexual"], "flagged_input": "..."}}}
BEHIND = {
    "error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": "the safety system says no"}}
}
BAD_KEY = google(400, "INVALID_ARGUMENT", "API key not valid.", {"reason": "API_KEY_INVALID"})
ABROAD = google(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")
NO_GEMINI = google(404, "NOT_FOUND", "models/gemini-1.0-x is not found for API version v1beta, or is not supported")
MINUTE = google(
    429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", quota("RequestsPerMinute"), retry_info("34s")
)
DAY = google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", quota("GenerateRequestsPerDay-Free"))
NO_CHANNEL = openai("no channel for model x", "new_api_error", "model_not_found")


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        # moderation
        (400, openai("no", "image_generation_user_error", "moderation_blocked"), RefusedError, "refused"),
        (400, openai("no", code="content_policy_violation"), RefusedError, "refused"),
        (400, openai("Your request was rejected as a result of our safety system."), RefusedError, "refused"),
        (400, openai("x", code="content_filter"), RefusedError, "refused"),
        (400, AZURE, RefusedError, "refused"),
        (400, {"code": "DataInspectionFailed", "message": "x"}, RefusedError, "refused"),
        (400, openai("x", "BadRequest", "InputTextSensitiveContentDetected"), RefusedError, "refused"),
        (400, BEHIND, RefusedError, "refused"),
        (403, XAI, RefusedError, "refused"),
        (403, FLAGGED, RefusedError, "refused"),
        (500, openai("x", "new_api_error", "sensitive_words_detected"), RefusedError, "refused"),
        (451, "", RefusedError, "refused"),
        (200, {"id": "7", "status": "Request Moderated", "result": None}, RefusedError, "refused"),
        (200, openai("x", code="moderation_blocked"), RefusedError, "refused"),
        (200, {"error": "blocked by our content policy"}, RefusedError, "refused"),
        # keys
        (401, openai("Incorrect API key provided", code="invalid_api_key"), FatalServingError, "auth"),
        (401, "", FatalServingError, "auth"),
        (403, google(403, "PERMISSION_DENIED"), FatalServingError, "auth"),
        (400, BAD_KEY, FatalServingError, "auth"),
        (400, ABROAD, FatalServingError, "auth"),
        (407, "<html>proxy</html>", FatalServingError, "auth"),
        (200, {"error": {"code": 401, "message": "No auth credentials found"}}, FatalServingError, "auth"),
        # money
        (402, {"error": {"code": 402, "message": "Insufficient credits"}}, FatalServingError, "quota"),
        (402, b"", FatalServingError, "quota"),
        (429, openai("m", "insufficient_quota", "insufficient_quota"), FatalServingError, "quota"),
        (400, openai("m", code="billing_hard_limit_reached"), FatalServingError, "quota"),
        (403, openai("m", "new_api_error", "insufficient_user_quota"), FatalServingError, "quota"),
        (429, DAY, FatalServingError, "quota"),
        (429, json.dumps([DAY]), FatalServingError, "quota"),
        (200, {"error": {"code": "402", "message": "m"}}, FatalServingError, "quota"),
        # too fast
        (429, openai("m", "requests", "rate_limit_exceeded"), RateLimitError, "rate_limit"),
        (429, MINUTE, RateLimitError, "rate_limit"),
        (429, "slow down", RateLimitError, "rate_limit"),
        (200, {"error": {"code": 429, "message": "m"}}, RateLimitError, "rate_limit"),
        (200, openai("m", "rate_limit_error"), RateLimitError, "rate_limit"),
        # try again
        *[(status, openai("m", "server_error"), RetryError, "transient") for status in (408, 409, 425, 500, 502, 503)],
        *[(status, b"<html><title>Bad</title>", RetryError, "transient") for status in (504, 520, 524, 529, 421, 499)],
        (503, NO_CHANNEL, RetryError, "transient"),
        (500, openai("m", "insufficient_quota"), RetryError, "transient"),
        (200, {"error": {"code": 502, "message": "Provider returned error"}}, RetryError, "transient"),
        (200, {"error": {"message": "odd"}}, RetryError, "transient"),
        (200, {"error": "odd"}, RetryError, "transient"),
        (200, google(503, "UNAVAILABLE"), RetryError, "transient"),
        # no answer at all
        (200, "<!DOCTYPE html><title>Login</title>", RetryError, "not_json"),
        (200, b"", RetryError, "not_json"),
        (200, '{"choices": [', RetryError, "not_json"),
        (200, "[1, 2]", RetryError, "not_json"),
        (302, "", FatalServingError, "redirect"),
        (200, {"id": "7"}, RetryError, "bad_reply"),
        (200, {}, RetryError, "bad_reply"),
        # requests
        *[(status, openai("m"), BadRequestError, "bad_request") for status in (400, 404, 405, 413, 415, 422, 418)],
        (422, {"detail": [{"loc": ["body", "size"], "msg": "bad size", "type": "x"}]}, BadRequestError, "bad_request"),
        (400, google(400, "INVALID_ARGUMENT"), BadRequestError, "bad_request"),
        (200, google(0, "INVALID_ARGUMENT"), BadRequestError, "bad_request"),
        (
            200,
            {"object": "error", "message": "m", "type": "BadRequestError", "code": 400},
            BadRequestError,
            "bad_request",
        ),
        (404, openai("No such File object: file-1"), BadRequestError, "bad_request"),
        # models
        (404, openai("The model `x` does not exist", code="model_not_found"), FatalServingError, "no_such_model"),
        (404, {"object": "error", "message": "The model `x` does not exist."}, FatalServingError, "no_such_model"),
        (404, NO_GEMINI, FatalServingError, "no_such_model"),
        (400, {"error": {"message": "x is not a valid model ID", "code": 400}}, FatalServingError, "no_such_model"),
        (404, {"error": {"message": "No endpoints found for x/y.", "code": 404}}, FatalServingError, "no_such_model"),
        (410, openai("The model x has been deprecated"), FatalServingError, "no_such_model"),
    ],
)
def test_each_has_its_class(status, body, kind, reason):
    forms = [body]
    if isinstance(body, dict):
        text = json.dumps(body)
        forms += [text, text.encode(), f"[{text}]"]
        if isinstance(body.get("error"), dict) and status >= 400:
            forms.append(body["error"])  # all that the openai client keeps
    for form in forms:
        error = error_of(status, form)
        assert type(error) is kind, error
        assert error.reason == reason
        assert "Acme" in str(error)
        assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__


class TestWaiting:
    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({}, None),
            ({"Retry-After": "7"}, 7.0),
            ({"retry-after": "0.5"}, 0.5),
            ({"Retry-After": "0"}, 0.0),
            ({"Retry-After-Ms": "250", "retry-after": "1"}, 0.25),
            ({"Retry-After": formatdate(NOW + 90, usegmt=True), "Date": DATE}, 90.0),
            ({"Retry-After": formatdate(NOW - 90, usegmt=True), "Date": DATE}, 0.0),
            ({"Retry-After": "99999999999"}, MAX_WAIT),
            ({"Retry-After": "9" * 50}, MAX_WAIT),
            *[({"Retry-After": odd}, None) for odd in ("", "soon", "-5", "nan", "inf", "1e3", "٣", "5 s", "s" * 100)],
            ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360.0),
            ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "6m0s"}, None),
            ({"x-ratelimit-reset-requests": "6m0s"}, None),
            (
                {
                    "x-ratelimit-remaining-requests": "0",
                    "x-ratelimit-reset-requests": "120ms",
                    "x-ratelimit-remaining-tokens": "0",
                    "x-ratelimit-reset-tokens": "1h2m3.5s",
                },
                3723.5,
            ),
            ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s", "retry-after": "9"}, 9.0),
            ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 20}000", "Date": DATE}, 20.0),
            ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 20}", "Date": DATE}, 20.0),
            ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "odd"}, None),
        ],
    )
    def test_headers(self, headers, seconds):
        error = error_of(429, openai(), headers)
        assert type(error) is RateLimitError
        assert error.retry_after == (None if seconds is None else pytest.approx(seconds))

    def test_a_date_without_a_clock_beside_it(self):
        error = error_of(429, "", {"Retry-After": formatdate(time.time() + 100, usegmt=True)})
        assert 90 < error.retry_after <= 101

    @pytest.mark.parametrize(
        ("body", "seconds"),
        [
            (MINUTE, 34.0),
            ([MINUTE], 34.0),
            (google(429, "RESOURCE_EXHAUSTED", "m", {}, retry_info("0.05s")), 0.05),
            (google(429, "RESOURCE_EXHAUSTED", "m", retry_info(34)), None),
            (openai("Limit reached. Please try again in 1m2.5s. Visit"), 62.5),
            (google(429, "RESOURCE_EXHAUSTED", "Please retry in 34.074824224s."), 34.074824224),
            ({"error": {"metadata": {"headers": {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "5"}}}}, 5.0),
        ],
    )
    def test_bodies(self, body, seconds):
        assert error_of(429, body).retry_after == (None if seconds is None else pytest.approx(seconds))

    @pytest.mark.parametrize("status", [503, 529])
    def test_an_overloaded_service_that_names_a_time(self, status):
        error = error_of(status, openai(), {"Retry-After": "3"})
        assert (type(error), error.retry_after) == (RateLimitError, 3.0)
        assert type(error_of(status, "", {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "3"})) is RetryError
        assert type(error_of(500, "", {"Retry-After": "3"})) is RetryError


class TestMessages:
    @pytest.mark.parametrize(
        ("status", "body", "message"),
        [
            (400, openai("Bad size", code="invalid_size"), "Acme answers 400 invalid_size: Bad size"),
            (500, openai("Oops", "server_error"), "Acme answers 500 server_error: Oops"),
            (200, {"error": {"code": 502, "message": "Gone"}}, "Acme reports an error: Gone"),
            (429, google(429, "RESOURCE_EXHAUSTED", "Slow"), "Acme answers 429 RESOURCE_EXHAUSTED: Slow"),
            (
                422,
                {"detail": [{"loc": ["body", 1], "msg": "a"}, "b", {"c": 1}]},
                'Acme answers 422: body.1: a; b; {"c":1}',
            ),
            (400, BEHIND, "Acme answers 400: Provider returned error: the safety system says no"),
            (502, "<html>\n<TITLE>502 Bad Gateway</TITLE>", "Acme answers 502: a page titled '502 Bad Gateway'"),
            (502, "<html>", "Acme answers 502: a page of HTML"),
            (503, "upstream\n\tgone\x1b[31m", "Acme answers 503: upstream gone [31m"),
            (500, b"", "Acme answers 500: nothing more"),
            (500, b"\xff\xfe", "Acme answers 500: \ufffd\ufffd"),
            (500, {"odd": [1]}, 'Acme answers 500: {"odd":[1]}'),
        ],
    )
    def test_status_and_the_services_own_words(self, status, body, message):
        assert str(error_of(status, body)) == message

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (404, {"detail": "Not Found"}),
            (404, "404 page not found"),
            (404, openai("Invalid URL (POST /v1/v1/chat/completions)")),
            (404, "<html>nginx"),
            (405, {"detail": "Method Not Allowed"}),
            (200, "<html><title>Sign in"),
        ],
    )
    def test_a_wrong_url_is_hinted_at(self, status, body):
        assert "base URL" in str(error_of(status, body))
        assert "base URL" not in str(error_of(404, openai("No such file")))

    def test_they_are_short(self):
        for body in (
            openai("long " * 10_000),
            "long " * 10_000,
            {"x": "long " * 10_000},
            openai("m", code="long" * 10_000),
        ):
            for status in (200, 400, 404, 429, 500):
                assert len(str(error_of(status, body))) <= MESSAGE_LIMIT

    def test_no_key_gets_into_them(self):
        secret = "correct-horse/battery"
        said = f"key {secret} or sk-proj-abc123456789 refused, see https://x.example/?key=AIzaSyA1234567890&a=1"
        for status in (200, 400, 401, 404, 429, 451, 500):
            for body in (openai(said), said, {"odd": said}, f"<title>{said}</title>", openai("m", code=said)):
                message = str(classify(status, {}, body, service=f"https://u:{secret}@host", secrets=[secret]))
                for part in ("horse", "sk-proj", "AIza"):
                    assert part not in message


class TestRedact:
    @pytest.mark.parametrize(
        ("text", "result"),
        [
            ("Authorization: Bearer abcdefghij1", "Authorization: Bearer [redacted]"),
            ("authorization=bearer  abc.def-ghi/jkl=", "authorization=bearer [redacted]"),
            ("Incorrect API key provided: sk-abcd****wxyz. Find", "Incorrect API key provided: [redacted] Find"),
            ("AIzaSyD-1234567890abcdefghij_k!", "[redacted]!"),
            ("xai-abcdefgh gsk-abcdefgh hf_abcdefgh", "[redacted] [redacted] [redacted]"),
            ("https://h/v1?key=abc&alt=sse", "https://h/v1?key=[redacted]&alt=sse"),
            ("https://h/a.png?X-Goog-Signature=0a1b&x=1", "https://h/a.png?X-Goog-Signature=[redacted]&x=1"),
            ("https://me:pass@h/v1", "https://[redacted]@h/v1"),
            ("{'x-goog-api-key': 'abcdefgh12'}", "{'x-goog-api-key': '[redacted]'}"),
            ("a task-oriented disk-image, the bearer of news, monkey=1, max_tokens=5", None),
        ],
    )
    def test_what_looks_like_a_key(self, text, result):
        assert redact(text) == (text if result is None else result)

    def test_given_secrets(self):
        assert redact("a s3cret!! b s3cret!!2", ["s3cret!!", "s3cret!!2", "", None]) == "a [redacted] b [redacted]"
        assert redact("?t=s3cret%21%2F", ["s3cret!/"]) == "?t=[redacted]"
        assert redact("EMPTY is none", ["EMPTY", "none"]) == "EMPTY is none"

    def test_quoted_text_is_one_clean_line(self):
        assert quoted("a\n\x00 b\x85\u2028c\ud800 ") == "a b c?"
        assert quoted("x" * 600) == "x" * 499 + "…"
        assert quoted("sk-abcdefghijk" * 2000, limit=20) == "[redacted]"


def test_bodies_of_any_length_take_no_more_than_linear_time():
    for piece in ("model ", "sk-", "Bearer ", "....", "http://", "try again in 1", "<title", "key=", "api_key: ", "1s"):
        for status in (200, 400, 404, 429):
            text = piece * 300_000
            for body in (text, {"error": {"message": text, "code": text, "details": [{"retryDelay": text}]}}):
                classify(status, {"retry-after": text, "date": text}, body, service="Acme", secrets=["abcdefgh"])


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([429, "402", "3s"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("error", "code", "status", "type", "message", "detail", "errors", "msg", "loc", "object"),
                    *("details", "reason", "violations", "quotaId", "retryDelay"),
                    *("metadata", "headers", "raw", "reasons", "innererror"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, database=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([0, 200, 302, 400, 403, 404, 429, 500, 503, 999]), st.binary(max_size=20) | st.text() | ODD, ODD)
def test_any_body_is_a_serving_error(status, body, value):
    headers = {"Retry-After": str(value), "Date": str(body), "x-ratelimit-reset": str(value)}
    error = classify(status, headers, body, service="Acme")
    assert isinstance(error, ServingError)
    assert len(str(error)) <= MESSAGE_LIMIT
    wait = getattr(error, "retry_after", None)
    assert wait is None or 0 <= wait <= MAX_WAIT
