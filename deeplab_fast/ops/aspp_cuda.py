"""The CUDA C++ implementations of the ASPP's ops: which tile runs, and the reasons against them.

Both ops are one kernel over the tile list of `plan.schedule`: the projection is a branch of one tap
with a shift for each image. There are two kernels: for sm_80 and newer (deeplab_fast._C_cuda), and
for sm_90a (deeplab_fast._C_sm90), which goes first where it can. Their tiles are the rows of one
table, which deeplab_fast._C hands out.

A short rule takes a row for each call (`choose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..dispatch.declare import compiled
from ..dispatch.describe import OpDesc
from ..plan.device import SHARED_RESERVE, Device, device_of
from ..plan.gemm import GemmConfig
from ..plan.packing import PackedBranches, channels_inside, empty_map, fp32
from ..plan.schedule import schedule, tile_counts
from ..plan.tables import device_tables, workspace
from ..plan.taps import Branch, Problem

DTYPES = (torch.float16, torch.bfloat16)
# The only one whose code the sm_90a extension has.
_SM90 = (9, 0)
# Channels come in pieces of 16 bytes.
_VECTOR = 8
_MAX_PIXELS = 2**31 - 1
# Tiles of a program: with fewer, programs wait for the longest, and tiles are cut.
_FEW_TILES = 2

_run_sm80 = compiled("_aspp_cuda")
_run_sm90 = compiled("_aspp_sm90")
image_shift = compiled("_image_shift_cuda")


@dataclass(frozen=True)
class Tile:
    """A row of the table of tiles; the fields are those of `_C.aspp_tiles`."""

    architecture: int
    block_m: int
    block_n: int
    block_c: int
    threads: int
    stages: int
    cluster: int
    occupancy: int
    shared_bytes: int


@dataclass(frozen=True)
class Choice:
    """What runs a call.

    Attributes:
        row: of the table of tiles.
        tile: that row.
        config: the tile as the tile list knows it.
        programs: thread blocks, or clusters of them, that run at the same time.
    """

    row: int
    tile: Tile
    config: GemmConfig
    programs: int


@cache
def tiles() -> tuple[Tile, ...]:
    """The table of tiles, csrc/include/deeplab_fast/aspp_tile_table.h."""
    return tuple(Tile(**row) for row in _ext.CPU.module.aspp_tiles())  # type: ignore[union-attr]


def reasons(desc: OpDesc) -> list[str]:
    """Why the CUDA C++ implementation cannot run a call of either op; empty where it can."""
    found = limits.cuda(desc)
    found += limits.dtype(desc, DTYPES, "multiplies float16 and bfloat16 only")
    n, channels, height, width = desc.shape
    if channels % _VECTOR:
        found.append(
            f"reads channels in groups of {_VECTOR}, the input has {channels}; pad them with zeros"
        )
    if n * height * width > _MAX_PIXELS:
        found.append(f"counts at most {_MAX_PIXELS} pixels, {n} maps of {height}x{width} have more")
    found += limits.extension(_ext.CUDA, "_aspp_cuda")
    if not _ext.CPU.loaded:
        found.append(f"its table of tiles is in deeplab_fast._C: {_ext.CPU.reason}")
    elif not hasattr(_ext.CPU.module, "aspp_tiles"):
        found.append(limits.older(_ext.CPU))
    return found


def architecture(capability: tuple[int, int]) -> int:
    """The rows of the table that a device of this compute capability runs: 80 or 90."""
    return 90 if capability == _SM90 and not limits.extension(_ext.SM90, "_aspp_sm90") else 80


@lru_cache(maxsize=512)
def choose(
    problem: Problem, device: Device, row: int | None = None, split: bool | None = None
) -> Choice:
    """The first row of the table of tiles with a tile for every other multiprocessor, or the last.

    Of the device's architecture, without rows whose tiles the filters fill at most by half. Tiles
    are cut where programs have few of them, but those of one tap, which are short.

    Args:
        problem: the branches and their map.
        device: the GPU.
        row: choose this row; None for the rule.
        split: whether tiles may be cut (`plan.schedule.schedule`); None for the rule.

    Raises:
        ValueError: the row cannot run on the device.
    """
    filters = max(b.channels for b in problem.branches)
    several_taps = any(b.taps > 1 for b in problem.branches)
    choice: Choice | None = None
    for number, tile in enumerate(tiles()):
        if row not in (None, number) or tile.architecture != architecture(device.capability):
            continue
        blocks = min(tile.occupancy, device.shared // (tile.shared_bytes + SHARED_RESERVE))
        # A tile of 256 filters has no use where 128 hold all.
        if blocks == 0 or (row is None and tile.block_n >= 2 * max(filters, 128)):
            continue
        block = (tile.block_m, tile.block_n, tile.block_c)
        config = GemmConfig(*block, tile.threads // 32, tile.stages, blocks)
        count, _ = tile_counts(problem, config)
        programs = device.multiprocessors // tile.cluster * blocks
        cut = split
        if cut is None:
            cut = several_taps and count < _FEW_TILES * programs
        choice = Choice(number, tile, replace(config, split=cut), programs)
        if 2 * count >= device.multiprocessors:
            break
    if choice is None:
        have = device.shared // 1024
        raise ValueError(
            f"no tile for compute capability {device.capability} with {have} KB of shared memory"
            + ("" if row is None else f" is row {row}")
        )
    return choice


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """y = concat over branches b of relu(scale_b * conv(x, weight_b, dilation_b) + shift_b).

    Args:
        x: [N, C, H, W] fp16 or bf16, C a multiple of 8; other layouts than channels_last are
            copied.
        weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], the dtype of x. Views of a
            `plan.packing.PackedBranches` are used where they lie, others are packed at every call.
        scales, shifts: for each branch [K_b], any float dtype; used in fp32.
        dilations: for each branch an int of at least 1.

    Returns:
        [N, sum K_b, H, W], channels_last, accumulated in fp32 and rounded once.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    packed = PackedBranches.pack(weights, scales, shifts, dilations)
    return multiply(x, packed.weight, packed.scale, packed.shift, packed.branches)


