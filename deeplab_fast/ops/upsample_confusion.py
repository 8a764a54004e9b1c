"""Confusion matrix of upsampled predictions against labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import TRAINING, Function, Op, Tuned, compiled, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import COUNTS, IGNORED, Forms, Maker, Size, Step
from . import _upsample
from .common import check_map, check_target, triton_kernel

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
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_confusion`."""
    _validate(logits, target)
    return _describe(logits, target, ignore_index, align_corners)


def _validate(logits: Tensor, target: Tensor) -> None:
    check_map(OP, "logits", logits)
    check_target(OP, logits, target)


def _describe(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> OpDesc:
    return OpDesc.of(
        OP,
        logits,
        size=tuple(target.shape[-2:]),
        target_dtype=target.dtype,
        align_corners=align_corners,
    )


def _run(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    desc = _describe(logits, target, ignore_index, align_corners)
    return run(desc, logits, target, ignore_index, align_corners)


def _fake(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    classes = logits.shape[1]
    return logits.new_empty((classes, classes), dtype=torch.int64)


def _cuda(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
    matrix, bad = torch.ops.deeplab_fast._upsample_confusion_cuda(
        logits, target, ignore_index, align_corners
    )
    _upsample.report_bad_labels(bad, target, logits.shape[1], ignore_index)
    return matrix


def _example(make: Maker, form: str, size: Size) -> list[Step]:
    logits, target = _upsample.example(make, size)
    args = (logits, target, IGNORED, False)
    return [Step(form, size, args, (COUNTS,), describe(logits, target))]


def _pytorch(step: Step) -> Forms:
    logits, target, ignored, align_corners = step.args
    classes = logits.shape[1]

    def composed() -> Tensor:
        labels = _upsample.interpolated(logits, target.shape[-2:], align_corners).argmax(1)
        # Without a selection, whose size the host would wait for: ignored pixels go to a row more.
        rows = torch.where(target == ignored, classes, target)
        pairs = (rows * classes + labels).flatten()
        return torch.bincount(pairs, minlength=classes * (classes + 1))[: classes**2].view(
            classes, classes
        )

    return {"interpolate, argmax, bincount": composed}


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "upsample_confusion(Tensor logits, Tensor target, int ignore_index, "
                "bool align_corners) -> Tensor",
                _run,
                _fake,
            ),
        ),
        implementations=(
            on("reference", reference.upsample_confusion),
            on("cpu", compiled("_upsample_confusion_cpu"), _upsample.cpu_reasons),
            on("triton", triton_kernel("upsample", OP), _upsample.triton_reasons),
            on("cuda", _cuda, _upsample.cuda_reasons),
        ),
        use=TRAINING,
        # PyTorch's bincount asks the device for the largest value.
        examples=_upsample.examples(("plain",), _example, _pytorch, capturable=False),
        sources=_upsample.SOURCES,
        tuned=(Tuned(OP, OP, 20),),
    )
)
