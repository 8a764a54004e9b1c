"""The data sets and the augmentation that a training config names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from deeplab_fast.data.datasets import SegmentationDataset, open_dataset, parse_label_map
from deeplab_fast.data.preprocess import IMAGENET_MEAN
from deeplab_fast.data.transforms import (
    Compose,
    Transform,
    adapt,
    paper_training,
    torchvision_training,
)
from deeplab_fast.engine.augment import ColourJitter
from deeplab_fast.engine.config import TrainConfig

__all__ = ["open_training", "open_validation", "training_transform"]


def training_transform(
    config: TrainConfig, mean: Sequence[float] = IMAGENET_MEAN, ignore_index: int = 255
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
        )
    elif config.transform == "torchvision":
        transform = torchvision_training(
            config.base_size, config.crop_size, flip=config.flip, ignore_index=ignore_index
        )
    elif config.transform == "none":
        transform = None
    else:
        try:
            transform = adapt(_imported(config.transform, config.transform_options))
        except TypeError as error:
            raise ValueError(f"transform {config.transform}: {error}") from error
    if not (config.colour_jitter or config.hue_jitter):
        return transform
    strength = config.colour_jitter
    jitter = ColourJitter(strength, strength, strength, config.hue_jitter)
    # Last: a crop has fewer pixels than the photo.
    return jitter if transform is None else Compose(transform, jitter)


def open_training(config: TrainConfig) -> SegmentationDataset:
    """The data set to train on."""
    if not config.data:
        raise ValueError("data is missing: which data set shall be trained on?")
    return _open(config, config.data, config.root, config.split, config.data_options)


def open_validation(config: TrainConfig) -> SegmentationDataset:
    """The data set to validate on."""
    source = config.val_data or config.data
    if not source:
        raise ValueError("data is missing: which data set shall be validated on?")
    root = config.val_root if config.val_root or config.val_data else config.root
    options = config.val_options if config.val_options or config.val_data else {}
    return _open(config, source, root, config.val_split, options)


def _open(
    config: TrainConfig, source: str, root: str | None, split: str | None, options: dict[str, Any]
) -> SegmentationDataset:
    split = None if split == "all" else split
    numbers = [each for each in options.get("sequences", ()) if not isinstance(each, str)]
    if numbers:
        raise ValueError(
            f"sequences has {numbers[0]!r}, a number: put names that YAML takes for one in quotes, "
            'as "0016E5"'
        )
    given: dict[str, Any] = {"classes": config.classes, "ignore_index": config.ignore_index}
    if config.label_map is not None:
        given |= {"label_map": parse_label_map(config.label_map), "unmapped": "keep"}
    return open_dataset(source, root, split, **{**given, **options})


def _imported(path: str, options: dict[str, Any]) -> object:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"transform is {path!r}, expected paper, torchvision, none, or an import path "
            "package.module.name"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"transform {path}: {error}") from error
    if options or isinstance(found, type):
        try:
            return found(**options)
        except TypeError as error:
            raise ValueError(f"transform {path}: {error}") from error
    return found
