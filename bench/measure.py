"""Timing, peak memory and the machine's ceilings.

All providers of a case are timed in one process, in rounds: one sample of each, then the next
round, in another order. What the machine does meanwhile (a clock that falls, a neighbour) then
meets all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from deeplab_fast.dispatch.errors import one_line
from deeplab_fast.tuning.timing import (
    SAMPLE_SECONDS,
    captured,
    clock,
    cuda_clock,
    interleaved,
    peak_bytes,
)

from . import gate
from .costs import Cost
from .providers import Runnable, chosen, expected
from .registry import (
    FORWARD,
    Arguments,
    Case,
    Provider,
    Suite,
    missing_reason,
)

OK = "ok"
MISSING = "missing"
FAILED = "failed"
DISAGREES = "disagrees"
OUT_OF_TIME = "the run's time budget is spent"

# Sets of inputs together should exceed what caches hold between calls.
CACHE_BYTES = {"cpu": 64 << 20, "cuda": 128 << 20}
MOST_INPUT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}


@dataclass
class Result:
    """What was found of one provider at one case and mode.

    Attributes:
        provider: the provider.
        status: OK, MISSING, FAILED or DISAGREES.
        note: the reason where it is not OK.
        precision: what its operands are rounded to.
        errors: kind of output -> (error, limit).
        equal: (share of labels that are the exact ones, the least that is allowed); None where a
            case does not judge by it.
        samples: seconds of a call, one for each round.
        device_samples: seconds of a call replayed from a CUDA graph, one for each round.
        peak_bytes: most memory that a call took beyond what was there before it.
        held_bytes: what it keeps between calls: its weights, and what it made of them.
        facts: what a case tells of it beside: metric -> (value, note).
        chosen: whether it is what a user of deeplab_fast gets without choosing.
    """

    provider: Provider
    status: str = OK
    note: str = ""
    precision: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    equal: tuple[float, float] | None = None
    samples: list[float] = field(default_factory=list)
    device_samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    held_bytes: int | None = None
    facts: dict[str, tuple[float, str]] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: multiply-adds and bytes read and written, each second."""

    macs: float
    bytes: float

    def floor(self, cost: Cost) -> float:
        """Seconds that a job takes at least."""
        return max(cost.live_macs / self.macs, cost.bytes / self.bytes)


def best_baseline(results: Sequence[Result], precision: str | None = None) -> Result | None:
    """The fastest baseline, of all or of a precision, whose results agree."""
    usable = [
        r
        for r in results
        if r.provider.baseline and r.status == OK and r.samples
        if precision in (None, r.precision)
    ]
    return min(usable, key=lambda r: statistics.median(r.samples), default=None)


def copies_for(case: Case, suite: Suite) -> int:
    """Sets of inputs that overflow the caches, within the suite's and the memory's limits."""
    args = case.setup("meta", suite.dtype)
    size = sum(t.numel() * t.element_size() for t in args.inputs[0])
    wanted = math.ceil(CACHE_BYTES[suite.device] / size)
    allowed = MOST_INPUT_BYTES[suite.device] // size
    return max(1, case.judged, min(wanted, suite.copies, allowed))


