"""The specification of every op in plain PyTorch.

Each function takes what the op of the same name in `deeplab_fast.ops` takes, already validated,
and is the oracle that every other implementation is held against, in float64. fp16 and bf16 inputs
are computed in fp32 and rounded once, where a tensor is stored. The `*_backward` functions are the
gradients in closed form; they run below autograd, where nothing records a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# From here on PyTorch's convolutions, which count in 32 bits, overflow: a dilation of 2^31 - 1 ends
# the process.
_LARGE = 2**30
# The outputs for which a tap lies inside the map and the pixels that they read; None for none.
_Run = tuple[slice, slice] | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def label_dtype(num_classes: int) -> torch.dtype:
    """The dtype of predicted labels: uint8 up to 256 classes, else int64."""
    return torch.uint8 if num_classes <= 256 else torch.int64


def upsample(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear interpolation of `logits` [N, C, h, w] to [N, C, H, W] in `compute_dtype`."""
    logits = logits.to(compute_dtype(logits.dtype))
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv2d, also of calls that PyTorch does not survive (`is_safe`)."""
    pairs = _pair(stride), _pair(padding), _pair(dilation)
    if is_safe(x.shape, weight.shape, *pairs):
        return F.conv2d(x, weight, bias, *pairs, groups)
    dtype = compute_dtype(x.dtype)
    wide, filters = _in_groups(x.to(dtype), weight.to(dtype), groups)
    size, runs = _runs(x.shape, weight.shape, *pairs)
    # No pixel may be read, but what x is computed from must learn so.
    y = wide.new_zeros((*wide.shape[:2], filters.shape[1], *size)) + wide[:0].sum()
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            tap = filters[..., row, column]
            # Padding is multiplied, for what is not finite.
            part = (0 * tap).sum(2)[..., None, None].expand_as(y).clone()
            for rows, columns, lines, pixels in _inside(runs, row, column):
                seen = wide[..., lines, pixels]
                part[..., rows, columns] = torch.einsum("ngchw,gkc->ngkhw", seen, tap)
            y = y + part
    y = y.flatten(1, 2)
    return (y if bias is None else y + _per_channel(bias, dtype)).to(x.dtype)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    to_x: bool = True,
    to_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of `convolution` to x and weight; empty where one is not asked for."""
    pairs = _pair(stride), _pair(padding), _pair(dilation)
    empty = grad.new_empty(0)
    strided = weight.shape[2:] == (1, 1) and pairs[0] != (1, 1) and pairs[1] == (0, 0)
    if strided and to_weight and x.device.type == "cpu":
        # oneDNN's writes behind its memory where it gathers few channels.
        down, across = pairs[0]
        gathered = x[:, :, ::down, ::across]
        grad_weight = convolution_backward(
            grad, gathered, weight, 1, 0, 1, groups, to_x=False, to_weight=True
        )[1]
        options = (stride, padding, dilation, groups)
        return convolution_backward(grad, x, weight, *options, to_x, False)[0], grad_weight
    if not to_x and not to_weight:
        return empty, empty
    if is_safe(x.shape, weight.shape, *pairs):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *pairs, False, [0, 0], groups, [to_x, to_weight, False]
        )
        return grad_x if to_x else empty, grad_weight if to_weight else empty
    dtype = compute_dtype(x.dtype)
    wide, filters = _in_groups(x.to(dtype), weight.to(dtype), groups)
    given = grad.to(dtype).unflatten(1, (groups, -1))
    grad_x, grad_filters = torch.zeros_like(wide), torch.zeros_like(filters)
    _, runs = _runs(x.shape, weight.shape, *pairs)
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            beside = given
            for rows, columns, lines, pixels in _inside(runs, row, column):
                seen, passed = wide[..., lines, pixels], given[..., rows, columns]
                tap = filters[..., row, column]
                grad_x[..., lines, pixels] += torch.einsum("ngkhw,gkc->ngchw", passed, tap)
                grad_filters[..., row, column] += torch.einsum("ngkhw,ngchw->gkc", passed, seen)
                beside = given.clone()
                beside[..., rows, columns] = 0
            grad_filters[..., row, column] += (0 * beside).sum((0, 3, 4))[..., None]
    return (
        grad_x.flatten(1, 2).to(x.dtype) if to_x else empty,
        grad_filters.flatten(0, 1).to(weight.dtype) if to_weight else empty,
    )


