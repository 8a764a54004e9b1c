"""A convolution without bias, as training needs it: PyTorch's, or ours where it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import Choices
from ..dispatch.declare import TRAINING, Function, Op, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Shapes, Size, Step, spread
from . import _cpu_conv
from .common import (
    LARGEST,
    Context,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_option,
    differentiable,
    is_option,
    needs_grad,
)

OP = "conv2d"
BACKWARD = "conv2d_backward"
# stride, padding, dilation, groups
Options = tuple[list[int], list[int], list[int], int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv(x, weight), as torch.nn.functional.conv2d without bias.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        weight: [K, C / groups, R, S], the dtype of x.
        stride, padding, dilation: an int, or (rows, columns), up to 2^31 - 1.
        groups: as in torch.nn.functional.conv2d.

    Returns:
        [N, K, H', W'], the dtype of x, channels_last. Under autocast x and weight are cast.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    x, weight = autocast(x, weight)
    options = _pair(stride), _pair(padding), _pair(dilation), groups
    _validate(x, weight, *options)
    if needs_grad(x, weight):
        return _Conv2d.apply(x, weight, *options)
    return torch.ops.deeplab_fast.conv2d(x, weight, *options)


def describe(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backward: bool = False,
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `conv2d`; of its backward pass to x
    and weight if `backward`."""
    options = _pair(stride), _pair(padding), _pair(dilation), groups
    _validate(x, weight, *options)
    if backward:
        return _describe(BACKWARD, x, weight, options, to_x=True, to_weight=True)
    return _describe(OP, x, weight, options)


class _Context(Context, Protocol):
    options: Options


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, *options: *Options) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.ops.deeplab_fast.conv2d(x, weight, *options)

    @staticmethod
    @differentiable(lambda ctx: (reference.conv2d, (*ctx.saved_tensors, *ctx.options)))
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = torch.ops.deeplab_fast.conv2d_backward(
            grad, x, weight, *ctx.options, to_x, to_weight
        )
        rest = [None] * len(ctx.options)
        return grad_x if to_x else None, grad_weight if to_weight else None, *rest


def _pair(value: int | Sequence[int]) -> list[int]:
    return list(value) if isinstance(value, Sequence) else [value, value]


def _validate(x: Tensor, weight: Tensor, *options: *Options) -> None:
    stride, padding, dilation, groups = options
    check_map(OP, "x", x)
    check_map(OP, "weight", weight)
    check_dtype(OP, "weight", weight, (x.dtype,))
    check_device(OP, x, weight=weight)
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in sizes.items():
        least = int(name != "padding")
        if len(pair) != 2 or not all(is_option(each, least) for each in pair):
            raise ValueError(
                f"{OP}: {name} must be an int or (rows, columns) from {least} to {LARGEST}, got "
                f"{tuple(pair)}"
            )
    check_option(OP, "groups", groups, 1)
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"{OP}: weight {list(weight.shape)} with groups={groups} does not fit x "
            f"{list(x.shape)}; expected [K, {x.shape[1]} / groups, R, S], K a multiple of groups"
        )
    if min(_output_shape(x, weight, stride, padding, dilation)[2:]) < 1:
        raise ValueError(
            f"{OP}: x {list(x.shape)} is smaller than the dilated kernel of weight "
            f"{list(weight.shape)} with dilation={tuple(dilation)}, padding={tuple(padding)}"
        )


