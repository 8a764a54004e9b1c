"""The host side of the Triton upsampling kernels, where no kernel runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from deeplab_fast.kernels import upsample

from deeplab_fast.backends import OpDesc
from deeplab_fast.dispatch import limits

FP32 = OpDesc("upsample_argmax", "cuda", torch.float32, (2, 21, 9, 9), {}, (9, 0))


def desc(**changes) -> OpDesc:
    return OpDesc(**{**FP32.__dict__, **changes})


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "changes,expected",
    [
        pytest.param({}, "", id="cuda-fp32-runs"),
        pytest.param({"dtype": torch.bfloat16}, "", id="cuda-bf16-runs"),
        pytest.param({"dtype": torch.float16, "capability": (8, 0)}, "", id="sm80-fp16-runs"),
        pytest.param({"device": "cpu", "capability": None}, "is on cpu", id="cpu-tensor"),
        pytest.param({"dtype": torch.float64}, "accumulates in float32", id="float64"),
        pytest.param({"capability": (7, 5)}, "the device has 7.5", id="old-gpu"),
        pytest.param(
            {"op": "upsample_softmax_add", "params": {"accumulator_dtype": torch.float64}},
            "the accumulator is float64",
            id="float64-accumulator",
        ),
        pytest.param(
            {"op": "upsample_confusion", "shape": (1, 9000, 2, 2)}, "got 9000", id="huge-matrix"
        ),
    ],
)
def test_reasons(changes: dict, expected: str) -> None:
    reasons = upsample.not_supported_reasons(desc(**changes))
    if expected:
        assert len(reasons) == 1 and expected in reasons[0]
    else:
        assert reasons == []


@pytest.mark.parametrize(
    "dtype,device,count",
    [
        pytest.param(torch.float32, "cpu", 0, id="fp32-on-cpu-is-interpreted"),
        pytest.param(torch.float16, "cpu", 0, id="fp16-on-cpu-is-interpreted"),
        pytest.param(torch.bfloat16, "cpu", 1, id="bf16-is-wrong-in-the-interpreter"),
    ],
)
def test_reasons_in_the_interpreter(
    dtype: torch.dtype, device: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = upsample.not_supported_reasons(desc(dtype=dtype, device=device, capability=None))
    assert len(reasons) == count


def test_without_triton_the_reason_and_the_error_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "Triton is not installed"
    monkeypatch.setattr(limits, "missing_triton", lambda: missing)
    assert upsample.not_supported_reasons(FP32) == [missing]
    with pytest.raises(RuntimeError, match=missing):
        upsample.upsample_argmax(torch.zeros(1, 2, 3, 3), (5, 5), False, False)


def test_import_works_where_triton_is_missing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from deeplab_fast.dispatch import limits\n"
        "from deeplab_fast.kernels import launch, upsample\n"
        "assert 'not installed' in limits.missing_triton()\n"
        "try:\n    launch.device_module('upsample_kernels')\n"
        "except RuntimeError as error:\n    assert 'not installed' in str(error)\n"
        "else:\n    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.2.0")
    limits.missing_triton.cache_clear()
    try:
        assert "Triton 3.2.0 is older than 3.6" in limits.missing_triton()
    finally:
        limits.missing_triton.cache_clear()
