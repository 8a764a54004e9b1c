"""All atrous branches of the ASPP in one op, written into the slices of one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, Tuned, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Size, Step
from . import _aspp, _cpu_conv, aspp_cuda
from ._composed import fused_layer, norm_of
from .common import (
    FLOAT_DTYPES,
    Again,
    Context,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    differentiable,
    needs_grad,
    or_ones,
    scaled,
    triton_kernel,
)

OP = "aspp_branches"


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
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
        scales, shifts: for each branch [K_b], fp32 (fp64 for fp64 x); scales None for one, as of
            filters that have them in them.
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
    scales = [] if scales is None else list(scales)
    if needs_grad(x, *weights, *scales, *shifts):
        scales = _or_ones(scales, x, weights)
        return _AsppBranches.apply(x, tuple(dilations), *weights, *scales, *shifts)
    return torch.ops.deeplab_fast.aspp_branches(
        x, list(weights), scales, list(shifts), list(dilations)
    )


def describe(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `aspp_branches`."""
    _validate(x, weights, scales, shifts, dilations)
    return _describe(x, weights, dilations)


class _Context(Context, Protocol):
    dilations: tuple[int, ...]
    dtypes: list[torch.dtype]


class _AsppBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, dilations: tuple[int, ...], *tensors: Tensor) -> Tensor:
        weights, scales, shifts = _thirds(tensors)
        y = torch.ops.deeplab_fast.aspp_branches(x, weights, scales, shifts, list(dilations))
        ctx.save_for_backward(y, x, *tensors)
        ctx.dilations = dilations
        ctx.dtypes = [t.dtype for t in tensors]
        return y

    @staticmethod
    @differentiable(lambda ctx: _again(*ctx.saved_tensors[1:], dilations=ctx.dilations))
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, *tensors = ctx.saved_tensors
        weights, scales, _ = _thirds(tensors)
        grad_x, *grads = torch.ops.deeplab_fast.aspp_branches_backward(
            grad, y, x, weights, scales, list(ctx.dilations)
        )
        cast = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return grad_x.to(x.dtype), None, *cast


def _again(x: Tensor, *tensors: Tensor, dilations: tuple[int, ...]) -> Again:
    def run(x: Tensor, dilations: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return reference.aspp_branches(x, *_thirds(tensors), dilations)

    return run, (x, dilations, *tensors)


def _thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


def _or_ones(scales: list[Tensor], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return scales or [or_ones(None, x, weight) for weight in weights]


def _validate(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> None:
    check_map(OP, "x", x)
    factors: Sequence[Tensor | None] = [None] * len(weights) if scales is None else scales
    counts = [len(weights), len(factors), len(shifts), len(dilations)]
    if min(counts) < 1 or len(set(counts)) > 1:
        raise ValueError(
            f"{OP}: weights, scales, shifts and dilations must have one entry for each of at least "
            f"one branch, got {counts}"
        )
    for b, (weight, scale, shift, dilation) in enumerate(
        zip(weights, factors, shifts, dilations, strict=True)
    ):
        _aspp.check_branch(OP, b, x, weight, dilation)
        for name, vector in ((f"scales[{b}]", scale), (f"shifts[{b}]", shift)):
            if vector is None:
                continue
            check_shape(OP, name, vector, weight.shape[:1], "one value for each output channel")
            check_dtype(OP, name, vector, FLOAT_DTYPES)
            check_device(OP, x, **{name: vector})


def _describe(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> OpDesc:
    kernels = tuple(tuple(w.shape) for w in weights)
    return OpDesc.of(OP, x, weights=kernels, dilations=tuple(dilations))


def _run(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    dilations: list[int],
) -> Tensor:
    desc = _describe(x, weights, dilations)
    return run(desc, x, weights, _or_ones(scales, x, weights), shifts, dilations)


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


def _decomposed(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    dilations: list[int],
) -> Tensor:
    factors: Sequence[Tensor | None] = scales or [None] * len(weights)
    maps = [
        torch.relu(
            F.conv2d(
                x,
                scaled(weight, scale),
                shift.to(x.dtype),
                padding=reference.branch_padding(weight, dilation),
                dilation=dilation,
            )
        )
        for weight, scale, shift, dilation in zip(weights, factors, shifts, dilations, strict=True)
    ]
    return torch.cat(maps, 1).contiguous(memory_format=torch.channels_last)


def _run_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    dilations: list[int],
) -> list[Tensor]:
    grad_x, *lists = reference.aspp_branches_backward(grad, y, x, weights, scales, dilations)
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


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _aspp.example(make, s)
    scales = [make.vector(s.filters) for _ in weights]
    shifts = [make.vector(s.filters, -0.5, 0.5) for _ in weights]
    args = (x, weights, scales, shifts, dilations)
    return [Step(form, s, args, (VALUES,), describe(*args))]


def _pytorch(step: Step) -> Forms:
    x, weights, scales, shifts, dilations = step.args
    layers = list(zip(weights, scales, shifts, dilations, strict=True))

    def composed() -> Tensor:
        found = [
            norm_of(_aspp.convolution(x, weight, d), scale, shift).relu_()
            for weight, scale, shift, d in layers
        ]
        return torch.cat(found, 1)

    forms: Forms = {"convolutions, batch norms, cat": composed}
    if x.is_cuda:
        fused = [
            fused_layer(w, scale, shift, padding=reference.branch_padding(w, d), dilation=d)
            for w, scale, shift, d in layers
        ]
        forms["cuDNN fused, cat"] = lambda: torch.cat([run(x) for run in fused], 1)
    return forms


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "aspp_branches(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, "
                "int[] dilations) -> Tensor",
                _run,
                _fake,
                _decomposed,
            ),
            Function(
                "aspp_branches_backward(Tensor grad, Tensor y, Tensor x, Tensor[] weights, "
                "Tensor[] scales, int[] dilations) -> Tensor[]",
                _run_backward,
                _fake_backward,
            ),
        ),
        implementations=(
            on("reference", reference.aspp_branches),
            # Behind PyTorch: weights given to a call are prepared for that call alone, which took
            # longer than it saved (suite quick, aspp_branches/os16-33x33-b1: 0.7x PyTorch's).
            # Models prepare theirs once.
            on("cpu", _cpu_conv.aspp_branches, _cpu_conv.reasons, priority=-1),
            on("triton", triton_kernel("aspp", OP), triton_kernel("conv", "product_reasons")),
            on("cuda", aspp_cuda.aspp_branches, aspp_cuda.reasons),
        ),
        use=INFERENCE,
        examples=Examples(("plain",), _example, _pytorch, _aspp.SIZES, _aspp.works),
        sources="branches",
        is_product=True,
        tuned=(Tuned(OP, OP, 10),),
    )
)
