"""The DeepLabv3 models of fregu856/deeplabv3 (ResNet-18 to 152, Cityscapes)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..data.classes import class_set
from ..data.preprocess import PreprocessBGR
from ..nn import PaperHead
from ..weights.inspect import head_options
from ..weights.load import load_weights
from ..weights.registry import Found, ModelEntry
from ..weights.rules import Rule
from .builders import check_num_classes
from .deeplabv3 import DeepLabV3
from .resnet import RESNETS, BasicBlock, ResNetBackbone, resnet_depth

DEFAULT_NUM_CLASSES = 20
# The same at output stride 8 and 16, unlike the paper's.
ATROUS_RATES = (6, 12, 18)


class BiasedPaperHead(PaperHead):
    """The paper's head with biased convolutions before the batch norms and without dropout.

    State: as `PaperHead`'s, and a bias for each convolution of the ASPP.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, ATROUS_RATES, dropout=0.0)
        for conv in self[0].modules():
            if isinstance(conv, nn.Conv2d):
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


def _builder(depth: int, default_stride: int, doc: str) -> Callable[..., DeepLabV3]:
    name = f"fregu856_resnet{depth}"
    allowed = (8, 16) if RESNETS[depth].block is BasicBlock else (16,)

    def build(
        *,
        output_stride: int = default_stride,
        num_classes: int | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> DeepLabV3:
        if output_stride not in allowed:
            raise ValueError(
                f"{name} has output stride {' or '.join(map(str, allowed))}, got {output_stride}"
            )
        num_classes = check_num_classes(DEFAULT_NUM_CLASSES if num_classes is None else num_classes)
        # All blocks of a dilated stage have its dilation.
        backbone = ResNetBackbone(depth, output_stride, contract_dilation=False)
        model = DeepLabV3(backbone, BiasedPaperHead(backbone.out_channels, num_classes))
        model.preprocess = PreprocessBGR()
        if num_classes == DEFAULT_NUM_CLASSES:
            cityscapes = class_set("cityscapes")
            model.classes = (*cityscapes.classes, "void")
            model.palette = (*cityscapes.palette, (81, 0, 81))
        model.config = (name, {"output_stride": output_stride, "num_classes": num_classes})
        if weights is not None:
            load_weights(model, weights)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return build


fregu856_resnet18 = _builder(
    18,
    8,
    """fregu856/deeplabv3's model on ResNet-18, closely enough to load its weights.

    The ASPP has rates 6, 12, 18 at both output strides, biased convolutions before the batch norms
    and a 1x1 classifier behind the projection; dilated stages do not contract. The model returns
    torchvision's OrderedDict, where the original returns the tensor under "out".

    Args:
        output_stride: 8 (the original's published weights) or 16.
        num_classes: 20 by default: Cityscapes' 19 and void.
        weights: path of a checkpoint of the original (or of this package), or None.

    Raises:
        ValueError: another output stride, or num_classes below 1.
    """,
)
fregu856_resnet34 = _builder(34, 8, "The same on ResNet-34; see `fregu856_resnet18`.")
_DEEP = "The same on ResNet-{}, at output stride 16 only; see `fregu856_resnet18`."
fregu856_resnet50 = _builder(50, 16, _DEEP.format(50))
fregu856_resnet101 = _builder(101, 16, _DEEP.format(101))
fregu856_resnet152 = _builder(152, 16, _DEEP.format(152))


def _recognise(state: Mapping[str, Tensor]) -> Found | None:
    depth = resnet_depth(state)
    biased = {"classifier.0.convs.0.0.bias", "classifier.0.convs.0.1.weight"} <= state.keys()
    if depth is None or not biased or head_options(state) is None:
        return None
    return f"fregu856_resnet{depth}", {}


# Children 4 to 6 of torchvision's ResNet are layer1 to layer3; the original's numbering of stages
# starts at the stem, so that its layer4 and layer5 are layer3 and layer4.
ENTRY = ModelEntry(
    builders=(
        fregu856_resnet18,
        fregu856_resnet34,
        fregu856_resnet50,
        fregu856_resnet101,
        fregu856_resnet152,
    ),
    recognise=_recognise,
    foreign={
        "fregu856": (
            Rule(r"resnet\.resnet\.0\.(.+)", r"backbone.conv1.\1"),
            Rule(r"resnet\.resnet\.1\.(.+)", r"backbone.bn1.\1"),
            Rule(r"resnet\.resnet\.4\.(.+)", r"backbone.layer1.\1"),
            Rule(r"resnet\.resnet\.5\.(.+)", r"backbone.layer2.\1"),
            Rule(r"resnet\.(?:resnet\.6|layer4)\.(.+)", r"backbone.layer3.\1"),
            Rule(r"resnet\.layer5\.(.+)", r"backbone.layer4.\1"),
        )
    },
    preprocess=(PreprocessBGR,),
)
