"""What a training step by the fused forms asks of the host: a small step waits for nothing else.

Counts, not times; tests/helpers/host_cost.py prints both.
"""

from __future__ import annotations

import copy

import pytest
import torch
from host_cost import events, resnet50_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deeplab_fast as dlf
from deeplab_fast import _ext
from deeplab_fast.models.mobilenetv2 import SamePadConv2d
from deeplab_fast.program import training

needs_extension = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)


@needs_extension
def test_events_of_a_step() -> None:
    """Of a ResNet-50's step, where small ops between the passes would show first."""
    plain, fused = (events(resnet50_step(is_fused)) for is_fused in (False, True))
    assert fused.total() <= 1.3 * plain.total(), fused.most_common(40)
    # One function of autograd for each convolution with its norm, and one call of a kernel for each
    # pass: what normalises is the part of the segment that reads the result.
    assert fused["_Segment"] <= plain["aten::batch_norm"]
    assert fused["deeplab_fast::_batch_stats_cpu"] <= plain["aten::batch_norm"]
    # A choice is made within a segment: no op of ours is looked up by the dispatcher, but for the
    # two of the ASPP.
    public = [n for n in fused if n.startswith("deeplab_fast::") and not n.endswith("_cpu")]
    assert sum(fused[name] for name in public) <= 2, public


class Counting(TorchDispatchMode):
    """Names of what the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@needs_extension
@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
def test_calls_of_a_segment(momentum: float | None) -> None:
    """Convolution, statistics with the running update, and one pass: nothing in between."""
    modules = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU()
    )
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    training.run(modules, x)
    with Counting() as forward:
        y = training.run(modules, x)
    kernels = ["deeplab_fast::_batch_stats_cpu", "deeplab_fast::_bn_act_cpu"]
    assert [n for n in forward.names if n.startswith("deeplab_fast::")] == kernels
    rest = [n for n in forward.names if n not in kernels]
    # F.conv2d, and autograd's alias of what is not differentiable.
    assert set(rest) <= {"aten::convolution", "aten::detach", "aten::clone"}, rest
    with Counting() as backward:
        y.sum().backward()
    ours = [n for n in backward.names if n.startswith("deeplab_fast::")]
    assert ours == [
        "deeplab_fast::_bn_act_reduce_cpu",
        "deeplab_fast::_bn_act_backward_cpu",
        "deeplab_fast::_conv_weight_gradient_cpu",
    ]


@needs_extension
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "is_unit"),
    [
        pytest.param(3, 1, 1, True, id="3x3"),
        pytest.param(5, 1, 2, True, id="5x5 dilated"),
        pytest.param((3, 5), 1, (2, 1), True, id="rows unlike columns"),
        pytest.param(4, 1, 2, True, id="an even kernel, padded evenly by its dilation"),
        pytest.param(4, 1, 1, False, id="an even kernel: one more at the bottom"),
        pytest.param(3, 2, 1, False, id="a stride: by the size"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_same_padding_that_is_known_is_part_of_a_segment(
    kernel, stride, dilation, is_unit, bias
) -> None:
    """With the kernels of depthwise gradients; what is not known runs as a module."""
    conv = SamePadConv2d(6, 6, kernel, stride, groups=6, bias=bias, dilation=dilation)
    modules = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), conv)
    modules.append(nn.BatchNorm2d(6))
    y = training.run(modules, torch.randn(2, 4, 9, 10))
    with Counting() as backward:
        y.sum().backward()
    assert backward.names.count("deeplab_fast::_depthwise_gradients_cpu") == int(is_unit)
    # float64 leaves about 1e-16 for each operation.
    plain, fused = copy.deepcopy(modules).double(), modules.double()
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    results = [plain(x), training.run(fused, x)]
    grad = torch.randn_like(results[0])
    gradients = [
        torch.autograd.grad(result, model.parameters(), grad)
        for result, model in zip(results, (plain, fused), strict=True)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_choices_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deeplab_fast.dispatch import choice

    asked: list[str] = []
    select = choice.select
    monkeypatch.setattr(choice, "select", lambda desc: asked.append(desc.op) or select(desc))
    modules = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())

    def step(x: Tensor) -> None:
        training.run(modules, x).sum().backward()

    x = torch.randn(2, 4, 8, 8)
    step(x)
    first = len(asked)
    step(x)
    assert len(asked) == first
    with dlf.use_backend("reference"):
        step(x)
    assert len(asked) > first
    second = len(asked)
    step(torch.randn(2, 4, 9, 8))
    assert len(asked) > second
