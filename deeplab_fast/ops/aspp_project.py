"""The ASPP's projection: 1x1 convolution of the branches and the pooled vector, BN, ReLU, and the
classifier behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch.choice import run
from ..dispatch.declare import INFERENCE, Function, Op, Tuned, declare, implementations, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Shapes, Size, Step
from ..plan.symbols import same_shape
from . import _cpu_conv, aspp_cuda
from ._composed import fused_layer, norm_of
from .common import (
    FLOAT_DTYPES,
    Context,
    autocast,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    differentiable,
    needs_grad,
    or_ones,
    scaled,
    triton_kernel,
)
from .conv_bn_act import OP as CONV
from .conv_bn_act import conv_bn_act

OP = "aspp_project"


def aspp_project(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    classifier: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = relu(scale * (W . concat(branches, upsample(pooled))) + shift), without the concat.

    Projecting a concat is a sum of products, and the upsampling of a 1x1 map is constant, so with
    W = (W_branches, W_pooled) the pooled branch is a bias for each image:

        y[n, :, p] = relu(scale * (W_branches . branches[n, :, p] + W_pooled . pooled[n]) + shift)

    With a classifier (V, b), a 1x1 convolution behind the projection, only V . y[n, :, p] + b
    leaves.

    Args:
        branches: [N, B, H, W], fp16, bf16, fp32 or fp64, any strides.
        pooled: [N, P], the image-pooling branch after its own convolution, BN and ReLU.
        weight: [K, B + P, 1, 1], the dtype of branches, input channels in the order of the concat.
        scale, shift: [K], fp32 (fp64 for fp64 branches): the folded batch norm; scale None for one,
            as of a weight that has it in it.
        classifier: None, or ([classes, K] or [classes, K, 1, 1] in the dtype of branches, [classes]
            in fp32 (fp64 for fp64 branches)).

    Returns:
        [N, K, H, W], or logits [N, classes, H, W], the dtype of branches, channels_last;
        accumulated in fp32 (fp64 for fp64) and rounded once. y is rounded to its dtype before it is
        classified, as if it were stored. Differentiable to every tensor; with a gradient y is
        stored. Under autocast branches, pooled, weight and the classifier's weight are cast, scale,
        shift and the classifier's bias are not.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: arXiv 1706.05587, section 3.3 (image-level features; 1x1 convolution of the concat).
    """
    branches, pooled, weight = autocast(branches, pooled, weight)
    class_weight = class_bias = None
    if classifier is not None:
        class_weight, class_bias = _split(classifier)
        (class_weight,) = autocast(class_weight)
    _validate(branches, pooled, weight, scale, shift, class_weight, class_bias)
    args = (branches, pooled, weight, scale, shift)
    if needs_grad(*args, class_weight, class_bias):
        y = _AsppProject.apply(*args[:3], or_ones(scale, branches, weight), shift)
        if class_weight is None or class_bias is None:
            return y
        ones = torch.ones_like(class_bias)
        return conv_bn_act(y, class_weight, ones, class_bias, act=None)
    return torch.ops.deeplab_fast.aspp_project(*args, class_weight, class_bias)


def describe(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    classifier: tuple[Tensor, Tensor] | None = None,
) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `aspp_project`."""
    class_weight, class_bias = (None, None) if classifier is None else _split(classifier)
    _validate(branches, pooled, weight, scale, shift, class_weight, class_bias)
    return _describe(branches, pooled, weight, class_weight)


class _Context(Context, Protocol):
    dtypes: list[torch.dtype]


class _AsppProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, *tensors: Tensor) -> Tensor:
        y = torch.ops.deeplab_fast.aspp_project(*tensors)
        ctx.save_for_backward(y, *tensors)
        ctx.dtypes = [t.dtype for t in tensors]
        return y

    @staticmethod
    @differentiable(lambda ctx: (reference.aspp_project, ctx.saved_tensors[1:]))
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, ...]:
        grads = torch.ops.deeplab_fast.aspp_project_backward(grad, *ctx.saved_tensors[:-1])
        return tuple(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


def _split(classifier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(weight [classes, K, 1, 1], bias); shapes are checked later."""
    if (
        not isinstance(classifier, (tuple, list))
        or len(classifier) != 2
        or not all(isinstance(t, Tensor) for t in classifier)
    ):
        raise ValueError(f"{OP}: classifier must be (weight, bias), two tensors, or None")
    weight, bias = classifier
    return (weight[:, :, None, None] if weight.dim() == 2 else weight), bias


