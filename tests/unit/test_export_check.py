"""What `deeplab_fast.export` takes for the same result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast.exporting import Description, ExportError
from deeplab_fast.exporting.check import check
from deeplab_fast.exporting.graph import ExportGraph

# Of logits in fp32.
BOUND = 1e-5 * 24**0.5
# Twice the size: weights are quarters, and of sixteenths of levels one in 16 is a half.
OWN = Description(
    labels=False,
    photos=True,
    num_classes=5,
    classes=None,
    palette=None,
    channels="RGB",
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    resize=132,
    batch=1,
    size=(66, 98),
    multiple=1,
    smallest=1,
    precision="fp32",
    model="a model",
    version="0",
)


class Other(ExportGraph):
    """A graph in a runtime whose levels are off."""

    runtime = "other"

    def __init__(self, model: torch.nn.Module, description: Description, off: float) -> None:
        super().__init__(model, description)
        self.description, self.off, self.name = description, off, "file"

    def levels(self, photos: Tensor) -> Tensor:
        return super().levels(photos) + self.off


@pytest.fixture(scope="module")
def model() -> dlf.DeepLabV3:
    torch.manual_seed(0)
    return dlf.deeplabv3_resnet18(num_classes=5, head="paper", aspp_channels=16).eval()


def found(model: torch.nn.Module, off: float, **changes: object):
    description = replace(OWN, **changes)
    with torch.no_grad():
        return check(Other(model, description, off), ExportGraph(model, description), None, BOUND)


def test_levels_of_a_half_round_either_way(model):
    # PyTorch rounds to the even one, the other all up, or down.
    for off in (1e-3, -1e-3):
        result = found(model, off)
        assert result.error is not None and result.error > BOUND
        assert found(model, off, labels=True).same > 0.99


def test_other_levels_are_another_result(model):
    with pytest.raises(ExportError, match="its logits are off by"):
        found(model, 0.3)
    # Without resizing nothing is rounded.
    with pytest.raises(ExportError, match="its logits are off by"):
        found(model, 0.3, resize=None)
    with pytest.raises(ExportError, match="of the labels are others"):
        found(model, 60.0, labels=True)