def is_safe(
    shape: Sequence[int],
    filters: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether PyTorch computes a convolution without harm.

    oneDNN's for AVX2 ends the process where no column of the result has a tap inside the map, and
    the others overflow where a number needs 32 bits (bench/NOTES.md, 2026-11-28).

    Of a graph that is recorded True: it is for sizes that are not known, and has one form.

    Args:
        shape, filters: of the map and the weight.
        stride, padding, dilation: (rows, columns).
    """
    _, _, height, width = shape
    _, _, down, across = filters
    if torch.compiler.is_compiling() or not type(height) is type(width) is int:
        return True
    return _is_safe((height, width), (down, across), *map(tuple, (stride, padding, dilation)))


@lru_cache(maxsize=4096)
def _is_safe(*pairs: tuple[int, int]) -> bool:
    for size, kernel, stride, padding, dilation in zip(*pairs, strict=True):
        if max(size + 2 * padding, stride, dilation) >= _LARGE:
            return False
        if not any(_run(tap, size, kernel, stride, padding, dilation) for tap in range(kernel)):
            return False
    return True


def _run(tap: int, size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Run:
    offset = tap * dilation - padding
    last = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride
    low, high = max(0, -(offset // stride)), min(last, (size - 1 - offset) // stride)
    if low > high:
        return None
    first, end = low * stride + offset, high * stride + offset + 1
    return slice(low, high + 1), slice(first, end, min(stride, size))


def _runs(
    shape: Sequence[int], filters: Sequence[int], *options: Sequence[int]
) -> tuple[list[int], list[list[_Run]]]:
    """The size of a result, and for either axis and each tap its outputs and their pixels."""
    size, runs = [], []
    for length, kernel, stride, padding, dilation in zip(
        shape[2:], filters[2:], *options, strict=True
    ):
        rest = stride, padding, dilation
        size.append((length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        runs.append([_run(tap, length, kernel, *rest) for tap in range(kernel)])
    return size, runs


def _inside(
    runs: Sequence[Sequence[_Run]], row: int, column: int
) -> list[tuple[slice, slice, slice, slice]]:
    """(rows, columns) of the outputs for which a tap is inside the map, (rows, columns) there."""
    down, across = runs[0][row], runs[1][column]
    return [] if down is None or across is None else [(down[0], across[0], down[1], across[1])]


def _in_groups(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[N, C, H, W], [K, C / groups, R, S] -> [N, groups, C / groups, H, W], [groups, K / groups,
    C / groups, R, S]."""
    return x.unflatten(1, (groups, -1)), weight.unflatten(0, (groups, -1))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), scale and shift per output channel."""
    dtype = compute_dtype(x.dtype)
    y = convolution(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    y = y * _per_channel(scale, dtype) + _per_channel(shift, dtype)
    if residual is not None:
        y = y + residual.to(dtype)
    if act == "relu":
        y = torch.relu(y)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def conv_bn_act_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    act: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `conv_bn_act` to (x, weight, scale, shift, residual), in `compute_dtype`.

    With g = grad, or 0 where y <= 0: d residual = g, d shift = sum g, d scale = sum g * conv(x),
    and x and weight get the convolution's gradients of g * scale.
    """
    dtype = compute_dtype(x.dtype)
    x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
    if act == "relu":
        grad = torch.where(y <= 0, 0.0, grad)
    options = (stride, padding, dilation, groups)
    conv = convolution(x, weight, None, *options)
    scaled = grad * _per_channel(scale, dtype)
    grad_x, grad_weight = convolution_backward(scaled, x, weight, *options)
    return grad_x, grad_weight, (grad * conv).sum((0, 2, 3)), grad.sum((0, 2, 3)), grad


def fold_filters(weights: Sequence[Tensor], scale: Tensor, results: Sequence[Tensor]) -> None:
    """results_l = scale_l * weights_l per output channel; scale [sum K_l] has one layer behind
    another. The product is made in the wider dtype of both factors and rounded to the results'."""
    scales = scale.split([w.shape[0] for w in weights])
    for weight, factor, result in zip(weights, scales, results, strict=True):
        torch.mul(weight, factor[:, None, None, None], out=result)


