"""Checkpoints: reading files, foreign key layouts, loading with a report, saving."""

from ._common import CheckpointError
from .files import model_metadata, read_state_dict, save_weights
from .inspect import WeightsInfo, inspect_weights
from .layouts import LAYOUTS, Layout, Rule
from .load import LoadReport, from_checkpoint, load_weights

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "LoadReport",
    "Rule",
    "WeightsInfo",
    "from_checkpoint",
    "inspect_weights",
    "load_weights",
    "model_metadata",
    "read_state_dict",
    "save_weights",
]
