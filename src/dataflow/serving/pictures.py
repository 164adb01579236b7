"""Reading the pictures that are to be scored."""

from __future__ import annotations

import os

from PIL import Image

from dataflow.errors import BadRequestError, ImageError, RetryError
from dataflow.io import ImageIO
from dataflow.picture_files import read_bytes


def read_picture(path: str, sha256: str | None = None) -> Image.Image:
    """A whole, harmless picture, as :class:`~dataflow.io.ImageIO` reads it.

    Args:
        path: of the file.
        sha256: that it must have, for whoever keeps something under it.

    Raises:
        BadRequestError: ``image_missing``, or ``image_…`` and what is wrong with the file.
        RetryError: the store it is in does not answer now.
    """
    store = ImageIO(os.curdir)
    try:
        picture = store.read(path)
        # Afterwards, so that what was read is what was hashed.
        if sha256 is not None and store.digest(path) != sha256:
            raise BadRequestError(f"{path} was changed while it was being scored", reason="image_changed")
        return picture
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        if reason == "unreachable":
            raise RetryError(str(error), reason=f"image_{reason}") from error
        raise BadRequestError(str(error), reason=f"image_{reason}") from error


def input_bytes(path: str) -> bytes:
    """An input image as it lies on disk, in a pack or in a store.

    Raises:
        BadRequestError: it cannot be read (``reason`` is ``bad_image``).
        RetryError: the store it is in does not answer now.
    """
    try:
        return read_bytes(path)
    except ImageError as error:
        if error.reason == "unreachable":
            raise RetryError(str(error), reason="image_unreachable") from error
        raise BadRequestError(f"input image {error}", reason="bad_image") from error
