"""How an op is declared, and what others ask about ops.

An op's file declares it once, at its end: what enters PyTorch's dispatcher, what a choice of
implementation rests on, the implementations, example calls. Whatever lists ops reads this.

Each function of an op is one opaque boundary: a schema, a fake that gives the exact strides, and a
Python function that asks `choice` which implementation runs. The choice happens inside the
boundary, where torch.compile does not look, so logging and process-wide choices are safe there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# `import torch` has imported it.
from torch._decomp import register_decomposition

from .describe import OpDesc
from .examples import Examples, Forms, Maker, Run, Size, Step

BACKENDS = ("cuda", "triton", "cpu", "reference")
INFERENCE = "inference"
TRAINING = "training"
LIBRARY = torch.library.Library("deeplab_fast", "FRAGMENT")

# No fakes, and none that stand for others.
_TENSORS = (Tensor, torch.nn.Parameter)
Reasons = Callable[[OpDesc], list[str]]
_DEFAULT_PRIORITY = {"cuda": 30, "triton": 20, "cpu": 10, "reference": 0}


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Attributes:
        backend: one of `BACKENDS`.
        run: called with the positional arguments of the op's registered schema.
        not_supported_reasons: facts of a call -> reasons against it; empty means it runs.
        priority: the highest that has no reason against it is chosen automatically.
        is_pytorch: made of PyTorch's own kernels, which need no record on a GPU.
    """

    backend: str
    run: Run
    not_supported_reasons: Reasons
    priority: int
    is_pytorch: bool = False

    def needs_record(self, desc: OpDesc) -> bool:
        """Whether the automatic choice asks records about a call."""
        return desc.device == "cuda" and not self.is_pytorch and self.backend != "cpu"


def on(
    backend: str,
    run: Run,
    not_supported_reasons: Reasons = lambda desc: [],
    priority: int | None = None,
    is_pytorch: bool = False,
) -> Implementation:
    """An implementation on a backend.

    Args:
        backend, run, not_supported_reasons, priority: as in `Implementation`; the usual priority of
            a backend where None is given.
        is_pytorch: as there; the reference is in any case.
    """
    check_backend(backend, BACKENDS)
    if priority is None:
        priority = _DEFAULT_PRIORITY[backend]
    is_pytorch |= backend == "reference"
    return Implementation(backend, run, not_supported_reasons, priority, is_pytorch)


@dataclass(frozen=True)
class Function:
    """A function under `deeplab_fast::`.

    Attributes:
        schema: in torch.library's language.
        run: for every device, called below autograd and outside autocast.
        fake: shapes, dtypes and strides of the outputs without computing them.
        decomposition: the same by PyTorch's operations, of sizes that may be symbolic; what
            `decompositions` gives of it. None where exported programs do not have it.
    """

    schema: str
    run: Run
    fake: Run
    decomposition: Run | None = None


@dataclass(frozen=True)
class Tuned:
    """A Triton kernel whose launch configuration calls of an op depend on.

    Attributes:
        kernel: name in `deeplab_fast.kernels.tuned.TUNABLE`.
        op: in whose calls exactly one of its configurations is chosen.
        most: candidates that there are at most.
        method: of an op with several functions.
    """

    kernel: str
    op: str
    most: int
    method: str = ""


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        name: in `deeplab_fast.ops`, or of a backward pass that autograd alone calls.
        describe: what a choice of backend rests on, for the op's own arguments.
        functions: that are registered under `deeplab_fast::`.
        implementations: at most one for each backend.
        use: INFERENCE or TRAINING, whichever calls it.
        examples: calls of it.
        sources: of its GPU kernels, a name in `sources.TRITON`; "" where it has none.
        is_product: of matrices, whose fp32 operands PyTorch may let it round to TF32.
        tuned: kernels whose configuration can be measured.
    """

    name: str
    describe: Callable[..., OpDesc]
    functions: tuple[Function, ...]
    implementations: tuple[Implementation, ...]
    use: str
    examples: Examples
    sources: str = ""
    is_product: bool = False
    tuned: tuple[Tuned, ...] = ()


# What declares the ops when it is imported. By name: it imports this module.
_DECLARING = "deeplab_fast.ops"

_ops: dict[str, Op] = {}
_implementations: dict[str, dict[str, Implementation]] = {}
_decompositions: dict[torch._ops.OpOverload, Run] = {}
_registrations = 0


def declare(op: Op) -> None:
    """Add an op; called once, from its file."""
    _ops[op.name] = op
    for function in op.functions:
        define(function)
    for implementation in op.implementations:
        _add(op.name, implementation)


def register(
    op: str,
    backend: str,
    run: Run,
    not_supported_reasons: Reasons = lambda desc: [],
    priority: int | None = None,
    is_pytorch: bool = False,
) -> None:
    """Add an implementation of `op`; arguments as for `on`."""
    _add(op, on(backend, run, not_supported_reasons, priority, is_pytorch))


def find(op: str) -> Op:
    """The declaration of an op."""
    implementations(op)
    return _ops[op]


def implementations(op: str) -> dict[str, Implementation]:
    """The implementations of `op` by backend name."""
    if op not in _implementations:
        importlib.import_module(_DECLARING)
    if op not in _implementations:
        raise ValueError(f"no op is named {op!r}; there are: {', '.join(sorted(_implementations))}")
    return _implementations[op]


def is_declared(op: str) -> bool:
    """Whether all implementations of an op are those of its declaration."""
    if op not in _ops:
        return False
    table, own = implementations(op), _ops[op].implementations
    return len(table) == len(own) and all(table.get(i.backend) is i for i in own)


def registrations() -> int:
    """How many implementations were added: another number says that there are others."""
    return _registrations


def declared_ops() -> list[Op]:
    """All ops that are declared."""
    importlib.import_module(_DECLARING)
    return list(_ops.values())


def registered_ops() -> list[str]:
    """Names of all ops that have an implementation."""
    importlib.import_module(_DECLARING)
    return list(_implementations)


def gpu_ops() -> list[Op]:
    """The ops that have GPU kernels of this package, those of inference first."""
    importlib.import_module(_DECLARING)
    found = [op for op in _ops.values() if op.sources]
    return sorted(found, key=lambda op: (INFERENCE, TRAINING).index(op.use))


def is_product(op: str) -> bool:
    """Whether an op multiplies matrices (`Op.is_product`)."""
    return op in _ops and _ops[op].is_product


def sources_of(op: str) -> str:
    """The sources of an op's GPU kernels (`Op.sources`); "" for an op that there is not."""
    return _ops[op].sources if op in _ops else ""


