"""Whole models by the Triton kernels, through the inference program of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fast_models import FAMILIES, error, narrow, plain
from stand_in_capture import StandInCapture

import deeplab_fast as dlf
from deeplab_fast.dispatch import choice
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.program import capture, gpu_layers


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda x: True)
    with capture.using(StandInCapture()):
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ops that this package's kernels were chosen for."""
    ops: set[str] = set()
    original = choice.select

    def select(desc: dlf.backends.OpDesc) -> object:
        found = original(desc)
        if found.backend == "triton":
            ops.add(desc.op)
        return found

    monkeypatch.setattr("deeplab_fast.ops.folded_conv.select", select)
    return ops


# Of every family, and what its 1x1 convolutions and passes are.
MODELS = {
    # With ReLU, residuals behind them; passes behind dilated 3x3 convolutions.
    "resnet50": lambda: dlf.deeplabv3_resnet50(num_classes=5),
    # Without ReLU; passes with ReLU6; SAME padding; one atrous branch.
    "mobilenetv2": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=5, atrous_rates=(2,), output_stride=16
    ),
    # Hardswish, squeeze and excitation.
    "mobilenetv3": FAMILIES["mobilenetv3-os8"],
    "efficientnet-lite": FAMILIES["efficientnet-lite"],
    "fregu856": FAMILIES["fregu856"],
    # A projection with a 3x3 kernel, which no kernel has.
    "mmseg": FAMILIES["mmseg"],
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("mobilenetv2", torch.float16)],
    ids=str,
)
def test_models_by_our_kernels(name: str, dtype: torch.dtype, ran: set[str]) -> None:
    model = narrow(MODELS[name])
    x = torch.randn(2, 3, 9, 17)
    expected = plain(model, x)["out"]
    model, x = model.to(dtype), x.to(dtype)
    own = plain(model, x)["out"]
    with torch.inference_mode(), dlf.use_backend("triton"):
        y = model.forward_logits(x)
    low = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=model.align_corners)
    project = set() if name == "mmseg" else {"aspp_project"}
    assert ran == {"aspp_branches", "bn_act", "conv_bn_act", "fold_filters"} | project
    # Twice the plain modules' error in the dtype, and a rounding.
    bound = SAVING if dtype == torch.float32 else 2 * error(own, expected) + 2.0**-10
    assert error(low, expected) <= bound
