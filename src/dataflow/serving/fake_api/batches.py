"""Batch APIs of OpenAI and Gemini with the files they read and write: half price, later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web  # noqa: TID253 - only the server process imports this file

from dataflow.serving.fake_api import chat, gemini, images
from dataflow.serving.fake_api.call import Asked, RejectedError, json_object
from dataflow.serving.fake_api.delivery import unanswered
from dataflow.serving.fake_api.failures import error_body, failure, rejected
from dataflow.serving.fake_api.forms import read_form
from dataflow.serving.fake_api.ledger import Entry
from dataflow.serving.fake_api.world import Stored, World, played

ENDPOINTS = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits")
MOST_LINES = 50_000
VERSION = "/{version:v1|v1beta|v1alpha}"
OPENAI_FILE, GEMINI_FILE = "file-", "gem"
Line = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Job:
    """A batch job of either API.

    Attributes:
        name: its id; Gemini's stand behind ``batches/``.
        gemini: whose API it came by.
        target: the endpoint, or Gemini's model.
        lines: requests as they came: ``custom_id`` and ``body``, or ``key`` or ``metadata`` and ``request``.
        state: ``running``, ``done``, ``failed``, ``expired`` or ``cancelled``.
        ends: what the state becomes in the end.
        source: id of the file it was read from, empty for requests that came inline.
        facts: metadata, or the display name.
        good: lines of answers.
        bad: lines of failures (OpenAI's; Gemini's stand among the answers).
        errors: why it never started.
    """

    name: str
    gemini: bool
    target: str
    lines: list[Line]
    state: str = "running"
    ends: str = "done"
    source: str = ""
    facts: Any = None
    good: list[Line] = field(default_factory=list)
    bad: list[Line] = field(default_factory=list)
    errors: list[Line] = field(default_factory=list)
    output: Stored | None = None
    failures: Stored | None = None
    key: bool = False
    created: float = field(default_factory=time.time)
    ended: float | None = None


def add_routes(app: web.Application, world: World) -> None:
    """Files and batches of both APIs; where their paths are the same, the name says whose it is."""
    office = _Office(world)
    routes = app.router
    routes.add_post("/v1/files", office.upload)
    routes.add_get("/v1/files/{name}/content", office.content)
    routes.add_post(f"/upload{VERSION}/files", office.gemini_upload)
    for prefix in ("", "/download"):
        routes.add_get(f"{prefix}{VERSION}/files/{{name}}:download", office.content)
    routes.add_get(f"{VERSION}/files/{{name}}", office.file)
    routes.add_delete(f"{VERSION}/files/{{name}}", office.delete)
    routes.add_post("/v1/batches", office.create)
    routes.add_post(f"{VERSION}/models/{{model}}:batchGenerateContent", office.gemini_create)
    routes.add_get(f"{VERSION}/batches", office.jobs)
    routes.add_post("/v1/batches/{name}/cancel", office.cancel)
    routes.add_post(f"{VERSION}/batches/{{name}}:cancel", office.cancel)
    routes.add_get(f"{VERSION}/batches/{{name}}", office.job)


class _Office:
    """Handlers of files and batches."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def upload(self, request: web.Request) -> web.StreamResponse:
        fields, files = await read_form(request)
        purpose = fields.get("purpose", "")
        if len(files) != 1 or purpose not in ("batch", "vision", "user_data", "assistants"):
            raise RejectedError("a file and its purpose are needed", param="purpose")
        (file,) = files
        stored = self.world.store(file.data, prefix=OPENAI_FILE, filename=file.filename, purpose=purpose)
        return _json(self._shown(stored))

    async def gemini_upload(self, request: web.Request) -> web.StreamResponse:
        command = request.headers.get("X-Goog-Upload-Command", "")
        if command == "start":
            facts = json_object(await request.read() or b"{}").get("file") or {}
            mime = request.headers.get("X-Goog-Upload-Header-Content-Type") or facts.get("mimeType") or ""
            name = facts.get("displayName") or facts.get("display_name") or ""
            stored = self.world.store(b"", prefix=GEMINI_FILE, filename=name, mime=mime)
            where = f"{self.world.origin}{request.path}?upload_id={stored.name}"
            return _json({}, headers={"X-Goog-Upload-URL": where, "X-Goog-Upload-Status": "active"})
        stored = self._found(request.query.get("upload_id", ""))
        stored.data += await request.read()
        if "finalize" not in command:
            return _json({}, headers={"X-Goog-Upload-Status": "active"})
        return _json({"file": self._shown(stored)}, headers={"X-Goog-Upload-Status": "final"})

    async def content(self, request: web.Request) -> web.StreamResponse:
        stored = self._found(request.match_info["name"])
        return web.Response(body=stored.data, content_type="application/octet-stream")

    async def file(self, request: web.Request) -> web.StreamResponse:
        return _json(self._shown(self._found(request.match_info["name"])))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        name = self._found(request.match_info["name"]).name
        del self.world.files[name]
        return _json({} if name.startswith(GEMINI_FILE) else {"id": name, "object": "file", "deleted": True})

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = json_object(await request.read())
        if body.get("endpoint") not in ENDPOINTS:
            raise RejectedError(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
        if body.get("completion_window") != "24h":
            raise RejectedError("completion_window must be 24h", param="completion_window")
        stored = self._found(str(body.get("input_file_id")))
        lines, errors = _lines(stored.data, body["endpoint"])
        job = Job(
            name=f"batch_{len(self.world.jobs):06d}",
            gemini=False,
            target=body["endpoint"],
            lines=lines,
            source=stored.name,
            facts=body.get("metadata"),
            errors=errors,
            key="Authorization" in request.headers,
        )
        return _json(_openai(self._start(job)))

    async def gemini_create(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        body = json_object(data)
        facts = {"method": request.method, "path": request.path, "query": {}, "headers": {}}
        self.world.record({**facts, "body": body, "key": "x-goog-api-key" in request.headers}, len(data))
        batch = body.get("batch") or {}
        source = batch.get("inputConfig") or {}
        name = str(source.get("fileName") or "").removeprefix("files/")
        if name:
            lines = [orjson.loads(line) for line in self._found(name).data.splitlines() if line.strip()]
        else:
            lines = (source.get("requests") or {}).get("requests") or []
        if not lines:
            raise RejectedError("the batch holds no requests", param="inputConfig")
        job = Job(
            name=f"gem{len(self.world.jobs):06d}",
            gemini=True,
            target=request.match_info["model"],
            lines=lines,
            source=name,
            facts=batch.get("displayName"),
            key="x-goog-api-key" in request.headers,
        )
        return _json(_operation(self._start(job)))

    async def job(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        return _json(_operation(job) if job.gemini else _openai(job))

    async def jobs(self, _: web.Request) -> web.StreamResponse:
        known = list(self.world.jobs.values())
        openai = [_openai(job) for job in reversed(known) if not job.gemini]
        google = [_operation(job) for job in reversed(known) if job.gemini]
        return _json({"object": "list", "data": openai, "has_more": False, "operations": google})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        if job.state == "running":
            job.state, job.ended = "cancelled", time.time()
        return _json({} if job.gemini else _openai(job))

    def _job(self, request: web.Request) -> Job:
        name = request.match_info["name"]
        if name not in self.world.jobs:
            raise RejectedError(f"No batch found with id '{name}'.", status=404)
        return self.world.jobs[name]

    def _found(self, name: str) -> Stored:
        if name not in self.world.files:
            raise RejectedError(f"No such File object: {name}", param="id", status=404)
        return self.world.files[name]

    def _shown(self, stored: Stored) -> dict[str, Any]:
        if stored.name.startswith(GEMINI_FILE):
            return {
                "name": f"files/{stored.name}",
                "displayName": stored.filename,
                "mimeType": stored.mime,
                "sizeBytes": str(len(stored.data)),
                "createTime": _moment(stored.created),
                "uri": f"{self.world.origin}/v1beta/files/{stored.name}",
                "state": "ACTIVE",
                "source": "UPLOADED",
            }
        return {
            "id": stored.name,
            "object": "file",
            "bytes": len(stored.data),
            "created_at": int(stored.created),
            "filename": stored.filename,
            "purpose": stored.purpose,
            "status": "processed",
        }

    def _start(self, job: Job) -> Job:
        script = self.world.script.batch
        self.world.jobs[job.name] = job
        if job.errors:
            job.state, job.ended = "failed", time.time()
            return job
        job.ends = script.get("status", "done")
        seconds = float(script.get("seconds", self.world.options.batch_seconds))
        asyncio.get_running_loop().call_later(seconds, self._finish, job)
        return job

    def _finish(self, job: Job) -> None:
        """Do the work, unless it was cancelled; a job that expires has half of it done."""
        if job.state != "running":
            return
        job.ended = time.time()
        number = {"done": len(job.lines), "expired": len(job.lines) // 2}.get(job.ends, 0)
        for at, line in enumerate(job.lines):
            self._answer(job, line, at, worked=at < number)
        job.state = job.ends
        if job.ends in ("failed", "cancelled"):
            job.good, job.bad = [], []
            return
        if not job.gemini:
            # OpenAI promises no order, so that nobody may rely on one.
            job.good.reverse()
        prefix = GEMINI_FILE if job.gemini else OPENAI_FILE
        if job.good and (job.source or not job.gemini):
            job.output = self._written(job.good, prefix)
        if job.bad:
            job.failures = self._written(job.bad, prefix)

    def _written(self, lines: list[Line], prefix: str) -> Stored:
        data = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        return self.world.store(data, prefix=prefix, filename="output.jsonl", purpose="batch_output")

    def _answer(self, job: Job, line: Line, at: int, *, worked: bool) -> None:
        """Answer one line, bill it, and put it where it belongs."""
        status, body, lost = self._result(job, line) if worked else (0, None, job.ends != "expired")
        if lost:
            return
        expired = {"code": "batch_expired", "message": "This request could not be executed before the deadline."}
        if job.gemini:
            own = {name: line[name] for name in ("key", "metadata") if name in line}
            if status == 200:
                job.good.append({**own, "response": body})
            else:
                error = body["error"] if body else {"code": 4, "message": expired["message"]}
                job.good.append({**own, "error": {"code": error["code"], "message": error["message"]}})
            return
        response = {"status_code": status, "request_id": f"{job.name}-{at}", "body": body} if status else None
        result = {"id": f"batch_req_{job.name}_{at}", "custom_id": line["custom_id"], "response": response}
        (job.good if status == 200 else job.bad).append({**result, "error": None if status else expired})

    def _result(self, job: Job, line: Line) -> tuple[int, Any, bool]:
        """Status and body of one line's answer, and whether it gets lost; status 0 for one that expires."""
        endpoint = f"/v1beta/models/{job.target}:batchGenerateContent" if job.gemini else job.target
        entry = Entry(endpoint=endpoint, batch=True, key=job.key)
        self.world.entries.append(entry)
        family = "gemini" if job.gemini else "chat" if job.target.endswith("completions") else "images"
        try:
            asked = replace(self._asked(job, line), stream=False)
        except RejectedError as error:
            reply = rejected(family, error)
            entry.status = reply.status
            return reply.status, reply.body, False
        call = self.world.begin(asked)
        call.discount = 0.5
        entry.model, entry.prompt = asked.model, asked.prompt
        entry.attempt, entry.fault = call.attempt, played(call.plan)
        if "lost" in call.plan or "expired" in call.plan:
            return 0, None, "lost" in call.plan
        if unanswered(call.plan) is not None:
            entry.status = 500
            return 500, error_body(family, 500, "The server had an error processing your request."), False
        reply = failure(call) or self.world.answer(call)
        if reply.tokens is not None:
            entry.bill(reply.tokens, reply.usage, reply.images)
            entry.reported = True
        entry.status = reply.status
        body = reply.body[0] if isinstance(reply.body, list) else reply.body
        failed = reply.status == 200 and job.gemini and "error" in body
        return 500 if failed else reply.status, body, False

    def _asked(self, job: Job, line: Line) -> Asked:
        if job.gemini:
            request = line.get("request")
            if not isinstance(request, dict):
                raise RejectedError("a line needs a request")
            return gemini.parse(job.target, request, self.world)
        if job.target.endswith("completions"):
            return chat.parse(line["body"])
        if job.target.endswith("edits"):
            return images.parse_json_edit(line["body"], self.world)
        return images.parse_generation(line["body"])


def _lines(data: bytes, endpoint: str) -> tuple[list[Line], list[Line]]:
    """Lines of an input file of OpenAI's, and what is wrong with it."""
    lines, errors, known = [], [], set()
    for number, text in enumerate(data.splitlines(), 1):
        problem = None
        try:
            line = orjson.loads(text)
            match line:
                case {"custom_id": str(name), "method": "POST", "url": str(url), "body": dict()}:
                    if url != endpoint:
                        problem = ("mismatched_endpoint", "The URL does not match the batch's endpoint.")
                    elif name in known:
                        problem = ("duplicate_custom_id", f"The custom_id {name!r} is there twice.")
                    known.add(name)
                case _:
                    problem = ("missing_required_parameter", "custom_id, method POST, url and body are needed.")
        except orjson.JSONDecodeError:
            problem = ("invalid_json_line", "This line is not parseable as valid JSON.")
        else:
            lines.append(line)
        if problem:
            errors.append({"code": problem[0], "message": problem[1], "line": number, "param": None})
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "The input file is empty.", "line": None, "param": None})
    if len(lines) > MOST_LINES:
        errors.append({"code": "too_many_tasks", "message": "Too many requests.", "line": None, "param": None})
    return lines, errors


def _openai(job: Job) -> dict[str, Any]:
    """A job as OpenAI's API shows it."""
    ended = None if job.ended is None else int(job.ended)
    status = {"running": "in_progress", "done": "completed"}.get(job.state, job.state)
    return {
        "id": job.name,
        "object": "batch",
        "endpoint": job.target,
        "errors": {"object": "list", "data": job.errors} if job.errors else None,
        "input_file_id": job.source,
        "completion_window": "24h",
        "status": status,
        "output_file_id": job.output.name if job.output else None,
        "error_file_id": job.failures.name if job.failures else None,
        "created_at": int(job.created),
        "in_progress_at": int(job.created),
        "expires_at": int(job.created) + 24 * 3600,
        **{f"{name}_at": ended if status == name else None for name in ("completed", "failed", "expired", "cancelled")},
        "request_counts": {"total": len(job.lines), "completed": len(job.good), "failed": len(job.bad)},
        "metadata": job.facts,
    }


def _operation(job: Job) -> dict[str, Any]:
    """A job as Gemini's API shows it."""
    state = {"done": "SUCCEEDED"}.get(job.state, job.state.upper())
    metadata: dict[str, Any] = {
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
        "name": f"batches/{job.name}",
        "model": f"models/{job.target}",
        "displayName": job.facts or job.name,
        "createTime": _moment(job.created),
        "updateTime": _moment(job.ended or job.created),
        "state": f"BATCH_STATE_{state}",
        "batchStats": _stats(job),
    }
    if job.ended is not None:
        metadata["endTime"] = _moment(job.ended)
    if job.state in ("done", "expired"):
        answers = {"inlinedResponses": {"inlinedResponses": job.good}}
        metadata["output"] = {"responsesFile": f"files/{job.output.name}"} if job.output else answers
    operation: dict[str, Any] = {"name": f"batches/{job.name}", "metadata": metadata, "done": job.ended is not None}
    if "output" in metadata:
        operation["response"] = metadata["output"]
    elif job.ended is not None:
        operation["error"] = {"code": 13, "message": f"The batch ended as {job.state}."}
    return operation


def _stats(job: Job) -> Mapping[str, str]:
    failed = sum("error" in line for line in job.good)
    pending = len(job.lines) if job.ended is None else 0
    return {
        "requestCount": str(len(job.lines)),
        "successfulRequestCount": str(len(job.good) - failed),
        "failedRequestCount": str(failed),
        "pendingRequestCount": str(pending),
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _json(body: Any, *, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json", headers=headers)
