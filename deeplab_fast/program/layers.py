"""The steps of an inference program: what runs, in what order, with prepared weights.

A step is called as ``step(x, run)``. Control flow lies in steps, arithmetic in layers; a step runs
a layer as ``run(layer, *tensors)``, so that one program can be executed (`execute`), timed or
planned without arithmetic (`deeplab_fast.program.report`). Programs hold no reference to the
modules that they were made from, except in `PlainLayer`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.prepared import Plan, PreparedConv, activate_
from ..ops.prepared_aspp import PreparedAspp, PreparedProject
from .formats import in_plain_format

CHANNELS_LAST = torch.channels_last


class Layer:
    """Arithmetic under a name, that of the module it stands for.

    Attributes:
        held: bytes of weights that it keeps, in the form they came in.
        prepared: convolutions whose prepared forms come on top.
    """

    def __init__(
        self,
        name: str,
        weights: Sequence[Tensor] = (),
        prepared: Sequence[PreparedConv | PreparedAspp | PreparedProject] = (),
    ) -> None:
        self.name = name
        self.held = sum(weight.numel() * weight.element_size() for weight in weights)
        self.prepared = tuple(prepared)

    __call__: Callable[..., Tensor]
    output_shape: Callable[..., tuple[int, ...]]

    def plans(self, *shapes: Any, **options: Any) -> tuple[Plan, ...]:
        """What its convolutions run for inputs of these shapes."""
        return ()

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared forms, beyond one copy of the weights."""
        return sum(each.extra_bytes for each in self.prepared)


Run = Callable[..., Tensor]
# Features give a dict of maps.
Step = Callable[[Tensor, Run], Any]


def execute(layer: Layer, *tensors: Tensor | None) -> Tensor:
    """The `run` of a program that computes."""
    return layer(*tensors)


