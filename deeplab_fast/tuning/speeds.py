"""How long an op takes beside PyTorch's own forms of it.

All contestants are timed in one process, in rounds, on sets of random inputs that together overflow
the caches. On a GPU each is replayed from a CUDA graph of one call for each set, so that what is
compared is the work of the device and not that of the host; what cannot be captured is called. A
result that is far from PyTorch's at this size is no time but an error.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from . import checks
from .errors import norm_error
from .runner import Wrong, progress
from .steps import LABELS, VALUES, Size, Step, flat, pytorch_forms, steps
from .timing import SAMPLE_SECONDS, captured, clock, interleaved, ratio

# Sets of inputs together should exceed what the second-level cache holds between calls.
_CACHE_BYTES = 128 << 20
_MOST_SETS = 6
# (fewest, most) rounds of each contestant.
_ROUNDS = (7, 25)
# Two results of one dtype may differ by this many times what one may be off.
_APART = 3.0
_LABELS_APART = 0.01


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
    implementations: Mapping[str, Callable[..., Any]],
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
        plain = next(iter(calls))
        for name, run in implementations.items():
            check_near(sets[0], run, calls[plain][0], dtype, name)
        found: dict[str, Contestant] = {}
        timed: dict[str, Callable[[int], Any]] = {}
        for name, own in calls.items():
            progress()
            try:
                peak = _peak_mb(own[0], device)
                timed[name], graphed = repeatable(own, device)
            except Exception as error:
                found[name] = Contestant(problem=_one_line(error))
                _recover(device)
                continue
            found[name] = Contestant(peak_mb=peak, graphed=graphed)
        samples = interleaved(timed, clock(device), seconds, _ROUNDS, SAMPLE_SECONDS[device])
    for name, own_samples in samples.items():
        calls_of = len(sets)
        ms = statistics.median(own_samples) * 1e3 / calls_of
        found[name] = Contestant(ms, found[name].peak_mb, found[name].graphed)
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
    run: Callable[..., Any],
    name: str,
) -> None:
    """One call at a size, held against PyTorch's; arguments as for `compare`.

    Raises:
        Wrong: they are far apart.
    """
    progress()
    with checks.precision(dtype), torch.no_grad():
        step = steps(op, form, size, checks.DTYPES[dtype], device)[0]
        plain = next(iter(pytorch_forms(step).values()))
        try:
            check_near(step, run, plain, dtype, name)
        except torch.OutOfMemoryError:
            # Beside other checks; alone it may have room.
            return
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


def check_near(
    step: Step, run: Callable[..., Any], plain: Callable[[], Any], dtype: str, name: str
) -> None:
    """Hold a backend's result against PyTorch's: float64 takes too long at the sizes of models.

    Raises:
        Wrong: they are far apart.
    """
    if step.changed >= 0:
        return
    theirs = flat(plain())
    ours = checks.run_guarded(step, run, str(step.size))
    for number, (out, ref) in enumerate(zip(ours, theirs, strict=False)):
        if not out.numel():
            continue
        kind = step.kinds[number]
        if kind == VALUES:
            apart = norm_error(out, ref)
            # PyTorch's own path may interpolate and sum in the dtype of the call.
            anchor = 2.0**-8 if out.dtype != torch.float32 or dtype != "float32" else 1e-5
            bound = _APART * max(checks.allowed(step, kind, out, dtype, anchor), anchor)
        elif kind == LABELS:
            apart, bound = float((out != ref).double().mean()), _LABELS_APART
        else:
            total = max(1.0, float(ref.sum()))
            apart = float((out - ref).abs().sum()) / 2 / total
            bound = _LABELS_APART
        if not apart <= bound:
            raise Wrong(
                f"result {number} of {name} at {step.size} is {apart:.2e} from PyTorch's, allowed "
                f"are {bound:.2e}"
            )


def repeatable(own: Sequence[Callable[[], Any]], device: str) -> tuple[Callable[[int], Any], bool]:
    """What makes one call for each set, and whether it replays a CUDA graph of them."""

    def each(i: int) -> None:
        for call in own:
            call()

    if device != "cuda":
        return each, False
    each(0)
    try:
        graph = captured(own)
    except RuntimeError:
        _recover(device)
        return each, False
    return (lambda i: graph.replay()), True


def _peak_mb(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        call()
        return -1.0
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _searching() -> Any:
    """cuDNN measures its algorithms, as those who want speed let it."""
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=True,
        deterministic=False,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    )


def _recover(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
