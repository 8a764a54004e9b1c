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
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int


H100 = Device("H100", (9, 0), 132, 228 * 1024)
A100 = Device("A100", (8, 0), 108, 164 * 1024)


class Properties(Protocol):
    """What `torch.cuda.get_device_properties` gives."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_multiprocessor: int


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
    )


def device_of(x: Tensor) -> Device:
    """What the choice of a configuration needs to know of x's device."""
    return _device(x.device) if x.is_cuda else H100


@cache
def _device(device: torch.device) -> Device:
    return device_like(torch.cuda.get_device_properties(device))
