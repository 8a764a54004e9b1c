"""The ops at example sizes: arguments, the exact result, and what PyTorch alone would run.

A step is one call of an op's implementation, as `backends` makes it. Its arguments follow from a
form (`dispatch.trust.form`) and a size, so that what is checked and measured is what a record will
be asked about.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, ops, reference
from ..ops import _cudnn
from ..ops.upsample_cross_entropy import CrossEntropy

# Kinds of results: numbers, class labels, counts of pixels.
VALUES = "values"
LABELS = "labels"
COUNTS = "counts"
IGNORED = 255

_ACTS = ("relu", "relu6", "hardswish")
_NORM_FORMS = ("relu", "relu+residual", "relu6", "hardswish", "plain", "residual")
FORMS: dict[str, tuple[str, ...]] = {
    "upsample_argmax": ("plain", "return_prob"),
    "upsample_cross_entropy": ("plain",),
    "upsample_confusion": ("plain",),
    "upsample_softmax_add": ("plain", "flip"),
    "batch_stats": ("plain",),
    "bn_act": _NORM_FORMS,
    "bn_act_reduce": _NORM_FORMS,
    "bn_act_backward": _NORM_FORMS,
    "aspp_convs": ("plain",),
    "aspp_convs_backward": ("plain",),
    "aspp_branches": ("plain",),
    "aspp_project": ("plain", "classes"),
    "conv_bn_act": ("relu", "relu+residual", "plain", "residual"),
}


@dataclass(frozen=True)
class Size:
    """Sizes of a step; an op reads those that it has.

    Attributes:
        n, c, h, w: of its main input.
        height, width: of what is upsampled to.
        filters: of a convolution, or of each branch.
        rates: dilations of the 3x3 branches; a 1x1 branch comes before them.
        pooled: channels of the pooled branch.
        classes: of a classifier behind the projection.
        stride: of a 1x1 convolution.
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

    def __str__(self) -> str:
        more = [
            f"{f.name}={value}"
            for f in fields(self)[4:]
            if (value := getattr(self, f.name)) != f.default
        ]
        return " ".join([f"{self.n}x{self.c}x{self.h}x{self.w}", *more])


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        op, form, size: what it is.
        args: positional arguments of `Implementation.run`.
        kinds: of its results.
        desc: of the call, for the CPU or the meta device; `on` gives that of a GPU.
        method: of a `CrossEntropy`, "" for ops that are one function.
        changed: the argument that is the result, -1 where results are returned.
    """

    op: str
    form: str
    size: Size
    args: tuple[Any, ...]
    kinds: tuple[str, ...]
    desc: backends.OpDesc
    method: str = ""
    changed: int = -1

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return _tensors(self.args)

    def run(self, implementation: Callable[..., Any]) -> list[Tensor]:
        """Call an implementation's `run`; the results, an argument that it changes is copied."""
        return flat(self._results(implementation, copies=True))

    def launch(self, implementation: Callable[..., Any]) -> Any:
        """As `run` without copies: what is timed."""
        return self._results(implementation, copies=False)

    def _results(self, implementation: Callable[..., Any], copies: bool) -> Any:
        function = implementation
        if self.method and isinstance(implementation, CrossEntropy):
            function = getattr(implementation, self.method)
        if self.changed < 0:
            return function(*self.args)
        args = list(self.args)
        if copies:
            args[self.changed] = args[self.changed].clone()
        function(*args)
        return args[self.changed]

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Step:
        """The step with every floating-point tensor replaced."""
        return replace(self, args=_mapped(self.args, convert))

    def moved(self, device: str) -> Step:
        """The step with its tensors on a device."""
        return replace(self, args=_mapped(self.args, *[lambda t: t.to(device)] * 2))

    def exact(self) -> list[Tensor]:
        """Its results in float64, on the CPU; of labels the logits that they are the best of."""
        wide = replace(self, args=_mapped(self.args, lambda t: t.cpu().double(), lambda t: t.cpu()))
        if self.op == "upsample_argmax":
            logits, size, align_corners, return_prob = wide.args
            full = reference.upsample(logits, size, align_corners)
            return [full, full.softmax(1).amax(1)] if return_prob else [full]
        return wide.run(backends.implementations(self.op)["reference"].run)

    def on(self, capability: tuple[int, int], gpu: str = "") -> backends.OpDesc:
        """The description of the call on a GPU."""
        return replace(self.desc, device="cuda", capability=capability, gpu=gpu)


