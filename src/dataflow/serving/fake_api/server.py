"""The web server: endpoints that make something, and what all of them share (key, limit, ledger, faults)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web  # noqa: TID253 - only the server process imports this file

from dataflow.errors import ConfigError
from dataflow.serving.fake_api import batches, chat, gemini, images
from dataflow.serving.fake_api.call import Asked, RejectedError, json_object
from dataflow.serving.fake_api.delivery import deliver, leave, unanswered
from dataflow.serving.fake_api.failures import error_body, failure, rejected
from dataflow.serving.fake_api.forms import read_form
from dataflow.serving.fake_api.ledger import Entry
from dataflow.serving.fake_api.world import World, played

LARGEST_BODY = 256 * 2**20
SECRETS = ("authorization", "x-goog-api-key", "api-key", "cookie")
MODELS = ("fake-image", "gpt-image-2", "gemini-2.5-flash-image", "gemini-3-pro-image", "fake-text")
WORLD: web.AppKey[World] = web.AppKey("world", World)

Parse = Callable[[web.Request, World], Awaitable[Asked]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(world: World) -> web.Application:
    """The service as an aiohttp application."""
    app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_gate])
    app[WORLD] = world
    app.router.add_post("/v1/chat/completions", _endpoint("chat", _chat))
    app.router.add_post("/v1/images/generations", _endpoint("images", _generation))
    app.router.add_post("/v1/images/edits", _endpoint("images", _edit))
    app.router.add_get("/v1/images/{name}/content", _content)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    batches.add_routes(app, world)
    for name, asks in (("generateContent", False), ("streamGenerateContent", True)):
        app.router.add_post(
            f"/{{version:v1|v1beta|v1alpha}}/models/{{model}}:{name}", _endpoint("gemini", _gemini(stream=asks))
        )
    app.router.add_get("/_ledger", _ledger)
    app.router.add_get("/_requests", _requests)
    app.router.add_post("/_script", _script)
    app.router.add_post("/_reset", _reset)
    app.router.add_get("/_redirect/{target}", _redirect)
    app.router.add_get("/_odd/{name}", _odd)
    app.router.add_get("/_trap", _trap)
    return app


@web.middleware
async def _gate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep out who has no key; turn what is wrong with a request into the family's own error."""
    world = request.app[WORLD]
    family = "gemini" if request.path.startswith(("/v1beta", "/v1alpha", "/upload")) or ":" in request.path else "chat"
    public = request.path.startswith(("/_", "/health", "/v1/images/")) and request.method == "GET"
    if not public and not request.path.startswith("/_") and not _key_fits(request, world.options.key):
        await request.read()
        world.entries.append(Entry(endpoint=request.path, status=401, key=_has_key(request)))
        return _json(error_body(family, 401, "Incorrect API key provided."), 401)
    try:
        return await handler(request)
    except RejectedError as error:
        reply = rejected(family, error)
        return _json(reply.body, reply.status)
    except web.HTTPException as error:
        return _json(error_body(family, error.status, error.reason), error.status)


def _endpoint(family: str, parse: Parse) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        world = request.app[WORLD]
        entry = Entry(endpoint=request.path, key=_has_key(request))
        world.entries.append(entry)
        world.in_flight += 1
        world.peak_in_flight = max(world.peak_in_flight, world.in_flight)
        started = time.perf_counter()
        try:
            asked = await parse(request, world)
            entry.model, entry.prompt, entry.stream = asked.model, asked.prompt, asked.stream
            return await _play(request, world, asked, entry)
        except RejectedError as error:
            reply = rejected(family, error)
            entry.status = reply.status
            return _json(reply.body, reply.status)
        finally:
            world.in_flight -= 1
            entry.seconds = time.perf_counter() - started

    return handle


async def _play(request: web.Request, world: World, asked: Asked, entry: Entry) -> web.StreamResponse:
    wait = world.wait()
    if wait is not None:
        entry.status, entry.fault = 429, "rpm"
        response = _json(error_body(asked.family, 429, "Rate limit reached for requests per minute"), 429)
        response.headers["Retry-After"] = f"{wait:.2f}"
        return response
    call = world.begin(asked)
    entry.attempt, entry.fault = call.attempt, played(call.plan)
    turned_away = unanswered(call.plan)
    if turned_away is not None:
        response = await leave(request, turned_away, call.plan[turned_away])
        entry.status = 0 if turned_away in ("hang", "disconnect") else response.status
        return response
    reply = failure(call)
    if reply is None:
        try:
            await asyncio.sleep(float(call.plan.get("slow") or world.options.latency))
        finally:
            # In any case: a client that hangs up while the model works pays all the same.
            reply = world.answer(call)
            if reply.tokens is not None:
                entry.bill(reply.tokens, reply.usage, reply.images)
    entry.status = 0 if "paid_disconnect" in call.plan else reply.status
    response, whole = await deliver(request, reply, call.plan)
    entry.reported = whole and reply.tells and reply.tokens is not None and request.transport is not None
    return response


