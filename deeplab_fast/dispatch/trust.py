"""Whether a GPU kernel of this package runs by itself: what its records say of a call.

A kernel that nobody has seen run on a GPU like this one may hang it or be wrong, and one that is
slower than PyTorch's is no gain. So without a record that it passed its checks and was faster, it
runs only where it is asked for by name:

    passed here and faster                            runs
    Triton, passed and faster on another compute      runs after a check at first use in the process
    capability or with another minor version of it
    failed, or slower                                 does not run
    no record                                         does not run

"Here" is the same compute capability and the same sources (`sources`); for records of one's own the
same versions of driver, PyTorch and Triton as well. Which of PyTorch's kernels run needs no record.

A call at a size that was not measured has the gain of the nearest one that was: the least sum over
its dimensions of |log(size / measured size)|.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .. import _ext
from . import checks, describe, records, sources
from .declare import is_product, sources_of
from .describe import OpDesc
from .limits import allow_tf32
from .records import FAILED, OWN_ORIGIN, PASSED, Record, Time

logger = logging.getLogger("deeplab_fast")

# Of a call, what changes neither the kernel's code nor its arithmetic, or is checked together.
_NO_FORM = ("reduction", "align_corners")
TUNE = "`deeplab-fast tune` checks and measures it here"


@dataclass(frozen=True)
class Judgement:
    """What records say of a kernel at a call.

    Attributes:
        runs: whether it may run by itself.
        text: the verdict, for people.
        gain: how many times faster than PyTorch's best form; 0 where that is not known.
        at_first_use: it runs only if it passes a check in this process first.
    """

    runs: bool
    text: str
    gain: float = 0.0
    at_first_use: bool = False


def form(desc: OpDesc) -> str:
    """The code of a kernel that a call runs, by the switches of the call: "relu+residual"."""
    parts = []
    for name, value in desc.params.items():
        if name in _NO_FORM:
            continue
        if isinstance(value, str):
            parts.append(value)
        elif value is True or name == "classes":
            parts.append(name)
    return "+".join(sorted(parts)) or "plain"


def sizes(desc: OpDesc) -> tuple[int, ...]:
    """The numbers of a call that its time follows from: the shape of its main input, then those
    among its parameters, in their order."""
    found = list(desc.shape)
    for value in desc.params.values():
        found += _numbers(value)
    return tuple(found)


def dtype_name(desc: OpDesc, tf32: bool) -> str:
    """A call's dtype by the name that records have: "bfloat16", "float16", "float32", "tf32"."""
    name = describe.dtype_name(desc.dtype)
    return "tf32" if name == "float32" and tf32 and is_product(desc.op) else name


def source(op: str, backend: str, capability: tuple[int, int]) -> str:
    """Fingerprint of what an op would run on a backend; "" where it is not known."""
    name = sources.family(sources_of(op), backend)
    if not name:
        return ""
    if backend == "triton":
        return sources.of_triton(name)
    extension = _ext.CUDA
    # The branches have code of their own for 9.0, in an extension that may be missing.
    if name == "aspp" and capability == (9, 0) and _ext.SM90.loaded:
        name, extension = "aspp_sm90", _ext.SM90
    return sources.of_cuda(name, extension.build.get("sources", {}).get(name, ""))


def judge(desc: OpDesc, backend: str) -> Judgement:
    """What records say of a backend, "triton" or "cuda", at a call on a CUDA device."""
    if desc.capability is None:
        return Judgement(False, "the compute capability is not known")
    # Asked at every call of an op: what follows from the facts is worked out once.
    facts = (desc.op, desc.device, desc.dtype, desc.shape, tuple(desc.params.items()))
    return _judge_facts(backend, facts, desc.capability, desc.gpu, allow_tf32())


_generation = 0


def generation() -> int:
    """A number that is another one once records were forgotten: what rests on them is out of
    date."""
    return _generation


def forget() -> None:
    """Judge anew: records have changed."""
    global _generation
    _generation += 1
    records.forget()
    _judge_facts.cache_clear()
    configs.cache_clear()


@lru_cache(maxsize=4096)
def _judge_facts(
    backend: str, facts: tuple[Any, ...], capability: tuple[int, int], gpu: str, tf32: bool
) -> Judgement:
    op, device, dtype, shape, params = facts
    desc = OpDesc(op, device, dtype, shape, dict(params))
    return _judge(op, backend, dtype_name(desc, tf32), form(desc), sizes(desc), capability, gpu)


