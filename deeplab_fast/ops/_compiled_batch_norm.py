"""The batch norm ops in C++ (csrc/cpu/batch_norm_ops.cpp) and CUDA C++ (csrc/cuda/batch_norm.cu).

Both register the same private ops, with `_cpu` or `_cuda` behind their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _ext, reference
from ..backends import OpDesc
from ._upsample import MINIMUM_CAPABILITY, _missing


@dataclass(frozen=True)
class CompiledBatchNorm:
    """The four ops of one extension, called as their references are.

    Attributes:
        device: that its tensors are on, "cpu" or "cuda", and the name of its extension.
        dtypes: of maps that it takes.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]

    def reasons(self, desc: OpDesc) -> list[str]:
        """Why a call of any of the ops cannot run here; empty where it can."""
        found = []
        if desc.device != self.device:
            found.append(f"needs {self.device.upper()} tensors, the input is on {desc.device}")
        elif desc.capability is not None and desc.capability < MINIMUM_CAPABILITY:
            have, least = (".".join(map(str, c)) for c in (desc.capability, MINIMUM_CAPABILITY))
            found.append(f"needs compute capability {least}, the device has {have}")
        if desc.dtype not in self.dtypes:
            *names, last = (str(d).removeprefix("torch.") for d in self.dtypes)
            dtype = str(desc.dtype).removeprefix("torch.")
            found.append(f"takes {', '.join(names)} and {last} only, the input is {dtype}")
        extension = getattr(_ext, self.device.upper())
        return found + _missing(extension, f"_batch_stats_{self.device}")

    def batch_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `ops.batch_stats`."""
        return self._op("batch_stats")(_map(x))

    def bn_act(
        self,
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
        return self._op("bn_act")(_map(x), *vectors, _map(residual), act or "none")

    def bn_act_reduce(
        self,
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
        return self._op("bn_act_reduce")(_map(grad), _map(x), *vectors, _map(out), act or "none")

    def bn_act_backward(
        self,
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
        return self._op("bn_act_backward")(
            _map(grad), _map(x), *vectors, _map(out), *means, act or "none", to_residual
        )

    def _op(self, name: str) -> Callable[..., Any]:
        return getattr(torch.ops.deeplab_fast, f"_{name}_{self.device}")


def _map(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _vector(v: Tensor, x: Tensor) -> Tensor:
    return v.to(reference.compute_dtype(x.dtype)).contiguous()


CPU = CompiledBatchNorm("cpu", (torch.float32, torch.float64))
CUDA = CompiledBatchNorm("cuda", (torch.float16, torch.bfloat16, torch.float32))
