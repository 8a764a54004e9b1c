"""Checkpoints: reading files, foreign key layouts, loading with a report, saving."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "LoadReport",
    "Rule",
    "WeightsInfo",
    "from_checkpoint",
    "inspect_weights",
    "load_weights",
    "model_metadata",
    "read_state_dict",
    "save_weights",
]

StateDict = dict[str, Tensor]
Source = str | os.PathLike[str] | Mapping[str, Any]

# Key of the package's own facts in a .safetensors header or beside "model" in a .pth container.
METADATA_KEY = "deeplab_fast"
# How many keys of each kind an error message spells out.
SHOWN = 10


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message says why."""


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


def _stage_blocks(state: Mapping[str, Tensor], stage: int) -> int:
    """Number of blocks of a ResNet's stage, whatever stands before its name."""
    return len({m[1] for k in state if (m := re.match(rf"(?:.+\.)?layer{stage}\.(\d+)\.", k))})


def _basic_blocks(state: Mapping[str, Tensor]) -> bool:
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
    if _basic_blocks(state):
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
_NOT_MODEL = re.compile(r"(?:criterion|loss(?:_\w+)?|metrics?|(?:train|val|test)_\w+)\..+")


def _layout(name: str) -> Layout:
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"no layout is named {name!r}; there are: auto, {known}")


def _detect(state: Mapping[str, Tensor], label: str) -> Layout:
    for layout in LAYOUTS:
        if all(any(re.match(d, key) for key in state) for d in layout.detect):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(
        f"{label}: the names of its tensors are those of no known DeepLabv3 ({known}); it has "
        f"{_shorten(list(state))}"
    )


@dataclass(frozen=True)
class _Renamed:
    """A state dict under the names used here."""

    state: StateDict
    foreign: dict[str, str]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]


def _rename(state: Mapping[str, Tensor], layout: Layout, label: str) -> _Renamed:
    pool = 0
    if layout.branches:
        pool = len({m[1] for key in state if (m := re.match(layout.branches, key))})
    renamed: StateDict = {}
    foreign: dict[str, str] = {}
    unknown, ignored = [], []
    for key, tensor in state.items():
        if _NOT_MODEL.fullmatch(key):
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
    return _Renamed(renamed, foreign, tuple(unknown), tuple(ignored))


