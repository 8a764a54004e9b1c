"""DeepLabv3 (arXiv 1706.05587) as a drop-in, faster and smaller-in-memory package.

import deeplab_fast as dlf

model = dlf.deeplabv3_resnet50(weights="checkpoint.pth").eval()
labels = model.predict("photo.jpg")
"""

from pathlib import Path as _Path

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
from .models import (
    DeepLabV3,
    deeplabv3_cascaded_resnet50,
    deeplabv3_cascaded_resnet101,
    deeplabv3_efficientnet_lite0,
    deeplabv3_mobilenet_v2_tf,
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet18,
    deeplabv3_resnet34,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
    deeplabv3_resnet152,
    fregu856_resnet18,
    fregu856_resnet34,
    fregu856_resnet50,
    fregu856_resnet101,
    fregu856_resnet152,
    get_model,
    get_model_weights,
    list_models,
)
from .program.optimize import OptimizedDeepLabV3, optimize
from .program.training import fuse
from .tuning.api import tune
from .weights import from_checkpoint, load, load_weights, save_weights

__all__ = [
    "DeepLabV3",
    "OptimizedDeepLabV3",
    "__version__",
    "backends",
    "deeplabv3_cascaded_resnet50",
    "deeplabv3_cascaded_resnet101",
    "deeplabv3_efficientnet_lite0",
    "deeplabv3_mobilenet_v2_tf",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet18",
    "deeplabv3_resnet34",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_resnet152",
    "fregu856_resnet18",
    "fregu856_resnet34",
    "fregu856_resnet50",
    "fregu856_resnet101",
    "fregu856_resnet152",
    "from_checkpoint",
    "fuse",
    "get_model",
    "get_model_weights",
    "list_models",
    "load",
    "load_weights",
    "models",
    "ops",
    "optimize",
    "reference",
    "save_weights",
    "tune",
    "use_backend",
    "why",
]
