"""The Triton kernels of the ASPP and of 1x1 convolutions, in Triton's interpreter.

The oracle is `deeplab_fast.reference` in float64. A result passes when its largest error is at most
twice that of PyTorch's own modules in the same dtype on the same values, plus one rounding of the
largest result. Multiprocessors are taken to be three, so that a program runs several tiles one
behind the other, and a cut lies within tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import aspp, conv, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.plan import tables
from deeplab_fast.plan.device import H100
from deeplab_fast.plan.gemm import GemmConfig
from deeplab_fast.plan.packing import PackedBranches
from deeplab_fast.plan.schedule import schedule
from deeplab_fast.plan.taps import Problem

pytestmark = pytest.mark.interpret

HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
DTYPES = [torch.float32, torch.float16]
# Few and small: the interpreter takes 10 ms for an iteration, whatever the size of the tile.
WHOLE = GemmConfig(32, 32, 32, num_warps=4, num_stages=2, occupancy=1)
CUT = replace(WHOLE, split=True)


@pytest.fixture(autouse=True)
def _three_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    device = replace(H100, multiprocessors=3)
    monkeypatch.setattr(launch, "device_of", lambda x: device)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_as_good(got: Tensor, torch_path: Tensor, exact: Tensor) -> None:
    """The rule above, with the shape, dtype and layout that the ops promise."""
    assert got.shape == exact.shape and got.dtype == torch_path.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    allowed = 2 * (torch_path.double() - exact).abs().max()
    allowed += exact.abs().max() * HALF_STEP[got.dtype]
    assert (got.double() - exact).abs().max() <= allowed


def conv_bn(x, weight, scale, shift, residual=None, relu=True, **options) -> Tensor:
    """Convolution, batch norm's scale and shift, sum and ReLU as PyTorch has them, one by one."""
    y = F.conv2d(x, weight, **options)
    y = y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


@dataclass
class Branches:
    """Arguments of aspp_branches: one branch for each (filters, kernel, dilation)."""

    x: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    dilations: list[int]

    @classmethod
    def make(cls, shape, branches, dtype=torch.float32):
        c = shape[1]
        weights = [torch.randn(k, c, s, s) / (c * s * s) ** 0.5 for k, s, _ in branches]
        return cls(
            torch.randn(shape).to(dtype),
            [w.to(dtype) for w in weights],
            [torch.rand(k) + 0.5 for k, _, _ in branches],
            [torch.randn(k) / 4 for k, _, _ in branches],
            [d for _, _, d in branches],
        )

    @property
    def packed(self) -> PackedBranches:
        return PackedBranches.pack(self.weights, self.scales, self.shifts, self.dilations)

    def torch_path(self) -> Tensor:
        branches = zip(self.weights, self.scales, self.shifts, self.dilations, strict=True)
        return torch.cat(
            [
                conv_bn(self.x, w, a, b, padding=d * (w.shape[-1] // 2), dilation=d)
                for w, a, b, d in branches
            ],
            1,
        )

    def exact(self) -> Tensor:
        doubles = [[t.double() for t in ts] for ts in (self.weights, self.scales, self.shifts)]
        return reference.aspp_branches(self.x.double(), *doubles, self.dilations)

    def check(self, *configurations: GemmConfig) -> None:
        exact, torch_path = self.exact(), self.torch_path()
        for config in configurations:
            assert_as_good(
                aspp.aspp_branches_packed(self.x, self.packed, config=config), torch_path, exact
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape,branches",
    [
        # Channels and filters that fill no block, tiles across images, branches of two widths.
        pytest.param((2, 20, 4, 3), [(24, 1, 1), (40, 3, 2)], id="ragged"),
        pytest.param((3, 5, 1, 1), [(4, 3, 1), (4, 1, 1)], id="map-of-one-pixel"),
        pytest.param((1, 8, 3, 4), [(8, 3, 7)], id="dilation-beyond-the-map"),
        pytest.param((1, 8, 2, 6), [(8, 3, 3)], id="dilation-beyond-one-side"),
        pytest.param((1, 64, 3, 2), [(16, 3, 2)], id="channels-fill-two-blocks"),
        pytest.param((1, 1, 2, 2), [(1, 3, 1)], id="one-channel-one-filter"),
        pytest.param((5, 480, 2, 4), [(8, 1, 1)], id="cut-into-three"),
    ],
)
def test_branches(shape, branches, dtype: torch.dtype, nan_poison) -> None:
    Branches.make(shape, branches, dtype).check(WHOLE, CUT)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    branches=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 6)),
        min_size=1,
        max_size=2,
    ),
)
def test_branches_of_any_shape(shape, branches) -> None:
    Branches.make(shape, branches).check(CUT)


