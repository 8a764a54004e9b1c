"""Launch configurations of the Triton kernels, chosen by analytic models, without Triton.

Nothing is tuned at run time: a choice depends on the sizes of the call alone, so that results are
the same from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..ops.aspp_tiles import Branch
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
    """What a choice of configuration and the time model know of a GPU.

    Attributes:
        name: for messages.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        clock: boost clock, Hz.
        flops_16bit, flops_tf32, flops_fp32: FLOP per multiprocessor and clock of dense products, of
            the tensor cores and, for fp32, of the ordinary ones.
        dram, l2: bytes per second that the memory and the second-level cache deliver.
        shared: bytes of shared memory that the blocks of a multiprocessor have together.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    flops_16bit: int
    flops_tf32: int
    flops_fp32: int
    dram: float
    l2: float
    shared: int

    def flops(self, math: str) -> float:
        """FLOP per second of a multiprocessor, for MMA_16BIT, MMA_TF32 or FMA_FP32."""
        each = {
            MMA_16BIT: self.flops_16bit,
            MMA_TF32: self.flops_tf32,
            FMA_FP32: self.flops_fp32,
        }
        return each[math] * self.clock


# Peaks of the makers' data sheets, from which clock and FLOP are derived; the rates of L2 are what
# matrix products in print reach divided by the bytes that their tiles read: 600 TFLOP/s with tiles
# of 128x256 on an H100, 240 TFLOP/s with 128x128 on an A100.
H100 = Device(
    name="H100",
    capability=(9, 0),
    multiprocessors=132,
    clock=1.83e9,
    flops_16bit=4096,
    flops_tf32=2048,
    flops_fp32=256,
    dram=3.0e12,
    l2=7.0e12,
    shared=228 * 1024,
)
A100 = Device(
    name="A100",
    capability=(8, 0),
    multiprocessors=108,
    clock=1.41e9,
    flops_16bit=2048,
    flops_tf32=1024,
    flops_fp32=128,
    dram=1.9e12,
    l2=3.8e12,
    shared=164 * 1024,
)


def nominal_device(capability: tuple[int, int] | None) -> Device:
    """The device that stands for a compute capability; H100 where there is none (interpreter)."""
    return H100 if capability is None or (9, 0) <= capability < (12, 0) else A100


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
        """Shared memory of a block: the stages. Asynchronous tensor cores read a stage while the
        next ones arrive; before capability 9.0 operands are in registers by then, which leaves one
        stage fewer."""
        stages = self.num_stages if capability >= (9, 0) else self.num_stages - 1
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
    else:
        table = _MMA_SM90 if (9, 0) <= device.capability < (12, 0) else _MMA_SM80
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
_MMA_SM80: _Table = (
    (128, 128, 128, 8, 4, 1),
    (64, 256, 128, 8, 3, 1),
    (64, 128, 128, 4, 3, 2),
    (64, 64, 128, 4, 4, 3),
)
_FMA: _Table = ((64, 64, 128, 4, 3, 2),)
# Copies of less than 4 bytes do not exist: operands then pass through registers.
_UNALIGNED: _Table = ((64, 64, 64, 4, 3, 2),)


@lru_cache(maxsize=512)
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
    """The configuration of least predicted time (`time_model.branches_seconds`).

    Args:
        batch, height, width, channels: the input map.
        branches: the branches.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
    """
    from . import time_model

    shape = (batch, height, width, channels, branches)
    filters = max(b.channels for b in branches)
    candidates = [
        (time_model.branches_floor(*shape, config, math, device), order, config)
        for order, config in enumerate(aspp_branches_candidates(math, device, filters, aligned))
    ]
    best, least = None, float("inf")
    # Tile lists of large batches take long to make; most candidates cannot win.
    for floor, _, config in sorted(candidates, key=lambda c: c[:2]):
        if floor >= least:
            break
        seconds = time_model.branches_seconds(*shape, config, math, device).seconds
        if seconds < least:
            best, least = config, seconds
    assert best is not None
    return best


def aspp_branches_candidates(
    math: str, device: Device, filters: int | None = None, aligned: bool = True
) -> list[GemmConfig]:
    """Legal configurations of aspp_branches, whole tiles first; arguments as gemm_candidates."""
    whole = gemm_candidates(math, device, filters, aligned)
    return whole + [replace(config, split=True) for config in whole]


@lru_cache(maxsize=1024)
def pointwise_config(
    groups: int,
    pixels: int,
    channels: int,
    filters: int,
    math: str,
    device: Device,
    aligned: bool = True,
    classes: bool = False,
) -> GemmConfig:
    """The configuration of least predicted time (`time_model.pointwise_seconds`).

    Args:
        groups, pixels: rows of the product, `pixels` in each of `groups` that share no tile.
        channels, filters: depth and columns of the product.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
        classes: a second product follows, for which a tile must hold all filters.

    Raises:
        ValueError: no tile holds them.
    """
    from . import time_model

    found = gemm_candidates(math, device, filters, aligned)
    if classes:
        # Beside the second product there are no registers for 128 rows of 256 filters.
        found = [c for c in found if c.block_n >= filters and c.block_m * c.block_n <= 16384]
        if not found:
            raise ValueError(
                f"no tile holds {filters} filters and their classes; project first, then classify"
            )
    shape = (groups, pixels, channels, filters)
    return min(
        found, key=lambda config: time_model.pointwise_seconds(*shape, config, math, device).seconds
    )
