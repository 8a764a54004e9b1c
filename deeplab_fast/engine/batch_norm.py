"""Freezing batch norm for training; the layers are in :mod:`deeplab_fast.nn.batch_norm`."""

from deeplab_fast.nn.batch_norm import (
    FROZEN_STATE,
    convert_sync_batch_norm,
    freeze_batch_norm,
    frozen_batch_norms,
    thawed_class,
    unfreeze_batch_norm,
)

# Where pickles of earlier versions look for it.
from deeplab_fast.nn.batch_norm import remake as _remake  # noqa: F401

__all__ = [
    "FROZEN_STATE",
    "convert_sync_batch_norm",
    "freeze_batch_norm",
    "frozen_batch_norms",
    "thawed_class",
    "unfreeze_batch_norm",
]
