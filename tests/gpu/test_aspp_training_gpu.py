"""The Triton kernels of the ASPP in training, on a GPU at real sizes.

The oracle is `deeplab_fast.reference` in float64. A result passes when its largest error is at most
twice that of PyTorch's own convolution and its backward in the same dtype on the same values, plus
one rounding of the largest result. Statistics are held against those of the result as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from deeplab_fast.kernels import aspp_training, launch
from gpu_harness import (
    DEVICE,
    OS8,
    OS16,
    assert_error,
    assert_same,
    channels_last,
    every_dtype,
    needs_memory,
    peak_memory,
    replayed,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.plan.device import device_of
from deeplab_fast.plan.gemm import (
    MMA_16BIT,
    aspp_branches_candidates,
    aspp_dgrad_candidates,
    gemm_candidates,
)
from deeplab_fast.plan.packing import pack_weights, unpack_weights
from deeplab_fast.plan.taps import Branch, tap_rectangles
from deeplab_fast.testing import tf32

# N, C, H, W, (filters, kernel, dilation) of each branch
SIZES = [
    pytest.param((2, 2048, 65, 65, OS8), id="os8-65x65-batch-2"),
    pytest.param((1, 2048, 33, 33, OS16), id="os16-33x33-batch-1"),
    pytest.param((8, 2048, 33, 33, OS16), id="os16-33x33-batch-8"),
    pytest.param((1, 512, 128, 256, OS8), id="cityscapes-not-square"),
    pytest.param((3, 320, 17, 19, ((48, 3, 5), (96, 1, 1), (256, 3, 40))), id="beyond-the-map"),
    pytest.param((2, 2048, 1, 1, OS8), id="map-of-one-pixel"),
    pytest.param((2, 321, 21, 13, ((21, 3, 4), (7, 1, 1))), id="odd-channels-and-filters"),
    pytest.param((2, 36, 9, 9, ((20, 3, 2),)), id="accesses-of-8-bytes"),
]


def assert_statistics_of(y: Tensor, mean: Tensor, variance: Tensor) -> None:
    """mean and variance are those of y as stored.

    An addition or product on the longest path to a sum (over 128 rows in a tree, and over the tiles
    in runs of 64) adds a relative 2^-24; the error of a mean enters the squares about it with twice
    the deviation, and squared.
    """
    y = y.double()
    exact_mean, exact_variance, _ = reference.batch_stats(y)
    path = 200 * 2.0**-24
    size = y.abs().mean((0, 2, 3))
    assert ((mean.double() - exact_mean).abs() <= path * size).all()
    bound = path * (exact_variance + 2 * exact_variance.sqrt() * size + path * size**2)
    assert ((variance.double() - exact_variance).abs() <= bound).all()


@dataclass
class Case:
    """Arguments of aspp_convs, and a gradient to its result."""

    x: Tensor
    weights: list[Tensor]
    dilations: list[int]
    grad: Tensor

    @classmethod
    def make(cls, size, dtype=torch.bfloat16):
        n, c, h, w, branches = size
        filters = sum(k for k, _, _ in branches)
        weights = [
            torch.randn(k, c, s, s, device=DEVICE) / (c * s * s) ** 0.5 for k, s, _ in branches
        ]
        return cls(
            # As behind a ReLU.
            channels_last(torch.randn(n, c, h, w, device=DEVICE).relu().to(dtype)),
            [w.to(dtype) for w in weights],
            [d for _, _, d in branches],
            channels_last(torch.randn(n, filters, h, w, device=DEVICE).to(dtype)),
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(
            Branch(w.shape[0], w.shape[-1], d)
            for w, d in zip(self.weights, self.dilations, strict=True)
        )

    def forward_args(self) -> tuple:
        return self.x, self.weights, self.dilations

    def doubles(self) -> tuple:
        weights = [w.double() for w in self.weights]
        return self.grad.double(), self.x.double(), weights, self.dilations

    def run(self, matrix: Tensor) -> list[Tensor]:
        """By all kernels; `matrix` has the weights packed."""
        return [
            *aspp_training.aspp_convs(*self.forward_args(), True),
            aspp_training.dgrad(self.grad, matrix, self.branches),
            aspp_training.wgrad(self.grad, self.x, self.branches),
        ]

    def check_forward(self, *configurations) -> None:
        exact, *_ = reference.aspp_convs(*self.doubles()[1:], False)
        torch_path, *_ = reference.aspp_convs(*self.forward_args(), False)
        for config in configurations or (None,):
            y, mean, variance = aspp_training.aspp_convs(*self.forward_args(), True, config)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert_error(y, torch_path, exact)
            assert_statistics_of(y, mean, variance)

    def check_dgrad(self, *configurations) -> None:
        exact, _ = reference.aspp_convs_backward(*self.doubles(), True, False)
        # Its branches are added in the dtype of the call, ours in float32: a rounding each.
        torch_path, _ = reference.aspp_convs_backward(self.grad, *self.forward_args(), True, False)
        matrix = pack_weights(self.weights)
        for config in configurations or (None,):
            got = aspp_training.dgrad(self.grad, matrix, self.branches, config)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert_error(got, torch_path, exact)

    def check_wgrad(self, *configurations) -> None:
        _, exact = reference.aspp_convs_backward(*self.doubles(), False, True)
        _, torch_path = reference.aspp_convs_backward(self.grad, *self.forward_args(), False, True)
        for config in configurations or (None,):
            dw = aspp_training.wgrad(self.grad, self.x, self.branches, config)
            parts = unpack_weights(dw, self.branches)
            for got, theirs, expected in zip(parts, torch_path, exact, strict=True):
                assert_error(got, theirs, expected)


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_statistics(size, dtype: torch.dtype) -> None:
    Case.make(size, dtype).check_forward()


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_gradients(size, dtype: torch.dtype) -> None:
    case = Case.make(size, dtype)
    case.check_dgrad()
    case.check_wgrad()


@every_dtype
def test_every_configuration(dtype: torch.dtype) -> None:
    case = Case.make((2, 320, 33, 33, ((256, 3, 12), (96, 1, 1))), dtype)
    math, device = launch.arithmetic(case.x), device_of(case.x)
    case.check_forward(*aspp_branches_candidates(math, device))
    case.check_dgrad(*aspp_dgrad_candidates(math, device))
    case.check_wgrad(*aspp_branches_candidates(math, device))


def test_tf32_where_pytorch_allows_it() -> None:
    case = Case.make((2, 512, 33, 33, OS16), torch.float32)
    exactly = aspp_training.aspp_convs(*case.forward_args(), False)[0]
    with tf32(True):
        case.check_forward()
        case.check_dgrad()
        case.check_wgrad()
        rounded = aspp_training.aspp_convs(*case.forward_args(), False)[0]
    assert not torch.equal(rounded, exactly)


def test_taps_outside_the_map_have_no_gradient_and_no_effect() -> None:
    case = Case.make((2, 256, 33, 33, ((256, 3, 40),)))
    matrix = pack_weights(case.weights)
    expected = aspp_training.dgrad(case.grad, matrix, case.branches)
    matrix.view(9, 256, 256)[[0, 1, 2, 3, 5, 6, 7, 8]] = float("nan")
    assert torch.equal(aspp_training.dgrad(case.grad, matrix, case.branches), expected)
    dw = aspp_training.wgrad(case.grad, case.x, case.branches).view(9, 256, 256)
    assert all(bool((dw[tap] == 0).all()) == (tap != 4) for tap in range(9))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 2, 1, 1))[:, 3 : 3 + x.shape[1]],
            id="slice-that-is-not-aligned",
        ),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:1, :, :1, :1].expand(x.shape), id="expanded"),
    ],
)
def test_any_strides(layout) -> None:
    case = Case.make((2, 256, 33, 33, ((64, 3, 12), (32, 1, 1))))
    case.x, case.grad = layout(case.x), layout(case.grad)
    case.check_forward()
    case.check_dgrad()
    case.check_wgrad()


def test_results_repeat_to_the_bit() -> None:
    # Batch 1 cuts tiles, whose parts are added in a second launch.
    case = Case.make((1, 2048, 33, 33, OS16))
    matrix = pack_weights(case.weights)
    first = case.run(matrix)
    for _ in range(20):
        assert_same(case.run(matrix), first)


def test_autograd_through_the_op_on_a_side_stream() -> None:
    case = Case.make((2, 512, 33, 33, OS16))
    x = case.x.clone().requires_grad_()
    weights = [w.clone().requires_grad_() for w in case.weights]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with dlf.use_backend("triton"), torch.cuda.stream(stream):
        y, mean, variance = ops.aspp_convs(x, weights, case.dilations, stats=True)
        y.backward(case.grad)
    torch.cuda.synchronize()
    assert_statistics_of(y.detach(), mean, variance)
    exact, exact_weights = reference.aspp_convs_backward(*case.doubles(), True, True)
    theirs = reference.aspp_convs_backward(case.grad, *case.forward_args(), True, True)
    assert_error(x.grad, theirs[0], exact)
    for w, t, e in zip(weights, theirs[1], exact_weights, strict=True):
        assert w.grad.is_contiguous()
        assert_error(w.grad, t, e)


def test_cuda_graph() -> None:
    case = Case.make((1, 512, 33, 33, OS16))
    matrix = pack_weights(case.weights)

    def change() -> None:
        case.x.copy_(torch.randn_like(case.x))
        case.grad.copy_(torch.randn_like(case.grad))

    got = replayed(lambda: case.run(matrix), change)
    assert_same(got, case.run(matrix))


def test_more_than_two_to_the_31_elements() -> None:
    n = 130
    needs_memory(32)
    # The last image alone is not 0, and lies behind 2^31 elements of x.
    x = channels_last(torch.zeros(n, 1024, 128, 128, dtype=torch.bfloat16, device=DEVICE))
    x[-1].normal_()
    weights = [torch.randn(64, 1024, 3, 3, device=DEVICE).bfloat16() / 96]
    grad = channels_last(torch.zeros(n, 64, 128, 128, dtype=torch.bfloat16, device=DEVICE))
    grad[-1].normal_()
    branches, matrix = (Branch(64, 3, 12),), pack_weights(weights)
    # Not cut: the sums of the two sizes would have another order.
    config = gemm_candidates(MMA_16BIT, device_of(x))[-1]
    last = x[-1:].clone(), grad[-1:].clone()
    y, _, _ = aspp_training.aspp_convs(x, weights, [12], False, config)
    alone, _, _ = aspp_training.aspp_convs(last[0], weights, [12], False, config)
    assert x.numel() > 2**31 and torch.equal(y[-1:], alone)
    dx = aspp_training.dgrad(grad, matrix, branches, config)
    assert torch.equal(dx[-1:], aspp_training.dgrad(last[1], matrix, branches, config))
    dw = aspp_training.wgrad(grad, x, branches, config)
    alone = aspp_training.wgrad(last[1], last[0], branches, config)
    # The same products, in other blocks of pixels.
    torch.testing.assert_close(dw, alone, rtol=2**-7, atol=float(alone.abs().max()) * 2**-8)


def test_backward_needs_its_results_and_the_packed_filters() -> None:
    case = Case.make((8, 2048, 33, 33, OS16))

    def run() -> tuple[Tensor, list[Tensor]]:
        return aspp_training.aspp_convs_backward(case.grad, *case.forward_args(), True, True)

    dx, dw = run()
    peak = peak_memory(run)
    filters = sum(w.numel() for w in dw)
    # And the sums of cut tiles: two parts a program of the largest tile.
    work = 4 * 2 * device_of(case.x).multiprocessors * 128 * 256
    limit = 2 * (dx.numel() + 2 * filters) + work + 2**23
    assert peak <= limit
    assert len(tap_rectangles(33, 33, case.branches)) == 28
