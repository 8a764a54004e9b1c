"""The convolutions of all ASPP branches in training: raw outputs and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import Choices
from ..dispatch.declare import TRAINING, Function, Op, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Run, Size, Step
from . import _aspp, _cpu_conv
from ._composed import EPS
from .common import Again, Context, autocast, check_map, differentiable, needs_grad, triton_kernel
from .conv2d import weight_format

OP = "aspp_convs"
BACKWARD = "aspp_convs_backward"


def aspp_convs(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], *, stats: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = concat over branches b of conv(x, weight_b, dilation_b), and the statistics of y.

    Every branch keeps the size of the map: a 3x3 branch is padded by its dilation, a 1x1 branch not
    at all (its dilation is ignored).

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], the dtype of x.
        dilations: for each branch an int of at least 1, also larger than the map.
        stats: whether mean and variance are asked for.

    Returns:
        y [N, sum K_b, H, W], the dtype of x, channels_last, accumulated in fp32 (fp64 for fp64) and
        rounded once; mean and biased variance of each channel of y, [sum K_b], fp32 (fp64 for
        fp64), not differentiable, or None. The gradient to x is the sum
        over the branches, the gradient to a weight's tap a sum over the pixels for which the tap
        lies inside the map. Under autocast x and the weights are cast.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or counts that do not fit.

    What is not finite in an input stays so in the results, with one exception: backend "triton"
    does not multiply padding, so that a weight or gradient of nan shows only where a tap is inside
    the map.

    Source: arXiv 1706.05587, section 3.3 (atrous spatial pyramid pooling).
    """
    x, *weights = autocast(x, *weights)
    _validate(x, weights, dilations)
    if needs_grad(x, *weights):
        y, mean, variance = _AsppConvs.apply(x, tuple(dilations), stats, *weights)
    else:
        y, mean, variance = torch.ops.deeplab_fast.aspp_convs(
            x, list(weights), list(dilations), stats
        )
    return (y, mean, variance) if stats else (y, None, None)


