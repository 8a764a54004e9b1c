"""Launch configurations of the Triton kernels, chosen by short rules, without Triton.

Where a record has a faster one for a call on this compute capability, that is taken (`tuned.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..ops import aspp_tiles
from ..ops.aspp_tiles import Branch
from . import tuned
from .bilinear_index import cell_counts, source_index

WARP = 32
# State of a pixel (running maximum, running sum, gradient factors) stays in registers for all rows
# of a program; 8 rows need about 100 registers a thread in the largest kernel.
MAX_ROWS = 8
# A thread owns a column; blocks longer than a warp would need sums across warps.
MAX_BLOCK_COLS = WARP
# Per pixel and class: instructions of the arithmetic, and issue slots of the four loads of corner
# logits, which all rows of a block share. Only their ratio matters.
ARITHMETIC_COST = 10
LOAD_COST = 16
# Partial gradients of a column block cost about as much as two of its columns.
BLOCK_COST = 2
# Idle columns that a wider program may have, relative to a one-warp program.
MAX_WIDTH_WASTE = 1.06
# Entries of all confusion tables together: 32 MiB of int32.
MAX_TABLE_ENTRIES = 8 * 2**20
MAX_TABLES = 4096
# Pixels that share one confusion table; fewer tables than that only collide more often.
PIXELS_PER_TABLE = 1024


@dataclass(frozen=True)
class UpsampleConfig:
    """How output pixels are laid out over programs.

    Attributes:
        rows: output rows of a program, a power of two; all in one cell, walked by every thread.
        cols: output columns (slots) of a program; one thread for each.
        block_cols: slots of a column block, a power of two that divides `cols`; a block lies in one
            cell. 0 where columns are taken as they come, which only kernels without partial
            gradients can do.
        num_warps: cols / 32.
    """

    rows: int
    cols: int
    block_cols: int
    num_warps: int

    @property
    def col_blocks(self) -> int:
        """Column blocks of a program."""
        return self.cols // self.block_cols


def forward_config(
    in_size: tuple[int, int], out_size: tuple[int, int], align_corners: bool
) -> UpsampleConfig:
    """Configuration of the kernels that only read low-resolution logits."""
    rows = _rows(in_size[0], out_size[0], align_corners)
    warps = _num_warps(out_size[1])
    return UpsampleConfig(rows, warps * WARP, 0, warps)


def gradient_config(
    in_size: tuple[int, int], out_size: tuple[int, int], align_corners: bool
) -> UpsampleConfig:
    """Configuration of the kernel that also sums gradients over cells."""
    rows = _rows(in_size[0], out_size[0], align_corners)
    block, slots = _block_cols(in_size[1], out_size[1], align_corners)
    warps = _num_warps(slots)
    return UpsampleConfig(rows, warps * WARP, block, warps)


def num_confusion_tables(num_classes: int, pixels: int) -> int:
    """Number of [C, C] tables that the counts are spread over: a power of two, at least 1."""
    tables = min(MAX_TABLES, MAX_TABLE_ENTRIES // num_classes**2, pixels // PIXELS_PER_TABLE)
    return 1 << max(tables, 1).bit_length() - 1


@lru_cache(maxsize=512)
def _rows(in_size: int, out_size: int, align_corners: bool) -> int:
    """Rows of a program: the power of two with the least work, idle rows included."""

    def cost(rows: int, blocks: int) -> float:
        return blocks * rows * (ARITHMETIC_COST + LOAD_COST / rows)

    return _best(in_size, out_size, align_corners, MAX_ROWS, cost)[0]


@lru_cache(maxsize=512)
def _block_cols(in_size: int, out_size: int, align_corners: bool) -> tuple[int, int]:
    """(slots of a column block, slots of all blocks)."""

    def cost(cols: int, blocks: int) -> float:
        return blocks * (cols + BLOCK_COST)

    block, blocks = _best(in_size, out_size, align_corners, MAX_BLOCK_COLS, cost)
    return block, block * blocks


def _best(in_size, out_size, align_corners, limit, cost) -> tuple[int, int]:
    """The block size, a power of two up to `limit`, of least cost, and its number of blocks."""
    counts = cell_counts(source_index(in_size, out_size, align_corners)[0], in_size)
    sizes = [1 << k for k in range(limit.bit_length())]
    blocks = {size: int((-(-counts // size)).sum()) for size in sizes}
    best = min(sizes, key=lambda size: (cost(size, blocks[size]), -size))
    return best, blocks[best]


def _num_warps(slots: int) -> int:
    """The widest program of 4, 2 or 1 warps that leaves few columns idle."""
    least = -(-slots // WARP) * WARP
    for warps in (4, 2):
        width = warps * WARP
        if -(-slots // width) * width <= MAX_WIDTH_WASTE * least:
            return warps
    return 1


def forward_candidates() -> list[UpsampleConfig]:
    """Configurations to measure of kernels without partial gradients: rows and warps."""
    return [
        UpsampleConfig(rows, warps * WARP, 0, warps)
        for rows in (1, 2, 4, 8, 16)
        for warps in (1, 2, 4, 8)
    ]


def gradient_candidates() -> list[UpsampleConfig]:
    """Configurations to measure of the kernel that sums gradients: a block lies within a warp."""
    return [
        UpsampleConfig(rows, warps * WARP, block, warps)
        for rows in (2, 4, 8)
        for block in (2, 4, 8, 16)
        for warps in (1, 2, 4)
    ]


# Matrix products: the ASPP branches, the projection, 1x1 convolutions.

MMA_16BIT = "16-bit"
MMA_TF32 = "tf32"
FMA_FP32 = "fp32"
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


def asynchronous(capability: tuple[int, int]) -> bool:
    """Whether tensor cores read operands from shared memory while the next ones arrive there, as
    from 9.0 on; those of 12.0 take them from registers, as before."""
    return (9, 0) <= capability < (12, 0)


def device_like(properties: Any) -> Device:
    """The device that `torch.cuda.get_device_properties` describes."""
    return Device(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


@dataclass(frozen=True)
class GemmConfig:
    """Tile and pipeline of a matrix product [pixels, channels] x [channels, filters].

    Attributes:
        block_m, block_n, block_c: pixels, filters and input channels of a tile, powers of two.
        num_warps: warps of a thread block.
        num_stages: chunks of channels in flight, plus the one in use.
        occupancy: thread blocks that a multiprocessor must hold at once.
        split: cut tiles into parts where programs would run out of them (aspp_tiles.schedule).
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    occupancy: int
    split: bool = False

    @property
    def max_registers(self) -> int:
        """Registers of a thread with which `occupancy` blocks fit."""
        most = REGISTERS // (self.num_warps * WARP * self.occupancy)
        return min(most // 8 * 8, MAX_REGISTERS)

    @property
    def register_limit(self) -> int | None:
        """What to tell the compiler; None where its own limit is the same."""
        return self.max_registers if self.max_registers < MAX_REGISTERS else None

    def shared_bytes(self, itemsize: int, capability: tuple[int, int]) -> int:
        """Shared memory of a block: the stages. Asynchronous tensor cores read one while the next
        ones arrive; elsewhere operands are in registers by then, which leaves one stage fewer."""
        stages = self.num_stages if asynchronous(capability) else self.num_stages - 1
        return stages * (self.block_m + self.block_n) * self.block_c * itemsize

    def is_legal(self, itemsize: int, device: Device) -> bool:
        """Whether `occupancy` blocks fit into a multiprocessor's shared memory."""
        block = self.shared_bytes(itemsize, device.capability) + SHARED_RESERVE
        return block * self.occupancy <= device.shared


def gemm_candidates(
    math: str, device: Device, filters: int | None = None, aligned: bool = True
) -> list[GemmConfig]:
    """Legal configurations without split, for a matrix product in this arithmetic.

    Args:
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        filters: leave out tiles of more filters than the next power of two.
        aligned: operands and result allow accesses of 16 bytes.
    """
    itemsize = 2 if math == MMA_16BIT else 4
    table: _Table
    if not aligned:
        table = _UNALIGNED
    elif math == FMA_FP32:
        table = _FMA
    elif not asynchronous(device.capability):
        table = _MMA_SM80
    else:
        table = _MMA_SM90 if device.capability < (10, 0) else _MMA_SM100
    found = []
    for block_m, block_n, chunk_bytes, num_warps, num_stages, occupancy in table:
        block_c = chunk_bytes // itemsize
        config = GemmConfig(block_m, block_n, block_c, num_warps, num_stages, occupancy)
        if config.is_legal(itemsize, device):
            found.append(config)
    if filters is not None:
        widest = max(1 << (filters - 1).bit_length(), min(c.block_n for c in found))
        found = [c for c in found if c.block_n <= widest]
    return found


_Table = tuple[tuple[int, int, int, int, int, int], ...]
# block_m, block_n, bytes of a pixel's chunk of channels, num_warps, num_stages, occupancy. A chunk
# of 128 bytes is a cache line, and the widest that shared memory swizzles. Of an accumulator a
# thread holds block_m block_n / (32 num_warps) registers: 128 fit beside the rest on 9.0, where the
# operands stay in shared memory, 64 before. tests/aot compiles all of them.
_MMA_SM90: _Table = (
    (128, 256, 128, 8, 4, 1),
    (128, 128, 128, 4, 3, 2),
    (64, 256, 128, 4, 2, 2),
    (64, 128, 128, 4, 4, 2),
    (64, 64, 128, 4, 4, 3),
)
# Tensor cores of 10.0 keep the accumulator in a memory of its own; to store it a thread loads its
# part whole, and 128 registers of it spilled.
_MMA_SM100: _Table = (
    (128, 128, 128, 8, 4, 1),
    (64, 256, 128, 8, 3, 1),
    (64, 128, 128, 4, 4, 2),
    (64, 64, 128, 4, 4, 3),
)
_MMA_SM80: _Table = (
    (128, 128, 128, 8, 4, 1),
    (64, 256, 128, 8, 3, 1),
    (64, 128, 128, 4, 3, 2),
    (64, 64, 128, 4, 4, 3),
)
_FMA: _Table = ((64, 64, 128, 4, 3, 2),)
# Copies of less than 4 bytes do not exist: operands then pass through registers.
_UNALIGNED: _Table = ((64, 64, 64, 4, 3, 2),)

# The rules below were compared with a model of times (bench/NOTES.md, 2026-11-27), not on a GPU.
# Tiles of a program: with fewer, programs wait for the longest, and tiles are cut.
FEW_TILES = 3
# Iterations of a tile of the gradient to filters: with fewer, adding up its parts takes too long.
LONG_TILE = 24


def aspp_branches_config(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    math: str,
    device: Device,
    aligned: bool = True,
) -> GemmConfig:
    """The measured configuration, else the first candidate, cut where programs have few tiles.

    Args:
        batch, height, width, channels: the input map.
        branches: the branches.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
    """
    shape = (batch, height, width, channels, branches, math)
    config = tuned_config("aspp_branches", BranchesKey(*shape, aligned), device)
    return config or branches_rule(*shape, device, aligned)


@lru_cache(maxsize=512)
def branches_rule(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    math: str,
    device: Device,
    aligned: bool,
) -> GemmConfig:
    filters = max(b.channels for b in branches)
    config = gemm_candidates(math, device, filters, aligned)[0]
    shape = (batch, height, width, channels, branches)
    tiles, _ = aspp_tiles.tile_counts(*shape, config.block_m, config.block_n, config.block_c)
    return replace(config, split=_are_few(tiles, config, device))


@lru_cache(maxsize=512)
def aspp_dgrad_config(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    math: str,
    device: Device,
    aligned: bool = True,
) -> GemmConfig:
    """The configuration of the gradient to the branches' input: the first candidate, cut where
    programs have few tiles.

    Tiles are pixels by input channels, `block_c` filters are summed at a time. Arguments as for
    `aspp_branches_config`.
    """
    shape = (batch, height, width, channels, branches)
    config = aspp_dgrad_candidates(math, device, channels, aligned)[0]
    tiles, _ = aspp_tiles.dgrad_tile_counts(*shape, config.block_m, config.block_n, config.block_c)
    return replace(config, split=_are_few(tiles, config, device))


def _are_few(tiles: int, config: GemmConfig, device: Device) -> bool:
    return tiles < FEW_TILES * device.multiprocessors * config.occupancy


@lru_cache(maxsize=512)
def aspp_wgrad_config(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    math: str,
    device: Device,
    aligned: bool = True,
) -> GemmConfig:
    """The configuration of the gradients to the branches' filters: the first candidate that is no
    taller than the filters need, cut where its tiles are long.

    Tiles are filters by input channels, `block_c` pixels are summed at a time. They are alike: cut,
    all programs end together, however many tiles there are. Arguments as for
    `aspp_branches_config`.
    """
    shape = (batch, height, width, channels, branches)
    tallest = max(64, *(b.channels for b in branches))
    found = gemm_candidates(math, device, channels, aligned)
    config = next(c for c in found if c.block_m < 2 * tallest)
    blocks = (config.block_m, config.block_n, config.block_c)
    tiles, iterations = aspp_tiles.wgrad_tile_counts(*shape, *blocks)
    return replace(config, split=iterations >= LONG_TILE * tiles)


def aspp_branches_candidates(
    math: str, device: Device, filters: int | None = None, aligned: bool = True
) -> list[GemmConfig]:
    """Legal configurations of aspp_branches, whole tiles first; arguments as gemm_candidates."""
    whole = gemm_candidates(math, device, filters, aligned)
    return whole + [replace(config, split=True) for config in whole]


def aspp_dgrad_candidates(
    math: str, device: Device, filters: int | None = None, aligned: bool = True
) -> list[GemmConfig]:
    """Legal configurations of the gradient to the branches' input, whole tiles first.

    Its threads keep the places of their pixels through the main loop: 4 warps whose accumulators
    take 128 registers have none left. Where the tile has 64 rows for each of two groups of 4 warps
    they run it, else it is left out. Those two groups have no registers to spare for columns beyond
    the last where a multiprocessor holds two blocks; it then gets one. Arguments as
    gemm_candidates.
    """
    whole = []
    for config in gemm_candidates(math, device, filters, aligned):
        if config.block_m * config.block_n < 128 * 32 * config.num_warps or config.num_warps > 4:
            whole.append(config)
        elif config.block_m >= 128:
            even = filters is None or filters % config.block_n == 0
            occupancy = config.occupancy if even else 1
            whole.append(replace(config, num_warps=8, occupancy=occupancy))
    return whole + [replace(config, split=True) for config in whole]


def pointwise_config(
    groups: int,
    pixels: int,
    channels: int,
    filters: int,
    math: str,
    device: Device,
    aligned: bool = True,
    classes: bool = False,
    residual: bool = False,
) -> GemmConfig:
    """The measured configuration, else the first candidate with a tile for every other
    multiprocessor, or the last.

    Args:
        groups, pixels: rows of the product, `pixels` in each of `groups` that share no tile.
        channels, filters: depth and columns of the product.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
        classes: a second product follows, for which a tile must hold all filters.
        residual: one is added; measured configurations depend on it.

    Raises:
        ValueError: no tile holds them.
    """
    shape = (groups, pixels, channels, filters, math)
    key = PointwiseKey(*shape, aligned, classes, residual)
    config = tuned_config("pointwise", key, device)
    return config or pointwise_rule(*shape, device, aligned, classes)


@lru_cache(maxsize=1024)
def pointwise_rule(
    groups: int,
    pixels: int,
    channels: int,
    filters: int,
    math: str,
    device: Device,
    aligned: bool,
    classes: bool,
) -> GemmConfig:
    found = pointwise_candidates(math, device, filters, aligned, classes)
    if not found:
        raise ValueError(
            f"no tile holds {filters} filters and their classes; project first, then classify"
        )
    for config in found:
        tiles = groups * -(-pixels // config.block_m) * -(-filters // config.block_n)
        if 2 * tiles >= device.multiprocessors:
            return config
    return found[-1]


def pointwise_candidates(
    math: str, device: Device, filters: int, aligned: bool = True, classes: bool = False
) -> list[GemmConfig]:
    """Legal configurations of pointwise_config, whose arguments these are; may be none."""
    found = gemm_candidates(math, device, filters, aligned)
    if not classes:
        return found
    # Beside the second product there are no registers for 128 rows of 256 filters, nor for 64 of
    # operands of 4 bytes.
    most = 16384 if math == MMA_16BIT else 8192
    return [c for c in found if c.block_n >= filters and c.block_m * c.block_n <= most]


# Batch norm in training: passes over maps [pixels, channels] that memory bounds.

# What a thread asks for before it waits, and thread blocks that share a multiprocessor: together
# 64 KiB on the way, where 3e12 bytes a second at a delay of 0.8 us need 18 KiB of each of 132.
BYTES_IN_FLIGHT = 128
RESIDENT_BLOCKS = 4
# float32 values of maps that a thread holds, of the 128 registers that RESIDENT_BLOCKS leave it.
MAX_VALUES = 64
MAX_TILE_ROWS = 8
# A row of a tile that is not a whole number of sectors moves bytes that nobody asked for.
TILE_ROW_BYTES = (64, 128, 256)
# Tiles of a program: its threads add that many times MAX_TILE_ROWS values one after another.
MAX_TILES = 64
# What a program costs beside its tiles, in tiles; a guess.
PROGRAM_COST = 0.5


@dataclass(frozen=True)
class BatchNormConfig:
    """Tile of a pass over a map [pixels, channels].

    Attributes:
        rows: pixels that a thread takes of a tile, a power of two.
        lanes: pixels that the threads of a block have side by side, a power of two.
        block_c: channels of a tile, a power of two.
        num_warps: warps of a thread block.
        tiles: most tiles of a program, one behind another; 1 in kernels that do not reduce.
    """

    rows: int
    lanes: int
    block_c: int
    num_warps: int
    tiles: int = 1

    @property
    def block_p(self) -> int:
        """Pixels of a tile."""
        return self.rows * self.lanes

    @property
    def max_registers(self) -> int:
        """Registers of a thread with which RESIDENT_BLOCKS fit."""
        return min(REGISTERS // (self.num_warps * WARP * RESIDENT_BLOCKS), MAX_REGISTERS)

    def grid(self, pixels: int, channels: int) -> tuple[int, int, int]:
        """(tiles of pixels, chunks of up to `tiles` of them, tiles of channels)."""
        tiles = -(-pixels // self.block_p)
        return tiles, -(-tiles // self.tiles), -(-channels // self.block_c)

    def is_legal(self, vector: int, maps: int) -> bool:
        """Whether threads share out a row of a tile evenly, and their values fit into registers.

        Args:
            vector: channels that a thread reads at a time.
            maps: maps that are read.
        """
        sizes = (self.rows, self.lanes, self.block_c, self.num_warps)
        return (
            all(size > 0 and size & (size - 1) == 0 for size in sizes)
            and self.lanes * self.block_c == self.num_warps * WARP * vector
            and self.rows * vector * maps <= MAX_VALUES
            and 1 <= self.tiles <= MAX_TILES
        )


@lru_cache(maxsize=1024)
def batch_norm_config(
    pixels: int,
    channels: int,
    maps: int,
    vector: int,
    itemsize: int,
    device: Device,
    reduces: bool,
) -> BatchNormConfig:
    """The configuration of a pass over maps [pixels, channels].

    Args:
        pixels, channels: of each map, at least 1.
        maps: maps that are read.
        vector: channels that a thread reads at a time.
        itemsize: bytes of an element.
        device: the GPU.
        reduces: the pass sums over pixels.
    """
    num_warps = 4
    block_c = _channel_block(channels, vector, itemsize)
    lanes = num_warps * WARP * vector // block_c
    rows = min(BYTES_IN_FLIGHT // (itemsize * vector * maps), MAX_VALUES // (vector * maps))
    rows = min(max(rows, 1), MAX_TILE_ROWS, -(-pixels // lanes))
    # The next power of two for few pixels, the one before for registers.
    rows = 1 << (rows - 1).bit_length() if rows * lanes >= pixels else 1 << rows.bit_length() - 1
    config = BatchNormConfig(rows, lanes, block_c, num_warps)
    return _with_tiles(config, pixels, channels, device) if reduces else config


def batch_norm_candidates(
    pixels: int,
    channels: int,
    maps: int,
    vector: int,
    itemsize: int,
    device: Device,
    reduces: bool,
) -> list[BatchNormConfig]:
    """Legal configurations to measure; arguments as batch_norm_config."""
    found = []
    widest = 1 << (channels - 1).bit_length()
    blocks = {max(min(size // itemsize, widest), vector) for size in TILE_ROW_BYTES}
    for block_c in sorted(blocks):
        for num_warps in (2, 4, 8):
            lanes = num_warps * WARP * vector // block_c
            for rows in (1, 2, 4, 8):
                config = BatchNormConfig(rows, lanes, block_c, num_warps)
                if not config.is_legal(vector, maps):
                    continue
                best = _with_tiles(config, pixels, channels, device) if reduces else config
                others = {best.tiles // 2, best.tiles, best.tiles * 2} if reduces else {1}
                found += [replace(config, tiles=t) for t in sorted(others) if 1 <= t <= MAX_TILES]
    return found


def _channel_block(channels: int, vector: int, itemsize: int) -> int:
    """Channels of a tile: of rows of 128 and of 64 bytes those that leave fewer channels idle."""
    widest = 1 << (channels - 1).bit_length()
    longest, half = (max(min(size // itemsize, widest), vector) for size in (128, 64))
    idle = {block: -(-channels // block) * block for block in (longest, half)}
    return longest if idle[longest] <= idle[half] else half


def _with_tiles(
    config: BatchNormConfig, pixels: int, channels: int, device: Device
) -> BatchNormConfig:
    """The number of tiles of a program for which all programs are done first."""
    slots = device.multiprocessors * RESIDENT_BLOCKS
    tiles, _, tiles_c = config.grid(pixels, channels)
    most = min(MAX_TILES, -(-tiles * tiles_c // slots) + 1)

    def seconds(each: int) -> float:
        waves = -(-(-(-tiles // each) * tiles_c) // slots)
        return waves * (each + PROGRAM_COST)

    return replace(config, tiles=min(range(1, most + 1), key=seconds))


# Measured configurations: what a call is looked up by, and what may be found.


@dataclass(frozen=True)
class UpsampleKey:
    """A call of an upsampling kernel.

    Attributes:
        n, classes: of the logits.
        in_size, out_size: (rows, columns) of the logits and of the result.
        align_corners: as in torch.nn.functional.interpolate.
        dtype: of the logits.
    """

    n: int
    classes: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    align_corners: bool
    dtype: str


@dataclass(frozen=True)
class BranchesKey:
    """A call of aspp_branches; attributes as the arguments of `aspp_branches_config`. float16 and
    bfloat16 are one arithmetic."""

    batch: int
    height: int
    width: int
    channels: int
    branches: tuple[Branch, ...]
    math: str
    aligned: bool


@dataclass(frozen=True)
class PointwiseKey:
    """A product of aspp_project or of a 1x1 convolution; attributes as the arguments of
    `pointwise_config`."""

    groups: int
    pixels: int
    channels: int
    filters: int
    math: str
    aligned: bool
    classes: bool
    residual: bool


def _shared_memory_problem(key: Any, config: GemmConfig, device: Device) -> str:
    itemsize = 2 if key.math == MMA_16BIT else 4
    if config.is_legal(itemsize, device):
        return ""
    block = config.shared_bytes(itemsize, device.capability) + SHARED_RESERVE
    return (
        f"{config.occupancy} blocks of {block} bytes of shared memory are more than the "
        f"{device.shared} bytes of a multiprocessor"
    )


_FORWARD = tuned.Tunable(UpsampleKey, UpsampleConfig, lambda key, device: forward_candidates())
_GRADIENT = tuned.Tunable(UpsampleKey, UpsampleConfig, lambda key, device: gradient_candidates())
# By the names of the files. Upsampling kernels are named after their op; its loss alone, without a
# gradient, is a kernel of its own. A product is the same kernel whatever op asks for it.
TUNABLE: dict[str, tuned.Tunable] = {
    "upsample_argmax": _FORWARD,
    "upsample_confusion": _FORWARD,
    "upsample_softmax_add": _FORWARD,
    "upsample_cross_entropy": _GRADIENT,
    "upsample_cross_entropy_forward": _FORWARD,
    "aspp_branches": tuned.Tunable(
        BranchesKey,
        GemmConfig,
        lambda key, device: aspp_branches_candidates(
            key.math, device, max((b.channels for b in key.branches), default=1), key.aligned
        ),
        _shared_memory_problem,
    ),
    "pointwise": tuned.Tunable(
        PointwiseKey,
        GemmConfig,
        lambda key, device: pointwise_candidates(
            key.math, device, key.filters, key.aligned, key.classes
        ),
        _shared_memory_problem,
    ),
}


def tuned_config(kernel: str, key: Any, device: Device) -> Any | None:
    """The measured configuration of a call on a device; None where the one by rule is to run.

    Args:
        kernel: a name of `TUNABLE`.
        key: the call, of that entry's `key`.
        device: the GPU.
    """
    return tuned.find(kernel, TUNABLE[kernel], key, device)


def upsample_config(
    kernel: str,
    shape: Sequence[int],
    out_size: tuple[int, int],
    align_corners: bool,
    dtype: str,
    device: Device,
) -> UpsampleConfig:
    """The measured configuration, else `forward_config`, or `gradient_config` for the kernel that
    also sums gradients.

    Args:
        kernel: a name of `TUNABLE`.
        shape: of the logits, [N, C, h, w].
        out_size: (H, W).
        align_corners: as in torch.nn.functional.interpolate.
        dtype: of the logits, as "bfloat16".
        device: the GPU.
    """
    n, classes, *in_size = shape
    sizes = ((in_size[0], in_size[1]), out_size, bool(align_corners))
    config = tuned_config(kernel, UpsampleKey(n, classes, *sizes, dtype), device)
    if config is not None:
        return config
    return (gradient_config if TUNABLE[kernel] is _GRADIENT else forward_config)(*sizes)
