"""Whether a kernel is right: the check that a record of it rests on.

Every result is held against float64 at sizes that each cover an edge, with outputs poisoned by NaN,
in channels_last and in NCHW, and must come out the same to the bit when the call is repeated.

The error of a result (`errors`) may be twice that of PyTorch's own path in the same dtype, plus one
rounding of what is stored, but not more than independent roundings of both operands of a product
explain. Kernels that compute in fp32 whatever their input's dtype are held against PyTorch's fp32
path. A single value may be off by twelve times what that allows on average, and by a rounding of
its own: a wrong tile shows even where the norm over all hides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import testing
from .declare import exact, find, implementations, pytorch_forms, steps
from .errors import DEVIATIONS, DIRECT, Wrong, count_error, label_error, norm_error, one_line
from .examples import COUNTS, LABELS, Run, Size, Step, flat

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# Where a kernel is checked that passed on another compute capability.
FIRST_USE_DEVICE = "cuda"
# Distance between neighbouring numbers, relative to them, at most.
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
OPERANDS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-11}
# Independent roundings of both operands, and how far above their expected size errors may be.
_PRODUCT = 4 * math.sqrt(2)


@dataclass(frozen=True)
class Found:
    """What a check measured: the error that comes nearest to its bound, and that bound."""

    error: float = 0.0
    bound: float = 0.0

    def worst(self, other: Found) -> Found:
        """The one of both that uses more of its bound."""
        share = [f.error / f.bound if f.bound else 0.0 for f in (self, other)]
        return self if share[0] > share[1] else other


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """PyTorch's products of fp32 operands exact, or for "tf32" rounded to that."""
    with testing.tf32(dtype == "tf32"):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN until they are written; PyTorch does that in this mode."""
    with testing.deterministic():
        yield


def check(
    op: str,
    implementation: Run,
    dtype: str,
    form: str,
    device: str,
    *,
    at: Sequence[Size] | None = None,
    reasons: Callable[[Step], Sequence[str]] = lambda step: (),
    progress: Callable[[], None] = lambda: None,
) -> Found:
    """Check a form of an op.

    Args:
        op, form: what it is.
        implementation: `Implementation.run`.
        dtype: of `DTYPES`.
        device: "cuda", or "cpu" to rehearse.
        at: sizes; those of the op where None is given.
        reasons: why the implementation cannot run a step, which is then left out.
        progress: called before each step.

    Raises:
        Wrong: the first result that is wrong; says where.
        ValueError: no size is one that the implementation can run.
    """
    found, ran = Found(), False
    for size in find(op).examples.sizes if at is None else at:
        for step in steps(op, form, size, DTYPES[dtype]):
            if reasons(step):
                continue
            ran = True
            progress()
            found = found.worst(check_step(step, implementation, dtype, device))
    if not ran:
        raise ValueError(f"{op} ({form}, {dtype}) was not checked: no size can run")
    return found


def check_step(step: Step, implementation: Run, dtype: str, device: str, repeats: int = 1) -> Found:
    """Check one call, in channels_last and in NCHW.

    Args:
        step: with its arguments on the CPU.
        implementation, dtype, device: as for `check`.
        repeats: further calls, each of which must give the same bits.

    Raises:
        Wrong: a result is not what it should be.
    """
    expected = exact(step)
    moved = step.moved(device)
    with precision(dtype):
        anchors = _anchors(step, expected, device)
    found = Found()
    layouts = {"channels_last": moved, "NCHW": moved.converted(_nchw)}
    for layout, given in layouts.items():
        where = f"{step.size}{f' {step.method}' * bool(step.method)} in {layout}"
        with ExitStack() as stack:
            stack.enter_context(precision(dtype))
            stack.enter_context(poisoned())
            results = run_guarded(given, implementation, where)
            for number in range(repeats):
                again = run_guarded(given, implementation, where)
                _check_same(results, again, f"call {number + 2} differs at {where}")
        results = [t.cpu() for t in results]
        found = found.worst(_compare(step, results, expected, anchors, dtype, where))
    return found


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is about memory that is taken: PyTorch's, a driver's, Triton's, cuDNN's."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        part in text for part in ("out of memory", "alloc_failed", "out_of_memory")
    )


def run_guarded(step: Step, implementation: Run, where: str) -> list[Tensor]:
    """The results of a call that is waited for.

    Raises:
        Wrong: the implementation raises, or the device reports an error of its kernels.
        Exception: there is no room here (`lacks_memory`), which says nothing of the implementation.
    """
    try:
        results = step.run(implementation)
        if any(t.is_cuda for t in results):
            torch.cuda.synchronize()
    except Exception as error:
        if lacks_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise Wrong(f"raises {type(error).__name__} at {where}: {text}") from error
    return results


def first_use_problem(op: str, backend: str, dtype: str, form: str) -> str:
    """What the check of a kernel on the current CUDA device says; "" where it passed.

    For a kernel that passed on another compute capability: the first of its sizes.
    """
    implementation = implementations(op)[backend]
    try:
        check(op, implementation.run, dtype, form, FIRST_USE_DEVICE, at=find(op).examples.sizes[:1])
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return one_line(error)
    return ""


def allowed(step: Step, kind: str, out: Tensor, dtype: str, anchor: float) -> float:
    """The largest error that a result may have.

    Args:
        step: the call.
        kind: of the result.
        out: the result.
        dtype: of `DTYPES`.
        anchor: error of PyTorch's own path.
    """
    if kind == COUNTS:
        # A pixel whose two best logits are equal but for a rounding, and one in 10,000.
        pixels = max(1, int(out.sum()))
        return 2 * anchor + (1 + 1e-4 * pixels) / pixels / DEVIATIONS
    if kind == LABELS:
        return max(2 * anchor, DIRECT)
    bound = max(2 * anchor, DIRECT)
    if find(step.op).is_product and dtype in OPERANDS:
        bound = min(bound, _PRODUCT * OPERANDS[dtype])
    return bound + _ROUNDOFF.get(out.dtype, 0.0)


def measure(step: Step) -> Step:
    """The step as PyTorch's path for it is run that results are held against: of upsampling ops,
    which compute in fp32, in fp32; on a copy of what the call changes."""
    if find(step.op).examples.in_fp32:
        step = step.converted(lambda t: t.float())
    return step.converted(torch.clone) if step.changed >= 0 else step


def _anchors(step: Step, expected: Sequence[Tensor], device: str) -> list[float]:
    """Errors of PyTorch's own path, one for each result."""
    run = next(iter(pytorch_forms(measure(step.moved(device))).values()))
    results = [t.cpu() for t in flat(run())]
    return [
        error_of(kind, out, ref)
        for kind, out, ref in zip(step.kinds, results, expected, strict=False)
    ]


