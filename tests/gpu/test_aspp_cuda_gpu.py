"""The CUDA C++ kernels of the ASPP on a GPU, at real sizes: every row of the table of tiles.

The oracle is `deeplab_fast.reference` in float64. A result passes when its largest error is at most
twice that of PyTorch's own convolution, scale, shift and ReLU in the same dtype on the same values,
plus one rounding of the largest result. Small odd shapes: tests/aot/test_aspp_cuda_on_host.py.
"""

from __future__ import annotations

import gpu_harness
import pytest
import torch
from gpu_harness import (
    DEVICE,
    assert_as_good,
    assert_capture_says_what_to_do,
    branches_by_pytorch,
    channels_last,
    conv_bn,
    half_dtypes,
    needs_memory,
    needs_two_devices,
    on_a_busy_stream,
    replayed,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import _ext, ops, reference
from deeplab_fast.ops import aspp_cuda
from deeplab_fast.plan.device import device_of
from deeplab_fast.plan.packing import PackedBranches
from deeplab_fast.plan.taps import Branch, Problem

pytestmark = [
    pytest.mark.skipif(not _ext.CUDA.loaded, reason=f"CUDA C++ kernels: {_ext.CUDA.reason}"),
    pytest.mark.skipif(not _ext.CPU.loaded, reason=f"their table of tiles: {_ext.CPU.reason}"),
]

OS8 = tuple(Branch(*branch) for branch in gpu_harness.OS8)
OS16 = tuple(Branch(*branch) for branch in gpu_harness.OS16)

SIZES = [
    pytest.param((1, 2048, 65, 65), OS8, id="os8-65x65-batch-1"),
    pytest.param((4, 2048, 65, 65), OS8, id="os8-65x65-batch-4"),
    pytest.param((1, 2048, 33, 33), OS16, id="os16-33x33-batch-1"),
    pytest.param((16, 2048, 33, 33), OS16, id="os16-33x33-batch-16"),
    pytest.param((1, 512, 128, 256), OS8, id="cityscapes-not-square"),
    pytest.param(
        (3, 328, 17, 19), (Branch(48, 3, 5), Branch(21, 1, 1), Branch(260, 3, 40)),
        id="odd-channels-and-filters-beyond-the-map",
    ),
]  # fmt: skip
every_size = pytest.mark.parametrize(("shape", "branches"), SIZES)


def kernels() -> list:
    """(architecture, row) of everything that this machine's extensions can run."""
    if not (torch.cuda.is_available() and _ext.CUDA.loaded and _ext.CPU.loaded):
        return [pytest.param(0, 0, id="none")]
    sm90 = aspp_cuda.architecture(torch.cuda.get_device_capability()) == 90
    return [
        pytest.param(t.architecture, i, id=f"sm{t.architecture}-{t.block_m}x{t.block_n}")
        for i, t in enumerate(aspp_cuda.tiles())
        if t.architecture == 80 or sm90
    ]


every_kernel = pytest.mark.parametrize(("architecture", "row"), kernels())


@pytest.fixture
def on_architecture(monkeypatch: pytest.MonkeyPatch):
    """Makes choices for a kernel that a newer one would displace."""

    def choose_for(architecture: int) -> None:
        monkeypatch.setattr(aspp_cuda, "architecture", lambda capability: architecture)
        aspp_cuda.choose.cache_clear()

    yield choose_for
    aspp_cuda.choose.cache_clear()


class Case:
    """Arguments of aspp_branches."""

    def __init__(self, shape, branches, dtype=torch.bfloat16, device=DEVICE) -> None:
        c = shape[1]
        # As behind a ReLU.
        self.x = channels_last(torch.randn(shape, device=device).relu().to(dtype))
        self.branches = branches
        self.weights = [
            (
                torch.randn(b.channels, c, b.kernel, b.kernel, device=device) / (c * b.taps) ** 0.5
            ).to(dtype)
            for b in branches
        ]
        self.scales = [torch.rand(b.channels, device=device) + 0.5 for b in branches]
        self.shifts = [torch.randn(b.channels, device=device) / 4 for b in branches]

    @property
    def args(self) -> tuple:
        return self.x, self.weights, self.scales, self.shifts, [b.dilation for b in self.branches]

    def choice(self, row: int | None = None, split: bool | None = None) -> aspp_cuda.Choice:
        n, c, height, width = self.x.shape
        device = device_of(self.x)
        return aspp_cuda.choose(Problem(n, height, width, c, self.branches), device, row, split)

    def run(self, row: int | None = None, split: bool | None = None) -> Tensor:
        packed = PackedBranches.pack(*self.args[1:])
        return aspp_cuda.multiply(
            self.x,
            packed.weight,
            packed.scale,
            packed.shift,
            self.branches,
            self.choice(row, split),
        )

    def torch_path(self) -> Tensor:
        return branches_by_pytorch(*self.args)

    def exact(self) -> Tensor:
        doubles = [[t.double() for t in ts] for ts in (self.weights, self.scales, self.shifts)]
        return reference.aspp_branches(self.x.double(), *doubles, self.args[-1])


@half_dtypes
@every_size
def test_branches(shape, branches, dtype, nan_poison: None) -> None:
    case = Case(shape, branches, dtype)
    assert_as_good(aspp_cuda.aspp_branches(*case.args), case.torch_path(), case.exact())


@pytest.mark.parametrize("split", [False, True], ids=["whole", "cut"])
@every_kernel
@half_dtypes
def test_every_tile(architecture, row, split, dtype, on_architecture, nan_poison: None) -> None:
    """Also those that no choice takes; a pair's second block has no pixels in some tiles."""
    on_architecture(architecture)
    for branches in ((Branch(256, 3, 12), Branch(96, 1, 1)), (Branch(267, 3, 5), Branch(8, 3, 40))):
        case = Case((2, 328, 33, 29), branches, dtype)
        got = case.run(row, split)
        assert_as_good(got, case.torch_path(), case.exact())
        for _ in range(3):
            assert torch.equal(case.run(row, split), got)


@every_kernel
def test_no_race_shows_in_many_runs(architecture, row, on_architecture) -> None:
    """On a busy and on an idle GPU: a barrier that is missing shows in some of them."""
    on_architecture(architecture)
    case = Case((4, 2048, 33, 33), OS16)
    expected = case.run(row)
    for i in range(200):
        if i % 10 == 0:
            torch.cuda.synchronize()
        assert torch.equal(case.run(row), expected)


@half_dtypes
@pytest.mark.parametrize(
    ("shape", "pooled", "filters"),
    [
        pytest.param((16, 1024, 33, 33), 256, 256, id="os16-33x33-batch-16"),
        pytest.param((2, 1024, 65, 65), 256, 256, id="os8-65x65"),
        pytest.param((3, 1280, 17, 19), 13, 21, id="odd"),
    ],
)
def test_project(shape, pooled, filters, dtype, nan_poison: None) -> None:
    channels = shape[1]
    branches = channels_last(torch.randn(shape, device=DEVICE).relu().to(dtype))
    vector = torch.randn(shape[0], pooled, device=DEVICE).relu().to(dtype)
    weight = torch.randn(filters, channels + pooled, 1, 1, device=DEVICE)
    weight = (weight / (channels + pooled) ** 0.5).to(dtype)
    scale, shift = torch.rand(filters, device=DEVICE) + 0.5, torch.randn(filters, device=DEVICE)
    args = (branches, vector, weight, scale, shift)
    exact = reference.aspp_project(*(a.double() for a in args))
    concat = torch.cat([branches, vector[:, :, None, None].expand(-1, -1, *shape[2:])], 1)
    assert_as_good(aspp_cuda.aspp_project(*args), conv_bn(concat, weight, scale, shift), exact)


@pytest.mark.parametrize("layout", ["nchw", "slice", "odd-address"])
def test_layouts_change_nothing(layout: str) -> None:
    case = Case((2, 512, 33, 33), OS16)
    expected = case.run()
    x = case.x
    if layout == "nchw":
        case.x = x.contiguous()
    elif layout == "slice":
        case.x = channels_last(torch.cat([x, x, x], 1))[:, 512:1024]
    else:
        flat = x.permute(0, 2, 3, 1).flatten()
        moved = torch.cat([flat[:4], flat])[4:].view(2, 33, 33, 512)
        case.x = moved.permute(0, 3, 1, 2)
    assert torch.equal(case.run(), expected)


def test_backends_agree() -> None:
    case = Case((2, 2048, 65, 65), OS8)
    with dlf.use_backend("triton"):
        triton = ops.aspp_branches(*case.args)
    with dlf.use_backend("cuda"):
        cuda = ops.aspp_branches(*case.args)
    # Sums in another order, then one rounding each.
    torch.testing.assert_close(cuda, triton, rtol=2.0**-7, atol=2.0**-8)


def test_runs_on_the_current_stream() -> None:
    case = Case((2, 512, 33, 33), OS16)
    expected = case.run(split=True)
    [got] = on_a_busy_stream(lambda: [case.run(split=True)], case.x)
    assert torch.equal(got, expected)


@needs_two_devices
def test_another_device_than_the_current() -> None:
    case = Case((1, 512, 33, 33), OS16, device="cuda:1")
    assert_as_good(aspp_cuda.aspp_branches(*case.args), case.torch_path(), case.exact())
    assert torch.cuda.current_device() == 0


@every_kernel
def test_cuda_graph_replays_on_new_inputs(architecture, row, on_architecture) -> None:
    on_architecture(architecture)
    case, other = Case((2, 512, 33, 33), OS16), Case((2, 512, 33, 33), OS16)
    [got] = replayed(lambda: [case.run(row, True)], lambda: case.x.copy_(other.x))
    assert torch.equal(got, case.run(row, True))


def test_capture_without_a_call_before_says_what_to_do() -> None:
    case = Case((1, 64, 7, 11), (Branch(8, 3, 2),))
    packed = PackedBranches.pack(*case.args[1:])
    parts = (packed.weight, packed.scale, packed.shift)
    assert_capture_says_what_to_do(lambda: aspp_cuda.multiply(case.x, *parts, case.branches))


def test_compiles_without_graph_breaks() -> None:
    case = Case((2, 512, 33, 33), OS16)

    def step(x: Tensor) -> Tensor:
        return ops.aspp_branches(x * 2, *case.args[1:]) + 1

    with dlf.use_backend("cuda"):
        assert torch.equal(torch.compile(step, fullgraph=True)(case.x), step(case.x))


def test_maps_beyond_two_to_the_31_elements() -> None:
    needs_memory(24)
    case = Case((1, 2048, 65, 65), (Branch(64, 3, 12),))
    row = case.choice().row
    alone = case.run(row, split=False)
    many = channels_last(torch.zeros(260, 2048, 65, 65, dtype=torch.bfloat16, device=DEVICE))
    assert many.numel() > 2**31
    many[-1] = case.x[0]
    case.x = many
    assert torch.equal(case.run(row, split=False)[-1:], alone)


@half_dtypes
@every_kernel
def test_programs_of_a_list_run_at_the_same_time(architecture, row, dtype):
    """What lists of tiles assume of sm_90a: as many programs as multiprocessors, or pairs, hold."""
    if architecture != 90:
        pytest.skip("blocks without clusters go wherever there is room")
    device = device_of(torch.empty(0, device=DEVICE))
    assumed = aspp_cuda.choose(Problem(1, 65, 65, 2048, OS8), device, row).programs
    resident = torch.ops.deeplab_fast._aspp_sm90_residency(row, dtype == torch.float16)
    assert resident >= assumed, f"{assumed} programs are made, the device holds {resident} at once"
