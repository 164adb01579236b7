"""From an error of an image API to the class that says what is to be done about it; pure, nothing is asked.

Services agree on little: the same trouble comes as a status, as a word in one of a dozen places of the body, or inside
an answer with status 200. Where a word and the status disagree, the word wins only where believing the status would
stop a run (a refusal sent as 403) or repeat a call that can never work (a spent budget sent as 429).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import orjson

from dataflow.errors import (
    BadRequestError,
    FatalServingError,
    RateLimitError,
    RefusedError,
    RetryError,
    ServingError,
)

MESSAGE_LIMIT = 500
"""Characters of the longest message."""

MAX_WAIT = 86_400.0
"""Seconds; a service that asks for a longer wait is taken to mean this."""

_READ_LIMIT = 20_000
_MIN_SECRET = 6
_HINT = "is the base URL right? OpenAI-compatible ones usually end in /v1"

# Parts of codes without punctuation and case: content_policy_violation, ContentPolicyViolationError, ...
_REFUSED = (
    "moderationblocked",
    "contentpolicyviolation",
    "contentfilter",
    "contentmoderated",
    "requestmoderated",
    "responsibleaipolicy",
    "sensitivecontent",
    "sensitivewords",
    "datainspectionfailed",
    "prohibitedcontent",
    "imagesafety",
)
_SPENT = (
    "insufficientquota",
    "insufficientuserquota",
    "insufficientcredit",
    "insufficientbalance",
    "billinghardlimit",
    "billingnotactive",
    "paymentrequired",
    "tokenquotafailed",
)
_KEY = (
    "invalidapikey",
    "incorrectapikey",
    "apikeyinvalid",
    "apikeyexpired",
    "apikeyservice",
    "authenticationerror",
    "accountdeactivated",
    "unauthenticated",
)
_NO_MODEL = ("modelnotfound", "nosuchmodel", "modelnotexist")

_REFUSED_TEXT = re.compile(
    r"safety system|content[ _]policy|contentpolicyviolation|content management policy|content moderation"
    r"|usage guidelines|usage polic|prohibited use policy|responsible ai|safety_check|content exists risk"
    r"|requires moderation",
    re.IGNORECASE,
)
_KEY_TEXT = re.compile(
    r"api key (?:not valid|expired|not found)|location is not supported|please enable billing", re.IGNORECASE
)
_NO_MODEL_TEXT = re.compile(
    r"\bmodels?\b.{0,200}?(?:does not exist|not found|no longer available|has been (?:deprecated|retired|shut down))"
    r"|no endpoints found for|not a valid model",
    re.IGNORECASE,
)
_NO_PATH = ("", "not found", "404 not found", "404 page not found", "method not allowed")

# What words mean that come inside an answer with status 200, the names of gRPC, OpenAI and vLLM.
_STATUS_OF = {
    "invalidargument": 400,
    "failedprecondition": 400,
    "outofrange": 400,
    "invalidrequesterror": 400,
    "badrequesterror": 400,
    "imagegenerationusererror": 400,
    "unauthenticated": 401,
    "authenticationerror": 401,
    "permissiondenied": 403,
    "permissionerror": 403,
    "notfound": 404,
    "notfounderror": 404,
    "aborted": 409,
    "resourceexhausted": 429,
    "ratelimiterror": 429,
    "ratelimitexceeded": 429,
    "toomanyrequests": 429,
    "unavailable": 503,
    "overloadederror": 529,
}

_UNKNOWN = 0
_AGAIN = frozenset({_UNKNOWN, 408, 409, 421, 424, 425, 499})
_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(\d{1,15}(?:\.\d{0,15})?)(ms|us|µs|ns|d|h|m|s)")
_TEXT_WAIT = re.compile(r"(?:try again|retry) in ((?:\d{1,9}(?:\.\d{1,15})?(?:ms|h|m|s))+)", re.IGNORECASE)

_SECRETS = (
    (re.compile(r"\b(bearer)\s+[\w.~+/=*-]{8,}", re.IGNORECASE), r"\1 [redacted]"),
    (re.compile(r"\b(?:sk|rk|gsk|xai)-[\w.*-]{6,}|\bAIza[\w*-]{6,}|\bya29\.[\w.-]{6,}|\bhf_\w{6,}"), "[redacted]"),
    (
        re.compile(
            r"\b((?:api[-_]?)?key|(?:access[-_]?)?token|sig(?:nature)?|secret|password)=[^&\s\"'<>]+", re.IGNORECASE
        ),
        r"\1=[redacted]",
    ),
    (
        re.compile(r"\b(api[-_]?key|authorization)([\"']?: ?[\"']?)[^\s\"',&}]{8,}", re.IGNORECASE),
        r"\1\2[redacted]",
    ),
    (re.compile(r"\b(https?://)[^\s/@]{1,200}@", re.IGNORECASE), r"\1[redacted]@"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without keys: the given ones, and whatever looks like one (``Bearer …``, ``sk-…``, ``key=…``).

    Args:
        text: anything.
        secrets: what must not be shown; those of fewer than 6 characters are no secrets (a local server's ``none``).
    """
    for secret in sorted({str(secret).strip() for secret in secrets if secret}, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET:
            for form in (secret, quote(secret, safe="")):
                text = text.replace(form, "[redacted]")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def quoted(text: str, secrets: Iterable[str] = (), limit: int = MESSAGE_LIMIT) -> str:
    """Foreign text, fit for a message: one line without keys or control characters, at most ``limit`` characters.

    Marks that turn the order of letters around, so that a text reads as another, are left out as well.
    """
    text = text[:_READ_LIMIT].encode(errors="replace").decode()
    text = re.sub(r"[\x00-\x20\x7f-\xa0\u2028-\u202e\u2066-\u2069]+", " ", redact(text, secrets)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """What a body says about an error.

    Attributes:
        stated: it is the form of an error; False for any other JSON.
        words: codes, types and reasons, without punctuation and case.
        code: the first of them as the service writes it.
        number: a status named in the body, 400 to 599, or None.
        message: the service's own words.
        details: Gemini's list of details.
        headers: those a gateway passes on in the body, names in lower case.
    """

    stated: bool = False
    words: tuple[str, ...] = ()
    code: str = ""
    number: int | None = None
    message: str = ""
    details: tuple[Mapping[str, Any], ...] = ()
    headers: Mapping[str, str]

    def has(self, parts: tuple[str, ...]) -> bool:
        return any(part in word for word in self.words for part in parts)


def classify(
    status: int,
    headers: Mapping[str, str],
    body: bytes | str | Mapping[str, Any],
    *,
    service: str,
    secrets: Iterable[str] = (),
) -> ServingError:
    """The error that an answer stands for; it is returned, not raised.

    Args:
        status: of the HTTP answer; below 400 for an error inside a good answer, or an answer that is none.
        headers: of the HTTP answer, names in any case; empty if not known.
        body: as received, or parsed; the ``error`` object alone will do.
        service: its name, for the message.
        secrets: what must not stand in the message, see :func:`redact`.

    Returns:
        ``RefusedError``: moderation, also as 403, and 451. ``FatalServingError``: ``auth`` (401, 403, a bad key sent
        as 400), ``quota`` (402, no credit, Gemini's daily quota), ``no_such_model``, ``redirect`` (3xx).
        ``RateLimitError``: other 429, and
        503 or 529 with a stated wait; ``retry_after`` is 0 to ``MAX_WAIT``. ``RetryError``: ``transient`` (408, 409,
        425, 5xx and the like), ``not_json`` (below 400 without JSON), ``bad_reply`` (below 400, JSON without an error).
        ``BadRequestError``: every other 4xx. The message has at most ``MESSAGE_LIMIT`` characters.
    """
    if 300 <= status < 400:
        target = next((value for name, value in headers.items() if str(name).lower() == "location"), "nowhere")
        message = f"{service} answers {status}: it redirects to {target}, which is not followed; name the right address"
        return FatalServingError(quoted(message, secrets), reason="redirect")
    parsed, text = _parse(body)
    fault = _read(parsed)
    known = {**fault.headers, **{str(name).lower(): str(value) for name, value in headers.items()}}
    inside = status < 400
    if inside and not fault.stated and not fault.has(_REFUSED):
        return _unusable(status, parsed, text, service, secrets)
    number = status
    if inside:
        number = fault.number or next((_STATUS_OF[word] for word in fault.words if word in _STATUS_OF), _UNKNOWN)
    said = fault.message or _summary(parsed, text)
    start = f"{service} reports an error" if inside else f"{service} answers {status}"
    message = f"{start}{f' {fault.code}' if fault.code else ''}: {said or 'nothing more'}"
    if number in (404, 405):
        plain = said[:200].strip(" .!{}\r\n").lower()
        if parsed is None or plain in _NO_PATH or plain.startswith("invalid url"):
            message = f"{start}: {quoted(said, secrets, 200)} ({_HINT})"
    return _decide(number, known, fault, quoted(message, secrets))


def _decide(number: int, headers: Mapping[str, str], fault: _Fault, message: str) -> ServingError:
    said = fault.message[:_READ_LIMIT]
    told = number in (_UNKNOWN, 400, 403, 422) and _REFUSED_TEXT.search(said)
    if number == 451 or fault.has(_REFUSED) or told:
        return RefusedError(message)
    # Behind a gateway's 5xx a word may be about the gateway's own account, which is for the gateway to mend.
    own = number < 500
    if number == 402 or (own and fault.has(_SPENT)) or (number == 429 and _is_daily(fault)):
        return FatalServingError(message, reason="quota")
    if number == 429:
        wait = _stated_wait(headers, fault)
        if wait is None:
            wait = _reset_wait(headers)
        if wait is None and (found := _TEXT_WAIT.search(said)):
            wait = _seconds(found[1])
        return RateLimitError(message, retry_after=wait)
    if number in (401, 403, 407) or (own and (fault.has(_KEY) or (number == 400 and _KEY_TEXT.search(said)))):
        return FatalServingError(message, reason="auth")
    if number in (503, 529) and (wait := _stated_wait(headers, fault)) is not None:
        return RateLimitError(message, retry_after=wait)
    if number >= 500 or number in _AGAIN:
        return RetryError(message)
    gone = number in (404, 410) and _NO_MODEL_TEXT.search(said)
    if fault.has(_NO_MODEL) or gone or (number == 400 and "not a valid model" in said.lower()):
        return FatalServingError(message, reason="no_such_model")
    return BadRequestError(message)


def _unusable(status: int, parsed: Any, text: str, service: str, secrets: Iterable[str]) -> RetryError:
    if isinstance(parsed, Mapping):
        message = f"{service} answers {status} with JSON that is no answer: {_summary(parsed, text)}"
        return RetryError(quoted(message, secrets), reason="bad_reply")
    said = quoted(_summary(parsed, text), secrets, 300) or "an empty body"
    hint = f" ({_HINT})" if _is_page(text) or 300 <= status < 400 else ""
    return RetryError(f"{quoted(service, secrets, 80)} answers {status} without JSON: {said}{hint}", reason="not_json")


# -- reading a body ---------------------------------------------------------------------------------------------------


def _parse(body: object) -> tuple[Any, str]:
    """The JSON in a body, or None, and its text, or ``""``."""
    text = ""
    parsed: Any = body
    if isinstance(body, bytes | bytearray | memoryview | str):
        text = body if isinstance(body, str) else bytes(body).decode(errors="replace")
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            parsed = None
    if isinstance(parsed, list | tuple) and len(parsed) == 1:
        parsed = parsed[0]
    return (parsed if isinstance(parsed, Mapping) else None), text


def _read(body: Mapping[str, Any] | None) -> _Fault:
    if body is None:
        return _Fault(headers={})
    error = body.get("error")
    if isinstance(error, list | tuple) and error:
        error = error[0]
    inner = error if isinstance(error, Mapping) else body
    metadata = _mapping(inner.get("metadata"))
    details = inner.get("details")
    found = tuple(entry for entry in details if isinstance(entry, Mapping)) if isinstance(details, list) else ()
    places = [inner.get(name) for name in ("code", "status", "type", "reason")]
    places += [_mapping(inner.get(name)).get("code") for name in ("innererror", "inner_error")]
    places += [entry.get("reason") for entry in found]
    places += [metadata.get(name) for name in ("provider_code", "error_type")]
    codes = [place for place in places if isinstance(place, str) and place and place != "error"]
    words = [_squeezed(code) for code in codes if not code.isdecimal()]
    if metadata.get("reasons") or metadata.get("flagged_input"):
        words.append("contentmoderated")  # how OpenRouter's 403 for a flagged prompt differs from one for a bad key
    numbers = (_http(inner.get(name)) for name in ("code", "status", "status_code", "http_code"))
    marks = ("detail", "errors", "message", "msg")
    return _Fault(
        stated=bool(error) or inner.get("object") == "error" or any(inner.get(mark) for mark in marks),
        words=tuple(words),
        code=next((code for code in codes if not code.isdecimal()), ""),
        number=next((number for number in numbers if number is not None), None),
        message=_message(inner, error, metadata),
        details=found,
        headers={str(name).lower(): str(value) for name, value in _mapping(metadata.get("headers")).items()},
    )


def _message(inner: Mapping[str, Any], error: object, metadata: Mapping[str, Any]) -> str:
    said = next((inner[name] for name in ("message", "msg", "detail", "errors") if inner.get(name)), error)
    if isinstance(said, list | tuple):
        said = "; ".join(_complaint(entry) for entry in said[:10])
    text = said if isinstance(said, str) else _dumped(said)
    raw = metadata.get("raw")
    return f"{text}: {raw if isinstance(raw, str) else _dumped(raw)}" if raw else text


def _complaint(entry: object) -> str:
    """One of FastAPI's complaints: where in the request, and what."""
    if isinstance(entry, Mapping) and isinstance(entry.get("msg"), str):
        where = entry.get("loc")
        place = ".".join(str(name)[:100] for name in where[:10]) if isinstance(where, list | tuple) else ""
        return f"{place}: {entry['msg']}" if place else entry["msg"]
    return entry if isinstance(entry, str) else _dumped(entry)


def _http(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) == 3:
        value = int(value)
    return value if type(value) is int and 400 <= value <= 599 else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _squeezed(text: str) -> str:
    return re.sub(r"[\W_]", "", text[:200]).lower()


def _dumped(value: object) -> str:
    if value is None:
        return ""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__


def _is_page(text: str) -> bool:
    return text[:200].lstrip("\ufeff \t\r\n").startswith("<")


def _summary(parsed: object, text: str) -> str:
    """What to show of a body in which no error was found."""
    if parsed is not None:
        return _dumped(parsed)
    if not _is_page(text):
        return text
    page = text[:_READ_LIMIT]
    start = page.lower().find("<title")
    start = page.find(">", start) + 1 if start >= 0 else 0
    end = page.find("<", start) if start else -1
    return f"a page titled {page[start:end].strip()!r}" if start and end > start else "a page of HTML"


# -- how long to wait -------------------------------------------------------------------------------------------------


def _is_daily(fault: _Fault) -> bool:
    for entry in fault.details:
        violations = entry.get("violations")
        for violation in violations if isinstance(violations, list) else ():
            quota = _mapping(violation)
            for name in ("quotaId", "quota_id", "quotaMetric", "quota_metric"):
                if "perday" in _squeezed(str(quota.get(name, ""))):
                    return True
    return False


def _stated_wait(headers: Mapping[str, str], fault: _Fault) -> float | None:
    """Seconds that the service itself asks to wait, 0 to ``MAX_WAIT``, or None."""
    milliseconds = _seconds(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return _bounded(milliseconds / 1000)
    wait = _seconds(headers.get("retry-after", ""))
    if wait is None:
        wait = _until(headers.get("retry-after", ""), headers.get("date", ""))
    if wait is None:
        delays = (entry.get("retryDelay") or entry.get("retry_delay") for entry in fault.details)
        wait = next((found for delay in delays if (found := _seconds(delay)) is not None), None)
    return wait if wait is None else _bounded(wait)


def _reset_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until all of the limits that are used up start anew, or None if none is known to be used up."""
    waits: list[float] = []
    for name, value in headers.items():
        before, reset, kind = name.partition("ratelimit-reset")
        if not reset or _seconds(headers.get(f"{before}ratelimit-remaining{kind}", "")) != 0:
            continue
        wait = _seconds(value)
        if wait is None:
            continue
        if wait > 1e9:  # a time of day, in seconds or in milliseconds since 1970
            wait = (wait / 1000 if wait > 1e11 else wait) - _now(headers.get("date", ""))
        waits.append(_bounded(wait))
    return max(waits, default=None)


def _seconds(text: object) -> float | None:
    """Seconds from ``2``, ``0.5``, ``34s``, ``6m0s``, ``20ms``; None for anything else."""
    text = text.strip().lower() if isinstance(text, str) and len(text) < 64 else ""
    if re.fullmatch(r"\d+(?:\.\d*)?", text, re.ASCII):
        return float(text)
    pieces = _DURATION.findall(text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)


def _until(text: str, date: str) -> float | None:
    moment = _moment(text)
    return None if moment is None else moment - _now(date)


def _now(date: str) -> float:
    """The service's own clock where it shows it: that of this machine may be wrong."""
    moment = _moment(date)
    return time.time() if moment is None else moment


def _moment(text: str) -> float | None:
    try:
        moment = parsedate_to_datetime(text[:64])
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _bounded(wait: float) -> float:
    return min(max(wait, 0.0), MAX_WAIT) if math.isfinite(wait) else MAX_WAIT
