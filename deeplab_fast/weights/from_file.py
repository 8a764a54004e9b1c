"""From a file, or the name of an embedded model, to a model that is ready to run or to train."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from ._common import CheckpointError, Source, shorten
from .embedded import embedded_path
from .inspect import WeightsInfo
from .load import Opened, check_described, found_options, load_opened, open_weights, option_values
from .registry import get_model, no_builder
from .save import builders_config
from .settings import Settings, put_back, stem_settings, under_other_options


def from_checkpoint(
    path: Source,
    *,
    model: str | None = None,
    layout: str = "auto",
    part: str | None = None,
    reset_head: bool = False,
    strict: bool = True,
    given: Collection[str] | None = None,
    **overrides: object,
) -> nn.Module:
    """Build the model that a checkpoint fits and load it.

    A file of `save_weights`, and the `state_dict()` of a model of this package, give the model back
    as it was saved, with what was set or exchanged on it. Of another library's checkpoint what lies
    beside the tensors is read too: smp's config.json, mmsegmentation's config, published names.

    Args:
        path: a file, a folder or the name of an embedded model (see `find_weights`), or a state
            dict.
        model: name of the builder to take; its number of classes and its auxiliary head are then
            those of `overrides`. None: what the checkpoint tells, heads and input channels too.
        layout, part, reset_head, strict: as `load_weights` has them.
        given: names of options that are not warned of; those of `overrides` by default.
        **overrides: options of the builder, above those that `inspect_weights` finds; num_classes
            and aux_loss too.

    Returns:
        The model, in training mode as builders leave it.

    Raises:
        As `load_weights`; CheckpointError also where no builder fits, and for a file whose model
        had what no file can hold (`save_weights(strict=False)`).

    Warns:
        UserWarning: nothing tells an option on which the numbers depend; the message says what was
            assumed, and what changes it.
    """
    opened = open_weights(path, layout, part)
    info, label = opened.info, opened.checkpoint.label
    whole = model is None
    name = info.model if model is None else model
    if name is None:
        raise CheckpointError(
            f"{label} ({info.layout} layout): {no_builder()}. {info.notes}".rstrip()
        )
    if whole and info.lost:
        raise CheckpointError(
            f"{label} cannot give back the model that it was saved from, which had "
            f"{shorten(info.lost)}. Build that model yourself, then deeplab_fast.load_weights"
        )
    # Options found for one model say nothing about another.
    own = name == info.model
    if own:
        check_described(opened)
    options = found_options(info) if whole else info.options if own else {}
    built = get_model(name, **{**options, **overrides})
    given = overrides if given is None else given
    if not whole:
        fill(built, opened, own, given, reset_head, strict)
        return built
    put_back(built, stem_settings(built, opened.renamed.state))
    settings = restore_settings(built, info)
    load_opened(built, opened, reset_head, strict, settings)
    warn_of_assumptions(built, info, given, label, 2)
    return built


def fill(
    model: nn.Module,
    opened: Opened,
    own: bool,
    given: Collection[str],
    reset_head: bool = False,
    strict: bool = True,
    stacklevel: int = 3,
) -> None:
    """Fill a model from an open checkpoint and put on it what the checkpoint's model had.

    Args:
        model: built for the checkpoint.
        opened: the checkpoint.
        own: whether the model is of the builder that the checkpoint tells.
        given, reset_head, strict: as `from_checkpoint` has them.
        stacklevel: of `warnings.warn`, seen from here.
    """
    if own:
        restore_settings(model, opened.info)
    load_opened(model, opened, reset_head, strict, opened.info.settings, stacklevel + 1)
    if own:
        warn_of_assumptions(model, opened.info, given, opened.checkpoint.label, stacklevel)


def load(name: str) -> nn.Module:
    """A trained model that comes inside the package, in eval mode, on the CPU, in fp32.

    "camvid": road scenes, the 11 classes of CamVid; `model_card("camvid")` has its data, licence,
    recipe and scores.

    Returns:
        `DeepLabV3` with its `classes`, `palette` and `preprocess`; `model.predict(photo)` gives
        labels at the photo's size.

    Raises:
        ValueError: no embedded model has that name.
    """
    return from_checkpoint(embedded_path(name)).eval()


def restore_settings(model: nn.Module, info: WeightsInfo) -> Settings:
    """Put on a model, in place, what the checkpoint's model had beyond its builder's options.

    Values that other options of the builder decide stay as they are: what was asked for stands
    above what the file has.

    Args:
        model: what the builder `info.model` made.
        info: of the checkpoint.

    Returns:
        What was put back, a part of `info.settings`.

    Raises:
        CheckpointError: settings that the model cannot take.

    Warns:
        UserWarning: values that were set by hand are left out for the options.
    """
    if not info.settings:
        return {}
    name, options = builders_config(model) or ("", {})
    settings, dropped = under_other_options(info.settings, name, found_options(info), options)
    if dropped:
        warnings.warn(
            "the checkpoint's model was changed by hand where the options given decide; left out "
            f"is {shorten(dropped)}",
            UserWarning,
            stacklevel=3,
        )
    put_back(model, settings)
    return settings


def warn_of_assumptions(
    model: nn.Module, info: WeightsInfo, given: Collection[str], label: str, stacklevel: int
) -> None:
    """Warn, once, of what a checkpoint does not tell and the builder's defaults stand for.

    Args:
        model: that was built for it.
        info: of the checkpoint.
        given: options that the user chose.
        label: of the checkpoint, for the message.
        stacklevel: of `warnings.warn`, seen from the caller.
    """
    values = option_values(model)
    untold = [k for k in info.untold if k not in given and values.get(k, ()) != ()]
    # The rates follow the output stride, and are not asked for where it was given.
    if info.layout != "smp" and "output_stride" in {*given, *info.options}:
        untold = [k for k in untold if k != "atrous_rates"]
    if not untold:
        return
    assumed = ", ".join(f"{k}={values[k]!r}" for k in untold)
    warnings.warn(
        f"{label}: nothing in it tells {', '.join(untold)}; assumed is {assumed}. If it was "
        f"trained otherwise the labels are wrong: pass {untold[0]}=... to "
        "deeplab_fast.from_checkpoint",
        UserWarning,
        stacklevel=stacklevel + 1,
    )
