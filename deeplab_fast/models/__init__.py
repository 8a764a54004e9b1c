"""DeepLabv3 models: builders by name, with torchvision's interface."""

from ._registry import get_model, list_models
from .builders import (
    DeepLabOptions,
    deeplabv3_cascaded_resnet50,
    deeplabv3_cascaded_resnet101,
    deeplabv3_mobilenet_v2_tf,
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet18,
    deeplabv3_resnet34,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
    deeplabv3_resnet152,
)
from .deeplabv3 import DeepLabV3

__all__ = [
    "DeepLabOptions",
    "DeepLabV3",
    "deeplabv3_cascaded_resnet50",
    "deeplabv3_cascaded_resnet101",
    "deeplabv3_mobilenet_v2_tf",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet18",
    "deeplabv3_resnet34",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_resnet152",
    "get_model",
    "list_models",
]