# Where training scripts keep the state dict, the most telling names first.
_CONTAINERS = (
    "model_state_dict",
    "model_state",
    "state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "model_ema",
)
# Prefixes that wrappers put before every key.
_PREFIXES = ("model.", "net.", "network.", "segmentor.")
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class _Checkpoint:
    label: str
    state: StateDict
    # The package's own facts, and the other text entries of a .safetensors header.
    metadata: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, without running code from it.

    Files: .pth, .pt, .ckpt, .bin and the like as torch.save writes them (memory-mapped where the
    format allows it), .safetensors, and numpy's .npz. The content decides, not the suffix. Training
    checkpoints are opened ("model", "state_dict", "model_state", "model_state_dict", ...), and the
    prefixes of wrappers are taken off ("module.", "_orig_mod.", Lightning's "model.").

    Returns:
        Names as in the file, otherwise; values that are no tensors or arrays are left out.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, or one that only runs code to load.
    """
    return _read(path).state


def _read(path: str | os.PathLike[str]) -> _Checkpoint:
    path = Path(path)
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors", ".npz")
        )
        raise CheckpointError(
            f"{path} is a folder, expected a checkpoint file"
            + (f"; it holds {_shorten(inside)}" if inside else "")
        )
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = _kind(path, head)
    header: dict[str, str] = {}
    if kind == "safetensors":
        content, metadata, header = _read_safetensors(path)
    elif kind == "npz":
        content, metadata = _read_npz(path), {}
    else:
        content, metadata = _read_torch(path, kind)
    label = str(path)
    state = _strip_prefixes(_find_state(content, label), label)
    return _Checkpoint(label, state, metadata, header)


def _kind(path: Path, head: bytes) -> str:
    """What a file is, by its first bytes: "zip", "npz", "legacy" (torch) or "safetensors"."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    refusals = (
        (not head, "is empty"),
        (text.startswith(b"<"), "is a web page (HTML or XML), not a checkpoint: download it again"),
        (
            text.startswith(b"version https://git-lfs"),
            "is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again",
        ),
        (
            head[4:8] == b"TFL3",
            "is a TensorFlow Lite model; save its weights, named by scope, as .safetensors or .npz",
        ),
        (head.startswith(b"\x89HDF"), "is an HDF5 (Keras) file; save its arrays as .npz"),
        (head.startswith(b"\x1f\x8b"), "is a gzip archive; unpack it first"),
        (head.startswith(b"\x93NUMPY"), "is a single array; save named arrays with numpy.savez"),
        (
            path.suffix in (".index", ".meta") or ".data-" in path.suffix,
            "is part of a TensorFlow checkpoint; save its variables by name as .npz: "
            "r = tf.train.load_checkpoint(prefix); numpy.savez(file, **{n: r.get_tensor(n) "
            "for n in r.get_variable_to_shape_map()})",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise CheckpointError(f"{path} {why}")
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):
        return "legacy"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 32:
        return "safetensors"
    raise CheckpointError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}; expected a file written by "
        "torch.save, safetensors or numpy.savez"
    )


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written to its end ({error}): download or copy it again"
        ) from error
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive; save its tensors first: "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "zip"
    raise CheckpointError(
        f"{path} is a zip archive without a checkpoint in it; it holds {_shorten(names)}"
    )


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{path}: reading .safetensors needs `pip install safetensors`"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no readable .safetensors file, or was not written to its end ({error})"
        ) from error
    try:
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError:
        metadata = {}
    return state, metadata if isinstance(metadata, dict) else {}, header


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no readable .npz file of plain arrays: {error}"
        ) from error


def _read_torch(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with _harmless_globals():
            if path.suffix == ".safetensors":
                # torch.load goes by this suffix, whatever the file is.
                with path.open("rb") as file:
                    content = torch.load(file, **options)
            else:
                content = torch.load(os.fspath(path), mmap=kind == "zip", **options)
    # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more for damaged files.
    except Exception as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        if refused is None:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path} is damaged or was not written to its end "
                f"({type(error).__name__}: {reason[0][:200] if reason else ''})"
            ) from error
        raise CheckpointError(
            f"{path} contains an object of {refused[1]}, which would run code to load; only plain "
            "tensors and containers are read. If you trust the file, convert it where that class "
            "can be imported: c = torch.load(path, map_location='cpu', weights_only=False); "
            "torch.save(c.state_dict() if hasattr(c, 'state_dict') else c['model'], "
            "'weights.pth') - with the checkpoint's own key in place of 'model'"
        ) from error
    metadata = content.get(METADATA_KEY) if isinstance(content, Mapping) else None
    return content, dict(metadata) if isinstance(metadata, Mapping) else {}


class _Inert:
    """Stands in for an object that is of no use here, so that its class is not imported."""


# mmengine's training checkpoints keep their loss curves in these.
_BESIDE_WEIGHTS = ("mmengine.logging.history_buffer.HistoryBuffer",)


@contextlib.contextmanager
def _harmless_globals() -> Iterator[None]:
    """Allow what training scripts keep beside the weights and what runs no code of its own.

    torchvision's and WZMIAOMIAO's scripts save an argparse.Namespace, others numpy's numbers and
    paths.
    """
    import argparse
    import importlib
    import pathlib

    import numpy as np

    # NumPy 2 renamed the module; files of both kinds exist.
    core = importlib.import_module(
        f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray"
    )
    scalar, reconstruct = core.scalar, core._reconstruct
    dtypes = {type(np.dtype(t)) for t in np.sctypeDict.values()}
    allowed: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *dtypes]
    allowed += [pathlib.PosixPath, pathlib.PurePosixPath]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    allowed += [(_Inert, name) for name in _BESIDE_WEIGHTS]
    with torch.serialization.safe_globals(allowed):
        yield


