"""Pictures of a validation, a batch, a prediction: confusion matrix, photos with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from deeplab_fast.data.classes import ClassSet
from deeplab_fast.data.transforms import resize_pair
from deeplab_fast.engine.legend import (
    LegendEntry,
    font_of_size,
    legend_image,
    stacked,
    text_image,
)
from deeplab_fast.engine.metrics import ImageScore, Metrics, percent
from deeplab_fast.engine.outputs import overlay, overlay_legend, unpainted_ids

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Panel",
    "batch_image",
    "confusion_image",
    "draw_panel",
    "panel_name",
    "png_writer",
    "prediction_image",
]


# Longer side of one picture in pixels: least and most of a panel, that of a batch.
_PANEL_LEAST, _PANEL_MOST, _BATCH_SIDE = 320, 640, 320
# Between pictures of a row.
_GAP = 6
# More classes have no figures, and those that do not occur are left out.
_FIGURES = 30
_INK = (32, 32, 32)
# Black, violet, red, orange, pale yellow, as even in lightness as five colours are.
_HEAT = np.array(((0, 0, 0), (76, 18, 110), (190, 50, 80), (246, 136, 26), (255, 246, 170)))


@dataclass(frozen=True)
class Panel:
    """A photo with its labels and its prediction: the ``rank``-th (from 1) "worst" or "best"."""

    kind: str
    rank: int
    score: ImageScore
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def confusion_image(confusion: np.ndarray, classes: Sequence[str], title: str = "") -> Image.Image:
    """A PIL picture of the matrix: row i shows where the pixels of class i went, in percent.

    Light is 0 %, dark blue 100 %; up to 30 classes with the figures. A class without pixels has a
    grey row. Of more than 30 classes those in neither labels nor predictions are left out, and
    named above. Names at the left have their IoU in percent. The matrix ends 8 pixels from the
    right and the bottom.

    Args:
        confusion: integers [C, C].
        classes: C names.
        title: of what, such as the weights; the mIoU stands below.
    """
    from PIL import Image, ImageDraw

    metrics = Metrics.from_confusion(confusion, classes)
    shown = list(range(len(classes)))
    notes = []
    if len(classes) > _FIGURES:
        occurs = (confusion.sum(0) + confusion.sum(1)) > 0
        if occurs.any():
            shown = np.flatnonzero(occurs).tolist()
        if not occurs.all():
            notes.append(
                f"Left out, in neither labels nor predictions: {', '.join(metrics.absent)}"
            )
    matrix = confusion[np.ix_(shown, shown)]
    count = len(shown)
    figures = count <= _FIGURES
    cell, letters = (36, 12) if figures else (18, 11) if count <= 60 else (14, 10)
    font = font_of_size(letters)
    rows = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, rows, out=np.zeros(matrix.shape), where=rows > 0)
    # White to dark blue; the square root shows small confusions.
    light, dark = np.array((255.0, 255.0, 255.0)), np.array((8.0, 48.0, 107.0))
    colours = light + (dark - light) * np.sqrt(shares)[..., None]
    colours[rows[:, 0] == 0] = 224
    heat = Image.fromarray(np.rint(colours).astype(np.uint8)).resize(
        (count * cell, count * cell), Image.Resampling.NEAREST
    )
    names = [classes[i] for i in shown]
    at_left = [f"{classes[i]}  {percent(metrics.iou[i])}" for i in shown]
    left = 12 + max(int(font.getlength(text)) for text in at_left)
    above = 12 + max(int(font.getlength(name)) for name in names)
    width = left + count * cell + 8
    head = [title] if title else []
    head.append(f"mIoU {percent(metrics.miou)} % of {metrics.num_scored} of {len(classes)} classes")
    head.append("rows: labels with their IoU in %; columns: predictions; % of the row")
    header = text_image([*head, *notes], max(width, 400), 13)
    image = Image.new("RGB", (header.width, above + count * cell + 8), "white")
    # At the right also where the header is wider.
    left += header.width - width
    image.paste(heat, (left, above))
    draw = ImageDraw.Draw(image)
    for i, (name, text) in enumerate(zip(names, at_left, strict=True)):
        middle = above + i * cell + cell // 2
        draw.text((left - 6, middle), text, fill=_INK, font=font, anchor="rm")
        upright = Image.new("RGB", (above - 6, cell), "white")
        ImageDraw.Draw(upright).text((0, cell // 2), name, fill=_INK, font=font, anchor="lm")
        image.paste(upright.rotate(90, expand=True), (left + i * cell, 0))
    draw.rectangle(
        (left - 1, above - 1, left + count * cell, above + count * cell), outline=(160, 160, 160)
    )
    if figures:
        for i, j in zip(*np.nonzero(shares >= 0.005), strict=True):
            place = (left + j * cell + cell // 2, above + i * cell + cell // 2)
            colour = "white" if shares[i, j] > 0.3 else "black"
            text = f"{100 * shares[i, j]:.0f}"
            draw.text(place, text, fill=colour, font=font, anchor="mm")
    return stacked([header, image])


def panel_name(panel: Panel) -> str:
    """The file's name."""
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(panel.score.name).stem)
    return f"{panel.kind}_{panel.rank:02d}_{stem}.png"


