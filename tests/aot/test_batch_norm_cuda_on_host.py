"""What the CUDA kernels of batch norm compute, run on the host without a GPU.

`cuda_on_host/` compiles the same kernels, plans and launch sequences with the C++ compiler and runs
the threads of a block as fibres. The kernels compute in float32; each tolerance is a bound of their
roundings, from the float64 values of the same operands. Speed and memory order within a warp need a
GPU.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeplab_fast import _ext, backends, reference
from deeplab_fast.ops._compiled_batch_norm import CUDA

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "cuda_on_host" / "batch_norm.cpp"
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Elements of 16 bytes.
WIDTH = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}
# Unit roundoff, and half the distance of the smallest numbers.
U = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
U32 = U[torch.float32]
ACTS = ("relu", "relu6", "hardswish", None)
# In the order of the enum.
ACT_NUMBERS = {None: 0, "relu": 1, "relu6": 2, "hardswish": 3}
# Where the derivative jumps.
KINKS: dict[str | None, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    None: (),
}

# (pixels, channels), dtype
CASES = [
    pytest.param((300, 64), torch.bfloat16, id="three chunks, the last one short"),
    pytest.param((300, 64), torch.float16, id="the same in fp16"),
    pytest.param((301, 64), torch.float32, id="the same in fp32, an odd number of pixels"),
    pytest.param((35, 264), torch.bfloat16, id="2 groups, threads right of the last channel"),
    pytest.param((3, 8), torch.float16, id="one access a pixel, fewer pixels than rows"),
    pytest.param((1, 24), torch.bfloat16, id="one pixel"),
    pytest.param((1, 1), torch.float32, id="one value"),
    pytest.param((2500, 1), torch.float32, id="one channel, 256 rows, three chunks"),
    pytest.param((370, 21), torch.bfloat16, id="elements one by one: 21 channels"),
    pytest.param((37, 259), torch.float16, id="elements one by one, two groups"),
    pytest.param((9000, 127), torch.float32, id="a thread with more pixels than it loads at once"),
    pytest.param((0, 16), torch.bfloat16, id="no pixel"),
    pytest.param((5, 0), torch.bfloat16, id="no channel"),
]
every_case = pytest.mark.parametrize(("shape", "dtype"), CASES)
every_act = pytest.mark.parametrize("act", ACTS, ids=str)
# A vector and a scalar form, several chunks.
few_cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((300, 40), torch.bfloat16, id="vectors"),
        pytest.param((300, 40), torch.float16, id="vectors in fp16"),
        pytest.param((370, 21), torch.float32, id="one by one"),
    ],
)


class Emulated:
    """The kernels on the host."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.last_error.restype = ctypes.c_char_p

    def call(self, name: str, x: Tensor, vectors: bool | None, *args) -> None:
        """Tensors go as pointers, None as null."""
        if vectors is None:
            vectors = x.shape[1] % WIDTH[x.dtype] == 0
        values = [ctypes.c_int64(ELEMENTS[x.dtype]), ctypes.c_bool(vectors)]
        values += [ctypes.c_int64(n) for n in x.shape]
        for a in args:
            if isinstance(a, int):
                values.append(ctypes.c_int64(a))
            else:
                values.append(ctypes.c_void_p(None if a is None else a.data_ptr()))
        if getattr(self.library, name)(*values):
            raise RuntimeError(self.library.last_error().decode())

    def plan(self, shape, dtype, reduction: bool, vectors: bool | None = None) -> Plan:
        found = torch.zeros(5, dtype=torch.int64)
        if vectors is None:
            vectors = shape[1] % WIDTH[dtype] == 0
        x = torch.empty(shape, dtype=dtype, device="meta")
        self.call("plan", x, vectors, int(reduction), found)
        return Plan(*found.tolist(), width=WIDTH[dtype] if vectors else 1)

    def batch_stats(self, x: Tensor, vectors: bool | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = (nan(x.shape[1:]) for _ in range(2))
        self.call("batch_stats", x, vectors, x, mean, variance)
        return mean, variance

    def bn_act(self, x, norm, residual, act, vectors: bool | None = None) -> Tensor:
        y = nan(x.shape, x.dtype)
        self.call("bn_act", x, vectors, ACT_NUMBERS[act], *norm, x, residual, y)
        return y

    def bn_act_reduce(self, grad, x, norm, out, act, vectors: bool | None = None):
        sums = [nan(x.shape[1:]) for _ in range(2)]
        self.call("bn_act_reduce", x, vectors, ACT_NUMBERS[act], *norm, grad, x, out, *sums)
        return sums

    def bn_act_backward(
        self, grad, x, norm, out, means, act, to_residual, vectors: bool | None = None
    ):
        found = nan(x.shape, x.dtype), nan(x.shape, x.dtype) if to_residual else None
        number = ACT_NUMBERS[act]
        self.call("bn_act_backward", x, vectors, number, *norm, grad, x, out, *means, *found)
        return found


@dataclass(frozen=True)
class Plan:
    """How a map is cut: the fields of PixelPlan, and the elements of an access."""

    columns: int
    rows: int
    groups: int
    chunk: int
    chunks: int
    width: int

    @property
    def depth(self) -> int:
        """Most additions between a value and its sum: of a thread, of a block, of the chunks."""
        steps = self.chunk // self.rows if self.rows else 0
        return steps + math.ceil(math.log2(self.rows or 1)) + math.ceil(self.chunks / 128) + 7


def nan(shape, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("cuda_on_host") / "batch_norm.so"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", include]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
    return Emulated(path)


def make(shape, dtype: torch.dtype) -> Tensor:
    """Each channel with its own mean and spread."""
    channel = torch.linspace(-2, 3, shape[1])
    return (torch.randn(shape) * (1 + channel.abs()) + channel).to(dtype)


def make_norm(channels: int) -> list[Tensor]:
    """mean, rstd, weight, bias, such that all kinks are between the values."""
    return [
        torch.linspace(-2, 3, channels),
        torch.rand(channels) + 0.3,
        torch.randn(channels) + 1,
        torch.randn(channels) + 1,
    ]


def as_map(x: Tensor | None) -> Tensor | None:
    """[P, C] as the reference takes it, in float64."""
    return None if x is None else x.double().t()[None, :, :, None]


def exact(name: str, *args):
    """The reference in float64; maps are [P, C]."""
    result = getattr(reference, name)(*(_double(a) for a in args))
    back = [r[0, :, :, 0].t() if r.dim() == 4 else r for r in _tuple(result)]
    return back if isinstance(result, tuple) else back[0]


def _double(a):
    if isinstance(a, Tensor):
        return as_map(a) if a.dim() == 2 else a.double()
    return a


def _tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def stored(exact: Tensor, error: Tensor | float, dtype: torch.dtype) -> Tensor:
    """What a value that is off by `error` may be off by once it is rounded to `dtype`."""
    if dtype == torch.float32:
        return exact * 0 + error
    return error + (exact.abs() + error) * U[dtype] + TINY[dtype]


def assert_within(got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    assert got.shape == exact.shape
    assert not got.isnan().any()
    excess = (got.double() - exact).abs() - allowed
    assert not (excess > 0).any(), f"off by {excess.max()} more than allowed"


def before_act(x, norm, residual=None) -> tuple[Tensor, Tensor]:
    """What the activation sees, in float64, and how far the kernels' may be from it: roundings of
    x - mean, of rstd * weight, of the fused multiply-add and of the residual sum.
    """
    mean, rstd, weight, bias = (v.double() for v in norm)
    scaled = (x.double() - mean) * (rstd * weight)
    v = scaled + bias
    error = 2.01 * scaled.abs() + 1.01 * v.abs()
    if residual is not None:
        v = v + residual.double()
        error = error + 1.01 * v.abs()
    return v, error * U32


# ---- batch_stats ----


@every_case
def test_batch_stats(emulated, shape, dtype) -> None:
    """A mean is off by at most two roundings of the largest value at each step of its sum. Means
    that are off by d move the variance by at most 2 d sd + d^2, and its own sum has up to six
    roundings at each step.
    """
    x = make(shape, dtype)
    mean, variance = emulated.batch_stats(x)
    exact_mean, exact_variance = exact("batch_stats", x)
    steps = 2 * emulated.plan(shape, dtype, reduction=True).depth * U32
    off = steps * (x.double().abs().amax(0) if shape[0] else 0)
    assert_within(mean, exact_mean, off + 0 * exact_mean)
    spread = 2 * off * exact_variance.sqrt() + off**2
    assert_within(variance, exact_variance, 3 * steps * exact_variance + spread)


def test_batch_stats_far_from_zero(emulated) -> None:
    """Mean 1000, standard deviation 1: a sum of squares would lose the variance. A mean is off by
    up to d = 1000 depth U, the variance then by 2 d sd.
    """
    x = torch.randn(700, 5) + 1000
    mean, variance = emulated.batch_stats(x)
    exact_mean, exact_variance = exact("batch_stats", x)
    d = 1000 * emulated.plan(x.shape, x.dtype, reduction=True).depth * U32
    assert d < 2e-3
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=d)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=2 * d, atol=0)


def test_batch_stats_of_constants(emulated) -> None:
    """Equal values have no variance, wherever the chunks end."""
    mean, variance = emulated.batch_stats(torch.full((1000, 24), 3.1))
    assert torch.equal(mean, torch.full((24,), 3.1))
    assert not variance.any()


def test_not_finite_values_show(emulated) -> None:
    x = torch.randn(300, 16).half()
    x[17, 3], x[299, 5] = float("nan"), float("inf")
    mean, variance = emulated.batch_stats(x)
    bad = torch.zeros(16, dtype=torch.bool)
    bad[[3, 5]] = True
    assert torch.equal(~mean.isfinite(), bad)
    assert torch.equal(variance.isnan(), bad)


# ---- bn_act ----


@every_case
def test_bn_act(emulated, shape, dtype) -> None:
    check_bn_act(emulated, shape, dtype, "relu", with_residual=False)


@every_act
@few_cases
def test_bn_act_activations(emulated, shape, dtype, act) -> None:
    check_bn_act(emulated, shape, dtype, act, with_residual=False)


@pytest.mark.parametrize("act", ["relu", "relu6", None], ids=str)
@few_cases
def test_bn_act_with_residual(emulated, shape, dtype, act) -> None:
    check_bn_act(emulated, shape, dtype, act, with_residual=True)


def check_bn_act(emulated, shape, dtype, act, with_residual: bool) -> None:
    """An activation stretches an error by at most 1, hardswish by 1.5 and adds four roundings, of
    which those of v + 3 count as a value of up to |v| + 3.
    """
    x, norm = make(shape, dtype), make_norm(shape[1])
    residual = make(shape, dtype) if with_residual else None
    y = emulated.bn_act(x, norm, residual, act)
    v, error = before_act(x, norm, residual)
    if act == "hardswish":
        error = 1.5 * error + v.abs() * (1 + v.abs()) * 4.1 * U32
    expected = exact("bn_act", x, *norm, residual, act)
    assert_within(y, expected, stored(expected, error, dtype))


def test_nan_stays(emulated) -> None:
    x = torch.zeros(6, 8)
    x[2, 3] = float("nan")
    norm = [torch.zeros(8), torch.ones(8), torch.ones(8), torch.ones(8)]
    for act in ACTS:
        assert torch.equal(emulated.bn_act(x, norm, None, act).isnan(), x.isnan())


# ---- the gradient ----


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish"])
def test_gradient_at_nan(emulated, act) -> None:
    """The ReLUs let it through, hard swish makes it NaN, as PyTorch's do."""
    x = torch.zeros(5, 8)
    x[2, 3] = float("nan")
    norm = [torch.zeros(8), torch.ones(8), torch.ones(8), torch.ones(8)]
    grad = torch.full_like(x, 2.0)
    for out in (None,) if act == "hardswish" else (None, emulated.bn_act(x, norm, None, act)):
        dx, to_residual = emulated.bn_act_backward(grad, x, norm, out, (None, None), act, True)
        sum_of_g, _ = emulated.bn_act_reduce(grad, x, norm, out, act)
        for got in (dx[2, 3], to_residual[2, 3], sum_of_g[3] - 8):
            assert got.isnan() if act == "hardswish" else got == 2
        assert dx.isnan().sum() == (act == "hardswish")


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish"])
def test_an_infinite_factor_is_not_a_number(emulated, act) -> None:
    weight = torch.ones(8)
    weight[5] = float("inf")
    norm = [torch.zeros(8), torch.ones(8), weight, torch.ones(8)]
    y = emulated.bn_act(torch.ones(5, 8), norm, None, act)
    assert y.isnan().nonzero()[:, 1].tolist() == [5] * 5


class Gradient:
    """Operands of the gradient, and g in float64.

    Attributes:
        error: how far the kernels' g may be from it.
        unsure: where rounding may move what the activation sees over a kink of its derivative.
    """

    def __init__(self, shape, dtype, act, with_out: bool) -> None:
        self.grad, self.x, self.norm = make(shape, dtype), make(shape, dtype), make_norm(shape[1])
        self.act, self.out = act, None
        v, error = before_act(self.x, self.norm)
        if with_out:
            residual = make(shape, dtype)
            self.out = exact("bn_act", self.x, *self.norm, residual, act).to(dtype).contiguous()
            # Read as it is.
            v, error = self.out.double(), 0 * error
        self.unsure = torch.zeros_like(v, dtype=torch.bool)
        for kink in KINKS[act]:
            self.unsure |= ((v - kink).abs() <= error) & (error > 0)
        self.g = exact("bn_act_backward", *self.args, None, None, act, True)[1]
        self.error = 0 * error
        if act == "hardswish":
            # The slope v / 3 + 1/2 is off by error / 3 and two roundings, the product by another.
            slope = v.abs() / 3 + 0.5
            self.error = self.grad.double().abs() * (error / 3 + 3.1 * slope * U32)

    @property
    def args(self) -> tuple:
        return self.grad, self.x, *self.norm, self.out


@every_case
def test_bn_act_reduce(emulated, shape, dtype) -> None:
    check_reduce(emulated, shape, dtype, "relu", with_out=False)


@every_act
@few_cases
def test_bn_act_reduce_activations(emulated, shape, dtype, act) -> None:
    check_reduce(emulated, shape, dtype, act, with_out=False)


@pytest.mark.parametrize("act", ["relu", "relu6", None], ids=str)
@few_cases
def test_bn_act_reduce_from_out(emulated, shape, dtype, act) -> None:
    check_reduce(emulated, shape, dtype, act, with_out=True)


def check_reduce(emulated, shape, dtype, act, with_out: bool) -> None:
    """An unsure value counts whole or not at all; each step of a sum rounds once, x - mean, the
    product with rstd and g * (x - mean) another time each.
    """
    case = Gradient(shape, dtype, act, with_out)
    sums = emulated.bn_act_reduce(case.grad, case.x, case.norm, case.out, act)
    steps = emulated.plan(shape, dtype, reduction=True).depth * U32
    error = case.error + case.unsure * case.grad.double().abs()
    mean, rstd = (v.double() for v in case.norm[:2])
    xhat = (case.x.double() - mean) * rstd
    expected = exact("bn_act_reduce", *case.args, act)
    assert_within(sums[0], expected[0], (error + steps * case.g.abs()).sum(0))
    terms = (error + (steps + 3.1 * U32) * case.g.abs()) * xhat.abs()
    assert_within(sums[1], expected[1], terms.sum(0))


@every_case
def test_bn_act_backward(emulated, shape, dtype) -> None:
    check_backward(emulated, shape, dtype, "relu", False, of_stats=True, to_residual=False)


@every_act
@few_cases
def test_bn_act_backward_activations(emulated, shape, dtype, act) -> None:
    check_backward(emulated, shape, dtype, act, False, of_stats=True, to_residual=False)


@pytest.mark.parametrize("of_stats", [False, True], ids=["constants", "statistics"])
@pytest.mark.parametrize("act", ["relu", "relu6", None], ids=str)
@few_cases
def test_bn_act_backward_to_residual(emulated, shape, dtype, act, of_stats) -> None:
    check_backward(emulated, shape, dtype, act, True, of_stats, to_residual=True)


@every_act
def test_bn_act_backward_of_constants(emulated, act) -> None:
    check_backward(emulated, (300, 40), torch.bfloat16, act, False, False, to_residual=False)


def check_backward(
    emulated, shape, dtype, act, with_out: bool, of_stats: bool, to_residual: bool
) -> None:
    """Roundings: g - mean_grad, mean - x, rstd * mean_grad_xhat and their fused multiply-add;
    rstd * weight and the product with it.
    """
    case = Gradient(shape, dtype, act, with_out)
    means = (torch.randn(shape[1]), torch.randn(shape[1])) if of_stats else (None, None)
    dx, d_residual = emulated.bn_act_backward(
        case.grad, case.x, case.norm, case.out, means, act, to_residual
    )
    mean, rstd, weight = (v.double() for v in case.norm[:3])
    expected, g = exact("bn_act_backward", *case.args, *means, act, True)
    error = case.error
    if of_stats:
        constant, xhat_mean = (v.double() for v in means)
        sloped = (case.x.double() - mean) * rstd * xhat_mean
        whole = case.g - constant
        error = error + (whole.abs() + 2.1 * sloped.abs() + (whole - sloped).abs()) * 1.01 * U32
    error = (rstd * weight).abs() * error + 2.01 * U32 * expected.abs()
    assert case.unsure.sum() <= 1e-3 * case.unsure.numel()
    known = ~case.unsure
    assert_within(dx[known], expected[known], stored(expected, error, dtype)[known])
    assert (d_residual is not None) == to_residual
    if to_residual:
        assert_within(d_residual[known], g[known], stored(g, case.error, dtype)[known])


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_gradient_is_on_the_side_of_the_output(emulated, act) -> None:
    """Values that cancel but for the rounding of their product: their sign is an accident, and all
    kernels must have the same one.
    """
    channels = 512
    norm = make_norm(channels)
    x0 = torch.randn(channels)
    mean, rstd, weight, _ = norm
    norm[3] = -((x0 - mean) * (rstd * weight))
    x = x0.repeat(3, 1)
    y = emulated.bn_act(x, norm, None, act)
    grad = torch.ones_like(x)
    _, g = emulated.bn_act_backward(grad, x, norm, None, (None, None), act, True)
    assert 0.1 < (y > 0).float().mean() < 0.9
    assert y.max() < 1e-5
    assert torch.equal(g, (y > 0).float())
    assert torch.equal(emulated.bn_act_reduce(grad, x, norm, None, act)[0], g.sum(0))


# ---- forms and plans ----


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_both_forms_give_the_same_map(emulated, dtype) -> None:
    """Elements one by one where 16 bytes at a time are possible: only sums may differ."""
    case = Gradient((70, 48), dtype, "relu", with_out=False)
    means = torch.randn(48), torch.randn(48)
    maps, sums = [], []
    for vectors in (True, False):
        maps.append([emulated.bn_act(case.x, case.norm, case.grad, "relu6", vectors)])
        maps[-1] += emulated.bn_act_backward(
            case.grad, case.x, case.norm, None, means, "relu", True, vectors
        )
        sums.append([*emulated.batch_stats(case.x, vectors)])
        sums[-1] += emulated.bn_act_reduce(case.grad, case.x, case.norm, None, "relu", vectors)
    for one, other in zip(*maps, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


# (pixels, channels), dtype
SIZES = {
    "r50 os16 513 batch 16, first layer": ((16 * 257 * 257, 64), torch.bfloat16),
    "r50 os16 513 batch 16, last layer": ((16 * 33 * 33, 2048), torch.bfloat16),
    "one image, last layer": ((33 * 33, 2048), torch.bfloat16),
    "crop of 65 at batch 1": ((17 * 17, 64), torch.float32),
    "72 channels: 9 accesses": ((16 * 65 * 65, 72), torch.float16),
    "odd channels": ((16 * 65 * 65, 1001), torch.float16),
    "more than 2^31 values": ((2**24, 2048), torch.bfloat16),
}


@pytest.mark.parametrize("reduction", [True, False], ids=["sums", "map"])
@pytest.mark.parametrize(("shape", "dtype"), SIZES.values(), ids=SIZES)
def test_plans(emulated, shape, dtype, reduction) -> None:
    (pixels, channels), plan = shape, emulated.plan(shape, dtype, reduction)
    assert (plan.chunks - 1) * plan.chunk < pixels <= plan.chunks * plan.chunk
    accesses = math.ceil(channels / plan.width)
    assert (plan.groups - 1) * plan.columns < accesses <= plan.groups * plan.columns
    # At least 7 in 8 threads of a block that could be are, and have channels.
    assert 224 <= plan.columns * plan.rows <= 256
    assert accesses >= 7 / 8 * plan.groups * plan.columns
    # A block reads at most 512 bytes of a pixel.
    assert plan.columns * plan.width * dtype.itemsize <= 512
    steps = plan.chunk // plan.rows
    assert steps % 4 == 0 and steps * plan.rows == plan.chunk
    blocks = plan.chunks * plan.groups
    assert blocks <= 2**31 - 1
    if reduction:
        # What the chunks hand on is small beside the map, and in fp32.
        assert blocks <= 1024 + plan.groups
        if steps > 4:
            assert 8 * plan.chunks * channels < 0.1 * pixels * channels * dtype.itemsize
    else:
        assert steps <= 16
    # Enough blocks for a GPU, or threads with as few pixels as they load at once.
    assert blocks >= 500 or steps == 4


# ---- the Python side ----


@pytest.fixture
def as_ops(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private ops, as they are without a GPU."""

    def flat(x):
        if x is None:
            return None
        assert x.is_contiguous(memory_format=torch.channels_last)
        return x.permute(0, 2, 3, 1).flatten(0, 2)

    def whole(y, x):
        n, c, h, w = x.shape
        return y.view(n, h, w, c).permute(0, 3, 1, 2)

    def checked(*vectors):
        assert all(v.dtype == torch.float32 and v.is_contiguous() for v in vectors)
        return vectors

    def act_of(name):
        assert name in ("none", "relu", "relu6", "hardswish")
        return None if name == "none" else name

    def bn_act(x, mean, rstd, weight, bias, residual, act):
        norm = checked(mean, rstd, weight, bias)
        return whole(emulated.bn_act(flat(x), norm, flat(residual), act_of(act)), x)

    def bn_act_reduce(grad, x, mean, rstd, weight, bias, out, act):
        norm = checked(mean, rstd, weight, bias)
        return emulated.bn_act_reduce(flat(grad), flat(x), norm, flat(out), act_of(act))

    def bn_act_backward(grad, x, mean, rstd, weight, bias, out, a, b, act, to_residual):
        norm = checked(mean, rstd, weight, bias)
        found = emulated.bn_act_backward(
            flat(grad), flat(x), norm, flat(out), (a, b), act_of(act), to_residual
        )
        return tuple(x.new_empty(0) if f is None else whole(f, x) for f in found)

    run = {
        "_batch_stats_cuda": lambda x: emulated.batch_stats(flat(x)),
        "_bn_act_cuda": bn_act,
        "_bn_act_reduce_cuda": bn_act_reduce,
        "_bn_act_backward_cuda": bn_act_backward,
    }
    for name, function in run.items():
        monkeypatch.setattr(torch.ops.deeplab_fast, name, function, raising=False)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
def test_arguments_of_the_private_ops(as_ops, layout) -> None:
    """Any layout and any dtype of vectors, both with and without what may be None."""

    def laid_out(x):
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x.repeat(1, 1, 1, 2)[..., ::2] if layout == "strided" else x

    x, grad, residual = (laid_out(torch.randn(2, 12, 5, 3)) for _ in range(3))
    norm = [v.double() for v in make_norm(12)]
    mean, variance = CUDA.batch_stats(x)
    torch.testing.assert_close((mean, variance), reference.batch_stats(x))
    for added, act in ((None, "hardswish"), (residual, "relu"), (residual, None)):
        y = CUDA.bn_act(x, *norm, added, act)
        expected = reference.bn_act(x, *norm, added, act)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        out = None if added is None else y
        sums = CUDA.bn_act_reduce(grad, x, *norm, out, act)
        torch.testing.assert_close(
            tuple(sums), reference.bn_act_reduce(grad, x, *norm, out, act), rtol=1e-5, atol=1e-4
        )
        for means in ((None, None), (norm[0], norm[1])):
            rest = (grad, x, *norm, out, *means, act, added is not None)
            found = CUDA.bn_act_backward(*rest)
            torch.testing.assert_close(
                found, reference.bn_act_backward(*rest), rtol=1e-5, atol=1e-5
            )


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(**facts) -> str:
        given = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0)} | facts
        desc = backends.OpDesc("bn_act", shape=(2, 3, 4, 5), **given)
        return "; ".join(CUDA.reasons(desc))

    built = "was compiled from older sources" if _ext.CUDA.loaded else _ext.CUDA.reason
    if not hasattr(torch.ops.deeplab_fast, "_batch_stats_cuda"):
        assert built in why()
    loaded = _ext.Extension("deeplab_fast._C_cuda", True, "", {})
    monkeypatch.setattr(_ext, "CUDA", loaded)
    monkeypatch.setattr(torch.ops.deeplab_fast, "_batch_stats_cuda", None, raising=False)
    assert why() == ""
    assert why(device="cpu", capability=None) == "needs CUDA tensors, the input is on cpu"
    assert why(capability=(7, 5)) == "needs compute capability 8.0, the device has 7.5"
    assert "float32 only, the input is float64" in why(dtype=torch.float64)
