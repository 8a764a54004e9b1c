"""Photos with label maps on disk: the published data sets, folders of pairs, lists of pairs.

Every data set gives a photo as a uint8 RGB array [H, W, 3] and its labels as an array [H, W] of
class ids, uint8 where they fit (int32 above), with one value, ``ignore_index``, for pixels that
count for nothing. Masks are read as the numbers that the file holds: of a palette PNG the indices,
and its colours only where ``mask_colours`` names some. Photo and mask are each turned by the EXIF
orientation that its own file is tagged with. File names are one in all forms of Unicode: macOS
stores letters and accents apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deeplab_fast._documents import DocumentError, read_document, shown
from deeplab_fast.data.classes import CLASS_SETS, ClassSet, class_set, generic_classes
from deeplab_fast.data.datasets.ade20k import ADE20K
from deeplab_fast.data.datasets.base import (
    LabelError,
    LabelledData,
    Sample,
    SegmentationDataset,
    bad_labels,
    parse_label_map,
    value_counts,
)
from deeplab_fast.data.datasets.camvid import CAMVID
from deeplab_fast.data.datasets.cityscapes import CITYSCAPES
from deeplab_fast.data.datasets.coco import COCO_VOC
from deeplab_fast.data.datasets.colours import (
    MaskColours,
    classes_of_colours,
    colour_file,
    read_colours,
)
from deeplab_fast.data.datasets.layout import Layout, Spec
from deeplab_fast.data.datasets.masks import ColourError, read_mask
from deeplab_fast.data.datasets.pairs import CSV, FOLDER
from deeplab_fast.data.datasets.splits import VAL_FRACTION
from deeplab_fast.data.datasets.voc import VOC
from deeplab_fast.data.images import ImageReadError

__all__ = [
    "DATASETS",
    "VAL_FRACTION",
    "ColourError",
    "LabelError",
    "LabelledData",
    "Sample",
    "SegmentationDataset",
    "bad_labels",
    "is_own_data",
    "open_dataset",
    "options_of",
    "parse_label_map",
    "read_mask",
]


DATASETS: dict[str, Layout] = {
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "ade20k": ADE20K,
    "camvid": CAMVID,
    "coco-voc": COCO_VOC,
    "folder": FOLDER,
    "csv": CSV,
}
"""Data sets that :func:`open_dataset` knows by name."""


_COMMON = frozenset({"root", "split", "classes", "label_map", "unmapped", "ignore_index"})


def open_dataset(
    source: str | os.PathLike[str] | Mapping[str, Any],
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    *,
    classes: str | os.PathLike[str] | ClassSet | Iterable[str] | int | None = None,
    label_map: Mapping[int, int] | None = None,
    unmapped: str | None = None,
    ignore_index: int | None = None,
    mask_colours: str | os.PathLike[str] | ClassSet | MaskColours | None = None,
    unknown_colours: str | None = None,
    whole: bool = False,
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
    folder     images, masks, files of the same stem                 subfolders of both, or train,
                                                                     val by name and seed
    csv        a table with columns image, mask and, optional, split as the column says, or the
                                                                     same
    ========== ===================================================== ===========================

    ``trainaug`` of VOC takes SegmentationClassAug where it is there, otherwise SBD's .mat files
    (option ``sbd_root``, or a folder SBD, sbd or benchmark_RELEASE in ``root``): VOC train and all
    of SBD without VOC val, 10,582 images. ``coco-voc`` follows torchvision's recipe: pixels of
    overlapping instances are ignored, and train leaves out images with at most
    1000 pixels of the 20 classes. ``camvid`` takes ``sequences=("0001TP", ...)`` to choose by the
    start of the name.

    ``folder`` finds folders of other usual names (``imgs``, ``JPEGImages``, ``labels``,
    ``SegmentationClass``, ...; ``images`` and ``masks`` name them), also in ``train`` and ``val``;
    masks with a suffix (``x_mask.png``; ``mask_suffix`` names it), and photos and masks in one
    folder. What two readings would fit is refused. Parts may be called ``training``, ``valid`` and
    ``validation``.

    A folder or table without parts is split by ``split="train"`` and ``"val"``: ``val_fraction``
    (0.2) of its pairs are for validation, chosen by their names and ``split_seed`` (0), with
    ``group_by="prefix"`` or a regular expression so that pairs of one group (a sequence, a scene)
    stay together: :class:`~deeplab_fast.data.datasets.splits.Split` has the rule. What was found
    and split stands in ``notes`` of the data set.

    Args:
        source: one of these names; a folder, as ``folder`` takes it; a .csv file; a .yaml, .yml or
            .json file, or a mapping, with the key ``name`` and any of the other arguments (``root``
            is relative to the file).
            Arguments given beside it come first.
        root: the folder of the data; for csv what its paths are relative to (default: its folder).
        split: "val" unless given; of a csv, and of a folder without val, all samples, unless
            ``val_fraction`` is given. "all" is all of a folder or csv.
        classes: as ``data.class_set`` takes, or a number; needed for folder and csv, unless
            ``mask_colours`` names them, otherwise the data set's own.
        label_map, unmapped, ignore_index: see :class:`SegmentationDataset`; instead of the data
            set's own.
        mask_colours: colours that stand for classes in masks: a file or the name of a class set, or
            a mapping of class name to (R, G, B), see
            :func:`~deeplab_fast.data.datasets.colours.read_colours`; for folder and csv.
        unknown_colours: see :class:`SegmentationDataset`.
        whole: "train" and "val" of a folder or csv without parts are each all of its pairs.
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
        "mask_colours": mask_colours,
        "unknown_colours": unknown_colours,
        **options,
    }
    own = _spec(source)
    if root is not None and not isinstance(source, Mapping) and own.get("root") == Path(source):
        raise ValueError(
            f"--data is the folder {source} and --root {root}; give one folder, as --data DIR or "
            "as --data folder --root DIR"
        )
    spec = {**own, **{key: value for key, value in given.items() if value is not None}}
    name = spec.pop("name", None)
    if name not in DATASETS:
        raise ValueError(
            f"no data set is named {shown(repr(name), 300)}; there are: {', '.join(DATASETS)}; "
            "or pass a folder of photos and masks, a .csv file of pairs, or a .yaml or .json file "
            "with name, root, split, classes, label_map"
        )
    layout = DATASETS[name]
    _check_options(name, layout, spec)
    root, split = spec.pop("root", None), spec.pop("split", None)
    if split is None:
        split = "val" if layout.splits else None
    elif layout.splits and split not in layout.splits:
        raise ValueError(f"{name}: --split is {split!r}, expected {', '.join(layout.splits)}")
    if root is None and name != "csv":
        raise ValueError(f"{name}: --root is missing: which folder holds {layout.holds}?")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(
            f"{name}: --root {root} is not a folder; it names the one that holds {layout.holds}"
        )
    given_classes, painted = spec.pop("classes", None), spec.pop("mask_colours", None)
    if painted is not None:
        spec["mask_colours"] = read_colours(painted)
    elif "unknown_colours" in spec:
        raise ValueError(
            "--unknown-colours is of masks whose colours stand for classes; name them with "
            "--mask-colours, or leave it out"
        )
    if whole and not layout.splits:
        spec["whole"] = True
    known = layout.classes
    if given_classes is None and known is None:
        if painted is None:
            raise ValueError(_what_classes(name, layout, root, split, spec))
        given_classes = _classes_of(painted, spec["mask_colours"])
    spec["classes"] = _classes(given_classes, known, name)
    return layout.open(None if root is None else Path(root), split, spec)


def is_own_data(source: str | os.PathLike[str] | None) -> bool:
    """Whether a source is a folder or a table, which have no classes and perhaps no splits."""
    if source is None or os.fspath(source) in DATASETS:
        return source == "folder"
    return Path(source).suffix.lower() == ".csv" or Path(source).is_dir()


def options_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`open_dataset` in the options of a command, by the same names.

    Without source, root and split; of ``label_map`` the text ("255=1"), which leaves other values
    as they are.

    Raises:
        ValueError: text that is no label map.
    """
    names = ("classes", "ignore_index", *FOLDER.options)
    given = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("label_map") is not None:
        given |= {"label_map": parse_label_map(values["label_map"]), "unmapped": "keep"}
    return given


