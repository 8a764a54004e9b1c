"""Batch norm in training: statistics, normalise + residual + activation, and their backward passes.

Four ops, each one pass over the map. Nothing that can be computed again from the convolution's
output is kept for the backward pass; `deeplab_fast.program.training` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext, reference
from ..dispatch import limits
from ..dispatch.choice import Choices
from ..dispatch.declare import TRAINING, Function, Op, compiled, declare, on
from ..dispatch.describe import OpDesc
from ..dispatch.examples import VALUES, Examples, Forms, Maker, Run, Shapes, Size, Step, spread
from ._composed import EPS, activated
from .common import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_map,
    check_shape,
    needs_grad,
    triton_kernel,
)

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over images, rows and columns.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides; N may be 0, which gives zeros.

    Returns:
        mean [C], variance [C], fp32 (fp64 for fp64 x), from (count, mean, M2) of tiles of the map
        that are combined in a fixed order: the same bits for any number of threads. Not
        differentiable: `bn_act_backward` has the whole gradient of a batch norm.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.

    Source: arXiv 1502.03167, algorithm 1; Chan, Golub and LeVeque (1983) for the combination.
    """
    check_map("batch_stats", "x", x)
    return torch.ops.deeplab_fast.batch_stats(x.detach(), 0.0, None, None, None, None)[:2]


def bn_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Tensor:
    """y = act((x - mean) * (rstd * weight) + bias + residual), in one pass.

    Args:
        x: [N, C, H, W], fp16, bf16, fp32 or fp64, any strides.
        mean, rstd, weight, bias: [C], fp32 (fp64 for fp64 x); rstd = 1 / sqrt(variance + eps).
        residual: the shape and dtype of x, or None for zero.
        act: "relu", "relu6", "hardswish" (not with a residual), or None for the identity.

    Returns:
        [N, C, H, W], the dtype of x, channels_last, computed in fp32 (fp64 for fp64) and rounded
        once. Not differentiable by itself: see `bn_act_reduce` and `bn_act_backward`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: an input requires a gradient.

    Source: arXiv 1502.03167, algorithm 1; arXiv 1512.03385, figure 5 (residual block).
    """
    _validate("bn_act", x, act, (mean, rstd, weight, bias), residual=residual)
    _refuse_grad("bn_act", x, mean, rstd, weight, bias, residual)
    return torch.ops.deeplab_fast.bn_act(x, mean, rstd, weight, bias, residual, act)


