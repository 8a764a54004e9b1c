"""What ``import deeplab_fast`` offers: the first of these names that is asked for imports all."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import _ext as _ext
from . import backends, models, ops, reference
from ._version import __version__
from .backends import use_backend, why
from .models import *  # noqa: F403
from .program.accelerate import accelerate, accelerate_report, restore
from .program.optimize import OptimizedDeepLabV3, optimize
from .program.training import fuse
from .tuning.api import tune
from .weights import from_checkpoint, load_weights, save_weights

if _TYPE_CHECKING:
    from .exporting import export, load_exported

__all__ = [
    "OptimizedDeepLabV3",
    "__version__",
    "accelerate",
    "accelerate_report",
    "backends",
    "export",
    "from_checkpoint",
    "fuse",
    "load_exported",
    "load_weights",
    "models",
    "ops",
    "optimize",
    "reference",
    "restore",
    "save_weights",
    "tune",
    "use_backend",
    "why",
]
__all__ += models.__all__


def __getattr__(name: str) -> object:
    # An eighth of the time of this import, for what few processes do.
    if name in ("export", "load_exported"):
        from . import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
