"""Which implementation runs, why, and what is said when it cannot."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import _ext, backends, info, ops
from deeplab_fast.dispatch import choice, declare


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """An op with three implementations: one for nothing, one for even sizes, the reference."""
    monkeypatch.setattr(declare, "_implementations", {})
    monkeypatch.setattr(choice, "_fallthrough_logged", set())
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)

    def even_only(desc: backends.OpDesc) -> list[str]:
        return [] if desc.shape[0] % 2 == 0 else [f"size {desc.shape[0]} is odd"]

    backends.register("toy", "cuda", lambda: "cuda", lambda desc: ["no GPU", "not built"])
    backends.register("toy", "cpu", lambda: "cpu", even_only)
    backends.register("toy", "reference", lambda: "reference")
    return lambda size: backends.OpDesc.of("toy", torch.empty(size))


def test_the_first_without_reasons_runs(toy) -> None:
    assert backends.run(toy(2)) == "cpu"
    assert backends.run(toy(3)) == "reference"


def test_explicit_choice_goes_before_priority_and_nests(toy) -> None:
    with dlf.use_backend("reference"):
        assert backends.run(toy(2)) == "reference"
        with dlf.use_backend("auto"):
            assert backends.run(toy(2)) == "cpu"
        assert backends.current_backend() == "reference"
    assert backends.run(toy(2)) == "cpu"


def test_choice_ends_with_an_exception(toy) -> None:
    with pytest.raises(KeyError), dlf.use_backend("reference"):
        raise KeyError
    assert backends.current_backend() == "auto"


def test_environment_variable(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert backends.run(toy(2)) == "reference"
    with dlf.use_backend("cpu"):
        assert backends.run(toy(2)) == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match="DEEPLAB_FAST_BACKEND: no backend is named 'gpu'"):
        backends.run(toy(2))


def test_explicit_choice_that_cannot_run_raises_with_every_reason(toy) -> None:
    with (
        dlf.use_backend("cuda"),
        pytest.raises(backends.BackendUnavailable, match=r"no GPU; not built.*cpu, reference"),
    ):
        backends.run(toy(2))
    with (
        dlf.use_backend("triton"),
        pytest.raises(backends.BackendUnavailable, match="toy has no triton implementation"),
    ):
        backends.run(toy(2))


def test_automatic_choice_logs_a_fallthrough_once(toy, caplog) -> None:
    with caplog.at_level(logging.INFO, "deeplab_fast"):
        for _ in range(3):
            backends.run(toy(3))
    texts = [r.getMessage() for r in caplog.records]
    assert texts == [
        "toy: cuda does not run (no GPU; not built); using reference",
        "toy: cpu does not run (size 3 is odd); using reference",
    ]


def test_info_tells_of_declared_ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, "_implementations", {**declare._implementations})
    backends.register("undeclared", "reference", lambda x: x)
    assert "undeclared" not in info.report()


def test_nothing_can_run(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(declare._implementations["toy"], "reference")
    with pytest.raises(backends.BackendUnavailable, match="cpu: size 3 is odd"):
        backends.run(toy(3))


def test_registering_twice_or_elsewhere_is_an_error(toy) -> None:
    with pytest.raises(ValueError, match="already has an implementation"):
        backends.register("toy", "cpu", lambda: None)
    with pytest.raises(ValueError, match="no backend is named 'mps'"):
        backends.register("toy", "mps", lambda: None)


def test_every_op_has_a_reference() -> None:
    names = [name for name in ops.__all__ if name != "describe"]
    # Autograd alone calls these two; the other backward passes are no ops, or public.
    names += ["aspp_convs_backward", "conv2d_backward"]
    assert sorted(backends.registered_ops()) == sorted(names)
    for name in names:
        assert "reference" in backends.implementations(name)


def test_why_names_the_choice_and_every_reason() -> None:
    logits = torch.randn(1, 3, 4, 5)
    why = dlf.why("upsample_argmax", logits, (8, 10))
    assert [row[0] for row in why.rows] == list(backends.BACKENDS)
    with dlf.use_backend("reference"):
        why = dlf.why("upsample_argmax", logits, (8, 10))
    assert why.chosen == "reference"
    text = str(why)
    assert "upsample_argmax (cpu float32 [1, 3, 4, 5], size=(8, 10)" in text
    assert "-> reference" in text
    for backend, reasons in why.rows:
        assert bool(reasons) == (backend not in _runnable(why)), text
    with dlf.use_backend("cuda"):
        assert dlf.why("upsample_argmax", logits, (8, 10)).chosen is None
    with pytest.raises(ValueError, match="no op is named 'argmax'; there are: aspp_branches"):
        dlf.why("argmax", logits)


def _runnable(why: backends.Why) -> set[str]:
    table = backends.implementations(why.desc.op)
    return {b for b, i in table.items() if not i.not_supported_reasons(why.desc)}


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)], ids=["cpu", "cuda"]
)
def test_info_explains_every_op_for_three_shapes(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert len(info.STANDARD_SHAPES) == 3
    for shape in info.STANDARD_SHAPES:
        found = info.what_runs(shape, dtype, device)
        assert sorted(w.desc.op for w in found) == sorted(backends.registered_ops())
        assert all(w.chosen for w in found)


def test_info_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deeplab_fast.info"], capture_output=True, text=True, check=True
    )
    for expected in ("deeplab_fast 0.", "Implementations", "r50-os8-520-b1", "aspp_branches"):
        assert expected in done.stdout


def test_info_lists_every_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"CPU": "cpu", "CUDA": "cuda", "SM90": "cuda sm_90a"}
    for name in rows:
        missing = dataclasses.replace(getattr(_ext, name), loaded=False, reason=f"no {name} here")
        monkeypatch.setattr(_ext, name, missing)
    report = info.report()
    for name, row in rows.items():
        assert f"\n  {row:<14}no: no {name} here\n" in report
    monkeypatch.setattr(_ext, "SM90", dataclasses.replace(_ext.SM90, loaded=True, reason=""))
    assert "\n  cuda sm_90a   yes: " in info.report()


def test_calls_that_cpp_would_have_run_say_so(monkeypatch) -> None:
    """An op, and a network's program; not what asks which backend would run."""
    missing = dataclasses.replace(_ext.CPU, loaded=False, reason="not built: no compiler")
    monkeypatch.setattr(_ext, "CPU", missing)
    told = []
    monkeypatch.setattr(_ext, "warn_of_missing_cpu", lambda: told.append(1))
    logits = torch.zeros(1, 3, 4, 4)
    assert backends.why("upsample_argmax", logits, (8, 8)).chosen == "reference" and not told
    ops.upsample_argmax(logits, (8, 8))
    assert told == [1]
    with backends.use_backend("reference"):
        ops.upsample_argmax(logits, (8, 8))
    assert told == [1]
    model = dlf.deeplabv3_mobilenet_v2_tf(width=0.25, aspp_channels=8).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 33, 33))
    assert len(told) >= 2


def test_import_touches_no_gpu_and_nothing_heavy() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import deeplab_fast\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'torchvision', 'PIL', 'lightning', 'jsonargparse', 'tqdm'}\n"
        "loaded = heavy & (set(sys.modules) - before)\n"
        "assert not loaded, loaded\n"
        # Neither do the launchers of kernels, of which one process imports all.
        "import importlib, pkgutil\n"
        "from deeplab_fast import kernels\n"
        "names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]\n"
        "launchers = [name for name in names if not name.endswith('_kernels')]\n"
        "assert {'aspp', 'batch_norm', 'conv', 'launch', 'tuned', 'upsample'} <= set(launchers)\n"
        "for name in launchers:\n"
        "    importlib.import_module(f'{kernels.__name__}.{name}')\n"
        "assert 'triton' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.endswith('_kernels')]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
