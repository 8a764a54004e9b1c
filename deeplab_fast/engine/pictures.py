"""Pictures of an evaluation: the confusion matrix, photos with labels and predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from deeplab_fast.data.classes import ClassSet
from deeplab_fast.data.transforms import resize_pair
from deeplab_fast.engine.metrics import ImageScore
from deeplab_fast.engine.outputs import overlay

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["Panel", "confusion_image", "draw_panel", "panel_name", "png_writer"]


# Longer side of one picture of a panel, in pixels.
_PANEL_SIDE = 640


@dataclass(frozen=True)
class Panel:
    """A photo with its labels and its prediction: the ``rank``-th (from 1) "worst" or "best"."""

    kind: str
    rank: int
    score: ImageScore
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def confusion_image(confusion: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A PIL picture of the matrix: row i shows where the pixels of class i went, in percent.

    Light is 0 %, dark blue 100 %; up to 30 classes with the figures. A class without pixels has a
    grey row.
    """
    from PIL import Image, ImageDraw

    count = len(classes)
    figures = count <= 30
    cell = 36 if figures else 14
    font = _font(12 if figures else 10)
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    # White to dark blue; the square root shows small confusions.
    light, dark = np.array((255.0, 255.0, 255.0)), np.array((8.0, 48.0, 107.0))
    colours = light + (dark - light) * np.sqrt(shares)[..., None]
    colours[rows[:, 0] == 0] = 224
    heat = Image.fromarray(np.rint(colours).astype(np.uint8)).resize(
        (count * cell, count * cell), Image.Resampling.NEAREST
    )
    margin = 8 + max(int(font.getlength(name)) for name in classes)
    title = 22
    image = Image.new(
        "RGB", (margin + count * cell + 8, title + margin + count * cell + 8), "white"
    )
    image.paste(heat, (margin, title + margin))
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), "rows: labels, columns: predictions, % of the row", fill="black", font=font)
    for i, name in enumerate(classes):
        middle = title + margin + i * cell + cell // 2
        draw.text((margin - 4, middle), name, fill="black", font=font, anchor="rm")
        upright = Image.new("RGB", (margin - 4, cell), "white")
        ImageDraw.Draw(upright).text((0, cell // 2), name, fill="black", font=font, anchor="lm")
        image.paste(upright.rotate(90, expand=True), (margin + i * cell, title + 4))
    if figures:
        for i, j in zip(*np.nonzero(shares >= 0.005), strict=True):
            place = (margin + j * cell + cell // 2, title + margin + i * cell + cell // 2)
            colour = "white" if shares[i, j] > 0.3 else "black"
            text = f"{100 * shares[i, j]:.0f}"
            draw.text(place, text, fill=colour, font=font, anchor="mm")
    return image


def panel_name(panel: Panel) -> str:
    """The file's name."""
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(panel.score.name).stem)
    return f"{panel.kind}_{panel.rank:02d}_{stem}.png"


def draw_panel(panel: Panel, classes: ClassSet) -> Image.Image:
    """Photo, labels and prediction side by side, with titles."""
    from PIL import Image, ImageDraw

    # Negative or large labels have no colour: ignored pixels get the first free id, drawn black.
    shown = replace(classes, ignore_index=len(classes))
    truth = panel.truth.astype(np.int32)
    truth[panel.truth == classes.ignore_index] = len(classes)
    prediction = panel.prediction.astype(np.int32)
    height, width = truth.shape
    factor = min(1.0, _PANEL_SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    photo, truth = resize_pair(panel.image, truth, size)
    _, prediction = resize_pair(panel.image, prediction, size)
    parts = [photo, overlay(photo, truth, shown, alpha=0.6)]
    parts.append(overlay(photo, prediction, shown, alpha=0.6))
    gap, head = 6, 20
    canvas = Image.new("RGB", (3 * size[1] + 2 * gap, size[0] + head), "white")
    for i, part in enumerate(parts):
        canvas.paste(Image.fromarray(part), (i * (size[1] + gap), head))
    draw = ImageDraw.Draw(canvas)
    score = panel.score
    titles = (score.name, "labels", f"prediction, mIoU {100 * score.miou:.1f}")
    for i, title in enumerate(titles):
        place = (i * (size[1] + gap) + 2, head // 2)
        draw.text(place, title, fill="black", font=_font(12), anchor="lm")
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def png_writer(image: Image.Image) -> Callable[[BinaryIO], object]:
    """Writes the picture into an open file."""
    return lambda file: image.save(file, format="PNG")