def steps(
    op: str, form: str, size: Size, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Step]:
    """The calls that together are a form of an op: one, and for the loss its three functions."""
    make = _Maker(dtype, device, seed)
    return _BUILDERS[op](make, form, size)


def pytorch_forms(step: Step) -> dict[str, Callable[[], Any]]:
    """What PyTorch alone offers for a step, by name; the first is the plain one.

    Results are those of the step, up to dtypes of labels.
    """
    device = step.tensors[0].device
    return _PYTORCH[step.op](step, device.type == "cuda")


class _Maker:
    """Tensors of a step: random, and away from what hides errors (0 and 1)."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        # On the meta device nothing is drawn: there that takes longer than anything else, and
        # imports the compiler.
        self.random = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def of(self, dtype: torch.dtype) -> _Maker:
        """A maker of another dtype that goes on with the same random numbers."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def map(self, n: int, c: int, h: int, w: int, scale: float = 1.0) -> Tensor:
        """[n, c, h, w], channels_last, in the dtype."""
        values = self._normal(n, h, w, c) * scale
        return values.to(self.dtype).permute(0, 3, 1, 2)

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

    def _normal(self, *shape: int) -> Tensor:
        if self.random is None:
            return torch.empty(shape, device=self.device)
        return torch.randn(shape, generator=self.random, device=self.device)


def _argmax(make: _Maker, form: str, s: Size) -> list[Step]:
    logits, size, prob = make.map(s.n, s.c, s.h, s.w), (s.height, s.width), form == "return_prob"
    desc = ops.describe("upsample_argmax", logits, size, return_prob=prob)
    kinds = (LABELS, VALUES) if prob else (LABELS,)
    return [Step("upsample_argmax", form, s, (logits, size, False, prob), kinds, desc)]


def _cross_entropy(make: _Maker, form: str, s: Size) -> list[Step]:
    logits = make.map(s.n, s.c, s.h, s.w)
    target = make.labels(s.n, s.height, s.width, s.c)
    weight = make.vector(s.c)
    desc = ops.describe("upsample_cross_entropy", logits, target)
    pixels = make.vector(target.numel()).view(target.shape)

    def step(method: str, args: tuple[Any, ...]) -> Step:
        kinds = (VALUES, VALUES)
        return Step("upsample_cross_entropy", form, s, args, kinds, desc, method)

    options = (IGNORED, 0.0, "mean", False)
    return [
        step("with_grad", (logits, target, None, *options)),
        step("forward", (logits, target, None, *options)),
        step("with_grad", (logits, target, weight, IGNORED, 0.1, "sum", True)),
        step("forward", (logits, target, weight, IGNORED, 0.1, "none", False)),
        step("backward", (pixels, logits, target, weight, IGNORED, 0.1, "none", False)),
    ]


def _confusion(make: _Maker, form: str, s: Size) -> list[Step]:
    logits = make.map(s.n, s.c, s.h, s.w)
    target = make.labels(s.n, s.height, s.width, s.c)
    desc = ops.describe("upsample_confusion", logits, target)
    return [Step("upsample_confusion", form, s, (logits, target, IGNORED, False), (COUNTS,), desc)]


def _softmax_add(make: _Maker, form: str, s: Size) -> list[Step]:
    logits, flip = make.map(s.n, s.c, s.h, s.w), form == "flip"
    total = make.of(torch.float32).map(s.n, s.c, s.height, s.width).contiguous()
    desc = ops.describe("upsample_softmax_add", total, logits, flip=flip)
    args = (total, logits, flip, False)
    return [Step("upsample_softmax_add", form, s, args, (VALUES,), desc, changed=0)]


