"""The Triton kernels of batch norm in training, in Triton's interpreter, against float64.

Error bounds, with u = 2^-24 and h half a step of the stored dtype:
    z          what the activation sees: five roundings (difference, product of the factors,
               multiply-add as two in the interpreter, residual), each of at most
               M = |x - mean| |rstd weight| + |bias| + |residual|; activations multiply an error by
               at most 1.5 and add three roundings: 11 u M, and h |y| where y is stored
    sums       of values v, each with at most 16 roundings of its own: any order of at most D
               additions is off by (D + 16) u sum |v|
    mean       of values up to A: a merge adds six roundings, a sum one for each addition:
               d = (D + 6 T + 16) u A for T merges
    variance   (D + 6 T + 16) u var for roundings; the mean of each set that is merged is off by d,
               which moves a sum of squares by at most 4 d sqrt(var) + 4 d^2 a value (Cauchy-Schwarz
               over the merges)
    dx         eight roundings of at most |rstd weight| (|g| + |mean_grad| + |xhat mean_grad_xhat|)
Data of a fixed seed lies off the kinks of the activations; values on them have a test of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import batch_norm, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.backends import OpDesc
from deeplab_fast.plan.batch_norm import BatchNormConfig, batch_norm_candidates, batch_norm_config
from deeplab_fast.plan.device import A100, H100

pytestmark = pytest.mark.interpret

U = 2.0**-24
HALF_STEP = {torch.float32: U, torch.float16: 2.0**-11}
# Below these, a stored value has the same step everywhere.
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-14}
DTYPES = [torch.float32, torch.float16]
ACTIVATIONS = ["relu", "relu6", "hardswish", None]
NAMES = ["batch_stats", "bn_act", "bn_act_reduce", "bn_act_backward"]

# Few and small: the interpreter takes about 50 ms for a program, whatever the size of its tile.
SHAPES = [
    pytest.param((2, 20, 3, 7), id="ragged-in-pixels-and-channels"),
    pytest.param((1, 16, 4, 4), id="one-tile-that-is-full"),
    pytest.param((1, 7, 3, 9), id="odd-channels"),
    pytest.param((3, 20, 1, 1), id="maps-of-one-pixel"),
    pytest.param((1, 1, 1, 1), id="one-value"),
]
RAGGED = (2, 20, 3, 7)


@pytest.fixture(autouse=True)
def _one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice by rule then gives a program several tiles."""
    monkeypatch.setattr(launch, "device_of", lambda x: replace(H100, multiprocessors=1))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def small(x: Tensor, tiles: int = 1) -> BatchNormConfig:
    """Tiles of 16 pixels by 4 accesses of a dense x."""
    return BatchNormConfig(2, 8, 4 * launch.vector(channels_last(x), x.shape[1]), 1, tiles)


