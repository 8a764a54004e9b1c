"""COCO with the classes of VOC, drawn from its polygons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_fast._documents import parse_json, read_text
from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import folder_with
from deeplab_fast.data.datasets.layout import Layout, Spec

# COCO's category ids of the VOC classes, by VOC class; 0 is background.
# fmt: off
_COCO_VOC_IDS = (
    0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72,
)
# fmt: on


def _coco_voc(root: Path, split: str, spec: Spec) -> SegmentationDataset:
    base = folder_with("coco-voc", root, ("", "coco"), (f"{split}2017", "annotations"))
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
    content = parse_json(read_text(path, limit=_LONGEST), str(path))
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
    dataset = _CocoVoc(samples, name="coco-voc", split=split, **spec)
    dataset.annotations = annotations
    return dataset


# Bytes of the annotations; those of train2017 are 450 MB.
_LONGEST = 2 << 30

# Pixels of the 20 classes that a training image has at least one more than.
_COCO_MINIMUM_AREA = 1000


class _CocoVoc(SegmentationDataset):
    # By the sample's name.
    annotations: Mapping[str, str]

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


COCO_VOC = Layout(
    _coco_voc, ("train", "val"), "train2017, val2017 and annotations of COCO", "coco-voc"
)
