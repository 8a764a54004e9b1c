"""PASCAL VOC 2012, also with the masks of SBD."""

from __future__ import annotations

import os
from pathlib import Path

from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import (
    by_stem,
    folder_with,
    lines_of,
    listed_path,
    nfc,
    on_disk,
)
from deeplab_fast.data.datasets.layout import Layout, Spec


def _voc(root: Path, split: str, spec: Spec) -> SegmentationDataset:
    inside = ("", "VOC2012", "VOCdevkit/VOC2012")
    base = folder_with("voc", root, inside, ("JPEGImages", "SegmentationClass", "ImageSets"))
    sbd_root = spec.pop("sbd_root", None)
    lists = base / "ImageSets" / "Segmentation"
    photos, masks = base / "JPEGImages", base / "SegmentationClass"
    mask_of: dict[str, Path] = {}
    if split != "trainaug":
        names = lines_of("voc", lists / f"{split}.txt")
    elif (augmented := base / "SegmentationClassAug").is_dir() and sbd_root is None:
        mask_of = by_stem(augmented, (".png",))
        own_list = next((p for p in map(lists.joinpath, _TRAINAUG_LISTS) if p.is_file()), None)
        if own_list is not None:
            # Some lists hold "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png" a line.
            names = [Path(line.split()[0]).stem for line in lines_of("voc", own_list)]
        else:
            names = sorted(set(mask_of) - set(map(nfc, lines_of("voc", lists / "val.txt"))))
        masks = augmented
    else:
        sbd = _sbd_folder(root, base, sbd_root)
        own = lines_of("voc", lists / "train.txt")
        extra = {*lines_of("voc", sbd / "train.txt"), *lines_of("voc", sbd / "val.txt")}
        extra -= {*own, *lines_of("voc", lists / "val.txt")}
        names = sorted({*own, *extra})
        mask_of = {nfc(name): sbd / "cls" / f"{name}.mat" for name in extra}
    listings: dict[Path, dict[str, str]] = {}
    samples = [
        Sample(
            name,
            on_disk(photos / f"{name}.jpg", listings),
            on_disk(listed_path(mask_of, masks, name, ".png"), listings),
        )
        for name in names
    ]
    return SegmentationDataset(samples, name="voc", split=split, **spec)


_TRAINAUG_LISTS = ("trainaug.txt", "train_aug.txt")


def _sbd_folder(root: Path, base: Path, sbd_root: str | os.PathLike[str] | None) -> Path:
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


VOC = Layout(
    _voc,
    ("train", "val", "trainval", "trainaug"),
    "JPEGImages, SegmentationClass and ImageSets of PASCAL VOC 2012",
    "voc",
    ("sbd_root",),
)
