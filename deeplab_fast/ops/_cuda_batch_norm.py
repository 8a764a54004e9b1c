"""The batch norm ops on CUDA tensors, in CUDA C++ (csrc/cuda/batch_norm.cu).

Nothing was measured on a GPU yet: the automatic choice prefers Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..backends import OpDesc
from ._upsample import MINIMUM_CAPABILITY, _missing

# Behind Triton's, until it measures faster.
PRIORITY = 15
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def reasons(desc: OpDesc) -> list[str]:
    """Why the CUDA C++ implementation cannot run a call of any of the ops; empty where it can."""
    found = []
    if desc.device != "cuda":
        found.append(f"needs CUDA tensors, the input is on {desc.device}")
    elif desc.capability is not None and desc.capability < MINIMUM_CAPABILITY:
        have, least = (".".join(map(str, c)) for c in (desc.capability, MINIMUM_CAPABILITY))
        found.append(f"needs compute capability {least}, the device has {have}")
    if desc.dtype not in DTYPES:
        dtype = str(desc.dtype).removeprefix("torch.")
        found.append(f"takes float16, bfloat16 and float32 only, the input is {dtype}")
    return found + _missing(_ext.CUDA, "_batch_stats_cuda")


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.batch_stats`."""
    return torch.ops.deeplab_fast._batch_stats_cuda(_map(x))


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
    vectors = (_vector(v) for v in (mean, rstd, weight, bias))
    return torch.ops.deeplab_fast._bn_act_cuda(_map(x), *vectors, _map(residual), act or "none")


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
    vectors = (_vector(v) for v in (mean, rstd, weight, bias))
    return torch.ops.deeplab_fast._bn_act_reduce_cuda(
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
    vectors = (_vector(v) for v in (mean, rstd, weight, bias))
    means = (None if v is None else _vector(v) for v in (mean_grad, mean_grad_xhat))
    return torch.ops.deeplab_fast._bn_act_backward_cuda(
        _map(grad), _map(x), *vectors, _map(out), *means, act or "none", to_residual
    )


def _map(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _vector(v: Tensor) -> Tensor:
    return v.float().contiguous()
