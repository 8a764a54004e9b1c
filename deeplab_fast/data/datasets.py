"""Photos with label maps on disk: the published data sets, folders of pairs, lists of pairs.

Every data set gives a photo as a uint8 RGB array [H, W, 3] and its labels as an array [H, W] of
class ids, uint8 where they fit (int32 above), with one value, ``ignore_index``, for pixels that
count for nothing. Masks are read as the numbers that the file holds: of a palette PNG the indices,
never its colours. Photo and mask are each turned by the EXIF orientation that its own file is
tagged with. File names are one in all forms of Unicode: macOS stores letters and accents apart.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from deeplab_fast.data.classes import ClassSet, class_set, generic_classes
from deeplab_fast.data.images import (
    IMAGE_SUFFIXES,
    ImageReadError,
    exif_orientation,
    load_upright,
    read_image,
)

__all__ = [
    "DATASETS",
    "LabelError",
    "Sample",
    "SegmentationDataset",
    "bad_labels",
    "open_dataset",
    "parse_label_map",
    "read_mask",
]

# Formats that keep every value; .npy and .mat hold arrays.
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".mat")
# Formats that change values (some have lossless forms, which the file name does not tell).
_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".jp2", ".avif")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
# As Pillow names TIFF's.
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")

# labels.py of the Cityscapes scripts: id of each of the 19 evaluated classes, by train id.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

# COCO's category ids of the VOC classes, by VOC class; 0 is background.
# fmt: off
_COCO_VOC_IDS = (
    0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72,
)
# fmt: on


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


class SegmentationDataset(Dataset[tuple[np.ndarray, np.ndarray]]):
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

    Attributes:
        num_classes: number of labels, of one class 2.
        outputs: logits of a model for these data: 1 for one class, else ``num_classes``.

    Raises:
        ValueError: a label map or ``ignore_index`` that does not fit.
    """

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
    ) -> None:
        if ignore_index is None:
            ignore_index = classes.ignore_index
        if ignore_index is None:
            ignore_index = 255 if len(classes) <= 255 else 65535
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise ValueError(f"ignore_index is {ignore_index!r}, expected an integer")
        if unmapped not in ("ignore", "error", "keep"):
            raise ValueError(f"unmapped is {unmapped!r}, expected 'ignore', 'error' or 'keep'")
        self.samples = tuple(samples)
        self.outputs = len(classes)
        classes = classes.of_labels()
        self.classes = replace(classes, ignore_index=ignore_index)
        self.ignore_index = ignore_index
        self.name = name
        self.split = split
        self.unmapped = unmapped
        self.label_map = _checked_label_map(label_map, len(classes), ignore_index)
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
            ValueError: photo and mask of different size; names both files.
        """
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            raise ValueError(self.size_mismatch(index, image.shape[:2], label.shape))
        return image, label

    def image(self, index: int) -> np.ndarray:
        """The photo, uint8 RGB [H, W, 3]."""
        return read_image(self.samples[index].image)

    def raw_label(self, index: int) -> np.ndarray:
        """The mask as it is stored, uint8 or int32 [H, W]."""
        return read_mask(self.samples[index].mask)

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
            f"label_map is {text!r}, expected raw value = class id, each value once: 255=1,7=0"
        )
    return dict(found)


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers that a mask file holds, [H, W], uint8, or int32 where they need it.

    Palette pictures give their indices; grey ones of 2 and 4 bits their stored values, which Pillow
    spreads over 0..255; colour ones of 8 bits whose three channels are equal, and opaque, that
    channel. A picture is turned by its EXIF orientation. ``.npy`` holds the array; ``.mat`` is
    SBD's form (needs scipy).

    Raises:
        ImageReadError: a file that is missing, damaged, lossy, in colour, partly transparent, or of
            floats; says which.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageReadError(str(path), error.strerror or str(error)) from error
    if path.is_dir():
        raise ImageReadError(str(path), "this is a folder")
    if size == 0:
        raise ImageReadError(str(path), "the file is empty (0 bytes)")
    reader = {".npy": _read_npy, ".mat": _read_sbd}.get(path.suffix.lower(), _read_picture)
    try:
        return reader(path)
    except ImageReadError:
        raise
    # Damaged files raise almost any exception type.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(str(path), reason) from error


def open_dataset(
    source: str | os.PathLike[str] | Mapping[str, Any],
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    *,
    classes: Any = None,
    label_map: Mapping[int, int] | None = None,
    unmapped: str | None = None,
    ignore_index: int | None = None,
    **options: Any,
) -> SegmentationDataset:
    """A data set by name.

    ========== ===================================================== ===========================
    name       files below ``root``                                  splits
    ========== ===================================================== ===========================
    voc        JPEGImages, SegmentationClass, ImageSets/Segmentation train, val, trainval,
               (also in VOC2012 or VOCdevkit/VOC2012)                trainaug
    cityscapes leftImg8bit, gtFine (\\*_labelIds.png)                 train, val, trainval
    ade20k     images, annotations (also in ADEChallengeData2016 or  train, val
               sampleData; without split folders all is val)
    camvid     train, trainannot, train.txt (all pairs without), ... train, val, test, trainval
    coco-voc   train2017, val2017, annotations/instances_*.json      train, val
               (needs pycocotools)
    folder     images, masks, files of the same stem                 subfolders of both, or none
    csv        a table with columns image, mask and, optional, split as the column says
    ========== ===================================================== ===========================

    ``trainaug`` of VOC takes SegmentationClassAug where it is there, otherwise SBD's .mat files
    (option ``sbd_root``, or a folder SBD, sbd or benchmark_RELEASE in ``root``; needs scipy):
    VOC train and all of SBD without VOC val, 10,582 images. ``coco-voc`` follows torchvision's
    recipe: pixels of overlapping instances are ignored, and train leaves out images with at most
    1000 pixels of the 20 classes. ``camvid`` takes ``sequences=("0001TP", ...)`` to choose by the
    start of the name. ``folder`` takes ``images`` and ``masks``, the names of the two folders.

    Args:
        source: one of these names; a .csv file; a .yaml, .yml or .json file, or a mapping, with
            the key ``name`` and any of the other arguments (``root`` is relative to the file).
            Arguments given beside it come first.
        root: the folder of the data; for csv what its paths are relative to (default: its folder).
        split: "val" unless given; all samples of a folder or csv.
        classes: as ``data.class_set`` takes, or a number; needed for folder and csv, otherwise the
            data set's own.
        label_map, unmapped, ignore_index: see :class:`SegmentationDataset`; instead of the data
            set's own.
        options: those named above.

    Raises:
        ValueError: an unknown name, split or option.
        FileNotFoundError: no such data below ``root``; says what was looked for and where.
    """
    given = {
        "root": root,
        "split": split,
        "classes": classes,
        "label_map": label_map,
        "unmapped": unmapped,
        "ignore_index": ignore_index,
        **options,
    }
    spec = {**_spec(source), **{key: value for key, value in given.items() if value is not None}}
    name = spec.pop("name", None)
    if name not in DATASETS:
        raise ValueError(
            f"no data set is named {name!r}; there are: {', '.join(DATASETS)}; or pass a .csv file "
            "of pairs, or a .yaml or .json file with name, root, split, classes, label_map"
        )
    layout = DATASETS[name]
    unknown = sorted(set(spec) - _COMMON - set(layout.options))
    if unknown:
        allowed = ", ".join(sorted({*_COMMON, *layout.options}))
        raise ValueError(f"{name}: unknown options {', '.join(unknown)}; allowed are {allowed}")
    root, split = spec.pop("root", None), spec.pop("split", None)
    if split is None:
        split = "val" if layout.splits else None
    elif layout.splits and split not in layout.splits:
        raise ValueError(f"{name}: split is {split!r}, expected {', '.join(layout.splits)}")
    if root is None and name != "csv":
        raise ValueError(f"{name}: root is missing: which folder holds {layout.holds}?")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(
            f"{name}: {root} is not a folder; root names the one that holds {layout.holds}"
        )
    known = layout.classes
    spec["classes"] = _classes(spec.pop("classes", None), known, name)
    return layout.open(None if root is None else Path(root), split, spec)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk: its opener, splits, options, classes, and what it consists of.

    ``splits`` is empty where the data say which there are.
    """

    open: Callable[[Any, Any, dict[str, Any]], SegmentationDataset]
    splits: tuple[str, ...]
    holds: str
    classes: str | None = None
    options: tuple[str, ...] = ()


