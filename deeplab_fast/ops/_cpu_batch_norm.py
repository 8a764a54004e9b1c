"""The batch norm ops in C++ (csrc/cpu/batch_norm_ops.cpp), called as their references are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ext, reference
from ..dispatch import limits
from ..dispatch.declare import compiled
from ..dispatch.describe import OpDesc
from ..dispatch.examples import Run


def reasons(desc: OpDesc) -> list[str]:
    """Why a call of any of the ops cannot run here; empty where it can."""
    allowed = (torch.float32, torch.float64)
    return [
        *limits.device(desc, "cpu"),
        *limits.dtype(desc, allowed, "takes float32 and float64 only"),
        *limits.extension(_ext.CPU, "_batch_stats_cpu"),
    ]


def call(op: str, act_at: int | None) -> Run:
    """An op, called as its reference is.

    Args:
        op: its name.
        act_at: which argument is the activation; None for none.
    """
    run = compiled(f"_{op}_cpu")

    def prepared(*args: Any) -> object:
        dtype = reference.compute_dtype(args[0].dtype)
        given = [_prepared(arg, dtype) for arg in args]
        if act_at is not None:
            given[act_at] = args[act_at] or "none"
        return run(*given)

    return prepared


def _prepared(arg: object, dtype: torch.dtype) -> object:
    if not isinstance(arg, Tensor):
        return arg
    if arg.dim() == 4:
        return arg.contiguous(memory_format=torch.channels_last)
    return arg.to(dtype).contiguous()
