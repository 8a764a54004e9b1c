"""`python -m bench.compare BASE [-k PATTERN]`: this checkout against another commit.

BASE is checked out into a temporary git worktree, its extension is built there, and both versions
are timed alternately, each in a process of its own, by the benchmarks of this checkout. Printed is
how many times faster this checkout is: the median of the ratios of rounds, and their spread.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deeplab_fast.tuning import timing

from . import gate, measure
from .everything import registry
from .files import ROOT
from .registry import Case, Provider, Suite
from .worker import Worker, WorkerError

PREPARE_SECONDS = 600.0


class CompareError(RuntimeError):
    """The comparison cannot be made; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 0, or 2 where the arguments or BASE do not allow it."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="commit, branch or tag")
    parser.add_argument("-k", metavar="PATTERN", help="regular expression on 'op/shape mode'")
    parser.add_argument("--suite", choices=list(registry.SUITES), default="quick")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="default: all of ours")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--no-build", action="store_true", help="leave out BASE's extension")
    options = parser.parse_args(argv)
    try:
        work = registry.select(options.suite, options.k)
        suite = registry.SUITES[options.suite]
        ours = [p.name for p in registry.providers() if not p.baseline]
        names = options.providers or [name for name in ours if name not in suite.left_out]
        providers = [registry.provider(name) for name in names]
        if not work:
            raise ValueError(f"no case of suite {options.suite} matches -k {options.k}")
        with worktree(options.base, build=not options.no_build) as base:
            compare(base, work, providers, suite, options)
    except (ValueError, CompareError) as error:
        print(f"bench.compare: error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def worktree(base: str, build: bool) -> Iterator[Path]:
    """BASE in a temporary worktree, with this checkout's benchmarks and its own extension.

    Raises:
        CompareError: BASE is no commit, or its extension does not build.
    """
    commit = _git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if not commit:
        raise CompareError(f"{base!r} is no commit of this repository")
    with tempfile.TemporaryDirectory(prefix="deeplab_fast_base_") as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), commit, check=True)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__", "data")
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=ignored)
            if build:
                _build(tree)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _build(tree: Path) -> None:
    if not (tree / "setup.py").is_file():
        return
    print("building BASE's extension", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise CompareError(
            f"BASE's extension does not build (--no-build leaves it out):\n{done.stderr[-2000:]}"
        )


def _git(*arguments: str, check: bool = False) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode and check:
        raise CompareError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def compare(
    base: Path,
    work: Sequence[tuple[Case, str]],
    providers: Sequence[Provider],
    suite: Suite,
    options: argparse.Namespace,
) -> None:
    """Time every case in both trees and print a line for each."""
    threads = options.threads or len(os.sched_getaffinity(0))
    print(f"{'case':<64}{'provider':<14}{'base ms':>10}{'this ms':>10}{'ratio':>8}  p20..p80")
    with Worker(base, threads=threads) as old, Worker(ROOT, threads=threads) as new:
        for case, mode in work:
            copies = measure.copies_for(case, suite)
            for p in providers:
                if not p.applies(case, mode) or registry.missing_reason(p, case, mode, suite):
                    continue
                name = f"{case.id} {mode}"
                try:
                    samples = _both(old, new, base, case, mode, p, suite, options.seed, copies)
                except WorkerError as error:
                    print(f"{name:<64}{p.name:<14}  {error}", flush=True)
                    continue
                ratios = [b / n for b, n in zip(samples["base"], samples["this"], strict=True)]
                low, high = (measure.percentile(ratios, q) for q in (20, 80))
                before, after = (
                    statistics.median(samples[side]) * 1e3 for side in ("base", "this")
                )
                print(
                    f"{name:<64}{p.name:<14}{before:>10.4g}{after:>10.4g}"
                    f"{statistics.median(ratios):>8.3f}  {low:.3f}..{high:.3f}",
                    flush=True,
                )


def _both(
    old: Worker,
    new: Worker,
    base: Path,
    case: Case,
    mode: str,
    p: Provider,
    suite: Suite,
    seed: int,
    copies: int,
) -> dict[str, list[float]]:
    sides = {"base": (old, base), "this": (new, ROOT)}
    layers = max(1, case.cost(mode, suite.dtype.itemsize).convolutions)
    precision = p.precision(case, mode, suite.device, suite.dtype)
    for side, (worker, root) in sides.items():
        try:
            answer = worker.ask(
                PREPARE_SECONDS,
                do="prepare",
                case=case.id,
                mode=mode,
                provider=p.name,
                suite=suite.name,
                seed=seed,
                copies=copies,
            )
            if not Path(answer["package"]).is_relative_to(root.resolve()):
                raise WorkerError(f"imported deeplab_fast from another folder than {side}'s")
            for kind, error in worker.ask(PREPARE_SECONDS, do="errors")["errors"].items():
                bound = gate.limit(case, mode, kind, precision, layers, None)
                if not error <= bound:
                    raise WorkerError(f"{kind}: error {error:.2e} above {bound:.2e}, no ratio")
        except WorkerError as error:
            raise WorkerError(f"{side}: {error}") from error

    def time_of(worker: Worker, first: int, calls: int) -> float:
        return worker.ask(do="time", first=first, calls=calls)["seconds"]

    runs = {side: worker for side, (worker, _) in sides.items()}
    seconds = timing.SAMPLE_SECONDS[suite.device]
    samples = timing.interleaved(runs, time_of, suite.seconds, suite.rounds, seconds)
    for worker in runs.values():
        worker.ask(do="release")
    return samples


if __name__ == "__main__":
    sys.exit(main())
