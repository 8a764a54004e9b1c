"""What the ops of the ASPP's branches share: checks of their arguments, and examples."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..dispatch.examples import Maker, Shapes, Size
from .common import check_device, check_dtype, check_map, check_option

SIZES = (
    # Rate 12 on 9 rows has no tap but the centre; filters that fill no tile.
    Size(2, 40, 9, 11, filters=24, rates=(2, 4, 12)),
    # Accesses of one element.
    Size(2, 7, 9, 11, filters=5, rates=(2, 4, 12)),
    # Every class of taps, tiles of 256 filters, rows of several images in a tile.
    Size(2, 64, 21, 20, filters=256, rates=(6, 12, 18)),
    # Channels that end within a chunk, filters that end within a tile.
    Size(1, 136, 33, 17, filters=144, rates=(6, 12, 18)),
)


def check_branch(op: str, number: int, x: Tensor, weight: Tensor, dilation: int) -> None:
    """A 1x1 or 3x3 weight for x, and a dilation of at least 1."""
    name = f"weights[{number}]"
    check_map(op, name, weight)
    check_dtype(op, name, weight, (x.dtype,))
    if weight.shape[1] != x.shape[1] or tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
        raise ValueError(
            f"{op}: {name} has shape {list(weight.shape)}, expected "
            f"[K, {x.shape[1]}, 1, 1] or [K, {x.shape[1]}, 3, 3]"
        )
    check_device(op, x, **{name: weight})
    check_option(op, f"dilations[{number}]", dilation, 1)


def works(shapes: Shapes) -> list[tuple[str, Size]]:
    """The call of a model that has an ASPP."""
    return [] if shapes.aspp is None else [("plain", shapes.aspp)]


def example(make: Maker, s: Size) -> tuple[Tensor, list[Tensor], list[int]]:
    """x, weights and dilations."""
    x = make.map(s.n, s.c, s.h, s.w).relu_()
    weights = [make.weight(s.filters, s.c, 3 if i else 1) for i in range(1 + len(s.rates))]
    return x, weights, [1, *s.rates]


def convolution(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """A branch's convolution, by PyTorch."""
    padding = reference.branch_padding(weight, dilation)
    return reference.convolution(x, weight, None, 1, padding, dilation)
