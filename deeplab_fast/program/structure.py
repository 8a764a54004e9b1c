"""From a module's data flow to a segment: blocks, gates and pyramids by structure, not by class.

What stands in a row becomes one sequence; a sum with the map that a sequence began with a `Block`;
a product with that map, of a gate over its mean, a `SqueezeExcite`; a concatenation of atrous
branches and the pooled map of one input, projected, an `Aspp`, in whatever order the branches
stand. What is none of these stays a stage of a `Graph`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import match
from .match import Graph, Item, Segment, Stage
from .trace import Flow, Node, filled, leaves


def segment_of_flow(module: nn.Module, flow: Flow) -> Segment:
    """What a module with this data flow is."""
    graph = _Builder(module, flow).graph()
    stages, output = graph.stages, graph.output
    if len(stages) != 1 or output is not stages[0] or stages[0].inputs != (graph.source,):
        return graph
    items = stages[0].items
    if not items:
        return graph
    if len(items) == 1 and isinstance(items[0], Segment):
        # What was found in the flow stands for the module.
        return replace(items[0], module=module)
    # One layer can compute an inverted residual, which a neighbour in the row would hide.
    if has_depthwise(items) and sum(map(_is_conv, match.segments(items))) > 1:
        return match.Block(module, items, False)
    return match.Members(module, items)


def without_last_resizes(segment: Segment) -> tuple[Segment, tuple[Node | None, ...]]:
    """What a segment computes before the interpolations that come last, and of each result, in
    order, that interpolation or None.

    They write the largest maps of a network, once in whatever memory format is wanted. Their second
    input, where they have one, is the segment's.
    """
    if not isinstance(segment, Graph):
        return segment, ()
    users = Counter(value for stage in segment.stages for value in stage.inputs)
    users.update(leaves(segment.output))
    left: set[Stage] = set()

    def last(stage: Stage) -> Stage | None:
        """The interpolation that a result is."""
        idle = []
        while stage.items and not match.segments(stage.items) and users[stage] == 1:
            idle.append(stage)
            stage = stage.inputs[0]
        if (
            stage.node.kind != "resize"
            or users[stage] > 1
            or stage.inputs[0] is segment.source
            or stage.inputs[1:] not in ((), (segment.source,))
        ):
            return None
        left.update((*idle, stage))
        return stage

    found = [last(stage) for stage in leaves(segment.output)]
    resizes = iter(found)

    def before(stage: Stage) -> Stage:
        resize = next(resizes)
        return stage if resize is None else resize.inputs[0]

    output = filled(segment.output, before)
    stages = tuple(stage for stage in segment.stages if stage not in left)
    nodes = tuple(None if resize is None else resize.node for resize in found)
    return replace(segment, stages=stages, output=output), nodes


def evaluate(graph: Graph, x: Any, run: Callable[[Sequence[Item], Any], Any]) -> Any:
    """The output of a graph for x, its items computed by `run(items, x)`."""
    values = {graph.source: x}
    left = Counter(value for stage in graph.stages for value in stage.inputs)
    left.update(leaves(graph.output))
    for stage in graph.stages:
        inputs = [values[each] for each in stage.inputs]
        for each in stage.inputs:
            left[each] -= 1
            if not left[each]:
                del values[each]
        if stage.items:
            values[stage] = run(stage.items, inputs[0])
        else:
            values[stage] = compute(stage.node, inputs)
    return filled(graph.output, values.__getitem__)


def compute(node: Node, inputs: Sequence[Any]) -> Any:
    """The value of a node that is no call."""
    kind, options = node.kind, node.options
    if kind == "item":
        return inputs[0][options["key"]]
    if kind == "group":
        keys = options["keys"]
        return list(inputs) if keys is None else OrderedDict(zip(keys, inputs, strict=True))
    if kind == "cat":
        return torch.cat(list(inputs), 1)
    if kind in ("add", "mul"):
        result = inputs[0] + inputs[1] if kind == "add" else inputs[0] * inputs[1]
        # What is changed in place keeps its dtype.
        return result.to(inputs[0].dtype) if node.in_place else result
    size = inputs[1].shape[-2:] if len(inputs) > 1 else options.get("size")
    if kind == "spread":
        rows, columns = inputs[1].shape[-2:]
        return inputs[0].expand(-1, -1, rows, columns)
    assert kind == "resize", kind
    rest = {name: value for name, value in options.items() if name != "size"}
    return F.interpolate(inputs[0], size=size, **rest)


class Subflow(nn.Module):
    """Runs a part of a flow by its modules, as the forward that it was found in does."""

    def __init__(self, graph: Callable[[nn.Module], Graph]) -> None:
        super().__init__()
        self._graph = graph(self)
        self.members = nn.ModuleList(
            [item if isinstance(item, nn.Module) else item.module for item in _items(self._graph)]
        )

    def forward(self, x: Any) -> Any:
        places = {id(item): i for i, item in enumerate(_items(self._graph))}

        def run(items: Sequence[Item], x: Any) -> Any:
            for item in items:
                x = self.members[places[id(item)]](x)
            return x

        return evaluate(self._graph, x, run)


def _items(graph: Graph) -> list[Item]:
    return [item for stage in graph.stages for item in stage.items]


class _Builder:
    """Rewrites the stages of a flow until nothing more is found in them."""

    def __init__(self, module: nn.Module, flow: Flow) -> None:
        self._module = module
        self._source = Stage(flow.input, ())
        made = {flow.input: self._source}
        self._stages: list[Stage] = []
        for node in flow.nodes:
            items: tuple[Item, ...] = ()
            if node.kind == "call":
                assert node.module is not None
                items = (node.module,)
            stage = made[node] = Stage(node, tuple(made[each] for each in node.inputs), items)
            self._stages.append(stage)
        self._output = filled(flow.output, made.__getitem__)
        self._drop_unused()

    def graph(self) -> Graph:
        for found in (
            self._sizes,
            self._row,
            self._gate,
            self._image,
            self._row,
            # A row of blocks may be summed again.
            lambda: self._sum() or self._row(),
        ):
            while found():
                pass
        while self._pyramid():
            pass
        while self._row():
            pass
        return Graph(self._module, self._source, tuple(self._stages), self._output)

    def _users(self) -> Counter[Stage]:
        users = Counter(value for stage in self._stages for value in stage.inputs)
        users.update(leaves(self._output))
        return users

    def _replace(self, old: Stage, new: Stage) -> None:
        """Put a stage in the place of another, and leave out what nothing reads any more."""
        renamed = {old: new}
        stages = []
        for stage in self._stages:
            if stage is old:
                stages.append(new)
                continue
            inputs = tuple(renamed.get(each, each) for each in stage.inputs)
            if inputs != stage.inputs:
                renamed[stage] = stage = replace(stage, inputs=inputs)
            stages.append(stage)
        self._stages = stages
        self._output = filled(self._output, lambda leaf: renamed.get(leaf, leaf))
        self._drop_unused()

    def _drop_unused(self) -> None:
        used = set(leaves(self._output))
        for stage in reversed(self._stages):
            if stage in used:
                used.update(stage.inputs)
        self._stages = [stage for stage in self._stages if stage in used]

    def _sizes(self) -> bool:
        """Sizes are asked of the first map that has them."""
        for stage in self._stages:
            if stage.node.kind in ("resize", "spread") and len(stage.inputs) == 2:
                like = _first_of_size(stage.inputs[1])
                if like is not stage.inputs[1]:
                    self._replace(stage, replace(stage, inputs=(stage.inputs[0], like)))
                    return True
        return False

    def _row(self) -> bool:
        """Two stages one after another are one."""
        users = self._users()
        for stage in self._stages:
            before = stage.inputs[0]
            if stage.items and before.items and users[before] == 1:
                items = _joined(before.items, stage.items)
                self._replace(stage, _row_of(before.inputs, items))
                return True
        return False

    def _base(self, stage: Stage, users: Counter[Stage]) -> tuple[Stage, tuple[Item, ...]]:
        """Where a row begins, and its items; the stage itself where others read it too."""
        if stage.items and users[stage] == 1:
            return stage.inputs[0], stage.items
        return stage, ()

    def _gate(self) -> bool:
        users = self._users()
        for stage in self._stages:
            if stage.node.kind != "mul":
                continue
            for x, gate in (stage.inputs, stage.inputs[::-1]):
                base, items = self._base(gate, users)
                if base is x and items and (block := self._squeeze(x, stage, items)) is not None:
                    self._replace(stage, _row_of((x,), (block,)))
                    return True
        return False

    def _squeeze(self, x: Stage, stage: Stage, items: Sequence[Item]) -> Segment | None:
        """x * gate(fc2(fc1(mean of x)))."""
        if len(items) < 4 or not isinstance(items[0], nn.Module) or not match.is_mean(items[0]):
            return None
        convs = [i for i, item in enumerate(items) if match.one([item]) is not None]
        gate = items[-1]
        if len(convs) != 2 or convs[0] != 1 or not isinstance(gate, nn.Module):
            return None
        if not isinstance(match.segment_of(gate), match.Free):
            return None
        whole = self._part(stage, x)
        fc1, fc2 = tuple(items[1 : convs[1]]), tuple(items[convs[1] : -1])
        return match.SqueezeExcite(whole, items[0], fc1, fc2, gate)

    def _sum(self) -> bool:
        users = self._users()
        for stage in self._stages:
            if stage.node.kind != "add":
                continue
            left, right = stage.inputs
            (a, first), (b, second) = self._base(left, users), self._base(right, users)
            other: tuple[Item, ...] = ()
            if left is right:
                continue
            if first and a is right:
                modules, base = first, right
            elif second and b is left:
                modules, base = second, left
            elif first and second and a is b:
                # The sum is the epilogue of the last convolution of the longer one.
                modules, other = sorted((first, second), key=len, reverse=True)
                base = a
            else:
                continue
            shortcut = self._sequence(other, base) if other else None
            block = match.Block(self._part(stage, base), modules, True, shortcut)
            self._replace(stage, _row_of((base,), (block,)))
            return True
        return False

    def _pyramid(self) -> bool:
        users = self._users()
        for stage in self._stages:
            cat = stage.inputs[0] if stage.items else None
            if cat is None or cat.node.kind != "cat" or users[cat] != 1 or len(cat.inputs) < 2:
                continue
            pooled: list[int] = []
            branches: list[Item] = []
            bases = set()
            for i, branch in enumerate(cat.inputs):
                pooling = self._pooled(branch, users)
                if pooling is not None:
                    base, item = pooling
                    pooled.append(i)
                else:
                    base, items = self._base(branch, users)
                    if not items:
                        break
                    item = self._sequence(items, base)
                branches.append(item)
                bases.add(base)
            if len(branches) < len(cat.inputs) or len(bases) != 1 or len(pooled) != 1:
                continue
            (base,) = bases
            project = self._sequence(stage.items, cat)
            aspp = match.Aspp(self._part(stage, base), branches, project, pooled[0])
            if match.joint(aspp) is None:
                continue
            self._replace(stage, _row_of((base,), (aspp,)))
            return True
        return False

    def _image(self) -> bool:
        """What is computed of the mean of a map and spread over it is an image pooling."""
        users = self._users()
        for stage in self._stages:
            if stage.node.kind not in ("resize", "spread") or stage.items:
                continue
            base, items = self._base(stage.inputs[0], users)
            first = items[0] if len(items) > 1 else None
            if len(stage.inputs) < 2 or not isinstance(first, nn.Module):
                continue
            if _first_of_size(base) is _first_of_size(stage.inputs[1]) and match.is_mean(first):
                if stage.inputs[1] is not base:
                    self._replace(stage, replace(stage, inputs=(stage.inputs[0], base)))
                    return True
                pooling = match.Pooling(self._part(stage, base), first, items[1:])
                self._replace(stage, _row_of((base,), (pooling,)))
                return True
        return False

    def _pooled(self, stage: Stage, users: Counter[Stage]) -> tuple[Stage, Item] | None:
        """The image pooling that a branch is, and its input."""
        base, items = self._base(stage, users)
        segment = match.segment_of(items[0]) if len(items) == 1 else None
        return (base, segment) if isinstance(segment, match.Pooling) else None

    def _sequence(self, items: Sequence[Item], base: Stage) -> Item:
        """Items in a row as one."""
        if len(items) == 1:
            return items[0]
        source = Stage(Node("input"), ())
        row = _row_of((source,), tuple(items))
        return match.Members(Subflow(lambda own: Graph(own, source, (row,), row)), tuple(items))

    def _part(self, stage: Stage, base: Stage) -> nn.Module:
        """A module that computes a stage from another one."""
        source = Stage(base.node, ())
        made = {base: source}
        stages: list[Stage] = []
        for each in self._stages:
            if each is not base and all(value in made for value in each.inputs):
                made[each] = replace(each, inputs=tuple(made[value] for value in each.inputs))
                stages.append(made[each])
                if each is stage:
                    break
        needed = {made[stage]}
        for each in reversed(stages):
            if each in needed:
                needed.update(each.inputs)
        kept = tuple(each for each in stages if each in needed)
        return Subflow(lambda own: Graph(own, source, kept, made[stage]))


def _row_of(inputs: tuple[Stage, ...], items: tuple[Item, ...]) -> Stage:
    return Stage(Node("call"), inputs, items)


def _joined(first: Sequence[Item], second: Sequence[Item]) -> tuple[Item, ...]:
    """Two rows as one; a ReLU behind a sum goes into its block."""
    last, following = first[-1], second[0]
    if (
        isinstance(last, match.Block)
        and last.adds
        and last.act is None
        and isinstance(following, nn.Module)
        and match.is_relu(following)
    ):
        items = (last, following)
        source = Stage(Node("input"), ())
        row = _row_of((source,), items)
        whole = Subflow(lambda own: Graph(own, source, (row,), row))
        return (*first[:-1], replace(last, module=whole, act=following), *second[1:])
    return (*first, *second)


def _first_of_size(stage: Stage) -> Stage:
    """The first map with the height and width of a stage's."""
    while stage.items and _keeps_size(stage.items):
        stage = stage.inputs[0]
    return stage


