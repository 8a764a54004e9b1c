"""The Triton kernel of fold_filters, in Triton's interpreter.

Both it and the reference make one product in float32 and round it once, so that their bits are the
same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops
from deeplab_fast.plan import fold
from deeplab_fast.testing import deterministic

pytestmark = pytest.mark.interpret

PACKED = torch.ops.deeplab_fast.fold_filters
DTYPES = [torch.float32, torch.float16]
# More than one tile of 512 vectors, and of 256 pairs.
LAYERS = [
    pytest.param([(40, 128, 1, 1)], id="1x1-several-tiles"),
    pytest.param([(24, 16, 3, 3)], id="3x3-several-tiles"),
    pytest.param([(8, 3, 7, 7)], id="stem"),
    pytest.param([(5, 4, 2, 3), (5, 4, 3, 1)], id="taps-in-no-square"),
    pytest.param([(16, 1, 3, 3), (8, 1, 4, 4)], id="depthwise-odd-and-whole-vectors"),
    pytest.param([(21, 7, 3, 3), (1, 1, 1, 1), (3, 8, 1, 1)], id="gaps-and-one-value"),
    pytest.param([(0, 3, 3, 3), (4, 3, 3, 3), (0, 8, 1, 1)], id="layers-without-filters"),
    pytest.param([(0, 3, 3, 3)], id="nothing"),
    pytest.param([(2, 2, 1, 1)] * 200, id="200-layers"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "strided": lambda w: w.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "transposed": lambda w: w.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "expanded": lambda w: w[:, :1].expand_as(w),
    "4-bytes-off": lambda w: torch.cat([w.new_zeros(4 // w.itemsize), w.flatten()])[
        4 // w.itemsize :
    ].view_as(w),
}


def make(layers, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    weights = [torch.randn(shape).to(dtype) for shape in layers]
    return weights, torch.rand(sum(shape[0] for shape in layers)) + 0.5


def check(weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> None:
    """The same bits as the reference, in the gaps too; what is not written would be NaN."""
    with dlf.use_backend("reference"):
        expected = PACKED(weights, scale, dtype)
    with dlf.use_backend("triton"), deterministic():
        got = PACKED(weights, scale, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_layer(layers, dtype) -> None:
    check(*make(layers, dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype) -> None:
    weights, scale = make([(8, 16, 3, 3), (7, 8, 1, 1), (6, 1, 3, 3)], dtype)
    check([layout(w) for w in weights], scale, dtype)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_of_another_dtype(dtype, to) -> None:
    check(*make([(8, 16, 3, 3), (16, 8, 1, 1)], dtype), to)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
def test_not_finite(value) -> None:
    """1e30 is infinite once it is rounded to float16."""
    weights, scale = make([(4, 3, 3, 3), (8, 8, 1, 1)])
    weights[0][1, 2, 0, 1] = weights[1][3, 4] = value
    scale[2] = scale[9] = value
    weights[1][5, 0] = 0.0
    check(weights, scale, torch.float16)


def test_filters_that_change_are_read_anew() -> None:
    """The table that the second call finds has their addresses, not their values."""
    weights, scale = make([(8, 16, 3, 3), (8, 8, 1, 1)])
    with dlf.use_backend("triton"):
        before = ops.fold_filters(weights, scale, torch.float32)
        tables = fold.device_tables(weights)
        for w in weights:
            w.add_(1)
        scale.mul_(2)
        after = ops.fold_filters(weights, scale, torch.float32)
        assert fold.device_tables(weights) is tables
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    check(weights, scale, torch.float32)


def test_what_it_cannot_run() -> None:
    weights, scale = make([(4, 3, 3, 3)], torch.float64)
    reasons = dict(dlf.why("fold_filters", weights, scale.double(), torch.float32).rows)["triton"]
    assert reasons == ("multiplies in float32, the filters are float64",)
    weights, scale = make([(4, 3, 3, 3)])
    reasons = dict(dlf.why("fold_filters", weights, scale, torch.float64).rows)["triton"]
    assert reasons == ("accumulates in float32, the input is float64",)
    large = [torch.empty(2**15, 2**14, 2, 2, device="meta")]
    scale = torch.empty(2**15, device="meta")
    reasons = dict(dlf.why("fold_filters", large, scale, torch.float32).rows)["triton"]
    assert reasons == ("counts at most 2147483647 values, the filters have 2147483648",)
