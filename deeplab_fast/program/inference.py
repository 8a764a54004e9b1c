"""Turns the modules of a DeepLabv3 into an inference program, batch norms folded.

Units of convolution, batch norm and activation are folded wherever they stand, blocks where all
that they need can be. What no rule knows stays a plain module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import match
from .cpu_layers import CpuForms
from .formats import is_channels_last
from .intact import has_hooks
from .layers import (
    Aspp,
    Chain,
    ConvSpec,
    Dataflow,
    Features,
    InvertedResidualSpec,
    Join,
    JoinLayer,
    Layer,
    MapLayer,
    NormSpec,
    PlainLayer,
    Program,
    ResidualBlock,
    ScalingLayer,
    Single,
    Spread,
    SqueezeSpec,
    Step,
    SumOfConvs,
)
from .network import Runnable
from .trace import Node


class Forms(Protocol):
    """The layers that a program is made of on one kind of device.

    Attributes:
        what: names the weights that it takes.
        keeps_values: its layers have the values of weights from when they were made; else they read
            them at each call, and take no copies.
    """

    what: str
    keeps_values: bool

    def takes(self, tensor: Tensor) -> bool:
        """Whether it has layers for filters or a bias like this tensor."""

    def takes_vector(self, tensor: Tensor) -> bool:
        """Whether it has layers for batch norms with vectors like this tensor."""

    def conv(self, spec: ConvSpec, max_extra_bytes: int | None) -> MapLayer:
        """A convolution, called with a map and a residual or without."""

    def aspp(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> MapLayer:
        """The branches of an ASPP."""

    def pooled(self, spec: ConvSpec) -> Layer:
        """act(linear(mean of x over its pixels)), a vector for each image."""

    def project(self, spec: ConvSpec, channels: int, max_extra_bytes: int | None) -> MapLayer:
        """The convolution of branches with so many channels and the pooled vector."""

    def squeeze_excitation(self, spec: SqueezeSpec) -> ScalingLayer:
        """A squeeze-excitation, called with a map."""

    def inverted_residual(
        self, spec: InvertedResidualSpec, max_extra_bytes: int | None
    ) -> MapLayer | None:
        """An inverted residual in one layer, None where its convolutions are layers each."""

    def free(self, name: str, module: nn.Module) -> Layer:
        """A module of PyTorch without weights."""

    def plain(self, name: str, module: nn.Module) -> PlainLayer:
        """A module that runs as it is."""

    def finish(self, model: Any, program: Program) -> None:
        """Called with the program of all layers, before it runs."""


class _NotFoldable(Exception):
    """A block needs what is not there, and runs as it is."""


def fold(
    model: Runnable,
    forms: Forms | None = None,
    *,
    aux: bool = True,
    max_extra_bytes: int | None = None,
    frozen: bool = False,
) -> tuple[Program | None, str]:
    """Fold a model.

    Args:
        model: the model.
        forms: of its layers; None for those of fp32 on the CPU.
        aux: with the auxiliary head.
        max_extra_bytes: bound on the prepared weights beyond one copy of the weights. Each layer
            gets the part of it that its weights have of the model's.
        frozen: copy the modules that stay plain, and treat all modules as in eval mode.

    Returns:
        The program and "", or None and why the whole model must run its plain modules.

    Raises:
        CalibrationError: forms of int8 that were calibrated for other weights.
    """
    parts = model.parts(aux)
    names: dict[nn.Module, str] = {}
    for part, root, item in parts:
        for name, module in root.named_modules(prefix=part):
            names.setdefault(module, name)
            # Those of a module that was entered have run.
            if has_hooks(module) and (module is not root or item is root):
                return None, f"{name} has forward hooks"
    forms = CpuForms() if forms is None else forms
    folder = _Folder(forms, names, frozen, max_extra_bytes)
    with torch.inference_mode(False), torch.no_grad():
        steps = [folder.step(item) for *_, item in parts]
        if not any(isinstance(layer, MapLayer) for layer in folder.layers):
            return None, _why_nothing(names, forms)
        backbone, heads = model.assembled(steps)
        layers = tuple(folder.layers)
        program = Program(backbone, heads, layers, folder.in_channels, folder.channels_last)
        forms.finish(model, program)
    return program, ""


@dataclass
class _Folder:
    forms: Forms
    names: dict[nn.Module, str]
    frozen: bool
    max_extra_bytes: int | None
    layers: list[Layer] = field(default_factory=list)
    in_channels: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        convs = [m for m in self.names if isinstance(m, nn.Conv2d)]
        self._weights = sum(m.weight.numel() for m in convs if isinstance(m.weight, Tensor))

    def name(self, module: nn.Module) -> str:
        # A module that is an attribute only has none.
        return self.names.get(module, type(module).__name__)

    def step(self, *modules: match.Item) -> Step:
        """The step of modules one after another."""
        return self.chain(self.pieces(modules))

    def chain(self, pieces: Sequence[ConvSpec | Step]) -> Step:
        """Prepare the convolutions of a sequence."""
        steps: list[Step] = []
        for piece in pieces:
            step = Single(self.conv(piece)) if isinstance(piece, ConvSpec) else piece
            if isinstance(step, ResidualBlock) and steps and isinstance(steps[-1], ResidualBlock):
                step.own_input()
            if isinstance(step, Single) and isinstance(step.layer, ScalingLayer):
                # The map is a convolution's result, which nothing else reads.
                last = steps[-1] if steps else None
                step.layer.in_place = isinstance(last, Single) and isinstance(last.layer, MapLayer)
            steps.append(step)
        return steps[0] if len(steps) == 1 else Chain(steps)

    def pieces(self, modules: Iterable[match.Item]) -> list[ConvSpec | Step]:
        """Fold a sequence of modules: convolutions take the norm and activation behind them."""
        return self.fold(match.segments(modules))

    def fold(self, segments: Iterable[match.Part]) -> list[ConvSpec | Step]:
        """`pieces` of segments."""
        pieces: list[ConvSpec | Step] = []
        for segment in segments:
            if isinstance(segment, match.Unit):
                pieces += self.unit(segment)
            elif not self.is_idle(segment):
                pieces.append(self.other(segment))
        return pieces

    def unit(self, unit: match.Unit) -> list[ConvSpec | Step]:
        """The convolution with what it takes, if it can be folded, and what is left."""
        conv, norm, act = unit.conv, unit.norm, unit.act
        pieces: list[ConvSpec | Step] = []
        rest = (conv, norm, act, unit.pool)
        if conv is not None and self.folds(conv.module):
            if norm is None or self.folds_norm(norm.module, conv.module):
                pieces.append(self.spec(conv, norm, act))
                rest = (None, None, None, unit.pool)
            else:
                pieces.append(self.spec(conv, None, None))
                rest = (None, norm, act, unit.pool)
        return pieces + [self.single(part) for part in rest if part is not None]

    def other(self, segment: match.Segment) -> Step:
        """The step of a module that is no part of a unit."""
        function = _FOLDED.get(type(segment))
        if function is None:
            return self.single(segment)
        before = len(self.layers)
        try:
            return function(self, segment)
        except _NotFoldable:
            del self.layers[before:]
            return self.single(segment)

    def single(self, segment: match.Segment) -> Step:
        """The step of a module that is not folded."""
        module = segment.module
        if isinstance(segment, match.Free) and not isinstance(module, match.DROPOUTS):
            return self.add(self.forms.free(self.name(module), module))
        plain = copy.deepcopy(module).eval() if self.frozen else module
        return self.add(self.forms.plain(self.name(module), plain))

    def one(self, *modules: match.Item) -> ConvSpec:
        """The convolution that a sequence comes down to."""
        return _only(self.pieces(modules))

    def add(self, layer: Layer) -> Step:
        self.layers.append(layer)
        return Single(layer)

    def conv(self, spec: ConvSpec) -> MapLayer:
        layer = self.forms.conv(spec, self.share(spec))
        self.layers.append(layer)
        return layer

    def share(self, *specs: ConvSpec) -> int | None:
        """These layers' part of the bound on extra bytes."""
        if self.max_extra_bytes is None:
            return None
        own = sum(spec.weight.numel() for spec in specs)
        return self.max_extra_bytes * own // max(1, self._weights)

    def spec(self, segment: match.Conv, norm: match.Norm | None, act: match.Act | None) -> ConvSpec:
        conv = segment.module
        if self.in_channels is None and not self.layers:
            self.in_channels = conv.in_channels
            self.channels_last = is_channels_last(conv.weight)
        return ConvSpec(
            self.name(conv),
            conv.weight.detach(),
            None if conv.bias is None else conv.bias.detach(),
            None if norm is None else _norm_spec(norm.module),
            conv.stride,
            "same" if segment.same else conv.padding,
            conv.dilation,
            conv.groups,
            None if act is None else act.name,
        )

    def is_idle(self, segment: match.Segment) -> bool:
        """Whether a module is an identity, as it is a dropout that does not drop."""
        idle = isinstance(segment, match.Free) and isinstance(segment.module, match.DROPOUTS)
        return idle and (self.frozen or not segment.module.training)

    def folds(self, conv: nn.Conv2d) -> bool:
        """Whether a convolution's filters and bias are what they seem."""
        return (
            all(type(pair) is tuple for pair in (conv.stride, conv.padding, conv.dilation))
            and set(conv._parameters) == {"weight", "bias"}
            and all(self.forms.takes(t) for t in (conv.weight, conv.bias) if t is not None)
            and conv.weight.numel() > 0
        )

    def folds_norm(self, norm: _BatchNorm, conv: nn.Conv2d) -> bool:
        """Whether a batch norm behind `conv` is a scale and a shift for each channel."""
        values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (
            (self.frozen or not norm.training)
            and set(norm._parameters) == {"weight", "bias"}
            and {"running_mean", "running_var"} <= set(norm._buffers)
            and norm.running_mean is not None
            and norm.running_var is not None
            and all(
                self.forms.takes_vector(t) and t.shape == conv.weight.shape[:1]
                for t in values
                if t is not None
            )
        )