def _norm(op: str) -> Callable[[_Maker, str, Size], list[Step]]:
    def build(make: _Maker, form: str, s: Size) -> list[Step]:
        parts = form.split("+")
        act = next((a for a in _ACTS if a in parts), None)
        x, grad, given = (make.map(s.n, s.c, s.h, s.w) for _ in range(3))
        other = given if "residual" in parts else None
        mean, bias = make.vector(s.c, -0.5, 0.5), make.vector(s.c, -0.5, 0.5)
        rstd, weight = make.vector(s.c), make.vector(s.c)
        vectors = (mean, rstd, weight, bias)
        if op == "batch_stats":
            return [Step(op, form, s, (x,), (VALUES, VALUES), ops.describe(op, x))]
        if op == "bn_act":
            desc = ops.describe(op, x, *vectors, residual=other, act=act)
            return [Step(op, form, s, (x, *vectors, other, act), (VALUES,), desc)]
        desc = ops.describe(op, grad, x, *vectors, out=other, act=act)
        if op == "bn_act_reduce":
            args: tuple[Any, ...] = (grad, x, *vectors, other, act)
            return [Step(op, form, s, args, (VALUES, VALUES), desc)]
        means = make.vector(s.c, -0.1, 0.1), make.vector(s.c, -0.1, 0.1)
        args = (grad, x, *vectors, other, *means, act, other is not None)
        return [Step(op, form, s, args, (VALUES, VALUES), desc)]

    return build


def _branches(make: _Maker, s: Size) -> tuple[Tensor, list[Tensor], list[int]]:
    x = make.map(s.n, s.c, s.h, s.w).relu_()
    weights = [make.weight(s.filters, s.c, 3 if i else 1) for i in range(1 + len(s.rates))]
    return x, weights, [1, *s.rates]


