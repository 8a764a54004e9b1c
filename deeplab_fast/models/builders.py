"""Builders of DeepLabv3 models, with torchvision's names, arguments, errors and outputs."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, TypeGuard, TypeVar, Unpack, cast

from torch import Tensor, nn

from .. import weights
from .._documents import shown
from ..data.classes import MOST_CLASSES, class_set
from ..data.preprocess import Preprocess
from ..nn import HEADS, CascadedHead, FCNHead
from ..weights.embedded import list_embedded
from ..weights.files import read_state_dict
from ..weights.from_file import fill
from ..weights.layouts import layout_named, rename_tensors
from ..weights.load import Opened, check_described, open_weights
from ..weights.registry import foreign_rules, published_enum, torchvision_enum
from .backbone import Backbone
from .deeplabv3 import DeepLabV3, check_output_stride

DEFAULT_NUM_CLASSES = 21
MOST_CHANNELS = 4096
"""Of an ASPP: of ResNet's 2048 channels a branch of so many has 300 MB of weights."""
MOST_RATES = 32
"""Atrous branches of an ASPP, and unit rates of a stage."""
T = TypeVar("T")


class _Published(Protocol):
    """A member of torchvision's enums of weights."""

    meta: dict[str, Any]

    def get_state_dict(self, *, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        """Downloaded, or from the cache."""


class DeepLabOptions(TypedDict, total=False):
    """What the builders take beyond torchvision's arguments.

    output_stride: 8 or 16.
    multi_grid: unit rates of the last stage's blocks (ResNet). None dilates as torchvision does.
    contract_dilation: a dilated stage's first 3x3 keeps the dilation before it (ResNet): True, as
        torchvision has it; segmentation-models-pytorch has False.
    atrous_rates: dilations of the ASPP at the chosen output stride.
    head: "torchvision", "paper", "mmseg" or "deeplabv2".
    aspp_channels: channels of each branch of the ASPP.
    dropout: of the head.
    align_corners: how logits are upsampled.
    stem: "torchvision" or "deep" (ResNet).
    image_pooling_norm: "batch", or "running" to train with one image a batch.
    replace_stride_with_dilation: as torchvision's ResNet has it, in place of output_stride.
    fused: train by the fused forms (`DeepLabV3.fused`); True by default.
    """

    output_stride: int
    multi_grid: Sequence[int] | None
    contract_dilation: bool
    atrous_rates: Sequence[int]
    head: str
    aspp_channels: int
    dropout: float
    align_corners: bool
    stem: str
    image_pooling_norm: str
    replace_stride_with_dilation: Sequence[bool]
    fused: bool


@dataclass(frozen=True)
class Family:
    """What distinguishes one builder from another.

    Attributes:
        backbone: called with output_stride, aux and the backbone's options.
        output_stride: the default.
        rates: the ASPP's default atrous rates by output stride; None for the cascaded model.
        backbone_options: names of the options that the backbone takes.
        backbone_enum: torchvision's name for the backbone's published weights, where there are any.
        preprocess: what the backbone's ImageNet weights were trained with.
    """

    backbone: Callable[..., Backbone]
    output_stride: int
    rates: dict[int, tuple[int, ...]] | None
    backbone_options: tuple[str, ...] = ()
    backbone_enum: str | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)


_HEAD_OPTIONS = ("atrous_rates", "head", "aspp_channels", "dropout", "image_pooling_norm")
_POSITIONAL = ("weights", "progress", "num_classes", "aux_loss", "weights_backbone")
# torchvision's argument of before 0.13 -> its name now, and what True meant.
_LEGACY = {
    "pretrained": ("weights", "COCO_WITH_VOC_LABELS_V1"),
    "pretrained_backbone": ("weights_backbone", "IMAGENET1K_V1"),
}


def load(name: str) -> DeepLabV3:
    """`weights.load`, whose models are all built here."""
    return cast(DeepLabV3, weights.load(name))


