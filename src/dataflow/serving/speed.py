"""How fast a local model is here: one measurement, in this process or in one of its own.

A process of its own, because settings such as compiled code, threads and memory do not leave a process without a
trace, and because what does not fit may end it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow.errors import DataflowError, OutOfMemoryError
from dataflow.io import ImageIO
from dataflow.serving import accelerators, diffusers_options
from dataflow.serving.diffusers_options import import_library
from dataflow.serving.diffusers_runner import Runner
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.types import GenerationRequest

PROMPTS = (
    "a lighthouse on a rocky coast at dusk, waves breaking below, a single lit window",
    "a wooden table with a bowl of oranges, a folded newspaper and a cup of black coffee, seen from above",
    "two cyclists on a mountain road in the rain, mist between the pines, low morning light",
    "the interior of an old library with tall shelves, a ladder on rails and a sleeping cat on the carpet",
)
"""What is drawn, or made of an input image; a number behind it makes every prompt another one."""

SOURCE_SIDE = 1024
"""Sides of the input images of edits, in pixels, where nobody names a size."""

# It ends with its parent, however that ends: nobody else would ask for its answer, or free the device.
_ENTRY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
from dataflow.serving.speed import main
main(sys.argv[1], sys.argv[2])
"""
_KILLED = -9


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        images: pictures that the time was taken of.
        seconds: that they took, from the first to the last, without loading and warming up.
        batch: pictures of each call.
        load_seconds: until the model lay on its device.
        warm_up_seconds: what the first call took longer than the others: compiling, and choosing kernels.
        peak_bytes: most memory in use, on the device, or of the whole process on the CPU.
        flops: floating point operations of the denoiser for one picture; None where they were not counted.
        device: its name.
        provenance: what a picture of this run says of itself.
        facts: what the choice of further settings depends on.
    """

    images: int
    seconds: float
    batch: int
    load_seconds: float
    warm_up_seconds: float
    peak_bytes: int
    flops: float | None
    device: str
    provenance: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images

    @property
    def teraflops(self) -> float | None:
        """TFLOP/s of the denoiser over the whole time, encoding and decoding included; None if nobody counted."""
        return None if self.flops is None else self.flops * self.images_per_second / 1e12

    @property
    def peak_teraflops(self) -> float | None:
        """What the device can do in this arithmetic; None where no data sheet says."""
        peak = accelerators.peak_of(self.device)
        if peak is None or self.provenance.get("dtype") not in ("bfloat16", "float16"):
            return None
        return peak.fp8 if "fp8" in str(self.provenance.get("quantization", "")) else peak.half

    @property
    def share(self) -> float | None:
        """Of the device's peak, 0 to 1."""
        reached, peak = self.teraflops, self.peak_teraflops
        return None if reached is None or peak is None else reached / peak


def measure(arguments: Mapping[str, Any], *, seconds: float, count: bool, folder: Path) -> Speed:
    """Load a model and draw with it.

    Args:
        arguments: of :class:`LocalImageGenServing`.
        seconds: to draw for, after warming up; at least two calls are made.
        count: count the denoiser's operations first, in a call of few steps.
        folder: for input images.

    Raises:
        DataflowError: it does not load, does not fit, or makes no usable pictures.
    """
    serving = LocalImageGenServing(**{**arguments, "image_io": ImageIO(folder)})
    started = time.perf_counter()
    serving.setup()
    loaded = time.perf_counter()
    try:
        runner = serving.runner
        assert runner is not None
        draw = _Drawing(serving, folder)
        flops = _flops(serving, draw.request()) if count else None
        begun = time.perf_counter()
        asyncio.run(draw.one_call())
        first = time.perf_counter() - begun
        took = asyncio.run(draw.calls(seconds))
        per_call = took / draw.made
        return Speed(
            images=draw.made * draw.batch,
            seconds=took,
            batch=draw.batch,
            load_seconds=loaded - started,
            warm_up_seconds=max(0.0, first - per_call),
            peak_bytes=_peak_bytes(runner.device),
            flops=flops,
            device=str(runner.provenance["device"]),
            provenance=draw.provenance,
            facts=_facts(serving, runner),
        )
    finally:
        serving.cleanup()


def measure_apart(
    arguments: Mapping[str, Any], *, seconds: float, count: bool, limit: float, verbose: bool = False
) -> Speed | str:
    """:func:`measure` in a process of its own.

    Args:
        arguments: of the serving, as JSON has them.
        seconds: see there.
        count: see there.
        limit: seconds after which the process is ended.
        verbose: its messages are shown.

    Returns:
        The speed, or why there is none, in a few words.
    """
    with tempfile.TemporaryDirectory(prefix="dataflow-speed-") as name:
        folder = Path(name)
        asked = json.dumps({"arguments": dict(arguments), "seconds": seconds, "count": count})
        heard = None if verbose else subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-c", _ENTRY, asked, name],
            stdin=subprocess.PIPE,
            stdout=heard,
            stderr=heard,
            start_new_session=True,  # Ctrl-C is this process's business
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()
        answer = folder / "answer.json"
        if not answer.exists():
            return "out of memory (the process was killed)" if code == _KILLED else f"the process ended with {code}"
        found = json.loads(answer.read_bytes())
    return found["problem"] if "problem" in found else Speed(**found)


