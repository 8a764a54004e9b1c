"""Turns the modules of a DeepLabv3 into an inference program, batch norms folded.

Sequences of convolution, batch norm and activation are folded wherever they stand; block classes
have a small function each, registered with `rule`. What no rule knows stays a plain module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models._backbone import IntermediateLayerGetter
from ..models.mobilenetv2 import InvertedResidual as InvertedResidualV2
from ..models.mobilenetv2 import SamePadConv2d
from ..models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from ..models.mobilenetv3 import SqueezeExcitation
from ..models.resnet import BasicBlock, Bottleneck
from ..nn.aspp import ASPP, ASPPPooling, SingleValueBatchNorm2d
from ..nn.heads import DeepLabV2Head
from .formats import is_channels_last
from .intact import activation, is_intact
from .layers import (
    Aspp,
    AsppLayer,
    AtenLayer,
    Chain,
    ConvLayer,
    ConvSpec,
    Features,
    Layer,
    PlainLayer,
    PooledLayer,
    Program,
    ProjectLayer,
    ResidualBlock,
    Single,
    SqueezeExcitationLayer,
    Step,
    SumOfConvs,
    WideProjectLayer,
)
from .staleness import has_hooks, is_foldable, is_ours

Named = tuple[str, nn.Module]

CONVOLUTIONS = (nn.Conv2d, SamePadConv2d)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SingleValueBatchNorm2d)
_NORM_FORWARDS = tuple(cls.forward for cls in BATCH_NORMS)
# Identities of a model that does not train.
DROPOUTS = (nn.Dropout, nn.Dropout2d)
# Without weights, and the same in any memory format.
FREE = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)


class NotFoldable(Exception):
    """A module cannot be folded, and the message says why; it runs as it is."""


def fold(
    model: Any, *, aux: bool = True, max_extra_bytes: int | None = None, frozen: bool = False
) -> tuple[Program | None, str]:
    """Fold a model with `backbone`, `classifier` and `aux_classifier` as `DeepLabV3` has them.

    Args:
        model: the model; it gains where its weights are fp32 on the CPU.
        aux: with the auxiliary head.
        max_extra_bytes: bound on the prepared weights beyond one copy of the weights. Each layer
            gets the part of it that its weights have of the model's.
        frozen: copy the modules that stay plain, and treat all modules as in eval mode.

    Returns:
        The program and "", or None and why the whole model must run its plain modules.
    """
    parts = [("backbone", model.backbone), ("classifier", model.classifier)]
    if aux and model.aux_classifier is not None:
        parts.append(("aux_classifier", model.aux_classifier))
    for part, root in parts:
        for name, module in root.named_modules(prefix=part):
            if has_hooks(module):
                return None, f"{name} has forward hooks"
    folder = _Folder(frozen, max_extra_bytes, _count_weights(parts))
    with torch.inference_mode(False), torch.no_grad():
        backbone: Any = folder.step(*parts[0])
        heads = tuple(
            (result, result, folder.step(*part))
            for result, part in zip(("out", "aux"), parts[1:], strict=False)
        )
    if not any(isinstance(layer, (ConvLayer, AsppLayer)) for layer in folder.layers):
        return None, _why_nothing(parts)
    layers = tuple(folder.layers)
    return Program(backbone, heads, layers, folder.in_channels, folder.channels_last), ""


Rule = Callable[["_Folder", str, Any], Step]
_RULES: dict[type[nn.Module], Rule] = {}


def rule(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register how modules of exactly these classes are folded.

    The function is called with the folder, the module's name and the module, and returns a step or
    raises `NotFoldable`.
    """

    def register(function: Rule) -> Rule:
        for cls in classes:
            _RULES[cls] = function
        return function

    return register


