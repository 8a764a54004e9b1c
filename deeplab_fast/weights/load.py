"""Loading a checkpoint of any known layout into a model, with a report."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.preprocess import Preprocess
from ..nn import DeepLabV2Head
from ._common import CheckpointError, Source, StateDict, call, listed, shorten, tuples, unwrapped
from .files import Checkpoint, check_dense, open_checkpoint
from .inspect import WeightsInfo, inspect_open
from .layouts import Layout, Renamed, detect_layout, layout_named, rename_tensors
from .registry import get_model, no_builder, preprocess_kinds
from .save import builders_config
from .settings import (
    Settings,
    check_size,
    put_back,
    settings_differ,
    stem_settings,
)


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
    part: str | None = None,
    reset_head: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Fill a model of this package from a checkpoint of this or another library.

    The auxiliary head of a checkpoint is left out, and reported, where the model has none. Counters
    named num_batches_tracked may be absent (TensorFlow and PyTorch before 0.4.1 have none). The
    .safetensors files of `save_weights` carry preprocessing, class names, colours and a calibration
    for int8; these are set on the model too, names and colours where it has none yet.

    Args:
        model: what a builder of this package returns, also inside DistributedDataParallel or
            torch.compile.
        source: path of a checkpoint (see `read_state_dict`), or a state dict.
        layout: "auto", or the name of one of `LAYOUTS`.
        part: which network of a checkpoint with several, as `read_state_dict` has it.
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
        UserWarning: everything fits, but the model is not as the checkpoint's was (dilation,
            upsampling, values set by hand), so that the numbers differ; the message says what is.
    """
    opened = open_weights(source, layout, part)
    return load_opened(unwrapped(model), opened, reset_head, strict, opened.info.settings)


@dataclass(frozen=True)
class Opened:
    """A checkpoint, what it is and its tensors under our names."""

    checkpoint: Checkpoint
    layout: Layout
    renamed: Renamed
    info: WeightsInfo


def open_weights(source: Source, layout: str = "auto", part: str | None = None) -> Opened:
    """Read a checkpoint and see what it is; arguments and errors as of `load_weights`."""
    chosen = None if layout == "auto" else layout_named(layout)
    checkpoint = open_checkpoint(source, part)
    chosen = chosen or detect_layout(checkpoint.state, checkpoint.label)
    renamed = rename_tensors(checkpoint.state, chosen, checkpoint.label)
    return Opened(checkpoint, chosen, renamed, inspect_open(checkpoint, chosen, renamed.state))


def load_opened(
    model: nn.Module,
    opened: Opened,
    reset_head: bool,
    strict: bool,
    settings: Settings,
    stacklevel: int = 3,
) -> LoadReport:
    """As `load_weights`; `settings`: what the model has to have to give the file's numbers."""
    checkpoint, chosen = opened.checkpoint, opened.layout
    renamed, info = opened.renamed, opened.info
    if not chosen.rules:
        raise CheckpointError(f"{checkpoint.label} cannot be loaded. {chosen.notes}")
    own = model.state_dict()
    reset = _reset_keys(model, chosen) if reset_head else set()
    fit = _compare(own, renamed, reset, set(_final_convs(model)))
    check_dense({k: v for k, v in fit.loaded.items() if not own[k].is_meta}, checkpoint.label)
    problems = _problems(fit, strict)
    if problems or (chosen.lacks and not reset_head):
        raise CheckpointError(_does_not_fit(model, opened, fit, problems, reset_head, strict))
    different = _other_numbers(model, chosen, info, checkpoint, reset_head, settings)
    if different:
        warnings.warn(f"{checkpoint.label}: {different}", UserWarning, stacklevel=stacklevel)

    fresh = _initialised(model, reset)
    model.load_state_dict({**own, **fit.loaded, **fresh})
    _describe(model, info, reset_head)
    return LoadReport(
        layout=chosen.name,
        loaded=tuple(fit.loaded),
        missing=fit.missing,
        unexpected=fit.unexpected,
        reset=tuple(fresh),
        ignored=(*renamed.ignored, *fit.ignored),
    )


def _reset_keys(model: nn.Module, layout: Layout) -> set[str]:
    """What reset_head draws anew."""
    final = _final_convs(model)
    reset = {f"{name}.{p}" for name, conv in final.items() for p, _ in conv.named_parameters()}
    if layout.lacks:
        reset |= {key for key in model.state_dict() if re.fullmatch(layout.lacks, key)}
    return reset


