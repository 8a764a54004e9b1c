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

`dgrad_schedule` and `wgrad_schedule` do the same for the gradients. A pixel of the gradient to the
input sums over all branches, so its class is that of its live taps in all of them: up to 7 x 7
rectangles for three rates, too many for each to have a partial tile of its own. Pixels are sorted
by class, in an order in which neighbouring classes differ in few taps, and cut into tiles whatever
their class; a tile runs over the taps that live for any of its pixels, listed in a table, and a
pixel for which such a tap is outside reads zero. The gradient to a filter's tap sums over the
pixels of the one rectangle in which the tap is inside the map; a tap that never is has no tile.

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
from typing import Any

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


class StepField(IntEnum):
    """Columns of `DgradSchedule.steps`: an iteration of a tile of the gradient to the input.

    A pixel reads (ROW_SHIFT, COL_SHIFT) further, LIVE channels from CHANNEL of the outputs'
    gradient, times the rows of the filters' matrix (see `ClassField`) from WEIGHT_ROW.
    """

    ROW_SHIFT = 0
    COL_SHIFT = 1
    WEIGHT_ROW = 2
    CHANNEL = 3
    LIVE = 4


class WgradField(IntEnum):
    """Columns of `Schedule.classes` of `wgrad_schedule`: a tap of a branch.

    ROW, ROWS, COL, COLS are the pixels of the outputs' gradient for which the tap is inside the
    map, PIXELS their number over the batch; the tap reads (ROW_SHIFT, COL_SHIFT) from the pixel.
    CHANNEL is the branch's first channel in the outputs' gradient, CHANNELS their number, and the
    result is rows WEIGHT_ROW, ..., WEIGHT_ROW + CHANNELS - 1 of the filters' matrix. COLS_FACTOR
    and COLS_BITS divide a pixel's number by COLS, ROWS_FACTOR and ROWS_BITS by ROWS (`divider`).
    """

    ROW = 0
    ROWS = 1
    COL = 2
    COLS = 3
    PIXELS = 4
    ROW_SHIFT = 5
    COL_SHIFT = 6
    CHANNEL = 7
    CHANNELS = 8
    WEIGHT_ROW = 9
    COLS_FACTOR = 10
    COLS_BITS = 11
    ROWS_FACTOR = 12
    ROWS_BITS = 13
    BRANCH = 14
    TAP = 15


CLASS_FIELDS = 16
PART_FIELDS = 8
STEP_FIELDS = 8


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
class DgradSchedule(Schedule):
    """The work of the gradient to the input: FIRST is a place in `pixels`, FILTER a channel.

    Attributes:
        classes: [lists of steps, 1] int32, the first step of each.
        steps: [steps of all lists + 1, STEP_FIELDS] int32; iteration i of a tile is the i-th of its
            list. Behind the last is a row that may be read ahead of its use.
        pixels: [batch * height * width] int32, the pixels sorted by their live taps, as numbers
            (image, row, column).
    """

    steps: Int32
    pixels: Int32


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


@dataclass(frozen=True)
class JointClass:
    """A rectangle of pixels whose live taps are the same in every branch.

    Attributes:
        rows, cols: for each branch the pixels, which are the same in all, and its live taps.
    """

    rows: tuple[Interval, ...]
    cols: tuple[Interval, ...]

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.rows[0].size * self.cols[0].size

    def live(self, branches: Sequence[Branch]) -> tuple[tuple[int, ...], ...]:
        """For each branch the live taps of a pixel."""
        return tuple(
            tuple(
                row * branch.kernel + col
                for row in range(rows.tap, rows.tap + rows.taps)
                for col in range(cols.tap, cols.tap + cols.taps)
            )
            for branch, rows, cols in zip(branches, self.rows, self.cols, strict=True)
        )


@dataclass(frozen=True)
class TapRectangle:
    """The pixels of an output for which a tap of a branch is inside the map.

    Attributes:
        branch, tap: the tap.
        row, rows, col, cols: the rectangle.
        row_shift, col_shift: from a pixel to where the tap reads.
    """

    branch: int
    tap: int
    row: int
    rows: int
    col: int
    cols: int
    row_shift: int
    col_shift: int

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.rows * self.cols


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


