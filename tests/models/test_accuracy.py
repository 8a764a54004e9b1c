"""How far the fast path is from float64, beside PyTorch, on networks that amplify roundings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf


def badly_conditioned(network: str, seed: int) -> Any:
    """Filters of very different sizes, as after a long training; statistics of data."""
    torch.manual_seed(seed)
    model = dlf.get_model(network, num_classes=21).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(torch.exp(torch.randn_like(module.weight)))
                module.bias.normal_()
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(2, 3, 129, 129) + 1)
    return model.eval()


def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "size"),
    [
        ("deeplabv3_resnet50", (129, 129)),  # coarse tiles everywhere gave 4
        ("deeplabv3_mobilenet_v3_large", (257, 513)),  # means of many pixels in one sum gave 5.7
    ],
)
def test_logits_are_within_twice_pytorchs_error(network: str, size: tuple[int, int]) -> None:
    """The geometric mean of the ratio over networks, one of which is chance: with roundings in
    another order PyTorch's own varies by as much."""
    ratios = []
    for seed in (0, 1):
        model = badly_conditioned(network, seed)
        x = torch.randn(1, 3, *size) + 1
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())["out"]
            fast = model(x)["out"]
            assert model.fast_reasons(x) == []
            model.fast = False
            plain = model(x)["out"]
        ratios.append(error(fast, exact) / error(plain, exact))
    assert math.prod(ratios) ** (1 / len(ratios)) <= 2


def test_coarse_tiles_stand_where_few_layers_follow() -> None:
    layers = dlf.optimize(dlf.deeplabv3_resnet50(num_classes=21).eval()).layers((513, 513))
    assert [r.name for r in layers if "tile6" in r.form] == ["classifier.0.convs"]
