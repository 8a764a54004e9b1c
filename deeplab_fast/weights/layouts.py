"""The names that other libraries give to the tensors of a DeepLabv3, as a table of rules."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._common import CheckpointError, StateDict, shorten
from .settings import Settings


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
class Origin:
    """What lies beside a checkpoint's tensors and says how their model was built.

    Attributes:
        name: of the file; empty for a state dict.
        header: text entries of a .safetensors header.
        config: the config.json that save_pretrained wrote beside the file.
        meta: what mmengine and mmcv keep under "meta" beside the state dict.
    """

    name: str = ""
    header: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Names of a library's tensors, and what a model needs to give the library's numbers.

    Attributes:
        name: what `load_weights(layout=...)` calls it.
        detect: regular expressions; each must match the beginning of at least one key.
        rules: tried in order, the first that matches a key renames it.
        options: builder options for the same numbers, from the state dict under its own names and
            what lies beside it.
        settings: what has to be set on the model beyond options, from the same.
        differs: why nothing gives the library's numbers, from the same; empty where something does.
        untold: options that decide on the numbers and that names and shapes do not tell.
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
    options: Callable[[Mapping[str, Tensor], Origin], dict[str, Any]] = lambda state, origin: {}
    settings: Callable[[Mapping[str, Tensor], Origin], Settings] = lambda state, origin: {}
    differs: Callable[[Mapping[str, Tensor], Origin], str] = lambda state, origin: ""
    untold: tuple[str, ...] = ()
    notes: str = ""
    branches: str = ""
    lacks: str = ""
    pins_defaults: bool = False

    def has(self, key: str) -> bool:
        """Whether a rule is about the key."""
        return any(re.fullmatch(rule.pattern, key) for rule in self.rules)


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


def _no_contraction(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    return {} if _is_timm(state) else {"contract_dilation": False}


# The library's own defaults of what its config.json may leave out.
_SMP_DEFAULTS: dict[str, Any] = {
    "encoder_output_stride": 8,
    "decoder_atrous_rates": (12, 24, 36),
    "decoder_aspp_dropout": 0.5,
}


def _smp_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    options = {"align_corners": True, **_no_contraction(state, origin)}
    config = {**_SMP_DEFAULTS, **origin.config}
    if not _is_smp(origin):
        return options
    options |= _smp_told(config)
    dropout = config["decoder_aspp_dropout"]
    if isinstance(dropout, (int, float)) and dropout != 0.5:
        options["dropout"] = dropout
    return options


def _smp_plus_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    options = _no_contraction(state, origin)
    if _is_smp(origin):
        options |= _smp_told({**_SMP_DEFAULTS, "encoder_output_stride": 16, **origin.config})
    return options


def _smp_told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Output stride and rates, where the config has values that can be ones."""
    options: dict[str, Any] = {}
    if isinstance(config["encoder_output_stride"], int):
        options["output_stride"] = config["encoder_output_stride"]
    rates = config["decoder_atrous_rates"]
    if _whole_numbers(rates):
        options["atrous_rates"] = tuple(rates)
    return options


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(v) is int for v in value)


def _is_smp(origin: Origin) -> bool:
    return "encoder_name" in origin.config


def _smp_differs(state: Mapping[str, Tensor], origin: Origin) -> str:
    if not _is_smp(origin):
        return ""
    config = {**_SMP_DEFAULTS, **origin.config}
    stride = config["encoder_output_stride"]
    told = {"encoder_output_stride": "output_stride", "decoder_atrous_rates": "atrous_rates"}
    options = _smp_told(config)
    reasons = [
        f"its config.json has {key}={config[key]!r}, which cannot be read"
        for key, option in told.items()
        if option not in options
    ]
    activation = config.get("activation")
    if activation not in (None, "identity"):
        reasons.append(f"its model ends in activation={activation!r}, this one returns logits")
    if config.get("upsampling") not in (None, stride):
        reasons.append(
            f"its model upsamples by {config['upsampling']} at output stride {stride}, this one to "
            "the size of the input"
        )
    if config.get("encoder_depth", 5) != 5:
        reasons.append(f"its head reads stage {config['encoder_depth']}, this one's the last")
    return "; ".join(reasons)


def _vainf_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """The output stride, which its training script writes into the file's name."""
    found = re.search(r"_os(8|16)(?![0-9])", origin.name)
    return {"output_stride": int(found[1])} if found else {}