def draw_panel(
    panel: Panel,
    classes: ClassSet,
    title: str = "",
    *,
    unpainted: Sequence[int] | None = None,
) -> Image.Image:
    """Photo, labels and prediction side by side, with titles and a legend.

    The longer side of the photo is 320 to 640 pixels. ``unpainted`` is as for :func:`overlay`;
    ignored pixels are black in the labels.
    """
    known, (truth, prediction) = _with_ignored(classes, (panel.truth, panel.prediction))
    size = _fitted(truth.shape, min(_PANEL_MOST, max(_PANEL_LEAST, *truth.shape)))
    photo, truth = resize_pair(panel.image, truth, size)
    _, prediction = resize_pair(panel.image, prediction, size)
    score = panel.score
    row = _row(
        [
            (photo, score.name),
            (overlay(photo, truth, known, alpha=0.6, unpainted=unpainted), "labels"),
            (
                overlay(photo, prediction, known, alpha=0.6, unpainted=unpainted),
                f"prediction: mIoU {percent(score.miou)} %, "
                f"{percent(score.pixel_accuracy)} % of the pixels",
            ),
        ]
    )
    legend = legend_image(_entries(classes, (truth, prediction), unpainted), row.width)
    return stacked([*([text_image([title], row.width)] if title else []), row, legend])


