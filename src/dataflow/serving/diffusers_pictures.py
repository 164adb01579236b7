"""From what a pipeline returned to pictures on this side, without holding up the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dataflow.errors import BadOutputError, RefusedError, ServingError
from dataflow.serving.diffusers_options import import_library


@dataclass(slots=True)
class Pending:
    """Pictures of one call, which may still be computed; :meth:`wait` for them in another thread.

    Attributes:
        pictures: finished ones, where the pipeline gives no tensors.
        pixels: uint8, (n, height, width, channels), on its way into main memory.
        finite: bool, (n,): no NaN in it.
        lit: bool, (n,): some pixel is not black.
        flags: what the pipeline's safety checker found.
        arrived: recorded behind the copies; None where nothing runs behind the program's back.
    """

    flags: Sequence[bool]
    pictures: Sequence[Any] = ()
    pixels: Any = None
    finite: Any = None
    lit: Any = None
    arrived: Any = None

    def wait(self) -> float:
        """Wait until everything has arrived; the time then (``perf_counter``)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return time.perf_counter()

    def results(self) -> list[Image.Image | ServingError]:
        """One picture, or what is wrong with it, for each that was asked for. After :meth:`wait`."""
        return [
            RefusedError("the model's safety checker found the image unsafe") if flag else self._result(number)
            for number, flag in enumerate(self.flags)
        ]

    def _result(self, number: int) -> Image.Image | ServingError:
        if self.pixels is None:
            image = self.pictures[number]
            lit = any(high for _, high in image.convert("RGB").getextrema())
        else:
            if not self.finite[number]:
                return BadOutputError("the model computed NaN; another dtype (bf16, fp32) may help", reason="nan")
            lit = bool(self.lit[number])
            values = self.pixels[number].numpy()
            image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
        return image if lit else BadOutputError("the model made a wholly black image", reason="black")


def collect(output: Any, count: int, pipeline: str) -> Pending:
    """The pictures in a pipeline's output.

    What is a tensor is made bytes where it lies, a quarter of what floats would take to travel, and copied into
    page-locked memory while the device goes on with the next call.

    Args:
        output: what the call returned; ``images`` are PIL, or a tensor (n, channels, height, width) in [0, 1].
        count: pictures that were asked for.
        pipeline: the class, for the message.

    Raises:
        BadOutputError: there are not that many.
    """
    found = next((images for name in ("images", "image") if (images := getattr(output, name, None)) is not None), None)
    if found is None or len(found) != count:
        number = "nothing" if found is None else str(len(found))
        raise BadOutputError(f"{pipeline} was asked for {count} images and returned {number}")
    flags = getattr(output, "nsfw_content_detected", None)
    flags = list(flags) if isinstance(flags, Sequence) and len(flags) == count else [False] * count
    if isinstance(found[0], Image.Image):
        return Pending(flags, pictures=found)
    torch = import_library("torch")
    images = found if isinstance(found, torch.Tensor) else torch.stack(list(found))
    with torch.no_grad():
        finite = torch.isfinite(images).flatten(1).all(dim=1)
        pixels = (torch.nan_to_num(images.float()) * 255).round().to(torch.uint8)
        lit = pixels.flatten(1).amax(dim=1) > 0
        parts = [pixels.permute(0, 2, 3, 1).contiguous(), finite, lit]
        if not images.is_cuda:
            return Pending(flags, (), *(part.cpu() for part in parts))
        here = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]
        for mine, part in zip(here, parts, strict=True):
            mine.copy_(part, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(images.device))
    return Pending(flags, (), *here, arrived=arrived)
