"""ResNet backbones (arXiv 1512.03385; stride on the 3x3, as torchvision) with atrous stages."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..program import match
from ..weights.inspect import head_options
from ..weights.libraries import basic_blocks
from ..weights.registry import Found, ModelEntry
from ..weights.rules import Rule
from .backbone import IntermediateLayerGetter, plan_stages, set_dilation, set_stride
from .builders import Family, builder
from .deeplabv3 import DeepLabV3

STEMS = ("torchvision", "deep")


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual; both can be dilated, which torchvision's cannot."""

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def set_atrous(self, stride: int, dilations: tuple[int, int]) -> None:
        """Set the stride and the dilations of the two 3x3 convolutions in place."""
        set_stride(self.conv1, stride)
        set_dilation(self.conv1, dilations[0])
        set_dilation(self.conv2, dilations[1])


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, dilated), 1x1 with a residual."""

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = _conv1x1(in_channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def set_atrous(self, stride: int, dilations: tuple[int, int]) -> None:
        """Set the stride and the dilation of the 3x3 convolution in place."""
        set_stride(self.conv2, stride)
        set_dilation(self.conv2, dilations[0])


@match.rule(BasicBlock)
def _basic_block(block: BasicBlock) -> match.Block:
    modules = (block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
    return match.Block(block, modules, True, block.downsample, block.relu)


@match.rule(Bottleneck)
def _bottleneck(block: Bottleneck) -> match.Block:
    first = (block.conv1, block.bn1, block.relu, block.conv2, block.bn2, block.relu)
    modules = (*first, block.conv3, block.bn3)
    return match.Block(block, modules, True, block.downsample, block.relu)


@dataclass(frozen=True)
class ResNetSpec:
    """Block type and number of blocks of layer1 to layer4."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]


RESNETS = {
    18: ResNetSpec(BasicBlock, (2, 2, 2, 2)),
    34: ResNetSpec(BasicBlock, (3, 4, 6, 3)),
    50: ResNetSpec(Bottleneck, (3, 4, 6, 3)),
    101: ResNetSpec(Bottleneck, (3, 4, 23, 3)),
    152: ResNetSpec(Bottleneck, (3, 8, 36, 3)),
}

# A classifier as large as torchvision's unused one is drawn and thrown away, so that one seed gives
# both libraries the same weights.
_IMAGENET_CLASSES = 1000


