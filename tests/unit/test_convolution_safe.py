"""Convolutions that PyTorch does not survive: `reference.convolution` and the ops that call it.

oneDNN's fp32 kernel for AVX2 ends the process where no column of the result has a tap inside the
map, and PyTorch divides by zero at a dilation of 2^31 - 1 (bench/NOTES.md, 2026-11-28).
"""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import ops, reference
from deeplab_fast.backends import use_backend
from deeplab_fast.dispatch.errors import norm_error
from deeplab_fast.ops import quantized
from deeplab_fast.ops.prepared import PreparedConv
from deeplab_fast.ops.prepared_bf16 import Bf16Conv
from deeplab_fast.ops.quantized import Affine, Quantised, QuantizedConv

LARGE = 2**31 - 1
# Of the norm of fp32 results whose sums are only ordered anew (CONTRIBUTING.md).
ORDER = 2e-6
# (map, filters, stride, padding, dilation, groups), each (rows, columns).
UNSAFE = {
    "1x1, a column of padding on either side": ((2, 3), (2, 1), (4, 3, 1, 1), 3, 2, 1, 1),
    "3x1, stride, padding and dilation": ((3, 2), (1, 1), (4, 2, 3, 1), (2, 5), (2, 8), (2, 8), 1),
    "width 2 between taps": ((1, 2), (4, 2), (3, 2, 2, 2), 1, 1, 3, 1),
    "two groups": ((2, 64), (2, 2), (2, 32, 2, 1), 5, 7, 7, 2),
    "depthwise": ((2, 4), (3, 1), (4, 1, 1, 1), 3, 2, 1, 4),
    "no row": ((2, 3), (1, 5), (4, 3, 1, 1), (3, 1), (2, 0), 1, 1),
    "largest dilation and padding": ((2, 3), (5, 5), (4, 3, 3, 3), 1, LARGE, LARGE, 1),
    "largest dilation of a 1x1": ((2, 3), (5, 5), (4, 3, 1, 1), 1, 0, LARGE, 1),
    "largest stride": ((2, 3), (5, 5), (4, 3, 3, 3), LARGE, 1, 1, 1),
    "no images": ((0, 3), (2, 1), (4, 3, 1, 1), 3, 2, 1, 1),
}
rows = pytest.mark.parametrize("row", UNSAFE.values(), ids=UNSAFE)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _data(row: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple]:
    (n, c), size, filters, stride, padding, dilation, groups = row
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, *size, generator=draw).to(dtype)
    weight = torch.randn(filters, generator=draw).to(dtype)
    return x, weight, (_pair(stride), _pair(padding), _pair(dilation), groups)


def _by_pixels(x: Tensor, weight: Tensor, options: tuple) -> Tensor:
    """The definition, value by value."""
    (sy, sx), (py, px), (dy, dx), groups = options
    n, _, height, width = x.shape
    k, each, taps_y, taps_x = weight.shape
    rows = (height + 2 * py - dy * (taps_y - 1) - 1) // sy + 1
    columns = (width + 2 * px - dx * (taps_x - 1) - 1) // sx + 1
    y = torch.zeros(n, k, rows, columns, dtype=torch.float64)
    for o, i, j in product(range(k), range(rows), range(columns)):
        first = o // (k // groups) * each
        for r, s in product(range(taps_y), range(taps_x)):
            row, column = i * sy - py + r * dy, j * sx - px + s * dx
            if 0 <= row < height and 0 <= column < width:
                pixel = x[:, first : first + each, row, column].double()
                y[:, o, i, j] += pixel @ weight[o, :, r, s].double()
    return y


