"""What the host code of the Triton kernels asks before Triton itself is imported.

Nothing here imports Triton: a package without it must import, list its backends and say why the
Triton ones cannot run. Device code lives in modules that import Triton at their top and that host
functions import through `device_module` when a kernel is first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from ..backends import OpDesc

# The oldest that the kernels are compiled and tested with.
MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)

# The values that Triton itself takes for true.
_TRUE = ("1", "true", "on", "y", "yes")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter.

    Triton decides when a kernel is decorated, so a change after its first use has no effect.
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE


@cache
def missing_triton() -> str:
    """Why Triton cannot be used, or "" where it can; finds it without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'deeplab_fast[triton]')"
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:
        # Triton of another distribution (a vendor's build); its version shows once it is imported.
        return ""
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_TRITON:
        least = ".".join(map(str, MINIMUM_TRITON))
        return f"Triton {found} is older than {least} (pip install 'triton>={least}')"
    return ""


def device_module(name: str) -> ModuleType:
    """Import `deeplab_fast.kernels.<name>`, a module with device code.

    Raises:
        RuntimeError: Triton is missing, too old, or does not import; the message says which.
    """
    reason = missing_triton()
    if reason:
        raise RuntimeError(f"this backend needs Triton: {reason}")
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        raise RuntimeError(f"this backend needs Triton, which does not import: {error}") from error


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Reasons that hold for every Triton kernel of the package, against the call `desc`."""
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
    elif desc.capability is not None and desc.capability < MINIMUM_CAPABILITY:
        have, least = (".".join(map(str, c)) for c in (desc.capability, MINIMUM_CAPABILITY))
        reasons.append(f"needs compute capability {least}, the device has {have}")
    if desc.dtype == torch.float64:
        reasons.append("accumulates in float32, the input is float64")
    return reasons


def allow_tf32() -> bool:
    """Whether PyTorch lets matrix products of fp32 operands round them to TF32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # Raised once the newer setting has been used.
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
