"""The Triton kernels of batch norm in training, and all backends, on a GPU at real sizes.

The oracle is PyTorch's batch norm with autograd in float64. A result passes when its largest error
is at most twice that of PyTorch's own batch norm, sum and activation in the same dtype on the same
values, plus one rounding of the largest result. Elements whose activation lies close to a kink get
no gradient: there the two sides may take different branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import batch_norm
from gpu_harness import (
    DEVICE,
    HALF_STEP,
    assert_as_good,
    assert_same,
    channels_last,
    every_dtype,
    needs_memory,
    needs_two_devices,
    on_a_busy_stream,
    peak_memory,
    replayed,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.plan.batch_norm import batch_norm_candidates
from deeplab_fast.plan.device import device_of
from deeplab_fast.testing import deterministic

EPS = 1e-5
# Additions that a value meets on its way into a sum: of a thread's rows (8) and tiles (64), of
# lanes (4 levels), of chunks (16 levels).
ADDITIONS = 92
# Results of around 1 in bf16 are off by 2^-8; sums of two of these by less than a fourth of this.
NEAR = 0.05
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), None: ()}

# N, C, H, W
SIZES = [
    pytest.param((2, 64, 257, 257), id="stem-513"),
    pytest.param((2, 256, 129, 129), id="layer1-513"),
    pytest.param((4, 2048, 33, 33), id="layer4-os16"),
    pytest.param((1, 512, 65, 65), id="layer4-os8-batch-1"),
    pytest.param((16, 256, 1, 1), id="pooled-branch"),
    pytest.param((2, 24, 129, 129), id="mobilenet-24-channels"),
    pytest.param((3, 36, 17, 9), id="accesses-of-8-bytes"),
    pytest.param((2, 321, 21, 13), id="nothing-fills-an-access"),
]
LAYER1 = (2, 256, 129, 129)


def norm_act(x, weight, bias, residual, act) -> Tensor:
    """Batch norm with the statistics of x, sum and activation as PyTorch has them, one by one."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if residual is not None:
        y = y + residual
    return reference.ACTIVATIONS[act](y)


def assert_sum_as_good(
    got: Tensor, torch_path: Tensor, exact: Tensor, values: Tensor | float = 0.0
) -> None:
    """The rule above; `values`: sum of magnitudes of what was added up."""
    roundings = 4 if got.dtype == torch.float32 else 1
    assert_as_good(got, torch_path, exact, roundings, ADDITIONS * 2.0**-24 * values)


@dataclass
class Case:
    """A batch norm in training, with or without a residual."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    grad: Tensor
    act: str | None

    @classmethod
    def make(cls, shape, dtype=torch.bfloat16, act="relu", with_residual=True, device=DEVICE):
        c = shape[1]

        def random() -> Tensor:
            return channels_last(torch.randn(shape, device=device).to(dtype))

        # As behind a convolution: a mean of its own for each channel.
        shift = torch.randn(c, 1, 1, device=device)
        x = channels_last((torch.randn(shape, device=device) * 1.5 + shift).to(dtype))
        weight, bias = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device) / 2
        residual = random() if with_residual else None
        case = cls(x, weight, bias, residual, random(), act)
        z = norm_act(*case.doubles()[:4], None)
        for kink in KINKS[act]:
            case.grad[(z - kink).abs() < NEAR] = 0
        return case

    def doubles(self) -> tuple:
        tensors = (self.x, self.weight, self.bias, self.residual, self.grad)
        return tuple(None if t is None else t.double() for t in tensors)

    def by_autograd(self, *given) -> dict[str, Tensor]:
        """PyTorch's own results from x, weight, bias, residual and grad in any dtype."""
        *leaves, grad = given
        leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
        y = norm_act(*leaves, self.act)
        y.backward(grad)
        names = ("dx", "d_weight", "d_bias", "d_residual")
        grads = {n: t.grad for n, t in zip(names, leaves, strict=True) if t is not None}
        return {"y": y.detach(), **grads}

    def torch_path(self) -> dict[str, Tensor]:
        return self.by_autograd(self.x, self.weight, self.bias, self.residual, self.grad)

    def exact(self) -> dict[str, Tensor]:
        return self.by_autograd(*self.doubles())

    def run(self) -> dict[str, Tensor]:
        """Through the four public ops."""
        x, grad, residual, act = self.x, self.grad, self.residual, self.act
        mean, variance = ops.batch_stats(x)
        factors = (mean, (variance + EPS).rsqrt(), self.weight, self.bias)
        y = ops.bn_act(x, *factors, residual=residual, act=act)
        out = None if residual is None else y
        d_bias, d_weight = ops.bn_act_reduce(grad, x, *factors, out=out, act=act)
        count = x.numel() / x.shape[1]
        dx, d_residual = ops.bn_act_backward(
            grad, x, *factors, d_bias / count, d_weight / count,
            out=out, act=act, to_residual=residual is not None,
        )  # fmt: skip
        found = {"y": y, "dx": dx, "d_weight": d_weight, "d_bias": d_bias}
        return found if d_residual is None else {**found, "d_residual": d_residual}


