"""The least that a job costs: multiply-adds, those of them that touch the map, and bytes.

Dense multiply-adds count every tap of a filter at every output pixel, as FLOP figures of networks
do. Live ones leave out the taps that fall on padding, where they multiply zeros. Bytes are those
that must move when each tensor is read or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast.dispatch.examples import Size
from deeplab_fast.plan.taps import live_taps, output_size


@dataclass(frozen=True)
class Cost:
    """What one call costs at least.

    Attributes:
        dense_macs: multiply-adds with every tap.
        live_macs: multiply-adds of taps inside the map.
        bytes: read and written, each tensor once.
        convolutions: of a forward pass, one behind another or side by side.
    """

    dense_macs: int
    live_macs: int
    bytes: int
    convolutions: int = 0

    def with_gradient(self, extra_bytes: int = 0) -> Cost:
        """Forward and backward pass: a convolution's two gradients cost as much as itself each.

        The forward pass reads x and w and writes z, the gradient to x reads dz and w and writes dx,
        the gradient to w reads x and dz and writes dw: three times the same bytes.
        """
        moved = 3 * self.bytes + extra_bytes
        return Cost(3 * self.dense_macs, 3 * self.live_macs, moved, self.convolutions)

    def gradient_only(self) -> Cost:
        """The backward pass alone."""
        return Cost(2 * self.dense_macs, 2 * self.live_macs, 2 * self.bytes, self.convolutions)


def conv_macs(
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(dense, live) multiply-adds of a convolution.

    Args:
        x: [N, C, H, W] of the input.
        w: [K, C / groups, kh, kw] of the weight.
        stride, padding, dilation: (vertical, horizontal).
    """
    axes = list(zip(x[2:], w[2:], stride, padding, dilation, strict=True))
    dense = live = x[0] * w[0] * w[1]
    for axis in axes:
        dense *= output_size(*axis) * axis[1]
        live *= live_taps(*axis)
    return dense, live


class _Convolutions(TorchDispatchMode):
    """Sums the costs of the convolutions that run under it, and the reads of residuals."""

    def __init__(self, itemsize: int) -> None:
        super().__init__()
        self.itemsize = itemsize
        self.dense = self.live = self.elements = self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, w, _, stride, padding, dilation = args[:6]
            dense, live = conv_macs(x.shape, w.shape, stride, padding, dilation)
            self.dense += dense
            self.live += live
            self.elements += x.numel() + w.numel() + out.numel()
            self.count += 1
        elif func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            # A residual joins in the convolution before it: it is read, nothing else moves.
            if isinstance(args[1], Tensor) and args[1].dim() == 4:
                self.elements += args[1].numel()
        return out


def network_cost(module: nn.Module, inputs: Sequence[Tensor], itemsize: int) -> Cost:
    """Cost of a network in which only convolutions, with all else fused to them, move data.

    Args:
        module: on the meta device, of PyTorch's own modules.
        inputs: meta tensors.
        itemsize: bytes of an element.
    """
    with torch.no_grad(), _Convolutions(itemsize) as seen:
        module(*inputs)
    return Cost(seen.dense, seen.live, seen.elements * itemsize, seen.count)


def fused_cost(module: nn.Module, inputs: Sequence[Tensor], outputs: int, itemsize: int) -> Cost:
    """As `network_cost`, where only inputs, weights and `outputs` elements move."""
    cost = network_cost(module, inputs, itemsize)
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 4)
    elements = sum(x.numel() for x in inputs) + weights + outputs
    return Cost(cost.dense_macs, cost.live_macs, elements * itemsize, cost.convolutions)


def logits(size: Size) -> int:
    """Low-resolution logits of a call that upsamples."""
    return size.n * size.c * size.h * size.w


def pixels(size: Size) -> int:
    """Output pixels of such a call."""
    return size.n * size.height * size.width


def lerps(size: Size) -> int:
    """Fewest multiply-adds of the interpolation: along rows once a low-resolution row, then one for
    each pixel and class."""
    return size.c * size.n * size.width * (size.h + size.height)


def upsample_cost(size: Size, moved: int, per_pixel_class: int = 0, gradient: bool = False) -> Cost:
    """Cost of an op on interpolated logits that are never stored.

    Args:
        size: the sizes.
        moved: bytes read and written.
        per_pixel_class: multiply-adds for each pixel and class beyond the interpolation.
            Exponentials and comparisons are not counted.
        gradient: also carry a gradient back: to the two rows of logits above and below a pixel,
            then along the rows.
    """
    macs = lerps(size) + per_pixel_class * size.c * pixels(size)
    if gradient:
        macs += 2 * lerps(size)
    return Cost(macs, macs, moved)
