"""Which implementation of an op runs, and why.

Implementations are data: an op's declaration has one for each of its backends. `select` takes the
first, in order of priority, that names no reason against the call at hand. An explicit choice
(`use_backend`, the environment variable `DEEPLAB_FAST_BACKEND`) that cannot run raises with its
reasons; an automatic choice falls through to the next and says so once in the log.

On a GPU the automatic choice takes a kernel of this package only where a record says that it is
right and faster than PyTorch's (`trust`), of several the fastest.

`Choices` remembers answers for calls that repeat by the hundred, as those of a training step do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import _ext
from . import limits, trust
from .declare import (
    BACKENDS,
    Implementation,
    check_backend,
    describe,
    implementations,
    is_declared,
    registrations,
)
from .describe import OpDesc
from .examples import Run

logger = logging.getLogger("deeplab_fast")

ENVIRONMENT_VARIABLE = "DEEPLAB_FAST_BACKEND"


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run the call; the message lists the reasons."""


_fallthrough_logged: set[tuple[str, str, str]] = set()
# Process-wide, as torch.backends.cudnn.flags is: autograd runs backward passes on its own threads,
# which a context variable would not reach.
_override: str | None = None


def current_backend() -> str:
    """The choice in force: a name of `BACKENDS`, or "auto"."""
    if _override is not None:
        return _override
    chosen = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    check_backend(chosen, (*BACKENDS, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}: ")
    return chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on the named backend: "reference", "cpu", "triton", "cuda", or "auto".

    The choice holds for the whole process, autograd's threads included, until the block ends, and
    goes before `DEEPLAB_FAST_BACKEND`.

    Raises:
        ValueError: the name is none of these.
        BackendUnavailable: raised by an op that the chosen backend cannot run, with its reasons.
    """
    global _override
    check_backend(name, (*BACKENDS, "auto"))
    before = _override
    _override = name
    try:
        yield
    finally:
        _override = before


def select(desc: OpDesc) -> Implementation:
    """The implementation that runs the call that `desc` describes."""
    table = implementations(desc.op)
    chosen = current_backend()
    if chosen != "auto":
        reasons = _reasons(table, chosen, desc)
        if reasons:
            others = [b for b in BACKENDS if b != chosen and not _reasons(table, b, desc)]
            raise BackendUnavailable(
                f"backend {chosen!r} was asked for and cannot run {desc.op} "
                f"({desc}): {'; '.join(reasons)}. "
                f"These can: {', '.join(others) or 'none'}; or choose 'auto'."
            )
        return table[chosen]
    return _automatic(desc, first_use=True)


def _automatic(desc: OpDesc, first_use: bool) -> Implementation:
    """The automatic choice; `first_use` as for `_automatic_reasons`."""
    rejected: list[tuple[Implementation, list[str]]] = []
    for implementation, judgement in _ranked(implementations(desc.op), desc):
        reasons = _automatic_reasons(implementation, judgement, desc, first_use)
        if not reasons:
            _log_fallthrough(desc.op, rejected, implementation)
            if first_use and ("cpu", [_ext.CPU.reason]) in [(i.backend, r) for i, r in rejected]:
                _ext.warn_of_missing_cpu()
            return implementation
        rejected.append((implementation, reasons))
    listed = "; ".join(f"{i.backend}: {', '.join(r)}" for i, r in rejected)
    raise BackendUnavailable(f"no backend can run {desc.op} ({desc}): {listed}")


def run(desc: OpDesc, *args: object) -> Any:
    """Call the selected implementation."""
    return select(desc).run(*args)


# The functions that run calls, by what else the choice rests on and by the facts of the call.
_Known = dict[Hashable, Run]
_remembered: dict[Hashable, _Known] = {}
_MOST_STATES = 64
_MOST_CALLS = 4096


class Choices:
    """What `select` answers, remembered, for calls of one moment: make one, call, let it go.

    An answer rests on the facts of the call, on what of the process the reasons of this package's
    implementations read, which is read once, when the object is made, and on records. Of an op with
    an implementation that was registered from elsewhere, whose reasons may read anything, nothing
    is remembered; and nothing while a check at first use may still change the answer.
    """

    def __init__(self) -> None:
        self._state = state()
        self._known = _answers(self._state)
        self._known_on_gpu: _Known | None = None

    def of(self, op: str, x: Tensor, facts: Hashable, describe: Callable[[], OpDesc]) -> Run:
        """The function of the implementation that runs a call.

        Args:
            op: its name.
            x: its main input.
            facts: beside x, all that `describe` reads.
            describe: gives the call's description, where it is not known yet.
        """
        known = self._on_gpu() if x.is_cuda else self._known
        key = (op, x.device, x.dtype, x.shape, facts)
        run = known.get(key)
        if run is not None:
            return run
        desc = describe()
        # Asked before the choice, which may run a check.
        stays = is_declared(op) and _is_settled(desc)
        run = select(desc).run
        if stays:
            if len(known) >= _MOST_CALLS:
                known.clear()
            known[key] = run
        return run

    def _on_gpu(self) -> _Known:
        if self._known_on_gpu is None:
            self._known_on_gpu = _answers((self._state, limits.gpu_state()))
        return self._known_on_gpu


def state() -> Hashable:
    """What the answers of `select` rest on beside the call; on a GPU also on `limits.gpu_state`."""
    return (
        _override,
        os.environ.get(ENVIRONMENT_VARIABLE),
        limits.state(),
        trust.generation(),
        registrations(),
        _ext.CPU.loaded,
        _ext.CUDA.loaded,
        _ext.SM90.loaded,
    )


def _answers(state: Hashable) -> _Known:
    known = _remembered.get(state)
    if known is None:
        if len(_remembered) >= _MOST_STATES:
            _remembered.clear()
        known = _remembered[state] = {}
    return known


def _is_settled(desc: OpDesc) -> bool:
    return all(
        trust.is_settled(desc, implementation.backend)
        for implementation in implementations(desc.op).values()
        if implementation.needs_record(desc)
    )


def _ranked(
    table: dict[str, Implementation], desc: OpDesc
) -> list[tuple[Implementation, trust.Judgement | None]]:
    """The implementations in the order in which the automatic choice asks them, with what records
    say of those that need one: what is faster than PyTorch's, the fastest first, then the others by
    priority."""
    ordered = sorted(table.values(), key=lambda i: -i.priority)
    found = [(i, trust.judge(desc, i.backend) if i.needs_record(desc) else None) for i in ordered]
    if desc.device != "cuda":
        return found
    return sorted(found, key=lambda pair: pair[1].gain if pair[1] and pair[1].runs else 0.0,
                  reverse=True)  # fmt: skip


def _automatic_reasons(
    implementation: Implementation,
    judgement: trust.Judgement | None,
    desc: OpDesc,
    first_use: bool,
) -> list[str]:
    """Why the automatic choice leaves an implementation out; empty where it takes it.

    Args:
        judgement: what records say of it; None where it needs none.
        first_use: run the check at first use where records ask for one.
    """
    reasons = implementation.not_supported_reasons(desc)
    if reasons or judgement is None:
        return reasons
    if not judgement.runs:
        return [f"{judgement.text}; use_backend({implementation.backend!r}) runs it all the same"]
    if judgement.at_first_use and first_use:
        problem = trust.first_use_problem(desc, implementation.backend)
        return [problem] if problem else []
    return []


@dataclass(frozen=True)
class Why:
    """The answer of `why`.

    Attributes:
        desc: the call.
        choice: the choice in force, "auto" or a backend.
        chosen: the backend that runs; None where none can.
        rows: each backend with the reasons against it.
        records: of backends that need one, what their record says.
    """

    desc: OpDesc
    choice: str
    chosen: str | None
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    records: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.desc.op} ({self.desc}), backend choice: {self.choice}"]
        for backend, reasons in self.rows:
            mark = "->" if backend == self.chosen else "  "
            text = "; ".join(reasons) or self.records.get(backend, "can run")
            lines.append(f"{mark} {backend:<10}{text}")
        return "\n".join(lines)


def why(op: str, *args: object, **kwargs: object) -> Why:
    """Which backend would run `ops.<op>(*args, **kwargs)`, and what speaks against the others.

    Args:
        op: name in `deeplab_fast.ops`.
        *args, **kwargs: what the op would be called with. Tensors may be on the meta device, then
            nothing is said about CUDA capability.

    Returns:
        `Why`: print it for a table; `.chosen` is None where no backend can run the call.
    """
    return explain(describe(op, *args, **kwargs))


def explain(desc: OpDesc) -> Why:
    """As `why`, for a call that is already described."""
    table = implementations(desc.op)
    choice = current_backend()
    rows, recorded = [], {}
    for backend in BACKENDS:
        reasons = _reasons(table, backend, desc)
        if not reasons and table[backend].needs_record(desc):
            judgement = trust.judge(desc, backend)
            recorded[backend] = judgement.text
            if choice == "auto":
                reasons = _automatic_reasons(table[backend], judgement, desc, first_use=False)
        rows.append((backend, tuple(reasons)))
    chosen = choice if choice != "auto" and not dict(rows)[choice] else None
    if choice == "auto":
        with suppress(BackendUnavailable):
            chosen = _automatic(desc, first_use=False).backend
    return Why(desc, choice, chosen, tuple(rows), recorded)


def _reasons(table: dict[str, Implementation], backend: str, desc: OpDesc) -> list[str]:
    if backend not in table:
        return [f"{desc.op} has no {backend} implementation"]
    return table[backend].not_supported_reasons(desc)


def _log_fallthrough(
    op: str, rejected: list[tuple[Implementation, list[str]]], taken: Implementation
) -> None:
    for implementation, reasons in rejected:
        key = (op, implementation.backend, reasons[0])
        if key not in _fallthrough_logged:
            _fallthrough_logged.add(key)
            logger.info(
                "%s: %s does not run (%s); using %s",
                op,
                implementation.backend,
                "; ".join(reasons),
                taken.backend,
            )
