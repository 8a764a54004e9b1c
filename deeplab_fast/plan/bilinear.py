"""Index arithmetic of bilinear upsampling, once per axis, on the host.

The arithmetic is that of torch.nn.functional.interpolate(mode="bilinear") for float32 (and, since
half precision is interpolated in float32, for float16 and bfloat16). Output index d of an axis that
goes from `in_size` to `out_size` reads the source position

    align_corners:  s = d * scale,                      scale = (in_size - 1) / (out_size - 1)
    otherwise:      s = max(0, (d + 1/2) * scale - 1/2), scale = in_size / out_size

and with low = floor(s), lam = s - low, high = min(low + 1, in_size - 1) the value is
(1 - lam) x[low] + lam x[high]. Every step is rounded to float32 as PyTorch's is; the product and
the subtraction of the second form are one fused multiply-add, as compilers make of them for
processors that have it. Without it some lam differ by an ulp of s.

All outputs with the same `low` interpolate between the same two inputs. `low` never decreases, so
they are consecutive: they form the cell of that input. Cells are cut into blocks of at most
`block` outputs; kernels take whole blocks, whatever the ratio, so that one block never straddles
two cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class AxisTables:
    """Index tables of one axis.

    Attributes:
        low: [out_size] int32, lower source index of each output.
        lam: [out_size] float32, weight of the upper source index, in [0, 1].
        first: [blocks + 1] int32, first output of each block; the next entry is its end.
        block_low: [blocks] int32, lower source index that all outputs of a block share.
        block_start: [in_size + 1] int32, first block of each cell; the next entry is its end.
    """

    low: Int32
    lam: Float32
    first: Int32
    block_low: Int32
    block_start: Int32

    @property
    def num_blocks(self) -> int:
        return len(self.block_low)

    @property
    def most_blocks_touching(self) -> int:
        """The most blocks that read one source index: those of its cell and of the one before."""
        start = self.block_start
        return int((start[1:] - start[np.maximum(np.arange(len(start) - 1) - 1, 0)]).max())


def source_index(in_size: int, out_size: int, align_corners: bool) -> tuple[Int32, Float32]:
    """(low, lam) of every output of an axis, as described above.

    Raises:
        ValueError: a size below 1.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"sizes must be at least 1, got {in_size} -> {out_size}")
    one = np.float32(1)
    output = np.arange(out_size)
    if in_size == out_size:
        return output.astype(np.int32), np.zeros(out_size, np.float32)
    if align_corners:
        scale = np.float32(in_size - 1) / np.float32(out_size - 1) if out_size > 1 else one * 0
        source = scale * output.astype(np.float32)
    else:
        scale = np.float32(in_size) / np.float32(out_size)
        # Exact in float64, so that the cast is the fused multiply-add's one rounding.
        source = (np.float64(scale) * (output + 0.5) - 0.5).astype(np.float32)
        source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int32), in_size - 1)
    lam = np.clip(source - low.astype(np.float32), np.float32(0), one)
    return low.astype(np.int32), lam.astype(np.float32)


def cell_counts(low: Int32, in_size: int) -> Int32:
    """[in_size] number of outputs in the cell of each source index."""
    return np.bincount(low, minlength=in_size).astype(np.int32)


@lru_cache(maxsize=512)
def axis_tables(in_size: int, out_size: int, align_corners: bool, block: int) -> AxisTables:
    """The tables of an axis whose blocks hold at most `block` outputs."""
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    low, lam = source_index(in_size, out_size, align_corners)
    counts = cell_counts(low, in_size)
    blocks_per_cell = -(-counts // block)
    block_start = np.concatenate(([0], np.cumsum(blocks_per_cell))).astype(np.int32)
    block_low = np.repeat(np.arange(in_size, dtype=np.int32), blocks_per_cell)
    cell_first = np.cumsum(counts) - counts
    within_cell = np.arange(len(block_low)) - block_start[block_low]
    first = np.append(cell_first[block_low] + within_cell * block, out_size).astype(np.int32)
    return AxisTables(low, lam, first, block_low, block_start)