def bn_act_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    out: Tensor | None = None,
    act: str | None = "relu",
) -> tuple[Tensor, Tensor]:
    """The sums over each channel that the gradient of `bn_act` needs, in one pass.

    With g = grad * act'(...) and xhat = (x - mean) * rstd: sum of g, the gradient to bias, and sum
    of g * xhat, the gradient to weight.

    Args:
        grad, x: [N, C, H, W], one dtype, any strides.
        mean, rstd, weight, bias: as for `bn_act`.
        out: the result of `bn_act`, needed where it had a residual; None computes what the
            activation saw from x again.
        act: as for `bn_act`; "hardswish" only without out.

    Returns:
        two [C], fp32 (fp64 for fp64 x), summed in a fixed order.
    """
    name = "bn_act_reduce"
    _validate(name, x, act, (mean, rstd, weight, bias), grad=grad, out=out)
    return torch.ops.deeplab_fast.bn_act_reduce(grad, x, mean, rstd, weight, bias, out, act)


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_grad: Tensor | None = None,
    mean_grad_xhat: Tensor | None = None,
    *,
    out: Tensor | None = None,
    act: str | None = "relu",
    to_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `bn_act` to x, and to the residual if asked for, in one pass.

        dx = rstd * weight * (g - mean_grad - xhat * mean_grad_xhat),  d residual = g,

    g and xhat as in `bn_act_reduce`, of which mean_grad and mean_grad_xhat are the sums, divided by
    the number of values (over all processes, where those shared their statistics). Both are None
    where mean and rstd are constants.

    Returns:
        dx and d residual (None if not `to_residual`), [N, C, H, W], the dtype of x, channels_last.

    Source: arXiv 1502.03167, section 3.
    """
    name = "bn_act_backward"
    _validate(name, x, act, (mean, rstd, weight, bias), grad=grad, out=out)
    if (mean_grad is None) != (mean_grad_xhat is None):
        raise ValueError(f"{name}: give both of mean_grad and mean_grad_xhat, or none of them")
    for vector in (mean_grad, mean_grad_xhat):
        if vector is not None:
            check_shape(name, "mean_grad", vector, x.shape[1:2], "one value for each channel")
    dx, residual = torch.ops.deeplab_fast.bn_act_backward(
        grad, x, mean, rstd, weight, bias, out, mean_grad, mean_grad_xhat, act, to_residual, 1.0
    )
    return dx, residual if to_residual else None


def describe_stats(x: Tensor) -> OpDesc:
    """What a choice of backend rests on, for the arguments of `batch_stats`."""
    return OpDesc.of("batch_stats", x)


def describe_bn_act(
    x: Tensor, *args: Tensor, residual: Tensor | None = None, act: str | None = "relu"
) -> OpDesc:
    """The same for `bn_act`."""
    return OpDesc.of("bn_act", x, act=act, residual=residual is not None)


def describe_reduce(
    grad: Tensor, x: Tensor, *args: Tensor, out: Tensor | None = None, act: str | None = "relu"
) -> OpDesc:
    """The same for `bn_act_reduce`."""
    return OpDesc.of("bn_act_reduce", x, act=act, residual=out is not None)


def describe_backward(
    grad: Tensor,
    x: Tensor,
    *args: Tensor,
    out: Tensor | None = None,
    act: str | None = "relu",
    to_residual: bool = False,
) -> OpDesc:
    """The same for `bn_act_backward`."""
    return OpDesc.of("bn_act_backward", x, act=act, residual=out is not None)


def _validate(
    op: str,
    x: Tensor,
    act: str | None,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    **maps: Tensor | None,
) -> None:
    check_map(op, "x", x)
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {ACTIVATIONS}, got {act!r}")
    for name, vector in zip(("mean", "rstd", "weight", "bias"), vectors, strict=True):
        check_shape(op, name, vector, x.shape[1:2], "one value for each channel")
        check_dtype(op, name, vector, FLOAT_DTYPES)
        check_device(op, x, **{name: vector})
    for name, other in maps.items():
        if other is None:
            continue
        check_shape(op, name, other, x.shape, "the shape of x")
        check_dtype(op, name, other, (x.dtype,))
        check_device(op, x, **{name: other})
        if act == "hardswish" and name != "grad":
            raise ValueError(f"{op}: act='hardswish' does not take {name}; use 'relu' or 'relu6'")


def check_count(x: Tensor) -> None:
    """torch's error where one value is all that a channel has."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def _refuse_grad(op: str, *tensors: Tensor | None) -> None:
    if needs_grad(*tensors):
        raise RuntimeError(
            f"{op} records no gradient; use deeplab_fast.program.training, or torch.no_grad() "
            "around it"
        )


def map_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A map of the shape, dtype, device and strides of `bn_act`'s result."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


