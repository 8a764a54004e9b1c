"""Launch configurations of batch norm in training: passes over maps [pixels, channels] that memory
bounds, chosen by a short rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .device import MAX_REGISTERS, REGISTERS, WARP, Device

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
