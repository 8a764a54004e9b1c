"""Tuning: units that go wrong, checks that must find it, times, and all of it on a stand-in.

The stand-in's "triton" is the C++ code for the CPU and its "cuda" the reference.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import backends, cli
from deeplab_fast.dispatch import checks, records, trust
from deeplab_fast.dispatch.declare import exact, find, pytorch_forms, steps
from deeplab_fast.dispatch.errors import Wrong
from deeplab_fast.dispatch.examples import Size
from deeplab_fast.tuning import api, machine, runner, speeds, tune, workloads
from deeplab_fast.tuning.machine import Machine
from deeplab_fast.tuning.runner import Budget, Outcome, Unit
from deeplab_fast.tuning.workloads import OPS, Work

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Machine("cpu", "stand-in", (0, 0), 1, 0, "1", "2", "3")


# Units.

_SLEEP = f"61.{os.getpid()}"


def _hang() -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", _SLEEP])
    time.sleep(60)
    return {}


def _crash() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _wrong() -> dict[str, Any]:
    raise Wrong("labels differ", error=float("nan"))


def _raise() -> dict[str, Any]:
    raise KeyError("x")


def _exit() -> dict[str, Any]:
    print("what it said")
    sys.exit(0)


def _ends() -> dict[str, Any]:
    os._exit(0)


@pytest.mark.parametrize(
    ("unit", "verdict", "reason"),
    [
        pytest.param(Unit("u", 9, lambda: {"a": 1}), runner.PASSED, "", id="passes"),
        pytest.param(Unit("u", 0.5, _hang), runner.TIMED_OUT, "killed after 0 s", id="hangs"),
        pytest.param(Unit("u", 9, _crash), runner.CRASHED, "ended by signal SIGSEGV", id="crashes"),
        pytest.param(Unit("u", 9, _wrong), runner.FAILED, "labels differ", id="is wrong"),
        pytest.param(Unit("u", 9, _raise), runner.ERROR, "KeyError: 'x'", id="raises"),
        pytest.param(Unit("u", 9, _exit), runner.CRASHED, "exit status", id="exits"),
        pytest.param(Unit("u", 9, _ends), runner.CRASHED, "exit status 0", id="says nothing"),
        pytest.param(Unit("u", 9, lambda: {}, least=99), runner.NOT_RUN, "no time", id="no time"),
        pytest.param(
            Unit("u", 9, lambda: time.sleep(60) or {}, least=0.1),
            runner.NOT_RUN,
            "cut off after 1 s",
            id="cut off",
        ),
    ],
)
def test_what_becomes_of_a_unit(unit: Unit, verdict: str, reason: str, tmp_path: Path) -> None:
    """And of those before and after it; each outcome is in the file."""
    seconds = 1.2 if "cut" in reason else 20
    first, last = (Unit(name, 9, lambda: {}, least=0.0) for name in ("first", "last"))
    out = tmp_path / "outcomes.jsonl"
    found = runner.run([first, unit, last], seconds=seconds, out=out)
    assert [o.unit for o in found] == ["first", "u", "last"]
    assert found[1].verdict == verdict and reason in found[1].reason
    assert {found[0].verdict} == {runner.PASSED}
    assert [o.unit for o in runner.read(out)] == ["first", "u", "last"]
    assert runner.read(out)[1].verdict == verdict


def test_progress_begins_the_limit_anew() -> None:
    def slow(says: bool) -> dict[str, Any]:
        for _ in range(8):
            time.sleep(0.2)
            if says:
                runner.progress()
        return {"done": True}

    units = [Unit("says", 1.0, lambda: slow(True)), Unit("silent", 1.0, lambda: slow(False))]
    says, silent = runner.run(units, seconds=20)
    assert says.verdict == runner.PASSED and says.result == {"done": True}
    assert silent.verdict == runner.TIMED_OUT
    # No progress goes beyond the budget.
    (cut,) = runner.run([replace(units[0], least=0.1)], seconds=0.8)
    assert cut.verdict == runner.NOT_RUN


@pytest.mark.parametrize("size", [0, 5985, 5986, 10**6])
def test_the_beginning_and_the_end_of_what_was_printed_are_kept(size: int) -> None:
    """6000 characters with the 15 of what is printed first and last, one more, and many."""

    def prints() -> dict[str, Any]:
        os.write(1, b"begins" + b"x" * size + b"and ends\n")
        return _ends()

    (crashed,) = runner.run([Unit("u", 20, prints)], seconds=30)
    assert crashed.output.startswith("begins") and crashed.output.endswith("and ends\n")
    if size < 5986:
        assert len(crashed.output) == size + 15
    else:
        assert crashed.output[3000:3007] == "\n[...]\n" and len(crashed.output) == 6007


def test_what_hangs_after_progress_says_where_it_hangs() -> None:
    """Not where it was when its first limit would have ended."""

    def goes_on() -> None:
        for _ in range(6):
            time.sleep(0.5)
            runner.progress()

    def hangs() -> dict[str, Any]:
        goes_on()
        time.sleep(60)
        return {}

    (hung,) = runner.run([Unit("u", 2.0, hangs)], seconds=30)
    assert hung.verdict == runner.TIMED_OUT
    assert "in hangs" in hung.output and "in goes_on" not in hung.output


def test_a_child_takes_what_it_started_with_it() -> None:
    pattern = f"sleep {_SLEEP}"
    beside = subprocess.Popen(["sleep", _SLEEP])
    try:
        runner.run([Unit("u", 0.5, _hang)], seconds=9)
        # What is killed is gone a moment later.
        for _ in range(50):
            found = subprocess.run(["pgrep", "-fx", pattern], capture_output=True, text=True)
            if (left := found.stdout.split()) == [str(beside.pid)]:
                break
            time.sleep(0.1)
        assert left == [str(beside.pid)]
    finally:
        beside.kill()
        beside.wait()


def test_children_die_with_a_parent_that_is_killed() -> None:
    code = (
        "import os, signal, time\n"
        "from deeplab_fast.tuning.runner import Unit, run\n"
        "def child():\n"
        "    print(os.getpid(), file=open('/proc/%d/fd/1' % os.getppid(), 'w'), flush=True)\n"
        "    time.sleep(60)\n"
        "run([Unit('u', 60, child)], seconds=60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or _state(child) == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_units_run_side_by_side_but_for_those_alone() -> None:
    def unit(name: str, alone: bool) -> Unit:
        def run() -> dict[str, Any]:
            begin = time.monotonic()
            time.sleep(0.4)
            return {"begin": begin, "end": time.monotonic()}

        return Unit(name, 9, run, alone=alone)

    units = [unit("a", False), unit("b", False), unit("c", True), unit("d", True)]
    found = {o.unit: o.result for o in runner.run(units, seconds=20, jobs=2)}
    assert found["b"]["begin"] < found["a"]["end"]
    assert found["c"]["begin"] >= max(found["a"]["end"], found["b"]["end"])
    assert found["d"]["begin"] >= found["c"]["end"]


def test_a_budget_passes_on_what_a_phase_leaves(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    budget = Budget(10)
    assert budget.part(4) == 4
    now[0] += 1
    assert budget.part(4) == 7
    now[0] += 8
    assert budget.part(4) == 1 and budget.left == 1
    now[0] += 8
    assert budget.part(4) == budget.left == 0


def test_hanging_children_do_not_outlast_the_budget() -> None:
    units = [Unit(f"u{i}", 60, _hang, least=0.1) for i in range(6)]
    start = time.monotonic()
    found = runner.run(units, seconds=1, jobs=3)
    assert time.monotonic() - start < 5
    assert {o.verdict for o in found} == {runner.NOT_RUN}


def test_two_units_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="units of the same name: u"):
        runner.run([Unit("u", 1, dict), Unit("u", 1, dict)], seconds=1)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    runner.append(path, Outcome("a", runner.PASSED, result={"x": [1.0, float("inf")]}))
    runner.append(path, Outcome("b", runner.FAILED, "why"))
    path.write_text(path.read_text()[:-20])
    (found,) = runner.read(path)
    assert found == Outcome("a", runner.PASSED, result={"x": [1.0, "inf"]})


# Checks.


def _implementation(op: str) -> Any:
    return backends.implementations(op)["reference"].run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_reference_passes(op: str, dtype: str) -> None:
    for form in find(op).examples.forms:
        found = checks.check(
            op, _implementation(op), dtype, form, "cpu", at=find(op).examples.sizes[:2]
        )
        assert found.error <= found.bound


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        pytest.param("last", "", id="one value"),
        pytest.param("unwritten", "", id="not written"),
        pytest.param("moving", "differs", id="other bits each time"),
        pytest.param("raises", "raises RuntimeError", id="raises"),
        pytest.param("shape", "", id="shape"),
    ],
)
def test_what_is_wrong_is_found(op: str, fault: str, text: str) -> None:
    right = _implementation(op)
    calls = iter(range(1000))

    def spoil(results: Any) -> Any:
        for t in [results] if isinstance(results, torch.Tensor) else results:
            if not t.numel():
                continue
            at = (-1,) * t.dim()
            if fault == "last":
                t[at] += 7
            elif fault == "unwritten" and t.is_floating_point():
                t[at] = float("nan")
            elif fault == "unwritten":
                t[at] = 7 if t.dim() == 2 else 255
            elif fault == "moving":
                t[at] += 7 * (next(calls) % 2)
            break
        return results

    def wrong(*args: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("launch failed")
        if fault == "shape":
            results = right(*args)
            first = results if isinstance(results, torch.Tensor) else results[0]
            return [first[:1], *([] if first is results else results[1:])]
        results = right(*args)
        # The one that changes its argument returns nothing.
        return spoil(args[0] if results is None else results)

    if fault == "shape" and op == "upsample_softmax_add":
        pytest.skip("writes to its argument, whose shape it cannot change")
    implementation: Any = wrong
    if op == "upsample_cross_entropy":
        kinds = {name: _under(right, name, wrong) for name in ("forward", "with_grad", "backward")}
        implementation = replace(right, **kinds)
    size = find(op).examples.sizes[0]
    with pytest.raises(Wrong) as error:
        checks.check(op, implementation, "float32", find(op).examples.forms[0], "cpu", at=[size])
    assert text in str(error.value)


def _under(right: Any, name: str, wrong: Any) -> Any:
    """`wrong` around one function of the loss."""
    function = getattr(right, name)
    cells = dict(zip(wrong.__code__.co_freevars, wrong.__closure__, strict=True))

    def run(*args: Any) -> Any:
        before = cells["right"].cell_contents
        cells["right"].cell_contents = function
        try:
            return wrong(*args)
        finally:
            cells["right"].cell_contents = before

    return run


def test_the_first_wrong_value_is_named() -> None:
    def wrong(*args: Any) -> Any:
        y = _implementation("bn_act")(*args)
        y[1, 3, 2, 5] += 9
        y[1, 4, 7, 5] += 9
        return y

    with pytest.raises(Wrong) as error:
        checks.check("bn_act", wrong, "bfloat16", "relu", "cpu", at=[Size(2, 40, 9, 11)])
    text = str(error.value)
    pixel = (1 * 9 + 2) * 11 + 5
    assert "2 of 7920 values are wrong, first at image 1, row 2, column 5, channel 3" in text
    assert f"pixel mod 8 = {pixel % 8}, channel mod 8 = 3" in text


def test_what_cannot_run_at_any_size_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="no size can run"):
        checks.check("bn_act", print, "float32", "relu", "cpu", reasons=lambda step: ["no"])


@pytest.mark.parametrize("op", OPS)
def test_pytorch_s_forms_compute_the_step(op: str) -> None:
    """Their errors are what kernels are allowed, so they must be those of roundings."""
    size = Size(2, 16, 9, 11, 33, 41, filters=24, rates=(2, 4, 12), pooled=12, classes=5)
    for form in find(op).examples.forms:
        for step in steps(op, form, size, torch.float32):
            expected = exact(step)
            for run in pytorch_forms(step.converted(torch.clone)).values():
                results = speeds.flat(run())
                for kind, out, ref in zip(step.kinds, results, expected, strict=False):
                    assert checks.error_of(kind, out, ref) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_forms_of_steps_are_those_that_records_are_asked_by(op: str) -> None:
    size = Size(1, 8, 5, 7, 9, 11, filters=8, rates=(2,), pooled=8, classes=3)
    for form in find(op).examples.forms:
        for step in steps(op, form, size, torch.bfloat16, "meta"):
            assert trust.form(step.on((9, 0))) == form


def test_every_op_with_a_gpu_kernel_is_tuned() -> None:
    mine = {
        op
        for op in backends.registered_ops()
        for backend, found in backends.implementations(op).items()
        if backend in tune.BACKENDS and not found.is_pytorch
    }
    assert mine == set(OPS)


# Times.


def test_a_slower_and_a_faster_backend() -> None:
    right = _implementation("bn_act_reduce")

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return right(*args)

    size = Size(1, 8, 9, 9)
    found = speeds.compare(
        "bn_act_reduce", "relu", size, "float32", "cpu", {"a": slow}, (1, 8, 9, 9), seconds=0.01
    )
    assert found.gains["a"] < 0.5 and found.contestants["a"].ms > 20
    assert found.pytorch == "elementwise" and json.dumps(found.as_dict())


def test_a_result_that_is_far_from_pytorch_s_is_no_time() -> None:
    with pytest.raises(Wrong, match=r"result 0 of a at 1x8x9x9 is .* from PyTorch's"):
        speeds.compare(
            "batch_stats", "plain", Size(1, 8, 9, 9), "float32", "cpu",
            {"a": lambda *args: [t + 1 for t in _implementation("batch_stats")(*args)]}, (1,),
            seconds=0.01,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_what_is_right_is_near_pytorch_s(op: str, dtype: str) -> None:
    """Also where PyTorch's own result is rounded to the dtype of the call."""
    for form in find(op).examples.forms:
        for size in find(op).examples.sizes[:2]:
            speeds.check_at(op, form, size, dtype, "cpu", _implementation(op), "reference")


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        pytest.param("bn_act", lambda y: y[:, -8:, -3:, -3:].zero_(), id="a tile not written"),
        pytest.param("upsample_softmax_add", lambda y: y[0, 0].add_(1), id="what is changed"),
        pytest.param("upsample_argmax", lambda y: y[0, :3].fill_(1), id="labels"),
        pytest.param("upsample_confusion", lambda y: y[0].add_(9), id="counts"),
    ],
)
def test_what_a_norm_hides_at_the_sizes_of_models(op: str, fault: Any) -> None:
    """Right in bf16, whose PyTorch path interpolates with errors that move many labels, and wrong
    in a part."""
    size = Size(1, 64, 33, 33, 129, 129)
    form = find(op).examples.forms[0]

    def wrong(*args: Any) -> Any:
        results = _implementation(op)(*args)
        y = args[0] if results is None else results
        fault(y[0] if isinstance(y, tuple) else y)
        return results

    speeds.check_at(op, form, size, "bfloat16", "cpu", _implementation(op), "a")
    with pytest.raises(Wrong, match="from PyTorch's, allowed are"):
        speeds.check_at(op, form, size, "bfloat16", "cpu", wrong, "a")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_lack_of_memory_is_no_verdict(error: Exception) -> None:
    def lacks(*args: Any) -> Any:
        raise error

    size = find("bn_act").examples.sizes[0]
    with pytest.raises(type(error), match=str(error).split()[-1]):
        checks.check("bn_act", lacks, "float32", "relu", "cpu", at=[size])
    speeds.check_at("bn_act", "relu", size, "float32", "cpu", lacks, "a")