def check(case: Case) -> None:
    with dlf.use_backend("triton"):
        got = case.run()
    torch_path, exact = case.torch_path(), case.exact()
    assert set(got) == set(exact)
    grads = case.grad.double().abs()
    # Normalised by PyTorch, in float64.
    xhat = F.batch_norm(case.x.double(), None, None, training=True, eps=EPS).abs()
    sums = {"d_bias": grads.sum((0, 2, 3)).max(), "d_weight": (grads * xhat).sum((0, 2, 3)).max()}
    for name, value in got.items():
        assert_sum_as_good(value, torch_path[name], exact[name], sums.get(name, 0.0))


@every_dtype
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SIZES)
def test_relu(shape, with_residual: bool, dtype: torch.dtype) -> None:
    check(Case.make(shape, dtype, "relu", with_residual))


@every_dtype
@pytest.mark.parametrize(
    "act,with_residual",
    [("relu6", False), ("relu6", True), ("hardswish", False), (None, False), (None, True)],
    ids=lambda v: {True: "residual", False: "alone", None: "none"}.get(v, v),
)
def test_other_activations(act, with_residual: bool, dtype: torch.dtype) -> None:
    check(Case.make((2, 96, 65, 65), dtype, act, with_residual))


@every_dtype
@pytest.mark.parametrize("shape", SIZES)
def test_stats(shape, dtype: torch.dtype) -> None:
    """Held against PyTorch's mean and variance of the values in float32."""
    x = Case.make(shape, dtype).x
    exact = reference.batch_stats(x.double())
    torch_path = reference.batch_stats(x.float())
    largest = x.double().abs().max()
    for a, b, e in zip(batch_norm.batch_stats(x), torch_path, exact, strict=True):
        assert_sum_as_good(a, b, e, largest)


