"""The names that other libraries give to the tensors of a DeepLabv3, as a table of rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._common import CheckpointError, StateDict, shorten


@dataclass(frozen=True)
class Rule:
    """How one group of foreign keys is renamed.

    Attributes:
        pattern: regular expression that the whole foreign key must match.
        target: the key here, with the pattern's groups as \\1, \\2, ... and `{pool}` for the index
            of the image pooling branch; None: the key is known and left out.
        transform: (tensor, index of the pooling branch) -> tensor, or None.
    """

    pattern: str
    target: str | None
    transform: Callable[[Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """Names of a library's tensors, and what a model needs to give the library's numbers.

    Attributes:
        name: what `load_weights(layout=...)` calls it.
        detect: regular expressions; each must match the beginning of at least one key.
        rules: tried in order, the first that matches a key renames it.
        options: builder options for the same numbers, from the state dict under its own names and
            the text entries of its file's header (.safetensors).
        differs: why no options give the library's numbers, from the state dict; empty where they
            do.
        notes: what a user should know; part of error messages and of `inspect_weights`.
        branches: pattern whose first group numbers the ASPP branches before image pooling, where
            the layout's names leave the index of the pooling branch open.
        lacks: pattern of keys of a model that the layout has no tensors for. Such a checkpoint
            loads with reset_head=True only.
        pins_defaults: the library offers no other dilation or upsampling than that of `options`
            and the builders' defaults, so that a model with another one is warned about.
    """

    name: str
    detect: tuple[str, ...]
    rules: tuple[Rule, ...]
    options: Callable[[Mapping[str, Tensor], Mapping[str, str]], dict[str, Any]] = (
        lambda state, header: {}
    )
    differs: Callable[[Mapping[str, Tensor]], str] = lambda state: ""
    notes: str = ""
    branches: str = ""
    lacks: str = ""
    pins_defaults: bool = False


def _pool_to_end(weight: Tensor, pool: int) -> Tensor:
    """[K, (pooling, branch 0, ...), h, w] -> [K, (branch 0, ..., pooling), h, w]."""
    if weight.ndim != 4 or weight.shape[1] % (pool + 1):
        return weight
    width = weight.shape[1] // (pool + 1)
    return torch.cat([weight[:, width:], weight[:, :width]], dim=1)


def _hwio(weight: Tensor, pool: int) -> Tensor:
    """TensorFlow's convolution weight [h, w, in, out] -> [out, in, h, w]."""
    return weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight


def _hwio_pool_to_end(weight: Tensor, pool: int) -> Tensor:
    return _pool_to_end(_hwio(weight, pool), pool)


def _hwcm(weight: Tensor, pool: int) -> Tensor:
    """TensorFlow's depthwise weight [h, w, channels, m] -> [channels * m, 1, h, w]."""
    if weight.ndim != 4:
        return weight
    return weight.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)


_SLIM_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _slim(scope: str, conv: str, norm: str, transform: Any = _hwio) -> tuple[Rule, ...]:
    """Rules for the weights and the batch norm of the slim layers that match `scope`."""
    return (
        Rule(rf"{scope}/weights", f"{conv}.weight", transform),
        *(
            Rule(rf"{scope}/BatchNorm/{theirs}", f"{norm}.{ours}")
            for theirs, ours in _SLIM_NORM.items()
        ),
    )


def stage_blocks(state: Mapping[str, Tensor], stage: int) -> int:
    """Number of blocks of a ResNet's stage, whatever stands before its name."""
    return len({m[1] for k in state if (m := re.match(rf"(?:.+\.)?layer{stage}\.(\d+)\.", k))})


def basic_blocks(state: Mapping[str, Tensor]) -> bool:
    """Whether a ResNet is one of two convolutions a block (18, 34)."""
    stage = [k for k in state if re.match(r"(?:.+\.)?layer1\.0\.conv", k)]
    return bool(stage) and not any(k.endswith("conv3.weight") for k in stage)