_COMMON = frozenset({"root", "split", "classes", "label_map", "unmapped", "ignore_index"})


def _spec(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    text = os.fspath(source)
    if text in DATASETS:
        return {"name": text}
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".yaml", ".yml", ".json"):
        return {"name": text}
    if not path.is_file():
        raise FileNotFoundError(f"data set {text}: no such file")
    if suffix == ".csv":
        return {"name": "csv", "file": path}
    try:
        content = path.read_text(encoding="utf-8-sig")
        if suffix == ".json":
            spec = json.loads(content)
        else:
            import yaml

            spec = yaml.safe_load(content)
    except Exception as error:
        raise ValueError(f"data set {text}: {' '.join(str(error).split())}") from error
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ValueError(
            f"data set {text}: expected a mapping with the key name ({', '.join(DATASETS)}) and "
            "any of root, split, classes, label_map, unmapped, ignore_index"
        )
    spec = dict(spec)
    for key in ("root", "file", "sbd_root"):
        if isinstance(spec.get(key), str):
            spec[key] = path.parent / spec[key]
    return spec


def _classes(given: Any, own: str | None, name: str) -> ClassSet:
    if given is None and own is None:
        raise ValueError(
            f"{name}: classes is missing: pass a list of names, a number, a built-in set or a file "
            "of names"
        )
    if given is None:
        assert own is not None
        return class_set(own)
    if isinstance(given, int) and not isinstance(given, bool):
        return generic_classes(given)
    if isinstance(given, str) and given.isdecimal():
        return generic_classes(int(given))
    return class_set(given)


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
            f"label_map sends {', '.join(f'{a} to {b}' for a, b in wrong.items()) or 'nothing'}; "
            f"expected class ids 0..{num_classes - 1} or ignore_index={ignore_index}"
        )
    return checked


