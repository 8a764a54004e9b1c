"""The convolution ops against their definition, in every way they are called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import backends, ops, reference
from deeplab_fast.dispatch.errors import DIRECT
from deeplab_fast.ops import _cudnn

OPS = torch.ops.deeplab_fast
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


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


def class_args(classes=5, k=4, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(classes, k, 1, 1).to(dtype), torch.randn(classes).to(vectors)


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


@pytest.mark.parametrize("rank", [2, 4], ids=["matrix", "1x1 kernel"])
def test_aspp_project_and_classify_equals_its_definition(rank: int) -> None:
    args = project_args()
    weight, bias = class_args()
    given = weight if rank == 4 else weight[:, :, 0, 0]
    logits = ops.aspp_project(*args, classifier=(given, bias))
    assert logits.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(ops.aspp_project(*args), weight, bias)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    nothing = (args[0][:0], args[1][:0], *args[2:])
    assert ops.aspp_project(*nothing, classifier=(given, bias)).shape == (0, 5, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_classified_features_are_rounded_as_if_stored(dtype: torch.dtype) -> None:
    args, classifier = project_args(dtype=dtype), class_args(dtype=dtype)
    with dlf.use_backend("reference"):
        y, logits = ops.aspp_project(*args), ops.aspp_project(*args, classifier=classifier)
    assert y.dtype == logits.dtype == dtype
    exact = F.conv2d(y.double(), *(t.double() for t in classifier))
    # One rounding where the logits are stored, and four products summed in fp32, whose magnitudes
    # add up to less than 200 here.
    bound = HALF_STEP[dtype] * exact.abs() + 5 * 2**-24 * 200
    assert ((logits.double() - exact).abs() <= bound).all()


def test_cpu_implementation_of_the_classifier(compiled: None) -> None:
    args, classifier = project_args(dtype=torch.float32), class_args(dtype=torch.float32)
    logits = ops.aspp_project(*args, classifier=classifier)
    with dlf.use_backend("reference"):
        doubles = [t.double() for t in (*args, *classifier)]
        expected = ops.aspp_project(*doubles[:5], classifier=tuple(doubles[5:]))
    error = (logits.double() - expected).norm() / expected.norm()
    assert error <= DIRECT


class _Kernels:
    """Stands for deeplab_fast.kernels: what the Triton backend of aspp_project calls."""

    def __init__(self, holds: bool) -> None:
        self.holds, self.calls = holds, []

    def __call__(self, module: str, name: str) -> Callable[..., Tensor]:
        def run(*args) -> Tensor:
            self.calls.append(name)
            if name == "conv_bn_act":
                return reference.conv_bn_act(*args)
            y = reference.aspp_project(*args[:5])
            if len(args) == 5:
                return y
            if not self.holds:
                raise ValueError("no tile holds so many filters and their classes")
            weight, bias = args[5]
            return reference.conv_bn_act(y, weight, torch.ones_like(bias), bias, act=None)

        return run


@pytest.mark.parametrize(
    ("classified", "holds", "calls"),
    [
        pytest.param(False, True, ["aspp_project"], id="features"),
        pytest.param(True, True, ["aspp_project"], id="logits from one kernel"),
        pytest.param(
            True, False, ["aspp_project", "aspp_project", "conv_bn_act"], id="no tile holds them"
        ),
    ],
)
def test_triton_classifies_in_one_kernel_where_a_tile_holds_it(
    classified, holds, calls, monkeypatch
) -> None:
    # The package has a function of the module's name.
    module = sys.modules["deeplab_fast.ops.aspp_project"]
    kernels = _Kernels(holds)
    project, classify = kernels("aspp", "aspp_project"), kernels("conv", "conv_bn_act")
    table = backends.implementations("conv_bn_act")
    monkeypatch.setitem(table, "triton", replace(table["triton"], run=classify))
    monkeypatch.setattr(module, "_triton_project", project)
    monkeypatch.setattr(module, "_triton_in_two", module._then_classify("triton", project))
    args = (*project_args(), *(class_args() if classified else (None, None)))
    got = backends.implementations("aspp_project")["triton"].run(*args)
    assert kernels.calls == calls
    expected = backends.implementations("aspp_project")["reference"].run(*args)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_classes_are_a_fact_of_the_call() -> None:
    args, classifier = project_args(), class_args()
    assert "classes" not in ops.describe("aspp_project", *args).params
    found = ops.describe("aspp_project", *args, classifier=classifier)
    assert found.params["classes"] == 5 and found.params["outputs"] == 4


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

    def test_aspp_project_and_classify(self) -> None:
        leaves = self.leaves([*project_args(h=2, w=3), *class_args()])

        def call(*t):
            return ops.aspp_project(*t[:5], classifier=(t[5][:, :, 0, 0], t[6]))

        assert torch.autograd.gradcheck(call, leaves)
        with torch.no_grad():
            without = call(*leaves)
        torch.testing.assert_close(call(*leaves), without, rtol=1e-12, atol=1e-12)

    def test_the_classifier_alone_gets_a_gradient(self) -> None:
        weight, bias = self.leaves(class_args())
        ops.aspp_project(*project_args(), classifier=(weight, bias)).sum().backward()
        assert bias.grad.tolist() == [2 * 5 * 7] * 5 and weight.grad.shape == weight.shape

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

    @pytest.mark.parametrize("act", ["relu", None])
    @pytest.mark.parametrize("with_residual", [True, False])
    def test_second_derivatives_of_conv_bn_act(self, act, with_residual: bool) -> None:
        x, w, a, b = self.leaves(conv_args(n=1, c=2, k=2, h=3, w=3, dtype=torch.float64))
        y = ops.conv_bn_act(x, w, a, b, padding=1, act=act)
        residual = self.leaves([torch.randn_like(y)]) if with_residual else []

        def call(x, w, a, b, *r):
            r = r[0] if r else None
            return ops.conv_bn_act(x, w, a, b, padding=1, residual=r, act=act)

        assert torch.autograd.gradgradcheck(call, [x, w, a, b, *residual])

    def test_second_derivatives_of_the_others(self) -> None:
        branches = self.leaves(project_args(n=1, b=2, p=2, k=2, h=2, w=3, dtype=torch.float64))
        assert torch.autograd.gradgradcheck(ops.aspp_project, branches)
        x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
        weights = [torch.randn(2, 2, k, k, dtype=torch.float64) for k in (1, 3)]
        vectors = [torch.randn(2, dtype=torch.float64) for _ in range(4)]

        def aspp(x, *t):
            return ops.aspp_branches(x, t[:2], t[2:4], t[4:], (1, 2))

        def convs(x, *weights):
            return ops.aspp_convs(x, weights, (1, 2), stats=True)[0]

        assert torch.autograd.gradgradcheck(aspp, self.leaves([x, *weights, *vectors]))
        assert torch.autograd.gradgradcheck(convs, self.leaves([x, *weights]))
        conv = lambda x, w: ops.conv2d(x, w, stride=2, padding=1)  # noqa: E731
        assert torch.autograd.gradgradcheck(conv, self.leaves([x, weights[1]]))

    def test_one_tensor_given_twice_has_both_parts(self) -> None:
        """As block input and residual: each part would otherwise be the sum of both."""
        x = torch.randn(1, 2, 2, 3, dtype=torch.float64)
        w = torch.randn(2, 2, 1, 1, dtype=torch.float64)
        ones = torch.ones(2, dtype=torch.float64)

        def call(x, w):
            return ops.conv_bn_act(x, w, ones, ones, residual=x)

        assert torch.autograd.gradgradcheck(call, self.leaves([x, w]))


def _project_and_classify(*args: Tensor) -> Tensor:
    return ops.aspp_project(*args[:5], classifier=args[5:])


def _calls() -> dict[str, tuple[Callable, tuple]]:
    b = Branches.make(dtype=torch.float32)
    project = project_args(dtype=torch.float32)
    return {
        "aspp_branches": (ops.aspp_branches, b.args()),
        "aspp_project": (ops.aspp_project, project),
        "classify": (_project_and_classify, (*project, *class_args(dtype=torch.float32))),
        "conv_bn_act": (ops.conv_bn_act, conv_args(dtype=torch.float32)),
    }


@pytest.mark.parametrize("name", ["aspp_branches", "aspp_project", "classify", "conv_bn_act"])
class TestTransformations:
    def test_opcheck(self, name: str) -> None:
        _, args = _calls()[name]
        if name == "conv_bn_act":
            args = (*args, None, 1, 1, 1, 1, "relu")
        name = "aspp_project" if name == "classify" else name
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
        name = "aspp_project" if name == "classify" else name
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


def _classified_by(weight=None, bias=None, given=None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        made = [b if a is None else a for a, b in zip((weight, bias), class_args(), strict=True)]
        return ops.aspp_project(*project_args(), classifier=given or tuple(made))

    return call


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
        (_classified_by(given=[torch.ones(1)]), ValueError, r"must be \(weight, bias\), two tens"),
        (_classified_by(given=(None, None)), ValueError, r"must be \(weight, bias\), two tensors"),
        (_classified_by(torch.ones(5)), ValueError, r"weight has shape \[5\], expected \[5, 4, 1"),
        (_classified_by(torch.ones(5, 3)), ValueError, r"expected \[5, 4, 1, 1\] \(classes by"),
        (_classified_by(torch.ones(0, 4)), ValueError, "with at least one class"),
        (_classified_by(torch.tensor(1.0)), ValueError, "with at least one class"),
        (_classified_by(torch.ones(5, 4)), TypeError, "weight has dtype float32; allowed: float64"),
        (_classified_by(bias=torch.ones(4)), ValueError, r"bias has shape \[4\], expected \[5\]"),
        (_classified_by(bias=torch.ones(5).int()), TypeError, "bias has dtype int32"),
        (_classified_by(bias=torch.ones(5, device="meta")), ValueError, "bias is on meta"),
        (_conv_with(stride=0), ValueError, "stride must be an int from 1 to 2147483647, got 0"),
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


# conv_bn_act by cuDNN: everything but cuDNN itself


def conv_desc(**changes) -> backends.OpDesc:
    args = conv_args(n=1, c=64, k=64, h=65, w=65, dtype=torch.bfloat16)
    desc = ops.describe("conv_bn_act", *(t.to("meta") for t in args), padding=1)
    return replace(desc, **{"device": "cuda", "capability": (9, 0)} | changes)


@pytest.fixture
def has_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [], id="runs"),
        pytest.param({"dtype": torch.float32}, [], id="float32"),
        pytest.param({"dtype": torch.float16, "capability": (7, 5)}, [], id="float16 before 8.0"),
        pytest.param({"device": "meta", "capability": None}, ["is on meta"], id="meta"),
        pytest.param({"device": "cpu", "capability": None}, ["is on cpu"], id="cpu"),
        pytest.param({"dtype": torch.float64}, ["the input is float64"], id="float64"),
        pytest.param({"capability": (7, 5)}, ["bfloat16 needs compute capability 8.0"], id="7.5"),
    ],
)
def test_reasons_against_cudnn(changes, expected, has_cudnn) -> None:
    reasons = backends.implementations("conv_bn_act")["cuda"].not_supported_reasons
    found = reasons(conv_desc(**changes))
    assert len(found) == len(expected)
    assert all(part in reason for part, reason in zip(expected, found, strict=True))


def test_without_cudnn_the_reason_says_so(monkeypatch, has_cudnn) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert _cudnn.reasons(conv_desc()) == [f"PyTorch {torch.__version__} has no cuDNN"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with torch.backends.cudnn.flags(enabled=False):
        assert "torch.backends.cudnn.enabled" in _cudnn.reasons(conv_desc())[0]
    # As ROCm has it, whose MIOpen answers to cuDNN's name.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "has no cuDNN" in _cudnn.reasons(conv_desc())[0]


def test_cudnn_is_chosen_on_a_gpu_and_the_reference_stays_the_oracle(has_cudnn) -> None:
    assert backends.select(conv_desc()).backend == "cuda"
    assert backends.select(conv_desc(dtype=torch.float64)).backend == "reference"
    with dlf.use_backend("reference"):
        chosen = backends.select(conv_desc())
    assert chosen.run is reference.conv_bn_act
    with dlf.use_backend("cuda"), pytest.raises(backends.BackendUnavailable, match="is on cpu"):
        ops.conv_bn_act(*conv_args(dtype=torch.float32))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("place", ["x", "grad"])
@pytest.mark.parametrize("op", ["conv_bn_act", "aspp_branches", "aspp_project"])
def test_gradients_of_nan_are_pytorchs(op, place, backend) -> None:
    """ReLU lets the gradient through where it saw nan, and none of nan where it gave 0."""
    x, pooled = torch.randn(2, 4, 5, 6), torch.randn(2, 3)
    weight = torch.randn(5, 7 if op == "aspp_project" else 4, 1, 1)
    scale, shift = torch.rand(5) + 0.5, torch.randn(5)
    tensors = [x, weight, scale, shift, *([pooled] if op == "aspp_project" else [])]
    leaves = [t.requires_grad_() for t in tensors]
    if place == "x":
        x.data[0, 1, 2, 3] = float("nan")
    full = x
    if op == "aspp_project":
        full = torch.cat([x, pooled[:, :, None, None].expand(-1, -1, 5, 6)], 1)
    expected = torch.relu(F.conv2d(full, weight) * scale[:, None, None] + shift[:, None, None])
    grad = torch.randn_like(expected)
    if place == "grad":
        grad[0, :, 1, 1] = float("nan")
    with dlf.use_backend(backend):
        if op == "conv_bn_act":
            y = ops.conv_bn_act(x, weight, scale, shift)
        elif op == "aspp_branches":
            y = ops.aspp_branches(x, [weight], [scale], [shift], [1])
        else:
            y = ops.aspp_project(x, pooled, weight, scale, shift)
    assert torch.equal(y.isnan(), expected.isnan())
    found = torch.autograd.grad(y, leaves, grad)
    for got, want in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        # Sums of at most 60 products, each of the size of 1 and rounded by 6e-8 of it, twice.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


class _CuDnn:
    """Stands for cuDNN's fused kernels: checks what they are given, sums in fp32, rounds once."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception | None = None,
        keeps_nan: bool = True,
    ) -> None:
        self.calls: list[str] = []
        self.error = error
        self.keeps_nan = keeps_nan
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.add_relu)
        monkeypatch.setattr(_cudnn, "_has_kernel", {})

    def relu(self, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        return self._run("relu", x, weight, None, bias, stride, padding, dilation, groups)

    def add_relu(self, x, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
        assert alpha == 1.0
        return self._run("add_relu", x, weight, z, bias, stride, padding, dilation, groups)

    def _run(self, name, x, weight, z, bias, *geometry) -> Tensor:
        # The first call of a shape tries a bias of nan.
        self.calls.append("nan" if bias.isnan().all() else name)
        if self.error is not None:
            raise self.error
        given = [t for t in (x, weight, z) if t is not None]
        assert {t.dtype for t in (*given, bias)} == {x.dtype}
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in given)
        assert all(len(size) == 2 for size in geometry[:3]) and geometry[3] == 1
        y = F.conv2d(x.float(), weight.float(), bias.float(), *geometry)
        y = y if z is None else y + z.float()
        return (torch.relu(y) if self.keeps_nan else torch.where(y > 0, y, 0.0)).to(x.dtype)


def by_cudnn(args: tuple, residual: Tensor | None = None, act: str | None = "relu", **options):
    """Its implementation of the op on CPU tensors."""
    geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    return _cudnn.conv_bn_act(*args, *geometry.values(), residual, act)


def torch_path(x, weight, scale, shift, residual=None, act="relu", **options) -> Tensor:
    """Convolution, batch norm's scale and shift, sum and ReLU as PyTorch has them, one by one."""
    y = F.conv2d(x, weight, **options)
    y = y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]
    y = y if residual is None else y + residual
    return torch.relu(y) if act else y


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
@pytest.mark.parametrize(
    ("options", "residual", "act", "calls"),
    [
        pytest.param({"padding": 1}, False, "relu", ["relu"], id="3x3"),
        pytest.param({"padding": 1}, True, "relu", ["add_relu"], id="3x3 and residual"),
        pytest.param({"padding": 4, "dilation": 4}, False, "relu", ["relu"], id="dilated"),
        pytest.param({"stride": 2, "padding": 1}, True, "relu", ["add_relu"], id="strided"),
        pytest.param({"padding": 1, "groups": 4}, True, "relu", [], id="groups"),
        pytest.param({"padding": 1}, False, None, [], id="no activation"),
        pytest.param({"padding": 1}, True, None, [], id="no activation, residual"),
    ],
)
def test_error_of_the_cudnn_path(options, residual, act, calls, dtype, monkeypatch) -> None:
    """At most twice the error of PyTorch's own layers in the dtype, and one rounding."""
    cudnn = _CuDnn(monkeypatch)
    groups = options.get("groups", 1)
    args = conv_args(n=2, c=64, k=48, h=17, w=13, groups=groups, dtype=dtype)
    # As behind a ReLU and as weights are initialised: results of the size of their inputs.
    x, weight, scale, shift = args[0].relu(), args[1] * (64 * 9 / groups) ** -0.5, *args[2:]
    args = (x, weight, scale, shift)
    z = torch.randn_like(F.conv2d(x, weight, **options)) if residual else None
    got = by_cudnn(args, z, act, **options)
    assert cudnn.calls == (["nan", *calls] if calls else [])
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    doubles = [None if t is None else t.double() for t in (*args, z)]
    exact = torch_path(*doubles, act=act, **options)
    allowed = 2 * (torch_path(*args, z, act, **options).double() - exact).abs().max()
    allowed += exact.abs().max() * HALF_STEP[dtype]
    assert (got.double() - exact).abs().max() <= allowed