@pytest.mark.parametrize(
    ("momentum", "counted"),
    [
        pytest.param(0.1, True, id="exponential"),
        pytest.param(None, True, id="cumulative"),
        pytest.param(0.3, False, id="not counted"),
    ],
)
def test_running_statistics(momentum: float | None, counted: bool) -> None:
    """In the kernel; off by four roundings from the same sums by PyTorch."""
    x = Case.make((2, 80, 33, 33)).x
    kept = torch.rand(2, 80, device=DEVICE) + 0.5
    batches = torch.tensor(3, device=DEVICE) if counted else None
    expected = kept.clone()
    counts = None if batches is None else batches.clone()
    mean, variance, rstd = batch_norm.batch_stats(x, EPS, kept[0], kept[1], batches, momentum)
    count = x.numel() // x.shape[1]
    reference.update_running(expected[0], expected[1], counts, momentum, mean, variance, count)
    rounding = 4 * HALF_STEP[torch.float32]
    torch.testing.assert_close(kept, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(rstd, (variance + EPS).rsqrt(), rtol=rounding, atol=0)
    assert batches is None or torch.equal(batches, counts)


def test_stats_of_values_far_from_zero() -> None:
    """A difference of mean squares would be off by 4096^2 2^-24, which is the variance itself."""
    x = channels_last(torch.randn(LAYER1, device=DEVICE) + 4096)
    mean, variance, _ = batch_norm.batch_stats(x)
    exact = reference.batch_stats(x.double())
    torch.testing.assert_close(mean.double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(dtype: torch.dtype) -> None:
    case = Case.make((2, 80, 33, 33), dtype)
    mean, variance, _ = reference.batch_stats(case.x)
    factors = (mean, (variance + EPS).rsqrt(), case.weight, case.bias)
    y = batch_norm.bn_act(case.x, *factors, case.residual, "relu")
    sums = batch_norm.bn_act_reduce(case.grad, case.x, *factors, y, "relu")
    largest = case.grad.double().abs().sum((0, 2, 3)).max()
    for maps, reduces in ((1, True), (3, True), (2, False)):
        read = batch_norm._Maps(None, reduces, case.x)
        found = batch_norm_candidates(
            read.pixels, read.channels, maps, read.vector, case.x.element_size(),
            device_of(case.x), reduces,
        )  # fmt: skip
        assert len(found) > 5
        for config in found:
            if maps == 1:
                got = batch_norm.batch_stats(case.x, config=config)
                torch.testing.assert_close(got[:2], (mean, variance), rtol=1e-5, atol=1e-5)
            elif reduces:
                got = batch_norm.bn_act_reduce(case.grad, case.x, *factors, y, "relu", config)
                for a, b in zip(got, sums, strict=True):
                    assert (a - b).abs().max() <= 1e-5 * largest
            else:
                got = batch_norm.bn_act(case.x, *factors, case.residual, "relu", config)
                assert torch.equal(got, y)


def one_pass_results(x, residual, grad, case: Case) -> list[Tensor]:
    """Results that do not depend on an order of summation."""
    mean, variance = torch.zeros(2, x.shape[1], device=x.device)
    factors = (mean, variance + 1, case.weight, case.bias)
    y = batch_norm.bn_act(x, *factors, residual, "relu")
    backward = batch_norm.bn_act_backward(
        grad, x, *factors, y, case.weight, case.bias, "relu", True
    )
    return [y, *backward]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(lambda x: channels_last(x.repeat(1, 2, 1, 1))[:, 64:320], id="slice"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 2, 1, 1))[:, 3:259], id="slice-that-is-not-aligned"
        ),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 1, 1, 2))[..., 3:36], id="slice-of-columns"
        ),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
    ],
)
def test_any_strides(layout) -> None:
    case = Case.make((2, 256, 33, 33))
    case.x, case.residual, case.grad = (layout(t) for t in (case.x, case.residual, case.grad))
    dense = [channels_last(t) for t in (case.x, case.residual, case.grad)]
    got = one_pass_results(case.x, case.residual, case.grad, case)
    for a, b in zip(got, one_pass_results(*dense, case), strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last) and torch.equal(a, b)
    torch.testing.assert_close(batch_norm.batch_stats(case.x), reference.batch_stats(case.x))


@every_dtype
def test_triton_agrees_with_pytorch(dtype: torch.dtype) -> None:
    case = Case.make(LAYER1, dtype)
    with dlf.use_backend("reference"):
        expected = case.run()
    with dlf.use_backend("triton"):
        got = case.run()
    # Each of the two is off by a rounding of its own, and of statistics in another order.
    for name, b in expected.items():
        bound = 2 * (HALF_STEP[got[name].dtype] + 1e-5) * b.double().abs().max()
        assert (got[name].double() - b.double()).abs().max() <= bound, name


def test_results_repeat_to_the_bit() -> None:
    case = Case.make((16, 256, 129, 129))
    with dlf.use_backend("triton"):
        first = case.run()
        for _ in range(20):
            assert_same(case.run().values(), first.values())
        with deterministic():
            again = case.run()
    assert_same(again.values(), first.values())


def test_forward_and_backward_agree_on_what_the_relu_lets_through() -> None:
    """Also where its input is a rounding away from 0: both compute it in the same way."""
    case = Case.make((2, 64, 65, 65), torch.float32, with_residual=False)
    mean, variance, _ = batch_norm.batch_stats(case.x)
    factors = (mean, (variance + EPS).rsqrt(), case.weight, mean)
    # x such that the multiply-add cancels: x = mean - mean / (rstd weight).
    x = channels_last(
        (mean - mean / (factors[1] * case.weight))[:, None, None].expand(case.x.shape)
    )
    y = batch_norm.bn_act(x, *factors, None, "relu")
    ones = torch.ones_like(x)
    _, passed = batch_norm.bn_act_backward(ones, x, *factors, None, None, None, "relu", True)
    assert torch.equal(passed != 0, y > 0)
    sums, _ = batch_norm.bn_act_reduce(ones, x, *factors, None, "relu")
    assert torch.equal(sums, passed.sum((0, 2, 3)))