def _block(folder: _Folder, block: match.Block) -> Step:
    """One layer for an inverted residual, else the sum in the epilogue of the last convolution."""
    fused = _inverted_residual(folder, block)
    if fused is not None:
        return fused
    pieces = folder.pieces(block.modules)
    if not block.adds:
        return folder.chain(pieces)
    body, tail = pieces[:-1], pieces[-1] if pieces else None
    if not isinstance(tail, ConvSpec) or tail.act is not None:
        raise _NotFoldable
    if block.act is not None:
        if not match.is_relu(block.act):
            raise _NotFoldable
        tail.act = "relu"
    shortcut = None if block.shortcut is None else folder.step(block.shortcut)
    return ResidualBlock(folder.chain(body), folder.conv(tail), shortcut)


def _inverted_residual(folder: _Folder, block: match.Block) -> Step | None:
    """The step of a block that expands, filters each channel and projects, None for another."""
    before = len(folder.layers)
    try:
        spec = _inverted_residual_spec(folder, block)
    except _NotFoldable:
        spec = None
    # A part that is not folded has made a layer.
    if spec is not None and len(folder.layers) == before:
        layer = folder.forms.inverted_residual(spec, folder.share(*spec.convs))
        if layer is not None:
            return folder.add(layer)
    del folder.layers[before:]
    return None