def _check_options(name: str, layout: Layout, spec: Spec) -> None:
    unknown = sorted(set(spec) - _COMMON - set(layout.options))
    if not unknown:
        return
    of_pairs = {*FOLDER.options, *CSV.options} - {"file"}
    if layout.splits and set(unknown) <= of_pairs:
        named = ", ".join(f"--{option.replace('_', '-')}" for option in unknown)
        raise ValueError(
            f"{name} is stored in one known way, with the splits {', '.join(layout.splits)}; "
            f"{named} ({', '.join(unknown)}) is for folder and csv: leave it out"
        )
    allowed = ", ".join(sorted({*_COMMON, *layout.options}))
    raise ValueError(f"{name}: unknown options {', '.join(unknown)}; allowed are {allowed}")


def _classes_of(
    painted: str | os.PathLike[str] | ClassSet | MaskColours, colours: dict[Any, Any]
) -> ClassSet:
    if isinstance(painted, ClassSet):
        return painted
    if not isinstance(painted, Mapping) and os.fspath(painted) in CLASS_SETS:
        return CLASS_SETS[os.fspath(painted)]
    name = "custom" if isinstance(painted, Mapping) else Path(painted).stem
    return classes_of_colours(colours, name)


def _what_classes(
    name: str,
    layout: Layout,
    root: str | os.PathLike[str] | None,
    split: str | None,
    spec: Spec,
) -> str:
    """What to say where no classes are given: with what the first masks hold."""
    text = (
        f"{name}: --classes is missing: names (a,b,c), a number, a built-in set "
        f"({', '.join(CLASS_SETS)}) or a file of names"
    )
    names = [] if root is None else [Path(root) / name for name in _CLASS_FILES]
    text += "".join(f"; perhaps {path}" for path in names if path.is_file())
    try:
        dataset = layout.open(
            None if root is None else Path(root),
            split,
            # Any will do to find the masks.
            {**spec, "classes": generic_classes(2), "label_map": None},
        )
        values: set[int] = set()
        for index in range(min(len(dataset), _FIRST_MASKS)):
            values |= value_counts(dataset.raw_label(index)).keys()
    # Only a hint is made: what is wrong with these data is said where they are opened.
    except (ValueError, OSError) as error:
        if not isinstance(error, ImageReadError):
            return text
        text = f"{text}. The mask {error.path} cannot be read: {error.reason}"
        found = colour_file(Path(error.path).parent)
        return text if found is None else f"{text}; perhaps by {found}"
    some = ", ".join(map(str, sorted(values)[:10])) + (", ..." if len(values) > 10 else "")
    text += f". The first masks hold {some}"
    classes = values - {255}
    if values == {0, 255}:
        return f"{text}: of one class beside the background they need --classes 1 --label-map 255=1"
    if classes == {0, 1}:
        return f"{text}: --classes 1 is one class beside the background, --classes 2 are two"
    if classes and classes == set(range(max(classes) + 1)) and len(classes) <= 256:
        return f"{text}: at least {max(classes) + 1} classes"
    return text


