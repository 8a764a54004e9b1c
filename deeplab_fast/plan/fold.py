"""Where `fold_filters` puts its results: one behind another in one allocation.

Every layer starts at a multiple of `ALIGNMENT` elements, whatever their dtype; what lies between
the end of a layer and the start of the next is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from torch import Tensor

# 16 bytes of the narrowest results: what vector accesses and cuDNN ask for.
ALIGNMENT = 8

Shape = tuple[int, ...]


def shapes_of(weights: Iterable[Tensor]) -> list[Shape]:
    """The shapes [K, C, R, S] of filters."""
    return [tuple(w.shape) for w in weights]


def starts(shapes: Iterable[Shape]) -> list[int]:
    """The first element of each layer's result, and behind them the size of the allocation."""
    found = [0]
    for shape in shapes:
        found.append(found[-1] + -(-prod(shape) // ALIGNMENT) * ALIGNMENT)
    return found


def gaps(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """(first element, end) of what belongs to no layer, where there is anything."""
    first = starts(shapes)
    ends = [start + prod(shape) for start, shape in zip(first, shapes, strict=False)]
    return [pair for pair in zip(ends, first[1:], strict=True) if pair[0] < pair[1]]


def views(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Each layer's result, channels_last, as a view of the allocation.

    Args:
        flat: [starts(shapes)[-1]].
        shapes: [K, C, R, S] of each layer.
    """
    return [
        flat.as_strided((k, c, r, s), (r * s * c, 1, s * c, c), start)
        for (k, c, r, s), start in zip(shapes, starts(shapes), strict=False)
    ]