def test_folded_weights_are_rounded_once() -> None:
    weight, scale = torch.randn(6, 4, 3, 3).bfloat16(), torch.randn(6)
    folded = _cudnn.fold(weight, scale)
    assert torch.equal(folded, (weight.float() * scale[:, None, None, None]).bfloat16())
    assert folded.is_contiguous(memory_format=torch.channels_last)
    # Nothing of the caller's is written.
    assert not torch.equal(folded, weight)


def test_what_cudnn_has_no_kernel_for_is_composed_and_not_tried_again(monkeypatch, caplog) -> None:
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    cudnn = _CuDnn(monkeypatch, error)
    args = conv_args(dtype=torch.float32)
    with caplog.at_level(logging.INFO, "deeplab_fast"):
        first, again = by_cudnn(args, padding=1), by_cudnn(args, padding=1)
    assert cudnn.calls == ["nan"] and len(caplog.records) == 1
    assert torch.equal(first, again)
    torch.testing.assert_close(first, reference.conv_bn_act(*args, padding=1))
    # Another geometry is another kernel.
    by_cudnn(args, padding=2)
    assert cudnn.calls == ["nan"] * 2


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
def test_a_kernel_of_cudnn_that_hides_nan_is_not_used(residual, monkeypatch, caplog) -> None:
    cudnn = _CuDnn(monkeypatch, keeps_nan=False)
    args = conv_args(dtype=torch.float32)
    args[0][0, 1, 1, 1] = float("nan")
    z = torch.randn_like(F.conv2d(*args[:2])) if residual else None
    expected = reference.conv_bn_act(*args, residual=z)
    assert expected.isnan().any() and not expected.isnan().all()
    with caplog.at_level(logging.INFO, "deeplab_fast"):
        for _ in range(2):
            torch.testing.assert_close(by_cudnn(args, z), expected, equal_nan=True)
    assert cudnn.calls == ["nan"] and "keeps NaN" in caplog.text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("misaligned address"), torch.OutOfMemoryError("unable to find an engine")],
)
def test_other_errors_of_cudnn_are_not_hidden(error: Exception, monkeypatch) -> None:
    _CuDnn(monkeypatch, error)
    with pytest.raises(type(error)):
        by_cudnn(conv_args(dtype=torch.float32))


