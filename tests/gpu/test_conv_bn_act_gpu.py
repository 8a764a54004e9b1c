"""conv_bn_act by cuDNN on a GPU: sizes of the backbone, layouts, graphs, what cuDNN cannot fuse.

The oracle is `deeplab_fast.reference` in float64. A result passes when its largest error is at most
twice that of PyTorch's own convolution, batch norm and ReLU in the same dtype on the same values,
plus one rounding of the largest result.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_harness import (
    DEVICE,
    HALF_STEP,
    assert_as_good,
    channels_last,
    conv_bn,
    every_dtype,
    half_dtypes,
    peak_memory,
    replayed,
    use_backend,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import backends, ops, reference
from deeplab_fast.ops import _cudnn
from deeplab_fast.testing import deterministic, tf32


def make(shape, k, size, dtype, groups=1, nchw=False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, scale, shift."""
    layout = torch.contiguous_format if nchw else torch.channels_last
    c = shape[1] // groups
    x = torch.randn(shape, device=DEVICE).relu().to(dtype)
    weight = torch.randn(k, c, size, size, device=DEVICE) / (c * size * size) ** 0.5
    return (
        x.contiguous(memory_format=layout),
        weight.to(dtype).contiguous(memory_format=layout),
        torch.rand(k, device=DEVICE) + 0.5,
        torch.randn(k, device=DEVICE) / 4,
    )


def assert_conv_as_good(got: Tensor, tensors, residual=None, act="relu", **options) -> None:
    """The rule above."""
    doubles = [None if t is None else t.double() for t in (*tensors, residual)]
    exact = reference.conv_bn_act(*doubles[:4], **options, residual=doubles[4], act=act)
    assert_as_good(got, conv_bn(*tensors, residual, act is not None, **options), exact)


@every_dtype
@pytest.mark.parametrize(
    ("shape", "k", "size", "options", "residual", "act"),
    [
        pytest.param(
            (2, 3, 513, 513), 64, 7, {"stride": 2, "padding": 3}, False, "relu", id="stem"
        ),
        pytest.param((2, 64, 129, 129), 64, 3, {"padding": 1}, False, "relu", id="layer1-3x3"),
        pytest.param((2, 64, 129, 129), 64, 3, {"padding": 1}, True, "relu", id="basic-block"),
        pytest.param(
            (2, 128, 129, 129), 128, 3, {"stride": 2, "padding": 1}, False, "relu", id="stride-2"
        ),
        pytest.param(
            (1, 512, 65, 65), 512, 3, {"padding": 4, "dilation": 4}, False, "relu", id="dilation-4"
        ),
        pytest.param((2, 512, 65, 65), 2048, 1, {}, True, "relu", id="1x1-expand"),
        pytest.param((2, 256, 129, 129), 512, 1, {"stride": 2}, False, None, id="shortcut"),
        pytest.param((2, 64, 33, 33), 64, 3, {"padding": 1}, True, None, id="sum-without-relu"),
        pytest.param(
            (2, 96, 65, 65), 96, 3, {"padding": 1, "groups": 96}, False, "relu", id="depthwise"
        ),
        pytest.param(
            (2, 128, 33, 33), 128, 3, {"padding": 1, "groups": 4}, True, "relu", id="groups-4"
        ),
        pytest.param((3, 35, 7, 5), 21, 3, {"padding": 1}, True, "relu", id="odd-channels"),
        pytest.param((2, 1, 8, 8), 1, 1, {}, True, "relu", id="single-channels"),
        pytest.param((2, 64, 1, 1), 32, 1, {}, False, "relu", id="map-of-one-pixel"),
    ],
)
def test_error(shape, k, size, options, residual, act, dtype: torch.dtype) -> None:
    tensors = make(shape, k, size, dtype, options.get("groups", 1))
    z = torch.randn_like(F.conv2d(*tensors[:2], **options)) if residual else None
    with dlf.use_backend("cuda"):
        got = ops.conv_bn_act(*tensors, **options, residual=z, act=act)
    assert_conv_as_good(got, tensors, z, act, **options)


@every_dtype
def test_it_runs_by_itself_in_one_fused_kernel(dtype: torch.dtype, monkeypatch) -> None:
    kernels: dict[tuple[object, ...], bool] = {}
    monkeypatch.setattr(_cudnn, "_has_kernel", kernels)
    tensors = make((2, 256, 33, 33), 256, 3, dtype)
    assert backends.why("conv_bn_act", *tensors, padding=1).chosen == "cuda"
    z = torch.randn_like(tensors[0])
    ops.conv_bn_act(*tensors, padding=1, residual=z)
    assert list(kernels.values()) == [True]


@pytest.mark.parametrize("residual", [False, True])
def test_layouts_give_the_same(residual: bool) -> None:
    tensors = make((2, 64, 33, 31), 48, 3, torch.bfloat16)
    z = torch.randn(2, 48, 33, 31, device=DEVICE).bfloat16() if residual else None
    nchw = [t.contiguous() for t in tensors]
    strided = torch.stack([tensors[0], tensors[0]], -1)[..., 0]
    last = None if z is None else channels_last(z)
    with dlf.use_backend("cuda"):
        expected = ops.conv_bn_act(*tensors, padding=1, residual=last)
        for given in (nchw, [strided, *tensors[1:]]):
            assert torch.equal(ops.conv_bn_act(*given, padding=1, residual=z), expected)