def _problems(fit: _Fit, strict: bool) -> list[str]:
    problems = [
        *fit.shapes,
        *([fit.classes] if fit.classes else []),
        *([listed("missing", fit.missing)] if strict and fit.missing else []),
        *([listed("unexpected", fit.unexpected)] if strict and fit.unexpected else []),
    ]
    if not fit.loaded:
        problems.append("not one of its tensors is one of the model's")
    return problems


def _final_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that give logits, by name."""
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
            f"num_classes={theirs}"
        )
    return _Fit(loaded, missing, tuple(unexpected), tuple(ignored), tuple(problems), message)


def _does_not_fit(
    model: nn.Module,
    opened: Opened,
    fit: _Fit,
    problems: list[str],
    reset_head: bool,
    strict: bool,
) -> str:
    label, layout = opened.checkpoint.label, opened.layout
    config = builders_config(model)
    name = config[0] if config else type(model).__name__
    where = f"{label} ({layout.name} layout)"
    resets = not reset_head and _fits_with_reset(model, opened, strict)
    if layout.lacks and not reset_head:
        if resets:
            return (
                f"{where} has no head for {name}. {layout.notes} What is there loads with "
                "reset_head=True (--reset-head); the rest starts untrained"
            )
        # A head that is not there is no news beside what does not fit.
        fit = _compare(model.state_dict(), opened.renamed, _reset_keys(model, layout), set())
        problems = ["it has no head for it", *_problems(fit, strict)]
    lines = [f"{where} does not fit {name}:", *problems]
    if resets:
        lines.append(
            "or pass reset_head=True (--reset-head) to keep everything but the classifier, which "
            "then starts untrained"
        )
    others = [key for key in fit.missing if not key.startswith("aux_classifier.")]
    if fit.missing and not others and not (fit.shapes or fit.unexpected):
        lines.append(
            "it has no auxiliary head: build the model with aux_loss=False, or pass strict=False "
            "to leave the model's auxiliary head as it is"
        )
    elif others or fit.unexpected or fit.shapes:
        lines.append(_what_fits(opened))
    if layout.notes and (others or fit.unexpected or fit.shapes):
        lines.append(layout.notes)
    return "\n  ".join(lines)


def _fits_with_reset(model: nn.Module, opened: Opened, strict: bool) -> bool:
    reset = _reset_keys(model, opened.layout)
    fit = _compare(model.state_dict(), opened.renamed, reset, set(_final_convs(model)))
    return not _problems(fit, strict)


def _what_fits(opened: Opened) -> str:
    """The builder's call whose model takes the checkpoint, or why there is none."""
    info, layout = opened.info, opened.layout
    if info.model is None:
        return no_builder()
    try:
        with torch.device("meta"):
            model = get_model(info.model, **found_options(info))
            # Before it is put back: afterwards nothing differs.
            stem = stem_settings(model, opened.renamed.state)
            put_back(model, {**stem, **info.settings})
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{no_builder()}; the nearest is {info.builder_call()}, and {error}"
    reset = _reset_keys(model, layout) if layout.lacks else set()
    fit = _compare(model.state_dict(), opened.renamed, reset, set(_final_convs(model)))
    problems = _problems(fit, True)
    if problems:
        return f"{no_builder()}; the nearest is {info.builder_call()}, with {'; '.join(problems)}"
    if info.settings or stem:
        return "the model that it fits: deeplab_fast.from_checkpoint(path)"
    return f"the model that it fits: {info.builder_call()}"


def check_described(opened: Opened) -> None:
    """Raises CheckpointError for a file that describes a model many times as large as itself."""
    info, label = opened.info, opened.checkpoint.label
    if info.model is None:
        return
    options = {"num_classes": None, **found_options(info)}
    check_size(info.model, options, info.settings, _numbers(opened.checkpoint.state), label)


def _numbers(state: Mapping[str, Tensor]) -> int:
    """How many numbers tensors have, of memory that several share once."""
    seen: set[tuple[int, int]] = set()
    found = 0
    for tensor in state.values():
        # Tensors without values (meta, fake) have none to share.
        place = 0 if tensor.is_meta else _address(tensor)
        if place == 0 or (place, tensor.numel()) not in seen:
            seen.add((place, tensor.numel()))
            found += tensor.numel()
    return found


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    # Fake tensors have none.
    except RuntimeError:
        return 0


