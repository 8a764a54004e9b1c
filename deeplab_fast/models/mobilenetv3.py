"""MobileNetV3-Large backbone (arXiv 1905.02244), with torchvision's names and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..program import match
from ..weights.inspect import recogniser
from ..weights.registry import ModelEntry
from ..weights.rules import Rule
from .backbone import IntermediateLayerGetter, set_dilation, set_stride
from .builders import Family, builder


@dataclass(frozen=True)
class Bneck:
    """A row of table 1: kernel, expansion, output channels, squeeze-and-excite, h-swish, stride."""

    kernel: int
    expanded: int
    out: int
    squeeze: bool
    hswish: bool
    stride: int


# The last stage and the channels behind it are halved: the "reduced tail" for segmentation
# (arXiv 1905.02244, section 6.4; torchvision's choice for ImageNet weights keeps them whole).
LARGE = (
    Bneck(3, 16, 16, False, False, 1),
    Bneck(3, 64, 24, False, False, 2),
    Bneck(3, 72, 24, False, False, 1),
    Bneck(5, 72, 40, True, False, 2),
    Bneck(5, 120, 40, True, False, 1),
    Bneck(5, 120, 40, True, False, 1),
    Bneck(3, 240, 80, False, True, 2),
    Bneck(3, 200, 80, False, True, 1),
    Bneck(3, 184, 80, False, True, 1),
    Bneck(3, 184, 80, False, True, 1),
    Bneck(3, 480, 112, True, True, 1),
    Bneck(3, 672, 112, True, True, 1),
    Bneck(5, 672, 160, True, True, 2),
    Bneck(5, 960, 160, True, True, 1),
    Bneck(5, 960, 160, True, True, 1),
)
_LAST_CHANNEL = 1280
_IMAGENET_CLASSES = 1000


class ConvNormAct(nn.Sequential):
    """conv, BN (eps 0.001, momentum 0.01), activation; padded to keep the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = None,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                stride,
                padding=kernel // 2,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels, eps=0.001, momentum=0.01),
        ]
        if act is not None:
            layers.append(act(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """x * hardsigmoid(fc2(relu(fc1(mean(x)))))."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


@match.rule(SqueezeExcitation)
def _squeeze_excitation(block: SqueezeExcitation) -> match.SqueezeExcite:
    fc1 = (block.fc1, block.activation)
    return match.SqueezeExcite(block, block.avgpool, fc1, (block.fc2,), block.scale_activation)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, squeeze-and-excite, project 1x1, residual where shapes allow it."""

    def __init__(self, in_channels: int, row: Bneck) -> None:
        super().__init__()
        act = nn.Hardswish if row.hswish else nn.ReLU
        layers: list[nn.Module] = []
        if row.expanded != in_channels:
            layers.append(ConvNormAct(in_channels, row.expanded, 1, act=act))
        depthwise = ConvNormAct(
            row.expanded, row.expanded, row.kernel, row.stride, groups=row.expanded, act=act
        )
        layers.append(depthwise)
        if row.squeeze:
            squeezed = make_divisible(row.expanded // 4)
            layers.append(SqueezeExcitation(row.expanded, squeezed))
        layers.append(ConvNormAct(row.expanded, row.out, 1))
        self.block = nn.Sequential(*layers)
        self.use_res_connect = row.stride == 1 and in_channels == row.out
        self.depthwise_index = len(layers) - 2 - int(row.squeeze)
        self.stride = row.stride

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result

    def set_atrous(self, stride: int, dilation: int) -> None:
        """Set stride and dilation of the depthwise convolution in place."""
        conv = cast(nn.Conv2d, cast(nn.Sequential, self.block[self.depthwise_index])[0])
        set_stride(conv, stride)
        set_dilation(conv, dilation)


@match.rule(InvertedResidual)
def _inverted_residual(block: InvertedResidual) -> match.Block:
    return match.Block(block, (block.block,), block.use_res_connect)


class MobileNetV3Backbone(IntermediateLayerGetter):
    """MobileNetV3-Large features "out" (960 channels) and, if asked, "aux" (40 channels, stride 8).

    Args:
        output_stride: 16 (torchvision's) or 8.
        aux: also return the features at stride 8.
        reduced_tail: halve the channels of the last stage (arXiv 1905.02244, section 6.4).

    State: keys 0 to 16, torchvision's `features`.
    """

    def __init__(
        self, output_stride: int = 16, aux: bool = False, reduced_tail: bool = False
    ) -> None:
        rows = [_reduced(row, i) if reduced_tail else row for i, row in enumerate(LARGE)]
        layers: list[nn.Module] = [ConvNormAct(3, 16, 3, stride=2, act=nn.Hardswish)]
        channels = 16
        for row in rows:
            layers.append(InvertedResidual(channels, row))
            channels = row.out
        out_channels = 6 * channels
        layers.append(ConvNormAct(channels, out_channels, 1, act=nn.Hardswish))
        net = nn.Module()
        net.features = nn.Sequential(*layers)
        # Drawn and thrown away, so that one seed gives torchvision's weights.
        last = _LAST_CHANNEL // 2 if reduced_tail else _LAST_CHANNEL
        net.classifier = nn.Sequential(
            nn.Linear(out_channels, last), nn.Linear(last, _IMAGENET_CLASSES)
        )
        _initialise(net)
        aux_layer = 4
        return_layers = {str(len(layers) - 1): "out"}
        if aux:
            return_layers[str(aux_layer)] = "aux"
        super().__init__(net.features, return_layers)
        self.out_channels = out_channels
        self.aux_channels = rows[aux_layer - 1].out
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """16: the last stage is dilated, its first block too, as torchvision has it; 8: also C3.

        The block that gives up its stride at C3 keeps dilation 1 and those behind it get twice
        theirs, so that every other pixel of the map at 8 is the map at 16.
        """
        c3, c4 = (i for i, row in enumerate(LARGE, start=1) if row.stride == 2 and row.out >= 80)
        for i, block in enumerate(self.values()):
            if not isinstance(block, InvertedResidual):
                continue
            dilation = (2 if i >= c4 else 1) * (2 if i > c3 and output_stride == 8 else 1)
            given_up = i == c4 or (i == c3 and output_stride == 8)
            block.set_atrous(1 if given_up else block.stride, dilation)
        self.output_stride = output_stride


def make_divisible(value: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` that is not more than 10 % below `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _reduced(row: Bneck, index: int) -> Bneck:
    if index < len(LARGE) - 3:
        return row
    expanded = row.expanded if index == len(LARGE) - 3 else row.expanded // 2
    return Bneck(row.kernel, expanded, row.out // 2, row.squeeze, row.hswish, row.stride)


def _initialise(net: nn.Module) -> None:
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            # Only the stream of random numbers matters: these weights are not kept.
            torch.nn.init.normal_(m.weight, 0, 0.01)


deeplabv3_mobilenet_v3_large = builder(
    "deeplabv3_mobilenet_v3_large",
    Family(
        backbone=MobileNetV3Backbone,
        output_stride=16,
        # torchvision's rates at output stride 16 are those that the paper has at 8.
        rates={16: (12, 24, 36), 8: (24, 48, 72)},
        backbone_enum="MobileNet_V3_Large_Weights",
    ),
    __name__,
    """DeepLabv3 on MobileNetV3-Large; arguments as of `deeplabv3_resnet50`.

    The output stride is 16 and the rates 12, 24, 36 by default, as torchvision has them.
    """,
)

ENTRY = ModelEntry(
    builders=(deeplabv3_mobilenet_v3_large,),
    recognise=recogniser(
        "deeplabv3_mobilenet_v3_large", "backbone.0.0.weight", "backbone.16.0.weight"
    ),
    foreign={"imagenet": (Rule(r"features\.(.+)", r"backbone.\1"),)},
    classifier=r"features\.0\.0\.weight",
    enums={"deeplabv3_mobilenet_v3_large": "DeepLabV3_MobileNet_V3_Large_Weights"},
    backbone="MobileNetV3-Large",
)
