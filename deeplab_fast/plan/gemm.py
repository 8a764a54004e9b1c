"""Launch configurations of matrix products: the ASPP branches and their gradients, the projection,
1x1 convolutions. `rules.py` chooses among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .device import MAX_REGISTERS, REGISTERS, SHARED_RESERVE, WARP, Device, asynchronous

MMA_16BIT = "16-bit"
MMA_TF32 = "tf32"
FMA_FP32 = "fp32"


@dataclass(frozen=True)
class GemmConfig:
    """Tile and pipeline of a matrix product [pixels, channels] x [channels, filters].

    Attributes:
        block_m, block_n, block_c: pixels, filters and input channels of a tile, powers of two.
        num_warps: warps of a thread block.
        num_stages: chunks of channels in flight, plus the one in use.
        occupancy: thread blocks that a multiprocessor must hold at once.
        split: cut tiles into parts where programs would run out of them (`schedule.schedule`).
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


def pointwise_candidates(
    math: str, device: Device, filters: int, aligned: bool = True, classes: bool = False
) -> list[GemmConfig]:
    """Legal configurations of `rules.PointwiseKey`, whose attributes these are; may be none."""
    found = gemm_candidates(math, device, filters, aligned)
    if not classes:
        return found
    # Beside the second product there are no registers for 128 rows of 256 filters, nor for 64 of
    # operands of 4 bytes.
    most = 16384 if math == MMA_16BIT else 8192
    return [c for c in found if c.block_n >= filters and c.block_m * c.block_n <= most]
