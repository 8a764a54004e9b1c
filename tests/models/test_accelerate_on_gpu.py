"""Accelerated models by the inference program of a GPU, on CPU tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import other_models
import pytest
import torch
from stand_in_capture import StandInCapture

import deeplab_fast as dlf
from deeplab_fast import testing
from deeplab_fast.dispatch.errors import norm_error
from deeplab_fast.program import capture, gpu_layers, layers

# Of a rounding of what is stored.
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInCapture]:
    """Calls on CPU tensors are a GPU's, and graphs are made without one."""
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda x: True)
    with capture.using(StandInCapture()) as stand_in:
        yield stand_in


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchvision deeplabv3_mobilenet_v3_large aux", id="one region, two results"),
        pytest.param("smp v3plus resnet18", id="regions that give and take lists of maps"),
        pytest.param("mmseg v3 r18 mg", id="pooled map first, a 3x3 projection"),
        pytest.param("transformers mobilenet_v2 torch padding", id="pooled map first, 1x1"),
    ],
)
def test_results_are_those_of_the_plain_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = other_models.CASES[name]
    testing.import_torchvision()
    if case.requires:
        pytest.importorskip(case.requires)
    ran = []
    maps = layers.Program.maps
    monkeypatch.setattr(layers.Program, "maps", lambda *args: ran.append(args[0]) or maps(*args))
    model = case.model()
    x = case.map(2)
    with torch.inference_mode():
        plain = other_models.tensors(case.call(copy.deepcopy(model), x))
        dlf.accelerate(model)
        # A shape that repeats is captured.
        for _ in range(3):
            found = other_models.tensors(case.call(model, x))
    assert ran
    assert found.keys() == plain.keys()
    convs = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    for key, value in plain.items():
        assert norm_error(found[key], value) <= 2e-6 * convs**0.5
        assert found[key].stride() == value.stride()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        # A small model's: PyTorch's convolutions in bf16 are slow on a CPU that has none itself.
        (torch.bfloat16, "vainf v3 mobilenet os16"),
        (torch.float16, "torchvision deeplabv3_mobilenet_v3_large aux"),
    ],
)
def test_half_precision_is_as_close_as_the_plain_model(dtype: torch.dtype, name: str) -> None:
    case = other_models.CASES[name]
    model = case.model()
    x = case.map(1)
    exact = _output(model.double(), x.double())
    model = case.model().to(dtype)
    plain = _output(copy.deepcopy(model), x.to(dtype))
    found = _output(dlf.accelerate(model), x.to(dtype))
    assert found.dtype == dtype
    # Twice PyTorch's own error and a rounding (CONTRIBUTING.md).
    assert norm_error(found, exact) <= 2 * norm_error(plain, exact) + EPS[dtype]


def _output(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return other_models.logits(model(x))
