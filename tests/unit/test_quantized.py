"""Convolutions of 8-bit maps against integer arithmetic, and maps between fp32 and 8 bits."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import _ext
from deeplab_fast.dispatch import limits
from deeplab_fast.ops import quantized
from deeplab_fast.ops.quantized import (
    LEVELS,
    Affine,
    Quantised,
    QuantizedConv,
    empty_bytes,
    quantise_into,
    quantised,
    weight_limit,
)

pytestmark = pytest.mark.skipif(bool(limits.cpu_int8()), reason=limits.cpu_int8())
ACTS = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
SOURCE = Affine(0.02, 37)


def bytes_of(*shape: int) -> Tensor:
    """Random bytes, those of the last image all at the top: the largest sums there are."""
    q = torch.randint(0, LEVELS + 1, shape).to(torch.uint8)
    q[-1:] = LEVELS
    return q.contiguous(memory_format=torch.channels_last)


def layer(k: int, c: int, kernel: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(k, c // groups, kernel, kernel) / math.sqrt(c // groups * kernel**2)
    # A filter whose products all saturate 16 bits, if anything does.
    weight[0] = weight[0].abs().max()
    return weight, torch.rand(k) + 0.5, torch.randn(k)


def integers(conv: QuantizedConv, x: Quantised) -> Tensor:
    """scale * conv2d in float64 of the integers, exact, with the shift, before the activation."""
    q = x.values.double() - x.affine.zero_point
    y = F.conv2d(
        q, conv.weight.double(), None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    scale = conv.weight_scale.double() * x.affine.scale
    return y * scale[:, None, None] + conv.shift.double()[:, None, None]


def assert_step(y: Quantised, expected: Tensor) -> None:
    """The result is the expected value's step, or the next where rounding to fp32 decides."""
    q = expected / y.affine.scale + y.affine.zero_point
    # 16 roundings of 2^-24 of a value of at most a few hundred steps, beside half a step.
    assert (y.values.double() - q.clamp(0, LEVELS)).abs().max() <= 0.501


def assert_fp32(y: Tensor, expected: Tensor) -> None:
    # The sum, its scale, the shift, the residual and the activation are rounded to fp32.
    assert (y - expected).abs().max() <= 8 * 2**-24 * expected.abs().max()


# (N, C, K, H, W), kernel, options
LAYERS = [
    pytest.param((2, 40, 48, 9, 7), 1, {}, id="1x1"),
    pytest.param((1, 24, 40, 9, 9), 1, {"stride": 2}, id="1x1 with stride"),
    pytest.param((2, 37, 45, 9, 8), 3, {"padding": 1}, id="3x3, channels fill no block"),
    pytest.param((1, 64, 33, 11, 9), 3, {"padding": 4, "dilation": 4}, id="dilated"),
    pytest.param((1, 64, 33, 5, 9), 3, {"padding": 18, "dilation": 18}, id="beyond the map"),
    pytest.param((2, 16, 40, 9, 9), 3, {"padding": 1, "stride": 2}, id="stride"),
    pytest.param((1, 64, 48, 9, 7), 3, {"padding": (2, 1), "dilation": (2, 1)}, id="anisotropic"),
    pytest.param((1, 8, 16, 1, 1), 1, {}, id="one pixel"),
    pytest.param((2, 72, 72, 9, 9), 3, {"padding": 1, "groups": 72}, id="depthwise"),
    pytest.param((1, 20, 20, 9, 9), 5, {"padding": 2, "stride": 2, "groups": 20}, id="depthwise 5"),
    pytest.param((1, 24, 16, 9, 9), 3, {"padding": 1, "groups": 4}, id="groups"),
    pytest.param((0, 16, 40, 9, 9), 3, {"padding": 1}, id="no image"),
]


