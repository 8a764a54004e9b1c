"""Compares one call of a module in our forms with its own forward, on a small input."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .intact import runs_hooks
from .trace import filled, leaves

# Columns of a map, at most as many rows, and images, that are compared.
_PIXELS, _IMAGES = 41, 4
# What sizes are divisible by that are neither odd nor those of the call.
_EVEN = 32
# Of a convolution in fp32 whose form saves multiplications, and in fp64 (CONTRIBUTING.md).
_FP32, _FP64 = 1e-5, 1e-9
_TF32 = 2.0**-10
# Ours rounds at every layer, a moved input once; what no rounding explains.
_NOISE, _ANY = 8.0, 0.2
# A head whose pooled map is normalised over two images was 1.4 % off in fp32, 1e-13 in fp64.
_CANCELLED = 2.0**-5


def sample(module: nn.Module, even: bool = False) -> Tensor | None:
    """An input [N, C, H, W] of a module's dtype and device, of the channels that the first layer
    with weights takes, of odd sizes or those that networks want; None where none tells."""
    for m in module.modules():
        named = {nn.Conv2d: "in_channels", nn.BatchNorm2d: "num_features"}
        name = next((name for cls, name in named.items() if isinstance(m, cls)), None)
        weight = next(iter(m.parameters(recurse=False)), None)
        if name is None or weight is None:
            continue
        if weight.is_meta:
            # It computes nothing that could be compared.
            return None
        # Whatever device and dtype new tensors have by default.
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            channels = getattr(m, name)
            # Of an image, which a network makes smaller, and of a map in the middle of one.
            size = (33, _PIXELS) if channels <= 4 else (13, 17)
            size = (_EVEN, 2 * _EVEN) if even else size
            shape = (_IMAGES, channels, *size)
            x = torch.randn(shape, generator=generator, dtype=torch.float32)
            # Images of one distribution would have nearly one mean, which a batch norm blows up.
            scale = torch.linspace(0.5, 1.5, _IMAGES)[:, None, None, None]
            x = x * scale + scale - 1
        return x.to(weight.device, weight.dtype)
    return None


@dataclass(frozen=True)
class Found:
    """What a comparison said.

    Attributes:
        reason: why the module must not run in our forms; "" where they agree.
        channels_last: of each result of the module's own forward, in order: whether it is
            channels_last; None where it is that and contiguous too, or neither.
    """

    reason: str
    channels_last: tuple[bool | None, ...] | None = None


# Nothing speaks against the module, nor for it.
UNCOMPARED = Found("")


def differing(
    module: nn.Module,
    x: Any,
    ours: Callable[[Any], Any],
    refused: object,
    gradients: bool,
    plainly: Callable[[], AbstractContextManager[None]],
) -> Found | None:
    """By how much a module in our forms differs from its own forward.

    Args:
        module: the module, whose running statistics and the generators of random numbers are put
            back.
        x: a map, or lists, tuples and dicts of maps, of which a part is taken.
        ours: computes module(x) in our forms.
        refused: what that returns where it does not.
        gradients: compare those of x and of all parameters too, but of parameters whose hooks would
            see gradients that nobody asked for.
        plainly: in its context the module runs its own forward.

    Returns:
        None where nothing could be compared: the module's own forward does not take such a call, or
        our forms refuse it. `UNCOMPARED` where hooks in the module would see it.
    """
    if any(runs_hooks(m) for m in module.modules() if m is not module):
        # They would see calls that nobody made.
        return UNCOMPARED
    for part in _small_parts(x):
        with _kept(module, next(leaves(part))) as again, _own_saved_tensors(gradients):
            found = _call(module, ours, part, gradients, refused)
            if found is None:
                # Of these sizes.
                continue
            again()
            own = partial(_plain, module, gradients, plainly, again)
            try:
                wanted = own(part)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # Perhaps its own forward takes maps of other sizes.
                continue
            if isinstance(found, str):
                return Found(found)
            channels_last = tuple(map(_is_channels_last, wanted.results))
            reason = _compared(module, part, wanted, found, own)
            if reason and wanted.draws:
                # Random numbers are drawn in the order of a map's memory, which is channels_last
                # in our forms.
                part = filled(part, lambda t: t.contiguous(memory_format=torch.channels_last))
                again()
                found = _call(module, ours, part, gradients, refused)
                again()
                if isinstance(found, _Results):
                    reason = _compared(module, part, own(part), found, own)
            return Found(reason, channels_last)
    return None


def _small_parts(x: Any) -> Iterator[Any]:
    """Parts of maps that are compared: of odd sizes, of even ones, which some forwards need, and
    the maps as they are."""
    whole = filled(x, Tensor.detach)
    if isinstance(x, Tensor):
        shapes = {x.shape}
        for multiple, most in ((1, _PIXELS), (_EVEN, 2 * _EVEN)):
            rows, columns = (min(size - size % multiple, most) for size in x.shape[2:])
            part = whole[:_IMAGES, :, :rows, :columns]
            if part.shape not in shapes and part.numel():
                shapes.add(part.shape)
                yield part
    else:
        yield filled(whole, lambda t: t[:_IMAGES])
    yield whole


def _plain(
    module: nn.Module,
    gradients: bool,
    plainly: Callable[[], AbstractContextManager[None]],
    again: Callable[[], None],
    x: Any,
) -> _Results:
    """Of the module's own forward."""
    with plainly():
        try:
            found = _call(module, partial(type(module).forward, module), x, gradients)
        finally:
            again()
    assert isinstance(found, _Results)
    return found


