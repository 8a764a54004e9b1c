"""The rows of the CUDA ASPP's table of tiles, each made to run: units of `bench.gpu`, a program.

    python -m bench.gpu_rows check --rows 3 4 [--dtype float16] [--small]
    python -m bench.gpu_rows repeat --rows 4 --times 200
    python -m bench.gpu_rows time --rows 3 4

The choice among rows takes most of them at few sizes, so that the checks of the op (`deeplab_fast
tune`) see one or two. As a program it prints its answer as a line of JSON, with exit status 1 where
a result is wrong: for compute-sanitizer, and for variants of the sm_90a kernel, of which a process
has one (`DEEPLAB_FAST_SM90_VARIANT`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeplab_fast import _ext, backends, reference
from deeplab_fast.dispatch import checks
from deeplab_fast.dispatch.declare import exact, pytorch_forms, steps
from deeplab_fast.dispatch.errors import Wrong
from deeplab_fast.dispatch.examples import VALUES, Size, Step
from deeplab_fast.ops import aspp_cuda
from deeplab_fast.plan.taps import Branch, Problem, tap_classes
from deeplab_fast.tuning import machine
from deeplab_fast.tuning.machine import Machine, fault_of, spoiled, suffer

from .gpu_measure import Row, graphed, rows_of, times, tiny

DTYPES = ("bfloat16", "float16")
SM90 = 90
# Two images, channels that end within a chunk, classes of more pixels than a tile has rows.
SIZES = (
    Size(2, 200, 33, 29, filters=96, rates=(5, 12)),
    # Filters of no multiple of 8, taps all outside.
    Size(1, 72, 9, 11, filters=45, rates=(2, 40)),
    # As many filters as a tile and more.
    Size(1, 136, 21, 20, filters=264, rates=(6,)),
)
SMALL = SIZES[1:2]
PROJECTED = Size(2, 328, 17, 19, filters=96, pooled=40)
SMALL_PROJECTED = Size(1, 72, 9, 11, filters=45, pooled=16)
# A weight of fewer rows than the box that the copy engine loads.
FEW_FILTERS = (
    Size(2, 72, 9, 11, filters=24, rates=()),
    Size(1, 72, 21, 20, filters=24, rates=(3,)),
)
REPEATED = Size(4, 2048, 33, 33, filters=256, rates=(6, 12, 18))
TIMED = (
    Size(1, 2048, 65, 65, filters=256, rates=(12, 24, 36)),
    Size(16, 2048, 65, 65, filters=256, rates=(12, 24, 36)),
    Size(16, 2048, 33, 33, filters=256, rates=(6, 12, 18)),
)
# Runs between which the device is left to become idle.
_BUSY_RUNS = 10


def rows(architecture: int | None = None) -> list[int]:
    """Numbers of the rows, of one architecture or of all; none without the extension that has the
    table."""
    if not _ext.CPU.loaded:
        return []
    return [
        number
        for number, tile in enumerate(aspp_cuda.tiles())
        if architecture in (None, tile.architecture)
    ]


@dataclass(frozen=True)
class Forced:
    """The ASPP's branches, or its projection, on one row of the table.

    Attributes:
        machine: the GPU, or what stands in for it.
        row: of the table.
        split: whether tiles may be cut; None for the faster.
        fault: of a rehearsal.
    """

    machine: Machine
    row: int
    split: bool | None = None
    fault: str = ""

    def choice(self, x: Tensor, branches: tuple[Branch, ...]) -> aspp_cuda.Choice:
        """The row's choice for a call."""
        from deeplab_fast.plan.device import device_of

        n, channels, height, width = x.shape
        # Also those of an architecture that a newer one would displace.
        architecture = aspp_cuda.tiles()[self.row].architecture
        before = aspp_cuda.architecture
        aspp_cuda.architecture = lambda capability: architecture
        aspp_cuda.choose.cache_clear()
        try:
            problem = Problem(n, height, width, channels, branches)
            return aspp_cuda.choose(problem, device_of(x), self.row, self.split)
        finally:
            aspp_cuda.architecture = before
            aspp_cuda.choose.cache_clear()

    def branches(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        dilations: Sequence[int],
    ) -> Tensor:
        """`ops.aspp_branches` on the row."""
        from deeplab_fast.plan.packing import PackedBranches

        packed = PackedBranches.pack(weights, scales, shifts, dilations)
        choice = self.choice(x, packed.branches)
        if tiny(self.machine):
            run = spoiled(backends.implementations("aspp_branches")["reference"].run, self.fault)
            return run(x, weights, scales, shifts, dilations)
        return aspp_cuda.multiply(
            x, packed.weight, packed.scale, packed.shift, packed.branches, choice
        )

    def project(
        self, branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        """`ops.aspp_project` on the row."""
        geometry = (Branch(weight.shape[0], 1, 1),)
        choice = self.choice(branches, geometry)
        if tiny(self.machine):
            return reference.aspp_project(branches, pooled, weight, scale, shift)
        channels, matrix = branches.shape[1], weight.flatten(1)
        shifts = aspp_cuda.image_shift(pooled, matrix[:, channels:], scale, shift)
        return aspp_cuda.multiply(branches, matrix[:, :channels], scale, shifts, geometry, choice)


def check(
    name: str,
    gpu: Machine,
    row: int,
    split: bool,
    dtype: str,
    sizes: Sequence[Size] = SIZES,
    projected: Sequence[Size] = (PROJECTED,),
) -> dict[str, Any]:
    """A row, whole or cut, against float64, twice with the same bits.

    Args:
        name: of the unit.
        gpu: the GPU.
        row, split: as in `Forced`.
        dtype: of `DTYPES`.
        sizes, projected: of branches and of projections.

    Raises:
        Wrong: says where, with the class of taps.
    """
    fault = fault_of(name)
    suffer(fault)
    if tiny(gpu):
        torch.set_num_threads(1)
    forced = Forced(gpu, row, split, fault)
    found = checks.Found()
    work: list[tuple[str, Size, Callable[..., Any]]] = [
        *(("aspp_branches", size, forced.branches) for size in sizes),
        *(("aspp_project", size, forced.project) for size in projected),
    ]
    for op, size, run in work:
        (step,) = steps(op, "plain", size, checks.DTYPES[dtype])
        try:
            found = found.worst(checks.check_step(step, run, dtype, gpu.device))
        except Wrong as wrong:
            raised = wrong.__cause__ is not None
            where = ""
            if op == "aspp_branches" and not raised:
                where = _tap_class(step, run, gpu.device, dtype)
            raise Wrong(f"{op}: {wrong}{where}", **wrong.facts) from None
    return {"error": found.error, "bound": found.bound}


def _tap_class(step: Step, run: Callable[..., Any], device: str, dtype: str) -> str:
    """What the first wrong value and all wrong values have in common, as far as taps go."""
    (expected,) = exact(step)
    with checks.precision(dtype):
        (out,) = (t.cpu().double() for t in step.moved(device).run(run))
    size = float(expected.square().mean().sqrt())
    wrong = ~((out - expected).abs() <= 0.05 * size + 0.02 * expected.abs())
    if not bool(wrong.any()):
        return "; a second run is right"
    s = step.size
    branches = (Branch(s.filters, 1, 1), *(Branch(s.filters, 3, rate) for rate in s.rates))
    n, y, x, channel = wrong.permute(0, 2, 3, 1).nonzero()[0].tolist()
    branch = channel // s.filters
    classes = tap_classes(s.h, s.w, branches)
    number, found = next(
        (i, c)
        for i, c in enumerate(classes)
        if c.branch == branch
        and c.rows.first <= y < c.rows.first + c.rows.size
        and c.cols.first <= x < c.cols.first + c.cols.size
    )
    inside = n * found.pixels + (y - found.rows.first) * found.cols.size + x - found.cols.first
    touched = {
        i
        for i, c in enumerate(classes)
        if bool(
            wrong[
                :,
                c.branch * s.filters : (c.branch + 1) * s.filters,
                c.rows.first : c.rows.first + c.rows.size,
                c.cols.first : c.cols.first + c.cols.size,
            ].any()
        )
    }
    return (
        f"; image {n}, row {y} (mod 8 = {y % 8}), column {x} (mod 8 = {x % 8}), filter "
        f"{channel % s.filters} (mod 8 = {channel % 8}) of branch {branch}, class {number} "
        f"({found.rows.taps}x{found.cols.taps} taps) at its pixel {inside}; wrong values in "
        f"{len(touched)} of {len(classes)} classes: {sorted(touched)[:12]}"
    )


def repeat(name: str, gpu: Machine, row: int, runs: int) -> dict[str, Any]:
    """Many runs of a row, which must agree to the bit and with PyTorch: a barrier that is missing
    shows in some of them.

    Args:
        name: of the unit.
        gpu, row: which.
        runs: how many; few in a rehearsal.

    Raises:
        Wrong: how many runs are not as the first, or the first is not PyTorch's.
    """
    fault = fault_of(name)
    suffer(fault)
    size, runs = (SMALL[0], 3) if tiny(gpu) else (REPEATED, runs)
    (step,) = steps("aspp_branches", "plain", size, torch.bfloat16, gpu.device)
    forced = Forced(gpu, row, None, fault)
    first = checks.run_guarded(step, forced.branches, str(size))[0]
    plain = next(iter(pytorch_forms(step).values()))()
    apart = float((first.float() - plain.float()).norm() / plain.float().norm())
    bound = 3 * checks.allowed(step, VALUES, first, "bfloat16", 2.0**-8)
    if not apart <= bound:
        raise Wrong(f"{apart:.2e} from PyTorch's result, allowed are {bound:.2e}")
    moved = torch.zeros(runs, dtype=torch.int64, device=gpu.device)
    for i in range(runs):
        if i % _BUSY_RUNS == 0 and gpu.device == "cuda":
            torch.cuda.synchronize()
        moved[i] = (step.run(forced.branches)[0] != first).sum()
    different = int((moved > 0).sum())
    if different:
        most = int(moved.max())
        raise Wrong(
            f"{different} of {runs} runs are not as the first, with up to {most} of "
            f"{first.numel()} values changed, first in run {int(moved.nonzero()[0])}"
        )
    return {"runs": runs, "apart": apart}


def residency(name: str, gpu: Machine) -> dict[str, Any]:
    """Programs that the device holds at once, of each sm_90a row, beside those that its lists of
    tiles are made for.

    Raises:
        Wrong: they are made for more.
    """
    suffer(fault_of(name))
    x = torch.empty((1, 64, 9, 11), dtype=torch.bfloat16, device=gpu.device)
    found: list[Row] = []
    for row in rows(SM90):
        assumed = Forced(gpu, row).choice(x, (Branch(256, 3, 2),)).programs
        for half in (False, True):
            held = assumed
            if not tiny(gpu):
                held = torch.ops.deeplab_fast._aspp_sm90_residency(row, half)
            what = f"row {row} {'float16' if half else 'bfloat16'}"
            found.append({"what": what, "resident": held, "assumed": assumed})
    if short := [r for r in found if r["resident"] < r["assumed"]]:
        listed = ", ".join(f"{r['what']} {r['resident']} of {r['assumed']}" for r in short)
        raise Wrong(f"not all programs are resident: {listed}", rows=found)
    return {"rows": found}


def timed(name: str, gpu: Machine, numbers: Sequence[int]) -> dict[str, Any]:
    """Times of rows, whole and cut, beside the rule's choice."""
    suffer(fault_of(name))
    found: list[Row] = []
    for given in TIMED:
        size = SMALL[0] if tiny(gpu) else given
        (step,) = steps("aspp_branches", "plain", size, torch.bfloat16, gpu.device)
        calls: dict[str, Callable[[], Any]] = {}
        for row in numbers:
            for split in (False, True):
                forced = Forced(gpu, row, split)
                calls[f"row {row} {'cut' if split else 'whole'}"] = _call(step, forced)
        # A graph, so that the host's part, which forcing a row adds to, is left out.
        replays = {name: graphed(call, gpu.device) for name, call in calls.items()}
        found += rows_of(f"branches {given}", times(replays, gpu.device, seconds=0.3))
    return {"rows": found}


def _call(step: Step, forced: Forced) -> Callable[[], Any]:
    return lambda: step.launch(forced.branches)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_rows", description=__doc__)
    parser.add_argument("what", choices=("check", "repeat", "time"))
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="default: all of sm_90a")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="the smallest size only")
    options = parser.parse_args(argv)
    gpu = Machine.from_dict(machine.identity())
    numbers = rows(SM90) if options.rows is None else options.rows
    begin = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        if options.what == "time":
            answer = timed("", gpu, numbers)
        for row in numbers:
            if options.what == "repeat":
                answer[f"row {row}"] = repeat("", gpu, row, options.times)
            for split in (False, True) if options.what == "check" else ():
                sizes, projected = (SMALL, SMALL_PROJECTED) if options.small else (SIZES, PROJECTED)
                how = f"row {row} {'cut' if split else 'whole'}"
                answer[how] = check("", gpu, row, split, options.dtype, sizes, (projected,))
                print(f"{how} {options.dtype}: ok", flush=True)
    except Wrong as wrong:
        print(json.dumps({"reason": str(wrong)}))
        return 1
    answer["seconds"] = round(time.monotonic() - begin, 2)
    print(json.dumps(answer, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
