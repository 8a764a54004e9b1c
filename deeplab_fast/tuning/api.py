"""`deeplab_fast.tune` for programs, and what the command line shares with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dispatch import records, trust
from ..dispatch.checks import DTYPES
from ..dispatch.examples import Size
from . import runner, workloads
from .defaults import ALL_SECONDS, BACKENDS, BATCHES, QUICK_SECONDS, SECONDS, USUAL_MODELS
from .machine import Machine, why_none
from .tune import CHECK_THREADS, NoDevice, Plan, Tuning, records_of, tune_here
from .workloads import Work

# For a process that was interrupted to end its children.
_END_SECONDS = 10.0


def tune(
    model: nn.Module | str | None = None,
    size: tuple[int, int] | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = ("bfloat16",),
    ops: Sequence[str] | None = None,
    backends: Sequence[str] = BACKENDS,
    quick: bool = False,
    budget: float | None = None,
    configurations: bool = False,
    progress: bool = True,
) -> Tuning:
    """Check and measure the GPU kernels on the current GPU, and record the verdicts.

    Each kernel runs in child processes of a fresh process, so that one that hangs, crashes or is
    wrong is that kernel's verdict and touches nothing else. The records are kept for this machine
    (`deeplab_fast.dispatch.records`); this process chooses by them at once.

    Args:
        model: a DeepLabv3 of this package or a builder's name, whose ops and sizes are taken; None
            for those of the usual models.
        size: (height, width) of its images; 520x520 where None is given.
        batches: images of a call; training is measured at the last of them.
        dtypes: of "bfloat16", "float16", "float32", "tf32" (products of rounded fp32 operands).
        ops: names of ops; None for all.
        backends: "triton", "cuda" or both.
        quick: the first form and the largest size of each op alone.
        budget: seconds of everything; 120 for a model, 40 if quick, 300 for the usual models.
        configurations: measure launch configurations as well, with what is left of the budget.
        progress: show a bar on stderr.

    Returns:
        What was found; print it for a table.

    Raises:
        NoDevice: there is no GPU.
        ValueError: a name that there is not, or records are switched off.
    """
    plan = make_plan(
        model, size, batches=batches, dtypes=dtypes, ops=ops, backends=backends, quick=quick,
        budget=budget, configurations=configurations,
    )  # fmt: skip
    path = records_path()
    if reason := why_none():
        raise NoDevice(reason)
    with tempfile.TemporaryDirectory(prefix="deeplab_fast-tune-") as folder:
        request, out = Path(folder, "plan.json"), Path(folder, "outcomes.jsonl")
        request.write_text(json.dumps(asdict(plan)), "utf-8")
        command = [sys.executable, "-m", __package__, str(request), str(out)]
        # Children compute side by side, each on its part of the cores.
        environment = {"OMP_NUM_THREADS": str(CHECK_THREADS), **os.environ}
        process = subprocess.Popen([*command, *["--progress"] * progress], env=environment)
        try:
            process.wait()
        except KeyboardInterrupt:
            # It was told as well, and ends its children first.
            _end(process)
            raise
        finally:
            # Whatever ended that process, what it had found counts.
            outcomes = runner.read(out) if out.is_file() else []
            tuning = keep(outcomes, path) if _identified(outcomes) else None
    if tuning is None:
        raise NoDevice(outcomes[0].reason if outcomes else "the process that asks for one ended")
    return tuning


def make_plan(
    model: nn.Module | str | None,
    size: tuple[int, int] | None,
    *,
    batches: Sequence[int],
    dtypes: Sequence[str],
    ops: Sequence[str] | None,
    backends: Sequence[str],
    quick: bool,
    budget: float | None,
    configurations: bool,
) -> Plan:
    """The plan of `tune`, which has the arguments.

    Raises:
        ValueError: a name that there is not, or a number that is none.
    """
    for what, given, allowed in (("dtype", dtypes, DTYPES), ("backend", backends, BACKENDS)):
        if not given or (unknown := sorted(set(given) - set(allowed))):
            named = repr(unknown[0]) if given else "nothing"
            raise ValueError(f"{what} is {named}; allowed: {', '.join(allowed)}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are {list(batches)}; each must be at least 1")
    if size is not None and min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; expected (height, width) of at least 1")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget is {budget}; expected seconds above 0")
    if model is None and size is not None:
        raise ValueError("size is of a model's images: name a model as well")
    found: list[Work] = []
    for one, image in _models(model, size):
        found += workloads.of_model(one, image, tuple(batches))
    works = workloads.selected(dict.fromkeys(found), ops, quick)
    if not works:
        raise ValueError(f"the model calls none of the ops {', '.join(ops or ())}")
    usual = QUICK_SECONDS if quick else ALL_SECONDS if model is None else SECONDS
    return Plan(
        tuple(works),
        tuple(backends),
        tuple(dtypes),
        usual if budget is None else float(budget),
        quick=quick,
        configurations=configurations,
    )


def records_path() -> Path:
    """Where one's own records go.

    Raises:
        ValueError: they are switched off.
    """
    path = records.own_path()
    if path is None:
        raise ValueError(
            f"{records.ENVIRONMENT_VARIABLE}=0 leaves records unread; unset it, or set it to a file"
        )
    return path


def keep(outcomes: Sequence[runner.Outcome], path: Path) -> Tuning:
    """Write the records that follow from outcomes, of which the first is the machine's."""
    machine = Machine.from_dict(outcomes[0].result)
    found = records_of(outcomes, machine)
    records.update(path, found)
    trust.forget()
    return Tuning(machine, list(outcomes), found, path)