def _inverted_residual_spec(folder: _Folder, block: match.Block) -> InvertedResidualSpec:
    segments = match.segments(block.modules)
    squeezes = [part for part in segments if isinstance(part, match.SqueezeExcite)]
    squeeze = None
    if squeezes:
        if segments[-2:-1] != squeezes:
            raise _NotFoldable
        squeeze = _squeeze(folder, squeezes[0])
        del segments[-2]
    if block.shortcut is not None or block.act is not None or not 2 <= len(segments) <= 3:
        raise _NotFoldable
    if not all(isinstance(part, match.Unit) for part in segments):
        raise _NotFoldable
    convs = [_only(folder.fold([part])) for part in segments]
    expand, (depthwise, project) = convs[:-2], convs[-2:]
    if (
        not all(conv.is_pointwise for conv in (*expand, project))
        or not depthwise.is_depthwise
        or (block.adds and project.act is not None)
    ):
        raise _NotFoldable
    name = folder.name(block.module)
    first = expand[0] if expand else None
    return InvertedResidualSpec(name, first, depthwise, squeeze, project, block.adds)


def _squeeze(folder: _Folder, block: match.SqueezeExcite) -> SqueezeSpec:
    gate = match.segment_of(block.gate)
    first = match.segments(block.fc1)
    last = first[-1] if first else None
    hidden = last if isinstance(last, match.Free) else None
    fc1 = _only(folder.fold(first if hidden is None else first[:-1]))
    fc2 = folder.one(*block.fc2)
    if not (
        match.is_mean(block.pool)
        and isinstance(gate, match.Free)
        and fc1.is_pointwise
        and fc2.is_pointwise
        and (hidden is None or isinstance(hidden.module, match.ELEMENTWISE))
    ):
        raise _NotFoldable
    inner = None if hidden is None or folder.is_idle(hidden) else hidden.module
    return SqueezeSpec(folder.name(block.module), fc1, inner, fc2, gate.module)


