"""What makes a model's numbers beside its tensors and its builder's options.

Modules that were exchanged and values that were set by hand (batch norm's eps, a dilation,
align_corners) are neither in a state dict nor among the builder's options. Here they are found, by
holding the model against what its builder makes, and put back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as layers
from . import registry
from ._common import CheckpointError, one_line, tuples
from .told import LARGEST, check_plain

Settings = dict[str, "dict[str, Any] | None"]

# Attributes of the whole model that are written on their own, or say how to run and not what.
_OF_MODEL = (
    "preprocess",
    "classes",
    "palette",
    "config",
    "fast",
    "fused",
    "max_extra_bytes",
    "cuda_graphs",
    "_precision",
    "calibration",
)
# More modules than any model has, names within names, and values of one.
_MOST_MODULES, _DEEPEST_NAME, _LONGEST_NAME = 20_000, 20, 500
_MOST_VALUES, _DEEPEST_VALUE = 10_000, 6
# Values that act in training only, or on memory.
_NOT_IN_NUMBERS = ("momentum", "p", "inplace")
# A model may have that many times the numbers that its file holds, and these beside: a head that
# the file lacks.
_MOST_TIMES, _SPARE = 4, 64 << 20
# The padding that a convolution with another padding_mode than "zeros" computes with.
_DERIVED_PADDING = "_reversed_padding_repeated_twice"


def _leaves() -> dict[str, type[nn.Module]]:
    """Modules without children that a file may name: their attributes are their arguments."""
    names = (
        "AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d BatchNorm2d CELU Conv2d ConvTranspose2d "
        "Dropout Dropout2d ELU GELU GroupNorm Hardsigmoid Hardswish Hardtanh Identity "
        "InstanceNorm2d LayerNorm LeakyReLU Linear LogSoftmax MaxPool2d Mish PReLU ReLU ReLU6 SELU "
        "SiLU Sigmoid Softmax Softplus SyncBatchNorm Tanh Upsample"
    )
    found = {name: getattr(nn, name) for name in names.split()}
    found["SingleValueBatchNorm2d"] = layers.SingleValueBatchNorm2d
    return {**found, **registry.leaves()}


def _shells() -> dict[str, type[nn.Module]]:
    """Modules that are nothing but their children and attributes."""
    kinds: list[type[nn.Module]] = [nn.Sequential, nn.ModuleList, nn.ModuleDict]
    kinds += [layers.ASPP, layers.ASPPConv, layers.ASPPPooling]
    kinds += [layers.CascadedHead, layers.FCNHead, *layers.HEADS.values()]
    return {kind.__name__: kind for kind in kinds}


# Classes of torchvision that compute what those of the same name here do.
_SAME_ELSEWHERE = {
    f"torchvision.models.segmentation.{name}"
    for name in (
        "deeplabv3.ASPP",
        "deeplabv3.ASPPConv",
        "deeplabv3.ASPPPooling",
        "deeplabv3.DeepLabHead",
        "fcn.FCNHead",
    )
}


@functools.cache
def _kinds() -> tuple[dict[str, type[nn.Module]], dict[str, type[nn.Module]]]:
    return _leaves(), _shells()


@dataclass(frozen=True)
class _Opaque:
    """Stands for a value that no file can hold; `shadows`: it hides what the class has."""

    kind: str
    shadows: bool

    def __repr__(self) -> str:
        return f"an object of {self.kind}"


@dataclass(frozen=True)
class _Facts:
    """What one module is: class, plain values, names and shapes of its tensors, its children.

    `shared`: the module, or one of its tensors, is also that of another name.
    """

    kind: str
    attributes: dict[str, Any]
    tensors: dict[str, Any]
    children: tuple[str, ...]
    shared: tuple[str, ...]


def _facts(model: nn.Module) -> dict[str, _Facts]:
    """The facts of every module, by name, parents first."""
    from ..nn.batch_norm import thawed_class

    seen: dict[int, str] = {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        objects = {"": module, **{k: v for k, v in own.items() if v is not None}}
        shared = tuple(
            f"{leaf or 'it'} is {first}"
            for leaf, value in objects.items()
            if (first := seen.setdefault(id(value), f"{name}.{leaf}")) != f"{name}.{leaf}"
        )
        found[name] = _Facts(
            kind=_kind(thawed_class(module)),
            attributes=_attributes(module, _OF_MODEL if name == "" else ()),
            tensors={k: None if v is None else tuple(v.shape) for k, v in own.items()},
            children=tuple(k for k, v in module._modules.items() if v is not None),
            shared=shared,
        )
    return found


def _kind(cls: type[nn.Module]) -> str:
    full = f"{cls.__module__}.{cls.__qualname__}"
    known = any(kinds.get(cls.__name__) is cls for kinds in _kinds())
    return cls.__name__ if known or full in _SAME_ELSEWHERE else full


def _attributes(module: nn.Module, left_out: tuple[str, ...]) -> dict[str, Any]:
    from ..nn.batch_norm import FROZEN_STATE

    found: dict[str, Any] = {k: None for k, v in module._modules.items() if v is None}
    # Freezing acts in training only.
    left_out = (*left_out, *FROZEN_STATE)
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or name in left_out:
            continue
        try:
            if isinstance(value, Tensor):
                raise TypeError("a tensor is no setting")
            found[name] = plain(value)
        except TypeError:
            found[name] = _Opaque(type(value).__qualname__, hasattr(type(module), name))
    if getattr(module, "padding_mode", "zeros") != "zeros":
        found[_DERIVED_PADDING] = tuples(vars(module).get(_DERIVED_PADDING))
    if "bias" in module._parameters:
        found["bias"] = module._parameters["bias"] is not None
    return found


def plain(value: object) -> object:
    """A value as JSON's own types, sequences as tuples, NumPy's numbers as Python's.

    Raises:
        TypeError: no file holds it (arrays, tensors, objects, what holds itself).
    """
    try:
        return _plain(value)
    except RecursionError as error:
        raise TypeError("it holds itself, or is nested too deeply") from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {_plain_key(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _plain_number(value)


def _plain_key(key: object) -> object:
    found = _plain(key)
    if isinstance(found, (tuple, dict)):
        raise TypeError(f"{key!r} is no name")
    return found


def _plain_number(value: object) -> bool | int | float:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            found = value.item()
        # Tensors without values (meta, fake) refuse.
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise TypeError(f"{type(value).__qualname__} has no value: {error}") from error
        if isinstance(found, (bool, int, float)):
            return found
    raise TypeError(f"an object of {type(value).__qualname__} cannot be written into a file")


@dataclass(frozen=True)
class Rebuilding:
    """What it takes to make a model again.

    Attributes:
        options: of its builder, without num_classes and aux_loss.
        settings: by module, what differs from what the builder makes: its class and values, or
            None for a module that is not there.
        lost: what neither can express, as text.
    """

    options: dict[str, Any]
    settings: Settings
    lost: tuple[str, ...]


def rebuilding(model: nn.Module, name: str, options: Mapping[str, Any]) -> Rebuilding:
    """What makes a model again that the builder `name` made with `options`."""
    rest = {k: v for k, v in options.items() if k not in ("num_classes", "aux_loss")}
    heads = _heads(model)
    error: Exception | None = None
    # Options that `set_output_stride` gave may be none of the builder's; then settings have them.
    for left_out in ((), ("atrous_rates",), ("atrous_rates", "output_stride")):
        tried = {k: v for k, v in rest.items() if k not in left_out}
        try:
            built = _of_builder(name, {**tried, **heads})
        except (TypeError, ValueError, RuntimeError) as refused:
            error = error or refused
            continue
        actual = _facts(model)
        settings = _settings(actual, built)
        again = _restored(name, {**tried, **heads}, settings) if settings else built
        return Rebuilding(tried, settings, tuple(_differences(actual, again)))
    return Rebuilding(rest, {}, (f"{name} does not take its options: {error}",))


def _heads(model: nn.Module) -> dict[str, Any]:
    heads: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    if getattr(model, "aux_classifier", None) is not None:
        heads["aux_loss"] = True
    return heads


def _of_builder(name: str, options: Mapping[str, Any]) -> dict[str, _Facts]:
    return _cached_facts(name, json.dumps(plain(options), sort_keys=True))


def _restored(name: str, options: Mapping[str, Any], settings: Settings) -> dict[str, _Facts]:
    # The order of the settings is that in which they are put back.
    return _cached_facts(name, json.dumps(plain(options), sort_keys=True), json.dumps(settings))


def _is_sized(value: object) -> bool:
    """Whether the whole numbers in a value are sizes."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_sized, value))
    return type(value) is not int or abs(value) <= LARGEST