@dataclass(frozen=True)
class _MMSeg:
    """How a model of mmsegmentation was built: the arguments of its config that decide.

    None: not told, but for `multi_grid`, where "multi_grid" in `unread` says so.

    Attributes:
        caffe: whether the first convolution of a bottleneck has the stride.
        eps: of the batch norms of a part of the model, where the config has one.
        unread: arguments whose values are no literals or make no sense.
        lost: what nothing here gives, as text.
    """

    strides: tuple[int, ...] | None
    dilations: tuple[int, ...] | None
    multi_grid: tuple[int, ...] | None
    contract_dilation: bool
    rates: tuple[int, ...] | None
    align_corners: bool
    dropout: float = 0.1
    caffe: bool = False
    eps: Mapping[str, float] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def output_stride(self) -> int | None:
        return None if self.strides is None else 4 * math.prod(self.strides)


_MMSEG_STRIDES = {8: ((1, 2, 1, 1), (1, 1, 2, 4)), 16: ((1, 2, 2, 1), (1, 1, 1, 2))}
_MMSEG_RATES = {8: (1, 12, 24, 36), 16: (1, 6, 12, 18)}


def _mmseg_built(origin: Origin) -> _MMSeg | None:
    """By the config that its checkpoints keep, else by the name that its published files have."""
    text = origin.meta.get("cfg", origin.meta.get("config"))
    model = _config_model(text) if isinstance(text, str) else {}
    backbone, head = model.get("backbone"), model.get("decode_head")
    if isinstance(backbone, dict) and isinstance(head, dict) and "dilations" in head:
        return _mmseg_config(model, backbone, head)
    named = re.match(r"deeplabv3_r\d+b?-d(8|16)(?:-mg(\d+))?_(\d+x\d+)_", origin.name)
    if named is None:
        return None
    stride = int(named[1])
    return _MMSeg(
        *_MMSEG_STRIDES[stride],
        multi_grid=tuple(map(int, named[2])) if named[2] else None,
        contract_dilation=True,
        rates=_MMSEG_RATES[stride],
        align_corners=named[3] == "769x769",
    )


_MMSEG_PARTS = {
    "backbone": "backbone",
    "decode_head": "classifier",
    "auxiliary_head": "aux_classifier",
}
_MMSEG_MEAN = (123.675, 116.28, 103.53)
_MMSEG_STD = (58.395, 57.12, 57.375)


def _mmseg_config(
    model: Mapping[str, Any], backbone: Mapping[str, Any], head: Mapping[str, Any]
) -> _MMSeg:
    unread: list[str] = []

    def read(part: str, key: str, default: Any, makes_sense: Callable[[Any], bool]) -> Any:
        value = {"backbone": backbone, "decode_head": head}[part].get(key, default)
        if makes_sense(value):
            return value
        unread.append(f"{part}.{key}")
        return None

    def is_grid(value: Any) -> bool:
        return value is None or _whole_numbers(value)

    def is_number(value: Any) -> bool:
        return type(value) in (int, float)

    def is_flag(value: Any) -> bool:
        return isinstance(value, bool)

    dropout = read("decode_head", "dropout_ratio", 0.1, is_number)
    eps: dict[str, float] = {}
    lost: list[str] = []
    for part, ours in _MMSEG_PARTS.items():
        section = model.get(part)
        norm = section.get("norm_cfg") if isinstance(section, dict) else None
        value = norm.get("eps") if isinstance(norm, dict) else None
        if value is not None and is_number(value):
            eps[ours] = float(value)
        elif value is not None or norm is _UNREAD:
            unread.append(f"{part}.norm_cfg")
        activation = section.get("act_cfg") if isinstance(section, dict) else None
        named = activation.get("type") if isinstance(activation, dict) else activation
        if isinstance(section, dict) and "act_cfg" in section and named != "ReLU":
            lost.append(f"{part}.act_cfg={activation!r}, where this one has ReLU")
    if head.get("in_index", -1) not in (-1, 3):
        lost.append(f"decode_head.in_index={head['in_index']!r}, where this one reads the last")
    if head.get("out_channels") == 1:
        lost.append(
            "one logit for two classes, whose sigmoid is held against "
            f"threshold={head.get('threshold', 0.3)!r} (pass that threshold to predict)"
        )
    prepare = model.get("data_preprocessor")
    if isinstance(prepare, dict):
        for key, usual in (("mean", _MMSEG_MEAN), ("std", _MMSEG_STD), ("bgr_to_rgb", True)):
            if prepare.get(key, usual) != usual:
                lost.append(
                    f"data_preprocessor.{key}={prepare[key]!r} of a BGR image of 0 to 255, where "
                    f"the model's preprocess has {usual!r}"
                )
    return _MMSeg(
        strides=read("backbone", "strides", (1, 2, 2, 2), _whole_numbers),
        dilations=read("backbone", "dilations", (1, 1, 1, 1), _whole_numbers),
        multi_grid=read("backbone", "multi_grid", None, is_grid),
        contract_dilation=bool(read("backbone", "contract_dilation", False, is_flag)),
        rates=read("decode_head", "dilations", None, _whole_numbers),
        align_corners=bool(read("decode_head", "align_corners", False, is_flag)),
        dropout=0.1 if dropout is None else dropout,
        caffe=read("backbone", "style", "pytorch", lambda v: isinstance(v, str)) == "caffe",
        eps=eps,
        unread=tuple(unread),
        lost=tuple(lost),
    )


