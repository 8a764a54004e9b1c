"""`deeplab_fast.tune`: check every GPU kernel on the GPU at hand, measure it, keep the verdict.

Three phases, all in child processes (`runner`): the checks of each op on each backend, in each
dtype and form, side by side; the time of what passed beside PyTorch's forms, alone; on request the
launch configurations of what is faster. From the outcomes follow records (`dispatch.records`), by
which kernels are chosen from then on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import backends
from ..dispatch import checks, records, trust
from ..dispatch.declare import Tuned, find, is_product, steps
from ..dispatch.errors import Wrong
from ..dispatch.examples import Run, Step
from ..dispatch.records import Record
from . import configurations, speeds
from .configurations import TUNED
from .defaults import BACKENDS
from .machine import Machine, fault_of, identity, spoiled, suffer
from .runner import (
    ANSWERS,
    CRASHED,
    FAILED,
    NOT_RUN,
    PASSED,
    Budget,
    Outcome,
    Unit,
    progress,
    run,
)
from .workloads import Work

# Of one unit. A check compiles a few kernels and computes in float64 on the CPU; a hang costs all
# of it.
IDENTITY_SECONDS = 30.0
CHECK_SECONDS = 45.0
TIME_SECONDS = 40.0
COMPILE_SECONDS = 60.0
CONFIGURE_SECONDS = 60.0
# Parts of the budget: checks may take at most this much of it, times what is left of this.
_CHECK_PART = 0.5
_TIME_PART = 0.45
# Most children side by side: each has a CUDA context, of about 500 MiB.
_MOST_JOBS = 8
# The largest calls of a batch of 16, with PyTorch's form beside ours.
_CHECK_MB = 6144
CHECK_THREADS = 2
_CANDIDATES_PER_UNIT = 3


class NoDevice(RuntimeError):
    """There is no GPU to tune for; the message says why."""


@dataclass(frozen=True)
class Plan:
    """What to check and measure.

    Attributes:
        works: forms of ops at the sizes that are timed.
        backends: of BACKENDS.
        dtypes: of `checks.DTYPES`.
        budget: seconds of everything.
        jobs: checks side by side.
        quick: checks at the first two sizes of each op.
        configurations: measure launch configurations as well.
    """

    works: tuple[Work, ...]
    backends: tuple[str, ...] = BACKENDS
    dtypes: tuple[str, ...] = ("bfloat16",)
    budget: float = 120.0
    jobs: int = 0
    quick: bool = False
    configurations: bool = False


@dataclass
class Tuning:
    """What was found.

    Attributes:
        machine: the GPU.
        outcomes: of all units, in the order in which they came.
        records: that follow from them.
        path: the file that they were written to; None where they were not.
    """

    machine: Machine
    outcomes: list[Outcome] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    path: Path | None = None

    def __str__(self) -> str:
        return table(self)


def find_machine(out: Path | None = None) -> tuple[Machine, Outcome]:
    """The GPU at hand, asked by a child process.

    Raises:
        NoDevice: there is none.
    """
    unit = Unit("identity", IDENTITY_SECONDS, identity, phase="identity")
    (outcome,) = run([unit], seconds=IDENTITY_SECONDS, out=out)
    if outcome.verdict != PASSED:
        raise NoDevice(outcome.reason)
    return Machine.from_dict(outcome.result), outcome


def jobs_for(machine: Machine) -> int:
    """Children to check side by side: each computes float64 on `CHECK_THREADS` cores, and takes
    memory of the GPU."""
    cores = (os.cpu_count() or 1) // CHECK_THREADS
    room = machine.memory_mb // _CHECK_MB if machine.memory_mb else _MOST_JOBS
    return max(1, min(_MOST_JOBS, cores, room))


def tune_here(
    plan: Plan,
    *,
    out: Path | None = None,
    on_plan: Callable[[int], None] = lambda units: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Tuning:
    """Carry out a plan in this process, which must have made no CUDA context.

    Args:
        plan: what to do.
        out: file that outcomes are appended to as they come.
        on_plan: told how many units a phase adds.
        on_outcome: called with each outcome.

    Raises:
        NoDevice: there is no GPU.
    """
    budget = Budget(plan.budget)
    machine, outcome = find_machine(out)
    tuning = Tuning(machine, [outcome])
    jobs = plan.jobs or jobs_for(machine)

    def phase(units: list[Unit], seconds: float, jobs: int = 1) -> list[Outcome]:
        on_plan(len(units))
        found = run(units, seconds=seconds, jobs=jobs, out=out, on_outcome=on_outcome)
        tuning.outcomes += found
        return found

    try:
        checked = phase(check_units(machine, plan), budget.part(_CHECK_PART * plan.budget), jobs)
        timed = phase(time_units(machine, plan, checked), budget.part(_TIME_PART * plan.budget))
        if again := time_units(machine, plan, checked, apart=timed):
            phase(again, budget.left)
        if plan.configurations:
            faster = records_of(tuning.outcomes, machine)
            compiling, configuring = configuration_units(machine, plan, faster)
            phase(compiling, budget.left / 2, jobs)
            phase(configuring, budget.left)
    finally:
        tuning.records = records_of(tuning.outcomes, machine)
    return tuning


def launches(plan: Plan) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every call of a Triton kernel that the checks and times of a plan make, on the meta device,
    for a stub of Triton's driver: what it compiles is what they find compiled."""
    for op, form in forms_of(plan.works):
        implementation = backends.implementations(op).get("triton")
        if implementation is None:
            continue
        works = [work.size for work in plan.works if (work.op, work.form) == (op, form)]
        for dtype in plan.dtypes:
            if dtype == "tf32" and not is_product(op):
                continue
            for size in dict.fromkeys((*find(op).examples.sizes, *works)):
                made = steps(op, form, size, checks.DTYPES[dtype], "meta")
                for number, step in enumerate(made):
                    name = f"{op} {form} {dtype} {size} call {number}"
                    yield name, partial(_launch, step, implementation.run, dtype)