def _compared(
    module: nn.Module,
    x: Any,
    wanted: _Results,
    found: _Results,
    own: Callable[[Any], _Results],
) -> str:
    """Why our results must not stand for those of the module's own forward; "" where they may."""
    if wanted.changes_input:
        return "its forward changes its input in place"
    if wanted.structure != found.structure:
        return f"it returns {wanted.structure}, our forms {found.structure}"
    bound = _bound(module, next(leaves(x)))
    # A sign that changes at a ReLU changes a gradient wholly, and that of a norm of two values,
    # which cancels, is what rounding leaves of it.
    limits = (bound, max(math.sqrt(bound), _CANCELLED))
    errors = _furthest(wanted, found)
    if any(error > limit for error, limit in zip(errors, limits, strict=True)):
        # How far the module's own forward is off when its input is, by one rounding.
        noise = _furthest(wanted, own(filled(x, _moved)))
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


def _furthest(theirs: _Results, own: _Results) -> tuple[float, float]:
    """Of results the largest distance, of gradients that of all in one vector."""
    results = [_squares(*pair) for pair in zip(theirs.results, own.results, strict=True)]
    pairs = zip(theirs.gradients, own.gradients, strict=True)
    # One vector, as some gradients are 0 in exact arithmetic.
    gradients = [_squares(*pair) for pair in pairs]
    off, size = (sum(column) for column in zip((0.0, 0.0), *gradients, strict=True))
    return max(map(_ratio, results), default=0.0), _ratio((off, size))


def _moved(x: Tensor) -> Tensor:
    """x with every value a rounding away, and images apart, which means over pixels would hide."""
    if not x.is_floating_point():
        return x
    signs = torch.ones_like(x, memory_format=torch.contiguous_format)
    signs.view(-1)[::2] = -1
    signs[::2] += 2
    return x + x * signs * torch.finfo(x.dtype).eps


@dataclass
class _Results:
    """Of one call.

    Attributes:
        results, gradients: tensors.
        structure: of what was returned, with dtypes and shapes.
        changes_input: the input has another content afterwards.
        draws: random numbers were drawn.
    """

    results: list[Tensor]
    gradients: list[Tensor]
    structure: str
    changes_input: bool
    draws: bool


def _call(
    module: nn.Module,
    function: Callable[[Any], Any],
    x: Any,
    gradients: bool,
    refused: object = None,
) -> _Results | str | None:
    """What a call gives; what went wrong in our forms, or None where they refuse."""
    # Of a tensor made here a change can be seen, also in inference mode.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        leaf = filled(x, lambda t: t.clone().requires_grad_(gradients and _is_real(t)))
        # What requires gradients may be changed in place where it is no leaf.
        given = filled(leaf, Tensor.clone) if gradients else leaf
    versions = [t._version for t in leaves(given)]
    numbers = torch.get_rng_state()
    try:
        y = function(given)
        if refused is not None and y is refused:
            return None
        changes = [t._version for t in leaves(given)] != versions
        results = [each for each in leaves(y) if isinstance(each, Tensor)]
        grads: list[Tensor] = []
        if gradients:
            own = (p for p in module.parameters() if p.requires_grad and not p._backward_hooks)
            wanted = [t for t in (*leaves(leaf), *own) if t.requires_grad]
            losses = [_weighted(result) for result in results if result.requires_grad]
            if losses and wanted:
                found = torch.autograd.grad(sum(losses), wanted, allow_unused=True)  # type: ignore[arg-type]
                grads = [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(wanted, found, strict=True)
                ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if refused is None:
            raise
        return f"our forms fail: {type(error).__name__}: {str(error)[:200]}"
    draws = not torch.equal(numbers, torch.get_rng_state())
    return _Results([t.detach() for t in results], grads, _described(y), changes, draws)


def _described(y: Any) -> str:
    """The structure of a result, with dtypes and shapes of its tensors."""
    cls = type(y)
    if cls in (list, tuple):
        return f"{cls.__name__}({', '.join(map(_described, y))})"
    if cls in (dict, OrderedDict):
        return f"{cls.__name__}({', '.join(f'{k!r}: {_described(v)}' for k, v in y.items())})"
    if isinstance(y, Tensor):
        needs = " with gradients" if y.requires_grad else ""
        return f"{str(y.dtype).removeprefix('torch.')}{list(y.shape)}{needs}"
    return cls.__name__


def _is_channels_last(y: Tensor) -> bool | None:
    if y.dim() != 4:
        return None
    last = y.is_contiguous(memory_format=torch.channels_last)
    return None if last == y.is_contiguous() else last


def _is_real(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


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
def _own_saved_tensors(gradients: bool) -> Iterator[None]:
    """What is saved for gradients here is no business of hooks that somebody set, as checkpoint
    does, which counts them."""
    if not gradients or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(t: Tensor) -> Tensor:
    return t


@contextmanager
def _kept(module: nn.Module, x: Tensor) -> Iterator[Callable[[], None]]:
    """Puts back, at the end and when called, what a call of a module changes; dropouts rest."""
    buffers = [b for b in module.buffers() if not (b.is_inference() or b.is_meta)]
    with torch.inference_mode(False), torch.no_grad():
        values = [b.clone() for b in buffers]
    dropouts = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training]
    own = torch.get_rng_state()
    device = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def again() -> None:
        for buffer, value in zip(buffers, values, strict=True):
            # A graph may hold one that a frozen norm did not change, which it is told of by a
            # version counter; `data` has one of its own.
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
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
