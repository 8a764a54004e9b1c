"""The registry as pytest-benchmark tests: `test_ops.py` and `test_models.py` are made of this.

    pytest bench/ --benchmark-only -k upsample_argmax

Providers of a case share a group, so that they stand side by side in pytest-benchmark's table. The
suite is `gpu` where there is a GPU, else `cpu`; DEEPLAB_FAST_BENCH_SUITE names another. A provider
that cannot run is skipped with its reason; one whose result is wrong fails and is not timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from . import gate, measure
from .everything import registry
from .providers import expected
from .registry import Arguments, Case, Provider, Suite


def suite() -> Suite:
    """The suite that is collected."""
    default = "gpu" if torch.cuda.is_available() else "cpu"
    name = os.environ.get("DEEPLAB_FAST_BENCH_SUITE", default)
    if name not in registry.SUITES:
        raise ValueError(f"DEEPLAB_FAST_BENCH_SUITE={name} is none of {', '.join(registry.SUITES)}")
    return registry.SUITES[name]


def parameters(kind: str) -> list[Any]:
    """pytest parameters (case, mode, provider) of all cases of a kind."""
    chosen = suite()
    return [
        pytest.param(case, mode, p, id=f"{case.id}-{mode}-{p.name}")
        for case, mode in registry.select(chosen.name)
        if case.kind == kind
        for p in registry.applicable(case, mode, chosen)
    ]


@lru_cache(maxsize=1)
def _prepared(case: Case, mode: str, chosen: str) -> tuple[Arguments, list[torch.Tensor], Any]:
    """Data, exact result and cost of the case at hand, shared by its providers."""
    s = registry.SUITES[chosen]
    args = case.setup(s.device, s.dtype, 0, measure.copies_for(case, s))
    return args, expected(case, mode, args), case.cost(mode, s.dtype.itemsize)


def bench(benchmark: Callable[..., Any], case: Case, mode: str, p: Provider) -> None:
    """Compare a provider's result with the exact one, then time it."""
    s = suite()
    if s.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("suite gpu needs a CUDA device")
    reason = registry.missing_reason(p, case, mode, s)
    if reason:
        pytest.skip(f"{p.name}: {reason}")
    args, exact, cost = _prepared(case, mode, s.name)
    with measure.measuring(s.device):
        run = p.build(case, mode, s.device, s.dtype, args)
        if p.own_expected is not None:
            exact = p.own_expected(case, args, run)
        found = gate.errors(case, mode, gate.outputs(run.probe()), exact)
        precision = p.precision(case, mode, s.device, s.dtype)
        layers = max(1, cost.convolutions)
        for kind, error in found.items():
            bound = gate.limit(case, mode, kind, precision, layers, None)
            assert error <= bound, f"{p.name} disagrees: {kind} error {error:.2e} > {bound:.2e}"
        benchmark.group = f"{case.id} {mode}"
        benchmark.extra_info.update(
            provider=p.name,
            baseline=p.baseline,
            errors=found,
            dense_gmac=cost.dense_macs / 1e9,
            live_gmac=cost.live_macs / 1e9,
            mib=cost.bytes / 2**20,
        )
        benchmark(_timed(run, s.device))
    torch._dynamo.reset()


def _timed(run: Callable[[int], Any], device: str) -> Callable[[], None]:
    count = 0

    def call() -> None:
        nonlocal count
        run(count)
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()

    return call
