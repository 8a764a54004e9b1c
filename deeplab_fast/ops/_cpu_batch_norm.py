"""The batch norm ops in C++ (csrc/cpu/batch_norm_ops.cpp), called as their references are."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext, reference
from ..dispatch import limits
from ..dispatch.describe import OpDesc


def reasons(desc: OpDesc) -> list[str]:
    """Why a call of any of the ops cannot run here; empty where it can."""
    allowed = (torch.float32, torch.float64)
    return [
        *limits.device(desc, "cpu"),
        *limits.dtype(desc, allowed, "takes float32 and float64 only"),
        *limits.extension(_ext.CPU, "_batch_stats_cpu"),
    ]


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.batch_stats`."""
    return torch.ops.deeplab_fast._batch_stats_cpu(_map(x))


def bn_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    act: str | None,
) -> Tensor:
    """As `ops.bn_act`."""
    vectors = (_vector(v, x) for v in (mean, rstd, weight, bias))
    return torch.ops.deeplab_fast._bn_act_cpu(_map(x), *vectors, _map(residual), act or "none")


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
    """As `ops.bn_act_reduce`."""
    vectors = (_vector(v, x) for v in (mean, rstd, weight, bias))
    return torch.ops.deeplab_fast._bn_act_reduce_cpu(
        _map(grad), _map(x), *vectors, _map(out), act or "none"
    )


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
) -> tuple[Tensor, Tensor]:
    """As `ops.bn_act_backward`."""
    vectors = (_vector(v, x) for v in (mean, rstd, weight, bias))
    means = (None if v is None else _vector(v, x) for v in (mean_grad, mean_grad_xhat))
    return torch.ops.deeplab_fast._bn_act_backward_cpu(
        _map(grad), _map(x), *vectors, _map(out), *means, act or "none", to_residual
    )


def _map(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _vector(v: Tensor, x: Tensor) -> Tensor:
    return v.to(reference.compute_dtype(x.dtype)).contiguous()