class TestConvolution:
    @rows
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_is_the_definition(self, row: tuple, dtype: torch.dtype) -> None:
        x, weight, options = _data(row, dtype)
        bias = torch.arange(weight.shape[0]).to(dtype)
        assert not reference.is_safe(x.shape, weight.shape, *options[:3])
        y = reference.convolution(x, weight, bias, *options)
        wanted = _by_pixels(x, weight, options) + bias.double()[:, None, None]
        assert y.dtype == dtype and y.shape == wanted.shape
        # A rounding of what is stored, and of fp32 sums.
        rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=rounding)

    @rows
    def test_gradients_are_those_of_autograd(self, row: tuple) -> None:
        x, weight, options = _data(row, torch.float64)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = reference.convolution(x, weight, None, *options)
        grad = torch.randn(y.shape, dtype=y.dtype)
        wanted = torch.autograd.grad(y, (x, weight), grad)
        found = reference.convolution_backward(grad, x.detach(), weight.detach(), *options)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("dilation", [1, 2, 9])
    def test_both_ways_agree(self, groups: int, dilation: int) -> None:
        """Where PyTorch is safe its results are those of the other way."""
        x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
        weight = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64)
        options = ((1, 2), (dilation, 2), (dilation, 2), groups)
        y = F.conv2d(x, weight, None, *options)
        grad = torch.randn_like(y)
        wanted = reference.convolution_backward(grad, x, weight, *options)
        with mock.patch.object(reference, "is_safe", lambda *shapes: False):
            torch.testing.assert_close(reference.convolution(x, weight, None, *options), y)
            found = reference.convolution_backward(grad, x, weight, *options)
        torch.testing.assert_close(found, wanted)

    def test_padding_times_what_is_not_finite_is_nan(self) -> None:
        x, weight, options = _data(UNSAFE["width 2 between taps"], torch.float32)
        weight[1, 0, 0, 0] = float("inf")
        y = reference.convolution(x, weight, None, *options)
        assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()

    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 8])
    def test_gradient_of_strided_pixels(self, channels: int) -> None:
        """Few channels in channels_last: oneDNN's would write behind its memory."""
        x = torch.randn(3, channels, 9, 9).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(4, channels, 1, 1)
        grad = torch.randn(3, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        seen: list[tuple[int, ...]] = []
        called = torch.ops.aten.convolution_backward

        def backward(*args):
            if args[10][1]:
                seen.append(tuple(args[4]))
            return called(*args)

        with mock.patch.object(torch.ops.aten, "convolution_backward", backward):
            found = reference.convolution_backward(grad, x, weight, 3, 0, 1, 1)
        assert seen == [(1, 1)]
        wanted = called(
            grad.double(), x.double(), weight.double(), None, [3, 3], [0, 0], [1, 1], False,
            [0, 0], 1, [True, True, False],
        )  # fmt: skip
        for one, other in zip(found, wanted[:2], strict=True):
            assert norm_error(one, other) <= ORDER


class TestOps:
    @rows
    @pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
    def test_conv_bn_act(self, row: tuple, backend: str) -> None:
        x, weight, options = _data(row, torch.float32)
        if any(one != other for one, other in options[:3]):
            pytest.skip("takes the same options for rows and columns")
        names = ("stride", "padding", "dilation")
        named = {name: pair[0] for name, pair in zip(names, options, strict=False)}
        shift = torch.arange(weight.shape[0]).float()
        inputs = [x.requires_grad_(), weight.requires_grad_()]
        with use_backend(backend):
            y = ops.conv_bn_act(*inputs, None, shift, **named, groups=options[3], act=None)
            y.sum().backward()
        wanted = _by_pixels(x.detach(), weight.detach(), options) + shift.double()[:, None, None]
        torch.testing.assert_close(y.detach().double(), wanted, rtol=2e-6, atol=2e-6)
        assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)

    @rows
    def test_conv2d(self, row: tuple) -> None:
        x, weight, options = _data(row, torch.float32)
        stride, padding, dilation, groups = options
        named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = ops.conv2d(x.requires_grad_(), weight.requires_grad_(), **named)
        y.square().sum().backward()
        wanted = _by_pixels(x.detach(), weight.detach(), options)
        torch.testing.assert_close(y.detach().double(), wanted, rtol=2e-6, atol=2e-6)
        assert x.grad is not None and weight.grad is not None

    @rows
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("residual", [False, True])
    def test_prepared(self, row: tuple, bf16: bool, residual: bool) -> None:
        x, weight, options = _data(row, torch.float32)
        stride, padding, dilation, groups = options
        named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        shift = torch.arange(weight.shape[0]).float()
        conv = (Bf16Conv if bf16 else PreparedConv)(weight, None, shift, act=None, **named)
        x = x.bfloat16() if bf16 else x
        wanted = _by_pixels(x, conv.folded()[0], options) + shift.double()[:, None, None]
        given = torch.ones(wanted.shape).to(x.dtype) if residual else None
        wanted = wanted + 1 if residual else wanted
        # What bf16 stores, and sums before and behind a residual.
        rounding = 2.0**-6 if bf16 else 2e-6
        torch.testing.assert_close(conv(x, given).double(), wanted, rtol=rounding, atol=rounding)

    @rows
    @pytest.mark.parametrize("into", [None, Affine(0.25, 7)], ids=["fp32", "bytes"])
    def test_quantized(self, row: tuple, into: Affine | None) -> None:
        x, weight, options = _data(row, torch.float32)
        stride, padding, dilation, groups = options
        named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        source = Affine(0.05, 128)
        conv = QuantizedConv(weight, None, None, source=source, act="relu", **named)
        q = quantized.quantised(x, source)
        assert q is not None
        y = conv(q, into=into)
        filters = conv.dequantised_weight()
        wanted = _by_pixels(q.dequantised(), filters, options).relu()
        found = y.dequantised() if isinstance(y, Quantised) else y
        if into is None:
            # Sums of whole numbers are exact; what is left is the rounding of the scales.
            assert norm_error(found, wanted) <= ORDER
        else:
            # To the nearest step, which rounding may put beside a value in the middle.
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=into.scale / 2 * 1.001)

    @pytest.mark.parametrize("dilation", [5, 2**20, 2**27, 2**28, LARGE])
    def test_dilations_beyond_the_map_are_all_the_same(self, dilation: int) -> None:
        x, weights = torch.randn(2, 16, 5, 4), [torch.randn(16, 16, 3, 3)]
        one = [torch.ones(16)]
        for backend in ("auto", "cpu", "reference"):
            with use_backend(backend):
                wanted = ops.aspp_branches(x, weights, one, one, [6])
                found = ops.aspp_branches(x, weights, one, one, [dilation])
                assert norm_error(found, wanted) <= ORDER
                y = ops.conv2d(x, weights[0], padding=dilation, dilation=dilation)
                centre = F.conv2d(x.double(), weights[0][:, :, 1:2, 1:2].double())
                assert norm_error(y, centre) <= ORDER


