"""Loading a checkpoint of any known layout into a model, with a report."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._common import CheckpointError, Source, StateDict, call, listed, shorten, tuples, unwrapped
from .files import Checkpoint, open_checkpoint
from .inspect import WeightsInfo, inspect_open
from .layouts import Layout, Renamed, detect_layout, layout_named, rename_tensors


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
                parts.append(f"{len(keys)} {name}: {shorten(keys)}")
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
    chosen = None if layout == "auto" else layout_named(layout)
    checkpoint = open_checkpoint(source)
    chosen = chosen or detect_layout(checkpoint.state, checkpoint.label)
    return _load(unwrapped(model), checkpoint, chosen, reset_head, strict)


def _load(
    model: nn.Module, checkpoint: Checkpoint, chosen: Layout, reset_head: bool, strict: bool
) -> LoadReport:
    renamed = rename_tensors(checkpoint.state, chosen, checkpoint.label)
    info = inspect_open(checkpoint, chosen, renamed.state)
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
        *([listed("missing", fit.missing)] if strict and fit.missing else []),
        *([listed("unexpected", fit.unexpected)] if strict and fit.unexpected else []),
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


def _final_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that give logits, by name."""
    from ..nn import DeepLabV2Head

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


def _compare(own: Mapping[str, Tensor], renamed: Renamed, reset: set[str], final: set[str]) -> _Fit:
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
        problems.append(listed("of another shape", shapes))
    if kinds:
        problems.append(listed("of another kind", kinds))
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
    checkpoint: Checkpoint, model: nn.Module, info: WeightsInfo, fit: _Fit, problems: list[str]
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
    checkpoint: Checkpoint,
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
    builder_call = call(name, {**options, **{k: expected[k] for k in wrong}}) if name else ""
    return f"the weights fit, but {layout.name} gives its numbers with {described}" + (
        f"; build it so: {builder_call}" if builder_call else ""
    )


def _initialised(model: nn.Module, keys: set[str]) -> StateDict:
    """Newly drawn values for keys of the model, which stays as it is."""
    from ..nn import DeepLabV2Head

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
    from ..data.preprocess import Preprocess

    if info.classes is not None and getattr(model, "classes", None) is None:
        model.classes, model.palette = info.classes, info.palette
    if info.preprocess is not None:
        kind = type(getattr(model, "preprocess", None) or Preprocess())
        model.preprocess = kind(**{k: tuples(v) for k, v in info.preprocess.items()})


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
    from ..models import get_model

    given = None if layout == "auto" else layout_named(layout)
    checkpoint = open_checkpoint(path)
    chosen = given or detect_layout(checkpoint.state, checkpoint.label)
    info = inspect_open(
        checkpoint, chosen, rename_tensors(checkpoint.state, chosen, checkpoint.label).state
    )
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
