"""The batch norm ops against PyTorch's own autograd in float64, on every CPU implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import backends, reference
from deeplab_fast.ops import batch_norm as bn
from deeplab_fast.testing import cpu_instruction_sets, deterministic, threads

OPS = torch.ops.deeplab_fast
EPS = 1e-3

# [N, C, H, W]
SHAPES = [
    pytest.param((2, 16, 5, 7), id="packed pixels with a rest"),
    pytest.param((1, 21, 9, 8), id="packed pixels, a width of no power of two"),
    pytest.param((3, 70, 4, 5), id="vectors overlap"),
    pytest.param((2, 64, 3, 3), id="whole vectors"),
    pytest.param((5, 3, 1, 1), id="1x1 map shorter than a row"),
    pytest.param((1, 3, 1, 2), id="map shorter than a vector"),
    pytest.param((1, 70, 1, 1), id="one pixel"),
    pytest.param((1, 1, 1, 1), id="one value"),
    pytest.param((2, 1, 9, 9), id="one channel, rest of one row"),
    pytest.param((0, 5, 3, 4), id="no image"),
    pytest.param((1, 70, 31, 33), id="several units"),
    pytest.param((1, 16, 66, 63), id="several units of packed pixels"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "transposed": lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    "slice of channels": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).narrow(1, 0, x.shape[1])
    ),
}
DTYPES = [torch.float64, torch.float32]
ACTS = ["relu", "relu6", "hardswish", None]
SETS = cpu_instruction_sets()
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_act = pytest.mark.parametrize("act", ACTS, ids=str)
both_statistics = pytest.mark.parametrize("fixed", [False, True], ids=["batch", "fixed"])


@dataclass
class Case:
    """One batch norm with residual and activation, and what PyTorch makes of it in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor
    grad: Tensor
    residual: Tensor | None
    act: str | None
    fixed: bool

    @classmethod
    def make(
        cls, shape=(2, 21, 5, 7), dtype=torch.float32, act="relu", residual=False, fixed=False
    ) -> Case:
        c = shape[1]
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
        weight = (torch.rand(c, dtype=torch.float64) + 0.5).to(dtype)
        weight[::3] *= -1
        bias = torch.randn(c, dtype=torch.float64).to(dtype)
        if act is not None:
            # Values on both sides of every bend, those at 3 and 6 included.
            bias += torch.arange(c, dtype=dtype) % 4 * 2
        if fixed or not x.numel():
            mean, variance = torch.randn(c, dtype=torch.float64), torch.rand(c).double() + 0.5
        else:
            exact = x.double()
            mean, variance = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
        case = cls(
            x,
            weight,
            bias,
            mean.to(dtype),
            (variance + EPS).rsqrt().to(dtype),
            torch.randn(shape, dtype=torch.float64).to(dtype),
            torch.randn(shape, dtype=torch.float64).to(dtype) if residual else None,
            act,
            fixed or not x.numel(),
        )
        case.keep_clear_of_bends()
        return case

    def keep_clear_of_bends(self) -> None:
        """Moves values away from where a rounding decides on which side of a bend they are."""
        at = self.before_act()
        bends = torch.tensor([0.0, 6.0]) if self.act != "hardswish" else torch.tensor([-3.0, 3.0])
        near = ((at[..., None] - bends).abs() < 1e-4).any(-1)
        assert near.float().mean() < 0.01 if near.numel() > 200 else near.sum() < 3
        self.grad = torch.where(near, 0.0, self.grad).to(self.x.dtype)

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.rstd, self.weight, self.bias

    def before_act(self) -> Tensor:
        mean, rstd, weight, bias = (v.double()[:, None, None] for v in self.vectors())
        y = (self.x.double() - mean) * rstd * weight + bias
        return y if self.residual is None else y + self.residual.double()

    def oracle(self) -> tuple[Tensor, dict[str, Tensor]]:
        """y, and the gradients to x, weight, bias and the residual, by PyTorch's autograd."""
        names = ("x", "weight", "bias", *["residual"] * (self.residual is not None))
        leaves = {name: getattr(self, name).double().detach().clone() for name in names}
        for leaf in leaves.values():
            leaf.requires_grad_()
        variance = self.rstd.double() ** -2 - EPS
        # A single value has no batch statistics in F.batch_norm's eyes; they are 0 and itself.
        if self.x.numel() == self.x.shape[1] and not self.fixed:
            x = leaves["x"]
            y = (x - x) * leaves["weight"][:, None, None] + leaves["bias"][:, None, None]
        else:
            y = F.batch_norm(
                leaves["x"],
                self.mean.double() if self.fixed else None,
                variance if self.fixed else None,
                leaves["weight"],
                leaves["bias"],
                not self.fixed,
                eps=EPS,
            )
        if self.residual is not None:
            y = y + leaves["residual"]
        y = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: lambda v: v}[
            self.act
        ](y)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad.double())
        return y.detach(), dict(zip(leaves, grads, strict=True))

    def forward(self) -> Tensor:
        return bn.bn_act(self.x, *self.vectors(), residual=self.residual, act=self.act)

    def reduce(self, out: Tensor | None) -> tuple[Tensor, Tensor]:
        return bn.bn_act_reduce(self.grad, self.x, *self.vectors(), out=out, act=self.act)

    def backward(
        self, out: Tensor | None, sums: tuple[Tensor, Tensor] | None, to_residual: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        count = self.x.numel() // self.x.shape[1]
        means = (None, None) if sums is None else tuple(s / max(count, 1) for s in sums)
        return bn.bn_act_backward(
            self.grad,
            self.x,
            *self.vectors(),
            *means,
            out=out,
            act=self.act,
            to_residual=to_residual,
        )


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within 40 roundings of the largest value: a map's value takes at most 10 operations, some on
    statistics that are rounded themselves; sums grow by their depth, at most 128 / 4 + 4, which
    averages out. `scale` is of what was added up where it is larger than the result.
    """
    eps = torch.finfo(got.dtype).eps
    largest = max(1.0, scale, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=40 * eps * largest)


@every_dtype
@every_shape
def test_batch_stats(implementation, nan_poison, shape, dtype) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
    mean, variance = bn.batch_stats(x)
    assert mean.shape == variance.shape == (shape[1],)
    assert mean.dtype == variance.dtype == dtype
    if not x.numel():
        assert not mean.any() and not variance.any()
        return
    close(mean, x.double().mean((0, 2, 3)))
    close(variance, x.double().var((0, 2, 3), correction=0))


def running(
    channels: int, dtype: torch.dtype = torch.float32, batches: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean and variance, and the number of batches before."""
    mean = torch.linspace(-1, 1, channels, dtype=torch.float64).to(dtype)
    return mean, mean.abs() + 0.5, torch.tensor(batches)


@pytest.mark.parametrize(
    ("momentum", "counted", "dtype", "kept"),
    [
        pytest.param(0.1, True, torch.float32, torch.float32, id="exponential"),
        pytest.param(None, True, torch.float32, torch.float32, id="cumulative"),
        pytest.param(0.3, False, torch.float64, torch.float64, id="not counted, float64"),
        pytest.param(None, False, torch.float32, torch.float32, id="neither: nothing is added"),
        pytest.param(0.1, True, torch.float32, torch.bfloat16, id="buffers in bfloat16"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 21, 5, 7), (3, 70, 1, 1)], ids=["map", "one pixel"])
def test_running_statistics(implementation, nan_poison, shape, momentum, counted, dtype, kept):
    """As nn.BatchNorm2d has them, and to the bit what PyTorch's in-place operations make of the
    same statistics, one multiply-add after the other."""
    x = (torch.randn(shape) * 2 + 1).to(dtype)
    mean, var, batches = running(shape[1], kept)
    module = torch.nn.BatchNorm2d(shape[1], momentum=momentum, dtype=torch.float64)
    module.running_mean.copy_(mean)
    module.running_var.copy_(var)
    module.num_batches_tracked.copy_(batches)
    if not counted:
        module.num_batches_tracked, batches = None, None
    module(x.double())
    by_hand = [None if t is None else t.clone() for t in (mean, var, batches)]
    versions = mean._version, var._version
    found = OPS.batch_stats(x, EPS, mean, var, batches, momentum)
    torch.testing.assert_close(found[2], (found[1] + EPS).rsqrt(), rtol=0, atol=0)
    count = x.numel() // shape[1]
    reference.update_running(*by_hand, momentum, *found[:2], count)
    for one, other in zip((mean, var, batches), by_hand, strict=True):
        assert one is None or torch.equal(one, other)
    # One rounding of what is kept, and those of the statistics.
    rounding = torch.finfo(kept).eps / 2 + 4e-6
    for one, other in ((mean, module.running_mean), (var, module.running_var)):
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=rounding)
    # What is prepared from them sees that they changed.
    assert mean._version > versions[0] and var._version > versions[1]


