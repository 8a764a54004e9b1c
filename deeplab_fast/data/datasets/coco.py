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
from deeplab_fast.data.images import ImageReadError, one_line

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
    images, annotated = _parts(path)
    class_of = {category: label for label, category in enumerate(_COCO_VOC_IDS) if category}
    by_image: dict[int, list[Any]] = {}
    areas: dict[int, float] = {}
    for entry in annotated:
        label = class_of.get(entry["category_id"])
        if label is not None:
            image = entry["image_id"]
            by_image.setdefault(image, []).append((label, entry["segmentation"]))
            areas[image] = areas.get(image, 0.0) + entry["area"]
    samples, annotations = [], {}
    for image in sorted(images, key=lambda image: image["id"]):
        if split == "train" and areas.get(image["id"], 0.0) <= _COCO_MINIMUM_AREA:
            continue
        sample = Sample(
            Path(image["file_name"]).stem, base / f"{split}2017" / image["file_name"], path
        )
        samples.append(sample)
        # Text of one image each: millions of small lists would be copied into every worker.
        objects = by_image.get(image["id"], [])
        annotations[sample.name] = json.dumps((image["height"], image["width"], objects))
    dataset = _CocoVoc(samples, name="coco-voc", split=split, **spec)
    dataset.annotations = annotations
    return dataset


# Bytes of the annotations; those of train2017 are 450 MB.
_LONGEST = 2 << 30

# Pixels of the 20 classes that a training image has at least one more than.
_COCO_MINIMUM_AREA = 1000

# Along a side; COCO's have up to 640.
_LONGEST_SIDE = 1 << 14

_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {
        **{"image_id": int, "category_id": int},
        **{"area": (int, float), "segmentation": (list, dict)},
    },
}


_EXPECTED = "expected instances_*.json as COCO gives it: download it again"


def _parts(path: Path) -> list[list[dict[str, Any]]]:
    """Images and annotations of a file of instances, each with the fields that are read."""
    content = parse_json(read_text(path, limit=_LONGEST), str(path))
    parts = []
    for part, fields in _FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"coco-voc: {path} has no list of {part}; {_EXPECTED}")
        for number, entry in enumerate(entries):
            wrong = next(
                (
                    name
                    for name, kind in fields.items()
                    if not isinstance(entry, dict)
                    or not isinstance(entry.get(name), kind)
                    or isinstance(entry.get(name), bool)
                ),
                None,
            )
            if wrong is not None:
                raise ValueError(
                    f"coco-voc: {path}: {part}[{number}] has no {wrong} of its type; {_EXPECTED}"
                )
        parts.append(entries)
    return parts


class _CocoVoc(SegmentationDataset):
    # By the sample's name.
    annotations: Mapping[str, str]

    def raw_label(self, index: int) -> np.ndarray:
        sample = self.samples[index]
        height, width, objects = json.loads(self.annotations[sample.name])
        if not (1 <= height <= _LONGEST_SIDE and 1 <= width <= _LONGEST_SIDE):
            raise ImageReadError(
                str(sample.mask),
                f"{sample.name} has {height}x{width} pixels, expected sides of 1 to "
                f"{_LONGEST_SIDE}",
            )
        label = np.zeros((height, width), dtype=np.int32)
        covered = np.zeros((height, width), dtype=np.int32)
        for category, shape in objects:
            try:
                inside = _inside(shape, height, width)
            except (ValueError, TypeError, OverflowError) as error:
                what = f"an object of {sample.name}: {one_line(error)}"
                raise ImageReadError(str(sample.mask), what) from error
            label[inside] = category
            covered += inside
        label[covered > 1] = self.ignore_index
        return label.astype(self._dtype)


def _inside(shape: Any, height: int, width: int) -> np.ndarray:
    """The pixels [H, W] of an object.

    Polygons are a list of x0, y0, x1, y1, ...; a crowd's run lengths, which begin outside and go
    down the columns, come as a list or as text. pycocotools, in C, gets polygons alone, whose
    edges are not longer together than the pixels could need; it believes what it is given.

    Raises:
        ValueError: a shape that is not of the image.
    """
    if isinstance(shape, list):
        return _drawn(shape, height, width)
    if shape.get("size") != [height, width]:
        raise ValueError(f"runs of an image of {shape.get('size')!r:.60}, expected {height, width}")
    counts = shape.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs):
        raise ValueError("runs that are not whole numbers")
    if sum(runs) != height * width:
        raise ValueError(f"runs of {sum(runs)} pixels, and the image has {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, np.array(runs, dtype=np.int64)).reshape(width, height).T


def _runs(text: str) -> list[int]:
    """Run lengths of COCO's text: 5 bits a sign, from the third on less the one two before."""
    runs: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths in a text that is not COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths in a text that was cut")
    return runs


def _drawn(polygons: list[Any], height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco_mask

    length = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of less than three points, or of an odd number of values")
        if not all(type(value) in (int, float) for value in polygon):
            raise ValueError("a polygon of something else than numbers")
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(points).all() or np.abs(points).max() > 2 * _LONGEST_SIDE:
            raise ValueError("a polygon with points far outside the image")
        length += float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())
    if length > 4 * (height + width) + 2 * height * width:
        raise ValueError(f"polygons of {length:.0f} pixels of edges in an image {height}x{width}")
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))) != 0


COCO_VOC = Layout(
    _coco_voc, ("train", "val"), "train2017, val2017 and annotations of COCO", "coco-voc"
)
