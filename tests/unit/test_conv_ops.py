"""The convolution ops against their definition, in every way they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from deeplab_fast import ops, reference

OPS = torch.ops.deeplab_fast


@dataclass
class Branches:
    """Arguments of aspp_branches: a 1x1 branch and 3x3 branches, random."""

    x: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    dilations: list[int]

    @classmethod
    def make(cls, n=2, c=3, h=5, w=7, k=4, rates=(1, 2, 6), dtype=torch.float64):
        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        weights = [torch.randn(k, c, 1, 1), *(torch.randn(k, c, 3, 3) for _ in rates)]
        return cls(
            torch.randn(n, c, h, w).to(dtype),
            [v.to(dtype) for v in weights],
            [torch.randn(k).to(vectors) for _ in weights],
            [torch.randn(k).to(vectors) for _ in weights],
            [1, *rates],
        )

    def args(self) -> tuple:
        return self.x, self.weights, self.scales, self.shifts, self.dilations

    def expected(self) -> Tensor:
        """Conv, scale and shift, ReLU, concat, written with PyTorch's modules in float64."""
        outputs = []
        for w, a, b, d in zip(*self.args()[1:], strict=True):
            conv = torch.nn.Conv2d(
                w.shape[1],
                w.shape[0],
                w.shape[2],
                padding=d * (w.shape[2] // 2),
                dilation=d,
                bias=False,
            ).double()
            conv.weight.data = w.double()
            y = conv(self.x.double())
            outputs.append(torch.relu(y * a.double()[:, None, None] + b.double()[:, None, None]))
        return torch.cat(outputs, 1).detach()


def project_args(n=2, b=6, p=3, k=4, h=5, w=7, dtype=torch.float64) -> tuple[Tensor, ...]:
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(n, b, h, w).to(dtype),
        torch.randn(n, p).to(dtype),
        torch.randn(k, b + p, 1, 1).to(dtype),
        torch.randn(k).to(vectors),
        torch.randn(k).to(vectors),
    )


def conv_args(n=2, c=4, k=6, h=6, w=5, groups=1, kernel=3, dtype=torch.float64) -> tuple:
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(n, c, h, w).to(dtype),
        torch.randn(k, c // groups, kernel, kernel).to(dtype),
        torch.randn(k).to(vectors),
        torch.randn(k).to(vectors),
    )


