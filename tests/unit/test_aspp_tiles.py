"""The tile lists of the ASPP: every live tap of every pixel once, no dead tap, equal shares.

For the gradients a live pair is a pixel of the output and a tap that reads inside the map. The
gradient to the input takes each once, seen from the pixel that is read; the gradient to a filter's
tap takes each once.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deeplab_fast.plan.gemm import GemmConfig
from deeplab_fast.plan.gradients import (
    StepField,
    WgradField,
    dgrad_schedule,
    dgrad_tile_counts,
    divider,
    wgrad_schedule,
    wgrad_tile_counts,
)
from deeplab_fast.plan.schedule import (
    MIN_PART,
    ClassField,
    PartField,
    schedule,
    stats_table,
    tile_counts,
)
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


@pytest.mark.parametrize("make", [schedule, dgrad_schedule, wgrad_schedule])
def test_tables_are_cached_and_cannot_be_written(make) -> None:
    args = Problem(1, 5, 5, 8, (Branch(4, 3, 2),)), tile(4, 4, 4, True), 3
    work = make(*args)
    assert make(*args) is work
    for table in (work.classes, work.parts, work.starts, work.sums, getattr(work, "steps", None)):
        if table is not None:
            assert table.dtype == np.int32 and table.flags.c_contiguous
            with pytest.raises(ValueError, match="read-only"):
                table[...] = 0
    with pytest.raises(ValueError, match="more than 2147483647 pixels; split the batch"):
        make(Problem(2**11, 1024, 1024, 8, (Branch(4, 3, 2),)), tile(128, 64, 64), 132)


def offsets(branch: Branch, tap: int) -> tuple[int, int]:
    half = branch.kernel // 2
    down, right = divmod(tap, branch.kernel)
    return (down - half) * branch.dilation, (right - half) * branch.dilation


def pixels_of(row: np.ndarray, first: int, block: int) -> tuple[np.ndarray, ...]:
    """(image, row, column) of the pixels of a block of a class."""
    number = np.arange(first, min(first + block, row[ClassField.PIXELS]))
    rows, cols = row[ClassField.ROWS], row[ClassField.COLS]
    line = number // cols
    return line // rows, row[ClassField.ROW] + line % rows, row[ClassField.COL] + number % cols


def check_parts(work, split: bool) -> None:
    """The parts of a tile are each of its iterations once; programs start with the longest."""
    done: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for part in work.parts:
        done.setdefault(tuple(part[:3]), []).append((part[PartField.BEGIN], part[PartField.END]))
    assert len(done) == work.tiles
    for parts in done.values():
        ends = [0, *(end for _, end in sorted(parts))]
        assert [begin for begin, _ in sorted(parts)] == ends[:-1]
    lengths = work.parts[:, PartField.END] - work.parts[:, PartField.BEGIN]
    assert lengths.sum() == work.iterations and (lengths > 0).all()
    assert split or work.slots == len(work.sums) == 0
    for a, b in zip(work.starts, work.starts[1:], strict=False):
        assert split or (np.diff(lengths[a:b]) <= 0).all(), "longest first"


EDGES = [
    (0, 5, 5, 4, [Branch(2, 3, 1)], (2, 2, 2), 4, True),
    (2, 1, 1, 4, [Branch(2, 3, 1)], (2, 2, 2), 4, False),
    (1, 3, 4, 9, [Branch(3, 3, 10**12)], (4, 2, 2), 7, True),
    (1, 6, 2, 3, [Branch(3, 3, 3), Branch(2, 1, 5)], (4, 2, 2), 7, True),
    (1, 4, 4, 4, [Branch(1, 3, 2)], (4, 1, 4), 3, False),
    (2, 5, 6, 3, [Branch(3, 3, 2), Branch(3, 3, 2)], (4, 2, 2), 5, True),
    (1, 7, 7, 8, [Branch(4, 5, 2), Branch(2, 3, 3)], (4, 4, 2), 9, True),
]


def shapes(test):
    """Random shapes, and the edges."""
    for edge in EDGES:
        test = example(*edge)(test)
    drawn = given(
        st.integers(0, 3),
        st.integers(1, 7),
        st.integers(1, 7),
        st.integers(1, 9),
        branch_lists,
        st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3),
        st.integers(1, 30),
        st.booleans(),
    )
    return settings(max_examples=50, deadline=None, derandomize=True)(drawn(test))


@shapes
def test_dgrad_takes_every_live_pair_once(
    batch, height, width, channels, branches, blocks, programs, split
) -> None:
    branches = tuple(branches)
    block_m, block_n, block_c = blocks
    args = Problem(batch, height, width, channels, branches), tile(*blocks, split)
    work = dgrad_schedule(*args, programs)
    assert sorted(work.pixels) == list(range(batch * height * width))
    # How often (pixel of the input, filter of a branch, tap) is multiplied by other than padding,
    # for one block of channels; and how often (pixel, channel) is stored.
    first_rows = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    first_channels = np.cumsum([0, *(b.channels for b in branches)])
    count = np.zeros((batch, height, width, first_rows[-1]), np.int64)
    stored = np.zeros((batch, height, width, channels), np.int64)
    for part in work.parts:
        pixel = work.pixels[part[PartField.FIRST] : part[PartField.FIRST] + block_m]
        image, y, x = pixel // (height * width), pixel // width % height, pixel % width
        if part[PartField.BEGIN] == 0:
            c = np.arange(part[PartField.FILTER], min(part[PartField.FILTER] + block_n, channels))
            np.add.at(stored, (image[:, None], y[:, None], x[:, None], c[None, :]), 1)
        if part[PartField.FILTER]:
            continue
        for i in range(part[PartField.BEGIN], part[PartField.END]):
            step = work.steps[work.classes[part[PartField.CLASS], 0] + i]
            live = step[StepField.LIVE]
            assert 1 <= live <= block_c
            first = step[StepField.WEIGHT_ROW]
            index = np.searchsorted(first_rows, first, side="right") - 1
            branch = branches[index]
            tap, filter_ = divmod(first - first_rows[index], branch.channels)
            assert filter_ % block_c == 0 and filter_ + live <= branch.channels
            assert step[StepField.CHANNEL] == first_channels[index] + filter_
            # The pixel of the output from which this tap reads this pixel of the input.
            down, right = offsets(branch, tap)
            assert (step[StepField.ROW_SHIFT], step[StepField.COL_SHIFT]) == (-down, -right)
            inside = (y - down >= 0) & (y - down < height)
            inside &= (x - right >= 0) & (x - right < width)
            assert inside.any(), "a tap that is dead for the whole tile"
            at = [a[inside][:, None] for a in (image, y, x)]
            np.add.at(count, (*at, np.arange(first, first + live)[None, :]), 1)
    assert (stored == 1).all()
    for index, branch in enumerate(branches):
        for tap in range(branch.taps):
            down, right = offsets(branch, tap)
            first = first_rows[index] + tap * branch.channels
            for y in range(height):
                for x in range(width):
                    live = 0 <= y - down < height and 0 <= x - right < width
                    assert (count[:, y, x, first : first + branch.channels] == live).all()
    check_parts(work, split)
    assert dgrad_tile_counts(*args) == (work.tiles, work.iterations)


@shapes
def test_wgrad_takes_every_live_pair_once(
    batch, height, width, channels, branches, blocks, programs, split
) -> None:
    branches = tuple(branches)
    block_m, block_n, block_c = blocks
    args = Problem(batch, height, width, channels, branches), tile(*blocks, split)
    work = wgrad_schedule(*args, programs)
    first_rows = np.cumsum([0, *(b.taps * b.channels for b in branches)])
    first_channels = np.cumsum([0, *(b.channels for b in branches)])
    # How often a pixel of the output enters an entry of the filters' gradient, all taps.
    taps = [(index, tap) for index, b in enumerate(branches) for tap in range(b.taps)]
    count = {key: np.zeros((batch, height, width), np.int64) for key in taps}
    stored = np.zeros((first_rows[-1], channels), np.int64)
    for part in work.parts:
        row = work.classes[part[PartField.CLASS]].astype(np.int64)
        key = row[WgradField.BRANCH], row[WgradField.TAP]
        branch = branches[key[0]]
        assert row[WgradField.CHANNEL] == first_channels[key[0]]
        assert row[WgradField.CHANNELS] == branch.channels
        first = row[WgradField.WEIGHT_ROW]
        assert first == first_rows[key[0]] + key[1] * branch.channels
        down, right = offsets(branch, key[1])
        assert (row[WgradField.ROW_SHIFT], row[WgradField.COL_SHIFT]) == (down, right)
        if part[PartField.BEGIN] == 0:
            k = np.arange(part[PartField.FIRST], part[PartField.FIRST] + block_m)
            c = np.arange(part[PartField.FILTER], part[PartField.FILTER] + block_n)
            k, c = k[k < branch.channels], c[c < channels]
            np.add.at(stored, ((first + k)[:, None], c[None, :]), 1)
        if part[PartField.FIRST] or part[PartField.FILTER]:
            continue
        pixels = (part[PartField.END] - part[PartField.BEGIN]) * block_c
        image, y, x = pixels_of(row, part[PartField.BEGIN] * block_c, pixels)
        assert ((y + down >= 0) & (y + down < height)).all()
        assert ((x + right >= 0) & (x + right < width)).all()
        np.add.at(count[key], (image, y, x), 1)
    dead = [first_rows[i] + t * branches[i].channels for i, t in taps if not count[i, t].any()]
    for index, tap in taps:
        down, right = offsets(branches[index], tap)
        for y in range(height):
            for x in range(width):
                live = 0 <= y + down < height and 0 <= x + right < width
                assert (count[index, tap][:, y, x] == live).all()
        first = first_rows[index] + tap * branches[index].channels
        rows = stored[first : first + branches[index].channels]
        assert (rows == (first not in dead)).all()
    check_parts(work, split)
    assert wgrad_tile_counts(*args) == (work.tiles, work.iterations)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 33, 53, 64, 65, 641, 2**30 + 1, 2**31 - 1])
def test_divider(divisor: int) -> None:
    """At the numbers where a quotient changes, and at the largest."""
    factor, bits = divider(divisor)
    assert 0 < factor < 2**32
    last = 2**31 - 1
    quotients = {0, 1, 2, 3, 1000, last // divisor - 1, last // divisor}
    numbers = {q * divisor + r for q in quotients for r in (-1, 0, 1)} | {last, last - 1}
    for i in numbers:
        if 0 <= i <= last:
            assert (2 * i * factor >> 32) >> bits == i // divisor


@pytest.mark.parametrize("batch", [0, 2], ids=["no-images", "two-images"])
def test_statistics_have_an_entry_for_each_block_of_pixels(batch: int) -> None:
    branches = (Branch(3, 3, 2), Branch(5, 1, 1), Branch(2, 3, 9))
    block_m = 4
    work = schedule(Problem(batch, 5, 6, 8, branches), tile(block_m, 2, 4), 3)
    table = stats_table(work, block_m)
    assert table.channels.tolist() == [0, 3, 8, 10]
    assert table.ranges[0] == 0 and table.ranges[-1] == len(table.counts)
    used = np.zeros(len(table.counts), np.int64)
    for part in work.parts[work.parts[:, PartField.FILTER] == 0]:
        row = work.classes[part[PartField.CLASS]]
        entry = table.first[part[PartField.CLASS]] + part[PartField.FIRST] // block_m
        used[entry] += 1
        assert table.counts[entry] == len(pixels_of(row, part[PartField.FIRST], block_m)[0])
        index = row[ClassField.BRANCH]
        assert table.ranges[index] <= entry < table.ranges[index + 1]
    assert (used == 1).all()
    sums = [table.counts[a:b].sum() for a, b in zip(table.ranges, table.ranges[1:], strict=False)]
    assert sums == [batch * 30] * 3


@pytest.mark.parametrize(
    "size,batch,block_m,branches,expected",
    [
        pytest.param(65, 16, 128, DEEPLAB, 0.597, id="65x65-batch-16"),
        pytest.param(65, 1, 64, DEEPLAB, 0.626, id="65x65-batch-1"),
        pytest.param(33, 16, 128, OS16, 0.613, id="33x33-batch-16"),
        pytest.param(33, 8, 128, OS16, 0.629, id="33x33-batch-8"),
        pytest.param(33, 1, 64, OS16, 0.724, id="33x33-batch-1"),
    ],
)
def test_work_of_dgrad_against_dense(size, batch, block_m, branches, expected) -> None:
    """Multiply-adds in whole tiles over those of all 28 taps."""
    problem = Problem(batch, size, size, 2048, branches)
    _, iterations = dgrad_tile_counts(problem, tile(block_m, 256, 64))
    dense = 28 * 4 * 8 * batch * size * size
    assert iterations * block_m / dense == pytest.approx(expected, abs=5e-4)