def value_counts(values: np.ndarray) -> dict[int, int]:
    """Pixels by value of integers of any shape."""
    if values.dtype == np.uint8:
        found = np.bincount(values.ravel(), minlength=256)
        return {value: int(found[value]) for value in np.flatnonzero(found).tolist()}
    unique, counts = np.unique(values, return_counts=True)
    return {int(value): int(count) for value, count in zip(unique, counts, strict=True)}


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        kind = image.format
        if kind == "TIFF" and image.info.get("compression") in _LOSSY_COMPRESSIONS:
            kind = f"TIFF with {image.info['compression']} compression"
        if kind != image.format or kind in _LOSSY_FORMATS:
            raise ImageReadError(
                str(path), f"{kind} does not keep class numbers; store masks as PNG"
            )
        mode = image.mode
        # Decoding empties the list of tiles, which alone tells the bits a pixel.
        tile = image.tile[0] if image.tile else None
        arguments = "" if tile is None else tile.args
        raw_mode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
        if kind == "PPM" and (mode == "1" or (tile is not None and tile.codec_name != "raw")):
            raise ImageReadError(
                str(path),
                "a PBM, or a PGM in text or with a largest value other than 255, whose numbers "
                "Pillow changes; store masks as PNG",
            )
        if mode == "F":
            raise ImageReadError(
                str(path), "float samples; a mask holds class numbers: store it with integers"
            )
        wide = "16" in raw_mode and not mode.startswith("I")
        if wide or mode not in (*_MASK_MODES, *_EQUAL_CHANNELS):
            bits = " of 16 bits a channel" if wide else ""
            # Pillow opens it as RGBA.
            grey = raw_mode.startswith("LA")
            what = "a grey picture with transparency" if grey else "a colour picture"
            said = "" if grey else f" (mode {mode})"
            raise ImageReadError(str(path), f"{what}{bits}{said}; {_ONE_CHANNEL}")
        load_upright(image)
        values = np.asarray(image)
    if mode in _EQUAL_CHANNELS:
        return _equal_channel(values, mode, path)
    if raw_mode in ("L;2", "L;4"):
        return values // (85 if raw_mode == "L;2" else 17)
    return _as_labels(values, path)


_MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")
# Modes of several channels that may hold one number in all of them.
_EQUAL_CHANNELS = ("RGB", "RGBA", "LA")
_ONE_CHANNEL = "a mask holds class numbers in one channel, grey or palette"


def _equal_channel(values: np.ndarray, mode: str, path: Path) -> np.ndarray:
    if mode != "RGB":
        clear = int((values[..., -1] != 255).sum())
        if clear:
            raise ImageReadError(
                str(path),
                f"{clear} pixels are transparent (mode {mode}), and whether their class numbers "
                "count is not told; store the mask without the alpha channel",
            )
        values = values[..., :-1]
    different = int((values != values[..., :1]).any(-1).sum())
    if different:
        raise ImageReadError(
            str(path),
            f"a colour picture (mode {mode}, red, green and blue differ in {different} pixels); "
            f"{_ONE_CHANNEL}",
        )
    return np.ascontiguousarray(values[..., 0])


