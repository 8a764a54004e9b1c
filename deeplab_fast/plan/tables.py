"""Tables that GPU kernels read, copied to the device at the first call for a shape.

That cannot happen while a CUDA graph is captured: call once before capturing, as torch.cuda.graphs
asks for anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .gemm import GemmConfig
from .schedule import Int32, Schedule
from .taps import Branch, Problem

AnySchedule = TypeVar("AnySchedule", bound=Schedule)


def capturing(x: Tensor) -> bool:
    """Whether x's device is recording a CUDA graph on the current stream."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def to_device(arrays: Sequence[Int32], x: Tensor, what: str) -> list[Tensor]:
    """Tables on the device of x: one copy for all of them, each from a multiple of 16 bytes on.

    Args:
        arrays: the tables.
        x: any tensor of the device.
        what: names them in the error, with "is" or "are".

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if capturing(x):
        raise RuntimeError(
            f"{what} not on {x.device} yet and cannot be copied there while a CUDA graph is "
            "captured; run the op once at this size before"
        )
    sizes = [-(-a.size // 4) * 4 for a in arrays]
    joined = np.zeros(sum(sizes), np.int32)
    for part, a in zip(np.split(joined, np.cumsum(sizes)), arrays, strict=False):
        part[: a.size] = a.ravel()
    packed = torch.from_numpy(joined).to(x.device)
    if packed.is_cuda:
        # The tables outlive this stream's order: any later call may come on another stream.
        torch.cuda.current_stream(x.device).synchronize()
    return [
        part[: a.size].view(a.shape) for part, a in zip(packed.split(sizes), arrays, strict=True)
    ]


@dataclass(frozen=True)
class Tables:
    """`schedule.Schedule` on a device, and in `more` what belongs to it."""

    classes: Tensor
    parts: Tensor
    sums: Tensor
    starts: Tensor
    slots: int
    more: tuple[Tensor, ...] = ()


def workspace(x: Tensor, tables: Tables, config: GemmConfig) -> Tensor:
    """For the sums of the parts of cut tiles, on the device of x."""
    return x.new_empty((tables.slots, config.block_m, config.block_n), dtype=torch.float32)


# Never emptied: a captured CUDA graph reads the tables through raw pointers for as long as it
# lives. An entry holds 32 bytes a tile.
_tables: dict[tuple[object, ...], Tables] = {}


def device_tables(
    x: Tensor,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    programs: int,
    make: Callable[[Problem, GemmConfig, int], AnySchedule],
    more: Callable[[AnySchedule, int], Sequence[Int32]] | None = None,
) -> Tables:
    """The tile list of a call on the device of x, copied there at the first call.

    Args:
        x: [N, C, H, W], the branches' input.
        branches: the branches.
        config: tiles, and whether they are cut.
        programs: thread blocks that run at the same time.
        make: `schedule.schedule`, or a function with its arguments.
        more: int32 tables that follow from the list and the pixels of a tile, or None.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    n, channels, height, width = x.shape
    problem = Problem(n, height, width, channels, branches)
    key = (problem, config, programs, make, more, x.device)
    tables = _tables.get(key)
    if tables is not None:
        return tables
    work = make(problem, config, programs)
    others = more(work, config.block_m) if more else ()
    arrays = [work.classes, work.parts, work.sums, work.starts, *others]
    classes, parts, sums, starts, *rest = to_device(arrays, x, f"the tile list for {[*x.shape]} is")
    tables = Tables(classes, parts, sums, starts, work.slots, tuple(rest))
    _tables[key] = tables
    return tables
