"""Compares one call of a module in our forms with its own forward, on a small input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .intact import has_hooks
from .trace import filled, leaves

# Results and gradients.
_Found = tuple[list[Tensor], list[Tensor]]
# Columns of a map, at most as many rows, and images, that are compared.
_PIXELS, _IMAGES = 41, 4
# Of a convolution in fp32 whose form saves multiplications, and in fp64 (CONTRIBUTING.md).
_FP32, _FP64 = 1e-5, 1e-9
_TF32 = 2.0**-10
# Ours rounds at every layer, a moved input once; what no rounding explains.
_NOISE, _ANY = 8.0, 0.2
# A head whose pooled map is normalised over two images was 1.4 % off in fp32, 1e-13 in fp64.
_CANCELLED = 2.0**-5


def sample(module: nn.Module) -> Tensor | None:
    """An input [N, C, H, W] of a module's dtype and device, of the channels that the first layer
    with weights takes; None where none tells."""
    for m in module.modules():
        named = {nn.Conv2d: "in_channels", nn.BatchNorm2d: "num_features"}
        name = next((name for cls, name in named.items() if isinstance(m, cls)), None)
        weight = next(iter(m.parameters(recurse=False)), None)
        if name is None or weight is None:
            continue
        generator = torch.Generator().manual_seed(0)
        channels = getattr(m, name)
        # Of an image, which a network makes smaller, and of a map in the middle of one.
        size = (33, _PIXELS) if channels <= 4 else (13, 17)
        x = torch.randn(_IMAGES, channels, *size, generator=generator)
        # Images of one distribution would have nearly one mean, which a batch norm blows up.
        scale = torch.linspace(0.5, 1.5, _IMAGES)[:, None, None, None]
        return (x * scale + scale - 1).to(weight.device, weight.dtype)
    return None


def differing(
    module: nn.Module,
    x: Any,
    ours: Callable[[Any], Any],
    refused: object,
    gradients: bool,
    plainly: Callable[[], AbstractContextManager[None]],
) -> str | None:
    """Why a module must not run in our forms: by how much they differ from its forward.

    Args:
        module: the module, whose running statistics and the generators of random numbers are put
            back.
        x: a map, or lists, tuples and dicts of maps, of which a part is taken.
        ours: computes module(x) in our forms.
        refused: what that returns where it does not.
        gradients: compare those of x and of all parameters too.
        plainly: in its context the module runs its own forward.

    Returns:
        "" where they agree, else the difference and its bound; None where the module's own forward
        does not take such a call, or our forms refuse it.
    """
    if any(has_hooks(m) for m in module.modules() if m is not module):
        # They would see calls that nobody made.
        return ""
    cut = _PIXELS if isinstance(x, Tensor) else None
    x = filled(x, lambda t: t.detach()[:_IMAGES, :, :cut, :cut])
    first = next(leaves(x))
    with _kept(module, first, gradients) as again:
        found = _call(module, ours, x, gradients, refused)
        if found is None:
            return None

        def plain(x: Any) -> Any:
            again()
            with plainly():
                return _call(module, partial(type(module).forward, module), x, gradients)

        try:
            wanted = plain(x)
        except Exception:
            return None
        if isinstance(found, str):
            return found
        bound = _bound(module, first)
        # A sign that changes at a ReLU changes a gradient wholly, and that of a norm of two values,
        # which cancels, is what rounding leaves of it.
        limits = (bound, max(math.sqrt(bound), _CANCELLED))
        errors = _furthest(wanted, found)
        if any(error > limit for error, limit in zip(errors, limits, strict=True)):
            # How far the module's own forward is off when its input is, by one rounding.
            moved = plain(filled(x, _moved))
            noise = _furthest(wanted, moved)
            limits = (
                min(max(limits[0], _NOISE * noise[0]), _ANY),
                min(max(limits[1], _NOISE * noise[1]), _ANY),
            )
    for what, error, limit in zip(("results", "gradients"), errors, limits, strict=True):
        if not error <= limit:
            return (
                f"its {what} differ from those of its own forward by {error:.1e}, more than the "
                f"{limit:.1e} that rounding explains"
            )
    return ""


def _furthest(theirs: _Found, own: _Found) -> tuple[float, float]:
    """Of results the largest distance, of gradients that of all in one vector."""
    if any([a.shape for a in t] != [b.shape for b in o] for t, o in zip(theirs, own, strict=True)):
        return math.inf, math.inf
    results = [_squares(*pair) for pair in zip(theirs[0], own[0], strict=True)]
    gradients = [_squares(*pair) for pair in zip(theirs[1], own[1], strict=True)]
    off, size = (
        (sum(column) for column in zip(*gradients, strict=True)) if gradients else (0.0, 1.0)
    )
    return max(map(_ratio, results), default=0.0), _ratio((off, size))


def _moved(x: Tensor) -> Tensor:
    """x with every value a rounding away, and images apart, which means over pixels would hide."""
    signs = torch.ones_like(x)
    signs.view(-1)[::2] = -1
    signs[::2] += 2
    return x + x * signs * torch.finfo(x.dtype).eps


def _call(
    module: nn.Module,
    function: Callable[[Any], Any],
    x: Any,
    gradients: bool,
    refused: object = None,
) -> _Found | str | None:
    """Results and gradients; what went wrong in our forms, or None where they refuse."""
    given = filled(x, lambda t: t.clone().requires_grad_(gradients))
    try:
        y = function(given)
        if refused is not None and y is refused:
            return None
        results = [leaf for leaf in leaves(y) if isinstance(leaf, Tensor)]
        if not gradients:
            return results, []
        wanted = [*leaves(given), *(p for p in module.parameters() if p.requires_grad)]
        loss = sum(_weighted(result) for result in results if result.requires_grad)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if refused is None:
            raise
        return f"our forms fail: {type(error).__name__}: {str(error)[:200]}"
    return [result.detach() for result in results], [
        torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
    ]


def _weighted(y: Tensor) -> Tensor:
    index = torch.arange(y.numel(), device=y.device, dtype=torch.float64).view(y.shape)
    return (y.double() * torch.cos(index * 0.7)).sum() / math.sqrt(y.numel())


def _squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """|a - b|^2 and |a|^2, where a is finite; b must be finite there and nowhere else."""
    size = float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2
    off = float(torch.linalg.vector_norm(a - b, dtype=torch.float64)) ** 2
    if not math.isfinite(size):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf, 1.0
        return _squares(a[finite], b[finite])
    return off, size


def _ratio(squares: tuple[float, float]) -> float:
    off, size = squares
    return math.sqrt(off / size if size else off)


def _bound(module: nn.Module, x: Tensor) -> float:
    """How far results may be off by rounding alone, as CONTRIBUTING.md derives it."""
    convs = max(1, sum(isinstance(m, nn.Conv2d) for m in module.modules()))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype == torch.float64:
        return _FP64
    if dtype == torch.float32:
        tf32 = device == "cuda" and (
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        )
        each = _TF32 if tf32 else _FP32
    else:
        each = torch.finfo(dtype).eps
    return each * math.sqrt(convs)


@contextmanager
def _kept(module: nn.Module, x: Tensor, trains: bool) -> Iterator[Callable[[], None]]:
    """Puts back, at the end and when called, what a call of a module changes; dropouts rest."""
    buffers = [b for b in module.buffers() if not b.is_inference()] if trains else []
    with torch.no_grad():
        values = [b.clone() for b in buffers]
    dropouts = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training]
    own = torch.get_rng_state()
    device = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def again() -> None:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        torch.set_rng_state(own)
        if device is not None:
            torch.cuda.set_rng_state(device, x.device)

    for dropout in dropouts:
        dropout.training = False
    try:
        yield again
    finally:
        for dropout in dropouts:
            dropout.training = True
        again()
