"""The index arithmetic that the C++ and CUDA upsampling share, against torch's interpolation."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from deeplab_fast import _ext

pytestmark = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)

OPS = torch.ops.deeplab_fast

# Pairs of (inputs, outputs).
SIZES = [
    pytest.param(65, 520, id="up by 8"),
    pytest.param(33, 513, id="up, no integer ratio"),
    pytest.param(97, 769, id="up, odd"),
    pytest.param(7, 7, id="same size"),
    pytest.param(1, 1, id="one to one"),
    pytest.param(1, 9, id="one source pixel"),
    pytest.param(9, 1, id="one output pixel"),
    pytest.param(2, 3, id="smallest that interpolates"),
    pytest.param(40, 33, id="down"),
    pytest.param(130, 17, id="down, cells without outputs"),
    pytest.param(128, 2048, id="up by 16, long"),
]


def interpolation_weights(inputs: int, outputs: int, align_corners: bool, dtype) -> Tensor:
    """[inputs, outputs]: the weights that torch gives each source index, bit for bit.

    Channel i is the map that is 1 at row i, so that every sum has exact terms only.
    """
    maps = torch.eye(inputs, dtype=dtype)[None, :, :, None]
    full = F.interpolate(maps, (outputs, 1), mode="bilinear", align_corners=align_corners)
    return full[0, :, :, 0]


def check(inputs: int, outputs: int, align_corners: bool, dtype: torch.dtype) -> None:
    lo, hi, weight, first = OPS._bilinear_axis(
        inputs, outputs, align_corners, dtype == torch.float64
    )
    lo, hi = lo.long(), hi.long()
    column = torch.arange(outputs)
    weights = torch.zeros(inputs, outputs, dtype=dtype)
    weights[lo, column] += 1 - weight
    weights[hi, column] += weight
    assert torch.equal(weights, interpolation_weights(inputs, outputs, align_corners, dtype))
    # The inverse, by brute force: the outputs of a cell are those whose first source index it is.
    for cell in range(inputs):
        expected = (lo == cell).nonzero()[:, 0]
        assert torch.equal(torch.arange(int(first[cell]), int(first[cell + 1])), expected)
    assert first[0] == 0
    assert first[inputs] == outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_equal_to_interpolate_bit_for_bit(inputs, outputs, align_corners, dtype) -> None:
    check(inputs, outputs, align_corners, dtype)


@settings(max_examples=150, deadline=None)
@given(
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 700),
    align_corners=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_to_interpolate_for_any_size(inputs, outputs, align_corners, dtype) -> None:
    check(inputs, outputs, align_corners, dtype)