def _launch(step: Step, run: Run, dtype: str) -> None:
    with checks.precision(dtype):
        step.launch(run)


def forms_of(works: Iterable[Work]) -> list[tuple[str, str]]:
    """(op, form) of works, each once, in order."""
    return list(dict.fromkeys((work.op, work.form) for work in works))


def check_units(machine: Machine, plan: Plan) -> list[Unit]:
    """The checks: each op, backend, dtype and form that can run on the machine.

    CUDA C++ for compute capability 9.0, which can hang a multiprocessor, comes last.
    """
    found = []
    for op, form in forms_of(plan.works):
        for backend in plan.backends:
            for dtype in plan.dtypes:
                if dtype == "tf32" and not is_product(op):
                    continue
                works = [w for w in plan.works if (w.op, w.form) == (op, form)]
                if not _runnable(machine, op, backend, dtype, works):
                    continue
                name = f"check {op} {backend} {dtype} {form}"
                found.append(
                    Unit(
                        name,
                        CHECK_SECONDS,
                        partial(_check, machine, name, op, backend, dtype, form, works, plan.quick),
                        phase="check",
                        source=source(machine, op, backend),
                        facts={"op": op, "backend": backend, "dtype": dtype, "form": form},
                    )
                )
    return sorted(found, key=lambda unit: unit.facts["backend"] == "cuda")


def time_units(
    machine: Machine, plan: Plan, checked: Sequence[Outcome], apart: Sequence[Outcome] = ()
) -> list[Unit]:
    """The times of what passed its check.

    Args:
        machine, plan: what is tuned.
        checked: outcomes of `check_units`.
        apart: outcomes of units of several backends that gave no answer because one of them went
            wrong; each backend of those gets a unit of its own.
    """
    lost = {o.unit for o in apart if o.verdict in ANSWERS and o.verdict != PASSED}
    passed = {_key(o) for o in checked if o.verdict == PASSED}
    found = []
    for op, form in forms_of(plan.works):
        for dtype in plan.dtypes:
            names = [b for b in plan.backends if (op, b, dtype, form) in passed]
            unit = _time_unit(machine, plan, op, form, dtype, names)
            if names and not apart:
                found.append(unit)
            elif unit.name in lost and len(names) > 1:
                found += [
                    _time_unit(machine, plan, op, form, dtype, [b], f" {b} alone") for b in names
                ]
    return found


def configuration_units(
    machine: Machine, plan: Plan, faster: Sequence[Record]
) -> tuple[list[Unit], list[Unit]]:
    """Units that compile the candidates of what is faster than PyTorch, and that time them."""
    compiling, configuring = [], []
    for tuned in TUNED:
        for record in faster:
            if (record.op, record.backend) != (tuned.op, "triton") or not record.times:
                continue
            for work in plan.works:
                if (work.op, work.form) != (record.op, record.form):
                    continue
                facts = {
                    "op": record.op, "backend": "triton", "dtype": record.dtype,
                    "form": record.form,
                }  # fmt: skip
                about = f"{tuned.kernel} {record.op} {record.dtype} {record.form} {work.size}"
                given = (machine, tuned, work, record.dtype)
                for first in range(0, tuned.most, _CANDIDATES_PER_UNIT):
                    part = range(first, first + _CANDIDATES_PER_UNIT)
                    name = f"compile {about} {first}"
                    compiling.append(
                        Unit(
                            name,
                            COMPILE_SECONDS,
                            partial(_compile, *given, part),
                            phase="compile",
                            source=record.source,
                            facts=facts,
                        )
                    )
                name = f"configure {about}"
                configuring.append(
                    Unit(
                        name,
                        CONFIGURE_SECONDS,
                        partial(_configure, name, *given),
                        alone=True,
                        phase="configure",
                        source=record.source,
                        facts=facts,
                    )
                )
    return compiling, configuring


