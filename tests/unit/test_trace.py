"""Flows of forwards: what is recorded, and every reason against it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.program.trace import Untraceable, trace


class Module(nn.Module):
    """A module whose forward is a function of it and of a map."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.changing = nn.ReLU(inplace=True)
        self.list = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])
        self.dict = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})
        self.row = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.scale, self.seen = nn.Parameter(torch.ones(4, 1, 1)), []
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _unpacked(m: Module, x: Tensor) -> Tensor:
    _, _, h, w = x.shape
    return F.interpolate(m.conv(x), (h, w), mode="bilinear")


KINDS: dict[str, tuple[Callable[[Module, Any], Any], list[str]]] = {
    "calls in a row": (lambda m, x: m.relu(m.norm(m.conv(x))), ["call"] * 3),
    "a sum, method": (lambda m, x: m.conv(x).add(x), ["call", "add"]),
    "a sum in place": (lambda m, x: m.conv(x).add_(x), ["call", "add"]),
    "a product": (lambda m, x: torch.mul(x, m.conv(x)), ["call", "mul"]),
    "channels": (lambda m, x: torch.cat([x, m.conv(x)], dim=1), ["call", "cat"]),
    "channels from behind": (lambda m, x: torch.cat((x, m.conv(x)), -3), ["call", "cat"]),
    "functions": (lambda m, x: torch.sigmoid(F.relu(x)), ["call"] * 2),
    "a mean": (lambda m, x: x.mean((-1, -2), keepdim=True), ["call"]),
    "a list of modules": (lambda m, x: m.list[1](m.list[0](x)), ["call"] * 2),
    "a dict of modules": (lambda m, x: m.dict["a"](x), ["call"]),
    "a part of a sequence": (lambda m, x: m.row[:1](x), ["call"]),
    "a whole sequence": (lambda m, x: m.row(x), ["call"] * 2),
    "another map's size": (lambda m, x: F.interpolate(m.conv(x), x.shape[-2:]), ["call", "resize"]),
    "a size by its parts": (_unpacked, ["call", "resize"]),
    "a size in a row": (
        lambda m, x: m.conv(x).expand(-1, -1, *x.shape[2:]),
        ["call", "spread"],
    ),
    "a factor": (lambda m, x: F.interpolate(x, scale_factor=2), ["resize"]),
    "padding": (lambda m, x: F.pad(x, (1, 1, 1, 1)), ["call"]),
    "own weights of a convolution": (
        lambda m, x: F.conv2d(m.conv(x), m.conv.weight, m.conv.bias),
        ["call"] * 2,
    ),
}


@pytest.mark.parametrize(("function", "kinds"), KINDS.values(), ids=KINDS)
def test_what_is_recorded(function: Callable[[Module, Any], Any], kinds: list[str]) -> None:
    flow = trace(Module(function))
    assert [node.kind for node in flow.nodes] == kinds
    assert flow.output is flow.nodes[-1]


def test_structures() -> None:
    flow = trace(Module(lambda m, x: OrderedDict(a=m.conv(x), b=[x, (m.relu(x),)])))
    conv, relu = flow.nodes
    assert type(flow.output) is OrderedDict
    assert flow.output == {"a": conv, "b": [flow.input, (relu,)]}


REASONS: dict[str, tuple[Callable[[Module, Any], Any], str]] = {
    "parameters": (lambda m, x: x * m.scale, "tensors of its own"),
    "a batch that decides": (lambda m, x: x if x.shape[0] > 3 else m.conv(x), "by the size"),
    "a result's size that decides": (
        lambda m, x: (lambda y: y if y.shape[2] > 3 else m.norm(y))(m.conv(x)),
        "by the size",
    ),
    "a value that decides": (lambda m, x: x if x.sum() > 0 else m.conv(x), "by the size"),
    "other dimensions": (lambda m, x: torch.cat([x, x], 2), "other than by channels"),
    "scaled sums": (lambda m, x: torch.add(x, x, alpha=2), "scales"),
    "numbers": (lambda m, x: x * 2, "something else than maps"),
    "unknown functions": (lambda m, x: x.flip(3), "calls flip"),
    "other means": (lambda m, x: x.mean((2, 3)), "a mean other than"),
    "sizes computed": (lambda m, x: F.interpolate(x, x.shape[2] * 2), "computes with sizes"),
    "other modes": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), "another mode"),
    "its input": (lambda m, x: m.conv(m.changing(x)), "changes its input in place"),
    "a map used elsewhere": (
        lambda m, x: (lambda y: m.conv(m.changing(y)) + y)(m.conv(x)),
        "uses elsewhere",
    ),
    "attributes": (lambda m, x: setattr(m, "last", x) or m.conv(x), "sets attributes"),
    "lists": (lambda m, x: m.seen.append(x) or m.conv(x), "changes a list or dict"),
    "random numbers": (lambda m, x: (torch.rand(1), m.conv(x))[1], "draws random numbers"),
    "a call for nothing": (lambda m, x: (m.norm(x), m.conv(x))[1], "does not use"),
    "no map": (lambda m, x: 3, "returns a int"),
    "switched gradients": (
        lambda m, x: torch.no_grad()(lambda: m.conv(x))(),
        "checkpoints, or switches gradients",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REASONS.values(), ids=REASONS)
def test_what_has_no_flow(function: Callable[[Module, Any], Any], reason: str) -> None:
    module = Module(function)
    attributes = dict(vars(module))
    state = torch.get_rng_state()
    with pytest.raises(Untraceable, match=reason):
        trace(module)
    assert vars(module) == attributes and not module.seen
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def _checked(m: Module, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    if h % 32 != 0 or w % 32 != 0:
        raise RuntimeError("multiples of 32")
    return m.conv(x)


# With (height, width) of maps, and whether the forward does the same with them as with large even
# ones.
DECISIONS: dict[str, tuple[Callable[[Module, Any], Any], dict[tuple[int, int], bool]]] = {
    "divisible": (_checked, {(64, 96): True, (64, 95): False, (33, 64): False}),
    "larger than": (
        lambda m, x: m.conv(x) if x.size(2) >= 10 else m.norm(x),
        {(10, 3): True, (9, 30): False},
    ),
    "by size()": (
        lambda m, x: m.conv(x) if x.size()[3] // 2 + 1 > 4 else m.norm(x),
        {(1, 8): True, (8, 7): False},
    ),
    "square or not": (
        lambda m, x: m.conv(x) if x.shape[2] == x.shape[3] else m.norm(x),
        {(7, 7): True, (7, 8): False},
    ),
    "dimensions": (lambda m, x: m.conv(x) if x.dim() == 4 else x, {(1, 1): True}),
    "not at all": (lambda m, x: m.conv(x), {(1, 1): True}),
}


@pytest.mark.parametrize(("function", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_what_is_decided_by_height_and_width(function: Callable, expected: dict) -> None:
    flow = trace(Module(function))
    assert [node.module.__class__ for node in flow.nodes] == [nn.Conv2d]
    assert {size: flow.holds((2, 4, *size)) for size in expected} == expected


def test_more_than_one_argument() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(Untraceable, match="more than one argument"):
        trace(Two())


def test_hooks_are_not_run() -> None:
    module = Module(lambda m, x: m.row(x))
    calls: list[object] = []
    module.row.register_forward_hook(lambda *args: calls.append(args))
    (node,) = trace(module).nodes
    assert node.module is module.row and not calls
    # Those of the module itself run around its forward.
    module.register_forward_hook(lambda *args: calls.append(args))
    (node,) = trace(module).nodes
    assert node.module is module.row and not calls
