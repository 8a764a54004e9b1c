"""DeepLabv3 (arXiv 1706.05587) as a drop-in, faster and smaller-in-memory package.

import deeplab_fast as dlf

model = dlf.deeplabv3_resnet50(weights="checkpoint.pth").eval()
labels = model.predict("photo.jpg")
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a checkout that is not installed the Triton kernels lie beside this folder, not in it.
# A wheel has them inside, so the condition is false there.
_root = _Path(__file__).resolve().parent.parent
if (
    not (_Path(__file__).resolve().parent / "kernels").is_dir()
    and (_root / "kernels" / "__init__.py").is_file()
):
    __path__.append(str(_root))

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
