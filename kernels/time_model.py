"""How long a kernel should take, from its tiles, waves and bytes; nothing here is measured.

A thread block runs the iterations of its tiles one behind the other. On a multiprocessor that holds
R of them an iteration takes

    t = R max(2 M N C / (F MMA_EFFICIENCY), (M + N) C itemsize / b)

for a tile of M x N and a chunk of C channels: the tensor cores on one side, operands that arrive
from the second-level cache on the other. b is L2 / (busy multiprocessors), at most PORT clock.
Every tile also costs START, to fill the pipeline and to drain it, during which another resident
block may compute. The call takes

    launches LAUNCH + max(longest iterations t + most tiles START, bytes / DRAM) + reduction

where `longest` belongs to the program with most iterations: for whole tiles that is the wave
quantisation. Bytes are those that move when each tensor is read or written once; the reduction
writes and reads the partial sums of cut tiles through the second-level cache.

What PyTorch does without these kernels is modelled alike: every tap of every pixel, one launch for
each branch, tiles of 128x256 in whole waves, and the passes of what is not fused.

    print(predict(desc))          # desc: backends.OpDesc of the call, as ops.describe makes it

Rates are those of `configs.Device`. MMA_EFFICIENCY, START and LAUNCH are assumed; measurements on a
GPU are to replace them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..backends import OpDesc
from ..ops import aspp_tiles
from ..ops.aspp_tiles import Branch
from . import configs
from .configs import FMA_FP32, MMA_16BIT, MMA_TF32, Device, GemmConfig

# Of the tensor cores' peak at boost clock: power and the gaps between instructions.
MMA_EFFICIENCY = 0.7
# Two trips to memory to fill a pipeline, and the store of a tile.
START = 2e-6
# From the end of one kernel to the start of the next in a stream that is never empty.
LAUNCH = 2e-6
# Bytes per clock that a multiprocessor takes from the second-level cache.
PORT = 64
_BASELINE_TILE = (128, 256)


@dataclass(frozen=True)
class Prediction:
    """The model's answer for one call.

    Attributes:
        seconds: of the call.
        what: the op and its configuration.
        tiles, programs: tiles of the call, and thread blocks that run them.
        waves: rounds of programs, as the mean number of tiles of a program.
        balance: iterations of an average program over those of the longest.
        dense_macs: multiply-adds with every tap of every pixel.
        live_macs: those whose tap is inside the map.
        macs: those that are done, in tiles with idle rows and columns.
        bytes: read and written, each tensor once.
        partial_bytes: of partial sums, each written and read once.
        mma_seconds, l2_seconds, dram_seconds: of each resource, if it were the only one.
    """

    seconds: float
    what: str
    tiles: int
    programs: int
    waves: float
    balance: float
    dense_macs: int
    live_macs: int
    macs: int
    bytes: int
    partial_bytes: int
    mma_seconds: float
    l2_seconds: float
    dram_seconds: float

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        parts = {"mma": self.mma_seconds, "l2": self.l2_seconds, "dram": self.dram_seconds}
        return max(parts, key=lambda name: parts[name])

    def __str__(self) -> str:
        dense = f"{self.macs / self.dense_macs:.2f}" if self.dense_macs else "none"
        return (
            f"{self.what}: {self.seconds * 1e6:.1f} us predicted, {self.limit} bound (mma "
            f"{self.mma_seconds * 1e6:.1f}, l2 {self.l2_seconds * 1e6:.1f}, dram "
            f"{self.dram_seconds * 1e6:.1f} us), {self.tiles} tiles on {self.programs} programs in "
            f"{self.waves:.1f} waves of balance {self.balance:.2f}, {dense} of the dense "
            f"multiply-adds, {self.bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class _Tiles:
    """How the tiles of a call fall on programs, for `_predict`."""

    tiles: int
    programs: int
    iterations: int
    longest: int
    most_tiles: int


def math_of(dtype: torch.dtype, tf32: bool) -> str:
    """The arithmetic of a product of operands of this dtype."""
    if dtype == torch.float32:
        return MMA_TF32 if tf32 else FMA_FP32
    return MMA_16BIT


def branches_floor(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> float:
    """Seconds below `branches_seconds`, which has the arguments, at little effort."""
    _, iterations = aspp_tiles.tile_counts(
        batch, height, width, channels, branches, config.block_m, config.block_n, config.block_c
    )
    return _floor(iterations, config, math, device)


@lru_cache(maxsize=2048)
def branches_seconds(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> Prediction:
    """The ASPP branches in one launch (and one more that adds the parts of cut tiles).

    Args:
        batch, height, width, channels: the input map.
        branches: the branches.
        config: the configuration.
        math: `configs.MMA_16BIT`, MMA_TF32 or FMA_FP32.
        device: the GPU.
    """
    work = aspp_tiles.schedule(
        batch, height, width, channels, branches,
        config.block_m, config.block_n, config.block_c,
        device.multiprocessors * config.occupancy, config.split,
    )  # fmt: skip
    filters = sum(b.channels for b in branches)
    pixels = batch * height * width
    weights = sum(b.taps * b.channels for b in branches) * channels
    live = aspp_tiles.live_taps(height, width, branches)
    itemsize = _itemsize(math)
    return _predict(
        _Tiles(work.tiles, work.programs, work.iterations, work.longest, work.most_parts),
        config,
        math,
        device,
        f"aspp_branches {_name(config)}",
        dense_macs=pixels * weights,
        live_macs=batch
        * channels
        * sum(n * b.channels for n, b in zip(live, branches, strict=True)),
        moved=itemsize * (pixels * (channels + filters) + weights),
        partial_bytes=4 * config.block_m * config.block_n * work.slots,
    )


def convs_seconds(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> Prediction:
    """The branches in training: `branches_seconds`, which has the arguments, and the statistics.

    The statistics are one launch more, which reads those of all tiles twice.
    """
    shape = (batch, height, width, channels, branches)
    found = branches_seconds(*shape, config, math, device)
    blocks = sum(
        -(-batch * c.pixels // config.block_m) * branches[c.branch].channels
        for c in aspp_tiles.tap_classes(height, width, branches)
    )
    more = LAUNCH + 3 * 8 * blocks / device.l2 if batch else 0.0
    what = f"aspp_convs {_name(config)}"
    return replace(found, seconds=found.seconds + more, what=what)


def dgrad_floor(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> float:
    """Seconds below `dgrad_seconds`, which has the arguments, at little effort."""
    _, iterations = aspp_tiles.dgrad_tile_counts(
        batch, height, width, channels, branches, config.block_m, config.block_n, config.block_c
    )
    return _floor(iterations, config, math, device)


@lru_cache(maxsize=2048)
def dgrad_seconds(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> Prediction:
    """The gradient to the branches' input in one launch; arguments as for branches_seconds."""
    work = aspp_tiles.dgrad_schedule(
        batch, height, width, channels, branches,
        config.block_m, config.block_n, config.block_c,
        device.multiprocessors * config.occupancy, config.split,
    )  # fmt: skip
    shape = (batch, height, width, channels, branches)
    return _gradient(work, "aspp_dgrad", shape, config, math, device)


