"""The fast path that a model built here takes by itself: when, and with which prepared weights."""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..dispatch import limits
from ..dispatch.precision import Precision, asked_for, of_call, reason_against
from . import gpu_layers, gpu_path, inference
from .activations import Activations
from .forms import forms_of
from .gpu_path import GpuPath
from .intact import functional_is_intact, has_global_hooks, has_transforms
from .layers import Program
from .network import Runnable
from .staleness import Snapshot
from .trace import filled, leaves

logger = logging.getLogger("deeplab_fast")

T = TypeVar("T")


class FastPath:
    """Prepared weights of one model, made on first use and again after any change.

    Copies and pickles of a model have an empty one. Safe to use from several threads: one prepares,
    the others wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The last one is used again where a model is called in one precision.
        self._states: dict[Precision, _State] = {}
        self._gpu = GpuPath()

    def logits(self, model: Runnable, x: Any, aux: bool) -> dict[str, Tensor] | None:
        """Low-resolution logits "out" and, if asked for, "aux"; None for the plain modules.

        Of a module of another library's, its results, for maps in lists, tuples and dicts too.
        """
        first = x if isinstance(x, Tensor) else next(leaves(x), x)
        for reason in reasons(model, first):
            _check_plain(first, reason)
            return None
        if gpu_layers.on_gpu(first):
            return self._gpu.logits(model, x, aux) if first is x else None
        state = self._current(model, _checked(model))
        if state.activations is None or state.program is None:
            _check_plain(first, state.reason)
            return None
        if reason := state.program.reason_against(x):
            _check_plain(first, reason)
            return None
        with gpu_layers.outside_autocast(first.device):
            return state.activations.logits(filled(x, Tensor.float), aux)

    def upsampled(
        self, logits: dict[str, Tensor], size: Sequence[int], align_corners: bool
    ) -> dict[str, Tensor]:
        """As `upsampled`, which takes the memory of graphs where there is no other."""
        return with_memory_of(self._gpu.free, upsampled, logits, size, align_corners)

    def reasons(self, model: Runnable, x: Tensor) -> list[str]:
        """Why a call on x takes the plain modules; empty where it takes the fast path."""
        found = list(reasons(model, x))
        if found:
            return found
        if gpu_layers.on_gpu(x):
            return self._gpu.reasons(model, x)
        try:
            state = self._current(model, _checked(model))
        except ValueError as error:
            return [str(error)]
        if state.program is None:
            return [state.reason]
        reason = state.program.reason_against(x)
        return [reason] if reason else []

    def drop(self) -> None:
        """Free the prepared weights and graphs."""
        self._states = {}
        self._gpu.drop()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights held beside the model's own, and of graphs."""
        programs = [(s.program, s.snapshot) for s in list(self._states.values())]
        return self._gpu.held_bytes + sum(
            program.held_bytes + snapshot.held_bytes
            for program, snapshot in programs
            if program is not None
        )

    @property
    def activation_bytes(self) -> int:
        """Bytes of memory for maps that is kept between calls on the CPU."""
        kept = [s.activations for s in list(self._states.values())]
        return sum(each.held_bytes for each in kept if each is not None)

    def _current(self, model: Runnable, precision: Precision) -> _State:
        state = self._states.get(precision)
        if not _fits(state, model):
            with self._lock:
                state = self._states.get(precision)
                if not _fits(state, model):
                    # Weights that are out of date go before the new ones come.
                    state = None
                    self._states = {
                        p: s for p, s in self._states.items() if p != precision and _fits(s, model)
                    }
                    self._states[precision] = state = _prepare(model, precision)
        assert state is not None
        return state

    def in_eval_view(self, view: nn.Module) -> FastPath:
        """Of a view of the model: the same one, which `drop` then frees for both."""
        return self

    def __deepcopy__(self, memo: object) -> FastPath:
        return FastPath()

    def __copy__(self) -> FastPath:
        return FastPath()

    def __reduce__(self) -> tuple[type[FastPath], tuple[()]]:
        return FastPath, ()


@dataclass(frozen=True)
class _State:
    """What was prepared, or why nothing was; from what, and under which bound."""

    program: Program | None
    activations: Activations | None
    reason: str
    snapshot: Snapshot
    max_extra_bytes: int | None
    calibration: object