def _find_state(content: Any, label: str) -> StateDict:
    """The state dict inside a checkpoint's containers."""
    if isinstance(content, Mapping):
        for name in _CONTAINERS:
            if isinstance(content.get(name), Mapping) and _has_tensors(content[name]):
                return _find_state(content[name], label)
        state = {
            key: tensor
            for key, value in content.items()
            if isinstance(key, str) and (tensor := _as_tensor(value)) is not None
        }
        if state:
            return state
        held = ", ".join(f"{k!r} ({type(v).__name__})" for k, v in list(content.items())[:SHOWN])
        raise CheckpointError(
            f"{label} holds no tensors where they are expected; it has {held or 'nothing'}. "
            f"Expected a state dict, or one under {', '.join(_CONTAINERS[:4])}"
        )
    raise CheckpointError(
        f"{label} holds a {type(content).__name__}, expected a state dict (names to tensors)"
    )


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(
        _as_tensor(v) is not None or (isinstance(v, Mapping) and _has_tensors(v))
        for v in content.values()
    )


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy" and getattr(value, "dtype", None) is not None:
        import numpy as np

        array = np.asarray(value)
        return torch.from_numpy(array.copy()) if array.dtype.kind in "fiub" else None
    return None


def _strip_prefixes(state: StateDict, label: str) -> StateDict:
    state = {
        re.sub(r"(?:(?<=\.)|^)(?:(?:module|_orig_mod)\.)+", "", key): value
        for key, value in _checked(state, label).items()
    }
    while True:
        own = [key for key in state if not _NOT_MODEL.fullmatch(key)]
        prefix = next((p for p in _PREFIXES if own and all(k.startswith(p) for k in own)), None)
        if prefix is None:
            return state
        state = {k.removeprefix(prefix): v for k, v in state.items()}


def _checked(state: StateDict, label: str) -> StateDict:
    quantised = [k for k, v in state.items() if v.is_quantized or v.is_sparse]
    if quantised:
        raise CheckpointError(
            f"{label} has quantised or sparse tensors ({_shorten(quantised)}); convert them to "
            "dense float tensors"
        )
    return state


def _open(source: Source) -> _Checkpoint:
    if isinstance(source, Mapping):
        label = "the state dict"
        metadata = source.get(METADATA_KEY)
        return _Checkpoint(
            label,
            _strip_prefixes(_find_state(source, label), label),
            dict(metadata) if isinstance(metadata, Mapping) else {},
        )
    if isinstance(source, (str, os.PathLike)):
        return _read(source)
    raise TypeError(
        f"weights must be the path of a checkpoint or a state dict, got {type(source).__name__}"
    )


@dataclass(frozen=True)
class WeightsInfo:
    """What a checkpoint is.

    Attributes:
        layout: name of its `Layout`.
        model: name of the builder that fits, or None where none does.
        num_classes: channels of the main classifier, or None where there is none.
        aux: whether there is an auxiliary head.
        options: the builder's further options for the numbers of the checkpoint's own library, as
            far as names and shapes (or this package's own metadata) tell.
        notes: what they do not tell.
        classes, palette, preprocess: from this package's own metadata, or None.
    """

    layout: str
    model: str | None
    num_classes: int | None
    aux: bool
    options: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    preprocess: dict[str, Any] | None = None

    def builder_call(self) -> str:
        """The call that builds the model, as text; empty where no builder fits."""
        if self.model is None:
            return ""
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        if self.aux:
            arguments["aux_loss"] = True
        return _call(self.model, {**arguments, **self.options})