# What models call.


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_works_of_a_model(name: str) -> None:
    with torch.device("meta"):
        model = dlf.get_model(name)
    found = workloads.of_model(model, (520, 520), (1, 16))
    assert {work.op for work in found} == set(OPS)
    channels, size = {"deeplabv3_resnet50": (2048, 65)}.get(name, (960, 33))
    branches = [work.size for work in found if work.op == "aspp_branches"]
    given = {"filters": 256, "rates": (12, 24, 36)}
    assert branches == [Size(n, channels, size, size, **given) for n in (1, 16)]
    (convs,) = [work.size for work in found if work.op == "aspp_convs"]
    assert convs == branches[-1]
    (argmax,) = {w.size for w in found if w.op == "upsample_argmax" and w.size.n == 1}
    assert argmax == Size(1, 21, size, size, 520, 520)
    assert ("hardswish" in {w.form for w in found}) == (name != "deeplabv3_resnet50")
    quick = workloads.selected(found, None, quick=True)
    assert sorted(work.op for work in quick) == sorted(OPS)


def test_a_model_is_not_changed() -> None:
    model = dlf.get_model("fregu856_resnet18").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    workloads.of_model(model, (65, 65), (1,))
    assert model.training and model.fast and model.fused
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


# Records that follow.


def _checked(verdict: str, reason: str = "") -> Outcome:
    facts = {"op": "bn_act", "backend": "triton", "dtype": "bfloat16", "form": "relu"}
    return Outcome("c", verdict, reason, phase="check", source="s", facts=facts)


