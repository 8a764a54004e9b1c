"""The host side of the Triton ASPP and 1x1 kernels: reasons, candidates, packing, launches."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deeplab_fast.kernels import aspp, conv, launch
from torch import Tensor

from deeplab_fast import backends
from deeplab_fast.backends import OpDesc
from deeplab_fast.dispatch import limits
from deeplab_fast.plan.device import (
    A100,
    H100,
    REGISTERS,
    SHARED_RESERVE,
    Device,
    asynchronous,
    device_like,
)
from deeplab_fast.plan.gemm import (
    FMA_FP32,
    MMA_16BIT,
    MMA_TF32,
    GemmConfig,
    aspp_branches_candidates,
    gemm_candidates,
)
from deeplab_fast.plan.packing import PackedBranches, channels_inside
from deeplab_fast.plan.rules import BranchesKey, branches_rule
from deeplab_fast.plan.taps import Branch

OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


def branches_desc(shape=(1, 2048, 65, 65), branches=OS8, dtype=torch.bfloat16, **changes) -> OpDesc:
    params = {
        "weights": tuple((b.channels, shape[1], b.kernel, b.kernel) for b in branches),
        "dilations": tuple(b.dilation for b in branches),
    }
    return replace(OpDesc("aspp_branches", "cuda", dtype, shape, params, (9, 0)), **changes)


def conv_desc(weight=(64, 256, 1, 1), shape=(1, 256, 65, 65), **changes) -> OpDesc:
    params = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "residual": True,
        "act": "relu",
    }
    params |= {"weight": weight} | changes
    return OpDesc("conv_bn_act", "cuda", torch.bfloat16, shape, params, (9, 0))


PROJECT = OpDesc(
    "aspp_project",
    "cuda",
    torch.bfloat16,
    (16, 1024, 65, 65),
    {"pooled": 256, "outputs": 256},
    (9, 0),
)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever this process was started with."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "desc,expected",
    [
        pytest.param(branches_desc(), [], id="runs"),
        pytest.param(branches_desc(device="cpu", capability=None), ["is on cpu"], id="cpu"),
        pytest.param(branches_desc(dtype=torch.float64), ["accumulates in float32"], id="float64"),
        pytest.param(branches_desc(capability=(7, 5)), ["the device has 7.5"], id="old-gpu"),
        pytest.param(
            branches_desc(shape=(2**20, 8, 64, 64)), ["at most 2147483647 pixels"], id="pixels"
        ),
        pytest.param(PROJECT, [], id="project-runs"),
        pytest.param(conv_desc(), [], id="conv-runs"),
        pytest.param(
            conv_desc((64, 256, 3, 3), padding=1),
            ["only 1x1 convolutions; cuDNN's fused kernels run 3x3", "got padding=1"],
            id="conv-3x3",
        ),
        pytest.param(conv_desc((64, 64, 1, 1), groups=4), ["groups=4"], id="conv-groups"),
    ],
)
def test_reasons(desc: OpDesc, expected: list[str]) -> None:
    implementation = backends.implementations(desc.op)["triton"]
    reasons = implementation.not_supported_reasons(desc)
    assert len(reasons) == len(expected)
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason


def test_in_a_fresh_process() -> None:
    """TF32 follows PyTorch's newer setting, a mix of which with the older one PyTorch refuses ever
    after; the launchers hold no Triton."""
    code = (
        "import torch\n"
        "from deeplab_fast.dispatch import limits\n"
        "from deeplab_fast.kernels import aspp, conv, launch\n"
        "assert not any(hasattr(m, 'triton') for m in (aspp, conv, launch))\n"
        "import sys; assert 'deeplab_fast.kernels.aspp_kernels' not in sys.modules\n"
        "for on in (True, False):\n"
        "    torch.backends.cuda.matmul.fp32_precision = 'tf32' if on else 'ieee'\n"
        "    assert limits.allow_tf32() is on\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("on", [False, True])
def test_tf32_follows_pytorchs_older_setting(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        assert limits.allow_tf32() is on
        assert launch.precision(torch.empty(0)) == ("tf32" if on else "ieee")
        assert launch.precision(torch.empty(0, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


SMALL_GPU = replace(A100, name="small", capability=(8, 6), multiprocessors=28, shared=100 * 1024)


@pytest.mark.parametrize("device", [H100, A100, SMALL_GPU], ids=lambda d: d.name)
@pytest.mark.parametrize("math", [MMA_16BIT, MMA_TF32, FMA_FP32])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_candidates_fit_into_shared_memory_and_registers(device, math, aligned) -> None:
    found = aspp_branches_candidates(math, device, None, aligned)
    assert found and {c.split for c in found} == {False, True}
    itemsize = 2 if math == MMA_16BIT else 4
    for c in found:
        block = c.shared_bytes(itemsize, device.capability) + SHARED_RESERVE
        assert block * c.occupancy <= device.shared
        registers = c.max_registers * c.num_warps * 32 * c.occupancy
        assert registers <= REGISTERS
        # The accumulator alone.
        assert c.max_registers > c.block_m * c.block_n // (32 * c.num_warps)
    for filters in (1, 21, 48, 256, 2048):
        assert gemm_candidates(math, device, filters, aligned)


def test_a_configuration_that_does_not_fit_is_not_legal() -> None:
    large = GemmConfig(128, 256, 64, 8, 4, 1)
    assert large.is_legal(2, H100) and not large.is_legal(4, H100)
    # Before 9.0 a stage less is held, but there is less shared memory too.
    assert large.is_legal(2, A100) and not replace(large, num_stages=5).is_legal(2, A100)
    assert not replace(large, occupancy=2).is_legal(2, H100)


def pack_arguments(
    dtype=torch.float32,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    sizes = [(4, 1), (3, 3), (5, 3)]
    weights = [torch.randn(k, 7, s, s).to(dtype) for k, s in sizes]
    return weights, [torch.rand(k) for k, _ in sizes], [torch.rand(k) for k, _ in sizes], [1, 2, 3]


def test_packing() -> None:
    weights, scales, shifts, dilations = pack_arguments()
    packed = PackedBranches.pack(weights, scales, shifts, dilations)
    assert packed.branches == (Branch(4, 1, 1), Branch(3, 3, 2), Branch(5, 3, 3))
    assert packed.weight.shape == (4 + 27 + 45, 7) and packed.weight.is_contiguous()
    # Branch 1, tap (1, 2), filter 2.
    assert torch.equal(packed.weight[4 + 5 * 3 + 2], weights[1][2, :, 1, 2])
    assert torch.equal(packed.scale, torch.cat(scales))
    assert torch.equal(packed.shift, torch.cat(shifts))
    for got, expected in (
        (packed.weights, weights),
        (packed.scales, scales),
        (packed.shifts, shifts),
    ):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    assert packed.dilations == dilations


def test_views_of_a_pack_are_not_copied() -> None:
    packed = PackedBranches.pack(*pack_arguments(torch.float16))
    again = PackedBranches.pack(packed.weights, packed.scales, packed.shifts, packed.dilations)
    for name in ("weight", "scale", "shift"):
        assert getattr(again, name).data_ptr() == getattr(packed, name).data_ptr()
        assert torch.equal(getattr(again, name), getattr(packed, name))
    # In another order, or only some of them, they are other weights.
    order = [2, 1, 0]
    mixed = PackedBranches.pack(
        *([part[i] for i in order] for part in (packed.weights, packed.scales, packed.shifts)),
        [packed.dilations[i] for i in order],
    )
    assert torch.equal(mixed.weights[0], packed.weights[2])
    assert mixed.weight.data_ptr() != packed.weight.data_ptr()
    tail = PackedBranches.pack(
        packed.weights[1:], packed.scales[1:], packed.shifts[1:], packed.dilations[1:]
    )
    assert torch.equal(tail.weight, packed.weight[4:])
    assert tail.weight.data_ptr() == packed.weight[4:].data_ptr()
    # Scales of another dtype are converted, channels_last weights are copied.
    weights, scales, shifts, dilations = pack_arguments()
    other = PackedBranches.pack(
        [w.contiguous(memory_format=torch.channels_last) for w in weights],
        [s.double() for s in scales],
        shifts,
        dilations,
    )
    assert other.scale.dtype == torch.float32
    assert torch.equal(other.weight, PackedBranches.pack(*pack_like(other)).weight)


def pack_like(packed: PackedBranches) -> tuple:
    """The arguments of a pack, as tensors of their own."""
    clones = [[t.clone() for t in ts] for ts in (packed.weights, packed.scales, packed.shifts)]
    return (*clones, packed.dilations)


@pytest.mark.parametrize(
    "x,flat,strides",
    [
        pytest.param(torch.empty(2, 8, 3, 5), False, None, id="nchw-is-not-asked-for"),
        pytest.param(
            torch.empty(2, 8, 3, 5).contiguous(memory_format=torch.channels_last),
            True,
            (0, 0, 8),
            id="channels-last",
        ),
        pytest.param(
            torch.empty(2, 3, 5, 20).permute(0, 3, 1, 2)[:, 4:12], True, (0, 0, 20), id="slice-of-c"
        ),
        pytest.param(
            torch.empty(2, 3, 5, 8).permute(0, 3, 1, 2)[:, :, :, ::2],
            False,
            (120, 40, 16),
            id="stride-2",
        ),
        pytest.param(
            torch.empty(2, 3, 5, 8).permute(0, 3, 1, 2)[:, :, 1:2], False, (120, 0, 8), id="one-row"
        ),
        pytest.param(
            torch.empty(1, 3, 5, 8).permute(0, 3, 1, 2)[..., :1], True, (0, 0, 40), id="one-column"
        ),
        pytest.param(torch.empty(1, 8, 1, 1), True, (0, 0, 0), id="one-pixel"),
    ],
)
def test_distances_of_pixels(x: Tensor, flat: bool, strides) -> None:
    if strides is None:
        assert channels_inside(x).is_contiguous(memory_format=torch.channels_last)
        return
    assert channels_inside(x) is x
    assert launch.pixel_strides(x) == (flat, strides)
    base = x.storage_offset()
    image, row, col = strides
    for n, i, j in itertools.product(*(range(size) for size in (x.shape[0], *x.shape[2:]))):
        number = (n * x.shape[2] + i) * x.shape[3] + j
        offset = number * col if flat else n * image + i * row + j * col
        assert x[n, :, i, j].storage_offset() == base + offset


def test_longest_access() -> None:
    half, single = torch.empty(16, dtype=torch.float16), torch.empty(16)
    assert [launch.vector(half, n) for n in (8, 24, 4, 6, 7, 0)] == [8, 8, 4, 2, 1, 8]
    assert launch.vector(half, 2048, 36) == 4
    assert [launch.vector(single, n) for n in (8, 4, 2, 1)] == [4, 4, 2, 1]
    assert launch.is_longest(half, 8) and not launch.is_longest(half, 8, 4)
    assert launch.is_longest(single, 4)
    # A slice that starts between two aligned addresses.
    assert [launch.vector(half[i:], 8) for i in (0, 1, 2, 4, 8)] == [8, 1, 2, 4, 8]


class Recorder:
    """Stands for a module of kernels; keeps the launches."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []

    def __getattr__(self, kernel: str):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.launches.append(
                    SimpleNamespace(kernel=kernel, grid=grid, args=args, options=options)
                )

        return Kernel()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "device_module", lambda name: recorder)
    monkeypatch.setattr(launch, "on_device", lambda x: nullcontext())
    return recorder


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        pytest.param((8, 9), False, id="Ada"),
        pytest.param((9, 0), True, id="Hopper"),
        pytest.param((10, 0), True, id="Blackwell of data centres"),
        pytest.param((12, 0), False, id="Blackwell of graphics cards: products as on 8.0"),
    ],
)
def test_a_device_keeps_its_capability(capability, expected) -> None:
    """An H100 stood for a B200 whole, which would have been given code for 9.0a alone."""
    properties = SimpleNamespace(
        name="card",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=7,
        shared_memory_per_multiprocessor=100 * 1024,
    )
    assert device_like(properties) == Device("card", capability, 7, 100 * 1024)
    assert asynchronous(capability) is expected


