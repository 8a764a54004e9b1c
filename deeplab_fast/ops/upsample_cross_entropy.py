"""Cross entropy of bilinearly upsampled logits against full-resolution labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, reference
from ._registry import check_device, check_map, check_shape, check_target, define, needs_grad

OP = "upsample_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Cross entropy on upsampled logits, without ever holding them.

        full = interpolate(logits, (H, W), mode="bilinear", align_corners)
        loss = torch.nn.functional.cross_entropy(full, target, weight, ignore_index=...,
                                                 label_smoothing=..., reduction=...)

    Args:
        logits: [N, C, h, w], fp16, bf16, fp32 or fp64, any strides; accumulation is fp32 (fp64 for
            fp64). Gradients flow to them, and only to them.
        target: labels [N, H, W], uint8, int32 or int64.
        weight: [C] class weights, or None for ones.
        ignore_index: label whose pixels count for nothing.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the weights of the pixels that are not ignored; nan where there are
            none), "sum", or "none" for [N, H, W] with 0 at ignored pixels, for hard-pixel mining.
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        The loss in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, TypeError: wrong rank, dtype, size, reduction or smoothing, or a label outside
            [0, C) that is not ignore_index, with its value and position.
        RuntimeError: a second derivative is asked for; there is none.

    Source: arXiv 1706.05587, section 4.1 ("Upsampling logits": the labels are kept at full size).
    """
    _validate(logits, target, weight, label_smoothing, reduction)
    args = (logits, target, weight, ignore_index, label_smoothing, reduction, align_corners)
    if needs_grad(logits):
        return _UpsampleCrossEntropy.apply(*args)
    return torch.ops.deeplab_fast.upsample_cross_entropy(*args)


def describe(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> backends.OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_cross_entropy`."""
    _validate(logits, target, weight, label_smoothing, reduction)
    return _describe(logits, target, reduction)


class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        align_corners: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight)
        ctx.options = (ignore_index, label_smoothing, reduction, align_corners)
        return torch.ops.deeplab_fast.upsample_cross_entropy(logits, target, weight, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_logits = torch.ops.deeplab_fast.upsample_cross_entropy_backward(
            grad, *ctx.saved_tensors, *ctx.options
        )
        return grad_logits, None, None, None, None, None, None


def _validate(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    check_map(OP, "logits", logits)
    check_target(OP, logits, target)
    if weight is not None:
        check_shape(OP, "weight", weight, (logits.shape[1],), "one weight for each class")
        check_device(OP, logits, weight=weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")


def _describe(logits: Tensor, target: Tensor, reduction: str) -> backends.OpDesc:
    return backends.OpDesc.of(
        OP,
        logits,
        size=tuple(target.shape[-2:]),
        target_dtype=target.dtype,
        reduction=reduction,
    )


def _run(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    return backends.run(
        _describe(logits, target, reduction),
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        reduction,
        align_corners,
    )


def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    shape = target.shape if reduction == "none" else ()
    return logits.new_empty(shape, dtype=reference.compute_dtype(logits.dtype))


def _fake_backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_OPTIONS = (
    "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "str reduction, bool align_corners"
)
define(f"upsample_cross_entropy({_OPTIONS}) -> Tensor", _run, _fake)
define(
    f"upsample_cross_entropy_backward(Tensor grad, {_OPTIONS}) -> Tensor",
    reference.upsample_cross_entropy_backward,
    _fake_backward,
)
backends.register(OP, "reference", reference.upsample_cross_entropy)