def inspect_weights(source: Source) -> WeightsInfo:
    """Which model a checkpoint fits, from the names and shapes of its tensors.

    Args:
        source: path of a checkpoint (see `read_state_dict`), or a state dict.

    Raises:
        FileNotFoundError, CheckpointError: as `read_state_dict`; also names of no known layout.
    """
    checkpoint = _open(source)
    layout = _detect(checkpoint.state, checkpoint.label)
    return _inspect(checkpoint, layout, _rename(checkpoint.state, layout, checkpoint.label).state)


def _inspect(checkpoint: _Checkpoint, layout: Layout, state: Mapping[str, Tensor]) -> WeightsInfo:
    from .models import list_models

    # A layout without rules has nothing that could be built.
    model, options = _architecture(state) if layout.rules else (None, {})
    if model is not None:
        options |= layout.options(checkpoint.state, checkpoint.header)
    own = checkpoint.metadata if layout.name in ("torchvision", "deeplab_fast") else {}
    if isinstance(own.get("model"), str):
        model = own["model"]
        options = {k: _tuples(v) for k, v in dict(own.get("options") or {}).items()}
    if model not in list_models():
        model = None
    final = [] if layout.lacks else _final_keys(state)
    return WeightsInfo(
        layout=layout.name,
        model=model,
        num_classes=state[final[0]].shape[0] if final else None,
        aux=any(key.startswith("aux_classifier.") for key in state),
        options=options,
        notes=layout.notes,
        classes=_tuples(own.get("classes")),
        palette=_tuples(own.get("palette")),
        preprocess=own.get("preprocess"),
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


_RESNET_BLOCKS: dict[tuple[bool, tuple[int, ...]], int] = {
    (True, (2, 2, 2, 2)): 18,
    (True, (3, 4, 6, 3)): 34,
    (False, (3, 4, 6, 3)): 50,
    (False, (3, 4, 23, 3)): 101,
    (False, (3, 8, 36, 3)): 152,
}


def _architecture(state: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Any]]:
    """Builder, and its options that decide on names and shapes, from a renamed state dict."""
    if "backbone.Conv.conv.weight" in state:
        return "deeplabv3_mobilenet_v2_tf", _mobilenet_v2_options(state)
    options = _head_options(state)
    if options is None:
        return None, {}
    if "backbone.0.0.weight" in state and "backbone.16.0.weight" in state:
        return "deeplabv3_mobilenet_v3_large", options
    blocks = tuple(_stage_blocks(state, stage) for stage in (1, 2, 3, 4))
    depth = _RESNET_BLOCKS.get((_basic_blocks(state), blocks))
    if depth is None:
        return None, {}
    if {"classifier.0.convs.0.0.bias", "classifier.0.convs.0.1.weight"} <= state.keys():
        return f"fregu856_resnet{depth}", {}
    if "backbone.conv1.6.weight" in state:
        options["stem"] = "deep"
    kind = "deeplabv3_cascaded_resnet" if _stage_blocks(state, 5) else "deeplabv3_resnet"
    return f"{kind}{depth}", options


