"""Which model a checkpoint is of, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._common import Source, call, tuples
from .files import Checkpoint, open_checkpoint
from .layouts import Layout, basic_blocks, detect_layout, rename_tensors, stage_blocks
from .settings import Settings


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
    from ..models import list_models

    # A layout without rules has nothing that could be built.
    model, options = _architecture(state) if layout.rules else (None, {})
    settings: Settings = {}
    if model is not None:
        options |= layout.options(checkpoint.state, checkpoint.origin)
        settings = layout.settings(checkpoint.state, checkpoint.origin)
    untold = tuple(option for option in layout.untold if option not in options)
    own = checkpoint.metadata if layout.name in ("torchvision", "deeplab_fast") else {}
    if isinstance(own.get("model"), str):
        model = own["model"]
        options = {k: tuples(v) for k, v in dict(own.get("options") or {}).items()}
        settings, untold = dict(own.get("settings") or {}), ()
    elif not own and layout.name == "torchvision" and model in _TORCHVISION and not options:
        untold = ()
    if model not in list_models():
        model = None
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
        lost=tuple(own.get("lost") or ()),
    )


# torchvision's own models, which it builds in one way.
_TORCHVISION = ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large")

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
    if {"backbone.stem.conv.weight", "backbone.block15.project.conv.weight"} <= state.keys():
        return "deeplabv3_efficientnet_lite0", options
    blocks = tuple(stage_blocks(state, stage) for stage in (1, 2, 3, 4))
    depth = _RESNET_BLOCKS.get((basic_blocks(state), blocks))
    if depth is None:
        return None, {}
    if {"classifier.0.convs.0.0.bias", "classifier.0.convs.0.1.weight"} <= state.keys():
        return f"fregu856_resnet{depth}", {}
    if "backbone.conv1.6.weight" in state:
        options["stem"] = "deep"
    kind = "deeplabv3_cascaded_resnet" if stage_blocks(state, 5) else "deeplabv3_resnet"
    return f"{kind}{depth}", options


def _head_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of the head, none for a state dict without one, None for a head unknown here."""
    if not any(key.startswith("classifier.") for key in state):
        return {}
    if "classifier.convs.0.weight" in state:
        return {"head": "deeplabv2"}
    if "classifier.0.project.0.weight" not in state:
        # The cascaded model's classifier is one 1x1 convolution; FCN's begins with a 3x3.
        cascaded = stage_blocks(state, 5) and "classifier.0.weight" in state
        return {} if cascaded else None
    project = state["classifier.0.project.0.weight"]
    if project.ndim != 4:
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


def _mobilenet_v2_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    from ..models.mobilenetv2 import ROWS
    from ..models.mobilenetv3 import make_divisible

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
