"""Sum of class probabilities over scales and flips, for multi-scale inference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, Tuned, compiled, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Forms, Maker, Size, Step
from . import _upsample
from .common import check_device, check_dtype, check_map, needs_grad, triton_kernel

OP = "upsample_softmax_add"


def upsample_softmax_add(
    accumulator: Tensor, logits: Tensor, *, flip: bool = False, align_corners: bool = False
) -> Tensor:
    """Add the softmax of upsampled logits to an accumulator, in place.

        accumulator += mirror(softmax_c(interpolate(logits, (H, W))))

    where mirror reverses columns if `flip`: the logits are then those of the mirrored image.

    Args:
        accumulator: [N, C, H, W] fp32 (or fp64), any strides that give every element a place of
            its own, changed in place.
        logits: [N, C, h, w], fp16, bf16, fp32 or fp64, any strides.
        flip: the logits come from the left-right mirrored image.
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        The accumulator itself.

    Raises:
        ValueError, TypeError: shapes that do not fit, wrong dtype, or inputs that need gradients.

    Source: arXiv 1706.05587, section 4.1 (multi-scale inputs and left-right flips averaged).
    """
    _validate(accumulator, logits)
    if needs_grad(accumulator, logits):
        raise ValueError(f"{OP} has no gradient; call it under torch.no_grad()")
    torch.ops.deeplab_fast.upsample_softmax_add(accumulator, logits, flip, align_corners)
    return accumulator


def describe(
    accumulator: Tensor, logits: Tensor, *, flip: bool = False, align_corners: bool = False
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_softmax_add`."""
    _validate(accumulator, logits)
    return _describe(accumulator, logits, flip, align_corners)


def _validate(accumulator: Tensor, logits: Tensor) -> None:
    check_map(OP, "accumulator", accumulator)
    check_dtype(OP, "accumulator", accumulator, (torch.float32, torch.float64))
    check_map(OP, "logits", logits)
    check_device(OP, accumulator, logits=logits)
    if accumulator.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"{OP}: accumulator {list(accumulator.shape)} and logits {list(logits.shape)} "
            "differ in images or classes"
        )
    if any(
        stride == 0 and size > 1
        for stride, size in zip(accumulator.stride(), accumulator.shape, strict=True)
    ):
        raise ValueError(
            f"{OP}: elements of the accumulator {list(accumulator.shape)} with strides "
            f"{list(accumulator.stride())} share memory; pass a clone()"
        )


def _describe(accumulator: Tensor, logits: Tensor, flip: bool, align_corners: bool) -> OpDesc:
    return OpDesc.of(
        OP,
        logits,
        size=tuple(accumulator.shape[-2:]),
        accumulator_dtype=accumulator.dtype,
        flip=flip,
        align_corners=align_corners,
    )


def _run(accumulator: Tensor, logits: Tensor, flip: bool, align_corners: bool) -> None:
    desc = _describe(accumulator, logits, flip, align_corners)
    run(desc, accumulator, logits, flip, align_corners)


def _fake(accumulator: Tensor, logits: Tensor, flip: bool, align_corners: bool) -> None:
    return None


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    logits, flip = make.map(s.n, s.c, s.h, s.w), form == "flip"
    total = make.of(torch.float32).map(s.n, s.c, s.height, s.width).contiguous()
    desc = describe(total, logits, flip=flip)
    return [Step(form, s, (total, logits, flip, False), (VALUES,), desc, changed=0)]


def _pytorch(step: Step) -> Forms:
    total, logits, flip, align_corners = step.args

    def composed() -> Tensor:
        prob = _upsample.interpolated(logits, total.shape[-2:], align_corners).softmax(1)
        return total.add_(prob.flip(-1) if flip else prob)

    return {"interpolate, softmax, add": composed}


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "upsample_softmax_add(Tensor(a!) accumulator, Tensor logits, bool flip, "
                "bool align_corners) -> ()",
                _run,
                _fake,
            ),
        ),
        implementations=(
            on("reference", reference.upsample_softmax_add),
            on("cpu", compiled("_upsample_softmax_add_cpu"), _upsample.cpu_reasons),
            on("triton", triton_kernel("upsample", OP), _upsample.triton_reasons),
            on("cuda", compiled("_upsample_softmax_add_cuda"), _upsample.cuda_reasons),
        ),
        use=INFERENCE,
        examples=_upsample.examples(("plain", "flip"), _example, _pytorch),
        sources=_upsample.SOURCES,
        tuned=(Tuned(OP, OP, 20),),
    )
)
