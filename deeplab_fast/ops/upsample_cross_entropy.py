"""Cross entropy of bilinearly upsampled logits against full-resolution labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch.choice import select
from ..dispatch.declare import TRAINING, Function, Op, Tuned, compiled, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import IGNORED, VALUES, Forms, Maker, Run, Size, Step
from . import _upsample
from .common import (
    Context,
    check_device,
    check_map,
    check_shape,
    check_target,
    differentiable,
    needs_grad,
    triton_kernel,
)

OP = "upsample_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")
# weight, ignore_index, label_smoothing, reduction, align_corners
Options = tuple[Tensor | None, int, float, str, bool]


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
            [0, C) that is not ignore_index, with its value and position. On CUDA such a label
            counts as ignored; with DEEPLAB_FAST_STRICT_LABELS=1 in the environment every call
            waits for its result and raises.

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
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `upsample_cross_entropy`."""
    _validate(logits, target, weight, label_smoothing, reduction)
    return _describe(logits, target, reduction)


@dataclass(frozen=True)
class CrossEntropy:
    """The three functions of one backend; one choice of backend serves all of them.

    Attributes:
        forward: the loss.
        with_grad: the loss and its gradient, for reduction "mean" or "sum".
        backward: the gradient times the gradient of the loss; the op needs it for "none" only.
    """

    forward: Callable[..., Tensor]
    with_grad: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]

    def __call__(self, *args: object) -> Tensor:
        return self.forward(*args)


class _Context(Context, Protocol):
    options: tuple[int, float, str, bool]
    dtype: torch.dtype


class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits: Tensor, target: Tensor, *given: *Options) -> Tensor:
        weight, *_, reduction, _ = given
        options = ctx.options = given[1:]
        ctx.dtype = logits.dtype
        if reduction == "none":
            ctx.save_for_backward(logits, target, weight)
            return torch.ops.deeplab_fast.upsample_cross_entropy(logits, target, weight, *options)
        loss, grad_logits = torch.ops.deeplab_fast.upsample_cross_entropy_with_grad(
            logits, target, weight, *options
        )
        ctx.save_for_backward(logits, target, weight, grad_logits)
        return loss

    @staticmethod
    @differentiable(
        lambda ctx: (reference.upsample_cross_entropy, (*ctx.saved_tensors[:3], *ctx.options))
    )
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.options[2] == "none":
            grad_logits = torch.ops.deeplab_fast.upsample_cross_entropy_backward(
                grad, *ctx.saved_tensors, *ctx.options
            )
        else:
            # Not in place: a retained graph comes here again.
            grad_logits = (ctx.saved_tensors[3] * grad).to(ctx.dtype)
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


def _describe(logits: Tensor, target: Tensor, reduction: str) -> OpDesc:
    return OpDesc.of(
        OP,
        logits,
        size=tuple(target.shape[-2:]),
        target_dtype=target.dtype,
        reduction=reduction,
    )


def _implementation(logits: Tensor, target: Tensor, reduction: str) -> CrossEntropy:
    return cast(CrossEntropy, select(_describe(logits, target, reduction)).run)


def _run(logits: Tensor, target: Tensor, *options: *Options) -> Tensor:
    return _implementation(logits, target, options[3]).forward(logits, target, *options)


def _run_with_grad(logits: Tensor, target: Tensor, *options: *Options) -> tuple[Tensor, Tensor]:
    return _implementation(logits, target, options[3]).with_grad(logits, target, *options)


def _run_backward(grad: Tensor, logits: Tensor, target: Tensor, *options: *Options) -> Tensor:
    return _implementation(logits, target, options[3]).backward(grad, logits, target, *options)


def _cuda_entry(name: str) -> Run:
    """A private CUDA op, whose last result counts bad labels."""

    def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
        *results, bad = getattr(torch.ops.deeplab_fast, name)(*args)
        # The gradient comes first where there is one.
        logits, target, _, ignore_index = args[-7:-3]
        _upsample.report_bad_labels(bad, target, logits.shape[1], ignore_index)
        return results[0] if len(results) == 1 else tuple(results)

    return run


def _fake(logits: Tensor, target: Tensor, *options: *Options) -> Tensor:
    shape = target.shape if options[3] == "none" else ()
    return logits.new_empty(shape, dtype=reference.compute_dtype(logits.dtype))


def _fake_with_grad(logits: Tensor, target: Tensor, *options: *Options) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape, dtype=dtype)


def _fake_backward(grad: Tensor, logits: Tensor, target: Tensor, *options: *Options) -> Tensor:
    return logits.new_empty(logits.shape)


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    logits, target = _upsample.example(make, s)
    weight = make.vector(s.c)
    desc = describe(logits, target)
    pixels = make.vector(target.numel()).view(target.shape)

    def step(method: str, *args: object) -> Step:
        return Step(form, s, args, (VALUES, VALUES), desc, method)

    plain = (logits, target, None, IGNORED, 0.0, "mean", False)
    each = (logits, target, weight, IGNORED, 0.1, "none", False)
    return [
        step("with_grad", *plain),
        step("forward", *plain),
        step("with_grad", logits, target, weight, IGNORED, 0.1, "sum", True),
        step("forward", *each),
        step("backward", pixels, *each),
    ]


def _pytorch(step: Step) -> Forms:
    args = step.args[1:] if step.method == "backward" else step.args
    logits, target, weight, ignored, smoothing, reduction, align_corners = args

    def loss(x: Tensor) -> Tensor:
        full = _upsample.interpolated(x, target.shape[-2:], align_corners).float()
        return F.cross_entropy(
            full, target, weight, ignore_index=ignored, label_smoothing=smoothing,
            reduction=reduction,
        )  # fmt: skip

    def with_gradient() -> Tensor | tuple[Tensor, Tensor]:
        x = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(x)
            given = step.args[0] if step.method == "backward" else None
            (grad,) = torch.autograd.grad(value, x, given)
        return grad if step.method == "backward" else (value.detach(), grad)

    name = "interpolate, cross_entropy"
    return {name: (lambda: loss(logits)) if step.method == "forward" else with_gradient}


_OPTIONS = (
    "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "str reduction, bool align_corners"
)
_NAMES = (OP, f"{OP}_with_grad", f"{OP}_backward")
declare(
    Op(
        OP,
        describe,
        functions=(
            Function(f"{OP}({_OPTIONS}) -> Tensor", _run, _fake),
            Function(
                f"{OP}_with_grad({_OPTIONS}) -> (Tensor, Tensor)", _run_with_grad, _fake_with_grad
            ),
            Function(
                f"{OP}_backward(Tensor grad, {_OPTIONS}) -> Tensor", _run_backward, _fake_backward
            ),
        ),
        implementations=(
            on("reference", CrossEntropy(*(getattr(reference, name) for name in _NAMES))),
            on(
                "cpu",
                CrossEntropy(*(compiled(f"_{name}_cpu") for name in _NAMES)),
                _upsample.cpu_reasons,
            ),
            on(
                "triton",
                CrossEntropy(*(triton_kernel("upsample", name) for name in _NAMES)),
                _upsample.triton_reasons,
            ),
            on(
                "cuda",
                CrossEntropy(*(_cuda_entry(f"_{name}_cuda") for name in _NAMES)),
                _upsample.cuda_reasons,
            ),
        ),
        use=TRAINING,
        examples=_upsample.examples(("plain",), _example, _pytorch),
        sources=_upsample.SOURCES,
        tuned=(Tuned(OP, OP, 36, "with_grad"), Tuned(f"{OP}_forward", OP, 20, "forward")),
    )
)