def builder(name: str, family: Family, module: str, doc: str) -> Callable[..., DeepLabV3]:
    """A builder with torchvision's arguments, which also takes its calls from before 0.13.

    Args:
        name, module, doc: of the function: its name there, `__name__` of the file, docstring.
        family: what it builds.
    """

    def build(
        *positional: object,
        weights: object = None,
        progress: bool = True,
        num_classes: int | None = None,
        aux_loss: bool | None = None,
        weights_backbone: object = None,
        **options: Unpack[DeepLabOptions],
    ) -> DeepLabV3:
        arguments: dict[str, Any] = {
            "weights": weights,
            "progress": progress,
            "num_classes": num_classes,
            "aux_loss": aux_loss,
            "weights_backbone": weights_backbone,
        }
        if positional:
            arguments.update(_positional(name, positional))
        extra: dict[str, Any] = {**options}
        for old, (new, default) in _LEGACY.items():
            if old in extra:
                arguments[new] = extra.pop(old)
                _warn(
                    f"The parameter '{old}' is deprecated since 0.13 and may be removed in the "
                    f"future, please use '{new}' instead."
                )
            if isinstance(arguments[new], bool):
                arguments[new] = default if arguments[new] else None
                _warn(
                    f"Arguments other than a weight enum or `None` for '{new}' are deprecated "
                    "since 0.13 and may be removed in the future. The current behavior is "
                    f"equivalent to passing `{new}={arguments[new]!r}`."
                )
        return _build(name, family, **arguments, options=extra)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = doc
    return build


def _positional(name: str, values: tuple[object, ...]) -> dict[str, object]:
    if len(values) > len(_POSITIONAL):
        raise TypeError(
            f"{name} takes at most {len(_POSITIONAL)} positional arguments "
            f"({', '.join(_POSITIONAL)}), got {len(values)}"
        )
    names = _POSITIONAL[: len(values)]
    listed = " and ".join(", ".join(f"'{n}'" for n in names).rsplit(", ", 1))
    _warn(
        f"Using {listed} as positional parameter(s) is deprecated since 0.13 and may be removed "
        "in the future. Please use keyword parameter(s) instead."
    )
    return dict(zip(names, values, strict=True))


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def _build(
    name: str,
    family: Family,
    weights: object,
    progress: bool,
    num_classes: int | None,
    aux_loss: bool | None,
    weights_backbone: object,
    options: dict[str, Any],
) -> DeepLabV3:
    # No property of the weights: it is not kept with them.
    fused = options.pop("fused", True)
    _check_options(name, family, options)
    given = tuple(options)
    published = opened = None
    if weights is not None and _is_path(weights):
        opened = open_weights(weights)
        info = opened.info
        num_classes = agree("num_classes", num_classes, info.num_classes)
        aux_loss = info.aux if aux_loss is None else aux_loss
        # A checkpoint of another model is load_weights' to refuse.
        if info.model == name:
            check_described(opened)
            options = {**info.options, **options}
            _check_options(name, family, options)
    elif weights is not None:
        published = _published(
            name, published_enum(name), "torchvision.models.segmentation", weights
        )
        num_classes = agree("num_classes", num_classes, len(published.meta["categories"]))
        aux_loss = agree("aux_loss", aux_loss, True)
    num_classes = check_num_classes(num_classes)
    # With weights for the whole model those of the backbone would be overwritten.
    wanted = None if weights is not None else weights_backbone
    backbone_weights: str | os.PathLike[str] | _Published | None = None
    if _is_path(wanted):
        backbone_weights = wanted
    elif wanted is not None:
        backbone_weights = _published(name, family.backbone_enum, "torchvision.models", wanted)

    model = _assemble(family, num_classes, bool(aux_loss), options)
    model.preprocess = family.preprocess
    model.fused = bool(fused)
    model.config = (name, {"num_classes": num_classes, "aux_loss": bool(aux_loss), **options})
    if backbone_weights is not None:
        _load_backbone(name, model, backbone_weights, progress)
    if published is not None:
        model.load_state_dict(published.get_state_dict(progress=progress, check_hash=True))
        _describe_classes(model, "voc")
    if opened is not None:
        load_file(model, opened, given)
    return model