def _squeeze_excite(folder: _Folder, block: match.SqueezeExcite) -> Step:
    return folder.add(folder.forms.squeeze_excitation(_squeeze(folder, block)))


def _aspp(folder: _Folder, aspp: match.Aspp) -> Step:
    found = match.joint(aspp)
    if found is None:
        raise _NotFoldable
    units, pooling, projected = found
    branches = [_only(folder.unit(unit)) for unit in units]
    pooled = replace(folder.one(*pooling.modules), name=folder.name(pooling.module))
    pieces = folder.fold(projected)
    project = pieces[0]
    channels = sum(spec.weight.shape[0] for spec in branches)
    if (
        not pooled.is_pointwise
        or not isinstance(project, ConvSpec)
        or project.weight.shape[1] != channels + pooled.weight.shape[0]
        or not (project.is_pointwise or project.dilation == (1, 1))
    ):
        raise _NotFoldable
    forms = folder.forms
    place = range(len(aspp.branches))[aspp.pooled]
    before = sum(spec.weight.shape[0] for spec in branches[:place])
    if before < channels:
        project = replace(project, before_pooled=before)
        if forms.keeps_values:
            parts = [part.weight for part in project.split(channels)]
            project = replace(project, weight=torch.cat(parts, dim=1), before_pooled=None)
        elif before:
            raise _NotFoldable
    layers: tuple[Layer, Layer, Layer] = (
        forms.aspp(f"{folder.name(aspp.module)}.convs", branches, folder.share(*branches)),
        forms.pooled(pooled),
        forms.project(project, channels, folder.share(project)),
    )
    folder.layers += layers
    return folder.chain([Aspp(*layers), *pieces[1:]])


def _pooling(folder: _Folder, block: match.Pooling) -> Step:
    if not match.is_mean(block.pool):
        raise _NotFoldable
    step = folder.step(block.pool, *block.modules)
    layer = JoinLayer(folder.name(block.module), Node("spread"))
    folder.layers.append(layer)
    return Spread(step, layer)


def _sum(folder: _Folder, block: match.Sum) -> Step:
    specs = [folder.one(module) for module in block.branches]
    if any(spec.act is not None for spec in specs):
        raise _NotFoldable
    return SumOfConvs([folder.conv(spec) for spec in specs])


def _features(folder: _Folder, block: match.Features) -> Step:
    return Features([(folder.step(*modules), name) for modules, name in block.stages])


def _graph(folder: _Folder, graph: match.Graph) -> Step:
    name = folder.name(graph.module)
    steps: list[Step | Join | None] = []
    for stage in graph.stages:
        if stage.items:
            steps.append(folder.step(*stage.items))
        elif stage.node.kind in ("item", "group"):
            steps.append(None)
        else:
            layer = JoinLayer(name, stage.node)
            folder.layers.append(layer)
            steps.append(Join(layer))
    return Dataflow(graph, steps)


_FOLDED: dict[type[match.Segment], Callable[..., Step]] = {
    match.Block: _block,
    match.SqueezeExcite: _squeeze_excite,
    match.Aspp: _aspp,
    match.Pooling: _pooling,
    match.Sum: _sum,
    match.Features: _features,
    match.Graph: _graph,
}


def _only(pieces: Sequence[ConvSpec | Step]) -> ConvSpec:
    if len(pieces) != 1 or not isinstance(pieces[0], ConvSpec):
        raise _NotFoldable
    return pieces[0]


def _norm_spec(norm: _BatchNorm) -> NormSpec:
    weight, bias, mean, variance = (
        None if t is None else t.detach()
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    assert variance is not None
    return NormSpec(weight, bias, mean, variance, norm.eps)


def _why_nothing(modules: Iterable[nn.Module], forms: Forms) -> str:
    """Why no convolution was folded."""
    for m in modules:
        if isinstance(m, nn.Conv2d) and not forms.takes(m.weight):
            t = m.weight
            dtype = str(t.dtype).removeprefix("torch.")
            return (
                f"the weights are {type(t).__name__} of {dtype} on {t.device}; prepared "
                f"weights exist for {forms.what}"
            )
    return "no convolution stands in a module that can be folded"