@functools.lru_cache(maxsize=16)
def _cached_facts(name: str, options: str, settings: str = "{}") -> dict[str, _Facts]:
    with _on_meta():
        model = registry.get_model(name, **{k: tuples(v) for k, v in json.loads(options).items()})
        # What cannot be put back is a difference afterwards.
        for module, entry in json.loads(settings).items():
            with contextlib.suppress(CheckpointError):
                put_back(model, {module: entry})
    return _facts(model)


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Tensors without memory, also where the caller's are fake ones (torch.export, estimates)."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
        yield


def _settings(actual: dict[str, _Facts], plain: dict[str, _Facts]) -> Settings:
    leaves, _ = _kinds()
    settings: Settings = {}
    anew: set[str] = set()
    for name, facts in actual.items():
        parent = name.rpartition(".")[0]
        before = plain.get(name)
        new = before is None or facts.kind != before.kind or (name != "" and parent in anew)
        if not new and before is not None and not _wrong(facts, before):
            continue
        if new or facts.kind in leaves:
            anew.add(name)
        values = {k: v for k, v in facts.attributes.items() if not isinstance(v, _Opaque)}
        if name not in anew and before is not None:
            values = {
                k: v
                for k, v in values.items()
                if k in before.attributes and v != before.attributes[k]
            }
            if not values:
                continue
        settings[name] = {"class": facts.kind, "new": name in anew, "values": values}
    for name in plain:
        parent = name.rpartition(".")[0]
        if name not in actual and parent in actual and parent not in anew:
            settings[name] = None
    return settings


