"""Checkpoints: reading files, foreign key layouts, loading with a report, saving."""

from ._common import CheckpointError
from .any_module import load_module
from .embedded import embedded_path, list_embedded, model_card
from .files import read_content, read_state_dict
from .from_file import from_checkpoint, load, restore_settings, warn_of_assumptions
from .inspect import WeightsInfo, inspect_weights
from .layouts import LAYOUTS, Layout
from .load import LoadReport, load_weights
from .rules import Rule
from .save import model_metadata, save_weights
from .where import find_weights

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "LoadReport",
    "Rule",
    "WeightsInfo",
    "embedded_path",
    "find_weights",
    "from_checkpoint",
    "inspect_weights",
    "list_embedded",
    "load",
    "load_module",
    "load_weights",
    "model_card",
    "model_metadata",
    "read_content",
    "read_state_dict",
    "restore_settings",
    "save_weights",
    "warn_of_assumptions",
]
