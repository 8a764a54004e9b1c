"""`python -m bench.gpu --out DIR`: what a borrowed GPU is used for in the minutes that it is here.

    --out DIR       results.jsonl, appended to as results come, a JSON object a line
    --budget N      seconds of everything (default: 520; the second: 170)
    --second        what a first run left open, and what follows from it
    --first FILE    results of the first run, where DIR has none
    --only REGEX    units whose names it matches
    --list          print the units and which have an answer already; runs nothing

Units (`deeplab_fast.tuning.runner`) run in processes of their own, so that one that hangs, crashes
or is wrong loses no other. The first run goes through PHASES, each with its part of the budget and
what those before it left; the riskiest kernels come last among those that are checked. What is left
in the end goes to what was cut off, and to the rules below.

A unit that bench/gpu_results.jsonl has an answer to, from the same sources, GPU, PyTorch and
Triton, is not run again: the next loan begins where the last one ended. `bench.apply_gpu` writes
that file.

The second run first repeats, in the order of the phases, what was not run, cut off or failed for a
reason that says nothing of the unit, with twice the time and those that were killed last and alone.
The rest goes to RULES, the follow-ups of what is known by then.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import sys
import time
import traceback

# Set where this program begins again without what it imports for its children.
_BARE = "DEEPLAB_FAST_BENCH_BARE"
_STARTED = float(os.environ.get(_BARE, time.monotonic()))
# Children share the cores; threads that spin while they wait would take them from each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterable, Iterator, Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from deeplab_fast.dispatch import records, sources  # noqa: E402
from deeplab_fast.models import get_model  # noqa: E402
from deeplab_fast.testing import import_torchvision  # noqa: E402
from deeplab_fast.tuning import checks, runner, tune, workloads  # noqa: E402
from deeplab_fast.tuning.machine import Machine, why_none  # noqa: E402
from deeplab_fast.tuning.runner import (  # noqa: E402
    NOT_RUN,
    PASSED,
    TIMED_OUT,
    Budget,
    Outcome,
    Unit,
)
from deeplab_fast.tuning.steps import Size  # noqa: E402
from deeplab_fast.tuning.workloads import Work  # noqa: E402

from . import (  # noqa: E402
    doubts,
    gpu_measure,
    gpu_ours,
    gpu_programs,
    gpu_pytorch,
    gpu_rows,
    gpu_store,
    rows,
)
from .gpu_measure import ROOT, carried_out, digest, fingerprint, tiny  # noqa: E402
from .gpu_store import Answer, answers  # noqa: E402

HERE = Path(__file__).resolve().parent
BUDGET = 520.0
SECOND_BUDGET = 170.0
# The parts below are of this many seconds.
_PLANNED = 520.0
# Of a second run for what the first left.
_LEFT_OVER_PART = 0.6
# Times the usual limit for what is repeated.
_PATIENCE = 2.0
_IDENTITY_SECONDS = 5.0
_FACTS_SECONDS = 6.0
# Of a unit in the first phases: a kernel that hangs costs all of it.
CHECK_SECONDS = 20.0
MEASURE_SECONDS = 30.0
# Of a unit that was not begun, as `runner` has it.
NO_TIME = "no time was left"
# Less is not worth beginning for.
_LEAST_SECONDS = 3.0
_CONFIGURED_SIZES = 4
# Lines of the table that is printed last; of the output a machine may keep the end alone.
_MOST_FAILURES = 24
_MOST_HEADLINES = 60

DTYPES = ("bfloat16", "float32", "float16", "tf32")
# What runs in most models, in the order in which it is measured.
_FIRST_TIMED = (
    ("aspp_branches", "plain"), ("aspp_project", "plain"), ("upsample_cross_entropy", "plain"),
    ("upsample_argmax", "plain"), ("aspp_convs", "plain"), ("aspp_convs_backward", "plain"),
    ("batch_stats", "plain"), ("bn_act", "relu"), ("bn_act_reduce", "relu"),
    ("bn_act_backward", "relu"), ("bn_act", "relu+residual"), ("conv_bn_act", "relu"),
    ("upsample_confusion", "plain"), ("upsample_softmax_add", "plain"),
)  # fmt: skip
# (batch, classes, side of the logits, side of the labels).
_UPSAMPLED = ((16, 21, 65, 513), (16, 21, 33, 513), (4, 150, 65, 512), (16, 150, 33, 513))
_NORMED = ((16, 256, 129, 129), (16, 64, 257, 257), (16, 2048, 33, 33), (16, 256, 33, 33))
_HEADS = ((16, 65, 8), (1, 65, 8), (16, 33, 16))
# (backbone, output stride, batch, side), the most telling first.
_MODELS = (("r50", 8, 1, 520), ("r50", 8, 16, 520), ("r50", 16, 16, 513), ("r101", 8, 16, 520))
_STEPS = (("r50", 16, 16, 513), ("r101", 16, 16, 513))
VARIANTS = ("nofence", "acquire_cluster")
VARIANT = "DEEPLAB_FAST_SM90_VARIANT"


class Loan:
    """One run of units on a GPU.

    Attributes:
        machine: the GPU.
        plan: the ops and sizes that are checked and measured.
        outcomes: of every unit so far, by name: of this run, and answers that hold.
        fresh: of this run, in the order in which they came.
        end: of the phase at hand, by time.monotonic().
        patience: how many times their usual limit programs have.
        listing: units are only asked for; all pass.
        smoke: units of that phase, once they were made.
    """

    def __init__(
        self,
        machine: Machine,
        out: Path,
        budget: Budget,
        known: Iterable[Answer],
        only: str = "",
        listing: bool = False,
    ) -> None:
        self.machine, self.out, self.budget = machine, out, budget
        self.known = {a.outcome.unit: a for a in known if a.machine.gpu == machine.gpu}
        self.only = re.compile(only)
        self.listing = listing
        self.outcomes: dict[str, Outcome] = {}
        self.fresh: list[Outcome] = []
        self.listed: list[tuple[str, Unit, bool]] = []
        self.end = time.monotonic() + budget.left
        self.patience = 1.0
        self.smoke: list[Unit] = []
        self.plan = plan(machine)

    @property
    def results(self) -> Path:
        """The file of outcomes."""
        return self.out / "results.jsonl"

    def pending(self, units: Iterable[Unit]) -> list[Unit]:
        """Those without an answer that holds; answers that do are taken over."""
        found = []
        for unit in units:
            if not self.only.search(unit.name):
                continue
            before = self.outcomes.get(unit.name)
            if before is not None and answers(before):
                continue
            answer = self.known.get(unit.name)
            if answer is not None and answer.holds(unit, self.machine):
                self.outcomes[unit.name] = answer.outcome
            else:
                found.append(unit)
        return found

    def phase(self, name: str, seconds: float, units: Iterable[Unit], jobs: int) -> None:
        """Run those of some units that have no answer."""
        with_harness = {gpu_store.HARNESS: gpu_store.harness()}
        every = [replace(unit, facts=unit.facts | with_harness) for unit in units]
        todo = self.pending(every)
        if self.listing:
            waiting = {unit.name for unit in todo}
            self.listed += [(name, u, u.name in waiting) for u in every if self.only.search(u.name)]
            for unit in todo:
                self.outcomes[unit.name] = Outcome(
                    unit.name, PASSED, phase=unit.phase, source=unit.source, facts=unit.facts
                )
            return
        ready = []
        for unit in todo:
            if reason := unit.facts.get("missing", ""):
                outcome = Outcome(
                    unit.name, NOT_RUN, reason, 0.0, unit.phase, unit.source, unit.facts
                )
                runner.append(self.results, outcome)
                self.came(outcome)
            else:
                ready.append(unit)
        if not ready:
            return
        print(f"== {name}: {len(ready)} units, at most {seconds:.0f} s", flush=True)
        self.end = time.monotonic() + seconds
        cores = max(2, (os.cpu_count() or 1) * 3 // 4)
        runner.run(
            ready,
            seconds=seconds,
            jobs=min(jobs, cores),
            out=self.results,
            on_outcome=self.came,
        )

    def came(self, outcome: Outcome) -> None:
        """Keep and print an outcome."""
        self.outcomes[outcome.unit] = outcome
        self.fresh.append(outcome)
        if outcome.reason == NO_TIME:
            return
        at = time.monotonic() - _STARTED
        print(
            f"{at:6.1f} s {outcome.seconds:5.1f} s  {outcome.verdict:9}  {outcome.unit}"
            f"{'  ' * bool(outcome.reason)}{outcome.reason[:90]}",
            flush=True,
        )

    def of(self, *phases: str) -> list[Outcome]:
        """The outcomes of some kinds of units."""
        return [o for o in self.outcomes.values() if o.phase in phases]

    def passed(self, name: str) -> bool:
        """Whether a unit passed."""
        return name in self.outcomes and self.outcomes[name].verdict == PASSED

    def deadline(self, limit: float) -> float:
        """When a program that begins now must be done, by time.monotonic()."""
        return min(time.monotonic() + self.patience * limit, self.end)

    def records(self) -> list[records.Record]:
        """What follows from the outcomes so far."""
        return tune.records_of(self.of("check", "time", "configure"), self.machine)

    def write_records(self) -> Path:
        """Put the records where units of whole models find them."""
        path = ROOT / "build" / "gpu-records" / f"{os.getpid()}.json"
        records.write(path, self.records())
        return path


# What is checked and measured.


def plan(machine: Machine) -> tune.Plan:
    """The ops of models, at their sizes; at those of checks in a rehearsal."""
    with torch.device("meta"):
        model = get_model("deeplabv3_resnet50", output_stride=8)
    works = workloads.of_model(model, (520, 520), (1, 16))
    forms = tune.forms_of(works)
    norms = ("batch_stats", "bn_act", "bn_act_reduce", "bn_act_backward")
    found = []
    for work in works:
        if work.op in norms and work.form in ("relu", "relu+residual"):
            continue
        found.append(work)
    for op, form in forms:
        if op in norms and form in ("relu", "relu+residual"):
            found += [Work(op, form, Size(*shape)) for shape in _NORMED]
        elif op.startswith("upsample"):
            found += [Work(op, form, Size(n, c, h, h, s, s)) for n, c, h, s in _UPSAMPLED]
        elif op.startswith("aspp"):
            found += _at_output_stride_16(found, op, form)
    if tiny(machine):
        found = [Work(op, form, checks.sizes(op)[0]) for op, form in forms]
    return tune.Plan(tuple(dict.fromkeys(found)), dtypes=DTYPES)


def _at_output_stride_16(works: Sequence[Work], op: str, form: str) -> list[Work]:
    """The largest of an op's works on maps of 33x33."""
    sizes = [w.size for w in works if (w.op, w.form) == (op, form)]
    size = max(sizes, key=lambda s: s.n)
    halved = tuple(rate // 2 for rate in size.rates)
    return [Work(op, form, replace(size, h=33, w=33, rates=halved))]


def smoke(loan: Loan) -> list[Unit]:
    """Every op, backend, dtype and form at two small sizes."""
    forms = tune.forms_of(loan.plan.works)
    works = tuple(Work(op, form, checks.sizes(op)[0]) for op, form in forms)
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
    numbers = _rows(machine)
    for row in numbers:
        for dtype in gpu_rows.DTYPES:
            for split in (False, True):
                name = f"row {row} {dtype} {'cut' if split else 'whole'}"
                run = partial(gpu_rows.check, name, machine, row, split, dtype)
                found.append(_row_unit(loan, name, run, row))
            if row in _sm90_rows():
                name = f"row {row} {dtype} few filters"
                few = (gpu_rows.FEW_FILTERS, ())
                run = partial(gpu_rows.check, name, machine, row, True, dtype, *few)
                found.append(_row_unit(loan, name, run, row))
    for row in _sm90_rows() if numbers else ():
        if row in numbers:
            name, runs = f"repeat row {row}", 1000 if _cluster(row) else 200
            found.append(
                _row_unit(loan, name, partial(gpu_rows.repeat, name, machine, row, runs), row)
            )
    found = sorted(found, key=lambda u: (_cluster(u.facts["row"]), u.facts["row"]))
    if any(row in numbers for row in _sm90_rows()):
        run = partial(gpu_rows.residency, "residency", machine)
        found.insert(0, _row_unit(loan, "residency", run, -1))
        found += [_variant_unit(loan, variant, "repeat") for variant in VARIANTS]
    return found


def _rows(machine: Machine) -> list[int]:
    """The rows that the extensions here can run on a GPU."""
    from deeplab_fast import _ext

    if not _ext.CPU.loaded:
        return []
    if tiny(machine):
        return gpu_rows.rows()
    if not _ext.CUDA.loaded:
        return []
    sm90 = machine.capability == (9, 0) and _ext.SM90.loaded
    return gpu_rows.rows(None if sm90 else 80)


def _sm90_rows() -> list[int]:
    return gpu_rows.rows(gpu_rows.SM90)


def _cluster(row: int) -> bool:
    from deeplab_fast.ops import _aspp_cuda

    return row >= 0 and _aspp_cuda.tiles()[row].cluster > 1


def _row_unit(loan: Loan, name: str, run: Callable[[], dict[str, Any]], row: int) -> Unit:
    return Unit(
        name,
        CHECK_SECONDS,
        run,
        phase="rows",
        source=tune.source(loan.machine, "aspp_branches", "cuda"),
        facts={"row": row},
    )


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
    return replace(
        _row_unit(loan, name, partial(carried_out, name, run), -1),
        limit=MEASURE_SECONDS,
        alone=what == "time",
        facts=facts,
    )


def pytorch_units(loan: Loan) -> list[Unit]:
    """What PyTorch reaches, without compilation."""
    found = [_pytorch(loan, "ceilings", gpu_pytorch.ceilings)]

    def heads(given: Sequence[tuple[int, int, int]]) -> None:
        for batch, side, output_stride in given:
            name = f"head b{batch} {side}x{side}"
            found.append(_pytorch(loan, name, gpu_pytorch.head, batch, side, output_stride))

    def convolutions(batch: int, side: int) -> None:
        rates = gpu_pytorch.rates_of(8 if side == 65 else 16)
        name = f"convolution b{batch} {side}x{side}"
        found.append(_pytorch(loan, name, gpu_pytorch.convolutions, batch, side, rates))

    def models(given: Sequence[tuple[str, int, int, int]]) -> None:
        for one in given:
            found.append(_pytorch(loan, f"model {_model_name(*one)}", gpu_pytorch.model, *one))

    def steps(given: Sequence[tuple[str, int, int, int]]) -> None:
        for one in given:
            found.append(
                _pytorch(loan, f"training {_model_name(*one)}", gpu_pytorch.training, *one)
            )

    heads(_HEADS[:2])
    models(_MODELS[:1])
    convolutions(16, 65)
    models(_MODELS[1:2])
    steps(_STEPS[:1])
    convolutions(1, 65)
    for one in _UPSAMPLED:
        name = "upsampling b{} {} classes {} to {}".format(*one)
        found.append(_pytorch(loan, name, gpu_pytorch.upsampling, *one))
    for shape in _NORMED:
        name = f"batch norm {'x'.join(map(str, shape))}"
        found.append(_pytorch(loan, name, gpu_pytorch.batch_norm, *shape))
    heads(_HEADS[2:])
    convolutions(16, 33)
    convolutions(1, 33)
    models(_MODELS[2:])
    steps(_STEPS[1:])
    return found


def _model_name(backbone: str, output_stride: int, batch: int, side: int) -> str:
    return f"{backbone} os{output_stride} b{batch} {side}"


def _pytorch(loan: Loan, what: str, function: Callable[..., dict[str, Any]], *args: Any) -> Unit:
    name = f"pytorch {what}"
    return Unit(
        name,
        MEASURE_SECONDS,
        partial(carried_out, name, partial(function, loan.machine, *args)),
        alone=True,
        least=_LEAST_SECONDS,
        phase="pytorch",
        source=fingerprint(HERE / "gpu_pytorch.py"),
    )


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

    limited = (replace(u, limit=MEASURE_SECONDS, least=_LEAST_SECONDS) for u in units)
    return sorted(limited, key=order)


def _right(loan: Loan) -> list[Outcome]:
    """The checks; one that failed at all sizes did not pass at two."""
    wrong = {
        o.unit.removeprefix("full ")
        for o in loan.of("check")
        if o.unit.startswith("full ") and answers(o) and o.verdict != PASSED
    }
    return [o for o in loan.of("check") if o.unit not in wrong and not o.unit.startswith("full ")]


def model_units(loan: Loan) -> list[Unit]:
    """Whole models by the records so far: inference, and a training step."""
    recorded = None if loan.listing else loan.write_records()
    winners = "\n".join(
        sorted(
            f"{r.op} {r.backend} {r.dtype} {r.form} {r.source}"
            for r in loan.records()
            if r.verdict == records.PASSED and any(t.gain >= 1 for t in r.times)
        )
    )
    package = (ROOT / "deeplab_fast").glob("*/*.py"), (ROOT / "kernels").glob("*.py")
    files = [HERE / "gpu_ours.py", *sorted(path for found in package for path in found)]
    # Of the package as a whole, and of the kernels that run in it.
    source = f"{fingerprint(*files)}-{digest(winners)}"
    found = []
    for kind, function, given in (
        ("labels", gpu_ours.model, _MODELS[:2]),
        ("training", gpu_ours.training, _STEPS[:1]),
        ("labels", gpu_ours.model, _MODELS[2:]),
        ("training", gpu_ours.training, _STEPS[1:]),
    ):
        for one in given:
            name = f"ours {kind} {_model_name(*one)}"
            run = partial(function, loan.machine, recorded, *one)
            found.append(
                Unit(
                    name,
                    MEASURE_SECONDS,
                    partial(carried_out, name, run),
                    alone=True,
                    least=_LEAST_SECONDS,
                    phase="ours",
                    source=source,
                )
            )
    return found


def test_units(loan: Loan) -> list[Unit]:
    """The GPU tests file by file; what compiles for max-autotune meanwhile, for its unit."""
    files = gpu_programs.test_files()
    warm = _autotune(loan, *_HEADS[0], warm=True)
    found = [] if loan.passed(_autotune(loan, *_HEADS[0]).name) else [warm]
    for part in (gpu_programs.MAIN, *(p for p in gpu_programs.PARTS if p != "large"), "large"):
        for file in files:
            if part in gpu_programs.parts_of(file):
                found.append(_test(loan, file, part))
    return found


def _test(loan: Loan, file: str, part: str) -> Unit:
    name = f"tests {file} {part}"
    limit = 90.0

    def run() -> dict[str, Any]:
        return gpu_programs.tests(file, part, loan.deadline(limit))

    prints = [sources.of_files([gpu_programs.TESTS / f"{file}.py"])]
    for op in _tested(file):
        prints += [tune.source(loan.machine, op, backend) for backend in tune.BACKENDS]
    return Unit(
        name,
        limit,
        partial(carried_out, name, run),
        alone=part == "large",
        least=5.0,
        phase="tests",
        source=digest("\n".join(prints)),
    )


def _tested(file: str) -> tuple[str, ...]:
    """The ops that a file of GPU tests is about; all, where its name does not tell."""
    aspp = ("aspp_branches", "aspp_project", "conv_bn_act")
    about = {
        "test_aspp_training": ("aspp_convs", "aspp_convs_backward"),
        "test_aspp": aspp,
        "test_conv": aspp,
        "test_batch_norm": ("batch_stats", "bn_act", "bn_act_reduce", "bn_act_backward"),
    }
    about["test_upsample"] = tuple(op for op in workloads.OPS if op.startswith("upsample"))
    return next((ops for start, ops in about.items() if file.startswith(start)), workloads.OPS)


def sanitizer_units(loan: Loan) -> list[Unit]:
    """compute-sanitizer's tools over all ops, and over forced rows of the ASPP."""
    found = []
    machine = loan.machine
    reason = "" if tiny(machine) else gpu_programs.missing("compute-sanitizer")
    rows_there = any(row in _rows(machine) for row in _sm90_rows()) if _rows(machine) else False
    for tool in gpu_programs.TOOLS:
        for what in ("cuda", "rows", "triton"):
            if what == "rows" and not rows_there:
                continue
            found.append(_sanitizer(loan, tool, what, reason))
    return found


def _sanitizer(loan: Loan, tool: str, what: str, missing: str) -> Unit:
    name, limit = f"{tool} {what}", 68.0

    def run() -> dict[str, Any]:
        return gpu_programs.sanitizer(loan.machine, tool, what, loan.deadline(limit))

    ops = ("aspp_branches",) if what == "rows" else tuple(dict(tune.forms_of(loan.plan.works)))
    backend = "triton" if what == "triton" else "cuda"
    prints = [tune.source(loan.machine, op, backend) for op in ops]
    return Unit(
        name,
        limit,
        partial(carried_out, name, run),
        least=5.0,
        phase="sanitizer",
        source=digest("\n".join(prints)),
        facts={"missing": missing} if missing else {},
    )


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
    return [*needed, *(replace(u, least=_LEAST_SECONDS) for u in configuring)]


def autotuned(loan: Loan) -> list[Unit]:
    """The head by torch.compile with max-autotune."""
    return [_autotune(loan, *_HEADS[0])]


def _autotune(loan: Loan, batch: int, side: int, output_stride: int, warm: bool = False) -> Unit:
    what = f"autotuned head b{batch} {side}x{side}"
    given = (batch, side, output_stride, warm)
    unit = _pytorch(loan, what, gpu_pytorch.autotuned_head, *given)
    if warm:
        name = f"compile {what}"
        # What it makes is found in Triton's cache; as an answer it says nothing.
        return replace(unit, name=name, limit=170.0, alone=False, phase="compile", least=20.0)
    return replace(unit, limit=200.0, least=20.0)


def variant_times(loan: Loan) -> list[Unit]:
    """The variants of the sm_90a code that are right, beside the default."""
    right = [v for v in VARIANTS if loan.passed(f"variant {v}")]
    return [_variant_unit(loan, v, "time") for v in (*right, *["default"] * bool(right))]


def row_times(loan: Loan) -> list[Unit]:
    """The rows of sm_90a that are right, whole and cut."""
    numbers = (
        [
            row
            for row in _sm90_rows()
            if loan.passed(f"row {row} bfloat16 whole") and loan.passed(f"row {row} bfloat16 cut")
        ]
        if _rows(loan.machine)
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
    for unit in row_times(loan):
        row = unit.facts["row"]
        if row not in _sm90_rows()[:2]:
            continue
        name = f"profile row {row}"
        run = partial(_profile, loan, row)
        facts = {"row": row} | ({"missing": reason} if reason else {})
        found.append(replace(unit, name=name, run=partial(carried_out, name, run), facts=facts))
    return found


def _profile(loan: Loan, row: int) -> dict[str, Any]:
    return gpu_programs.profile(loan.machine, row, loan.deadline(MEASURE_SECONDS))


def more_autotuned(loan: Loan) -> list[Unit]:
    """The other heads whose branches are faster by ours."""
    gains = doubts.Known(loan.outcomes.values()).gains("time aspp_branches bfloat16 plain")
    found = []
    for batch, side, output_stride in _HEADS[1:]:
        own = [g for size, g in gains.items() if size.startswith(f"{batch}x2048x{side}x{side}")]
        if loan.listing or any(max(g.values(), default=0) >= 1 for g in own):
            found.append(_autotune(loan, batch, side, output_stride))
    return found


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: in the log.
        about: one line, for people.
        seconds: its part of a budget of 520.
        units: of a loan, with what it knows by then.
        jobs: units side by side, but for those that run alone.
    """

    name: str
    about: str
    seconds: float
    units: Callable[[Loan], list[Unit]]
    jobs: int = 1


PHASES = (
    Phase("smoke", "every op, backend, dtype and form at small sizes", 38, smoke, 12),
    Phase("rows", "every tile row of the CUDA ASPP, identical runs, variants", 16, row_units, 12),
    Phase("pytorch", "what PyTorch reaches without compilation", 75, pytorch_units),
    Phase("times", "our kernels beside PyTorch's, bf16", 75, time_units),
    Phase("models", "whole models and training steps by the records", 45, model_units),
    Phase("tests", "the GPU tests by file", 90, test_units, 6),
    Phase("sanitizer", "compute-sanitizer on small shapes", 56, sanitizer_units, 5),
    Phase("configurations", "of ASPP and 1x1 at four shapes", 80, first_configurations, 14),
    Phase("autotune", "torch.compile with max-autotune, one head", 40, autotuned),
)  # fmt: skip
# (name, what is known -> what is done).
RULES = (
    Phase("variants", "a variant of the sm_90a code is right: its time beside the default's", 0,
          variant_times),
    Phase("row times", "a row of sm_90a is right, whole and cut: its time at three shapes", 0,
          row_times),
    Phase("autotune", "our branches are faster at a shape: max-autotune of the head there", 0,
          more_autotuned),
    Phase("full", "an op is right at two small sizes: all its sizes", 0, full_checks, 12),
    Phase("dtypes", "an op is right in fp16, fp32 or TF32: its times there", 0, more_times),
    Phase("configurations", "a Triton kernel is faster than PyTorch: its configurations at all "
          "sizes", 0, more_configurations, 14),
    Phase("profiles", "a row of sm_90a is right: what limits it, by ncu", 0, profiles),
)  # fmt: skip


def units_of(phase: Phase, loan: Loan) -> list[Unit]:
    """The units of a phase; one that cannot be planned must not end the others."""
    try:
        return phase.units(loan)
    except Exception:
        if loan.listing:
            raise
        print(f"{phase.name}: cannot be planned\n{traceback.format_exc()}", flush=True)
        return []


def first(loan: Loan) -> None:
    """All phases, then what was cut off, then the rules."""
    scale = loan.budget.seconds / _PLANNED
    for phase in PHASES:
        part = loan.budget.left if loan.listing else loan.budget.part(phase.seconds * scale)
        loan.phase(phase.name, part, units_of(phase, loan), phase.jobs)
    if not loan.listing:
        left_over(loan, loan.budget.left)
    follow(loan)


def second(loan: Loan) -> None:
    """What has no answer, then the rules."""
    left_over(loan, loan.budget.left * _LEFT_OVER_PART, again=True)
    follow(loan)
    left_over(loan, loan.budget.left)


def left_over(loan: Loan, seconds: float, again: bool = False) -> None:
    """The units of all phases without an answer.

    Args:
        loan: the run.
        seconds: for all of them.
        again: give them twice the time, and those that were killed before run alone, last.
    """
    end = time.monotonic() + seconds
    killed: list[Unit] = []
    loan.patience = _PATIENCE if again else 1.0
    for phase in PHASES:
        units = units_of(phase, loan)
        if again:
            units = [replace(u, limit=_PATIENCE * u.limit) for u in units]
            hung = {u.name for u in loan.pending(units) if _was_killed(loan, u)}
            killed += [replace(u, alone=True) for u in units if u.name in hung]
            units = [u for u in units if u.name not in hung]
        if (left := end - time.monotonic()) > _LEAST_SECONDS:
            loan.phase(f"{phase.name}, what is left", left, units, phase.jobs)
    if killed and (left := end - time.monotonic()) > _LEAST_SECONDS:
        loan.phase("what was killed before", left, killed, 1)


def _was_killed(loan: Loan, unit: Unit) -> bool:
    answer = loan.known.get(unit.name)
    return answer is not None and answer.outcome.verdict == TIMED_OUT


def follow(loan: Loan) -> None:
    """The rules, as far as there is time."""
    for rule in RULES:
        left = loan.budget.left
        if loan.listing or left > _LEAST_SECONDS:
            loan.phase(f"{rule.name}: {rule.about}", left, units_of(rule, loan), rule.jobs)


# What is printed last.


def table(loan: Loan) -> str:
    """Headline ratios and failures, last what a reader must know; at most some 100 lines."""
    lines = ["", f"{loan.machine.gpu}: {loan.machine.torch}, Triton {loan.machine.triton}", ""]
    lines += list(_headlines(loan))[:_MOST_HEADLINES]
    lines += ["", "doubts:"]
    lines += [f"  {s.doubt.name}: {s.answer} ({s.detail})" for s in _settled(loan)]
    lines += ["", *_counts(loan), "", *_failures(loan)]
    return "\n".join(lines)


def _settled(loan: Loan) -> list[doubts.Settled]:
    return doubts.settled(loan.outcomes.values())


def _headlines(loan: Loan) -> Iterator[str]:
    for o in loan.of("ours", "pytorch"):
        if o.phase == "pytorch" and not o.unit.startswith(("pytorch ceil", "pytorch auto")):
            continue
        for row in o.result.get("rows", ()):
            if "ms" in row:
                facts = ("tflops", "gb_per_s", "peak_mb", "device_ms", "wall_over_device")
                more = "".join(f", {f} {row[f]:.4g}" for f in facts if f in row)
                yield f"{row['what']}: {row['ms']:.4g} ms{more}"
    for o in loan.of("time"):
        if o.facts.get("dtype") != DTYPES[0]:
            continue
        for speed in o.result.get("speeds", ()):
            size = "x".join(map(str, speed["sizes"][:4]))
            plain = speed["contestants"][speed["pytorch"]]["ms"]
            gains = ", ".join(f"{b} {g:.2f}x" for b, g in speed["gains"].items())
            yield f"{o.facts['op']} {o.facts['form']} {size}: PyTorch {plain:.3g} ms, {gains}"


def _counts(loan: Loan) -> Iterator[str]:
    phases = dict.fromkeys(o.phase for o in loan.outcomes.values())
    for phase in phases:
        own = [o for o in loan.of(phase)]
        verdicts = dict.fromkeys(o.verdict for o in own)
        counted = ", ".join(f"{sum(o.verdict == v for o in own)} {v}" for v in verdicts)
        seconds = sum(o.seconds for o in own if o in loan.fresh)
        yield f"{phase}: {counted}; {seconds:.0f} s of processes"


def _failures(loan: Loan) -> Iterator[str]:
    # What only fills caches is counted above.
    every = [o for o in loan.outcomes.values() if o.phase != "compile"]
    bad = [o for o in every if o.verdict not in (PASSED, NOT_RUN)]
    if len(bad) > _MOST_FAILURES:
        yield f"the last {_MOST_FAILURES} of {len(bad)}:"
    for o in bad[-_MOST_FAILURES:]:
        yield f"{o.unit}: {o.verdict}: {o.reason[:160]}"
    missed = [o for o in every if o.verdict == NOT_RUN]
    yield f"{len(bad)} did not pass, {len(missed)} were not run"


def listed(loan: Loan) -> str:
    """Units by phase, with a mark where there is an answer."""
    lines, before = [], ""
    for phase, unit, waiting in loan.listed:
        if phase != before:
            lines.append(f"{phase}")
            before = phase
        lines.append(f"  {' ' if waiting else 'x'} {unit.name}")
    count = sum(waits for _, _, waits in loan.listed)
    lines.append(f"{count} of {len(loan.listed)} units wait for an answer")
    return "\n".join(lines)


def nominal() -> Machine:
    """The GPU that is listed for where there is none."""
    versions = records.Versions.here()
    return Machine(
        "cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132, 81559, "", versions.torch, versions.triton
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, 1 where a unit did not pass, 2 where there is no GPU, 130 where it was ended."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--second", action="store_true")
    parser.add_argument("--first", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--store", type=Path, default=gpu_store.STORE, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    seconds = options.budget or (SECOND_BUDGET if options.second else BUDGET)
    try:
        re.compile(options.only)
        known = gpu_store.read_answers(options.store) if options.store.is_file() else []
        earlier = [options.out / "results.jsonl", options.first]
        for path in [p for p in earlier if options.second and p and p.is_file()]:
            known = gpu_store.merged(known, gpu_store.read_answers(path))
    except (re.error, ValueError, OSError) as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    if options.list:
        loan = Loan(nominal(), options.out, Budget(0), known, options.only, listing=True)
        first(loan)
        print(listed(loan))
        return 0
    if reason := why_none():
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupted)
    if _BARE not in os.environ:
        preload()
    # What the imports took is part of it.
    budget = Budget(seconds - (time.monotonic() - _STARTED))
    try:
        machine, _ = tune.find_machine()
    except tune.NoDevice as error:
        print(f"bench.gpu: {error}", file=sys.stderr, flush=True)
        if _BARE in os.environ or torch.version.cuda is None:
            return 2
        # One of the imports may have touched the driver, which forks then cannot.
        print("bench.gpu: once more, without imports beforehand", file=sys.stderr, flush=True)
        os.environ[_BARE] = str(_STARTED)
        given = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *given])
    loan = Loan(machine, options.out, budget, known, options.only)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    commit, dirty = rows.checkout()
    here = gpu_store.run_outcome(
        machine, now, commit + " with changes" * (dirty == "yes"), second=options.second
    )
    runner.append(loan.results, here)
    status = 0
    try:
        # The plan above is part of it.
        part = budget.part(_IDENTITY_SECONDS * budget.seconds / _PLANNED)
        loan.phase("identity", max(part, _FACTS_SECONDS), [_facts()], 1)
        (second if options.second else first)(loan)
    except KeyboardInterrupt:
        print("ended before its time", flush=True)
        status = 130
    assert not torch.cuda.is_initialized(), "a CUDA context in the process that forks"
    print(table(loan), flush=True)
    bad = [o for o in loan.fresh if o.verdict not in (PASSED, NOT_RUN)]
    return status or int(bool(bad))


def preload() -> None:
    """Import once what children would each import: it makes no CUDA context."""
    from deeplab_fast.kernels import _compat

    for name in ("aspp", "aspp_training", "batch_norm", "conv", "upsample"):
        # Units say what is missing.
        with suppress(RuntimeError):
            _compat.device_module(f"{name}_kernels")
    with suppress(ImportError):
        _ = import_torchvision().models.segmentation


def _facts() -> Unit:
    return Unit(
        "facts", _FACTS_SECONDS, partial(carried_out, "facts", gpu_programs.facts), phase="facts"
    )


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