def wgrad_floor(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> float:
    """Seconds below `wgrad_seconds`, which has the arguments, at little effort."""
    _, iterations = aspp_tiles.wgrad_tile_counts(
        batch, height, width, channels, branches, config.block_m, config.block_n, config.block_c
    )
    return _floor(iterations, config, math, device)


@lru_cache(maxsize=2048)
def wgrad_seconds(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    math: str,
    device: Device,
) -> Prediction:
    """The gradients to the branches' filters in one launch; arguments as for branches_seconds."""
    work = aspp_tiles.wgrad_schedule(
        batch, height, width, channels, branches,
        config.block_m, config.block_n, config.block_c,
        device.multiprocessors * config.occupancy, config.split,
    )  # fmt: skip
    shape = (batch, height, width, channels, branches)
    return _gradient(work, "aspp_wgrad", shape, config, math, device)


def _gradient(
    work: aspp_tiles.Schedule,
    op: str,
    shape: tuple[int, int, int, int, tuple[Branch, ...]],
    config: GemmConfig,
    math: str,
    device: Device,
) -> Prediction:
    """Either gradient: the same three tensors move as in the forward product."""
    batch, height, width, channels, branches = shape
    filters = sum(b.channels for b in branches)
    pixels = batch * height * width
    weights = sum(b.taps * b.channels for b in branches) * channels
    live = aspp_tiles.live_taps(height, width, branches)
    return _predict(
        _Tiles(work.tiles, work.programs, work.iterations, work.longest, work.most_parts),
        config,
        math,
        device,
        f"{op} {_name(config)}",
        dense_macs=pixels * weights,
        live_macs=batch
        * channels
        * sum(n * b.channels for n, b in zip(live, branches, strict=True)),
        moved=_itemsize(math) * (pixels * (channels + filters) + weights),
        partial_bytes=4 * config.block_m * config.block_n * work.slots,
    )


def _floor(iterations: int, config: GemmConfig, math: str, device: Device) -> float:
    each = max(_iteration(config, math, device, device.multiprocessors))
    launches = 2 if config.split else 1
    return launches * LAUNCH + START + iterations * each / device.multiprocessors


@lru_cache(maxsize=2048)
def pointwise_seconds(
    groups: int,
    pixels: int,
    channels: int,
    filters: int,
    config: GemmConfig,
    math: str,
    device: Device,
    extra: int = 0,
) -> Prediction:
    """A product [groups x pixels, channels] x [channels, filters]; groups share no tile.

    Args:
        extra: elements moved beyond the two operands and the result: a residual.
    """
    tiles = groups * -(-pixels // config.block_m) * -(-filters // config.block_n)
    chunks = -(-channels // config.block_c)
    slots = device.multiprocessors * config.occupancy
    waves = -(-tiles // slots)
    macs = groups * pixels * channels * filters
    itemsize = _itemsize(math)
    return _predict(
        _Tiles(tiles, min(tiles, slots), tiles * chunks, waves * chunks, waves),
        config,
        math,
        device,
        f"pointwise {_name(config)}",
        dense_macs=macs,
        live_macs=macs,
        moved=itemsize * (groups * pixels * (channels + filters) + channels * filters + extra),
        partial_bytes=0,
    )


def _predict(
    work: _Tiles,
    config: GemmConfig,
    math: str,
    device: Device,
    what: str,
    *,
    dense_macs: int,
    live_macs: int,
    moved: int,
    partial_bytes: int,
) -> Prediction:
    busy = min(max(work.programs, 1), device.multiprocessors)
    mma, l2 = _iteration(config, math, device, busy)
    each = -(-work.programs // device.multiprocessors) * max(mma, l2)
    dram = moved / device.dram
    seconds = 0.0
    if work.tiles:
        seconds = LAUNCH + max(work.longest * each + work.most_tiles * START, dram)
    if partial_bytes:
        seconds += LAUNCH + 2 * partial_bytes / device.l2
    mean = work.iterations / max(work.programs, 1)
    return Prediction(
        seconds=seconds,
        what=what,
        tiles=work.tiles,
        programs=work.programs,
        waves=work.tiles / max(work.programs, 1),
        balance=mean / max(work.longest, 1),
        dense_macs=dense_macs,
        live_macs=live_macs,
        macs=work.iterations * config.block_m * config.block_n * config.block_c,
        bytes=moved,
        partial_bytes=partial_bytes,
        mma_seconds=work.iterations * mma / busy,
        l2_seconds=work.iterations * l2 / busy,
        dram_seconds=dram,
    )


def _iteration(config: GemmConfig, math: str, device: Device, busy: int) -> tuple[float, float]:
    """Seconds of an iteration on a multiprocessor of its own: (products, operands)."""
    tile = config.block_m * config.block_n * config.block_c
    mma = 2 * tile / (device.flops(math) * MMA_EFFICIENCY)
    loaded = (config.block_m + config.block_n) * config.block_c * _itemsize(math)
    return mma, loaded / min(device.l2 / busy, PORT * device.clock)


def predict(desc: OpDesc, device: Device | None = None, tf32: bool = False) -> Prediction:
    """What the Triton kernel of a call should take, with the configuration that it would choose.

    Args:
        desc: a call of aspp_branches, aspp_convs, aspp_project or conv_bn_act (1x1).
        device: the GPU; None for the one that stands for the call's compute capability.
        tf32: whether fp32 operands may be rounded to TF32.

    Raises:
        ValueError: there is no model of the op, or of this convolution.
    """
    device = device or configs.nominal_device(desc.capability)
    math = math_of(desc.dtype, tf32)
    n, channels, height, width = desc.shape
    if desc.op in ("aspp_branches", "aspp_convs"):
        branches = branches_of(desc)
        shape = (n, height, width, channels, branches)
        aligned = _aligned(math, channels, *(b.channels for b in branches))
        config = configs.aspp_branches_config(*shape, math, device, aligned)
        seconds = branches_seconds if desc.op == "aspp_branches" else convs_seconds
        return seconds(*shape, config, math, device)
    if desc.op == "aspp_project":
        filters = desc.params["outputs"]
        product = (n, height * width, channels, filters)
        aligned = _aligned(math, channels, desc.params["pooled"], filters)
        config = configs.pointwise_config(*product, math, device, aligned)
        return pointwise_seconds(*product, config, math, device)
    if desc.op == "conv_bn_act" and tuple(desc.params["weight"][2:]) == (1, 1):
        rows, cols = (-(-size // desc.params["stride"]) for size in (height, width))
        filters = desc.params["weight"][0]
        product = (1, n * rows * cols, channels, filters)
        extra = n * rows * cols * filters if desc.params["residual"] else 0
        aligned = _aligned(math, channels, filters)
        config = configs.pointwise_config(*product, math, device, aligned)
        return pointwise_seconds(*product, config, math, device, extra)
    raise ValueError(f"there is no time model of {desc.op} with {desc.params}")


def predict_reference(desc: OpDesc, device: Device | None = None, tf32: bool = False) -> float:
    """Seconds of `deeplab_fast.reference`, which computes half precision in fp32.

    Convolutions of fp32 operands over every tap, one behind the other, and a pass over memory for
    each conversion, scale and shift, ReLU, sum and concatenation. aspp_convs runs PyTorch's
    convolutions in the dtype of the call and then its statistics, in fp32.

    Args:
        desc: as for `predict`.
        device: as for `predict`.
        tf32: whether PyTorch's convolutions may round to TF32 (torch.backends.cudnn.allow_tf32).
    """
    device = device or configs.nominal_device(desc.capability)
    math = MMA_TF32 if tf32 else FMA_FP32
    n, channels, height, width = desc.shape
    pixels = n * height * width
    # Read and written by a conversion of x; half precision only.
    halves = [] if desc.dtype == torch.float32 else [pixels * channels]
    if desc.op == "aspp_branches":
        branches = branches_of(desc)
        filters = [b.channels for b in branches]
        products = [(pixels, channels, b.taps, b.channels) for b in branches]
        # Each branch converts x by itself; the concatenation is one more pass over all of them.
        passes = (
            halves * len(branches) + [pixels * k for k in filters] * 3 + [pixels * sum(filters)]
        )
    elif desc.op == "aspp_convs":
        branches = branches_of(desc)
        filters = [b.channels for b in branches]
        products = [(pixels, channels, b.taps, b.channels) for b in branches]
        math = math_of(desc.dtype, tf32)
        # The concatenation, the conversion of half precision, and the statistics, which read.
        size = desc.dtype.itemsize
        moved = 2 * size + (4 if size == 4 else size + 8)
        passes = [pixels * sum(filters) * moved // 8]
    elif desc.op == "aspp_project":
        k = desc.params["outputs"]
        products = [(pixels, channels, 1, k)]
        passes = halves + [pixels * k] * 4
    elif desc.op == "conv_bn_act":
        k, depth, rows, cols = desc.params["weight"]
        out = pixels // desc.params["stride"] ** 2
        products = [(out, depth, rows * cols, k)]
        passes = halves + [out * k] * (4 if desc.params["residual"] else 3)
    else:
        raise ValueError(f"there is no time model of {desc.op}")
    seconds = sum(_dense_seconds(*product, math, device) for product in products)
    return seconds + sum(LAUNCH + 8 * elements / device.dram for elements in passes)


def _dense_seconds(
    pixels: int, channels: int, taps: int, filters: int, math: str, device: Device
) -> float:
    """A convolution over every tap in whole waves of large tiles, as a library runs it."""
    block_m, block_n = _BASELINE_TILE
    waves = -(-(-(-pixels // block_m) * -(-filters // block_n)) // device.multiprocessors)
    rate = device.flops(math) * MMA_EFFICIENCY
    compute = waves * 2 * block_m * block_n * channels * taps / rate
    elements = pixels * (channels + filters) + channels * taps * filters
    return LAUNCH + max(compute, elements * _itemsize(math) / device.dram)


def branches_of(desc: OpDesc) -> tuple[Branch, ...]:
    """The branches of a call of aspp_branches or aspp_convs."""
    weights, dilations = desc.params["weights"], desc.params["dilations"]
    return tuple(Branch(w[0], w[-1], d) for w, d in zip(weights, dilations, strict=True))


def _aligned(math: str, *counts: int) -> bool:
    """Whether accesses of 16 bytes divide all counts of elements."""
    return all(count * _itemsize(math) % 16 == 0 for count in counts)


def _itemsize(math: str) -> int:
    return 2 if math == MMA_16BIT else 4


def _name(config: GemmConfig) -> str:
    cut = " cut" if config.split else ""
    return (
        f"{config.block_m}x{config.block_n}x{config.block_c}, {config.num_warps} warps, "
        f"{config.num_stages} stages, {config.occupancy} blocks{cut}"
    )
