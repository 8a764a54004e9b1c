"""`python -m bench.sanitize`: every op once, at small odd shapes, on every GPU backend.

Meant to be run under compute-sanitizer, where one call takes seconds. Results are held against the
exact ones as well; exit status 1 where one is wrong. An op that a backend does not have is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from deeplab_fast.dispatch.examples import Size

from . import gate
from .everything import registry
from .op_cases import OpCase, declared_cases
from .providers import expected
from .registry import Arguments, Case


def small_cases() -> list[Case]:
    """Every op at the first of the sizes that it is declared with, odd ones: the commonest of its
    forms at two, the next at one. None belongs to a suite."""
    found = declared_cases(((0, 0), (0, 1), (1, 0)))
    for rate in (1, 2):
        size = Size(2, 40, 9, 11, filters=24, rates=(rate,))
        shape = f"3x3d{rate}"
        found.append(OpCase(op="conv_bn_act", form="relu", size=size, shape=shape, suites=()))
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
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: rehearse")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.sanitize: needs a CUDA device, and none is visible", file=sys.stderr)
        return 2
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        wrong += check(options.backends, options.device, dtype)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