def batch_stats(
    x: Tensor,
    eps: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, 1 / sqrt(variance + eps)) of each channel of x [N, C, H, W], in
    `compute_dtype`; mean and variance 0 without values. Running statistics are updated where they
    are given, as by `update_running`."""
    x = x.to(compute_dtype(x.dtype))
    if x.numel():
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        mean, variance = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        running = (running_mean, running_var, num_batches_tracked)
        update_running(*running, momentum, mean, variance, count)
    return mean, variance, torch.rsqrt(variance + eps)


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
) -> None:
    """Running statistics as nn.BatchNorm2d keeps them, in place, from those of `count` values.

        running = (1 - momentum) * running + momentum * (mean, or variance * count / (count - 1))

    Momentum None is 1 / batches, with the batch at hand, or 0 where these are not counted.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    if momentum is None:
        momentum = 0.0
    unbiased = variance * (count / max(count - 1, 1))
    for kept, now in ((running_mean, mean), (running_var, unbiased)):
        kept.mul_(1 - momentum).add_(now.to(kept.dtype), alpha=momentum)


def bn_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Tensor:
    """y = act((x - mean) * (rstd * weight) + bias + residual), vectors per channel."""
    y = _before_act(x, mean, rstd, weight, bias)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = ACTIVATIONS[act](y)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def bn_act_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """(sum of g, sum of g * xhat) over each channel, the gradients of `bn_act` to bias and weight.

    g is grad times the activation's derivative: at out, the result of `bn_act`, where it is given,
    else at what x gives again. xhat = (x - mean) * rstd.
    """
    g = _before_act_grad(grad, x, mean, rstd, weight, bias, out, act)
    return g.sum((0, 2, 3)), (g * _normalised(x, mean, rstd)).sum((0, 2, 3))


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    act: str | None,
    to_residual: bool,
    count: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of `bn_act` to x and, if `to_residual`, to residual (else empty).

    With g and xhat as in `bn_act_reduce` and its sums divided by the number of values,
        dx = rstd * weight * (g - mean_grad - xhat * mean_grad_xhat), d residual = g,
    where mean and rstd are those of x; where they are constants both means are None, for zero.
    Both are divided by `count`, so that sums may be given in their place.
    """
    g = _before_act_grad(grad, x, mean, rstd, weight, bias, out, act)
    dx = g
    if mean_grad is not None and mean_grad_xhat is not None:
        dx = dx - _per_channel(mean_grad / count, g.dtype)
        dx = dx - _normalised(x, mean, rstd) * _per_channel(mean_grad_xhat / count, g.dtype)
    dx = dx * _per_channel(rstd * weight, g.dtype)
    residual = g if to_residual else g.new_empty(0)
    return _stored(dx, x.dtype), _stored(residual, x.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(rstd, dtype)


def _before_act(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    scale = rstd * weight
    # An infinite factor is NaN, as in PyTorch's x * scale + (bias - mean * scale): ReLU6 makes a
    # healthy 6 of infinity.
    scale = scale + (scale - scale)
    y = (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(scale, dtype)
    return y + _per_channel(bias, dtype)


def _before_act_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    act: str | None,
) -> Tensor:
    grad = grad.to(compute_dtype(x.dtype))
    if act is None:
        return grad
    at = _before_act(x, mean, rstd, weight, bias) if out is None else out
    # At NaN no comparison takes the gradient away.
    if act == "relu":
        return torch.where(at <= 0, 0.0, grad)
    if act == "relu6":
        return torch.where((at <= 0) | (at >= 6), 0.0, grad)
    return grad * torch.where(at < -3, 0.0, torch.where(at > 3, 1.0, at / 3 + 0.5))


ACTIVATIONS = {"relu": torch.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: lambda x: x}


def branch_padding(weight: Tensor, dilation: int) -> int:
    """Padding that keeps the size: the dilation for a 3x3 kernel, 0 for a 1x1 kernel."""
    return dilation * (weight.shape[-1] // 2)


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """y = concat over branches b of relu(scale_b * conv(x, weight_b, dilation_b) + shift_b)."""
    branches = [
        conv_bn_act(x, w, a, b, padding=branch_padding(w, d), dilation=d)
        for w, a, b, d in zip(weights, scales, shifts, dilations, strict=True)
    ]
    return torch.cat(branches, 1).contiguous(memory_format=torch.channels_last)


def aspp_branches_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    dilations: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `aspp_branches` to (x, weights, scales, shifts), in `compute_dtype`."""
    grad_x = torch.zeros_like(x, dtype=compute_dtype(x.dtype))
    per_branch = []
    first = 0
    for weight, scale, dilation in zip(weights, scales, dilations, strict=True):
        branch = slice(first, first + weight.shape[0])
        first += weight.shape[0]
        padding = branch_padding(weight, dilation)
        to_x, *rest, _ = conv_bn_act_backward(
            grad[:, branch], y[:, branch], x, weight, scale, 1, padding, dilation, 1, "relu"
        )
        grad_x += to_x
        per_branch.append(rest)
    grad_weights, grad_scales, grad_shifts = (list(g) for g in zip(*per_branch, strict=True))
    return grad_x, grad_weights, grad_scales, grad_shifts


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """PyTorch's convolution without bias."""
    return convolution(x, weight, None, stride, padding, dilation, groups)


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
    """Gradients of `conv2d` to x and weight; empty where one is not asked for."""
    options = (stride, padding, dilation, groups)
    return convolution_backward(grad, x, weight, *options, to_x, to_weight)