def run_plan(plan: Plan, out: Path, progress: bool) -> None:
    """Carry out a plan, outcomes into a file, with a progress bar on stderr.

    Raises:
        NoDevice: there is no GPU.
    """
    from tqdm import tqdm

    # Its thread would be missing in the forks, with the locks that it held.
    tqdm.monitor_interval = 0
    counts = dict.fromkeys(("passed", "failed"), 0)
    options: dict[str, Any] = {"unit": "kernel", "desc": "tuning", "leave": False}
    with tqdm(total=0, **options) if progress else nullcontext() as bar:

        def planned(units: int) -> None:
            if bar is not None:
                bar.total += units
                bar.refresh()

        def came(outcome: runner.Outcome) -> None:
            if outcome.verdict != runner.NOT_RUN:
                counts["passed" if outcome.verdict == runner.PASSED else "failed"] += 1
            if bar is not None:
                bar.set_postfix(counts, refresh=False)
                bar.update()

        tune_here(plan, out=out, on_plan=planned, on_outcome=came)


def plan_from(fields: dict[str, Any]) -> Plan:
    """A plan from what JSON made of one."""
    works = tuple(Work(w["op"], w["form"], _size_from(w["size"])) for w in fields["works"])
    lists = {name: tuple(fields[name]) for name in ("backends", "dtypes")}
    return Plan(**{**fields, **lists, "works": works})


def _size_from(fields: dict[str, Any]) -> Size:
    rates, layers = tuple(fields["rates"]), tuple(map(tuple, fields["layers"]))
    return Size(**{**fields, "rates": rates, "layers": layers})


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _identified(outcomes: Sequence[runner.Outcome]) -> bool:
    return bool(outcomes) and outcomes[0].verdict == runner.PASSED


def _models(
    model: nn.Module | str | None, size: tuple[int, int] | None
) -> list[tuple[nn.Module, tuple[int, int]]]:
    from ..models import get_model

    if isinstance(model, nn.Module):
        return [(model, size or USUAL_MODELS[0][1])]
    names = USUAL_MODELS if model is None else ((model, size or USUAL_MODELS[0][1]),)
    with torch.device("meta"):
        return [(get_model(name), image) for name, image in names]
