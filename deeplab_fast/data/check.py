"""A look at all photos and masks of a data set before training: everything wrong, at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from deeplab_fast.data.classes import Colour
from deeplab_fast.data.datasets.base import (
    LabelError,
    Sample,
    SegmentationDataset,
    bad_labels,
    describe_labels,
    value_counts,
)
from deeplab_fast.data.datasets.colours import colour_file
from deeplab_fast.data.datasets.masks import ColourError
from deeplab_fast.data.images import ImageReadError, exif_orientation

__all__ = [
    "DataError",
    "DataReport",
    "Finding",
    "Problem",
    "check_dataset",
    "findings",
    "grouped",
    "problem_text",
    "read_sample",
    "report_of",
]

# Lines in an exception's message, and files with unclear tags; the report has all of them.
_SHOWN = 50

# Files that a line on several names.
_FILES_SHOWN = 3

# Values or colours of which each gets a line.
_VALUES_SHOWN = 6

Value = int | Colour


class DataError(ValueError):
    """A data set with problems; ``report`` has all of them."""

    def __init__(self, message: str, report: DataReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file, or with all together (``index`` -1, no ``path``).

    ``kind`` is "photo" or "mask" (cannot be read), "size" (photo and mask differ), "labels"
    (values that are no class), "colours" (the same of colours), "empty" (every pixel is ignored) or
    "one class" (all masks hold the same one class, so there is nothing to learn and no mean IoU).
    ``values`` counts the pixels of each value or colour (R, G, B) that is no class. ``message``
    says it whole, ``reason`` without the file and these values.
    """

    index: int
    kind: str
    path: str
    message: str
    reason: str = ""
    values: Mapping[Any, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What one sample holds.

    ``pixels`` counts those of each class id that occurs, None where the mask cannot be read;
    ``ignored`` the ignored ones by the value that the mask holds; ``tags`` says which orientations
    may disagree. ``problems`` have the index of the sample.
    """

    problems: tuple[Problem, ...] = ()
    pixels: Mapping[int, int] | None = None
    ignored: Mapping[int, int] = field(default_factory=dict)
    tags: str = ""


@dataclass(frozen=True)
class DataReport:
    """What :func:`check_dataset` found.

    ``pixels[c]`` counts the pixels of class c, ``images_of[c]`` are the indices of the samples that
    contain it (bootstrapping duplicates those of rare classes); samples with unreadable masks
    are in neither. ``ignored_values`` counts the ignored pixels by the value that the masks hold.
    ``notes`` are lines on what is odd and may be right, ``hints`` on what may be meant by values
    that are no class.
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
    hints: tuple[str, ...] = ()

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
            DataError: lists them, those that are alike in one line, with hints; its ``report`` is
                this object.
        """
        bad = self.bad(allow_empty=allow_empty, allow_one_class=allow_one_class)
        if bad:
            raise DataError(problem_text([(self, bad)]), self)

    def count(self, bad: Sequence[Problem]) -> str:
        """ "3 problems in 2 of 41 samples"."""
        samples = len({problem.index for problem in bad if problem.index >= 0})
        problems = f"{len(bad)} problem{'' if len(bad) == 1 else 's'}"
        return f"{problems} in {samples} of {self.samples} samples" if samples else problems

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
            "hints": list(self.hints),
            "problems": [
                vars(problem)
                | {"values": {_value_text(value): n for value, n in problem.values.items()}}
                for problem in self.problems
            ],
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
    return report_of(dataset, findings(dataset, workers=workers, progress=progress))


def findings(
    dataset: SegmentationDataset,
    indices: Sequence[int] | None = None,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[Finding]:
    """:func:`read_sample` of these samples, of all without, in this order."""
    from tqdm import tqdm

    indices = range(len(dataset)) if indices is None else indices
    loader = DataLoader(_Checked(dataset, indices), batch_size=None, num_workers=workers)
    yield from tqdm(loader, unit="image", desc="checking", disable=None if progress else True)


def report_of(dataset: SegmentationDataset, found: Iterable[Finding]) -> DataReport:
    """The report on a data set from the findings of all of its samples, in their order."""
    problems: list[Problem] = []
    pixels = np.zeros(dataset.num_classes, dtype=np.int64)
    images_of: list[list[int]] = [[] for _ in range(dataset.num_classes)]
    ignored: Counter[int] = Counter()
    # Masks of class 0 and one ignored value, by that value.
    two_valued: Counter[int] = Counter()
    # Photos and masks that are tagged otherwise, where their sizes do not tell who is right.
    tagged: list[str] = []
    for index, finding in enumerate(found):
        problems += finding.problems
        tagged += [finding.tags] if finding.tags else []
        if finding.pixels is not None:
            ignored.update(finding.ignored)
            if len(finding.ignored) == 1 and set(finding.pixels) == {0}:
                two_valued.update(finding.ignored.keys())
            for label, count in sorted(finding.pixels.items()):
                pixels[label] += count
                images_of[label].append(index)
    # Values that are no class may be all but one of those that are meant.
    if not any(problem.values for problem in problems):
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
        hints=tuple(_hints(dataset, pixels, problems)),
    )


def problem_text(found: Sequence[tuple[DataReport, Sequence[Problem]]]) -> str:
    """Problems of one or several data sets as lines, those that are alike in one, with hints."""
    text: list[str] = []
    for report, bad in found:
        lines = grouped(bad)
        more = [f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
        shown = [*lines[:_SHOWN], *more]
        text.append("\n  ".join([f"{report.name}: {report.count(bad)}:", *shown]))
    hints = dict.fromkeys(hint for report, _ in found for hint in report.hints)
    text += [f"hint: {hint}" for hint in hints]
    if any(len(grouped(bad)) < len(bad) for _, bad in found):
        text.append("deeplab-fast check-data --verbose names every file")
    return "\n".join(text)


def grouped(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem, or for several that are alike: how many files, and the first three.

    Masks are alike that hold the same wrong values; where there are many such sets, masks that
    share a value.
    """
    groups: dict[Any, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(_likeness(problem), []).append(problem)
    lines: list[str] = []
    for kind in dict.fromkeys(problem.kind for problem in problems):
        alike = [group for key, group in groups.items() if key[0] == kind]
        if kind in ("labels", "colours") and len(alike) > _VALUES_SHOWN:
            lines += _by_value([problem for group in alike for problem in group])
        else:
            lines += [_group_line(group) for group in alike]
    return lines


def _likeness(problem: Problem) -> tuple[Any, ...]:
    if problem.values:
        return problem.kind, frozenset(problem.values)
    # Sizes and numbers of pixels differ from file to file.
    return problem.kind, re.sub(r"\d+", "#", problem.reason or problem.message)


def _group_line(group: Sequence[Problem]) -> str:
    first = group[0]
    if len(group) == 1:
        return first.message
    pixels: Counter[Value] = Counter()
    for problem in group:
        pixels.update(problem.values)
    what = "photos" if first.kind == "photo" else "masks"
    said = f"{_described(pixels)}, {first.reason}" if pixels else first.reason
    return f"{len(group)} {what}: {said}: {_files(group)}"


def _by_value(problems: Sequence[Problem]) -> list[str]:
    masks: dict[Value, list[Problem]] = {}
    for problem in problems:
        for value in problem.values:
            masks.setdefault(value, []).append(problem)
    frequent = sorted(masks, key=lambda value: (-len(masks[value]), value))
    lines = []
    for value in frequent[:_VALUES_SHOWN]:
        pixels = sum(problem.values[value] for problem in masks[value])
        said = f"{_described({value: pixels})}, {problems[0].reason}"
        lines.append(f"{len(masks[value])} masks: {said}: {_files(masks[value])}")
    rest = frequent[_VALUES_SHOWN:]
    if rest:
        what = "labels" if problems[0].kind == "labels" else "colours"
        count = len({problem.index for value in rest for problem in masks[value]})
        lines.append(f"{count} masks: {len(rest)} other {what} that are no class")
    return lines


def _files(group: Sequence[Problem]) -> str:
    shown = ", ".join(problem.path for problem in group[:_FILES_SHOWN])
    more = len(group) - _FILES_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def _described(values: Mapping[Any, int]) -> str:
    """Values or colours with their pixels."""
    if all(isinstance(value, int) for value in values):
        return describe_labels(values)
    frequent = sorted(values, key=lambda colour: (-values[colour], colour))
    parts = [
        f"colour {colour[0]} {colour[1]} {colour[2]} ({values[colour]} "
        f"pixel{'' if values[colour] == 1 else 's'})"
        for colour in frequent[:_VALUES_SHOWN]
    ]
    rest = len(values) - _VALUES_SHOWN
    return " and ".join([*parts, *([f"{rest} more colours"] if rest > 0 else [])])


def _value_text(value: Value) -> str:
    return str(value) if isinstance(value, int) else " ".join(map(str, value))


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
    values = sorted(ignored)
    if values == [255] and dataset.num_classes > 2:
        return "map it, --label-map 255=1 with --classes 1: one class beside the background"
    target = "1" if dataset.num_classes == 2 else "ID"
    raw = ",".join(f"{value}={target}" for value in values[:3])
    return f"map it, --label-map {raw} (a data set's label_map)"


def _hints(
    dataset: SegmentationDataset, pixels: np.ndarray, problems: Sequence[Problem]
) -> Iterator[str]:
    """What may be meant by values and colours that are no class."""
    masks: Counter[int] = Counter()
    colours: Counter[Colour] = Counter()
    for problem in problems:
        for value, count in problem.values.items():
            if isinstance(value, int):
                masks[value] += 1
            else:
                colours[value] += count
    good = np.flatnonzero(pixels).tolist()
    painted = [p for p in problems if p.kind == "mask" and "--mask-colours" in p.reason]
    if painted and (found := colour_file(Path(painted[0].path).parent)) is not None:
        yield f"{found} may name the colours of the masks: --mask-colours {found}"
    if masks:
        yield from _label_hints(dataset, good, masks)
    if colours:
        yield from _colour_hints(dataset, colours)


def _label_hints(
    dataset: SegmentationDataset, good: Sequence[int], masks: Mapping[int, int]
) -> Iterator[str]:
    count, wrong = dataset.num_classes, sorted(masks)
    shifted = ",".join(f"{label}={label - 1}" for label in range(1, count + 1))
    often = 2 * max(masks.values()) >= len(dataset)
    if wrong == [255] and set(good) <= {0}:
        yield (
            "masks of 0 and 255 alone are of one class beside the background: --classes 1 "
            "--label-map 255=1"
        )
    elif len(wrong) > _MANY_VALUES:
        yield (
            f"{len(wrong)} values that are no class: masks that were drawn or resized with "
            "smoothing, or grey photos in the place of masks; store the class numbers, resized "
            "by the nearest neighbour"
        )
    elif not often:
        return
    elif wrong == [count] and 0 not in good and dataset.outputs > 1:
        yield f"the labels begin at 1: --label-map {shifted}"
    elif wrong == [count]:
        yield (
            f"the masks hold 0..{count}: give {count + 1} classes (--classes); or, if {count} "
            f"counts for nothing, --ignore-index {count}; or, if 0 does and the classes begin at "
            f"1, --label-map 0={dataset.ignore_index},{shifted}"
        )
    elif len(wrong) == 1 and wrong != [count]:
        yield (
            f"most masks hold {wrong[0]} beside the classes: if it counts for nothing, "
            f"--ignore-index {wrong[0]}"
        )
    elif len(wrong) + len(good) == count:
        pairs = ",".join(f"{value}={label}" for label, value in enumerate(sorted([*good, *wrong])))
        yield (
            f"the masks hold {count} values, as many as there are classes: if they stand for the "
            f"classes in this order, --label-map {pairs}"
        )
    elif wrong[0] >= count and wrong[-1] < _MOST_CLASSES:
        yield f"if these are classes, name them all: the masks hold labels up to {wrong[-1]}"


# More wrong values are no forgotten classes.
_MANY_VALUES = 40
_MOST_CLASSES = 255


def _colour_hints(dataset: SegmentationDataset, colours: Mapping[Colour, int]) -> Iterator[str]:
    known = dataset.colours or {}
    names = dataset.classes.classes
    near = []
    frequent = sorted(colours, key=lambda colour: (-colours[colour], colour))
    for colour in frequent[:_VALUES_SHOWN]:
        nearest = min(known, key=lambda other: (_distance(colour, other), other))
        label = known[nearest]
        name = names[label] if 0 <= label < len(names) else "void"
        near.append(
            f"{_value_text(colour)} is nearest to {name} ({_value_text(nearest)}), "
            f"{max(abs(a - b) for a, b in zip(colour, nearest, strict=True))} of 255 away"
        )
    yield "; ".join(near)
    if len(colours) > _MANY_VALUES:
        yield (
            f"{len(colours)} colours that are no class: masks that were drawn or resized with "
            "smoothing, or stored in a format that changes colours; --unknown-colours ignore "
            "leaves such pixels out"
        )
    else:
        yield (
            "add them to the file of --mask-colours, those that count for nothing as void; "
            "--unknown-colours ignore leaves all other colours out"
        )


def _distance(one: Colour, other: Colour) -> int:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


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
    """The findings of samples."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Finding:
        return read_sample(self.dataset, self.indices[index])


def read_sample(dataset: SegmentationDataset, index: int) -> Finding:
    """What a sample holds and what is wrong with it; reads photo and mask."""
    sample = dataset.samples[index]
    photo, mask = str(sample.image), str(sample.mask)
    found: list[Problem] = []
    image = label = None
    try:
        image = dataset.image(index)
    except ImageReadError as error:
        reason = f"cannot read the image: {error.reason}"
        found.append(Problem(index, "photo", photo, str(error), reason))
    try:
        raw = dataset.raw_label(index)
        label = dataset.mapped(index, raw)
    except LabelError as error:
        found.append(Problem(index, "labels", mask, str(error), error.allowed, error.values))
    except ColourError as error:
        reason = f"to which --mask-colours gives no class{error.cure}"
        text = f"{mask}: {_described(error.colours)}, {reason}"
        found.append(Problem(index, "colours", mask, text, reason, error.colours))
    except ImageReadError as error:
        reason = f"cannot read the mask: {error.reason}"
        text = str(error).replace("the image", "the mask", 1)
        found.append(Problem(index, "mask", mask, text, reason))
    if label is None:
        return Finding(tuple(found))
    tags = ""
    if image is not None and image.shape[:2] != label.shape:
        text = dataset.size_mismatch(index, image.shape[:2], label.shape)
        (height, width), (mask_height, mask_width) = image.shape[:2], label.shape
        reason = f"{mask_width}x{mask_height} pixels, and the photo {width}x{height}, in the first"
        found.append(Problem(index, "size", mask, text, reason))
    elif image is not None:
        tags = _unclear_tags(sample, square=label.shape[0] == label.shape[1])
    classes, ignore_index = dataset.num_classes, dataset.ignore_index
    wrong = bad_labels(label, classes, ignore_index)
    if wrong:
        reason = (
            f"outside the classes 0..{classes - 1} and not the ignored label {ignore_index} "
            "(--ignore-index)"
        )
        text = f"{mask}: {describe_labels(wrong)}, {reason}"
        found.append(Problem(index, "labels", mask, text, reason, wrong))
    valid = label[(label != ignore_index) & (label >= 0) & (label < classes)]
    if not valid.size and not wrong:
        reason = "every pixel is ignored"
        found.append(Problem(index, "empty", mask, f"{mask}: {reason}", reason))
    ignored = value_counts(raw[label == ignore_index])
    return Finding(tuple(found), value_counts(valid), ignored, tags)


def _unclear_tags(sample: Sample, *, square: bool) -> str:
    """Orientations of photo and mask that differ and that their equal sizes do not explain."""
    first, second = exif_orientation(sample.image), exif_orientation(sample.mask)
    # Only one of them had its sides exchanged, and they fit: it had to be.
    told_by_size = not square and (first < 5) is not (second < 5)
    if first == second or told_by_size:
        return ""
    return f"{sample.image} (orientation {first}) and {sample.mask} ({second})"