@dataclass
class ConvSpec:
    """A convolution with its batch norm and activation, before its weights are prepared.

    scale and shift are [K], batch norm and bias in one; padding "same" is TensorFlow's.
    """

    name: str
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    act: str | None

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution that reads every pixel once."""
        return (
            tuple(self.weight.shape[2:]) == (1, 1)
            and self.stride == (1, 1)
            and self.padding in ((0, 0), "same")
            and self.groups == 1
        )


class ConvLayer(Layer):
    """act(scale * conv(x) + shift [+ residual]).

    Attributes:
        overwrites_residual: nothing reads the residual afterwards, its memory may take the result.
    """

    def __init__(self, spec: ConvSpec, max_extra_bytes: int | None) -> None:
        self.overwrites_residual = False
        self._same = spec.padding == "same"
        kernel = tuple(spec.weight.shape[2:])
        self._geometry = (kernel, spec.stride, spec.dilation)
        reach = [d * (k - 1) for k, d in zip(kernel, spec.dilation, strict=True)]
        halves = tuple(r // 2 for r in reach)
        # A stride makes SAME padding uneven for some sizes, an even kernel for all.
        uneven = self._same and (spec.stride != (1, 1) or any(r % 2 for r in reach))
        if uneven and max_extra_bytes is not None:
            max_extra_bytes //= 2

        def prepare(padding: int | Sequence[int]) -> PreparedConv:
            return PreparedConv(
                spec.weight,
                spec.scale,
                spec.shift,
                stride=spec.stride,
                padding=padding,
                dilation=spec.dilation,
                groups=spec.groups,
                act=spec.act,
                max_extra_bytes=max_extra_bytes,
            )

        self._conv = prepare(halves if isinstance(spec.padding, str) else spec.padding)
        self._uneven = prepare(0) if uneven else None
        prepared = [self._conv] if self._uneven is None else [self._conv, self._uneven]
        super().__init__(spec.name, [spec.weight] * len(prepared), prepared)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        sides = self._sides(x.shape)
        conv = self._conv
        if sides is not None:
            assert self._uneven is not None
            conv, x = self._uneven, F.pad(x, sides)
        return conv(x, residual, overwrite_residual=self.overwrites_residual)

    def _sides(self, shape: Sequence[int]) -> list[int] | None:
        """(left, right, top, bottom) of an uneven SAME padding, None where it is even."""
        if self._uneven is None:
            return None
        kernel, stride, dilation = self._geometry
        sides: list[int] = []
        for axis in (1, 0):
            size, k, s, d = shape[2 + axis], kernel[axis], stride[axis], dilation[axis]
            needed = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            sides += [needed // 2, needed - needed // 2]
        rows, columns = self._conv.padding
        return None if sides == [columns, columns, rows, rows] else sides

    def output_shape(self, shape: Sequence[int], residual: object = None) -> tuple[int, ...]:
        conv, shape = self._at(shape)
        size = conv._output_size(shape[2], shape[3])
        return (shape[0], conv.out_channels, *size)

    def plans(self, shape: Sequence[int], residual: object = None) -> tuple[Plan, ...]:
        conv, shape = self._at(shape)
        return (conv.plan(shape),)

    def _at(self, shape: Sequence[int]) -> tuple[PreparedConv, tuple[int, ...]]:
        sides = self._sides(shape)
        if sides is None:
            return self._conv, tuple(shape)
        assert self._uneven is not None
        left, right, top, bottom = sides
        n, c, height, width = shape
        return self._uneven, (n, c, height + top + bottom, width + left + right)


class AsppLayer(Layer):
    """The branches of an ASPP: [N, C, H, W] -> [N, sum K, H, W]."""

    def __init__(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> None:
        self._aspp = PreparedAspp(
            [s.weight for s in specs],
            [_or(s.scale, s, 1.0) for s in specs],
            [_or(s.shift, s, 0.0) for s in specs],
            [s.dilation[0] for s in specs],
            max_extra_bytes=max_extra_bytes,
        )
        super().__init__(name, [s.weight for s in specs], [self._aspp])

    def __call__(self, x: Tensor) -> Tensor:
        return self._aspp(x)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._aspp.out_channels, *shape[2:])

    def plans(self, shape: Sequence[int]) -> tuple[Plan, ...]:
        return self._aspp.plan(shape)


class ProjectLayer(Layer):
    """The projection of the branches and the pooled vector, without their concat."""

    def __init__(self, spec: ConvSpec, branch_channels: int, max_extra_bytes: int | None) -> None:
        self._project = PreparedProject(
            spec.weight,
            spec.scale,
            spec.shift,
            branch_channels=branch_channels,
            act=spec.act,
            max_extra_bytes=max_extra_bytes,
        )
        super().__init__(spec.name, [spec.weight], [self._project])

    def __call__(self, branches: Tensor, pooled: Tensor) -> Tensor:
        return self._project(branches, pooled)

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._project.out_channels, *branches[2:])

    def plans(self, branches: Sequence[int], pooled: object) -> tuple[Plan, ...]:
        return (self._project.plan(branches),)


class WideProjectLayer(Layer):
    """A projection with a kernel above 1x1: the pooled vector's part is a map of few values.

    Zero padding makes that part differ at the border only. It is computed on a map of one kernel's
    size, whose middle row and column are then repeated, and enters as a residual.
    """

    def __init__(self, spec: ConvSpec, branch_channels: int, max_extra_bytes: int | None) -> None:
        to_branches, to_pooled = spec.weight.tensor_split([branch_channels], dim=1)

        def prepare(weight: Tensor, shift: Tensor | None, act: str | None) -> PreparedConv:
            bound = max_extra_bytes
            if bound is not None:
                bound = bound * weight.shape[1] // spec.weight.shape[1]
            # A square odd kernel.
            padding = weight.shape[2] // 2
            return PreparedConv(
                weight, spec.scale, shift, padding=padding, act=act, max_extra_bytes=bound
            )

        self._branches = prepare(to_branches, spec.shift, spec.act)
        self._pooled = prepare(to_pooled, None, None)
        self._kernel = tuple(spec.weight.shape[2:])
        super().__init__(spec.name, [spec.weight], [self._branches, self._pooled])

    def __call__(self, branches: Tensor, pooled: Tensor) -> Tensor:
        height, width = branches.shape[2:]
        rows, columns = self._kernel
        constant = pooled[:, :, None, None].expand(-1, -1, min(rows, height), min(columns, width))
        few = self._pooled(constant)
        return self._branches(
            branches, few[:, :, _spread(rows, height)][:, :, :, _spread(columns, width)]
        )

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._branches.out_channels, *branches[2:])

    def plans(self, branches: Sequence[int], pooled: object) -> tuple[Plan, ...]:
        return (self._branches.plan(branches),)


class PooledLayer(Layer):
    """act(linear(mean of x over its pixels)): [N, C, H, W] -> [N, K]."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec.name, [spec.weight])
        self._linear = _Linear(spec)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x.mean((2, 3)))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._linear.weight.shape[1])


class SqueezeExcitationLayer(Layer):
    """x * gate(fc2(fc1(mean of x))), in place on x where it is the program's own."""

    def __init__(self, name: str, fc1: ConvSpec, fc2: ConvSpec, gate: nn.Module) -> None:
        super().__init__(name, [fc1.weight, fc2.weight])
        self._fc1, self._fc2, self._gate = _Linear(fc1), _Linear(fc2), copy.deepcopy(gate)
        self.in_place = False

    def __call__(self, x: Tensor) -> Tensor:
        scale = self._gate(self._fc2(self._fc1(x.mean((2, 3)))))[:, :, None, None]
        return x.mul_(scale) if self.in_place else x * scale

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


