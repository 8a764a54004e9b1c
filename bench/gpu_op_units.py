"""Units of a loan about the ops of this package: checks, rows of tiles, times, configurations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from deeplab_fast import _ext
from deeplab_fast.dispatch.declare import find
from deeplab_fast.ops import aspp_cuda
from deeplab_fast.tuning import tune
from deeplab_fast.tuning.machine import Machine
from deeplab_fast.tuning.runner import PASSED, Outcome, Unit
from deeplab_fast.tuning.workloads import Work

from . import gpu_measure, gpu_programs, gpu_rows
from .files import ROOT
from .gpu_loan import CHECK_SECONDS, DTYPES, LEAST_SECONDS, MEASURE_SECONDS, Loan
from .gpu_measure import tiny, unit
from .gpu_store import answers

_CONFIGURED_SIZES = 4
# What runs in most models, in the order in which it is measured.
_FIRST_TIMED = (
    ("aspp_branches", "plain"), ("aspp_project", "plain"), ("upsample_cross_entropy", "plain"),
    ("upsample_argmax", "plain"), ("aspp_convs", "plain"), ("aspp_convs_backward", "plain"),
    ("batch_stats", "plain"), ("bn_act", "relu"), ("bn_act_reduce", "relu"),
    ("bn_act_backward", "relu"), ("bn_act", "relu+residual"), ("conv_bn_act", "relu"),
    ("fold_filters", "float32"), ("fold_filters", "half"),
    ("upsample_confusion", "plain"), ("upsample_softmax_add", "plain"),
)  # fmt: skip
VARIANTS = ("nofence", "acquire_cluster")
VARIANT = "DEEPLAB_FAST_SM90_VARIANT"


def smoke(loan: Loan) -> list[Unit]:
    """Every op, backend, dtype and form at two small sizes."""
    forms = tune.forms_of(loan.plan.works)
    works = tuple(Work(op, form, find(op).examples.sizes[0]) for op, form in forms)
    if not loan.smoke:
        loan.smoke = tune.check_units(loan.machine, replace(loan.plan, works=works, quick=True))
    return sorted((replace(u, limit=CHECK_SECONDS) for u in loan.smoke), key=_risk)


def _risk(unit: Unit) -> tuple[int, int]:
    """What can hang a multiprocessor comes last; what models run comes first."""
    op, backend, dtype = (unit.facts[k] for k in ("op", "backend", "dtype"))
    risk = 0 if backend == "triton" else 1 + (op in ("aspp_branches", "aspp_project"))
    return risk, DTYPES.index(dtype)


def full_checks(loan: Loan) -> list[Unit]:
    """All sizes of what passed at two."""
    units = tune.check_units(loan.machine, loan.plan)
    return [
        replace(unit, name=f"full {unit.name}", run=unit.run, limit=tune.CHECK_SECONDS)
        for unit in sorted(units, key=_risk)
        if loan.passed(unit.name)
    ]


def row_units(loan: Loan) -> list[Unit]:
    """Every row of the table of tiles of the CUDA ASPP; those of sm_90a, and clusters, last."""
    machine = loan.machine
    found: list[Unit] = []
    numbers = rows_here(machine)
    for row in numbers:
        for dtype in gpu_rows.DTYPES:
            for split in (False, True):
                name = f"row {row} {dtype} {'cut' if split else 'whole'}"
                run = partial(gpu_rows.check, name, machine, row, split, dtype)
                found.append(_row_unit(loan, name, run, row))
            if row in sm90_rows():
                name = f"row {row} {dtype} few filters"
                few = (gpu_rows.FEW_FILTERS, ())
                run = partial(gpu_rows.check, name, machine, row, True, dtype, *few)
                found.append(_row_unit(loan, name, run, row))
    for row in sm90_rows() if numbers else ():
        if row in numbers:
            name, runs = f"repeat row {row}", 1000 if _cluster(row) else 200
            found.append(
                _row_unit(loan, name, partial(gpu_rows.repeat, name, machine, row, runs), row)
            )
    found = sorted(found, key=lambda u: (_cluster(u.facts["row"]), u.facts["row"]))
    if any(row in numbers for row in sm90_rows()):
        run = partial(gpu_rows.residency, "residency", machine)
        found.insert(0, _row_unit(loan, "residency", run, -1))
        found += [_variant_unit(loan, variant, "repeat") for variant in VARIANTS]
    return found


def rows_here(machine: Machine) -> list[int]:
    """The rows that the extensions here can run on a GPU."""
    if not _ext.CPU.loaded:
        return []
    if tiny(machine):
        return gpu_rows.rows()
    if not _ext.CUDA.loaded:
        return []
    sm90 = machine.capability == (9, 0) and _ext.SM90.loaded
    return gpu_rows.rows(None if sm90 else 80)


def sm90_rows() -> list[int]:
    """The rows of the table that are code for sm_90a."""
    return gpu_rows.rows(gpu_rows.SM90)


def _cluster(row: int) -> bool:
    return row >= 0 and aspp_cuda.tiles()[row].cluster > 1


def _row_unit(loan: Loan, name: str, run: Callable[[], dict[str, Any]], row: int) -> Unit:
    source, facts = _row_source(loan), {"row": row}
    return Unit(name, CHECK_SECONDS, run, phase="rows", source=source, facts=facts)


def _row_source(loan: Loan) -> str:
    return tune.source(loan.machine, "aspp_branches", "cuda")


def _variant_unit(loan: Loan, variant: str, what: str) -> Unit:
    """A variant of the sm_90a code, in a program of its own."""
    command = [sys.executable, "-m", "bench.gpu_rows", what]
    if what == "repeat":
        command += ["--times", "200"]
    name = f"variant {variant}" + (" time" if what == "time" else "")
    environment = {VARIANT: "" if variant == "default" else variant}

    def run() -> dict[str, Any]:
        return gpu_measure.answered(command, loan.deadline(MEASURE_SECONDS), environment)

    facts: dict[str, Any] = {"row": -1}
    package = ROOT / "deeplab_fast"
    built = variant == "default" or any(package.glob(f"_C_sm90_{variant}.*.so"))
    if not built and not tiny(loan.machine):
        facts["missing"] = f"variant {variant} was not built"
    alone, source = what == "time", _row_source(loan)
    return unit(name, run, MEASURE_SECONDS, "rows", alone=alone, source=source, facts=facts)


def time_units(loan: Loan) -> list[Unit]:
    """The times of what passed its checks, in bf16; those that most models run first."""
    return _time_units(loan, DTYPES[:1])


def more_times(loan: Loan) -> list[Unit]:
    """The times in the other dtypes."""
    return _time_units(loan, DTYPES[1:])


def _time_units(loan: Loan, dtypes: tuple[str, ...]) -> list[Unit]:
    chosen = replace(loan.plan, dtypes=dtypes)
    checked = _right(loan)
    units = tune.time_units(loan.machine, chosen, checked)
    timed = [o for o in loan.of("time") if len(o.facts["backends"]) > 1]
    if lost := [o for o in timed if answers(o) and o.verdict != PASSED]:
        units += tune.time_units(loan.machine, chosen, checked, apart=lost)

    def order(unit: Unit) -> int:
        form = unit.facts["op"], unit.facts["form"]
        return _FIRST_TIMED.index(form) if form in _FIRST_TIMED else len(_FIRST_TIMED)

    limited = (replace(u, limit=MEASURE_SECONDS, least=LEAST_SECONDS) for u in units)
    return sorted(limited, key=order)


def _right(loan: Loan) -> list[Outcome]:
    """The checks; one that failed at all sizes did not pass at two."""
    wrong = {
        o.unit.removeprefix("full ")
        for o in loan.of("check")
        if o.unit.startswith("full ") and answers(o) and o.verdict != PASSED
    }
    return [o for o in loan.of("check") if o.unit not in wrong and not o.unit.startswith("full ")]


def first_configurations(loan: Loan) -> list[Unit]:
    """Launch configurations of the ASPP and of 1x1 convolutions at four shapes."""
    wanted = (("aspp_branches", "plain"), ("aspp_project", "plain"), ("conv_bn_act", "relu"))
    works = []
    for op, form in wanted:
        own = [w for w in loan.plan.works if (w.op, w.form) == (op, form)]
        own.sort(key=lambda w: w.size.n * w.size.c * w.size.h * w.size.w, reverse=True)
        works += own[:1] if op != "aspp_branches" else [own[0], own[-1]]
    return _configurations(loan, works[:_CONFIGURED_SIZES], least_gain=0.8)


def more_configurations(loan: Loan) -> list[Unit]:
    """Those of every kernel that was faster than PyTorch, at all sizes."""
    return _configurations(loan, loan.plan.works, least_gain=1.0)


def _configurations(loan: Loan, works: Sequence[Work], least_gain: float) -> list[Unit]:
    if tiny(loan.machine):
        # What stands in for Triton has none; tests/launch carries these units out.
        return []
    faster = [
        r
        for r in loan.records()
        if r.dtype == DTYPES[0] and any(t.gain >= least_gain for t in r.times)
    ]
    chosen = replace(loan.plan, works=tuple(works), dtypes=DTYPES[:1])
    compiling, configuring = tune.configuration_units(loan.machine, chosen, faster)
    todo = {u.name.removeprefix("configure ") for u in loan.pending(configuring)}
    needed = [u for u in compiling if u.name.removeprefix("compile ").rpartition(" ")[0] in todo]
    return [*needed, *(replace(u, least=LEAST_SECONDS) for u in configuring)]


def variant_times(loan: Loan) -> list[Unit]:
    """The variants of the sm_90a code that are right, beside the default."""
    right = [v for v in VARIANTS if loan.passed(f"variant {v}")]
    return [_variant_unit(loan, v, "time") for v in (*right, *["default"] * bool(right))]


def row_times(loan: Loan) -> list[Unit]:
    """The rows of sm_90a that are right, whole and cut."""
    numbers = (
        [
            row
            for row in sm90_rows()
            if loan.passed(f"row {row} bfloat16 whole") and loan.passed(f"row {row} bfloat16 cut")
        ]
        if rows_here(loan.machine)
        else []
    )
    found = []
    for row in numbers:
        name = f"time row {row}"
        run = partial(gpu_rows.timed, name, loan.machine, [row])
        found.append(replace(_row_unit(loan, name, run, row), limit=MEASURE_SECONDS, alone=True))
    return found


def profiles(loan: Loan) -> list[Unit]:
    """What limits the rows of sm_90a that are right, by ncu."""
    reason = "" if tiny(loan.machine) else gpu_programs.missing(gpu_programs.NCU)
    found = []
    for row in [u.facts["row"] for u in row_times(loan)]:
        if row in sm90_rows()[:2]:
            run, facts = partial(_profile, loan, row), {"row": row}
            if reason:
                facts["missing"] = reason
            more = {"alone": True, "source": _row_source(loan), "facts": facts}
            found.append(unit(f"profile row {row}", run, MEASURE_SECONDS, "rows", **more))
    return found


def _profile(loan: Loan, row: int) -> dict[str, Any]:
    return gpu_programs.profile(loan.machine, row, loan.deadline(MEASURE_SECONDS))