def aspp_convs(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, variance): y = concat over branches b of conv(x, weight_b, dilation_b), and, if
    `stats`, the `batch_stats` of y (else empty)."""
    branches = [
        convolution(x, w, None, 1, branch_padding(w, d), d)
        for w, d in zip(weights, dilations, strict=True)
    ]
    y = torch.cat(branches, 1).contiguous(memory_format=torch.channels_last)
    empty = y.new_empty(0, dtype=compute_dtype(y.dtype))
    return (y, *(batch_stats(y)[:2] if stats else (empty, empty.clone())))


def aspp_convs_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `aspp_convs` to x (empty if not `to_x`) and the weights (none if not asked)."""
    grad_x = None
    grad_weights = []
    first = 0
    for weight, dilation in zip(weights, dilations, strict=True):
        branch = grad[:, first : first + weight.shape[0]]
        first += weight.shape[0]
        pad = branch_padding(weight, dilation)
        one = conv2d_backward(
            branch, x, weight, (1, 1), (pad, pad), (dilation, dilation), 1, to_x, to_weights
        )
        if to_x:
            grad_x = one[0] if grad_x is None else grad_x.add_(one[0])
        if to_weights:
            grad_weights.append(one[1])
    return grad.new_empty(0) if grad_x is None else grad_x, grad_weights