def aspp_project(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """y = relu(scale * (W_branches . branches + W_pooled . pooled) + shift).

    The pooled branch becomes a shift for each image, in fp32.

    Args:
        branches: [N, B, H, W] fp16 or bf16, B a multiple of 8; a layout other than channels_last is
            copied.
        pooled: [N, P], the dtype of branches.
        weight: [K, B + P, 1, 1], the dtype of branches.
        scale, shift: [K], any float dtype; used in fp32.

    Returns:
        [N, K, H, W], channels_last.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    channels = branches.shape[1]
    matrix = weight.flatten(1)
    scale = fp32(scale)
    shifts = image_shift(pooled, matrix[:, channels:], scale, fp32(shift))
    geometry = (Branch(matrix.shape[0], 1, 1),)
    return multiply(branches, matrix[:, :channels], scale, shifts, geometry)


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    branches: tuple[Branch, ...],
    choice: Choice | None = None,
) -> Tensor:
    """relu(scale * (x by the filters of all branches) + shift).

    Args:
        x: [N, C, H, W].
        weight: [sum taps K, C], rows in the order branch, tap, filter.
        scale: [sum K] fp32, contiguous.
        shift: [sum K], or [N, sum K] for a shift of each image, fp32, contiguous.
        branches: the branches.
        choice: None for that of `choose`.
    """
    n, channels, height, width = x.shape
    y = empty_map(x, sum(b.channels for b in branches))
    if y.numel() == 0:
        return y
    x = channels_inside(x)
    pixels = [x.stride(dim) for dim in (0, 2, 3) if x.shape[dim] > 1]
    if x.data_ptr() % 16 or any(stride % _VECTOR for stride in pixels):
        x = x.clone(memory_format=torch.channels_last)
    if weight.stride(1) != 1 or weight.stride(0) % _VECTOR or weight.data_ptr() % 16:
        weight = weight.clone(memory_format=torch.contiguous_format)
    if choice is None:
        choice = choose(Problem(n, height, width, channels, branches), device_of(x))
    tables = device_tables(x, branches, choice.config, choice.programs, schedule)
    partial = workspace(x, tables, choice.config)
    run = _run_sm90 if choice.tile.architecture == 90 else _run_sm80
    vectors = all(b.channels % _VECTOR == 0 for b in branches)
    run(
        x, weight, scale, shift, tables.classes, tables.parts, tables.starts, tables.sums, partial,
        y, choice.row, vectors,
    )  # fmt: skip
    return y
