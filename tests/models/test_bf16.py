"""Programs in bf16 on the CPU, by the kernels that run on any: whole models of every family."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fast_models import FAMILIES, X, error, narrow, plain, quick
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.dispatch import limits
from deeplab_fast.program import inference
from deeplab_fast.program.activations import Activations
from deeplab_fast.program.bf16_layers import Bf16Forms
from deeplab_fast.program.layers import AtenLayer

# Of one rounding to bf16, relative.
EPS = 2.0**-9
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _bf16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_bf16", lambda: "")


def in_bf16(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.precision = "bf16"
    try:
        with torch.no_grad():
            assert model.fast_reasons(x) == []
            return model(x)
    finally:
        model.precision = "fp32"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_within_twice_pytorchs_error(family: str) -> None:
    """Beside the plain modules in bf16, and a rounding, as CONTRIBUTING.md has it."""
    # The sums of its head have as many channels as there are classes, which `narrow` divides.
    model = (quick if family == "deeplabv2" else narrow)(FAMILIES[family])
    exact = plain(model, X)
    theirs = plain(copy.deepcopy(model).to(BF16), X.to(BF16))
    ours = in_bf16(model, X)
    assert list(ours) == list(exact)
    for name, y in ours.items():
        assert y.dtype == torch.float32
        assert error(y, exact[name]) <= 2 * error(theirs[name], exact[name]) + EPS


def test_maps_are_bf16_and_logits_of_the_dtype_asked_for() -> None:
    model = narrow(FAMILIES["resnet18"])
    for dtype in (torch.float32, BF16):
        program, _ = inference.fold(model, Bf16Forms(dtype))
        assert program is not None
        seen: list[torch.dtype] = []

        def run(layer: Any, *tensors: Tensor, seen: list[torch.dtype] = seen, **options: Tensor):
            y = layer(*tensors, **options)
            # Modules without weights give the dtype that they are given.
            assert y.dtype == (BF16 if isinstance(layer, AtenLayer) else layer.result_dtype)
            seen.append(y.dtype)
            return y

        with torch.no_grad():
            logits = program.maps(X.contiguous(memory_format=torch.channels_last), run)
            assert [y.dtype for y in logits.values()] == [dtype] * 2
            # In memory that is planned beforehand, to the bit.
            planned = Activations(program).logits(X, True)
        assert seen.count(BF16) >= len(seen) - 3
        for name, y in logits.items():
            assert torch.equal(planned[name], y)


def test_autocast_gives_logits_in_bf16() -> None:
    model = narrow(FAMILIES["resnet18"])
    exact = plain(model, X)["out"]
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert model.fast_reasons(X) == []
        y = model(X)["out"]
    assert y.dtype == BF16
    program, _ = inference.fold(model, Bf16Forms())
    assert program is not None
    assert error(y, exact) <= 2 * error(in_bf16(model, X)["out"], exact) + 2 * EPS


class Odd(nn.Module):
    """No rule knows it."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x * 1.5


@pytest.mark.parametrize("place", ["before a head", "behind it"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_modules_that_no_rule_knows_run_in_fp32(place: str, dtype: torch.dtype) -> None:
    model = narrow(FAMILIES["resnet18"])
    without = error(in_bf16(model, X)["out"], plain(model, X)["out"])
    parts = [Odd(), model.classifier] if place == "before a head" else [model.classifier, Odd()]
    model.classifier = nn.Sequential(*parts)
    program, _ = inference.fold(model, Bf16Forms(dtype))
    in_fp32, _ = inference.fold(model)
    assert program is not None and in_fp32 is not None
    with torch.no_grad():
        y, exact = program.logits(X)["out"], in_fp32.logits(X)["out"]
    assert y.dtype == dtype
    # A factor rounds nothing, and leaves the error as it was; so do conversions of a map.
    assert error(y, exact) <= 1.5 * without + EPS


def test_what_is_not_finite_shows() -> None:
    model = narrow(FAMILIES["mobilenetv3"])
    x = X.clone()
    x[0, 1, 20, 11] = float("nan")
    exact, y = plain(model, x)["out"], in_bf16(model, x)["out"]
    assert exact.isnan().any() and y[exact.isnan()].isnan().all()


def test_other_weights_are_seen() -> None:
    model = narrow(FAMILIES["efficientnet-lite"])
    before = in_bf16(model, X)["out"]
    with torch.no_grad():
        model.classifier[-1].bias += 3
    assert (in_bf16(model, X)["out"] - before - 3).abs().max() < 0.05


def test_labels_of_photos(shared_data: Any) -> None:
    """99.75 % were equal over the whole of CamVid's validation photos."""
    model = dlf.load("camvid")
    photos = open_dataset("camvid", shared_data / "camvid", "val")
    equal = []
    for index in (0, 60):
        photo = photos[index][0]
        labels = np.asarray(model.predict(photo))
        equal.append((np.asarray(model.predict(photo, precision="bf16")) == labels).mean())
    assert np.mean(equal) >= 0.995