def _read_npy(path: Path) -> np.ndarray:
    return _as_labels(np.load(path, allow_pickle=False), path)


def _read_sbd(path: Path) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImageReadError(
            str(path),
            "SBD's .mat files need scipy; install it, or use a SegmentationClassAug folder of PNGs",
        ) from error
    return _as_labels(loadmat(path)["GTcls"]["Segmentation"][0, 0], path)


def _as_labels(values: np.ndarray, path: Path) -> np.ndarray:
    if values.ndim != 2 or not values.size:
        raise ImageReadError(str(path), f"an array {list(values.shape)}, expected [H, W]")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.integer):
        raise ImageReadError(str(path), f"an array of {values.dtype}, expected integers")
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        raise ImageReadError(str(path), f"values from {values.min()} to {values.max()}")
    return values.astype(np.int32)


def _folder(name: str, root: Path, inside: Sequence[str], needed: Sequence[str]) -> Path:
    """The first of ``root / inside`` that holds all the folders ``needed``."""
    places = [root / place if place else root for place in inside]
    for place in places:
        if all((place / part).is_dir() for part in needed):
            return place
    raise FileNotFoundError(
        f"{name}: no data below {root}: looked for the folders {' and '.join(needed)} in "
        f"{', '.join(map(str, places))}"
    )


