"""``replay``: make one image again from what its own file says, and compare."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataflow import config as configuration
from dataflow.commands.folder import JOB_FILE, load_job, shown
from dataflow.commands.options import DEFAULT_FOLDER
from dataflow.config import Job
from dataflow.errors import InputError
from dataflow.io import ImageIO
from dataflow.picture_files import status
from dataflow.remote_files import is_url
from dataflow.types import GenerationRequest, Serving

_FACTS = frozenset(
    {
        "request_id", "prompt", "seed", "params", "negative_prompt", "size", "images", "image_hashes", "after",
        "software", "provenance", "usage", "mask",
    }
)  # fmt: skip
"""What an image's metadata says beside the fingerprint of its model."""


def replay(args: argparse.Namespace) -> int:
    """Exit code 0 if the new image is the old one within the tolerance, 1 if not."""
    named = Path(args.request_id)
    folder = Path(args.cache) if args.cache else _folder_of(named)
    job = configuration.build(load_job(folder))
    original = args.request_id if status(args.request_id) else _find(job.images, args.request_id)
    facts = job.images.read_metadata(original)
    if "request_id" not in facts or facts.get("metadata_truncated"):
        what = "its prompt was too long for this format" if facts else "it was not made by dataflow"
        raise InputError(f"does not say how it was made: {what}", path=original)
    request = _request(job.images, facts, original)
    serving = _serving(job, request, {key: value for key, value in facts.items() if key not in _FACTS})
    made = _make(serving, request)
    place = folder / "replay"
    store = ImageIO(place, job.images.format, quality=job.images.quality, max_pixels=job.images.max_pixels)
    saved = store.save(made, request.request_id, {**facts, "replay_of": original})
    copy = place / saved.name
    beside = place / copy.name
    copy.replace(beside)
    copy.parent.rmdir()
    print(f"original: {original if is_url(original) else shown(Path(original))}\nreplay:   {shown(beside)}")
    return _compare(job.images, original, beside, args.tolerance)


def _folder_of(image: Path) -> Path:
    """The folder of the job that an image belongs to; the default folder for a bare id."""
    for parent in image.absolute().parents:
        if (parent / JOB_FILE).is_file():
            return parent
    return Path(DEFAULT_FOLDER)


def _find(images: ImageIO, prefix: str) -> str:
    found = sorted(name for name, _ in images.existing() if name[3:].startswith(prefix.lower()))
    if not found:
        raise InputError(f"there is no image whose id begins with {prefix!r}", path=images.save_path)
    if len(found) > 1:
        ids = ", ".join(Path(name).stem for name in found[:3])
        raise InputError(f"{len(found)} images have an id that begins with {prefix!r}: {ids}, …", path=images.save_path)
    return images.path(found[0])


def _request(images: ImageIO, facts: Mapping[str, Any], original: str) -> GenerationRequest:
    hashes = facts.get("image_hashes", ())
    if not re.fullmatch(r"[0-9a-f]{32}", str(facts["request_id"])):
        raise InputError(f"its request id is none: {facts['request_id']!r}", path=original)
    for path, expected in zip(facts.get("images", ()), hashes, strict=False):
        # A later turn's first image is the answer to the turn before; it has no hash of its own.
        if len(hashes) == len(facts["images"]) and images.digest(path) != expected:
            raise InputError(f"the input image {path} is not what it was when this image was made", path=original)
    return GenerationRequest(
        request_id=facts["request_id"],
        prompt=facts["prompt"],
        images=tuple(facts.get("images", ())),
        image_hashes=tuple(hashes),
        mask=facts.get("mask"),
        negative_prompt=facts.get("negative_prompt"),
        seed=facts["seed"],
        size=tuple(facts["size"]) if facts.get("size") else None,
        params=facts.get("params", {}),
        after=facts.get("after"),
        alone=True,
    )


def _serving(job: Job, request: GenerationRequest, fingerprint: Mapping[str, Any]) -> Serving:
    """The serving that made the image, or the likeliest one, with a warning that names the differences."""
    servings = [plan.serving for plan in job.pipeline.plans() if plan.serving is not None]
    differences: list[tuple[int, int, Serving, list[str]]] = []
    for number, serving in enumerate(servings):
        now = dict(serving.fingerprint())
        differing = [key for key in sorted({*now, *fingerprint}) if now.get(key) != fingerprint.get(key)]
        # The same model may stand there twice, to draw and to edit: edits come from the last one.
        place = -number if request.task == "imageedit" else number
        differences.append(
            (len(differing), place, serving, [f"{k}: {fingerprint.get(k)!r} → {now.get(k)!r}" for k in differing])
        )
    if not differences:
        raise InputError("the job has no step with a serving")
    _, _, serving, differing = min(differences, key=lambda each: each[:2])
    if differing:
        print(f"warning: the model is not the one that made this image: {', '.join(differing)}", file=sys.stderr)
    return serving


def _make(serving: Serving, request: GenerationRequest) -> Image.Image | bytes:
    serving.check(request)
    serving.setup()
    try:
        (result,) = asyncio.run(serving.generate([request]))
    finally:
        serving.cleanup()
    if result.error is not None:
        raise result.error
    if not result.images:
        raise InputError("the serving answered with text, not with an image")
    image = result.images[0]
    return bytes(image) if isinstance(image, memoryview) else image


def _compare(images: ImageIO, original: str, again: Path, tolerance: float) -> int:
    before, after = images.read(original), images.read(again)
    if before.size != after.size:
        print(f"different: {before.width} × {before.height} before, {after.width} × {after.height} now")
        return 1
    difference = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16))
    most, mean = int(difference.max()), float(difference.mean())
    if not most:
        print("identical: every pixel is the same")
        return 0
    verdict = "the same within rounding" if most <= tolerance else "different"
    print(f"{verdict}: of 255 levels the largest difference is {most}, the mean {mean:.4f} (tolerance {tolerance:g})")
    return 0 if most <= tolerance else 1