async def _chat(request: web.Request, world: World) -> Asked:
    return chat.parse(await _json_body(request, world))


async def _generation(request: web.Request, world: World) -> Asked:
    return images.parse_generation(await _json_body(request, world))


async def _edit(request: web.Request, world: World) -> Asked:
    if not request.content_type.startswith("multipart/"):
        return images.parse_json_edit(await _json_body(request, world), world)
    fields, files = await read_form(request)
    shown = [
        {"name": file.field, "filename": file.filename, "content_type": file.mime, "bytes": len(file.data)}
        | {"sha256": hashlib.sha256(file.data).hexdigest()}
        for file in files
    ]
    _record(request, world, {"fields": fields, "files": shown}, 0)
    return images.parse_form_edit(fields, files)


def _gemini(*, stream: bool) -> Parse:
    async def parse(request: web.Request, world: World) -> Asked:
        body = await _json_body(request, world)
        return gemini.parse(request.match_info["model"], body, world, stream=stream)

    return parse


async def _json_body(request: web.Request, world: World) -> dict[str, Any]:
    data = await request.read()
    body = json_object(data)
    _record(request, world, body, len(data))
    return body


def _record(request: web.Request, world: World, body: Any, size: int) -> None:
    headers = {name.lower(): value for name, value in request.headers.items() if name.lower() not in SECRETS}
    query = {name: value for name, value in request.query.items() if name != "key"}
    facts = {"method": request.method, "path": request.path, "query": query, "headers": headers, "body": body}
    world.record({**facts, "key": _has_key(request)}, size)


def _given_key(request: web.Request) -> str:
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    others = (request.headers.get(name) for name in ("x-goog-api-key", "api-key"))
    return bearer or next((value for value in others if value), "") or request.query.get("key", "")


def _has_key(request: web.Request) -> bool:
    return bool(_given_key(request))


def _key_fits(request: web.Request, key: str | None) -> bool:
    return key is None or _given_key(request) == key


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")


async def _content(request: web.Request) -> web.StreamResponse:
    world = request.app[WORLD]
    _record(request, world, None, 0)
    try:
        data, mime = world.published(request.match_info["name"])
    except KeyError:
        raise web.HTTPNotFound from None
    return web.Response(body=data, content_type=mime)


async def _models(_: web.Request) -> web.StreamResponse:
    openai = [{"id": name, "object": "model", "created": 1_790_000_000, "owned_by": "fake"} for name in MODELS]
    google = [{"name": f"models/{name}", "displayName": name} for name in MODELS]
    return _json({"object": "list", "data": openai, "models": google})


async def _health(_: web.Request) -> web.StreamResponse:
    return _json({"status": "ok"})


async def _ledger(request: web.Request) -> web.StreamResponse:
    return _json(request.app[WORLD].ledger())


async def _requests(request: web.Request) -> web.StreamResponse:
    return _json([recorded for _, recorded in request.app[WORLD].recorded])


async def _script(request: web.Request) -> web.StreamResponse:
    try:
        request.app[WORLD].play(json_object(await request.read()))
    except ConfigError as error:
        return _json({"error": str(error)}, 400)
    return _json({})


async def _reset(request: web.Request) -> web.StreamResponse:
    request.app[WORLD].reset()
    return _json({})


async def _redirect(request: web.Request) -> web.StreamResponse:
    target = base64.urlsafe_b64decode(request.match_info["target"]).decode()
    return web.Response(status=302, headers={"Location": target})


async def _odd(request: web.Request) -> web.StreamResponse:
    """Addresses of pictures where there is none."""
    match request.match_info["name"]:
        case "url_html":
            return await leave(request, "html")
        case "url_endless":
            response = web.StreamResponse(headers={"Content-Type": "image/png"})
            await response.prepare(request)
            while True:
                await response.write(bytes(2**16))
        case _:
            raise web.HTTPNotFound


async def _trap(request: web.Request) -> web.StreamResponse:
    """Where a redirect leads that must not be followed: who comes here is counted."""
    request.app[WORLD].traps += 1
    return web.Response(body=b"secret", content_type="text/plain")