def error_of(kind: str, out: Tensor, ref: Tensor) -> float:
    """The error of a result of a kind, as `errors` measures it."""
    if kind == LABELS:
        return label_error(out, ref)
    if kind == COUNTS:
        return count_error(out, ref)
    return norm_error(out, ref) if ref.numel() else 0.0


def _compare(
    step: Step,
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    anchors: Sequence[float],
    dtype: str,
    where: str,
) -> Found:
    found = Found()
    results = [t for t in results if t.numel()]
    expected = [t for t in expected if t.numel()]
    if len(results) != len(expected):
        raise Wrong(f"{len(results)} results in place of {len(expected)} at {where}")
    for number, (out, ref) in enumerate(zip(results, expected, strict=True)):
        kind, anchor = step.kinds[number], anchors[number]
        which = f"result {number} of {where}"
        shape = (ref.shape[0], *ref.shape[2:]) if kind == LABELS else ref.shape
        if out.shape != shape:
            raise Wrong(f"{which} has shape {list(out.shape)} in place of {list(shape)}")
        error = error_of(kind, out, ref)
        bound = allowed(step, kind, out, dtype, anchor)
        if not error <= bound:
            hint = "" if kind in (LABELS, COUNTS) else f"; {first_wrong(out, ref, bound)}"
            raise Wrong(
                f"{which} is off by {error:.2e}, allowed are {bound:.2e}{hint}",
                error=error,
                bound=bound,
            )
        if kind not in (LABELS, COUNTS) and (text := first_wrong(out, ref, bound)):
            raise Wrong(f"{which}: {text}", error=error, bound=bound)
        found = found.worst(Found(error, bound))
    return found


def first_wrong(out: Tensor, ref: Tensor, bound: float) -> str:
    """The first single value that is off by more than it may be; "" where none is.

    Args:
        out, ref: a result and what it should be.
        bound: the largest error of the whole, as `allowed` gives it.
    """
    out, ref = out.double(), ref.double()
    size = float(ref.square().mean().sqrt())
    wrong = ~((out - ref).abs() <= DEVIATIONS * bound * size + bound * ref.abs())
    count = int(wrong.sum())
    if not count:
        return ""
    # Channels inside: the order in which kernels write.
    inside = wrong.permute(0, 2, 3, 1) if wrong.dim() == 4 else wrong
    index = tuple(inside.nonzero()[0].tolist())
    place = f"[{', '.join(map(str, index))}]"
    if wrong.dim() == 4:
        n, y, x, c = index
        index = (n, c, y, x)
        pixel = (n * wrong.shape[2] + y) * wrong.shape[3] + x
        place = (
            f"image {n}, row {y}, column {x}, channel {c} (pixel mod 8 = {pixel % 8}, "
            f"channel mod 8 = {c % 8})"
        )
    return (
        f"{count} of {wrong.numel()} values are wrong, first at {place}: "
        f"{float(out[index]):.6g} in place of {float(ref[index]):.6g}"
    )


def _check_same(results: Sequence[Tensor], again: Sequence[Tensor], message: str) -> None:
    for number, (one, other) in enumerate(zip(results, again, strict=True)):
        if not torch.equal(one, other):
            moved = int((one != other).sum())
            raise Wrong(f"{message}: {moved} of {one.numel()} values of result {number}")


def _nchw(t: Tensor) -> Tensor:
    return t.contiguous() if t.dim() == 4 else t
