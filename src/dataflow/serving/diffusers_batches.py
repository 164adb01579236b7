"""Batches of requests walk through a loaded pipeline: made ready, called, taken over, each in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from dataflow.errors import BadRequestError, ImageError, OutOfMemoryError, RetryError, ServingError
from dataflow.io import ImageIO
from dataflow.serving import capabilities as can
from dataflow.serving.diffusers_call import (
    Facts,
    Job,
    call_arguments,
    effective,
    padded,
    shape_key,
    shared_key,
    taken_steps,
    warm_up_arguments,
)
from dataflow.serving.diffusers_options import Settings
from dataflow.serving.diffusers_pictures import Pending
from dataflow.serving.diffusers_runner import Runner
from dataflow.types import GenerationRequest, GenerationResult


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the pipeline under way: whose pictures it makes, how many in all, and since when."""

    jobs: Sequence[Job]
    count: int
    pending: Pending
    started: float


class Batches:
    """Everything between requests and results, around one runner.

    Args:
        runner: the loaded pipeline; closed with this.
        facts: of the model.
        settings: of the serving.
        most: requests in a batch.
        reader: of input images.
        check: refuses a request that cannot work.
    """

    def __init__(
        self,
        runner: Runner,
        facts: Facts,
        settings: Settings,
        *,
        most: int,
        reader: ImageIO,
        check: Callable[[GenerationRequest], None],
    ) -> None:
        self.runner = runner
        self._facts, self._settings, self._most, self._reader, self._check = facts, settings, most, reader, check
        self._fitting: dict[Hashable, int] = {}
        self._inputs, self._calls, self._pictures = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("inputs", "pipeline", "pictures")
        )

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """As the serving's method. Several may be under way: the device goes from one to the next without a pause."""
        loop = asyncio.get_running_loop()
        jobs, results = await loop.run_in_executor(self._inputs, self._ready, requests)
        made = await loop.run_in_executor(self._calls, self._made, jobs)
        results.update(await loop.run_in_executor(self._pictures, self._taken, made))
        return [results[place] for place in range(len(requests))]

    def short_call(self, request: GenerationRequest) -> tuple[int, int]:
        """As the serving's method; while nothing else is under way."""
        arguments = call_arguments(self._facts.capabilities, [self._job(0, request)])
        short = warm_up_arguments(arguments)
        self._calls.submit(self.runner.drop, [request.seed], short).result()
        return taken_steps(arguments), taken_steps(short)

    def close(self) -> None:
        """Free the weights and the threads."""
        for thread in (self._inputs, self._calls, self._pictures):
            thread.shutdown()
        self.runner.close()

    def _ready(self, requests: Sequence[GenerationRequest]) -> tuple[list[Job], dict[int, GenerationResult]]:
        """The requests made ready, and what is wrong with the others, by their places."""
        jobs, results = [], {}
        for place, request in enumerate(requests):
            try:
                jobs.append(self._job(place, request))
            except (BadRequestError, RetryError) as error:
                results[place] = GenerationResult(error=error)
        return jobs, results

    def _made(self, jobs: Sequence[Job]) -> list[_Call]:
        calls: dict[Hashable, list[Job]] = {}
        for job in jobs:
            calls.setdefault(job.key, []).append(job)
        return [self._call(each) for each in calls.values()]

    def _job(self, place: int, request: GenerationRequest) -> Job:
        """Read a request's pictures and settle its parameters."""
        self._check(request)
        facts = self._facts
        capabilities = facts.capabilities
        params, size, negative = effective(facts.defaults, request)
        images = []
        for path in request.images:
            try:
                image = self._reader.read(path)
            except ImageError as error:
                if error.reason == "unreachable":
                    raise RetryError(str(error), reason="image_unreachable") from error
                raise BadRequestError(f"input image {error}", reason="bad_image") from error
            images.append(image)
        if not request.images and self._settings.task == "imageedit":
            raise BadRequestError("the previous turn's image is missing", reason="bad_image")
        if images and size is None:
            size = can.edit_size(capabilities, params, images[0].size)
        wanted = [can.input_size(capabilities, params, image.size, size) for image in images]
        images = [
            image if image.size == fit else image.resize(fit, Image.Resampling.LANCZOS)
            for image, fit in zip(images, wanted, strict=True)
        ]
        shared = not self._settings.strict and can.can_share(capabilities, len(images))
        key = shared_key(params, size, negative, wanted) if shared else place
        return Job(place=place, request=request, params=params, size=size, negative=negative, images=images, key=key)

    def _call(self, jobs: Sequence[Job]) -> _Call:
        capabilities = self._facts.capabilities
        most = self._count(jobs)
        batch = padded(jobs, most)
        shape = shape_key(capabilities, batch[0], most)
        try:
            pending, started = self.runner.run(
                [job.request.seed for job in batch],
                call_arguments(capabilities, batch),
                shape=shape,
                size=batch[0].size,
            )
        except OutOfMemoryError:
            if most > 1:
                # the engine comes again with half of the jobs: they must not be filled up to what did not fit
                self._fitting[shape_key(capabilities, jobs[0], 0)] = len(jobs) if most > len(jobs) else (most + 1) // 2
            raise
        return _Call(jobs, most, pending, started)

    def _count(self, jobs: Sequence[Job]) -> int:
        """How many pictures a call makes: what is compiled takes one number only, so that it is filled up."""
        first = jobs[0]
        alone = self._settings.strict or not can.can_share(self._facts.capabilities, len(first.images))
        if not self._settings.options.compile or alone or first.request.alone:
            return len(jobs)
        shape = shape_key(self._facts.capabilities, first, 0)
        return max(len(jobs), self._fitting.get(shape, self._most))

    def _taken(self, made: Sequence[_Call]) -> dict[int, GenerationResult]:
        results: dict[int, GenerationResult] = {}
        for call in made:
            pictures, took = self.runner.finish(call.pending, call.started)
            seconds = took / len(call.jobs)
            common = {**self.runner.provenance, "batch_size": call.count}
            for job, picture in zip(call.jobs, pictures, strict=False):  # what filled the call up is left
                if isinstance(picture, ServingError):
                    results[job.place] = GenerationResult(error=picture, seconds=seconds)
                else:
                    facts = {**common, "width": picture.width, "height": picture.height}
                    results[job.place] = GenerationResult(images=(picture,), provenance=facts, seconds=seconds)
        return results