def joint_intervals(size: int, branches: Sequence[Branch]) -> tuple[tuple[Interval, ...], ...]:
    """The runs of pixels of an axis that have the same live taps in every branch, in order.

    Returns:
        For each run its pixels and live taps in each branch.
    """
    each = [axis_intervals(size, b.kernel, b.dilation) for b in branches]
    points = sorted({size, *(i.first for intervals in each for i in intervals)})
    found = []
    for first, end in pairwise(points):
        around = [next(i for i in row if first < i.first + i.size) for row in each]
        found.append(tuple(Interval(first, end - first, i.tap, i.taps) for i in around))
    return tuple(found)


def joint_classes(height: int, width: int, branches: Sequence[Branch]) -> tuple[JointClass, ...]:
    """The rectangles of pixels that have the same live taps in every branch, row by row, every
    other one backwards, so that neighbours in the order are neighbours in the map."""
    across = joint_intervals(width, branches)
    return tuple(
        JointClass(rows, cols)
        for index, rows in enumerate(joint_intervals(height, branches))
        for cols in (across[::-1] if index % 2 else across)
    )


def tap_rectangles(height: int, width: int, branches: Sequence[Branch]) -> tuple[TapRectangle, ...]:
    """For each branch and tap that touches the map the pixels for which it does."""
    found = []
    for index, branch in enumerate(branches):
        for tap in range(branch.taps):
            down, right = ((t - branch.kernel // 2) * branch.dilation
                           for t in divmod(tap, branch.kernel))  # fmt: skip
            rows, cols = height - abs(down), width - abs(right)
            if rows > 0 and cols > 0:
                first = max(0, -down), max(0, -right)
                found.append(TapRectangle(index, tap, first[0], rows, first[1], cols, down, right))
    return tuple(found)


def divider(divisor: int) -> tuple[int, int]:
    """(factor, bits) with i // divisor = (2 i factor >> 32) >> bits for 0 <= i < 2^31.

    The factor takes 32 bits, of an unsigned integer.

    Source: T. Granlund, P. Montgomery, Division by invariant integers using multiplication, 1994.
    """
    bits = (divisor - 1).bit_length()
    return -(-(2 ** (31 + bits)) // divisor), bits


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
    _check_pixels(batch, height, width)
    classes = tap_classes(height, width, branches)
    chunks = -(-channels // block_c)
    sizes = [
        (batch * c.pixels, branches[c.branch].channels, c.taps * chunks) for c in classes
    ]  # fmt: skip
    tiles = _tiles(sizes, block_m, block_n)
    return Schedule(_class_table(batch, classes, branches), **_shared(tiles, programs, split))


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


@lru_cache(maxsize=256)
def dgrad_schedule(
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
) -> DgradSchedule:
    """Share the tiles of the gradient to the input out over at most `programs` programs.

    A tile is `block_m` pixels by `block_n` channels of the input. It takes an iteration for each
    branch, chunk of `block_c` of its filters, and tap that lives for a pixel of the tile; taps are
    innermost, as in `schedule`. Arguments and errors are those of `schedule`.
    """
    _check_pixels(batch, height, width)
    lists, owner = _dgrad_blocks(batch, height, width, branches, block_m)
    steps = [_dgrad_steps(taps, branches, block_c) for taps in lists]
    lengths = np.array([len(part) for part in steps], np.int64)
    # Longest first; channels fastest, because they share pixels.
    blocks = np.argsort(-lengths[owner], kind="stable")
    filters = np.arange(0, channels, block_n)
    tiles = np.zeros((len(blocks) * len(filters), PART_FIELDS), np.int32)
    tiles[:, PartField.CLASS] = np.repeat(owner[blocks], len(filters))
    tiles[:, PartField.FIRST] = np.repeat(blocks * block_m, len(filters))
    tiles[:, PartField.FILTER] = np.tile(filters, len(blocks))
    tiles[:, PartField.END] = np.repeat(lengths[owner[blocks]], len(filters))
    tiles[:, PartField.SLOT] = -1
    result = DgradSchedule(
        classes=(np.cumsum(lengths) - lengths)[:, None].astype(np.int32),
        **_shared(tiles, programs, split),
        steps=np.concatenate([*steps, np.zeros((1, STEP_FIELDS), np.int32)]),
        pixels=_dgrad_pixels(batch, height, width, branches),
    )
    for table in (result.classes, result.steps, result.pixels):
        table.setflags(write=False)
    return result


def dgrad_tile_counts(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    block_m: int,
    block_n: int,
    block_c: int,
) -> tuple[int, int]:
    """(tiles, iterations) that `dgrad_schedule` shares out, without making them."""
    lists, owner = _dgrad_blocks(batch, height, width, branches, block_m)
    chunks = [-(-b.channels // block_c) for b in branches]
    lengths = np.array(
        [sum(len(t) * k for t, k in zip(taps, chunks, strict=True)) for taps in lists], np.int64
    )
    across = -(-channels // block_n)
    return len(owner) * across, int(lengths[owner].sum()) * across


@lru_cache(maxsize=256)
def wgrad_schedule(
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
    """Share the tiles of the gradients to the filters out over at most `programs` programs.

    A tile is `block_m` filters (FIRST) by `block_n` input channels (FILTER) of a `TapRectangle`; an
    iteration is `block_c` of its pixels, numbered (image, row, column) over the batch. `classes`
    has the columns `WgradField`. Arguments and errors are those of `schedule`; taps outside the map
    and an empty batch have no tiles.
    """
    _check_pixels(batch, height, width)
    rectangles = sorted(tap_rectangles(height, width, branches), key=lambda r: -r.pixels)
    if not batch:
        rectangles = []
    sizes = [
        (branches[r.branch].channels, channels, -(-batch * r.pixels // block_c)) for r in rectangles
    ]
    tiles = _tiles(sizes, block_m, block_n)
    table = _wgrad_table(batch, rectangles, branches)
    return Schedule(table, **_shared(tiles, programs, split))


def wgrad_tile_counts(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: Sequence[Branch],
    block_m: int,
    block_n: int,
    block_c: int,
) -> tuple[int, int]:
    """(tiles, iterations) that `wgrad_schedule` shares out, without making them."""
    tiles = iterations = 0
    for r in tap_rectangles(height, width, branches) if batch else ():
        count = -(-branches[r.branch].channels // block_m) * -(-channels // block_n)
        tiles += count
        iterations += count * -(-batch * r.pixels // block_c)
    return tiles, iterations


def _check_pixels(batch: int, height: int, width: int) -> None:
    if batch * height * width > _INT32_MAX:
        raise ValueError(
            f"{batch} maps of {height}x{width} have more than {_INT32_MAX} pixels; split the batch"
        )


def _shared(tiles: Int32, programs: int, split: bool) -> dict[str, Any]:
    """All attributes of a `Schedule` but `classes`."""
    iterations = int(tiles[:, PartField.END].sum(dtype=np.int64))
    share = _cut if split else _deal
    parts, starts, sums, slots = share(tiles, iterations, programs)
    lengths = parts[:, PartField.END] - parts[:, PartField.BEGIN]
    loads = np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts])
    for table in (parts, starts, sums):
        table.setflags(write=False)
    return {
        "parts": parts,
        "starts": starts,
        "sums": sums,
        "slots": slots,
        "tiles": len(tiles),
        "iterations": iterations,
        "longest": int(loads.max(initial=0)),
    }


# For each branch the taps of a class or of a tile, as they read the outputs' gradient.
_Taps = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def _dgrad_blocks(
    batch: int, height: int, width: int, branches: tuple[Branch, ...], block_m: int
) -> tuple[tuple[_Taps, ...], NDArray[np.int64]]:
    """(lists of taps, the list of each block of block_m pixels in the order of the classes)."""
    classes = joint_classes(height, width, branches)
    ends = np.cumsum([batch * c.pixels for c in classes])
    start = np.arange(0, ends[-1], block_m)
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(ends, np.minimum(start + block_m, ends[-1]) - 1, side="right")
    runs, owner = np.unique(first * len(classes) + last, return_inverse=True)
    lists = []
    for run in runs.tolist():
        a, b = divmod(run, len(classes))
        together = zip(*(c.live(branches) for c in classes[a : b + 1]), strict=True)
        lists.append(tuple(tuple(sorted(set().union(*taps))) for taps in together))
    return tuple(lists), owner.reshape(-1).astype(np.int64)


def _dgrad_steps(lists: _Taps, branches: Sequence[Branch], block_c: int) -> Int32:
    steps = []
    channel = row = 0
    for taps, branch in zip(lists, branches, strict=True):
        half, last = branch.kernel // 2, branch.taps - 1
        # The pixel of the input that tap t of pixel q reads is q + t; its gradient comes back from
        # q, which the mirrored tap reads.
        each = [
            (
                (tap // branch.kernel - half) * branch.dilation,
                (tap % branch.kernel - half) * branch.dilation,
                row + (last - tap) * branch.channels,
            )
            for tap in taps
        ]
        chunk = np.repeat(np.arange(0, branch.channels, block_c), len(each))
        part = np.zeros((len(chunk), STEP_FIELDS), np.int32)
        part[:, : StepField.WEIGHT_ROW + 1] = np.tile(each, (len(chunk) // len(each), 1))
        part[:, StepField.WEIGHT_ROW] += chunk.astype(np.int32)
        part[:, StepField.CHANNEL] = channel + chunk
        part[:, StepField.LIVE] = np.minimum(block_c, branch.channels - chunk)
        steps.append(part)
        channel += branch.channels
        row += branch.taps * branch.channels
    return np.concatenate(steps)


def _dgrad_pixels(batch: int, height: int, width: int, branches: Sequence[Branch]) -> Int32:
    image = np.arange(batch, dtype=np.int64)[:, None, None] * (height * width)
    found = []
    for c in joint_classes(height, width, branches):
        rows = np.arange(c.rows[0].first, c.rows[0].first + c.rows[0].size)[:, None] * width
        cols = np.arange(c.cols[0].first, c.cols[0].first + c.cols[0].size)
        found.append((image + rows + cols).ravel())
    return np.concatenate(found).astype(np.int32)


def _wgrad_table(
    batch: int, rectangles: Sequence[TapRectangle], branches: Sequence[Branch]
) -> Int32:
    first_channel = np.cumsum([0, *(b.channels for b in branches)])
    first_row = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    table = np.zeros((len(rectangles), CLASS_FIELDS), np.int64)
    for row, r in zip(table, rectangles, strict=True):
        row[WgradField.ROW] = r.row
        row[WgradField.ROWS] = r.rows
        row[WgradField.COL] = r.col
        row[WgradField.COLS] = r.cols
        row[WgradField.PIXELS] = batch * r.pixels
        row[WgradField.ROW_SHIFT] = r.row_shift
        row[WgradField.COL_SHIFT] = r.col_shift
        row[WgradField.CHANNEL] = first_channel[r.branch]
        row[WgradField.CHANNELS] = branches[r.branch].channels
        row[WgradField.WEIGHT_ROW] = first_row[r.branch] + r.tap * branches[r.branch].channels
        row[WgradField.COLS_FACTOR], row[WgradField.COLS_BITS] = divider(r.cols)
        row[WgradField.ROWS_FACTOR], row[WgradField.ROWS_BITS] = divider(r.rows)
        row[WgradField.BRANCH] = r.branch
        row[WgradField.TAP] = r.tap
    # Factors are unsigned: their bits are kept.
    bits: Int32 = table.astype(np.uint32).view(np.int32)
    bits.setflags(write=False)
    return bits


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
    table.setflags(write=False)
    return table


def _tiles(sizes: Sequence[tuple[int, int, int]], block_m: int, block_n: int) -> Int32:
    """All tiles as whole parts, in order; filters fastest, because they share pixels.

    Args:
        sizes: for each class its pixels, filters and iterations; most iterations first.
    """
    found = [np.zeros((0, PART_FIELDS), np.int32)]
    for index, (pixels, filters, iterations) in enumerate(sizes):
        first = np.arange(0, pixels, block_m)
        filter_ = np.arange(0, filters, block_n)
        tiles = np.zeros((len(first) * len(filter_), PART_FIELDS), np.int32)
        tiles[:, PartField.CLASS] = index
        tiles[:, PartField.FIRST] = np.repeat(first, len(filter_))
        tiles[:, PartField.FILTER] = np.tile(filter_, len(first))
        tiles[:, PartField.END] = iterations
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
