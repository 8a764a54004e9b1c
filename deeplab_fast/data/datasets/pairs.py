"""Data of one's own: folders of pairs, tables of pairs."""

from __future__ import annotations

import csv
from pathlib import Path

from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import folder_with, on_disk, pairs_of
from deeplab_fast.data.datasets.layout import Layout, Spec


def _folder_of_pairs(root: Path, split: str | None, spec: Spec) -> SegmentationDataset:
    names = (spec.pop("images", "images"), spec.pop("masks", "masks"))
    folder_with("folder", root, ("",), names)
    photos, masks = (root / name for name in names)
    if split is not None:
        found = [on_disk(path / split, {}) for path in (photos, masks)]
        missing = [str(path) for path in found if not path.is_dir()]
        if missing:
            raise FileNotFoundError(
                f"folder: no folder {' nor '.join(missing)} for the split {split!r}; without a "
                f"split all of {photos} is taken"
            )
        photos, masks = found
    samples = pairs_of("folder", photos, masks)
    return SegmentationDataset(samples, name=root.resolve().name, split=split, **spec)


def _csv(root: Path | None, split: str | None, spec: Spec) -> SegmentationDataset:
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
                image, mask = (on_disk(base / values[name], listings) for name in ("image", "mask"))
                samples.append(Sample(values["image"], image, mask))
    if not samples:
        which = f" of the split {split!r} (there are: {', '.join(sorted(splits))})" if split else ""
        raise ValueError(f"{path}: no pair{which}")
    return SegmentationDataset(samples, name=path.stem, split=split, **spec)


FOLDER = Layout(
    _folder_of_pairs,
    (),
    "a folder of images and a folder of masks",
    options=("images", "masks"),
)


CSV = Layout(_csv, (), "the files that the table lists", options=("file",))