def found_options(info: WeightsInfo) -> dict[str, Any]:
    """All options of the builder that a checkpoint tells."""
    options = dict(info.options)
    if info.num_classes is not None:
        options["num_classes"] = info.num_classes
    if info.aux:
        options["aux_loss"] = True
    return options


def _other_numbers(
    model: nn.Module,
    layout: Layout,
    info: WeightsInfo,
    checkpoint: Checkpoint,
    reset_head: bool,
    settings: Settings,
) -> str:
    """Why the model's numbers differ from those of the checkpoint's model; "" if none is seen."""
    reasons = []
    differs = layout.differs(checkpoint.state, checkpoint.origin)
    if differs:
        reasons.append(f"the numbers differ from the library's: {differs}")
    changed = settings_differ(model, settings)
    if reset_head:
        changed = [text for text in changed if not re.match(r"(?:aux_)?classifier\b", text)]
    if changed:
        reasons.append(
            f"its model was changed after it was built, with {shorten(changed)}; "
            "deeplab_fast.from_checkpoint makes that model"
        )
    if info.lost:
        reasons.append(f"its model had what the file does not hold: {shorten(info.lost)}")
    wrong = _other_options(model, layout, info, checkpoint, reset_head)
    if wrong:
        builder, own_options = builders_config(model) or (info.model, {})
        described = ", ".join(f"{k}={value!r} (the model has {own!r})" for k, (value, own) in wrong)
        options = {**own_options, **{k: value for k, (value, _) in wrong}}
        reasons.append(
            f"{layout.name} gives its numbers with {described}"
            + (f"; build it so: {call(builder, options)}" if builder else "")
        )
    return f"the weights fit, but {'; '.join(reasons)}" if reasons else ""


def _other_options(
    model: nn.Module, layout: Layout, info: WeightsInfo, checkpoint: Checkpoint, reset_head: bool
) -> list[tuple[str, tuple[Any, Any]]]:
    """Options with which the checkpoint's model was built, and the model's where they differ."""
    expected = dict(info.options)
    # The package's own models are trained at one output stride and evaluated at another.
    if "output_stride" not in layout.options(checkpoint.state, checkpoint.origin):
        stride = expected.pop("output_stride", None)
        if stride not in (None, getattr(model, "output_stride", None)):
            expected.pop("atrous_rates", None)
    if layout.pins_defaults:
        defaults = {"align_corners": False, "multi_grid": None, "contract_dilation": True}
        expected = {**defaults, **expected}
    actual = option_values(model)
    if reset_head:
        actual.pop("align_corners", None)
    if not _has_all(expected.get("atrous_rates"), actual.get("atrous_rates")):
        actual.pop("atrous_rates", None)
    return [
        (k, (expected[k], actual[k]))
        for k in actual
        if k in expected and tuples(actual[k]) != tuples(expected[k])
    ]


def _has_all(theirs: Sequence[int] | None, ours: Sequence[int] | None) -> bool:
    """Whether both have atrous rates, and as many."""
    return theirs is not None and ours is not None and 0 < len(theirs) == len(ours)


def option_values(model: nn.Module) -> dict[str, Any]:
    """What a model has now of the options that names and shapes do not tell."""
    values: dict[str, Any] = {}
    backbone = getattr(model, "backbone", None)
    for owner, names in (
        (model, ("align_corners", "output_stride", "atrous_rates")),
        (backbone, ("multi_grid", "contract_dilation")),
    ):
        values |= {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    return values


def _initialised(model: nn.Module, keys: set[str]) -> StateDict:
    """Newly drawn values for keys of the model, which stays as it is."""
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


def _describe(model: Any, info: WeightsInfo, reset_head: bool) -> None:
    """Set preprocessing, and with the head class names, colours and calibration, from the package's
    own metadata."""
    if info.calibration is not None and not reset_head:
        model.calibration = info.calibration
    if info.classes is not None and not reset_head and getattr(model, "classes", None) is None:
        model.classes, model.palette = info.classes, info.palette
    if info.preprocess is not None:
        kind = preprocess_kinds().get(info.preprocess_kind or "")
        kind = kind or type(getattr(model, "preprocess", None) or Preprocess())
        model.preprocess = kind(**{k: tuples(v) for k, v in info.preprocess.items()})
