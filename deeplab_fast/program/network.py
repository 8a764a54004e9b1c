"""What the fast path and the training forms take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..dispatch.precision import check_precision, reason_against
from . import match
from .calibration import Calibration
from .layers import Heads, Step


class Runnable(Protocol):
    """What the fast path runs: a whole `Network`, or one module of another library's model.

    The attributes are those of a `Network`, with its meanings.
    """

    fast: bool
    fused: bool
    max_extra_bytes: int | None
    calibration: Calibration | None
    cuda_graphs: bool | None
    _modules: Any

    @property
    def training(self) -> bool: ...

    @property
    def precision(self) -> str: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def parts(self, aux: bool = True) -> list[tuple[str, nn.Module, match.Item]]: ...

    def assembled(self, steps: Sequence[Step]) -> tuple[Step, Heads]: ...


class Network(nn.Module):
    """A segmentation model of the form that `DeepLabV3` has, and says the meaning of."""

    backbone: nn.Module
    classifier: nn.Module
    aux_classifier: nn.Module | None
    align_corners: bool
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None
    config: tuple[str, dict[str, Any]] | None
    fast: bool
    fused: bool
    max_extra_bytes: int | None
    calibration: Calibration | None = None
    cuda_graphs: bool | None = None
    _precision = "fp32"

    @property
    def precision(self) -> str:
        """What eval calls without gradients on the CPU compute in: "fp32", "bf16" or "int8".

        Raises:
            ValueError: set to another name, or to one that this CPU or the model cannot compute in;
                says why and what to do.
        """
        return self._precision

    @precision.setter
    def precision(self, name: str) -> None:
        checked = check_precision(name)
        if reason := reason_against(checked, self.calibration):
            raise ValueError(reason)
        if checked != self._precision:
            self.drop_prepared()
        self._precision = checked

    def drop_prepared(self) -> None:
        """Free what the fast path holds: prepared weights, memory for maps, CUDA graphs."""

    def parts(self, aux: bool = True) -> list[tuple[str, nn.Module, match.Item]]:
        """Backbone and heads by name, the auxiliary head only if asked for, and what runs them."""
        parts = [("backbone", self.backbone), ("classifier", self.classifier)]
        if aux and self.aux_classifier is not None:
            parts.append(("aux_classifier", self.aux_classifier))
        return [(name, module, module) for name, module in parts]

    def assembled(self, steps: Sequence[Step]) -> tuple[Step, Heads]:
        """Backbone and heads of a program, from the steps of `parts`."""
        backbone, *heads = steps
        named = zip(("out", "aux"), heads, strict=False)
        return backbone, tuple((name, name, head) for name, head in named)