def _timed(verdict: str, backends: tuple[str, ...], **result: Any) -> Outcome:
    facts = {"op": "bn_act", "dtype": "bfloat16", "form": "relu", "backends": list(backends)}
    return Outcome("t", verdict, "why", phase="time", facts=facts, result=result)


SPEED = {
    "sizes": [1, 2], "pytorch": "p", "gains": {"triton": 2.0},
    "contestants": {"p": {"ms": 2.0, "peak_mb": 4.0}, "triton": {"ms": 1.0, "peak_mb": 3.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        pytest.param([_checked(runner.PASSED)], ("passed", "", 0), id="passed"),
        pytest.param([_checked(runner.FAILED, "off")], ("failed", "off", 0), id="failed"),
        pytest.param(
            [_checked(runner.TIMED_OUT, "killed")], ("failed", "timed out: killed", 0), id="hung"
        ),
        pytest.param([_checked(runner.NOT_RUN, "no time")], None, id="not run"),
        pytest.param([_checked(runner.ERROR, "the check's own")], None, id="error of the check"),
        pytest.param(
            [_checked(runner.PASSED), _timed(runner.PASSED, ("triton",), speeds=[SPEED])],
            ("passed", "", 1),
            id="timed",
        ),
        pytest.param(
            [_checked(runner.PASSED), _timed(runner.CRASHED, ("triton",))],
            ("failed", "while timed: crashed: why", 0),
            id="crashed alone",
        ),
        pytest.param(
            [_checked(runner.PASSED), _timed(runner.CRASHED, ("triton", "cuda"))],
            ("passed", "", 0),
            id="crashed beside another",
        ),
        pytest.param(
            [_checked(runner.PASSED), _timed(runner.NOT_RUN, ("triton",))],
            ("passed", "", 0),
            id="not timed",
        ),
    ],
)
def test_records_of_outcomes(outcomes: list[Outcome], expected: Any) -> None:
    found = tune.records_of(outcomes, STAND_IN)
    if expected is None:
        assert not found
        return
    (record,) = found
    assert (record.verdict, record.reason, len(record.times)) == expected
    assert record.capability == (0, 0) and record.source == "s" and record.driver == "1"


# All of it.


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch):
    """Faults of the stand-in -> runs the command line on it; (exit status, output, records)."""
    path = tmp_path / "records.json"

    def run(faults: dict[str, str], *arguments: str) -> tuple[int, str, dict[str, records.Record]]:
        file = tmp_path / "stand-in.json"
        file.write_text(json.dumps({"faults": faults}))
        monkeypatch.setenv(machine.STAND_IN, str(file))
        monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(path))
        given = ["tune", "--model", "fregu856_resnet18", "--size", "[65,65]", "--batches", "[1]"]
        done = subprocess.run(
            [sys.executable, "-m", "deeplab_fast", *given, "--dtypes", "[float32]", *arguments],
            capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        )  # fmt: skip
        found = {}
        if path.is_file():
            found = {f"{r.op} {r.backend} {r.form}": r for r in records.read(path)}
        return done.returncode, done.stdout + done.stderr, found

    return run