def describe(op: str, *args: object, **kwargs: object) -> OpDesc:
    """The facts of the call `ops.<op>(*args, **kwargs)` that a choice of backend rests on."""
    return find(op).describe(*args, **kwargs)


def steps(
    op: str, form: str, size: Size, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Step]:
    """The calls that together are a form of an op: one, and for the loss its three functions."""
    return find(op).examples.build(Maker(dtype, device, seed), form, size)


def pytorch_forms(step: Step) -> Forms:
    """What PyTorch alone offers for a step, by name; the first is the plain one.

    Results are those of the step, up to dtypes of labels.
    """
    return find(step.op).examples.pytorch(step)


def exact(step: Step) -> list[Tensor]:
    """Its results in float64, on the CPU; of labels the logits that they are the best of."""
    own, wide = find(step.op).examples.exact, step.wide()
    return own(wide) if own else wide.run(implementations(step.op)["reference"].run)


def decompositions() -> dict[torch._ops.OpOverload, Run]:
    """What PyTorch's operations stand for the ops in an exported program, by the op.

        program = torch.export.export(model, (x,)).run_decompositions(
            torch.export.default_decompositions() | decompositions()
        )

    has none of this package's ops left. torch.onnx.export(..., dynamo=True) takes them by itself.
    """
    return dict(_decompositions)


def compiled(name: str) -> Run:
    """The private op `deeplab_fast::<name>` of an extension, looked up when it is called."""

    def run(*args: object) -> object:
        return getattr(torch.ops.deeplab_fast, name)(*args)

    return run


def check_backend(name: str, allowed: Sequence[str], prefix: str = "") -> None:
    """One of the allowed names."""
    if name not in allowed:
        raise ValueError(
            f"{prefix}no backend is named {name!r}; allowed: {', '.join(map(repr, allowed))}"
        )


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    # The meta device has no autocast and raises when asked whether it is on.
    return device != "meta" and torch.is_autocast_enabled(device)


def _add(op: str, implementation: Implementation) -> None:
    global _registrations
    table = _implementations.setdefault(op, {})
    backend = implementation.backend
    if backend in table:
        raise ValueError(f"{op} already has an implementation for backend {backend!r}")
    table[backend] = implementation
    _registrations += 1


def define(function: Function) -> Run:
    """Register a function, also one that is none of a single op's but calls several.

    Returns:
        what calls it: through PyTorch's dispatcher where its first argument, a tensor, is a fake or
        one that stands for another, or torch.compile looks on, else at once. The way through the
        dispatcher takes the host longer than a small convolution (bench/NOTES.md).
    """
    name = function.schema[: function.schema.index("(")]
    LIBRARY.define(function.schema)

    def outside_autocast(*args: object) -> Any:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        # An op casts its inputs itself; its fp32 accumulation must not be cast again.
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                return function.run(*args)
        return function.run(*args)

    LIBRARY.impl(name, outside_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deeplab_fast::{name}", function.fake, lib=LIBRARY)
    registered = getattr(torch.ops.deeplab_fast, name).default
    if function.decomposition is not None:
        # By which torch.onnx.export finds it; torch.compile asks a table of its own.
        register_decomposition(registered)(function.decomposition)
        _decompositions[registered] = function.decomposition

    def call(x: Tensor, *args: object) -> Any:
        if type(x) in _TENSORS and not torch.compiler.is_compiling():
            return outside_autocast(x, *args)
        return registered(x, *args)

    return call
