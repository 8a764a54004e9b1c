"""What ops share: checks of arguments, autocast, gradients of gradients, the way to kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dispatch.declare import autocasts
from ..dispatch.describe import dtype_name
from ..dispatch.examples import Run
from ..plan.symbols import same_shape
from ..reference import compute_dtype

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
# Of strides, paddings, dilations and sizes: what kernels count with 32 bits.
LARGEST = 2**31 - 1


def autocast(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`x` and `tensors` in autocast's dtype where autocast is on for x's device, else as they are.

    float64 stays, as it does in PyTorch.
    """
    device = x.device.type
    if not autocasts(device):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def or_ones(scale: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """The scale [K] of filters [K, C, R, S] of maps like x, ones where there is none."""
    if scale is not None:
        return scale
    return x.new_ones(weight.shape[0], dtype=compute_dtype(x.dtype))


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """scale * weight [K, C, R, S], one factor for each output channel, in the weight's dtype."""
    return weight if scale is None else (weight * scale[:, None, None, None]).to(weight.dtype)


class Context(Protocol):
    """What autograd hands to a Function; an op says what else it keeps there."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors until the backward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Results that have no gradient."""


Again = tuple[Callable[..., Tensor], Sequence[Any]]
Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable(again: Callable[[Any], Again]) -> Callable[[Backward], Backward]:
    """Make the backward of an autograd.Function with one differentiable output one that can be
    differentiated itself, as often as PyTorch's operations can.

    A kernel's gradient has no graph, and a kernel takes one gradient at a time. Where a graph is
    wanted (`create_graph=True`: Hessian-vector products, MAML, gradient penalties) or many
    gradients come at once (`is_grads_batched=True`, `jacobian(vectorize=True)`), they come from
    autograd through PyTorch's operations.

    Args:
        again: of the context: a function that computes the first output by PyTorch's operations,
            and what it is called with, an entry for each argument of `forward`; tensors among them
            are those that were saved, which carry their history.
    """

    def decorate(backward: Backward) -> Backward:
        def wrapper(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
            # torch.compile refuses second derivatives by itself.
            compiling = torch.compiler.is_compiling()
            create_graph = torch.is_grad_enabled() and not compiling
            if not create_graph and (compiling or not _is_batched(grads[0])):
                with torch.no_grad():
                    return backward(ctx, *grads)
            run, args = again(ctx)
            wanted = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
            with torch.enable_grad():
                # A tensor may be given twice, as block input and as residual: views keep them
                # apart.
                own = [a.view_as(a) if i in wanted else a for i, a in enumerate(args)]
                y = run(*own)
            found = torch.autograd.grad(
                y,
                [own[i] for i in wanted],
                grads[0].to(y.dtype),
                create_graph=create_graph,
                allow_unused=True,
            )
            results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            for i, grad in zip(wanted, found, strict=True):
                results[i] = grad
            return tuple(results)

        return wrapper

    return decorate


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def triton_kernel(module: str, name: str) -> Run:
    """`name` of deeplab_fast.kernels.`module`, imported when it is called."""

    def run(*args: object) -> object:
        return getattr(importlib.import_module(f"deeplab_fast.kernels.{module}"), name)(*args)

    return run


def check_map(op: str, name: str, x: Tensor) -> None:
    """A feature map: four dimensions, a float dtype, at least one channel, row and column."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {name} must be a tensor [N, C, H, W], got {got}")
    check_dtype(op, name, x, FLOAT_DTYPES)
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(
            f"{op}: {name} {list(x.shape)} has no channels, rows or columns; only N may be 0"
        )


def check_dtype(op: str, name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """One of the allowed dtypes."""
    if x.dtype not in allowed:
        names, got = ", ".join(map(dtype_name, allowed)), dtype_name(x.dtype)
        raise TypeError(f"{op}: {name} has dtype {got}; allowed: {names}; convert it with .to()")


def check_shape(op: str, name: str, x: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Exactly the expected shape."""
    if not same_shape(x.shape, expected):
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)}, expected {list(expected)} ({meaning})"
        )


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """All on the device of the main input."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {other.device}, the main input on {x.device}; "
                "move them to one device"
            )


def is_option(value: object, least: int) -> bool:
    """Whether it is an int, also a symbolic one, from `least` to `LARGEST`."""
    if isinstance(value, torch.SymInt):
        # A bound above would be one of the graph's sizes.
        return bool(least <= value)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def check_option(op: str, name: str, value: object, least: int) -> None:
    """An int from `least` to `LARGEST`."""
    if not is_option(value, least):
        raise ValueError(f"{op}: {name} must be an int from {least} to {LARGEST}, got {value!r}")


def check_size(op: str, size: Sequence[int]) -> tuple[int, int]:
    """(height, width) from 1 to `LARGEST`."""
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"{op}: size must be (height, width), got {size!r}")
    height, width = size
    check_option(op, "height of size", height, 1)
    check_option(op, "width of size", width, 1)
    return height, width


def check_target(op: str, logits: Tensor, target: Tensor) -> None:
    """Labels [N, H, W] of an integer dtype, one map for each image of the logits."""
    if not isinstance(target, Tensor) or target.dim() != 3:
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{op}: target must be a tensor of labels [N, H, W], got {got}")
    check_dtype(op, "target", target, LABEL_DTYPES)
    check_device(op, logits, target=target)
    fits = same_shape(target.shape[:1], logits.shape[:1])
    if not fits or any(size < 1 for size in target.shape[1:]):
        raise ValueError(
            f"{op}: target {list(target.shape)} does not fit logits {list(logits.shape)}; "
            "expected one non-empty label map [H, W] for each of the N images"
        )
