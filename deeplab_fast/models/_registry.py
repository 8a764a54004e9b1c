"""Names of the model builders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """List a builder under its own name."""
    _builders[builder.__name__] = builder
    return builder


def list_models() -> list[str]:
    """Names that `get_model` knows, sorted."""
    return sorted(_builders)


def get_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name; options as its builder takes them.

    Raises:
        ValueError: no model has that name.
    """
    if name not in _builders:
        raise ValueError(f"no model is named {name!r}; there are: {', '.join(list_models())}")
    return _builders[name](**options)