@dataclass
class _Folder:
    frozen: bool
    max_extra_bytes: int | None
    weights: int
    layers: list[Layer] = field(default_factory=list)
    in_channels: int | None = None
    channels_last: bool = False

    def step(self, name: str, module: nn.Module) -> Step:
        """The step of any module."""
        return self.chain(self.pieces([(name, module)]))

    def chain(self, pieces: Sequence[ConvSpec | Step]) -> Step:
        """Prepare the convolutions of a sequence."""
        steps: list[Step] = []
        for piece in pieces:
            step = Single(self.conv(piece)) if isinstance(piece, ConvSpec) else piece
            if isinstance(step, ResidualBlock) and steps and isinstance(steps[-1], ResidualBlock):
                step.own_input()
            if isinstance(step, Single) and isinstance(step.layer, SqueezeExcitationLayer):
                # The map is a convolution's result, which nothing else reads.
                last = steps[-1] if steps else None
                step.layer.in_place = isinstance(last, Single) and isinstance(last.layer, ConvLayer)
            steps.append(step)
        return steps[0] if len(steps) == 1 else Chain(steps)

    def pieces(self, named: Sequence[Named]) -> list[ConvSpec | Step]:
        """Fold a sequence of modules: convolutions take the norm and activation behind them."""
        flat = [pair for name, module in named for pair in self.flatten(name, module)]
        pieces: list[ConvSpec | Step] = []
        i = 0
        while i < len(flat):
            name, module = flat[i]
            i += 1
            if self.is_convolution(module):
                rest = flat[i:]
                norm = rest.pop(0)[1] if rest and self.is_norm(rest[0][1], module) else None
                while rest and type(rest[0][1]) is nn.Identity and self.is_itself(rest[0][1]):
                    rest.pop(0)
                act = activation(rest[0][1]) if rest else None
                if act is not None:
                    rest.pop(0)
                i = len(flat) - len(rest)
                pieces.append(self.spec(name, module, norm, act))
            elif not self.is_identity(module):
                pieces.append(self.other(name, module))
        return pieces

    def other(self, name: str, module: nn.Module) -> Step:
        """The step of a module that is no convolution and no sequence."""
        if self.is_free(module):
            return self.add(AtenLayer(name, module))
        function = _RULES.get(type(module))
        if not self.is_itself(module):
            function = None
        elif type(module).forward is IntermediateLayerGetter.forward:
            function = _features
        if function is not None:
            before = len(self.layers)
            try:
                return function(self, name, module)
            except NotFoldable:
                del self.layers[before:]
        if self.frozen:
            module = copy.deepcopy(module).eval()
        return self.add(PlainLayer(name, module))

    def flatten(self, name: str, module: nn.Module) -> Iterator[Named]:
        """A sequence's members, and those of sequences in it; any other module is its own."""
        if not self.is_itself(module) or type(module).forward is not nn.Sequential.forward:
            yield name, module
            return
        for key, child in module._modules.items():
            assert child is not None
            yield from self.flatten(f"{name}.{key}", child)

    def one(self, name: str, module: nn.Module) -> ConvSpec:
        """The convolution that a sequence comes down to."""
        pieces = self.pieces([(name, module)])
        if len(pieces) != 1 or not isinstance(pieces[0], ConvSpec):
            raise NotFoldable(f"{name} is not one convolution with its norm and activation")
        return pieces[0]

    def residual(
        self, name: str, pieces: list[ConvSpec | Step], shortcut: Step | None, act: str | None
    ) -> Step:
        """act(pieces(x) + shortcut(x)), the sum in the epilogue of the last convolution."""
        body, tail = pieces[:-1], pieces[-1] if pieces else None
        if not isinstance(tail, ConvSpec) or tail.act is not None:
            raise NotFoldable(f"{name} does not end in a convolution and a norm before the sum")
        tail.act = act
        return ResidualBlock(self.chain(body), self.conv(tail), shortcut)

    def add(self, layer: Layer) -> Step:
        self.layers.append(layer)
        return Single(layer)

    def conv(self, spec: ConvSpec) -> ConvLayer:
        layer = ConvLayer(spec, self.share(spec))
        self.layers.append(layer)
        return layer

    def share(self, *specs: ConvSpec) -> int | None:
        """These layers' part of the bound on extra bytes."""
        if self.max_extra_bytes is None:
            return None
        return self.max_extra_bytes * sum(s.weight.numel() for s in specs) // max(1, self.weights)

    def spec(self, name: str, conv: Any, norm: Any, act: str | None) -> ConvSpec:
        if self.in_channels is None and not self.layers:
            self.in_channels = conv.in_channels
            self.channels_last = is_channels_last(conv.weight)
        scale, shift = None, None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            scale, shift = _fold_norm(norm, shift)
        padding = "same" if type(conv) is SamePadConv2d else conv.padding
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        return ConvSpec(name, conv.weight.detach(), scale, shift, *geometry, act)

    def is_itself(self, module: nn.Module) -> bool:
        """Whether a module is watched for changes and does what its class says."""
        return is_ours(module) and is_intact(module)

    def is_identity(self, module: nn.Module) -> bool:
        idle = type(module) in DROPOUTS and (self.frozen or not module.training)
        return (idle or type(module) is nn.Identity) and self.is_itself(module)

    def is_free(self, module: Any) -> bool:
        # A MaxPool2d may return a pair.
        one = not getattr(module, "return_indices", False)
        return type(module) in FREE and one and self.is_itself(module)

    def is_convolution(self, conv: Any) -> bool:
        return (
            type(conv) in CONVOLUTIONS
            and self.is_itself(conv)
            and conv.padding_mode == "zeros"
            and all(type(pair) is tuple for pair in (conv.stride, conv.padding, conv.dilation))
            and set(conv._parameters) == {"weight", "bias"}
            and conv.weight is not None
            and all(is_foldable(t) for t in (conv.weight, conv.bias) if t is not None)
            and conv.weight.numel() > 0
        )

    def is_norm(self, norm: Any, conv: Any) -> bool:
        """Whether a batch norm behind `conv` is a scale and a shift for each channel."""
        # Frozen batch norms have a class of their own, and the forward of the one they had before.
        if not isinstance(norm, BATCH_NORMS) or type(norm).forward not in _NORM_FORWARDS:
            return False
        values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (
            (self.frozen or not norm.training)
            and self.is_itself(norm)
            and set(norm._parameters) == {"weight", "bias"}
            and {"running_mean", "running_var"} <= set(norm._buffers)
            and norm.running_mean is not None
            and norm.running_var is not None
            and all(
                is_foldable(t) and t.shape == conv.weight.shape[:1] for t in values if t is not None
            )
        )


