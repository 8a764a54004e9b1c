"""What a training run starts from: a model, its weights, and what the weights tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from deeplab_fast.engine.config import OptionError, TrainConfig, one_of

if TYPE_CHECKING:
    from deeplab_fast.data.classes import ClassSet
    from deeplab_fast.models import DeepLabV3
    from deeplab_fast.weights import WeightsInfo

__all__ = ["build_model", "class_names", "from_checkpoints", "start_text", "told_by_weights"]

_USUAL = "deeplabv3_resnet50"


def told_by_weights(config: TrainConfig) -> TrainConfig:
    """The config with the model that its weights are of, and the class names they tell.

    Class names are for data that have none of their own, a folder or a csv, where the config gives
    none. Without weights the model is the config's, or deeplabv3_resnet50.

    Raises:
        OptionError: a model that there is not, or weights that do not tell theirs.
        ValueError, OSError: weights that cannot be read.
    """
    from deeplab_fast.data.datasets import is_own_data
    from deeplab_fast.models import list_models

    try:
        info = None if config.weights is None else _inspected(config)
    except FileNotFoundError as error:
        raise OptionError("weights", f"is {config.weights!r}: {error}") from error
    model = config.model or (_USUAL if info is None else info.model)
    if model is None:
        assert info is not None
        raise OptionError(
            "weights",
            f"{config.weights} ({info.layout} layout) does not tell which model it is of; name it "
            f"with model: {', '.join(list_models())}",
        )
    if model not in list_models():
        raise OptionError("model", f"is {model!r}, expected {one_of(model, list_models())}")
    classes = config.classes
    named = classes is not None or config.mask_colours is not None
    if not named and info is not None and is_own_data(config.data):
        classes = class_names(info)
    return config.replace(model=model, classes=classes)


def class_names(info: WeightsInfo) -> list[str] | None:
    """The class names that data for these weights take, None where they tell none.

    Of one logit it is one name, of the class beside the background.
    """
    if not info.classes:
        return None
    return list(info.classes[-1:] if info.num_classes == 1 else info.classes)


def build_model(
    config: TrainConfig,
    num_classes: int,
    classes: ClassSet | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> DeepLabV3:
    """The model that a config names, with its start weights and the classes of the data.

    The last layers of weights with another number of classes, or without a head of this kind, start
    anew; so do all of them with ``config.reset_head``.

    Args:
        config: ``TrainConfig``.
        num_classes: logits of the model: the data set's ``outputs``.
        classes: ``ClassSet`` put on the model.
        tell: takes a line about weights that are not used as they are.

    Raises:
        ValueError, OSError: options or weights that do not fit.
    """
    from deeplab_fast.models import get_model
    from deeplab_fast.weights import from_checkpoint

    tell = tell or (lambda text: None)
    config = told_by_weights(config)
    assert config.model is not None
    info = None if config.weights is None else _inspected(config)
    # Told once the model is there: weights may not fit for all that.
    lines: list[str] = []
    options: dict[str, Any] = {}
    if info is not None and info.model == config.model:
        options.update(info.options)
    options.update(config.model_options)
    stride = config.output_stride
    # Rates that the file tells are at the file's stride, and change with set_output_stride; those
    # of the config and of the builder are at the training's.
    of_file = {"output_stride", "atrous_rates"} & options.keys()
    if stride is not None and ("atrous_rates" in config.model_options or not of_file):
        options["output_stride"] = stride
    if config.aux_weight:
        options["aux_loss"] = True
    if config.weights_backbone is not None:
        options["weights_backbone"] = config.weights_backbone
    torch.manual_seed(config.seed)
    try:
        # The builder refuses what from_checkpoint would take for its own arguments.
        own = signature(from_checkpoint).parameters.keys() & config.model_options.keys()
        if info is None or own:
            built = get_model(config.model, num_classes=num_classes, **options)
        else:
            assert config.weights is not None
            resets = config.reset_head or _tell_of_head(
                info, config, num_classes, classes, lines.append
            )
            given: dict[str, Any] = {
                "model": config.model,
                "part": config.weights_part,
                "reset_head": resets,
                "num_classes": num_classes,
            }
            no_aux = bool(config.aux_weight) and not info.aux
            if no_aux:
                lines.append(
                    f"{config.weights} has no auxiliary head: it starts from random numbers"
                )
                # All but that head must fit.
                from_checkpoint(config.weights, **given, **{**options, "aux_loss": False})
            built = from_checkpoint(config.weights, **given, **options, strict=not no_aux)
    except TypeError as error:
        raise OptionError("model_options", f"do not fit {config.model}: {error}") from error
    # Of torchvision, for names of weights that it publishes.
    except ImportError as error:
        raise OptionError(
            "weights_backbone", f"is {config.weights_backbone!r}, and {_one_line(error)}"
        ) from error
    except (ValueError, OSError) as error:
        if info is not None and info.num_classes is None:
            raise OptionError(
                "weights",
                f"{config.weights} has no head, and what it has does not fit: {_one_line(error)}. "
                "Weights of a backbone alone are for weights_backbone",
            ) from error
        if config.weights_backbone is None or config.weights is not None:
            raise
        why = _one_line(error)
        if "urlopen" in why:
            why = f"which cannot be downloaded ({why}); give a file"
        raise OptionError("weights_backbone", f"is {config.weights_backbone!r}, {why}") from error
    for line in lines:
        tell(line)
    model = cast("DeepLabV3", built)
    # Ranges for int8 are those of weights that training changes.
    model.calibration = None
    if stride is not None and model.output_stride != stride:
        model.set_output_stride(stride)
    if config.input_size is not None:
        model.preprocess = dataclasses.replace(model.preprocess, size=config.input_size or None)
    if classes is not None:
        model.classes = tuple(classes.classes)
        model.palette = None if classes.palette is None else tuple(classes.palette)
    return model


def from_checkpoints(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """The config of a resumed run whose start weights may be gone: its checkpoint has it all."""
    from deeplab_fast.weights import find_weights

    config = config.replace(weights_backbone=None)
    if config.weights is None:
        return config
    try:
        find_weights(config.weights)
    except (ValueError, OSError):
        return config.replace(weights=str(checkpoint), weights_part=None, reset_head=False)
    return config


def start_text(config: TrainConfig) -> str:
    """What the weights of a run begin as, for a line about its start."""
    if config.weights is not None:
        return f"from the weights {config.weights}"
    if config.weights_backbone is not None:
        return f"with a backbone from {config.weights_backbone}, the head from random numbers"
    return (
        "from random numbers (--weights NAME, FILE or RUN, or --weights-backbone, starts from "
        "trained ones)"
    )


def _inspected(config: TrainConfig) -> WeightsInfo:
    from deeplab_fast.weights import inspect_weights

    assert config.weights is not None
    return inspect_weights(config.weights, part=config.weights_part)


def _tell_of_head(
    info: WeightsInfo,
    config: TrainConfig,
    num_classes: int,
    classes: ClassSet | None,
    tell: Callable[[str], None],
) -> bool:
    """Whether the last layers start anew, because they are not of these classes."""
    from deeplab_fast.data.classes import same_name

    if info.num_classes is None:
        tell(
            f"{config.weights} ({info.layout} layout) has no head of this kind: the last layers "
            "start from random numbers"
        )
        return True
    if info.num_classes != num_classes:
        tell(
            f"{config.weights} has {_some(info.num_classes, info.classes)} and the data "
            f"{_some(num_classes, None if classes is None else classes.classes)}: the last layers "
            "start from random numbers"
        )
        return True
    ours = None if classes is None else classes.classes
    if info.classes and ours and len(ours) == len(info.classes):
        other = [(a, b) for a, b in zip(info.classes, ours, strict=True) if not same_name(a, b)]
        if other:
            pairs = ", ".join(f"{a} -> {b}" for a, b in other[:4])
            more = ", ..." if len(other) > 4 else ""
            tell(
                f"warning: {config.weights} calls {len(other)} of the classes otherwise ({pairs}"
                f"{more}); its last layers are kept, --reset-head starts them anew"
            )
    return False


def _some(count: int, names: Sequence[str] | None) -> str:
    listed = list(names or ())
    more = ", ..." if len(listed) > 3 else ""
    shown = f" ({', '.join(listed[:3])}{more})" if listed else ""
    return f"{count} class{'' if count == 1 else 'es'}{shown}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
