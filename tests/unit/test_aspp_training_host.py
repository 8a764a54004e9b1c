"""The tile lists of the ASPP's gradients against brute force, and the host side of its training
kernels: reasons, candidates, launches.

A live pair is a pixel of the output and a tap that reads inside the map. The gradient to the input
takes each once, seen from the pixel that is read; the gradient to a filter's tap takes each once.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from deeplab_fast.kernels import aspp_training, launch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deeplab_fast import backends
from deeplab_fast.backends import OpDesc
from deeplab_fast.plan.device import A100, H100
from deeplab_fast.plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, GemmConfig, aspp_dgrad_candidates
from deeplab_fast.plan.gradients import (
    StepField,
    WgradField,
    dgrad_schedule,
    dgrad_tile_counts,
    divider,
    wgrad_schedule,
    wgrad_tile_counts,
)
from deeplab_fast.plan.schedule import ClassField, PartField, schedule, stats_table
from deeplab_fast.plan.taps import Branch, Problem

OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever this process was started with."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tile(block_m: int, block_n: int, block_c: int, split: bool = False) -> GemmConfig:
    return GemmConfig(block_m, block_n, block_c, 4, 3, 1, split)


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


branch_lists = st.lists(
    st.builds(Branch, st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 8)),
    min_size=1,
    max_size=3,
)
# The edges of both lists: no images, one pixel, a rate beyond the map and any int32, a rate beyond
# one side only, no pixel with all taps, two branches alike, a larger kernel.
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


@pytest.mark.parametrize("make", [dgrad_schedule, wgrad_schedule])
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


@pytest.mark.parametrize(
    "size,batch,block_m,branches,expected",
    [
        pytest.param(65, 16, 128, OS8, 0.597, id="65x65-batch-16"),
        pytest.param(65, 1, 64, OS8, 0.626, id="65x65-batch-1"),
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


def convs_desc(op="aspp_convs", shape=(16, 2048, 65, 65), branches=OS8, **changes) -> OpDesc:
    params = {
        "weights": tuple((b.channels, shape[1], b.kernel, b.kernel) for b in branches),
        "dilations": tuple(b.dilation for b in branches),
    }
    return replace(OpDesc(op, "cuda", torch.bfloat16, shape, params, (9, 0)), **changes)


@pytest.mark.parametrize(
    "desc,expected",
    [
        pytest.param(convs_desc(), [], id="forward-runs"),
        pytest.param(convs_desc(shape=(0, 8, 5, 5)), [], id="forward-of-nothing"),
        pytest.param(convs_desc(dtype=torch.float64), ["accumulates in float32"], id="float64"),
        pytest.param(convs_desc(device="cpu", capability=None), ["is on cpu"], id="cpu"),
        pytest.param(convs_desc(shape=(2**20, 8, 64, 64)), ["at most 2147483647"], id="pixels"),
        pytest.param(convs_desc("aspp_convs_backward"), [], id="backward-runs"),
        pytest.param(
            convs_desc("aspp_convs_backward", capability=(7, 5)), ["has 7.5"], id="backward-old-gpu"
        ),
    ],
)
def test_reasons(desc: OpDesc, expected: list[str]) -> None:
    implementation = backends.implementations(desc.op)["triton"]
    reasons = implementation.not_supported_reasons(desc)
    assert len(reasons) == len(expected)
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason


@pytest.mark.parametrize("device", [H100, A100], ids=lambda d: d.name)
@pytest.mark.parametrize("math", [MMA_16BIT, MMA_TF32, FMA_FP32])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_dgrad_keeps_registers_for_places_of_pixels(device, math, aligned) -> None:
    found = aspp_dgrad_candidates(math, device, None, aligned)
    assert found and {c.split for c in found} == {False, True} and len(set(found)) == len(found)
    itemsize = 2 if math == MMA_16BIT else 4
    for c in found:
        accumulator = c.block_m * c.block_n // (32 * c.num_warps)
        assert accumulator < 128 or c.num_warps == 8
        assert c.max_registers > accumulator and c.is_legal(itemsize, device)


class Recorder:
    """Stands for the module of kernels; keeps the launches as (kernel, grid, options)."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getattr__(self, kernel: str):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.launches.append((kernel, grid, options))

        return Kernel()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "device_module", lambda name: recorder)
    monkeypatch.setattr(launch, "on_device", lambda x: nullcontext())
    return recorder


def test_launches(recorder: Recorder) -> None:
    """At batch 1 tiles of the map are cut, those of the filters are not."""
    shape = (1, 2048, 33, 33)
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weights = [torch.empty(b.channels, 2048, b.kernel, b.kernel).bfloat16() for b in OS16]
    dilations = [b.dilation for b in OS16]
    y, mean, variance = aspp_training.aspp_convs(x, weights, dilations, True)
    assert mean.shape == variance.shape == (1024,)
    aspp_training.aspp_convs_backward(y, x, weights, dilations, True, True)
    assert [kernel for kernel, _, _ in recorder.launches] == [
        "aspp_convs_kernel", "aspp_convs_sum_kernel", "aspp_stats_kernel",
        "aspp_dgrad_kernel", "aspp_dgrad_sum_kernel", "aspp_wgrad_kernel",
    ]  # fmt: skip
    forward, _, stats, dgrad, _, wgrad = recorder.launches
    assert stats[1] == (4 * 256 // 16,)
    for _, grid, options in (forward, dgrad, wgrad):
        assert grid == (H100.multiprocessors,)
        assert options["VEC_X"] == 8 and options["PRECISION"] == "ieee"
        assert (options["BLOCK_M"], options["BLOCK_N"], options["num_warps"]) == (128, 256, 8)
    assert forward[2]["STATS"] and forward[2]["SPLIT"] and dgrad[2]["SPLIT"]
    assert dgrad[2]["EVEN_K"] and dgrad[2]["EVEN_C"]
    assert not wgrad[2]["SPLIT"] and not wgrad[2]["WIDE"]


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_operands_are_rounded_only_where_pytorch_allows_it(
    tf32, recorder, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "allow_tf32", lambda: tf32)
    x, weights = torch.empty(1, 32, 4, 4), [torch.empty(32, 32, 3, 3)]
    y, *_ = aspp_training.aspp_convs(x, weights, [1], False)
    aspp_training.aspp_convs_backward(y, x, weights, [1], True, True)
    found = [options["PRECISION"] for _, _, options in recorder.launches if "PRECISION" in options]
    assert found == ["tf32" if tf32 else "ieee"] * 3


def test_distances_beyond_int32_are_counted_in_64_bits() -> None:
    near = torch.empty(3, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    far = torch.empty_strided((3, 8, 4, 4), (2**30, 1, 32, 8), device="meta")
    assert not aspp_training._is_wide(near, 1)
    assert aspp_training._is_wide(far, 1) and not aspp_training._is_wide(far, 8)


def test_the_launchers_do_not_hold_triton() -> None:
    assert not hasattr(aspp_training, "triton")
    assert not any(
        getattr(value, "__name__", "").endswith("aspp_training_kernels")
        for value in vars(aspp_training).values()
    )