def _assemble(family: Family, num_classes: int, aux: bool, options: dict[str, Any]) -> DeepLabV3:
    given = {k: options[k] for k in family.backbone_options if k in options}
    if family.rates is None:
        given.setdefault("multi_grid", (1, 2, 1))
    output_stride = options.get("output_stride", family.output_stride)
    backbone = family.backbone(output_stride=output_stride, aux=aux, **given)
    # The auxiliary head is drawn first, as torchvision draws it.
    aux_classifier = FCNHead(backbone.aux_channels, num_classes) if aux else None
    if family.rates is None:
        classifier: nn.Module = CascadedHead(backbone.out_channels, num_classes)
    else:
        rates = family.rates[8 if backbone.output_stride <= 8 else 16]
        classifier = _head(backbone, num_classes, rates, options)
    return DeepLabV3(
        cast(nn.Module, backbone),
        classifier,
        aux_classifier,
        align_corners=options.get("align_corners", False),
    )


def _head(
    backbone: Backbone, num_classes: int, rates: tuple[int, ...], options: dict[str, Any]
) -> nn.Module:
    name = options.get("head", "torchvision")
    if name == "deeplabv2":
        rates = (6, 12, 18, 24) if backbone.output_stride <= 8 else (3, 6, 9, 12)
    rates = tuple(options.get("atrous_rates", rates))
    given = {
        k: options[k] for k in ("aspp_channels", "dropout", "image_pooling_norm") if k in options
    }
    return HEADS[name](backbone.out_channels, num_classes, rates, **given)


def _check_options(name: str, family: Family, options: dict[str, Any]) -> None:
    """Every option exists for the model and has a value that it takes."""
    head_options = () if family.rates is None else _HEAD_OPTIONS
    allowed = ("output_stride", "align_corners", *family.backbone_options, *head_options)
    unknown = [k for k in options if k not in allowed]
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(map(repr, unknown))}; there are: "
            f"{', '.join((*_POSITIONAL, *sorted((*allowed, 'fused'))))}"
        )
    if "output_stride" in options:
        check_output_stride(options["output_stride"])
        if options.get("replace_stride_with_dilation") is not None:
            raise ValueError(
                "output_stride and replace_stride_with_dilation both say which stages are dilated; "
                f"got {options['output_stride']} and {options['replace_stride_with_dilation']}: "
                "give one of them"
            )
    check_rates(options.get("atrous_rates", ()))
    head = options.get("head", "torchvision")
    if head not in HEADS:
        raise ValueError(f"head must be one of {tuple(HEADS)}, got {head!r:.80}")
    given = [k for k in ("aspp_channels", "dropout", "image_pooling_norm") if k in options]
    if given and head == "deeplabv2":
        raise ValueError(f"head 'deeplabv2' has no {', '.join(given)}; leave them out")
    dropout = options.get("dropout", 0.0)
    if not isinstance(dropout, numbers.Real) or not 0.0 <= float(dropout) < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {shown(dropout)}")
    check_channels(options.get("aspp_channels", 1))
    multi_grid = options.get("multi_grid")
    if multi_grid is not None:
        _check_integers("multi_grid rates", multi_grid, MOST_CHANNELS)


def check_num_classes(num_classes: int | None) -> int:
    if num_classes is None:
        return DEFAULT_NUM_CLASSES
    _check_integer("num_classes", num_classes, MOST_CLASSES)
    return num_classes


def check_channels(channels: int) -> None:
    """Raises ValueError for channels of an ASPP that nobody means: before they are allocated."""
    _check_integer("aspp_channels", channels, MOST_CHANNELS)


