"""What the models' files tell of themselves: builders, tensors' names, published weights.

Reading and writing of weights asks here, and imports no model.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..data.preprocess import Preprocess
from .rules import Rule

# Builder's name and its options.
Found = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class ModelEntry:
    """What one model's file registers.

    Attributes:
        builders: of its models, listed under their own names in lower case.
        recognise: state dict under the names used here -> name of the builder and those of its
            options that decide on names and shapes; None for another's.
        foreign: name of a `Layout` -> rules for the backbone's names there, tried before the
            layout's own, which are for all backbones and for heads.
        classifier: pattern of a key that an image classifier on this backbone has.
        enums: name of a builder -> torchvision's enum of its weights.
        leaves: modules without children that a file may name: their attributes are their arguments.
        preprocess: classes of preprocessing that a file may name.
        backbone: what messages call it.
    """

    builders: tuple[Callable[..., nn.Module], ...]
    recognise: Callable[[Mapping[str, Tensor]], Found | None] = lambda state: None
    foreign: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    classifier: str = ""
    enums: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[type[nn.Module], ...] = ()
    preprocess: tuple[type[Preprocess], ...] = ()
    backbone: str = ""


# What registers when it is imported. By name: it imports this module.
_REGISTERING = "deeplab_fast.models"

_entries: list[ModelEntry] = []
_builders: dict[str, Callable[..., nn.Module]] = {}


def register(*entries: ModelEntry) -> None:
    """List models; entries that come first are asked first whether a state dict is theirs."""
    for entry in entries:
        _entries.append(entry)
        _builders.update({builder.__name__.lower(): builder for builder in entry.builders})


def _registered() -> list[ModelEntry]:
    importlib.import_module(_REGISTERING)
    return _entries


def _known_builders() -> dict[str, Callable[..., nn.Module]]:
    importlib.import_module(_REGISTERING)
    return _builders


def recognise(state: Mapping[str, Tensor]) -> Found | None:
    """Builder, and its options that decide on names and shapes, from a renamed state dict."""
    return next((found for e in _registered() if (found := e.recognise(state)) is not None), None)


def foreign_rules(layout: str, builder: str | None = None) -> tuple[Rule, ...]:
    """Rules for the names of backbones in a layout; of one builder's, or of all."""
    entries = [
        e for e in _registered() if builder is None or builder in [b.__name__ for b in e.builders]
    ]
    return tuple(rule for e in entries for rule in e.foreign.get(layout, ()))


def classifiers() -> str:
    """Pattern of a key that an image classifier on a known backbone has."""
    return "|".join(e.classifier for e in _registered() if e.classifier)


def published_enum(builder: str) -> str | None:
    """torchvision's enum of the weights that it publishes for a builder's model, where it does."""
    return _enums().get(builder)


def leaves() -> dict[str, type[nn.Module]]:
    """The models' modules without children that a file may name."""
    return {kind.__name__: kind for e in _registered() for kind in e.leaves}


def preprocess_kinds() -> dict[str, type[Preprocess]]:
    """Classes of preprocessing that a file may name."""
    kinds = {kind.__name__: kind for e in _registered() for kind in e.preprocess}
    return {"Preprocess": Preprocess, **kinds}


def no_builder() -> str:
    """What a message says of a checkpoint that is none of the models'."""
    *most, last = (e.backbone for e in _registered() if e.backbone)
    return (
        "no builder of this package fits it: there are DeepLabv3 heads on "
        f"{', '.join(most)} and {last}"
    )


def _enums() -> dict[str, str]:
    return {name: enum for e in _registered() for name, enum in e.enums.items()}


def list_models(
    module: ModuleType | None = None,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
) -> list[str]:
    """Names that `get_model` knows, sorted; arguments as of torchvision's `list_models`.

    Args:
        module: only builders of this package's module, e.g. `deeplab_fast.models`.
        include: only names that match this wildcard pattern, or one of these.
        exclude: no names that match this wildcard pattern, or one of these.
    """
    names = [
        name
        for name, builder in _known_builders().items()
        if module is None or builder.__module__.rsplit(".", 1)[0] == module.__name__
    ]
    if include:
        names = [name for name in names if _matches(name, include)]
    if exclude:
        names = [name for name in names if not _matches(name, exclude)]
    return sorted(names)


def _matches(name: str, patterns: Iterable[str] | str) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def get_model(name: str, **options: object) -> nn.Module:
    """Build a model by name, in any case; options as its builder takes them.

    Raises:
        ValueError: no model has that name.
    """
    return _known_builders()[_known(name)](**options)


def get_model_weights(name: Callable[..., nn.Module] | str) -> Any:
    """torchvision's enum of the weights that it publishes for a model.

    Args:
        name: a builder of this package, or its name in any case.

    Raises:
        ValueError: no model has that name, or no weights are published for it.
        ImportError: torchvision, which the weights come from, cannot be imported.
    """
    known = _known(name if isinstance(name, str) else getattr(name, "__name__", repr(name)))
    enums = _enums()
    if known not in enums:
        raise ValueError(
            f"no weights are published for {known}; there are some for: {', '.join(sorted(enums))}"
        )
    return torchvision_enum(known, "torchvision.models.segmentation", enums[known])


def torchvision_enum(name: str, module: str, enum: str) -> Any:
    """One of torchvision's enums of weights; `name`: the model, for the message.

    Raises:
        ImportError: torchvision cannot be imported.
    """
    try:
        return getattr(importlib.import_module(module), enum)
    # A torchvision that was built for another PyTorch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{name}: its weights are published by torchvision, which cannot be imported here "
            f"({error}). Install torchvision, or pass the path of a checkpoint"
        ) from error


def _known(name: str) -> str:
    if name.lower() not in _known_builders():
        raise ValueError(f"no model is named {name!r}; there are: {', '.join(list_models())}")
    return name.lower()