class _Unread:
    """Stands for what a config has in another form than a literal."""

    def __repr__(self) -> str:
        return "an expression"


_UNREAD = _Unread()


def _config_model(text: str) -> dict[str, Any]:
    """`model` of a config in mmengine's Python, read without running it."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "model":
            value = _literal(statement.value)
            return value if isinstance(value, dict) else {}
    return {}


def _literal(node: ast.expr) -> Any:
    """A literal, also one of dict(...) calls; `_UNREAD` for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {k.arg: _literal(k.value) for k in node.keywords if k.arg is not None}
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _literal(v) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(map(_literal, node.elts))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _UNREAD


def _mmseg_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    built = _mmseg_built(origin)
    if built is None:
        return {}
    options: dict[str, Any] = {"contract_dilation": built.contract_dilation}
    if built.output_stride in _MMSEG_STRIDES:
        options["output_stride"] = built.output_stride
    if built.rates is not None:
        options["atrous_rates"] = built.rates[1:]
    if "backbone.multi_grid" not in built.unread:
        options["multi_grid"] = None
    if "decode_head.align_corners" not in built.unread:
        options["align_corners"] = built.align_corners
    if built.dropout != 0.1:
        options["dropout"] = built.dropout
    return options


def _mmseg_settings(state: Mapping[str, Tensor], origin: Origin) -> Settings:
    """What mmsegmentation's config says and no option does.

    Multi-grid as the dilations themselves, where the paper has unit rates; strides on the first
    convolution of a block; eps of the batch norms.
    """
    built = _mmseg_built(origin)
    if built is None:
        return {}
    values: dict[str, dict[str, Any]] = {}
    if not basic_blocks(state):
        for i, rate in enumerate(built.multi_grid or ()):
            values[f"backbone.layer4.{i}.conv2"] = {
                "dilation": (rate, rate),
                "padding": (rate, rate),
            }
        for stage, stride in enumerate((built.strides or ()) if built.caffe else (), 1):
            if stride != 1:
                block = f"backbone.layer{stage}.0"
                values.setdefault(f"{block}.conv1", {})["stride"] = (stride, stride)
                values.setdefault(f"{block}.conv2", {})["stride"] = (1, 1)
    settings: Settings = {
        name: {"class": "Conv2d", "new": False, "values": given} for name, given in values.items()
    }
    if built.eps:
        renamed = rename_tensors(state, layout_named("mmseg"), "the checkpoint").state
        for key in renamed:
            name, _, leaf = key.rpartition(".")
            part = name.partition(".")[0]
            if leaf == "running_mean" and part in built.eps:
                settings[name] = {
                    "class": "BatchNorm2d",
                    "new": False,
                    "values": {"eps": built.eps[part]},
                }
    return settings


def _mmseg_differs(state: Mapping[str, Tensor], origin: Origin) -> str:
    reasons = []
    if basic_blocks(state):
        reasons.append("mmsegmentation dilates a basic block's first convolution only")
    built = _mmseg_built(origin)
    if built is not None:
        if built.unread:
            reasons.append(f"its config has {', '.join(built.unread)} in a form that is not read")
        reasons += [f"its config has {text}" for text in built.lost]
        usual = _MMSEG_STRIDES.get(built.output_stride or 0)
        known = built.strides is not None and built.dilations is not None
        if known and usual != (built.strides, built.dilations):
            reasons.append(
                f"its backbone has strides {built.strides} and dilations {built.dilations}"
            )
        rates = built.rates
        if rates is not None and (rates[:1] != (1,) or 1 in rates[1:]):
            reasons.append(f"its head has dilations {rates}, where 1 is a 1x1 convolution")
    return "; ".join(reasons)


