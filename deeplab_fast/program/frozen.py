"""Programs whose weights are fixed: what `optimize` makes of a model."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch.precision import Precision, reason_against
from ..ops.folded_conv import Settings
from ..ops.prepared import Plan
from . import gpu_layers
from .activations import Activations
from .formats import in_plain_format
from .forms import forms_of
from .functional import Function, Tracer, cast
from .gpu_layers import (
    DTYPES,
    Folded,
    FoldedLayer,
    GpuForms,
    Values,
    execute,
    outside_autocast,
)
from .graphs import Graphs
from .inference import fold
from .layers import Layer, Program, Run
from .layers import execute as execute_prepared
from .network import Network


class Frozen:
    """A program with its weights, on the CPU.

    Attributes:
        program: the program.
        precision: what it computes in.
        dtype, device: of inputs and logits.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, program: Program, precision: str = "fp32") -> None:
        self.program, self.precision = program, precision
        self._activations = Activations(program)

    def takes(self, x: Tensor) -> bool:
        """Whether an input has the dtype and the device."""
        return x.dtype == self.dtype and x.device == self.device

    def logits(
        self, x: Tensor, aux: bool, cuda_graphs: bool | None, max_extra_bytes: int | None
    ) -> dict[str, Tensor]:
        """Low-resolution logits by name; the last two as in `DeepLabV3`."""
        return self._activations.logits(x, aux)

    def plans(self, layer: Layer, *shapes: Any) -> tuple[Plan, ...]:
        """What a layer's convolutions run for inputs of these shapes."""
        return layer.plans(*shapes)

    def run(self) -> Run:
        """What runs a layer on its tensors."""
        return execute_prepared

    def function(self, layer: Layer) -> Function:
        """What a layer computes, as `Layer.function`."""
        return layer.function()

    def exported(self, x: Tensor, aux: bool) -> dict[str, Tensor]:
        """As `logits`, where torch.export traces."""
        maps = self.program.maps(cast(x, self.dtype), Tracer(self.function), aux)
        return self.program.formatted(maps, x)

    def free(self) -> bool:
        """Give back memory that it can do without; False where there is none."""
        return False

    def clock(self) -> float:
        """Seconds, once all that was begun has ended."""
        return time.perf_counter()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights held now, and of graphs."""
        return self.program.held_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of memory for maps that is kept between calls on the CPU."""
        return self._activations.held_bytes

    @property
    def extra_bytes(self) -> int:
        """Bytes held now beyond one copy of the weights."""
        return self.program.extra_bytes


class FrozenOnGpu(Frozen):
    """On a GPU: filters with the batch norms in them, in the dtype of the maps.

    Inputs of fp16, bf16 and fp32 are taken, and cast.
    """

    def __init__(
        self, program: Program, values: Values, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(program)
        self.dtype, self.device = dtype, device
        self._values = values
        self._filters = values.filters()
        self._graphs = Graphs(device)

    def __reduce__(self) -> tuple[type[FrozenOnGpu], tuple[object, ...]]:
        # A pickle of each view has the whole allocation.
        return FrozenOnGpu, (self.program, self._values, self.dtype, self.device)

    def _folded(self, settings: Settings) -> Folded:
        converts = self.program.has_plain_layers
        return Folded(self._filters, self.dtype, settings, None, self.device, converts)

    def takes(self, x: Tensor) -> bool:
        return x.dtype in DTYPES and x.device == self.device

    def logits(
        self, x: Tensor, aux: bool, cuda_graphs: bool | None, max_extra_bytes: int | None
    ) -> dict[str, Tensor]:
        settings = Settings.now()
        folded = self._folded(settings)

        def step(x: Tensor) -> dict[str, Tensor]:
            return self.program.maps(x, partial(execute, folded), aux)

        def finish(maps: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
            return in_plain_format(maps, x, self.program.channels_last, copy)

        wanted = False if self.program.has_plain_layers else cuda_graphs
        key = (x.shape, aux, settings)
        try:
            return self._graphs.run(step, finish, key, x, self.dtype, wanted, max_extra_bytes)
        except torch.OutOfMemoryError:
            if not self.free():
                raise
        return self._graphs.run(step, finish, key, x, self.dtype, wanted, max_extra_bytes)

    def free(self) -> bool:
        return self._graphs.give_up()

    def plans(self, layer: Layer, *shapes: Any) -> tuple[Plan, ...]:
        if isinstance(layer, FoldedLayer):
            return layer.folded_plans(self._folded(Settings.now()), *shapes)
        return layer.plans(*shapes)

    def function(self, layer: Layer) -> Function:
        if isinstance(layer, FoldedLayer):
            return layer.folded_function(self._folded(Settings.now()))
        return layer.function()

    def run(self) -> Run:
        return partial(execute, self._folded(Settings.now()))

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    @property
    def held_bytes(self) -> int:
        return self._values.flat.nbytes + self.extra_bytes

    @property
    def extra_bytes(self) -> int:
        return self.program.extra_bytes + self._graphs.held_bytes


def freeze(
    model: Network,
    aux: bool,
    max_extra_bytes: int | None,
    dtype: torch.dtype | None,
    precision: str | None = None,
    portable: bool = False,
) -> tuple[Frozen | None, str]:
    """A model with fixed weights, or None and why it must run its plain modules.

    Args:
        model: the model.
        aux: with the auxiliary head.
        max_extra_bytes, dtype, precision: as for `optimize`.
        portable: on the CPU a program that is exported for other machines and does not run here:
            bf16 and int8 may be what this processor has not, int8 as `Int8Forms` says.

    Raises:
        ValueError: a dtype or precision that there is not for weights like these, this model, or
            this device.
    """
    filters = next((p for p in model.parameters() if p.dim() == 4), torch.empty(0))
    on_gpu = gpu_layers.on_gpu(filters)
    if on_gpu and precision is not None:
        if precision == "int8":
            raise ValueError(
                f"precision is int8; a model on {filters.device} can be optimised for fp32 and bf16"
            )
        dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    allowed = DTYPES if on_gpu else (torch.float32,)
    if dtype is not None and dtype not in allowed:
        names = ", ".join(str(each) for each in allowed)
        raise ValueError(
            f"dtype is {dtype}; a model on {filters.device} can be optimised for {names}, or None"
        )
    if not on_gpu:
        own = Precision(model.precision if precision is None else precision)
        calibration = model.calibration
        if not portable and (reason := reason_against(own.name, calibration)):
            raise ValueError(reason)
        forms = forms_of(own, calibration, portable)
        bound = max_extra_bytes
        program, reason = fold(model, forms, aux=aux, max_extra_bytes=bound, frozen=True)
        return None if program is None else Frozen(program, own.name), reason
    dtype, device = filters.dtype if dtype is None else dtype, filters.device
    gpu_forms = GpuForms(device, filters.dtype, frozen=dtype)
    program, reason = fold(model, gpu_forms, aux=aux, frozen=True)
    if program is None:
        return None, reason
    with torch.inference_mode(False), outside_autocast(device):
        values = gpu_forms.sources.fold(dtype, Settings.now())
    if filters.is_cuda:
        # Calls may come on another stream.
        torch.cuda.current_stream(device).synchronize()
    return FrozenOnGpu(program, values, dtype, device), ""
