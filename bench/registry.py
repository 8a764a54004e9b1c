"""What is measured, and what measures: cases, providers and suites.

A `Case` is one op or model at one shape. It makes its own data, says what PyTorch runs for it, what
deeplab_fast runs for it, what that costs at least, and how far a result may lie from the exact one.
A `Provider` is one way to run cases. `op_cases.py`, `model_cases.py` and `providers.py` register
theirs when they are imported, which `everything.py` does.
"""

from __future__ import annotations

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from deeplab_fast.dispatch.errors import DIRECT, SAVING
from deeplab_fast.dispatch.examples import VALUES, Step

from .costs import Cost

# Modes: what is timed.
FORWARD = "forward"
BACKWARD = "backward"
FORWARD_BACKWARD = "forward_backward"
STEP = "step"

# A kind of output beside those of `examples`: `gate.py` compares them by kind.
GRADIENT = "gradient"


Result = Tensor | Sequence[Tensor]
Context = Callable[[], AbstractContextManager[object]]
Inputs = list[tuple[Tensor, ...]]


@dataclass
class Arguments:
    """What a case is run on. Everything is fp32, with values that the case's dtype represents.

    Attributes:
        module: PyTorch's own modules for the case, called with one set of inputs.
        inputs: sets of inputs of the same shapes and different values.
        cotangents: for each set the gradient that comes back to the output, None for a scalar;
            empty where no mode of the case has a gradient.
    """

    module: nn.Module
    inputs: Inputs
    cotangents: list[Tensor | None] = field(default_factory=list)
    _converted: dict[Any, list[tuple[Tensor, ...]]] = field(default_factory=dict, repr=False)

    def converted(
        self, dtype: torch.dtype, layout: torch.memory_format, wide: Sequence[int] = ()
    ) -> Inputs:
        """The inputs in a dtype, maps in a layout; made once, shared by all who ask for the same.

        Args:
            dtype: of every float tensor.
            layout: of every tensor with four dimensions.
            wide: positions that are at least fp32 all the same.
        """
        key = (dtype, layout)
        if key not in self._converted:
            at_least = torch.promote_types(dtype, torch.float32)
            self._converted[key] = [
                tuple(
                    _convert(t, at_least if i in wide else dtype, layout)
                    for i, t in enumerate(given)
                )
                for given in self.inputs
            ]
        return self._converted[key]


def _convert(t: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    if not t.is_floating_point():
        return t
    t = t.to(dtype)
    return t.contiguous(memory_format=layout) if t.dim() == 4 else t


class Runnable:
    """A provider at a case: call it with the number of a set of inputs.

    Attributes:
        module: what is called with the inputs.
        inputs: the sets of inputs.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, context: Context = nullcontext) -> None:
        self.module, self.inputs, self.context = module, inputs, context

    def set(self, i: int) -> tuple[Tensor, ...]:
        """Set number i, counted round."""
        return self.inputs[i % len(self.inputs)]

    def __call__(self, i: int) -> Result:
        """The result of set number i."""
        raise NotImplementedError

    def probe(self) -> Result:
        """The result of the first set, and for a step its gradients, to be compared."""
        return self(0)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One op or model at one shape.

    Attributes:
        shape: name of the shape, unique within the op.
        suites: names of the suites that measure it.
        modes: what is timed.
        left_out: suite -> provider -> why it is not measured there.
        headline: whether the README shows it; chosen by what people run, not by results.
    """

    kind: ClassVar[str]
    # Memory format of what deeplab_fast's module is given: a map within a model is channels_last.
    own_layout: ClassVar[torch.memory_format] = torch.channels_last
    # Weights as training left them, which `setup` then keeps.
    trained: ClassVar[bool] = False
    # Sets of inputs, at least, on each of which the share of labels that are the exact ones counts.
    judged: ClassVar[int] = 0
    # The dtype that the exact result is computed in.
    oracle_dtype: ClassVar[torch.dtype] = torch.float64

    op: str
    shape: str
    suites: tuple[str, ...]
    modes: tuple[str, ...] = (FORWARD,)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict, hash=False, compare=False)
    headline: bool = False

    @property
    def judged_on(self) -> str:
        """What those sets are."""
        return ""

    @property
    def mutated(self) -> tuple[int, ...]:
        """Positions of the inputs that a call changes."""
        return ()

    @property
    def wide(self) -> tuple[int, ...]:
        """Positions of the inputs that are at least fp32 whatever the dtype."""
        return ()

    @property
    def id(self) -> str:
        """Name of the case, unique."""
        return f"{self.op}/{self.shape}"

    def setup(self, device: str, dtype: torch.dtype, seed: int = 0, copies: int = 1) -> Arguments:
        """Random weights and inputs; the same for the same arguments.

        Args:
            device: also "meta", for shapes without data.
            dtype: values are rounded to it; the tensors are fp32.
            seed: of the weights; the sets of inputs count on from it.
            copies: sets of inputs.

        Raises:
            ImportError: the case needs torchvision, which is not installed.
        """
        torch.manual_seed(seed)
        with torch.device(device):
            module = self.make_module()
        if not self.trained:
            spread_batch_norm(module)
        with torch.no_grad():
            for t in (*module.parameters(), *module.buffers()):
                if t.is_floating_point():
                    t.copy_(t.to(dtype))
        args = Arguments(module, [])
        wants_gradient = any(mode in (BACKWARD, FORWARD_BACKWARD) for mode in self.modes)
        for i in range(copies):
            torch.manual_seed(seed + 1 + i)
            with torch.device(device):
                made = self.make_inputs(device, seed + 1 + i)
                cotangent = self.make_cotangent() if wants_gradient else None
            args.inputs.append(
                tuple(t.to(dtype).float() if t.is_floating_point() else t for t in made)
            )
            if wants_gradient:
                args.cotangents.append(None if cotangent is None else cotangent.to(dtype).float())
        return args

    @abstractmethod
    def make_module(self) -> nn.Module:
        """PyTorch's modules for the case, in the mode (train, eval) it is measured in."""

    @abstractmethod
    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        """One set of inputs; device and seed are also the default ones."""

    def make_cotangent(self) -> Tensor | None:
        """The gradient of the output; None where the output is a scalar."""
        return None

    def oracle(self, module: nn.Module) -> nn.Module:
        """What gives the exact result from PyTorch's modules; logits where the output is labels."""
        return module

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module | None:
        """The case through `deeplab_fast.ops`, with weights in a dtype; None: it has no such form.

        Only for the modes that `modes` names.
        """
        return None

    def own(self, args: Arguments) -> nn.Module | None:
        """The case through the package's modules or models; None: it has no such form."""
        return None

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """The calls of ops that `fused` makes, on the meta device; none where the case has no such
        form."""
        return []

    def facts(self, run: Runnable) -> dict[str, tuple[float, str]]:
        """What else is told of a provider's form: metric -> (value, note)."""
        return {}

    @abstractmethod
    def cost(self, mode: str, itemsize: int) -> Cost:
        """What the case costs at least, with elements of `itemsize` bytes."""

    def kinds(self, mode: str) -> tuple[str, ...]:
        """Kinds of the outputs of a mode; the last one stands for all that follow."""
        return (VALUES,)

    def tolerance(self, kind: str) -> float:
        """Largest error of an fp32 result of a kind, by the measure of `gate.py`."""
        return DIRECT


