"""The data sets and the augmentation that a training config names."""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplab_fast.data.datasets import SegmentationDataset, open_dataset, options_of
from deeplab_fast.data.preprocess import IMAGENET_MEAN
from deeplab_fast.data.transforms import (
    Compose,
    Transform,
    adapt,
    paper_training,
    torchvision_training,
)
from deeplab_fast.engine.augment import ColourJitter
from deeplab_fast.engine.config import OptionError, TrainConfig
from deeplab_fast.engine.outputs import write_atomically

__all__ = [
    "open_training",
    "open_validation",
    "trained_on",
    "training_transform",
    "write_split",
]


def training_transform(
    config: TrainConfig,
    mean: Sequence[float] = IMAGENET_MEAN,
    ignore_index: int = 255,
    input_size: int | tuple[int, int] | None = None,
) -> Transform | None:
    """The transform that a config asks for, as ``AugmentedDataset`` takes it.

    Raises:
        ValueError: an import path that leads nowhere, or options that do not fit.
    """
    if config.transform == "paper":
        low, high = config.scale
        transform: Transform | None = paper_training(
            config.crop_size,
            scale=(low, high),
            scale_step=config.scale_step,
            flip=config.flip,
            mean=mean,
            ignore_index=ignore_index,
            input_size=input_size,
        )
    elif config.transform == "torchvision":
        transform = torchvision_training(
            config.base_size, config.crop_size, flip=config.flip, ignore_index=ignore_index
        )
    elif config.transform == "none":
        transform = None
    else:
        try:
            transform = adapt(
                _imported(config.transform, config.transform_options), style=config.transform_style
            )
        except TypeError as error:
            raise OptionError("transform", f"is {config.transform}: {error}") from error
    if not (config.colour_jitter or config.hue_jitter):
        return transform
    strength = config.colour_jitter
    jitter = ColourJitter(strength, strength, strength, config.hue_jitter)
    # Last: a crop has fewer pixels than the photo.
    return jitter if transform is None else Compose(transform, jitter)


def open_training(config: TrainConfig) -> SegmentationDataset:
    """The data set to train on."""
    if not config.data:
        raise OptionError("data", "is missing: which data set shall be trained on?")
    # A part for validation would be for nothing.
    whole = config.val_fraction is None and bool(config.val_data or not config.val_every)
    return _open(config, config.data, config.root, config.split, config.data_options, whole=whole)


def open_validation(config: TrainConfig) -> SegmentationDataset | None:
    """The data set to validate on; None with ``val_fraction=0`` and no ``val_data``."""
    source = config.val_data or config.data
    if not source:
        raise OptionError("data", "is missing: which data set shall be validated on?")
    if config.val_data:
        options = config.val_options
        # Data of their own are validated on as a whole.
        config = config.replace(val_fraction=None)
        return _open(config, source, config.val_root, config.val_split, options, whole=True)
    if config.val_fraction == 0 and config.val_split == "val":
        return None
    root = config.val_root or config.root
    return _open(config, source, root, config.val_split, config.val_options, whole=False)


def write_split(
    train: SegmentationDataset, val: SegmentationDataset | None, path: Path
) -> str | None:
    """Writes which pairs are trained and validated on, as a table that ``--data`` takes.

    Only of data whose parts were made by name and seed; else nothing is written.

    Returns:
        What has changed against a table that was there, None for nothing.

    Raises:
        OSError: it cannot be written.
    """
    if not train.split_here or val is None or not val.split_here:
        return None
    # A bootstrapped image occurs repeatedly.
    rows = {
        (os.path.abspath(sample.image), os.path.abspath(sample.mask)): split
        for split, dataset in (("train", train), ("val", val))
        for sample in dataset.samples
    }
    before = _sides(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "mask", "split"))
    writer.writerows((*pair, split) for pair, split in sorted(rows.items()))
    write_atomically([(path, lambda file: file.write(text.getvalue().encode("utf-8")))])
    now = {Path(image).name: split for (image, _), split in rows.items()}
    moved = [name for name, split in before.items() if now.get(name, split) != split]
    if not moved:
        return None
    return (
        f"{len(moved)} images changed sides between training and validation since the run began "
        f"({', '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}), as the data or the options "
        "did: scores of the validation are not those of unseen images"
    )


def trained_on(weights: str | os.PathLike[str], dataset: SegmentationDataset) -> tuple[int, Path]:
    """How many of these photos a run trained on that left its weights beside its ``split.csv``.

    0 where there is no such table; ``weights`` is a file or the folder of a run. The second is the
    table's path.
    """
    path = Path(weights)
    table = (path if path.is_dir() else path.parent) / "split.csv"
    # The name of weights that come with the package is none of a file here.
    rows = _rows(table) if path.exists() else []
    trained = {row["image"] for row in rows if row["split"] == "train"}
    return sum(os.path.abspath(sample.image) in trained for sample in dataset.samples), table


def _sides(path: Path) -> dict[str, str]:
    """The split of each image of a table by its file's name."""
    return {Path(row["image"]).name: row["split"] for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table of pairs, none where there is no such table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
    return [row for row in rows if row.get("image") and row.get("split")]


def _open(
    config: TrainConfig,
    source: str,
    root: str | None,
    split: str | None,
    options: dict[str, Any],
    *,
    whole: bool,
) -> SegmentationDataset:
    numbers = [each for each in options.get("sequences", ()) if not isinstance(each, str)]
    if numbers:
        raise ValueError(
            f"sequences has {numbers[0]!r}, a number: put names that YAML takes for one in quotes, "
            'as "0016E5"'
        )
    given = {**options_of(config.as_dict()), **options}
    return open_dataset(source, root, split, whole=whole, **given)


def _imported(path: str, options: dict[str, Any]) -> object:
    module, _, name = path.rpartition(".")
    if not module:
        raise OptionError(
            "transform", f"is {path!r}, expected paper, torchvision, none, or an import path"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError("transform", f"is {path}: {error}") from error
    if options or isinstance(found, type):
        try:
            return found(**options)
        except TypeError as error:
            raise OptionError("transform", f"is {path}: {error}") from error
    return found
