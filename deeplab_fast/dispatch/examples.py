"""Calls of ops at example sizes: arguments, and the kinds of their results.

A step is one call of an op's implementation, as `choice` makes it. Its arguments follow from a form
(`trust.form`) and a size, so that what is checked and measured is what a record will be asked
about.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .describe import OpDesc

# Kinds of results: numbers, class labels, counts of pixels.
VALUES = "values"
LABELS = "labels"
COUNTS = "counts"
# The label of examples that counts for nothing.
IGNORED = 255

Run = Callable[..., Any]
# What PyTorch alone offers for a call, by name; the first is the plain one.
Forms = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Size:
    """Sizes of a call; an op reads those that it has.

    Attributes:
        n, c, h, w: of its main input.
        height, width: of what is upsampled to.
        filters: of a convolution, where 0 is a depthwise one, or of each branch.
        rates: dilations of the 3x3 branches, before which a 1x1 branch comes; the dilation of a
            convolution, which is 3x3 where there is one and else 1x1.
        pooled: channels of the pooled branch.
        classes: of a classifier behind the projection.
        stride: of a 1x1 convolution.
        layers: shapes [K, C, R, S] of the filters of several convolutions.
    """

    n: int
    c: int
    h: int
    w: int
    height: int = 0
    width: int = 0
    filters: int = 0
    rates: tuple[int, ...] = ()
    pooled: int = 0
    classes: int = 0
    stride: int = 1
    layers: tuple[tuple[int, int, int, int], ...] = ()

    def __str__(self) -> str:
        more = [
            f"{f.name}={len(value) if f.name == 'layers' else value}"
            for f in fields(self)[4:]
            if (value := getattr(self, f.name)) != f.default
        ]
        return " ".join([f"{self.n}x{self.c}x{self.h}x{self.w}", *more])


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        form, size: what it is.
        args: positional arguments of `Implementation.run`.
        kinds: of its results.
        desc: of the call, for the CPU or the meta device; `on` gives that of a GPU.
        method: of an op with several functions; "" for ops that are one.
        changed: the argument that is the result, -1 where results are returned.
    """

    form: str
    size: Size
    args: tuple[Any, ...]
    kinds: tuple[str, ...]
    desc: OpDesc
    method: str = ""
    changed: int = -1

    @property
    def op(self) -> str:
        """Name of the op."""
        return self.desc.op

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return _tensors(self.args)

    def run(self, implementation: Run) -> list[Tensor]:
        """Call an implementation's `run`; the results, an argument that it changes is copied."""
        return flat(self._results(implementation, copies=True))

    def launch(self, implementation: Run) -> object:
        """As `run` without copies: what is timed."""
        return self._results(implementation, copies=False)

    def _results(self, implementation: Run, copies: bool) -> object:
        # Of several functions an implementation has the methods; one function may stand for all.
        function = implementation
        if self.method:
            function = getattr(implementation, self.method, implementation)
        if self.changed < 0:
            return function(*self.args)
        args = list(self.args)
        if copies:
            args[self.changed] = args[self.changed].clone()
        function(*args)
        return args[self.changed]

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Step:
        """The step with every floating-point tensor replaced."""
        return self._with(convert, lambda t: t)

    def moved(self, device: str) -> Step:
        """The step with its tensors on a device."""
        return self._with(*[lambda t: t.to(device)] * 2)

    def of(self, tensors: Iterable[Tensor]) -> Step:
        """The step with others in place of its `tensors`."""
        others = iter(tensors)
        return self._with(*[lambda t: next(others)] * 2)

    def wide(self) -> Step:
        """The step in float64, on the CPU."""
        return self._with(lambda t: t.cpu().double(), Tensor.cpu)

    def _with(self, floats: Callable[[Tensor], Tensor], others: Callable[[Tensor], Tensor]) -> Step:
        return replace(self, args=tuple(_mapped(arg, floats, others) for arg in self.args))

    def on(self, capability: tuple[int, int], gpu: str = "") -> OpDesc:
        """The description of the call on a GPU."""
        return replace(self.desc, device="cuda", capability=capability, gpu=gpu)