@pytest.mark.parametrize(("sizes", "kernel", "options"), LAYERS)
@pytest.mark.parametrize("act", ACTS)
def test_convolution_is_that_of_the_integers(sizes, kernel, options, act) -> None:
    torch.manual_seed(0)
    n, c, k, h, w = sizes
    weight, scale, shift = layer(k, c, kernel, options.get("groups", 1))
    # Zero is no end of the range, so that padding is a step of its own.
    conv = QuantizedConv(weight, scale, shift, source=SOURCE, act=act, **options)
    x = Quantised(bytes_of(n, c, h, w) if n else empty_bytes((n, c, h, w)), SOURCE)
    expected = integers(conv, x)
    y = conv(x)
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    if n == 0:
        return
    assert_fp32(y, ACTS[act](expected))
    into = Affine.of_range(-1.0, float(expected.abs().max()) / 2)
    assert_step(conv(x, into=into), ACTS[act](expected))
    if act not in (None, "relu"):
        return
    residual = Quantised(bytes_of(*expected.shape), Affine(0.013, 201))
    total = ACTS[act](expected + residual.dequantised())
    kept = residual.values.clone()
    assert_step(conv(x, residual, into=into), total)
    assert torch.equal(residual.values, kept)
    assert_fp32(conv(x, residual.dequantised()), total)
    assert_step(conv(x, residual, into=into, overwrite_residual=True), total)


@pytest.mark.parametrize("limit", [64, 127])
@pytest.mark.parametrize("groups", [1, 64])
def test_the_limit_of_weights_is_where_sums_are_exact(limit, groups) -> None:
    if limit > weight_limit(groups > 1):
        pytest.skip("this processor adds products in 16 bits")
    torch.manual_seed(1)
    weight, scale, shift = layer(64, 64, 3, groups)
    conv = QuantizedConv(weight, scale, shift, source=SOURCE, groups=groups, limit=limit, act=None)
    assert conv.weight.abs().amax((1, 2, 3)).eq(limit).all()
    x = Quantised(bytes_of(2, 64, 5, 5), SOURCE)
    assert_fp32(conv(x), integers(conv, x))


def test_limits_of_weights_that_saturate_are_not_taken(monkeypatch) -> None:
    def saturated(self: QuantizedConv, x: Quantised) -> Tensor:
        return integers(self, x).clamp(max=64 * 9 * 64 * LEVELS).float()

    monkeypatch.setattr(QuantizedConv, "__call__", saturated)
    assert weight_limit.__wrapped__(False) == 64
    monkeypatch.setattr(QuantizedConv, "__call__", lambda self, x: saturated(self, x) / 2)
    with pytest.raises(RuntimeError, match="wrong sums"):
        weight_limit.__wrapped__(False)


@pytest.mark.parametrize("bits", [7, 8])
def test_error_of_a_layer_is_what_independent_roundings_explain(bits) -> None:
    """Half a step of each operand, uniform: variances scale^2 / 12, summed over the products."""
    torch.manual_seed(2)
    n, c, k = 1, 96, 64
    x = torch.randn(n, c, 17, 17)
    source, into = Affine.of_range(-4.5, 4.5), Affine.of_range(-8.0, 8.0)
    weight, scale, shift = layer(k, c, 3)
    weight[0] = weight[1]
    if bits == 8 and weight_limit(False) < 127:
        pytest.skip("this processor adds products in 16 bits")
    limit = {7: 64, 8: 127}[bits]
    conv = QuantizedConv(weight, scale, shift, source=source, padding=1, act=None, limit=limit)
    q = quantised(x, source)
    assert q is not None
    y = conv(q, into=into).dequantised()
    expected = F.conv2d(x.double(), (weight * scale[:, None, None, None]).double(), padding=1)
    error = y - expected - shift.double()[:, None, None]
    folded = (weight * scale[:, None, None, None]).double()
    variance = (
        source.scale**2 / 12 * folded.square().sum((1, 2, 3))
        + (conv.weight_scale.double() ** 2 / 12) * c * 9 * x.square().mean()
        + into.scale**2 / 12
    )
    measured = error.square().mean((0, 2, 3))
    # 289 pixels of a filter share its weights' errors, which alone vary by a few tenths.
    assert (measured / variance).mean().sqrt() <= 1.1
    assert (error.abs().amax((0, 2, 3)) <= 12 * variance.sqrt()).all()