def _wrong(actual: _Facts, other: _Facts) -> list[str]:
    """How a module differs from another one, as text."""
    if actual.kind != other.kind:
        return [f"a module of class {actual.kind}"]
    wrong = [
        f"{key}={value!r}"
        for key, value in actual.attributes.items()
        if (key in other.attributes and value != other.attributes[key])
        # Whatever else somebody keeps on a module is not read by its class.
        or (key not in other.attributes and isinstance(value, _Opaque) and value.shadows)
    ]
    wrong += [f"no {key}" for key in other.attributes if key not in actual.attributes]
    if actual.tensors != other.tensors:
        names = [
            k
            for k in {**actual.tensors, **other.tensors}
            if actual.tensors.get(k, "") != other.tensors.get(k, "")
        ]
        wrong.append(f"other tensors ({', '.join(names)})")
    if actual.children != other.children:
        wrong.append(f"other modules ({', '.join(actual.children)})")
    wrong += [text for text in actual.shared if text not in other.shared]
    return wrong


def _differences(actual: dict[str, _Facts], again: dict[str, _Facts]) -> Iterator[str]:
    for name, facts in actual.items():
        where = name or "the model"
        if name in again:
            wrong = _wrong(facts, again[name])
        else:
            parent = name.rpartition(".")[0]
            # A module that cannot be made explains what is in it.
            wrong = [] if parent and parent not in again else [f"a module of class {facts.kind}"]
        if wrong:
            yield f"{where}: {', '.join(wrong)}"
    for name in again:
        if name not in actual and name.rpartition(".")[0] in actual:
            yield f"{name}: not there"


def check_settings(settings: Mapping[Any, Any], label: str) -> None:
    """Raises CheckpointError for what a file gives as settings and `rebuilding` does not write."""
    problem = ""
    if len(settings) > _MOST_MODULES:
        problem = f"of {len(settings)} modules"
    for name, entry in settings.items():
        if problem:
            break
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            problem = f"of a module named {one_line(repr(name))}"
        elif name.count(".") > _DEEPEST_NAME:
            problem = f"of a module {name.count('.')} deep in others"
        elif entry is not None:
            problem = _wrong_entry(name, entry)
    if problem:
        raise CheckpointError(
            f"{label}: the settings {problem} cannot be put back; allowed are, for each of at most "
            f"{_MOST_MODULES} modules by name, null or its class, whether it is new, and its plain "
            "values; save the model again"
        )