def _per_channel(x: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(x.dtype)
    return tuple(x.new_empty(x.shape[1], dtype=dtype) for _ in range(count))


# An op within a function that calls several: `Choices`, then the arguments of its schema.
Chosen = Callable[..., Any]


def _chosen(op: str, x_at: int, act_at: int, out_at: int) -> Chosen:
    """What asks which implementation runs.

    Args:
        x_at, act_at, out_at: places of x, of the activation, and of the residual or the result
            behind one.
    """

    def call(choices: Choices, *args: Any) -> Any:
        x, act, residual = args[x_at], args[act_at], args[out_at] is not None
        run = choices.of(
            op, x, (act, residual), lambda: OpDesc.of(op, x, act=act, residual=residual)
        )
        return run(*args)

    return call


def run_stats(choices: Choices, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_stats` within a function that calls several ops."""
    return choices.of("batch_stats", x, None, lambda: describe_stats(x))(x, *rest)


run_act = _chosen("bn_act", 0, 6, 5)
run_reduce = _chosen("bn_act_reduce", 1, 7, 6)
run_backward = _chosen("bn_act_backward", 1, 9, 6)


def _cpu_reasons(desc: OpDesc) -> list[str]:
    allowed = (torch.float32, torch.float64)
    return [
        *limits.device(desc, "cpu"),
        *limits.dtype(desc, allowed, "takes float32 and float64 only"),
        *limits.extension(_ext.CPU, "_batch_stats_cpu"),
    ]


def _with_running(kernel: Run) -> Run:
    """`batch_stats` by a kernel that updates running statistics in the dtype of its results."""

    def run(
        x: Tensor,
        eps: float,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if running_mean is None or running_var is None:
            return kernel(x, eps, None, None, None, None)
        running = (running_mean, running_var, num_batches_tracked)
        dtype = reference.compute_dtype(x.dtype)
        fits = running_mean.dtype == running_var.dtype == dtype and (
            running_mean.is_contiguous() and running_var.is_contiguous()
        )
        if fits and x.numel():
            results = kernel(x, eps, *running, momentum)
            # As PyTorch's own ops do for what they change.
            torch.autograd.graph.increment_version([t for t in running if t is not None])
            return results
        mean, variance, rstd = kernel(x, eps, None, None, None, None)
        count = x.numel() // x.shape[1]
        reference.update_running(*running, momentum, mean, variance, count)
        return mean, variance, rstd

    return run


_SIZES = (
    # Accesses of 16 bytes, and of one element.
    Size(2, 40, 9, 11),
    Size(2, 7, 9, 11),
    # One pixel of each image.
    Size(3, 256, 1, 1),
    # Several tiles of pixels and of channels.
    Size(2, 320, 33, 65),
)
_ACT_FORMS = ("relu", "relu+residual", "relu6", "hardswish", "plain", "residual")


def _example(op: str) -> Callable[[Maker, str, Size], list[Step]]:
    def build(make: Maker, form: str, s: Size) -> list[Step]:
        parts = form.split("+")
        act = next((a for a in parts if a in ACTIVATIONS), None)
        x, grad, given = (make.map(s.n, s.c, s.h, s.w) for _ in range(3))
        other = given if "residual" in parts else None
        mean, bias = make.vector(s.c, -0.5, 0.5), make.vector(s.c, -0.5, 0.5)
        rstd, weight = make.vector(s.c), make.vector(s.c)
        vectors = (mean, rstd, weight, bias)
        if op == "batch_stats":
            args = (x, EPS, None, None, None, None)
            return [Step(form, s, args, (VALUES,) * 3, describe_stats(x))]
        if op == "bn_act":
            desc = describe_bn_act(x, residual=other, act=act)
            return [Step(form, s, (x, *vectors, other, act), (VALUES,), desc)]
        rest: tuple[object, ...] = (act,)
        if op == "bn_act_reduce":
            desc = describe_reduce(grad, x, out=other, act=act)
        else:
            means = make.vector(s.c, -0.1, 0.1), make.vector(s.c, -0.1, 0.1)
            desc = describe_backward(grad, x, out=other, act=act)
            rest = (*means, act, other is not None, 1.0)
        return [Step(form, s, (grad, x, *vectors, other, *rest), (VALUES, VALUES), desc)]

    return build


def _works(shapes: Shapes) -> list[tuple[str, Size]]:
    forms = (*shapes.acts, "plain", "residual", "relu+residual")
    return [(form, size) for size in spread(shapes.norms) for form in forms]


def _stats_works(shapes: Shapes) -> list[tuple[str, Size]]:
    return [("plain", size) for size in spread(shapes.norms)]


def _pytorch_stats(step: Step) -> Forms:
    x, eps, *_ = step.args

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, variance, torch.rsqrt(variance + eps)

    found: Forms = {"var_mean": plain}
    if x.is_cuda:
        # Mean and rstd; of the variance only the running one would need more.
        found["batch_norm_stats"] = lambda: torch.batch_norm_stats(x, eps)
    return found


def _pytorch_act(step: Step) -> Forms:
    x, mean, rstd, weight, bias, residual, act = step.args
    variance = rstd**-2

    def plain() -> Tensor:
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, EPS)
        return activated(y, residual, act)

    def element_wise() -> Tensor:
        y = torch.batch_norm_elemt(x, weight, bias, mean, rstd, EPS)
        return activated(y, residual, act)

    return {"batch_norm": plain, **({"batch_norm_elemt": element_wise} if x.is_cuda else {})}


# The split passes of synchronised batch norm are the steps of the backward pass. They take the
# gradient behind a ReLU, for which PyTorch has a pass that reads its result.
def _has_split_passes(grad: Tensor, out: Tensor | None, act: str | None) -> bool:
    return grad.is_cuda and act in (None, "relu") and (act is None or out is not None)


def _behind(grad: Tensor, out: Tensor | None, act: str | None) -> Tensor:
    return grad if act is None else torch.ops.aten.threshold_backward(grad, out, 0)


def _pytorch_reduce(step: Step) -> Forms:
    grad, x, mean, rstd, weight, _, out, act = step.args
    forms: Forms = {"elementwise": lambda: reference.bn_act_reduce(*step.args)}
    if not _has_split_passes(grad, out, act):
        return forms

    def reduce() -> tuple[Tensor, ...]:
        g = _behind(grad, out, act)
        sums = torch.batch_norm_backward_reduce(g, x, mean, rstd, weight, False, True, True)
        return sums[2:][::-1]

    return {"batch_norm_backward_reduce": reduce, **forms}


def _pytorch_backward(step: Step) -> Forms:
    grad, x, mean, rstd, weight, _, out, mean_grad, mean_grad_xhat, act, *rest = step.args
    to_residual, _ = rest
    forms: Forms = {"elementwise": lambda: reference.bn_act_backward(*step.args)}
    if not _has_split_passes(grad, out, act):
        return forms
    pixels = x.numel() // x.shape[1]
    count = torch.tensor([pixels], dtype=torch.int32, device=x.device)
    sums = mean_grad * pixels, mean_grad_xhat * pixels / rstd

    def backward() -> Tensor | tuple[Tensor, Tensor]:
        g = _behind(grad, out, act)
        dx = torch.batch_norm_backward_elemt(g, x, mean, rstd, weight, *sums, count)
        return (dx, g) if to_residual else dx

    return {"batch_norm_backward_elemt": backward, **forms}


def _declare(
    schema: str,
    describe: Callable[..., OpDesc],
    call: Chosen,
    fake: Run,
    pytorch: Callable[[Step], Forms],
    forms: tuple[str, ...] = _ACT_FORMS,
    works: Callable[[Shapes], list[tuple[str, Size]]] = _works,
) -> None:
    op = schema[: schema.index("(")]
    cpu, triton = compiled(f"_{op}_cpu"), triton_kernel("batch_norm", op)
    if op == "batch_stats":
        cpu, triton = _with_running(cpu), _with_running(triton)
    declare(
        Op(
            op,
            describe,
            functions=(Function(schema, lambda *args: call(Choices(), *args), fake),),
            implementations=(
                on("reference", getattr(reference, op)),
                on("cpu", cpu, _cpu_reasons),
                on("triton", triton, triton_kernel("batch_norm", "not_supported_reasons")),
            ),
            use=TRAINING,
            examples=Examples(forms, _example(op), pytorch, _SIZES, works),
            sources="batch_norm",
        )
    )


_VECTORS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias"
_declare(
    "batch_stats(Tensor x, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum) -> (Tensor, Tensor, Tensor)",
    describe_stats,
    run_stats,
    lambda x, *rest: _per_channel(x, 3),
    _pytorch_stats,
    ("plain",),
    _stats_works,
)
_declare(
    f"bn_act(Tensor x, {_VECTORS}, Tensor? residual, str? act) -> Tensor",
    describe_bn_act,
    run_act,
    lambda x, *rest: map_like(x),
    _pytorch_act,
)
_declare(
    f"bn_act_reduce(Tensor grad, Tensor x, {_VECTORS}, Tensor? out, str? act) -> (Tensor, Tensor)",
    describe_reduce,
    run_reduce,
    lambda grad, x, *rest: _per_channel(x),
    _pytorch_reduce,
)
_declare(
    f"bn_act_backward(Tensor grad, Tensor x, {_VECTORS}, Tensor? out, Tensor? mean_grad, "
    "Tensor? mean_grad_xhat, str? act, bool to_residual, float count) -> (Tensor, Tensor)",
    describe_backward,
    run_backward,
    lambda grad, x, *rest: (map_like(x), map_like(x) if rest[-2] else x.new_empty(0)),
    _pytorch_backward,
)
