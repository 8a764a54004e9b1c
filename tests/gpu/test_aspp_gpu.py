"""The Triton kernels of the ASPP and of 1x1 convolutions, and all backends, on a GPU at real sizes.

The oracle is `deeplab_fast.reference` in float64. A result passes when its largest error is at most
twice that of PyTorch's own convolution, batch norm and ReLU in the same dtype on the same values,
plus one rounding of the largest result.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import aspp, conv, launch
from gpu_harness import (
    DEVICE,
    HALF_STEP,
    OS8,
    OS16,
    assert_as_good,
    assert_capture_says_what_to_do,
    assert_same,
    branches_by_pytorch,
    channels_last,
    conv_bn,
    every_dtype,
    half_dtypes,
    needs_memory,
    needs_two_devices,
    on_a_busy_stream,
    peak_memory,
    replayed,
    use_backend,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.plan.device import device_of
from deeplab_fast.plan.gemm import MMA_16BIT, aspp_branches_candidates, gemm_candidates
from deeplab_fast.plan.packing import PackedBranches
from deeplab_fast.testing import deterministic, tf32

# N, C, H, W, (filters, kernel, dilation) of each branch
SIZES = [
    pytest.param((1, 2048, 65, 65, OS8), id="os8-65x65-batch-1"),
    pytest.param((4, 2048, 65, 65, OS8), id="os8-65x65-batch-4"),
    pytest.param((1, 2048, 33, 33, OS16), id="os16-33x33-batch-1"),
    pytest.param((16, 2048, 33, 33, OS16), id="os16-33x33-batch-16"),
    pytest.param((1, 2048, 97, 97, OS8), id="os8-97x97"),
    pytest.param((1, 512, 128, 256, OS8), id="cityscapes-not-square"),
    pytest.param((3, 320, 17, 19, ((48, 3, 5), (96, 1, 1), (256, 3, 40))), id="beyond-the-map"),
    pytest.param((2, 2048, 1, 1, OS8), id="map-of-one-pixel"),
    pytest.param((2, 321, 21, 13, ((21, 3, 4), (7, 1, 1))), id="odd-channels-and-filters"),
    pytest.param((2, 36, 9, 9, ((20, 3, 2),)), id="accesses-of-8-bytes"),
]


@dataclass
class Branches:
    """Arguments of aspp_branches."""

    x: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    dilations: list[int]

    @classmethod
    def make(cls, size, dtype=torch.bfloat16, device=DEVICE):
        *shape, branches = size
        c = shape[1]
        weights = [
            torch.randn(k, c, s, s, device=device) / (c * s * s) ** 0.5 for k, s, _ in branches
        ]
        return cls(
            # As behind a ReLU.
            channels_last(torch.randn(shape, device=device).relu().to(dtype)),
            [w.to(dtype) for w in weights],
            [torch.rand(k, device=device) + 0.5 for k, _, _ in branches],
            [torch.randn(k, device=device) / 4 for k, _, _ in branches],
            [d for _, _, d in branches],
        )

    def args(self) -> tuple:
        return self.x, self.weights, self.scales, self.shifts, self.dilations

    @property
    def packed(self) -> PackedBranches:
        return PackedBranches.pack(*self.args()[1:])

    def torch_path(self) -> Tensor:
        return branches_by_pytorch(*self.args())

    def exact(self) -> Tensor:
        doubles = [[t.double() for t in ts] for ts in (self.weights, self.scales, self.shifts)]
        return reference.aspp_branches(self.x.double(), *doubles, self.dilations)


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_branches(size, dtype: torch.dtype) -> None:
    case = Branches.make(size, dtype)
    assert_as_good(aspp.aspp_branches(*case.args()), case.torch_path(), case.exact())


def test_branches_in_tf32_where_pytorch_allows_it() -> None:
    case = Branches.make((2, 2048, 33, 33, OS16), torch.float32)
    with tf32(True):
        got, torch_path = aspp.aspp_branches(*case.args()), case.torch_path()
    assert_as_good(got, torch_path, case.exact())
    assert not torch.equal(got, aspp.aspp_branches(*case.args()))


@every_dtype
def test_every_configuration(dtype: torch.dtype) -> None:
    """All that `deeplab-fast tune` may record, cut and whole."""
    case = Branches.make((2, 320, 33, 33, ((256, 3, 12), (96, 1, 1))), dtype)
    exact, torch_path = case.exact(), case.torch_path()
    found = aspp_branches_candidates(launch.arithmetic(case.x), device_of(case.x))
    assert found
    for config in found:
        got = aspp.aspp_branches_packed(case.x, case.packed, config=config)
        assert_as_good(got, torch_path, exact)


def test_dead_taps_are_not_multiplied() -> None:
    """A rate beyond the map leaves the centre tap, whatever the others hold."""
    case = Branches.make((2, 256, 33, 33, ((256, 3, 40),)))
    expected = aspp.aspp_branches(*case.args())
    for tap in range(9):
        if tap != 4:
            case.weights[0][:, :, tap // 3, tap % 3] = float("nan")
    assert torch.equal(aspp.aspp_branches(*case.args()), expected)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(), id="nchw"),
        pytest.param(lambda x: channels_last(x.repeat(1, 2, 1, 2))[:, 64:320, :, 3:36], id="slice"),
        pytest.param(
            lambda x: channels_last(x.repeat(1, 2, 1, 1))[:, 3:259], id="slice-that-is-not-aligned"
        ),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
    ],
)
def test_any_strides(layout) -> None:
    case = Branches.make((2, 256, 33, 33, ((64, 3, 12), (32, 1, 1))))
    case.x = layout(case.x)
    assert_as_good(aspp.aspp_branches(*case.args()), case.torch_path(), case.exact())


def test_branches_fill_a_slice_and_nothing_else() -> None:
    case = Branches.make((1, 2048, 65, 65, OS8))
    larger = channels_last(torch.full((1, 1296, 65, 65), 7.0, dtype=torch.bfloat16, device=DEVICE))
    out = larger[:, 16:1040]
    aspp.aspp_branches_packed(case.x, case.packed, out)
    assert torch.equal(out, aspp.aspp_branches(*case.args()))
    assert (larger[:, :16] == 7).all() and (larger[:, 1040:] == 7).all()


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
    def make(cls, size, dtype=torch.bfloat16):
        n, b, p, k, h, w, classes = size
        make = {"device": DEVICE}
        return cls(
            channels_last(torch.randn(n, b, h, w, **make).relu().to(dtype)),
            torch.rand(n, p, **make).to(dtype),
            (torch.randn(k, b + p, 1, 1, **make) / (b + p) ** 0.5).to(dtype),
            torch.rand(k, **make) + 0.5,
            torch.randn(k, **make) / 4,
            (
                (torch.randn(classes, k, 1, 1, **make) / k**0.5).to(dtype),
                torch.randn(classes, **make),
            ),
        )

    def args(self) -> tuple:
        return self.branches, self.pooled, self.weight, self.scale, self.shift

    def torch_path(self, dtype: torch.dtype) -> Tensor:
        branches, pooled = self.branches.to(dtype), self.pooled.to(dtype)
        pooled = pooled[:, :, None, None].expand(-1, -1, *branches.shape[2:])
        both = torch.cat([branches, pooled], 1)
        return conv_bn(both, self.weight.to(dtype), self.scale.to(dtype), self.shift.to(dtype))

    def scores(self, dtype: torch.dtype) -> Tensor:
        return F.conv2d(self.torch_path(dtype), *(t.to(dtype) for t in self.classifier))


# N, B, P, K, H, W, classes
PROJECTS = [
    pytest.param((1, 1024, 256, 256, 65, 65, 21), id="65x65-batch-1"),
    pytest.param((16, 1024, 256, 256, 33, 33, 21), id="33x33-batch-16"),
    pytest.param((2, 1024, 256, 256, 128, 256, 19), id="cityscapes"),
    pytest.param((3, 1024, 256, 256, 1, 1, 21), id="map-of-one-pixel"),
    pytest.param((2, 257, 31, 37, 15, 9, 150), id="nothing-fills-a-block"),
]


@every_dtype
@pytest.mark.parametrize("size", PROJECTS)
def test_project(size, dtype: torch.dtype) -> None:
    case = Project.make(size, dtype)
    got = aspp.aspp_project(*case.args())
    assert_as_good(got, case.torch_path(dtype), case.torch_path(torch.float64))


@half_dtypes
@pytest.mark.parametrize("size", PROJECTS)
def test_project_and_classify(size, dtype: torch.dtype) -> None:
    case = Project.make(size, dtype)
    got = aspp.aspp_project(*case.args(), classifier=case.classifier)
    assert_as_good(got, case.scores(dtype), case.scores(torch.float64))


@every_dtype
@pytest.mark.parametrize(
    "shape,k,stride,residual,act",
    [
        pytest.param((16, 64, 129, 129), 256, 1, True, "relu", id="layer1-expand"),
        pytest.param((2, 512, 65, 65), 2048, 1, True, "relu", id="layer4-expand"),
        pytest.param((2, 2048, 65, 65), 512, 1, False, "relu", id="layer4-reduce"),
        pytest.param((2, 256, 129, 129), 512, 2, False, None, id="shortcut-stride-2"),
        pytest.param((3, 35, 7, 5), 21, 1, True, None, id="nothing-fills-a-block"),
    ],
)
def test_conv(shape, k, stride, residual, act, dtype: torch.dtype) -> None:
    x = channels_last(torch.randn(shape, device=DEVICE).relu().to(dtype))
    weight = (torch.randn(k, shape[1], 1, 1, device=DEVICE) / shape[1] ** 0.5).to(dtype)
    scale, shift = torch.rand(2, k, device=DEVICE)
    tensors = [x, weight, scale, shift]
    if residual:
        out = F.conv2d(x, weight, stride=stride)
        tensors.append(channels_last(torch.randn_like(out)))
    with dlf.use_backend("triton"):
        named = {"residual": tensors[4]} if residual else {}
        got = ops.conv_bn_act(*tensors[:4], stride=stride, act=act, **named)
    torch_path = conv_bn(*tensors, relu=act is not None, stride=stride)
    exact = conv_bn(*(t.double() for t in tensors), relu=act is not None, stride=stride)
    assert_as_good(got, torch_path, exact)


def call_all_ops(case: Branches, project: Project) -> list[Tensor]:
    """Every op here through its public function, one fed from the other."""
    y = ops.aspp_branches(*case.args())
    z = ops.aspp_project(y, *project.args()[1:])
    k = z.shape[1]
    eye = torch.eye(k, device=z.device, dtype=z.dtype)[:, :, None, None]
    ones = torch.ones(k, device=z.device)
    return [y, z, ops.conv_bn_act(z, eye, ones, ones, residual=z)]


def head(dtype=torch.bfloat16, n=2) -> tuple[Branches, Project]:
    return (
        Branches.make((n, 2048, 65, 65, OS8), dtype),
        Project.make((n, 1024, 256, 256, 65, 65, 21), dtype),
    )


@every_dtype
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_agree(backend: str, dtype: torch.dtype) -> None:
    case, project = head(dtype)
    with dlf.use_backend("reference"):
        expected = call_all_ops(case, project)
    with use_backend(backend):
        got = call_all_ops(case, project)
    # Each of the two is off by a rounding of its own; later ops start from these.
    for depth, (a, b) in enumerate(zip(got, expected, strict=True), 1):
        scale = b.double().abs().max()
        bound = 2 * depth * (HALF_STEP[dtype] + 1e-5) * scale
        assert (a.double() - b.double()).abs().max() <= bound


def test_results_repeat_to_the_bit() -> None:
    # Batch 1 cuts tiles, whose parts are added in a second launch.
    case, project = head(n=1)
    with dlf.use_backend("triton"):
        first = call_all_ops(case, project)
        with deterministic():
            second = call_all_ops(case, project)
    assert_same(first, second)


def test_autocast_runs_in_half_precision() -> None:
    case = Branches.make((1, 256, 33, 33, OS16), torch.float32)
    with dlf.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        got = ops.aspp_branches(*case.args())
    case.x = case.x.bfloat16()
    case.weights = [w.bfloat16() for w in case.weights]
    assert torch.equal(got, aspp.aspp_branches(*case.args()))


@pytest.mark.parametrize("n", [1, 4], ids=["batch-1-is-cut", "batch-4"])
def test_cuda_graph_replays_on_new_inputs(n: int) -> None:
    case, project = head(n=n)
    other, _ = head(n=n)
    packed = case.packed
    case.weights, case.scales, case.shifts = packed.weights, packed.scales, packed.shifts
    x = case.x.clone()

    def step() -> list[Tensor]:
        return call_all_ops(Branches(x, *case.args()[1:]), project)

    with dlf.use_backend("triton"):
        got = replayed(step, lambda: x.copy_(other.x))
        assert_same(got, step())


def test_capture_without_a_call_before_says_what_to_do() -> None:
    case = Branches.make((1, 64, 11, 23, ((64, 3, 2),)))
    packed = case.packed
    assert_capture_says_what_to_do(lambda: aspp.aspp_branches_packed(case.x, packed))


def test_runs_on_the_current_stream() -> None:
    case, project = head(n=1)
    with dlf.use_backend("triton"):
        expected = call_all_ops(case, project)
        got = on_a_busy_stream(lambda: call_all_ops(case, project), case.x)
    assert_same(got, expected)


@needs_two_devices
def test_runs_on_another_device_than_the_current_one() -> None:
    case = Branches.make((1, 256, 33, 33, OS16), device="cuda:1")
    got = aspp.aspp_branches(*case.args())
    assert got.device == case.x.device and torch.cuda.current_device() == 0
    assert_as_good(got, case.torch_path(), case.exact())


def test_compiles_without_graph_breaks() -> None:
    case, project = head(n=1)

    def step(x: Tensor) -> list[Tensor]:
        return call_all_ops(Branches(x * 2, *case.args()[1:]), project)

    with dlf.use_backend("triton"), torch.no_grad():
        expected = step(case.x)
        got = torch.compile(step, fullgraph=True)(case.x)
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


def test_gradients_are_the_references() -> None:
    case = Branches.make((2, 64, 33, 33, ((32, 3, 12), (32, 1, 1))), torch.float32)
    grads = []
    for backend in ("triton", "reference"):
        x = case.x.clone().requires_grad_()
        with dlf.use_backend(backend):
            ops.aspp_branches(x, *case.args()[1:]).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_map_beyond_two_to_the_31_elements() -> None:
    n = 250
    needs_memory(16)
    case = Branches.make((1, 2048, 65, 65, ((32, 3, 12),)))
    x = channels_last(torch.zeros(n, 2048, 65, 65, dtype=torch.bfloat16, device=DEVICE))
    assert x.numel() > 2**31
    x[-1] = case.x[0]
    # The batch of one is not to be cut: its sums would have another order.
    config = gemm_candidates(MMA_16BIT, device_of(x))[0]
    got = aspp.aspp_branches_packed(x, case.packed, config=config)
    alone = aspp.aspp_branches_packed(case.x, case.packed, config=config)
    assert torch.equal(got[-1:], alone)


def test_result_beyond_two_to_the_31_elements() -> None:
    n = 65
    needs_memory(16)
    x = channels_last(torch.zeros(n, 32, 128, 128, dtype=torch.bfloat16, device=DEVICE))
    x[-1].normal_()
    weight = torch.randn(2048, 32, 1, 1, device=DEVICE).bfloat16()
    ones = torch.ones(2048, device=DEVICE)
    config = gemm_candidates(MMA_16BIT, device_of(x))[0]
    packed = PackedBranches.pack([weight], [ones], [ones], [1])
    alone = aspp.aspp_branches_packed(x[-1:].clone(), packed, config=config)
    got = aspp.aspp_branches_packed(x, packed, config=config)
    assert got.numel() > 2**31 and torch.equal(got[-1:], alone)
    del got
    got = conv.conv_bn_act(x, weight, ones, ones, config=config)
    assert torch.equal(got[-1:], alone)


def test_memory_is_that_of_the_result() -> None:
    case = Branches.make((8, 2048, 65, 65, OS8))
    packed = case.packed
    y = aspp.aspp_branches_packed(case.x, packed)
    # The allocator rounds up to 2 MiB.
    limit = y.numel() * 2 + 2**22
    assert peak_memory(lambda: aspp.aspp_branches_packed(case.x, packed)) <= limit