def _wrong_entry(name: str, entry: object) -> str:
    """What is wrong with the settings of a module, "" where nothing is."""
    what = ""
    if not isinstance(entry, Mapping) or set(entry) != {"class", "new", "values"}:
        what = "something else than class, new and values"
    elif not isinstance(entry["class"], str) or not isinstance(entry["new"], bool):
        what = "no class, or no word whether it is new"
    elif not isinstance(entry["values"], Mapping):
        what = "no values by name"
    else:
        known = (bool, int, float, str, list, tuple, dict, type(None))
        values = entry["values"]
        if strange := [k for k, v in values.items() if type(v) not in known or type(k) is not str]:
            what = f"{one_line(repr(strange[0]))}, which is no plain value of a name"
        try:
            check_plain(values, _DEEPEST_VALUE, _MOST_VALUES)
        except ValueError as error:
            what = f"values of which {error}"
    return f"of {one_line(name) or 'the model'} ({what})" if what else ""


def check_size(
    name: str, options: Mapping[str, Any], settings: Settings, held: int, label: str
) -> None:
    """Nothing is allocated for a model that a file describes and does not hold.

    Args:
        name, options, settings: of the model, num_classes and aux_loss among the options.
        held: how many numbers the tensors of the file have.
        label: of the checkpoint, for the message.

    Raises:
        CheckpointError: the model would have many times as many, or cannot be built.
    """
    try:
        facts = _restored(name, options, settings) if settings else _of_builder(name, options)
        needed = sum(
            math.prod(shape)
            for module in facts.values()
            for shape in module.tensors.values()
            if shape
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{label} describes a model that cannot be built: {one_line(error)}; save it again, or "
            "build the model yourself and use deeplab_fast.load_weights"
        ) from error
    if needed > _MOST_TIMES * held + _SPARE:
        raise CheckpointError(
            f"{label} describes a model of {needed} numbers and holds {held}, expected at least a "
            f"{_MOST_TIMES}th part; save it again, or build the model yourself and use "
            "deeplab_fast.load_weights"
        )


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's settings of {name or 'the model'} cannot be put back: {error}"
        ) from error


def put_back(model: nn.Module, settings: Settings) -> nn.Module:
    """Put back, in place, what `rebuilding` found.

    Only classes that are known here are made, and only values that a module has are set.

    Args:
        model: what the builder makes with the options that belong to the settings.
        settings: by module.

    Raises:
        CheckpointError: settings that the model cannot take; it may be changed in part then.
    """
    for name, entry in settings.items():
        with _refusing(name):
            _restore(model, name, entry)
    return model