def test_tiles_of_any_size() -> None:
    case = Branches.make((1, 48, 6, 4), [(48, 3, 4)])
    # 8 warps twice on a multiprocessor: with a limit of registers.
    case.check(GemmConfig(16, 64, 16, 8, 3, 2), GemmConfig(64, 32, 64, 4, 2, 1, split=True))


def test_the_choice_by_rule_runs() -> None:
    case = Branches.make((1, 8, 3, 3), [(8, 3, 2)])
    assert_as_good(
        aspp.aspp_branches(case.x, case.weights, case.scales, case.shifts, case.dilations),
        case.torch_path(),
        case.exact(),
    )


def test_cut_tiles_are_added_in_the_same_order_every_time() -> None:
    case = Branches.make((5, 480, 2, 4), [(8, 1, 1)])
    work = schedule(Problem(5, 2, 4, 480, case.packed.branches), CUT, 3)
    assert (work.tiles, work.slots) == (2, 4)
    first = aspp.aspp_branches_packed(case.x, case.packed, config=CUT)
    assert torch.equal(first, aspp.aspp_branches_packed(case.x, case.packed, config=CUT))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 2, 2, 2))[:, 3:11, 1:4, :3],
            id="slice-of-a-larger-map",
        ),
        pytest.param(
            lambda x: channels_last(x)[:, :, :, :1].expand(2, 8, 3, 3), id="expanded-stride-0"
        ),
        pytest.param(lambda x: channels_last(x).transpose(2, 3), id="transposed"),
    ],
)
def test_branches_take_any_strides(layout) -> None:
    case = Branches.make((2, 8, 3, 3), [(8, 3, 4)])
    x = layout(case.x)
    got = aspp.aspp_branches_packed(x, case.packed, config=WHOLE)
    assert torch.equal(got, aspp.aspp_branches_packed(channels_last(x), case.packed, config=WHOLE))
    case.x = x
    assert_as_good(got, case.torch_path(), case.exact())


@pytest.mark.parametrize("config", [WHOLE, CUT], ids=["whole", "cut"])
def test_branches_fill_a_slice_and_nothing_else(config: GemmConfig) -> None:
    case = Branches.make((2, 40, 3, 3), [(8, 3, 4), (16, 1, 1)])
    larger = channels_last(torch.full((2, 40, 3, 3), 7.0))
    out = larger[:, 8:32]
    assert aspp.aspp_branches_packed(case.x, case.packed, out, config) is out
    assert torch.equal(out, aspp.aspp_branches_packed(case.x, case.packed, config=config))
    assert (larger[:, :8] == 7).all() and (larger[:, 32:] == 7).all()


# Each fits an int32, the offset of the third image does not. Not a multiple of any access, and one
# of all, whose product fits until it is multiplied by the elements of an access.
IMAGE_STRIDES = pytest.mark.parametrize("stride", [2**30 + 65, 2**30 + 64], ids=["odd", "aligned"])


