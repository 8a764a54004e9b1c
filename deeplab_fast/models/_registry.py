"""Names of the model builders, and of the weights that torchvision publishes for them."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}
# Builder -> torchvision's enum of its weights.
_enums: dict[str, str] = {}


def register_model(builder: Builder, enum: str | None = None) -> Builder:
    """List a builder under its own name, in lower case; `enum`: torchvision's for its weights."""
    name = builder.__name__.lower()
    _builders[name] = builder
    if enum is not None:
        _enums[name] = enum
    return builder


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
        for name, builder in _builders.items()
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


def get_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name, in any case; options as its builder takes them.

    Raises:
        ValueError: no model has that name.
    """
    return _builders[_known(name)](**options)


def get_model_weights(name: Callable[..., nn.Module] | str) -> Any:
    """torchvision's enum of the weights that it publishes for a model.

    Args:
        name: a builder of this package, or its name in any case.

    Raises:
        ValueError: no model has that name, or no weights are published for it.
        ImportError: torchvision, which the weights come from, cannot be imported.
    """
    known = _known(name if isinstance(name, str) else getattr(name, "__name__", repr(name)))
    if known not in _enums:
        raise ValueError(
            f"no weights are published for {known}; there are some for: {', '.join(sorted(_enums))}"
        )
    return torchvision_enum(known, "torchvision.models.segmentation", _enums[known])


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
    if name.lower() not in _builders:
        raise ValueError(f"no model is named {name!r}; there are: {', '.join(list_models())}")
    return name.lower()
