"""The settings of a local model that are fastest here, found by trying them one after the other.

Settings are tried on top of the best so far, those that gain most first, so that an early end still helps. Nothing is
taken for granted of a device: what does not work, does not fit or does not pay is a line of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dataflow.serving.diffusers_options import FASTEST_FP8
from dataflow.serving.speed import Speed

GAIN = 1.02
"""So much faster a setting must be to be taken: less is noise."""

LARGEST_BATCH = 256

PIXELS = frozenset({"dtype", "quantization", "step_cache", "vae_tiling"})
"""Settings that change pictures beyond rounding, and with them their identity: what was made before is made again."""

CACHE = "first_block:0.08"
"""The step cache that is tried: about half of the time of 28 steps, with a loss that scores hardly show."""

_RESCUES: tuple[dict[str, Any], ...] = (
    {"batch_size": 1},
    {"batch_size": 1, "text_encoders": "offload"},
    {"batch_size": 1, "offload": "model"},
)
_NO_MEMORY = "out of memory"

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One line of the result.

    Attributes:
        settings: on top of those there were.
        speed: what was measured; None where it did not work.
        problem: why not.
        pixels: its pictures differ beyond rounding from those of the settings there were.
        seconds: what the trial took, loading included.
    """

    settings: Settings
    speed: Speed | None = None
    problem: str = ""
    pixels: bool = False
    seconds: float = 0.0


class Measure(Protocol):
    """Measures settings: ``limit`` is the time there is, ``count`` asks to count operations."""

    def __call__(self, settings: Settings, *, limit: float, count: bool) -> Speed | str: ...


class Tuner:
    """Looks for the fastest settings; every trial is in :attr:`trials` as soon as it has ended.

    Args:
        base: the arguments of the serving there are.
        measure: measures arguments.
        seconds: when to stop; the first trial has all of the time there is.
        lossy: settings that change pixels may be the best, and quantization and step caches are tried.
        clock: seconds.

    Attributes:
        trials: in the order they were made.
        skipped: settings for which no time was left.
    """

    def __init__(
        self,
        base: Settings,
        measure: Measure,
        *,
        seconds: float,
        lossy: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base, self._measure, self._lossy, self._clock = dict(base), measure, lossy, clock
        self._deadline = clock() + seconds
        self._flops: float | None = None
        self.trials: list[Trial] = []
        self.skipped: list[Settings] = []

    @property
    def best(self) -> Trial | None:
        """The fastest trial that may be taken; the settings there are, unless another is faster by more than noise."""
        found: Trial | None = None
        for trial in self.trials:
            if trial.speed is None or (trial.pixels and not self._lossy):
                continue
            if found is None or _gain(trial, found) >= GAIN:
                found = trial
        return found

    def current(self) -> None:
        """Measure the settings there are."""
        self._try({})

    def search(self) -> None:
        """Try everything that may gain on this device, until the time is up."""
        self._try({})
        for settings in _RESCUES:
            if self.best is None and self.trials[-1].problem.startswith(_NO_MEMORY):
                self._try(settings)
        if self.best is None or self.best.speed is None:
            return
        facts = self.best.speed.facts
        for settings in _candidates(facts, self._base):
            self._try_on_top(settings)
        if facts["batches"] and self._base.get("determinism") != "strict":
            self._batches()
        for settings in _lossy_candidates(facts) if self._lossy else ():
            self._try_on_top(settings)
        if facts["kind"] == "cpu" and facts["bf16"] and self._base.get("dtype", "auto") in ("auto", "fp32"):
            self._try_on_top({"dtype": "bf16"})

    def _batches(self) -> None:
        best = self.best
        assert best is not None
        assert best.speed is not None
        size = best.speed.batch
        while size < LARGEST_BATCH:
            size *= 2
            trial = self._try_on_top({"batch_size": size})
            if trial is None or trial.speed is None or self.best is not trial:
                break
        if size == 2 * best.speed.batch and best.speed.batch > 1:
            self._try_on_top({"batch_size": best.speed.batch // 2})

    def _try_on_top(self, settings: Settings) -> Trial | None:
        best = self.best
        assert best is not None
        return self._try({**best.settings, **settings})

    def _try(self, settings: Settings) -> Trial | None:
        settings = {name: value for name, value in settings.items() if self._base.get(name) != value}
        if any(trial.settings == settings for trial in self.trials):
            return None
        left = self._deadline - self._clock()
        if left <= 0 or (self.trials and left < min(trial.seconds for trial in self.trials) / 2):
            self.skipped.append(settings)
            return None
        arguments = {**self._base, **settings}
        whole = not arguments.get("quantization") and not arguments.get("step_cache")
        began = self._clock()
        found = self._measure(arguments, limit=left, count=whole and self._flops is None)
        took = self._clock() - began
        pixels = bool(PIXELS & settings.keys())
        if isinstance(found, str):
            trial = Trial(settings=settings, problem=found, pixels=pixels, seconds=took)
        else:
            self._flops = self._flops or found.flops
            # a cache skips operations: how many were made nobody knows
            flops = None if arguments.get("step_cache") else self._flops
            trial = Trial(settings=settings, speed=replace(found, flops=flops), pixels=pixels, seconds=took)
        self.trials.append(trial)
        return trial


def _candidates(facts: Mapping[str, Any], base: Settings) -> Iterator[Settings]:
    """What may gain without another picture, the greatest gain first."""
    if not base.get("compile"):
        yield {"compile": "regional" if facts["repeated_blocks"] else "full"}
    if facts["kind"] == "cuda" and facts["attention"]:
        yield {"attention_backend": "auto"}
        if facts["capability"] and tuple(facts["capability"]) >= (8, 0):
            yield {"attention_backend": "_native_cudnn"}
    if facts["convolutions"]:
        yield {"channels_last": True}
    if facts["kind"] == "cpu":
        for threads in (facts["cpus"], facts["cpus"] // 2):
            if threads not in (0, facts["threads"]):
                yield {"threads": threads}


def _lossy_candidates(facts: Mapping[str, Any]) -> Iterator[Settings]:
    if facts["fp8"]:
        yield {"quantization": FASTEST_FP8}
    if facts["caches"]:
        yield {"step_cache": CACHE}


def _gain(trial: Trial, other: Trial) -> float:
    assert trial.speed is not None
    assert other.speed is not None
    return trial.speed.images_per_second / other.speed.images_per_second
