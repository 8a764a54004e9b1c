"""ADE20K, the scene parsing data."""

from __future__ import annotations

from pathlib import Path

from deeplab_fast.data.datasets.base import SegmentationDataset
from deeplab_fast.data.datasets.files import folder_with, pairs_of
from deeplab_fast.data.datasets.layout import Layout, Spec


def _ade20k(root: Path, split: str, spec: Spec) -> SegmentationDataset:
    inside = ("", "ADEChallengeData2016", "sampleData")
    base = folder_with("ade20k", root, inside, ("images", "annotations"))
    photos, masks = base / "images", base / "annotations"
    folder = {"train": "training", "val": "validation"}[split]
    if (photos / folder).is_dir():
        photos, masks = photos / folder, masks / folder
    elif split == "train" or (photos / "training").is_dir():
        raise FileNotFoundError(f"ade20k: the folder {photos / folder} is missing")
    samples = pairs_of("ade20k", photos, masks)
    if "label_map" not in spec:
        ignored = spec.get("ignore_index")
        ignored = spec["classes"].ignore_index if ignored is None else ignored
        spec["label_map"] = {0: 255 if ignored is None else ignored} | {
            raw: raw - 1 for raw in range(1, 151)
        }
        spec.setdefault("unmapped", "error")
    return SegmentationDataset(samples, name="ade20k", split=split, **spec)


ADE20K = Layout(
    _ade20k, ("train", "val"), "images and annotations of the scene parsing data", "ade20k"
)
