"""The host side of the kernels of the ASPP's convolutions in training: reasons, candidates,
launches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from deeplab_fast.kernels import aspp_training, launch

from deeplab_fast import backends
from deeplab_fast.backends import OpDesc
from deeplab_fast.plan.device import A100, H100
from deeplab_fast.plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, aspp_dgrad_candidates
from deeplab_fast.plan.taps import Branch

OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever this process was started with."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def convs_desc(op="aspp_convs", shape=(16, 2048, 65, 65), branches=OS8, **changes) -> OpDesc:
    params = {
        "weights": tuple((b.channels, shape[1], b.kernel, b.kernel) for b in branches),
        "dilations": tuple(b.dilation for b in branches),
    }
    return replace(OpDesc(op, "cuda", torch.bfloat16, shape, params, (9, 0)), **changes)


@pytest.mark.parametrize(
    "desc,expected",
    [
        pytest.param(convs_desc(), [], id="forward-runs"),
        pytest.param(convs_desc(shape=(0, 8, 5, 5)), [], id="forward-of-nothing"),
        pytest.param(convs_desc(dtype=torch.float64), ["accumulates in float32"], id="float64"),
        pytest.param(convs_desc(device="cpu", capability=None), ["is on cpu"], id="cpu"),
        pytest.param(convs_desc(shape=(2**20, 8, 64, 64)), ["at most 2147483647"], id="pixels"),
        pytest.param(convs_desc("aspp_convs_backward"), [], id="backward-runs"),
        pytest.param(
            convs_desc("aspp_convs_backward", capability=(7, 5)), ["has 7.5"], id="backward-old-gpu"
        ),
    ],
)
def test_reasons(desc: OpDesc, expected: list[str]) -> None:
    implementation = backends.implementations(desc.op)["triton"]
    reasons = implementation.not_supported_reasons(desc)
    assert len(reasons) == len(expected)
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason


@pytest.mark.parametrize("device", [H100, A100], ids=lambda d: d.name)
@pytest.mark.parametrize("math", [MMA_16BIT, MMA_TF32, FMA_FP32])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_dgrad_keeps_registers_for_places_of_pixels(device, math, aligned) -> None:
    found = aspp_dgrad_candidates(math, device, None, aligned)
    assert found and {c.split for c in found} == {False, True} and len(set(found)) == len(found)
    itemsize = 2 if math == MMA_16BIT else 4
    for c in found:
        accumulator = c.block_m * c.block_n // (32 * c.num_warps)
        assert accumulator < 128 or c.num_warps == 8
        assert c.max_registers > accumulator and c.is_legal(itemsize, device)


class Recorder:
    """Stands for the module of kernels; keeps the launches as (kernel, grid, options)."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getattr__(self, kernel: str):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.launches.append((kernel, grid, options))

        return Kernel()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "device_module", lambda name: recorder)
    monkeypatch.setattr(launch, "on_device", lambda x: nullcontext())
    return recorder


def test_launches(recorder: Recorder) -> None:
    """At batch 1 tiles of the map are cut, those of the filters are not."""
    shape = (1, 2048, 33, 33)
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weights = [torch.empty(b.channels, 2048, b.kernel, b.kernel).bfloat16() for b in OS16]
    dilations = [b.dilation for b in OS16]
    y, mean, variance = aspp_training.aspp_convs(x, weights, dilations, True)
    assert mean.shape == variance.shape == (1024,)
    aspp_training.aspp_convs_backward(y, x, weights, dilations, True, True)
    assert [kernel for kernel, _, _ in recorder.launches] == [
        "aspp_convs_kernel", "aspp_convs_sum_kernel", "aspp_stats_kernel",
        "aspp_dgrad_kernel", "aspp_dgrad_sum_kernel", "aspp_wgrad_kernel",
    ]  # fmt: skip
    forward, _, stats, dgrad, _, wgrad = recorder.launches
    assert stats[1] == (4 * 256 // 16,)
    for _, grid, options in (forward, dgrad, wgrad):
        assert grid == (H100.multiprocessors,)
        assert options["VEC_X"] == 8 and options["PRECISION"] == "ieee"
        assert (options["BLOCK_M"], options["BLOCK_N"], options["num_warps"]) == (128, 256, 8)
    assert forward[2]["STATS"] and forward[2]["SPLIT"] and dgrad[2]["SPLIT"]
    assert dgrad[2]["EVEN_K"] and dgrad[2]["EVEN_C"]
    assert not wgrad[2]["SPLIT"] and not wgrad[2]["WIDE"]


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_operands_are_rounded_only_where_pytorch_allows_it(
    tf32, recorder, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "allow_tf32", lambda: tf32)
    x, weights = torch.empty(1, 32, 4, 4), [torch.empty(32, 32, 3, 3)]
    y, *_ = aspp_training.aspp_convs(x, weights, [1], False)
    aspp_training.aspp_convs_backward(y, x, weights, [1], True, True)
    found = [options["PRECISION"] for _, _, options in recorder.launches if "PRECISION" in options]
    assert found == ["tf32" if tf32 else "ieee"] * 3


def test_distances_beyond_int32_are_counted_in_64_bits() -> None:
    near = torch.empty(3, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    far = torch.empty_strided((3, 8, 4, 4), (2**30, 1, 32, 8), device="meta")
    assert not aspp_training._is_wide(near, 1)
    assert aspp_training._is_wide(far, 1) and not aspp_training._is_wide(far, 8)


def test_the_launchers_do_not_hold_triton() -> None:
    assert not hasattr(aspp_training, "triton")
    assert not any(
        getattr(value, "__name__", "").endswith("aspp_training_kernels")
        for value in vars(aspp_training).values()
    )
