"""What a model on a GPU runs by itself where no gradients are needed.

A call folds the batch norms into the filters and runs the program on them: a function of what the
tensors hold when the GPU comes to it, so that no write to them can be missed, whoever makes it.
What the program was made from beside values (modules, their attributes and hooks, where tensors
lie) is compared on the host behind the launches, while the GPU works; where something has changed
the result is dropped, and the program made anew.

Where launches take the host longer than the GPU needs for them, the whole call is captured in a
CUDA graph (`graphs`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..dispatch.choice import current_backend
from ..ops.folded_conv import Settings
from . import capture, inference
from .formats import in_plain_format
from .gpu_layers import DTYPES, Folded, GpuForms, Sources, execute, outside_autocast
from .graphs import Graphs
from .layers import Program
from .network import Runnable
from .staleness import Snapshot

logger = logging.getLogger("deeplab_fast")

# A model whose modules change whenever they are called is left to its plain modules.
_ATTEMPTS = 3


class GpuPath:
    """The program of one model, and its graphs. Safe to use from several threads and streams."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: _State | None = None

    def logits(self, model: Runnable, x: Tensor, aux: bool) -> dict[str, Tensor] | None:
        """Low-resolution logits "out" and, if asked for, "aux"; None for the plain modules."""
        for _ in range(_ATTEMPTS):
            state = self._current(model, x.device)
            if state.program is None or state.reason_against(x):
                if state.snapshot.is_current():
                    return None
            elif state.sources.in_place():
                try:
                    logits = state.run(model, x, aux)
                except torch.OutOfMemoryError:
                    if not state.graphs.give_up():
                        raise
                    continue
                except Exception:
                    # Of shapes that do not fit each other any more, perhaps.
                    if state.snapshot.is_current():
                        raise
                else:
                    if state.snapshot.is_current():
                        return logits
            self._forget(state)
        return None

    def reasons(self, model: Runnable, x: Tensor) -> list[str]:
        """Why a call on x takes the plain modules, as far as the model's modules decide it."""
        state = self._current(model, x.device)
        if not state.snapshot.is_current():
            self._forget(state)
            state = self._current(model, x.device)
        if state.program is None:
            return [state.reason]
        reason = state.reason_against(x)
        return [reason] if reason else []

    def free(self) -> bool:
        """Give back the memory of graphs, for good; False where there is none."""
        state = self._state
        return state is not None and state.graphs.give_up()

    def drop(self) -> None:
        """Free the graphs, and forget the program."""
        state, self._state = self._state, None
        if state is not None:
            state.graphs.drop()

    @property
    def held_bytes(self) -> int:
        """Bytes that graphs hold."""
        state = self._state
        return 0 if state is None else state.graphs.held_bytes

    def _current(self, model: Runnable, device: torch.device) -> _State:
        state = self._state
        if state is None or not state.is_of(model, device):
            with self._lock:
                state = self._state
                if state is None or not state.is_of(model, device):
                    self.drop()
                    self._state = state = _prepare(model, device)
        return state

    def _forget(self, state: _State) -> None:
        with self._lock:
            if self._state is state:
                self.drop()


@dataclass
class _State:
    """What was made, or why nothing was, and from what."""

    program: Program | None
    reason: str
    sources: Sources
    snapshot: Snapshot
    device: torch.device
    graphs: Graphs

    def is_of(self, model: Runnable, device: torch.device) -> bool:
        return self.device == device and self.snapshot.is_of(model)

    def reason_against(self, x: Tensor) -> str:
        """What speaks against running the program on x; "" where nothing does."""
        program = self.program
        assert program is not None
        reason = program.reason_against(x)
        autocast = autocast_dtype(x.device)
        weights = self.sources.dtype
        if not reason and autocast is None and x.dtype != weights:
            return f"the input is {_name(x.dtype)}, the weights are {_name(weights)}"
        return reason

    def run(self, model: Runnable, x: Tensor, aux: bool) -> dict[str, Tensor]:
        program, autocast = self.program, autocast_dtype(x.device)
        assert program is not None
        dtype = x.dtype if autocast is None else autocast
        settings = Settings.now()

        def step(x: Tensor) -> dict[str, Tensor]:
            filters = self.sources.fold(dtype, settings).filters()
            converts = program.has_plain_layers
            folded = Folded(filters, dtype, settings, autocast, x.device, converts)
            return program.maps(x, partial(execute, folded), aux)

        def finish(maps: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
            return in_plain_format(maps, x, program.channels_last, copy)

        key = (x.shape, dtype, autocast, aux, settings)
        wanted, most = model.cuda_graphs, model.max_extra_bytes
        with outside_autocast(x.device):
            if program.has_plain_layers:
                # What a module that no rule knows does in a call may not be possible in a graph, or
                # not be the same in the next one; and it may be the first, with x as it is.
                return finish(step(x), False)
            return self.graphs.run(step, finish, key, x, dtype, wanted, most)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype where it is on for a device."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def reasons(model: Runnable, x: Tensor) -> Iterator[str]:
    """What speaks against the path before any module is looked at, but for what `fast_path.reasons`
    says."""
    dtype = autocast_dtype(x.device) or x.dtype
    if x.dtype not in DTYPES or dtype not in DTYPES or x.layout != torch.strided:
        yield f"the input is {_name(x.dtype)}; on a GPU there are fp16, bf16 and fp32"
    if capture.current().in_progress():
        yield "a CUDA graph is being captured, in whose replays no change of the model would show"
    if getattr(model, "_is_replica", False):
        yield "the model is a copy that torch.nn.DataParallel made for this call"
    if current_backend() == "reference":
        yield "backend 'reference' is asked for"


def _prepare(model: Runnable, device: torch.device) -> _State:
    snapshot = Snapshot(model, values=False)
    convs = [m for _, root, _ in model.parts() for m in root.modules() if isinstance(m, nn.Conv2d)]
    filters = [conv.weight for conv in convs if isinstance(conv.weight, Tensor)]
    # Filters of another dtype than the first stay in their modules.
    dtype = filters[0].dtype if filters else torch.float32
    forms = GpuForms(device, dtype)
    program, reason = inference.fold(model, forms)
    if program is None:
        logger.info("the model runs its plain modules: %s", reason)
    else:
        forms.sources.prepare()
    return _State(program, reason, forms.sources, snapshot, device, Graphs(device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
