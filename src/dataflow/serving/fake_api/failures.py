"""Answers of a service that does not do what it was asked: errors in the words of each API."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

from dataflow.serving.fake_api.call import Call, RejectedError, Reply, event
from dataflow.serving.fake_api.script import Plan, kind_of_fault

OPENAI_TYPES = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    402: ("insufficient_credits", None),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "service_unavailable"),
}
GEMINI_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    402: "FAILED_PRECONDITION",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
GOOGLE = "type.googleapis.com/google.rpc."


def error_body(
    family: str, status: int, message: str, *, code: str | None = None, param: str | None = None, details: Any = None
) -> dict[str, Any]:
    """The JSON of an error as the family's services write it."""
    if family == "gemini":
        error = {"code": status, "message": message, "status": GEMINI_STATUSES.get(status, "UNKNOWN")}
        return {"error": error | ({"details": details} if details else {})}
    kind, usual = OPENAI_TYPES.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def rejected(family: str, error: RejectedError) -> Reply:
    body = error_body(family, error.status, error.message, code=error.code, param=error.param)
    return Reply(status=error.status, body=body)


def failure(call: Call) -> Reply | None:
    """The error that the plan has in place of an answer, unbilled; None if the model is to answer."""
    family, plan = call.asked.family, call.plan
    for name in plan:
        if kind_of_fault(name) and name.isdigit():
            return Reply(status=int(name), body=error_body(family, int(name), f"scripted: HTTP {name}"))
        if name in ("rate_limit", "rate_limit_ms", "rate_limit_date", "rate_limit_info", "quota"):
            return _too_many(family, name, plan[name])
    if "error_list" in plan:
        return Reply(status=503, body=[error_body("gemini", 503, "The model is overloaded. Please try again later.")])
    if "error_200" in plan:
        body = error_body(family, 502, "Provider returned error")
        return Reply(body=body, frames=[event(body)] if call.asked.stream else None)
    if "choice_error" in plan:
        return _choice_error(call)
    return _refusal(family, plan)


def _too_many(family: str, name: str, argument: str) -> Reply:
    if name == "quota":
        details = [{"@type": f"{GOOGLE}QuotaFailure", "violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}]
        message = "You exceeded your current quota, please check your plan and billing details."
        body = error_body(family, 429, message, code="insufficient_quota", details=details)
        if family != "gemini":
            body["error"]["type"] = "insufficient_quota"
        return Reply(status=429, body=body)
    headers, details = {}, None
    match name:
        case "rate_limit" if argument:
            headers["Retry-After"] = argument
        case "rate_limit_ms":
            headers["retry-after-ms"] = argument or "50"
        case "rate_limit_date":
            headers["Retry-After"] = formatdate(time.time() + float(argument or 1), usegmt=True)
        case "rate_limit_info":
            details = [{"@type": f"{GOOGLE}RetryInfo", "retryDelay": f"{argument or '0.05'}s"}]
    body = error_body(family, 429, "Rate limit reached for requests", details=details)
    if details is not None and family != "gemini":
        # Gateways pass the details of the service behind them through.
        body["error"]["details"] = details
    return Reply(status=429, body=body, headers=headers)


def _choice_error(call: Call) -> Reply:
    error = {"code": 502, "message": "Provider returned error"}
    if call.asked.family != "chat":
        return Reply(body=error_body(call.asked.family, 502, error["message"]))
    choice = {"index": 0, "finish_reason": "error", "error": error}
    head = {"id": "chatcmpl-error", "created": 0, "model": call.asked.model}
    if call.asked.stream:
        chunk = {**head, "object": "chat.completion.chunk", "choices": [{**choice, "delta": {"content": ""}}]}
        return Reply(frames=[event(chunk)])
    message = {"role": "assistant", "content": "", "refusal": None}
    return Reply(body={**head, "object": "chat.completion", "choices": [{**choice, "message": message}]})


def _refusal(family: str, plan: Plan) -> Reply | None:
    """A refusal by the gate before the model, which nobody pays for."""
    names = {"refuse", "content_policy", "moderation"}
    if family == "images":
        # This API has no words for a model that declines, only errors.
        names |= {"refusal_field", "content_filter", "block", "finish"}
    name = next((name for name in plan if name in names), None)
    if name is None or (family == "gemini" and name == "refuse"):
        return None
    message = "Your request was rejected by the safety system."
    code = "content_policy_violation" if name == "content_policy" else "moderation_blocked"
    body = error_body(family, 400, message, code=code)
    if family != "gemini":
        body["error"]["type"] = "image_generation_user_error"
    return Reply(status=400, body=body)
