"""The files of one prediction: label map, overlay on the photo, class areas."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from deeplab_fast.data.classes import ClassSet, pascal_colour_map
from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine.legend import LegendEntry, legend_image, stacked

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "OUTPUTS",
    "USUAL_OUTPUTS",
    "check_outputs",
    "class_areas",
    "output_paths",
    "overlay",
    "overlay_legend",
    "unpainted_ids",
    "write_outputs",
]

OUTPUTS = {
    "labels": "_labels.png",
    "overlay": "_overlay.png",
    "probabilities": "_probabilities.png",
    "json": ".json",
}
"""Kinds of files for one photo, and what follows its name in theirs."""

USUAL_OUTPUTS = ("labels", "overlay", "json")

# Rows worked on at a time: bounds the temporaries of a photo of any size.
_BAND = 256
# Neither in a palette nor a colour of skin, sky or vegetation; thin enough to need no blending.
_BOUNDARY = np.array((255, 255, 255), dtype=np.uint8)


def output_paths(output_dir: str | os.PathLike[str], stem: str) -> dict[str, Path]:
    """Where :func:`write_outputs` puts its files, by kind (:data:`OUTPUTS`)."""
    folder = Path(output_dir)
    return {kind: folder / f"{stem}{end}" for kind, end in OUTPUTS.items()}


def write_outputs(
    output_dir: str | os.PathLike[str],
    stem: str,
    image: np.ndarray,
    labels: np.ndarray,
    classes: ClassSet,
    *,
    source: str | os.PathLike[str] | None = None,
    model: str | None = None,
    backend: str | None = None,
    not_finite: int = 0,
    alpha: float = 0.5,
    unpainted: Sequence[int] | None = None,
    legend: bool = True,
    outputs: Collection[str] = USUAL_OUTPUTS,
    probabilities: np.ndarray | None = None,
    facts: Mapping[str, object] | None = None,
) -> dict[str, Path]:
    """Writes ``<stem>_labels.png``, ``<stem>_overlay.png``, ``<stem>_probabilities.png`` and
    ``<stem>.json``, or some of them.

    The label map holds the class ids without loss: a palette PNG up to 256 classes
    (``numpy.asarray(PIL.Image.open(f))`` gives them back), 16-bit grey above. The overlay is
    :func:`overlay` with :func:`overlay_legend` below it. The JSON object has ``image`` (``source``
    as given), ``width`` and ``height`` in pixels, what ``facts`` has, ``model``, ``backend``,
    ``class_set``, ``not_finite_pixels``, and ``classes``: of every class that occurs its ``id``,
    ``name``, ``pixels`` and ``fraction`` (0 to 1) of the photo, the largest first.

    The probabilities are a 16-bit grey PNG: ``numpy.asarray(PIL.Image.open(f)) / 65535`` is within
    1/131070 of the chosen class's probability, of one class of its own; 0 where it is not finite.

    All files are complete before the first gets its name, and the JSON gets its name last.

    Args:
        output_dir: made if it is missing.
        stem: file name without suffix.
        image: uint8 [H, W, 3].
        labels: integers [H, W].
        classes: names and colours.
        source, model, backend: told in the JSON.
        not_finite: pixels whose logits are NaN or infinite, told in the JSON: their labels mean
            nothing.
        alpha, unpainted: see :func:`overlay`.
        legend: False leaves it out: the overlay has the photo's size.
        outputs: which files, of :data:`OUTPUTS`.
        probabilities: floats [H, W] in 0..1, where they are among these.
        facts: more for the JSON.

    Returns:
        The paths of what was written by kind, as :func:`output_paths`.

    Raises:
        ValueError: shapes that do not fit, labels that are no class, a stem that is no file name.
        OSError: the files cannot be written; none is left half-written.
    """
    if not stem or stem in (".", "..") or Path(stem).name != stem:
        raise ValueError(f"stem is {stem!r}, expected a file name without folders")
    _check_labels(image, labels, classes)
    check_outputs(outputs)
    paths = {k: path for k, path in output_paths(output_dir, stem).items() if k in outputs}
    writers: dict[str, Callable[[BinaryIO], object]] = {}
    if "labels" in outputs:
        label_image = _label_image(labels, classes)
        writers["labels"] = lambda file: label_image.save(file, format="PNG")
    if "overlay" in outputs:
        overlay_image = _image(overlay(image, labels, classes, alpha=alpha, unpainted=unpainted))
        if legend:
            below = overlay_legend(labels, classes, labels.shape[1], unpainted=unpainted)
            overlay_image = stacked([overlay_image, below])
        # A 2048x2732 overlay took 0.28 s at level 1 and 0.72 s at the default 6, for 2.1 and
        # 1.7 MB.
        writers["overlay"] = lambda file: overlay_image.save(file, format="PNG", compress_level=1)
    if "probabilities" in outputs:
        levels = _probability_levels(probabilities, labels)
        writers["probabilities"] = lambda file: _image(levels).save(
            file, format="PNG", compress_level=1
        )
    if "json" in outputs:
        height, width = labels.shape
        content = {
            "image": None if source is None else os.fspath(source),
            "width": width,
            "height": height,
            **(facts or {}),
            "model": model,
            "backend": backend,
            "class_set": classes.name,
            "not_finite_pixels": not_finite,
            "classes": class_areas(labels, classes),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # Bytes of a file's name that are no text are JSON's \udcXX, which Python gives back.
        writers["json"] = lambda file: file.write(text.encode("utf-8", "backslashreplace"))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_atomically([(paths[kind], write) for kind, write in writers.items()])
    return paths


def check_outputs(outputs: Collection[str]) -> None:
    """Raises ValueError for kinds of files that there are not, or none."""
    unknown = [kind for kind in outputs if kind not in OUTPUTS]
    if unknown or not outputs:
        raise ValueError(
            f"outputs are {', '.join(map(str, outputs)) or 'none'}; expected one or more of "
            f"{', '.join(OUTPUTS)}"
        )


def _probability_levels(probabilities: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
    if probabilities is None or probabilities.shape != labels.shape:
        got = "missing" if probabilities is None else f"of shape {list(probabilities.shape)}"
        raise ValueError(
            f"the probabilities are {got}, expected floats {list(labels.shape)}, as "
            "predict(..., return_prob=True) gives them"
        )
    levels = np.empty(labels.shape, dtype=np.uint16)
    for top in range(0, labels.shape[0], _BAND):
        rows = slice(top, top + _BAND)
        levels[rows] = np.rint(np.nan_to_num(probabilities[rows], nan=0.0).clip(0, 1) * 65535)
    return levels


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    classes: ClassSet,
    *,
    alpha: float = 0.5,
    unpainted: Sequence[int] | None = None,
) -> np.ndarray:
    """The photo under the class colours: ``(1 - alpha) * image + alpha * colour``, uint8 [H, W, 3].

    A white line of one pixel runs along every boundary between two classes.

    Args:
        image: uint8 [H, W, 3].
        labels: integers [H, W].
        classes: names and colours.
        alpha: 0 (photo) to 1 (colours).
        unpainted: ids of classes whose pixels keep the photo; None: ``classes.background``, which
            is the class named background, unlabelled or void (of one class, all but it); ``()``:
            every class is painted.

    Raises:
        ValueError: shapes that do not fit, labels that are no class, alpha outside 0..1, ids that
            are no class.
    """
    _check_labels(image, labels, classes)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}, expected 0 (photo) to 1 (colours)")
    # Fixed point: 256 steps of alpha are finer than the result's levels at the ends 0 and 1.
    mix = round(alpha * 256)
    weights = np.full(_table_length(classes), mix, dtype=np.uint16)
    weights[unpainted_ids(classes, unpainted)] = 0
    colours = _colour_table(classes).astype(np.uint16)
    tint = colours * weights[:, None]
    result = np.empty_like(image)
    for top in range(0, labels.shape[0], _BAND):
        rows = slice(top, top + _BAND)
        band = labels[rows]
        kept = (256 - weights)[band][:, :, None]
        result[rows] = (image[rows] * kept + tint[band] + 128) >> 8
    for mask, part in _boundaries(labels):
        result[part][mask] = _BOUNDARY
    return result


def overlay_legend(
    labels: np.ndarray,
    classes: ClassSet,
    width: int,
    *,
    unpainted: Sequence[int] | None = None,
    size: int | None = None,
) -> Image.Image:
    """The classes that occur and their shares, the largest first; an unpainted one has no colour.

    Args:
        labels: integers [H, W].
        classes: names and colours.
        width: of the picture in pixels; it is wider where a name needs that.
        unpainted: as for :func:`overlay`.
        size: of the letters; default: by the size of the labels, 12 to 64.
    """
    kept = unpainted_ids(classes, unpainted)
    entries = []
    for area in class_areas(labels, classes):
        index, name = area["id"], area["name"]
        colour = classes.palette[index] if index < len(classes) else (0, 0, 0)
        share = area["fraction"]
        text = f"{name} {share:.1%}" if share >= 0.0005 else f"{name} <0.1%"
        entries.append(LegendEntry(text, None if index in kept else colour))
    size = size or min(64, max(12, max(labels.shape) // 50))
    return legend_image(entries, width, size)


def unpainted_ids(classes: ClassSet, given: Sequence[int] | None) -> list[int]:
    """The ids that :func:`overlay` leaves unpainted; raises its ValueError."""
    if given is None:
        return [] if classes.background is None else [classes.background]
    wrong = [index for index in given if not 0 <= index < len(classes)]
    if wrong:
        raise ValueError(
            f"unpainted has the class {wrong[0]}, and the class set {classes.name} has the ids "
            f"0..{len(classes) - 1}"
        )
    return list(given)


def class_areas(labels: np.ndarray, classes: ClassSet) -> list[dict[str, Any]]:
    """``id``, ``name``, ``pixels`` and ``fraction`` (0..1) of each class present, largest first."""
    length = max(len(classes), int(labels.max()) + 1)
    # bincount makes an int64 copy of what it counts.
    counts = np.zeros(length, dtype=np.int64)
    for top in range(0, labels.shape[0], _BAND):
        counts += np.bincount(labels[top : top + _BAND].ravel(), minlength=length)
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda index: (-counts[index], index))
    return [
        {
            "id": index,
            "name": classes.classes[index] if index < len(classes) else "ignored",
            "pixels": int(counts[index]),
            "fraction": float(counts[index] / labels.size),
        }
        for index in order
    ]


def _check_labels(image: np.ndarray, labels: np.ndarray, classes: ClassSet) -> None:
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, expected integers [H,W]")
    if image.dtype != np.uint8 or image.shape != (*labels.shape, 3):
        raise ValueError(
            f"the image is {image.dtype} {list(image.shape)}, expected uint8 "
            f"{[*labels.shape, 3]} for labels of {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (high >= len(classes) and not _only_ignored_above(labels, classes)):
        raise ValueError(
            f"labels run from {low} to {high}, and the class set {classes.name} has "
            f"{len(classes)} classes (0..{len(classes) - 1}); pass the set the model was trained on"
        )


def _only_ignored_above(labels: np.ndarray, classes: ClassSet) -> bool:
    ignored = classes.ignore_index
    if ignored is None or ignored > 65535:
        return False
    return bool(((labels < len(classes)) | (labels == ignored)).all())


def _table_length(classes: ClassSet) -> int:
    ignored = -1 if classes.ignore_index is None else classes.ignore_index
    return max(len(classes), ignored + 1)


def _colour_table(classes: ClassSet) -> np.ndarray:
    table = np.zeros((_table_length(classes), 3), dtype=np.uint8)
    table[: len(classes)] = classes.palette
    return table


def _boundaries(labels: np.ndarray) -> Iterable[tuple[np.ndarray, tuple[slice, slice]]]:
    """Masks of the pixels whose right or lower neighbour has another label, and where they lie."""
    yield labels[:, 1:] != labels[:, :-1], (slice(None), slice(None, -1))
    yield labels[1:] != labels[:-1], (slice(None, -1), slice(None))


def _label_image(labels: np.ndarray, classes: ClassSet) -> Image.Image:
    high = int(labels.max())
    if len(classes) > 256 or high > 255:
        if high > 65535:
            raise ValueError(f"the largest label is {high}; a 16-bit PNG holds 0..65535")
        return _image(labels.astype(np.uint16))
    image = _image(labels.astype(np.uint8))
    palette = list(pascal_colour_map(256))
    palette[: len(classes)] = classes.palette
    image.putpalette([value for colour in palette for value in colour])
    return image


def _image(array: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(array)
