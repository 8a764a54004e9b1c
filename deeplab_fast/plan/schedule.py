"""The order in which a GPU runs the tiles of the ASPP's branches.

Pixels of a class are numbered (image, row, column), the last fastest, over the whole batch, so that
a class has one partial tile and not one for each image. A tile is `block_m` such pixels by
`block_n` filters of one branch. It takes an iteration for each live tap of each chunk of `block_c`
input channels; iteration i is tap i % taps of chunk i // taps. Chunks are outermost because tiles
that run side by side read the same pixels through different taps: within a chunk those reads meet
in the cache, whereas a pass over all channels of 100 tiles is larger than the cache.

Tiles of all branches form one list, those with most iterations first. `schedule` gives each program
(a resident thread block) its parts of that list: whole tiles, each to the program that has least to
do, or, where there are too few tiles to keep all programs busy, the list laid out as one line and
cut into equal lengths. The parts of a cut tile are added in the order of their iterations.

The tables are int32 arrays, read alike by the Triton and the CUDA C++ kernels. Nothing here needs a
device; results are cached by shape, and the same call gives the same tables.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .gemm import GemmConfig
from .taps import Problem, TapClass, tap_classes

Int32 = NDArray[np.int32]

# A part shorter than this many iterations costs more to start, store and add up than it saves.
MIN_PART = 4
_INT32_MAX = 2**31 - 1


class ClassField(IntEnum):
    """Columns of `Schedule.classes`.

    ROW, ROWS, COL, COLS are the rectangle, PIXELS its pixels over the batch. The first live tap
    reads (ROW_SHIFT, COL_SHIFT) from the pixel, the next in a row or column DILATION further.
    Filters are the rows of one matrix [sum taps K, C] in the order branch, tap, filter: the first
    live tap's filters start at WEIGHT_ROW, the next tap's in its row of taps WEIGHT_COL_STEP
    further, those of the row of taps below WEIGHT_ROW_STEP further. CHANNEL is the branch's first
    channel in the output, CHANNELS their number.
    """

    ROW = 0
    ROWS = 1
    COL = 2
    COLS = 3
    PIXELS = 4
    ROW_SHIFT = 5
    COL_SHIFT = 6
    ROW_TAPS = 7
    COL_TAPS = 8
    DILATION = 9
    WEIGHT_ROW = 10
    WEIGHT_COL_STEP = 11
    WEIGHT_ROW_STEP = 12
    CHANNEL = 13
    CHANNELS = 14
    BRANCH = 15


class PartField(IntEnum):
    """Columns of `Schedule.parts` and `Schedule.sums`.

    A part is iterations BEGIN, ..., END - 1 of the tile of class CLASS that starts at pixel FIRST
    and at filter FILTER of its branch. SLOT is where its sums go in the workspace, or -1 for a
    whole tile, whose result goes to the output. In `sums` BEGIN, ..., END - 1 are the slots that
    make up a tile.
    """

    CLASS = 0
    FIRST = 1
    FILTER = 2
    BEGIN = 3
    END = 4
    SLOT = 5


CLASS_FIELDS = 16
PART_FIELDS = 8


class Size(NamedTuple):
    """What the tiles of a class cover together, and the iterations of each."""

    pixels: int
    filters: int
    iterations: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """The work of one call, shared out over programs.

    Attributes:
        classes: [tap classes, CLASS_FIELDS] int32.
        parts: [parts, PART_FIELDS] int32, program by program.
        starts: [programs + 1] int32, the first part of each program; the next entry is its end.
        sums: [cut tiles, PART_FIELDS] int32.
        slots: entries of the workspace, each a tile of block_m x block_n.
        tiles: tiles.
        iterations: iterations of all tiles.
        longest: iterations of the program that has most.
    """

    classes: Int32
    parts: Int32
    starts: Int32
    sums: Int32
    slots: int
    tiles: int
    iterations: int
    longest: int

    @property
    def programs(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, eq=False)
class StatsTable:
    """Where the tiles of a schedule put the statistics of their pixels, one entry for each block
    of pixels of a class, and how they are combined.

    Attributes:
        first: [tap classes] int32, the entry of a class's first block.
        counts: [entries] int32, the pixels of each.
        ranges: [branches + 1] int32, the first entry of each branch.
        channels: [branches + 1] int32, the first output channel of each branch.
    """

    first: Int32
    counts: Int32
    ranges: Int32
    channels: Int32


def tile_counts(problem: Problem, config: GemmConfig) -> tuple[int, int]:
    """(tiles, iterations) that `schedule` shares out, without making them."""
    return counted(_sizes(problem, config.block_c), config)


@lru_cache(maxsize=256)
def schedule(problem: Problem, config: GemmConfig, programs: int) -> Schedule:
    """Share the tiles of all branches out over at most `programs` programs.

    Args:
        problem: the branches and their map.
        config: pixels, filters and input channels of a tile; with `split` tiles are cut so that all
            programs have the same number of iterations, but for cuts that would leave a part of
            fewer than MIN_PART.
        programs: thread blocks that run at the same time.

    Raises:
        ValueError: there are more pixels than an int32 counts.
    """
    check_pixels(problem)
    tiles = whole_tiles(_sizes(problem, config.block_c), config)
    return shared(_class_table(problem), tiles, programs, config.split)


def stats_table(work: Schedule, block_m: int) -> StatsTable:
    """Where the tiles of a list of `schedule`, with tiles of block_m pixels, put statistics."""
    classes = work.classes.astype(np.int64)
    blocks = -(-classes[:, ClassField.PIXELS] // block_m)
    order = np.argsort(classes[:, ClassField.BRANCH], kind="stable")
    ends = np.cumsum(blocks[order])
    first = np.zeros(len(classes), np.int64)
    first[order] = ends - blocks[order]
    counts = np.full(ends[-1], block_m, np.int64)
    # The last block of a class; an empty batch has none.
    filled = blocks > 0
    counts[(first + blocks - 1)[filled]] = (classes[:, ClassField.PIXELS] - 1)[filled] % block_m + 1
    branches = classes[order, ClassField.BRANCH]
    last = np.searchsorted(branches, np.arange(branches[-1] + 1), side="right") - 1
    channels = classes[order[last], ClassField.CHANNEL] + classes[order[last], ClassField.CHANNELS]
    return StatsTable(
        first.astype(np.int32),
        counts.astype(np.int32),
        np.concatenate([[0], ends[last]]).astype(np.int32),
        np.concatenate([[0], channels]).astype(np.int32),
    )


def check_pixels(problem: Problem) -> None:
    """Raises ValueError where there are more pixels than an int32 counts."""
    batch, height, width = problem.batch, problem.height, problem.width
    if batch * height * width > _INT32_MAX:
        raise ValueError(
            f"{batch} maps of {height}x{width} have more than {_INT32_MAX} pixels; split the batch"
        )


def counted(sizes: Sequence[Size], config: GemmConfig) -> tuple[int, int]:
    """(tiles, iterations) of `whole_tiles`."""
    tiles = [-(-s.pixels // config.block_m) * -(-s.filters // config.block_n) for s in sizes]
    return sum(tiles), sum(n * s.iterations for n, s in zip(tiles, sizes, strict=True))


def whole_tiles(sizes: Sequence[Size], config: GemmConfig) -> Int32:
    """All tiles as whole parts, in order; filters fastest, because they share pixels.

    Args:
        sizes: of each class, most iterations first.
        config: pixels and filters of a tile.
    """
    found = [np.zeros((0, PART_FIELDS), np.int32)]
    for index, size in enumerate(sizes):
        first = np.arange(0, size.pixels, config.block_m)
        filters = np.arange(0, size.filters, config.block_n)
        tiles = np.zeros((len(first) * len(filters), PART_FIELDS), np.int32)
        tiles[:, PartField.CLASS] = index
        tiles[:, PartField.FIRST] = np.repeat(first, len(filters))
        tiles[:, PartField.FILTER] = np.tile(filters, len(first))
        tiles[:, PartField.END] = size.iterations
        tiles[:, PartField.SLOT] = -1
        found.append(tiles)
    return np.concatenate(found)


def shared(classes: Int32, tiles: Int32, programs: int, split: bool) -> Schedule:
    """The tiles of a table of classes, shared out over programs."""
    iterations = int(tiles[:, PartField.END].sum(dtype=np.int64))
    parts, starts, sums, slots = (_cut if split else _deal)(tiles, iterations, programs)
    lengths = parts[:, PartField.END] - parts[:, PartField.BEGIN]
    loads = np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts])
    for table in (classes, parts, starts, sums):
        table.setflags(write=False)
    longest = int(loads.max(initial=0))
    return Schedule(classes, parts, starts, sums, slots, len(tiles), iterations, longest)


def _classes(problem: Problem) -> tuple[TapClass, ...]:
    return tap_classes(problem.height, problem.width, problem.branches)


def _sizes(problem: Problem, block_c: int) -> list[Size]:
    chunks = -(-problem.channels // block_c)
    return [
        Size(problem.batch * c.pixels, problem.branches[c.branch].channels, c.taps * chunks)
        for c in _classes(problem)
    ]


def _class_table(problem: Problem) -> Int32:
    branches, classes = problem.branches, _classes(problem)
    first_channel = np.cumsum([0, *(b.channels for b in branches)])
    first_row = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    table = np.zeros((len(classes), CLASS_FIELDS), np.int32)
    for row, c in zip(table, classes, strict=True):
        branch = branches[c.branch]
        half = branch.kernel // 2
        # A dilation without a second live tap may be larger than any int32.
        step = branch.dilation if max(c.rows.taps, c.cols.taps) > 1 else 0
        row[ClassField.ROW] = c.rows.first
        row[ClassField.ROWS] = c.rows.size
        row[ClassField.COL] = c.cols.first
        row[ClassField.COLS] = c.cols.size
        row[ClassField.PIXELS] = problem.batch * c.pixels
        row[ClassField.ROW_SHIFT] = (c.rows.tap - half) * step
        row[ClassField.COL_SHIFT] = (c.cols.tap - half) * step
        row[ClassField.ROW_TAPS] = c.rows.taps
        row[ClassField.COL_TAPS] = c.cols.taps
        row[ClassField.DILATION] = step
        tap = c.rows.tap * branch.kernel + c.cols.tap
        row[ClassField.WEIGHT_ROW] = first_row[c.branch] + tap * branch.channels
        row[ClassField.WEIGHT_COL_STEP] = branch.channels
        row[ClassField.WEIGHT_ROW_STEP] = branch.kernel * branch.channels
        row[ClassField.CHANNEL] = first_channel[c.branch]
        row[ClassField.CHANNELS] = branch.channels
        row[ClassField.BRANCH] = c.branch
    return table


def _deal(tiles: Int32, _: int, programs: int) -> tuple[Int32, Int32, Int32, int]:
    """Whole tiles, each to the program that has least to do: (parts, starts, sums, slots)."""
    programs = min(programs, len(tiles))
    owner = np.zeros(len(tiles), np.int64)
    loads = [(0, p) for p in range(programs)]
    for i, length in enumerate(tiles[:, PartField.END].tolist()):
        load, program = loads[0]
        owner[i] = program
        heapq.heapreplace(loads, (load + length, program))
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(programs + 1)).astype(np.int32)
    return tiles[order], starts, np.zeros((0, PART_FIELDS), np.int32), 0


def _cut(tiles: Int32, iterations: int, programs: int) -> tuple[Int32, Int32, Int32, int]:
    """The line of tiles cut into equal lengths: (parts, starts, sums, slots)."""
    programs = max(min(programs, iterations // MIN_PART), min(len(tiles), 1))
    lengths = tiles[:, PartField.END].astype(np.int64)
    ends = np.cumsum(lengths)
    cuts = iterations * np.arange(1, programs + 1) // max(programs, 1)
    if programs:
        tile = np.searchsorted(ends, cuts)
        end = ends[tile]
        begin = end - lengths[tile]
        # The second condition goes first: the last cut is the end of the last tile.
        cuts = np.where(end - cuts < MIN_PART, end, np.where(cuts - begin < MIN_PART, begin, cuts))
    points = np.union1d(ends, cuts)
    begins = np.concatenate([[0], points])[:-1]
    tile = np.searchsorted(ends, begins, side="right")
    parts = tiles[tile]
    offset = (ends - lengths)[tile]
    parts[:, PartField.BEGIN] = begins - offset
    parts[:, PartField.END] = points - offset
    starts = np.searchsorted(begins, np.concatenate([[0], cuts])).astype(np.int32)

    first, last = parts[:, PartField.BEGIN] == 0, points == ends[tile]
    cut = ~(first & last)
    slots = int(cut.sum())
    parts[cut, PartField.SLOT] = np.arange(slots)
    sums = parts[first & cut]
    sums[:, PartField.BEGIN] = parts[first & cut, PartField.SLOT]
    sums[:, PartField.END] = parts[last & cut, PartField.SLOT] + 1
    sums[:, PartField.SLOT] = -1
    return parts, starts, sums, slots