def _cases() -> list:
    rows = []
    for act in ACTS:
        for residual in (False, True) if act != "hardswish" else (False,):
            name = f"{act}{', residual' if residual else ''}"
            rows.append(pytest.param(act, residual, id=name))
    return rows


@pytest.mark.parametrize(("act", "residual"), _cases())
@both_statistics
@every_dtype
def test_forward_and_gradients(implementation, nan_poison, act, residual, fixed, dtype) -> None:
    check_gradients(Case.make((2, 21, 5, 7), dtype, act, residual, fixed))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@every_dtype
@every_shape
def test_shapes(implementation, nan_poison, shape, residual, dtype) -> None:
    check_gradients(Case.make(shape, dtype, "relu", residual))


def check_gradients(case: Case) -> None:
    y, grads = case.oracle()
    got = case.forward()
    assert got.dtype == case.x.dtype
    close(got, y)
    # What the activation saw is computed again only where nothing was added to it.
    outs = [got] if case.act != "hardswish" else []
    outs += [None] if case.residual is None else []
    # Sums of as many terms of size 1 and more, of which the sign varies.
    scale = max(1.0, case.x.numel() / case.x.shape[1]) ** 0.5 * 4
    # A single value's variance is 0: rstd is 1 / sqrt(eps), and so are the factors of rounding.
    steep = case.rstd.abs().max().item()
    for out in outs:
        sums = case.reduce(out)
        assert sums[0].dtype == sums[1].dtype == case.x.dtype
        close(sums[0], grads["bias"], scale)
        close(sums[1], grads["weight"], scale)
        for to_residual in {case.residual is not None, out is not None}:
            dx, d_residual = case.backward(out, None if case.fixed else sums, to_residual)
            close(dx, grads["x"], 4 * steep)
            assert (d_residual is None) == (not to_residual)
            if to_residual:
                # The gradient to y with the derivative of the activation, which has no sum.
                close(d_residual, residual_gradient(case))