def _judge(
    op: str,
    backend: str,
    dtype: str,
    form: str,
    sizes: tuple[int, ...],
    capability: tuple[int, int],
    gpu: str,
) -> Judgement:
    mine = [
        r
        for r in records.all_records()
        if (r.op, r.backend, r.dtype, r.form) == (op, backend, dtype, form)
    ]
    here = ".".join(map(str, capability))
    unknown = Judgement(False, f"not checked on compute capability {here}; {TUNE}")
    if not mine:
        return unknown
    now = source(op, backend, capability)
    current = [r for r in mine if now and r.source == now]
    if not current:
        return Judgement(False, f"its sources are not those that were checked; {TUNE}")
    counting = [r for r in current if r.capability == capability and _counts_here(r)]
    # Of this very model first, then one's own, then the latest.
    counting.sort(key=lambda r: r.date, reverse=True)
    counting.sort(key=lambda r: (r.gpu != gpu, r.origin != OWN_ORIGIN))
    if counting:
        return _by_record(counting[0], sizes, at_first_use=False)
    elsewhere = [r for r in current if r.verdict == PASSED and r.times]
    if backend == "triton" and elsewhere:
        best = min(elsewhere, key=lambda r: (_distance(capability, r.capability), r.origin))
        return _by_record(best, sizes, at_first_use=True)
    others = sorted({".".join(map(str, r.capability)) for r in current})
    if here in others:
        return Judgement(False, f"checked with another driver, PyTorch or Triton; {TUNE}")
    return Judgement(False, f"{unknown.text} (there are records for {', '.join(others)})")


def _counts_here(record: Record) -> bool:
    """Whether a record of this compute capability and these sources counts as it is."""
    if record.origin == OWN_ORIGIN:
        versions = records.Versions.here()
        return (record.driver, record.torch, record.triton) == (
            versions.driver,
            versions.torch,
            versions.triton,
        )
    # What is compiled ahead does not depend on Triton.
    return record.backend != "triton" or records.minor(record.triton) == records.minor(
        records.installed_triton()
    )


def _by_record(record: Record, sizes: Sequence[int], at_first_use: bool) -> Judgement:
    about = f"{record.gpu}, {record.date}, {record.origin}"
    if record.verdict == FAILED:
        return Judgement(False, f"failed its checks: {record.reason} ({about})")
    time = nearest(record.times, sizes)
    if time is None:
        return Judgement(False, f"passed, not measured ({about}); {TUNE}")
    at = "" if tuple(sizes) == time.sizes else f" at {list(time.sizes)}, the nearest measured"
    text = f"passed, {time.gain:.2f}x PyTorch's {time.pytorch}{at} ({about})"
    if not time.gain >= 1:
        return Judgement(False, text.replace("passed,", "passed, slower:"), time.gain)
    if at_first_use:
        text += "; checked here at first use"
    return Judgement(True, text, time.gain, at_first_use)


def nearest(times: Sequence[Time], sizes: Sequence[int]) -> Time | None:
    """The time whose sizes are nearest; None where none has as many numbers."""
    alike = [t for t in times if len(t.sizes) == len(sizes)]

    def distance(time: Time) -> float:
        pairs = zip(time.sizes, sizes, strict=True)
        return sum(abs(math.log((2 + a) / (2 + b))) for a, b in pairs)

    return min(alike, key=distance, default=None)


# Kernels that passed or failed their check at first use in this process, by what was checked.
_first_uses: dict[tuple[str, str, str, str, tuple[int, int] | None], str] = {}
_UNDER_WAY = "its check at first use is under way"


def first_use_problem(desc: OpDesc, backend: str) -> str:
    """Check a kernel once in this process, on the current device, where nothing was yet.

    Returns:
        Why it may not run, "" where it may.
    """
    key = _first_use_key(desc, backend)
    if key in _first_uses:
        return _first_uses[key]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "its check at first use cannot run while a CUDA graph is captured; call it before"
    # A check calls ops of its own; meanwhile this kernel is not chosen.
    _first_uses[key] = _UNDER_WAY
    problem = checks.first_use_problem(desc.op, backend, key[2], key[3])
    _first_uses[key] = problem and f"failed its check at first use: {problem}"
    if problem:
        logger.warning("%s: %s %s and is not used", desc.op, backend, _first_uses[key])
    return _first_uses[key]


def is_settled(desc: OpDesc, backend: str) -> bool:
    """Whether what records and a check at first use say of a backend, "triton" or "cuda", at a call
    stays what it is until records are forgotten."""
    if not judge(desc, backend).at_first_use:
        return True
    return _first_uses.get(_first_use_key(desc, backend), _UNDER_WAY) != _UNDER_WAY


def _first_use_key(desc: OpDesc, backend: str) -> tuple[str, str, str, str, tuple[int, int] | None]:
    dtype = dtype_name(desc, allow_tf32())
    return desc.op, backend, dtype, form(desc), desc.capability


@lru_cache(maxsize=256)
def configs(kernel: str, backend: str, capability: tuple[int, int]) -> tuple[records.Config, ...]:
    """The launch configurations of a kernel that were measured on a compute capability, the same
    tuple for as long as the records are the same.

    Args:
        kernel: name in `deeplab_fast.kernels.tuned.TUNABLE`.
        backend: "triton".
        capability: compute capability.
    """
    found: list[records.Config] = []
    for record in records.all_records():
        if (record.backend, record.capability, record.verdict) != (backend, capability, PASSED):
            continue
        if not any(config.kernel == kernel for config in record.configs):
            continue
        if record.source == source(record.op, backend, capability) and _counts_here(record):
            found += [config for config in record.configs if config.kernel == kernel]
    return tuple(found)


def _numbers(value: object) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return []


def _distance(capability: tuple[int, int], other: tuple[int, int]) -> int:
    return abs(10 * capability[0] + capability[1] - 10 * other[0] - other[1])
