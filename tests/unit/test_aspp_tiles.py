"""The tile lists of the ASPP: every live tap of every pixel once, no dead tap, equal shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deeplab_fast.plan.gemm import GemmConfig
from deeplab_fast.plan.schedule import MIN_PART, ClassField, PartField, schedule, tile_counts
from deeplab_fast.plan.taps import Branch, Interval, Problem, axis_intervals

DEEPLAB = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


def tile(block_m: int, block_n: int, block_c: int, split: bool = False) -> GemmConfig:
    return GemmConfig(block_m, block_n, block_c, 4, 3, 1, split)


def work_done(work, batch, height, width, branches, block_m, block_n, chunks):
    """How often each (pixel, tap, chunk, filter) of each branch is done, from the tables alone.

    Fails where a tap reads outside the map, or a filter that does not belong to it.
    """
    counts = [
        np.zeros((batch, height, width, b.taps, chunks, b.channels), np.int64) for b in branches
    ]
    first_rows = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    first_channels = np.cumsum([0, *(b.channels for b in branches)])
    for part in work.parts:
        c = work.classes[part[PartField.CLASS]]
        index = c[ClassField.BRANCH]
        branch = branches[index]
        assert c[ClassField.CHANNEL] == first_channels[index]
        assert c[ClassField.CHANNELS] == branch.channels
        assert part[PartField.FIRST] % block_m == 0 and part[PartField.FILTER] % block_n == 0
        rows, cols = c[ClassField.ROWS], c[ClassField.COLS]
        first = part[PartField.FIRST]
        pixel = np.arange(first, min(first + block_m, c[ClassField.PIXELS]))
        image, row = pixel // (rows * cols), c[ClassField.ROW] + pixel // cols % rows
        col = c[ClassField.COL] + pixel % cols
        last = min(part[PartField.FILTER] + block_n, branch.channels)
        filters = np.arange(part[PartField.FILTER], last)
        taps = c[ClassField.ROW_TAPS] * c[ClassField.COL_TAPS]
        for i in range(part[PartField.BEGIN], part[PartField.END]):
            chunk = i // taps
            r, s = divmod(i % taps, c[ClassField.COL_TAPS])
            weight_row = (
                c[ClassField.WEIGHT_ROW]
                + r * c[ClassField.WEIGHT_ROW_STEP]
                + s * c[ClassField.WEIGHT_COL_STEP]
                - first_rows[index]
            )
            tap, rest = divmod(weight_row, branch.channels)
            assert rest == 0
            down = c[ClassField.ROW_SHIFT] + r * c[ClassField.DILATION]
            right = c[ClassField.COL_SHIFT] + s * c[ClassField.DILATION]
            half = branch.kernel // 2
            assert down == (tap // branch.kernel - half) * branch.dilation
            assert right == (tap % branch.kernel - half) * branch.dilation
            assert ((row + down >= 0) & (row + down < height)).all()
            assert ((col + right >= 0) & (col + right < width)).all()
            np.add.at(
                counts[index],
                (image[:, None], row[:, None], col[:, None], tap, chunk, filters[None, :]),
                1,
            )
    return counts


def live(branch: Branch, height: int, width: int) -> np.ndarray:
    """[H, W, taps]: whether a tap of a pixel is inside the map, one by one."""
    result = np.zeros((height, width, branch.taps), np.int64)
    for y in range(height):
        for x in range(width):
            for tap in range(branch.taps):
                down = (tap // branch.kernel - branch.kernel // 2) * branch.dilation
                right = (tap % branch.kernel - branch.kernel // 2) * branch.dilation
                result[y, x, tap] = 0 <= y + down < height and 0 <= x + right < width
    return result


def check_sharing(work, split: bool, programs: int) -> None:
    """Slots, sums and the shares of programs."""
    lengths = work.parts[:, PartField.END] - work.parts[:, PartField.BEGIN]
    assert work.starts[0] == 0 and work.starts[-1] == len(work.parts)
    assert (np.diff(work.starts) >= 0).all() and work.programs <= programs
    loads = [lengths[a:b].sum() for a, b in zip(work.starts, work.starts[1:], strict=False)]
    assert work.longest == max(loads, default=0) and work.iterations == lengths.sum()

    tiles: dict[tuple[int, ...], list] = {}
    for part in work.parts:
        tiles.setdefault(tuple(part[:3]), []).append(part)
    assert len(tiles) == work.tiles
    taps = work.classes[:, ClassField.ROW_TAPS] * work.classes[:, ClassField.COL_TAPS]
    assert (lengths > 0).all()
    cut = {tile: parts for tile, parts in tiles.items() if len(parts) > 1}
    for tile, parts in tiles.items():
        if tile not in cut:
            assert parts[0][PartField.SLOT] == -1
    # The parts of a cut tile follow one another, in the order in which their slots are added.
    assert [tuple(s[:3]) for s in work.sums] == list(cut)
    slot = 0
    for total in work.sums:
        parts = cut[tuple(total[:3])]
        assert total[PartField.BEGIN] == slot
        end = 0
        for part in parts:
            assert part[PartField.SLOT] == slot and part[PartField.BEGIN] == end
            assert part[PartField.END] - part[PartField.BEGIN] >= MIN_PART
            slot, end = slot + 1, part[PartField.END]
        assert total[PartField.END] == slot and end % taps[total[PartField.CLASS]] == 0
    assert work.slots == slot
    if not loads:
        return
    ideal = work.iterations / work.programs
    if split:
        assert work.longest <= ideal + 2 * MIN_PART
    else:
        assert not len(work.sums)
        # Dealt to whoever has least: no program is ahead of another by more than a tile.
        assert max(loads) - min(loads) <= max(lengths)
        for a, b in zip(work.starts, work.starts[1:], strict=False):
            assert (np.diff(lengths[a:b]) <= 0).all(), "longest first"


branch_lists = st.lists(
    st.builds(Branch, st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 10)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.integers(1, 9),
    branches=branch_lists,
    blocks=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3),
    programs=st.integers(1, 30),
    split=st.booleans(),
)
@example(0, 5, 5, 4, [Branch(2, 3, 1)], (2, 2, 2), 4, True)  # no images
@example(2, 1, 1, 4, [Branch(2, 3, 1)], (2, 2, 2), 4, False)  # a map of one pixel
@example(1, 3, 4, 9, [Branch(3, 3, 10**12)], (4, 2, 2), 7, True)  # beyond any map and int32
@example(1, 6, 2, 3, [Branch(3, 3, 3)], (4, 2, 2), 7, True)  # larger than one side only
@example(1, 4, 4, 4, [Branch(1, 3, 2)], (4, 1, 4), 3, False)  # no pixel has all taps
@example(1, 7, 7, 8, [Branch(4, 5, 2)], (4, 4, 2), 9, True)  # any odd size works
def test_every_live_tap_once_and_no_dead_one(
    batch, height, width, channels, branches, blocks, programs, split
) -> None:
    branches = tuple(branches)
    block_m, block_n, block_c = blocks
    problem = Problem(batch, height, width, channels, branches)
    config = tile(*blocks, split)
    work = schedule(problem, config, programs)
    chunks = -(-channels // block_c)
    counts = work_done(work, batch, height, width, branches, block_m, block_n, chunks)
    for branch, count in zip(branches, counts, strict=True):
        expected = live(branch, height, width)[None, :, :, :, None, None]
        assert (count == np.broadcast_to(expected, count.shape)).all()
    check_sharing(work, split, programs)
    tiles = tile_counts(problem, config)
    assert tiles == (work.tiles, work.iterations)


@pytest.mark.parametrize(
    "size,kernel,dilation,expected",
    [
        pytest.param(65, 1, 7, [(0, 65, 0, 1)], id="one-tap"),
        pytest.param(65, 3, 12, [(0, 12, 1, 2), (12, 41, 0, 3), (53, 12, 0, 2)], id="all-live"),
        pytest.param(
            65, 3, 36, [(0, 29, 1, 2), (29, 7, 1, 1), (36, 29, 0, 2)], id="none-has-three"
        ),
        pytest.param(4, 3, 2, [(0, 2, 1, 2), (2, 2, 0, 2)], id="no-middle"),
        pytest.param(4, 3, 4, [(0, 4, 1, 1)], id="dilation-is-the-size"),
        pytest.param(1, 3, 1, [(0, 1, 1, 1)], id="one-pixel"),
    ],
)
def test_intervals_of_an_axis(size: int, kernel: int, dilation: int, expected: list) -> None:
    assert axis_intervals(size, kernel, dilation) == tuple(Interval(*e) for e in expected)


@pytest.mark.parametrize(
    "size,batch,block_m,branches,expected",
    [
        pytest.param(65, 16, 128, DEEPLAB, 0.582, id="65x65-batch-16"),
        pytest.param(65, 1, 64, DEEPLAB, 0.615, id="65x65-batch-1"),
        pytest.param(33, 16, 128, OS16, 0.600, id="33x33-batch-16"),
        pytest.param(33, 4, 128, OS16, 0.655, id="33x33-batch-4"),
        pytest.param(33, 1, 64, OS16, 0.683, id="33x33-batch-1"),
        pytest.param(33, 1, 128, OS16, 0.792, id="33x33-batch-1-large-tiles"),
        pytest.param(97, 16, 128, DEEPLAB, 0.703, id="97x97-batch-16"),
    ],
)
def test_work_of_the_dilated_branches_against_dense(size, batch, block_m, branches, expected):
    """Multiply-adds in whole tiles over those of all taps, as predicted for tiles in this order."""
    _, iterations = tile_counts(
        Problem(batch, size, size, 2048, branches[1:]), tile(block_m, 256, 64)
    )
    dense = 27 * batch * size * size * (2048 // 64)
    assert iterations * block_m / dense == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    "size,batch,branches,split,least",
    [
        pytest.param(65, 1, DEEPLAB, True, 0.95, id="65x65-batch-1"),
        pytest.param(65, 16, DEEPLAB, False, 0.99, id="65x65-batch-16"),
        pytest.param(33, 1, OS16, True, 0.9, id="33x33-batch-1"),
        pytest.param(33, 16, OS16, False, 0.98, id="33x33-batch-16"),
    ],
)
def test_132_multiprocessors_are_kept_busy(size, batch, branches, split, least) -> None:
    work = schedule(Problem(batch, size, size, 2048, branches), tile(128, 256, 64, split), 132)
    assert work.programs == 132
    assert work.iterations / 132 >= least * work.longest
    check_sharing(work, split, 132)


def test_tables_are_cached_and_cannot_be_written() -> None:
    args = Problem(1, 5, 5, 8, (Branch(4, 3, 2),)), tile(4, 4, 4, True), 3
    work = schedule(*args)
    assert schedule(*args) is work
    for table in (work.classes, work.parts, work.starts, work.sums):
        assert table.dtype == np.int32 and table.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            table[...] = 0


def test_more_pixels_than_an_int32_counts() -> None:
    with pytest.raises(ValueError, match="more than 2147483647 pixels; split the batch"):
        schedule(Problem(2**11, 1024, 1024, 8, (Branch(4, 3, 2),)), tile(128, 64, 64), 132)