def source(machine: Machine, op: str, backend: str) -> str:
    """Fingerprint of what a unit depends on."""
    if machine.device != "cuda":
        return "stand-in"
    return trust.source(op, backend, machine.capability)


def records_of(outcomes: Iterable[Outcome], machine: Machine, commit: str = "") -> list[Record]:
    """The records that follow from the outcomes of checks, times and configurations.

    What was not run leaves no record, and what was timed beside a kernel that went wrong is timed
    again alone first (`time_units`).
    """
    found: dict[tuple[str, str, str, str], Record] = {}
    listed = list(outcomes)
    for o in listed:
        if o.phase != "check" or o.verdict not in ANSWERS:
            continue
        found[_key(o)] = Record(
            op=o.facts["op"],
            backend=o.facts["backend"],
            dtype=o.facts["dtype"],
            form=o.facts["form"],
            capability=machine.capability,
            source=o.source,
            verdict=records.PASSED if o.verdict == PASSED else records.FAILED,
            reason=_reason(o),
            gpu=machine.gpu,
            driver=machine.driver,
            torch=machine.torch,
            triton=machine.triton,
            date=time.strftime("%Y-%m-%d"),
            commit=commit,
            error=_number(o.result.get("error", 0.0)),
            bound=_number(o.result.get("bound", 0.0)),
        )
    for o in listed:
        if o.phase == "time":
            _add_times(found, o)
        elif o.phase == "configure" and o.verdict == PASSED and o.result.get("config"):
            if (record := found.get(_key(o))) is not None:
                config = records.Config(**o.result["config"])
                found[_key(o)] = replace(record, configs=(*record.configs, config))
    return list(found.values())


def _key(o: Outcome) -> tuple[str, str, str, str]:
    f = o.facts
    return f["op"], f["backend"], f["dtype"], f["form"]