def residual_gradient(case: Case) -> Tensor:
    at = case.before_act().requires_grad_()
    y = {"relu": F.relu, "relu6": F.relu6, None: lambda v: v}[case.act](at)
    return torch.autograd.grad(y, at, case.grad.double())[0] if at.numel() else at


@pytest.mark.parametrize("act", ["relu", "relu6", None], ids=str)
def test_recomputed_mask_is_the_one_of_the_forward_pass(implementation, act) -> None:
    """Bit for bit, also where rounding decides on the sign: x is a multiple of 1/8 around the
    mean, so many values are close to 0."""
    case = Case.make((2, 70, 33, 17), act=act)
    case.bias = torch.randn(70) * 1e-7
    case.x = last(case.mean[:, None, None] + torch.randint(-3, 4, case.x.shape) / 8)
    case.grad = last(torch.randn(case.x.shape))
    out = case.forward()
    for one, other in zip(case.reduce(out), case.reduce(None), strict=True):
        assert torch.equal(one, other)
    sums = case.reduce(None)
    given, recomputed = case.backward(out, sums, True), case.backward(None, sums, True)
    for one, other in zip(given, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_give_the_same_bits(implementation, layout) -> None:
    case = Case.make((2, 21, 5, 7), residual=True)

    def results(case: Case) -> list[Tensor]:
        out = case.forward()
        sums = case.reduce(out)
        return [*bn.batch_stats(case.x), out, *sums, *case.backward(out, sums, True)]

    expected = results(replace(case, x=last(case.x), grad=last(case.grad)))
    got = results(
        replace(case, x=layout(case.x), grad=layout(case.grad), residual=layout(case.residual))
    )
    for one, other in zip(got, expected, strict=True):
        if implementation == "reference":
            # PyTorch sums in an order that depends on the layout.
            close(one, other.double(), 30)
        else:
            assert torch.equal(one, other)
        assert one.dim() == 1 or one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", SETS, indirect=True)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 70, 65, 33), id="several units"),
        pytest.param((2, 256, 40, 41), id="rounded number of units"),
        pytest.param((3, 21, 60, 70), id="a rest"),
    ],
)
def test_same_bits_for_any_number_of_threads(implementation, shape) -> None:
    case = Case.make(shape)

    def results() -> list[Tensor]:
        sums = case.reduce(None)
        return [*bn.batch_stats(case.x), case.forward(), *sums, case.backward(None, sums)[0]]

    with threads(1):
        expected = results()
    for count in (2, 3):
        with threads(count):
            for got, want in zip(results(), expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 256, 33, 33), id="many channels"),
        pytest.param((2, 3, 129, 129), id="packed pixels"),
        pytest.param((1, 64, 2, 3), id="few pixels"),
    ],
)
def test_variance_beside_a_large_mean(implementation, shape) -> None:
    """Squares of the values would lose all of the variance: 1000^2 * 2^-24 is 0.06."""
    x = (torch.randn(shape, dtype=torch.float64) + 1000).float()
    mean, variance = bn.batch_stats(x)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1.2e-7, atol=0)