# What geometry may not be: the value, and the words of the refusal.
WRONG = {
    "a bool": True,
    "a float": 1.0,
    "a string": "1",
    "nothing": None,
    "too small": -1,
    "behind 32 bits": 2**31,
    "behind 64 bits": 2**64,
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_is_refused_in_words(name: str, value: object) -> None:
    x, weight, shift = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.zeros(3)
    calls = [
        lambda: ops.conv_bn_act(x, weight, None, shift, **{name: value}),
        lambda: ops.conv2d(x, weight, **{name: value}),
        lambda: ops.conv2d(x, weight, **{name: (1, value)}),
        lambda: PreparedConv(weight, None, None, **{name: value}),
        lambda: Bf16Conv(weight, None, None, **{name: value}),
        lambda: QuantizedConv(weight, None, None, source=Affine(1.0, 0), **{name: value}),
    ]
    if name == "dilation":
        calls.append(lambda: ops.aspp_branches(x, [weight], None, [shift], [value]))
        calls.append(lambda: ops.aspp_convs(x, [weight], [value]))
    for call in calls:
        with pytest.raises(ValueError, match=rf"{name}.*must be an int.*from [01] to {LARGE}"):
            call()


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_sizes_are_refused_in_words(value: object) -> None:
    logits = torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=rf"of size must be an int from 1 to {LARGE}"):
        ops.upsample_argmax(logits, (4, value))


class Composed(torch.nn.Module):
    def forward(self, x, weight):
        return reference.convolution(x, weight, None, 1, 1, 1)


def test_graphs_of_open_sizes_are_recorded():
    x, weight = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3)
    auto = torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 2: auto, 3: auto}, "weight": None}
    graph = torch.export.export(Composed(), (x, weight), dynamic_shapes=shapes).module()
    compiled = torch.compile(Composed(), dynamic=True, fullgraph=True, backend="eager")
    for size in ((16, 16), (9, 30)):
        x = torch.randn(1, 3, *size)
        expected = F.conv2d(x, weight, None, 1, 1)
        assert torch.equal(graph(x, weight), expected)
        assert torch.equal(compiled(x, weight), expected)