def measure(
    case: Case,
    mode: str,
    suite: Suite,
    providers: Sequence[Provider],
    seed: int,
    memory: Callable[[Case, str, Provider], tuple[int | None, int | None, str]] | None = None,
    finished: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Everything about one case and mode.

    Args:
        case, mode: what is measured.
        suite: how long, and on what.
        providers: those that apply.
        seed: of weights and inputs.
        memory: measures a provider's memory elsewhere, for devices without an allocator of their
            own; (peak, held, note).
        finished: whether the time is up; then nothing is measured, or where it comes up meanwhile
            nothing slow.

    Returns:
        One result for each provider, in order, whatever became of it.
    """
    results = [Result(p) for p in providers]
    for r in results:
        r.precision = r.provider.precision(case, mode, suite.device, suite.dtype)
        reason = missing_reason(r.provider, case, mode, suite)
        if reason:
            r.status, r.note = MISSING, reason
    if finished():
        for r in results:
            if r.status == OK:
                r.status, r.note = MISSING, OUT_OF_TIME
        return results
    try:
        args = case.setup(suite.device, suite.dtype, seed, copies_for(case, suite))
        exact = expected(case, mode, args)
        truth = _truth(case, mode, args, exact)
        layers = max(1, case.cost(mode, suite.dtype.itemsize).convolutions)
    except Exception as error:
        for r in results:
            if r.status == OK:
                r.status, r.note = FAILED, f"the case has no exact result: {one_line(error)}"
        _free(suite.device)
        return results
    own = chosen(case, mode, suite.device, suite.dtype)
    runs: dict[str, Runnable] = {}
    for r in results:
        r.chosen = r.provider.name == own
        if r.status != OK:
            continue
        if r.provider.slow and finished():
            r.status, r.note = MISSING, OUT_OF_TIME
            continue
        try:
            runs[r.provider.name] = _prepare(r, case, mode, suite, args, exact, truth)
        except Exception as error:
            r.status, r.note = FAILED, one_line(error)
            _free(suite.device)
    del exact
    _judge(results, case, mode, layers, truth)
    del truth
    time_of = clock(suite.device)
    sample_seconds = SAMPLE_SECONDS[suite.device]
    try:
        samples = interleaved(runs, time_of, suite.seconds, suite.rounds, sample_seconds)
    except Exception as error:
        samples = {}
        for r in results:
            if r.provider.name in runs:
                r.status, r.note = FAILED, f"while timed: {one_line(error)}"
    for r in results:
        r.samples = samples.get(r.provider.name, [])
    if suite.device == "cuda" and mode == FORWARD and case.kind == "op":
        _time_replays(results, runs, suite)
    runs.clear()
    del args
    _free(suite.device)
    if memory is not None:
        for r in results:
            if r.provider.name in suite.no_memory:
                continue
            if r.status in (OK, DISAGREES) and not finished():
                r.peak_bytes, r.held_bytes, note = memory(case, mode, r.provider)
                r.note = "; ".join(n for n in (r.note, note) if n)
    return results


def _prepare(
    r: Result,
    case: Case,
    mode: str,
    suite: Suite,
    args: Arguments,
    exact: list[torch.Tensor],
    truth: gate.Truth,
) -> Runnable:
    """Build a provider, compare its results, and on a GPU measure its memory."""
    before = _pool_bytes() if suite.device == "cuda" else 0
    run = r.provider.build(case, mode, suite.device, suite.dtype, args)
    if r.provider.own_expected is not None:
        exact = r.provider.own_expected(case, args, run)
    found = gate.errors(case, mode, gate.outputs(run.probe()), exact)
    r.facts = case.facts(run)
    r.errors = {kind: (error, math.nan) for kind, error in found.items()}
    if truth.labels and r.provider.own_expected is None:
        r.equal = (truth.equal([run(i).clone() for i in range(len(truth.labels))]), math.nan)
    r.note = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in r.provider.packages)
    if suite.device == "cuda":
        run(0)
        r.peak_bytes = peak_bytes(partial(run, 0)) + _pool_bytes() - before
    return run


def _truth(case: Case, mode: str, args: Arguments, exact: list[torch.Tensor]) -> gate.Truth:
    """Exact labels of the sets that a case judges by; `exact` is the result of the first."""
    truth = gate.Truth([], [])
    if case.judged:
        truth.add(exact[0])
    for given in args.inputs[1 : case.judged]:
        truth.add(expected(case, mode, Arguments(args.module, [given]))[0])
    return truth


def _judge(
    results: Sequence[Result], case: Case, mode: str, layers: int, truth: gate.Truth
) -> None:
    """Hold errors against their limits; in low precision those of eager PyTorch are the measure."""
    anchors = ("channels_last", "autocast")
    for r in results:
        if r.status != OK:
            continue
        for kind, (error, _) in r.errors.items():
            anchor = None
            if r.provider.name not in anchors:
                known = [
                    a.errors[kind][0]
                    for a in results
                    if a.provider.name in anchors and kind in a.errors
                    if a.precision == r.precision
                ]
                anchor = max(known, default=None)
            bound = gate.limit(case, mode, kind, r.precision, layers, anchor)
            r.errors[kind] = (error, bound)
            # NaN compares false.
            if not error <= bound:
                r.status = DISAGREES
                r.note = f"{kind}: error {error:.2e} above {bound:.2e}"
        if r.equal is not None:
            equal = r.equal[0]
            least = truth.least_equal(gate.logit_error(case, r.precision, layers))
            r.equal = (equal, least)
            if equal < least and r.status == OK:
                r.status = DISAGREES
                r.note = f"labels: {equal:.4f} of them equal, below {least:.4f}"


def _time_replays(results: Sequence[Result], runs: Mapping[str, Runnable], suite: Suite) -> None:
    """Time graphs of one call for each set of inputs: the device's work without launch gaps."""
    replays: dict[str, Callable[[int], Any]] = {}
    sets = {}
    for r in results:
        run = runs.get(r.provider.name)
        if run is None or r.provider.graphs or r.status not in (OK, DISAGREES):
            continue
        try:
            graph = captured([partial(run, i) for i in range(len(run.inputs))])
        except Exception as error:
            r.note = "; ".join(n for n in (r.note, f"not capturable: {one_line(error)}") if n)
            torch.cuda.synchronize()
            continue
        replays[r.provider.name] = lambda i, graph=graph: graph.replay()
        sets[r.provider.name] = len(run.inputs)
    found = interleaved(replays, cuda_clock, suite.seconds, suite.rounds, SAMPLE_SECONDS["cuda"])
    for r in results:
        if r.provider.name in found:
            r.device_samples = [s / sets[r.provider.name] for s in found[r.provider.name]]


def _pool_bytes() -> int:
    """Memory that CUDA graphs hold in pools of their own."""
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )


