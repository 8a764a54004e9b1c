"""A broken input or checkpoint shows: what the plain modules make NaN or infinite stays so."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.testing import torchvision_deeplabv3

NAN, INF = float("nan"), float("inf")
BUILDERS: dict[str, Callable[[], dlf.DeepLabV3]] = {
    "resnet50": lambda: dlf.deeplabv3_resnet50(num_classes=5, aux_loss=True),
    "mobilenet_v3_large": lambda: dlf.deeplabv3_mobilenet_v3_large(num_classes=5, aux_loss=True),
    "resnet18": lambda: dlf.deeplabv3_resnet18(num_classes=5, aspp_channels=32, head="mmseg"),
    "mobilenetv2": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=5, width=0.25, atrous_rates=(2,), aspp_channels=24
    ),
    "camvid": lambda: dlf.load("camvid"),
}


@functools.cache
def built(name: str) -> dlf.DeepLabV3:
    torch.manual_seed(3)
    return BUILDERS[name]().eval()


@functools.cache
def other(name: str) -> nn.Module:
    """The same by torchvision; of models that it lacks the plain modules of the package."""
    if name in ("resnet50", "mobilenet_v3_large"):
        model: nn.Module = torchvision_deeplabv3(name, 5, aux_loss=True).eval()
        model.load_state_dict(built(name).state_dict())
        return model
    plain = copy.deepcopy(built(name))
    plain.fast = False
    return plain


def image() -> Tensor:
    return torch.rand(2, 3, 49, 33, generator=torch.Generator().manual_seed(1))


def convolutions(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def middle(names: list[str]) -> str:
    names = [n for n in names if n.startswith("backbone")]
    return names[len(names) // 2]


def in_aspp(names: list[str], branch: str) -> str:
    return next(n for n in names if n.startswith("classifier") and f"convs.{branch}." in n)


def last_of(names: list[str]) -> str:
    return [n for n in names if n.startswith("classifier")][-1]


# What is broken: (the parameter or buffer, by the names of convolutions and norms; its new value)
FAULTS: dict[str, Callable[[nn.Module], tuple[str, float]]] = {
    "weight of the stem": lambda m: (convolutions(m)[0] + ".weight", NAN),
    "infinite weight of the stem": lambda m: (convolutions(m)[0] + ".weight", INF),
    "weight in the middle": lambda m: (middle(convolutions(m)) + ".weight", NAN),
    "weight of a branch": lambda m: (in_aspp(convolutions(m), "1") + ".weight", NAN),
    "weight of the classifier": lambda m: (last_of(convolutions(m)) + ".weight", NAN),
    "bias of the classifier": lambda m: (last_of(convolutions(m)) + ".bias", NAN),
    "infinite gamma in the middle": lambda m: (middle(norms(m)) + ".weight", INF),
    "beta in the middle": lambda m: (middle(norms(m)) + ".bias", NAN),
    "running_mean of the stem": lambda m: (norms(m)[0] + ".running_mean", NAN),
    "negative running_var of the stem": lambda m: (norms(m)[0] + ".running_var", -1.0),
    "negative running_var in the middle": lambda m: (middle(norms(m)) + ".running_var", -1.0),
    "negative running_var of a branch": lambda m: (in_aspp(norms(m), "1") + ".running_var", -1.0),
    "running_var of the last norm": lambda m: (last_of(norms(m)) + ".running_var", NAN),
}
PIXELS = {"nan pixel": NAN, "infinite pixel": INF, "pixel of minus infinity": -INF}
# The networks that take long: what breaks each kind of layer is tried on the others.
LARGE = ("resnet50", "mobilenet_v3_large", "camvid")
FEW = ("nan pixel", "weight of the stem", "weight of a branch", "negative running_var of the stem")


def every_fault(*names: str) -> pytest.MarkDecorator:
    cases = [(n, f) for n in names for f in (FEW if n in LARGE else [*PIXELS, *FAULTS])]
    return pytest.mark.parametrize(("name", "fault"), cases)


def broken(model: nn.Module, fault: str) -> tuple[nn.Module, Tensor]:
    """A copy of the model, and an input."""
    model, x = copy.deepcopy(model), image()
    if fault in PIXELS:
        x[0, 1, 20, 25] = PIXELS[fault]
    else:
        name, value = FAULTS[fault](model)
        tensor = model.state_dict()[name]
        # The middle tap, because what others make of padding depends on PyTorch's algorithm.
        (
            tensor[0, 0].view(-1)[tensor[0, 0].numel() // 2] if tensor.dim() == 4 else tensor[0]
        ).fill_(value)
    return model, x


def assert_shows(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found[expected.isnan()].isnan().all()
    assert not found[~expected.isfinite()].isfinite().any()


@every_fault(*BUILDERS)
def test_evaluation(name: str, fault: str) -> None:
    plain, x = broken(other(name), fault)
    model, _ = broken(built(name), fault)
    with torch.inference_mode():
        expected = plain(x)
        nan = expected["out"].isnan().any(1)
        # ReLU6 makes 6 of infinity.
        assert nan.any() or (name == "mobilenetv2" and "infinit" in fault)
        assert not model.fast_reasons(x)
        optimized = dlf.optimize(model)
        for got in (model(x), optimized(x)):
            for key in got:
                assert_shows(got[key], expected[key])
            # The other image is as it was.
            assert got["out"][1].isfinite().all() == expected["out"][1].isfinite().all()
        assert torch.equal(model.predict(x)[nan].long(), expected["out"].argmax(1)[nan])


@every_fault("resnet18", "mobilenet_v3_large", "mobilenetv2")
def test_training(name: str, fault: str) -> None:
    results = []
    for fused in (False, True):
        model, x = broken(built(name), fault)
        dlf.fuse(model.train(), fused)
        if "running" in fault:
            freeze_batch_norm(model)
        for m in model.modules():
            if isinstance(m, (nn.Dropout, nn.Dropout2d)):
                m.p = 0.0
        out = model(x)["out"]
        loss = F.cross_entropy(out, torch.ones(2, 49, 33, dtype=torch.long))
        loss.backward()
        values = {"out": out.detach(), "loss": loss.detach()}
        values |= {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        values |= {k: b for k, b in model.named_buffers() if b.is_floating_point()}
        results.append(values)
    plain, fused_values = results
    assert plain.keys() == fused_values.keys()
    for key, expected in plain.items():
        found = fused_values[key]
        if expected.dim() == 4 and key.startswith("grad"):
            # PyTorch's gradient to a depthwise filter multiplies padding in NCHW only: filters are
            # compared, not taps.
            expected, found = (g.flatten(1).sum(1) for g in (expected, found))
        assert_shows(found, expected)
    assert fused_values["loss"].isnan()
