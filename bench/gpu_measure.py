"""What units of `bench.gpu` share: times of calls, kernels of a call, other programs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from deeplab_fast.dispatch import sources
from deeplab_fast.dispatch.errors import Wrong, one_line
from deeplab_fast.tuning.machine import Machine, fault_of, suffer
from deeplab_fast.tuning.runner import Unit, die_with_parent
from deeplab_fast.tuning.timing import SAMPLE_SECONDS, captured, clock, interleaved, peak_bytes

from .files import ROOT

Row = dict[str, Any]

# (fewest, most) rounds, by device.
_ROUNDS = {"cuda": (5, 20), "cpu": (2, 2)}
_PROFILED_CALLS = 3
_MOST_KERNELS = 8
_CONVERSION = re.compile(r"nchwToNhwc|nhwcToNchw", re.IGNORECASE)
# A program ends by itself this long before its unit is killed, so that it can say how far it came.
_BEFORE_END = 2.0
_SLOW_SECONDS = 1.0


def unit(
    name: str, run: Callable[[], dict[str, Any]], limit: float, phase: str, **more: Any
) -> Unit:
    """A unit; in a rehearsal with the fault that is asked for.

    Args:
        name, run, limit, phase: as for `Unit`.
        **more: of its further fields.
    """

    def carried_out() -> dict[str, Any]:
        fault = fault_of(name)
        suffer(fault)
        if fault == "slow":
            time.sleep(_SLOW_SECONDS)
        if fault == "wrong":
            raise Wrong("a wrong result (rehearsed)")
        return run()

    return Unit(name, limit, carried_out, phase=phase, **more)


@cache
def fingerprint(*files: Path) -> str:
    """Of Python files, and of the versions of PyTorch that measure with them."""
    return f"{torch.__version__}-{sources.of_files(files)}"


def digest(text: str) -> str:
    """A fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def tiny(machine: Machine) -> bool:
    """Whether sizes are those of a rehearsal on a CPU."""
    return machine.device != "cuda"


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def times(
    calls: Mapping[str, Callable[[], object]], device: str, *, seconds: float = 0.5
) -> dict[str, Row]:
    """Times of calls in turns; what fails has a "problem" and no time.

    Args:
        calls: by name.
        device: "cuda", or "cpu" to rehearse.
        seconds: of all rounds together, as far as their fewest number allows.

    Returns:
        name -> ms, with low and high (20th and 80th percentile) and, on a GPU, peak_mb.
    """
    found: dict[str, Row] = {}
    running: dict[str, Callable[[int], object]] = {}
    for name, call in calls.items():
        try:
            found[name] = {} if device != "cuda" else {"peak_mb": peak_mb(call)}
            call()
            synchronize(device)
        except Exception as error:
            found[name] = {"problem": one_line(error)}
            continue
        running[name] = _numbered(call)
    samples = interleaved(running, clock(device), seconds, _ROUNDS[device], SAMPLE_SECONDS[device])
    for name, own in samples.items():
        ordered = sorted(s * 1e3 for s in own)
        found[name] |= {
            "ms": statistics.median(ordered),
            "low": ordered[len(ordered) // 5],
            "high": ordered[-1 - len(ordered) // 5],
        }
    return found


def rows_of(prefix: str, found: Mapping[str, Row], **facts: object) -> list[Row]:
    """Rows of a unit's result, named after a group and each contestant."""
    return [{"what": f"{prefix}: {name}", **facts, **row} for name, row in found.items()]


def graphed(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A replay of a call from a CUDA graph; the call itself where there is no GPU."""
    return captured([call]).replay if device == "cuda" else call


def peak_mb(call: Callable[[], object]) -> float:
    """Most memory of a second call on the GPU beyond what was there before, MiB."""
    call()
    return peak_bytes(call) / 2**20


def wall_ms(call: Callable[[], object], device: str, calls: int) -> float:
    """Milliseconds of a call by the host's clock, of many behind each other."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def kernels(call: Callable[[], object], device: str) -> Row:
    """What a call runs on the device.

    Returns:
        device_ms, kernels and conversions (of layouts) of a call, and the kernels that take most;
        a "profile_problem" where the driver gives no profile.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    call()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        for _ in range(_PROFILED_CALLS):
            call()
        synchronize(device)
    # What key_averages makes of 100,000 events takes ten seconds.
    found: dict[str, tuple[float, int]] = {}
    for event in profiled.profiler.kineto_results.events():
        if cuda and (event.device_type() != DeviceType.CUDA or event.is_user_annotation()):
            continue
        ms, count = found.get(event.name(), (0.0, 0))
        found[event.name()] = ms + event.duration_ns() / 1e6 / _PROFILED_CALLS, count + 1
    if not found:
        return {"profile_problem": "the profiler saw no kernel"}
    most = sorted(found, key=lambda key: found[key][0], reverse=True)[:_MOST_KERNELS]
    return {
        "device_ms": sum(ms for ms, _ in found.values()),
        "kernels": round(sum(count for _, count in found.values()) / _PROFILED_CALLS),
        "conversions": round(
            sum(count for key, (_, count) in found.items() if _CONVERSION.search(key))
            / _PROFILED_CALLS
        ),
        "most": {key[:70]: round(found[key][0], 4) for key in most},
    }


def program(
    command: Sequence[str], end: float, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a program from the root of the repository; what it prints is printed.

    Args:
        command: with its arguments.
        end: by time.monotonic(); a little before it the program is killed.
        environment: beside this process's.

    Returns:
        (exit status, what it printed); the status is None's stand-in 124 where it was cut off.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
    limit = max(0.5, end - time.monotonic() - _BEFORE_END)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Whatever ends this unit ends it.
        preexec_fn=die_with_parent,
    )
    try:
        text, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        # What it started may hold the pipe open; the runner ends that with this unit.
        try:
            text, _ = process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
        status = CUT_OFF
    printed = text.decode("utf-8", "replace")
    print(printed, flush=True)
    return status, printed


CUT_OFF = 124


def answered(command: Sequence[str], end: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a program of ours answers: its last line is a JSON object.

    Args:
        command, end, environment: as for `program`.

    Raises:
        Wrong: it says so, was cut off, or ended in another way.
    """
    status, text = program(command, end, environment)
    if status < 0:
        # As it ended, so does this unit.
        sys.stdout.flush()
        os.kill(os.getpid(), -status)
    last = text.strip().rpartition("\n")[2]
    try:
        answer = json.loads(last)
    except ValueError:
        answer = {}
    if status == 0 and isinstance(answer, dict) and answer:
        return answer
    if status == CUT_OFF:
        raise Wrong(f"{CUT_SHORT}: no answer in time")
    reason = answer.get("reason") if isinstance(answer, dict) else None
    raise Wrong(reason or f"ended with exit status {status}: {last[:300]}")


# How a reason begins that says how far something came, and nothing of what was checked.
CUT_SHORT = "cut short"


def _numbered(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda i: call()
