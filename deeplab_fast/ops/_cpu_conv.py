"""The convolution ops on fp32 CPU tensors: `prepared`, with weights that are prepared for one call.

Nothing is kept between calls, so that nothing can be out of date; the time of preparing counts
where the algorithm is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ext, reference
from ..dispatch import limits
from ..dispatch.choice import Choices, current_backend
from ..dispatch.describe import OpDesc
from ..plan.taps import live_taps
from . import _cpu_forms
from ._cpu_forms import TileForm
from .batch_norm import run_stats
from .prepared import PreparedConv
from .prepared_aspp import PreparedAspp, PreparedProject

_LARGEST_DEPTHWISE = 7


def reasons(desc: OpDesc) -> list[str]:
    """Why the call cannot run here; empty where it can."""
    return [
        *limits.device(desc, "cpu"),
        *limits.dtype(desc, (torch.float32,), "takes float32 only"),
        *limits.extension(_ext.CPU, "_conv_weight_gradient_cpu"),
    ]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    residual: Tensor | None,
    act: str | None,
) -> Tensor:
    """As `ops.conv_bn_act`."""
    conv = PreparedConv(
        weight,
        scale,
        shift,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        reuse=False,
    )
    return conv(x, residual)


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """As `ops.aspp_branches`."""
    return PreparedAspp(weights, scales, shifts, dilations, reuse=False)(x)


def aspp_project(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """As `ops.aspp_project`."""
    channels = branches.shape[1]
    project = PreparedProject(weight, scale, shift, branch_channels=channels, reuse=False)
    return project(branches, pooled)


def conv2d_reasons(desc: OpDesc) -> list[str]:
    """Why `conv2d` should not run here; empty where it should."""
    return reasons(desc) or _tiles_reasons(desc)


def conv2d_backward_reasons(desc: OpDesc) -> list[str]:
    """Why `conv2d_backward` should not run here; empty where it should."""
    found = reasons(desc)
    if found or _keeps_size(desc.params) or _is_pointwise(desc.params):
        return found
    if _is_depthwise(desc.params):
        return limits.extension(_ext.CPU, "_depthwise_gradients_cpu")
    return [
        "only 1x1 convolutions without padding, and 3x3 ones with stride 1 and a padding that "
        "equals the dilation, with groups 1; and depthwise ones with stride 1, a filter a channel, "
        f"and kernels up to {_LARGEST_DEPTHWISE}x{_LARGEST_DEPTHWISE}"
    ]


def _is_pointwise(options: Mapping[str, Any]) -> bool:
    return (
        tuple(options["weight"][2:]) == (1, 1)
        and tuple(options["padding"]) == (0, 0)
        and options["groups"] == 1
    )


def _is_depthwise(options: Mapping[str, Any]) -> bool:
    filters, channels, *kernel = options["weight"]
    return (
        filters == options["groups"] > 1
        and channels == 1
        and max(kernel) <= _LARGEST_DEPTHWISE
        and tuple(options["stride"]) == (1, 1)
    )


def _keeps_size(options: Mapping[str, Any]) -> bool:
    dilation = tuple(options["dilation"])
    return (
        tuple(options["weight"][2:]) == (3, 3)
        and tuple(options["stride"]) == (1, 1)
        and tuple(options["padding"]) == dilation
        and dilation[0] == dilation[1]
        and options["groups"] == 1
    )


def _tiles_reasons(desc: OpDesc) -> list[str]:
    options = desc.params
    if not _keeps_size(options):
        return [
            "only 3x3 convolutions with stride 1, groups 1 and a padding that equals the dilation"
        ]
    if current_backend() == "cpu":
        return []
    if _takes_tiles(desc.shape, options["weight"], options["dilation"][0]):
        return []
    return ["predicted to take longer than PyTorch's; use_backend('cpu') runs it all the same"]


def _direct_seconds(shape: Sequence[int], outputs: int, dilation: int, threads: int) -> float:
    n, channels, height, width = shape
    taps = 1
    for length in (height, width):
        taps *= live_taps(length, 3, 1, dilation, dilation)
    return _cpu_forms.onednn_seconds(n * channels * outputs * taps, threads)


def _tile_form(shape: Sequence[int], outputs: int, dilation: int, threads: int) -> TileForm:
    n, channels, height, width = shape
    # Gradients are small differences of large sums: the form with the coarsest rounding stays out.
    return _cpu_forms.tile_forms(
        n, channels, outputs, height, width, dilation, threads, reuse=False, coarse=False
    )[0]


def _tiles(
    x: Tensor,
    weight: Tensor,
    dilation: int,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    channel_offset: int = 0,
) -> Tensor:
    """conv(x, weight) + residual of a 3x3 weight with padding = dilation, prepared for the call.

    out may be the residual: each value of it is read before it is written.
    """
    ops = torch.ops.deeplab_fast
    x = x.contiguous(memory_format=torch.channels_last)
    if out is None:
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    form = _tile_form(x.shape, weight.shape[0], dilation, torch.get_num_threads())
    prepared = [ops._conv_prepare_tiles_cpu(weight, r.number, c.number) for r, c in form.pairs]
    axes = ([a.long.number, a.short.number] for a in (form.rows, form.columns))
    shift = weight.new_zeros(weight.shape[0])
    ops._conv_tiles_cpu(x, prepared, shift, residual, out, channel_offset, dilation, *axes, "none")
    return out


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As `ops.conv2d`, by few multiplications."""
    return _tiles(x, weight, dilation[0])


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `ops.conv2d`: to x by few multiplications where that is predicted to be
    faster, to weight by one matrix product for each tap; of depthwise ones by kernels of their own.
    """
    if groups > 1:
        grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
        return torch.ops.deeplab_fast._depthwise_gradients_cpu(
            grad, x, weight, padding, dilation, to_x, to_weight
        )
    options = (stride, padding, dilation, groups)
    empty = grad.new_empty(0)
    grad_weight = empty
    if to_weight:
        grad_weight = _weight_gradient(grad, x, weight, stride[0], dilation[0])
    if not to_x:
        return empty, grad_weight
    k, c, *kernel = weight.shape
    if _takes_tiles(grad.shape, (c, k, *kernel), dilation[0]):
        return _tiles(grad, _mirrored(weight), dilation[0]), grad_weight
    return reference.conv2d_backward(grad, x, weight, *options, True, False)[0], grad_weight


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """dW[t] = sum over pixels p of grad[p]^T x[p + t * dilation], for 1x1 and for 3x3 weights.

    A product for each tap, over the pixels for which it lies inside the map. oneDNN's, which
    multiplies the padding of dilated filters, takes 3 to 14 times as long at dilations of 6 to 18.
    Of a 3x3 filter whose gradient is not finite all taps get nan, as padding times it is.
    """
    height, width = grad.shape[2:]
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    spreads = weight.shape[2] == 3 and _pads(height, width, dilation)
    return torch.ops.deeplab_fast._conv_weight_gradient_cpu(
        grad, x, weight.shape[2], stride, dilation, spreads
    )


def _pads(height: int, width: int, dilation: int) -> bool:
    """Whether multiplying padded maps takes fewer rows than copying each tap's pixels is worth."""
    inside = (3 * height - 2 * min(dilation, height)) * (3 * width - 2 * min(dilation, width))
    # A copied pixel costs about as much as half of one that is multiplied.
    return 9 * (height + dilation) * (width + dilation) <= 1.5 * inside


