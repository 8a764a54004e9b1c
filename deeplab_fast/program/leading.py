"""The first modules of a backbone in training, where all of them are frozen: run as in inference.

Of modules whose parameters take no gradient, whose batch norms normalise by their running
statistics, and whose input takes no gradient, training needs nothing but the result. It comes from
an inference program: batch norms folded, weights prepared once, nothing kept for a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import match
from .calibration import Calibration
from .fast_path import FastPath
from .layers import Heads, Run, Step
from .norms import uses_batch

_NAME = "out"


class Leading:
    """What one model's frozen first modules are run by, made at first use and after any change.

    Copies and pickles of a model have an empty one.
    """

    def __init__(self) -> None:
        self._row: _Row | None = None

    def run(
        self, modules: Sequence[nn.Module], x: Tensor, max_extra_bytes: int | None = None
    ) -> tuple[Sequence[nn.Module], Tensor]:
        """Run the frozen modules at the beginning of a row, where they can run as in inference.

        Args:
            modules: one after another.
            x: the map that the first is called with.
            max_extra_bytes: as of the model.

        Returns:
            the modules that are left, and the map that the first of these is called with.
        """
        if (
            x.device.type != "cpu"
            or x.requires_grad
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            # DistributedDataParallel writes all buffers before each call: all would be made anew.
            or (dist.is_available() and dist.is_initialized())
        ):
            return modules, x
        count = next((i for i, m in enumerate(modules) if not is_frozen(m)), len(modules))
        row = self._row
        if not count:
            self._row = None
            return modules, x
        if row is None or row.modules != tuple(modules[:count]):
            row = self._row = _Row(tuple(modules[:count]))
        row.max_extra_bytes = max_extra_bytes
        y = row(x)
        return (modules, x) if y is None else (modules[count:], y)

    def drop(self) -> None:
        """Free the prepared weights."""
        self._row = None

    @property
    def held_bytes(self) -> int:
        """Bytes of weights held beside the model's own."""
        row = self._row
        return 0 if row is None else row.path.held_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of memory for maps that is kept between calls."""
        row = self._row
        return 0 if row is None else row.path.activation_bytes

    def in_eval_view(self, view: nn.Module) -> Leading:
        """Of a view of the model: one of its own."""
        return Leading()

    def __deepcopy__(self, memo: object) -> Leading:
        return Leading()

    def __copy__(self) -> Leading:
        return Leading()

    def __reduce__(self) -> tuple[type[Leading], tuple[()]]:
        return Leading, ()


class _Row:
    """Modules one after another as the fast path runs them; a `network.Runnable`."""

    fast = True
    fused = training = False
    calibration: Calibration | None = None
    cuda_graphs: bool | None = None
    precision = "fp32"

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        self.max_extra_bytes: int | None = None
        self._modules = {"module": nn.Sequential(*modules)}
        self.path = FastPath()

    @property
    def module(self) -> nn.Module:
        """All of them."""
        return self._modules["module"]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The modules'."""
        return self.module.parameters()

    def buffers(self) -> Iterator[Tensor]:
        """The modules'."""
        return self.module.buffers()

    def parts(self, aux: bool = True) -> list[tuple[str, nn.Module, match.Item]]:
        """The modules as one part."""
        return [("", self.module, self.module)]

    def assembled(self, steps: Sequence[Step]) -> tuple[Step, Heads]:
        """A program whose result is theirs."""
        (step,) = steps

        def results(x: Tensor, run: Run) -> dict[str, Tensor]:
            return {_NAME: step(x, run)}

        return results, ()

    def __call__(self, x: Tensor) -> Tensor | None:
        found = self.path.logits(self, x, True)
        return None if found is None else found[_NAME]


def is_frozen(module: nn.Module) -> bool:
    """Whether a module computes in training what it does in evaluation, and learns nothing."""
    tensors = (*module.parameters(), *module.buffers())
    return not any(t.requires_grad for t in tensors) and not any(
        uses_batch(m) if isinstance(m, _BatchNorm) else isinstance(m, match.DROPOUTS) and m.training
        for m in module.modules()
    )