# smp's "tu-" encoders are timm's models, which contract dilation as torchvision does.
_TIMM_PREFIX = "encoder.model."


def _is_timm(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_TIMM_PREFIX) for key in state)


def _no_contraction(state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    return {} if _is_timm(state) else {"contract_dilation": False}


def _smp_options(state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    return {"align_corners": True, **_no_contraction(state, header)}


def _mmseg_differs(state: Mapping[str, Tensor]) -> str:
    if basic_blocks(state):
        return "mmsegmentation dilates a basic block's first convolution only"
    return ""


def _fregu856_options(state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    stride = 8 if any(key.startswith("resnet.layer4.") for key in state) else 16
    return {"output_stride": stride}


def _tflite_options(state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    """The output stride, where the header has the list of ops.

    An entry of "plan" is ["conv", input, output, name, depthwise, stride, dilation, ...].
    """
    try:
        strides = [op[5] for op in json.loads(header["plan"]) if op[0] == "conv"]
        stride = math.prod(strides)
    except (KeyError, ValueError, TypeError, IndexError):
        return {}
    return {"output_stride": stride} if stride in (8, 16) else {}


_OWN_KEYS = r"(?:backbone|classifier|aux_classifier)\..+"
_HEAD_KEYS = r"(?:aux_)?classifier\..+"
# Everything behind the ASPP, and the auxiliary head.
_DECODER_KEYS = r"classifier\.(?!0\.).+|aux_classifier\..+"

_V3PLUS = (
    "DeepLabv3+: its decoder has no counterpart here. The backbone and the ASPP load, the rest of "
    "the head starts untrained, with reset_head=True (--reset-head)."
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="smp",
        detect=(r"encoder\.(model\.)?(conv1|layer1)\.", r"decoder\.(aspp|0)\.convs\.", "segment"),
        rules=(
            Rule(r"encoder\.(?:model\.)?(.+)", r"backbone.\1"),
            Rule(r"decoder\.(?:aspp|0)\.(.+)", r"classifier.0.\1"),
            Rule(r"decoder\.(?:conv|1)\.(.+)", r"classifier.1.\1"),
            Rule(r"decoder\.(?:bn|2)\.(.+)", r"classifier.2.\1"),
            Rule(r"segmentation_head\.0\.(.+)", r"classifier.4.\1"),
            Rule(r"classification_head\..+", None),
        ),
        options=_smp_options,
        notes=(
            "segmentation-models-pytorch dilates without contraction and upsamples with "
            "align_corners=True. The output stride is not in the weights: it is 8 unless "
            "encoder_output_stride was 16, which needs output_stride=16, atrous_rates=(12, 24, 36)."
            " A classification head (aux_params) is left out."
        ),
        pins_defaults=True,
    ),
    Layout(
        name="smp-v3plus",
        detect=(r"encoder\.", r"decoder\.aspp\.0\.convs\."),
        rules=(
            Rule(r"encoder\.(?:model\.)?(.+)", r"backbone.\1"),
            Rule(r"decoder\.aspp\.0\.(.+)", r"classifier.0.\1"),
            Rule(r"(?:decoder|segmentation_head|classification_head)\..+", None),
        ),
        options=_no_contraction,
        notes=f"{_V3PLUS} Its separable ASPP (the default there) has no counterpart either.",
        lacks=_DECODER_KEYS,
    ),
    Layout(
        name="mmseg",
        detect=(r"backbone\.", r"decode_head\.aspp_modules\.0\.conv\.", r"decode_head\.bottleneck"),
        rules=(
            Rule(r"backbone\.stem\.([013-6])\.(.+)", r"backbone.conv1.\1.\2"),
            Rule(r"backbone\.stem\.7\.(.+)", r"backbone.bn1.\1"),
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"decode_head\.aspp_modules\.(\d+)\.conv\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"decode_head\.aspp_modules\.(\d+)\.bn\.(.+)", r"classifier.0.convs.\1.1.\2"),
            Rule(r"decode_head\.image_pool\.1\.conv\.(.+)", r"classifier.0.convs.{pool}.1.\1"),
            Rule(r"decode_head\.image_pool\.1\.bn\.(.+)", r"classifier.0.convs.{pool}.2.\1"),
            # The bottleneck reads image pooling first, the ASPP here last.
            Rule(
                r"decode_head\.bottleneck\.conv\.weight",
                "classifier.0.project.0.weight",
                _pool_to_end,
            ),
            Rule(r"decode_head\.bottleneck\.bn\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"decode_head\.conv_seg\.(.+)", r"classifier.2.\1"),
            Rule(r"auxiliary_head\.convs\.0\.conv\.(.+)", r"aux_classifier.0.\1"),
            Rule(r"auxiliary_head\.convs\.0\.bn\.(.+)", r"aux_classifier.1.\1"),
            Rule(r"auxiliary_head\.conv_seg\.(.+)", r"aux_classifier.4.\1"),
            Rule(r"data_preprocessor\..+", None),
        ),
        differs=_mmseg_differs,
        notes=(
            "mmsegmentation: names and shapes do not tell d8 from d16 (output_stride=16) nor the "
            "769x769 configurations (align_corners=True). The dilations of d16-mg124 (1, 2, 4 with "
            "no base rate) cannot be had here."
        ),
        branches=r"decode_head\.aspp_modules\.(\d+)\.",
    ),
    Layout(
        name="mmseg-v3plus",
        detect=(r"decode_head\.c1_bottleneck\.",),
        rules=(),
        notes=(
            "mmsegmentation's DeepLabv3+ has a separable ASPP and a decoder, which have no "
            "counterpart here."
        ),
    ),
    Layout(
        name="vainf",
        detect=(r"backbone\.", r"classifier\.classifier\.0\.convs\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"classifier\.classifier\.(.+)", r"classifier.\1"),
        ),
        notes=(
            "DeepLabV3Plus-Pytorch: the output stride is not in the weights. Its builders default "
            "to 8, its training script to 16 (output_stride=16)."
        ),
        pins_defaults=True,
    ),
    Layout(
        name="vainf-v3plus",
        detect=(r"backbone\.", r"classifier\.aspp\.convs\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"classifier\.aspp\.(.+)", r"classifier.0.\1"),
            Rule(r"classifier\.(?:project|classifier)\..+", None),
        ),
        notes=_V3PLUS,
        lacks=_DECODER_KEYS,
    ),
    Layout(
        name="jfzhang95",
        detect=(r"backbone\.", r"aspp\.aspp1\.atrous_conv\.", r"decoder\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            *(
                rule
                for i in range(4)
                for rule in (
                    Rule(rf"aspp\.aspp{i + 1}\.atrous_conv\.(.+)", rf"classifier.0.convs.{i}.0.\1"),
                    Rule(rf"aspp\.aspp{i + 1}\.bn\.(.+)", rf"classifier.0.convs.{i}.1.\1"),
                )
            ),
            Rule(r"aspp\.global_avg_pool\.([12])\.(.+)", r"classifier.0.convs.4.\1.\2"),
            Rule(r"aspp\.conv1\.(.+)", r"classifier.0.project.0.\1"),
            Rule(r"aspp\.bn1\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"decoder\..+", None),
        ),
        options=lambda state, header: {"multi_grid": (1, 2, 4), "contract_dilation": False},
        notes=(
            f"pytorch-deeplab-xception is {_V3PLUS} The output stride is not in the weights; its "
            "training script defaults to 16 (output_stride=16)."
        ),
        lacks=_DECODER_KEYS,
        pins_defaults=True,
    ),
    Layout(
        name="fregu856",
        detect=(r"resnet\.resnet\.0\.", r"resnet\.layer5\.", r"aspp\.conv_1x1_1\."),
        rules=(
            Rule(r"resnet\.resnet\.0\.(.+)", r"backbone.conv1.\1"),
            Rule(r"resnet\.resnet\.1\.(.+)", r"backbone.bn1.\1"),
            # Children 4 to 6 of torchvision's ResNet are layer1 to layer3; its own numbering of
            # stages starts at the stem, so that layer4 and layer5 are layer3 and layer4.
            Rule(r"resnet\.resnet\.4\.(.+)", r"backbone.layer1.\1"),
            Rule(r"resnet\.resnet\.5\.(.+)", r"backbone.layer2.\1"),
            Rule(r"resnet\.(?:resnet\.6|layer4)\.(.+)", r"backbone.layer3.\1"),
            Rule(r"resnet\.layer5\.(.+)", r"backbone.layer4.\1"),
            Rule(r"aspp\.conv_1x1_1\.(.+)", r"classifier.0.convs.0.0.\1"),
            Rule(r"aspp\.bn_conv_1x1_1\.(.+)", r"classifier.0.convs.0.1.\1"),
            Rule(r"aspp\.conv_3x3_([123])\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"aspp\.bn_conv_3x3_([123])\.(.+)", r"classifier.0.convs.\1.1.\2"),
            Rule(r"aspp\.conv_1x1_2\.(.+)", r"classifier.0.convs.4.1.\1"),
            Rule(r"aspp\.bn_conv_1x1_2\.(.+)", r"classifier.0.convs.4.2.\1"),
            Rule(r"aspp\.conv_1x1_3\.(.+)", r"classifier.0.project.0.\1"),
            Rule(r"aspp\.bn_conv_1x1_3\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"aspp\.conv_1x1_4\.(.+)", r"classifier.1.\1"),
        ),
        options=_fregu856_options,
        notes="fregu856/deeplabv3 was trained on images in BGR order with the means of RGB.",
    ),
    Layout(
        name="tflite",
        detect=(r"MobilenetV2\.Conv\.", r"image_pooling\.", r"logits\.semantic\."),
        rules=(
            Rule(
                r"MobilenetV2\.(Conv|expanded_conv(?:_\d+)?\.(?:expand|depthwise|project))\.(.+)",
                r"backbone.\1.conv.\2",
            ),
            Rule(r"aspp(\d+)\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"image_pooling\.(.+)", r"classifier.0.convs.{pool}.1.\1"),
            # Its input channels are (image_pooling, aspp0, ...).
            Rule(r"concat_projection\.weight", "classifier.0.project.0.weight", _pool_to_end),
            Rule(r"concat_projection\.bias", "classifier.0.project.0.bias"),
            Rule(r"logits\.semantic\.(.+)", r"classifier.1.\1"),
        ),
        options=_tflite_options,
        notes=(
            "TensorFlow Lite weights, OIHW, batch norm folded; the output stride is not in them "
            "unless the file's header lists the ops."
        ),
        branches=r"aspp(\d+)\.",
    ),
    Layout(
        name="slim",
        detect=(r"MobilenetV2/Conv/", r"logits/semantic/"),
        rules=(
            Rule(
                r"global_step|.+/(?:Momentum|Adam(?:_1)?|RMSProp(?:_1)?|ExponentialMovingAverage)",
                None,
            ),
            # The classifier's layers, which DeepLab does not use.
            Rule(r"MobilenetV2/(?:Conv_1|Logits)/.+", None),
            Rule(
                r"MobilenetV2/(expanded_conv(?:_\d+)?)/depthwise/depthwise_weights",
                r"backbone.\1.depthwise.conv.weight",
                _hwcm,
            ),
            *_slim(r"MobilenetV2/(Conv)", r"backbone.\1.conv", r"backbone.\1.bn"),
            *_slim(
                r"MobilenetV2/(expanded_conv(?:_\d+)?)/(expand|depthwise|project)",
                r"backbone.\1.\2.conv",
                r"backbone.\1.\2.bn",
            ),
            *_slim(r"aspp(\d+)", r"classifier.0.convs.\1.0", r"classifier.0.convs.\1.1"),
            *_slim(
                r"image_pooling", r"classifier.0.convs.{pool}.1", r"classifier.0.convs.{pool}.2"
            ),
            *_slim(
                r"concat_projection",
                "classifier.0.project.0",
                "classifier.0.project.1",
                _hwio_pool_to_end,
            ),
            Rule(r"logits/semantic/weights", "classifier.1.weight", _hwio),
            Rule(r"logits/semantic/biases", "classifier.1.bias"),
        ),
        notes="TensorFlow DeepLab variables, HWIO; the output stride is not in the weights.",
        branches=r"aspp(\d+)[/_]",
    ),
    Layout(
        name="imagenet",
        detect=(r"conv1\.(0\.)?weight|features\.0\.0\.weight",),
        rules=(
            Rule(r"((?:conv1|bn1|layer\d+)\..+)", r"backbone.\1"),
            Rule(r"features\.(.+)", r"backbone.\1"),
            Rule(r"(?:fc|classifier)\..+", None),
        ),
        notes=(
            "An image classifier: it fills the backbone. The head starts untrained, with "
            "reset_head=True (--reset-head)."
        ),
        lacks=_HEAD_KEYS,
    ),
    # Also WZMIAOMIAO's, a copy of torchvision.
    Layout(
        name="torchvision",
        detect=(
            r"backbone\.(conv1\.weight|0\.0\.weight)",
            r"classifier\.0\.convs\.",
            r"classifier\.4\.weight",
        ),
        rules=(Rule(f"({_OWN_KEYS})", r"\1"),),
    ),
    Layout(
        name="deeplab_fast",
        detect=(r"backbone\.|classifier\.",),
        rules=(Rule(f"({_OWN_KEYS})", r"\1"),),
    ),
)

# Tensors that training frameworks keep beside a model.
NOT_MODEL = re.compile(r"(?:criterion|loss(?:_\w+)?|metrics?|(?:train|val|test)_\w+)\..+")


def layout_named(name: str) -> Layout:
    """The layout of that name; ValueError lists the names there are."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"no layout is named {name!r}; there are: auto, {known}")


def detect_layout(state: Mapping[str, Tensor], label: str) -> Layout:
    """The first layout whose names a state dict has; CheckpointError, with `label`, for none."""
    for layout in LAYOUTS:
        if all(any(re.match(d, key) for key in state) for d in layout.detect):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(
        f"{label}: the names of its tensors are those of no known DeepLabv3 ({known}); it has "
        f"{shorten(list(state))}"
    )


@dataclass(frozen=True)
class Renamed:
    """A state dict under the names used here."""

    state: StateDict
    foreign: dict[str, str]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]


def rename_tensors(state: Mapping[str, Tensor], layout: Layout, label: str) -> Renamed:
    """A state dict under our names, by the layout's rules; two keys for one are an error."""
    pool = 0
    if layout.branches:
        pool = len({m[1] for key in state if (m := re.match(layout.branches, key))})
    renamed: StateDict = {}
    foreign: dict[str, str] = {}
    unknown, ignored = [], []
    for key, tensor in state.items():
        if NOT_MODEL.fullmatch(key):
            ignored.append(key)
            continue
        rule, match = next(
            ((r, m) for r in layout.rules if (m := re.fullmatch(r.pattern, key))), (None, None)
        )
        if rule is None or match is None:
            unknown.append(key)
        elif rule.target is None:
            ignored.append(key)
        else:
            target = match.expand(rule.target).format(pool=pool)
            if target in renamed:
                raise CheckpointError(
                    f"{label}: {foreign[target]} and {key} are both {target} here; one is too many"
                )
            renamed[target] = rule.transform(tensor, pool) if rule.transform else tensor
            foreign[target] = key
    return Renamed(renamed, foreign, tuple(unknown), tuple(ignored))


# Where training scripts keep the state dict, the most telling names first.