def _output_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    height, width = (
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return x.shape[0], weight.shape[0], height, width


def _describe(op: str, x: Tensor, weight: Tensor, options: Options, **more: bool) -> OpDesc:
    stride, padding, dilation, groups = options
    return OpDesc.of(
        op,
        x,
        weight=tuple(weight.shape),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        **more,
    )


def run_conv(choices: Choices, x: Tensor, weight: Tensor, *options: *Options) -> Tensor:
    """`conv2d` within a function that calls several ops."""
    stride, padding, dilation, groups = options
    facts = (weight.shape, *stride, *padding, *dilation, groups)
    run = choices.of(OP, x, facts, lambda: _describe(OP, x, weight, options))
    return run(x, weight, *options).contiguous(memory_format=torch.channels_last)


def _run(x: Tensor, weight: Tensor, *options: *Options) -> Tensor:
    return run_conv(Choices(), x, weight, *options)


def output_like(x: Tensor, weight: Tensor, *options: *Options) -> Tensor:
    """A map of the shape, dtype, device and strides of `conv2d`'s result."""
    shape = _output_shape(x, weight, *options[:3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def run_conv_backward(
    choices: Choices,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *rest: *tuple[*Options, bool, bool],
) -> tuple[Tensor, Tensor]:
    """`conv2d_backward` within a function that calls several ops."""
    stride, padding, dilation, groups, to_x, to_weight = rest
    facts = (weight.shape, *stride, *padding, *dilation, groups, to_x, to_weight)
    run = choices.of(
        BACKWARD,
        x,
        facts,
        lambda: _describe(BACKWARD, x, weight, rest[:4], to_x=to_x, to_weight=to_weight),
    )
    grad_x, grad_weight = run(grad, x, weight, *rest)
    if to_x:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    if to_weight:
        grad_weight = grad_weight.contiguous(memory_format=weight_format(weight))
    return grad_x, grad_weight


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: *tuple[*Options, bool, bool]
) -> tuple[Tensor, Tensor]:
    return run_conv_backward(Choices(), grad, x, weight, *rest)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: *tuple[*Options, bool, bool]
) -> tuple[Tensor, Tensor]:
    *_, to_x, to_weight = rest
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if to_x else x.new_empty(0)
    grad_weight = x.new_empty(0)
    if to_weight:
        grad_weight = torch.empty_like(weight, memory_format=weight_format(weight))
    return grad_x, grad_weight


def weight_format(weight: Tensor) -> torch.memory_format:
    """The memory format of a weight, which its gradient gets."""
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


_SIZES = (
    Size(2, 40, 9, 11, filters=24),
    Size(2, 7, 9, 11, filters=5, rates=(2,)),
    # Depthwise.
    Size(2, 19, 9, 11, rates=(2,)),
    Size(1, 64, 33, 17, filters=256, stride=2),
)


def _works(shapes: Shapes) -> list[tuple[str, Size]]:
    return [("plain", size) for size in spread(shapes.pointwise)]


def _example(make: Maker, form: str, s: Size, backward: bool = False) -> list[Step]:
    # A 3x3 convolution where there is a rate, else a 1x1 one.
    rate = s.rates[0] if s.rates else 0
    filters, groups = (s.filters, 1) if s.filters else (s.c, s.c)
    x = make.map(s.n, s.c, s.h, s.w)
    weight = make.weight(filters, s.c // groups, 3 if rate else 1)
    stride, padding, dilation = pairs = [s.stride] * 2, [rate] * 2, [rate or 1] * 2
    desc = describe(
        x,
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        backward=backward,
    )
    if not backward:
        return [Step(form, s, (x, weight, *pairs, groups), (VALUES,), desc)]
    grad = make.map(*_output_shape(x, weight, *pairs))
    args = (grad, x, weight, *pairs, groups, True, True)
    return [Step(form, s, args, (VALUES, VALUES), desc)]


def _pytorch(step: Step) -> Forms:
    x, weight, *options = step.args
    return {"convolution": lambda: reference.convolution(x, weight, None, *options)}


def _pytorch_backward(step: Step) -> Forms:
    return {"convolution_backward": lambda: reference.conv2d_backward(*step.args)}


_OPTIONS = "int[] stride, int[] padding, int[] dilation, int groups"
declare(
    Op(
        OP,
        describe,
        functions=(
            Function(f"conv2d(Tensor x, Tensor weight, {_OPTIONS}) -> Tensor", _run, output_like),
        ),
        implementations=(
            on("reference", reference.conv2d),
            on("cpu", _cpu_conv.conv2d, _cpu_conv.conv2d_reasons),
        ),
        use=TRAINING,
        examples=Examples(("plain",), _example, _pytorch, _SIZES, _works),
    )
)
declare(
    Op(
        BACKWARD,
        partial(describe, backward=True),
        functions=(
            Function(
                f"conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_OPTIONS}, bool to_x, "
                "bool to_weight) -> (Tensor, Tensor)",
                _run_backward,
                _fake_backward,
            ),
        ),
        implementations=(
            on("reference", reference.conv2d_backward),
            on("cpu", _cpu_conv.conv2d_backward, _cpu_conv.conv2d_backward_reasons),
        ),
        use=TRAINING,
        examples=Examples(
            ("plain",), partial(_example, backward=True), _pytorch_backward, _SIZES, _works
        ),
    )
)