class AtenLayer(Layer):
    """A module of PyTorch without weights, which gives the same in any memory format."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name)
        own: Any = copy.deepcopy(module).eval()
        if hasattr(own, "inplace"):
            own.inplace = False
        self._module = own

    def __call__(self, x: Tensor) -> Tensor:
        return self._module(x)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._module(_meta(shape)).shape)


class PlainLayer(Layer):
    """A module that no rule knows, run as it is, on a contiguous map as it would be without us."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name)
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        return self.module(x.contiguous())

    def output_shape(self, shape: Sequence[int]) -> Any:
        output = copy.deepcopy(self.module).to("meta")(_meta(shape))
        if isinstance(output, Tensor):
            return tuple(output.shape)
        return OrderedDict((k, tuple(v.shape)) for k, v in output.items())


class Single:
    """One layer."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        return run(self.layer, x)


class Chain:
    """Steps one after another."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        for step in self.steps:
            x = step(x, run)
        return x


class ResidualBlock:
    """tail(body(x), residual=shortcut(x)): the sum is the epilogue of the last convolution."""

    def __init__(self, body: Step, tail: ConvLayer, shortcut: Step | None) -> None:
        self.body, self.tail, self.shortcut = body, tail, shortcut
        # A convolution's result is the block's own.
        if isinstance(shortcut, Single) and isinstance(shortcut.layer, ConvLayer):
            tail.overwrites_residual = True

    def own_input(self) -> None:
        """Nothing but this block reads its input."""
        self.tail.overwrites_residual = True

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, run)
        return run(self.tail, self.body(x, run), residual)


class Aspp:
    """Branches, pooled vector and projection."""

    def __init__(self, branches: Layer, pooled: Layer, project: Layer) -> None:
        self.branches, self.pooled, self.project = branches, pooled, project

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        return run(self.project, run(self.branches, x), run(self.pooled, x))


class SumOfConvs:
    """Convolutions of one map, summed: each takes the sum so far as its residual."""

    def __init__(self, convs: Sequence[ConvLayer]) -> None:
        self.convs = tuple(convs)

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        total: Tensor | None = None
        for conv in self.convs:
            total = run(conv, x) if total is None else run(conv, x, total)
        assert total is not None
        return total


class Features:
    """Steps whose results are kept under names, as IntermediateLayerGetter keeps them.

    stages: pairs (step, name of its result or None), in order.
    """

    def __init__(self, stages: Sequence[tuple[Step, str | None]]) -> None:
        self.stages = tuple(stages)

    def __call__(self, x: Tensor, run: Run) -> dict[str, Tensor]:
        features = OrderedDict()
        for step, name in self.stages:
            x = step(x, run)
            if name is not None:
                features[name] = x
        return features


@dataclass
class Program:
    """What computes the logits of a DeepLabv3.

    Attributes:
        backbone: x -> features by name.
        heads: (name of the result, name of the feature, step) of the main and auxiliary heads.
        layers: all layers, in the order in which they were folded.
        in_channels: of the input; None where a plain module reads it.
        channels_last: memory format of the original's weights.
    """

    backbone: Callable[[Tensor, Run], dict[str, Tensor]]
    heads: tuple[tuple[str, str, Step], ...]
    layers: tuple[Layer, ...]
    in_channels: int | None
    channels_last: bool

    def logits(self, x: Tensor, run: Run = execute, aux: bool = True) -> dict[str, Tensor]:
        """Low-resolution logits by name."""
        features = self.backbone(x.contiguous(memory_format=CHANNELS_LAST), run)
        results = OrderedDict()
        for name, feature, head in self.heads:
            if aux or name == "out":
                results[name] = head(features[feature], run)
        return in_plain_format(results, x, self.channels_last)

    @property
    def has_plain_layers(self) -> bool:
        """Whether a module runs as it is, which may have gradients of its own."""
        return any(isinstance(layer, PlainLayer) for layer in self.layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights held, prepared forms included."""
        return sum(layer.held + layer.extra_bytes for layer in self.layers)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared forms, beyond one copy of the weights."""
        return sum(layer.extra_bytes for layer in self.layers)


class _Linear:
    """A 1x1 convolution on vectors [N, C], with its batch norm and activation."""

    def __init__(self, spec: ConvSpec) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight = spec.weight.detach()[:, :, 0, 0]
            if spec.scale is not None:
                weight = weight * spec.scale[:, None]
            self.weight = weight.t().clone(memory_format=torch.contiguous_format)
            self.bias = _or(spec.shift, spec, 0.0).clone()
        self.act = spec.act

    def __call__(self, x: Tensor) -> Tensor:
        return activate_(torch.addmm(self.bias, x, self.weight), self.act)


def _meta(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta")


def _spread(kernel: int, size: int) -> list[int]:
    """For each of `size` positions the one of a map of min(kernel, size) that has its taps."""
    half = kernel // 2
    if size <= kernel:
        return list(range(size))
    return [*range(half), *[half] * (size - 2 * half), *range(half + 1, kernel)]


def _or(value: Tensor | None, spec: ConvSpec, default: float) -> Tensor:
    return spec.weight.new_full((spec.weight.shape[0],), default) if value is None else value