def batch_image(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    classes: ClassSet,
    title: str = "",
) -> Image.Image:
    """Training images as the network gets them, each beside its labels, two pairs a row.

    Args:
        images: uint8 [N, h, w, 3].
        labels: integers [N, h, w].
        names: N texts.
        classes: names and colours; ignored pixels are black.
        title: text above.
    """
    from PIL import Image

    known, shown = _with_ignored(classes, labels)
    size = _fitted(images.shape[1:3], _BATCH_SIDE)
    pairs, small = [], []
    for image, label, name in zip(images, shown, names, strict=True):
        photo, label = resize_pair(image, label, size)
        small.append(label)
        pairs.append(_row([(photo, name), (overlay(photo, label, known, alpha=0.6), "labels")]))
    across, gap = min(2, len(pairs)), 12
    width, height = max(each.width for each in pairs), max(each.height for each in pairs)
    down = -(-len(pairs) // across)
    canvas = Image.new("RGB", (across * (width + gap) - gap, down * (height + gap) - gap), "white")
    for i, each in enumerate(pairs):
        canvas.paste(each, (i % across * (width + gap), i // across * (height + gap)))
    legend = legend_image(_entries(classes, small), canvas.width)
    return stacked([*([text_image([title], canvas.width)] if title else []), canvas, legend])


def prediction_image(
    image: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: ClassSet,
    *,
    width: int = 1600,
    unpainted: Sequence[int] | None = None,
) -> Image.Image:
    """Photo, labels, overlay with a legend, and uncertainty with a scale, for one prediction.

    Two rows of two, one row for an upright photo. The uncertainty of a pixel is 1 - p, p the
    probability of its class. The scale ends at 1 - 1/C, where all C classes are as likely; a pixel
    whose p is not finite counts as 1 and has the colour of that end.

    Args:
        image: uint8 [H, W, 3].
        labels: integers [H, W], no ignored ones.
        probabilities: floats [H, W] in 0..1, of the chosen class.
        classes: C names and colours.
        width: of the picture in pixels, at least 320.
        unpainted: as for :func:`overlay`; in the labels every class has its colour.

    Raises:
        ValueError: shapes that do not fit, labels that are no class, too small a width.
    """
    from PIL import Image

    if width < 320:
        raise ValueError(f"width is {width}, expected at least 320 pixels; leave it out for 1600")
    if image.shape != (*labels.shape, 3) or probabilities.shape != labels.shape:
        raise ValueError(
            f"the image is {list(image.shape)}, the labels are {list(labels.shape)}, the "
            f"probabilities {list(probabilities.shape)}; expected [H, W, 3], [H, W] and [H, W], as "
            "predict(image, return_prob=True) gives them"
        )
    upright = labels.shape[0] > labels.shape[1]
    columns, letters = 4 if upright else 2, max(11, width // 80)
    side = (width + _GAP) // columns - _GAP
    size = (max(1, round(side * labels.shape[0] / labels.shape[1])), side)
    sure = probabilities.astype(np.float32)
    doubt = np.where(np.isfinite(sure), 1 - sure, np.float32(1))
    most = 1 - 1 / max(2, len(classes))
    mean = f"uncertainty (1 - probability), mean {percent(float(doubt.mean()))} %"
    small = Image.fromarray(doubt).resize(size[::-1], Image.Resampling.BILINEAR)
    photo, shown = resize_pair(image, labels, size)
    parts = [
        (photo, "photo"),
        (overlay(photo, shown, classes, alpha=1.0, unpainted=()), "labels"),
        (overlay(photo, shown, classes, unpainted=unpainted), "labels on the photo"),
        (_heat(np.asarray(small) / most), mean),
    ]
    rows = [_row(parts[i : i + columns], letters) for i in range(0, 4, columns)]
    below = width - side - _GAP
    legend = overlay_legend(labels, classes, below, unpainted=unpainted, size=letters)
    scale = _scale_image(side, letters, most)
    last = Image.new("RGB", (width, max(legend.height, scale.height)), "white")
    last.paste(legend, (0, 0))
    last.paste(scale, (width - side, 0))
    return stacked([*rows, last])


def _heat(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 [..., 3], of values in 0..1."""
    places = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, places, channel) for channel in _HEAT.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _scale_image(width: int, letters: int, most: float) -> Image.Image:
    """The colours of :func:`_heat` as a bar: 0 at the left, ``most``, 0.5 to 1, at the right."""
    from PIL import Image, ImageDraw

    font, gap = font_of_size(letters), max(2, letters // 3)
    image = Image.new("RGB", (width, 2 * letters + 3 * gap), "white")
    bar = _heat(np.broadcast_to(np.linspace(0, 1, width), (letters, width)))
    image.paste(Image.fromarray(bar), (0, gap))
    draw = ImageDraw.Draw(image)

    def at(share: float, anchor: str) -> None:
        place, top = share / most * (width - 1), 2 * gap + letters
        draw.line((place, gap + letters, place, top - 1), fill=_INK)
        draw.text((place, top), f"{100 * share:.0f} %", fill=_INK, font=font, anchor=anchor)

    at(0.0, "la")
    at(most, "ra")
    # Two figures and the space between them; the last one stands left of its place.
    apart = 1.5 * font.getlength("00 %") * most / width
    step = next((tenths for tenths in (1, 2) if tenths / 10 > apart), 9)
    for tenths in range(step, 10, step):
        if tenths / 10 < most - 1.2 * apart:
            at(tenths / 10, "ma")
    return image


def _with_ignored(
    classes: ClassSet, labels: Sequence[np.ndarray] | np.ndarray
) -> tuple[ClassSet, list[np.ndarray]]:
    """The labels with the first free id, drawn black, for ignored pixels, and classes for them.

    Negative or large ids have no colour.
    """
    free, found = len(classes), []
    for each in labels:
        ids = each.astype(np.int32)
        ids[each == classes.ignore_index] = free
        found.append(ids)
    return replace(classes, ignore_index=free), found


def _fitted(shape: Sequence[int], side: int) -> tuple[int, int]:
    height, width = shape
    factor = side / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _row(parts: Sequence[tuple[np.ndarray, str]], letters: int = 12) -> Image.Image:
    """Pictures of one size side by side, each below its title, cut where it is too long."""
    from PIL import Image, ImageDraw

    head, font = letters * 5 // 3, font_of_size(letters)
    height, width = parts[0][0].shape[:2]
    step = width + _GAP
    image = Image.new("RGB", (len(parts) * step - _GAP, height + head), "white")
    draw = ImageDraw.Draw(image)
    for i, (part, title) in enumerate(parts):
        while title and font.getlength(title) > width - 2:
            title = title.removesuffix("…")[:-1] + "…" if len(title) > 2 else ""
        draw.text((i * step + 2, head // 2), title, fill=_INK, font=font, anchor="lm")
        image.paste(Image.fromarray(part), (i * step, head))
    return image


def _entries(
    classes: ClassSet, labels: Sequence[np.ndarray], unpainted: Sequence[int] | None = None
) -> list[LegendEntry]:
    """Of the classes in labels of :func:`_with_ignored`, in the order of the ids."""
    kept = unpainted_ids(classes, unpainted)
    counts = sum(np.bincount(each.ravel(), minlength=len(classes) + 1) for each in labels)
    entries = []
    for index in np.flatnonzero(counts).tolist():
        if index == len(classes):
            entries.append(LegendEntry("ignored", (0, 0, 0)))
        else:
            colour = None if index in kept else classes.palette[index]
            entries.append(LegendEntry(classes.classes[index], colour))
    return entries


def png_writer(image: Image.Image) -> Callable[[BinaryIO], object]:
    """Writes the picture into an open file."""
    # A panel of 1932x491 took 72 ms at level 1 and 194 ms at the default 6, for 1.05 and 0.96 MB.
    return lambda file: image.save(file, format="PNG", compress_level=1)
