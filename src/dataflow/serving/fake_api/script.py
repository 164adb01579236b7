"""What goes wrong, and how answers look: a script of directives by words in the prompt, and storms of faults.

A directive is ``name`` or ``name:argument``; several are joined by ``+``. Before the model, billed to nobody:

- ``500`` (any status from 400 to 599): an error in the API's own words.
- ``rate_limit``, ``rate_limit:S`` (``Retry-After`` in seconds), ``rate_limit_date:S`` (as a date), ``rate_limit_ms:MS``
  (``retry-after-ms``), ``rate_limit_info:S`` (``RetryInfo`` in the body); ``quota`` (429 for good).
- ``error_list`` (503, the error in a list), ``error_200`` (an error as the body of a 200; of a stream, its only event),
  ``choice_error`` (an error inside a choice), ``html`` or ``html:STATUS``, ``empty``, ``disconnect``, ``hang`` or
  ``hang:S``.
- ``refuse`` (the API's usual form), ``moderation``, ``content_policy``: 400.

Of the model's answer, billed:

- ``refusal_field``, ``content_filter``, ``text_only``, ``finish:REASON``, ``block:REASON`` (Gemini's promptFeedback).
- ``truncated_base64``, ``garbage_base64``, ``urlsafe_base64`` and ``spaced_base64`` (both right), ``bomb``,
  ``half_jpeg``, ``half_png``, ``svg``, ``gif``, ``not_image``, ``count:N`` pictures.
- An address in place of the picture: ``url:URL`` (any), ``redirect:URL``, ``redirect`` (to the picture),
  ``redirect_loopback``, ``redirect_metadata``, ``url_missing``, ``url_html``, ``url_endless``.
- On the way to the client: ``cut`` (the connection is lost half-way), ``half_stream`` (a stream ends early, properly
  closed), ``no_end`` (a stream lacks what closes it), both ``cut`` where nothing is streamed; ``paid_disconnect``,
  ``drip:S`` (small pieces over a time), ``slow:S`` (the model takes that long), ``wrong_type:MIME``.
- In a batch job: ``expired``, ``lost`` (neither is billed).

How answers look: ``shape:NAME`` (:data:`dataflow.serving.fake_api.chat.SHAPES`; other APIs know ``url`` and
``relative_url``), ``text`` or ``image`` whatever was asked for, ``say:TEXT``, ``talk`` (words beside the picture),
``thoughts`` (reasoning and, where the API has them, pictures that are not the answer), ``images:N`` pictures, ``cost``
(dollars in the usage).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dataflow.errors import ConfigError

FAULTS: Mapping[str, str] = {
    # The service did not take the request: it is worth asking again.
    "rate_limit": "retry",
    "rate_limit_ms": "retry",
    "rate_limit_date": "retry",
    "rate_limit_info": "retry",
    "error_list": "retry",
    "disconnect": "retry",
    "html": "retry",
    "empty": "retry",
    "error_200": "retry",
    "choice_error": "retry",
    "hang": "retry",
    # The model worked and was paid, but its answer did not arrive whole.
    "paid_disconnect": "retry",
    "cut": "retry",
    "half_stream": "retry",
    "no_end": "retry",
    # The answer arrived and holds no usable picture.
    "truncated_base64": "bad",
    "garbage_base64": "bad",
    "bomb": "bad",
    "half_jpeg": "bad",
    "half_png": "bad",
    "svg": "bad",
    "gif": "bad",
    "not_image": "bad",
    "redirect": "bad",
    "redirect_loopback": "bad",
    "redirect_metadata": "bad",
    "url": "bad",
    "url_missing": "bad",
    "url_html": "bad",
    "url_endless": "bad",
    "count": "bad",
    # The service declines: asking again is no use.
    "refuse": "refused",
    "content_policy": "refused",
    "moderation": "refused",
    "refusal_field": "refused",
    "content_filter": "refused",
    "text_only": "refused",
    "block": "refused",
    "finish": "refused",
    # Nothing will work any more.
    "quota": "fatal",
    # Unusual, and right: a client has to accept these.
    "urlsafe_base64": "valid",
    "spaced_base64": "valid",
    "drip": "valid",
    "slow": "valid",
    "wrong_type": "valid",
    # In a batch only: the line fails, or is not there at all.
    "expired": "retry",
    "lost": "retry",
}
"""Every fault by name → what it asks of a client: ``retry``, ``bad`` (the answer holds no usable picture), ``refused``,
``fatal`` or ``valid`` (accept it). Statuses (``500``) are faults as well, see :func:`kind_of_fault`."""

STYLES = ("shape", "text", "image", "say", "talk", "thoughts", "cost", "images")
"""Directives that are no faults: how an answer looks."""

FATAL_STATUSES = ("401", "402", "403", "404")
REFUSED_STATUSES = ("400", "413", "422", "451")

TAKES_THE_REST = ("say", "url", "redirect")

STORM_FAULTS = (
    *("rate_limit", "rate_limit:0.05", "rate_limit_ms:50", "rate_limit_info:0.05", "500", "503", "error_list"),
    *("disconnect", "html", "empty", "error_200", "cut", "half_stream", "no_end", "truncated_base64", "bomb"),
    *("half_jpeg", "svg", "gif", "not_image", "count:0", "refuse", "text_only", "urlsafe_base64", "spaced_base64"),
)
"""What a storm throws that does not say: every kind of fault that needs neither patience nor an end of the run."""

Plan = dict[str, str]
"""Directives of one attempt: name → argument, ``""`` where there is none."""


def kind_of_fault(name: str) -> str | None:
    """What a fault asks of a client, as in :data:`FAULTS`; None for a style or an unknown name."""
    if name in FATAL_STATUSES:
        return "fatal"
    if name in REFUSED_STATUSES:
        return "refused"
    if len(name) == 3 and name.isdigit() and "400" <= name <= "599":
        return "retry"
    return FAULTS.get(name)


def parse(text: str) -> Plan:
    """Directives from ``name`` or ``name:argument``, several joined by ``+``.

    ``say``, ``url`` and ``redirect`` take all that follows them, with its plus signs.

    Raises:
        ConfigError: there is no such directive.
    """
    plan: Plan = {}
    while text:
        name = text.split("+", 1)[0].partition(":")[0].strip()
        piece, _, text = (text, "", "") if name in TAKES_THE_REST else text.partition("+")
        if kind_of_fault(name) is None and name not in STYLES:
            raise ConfigError(f"unknown fault {name!r}; there are HTTP statuses, {', '.join((*FAULTS, *STYLES))}")
        plan[name] = piece.partition(":")[2].strip()
    return plan


def request_key(prompt: str, images: Sequence[bytes] = (), seed: object = None) -> str:
    """What attempts are counted by: requests with the same text, inputs and seed are attempts at one thing."""
    parts = [prompt.encode("utf-8", "surrogatepass"), repr(seed).encode(), *images]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


class Script:
    """Who gets which directives.

    Args:
        mapping: a word in the prompt → directives for every attempt, or a list with one entry per attempt (``""`` for
            none; after the last one it works). Every word found counts; ``""`` is in every prompt. Under a key whose
            value is a mapping: ``storm`` = ``{"share": 0 to 1, "seed": 1, "faults": […], "attempts": N}`` gives each
            attempt a fault with that probability, the same in every run, from attempt N on no more; a request that a
            word gives a fault is spared. ``batch`` = ``{"seconds": S, "status": "failed" | "expired" | "cancelled"}``
            is how long a batch job takes and how it ends.
    """

    def __init__(self, mapping: Mapping[str, Any] | None = None) -> None:
        self.words: dict[str, Plan | list[Plan]] = {}
        self.storm: Mapping[str, Any] = {}
        self.batch: Mapping[str, Any] = {}
        for word, value in (mapping or {}).items():
            if isinstance(value, Mapping):
                self._set(word, value)
            elif isinstance(value, str):
                self.words[word] = parse(value)
            elif isinstance(value, Sequence):
                self.words[word] = [parse(entry) for entry in value]
            else:
                raise ConfigError(f"script, {word!r}: expected directives or a list of them, got {value!r}")
        self._storm_faults = [parse(fault) for fault in self.storm.get("faults", STORM_FAULTS)]

    def _set(self, name: str, value: Mapping[str, Any]) -> None:
        allowed = {"storm": {"share", "seed", "faults", "attempts"}, "batch": {"seconds", "status"}}.get(name)
        if allowed is None or set(value) - allowed:
            raise ConfigError(f"script: {name!r} with {sorted(value)} is neither a storm nor a batch")
        setattr(self, name, value)

    def plan(self, prompt: str, images: Sequence[bytes] = (), seed: object = None, attempt: int = 0) -> Plan:
        """Directives of one attempt, counted from 0."""
        found: Plan = {}
        for word, entry in self.words.items():
            if word in prompt:
                found |= entry if isinstance(entry, dict) else entry[attempt] if attempt < len(entry) else {}
        if self.storm and not any(kind_of_fault(name) for name in found):
            found |= self._drawn(request_key(prompt, images, seed), attempt)
        return found

    def _drawn(self, key: str, attempt: int) -> Plan:
        if not self._storm_faults or attempt >= self.storm.get("attempts", attempt + 1):
            return {}
        draw = hashlib.sha256(f"{self.storm.get('seed', 0)}\n{attempt}\n{key}".encode()).digest()
        if int.from_bytes(draw[:8]) / 2**64 >= self.storm.get("share", 0.0):
            return {}
        return self._storm_faults[int.from_bytes(draw[8:16]) % len(self._storm_faults)]
