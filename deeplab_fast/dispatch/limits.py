"""Why a call cannot run somewhere: its device, compute capability or dtype, an extension that is
missing, Triton. Each function gives the reasons against a call, none where there are none.

Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Hashable, Sequence
from functools import cache

import torch

from .._ext import Extension
from .describe import OpDesc, dtype_name

# Nothing older is compiled for.
MINIMUM_CAPABILITY = (8, 0)
# The oldest that the kernels are compiled and tested with.
MINIMUM_TRITON = (3, 6)

# The values that Triton itself takes for true.
_TRUE = ("1", "true", "on", "y", "yes")


def device(desc: OpDesc, wanted: str) -> list[str]:
    """Tensors must be on a type of device, "cpu" or "cuda"."""
    if desc.device == wanted:
        return []
    return [f"needs {wanted.upper()} tensors, the input is on {desc.device}"]


def capability(
    desc: OpDesc, least: tuple[int, int] = MINIMUM_CAPABILITY, what: str = ""
) -> list[str]:
    """The GPU must be of a compute capability, as far as the call says which it has.

    Args:
        desc: the call.
        least: compute capability.
        what: of the call needs it; "" for all of it.
    """
    if desc.capability is None or desc.capability >= least:
        return []
    have, needed = (".".join(map(str, c)) for c in (desc.capability, least))
    return [f"{what} needs compute capability {needed}, the device has {have}".lstrip()]


def cuda(desc: OpDesc) -> list[str]:
    """Tensors must be on a GPU of `MINIMUM_CAPABILITY`."""
    return device(desc, "cuda") or capability(desc)


def dtype(desc: OpDesc, allowed: Sequence[torch.dtype], rule: str) -> list[str]:
    """The main input must have one of some dtypes; `rule` says which in words."""
    return [] if desc.dtype in allowed else [f"{rule}, the input is {dtype_name(desc.dtype)}"]


def extension(found: Extension, op: str) -> list[str]:
    """An extension must be loaded, and have the private op `deeplab_fast::<op>`."""
    if not found.loaded:
        return [found.reason]
    return [] if hasattr(torch.ops.deeplab_fast, op) else [older(found, ", without this op")]


def older(found: Extension, lacks: str = "") -> str:
    """What to do about an extension that lacks something."""
    return f"{found.name} was compiled from older sources{lacks}; rebuild it"


def triton(desc: OpDesc) -> list[str]:
    """What every Triton kernel of the package needs."""
    reasons = []
    if reason := missing_triton():
        reasons.append(reason)
    if interpreting():
        if desc.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes wrong results in bfloat16; use float32")
    elif desc.device != "cuda":
        reasons.append(
            f"Triton needs a CUDA device, the input is on {desc.device} "
            "(TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
        )
    else:
        reasons += capability(desc)
    if desc.dtype == torch.float64:
        reasons.append("accumulates in float32, the input is float64")
    return reasons


@cache
def missing_triton() -> str:
    """Why Triton cannot be used, or "" where it can; finds it without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'deeplab_fast[triton]')"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Triton of another distribution (a vendor's build); its version shows once it is imported.
        return ""
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_TRITON:
        least = ".".join(map(str, MINIMUM_TRITON))
        return f"Triton {found} is older than {least} (pip install 'triton>={least}')"
    return ""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter.

    Triton decides when a kernel is decorated, so a change after its first use has no effect.
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE


def state() -> Hashable:
    """What of the process, beside backends and extensions, decides for or against a call."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        os.environ.get("TRITON_INTERPRET"),
    )


def gpu_state() -> Hashable:
    """The same, of calls on a GPU alone."""
    return allow_tf32(), torch.backends.cudnn.enabled


def allow_tf32() -> bool:
    """Whether PyTorch lets matrix products of fp32 operands round them to TF32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # Raised once the newer setting has been used.
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allow_conv_tf32() -> bool:
    """Whether PyTorch lets cuDNN's convolutions round fp32 operands to TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # PyTorch 2.9 and newer, which its type hints do not have.
        return getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32"  # noqa: B009


def cpu_bf16() -> str:
    """Why this CPU cannot multiply in bfloat16, or "" where it can."""
    found = torch.cpu.get_capabilities()
    if any(found.get(name) for name in ("avx512_bf16", "amx_bf16")):
        return "" if torch.backends.mkldnn.is_available() else "PyTorch was built without oneDNN"
    return "this CPU has neither avx512_bf16 nor AMX instructions"


def cpu_int8() -> str:
    """Why this CPU cannot multiply integers of 8 bits, or "" where it can."""
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    return "" if torch.cpu.get_capabilities().get("avx2") else "this CPU has no AVX2 instructions"
