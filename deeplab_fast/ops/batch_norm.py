"""Batch norm in training: statistics, normalise + residual + activation, and their backward passes.

Four ops, each one pass over the map. Nothing that can be computed again from the convolution's
output is kept for the backward pass; `deeplab_fast.program.training` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import _cpu_batch_norm
from ._aspp_triton import kernel as triton_kernel
from ._registry import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    define,
    needs_grad,
)

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over images, rows and columns.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides; N may be 0, which gives zeros.

    Returns:
        mean [C], variance [C], fp32 (fp64 for fp64 x), from (count, mean, M2) of tiles of the map
        that are combined in a fixed order: the same bits for any number of threads. Not
        differentiable: `bn_act_backward` has the whole gradient of a batch norm.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.

    Source: arXiv 1502.03167, algorithm 1; Chan, Golub and LeVeque (1983) for the combination.
    """
    check_map("batch_stats", "x", x)
    return torch.ops.deeplab_fast.batch_stats(x.detach())


def bn_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Tensor:
    """y = act((x - mean) * (rstd * weight) + bias + residual), in one pass.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        mean, rstd, weight, bias: [C], fp32 (fp64 for fp64 x); rstd = 1 / sqrt(variance + eps).
        residual: the shape and dtype of x, or None for zero.
        act: "relu", "relu6", "hardswish" (not with a residual), or None for the identity.

    Returns:
        [N, C, H, W], the dtype of x, channels_last, computed in fp32 (fp64 for fp64) and rounded
        once. Not differentiable by itself: see `bn_act_reduce` and `bn_act_backward`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: an input requires a gradient.

    Source: arXiv 1502.03167, algorithm 1; arXiv 1512.03385, figure 5 (residual block).
    """
    _validate("bn_act", x, act, (mean, rstd, weight, bias), residual=residual)
    _refuse_grad("bn_act", x, mean, rstd, weight, bias, residual)
    return torch.ops.deeplab_fast.bn_act(x, mean, rstd, weight, bias, residual, act)