class ResNetBackbone(IntermediateLayerGetter):
    """ResNet features "out" (last stage) and, if asked, "aux" (layer3).

    Args:
        depth: 18, 34, 50, 101 or 152.
        output_stride: 8 or 16.
        replace_stride_with_dilation: whether layer2, layer3, layer4 give up their stride for
            dilation, in place of output_stride.
        multi_grid: unit rates of the blocks of layer4 and of the cascaded stages behind it; the
            dilation of a block is the stage's times its unit rate (arXiv 1706.05587, 3.2.1). None:
            torchvision's dilation.
        contract_dilation: in a dilated stage without multi_grid the first 3x3 keeps the dilation
            before it, as in torchvision and mmsegmentation; segmentation-models-pytorch has False.
        stem: "torchvision" (7x7) or "deep" (three 3x3: ResNet-C, mmsegmentation's v1c).
        aux: also return layer3.
        cascaded: number of copies of layer4 behind it, layer5 and on (arXiv 1706.05587, 3.2).

    State: conv1, bn1, layer1..4[.. 4 + cascaded], as torchvision's without fc.
    """

    def __init__(
        self,
        depth: int,
        output_stride: int = 8,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = True,
        stem: str = "torchvision",
        aux: bool = False,
        cascaded: int = 0,
    ) -> None:
        if depth not in RESNETS:
            raise ValueError(f"ResNet depth must be one of {sorted(RESNETS)}, got {depth}")
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {stem!r}")
        if replace_stride_with_dilation is not None and len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None or a 3-element tuple, got "
                f"{replace_stride_with_dilation}"
            )
        spec = RESNETS[depth]
        out_channels = 512 * spec.block.expansion
        stages = (*spec.blocks, *[spec.blocks[3]] * cascaded)
        if multi_grid is not None and len(multi_grid) != spec.blocks[3]:
            raise ValueError(
                f"multi_grid needs one unit rate for each of the {spec.blocks[3]} blocks of "
                f"ResNet-{depth}'s layer4, got {tuple(multi_grid)}"
            )
        if multi_grid is not None and min(multi_grid) < 1:
            raise ValueError(f"multi_grid rates must be at least 1, got {tuple(multi_grid)}")
        net = nn.Module()
        net.conv1 = _stem(stem)
        net.bn1 = nn.BatchNorm2d(64)
        net.relu = nn.ReLU(inplace=True)
        net.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for i, count in enumerate(stages):
            planes = 64 * 2 ** min(i, 3)
            stage = _stage(spec.block, channels, planes, count)
            net.add_module(f"layer{i + 1}", stage)
            channels = planes * spec.block.expansion
        net.fc = nn.Linear(channels, _IMAGENET_CLASSES)
        _initialise(net)
        return_layers = {f"layer{len(stages)}": "out"}
        if aux:
            return_layers["layer3"] = "aux"
        super().__init__(net, return_layers)
        self.depth = depth
        self.out_channels = out_channels
        self.aux_channels = out_channels // 2
        self.multi_grid = None if multi_grid is None else tuple(multi_grid)
        self.contract_dilation = contract_dilation
        if replace_stride_with_dilation is None:
            self.set_output_stride(output_stride)
        else:
            self.set_dilated(replace_stride_with_dilation)

    def set_dilated(self, dilated: Sequence[bool]) -> None:
        """Choose again which of layer2, layer3, layer4 are dilated; weights stay as they are.

        The cascaded stages behind layer4 are dilated always: they never reduce the map.
        """
        stages: list[Any] = [m for name, m in self.items() if name.startswith("layer")]
        cascaded = len(stages) - 4
        plans = plan_stages(
            strides=[1, 2, 2, 2] + [2] * cascaded,
            blocks=[len(stage) for stage in stages],
            dilated=[False, *dilated] + [True] * cascaded,
            multi_grid=self.multi_grid,
            multi_grid_stages=[False] * 3 + [True] * (1 + cascaded),
            contract_dilation=self.contract_dilation,
        )
        for stage, plan in zip(stages, plans, strict=True):
            for i, (block, dilations) in enumerate(zip(stage, plan.dilations, strict=True)):
                block.set_atrous(plan.stride if i == 0 else 1, dilations)
            if stage[0].downsample is not None:
                set_stride(stage[0].downsample[0], plan.stride)
        self.dilated = tuple(bool(d) for d in dilated)
        self.output_stride = 4 * 2 ** sum(not d for d in self.dilated)

    def set_output_stride(self, output_stride: int) -> None:
        """8: layer3 and layer4 are dilated; 16: layer4 is. Weights stay as they are."""
        self.set_dilated((False, output_stride == 8, True))


def _stem(kind: str) -> nn.Module:
    if kind == "torchvision":
        return nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        _conv3x3(3, 32, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _conv3x3(32, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _conv3x3(32, 64),
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, planes: int, count: int
) -> nn.Sequential:
    out_channels = planes * block.expansion
    # Every stage but layer1 of the basic blocks and the cascaded ones changes channels; strides are
    # set afterwards by set_dilated.
    downsample = None
    if in_channels != out_channels:
        downsample = nn.Sequential(
            _conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, planes, 1, downsample)]
    blocks += [block(out_channels, planes, 1, None) for _ in range(1, count)]
    return nn.Sequential(*blocks)


def _initialise(net: nn.Module) -> None:
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


_OPTIONS = ("multi_grid", "contract_dilation", "stem", "replace_stride_with_dilation")


def _deeplab(depth: int, doc: str, cascaded: int = 0) -> Callable[..., DeepLabV3]:
    family = Family(
        backbone=functools.partial(ResNetBackbone, depth, cascaded=cascaded),
        output_stride=16 if cascaded else 8,
        rates=None if cascaded else {8: (12, 24, 36), 16: (6, 12, 18)},
        backbone_options=_OPTIONS,
        backbone_enum=f"ResNet{depth}_Weights",
    )
    kind = "cascaded_resnet" if cascaded else "resnet"
    return builder(f"deeplabv3_{kind}{depth}", family, __name__, doc)


