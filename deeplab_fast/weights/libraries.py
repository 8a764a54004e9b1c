"""How the models of other libraries are built, as far as their checkpoints and files tell."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar, cast

from torch import Tensor

from .._documents import parse_json
from ._common import one_line
from .settings import Settings

T = TypeVar("T")

# Of what a config says: its characters, the numbers of a list, their size, and how deep it is.
_LONGEST_CONFIG, _MOST_NUMBERS, _LARGEST, _DEEPEST = 4_000_000, 64, 1 << 31, 50


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


def smp_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    options = {"align_corners": True, **_no_contraction(state, origin)}
    config = {**_SMP_DEFAULTS, **origin.config}
    if not _is_smp(origin):
        return options
    options |= _smp_told(config)
    dropout = config["decoder_aspp_dropout"]
    if _is_number(dropout) and dropout != 0.5:
        options["dropout"] = dropout
    return options


def smp_plus_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    options = _no_contraction(state, origin)
    if _is_smp(origin):
        options |= _smp_told({**_SMP_DEFAULTS, "encoder_output_stride": 16, **origin.config})
    return options


def _smp_told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Output stride and rates, where the config has values that can be ones."""
    options: dict[str, Any] = {}
    if type(config["encoder_output_stride"]) is int:
        options["output_stride"] = config["encoder_output_stride"]
    rates = config["decoder_atrous_rates"]
    if _whole_numbers(rates):
        options["atrous_rates"] = tuple(rates)
    return options


def _whole_numbers(value: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(value, (list, tuple))
        and len(value) <= _MOST_NUMBERS
        and all(type(v) is int and abs(v) <= _LARGEST for v in value)
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) <= _LARGEST


def _is_smp(origin: Origin) -> bool:
    return "encoder_name" in origin.config


def smp_differs(state: Mapping[str, Tensor], origin: Origin) -> str:
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
    return "; ".join(map(one_line, reasons))


def vainf_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
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

    strides: Sequence[int] | None
    dilations: Sequence[int] | None
    multi_grid: Sequence[int] | None
    contract_dilation: bool
    rates: Sequence[int] | None
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

    def read(
        part: str, key: str, default: object, makes_sense: Callable[[object], TypeGuard[T]]
    ) -> T | None:
        value: object = {"backbone": backbone, "decode_head": head}[part].get(key, default)
        if makes_sense(value):
            return value
        unread.append(f"{part}.{key}")
        return None

    def is_grid(value: object) -> TypeGuard[Sequence[int] | None]:
        return value is None or _whole_numbers(value)

    def is_number(value: object) -> TypeGuard[float]:
        return isinstance(value, (int, float)) and _is_number(value)

    def is_flag(value: object) -> TypeGuard[bool]:
        return isinstance(value, bool)

    def is_text(value: object) -> TypeGuard[str]:
        return isinstance(value, str)

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
        caffe=read("backbone", "style", "pytorch", is_text) == "caffe",
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
    if len(text) > _LONGEST_CONFIG:
        return {}
    try:
        statements = ast.parse(text).body
    # Python's parser has bounds of its own for what is nested.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id == "model":
                value = _literal(statement.value, 0)
                return value if isinstance(value, dict) else {}
    return {}


def _literal(node: ast.expr, depth: int) -> object:
    """A literal, also one of dict(...) calls; `_UNREAD` for anything else."""
    if depth > _DEEPEST:
        return _UNREAD
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {k.arg: _literal(k.value, depth + 1) for k in node.keywords if k.arg is not None}
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _literal(v, depth + 1) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_literal(each, depth + 1) for each in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        return _UNREAD


def mmseg_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
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


def mmseg_settings(state: Mapping[str, Tensor], origin: Origin) -> Settings:
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
    for key in state if built.eps else ():
        name, _, leaf = key.rpartition(".")
        part = name.partition(".")[0]
        if leaf == "running_mean" and part in built.eps:
            eps = {"eps": built.eps[part]}
            settings[name] = {"class": "BatchNorm2d", "new": False, "values": eps}
    return settings


def mmseg_differs(state: Mapping[str, Tensor], origin: Origin) -> str:
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
    return "; ".join(map(one_line, reasons))


def fregu856_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    stride = 8 if any(key.startswith("resnet.layer4.") for key in state) else 16
    return {"output_stride": stride}


def tflite_options(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """The output stride, where the header has the list of ops.

    An entry of "plan" is ["conv", input, output, name, depthwise, stride, dilation, ...].
    """
    try:
        strides = [op[5] for op in parse_json(origin.header["plan"]) if op[0] == "conv"]
    except (KeyError, ValueError, TypeError, IndexError):
        return {}
    reduced = [stride for stride in strides if stride != 1]
    stride = math.prod(reduced) if _whole_numbers(reduced) else None
    return {"output_stride": stride} if stride in (8, 16) else {}