def _validate(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    class_weight: Tensor | None,
    class_bias: Tensor | None,
) -> None:
    check_map(OP, "branches", branches)
    n, channels = branches.shape[:2]
    if pooled.dim() != 2 or not same_shape(pooled.shape[:1], (n,)):
        raise ValueError(
            f"{OP}: pooled has shape {list(pooled.shape)}, expected [{n}, P], a vector for each "
            "image; flatten a [N, P, 1, 1] map with .flatten(1)"
        )
    check_map(OP, "weight", weight)
    for name, tensor in (("pooled", pooled), ("weight", weight)):
        check_dtype(OP, name, tensor, (branches.dtype,))
    outputs = weight.shape[0]
    expected = (outputs, channels + pooled.shape[1], 1, 1)
    check_shape(OP, "weight", weight, expected, "input channels of branches, then of pooled")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        check_shape(OP, name, vector, (outputs,), "one value for each output channel")
        check_dtype(OP, name, vector, FLOAT_DTYPES)
    check_device(OP, branches, pooled=pooled, weight=weight, scale=scale, shift=shift)
    if class_weight is None or class_bias is None:
        return
    classes = class_weight.shape[0] if class_weight.dim() else 0
    if classes < 1:
        raise ValueError(
            f"{OP}: the classifier's weight has shape {list(class_weight.shape)}, expected "
            f"[classes, {outputs}] or [classes, {outputs}, 1, 1] with at least one class"
        )
    name = "classifier's weight"
    check_shape(OP, name, class_weight, (classes, outputs, 1, 1), "classes by channels of weight")
    check_dtype(OP, name, class_weight, (branches.dtype,))
    name = "classifier's bias"
    check_shape(OP, name, class_bias, (classes,), "one value for each class")
    check_dtype(OP, name, class_bias, FLOAT_DTYPES)
    check_device(
        OP,
        branches,
        **{"classifier's weight": class_weight, "classifier's bias": class_bias},
    )


def _describe(
    branches: Tensor, pooled: Tensor, weight: Tensor, class_weight: Tensor | None
) -> OpDesc:
    classes = {} if class_weight is None else {"classes": class_weight.shape[0]}
    return OpDesc.of(OP, branches, pooled=pooled.shape[1], outputs=weight.shape[0], **classes)


def _run(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    class_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
) -> Tensor:
    desc = _describe(branches, pooled, weight, class_weight)
    scale = or_ones(scale, branches, weight)
    return run(desc, branches, pooled, weight, scale, shift, class_weight, class_bias)


def _fake(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    class_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
) -> Tensor:
    n, _, height, width = branches.shape
    channels = (weight if class_weight is None else class_weight).shape[0]
    return torch.empty(
        (n, channels, height, width),
        dtype=branches.dtype,
        device=branches.device,
        memory_format=torch.channels_last,
    )


def _decomposed(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    class_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
) -> Tensor:
    dtype, channels = branches.dtype, branches.shape[1]
    folded = scaled(weight, scale)
    y = F.conv2d(branches, folded[:, :channels], shift.to(dtype))
    y = torch.relu(y + F.linear(pooled, folded[:, channels:, 0, 0])[..., None, None])
    if class_weight is not None and class_bias is not None:
        y = F.conv2d(y, class_weight, class_bias.to(dtype))
    return y.contiguous(memory_format=torch.channels_last)


