"""Reading the pictures that are to be scored."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dataflow.errors import BadRequestError, ImageError
from dataflow.io import ImageIO


def read_picture(path: str, sha256: str | None = None) -> Image.Image:
    """A whole, harmless picture, as :class:`~dataflow.io.ImageIO` reads it.

    Args:
        path: of the file.
        sha256: that it must have, for whoever keeps something under it.

    Raises:
        BadRequestError: ``image_missing``, or ``image_…`` and what is wrong with the file.
    """
    store = ImageIO(Path(path).parent)
    try:
        picture = store.read(path)
        # Afterwards, so that what was read is what was hashed.
        if sha256 is not None and store.digest(path) != sha256:
            raise BadRequestError(f"{path} was changed while it was being scored", reason="image_changed")
        return picture
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        raise BadRequestError(str(error), reason=f"image_{reason}") from error