def test_launches_of_the_branches(recorder: Recorder) -> None:
    x = torch.empty(1, 2048, 33, 33, dtype=torch.bfloat16)
    weights = [torch.empty(256, 2048, 3, 3, dtype=torch.bfloat16)]
    vectors = [torch.empty(256)]
    aspp.aspp_branches(x, weights, vectors, vectors, [12])
    config = branches_rule(BranchesKey(1, 33, 33, 2048, (Branch(256, 3, 12),), MMA_16BIT), H100)
    assert config.split
    branches, total = recorder.launches
    assert branches.kernel == "aspp_branches_kernel" and total.kernel == "aspp_sum_kernel"
    assert branches.grid == (H100.multiprocessors * config.occupancy,)
    options = branches.options
    assert (options["VEC_X"], options["VEC_Y"], options["EVEN_C"]) == (8, 8, True)
    assert (options["SPLIT"], options["PRECISION"]) == (True, "ieee")
    assert options["num_warps"] == config.num_warps
    assert options["num_stages"] == config.num_stages
    assert options.get("maxnreg") == config.register_limit


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_operands_are_rounded_only_where_pytorch_allows_it(
    tf32, recorder, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "allow_tf32", lambda: tf32)
    x = torch.empty(1, 32, 4, 4)
    vectors = [torch.empty(32)]
    aspp.aspp_branches(x, [torch.empty(32, 32, 3, 3)], vectors, vectors, [1])
    conv.conv_bn_act(x, torch.empty(32, 32, 1, 1), *vectors * 2)
    for made in (recorder.launches[0], recorder.launches[-1]):
        assert made.options["PRECISION"] == ("tf32" if tf32 else "ieee")


