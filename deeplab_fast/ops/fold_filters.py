"""Batch norm folded into the filters of all convolutions of a model, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, declare, on
from ..dispatch.describe import OpDesc, dtype_name
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Shapes, Size, Step
from ..plan import fold
from .common import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    needs_grad,
    triton_kernel,
)

OP = "fold_filters"
# Forms of calls, by the dtype of the filters; those of 16 bits differ by a conversion alone.
_HALF = "half"
_MASTERS = "float32"


def fold_filters(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The filters of all layers times the scales of their batch norms.

        out_l[k, c, r, s] = scale[first_l + k] * weights_l[k, c, r, s],
        first_l = K_0 + ... + K_(l-1)

    Args:
        weights: for each of at least one layer [K_l, C_l, R_l, S_l], one of fp16, bf16, fp32 or
            fp64 for all, any strides.
        scale: [sum K_l], fp32 (fp64 for fp64 weights), gamma / sqrt(var + eps) of layer after
            layer.
        dtype: of the results, fp16, bf16, fp32 or fp64, whatever that of the weights.

    Returns:
        for each layer [K_l, C_l, R_l, S_l] in dtype, channels_last; the product is made in the
        dtype of scale and rounded once. All are views of one allocation, each from a multiple of 16
        bytes on. What is not finite stays so.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        RuntimeError: an input requires a gradient.

    Source: arXiv 1502.03167 (batch norm); arXiv 1712.05877, section 3.2 (folding).
    """
    _validate(weights, scale, dtype)
    if needs_grad(*weights, scale):
        raise RuntimeError(
            f"{OP} records no gradient, and an input requires one; call it under torch.no_grad()"
        )
    flat = torch.ops.deeplab_fast.fold_filters(list(weights), scale, dtype)
    return fold.views(flat, (w.shape for w in weights))


def describe(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `fold_filters`: the dtype is that of
    the results, the shape (layers, values of all layers)."""
    _validate(weights, scale, dtype)
    return _describe(weights, dtype)


def _validate(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> None:
    if not weights:
        raise ValueError(f"{OP}: weights is empty; give the filters of at least one layer")
    first, filters = weights[0], 0
    check_map(OP, "weights[0]", first)
    device, given = first.device, first.dtype
    for layer, weight in enumerate(weights):
        shape = weight.shape
        # Asked at every call of a model, of 60 filters: a message is made where there is one.
        if len(shape) != 4 or 0 in shape[1:] or weight.dtype != given or weight.device != device:
            name = f"weights[{layer}]"
            check_map(OP, name, weight)
            check_dtype(OP, name, weight, (given,))
            check_device(OP, first, **{name: weight})
        filters += shape[0]
    check_shape(OP, "scale", scale, (filters,), "one value for each filter of all layers, in order")
    check_dtype(OP, "scale", scale, (reference.compute_dtype(given),))
    check_device(OP, first, scale=scale)
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise TypeError(f"{OP}: dtype is {dtype}; allowed: {allowed}")


def _describe(weights: Sequence[Tensor], dtype: torch.dtype) -> OpDesc:
    first = weights[0]
    form = _HALF if first.dtype.itemsize == 2 else dtype_name(first.dtype)
    shape = len(weights), sum(w.numel() for w in weights)
    return replace(OpDesc.of(OP, first, weights=form), dtype=dtype, shape=shape)


def _run(weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    return run(_describe(weights, dtype), weights, scale, dtype)


def _fake(weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weights[0].new_empty(fold.starts(fold.shapes_of(weights))[-1], dtype=dtype)


def _results(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The allocation, zero between layers, and the layers' results in it."""
    shapes = fold.shapes_of(weights)
    flat = weights[0].new_empty(fold.starts(shapes)[-1], dtype=dtype)
    for start, end in fold.gaps(shapes):
        flat[start:end] = 0
    return flat, fold.views(flat, shapes)


def _layer_by_layer(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    flat, results = _results(weights, dtype)
    reference.fold_filters(weights, scale, results)
    return flat


def _foreach(weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    flat, results = _results(weights, dtype)
    scales = [s[:, None, None, None] for s in scale.split([w.shape[0] for w in weights])]
    torch._foreach_copy_(results, torch._foreach_mul(weights, scales))
    return flat


_SIZES = (
    # One, three and 49 taps, one channel, odd numbers of everything: gaps behind layers.
    Size(
        1, 60, 1, 1,
        layers=(
            (21, 7, 3, 3), (5, 3, 7, 7), (6, 1, 5, 5), (7, 9, 1, 1), (19, 4, 1, 3), (2, 5, 3, 3),
        ),
    ),
    # One layer, channels_last.
    Size(1, 24, 1, 1, layers=((24, 16, 3, 3),)),
    # Several tiles of every kind.
    Size(1, 496, 1, 1, layers=((96, 72, 3, 3), (144, 128, 1, 1), (160, 1, 3, 3), (96, 40, 3, 3))),
)  # fmt: skip


def _layers(size: Size) -> tuple[tuple[int, int, int, int], ...]:
    """Those of a size; where it has none, a block of layers of its channels."""
    c, k = size.c, size.filters or size.c
    return size.layers or ((k, c, 1, 1), (k, 1, 3, 3), (k, k, 3, 3), (c, k, 1, 1))


def _works(shapes: Shapes) -> list[tuple[str, Size]]:
    filters = sum(layer[0] for layer in shapes.filters)
    size = Size(1, filters, 1, 1, layers=shapes.filters)
    return [(form, size) for form in (_MASTERS, _HALF)]


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    dtype, layers = make.dtype, _layers(s)
    given = torch.float32 if form == _MASTERS else dtype
    if form == _HALF and dtype.itemsize != 2:
        given = torch.float16
    made = make.of(given)
    weights = [made.map(k, c, r, s, (c * r * s) ** -0.5) for k, c, r, s in layers]
    # As modules have them; the last one as after `.to(memory_format=torch.channels_last)`.
    weights[:-1] = [w.contiguous() for w in weights[:-1]]
    scale = make.vector(sum(layer[0] for layer in layers))
    return [Step(form, s, (weights, scale, dtype), (VALUES,), describe(weights, scale, dtype))]


def _exact(step: Step) -> list[Tensor]:
    weights, scale, _ = step.args
    return [_layer_by_layer(weights, scale, torch.float64)]


def _pytorch(step: Step) -> Forms:
    return {
        "layer by layer": lambda: _layer_by_layer(*step.args),
        "foreach": lambda: _foreach(*step.args),
    }


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "fold_filters(Tensor[] weights, Tensor scale, ScalarType dtype) -> Tensor",
                _run,
                _fake,
            ),
        ),
        implementations=(
            on("reference", _layer_by_layer),
            on("triton", triton_kernel("fold", OP), triton_kernel("fold", "not_supported_reasons")),
        ),
        use=INFERENCE,
        examples=Examples((_MASTERS, _HALF), _example, _pytorch, _SIZES, _works, _exact),
        sources="fold",
    )
)
