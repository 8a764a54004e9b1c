"""Pairs of photo and mask, and the labels that the numbers of a mask stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deeplab_fast.data.classes import ClassSet
from deeplab_fast.data.datasets.colours import MaskColours, colour_ids, read_colours
from deeplab_fast.data.datasets.masks import read_mask
from deeplab_fast.data.images import exif_orientation, read_image

if TYPE_CHECKING:
    from torch.utils.data import ConcatDataset, Dataset

    _Dataset = Dataset[tuple[np.ndarray, np.ndarray]]
else:
    # DataLoader asks for the methods of its Dataset, not for the class, and the names of the data
    # sets stand in help texts, which are there before PyTorch is imported.
    _Dataset = object

__all__ = [
    "LabelError",
    "LabelledData",
    "Sample",
    "SegmentationDataset",
    "bad_labels",
    "describe_labels",
    "parse_label_map",
    "value_counts",
]


class LabelError(ValueError):
    """Labels that are no class: ``path`` of the mask and ``values``, pixels by value."""

    def __init__(self, path: str, values: Mapping[int, int], allowed: str) -> None:
        super().__init__(path, values, allowed)
        self.path = path
        self.values = dict(values)
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.path}: {describe_labels(self.values)}, {self.allowed}"


@dataclass(frozen=True)
class Sample:
    """A photo, its mask, and a name that tells it from the others."""

    name: str
    image: Path
    mask: Path


class LabelledData(Protocol):
    """What evaluation reads of a data set, whatever it is made of."""

    @property
    def classes(self) -> ClassSet:
        """Names and colours of the labels."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""

    @property
    def ignore_index(self) -> int:
        """The label that counts for nothing."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """A photo and its labels, arrays or tensors."""


class SegmentationDataset(_Dataset):
    """Pairs of photo and mask: ``dataset[i]`` is (uint8 [H, W, 3], uint8 or int32 [H, W]).

    A data set that is stored otherwise overrides :meth:`raw_label` or :meth:`image`.

    Args:
        samples: the pairs.
        classes: names and colours of the class ids. One class is told from the background: its
            labels are 1, those of the background 0, and ``self.classes`` has both.
        name, split: what the data set is called, for messages and reports.
        label_map: raw value of the mask -> class id or ``ignore_index``; None takes the values as
            they are. The raw value ``ignore_index`` stays what it is unless the map names it.
        unmapped: what a raw value becomes that the map does not name: "ignore", "error", or "keep",
            which leaves it as it is.
        ignore_index: None is the class set's, or 255 (65535 above 255 classes) where it has none.
        mask_colours: colours of the masks that stand for classes: by class name or id, (R, G, B) or
            several of them; "void" is what is ignored. Palette pictures are read by their
            palette's colours; arrays give their numbers all the same.
        unknown_colours: "error", or "ignore", which ignores pixels of any other colour.

    Attributes:
        num_classes: number of labels, of one class 2.
        outputs: logits of a model for these data: 1 for one class, else ``num_classes``.
        colours: class id or ``ignore_index`` by colour, None where masks hold numbers.
        notes: lines on how the data were found and split, where that was not told.
        split_here: whether ``split`` was made by name and seed, as the data have no parts.

    Raises:
        ValueError: a label map, ``ignore_index`` or colours that do not fit.
    """

    notes: tuple[str, ...] = ()
    split_here: bool = False

    def __init__(
        self,
        samples: Iterable[Sample],
        classes: ClassSet,
        *,
        name: str = "custom",
        split: str | None = None,
        label_map: Mapping[int, int] | None = None,
        unmapped: str = "ignore",
        ignore_index: int | None = None,
        mask_colours: MaskColours | None = None,
        unknown_colours: str = "error",
    ) -> None:
        if ignore_index is None:
            ignore_index = classes.ignore_index
        if ignore_index is None:
            ignore_index = 255 if len(classes) <= 255 else 65535
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise ValueError(f"ignore_index is {ignore_index!r}, expected an integer")
        if unmapped not in ("ignore", "error", "keep"):
            raise ValueError(f"unmapped is {unmapped!r}, expected 'ignore', 'error' or 'keep'")
        if unknown_colours not in ("error", "ignore"):
            raise ValueError(
                f"unknown_colours is {unknown_colours!r}, expected 'error' or 'ignore'"
            )
        self.samples = tuple(samples)
        self.outputs = len(classes)
        classes = classes.of_labels()
        self.classes = replace(classes, ignore_index=ignore_index)
        self.ignore_index = ignore_index
        self.name = name
        self.split = split
        self.unmapped = unmapped
        self.label_map = _checked_label_map(label_map, len(classes), ignore_index)
        self.unknown_colours = unknown_colours
        self.colours = (
            None
            if mask_colours is None
            else colour_ids(read_colours(mask_colours), classes, ignore_index)
        )
        fits = len(classes) <= 256 and 0 <= ignore_index <= 255
        self._dtype = np.dtype(np.uint8 if fits else np.int32)
        self._table, self._known = self._tables()

    @property
    def num_classes(self) -> int:
        """C, the number of labels."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The photo and its labels.

        Raises:
            ImageReadError: one of the files cannot be read.
            LabelError: a value that the label map does not name, with ``unmapped="error"``.
            ColourError: a colour that stands for nothing, with ``unknown_colours="error"``.
            ValueError: photo and mask of different size; names both files.
        """
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            raise ValueError(self.size_mismatch(index, image.shape[:2], label.shape))
        return image, label

    def __add__(
        self, other: Dataset[tuple[np.ndarray, np.ndarray]]
    ) -> ConcatDataset[tuple[np.ndarray, np.ndarray]]:
        from torch.utils.data import ConcatDataset

        return ConcatDataset([self, other])

    def image(self, index: int) -> np.ndarray:
        """The photo, uint8 RGB [H, W, 3]."""
        return read_image(self.samples[index].image)

    def raw_label(self, index: int) -> np.ndarray:
        """The mask as it is stored, of colours what they stand for, uint8 or int32 [H, W].

        Raises:
            ImageReadError: it cannot be read.
            ColourError: a colour that stands for nothing, with ``unknown_colours="error"``.
        """
        unknown = self.ignore_index if self.unknown_colours == "ignore" else None
        return read_mask(self.samples[index].mask, self.colours, unknown=unknown)

    def label(self, index: int) -> np.ndarray:
        """Class ids and ``ignore_index``, uint8 or int32 [H, W]."""
        return self.mapped(index, self.raw_label(index))

    def mapped(self, index: int, raw: np.ndarray) -> np.ndarray:
        """The labels that a sample's stored values stand for.

        Raises:
            LabelError: a value that the label map does not name, with ``unmapped="error"``.
        """
        if self.label_map is None:
            return raw
        if raw.dtype == np.uint8:
            known, mapped = self._known[raw], self._table[raw]
        else:
            values, inverse = np.unique(raw, return_inverse=True)
            pairs = [self._lookup(int(value)) for value in values]
            known = np.array([pair[0] for pair in pairs])[inverse].reshape(raw.shape)
            # Kept values may be any that the file holds.
            dtype = np.int32 if self.unmapped == "keep" else self._dtype
            mapped = np.array([pair[1] for pair in pairs], dtype)[inverse].reshape(raw.shape)
        if self.unmapped == "error" and not known.all():
            raise LabelError(
                str(self.samples[index].mask),
                value_counts(raw[~known]),
                f"which the label map of {self.name} does not name; add them to it, or "
                "unmapped='ignore' leaves them out",
            )
        return mapped

    def size_mismatch(self, index: int, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
        """The message for a photo and a mask of different (height, width)."""
        sample = self.samples[index]
        tags = exif_orientation(sample.image), exif_orientation(sample.mask)
        if tuple(image) == tuple(mask)[::-1] and (tags[0] < 5) is not (tags[1] < 5):
            turned, other = ("photo", sample.image, image), ("mask", sample.mask, mask)
            if tags[1] >= 5:
                turned, other = other, turned
            return (
                f"the {turned[0]} {turned[1]} is tagged with EXIF orientation {max(tags)} and so "
                f"is turned to {turned[2][1]}x{turned[2][0]} pixels; its {other[0]} {other[1]} is "
                f"not turned and has {other[2][1]}x{other[2][0]}, as the {turned[0]} is stored: "
                "store both as they are seen, without tags, or tag both"
            )
        return (
            f"{sample.image} has {image[1]}x{image[0]} pixels and its mask {sample.mask} "
            f"{mask[1]}x{mask[0]}; they must be the same picture at the same size"
        )

    def select(self, indices: Iterable[int]) -> SegmentationDataset:
        """The same data set with these samples, in this order; an index may occur repeatedly."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.samples = tuple(self.samples[index] for index in indices)
        return other

    def __repr__(self) -> str:
        split = f", {self.split}" if self.split else ""
        return f"{self.name}({len(self)} samples{split}, {self.num_classes} classes)"

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = [self._lookup(value) for value in range(256)] if self.label_map else []
        table = np.array([pair[1] for pair in pairs], dtype=self._dtype)
        return table, np.array([pair[0] for pair in pairs], dtype=bool)

    def _lookup(self, raw: int) -> tuple[bool, int]:
        label_map = self.label_map or {}
        if raw in label_map:
            return True, label_map[raw]
        if self.unmapped == "keep":
            return True, raw
        return raw == self.ignore_index, self.ignore_index


