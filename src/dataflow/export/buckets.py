"""Aspect-ratio buckets: sizes of about the same area that trainers put batches together from."""

from __future__ import annotations

import functools
import math


@functools.cache
def bucket_sizes(resolution: int, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """All (width, height), narrowest first: multiples of ``step``, of at most ``resolution``² pixels.

    Args:
        resolution: side of the square that gives the area.
        step: what sides are multiples of.
        max_aspect: longest side by shortest, at most.

    Returns:
        The square, and for every width the largest height, both ways round.
    """
    area = resolution * resolution
    side = resolution // step * step
    found = {(side, side)}
    for width in range(step, side + 1, step):
        height = area // width // step * step
        if height <= max_aspect * width:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def bucket_for(size: tuple[int, int], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, as a ratio; of two as near the larger, then the wider."""
    aspect = math.log(size[0] / size[1])
    return min(
        sizes, key=lambda each: (round(abs(math.log(each[0] / each[1]) - aspect), 9), -each[0] * each[1], -each[0])
    )
