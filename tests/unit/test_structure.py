"""What is found in data flows by structure, and that it computes what the forward does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.dispatch.errors import norm_error
from deeplab_fast.program import match
from deeplab_fast.program.match import Item, Part
from deeplab_fast.program.structure import evaluate, segment_of_flow
from deeplab_fast.program.trace import leaves, trace

# A dozen layers in float64.
EXACT = 1e-12


def row(
    inputs: int, outputs: int, kernel: int = 1, act: bool = True, rate: int = 1, **options: int
) -> nn.Sequential:
    padding = rate * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, **options)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(layer, norm, nn.ReLU()) if act else nn.Sequential(layer, norm)


class Parts(nn.Module):
    """Modules whose names say nothing, and a forward that is a function of them and a map."""

    def __init__(self, function: Callable[[Parts, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = row(4, 4, 3), row(4, 4, act=False), row(4, 4)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.wide, self.depthwise = row(4, 8), row(8, 8, 3, groups=8)
        self.narrow = row(8, 4, act=False)
        self.relu, self.changing, self.norm = nn.ReLU(), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.mean, self.down, self.up = nn.AdaptiveAvgPool2d(1), row(4, 2), nn.Conv2d(2, 4, 1)
        self.gate = nn.Sigmoid()
        self.atrous = nn.ModuleList([row(4, 3), row(4, 3, 3, rate=2)])
        self.pooled, self.linear = row(4, 3), row(4, 3, 3, act=False)
        self.project, self.strided_project = row(9, 5), nn.Conv2d(9, 5, 1, stride=2)
        self.project_four = row(12, 5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def scale(m: Parts, x: Tensor) -> Tensor:
    return m.gate(m.up(m.down(m.mean(x))))


def image(m: Parts, x: Tensor) -> Tensor:
    return F.interpolate(m.pooled(m.mean(x)), x.shape[-2:], mode="bilinear", align_corners=False)


def in_place(m: Parts, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    y += x
    return m.changing(y)


def nested(m: Parts, x: Tensor) -> Tensor:
    y = m.c(x)
    return m.b(m.a(y)) + y + x


def pyramid(m: Parts, x: Tensor, place: int) -> Tensor:
    maps = [branch(x) for branch in m.atrous]
    maps.insert(place, image(m, x))
    return torch.cat(maps, 1)


def two_results(m: Parts, x: Tensor) -> dict[str, Tensor]:
    low = m.a(x)
    return {"low": low, "out": m.c(low)}


CONV, LINEAR = "conv+norm+act", "conv+norm"
ATROUS = f"{CONV}, {CONV}"
FOUND: dict[str, tuple[Callable[[Parts, Any], Any], str]] = {
    "a row": (lambda m, x: m.c(m.a(x)), f"{CONV} {CONV}"),
    "a residual": (lambda m, x: m.b(m.a(x)) + x, f"block({CONV} {LINEAR} + x)"),
    "a residual and ReLU": (
        lambda m, x: m.relu(x + m.b(m.a(x))),
        f"block({CONV} {LINEAR} + x, relu)",
    ),
    "a residual in place": (in_place, f"block({CONV} {LINEAR} + x, relu)"),
    "a residual in a row": (
        lambda m, x: m.c(m.b(m.a(x)) + x),
        f"block({CONV} {LINEAR} + x) {CONV}",
    ),
    "a shortcut": (
        lambda m, x: m.relu(m.b(m.a(x)) + m.norm(x)),
        f"block({CONV} {LINEAR} + norm, relu)",
    ),
    "a shortcut first": (
        lambda m, x: m.relu(m.norm(x) + m.b(m.a(x))),
        f"block({CONV} {LINEAR} + norm, relu)",
    ),
    "a residual in a residual": (nested, f"block({CONV} block({CONV} {LINEAR} + x) + x)"),
    "a map with itself": (lambda m, x: (lambda y: y + y)(m.a(x)), f"graph({CONV}; add)"),
    "an inverted residual": (
        lambda m, x: x + m.narrow(m.depthwise(m.wide(x))),
        f"block({CONV} {CONV} {LINEAR} + x)",
    ),
    "without a sum": (
        lambda m, x: m.narrow(m.depthwise(m.wide(x))),
        f"block({CONV} {CONV} {LINEAR})",
    ),
    "a gate": (lambda m, x: x * scale(m, x), "gate"),
    "a gate first": (lambda m, x: scale(m, x) * x, "gate"),
    "a gate in a row": (
        lambda m, x: (lambda y: m.c(y * scale(m, y)))(m.a(x)),
        f"{CONV} gate {CONV}",
    ),
    "a gate of another map": (
        lambda m, x: x * scale(m, m.a(x)),
        f"graph({CONV} AdaptiveAvgPool2d {CONV} conv Sigmoid; mul)",
    ),
    "no gate: a norm": (
        lambda m, x: x * m.norm(m.up(m.down(m.mean(x)))),
        f"graph(AdaptiveAvgPool2d {CONV} conv+norm; mul)",
    ),
    "no gate: one convolution": (
        lambda m, x: x * m.gate(m.c(m.mean(x))),
        f"graph(AdaptiveAvgPool2d {CONV} Sigmoid; mul)",
    ),
    "an image pooling": (image, f"image({CONV})"),
    "a mean that is expanded": (
        lambda m, x: m.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:]),
        f"image({CONV})",
    ),
    "expanded as a map of this size": (
        lambda m, x: (lambda y: torch.cat([m.c(m.mean(x)).expand_as(y), y], 1))(m.a(x)),
        f"graph({CONV}; image({CONV}); cat)",
    ),
    "the size of a map of another size": (
        lambda m, x: F.interpolate(m.pooled(m.mean(x)), m.strided(x).shape[2:]),
        f"graph(AdaptiveAvgPool2d {CONV}; conv; resize)",
    ),
    "a pyramid": (
        lambda m, x: m.project(pyramid(m, x, 2)),
        f"pyramid({ATROUS}, image({CONV}); {CONV}; 2)",
    ),
    "its pooled map first": (
        lambda m, x: m.project(pyramid(m, x, 0)),
        f"pyramid(image({CONV}), {ATROUS}; {CONV}; 0)",
    ),
    "amid, and a row around it": (
        lambda m, x: m.project(pyramid(m, m.a(x), 1)),
        f"{CONV} pyramid({CONV}, image({CONV}), {CONV}; {CONV}; 1)",
    ),
    "no pyramid: two pooled maps": (
        lambda m, x: m.project_four(torch.cat([pyramid(m, x, 0), image(m, x)], 1)),
        f"graph({CONV}; {CONV}; image({CONV}); cat; image({CONV}); cat; {CONV})",
    ),
    "no pyramid: a linear branch": (
        lambda m, x: m.project(torch.cat([m.linear(x), m.atrous[0](x), image(m, x)], 1)),
        f"graph({LINEAR}; {CONV}; image({CONV}); cat; {CONV})",
    ),
    "no pyramid: a strided projection": (
        lambda m, x: m.strided_project(pyramid(m, x, 2)),
        f"graph({CONV}; {CONV}; image({CONV}); cat; conv)",
    ),
    "no pyramid: maps of two inputs": (
        lambda m, x: m.project(torch.cat([m.atrous[0](m.a(x)), m.atrous[1](x), image(m, x)], 1)),
        f"graph({CONV} {CONV}; {CONV}; image({CONV}); cat; {CONV})",
    ),
    "branches that are summed": (
        lambda m, x: m.atrous[0](x) + m.atrous[1](x),
        f"block({CONV} + {CONV})",
    ),
    "two results": (two_results, f"graph({CONV}; {CONV})"),
    "nothing": (lambda m, x: x, "graph()"),
}


def described(items: Iterable[Item]) -> str:
    return " ".join(map(_described, match.segments(items)))


def _described(part: Part) -> str:
    if isinstance(part, match.Unit):
        kinds = {"conv": part.conv, "norm": part.norm, "act": part.act, "pool": part.pool}
        return "+".join(kind for kind, found in kinds.items() if found is not None)
    if isinstance(part, match.Block):
        other = "x" if part.shortcut is None else described([part.shortcut])
        act = "" if part.act is None else ", relu"
        return f"block({described(part.modules)}{f' + {other}' if part.adds else ''}{act})"
    if isinstance(part, match.SqueezeExcite):
        return "gate"
    if isinstance(part, match.Pooling):
        return f"image({described(part.modules)})"
    if isinstance(part, match.Aspp):
        branches = ", ".join(described([branch]) for branch in part.branches)
        return f"pyramid({branches}; {described([part.project])}; {part.pooled})"
    if isinstance(part, match.Graph):
        stages = (described(s.items) if s.items else s.node.kind for s in part.stages)
        return f"graph({'; '.join(stages)})"
    return type(part.module).__name__


def computed(items: Iterable[Item], x: Any) -> Any:
    """What the classes of `match` say that they compute, by PyTorch's layers.

    Each part's `module`, which runs where it has no form, must compute the same.
    """
    for part in match.segments(items):
        y = _computed(part, x)
        if not isinstance(part, match.Unit):
            assert_equal(part.module(x), y)
        x = y
    return x


def _computed(part: Part, x: Any) -> Any:
    if isinstance(part, match.Unit):
        for each in (part.conv, part.norm, part.act, part.pool):
            x = x if each is None else each.module(x)
        return x
    if isinstance(part, match.Block):
        y = computed(part.modules, x)
        if part.adds:
            y = y + (x if part.shortcut is None else computed([part.shortcut], x))
        return y if part.act is None else F.relu(y)
    if isinstance(part, match.SqueezeExcite):
        return x * part.gate(computed([*part.fc1, *part.fc2], part.pool(x)))
    if isinstance(part, match.Pooling):
        return computed(part.modules, part.pool(x)).expand(-1, -1, *x.shape[2:])
    if isinstance(part, match.Aspp):
        maps = [computed([branch], x) for branch in part.branches]
        return computed([part.project], torch.cat(maps, 1))
    if isinstance(part, match.Graph):
        return evaluate(part, x, computed)
    return part.module(x)


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.shape == b.shape and norm_error(a, b) <= EXACT


@pytest.mark.parametrize(("function", "expected"), FOUND.values(), ids=FOUND)
def test_what_is_found_and_what_it_computes(function: Callable, expected: str) -> None:
    torch.manual_seed(0)
    module = Parts(function).double().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    segment = segment_of_flow(module, trace(module))
    assert described([segment]) == expected
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert_equal(computed([segment], x.clone()), module(x.clone()))