def _keeps_size(items: Sequence[Item]) -> bool:
    return all(map(_part_keeps_size, match.segments(items)))


def _part_keeps_size(part: match.Part) -> bool:
    if isinstance(part, match.Unit):
        return part.pool is None and (part.conv is None or match.keeps_size(part.conv, True))
    if isinstance(part, match.Block):
        # A sum of maps of other sizes could have another one, but not be meant.
        return part.adds and part.shortcut is None
    return isinstance(part, (match.Act, match.SqueezeExcite, match.Aspp)) or (
        isinstance(part, match.Free) and isinstance(part.module, match.ELEMENTWISE)
    )


def has_depthwise(items: Sequence[Item]) -> bool:
    """Whether a convolution of each channel by a filter of its own stands in a row."""
    convs = [part.conv.module for part in match.segments(items) if _is_conv(part)]
    return any(1 < conv.groups == conv.in_channels for conv in convs)


def _is_conv(part: match.Part) -> TypeGuard[_ConvUnit]:
    return isinstance(part, match.Unit) and part.conv is not None


class _ConvUnit(match.Unit):
    conv: match.Conv


def is_map(value: object) -> bool:
    """Whether a value is a tensor [N, C, H, W] with pixels."""
    return isinstance(value, Tensor) and value.dim() == 4 and value.numel() > 0
