"""The order in which a GPU runs the tiles of the gradients of the ASPP's convolutions.

`dgrad_schedule` and `wgrad_schedule` do for the gradients what `schedule.schedule` does for the
convolutions. A pixel of the gradient to the input sums over all branches, so its class is that of
its live taps in all of them: up to 7 x 7 rectangles for three rates, too many for each to have a
partial tile of its own. Pixels are sorted by class, in an order in which neighbouring classes
differ in few taps, and cut into tiles whatever their class; a tile runs over the taps that live for
any of its pixels, listed in a table, and a pixel for which such a tap is outside reads zero. The
gradient to a filter's tap sums over the pixels of the one rectangle in which the tap is inside the
map; a tap that never is has no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .gemm import GemmConfig
from .schedule import (
    CLASS_FIELDS,
    PART_FIELDS,
    Int32,
    PartField,
    Schedule,
    Size,
    check_pixels,
    counted,
    shared,
    whole_tiles,
)
from .taps import Branch, Problem, TapRectangle, joint_classes, tap_rectangles

STEP_FIELDS = 8


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


def divider(divisor: int) -> tuple[int, int]:
    """(factor, bits) with i // divisor = (2 i factor >> 32) >> bits for 0 <= i < 2^31.

    The factor takes 32 bits, of an unsigned integer.

    Source: T. Granlund, P. Montgomery, Division by invariant integers using multiplication, 1994.
    """
    bits = (divisor - 1).bit_length()
    return -(-(2 ** (31 + bits)) // divisor), bits


@lru_cache(maxsize=256)
def dgrad_schedule(problem: Problem, config: GemmConfig, programs: int) -> DgradSchedule:
    """Share the tiles of the gradient to the input out over at most `programs` programs.

    A tile is `block_m` pixels by `block_n` channels of the input. It takes an iteration for each
    branch, chunk of `block_c` of its filters, and tap that lives for a pixel of the tile; taps are
    innermost, as in `schedule`. Arguments and errors are those of `schedule`.
    """
    check_pixels(problem)
    lists, owner = _dgrad_blocks(problem, config.block_m)
    steps = [_dgrad_steps(taps, problem.branches, config.block_c) for taps in lists]
    lengths = np.array([len(part) for part in steps], np.int64)
    # Longest first; channels fastest, because they share pixels.
    blocks = np.argsort(-lengths[owner], kind="stable")
    filters = np.arange(0, problem.channels, config.block_n)
    tiles = np.zeros((len(blocks) * len(filters), PART_FIELDS), np.int32)
    tiles[:, PartField.CLASS] = np.repeat(owner[blocks], len(filters))
    tiles[:, PartField.FIRST] = np.repeat(blocks * config.block_m, len(filters))
    tiles[:, PartField.FILTER] = np.tile(filters, len(blocks))
    tiles[:, PartField.END] = np.repeat(lengths[owner[blocks]], len(filters))
    tiles[:, PartField.SLOT] = -1
    first = (np.cumsum(lengths) - lengths)[:, None].astype(np.int32)
    result = DgradSchedule(
        **vars(shared(first, tiles, programs, config.split)),
        steps=np.concatenate([*steps, np.zeros((1, STEP_FIELDS), np.int32)]),
        pixels=_dgrad_pixels(problem),
    )
    for table in (result.steps, result.pixels):
        table.setflags(write=False)
    return result


def dgrad_tile_counts(problem: Problem, config: GemmConfig) -> tuple[int, int]:
    """(tiles, iterations) that `dgrad_schedule` shares out, without making them."""
    lists, owner = _dgrad_blocks(problem, config.block_m)
    chunks = [-(-b.channels // config.block_c) for b in problem.branches]
    lengths = np.array(
        [sum(len(t) * k for t, k in zip(taps, chunks, strict=True)) for taps in lists], np.int64
    )
    across = -(-problem.channels // config.block_n)
    return len(owner) * across, int(lengths[owner].sum()) * across


@lru_cache(maxsize=256)
def wgrad_schedule(problem: Problem, config: GemmConfig, programs: int) -> Schedule:
    """Share the tiles of the gradients to the filters out over at most `programs` programs.

    A tile is `block_m` filters (FIRST) by `block_n` input channels (FILTER) of a `TapRectangle`; an
    iteration is `block_c` of its pixels, numbered (image, row, column) over the batch. `classes`
    has the columns `WgradField`. Arguments and errors are those of `schedule`; taps outside the map
    and an empty batch have no tiles.
    """
    check_pixels(problem)
    tiles = whole_tiles(_wgrad_sizes(problem, config.block_c), config)
    return shared(_wgrad_table(problem), tiles, programs, config.split)


def wgrad_tile_counts(problem: Problem, config: GemmConfig) -> tuple[int, int]:
    """(tiles, iterations) that `wgrad_schedule` shares out, without making them."""
    return counted(_wgrad_sizes(problem, config.block_c), config)


# For each branch the taps of a class or of a tile, as they read the outputs' gradient.
_Taps = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def _dgrad_blocks(problem: Problem, block_m: int) -> tuple[tuple[_Taps, ...], NDArray[np.int64]]:
    """(lists of taps, the list of each block of block_m pixels in the order of the classes)."""
    classes = joint_classes(problem.height, problem.width, problem.branches)
    ends = np.cumsum([problem.batch * c.pixels for c in classes])
    start = np.arange(0, ends[-1], block_m)
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(ends, np.minimum(start + block_m, ends[-1]) - 1, side="right")
    runs, owner = np.unique(first * len(classes) + last, return_inverse=True)
    lists = []
    for run in runs.tolist():
        a, b = divmod(run, len(classes))
        together = zip(*(c.live(problem.branches) for c in classes[a : b + 1]), strict=True)
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


def _dgrad_pixels(problem: Problem) -> Int32:
    height, width = problem.height, problem.width
    image = np.arange(problem.batch, dtype=np.int64)[:, None, None] * (height * width)
    found = []
    for c in joint_classes(height, width, problem.branches):
        rows = np.arange(c.rows[0].first, c.rows[0].first + c.rows[0].size)[:, None] * width
        cols = np.arange(c.cols[0].first, c.cols[0].first + c.cols[0].size)
        found.append((image + rows + cols).ravel())
    return np.concatenate(found).astype(np.int32)


def _wgrad_rectangles(problem: Problem) -> list[TapRectangle]:
    if not problem.batch:
        return []
    found = tap_rectangles(problem.height, problem.width, problem.branches)
    return sorted(found, key=lambda r: -r.pixels)


def _wgrad_sizes(problem: Problem, block_c: int) -> list[Size]:
    return [
        Size(
            problem.branches[r.branch].channels,
            problem.channels,
            -(-problem.batch * r.pixels // block_c),
        )
        for r in _wgrad_rectangles(problem)
    ]


def _wgrad_table(problem: Problem) -> Int32:
    branches, rectangles = problem.branches, _wgrad_rectangles(problem)
    first_channel = np.cumsum([0, *(b.channels for b in branches)])
    first_row = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    table = np.zeros((len(rectangles), CLASS_FIELDS), np.int64)
    for row, r in zip(table, rectangles, strict=True):
        row[WgradField.ROW] = r.row
        row[WgradField.ROWS] = r.rows
        row[WgradField.COL] = r.col
        row[WgradField.COLS] = r.cols
        row[WgradField.PIXELS] = problem.batch * r.pixels
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
    return table.astype(np.uint32).view(np.int32)
