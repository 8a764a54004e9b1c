"""The facts of one call of an op: what a choice of implementation may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class OpDesc:
    """What a choice of implementation may depend on: the op and the facts of one call.

    Attributes:
        op: name in `deeplab_fast.ops`.
        device: device type of the main input ("cpu", "cuda", ...).
        dtype: dtype of the main input.
        shape: shape of the main input.
        params: the op's own parameters that matter for the choice, by name.
        capability: CUDA compute capability of the device, None elsewhere.
        deterministic: `torch.are_deterministic_algorithms_enabled()`.
        gpu: name of the CUDA device, "" elsewhere.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    deterministic: bool = False
    gpu: str = ""

    @classmethod
    def of(cls, op: str, x: torch.Tensor, **params: object) -> OpDesc:
        """Describe a call of `op` whose main input is `x`."""
        return cls.on(op, x.shape, x.dtype, x.device, **params)

    @classmethod
    def on(
        cls,
        op: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        **params: object,
    ) -> OpDesc:
        """Describe a call of `op` by what its main input will be."""
        capability, gpu = _gpu(device) if device.type == "cuda" else (None, "")
        return cls(
            op,
            device.type,
            dtype,
            tuple(shape),
            params,
            capability,
            torch.are_deterministic_algorithms_enabled(),
            gpu,
        )

    def __str__(self) -> str:
        params = "".join(f", {k}={v}" for k, v in self.params.items())
        return f"{self.device} {dtype_name(self.dtype)} {list(self.shape)}{params}"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without "torch." before it."""
    return str(dtype).removeprefix("torch.")


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], str]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.name
