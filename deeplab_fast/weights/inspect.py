"""Which model a checkpoint is of, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..program.calibration import Calibration, CalibrationError
from . import registry
from ._common import CheckpointError, Source, call, tuples
from .files import Checkpoint, open_checkpoint
from .layouts import Layout, detect_layout, rename_tensors
from .registry import Found
from .settings import Settings, check_settings
from .told import checked_facts, checked_options


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
        untold: options that decide on the numbers and that nothing tells; the builder's default is
            taken.
        settings: what differs from the builder's model with these options, by module: modules that
            were exchanged, values that were set by hand (`restore_settings`).
        lost: what the model of a file of this package had that the file cannot give back.
        calibration: the ranges of the model's maps for int8, or None.
        classes, palette, preprocess, preprocess_kind: from this package's own metadata, or None.
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
    preprocess_kind: str | None = None
    untold: tuple[str, ...] = ()
    settings: Settings = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    calibration: Calibration | None = None

    def builder_call(self) -> str:
        """The call that builds the model, as text; empty where no builder fits."""
        if self.model is None:
            return ""
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        if self.aux:
            arguments["aux_loss"] = True
        return call(self.model, {**arguments, **self.options})


def inspect_weights(source: Source, *, part: str | None = None) -> WeightsInfo:
    """Which model a checkpoint fits, from the names and shapes of its tensors and what is with it.

    Read are this package's own facts, smp's config.json, mmsegmentation's config in "meta", and the
    names of published files where nothing else tells.

    Args:
        source, part: path of a checkpoint (see `read_state_dict`), or a state dict.

    Raises:
        FileNotFoundError, CheckpointError: as `read_state_dict`; also names of no known layout.
    """
    checkpoint = open_checkpoint(source, part)
    layout = detect_layout(checkpoint.state, checkpoint.label)
    return inspect_open(
        checkpoint, layout, rename_tensors(checkpoint.state, layout, checkpoint.label).state
    )


def inspect_open(
    checkpoint: Checkpoint, layout: Layout, state: Mapping[str, Tensor]
) -> WeightsInfo:
    """As `inspect_weights`, for a checkpoint that is read, its tensors under our names."""
    # A layout without rules has nothing that could be built.
    found = registry.recognise(state) if layout.rules else None
    model, options = found or (None, {})
    settings: Settings = {}
    if model is not None:
        options |= checked_options(
            layout.options(checkpoint.state, checkpoint.origin), checkpoint.label
        )
        settings = layout.settings(state, checkpoint.origin)
    untold = tuple(option for option in layout.untold if option not in options)
    published = model is not None and registry.published_enum(model) is not None
    own: dict[str, Any] = {}
    if layout.name in ("torchvision", "deeplab_fast"):
        own = checked_facts(checkpoint.metadata, checkpoint.label)
    if "model" in own:
        model, options = own["model"], own["options"]
        settings, untold = dict(own.get("settings", {})), ()
    elif not own and layout.name == "torchvision" and published and not options:
        # torchvision's own models, which it builds in one way.
        untold = ()
    if model not in registry.list_models():
        model = None
    check_settings(settings, checkpoint.label)
    final = [] if layout.lacks else _final_keys(state)
    return WeightsInfo(
        layout=layout.name,
        model=model,
        num_classes=own.get("num_classes", state[final[0]].shape[0] if final else None),
        aux=any(key.startswith("aux_classifier.") for key in state),
        options=options,
        notes=layout.notes,
        classes=tuples(own.get("classes")),
        palette=tuples(own.get("palette")),
        preprocess=own.get("preprocess"),
        preprocess_kind=own.get("preprocess_kind"),
        untold=untold,
        settings=settings,
        lost=tuple(own.get("lost", ())),
        calibration=_calibration(own.get("calibration"), checkpoint.label),
    )


def _calibration(value: object, label: str) -> Calibration | None:
    if value is None:
        return None
    try:
        return Calibration.from_plain(value)
    except CalibrationError as error:
        raise CheckpointError(f"{label}: {error}") from error


def head_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of the head, none for a state dict without one, None for a head unknown here."""
    if not any(key.startswith("classifier.") for key in state):
        return {}
    if "classifier.convs.0.weight" in state:
        return {"head": "deeplabv2"}
    project = state.get("classifier.0.project.0.weight")
    if project is None or project.ndim != 4:
        return None
    channels, _, kernel, _ = project.shape
    options: dict[str, Any] = {}
    default = 256
    if kernel == 3:
        options["head"], default = "mmseg", 512
    elif _final_keys(state) == ["classifier.1.weight"] and _is_1x1(state["classifier.1.weight"]):
        options["head"] = "paper"
    if channels != default:
        options["aspp_channels"] = channels
    return options


def recogniser(builder: str, *keys: str) -> Callable[[Mapping[str, Tensor]], Found | None]:
    """Of a model of this package's heads whose backbone has `keys`, and no options of its own."""

    def recognise(state: Mapping[str, Tensor]) -> Found | None:
        options = head_options(state) if state.keys() >= set(keys) else None
        return None if options is None else (builder, options)

    return recognise


def _is_1x1(weight: Tensor) -> bool:
    return tuple(weight.shape[2:]) == (1, 1)


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