def under_other_options(
    settings: Settings, name: str, options: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[Settings, list[str]]:
    """Settings of a model built with `options`, for one that the builder makes with `other`.

    Values that the options decide are those of `other`; everything else stays.

    Returns:
        The settings, and what of them was left out, as text.
    """
    before, after = _of_builder(name, options), _of_builder(name, other)
    found: Settings = {}
    dropped: list[str] = []
    gone: set[str] = set()
    for module, entry in settings.items():
        with _refusing(module):
            where = module or "the model"
            old, new = before.get(module), after.get(module)
            if any(module.startswith(f"{parent}.") for parent in gone):
                continue
            if old is None or new is None:
                if old is new:
                    found[module] = entry
                    continue
                decided = True
            else:
                decided = (old.kind, old.children) != (new.kind, new.children)
                # Of a module in another's place nothing tells how its tensors would become others.
                other_kind = entry is None or entry["class"] != old.kind
                decided = decided or (other_kind and old.tensors != new.tensors)
            if decided:
                gone.add(module)
                dropped.append(where)
                continue
            if entry is None:
                found[module] = None
                continue
            values = dict(entry["values"])
            assert old is not None and new is not None
            for key in old.attributes:
                if key in values and old.attributes[key] != new.attributes.get(key):
                    value = tuples(values[key])
                    # What nobody set by hand is no loss.
                    if value not in (old.attributes[key], new.attributes.get(key)):
                        dropped.append(f"{where}: {key}={value!r}")
                    values[key] = new.attributes.get(key)
                    if key == "padding" and _DERIVED_PADDING in values:
                        rows, columns = values[key]
                        values[_DERIVED_PADDING] = (columns, columns, rows, rows)
            found[module] = {**entry, "values": values}
    return found, dropped


def settings_differ(model: nn.Module, settings: Settings) -> list[str]:
    """Values of a model that are not those of the settings and change its numbers, as text."""
    differences = []
    modules = dict(model.named_modules())
    for name, entry in settings.items():
        module = modules.get(name)
        where = name or "the model"
        if entry is None:
            if module is not None:
                differences.append(f"{where}: not there")
            continue
        if module is None or _kind(type(module)) != entry.get("class"):
            differences.append(f"{where}: a module of class {entry.get('class')}")
            continue
        found = _attributes(module, ())
        differences += [
            f"{where}: {key}={tuples(value)!r} (the model has {found[key]!r})"
            for key, value in dict(entry.get("values") or {}).items()
            if key in found and key not in _NOT_IN_NUMBERS and found[key] != tuples(value)
        ]
    return differences


def stem_settings(model: nn.Module, state: Mapping[str, Tensor]) -> Settings:
    """The first convolution for as many input channels as a state dict's has, where they differ."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = state.get(f"{name}.weight")
            ours = module.weight.shape
            if weight is None or weight.shape == ours or weight.ndim != 4:
                return {}
            if (weight.shape[0], *weight.shape[2:]) != (ours[0], *ours[2:]):
                return {}
            values = {**_attributes(module, ()), "in_channels": weight.shape[1]}
            return {name: {"class": _kind(type(module)), "new": True, "values": values}}
    return {}


def _restore(model: nn.Module, name: str, entry: dict[str, Any] | None) -> None:
    parent_name, _, leaf = name.rpartition(".")
    if entry is None:
        parent = model.get_submodule(parent_name)
        if leaf not in parent._modules:
            raise ValueError(f"{one_line(repr(name))} is no module")
        if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            delattr(parent, leaf)
        else:
            setattr(parent, leaf, None)
        return
    values = {k: tuples(v) for k, v in entry["values"].items()}
    if entry["new"]:
        module = _made(entry["class"], values)
        parent = model.get_submodule(parent_name)
        if not (leaf.isidentifier() or leaf.isdecimal()) or _is_taken(parent, leaf):
            raise ValueError(f"{one_line(repr(name))} is no name of a module")
        # Where the attribute is a plain None so far, as a missing auxiliary head is.
        vars(parent).pop(leaf, None)
        parent.add_module(leaf, module)
    else:
        module = model.get_submodule(name)
        if _kind(type(module)) != entry["class"]:
            raise ValueError(f"it is of class {_kind(type(module))}, not {entry['class']}")
    shell = entry["new"] and entry["class"] in _kinds()[1]
    for key, value in values.items():
        if key.startswith("_") and key != _DERIVED_PADDING:
            continue
        # What else somebody kept on the module, its class does not read.
        known = key in vars(module) or (shell and not hasattr(module, key))
        if key == _DERIVED_PADDING or (known and _may_set(module, key, name == "")):
            setattr(module, key, value)


def _is_taken(parent: nn.Module, leaf: str) -> bool:
    """Whether a module's name is that of something else there."""
    if leaf in parent._modules:
        return False
    return vars(parent).get(leaf) is not None or hasattr(type(parent), leaf)


def _may_set(module: nn.Module, key: str, whole: bool) -> bool:
    """Whether a file may give an attribute: one that has a plain value and no part in running."""
    from ..nn.batch_norm import FROZEN_STATE

    if key in ("training", *FROZEN_STATE) or (whole and key in _OF_MODEL):
        return False
    return isinstance(vars(module).get(key), (bool, int, float, str, tuple, list, dict, type(None)))


def _made(kind: str, values: Mapping[str, Any]) -> nn.Module:
    leaves, shells = _kinds()
    if kind in leaves:
        cls = leaves[kind]
        names = set(inspect.signature(cls).parameters) - {"device", "dtype"}
        given = {k: v for k, v in values.items() if k in names}
        for key, value in given.items():
            if not _is_sized(value):
                raise ValueError(f"{key}={one_line(repr(value))} is beyond {LARGEST}")
        return cls(**given)
    if kind in shells:
        module = shells[kind].__new__(shells[kind])
        nn.Module.__init__(module)
        return module
    raise ValueError(f"modules of class {kind} are not known here")