@pytest.mark.slow
def test_faults_are_their_units_verdicts_and_nobody_else_s(stand_in) -> None:
    faults = {
        "check batch_stats triton": "crash",
        "check bn_act triton": "wrong",
        "check upsample_argmax cuda": "error",
        "time upsample_softmax_add cuda": "crash",
        "time upsample_confusion triton": "slow",
    }
    ops = "[batch_stats,bn_act,upsample_argmax,upsample_confusion,upsample_softmax_add]"
    status, output, found = stand_in(faults, "--ops", ops, "--quick", "--budget", "100")
    assert status == 1
    verdicts = {name: r.verdict for name, r in found.items()}
    failed = {name for name, verdict in verdicts.items() if verdict == "failed"}
    assert failed == {
        "batch_stats triton plain", "bn_act triton relu", "upsample_argmax cuda plain",
        "upsample_softmax_add cuda plain",
    }  # fmt: skip
    assert len(verdicts) == 8
    assert "SIGSEGV" in found["batch_stats triton plain"].reason
    assert "values are wrong, first at" in found["bn_act triton relu"].reason
    assert "illegal memory access" in found["upsample_argmax cuda plain"].reason
    assert found["upsample_softmax_add cuda plain"].reason.startswith("while timed: crashed")
    # What was timed beside it was timed again.
    assert found["upsample_softmax_add triton plain"].times
    assert found["upsample_confusion triton plain"].times[0].gain < 1
    assert "8 kernels checked, 4 passed" in output