def test_what_is_no_number_stays_none_and_does_not_spread() -> None:
    case = Case.make((1, 64, 17, 17), torch.float32)
    case.x[0, 3, 1, 1] = float("nan")
    mean, variance, _ = batch_norm.batch_stats(case.x)
    assert mean.isnan().nonzero().tolist() == variance.isnan().nonzero().tolist() == [[3]]
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    for act in ("relu", "relu6", "hardswish", None):
        y = batch_norm.bn_act(case.x, zeros, ones, ones, zeros, None, act)
        assert y.isnan().nonzero().tolist() == [[0, 3, 1, 1]]
    case.grad[:] = float("nan")
    factors = (zeros, ones, ones, zeros)
    blocked = torch.zeros_like(case.x)
    sums = batch_norm.bn_act_reduce(case.grad, case.x.nan_to_num(), *factors, blocked, "relu")
    assert not sums[0].any() and not sums[1].any()


def test_a_batch_of_nothing() -> None:
    x, factors = torch.empty(0, 5, 3, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    assert not torch.stack(batch_norm.batch_stats(x)[:2]).any()
    assert not torch.stack(batch_norm.bn_act_reduce(x, x, *factors, None, "relu")).any()
    assert batch_norm.bn_act(x, *factors, x, "relu").shape == x.shape


def test_cuda_graph_replays_on_new_inputs() -> None:
    case, other = Case.make(LAYER1), Case.make(LAYER1)
    names = ("x", "residual", "grad")
    static = Case(**{**case.__dict__, **{name: getattr(case, name).clone() for name in names}})

    def change() -> None:
        for name in names:
            getattr(static, name).copy_(getattr(other, name))

    with dlf.use_backend("triton"):
        got = replayed(lambda: list(static.run().values()), change)
        assert_same(got, static.run().values())


def test_runs_on_the_current_stream() -> None:
    case = Case.make(LAYER1)
    with dlf.use_backend("triton"):
        expected = case.run()
        got = on_a_busy_stream(lambda: list(case.run().values()), case.x)
    assert_same(got, expected.values())


@needs_two_devices
def test_runs_on_another_device_than_the_current_one() -> None:
    case = Case.make((2, 256, 33, 33), device="cuda:1")
    check(case)
    assert torch.cuda.current_device() == 0


def test_compiles_without_graph_breaks() -> None:
    case = Case.make((2, 256, 33, 33))

    def step(x: Tensor) -> dict[str, Tensor]:
        return Case(x * 2, case.weight, case.bias, case.residual, case.grad, "relu").run()

    with dlf.use_backend("triton"), torch.no_grad():
        expected = step(case.x)
        got = torch.compile(step, fullgraph=True)(case.x)
    for name, t in expected.items():
        assert got[name].stride() == t.stride()
        torch.testing.assert_close(got[name], t)


def test_maps_beyond_two_to_the_31_elements() -> None:
    n, c, h, w = 127, 1024, 129, 129
    needs_memory(48)
    alone = Case.make((1, c, h, w))

    def last_of(image: Tensor) -> Tensor:
        whole = channels_last(torch.zeros(n, c, h, w, dtype=image.dtype, device=DEVICE))
        whole[-1] = image[0]
        return whole

    x, grad = last_of(alone.x), last_of(alone.grad)
    assert x.numel() > 2**31
    mean, variance, _ = batch_norm.batch_stats(x)
    exact = [s.double() for s in reference.batch_stats(alone.x.double())]
    expected = exact[0] / n
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-6)
    square = (exact[1] + exact[0] ** 2) / n - expected**2
    torch.testing.assert_close(variance.double(), square, rtol=1e-4, atol=1e-6)
    factors = (mean, (variance + EPS).rsqrt(), alone.weight, alone.bias)
    y = batch_norm.bn_act(x, *factors, None, "relu")
    assert torch.equal(y[-1:], batch_norm.bn_act(alone.x, *factors, None, "relu"))
    args = (*factors, None, "relu")
    sums = batch_norm.bn_act_reduce(grad, x, *args)
    few = batch_norm.bn_act_reduce(alone.grad, alone.x, *args)
    scale = alone.grad.double().abs().sum((0, 2, 3)).max() * factors[1].max()
    for a, b in zip(sums, few, strict=True):
        assert (a - b).abs().max() <= 1e-5 * scale
    args = (*factors, None, None, None, "relu", False)
    dx, _ = batch_norm.bn_act_backward(grad, x, *args)
    assert torch.equal(dx[-1:], batch_norm.bn_act_backward(alone.grad, alone.x, *args)[0])


def test_memory_is_that_of_the_results() -> None:
    case = Case.make((8, 256, 129, 129))
    with dlf.use_backend("triton"):
        results = case.run()
        peak = peak_memory(case.run)
    size = sum(t.numel() * t.element_size() for t in results.values())
    # Partials and vectors on top.
    assert peak <= 1.02 * size, f"{peak} bytes against {size}"