def describe(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], *, stats: bool = False
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `aspp_convs`."""
    _validate(x, weights, dilations)
    return _describe(OP, x, weights, dilations)


def describe_backward(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> OpDesc:
    """The same for its backward pass."""
    _validate(x, weights, dilations)
    return _describe(BACKWARD, x, weights, dilations)


class _Context(Context, Protocol):
    dilations: tuple[int, ...]


class _AsppConvs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, dilations: tuple[int, ...], stats: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, *weights)
        ctx.dilations = dilations
        y, mean, variance = torch.ops.deeplab_fast.aspp_convs(
            x, list(weights), list(dilations), stats
        )
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @differentiable(lambda ctx: _again(*ctx.saved_tensors, dilations=ctx.dilations))
    def backward(ctx: _Context, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        to_x, to_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        grad_x, grad_weights = torch.ops.deeplab_fast.aspp_convs_backward(
            grad, x, weights, list(ctx.dilations), to_x, to_weights
        )
        if not to_weights:
            grad_weights = [None] * len(weights)
        return grad_x if to_x else None, None, None, *grad_weights


def _again(x: Tensor, *weights: Tensor, dilations: tuple[int, ...]) -> Again:
    def run(x: Tensor, dilations: tuple[int, ...], stats: bool, *weights: Tensor) -> Tensor:
        return reference.aspp_convs(x, weights, dilations, stats)[0]

    return run, (x, dilations, False, *weights)


def _validate(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> None:
    check_map(OP, "x", x)
    if not weights or len(weights) != len(dilations):
        raise ValueError(
            f"{OP}: weights and dilations must have one entry for each of at least one branch, got "
            f"{len(weights)} and {len(dilations)}"
        )
    for b, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        _aspp.check_branch(OP, b, x, weight, dilation)


def _describe(op: str, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> OpDesc:
    kernels = tuple(tuple(w.shape) for w in weights)
    return OpDesc.of(op, x, weights=kernels, dilations=tuple(dilations))


def _chosen(op: str, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> Run:
    facts = (*[w.shape for w in weights], *dilations)
    return Choices().of(op, x, facts, lambda: _describe(op, x, weights, dilations))


def _run(
    x: Tensor, weights: list[Tensor], dilations: list[int], stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    run = _chosen(OP, x, weights, dilations)
    return run(x, weights, dilations, stats)


def _fake(
    x: Tensor, weights: list[Tensor], dilations: list[int], stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, _, height, width = x.shape
    channels = sum(w.shape[0] for w in weights)
    dtype = reference.compute_dtype(x.dtype)
    vector = channels if stats else 0
    return (
        torch.empty(
            (n, channels, height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        ),
        x.new_empty(vector, dtype=dtype),
        x.new_empty(vector, dtype=dtype),
    )


def _run_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    run = _chosen(BACKWARD, x, weights, dilations)
    grad_x, grad_weights = run(grad, x, weights, dilations, to_x, to_weights)
    if to_x:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, [
        g.contiguous(memory_format=weight_format(w))
        for g, w in zip(grad_weights, weights, strict=to_weights)
    ]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if to_x else x.new_empty(0)
    grads = [torch.empty_like(w, memory_format=weight_format(w)) for w in weights]
    return grad_x, grads if to_weights else []


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _aspp.example(make, s)
    desc = describe(x, weights, dilations)
    return [
        Step(form, s, (x, weights, dilations, stats), (VALUES,) * 3, desc)
        for stats in (True, False)
    ]


def _example_backward(make: Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _aspp.example(make, s)
    grad = make.map(s.n, s.filters * len(weights), s.h, s.w)
    args = (grad, x, weights, dilations, True, True)
    desc = describe_backward(x, weights, dilations)
    return [Step(form, s, args, (VALUES,) * (1 + len(weights)), desc)]


def _pytorch(step: Step) -> Forms:
    x, weights, dilations, stats = step.args

    def composed() -> tuple[Tensor, ...]:
        found = [_aspp.convolution(x, w, d) for w, d in zip(weights, dilations, strict=True)]
        y = torch.cat(found, 1)
        if not stats:
            return y, y.new_empty(0), y.new_empty(0)
        if x.is_cuda:
            mean, rstd = torch.batch_norm_stats(y, EPS)
            return y, mean, rstd**-2
        return (y, *torch.var_mean(y, (0, 2, 3), correction=0)[::-1])

    return {"convolutions, cat": composed}


def _pytorch_backward(step: Step) -> Forms:
    return {"convolution_backward, sums": lambda: reference.aspp_convs_backward(*step.args)}


_product_reasons = triton_kernel("conv", "product_reasons")
declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "aspp_convs(Tensor x, Tensor[] weights, int[] dilations, bool stats) "
                "-> (Tensor, Tensor, Tensor)",
                _run,
                _fake,
            ),
        ),
        implementations=(
            on("reference", reference.aspp_convs),
            on("cpu", _cpu_conv.aspp_convs, _cpu_conv.reasons),
            on("triton", triton_kernel("aspp_training", OP), _product_reasons),
        ),
        use=TRAINING,
        examples=Examples(("plain",), _example, _pytorch, _aspp.SIZES, _aspp.works),
        sources="training",
        is_product=True,
    )
)
declare(
    Op(
        BACKWARD,
        describe_backward,
        functions=(
            Function(
                "aspp_convs_backward(Tensor grad, Tensor x, Tensor[] weights, int[] dilations, "
                "bool to_x, bool to_weights) -> (Tensor, Tensor[])",
                _run_backward,
                _fake_backward,
            ),
        ),
        implementations=(
            on("reference", reference.aspp_convs_backward),
            on("cpu", _cpu_conv.aspp_convs_backward, _cpu_conv.reasons),
            on("triton", triton_kernel("aspp_training", BACKWARD), _product_reasons),
        ),
        use=TRAINING,
        examples=Examples(
            ("plain",), _example_backward, _pytorch_backward, _aspp.SIZES, _aspp.works
        ),
        sources="training",
        is_product=True,
    )
)
