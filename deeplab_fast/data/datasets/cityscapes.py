"""Cityscapes, its fine labels."""

from __future__ import annotations

from pathlib import Path

from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import folder_with, on_disk
from deeplab_fast.data.datasets.layout import Layout, Spec

# labels.py of the Cityscapes scripts: id of each of the 19 evaluated classes, by train id.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def _cityscapes(root: Path, split: str, spec: Spec) -> SegmentationDataset:
    base = folder_with("cityscapes", root, ("", "cityscapes"), ("leftImg8bit", "gtFine"))
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
            mask = on_disk(folder / f"{stem}_gtFine_labelIds.png", listings)
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


CITYSCAPES = Layout(
    _cityscapes, ("train", "val", "trainval"), "leftImg8bit and gtFine", "cityscapes"
)
