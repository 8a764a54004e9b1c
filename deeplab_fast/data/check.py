"""A look at all photos and masks of a data set before training: everything wrong, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from deeplab_fast.data.datasets import (
    LabelError,
    SegmentationDataset,
    bad_labels,
    describe_labels,
)
from deeplab_fast.data.images import ImageReadError

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
    """What is wrong with one file.

    ``kind`` is "photo" or "mask" (cannot be read), "size" (photo and mask differ), "labels"
    (values that are no class) or "empty" (every pixel is ignored).
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
    are in neither.
    """

    name: str
    samples: int
    classes: tuple[str, ...]
    ignore_index: int
    problems: tuple[Problem, ...]
    pixels: tuple[int, ...]
    images_of: tuple[tuple[int, ...], ...]
    ignored_pixels: int

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

    def bad(self, *, allow_empty: bool = False) -> tuple[Problem, ...]:
        """The problems that forbid training; ``allow_empty`` leaves out empty masks."""
        return tuple(p for p in self.problems if not (allow_empty and p.kind == "empty"))

    def raise_if_bad(self, *, allow_empty: bool = False) -> None:
        """Raises where there are problems.

        Raises:
            DataError: lists them; its ``report`` is this object.
        """
        bad = self.bad(allow_empty=allow_empty)
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
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "samples": self.samples,
            "ignore_index": self.ignore_index,
            "ignored_pixels": self.ignored_pixels,
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
    ignored = 0
    bar = tqdm(loader, unit="image", desc="checking", disable=None if progress else True)
    for index, result in enumerate(bar):
        found, counts, without = result
        problems += [Problem(index, *parts) for parts in found]
        if counts is not None:
            counts = np.asarray(counts)
            pixels += counts
            ignored += without
            for label in np.flatnonzero(counts):
                images_of[label].append(index)
    return DataReport(
        name=repr(dataset),
        samples=len(dataset),
        classes=dataset.classes.classes,
        ignore_index=dataset.ignore_index,
        problems=tuple(problems),
        pixels=tuple(pixels.tolist()),
        images_of=tuple(map(tuple, images_of)),
        ignored_pixels=ignored,
    )


class _Checked(Dataset[Any]):
    """What was found in each sample: ((kind, path, message), ...), counts by class, ignored."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(
        self, index: int
    ) -> tuple[list[tuple[str, str, str]], Sequence[int] | None, int]:
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
            label = dataset.label(index)
        except LabelError as error:
            found.append(("labels", mask, str(error)))
        except ImageReadError as error:
            found.append(("mask", mask, str(error).replace("the image", "the mask", 1)))
        if label is None:
            return found, None, 0
        if image is not None and image.shape[:2] != label.shape:
            text = dataset.size_mismatch(index, image.shape[:2], label.shape)
            found.append(("size", mask, text))
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
        return found, counts, int((label == ignore_index).sum())