def _lines(name: str, path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: the list of images {path} is missing")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _nfc(name: str) -> str:
    """One form of a name that Unicode can write in several."""
    return unicodedata.normalize("NFC", name)


def _on_disk(path: Path, listings: dict[Path, dict[str, str]]) -> Path:
    """The file of this name in whichever form of Unicode it has; the path itself without one.

    ``listings`` keeps what was read of folders.
    """
    if os.fspath(path).isascii() or path.exists():
        return path
    folder = _on_disk(path.parent, listings)
    if folder not in listings:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        listings[folder] = {_nfc(name): name for name in names}
    return folder / listings[folder].get(_nfc(path.name), path.name)


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files by stem in NFC; where suffixes clash the one that ``suffixes`` names first."""
    rank = {suffix: i for i, suffix in enumerate(suffixes)}
    found: dict[str, Path] = {}
    if folder.is_dir():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            order = rank.get(path.suffix.lower())
            if order is None or path.name.startswith("."):
                continue
            have = found.get(_nfc(path.stem))
            if have is not None and have.stem != path.stem:
                raise ValueError(
                    f"{have} and {path} have the same name in two forms of Unicode; remove one"
                )
            if have is None or order < rank[have.suffix.lower()]:
                found[_nfc(path.stem)] = path
    return found


# A missing file stays in the list, under the name it should have: reading it names it, and
# check_dataset reports all of them at once. So does one of a format that masks cannot have.
def _listed(found: Mapping[str, Path], folder: Path, stem: str, suffix: str) -> Path:
    return found.get(_nfc(stem), folder / f"{stem}{suffix}")


def _masks(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Masks by stem, and with those that cannot be any where there is no other."""
    found = _by_stem(folder, MASK_SUFFIXES)
    return found, {**_by_stem(folder, _LOSSY_SUFFIXES), **found}


def _voc(root: Path, split: str, spec: dict[str, Any]) -> SegmentationDataset:
    inside = ("", "VOC2012", "VOCdevkit/VOC2012")
    base = _folder("voc", root, inside, ("JPEGImages", "SegmentationClass", "ImageSets"))
    sbd_root = spec.pop("sbd_root", None)
    lists = base / "ImageSets" / "Segmentation"
    photos, masks = base / "JPEGImages", base / "SegmentationClass"
    mask_of: dict[str, Path] = {}
    if split != "trainaug":
        names = _lines("voc", lists / f"{split}.txt")
    elif (augmented := base / "SegmentationClassAug").is_dir() and sbd_root is None:
        mask_of = _by_stem(augmented, (".png",))
        own_list = next((p for p in map(lists.joinpath, _TRAINAUG_LISTS) if p.is_file()), None)
        if own_list is not None:
            # Some lists hold "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png" a line.
            names = [Path(line.split()[0]).stem for line in _lines("voc", own_list)]
        else:
            names = sorted(set(mask_of) - set(map(_nfc, _lines("voc", lists / "val.txt"))))
        masks = augmented
    else:
        sbd = _sbd_folder(root, base, sbd_root)
        own = _lines("voc", lists / "train.txt")
        extra = {*_lines("voc", sbd / "train.txt"), *_lines("voc", sbd / "val.txt")}
        extra -= {*own, *_lines("voc", lists / "val.txt")}
        names = sorted({*own, *extra})
        mask_of = {_nfc(name): sbd / "cls" / f"{name}.mat" for name in extra}
    listings: dict[Path, dict[str, str]] = {}
    samples = [
        Sample(
            name,
            _on_disk(photos / f"{name}.jpg", listings),
            _on_disk(_listed(mask_of, masks, name, ".png"), listings),
        )
        for name in names
    ]
    return SegmentationDataset(samples, name="voc", split=split, **spec)


_TRAINAUG_LISTS = ("trainaug.txt", "train_aug.txt")


def _sbd_folder(root: Path, base: Path, sbd_root: Any) -> Path:
    roots = [Path(sbd_root)] if sbd_root is not None else []
    if not roots:
        roots = [root / part for part in ("SBD", "sbd", "benchmark_RELEASE")]
    places = [
        place / inside for place in roots for inside in ("", "dataset", "benchmark_RELEASE/dataset")
    ]
    for place in places:
        if (place / "cls").is_dir():
            return place
    raise FileNotFoundError(
        f"voc: trainaug needs the masks of SBD: looked for the folder {base}/SegmentationClassAug "
        f"(PNG), and for the folder cls (.mat) in {', '.join(map(str, places))}; sbd_root names "
        "another place"
    )


def _cityscapes(root: Path, split: str, spec: dict[str, Any]) -> SegmentationDataset:
    base = _folder("cityscapes", root, ("", "cityscapes"), ("leftImg8bit", "gtFine"))
    end = "_leftImg8bit.png"
    samples = []
    listings: dict[Path, dict[str, str]] = {}
    for part in ("train", "val") if split == "trainval" else (split,):
        photos = sorted((base / "leftImg8bit" / part).glob(f"*/*{end}"))
        if not photos:
            raise FileNotFoundError(f"cityscapes: no photo {base}/leftImg8bit/{part}/CITY/*{end}")
        for photo in photos:
            stem = photo.name.removesuffix(end)
            folder = base / "gtFine" / part / photo.parent.name
            mask = _on_disk(folder / f"{stem}_gtFine_labelIds.png", listings)
            samples.append(Sample(stem, photo, mask))
    if "label_map" not in spec:
        ignored = spec.get("ignore_index")
        ignored = spec["classes"].ignore_index if ignored is None else ignored
        ignored = 255 if ignored is None else ignored
        # -1, the licence plate, is 255 in the files.
        spec["label_map"] = {
            **dict.fromkeys((*range(34), 255), ignored),
            **{raw: label for label, raw in enumerate(_CITYSCAPES_IDS)},
        }
        spec.setdefault("unmapped", "error")
    return SegmentationDataset(samples, name="cityscapes", split=split, **spec)


def _ade20k(root: Path, split: str, spec: dict[str, Any]) -> SegmentationDataset:
    inside = ("", "ADEChallengeData2016", "sampleData")
    base = _folder("ade20k", root, inside, ("images", "annotations"))
    photos, masks = base / "images", base / "annotations"
    folder = {"train": "training", "val": "validation"}[split]
    if (photos / folder).is_dir():
        photos, masks = photos / folder, masks / folder
    elif split == "train" or (photos / "training").is_dir():
        raise FileNotFoundError(f"ade20k: the folder {photos / folder} is missing")
    samples = _pairs("ade20k", photos, masks)
    if "label_map" not in spec:
        ignored = spec.get("ignore_index")
        ignored = spec["classes"].ignore_index if ignored is None else ignored
        spec["label_map"] = {0: 255 if ignored is None else ignored} | {
            raw: raw - 1 for raw in range(1, 151)
        }
        spec.setdefault("unmapped", "error")
    return SegmentationDataset(samples, name="ade20k", split=split, **spec)


def _camvid(root: Path, split: str, spec: dict[str, Any]) -> SegmentationDataset:
    parts = ("train", "val") if split == "trainval" else (split,)
    needed = [name for part in parts for name in (part, f"{part}annot")]
    base = _folder("camvid", root, ("", "CamVid"), needed)
    sequences = spec.pop("sequences", None)
    sequences = (sequences,) if isinstance(sequences, str) else sequences
    samples = []
    for part in parts:
        photos, masks = base / part, base / f"{part}annot"
        # The published photos are PNGs; copies in another format keep the lists.
        found = _by_stem(photos, (".png", *sorted(IMAGE_SUFFIXES)))
        _, labels = _masks(masks)
        listed = base / f"{part}.txt"
        if listed.is_file():
            stems = [Path(line.split()[0]).stem for line in _lines("camvid", listed)]
        else:
            stems = [sample.name for sample in _pairs("camvid", photos, masks)]
        for stem in stems:
            if sequences is None or _nfc(stem).startswith(tuple(map(_nfc, sequences))):
                samples.append(
                    Sample(
                        stem,
                        _listed(found, photos, stem, ".png"),
                        _listed(labels, masks, stem, ".png"),
                    )
                )
    if not samples:
        raise ValueError(
            f"camvid: no image of {split} starts with {', '.join(sequences or ('',))}; the "
            "sequences are 0001TP, 0006R0, 0016E5 and Seq05VD"
        )
    return SegmentationDataset(samples, name="camvid", split=split, **spec)


def _coco_voc(root: Path, split: str, spec: dict[str, Any]) -> SegmentationDataset:
    base = _folder("coco-voc", root, ("", "coco"), (f"{split}2017", "annotations"))
    path = base / "annotations" / f"instances_{split}2017.json"
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "coco-voc: drawing COCO's polygons needs pycocotools, which is not installed; install "
            "pycocotools, or convert the annotations to masks and use a folder"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"coco-voc: the annotations {path} are missing")
    content = json.loads(path.read_text(encoding="utf-8"))
    class_of = {category: label for label, category in enumerate(_COCO_VOC_IDS) if category}
    by_image: dict[int, list[Any]] = {}
    areas: dict[int, float] = {}
    for entry in content["annotations"]:
        label = class_of.get(entry["category_id"])
        if label is not None:
            image = entry["image_id"]
            by_image.setdefault(image, []).append((label, entry["segmentation"]))
            areas[image] = areas.get(image, 0.0) + entry["area"]
    samples, annotations = [], {}
    for image in sorted(content["images"], key=lambda image: image["id"]):
        if split == "train" and areas.get(image["id"], 0.0) <= _COCO_MINIMUM_AREA:
            continue
        sample = Sample(
            Path(image["file_name"]).stem, base / f"{split}2017" / image["file_name"], path
        )
        samples.append(sample)
        # Text of one image each: millions of small lists would be copied into every worker.
        annotations[sample.name] = json.dumps(
            (image["height"], image["width"], by_image.get(image["id"], []))
        )
    return _CocoVoc(annotations, samples, name="coco-voc", split=split, **spec)