def test_shifts_of_images() -> None:
    torch.manual_seed(3)
    weight, scale, shift = layer(40, 16, 1)
    conv = QuantizedConv(weight, scale, shift, source=SOURCE)
    x = Quantised(bytes_of(3, 16, 5, 4), SOURCE)
    shifts = torch.randn(3, 40)
    expected = F.relu(integers(conv, x) - (shift - shifts).double()[:, :, None, None])
    assert_fp32(conv(x, shift=shifts), expected)
    into = Affine.of_range(0.0, 3.0)
    assert_step(conv(x, into=into, shift=shifts), expected)
    one = Quantised(x.values[:1], SOURCE)
    assert torch.equal(conv(one, shift=shifts[:1]), conv(x, shift=shifts)[:1])


def test_nan_of_a_residual_stays() -> None:
    weight, scale, shift = layer(40, 16, 1)
    conv = QuantizedConv(weight, scale, shift, source=SOURCE)
    residual = torch.zeros(1, 40, 3, 3)
    residual[0, 5, 1, 2] = math.nan
    y = conv(Quantised(bytes_of(1, 16, 3, 3), SOURCE), residual)
    assert torch.equal(y.isnan(), residual.isnan())


def test_copies_and_repeated_calls_give_the_same() -> None:
    torch.manual_seed(4)
    weight, scale, shift = layer(48, 32, 3)
    conv = QuantizedConv(weight, scale, shift, source=SOURCE, padding=1)
    x = Quantised(bytes_of(1, 32, 9, 9), SOURCE)
    y = conv(x)
    assert conv.extra_bytes == conv.held == weight.numel()
    for again in (conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(again(x), y)
    # A map of another size, whose weights may lie otherwise in oneDNN.
    other = Quantised(bytes_of(2, 32, 23, 5), SOURCE)
    assert_fp32(conv(other), F.relu(integers(conv, other)))


def test_plan_counts() -> None:
    conv = QuantizedConv(torch.ones(48, 32, 3, 3), None, None, source=SOURCE, padding=1)
    plan = conv.plan((1, 32, 2, 2), 1)
    # Every output pixel of 2 x 2 sees all four.
    assert (plan.kernel, plan.form, plan.macs) == ("onednn", "int8", 16 * 32 * 48)
    assert plan.bytes == 4 * 32 + 4 * 48 + 48 * 32 * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": Affine(0.5, 0)}, "does not fit"),
        ({"channels": 8}, "expected 16 channels"),
        ({"residual": torch.zeros(1, 40, 3, 3), "into": SOURCE}, "in fp32, expected .* in 8 bits"),
        ({"residual": Quantised(empty_bytes((1, 40, 3, 2)), SOURCE), "into": SOURCE}, "residual"),
        ({"act": "hardswish", "residual": torch.zeros(1, 40, 3, 3)}, "no residual"),
    ],
)
def test_calls_that_do_not_fit(change, message) -> None:
    act = change.get("act", "relu")
    conv = QuantizedConv(torch.ones(40, 16, 1, 1), None, None, source=SOURCE, act=act)
    x = Quantised(bytes_of(1, change.get("channels", 16), 3, 3), change.get("source", SOURCE))
    with pytest.raises(ValueError, match=message):
        conv(x, change.get("residual"), into=change.get("into"))


