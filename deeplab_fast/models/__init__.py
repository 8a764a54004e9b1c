"""DeepLabv3 models: builders by name, with torchvision's interface."""

from ..weights.registry import get_model, get_model_weights, list_models, register
from . import efficientnet_lite, fregu856, mobilenetv2, mobilenetv3, resnet
from .builders import DeepLabOptions, load
from .deeplabv3 import DeepLabV3
from .efficientnet_lite import deeplabv3_efficientnet_lite0
from .fregu856 import (
    fregu856_resnet18,
    fregu856_resnet34,
    fregu856_resnet50,
    fregu856_resnet101,
    fregu856_resnet152,
)
from .mobilenetv2 import deeplabv3_mobilenet_v2_tf
from .mobilenetv3 import deeplabv3_mobilenet_v3_large
from .resnet import (
    deeplabv3_cascaded_resnet50,
    deeplabv3_cascaded_resnet101,
    deeplabv3_resnet18,
    deeplabv3_resnet34,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
    deeplabv3_resnet152,
)

# fregu856's models are ResNets that ResNet's own recogniser would take for its own.
register(
    fregu856.ENTRY, resnet.ENTRY, mobilenetv3.ENTRY, efficientnet_lite.ENTRY, mobilenetv2.ENTRY
)

__all__ = [
    "DeepLabOptions",
    "DeepLabV3",
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
    "get_model",
    "get_model_weights",
    "list_models",
    "load",
]