deeplabv3_resnet50 = _deeplab(
    50,
    """DeepLabv3 on ResNet-50: torchvision's `deeplabv3_resnet50`, and more.

    Args:
        weights: torchvision's `DeepLabV3_ResNet50_Weights` or the name of one (then torchvision
            must be installed: the weights and their download are its own), the path of a checkpoint
            in any layout that `load_weights` knows, or None.
        progress: show the progress of a download.
        num_classes: 21 by default; with weights, what they have, and another number is an error.
        aux_loss: build the auxiliary head; with weights, what they have.
        weights_backbone: torchvision's `ResNet50_Weights`, the name of one, a path, or None.
            None is the default, unlike torchvision's: nothing is downloaded that was not asked for.
        **options: see `DeepLabOptions`.

    Returns:
        `DeepLabV3` in training mode, as every module starts.

    Raises:
        ValueError: a value that does not fit the weights or the model; the message says which.
        TypeError: weights of another model, or an option that does not exist.

    Source: arXiv 1706.05587.
    """,
)
deeplabv3_resnet101 = _deeplab(
    101,
    "DeepLabv3 on ResNet-101; arguments as of `deeplabv3_resnet50`.",
)
deeplabv3_resnet18 = _deeplab(
    18,
    "DeepLabv3 on ResNet-18; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_resnet34 = _deeplab(
    34,
    "DeepLabv3 on ResNet-34; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_resnet152 = _deeplab(
    152,
    "DeepLabv3 on ResNet-152; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_cascaded_resnet50 = _deeplab(
    50,
    """The paper's cascaded model on ResNet-50; arguments as of `deeplabv3_resnet50`.

    Behind layer4 stand three copies of it, layer5 to layer7 (the paper's block5 to block7), each
    with twice the dilation of the one before, all with multi_grid (1, 2, 1), and a 1x1 classifier
    in place of the ASPP. The output stride is 16 by default. `weights_backbone` fills the stem and
    layer1 to layer4. Options of the ASPP do not exist here.

    Source: arXiv 1706.05587, section 3.2.
    """,
    cascaded=3,
)
deeplabv3_cascaded_resnet101 = _deeplab(
    101,
    "The paper's cascaded model on ResNet-101; see `deeplabv3_cascaded_resnet50`.",
    cascaded=3,
)


def _stage_blocks(state: Mapping[str, Tensor], stage: int) -> int:
    return len({m[1] for k in state if (m := re.match(rf"backbone\.layer{stage}\.(\d+)\.", k))})


def resnet_depth(state: Mapping[str, Tensor]) -> int | None:
    """Depth of the ResNet in a state dict; None where there is none of those known."""
    kind = BasicBlock if basic_blocks(state) else Bottleneck
    blocks = tuple(_stage_blocks(state, stage) for stage in (1, 2, 3, 4))
    specs = RESNETS.items()
    return next((d for d, s in specs if s.block is kind and s.blocks == blocks), None)


def _recognise(state: Mapping[str, Tensor]) -> Found | None:
    depth, options = resnet_depth(state), head_options(state)
    cascaded = _stage_blocks(state, 5) > 0
    if options is None and cascaded and "classifier.0.weight" in state:
        # The cascaded model's classifier is one 1x1 convolution.
        options = {}
    if depth is None or options is None:
        return None
    if "backbone.conv1.6.weight" in state:
        options["stem"] = "deep"
    return f"deeplabv3_{'cascaded_' if cascaded else ''}resnet{depth}", options


ENTRY = ModelEntry(
    builders=(
        deeplabv3_resnet50,
        deeplabv3_resnet101,
        deeplabv3_resnet18,
        deeplabv3_resnet34,
        deeplabv3_resnet152,
        deeplabv3_cascaded_resnet50,
        deeplabv3_cascaded_resnet101,
    ),
    recognise=_recognise,
    foreign={
        "mmseg": (
            Rule(r"backbone\.stem\.([013-6])\.(.+)", r"backbone.conv1.\1.\2"),
            Rule(r"backbone\.stem\.7\.(.+)", r"backbone.bn1.\1"),
        ),
        "imagenet": (Rule(r"((?:conv1|bn1|layer\d+)\..+)", r"backbone.\1"),),
    },
    classifier=r"conv1\.(?:0\.)?weight",
    enums={
        "deeplabv3_resnet50": "DeepLabV3_ResNet50_Weights",
        "deeplabv3_resnet101": "DeepLabV3_ResNet101_Weights",
    },
    backbone="ResNet-18 to 152",
)