def table(tuning: Tuning) -> str:
    """The verdicts, and the times beside PyTorch's, as text."""
    rows = [("op", "form", "dtype", "backend", "verdict", "size", "ms", "PyTorch ms", "gain")]
    for r in sorted(tuning.records, key=lambda r: (r.op, r.form, r.dtype, r.backend)):
        first = (r.op, r.form, r.dtype, r.backend, r.verdict)
        for t in r.times:
            size = "x".join(map(str, t.sizes[:4]))
            rows.append((*first, size, f"{t.ms:.4g}", f"{t.pytorch_ms:.4g}", f"{t.gain:.2f}x"))
            first = ("",) * 5
        if not r.times:
            rows.append((*first, "", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += ["", *_failures(tuning), _summary(tuning)]
    return "\n".join(lines)


def _failures(tuning: Tuning) -> Iterator[str]:
    for o in tuning.outcomes:
        if o.verdict not in (PASSED, NOT_RUN):
            yield f"{o.unit}: {o.verdict}: {o.reason}"
    if missed := [o for o in tuning.outcomes if o.verdict == NOT_RUN]:
        yield f"{len(missed)} not run, {missed[0].reason}: a larger budget runs them"


def _summary(tuning: Tuning) -> str:
    found = tuning.records
    passed = [r for r in found if r.verdict == records.PASSED]
    faster = [r for r in passed if any(t.gain >= 1 for t in r.times)]
    kept = f"; records in {tuning.path}" if tuning.path else ""
    return (
        f"{tuning.machine.gpu}: {len(found)} kernels checked, {len(passed)} passed, "
        f"{len(faster)} faster than PyTorch at some size, which run by themselves there{kept}"
    )


def _runnable(machine: Machine, op: str, backend: str, dtype: str, works: Sequence[Work]) -> bool:
    """Whether a backend can run an op in a dtype at any of the sizes that it is checked at."""
    found = backends.implementations(op).get(backend)
    if found is None or found.is_pytorch:
        return False
    form = works[0].form
    for size in (*find(op).examples.sizes, *(work.size for work in works)):
        step = steps(op, form, size, checks.DTYPES[dtype], "meta")[0]
        if not machine.reasons(op, backend, step.desc):
            return True
    return False


def _check(
    machine: Machine,
    name: str,
    op: str,
    backend: str,
    dtype: str,
    form: str,
    works: Sequence[Work],
    quick: bool,
) -> dict[str, Any]:
    """In a child: the check, then a call at each size to be timed, which compiles for it."""
    implementation = _implementation(machine, name, op, backend)
    found = checks.check(
        op,
        implementation,
        dtype,
        form,
        machine.device,
        at=find(op).examples.sizes[:2] if quick else None,
        reasons=lambda step: machine.reasons(op, backend, step.desc),
        progress=progress,
    )
    for work in works:
        speeds.check_at(op, form, work.size, dtype, machine.device, implementation, backend)
    return {"error": found.error, "bound": found.bound}


def _time_unit(
    machine: Machine,
    plan: Plan,
    op: str,
    form: str,
    dtype: str,
    names: Sequence[str],
    suffix: str = "",
) -> Unit:
    works = [w for w in plan.works if (w.op, w.form) == (op, form)]
    name = f"time {op} {dtype} {form}{suffix}"
    return Unit(
        name,
        TIME_SECONDS,
        partial(_time, machine, name, op, dtype, works, tuple(names)),
        alone=True,
        phase="time",
        source="+".join(source(machine, op, b) for b in names),
        facts={"op": op, "dtype": dtype, "form": form, "backends": list(names)},
    )


def _time(
    machine: Machine, name: str, op: str, dtype: str, works: Sequence[Work], names: Sequence[str]
) -> dict[str, Any]:
    """In a child: times at every size."""
    suffer(fault_of(name))
    found, problems = [], []
    for work in works:
        desc = steps(op, work.form, work.size, checks.DTYPES[dtype], "meta")[0].desc
        running = {
            b: _implementation(machine, f"time {op} {b}", op, b)
            for b in names
            if not machine.reasons(op, b, desc)
        }
        if not running:
            continue
        try:
            speed = speeds.compare(
                op, work.form, work.size, dtype, machine.device, running, trust.sizes(desc)
            )
        except Wrong:
            raise
        except Exception as error:
            if not checks.lacks_memory(error):
                raise
            # At one size that says nothing of the others.
            problems.append(f"{work.size}: {' '.join(str(error).split())[:200]}")
            continue
        found.append(speed.as_dict())
    if not found and problems:
        raise RuntimeError("; ".join(problems))
    return {"speeds": found, "problems": problems}


def _compile(machine: Machine, tuned: Tuned, work: Work, dtype: str, part: range) -> dict[str, Any]:
    implementation = machine.implementation(tuned.op, "triton").run
    return configurations.compiled(tuned, work, dtype, machine.device, implementation, part)


def _configure(name: str, machine: Machine, tuned: Tuned, work: Work, dtype: str) -> dict[str, Any]:
    suffer(fault_of(name))
    implementation = machine.implementation(tuned.op, "triton").run
    config, ms = configurations.fastest(tuned, work, dtype, machine.device, implementation)
    found: dict[str, Any] = {"ms": ms}
    if config is not None:
        found["config"] = {
            "kernel": config.kernel, "key": config.key, "config": config.config,
            "gain": config.gain,
        }  # fmt: skip
    return found


def _implementation(machine: Machine, unit: str, op: str, backend: str) -> Run:
    """What runs; in a rehearsal with the fault that is asked for."""
    fault = fault_of(unit)
    suffer(fault)
    found = machine.implementation(op, backend).run
    if not fault:
        return found
    if is_dataclass(found) and not isinstance(found, type):
        # Of several functions.
        each = {f.name: spoiled(getattr(found, f.name), fault) for f in fields(found)}
        return replace(found, **each)
    return spoiled(found, fault)


def _reason(o: Outcome) -> str:
    if o.verdict == PASSED:
        return ""
    return o.reason if o.verdict == FAILED else f"{o.verdict}: {o.reason}"


def _add_times(found: dict[tuple[str, str, str, str], Record], o: Outcome) -> None:
    f = o.facts
    keys = {b: (f["op"], b, f["dtype"], f["form"]) for b in f["backends"]}
    if o.verdict in (FAILED, CRASHED) and len(keys) == 1:
        # Alone, so it is this kernel that goes wrong at the sizes of models. What only took too
        # long may be PyTorch's search; without a time it is not chosen.
        (key,) = keys.values()
        if key in found:
            reason = f"while timed: {_reason(o)}"
            found[key] = replace(found[key], verdict=records.FAILED, reason=reason)
        return
    for speed in o.result.get("speeds", ()):
        plain = speed["contestants"][speed["pytorch"]]
        for backend, gain in speed["gains"].items():
            key, own = keys[backend], speed["contestants"][backend]
            if key not in found:
                continue
            timed = records.Time(
                tuple(speed["sizes"]), own["ms"], plain["ms"], speed["pytorch"], gain,
                own["peak_mb"], plain["peak_mb"],
            )  # fmt: skip
            others = [t for t in found[key].times if t.sizes != timed.sizes]
            found[key] = replace(found[key], times=(*others, timed))


def _number(value: object) -> float:
    """A number of an outcome, in which nan and inf are text."""
    try:
        number = float(str(value))
    except ValueError:
        return -1.0
    return number if abs(number) < float("inf") else -1.0
