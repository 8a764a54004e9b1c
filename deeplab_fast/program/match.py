"""Modules as segments: what a network computes, for inference and for training alike.

`segments` walks modules in the order in which they run. Convolutions, batch norms, activations and
poolings that stand one after another become a `Unit`; a module whose forward is its own becomes
what the rule beside its class says. A rule names the modules that run and how their results are
joined. Whether that can be folded, or trained in one piece, `inference` and `training` decide, and
run the whole module as it is where it cannot.

A module that computes something of its own (`intact.is_plain`), or that no rule knows, is `Plain`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .intact import bound_forward, is_followed, is_intact_class, is_plain
from .trace import Node

# Activations that the epilogues of convolutions and batch norms have.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}
# Identities of a model that does not train.
DROPOUTS = (nn.Dropout, nn.Dropout2d)
# Of single values.
ELEMENTWISE = (
    *DROPOUTS,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.LeakyReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)
# Without weights, and the same in any memory format.
_FREE = (
    *ELEMENTWISE,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d,
    nn.ZeroPad2d,
)


@dataclass(frozen=True)
class Segment:
    """A module that stands for itself, and what it is made of in the classes below."""

    module: nn.Module


class Plain(Segment):
    """Runs as it is."""


class Free(Segment):
    """An activation, a pooling or a dropout of PyTorch's: without weights."""


@dataclass(frozen=True)
class Act(Free):
    """An activation that epilogues have, by its name there."""

    name: str


@dataclass(frozen=True)
class Pool(Free):
    """A max pooling."""

    module: nn.MaxPool2d


@dataclass(frozen=True)
class Conv(Segment):
    """A convolution with zero padding; `same` for TensorFlow's in place of its own."""

    module: nn.Conv2d
    same: bool = False


@dataclass(frozen=True)
class Norm(Segment):
    """A batch norm of maps, synchronised or not, frozen or not."""

    module: _BatchNorm


@dataclass(frozen=True)
class Unit:
    """Convolution, batch norm, activation and max pooling, in this order.

    Each may be missing, but one of the first two; poolings stand behind batch norms only.
    """

    conv: Conv | None
    norm: Norm | None
    act: Act | None = None
    pool: Pool | None = None


# What runs as one of several, one after another: a module, or what is known of one.
Item = nn.Module | Segment


@dataclass(frozen=True)
class Members(Segment):
    """Runs these one after another, and nothing else: one with what stands before and behind."""

    modules: Iterable[Item]


@dataclass(frozen=True)
class Block(Segment):
    """act(modules(x) + shortcut(x)), or modules(x); without a shortcut x itself is added."""

    modules: Sequence[Item]
    adds: bool
    shortcut: Item | None = None
    act: nn.Module | None = None


@dataclass(frozen=True)
class SqueezeExcite(Segment):
    """x * gate(modules(pool(x)))."""

    pool: nn.Module
    fc1: Sequence[Item]
    fc2: Sequence[Item]
    gate: nn.Module


@dataclass(frozen=True)
class Pooling(Segment):
    """modules(pool(x)), spread over the map."""

    pool: nn.Module
    modules: Sequence[Item]


@dataclass(frozen=True)
class Aspp(Segment):
    """project(concat of branch(x)); `pooled` is the place of the image pooling."""

    branches: Sequence[Item]
    project: Item
    pooled: int = -1


@dataclass(frozen=True)
class Sum(Segment):
    """The sum of branch(x)."""

    branches: Sequence[nn.Module]


@dataclass(frozen=True)
class Features(Segment):
    """A dict of maps: pairs of modules, one after another, and the name of their result or None."""

    stages: Sequence[tuple[Sequence[nn.Module], str | None]]


@dataclass(frozen=True, eq=False)
class Stage:
    """One value of a `Graph`: that of a `trace.Node` which is no call, or of items in a row."""

    node: Node
    inputs: tuple[Stage, ...]
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Graph(Segment):
    """A data flow: the stages in the order in which they run, and the stages that are returned, in
    lists, tuples and dicts. Its input is `source`."""

    source: Stage
    stages: Sequence[Stage]
    output: Any


