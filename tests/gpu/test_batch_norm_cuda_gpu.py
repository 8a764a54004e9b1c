"""The CUDA C++ kernels of batch norm in training on a GPU, at real sizes.

The oracle is a batch norm with residual and activation in float64, differentiated by autograd. A
map passes when its largest error is at most twice that of PyTorch's own path in the same dtype on
the same values, plus one rounding of the largest value (four in fp32, where every step of the
computation rounds like the result). Sums, fp32 in both, pass when their error is at most twice
PyTorch's plus 1e-5 of the sum of absolute values. Values whose activation is so close to a kink
that rounding may put them on its other side are left out. Small odd shapes:
tests/aot/test_batch_norm_cuda_on_host.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import _ext, ops, reference
from deeplab_fast.ops._compiled_batch_norm import CUDA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _ext.CUDA.loaded, reason=f"CUDA C++ kernels: {_ext.CUDA.reason}"),
]

DEVICE = "cuda"
EPS = 1e-5
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
every_dtype = pytest.mark.parametrize("dtype", HALF_STEP, ids=str)
every_act = pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", None], ids=str)
KINKS: dict[str | None, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    None: (),
}

SIZES = [
    pytest.param((4, 64, 257, 257), id="first-layer"),
    pytest.param((16, 2048, 33, 33), id="last-layer"),
    pytest.param((1, 2048, 65, 65), id="one-image"),
    pytest.param((2, 72, 129, 65), id="9-accesses-of-16-bit"),
    pytest.param((3, 333, 33, 17), id="odd-channels-one-by-one"),
    pytest.param((16, 256, 1, 1), id="pooled"),
]
every_size = pytest.mark.parametrize("shape", SIZES)


class Case:
    """A training step of batch norm: operands, and what the step gives."""

    def __init__(self, shape, dtype, act="relu", with_residual=False, device=None) -> None:
        device = device or DEVICE
        c = shape[1]
        spread = torch.linspace(0.5, 3, c, device=device)[:, None, None]

        def draw() -> Tensor:
            x = torch.randn(shape, device=device) * spread + spread
            return x.to(dtype).contiguous(memory_format=torch.channels_last)

        self.x, self.grad = draw(), draw()
        self.residual = draw() if with_residual else None
        self.weight = torch.rand(c, device=device) + 0.5
        self.bias = torch.randn(c, device=device) / 2
        self.act = act

    def ours(self) -> dict[str, Tensor]:
        k, x = CUDA, self.x
        mean, variance = k.batch_stats(x)
        norm = (mean, torch.rsqrt(variance + EPS), self.weight, self.bias)
        y = k.bn_act(x, *norm, self.residual, self.act)
        out = None if self.residual is None else y
        sums = k.bn_act_reduce(self.grad, x, *norm, out, self.act)
        count = x.numel() // x.shape[1]
        dx, d_residual = k.bn_act_backward(
            self.grad, x, *norm, out, *(s / count for s in sums), self.act, out is not None
        )
        found = {"mean": mean, "variance": variance, "y": y, "dx": dx}
        found |= {"d_bias": sums[0], "d_weight": sums[1]}
        return found if out is None else found | {"d_residual": d_residual}

    def torch_path(self, exact: bool = False) -> dict[str, Tensor]:
        def operand(t):
            if t is None:
                return None
            return (t.double() if exact else t.clone()).requires_grad_()

        x, residual, weight, bias = map(operand, (self.x, self.residual, self.weight, self.bias))
        v = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
        if residual is not None:
            v = v + residual
        y = reference.ACTIVATIONS[self.act](v)
        y.backward(self.grad.to(y.dtype))
        variance, mean = torch.var_mean(x.detach().to(weight.dtype), (0, 2, 3), correction=0)
        found = {"mean": mean, "variance": variance, "y": y, "dx": x.grad}
        found |= {"d_bias": bias.grad, "d_weight": weight.grad, "before": v}
        return found if residual is None else found | {"d_residual": residual.grad}

    def check(self) -> None:
        got, theirs, exact = self.ours(), self.torch_path(), self.torch_path(exact=True)
        before = exact.pop("before")
        unsure = torch.zeros_like(before, dtype=torch.bool)
        # What has a residual is differentiated at the output, which is rounded to the dtype.
        near = 1e-5 if self.residual is None else 2 * HALF_STEP[self.x.dtype]
        for kink in KINKS[self.act]:
            unsure |= (before - kink).abs() <= near * (1 + before.abs() + abs(kink))
        assert unsure.sum() <= 1e-2 * unsure.numel() + 1
        absolute = self.grad.double().abs()
        xhat = (self.x.double() - exact["mean"][:, None, None]) * torch.rsqrt(
            exact["variance"] + EPS
        )[:, None, None]
        scales = {
            "mean": self.x.double().abs().mean((0, 2, 3)),
            "variance": self.x.double().square().mean((0, 2, 3)),
            "d_bias": absolute.sum((0, 2, 3)),
            "d_weight": (absolute * xhat.abs()).sum((0, 2, 3)),
        }
        doubt = {
            "d_bias": (absolute * unsure).sum((0, 2, 3)),
            "d_weight": (absolute * unsure * xhat.abs()).sum((0, 2, 3)),
        }
        for name, value in exact.items():
            error = (got[name].double() - value).abs()
            torch_error = (theirs[name].double() - value).abs()
            if name in scales:
                allowed = 2 * torch_error + 1e-5 * scales[name] + doubt.get(name, 0.0)
                assert (error <= allowed).all(), name
                continue
            assert got[name].dtype == self.x.dtype
            assert got[name].is_contiguous(memory_format=torch.channels_last)
            sure = torch.ones_like(unsure) if name == "y" else ~unsure
            # The doubtful values move the means that all gradients of a channel share.
            shared = (doubt["d_bias"] + doubt["d_weight"]) / (value.numel() / value.shape[1])
            shared = shared * self.weight * torch.rsqrt(exact["variance"] + EPS) * 4
            roundings = 4 if self.x.dtype == torch.float32 else 1
            rounding = roundings * HALF_STEP[self.x.dtype] * value.abs().max()
            allowed = 2 * torch_error[sure].max() + rounding
            excess = error - allowed - (shared[:, None, None] if name == "dx" else 0.0)
            assert (excess[sure] <= 0).all(), name


@pytest.fixture
def used_memory() -> None:
    """NaN in the memory that PyTorch hands out next: what a kernel does not write shows."""
    blocks = [torch.full((2**28,), float("nan"), device=DEVICE) for _ in range(4)]
    small = [torch.full((n,), float("nan"), device=DEVICE) for n in (64, 2048) for _ in range(64)]
    del blocks, small


@every_dtype
@every_size
def test_step(shape, dtype, used_memory: None) -> None:
    Case(shape, dtype).check()


@every_dtype
@every_size
def test_step_with_residual(shape, dtype, used_memory: None) -> None:
    Case(shape, dtype, with_residual=True).check()


@every_act
@every_dtype
def test_step_of_each_activation(act, dtype, used_memory: None) -> None:
    Case((4, 160, 65, 33), dtype, act).check()
    if act != "hardswish":
        Case((4, 160, 65, 33), dtype, act, with_residual=True).check()


@every_dtype
def test_frozen_statistics(dtype) -> None:
    case = Case((2, 128, 33, 33), dtype)
    c = case.x.shape[1]
    norm = (torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE), case.weight, case.bias)
    rest = (None, None, None, "relu", True)
    found = CUDA.bn_act_backward(case.grad, case.x, *norm, *rest)
    expected = reference.bn_act_backward(case.grad, case.x, *norm, *rest)
    # One rounding of fp32 values that are equal but for two.
    step = HALF_STEP[dtype]
    torch.testing.assert_close(found, expected, rtol=4 * step, atol=4 * step)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("shape", [(4, 64, 129, 129), (3, 33, 65, 65)], ids=["vectors", "odd"])
def test_same_bits_in_every_run(shape) -> None:
    """On a busy and on an idle GPU: a barrier that is missing shows in some of them."""
    case = Case(shape, torch.bfloat16, with_residual=True)
    expected = case.ours()
    for i in range(100):
        if i % 10 == 0:
            torch.cuda.synchronize()
        assert_same(case.ours(), expected)


def test_layouts_change_nothing() -> None:
    case = Case((2, 64, 33, 33), torch.float16, with_residual=True)
    expected = case.ours()
    case.x, case.grad = case.x.contiguous(), case.grad.contiguous()
    assert_same(case.ours(), expected)


def test_odd_addresses() -> None:
    """Maps that do not begin at a multiple of 16 bytes are read one by one, their sums cut
    otherwise.
    """
    case = Case((2, 64, 33, 33), torch.float16)
    x = case.x
    expected = case.ours()
    flat = x.permute(0, 2, 3, 1).flatten()
    case.x = torch.cat([flat[:1], flat])[1:].view(2, 33, 33, 64).permute(0, 3, 1, 2)
    assert case.x.data_ptr() % 16
    assert torch.equal(case.x, x)
    found = case.ours()
    for name in ("mean", "variance", "d_bias", "d_weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-3)


def test_no_pixel() -> None:
    case = Case((0, 24, 5, 7), torch.bfloat16)
    mean, variance = CUDA.batch_stats(case.x)
    assert not mean.any() and not variance.any()
    norm = (mean, torch.ones_like(mean), case.weight, case.bias)
    assert CUDA.bn_act(case.x, *norm, None, "relu").shape == case.x.shape
    for total in CUDA.bn_act_reduce(case.grad, case.x, *norm, None, "relu"):
        assert not total.any()


def test_backends_agree() -> None:
    case = Case((4, 256, 65, 65), torch.bfloat16)
    found = {}
    for backend in ("cuda", "triton"):
        with dlf.use_backend(backend):
            mean, variance = ops.batch_stats(case.x)
            norm = (mean, torch.rsqrt(variance + EPS), case.weight, case.bias)
            found[backend] = (mean, variance, ops.bn_act(case.x, *norm))
    for one, other in zip(*found.values(), strict=True):
        rtol, atol = (1e-5, 1e-5) if one.dtype == torch.float32 else (2.0**-7, 2.0**-8)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_runs_on_the_current_stream() -> None:
    """On a side stream, after work that keeps it busy: a launch elsewhere would read zeros."""
    case = Case((4, 256, 65, 65), torch.bfloat16)
    expected = case.ours()
    x, case.x = case.x, torch.zeros_like(case.x)
    stream = torch.cuda.Stream()
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(8):
            busy = (busy @ busy).clamp(-1, 1)
        case.x.copy_(x)
        got = case.ours()
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current() -> None:
    Case((2, 64, 33, 33), torch.bfloat16, with_residual=True, device="cuda:1").check()
    assert torch.cuda.current_device() == 0


def test_cuda_graph_replays_on_new_inputs() -> None:
    case, other = (Case((4, 256, 65, 65), torch.bfloat16, with_residual=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.ours()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.ours()
    case.x.copy_(other.x)
    graph.replay()
    assert_same(captured, case.ours())


def test_compiles_without_graph_breaks() -> None:
    case = Case((4, 64, 33, 33), torch.bfloat16)

    def step(x: Tensor) -> Tensor:
        mean, variance = ops.batch_stats(x)
        return ops.bn_act(x, mean, torch.rsqrt(variance + EPS), case.weight, case.bias)

    with dlf.use_backend("cuda"):
        compiled = torch.compile(step, fullgraph=True)(case.x)
        torch.testing.assert_close(compiled, step(case.x), rtol=2.0**-7, atol=2.0**-8)


def test_maps_beyond_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(DEVICE).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(65, 64, 721, 721, dtype=torch.bfloat16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    last = torch.randn(64, 721, 721, device=DEVICE).bfloat16()
    x[-1] = last
    mean, variance = CUDA.batch_stats(x)
    exact = torch.var_mean(last.double(), (1, 2), correction=0)
    # 64 images of zeros and the last.
    expected_mean = exact[1] / 65
    expected = (exact[0] + exact[1].square()) / 65 - expected_mean.square()
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-4, atol=0)
    norm = (mean, torch.rsqrt(variance + EPS), torch.ones_like(mean), torch.ones_like(mean))
    y = CUDA.bn_act(x, *norm, None, "relu")
    alone = CUDA.bn_act(last[None], *norm, None, "relu")
    assert torch.equal(y[-1], alone[0])
    del y
    sums = CUDA.bn_act_reduce(x, x, *norm, None, None)
    torch.testing.assert_close(
        sums[0].double(), last.double().sum((1, 2)), rtol=1e-4, atol=1e-5 * last.numel() / 64
    )
    dx, _ = CUDA.bn_act_backward(
        x, x, *norm, None, *(s / (65 * 721**2) for s in sums), "relu", False
    )
    assert bool((dx[0, :, 0, 0] == dx[1, :, 5, 5]).all()) and bool(dx[-1].any())
