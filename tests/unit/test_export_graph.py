"""The graphs that files are written from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.exporting import Description
from deeplab_fast.exporting.graph import ExportGraph, exported_program, write_elsewhere

DESCRIPTION = Description(
    labels=False,
    photos=False,
    num_classes=4,
    classes=None,
    palette=None,
    channels="RGB",
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    resize=None,
    batch=1,
    size=(34, 35),
    multiple=1,
    smallest=1,
    precision="fp32",
    model="a model",
    version="0",
)


class InPlace(nn.Module):
    """Changes maps, of which some have another reader."""

    align_corners = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)

    def forward_logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Alone(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.first(x)), inplace=True)
        z = self.second(y)
        z += y
        return F.hardswish(F.relu(z, inplace=True), inplace=True)


class ReadBefore(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        y = self.first(x)
        doubled = y * 2
        return F.relu6(y, inplace=True) + doubled


class ReadAfter(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        y = self.first(x)
        clipped = F.relu6(y, inplace=True)
        return self.second(clipped) + y


class View(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        y = self.first(x)
        F.relu6(y[:, :2], inplace=True)
        return y


class Input(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        return self.first(F.relu6(x, inplace=True)) + F.pad(x, (0, 0, 0, 0, 0, 1))


class OtherType(InPlace):
    def forward_logits(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = F.conv2d(y.double(), self.second.weight.double())
        y += z
        return y


@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        (Alone, 0),
        (ReadBefore, 1),
        # The graph names the changed map there.
        (ReadAfter, 0),
        # Of what has no memory of its own.
        (View, 1),
        (Input, 1),
        # A new sum would be a double.
        (OtherType, 1),
    ],
)
def test_maps_that_nobody_else_sees_are_not_changed_in_place(
    kind: type[InPlace], stays: int
) -> None:
    graph = ExportGraph(kind().eval(), DESCRIPTION)
    x = torch.randn(1, 3, 34, 35)
    with torch.no_grad():
        wanted = graph(x.clone())
        program = exported_program(graph, DESCRIPTION)
        write_elsewhere(program)
        found = program.module()(x.clone())
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert sum("_." in str(node.target) for node in program.graph.nodes) == stays