@pytest.mark.parametrize(
    ("weight", "shift", "options", "message"),
    [
        (torch.full((4, 2, 1, 1), math.nan), None, {}, "not finite"),
        (torch.ones(4, 2, 1, 1), torch.tensor([0.0, math.inf, 0, 0]), {}, "not finite"),
        (torch.ones(4, 2, 1, 1), None, {"act": "gelu"}, "act must be one of"),
        (torch.ones(4, 2, 1, 1), None, {"groups": 3}, "must divide"),
        (torch.ones(4, 2, 1, 1).double(), None, {}, "float32 on the CPU"),
        (torch.ones(4, 2, 1, 1), None, {"stride": 0}, "stride must be an int or a pair"),
    ],
)
def test_arguments_that_do_not_fit(weight, shift, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedConv(weight, None, shift, source=SOURCE, **options)


def test_filters_of_zeros() -> None:
    weight = torch.zeros(40, 16, 1, 1)
    weight[1] = 1e-30
    conv = QuantizedConv(weight, None, torch.ones(40), source=SOURCE, act=None)
    assert torch.equal(conv(Quantised(bytes_of(1, 16, 2, 2), SOURCE)), torch.ones(1, 40, 2, 2))


@pytest.fixture(params=["compiled", "plain"])
def conversions(request, monkeypatch) -> None:
    """With the compiled conversions, and with PyTorch's operations."""
    if request.param == "plain":
        monkeypatch.setattr(quantized, "_has_kernels", lambda: False)
    elif not _ext.CPU.loaded or not hasattr(torch.ops.deeplab_fast, "_quantise_cpu"):
        pytest.skip("the conversions are not compiled")


@pytest.mark.usefixtures("conversions")
class TestConversions:
    # Vectors of 32 and what is left; several tasks; one value; none.
    @pytest.mark.parametrize("shape", [(2, 37, 5, 7), (1, 64, 33, 40), (1, 1, 1, 1), (0, 8, 2, 2)])
    def test_values(self, shape) -> None:
        torch.manual_seed(5)
        affine = Affine.of_range(-1.0, 3.0)
        x = torch.randn(shape) * 2
        q = quantised(x, affine)
        assert q is not None
        assert q.shape == x.shape
        assert q.values.is_contiguous(memory_format=torch.channels_last)
        exact = (x.double() / affine.scale).round() + affine.zero_point
        # A tie may fall to either side, as the reciprocal is rounded.
        assert (q.values - exact.clamp(0, LEVELS)).abs().le(1).all()
        assert (q.values != exact.clamp(0, LEVELS)).sum() <= 1e-4 * x.numel()
        back = q.dequantised()
        assert torch.equal(back, (q.values.float() - affine.zero_point) * affine.scale)
        assert back.is_contiguous(memory_format=torch.channels_last)
        # Sums are exact, and rounded to fp32 thrice, cancelled by the zero point.
        if x.numel():
            slack = 4 * 2**-24 * LEVELS * affine.scale
            assert (q.mean() - back.double().mean((2, 3))).abs().max() <= slack

    def test_ties_go_to_even(self) -> None:
        x = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0]).view(1, 6, 1, 1)
        q = quantised(x, Affine(1.0, 10))
        assert q is not None
        assert q.values.flatten().tolist() == [10, 12, 12, 10, 255, 0]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    # Within a vector, and in what is left.
    @pytest.mark.parametrize("place", [3, 64])
    def test_what_is_not_finite_is_told(self, value, place) -> None:
        x = torch.zeros(1, 65, 3, 3)
        x[0, place, 2, 2] = value
        assert quantised(x, SOURCE) is None

    def test_into_a_slice(self) -> None:
        torch.manual_seed(6)
        x = torch.randn(2, 24, 3, 5)
        out = torch.full_like(empty_bytes((2, 50, 3, 5)), 7)
        assert quantise_into(x, SOURCE, out, 13)
        q = quantised(x, SOURCE)
        assert q is not None
        assert torch.equal(out[:, 13:37], q.values)
        assert out[:, :13].eq(7).all()
        assert out[:, 37:].eq(7).all()


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [
        pytest.param(0.0, 6.0, 0, id="from zero"),
        pytest.param(2.0, 6.0, 0, id="zero is held too"),
        pytest.param(-1.0, 2.0, 85, id="both sides"),
        pytest.param(-3.0, -1.0, 255, id="negative"),
    ],
)
def test_ranges(low, high, zero_point) -> None:
    affine = Affine.of_range(low, high)
    assert affine.zero_point == zero_point
    reach = [(q - zero_point) * affine.scale for q in (0, LEVELS)]
    assert reach[0] <= min(low, 0.0) + affine.scale / 2
    assert reach[1] >= max(high, 0.0) - affine.scale / 2


@pytest.mark.parametrize("limits", [(0.0, 0.0), (0.0, math.nan), (-math.inf, 1.0), (0.0, 1e-40)])
def test_ranges_without_8_bits(limits) -> None:
    with pytest.raises(ValueError, match="8 bits"):
        Affine.of_range(*limits)