Build = Callable[[Case, str, str, torch.dtype, Arguments], Runnable]
Text = Callable[[Case, str, str, torch.dtype], str]
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def case_precision(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    """That of the case's dtype."""
    # PyTorch lets cuDNN round the operands of fp32 convolutions to TF32 unless told otherwise.
    fp32 = "tf32" if device == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"
    return _NAMES.get(dtype, fp32)


@dataclass(frozen=True)
class Provider:
    """One way to run cases.

    Attributes:
        name: in tables and on the command line.
        description: one line.
        build: (case, mode, device, dtype, args) -> what runs.
        baseline: whether it is something a user has without this package.
        applies: (case, mode) -> whether there is such a form at all; one that does not apply is
            not missing.
        missing_reason: (case, mode, device, dtype) -> why it cannot run here; "" where it can.
        precision: (case, mode, device, dtype) -> "fp32", "tf32", "bf16", "fp16" or "int8": what the
            operands of its products are rounded to.
        packages: distributions it is made of beside PyTorch; their versions are told with its time.
        graphs: whether its calls on a GPU already replay CUDA graphs.
        slow: building it may take minutes; it is not begun when a run's time is up, while the
            others of a case that has begun still are.
        own_expected: (case, args, what runs) -> the exact result of the first set of inputs, where
            weights of its own make it another than the case's; None for all others.
    """

    name: str
    description: str
    build: Build
    baseline: bool = True
    applies: Callable[[Case, str], bool] = lambda case, mode: True
    missing_reason: Text = lambda case, mode, device, dtype: ""
    precision: Text = case_precision
    packages: tuple[str, ...] = ()
    graphs: bool = False
    slow: bool = False
    own_expected: Callable[[Any, Arguments, Runnable], list[Tensor]] | None = None


@dataclass(frozen=True)
class Suite:
    """How long and on what a run measures.

    Attributes:
        name: on the command line.
        device: "cpu" or "cuda".
        dtype: of the cases.
        seconds: of timing for each case and mode, all providers together; a case whose calls are
            long takes as many as its fewest rounds need.
        rounds: (fewest, most) rounds.
        copies: most sets of inputs that calls rotate over.
        no_memory: providers whose peak memory is not measured: that compiles them again.
        left_out: providers that are only measured where they are named.
        by_precision: whether its table tells the fastest baseline of each precision.
    """

    name: str
    device: str
    dtype: torch.dtype
    seconds: float
    rounds: tuple[int, int]
    copies: int
    no_memory: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    by_precision: bool = False


# Measured in a suite of their own: some take minutes to quantize a model.
_RIVALS = (
    "ours-predict-bf16",
    "ours-predict-int8",
    "openvino",
    "openvino_default",
    "openvino_int8",
    "onnxruntime",
    "onnxruntime_int8",
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            "cpu",
            torch.float32,
            seconds=0.7,
            rounds=(3, 9),
            copies=2,
            no_memory=("compile",),
            left_out=_RIVALS,
        ),
        Suite(
            "cpu",
            "cpu",
            torch.float32,
            seconds=4.0,
            rounds=(5, 25),
            copies=2,
            no_memory=("compile",),
            left_out=_RIVALS,
        ),
        Suite(
            "gpu", "cuda", torch.bfloat16, seconds=0.5, rounds=(10, 30), copies=8, left_out=_RIVALS
        ),
        Suite(
            "rivals",
            "cpu",
            torch.float32,
            seconds=8.0,
            rounds=(5, 25),
            copies=2,
            # Of suite `cpu`; eager is never the fastest on a CPU, and compiling takes minutes.
            left_out=("eager", "cudagraph", "compile", "smp", "ours"),
            by_precision=True,
        ),
        Suite(
            "accelerate",
            "cpu",
            torch.float32,
            seconds=6.0,
            rounds=(5, 15),
            copies=2,
            # Of suite `cpu`: compiling a model takes minutes.
            left_out=(*_RIVALS, "compile", "smp"),
        ),
    )
}


