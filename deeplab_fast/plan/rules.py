"""The short rules that choose launch configurations of matrix products.

They were compared with a model of times (bench/NOTES.md, 2026-11-27), not on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .device import SHARED_RESERVE, Device
from .gemm import (
    MMA_16BIT,
    GemmConfig,
    aspp_branches_candidates,
    aspp_dgrad_candidates,
    gemm_candidates,
    pointwise_candidates,
)
from .gradients import dgrad_tile_counts, wgrad_tile_counts
from .schedule import tile_counts
from .taps import Problem
from .tunable import Tunable

# Tiles of a program: with fewer, programs wait for the longest, and tiles are cut.
FEW_TILES = 3
# Iterations of a tile of the gradient to filters: with fewer, adding up its parts takes too long.
LONG_TILE = 24


@dataclass(frozen=True)
class BranchesKey(Problem):
    """A call of the branches' product or of its gradients; float16 and bfloat16 are one arithmetic.

    Attributes:
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        aligned: operands and result allow accesses of 16 bytes.
    """

    math: str
    aligned: bool = True


@dataclass(frozen=True)
class PointwiseKey:
    """A product of aspp_project or of a 1x1 convolution.

    Attributes:
        groups, pixels: rows of the product, `pixels` in each of `groups` that share no tile.
        channels, filters: depth and columns of the product.
        math, aligned: as for `BranchesKey`.
        classes: a second product follows, for which a tile must hold all filters.
        residual: one is added; measured configurations depend on it, the rule does not.
    """

    groups: int
    pixels: int
    channels: int
    filters: int
    math: str
    aligned: bool = True
    classes: bool = False
    residual: bool = False


@lru_cache(maxsize=512)
def branches_rule(key: BranchesKey, device: Device) -> GemmConfig:
    """The first candidate, cut where programs have few tiles."""
    config = _branches_candidates(key, device)[0]
    return replace(config, split=_are_few(tile_counts(key, config)[0], config, device))


@lru_cache(maxsize=512)
def dgrad_rule(key: BranchesKey, device: Device) -> GemmConfig:
    """Of the gradient to the branches' input: the first candidate, cut where programs have few
    tiles.

    Tiles are pixels by input channels, `block_c` filters are summed at a time.
    """
    config = aspp_dgrad_candidates(key.math, device, key.channels, key.aligned)[0]
    return replace(config, split=_are_few(dgrad_tile_counts(key, config)[0], config, device))


def _are_few(tiles: int, config: GemmConfig, device: Device) -> bool:
    return tiles < FEW_TILES * device.multiprocessors * config.occupancy


@lru_cache(maxsize=512)
def wgrad_rule(key: BranchesKey, device: Device) -> GemmConfig:
    """Of the gradients to the branches' filters: the first candidate that is no taller than the
    filters need, cut where its tiles are long.

    Tiles are filters by input channels, `block_c` pixels are summed at a time. They are alike: cut,
    all programs end together, however many tiles there are.
    """
    tallest = max(64, *(b.channels for b in key.branches))
    found = gemm_candidates(key.math, device, key.channels, key.aligned)
    config = next(c for c in found if c.block_m < 2 * tallest)
    tiles, iterations = wgrad_tile_counts(key, config)
    return replace(config, split=iterations >= LONG_TILE * tiles)


@lru_cache(maxsize=1024)
def pointwise_rule(key: PointwiseKey, device: Device) -> GemmConfig:
    """The first candidate with a tile for every other multiprocessor, or the last.

    Raises:
        ValueError: no tile holds all filters and their classes.
    """
    found = _pointwise_candidates(key, device)
    if not found:
        raise ValueError(
            f"no tile holds {key.filters} filters and their classes; project first, then classify"
        )
    for config in found:
        rows, columns = -(-key.pixels // config.block_m), -(-key.filters // config.block_n)
        if 2 * key.groups * rows * columns >= device.multiprocessors:
            return config
    return found[-1]


def _branches_candidates(key: BranchesKey, device: Device) -> list[GemmConfig]:
    filters = max((b.channels for b in key.branches), default=1)
    return aspp_branches_candidates(key.math, device, filters, key.aligned)


def _pointwise_candidates(key: PointwiseKey, device: Device) -> list[GemmConfig]:
    return pointwise_candidates(key.math, device, key.filters, key.aligned, key.classes)


def _shared_memory_problem(
    key: BranchesKey | PointwiseKey, config: GemmConfig, device: Device
) -> str:
    itemsize = 2 if key.math == MMA_16BIT else 4
    if config.is_legal(itemsize, device):
        return ""
    block = config.shared_bytes(itemsize, device.capability) + SHARED_RESERVE
    return (
        f"{config.occupancy} blocks of {block} bytes of shared memory are more than the "
        f"{device.shared} bytes of a multiprocessor"
    )


# A product is the same kernel whatever op asks for it.
BRANCHES = Tunable(
    "aspp_branches",
    BranchesKey,
    GemmConfig,
    _branches_candidates,
    branches_rule,
    _shared_memory_problem,
)
POINTWISE = Tunable(
    "pointwise",
    PointwiseKey,
    GemmConfig,
    _pointwise_candidates,
    pointwise_rule,
    _shared_memory_problem,
)