def far_apart(x: Tensor, stride: int) -> Tensor:
    """x [3, C, H, W] in channels_last, but for images that lie so many elements apart; pages in
    between are never touched. A kernel that reads elsewhere ends the process."""
    n, c, h, w = x.shape
    try:
        memory = torch.empty((n - 1) * stride + c * h * w, dtype=x.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2^31 elements: {error}")
    return memory.as_strided(x.shape, (stride, 1, w * c, c)).copy_(x)


@IMAGE_STRIDES
def test_offsets_beyond_int32(stride: int) -> None:
    case = Branches.make((3, 8, 1, 2), [(8, 3, 1)], torch.float16)
    x, out = far_apart(case.x, stride), far_apart(torch.zeros_like(case.x), stride)
    aspp.aspp_branches_packed(x, case.packed, out, WHOLE)
    assert torch.equal(out, aspp.aspp_branches_packed(case.x, case.packed, config=WHOLE))


@IMAGE_STRIDES
def test_products_with_offsets_beyond_int32(stride: int) -> None:
    x, residual = torch.randn(2, 3, 8, 2, 2).half().unbind()
    weight, ones = torch.randn(8, 8).half(), torch.ones(8)
    expected = channels_last(torch.empty_like(x))
    conv.pointwise(x, weight, ones, ones[None], expected, residual=residual, config=WHOLE)
    y = far_apart(torch.zeros_like(x), stride)
    far_x, far_residual = far_apart(x, stride), far_apart(residual, stride)
    conv.pointwise(far_x, weight, ones, ones[None], y, residual=far_residual, config=WHOLE)
    assert torch.equal(y, expected)


def test_slots_beyond_int32() -> None:
    """A tile of two slots behind 2^31 sums that are never touched."""
    case = Branches.make((1, 8, 1, 1), [(8, 1, 1)])
    packed, block = case.packed, 32
    work = schedule(Problem(1, 1, 1, 8, packed.branches), WHOLE, 1)
    sums = torch.from_numpy(work.parts.copy())
    first = 2**31 // block**2
    sums[:, 3], sums[:, 4] = first, first + 2
    try:
        partial = torch.empty((first + 2, block, block))
    except RuntimeError as error:
        pytest.skip(f"no address space for 2^31 elements: {error}")
    partial[first:] = torch.randn(2, block, block)
    y = channels_last(torch.empty(1, 8, 1, 1))
    kernels = launch.device_module("aspp_kernels")
    classes = torch.from_numpy(work.classes.copy())
    kernels.aspp_sum_kernel[(2,)](
        partial, packed.scale, packed.shift, y, classes, sums, 0, 0, 0,
        BLOCK_M=block, BLOCK_N=block, ROWS=16, VEC_Y=1,
    )  # fmt: skip
    total = partial[first, 0, :8] + partial[first + 1, 0, :8]
    torch.testing.assert_close(y.flatten(), torch.relu(total * packed.scale + packed.shift))


def test_what_is_no_number_stays_none_and_does_not_spread() -> None:
    case = Branches.make((1, 20, 4, 3), [(8, 3, 2)])
    case.x[0, 3, 1, 1] = float("nan")
    # At the centre: in PyTorch the other taps also multiply padding, and inf * 0 is NaN.
    case.weights[0][5, 0, 1, 1] = float("inf")
    got = aspp.aspp_branches_packed(case.x, case.packed, config=WHOLE)
    expected = case.torch_path()
    assert expected.isnan().any() and expected.isfinite().any()
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_packed_weights_are_found_again() -> None:
    case = Branches.make((1, 8, 3, 3), [(8, 3, 3), (8, 1, 1)])
    packed = case.packed
    again = PackedBranches.pack(packed.weights, packed.scales, packed.shifts, packed.dilations)
    assert again.weight.data_ptr() == packed.weight.data_ptr()
    with dlf.use_backend("triton"):
        got = ops.aspp_branches(
            case.x, packed.weights, packed.scales, packed.shifts, packed.dilations
        )
        args = (case.weights, case.scales, case.shifts, case.dilations)
        assert torch.equal(got, ops.aspp_branches(case.x, *args))
    assert_as_good(got, case.torch_path(), case.exact())


@dataclass
class Project:
    """Arguments of aspp_project, and of a classifier behind it."""

    branches: Tensor
    pooled: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    classifier: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, n=2, b=40, p=9, k=24, h=3, w=5, classes=5, dtype=torch.float32):
        return cls(
            torch.randn(n, b, h, w).to(dtype),
            torch.rand(n, p).to(dtype),
            (torch.randn(k, b + p, 1, 1) / (b + p) ** 0.5).to(dtype),
            torch.rand(k) + 0.5,
            torch.randn(k) / 4,
            ((torch.randn(classes, k, 1, 1) / k**0.5).to(dtype), torch.randn(classes)),
        )

    def args(self):
        return self.branches, self.pooled, self.weight, self.scale, self.shift

    def torch_path(self, dtype: torch.dtype) -> Tensor:
        """Concatenation, convolution, batch norm and ReLU."""
        branches, pooled = self.branches.to(dtype), self.pooled.to(dtype)
        pooled = pooled[:, :, None, None].expand(-1, -1, *branches.shape[2:])
        both = torch.cat([branches, pooled], 1)
        return conv_bn(both, self.weight.to(dtype), self.scale, self.shift)

    def scores(self, dtype: torch.dtype) -> Tensor:
        weight, bias = (t.to(dtype) for t in self.classifier)
        return F.conv2d(self.torch_path(dtype), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="ragged"),
        pytest.param({"h": 1, "w": 1, "n": 3}, id="map-of-one-pixel"),
        pytest.param({"b": 32, "p": 1, "k": 1}, id="one-filter-one-pooled-channel"),
        pytest.param({"n": 1, "h": 7, "w": 6, "k": 40}, id="several-tiles-both-ways"),
        pytest.param({"p": 300, "k": 20}, id="pooled-channels-in-several-blocks"),
    ],
)
def test_project(sizes: dict, dtype: torch.dtype, nan_poison) -> None:
    case = Project.make(**sizes, dtype=dtype)
    got = aspp.aspp_project(*case.args(), config=WHOLE)
    assert_as_good(got, case.torch_path(dtype), case.torch_path(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "classes,k",
    [
        pytest.param(5, 24, id="5-classes"),
        pytest.param(1, 17, id="one-class"),
        pytest.param(16, 32, id="blocks-are-full"),
        pytest.param(21, 32, id="21-classes"),
        pytest.param(70, 24, id="three-blocks-of-classes-the-last-short"),
    ],
)
def test_project_and_classify(classes: int, k: int, dtype: torch.dtype, nan_poison) -> None:
    case = Project.make(k=k, classes=classes, dtype=dtype)
    got = aspp.aspp_project(*case.args(), classifier=case.classifier, config=WHOLE)
    assert_as_good(got, case.scores(dtype), case.scores(torch.float64))


def test_project_by_rule_and_any_strides() -> None:
    case = Project.make(b=8, p=8, k=8)
    expected = aspp.aspp_project(*case.args())
    assert_as_good(expected, case.torch_path(torch.float32), case.torch_path(torch.float64))
    scores = aspp.aspp_project(*case.args(), classifier=case.classifier)
    assert_as_good(scores, case.scores(torch.float32), case.scores(torch.float64))
    case.branches = case.branches.transpose(2, 3).contiguous().transpose(2, 3)
    case.pooled = case.pooled.t().contiguous().t()
    case.weight = case.weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(aspp.aspp_project(*case.args()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape,k,options,with_residual",
    [
        pytest.param((2, 20, 3, 5), 24, {}, True, id="residual"),
        pytest.param((2, 20, 3, 5), 40, {"act": None}, False, id="no-activation"),
        pytest.param((2, 8, 5, 4), 8, {"stride": 2}, True, id="stride-2"),
        pytest.param((1, 40, 1, 1), 1, {"dilation": 3}, False, id="one-pixel-one-filter"),
        pytest.param((1, 64, 7, 6), 32, {"act": None}, True, id="blocks-are-full"),
    ],
)
def test_conv(shape, k, options, with_residual, dtype: torch.dtype, nan_poison) -> None:
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(k, shape[1], 1, 1) / shape[1] ** 0.5).to(dtype)
    scale, shift = torch.rand(k) + 0.5, torch.randn(k)
    exact_args = (x.double(), weight.double(), scale.double(), shift.double())
    residual = None
    if with_residual:
        residual = torch.randn_like(reference.conv_bn_act(x, weight, scale, shift, **options))
    exact = reference.conv_bn_act(
        *exact_args, **options, residual=None if residual is None else residual.double()
    )
    relu = options.get("act", "relu") == "relu"
    torch_path = conv_bn(x, weight, scale, shift, residual, relu, stride=options.get("stride", 1))
    got = conv.conv_bn_act(x, weight, scale, shift, **options, residual=residual, config=WHOLE)
    assert_as_good(got, torch_path, exact)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 1, 2, 2))[:, :, 1:4, :5], id="slice-of-a-larger-map"
        ),
        pytest.param(lambda x: channels_last(x.transpose(2, 3)).transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, :, :1].expand(2, 16, 3, 5), id="expanded-stride-0"),
    ],
)
def test_conv_takes_any_strides(layout) -> None:
    x, residual = (layout(channels_last(torch.randn(2, 16, 3, 5))) for _ in range(2))
    weight, scale, shift = torch.randn(16, 16, 1, 1), torch.rand(16), torch.randn(16)
    got = conv.conv_bn_act(x, weight, scale, shift, residual=residual, config=WHOLE)
    dense = [channels_last(t) for t in (x, residual)]
    expected = conv.conv_bn_act(dense[0], weight, scale, shift, residual=dense[1], config=WHOLE)
    assert torch.equal(got, expected)
    assert_as_good(
        got,
        conv_bn(x, weight, scale, shift, residual),
        conv_bn(*(t.double() for t in (x, weight, scale, shift, residual))),
    )