def _head_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of the head, none for a state dict without one, None for a head unknown here."""
    if not any(key.startswith("classifier.") for key in state):
        return {}
    if "classifier.convs.0.weight" in state:
        return {"head": "deeplabv2"}
    if "classifier.0.project.0.weight" not in state:
        # The cascaded model's classifier is one 1x1 convolution; FCN's begins with a 3x3.
        cascaded = _stage_blocks(state, 5) and "classifier.0.weight" in state
        return {} if cascaded else None
    project = state["classifier.0.project.0.weight"]
    if project.ndim != 4:
        return None
    channels, _, kernel, _ = project.shape
    options: dict[str, Any] = {}
    default = 256
    if kernel == 3:
        options["head"], default = "mmseg", 512
    elif _final_keys(state) == ["classifier.1.weight"]:
        options["head"] = "paper"
    if channels != default:
        options["aspp_channels"] = channels
    return options


def _final_keys(state: Mapping[str, Tensor]) -> list[str]:
    """Weights of the convolutions that give the main logits, by the form of the head."""
    summed = [k for k in state if re.fullmatch(r"classifier\.convs\.\d+\.weight", k)]
    if summed:
        return summed
    # The last one of the head: batch norm's weights have one dimension.
    single = [
        k for k, v in state.items() if re.fullmatch(r"classifier\.\d\.weight", k) and v.ndim == 4
    ]
    return [max(single)] if single else []


def _mobilenet_v2_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    from .models.mobilenetv2 import ROWS
    from .models.mobilenetv3 import make_divisible

    options: dict[str, Any] = {}
    found = []
    for i in range(len(ROWS)):
        name = "expanded_conv" if i == 0 else f"expanded_conv_{i}"
        weight = state.get(f"backbone.{name}.project.conv.weight")
        found.append(None if weight is None else weight.shape[0])
    exact = state["backbone.Conv.conv.weight"].shape[0] / 32
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
    return options


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        layout: name of the checkpoint's `Layout`.
        loaded: keys of the model that were filled.
        missing: keys of the model that the checkpoint lacks and that kept their values.
        unexpected: keys of the checkpoint that the model lacks.
        reset: keys of the model that were initialised anew.
        ignored: keys of the checkpoint that were left out on purpose: an auxiliary head that the
            model does not have, a decoder or a classifier without counterpart, optimiser slots.
    """

    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from a {self.layout} checkpoint"]
        for name in ("missing", "unexpected", "reset", "ignored"):
            keys = getattr(self, name)
            if keys:
                parts.append(f"{len(keys)} {name}: {_shorten(keys)}")
        return "; ".join(parts)


