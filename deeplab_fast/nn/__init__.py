"""Modules of DeepLabv3, with torchvision's names and state_dict keys."""

from .aspp import ASPP, ASPPConv, ASPPPooling, SingleValueBatchNorm2d
from .heads import HEADS, CascadedHead, DeepLabHead, DeepLabV2Head, FCNHead, MMSegHead, PaperHead

__all__ = [
    "ASPP",
    "HEADS",
    "ASPPConv",
    "ASPPPooling",
    "CascadedHead",
    "DeepLabHead",
    "DeepLabV2Head",
    "FCNHead",
    "MMSegHead",
    "PaperHead",
    "SingleValueBatchNorm2d",
]
