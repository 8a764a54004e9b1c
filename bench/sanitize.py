"""`python -m bench.sanitize`: every op once, at small odd shapes, on every GPU backend.

Meant to be run under compute-sanitizer, where one call takes seconds. Results are held against the
exact ones as well; exit status 1 where one is wrong. An op that a backend does not have is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import gate, op_cases, registry
from .costs import UpsampleSize
from .providers import expected
from .registry import FORWARD, FORWARD_BACKWARD, Arguments, Case

# Odd sizes, channels that are no multiple of a block, a ratio that is no integer, taps that all
# fall outside (rate 12 on 9 rows).
_SIZES = UpsampleSize(2, 5, 5, 7, 33, 41)
_SMALLER = UpsampleSize(1, 3, 9, 8, 5, 4)
_MAP = {"n": 2, "h": 9, "w": 11}


def small_cases() -> list[Case]:
    """The cases, none of which belongs to a suite."""
    given = {"suites": ()}
    found: list[Case] = []
    for shape, sizes in (("up", _SIZES), ("down", _SMALLER)):
        upsampled = {**given, "shape": shape, "sizes": sizes}
        found += [
            op_cases.UpsampleArgmax(op="upsample_argmax", **upsampled),
            op_cases.UpsampleCrossEntropy(
                op="upsample_cross_entropy", modes=(FORWARD, FORWARD_BACKWARD), **upsampled
            ),
            op_cases.UpsampleConfusion(op="upsample_confusion", **upsampled),
            op_cases.UpsampleSoftmaxAdd(op="upsample_softmax_add", **upsampled),
        ]
    found += [
        op_cases.AsppBranches(
            op="aspp_branches",
            shape="odd",
            rates=(2, 4, 12),
            channels=40,
            out_channels=24,
            **_MAP,
            **given,
        ),
        op_cases.AsppProject(
            op="aspp_project",
            shape="odd",
            channels=40,
            pooled=24,
            out_channels=24,
            **_MAP,
            **given,
        ),
        *(
            op_cases.ConvBnActCase(
                op="conv_bn_act",
                shape=f"{size}x{size}d{dilation}",
                c=40,
                k=24,
                size=size,
                dilation=dilation,
                residual=size == 1,
                **_MAP,
                **given,
            )
            for size, dilation in ((1, 1), (3, 1), (3, 2))
        ),
    ]
    return found


def check(names: Sequence[str], device: str, dtype: torch.dtype) -> int:
    """Run every op on the named backends; returns how many results were wrong."""
    wrong = 0
    for case in small_cases():
        for mode in case.modes:
            # Data and exact results come from the CPU, so that hardly any kernel but those under
            # test runs on the GPU.
            args = case.setup("cpu", dtype)
            exact = expected(case, mode, args)
            args = _moved(args, device)
            layers = max(1, case.cost(mode, dtype.itemsize).convolutions)
            for name in names:
                p = registry.provider(name)
                what = f"{case.id} {mode} {str(dtype).removeprefix('torch.')} {name}"
                reason = p.missing_reason(case, mode, device, dtype)
                if reason:
                    print(f"{what}: not run: {reason}", flush=True)
                    continue
                run = p.build(case, mode, device, dtype, args)
                result = [t.cpu() for t in gate.outputs(run.probe())]
                found = gate.errors(case, mode, result, exact)
                precision = p.precision(case, mode, device, dtype)
                bounds = {
                    kind: gate.limit(case, mode, kind, precision, layers, None) for kind in found
                }
                bad = [k for k, error in found.items() if not error <= bounds[k]]
                wrong += bool(bad)
                shown = ", ".join(f"{k} error {e:.1e}" for k, e in found.items())
                print(f"{what}: {'WRONG' if bad else 'ok'} ({shown})", flush=True)
    return wrong


def _moved(args: Arguments, device: str) -> Arguments:
    return Arguments(
        args.module.to(device),
        [tuple(t.to(device) for t in given) for given in args.inputs],
        [None if t is None else t.to(device) for t in args.cotangents],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, 1 where a result is wrong, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], metavar="NAME")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.sanitize: needs a CUDA device, and none is visible", file=sys.stderr)
        return 2
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        wrong += check(options.backends, "cuda", dtype)
    torch.cuda.synchronize()
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
