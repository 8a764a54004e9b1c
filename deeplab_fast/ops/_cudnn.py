"""conv_bn_act by cuDNN, in the dtype of its input: one fused kernel where cuDNN has one.

The scale is folded into the weight, in fp32, and rounded once with it:

    conv_bn_act = act(conv(x, round(scale * weight)) + shift + residual)

With a ReLU that is one launch, accumulated in fp32 and rounded once at the end
(`cudnn_convolution_relu`, `cudnn_convolution_add_relu`). Other calls are a convolution, whose
result is stored, and a pass over it for shift, residual and activation each. Either way errors stay
below those of PyTorch's own layers in that dtype, which round more results than these round weights
(fused, emulated on a CPU: 0.65 to 0.92 of their root mean square). A product scale * weight outside
float16's range (65504, and 6e-5 for its full precision) is lost in float16; bfloat16 has the range
of float32.

A fused kernel runs where it gives NaN for a bias of NaN, which the first call of a shape tries:
cuDNN leaves it to the kernel whether a ReLU keeps NaN, as PyTorch's does, or makes it 0.

Weights are folded anew at every call, so that nothing can be out of date; that is a pass over the
weight. fp32 follows torch.backends.cudnn.allow_tf32.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .. import reference
from ..dispatch import limits
from ..dispatch.describe import OpDesc

logger = logging.getLogger("deeplab_fast")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BFLOAT16_CAPABILITY = (8, 0)

# Stride, padding, dilation, each as [rows, columns], and groups.
Geometry = tuple[list[int], list[int], list[int], int]

# Calls that cuDNN has no fused kernel for that can be used (False); a search that fails takes long.
_has_kernel: dict[tuple[object, ...], bool] = {}


def reasons(desc: OpDesc) -> list[str]:
    """Why cuDNN cannot run a call of conv_bn_act; empty where it can."""
    found = limits.device(desc, "cuda")
    found += limits.dtype(desc, DTYPES, "takes float16, bfloat16 and float32")
    if desc.dtype == torch.bfloat16:
        found += limits.capability(desc, _BFLOAT16_CAPABILITY, "bfloat16")
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        found.append(f"PyTorch {torch.__version__} has no cuDNN")
    elif not torch.backends.cudnn.enabled:
        found.append("cuDNN is switched off (torch.backends.cudnn.enabled)")
    return found


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    residual: Tensor | None,
    act: str | None,
) -> Tensor:
    """As `ops.conv_bn_act`; x in fp16, bf16 or fp32."""
    x = x.contiguous(memory_format=torch.channels_last)
    folded, bias = fold(weight, scale), shift.to(x.dtype)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    may_fuse = act == "relu" and groups == 1 and x.numel() and not _deterministic()
    if may_fuse and has_fused(x, folded, bias, residual, geometry):
        return fused(x, folded, bias, residual, geometry)
    y = in_passes(x, folded, shift, residual, geometry)
    return (y.relu_() if act == "relu" else y).contiguous(memory_format=torch.channels_last)


def in_passes(
    x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, geometry: Geometry
) -> Tensor:
    """conv(x, weight) + shift + residual: each pass computes in fp32 and rounds to x's dtype.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S], the dtype of x.
        shift: [K], fp32.
        residual: the result's shape, or None.
        geometry: stride, padding, dilation, groups.
    """
    y = reference.convolution(x, weight, None, *geometry)
    # In place a sum is computed in the wider dtype.
    y += shift[:, None, None]
    if residual is not None:
        y += residual
    return y


def fold(weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight, rounded once to the weight's dtype, channels_last.

    Args:
        weight: [K, C / groups, R, S].
        scale: [K], any float dtype.
    """
    folded = torch.empty_like(weight, memory_format=torch.channels_last)
    # The product is made in the wider of both dtypes and rounded where it is stored.
    return torch.mul(weight, scale[:, None, None, None], out=folded)


def _deterministic() -> bool:
    # The fused kernels are chosen without regard to either setting.
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: Geometry
) -> Tensor:
    """relu(conv(x, weight) + bias + residual) in one kernel; `has_fused` says whether there is one.

    Args:
        x: [N, C, H, W], channels_last.
        weight: [K, C, R, S], the dtype of x.
        bias: [K], the dtype of x.
        residual: the result's shape, channels_last, or None.
        geometry: stride, padding, dilation, 1.
    """
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def has_fused(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: Geometry
) -> bool:
    """Whether cuDNN has a kernel for `fused` that keeps NaN; the first call of a shape tries it."""
    stride, padding, dilation, groups = geometry
    shapes = (tuple(x.shape), tuple(weight.shape), *stride, *padding, *dilation, groups)
    # What cuDNN's kernel is searched by.
    search = (limits.allow_conv_tf32(), torch.backends.cudnn.benchmark)
    key = (*shapes, residual is not None, x.dtype, x.device, *search)
    usable = _has_kernel.get(key)
    if usable is not None:
        return usable
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # Nothing can be read while a graph is captured.
        return False
    try:
        nan = torch.full_like(bias, float("nan"))
        usable = bool(fused(x, weight, nan, residual, geometry).isnan().all())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "unable to find an engine" not in text and "NOT_SUPPORTED" not in text:
            raise
        usable = False
    _has_kernel[key] = usable
    if not usable:
        logger.info(
            "conv_bn_act: cuDNN has no fused kernel that keeps NaN for %s by %s in %s; "
            "convolution, then sums",
            list(x.shape),
            list(weight.shape),
            x.dtype,
        )
    return usable