@dataclass
class Case:
    """Arguments of all four ops; two tiles of pixels to a program that reduces."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    grad: Tensor
    mean_grad: Tensor
    mean_grad_xhat: Tensor

    @classmethod
    def make(cls, shape, dtype=torch.float32, offset=0.5):
        c = shape[1]
        x = channels_last((torch.randn(shape) * 2 + offset).to(dtype))
        return cls(
            x,
            x.double().mean((0, 2, 3)).float(),
            # Not the inverse deviation of x: with one pixel that would be large.
            torch.rand(c) + 0.3,
            torch.randn(c),
            torch.randn(c),
            channels_last(torch.randn(shape).to(dtype)),
            channels_last(torch.randn(shape).to(dtype)),
            torch.randn(c) / 4,
            torch.randn(c) / 4,
        )

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.rstd, self.weight, self.bias

    @property
    def one_pass(self) -> BatchNormConfig:
        return small(self.x)

    @property
    def reducing(self) -> BatchNormConfig:
        return small(self.x, tiles=2)

    def additions(self) -> int:
        """On the way of a value into a sum, at most."""
        n, c, h, w = self.x.shape
        config = self.reducing
        _, chunks, _ = config.grid(n * h * w, c)
        return config.rows + config.tiles + config.lanes + chunks

    def out(self, act: str | None) -> Tensor:
        """A result of bn_act with the residual."""
        return reference.bn_act(self.x, *self.factors, self.residual, act)


def double(*tensors):
    return tuple(t.double() if isinstance(t, Tensor) else t for t in tensors)


def wide(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def assert_within(got: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    assert got.shape == exact.shape and not got.isnan().any()
    assert ((got.double() - exact).abs() <= bound).all()


def assert_map(got: Tensor, exact: Tensor, magnitude: Tensor, roundings: int, like: Tensor) -> None:
    """A stored map, with the dtype and layout that the ops promise."""
    assert got.dtype == like.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    half_step = HALF_STEP[got.dtype] * exact.abs().clamp(min=SMALLEST[got.dtype])
    assert_within(got, exact, roundings * U * magnitude + 1.01 * half_step)


def check_stats(case: Case, got: tuple[Tensor, ...], merges: int = 3) -> None:
    mean, variance, _ = reference.batch_stats(case.x.double())
    roundings = case.additions() + 6 * merges + 16
    off = roundings * U * case.x.double().abs().amax((0, 2, 3))
    assert_within(got[0], mean, off)
    assert_within(got[1], variance, roundings * U * variance + 4 * off * (variance.sqrt() + off))
    assert got[0].dtype == got[1].dtype == torch.float32


def check_sums(case: Case, got: tuple[Tensor, Tensor], out: Tensor | None, act) -> None:
    args = double(case.grad, case.x, *case.factors, out, act)
    exact = reference.bn_act_reduce(*args)
    xhat = ((case.x.double() - wide(case.mean)) * wide(case.rstd)).abs()
    values = 1.5 * case.grad.double().abs()
    for g, e, v in zip(got, exact, (values, values * xhat), strict=True):
        assert g.dtype == torch.float32
        assert_within(g, e, (case.additions() + 16) * U * v.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_stats(shape, dtype: torch.dtype, nan_poison) -> None:
    case = Case.make(shape, dtype)
    check_stats(case, batch_norm.batch_stats(case.x, config=case.reducing))


# Two blocks of channels combine partials: one of them counts the batch.
@pytest.mark.parametrize("channels", [7, 20], ids=["one-block", "more-than-one"])
@pytest.mark.parametrize(
    ("momentum", "counted"),
    [
        pytest.param(0.1, True, id="exponential"),
        pytest.param(None, True, id="cumulative"),
        pytest.param(0.3, False, id="not-counted"),
        pytest.param(None, False, id="neither-nothing-is-added"),
    ],
)
def test_running_statistics(channels: int, momentum: float | None, counted: bool) -> None:
    """Of the kernel's own statistics, but for the order of rounding: a momentum and its rest, two
    products and a sum, each off by 2^-24."""
    case = Case.make((2, channels, 3, 7))
    kept = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5])
    expected = kept.clone()
    batches = torch.tensor(3) if counted else None
    counts = None if batches is None else batches.clone()
    mean, variance, rstd = batch_norm.batch_stats(
        case.x, 1e-3, kept[0], kept[1], batches, momentum, case.reducing
    )
    check_stats(case, (mean, variance))
    reference.update_running(expected[0], expected[1], counts, momentum, mean, variance, 2 * 3 * 7)
    size = expected.abs() + kept.abs() + torch.stack([mean.abs(), variance])
    assert_within(kept, expected.double(), 6 * U * size)
    torch.testing.assert_close(rstd, (variance + 1e-3).rsqrt(), rtol=4 * U, atol=0)
    assert batches is None or (int(batches) == 4 and torch.equal(batches, counts))


def test_sums_in_place_of_means() -> None:
    case = Case.make(RAGGED)
    args = (case.grad, case.x, *case.factors, None)
    options = ("relu", False)
    means = (case.mean_grad, case.mean_grad_xhat)
    # A power of two divides without rounding.
    sums = [mean * 64 for mean in means]
    for got, expected in zip(
        batch_norm.bn_act_backward(*args, *sums, *options, 64.0),
        batch_norm.bn_act_backward(*args, *means, *options),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_stats_of_values_far_from_zero() -> None:
    """A difference of mean squares would be off by 4096^2 u, which is the variance itself."""
    case = Case.make(RAGGED, offset=4096.0)
    got = batch_norm.batch_stats(case.x, config=case.reducing)
    check_stats(case, got)
    variance = reference.batch_stats(case.x.double())[1]
    torch.testing.assert_close(got[1].double(), variance, rtol=0.01, atol=0)


def test_partials_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batch_norm,
        "_combining_options",
        lambda chunks: {"CHUNKS": 2, "BLOCK_C": 8, "num_warps": 1, "num_stages": 1},
    )
    case = Case.make((1, 4, 9, 11))
    config = BatchNormConfig(1, 32, 4, 1)
    assert config.grid(99, 4) == (4, 4, 1)
    check_stats(case, batch_norm.batch_stats(case.x, config=config), merges=4)
    args = (case.grad, case.x, *case.factors, None, "relu")
    check_sums(case, batch_norm.bn_act_reduce(*args, config), None, "relu")


@pytest.mark.parametrize("shape", SHAPES)
def test_act_of_any_shape(shape, nan_poison) -> None:
    check_act(Case.make(shape, torch.float16), "relu", True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "act,residual",
    [
        ("relu", False),
        ("relu", True),
        ("relu6", True),
        ("hardswish", False),
        (None, False),
        (None, True),
    ],
    ids=lambda v: {True: "residual", False: "alone", None: "none"}.get(v, v),
)
def test_act(act, residual: bool, dtype: torch.dtype, nan_poison) -> None:
    case = Case.make((1, 12, 4, 5), dtype)
    check_act(case, act, residual)


def check_act(case: Case, act: str | None, with_residual: bool) -> None:
    residual = case.residual if with_residual else None
    got = batch_norm.bn_act(case.x, *case.factors, residual, act, case.one_pass)
    exact = reference.bn_act(*double(case.x, *case.factors, residual), act)
    off = (case.x.double() - wide(case.mean)).abs() * wide(case.rstd * case.weight).abs()
    magnitude = off + wide(case.bias).abs()
    if residual is not None:
        magnitude = magnitude + residual.double().abs()
    assert_map(got, exact, magnitude, 11, case.x)


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_of_any_shape(shape, nan_poison) -> None:
    case = Case.make(shape, torch.float16)
    args = (case.grad, case.x, *case.factors, None, "relu")
    check_sums(case, batch_norm.bn_act_reduce(*args, case.reducing), None, "relu")


@pytest.mark.parametrize(
    "act,with_out",
    [
        ("relu", False),
        ("relu", True),
        ("relu6", False),
        ("relu6", True),
        ("hardswish", False),
        (None, True),
    ],
    ids=lambda v: {True: "out", False: "again", None: "none"}.get(v, v),
)
def test_reduce(act, with_out: bool, nan_poison) -> None:
    case = Case.make((1, 12, 4, 5))
    out = case.out(act) if with_out else None
    args = (case.grad, case.x, *case.factors, out, act)
    check_sums(case, batch_norm.bn_act_reduce(*args, case.reducing), out, act)


def check_backward(case: Case, act, out: Tensor | None, means: bool, to_residual: bool) -> None:
    sums = (case.mean_grad, case.mean_grad_xhat) if means else (None, None)
    args = (case.grad, case.x, *case.factors, out, *sums, act, to_residual)
    dx, residual = batch_norm.bn_act_backward(*args, config=case.one_pass)
    exact_dx, exact_residual = reference.bn_act_backward(*double(*args))
    magnitude = 1.5 * case.grad.double().abs()
    if to_residual:
        assert_map(residual, exact_residual, magnitude, 4, case.x)
    else:
        assert residual.shape == (0,) and residual.dtype == case.x.dtype
    if means:
        xhat = (case.x.double() - wide(case.mean)) * wide(case.rstd)
        magnitude = magnitude + wide(case.mean_grad).abs()
        magnitude = magnitude + (xhat * wide(case.mean_grad_xhat)).abs()
    assert_map(dx, exact_dx, magnitude * wide(case.rstd * case.weight).abs(), 9, case.x)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_of_any_shape(shape, nan_poison) -> None:
    case = Case.make(shape, torch.float16)
    check_backward(case, "relu", case.out("relu"), means=True, to_residual=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "act,with_out,means,to_residual",
    [
        pytest.param("relu", False, True, False, id="relu"),
        pytest.param("relu", True, True, True, id="relu-residual"),
        pytest.param("relu", True, False, True, id="relu-residual-constants"),
        pytest.param("relu", False, False, False, id="relu-constants"),
        pytest.param("relu6", False, True, False, id="relu6"),
        pytest.param("relu6", True, True, True, id="relu6-residual"),
        pytest.param("hardswish", False, True, False, id="hardswish"),
        pytest.param(None, True, True, True, id="none-residual"),
        pytest.param(None, False, False, False, id="none-constants-does-not-read-x"),
    ],
)
def test_backward(act, with_out, means, to_residual, dtype: torch.dtype, nan_poison) -> None:
    case = Case.make((1, 12, 4, 5), dtype)
    check_backward(case, act, case.out(act) if with_out else None, means, to_residual)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(shape=st.tuples(*(st.integers(1, most) for most in (3, 20, 4, 4))))
def test_any_shape(shape) -> None:
    case = Case.make(shape, torch.float16)
    check_stats(case, batch_norm.batch_stats(case.x, config=case.reducing))
    check_act(case, "hardswish", False)
    args = (case.grad, case.x, *case.factors, None, "hardswish")
    check_sums(case, batch_norm.bn_act_reduce(*args, case.reducing), None, "hardswish")
    check_backward(case, "hardswish", None, True, False)


def test_together_they_are_pytorchs_batch_norm() -> None:
    """With the choice by rule, through the public functions."""
    x, residual, grad = (channels_last(torch.randn(2, 12, 6, 7)) for _ in range(3))
    weight, bias = torch.randn(2, 12)
    leaves = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    exact = torch.relu(F.batch_norm(leaves[0], None, None, *leaves[2:], True, eps=1e-5) + leaves[1])
    exact.backward(grad.double())
    with dlf.use_backend("triton"):
        mean, variance = ops.batch_stats(x)
        factors = (mean, (variance + 1e-5).rsqrt(), weight, bias)
        y = ops.bn_act(x, *factors, residual=residual)
        sums = ops.bn_act_reduce(grad, x, *factors, out=y)
        means = [s * 12 / x.numel() for s in sums]
        dx, d_residual = ops.bn_act_backward(grad, x, *factors, *means, out=y, to_residual=True)
    got = (y, dx, d_residual, sums[1], sums[0])
    # 84 values a channel, each rounded some ten times on the way.
    for a, b in zip(got, (exact, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-5)


def test_what_lies_on_a_kink() -> None:
    """Exact values, at which every comparison decides."""
    values = torch.tensor([-6.0, -3.0, -0.0, 0.0, 1.0, 3.0, 5.0, 6.0, 7.0])
    x = values.repeat(2, 4, 1, 1)
    ones, zeros = torch.ones(4), torch.zeros(4)
    factors = (zeros, ones, ones, zeros)
    grad = torch.full_like(x, 6.0)
    for act in ACTIVATIONS:
        y = batch_norm.bn_act(x, *factors, None, act)
        torch.testing.assert_close(y, reference.bn_act(x, *factors, None, act))
        for out in (None,) if act == "hardswish" else (None, y):
            args = (grad, x, *factors, out, None, None, act, True)
            for got, expected in zip(
                batch_norm.bn_act_backward(*args), reference.bn_act_backward(*args), strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=2 * U, atol=0)


def test_what_is_no_number_stays_none_and_does_not_spread() -> None:
    case = Case.make((1, 8, 3, 3))
    case.x[0, 3, 1, 1] = float("nan")
    case.grad[0, 5, 2, 2] = float("nan")
    mean, variance, _ = batch_norm.batch_stats(case.x)
    assert mean.isnan().nonzero().tolist() == variance.isnan().nonzero().tolist() == [[3]]
    for act in ACTIVATIONS:
        y = batch_norm.bn_act(case.x, *case.factors, None, act)
        assert y.isnan().nonzero().tolist() == [[0, 3, 1, 1]]
        args = (case.grad, case.x, *case.factors, None, None, None, act, False)
        got, expected = batch_norm.bn_act_backward(*args)[0], reference.bn_act_backward(*args)[0]
        assert torch.equal(got.isnan(), expected.isnan())
        if act != "hardswish":
            # The ReLUs keep NaN, and let the gradient through where they gave it.
            assert got[0, 3, 1, 1] == case.grad[0, 3, 1, 1] * (case.factors[1] * case.factors[2])[3]
    # Where the ReLU let nothing through, nothing comes back, not even NaN.
    out = torch.zeros_like(case.x)
    sums = batch_norm.bn_act_reduce(case.grad, case.x.nan_to_num(), *case.factors, out, "relu")
    assert not sums[0].any() and not sums[1].any()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_an_infinite_factor_is_not_a_number(act) -> None:
    case = Case.make((1, 8, 3, 3))
    case.factors[2][5] = float("inf")
    y = batch_norm.bn_act(case.x, *case.factors, None, act)
    assert y.isnan().nonzero()[:, 1].tolist() == [5] * 9


LAYOUTS = [
    pytest.param(lambda x: x.contiguous(), id="nchw"),
    pytest.param(lambda x: channels_last(x.repeat(1, 3, 1, 1))[:, 8:16], id="slice-of-channels"),
    pytest.param(lambda x: channels_last(x.repeat(1, 3, 1, 1))[:, 3:11], id="slice-not-aligned"),
    pytest.param(lambda x: channels_last(x.repeat(1, 1, 2, 2))[:, :, 1:4, :3], id="slice-of-rows"),
    pytest.param(lambda x: channels_last(x).transpose(2, 3), id="transposed"),
    pytest.param(lambda x: x[:, :, :1, :1].expand(2, 8, 3, 3), id="expanded-stride-0"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout) -> None:
    case = Case.make((2, 8, 3, 3))
    for name in ("x", "residual", "grad"):
        setattr(case, name, layout(getattr(case, name)))
    out = layout(case.out("relu"))
    dense = [channels_last(t) for t in (case.x, case.residual, case.grad, out)]
    factors, means = case.factors, (case.mean_grad, case.mean_grad_xhat)
    y = batch_norm.bn_act(case.x, *factors, case.residual, "relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, batch_norm.bn_act(dense[0], *factors, dense[1], "relu"))
    got = batch_norm.bn_act_backward(case.grad, case.x, *factors, out, *means, "relu", True)
    args = (dense[2], dense[0], *factors, dense[3], *means, "relu", True)
    expected = batch_norm.bn_act_backward(*args)
    for a, b in zip(got, expected, strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b)
    check_stats(case, batch_norm.batch_stats(case.x))
    sums = batch_norm.bn_act_reduce(case.grad, case.x, *factors, out, "relu")
    check_sums(case, sums, out, "relu")


def test_slices_of_channels_are_not_copied() -> None:
    larger = channels_last(torch.randn(2, 24, 3, 3))
    read = batch_norm._Maps(None, False, larger[:, 8:16])
    assert read.tensors[0].data_ptr() == larger[:, 8:16].data_ptr()
    assert (read.vector, read.units, read.strides) == (4, 2, [6])
    aligned_to_8_bytes = batch_norm._Maps(None, False, larger[:, 2:10])
    assert (aligned_to_8_bytes.vector, aligned_to_8_bytes.strides) == (2, [12])


# Each fits an int32, the offset of the third pixel does not. Not a multiple of any access, and one
# of all, whose product fits until it is multiplied by the elements of an access.
@pytest.mark.parametrize("stride", [2**30 + 65, 2**30 + 64], ids=["odd", "aligned"])
def test_offsets_beyond_int32(stride: int) -> None:
    """Pages in between are never touched. A kernel that reads elsewhere ends the process."""
    case = Case.make((3, 8, 1, 1), torch.float16)

    def far(x: Tensor) -> Tensor:
        try:
            memory = torch.empty(2 * stride + 8, dtype=x.dtype)
        except RuntimeError as error:
            pytest.skip(f"no address space for 2^31 elements: {error}")
        return memory.as_strided(x.shape, (stride, 1, 1, 1)).copy_(x)

    out, means = case.out("relu"), (case.mean_grad, case.mean_grad_xhat)
    x, residual, grad, far_out = (far(t) for t in (case.x, case.residual, case.grad, out))
    y = batch_norm.bn_act(x, *case.factors, residual, "relu")
    assert torch.equal(y, batch_norm.bn_act(case.x, *case.factors, case.residual, "relu"))
    check_stats(case, batch_norm.batch_stats(x))
    sums = batch_norm.bn_act_reduce(grad, x, *case.factors, far_out, "relu")
    check_sums(case, sums, out, "relu")
    got = batch_norm.bn_act_backward(grad, x, *case.factors, far_out, *means, "relu", True)
    expected = batch_norm.bn_act_backward(
        case.grad, case.x, *case.factors, out, *means, "relu", True
    )
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_batch_of_nothing() -> None:
    x, factors = torch.empty(0, 5, 3, 3), torch.ones(4, 5)
    *stats, rstd = batch_norm.batch_stats(x, 0.25)
    assert torch.equal(rstd, torch.full((5,), 2.0))
    for got in (
        stats,
        batch_norm.bn_act_reduce(x, x, *factors, None, "relu"),
    ):
        for vector in got:
            assert vector.dtype == torch.float32 and torch.equal(vector, torch.zeros(5))
    assert batch_norm.bn_act(x, *factors, x, "relu").shape == x.shape
    for to_residual, shape in ((True, x.shape), (False, (0,))):
        args = (x, x, *factors, None, None, None, "relu", to_residual)
        dx, residual = batch_norm.bn_act_backward(*args)
        assert dx.shape == x.shape and residual.shape == shape


def test_results_repeat_to_the_bit_and_are_those_of_the_ops() -> None:
    case = Case.make((2, 8, 5, 5), torch.float16)
    out, means = case.out("relu"), (case.mean_grad, case.mean_grad_xhat)

    def call(*functions) -> list[Tensor]:
        stats, act, reduce, backward = functions
        return [
            *stats(case.x, 1e-3, None, None, None, None),
            act(case.x, *case.factors, case.residual, "relu"),
            *reduce(case.grad, case.x, *case.factors, out, "relu"),
            *backward(case.grad, case.x, *case.factors, out, *means, "relu", True, 70.0),
        ]

    first = call(*(getattr(batch_norm, name) for name in NAMES))
    with dlf.use_backend("triton"):
        second = call(*(getattr(torch.ops.deeplab_fast, name) for name in NAMES))
    for a, b in zip(first, second, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


def test_factors_of_any_float_dtype_and_stride() -> None:
    case = Case.make((1, 8, 2, 3))
    factors = torch.stack([v.half() for v in case.factors], 1).double().unbind(1)
    assert not factors[0].is_contiguous()
    got = batch_norm.bn_act(case.x, *factors, None, "relu")
    assert torch.equal(got, batch_norm.bn_act(case.x, *(f.float() for f in factors), None, "relu"))


# The host side, where no kernel runs.


@pytest.mark.parametrize("reduces", [False, True], ids=["one-pass", "reduces"])
@pytest.mark.parametrize("maps", [1, 2, 3])
@pytest.mark.parametrize("itemsize,vector", [(2, 8), (2, 4), (2, 1), (4, 4), (4, 1)])
def test_choices_and_candidates_are_legal(itemsize, vector, maps, reduces) -> None:
    for pixels in (1, 16, 17424, 266256, 2**31):
        for channels in (1, 2, 3, 24, 64, 320, 2048, 2**16):
            channels *= vector
            for device in (H100, A100):
                args = (pixels, channels, maps, vector, itemsize, device, reduces)
                chosen = batch_norm_config(*args)
                assert chosen.is_legal(vector, maps) and (reduces or chosen.tiles == 1)
                assert chosen in batch_norm_candidates(*args)
                tiles, chunks, tiles_c = chosen.grid(pixels, channels)
                assert tiles * chosen.block_p >= pixels > (tiles - 1) * chosen.block_p
                assert chunks * chosen.tiles >= tiles >= chunks
                assert tiles_c * chosen.block_c >= channels
    candidates = batch_norm_candidates(*args)
    assert len(set(candidates)) == len(candidates) > 5
    assert all(c.is_legal(vector, maps) for c in candidates)


@pytest.mark.parametrize(
    "pixels,channels",
    [
        pytest.param(16 * 257 * 257, 64, id="stem-513-batch-16"),
        pytest.param(16 * 129 * 129, 256, id="layer1-513-batch-16"),
        pytest.param(16 * 33 * 33, 2048, id="layer4-os16-batch-16"),
    ],
)
def test_large_maps_run_in_one_wave(pixels: int, channels: int) -> None:
    config = batch_norm_config(pixels, channels, 1, 8, 2, H100, True)
    _, chunks, tiles_c = config.grid(pixels, channels)
    assert 0.9 * 132 * 4 < chunks * tiles_c <= 132 * 4
    # Partials: two floats of a chunk and channel, against the bytes of the map.
    assert 8 * chunks * channels < 0.01 * 2 * pixels * channels


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    x = torch.randn(1, 8, 3, 3)
    for wrong in (
        BatchNormConfig(2, 8, 8, 1),
        BatchNormConfig(32, 16, 8, 1),
        BatchNormConfig(3, 16, 8, 1),
        BatchNormConfig(2, 16, 8, 1, tiles=0),
    ):
        with pytest.raises(ValueError, match="does not fit 1 maps read 4 channels at a time"):
            batch_norm.batch_stats(x, config=wrong)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize(
    "changes,expected",
    [
        pytest.param({}, "", id="bf16-runs"),
        pytest.param({"device": "cpu", "capability": None}, "is on cpu", id="cpu-tensor"),
        pytest.param({"dtype": torch.float64}, "accumulates in float32", id="float64"),
        pytest.param({"capability": (7, 5)}, "the device has 7.5", id="old-gpu"),
    ],
)
def test_reasons(op: str, changes, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0), **changes}
    reasons = batch_norm.not_supported_reasons(OpDesc(op, shape=(2, 8, 9, 9), **given))
    assert len(reasons) == bool(expected) and all(expected in r for r in reasons)
