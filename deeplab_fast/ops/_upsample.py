"""What the upsampling ops share: their implementations on each backend and the reasons against
them. Nothing here imports Triton before one of its kernels runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ext, reference
from ..backends import OpDesc, current_backend

STRICT_LABELS = "DEEPLAB_FAST_STRICT_LABELS"
# Nothing older is compiled for.
MINIMUM_CAPABILITY = (8, 0)


def private(name: str) -> Callable[..., Any]:
    """The private op `deeplab_fast::<name>` of an extension, looked up when it is called."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.deeplab_fast, name)(*args)

    return run


def triton(name: str) -> Callable[..., Any]:
    """`name` of deeplab_fast.kernels.upsample, imported when it is called."""

    def run(*args: Any) -> Any:
        return getattr(_kernels(), name)(*args)

    return run


def cpu_reasons(desc: OpDesc) -> list[str]:
    """Why the C++ CPU implementation cannot run the call; empty where it can.

    The automatic choice also leaves it out where it was measured to be the slower one.
    """
    reasons = []
    if desc.device != "cpu":
        reasons.append(f"needs CPU tensors, the input is on {desc.device}")
    (height, width), (out_height, out_width) = desc.shape[-2:], desc.params["size"]
    # Nothing is shared between outputs then; bench/NOTES.md has the measurement.
    if out_height * out_width <= height * width and current_backend() == "auto":
        reasons.append(
            f"PyTorch's own ops are as fast where nothing is enlarged ({height}x{width} to "
            f"{out_height}x{out_width}); use_backend('cpu') runs it all the same"
        )
    return reasons + _missing(_ext.CPU, "_upsample_argmax_cpu")


def triton_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton implementation cannot run the call; empty where it can."""
    return _kernels().not_supported_reasons(desc)


def cuda_reasons(desc: OpDesc) -> list[str]:
    """Why the CUDA C++ implementation cannot run the call; empty where it can."""
    reasons = []
    if desc.device != "cuda":
        reasons.append(f"needs CUDA tensors, the input is on {desc.device}")
    elif desc.capability is not None and desc.capability < MINIMUM_CAPABILITY:
        have, least = (".".join(map(str, c)) for c in (desc.capability, MINIMUM_CAPABILITY))
        reasons.append(f"needs compute capability {least}, the device has {have}")
    return reasons + _missing(_ext.CUDA, "_upsample_argmax_cuda")


def _missing(extension: _ext.Extension, op: str) -> list[str]:
    if not extension.loaded:
        return [extension.reason]
    if not hasattr(torch.ops.deeplab_fast, op):
        return [f"{extension.name} was compiled from older sources, without this op; rebuild it"]
    return []


def report_bad_labels(count: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """In strict mode, wait for the count of bad labels of a CUDA kernel and raise where there are.

    Args:
        count: [1] int64 on the device, from a kernel that treated those labels as ignored.
    """
    if os.environ.get(STRICT_LABELS) != "1":
        return
    # A capture cannot wait for a result.
    if not torch.cuda.is_current_stream_capturing() and count.item():
        reference.check_labels(target, num_classes, ignore_index)


def _kernels() -> Any:
    return importlib.import_module("deeplab_fast.kernels.upsample")
