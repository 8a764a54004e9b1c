"""Sizes that may be symbolic, as torch.export and torch.compile have them where they may change."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_known(condition: bool) -> bool:
    """Whether a condition holds; of symbolic sizes whether it does for all, which asks nothing of
    them that an exported program would be bound to."""
    # TorchScript reads this function too, and no import inside one.
    if not torch.jit.is_scripting():
        return _holds_for_all(condition)
    return condition


def _holds_for_all(condition: bool | torch.SymBool) -> bool:
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_shape(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are equal; of symbolic sizes whether nothing says that they differ."""
    return len(shape) == len(expected) and not any(
        is_known(size != other) for size, other in zip(shape, expected, strict=True)
    )
