"""Labels from low-resolution logits: bilinear upsampling, then argmax over classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, Tuned, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import LABELS, VALUES, Forms, Maker, Size, Step
from . import _upsample
from .common import check_map, check_size, triton_kernel

OP = "upsample_argmax"


def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    return_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Upsample logits bilinearly and take the most likely class of every pixel.

        full   = interpolate(logits, size, mode="bilinear", align_corners)   # [N, C, H, W]
        labels = argmax_c full                                               # first of equals
        prob   = exp(full[labels]) / sum_c exp(full[c])

    Labels of a softmax are those of its logits. The logits are interpolated, not the labels: taking
    labels first and resizing them costs accuracy at every boundary.

    Args:
        logits: [N, C, h, w], fp16, bf16, fp32 or fp64, any strides.
        size: (H, W) of the result, at any ratio to (h, w).
        align_corners: as in torch.nn.functional.interpolate.
        return_prob: also return the probability of the chosen class.

    Returns:
        labels [N, H, W], uint8 up to 256 classes, else int64; with `return_prob` also prob
        [N, H, W] in fp32 (fp64 for fp64 logits). Not differentiable.

    Raises:
        ValueError, TypeError: wrong rank, empty map, dtype or size; the message says which.
        BackendUnavailable: the backend chosen explicitly cannot run the call.

    Source: arXiv 1706.05587, section 4 (evaluation on upsampled logits).
    """
    height, width = _validate(logits, size)
    labels, prob = torch.ops.deeplab_fast.upsample_argmax(
        logits.detach(), height, width, align_corners, return_prob
    )
    return (labels, prob) if return_prob else labels


def describe(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    return_prob: bool = False,
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_argmax`."""
    return _describe(logits, *_validate(logits, size), align_corners, return_prob)


def _validate(logits: Tensor, size: Sequence[int]) -> tuple[int, int]:
    check_map(OP, "logits", logits)
    return check_size(OP, size)


def _describe(
    logits: Tensor, height: int, width: int, align_corners: bool, return_prob: bool
) -> OpDesc:
    return OpDesc.of(
        OP, logits, size=(height, width), align_corners=align_corners, return_prob=return_prob
    )


def _run(
    logits: Tensor, height: int, width: int, align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    desc = _describe(logits, height, width, align_corners, return_prob)
    return run(desc, logits, (height, width), align_corners, return_prob)


def _fake(
    logits: Tensor, height: int, width: int, align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    n, classes = logits.shape[:2]
    labels = logits.new_empty((n, height, width), dtype=reference.label_dtype(classes))
    prob_shape = (n, height, width) if return_prob else (0,)
    return labels, logits.new_empty(prob_shape, dtype=reference.compute_dtype(logits.dtype))


def _decomposed(
    logits: Tensor, height: int, width: int, align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    return reference.upsample_argmax(logits, (height, width), align_corners, return_prob)


def _cpu(
    logits: Tensor, size: tuple[int, int], align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.deeplab_fast._upsample_argmax_cpu(logits, *size, align_corners, return_prob)


def _cuda(
    logits: Tensor, size: tuple[int, int], align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.deeplab_fast._upsample_argmax_cuda(logits, *size, align_corners, return_prob)


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    logits, size, prob = make.map(s.n, s.c, s.h, s.w), (s.height, s.width), form == "return_prob"
    desc = describe(logits, size, return_prob=prob)
    kinds = (LABELS, VALUES) if prob else (LABELS,)
    return [Step(form, s, (logits, size, False, prob), kinds, desc)]


def _exact(step: Step) -> list[Tensor]:
    logits, size, align_corners, return_prob = step.args
    full = reference.upsample(logits, size, align_corners)
    return [full, full.softmax(1).amax(1)] if return_prob else [full]


def _pytorch(step: Step) -> Forms:
    logits, size, align_corners, return_prob = step.args

    def composed() -> Tensor | tuple[Tensor, Tensor]:
        full = _upsample.interpolated(logits, size, align_corners)
        labels = full.argmax(1)
        return (labels, full.softmax(1).amax(1)) if return_prob else labels

    return {"interpolate, argmax": composed}


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "upsample_argmax(Tensor logits, SymInt height, SymInt width, bool align_corners, "
                "bool return_prob) -> (Tensor, Tensor)",
                _run,
                _fake,
                _decomposed,
            ),
        ),
        implementations=(
            on("reference", reference.upsample_argmax),
            on("cpu", _cpu, _upsample.cpu_reasons),
            on("triton", triton_kernel("upsample", OP), _upsample.triton_reasons),
            on("cuda", _cuda, _upsample.cuda_reasons),
        ),
        use=INFERENCE,
        examples=_upsample.examples(("plain", "return_prob"), _example, _pytorch, _exact),
        sources=_upsample.SOURCES,
        tuned=(Tuned(OP, OP, 20),),
    )
)
