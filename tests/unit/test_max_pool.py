"""The C++ maxima over windows: PyTorch's values to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deeplab_fast.program.cpu_layers import MaxPoolLayer

CASES = {
    "resnet's": ((2, 64, 17, 23), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "channels that fill no vector": ((1, 5, 9, 8), {"kernel_size": 2}),
    "one pixel": ((1, 3, 1, 1), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "rows and columns differ": (
        (1, 8, 12, 20),
        {"kernel_size": (2, 5), "stride": (1, 3), "padding": (1, 2), "dilation": (2, 1)},
    ),
    "windows beyond the map": ((1, 4, 8, 8), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "no images": ((0, 4, 8, 8), {"kernel_size": 3, "stride": 2}),
}


def layer(options: dict, dtype: torch.dtype) -> MaxPoolLayer:
    module = nn.MaxPool2d(**options)
    assert MaxPoolLayer.takes(module)
    return MaxPoolLayer("pool", module, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_are_pytorchs(case: str, dtype: torch.dtype) -> None:
    shape, options = CASES[case]
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[::7] = torch.nan
        x.view(-1)[3::11] = torch.inf
        x.view(-1)[1::5] = -torch.inf
        x.view(-1)[2::13] = -0.0
    pool = layer(options, dtype)
    expected = nn.MaxPool2d(**options)(x.float())
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    out = out.contiguous(memory_format=torch.channels_last)
    for y in (pool(x), pool(x, out=out)):
        assert y.dtype == dtype
        assert torch.equal(y.float().isnan(), expected.isnan())
        assert torch.equal(y.float().nan_to_num(9), expected.nan_to_num(9))
    if out.numel():
        assert pool(x, out=out) is out


def test_indices_are_pytorchs_to_give() -> None:
    assert not MaxPoolLayer.takes(nn.MaxPool2d(2, return_indices=True))
    assert not MaxPoolLayer.takes(nn.AvgPool2d(2))


def test_what_does_not_fit_is_refused() -> None:
    op = torch.ops.deeplab_fast._max_pool_cpu
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    pairs = ([2, 2], [2, 2], [0, 0], [1, 1])
    for bad, out, message in (
        (x.double(), F.max_pool2d(x, 2), "float32 or bfloat16"),
        (x.contiguous(), F.max_pool2d(x, 2), "channels_last"),
        (x, F.max_pool2d(x, 2)[:, :3], "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            op(bad, *pairs, out)
    for options, message in (
        (([2], *pairs[1:]), r"kernel must be 2 numbers, got \[2\]"),
        ((pairs[0], [0, 2], *pairs[2:]), r"stride must be from 1 to"),
        ((*pairs[:3], [1, 2**31]), r"dilation must be from 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            op(x, *options, F.max_pool2d(x, 2))


def test_a_window_far_larger_than_the_map() -> None:
    """Only the taps inside the map are looked at, of 2^31."""
    x = torch.randn(1, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    large = [2**31 - 1] * 2
    torch.ops.deeplab_fast._max_pool_cpu(x, large, [1, 1], [2**30] * 2, [1, 1], out)
    assert torch.equal(out, x.amax((2, 3), keepdim=True))