@pytest.mark.slow
def test_a_hang_costs_the_budget_and_no_more(stand_in) -> None:
    faults = {"check bn_act triton": "hang"}
    status, output, found = stand_in(
        faults, "--ops", "[batch_stats,bn_act]", "--quick", "--budget", "40"
    )
    assert status == 0
    assert "batch_stats triton plain" in found and "bn_act triton relu" not in found
    assert "not run, cut off after" in output and "a larger budget runs them" in output


def test_what_a_killed_run_had_found_is_kept(tmp_path: Path, monkeypatch) -> None:
    """The process that tunes is killed; the one that started it writes the records."""
    path = tmp_path / "records.json"
    monkeypatch.setenv(machine.STAND_IN, str(tmp_path / "faults.json"))
    (tmp_path / "faults.json").write_text("{}")
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(path))

    class Killed:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            out = Path(next(part for part in command if part.endswith(".jsonl")))
            runner.append(out, Outcome("identity", runner.PASSED, result=STAND_IN.as_dict()))
            runner.append(out, _checked(runner.PASSED))

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                raise KeyboardInterrupt
            return -2

    monkeypatch.setattr(api.subprocess, "Popen", Killed)
    with pytest.raises(KeyboardInterrupt):
        dlf.tune(quick=True)
    assert [r.op for r in records.read(path)] == ["bn_act"]


