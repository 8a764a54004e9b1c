"""Rules of layers of other libraries that compute with parameters of their own.

Modules that are made of others need none: their forwards are followed (`trace`). A layer here is
taken as a layer of PyTorch's, a stand-in that shares its parameters and buffers, and what stands
before and behind it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import match
from .intact import is_plain
from .layers import SamePadding
from .stand_ins import stand_in


class SamePadded(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]."""
        same = SamePadding(self.kernel_size, self.stride, self.dilation)
        sides = same.sides(x.shape)
        rows, columns = same.halves
        x = F.pad(x, sides or [columns, columns, rows, rows])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@match.rule_of_library("timm.layers.norm_act.BatchNormAct2d")
def _norm_act(module: Any) -> match.Segment:
    norm = match.Norm(stand_in(nn.BatchNorm2d, module))
    return match.Members(module, (norm, module.drop, module.act))


@match.rule_of_library("timm.layers.norm_act.SyncBatchNormAct")
def _sync_norm_act(module: Any) -> match.Segment:
    rest = [child for child in (module._modules.get("drop"), module._modules.get("act")) if child]
    return match.Members(module, (match.Norm(stand_in(nn.SyncBatchNorm, module)), *rest))


@match.rule_of_library(
    "timm.layers.conv2d_same.Conv2dSame",
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dDynamicSamePadding",
)
def _same_conv(module: Any) -> match.Segment:
    return match.convolution(stand_in(SamePadded, module), same=True)


@match.rule_of_library(
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ConvLayer"
)
def _mobilenet_v2_layer(module: Any) -> match.Segment:
    conv: match.Item = module.convolution
    if module.config.tf_padding:
        # A stand-in's hooks are not called where it is part of a unit.
        if not is_plain(module.convolution):
            return match.Plain(module)
        conv = match.convolution(stand_in(SamePadded, module.convolution), same=True)
    rest = [each for each in (module.normalization, module.activation) if each is not None]
    return match.Members(module, (conv, *rest))
