"""The steps of an inference program: what runs, in what order.

A step is called as ``step(x, run)``. Control flow lies in steps, arithmetic in layers; a step runs
a layer as ``run(layer, *tensors)``, so that one program can be executed (`execute`), timed or
planned without arithmetic (`deeplab_fast.program.report`). Convolutions and the ASPP are layers of
`cpu_layers` or `gpu_layers`. Programs hold no reference to the modules that they were made from,
except in `PlainLayer`.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.prepared import Plan
from ..plan.symbols import is_known
from .formats import in_plain_format
from .functional import Function
from .match import Graph
from .structure import compute
from .trace import Node, filled, leaves

CHANNELS_LAST = torch.channels_last


class Layer:
    """Arithmetic under a name, that of the module it stands for.

    Attributes:
        held: bytes of weights that it keeps, in the form they came in.
        result_dtype: of its result.
        takes_any_format: its first input may have any memory format; else it is channels_last.
        overwrites: index of the input whose memory may take the result, None for none.
    """

    result_dtype = torch.float32
    takes_any_format = False
    overwrites: int | None = None

    def __init__(self, name: str, weights: Sequence[Tensor] = ()) -> None:
        self.name = name
        self.held = sum(weight.nbytes for weight in weights)

    __call__: Callable[..., Tensor]
    output_shape: Callable[..., tuple[int, ...]]

    def writes_into(self, *shapes: Any) -> bool:
        """Whether a call on inputs of these shapes takes `out`, a channels_last map that the result
        is written into: memory of its own, or that of the input which the layer overwrites."""
        return False

    def function(self) -> Function:
        """What it computes, of its tensors, as `functional` says, with weights made now.

        Raises:
            NotImplementedError: it has no such form.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.name} cannot be exported")

    def plans(self, *shapes: Any) -> tuple[Plan, ...]:
        """What its convolutions run for inputs of these shapes."""
        return ()

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared forms, beyond one copy of the weights."""
        return 0


Run = Callable[..., Tensor]
# Features give a dict of maps.
Step = Callable[[Any, Run], Any]
# (name of the result, name of the feature, step) of each head.
Heads = tuple[tuple[str, str, Step], ...]


def execute(layer: Layer, *tensors: Tensor | None, **options: Tensor) -> Tensor:
    """The `run` of a program that computes; the options are those of the layer."""
    return layer(*tensors, **options)


@dataclass(frozen=True)
class NormSpec:
    """A batch norm behind a convolution: weight * (x - mean) / sqrt(variance + eps) + bias.

    Vectors are [K]; one and zero stand for those that are None.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor
    eps: float


@dataclass
class ConvSpec:
    """A convolution with its batch norm and activation, as the model has them now.

    Tensors are the model's own memory; padding "same" is TensorFlow's. Of the projection of an ASPP
    whose pooled map stands first, `before_pooled` is 0: the channels before that.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    norm: NormSpec | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    act: str | None
    before_pooled: int | None = None

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution that reads every pixel once."""
        return (
            tuple(self.weight.shape[2:]) == (1, 1)
            and self.stride == (1, 1)
            and self.padding in ((0, 0), "same")
            and self.groups == 1
        )

    @property
    def is_depthwise(self) -> bool:
        """A convolution of each channel by a filter of its own."""
        return self.groups == self.weight.shape[0] > 1 and self.weight.shape[1] == 1

    def split(self, channels: int) -> tuple[ConvSpec, ConvSpec]:
        """Two whose sum it is, before the activation: of so many input channels, with its shift and
        activation, and of those of the pooled map, without."""
        pooled = self.weight.shape[1] - channels
        before = channels if self.before_pooled is None else self.before_pooled
        first, second, last = self.weight.tensor_split([before, before + pooled], dim=1)
        if last.shape[1]:
            # Views, but for a pooled map amid others.
            first = torch.cat([first, last], dim=1) if before else last
        norm = None if self.norm is None else replace(self.norm, bias=None, mean=None)
        return replace(self, weight=first), replace(
            self, weight=second, bias=None, norm=norm, act=None
        )


@dataclass
class SqueezeSpec:
    """x * gate(fc2(hidden(fc1(mean of x)))).

    Attributes:
        name: of the module.
        fc1, fc2: 1x1 convolutions.
        hidden: an activation behind the first that is none of a convolution's, or None.
        gate: an activation.
    """

    name: str
    fc1: ConvSpec
    hidden: nn.Module | None
    fc2: ConvSpec
    gate: nn.Module