Part = Segment | Unit
Geometry = tuple[list[int], list[int], list[int], int]
S = TypeVar("S", bound=Segment)
Rule = Callable[..., Segment]
# By the forward that a rule stands for: a subclass that keeps it keeps the rule.
_RULES: dict[Callable[..., object], Rule] = {}
# The same of libraries that may not be there, by the module and the qualified name of the forward.
_LIBRARY_RULES: dict[tuple[str, str], Rule] = {}
_LIBRARIES = ("segmentation_models_pytorch.", "timm.", "torchvision.", "transformers.")


def rule(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what modules of these classes are: a function of the module, called while it
    computes what its class does."""

    def register(function: Rule) -> Rule:
        _RULES.update({cls.forward: function for cls in classes})
        return function

    return register


def rule_of_library(*names: str) -> Callable[[Rule], Rule]:
    """As `rule`, for classes of other libraries by their full names."""

    def register(function: Rule) -> Rule:
        for name in names:
            home, cls = name.rsplit(".", 1)
            _LIBRARY_RULES[home, f"{cls}.forward"] = function
        return function

    return register


def library_rule(cls: type[nn.Module]) -> Rule | None:
    """The rule of another library's class, whose forward is still the library's."""
    if not cls.__module__.startswith(_LIBRARIES):
        return None
    forward = cls.forward
    code, home = getattr(forward, "__code__", None), getattr(forward, "__module__", "")
    found = _LIBRARY_RULES.get((home, getattr(code, "co_qualname", "")))
    # Unlike a name, which functools.wraps copies.
    is_own = found is not None and forward.__globals__ is vars(sys.modules[home])
    return found if is_own else None


def segments(modules: Iterable[Item]) -> list[Part]:
    """What a sequence of modules computes."""
    # The first is the last of the list.
    flat: list[Segment] = []
    for module in modules:
        _flatten(module, flat)
    flat.reverse()
    found: list[Part] = []
    while flat:
        conv, norm = _take(flat, Conv), _take(flat, Norm)
        if conv is None and norm is None:
            found.append(flat.pop())
            continue
        act = _take(flat, Act)
        found.append(Unit(conv, norm, act, None if norm is None else _take(flat, Pool)))
    return found


def segment_of(item: Item) -> Segment:
    """What one module is."""
    if isinstance(item, Segment):
        return item
    bound = bound_forward(item)
    if bound is not None and bound.opaque:
        return Plain(item)
    function = rule_of_class(type(item))
    if function is not None:
        intact = is_plain if is_intact_class(type(item)) else is_followed
        return function(item) if intact(item) else Plain(item)
    return Plain(item) if bound is None or not is_followed(item) else bound.segment(item)


def rule_of_class(cls: type[nn.Module]) -> Rule | None:
    """The rule that a class has, of PyTorch's, this package or a known library."""
    if is_intact_class(cls):
        # A scripted module's class has no forward to look at, and is not intact.
        return _RULES.get(cls.forward)
    return library_rule(cls)


def one(modules: Iterable[Item]) -> Unit | None:
    """The unit with a convolution that a sequence comes down to, or None."""
    found = segments(modules)
    unit = found[0] if len(found) == 1 else None
    return unit if isinstance(unit, Unit) and unit.conv is not None else None


def joint(aspp: Aspp) -> tuple[list[Unit], Pooling, list[Part]] | None:
    """The branches of an ASPP, its image pooling, and the projection with what stands behind it.

    None where these are anything but 1x1 or atrous 3x3 convolutions with ReLU, a mean of the map,
    and a convolution that keeps the size of the map.
    """
    if len(aspp.branches) < 2:
        return None
    modules = list(aspp.branches)
    last = modules.pop(aspp.pooled)
    branches = [unit for unit in (one([module]) for module in modules) if unit is not None]
    pooling = segment_of(last)
    project = segments([aspp.project])
    first = project[0] if project else None
    if (
        len(branches) < len(modules)
        or not all(_is_branch(unit) for unit in branches)
        or not isinstance(pooling, Pooling)
        or not is_mean(pooling.pool)
        or not (isinstance(first, Unit) and first.conv is not None and keeps_size(first.conv))
    ):
        return None
    return branches, pooling, project


def is_mean(module: nn.Module) -> bool:
    """Whether a module takes the mean over the map."""
    return type(module) is nn.AdaptiveAvgPool2d and (
        is_plain(module) and module.output_size in (1, (1, 1), [1, 1])
    )


def is_relu(module: nn.Module) -> bool:
    """Whether a module is a plain ReLU."""
    segment = segment_of(module)
    return isinstance(segment, Act) and segment.name == "relu"


def keeps_size(conv: Conv, any_groups: bool = False) -> bool:
    """Stride 1, one group, and a square odd kernel that is padded to keep the size of the map."""
    stride, padding, (rate, other), groups = geometry(conv)
    height, width = conv.module.weight.shape[2:]
    return (
        not conv.same
        and stride == [1, 1]
        and (groups == 1 or any_groups)
        and height == width
        and height % 2 == 1
        and rate == other
        and padding == [rate * (height // 2)] * 2
    )


def geometry(conv: Conv) -> Geometry:
    """(stride, padding, dilation, groups), each but the last as [rows, columns], of a convolution
    that `has_geometry`."""
    module = conv.module
    assert not isinstance(module.padding, str)
    padding = [reach // 2 for reach in _reaches(module)] if conv.same else pair(module.padding)
    return pair(module.stride), padding, pair(module.dilation), module.groups


def has_geometry(conv: Conv) -> bool:
    """Whether the padding is the same on both sides of every map: of SAME ones that with stride 1
    and an even padding altogether."""
    module = conv.module
    return not conv.same or (
        pair(module.stride) == [1, 1] and not any(reach % 2 for reach in _reaches(module))
    )


def _reaches(conv: nn.Conv2d) -> list[int]:
    kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
    return [(size - 1) * rate for size, rate in zip(kernel, dilation, strict=True)]


def pair(value: int | Sequence[int]) -> list[int]:
    """[rows, columns] of an attribute of a convolution, which people set to an int too."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


@rule(nn.Conv2d)
def convolution(module: nn.Conv2d, same: bool = False) -> Segment:
    """A convolution with zero padding; `same` for TensorFlow's in place of its own."""
    zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return Conv(module, same) if zeros and _is_ordinary(module.weight) else Plain(module)


@rule(nn.BatchNorm2d, nn.SyncBatchNorm)
def _norm(module: _BatchNorm) -> Segment:
    # One forward serves the batch norms of other dimensions too.
    known = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return Norm(module) if known else Plain(module)


@rule(*_ACTIVATIONS)
def _activation(module: nn.Module) -> Segment:
    name = _ACTIVATIONS.get(type(module))
    if name is None:
        return Plain(module)
    # nn.ReLU6 is an nn.Hardtanh, whose bounds can be set.
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) != (0, 6):
        return Free(module)
    return Act(module, name)


@rule(*_FREE)
def _free(module: nn.Module) -> Segment:
    return Free(module) if type(module) in _FREE else Plain(module)


@rule(nn.MaxPool2d)
def _pool(module: nn.MaxPool2d) -> Segment:
    # It may return a pair.
    one = type(module) is nn.MaxPool2d and not module.return_indices
    return Pool(module) if one else Plain(module)


@rule(nn.Sequential)
def _sequential(module: nn.Sequential) -> Segment:
    return Members(module, module)


@rule(nn.Identity)
def _identity(module: nn.Identity) -> Segment:
    return Members(module, ())


def _flatten(item: Item, found: list[Segment]) -> None:
    segment = segment_of(item)
    if isinstance(segment, Members):
        for member in segment.modules:
            _flatten(member, found)
    else:
        found.append(segment)


def _take(flat: list[Segment], kind: type[S]) -> S | None:
    if not flat or not isinstance(flat[-1], kind):
        return None
    segment = flat.pop()
    assert isinstance(segment, kind)
    return segment


def _is_branch(unit: Unit) -> bool:
    return (
        unit.conv is not None
        and keeps_size(unit.conv)
        and unit.conv.module.weight.shape[2] in (1, 3)
        and unit.act is not None
        and unit.act.name == "relu"
        and unit.pool is None
    )


def _is_ordinary(weight: Tensor | None) -> bool:
    """No tensor of a class that may compute something of its own; PyTorch's fakes do not."""
    cls = type(weight)
    return cls in (Tensor, nn.Parameter) or cls.__module__.startswith("torch._subclasses.")