def test_variance_where_the_mean_drifts(implementation) -> None:
    """Pixels that come first say little about those that follow, down to a single outlier."""
    x = torch.randn(1, 70, 64, 64, dtype=torch.float64)
    x += torch.linspace(-1000, 1000, 64)[:, None]
    x[0, :35, 0, 0] = 1e6
    x = x.float()
    _, variance = bn.batch_stats(x)
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-5, atol=0)


def test_constant_channels_have_no_variance(implementation) -> None:
    """Rounding may leave little of the mean's rounding squared, and nothing below zero."""
    x = torch.full((2, 21, 33, 5), 1 / 3)
    mean, variance = bn.batch_stats(x)
    assert (variance >= 0).all() and (variance <= 1e-13).all()
    torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 21, 5, 7), (1, 70, 5, 3)], ids=str)
@every_act
def test_nan_spreads_as_in_pytorch(implementation, act, shape) -> None:
    """Within its channel into statistics and sums, at its place into maps; never across."""
    case = Case.make(shape, act=act)
    case.x[0, 1, 0, 1] = float("nan")
    case.grad[0, 2, 0, 0] = float("nan")
    y, *rest = case.forward(), *bn.batch_stats(case.x)
    assert y.isnan().sum() == 1 and y[0, 1, 0, 1].isnan()
    for vector in rest:
        assert vector.isnan().sum() == 1 and vector[1].isnan()
    with dlf.use_backend("reference"):
        expected_sums = case.reduce(None)
        expected = case.backward(None, expected_sums)[0]
        constants = case.backward(None, None)[0]
    for got, want in zip(case.reduce(None), expected_sums, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(case.backward(None, expected_sums)[0].isnan(), expected.isnan())
    assert torch.equal(case.backward(None, None)[0].isnan(), constants.isnan())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("factor", [INF, -INF], ids=str)
@every_act
def test_an_infinite_factor_is_not_a_number(implementation, act, factor) -> None:
    """As in PyTorch, which subtracts infinities: ReLU6 makes 6 and ReLU 0 of one."""
    case = Case.make((2, 21, 5, 7), act=act)
    case.weight[4] = factor
    y = case.forward()
    assert y[:, 4].isnan().all()
    assert y.isnan().sum() == y[:, 4].numel()


# PyTorch's derivatives. At nan those of relu6 and hardswish differ between its whole vectors and
# the rest of one; these are the ones that hide nothing.
SLOPES = {
    None: {NAN: 1.0, INF: 1.0, -INF: 1.0},
    "relu": {NAN: 1.0, INF: 1.0, -INF: 0.0},
    "relu6": {NAN: 1.0, INF: 0.0, -INF: 0.0},
    "hardswish": {NAN: NAN, INF: 1.0, -INF: 0.0},
}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@every_act
def test_gradient_where_the_activation_saw_no_number(implementation, act, value) -> None:
    slope = torch.tensor(SLOPES[act][value])
    x, grad = torch.full((1, 21, 2, 2), value), torch.randn(1, 21, 2, 2)
    ones, zeros = torch.ones(21), torch.zeros(21)
    factors = (zeros, ones, ones, zeros)
    leaf = x.clone().requires_grad_()
    {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: torch.clone}[act](
        leaf
    ).backward(grad)
    assert value != value or torch.equal(leaf.grad, slope * grad)
    for out in (None, None if act == "hardswish" else bn.bn_act(x, *factors, act=act)):
        options = {"out": out, "act": act}
        dx, to_residual = bn.bn_act_backward(grad, x, *factors, to_residual=True, **options)
        sum_of_g, _ = bn.bn_act_reduce(grad, x, *factors, **options)
        for got in (dx, to_residual):
            torch.testing.assert_close(got, slope * grad, equal_nan=True)
        torch.testing.assert_close(sum_of_g, (slope * grad).sum((0, 2, 3)), equal_nan=True)


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_a_gradient_of_nan_ends_where_the_activation_gave_nothing(implementation, act) -> None:
    case = Case.make(act=act)
    case.x.fill_(0)
    case.grad.fill_(NAN)
    factors = (torch.ones(21), torch.ones(21), torch.ones(21), torch.zeros(21))
    dx, _ = bn.bn_act_backward(case.grad, case.x, *factors, act=act)
    assert not dx.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_goes_to_the_reference(dtype) -> None:
    case = Case.make()
    half = replace(case, x=case.x.to(dtype), grad=case.grad.to(dtype))
    why = backends.explain(bn.describe_stats(half.x))
    assert "takes float32 and float64 only" in str(why) and why.chosen == "reference"
    y = half.forward()
    assert y.dtype == dtype
    mean, _ = bn.batch_stats(half.x)
    assert mean.dtype == torch.float32
    exact = reference.bn_act(half.x.double(), *(v.double() for v in case.vectors()))
    # One rounding to the dtype, and a few in fp32.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert ((y.double() - exact).abs() <= bound).all()


def _calls() -> dict[str, tuple]:
    """The arguments of each op's schema."""
    plain = Case.make()
    case = Case.make(residual=True)
    out = case.forward()
    sums = case.reduce(out)
    both = (case.grad, case.x, *case.vectors())
    return {
        "batch_stats": (case.x, EPS, None, None, None, None),
        "batch_stats running": (case.x, EPS, *running(case.x.shape[1]), 0.1),
        "bn_act": (case.x, *case.vectors(), case.residual, "relu"),
        "bn_act_reduce": (*both, out, "relu"),
        "bn_act_backward": (*both, out, *sums, "relu", True, 70.0),
        "bn_act_backward without": (plain.grad, plain.x, *plain.vectors(), *[None] * 4, False, 1.0),
    }


CALLS = list(_calls())


@pytest.fixture(params=["reference", "cpu"] if SETS else ["reference"])
def backend(request: pytest.FixtureRequest):
    with dlf.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(backend, name) -> None:
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, _calls()[name])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 21, 5, 7), id="a map"),
        pytest.param((0, 5, 3, 4), id="no image"),
        pytest.param((2, 5, 1, 1), id="1x1"),
        pytest.param((2, 1, 3, 4), id="one channel"),
    ],
)
def test_fakes_have_the_strides_of_the_results(backend, shape) -> None:
    case = Case.make(shape)
    maps = (case.grad, case.x, *case.vectors())
    calls = {
        "batch_stats": (case.x, EPS, None, None, None, None),
        "bn_act": (case.x, *case.vectors(), None, "relu"),
        "bn_act_reduce": (*maps, None, "relu"),
        "bn_act_backward": (*maps, None, None, None, "relu", True, 1.0),
    }
    for name, args in calls.items():
        real = getattr(OPS, name)(*args)
        mode = torch._subclasses.FakeTensorMode()
        fake = getattr(OPS, name)(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        )
        real, fake = ((r,) if isinstance(r, Tensor) else r for r in (real, fake))
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.dtype) == (r.shape, r.dtype), name
            # The stride of an axis with one place says nothing, and PyTorch leaves it open.
            for size, *strides in zip(f.shape, f.stride(), r.stride(), strict=True):
                assert size <= 1 or strides[0] == strides[1], name


