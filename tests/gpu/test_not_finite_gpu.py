"""A NaN or an infinity in, as many out as PyTorch's operations give, by every backend on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gpu_harness import DEVICE, use_backend
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.engine.batch_norm import freeze_batch_norm

DTYPES = [torch.float32, torch.bfloat16]
DILATIONS = [1, 2]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def arguments(op: str, dtype: torch.dtype) -> tuple[list, dict]:
    """Positional arguments, the broken map first, and options."""
    x = normal(2, 64, 9, 11).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors = [normal(32).abs() + 0.5, normal(32)]
    if op == "aspp_branches":
        weights = [normal(32, 64, size, size).to(dtype) / 24 for size in (1, 3)]
        return [x, weights, [vectors[0]] * 2, [vectors[1]] * 2, DILATIONS], {}
    if op == "aspp_project":
        return [x, normal(2, 32).to(dtype), normal(32, 96, 1, 1).to(dtype) / 8, *vectors], {}
    if op == "conv_bn_act 1x1":
        return [x, normal(32, 64, 1, 1).to(dtype) / 8, *vectors], {}
    if op == "conv_bn_act 3x3":
        return [x, normal(32, 64, 3, 3).to(dtype) / 24, *vectors], {"padding": 2, "dilation": 2}
    return [x, normal(64), normal(64).abs() + 0.5, normal(64), normal(64)], {}


def assert_shows(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found[expected.isnan()].isnan().all()
    assert not found[~expected.isfinite()].isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    "op", ["aspp_branches", "aspp_project", "conv_bn_act 1x1", "conv_bn_act 3x3", "bn_act"]
)
def test_a_pixel(op: str, backend: str, dtype: torch.dtype, value: float) -> None:
    torch.manual_seed(0)
    args, options = arguments(op, dtype)
    args[0][1, 5, 4, 6] = value
    name = op.split()[0]
    with use_backend(backend, optional=("triton", "cuda")):
        found = getattr(ops, name)(*args, **options)
    expected = getattr(reference, name)(*args, **options)
    assert not expected[1].isfinite().all() or value < 0
    assert_shows(found, expected)
    assert found[0].isfinite().all()


FAULTS: dict[str, Callable[[torch.nn.Module, Tensor], None]] = {
    "pixel": lambda m, x: x[0, 1, 20, 25].fill_(float("nan")),
    "weight of the stem": lambda m, x: m.backbone.conv1.weight[0, 0, 3, 3].fill_(float("nan")),
    "negative running_var": lambda m, x: m.backbone.bn1.running_var[0].fill_(-1.0),
    "weight of a branch": lambda m, x: (
        m.classifier[0].convs[1][0].weight[0, 0, 1, 1].fill_(float("nan"))
    ),
}


@pytest.mark.parametrize("form", ["evaluation", "prediction", "training"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model(fault: str, form: str) -> None:
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet18(num_classes=5).to(DEVICE).eval()
    x = torch.rand(2, 3, 49, 33, device=DEVICE)
    with torch.no_grad():
        FAULTS[fault](model, x)
    if form == "training":
        freeze_batch_norm(model.train())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    plain = copy.deepcopy(model)
    plain.fast = plain.fused = False
    with torch.set_grad_enabled(form == "training"):
        expected = plain(x)["out"].detach()
        assert expected.isnan().any()
        if form == "prediction":
            nan = expected.isnan().any(1)
            assert torch.equal(model.predict(x)[nan].long(), expected.argmax(1)[nan])
            return
        assert_shows(model(x)["out"].detach(), expected)
