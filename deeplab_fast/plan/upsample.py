"""Launch configurations of the upsampling kernels, chosen by short rules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .bilinear import cell_counts, source_index
from .device import WARP
from .tunable import Tunable

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


def _forward(kernel: str) -> Tunable[UpsampleKey, UpsampleConfig]:
    return Tunable(
        kernel,
        UpsampleKey,
        UpsampleConfig,
        lambda key, device: forward_candidates(),
        lambda key, device: forward_config(key.in_size, key.out_size, key.align_corners),
    )


ARGMAX = _forward("upsample_argmax")
CONFUSION = _forward("upsample_confusion")
SOFTMAX_ADD = _forward("upsample_softmax_add")
# The loss alone is a kernel of its own.
LOSS = _forward("upsample_cross_entropy_forward")
LOSS_AND_GRADIENT = Tunable(
    "upsample_cross_entropy",
    UpsampleKey,
    UpsampleConfig,
    lambda key, device: gradient_candidates(),
    lambda key, device: gradient_config(key.in_size, key.out_size, key.align_corners),
)
