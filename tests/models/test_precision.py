"""The choice of a precision: names, refusals, which one holds for a call, what is held for it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fast_models import FAMILIES, quick, trained

import deeplab_fast as dlf
from deeplab_fast.dispatch import limits
from deeplab_fast.dispatch.precision import Precision
from deeplab_fast.program import fast_path, frozen
from deeplab_fast.program.cpu_layers import CpuForms

SHAPE = (1, 3, 40, 56)
NO_BF16 = "this CPU has neither"


@pytest.fixture
def model() -> Any:
    return trained(quick(FAMILIES["resnet18"]))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """A CPU with bf16 instructions; what programs are made for, all of them of fp32."""
    found: list[Precision] = []

    def forms_of(precision: Precision, calibration: object, portable: bool = False) -> CpuForms:
        found.append(precision)
        return CpuForms()

    monkeypatch.setattr(limits, "cpu_bf16", lambda: "")
    for module in (fast_path, frozen):
        monkeypatch.setattr(module, "forms_of", forms_of)
    return found


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_bf16", lambda: NO_BF16)


def test_a_name_that_there_is_not_is_refused(model: Any) -> None:
    x = torch.randn(SHAPE)
    for call in (
        lambda: setattr(model, "precision", "fp16"),
        lambda: dlf.optimize(model, precision="fp16"),
        lambda: model.predict(x, precision="fp16"),
    ):
        with pytest.raises(ValueError, match=r"precision is 'fp16', expected one of fp32, bf16"):
            call()
    assert model.precision == "fp32"


def test_a_cpu_without_bf16_refuses_it(model: Any, without_bf16: None) -> None:
    x = torch.randn(SHAPE)
    for call in (
        lambda: setattr(model, "precision", "bf16"),
        lambda: dlf.optimize(model, precision="bf16"),
        lambda: model.predict(x, precision="bf16"),
    ):
        with pytest.raises(ValueError, match=f"precision bf16: {NO_BF16}.*; use fp32"):
            call()
    # A model that was set elsewhere.
    model._precision = "bf16"
    with torch.no_grad(), pytest.raises(ValueError, match=NO_BF16):
        model(x)


def test_int8_wants_a_calibration(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_int8", lambda: "")
    for call in (
        lambda: setattr(model, "precision", "int8"),
        lambda: dlf.optimize(model, precision="int8"),
        lambda: model.predict(torch.randn(SHAPE), precision="int8"),
    ):
        with pytest.raises(ValueError, match=r"precision int8: .* call model.calibrate\(images\)"):
            call()


def test_the_model_says_the_precision_of_its_calls(model: Any, asked: list[Precision]) -> None:
    x = torch.randn(SHAPE)
    model.precision = "bf16"
    with torch.no_grad():
        model(x)
        assert model.fast_reasons(x) == []
    model.predict(x)
    assert asked == [Precision("bf16")]
    model.predict(x, precision="fp32")
    assert asked[1:] == [Precision("fp32")]
    assert dlf.optimize(model).precision == "bf16"
    assert dlf.optimize(model, precision="fp32").precision == "fp32"


def test_setting_another_precision_frees_what_was_prepared(
    model: Any, asked: list[Precision]
) -> None:
    model.predict(torch.randn(SHAPE))
    assert model.prepared_bytes > 0
    model.precision = "fp32"
    assert model.prepared_bytes > 0
    model.precision = "bf16"
    assert model.prepared_bytes == model.activation_bytes == 0


def test_calls_in_two_precisions_prepare_each_once(model: Any, asked: list[Precision]) -> None:
    x = torch.randn(SHAPE)
    for _ in range(3):
        model.predict(x)
        model.predict(x, precision="bf16")
    assert asked == [Precision("fp32"), Precision("bf16")]
    # A change of the weights makes both stale, and leaves no old one behind.
    held = model.prepared_bytes
    with torch.no_grad():
        model.backbone.conv1.weight.mul_(2)
    model.predict(x)
    assert asked[2:] == [Precision("fp32")]
    assert model.prepared_bytes < held


def test_autocast_to_bf16_takes_the_fast_path_in_bf16(model: Any, asked: list[Precision]) -> None:
    x = torch.randn(SHAPE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.fast_reasons(x) == []
        model(x)
        model(x.bfloat16())
    model.predict(x, dtype="bf16")
    assert asked == [Precision("bf16", torch.bfloat16)]


def test_other_autocast_runs_the_plain_modules(model: Any, without_bf16: None) -> None:
    x = torch.randn(SHAPE)
    for dtype, reason in (
        (torch.float16, "autocast to float16 is on"),
        (torch.bfloat16, f"autocast to bfloat16 is on and {NO_BF16}"),
    ):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert model.fast_reasons(x) == [reason]


def test_a_precision_and_a_dtype_are_too_much(model: Any, asked: list[Precision]) -> None:
    with pytest.raises(ValueError, match="both asked for"):
        model.predict(torch.randn(SHAPE), dtype="bf16", precision="bf16")


def test_models_without_a_choice_say_so(model: Any, asked: list[Precision]) -> None:
    x = torch.randn(SHAPE)
    optimised = dlf.optimize(model)
    assert optimised.predict(x, precision="fp32").shape == (1, *SHAPE[2:])
    with pytest.raises(ValueError, match="computes in fp32; leave it out"):
        optimised.predict(x, precision="bf16")


def test_copies_and_pickles_keep_the_precision(model: Any, asked: list[Precision]) -> None:
    model.precision = "bf16"
    assert copy.deepcopy(model).precision == "bf16"
    assert pickle.loads(pickle.dumps(model)).precision == "bf16"


def test_training_is_not_touched(model: Any, asked: list[Precision]) -> None:
    model.precision = "bf16"
    model.train()
    out = model(torch.randn(2, 3, 40, 56))["out"]
    assert out.dtype == torch.float32
    assert asked == []


def test_what_was_asked_for_by_name_is_not_silently_another(
    model: Any, asked: list[Precision]
) -> None:
    x = torch.randn(SHAPE)
    model.fast = False
    with pytest.raises(ValueError, match=r"precision bf16 was asked for .* model.fast is False"):
        model.predict(x, precision="bf16")
    model.predict(x, precision="fp32")
    model.fast = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.predict(x, precision="fp32")
        model.predict(x)
    assert asked == [Precision("fp32"), Precision("bf16", torch.bfloat16)]


def test_a_calibration_that_comes_while_weights_are_prepared_is_not_taken_for_theirs(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []

    def forms_of(precision: Precision, calibration: object) -> CpuForms:
        used.append(calibration)
        model.calibration = second
        return CpuForms()

    first, second = object(), object()
    model.calibration = first
    monkeypatch.setattr(fast_path, "forms_of", forms_of)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert used == [first, second]


def test_a_calibration_of_another_kind_is_refused(model: Any) -> None:
    model.calibration = {"ranges": {}}
    model.precision = "int8"
    x = torch.randn(SHAPE)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"model\.calibration is a dict"):
            model(x)
        assert "model.calibration is a dict" in model.fast_reasons(x)[0]
