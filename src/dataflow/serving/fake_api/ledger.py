"""What the service recorded and billed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PRICES: Mapping[str, float] = {"text_input": 0.30, "image_input": 0.30, "text_output": 2.50, "image_output": 30.0}
"""US dollars per million tokens of each kind, whatever the model is called; a batch costs half."""

IMAGE_INPUT = 258
IMAGE_OUTPUT = 1290
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What one call used, by kind."""

    text_input: int = 0
    image_input: int = 0
    text_output: int = 0
    image_output: int = 0

    @property
    def given(self) -> int:
        return self.text_input + self.image_input

    @property
    def answered(self) -> int:
        return self.text_output + self.image_output

    def usd(self, discount: float = 1.0) -> float:
        """Their price in US dollars; ``discount`` is multiplied in, 0.5 for half price."""
        return sum(number * PRICES[kind] for kind, number in asdict(self).items()) / 1_000_000 * discount


def count(prompt: str, inputs: int, text: str, images: int) -> Tokens:
    """Tokens of a call: a text, a number of input images, the text and the number of images in the answer."""
    return Tokens(
        text_input=math.ceil(len(prompt) / CHARACTERS_PER_TOKEN) or 1,
        image_input=inputs * IMAGE_INPUT,
        text_output=math.ceil(len(text) / CHARACTERS_PER_TOKEN),
        image_output=images * IMAGE_OUTPUT,
    )


@dataclass(slots=True, kw_only=True)
class Entry:
    """One attempt.

    Attributes:
        endpoint: path of the request.
        model: as asked for.
        prompt: as received.
        attempt: how many attempts at the same thing there were before, -1 for one that was turned away at the door.
        status: HTTP status sent, 0 while under way and for an answer that was never begun.
        fault: directives played, ``name:argument`` joined by ``+``.
        usage: as the service's answer gives it, None if the call was not billed.
        usd: US dollars billed.
        reported: the client was sent the usage, whole.
        images: pictures in the answer.
        key: a key came along (the key itself is kept nowhere).
        batch: it was a line of a batch job.
        stream: the answer was to be streamed.
        time: seconds since the epoch, when it came in.
        seconds: until the answer was sent or given up.
    """

    endpoint: str
    model: str = ""
    prompt: str = ""
    attempt: int = -1
    status: int = 0
    fault: str = ""
    usage: Mapping[str, Any] | None = None
    usd: float = 0.0
    reported: bool = False
    images: int = 0
    key: bool = False
    batch: bool = False
    stream: bool = False
    time: float = field(default_factory=time.time)
    seconds: float = 0.0

    def bill(self, tokens: Tokens, usage: Mapping[str, Any], images: int) -> None:
        self.usage = usage
        self.usd = tokens.usd(0.5 if self.batch else 1.0)
        self.images = images


def totals(entries: Sequence[Entry]) -> dict[str, Any]:
    """Sums over attempts: how many, how many billed, pictures, US dollars, and dollars that were reported as well."""
    return {
        "attempts": len(entries),
        "billed": sum(entry.usage is not None for entry in entries),
        "images": sum(entry.images for entry in entries),
        "usd": math.fsum(entry.usd for entry in entries),
        "usd_reported": math.fsum(entry.usd for entry in entries if entry.reported),
    }
