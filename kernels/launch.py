"""What the launchers of the Triton kernels share.

Nothing here imports Triton: a package without it must import, list its backends and say why the
Triton ones cannot run. Device code lives in modules that import Triton at their top and that
launchers import through `device_module` when a kernel is first needed.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import limits
from ..dispatch.limits import allow_tf32
from ..plan.device import device_of as device_of
from ..plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, GemmConfig

# Grids are one-dimensional; CUDA's limit on the first dimension.
_MAX_PROGRAMS = 2**31 - 1
_VECTOR_BYTES = 16


def device_module(name: str) -> ModuleType:
    """Import `deeplab_fast.kernels.<name>`, a module with device code.

    Raises:
        RuntimeError: Triton is missing, too old, or does not import; the message says which.
    """
    reason = limits.missing_triton()
    if reason:
        raise RuntimeError(f"this backend needs Triton: {reason}")
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        raise RuntimeError(f"this backend needs Triton, which does not import: {error}") from error


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device current: Triton launches on the current device, not on the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def pixel_strides(x: Tensor) -> tuple[bool, tuple[int, int, int]]:
    """(whether pixels lie at equal distances, strides of image, row and column).

    At equal distances, across rows and images, the last stride is that distance. The stride of a
    dimension of one entry has no meaning and comes out as 0.
    """
    n, _, height, width = x.shape
    image, _, row, col = x.stride()
    step, size, flat = 0, 1, True
    for stride, count in ((col, width), (row, height), (image, n)):
        if count == 1:
            continue
        if size == 1:
            step = stride
        flat &= stride == step * size
        size *= count
    if flat:
        return True, (0, 0, step)
    return False, (image * (n > 1), row * (height > 1), col * (width > 1))


def map_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of image, row and column; 0 for a dimension of one entry."""
    image, _, row, col = x.stride()
    n, _, height, width = x.shape
    return image * (n > 1), row * (height > 1), col * (width > 1)


def vector(x: Tensor, *counts: int) -> int:
    """Elements of x in the longest access, of 16 bytes at most, that divides all counts and where x
    starts in memory."""
    elements = _VECTOR_BYTES // x.element_size()
    counts = (x.data_ptr() // x.element_size(), *counts)
    while any(count % elements for count in counts):
        elements //= 2
    return elements


def is_longest(x: Tensor, *elements: int) -> bool:
    """Whether accesses of so many elements of x all have 16 bytes."""
    return min(elements) * x.element_size() == _VECTOR_BYTES


def grid(programs: int) -> tuple[int]:
    """A launch grid.

    Raises:
        ValueError: it is larger than CUDA allows.
    """
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"{programs} programs are more than a CUDA grid holds ({_MAX_PROGRAMS}); "
            "split the batch"
        )
    return (programs,)


def launch_options(config: GemmConfig) -> dict[str, int]:
    """Triton's launch options of a configuration."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.register_limit is not None:
        options["maxnreg"] = config.register_limit
    return options


def precision(x: Tensor) -> str:
    """How products of x's dtype are made: "tf32", or "ieee" (exactly)."""
    return "tf32" if arithmetic(x) == MMA_TF32 else "ieee"


def arithmetic(x: Tensor) -> str:
    """`MMA_16BIT`, MMA_TF32 or FMA_FP32, for products of x's dtype."""
    if x.dtype != torch.float32:
        return MMA_16BIT
    return MMA_TF32 if allow_tf32() else FMA_FP32
