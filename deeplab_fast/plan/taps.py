"""Which taps of a dilated convolution touch the map.

With dilation d, an output pixel of a 3x3 branch reads row y + d (r - 1) and column x + d (s - 1)
for the taps r, s in {0, 1, 2}. On an axis of L pixels the taps inside the map are a run of
neighbours that depends on the position alone, so output pixels fall into at most 3 x 3 rectangles
whose pixels all have the same live taps: the tap classes. Padding is never multiplied: a class runs
over its live taps and no pixel of it needs a mask.

Source: arXiv 1706.05587, section 3.3 and figure 4 (large rates leave the centre tap alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


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
class Problem:
    """Branches and the map that they read.

    Attributes:
        batch, height, width, channels: the map [batch, channels, height, width].
        branches: the branches, in the order of their output channels.
    """

    batch: int
    height: int
    width: int
    channels: int
    branches: tuple[Branch, ...]


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


def output_size(
    size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """Length of a convolution's output along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def live_taps(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Pairs of (output pixel, tap) along an axis of `size` pixels whose tap is inside the map.

    Tap k of output o reads pixel o * stride + k * dilation - padding.
    """
    last = output_size(size, kernel, stride, padding, dilation) - 1
    count = 0
    for k in range(kernel):
        offset = k * dilation - padding
        low = max(0, -(offset // stride))
        high = min(last, (size - 1 - offset) // stride)
        count += max(0, high - low + 1)
    return count


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
