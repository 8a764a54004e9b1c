"""Batch norms folded into the filters of all layers, in Triton: the launcher.

`fold_filters` takes what the op of that name takes, already validated. The kernel and its costs are
in `fold_kernels.py`; importing this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import limits
from ..dispatch.describe import OpDesc
from ..plan import fold
from . import launch
from .launch import grid

_MOST_VALUES = 2**31 - 1
NUM_WARPS = 4


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton kernel cannot run the call; empty where it can.

    Args:
        desc: a call of fold_filters.
    """
    reasons = limits.triton(desc)
    if desc.params["weights"] == "float64":
        reasons.append("multiplies in float32, the filters are float64")
    if desc.shape[1] > _MOST_VALUES:
        reasons.append(f"counts at most {_MOST_VALUES} values, the filters have {desc.shape[1]}")
    return reasons


def fold_filters(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * weights of all layers.

    Args:
        weights: for each layer [K, C, R, S], any strides, fp16, bf16 or fp32, one dtype.
        scale: [sum K] fp32.
        dtype: of the results, fp16, bf16 or fp32.

    Returns:
        The allocation whose `fold.views` are the results, multiplied in fp32 and rounded once.
    """
    first = weights[0]
    kernels = launch.device_module("fold_kernels")
    tables = fold.device_tables(weights)
    flat = first.new_empty(tables.size, dtype=dtype)
    if not tables.size:
        return flat
    with launch.on_device(first):
        kernels.fold_filters_kernel[grid(tables.tiles.numel())](
            tables.layers, tables.tiles, first, scale.contiguous(), flat,
            **constants(first.element_size()), num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return flat


def constants(itemsize: int) -> dict[str, int]:
    """Constants of the kernel for filters of a dtype of so many bytes."""
    return {
        "VECTORS": fold.VECTORS,
        "PAIRS": fold.PAIRS,
        "GAP": fold.ALIGNMENT,
        "VEC": fold.VECTOR_BYTES // itemsize,
    }
