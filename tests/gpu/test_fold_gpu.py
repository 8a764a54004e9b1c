"""fold_filters on a GPU: what its declared examples do not reach.

The Triton kernel and PyTorch's form both make one product in float32 and round it once, so that
their bits are the same.
"""

from __future__ import annotations

import pytest
import torch
from gpu_harness import (
    DEVICE,
    assert_same,
    every_dtype,
    needs_two_devices,
    on_a_busy_stream,
    replayed,
)
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast import ops
from deeplab_fast.plan import fold
from deeplab_fast.testing import deterministic

LAYERS = [(64, 3, 7, 7), (40, 24, 3, 3), (33, 1, 3, 3), (21, 64, 1, 1), (5, 7, 2, 3)]
LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "strided": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "4 bytes off": lambda w: torch.cat([w.new_zeros(4 // w.itemsize), w.flatten()])[
        4 // w.itemsize :
    ].view_as(w),
}


def make(layers, dtype: torch.dtype, device: str = DEVICE) -> tuple[list[Tensor], Tensor]:
    weights = [torch.randn(shape, device=device).to(dtype) for shape in layers]
    return weights, torch.rand(sum(shape[0] for shape in layers), device=device) + 0.5


def folded(backend: str, weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    with dlf.use_backend(backend), deterministic():
        return ops.fold_filters(weights, scale, dtype)


def check(weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> None:
    expected = folded("reference", weights, scale, dtype)
    assert_same(folded("triton", weights, scale, dtype), expected)


@every_dtype
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_dtypes(dtype, to, layout) -> None:
    weights, scale = make(LAYERS, dtype)
    check([layout(w) for w in weights], scale, to)


@every_dtype
def test_all_filters_of_a_model(dtype) -> None:
    model = dlf.get_model("deeplabv3_resnet50")
    layers = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    check(*make(layers, dtype), torch.bfloat16)


def test_many_layers() -> None:
    check(*make([(3, 5, 3, 3), (8, 8, 1, 1)] * 500, torch.float32), torch.bfloat16)


def test_a_graph_reads_what_filters_hold_when_it_is_replayed() -> None:
    """Also where the tables of other calls have displaced its own meanwhile."""
    weights, scale = make(LAYERS, torch.float32)

    def change() -> None:
        for w in weights:
            w.mul_(-2)
        scale.add_(1)
        others = [make(LAYERS, torch.float32) for _ in range(fold.MOST_TABLES + 1)]
        for given in others:
            folded("triton", *given, torch.float32)

    with dlf.use_backend("triton"):
        got = replayed(lambda: ops.fold_filters(weights, scale, torch.bfloat16), change)
    assert_same(got, folded("reference", weights, scale, torch.bfloat16))


def test_new_filters_in_a_capture() -> None:
    weights, scale = make([(8, 4, 3, 3)], torch.float32)
    graph = torch.cuda.CUDAGraph()
    with dlf.use_backend("triton"), pytest.raises(RuntimeError, match="run the op once"):
        with torch.cuda.graph(graph):
            ops.fold_filters(weights, scale, torch.float32)


def test_current_stream() -> None:
    weights, scale = make(LAYERS, torch.float32)
    expected = folded("reference", weights, scale, torch.float32)
    folded("triton", weights, scale, torch.float32)
    got = on_a_busy_stream(lambda: folded("triton", weights, scale, torch.float32), weights[1])
    assert_same(got, expected)


@needs_two_devices
def test_second_device() -> None:
    check(*make(LAYERS, torch.float32, "cuda:1"), torch.float32)
