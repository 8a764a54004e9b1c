"""`python -m bench.run --suite NAME --out DIR`: measure, and write rows to DIR/NAME.csv.

All providers of a case run side by side in one process. Each first result is compared with the
exact one; a provider whose result lies further off than its op allows gets a row that says so, and
no speed-up. One that cannot run here gets a row with the reason. Rows are on disk after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from deeplab_fast.tuning import timing

from . import measure, rows
from .costs import Cost
from .everything import registry
from .measure import DISAGREES, OK, Ceilings, Result
from .registry import Case, Suite
from .rows import Environment, Row, RowFile

_MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; 0, or 2 where the arguments or the machine do not allow it."""
    options = _parser().parse_args(argv)
    suite = registry.SUITES[options.suite]
    try:
        work = registry.select(suite.name, options.k)
        for name in options.providers or ():
            registry.provider(name)
    except ValueError as error:
        return _refuse(str(error))
    if options.list:
        for case, mode in work:
            print(case.id, mode)
        return 0
    if not work:
        return _refuse(
            f"no case of suite {suite.name} matches -k {options.k}; --list prints what there is"
        )
    if options.out is None:
        return _refuse("--out DIR is missing: the folder for the rows")
    if suite.device == "cuda" and not torch.cuda.is_available():
        return _refuse("suite gpu needs a CUDA device, and none is visible; use --suite cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    whole = options.k is None and options.providers is None
    return run(suite, work, options, whole)


def run(
    suite: Suite,
    work: Sequence[tuple[Case, str]],
    options: argparse.Namespace,
    whole: bool,
) -> int:
    """Measure cases, print tables and keep rows.

    Args:
        suite: how long and on what.
        work: (case, mode) in order.
        options: of the command line.
        whole: the suite is run in full: rows of earlier runs are dropped at its end.
    """
    start = time.monotonic()

    def finished() -> bool:
        return options.time_budget is not None and time.monotonic() - start > options.time_budget

    file = RowFile(options.out / f"{suite.name}.csv")
    env = rows.environment(suite.device, options.seed)
    print(describe(env), flush=True)
    with measure.measuring(suite.device), _memory(suite, options) as memory:
        ceilings, found = measure.ceilings(suite)
        file.replace(list(ceiling_rows(env, suite, found)))
        for name, _, value, unit in found:
            print(f"  {name:<24}{value:>10.4g} {unit}")
        for case, mode in work:
            providers = registry.applicable(case, mode, suite, options.providers)
            if not providers:
                continue
            began = time.monotonic()
            results = measure.measure(case, mode, suite, providers, options.seed, memory, finished)
            cost = _cost(case, mode, suite)
            file.replace(list(result_rows(env, suite, case, mode, results, cost, ceilings)))
            print(table(case, mode, results, cost, ceilings))
            print(f"measured in {time.monotonic() - began:.0f} s", flush=True)
    if whole and not finished():
        file.keep_only(env.date)
    print(f"\n{len(file.rows)} rows in {file.path}, {time.monotonic() - start:.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--suite", choices=list(registry.SUITES), default="quick")
    parser.add_argument("--out", type=Path, help="folder for SUITE.csv")
    parser.add_argument("-k", metavar="PATTERN", help="regular expression on 'op/shape mode'")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these providers")
    parser.add_argument("--time-budget", type=float, metavar="S", help="begin nothing new after S")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory on a CPU")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


def _refuse(reason: str) -> int:
    print(f"bench.run: error: {reason}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _memory(suite: Suite, options: argparse.Namespace) -> Iterator:
    if suite.device != "cpu" or options.no_memory:
        yield None
        return
    from .worker import CpuMemory

    with CpuMemory(suite.name, options.seed, torch.get_num_threads()) as memory:
        yield memory


def describe(env: Environment) -> str:
    """One line on where and with what."""
    versions = f"python {env.python}, torch {env.torch}, triton {env.triton or 'none'}"
    state = {"yes": " with changes", "no": "", "": ""}[env.dirty]
    return (
        f"{env.device}, {env.threads} threads, {versions}, CUDA {env.cuda or 'none'}, "
        f"commit {env.commit}{state}, {env.date}, seed {env.seed}"
    )


def ceiling_rows(
    env: Environment, suite: Suite, found: Sequence[tuple[str, str, float, str]]
) -> Iterator[Row]:
    """Rows about the machine itself."""
    for name, metric, value, unit in found:
        yield rows.row(env, suite.name, rows.MACHINE, name, "", "", "", metric, value, unit=unit)


def _cost(case: Case, mode: str, suite: Suite) -> Cost | None:
    try:
        return case.cost(mode, suite.dtype.itemsize)
    except ImportError:
        # Without torchvision there is no network to count; measure() has said so.
        return None


def result_rows(
    env: Environment,
    suite: Suite,
    case: Case,
    mode: str,
    results: Sequence[Result],
    cost: Cost | None,
    ceilings: Ceilings,
) -> Iterator[Row]:
    """The rows of one case and mode. Only results that agree have ratios and throughput."""
    dtype = str(suite.dtype).removeprefix("torch.")
    best = measure.best_baseline(results)
    best_device = _best_device(results)
    for r in results:
        make = partial(
            rows.row,
            env,
            suite.name,
            case.op,
            case.shape,
            dtype,
            mode,
            r.provider.name,
            baseline=r.provider.baseline,
            chosen=r.chosen,
            agrees={OK: "yes", DISAGREES: "no"}.get(r.status, ""),
        )
        if r.status != OK:
            yield make(rows.STATUS, None, note=f"{r.status}: {r.note}")
        note = r.note if r.status == OK else ""
        for metric, samples in ((rows.TIME, r.samples), (rows.DEVICE_TIME, r.device_samples)):
            if samples:
                ms = [s * 1e3 for s in samples]
                yield make(metric, **_spread(ms), note=note)
        for kind, (error, bound) in r.errors.items():
            yield make(f"error_{kind}", error, note=f"limit {bound:.3g}")
        if r.equal is not None:
            equal, least = r.equal
            yield make(rows.EQUAL, equal, note=f"{case.judged_on}, at least {least:.6f}")
        for metric, (value, told) in r.facts.items():
            yield make(metric, value, note=told)
        if r.peak_bytes is not None:
            yield make(rows.PEAK, r.peak_bytes / _MIB)
        if r.held_bytes is not None:
            yield make(rows.HELD, r.held_bytes / _MIB)
        if r.status != OK or not r.samples:
            continue
        alike = measure.best_baseline(results, r.precision) if suite.by_precision else None
        for metric, base, samples in (
            (rows.RATIO, best and best.samples, r.samples),
            (rows.PRECISION_RATIO, alike and alike.samples, r.samples),
            (rows.DEVICE_RATIO, best_device, r.device_samples),
        ):
            if base and samples and len(base) == len(samples):
                ratios = [b / s for b, s in zip(base, samples, strict=True)]
                yield make(metric, **_spread(ratios))
        if cost is not None:
            for metric, value in throughput(r, cost, ceilings).items():
                yield make(metric, value)


def _spread(samples: Sequence[float]) -> dict[str, float]:
    low, high = (measure.percentile(samples, percent) for percent in (20, 80))
    return {"value": statistics.median(samples), "p20": low, "p80": high}


def _best_device(results: Sequence[Result]) -> list[float]:
    usable = [
        r.device_samples
        for r in results
        if r.provider.baseline and r.status == OK and r.device_samples
    ]
    return min(usable, key=statistics.median, default=[])


def throughput(r: Result, cost: Cost, ceilings: Ceilings) -> dict[str, float]:
    """Rates in the units of `rows.UNITS`, over the device's time where it was measured."""
    seconds = statistics.median(r.device_samples or r.samples)
    return {
        rows.LIVE: 2 * cost.live_macs / seconds / 1e12,
        rows.DENSE: 2 * cost.dense_macs / seconds / 1e12,
        rows.BANDWIDTH: cost.bytes / seconds / 1e9,
        rows.ROOFLINE: ceilings.floor(cost) / seconds,
    }


def table(
    case: Case,
    mode: str,
    results: Sequence[Result],
    cost: Cost | None,
    ceilings: Ceilings,
) -> str:
    """A case's results to read on a terminal."""
    best = measure.best_baseline(results)
    lines = [f"\n{case.id} {mode}"]
    if cost is not None:
        live = f", {cost.live_macs / 1e9:.4g} live" if cost.live_macs != cost.dense_macs else ""
        lines[0] += (
            f"   {cost.dense_macs / 1e9:.4g} GMAC{live}, {cost.bytes / _MIB:.4g} MiB, "
            f"at least {ceilings.floor(cost) * 1e3:.4g} ms"
        )
    head = ("", "ms", "p20..p80", "ratio", "TFLOP/s live", "dense", "GB/s", "roofline", "MiB")
    head += ("equal labels",)
    widths = (18, 10, 20, 8, 14, 10, 9, 10, 9, 14)
    lines.append("".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)))
    for r in results:
        mark = "*" if r.chosen else ""
        if not r.samples:
            lines.append(f"{r.provider.name + mark:<18}  {r.status}: {r.note}")
            continue
        ms, low, high = (s * 1e3 for s in _spread(r.samples).values())
        cells = [f"{ms:.4g}", f"{low:.4g}..{high:.4g}"]
        if r.status == OK:
            cells.append(f"{timing.ratio(best.samples, r.samples):.2f}" if best else "")
            rates = throughput(r, cost, ceilings) if cost is not None else {}
            for metric, form in (
                (rows.LIVE, ".4g"),
                (rows.DENSE, ".4g"),
                (rows.BANDWIDTH, ".4g"),
                (rows.ROOFLINE, ".1%"),
            ):
                cells.append(f"{rates[metric]:{form}}" if metric in rates else "")
            cells.append("" if r.peak_bytes is None else f"{r.peak_bytes / _MIB:.1f}")
            cells.append("" if r.equal is None else f"{r.equal[0]:.4%}")
        line = f"{r.provider.name + mark:<18}"
        line += "".join(f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=False))
        if r.device_samples:
            line += f"  device {statistics.median(r.device_samples) * 1e3:.4g} ms"
        if r.status != OK or r.note:
            line += f"  {r.status if r.status != OK else ''} {r.note}".rstrip()
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
