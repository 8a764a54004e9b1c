"""The fastest launch configuration of a Triton kernel for a call, among its candidates.

Each candidate's result is held against that of the rule's choice, and all are timed side by side.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import checks, records
from ..dispatch.declare import Tuned, gpu_ops
from ..dispatch.errors import Wrong, norm_error
from ..dispatch.examples import COUNTS, LABELS, Run, Step
from ..plan.device import Device
from . import speeds
from .runner import progress
from .timing import SAMPLE_SECONDS, clock, interleaved, ratio
from .workloads import Work

# A candidate must be this much faster than the rule's choice to be recorded.
LEAST_GAIN = 1.03
RULE = "rule"
_ROUNDS = (5, 15)
# Another tile sums in another order: of what one result may be off, twice.
_APART = 2.0


# (key, device, configurations) of a call.
Candidates = tuple[object, Device, list[Any]]
TUNED = tuple(tuned for op in gpu_ops() for tuned in op.tuned)


def candidates(tuned: Tuned, work: Work, dtype: str, device: str, run: Run) -> Candidates:
    """(key, device, configurations) of a call; launches it once.

    Raises:
        RuntimeError: the call does not choose one configuration of the kernel.
    """
    from ..kernels.tuned import TUNABLE, forced

    step = _sets(tuned, work, dtype, device)[0]
    with checks.precision(dtype), forced(tuned.kernel, None) as asked:
        step.run(run)
    if len(asked) != 1:
        raise RuntimeError(
            f"{work.op} {work.form} at {work.size} chooses {len(asked)} configurations of "
            f"{tuned.kernel}"
        )
    ((key, gpu),) = asked
    return key, gpu, TUNABLE[tuned.kernel].candidates(key, gpu)


def compiled(
    tuned: Tuned, work: Work, dtype: str, device: str, run: Run, part: range
) -> dict[str, Any]:
    """Run some of the candidates once, so that Triton keeps what it compiled for them."""
    from ..kernels.tuned import forced

    _, _, found = candidates(tuned, work, dtype, device, run)
    step = _sets(tuned, work, dtype, device)[0]
    failed = {}
    for number in part:
        if number >= len(found):
            break
        progress()
        try:
            with checks.precision(dtype), forced(tuned.kernel, found[number]):
                step.run(run)
        except Exception as error:
            failed[str(found[number])] = " ".join(str(error).split())[:200]
    return {"failed": failed} if failed else {}


def fastest(
    tuned: Tuned,
    work: Work,
    dtype: str,
    device: str,
    run: Run,
    *,
    seconds: float = 2.0,
) -> tuple[records.Config | None, dict[str, float]]:
    """The configuration to record for a call, None where the rule's choice is as good, and
    milliseconds by configuration."""
    from ..kernels.tuned import entry, forced

    key, _, found = candidates(tuned, work, dtype, device, run)
    sets = _sets(tuned, work, dtype, device)
    choices: dict[str, object] = {RULE: None, **{str(config): config for config in found}}
    timed: dict[str, Callable[[int], object]] = {}
    with checks.precision(dtype), torch.no_grad():
        expected = sets[0].run(run)
        for name, config in choices.items():
            progress()
            try:
                with forced(tuned.kernel, config):
                    _check_near(sets[0], sets[0].run(run), expected, dtype, name)
                    calls = {name: [partial(step.launch, run) for step in sets]}
                    for once in calls[name]:
                        once()
                    timed |= speeds.repeatable(calls, device)[0]
            except Wrong:
                raise
            except Exception:
                if name == RULE:
                    raise
                # One that does not fit this GPU after all.
                continue
        # What is called and not replayed must ask for its configuration at every call.
        for name, call in timed.items():
            timed[name] = _under(tuned.kernel, choices[name], call)
        samples = interleaved(timed, clock(device), seconds, _ROUNDS, SAMPLE_SECONDS[device])
    ms = {name: statistics.median(s) * 1e3 / len(sets) for name, s in samples.items()}
    best = min(ms, key=lambda name: ms[name])
    gain = ratio(samples[RULE], samples[best])
    if best == RULE or gain < LEAST_GAIN:
        return None, ms
    return entry(key, choices[best], tuned.kernel, gain), ms


def _under(kernel: str, config: object, call: Callable[[int], object]) -> Callable[[int], object]:
    from ..kernels.tuned import forced

    def run(i: int) -> object:
        with forced(kernel, config):
            return call(i)

    return run


def _sets(tuned: Tuned, work: Work, dtype: str, device: str) -> list[Step]:
    return speeds.input_sets(work.op, work.form, work.size, dtype, device, tuned.method)


def _check_near(
    step: Step, results: Sequence[Tensor], expected: Sequence[Tensor], dtype: str, name: str
) -> None:
    for number, (out, ref) in enumerate(zip(results, expected, strict=True)):
        kind = step.kinds[number]
        if kind in (LABELS, COUNTS):
            # Upsampling computes a pixel in one order, whatever the configuration.
            if not torch.equal(out, ref):
                raise Wrong(f"{name} gives other labels than the rule's configuration")
        elif out.numel():
            bound = _APART * checks.allowed(step, kind, out, dtype, 2.0**-8)
            apart = norm_error(out, ref)
            if not apart <= bound:
                raise Wrong(
                    f"{name} is {apart:.2e} from the rule's configuration, allowed are {bound:.2e}"
                )
