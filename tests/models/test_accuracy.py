"""How far the fast path is from float64, beside PyTorch, on networks that amplify roundings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf


def badly_conditioned(seed: int) -> Any:
    """Filters of very different sizes, as after a long training; statistics of data."""
    torch.manual_seed(seed)
    model = dlf.deeplabv3_resnet50(num_classes=21).train()
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
def test_logits_are_within_twice_pytorchs_error() -> None:
    """The geometric mean of the ratio over networks, one of which is chance: with roundings in
    another order PyTorch's own varies by as much. Coarse tiles everywhere gave 4 here."""
    ratios, coarse = [], []
    for seed in (0, 1):
        model = badly_conditioned(seed)
        x = torch.randn(1, 3, 129, 129) + 1
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())["out"]
            fast = model(x)["out"]
            assert model.fast_reasons(x) == []
            model.fast = False
            plain = model(x)["out"]
        ratios.append(error(fast, exact) / error(plain, exact))
        coarse += [r for r in dlf.optimize(model).layers((129, 129)) if "tile6" in str(r)]
    assert math.prod(ratios) ** (1 / len(ratios)) <= 2
    # Where it stands the head follows alone.
    assert all(".classifier" in str(r) or "classifier." in str(r) for r in coarse)