def check_rates(rates: Sequence[int]) -> None:
    """Raises ValueError for rates that are no dilations, or more of them than `MOST_RATES`."""
    _check_integers("atrous_rates", rates, 2**31 - 1)


def _check_integers(name: str, values: Sequence[int], most: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of integers, got {shown(values)}")
    if len(values) > MOST_RATES:
        raise ValueError(f"{name} must be at most {MOST_RATES} rates, got {len(values)}")
    for value in values:
        _check_integer(name, value, most, values)


def _check_integer(name: str, value: object, most: int, of: object = None) -> None:
    got = shown(value if of is None else tuple(cast("Sequence[int]", of)))
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be integers of 1 to {most}, got {got}")
    if int(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {got}")
    if int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {got}")


def agree(name: str, given: T | None, expected: T) -> T:
    """The value that comes with the weights; another one given is torchvision's error."""
    if given is not None and given != expected:
        raise ValueError(
            f"The parameter '{name}' expected value {expected} but got {given} instead."
        )
    return expected


def _is_path(weights: object) -> TypeGuard[str | os.PathLike[str]]:
    if isinstance(weights, os.PathLike):
        return True
    suffixes = (".pth", ".pt", ".safetensors", ".npz", ".ckpt")
    return isinstance(weights, str) and (
        weights.endswith(suffixes)
        or os.sep in weights
        or weights in list_embedded()
        or os.path.exists(weights)
    )


def _published(name: str, enum: str | None, module: str, weights: object) -> _Published:
    """torchvision's entry for published weights: an enum member or the name of one."""
    if enum is None:
        raise ValueError(
            f"No weights available for model {name}; got {weights!r}. Pass the path of a checkpoint"
        )
    entries = torchvision_enum(name, module, enum)
    try:
        found: _Published = entries.verify(weights)
        return found
    except KeyError:
        raise ValueError(
            f"{name}: no weights are named {weights!r}; there are: "
            f"{', '.join(entries.__members__)}, or the path of a checkpoint"
        ) from None


def _load_backbone(
    name: str, model: DeepLabV3, weights: str | os.PathLike[str] | _Published, progress: bool
) -> None:
    """Fill the backbone from an image classifier's state dict, whose classifier is left out."""
    if isinstance(weights, (str, os.PathLike)):
        state = read_state_dict(weights)
    else:
        state = weights.get_state_dict(progress=progress, check_hash=True)
    imagenet = layout_named("imagenet")
    rules = (*foreign_rules(imagenet.name, name), *imagenet.rules)
    renamed = rename_tensors(state, imagenet, "weights_backbone", rules)
    known = {key.removeprefix("backbone."): value for key, value in renamed.state.items()}
    state = {**known, **{key: state[key] for key in renamed.unknown}}
    missing, unexpected = model.backbone.load_state_dict(state, strict=False)
    # The copies of layer4 behind it are no part of a classifier.
    missing = [k for k in missing if not k.startswith(("layer5.", "layer6.", "layer7."))]
    if missing or unexpected:
        raise ValueError(
            f"weights_backbone does not fit {type(model.backbone).__name__}: missing "
            f"{missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
        )


def load_file(model: DeepLabV3, opened: Opened, given: Sequence[str] = ()) -> None:
    """Fill a model from a file, and set on it what the file's model had beyond its options.

    Args:
        model: built with the options of the file and those that were given.
        opened: the file.
        given: names of the options that the user gave.
    """
    own = model.config is not None and opened.info.model == model.config[0]
    fill(model, opened, own, given, stacklevel=5)
    if model.classes is None and model.num_classes == DEFAULT_NUM_CLASSES:
        _describe_classes(model, "voc")


def _describe_classes(model: DeepLabV3, name: str) -> None:
    classes = class_set(name)
    model.classes, model.palette = tuple(classes.classes), tuple(classes.palette)
