"""`python -m bench.gpu --out DIR`: what a borrowed GPU is used for in the minutes that it is here.

    --out DIR       results.jsonl, appended to as results come, a JSON object a line
    --budget N      seconds of everything (default: 520; the second: 170)
    --second        what a first run left open, and what follows from it
    --first FILE    results of the first run, where DIR has none
    --only REGEX    units whose names it matches
    --list          print the units and which have an answer already; runs nothing

Units (`deeplab_fast.tuning.runner`) run in processes of their own, so that one that hangs, crashes
or is wrong loses no other. The first run goes through the phases of `gpu_units`, each with its part
of the budget and what those before it left; the riskiest kernels come last among those that are
checked. What is left in the end goes to what was cut off, and to the rules there.

A unit that bench/gpu_results.jsonl has an answer to, from the same sources, GPU, PyTorch and
Triton, is not run again: the next loan begins where the last one ended. `bench.apply_gpu` writes
that file.

The second run first repeats, in the order of the phases, what was not run, cut off or failed for a
reason that says nothing of the unit, with twice the time and those that were killed last and alone.
The rest goes to the rules, the follow-ups of what is known by then.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import sys
import time

# Set where this program begins again without what it imports for its children.
_BARE = "DEEPLAB_FAST_BENCH_BARE"
_STARTED = float(os.environ.get(_BARE, time.monotonic()))
# Children share the cores; threads that spin while they wait would take them from each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from types import FrameType  # noqa: E402

import torch  # noqa: E402

from deeplab_fast.testing import import_torchvision  # noqa: E402
from deeplab_fast.tuning import runner, tune  # noqa: E402
from deeplab_fast.tuning.machine import why_none  # noqa: E402
from deeplab_fast.tuning.runner import NOT_RUN, PASSED, TIMED_OUT, Budget, Unit  # noqa: E402

from . import gpu_programs, gpu_store, rows  # noqa: E402
from .files import ROOT  # noqa: E402
from .gpu_loan import LEAST_SECONDS, Loan, nominal  # noqa: E402
from .gpu_measure import unit  # noqa: E402
from .gpu_summary import listed, table  # noqa: E402
from .gpu_units import PHASES, RULES, units_of  # noqa: E402

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
        if (left := end - time.monotonic()) > LEAST_SECONDS:
            loan.phase(f"{phase.name}, what is left", left, units, phase.jobs)
    if killed and (left := end - time.monotonic()) > LEAST_SECONDS:
        loan.phase("what was killed before", left, killed, 1)


def _was_killed(loan: Loan, unit: Unit) -> bool:
    answer = loan.known.get(unit.name)
    return answer is not None and answer.outcome.verdict == TIMED_OUT


def follow(loan: Loan) -> None:
    """The rules, as far as there is time."""
    for rule in RULES:
        left = loan.budget.left
        if loan.listing or left > LEAST_SECONDS:
            loan.phase(f"{rule.name}: {rule.about}", left, units_of(rule, loan), rule.jobs)


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
    loan = Loan(machine, options.out, budget, known, options.only, started=_STARTED)
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
    from deeplab_fast.kernels import launch

    for name in ("aspp", "aspp_training", "batch_norm", "conv", "upsample"):
        # Units say what is missing.
        with suppress(RuntimeError):
            launch.device_module(f"{name}_kernels")
    with suppress(ImportError):
        _ = import_torchvision().models.segmentation


def _facts() -> Unit:
    return unit("facts", gpu_programs.facts, _FACTS_SECONDS, "facts")


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