def test_an_empty_batch() -> None:
    x, *rest = make((2, 64, 9, 9), 32, 3, torch.float16)
    with dlf.use_backend("cuda"):
        assert ops.conv_bn_act(x[:0], *rest).shape == (0, 32, 7, 7)


def test_tf32_follows_pytorch() -> None:
    tensors = make((2, 512, 33, 33), 256, 3, torch.float32)
    with dlf.use_backend("cuda"):
        exact = ops.conv_bn_act(*tensors, padding=1)
        with tf32(True):
            rounded = ops.conv_bn_act(*tensors, padding=1)
            assert_conv_as_good(rounded, tensors, padding=1)
    assert not torch.equal(exact, rounded)


@every_dtype
def test_deterministic_calls_repeat_to_the_bit(dtype: torch.dtype) -> None:
    tensors = make((2, 256, 33, 33), 256, 3, dtype)
    with deterministic(), dlf.use_backend("cuda"):
        first, *others = (ops.conv_bn_act(*tensors, padding=1) for _ in range(5))
    assert all(torch.equal(first, y) for y in others)
    assert_conv_as_good(first, tensors, padding=1)


def test_in_a_cuda_graph() -> None:
    tensors = make((2, 64, 33, 33), 64, 3, torch.bfloat16)
    z = torch.randn_like(tensors[0])

    def run() -> list[Tensor]:
        return [ops.conv_bn_act(*tensors, padding=1, residual=z)]

    with dlf.use_backend("cuda"):
        [expected] = run()
        [got] = replayed(run, lambda: z.add_(1))
        # Values are those of the replay, not of the capture.
        assert torch.equal(got, *run())
    assert not torch.equal(got, expected)


def test_autocast_runs_in_half_precision() -> None:
    tensors = make((2, 64, 33, 33), 64, 3, torch.float32)
    with dlf.use_backend("cuda"), torch.autocast(DEVICE, torch.bfloat16):
        got = ops.conv_bn_act(*tensors, padding=1)
    x, weight, *vectors = tensors
    with dlf.use_backend("cuda"):
        half = ops.conv_bn_act(x.bfloat16(), weight.bfloat16(), *vectors, padding=1)
    assert torch.equal(got, half)


def test_gradients_agree_with_the_reference() -> None:
    grads = {}
    tensors = [t.requires_grad_() for t in make((2, 32, 17, 17), 48, 3, torch.float32)]
    for backend in ("reference", "cuda"):
        with dlf.use_backend(backend):
            y = ops.conv_bn_act(*tensors, padding=2, dilation=2)
            grads[backend] = torch.autograd.grad(y.square().sum(), tensors)
    for ours, theirs in zip(grads["cuda"], grads["reference"], strict=True):
        # fp32 sums in another order, squared once; a sign at 0 may change an activation's gradient.
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_compile_fullgraph() -> None:
    tensors = make((2, 64, 17, 17), 64, 3, torch.bfloat16)

    def call(*tensors: Tensor) -> Tensor:
        return ops.conv_bn_act(*tensors, padding=1)

    with dlf.use_backend("cuda"):
        compiled = torch.compile(call, fullgraph=True)
        assert torch.equal(compiled(*tensors), call(*tensors))


@half_dtypes
def test_half_precision_stays_in_half_precision(dtype: torch.dtype) -> None:
    """No copy of a map in fp32, of which the reference makes two at least."""
    tensors = make((16, 64, 129, 129), 64, 3, dtype)
    with dlf.use_backend("cuda"):
        y = ops.conv_bn_act(*tensors, padding=1)
        peak = peak_memory(lambda: ops.conv_bn_act(*tensors, padding=1))
    # The rest is the folded weight and cuDNN's workspace.
    assert peak <= 2 * y.nbytes


@half_dtypes
@pytest.mark.parametrize("classes", [21, 300], ids=["in one kernel", "more than a tile holds"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_classifier_behind_the_projection(backend, classes, dtype: torch.dtype) -> None:
    branches, weight, scale, shift = make((2, 1024, 33, 33), 256, 1, dtype)
    pooled = torch.rand(2, 256, device=DEVICE).to(dtype)
    weight = torch.cat([weight, weight[:, :256]], 1)
    class_weight = (torch.randn(classes, 256, device=DEVICE) / 16).to(dtype)
    bias = torch.randn(classes, device=DEVICE)
    args = (branches, pooled, weight, scale, shift)
    with use_backend(backend, optional=("triton", "cuda")):
        got = ops.aspp_project(*args, classifier=(class_weight, bias))
    with dlf.use_backend("reference"):
        doubles = [t.double() for t in (*args, class_weight, bias)]
        exact = ops.aspp_project(*doubles[:5], classifier=(doubles[5], doubles[6]))
    spread = pooled[:, :, None, None].expand(-1, -1, 33, 33)
    y = conv_bn(torch.cat([branches, spread], 1), weight, scale, shift)
    torch_error = F.conv2d(y, class_weight[:, :, None, None], bias.to(dtype)).double() - exact
    allowed = 2 * torch_error.abs().max() + exact.abs().max() * HALF_STEP[dtype]
    assert (got.double() - exact).abs().max() <= allowed
