"""What the running service remembers: its script, attempts, ledger, recorded requests, files and pictures."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dataflow.serving.fake_api import chat, gemini, images
from dataflow.serving.fake_api.call import Asked, Call, RejectedError, Reply
from dataflow.serving.fake_api.failures import rejected
from dataflow.serving.fake_api.ledger import Entry, totals
from dataflow.serving.fake_api.script import Plan, Script, request_key

PUBLISHED = 2000
RECORDED = 1000
RECORDED_BYTES = 64 * 2**20


@dataclass(slots=True, kw_only=True)
class Options:
    """How the service behaves as a whole.

    Attributes:
        latency: seconds the model takes for an answer.
        key: what requests must bring as their key; None takes any or none.
        pad: least bytes of a picture, 0 for the smallest.
        rpm: most requests within 60 seconds; None for any number.
        batch_seconds: how long a batch job takes.
    """

    latency: float = 0.0
    key: str | None = None
    pad: int = 0
    rpm: int | None = None
    batch_seconds: float = 0.2


@dataclass(slots=True, kw_only=True)
class Stored:
    """An uploaded file, or one that a batch job wrote."""

    name: str
    data: bytes
    filename: str = ""
    purpose: str = "batch"
    mime: str = "application/jsonl"
    created: float = field(default_factory=time.time)


class World:
    """The state of one server; nothing here knows about sockets."""

    def __init__(self, options: Options, script: Script) -> None:
        self.options = options
        self.script = script
        self.origin = ""
        self.files: dict[str, Stored] = {}
        self.jobs: dict[str, Any] = {}
        self.traps = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.entries: list[Entry] = []
        self.recorded: deque[tuple[int, dict[str, Any]]] = deque()
        self._recorded_bytes = 0
        self._attempts: Counter[str] = Counter()
        self._published: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._started: deque[float] = deque()

    @property
    def pad(self) -> int:
        return self.options.pad

    def play(self, mapping: Mapping[str, Any]) -> None:
        """Go on with another script; attempts are counted from 0 again."""
        self.script = Script(mapping)
        self._attempts.clear()

    def reset(self) -> None:
        """Forget what was recorded and billed, and how often anything was asked. Files and batch jobs stay."""
        self.entries.clear()
        self.recorded.clear()
        self._recorded_bytes = self.traps = self.peak_in_flight = 0
        self._attempts.clear()
        self._started.clear()

    def wait(self) -> float | None:
        """Count a request against the limit per minute; seconds until the next would be taken if this one is not."""
        if self.options.rpm is None:
            return None
        now = time.monotonic()
        while self._started and self._started[0] <= now - 60:
            self._started.popleft()
        if len(self._started) >= self.options.rpm:
            return self._started[0] + 60 - now
        self._started.append(now)
        return None

    def begin(self, asked: Asked) -> Call:
        """Decide about a request: which attempt it is, and what goes wrong with it."""
        key = request_key(asked.prompt, asked.inputs, asked.seed)
        attempt = self._attempts[key]
        self._attempts[key] += 1
        plan: Plan = self.script.plan(asked.prompt, asked.inputs, asked.seed, attempt)
        return Call(asked=asked, plan=plan, site=self, attempt=attempt)

    def answer(self, call: Call) -> Reply:
        """The model's answer, as it would be sent if nothing went wrong on the way."""
        try:
            match call.asked.family:
                case "chat":
                    return chat.answer(call)
                case "images":
                    return images.answer(call)
                case _:
                    return gemini.answer(call)
        except RejectedError as error:
            return rejected(call.asked.family, error)

    def record(self, request: dict[str, Any], size: int) -> None:
        """Keep a request as it came; only the newest ones are kept. ``size``: of its body in bytes."""
        self.recorded.append((size, request))
        self._recorded_bytes += size
        while len(self.recorded) > RECORDED or (self._recorded_bytes > RECORDED_BYTES and len(self.recorded) > 1):
            self._recorded_bytes -= self.recorded.popleft()[0]

    def publish(self, data: bytes, mime: str) -> str:
        name = hashlib.sha256(data).hexdigest()[:32]
        self._published[name] = (data, mime)
        self._published.move_to_end(name)
        if len(self._published) > PUBLISHED:
            self._published.popitem(last=False)
        return f"/v1/images/{name}/content"

    def published(self, name: str) -> tuple[bytes, str]:
        """Bytes and type of a published picture; KeyError if there is none."""
        return self._published[name]

    def stored(self, file_id: str) -> bytes:
        return self.files[file_id].data

    def store(self, data: bytes, *, prefix: str, **facts: Any) -> Stored:
        """Keep a file under a new name."""
        file = Stored(name=f"{prefix}{len(self.files):06d}", data=data, **facts)
        self.files[file.name] = file
        return file

    def ledger(self) -> dict[str, Any]:
        """Everything recorded and billed, as JSON."""
        return {
            "totals": {
                **totals(self.entries),
                "traps": self.traps,
                "in_flight": self.in_flight,
                "peak_in_flight": self.peak_in_flight,
            },
            "attempts": [asdict(entry) for entry in self.entries],
        }


def played(plan: Plan) -> str:
    """A plan as it stands in the ledger."""
    return "+".join(f"{name}:{argument}" if argument else name for name, argument in plan.items())
