"""Convolution, folded batch norm, optional residual, activation: a backbone layer in one op."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, Tuned, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Shapes, Size, Step, spread
from ..plan.taps import output_size
from . import _cpu_conv, _cudnn
from ._composed import activated, fused_layer, norm_of
from .common import (
    FLOAT_DTYPES,
    Again,
    Context,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_option,
    check_shape,
    differentiable,
    needs_grad,
    or_ones,
    scaled,
    triton_kernel,
)

OP = "conv_bn_act"
# stride, padding, dilation, groups, act
Options = tuple[int, int, int, int, str | None]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual).

    With batch norm folded, scale = gamma / sqrt(var + eps) and shift = beta - mean * scale.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        weight: [K, C / groups, R, S], the dtype of x.
        scale, shift: [K], fp32 (fp64 for fp64 x); scale None for one, as of filters that have it
            in them.
        stride, padding, dilation: the same for rows and columns, up to 2^31 - 1.
        groups: as in torch.nn.functional.conv2d.
        residual: [N, K, H', W'], the dtype of x, or None for zero.
        act: "relu" or None for the identity.

    Returns:
        [N, K, H', W'], the dtype of x, channels_last; accumulated in fp32 (fp64 for fp64) and
        rounded once, except by backend "cuda", cuDNN, which also rounds scale * weight and shift to
        the dtype of x. Differentiable to every tensor. Under autocast x, weight and residual
        are cast, scale and shift are not.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.

    Source: arXiv 1502.03167 (batch norm); arXiv 1512.03385, figure 5 (residual block).
    """
    x, weight = autocast(x, weight)
    if residual is not None:
        (residual,) = autocast(residual)
    args = (x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    _validate(*args)
    if needs_grad(x, weight, scale, shift, residual):
        return _ConvBnAct.apply(x, weight, or_ones(scale, x, weight), *args[3:])
    return torch.ops.deeplab_fast.conv_bn_act(*args)


def describe(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `conv_bn_act`."""
    options = (stride, padding, dilation, groups, act)
    _validate(x, weight, scale, shift, residual, *options)
    return _describe(x, weight, residual, *options)


class _Context(Context, Protocol):
    options: Options
    shift_dtype: torch.dtype
    has_residual: bool


def _again(ctx: _Context) -> Again:
    y, x, weight, scale = ctx.saved_tensors
    stride, padding, dilation, groups, act = ctx.options
    # Gradients depend on neither the shift nor the residual but for where the activation lets them
    # through, which the result says.
    passes = ~(y.detach() <= 0) if act == "relu" else None

    def run(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        *options: *Options,
    ) -> Tensor:
        z = reference.conv_bn_act(
            x, weight, scale, shift, stride, padding, dilation, groups, residual, None
        )
        return z if passes is None else torch.where(passes, z, 0.0)

    shift = torch.zeros_like(scale, dtype=ctx.shift_dtype, requires_grad=True)
    residual = torch.zeros_like(y, requires_grad=True) if ctx.has_residual else None
    return run, (x, weight, scale, shift, residual, *ctx.options)


class _ConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        *options: *Options,
    ) -> Tensor:
        y = torch.ops.deeplab_fast.conv_bn_act(x, weight, scale, shift, residual, *options)
        ctx.save_for_backward(y, x, weight, scale)
        ctx.options = options
        ctx.shift_dtype = shift.dtype
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @differentiable(_again)
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, weight, scale = ctx.saved_tensors
        to_x, to_weight, to_scale, to_shift, to_residual = (
            torch.ops.deeplab_fast.conv_bn_act_backward(grad, y, x, weight, scale, *ctx.options)
        )
        return (
            to_x.to(x.dtype),
            to_weight.to(weight.dtype),
            to_scale.to(scale.dtype),
            to_shift.to(ctx.shift_dtype),
            to_residual.to(x.dtype) if ctx.has_residual else None,
            *[None] * len(ctx.options),
        )


def _output_shape(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> tuple[int, int, int, int]:
    height, width = (
        output_size(size, kernel, stride, padding, dilation)
        for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.shape[0], weight.shape[0], height, width


def _validate(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    *options: *Options,
) -> None:
    stride, padding, dilation, groups, act = options
    check_map(OP, "x", x)
    check_map(OP, "weight", weight)
    check_dtype(OP, "weight", weight, (x.dtype,))
    check_device(OP, x, weight=weight, scale=scale, shift=shift, residual=residual)
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for name, size in sizes.items():
        check_option(OP, name, size, int(name != "padding"))
    channels = weight.shape[0]
    if weight.shape[1] * groups != x.shape[1] or channels % groups:
        raise ValueError(
            f"{OP}: weight {list(weight.shape)} with groups={groups} does not fit x "
            f"{list(x.shape)}; expected [K, {x.shape[1]} / groups, R, S], K a multiple of groups"
        )
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        check_shape(OP, name, vector, (channels,), "one value for each output channel")
        check_dtype(OP, name, vector, FLOAT_DTYPES)
    if act not in ("relu", None):
        raise ValueError(f"{OP}: act must be 'relu' or None, got {act!r}")
    expected = _output_shape(x, weight, stride, padding, dilation)
    if any(size < 1 for size in expected[2:]):
        raise ValueError(
            f"{OP}: x {list(x.shape)} is smaller than the dilated kernel of weight "
            f"{list(weight.shape)} with dilation={dilation}, padding={padding}"
        )
    if residual is not None:
        check_shape(OP, "residual", residual, expected, "the shape of the result")
        check_dtype(OP, "residual", residual, (x.dtype,))


def _describe(x: Tensor, weight: Tensor, residual: Tensor | None, *options: *Options) -> OpDesc:
    stride, padding, dilation, groups, act = options
    return OpDesc.of(
        OP,
        x,
        weight=tuple(weight.shape),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual is not None,
        act=act,
    )


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    *options: *Options,
) -> Tensor:
    *geometry, act = options
    desc = _describe(x, weight, residual, *options)
    scale = or_ones(scale, x, weight)
    return run(desc, x, weight, scale, shift, *geometry, residual, act)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    *options: *Options,
) -> Tensor:
    shape = _output_shape(x, weight, *options[:3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _decomposed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    *options: *Options,
) -> Tensor:
    *geometry, act = options
    y = F.conv2d(x, scaled(weight, scale), shift.to(x.dtype), *geometry)
    y = y if residual is None else y + residual
    y = torch.relu(y) if act == "relu" else y
    return y.contiguous(memory_format=torch.channels_last)


def _run_backward(
    grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *options: *Options
) -> tuple[Tensor, ...]:
    grads = reference.conv_bn_act_backward(grad, y, x, weight, scale, *options)
    return tuple(g.contiguous() for g in grads)


def _fake_backward(
    grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *options: *Options
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(x.dtype)
    shapes = (x.shape, weight.shape, scale.shape, scale.shape, grad.shape)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


_SIZES = (
    Size(2, 40, 9, 11, filters=24),
    Size(2, 7, 9, 11, filters=5),
    # Pixels that are not next to each other.
    Size(1, 64, 33, 17, filters=256, stride=2),
    Size(2, 136, 33, 17, filters=144),
)


def _works(shapes: Shapes) -> list[tuple[str, Size]]:
    narrow = spread(s for s in shapes.pointwise if s.filters <= s.c)
    wide = spread(s for s in shapes.pointwise if s.filters > s.c)
    return [
        *(("relu", size) for size in narrow),
        *(("relu+residual", size) for size in wide),
        *((form, size) for form in ("plain", "residual") for size in wide[:1]),
    ]


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    # A 3x3 convolution where there is a rate, else a 1x1 one.
    rate = s.rates[0] if s.rates else 0
    x = make.map(s.n, s.c, s.h, s.w).relu_()
    weight = make.weight(s.filters, s.c, 3 if rate else 1)
    scale, shift = make.vector(s.filters), make.vector(s.filters, -0.5, 0.5)
    parts, residual = form.split("+"), None
    if "residual" in parts:
        residual = make.map(s.n, s.filters, -(-s.h // s.stride), -(-s.w // s.stride))
    act = "relu" if "relu" in parts else None
    options = {"stride": s.stride, "padding": rate, "dilation": rate or 1, "groups": 1}
    desc = describe(x, weight, scale, shift, **options, residual=residual, act=act)
    args = (x, weight, scale, shift, *options.values(), residual, act)
    return [Step(form, s, args, (VALUES,), desc)]


def _pytorch(step: Step) -> Forms:
    x, weight, scale, shift, stride, padding, dilation, groups, residual, act = step.args

    def composed() -> Tensor:
        y = reference.convolution(x, weight, None, stride, padding, dilation, groups)
        return activated(norm_of(y, scale, shift), residual, act)

    forms: Forms = {"convolution, batch norm": composed}
    if not x.is_cuda:
        return forms
    fused = fused_layer(
        weight, scale, shift, stride=stride, padding=padding, dilation=dilation,
        residual=residual, act=act,
    )  # fmt: skip
    forms["cuDNN"] = lambda: fused(x)
    if residual is None and stride == 1 and act == "relu" and not step.size.rates:
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        matrix = _cudnn.fold(weight, scale).flatten(1).t()
        bias = shift.to(x.dtype)
        forms["cuBLASLt with epilogue"] = lambda: (
            torch._addmm_activation(bias, rows, matrix).view(n, h, w, -1).permute(0, 3, 1, 2)
        )
    return forms


_OPTIONS = "int stride, int padding, int dilation, int groups, str? act"
declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor shift, "
                f"Tensor? residual, {_OPTIONS}) -> Tensor",
                _run,
                _fake,
                _decomposed,
            ),
            Function(
                "conv_bn_act_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, "
                f"Tensor scale, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _run_backward,
                _fake_backward,
            ),
        ),
        implementations=(
            on("reference", reference.conv_bn_act),
            on("cpu", _cpu_conv.conv_bn_act, _cpu_conv.reasons),
            on(
                "triton",
                triton_kernel("conv", OP),
                triton_kernel("conv", "not_supported_reasons"),
            ),
            on("cuda", _cudnn.conv_bn_act, _cudnn.reasons, is_pytorch=True),
        ),
        use=INFERENCE,
        examples=Examples(
            ("relu", "relu+residual", "plain", "residual"), _example, _pytorch, _SIZES, _works
        ),
        sources="pointwise",
        is_product=True,
        tuned=(Tuned("pointwise", OP, 5),),
    )
)
