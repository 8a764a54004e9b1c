"""MobileNetV2 backbone (arXiv 1801.04381) in the form of TensorFlow's DeepLab."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.preprocess import Preprocess
from ..nn import PaperHead
from ..plan.symbols import is_known
from ..program import match
from ..weights.load import check_described, open_weights
from ..weights.registry import Found, ModelEntry
from ..weights.rules import Rule, hwcm, slim
from .backbone import IntermediateLayerGetter, set_dilation, set_stride
from .builders import agree, check_channels, check_num_classes, check_rates, load_file
from .deeplabv3 import DeepLabV3, check_output_stride
from .mobilenetv3 import make_divisible

NORMS = ("batch", "folded")


@dataclass(frozen=True)
class InvertedResidualRow:
    """A block of table 2: expansion factor, output channels at width 1, stride."""

    expansion: int
    out: int
    stride: int


ROWS = tuple(
    InvertedResidualRow(t, c, s if i == 0 else 1)
    for t, c, n, s in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for i in range(n)
)


class SamePadConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(size / stride) outputs.

    The padding needed is split in two, and an odd one is larger at the bottom and the right; at
    stride 2 an even size is padded at those sides only.
    """

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = _same(x.size(2), self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = _same(x.size(3), self.kernel_size[1], self.stride[1], self.dilation[1])
        padding = [0, 0]
        if is_known(top == bottom) and is_known(left == right):
            # oneDNN's backward of a dilated depthwise 5x5 takes 3.6 times as long on a padded copy.
            padding = [top, left]
        else:
            x = F.pad(x, [left, right, top, bottom])
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


@match.rule(SamePadConv2d)
def _same_pad_conv(conv: SamePadConv2d) -> match.Segment:
    return match.convolution(conv, same=True)


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    reach = (kernel - 1) * dilation
    if stride == 1:
        needed = reach
    else:
        outputs = (size + stride - 1) // stride
        needed = (outputs - 1) * stride + reach + 1 - size
        # Else it is never negative, which need not be asked of a symbolic size.
        if reach + 1 < stride:
            needed = max(needed, 0)
    return needed // 2, needed - needed // 2


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: bool = True,
    norm: str = "batch",
    momentum: float = 0.0003,
) -> nn.Sequential:
    """Convolution, BN (eps 0.001) and ReLU6; with norm="folded" a biased convolution, no BN.

    State: conv.weight[, conv.bias][, bn.*].
    """
    folded = norm == "folded"
    conv = SamePadConv2d if kernel > 1 else nn.Conv2d
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=conv(in_channels, out_channels, kernel, stride, groups=groups, bias=folded)
    )
    if not folded:
        # TensorFlow's moving-average decay 0.9997 is a momentum of 0.0003 here.
        layers["bn"] = nn.BatchNorm2d(out_channels, eps=0.001, momentum=momentum)
    if act:
        layers["act"] = nn.ReLU6(inplace=True)
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """expand 1x1, depthwise, project 1x1 without activation, residual where shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        expansion: int,
        out_channels: int,
        stride: int,
        norm: str = "batch",
        kernel: int = 3,
        momentum: float = 0.0003,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layer = functools.partial(conv_norm, norm=norm, momentum=momentum)
        self.expand = layer(in_channels, hidden) if expansion > 1 else None
        self.depthwise = layer(hidden, hidden, kernel, stride, groups=hidden)
        self.project = layer(hidden, out_channels, act=False)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None:
            y = self.expand(y)
        y = self.project(self.depthwise(y))
        if self.use_res_connect:
            y = y + x
        return y

    def set_atrous(self, stride: int, dilation: int) -> None:
        """Set stride and dilation of the depthwise convolution in place."""
        conv = cast(nn.Conv2d, self.depthwise.conv)
        set_stride(conv, stride)
        set_dilation(conv, dilation)


@match.rule(InvertedResidual)
def _inverted_residual(block: InvertedResidual) -> match.Block:
    parts = [p for p in (block.expand, block.depthwise, block.project) if p is not None]
    return match.Block(block, parts, block.use_res_connect)


class MobileNetV2Backbone(IntermediateLayerGetter):
    """MobileNetV2 features "out", up to the last inverted residual, with SAME padding.

    Args:
        output_stride: 8 or 16.
        width: multiplier of the channels (TensorFlow's depth_multiplier).
        norm: "batch", or "folded" for weights whose batch norm is folded already.

    State: Conv, expanded_conv, expanded_conv_1 to expanded_conv_16, as TensorFlow names them.
    """

    def __init__(self, output_stride: int = 16, width: float = 1.0, norm: str = "batch") -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if width <= 0:
            raise ValueError(f"width must be above 0, got {width}")
        # TensorFlow's DeepLab rounds channels to eights only at width 1.
        divisor = 8 if width == 1.0 else 1
        net = nn.Module()
        channels = make_divisible(32 * width, divisor)
        net.Conv = conv_norm(3, channels, 3, stride=2, norm=norm)
        for i, row in enumerate(ROWS):
            out = make_divisible(row.out * width, divisor)
            block = InvertedResidual(channels, row.expansion, out, row.stride, norm)
            net.add_module("expanded_conv" if i == 0 else f"expanded_conv_{i}", block)
            channels = out
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        super().__init__(net, {f"expanded_conv_{len(ROWS) - 1}": "out"})
        self.out_channels = channels
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """Exchange strides for dilation; a block that gives up its stride keeps the one before."""
        dilate_blocks(self.values(), output_stride)
        self.output_stride = output_stride


def dilate_blocks(modules: Iterable[nn.Module], output_stride: int) -> None:
    """Set strides and dilations of the inverted residuals behind a stem of stride 2, in place.

    A block whose stride would pass the output stride gives it up and keeps the dilation before it,
    as the stride acted behind that filter; those behind it are dilated by the stride given up.
    """
    reached, dilation = 2, 1
    for block in modules:
        if not isinstance(block, InvertedResidual):
            continue
        stride, own = block.stride, dilation
        if reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        block.set_atrous(stride, own)


def fold_form(module: nn.Module) -> nn.Module:
    """Exchange each convolution + batch norm in sequences for a biased convolution, in place.

    For weights that come with their batch norm folded; keys of the convolutions stay.
    """
    for sequence in module.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        for i in range(len(sequence) - 1):
            conv = sequence[i]
            if isinstance(conv, nn.Conv2d) and isinstance(sequence[i + 1], nn.BatchNorm2d):
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
                sequence[i + 1] = nn.Identity()
    return module


_WIDEST = 16.0


def deeplabv3_mobilenet_v2_tf(
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    output_stride: int = 16,
    width: float = 1.0,
    norm: str = "batch",
    atrous_rates: Sequence[int] = (),
    aspp_channels: int = 256,
) -> DeepLabV3:
    """DeepLabv3 on MobileNetV2 in the form of TensorFlow's DeepLab.

    SAME padding, ReLU6, corners aligned, input RGB / 127.5 - 1; by default no atrous branches: a
    1x1 branch and image pooling, projected and classified.

    Args:
        weights: path of a checkpoint (`load_weights`), or None.
        num_classes: 21 by default; with weights, what they have.
        output_stride: 8 or 16.
        width: multiplier of the channels (depth_multiplier there).
        norm: "batch", or "folded" for weights whose batch norm is folded into biases.
        atrous_rates: dilations of atrous 3x3 branches, none by default.
        aspp_channels: channels of each branch and of the projection.

    Raises:
        ValueError: a value that does not fit; the message says which.

    Source: arXiv 1801.04381, section 6.3 (semantic segmentation).
    """
    given: dict[str, Any] = {
        "output_stride": output_stride,
        "width": width,
        "norm": norm,
        "atrous_rates": tuple(atrous_rates),
        "aspp_channels": aspp_channels,
    }
    opened = None if weights is None else open_weights(weights)
    if opened is not None:
        num_classes = agree("num_classes", num_classes, opened.info.num_classes)
        if opened.info.model == "deeplabv3_mobilenet_v2_tf":
            check_described(opened)
            given.update(opened.info.options)
    num_classes = check_num_classes(num_classes)
    check_output_stride(given["output_stride"])
    check_rates(given["atrous_rates"])
    check_channels(given["aspp_channels"])
    if not isinstance(given["width"], (int, float)) or not 0 < given["width"] <= _WIDEST:
        raise ValueError(f"width must be above 0 and at most {_WIDEST}, got {given['width']!r:.80}")
    backbone = MobileNetV2Backbone(given["output_stride"], given["width"], given["norm"])
    head = PaperHead(
        backbone.out_channels,
        num_classes,
        given["atrous_rates"],
        given["aspp_channels"],
        dropout=0.1,
    )
    if given["norm"] == "folded":
        fold_form(head)
    model = DeepLabV3(backbone, head, align_corners=True)
    model.preprocess = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model.config = ("deeplabv3_mobilenet_v2_tf", {"num_classes": num_classes, **given})
    if opened is not None:
        load_file(model, opened)
    return model


def _recognise(state: Mapping[str, Tensor]) -> Found | None:
    stem = state.get("backbone.Conv.conv.weight")
    if stem is None:
        return None
    options: dict[str, Any] = {}
    found = []
    for i in range(len(ROWS)):
        name = "expanded_conv" if i == 0 else f"expanded_conv_{i}"
        weight = state.get(f"backbone.{name}.project.conv.weight")
        found.append(None if weight is None else weight.shape[0])
    exact = stem.shape[0] / 32
    # 45 channels, say, are those of width 1.4.
    candidates = (exact, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25)
    width = next(
        (w for w in candidates if found == [make_divisible(row.out * w, 1) for row in ROWS]), exact
    )
    if width != 1.0:
        options["width"] = width
    if "backbone.Conv.conv.bias" in state:
        options["norm"] = "folded"
    project = state.get("classifier.0.project.0.weight")
    if project is not None and project.shape[0] != 256:
        options["aspp_channels"] = project.shape[0]
    if "classifier.0.convs.4.1.weight" in state:
        # TensorFlow DeepLab's rates at output stride 16; they are not in the weights.
        options["atrous_rates"] = (6, 12, 18)
    return "deeplabv3_mobilenet_v2_tf", options


ENTRY = ModelEntry(
    builders=(deeplabv3_mobilenet_v2_tf,),
    recognise=_recognise,
    foreign={
        "tflite": (
            Rule(
                r"MobilenetV2\.(Conv|expanded_conv(?:_\d+)?\.(?:expand|depthwise|project))\.(.+)",
                r"backbone.\1.conv.\2",
            ),
        ),
        "slim": (
            # The classifier's layers, which DeepLab does not use.
            Rule(r"MobilenetV2/(?:Conv_1|Logits)/.+", None),
            Rule(
                r"MobilenetV2/(expanded_conv(?:_\d+)?)/depthwise/depthwise_weights",
                r"backbone.\1.depthwise.conv.weight",
                hwcm,
            ),
            *slim(r"MobilenetV2/(Conv)", r"backbone.\1.conv", r"backbone.\1.bn"),
            *slim(
                r"MobilenetV2/(expanded_conv(?:_\d+)?)/(expand|depthwise|project)",
                r"backbone.\1.\2.conv",
                r"backbone.\1.\2.bn",
            ),
        ),
    },
    leaves=(SamePadConv2d,),
    backbone="TensorFlow's MobileNetV2",
)
