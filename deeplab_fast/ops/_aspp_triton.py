"""The Triton implementations of the ASPP's ops and of conv_bn_act, and the reasons against them.

Nothing here imports Triton before one of its kernels runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def kernel(module: str, name: str) -> Callable[..., Any]:
    """`name` of deeplab_fast.kernels.`module`, imported when it is called."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"deeplab_fast.kernels.{module}"), name)(*args)

    return run