@rule(BasicBlock)
def _basic_block(folder: _Folder, name: str, block: Any) -> Step:
    return _resnet_block(folder, name, block, ("conv1", "bn1", "relu", "conv2", "bn2"))


@rule(Bottleneck)
def _bottleneck(folder: _Folder, name: str, block: Any) -> Step:
    members = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
    return _resnet_block(folder, name, block, members)


def _resnet_block(folder: _Folder, name: str, block: Any, members: Sequence[str]) -> Step:
    pieces = folder.pieces([(f"{name}.{key}", getattr(block, key)) for key in members])
    if type(block.relu) is not nn.ReLU or not folder.is_itself(block.relu):
        raise NotFoldable(f"{name} has another activation behind the sum")
    shortcut = None
    if block.downsample is not None:
        shortcut = folder.step(f"{name}.downsample", block.downsample)
    return folder.residual(name, pieces, shortcut, "relu")


@rule(InvertedResidualV3)
def _inverted_residual_v3(folder: _Folder, name: str, block: Any) -> Step:
    pieces = folder.pieces([(f"{name}.block", block.block)])
    if not block.use_res_connect:
        return folder.chain(pieces)
    return folder.residual(name, pieces, None, None)


@rule(InvertedResidualV2)
def _inverted_residual_v2(folder: _Folder, name: str, block: Any) -> Step:
    members = ("expand", "depthwise", "project")
    named = [(f"{name}.{key}", getattr(block, key)) for key in members]
    pieces = folder.pieces([pair for pair in named if pair[1] is not None])
    if not block.use_res_connect:
        return folder.chain(pieces)
    return folder.residual(name, pieces, None, None)


@rule(SqueezeExcitation)
def _squeeze_excitation(folder: _Folder, name: str, module: Any) -> Step:
    _check_global_pool(folder, name, module.avgpool)
    if not folder.is_free(module.scale_activation):
        raise NotFoldable(f"{name} has a gate that is not known")
    fc1 = folder.one(f"{name}.fc1", nn.Sequential(module.fc1, module.activation))
    fc2 = folder.one(f"{name}.fc2", module.fc2)
    if not fc1.is_pointwise or not fc2.is_pointwise:
        raise NotFoldable(f"{name} has convolutions that are not 1x1")
    return folder.add(SqueezeExcitationLayer(name, fc1, fc2, module.scale_activation))