def test_a_grid_that_cuda_does_not_have() -> None:
    with pytest.raises(ValueError, match="split the batch"):
        launch.grid(2**31)


@pytest.mark.parametrize(
    "out",
    [
        pytest.param(torch.empty(1, 4, 3, 3), id="nchw"),
        pytest.param(
            torch.empty(1, 5, 3, 3).contiguous(memory_format=torch.channels_last), id="shape"
        ),
        pytest.param(
            torch.empty(1, 4, 3, 3, dtype=torch.float16, memory_format=torch.channels_last),
            id="dtype",
        ),
    ],
)
def test_out_that_does_not_fit(out: Tensor, recorder: Recorder) -> None:
    packed = PackedBranches.pack([torch.empty(4, 2, 3, 3)], [torch.empty(4)], [torch.empty(4)], [1])
    with pytest.raises(ValueError, match=r"expected torch.float32 \[1, 4, 3, 3\]"):
        aspp.aspp_branches_packed(torch.empty(1, 2, 3, 3), packed, out)
    assert not recorder.launches


@pytest.mark.parametrize(
    ("classes", "block"),
    [
        pytest.param(1, 16, id="what a matrix product takes"),
        pytest.param(21, 32, id="one block"),
        pytest.param(150, 32, id="several blocks, the last one short"),
    ],
)
def test_classes_behind_the_projection(classes: int, block: int, recorder: Recorder) -> None:
    args = (
        torch.empty(1, 4, 2, 2),
        torch.empty(1, 4),
        torch.empty(4, 8, 1, 1),
        *[torch.empty(4)] * 2,
    )
    y = aspp.aspp_project(*args, classifier=(torch.empty(classes, 4, 1, 1), torch.empty(classes)))
    assert y.shape == (1, classes, 2, 2)
    assert recorder.launches[-1].options["CLASSES"] == block


def test_without_triton_the_reason_and_the_error_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "missing_triton", lambda: "Triton is not installed")
    assert conv.product_reasons(branches_desc()) == ["Triton is not installed"]
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        conv.conv_bn_act(torch.empty(1, 2, 3, 3), torch.empty(4, 2, 1, 1), *[torch.empty(4)] * 2)
