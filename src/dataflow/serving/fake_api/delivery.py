"""How an answer goes over the wire, and how it does not."""

from __future__ import annotations

import asyncio

import orjson
from aiohttp import web  # noqa: TID253 - only the server process imports this file

from dataflow.serving.fake_api.call import Reply
from dataflow.serving.fake_api.script import Plan

FOR_EVER = 24 * 3600.0
DRIPS = 20
HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>Bad Gateway</body></html>"


def unanswered(plan: Plan) -> str | None:
    """The fault that keeps a request from the model without an answer of the service's own, or None."""
    return next((name for name in ("hang", "disconnect", "html", "empty") if name in plan), None)


async def leave(request: web.Request, how: str, argument: str = "") -> web.StreamResponse:
    """Not an answer: ``hang``, ``disconnect``, ``html`` (with the status in ``argument``, usually 200) or ``empty``."""
    match how:
        case "hang":
            await asyncio.sleep(float(argument or FOR_EVER))
        case "html":
            return web.Response(status=int(argument or 200), body=HTML, content_type="text/html")
        case "empty":
            return web.Response(status=200, body=b"", content_type="application/json")
    return _hang_up(request)


async def deliver(request: web.Request, reply: Reply, plan: Plan) -> tuple[web.StreamResponse, bool]:
    """Send an answer as the plan says; with it comes whether all of it was sent."""
    if "paid_disconnect" in plan:
        return _hang_up(request), False
    if reply.frames is None:
        data = orjson.dumps(reply.body)
        mime = (plan["wrong_type"] or "text/plain") if "wrong_type" in plan else "application/json"
        if "drip" in plan:
            return await _drip(request, reply, mime, data, float(plan["drip"] or 1.0)), True
        if reply.status == 200 and any(name in plan for name in ("cut", "half_stream", "no_end")):
            return await _cut(request, reply, mime, data), False
        response = web.Response(status=reply.status, body=data, headers=dict(reply.headers))
        response.headers["Content-Type"] = mime
        return response, True
    frames = reply.frames if "no_end" in plan else [*reply.frames, *reply.end]
    mime = (plan["wrong_type"] or "text/plain") if "wrong_type" in plan else "text/event-stream"
    response = web.StreamResponse(status=reply.status, headers=dict(reply.headers))
    response.headers["Content-Type"] = mime
    if "drip" in plan:
        return await _drip(request, reply, mime, b"".join(frames), float(plan["drip"] or 1.0)), "no_end" not in plan
    await response.prepare(request)
    if "cut" in plan:
        # The connection is lost within an event, and without the mark that ends a chunked body.
        data = b"".join(frames)
        await response.write(data[: len(data) // 2])
        await asyncio.sleep(0.01)
        _hang_up(request)
        return response, False
    if "half_stream" in plan:
        frames = frames[: len(frames) // 2]
    for frame in frames:
        await response.write(frame)
    await response.write_eof()
    return response, "no_end" not in plan and "half_stream" not in plan


async def _cut(request: web.Request, reply: Reply, mime: str, data: bytes) -> web.StreamResponse:
    """A body that ends before the length it announced."""
    response = web.StreamResponse(status=reply.status, headers={**reply.headers, "Content-Length": str(len(data))})
    response.headers["Content-Type"] = mime
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    await asyncio.sleep(0.01)
    _hang_up(request)
    return response


async def _drip(request: web.Request, reply: Reply, mime: str, data: bytes, seconds: float) -> web.StreamResponse:
    """A whole answer in small pieces over a time."""
    response = web.StreamResponse(status=reply.status, headers=dict(reply.headers))
    response.headers["Content-Type"] = mime
    await response.prepare(request)
    step = max(1, -(-len(data) // DRIPS))
    for at in range(0, len(data), step):
        await response.write(data[at : at + step])
        await asyncio.sleep(seconds / DRIPS)
    await response.write_eof()
    return response


def _hang_up(request: web.Request) -> web.StreamResponse:
    """Close the connection; nothing more is sent, whatever is returned to the framework."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()