@dataclass
class InvertedResidualSpec:
    """project(scaled(depthwise(expand(x)))), plus x where `adds`.

    Attributes:
        name: of the module.
        expand, project: 1x1 convolutions.
        squeeze: the squeeze-excitation, None for none.
    """

    name: str
    expand: ConvSpec | None
    depthwise: ConvSpec
    squeeze: SqueezeSpec | None
    project: ConvSpec
    adds: bool

    @property
    def convs(self) -> list[ConvSpec]:
        """All convolutions."""
        squeeze = () if self.squeeze is None else (self.squeeze.fc1, self.squeeze.fc2)
        found = (self.expand, self.depthwise, *squeeze, self.project)
        return [conv for conv in found if conv is not None]


class SamePadding:
    """TensorFlow's SAME padding, which depends on the size of the map.

    Attributes:
        halves: what is padded on both sides of (rows, columns) where it is even.
        can_be_uneven: a stride makes it uneven for some sizes, an even kernel for all.
    """

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]):
        self._axes = list(zip(kernel, stride, dilation, strict=True))
        reach = [d * (k - 1) for k, _, d in self._axes]
        self.halves = tuple(r // 2 for r in reach)
        self.can_be_uneven = any(s != 1 for s in stride) or any(r % 2 for r in reach)

    def sides(self, shape: Sequence[int]) -> list[int] | None:
        """(left, right, top, bottom) of what must be padded beforehand to a map [N, C, H, W], None
        where it is `halves`."""
        sides: list[int] = []
        for axis in (1, 0):
            kernel, stride, dilation = self._axes[axis]
            size, reach = shape[2 + axis], (kernel - 1) * dilation
            needed = reach
            if stride != 1:
                needed += ((size + stride - 1) // stride - 1) * stride + 1 - size
                # Else it is never negative, which need not be asked of a symbolic size.
                if reach + 1 < stride:
                    needed = max(needed, 0)
            sides += [needed // 2, needed - needed // 2]
        rows, columns = self.halves
        halves = [columns, columns, rows, rows]
        if all(is_known(side == half) for side, half in zip(sides, halves, strict=True)):
            return None
        return sides


class MapLayer(Layer):
    """One or several convolutions of a map, whose result is a new map.

    Attributes:
        overwrites_residual: nothing reads the residual afterwards, its memory may take the result.
    """

    overwrites_residual = False

    @property
    def overwrites(self) -> int | None:  # type: ignore[override]
        return 1 if self.overwrites_residual else None


class ScalingLayer(Layer):
    """x * vector of x, for each image.

    Attributes:
        in_place: nothing else reads x, its memory may take the result.
    """

    in_place = False

    @property
    def overwrites(self) -> int | None:  # type: ignore[override]
        return 0 if self.in_place else None


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

    def function(self) -> Function:
        return self._module

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._module(_meta(shape)).shape)


class PlainLayer(Layer):
    """A module that no rule knows, run as it is, on a contiguous map as it would be without us."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name)
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        return self.module(filled(x, Tensor.contiguous))

    def function(self) -> Function:
        # Constants of a program have no gradients.
        module = copy.deepcopy(self.module).requires_grad_(False)
        return lambda x: module(filled(x, Tensor.contiguous))

    def output_shape(self, shape: Sequence[int]) -> Any:
        output = copy.deepcopy(self.module).to("meta", torch.float32)(_meta(shape))
        return filled(output, lambda y: tuple(y.shape))


class JoinLayer(Layer):
    """A function of maps between modules, as `structure.compute` has it.

    Args:
        node: of a kind that makes a new map: "cat", "add", "mul", "resize" or "spread".
    """

    def __init__(self, name: str, node: Node) -> None:
        super().__init__(f"{name}.{node.kind}")
        self._node = node

    def __call__(self, *tensors: Tensor) -> Tensor:
        y = compute(self._node, tensors)
        return y.contiguous(memory_format=CHANNELS_LAST) if y.dim() == 4 else y

    def function(self) -> Function:
        return lambda *tensors: compute(self._node, tensors)

    def output_shape(self, *shapes: Sequence[int]) -> tuple[int, ...]:
        return tuple(compute(self._node, [_meta(shape) for shape in shapes]).shape)


class Join:
    """One layer of several maps."""

    def __init__(self, layer: JoinLayer) -> None:
        self.layer = layer

    def __call__(self, maps: Sequence[Tensor], run: Run) -> Tensor:
        return run(self.layer, *maps)


class Spread:
    """A map of one pixel, of a map, over that map."""

    def __init__(self, step: Step, layer: JoinLayer) -> None:
        self.step, self.layer = step, layer

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        return run(self.layer, self.step(x, run), x)


class Dataflow:
    """Steps whose results later ones take, as a `match.Graph` has them.

    Args:
        graph: the stages.
        steps: of each stage, of its input, or of all its inputs for `Join`; None where no map is
            computed.
    """

    def __init__(self, graph: Graph, steps: Sequence[Step | Join | None]) -> None:
        numbers = {graph.source: 0}
        for i, stage in enumerate(graph.stages, start=1):
            numbers[stage] = i
        self._rows = [
            (stage.node, step, tuple(numbers[each] for each in stage.inputs))
            for stage, step in zip(graph.stages, steps, strict=True)
        ]
        self._output = filled(graph.output, numbers.__getitem__)
        read = [number for _, _, inputs in self._rows for number in inputs]
        self._reads = Counter([*read, *leaves(self._output)])

    def __call__(self, x: Any, run: Run) -> Any:
        values = {0: x}
        left = self._reads.copy()
        for number, (node, step, places) in enumerate(self._rows, start=1):
            inputs = [values[place] for place in places]
            for place in places:
                left[place] -= 1
                if not left[place]:
                    del values[place]
            if step is None:
                values[number] = compute(node, inputs)
            else:
                values[number] = step(inputs if isinstance(step, Join) else inputs[0], run)
        return filled(self._output, values.__getitem__)


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

    def __init__(self, body: Step, tail: MapLayer, shortcut: Step | None) -> None:
        self.body, self.tail, self.shortcut = body, tail, shortcut
        # A convolution's result is the block's own.
        if isinstance(shortcut, Single) and isinstance(shortcut.layer, MapLayer):
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

    def __init__(self, convs: Sequence[MapLayer]) -> None:
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
    """What computes the logits of a DeepLabv3, or the results of one module.

    Attributes:
        backbone: x -> features by name.
        heads: of the main and auxiliary heads; none where the features are the results.
        layers: all layers, in the order in which they were folded.
        in_channels: of the input; None where a plain module reads it.
        channels_last: memory format of the original's weights.
    """

    backbone: Step
    heads: Heads
    layers: tuple[Layer, ...]
    in_channels: int | None
    channels_last: bool

    def logits(self, x: Any, run: Run = execute, aux: bool = True) -> dict[str, Tensor]:
        """Low-resolution logits by name, in the memory format that plain modules give them; the
        results of one module in any."""
        given = filled(x, lambda t: t.contiguous(memory_format=CHANNELS_LAST))
        return self.formatted(self.maps(given, run, aux), next(leaves(x)))

    def formatted(self, maps: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """Maps of the input x in the memory format that `logits` has."""
        return in_plain_format(maps, x, self.channels_last) if self.heads else maps

    def maps(self, x: Any, run: Run = execute, aux: bool = True) -> dict[str, Tensor]:
        """Low-resolution logits by name, in any memory format, of a channels_last x."""
        features = self.backbone(x, run)
        if not self.heads:
            return features
        results = OrderedDict()
        for name, feature, head in self.heads:
            if aux or name == "out":
                results[name] = head(features[feature], run)
        return results

    def reason_against(self, x: Any) -> str:
        """What speaks against running it on x; "" where nothing does."""
        # The plain modules have the error for another number of channels.
        if isinstance(x, Tensor) and self.in_channels not in (None, x.shape[1]):
            return f"the input has {x.shape[1]} channels, the model wants {self.in_channels}"
        if torch.is_grad_enabled() and self.has_plain_layers:
            return (
                "gradients may be needed by modules of another kind than those known here; use "
                "torch.inference_mode() or torch.no_grad()"
            )
        return ""

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


def spread(few: Tensor, kernel: int, dim: int, size: int) -> Tensor:
    """A map whose middle is constant along a dimension, from one that has the middle once.

    Args:
        few: of min(kernel, size) rows or columns: those before the middle, it, those behind.
        kernel: odd.
        dim: the dimension.
        size: of the result along it.
    """
    if size <= kernel:
        return few
    half = kernel // 2
    before, middle, behind = few.split([half, 1, half], dim)
    shape = [-1] * few.dim()
    shape[dim] = size - 2 * half
    return torch.cat([before, middle.expand(shape), behind], dim)


def _meta(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta")
