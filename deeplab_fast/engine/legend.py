"""Legends of pictures: which colour stands for which class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deeplab_fast.data.classes import Colour

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["LegendEntry", "font_of_size", "legend_image", "stacked", "text_image"]

_INK, _FRAME = (32, 32, 32), (128, 128, 128)


@dataclass(frozen=True)
class LegendEntry:
    """A colour and what it stands for; no colour is an empty box: the photo is left as it is."""

    text: str
    colour: Colour | None


def legend_image(entries: Sequence[LegendEntry], width: int, size: int = 14) -> Image.Image:
    """Boxes with texts in rows, black on white, ``width`` pixels wide or as the widest needs it.

    ``size`` is that of the letters in pixels.
    """
    from PIL import Image, ImageDraw

    font, gap = font_of_size(size), max(2, size // 3)
    widths = [size + gap + _length(font, each.text) + 3 * gap for each in entries]
    width = max([width, *(each + gap for each in widths)])
    places, left, top = [], gap, gap
    for each in widths:
        if left + each > width and left > gap:
            left, top = gap, top + size + gap
        places.append((left, top))
        left += each
    image = Image.new("RGB", (width, top + size + gap), "white")
    draw = ImageDraw.Draw(image)
    for (left, top), entry in zip(places, entries, strict=True):
        box = (left, top, left + size - 1, top + size - 1)
        draw.rectangle(box, fill=entry.colour or "white", outline=_FRAME)
        place = (left + size + gap, top + size // 2)
        draw.text(place, entry.text, fill=_INK, font=font, anchor="lm")
    return image


def text_image(lines: Sequence[str], width: int, size: int = 14) -> Image.Image:
    """Lines of text, black on white, broken at spaces where they are wider than ``width``."""
    from PIL import Image, ImageDraw

    font, gap = font_of_size(size), max(2, size // 3)
    rows: list[str] = []
    for line in lines:
        row = ""
        for word in line.split():
            longer = f"{row} {word}".strip()
            if row and _length(font, longer) > width - 2 * gap:
                rows.append(row)
                longer = word
            row = longer
        rows.append(row)
    width = max([width, *(_length(font, row) + 2 * gap for row in rows)])
    step = size + gap
    image = Image.new("RGB", (width, step * len(rows) + gap), "white")
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        draw.text((gap, gap + i * step + size // 2), row, fill=_INK, font=font, anchor="lm")
    return image


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, at the left, on white."""
    from PIL import Image

    size = max(each.width for each in pictures), sum(each.height for each in pictures)
    result = Image.new("RGB", size, "white")
    top = 0
    for each in pictures:
        result.paste(each, (0, top))
        top += each.height
    return result


def font_of_size(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _length(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return round(font.getlength(text))
