"""A training step as CUDA graphs on a GPU: the numbers of one without.

Some kernels of PyTorch's backward pass (bilinear interpolation, max pooling) add in an order of
their own each time. So what two trainings without graphs are apart is measured, and one with graphs
may be four times that from the first: both are differences of the same kind, as norms over millions
of values. Where the two are equal it must be equal too.
"""

from __future__ import annotations

import pytest
import torch
from gpu_harness import DEVICE
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast.engine.captured import WARM_UP, CapturedStep
from deeplab_fast.engine.losses import LossKind, SegmentationLoss

STEPS = WARM_UP + 4


def trained(captured: bool, fused: bool, kind: LossKind, accumulate: int) -> list[Tensor]:
    """Losses of all parts, then weights, statistics and counters."""
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet18(num_classes=5, fused=fused).to(DEVICE)
    model.to(memory_format=torch.channels_last).train()
    loss = SegmentationLoss(kind=kind)

    def losses(x: Tensor, target: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return {"loss": loss(model.forward_logits(x), target)}

    step = CapturedStep(model, losses, torch.device("cuda", torch.cuda.current_device()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for i in range(STEPS * accumulate):
        # A seed a batch, as in training: dropout has masks of its own in each.
        torch.manual_seed(i)
        x = torch.randn(2, 3, 129, 129, device=DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 5, (2, 129, 129), device=DEVICE)
        if captured:
            value = step.losses(x, target)["loss"]
            step.backward(value / accumulate)
        else:
            value = losses(x, target)["loss"]
            (value / accumulate).backward()
        found.append(value.detach())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert bool(step.held_bytes) == captured
    return [*found, *model.state_dict().values()]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative 2-norm of the difference of two tensors; counters are equal."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point():
            worst = max(worst, float((x - y).norm() / y.norm().clamp_min(1e-12)))
        else:
            assert torch.equal(x, y)
    return worst


@pytest.mark.parametrize(
    ("fused", "kind", "accumulate"),
    [
        pytest.param(True, "cross_entropy", 1, id="fused"),
        pytest.param(True, "cross_entropy", 2, id="gradients-of-two-parts"),
        pytest.param(False, "cross_entropy", 1, id="plain-modules"),
        pytest.param(True, "hard_pixels", 1, id="topk"),
        pytest.param(True, "focal", 1, id="focal"),
        pytest.param(True, "cross_entropy+dice", 1, id="dice"),
    ],
)
def test_captured_steps_are_those_without(fused: bool, kind: LossKind, accumulate: int) -> None:
    first, second, found = (
        trained(captured, fused, kind, accumulate) for captured in (False, False, True)
    )
    assert apart(found, first) <= 4 * apart(second, first)