def test_compiles_without_graph_breaks(backend) -> None:
    torch.compiler.reset()
    case = Case.make((2, 21, 5, 7))

    def step(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        mean, variance = bn.batch_stats(x)
        vectors = (mean, (variance + EPS).rsqrt(), weight, bias)
        y = bn.bn_act(x, *vectors)
        sums = bn.bn_act_reduce(grad, x, *vectors)
        count = x.numel() // x.shape[1]
        dx, _ = bn.bn_act_backward(grad, x, *vectors, *(s / count for s in sums))
        return y, dx, *sums

    args = (case.x, case.weight, case.bias, case.grad)
    expected = step(*args)
    got = torch.compile(step, fullgraph=True, backend="eager")(*args)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("implementation", SETS, indirect=True)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 21, 5, 7), (2, 70, 25, 31)], ids=str)
def test_everything_is_written(implementation, shape) -> None:
    """In deterministic mode tensors that C++ makes are filled with nan."""
    case = Case.make(shape)
    with deterministic():
        out = case.forward()
        sums = case.reduce(out)
        for result in (*bn.batch_stats(case.x), out, *sums, *case.backward(out, sums, True)):
            assert not result.isnan().any()


class TestErrors:
    def test_gradients_are_refused(self) -> None:
        case = Case.make()
        case.x.requires_grad_()
        with pytest.raises(RuntimeError, match="bn_act records no gradient; use"):
            case.forward()
        with torch.no_grad():
            case.forward()

    @pytest.mark.parametrize(
        ("changes", "error", "text"),
        [
            ({"x": torch.randn(3, 4)}, ValueError, r"x must be a tensor \[N, C, H, W\]"),
            ({"x": torch.ones(2, 21, 5, 7).long()}, TypeError, "x has dtype int64; allowed"),
            ({"x": torch.randn(2, 21, 0, 7)}, ValueError, "has no channels, rows or columns"),
            ({"act": "gelu"}, ValueError, "act must be one of .*'relu'.*, got 'gelu'"),
            ({"mean": torch.randn(20)}, ValueError, r"mean has shape \[20\], expected \[21\]"),
            ({"bias": torch.ones(21).long()}, TypeError, "bias has dtype int64; allowed"),
            (
                {"weight": torch.randn(21, device="meta")},
                ValueError,
                "weight is on meta, the main input on cpu",
            ),
            (
                {"residual": torch.randn(2, 21, 7, 5)},
                ValueError,
                r"residual has shape \[2, 21, 7, 5\], expected \[2, 21, 5, 7\]",
            ),
            (
                {"residual": torch.randn(2, 21, 5, 7).double()},
                TypeError,
                "residual has dtype float64; allowed: float32",
            ),
            (
                {"residual": torch.randn(2, 21, 5, 7), "act": "hardswish"},
                ValueError,
                "act='hardswish' does not take residual; use 'relu' or 'relu6'",
            ),
        ],
    )
    def test_forward(self, changes, error, text) -> None:
        case = replace(Case.make(), **changes)
        with pytest.raises(error, match=text):
            case.forward()

    @pytest.mark.parametrize("x", [torch.randn(3, 4), torch.ones(1, 2, 3, 4).int()], ids=["2D", ""])
    def test_stats(self, x) -> None:
        with pytest.raises((ValueError, TypeError), match="batch_stats: x"):
            bn.batch_stats(x)

    def test_backward(self) -> None:
        case = Case.make()
        with pytest.raises(ValueError, match=r"bn_act_reduce: grad has shape \[2, 21, 5, 6\]"):
            replace(case, grad=case.grad[..., :6]).reduce(None)
        with pytest.raises(ValueError, match="act='hardswish' does not take out"):
            replace(case, act="hardswish").reduce(case.x)
        both = (case.grad, case.x, *case.vectors())
        with pytest.raises(ValueError, match="give both of mean_grad and mean_grad_xhat, or none"):
            bn.bn_act_backward(*both, case.mean)
        with pytest.raises(ValueError, match=r"mean_grad has shape \[3\], expected \[21\]"):
            bn.bn_act_backward(*both, case.mean, case.mean[:3])

    @pytest.mark.skipif(not SETS, reason="without the extension")
    def test_of_the_extension(self) -> None:
        """What ops/batch_norm.py never passes on."""
        case = Case.make()
        x, vectors = case.x, case.vectors()
        with pytest.raises(ValueError, match="x must be a float32 or float64 map"):
            OPS._batch_stats_cpu(x.half(), EPS, None, None, None, None)
        with pytest.raises(ValueError, match=r"mean must be a vector of 21 numbers, got .*\[20\]"):
            OPS._bn_act_cpu(x, case.mean[:20], *vectors[1:], None, "relu")
        with pytest.raises(ValueError, match=r"bias must be a vector of 21 numbers, got Long"):
            OPS._bn_act_cpu(x, *vectors[:3], case.bias.long(), None, "relu")
        with pytest.raises(
            ValueError, match=r"residual must be a map like x, Float \[2, 21, 5, 7\]"
        ):
            OPS._bn_act_cpu(x, *vectors, case.grad[:1], "relu")
        with pytest.raises(ValueError, match="act must be relu, relu6 or hardswish, got tanh"):
            OPS._bn_act_cpu(x, *vectors, None, "tanh")
        with pytest.raises(ValueError, match="hardswish takes no residual and no out"):
            OPS._bn_act_cpu(x, *vectors, x, "hardswish")
        with pytest.raises(ValueError, match="give both of mean_grad and mean_grad_xhat"):
            OPS._bn_act_backward_cpu(x, x, *vectors, None, case.mean, None, "relu", False, 1.0)
        with pytest.raises(ValueError, match="give both of running_mean and running_var"):
            OPS._batch_stats_cpu(x, EPS, case.mean, None, None, 0.1)
        with pytest.raises(
            ValueError, match=r"running_var must be contiguous Float \[21\], got Do"
        ):
            OPS._batch_stats_cpu(x, EPS, case.mean, case.mean.double(), None, 0.1)
        with pytest.raises(ValueError, match="num_batches_tracked must be one int64 on the CPU"):
            OPS._batch_stats_cpu(x, EPS, case.mean, case.mean, torch.ones(1), 0.1)