def ceilings(suite: Suite) -> tuple[Ceilings, list[tuple[str, str, float, str]]]:
    """The machine's own: the largest of a matrix product and of a copy, and rows about them.

    Returns:
        ceilings for the suite's dtype, and (name, what, value, unit) of everything measured.
    """
    device = suite.device
    n, copied = (8192, 2 << 30) if device == "cuda" else (2048, 256 << 20)
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    if suite.dtype not in dtypes:
        dtypes.append(suite.dtype)
    found = []
    macs = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(lambda i, a=a, b=b: a @ b, device)
        macs[dtype] = n**3 / seconds
        name = str(dtype).removeprefix("torch.")
        found.append((f"matmul-{name}-{n}", "tflops", 2 * n**3 / seconds / 1e12, "TFLOP/s"))
    x, y = (torch.ones(copied // 4, device=device) for _ in range(2))
    seconds = _fastest(lambda i: y.copy_(x), device)
    found.append((f"copy-{copied >> 20}-MiB", "bandwidth", 2 * copied / seconds / 1e9, "GB/s"))
    return Ceilings(macs[suite.dtype], 2 * copied / seconds), found


def _fastest(call: Callable[[int], Any], device: str) -> float:
    """The 20th percentile: a ceiling is what the machine can, not what it did on average."""
    samples = interleaved({"it": call}, clock(device), 1.0, (7, 30), 0.0)["it"]
    return percentile(samples, 20)


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@contextlib.contextmanager
def measuring(device: str) -> Iterator[None]:
    """Settings under which PyTorch is at its best, restored afterwards."""
    if device != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _free(device: str) -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
