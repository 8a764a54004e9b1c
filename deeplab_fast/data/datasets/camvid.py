"""CamVid, as the SegNet tutorial gives it."""

from __future__ import annotations

from pathlib import Path

from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import (
    by_stem,
    folder_with,
    lines_of,
    listed_path,
    masks_by_stem,
    nfc,
    pairs_of,
)
from deeplab_fast.data.datasets.layout import Layout, Spec
from deeplab_fast.data.images import IMAGE_SUFFIXES


def _camvid(root: Path, split: str, spec: Spec) -> SegmentationDataset:
    parts = ("train", "val") if split == "trainval" else (split,)
    needed = [name for part in parts for name in (part, f"{part}annot")]
    base = folder_with("camvid", root, ("", "CamVid"), needed)
    sequences = spec.pop("sequences", None)
    sequences = (sequences,) if isinstance(sequences, str) else sequences
    samples = []
    for part in parts:
        photos, masks = base / part, base / f"{part}annot"
        # The published photos are PNGs; copies in another format keep the lists.
        found = by_stem(photos, (".png", *sorted(IMAGE_SUFFIXES)))
        _, labels = masks_by_stem(masks)
        listed = base / f"{part}.txt"
        if listed.is_file():
            stems = [Path(line.split()[0]).stem for line in lines_of("camvid", listed)]
        else:
            stems = [sample.name for sample in pairs_of("camvid", photos, masks)]
        for stem in stems:
            if sequences is None or nfc(stem).startswith(tuple(map(nfc, sequences))):
                samples.append(
                    Sample(
                        stem,
                        listed_path(found, photos, stem, ".png"),
                        listed_path(labels, masks, stem, ".png"),
                    )
                )
    if not samples:
        raise ValueError(
            f"camvid: no image of {split} starts with {', '.join(sequences or ('',))}; the "
            "sequences are 0001TP, 0006R0, 0016E5 and Seq05VD"
        )
    return SegmentationDataset(samples, name="camvid", split=split, **spec)


CAMVID = Layout(
    _camvid,
    ("train", "val", "test", "trainval"),
    "train.txt, train and trainannot of the SegNet tutorial",
    "camvid",
    ("sequences",),
)