def main(asked: str, folder: str) -> None:
    """Entry point of the process: measure, and write the answer into the folder."""
    order = json.loads(asked)
    try:
        speed = measure(order["arguments"], seconds=order["seconds"], count=order["count"], folder=Path(folder))
        answer: dict[str, Any] = asdict(speed)
    except (DataflowError, OSError) as error:
        answer = {"problem": _in_short(error)}
    part = Path(folder, "answer.part")
    part.write_text(json.dumps(answer))
    part.replace(Path(folder, "answer.json"))


class _Drawing:
    """Calls of a serving, as the engine would make them."""

    def __init__(self, serving: LocalImageGenServing, folder: Path) -> None:
        self.serving = serving
        self.batch = serving.batch_size
        self.made = 0
        self.provenance: Mapping[str, Any] = {}
        self._number = 0
        self._images: tuple[str, ...] = ()
        if serving.task == "imageedit":
            defaults = serving.default_params()
            size = (defaults.get("width", SOURCE_SIDE), defaults.get("height", SOURCE_SIDE))
            self._images = (str(_source(folder, size)),)

    def request(self) -> GenerationRequest:
        self._number += 1
        prompt = f"{PROMPTS[self._number % len(PROMPTS)]}, number {self._number}"
        return GenerationRequest(
            request_id=f"{self._number:032x}", prompt=prompt, images=self._images, seed=self._number
        )

    async def one_call(self) -> None:
        requests = [self.request() for _ in range(self.batch)]
        key = self.serving.batch_key(requests[0])
        if self.batch > 1 and self.serving.batch_key(requests[1]) != key:
            self.batch = 1  # the family makes one picture per call
            requests = requests[:1]
        for result in await self.serving.generate(requests):
            if result.error is not None:
                raise result.error
            self.provenance = result.provenance

    async def calls(self, seconds: float) -> float:
        """As many calls as fit in, at least two, with as many under way as the engine has; the time they took."""
        begun = time.perf_counter()

        async def lane() -> None:
            while self.made < 2 or time.perf_counter() - begun < seconds:
                self.made += 1
                await self.one_call()

        await asyncio.gather(*(lane() for _ in range(self.serving.concurrency + self.serving.ahead)))
        return time.perf_counter() - begun


def _flops(serving: LocalImageGenServing, request: GenerationRequest) -> float:
    """Operations of the denoiser for one picture, counted in a short call and taken for as many steps as there are."""
    torch = import_library("torch")
    counter = import_library("torch.utils.flop_counter")
    runner = serving.runner
    assert runner is not None
    pipe = runner.pipe
    denoiser = getattr(pipe, diffusers_options.denoiser_name(pipe.components))
    total, original = 0, denoiser.forward

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return counter.sdpa_flop_count(query, key, value)

    # torch leaves this one out
    also = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        with counter.FlopCounterMode(display=False, custom_mapping=also) as flops:
            output = original(*args, **kwargs)
        total += flops.get_total_flops()
        return output

    denoiser.forward = counted
    try:
        with torch.compiler.set_stance("force_eager"), runner.plain_attention():
            steps, done = serving.short_call(request)
    finally:
        denoiser.forward = original
    return total * steps / done


def _facts(serving: LocalImageGenServing, runner: Runner) -> dict[str, Any]:
    torch = import_library("torch")
    denoiser = getattr(runner.pipe, diffusers_options.denoiser_name(runner.pipe.components))
    capability = accelerators.compute_capability(torch, runner.device)
    request = GenerationRequest(request_id="0" * 32, prompt="", seed=0)
    return {
        "kind": runner.device.partition(":")[0],
        "capability": list(capability) if capability else None,
        "fp8": accelerators.has_fp8(capability),
        "bf16": runner.device != "cpu" or accelerators.cpu_has_bf16(),
        "threads": torch.get_num_threads(),
        "cpus": accelerators.usable_cpus(),
        "repeated_blocks": bool(getattr(denoiser, "_repeated_blocks", None)),
        "convolutions": any(parameter.dim() == 4 and parameter.shape[-1] > 1 for parameter in denoiser.parameters()),
        "caches": hasattr(denoiser, "enable_cache"),
        "attention": diffusers_options.takes_attention(runner.pipe),
        "batches": serving.task == "imageedit"
        or serving.batch_key(request) == serving.batch_key(GenerationRequest(request_id="1" * 32, prompt="", seed=1)),
    }


def _peak_bytes(device: str) -> int:
    torch = import_library("torch")
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_reserved(device))
    if device == "mps":
        return int(torch.mps.driver_allocated_memory())
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _source(folder: Path, size: Sequence[int]) -> Path:
    """An input image with something to see in it: two gradients and a grain."""
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(0, 32, (height, width))
    planes = [255 * rows / height, 255 * columns / width, 127 + 96 * np.sin(rows / 40) * np.cos(columns / 40)]
    pixels = np.stack([np.clip(plane + grain, 0, 255) for plane in planes], axis=-1)
    path = folder / "source.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def _in_short(error: Exception) -> str:
    if isinstance(error, OutOfMemoryError) or "does not fit" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:199]}…"
