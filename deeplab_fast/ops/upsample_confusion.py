"""Confusion matrix of upsampled predictions against labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, reference
from . import _upsample
from ._registry import check_map, check_target, define

OP = "upsample_confusion"


def upsample_confusion(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """Count, for every pair of classes, the pixels of one that were predicted as the other.

        M[i, j] = #{pixels: target = i, argmax_c interpolate(logits)[c] = j, target != ignore_index}

    Args:
        logits: [N, C, h, w], fp16, bf16, fp32 or fp64, any strides.
        target: labels [N, H, W], uint8, int32 or int64.
        ignore_index: label that is not counted.
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        [C, C] int64, exact; rows are the target. Matrices of batches add up.

    Raises:
        ValueError, TypeError: wrong rank, dtype or size, or a label outside [0, C) that is not
            ignore_index, with its value and position. On CUDA such a label counts as ignored; with
            DEEPLAB_FAST_STRICT_LABELS=1 in the environment every call waits for its result and
            raises.

    Source: arXiv 1706.05587, section 4 (mean intersection over union).
    """
    _validate(logits, target)
    return torch.ops.deeplab_fast.upsample_confusion(
        logits.detach(), target, ignore_index, align_corners
    )


def describe(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> backends.OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_confusion`."""
    _validate(logits, target)
    return _describe(logits, target, ignore_index, align_corners)


def _validate(logits: Tensor, target: Tensor) -> None:
    check_map(OP, "logits", logits)
    check_target(OP, logits, target)


def _describe(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> backends.OpDesc:
    return backends.OpDesc.of(
        OP,
        logits,
        size=tuple(target.shape[-2:]),
        target_dtype=target.dtype,
        align_corners=align_corners,
    )


def _run(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    desc = _describe(logits, target, ignore_index, align_corners)
    return backends.run(desc, logits, target, ignore_index, align_corners)


def _fake(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    classes = logits.shape[1]
    return logits.new_empty((classes, classes), dtype=torch.int64)


def _cuda(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    matrix, bad = torch.ops.deeplab_fast._upsample_confusion_cuda(
        logits, target, ignore_index, align_corners
    )
    _upsample.report_bad_labels(bad, target, logits.shape[1], ignore_index)
    return matrix


define(
    "upsample_confusion(Tensor logits, Tensor target, int ignore_index, bool align_corners) "
    "-> Tensor",
    _run,
    _fake,
)
backends.register(OP, "reference", reference.upsample_confusion)
backends.register(OP, "cpu", _upsample.private("_upsample_confusion_cpu"), _upsample.cpu_reasons)
backends.register(OP, "triton", _upsample.triton(OP), _upsample.triton_reasons)
backends.register(OP, "cuda", _cuda, _upsample.cuda_reasons)
