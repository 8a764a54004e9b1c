"""DeepLabv3 models: builders by name, with torchvision's interface."""

from ._registry import get_model, get_model_weights, list_models
from .builders import (
    DeepLabOptions,
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
)
from .deeplabv3 import DeepLabV3
from .fregu856 import (
    fregu856_resnet18,
    fregu856_resnet34,
    fregu856_resnet50,
    fregu856_resnet101,
    fregu856_resnet152,
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
]