@dataclass(frozen=True)
class Shapes:
    """What goes through a model, from which the calls of its ops follow.

    Attributes:
        logits: of the main logits, and what they are upsampled to.
        norms: maps that batch norms see.
        pointwise: of 1x1 convolutions.
        aspp: of the branches; None for a model without.
        acts: activations that the model has.
        filters: shapes [K, C, R, S] of convolutions with a batch norm behind them.
    """

    logits: Size
    norms: tuple[Size, ...]
    pointwise: tuple[Size, ...]
    aspp: Size | None
    acts: tuple[str, ...] = ("relu",)
    filters: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True)
class Examples:
    """Example calls of an op.

    Attributes:
        forms: of its calls (`trust.form`), the commonest first.
        build: (maker, form, size) -> the calls that together are a form: one, and of an op with
            several functions one or more of each.
        pytorch: what PyTorch alone offers for a step. Results are those of the step, up to dtypes
            of labels.
        sizes: that it is checked at; each covers an edge.
        works: (form, size) of the calls of a model.
        exact: results of a step in float64, where those of the reference do not tell; of labels
            the logits that they are the best of.
        in_fp32: it computes in fp32 whatever the dtype of its main input.
        capturable: False where a form of PyTorch's waits for the device.
    """

    forms: tuple[str, ...]
    build: Callable[[Maker, str, Size], list[Step]]
    pytorch: Callable[[Step], Forms]
    sizes: tuple[Size, ...]
    works: Callable[[Shapes], list[tuple[str, Size]]]
    exact: Callable[[Step], list[Tensor]] | None = None
    in_fp32: bool = False
    capturable: bool = True


class Maker:
    """Tensors of an example: random, and away from what hides errors (0 and 1)."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        # On the meta device nothing is drawn: there that takes longer than anything else, and
        # imports the compiler.
        self.random = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def of(self, dtype: torch.dtype) -> Maker:
        """A maker of another dtype that goes on with the same random numbers."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def map(self, n: int, c: int, h: int, w: int, scale: float = 1.0) -> Tensor:
        """[n, c, h, w], channels_last, in the dtype."""
        return self._normal(n, h, w, c, scale=scale).to(self.dtype).permute(0, 3, 1, 2)

    def weight(self, k: int, c: int, size: int) -> Tensor:
        """Filters [k, c, size, size] whose results have a standard deviation of about 1."""
        return self.map(k, c, size, size, (c * size * size) ** -0.5).contiguous()

    def vector(self, count: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """[count] fp32, uniform."""
        if self.random is None:
            return torch.empty(count, device=self.device)
        values = torch.rand(count, generator=self.random, device=self.device)
        return values * (high - low) + low

    def matrix(self, rows: int, cols: int) -> Tensor:
        """[rows, cols] in the dtype."""
        return self._normal(rows, cols).to(self.dtype)

    def labels(self, n: int, height: int, width: int, classes: int) -> Tensor:
        """[n, height, width] int64, some of them ignored."""
        shape = (n, height, width)
        if self.random is None:
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        found = torch.randint(classes, shape, generator=self.random, device=self.device)
        ignored = torch.rand(shape, generator=self.random, device=self.device) < 0.05
        return found.masked_fill(ignored, IGNORED)

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.random is None:
            return torch.empty(shape, device=self.device)
        return torch.randn(shape, generator=self.random, device=self.device) * scale


def elements(size: Size) -> int:
    """Values of the larger of the maps that a call of a size reads and writes."""
    return size.n * max(size.c * size.h * size.w, size.c * size.height * size.width)


def spread(sizes: Iterable[Size]) -> list[Size]:
    """The largest, the smallest and the one in the middle, each once."""
    ordered = sorted(set(sizes), key=lambda s: (elements(s), s.filters, s.stride), reverse=True)
    if not ordered:
        return []
    return list(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))


def flat(results: object) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(results, Tensor):
        return [results]
    assert isinstance(results, (tuple, list))
    return [t for part in results for t in flat(part)]


def _tensors(args: object) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [t for part in args for t in _tensors(part)] if isinstance(args, (tuple, list)) else []


def _mapped(
    value: object,
    floats: Callable[[Tensor], Tensor],
    others: Callable[[Tensor], Tensor],
) -> object:
    if isinstance(value, Tensor):
        return floats(value) if value.is_floating_point() else others(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, floats, others) for part in value)
    return value
