"""The data sets and the augmentation that a training config names."""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Iterable, Sequence
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
from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine.augment import ColourJitter
from deeplab_fast.engine.config import OptionError, TrainConfig
from deeplab_fast.weights.where import find_weights

__all__ = [
    "has_own_validation",
    "open_training",
    "open_validation",
    "seen_in_both",
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
    whole = has_own_validation(config) or not config.val_every
    whole = whole and config.val_fraction is None
    return _open(config, config.data, config.root, config.split, config.data_options, whole=whole)


def has_own_validation(config: TrainConfig) -> bool:
    """Whether a config names data to validate on beside those to train on: others, or elsewhere."""
    if config.val_data:
        return True
    if not config.val_root:
        return False
    source = Path(config.data or "")
    root = config.root or (source.parent if source.suffix.lower() == ".csv" else None)
    return root is None or os.path.realpath(root) != os.path.realpath(config.val_root)


def open_validation(config: TrainConfig) -> SegmentationDataset | None:
    """The data set to validate on; None with ``val_fraction=0`` and no data for validation."""
    source = config.val_data or config.data
    if not source:
        raise OptionError("data", "is missing: which data set shall be validated on?")
    if has_own_validation(config):
        options = config.val_options
        # Data of their own are validated on as a whole.
        config = config.replace(val_fraction=None)
        return _open(config, source, config.val_root, config.val_split, options, whole=True)
    if config.val_fraction == 0 and config.val_split == "val":
        return None
    root = config.val_root or config.root
    return _open(config, source, root, config.val_split, config.val_options, whole=False)


def seen_in_both(
    train: SegmentationDataset, val: SegmentationDataset | None, config: TrainConfig | None = None
) -> str:
    """A line on photos that are trained and validated on, "" for none.

    Files are compared by their real paths, whatever names and links lead to them.

    Args:
        config: what both were opened by; None: they were opened otherwise.

    Raises:
        ValueError: there are such although both are parts that were made of the same pairs.
    """
    if val is None:
        return ""
    trained = set(_real_paths(sample.image for sample in train.samples))
    held = _real_paths(sample.image for sample in val.samples)
    names = dict(zip(held, (sample.name for sample in val.samples), strict=True))
    both = [name for path, name in names.items() if path in trained]
    if not both:
        return ""
    shown = ", ".join(both[:3]) + (", ..." if len(both) > 3 else "")
    text = f"{len(both)} of {len(names)} images to validate on are trained on as well ({shown})"
    made_here = train.split_here and val.split_here
    if made_here and config is not None and not has_own_validation(config):
        raise ValueError(
            f"{text}, though the pairs were split by name; both parts need the same fraction, seed "
            "and groups, so give them by --val-fraction, --split-seed and --group-by and not in "
            "--data-options or --val-options, and list each photo once"
        )
    return (
        f"warning: {text}: the scores of the validation are not those of unseen images; "
        "--split and --val-split, or --val-data, name parts that have none in common"
    )


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
    """How many of these photos a run trained on that left its weights with its ``split.csv``.

    The table lies beside the weights, or in one of the two folders above where that is a run's. 0
    where there is no such table. Files are compared by their real paths.

    Args:
        weights: a file, or the folder of a run, of one stage or two, as ``find_weights`` takes.
        dataset: whose photos are counted.

    Returns:
        The number, and the table's path.
    """
    try:
        path = find_weights(weights)
    # Loading them says why.
    except (OSError, ValueError):
        path = Path(weights)
    table = _table_of(path)
    rows = [row for row in _rows(table) if row["split"] == "train"]
    trained = set(_real_paths(table.parent / row["image"] for row in rows))
    photos = _real_paths(sample.image for sample in dataset.samples) if trained else []
    return sum(photo in trained for photo in photos), table


def _table_of(weights: Path) -> Path:
    own = weights.parent / "split.csv"
    folders = weights.parent.absolute().parents[:2]
    # Above, a table of that name may be the data's own.
    of_runs = [f / own.name for f in folders if (f / "config.yaml").is_file()]
    return next((table for table in (own, *of_runs) if table.is_file()), own)


def _real_paths(files: Iterable[Path]) -> list[str]:
    """Paths without links; each folder is looked up once."""
    folders: dict[Path, str] = {}
    found = []
    for file in files:
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        path = os.path.join(folders[file.parent], file.name)
        found.append(os.path.realpath(path) if os.path.islink(path) else path)
    return found


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
            "as '[\"0016E5\"]' in a shell"
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
