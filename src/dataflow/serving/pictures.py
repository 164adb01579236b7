"""Reading the pictures that are to be scored."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dataflow.errors import BadRequestError, ImageError
from dataflow.io import ImageIO


def read_picture(path: str) -> Image.Image:
    """A whole, harmless picture, as :class:`~dataflow.io.ImageIO` reads it.

    Raises:
        BadRequestError: ``image_missing``, or ``image_…`` and what is wrong with the file.
    """
    try:
        return ImageIO(Path(path).parent).read(path)
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        raise BadRequestError(str(error), reason=f"image_{reason}") from error
