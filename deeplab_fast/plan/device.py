"""What a choice of configuration knows of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

WARP = 32
REGISTERS = 65536
MAX_REGISTERS = 255
# CUDA keeps this much of the shared memory of each resident block for itself.
SHARED_RESERVE = 1024


@dataclass(frozen=True)
class Device:
    """What a choice of configuration knows of a GPU.

    Attributes:
        name: for messages.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        shared: bytes of shared memory that the blocks of a multiprocessor have together.
        clock: of the multiprocessors, in Hz; 0 where it is not known.
        bandwidth: of the device's memory, in bytes a second; 0 where it is not known.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    clock: float = 0.0
    bandwidth: float = 0.0


# With the clocks that NVIDIA's data sheets state rates for.
H100 = Device("H100", (9, 0), 132, 228 * 1024, 1.83e9, 3.35e12)
A100 = Device("A100", (8, 0), 108, 164 * 1024, 1.41e9, 2.04e12)
# Multiply-adds of fp16 or bf16 that the tensor cores of a multiprocessor do in a cycle; of TF32
# half as many.
_MACS = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}
# The same of fp32, by the other units.
_FP32_MACS = 128


class Properties(Protocol):
    """What `torch.cuda.get_device_properties` gives."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_multiprocessor: int


def least_seconds(
    device: Device, dtype: torch.dtype, macs: int, moved: int, tf32: bool
) -> float | None:
    """The least time that work takes: all multiply-adds at the peak rate, or all bytes at the
    memory's. None where the device's rates are not known.

    Args:
        device: the GPU.
        dtype: of the operands.
        macs: multiply-adds.
        moved: bytes read and written.
        tf32: fp32 operands are rounded to TF32.
    """
    rate = _MACS.get(device.capability, 0)
    if dtype == torch.float32:
        rate = rate // 2 if tf32 else _FP32_MACS
    rate_of_all = rate * device.multiprocessors * device.clock
    if not rate_of_all or not device.bandwidth:
        return None
    return max(macs / rate_of_all, moved / device.bandwidth)


def asynchronous(capability: tuple[int, int]) -> bool:
    """Whether tensor cores read operands from shared memory while the next ones arrive there, as
    from 9.0 on; those of 12.0 take them from registers, as before."""
    return (9, 0) <= capability < (12, 0)


def device_like(properties: Properties) -> Device:
    """The device that `torch.cuda.get_device_properties` describes."""
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        # In kHz, two transfers a cycle; releases of PyTorch differ in which they have.
        getattr(properties, "clock_rate", 0) * 1e3,
        getattr(properties, "memory_clock_rate", 0)
        * 2e3
        * (getattr(properties, "memory_bus_width", 0) / 8),
    )


def device_of(x: Tensor) -> Device:
    """What the choice of a configuration needs to know of x's device."""
    return device_at(x.device)


@cache
def device_at(device: torch.device) -> Device:
    """The GPU under a name; an H100 for the CPU, where kernels are planned without a GPU."""
    if device.type != "cuda":
        return H100
    return device_like(torch.cuda.get_device_properties(device))
