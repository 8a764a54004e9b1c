"""The index tables of the Triton kernels, against torch.nn.functional.interpolate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_fast.plan.bilinear import axis_tables, source_index
from deeplab_fast.plan.device import WARP
from deeplab_fast.plan.upsample import (
    MAX_TABLE_ENTRIES,
    MAX_WIDTH_WASTE,
    forward_config,
    gradient_config,
    num_confusion_tables,
)

SIZES = [
    pytest.param(65, 513, id="up-513-from-65-not-integer"),
    pytest.param(65, 520, id="up-by-8"),
    pytest.param(33, 513, id="up-513-from-33-not-integer"),
    pytest.param(97, 769, id="up-769-from-97"),
    pytest.param(2, 3, id="up-smallest"),
    pytest.param(7, 7, id="same-size-is-a-copy"),
    pytest.param(1, 9, id="one-source-pixel"),
    pytest.param(9, 1, id="one-output-pixel"),
    pytest.param(1, 1, id="one-to-one"),
    pytest.param(513, 65, id="down"),
    pytest.param(100, 99, id="down-by-almost-nothing"),
]


def interpolation_matrix(low, lam, in_size: int) -> np.ndarray:
    matrix = np.zeros((in_size, len(low)), np.float32)
    outputs = np.arange(len(low))
    high = np.minimum(low + 1, in_size - 1)
    matrix[low, outputs] += np.float32(1) - lam
    matrix[high, outputs] += lam
    return matrix


def torch_matrix(in_size: int, out_size: int, align_corners: bool) -> np.ndarray:
    """Weights [in_size, out_size] that F.interpolate uses along columns: its response to units."""
    units = torch.eye(in_size).view(1, in_size, 1, in_size).expand(1, in_size, 2, in_size)
    full = F.interpolate(units, (3, out_size), mode="bilinear", align_corners=align_corners)
    return full[0, :, 1].numpy()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("in_size,out_size", SIZES)
def test_weights_are_pytorchs(in_size: int, out_size: int, align_corners: bool) -> None:
    low, lam = source_index(in_size, out_size, align_corners)
    got = interpolation_matrix(low, lam, in_size)
    expected = torch_matrix(in_size, out_size, align_corners)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        np.testing.assert_array_equal(got, expected)
    # Elsewhere PyTorch may round the product on its own: one more rounding of a position that is
    # below in_size, at the scale's own rounding error.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2 * in_size * 2.0**-24)


@settings(max_examples=60, deadline=None)
@given(
    in_size=st.integers(1, 40),
    out_size=st.integers(1, 90),
    align_corners=st.booleans(),
    block=st.sampled_from([1, 2, 4, 8, 32]),
)
def test_blocks_partition_the_outputs_of_every_cell(
    in_size: int, out_size: int, align_corners: bool, block: int
) -> None:
    t = axis_tables(in_size, out_size, align_corners, block)
    assert ((t.lam >= 0) & (t.lam <= 1)).all()
    assert t.first[0] == 0 and t.first[-1] == out_size
    assert t.block_start[0] == 0 and t.block_start[-1] == t.num_blocks == len(t.first) - 1
    lengths = np.diff(t.first)
    assert (lengths >= 1).all() and (lengths <= block).all()
    for b in range(t.num_blocks):
        assert (t.low[t.first[b] : t.first[b + 1]] == t.block_low[b]).all()
    touching = [0] * in_size
    for i in range(in_size):
        cell = range(t.block_start[i], t.block_start[i + 1])
        assert (t.block_low[list(cell)] == i).all()
        # No more blocks than the cell's length needs.
        assert len(cell) == -(-int((t.low == i).sum()) // block)
        touching[i] += len(cell)
        if i + 1 < in_size:
            touching[i + 1] += len(cell)
    assert t.most_blocks_touching == max(touching)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 -> 5"):
        source_index(0, 5, False)
    with pytest.raises(ValueError, match="block must be at least 1"):
        axis_tables(2, 5, False, 0)


@pytest.mark.parametrize(
    "in_size,out_size,rows,block",
    [
        pytest.param(65, 520, 8, 8, id="by-8-fills-blocks-of-8"),
        pytest.param(65, 513, 8, 8, id="by-7.9-leaves-few-idle"),
        pytest.param(33, 513, 8, 16, id="by-15.5-has-two-row-blocks-in-a-cell"),
        pytest.param(128, 512, 4, 4, id="by-4"),
        pytest.param(65, 65, 1, 1, id="same-size-has-one-output-in-a-cell"),
        pytest.param(513, 65, 1, 1, id="down-has-at-most-one-output-in-a-cell"),
        pytest.param(1, 513, 8, 32, id="one-pixel-map-uses-the-largest-blocks"),
    ],
)
def test_block_sizes_follow_the_ratio(in_size: int, out_size: int, rows: int, block: int) -> None:
    config = gradient_config((in_size, in_size), (out_size, out_size), False)
    assert (config.rows, config.block_cols) == (rows, block)
    assert config.cols == WARP * config.num_warps
    assert config.col_blocks * config.block_cols == config.cols
    assert forward_config((in_size, in_size), (out_size, out_size), False).rows == rows


@pytest.mark.parametrize(
    "cols,warps",
    [
        pytest.param(32, 1, id="one-warp-wide"),
        pytest.param(512, 4, id="a-multiple-of-four-warps"),
        pytest.param(520, 2, id="four-warps-would-idle"),
        pytest.param(33, 2, id="two-warps-are-needed-anyway"),
    ],
)
def test_programs_are_as_wide_as_wastes_little(cols: int, warps: int) -> None:
    config = forward_config((1, 1), (8, cols), False)
    least = -(-cols // 32) * 32
    padded = -(-cols // config.cols) * config.cols
    assert padded <= MAX_WIDTH_WASTE * least
    assert config.num_warps == warps


@pytest.mark.parametrize(
    "classes,pixels,expected",
    [
        pytest.param(21, 16 * 513 * 513, 4096, id="few-classes-many-pixels"),
        pytest.param(150, 16 * 513 * 513, 256, id="memory-limits-the-tables"),
        pytest.param(21, 100, 1, id="few-pixels-need-one"),
        pytest.param(8192, 10**7, 1, id="large-tables-are-single"),
    ],
)
def test_number_of_confusion_tables(classes: int, pixels: int, expected: int) -> None:
    tables = num_confusion_tables(classes, pixels)
    assert tables == expected
    assert tables & (tables - 1) == 0
    assert tables == 1 or tables * classes**2 <= MAX_TABLE_ENTRIES


def test_tables_are_computed_once() -> None:
    assert axis_tables(5, 11, False, 4) is axis_tables(5, 11, False, 4)
    assert axis_tables(5, 11, True, 4) is not axis_tables(5, 11, False, 4)