@pytest.mark.parametrize(
    "case",
    [
        {"h": 1, "w": 1},  # every off-centre tap is padding
        {"h": 3, "w": 4, "rates": (36,)},  # dilation larger than the map
        {"n": 0},  # an empty batch
        {"n": 1, "c": 1, "k": 1},  # single channels
        {"h": 9, "w": 2},  # not square
        {"rates": ()},  # the 1x1 branch alone
        {"c": 17, "k": 13},  # no multiple of any block
    ],
    ids=str,
)
def test_aspp_branches_equals_its_definition(case: dict) -> None:
    b = Branches.make(**case)
    y = ops.aspp_branches(*b.args())
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, b.expected(), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    k=st.integers(1, 5),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    rates=st.lists(st.integers(1, 14), max_size=3),
)
def test_aspp_branches_of_any_shape(n, c, k, h, w, rates) -> None:
    b = Branches.make(n, c, h, w, k, rates)
    torch.testing.assert_close(ops.aspp_branches(*b.args()), b.expected(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_layout_of_the_input_changes_nothing(layout: str) -> None:
    b = Branches.make()
    expected = ops.aspp_branches(*b.args())
    if layout == "channels_last":
        b.x = b.x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        b.x = torch.stack([b.x, b.x], -1)[..., 0]
    else:
        b.x = b.x[:1].expand(2, -1, -1, -1)
        expected = expected[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(ops.aspp_branches(*b.args()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)], ids=["pixel", "map"])
def test_aspp_project_is_the_projection_of_the_concat(size: tuple[int, int]) -> None:
    branches, pooled, weight, scale, shift = args = project_args(h=size[0], w=size[1])
    spread = F.interpolate(pooled[:, :, None, None], size=size, mode="bilinear")
    y = F.conv2d(torch.cat([branches, spread], 1), weight)
    expected = torch.relu(y * scale[:, None, None] + shift[:, None, None])
    y = ops.aspp_project(*args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": 4, "dilation": 4},  # kernel larger than the map
        {"groups": 2, "padding": 1},
        {"act": None, "padding": 1},
        {"padding": 1, "residual": True},
        {"padding": 1, "residual": True, "act": None, "stride": 2},
    ],
    ids=str,
)
def test_conv_bn_act_equals_its_definition(options: dict) -> None:
    options = dict(options)
    groups = options.get("groups", 1)
    args = conv_args(groups=groups)
    geometry = {k: v for k, v in options.items() if k not in ("act", "residual")}
    expected = F.conv2d(*args[:2], **geometry)
    expected = expected * args[2][:, None, None] + args[3][:, None, None]
    if options.pop("residual", False):
        options["residual"] = torch.randn_like(expected)
        expected = expected + options["residual"]
    if options.get("act", "relu"):
        expected = expected.relu()
    torch.testing.assert_close(ops.conv_bn_act(*args, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Accumulated in fp32: the stored value is within one rounding of the float64 result."""
    b = Branches.make(dtype=dtype, c=64)
    y = ops.aspp_branches(*b.args())
    assert y.dtype == dtype
    # Half a unit in the last place for the store; 64 * 9 products summed in fp32 add 576 * 2^-24
    # of the sum of magnitudes, which is below 400 here.
    expected = b.expected()
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 576 * 2**-24 * 400
    assert ((y.double() - expected).abs() <= bound).all()


class TestGradients:
    def leaves(self, tensors) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in tensors]

    def test_aspp_branches(self) -> None:
        b = Branches.make(n=1, c=2, k=2, h=3, w=4, rates=(1, 2))
        leaves = self.leaves([b.x, *b.weights, *b.scales, *b.shifts])

        def call(x, *t):
            return ops.aspp_branches(x, t[:3], t[3:6], t[6:], b.dilations)

        assert torch.autograd.gradcheck(call, leaves)

    def test_aspp_project(self) -> None:
        leaves = self.leaves(project_args(h=2, w=3))
        assert torch.autograd.gradcheck(ops.aspp_project, leaves)

    @pytest.mark.parametrize("act", ["relu", None])
    def test_conv_bn_act(self, act: str | None) -> None:
        args = conv_args(n=1, groups=2)
        residual = torch.randn(1, 6, 3, 3, dtype=torch.float64)

        def call(x, w, a, b, r):
            return ops.conv_bn_act(x, w, a, b, stride=2, padding=1, groups=2, residual=r, act=act)

        assert torch.autograd.gradcheck(call, self.leaves([*args, residual]))

    def test_dtypes_of_gradients_are_those_of_the_inputs(self) -> None:
        args = self.leaves(project_args(dtype=torch.bfloat16))
        ops.aspp_project(*args).float().sum().backward()
        assert [a.grad.dtype for a in args] == [a.dtype for a in args]

    @pytest.mark.parametrize("reduce", [Tensor.sum, lambda y: y.square().sum()], ids=["sum", "sq"])
    def test_second_derivative_is_refused(self, reduce: Callable[[Tensor], Tensor]) -> None:
        args = self.leaves(conv_args())
        (grad,) = torch.autograd.grad(reduce(ops.conv_bn_act(*args)), args[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="have no second derivative; for one, use PyTorch's"):
            grad.sum().backward()


def _calls() -> dict[str, tuple[Callable, tuple]]:
    b = Branches.make(dtype=torch.float32)
    return {
        "aspp_branches": (ops.aspp_branches, b.args()),
        "aspp_project": (ops.aspp_project, project_args(dtype=torch.float32)),
        "conv_bn_act": (ops.conv_bn_act, conv_args(dtype=torch.float32)),
    }


@pytest.mark.parametrize("name", ["aspp_branches", "aspp_project", "conv_bn_act"])
class TestTransformations:
    def test_opcheck(self, name: str) -> None:
        _, args = _calls()[name]
        if name == "conv_bn_act":
            args = (*args, None, 1, 1, 1, 1, "relu")
        torch.library.opcheck(getattr(OPS, name).default, args)

    def test_compile_fullgraph_forward_and_backward(self, name: str) -> None:
        torch.compiler.reset()
        op, args = _calls()[name]
        x = args[0].requires_grad_()
        expected = op(*args)
        (grad,) = torch.autograd.grad(expected.square().sum(), x)

        def call(x):
            return op(x, *args[1:])

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], grad)

    def test_export(self, name: str) -> None:
        op, args = _calls()[name]

        class Call(torch.nn.Module):
            def forward(self, *args):
                return op(*args)

        program = torch.export.export(Call(), args)
        torch.testing.assert_close(program.module()(*args), op(*args))
        assert any(f"deeplab_fast.{name}" in str(node.target) for node in program.graph.nodes)

    def test_autocast_casts_the_data_and_not_the_norm(self, name: str) -> None:
        op, args = _calls()[name]
        with torch.autocast("cpu", torch.bfloat16):
            y = op(*args)
        assert y.dtype == torch.bfloat16

        def cast(a):
            if isinstance(a, Tensor):
                return a.bfloat16() if a.dim() != 1 else a
            return [cast(v) for v in a] if a and isinstance(a[0], Tensor) else a

        torch.testing.assert_close(y, op(*map(cast, args)), rtol=0, atol=0)

    def test_deterministic_mode_is_allowed(self, name: str) -> None:
        op, args = _calls()[name]
        torch.use_deterministic_algorithms(True)
        try:
            args[0].requires_grad_()
            op(*args).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_outputs_are_written_whole(self, name: str, nan_poison: None) -> None:
        op, args = _calls()[name]
        assert op(*args).isfinite().all()


def _branches_with(**changes) -> Callable[[], Tensor]:
    def call() -> Tensor:
        b = Branches.make()
        for key, value in changes.items():
            setattr(b, key, value(getattr(b, key)))
        return ops.aspp_branches(*b.args())

    return call


def _no_branches() -> Tensor:
    return ops.aspp_branches(torch.randn(1, 1, 1, 1), [], [], [], [])


def _pooled_of_another_batch() -> Tensor:
    branches, _, *rest = project_args()
    return ops.aspp_project(branches, torch.randn(3, 3), *rest)


def _pooled_of_another_width() -> Tensor:
    branches, _, *rest = project_args()
    return ops.aspp_project(branches, torch.randn(2, 4).double(), *rest)


def _conv_with(**options) -> Callable[[], Tensor]:
    return lambda: ops.conv_bn_act(*conv_args(), **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (_branches_with(x=lambda x: x[0]), ValueError, r"x must be a tensor \[N, C, H, W\]"),
        (_branches_with(x=lambda x: x.long()), TypeError, "x has dtype int64; allowed: float16"),
        (_branches_with(x=lambda x: x[:, :, :0]), ValueError, "no channels, rows or columns"),
        (_branches_with(x=lambda x: x[:, :2]), ValueError, r"expected \[K, 2, 1, 1\]"),
        (_branches_with(x=lambda x: x.float()), TypeError, r"weights\[0\] has dtype float64"),
        (_branches_with(x=lambda x: x.to("meta")), ValueError, r"weights\[0\] is on cpu"),
        (_branches_with(dilations=lambda d: d[1:]), ValueError, r"got \[4, 4, 4, 3\]"),
        (_branches_with(dilations=lambda d: [0, *d[1:]]), ValueError, r"dilations\[0\] must be"),
        (_branches_with(scales=lambda s: [v[1:] for v in s]), ValueError, r"scales\[0\] has"),
        (_no_branches, ValueError, r"at least one branch, got \[0, 0, 0, 0\]"),
        (_pooled_of_another_batch, ValueError, r"expected \[2, P\], a vector for each image"),
        (_pooled_of_another_width, ValueError, r"expected \[4, 10, 1, 1\]"),
        (_conv_with(stride=0), ValueError, "stride=0"),
        (_conv_with(groups=3), ValueError, "groups=3 does not fit"),
        (_conv_with(act="gelu"), ValueError, "act must be 'relu' or None, got 'gelu'"),
        (_conv_with(dilation=4), ValueError, "smaller than the dilated kernel"),
        (_conv_with(residual=torch.randn(1).double()), ValueError, r"expected \[2, 6, 4, 3\]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Tensor], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_reference_is_its_own_oracle_in_float64() -> None:
    """float64 in, float64 out: no step of the specification rounds to fp32."""
    b = Branches.make()
    b.x = b.x + 1e-12
    y = reference.aspp_branches(*b.args())
    assert y.dtype == torch.float64
    assert not torch.equal(y, y.float().double())
