"""From requests to the arguments of one pipeline call; pure, nothing heavy is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dataflow.errors import BadRequestError
from dataflow.serving.capabilities import COUNTS, Capabilities, Size, negative_works
from dataflow.serving.model_files import ModelFiles
from dataflow.types import GenerationRequest

WARM_UP_STEPS = 2
"""The first step of some schedulers is not like the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a model's own files say, together with what the user said.

    Attributes:
        files: where they are.
        index: the model_index.json.
        capabilities: of the pipeline class.
        defaults: effective call arguments where a row says nothing.
    """

    files: ModelFiles
    index: Mapping[str, Any]
    capabilities: Capabilities
    defaults: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, ready for a call.

    Attributes:
        place: of the request among those asked for together.
        request: as it came.
        params: call arguments that are not in the fields below.
        size: of the picture to make, None for the pipeline's choice.
        negative: the negative prompt.
        images: input pictures, RGB, at the size the pipeline is to see.
        key: jobs with equal keys share a call.
    """

    place: int
    request: GenerationRequest
    params: Mapping[str, Any]
    size: Size | None
    negative: str | None
    images: Sequence[Image.Image]
    key: Hashable


def effective(
    defaults: Mapping[str, Any], request: GenerationRequest
) -> tuple[dict[str, Any], Size | None, str | None]:
    """A request's call arguments, size and negative prompt: the defaults with what the row says on top.

    Raises:
        BadRequestError: a height without a width, or the reverse.
    """
    params = {**defaults, **{name: value for name, value in request.params.items() if value is not None}}
    width, height = params.pop("width", None), params.pop("height", None)
    default_negative = params.pop("negative_prompt", None)
    negative = default_negative if request.negative_prompt is None else request.negative_prompt
    if request.size is not None:
        return params, request.size, negative
    if (width is None) != (height is None):
        raise BadRequestError("height and width must be given together")
    return params, None if width is None or height is None else (int(width), int(height)), negative


def shared_key(params: Mapping[str, Any], size: Size | None, negative: str | None, images: Sequence[Size]) -> Hashable:
    """What requests of one call must have in common."""
    return json.dumps(params, sort_keys=True, default=str), size, negative is None, tuple(images)


def call_arguments(capabilities: Capabilities, jobs: Sequence[Job]) -> dict[str, Any]:
    """The pipeline's call arguments for jobs of one key: plain values for one job, lists for several."""
    first = jobs[0]
    several = len(jobs) > 1
    arguments = {name: int(value) if name in COUNTS else value for name, value in first.params.items()}
    prompts = [
        "".join(capabilities.tag.format(number + 1) for number in range(len(job.images))) + job.request.prompt
        for job in jobs
    ]
    arguments["prompt"] = prompts if several else prompts[0]
    if first.negative is not None and negative_works(capabilities, first.params):
        arguments["negative_prompt"] = [job.negative for job in jobs] if several else first.negative
    if first.images:
        assert capabilities.image is not None
        if capabilities.list_means == "references":
            arguments[capabilities.image] = list(first.images)
        else:
            arguments[capabilities.image] = [job.images[0] for job in jobs] if several else first.images[0]
    if first.size is not None:
        width, height = first.size
        arguments |= {"width": width, "height": height}
        if capabilities.follow == "kontext":
            arguments["max_area"] = width * height  # else it overrides both
    return arguments


def warm_up_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with the same shapes that takes as few steps as there may be."""
    steps = arguments.get("num_inference_steps")
    if steps is None or any(arguments.get(name) is not None for name in ("timesteps", "sigmas")):
        return dict(arguments)
    strength = float(arguments.get("strength") or 1.0)
    # an image to begin with leaves only that share of the steps
    return {**arguments, "num_inference_steps": min(steps, math.ceil(WARM_UP_STEPS / strength))}


def taken_steps(arguments: Mapping[str, Any]) -> int:
    """Steps that a call with these arguments takes, at least 1."""
    for name in ("sigmas", "timesteps"):
        if arguments.get(name) is not None:
            return max(1, len(arguments[name]))
    # 1 where the pipeline alone knows how many: it takes as many in every call
    return max(1, int(arguments.get("num_inference_steps", 1) * float(arguments.get("strength") or 1.0)))


def padded(jobs: Sequence[Job], count: int) -> list[Job]:
    """The jobs, the last one again and again until there are ``count``."""
    return [*jobs, *[jobs[-1]] * (count - len(jobs))]


def shape_key(capabilities: Capabilities, job: Job, count: int) -> Hashable:
    """Equal for calls whose tensors have equal shapes, as far as the arguments tell."""
    guided = negative_works(capabilities, job.params)
    images = tuple(image.size for image in job.images)
    return job.size, images, count, guided, job.negative is None, job.params.get("max_sequence_length")
