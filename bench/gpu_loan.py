"""One run of units on a borrowed GPU: what is known, what has no answer yet, and what it plans."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deeplab_fast.dispatch import records
from deeplab_fast.dispatch.declare import find
from deeplab_fast.dispatch.examples import Size
from deeplab_fast.models import get_model
from deeplab_fast.tuning import runner, tune, workloads
from deeplab_fast.tuning.machine import Machine
from deeplab_fast.tuning.runner import NOT_RUN, PASSED, Budget, Outcome, Unit
from deeplab_fast.tuning.workloads import Work

from . import gpu_store
from .files import ROOT
from .gpu_measure import tiny
from .gpu_store import Answer, answers

# Of a unit in the first phases: a kernel that hangs costs all of it.
CHECK_SECONDS = 20.0
MEASURE_SECONDS = 30.0
# Less is not worth beginning for.
LEAST_SECONDS = 3.0

DTYPES = ("bfloat16", "float32", "float16", "tf32")
# (batch, classes, side of the logits, side of the labels).
UPSAMPLED = ((16, 21, 65, 513), (16, 21, 33, 513), (4, 150, 65, 512), (16, 150, 33, 513))
NORMED = ((16, 256, 129, 129), (16, 64, 257, 257), (16, 2048, 33, 33), (16, 256, 33, 33))


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
        started: when the whole began, by time.monotonic().
        smoke: units of that phase, once they were made: it takes a second.
    """

    def __init__(
        self,
        machine: Machine,
        out: Path,
        budget: Budget,
        known: Iterable[Answer],
        only: str = "",
        listing: bool = False,
        started: float | None = None,
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
        self.started = time.monotonic() if started is None else started
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
        if outcome.reason == runner.NO_TIME:
            return
        at = time.monotonic() - self.started
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


def plan(machine: Machine) -> tune.Plan:
    """The ops of models, at their sizes; at those of checks in a rehearsal."""
    with torch.device("meta"):
        model = get_model("deeplabv3_resnet50", output_stride=8)
    works = workloads.of_model(model, (520, 520), (1, 16))
    forms = tune.forms_of(works)
    found = [work for work in works if not _is_commonest_norm(work.op, work.form)]
    for op, form in forms:
        kernels = find(op).sources
        if _is_commonest_norm(op, form):
            found += [Work(op, form, Size(*shape)) for shape in NORMED]
        elif kernels == "upsample":
            found += [Work(op, form, Size(n, c, h, h, s, s)) for n, c, h, s in UPSAMPLED]
        elif kernels in ("branches", "project", "training"):
            found += _at_output_stride_16(found, op, form)
    if tiny(machine):
        found = [Work(op, form, find(op).examples.sizes[0]) for op, form in forms]
    return tune.Plan(tuple(dict.fromkeys(found)), dtypes=DTYPES)


def _is_commonest_norm(op: str, form: str) -> bool:
    return find(op).sources == "batch_norm" and form in ("relu", "relu+residual")


def _at_output_stride_16(works: Sequence[Work], op: str, form: str) -> list[Work]:
    """The largest of an op's works on maps of 33x33."""
    sizes = [w.size for w in works if (w.op, w.form) == (op, form)]
    size = max(sizes, key=lambda s: s.n)
    halved = tuple(rate // 2 for rate in size.rates)
    return [Work(op, form, replace(size, h=33, w=33, rates=halved))]


def nominal() -> Machine:
    """The GPU that is listed for where there is none."""
    versions = records.Versions.here()
    return Machine(
        "cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132, 81559, "", versions.torch, versions.triton
    )
