"""Which implementation of an op runs, and why.

Implementations are data: an op's file registers one `Implementation` per backend it has. `select`
takes the first, in order of priority, that names no reason against the call at hand. An explicit
choice (`use_backend`, the environment variable `DEEPLAB_FAST_BACKEND`) that cannot run raises with
its reasons; an automatic choice falls through to the next and says so once in the log.

On a GPU the automatic choice takes a kernel of this package only where a record says that it is
right and faster than PyTorch's (`dispatch.trust`), of several the fastest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from .dispatch import trust

logger = logging.getLogger("deeplab_fast")

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "DEEPLAB_FAST_BACKEND"


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run the call; the message lists the reasons."""


@dataclass(frozen=True)
class OpDesc:
    """What a choice of implementation may depend on: the op and the facts of one call.

    Attributes:
        op: name in `deeplab_fast.ops`.
        device: device type of the main input ("cpu", "cuda", ...).
        dtype: dtype of the main input.
        shape: shape of the main input.
        params: the op's own parameters that matter for the choice, by name.
        capability: CUDA compute capability of the device, None elsewhere.
        deterministic: `torch.are_deterministic_algorithms_enabled()`.
        gpu: name of the CUDA device, "" elsewhere.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    deterministic: bool = False
    gpu: str = ""

    @classmethod
    def of(cls, op: str, x: torch.Tensor, **params: Any) -> OpDesc:
        """Describe a call of `op` whose main input is `x`."""
        capability, gpu = _gpu(x.device) if x.device.type == "cuda" else (None, "")
        return cls(
            op,
            x.device.type,
            x.dtype,
            tuple(x.shape),
            params,
            capability,
            torch.are_deterministic_algorithms_enabled(),
            gpu,
        )


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], str]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.name


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        op: name in `deeplab_fast.ops`.
        backend: one of `BACKENDS`.
        run: called with the positional arguments of the op's registered schema.
        not_supported_reasons: facts of a call -> reasons against it; empty means it runs.
        priority: the highest that has no reason against it is chosen automatically.
        is_pytorch: made of PyTorch's own kernels, which need no record on a GPU.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    not_supported_reasons: Callable[[OpDesc], list[str]]
    priority: int
    is_pytorch: bool = False

    def needs_record(self, desc: OpDesc) -> bool:
        """Whether the automatic choice asks records about a call."""
        return desc.device == "cuda" and not self.is_pytorch and self.backend != "cpu"


_implementations: dict[str, dict[str, Implementation]] = {}
_fallthrough_logged: set[tuple[str, str, str]] = set()
# Process-wide, as torch.backends.cudnn.flags is: autograd runs backward passes on its own threads,
# which a context variable would not reach.
_override: str | None = None

_DEFAULT_PRIORITY = {"cuda": 30, "triton": 20, "cpu": 10, "reference": 0}


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    not_supported_reasons: Callable[[OpDesc], list[str]] = lambda desc: [],
    priority: int | None = None,
    is_pytorch: bool = False,
) -> None:
    """Add the implementation of `op` on `backend`; called once, from the op's file.

    Args:
        op, backend, run, not_supported_reasons, priority: as in `Implementation`; the usual
            priority of a backend where None is given.
        is_pytorch: as there; the reference is in any case.
    """
    _check_backend(backend, BACKENDS)
    table = _implementations.setdefault(op, {})
    if backend in table:
        raise ValueError(f"{op} already has an implementation for backend {backend!r}")
    if priority is None:
        priority = _DEFAULT_PRIORITY[backend]
    is_pytorch |= backend == "reference"
    table[backend] = Implementation(op, backend, run, not_supported_reasons, priority, is_pytorch)


def implementations(op: str) -> dict[str, Implementation]:
    """The implementations of `op` by backend name."""
    if op not in _implementations:
        raise ValueError(f"no op is named {op!r}; there are: {', '.join(sorted(_implementations))}")
    return _implementations[op]


def registered_ops() -> list[str]:
    """Names of all ops that have an implementation."""
    return list(_implementations)


def current_backend() -> str:
    """The choice in force: a name of `BACKENDS`, or "auto"."""
    if _override is not None:
        return _override
    chosen = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    _check_backend(chosen, (*BACKENDS, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}: ")
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
    _check_backend(name, (*BACKENDS, "auto"))
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
                f"({_describe(desc)}): {'; '.join(reasons)}. "
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
            _log_fallthrough(rejected, implementation)
            return implementation
        rejected.append((implementation, reasons))
    listed = "; ".join(f"{i.backend}: {', '.join(r)}" for i, r in rejected)
    raise BackendUnavailable(f"no backend can run {desc.op} ({_describe(desc)}): {listed}")


def run(desc: OpDesc, *args: Any) -> Any:
    """Call the selected implementation."""
    return select(desc).run(*args)


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
        lines = [f"{self.desc.op} ({_describe(self.desc)}), backend choice: {self.choice}"]
        for backend, reasons in self.rows:
            mark = "->" if backend == self.chosen else "  "
            text = "; ".join(reasons) or self.records.get(backend, "can run")
            lines.append(f"{mark} {backend:<10}{text}")
        return "\n".join(lines)


def why(op: str, *args: Any, **kwargs: Any) -> Why:
    """Which backend would run `ops.<op>(*args, **kwargs)`, and what speaks against the others.

    Args:
        op: name in `deeplab_fast.ops`.
        *args, **kwargs: what the op would be called with. Tensors may be on the meta device, then
            nothing is said about CUDA capability.

    Returns:
        `Why`: print it for a table; `.chosen` is None where no backend can run the call.
    """
    from . import ops

    implementations(op)
    return explain(ops.describe(op, *args, **kwargs))


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


def _check_backend(name: str, allowed: tuple[str, ...], prefix: str = "") -> None:
    if name not in allowed:
        raise ValueError(
            f"{prefix}no backend is named {name!r}; allowed: {', '.join(map(repr, allowed))}"
        )


def _describe(desc: OpDesc) -> str:
    dtype = str(desc.dtype).removeprefix("torch.")
    params = "".join(f", {k}={v}" for k, v in desc.params.items())
    return f"{desc.device} {dtype} {list(desc.shape)}{params}"


def _log_fallthrough(
    rejected: list[tuple[Implementation, list[str]]], taken: Implementation
) -> None:
    for implementation, reasons in rejected:
        key = (implementation.op, implementation.backend, reasons[0])
        if key not in _fallthrough_logged:
            _fallthrough_logged.add(key)
            logger.info(
                "%s: %s does not run (%s); using %s",
                implementation.op,
                implementation.backend,
                "; ".join(reasons),
                taken.backend,
            )
