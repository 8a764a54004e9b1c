"""All atrous branches of the ASPP in one op, written into the slices of one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import _aspp_cuda, _cpu_conv
from ._aspp_triton import kernel as triton_kernel
from ._registry import (
    FLOAT_DTYPES,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    define,
    differentiable,
    needs_grad,
)

OP = "aspp_branches"


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """y = concat over branches b of relu(scale_b * conv(x, weight_b, dilation_b) + shift_b).

    Every branch keeps the size of the map: a 3x3 branch is padded by its dilation, a 1x1 branch not
    at all (its dilation is ignored). With batch norm folded, scale = gamma / sqrt(var + eps) and
    shift = beta - mean * scale.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], the dtype of x.
        scales, shifts: for each branch [K_b], fp32 (fp64 for fp64 x).
        dilations: for each branch an int of at least 1, also larger than the map.

    Returns:
        [N, sum K_b, H, W], the dtype of x, channels_last; accumulated in fp32 (fp64 for fp64) and
        rounded once. Differentiable to every tensor. Under autocast x and the weights are
        cast, scales and shifts are not.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or counts that do not fit.

    What is not finite in an input stays so in the result, with one exception: backends "triton" and
    "cuda" do not multiply padding, so that a weight of nan shows only where its tap is inside the
    map.

    Source: arXiv 1706.05587, section 3.3 (atrous spatial pyramid pooling).
    """
    x, *weights = autocast(x, *weights)
    _validate(x, weights, scales, shifts, dilations)
    if needs_grad(x, *weights, *scales, *shifts):
        return _AsppBranches.apply(x, tuple(dilations), *weights, *scales, *shifts)
    return torch.ops.deeplab_fast.aspp_branches(
        x, list(weights), list(scales), list(shifts), list(dilations)
    )


def describe(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> backends.OpDesc:
    """What a choice of backend rests on, for the arguments of `aspp_branches`."""
    _validate(x, weights, scales, shifts, dilations)
    return _describe(x, weights, dilations)


class _AsppBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dilations: tuple[int, ...], *tensors: Tensor) -> Tensor:
        weights, scales, shifts = _thirds(tensors)
        y = torch.ops.deeplab_fast.aspp_branches(x, weights, scales, shifts, list(dilations))
        ctx.save_for_backward(y, x, *tensors)
        ctx.dilations = dilations
        ctx.dtypes = [t.dtype for t in tensors]
        return y

    @staticmethod
    @differentiable(lambda ctx: _again(*ctx.saved_tensors[1:], dilations=ctx.dilations))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, *tensors = ctx.saved_tensors
        weights, scales, _ = _thirds(tensors)
        grad_x, *grads = torch.ops.deeplab_fast.aspp_branches_backward(
            grad, y, x, weights, scales, list(ctx.dilations)
        )
        cast = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return grad_x.to(x.dtype), None, *cast


def _again(x: Tensor, *tensors: Tensor, dilations: tuple[int, ...]) -> Any:
    def run(x: Tensor, dilations: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return reference.aspp_branches(x, *_thirds(tensors), dilations)

    return run, (x, dilations, *tensors)


def _thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


def _validate(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> None:
    check_map(OP, "x", x)
    counts = [len(weights), len(scales), len(shifts), len(dilations)]
    if min(counts) < 1 or len(set(counts)) > 1:
        raise ValueError(
            f"{OP}: weights, scales, shifts and dilations must have one entry for each of at least "
            f"one branch, got {counts}"
        )
    for b, (weight, scale, shift, dilation) in enumerate(
        zip(weights, scales, shifts, dilations, strict=True)
    ):
        check_map(OP, f"weights[{b}]", weight)
        check_dtype(OP, f"weights[{b}]", weight, (x.dtype,))
        if weight.shape[1] != x.shape[1] or tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
            raise ValueError(
                f"{OP}: weights[{b}] has shape {list(weight.shape)}, expected "
                f"[K, {x.shape[1]}, 1, 1] or [K, {x.shape[1]}, 3, 3]"
            )
        for name, vector in ((f"scales[{b}]", scale), (f"shifts[{b}]", shift)):
            check_shape(OP, name, vector, weight.shape[:1], "one value for each output channel")
            check_dtype(OP, name, vector, FLOAT_DTYPES)
        check_device(OP, x, **{f"weights[{b}]": weight, f"scales[{b}]": scale})
        check_device(OP, x, **{f"shifts[{b}]": shift})
        if dilation < 1:
            raise ValueError(f"{OP}: dilations[{b}] must be at least 1, got {dilation}")


def _describe(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> backends.OpDesc:
    kernels = tuple(tuple(w.shape) for w in weights)
    return backends.OpDesc.of(OP, x, weights=kernels, dilations=tuple(dilations))


def _run(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    dilations: list[int],
) -> Tensor:
    desc = _describe(x, weights, dilations)
    return backends.run(desc, x, weights, scales, shifts, dilations)


def _fake(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    dilations: list[int],
) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, sum(w.shape[0] for w in weights), height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _run_backward(*args: Any) -> list[Tensor]:
    grad_x, *lists = reference.aspp_branches_backward(*args)
    return [grad_x.contiguous(), *(g.contiguous() for grads in lists for g in grads)]


def _fake_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    dilations: list[int],
) -> list[Tensor]:
    dtype = reference.compute_dtype(x.dtype)
    shapes = [t.shape for t in (x, *weights, *scales, *scales)]
    return [x.new_empty(shape, dtype=dtype) for shape in shapes]


define(
    "aspp_branches(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, int[] dilations) "
    "-> Tensor",
    _run,
    _fake,
)
define(
    "aspp_branches_backward(Tensor grad, Tensor y, Tensor x, Tensor[] weights, Tensor[] scales, "
    "int[] dilations) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
backends.register(OP, "reference", reference.aspp_branches)
# Behind PyTorch: weights given to a call are prepared for that call alone, which took longer than
# it saved (suite quick, aspp_branches/os16-33x33-b1: 0.7x PyTorch's). Models prepare theirs once.
backends.register(OP, "cpu", _cpu_conv.aspp_branches, _cpu_conv.reasons, priority=-1)
backends.register(
    OP, "triton", triton_kernel("aspp", "aspp_branches"), triton_kernel("conv", "product_reasons")
)
backends.register(OP, "cuda", _aspp_cuda.aspp_branches, _aspp_cuda.reasons)