def aspp_project(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """y = relu(scale * (W_branches . branches + W_pooled . pooled) + shift).

    `weight` is split along its input channels; the pooled vector, constant over the map, enters as
    a bias per image, which is what projecting its upsampling within a concat gives.
    """
    dtype = compute_dtype(branches.dtype)
    to_branches, to_pooled = _split_projection(weight.to(dtype), branches.shape[1])
    y = F.conv2d(branches.to(dtype), to_branches)
    y = y + (pooled.to(dtype) @ to_pooled.t())[:, :, None, None]
    y = torch.relu(y * _per_channel(scale, dtype) + _per_channel(shift, dtype))
    return y.to(branches.dtype).contiguous(memory_format=torch.channels_last)


def aspp_project_backward(
    grad: Tensor, y: Tensor, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `aspp_project` to (branches, pooled, weight, scale, shift)."""
    dtype = compute_dtype(branches.dtype)
    to_branches, to_pooled = _split_projection(weight.to(dtype), branches.shape[1])
    pooled = pooled.to(dtype)
    grad_branches, grad_w_branches, grad_scale, grad_shift, grad = conv_bn_act_backward(
        grad, y, branches, to_branches, scale, 1, 0, 1, 1, "relu"
    )
    grad_scale = grad_scale + (grad.sum((2, 3)) * (pooled @ to_pooled.t())).sum(0)
    grad_bias = (grad * _per_channel(scale, dtype)).sum((2, 3))
    grad_w_pooled = (grad_bias.t() @ pooled)[:, :, None, None]
    grad_weight = torch.cat([grad_w_branches, grad_w_pooled], 1)
    return grad_branches, grad_bias @ to_pooled, grad_weight, grad_scale, grad_shift


def upsample_argmax(
    logits: Tensor, size: Sequence[int], align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    """(labels, prob): argmax over classes of the upsampled logits and its softmax probability.

    prob is empty where it is not asked for.
    """
    full = upsample(logits, size, align_corners)
    labels = full.argmax(1)
    if return_prob:
        # exp(max - logsumexp) needs no full-resolution softmax.
        prob = torch.exp(full.gather(1, labels[:, None])[:, 0] - full.logsumexp(1))
    else:
        prob = full.new_empty(0)
    return labels.to(label_dtype(logits.shape[1])), prob


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    """Cross entropy of the upsampled logits, as torch.nn.functional.cross_entropy defines it."""
    full = upsample(logits, target.shape[-2:], align_corners)
    target = target.to(torch.int64)
    check_labels(target, logits.shape[1], ignore_index)
    return F.cross_entropy(
        full,
        target,
        None if weight is None else weight.to(full.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def upsample_cross_entropy_with_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the loss to the logits) for reduction "mean" or "sum".

    The gradient is in `compute_dtype`: a mean over many pixels makes it too small for fp16, and the
    factor that lifts it again (a loss scale) only comes with the backward pass.
    """
    options = (weight, ignore_index, label_smoothing, reduction, align_corners)
    logits = logits.to(compute_dtype(logits.dtype))
    loss = upsample_cross_entropy(logits, target, *options)
    grad = upsample_cross_entropy_backward(torch.ones_like(loss), logits, target, *options)
    return loss, grad


def upsample_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    """Gradient of `upsample_cross_entropy` to the logits, times `grad`.

    With p = softmax of the upsampled logits, class weights w, C classes, smoothing e and label y,
    the loss of a pixel has the gradient
        (1 - e) w_y (p - onehot(y)) + e / C (p sum(w) - w),
    divided for reduction "mean" by the sum of w_y over the pixels that are not ignored; bilinear
    interpolation's transpose carries it to the low resolution. Where all pixels are ignored the
    gradient is 0, although the mean is nan.
    """
    size, classes = target.shape[-2:], logits.shape[1]
    full = upsample(logits, size, align_corners)
    w = full.new_ones(classes) if weight is None else weight.to(full.dtype)
    target = target.to(torch.int64)
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    w_y = torch.where(valid, w[y], 0.0)
    pixel = grad.to(full.dtype).expand(target.shape)
    if reduction == "mean":
        pixel = pixel / w_y.sum()
    pixel = torch.where(valid, pixel, 0.0)
    p = full.softmax(1)
    hard = (w_y * pixel)[:, None]
    soft = (pixel * (label_smoothing / classes))[:, None]
    g = p * ((1 - label_smoothing) * hard + soft * w.sum()) - soft * w[:, None, None]
    g.scatter_add_(1, y[:, None], -(1 - label_smoothing) * hard)
    g = torch.ops.aten.upsample_bilinear2d_backward(
        g, list(size), list(logits.shape), align_corners, None, None
    )
    return g.to(logits.dtype)


def upsample_confusion(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """Counts [C, C] of (target, argmax of upsampled logits) over pixels that are not ignored."""
    classes = logits.shape[1]
    # In uint8 a comparison with an ignore_index outside 0..255 would wrap around.
    target = target.to(torch.int64)
    check_labels(target, classes, ignore_index)
    labels = upsample(logits, target.shape[-2:], align_corners).argmax(1)
    valid = target != ignore_index
    pairs = target[valid] * classes + labels[valid]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def upsample_softmax_add(
    accumulator: Tensor, logits: Tensor, flip: bool, align_corners: bool
) -> None:
    """accumulator += softmax of the upsampled logits, mirrored left-right if `flip`."""
    prob = upsample(logits, accumulator.shape[-2:], align_corners).softmax(1)
    accumulator += prob.flip(-1) if flip else prob


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise for a label that is neither in [0, num_classes) nor ignore_index.

    Raises:
        ValueError: names the first such label, where it is, and how many there are.
    """
    target = target.to(torch.int64)
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    count = int(bad.sum())
    if count:
        n, y, x = bad.nonzero()[0].tolist()
        raise ValueError(
            f"label {int(target[n, y, x])} at (image {n}, row {y}, column {x}) is outside "
            f"[0, {num_classes}) and is not ignore_index={ignore_index}; {count} in all. "
            "Map the labels to class indices, or set ignore_index"
        )


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None, None]


def _split_projection(weight: Tensor, branch_channels: int) -> tuple[Tensor, Tensor]:
    return weight[:, :branch_channels], weight[:, branch_channels:, 0, 0]