# What a list of class names is called in a folder of data.
_CLASS_FILES = ("classes.txt", "labels.txt", "class_names.txt", "names.txt", "classes.json")


# Masks that are looked at where no classes are given.
_FIRST_MASKS = 5


def _spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    if isinstance(source, Mapping):
        return dict(source)
    text = os.fspath(source)
    if text in DATASETS:
        return {"name": text}
    path = Path(text)
    suffix = path.suffix.lower()
    if path.is_dir():
        return {"name": "folder", "root": path}
    if suffix not in (".csv", ".yaml", ".yml", ".json"):
        return {"name": text}
    if not path.is_file():
        raise FileNotFoundError(f"data set {text}: no such file")
    if suffix == ".csv":
        return {"name": "csv", "file": path}
    try:
        spec = read_document(path)
    except DocumentError as error:
        raise ValueError(f"data set {error}") from error
    except OSError as error:
        raise ValueError(f"data set {text}: {shown(error, 400)}") from error
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ValueError(
            f"data set {text}: expected a mapping with the key name ({', '.join(DATASETS)}) and "
            "any of root, split, classes, label_map, unmapped, ignore_index, mask_colours, "
            "val_fraction"
        )
    spec = dict(spec)
    _check_kinds(spec, text)
    for key in ("root", "file", "sbd_root"):
        if isinstance(spec.get(key), str):
            spec[key] = path.parent / spec[key]
    colours = spec.get("mask_colours")
    if isinstance(colours, str) and (path.parent / colours).is_file():
        spec["mask_colours"] = path.parent / colours
    return spec


# Of a file's keys: what they take, and in words.
_TEXT, _NUMBER = (str,), (int, float)
_KINDS_OF: dict[str, tuple[tuple[type, ...], str]] = {
    **{
        key: (_TEXT, "a text")
        for key in (
            *("name", "root", "file", "sbd_root", "split", "images", "masks", "mask_suffix"),
            *("group_by", "unmapped", "unknown_colours"),
        )
    },
    "classes": ((str, int, list), "names, a number, a set or a file"),
    "mask_colours": ((str, dict), "a file, a set, or a map of names to colours"),
    "label_map": ((dict,), "a map of values to labels"),
    "ignore_index": ((int,), "an integer"),
    "split_seed": ((int,), "an integer"),
    "val_fraction": (_NUMBER, "a part, 0 to 1"),
}


def _check_kinds(spec: Spec, source: str) -> None:
    """Raises ValueError for values of a file that are of another kind than its keys take."""
    for key, value in spec.items():
        kinds, allowed = _KINDS_OF.get(str(key), ((), ""))
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if isinstance(value, str):
            # Of a path that no system has Python tells otherwise.
            good = good and len(value) < 4096 and value.isprintable()
        elif isinstance(value, int):
            good = good and abs(value) < 2**64
        elif isinstance(value, list) and key == "classes":
            good = all(isinstance(each, str) for each in value)
        elif isinstance(value, dict) and key == "label_map":
            good = all(type(each) is int and abs(each) < 2**31 for each in value.values())
        if not isinstance(key, str) or (kinds and value is not None and not good):
            raise ValueError(
                f"data set {source}: {shown(key)} is {shown(value, 200)}, expected "
                f"{allowed or 'names as keys'}"
            )


def _classes(
    given: str | os.PathLike[str] | ClassSet | Iterable[str] | int | None,
    own: str | None,
    name: str,
) -> ClassSet:
    if given is None:
        assert own is not None
        return class_set(own)
    if isinstance(given, bool):
        raise ValueError(f"{name}: classes is {given}, expected names, a number, a set or a file")
    if isinstance(given, int):
        return generic_classes(given)
    return class_set(given)