def bad_labels(label: np.ndarray, num_classes: int, ignore_index: int) -> dict[int, int]:
    """Values outside [0, num_classes) that are not ``ignore_index``, with their pixel counts.

    Args:
        label: integers of any shape.
    """
    if label.dtype == np.uint8:
        allowed = np.zeros(256, dtype=bool)
        allowed[:num_classes] = True
        if 0 <= ignore_index <= 255:
            allowed[ignore_index] = True
        good = allowed[label]
    else:
        good = ((label >= 0) & (label < num_classes)) | (label == ignore_index)
    return {} if good.all() else value_counts(label[~good])


def describe_labels(values: Mapping[int, int]) -> str:
    """ "label 21 (3 pixels), label 40 (1 pixel)", the first ten."""
    parts = [
        f"label {value} ({count} pixel{'s' if count != 1 else ''})"
        for value, count in sorted(values.items())[:10]
    ]
    more = [f"{len(values) - 10} more values"] if len(values) > 10 else []
    return ", ".join(parts + more)


def parse_label_map(text: str) -> dict[int, int]:
    """The label map that "255=1,7=0" writes: raw value = class id or ``ignore_index``, ....

    Raises:
        ValueError: text that is not of this form, or names a value twice.
    """
    pairs = [part.split("=") for part in text.split(",") if part.strip()]
    try:
        found = [(int(raw), int(label)) for raw, label in pairs]
    except ValueError:
        found = []
    if not found or len(dict(found)) < len(found):
        raise ValueError(
            f"--label-map is {text!r}, expected raw value = class id, each value once: 255=1,7=0"
        )
    return dict(found)


def value_counts(values: np.ndarray) -> dict[int, int]:
    """Pixels by value of integers of any shape."""
    if values.dtype == np.uint8:
        found = np.bincount(values.ravel(), minlength=256)
        return {value: int(found[value]) for value in np.flatnonzero(found).tolist()}
    unique, counts = np.unique(values, return_counts=True)
    return {int(value): int(count) for value, count in zip(unique, counts, strict=True)}


def _checked_label_map(
    label_map: Mapping[int, int] | None, num_classes: int, ignore_index: int
) -> dict[int, int] | None:
    if label_map is None:
        return None
    try:
        checked = {int(raw): int(label) for raw, label in label_map.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"label_map is {label_map!r}, expected a mapping of raw value to class id"
        ) from error
    wrong = {
        raw: label
        for raw, label in checked.items()
        if not 0 <= label < num_classes and label != ignore_index
    }
    if wrong or not checked:
        raise ValueError(
            f"--label-map sends {', '.join(f'{a} to {b}' for a, b in wrong.items()) or 'nothing'}; "
            f"expected class ids 0..{num_classes - 1} or ignore_index={ignore_index}"
        )
    return checked