@rule(ASPP)
def _aspp(folder: _Folder, name: str, aspp: Any) -> Step:
    if len(aspp.convs) < 2:
        raise NotFoldable(f"{name} has no branches or no image pooling")
    *convs, pooling = aspp.convs
    branches = [folder.one(f"{name}.convs.{i}", conv) for i, conv in enumerate(convs)]
    for spec in branches:
        if not _is_branch(spec):
            raise NotFoldable(f"{spec.name} is not a 1x1 or atrous 3x3 branch with ReLU")
    if type(pooling) is not ASPPPooling or not folder.is_itself(pooling) or len(pooling) < 2:
        raise NotFoldable(f"{name} has another image pooling")
    pool, *rest = pooling
    label = f"{name}.convs.{len(convs)}"
    _check_global_pool(folder, label, pool)
    pooled = replace(folder.one(label, nn.Sequential(*rest)), name=label)
    pieces = folder.pieces([(f"{name}.project", aspp.project)])
    project = pieces[0] if pieces else None
    channels = sum(spec.weight.shape[0] for spec in branches)
    if (
        not pooled.is_pointwise
        or not isinstance(project, ConvSpec)
        or project.weight.shape[1] != channels + pooled.weight.shape[0]
        or not _keeps_size(project)
    ):
        raise NotFoldable(f"{name} has another projection")
    wide = ProjectLayer if project.is_pointwise else WideProjectLayer
    layers: tuple[Layer, ...] = (
        AsppLayer(f"{name}.convs", branches, folder.share(*branches)),
        PooledLayer(pooled),
        wide(project, channels, folder.share(project)),
    )
    folder.layers += layers
    return folder.chain([Aspp(*layers), *pieces[1:]])


@rule(DeepLabV2Head)
def _deeplabv2(folder: _Folder, name: str, head: Any) -> Step:
    specs = [folder.one(f"{name}.convs.{i}", conv) for i, conv in enumerate(head.convs)]
    if any(spec.act is not None for spec in specs):
        raise NotFoldable(f"{name} has activations before the sum")
    return SumOfConvs([folder.conv(spec) for spec in specs])


def _features(folder: _Folder, name: str, getter: Any) -> Step:
    """An IntermediateLayerGetter: sequences that end where a result is kept."""
    stages: list[tuple[Step, str | None]] = []
    members: list[Named] = []
    for key, module in getter._modules.items():
        members.append((f"{name}.{key}", module))
        kept = getter.return_layers.get(key)
        if kept is not None:
            stages.append((folder.chain(folder.pieces(members)), kept))
            members = []
    if members:
        stages.append((folder.chain(folder.pieces(members)), None))
    return Features(stages)


def _fold_norm(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale, rounded once."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    mean = norm.running_mean.double()
    shift = ((0.0 if bias is None else bias.double()) - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.float(), shift.float()


def _check_global_pool(folder: _Folder, name: str, pool: Any) -> None:
    if (
        type(pool) is not nn.AdaptiveAvgPool2d
        or not folder.is_itself(pool)
        or pool.output_size not in (1, (1, 1), [1, 1])
    ):
        raise NotFoldable(f"{name} does not begin with a mean over the map")


def _keeps_size(spec: ConvSpec) -> bool:
    """Stride 1, one group, an odd kernel padded by its half."""
    kernel = tuple(spec.weight.shape[2:])
    return (
        spec.stride == (1, 1)
        and spec.groups == 1
        and all(k % 2 == 1 for k in kernel)
        and (spec.is_pointwise or spec.dilation == (1, 1))
        and (spec.padding == "same" or spec.padding == tuple(k // 2 for k in kernel))
    )


def _is_branch(spec: ConvSpec) -> bool:
    kernel = tuple(spec.weight.shape[2:])
    rate = spec.dilation[0]
    same = kernel == (3, 3) and spec.dilation == (rate, rate) and spec.padding == (rate, rate)
    plain = spec.stride == (1, 1) and spec.groups == 1 and spec.act == "relu"
    return plain and (same or spec.is_pointwise)


def _count_weights(parts: Sequence[Named]) -> int:
    return sum(
        m.weight.numel()
        for _, root in parts
        for m in root.modules()
        if isinstance(m, nn.Conv2d) and isinstance(m.weight, Tensor)
    )


def _why_nothing(parts: Sequence[Named]) -> str:
    """Why no convolution was folded."""
    for _, root in parts:
        for m in root.modules():
            if isinstance(m, nn.Conv2d) and not is_foldable(m.weight):
                t = m.weight
                dtype = str(t.dtype).removeprefix("torch.")
                return (
                    f"the weights are {type(t).__name__} of {dtype} on {t.device}; prepared "
                    "weights exist for dense float32 on the CPU"
                )
    return "no convolution stands in a module that can be folded"
