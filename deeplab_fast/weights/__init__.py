"""Checkpoints: reading files, foreign key layouts, loading with a report, saving."""

from ._common import CheckpointError
from .embedded import embedded_path, list_embedded, load, model_card
from .files import model_metadata, read_state_dict, save_weights
from .inspect import WeightsInfo, inspect_weights
from .layouts import LAYOUTS, Layout, Rule
from .load import (
    LoadReport,
    from_checkpoint,
    load_weights,
    restore_settings,
    warn_of_assumptions,
)

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "LoadReport",
    "Rule",
    "WeightsInfo",
    "embedded_path",
    "from_checkpoint",
    "inspect_weights",
    "list_embedded",
    "load",
    "load_weights",
    "model_card",
    "model_metadata",
    "read_state_dict",
    "restore_settings",
    "save_weights",
    "warn_of_assumptions",
]