def load_weights(
    model: nn.Module,
    source: Source,
    *,
    layout: str = "auto",
    reset_head: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Fill a model of this package from a checkpoint of this or another library.

    The auxiliary head of a checkpoint is left out, and reported, where the model has none. Counters
    named num_batches_tracked may be absent (TensorFlow and PyTorch before 0.4.1 have none). The
    .safetensors files of `save_weights` carry preprocessing, class names and colours; these are set
    on the model too, names and colours where it has none yet.

    Args:
        model: what a builder of this package returns, also inside DistributedDataParallel or
            torch.compile.
        source: path of a checkpoint (see `read_state_dict`), or a state dict.
        layout: "auto", or the name of one of `LAYOUTS`.
        reset_head: initialise anew the convolution that gives the logits (the auxiliary head's
            too), whatever the checkpoint has for it, and all of the head that a checkpoint of a
            DeepLabv3+ or of an image classifier does not have; everything else must fit.
        strict: missing and unexpected keys are an error; otherwise they are reported. A tensor of
            another shape or kind is an error in both cases.

    Returns:
        LoadReport.

    Raises:
        FileNotFoundError, CheckpointError: as `read_state_dict`, or the checkpoint does not fit;
            the message names the keys. The model is unchanged then.
        ValueError: an unknown layout.

    Warns:
        UserWarning: everything fits, but the model dilates or upsamples in another way than the
            checkpoint's library, so that the numbers differ; the message has the builder's call.
    """
    chosen = None if layout == "auto" else _layout(layout)
    checkpoint = _open(source)
    chosen = chosen or _detect(checkpoint.state, checkpoint.label)
    return _load(_unwrapped(model), checkpoint, chosen, reset_head, strict)


def _load(
    model: nn.Module, checkpoint: _Checkpoint, chosen: Layout, reset_head: bool, strict: bool
) -> LoadReport:
    renamed = _rename(checkpoint.state, chosen, checkpoint.label)
    info = _inspect(checkpoint, chosen, renamed.state)
    if not chosen.rules:
        raise CheckpointError(f"{checkpoint.label} cannot be loaded. {chosen.notes}")
    if chosen.lacks and not reset_head:
        raise CheckpointError(
            f"{checkpoint.label} ({chosen.name} layout) has no head for this model. {chosen.notes}"
        )

    own = model.state_dict()
    final = _final_convs(model)
    reset = set()
    if reset_head:
        reset = {f"{name}.{p}" for name, conv in final.items() for p, _ in conv.named_parameters()}
        if chosen.lacks:
            reset |= {key for key in own if re.fullmatch(chosen.lacks, key)}
    fit = _compare(own, renamed, reset, set(final))
    problems = [
        *fit.shapes,
        *([fit.classes] if fit.classes else []),
        *([_listed("missing", fit.missing)] if strict and fit.missing else []),
        *([_listed("unexpected", fit.unexpected)] if strict and fit.unexpected else []),
    ]
    if not fit.loaded:
        problems.append("not one of its tensors is one of the model's")
    if problems:
        raise CheckpointError(_does_not_fit(checkpoint, model, info, fit, problems))
    different = _other_numbers(model, chosen, info, checkpoint, reset_head)
    if different:
        warnings.warn(f"{checkpoint.label}: {different}", UserWarning, stacklevel=3)

    fresh = _initialised(model, reset)
    model.load_state_dict({**own, **fit.loaded, **fresh})
    if not reset_head:
        _describe(model, info)
    return LoadReport(
        layout=chosen.name,
        loaded=tuple(fit.loaded),
        missing=fit.missing,
        unexpected=fit.unexpected,
        reset=tuple(fresh),
        ignored=(*renamed.ignored, *fit.ignored),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        inner = model.module if isinstance(model, wrapped) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def _final_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that give logits, by name."""
    from .nn import DeepLabV2Head

    found: dict[str, nn.Conv2d] = {}
    for head in ("classifier", "aux_classifier"):
        module = getattr(model, head, None)
        if not isinstance(module, nn.Module):
            continue
        convs = {
            f"{head}.{name}".rstrip("."): m
            for name, m in module.named_modules()
            if isinstance(m, nn.Conv2d)
        }
        names = list(convs)
        if not isinstance(module, DeepLabV2Head):
            names = names[-1:]
        found.update({name: convs[name] for name in names})
    return found


_NO_BUILDER = (
    "no builder of this package fits it: there are DeepLabv3 heads on ResNet-18 to 152, "
    "MobileNetV3-Large and TensorFlow's MobileNetV2"
)


@dataclass(frozen=True)
class _Fit:
    loaded: StateDict
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    # Problems as text: shapes and kinds of tensors; the number of classes.
    shapes: tuple[str, ...]
    classes: str


def _compare(
    own: Mapping[str, Tensor], renamed: _Renamed, reset: set[str], final: set[str]
) -> _Fit:
    """Hold a checkpoint against the model's state dict, without changing anything."""
    has_aux = any(key.startswith("aux_classifier.") for key in own)
    loaded: StateDict = {}
    unexpected = list(renamed.unknown)
    ignored: list[str] = []
    shapes: list[str] = []
    kinds: list[str] = []
    classes: dict[str, tuple[int, int]] = {}
    for key, tensor in renamed.state.items():
        foreign = renamed.foreign[key]
        if key not in own:
            skip = key.startswith("aux_classifier.") and not has_aux
            (ignored if skip else unexpected).append(foreign)
        elif key in reset:
            continue
        elif tensor.shape != own[key].shape:
            conv = key.rpartition(".")[0]
            if conv in final and tensor.shape[1:] == own[key].shape[1:]:
                classes[conv] = (tensor.shape[0], own[key].shape[0])
            else:
                shapes.append(f"{foreign}: {list(tensor.shape)}, not {list(own[key].shape)}")
        elif tensor.is_floating_point() != own[key].is_floating_point() and tensor.ndim:
            kinds.append(f"{foreign}: {tensor.dtype}, not {own[key].dtype}")
        else:
            loaded[key] = tensor
    missing = tuple(
        key
        for key in own
        if key not in renamed.state
        and key not in reset
        and not key.endswith(".num_batches_tracked")
    )
    problems = []
    if shapes:
        problems.append(_listed("of another shape", shapes))
    if kinds:
        problems.append(_listed("of another kind", kinds))
    message = ""
    if classes:
        theirs, ours = next(iter(classes.values()))
        where = ", ".join(sorted(classes))
        message = (
            f"it has {theirs} classes, the model {ours} ({where}): build the model with "
            f"num_classes={theirs}, or pass reset_head=True (--reset-head) to keep everything but "
            "the classifier, which then starts untrained"
        )
    return _Fit(loaded, missing, tuple(unexpected), tuple(ignored), tuple(problems), message)


def _does_not_fit(
    checkpoint: _Checkpoint, model: nn.Module, info: WeightsInfo, fit: _Fit, problems: list[str]
) -> str:
    config = getattr(model, "config", None)
    name = config[0] if config else type(model).__name__
    lines = [f"{checkpoint.label} ({info.layout} layout) does not fit {name}:", *problems]
    others = [key for key in fit.missing if not key.startswith("aux_classifier.")]
    if fit.missing and not others:
        lines.append(
            "it has no auxiliary head: build the model with aux_loss=False, or pass strict=False "
            "to leave the model's auxiliary head as it is"
        )
    elif info.model is not None and (others or fit.unexpected or fit.shapes):
        lines.append(f"the model that it fits: {info.builder_call()}")
    elif info.model is None:
        lines.append(_NO_BUILDER)
    if info.notes and (others or fit.unexpected or fit.shapes):
        lines.append(info.notes)
    return "\n  ".join(lines)


def _other_numbers(
    model: nn.Module,
    layout: Layout,
    info: WeightsInfo,
    checkpoint: _Checkpoint,
    reset_head: bool,
) -> str:
    """Why the model's numbers differ from those of the checkpoint's library; "" if none is seen."""
    differs = layout.differs(checkpoint.state)
    if differs:
        return f"the weights fit, but the numbers differ from the library's: {differs}"
    expected = dict(info.options)
    # The package's own models are trained at one output stride and evaluated at another.
    if "output_stride" not in layout.options(checkpoint.state, checkpoint.header):
        expected.pop("output_stride", None)
    if layout.pins_defaults:
        defaults = {"align_corners": False, "multi_grid": None, "contract_dilation": True}
        expected = {**defaults, **expected}
    actual: dict[str, Any] = {}
    if hasattr(model, "align_corners") and not reset_head:
        actual["align_corners"] = model.align_corners
    if hasattr(model, "output_stride"):
        actual["output_stride"] = model.output_stride
    backbone = getattr(model, "backbone", None)
    for option in ("multi_grid", "contract_dilation"):
        if hasattr(backbone, option):
            actual[option] = getattr(backbone, option)
    wrong = [k for k in actual if k in expected and actual[k] != expected[k]]
    if not wrong:
        return ""
    described = ", ".join(f"{k}={expected[k]!r} (the model has {actual[k]!r})" for k in wrong)
    config: Any = getattr(model, "config", None) or (info.model, {})
    name: str | None = config[0]
    options: dict[str, Any] = config[1]
    call = _call(name, {**options, **{k: expected[k] for k in wrong}}) if name else ""
    return f"the weights fit, but {layout.name} gives its numbers with {described}" + (
        f"; build it so: {call}" if call else ""
    )


def _initialised(model: nn.Module, keys: set[str]) -> StateDict:
    """Newly drawn values for keys of the model, which stays as it is."""
    from .nn import DeepLabV2Head

    modules = dict(model.named_modules())
    v2_heads = [name for name, m in modules.items() if isinstance(m, DeepLabV2Head)]
    fresh: StateDict = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict() if key in keys):
        module = copy.deepcopy(modules[name])
        module.reset_parameters()
        if any(name.startswith(f"{head}.") for head in v2_heads):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        for key, value in module.state_dict().items():
            if f"{name}.{key}" in keys:
                fresh[f"{name}.{key}"] = value
    return fresh


