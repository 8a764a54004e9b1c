"""What the host code of the Triton kernels asks before Triton itself is imported.

Nothing here imports Triton: a package without it must import, list its backends and say why the
Triton ones cannot run. Device code lives in modules that import Triton at their top and that host
functions import through `device_module` when a kernel is first needed.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..dispatch import limits


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