def test_deterministic_calls_do_not_use_the_fused_kernels(monkeypatch) -> None:
    cudnn = _CuDnn(monkeypatch)
    args = conv_args(dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        by_cudnn(args)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        by_cudnn(args)
    assert cudnn.calls == []
    by_cudnn(args)
    assert cudnn.calls == ["nan", "relu"]


def test_the_cudnn_path_of_an_empty_batch_and_of_nchw(monkeypatch, nan_poison: None) -> None:
    _CuDnn(monkeypatch)
    x, *rest = conv_args(dtype=torch.float32)
    assert by_cudnn((x[:0], *rest)).shape == (0, 6, 4, 3)
    nhwc = by_cudnn((x.contiguous(memory_format=torch.channels_last), *rest))
    assert torch.equal(by_cudnn((x, *rest)), nhwc) and nhwc.isfinite().all()


def test_calls_of_cudnn_fit_pytorchs_schemas() -> None:
    """What the stand-in above takes is what PyTorch's functions take."""
    for name in ("relu", "add_relu"):
        schema = getattr(torch.ops.aten, f"cudnn_convolution_{name}").default._schema
        stand_in = getattr(_CuDnn, name).__code__
        names = stand_in.co_varnames[1 : stand_in.co_argcount]
        expected = ["x" if a.name == "self" else a.name for a in schema.arguments]
        assert list(names) == expected
