"""Programs as units of `bench.gpu`: the GPU tests file by file, compute-sanitizer, ncu."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from deeplab_fast.dispatch.errors import Wrong
from deeplab_fast.tuning.machine import Machine

from .files import ROOT
from .gpu_measure import CUT_OFF, CUT_SHORT, program, tiny

TESTS = ROOT / "tests" / "gpu"
# Parts of a file's tests that are units of their own, by what their names have; a test is in the
# first that it fits. The others are the file's main part.
PARTS = {
    # More than 2^31 elements, or what memory a call takes: nothing else may hold the GPU's memory.
    "large": "two_to_the_31 or memory",
    # Compiles every candidate.
    "configurations": "every_configuration",
    "compile": "compile",
    "graphs": "graph or capture",
}
MAIN = "main"
TOOLS = ("memcheck", "racecheck", "synccheck")
# The slowest test may take as long; beyond it hangs, and the report names it.
_TEST_SECONDS = 60
_MOST_NAMED = 12

_PASSED = re.compile(r"^(\S+::\S.*?) PASSED", re.MULTILINE)
_BAD = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", re.MULTILINE)
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
_STARTED = re.compile(r"^(tests/\S+::\S.*?)(?: (?:PASSED|FAILED|SKIPPED|ERROR).*)?$", re.MULTILINE)
_SANITIZER_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_SANITIZER_FIRST = re.compile(r"^=+ ((?!COMPUTE-SANITIZER).*(?:\n=+ .*){0,8})", re.MULTILINE)

NCU = "ncu"
# What limits a matrix kernel: issue slots, tensor cores, the second-level cache, the memory.
METRICS = {
    "gpu__time_duration.sum": "time",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor instructions",
    "lts__t_bytes.sum": "L2 bytes",
    "dram__bytes.sum": "DRAM bytes",
}


def test_files() -> list[str]:
    """Names of the files of GPU tests."""
    return sorted(path.stem for path in TESTS.glob("test_*.py"))


def parts_of(file: str) -> list[str]:
    """The parts that a file of tests has."""
    names = re.findall(r"^def (test_\w+)", (TESTS / f"{file}.py").read_text("utf-8"), re.MULTILINE)
    found = [part_of(name) for name in names]
    return [part for part in (MAIN, *PARTS) if part in found]


def part_of(test: str) -> str:
    """The part that a test belongs to, by its name."""
    for part, words in PARTS.items():
        if any(word in test for word in words.split(" or ")):
            return part
    return MAIN


def expression(part: str) -> str:
    """What pytest's -k takes for a part."""
    before = list(PARTS.values()) if part == MAIN else []
    for name, words in PARTS.items():
        if part == name:
            break
        before.append(words)
    left_out = [f"not ({words})" for words in dict.fromkeys(before)]
    return " and ".join([*([] if part == MAIN else [f"({PARTS[part]})"]), *left_out])


def tests(file: str, part: str, end: float) -> dict[str, Any]:
    """A part of a file of GPU tests; without a GPU they skip themselves.

    Args:
        file, part: which.
        end: by time.monotonic().

    Raises:
        Wrong: a test failed, or time was up; the result has how many passed.
    """
    command = [
        sys.executable, "-m", "pytest", str((TESTS / f"{file}.py").relative_to(ROOT)), "-v",
        "-rfE", "--tb=line", "-p", "no:cacheprovider", "--timeout", str(_TEST_SECONDS),
        "--timeout-method", "thread", "-k", expression(part),
    ]  # fmt: skip
    status, text = program(command, end)
    result = test_result(text)
    if status == CUT_OFF:
        started = _STARTED.findall(text)
        at = f" at {started[-1].rpartition('::')[2]}" if started else ""
        raise Wrong(f"{CUT_SHORT}{at}, {_said(result)}", **result)
    if status or result["failed"]:
        raise Wrong(_said(result) if result["failed"] else f"pytest ended with {status}", **result)
    return result


def test_result(text: str) -> dict[str, Any]:
    """What pytest printed, counted."""
    counts = dict((what, int(number)) for number, what in _COUNTS.findall(text[-2000:]))
    failed = {name.rpartition("::")[2]: reason[:160] for name, reason in _BAD.findall(text)}
    return {
        "passed": counts.get("passed", len(_PASSED.findall(text))),
        "skipped": counts.get("skipped", 0),
        "failed": dict(list(failed.items())[:_MOST_NAMED]),
        "failures": max(len(failed), counts.get("failed", 0)),
    }


def _said(result: dict[str, Any]) -> str:
    named = "; ".join(f"{name} ({reason})" for name, reason in list(result["failed"].items())[:3])
    return f"{result['passed']} tests passed, {result['failures']} failed: {named}".removesuffix(
        ": "
    )