def test_conv_keeps_what_is_no_number() -> None:
    x = torch.tensor([float("nan"), -1.0, float("inf"), -float("inf")])[None, None, None]
    one = torch.ones(1)
    got = conv.conv_bn_act(x, torch.ones(1, 1, 1, 1), one, 0 * one, config=WHOLE)
    torch.testing.assert_close(got, torch.relu(x), equal_nan=True)


def test_no_images(nan_poison) -> None:
    case = Branches.make((0, 8, 3, 3), [(8, 3, 2), (4, 1, 1)])
    assert aspp.aspp_branches_packed(case.x, case.packed).shape == (0, 12, 3, 3)
    assert aspp.aspp_project(*Project.make(n=0).args()).shape == (0, 24, 3, 5)
    scores = aspp.aspp_project(*Project.make(n=0).args(), classifier=Project.make().classifier)
    assert scores.shape == (0, 5, 3, 5)
    ones = torch.ones(4)
    got = conv.conv_bn_act(case.x, torch.ones(4, 8, 1, 1), ones, ones, stride=2)
    assert got.shape == (0, 4, 2, 2)


def test_ops_run_here_and_have_gradients() -> None:
    case = Branches.make((1, 8, 2, 3), [(8, 3, 2)])
    project = Project.make(n=1, b=8, p=3, k=4)
    results = []
    for backend in ("triton", "reference"):
        x = case.x.clone().requires_grad_()
        with dlf.use_backend(backend):
            y = ops.aspp_branches(x, case.weights, case.scales, case.shifts, case.dilations)
            z = ops.aspp_project(y, project.pooled, *project.args()[2:])
            weight = torch.full((2, 4, 1, 1), 0.5)
            z = ops.conv_bn_act(z, weight, torch.ones(2), torch.ones(2), residual=z[:, :2])
            z.square().sum().backward()
        results.append((y.detach(), z.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_capture_before_the_first_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "capturing", lambda x: True)
    case = Branches.make((1, 8, 11, 13), [(8, 3, 2)])
    with pytest.raises(RuntimeError, match="run the op once at this size before"):
        aspp.aspp_branches_packed(case.x, case.packed, config=WHOLE)