def reasons(model: Runnable, x: Tensor) -> Iterator[str]:
    """What speaks against the fast path before any weight is looked at, cheapest first."""
    if not model.fast:
        yield "model.fast is False"
    if model.training:
        yield "the model is in training mode; call model.eval()"
    if type(x) not in (Tensor, nn.Parameter):
        yield f"the input is a {type(x).__name__}, not a torch.Tensor"
        return
    if x.dim() != 4 or x.numel() == 0:
        yield f"the input has shape {list(x.shape)}, not [N, C, H, W] with N of at least 1"
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(p.requires_grad for p in model.parameters())
        or any(b.requires_grad for b in model.buffers())
    ):
        yield "gradients may be needed; use torch.inference_mode() or torch.no_grad()"
    yield from gpu_path.reasons(model, x) if gpu_layers.on_gpu(x) else _cpu_reasons(x)
    if torch.are_deterministic_algorithms_enabled():
        yield "deterministic algorithms are asked for"
    if torch.jit.is_tracing():
        yield "torch.jit.trace records the plain modules"
    if has_transforms():
        yield "a torch.func transform, forward-mode gradients or a dispatch mode is active"
    if has_global_hooks():
        yield "global hooks of modules are set"
    if not functional_is_intact():
        yield "functions of torch.nn.functional are exchanged"


def _cpu_reasons(x: Tensor) -> Iterator[str]:
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    allowed = (torch.float32,) if autocast is None else (torch.float32, autocast)
    if x.dtype not in allowed or x.device.type != "cpu" or x.layout != torch.strided:
        dtype = str(x.dtype).removeprefix("torch.")
        yield (
            f"the input is {dtype} on {x.device}; programs exist for float32 on the CPU, and for "
            "float16, bfloat16 and float32 on CUDA devices"
        )
    if autocast == torch.bfloat16 and (missing := limits.cpu_bf16()):
        yield f"autocast to bfloat16 is on and {missing}"
    elif autocast not in (None, torch.bfloat16):
        yield f"autocast to {str(autocast).removeprefix('torch.')} is on"
    backend = backends.current_backend()
    if backend not in ("auto", "cpu"):
        yield f"backend {backend!r} is asked for"
    if not torch.backends.mkldnn.enabled:
        yield "oneDNN is switched off (torch.backends.mkldnn)"


def _check_plain(x: Tensor, reason: str) -> None:
    """Whether the plain modules may run, which compute in fp32.

    Raises:
        ValueError: another precision was asked for by name.
    """
    name = asked_for()
    if name not in (None, "fp32") and not gpu_layers.on_gpu(x):
        raise ValueError(
            f"precision {name} was asked for and the model runs its plain modules: {reason}; leave "
            "the precision out, or change that"
        )


def _checked(model: Runnable) -> Precision:
    """The precision of a call, which the CPU has."""
    precision = of_call(model.precision)
    if reason := reason_against(precision.name, model.calibration):
        raise ValueError(reason)
    return precision


def _fits(state: _State | None, model: Runnable) -> bool:
    if state is None or state.max_extra_bytes != model.max_extra_bytes:
        return False
    if state.calibration is not model.calibration:
        return False
    snapshot = state.snapshot
    if not snapshot.is_of(model):
        return False
    if state.program is None:
        return snapshot.same_structure() and snapshot.same_tensors()
    return snapshot.is_current()


def _prepare(model: Runnable, precision: Precision) -> _State:
    # Read before weights are prepared, so that what is prepared is never older.
    bound, calibration = model.max_extra_bytes, model.calibration
    snapshot = Snapshot(model)
    forms = forms_of(precision, calibration)
    program, reason = inference.fold(model, forms, max_extra_bytes=bound)
    if program is None:
        logger.info("the model runs its plain modules: %s", reason)
    activations = None if program is None else Activations(program)
    return _State(program, activations, reason, snapshot, bound, calibration)


def with_memory_of(free: Callable[[], bool], function: Callable[..., T], *args: Any) -> T:
    """function(*args); where memory runs out, again without what `free` gives back."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        if not free():
            raise
    return function(*args)


def upsampled(
    logits: dict[str, Tensor], size: Sequence[int], align_corners: bool
) -> dict[str, Tensor]:
    """Bilinear interpolation of each of the logits to (height, width)."""
    return OrderedDict(
        (name, F.interpolate(y, size=size, mode="bilinear", align_corners=align_corners))
        for name, y in logits.items()
    )


# Where models that earlier versions pickled whole look for it.
sys.modules["deeplab_fast.inference.fast_path"] = sys.modules[__name__]