def test_without_a_gpu_there_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.delenv(machine.STAND_IN, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cli.main(["tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deeplab-fast tune: error: ") and "built without CUDA" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_pytorch_with_cuda_that_sees_no_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(machine.STAND_IN, raising=False)
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "records.json"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(tune.NoDevice, match="no CUDA device is visible"):
        dlf.tune(quick=True, ops=["batch_stats"])
    assert not (tmp_path / "records.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param(["--dtypes", "[fp8]"], "dtype is 'fp8'; allowed: bfloat16", id="dtype"),
        pytest.param(["--dtypes", "[]"], "dtype is nothing", id="no dtype"),
        pytest.param(["--backends", "[cpu]"], "backend is 'cpu'; allowed: triton", id="backend"),
        pytest.param(["--ops", "[foo]"], "no op is named 'foo'; there are: aspp", id="op"),
        pytest.param(["--model", "foo"], "no model is named 'foo'", id="model"),
        pytest.param(["--size", "[65]"], "--size is [65]; expected [height,width]", id="size"),
        pytest.param(["--size", "[0,65]"], "expected (height, width) of at least 1", id="no rows"),
        pytest.param(["--size", "[65,65]"], "name a model as well", id="size of nothing"),
        pytest.param(["--batches", "[0]"], "each must be at least 1", id="batch"),
        pytest.param(["--budget", "0"], "expected seconds above 0", id="budget"),
        pytest.param(
            ["--model", "deeplabv3_cascaded_resnet50", "--ops", "[aspp_branches]"],
            "calls none of the ops aspp_branches",
            id="not of the model",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], text: str, capsys) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_records_switched_off_are_said_before_anything_runs(monkeypatch, capsys) -> None:
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, "0")
    assert cli.main(["tune"]) == 2
    assert "DEEPLAB_FAST_RECORDS=0 leaves records unread" in capsys.readouterr().err


def test_a_plan_survives_the_way_to_the_process_that_carries_it_out() -> None:
    works = (Work("aspp_branches", "plain", Size(1, 8, 5, 5, filters=8, rates=(2, 4))),)
    plan = tune.Plan(works, ("triton",), ("tf32",), 7.0, quick=True, configurations=True)
    assert api.plan_from(json.loads(json.dumps(asdict(plan)))) == plan


@pytest.mark.parametrize("fault", ["hangs", ""])
def test_an_unknown_fault_of_the_stand_in_is_refused(fault: str, tmp_path, monkeypatch) -> None:
    path = tmp_path / "stand-in.json"
    path.write_text(json.dumps({"faults": {"check": fault}}))
    monkeypatch.setenv(machine.STAND_IN, str(path))
    if not fault:
        assert machine.fault_of("check x") == ""
        return
    with pytest.raises(ValueError, match="fault 'hangs' of 'check x' is none of hang, crash"):
        machine.fault_of("check x")


def test_the_parent_makes_no_cuda_context() -> None:
    """A fork could not use it: importing and planning must not ask CUDA for anything."""
    code = (
        "import torch\n"
        "def refuse(*a, **k): raise SystemExit('asked CUDA')\n"
        "for name in ('is_available', 'init', '_lazy_init', 'device_count', 'current_device',\n"
        "    'get_device_properties', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import deeplab_fast\n"
        "from deeplab_fast.tuning import api, tune\n"
        "from deeplab_fast.tuning.machine import Machine\n"
        "plan = api.make_plan(None, None, batches=(1, 16), dtypes=('bfloat16', 'tf32'), ops=None,\n"
        "    backends=tune.BACKENDS, quick=False, budget=None, configurations=True)\n"
        "machine = Machine('cuda', 'NVIDIA H100', (9, 0), 132, 80000, '1', '2', '3')\n"
        "units = tune.check_units(machine, plan)\n"
        "assert any('aspp_branches triton tf32' in u.name for u in units), len(units)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