def bn_act_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    out: Tensor | None = None,
    act: str | None = "relu",
) -> tuple[Tensor, Tensor]:
    """The sums over each channel that the gradient of `bn_act` needs, in one pass.

    With g = grad * act'(...) and xhat = (x - mean) * rstd: sum of g, the gradient to bias, and sum
    of g * xhat, the gradient to weight.

    Args:
        grad, x: [N, C, H, W], one dtype, any strides.
        mean, rstd, weight, bias: as for `bn_act`.
        out: the result of `bn_act`, needed where it had a residual; None computes what the
            activation saw from x again.
        act: as for `bn_act`; "hardswish" only without out.

    Returns:
        two [C], fp32 (fp64 for fp64 x), summed in a fixed order.
    """
    name = "bn_act_reduce"
    _validate(name, x, act, (mean, rstd, weight, bias), grad=grad, out=out)
    return torch.ops.deeplab_fast.bn_act_reduce(grad, x, mean, rstd, weight, bias, out, act)


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_grad: Tensor | None = None,
    mean_grad_xhat: Tensor | None = None,
    *,
    out: Tensor | None = None,
    act: str | None = "relu",
    to_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `bn_act` to x, and to the residual if asked for, in one pass.

        dx = rstd * weight * (g - mean_grad - xhat * mean_grad_xhat),  d residual = g,

    g and xhat as in `bn_act_reduce`, of which mean_grad and mean_grad_xhat are the sums, divided by
    the number of values (over all processes, where those shared their statistics). Both are None
    where mean and rstd are constants.

    Returns:
        dx and d residual (None if not `to_residual`), [N, C, H, W], the dtype of x, channels_last.

    Source: arXiv 1502.03167, section 3.
    """
    name = "bn_act_backward"
    _validate(name, x, act, (mean, rstd, weight, bias), grad=grad, out=out)
    if (mean_grad is None) != (mean_grad_xhat is None):
        raise ValueError(f"{name}: give both of mean_grad and mean_grad_xhat, or none of them")
    for vector in (mean_grad, mean_grad_xhat):
        if vector is not None:
            check_shape(name, "mean_grad", vector, x.shape[1:2], "one value for each channel")
    dx, residual = torch.ops.deeplab_fast.bn_act_backward(
        grad, x, mean, rstd, weight, bias, out, mean_grad, mean_grad_xhat, act, to_residual
    )
    return dx, residual if to_residual else None


def describe_stats(x: Tensor) -> backends.OpDesc:
    """What a choice of backend rests on, for the arguments of `batch_stats`."""
    return backends.OpDesc.of("batch_stats", x)


def describe_bn_act(
    x: Tensor, *args: Any, residual: Tensor | None = None, act: str | None = "relu"
) -> backends.OpDesc:
    """The same for `bn_act`."""
    return backends.OpDesc.of("bn_act", x, act=act, residual=residual is not None)


def describe_reduce(
    grad: Tensor, x: Tensor, *args: Any, out: Tensor | None = None, act: str | None = "relu"
) -> backends.OpDesc:
    """The same for `bn_act_reduce`."""
    return backends.OpDesc.of("bn_act_reduce", x, act=act, residual=out is not None)


def describe_backward(
    grad: Tensor,
    x: Tensor,
    *args: Any,
    out: Tensor | None = None,
    act: str | None = "relu",
    to_residual: bool = False,
) -> backends.OpDesc:
    """The same for `bn_act_backward`."""
    return backends.OpDesc.of("bn_act_backward", x, act=act, residual=out is not None)


def _validate(
    op: str,
    x: Tensor,
    act: str | None,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    **maps: Tensor | None,
) -> None:
    check_map(op, "x", x)
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {ACTIVATIONS}, got {act!r}")
    for name, vector in zip(("mean", "rstd", "weight", "bias"), vectors, strict=True):
        check_shape(op, name, vector, x.shape[1:2], "one value for each channel")
        check_dtype(op, name, vector, FLOAT_DTYPES)
        check_device(op, x, **{name: vector})
    for name, other in maps.items():
        if other is None:
            continue
        check_shape(op, name, other, x.shape, "the shape of x")
        check_dtype(op, name, other, (x.dtype,))
        check_device(op, x, **{name: other})
        if act == "hardswish" and name != "grad":
            raise ValueError(f"{op}: act='hardswish' does not take {name}; use 'relu' or 'relu6'")


def _refuse_grad(op: str, *tensors: Tensor | None) -> None:
    if needs_grad(*tensors):
        raise RuntimeError(
            f"{op} records no gradient; use deeplab_fast.program.training, or torch.no_grad() "
            "around it"
        )


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


def _per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _runs(op: str, x_at: int, act_at: int | None, out_at: int | None) -> Callable[..., Any]:
    """What asks `backends` which implementation runs: the places of x, act and out or residual."""

    def run(*args: Any) -> Any:
        params = {}
        if act_at is not None and out_at is not None:
            params = {"act": args[act_at], "residual": args[out_at] is not None}
        return backends.run(backends.OpDesc.of(op, args[x_at], **params), *args)

    return run


_VECTORS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias"
define(
    "batch_stats(Tensor x) -> (Tensor, Tensor)", _runs("batch_stats", 0, None, None), _per_channel
)
define(
    f"bn_act(Tensor x, {_VECTORS}, Tensor? residual, str? act) -> Tensor",
    _runs("bn_act", 0, 6, 5),
    lambda x, *rest: _like(x),
)
define(
    f"bn_act_reduce(Tensor grad, Tensor x, {_VECTORS}, Tensor? out, str? act) -> (Tensor, Tensor)",
    _runs("bn_act_reduce", 1, 7, 6),
    lambda grad, x, *rest: _per_channel(x),
)
define(
    f"bn_act_backward(Tensor grad, Tensor x, {_VECTORS}, Tensor? out, Tensor? mean_grad, "
    "Tensor? mean_grad_xhat, str? act, bool to_residual) -> (Tensor, Tensor)",
    _runs("bn_act_backward", 1, 9, 6),
    lambda grad, x, *rest: (_like(x), _like(x) if rest[-1] else x.new_empty(0)),
)
for _op in ("batch_stats", "bn_act", "bn_act_reduce", "bn_act_backward"):
    backends.register(_op, "reference", getattr(reference, _op))
    backends.register(
        _op,
        "triton",
        triton_kernel("batch_norm", _op),
        triton_kernel("batch_norm", "not_supported_reasons"),
    )
    backends.register(_op, "cpu", getattr(_cpu_batch_norm, _op), _cpu_batch_norm.reasons)
