"""How a data set is described to ``open_dataset``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deeplab_fast.data.datasets.base import SegmentationDataset

Spec = dict[str, Any]
"""Options of a data set by name, ``classes`` a ``ClassSet``."""


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk: its opener, splits, options, classes, and what it consists of.

    ``open(root, split, spec)`` gives the data set.

    ``splits`` is empty where the data say which there are; those of no such data are split by name
    and seed.
    """

    open: Callable[..., SegmentationDataset]
    splits: tuple[str, ...]
    holds: str
    classes: str | None = None
    options: tuple[str, ...] = ()
