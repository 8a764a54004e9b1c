"""A look at all photos and masks of a data set before training: everything wrong, at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from deeplab_fast.data.datasets.base import (
    LabelError,
    Sample,
    SegmentationDataset,
    bad_labels,
    describe_labels,
    value_counts,
)
from deeplab_fast.data.images import ImageReadError, exif_orientation

__all__ = ["DataError", "DataReport", "Problem", "check_dataset"]

# Lines of problems in an exception's message; the report has all of them.
_SHOWN = 50


class DataError(ValueError):
    """A data set with problems; ``report`` has all of them."""

    def __init__(self, message: str, report: DataReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, or with all together (``index`` -1, no ``path``).

    ``kind`` is "photo" or "mask" (cannot be read), "size" (photo and mask differ), "labels"
    (values that are no class), "empty" (every pixel is ignored) or "one class" (all masks hold the
    same one class, so there is nothing to learn and no mean IoU).
    """

    index: int
    kind: str
    path: str
    message: str


@dataclass(frozen=True)
class DataReport:
    """What :func:`check_dataset` found.

    ``pixels[c]`` counts the pixels of class c, ``images_of[c]`` are the indices of the samples that
    contain it (bootstrapping duplicates those of rare classes); samples with unreadable masks
    are in neither. ``ignored_values`` counts the ignored pixels by the value that the masks hold.
    ``notes`` are lines on what is odd and may be right.
    """

    name: str
    samples: int
    classes: tuple[str, ...]
    ignore_index: int
    problems: tuple[Problem, ...]
    pixels: tuple[int, ...]
    images_of: tuple[tuple[int, ...], ...]
    ignored_values: dict[int, int]
    notes: tuple[str, ...] = ()

    @property
    def ignored_pixels(self) -> int:
        """Number of ignored pixels."""
        return sum(self.ignored_values.values())

    @property
    def images(self) -> tuple[int, ...]:
        """Number of samples that contain each class."""
        return tuple(len(indices) for indices in self.images_of)

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes that no sample contains."""
        return tuple(
            name for name, count in zip(self.classes, self.pixels, strict=True) if not count
        )

    def bad(
        self, *, allow_empty: bool = False, allow_one_class: bool = False
    ) -> tuple[Problem, ...]:
        """The problems that forbid training; the arguments leave out those of that kind."""
        allowed = {"empty"} if allow_empty else set()
        allowed |= {"one class"} if allow_one_class else set()
        return tuple(p for p in self.problems if p.kind not in allowed)

    def raise_if_bad(self, *, allow_empty: bool = False, allow_one_class: bool = False) -> None:
        """Raises where there are problems; arguments as of :meth:`bad`.

        Raises:
            DataError: lists them; its ``report`` is this object.
        """
        bad = self.bad(allow_empty=allow_empty, allow_one_class=allow_one_class)
        if bad:
            lines = [problem.message for problem in bad[:_SHOWN]]
            if len(bad) > _SHOWN:
                lines.append(f"... and {len(bad) - _SHOWN} more")
            head = f"{self.name}: {len(bad)} problems in {self.samples} samples:"
            raise DataError("\n  ".join([head, *lines]), self)

    def table(self) -> str:
        """Pixels and images of every class as text."""
        total = sum(self.pixels) + self.ignored_pixels
        width = max(map(len, (*self.classes, "ignored")))
        lines = [f"{'class':<{width}}  {'pixels':>14}  {'share':>7}  {'images':>7}"]
        for name, count, images in zip(self.classes, self.pixels, self.images, strict=True):
            share = count / total if total else 0.0
            lines.append(f"{name:<{width}}  {count:>14}  {share:>7.2%}  {images:>7}")
        share = self.ignored_pixels / total if total else 0.0
        lines.append(f"{'ignored':<{width}}  {self.ignored_pixels:>14}  {share:>7.2%}")
        if self.ignored_values:
            lines.append(f"ignored, as the masks hold it: {describe_labels(self.ignored_values)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "samples": self.samples,
            "ignore_index": self.ignore_index,
            "ignored_pixels": self.ignored_pixels,
            "ignored_values": {str(value): n for value, n in self.ignored_values.items()},
            "notes": list(self.notes),
            "classes": [
                {"name": name, "pixels": pixels, "images": images}
                for name, pixels, images in zip(self.classes, self.pixels, self.images, strict=True)
            ],
            "problems": [vars(problem) for problem in self.problems],
        }


def check_dataset(
    dataset: SegmentationDataset, *, workers: int = 0, progress: bool = False
) -> DataReport:
    """Reads every photo and mask once and reports all that is wrong.

    Args:
        dataset: with its label map: values are judged after it.
        workers: processes that read.
        progress: a bar on stderr where that is a terminal.

    Raises:
        TypeError: something else than a ``SegmentationDataset``.
    """
    if not isinstance(dataset, SegmentationDataset):
        raise TypeError(
            f"check_dataset takes a SegmentationDataset, got {type(dataset).__name__}; give it the "
            "data set inside, without augmentation"
        )
    from tqdm import tqdm

    loader = DataLoader(_Checked(dataset), batch_size=None, num_workers=workers)
    problems: list[Problem] = []
    pixels = np.zeros(dataset.num_classes, dtype=np.int64)
    images_of: list[list[int]] = [[] for _ in range(dataset.num_classes)]
    ignored: Counter[int] = Counter()
    # Masks of class 0 and one ignored value, by that value.
    two_valued: Counter[int] = Counter()
    bar = tqdm(loader, unit="image", desc="checking", disable=None if progress else True)
    # Photos and masks that are tagged otherwise, where their sizes do not tell who is right.
    tagged: list[str] = []
    for index, result in enumerate(bar):
        found, counts, without, tags = result
        problems += [Problem(index, *parts) for parts in found]
        tagged += [tags] if tags else []
        if counts is not None:
            counts = np.asarray(counts)
            pixels += counts
            ignored.update(without)
            present = np.flatnonzero(counts)
            if len(without) == 1 and present.tolist() == [0]:
                two_valued.update(without.keys())
            for label in present:
                images_of[label].append(index)
    problems += _one_class(dataset, pixels, ignored)
    return DataReport(
        name=repr(dataset),
        samples=len(dataset),
        classes=dataset.classes.classes,
        ignore_index=dataset.ignore_index,
        problems=tuple(problems),
        pixels=tuple(pixels.tolist()),
        images_of=tuple(map(tuple, images_of)),
        ignored_values=dict(sorted(ignored.items())),
        notes=(*_notes(dataset, pixels, ignored, two_valued), *_tag_notes(tagged)),
    )


def _one_class(
    dataset: SegmentationDataset, pixels: np.ndarray, ignored: Mapping[int, int]
) -> list[Problem]:
    present = np.flatnonzero(pixels)
    if len(present) != 1 or dataset.num_classes < 2:
        return []
    text = (
        f"every labelled pixel of all masks is {dataset.classes.classes[present[0]]!r} (class "
        f"{present[0]}): there is nothing to tell apart"
    )
    if ignored:
        text += (
            f"; they also hold {describe_labels(ignored)}, which is ignored: if that is a class, "
            f"{_mapping_hint(dataset, ignored)}"
        )
    return [Problem(-1, "one class", "", text)]


def _mapping_hint(dataset: SegmentationDataset, ignored: Iterable[int]) -> str:
    if 0 <= dataset.ignore_index < dataset.num_classes:
        # Mapped to this class it would be ignored again.
        return (
            f"ignore another number than {dataset.ignore_index}, which is "
            f"{dataset.classes.classes[dataset.ignore_index]!r}: --ignore-index 255 (a data set's "
            "ignore_index)"
        )
    target = "1" if dataset.num_classes == 2 else "ID"
    raw = ",".join(f"{value}={target}" for value in sorted(ignored)[:3])
    return f"map it, --label-map {raw} (a data set's label_map)"


def _notes(
    dataset: SegmentationDataset,
    pixels: np.ndarray,
    ignored: Mapping[int, int],
    two_valued: Mapping[int, int],
) -> Iterator[str]:
    names = dataset.classes.classes
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    if absent and pixels.any():
        yield f"no mask has the class {', '.join(absent)}"
    named = dataset.label_map or {}
    unnamed = {v: n for v, n in ignored.items() if v not in named and v != dataset.ignore_index}
    if unnamed:
        yield (
            f"the masks hold {describe_labels(unnamed)}, which the label map does not name and "
            "which is ignored"
        )
    # Of two classes: a void border is seldom all that a mask has beside the background.
    if dataset.num_classes == 2 and pixels[1]:
        for value, masks in sorted(two_valued.items()):
            yield (
                f"{masks} of {len(dataset)} masks hold {names[0]!r} and {value} alone, and {value} "
                f"is ignored; if it is {names[1]!r} there, "
                f"{_mapping_hint(dataset, [value])}"
            )


def _tag_notes(tagged: Sequence[str]) -> Iterator[str]:
    if tagged:
        more = f", and {len(tagged) - _SHOWN} more" if len(tagged) > _SHOWN else ""
        yield (
            "each file is turned by its own EXIF orientation, and the sizes do not tell whether "
            f"mask and photo then agree: {', '.join(tagged[:_SHOWN])}{more}; store both as they "
            "are seen, without tags"
        )


class _Checked(Dataset[Any]):
    """What was found in each sample: ((kind, path, message), ...), pixels by class, and ignored
    pixels by the value that the mask holds, and orientations that may disagree, as text."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(
        self, index: int
    ) -> tuple[list[tuple[str, str, str]], Sequence[int] | None, dict[int, int], str]:
        dataset = self.dataset
        sample = dataset.samples[index]
        photo, mask = str(sample.image), str(sample.mask)
        found: list[tuple[str, str, str]] = []
        image = label = None
        try:
            image = dataset.image(index)
        except ImageReadError as error:
            found.append(("photo", photo, str(error)))
        try:
            raw = dataset.raw_label(index)
            label = dataset.mapped(index, raw)
        except LabelError as error:
            found.append(("labels", mask, str(error)))
        except ImageReadError as error:
            found.append(("mask", mask, str(error).replace("the image", "the mask", 1)))
        if label is None:
            return found, None, {}, ""
        tags = ""
        if image is not None and image.shape[:2] != label.shape:
            text = dataset.size_mismatch(index, image.shape[:2], label.shape)
            found.append(("size", mask, text))
        elif image is not None:
            tags = _unclear_tags(sample, square=label.shape[0] == label.shape[1])
        classes, ignore_index = dataset.num_classes, dataset.ignore_index
        wrong = bad_labels(label, classes, ignore_index)
        if wrong:
            found.append(
                (
                    "labels",
                    mask,
                    f"{mask}: {describe_labels(wrong)}, outside the classes 0..{classes - 1} and "
                    f"not ignore_index={ignore_index}",
                )
            )
        valid = label[(label != ignore_index) & (label >= 0) & (label < classes)]
        counts = np.bincount(valid, minlength=classes).tolist()
        if not valid.size and not wrong:
            found.append(("empty", mask, f"{mask}: every pixel is ignored"))
        return found, counts, value_counts(raw[label == ignore_index]), tags


def _unclear_tags(sample: Sample, *, square: bool) -> str:
    """Orientations of photo and mask that differ and that their equal sizes do not explain."""
    first, second = exif_orientation(sample.image), exif_orientation(sample.mask)
    # Only one of them had its sides exchanged, and they fit: it had to be.
    told_by_size = not square and (first < 5) is not (second < 5)
    if first == second or told_by_size:
        return ""
    return f"{sample.image} (orientation {first}) and {sample.mask} ({second})"
