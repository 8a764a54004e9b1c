"""How long an op takes beside PyTorch's own forms of it.

All contestants are timed in one process, in rounds, on sets of random inputs that together overflow
the caches. On a GPU each is replayed from a CUDA graph of one call for each set, so that what is
compared is the work of the device and not that of the host; where one cannot be captured all are
called. A result that is far from PyTorch's at this size is no time but an error.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..dispatch import checks
from ..dispatch.declare import find, pytorch_forms, steps
from ..dispatch.errors import Wrong, norm_error, one_line
from ..dispatch.examples import LABELS, VALUES, Run, Size, Step, flat
from .runner import progress
from .timing import SAMPLE_SECONDS, captured, clock, interleaved, peak_bytes, ratio

# Sets of inputs together should exceed what the second-level cache holds between calls.
_CACHE_BYTES = 128 << 20
_MOST_SETS = 6
# (fewest, most) rounds of each contestant.
_ROUNDS = (7, 25)
# Ours and PyTorch's may each be off by what a check allows one result. PyTorch's own error, of
# which that is made, is assumed at these sizes and not measured: once more.
_APART = 3.0
# Logits off by e move 12 e of the pixels (`errors`): 5e-5 for the 2e-6 that each of two sums in
# fp32 may be off, and as much again for distributions denser at 0 than assumed there.
_LABELS_APART = 1e-4
# Assumed of PyTorch's fp32 path. At the sizes of checks it is off by less than 1e-6 (asserted in
# tests/unit/test_tuning.py); sums of 100 times as many values by ten times that.
_FP32 = 1e-5


@dataclass(frozen=True)
class Contestant:
    """What was found of one contestant.

    Attributes:
        ms: median of a call.
        peak_mb: most memory beyond what was there before, MiB; -1 where the device does not say.
        graphed: replayed from a CUDA graph.
        problem: why it was not timed.
    """

    ms: float = math.nan
    peak_mb: float = -1.0
    graphed: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Speeds:
    """A comparison.

    Attributes:
        sizes: of the call, as `trust.sizes` has them.
        pytorch: name of PyTorch's fastest form.
        contestants: PyTorch's forms and the backends, by name.
        gains: by backend, the median over rounds of PyTorch's fastest over it.
    """

    sizes: tuple[int, ...]
    pytorch: str
    contestants: dict[str, Contestant]
    gains: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        return asdict(self)


def compare(
    op: str,
    form: str,
    size: Size,
    dtype: str,
    device: str,
    implementations: Mapping[str, Run],
    sizes: tuple[int, ...],
    *,
    seconds: float = 0.4,
) -> Speeds:
    """Time backends beside PyTorch.

    Args:
        op, form, size: what it is; of an op with several functions the first.
        dtype: of `checks.DTYPES`.
        device: "cuda", or "cpu" to rehearse.
        implementations: `Implementation.run` by backend.
        sizes: of the call, for the result.
        seconds: of all rounds together, as far as `_ROUNDS` allows.

    Raises:
        Wrong: a backend is far from PyTorch's result.
    """
    with checks.precision(dtype), _searching(), torch.no_grad():
        sets = input_sets(op, form, size, dtype, device)
        calls: dict[str, list[Callable[[], Any]]] = {
            name: [] for name in (*pytorch_forms(sets[0]), *implementations)
        }
        for step in sets:
            for name, call in pytorch_forms(step).items():
                calls[name].append(call)
            for name, run in implementations.items():
                calls[name].append(partial(step.launch, run))
        for name, run in implementations.items():
            check_near(sets[0], run, dtype, name)
        found: dict[str, Contestant] = {}
        for name, own in calls.items():
            progress()
            try:
                found[name] = Contestant(peak_mb=_peak_mb(own, device))
            except Exception as error:
                # A form that PyTorch has not for this call, or no room; of ours anything else is an
                # answer.
                if name in implementations and not checks.lacks_memory(error):
                    raise Wrong(f"{name} at {size}: {one_line(error)}") from error
                found[name] = Contestant(problem=one_line(error))
                _recover(device)
        ran = {name: own for name, own in calls.items() if not found[name].problem}
        timed, graphed = repeatable(ran, device, find(op).examples.capturable)
        samples = interleaved(timed, clock(device), seconds, _ROUNDS, SAMPLE_SECONDS[device])
    for name, own_samples in samples.items():
        calls_of = len(sets)
        ms = statistics.median(own_samples) * 1e3 / calls_of
        found[name] = Contestant(ms, found[name].peak_mb, graphed)
    forms = [name for name in samples if name not in implementations]
    if not forms:
        raise RuntimeError(f"no form of PyTorch ran: {found}")
    best = min(forms, key=lambda name: found[name].ms)
    gains = {
        name: ratio(samples[best], samples[name]) for name in implementations if name in samples
    }
    return Speeds(sizes, best, found, gains)


def check_at(
    op: str,
    form: str,
    size: Size,
    dtype: str,
    device: str,
    run: Run,
    name: str,
) -> None:
    """One call at a size, held against PyTorch's; arguments as for `compare`.

    Raises:
        Wrong: they are far apart.
    """
    progress()
    with checks.precision(dtype), torch.no_grad():
        try:
            step = steps(op, form, size, checks.DTYPES[dtype], device)[0]
            check_near(step, run, dtype, name)
        except Exception as error:
            # Beside other checks; alone it may have room.
            if not checks.lacks_memory(error):
                raise
        finally:
            _recover(device)


def input_sets(
    op: str, form: str, size: Size, dtype: str, device: str, method: str = ""
) -> list[Step]:
    """As many sets of inputs as overflow the caches.

    Args:
        op, form, size, dtype, device: as for `compare`.
        method: of an op with several functions; "" for the first.
    """

    def one(seed: int) -> Step:
        found = steps(op, form, size, checks.DTYPES[dtype], device, seed)
        return next(step for step in found if method in ("", step.method))

    first = one(0)
    bytes_each = sum(t.numel() * t.element_size() for t in first.tensors)
    count = min(max(2, -(-_CACHE_BYTES // max(bytes_each, 1))), _MOST_SETS)
    return [first, *(one(seed) for seed in range(1, count))]


def check_near(step: Step, run: Run, dtype: str, name: str) -> None:
    """Hold a backend's result against PyTorch's: float64 takes too long at the sizes of models.

    Raises:
        Wrong: they are far apart, or single values are.
    """
    theirs = flat(next(iter(pytorch_forms(checks.measure(step)).values()))())
    ours = checks.run_guarded(step, run, str(step.size))
    for number, (out, ref) in enumerate(zip(ours, theirs, strict=False)):
        if not out.numel():
            continue
        kind, which = step.kinds[number], f"result {number} of {name} at {step.size}"
        hint = ""
        if kind == VALUES:
            anchor = checks.OPERANDS.get(dtype, _FP32)
            # PyTorch's own may be rounded to the dtype of the call: statistics of a batch are.
            if not find(step.op).is_product and out.dtype == ref.dtype == torch.float32:
                anchor = _FP32
            bound = _APART * max(checks.allowed(step, kind, out, dtype, anchor), anchor)
            apart = norm_error(out, ref)
            # An image at a time: copies in float64 of all take gigabytes.
            parts = zip(*(t.split(1) if t.dim() == 4 else [t] for t in (out, ref)), strict=True)
            hint = next((found for o, r in parts if (found := checks.first_wrong(o, r, bound))), "")
        elif kind == LABELS:
            apart, bound = float((out != ref).double().mean()), _LABELS_APART + 1 / out.numel()
        else:
            total = max(1.0, float(ref.sum()))
            apart = float((out - ref).abs().sum()) / 2 / total
            bound = _LABELS_APART + 1 / total
        if not apart <= bound or hint:
            raise Wrong(
                f"{which} is {apart:.2e} from PyTorch's, allowed are {bound:.2e}"
                f"{'; ' * bool(hint)}{hint}"
            )


def repeatable(
    calls: Mapping[str, Sequence[Callable[[], Any]]], device: str, capturable: bool = True
) -> tuple[dict[str, Callable[[int], Any]], bool]:
    """What makes one call for each set, by contestant, and whether it replays CUDA graphs.

    One that cannot be captured is called, and then all are: a graph against calls would compare
    the device's work with the host's.

    Args:
        calls: of each contestant, one for each set; each was made before.
        device: "cuda" or "cpu".
        capturable: False where it is known that one cannot be.
    """

    def each(own: Sequence[Callable[[], Any]]) -> Callable[[int], Any]:
        def run(i: int) -> None:
            for call in own:
                call()

        return run

    called = {name: each(own) for name, own in calls.items()}
    if device != "cuda" or not capturable:
        return called, False
    replayed: dict[str, Callable[[int], Any]] = {}
    try:
        for name, own in calls.items():
            graph = captured(own)
            replayed[name] = lambda i, graph=graph: graph.replay()  # type: ignore[misc]
    except RuntimeError:
        _recover(device)
        return called, False
    return replayed, True


def _peak_mb(calls: Sequence[Callable[[], Any]], device: str) -> float:
    """Peak memory of the first call; makes all, for what they set up at a first call."""
    for call in calls:
        call()
    if device != "cuda":
        return -1.0
    return peak_bytes(calls[0]) / 2**20


def _searching() -> AbstractContextManager[None]:
    """cuDNN measures its algorithms, as those who want speed let it."""
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=True,
        deterministic=False,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    )


def _recover(device: str) -> None:
    if device != "cuda":
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