# Pixels of the 20 classes that a training image has at least one more than.
_COCO_MINIMUM_AREA = 1000


class _CocoVoc(SegmentationDataset):
    def __init__(self, annotations: Mapping[str, str], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.annotations = annotations

    def raw_label(self, index: int) -> np.ndarray:
        from pycocotools import mask as coco_mask

        height, width, objects = json.loads(self.annotations[self.samples[index].name])
        label = np.zeros((height, width), dtype=np.int32)
        covered = np.zeros((height, width), dtype=np.int32)
        for category, shape in objects:
            # Polygons are a list; a crowd's run lengths come uncompressed as a list, else as text.
            if isinstance(shape, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                rle = coco_mask.frPyObjects(shape, height, width)
            else:
                rle = shape
            inside = coco_mask.decode(rle) != 0
            label[inside] = category
            covered += inside
        label[covered > 1] = self.ignore_index
        return label.astype(self._dtype)


def _folder_of_pairs(root: Path, split: str | None, spec: dict[str, Any]) -> SegmentationDataset:
    names = (spec.pop("images", "images"), spec.pop("masks", "masks"))
    _folder("folder", root, ("",), names)
    photos, masks = (root / name for name in names)
    if split is not None:
        found = [_on_disk(path / split, {}) for path in (photos, masks)]
        missing = [str(path) for path in found if not path.is_dir()]
        if missing:
            raise FileNotFoundError(
                f"folder: no folder {' nor '.join(missing)} for the split {split!r}; without a "
                f"split all of {photos} is taken"
            )
        photos, masks = found
    samples = _pairs("folder", photos, masks)
    return SegmentationDataset(samples, name=root.resolve().name, split=split, **spec)


def _pairs(name: str, photos: Path, masks: Path) -> list[Sample]:
    """Every photo with the mask of the same stem; at least one must have one."""
    found, listed = _masks(masks)
    files: dict[str, Path] = {}
    for path in sorted(photos.iterdir()) if photos.is_dir() else []:
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        stem = _nfc(path.stem)
        if stem in files:
            raise ValueError(
                f"{name}: {files[stem]} and {path} have the same stem, so one mask would "
                "belong to both; rename one, or use a csv of pairs"
            )
        files[stem] = path
    if not set(files) & set(found):
        raise FileNotFoundError(
            f"{name}: no pair of a photo and a mask with the same stem: {len(files)} photos in "
            f"{photos} (looked for {' '.join(sorted(IMAGE_SUFFIXES))}), {len(found)} masks in "
            f"{masks} (looked for {' '.join(MASK_SUFFIXES)})" + _why_lossy(listed, found)
        )
    return [
        Sample(path.stem, path, _listed(listed, masks, path.stem, ".png"))
        for _, path in sorted(files.items())
    ]


def _why_lossy(listed: Mapping[str, Path], found: Mapping[str, Path]) -> str:
    lossy = [listed[stem].suffix for stem in listed if stem not in found]
    if not lossy:
        return ""
    return (
        f"; {len(lossy)} files there ({' '.join(sorted(set(lossy)))}) count for nothing, as such "
        "formats change class numbers: store masks as PNG"
    )


def _csv(root: Path | None, split: str | None, spec: dict[str, Any]) -> SegmentationDataset:
    file = spec.pop("file", None)
    if file is None:
        raise ValueError("csv: file is missing: which table lists the pairs?")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"csv: {path}: no such file")
    base = path.parent if root is None else root
    with open(path, newline="", encoding="utf-8-sig") as table:
        rows = csv.DictReader(table, skipinitialspace=True)
        columns = [column.strip() for column in rows.fieldnames or []]
        rows.fieldnames = columns
        needed = ["image", "mask", *([] if split is None else ["split"])]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise ValueError(
                f"{path}: the column {' and '.join(missing)} is missing; the first line must name "
                f"image,mask[,split], it reads {','.join(columns)!r}"
            )
        samples, splits = [], set()
        listings: dict[Path, dict[str, str]] = {}
        for row in rows:
            line = rows.line_num
            values = {key: (row.get(key) or "").strip() for key in (*needed, "split")}
            if not values["image"] or not values["mask"]:
                raise ValueError(f"{path}, line {line}: image and mask must both be given")
            splits.add(values["split"])
            if split is None or values["split"] == split:
                image, mask = (
                    _on_disk(base / values[name], listings) for name in ("image", "mask")
                )
                samples.append(Sample(values["image"], image, mask))
    if not samples:
        which = f" of the split {split!r} (there are: {', '.join(sorted(splits))})" if split else ""
        raise ValueError(f"{path}: no pair{which}")
    return SegmentationDataset(samples, name=path.stem, split=split, **spec)


DATASETS: dict[str, Layout] = {
    "voc": Layout(
        _voc,
        ("train", "val", "trainval", "trainaug"),
        "JPEGImages, SegmentationClass and ImageSets of PASCAL VOC 2012",
        "voc",
        ("sbd_root",),
    ),
    "cityscapes": Layout(
        _cityscapes, ("train", "val", "trainval"), "leftImg8bit and gtFine", "cityscapes"
    ),
    "ade20k": Layout(
        _ade20k, ("train", "val"), "images and annotations of the scene parsing data", "ade20k"
    ),
    "camvid": Layout(
        _camvid,
        ("train", "val", "test", "trainval"),
        "train.txt, train and trainannot of the SegNet tutorial",
        "camvid",
        ("sequences",),
    ),
    "coco-voc": Layout(
        _coco_voc, ("train", "val"), "train2017, val2017 and annotations of COCO", "coco-voc"
    ),
    "folder": Layout(
        _folder_of_pairs,
        (),
        "a folder of images and a folder of masks",
        options=("images", "masks"),
    ),
    "csv": Layout(_csv, (), "the files that the table lists", options=("file",)),
}
"""Data sets that :func:`open_dataset` knows by name."""
