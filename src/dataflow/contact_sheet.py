"""One picture of prompts and what became of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from dataflow.errors import ImageError
from dataflow.io import ImageIO

_PAPER, _INK, _FAINT, _GAP, _FAILED = "#ffffff", "#1f2328", "#8b949e", 16, "#e6e8eb"
_LINES = 4
_CJK_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "C:/Windows/Fonts/msyh.ttc",
)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Item(NamedTuple):
    """What stands above one caption.

    Attributes:
        images: paths; one is a result, two are before and after. None stands for a picture there is not.
        caption: the prompt.
        reason: why a picture is missing, to be written in its place.
    """

    images: Sequence[str | os.PathLike[str] | None]
    caption: str
    reason: str = "no image"


def contact_sheet(
    items: Iterable[Item | tuple[Sequence[str | os.PathLike[str] | None], str]],
    columns: int = 4,
    cell: int = 128,
    title: str | None = None,
) -> Image.Image:
    """A page of pictures, each above its caption; before and after have an arrow between them.

    Args:
        items: what to show; a pair of paths and caption will do. A picture that is missing or cannot be read becomes a
            grey cell with the reason.
        columns: items side by side.
        cell: side of a picture in pixels; smaller pictures are enlarged, larger ones reduced, none is distorted.
        title: a heading.

    Returns:
        An RGB picture.
    """
    items = [item if isinstance(item, Item) else Item(*item) for item in items]
    text = "".join([title or "", *(item.caption for item in items)])
    font, heading = _font(13, text), _font(20, text)
    line = _height(font) + 3
    arrow = cell // 4
    across = max((len(item.images) for item in items), default=1)
    width = across * cell + (across - 1) * arrow
    captions = [_wrap(item.caption, font, width) for item in items]
    columns = max(1, min(columns, len(items)))
    rows = [captions[start : start + columns] for start in range(0, len(items), columns)]
    heights = [cell + 6 + line * max(map(len, row)) + _GAP for row in rows]
    top = _GAP + (_height(heading) + _GAP if title else 0)
    page = Image.new("RGB", (_GAP + columns * (width + _GAP), top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((_GAP, _GAP), _drawable(title), _INK, heading)
    reader = ImageIO(os.curdir)
    for number, item in enumerate(items):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), top + sum(heights[:row])
        for place, path in enumerate(item.images):
            left = x + place * (cell + arrow)
            page.paste(_cell(reader, path, item.reason, cell, font), (left, y))
            if place:
                _arrow(draw, left - arrow, left, y + cell // 2)
        for at, text in enumerate(captions[number]):
            draw.text((x, y + cell + 6 + at * line), text, _INK, font)
    return page


def _cell(reader: ImageIO, path: str | os.PathLike[str] | None, reason: str, side: int, font: Font) -> Image.Image:
    canvas = Image.new("RGB", (side, side), _PAPER)
    if path is not None:
        try:
            image = reader.read(path)
        except ImageError as error:
            reason = error.reason
        else:
            scale = side / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Sharper than bilinear, and without the blocks of nearest, on 64-pixel pictures shown at twice the size.
            image = image.resize(size, Image.Resampling.LANCZOS)
            canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
            return canvas
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, side - 1, side - 1), fill=_FAILED)
    lines = _wrap(reason.replace("_", " "), font, side - 8)
    line = _height(font) + 3
    for at, text in enumerate(lines):
        y = (side - line * len(lines)) / 2 + at * line
        draw.text(((side - font.getlength(text)) / 2, y), text, _FAINT, font)
    return canvas


def _arrow(draw: ImageDraw.ImageDraw, left: int, right: int, y: int) -> None:
    head = (right - left) // 5
    draw.line((left + head, y, right - 2 * head, y), _FAINT, 2)
    draw.polygon([(right - head, y), (right - 3 * head, y - head), (right - 3 * head, y + head)], _FAINT)


def _font(size: int, text: str) -> Font:
    """Pillow's own font; for Chinese, Japanese or Korean one of the system's, if it has any (else boxes are drawn)."""
    if any(letter >= "\u2e80" for letter in text):
        for file in _CJK_FONTS:
            if Path(file).is_file():
                return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)


def _height(font: Font) -> int:
    return round(font.getbbox("Ágy")[3])


def _drawable(text: str) -> str:
    """``text`` on one line, without what no font can draw."""
    return " ".join(text.encode(errors="replace").decode().replace("\0", " ").split())


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """At most four lines; breaks between words, or inside one that is too long or written without spaces."""
    lines: list[str] = []
    for paragraph in text[:1000].split("\n"):
        rest = _drawable(paragraph)
        while rest:
            end = min(len(rest), width // 3)  # no letter is narrower than three pixels
            while font.getlength(rest[:end]) > width and end > 1:
                end -= 1
            if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
                end = space
            lines.append(rest[:end].rstrip())
            rest = rest[end:].lstrip()
    if len(lines) > _LINES:
        last = lines[_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[_LINES - 1 :] = [last + "…"]
    return lines