def _describe(model: Any, info: WeightsInfo) -> None:
    """Set class names, colours and preprocessing from the package's own metadata."""
    from .data.preprocess import Preprocess

    if info.classes is not None and getattr(model, "classes", None) is None:
        model.classes, model.palette = info.classes, info.palette
    if info.preprocess is not None:
        kind = type(getattr(model, "preprocess", None) or Preprocess())
        model.preprocess = kind(**{k: _tuples(v) for k, v in info.preprocess.items()})


def from_checkpoint(
    path: Source,
    *,
    layout: str = "auto",
    reset_head: bool = False,
    strict: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Build the model that a checkpoint fits and load it.

    Args:
        path: path of a checkpoint (see `read_state_dict`), or a state dict.
        layout, reset_head, strict: as `load_weights` has them.
        **overrides: options of the builder, above those that `inspect_weights` finds; num_classes
            and aux_loss too.

    Returns:
        The model, in training mode as builders leave it.

    Raises:
        As `load_weights`; CheckpointError also where no builder fits.
    """
    from .models import get_model

    given = None if layout == "auto" else _layout(layout)
    checkpoint = _open(path)
    chosen = given or _detect(checkpoint.state, checkpoint.label)
    info = _inspect(checkpoint, chosen, _rename(checkpoint.state, chosen, checkpoint.label).state)
    if info.model is None:
        raise CheckpointError(
            f"{checkpoint.label} ({info.layout} layout): {_NO_BUILDER}. {info.notes}".rstrip()
        )
    options = dict(info.options)
    if info.num_classes is not None:
        options["num_classes"] = info.num_classes
    if info.aux:
        options["aux_loss"] = True
    model = get_model(info.model, **{**options, **overrides})
    _load(model, checkpoint, chosen, reset_head, strict)
    return model


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model, as JSON's types: builder, options, classes, palette, preprocess.

    `read_state_dict` ignores it, `inspect_weights` and `load_weights` use it, in the header of a
    .safetensors file and under the key "deeplab_fast" beside "model" in a torch.save container.
    """
    from dataclasses import asdict

    model = _unwrapped(model)
    metadata: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        name, options = config
        metadata["model"] = name
        skipped = ("num_classes", "aux_loss")
        metadata["options"] = {k: v for k, v in options.items() if k not in skipped}
    for name in ("num_classes", "classes", "palette"):
        value = getattr(model, name, None)
        if value is not None:
            metadata[name] = value
    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        metadata["preprocess"] = asdict(preprocess)
    return json.loads(json.dumps(metadata))


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's state dict under a temporary name in the same folder, then rename it.

    Args:
        model: also inside DistributedDataParallel or torch.compile, whose prefixes are left out.
        path: .safetensors (with `model_metadata`), or .pth or .pt (a plain state dict, which
            torchvision's load_state_dict takes where the model is one of its own).

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are saved as .safetensors, .pth or .pt, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent} (to save {path.name} in)")
    model = _unwrapped(model)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            header = {"format": "pt", METADATA_KEY: json.dumps(model_metadata(model))}
            save_file(state, temporary, metadata=header)
        else:
            torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _shorten(items: Sequence[str]) -> str:
    shown = ", ".join(items[:SHOWN])
    more = len(items) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _listed(what: str, items: Sequence[str]) -> str:
    return f"{len(items)} {what}: {_shorten(items)}"


def _call(name: str, options: Mapping[str, Any]) -> str:
    return f"deeplab_fast.{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
