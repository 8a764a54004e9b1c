"""The convolutions of the ASPP in training, in Triton: the launchers."""

from __future__ import annotations

from ..backends import OpDesc
from . import _compat


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton kernel cannot run the call; empty where it can."""
    return [*_compat.not_supported_reasons(desc), "not built yet"]