def _fregu856_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    stride = 8 if any(key.startswith("resnet.layer4.") for key in state) else 16
    return {"output_stride": stride}


def _tflite_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """The output stride, where the header has the list of ops.

    An entry of "plan" is ["conv", input, output, name, depthwise, stride, dilation, ...].
    """
    try:
        strides = [op[5] for op in json.loads(origin.header["plan"]) if op[0] == "conv"]
        stride = math.prod(strides)
    except (KeyError, ValueError, TypeError, IndexError):
        return {}
    return {"output_stride": stride} if stride in (8, 16) else {}


_OWN_KEYS = r"(?:backbone|classifier|aux_classifier)\..+"
_HEAD_KEYS = r"(?:aux_)?classifier\..+"
# Everything behind the ASPP, and the auxiliary head.
_DECODER_KEYS = r"classifier\.(?!0\.).+|aux_classifier\..+"

_OWN_UNTOLD = (
    "output_stride",
    "atrous_rates",
    "align_corners",
    "multi_grid",
    "contract_dilation",
)

_V3PLUS = "DeepLabv3+: its decoder has no counterpart here."

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="smp",
        detect=(r"encoder\.", r"decoder\.(aspp|0)\.convs\.", "segment"),
        rules=(
            Rule(r"encoder\.(?:model\.)?(.+)", r"backbone.\1"),
            Rule(r"decoder\.(?:aspp|0)\.(.+)", r"classifier.0.\1"),
            Rule(r"decoder\.(?:conv|1)\.(.+)", r"classifier.1.\1"),
            Rule(r"decoder\.(?:bn|2)\.(.+)", r"classifier.2.\1"),
            Rule(r"segmentation_head\.0\.(.+)", r"classifier.4.\1"),
            Rule(r"classification_head\..+", None),
        ),
        options=_smp_options,
        differs=_smp_differs,
        untold=("output_stride", "atrous_rates"),
        notes=(
            "segmentation-models-pytorch dilates without contraction and upsamples with "
            "align_corners=True. The output stride is in the config.json of save_pretrained, not "
            "in the weights: it is 8 unless encoder_output_stride was 16, which needs "
            "output_stride=16, atrous_rates=(12, 24, 36). A classification head (aux_params) is "
            "left out."
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
        options=_smp_plus_options,
        untold=("output_stride", "atrous_rates"),
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
        options=_mmseg_options,
        settings=_mmseg_settings,
        differs=_mmseg_differs,
        untold=("output_stride", "atrous_rates", "multi_grid", "align_corners"),
        notes=(
            "mmsegmentation: the config in a checkpoint's meta, or else the name of a published "
            "file, tells d8 from d16 (output_stride=16), multi-grid and the 769x769 configurations "
            "(align_corners=True); names and shapes of the tensors do not."
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
        options=_vainf_options,
        untold=("output_stride",),
        notes=(
            "DeepLabV3Plus-Pytorch: the output stride is in the name of its files (_os16), not in "
            "the weights. Its builders default to 8, its training script to 16 (output_stride=16)."
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
        options=_vainf_options,
        untold=("output_stride",),
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
        untold=("output_stride",),
        options=lambda state, origin: {"multi_grid": (1, 2, 4), "contract_dilation": False},
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
        untold=("output_stride",),
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
        untold=("output_stride",),
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
        notes="An image classifier: it has a backbone and no head.",
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
        untold=_OWN_UNTOLD,
    ),
    Layout(
        name="deeplab_fast",
        detect=(r"backbone\.|classifier\.",),
        rules=(Rule(f"({_OWN_KEYS})", r"\1"),),
        untold=_OWN_UNTOLD,
    ),
)

# Tensors that training frameworks keep beside a model.
NOT_MODEL = re.compile(
    r"(?:criterion|loss(?:_\w+)?|metrics?|(?:train|val|test)_\w+)\..+|(?:.+\.)?n_averaged"
)


def layout_named(name: str) -> Layout:
    """The layout of that name; ValueError lists the names there are."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"no layout is named {name!r}; there are: auto, {known}")


def known_layout(names: Iterable[str]) -> Layout | None:
    """The first layout whose names these are."""
    names = list(names)
    for layout in LAYOUTS:
        if all(any(re.match(d, name) for name in names) for d in layout.detect):
            return layout
    return None


def detect_layout(state: Mapping[str, Tensor], label: str) -> Layout:
    """The first layout whose names a state dict has; CheckpointError, with `label`, for none."""
    layout = known_layout(state)
    if layout is not None:
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