def _aspp_branches(make: _Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _branches(make, s)
    scales = [make.vector(s.filters) for _ in weights]
    shifts = [make.vector(s.filters, -0.5, 0.5) for _ in weights]
    args = (x, weights, scales, shifts, dilations)
    desc = ops.describe("aspp_branches", *args)
    return [Step("aspp_branches", form, s, args, (VALUES,), desc)]


def _aspp_convs(make: _Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _branches(make, s)
    desc = ops.describe("aspp_convs", x, weights, dilations)
    return [
        Step("aspp_convs", form, s, (x, weights, dilations, stats), (VALUES,) * 3, desc)
        for stats in (True, False)
    ]


def _aspp_convs_backward(make: _Maker, form: str, s: Size) -> list[Step]:
    x, weights, dilations = _branches(make, s)
    grad = make.map(s.n, s.filters * len(weights), s.h, s.w)
    desc = replace(ops.describe("aspp_convs", x, weights, dilations), op="aspp_convs_backward")
    args = (grad, x, weights, dilations, True, True)
    return [Step("aspp_convs_backward", form, s, args, (VALUES,) * (1 + len(weights)), desc)]


def _aspp_project(make: _Maker, form: str, s: Size) -> list[Step]:
    branches, pooled = make.map(s.n, s.c, s.h, s.w).relu_(), make.matrix(s.n, s.pooled).relu_()
    weight = make.weight(s.filters, s.c + s.pooled, 1)
    scale, shift = make.vector(s.filters), make.vector(s.filters, -0.5, 0.5)
    args: tuple[Any, ...] = (branches, pooled, weight, scale, shift)
    options = {}
    if form == "classes":
        classifier = make.weight(s.classes, s.filters, 1), make.vector(s.classes)
        args, options = (*args, *classifier), {"classifier": classifier}
    desc = ops.describe("aspp_project", *args[:5], **options)
    return [Step("aspp_project", form, s, args, (VALUES,), desc)]


def _conv_bn_act(make: _Maker, form: str, s: Size) -> list[Step]:
    x, weight = make.map(s.n, s.c, s.h, s.w).relu_(), make.weight(s.filters, s.c, 1)
    scale, shift = make.vector(s.filters), make.vector(s.filters, -0.5, 0.5)
    parts, residual = form.split("+"), None
    if "residual" in parts:
        residual = make.map(s.n, s.filters, -(-s.h // s.stride), -(-s.w // s.stride))
    act = "relu" if "relu" in parts else None
    desc = ops.describe(
        "conv_bn_act", x, weight, scale, shift, stride=s.stride, residual=residual, act=act
    )
    args = (x, weight, scale, shift, s.stride, 0, 1, 1, residual, act)
    return [Step("conv_bn_act", form, s, args, (VALUES,), desc)]


_BUILDERS: dict[str, Callable[[_Maker, str, Size], list[Step]]] = {
    "upsample_argmax": _argmax,
    "upsample_cross_entropy": _cross_entropy,
    "upsample_confusion": _confusion,
    "upsample_softmax_add": _softmax_add,
    "batch_stats": _norm("batch_stats"),
    "bn_act": _norm("bn_act"),
    "bn_act_reduce": _norm("bn_act_reduce"),
    "bn_act_backward": _norm("bn_act_backward"),
    "aspp_convs": _aspp_convs,
    "aspp_convs_backward": _aspp_convs_backward,
    "aspp_branches": _aspp_branches,
    "aspp_project": _aspp_project,
    "conv_bn_act": _conv_bn_act,
}


# What PyTorch alone runs, in channels_last, its fastest layout. Its batch norm takes no eps of 0
# (2.11); this one is lost beside any variance here.
_EPS = 1e-12
Forms = dict[str, Callable[[], Any]]


def _interpolated(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _pytorch_argmax(step: Step, cuda: bool) -> Forms:
    logits, size, align_corners, return_prob = step.args

    def composed() -> Any:
        full = _interpolated(logits, size, align_corners)
        labels = full.argmax(1)
        return (labels, full.softmax(1).amax(1)) if return_prob else labels

    return {"interpolate, argmax": composed}


def _pytorch_cross_entropy(step: Step, cuda: bool) -> Forms:
    args = step.args[1:] if step.method == "backward" else step.args
    logits, target, weight, ignored, smoothing, reduction, align_corners = args

    def loss(x: Tensor) -> Tensor:
        full = _interpolated(x, target.shape[-2:], align_corners).float()
        return F.cross_entropy(
            full, target, weight, ignore_index=ignored, label_smoothing=smoothing,
            reduction=reduction,
        )  # fmt: skip

    def with_gradient() -> Any:
        x = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(x)
            given = step.args[0] if step.method == "backward" else None
            (grad,) = torch.autograd.grad(value, x, given)
        return grad if step.method == "backward" else (value.detach(), grad)

    name = "interpolate, cross_entropy"
    return {name: (lambda: loss(logits)) if step.method == "forward" else with_gradient}


def _pytorch_confusion(step: Step, cuda: bool) -> Forms:
    logits, target, ignored, align_corners = step.args
    classes = logits.shape[1]

    def composed() -> Tensor:
        labels = _interpolated(logits, target.shape[-2:], align_corners).argmax(1)
        # Without a selection, whose size the host would wait for: ignored pixels go to a row more.
        rows = torch.where(target == ignored, classes, target)
        pairs = (rows * classes + labels).flatten()
        return torch.bincount(pairs, minlength=classes * (classes + 1))[: classes**2].view(
            classes, classes
        )

    return {"interpolate, argmax, bincount": composed}


def _pytorch_softmax_add(step: Step, cuda: bool) -> Forms:
    total, logits, flip, align_corners = step.args

    def composed() -> Tensor:
        prob = _interpolated(logits, total.shape[-2:], align_corners).softmax(1)
        return total.add_(prob.flip(-1) if flip else prob)

    return {"interpolate, softmax, add": composed}


def _activated(y: Tensor, act: str | None) -> Tensor:
    functions: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda y: y, "relu": torch.relu_, "relu6": F.relu6, "hardswish": F.hardswish,
    }  # fmt: skip
    return functions[act](y)


def _pytorch_norm(step: Step, cuda: bool) -> Forms:
    run = backends.implementations(step.op)["reference"].run
    composed: Forms = {"elementwise": lambda: run(*step.args)}
    if step.op == "batch_stats":
        (x,) = step.args
        found: Forms = {"var_mean": lambda: torch.var_mean(x, (0, 2, 3), correction=0)[::-1]}
        if cuda:
            found["batch_norm_stats"] = lambda: torch.batch_norm_stats(x, _EPS)
        return found
    if step.op == "bn_act":
        x, mean, rstd, weight, bias, residual, act = step.args
        variance = rstd**-2

        def applied(norm: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                y = norm()
                return _activated(y if residual is None else y.add_(residual), act)

            return run

        found = {
            "batch_norm": applied(
                lambda: F.batch_norm(x, mean, variance, weight, bias, False, 0.0, _EPS)
            )
        }
        if cuda:
            found["batch_norm_elemt"] = applied(
                lambda: torch.batch_norm_elemt(x, weight, bias, mean, rstd, _EPS)
            )
        return found
    # The split passes of synchronised batch norm are the same steps. They take the gradient behind
    # a ReLU, for which PyTorch has a pass that reads its result.
    grad, x, mean, rstd, weight, _, out, *rest = step.args
    act = rest[0] if step.op == "bn_act_reduce" else rest[2]
    if not cuda or act not in (None, "relu") or (act and out is None):
        return composed

    def behind() -> Tensor:
        return grad if act is None else torch.ops.aten.threshold_backward(grad, out, 0)

    if step.op == "bn_act_reduce":
        return {
            "batch_norm_backward_reduce": lambda: torch.batch_norm_backward_reduce(
                behind(), x, mean, rstd, weight, False, True, True
            )[2:][::-1],
            **composed,
        }
    pixels = x.numel() // x.shape[1]
    count = torch.tensor([pixels], dtype=torch.int32, device=x.device)
    sums = rest[0] * pixels, rest[1] * pixels / rstd

    def backward() -> Any:
        g = behind()
        dx = torch.batch_norm_backward_elemt(g, x, mean, rstd, weight, *sums, count)
        return (dx, g) if rest[3] else dx

    return {"batch_norm_backward_elemt": backward, **composed}


def _norm_of(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    zero = torch.zeros_like(scale)
    return F.batch_norm(y, zero, torch.ones_like(scale), scale, shift, False, 0.0, _EPS)


def _fused_layer(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, padding: int = 0, dilation: int = 1,
    stride: int = 1, residual: Tensor | None = None, act: str | None = "relu",
) -> Callable[[], Tensor]:  # fmt: skip
    """cuDNN's convolution, fused where it can, with weights folded beforehand."""
    folded, one = _cudnn.fold(weight, scale), torch.ones_like(scale)
    geometry = (stride, padding, dilation, 1)
    return lambda: _cudnn.conv_bn_act(x, folded, one, shift, *geometry, residual, act)


def _pytorch_branches(step: Step, cuda: bool) -> Forms:
    x, weights, scales, shifts, dilations = step.args
    layers = list(zip(weights, scales, shifts, dilations, strict=True))

    def composed() -> Tensor:
        found = []
        for weight, scale, shift, d in layers:
            y = F.conv2d(x, weight, None, 1, reference.branch_padding(weight, d), d)
            found.append(_norm_of(y, scale, shift).relu_())
        return torch.cat(found, 1)

    forms: Forms = {"convolutions, batch norms, cat": composed}
    if cuda:
        fused = [
            _fused_layer(x, w, scale, shift, reference.branch_padding(w, d), d)
            for w, scale, shift, d in layers
        ]
        forms["cuDNN fused, cat"] = lambda: torch.cat([run() for run in fused], 1)
    return forms


def _pytorch_project(step: Step, cuda: bool) -> Forms:
    branches, pooled, weight, scale, shift, *classifier = step.args
    spatial = branches.shape[2:]

    def joined() -> Tensor:
        return torch.cat([branches, pooled[:, :, None, None].expand(-1, -1, *spatial)], 1)

    def classified(y: Tensor) -> Tensor:
        if not classifier:
            return y
        return F.conv2d(y, classifier[0], classifier[1].to(y.dtype))

    def composed() -> Tensor:
        return classified(_norm_of(F.conv2d(joined(), weight), scale, shift).relu_())

    forms: Forms = {"cat, convolution, batch norm": composed}
    if cuda:
        folded, one = _cudnn.fold(weight, scale), torch.ones_like(scale)
        geometry = (1, 0, 1, 1)
        forms["cat, cuDNN fused"] = lambda: classified(
            _cudnn.conv_bn_act(joined(), folded, one, shift, *geometry, None, "relu")
        )
    return forms


def _pytorch_conv_bn_act(step: Step, cuda: bool) -> Forms:
    x, weight, scale, shift, stride, _, _, _, residual, act = step.args

    def composed() -> Tensor:
        y = _norm_of(F.conv2d(x, weight, None, stride), scale, shift)
        return _activated(y if residual is None else y.add_(residual), act)

    forms: Forms = {"convolution, batch norm": composed}
    if cuda:
        forms["cuDNN"] = _fused_layer(
            x, weight, scale, shift, stride=stride, residual=residual, act=act
        )
        if residual is None and stride == 1 and act == "relu":
            n, c, h, w = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(-1, c)
            matrix = _cudnn.fold(weight, scale).flatten(1).t()
            bias = shift.to(x.dtype)
            forms["cuBLASLt with epilogue"] = lambda: (
                torch._addmm_activation(bias, rows, matrix).view(n, h, w, -1).permute(0, 3, 1, 2)
            )
    return forms


def _pytorch_convs(step: Step, cuda: bool) -> Forms:
    x, weights, dilations, stats = step.args

    def composed() -> Any:
        found = [
            F.conv2d(x, w, None, 1, reference.branch_padding(w, d), d)
            for w, d in zip(weights, dilations, strict=True)
        ]
        y = torch.cat(found, 1)
        if not stats:
            return y, y.new_empty(0), y.new_empty(0)
        if cuda:
            mean, rstd = torch.batch_norm_stats(y, _EPS)
            return y, mean, rstd**-2
        return (y, *torch.var_mean(y, (0, 2, 3), correction=0)[::-1])

    return {"convolutions, cat": composed}


def _pytorch_convs_backward(step: Step, cuda: bool) -> Forms:
    run = backends.implementations(step.op)["reference"].run
    return {"convolution_backward, sums": lambda: run(*step.args)}


_PYTORCH: dict[str, Callable[[Step, bool], Forms]] = {
    "upsample_argmax": _pytorch_argmax,
    "upsample_cross_entropy": _pytorch_cross_entropy,
    "upsample_confusion": _pytorch_confusion,
    "upsample_softmax_add": _pytorch_softmax_add,
    "batch_stats": _pytorch_norm,
    "bn_act": _pytorch_norm,
    "bn_act_reduce": _pytorch_norm,
    "bn_act_backward": _pytorch_norm,
    "aspp_convs": _pytorch_convs,
    "aspp_convs_backward": _pytorch_convs_backward,
    "aspp_branches": _pytorch_branches,
    "aspp_project": _pytorch_project,
    "conv_bn_act": _pytorch_conv_bn_act,
}


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results for t in flat(part)]


def _tensors(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [t for part in args for t in _tensors(part)] if isinstance(args, (tuple, list)) else []


def _mapped(
    value: Any,
    floats: Callable[[Tensor], Tensor],
    others: Callable[[Tensor], Tensor] = lambda t: t,
) -> Any:
    if isinstance(value, Tensor):
        return floats(value) if value.is_floating_point() else others(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, floats, others) for part in value)
    return value
