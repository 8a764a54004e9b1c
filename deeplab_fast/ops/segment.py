"""A piece of a network in training, forward and backward as one function each.

    z = conv(act_before(norm_before(x))),  y = pool(act(norm(z) + residual))

Of these each part may be missing. A function calls the implementations of the batch norm ops and
of `conv2d` that are chosen for its sizes, within one boundary to PyTorch's dispatcher: what a call
through that costs on the host is paid once for the piece, not for each of its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch.choice import Choices
from ..dispatch.declare import Function, define
from .batch_norm import (
    check_count,
    map_like,
    run_act,
    run_backward,
    run_reduce,
    run_stats,
)
from .conv2d import Options, output_like, run_conv, run_conv_backward, weight_format

# What has the ops under their names, called with the arguments of their schemas.
Ops = Any
# Statistics of a batch and the number of values -> those over all processes.
Join = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
# Sums over a batch -> those over all processes.
Add = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _Chosen:
    """The implementations that are chosen at the moment, without the dispatcher."""

    def __init__(self) -> None:
        self._choices = Choices()

    def batch_stats(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run_stats(self._choices, *args)

    def bn_act(self, *args: Any) -> Tensor:
        return run_act(self._choices, *args)

    def bn_act_reduce(self, *args: Any) -> tuple[Tensor, Tensor]:
        return run_reduce(self._choices, *args)

    def bn_act_backward(self, *args: Any) -> tuple[Tensor, Tensor]:
        return run_backward(self._choices, *args)

    def conv2d(self, *args: Any) -> Tensor:
        return run_conv(self._choices, *args)

    def conv2d_backward(self, *args: Any) -> tuple[Tensor, Tensor]:
        return run_conv_backward(self._choices, *args)


def forward(
    ops: Ops,
    x: Tensor,
    before: Sequence[Tensor],
    act_before: str | None,
    filters: Tensor | None,
    geometry: Sequence[int],
    takes_stats: bool,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    after: Sequence[Tensor],
    residual: Tensor | None,
    act: str | None,
    pool: Sequence[int],
    join: Join | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a piece.

    Args:
        ops: what runs the passes.
        x: [N, C, H, W].
        before: mean, rstd, weight, bias of the norm in front, [C]; empty for none.
        act_before: the activation behind that.
        filters: of the convolution, the dtype of x, or None.
        geometry: stride, padding, dilation, each (rows, columns), and groups; empty for none.
        takes_stats: take mean and rstd of z, and update running statistics where these are given,
            as `batch_stats` does.
        eps, running_mean, running_var, num_batches_tracked, momentum: for that.
        after: of the norm behind weight and bias, and without `takes_stats` mean and rstd; empty
            for none.
        residual: the shape and dtype of z, or None.
        act: the activation at the end.
        pool: kernel, stride, padding, dilation, each (rows, columns), and whether sizes are rounded
            up; empty for no max pooling.
        join: puts the statistics of several processes together; running ones are its affair then.

    Returns:
        the result; with a convolution and a norm behind it z; with `takes_stats` mean and rstd;
        empty tensors for those of the last three that there are not.

    Raises:
        ValueError: statistics of one value a channel.
    """
    z = x
    if before:
        z = ops.bn_act(x, *before, None, act_before)
    if filters is not None:
        z = ops.conv2d(z, filters, *_options(geometry))
    stats: Sequence[Tensor] = ()
    if takes_stats and join is not None:
        mean, variance, _ = ops.batch_stats(z, eps, None, None, None, None)
        mean, variance = join(mean, variance, z.numel() // z.shape[1])
        stats = mean, torch.rsqrt(variance + eps)
    elif takes_stats:
        check_count(z)
        running = (running_mean, running_var, num_batches_tracked)
        mean, _, rstd = ops.batch_stats(z, eps, *running, momentum)
        stats = mean, rstd
    if not after:
        return _results(z, None, stats)
    weight, bias, *constants = after
    y = ops.bn_act(z, *(stats or constants), weight, bias, residual, act)
    if pool:
        y = _max_pool(y, pool)
    return _results(y, None if filters is None else z, stats)


def _results(
    y: Tensor, z: Tensor | None, stats: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A list would be shorter, and what changes its arguments may not return one.
    mean, rstd = stats or (y.new_empty(0), y.new_empty(0))
    return y, y.new_empty(0) if z is None else z, mean, rstd


def backward(
    ops: Ops,
    grad: Tensor,
    x: Tensor,
    before: Sequence[Tensor],
    act_before: str | None,
    count_before: int,
    filters: Tensor | None,
    geometry: Sequence[int],
    z: Tensor | None,
    after: Sequence[Tensor],
    count: int,
    out: Tensor | None,
    act: str | None,
    pool: Sequence[int],
    needs: Sequence[bool],
    add_before: Add | None = None,
    add: Add | None = None,
) -> list[Tensor]:
    """The gradients of a piece.

    Args:
        ops, x, before, act_before, filters, geometry, act, pool: as for `forward`.
        grad: to its result.
        count_before: values for each channel of the statistics in front, 0 for constants.
        z: what `forward` gave, or None to compute it again.
        after: mean, rstd, weight, bias of the norm behind; empty for none.
        count: as count_before, of the norm behind.
        out: the result, where it has a residual and an activation.
        needs: which gradients are asked for: to x, to weight and bias in front, to filters, to
            weight and bias behind, to residual.
        add_before, add: the sums over several processes, of either norm.

    Returns:
        those that are asked for, in that order.
    """
    to_x, to_weight, to_bias, to_filters, to_weight_after, to_bias_after, to_residual = needs
    found: list[Tensor | None] = [None] * len(needs)
    below = to_x or to_weight or to_bias
    a = x
    if before and (to_filters or (z is None and filters is not None and after)):
        a = ops.bn_act(x, *before, None, act_before)
    if after:
        if z is None:
            z = a if filters is None else ops.conv2d(a, filters, *_options(geometry))
        if pool:
            grad = _max_pool_backward(grad, ops.bn_act(z, *after, None, act), pool)
        wanted = (below or to_filters, to_weight_after, to_bias_after, to_residual)
        gradient, found[4], found[5], found[6] = _norm_backward(
            ops, grad, z, after, out, act, count, wanted, add
        )
        del z, out
    else:
        gradient = grad
    if filters is not None and gradient is not None and (below or to_filters):
        # Without filters of x only the shape is looked at.
        gradient, to_kernels = ops.conv2d_backward(
            gradient, a, filters, *_options(geometry), below, to_filters
        )
        found[3] = to_kernels
    del a
    if before and below:
        assert gradient is not None
        wanted = (to_x, to_weight, to_bias, False)
        gradient, found[1], found[2], _ = _norm_backward(
            ops, gradient, x, before, None, act_before, count_before, wanted, add_before
        )
    found[0] = gradient
    return [g for g, asked in zip(found, needs, strict=True) if asked and g is not None]


def _norm_backward(
    ops: Ops,
    grad: Tensor,
    z: Tensor,
    norm: Sequence[Tensor],
    out: Tensor | None,
    act: str | None,
    count: int,
    needs: tuple[bool, bool, bool, bool],
    add: Add | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to (z, weight, bias, residual) of act(norm(z) + residual), where needed."""
    to_z, to_weight, to_bias, to_residual = needs
    means: Sequence[Tensor | None] = (None, None)
    grad_weight = grad_bias = None
    if to_weight or to_bias or (count and to_z):
        sums: Sequence[Tensor] = ops.bn_act_reduce(grad, z, *norm, out, act)
        grad_bias = _converted(sums[0], norm[3].dtype) if to_bias else None
        grad_weight = _converted(sums[1], norm[2].dtype) if to_weight else None
        if count and to_z:
            means = sums if add is None else add(sums)
    if not to_z and not to_residual:
        return None, grad_weight, grad_bias, None
    grad_z, grad_residual = ops.bn_act_backward(
        grad, z, *norm, out, *means, act, to_residual, float(count or 1)
    )
    return grad_z, grad_weight, grad_bias, grad_residual if to_residual else None


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Also where it does nothing `to` passes through the dispatcher.
    return x if x.dtype == dtype else x.to(dtype)


def _options(geometry: Sequence[int]) -> Options:
    numbers = list(geometry)
    return numbers[0:2], numbers[2:4], numbers[4:6], numbers[6]


def _max_pool(y: Tensor, pool: Sequence[int]) -> Tensor:
    kernel, stride, padding, dilation = (list(pool[i : i + 2]) for i in range(0, 8, 2))
    return F.max_pool2d(y, kernel, stride, padding, dilation, bool(pool[8]))


def _max_pool_backward(grad: Tensor, y: Tensor, pool: Sequence[int]) -> Tensor:
    options = [list(pool[i : i + 2]) for i in range(0, 8, 2)]
    aten = torch.ops.aten
    _, indices = aten.max_pool2d_with_indices(y, *options, bool(pool[8]))
    return aten.max_pool2d_with_indices_backward(grad, y, *options, bool(pool[8]), indices)


def _z_like(x: Tensor, filters: Tensor | None, geometry: Sequence[int]) -> Tensor:
    return x if filters is None else output_like(x, filters, *_options(geometry))


def _forward_fake(
    x: Tensor,
    before: Sequence[Tensor],
    act_before: str | None,
    filters: Tensor | None,
    geometry: Sequence[int],
    takes_stats: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    after, _, _, pool = rest[-4:]
    z = _z_like(x, filters, geometry)
    dtype = reference.compute_dtype(x.dtype)
    stats = [x.new_empty(z.shape[1], dtype=dtype) for _ in range(2 * takes_stats)]
    if not after:
        return _results(z, None, stats)
    y = map_like(z)
    if pool:
        y = _max_pool(y, pool)
    return _results(y, None if filters is None else z, stats)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    before: Sequence[Tensor],
    act_before: str | None,
    count_before: int,
    filters: Tensor | None,
    geometry: Sequence[int],
    z: Tensor | None,
    after: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    to_x, to_weight, to_bias, to_filters, to_weight_after, to_bias_after, to_residual = rest[-1]
    found = [map_like(x)] if to_x else []
    found += [torch.empty_like(before[2])] if to_weight else []
    found += [torch.empty_like(before[3])] if to_bias else []
    if to_filters and filters is not None:
        found.append(torch.empty_like(filters, memory_format=weight_format(filters)))
    found += [torch.empty_like(after[2])] if to_weight_after else []
    found += [torch.empty_like(after[3])] if to_bias_after else []
    return [*found, map_like(_z_like(x, filters, geometry))] if to_residual else found


_INPUT = "Tensor x, Tensor[] before, str? act_before"
_CONV = "Tensor? filters, int[] geometry"
run = define(
    Function(
        f"segment({_INPUT}, {_CONV}, bool takes_stats, float eps, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, "
        "Tensor[] after, Tensor? residual, str? act, int[] pool) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        lambda *args: forward(_Chosen(), *args),
        _forward_fake,
    )
)
run_gradients = define(
    Function(
        f"segment_backward(Tensor grad, {_INPUT}, int count_before, {_CONV}, Tensor? z, "
        "Tensor[] after, int count, Tensor? out, str? act, int[] pool, bool[] needs) -> Tensor[]",
        lambda *args: backward(_Chosen(), *args),
        _backward_fake,
    )
)