_CASES: dict[str, Case] = {}
_PROVIDERS: dict[str, Provider] = {}


def register_case(found: Case) -> None:
    """Make a case known.

    Raises:
        ValueError: another has its name.
    """
    if found.id in _CASES:
        raise ValueError(f"cases of the same name: {found.id!r}")
    _CASES[found.id] = found


def register_provider(found: Provider) -> None:
    """Make a provider known, behind those that are.

    Raises:
        ValueError: another has its name.
    """
    if found.name in _PROVIDERS:
        raise ValueError(f"providers of the same name: {found.name!r}")
    _PROVIDERS[found.name] = found


def cases() -> tuple[Case, ...]:
    """All cases, the most telling first within each suite."""
    return tuple(_CASES.values())


def case(name: str) -> Case:
    """The case of an id."""
    if name not in _CASES:
        raise ValueError(f"no case is named {name!r}; python -m bench.run --list prints them")
    return _CASES[name]


def providers() -> tuple[Provider, ...]:
    """All providers, baselines first."""
    return tuple(_PROVIDERS.values())


def provider(name: str) -> Provider:
    """The provider of a name."""
    if name not in _PROVIDERS:
        names = ", ".join(_PROVIDERS)
        raise ValueError(f"no provider is named {name!r}; there are: {names}")
    return _PROVIDERS[name]


def select(suite: str, pattern: str | None = None) -> list[tuple[Case, str]]:
    """(case, mode) of a suite whose "id mode" the regular expression matches anywhere."""
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"-k {pattern!r} is not a regular expression: {error}") from None
    return [
        (found, mode)
        for found in cases()
        if suite in found.suites
        for mode in found.modes
        if wanted.search(f"{found.id} {mode}")
    ]


def applicable(
    found: Case, mode: str, suite: Suite, names: Iterable[str] | None = None
) -> list[Provider]:
    """The providers, of all of a suite or of the named ones, that have a form of a case."""
    if names is None:
        chosen = [p for p in providers() if p.name not in suite.left_out]
    else:
        chosen = [provider(name) for name in names]
    return [p for p in chosen if p.applies(found, mode)]


def missing_reason(p: Provider, found: Case, mode: str, suite: Suite) -> str:
    """Why a provider is not measured on a case in a suite; "" where it is."""
    left_out = found.left_out.get(suite.name, {}).get(p.name)
    if left_out:
        return f"left out of suite {suite.name}: {left_out}"
    absent = [name for name in p.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (extra rivals)"
    return p.missing_reason(found, mode, suite.device, suite.dtype)


def spread_batch_norm(module: nn.Module) -> None:
    """Give every batch norm statistics and factors as training leaves them, away from 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.1, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.1, 0.1)


def without_dropout(module: nn.Module) -> nn.Module:
    """The module with a probability of 0 in every dropout, whose masks differ between layouts, and
    of dropping paths, as other libraries call it."""
    for m in module.modules():
        if isinstance(m, _DropoutNd):
            m.p = 0.0
        for name in ("drop_prob", "_drop_connect_rate"):
            if hasattr(m, name):
                setattr(m, name, 0.0)
    return module


def folded(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, in the dtype of its parameters."""
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return scale, norm.bias - norm.running_mean * scale


def shape_name(*parts: object) -> str:
    """Join parts of a shape's name: tuples by "x"."""
    return "-".join(
        "x".join(map(str, p)) if isinstance(p, Sequence) and not isinstance(p, str) else str(p)
        for p in parts
    )


def network_tolerance(convolutions: int) -> float:
    """Error of an fp32 network: independent errors of its convolutions add up in squares."""
    return SAVING * math.sqrt(convolutions)