def sanitizer(machine: Machine, tool: str, what: str, end: float) -> dict[str, Any]:
    """A tool of compute-sanitizer over small shapes; the results are checked as well.

    Args:
        machine: the GPU; in a rehearsal the program runs without the tool.
        tool: of `TOOLS`.
        what: "triton" or "cuda" for all ops on a backend, "rows" for the sm_90a rows of the ASPP.
        end: by time.monotonic().

    Raises:
        Wrong: an error was found, a result was wrong, or time was up.
    """
    inside = [sys.executable, "-m", "bench.gpu_rows", "check", "--small"]
    if what != "rows":
        backend = {"triton": "cpu", "cuda": "reference"}[what] if tiny(machine) else what
        inside = [sys.executable, "-m", "bench.sanitize", "--backends", backend]
        inside += ["--device", machine.device]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    if tiny(machine):
        command = []
    # Without the caching allocator every tensor has its own bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    status, text = program([*command, *inside], end, environment)
    result = sanitizer_result(text) | {"seconds": round(time.monotonic() - begin, 1)}
    if result["errors"]:
        raise Wrong(f"{result['errors']} errors, first: {result['first']}", **result)
    if status == CUT_OFF:
        raise Wrong(f"{CUT_SHORT}, {result['ok']} checks were clean", **result)
    if status:
        raise Wrong(f"ended with exit status {status}: {text.strip()[-200:]}", **result)
    return result


def sanitizer_result(text: str) -> dict[str, Any]:
    """What a tool of compute-sanitizer printed, counted."""
    errors = sum(int(a or b) for a, b in _SANITIZER_ERRORS.findall(text))
    first = _SANITIZER_FIRST.search(text)
    return {
        "ok": len(re.findall(r": ok\b", text)),
        "errors": errors,
        "first": " ".join(first[1].split())[:300] if errors and first else "",
    }


def missing(tool: str) -> str:
    """Why a tool cannot be used; "" where it can."""
    return "" if shutil.which(tool) else f"{tool} is not on PATH"


def profile(machine: Machine, row: int, end: float) -> dict[str, Any]:
    """What limits a row of the table of tiles at the sizes of models, by ncu.

    Raises:
        Wrong: the profile was not made.
    """
    inside = [sys.executable, "-m", "bench.gpu_rows", "repeat", "--rows", str(row), "--times", "2"]
    command = [
        NCU, "--csv", "--page", "raw", "--kernel-name", "regex:aspp", "--launch-count", "2",
        "--metrics", ",".join(METRICS),
    ]  # fmt: skip
    status, text = program([*([] if tiny(machine) else command), *inside], end)
    if status == CUT_OFF:
        raise Wrong(f"{CUT_SHORT}: no profile in time")
    found = profile_rows(text)
    if status or not (found or tiny(machine)):
        raise Wrong(f"no profile, exit status {status}: {text.strip()[-200:]}")
    return {"rows": found}


def profile_rows(text: str) -> list[dict[str, str]]:
    """The kernels in what `ncu --csv --page raw` printed: one row each, behind one of units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    header, units, *kernels = csv.reader(io.StringIO("\n".join(lines)))
    found = []
    for kernel in kernels:
        values = dict(zip(header, kernel, strict=False))
        row = {"what": values.get("Kernel Name", "")[:70]}
        for metric, name in METRICS.items():
            if metric in values:
                unit = dict(zip(header, units, strict=False))[metric]
                row[name] = f"{values[metric]} {unit}".strip()
        found.append(row)
    return found


def facts() -> dict[str, Any]:
    """The machine and what is installed on it, for whoever reads the results."""
    from deeplab_fast import _ext

    queries = {
        "gpu": "nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,power.limit,"
        "clocks.max.sm,clocks.sm,ecc.mode.current,temperature.gpu --format=csv,noheader",
        "nvcc": "nvcc --version",
        "compute-sanitizer": "compute-sanitizer --version",
        "ncu": "ncu --version",
        "processor": "grep -m1 name /proc/cpuinfo",
        "cores": "nproc",
    }
    found: dict[str, Any] = {}
    for name, command in queries.items():
        first, *rest = command.split()
        if missing(first):
            found[name] = missing(first)
            continue
        _, text = program([first, *rest], time.monotonic() + 6)
        found[name] = text.strip().rpartition("\n")[2][:200]
    for extension in (_ext.CPU, _ext.CUDA, _ext.SM90):
        found[extension.name] = "loaded" if extension.loaded else extension.reason
    cache = os.environ.get("TRITON_CACHE_DIR", "")
    found["kernels in Triton's cache"] = len(list(Path(cache).glob("*/*.cubin"))) if cache else 0
    return found