def aspp_convs(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.aspp_convs`: each branch by few multiplications or by PyTorch."""
    n, _, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    channels = sum(w.shape[0] for w in weights)
    y = x.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)
    first = 0
    for weight, dilation in zip(weights, dilations, strict=True):
        count = weight.shape[0]
        if _takes_tiles(x.shape, weight.shape, dilation):
            _tiles(x, weight, dilation, out=y, channel_offset=first)
        else:
            padding = reference.branch_padding(weight, dilation)
            found = reference.convolution(x, weight, None, 1, padding, dilation)
            y[:, first : first + count] = found
        first += count
    if stats:
        return y, *run_stats(Choices(), y, 0.0, None, None, None, None)[:2]
    return y, y.new_empty(0), y.new_empty(0)


def aspp_convs_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As the gradient of `ops.aspp_convs`; branches add to the gradient to x where it lies."""
    grad_x = grad.new_empty(0)
    if to_x:
        grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    grad_weights = []
    first = 0
    for weight, dilation in zip(weights, dilations, strict=True):
        k, c, *kernel = weight.shape
        branch = grad[:, first : first + k].contiguous(memory_format=torch.channels_last)
        first += k
        if to_x and _takes_tiles(branch.shape, (c, k, *kernel), dilation):
            _tiles(branch, _mirrored(weight), dilation, residual=grad_x, out=grad_x)
        elif to_x:
            pad = reference.branch_padding(weight, dilation)
            options = ((1, 1), (pad, pad), (dilation, dilation), 1)
            grad_x += reference.conv2d_backward(branch, x, weight, *options, True, False)[0]
        if to_weights:
            grad_weights.append(_weight_gradient(branch, x, weight, 1, dilation))
    return grad_x, grad_weights


def _takes_tiles(shape: Sequence[int], weight: Sequence[int], dilation: int) -> bool:
    if tuple(weight[2:]) != (3, 3) or not shape[0]:
        return False
    threads = torch.get_num_threads()
    ours = _tile_form(shape, weight[0], dilation, threads).seconds
    return ours <= _direct_seconds(shape, weight[0], dilation, threads)


def _mirrored(weight: Tensor) -> Tensor:
    """The weight of the convolution that gives the gradient to x: dx[p] = sum over taps t of
    weight[t]^T grad[p - t]."""
    return weight.transpose(0, 1).flip(2, 3)
