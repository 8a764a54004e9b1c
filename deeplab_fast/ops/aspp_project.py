"""The ASPP's projection: 1x1 convolution of the branches and the pooled vector, BN, ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import _aspp_cuda, _cpu_conv
from ._aspp_triton import kernel as triton_kernel
from ._registry import (
    FLOAT_DTYPES,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    define,
    needs_grad,
    once_differentiable,
)

OP = "aspp_project"


def aspp_project(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """y = relu(scale * (W . concat(branches, upsample(pooled))) + shift), without the concat.

    Projecting a concat is a sum of products, and the upsampling of a 1x1 map is constant, so with
    W = (W_branches, W_pooled) the pooled branch is a bias for each image:

        y[n, :, p] = relu(scale * (W_branches . branches[n, :, p] + W_pooled . pooled[n]) + shift)

    Args:
        branches: [N, B, H, W], fp16, bf16, fp32 or fp64, any strides.
        pooled: [N, P], the image-pooling branch after its own convolution, BN and ReLU.
        weight: [K, B + P, 1, 1], the dtype of branches, input channels in the order of the concat.
        scale, shift: [K], fp32 (fp64 for fp64 branches): the folded batch norm.

    Returns:
        [N, K, H, W], the dtype of branches, channels_last; accumulated in fp32 (fp64 for fp64) and
        rounded once. Differentiable once, to every tensor. Under autocast branches, pooled and
        weight are cast, scale and shift are not.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: arXiv 1706.05587, section 3.3 (image-level features; 1x1 convolution of the concat).
    """
    branches, pooled, weight = autocast(branches, pooled, weight)
    _validate(branches, pooled, weight, scale, shift)
    args = (branches, pooled, weight, scale, shift)
    if needs_grad(*args):
        return _AsppProject.apply(*args)
    return torch.ops.deeplab_fast.aspp_project(*args)


def describe(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> backends.OpDesc:
    """What a choice of backend rests on, for the arguments of `aspp_project`."""
    _validate(branches, pooled, weight, scale, shift)
    return _describe(branches, pooled, weight)


class _AsppProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        y = torch.ops.deeplab_fast.aspp_project(branches, pooled, weight, scale, shift)
        ctx.save_for_backward(y, branches, pooled, weight, scale)
        ctx.dtypes = [t.dtype for t in (branches, pooled, weight, scale, shift)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        grads = torch.ops.deeplab_fast.aspp_project_backward(grad, *ctx.saved_tensors)
        return tuple(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


def _validate(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> None:
    check_map(OP, "branches", branches)
    n, channels = branches.shape[:2]
    if pooled.dim() != 2 or pooled.shape[0] != n:
        raise ValueError(
            f"{OP}: pooled has shape {list(pooled.shape)}, expected [{n}, P], a vector for each "
            "image; flatten a [N, P, 1, 1] map with .flatten(1)"
        )
    check_map(OP, "weight", weight)
    for name, tensor in (("pooled", pooled), ("weight", weight)):
        check_dtype(OP, name, tensor, (branches.dtype,))
    outputs = weight.shape[0]
    expected = (outputs, channels + pooled.shape[1], 1, 1)
    check_shape(OP, "weight", weight, expected, "input channels of branches, then of pooled")
    for name, vector in (("scale", scale), ("shift", shift)):
        check_shape(OP, name, vector, (outputs,), "one value for each output channel")
        check_dtype(OP, name, vector, FLOAT_DTYPES)
    check_device(OP, branches, pooled=pooled, weight=weight, scale=scale, shift=shift)


def _describe(branches: Tensor, pooled: Tensor, weight: Tensor) -> backends.OpDesc:
    return backends.OpDesc.of(OP, branches, pooled=pooled.shape[1], outputs=weight.shape[0])


def _run(branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    desc = _describe(branches, pooled, weight)
    return backends.run(desc, branches, pooled, weight, scale, shift)


def _fake(branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    n, _, height, width = branches.shape
    return torch.empty(
        (n, weight.shape[0], height, width),
        dtype=branches.dtype,
        device=branches.device,
        memory_format=torch.channels_last,
    )


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(g.contiguous() for g in reference.aspp_project_backward(*args))


def _fake_backward(
    grad: Tensor, y: Tensor, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(branches.dtype)
    shapes = (branches.shape, pooled.shape, weight.shape, scale.shape, scale.shape)
    return tuple(branches.new_empty(shape, dtype=dtype) for shape in shapes)


define(
    "aspp_project(Tensor branches, Tensor pooled, Tensor weight, Tensor scale, Tensor shift) "
    "-> Tensor",
    _run,
    _fake,
)
define(
    "aspp_project_backward(Tensor grad, Tensor y, Tensor branches, Tensor pooled, Tensor weight, "
    "Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
backends.register(OP, "reference", reference.aspp_project)
# Behind PyTorch: weights given to a call are prepared for that call alone, which took longer than
# it saved (suite quick, aspp_project/os16-33x33-b1: 0.9x PyTorch's). Models prepare theirs once.
backends.register(OP, "cpu", _cpu_conv.aspp_project, _cpu_conv.reasons, priority=-1)
backends.register(
    OP, "triton", triton_kernel("aspp", "aspp_project"), triton_kernel("aspp", "project_reasons")
)
backends.register(OP, "cuda", _aspp_cuda.aspp_project, _aspp_cuda.reasons, _aspp_cuda.PRIORITY)