def _then_classify(backend: str, project: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation out of one without a classifier and the same backend's 1x1 convolution."""

    def run(
        branches: Tensor,
        pooled: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        class_weight: Tensor | None = None,
        class_bias: Tensor | None = None,
    ) -> Tensor:
        y = project(branches, pooled, weight, scale, shift)
        if class_weight is None or class_bias is None:
            return y
        classify = implementations(CONV)[backend].run
        ones = torch.ones_like(class_bias)
        return classify(y, class_weight, ones, class_bias, 1, 0, 1, 1, None, None)

    return run


_triton_project = triton_kernel("aspp", OP)
_triton_in_two = _then_classify("triton", _triton_project)


def _triton(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    class_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
) -> Tensor:
    args = (branches, pooled, weight, scale, shift)
    if class_weight is None or class_bias is None:
        return _triton_project(*args)
    try:
        return _triton_project(*args, (class_weight, class_bias))
    except ValueError:
        # More filters than a tile holds, which depends on dtype and alignment as well; y is not
        # written by then.
        return _triton_in_two(*args, class_weight, class_bias)


def _run_backward(
    grad: Tensor, y: Tensor, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    grads = reference.aspp_project_backward(grad, y, branches, pooled, weight, scale)
    return tuple(g.contiguous() for g in grads)


def _fake_backward(
    grad: Tensor, y: Tensor, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(branches.dtype)
    shapes = (branches.shape, pooled.shape, weight.shape, scale.shape, scale.shape)
    return tuple(branches.new_empty(shape, dtype=dtype) for shape in shapes)


_SIZES = (
    Size(2, 40, 9, 11, filters=24, pooled=24, classes=5),
    Size(2, 7, 9, 11, filters=5, pooled=3, classes=150),
    Size(2, 320, 33, 17, filters=256, pooled=256, classes=21),
)


def _works(shapes: Shapes) -> list[tuple[str, Size]]:
    if shapes.aspp is None:
        return []
    s, classes = shapes.aspp, shapes.logits.c
    channels, k = s.filters * (1 + len(s.rates)), s.filters
    size = Size(s.n, channels, s.h, s.w, filters=k, pooled=k, classes=classes)
    return [("plain", size), ("classes", size)]


def _example(make: Maker, form: str, s: Size) -> list[Step]:
    branches, pooled = make.map(s.n, s.c, s.h, s.w).relu_(), make.matrix(s.n, s.pooled).relu_()
    weight = make.weight(s.filters, s.c + s.pooled, 1)
    scale, shift = make.vector(s.filters), make.vector(s.filters, -0.5, 0.5)
    args = (branches, pooled, weight, scale, shift)
    if form != "classes":
        return [Step(form, s, args, (VALUES,), describe(*args))]
    classifier = make.weight(s.classes, s.filters, 1), make.vector(s.classes)
    desc = describe(*args, classifier=classifier)
    return [Step(form, s, (*args, *classifier), (VALUES,), desc)]


def _pytorch(step: Step) -> Forms:
    branches, pooled, weight, scale, shift, *classifier = step.args
    spatial = branches.shape[2:]

    def joined() -> Tensor:
        return torch.cat([branches, pooled[:, :, None, None].expand(-1, -1, *spatial)], 1)

    def classified(y: Tensor) -> Tensor:
        if not classifier:
            return y
        return F.conv2d(y, classifier[0], classifier[1].to(y.dtype))

    def composed() -> Tensor:
        return classified(norm_of(F.conv2d(joined(), weight), scale, shift).relu_())

    forms: Forms = {"cat, convolution, batch norm": composed}
    if branches.is_cuda:
        fused = fused_layer(weight, scale, shift)
        forms["cat, cuDNN fused"] = lambda: classified(fused(joined()))
    return forms


declare(
    Op(
        OP,
        describe,
        functions=(
            Function(
                "aspp_project(Tensor branches, Tensor pooled, Tensor weight, Tensor? scale, "
                "Tensor shift, Tensor? class_weight=None, Tensor? class_bias=None) -> Tensor",
                _run,
                _fake,
                _decomposed,
            ),
            Function(
                "aspp_project_backward(Tensor grad, Tensor y, Tensor branches, Tensor pooled, "
                "Tensor weight, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _run_backward,
                _fake_backward,
            ),
        ),
        implementations=(
            on("reference", _then_classify("reference", reference.aspp_project)),
            # Behind PyTorch: weights given to a call are prepared for that call alone, which took
            # longer than it saved (suite quick, aspp_project/os16-33x33-b1: 0.9x PyTorch's).
            # Models prepare theirs once.
            on(
                "cpu",
                _then_classify("cpu", _cpu_conv.aspp_project),
                _cpu_conv.reasons,
                priority=-1,
            ),
            on("triton", _triton, triton_kernel("conv", "product_reasons")),
            on("cuda", _then_classify("cuda", aspp_cuda.aspp_project), aspp_cuda.reasons),
        ),
        use=INFERENCE,
        examples=Examples(("plain", "classes"), _example, _pytorch, _SIZES, _works),
        sources="project",
        is_product=True,
        tuned=(Tuned("pointwise", OP, 5),),
    )
)
