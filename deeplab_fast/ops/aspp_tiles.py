"""Which taps of a dilated convolution touch the map, and the order in which a GPU runs its tiles.

With dilation d, an output pixel of a 3x3 branch reads row y + d (r - 1) and column x + d (s - 1)
for the taps r, s in {0, 1, 2}. On an axis of L pixels the taps inside the map are a run of
neighbours that depends on the position alone, so output pixels fall into at most 3 x 3 rectangles
whose pixels all have the same live taps: the tap classes. Padding is never multiplied: a class runs
over its live taps and no pixel of it needs a mask.

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

Source: arXiv 1706.05587, section 3.3 and figure 4 (large rates leave the centre tap alone).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

# A part shorter than this many iterations costs more to start, store and add up than it saves.
MIN_PART = 4
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Branch:
    """A branch of the ASPP: `channels` filters of kernel x kernel taps, padded to keep the size.

    Attributes:
        channels: output channels.
        kernel: 1 or 3 (any odd size works).
        dilation: distance between neighbouring taps, at least 1.
    """

    channels: int
    kernel: int
    dilation: int

    @property
    def taps(self) -> int:
        """Taps of a filter."""
        return self.kernel**2


@dataclass(frozen=True)
class Interval:
    """Consecutive pixels of an axis whose live taps are the same.

    Attributes:
        first, size: the pixels.
        tap, taps: the live taps tap, ..., tap + taps - 1.
    """

    first: int
    size: int
    tap: int
    taps: int


@dataclass(frozen=True)
class TapClass:
    """A rectangle of pixels of one branch with the same live taps: rows.taps x cols.taps."""

    branch: int
    rows: Interval
    cols: Interval

    @property
    def taps(self) -> int:
        """Live taps of a pixel."""
        return self.rows.taps * self.cols.taps

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.rows.size * self.cols.size


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
        most_parts: parts of the program that has most.
    """

    classes: Int32
    parts: Int32
    starts: Int32
    sums: Int32
    slots: int
    tiles: int
    iterations: int
    longest: int
    most_parts: int

    @property
    def programs(self) -> int:
        return len(self.starts) - 1


def axis_intervals(size: int, kernel: int, dilation: int) -> tuple[Interval, ...]:
    """The intervals of an axis of `size` pixels, in order.

    Tap k of pixel p reads p + (k - kernel // 2) dilation.
    """
    shifts = [(k - kernel // 2) * dilation for k in range(kernel)]
    ends = {0, size}
    for shift in shifts:
        # The tap comes to life at -shift, or dies at size - shift.
        ends.update(end for end in (-shift, size - shift) if 0 < end < size)
    intervals = []
    points = sorted(ends)
    for first, end in pairwise(points):
        live = [k for k, shift in enumerate(shifts) if 0 <= first + shift < size]
        intervals.append(Interval(first, end - first, live[0], len(live)))
    return tuple(intervals)


def tap_classes(height: int, width: int, branches: Sequence[Branch]) -> tuple[TapClass, ...]:
    """The tap classes of all branches, most live taps first, then in the order of the branches."""
    classes = [
        TapClass(index, rows, cols)
        for index, branch in enumerate(branches)
        for rows in axis_intervals(height, branch.kernel, branch.dilation)
        for cols in axis_intervals(width, branch.kernel, branch.dilation)
    ]
    return tuple(sorted(classes, key=lambda c: -c.taps))


def tile_counts(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: Sequence[Branch],
    block_m: int,
    block_n: int,
    block_c: int,
) -> tuple[int, int]:
    """(tiles, iterations) that `schedule` shares out, without making them."""
    tiles = iterations = 0
    for c in tap_classes(height, width, branches):
        count = -(-batch * c.pixels // block_m) * -(-branches[c.branch].channels // block_n)
        tiles += count
        iterations += count * c.taps * -(-channels // block_c)
    return tiles, iterations


def live_taps(height: int, width: int, branches: Sequence[Branch]) -> list[int]:
    """For each branch the pairs of (pixel of an image, live tap)."""
    counts = [0] * len(branches)
    for tap_class in tap_classes(height, width, branches):
        counts[tap_class.branch] += tap_class.pixels * tap_class.taps
    return counts


@lru_cache(maxsize=256)
def schedule(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    block_m: int,
    block_n: int,
    block_c: int,
    programs: int,
    split: bool = False,
) -> Schedule:
    """Share the tiles of all branches out over at most `programs` programs.

    Args:
        batch, height, width, channels: the input map [batch, channels, height, width].
        branches: the branches, in the order of their output channels.
        block_m, block_n, block_c: pixels, filters and input channels of a tile.
        programs: thread blocks that run at the same time.
        split: cut tiles so that all programs have the same number of iterations, but for cuts that
            would leave a part of fewer than MIN_PART.

    Raises:
        ValueError: there are more pixels than an int32 counts.
    """
    if batch * height * width > _INT32_MAX:
        raise ValueError(
            f"{batch} maps of {height}x{width} have more than {_INT32_MAX} pixels; split the batch"
        )
    classes = tap_classes(height, width, branches)
    tiles = _tiles(batch, -(-channels // block_c), classes, branches, block_m, block_n)
    iterations = int(tiles[:, PartField.END].sum())
    share = _cut if split else _deal
    parts, starts, sums, slots = share(tiles, iterations, programs)
    lengths = parts[:, PartField.END] - parts[:, PartField.BEGIN]
    loads = np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts])
    result = Schedule(
        classes=_class_table(batch, classes, branches),
        parts=parts,
        starts=starts,
        sums=sums,
        slots=slots,
        tiles=len(tiles),
        iterations=iterations,
        longest=int(loads.max(initial=0)),
        most_parts=int(np.diff(starts).max(initial=0)),
    )
    for table in (result.classes, parts, starts, sums):
        table.setflags(write=False)
    return result


def _class_table(batch: int, classes: Sequence[TapClass], branches: Sequence[Branch]) -> Int32:
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
        row[ClassField.PIXELS] = batch * c.pixels
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


def _tiles(
    batch: int,
    chunks: int,
    classes: Sequence[TapClass],
    branches: Sequence[Branch],
    block_m: int,
    block_n: int,
) -> Int32:
    """All tiles as whole parts, longest first; filters fastest, because they share pixels."""
    found = [np.zeros((0, PART_FIELDS), np.int32)]
    for index, tap_class in enumerate(classes):
        first = np.arange(0, batch * tap_class.pixels, block_m)
        filters = np.arange(0, branches[tap_class.branch].channels, block_n)
        tiles = np.zeros((len(first) * len(filters), PART_FIELDS), np.int32)
        tiles[:, PartField.CLASS] = index
        tiles[:, PartField.FIRST] = np.repeat(first, len(filters))
        tiles[:, PartField.FILTER] = np.tile(filters, len(first))
        tiles[:, PartField.END] = tap_class.taps * chunks
        tiles[:, PartField.SLOT] = -1
        found.append(tiles)
    return np.concatenate(found)


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
