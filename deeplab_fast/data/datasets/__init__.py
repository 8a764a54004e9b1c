"""Photos with label maps on disk: the published data sets, folders of pairs, lists of pairs.

Every data set gives a photo as a uint8 RGB array [H, W, 3] and its labels as an array [H, W] of
class ids, uint8 where they fit (int32 above), with one value, ``ignore_index``, for pixels that
count for nothing. Masks are read as the numbers that the file holds: of a palette PNG the indices,
never its colours. Photo and mask are each turned by the EXIF orientation that its own file is
tagged with. File names are one in all forms of Unicode: macOS stores letters and accents apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deeplab_fast.data.classes import ClassSet, class_set, generic_classes
from deeplab_fast.data.datasets.ade20k import ADE20K
from deeplab_fast.data.datasets.base import (
    LabelError,
    LabelledData,
    Sample,
    SegmentationDataset,
    bad_labels,
    parse_label_map,
)
from deeplab_fast.data.datasets.camvid import CAMVID
from deeplab_fast.data.datasets.cityscapes import CITYSCAPES
from deeplab_fast.data.datasets.coco import COCO_VOC
from deeplab_fast.data.datasets.layout import Layout, Spec
from deeplab_fast.data.datasets.masks import read_mask
from deeplab_fast.data.datasets.pairs import CSV, FOLDER
from deeplab_fast.data.datasets.voc import VOC

__all__ = [
    "DATASETS",
    "LabelError",
    "LabelledData",
    "Sample",
    "SegmentationDataset",
    "bad_labels",
    "open_dataset",
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


def _spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
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


def _classes(
    given: str | os.PathLike[str] | ClassSet | Iterable[str] | int | None,
    own: str | None,
    name: str,
) -> ClassSet:
    if given is None and own is None:
        raise ValueError(
            f"{name}: classes is missing: pass a list of names, a number, a built-in set or a file "
            "of names"
        )
    if given is None:
        assert own is not None
        return class_set(own)
    if isinstance(given, bool):
        raise ValueError(f"{name}: classes is {given}, expected names, a number, a set or a file")
    if isinstance(given, int):
        return generic_classes(given)
    if isinstance(given, str) and given.isdecimal():
        return generic_classes(int(given))
    return class_set(given)
