"""The Triton kernels of the ASPP in training, in Triton's interpreter.

The oracle is `deeplab_fast.reference` in float64. A sum of n products in float32, in any order, is
off by at most n 2^-24 times the sum of their magnitudes, and one rounding follows: the bound of
every entry is that, with the magnitudes from the reference of absolute values. Statistics are held
against those of the result as it was stored. Multiprocessors are taken to be three, so that a
program runs several tiles one behind the other, and a cut lies within tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from deeplab_fast.kernels import aspp_training, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.plan.device import H100
from deeplab_fast.plan.gemm import GemmConfig
from deeplab_fast.plan.gradients import dgrad_schedule, wgrad_schedule
from deeplab_fast.plan.packing import pack_weights, unpack_weights
from deeplab_fast.plan.schedule import schedule
from deeplab_fast.plan.taps import Branch, Problem, tap_rectangles

pytestmark = pytest.mark.interpret

STEP = 2.0**-24
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
# Half the distance of the smallest numbers.
SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25}
# Few and small: the interpreter takes 10 ms for an iteration, whatever the size of the tile.
WHOLE = GemmConfig(32, 32, 32, num_warps=4, num_stages=2, occupancy=1)
CUT = replace(WHOLE, split=True)
# A list with cut tiles has whole ones too.
DTYPES = pytest.mark.parametrize(
    "dtype,config",
    [
        pytest.param(torch.float32, CUT, id="fp32-cut"),
        pytest.param(torch.float16, WHOLE, id="fp16-whole"),
    ],
)


@pytest.fixture(autouse=True)
def _three_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    device = replace(H100, multiprocessors=3)
    monkeypatch.setattr(launch, "device_of", lambda x: device)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_within(got: Tensor, exact: Tensor, magnitudes: Tensor, terms: int) -> None:
    """The rule above, and the shape."""
    assert got.shape == exact.shape and not got.isnan().any()
    bound = terms * STEP * magnitudes
    bound = bound + (exact.abs() + bound) * HALF_STEP[got.dtype] + SMALLEST[got.dtype]
    assert ((got.double() - exact).abs() <= bound).all()


def assert_statistics_of(y: Tensor, mean: Tensor, variance: Tensor) -> None:
    """mean and variance are those of y as stored.

    An addition or product on the longest path to a sum adds a relative 2^-24. The error of a mean
    enters the squares about it with twice the deviation, and squared.
    """
    y = y.double()
    exact_mean, exact_variance, _ = reference.batch_stats(y)
    path = 60 * STEP
    size = y.abs().mean((0, 2, 3))
    assert mean.dtype == variance.dtype == torch.float32
    assert ((mean.double() - exact_mean).abs() <= path * size).all()
    bound = path * (exact_variance + 2 * exact_variance.sqrt() * size + path * size**2)
    assert ((variance.double() - exact_variance).abs() <= bound).all()


@dataclass
class Case:
    """Arguments of aspp_convs and a gradient to its result: a branch for each of (filters, kernel,
    dilation)."""

    x: Tensor
    weights: list[Tensor]
    dilations: list[int]
    grad: Tensor

    @classmethod
    def make(cls, shape, branches, dtype=torch.float32):
        n, c, h, w = shape
        weights = [torch.randn(k, c, s, s) / (c * s * s) ** 0.5 for k, s, _ in branches]
        return cls(
            channels_last(torch.randn(shape).to(dtype)),
            [w.to(dtype) for w in weights],
            [d for _, _, d in branches],
            channels_last(torch.randn(n, sum(k for k, _, _ in branches), h, w).to(dtype)),
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(
            Branch(w.shape[0], w.shape[-1], d)
            for w, d in zip(self.weights, self.dilations, strict=True)
        )

    def doubles(self, absolute: bool):
        make = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        return make(self.grad), make(self.x), [make(w) for w in self.weights], self.dilations

    def check_forward(self, config: GemmConfig | None) -> None:
        y, mean, variance = aspp_training.aspp_convs(
            self.x, self.weights, self.dilations, True, config
        )
        assert y.dtype == self.x.dtype and y.is_contiguous(memory_format=torch.channels_last)
        exact, magnitudes = (
            reference.aspp_convs(*self.doubles(absolute)[1:], False)[0]
            for absolute in (False, True)
        )
        assert_within(y, exact, magnitudes, 9 * self.x.shape[1])
        assert_statistics_of(y, mean, variance)
        alone, *none = aspp_training.aspp_convs(self.x, self.weights, self.dilations, False, config)
        assert torch.equal(alone, y) and [t.numel() for t in none] == [0, 0]

    def check_backward(self, config: GemmConfig | None) -> None:
        n, _, height, width = self.x.shape
        matrix = pack_weights(self.weights)
        dx = aspp_training.dgrad(self.grad, matrix, self.branches, config)
        dw = aspp_training.wgrad(self.grad, self.x, self.branches, config)
        assert dx.dtype == dw.dtype == self.x.dtype
        assert dx.is_contiguous(memory_format=torch.channels_last)
        exact, magnitudes = (
            reference.aspp_convs_backward(*self.doubles(absolute), True, True)
            for absolute in (False, True)
        )
        assert_within(dx, exact[0], magnitudes[0], sum(b.taps * b.channels for b in self.branches))
        got = unpack_weights(dw, self.branches)
        for g, e, m in zip(got, exact[1], magnitudes[1], strict=True):
            assert_within(g, e, m, n * height * width)
        # Exactly, and where no pixel is.
        live = {(r.branch, r.tap) for r in tap_rectangles(height, width, self.branches)}
        for index, g in enumerate(got):
            for tap in range(self.branches[index].taps):
                if (index, tap) not in live:
                    assert (g.flatten(2)[:, :, tap] == 0).all()


CASES = [
    # Channels and filters that fill no block, tiles across images, branches of two widths.
    pytest.param((2, 20, 4, 3), [(24, 1, 1), (40, 3, 2)], id="ragged"),
    pytest.param((3, 5, 1, 1), [(4, 3, 1), (4, 1, 1)], id="map-of-one-pixel"),
    pytest.param((1, 8, 3, 4), [(8, 3, 7)], id="dilation-beyond-the-map"),
    pytest.param((1, 8, 2, 6), [(8, 3, 3)], id="dilation-beyond-one-side"),
    pytest.param((1, 64, 3, 2), [(32, 3, 2)], id="channels-and-filters-fill-blocks"),
    pytest.param((1, 1, 2, 2), [(1, 3, 1)], id="one-channel-one-filter"),
]
# Tiles lie across classes of pixels; two chunks of filters in one branch, one in another.
TWO_RATES = pytest.param((2, 12, 4, 5), [(40, 3, 1), (8, 3, 3)], id="two-rates-two-chunks")


@pytest.mark.parametrize("shape,branches", CASES)
@DTYPES
def test_forward_and_statistics(shape, branches, dtype, config, nan_poison) -> None:
    Case.make(shape, branches, dtype).check_forward(config)


@pytest.mark.parametrize("shape,branches", [*CASES, TWO_RATES])
@DTYPES
def test_gradients(shape, branches, dtype, config, nan_poison) -> None:
    Case.make(shape, branches, dtype).check_backward(config)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    branches=st.lists(
        st.tuples(st.integers(1, 33), st.sampled_from([1, 3]), st.integers(1, 6)),
        min_size=1,
        max_size=2,
    ),
)
def test_any_shape(shape, branches) -> None:
    case = Case.make(shape, branches)
    case.check_forward(CUT)
    case.check_backward(CUT)


def test_tiles_of_any_size() -> None:
    case = Case.make((1, 40, 4, 4), [(40, 3, 3)])
    # 8 warps twice on a multiprocessor: with a limit of registers.
    for config in (GemmConfig(16, 64, 16, 8, 3, 2), GemmConfig(64, 32, 64, 4, 2, 1, split=True)):
        case.check_forward(config)
        case.check_backward(config)


def test_the_choice_by_rule_runs() -> None:
    case = Case.make((1, 8, 3, 3), [(8, 3, 2)])
    case.check_forward(None)
    case.check_backward(None)


def test_cut_tiles_are_added_in_the_same_order_every_time() -> None:
    case = Case.make((5, 224, 2, 4), [(8, 1, 1)])
    assert schedule(Problem(5, 2, 4, 224, case.branches), replace(CUT, block_c=16), 3).slots
    config = replace(CUT, block_c=16)
    first, again = (
        aspp_training.aspp_convs(case.x, case.weights, case.dilations, True, config)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "shape,filters,make",
    [
        pytest.param((4, 8, 4, 4), 160, dgrad_schedule, id="dgrad"),
        pytest.param((11, 8, 4, 4), 32, wgrad_schedule, id="wgrad"),
    ],
)
def test_cut_tiles_of_gradients_are_added_in_the_same_order(shape, filters, make) -> None:
    case = Case.make(shape, [(filters, 1, 1)])
    config = replace(CUT, block_c=16)
    n, c, h, w = shape
    assert make(Problem(n, h, w, c, case.branches), config, 3).slots
    matrix = pack_weights(case.weights)
    runs = [
        (
            aspp_training.dgrad(case.grad, matrix, case.branches, config),
            aspp_training.wgrad(case.grad, case.x, case.branches, config),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case.check_backward(config)


@pytest.mark.parametrize("config", [WHOLE, CUT], ids=["whole", "cut"])
def test_statistics_do_not_change_the_result(config: GemmConfig) -> None:
    case = Case.make((1, 300, 3, 3), [(8, 3, 3)])
    args = (case.x, case.weights, case.dilations)
    y, mean, variance = aspp_training.aspp_convs(*args, False, config)
    assert mean.numel() == variance.numel() == 0
    assert torch.equal(y, aspp_training.aspp_convs(*args, True, config)[0])


def test_statistics_of_values_far_from_zero() -> None:
    """A variance from the mean of squares would lose all digits here."""
    case = Case.make((3, 8, 5, 5), [(8, 1, 1)])
    case.weights[0][:] = 0
    case.weights[0][:, 0] = 1
    case.x[:, 0] = 4096 + torch.randn(3, 5, 5)
    for config in (WHOLE, CUT):
        y, mean, variance = aspp_training.aspp_convs(
            case.x, case.weights, case.dilations, True, config
        )
        assert_statistics_of(y, mean, variance)
        exact = y.double().var((0, 2, 3), correction=0)
        torch.testing.assert_close(variance.double(), exact, rtol=0.02, atol=0)


def test_without_images() -> None:
    x = torch.empty(0, 8, 3, 3)
    weights = [torch.randn(4, 8, 3, 3), torch.randn(4, 8, 1, 1)]
    y, mean, variance = aspp_training.aspp_convs(x, weights, [2, 1], True)
    assert y.shape == (0, 8, 3, 3) and (mean == 0).all() and (variance == 0).all()
    dx, dw = aspp_training.aspp_convs_backward(y, x, weights, [2, 1], True, True)
    assert dx.shape == x.shape and [g.shape for g in dw] == [w.shape for w in weights]
    assert all((g == 0).all() for g in dw)


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 2, 2, 2))[:, 3:11, 1:4, :3],
            id="slice-of-a-larger-map",
        ),
        # What the gradient of a sum is.
        pytest.param(lambda x: x[:1, :1, :1, :1].expand(x.shape), id="expanded-stride-0"),
        pytest.param(lambda x: channels_last(x).transpose(2, 3), id="transposed"),
    ],
)


@LAYOUTS
def test_any_strides(layout) -> None:
    case = Case.make((2, 8, 3, 3), [(8, 3, 2)])
    case.x, case.grad = layout(case.x), layout(case.grad)
    case.check_forward(WHOLE)
    case.check_backward(WHOLE)


@pytest.mark.parametrize("stride", [2**30 + 65, 2**30 + 64], ids=["odd", "aligned"])
def test_offsets_beyond_int32(stride: int) -> None:
    """Each stride fits an int32, the offset of the third image does not."""

    def far_apart(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        try:
            memory = torch.empty((n - 1) * stride + c * h * w, dtype=x.dtype)
        except RuntimeError as error:
            pytest.skip(f"no address space for 2^31 elements: {error}")
        return memory.as_strided(x.shape, (stride, 1, w * c, c)).copy_(x)

    case = Case.make((3, 8, 1, 2), [(8, 3, 1)], torch.float16)
    case.x, case.grad = far_apart(case.x), far_apart(case.grad)
    case.check_forward(WHOLE)
    case.check_backward(WHOLE)


def test_what_is_no_number_stays_in_its_channel() -> None:
    case = Case.make((1, 20, 4, 3), [(8, 3, 2)])
    # At the centre: in PyTorch the other taps also multiply padding, and inf * 0 is NaN.
    case.weights[0][5, 0, 1, 1] = float("inf")
    y, mean, variance = aspp_training.aspp_convs(case.x, case.weights, case.dilations, True, WHOLE)
    rest = [0, 1, 2, 3, 4, 6, 7]
    assert not y[:, 5].isfinite().any() and not variance[5].isfinite()
    assert_statistics_of(y[:, rest], mean[rest], variance[rest])


def test_autograd_through_the_op(nan_poison) -> None:
    case = Case.make((2, 8, 4, 5), [(8, 1, 1), (16, 3, 2)])
    x = case.x.clone().requires_grad_()
    weights = [w.clone().requires_grad_() for w in case.weights]
    with dlf.use_backend("triton"):
        y, mean, variance = ops.aspp_convs(x, weights, case.dilations, stats=True)
        y.backward(case.grad)
    assert mean is not None and variance is not None
    assert_statistics_of(y.detach(), mean, variance)
    exact, magnitudes = (
        reference.aspp_convs_backward(*case.doubles(absolute), True, True)
        for absolute in (False, True)
    )
    assert_within(x.grad, exact[0], magnitudes[0], 8 + 9 * 16)
    for w, e, m in zip(weights, exact[1], magnitudes[1], strict=True):
        assert w.grad.is_contiguous()
        assert_within(w.grad, e, m, 2 * 4 * 5)


@pytest.mark.parametrize(
    "to_x,to_weights", [(True, False), (False, True)], ids=["frozen-weights", "frozen-input"]
)
def test_only_what_is_asked_for(to_x: bool, to_weights: bool, monkeypatch) -> None:
    case = Case.make((1, 8, 3, 3), [(8, 3, 1), (8, 1, 1)])
    unwanted = "wgrad" if to_x else "dgrad"
    monkeypatch.setattr(aspp_training, unwanted, lambda *args: pytest.fail(f"ran {unwanted}"))
    dx, dw = aspp_training.aspp_convs_backward(
        case.grad, case.x, case.weights, case.dilations, to_x, to_weights
    )
    assert (dx.shape == case.x.shape) == to_x and (dx.numel() == 0) != to_x
    assert len(dw) == (2 if to_weights else 0)
